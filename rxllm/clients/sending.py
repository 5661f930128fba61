"""One request as a cold stream: of its reply, or of the pieces of its answer. Each subscription is one try."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

from rxllm.clock import LoopClock
from rxllm.demand import NOTHING, Outlet
from rxllm.errors import CancelledError, ConfigError
from rxllm.messages import Chunk, Reply, Request, Restarted
from rxllm.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Coroutine

    from rxllm.demand import DemandScheduler, Disposable, Observer
    from rxllm.policies.timeouts import Timeouts

__all__ = ["Progress", "Reading", "Sending", "Streaming"]

T = TypeVar("T")


class Reading(Protocol[T]):
    """An answer that is being read."""

    reply: Reply[T] | None  # the whole, once it is read
    shown: bool  # whether any of it was shown

    async def run(self, show: Callable[[Chunk], object], backlog: Collection[object] = ()) -> bool:
        """Show each chunk as it comes, and read no further while there is a backlog.

        Returns:
            Whether to go on, once there is room; False: all of it was shown.

        Raises:
            CallError: the answer broke off, or cannot be understood.
        """
        ...

    def close(self) -> None:
        """Give it up; again, or after the end, is harmless."""
        ...


class Progress:
    """What the tries of one request have shown so far."""

    __slots__ = ("_broken", "_tries")

    def __init__(self) -> None:
        self._tries = 0
        self._broken: Exception | None = None  # how the last try ended that had shown something

    def begin(self) -> Restarted | None:
        """Count a try; return what to say first if one before it broke off."""
        self._tries += 1
        error, self._broken = self._broken, None
        return None if error is None else Restarted(attempt=self._tries, error=error)

    def broke(self, error: Exception) -> None:
        """Note that a try has failed after something of it was shown."""
        self._broken = error


class Sending(Stream[Reply[T]]):
    """A coroutine function as a cold stream of one reply."""

    def __init__(
        self,
        exchange: Callable[[Request, Timeouts], Coroutine[Any, Any, Reply[T]]],
        request: Request,
        timeouts: Timeouts,
    ) -> None:
        self.exchange = exchange
        self.request = request
        self.timeouts = timeouts

    def _start(self, observer: Observer[Reply[T]], carrier: DemandScheduler) -> Disposable:
        return _OneReply(self, observer, carrier).begin(observer)


class Streaming(Stream[Chunk | Restarted]):
    """An answer in pieces as a cold stream; after a try that broke off the next one says so first."""

    def __init__(
        self,
        open: Callable[[Request, Timeouts], Coroutine[Any, Any, Reading[Any]]],  # noqa: A002
        request: Request,
        timeouts: Timeouts,
    ) -> None:
        self.open = open
        self.request = request
        self.timeouts = timeouts
        self.progress = Progress()

    def _start(self, observer: Observer[Chunk | Restarted], carrier: DemandScheduler) -> Disposable:
        return _Pieces(self, observer, carrier).begin(observer)


class _Try:
    """One try: a task that emits by itself, so that a reply costs no further turn of the loop."""

    __slots__ = ("_carrier", "_disposed", "_task")

    def __init__(self, carrier: DemandScheduler) -> None:
        self._carrier = carrier
        self._disposed = False
        self._task: asyncio.Task[None] | None = None

    def begin(self, observer: Observer[Any]) -> Disposable:
        """Start the task; whoever ends the run waits for it."""
        clock = self._carrier.clock
        if not isinstance(clock, LoopClock):
            observer.on_error(ConfigError(f"this client needs an asyncio loop, and the pipeline runs on {clock!r}"))
            return NOTHING
        self._task = task = clock.loop.create_task(self._run())
        self._carrier.flow.track(task)
        return self

    def _work(self) -> Coroutine[Any, Any, Any]:
        raise NotImplementedError

    def _end(self, result: Any, failure: Exception | None) -> None:
        raise NotImplementedError

    async def _run(self) -> None:
        failure: Exception | None = None
        result: Any = None
        flow = self._carrier.flow
        try:
            result = await self._work()
        except Exception as error:
            if flow.failed is not None:  # a callback of the consumer's raised it
                raise
            failure = error.with_traceback(None)  # it becomes a value: what the frames hold is let go
        except asyncio.CancelledError as error:
            if self._disposed:
                return
            if self._is_cancelled():
                flow.fail(error)
                raise
            failure = CancelledError("what was called cancelled itself")
        except BaseException as error:  # sys.exit() in a function of the user's: it ends the run, not one request
            flow.fail(error)
            raise
        if self._disposed:
            return
        self._task = None  # from here on a dispose has nothing to cancel: it may come from within
        try:
            self._end(result, failure)
        except BaseException as error:
            flow.fail(error)
            raise

    def _is_cancelled(self) -> bool:
        """Say whether somebody cancelled the task itself: a loop that ends, or that cancels all it has."""
        return self._task is not None and self._task.cancelling() > 0

    def dispose(self) -> None:
        """Cancel the task."""
        self._disposed = True
        task, self._task = self._task, None
        if task is not None:
            task.cancel()


class _OneReply(_Try, Generic[T]):
    """A try that emits a reply."""

    __slots__ = ("_observer", "_sending")

    def __init__(self, sending: Sending[T], observer: Observer[Reply[T]], carrier: DemandScheduler) -> None:
        super().__init__(carrier)
        self._sending = sending
        self._observer = observer

    def _work(self) -> Coroutine[Any, Any, Reply[T]]:
        sending = self._sending
        return sending.exchange(sending.request, sending.timeouts)

    def _end(self, result: Reply[T], failure: Exception | None) -> None:
        if failure is not None:
            self._disposed = True
            self._observer.on_error(failure)
            return
        self._observer.on_next(result)
        if not self._disposed:
            self._disposed = True
            self._observer.on_completed()


class _Pieces(_Try):
    """A try that emits the pieces of an answer, and reads no further while there is no room for them."""

    __slots__ = ("_outlet", "_room", "_streaming")

    def __init__(self, streaming: Streaming, observer: Observer[Chunk | Restarted], carrier: DemandScheduler) -> None:
        super().__init__(carrier)
        self._streaming = streaming
        self._outlet: Outlet[Chunk | Restarted] = Outlet(observer, carrier, self._passed_on)
        self._room: asyncio.Event | None = None

    async def _work(self) -> None:
        streaming, outlet = self._streaming, self._outlet
        progress = streaming.progress
        restarted = progress.begin()
        if restarted is not None:
            outlet.push(restarted)
        reading = await streaming.open(streaming.request, streaming.timeouts)
        try:
            while await reading.run(outlet.push, outlet.held):
                if outlet.held:
                    self._room = asyncio.Event()
                    await self._room.wait()
        except Exception as error:
            if reading.shown:
                progress.broke(error)
            raise
        finally:
            reading.close()

    def _passed_on(self) -> None:
        if self._room is not None and not self._outlet.held:
            self._room.set()

    def _end(self, result: None, failure: Exception | None) -> None:  # noqa: ARG002
        self._outlet.end(failure)

    def dispose(self) -> None:
        """Cancel the task, which closes the connection; emit nothing more."""
        self._outlet.dispose()
        super().dispose()
