"""Time as an object: steady seconds and cheap timers for whatever drives a subscription.

`AsyncIOScheduler.now` is wall time and its timers cost a few objects each, so streams of ours ask a `Clock`: a running
asyncio loop, a virtual scheduler of ours (it implements this itself), or reactivex' virtual time.
"""

from __future__ import annotations

import asyncio
import contextvars
import time
import weakref
from collections import deque
from typing import TYPE_CHECKING, Protocol

from reactivex import abc
from reactivex.scheduler import (
    ImmediateScheduler,
    NewThreadScheduler,
    TrampolineScheduler,
    VirtualTimeScheduler,
)
from reactivex.scheduler.eventloop import AsyncIOScheduler

from rxllm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Alarm", "Alarms", "Clock", "Handle", "LoopClock", "alarms", "clock_of", "seconds", "wall"]


class Handle(Protocol):
    """A callback that is due and can be called off."""

    def cancel(self) -> None:
        """Do not call it."""
        ...


class Clock(Protocol):
    """Steady time, timers, and the thread on which a pipeline lives."""

    threads: bool  # whether other threads exist for it: false in virtual time
    alarms: dict[float, Alarms]  # by length, see `alarms`

    @property
    def scheduler(self) -> abc.SchedulerBase:
        """Return the scheduler that stock operators get."""
        ...

    def seconds(self) -> float:
        """Return steady seconds from an arbitrary origin."""
        ...

    def call_soon(self, action: Callable[[], object]) -> Handle:
        """Call `action` in the next turn."""
        ...

    def call_later(self, delay: float, action: Callable[[], object]) -> Handle:
        """Call `action` after `delay` seconds, never before."""
        ...

    def post(self, action: Callable[[], object]) -> None:
        """Call `action` in a coming turn; may be called from any thread."""
        ...

    def is_here(self) -> bool:
        """Say whether the caller already runs where the pipeline lives."""
        ...

    def is_over(self) -> bool:
        """Say whether nothing will ever run here again."""
        ...


class Alarm:
    """One of many timers of the same length."""

    __slots__ = ("_alarms", "action", "at")

    def __init__(self, alarms: Alarms, at: float, action: Callable[[], object]) -> None:
        self._alarms = alarms
        self.at = at
        self.action: Callable[[], object] | None = action

    def cancel(self) -> None:
        """Do not call it."""
        if self.action is not None:
            self.action = None
            self._alarms.cancelled()


class Alarms:
    """Many timers of the same length for the price of one: they end in the order in which they began.

    A timer costs one append, against a heap operation in the loop; hardly one in a thousand ever rings.
    """

    __slots__ = ("_clock", "_length", "_live", "_queue", "_timer")

    def __init__(self, clock: Clock, length: float) -> None:
        self._clock = clock
        self._length = length
        self._queue: deque[Alarm] = deque()
        self._live = 0  # those not cancelled
        self._timer: Handle | None = None

    def start(self, action: Callable[[], object]) -> Alarm:
        """Call `action` after the length of these alarms, unless it is cancelled."""
        alarm = Alarm(self, self._clock.seconds() + self._length, action)
        queue = self._queue
        while queue and queue[0].action is None:  # the timer may be minutes away: what is over goes now
            queue.popleft()
        queue.append(alarm)
        self._live += 1
        if self._timer is None:
            self._timer = self._clock.call_later(self._length, self._ring)
        return alarm

    def cancelled(self) -> None:
        """Count one that will not ring; without any the timer goes too."""
        self._live -= 1
        if not self._live:
            self._queue.clear()
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    def _ring(self) -> None:
        queue = self._queue
        now = self._clock.seconds()
        try:
            while queue and (queue[0].action is None or queue[0].at <= now):
                alarm = queue.popleft()
                action, alarm.action = alarm.action, None
                if action is not None:
                    self._live -= 1
                    action()
        finally:  # also for those after one that raised
            if self._timer is not None:
                self._timer.cancel()  # this one, or one that an action began
                self._timer = None
            if self._live:
                self._timer = self._clock.call_later(max(0.0, queue[0].at - now), self._ring)
            else:
                queue.clear()


def alarms(clock: Clock, length: float) -> Alarms:
    """Return the alarms of `length` seconds that all users of `clock` share."""
    found = clock.alarms.get(length)
    if found is None:
        found = clock.alarms[length] = Alarms(clock, length)
    return found


class LoopClock:
    """An asyncio loop as a clock. One for each loop, see `clock_of`."""

    __slots__ = ("__weakref__", "_call_soon", "_loop", "_scheduler", "alarms", "threads")

    seconds = staticmethod(time.monotonic)  # uvloop's own `time()` has milliseconds only; called ten times a request

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.threads = True
        self.alarms: dict[float, Alarms] = {}
        self._loop = loop
        self._call_soon = loop.call_soon
        self._scheduler = AsyncIOScheduler(loop)

    def __repr__(self) -> str:
        return f"<asyncio loop {id(self._loop):#x}>"

    @property
    def scheduler(self) -> abc.SchedulerBase:
        """The stock scheduler over the same loop."""
        return self._scheduler

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The loop itself."""
        return self._loop

    def call_soon(self, action: Callable[[], object]) -> Handle:
        """Call `action` in the next loop turn."""
        return self._call_soon(action)

    def call_later(self, delay: float, action: Callable[[], object]) -> Handle:
        """Call `action` after `delay` seconds."""
        return self._loop.call_later(delay, action)

    def post(self, action: Callable[[], object]) -> None:
        """Call `action` on the loop, from any thread, in the caller's context; a closed loop drops it."""
        try:
            self._loop.call_soon_threadsafe(action, context=contextvars.copy_context())
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def is_here(self) -> bool:
        """Say whether the caller runs on this loop."""
        try:
            return asyncio.get_running_loop() is self._loop
        except RuntimeError:
            return False

    def is_over(self) -> bool:
        """Say whether the loop is closed."""
        return self._loop.is_closed()


class _VirtualClock:
    """Virtual time of reactivex (TestScheduler, HistoricalScheduler): slower than ours, for tests that are on it."""

    __slots__ = ("_scheduler", "alarms", "threads")

    def __init__(self, scheduler: VirtualTimeScheduler) -> None:
        self.threads = False
        self.alarms: dict[float, Alarms] = {}
        self._scheduler = weakref.ref(scheduler)

    def __repr__(self) -> str:
        return f"<{type(self.scheduler).__name__} {id(self.scheduler):#x}>"

    @property
    def scheduler(self) -> VirtualTimeScheduler:
        scheduler = self._scheduler()
        if scheduler is None:  # whoever subscribes holds it, so only a bug of ours gets here
            msg = "the virtual scheduler is gone"
            raise ConfigError(msg)
        return scheduler

    def seconds(self) -> float:
        return self.scheduler.to_seconds(self.scheduler.now)

    def call_soon(self, action: Callable[[], object]) -> Handle:
        return _Scheduled(self.scheduler.schedule(_ignoring(action)))

    def call_later(self, delay: float, action: Callable[[], object]) -> Handle:
        return _Scheduled(self.scheduler.schedule_relative(delay, _ignoring(action)))

    def post(self, action: Callable[[], object]) -> None:
        self.call_soon(action)

    def is_here(self) -> bool:
        return True

    def is_over(self) -> bool:
        return False


class _Scheduled:
    """A scheduled action of reactivex, as a handle."""

    __slots__ = ("_disposable",)

    def __init__(self, disposable: abc.DisposableBase) -> None:
        self._disposable = disposable

    def cancel(self) -> None:
        self._disposable.dispose()


def _ignoring(action: Callable[[], object]) -> abc.ScheduledAction[object]:
    def run(_scheduler: abc.SchedulerBase, _state: object = None) -> None:
        action()

    return run


_loops: dict[asyncio.AbstractEventLoop, LoopClock] = {}
_virtual: weakref.WeakKeyDictionary[VirtualTimeScheduler, _VirtualClock] = weakref.WeakKeyDictionary()


def loop_clock(loop: asyncio.AbstractEventLoop) -> LoopClock:
    """Return the one clock of `loop`; clocks of closed loops are dropped on the way."""
    clock = _loops.get(loop)
    if clock is None:
        for closed in [known for known in list(_loops) if known.is_closed()]:
            _loops.pop(closed, None)
        clock = _loops.setdefault(loop, LoopClock(loop))
    return clock


def _virtual_clock(scheduler: VirtualTimeScheduler) -> _VirtualClock:
    """Return the one clock of a stock virtual scheduler; it refers back weakly, so both can go."""
    clock = _virtual.get(scheduler)
    if clock is None:
        clock = _virtual[scheduler] = _VirtualClock(scheduler)
    return clock


def clock_of(scheduler: abc.SchedulerBase | None) -> Clock | None:
    """Return the clock behind `scheduler`; None when it is nobody's choice (none given, a stock default).

    Raises:
        ConfigError: a scheduler that is neither asyncio's nor virtual; streams of ours live on one loop.
    """
    if (
        scheduler is None
        or isinstance(scheduler, TrampolineScheduler | ImmediateScheduler)
        or type(scheduler) is NewThreadScheduler
    ):
        return None  # stock `concat` and `repeat` bring a trampoline when they were given nothing, `run()` a new thread
    own = getattr(scheduler, "clock", None)
    if own is not None and hasattr(own, "call_later"):
        clock: Clock = own  # a virtual scheduler of ours, or a wrapper of one
        return clock
    if isinstance(scheduler, AsyncIOScheduler):
        return loop_clock(scheduler._loop)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    if isinstance(scheduler, VirtualTimeScheduler):
        return _virtual_clock(scheduler)
    msg = f"scheduler must be asyncio's or virtual, got {type(scheduler).__name__}: a pipeline lives on one loop"
    raise ConfigError(msg)


def seconds(scheduler: abc.SchedulerBase | None) -> float:
    """Return steady seconds on `scheduler`: monotonic on a loop, virtual under a virtual scheduler."""
    clock = clock_of(scheduler)
    return time.monotonic() if clock is None else clock.seconds()


def wall() -> float:
    """Return wall time in seconds since 1970, to read dates of others; it jumps, so measure with `seconds`."""
    return time.time()
