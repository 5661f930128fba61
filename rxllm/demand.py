"""Back-pressure: demand rides on the subscription.

reactivex has none, but its operators hand the `scheduler` of a subscription on to their source. So a consumer that can
be full subscribes upstream with a `DemandScheduler`, which wraps the real scheduler and carries a `Demand`; a source
that can wait asks `room()` before it emits and is offered room when there is some.

    source ◀── room? ── map ◀── room? ── flat_map ◀── room? ── iterate
           ─── items ──▶     ─── items ──▶        ── outcomes ──▶

Room is a level, not a credit: a source sees what the consumer holds, not what an operator in between holds.
`OPERATORS` says what that means for each stock operator: how far the source may run ahead of the consumer.
"""

from __future__ import annotations

import threading
from collections import deque
from functools import cached_property
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar, cast

from reactivex import Observable, abc
from reactivex.scheduler.periodicscheduler import PeriodicScheduler

from rxllm import runtime
from rxllm.clock import Clock, Handle, clock_of

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from datetime import datetime

    from reactivex import typing as rx_typing

__all__ = ["OPERATORS", "UNDEMANDED", "Demand", "DemandScheduler", "Flow", "Stream", "subscribe"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
T_contra = TypeVar("T_contra", contravariant=True)
State = TypeVar("State")

UNDEMANDED = 1_024  # items that a stage takes from a source that does not wait, before it fails

# How far a source of ours runs ahead of a consumer of ours, by the stock operator between them (tests count the items).
_BOUNDED = "bounded"  # synchronous, one to few: ahead by the window at most, times what is folded into one
_ONE_TURN_LATE = "one turn late"  # passes on in a later turn: ahead by one turn's worth more, which is the room at most
_UNBOUNDED = "unbounded by nature"  # holds items for a time or a partner: goes into `bounded`, or after the last stage
OPERATORS: dict[str, str] = {
    name: kind
    for kind, names in {
        _BOUNDED: """
            amb as_observable average buffer_with_count catch concat default_if_empty dematerialize distinct
            distinct_until_changed do_action element_at every filter filter_indexed finally_action find first
            flat_map_of_few ignore_elements last map map_indexed materialize max merge min on_error_resume_next pairwise
            pluck reduce repeat retry scan single skip skip_last skip_until skip_while slice some start_with starmap sum
            take take_last take_until take_while throttle_first time_interval timeout timestamp window_with_count
            with_latest_from
        """,
        _ONE_TURN_LATE: "flat_map_of_synchronous observe_on",
        _UNBOUNDED: """
            buffer_with_time combine_latest concat_map debounce delay delay_with_mapper flat_map group_by sample share
            switch_latest to_list window_with_time zip
        """,
    }.items()
    for name in names.split()
}


class Observer(Protocol[T_contra]):
    """What a stream emits into; every reactivex observer is one."""

    def on_next(self, value: T_contra, /) -> None:
        """Take an item."""
        ...

    def on_error(self, error: Exception, /) -> None:
        """Take the error that ends the stream."""
        ...

    def on_completed(self) -> None:
        """Take the end of the stream."""
        ...


class Disposable(Protocol):
    """What a subscription returns."""

    def dispose(self) -> None:
        """Release everything; again is harmless."""
        ...


class Puller(Protocol):
    """Something with items that waits for room."""

    def pull(self, n: int, /) -> int:
        """Emit at most `n` items now and say how many; wait again when there is more."""
        ...


class Nothing:
    """A subscription with nothing to release."""

    def dispose(self) -> None:
        """Do nothing."""


NOTHING = Nothing()


class Flow:
    """One run of a pipeline: what all of its subscriptions share."""

    __slots__ = ("_draining", "_on_fail", "_sources", "failed", "pulled", "tasks")

    def __init__(self, on_fail: Callable[[BaseException], None], tasks: set[asyncio.Future[Any]] | None = None) -> None:
        self._on_fail = on_fail  # releases everything
        self.failed: BaseException | None = None
        self.tasks: set[asyncio.Future[Any]] = set() if tasks is None else tasks  # a close waits for their ends
        self.pulled = 0
        self._draining = False
        self._sources: dict[Callable[[], None], None] = {}

    def fail(self, error: BaseException) -> None:
        """End the run: a callback of the consumer raised. The first error counts; whoever calls this re-raises."""
        if self.failed is None:
            self.failed = error
            self._on_fail(error)

    @property
    def sources(self) -> int:
        """How many sources can be told to stop."""
        return len(self._sources)

    def add_source(self, stop: Callable[[], None]) -> None:
        """Have `stop` called when the run is to drain; at once, in a run that already drains."""
        self._sources[stop] = None
        if self._draining:
            stop()

    def remove_source(self, stop: Callable[[], None]) -> None:
        """Forget `stop`."""
        self._sources.pop(stop, None)

    def inner(self) -> Flow:
        """Return the flow of inner streams: part of the same run, but a drain does not cut them short."""
        return Flow(self.fail, self.tasks)

    def track(self, task: asyncio.Future[Any]) -> None:
        """Have whoever closes the run wait for the end of `task`: a cancelled task still has to clean up."""
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def drain(self) -> None:
        """Stop pulling: sources complete, what is in progress is finished and delivered."""
        self._draining = True
        for stop in list(self._sources):
            stop()


class Demand:
    """What a consumer can take, and who waits to fill it.

    Subclasses say `room()` and call `wake()` when room may have appeared. Waiting sources are offered it in turn, at
    most `room()` items together in one turn of the loop: an operator in between that passes on late is bounded by that.
    """

    __slots__ = ("_turning", "clock", "flow", "waiting")

    def __init__(self, clock: Clock, flow: Flow) -> None:
        self.clock = clock
        self.flow = flow
        self.waiting: deque[Puller] = deque()
        self._turning = False

    def room(self) -> int:
        """Return how many more items the consumer can take; zero or less: none."""
        raise NotImplementedError

    @property
    def ahead(self) -> int:
        """How many finished items the stage above may keep ready; 0 when the consumer has a queue of its own."""
        return 0

    def wait(self, puller: Puller) -> None:
        """Offer `puller` room when its turn comes."""
        self.waiting.append(puller)
        if not self._turning and self.room() > 0:
            self._turning = True
            self.clock.call_soon(self._turn)

    def leave(self, puller: Puller) -> None:
        """Offer `puller` nothing more."""
        if puller in self.waiting:
            self.waiting.remove(puller)

    def wake(self) -> None:
        """Offer room to those who wait, in the next turn."""
        if self.waiting and not self._turning and self.room() > 0:
            self._turning = True
            self.clock.call_soon(self._turn)

    def _turn(self) -> None:
        waiting = self.waiting
        budget = self.room()
        try:
            for left in range(len(waiting), 0, -1):
                if budget <= 0 or not waiting:
                    break
                budget -= waiting.popleft().pull(-(-budget // left))
                budget = min(budget, self.room())
        except BaseException as error:
            self.flow.fail(error)
            raise
        finally:
            self._turning = False
        self.wake()


class Outlet(Generic[T]):
    """The way out of a stage: passes items on while the consumer has room, holds them while it has none.

    `after` is called when held items were passed on: the stage may have room again.
    """

    __slots__ = ("_after", "_ended", "_error", "_flow", "_observer", "below", "held", "stopped")

    def __init__(
        self, observer: Observer[T], carrier: DemandScheduler, after: Callable[[], None] = lambda: None
    ) -> None:
        self._observer = observer
        self.below = carrier.demand
        self._flow = carrier.flow
        self._after = after
        self._ended = False
        self._error: Exception | None = None
        self.held: deque[T] = deque()
        self.stopped = False

    def push(self, value: T) -> None:
        """Pass `value` on if the consumer has room and nobody waits for it, else hold it."""
        below = self.below
        if self.held:
            self.held.append(value)
        elif below is None or (not below.waiting and below.room() > 0):
            if not self.stopped:
                self._pass_on(value)
        elif not self.stopped:
            self.held.append(value)
            below.wait(self)

    def _pass_on(self, value: T) -> None:
        try:
            self._observer.on_next(value)
        except BaseException as error:  # a callback of the consumer raised: nothing may stay behind it
            self._flow.fail(error)
            raise

    def pull(self, n: int) -> int:
        """Pass on at most `n` held items."""
        held = self.held
        sent = 0
        while held and sent < n:
            sent += 1
            self._pass_on(held.popleft())
        if held and self.below is not None:
            self.below.wait(self)
        elif self._ended:
            self._finish()
        self._after()
        return sent

    def end(self, error: Exception | None = None) -> None:
        """End with `error`, or complete, once nothing is held any more."""
        self._ended = True
        self._error = error
        if not self.held:
            self._finish()

    def _finish(self) -> None:
        if self.stopped:
            return
        self.stopped = True
        if self._error is None:
            self._observer.on_completed()
        else:
            self._observer.on_error(self._error)

    def fail(self, error: Exception) -> None:
        """End with `error` now; what is held is dropped."""
        self.held.clear()
        self.end(error)

    def dispose(self) -> None:
        """Emit nothing more."""
        self.stopped = True
        self.held.clear()
        if self.below is not None:
            self.below.leave(self)


class DemandScheduler(PeriodicScheduler):
    """The scheduler of a subscription, wrapped to carry the demand of its consumer.

    Every action gets the wrapper, not the wrapped, so demand survives operators that resubscribe from a timer. Wrapping
    a
    wrapper unwraps it first: depth never grows. An action that raises ends the run.
    """

    def __init__(self, clock: Clock, demand: Demand | None, flow: Flow) -> None:
        self.clock = clock
        self.base = clock.scheduler
        self.demand = demand
        self.flow = flow

    def with_demand(self, demand: Demand | None) -> DemandScheduler:
        """Return the scheduler that a stage subscribes its source with."""
        return DemandScheduler(self.clock, demand, self.flow)

    def for_inner(self) -> DemandScheduler:
        """Return the scheduler for inner streams: the same demand, but a drain does not cut them short."""
        return DemandScheduler(self.clock, self.demand, self.flow.inner())

    @property
    def now(self) -> datetime:
        """The wrapped scheduler's own time."""
        return self.base.now

    def call_soon(self, action: Callable[[], object]) -> Handle:
        """Call `action` in the next turn; cheaper than `schedule`."""
        return self.clock.call_soon(action)

    def call_later(self, delay: float, action: Callable[[], object]) -> Handle:
        """Call `action` after `delay` seconds; cheaper than `schedule_relative`."""
        return self.clock.call_later(delay, action)

    def schedule(self, action: abc.ScheduledAction[State], state: State | None = None) -> abc.DisposableBase:
        """Schedule `action` for the next turn."""
        return self.base.schedule(self._carrying(action), state)

    def schedule_relative(
        self, duetime: rx_typing.RelativeTime, action: abc.ScheduledAction[State], state: State | None = None
    ) -> abc.DisposableBase:
        """Schedule `action` after `duetime` (seconds or timedelta)."""
        return self.base.schedule_relative(duetime, self._carrying(action), state)

    def schedule_absolute(
        self, duetime: rx_typing.AbsoluteTime, action: abc.ScheduledAction[State], state: State | None = None
    ) -> abc.DisposableBase:
        """Schedule `action` at `duetime` of the wrapped scheduler's time."""
        return self.base.schedule_absolute(duetime, self._carrying(action), state)

    def _carrying(self, action: abc.ScheduledAction[State]) -> abc.ScheduledAction[State]:
        def run(_base: abc.SchedulerBase, state: State | None = None) -> abc.DisposableBase | None:
            try:
                return action(self, state)
            except BaseException as error:
                self.flow.fail(error)
                raise

        return run


class Stream(Observable[T_co], Generic[T_co]):
    """Base of all observables of ours: subscribed directly among themselves, publicly by all others.

    Subclasses implement `_start(observer, carrier)`: it may emit before it returns, emits nothing after a terminal or a
    dispose, and releases what it holds at its own terminal. `carrier` always has a clock; its demand is None below the
    last stage.
    """

    _subscribe = None  # what `Observable.__init__` would set; an instance lock is made only for those who ask

    def __init__(self) -> None:  # pyright: ignore[reportMissingSuperCall]  10 µs for an RLock and a chain of mixins
        pass

    @cached_property
    def lock(self) -> threading.RLock:  # type: ignore[override]
        """The lock that stock operators synchronise on."""
        return threading.RLock()

    def _start(self, observer: Observer[T_co], carrier: DemandScheduler) -> Disposable:
        raise NotImplementedError

    def _subscribe_core(
        self, observer: abc.ObserverBase[T_co], scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        if isinstance(scheduler, DemandScheduler):
            return cast("abc.DisposableBase", self._start(observer, scheduler))
        return cast("abc.DisposableBase", _Root[T_co].enter(self, observer, scheduler))


def subscribe(source: Observable[T], observer: Observer[T], carrier: DemandScheduler) -> Disposable:
    """Subscribe a stream of ours directly, any other the public way.

    What a foreign stream emits on another thread is moved to the loop.
    """
    start = getattr(source, "_start", None)
    if start is not None:
        disposable: Disposable = start(observer, carrier)
        return disposable
    if carrier.clock.threads:
        observer = _OnLoop(observer, carrier.clock)
    return source.subscribe(cast("abc.ObserverBase[T]", observer), scheduler=carrier)


class _OnLoop(Generic[T]):
    """The observer of a foreign stream, which may emit from any thread."""

    __slots__ = ("_clock", "_observer")

    def __init__(self, observer: Observer[T], clock: Clock) -> None:
        self._observer = observer
        self._clock = clock

    def on_next(self, value: T) -> None:
        if self._clock.is_here():
            self._observer.on_next(value)
        else:
            self._clock.post(lambda: self._observer.on_next(value))

    def on_error(self, error: Exception) -> None:
        if self._clock.is_here():
            self._observer.on_error(error)
        else:
            self._clock.post(lambda: self._observer.on_error(error))

    def on_completed(self) -> None:
        if self._clock.is_here():
            self._observer.on_completed()
        else:
            self._clock.post(self._observer.on_completed)


class _Root(Generic[T]):
    """Where a pipeline of ours begins for a subscriber that brings no demand: finds its loop and guards its end."""

    __slots__ = ("_clock", "_disposed", "_inner", "_observer")

    def __init__(self, observer: Observer[T], clock: Clock) -> None:
        self._observer = observer
        self._clock = clock
        self._inner: Disposable | None = None
        self._disposed = False

    @classmethod
    def enter(cls, stream: Stream[T], observer: Observer[T], scheduler: abc.SchedulerBase | None) -> _Root[T]:
        """Subscribe on the loop of `scheduler`, else on the running one, else on the loop thread."""
        clock = clock_of(scheduler) or runtime.here()
        root = cls(observer, clock)
        carrier = DemandScheduler(clock, None, Flow(root._fail))

        def begin() -> None:
            if root._disposed:
                return
            inner = subscribe(stream, root, carrier)
            if root._disposed:
                inner.dispose()
            else:
                root._inner = inner

        if clock.is_here():
            begin()
        else:
            clock.post(begin)
        return root

    def on_next(self, value: T) -> None:
        if self._disposed:
            return
        try:
            self._observer.on_next(value)
        except BaseException as error:
            self._fail(error)
            raise

    def on_error(self, error: Exception) -> None:
        if not self._disposed:
            self._disposed = True
            self._observer.on_error(error)

    def on_completed(self) -> None:
        if not self._disposed:
            self._disposed = True
            self._observer.on_completed()

    def _fail(self, _error: BaseException) -> None:
        self._disposed = True
        self._release()

    def _release(self) -> None:
        inner, self._inner = self._inner, None
        if inner is not None:
            inner.dispose()

    def dispose(self) -> None:
        """Release everything, on the loop, from whichever thread this is called."""
        self._disposed = True
        if self._clock.is_here():
            self._release()
        else:
            self._clock.post(self._release)


def carried(scheduler: object) -> Demand | None:
    """Return the demand that a subscription's scheduler carries, if any."""
    return scheduler.demand if isinstance(scheduler, DemandScheduler) else None
