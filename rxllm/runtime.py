"""The loop thread of this process: started when first needed, shared by all blocking sinks, joined at exit.

One runtime per process. After a fork the child starts its own when it needs one; what the parent had on its loop stays
there.
"""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import random
import threading
import time

from rxllm.clock import Clock, LoopClock, loop_clock
from rxllm.errors import ConfigError

__all__ = ["Binding", "background", "here", "uniform"]

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
