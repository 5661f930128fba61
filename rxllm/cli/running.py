"""`rxllm run` and `rxllm retry`: a pipeline from a file to a journal, with a person in front of it."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from reactivex import operators as ops

from rxllm.cli.inputs import STDIN
from rxllm.cli.progress import Screen, Tally, counted
from rxllm.cli.settings import UNNAMED, record
from rxllm.errors import ConfigError
from rxllm.operators.budget import budget
from rxllm.operators.call import call
from rxllm.operators.journal import journal
from rxllm.runtime import steady
from rxllm.sinks import iterate
from rxllm.sources.iterables import from_iterable

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator
    from types import FrameType

    from reactivex import Observable

    from rxllm.cli.settings import Settings
    from rxllm.messages import Outcome, Request
    from rxllm.operators.journal import Asking

__all__ = ["INTERRUPTED", "run", "verdict"]

GOOD, FAILED, INTERRUPTED = 0, 1, 130
BAD_ROWS = 20  # that are shown one by one
LOOK = 0.2  # seconds between two looks whether anything is still on the wire
MOST_FILES = 65_536  # a limit beyond that helps nobody


class Counted:
    """An operator, and a tally of what it was asked: what comes from the file instead never comes here."""

    def __init__(self, operator: Asking[Any], tally: Tally) -> None:
        self.operator = operator
        self.tally = tally

    def __call__(self, source: Observable[Any]) -> Observable[Outcome[Any]]:
        """Return the stream of the outcomes."""
        return self.operator(source).pipe(ops.do_action(self.tally.ask))

    def request(self, item: Any) -> Request:
        """Return the request that an item stands for."""
        return self.operator.request(item)

    def client(self, request: Request) -> Any:
        """Return what a request is sent with."""
        return self.operator.client(request)


class Interrupts:
    """Ctrl-C and SIGTERM: after the first one what is on the wire is finished, the second one exits.

    Args:
        stop: pull nothing more; called from a thread.
        is_idle: says that nothing is on the wire; the same. What waits for a quota then need not be waited for.
        give_up: cancel what is in progress, when it is idle or the grace is over; the same.
        grace: seconds.
    """

    def __init__(
        self, stop: Callable[[], None], is_idle: Callable[[], bool], give_up: Callable[[], None], grace: float
    ) -> None:
        self.came = False
        self._stop = stop
        self._is_idle = is_idle
        self._give_up = give_up
        self._grace = grace
        self._over = threading.Event()

    @contextlib.contextmanager
    def heeded(self) -> Generator[None]:
        """Heed signals in this block."""
        numbers = (signal.SIGINT, signal.SIGTERM) if threading.current_thread() is threading.main_thread() else ()
        heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]  # as of a job with &
        before = [(number, signal.signal(number, self._signalled)) for number in heard]
        try:
            yield
        finally:
            self._over.set()
            for number, handler in before:
                signal.signal(number, handler)

    def _signalled(self, _number: int, _frame: FrameType | None) -> None:
        if self.came:
            raise SystemExit(INTERRUPTED)  # not KeyboardInterrupt, which a waiting `iterate` takes for the first one
        self.came = True
        threading.Thread(target=self._end, daemon=True).start()  # it writes, as who is interrupted here may

    def _end(self) -> None:
        self._stop()
        until, idle = steady() + self._grace, 0
        while not self._over.wait(min(LOOK, max(0.0, until - steady()))):
            idle = idle + 1 if self._is_idle() else 0  # twice: what came last is on its way to the file
            if idle > 1 or steady() >= until:
                self._give_up()
                return


def run(settings: Settings, output: Path, *, retrying: bool, quiet: bool) -> int:
    """Ask what is not in the output yet; return the exit code.

    Args:
        settings: what to do.
        output: the journal.
        retrying: ask failed ones again.
        quiet: show no progress.

    Raises:
        ConfigError: something cannot be used, before anything is sent.
        RxllmError: what ended the run.
    """
    source = settings.source()
    check_output(output, source.path)
    prices = settings.price_list()
    raise_file_limit()
    began = steady()
    tally = Tally(settings.model or UNNAMED, prices, began=began)
    with settings.client() as client, settings.gate() as gate:
        asking: Any = call(
            client,
            gate=gate,
            retry=settings.backoff(),
            timeouts=settings.timeouts(),
            stream=settings.stream,
            deadline=3600.0 if settings.deadline is None else settings.deadline,
        )
        limits: dict[str, Any] = {
            kind: int(limit) if kind in {"requests", "tokens"} else limit
            for kind, limit in (settings.budget or {}).items()
        }
        spending = budget(asking, prices=prices, **limits) if limits else None
        kept = journal(output, Counted(spending or asking, tally), retry_failed=retrying)
        tally.total = source.count()

        def items() -> Iterator[Any]:  # which begins when the journal is open: if it cannot be used, nothing changes
            record(output, recorded(settings))
            yield from source

        screen = Screen(lambda: tally.status(steady(), gate.in_flight), quiet=quiet)
        with screen, iterate(from_iterable(items(), thread=source.is_pipe).pipe(kept)) as outcomes:

            def stop() -> None:
                source.stopped = True
                screen.say(f"stopping: {gate.in_flight:,} in flight are finished; once more to stop at once")

            interrupts = Interrupts(stop, lambda: gate.in_flight == 0, outcomes.close, settings.grace)
            with interrupts.heeded():
                consume(outcomes, tally, screen)
    used_up = None if spending is None else spending.statistics().used_up
    code, words = verdict(tally, output, interrupted=interrupts.came, used_up=used_up)
    screen.say("\n".join([tally.summary(steady() - began), *words]))
    return code


def check_output(output: Path, source: Path | None) -> None:
    """Refuse an output that cannot be one.

    Raises:
        ConfigError: it is no file, or the input, or nobody may look.
    """
    try:
        if not output.exists():
            return
        reason = "" if output.is_file() else "it must be a file"
        if source is not None and output.samefile(source):
            reason = "it must be another file than the input"
    except OSError as error:
        reason = str(error.strerror)
    if reason:
        msg = f"output: {reason}, got {output}"
        raise ConfigError(msg)


def verdict(tally: Tally, output: Path, *, interrupted: bool, used_up: str | None) -> tuple[int, list[str]]:
    """Return the exit code of a run, and what to say about it.

    Args:
        tally: what came of it.
        output: where that is.
        interrupted: by Ctrl-C or SIGTERM.
        used_up: the budget that is; None: none.
    """
    code, words = (FAILED if tally.failed else GOOD), list[str]()
    if tally.total is not None and tally.done >= tally.total:
        used_up = None  # it has sufficed
    if interrupted:
        code = INTERRUPTED
        words.append(f"interrupted; what was answered is in {output}, run the same again to go on")
    elif tally.hopeless is not None:
        code = FAILED
        words.append(f"stopped: nothing is answered any more; when that is mended, rxllm retry {output} asks the rest")
    elif used_up is not None:
        code = FAILED
        words.append(f"stopped: the budget of {used_up} is used up; run the same again to go on")
    if tally.bad_rows:
        words.append(f"{counted(tally.bad_rows, 'bad line')}: mend what is bad and run the same again")
    if tally.failed > tally.bad_rows and tally.hopeless is None:
        words.append(f"some requests failed: to ask them again, rxllm retry {output}")
    return code, words


def recorded(settings: Settings) -> dict[str, Any]:
    """Return what to keep of the settings for those who ask again; files by their whole paths."""
    given: dict[str, Any] = {
        name: value
        for name, value in msgspec.structs.asdict(settings).items()
        if value is not None and name != "output"
    }
    for name in ("input", "config", "prices"):
        if name in given and given[name] != STDIN:
            given[name] = str(Path(given[name]).resolve())
    return given


def consume(outcomes: Iterator[Outcome[Any]], tally: Tally, screen: Screen) -> None:
    """Count what comes, until the end or until it makes no sense to go on."""
    for outcome in outcomes:
        bad = tally.bad_rows
        tally.come(outcome)
        if bad < tally.bad_rows <= BAD_ROWS:
            screen.say(str(outcome.error))
        if tally.hopeless is not None:
            return


def raise_file_limit() -> None:
    """Allow as many connections as the system does."""
    if sys.platform == "win32":
        return
    import resource  # noqa: PLC0415  not on Windows

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # macOS calls the hard limit infinite and refuses it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
