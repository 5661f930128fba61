"""Where outcomes go: a `for` loop, an `async for` loop, or a list; each asks for more as it uses what it has.

loop thread   ──▶ queue (at most `buffer` items) ──▶ consumer
              ◀── room when it is half empty ────
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import weakref
from collections import deque
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

import msgspec
from reactivex import Observable

from rxllm import runtime
from rxllm.bell import Bell
from rxllm.clock import loop_clock
from rxllm.demand import Demand, DemandScheduler, Flow
from rxllm.errors import ConfigError, check_number
from rxllm.stream import subscribe

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from types import TracebackType

    from rxllm.clock import LoopClock
    from rxllm.demand import Disposable

__all__ = ["AsyncOutcomes", "Outcomes", "SinkStatistics", "acollect", "aiterate", "collect", "iterate"]

T = TypeVar("T")

BUFFER = 256  # items: enough that the loop seldom waits for the consumer's thread to wake
MOMENT = 0.001  # seconds: to wake a thread costs more than many a request, so several items share it
NONE: Any = object()  # no item
CLEANUP = 5.0  # seconds that a close waits for cancelled tasks to end


class SinkStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a sink has done so far."""

    pulled: int  # items taken from the sources of ours in this run
    delivered: int  # items handed to the consumer
    queued: int  # items that wait for the consumer
    seconds: float  # since the subscription
    draining: bool  # told to stop pulling
    finished: bool  # the stream has ended, or is closed


class _Queue(Demand, Generic[T]):
    """The observer at the end of a pipeline and its demand. It lives on the loop; the consumer takes from `items`.

    `bell` is called on the loop, once a turn, when there is something to see.
    """

    __slots__ = (
        "_bell",
        "_capacity",
        "_low",
        "_many",
        "_pause",
        "_ringing",
        "_rung_at",
        "_subscription",
        "delivered",
        "draining",
        "error",
        "finished",
        "items",
        "started",
        "starved",
    )

    def __init__(self, clock: LoopClock, capacity: int, bell: Callable[[], None], *, pause: float = 0.0) -> None:
        super().__init__(clock, Flow(self._failed))
        self._capacity = capacity
        self._low = capacity // 2
        self._many = max(1, capacity // 2)  # items that are worth waking somebody for
        self._bell = bell
        self._pause = pause  # seconds that the bell may wait for more items
        self._ringing = False
        self._rung_at = 0.0  # when it rang, or began to wait for more items
        self._subscription: Disposable | None = None
        self.items: deque[T] = deque()
        self.starved = False  # full: the consumer calls `wake_from_consumer` when it has made room
        self.finished = False
        self.draining = False
        self.error: BaseException | None = None
        self.delivered = 0
        self.started = runtime.steady()

    def connect(self, source: Observable[T]) -> None:
        """Subscribe; on the loop."""
        if self.finished:
            return
        try:
            subscription = subscribe(source, self, DemandScheduler(self.clock, self, self.flow))
        except BaseException as error:
            self._failed(error)
            raise
        if self.finished:
            subscription.dispose()
        else:
            self._subscription = subscription
            self.flow.add_stage(self._cut, self)

    def _cut(self) -> None:
        """Complete here: nothing above can be told to stop pulling."""
        subscription, self._subscription = self._subscription, None
        self.on_completed()
        if subscription is not None:
            subscription.dispose()

    def room(self) -> int:
        """Return the free places; none from full until half empty, so that threads do not ping-pong."""
        if self.starved or self.finished:
            return 0
        room = self._capacity - len(self.items)
        if room > 0:
            return room
        self.starved = True
        if len(self.items) <= self._low:  # the consumer took them before it could see the flag
            self.starved = False
            return self._capacity - len(self.items)
        return 0

    def has_news(self) -> bool:
        """Say whether the consumer has something to see: an item, or the end."""
        return bool(self.items) or self.finished

    def on_next(self, item: T) -> None:
        if not self.finished:
            self.arrived += 1
            self.items.append(item)
            self._ring()

    def on_error(self, error: Exception) -> None:
        if not self.finished:
            self.error = error
            self.finished = True
            self._subscription = None
            self._ring()

    def on_completed(self) -> None:
        if not self.finished:
            self.finished = True
            self._subscription = None
            self._ring()

    def _failed(self, error: BaseException) -> None:
        """End the run with an exception that came from a callback, not from the stream."""
        if not self.finished:
            self.error = error
            self.close()

    def _ring(self) -> None:
        """Ring in a moment for all that comes until then; at once when the queue is half full, and at the end.

        A turn of the loop that has much to read is longer than a moment, so the clock is looked at as well: else the
        queue would be full before anybody is woken, and who waits for room in it waits for another turn.
        """
        if self.finished:
            self.clock.call_soon(self._rung)
        elif not self._pause:
            if not self._ringing:
                self._ringing = True
                self.clock.call_soon(self._rung)
        elif len(self.items) == self._many or (self._ringing and self.clock.seconds() - self._rung_at >= self._pause):
            self._rung_at = self.clock.seconds()
            self._bell()
        elif not self._ringing:
            self._ringing = True
            self._rung_at = self.clock.seconds()
            self.clock.call_later(self._pause, self._rung)

    def _rung(self) -> None:
        self._ringing = False
        if self.items or self.finished:
            self._bell()

    def wake_from_consumer(self) -> None:
        """Go on pulling: the consumer has made room. On the loop."""
        self.starved = False
        self.wake()

    def drain(self) -> None:
        """Stop pulling, finish what is in progress. On the loop."""
        if not self.finished:
            self.draining = True
            self.flow.drain()

    def close(self) -> None:
        """Release everything. On the loop."""
        self.finished = True
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.dispose()
        self._ring()

    async def aclose(self) -> None:
        """Release everything and wait for cancelled tasks to clean up, for a while."""
        self.close()
        if self.flow.tasks:
            await asyncio.wait(self.flow.tasks, timeout=CLEANUP)

    def statistics(self) -> SinkStatistics:
        """Return what has happened so far."""
        return SinkStatistics(
            pulled=self.flow.pulled,
            delivered=self.delivered,
            queued=len(self.items),
            seconds=runtime.steady() - self.started,
            draining=self.draining,
            finished=self.finished,
        )


def _check(source: object, buffer: object) -> None:
    if not isinstance(source, Observable):
        msg = f"source must be an Observable, got {type(source).__name__}"
        raise ConfigError(msg)
    check_number("buffer", buffer, least=1, integer=True)


def iterate(source: Observable[T], *, buffer: int = BUFFER, grace: float = 30.0) -> Outcomes[T]:
    """Iterate over what a stream emits, in a plain `for` loop, while the stream runs on the loop thread.

    Only what the loop body uses is asked for: a slow body slows the sources down. Leave the loop early, by `break` or
    an exception, and the `with` block cancels everything that is in progress.

    Ctrl-C while it waits stops the sources; what is in progress is still delivered, for at most `grace` seconds, then
    KeyboardInterrupt is raised. A second Ctrl-C cancels at once, and so does one in the loop body.

    Args:
        source: the stream; subscribed now.
        buffer: items to keep ready for the loop body, >= 1.
        grace: seconds, >= 0.

    Returns:
        An iterator that is also a context manager, with `close()` and `statistics()`. Without `with` it closes when it
        is exhausted, collected as garbage, or at exit.

    Raises:
        ConfigError: an argument out of range, or a call from inside a pipeline: waiting there would stop it for ever.

    Example:
        >>> import rxllm
        >>> with rxllm.iterate(rxllm.from_iterable(range(3))) as numbers:
        ...     print([n * n for n in numbers])
        [0, 1, 4]
    """
    _check(source, buffer)
    check_number("grace", grace, least=0)
    clock = runtime.background()
    if clock.is_here():
        msg = "iterate and collect block, and this is the pipeline's own thread: use aiterate or acollect here"
        raise ConfigError(msg)
    return Outcomes(source, clock, buffer, grace)


class Outcomes(Generic[T]):
    """The items of a running stream, as an iterator. See `iterate`; safe to share between threads."""

    def __init__(self, source: Observable[T], clock: LoopClock, buffer: int, grace: float) -> None:
        self._bell = Bell()
        self._queue: _Queue[T] = _Queue(clock, buffer, self._bell.ring, pause=MOMENT)
        self._items = self._queue.items
        self._low = buffer // 2
        self._clock = clock
        self._grace = grace
        self._until: float | None = None  # after Ctrl-C: when to give up
        sink = self._queue
        self._finalizer = weakref.finalize(self, clock.post, sink.close)
        context = contextvars.copy_context()
        clock.post(lambda: context.run(sink.connect, source))

    def __iter__(self) -> Iterator[T]:
        """Return itself."""
        return self

    def __next__(self) -> T:
        """Return the next item; wait for it.

        Raises:
            StopIteration: the stream has completed.
        """
        items = self._items
        item: Any = NONE
        try:
            # These two lines hold no call, so neither Ctrl-C nor another thread comes between them: no item is lost.
            item = items[0]
            del items[0]
        except IndexError:
            pass
        if item is NONE:  # not in the handler: what the stream fails with would seem to come from this IndexError
            item = self._wait()
        try:
            sink = self._queue
            sink.delivered += 1
            if sink.starved and len(items) <= self._low:
                self._clock.post(sink.wake_from_consumer)
        except KeyboardInterrupt:
            self._interrupted()  # the item is out of the queue: it is delivered, and the next call goes on with this
        result: T = item
        return result

    def _wait(self) -> T:
        while True:
            try:
                return self._wait_for_item()
            except KeyboardInterrupt:
                if self._until is not None:
                    self.close()
                    raise
                self._interrupted()

    def _interrupted(self) -> None:
        """Drain after the first Ctrl-C; after another one give up at the next wait."""
        if self._until is None:
            self._until = runtime.steady() + self._grace
            self._clock.post(self._queue.drain)
        else:
            self._until = runtime.steady()
        self._clock.post(self._queue.wake_from_consumer)

    def _wait_for_item(self) -> T:
        items = self._items
        sink = self._queue
        while True:
            self._listen()
            try:
                item = items[0]  # as in __next__
                del items[0]
            except IndexError:
                pass  # the end, or another thread was quicker
            else:
                return item
            if sink.finished:
                self._end()

    def _listen(self) -> None:
        """Wait for an item or the end, at most until Ctrl-C's grace is over."""
        left: float | None = None
        if self._until is not None:
            left = self._until - runtime.steady()
            if left <= 0:
                self.close()
                return
        self._bell.wait(self._queue.has_news, left)

    def _end(self) -> None:
        self._finalizer.detach()
        if self._until is not None:
            raise KeyboardInterrupt
        error = self._queue.error
        if error is None:
            raise StopIteration
        raise error

    def close(self) -> None:
        """Cancel everything in progress and drop what is queued; wait until nothing runs any more. From any thread."""
        if self._finalizer.detach() is None and self._queue.finished:
            return
        if self._clock.is_here():
            self._queue.close()
        else:
            closing = asyncio.run_coroutine_threadsafe(self._queue.aclose(), self._clock.loop)
            with contextlib.suppress(
                concurrent.futures.TimeoutError
            ):  # the loop is busy: it closes when it comes to it
                closing.result(CLEANUP)
        self._items.clear()

    def statistics(self) -> SinkStatistics:
        """Return what has happened so far."""
        return self._queue.statistics()

    def __enter__(self) -> Self:
        """Return itself; leaving the block closes."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        self.close()


def aiterate(source: Observable[T], *, buffer: int = BUFFER) -> AsyncOutcomes[T]:
    """Iterate over what a stream emits, in an `async for` loop; the stream runs on the same, running loop.

    Args:
        source: the stream; subscribed now.
        buffer: items to keep ready for the loop body, >= 1.

    Returns:
        An async iterator that is also an async context manager, with `aclose()` and `statistics()`. Without `async
        with` it closes when it is exhausted or collected as garbage.

    Raises:
        ConfigError: an argument out of range, or no asyncio loop runs here.
    """
    _check(source, buffer)
    runtime.refuse_trio()
    try:
        loop = asyncio.get_running_loop()
    except RuntimeError:
        msg = "aiterate and acollect need a running asyncio loop: use iterate or collect here"
        raise ConfigError(msg) from None
    return AsyncOutcomes(source, loop_clock(loop), buffer)


class AsyncOutcomes(Generic[T]):
    """The items of a running stream, as an async iterator. See `aiterate`."""

    def __init__(self, source: Observable[T], clock: LoopClock, buffer: int) -> None:
        self._event = asyncio.Event()
        self._queue: _Queue[T] = _Queue(clock, buffer, self._event.set)
        self._low = buffer // 2
        self._finalizer = weakref.finalize(self, clock.post, self._queue.close)
        self._queue.connect(source)

    def __aiter__(self) -> AsyncIterator[T]:
        """Return itself."""
        return self

    async def __anext__(self) -> T:
        """Return the next item; wait for it.

        Raises:
            StopAsyncIteration: the stream has completed.
        """
        sink = self._queue
        items = sink.items
        while not items:
            if sink.finished:
                self._finalizer.detach()
                if sink.error is None:
                    raise StopAsyncIteration
                raise sink.error
            self._event.clear()
            await self._event.wait()
        item = items.popleft()
        sink.delivered += 1
        if sink.starved and len(items) <= self._low:
            sink.wake_from_consumer()
        return item

    async def aclose(self) -> None:
        """Cancel everything in progress and drop what is queued."""
        self._finalizer.detach()
        await self._queue.aclose()
        self._queue.items.clear()

    def statistics(self) -> SinkStatistics:
        """Return what has happened so far."""
        return self._queue.statistics()

    async def __aenter__(self) -> Self:
        """Return itself; leaving the block closes."""
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close."""
        await self.aclose()


def collect(source: Observable[T]) -> list[T]:
    """Run a stream to its end and return what it emitted; for streams that fit into memory.

    Raises:
        Exception: what ended the stream, or KeyboardInterrupt; what was emitted before is in its attribute `partial`.
        ConfigError: as `iterate`.
    """
    items: list[T] = []
    try:
        with iterate(source) as outcomes:
            items.extend(outcomes)
    except BaseException as error:
        _attach(error, items)
        raise
    return items


async def acollect(source: Observable[T]) -> list[T]:
    """Run a stream to its end on the running loop and return what it emitted.

    Raises:
        Exception: what ended the stream; what was emitted before is in its attribute `partial`.
        ConfigError: as `aiterate`.
    """
    items: list[T] = []
    try:
        async with aiterate(source) as outcomes:
            async for item in outcomes:
                items.append(item)  # noqa: PERF401  what came so far is needed when it fails
    except BaseException as error:
        _attach(error, items)
        raise
    return items


def _attach(error: BaseException, items: list[Any]) -> None:
    try:
        error.partial = items  # type: ignore[attr-defined]
    except AttributeError:  # an exception with slots
        error.add_note(f"{len(items)} items were emitted before")
