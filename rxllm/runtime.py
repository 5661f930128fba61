"""The loop thread of this process: started when first needed, shared by all blocking sinks, joined at exit.

One runtime per process. After a fork the child starts its own when it needs one; what the parent had on its loop stays
there.
"""

from __future__ import annotations

import asyncio
import atexit
import concurrent.futures
import contextlib
import functools
import logging
import os
import queue
import random
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Generic, NamedTuple, TypeVar

from rxllm.clock import Clock, LoopClock, loop_clock
from rxllm.errors import ConfigError

__all__ = ["Binding", "DaemonThreads", "LoopLocal", "background", "here", "refuse_trio", "steady", "uniform"]

T = TypeVar("T")

_log = logging.getLogger("rxllm.runtime")
_lock = threading.Lock()
_current: _Runtime | None = None
_random = random.Random()

JOIN = 5.0  # seconds that exit waits for the loop thread


def uniform(low: float, high: float) -> float:
    """Draw from the process-wide generator, the default of all jitter."""
    return _random.uniform(low, high)


def steady() -> float:
    """Return steady seconds of real time, for those who live on no loop: a consumer's thread."""
    return time.monotonic()


class _Runtime:
    """A daemon thread that runs one loop until the process ends."""

    def __init__(self) -> None:
        self.loop = _new_loop()
        self.clock = loop_clock(self.loop)
        self.thread = threading.Thread(target=self._run, name="rxllm", daemon=True)
        self.thread.start()

    def _run(self) -> None:
        asyncio.set_event_loop(self.loop)
        stopping = False
        while not stopping:
            try:
                self.loop.run_forever()
                stopping = True
            except BaseException as error:
                _log.error("%s in the loop thread; the loop goes on", type(error).__name__)
        _close(self.loop)

    def stop(self) -> None:
        """End the loop and join its thread; called once, at exit."""
        self.clock.post(self.loop.stop)
        self.thread.join(JOIN)


def _new_loop() -> asyncio.AbstractEventLoop:
    try:
        import uvloop  # noqa: PLC0415  an extra: used when it is there
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _close(loop: asyncio.AbstractEventLoop) -> None:
    """Cancel what is left on a stopped loop and close it, as `asyncio.run` does."""
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


def background() -> LoopClock:
    """Return the clock of the loop thread; start the thread if there is none."""
    global _current  # noqa: PLW0603  one runtime per process is the point
    with _lock:
        if _current is None:
            _current = _Runtime()
        return _current.clock


def here() -> Clock:
    """Return the clock of the running loop, or of the loop thread when none runs here.

    Raises:
        ConfigError: under trio; only asyncio is supported.
    """
    try:
        return loop_clock(asyncio.get_running_loop())
    except RuntimeError:
        refuse_trio()
        return background()


def refuse_trio() -> None:
    """Raise a `ConfigError` under trio."""
    import sys  # noqa: PLC0415

    sniffio = sys.modules.get("sniffio")
    if "trio" not in sys.modules or sniffio is None:
        return
    try:
        library: str = sniffio.current_async_library()
    except Exception:
        return
    if library == "trio":
        msg = "rxllm runs on asyncio, not on trio: use iterate() or collect() in a thread (trio.to_thread.run_sync)"
        raise ConfigError(msg)


def _stop_at_exit() -> None:
    global _current
    with _lock:
        runtime, _current = _current, None
    if runtime is not None:
        runtime.stop()


def _forget_after_fork() -> None:
    """In a forked child the loop thread does not exist: forget it, and make new locks."""
    global _current, _lock  # noqa: PLW0603
    _current = None
    _lock = threading.Lock()


atexit.register(_stop_at_exit)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)


class LoopLocal(Generic[T]):
    """Something that each loop has one of, made when first asked for and closed with its loop.

    A loop that ends closes its asynchronous generators (`asyncio.run` does, and so does the loop thread); one that
    waits for just that closes the thing. So does the end of the `LoopLocal` itself.
    """

    def __init__(self, make: Callable[[], T], close: Callable[[T], Awaitable[None]]) -> None:
        self._make = make
        self._close = close
        self._made: dict[asyncio.AbstractEventLoop, _Made[T]] = {}

    def get(self, loop: asyncio.AbstractEventLoop) -> T:
        """Return the one of `loop`, which must be running here."""
        made = self._made.get(loop)
        if made is None:
            thing = self._make()
            keeper = _keep(self._made, loop, thing, self._close)
            starting = keeper.asend(None)
            with contextlib.suppress(StopIteration):
                starting.send(None)  # runs it to its yield: from now on the loop knows it
            # This holds the keeper: garbage that warns when it was not closed would do so before the keeper could act.
            forgotten = weakref.finalize(self, _close_there, loop, keeper)
            forgotten.atexit = False
            made = self._made[loop] = _Made(thing, keeper, forgotten)
        return made.thing

    async def close(self, loop: asyncio.AbstractEventLoop) -> None:
        """Close the one of `loop`, which must be running here."""
        made = self._made.get(loop)
        if made is not None:
            await made.keeper.aclose()

    def close_all(self) -> None:
        """Close all; from any thread. Those of other loops are closed there."""
        for loop, made in list(self._made.items()):
            if loop.is_closed():
                self._made.pop(loop, None)
                made.forgotten.detach()
            else:
                _close_there(loop, made.keeper)


class _Made(NamedTuple, Generic[T]):
    """What one loop has."""

    thing: T
    keeper: AsyncGenerator[None, None]  # closing it closes the thing
    forgotten: weakref.finalize[..., Any]


async def _keep(
    made: dict[asyncio.AbstractEventLoop, _Made[T]],
    loop: asyncio.AbstractEventLoop,
    thing: T,
    close: Callable[[T], Awaitable[None]],
) -> AsyncGenerator[None, None]:
    try:
        yield
    finally:
        ended = made.pop(loop, None)
        if ended is not None:
            ended.forgotten.detach()
        await close(thing)


def _close_there(loop: asyncio.AbstractEventLoop, keeper: AsyncGenerator[None, None]) -> None:
    async def close() -> None:
        with contextlib.suppress(RuntimeError):  # it is being closed
            await keeper.aclose()

    with contextlib.suppress(RuntimeError):  # the loop has ended
        loop.call_soon_threadsafe(lambda: loop.create_task(close()))


class DaemonThreads(concurrent.futures.Executor):
    """Threads for calls that block, made as they are needed; the end of the process does not wait for them.

    The standard pool joins its threads at exit, so one call that hangs would keep the process alive.
    """

    def __init__(self, most: int, name: str) -> None:
        self._most = most
        self._name = name
        self._lock = threading.Lock()
        self._jobs: _Jobs = queue.SimpleQueue()
        self._idle = threading.Semaphore(0)  # threads that wait for a job
        self._made = 0
        self._closed = False
        weakref.finalize(self, self._jobs.put, None)

    def submit(self, fn: Callable[..., T], /, *args: Any, **kwargs: Any) -> concurrent.futures.Future[T]:
        """Call `fn(*args, **kwargs)` in a thread.

        Raises:
            RuntimeError: it is shut down.
        """
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                msg = "these threads are closed"
                raise RuntimeError(msg)
            self._jobs.put((future, functools.partial(fn, *args, **kwargs)))
            if not self._idle.acquire(blocking=False) and self._made < self._most:
                self._made += 1
                threading.Thread(target=_work, args=(self._jobs, self._idle), name=self._name, daemon=True).start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002  the standard's
        """Take no more calls; each thread ends after the one it is in. It never waits."""
        with self._lock:
            self._closed = True
            while cancel_futures:
                try:
                    job = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if job is not None:
                    job[0].cancel()
            self._jobs.put(None)


_Jobs = queue.SimpleQueue[tuple[concurrent.futures.Future[Any], Callable[[], Any]] | None]


def _work(jobs: _Jobs, idle: threading.Semaphore) -> None:
    """Run in each thread; it knows nothing of its owner, who may be forgotten without a word."""
    while (job := jobs.get()) is not None:
        future, call = job
        del job
        if future.set_running_or_notify_cancel():
            try:
                result = call()
            except BaseException as error:
                future.set_exception(error)
            else:
                future.set_result(result)
                del result
        del future, call
        idle.release()
    jobs.put(None)  # for the next one


class Binding:
    """Which loop or virtual scheduler an object with state belongs to, while it is used.

    The first use binds, the last release frees. Another loop in between is a `ConfigError` that names both.
    """

    __slots__ = ("_clock", "_name", "_users")

    def __init__(self, name: str) -> None:
        self._name = name
        self._clock: Clock | None = None
        self._users = 0

    def acquire(self, clock: Clock) -> None:
        """Use the object on `clock`; pair it with `release`."""
        if self._users and self._clock is not clock:
            msg = f"{self._name} is in use on {self._clock!r} and cannot be used on {clock!r} at the same time"
            raise ConfigError(msg)
        self._clock = clock
        self._users += 1

    def release(self) -> None:
        """End one use; the last one frees the object for another loop."""
        self._users -= 1
        if self._users == 0:
            self._clock = None

    @property
    def clock(self) -> Clock | None:
        """The clock it is bound to now."""
        return self._clock
