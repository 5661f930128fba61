"""Iterables as sources: on the loop, in a thread of their own, or asynchronous."""

from __future__ import annotations

import asyncio
import contextvars
import queue
import threading
from collections import deque
from operator import length_hint
from typing import TYPE_CHECKING, Any, TypeVar, cast

from rxllm.clock import LoopClock
from rxllm.demand import NOTHING
from rxllm.errors import ConfigError
from rxllm.sources.pump import Pump
from rxllm.stream import Stream

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator

    from reactivex import Observable

    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["from_async_iterable", "from_iterable"]

T = TypeVar("T")


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
        pump: Pump[T]
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


class _IteratorPump(Pump[T]):
    __slots__ = ("_iterator",)

    def __init__(
        self, iterator: Iterator[T], observer: Observer[T], carrier: DemandScheduler, *, unbounded: bool
    ) -> None:
        super().__init__(observer, carrier, unbounded=unbounded)
        self._iterator = iterator

    def _take(self) -> T:
        return next(self._iterator)

    def _is_over(self) -> bool:
        iterator = self._iterator  # that of a list knows; of one that does not, and of the user's own, nothing is asked
        return type(iterator).__module__ == "builtins" and length_hint(iterator, 1) == 0

    def _close(self) -> None:
        close(self._iterator)


def close(iterator: object) -> None:
    """Close a generator, so that its `finally` runs now; another kind of iterator has nothing to close."""
    closing = getattr(iterator, "close", None)
    if closing is not None and hasattr(iterator, "send"):
        closing()


class _ThreadPump(Pump[T]):
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


class _AsyncPump(Pump[T]):
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
