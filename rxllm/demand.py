"""Back-pressure: demand rides on the subscription.

reactivex has none, but its operators hand the `scheduler` of a subscription on to their source. So a consumer that can
be full subscribes upstream with a `DemandScheduler`, which wraps the real scheduler and carries a `Demand`; a source
that can wait asks `room()` before it emits and is offered room when there is some.

    source ◀── room? ── map ◀── room? ── flat_map ◀── room? ── iterate
           ─── items ──▶     ─── items ──▶        ── outcomes ──▶

Room is a level, not a credit: a source sees what the consumer holds, not what an operator in between holds.
`OPERATORS` says what that means for each stock operator: how far the source may run ahead of the consumer.

What may still be sent rides on the subscription too, from a budget to the attempts inside of it: see `Allowance`.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from reactivex import abc
from reactivex.scheduler.periodicscheduler import PeriodicScheduler

from rxllm.clock import Clock, Handle
from rxllm.errors import ConfigError

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from datetime import datetime

    from reactivex import typing as rx_typing

    from rxllm.messages import Attempt, Request

__all__ = [
    "NOTHING",
    "OPERATORS",
    "UNDEMANDED",
    "Allowance",
    "Asked",
    "Demand",
    "DemandScheduler",
    "Disposable",
    "Flow",
    "Nothing",
    "Observer",
    "Outlet",
    "Puller",
    "Waiting",
    "undemanded",
]

T = TypeVar("T")
T_contra = TypeVar("T_contra", contravariant=True)
State = TypeVar("State")

UNDEMANDED = 1_024  # items that a stage takes from a source that does not wait, before it fails
LATE = 1_000  # sources subscribed while a run drains, before what subscribes them is cut off

# How far a source of ours runs ahead of a consumer of ours with room for n items, by the stock operator
# between them, when the source is endless and its partner, if it has one, silent. Tests count the items.
#   bounded: by n, times what is folded into one, plus what is skipped or kept back. (`distinct` keeps every
#       key it saw.)
#   one turn late: passes on in a later turn, most of them one item a turn. The source is then asked for no
#       more than what comes, and is ahead by 2.5 n at most until the consumer is full. (`replay` keeps every
#       item it saw.)
#   unbounded by nature: holds items for a time or a partner, hands them to inner streams, which know no
#       demand, or asks for one consumer of several. Put it inside `bounded(n, …)` or after the last stage.
#   pulled for ever: folds or drops. Nothing piles up, but the consumer never fills, so the source is pulled
#       as fast as the loop turns, to its end. Put it after the last stage; `bounded(n, …)` stands still once
#       n items have not come out.
_BOUNDED = "bounded"
_ONE_TURN_LATE = "one turn late"
_UNBOUNDED = "unbounded by nature"
_PULLED_FOR_EVER = "pulled for ever"
OPERATORS: dict[str, str] = {
    name: kind
    for kind, names in {
        _BOUNDED: """
            all amb as_observable buffer_with_count case catch catch_with_iterable concat
            concat_with_iterable contains default_if_empty defer dematerialize distinct distinct_until_changed do
            do_action do_while element_at element_at_or_default filter filter_indexed finally_action find find_index
            first first_or_default flat_map_of_few flat_map_of_ours flat_map_of_synchronous for_in
            group_join if_then is_empty map map_indexed materialize merge merge_all
            on_error_resume_next pairwise pluck pluck_attr publish repeat retry scan single
            single_or_default skip skip_last skip_while skip_while_indexed slice some starmap
            starmap_indexed start_with take take_until take_until_with_time take_while
            take_while_indexed take_with_time tap time_interval timeout timeout_with_mapper
            timestamp using while_do window_with_count zip_with_iterable
        """,
        _ONE_TURN_LATE: "concat_map_of_synchronous delay_subscription observe_on replay",
        _UNBOUNDED: """
            buffer buffer_toggle buffer_when buffer_with_time buffer_with_time_or_count
            concat_all concat_map delay delay_with_mapper flat_map flat_map_indexed group_by
            group_by_until join merge_max_concurrent partition sequence_equal share
            skip_last_with_time subscribe_on take_last_with_time to_dict to_iterable to_list
            to_set window window_toggle window_when window_with_time window_with_time_or_count
            zip
        """,
        _PULLED_FOR_EVER: """
            average combine_latest count debounce exclusive flat_map_latest fork_join
            ignore_elements last last_or_default max max_by min min_by reduce sample skip_until
            skip_until_with_time skip_with_time sum switch_latest switch_map switch_map_indexed
            take_last take_last_buffer throttle_first throttle_with_mapper throttle_with_timeout
            with_latest_from zip_latest
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
        """Emit at most `n` items now and say how many; wait again when there is more. 0 asks if there is."""
        ...


class Asked(NamedTuple):
    """Whom an attempt has asked, as far as that is known: it says what the tokens cost."""

    request: Request | None
    route: str | None  # which of several clients
    model: str | None  # that the answer names


class Waiting(Protocol):
    """An attempt that is not sent yet: it waits for a gate, or backs off."""

    def give_up(self, error: Exception, /) -> None:
        """Fail with `error` now."""
        ...


class Allowance(Protocol):
    """What may still be sent in a part of a pipeline. It rides on the subscription, as demand does: see `budget`."""

    def refusal(self) -> Exception | None:
        """Return what an attempt that may not be sent any more fails with; None: it may be sent."""
        ...

    def has_refused(self, error: object, /) -> bool:
        """Say whether something fails with `error` because it may not be sent any more."""
        ...

    def begin(self) -> None:
        """Count an attempt that is sent now."""
        ...

    def end(self, attempt: Attempt, asked: Asked, /, *, recorded: bool) -> None:
        """Count what an attempt has used; `recorded`: an outcome will have it."""
        ...

    def wait(self, waiting: Waiting, /) -> None:
        """Give `waiting` up when nothing more may be sent."""
        ...

    def leave(self, waiting: Waiting, /) -> None:
        """Forget `waiting`."""
        ...


class Nothing:
    """A subscription with nothing to release."""

    def dispose(self) -> None:
        """Do nothing."""


NOTHING = Nothing()


class Flow:
    """One run of a pipeline: what all of its subscriptions share."""

    __slots__ = ("_draining", "_failed", "_late", "_on_fail", "_outer", "_sources", "_stages", "pulled", "tasks")

    def __init__(self, on_fail: Callable[[BaseException], None], outer: Flow | None = None) -> None:
        self._on_fail = on_fail  # releases everything
        self._outer = outer
        self._failed: BaseException | None = None
        self.tasks: set[asyncio.Future[Any]] = set() if outer is None else outer.tasks  # a close waits for their ends
        self.pulled = 0
        self._draining = False
        self._late = 0  # sources subscribed since then
        self._sources: dict[Callable[[], None], Demand | None] = {}  # how to stop it -> what it fills
        self._stages: dict[Callable[[], None], Demand] = {}  # how to cut it off from its source -> its own demand

    def fail(self, error: BaseException) -> None:
        """End the run: a callback of the consumer raised. The first error counts; whoever calls this re-raises."""
        if self._failed is None:
            self._failed = error
            self._on_fail(error)

    @property
    def failed(self) -> BaseException | None:
        """What a callback of the consumer raised, if one did."""
        return self._failed if self._outer is None else self._outer.failed

    def add_source(self, stop: Callable[[], None], fills: Demand | None = None) -> None:
        """Have `stop` called when the run is to drain; at once, in a run that already drains."""
        self._sources[stop] = fills
        _feed(fills)
        if self._draining:
            stop()
            self._late += 1
            if self._late % LATE == 0:
                self._cut_idle()

    def remove_source(self, stop: Callable[[], None]) -> None:
        """Forget `stop`."""
        self._sources.pop(stop, None)

    def add_stage(self, cut: Callable[[], None], stage: Demand) -> None:
        """Have `cut` called when the run is to drain and nothing above the stage can be told so."""
        self._stages[cut] = stage
        _feed(stage.below)
        if self._draining and not stage.fed:
            cut()

    def remove_stage(self, cut: Callable[[], None]) -> None:
        """Forget `cut`."""
        self._stages.pop(cut, None)

    def inner(self) -> Flow:
        """Return the flow of inner streams: part of the same run, but a drain does not cut them short."""
        return Flow(self.fail, self)

    def track(self, task: asyncio.Future[Any]) -> None:
        """Have whoever closes the run wait for the end of `task`: a cancelled task still has to clean up."""
        self.tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Future[Any]) -> None:
        self.tasks.discard(task)
        if not task.cancelled():
            task.exception()  # seen: whoever waited for it has it

    def drain(self) -> None:
        """Stop pulling: sources complete, what is in progress is finished and delivered."""
        self._draining = True
        for cut in [cut for cut, stage in self._stages.items() if not stage.fed]:
            cut()
        for stop in list(self._sources):
            stop()

    def _cut_idle(self) -> None:
        """Cut off the stages that nothing of ours is above of: what is there, `repeat` say, subscribes for ever."""
        busy: set[Demand] = set()
        for demand in [*self._sources.values(), *(stage.below for stage in self._stages.values())]:
            below = demand
            while below is not None:
                busy.add(below)
                below = below.below
        for cut in [cut for cut, stage in self._stages.items() if stage not in busy]:
            cut()


def _feed(demand: Demand | None) -> None:
    """Note that what fills `demand`, and all that is below it, can be told to stop."""
    while demand is not None and not demand.fed:
        demand.fed = True
        demand = demand.below


class Demand:
    """What a consumer can take, and who waits to fill it.

    Subclasses say `room()` and call `wake()` when room may have appeared. Waiting sources are offered it in turn, at
    most `room()` items together in one turn of the loop: an operator in between that passes on late is bounded by that.
    """

    __slots__ = (
        "_asked",
        "_late",
        "_seen",
        "_turning",
        "arrived",
        "below",
        "clock",
        "fed",
        "flow",
        "offering",
        "waiting",
    )

    def __init__(self, clock: Clock, flow: Flow) -> None:
        self.clock = clock
        self.flow = flow
        self.waiting: deque[Puller] = deque()
        self.below: Demand | None = None  # the demand that those who fill this one fill in their turn
        self.fed = False  # by something of ours, which a drain can tell to stop
        self.offering = False  # what is emitted now was asked for
        self.arrived = 0  # items that came, ever: the consumer counts
        self._seen = 0  # those that had come before the last turn
        self._asked = 0  # items emitted in the last turn
        self._late = False  # and not all of them came
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

    def ask_end(self) -> None:
        """Have those who wait end now, if they know that they have nothing more."""
        waiting, self.waiting = self.waiting, deque()
        for puller in waiting:
            puller.pull(0)

    def wake(self) -> None:
        """Offer room to those who wait, in the next turn."""
        if self.waiting and not self._turning and self.room() > 0:
            self._turning = True
            self.clock.call_soon(self._turn)

    def _turn(self) -> None:
        waiting = self.waiting
        budget = self.room()
        came = self.arrived - self._seen
        if came < self._asked:
            self._late = True  # an operator in between passes on later, or drops: ask for no more than what comes
            budget = min(budget, max(1, came))
        elif self._late:
            self._late = budget > 2 * came  # all came: ask for more, step by step
            budget = min(budget, 2 * came)
        self._seen, self._asked = self.arrived, 0
        extra = budget % max(1, len(waiting))  # so many get one item more than the others
        self.offering = True
        try:
            for left in range(len(waiting), 0, -1):
                if budget <= 0 or not waiting:
                    break
                sent = waiting.popleft().pull(-(-budget // left))
                self._asked += sent
                budget = min(budget - sent, self.room())
            else:
                waiting.rotate(-extra)  # and they come last in the next turn
        except BaseException as error:
            self.flow.fail(error)
            raise
        finally:
            self.offering = False
            self._turning = False
        self.wake()


class Outlet(Generic[T]):
    """The way out of a stage: passes items on while the consumer has room, holds them while it has none.

    `after` is called when held items were passed on: the stage may have room again.
    """

    __slots__ = ("_after", "_ended", "_error", "_observer", "_waits", "below", "flow", "held", "stopped")

    def __init__(
        self, observer: Observer[T], carrier: DemandScheduler, after: Callable[[], None] = lambda: None
    ) -> None:
        self._observer = observer
        self.below = carrier.demand
        self.flow = carrier.flow
        self._after = after
        self._ended = False
        self._error: Exception | None = None
        self._waits = False  # for room
        self.held: deque[T] = deque()
        self.stopped = False

    def push(self, value: T) -> None:
        """Pass `value` on if the consumer has room and nobody waits for it, else hold it.

        What the consumer has just asked an inner stream for goes through in any case, or the oldest held item in its
        stead: else each round of asking would leave more held than it takes.
        """
        if self.stopped:
            return
        below, held = self.below, self.held
        if below is None or ((below.offering or not (held or below.waiting)) and below.room() > 0):
            if held:
                held.append(value)
                value = held.popleft()
            self._pass_on(value)
        else:
            held.append(value)
            if below is not None and not self._waits:
                self._waits = True
                below.wait(self)

    def _pass_on(self, value: T) -> None:
        try:
            self._observer.on_next(value)
        except BaseException as error:  # a callback of the consumer raised: nothing may stay behind it
            self.flow.fail(error)
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
        else:
            self._waits = False
        if self._ended and not held:
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
    """The scheduler of a subscription, wrapped to carry the demand of its consumer, and what may still be sent.

    Every action gets the wrapper, not the wrapped, so demand survives operators that resubscribe from a timer. Wrapping
    a wrapper unwraps it first: depth never grows. An action that raises ends the run.
    """

    def __init__(self, clock: Clock, demand: Demand | None, flow: Flow, allowance: Allowance | None = None) -> None:
        self.clock = clock
        self.base = clock.scheduler
        self.demand = demand
        self.flow = flow
        self.allowance = allowance

    def with_demand(self, demand: Demand | None) -> DemandScheduler:
        """Return the scheduler that a stage subscribes its source with."""
        if demand is not None:
            demand.below = self.demand
        return DemandScheduler(self.clock, demand, self.flow, self.allowance)

    def with_allowance(self, allowance: Allowance | None) -> DemandScheduler:
        """Return the scheduler for a part of the pipeline in which that much may be sent."""
        return DemandScheduler(self.clock, self.demand, self.flow, allowance)

    def for_inner(self) -> DemandScheduler:
        """Return the scheduler for inner streams: the same demand, but a drain does not cut them short."""
        return DemandScheduler(self.clock, self.demand, self.flow.inner(), self.allowance)

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


def undemanded() -> ConfigError:
    """Return the error of a stage whose source does not wait for demand."""
    return ConfigError(
        f"the source emitted {UNDEMANDED:,} items that nobody demanded: use rxllm.from_iterable (it waits), or put "
        "rxllm.operators.overflow(policy, n) behind a source that cannot wait"
    )
