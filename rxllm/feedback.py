"""The loop from what attempts did to what the gate does: signals into a controller, its settings out.

    gate ──▶ Signal ──▶ controller ──▶ Setting ──▶ gate

A controller is an operator, `Observable[Signal] -> Observable[Setting]`, or a `Machine` of `policies.control`, which
`Settings` makes one of. Its timers stand still while nobody is at the gate: so nothing runs on when
the pipelines have ended, and what it has learned is there when they begin again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias, TypeVar, cast

from reactivex import Observable, abc
from reactivex import disposable as disposables
from reactivex.scheduler.periodicscheduler import PeriodicScheduler

from rxllm.errors import ConfigError, OverloadedError, ValidationError
from rxllm.messages import Kind, Setting, Signal
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from datetime import datetime

    from reactivex import typing as rx_typing

    from rxllm.clock import Alarms, Clock, Handle
    from rxllm.demand import DemandScheduler, Disposable, Observer
    from rxllm.policies.accounting import Ending
    from rxllm.policies.control import Machine

__all__ = ["Controller", "Feedback", "RestingClock", "RestingScheduler", "Settings", "Signals", "kind_of"]

State = TypeVar("State")
Controller: TypeAlias = Callable[[Observable[Signal]], Observable[Setting]]

FIRST = Setting(limit=20, rate=None, reason="until the controller says more")
BUSY = (503, 529)
_log = logging.getLogger("rxllm.feedback")


def kind_of(ending: Ending, error: Exception | None) -> Kind | None:
    """Return what the end of an attempt is to a controller; None: it tells nothing of the server."""
    if ending == "answered":
        return "invalid" if isinstance(error, ValidationError) else "ok"
    if ending == "cancelled":
        return None
    if ending == "refused":
        busy = isinstance(error, OverloadedError) or getattr(error, "status", None) in BUSY
        return "overloaded" if busy else "refused"
    return "fault" if getattr(error, "transient", True) is True else "fatal"


class Feedback:
    """A controller at work at one gate.

    Args:
        controller: an operator, or a machine.
        apply: takes a setting; called on the gate's loop.

    Raises:
        ConfigError: it is neither.
    """

    def __init__(self, controller: Controller | Machine, apply: Callable[[Setting], object]) -> None:
        if not callable(controller) and not hasattr(controller, "on_signal"):
            msg = f"a controller must be a machine or an operator, got {controller!r}"
            raise ConfigError(msg)
        self.controller = controller
        self._apply = apply
        self._machine = cast("Machine", controller) if hasattr(controller, "on_signal") else None
        self.initial = FIRST if self._machine is None else self._machine.initial
        self.epoch = 0  # how many settings it has made
        self._known = False  # what it says is what holds already
        self._signals = Signals()
        self._clock: RestingClock | None = None
        self._subscription: abc.DisposableBase | None = None

    def bind(self, clock: Clock) -> None:
        """Live on the loop of `clock` from now on; a stream of settings begins anew there, a machine goes on."""
        self.close()
        machine = self._machine
        below = self._clock = RestingClock(clock)
        self._signals = Signals()
        self._known = machine is not None
        try:
            settings = (
                cast("Controller", self.controller)(self._signals)
                if machine is None
                else Settings(self._signals, machine)
            )
            self._subscription = settings.subscribe(self._set, self._fail, _completed, scheduler=below.scheduler)
        except Exception as error:
            self._fail(error)
        self._known = False

    def tell(self, signal: Signal) -> None:
        """Give `signal` to the controller."""
        try:
            self._signals.on_next(signal)
        except Exception as error:
            self._fail(error)

    def rest(self) -> None:
        """Stop the timers: nobody is at the gate."""
        if self._clock is not None:
            self._clock.rest()

    def wake(self) -> None:
        """Go on: somebody is at the gate again."""
        if self._clock is not None:
            self._clock.wake()

    def close(self) -> None:
        """End the controller; its last setting holds."""
        self.rest()
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            subscription.dispose()

    def _set(self, setting: Setting) -> None:
        if self._known:
            return
        try:
            self._apply(setting)
        except Exception as error:  # no setting at all, or one out of its bounds
            self._fail(error)
        else:
            self.epoch += 1

    def _fail(self, error: Exception) -> None:
        _log.warning("the controller failed, and its last setting holds: %r", error)
        self.close()


def _completed() -> None:
    _log.info("the controller completed, and its last setting holds")


class Signals(Observable[Signal]):
    """The signals of one gate, as they come: hot, and in the turn in which they happen."""

    def __init__(self) -> None:
        super().__init__()
        self._observers: list[Observer[Signal]] = []

    def on_next(self, signal: Signal) -> None:
        """Pass `signal` on."""
        for observer in self._observers:
            observer.on_next(signal)

    def _start(self, observer: Observer[Signal], _carrier: DemandScheduler | None = None) -> Disposable:
        self._observers = [*self._observers, observer]
        return disposables.Disposable(lambda: self._leave(observer))

    def _subscribe_core(
        self,
        observer: abc.ObserverBase[Signal],
        scheduler: abc.SchedulerBase | None = None,  # noqa: ARG002  nothing is scheduled
    ) -> abc.DisposableBase:
        return cast("abc.DisposableBase", self._start(observer))

    def _leave(self, observer: Observer[Signal]) -> None:
        self._observers = [other for other in self._observers if other is not observer]


class Settings(Stream[Setting]):
    """What `machine` makes of `signals`; see `operators.feedback`."""

    def __init__(self, signals: Observable[Signal], machine: Machine) -> None:
        self.signals = signals
        self.machine = machine

    def _start(self, observer: Observer[Setting], carrier: DemandScheduler) -> Disposable:
        drive = _Drive(self.machine, observer, carrier)
        return connected(drive, drive.connect, self.signals)


class _Drive:
    """One subscription of `Settings`."""

    __slots__ = ("_carrier", "_due", "_machine", "_observer", "_stopped", "_timer", "_upstream")

    def __init__(self, machine: Machine, observer: Observer[Setting], carrier: DemandScheduler) -> None:
        self._machine = machine
        self._observer = observer
        self._carrier = carrier
        self._due = 0.0  # when the timer fires
        self._stopped = False
        self._timer: Handle | None = None
        self._upstream: Disposable | None = None

    def connect(self, signals: Observable[Signal]) -> None:
        self._observer.on_next(self._machine.initial)
        self._arm()
        if self._stopped:
            return
        upstream = subscribe(signals, self, self._carrier)
        if self._stopped:
            upstream.dispose()
        else:
            self._upstream = upstream

    def on_next(self, signal: Signal) -> None:
        if self._stopped:
            return
        try:
            setting = self._machine.on_signal(signal)
        except Exception as error:
            self._fail(error)
            return
        self._emit(setting)

    def _emit(self, setting: Setting | None) -> None:
        if setting is not None:
            self._observer.on_next(setting)
        self._arm()

    def _arm(self) -> None:
        due = None if self._stopped else self._machine.due
        if self._timer is not None:
            if due is not None and self._due <= due:
                return  # it fires early enough and looks again
            self._timer.cancel()
            self._timer = None
        if due is not None:
            self._due = due
            self._timer = self._carrier.call_later(max(0.0, due - self._carrier.clock.seconds()), self._fire)

    def _fire(self) -> None:
        self._timer = None
        now, due = self._carrier.clock.seconds(), self._machine.due
        if due is None or now < due:
            self._arm()
            return
        try:
            setting = self._machine.on_timer(now)
        except Exception as error:
            self._fail(error)
            return
        self._emit(setting)

    def _fail(self, error: Exception) -> None:
        self.dispose()
        self._observer.on_error(error)

    def on_error(self, error: Exception) -> None:
        if not self._stopped:
            self._upstream = None
            self.dispose()
            self._observer.on_error(error)

    def on_completed(self) -> None:
        if not self._stopped:
            self._upstream = None
            self.dispose()
            self._observer.on_completed()

    def dispose(self) -> None:
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._upstream is not None:
            self._upstream.dispose()
            self._upstream = None


class RestingClock:
    """A clock whose timers stand still while nobody is at the gate; `rest` and `wake` say when."""

    def __init__(self, clock: Clock) -> None:
        self.threads = clock.threads
        self.alarms: dict[float, Alarms] = {}
        self._clock = clock
        self._timers: set[_Timer] = set()
        self._resting = True
        self._scheduler = RestingScheduler(self)

    def __repr__(self) -> str:
        return f"<resting on {self._clock!r}>"

    @property
    def scheduler(self) -> RestingScheduler:
        """The scheduler over this clock, for stock operators."""
        return self._scheduler

    @property
    def now(self) -> datetime:
        """The time of the scheduler below."""
        return self._clock.scheduler.now

    def seconds(self) -> float:
        """Return steady seconds."""
        return self._clock.seconds()

    def call_soon(self, action: Callable[[], object]) -> Handle:
        """Call `action` in the next turn."""
        return self._clock.call_soon(action)

    def call_later(self, delay: float, action: Callable[[], object]) -> Handle:
        """Call `action` after `delay` seconds; when that is over while it rests, as soon as it wakes."""
        timer = _Timer(self, self._clock.seconds() + delay, action)
        self._timers.add(timer)
        if not self._resting:
            timer.arm(self._clock)
        return timer

    def post(self, action: Callable[[], object]) -> None:
        """Call `action` in a coming turn; may be called from any thread."""
        self._clock.post(action)

    def is_here(self) -> bool:
        """Say whether the caller already runs where the gate lives."""
        return self._clock.is_here()

    def is_over(self) -> bool:
        """Say whether nothing will ever run here again."""
        return self._clock.is_over()

    def rest(self) -> None:
        """Stop all timers."""
        self._resting = True
        for timer in self._timers:
            timer.disarm()

    def wake(self) -> None:
        """Go on with them."""
        self._resting = False
        for timer in list(self._timers):
            timer.arm(self._clock)

    def forget(self, timer: _Timer) -> None:
        """Drop a timer that has fired, or never will."""
        self._timers.discard(timer)


class _Timer:
    """An action that is due at a time, armed or not."""

    __slots__ = ("_action", "_at", "_handle", "_owner")

    def __init__(self, owner: RestingClock, at: float, action: Callable[[], object]) -> None:
        self._owner = owner
        self._at = at
        self._action = action
        self._handle: Handle | None = None

    def arm(self, clock: Clock) -> None:
        if self._handle is None:
            self._handle = clock.call_later(max(0.0, self._at - clock.seconds()), self._fire)

    def disarm(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None

    def cancel(self) -> None:
        self.disarm()
        self._owner.forget(self)

    def _fire(self) -> None:
        self._handle = None
        self._owner.forget(self)
        self._action()


class RestingScheduler(PeriodicScheduler):
    """What stock operators of a controller schedule with."""

    def __init__(self, clock: RestingClock) -> None:
        self.clock = clock

    @property
    def now(self) -> datetime:
        """The time of the scheduler below."""
        return self.clock.now

    def schedule(self, action: abc.ScheduledAction[State], state: State | None = None) -> abc.DisposableBase:
        """Schedule `action` for the next turn."""
        return self.schedule_relative(0.0, action, state)

    def schedule_relative(
        self, duetime: rx_typing.RelativeTime, action: abc.ScheduledAction[State], state: State | None = None
    ) -> abc.DisposableBase:
        """Schedule `action` after `duetime` (seconds or timedelta)."""
        result = disposables.SingleAssignmentDisposable()

        def run() -> None:
            result.disposable = self.invoke_action(action, state)

        seconds = max(0.0, self.to_seconds(duetime))
        handle = self.clock.call_later(seconds, run) if seconds else self.clock.call_soon(run)
        return disposables.CompositeDisposable(result, disposables.Disposable(handle.cancel))

    def schedule_absolute(
        self, duetime: rx_typing.AbsoluteTime, action: abc.ScheduledAction[State], state: State | None = None
    ) -> abc.DisposableBase:
        """Schedule `action` at `duetime` of the time below."""
        return self.schedule_relative(self.to_datetime(duetime) - self.now, action, state)
