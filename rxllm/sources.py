"""Where requests come from: iterables, async iterables, files and feeds, pulled only as fast as they are served.

consumer has room for n ──▶ pull(n): at most n items in this turn ──▶ no room: wait to be offered some
"""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

import msgspec

from rxllm.clock import LoopClock
from rxllm.demand import NOTHING, Demand, Stream
from rxllm.errors import (
    CancelledError,
    ConfigError,
    InvalidRequestError,
    NotReadyError,
    check_choice,
    check_number,
)
from rxllm.messages import Outcome, Request, chat
from rxllm.operators.overflow import POLICIES, Policy, make_room
from rxllm.runtime import Binding

if TYPE_CHECKING:
    import os
    from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator

    from reactivex import Observable

    from rxllm.clock import Clock
    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["Feed", "from_async_iterable", "from_iterable", "from_jsonl"]

T = TypeVar("T")

UNASKED = 10_000  # items that a source emits to a consumer that says nothing of its room, before it stops
TURN = 64  # of those, in one turn of the loop
SLICE = 0.01  # seconds that a source may keep the loop in one turn


def from_iterable(iterable: Iterable[T], *, thread: bool = False, unbounded: bool = False) -> Observable[T]:
    """Emit the items of `iterable`, each when the consumer has room for it.

        from_iterable("abc")     --a-b------c|
        room                     2-------1----

    Emits: as many items as there is room for, a turn at a time; a turn ends early after 10 ms.
    Holds: nothing (`thread=True`: what the thread has read, at most as much as there was room for).
    Errors: what the iterable raises, after what is in progress below is delivered.
    Completes: with the iterable, or when the run is told to stop pulling.
    Dispose: closes the iterator, so a generator's `finally` runs.

    A list or another re-iterable starts again for each subscription. An iterator (a generator) can be subscribed once:
    a second run would find it half empty. Split its stream with `operators.tee` instead.

    Args:
        iterable: what to emit; it may be endless. Its `next` runs on the pipeline's loop, so it should not block;
        thread: read it in a thread of its own, for iterables that block (files, databases).
        unbounded: emit everything also to a consumer that says nothing of its room. Without, 10,000 items are the
            limit.

    Raises:
        ConfigError: not an iterable, or a str; in the stream: a second subscription to an iterator; 10,000 items
            without demand.

    Example:
        >>> import rxllm
        >>> rxllm.collect(rxllm.from_iterable(range(3)))
        [0, 1, 2]
    """
    if isinstance(iterable, str | bytes) or not hasattr(iterable, "__iter__"):
        hint = (
            " (a str would be taken apart by character; give a list of them)"
            if isinstance(iterable, str | bytes)
            else ""
        )
        if hasattr(iterable, "__aiter__"):
            hint = "; use from_async_iterable"
        msg = f"iterable must be an iterable of items, got {type(iterable).__name__}{hint}"
        raise ConfigError(msg)
    return _Iterable(iterable, thread=thread, unbounded=unbounded)


class _Unasked(Demand):
    """The demand of a consumer that says nothing of its room: some items a turn, and a limit on them all."""

    __slots__ = ()

    def room(self) -> int:
        """Return one turn's worth."""
        return TURN


class _Pump(Generic[T]):
    """One subscription of a source that waits: a puller on the consumer's demand.

    Subclasses give `_take`: the next item; they raise `StopIteration` at the end and `BlockingIOError` when there is
        none yet.
    """

    __slots__ = ("_demand", "_flow", "_in_turn", "_left", "_observer", "_stopped", "clock")

    def __init__(self, observer: Observer[T], carrier: DemandScheduler, *, unbounded: bool) -> None:
        self._observer = observer
        self._flow = carrier.flow
        self.clock: Clock = carrier.clock
        self._left = -1  # how many items may still be emitted undemanded; -1: no limit
        if carrier.demand is None:
            self._demand: Demand = _Unasked(carrier.clock, carrier.flow)
            if not unbounded:
                self._left = UNASKED
        else:
            self._demand = carrier.demand
        self._stopped = False
        self._in_turn = False

    def begin(self) -> None:
        """Wait for room; from here on the run can tell this source to stop."""
        self._flow.add_source(self.finish)
        if not self._stopped:
            self._demand.wait(self)

    def _take(self) -> T:
        raise NotImplementedError

    def _close(self) -> None:
        raise NotImplementedError

    def pull(self, n: int) -> int:
        """Emit at most `n` items; fewer when they take long."""
        if self._in_turn:
            return 0
        clock = self.clock
        until = clock.seconds() + SLICE
        sent = 0
        self._in_turn = True
        try:
            while sent < n and not self._stopped:
                try:
                    item = self._take()
                except StopIteration:
                    self.finish()
                    return sent
                except BlockingIOError:
                    return sent  # whoever brings the next item waits for room again
                except Exception as error:
                    self.finish(error)
                    return sent
                if self._left >= 0 and not self._count():
                    return sent
                sent += 1
                self._flow.pulled += 1
                self._observer.on_next(item)
                if clock.seconds() >= until:
                    break
        finally:
            self._in_turn = False
            if self._stopped:
                self._close()
        if not self._stopped:
            self._demand.wait(self)
        return sent

    def _count(self) -> bool:
        """Count an item that nobody asked for; end the stream at the limit."""
        if self._left == 0:
            self.finish(
                ConfigError(
                    f"{UNASKED:,} items were emitted to a consumer that says nothing of its room, so an endless source "
                    "would fill the memory: consume through rxllm.iterate, aiterate, collect or a stage such as "
                    "flat_map, or say unbounded=True"
                )
            )
            return False
        self._left -= 1
        return True

    def finish(self, error: Exception | None = None) -> None:
        """End the stream; nothing is emitted any more."""
        if self._stopped:
            return
        self.dispose()
        if error is None:
            self._observer.on_completed()
        else:
            self._observer.on_error(error)

    def dispose(self) -> None:
        """Stop, and close what is read."""
        if self._stopped:
            return
        self._stopped = True
        self._flow.remove_source(self.finish)
        self._demand.leave(self)
        if not self._in_turn:
            self._close()  # else the turn does: a generator cannot be closed from inside itself


class _Iterable(Stream[T]):
    def __init__(self, iterable: Iterable[T], *, thread: bool, unbounded: bool) -> None:
        self.iterable = iterable
        self.thread = thread
        self.unbounded = unbounded
        self.used = False

    def _start(self, observer: Observer[T], carrier: DemandScheduler) -> Disposable:
        try:
            iterator = iter(self.iterable)
            self._use(single=iterator is self.iterable)
        except Exception as error:
            observer.on_error(error)
            return NOTHING
        pump: _Pump[T]
        if self.thread:
            pump = _ThreadPump(iterator, observer, carrier, unbounded=self.unbounded)
        else:
            pump = _IteratorPump(iterator, observer, carrier, unbounded=self.unbounded)
        pump.begin()
        return pump

    def _use(self, *, single: bool) -> None:
        if single and self.used:
            msg = (
                "this stream reads an iterator, which can be subscribed once: give from_iterable a list or another "
                "re-iterable, or split the stream with operators.tee"
            )
            raise ConfigError(msg)
        self.used = True


class _IteratorPump(_Pump[T]):
    __slots__ = ("_iterator",)

    def __init__(
        self, iterator: Iterator[T], observer: Observer[T], carrier: DemandScheduler, *, unbounded: bool
    ) -> None:
        super().__init__(observer, carrier, unbounded=unbounded)
        self._iterator = iterator

    def _take(self) -> T:
        return next(self._iterator)

    def _close(self) -> None:
        close(self._iterator)


def close(iterator: object) -> None:
    """Close a generator, so that its `finally` runs now; another kind of iterator has nothing to close."""
    closing = getattr(iterator, "close", None)
    if closing is not None and hasattr(iterator, "send"):
        closing()


class _ThreadPump(_Pump[T]):
    """Reads the iterator in a thread of its own, as far as the consumer has asked, and emits on the loop."""

    __slots__ = ("_asked", "_iterator", "_orders", "_ready", "_waiting")

    def __init__(
        self, iterator: Iterator[T], observer: Observer[T], carrier: DemandScheduler, *, unbounded: bool
    ) -> None:
        super().__init__(observer, carrier, unbounded=unbounded)
        self._iterator = iterator
        self._ready: deque[tuple[bool, Any]] = deque()  # (is an item, the item or what ended it)
        self._orders: queue.SimpleQueue[int] = queue.SimpleQueue()  # how many items to read; 0: leave
        self._asked = 0
        self._waiting = False  # nothing was ready when there was room
        context = contextvars.copy_context()
        threading.Thread(target=context.run, args=(self._read,), name="rxllm source", daemon=True).start()

    def pull(self, n: int) -> int:
        missing = n - self._asked - len(self._ready)
        if missing > 0:
            self._asked += missing
            self._orders.put(missing)
        return super().pull(n)

    def _take(self) -> T:
        if not self._ready:
            self._waiting = True
            raise BlockingIOError
        is_item, value = self._ready.popleft()
        if is_item:
            return cast("T", value)
        raise value

    def _read(self) -> None:
        """Run in the thread: read what is ordered, hand it over, until told to leave."""
        try:
            while order := self._orders.get():
                for _ in range(order):
                    if self._stopped:
                        return
                    try:
                        item = next(self._iterator)
                    except BaseException as error:
                        self.clock.post(lambda error=error: self._arrived(is_item=False, value=error))  # type: ignore[misc]
                        return
                    self.clock.post(lambda item=item: self._arrived(is_item=True, value=item))  # type: ignore[misc]
        finally:
            close(self._iterator)

    def _arrived(self, *, is_item: bool, value: Any) -> None:
        self._asked -= 1
        self._ready.append((is_item, value))
        if self._waiting and not self._stopped:
            self._waiting = False
            self._demand.wait(self)

    def _close(self) -> None:
        self._ready.clear()
        self._orders.put(0)


def from_async_iterable(iterable: AsyncIterable[T], *, unbounded: bool = False) -> Observable[T]:
    """Emit the items of an async iterable, each asked for when the consumer has room for it.

    Emits: an item at a time, as they come.
    Holds: at most the one item that was asked for.
    Errors: what the iterable raises, after what is in progress below is delivered.
    Completes: with the iterable, or when the run is told to stop pulling.
    Dispose: cancels the `__anext__` that waits and closes the generator.

    Args:
        iterable: an async generator or any other async iterable. An iterator can be subscribed once.
        unbounded: as in `from_iterable`.

    Raises:
        ConfigError: not an async iterable; in the stream: a second subscription to an iterator, no asyncio loop.
    """
    if not hasattr(iterable, "__aiter__"):
        msg = f"iterable must be an async iterable, got {type(iterable).__name__}"
        raise ConfigError(msg)
    return _AsyncIterable(iterable, unbounded=unbounded)


class _AsyncIterable(Stream[T]):
    def __init__(self, iterable: AsyncIterable[T], *, unbounded: bool) -> None:
        self.iterable = iterable
        self.unbounded = unbounded
        self.used = False

    def _start(self, observer: Observer[T], carrier: DemandScheduler) -> Disposable:
        if not isinstance(carrier.clock, LoopClock):
            observer.on_error(
                ConfigError(f"async iterables need an asyncio loop, and this pipeline runs on {carrier.clock!r}")
            )
            return NOTHING
        try:
            iterator = aiter(self.iterable)
        except Exception as error:
            observer.on_error(error)
            return NOTHING
        if self.used and iterator is self.iterable:
            observer.on_error(ConfigError("this stream reads an async iterator, which can be subscribed once"))
            return NOTHING
        self.used = True
        pump = _AsyncPump(iterator, observer, carrier, unbounded=self.unbounded)
        pump.begin()
        return pump


class _AsyncPump(_Pump[T]):
    """Asks for one item at a time, in one task that waits while there is no room."""

    __slots__ = ("_asked", "_iterator", "_ready", "_task")

    def __init__(
        self, iterator: AsyncIterator[T], observer: Observer[T], carrier: DemandScheduler, *, unbounded: bool
    ) -> None:
        super().__init__(observer, carrier, unbounded=unbounded)
        self._iterator = iterator
        self._ready: deque[tuple[bool, Any]] = deque()
        self._asked = asyncio.Event()
        self._task = asyncio.ensure_future(self._read())
        carrier.flow.track(self._task)

    def _take(self) -> T:
        if self._ready:
            is_item, value = self._ready.popleft()
            if is_item:
                return cast("T", value)
            raise value
        self._asked.set()
        raise BlockingIOError

    async def _read(self) -> None:
        iterator = self._iterator
        try:
            while True:
                await self._asked.wait()
                self._asked.clear()
                try:
                    self._ready.append((True, await anext(iterator)))
                except StopAsyncIteration:
                    self._ready.append((False, StopIteration()))
                    return
                except Exception as error:
                    self._ready.append((False, error))
                    return
                finally:
                    if self._ready and not self._stopped:
                        self._demand.wait(self)
        finally:
            closing = getattr(iterator, "aclose", None)
            if closing is not None:
                await closing()

    def _close(self) -> None:
        self._task.cancel()


def from_jsonl(
    path: str | os.PathLike[str], *, on_bad_line: Literal["emit", "raise"] = "emit"
) -> Observable[Request | Outcome[Any]]:
    """Read requests from a file with one JSON object a line.

    A line is an input line of OpenAI's Batch API (`{"custom_id", "method", "url", "body"}`), or `{"prompt": "…"}`, or
    `{"messages": […]}`; with the latter two, `id` and `meta` are the request's own and every other key is a parameter
    of the call. Empty lines are skipped.

    Emits: a `Request` a line; for a bad line a failed `Outcome` whose error names file and line.
    Holds: one line.
    Errors: a file that cannot be read; with `on_bad_line="raise"` the first bad line.
    Completes: at the end of the file.
    Dispose: closes the file.

    Args:
        path: the file, UTF-8.
        on_bad_line: "emit" or "raise".

    Raises:
        ConfigError: an argument of another kind; in the stream: a file that cannot be opened.
    """
    if not isinstance(path, str) and not hasattr(path, "__fspath__"):
        msg = f"path must be a path, got {path!r}"
        raise ConfigError(msg)
    check_choice("on_bad_line", on_bad_line, ("emit", "raise"))
    return from_iterable(_Lines(Path(path), raising=on_bad_line == "raise"))


OPERATIONS = {  # of OpenAI's Batch API, by the end of the URL
    "/chat/completions": "chat",
    "/completions": "completions",
    "/embeddings": "embeddings",
    "/responses": "responses",
    "/moderations": "moderations",
}
LINE = 64 << 20  # bytes; a longer line is no request but the wrong file


class _Lines:
    """The requests of a file; each iteration opens it again."""

    def __init__(self, path: Path, *, raising: bool) -> None:
        self.path = path
        self.raising = raising

    def __iter__(self) -> Iterator[Request | Outcome[Any]]:
        try:
            file = self.path.open("rb")
        except OSError as error:
            msg = f"cannot read {self.path}: {error.strerror}"
            raise ConfigError(msg) from None
        with file:
            number = 0
            while line := file.readline(LINE + 1):
                number += 1
                if not line.strip():
                    continue
                try:
                    yield parse_line(line)
                except InvalidRequestError as bad:
                    failed = InvalidRequestError(f"{self.path}, line {number}: {bad.message}", body=line[:1000])
                    if self.raising:
                        raise failed from None
                    text = line[:1000].decode(errors="replace")
                    yield Outcome(request=Request(body=text, operation="line"), error=failed)
                while len(line) > LINE and not line.endswith(b"\n"):
                    line = file.readline(LINE + 1)


def parse_line(line: bytes) -> Request:
    """Return the request of one line.

    Raises:
        InvalidRequestError: it says what is wrong, not where.
    """
    if len(line) > LINE:
        msg = f"longer than {LINE:,} bytes: is this a file with one JSON object a line?"
        raise InvalidRequestError(msg)
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        msg = f"not JSON ({error})"
        raise InvalidRequestError(msg) from None
    if not isinstance(fields, dict):
        msg = f"expected a JSON object, got {type(fields).__name__}"
        raise InvalidRequestError(msg)
    try:
        return _request(cast("dict[str, Any]", fields))
    except ConfigError as error:
        raise InvalidRequestError(str(error)) from None


def _request(fields: dict[str, Any]) -> Request:
    if "body" in fields:
        return _batch_line(fields)
    id = fields.pop("id", None)
    id = fields.pop("custom_id", id)
    meta = fields.pop("meta", None)
    if "messages" in fields:
        if not isinstance(fields["messages"], list) or not fields["messages"]:
            msg = "messages must be a list of at least one message"
            raise InvalidRequestError(msg)
        return Request(body=fields, id=id, meta=meta)
    if "prompt" in fields:
        prompt = fields.pop("prompt")
        if not isinstance(prompt, str):
            msg = f"prompt must be a text, got {type(prompt).__name__}"
            raise InvalidRequestError(msg)
        request = chat(prompt, **fields)
        return Request(body=request.body, id=id, meta=meta)
    msg = f"expected a body, prompt or messages, got only {', '.join(sorted(fields)) or 'an empty object'}"
    raise InvalidRequestError(msg)


def _batch_line(fields: dict[str, Any]) -> Request:
    url, body = fields.get("url", "/v1/chat/completions"), fields["body"]
    method = fields.get("method", "POST")
    if not isinstance(body, dict):
        msg = f"body must be an object, got {type(body).__name__}"
        raise InvalidRequestError(msg)
    if method != "POST":
        msg = f"method must be POST, got {method!r}"
        raise InvalidRequestError(msg)
    for end, operation in OPERATIONS.items():
        if isinstance(url, str) and url.endswith(end):
            return Request(body=body, id=fields.get("custom_id"), operation=operation)
    msg = f"url must end with one of {', '.join(OPERATIONS)}, got {url!r}"
    raise InvalidRequestError(msg)


class Feed(Stream[T]):
    """A source that is fed by hand, also from the outcomes that it leads to.

    Emits: what was put, in order, as the consumer has room.
    Holds: at most `n` items.
    Errors: what `fail` was given, after what was put before.
    Completes: after `close`, when everything put before is emitted; or when the run is told to stop pulling.
    Dispose: whoever waits in `put` gets a `CancelledError`; what was put and not emitted is dropped.

    One subscriber at a time, on one loop. Put from the loop with `await put(item)` or `put_nowait(item)`, from any
    other thread with `put_threadsafe(item)`.

    Args:
        policy: when `n` items wait: "error" (`put_nowait` raises; `put` and `put_threadsafe` wait), "drop_oldest",
            "drop_newest", or "buffer" (no bound; give no `n`).
        n: items to hold, >= 1. Default 1,024.

    Raises:
        ConfigError: an argument out of range; use after `close`; a second subscriber.

    Example:
        >>> import rxllm
        >>> feed = rxllm.Feed()
        >>> for n in range(3):
        ...     feed.put_nowait(n)
        >>> feed.close()
        >>> rxllm.collect(feed)
        [0, 1, 2]
    """

    def __init__(self, policy: Policy = "error", n: int | None = None) -> None:
        check_choice("policy", policy, POLICIES)
        check_number("n", n, least=1, integer=True, optional=True)
        if policy == "buffer" and n is not None:
            msg = f'n must not be given with policy "buffer", which has no bound, got {n!r}'
            raise ConfigError(msg)
        self._policy: Policy = policy
        self._n = None if policy == "buffer" else n or 1_024
        self._lock = threading.Condition()  # put_threadsafe waits on it; everything else holds it shortly
        self._items: deque[T] = deque()
        self._closed = False
        self._error: Exception | None = None
        self._pump: _FeedPump[T] | None = None
        self._binding = Binding("this Feed")
        self._putters: deque[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = deque()
        self._cancelled = 0  # how many subscriptions were disposed: those who wait must go

    def _start(self, observer: Observer[T], carrier: DemandScheduler) -> Disposable:
        if self._pump is not None:
            observer.on_error(ConfigError("a Feed has one subscriber: split its stream with operators.tee"))
            return NOTHING
        self._binding.acquire(carrier.clock)
        pump = self._pump = _FeedPump(self, observer, carrier)
        pump.begin()
        return pump

    async def put(self, item: T) -> None:
        """Put `item`; wait while the feed is full.

        Raises:
            ConfigError: the feed is closed.
            CancelledError: the subscription ended while this waited.
        """
        loop = asyncio.get_running_loop()
        while True:
            with self._lock:
                seen = self._cancelled
                if self._fits():
                    self._append(item)
                    return
                turn: asyncio.Future[None] = loop.create_future()
                self._putters.append((loop, turn))
            try:
                await turn
            except BaseException:
                self._pass_turn_on()
                raise
            if self._cancelled != seen:
                msg = "the stream that this feed leads to has ended"
                raise CancelledError(msg)

    def put_nowait(self, item: T) -> None:
        """Put `item` now, from the loop of the pipeline or before it runs.

        Raises:
            ConfigError: the feed is closed, or full and its policy is "error".
        """
        with self._lock:
            self._check_open()
            if make_room(self._items, self._policy, self._n):
                self._append(item)

    def put_threadsafe(self, item: T, timeout: float | None = None) -> None:
        """Put `item` from a thread that is not the pipeline's; block while the feed is full.

        Args:
            item: what to put.
            timeout: seconds to wait at most, >= 0; None: no limit.

        Raises:
            ConfigError: the feed is closed; or this is the pipeline's own thread, and waiting here would stop it for
                ever.
            NotReadyError: no room within `timeout`.
            CancelledError: the subscription ended while this waited.
        """
        check_number("timeout", timeout, least=0, optional=True)
        clock = self._binding.clock
        with self._lock:
            seen = self._cancelled
            if not self._fits() and clock is not None and clock.is_here():
                msg = "the feed is full, and to wait in the pipeline's own thread would stop it: await feed.put(item)"
                raise ConfigError(msg)
            done = self._lock.wait_for(lambda: self._cancelled != seen or self._fits(), timeout)
            if not done:
                msg = f"the feed was full for {timeout} s"
                raise NotReadyError(msg)
            if self._cancelled != seen:
                msg = "the stream that this feed leads to has ended"
                raise CancelledError(msg)
            self._append(item)

    def close(self) -> None:
        """Complete the stream when everything put so far is emitted. Again is harmless; from any thread."""
        self._end(None)

    def fail(self, error: Exception) -> None:
        """End the stream with `error` when everything put so far is emitted."""
        if not isinstance(error, Exception):
            msg = f"error must be an Exception, got {error!r}"
            raise ConfigError(msg)
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._error = error
            self._wake_putters(everyone=True)
        self._notify()

    def __enter__(self) -> Feed[T]:
        """Return the feed; it closes at the end of the block."""
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Close; a block that raised fails the stream with its exception."""
        if isinstance(error, Exception):
            self.fail(error)
        else:
            self.close()

    # under the lock

    def _check_open(self) -> None:
        if self._closed:
            msg = "this Feed is closed"
            raise ConfigError(msg)

    def _fits(self) -> bool:
        self._check_open()
        return self._n is None or self._policy != "error" or len(self._items) < self._n

    def _append(self, item: T) -> None:
        make_room(self._items, self._policy, self._n)
        self._items.append(item)
        self._notify()

    def _notify(self) -> None:
        pump = self._pump
        if pump is None:
            return
        if pump.clock.is_here():
            pump.notify()
        else:
            pump.clock.post(pump.notify)

    def _wake_putters(self, *, everyone: bool = False) -> None:
        self._lock.notify_all() if everyone else self._lock.notify()
        while self._putters:
            loop, turn = self._putters.popleft()
            if not turn.done():
                loop.call_soon_threadsafe(_resolve, turn)
                if not everyone:
                    return

    def _pass_turn_on(self) -> None:
        """A `put` was cancelled: if it had been woken, the place is another's."""
        with self._lock:
            self._wake_putters()

    # the subscription's side

    def next_item(self) -> T:
        """Return the next item, for the pump."""
        with self._lock:
            if self._items:
                item = self._items.popleft()
                self._wake_putters()
                return item
            if not self._closed:
                raise BlockingIOError
            if self._error is not None:
                raise self._error
            raise StopIteration

    def released(self) -> None:
        """The subscription is over: drop what is left and let go those who wait."""
        with self._lock:
            self._pump = None
            self._items.clear()
            self._cancelled += 1
            self._wake_putters(everyone=True)
            self._binding.release()


def _resolve(turn: asyncio.Future[None]) -> None:
    if not turn.done():
        turn.set_result(None)


class _FeedPump(_Pump[T]):
    __slots__ = ("_feed", "_idle")

    def __init__(self, feed: Feed[T], observer: Observer[T], carrier: DemandScheduler) -> None:
        super().__init__(observer, carrier, unbounded=True)  # it is bounded by what is put
        self._feed = feed
        self._idle = False

    def _take(self) -> T:
        try:
            return self._feed.next_item()
        except BlockingIOError:
            self._idle = True
            raise

    def notify(self) -> None:
        """Take the offer of room again: there is an item, or the end."""
        if self._idle and not self._stopped:
            self._idle = False
            self._demand.wait(self)

    def _close(self) -> None:
        self._feed.released()
