"""What a run has done so far, and how that is shown on the standard error output."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
from collections import Counter, deque
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

from rxllm.cli.inputs import BAD_ROW
from rxllm.errors import AuthError, BillingError, CancelledError, ConfigError, ConnectionError, NotFoundError
from rxllm.runtime import steady

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from rxllm.messages import Outcome, Request
    from rxllm.policies.prices import Prices

__all__ = ["Screen", "Tally", "counted", "model_named", "silence", "span_text"]

QUICK = 0.25  # seconds between two looks at a terminal
SLOW, SLOWEST = 10.0, 600.0  # seconds between two lines of a log, at first and in the end
SHARE = 0.1  # of the time so far is what a log waits for its next line: 100 lines are enough for a day
WIDTH = 80  # characters of a terminal that does not say how many it has
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
        self.unasked = 0  # given up before they were sent: the next run asks them
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
        if outcome.request.operation == BAD_ROW or (is_unasked(outcome) and not outcome.attempts):
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
        if is_unasked(outcome):
            self.unasked += 1
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
        of = "" if self.total is None else f"/{max(self.total, self.done):,}"  # a file may grow
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
        ended = f"{self.good:,} good, {self.failed:,} failed"
        if self.unasked:
            ended += f", {self.unasked:,} not asked"
        spent = "".join(f", {part}" for part in self._spent())
        lines = [
            f"{self.done:,} done{told}: {ended}; {span_text(seconds)}{spent}",
            *(f"  {count:,} {name}: {self.examples[name]}" for name, count in self.failures.most_common()),
        ]
        return "\n".join(lines)

    def _spent(self) -> list[str]:
        parts = [f"{self.tokens:,} tokens"] if self.tokens else []
        if self.prices is not None:
            more = f" and {self.unpriced:,} without a price" if self.unpriced else ""
            parts.append(f"${self.usd:,.4f}{more}")
        return parts


def is_unasked(outcome: Outcome[Any]) -> bool:
    """Say whether a request was given up before it was answered: it is not done."""
    return isinstance(outcome.error, CancelledError)


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


def counted(count: int, what: str) -> str:
    """Return a number of things.

    >>> counted(1, "bad line"), counted(2000, "request")
    ('1 bad line', '2,000 requests')
    """
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def silence(stream: TextIO) -> None:
    """Let what is still to be written to a broken stream go nowhere, so that the process ends in peace."""
    with contextlib.suppress(OSError, ValueError):  # it has no descriptor, or is closed
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def log_pause(seconds: float) -> float:
    """Return the seconds until the next line of a log that is `seconds` old.

    >>> [log_pause(seconds) for seconds in (0, 60, 600, 86400)]
    [10.0, 10.0, 60.0, 600.0]
    """
    return min(SLOWEST, max(SLOW, SHARE * seconds))


class Screen(logging.Handler):
    """The standard error output: a line that is rewritten on a terminal; elsewhere lines, ever more seldom.

    The warnings of the library are shown as well. Leave the block, and the line is gone. When nobody reads any more
    (`2>&1 | head`), nothing is shown.

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
        self._rewrites = self._stream.isatty() and os.environ.get("TERM") != "dumb"
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
                self._write(f"{erase}{text}\n" if text else erase)

    def _show(self) -> None:
        began = steady()
        while not self._over.wait(QUICK if self._rewrites else log_pause(steady() - began)):
            line = self._status()
            if not self._rewrites:
                self.say(line)
                continue
            with self.lock or threading.RLock():
                self._write(f"\r\x1b[K{line[: self._width()]}")
                self._shown = True

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
            self._stream.flush()
        except OSError:
            silence(self._stream)

    def _width(self) -> int:
        """Return how many characters a line may have that is to be rewritten."""
        try:
            columns = os.get_terminal_size(self._stream.fileno()).columns
        except (OSError, ValueError, AttributeError):
            columns = 0
        return (columns or WIDTH) - 1
