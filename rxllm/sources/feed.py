"""A source that is fed by hand."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from typing import TYPE_CHECKING, TypeVar

from rxllm.demand import NOTHING
from rxllm.errors import CancelledError, ConfigError, NotReadyError, check_choice, check_number
from rxllm.operators.overflow import POLICIES, Policy, make_room
from rxllm.runtime import Binding
from rxllm.sources.pump import Pump
from rxllm.stream import Stream

if TYPE_CHECKING:
    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["Feed"]

T = TypeVar("T")


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
                self._check_wanted()
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
            if not self._fits():
                self._check_wanted()
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

    def _check_wanted(self) -> None:
        """Refuse to wait for room that nobody makes any more."""
        if self._pump is None and self._cancelled:
            msg = "the stream that this feed leads to has ended"
            raise CancelledError(msg)

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

    def is_over(self) -> bool:
        """Say whether nothing more comes, for the pump."""
        with self._lock:
            return self._closed and not self._items and self._error is None

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


class _FeedPump(Pump[T]):
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

    def _is_over(self) -> bool:
        return self._feed.is_over()

    def notify(self) -> None:
        """Take the offer of room again: there is an item, or the end."""
        if self._idle and not self._stopped:
            self._idle = False
            self._demand.wait(self)

    def _close(self) -> None:
        self._feed.released()
