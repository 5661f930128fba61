"""Keep each outcome in a file, and ask nothing again that is in it."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, cast

from reactivex import Observable

from rxllm.clients.function import FunctionClient
from rxllm.clock import wall
from rxllm.demand import Outlet
from rxllm.errors import CallError, ConfigError, InvalidRequestError, StoreError, check_choice
from rxllm.messages import Outcome, Reply, Request
from rxllm.operators._finished import Finished
from rxllm.operators._intake import Wrapper
from rxllm.operators._opening import Opening
from rxllm.operators._taking import Exit, Given, Source, Taking
from rxllm.policies.identity import Occurrences, digest, key_of, model_of
from rxllm.stores.journal import JournalFile, Syncing
from rxllm.stores.rows import Row, key_text, lines_of, outcome_of, row_of
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable

    from rxllm.clock import Handle
    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["Asking", "Journaling", "journal"]

T = TypeVar("T")

KEY = slice(7, 39)  # the digest in a line
LARGE = 1 << 20  # bytes: a file from which on it is read in a thread, while the loop goes on

_log = logging.getLogger("rxllm.operators.journal")


class Asking(Protocol[T]):
    """An operator that asks a client, as `call` returns it: what can be journaled.

    Its items are requests, and failed outcomes of items that stand for none, which it passes on. If `takes_finished` is
    true they may be `Finished` too, as `rxllm.operators._finished` has it.
    """

    def __call__(self, source: Observable[Any], /) -> Observable[Outcome[T]]:
        """Return the stream of the outcomes."""
        ...

    def request(self, item: Any, /) -> Request:
        """Return the request that an item stands for."""
        ...

    def client(self, request: Request, /) -> Any:
        """Return what `request` is sent with."""
        ...


def journal(
    path: str | os.PathLike[str], operator: Asking[T], *, retry_failed: bool = False, replay: bool = True
) -> Journaling[T]:
    """Write each outcome to a file before it is emitted, and do not ask again for what is there: kill it, run it again.

        requests                 a-b-c-|            a-b-c-|      the next run
        call(client)             --A-B  killed          --C|
        journal(path, call(…))   --A-B              AB----C|

    A line of the file is an outcome, in the shape of the output of OpenAI's Batch API; see `rxllm.stores.rows`. What
    was asked is known by operation, model, body and id. Of equal requests each is kept by itself: the third one of a
    run is the third one of the next. A request whose body has changed is asked again, under the same id too, and the
    row of before stays: the last one of an id counts. What changes answers without being in the request is not looked
    at: take another file for another `validate`, `output` or server, and let a function that chooses the client look at
    the body or the operation, not at `meta`. The file has no questions: give ids, or a `meta` that has a JSON, to know
    which row is whose.

    Emits: what `operator` emits, a turn of the loop later: all outcomes of a turn are written in one go first. What the
        file has goes through `operator` as an outcome that is finished: it takes the place of a call that answers at
        once, with the attempts of then. So `ordered` and `on_failure` hold for it. With `replay=False` it is skipped.
    Holds: what `operator` has in progress, and finished outcomes that the consumer has no room for, which are in the
        file already. The source is subscribed when the file is open: feed it by hand with a `Feed`, not a Subject.
    Errors: those of `operator`. A disk that is full, or fails, or a file that somebody has removed or replaced
        meanwhile, ends the stream with a `StoreError`: nothing more is asked, what is on the wire is finished, written
        if there is room, and emitted before.
    Completes: with `operator`.
    Dispose: cancels everything; what has been answered is written.

    Quotas of more than 10 minutes that `operator` waits for are kept in files beside this one (`….quota`), so that a
    restart does not begin a day anew; `Quota(state=…)` names another file.

    A request takes up to 50 bytes of memory for as long as the run lasts, so that equal ones can be told apart.

    A process that is killed loses nothing that was answered and written (`write(2)`), which is done in the next turn of
    the loop; a machine that loses power at most about the last second or 1,000 rows. Failed requests are written too,
    and count as done, unless the failure says nothing of them: a key that is not accepted, an empty balance, a server
    that takes nothing, a run that was stopped. The one that ends a stream of `call(on_failure="raise")` is not written:
    the next run asks it again.

    A request without a JSON, or with the id of another one of the same run, fails and is not sent. A failed item (a bad
    line of `from_jsonl`) passes through and is not written. The value of a function (`rxllm.function`) is kept as JSON:
    a tuple comes back as a list, a date as a text, a NaN as None, which is logged once. One that has no JSON is
    emitted, and asked again by the next run.

    Args:
        path: the file, for one run at a time; `<path>.lock` beside it says so.
        operator: `call(…)`, or what wraps one.
        retry_failed: ask failed ones again; of several lines the last one counts.
        replay: emit what the file has; False: skip it.

    Raises:
        ConfigError: an argument of another kind; in the stream: the file cannot be used, is in use, or has a line that
            is not of a journal of this version; an outcome is of no request that the operator was given.

    Example:
        >>> import rxllm, tempfile
        >>> asked = []
        >>> shout = rxllm.call(rxllm.function(lambda text: asked.append(text) or text.upper()), ordered=True)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     kept = journal(f"{folder}/shouts.jsonl", shout)
        ...     first = rxllm.collect(rxllm.from_iterable(["a", "b"]).pipe(kept))
        ...     second = rxllm.collect(rxllm.from_iterable(["a", "b", "a"]).pipe(kept))
        >>> [outcome.value for outcome in second], asked
        (['A', 'B', 'A'], ['a', 'b', 'a'])
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path) or "\0" in str(path):
        msg = f"path must be a path, got {path!r}"
        raise ConfigError(msg)
    if not (callable(operator) and hasattr(operator, "request") and hasattr(operator, "client")):
        msg = f"operator must be what rxllm.call returns, or wraps that, got {operator!r}"
        raise ConfigError(msg)
    check_choice("retry_failed", retry_failed, (True, False))
    check_choice("replay", replay, (True, False))
    return Journaling(Path(path), operator, retry_failed=retry_failed, replay=replay)


class Journaling(Wrapper[T]):
    """What `journal` returns: an operator, which knows whom it asks as that inside does."""

    def __init__(self, path: Path, operator: Asking[T], *, retry_failed: bool, replay: bool) -> None:
        super().__init__(operator)
        self.takes_finished = True  # whatever the operator inside does
        self.path = path
        self.retry_failed = retry_failed
        self.replay = replay

    def __call__(self, source: Observable[Any]) -> Observable[Outcome[T]]:
        """Return the stream of the outcomes."""
        return _Journaled(source, self)


class _Journaled(Stream[Any]):
    def __init__(self, source: Observable[Any], settings: Journaling[Any]) -> None:
        self.source = source
        self.settings = settings

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        run = _Run(self, observer, carrier)
        return connected(run, run.begin)


class _UnrestorableError(Exception):
    """A client can make no reply of what the file has; this ends the stream."""


_Fresh = tuple[Outcome[Any], str | None]  # what has come, and its key


class _Run:
    """One subscription of journal: the observer of the operator inside, and the file."""

    __slots__ = (
        "_carrier",
        "_client_of",
        "_done",
        "_due",
        "_emitting",
        "_ending",
        "_file",
        "_fresh",
        "_functions",
        "_given",
        "_knows",
        "_models",
        "_occurrences",
        "_opening",
        "_problem",
        "_settings",
        "_source",
        "_syncing",
        "_taking",
        "_through",
        "_told",
        "_unreadable",
        "_upstream",
        "outlet",
        "spare",
    )

    def __init__(self, operator: _Journaled, observer: Observer[Any], carrier: DemandScheduler) -> None:
        self._source = operator.source
        self._settings = operator.settings
        self._carrier = carrier
        self.outlet: Outlet[Any] = Outlet(observer, carrier, self._after)
        self.spare = 0 if carrier.demand is None else carrier.demand.ahead
        self._given = Given()
        self._client_of = operator.settings.operator.client
        self._occurrences = Occurrences()
        self._models: tuple[Any, str | None] = (None, None)  # of the last client
        self._functions = False  # some of the clients are
        self._opening: Opening[JournalFile] | None = None
        self._file: JournalFile | None = None
        self._syncing: Syncing | None = None
        self._knows = False  # the file has rows
        self._fresh: list[_Fresh] = []  # what has come in this turn
        self._due: Handle | None = None  # the end of this turn
        self._problem: StoreError | None = None
        self._through = getattr(operator.settings.operator, "takes_finished", False)  # one of the user's does not
        self._told: set[bool] = set()  # that a value is not kept as it is, or not at all
        self._unreadable = 0  # rows that were asked again
        self._taking: Taking | None = None
        self._upstream: Disposable | None = None
        self._emitting = False
        self._ending: tuple[Exception | None] | None = None  # when the emission is over
        self._done = False

    # the beginning

    def begin(self) -> None:
        """Open the file, and then subscribe; a large one in a thread."""
        settings = self._settings
        try:
            large = settings.path.stat().st_size > LARGE
        except (OSError, ValueError):
            large = False

        def make(wanted: Callable[[], bool]) -> JournalFile:
            return JournalFile(settings.path, retry_failed=settings.retry_failed, wanted=wanted)

        self._opening = Opening(make, self._carrier, self._opened, apart=large)

    def _opened(self, opened: JournalFile | Exception) -> None:
        if isinstance(opened, Exception):
            self._done = True
            self.outlet.end(opened)
            return
        self._file, self._knows = opened, len(opened) > 0
        self._syncing = Syncing(opened, self._carrier.clock, self._disk_failed)
        carrier = self._carrier
        if carrier.clock.threads:  # in virtual time there is no next run
            self._settings.keep_beside(str(opened.path))
        try:
            stream: object = self._settings.operator(Source(self, self._source))
            if not isinstance(stream, Observable):
                msg = f"operator must return an Observable, got {type(stream).__name__}"
                raise ConfigError(msg)  # noqa: TRY301  it goes the way of what the operator itself raises
        except Exception as error:
            self.on_error(error)
            return
        upstream = subscribe(stream, self, carrier.with_demand(Exit(self, carrier)))
        if self._done:
            upstream.dispose()
        else:
            self._upstream = upstream

    def took(self, taking: Taking) -> None:
        """Learn who takes the items."""
        self._taking = taking

    # the items

    def look(self, item: Any) -> Request | Outcome[Any] | Finished | None:
        """Return what the operator is given for an item: what the file has is finished. None: it is skipped."""
        request: Request | None = item if isinstance(item, Request) else None
        if request is None and isinstance(item, Finished):  # of a journal around this one
            return self._finished(item.outcome)
        if request is None and isinstance(item, Outcome) and item.error is not None:
            failed = cast("Outcome[Any]", item)
            self._given.add(failed.request, None)
            return failed
        try:
            if request is None:
                request = self._settings.operator.request(item)
            key = self._key(request)
        except Exception as error:  # also of the user's own, as `call` has it
            return self._refused(item if request is None else request, error)
        line = self._file.find(key) if self._knows and self._file is not None else None
        if line is not None and not self._settings.replay:
            return None
        done = None if line is None else self._restored(request, line)
        if done is None:
            self._given.add(request, key)
            return request
        return self._finished(done)

    def _finished(self, outcome: Outcome[Any]) -> Finished | None:
        """Hand on what needs no call, if the operator knows what that is; else emit it."""
        if not self._through:
            self.outlet.push(outcome)
            return None
        self._given.add(outcome.request, None)
        return Finished(outcome)

    def _refused(self, item: Any, error: Exception) -> Outcome[Any]:
        """Return the outcome of an item that is not sent: the operator decides what becomes of it."""
        if isinstance(error, CallError):
            error.sent = False
        request = item if isinstance(item, Request) else Request(body=item, operation="item")
        self._given.add(request, None)
        return Outcome(request=request, error=error.with_traceback(None))

    def _key(self, request: Request) -> str:
        client, name = self._client_of(request), request.id
        if client is not self._models[0]:
            self._models = (client, model_of(client))
            self._functions = self._functions or isinstance(client, FunctionClient)
        content = digest(request, self._models[1])
        key = content if name is None else key_of(content, name)
        occurrence = self._occurrences.count(content, name)
        if not occurrence:
            msg = f"the id {name!r} is that of another request of this run: ids must be unique"
            raise InvalidRequestError(msg)
        return key_text(key, occurrence)

    def _restored(self, request: Request, line: bytes) -> Outcome[Any] | None:
        """Return what the file has of a request; None: that cannot be read any more."""
        try:
            return outcome_of(line, request, self._restore)
        except _UnrestorableError as error:
            raise ConfigError(str(error)) from None
        except (CallError, ConfigError, ValueError) as wrong:
            if not self._unreadable:
                path, name = self._settings.path, request.id or line[KEY].decode()
                _log.warning("journal %s: the row of %s cannot be read, so it is asked again: %s", path, name, wrong)
            self._unreadable += 1
            return None

    def _restore(self, request: Request, route: str | None, status: int, body: bytes) -> Reply[Any]:
        client = self._client_of(request)
        if route is not None and route in getattr(client, "names", ()):
            client = client.clients[client.names.index(route)]
        elif hasattr(client, "clients"):
            client = client.clients[0]
        restore = getattr(client, "restore", None)
        if restore is None:
            msg = f"{client!r} cannot make a reply of a body: give it a restore(request, status, body), or replay=False"
            raise _UnrestorableError(msg)
        reply: Reply[Any] = restore(request, status, body)
        return reply

    def inside(self) -> int:
        """Return how many items are in progress."""
        return self._given.count

    def waiting(self) -> int:
        """Return how many finished outcomes are not delivered."""
        return len(self.outlet.held) + len(self._fresh)

    def crowd(self) -> int:
        """Return how many finished outcomes there are beyond those that may be kept ready."""
        return max(0, self.waiting() - self.spare) if self.outlet.held else 0

    # the outcomes

    def on_next(self, outcome: Outcome[Any]) -> None:
        """Take an outcome of the operator, to be written at the end of the turn."""
        if self._done:
            return
        given = self._given.take(outcome.request)
        if given is None:
            self._fail(
                ConfigError(
                    f"the operator of the journal {str(self._settings.path)!r} gave an outcome of a request that it "
                    f"was not given, id {outcome.request.id!r}: it must not change requests, nor answer one twice"
                )
            )
            return
        self._fresh.append((outcome, given[0]))
        if self._due is None:
            self._due = self._carrier.clock.call_soon(self._turn)

    def _lines(self, fresh: list[_Fresh]) -> bytes:
        """Return the lines of what has come, in one piece."""
        date, rows = wall(), list[Row]()
        for outcome, key in fresh:
            if key is None:
                continue  # it failed before it came here
            row, problem = row_of(outcome, key, date, by_value=self._functions and self._is_function(outcome.request))
            if problem is not None:
                self._tell(problem, again=row.rxllm.again)
            rows.append(row)
        try:
            return lines_of(rows)
        except (TypeError, ValueError, RecursionError):  # a reply of a function's own making: none but that is left out
            return b"".join([self._line(row) for row in rows])

    def _line(self, row: Row) -> bytes:
        try:
            return lines_of([row])
        except (TypeError, ValueError, RecursionError) as error:
            self._tell(f"an outcome has no JSON, so the next run asks again: {error}")
            return b""

    def _is_function(self, request: Request) -> bool:
        return isinstance(self._client_of(request), FunctionClient)

    def _tell(self, problem: str, *, again: bool = True) -> None:
        """Say once what is not written, or not as it was."""
        if again not in self._told:
            self._told.add(again)
            _log.warning("journal %s: %s", self._settings.path, problem)

    def _turn(self) -> None:
        self._due = None
        self._write()

    def _write(self) -> bool:
        """Write what there is, then emit it; say no if the disk does not take it."""
        fresh, file = self._fresh, self._file
        if not fresh or file is None:
            return True
        try:
            file.append(self._lines(fresh))
        except OSError as error:
            self._disk_failed(error)
            return False
        if self._syncing is not None:
            self._syncing.wrote(len(fresh))
        self._fresh = []
        self._emitting = True
        try:
            for outcome, _ in fresh:
                self.outlet.push(outcome)
        finally:
            self._emitting = False
        if self._ending is not None:  # inside of an emission
            self._end(self._ending[0])
        elif self._taking is not None:
            self._taking.wake()
        return True

    def _disk_failed(self, error: OSError) -> None:
        """Ask nothing more; what is in progress may still find room."""
        if self._problem is not None or self._file is None:
            return
        path = str(self._settings.path)
        self._problem = StoreError(f"journal {path!r} cannot be written: {error.strerror or error}")
        _log.warning("journal %s cannot be written, nothing more is asked: %s", path, error)
        if self._taking is not None:
            self._taking.stop()

    # the ends

    def on_error(self, error: Exception) -> None:
        """End with `error`, after what has come."""
        self._end(error)

    def on_completed(self) -> None:
        """End, after what has come."""
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if self._done:
            return
        if self._emitting:
            self._ending = (error,)
            return
        self._done = True
        self._upstream = None
        unwritten = 0
        try:
            if not self._write():
                unwritten = self._write_singly()
        finally:
            self._close()
        problem = self._problem
        if problem is not None and unwritten:
            self._problem = problem = StoreError(f"{problem.message}; {unwritten:,} outcomes are not in it")
        self.outlet.end(problem if error is None else error)

    def _write_singly(self) -> int:
        """Write of what is left what finds room, and emit all: it is paid for. Return how many are not written."""
        fresh, file = self._fresh, self._file
        self._fresh = []
        unwritten = 0
        for one in fresh:
            try:
                if file is not None:
                    file.append(self._lines([one]))
            except OSError:
                unwritten += 1
            self.outlet.push(one[0])
        return unwritten

    def _fail(self, error: Exception) -> None:
        """End with `error`, and cancel everything; what has been answered is written, and emitted."""
        self._write()
        self.dispose(of_outlet=False)
        self.outlet.end(error)

    def _after(self) -> None:
        if self._taking is not None:
            self._taking.wake()

    def dispose(self, *, of_outlet: bool = True) -> None:
        """Cancel everything; write what has been answered."""
        if of_outlet:
            self.outlet.dispose()
        if self._opening is not None:
            self._opening.leave()
        if self._done:
            return
        self._done = True
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.dispose()
        if self._fresh and self._file is not None:
            try:
                self._file.append(self._lines(self._fresh))
                if self._syncing is not None:
                    self._syncing.wrote(len(self._fresh))
            except OSError as error:
                _log.warning("journal %s: %d outcomes are not in it: %s", self._settings.path, len(self._fresh), error)
            self._fresh = []
        self._close()

    def _close(self) -> None:
        if self._unreadable > 1:
            _log.info("journal %s: %d rows could not be read", self._settings.path, self._unreadable)
        if self._syncing is not None:
            self._syncing.close()
            self._syncing = None
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._due is not None:
            self._due.cancel()
            self._due = None
