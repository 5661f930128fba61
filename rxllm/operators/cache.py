"""Ask nothing that has been answered before."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import msgspec
from reactivex import Observable

from rxllm.clients.function import FunctionClient
from rxllm.clients.routing import Routes
from rxllm.demand import Outlet
from rxllm.errors import CallError, CancelledError, ConfigError, InvalidRequestError, check_choice, check_number
from rxllm.messages import Outcome, Reply, Request
from rxllm.operators._failure import failure
from rxllm.operators._finished import Finished
from rxllm.operators._intake import Intake, Wrapper
from rxllm.operators._shelf import Shelf
from rxllm.policies.identity import digest, is_plain, model_of
from rxllm.policies.sampling import is_sampled
from rxllm.stores.cache import CacheFile, Kept
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from rxllm.clock import Handle
    from rxllm.demand import DemandScheduler, Disposable, Observer
    from rxllm.operators.journal import Asking

__all__ = ["CacheStatistics", "Caching", "cache"]

T = TypeVar("T")

WIDTH = 256  # requests that are looked up at a time

_log = logging.getLogger("rxllm.operators.cache")
_encode = msgspec.json.Encoder().encode


def cache(
    path: str | os.PathLike[str],
    operator: Asking[T],
    *,
    ttl: float | None = None,
    most_bytes: int = 1 << 30,
    sampled: bool = False,
) -> Caching[T]:
    """Answer from a file what has been answered before, and ask the rest.

        requests                  a-b-a---b
        call(client)              ---A-B
        cache(path, call(…))      ---A-BA-B|      the second a and b are not sent

    What is asked is known by operation, model and body, as a whole; never by id or `meta`. The file is for one way to
    ask: take another one for another server, function, `output` or `validate`, which are not looked at. It is an SQLite
    database that several pipelines and processes may use at the same time, and no other program should write.

    Emits: the outcomes of the operator; and for what the file has an outcome with the reply as if it had come, and no
        attempts, so its usage is zero. These come when they are found, also before those of earlier requests.
    Holds: at most 256 requests that are looked up, as far as the operator has room for them, so what is found waits for
        its turn too; or as many that were found, when the consumer has no room for them. The source is subscribed when
        the file is open: feed it by hand with a `Feed`, not a Subject.
    Errors: those of the operator. A file that is damaged, or of something else, ends the stream with a `ConfigError`
        after what is in progress. A disk that is full is logged once, and the run goes on without keeping anything.
    Completes: when the operator does, and all is written. A request that was just looked up when the operator ended by
        itself (a budget) is a `CancelledError`: it was not asked.
    Dispose: as the operator; what has come is written, and who closes the pipeline waits for that.

    Good replies alone are kept, a moment after they came: a process that is killed may lose the last ones. Equal
    requests that are in progress at the same time are all sent (`call(single_flight=True)` merges them). The value of a
    function is kept if it comes back from JSON as it was.

    Answers that are drawn anew each time are not cached, because who asks a hundred times wants a hundred answers: when
    there is no `seed`, and `temperature` is above 0 or not given (1 is what servers take then), or `n` is above 1.
    Embeddings, moderations and functions draw nothing. `sampled=True` caches all.

    Args:
        path: the file; it is made if there is none.
        operator: what `call` returned, or `budget` or `journal` around it.
        ttl: seconds for which an answer counts, > 0; None: for ever.
        most_bytes: of all answers together, >= 1; what was not used for longest goes first.
        sampled: cache also what is drawn anew each time.

    Returns:
        The operator, with the `request` and `client` of the one inside, and `statistics()`.

    Raises:
        ConfigError: an argument out of range.

    Example:
        >>> import rxllm, tempfile
        >>> folder = tempfile.TemporaryDirectory()
        >>> asking = cache(f"{folder.name}/cache.db", rxllm.call(rxllm.function(str.upper), window=1, ordered=True))
        >>> for words in (["a", "b"], ["b", "c"]):
        ...     _ = rxllm.collect(rxllm.from_iterable(words).pipe(asking))
        >>> asking.statistics().hits, asking.statistics().misses
        (1, 1)
        >>> folder.cleanup()
    """
    if not isinstance(path, str | os.PathLike) or not os.fspath(path):
        msg = f"path must be a path, got {path!r}"
        raise ConfigError(msg)
    if not (callable(operator) and hasattr(operator, "request") and hasattr(operator, "client")):
        msg = f"operator must be what rxllm.call returns, or wraps that, got {operator!r}"
        raise ConfigError(msg)
    check_number("ttl", ttl, above=0, optional=True)
    check_number("most_bytes", most_bytes, least=1, integer=True)
    check_choice("sampled", sampled, (True, False))
    return Caching(Path(path), operator, ttl=ttl, most_bytes=most_bytes, sampled=sampled)


class CacheStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a cache has done in one subscription."""

    hits: int = 0
    misses: int = 0  # that were looked for and asked
    kept: int = 0  # answers that are in the file now
    skipped: int = 0  # requests that are not cached: sampled ones, and those without a JSON


class Caching(Wrapper[T]):
    """What `cache` returns."""

    def __init__(self, path: Path, operator: Asking[T], *, ttl: float | None, most_bytes: int, sampled: bool) -> None:
        super().__init__(operator)
        self.path = path
        self.ttl = ttl
        self.most_bytes = most_bytes
        self.sampled = sampled
        self.last: _Run | None = None

    def __call__(self, source: Observable[Any]) -> Observable[Outcome[T]]:
        """Return the stream of the outcomes."""
        return _Cached(source, self)

    def statistics(self) -> CacheStatistics:
        """Return what was found and kept so far: in the subscription that began last."""
        return CacheStatistics() if self.last is None else self.last.statistics()


class _Cached(Stream[Any]):
    def __init__(self, source: Observable[Any], caching: Caching[Any]) -> None:
        self.source = source
        self.caching = caching

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        run = self.caching.last = _Run(self, observer, carrier)
        return connected(run, run.begin)


class _Sought(NamedTuple):
    """A request that is looked up."""

    request: Request
    key: bytes
    pulled: float


class _Run:
    """One subscription of cache: the observer of the operator inside, and what is asked of the file."""

    __slots__ = (
        "_asked",
        "_busy",
        "_caching",
        "_carrier",
        "_due",
        "_error",
        "_finished",
        "_given_up",
        "_hits",
        "_intake",
        "_misses",
        "_observer",
        "_outlet",
        "_shelf",
        "_skipped",
        "_sought",
        "_source",
        "_told",
        "_upstream",
        "ended",
        "stopped",
    )

    def __init__(self, stream: _Cached, observer: Observer[Any], carrier: DemandScheduler) -> None:
        self._caching = stream.caching
        self._source = stream.source
        self._observer = observer
        self._carrier = carrier
        self._intake = _Intake(self, carrier)
        self._outlet: Outlet[Any] = Outlet(observer, carrier, self._intake.wake)
        self._shelf = Shelf(carrier, self._failed, self._finish)
        self._upstream: Disposable | None = None
        self._due: Handle | None = None  # the look of this turn
        self._busy = False  # something is looked up
        self._sought: list[_Sought] = []  # for the next look
        self._asked: dict[int, _Sought] = {}  # in progress, by the identity of the request
        self._given_up: list[Any] = []  # pulled, and not asked because the operator has halted
        self._told: set[str] = set()  # what was warned of
        self._hits = self._misses = self._skipped = 0
        self._error: Exception | None = None
        self.ended = False  # the operator inside
        self._finished = False
        self.stopped = False

    def statistics(self) -> CacheStatistics:
        return CacheStatistics(hits=self._hits, misses=self._misses, kept=self._shelf.kept, skipped=self._skipped)

    # the beginning

    def begin(self) -> None:
        """Open the file, and then subscribe."""
        caching = self._caching
        self._shelf.open(lambda: CacheFile(caching.path, ttl=caching.ttl, most_bytes=caching.most_bytes), self._opened)

    def _opened(self, error: Exception | None) -> None:
        if self.stopped:
            return
        if isinstance(error, OSError):
            self._failed(error)
        elif error is not None:
            self._end(error)
            return
        try:
            stream: object = cast("Any", self._caching.operator)(self._intake.source(self._source))
            if not isinstance(stream, Observable):
                msg = f"operator must return an Observable, got {type(stream).__name__}"
                raise ConfigError(msg)  # noqa: TRY301  it goes the way of what the operator itself raises
        except Exception as bug:
            self._end(bug)
            return
        upstream = subscribe(cast("Observable[Any]", stream), self, self._carrier)
        if self.stopped or self.ended:
            upstream.dispose()
        else:
            self._upstream = upstream

    # what is looked up

    @property
    def crowd(self) -> int:
        """How many outcomes were found that the consumer has no room for."""
        return len(self._outlet.held)

    def look_up(self, item: Any) -> bool:
        """Have the request of `item` looked up, if it may be in the file."""
        if (
            not self._shelf.is_open
            or isinstance(item, Finished)
            or (isinstance(item, Outcome) and item.error is not None)
        ):
            return False
        try:
            request = item if isinstance(item, Request) else self._caching.request(item)
        except Exception:  # of the user's functions too: the operator meets it again, and fails the item
            return False
        key = self._key(request)
        if key is None:
            self._skipped += 1
            return False
        self._sought.append(_Sought(request, key, self._carrier.clock.seconds()))
        if not self._busy and self._due is None:
            self._due = self._carrier.call_soon(self._look)
        return True

    def _key(self, request: Request) -> bytes | None:
        """Return what the file knows a request by; None: it is not cached."""
        if not self._caching.sampled and is_sampled(request):
            self._warn(
                "sampled",
                "requests whose answers are drawn anew each time are not cached: say temperature=0, or a seed, or "
                "cache(sampled=True)",
            )
            return None
        try:
            client = self._caching.client(request)
            key = digest(request, model_of(client))
            if not isinstance(client, FunctionClient) or is_plain(request.body):
                return key
            kind = type(request.body).__name__
            self._warn("item", f"an item of type {kind} is not cached: in JSON it looks like something else")
        except InvalidRequestError as wrong:
            self._warn("no JSON", f"{wrong}: it is not cached")
        except Exception:  # noqa: S110  of the user's functions: the operator meets it again, and fails the item
            pass
        return None

    def _look(self) -> None:
        """Look up what has come in this turn, or since the last look."""
        self._due = None
        sought, self._sought = self._sought, []
        self._busy = True
        self._shelf.find([one.key for one in sought], lambda found: self._looked(sought, found))

    def _looked(self, sought: list[_Sought], found: dict[bytes, Kept] | Exception) -> None:
        if self.stopped:
            return
        if isinstance(found, Exception):
            self._failed(found)
            found = {}
        for one in sought:
            reply = None if one.key not in found else self._restored(one.request, found[one.key])
            if reply is None:
                self._misses += 1
                self._ask(one)
            else:
                self._hits += 1
                self._shelf.use(one.key)
                now = self._carrier.clock.seconds()
                self._outlet.push(
                    Outcome(request=one.request, reply=reply, started=one.pulled, seconds=now - one.pulled)
                )
            if self.stopped:
                return
        self._busy = False  # not before: what ends meanwhile waits for the rest of these
        self._intake.looked_up(len(sought))
        if self._sought and self._due is None:
            self._due = self._carrier.call_soon(self._look)
        self._shelf.write()
        self._finish()

    def _ask(self, one: _Sought) -> None:
        """Have the operator ask, unless there is no use in that any more."""
        if isinstance(self._error, ConfigError):
            self._outlet.push(failure(one.request, self._error))
        elif self._intake.closed:
            self._given_up.append(one.request)
        else:
            self._asked[id(one.request)] = one  # before the call: a function may change what it is given
            self._intake.give(one.request)

    def _restored(self, request: Request, kept: Kept) -> Reply[Any] | None:
        """Return the reply that was kept; None: the client does not take it for one any more."""
        try:
            reply: Reply[Any] = self._client(request, kept.route).restore(request, kept.status or OK, kept.body)
        except CallError as error:
            _log.debug("what the cache %s has is no answer any more: %s", self._caching.path, error)
            return None
        return reply

    def _client(self, request: Request, route: str | None) -> Any:
        """Return the client that is asked, or was asked when the answer came on `route`.

        Raises:
            CallError: there is no such route.
        """
        client = self._caching.client(request)
        if not isinstance(client, Routes):
            return client
        if route not in client.names:
            msg = f"there is no route {route!r}"
            raise CallError(msg)
        return client.clients[client.names.index(route)]

    # what is kept

    def _keep(self, outcome: Outcome[Any]) -> None:
        """Have a good reply written."""
        reply = outcome.reply
        asked = self._asked.pop(id(outcome.request), None)
        key = None if asked is None else asked.key
        if reply is None or not self._shelf.is_open:
            return
        body = None if key is None else self._body(outcome.request, outcome.route, reply)
        if key is None or body is None:
            return
        if not self._shelf.keep(key, Kept(outcome.route, reply.status, body)):
            self._warn("slow", "answers come faster than the disk takes them: some are not kept")

    def _body(self, request: Request, route: str | None, reply: Reply[Any]) -> bytes | None:
        """Return what of a reply is kept: its body as it came, else its value as JSON, if it comes back as it was."""
        try:
            client: Any = self._client(request, route)
            if reply.raw and type(client) is not FunctionClient:
                return reply.raw
            body = _encode(reply.value)
            restored = cast("Reply[Any]", client.restore(request, OK, body))
            told = msgspec.structs.replace(
                reply,
                text=reply.text or restored.text,
                usage=restored.usage,
                model=None,
                id=None,
                status=None,
                raw=b"",
                limits=None,
            )
            if type(restored.value) is type(reply.value) and restored == told:
                return body
            reason = "it comes back from JSON as something else"
        except Exception as wrong:  # of the user's own types too
            reason = str(wrong)
        self._warn("value", f"a value of type {type(reply.value).__name__} is not cached: {reason}")
        return None

    def _failed(self, error: Exception) -> None:
        """Go on without the file for now; of one that is damaged nothing more can be had, and the stream ends."""
        if isinstance(error, OSError):
            self._warn("disk", f"{error}: the run goes on without it")
        elif self._error is None and not self.stopped:
            self._error = error
            self._intake.stop()

    def _warn(self, kind: str, text: str) -> None:
        """Log something once."""
        if kind not in self._told:
            self._told.add(kind)
            _log.warning("cache %s: %s", self._caching.path, text)

    # the observer of the operator inside

    def on_next(self, outcome: Any) -> None:
        if self.stopped or self.ended:
            return
        if isinstance(outcome, Outcome):
            self._keep(cast("Outcome[Any]", outcome))
        self._observer.on_next(outcome)

    def on_error(self, error: Exception) -> None:
        if not self.ended:
            self._end(error)

    def on_completed(self) -> None:
        if not self.ended:
            self._end(None)

    # the ends

    def give_up(self, items: list[Any]) -> None:
        """Note what the operator inside does not take any more."""
        self._given_up += items

    def _end(self, error: Exception | None) -> None:
        """End when all that was pulled is delivered, and all that came is written."""
        self.ended = True
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.dispose()
        self._error = self._error or error
        self._intake.dispose()
        self._finish()

    def _finish(self) -> None:
        if not self.ended or self._busy or self._due is not None or self._shelf.writing or self.stopped:
            return
        if self._finished:
            return
        self._finished = True
        if self._error is None or getattr(self._error, "halts", False) is True:
            for item in self._given_up:
                self._outlet.push(failure(item, CancelledError("not asked: the stream ends")))
        self._shelf.close(self._over)

    def _over(self) -> None:
        if not self.stopped:
            self._outlet.end(self._error)

    def dispose(self) -> None:
        if self.stopped:
            return
        self.stopped = True
        self._outlet.dispose()
        if self._due is not None:
            self._due.cancel()
        self._intake.dispose()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.dispose()
        self._shelf.close()


OK = 200


class _Intake(Intake):
    """What goes in: it is looked up, and what is not found is given to the operator inside."""

    __slots__ = ("_error", "_run")

    def __init__(self, run: _Run, carrier: DemandScheduler) -> None:
        super().__init__(carrier)
        self._run = run
        self._error: Exception | None = None

    def free(self) -> int:
        """Return how many more requests may be looked up: none while what was found waits for the consumer."""
        return 0 if self._run.crowd else WIDTH - self.inside

    def take(self, item: Any) -> None:
        """Look up the request of an item; what is not cached is given at once."""
        if self._run.look_up(item):
            self.inside += 1
        else:
            self.give(item)

    def looked_up(self, n: int) -> None:
        """Learn that so many requests are given or answered."""
        self.inside -= n
        if self.over and not self.closed and not self.inside:
            self.close(self._error)
        self.wake()

    def ended(self, error: Exception | None) -> None:
        """Close when all that came is looked up."""
        self._error = error
        if not self.inside:
            self.close(error)

    def cancelled(self, held: list[Any]) -> None:
        """Learn what the operator inside does not take any more; what is looked up now follows."""
        self._run.give_up(held)

    def fail(self, error: Exception) -> None:
        """End the stream now."""
        self._run.on_error(error)
