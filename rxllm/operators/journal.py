"""Keep each outcome in a file, and ask nothing again that is in it."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from reactivex import Observable

from rxllm.clock import wall
from rxllm.demand import Outlet
from rxllm.errors import CallError, ConfigError, InvalidRequestError, StoreError, check_choice
from rxllm.messages import Outcome, Reply, Request
from rxllm.operators._taking import Exit, Given, Source, Taking
from rxllm.policies.identity import Occurrences, digest, key_of, model_of
from rxllm.stores.journal import JournalFile, Syncing
from rxllm.stores.rows import Row, key_text, lines_of, outcome_of, row_of
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from rxllm.clock import Handle
    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["Asking", "Journaling", "journal"]

T = TypeVar("T")

LARGE = 1 << 20  # bytes: a file from which on it is read in a thread, while the loop goes on

_log = logging.getLogger("rxllm.operators.journal")


class Asking(Protocol[T]):
    """An operator that asks a client, as `call` returns it: what can be journaled."""

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
    run is the third one of the next. A request whose body has changed is asked again, under the same id too. What
    changes answers without being in the request, `validate` or `output`, is not looked at: take another file for it.

    Emits: what `operator` emits, a turn of the loop later: all outcomes of a turn are written in one go first. What the
        file has is emitted at once in the place of a call, with the attempts of then; with `replay=False` nothing is.
    Holds: what `operator` has in progress, and finished outcomes that the consumer has no room for, which are in the
        file already.
    Errors: those of `operator`. A disk that is full, or fails, ends the stream with a `StoreError`: nothing more is
        asked, what is on the wire is finished, written if there is room, and emitted before.
    Completes: with `operator`.
    Dispose: cancels everything; what has been answered is written.

    A process that is killed loses nothing that was answered and written (`write(2)`), which is done in the next turn of
    the loop; a machine that loses power at most about the last second or 1,000 rows. Failed requests are written too,
    and count as done, unless the failure says nothing of them: a key that is not accepted, an empty balance, a run that
    was stopped.

    A request without a JSON, or with the id of another one of the same run, fails and is not sent. A failed item (a bad
    line of `from_jsonl`) passes through and is not written. The value of a function (`rxllm.function`) is kept as JSON,
    so a tuple comes back as a list; one that has no JSON is emitted, and asked again by the next run.

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
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        msg = f"path must be a path, got {path!r}"
        raise ConfigError(msg)
    if not (callable(operator) and hasattr(operator, "request") and hasattr(operator, "client")):
        msg = f"operator must be what rxllm.call returns, or wraps that, got {operator!r}"
        raise ConfigError(msg)
    check_choice("retry_failed", retry_failed, (True, False))
    check_choice("replay", replay, (True, False))
    return Journaling(Path(path), operator, retry_failed=retry_failed, replay=replay)


class Journaling(Generic[T]):
    """What `journal` returns: an operator, which knows whom it asks as that inside does."""

    def __init__(self, path: Path, operator: Asking[T], *, retry_failed: bool, replay: bool) -> None:
        self.path = path
        self.operator = operator
        self.retry_failed = retry_failed
        self.replay = replay

    def __call__(self, source: Observable[Any]) -> Observable[Outcome[T]]:
        """Return the stream of the outcomes."""
        return _Journaled(source, self)

    def request(self, item: Any) -> Request:
        """Return the request that an item stands for.

        Raises:
            CallError: it stands for none.
        """
        return self.operator.request(item)

    def client(self, request: Request) -> Any:
        """Return what `request` is sent with."""
        return self.operator.client(request)


class _Journaled(Stream[Any]):
    def __init__(self, source: Observable[Any], settings: Journaling[Any]) -> None:
        self.source = source
        self.settings = settings

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        run = _Run(self, observer, carrier)
        return connected(run, run.begin)


_Fresh = tuple[Outcome[Any], str | None]  # what has come, and its key


class _Run:
    """One subscription of journal: the observer of the operator inside, and the file."""

    __slots__ = (
        "_carrier",
        "_client_of",
        "_done",
        "_due",
        "_file",
        "_fresh",
        "_given",
        "_knows",
        "_models",
        "_occurrences",
        "_problem",
        "_settings",
        "_source",
        "_syncing",
        "_taking",
        "_told",
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
        self._file: JournalFile | None = None
        self._syncing: Syncing | None = None
        self._knows = False  # the file has rows
        self._fresh: list[_Fresh] = []  # what has come in this turn
        self._due: Handle | None = None  # the end of this turn
        self._problem: StoreError | None = None
        self._told = False  # that a value has no JSON
        self._taking: Taking | None = None
        self._upstream: Disposable | None = None
        self._done = False

    # the beginning

    def begin(self) -> None:
        """Open the file, and then subscribe; a large one in a thread."""
        path, clock = self._settings.path, self._carrier.clock
        try:
            large = path.stat().st_size > LARGE
        except OSError:
            large = False
        if large and clock.threads:
            threading.Thread(target=self._open_apart, name="rxllm journal", daemon=True).start()
        else:
            self._opened(self._open())

    def _open(self) -> JournalFile | Exception:
        try:
            return JournalFile(self._settings.path, retry_failed=self._settings.retry_failed)
        except Exception as error:
            return error

    def _open_apart(self) -> None:
        opened = self._open()
        self._carrier.clock.post(lambda: self._opened(opened))

    def _opened(self, opened: JournalFile | Exception) -> None:
        if isinstance(opened, Exception):
            if not self._done:
                self._done = True
                self.outlet.end(opened)
            return
        if self._done:
            opened.close()
            return
        self._file, self._knows = opened, len(opened) > 0
        self._syncing = Syncing(opened, self._carrier.clock, self._disk_failed)
        carrier = self._carrier
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

    def look(self, item: Any) -> Request | Outcome[Any] | None:
        """Return what the operator is given for an item; None: it is in the file."""
        request: Request | None = item if isinstance(item, Request) else None
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
        if self._knows and self._replayed(request, key):
            return None
        self._given.add(request, key)
        return request

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
        content = digest(request, self._models[1])
        key = content if name is None else key_of(content, name)
        occurrence = self._occurrences.count(content, name)
        if not occurrence:
            msg = f"the id {name!r} is that of another request of this run: ids must be unique"
            raise InvalidRequestError(msg)
        return key_text(key, occurrence)

    def _replayed(self, request: Request, key: str) -> bool:
        """Say whether the file has a request, and emit what it has."""
        assert self._file is not None  # noqa: S101  for the type checkers
        line = self._file.find(key)
        if line is None:
            return False
        if not self._settings.replay:
            return True
        try:
            outcome = outcome_of(line, request, self._restore)
        except (CallError, ValueError) as error:
            _log.warning("journal %s: %s is asked again: %s", self._settings.path, request.id or key, error)
            return False
        self.outlet.push(outcome)
        return True

    def _restore(self, request: Request, route: str | None, status: int, body: bytes) -> Reply[Any]:
        client = self._client_of(request)
        if route is not None and route in getattr(client, "names", ()):
            client = client.clients[client.names.index(route)]
        elif hasattr(client, "clients"):
            client = client.clients[0]
        restore = getattr(client, "restore", None)
        if restore is None:
            msg = f"{client!r} cannot make a reply of a body: give it a restore(request, status, body), or replay=False"
            raise ConfigError(msg)
        reply: Reply[Any] = restore(request, status, body)
        return reply

    def inside(self) -> int:
        """Return how many items are in progress."""
        return self._given.count

    def crowd(self) -> int:
        """Return how many finished outcomes there are beyond those that may be kept ready."""
        held = len(self.outlet.held)
        return max(0, held + len(self._fresh) - self.spare) if held else 0

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
            row, problem = row_of(outcome, key, date)
            if problem is not None:
                self._tell(problem)
            rows.append(row)
        try:
            return lines_of(rows)
        except (TypeError, ValueError, RecursionError):  # a reply of a function's own making: none but that is left out
            return b"".join([self._line(row) for row in rows])

    def _line(self, row: Row) -> bytes:
        try:
            return lines_of([row])
        except (TypeError, ValueError, RecursionError) as error:
            self._tell(f"an outcome has no JSON: {error}")
            return b""

    def _tell(self, problem: str) -> None:
        """Say once what is not written."""
        if not self._told:
            self._told = True
            _log.warning("journal %s: %s; the next run asks again", self._settings.path, problem)

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
        push = self.outlet.push
        for outcome, _ in fresh:
            push(outcome)
        if self._taking is not None:
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
        if not self._done:
            self._end(error)

    def on_completed(self) -> None:
        """End, after what has come."""
        if not self._done:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
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
        if self._syncing is not None:
            self._syncing.close()
            self._syncing = None
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._due is not None:
            self._due.cancel()
            self._due = None
