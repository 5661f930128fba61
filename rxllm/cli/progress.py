"""What a run has done so far, and how that is shown on the standard error output."""

from __future__ import annotations

import logging
import shutil
import sys
import threading
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

from rxllm.cli.inputs import BAD_ROW
from rxllm.errors import AuthError, BillingError, ConfigError, ConnectionError, NotFoundError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from rxllm.messages import Outcome, Request
    from rxllm.policies.prices import Prices

__all__ = ["Screen", "Tally", "model_named", "span_text"]

QUICK = 0.25  # seconds between two looks at a terminal
SLOW = 10.0  # seconds between two lines of a log
RECENT = 30.0  # seconds that the rate is of
HOPELESS = 10  # failures in a row that have nothing to do with what is asked: the run is over
NOT_ABOUT_IT = (AuthError, BillingError, ConnectionError, NotFoundError)


class Tally:
    """Counts outcomes: those that were asked for in this run, and all that have come out.

    Args:
        model: what is asked unless a request names another.
        prices: what models cost; None: that is not known.
        began: steady seconds of the beginning.
    """

    def __init__(self, model: str, prices: Prices | None = None, *, began: float = 0.0) -> None:
        self.model = model
        self.prices = prices
        self.total: int | None = None  # how many there will be; None: that is not known
        self.good = 0
        self.failures: Counter[str] = Counter()  # by class
        self.examples: dict[str, str] = {}  # the first message of each class
        self.bad_rows = 0  # of the failed ones: they stand for no request
        self.asked = 0  # ended in this run, bad rows excepted
        self.tokens = 0
        self.usd = 0.0
        self.unpriced = 0  # asked of models that have no price
        self.hopeless: Exception | None = None  # nothing will be answered any more, as it seems
        self._in_a_row = 0
        self._marks = deque([(began, 0)])  # (seconds, asked), of the last `RECENT` seconds

    @property
    def failed(self) -> int:
        """How many have failed."""
        return self.failures.total()

    @property
    def done(self) -> int:
        """How many have come out, those of earlier runs too."""
        return self.good + self.failed

    def ask(self, outcome: Outcome[Any]) -> None:
        """Count one that was asked for in this run."""
        if outcome.request.operation == BAD_ROW:
            return
        self.asked += 1
        usage = outcome.usage
        self.tokens += usage.total_tokens
        if self.prices is not None:
            try:
                self.usd += self.prices.cost(usage, model_named(outcome.request) or self.model)
            except ConfigError:
                self.unpriced += 1
        self._in_a_row = self._in_a_row + 1 if isinstance(outcome.error, NOT_ABOUT_IT) else 0
        if self._in_a_row >= HOPELESS:
            self.hopeless = outcome.error

    def come(self, outcome: Outcome[Any]) -> None:
        """Count one that has come out."""
        error = outcome.error
        if error is None:
            self.good += 1
            return
        self.bad_rows += outcome.request.operation == BAD_ROW
        name = type(error).__name__
        self.failures[name] += 1
        self.examples.setdefault(name, str(error))

    def rate(self, now: float) -> float:
        """Return how many are answered a second, lately.

        Args:
            now: steady seconds, not before those of the last call.
        """
        marks = self._marks
        marks.append((now, self.asked))
        while len(marks) > 2 and marks[1][0] <= now - RECENT:  # noqa: PLR2004  the first one is the beginning
            marks.popleft()
        since, before = marks[0]
        return (self.asked - before) / (now - since) if now > since else 0.0

    def status(self, now: float, in_flight: int) -> str:
        """Return a line that says how far it is."""
        of = "" if self.total is None else f"/{self.total:,}"
        rate = self.rate(now)
        parts = [f"{self.done:,}{of} done", f"{self.failed:,} failed", f"{in_flight:,} in flight", f"{rate:,.1f}/s"]
        parts.extend(self._spent())
        if self.total is not None and rate > 0:
            parts.append(f"{span_text(max(0, self.total - self.done) / rate)} left")
        return ", ".join(parts)

    def summary(self, seconds: float) -> str:
        """Return what has been done, on some lines."""
        earlier = self.done - self.asked
        told = f", {earlier:,} of them not asked in this run" if earlier > 0 else ""
        spent = "".join(f", {part}" for part in self._spent())
        lines = [
            f"{self.done:,} done{told}: {self.good:,} good, {self.failed:,} failed; {span_text(seconds)}{spent}",
            *(f"  {count:,} {name}: {self.examples[name]}" for name, count in self.failures.most_common()),
        ]
        return "\n".join(lines)

    def _spent(self) -> list[str]:
        parts = [f"{self.tokens:,} tokens"] if self.tokens else []
        if self.prices is not None:
            more = f" and {self.unpriced:,} without a price" if self.unpriced else ""
            parts.append(f"${self.usd:,.4f}{more}")
        return parts


def model_named(request: Request) -> str | None:
    """Return the model that a request names; None: it leaves that to the client."""
    body = request.body
    named: object = cast("dict[str, Any]", body).get("model") if isinstance(body, dict) else None
    return named if isinstance(named, str) else None


def span_text(seconds: float) -> str:
    """Return a time for people.

    >>> span_text(4.2), span_text(75), span_text(3 * 3600 + 120)
    ('4.2 s', '1 min 15 s', '3 h 2 min')
    """
    if seconds < 60:  # noqa: PLR2004  a minute
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes} min" if hours else f"{minutes} min {rest} s"


class Screen(logging.Handler):
    """The standard error output: a line that is rewritten on a terminal, a line every ten seconds elsewhere.

    The warnings of the library are shown as well. Leave the block, and the line is gone.

    Args:
        status: returns the line.
        quiet: show no such line.
        stream: where to.
    """

    def __init__(self, status: Callable[[], str], *, quiet: bool = False, stream: TextIO | None = None) -> None:
        super().__init__(logging.WARNING)
        self._status = status
        self._quiet = quiet
        self._stream = sys.stderr if stream is None else stream
        self._rewrites = self._stream.isatty()
        self._shown = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._show, name="rxllm progress", daemon=True)

    def __enter__(self) -> Self:
        """Begin to show."""
        logging.getLogger("rxllm").addHandler(self)
        if not self._quiet:
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Show no more."""
        self._over.set()
        logging.getLogger("rxllm").removeHandler(self)
        if self._thread.ident is not None:
            self._thread.join()
        self.say("")

    def emit(self, record: logging.LogRecord) -> None:
        """Show a warning of the library."""
        self.say(f"warning: {record.getMessage()}")

    def say(self, text: str) -> None:
        """Write a line above the one that is rewritten; of an empty one only that goes."""
        with self.lock or threading.RLock():
            erase = "\r\x1b[K" if self._shown else ""
            self._shown = False
            if text or erase:
                self._stream.write(f"{erase}{text}\n" if text else erase)
                self._stream.flush()

    def _show(self) -> None:
        while not self._over.wait(QUICK if self._rewrites else SLOW):
            line = self._status()
            if not self._rewrites:
                self.say(line)
                continue
            width = shutil.get_terminal_size().columns - 1
            with self.lock or threading.RLock():
                self._stream.write(f"\r\x1b[K{line[:width]}")
                self._stream.flush()
                self._shown = True
