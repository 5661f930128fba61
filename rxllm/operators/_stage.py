"""A stage at work: one subscription of `flat_map`, with the inner streams that it has in progress."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from reactivex.observable.groupedobservable import GroupedObservable

from rxllm.demand import UNDEMANDED, Demand, DemandScheduler, Outlet, undemanded
from rxllm.errors import ConfigError, check_number
from rxllm.operators._failure import failure, raising
from rxllm.operators._inner import discard, subscribe_inner
from rxllm.operators.to_outcome import StageFlow
from rxllm.policies.places import Places
from rxllm.stream import subscribe

if TYPE_CHECKING:
    from collections.abc import Callable

    from reactivex import Observable

    from rxllm.demand import Disposable, Flow, Observer

__all__ = ["GROUPED", "Inner", "Plan", "Stage"]

GROUPED = (
    "the window is full with a group of group_by, whose items come from the source that now has to wait, or are lost. "
    "Do not group before a bounded stage; choose by item, as in call(client=lambda request: clients[request.model])"
)


class Plan(NamedTuple):
    """What a stage does, as `flat_map` was told."""

    mapper: Callable[[Any], Any]
    width: int | Callable[[], int]
    ordered: bool
    spare: int | None
    raising: bool
    parking: bool


class Stage(Demand):
    """One subscription of flat_map: the observer of its source, the demand on it, and a puller on the demand below."""

    __slots__ = (
        "_above",
        "_ask",
        "_busy",
        "_error",
        "_inner_carrier",
        "_mapper",
        "_next",
        "_outlet",
        "_pending",
        "_places",
        "_raising",
        "_refusing",
        "_running",
        "_source_done",
        "_upstream",
    )

    def __init__(self, plan: Plan, observer: Observer[Any], carrier: DemandScheduler) -> None:
        super().__init__(carrier.clock, carrier.flow)
        below = carrier.demand
        self._outlet: Outlet[Any] = Outlet(observer, carrier, self._after)
        self._mapper = plan.mapper
        self._raising = plan.raising
        self._ask = plan.width if callable(plan.width) else None
        self._places = Places(
            self._answer() if callable(plan.width) else plan.width,
            spare=(0 if below is None else below.ahead) if plan.spare is None else plan.spare,
            spares_window=plan.ordered and plan.spare is None,
            parking=plan.parking,
        )
        inside = _Inside(carrier.flow, self.halt, self.park)
        self._inner_carrier = DemandScheduler(carrier.clock, below, inside, carrier.allowance)
        self._pending: deque[Any] = deque()  # taken, not started: a source that does not wait
        self._running: set[Inner] = set()
        self._busy = False
        self._source_done = False
        self._error: Exception | None = None
        self._refusing = False  # a stage below has halted, or this one
        self._upstream: Disposable | None = None
        self._above: set[Stage] = set()  # those in the same run whose items come here
        self._next = self._stage_below(below)

    def connect(self, source: Observable[Any], carrier: DemandScheduler) -> None:
        """Subscribe the source with this stage's demand."""
        if self._next is not None:
            self._next.add_above(self)
        upstream = subscribe(source, self, carrier.with_demand(self))
        if self._source_done:
            upstream.dispose()
            return
        self._upstream = upstream
        self.flow.add_stage(self._cut, self)

    def _cut(self) -> None:
        self.on_completed()
        if self._upstream is not None:
            self._upstream.dispose()

    # the demand on the source

    def _answer(self) -> int:
        """Return the window that the user's function says.

        Raises:
            ConfigError: it says none.
        """
        window = 1 if self._ask is None else self._ask()
        if type(window) is not int or window < 1:
            check_number("window", window, least=1, integer=True)
        return window

    def room(self) -> int:
        """Return how many items can be started now."""
        places = self._places
        if self._ask is not None:
            places.set(self._answer())
        return min(places.in_progress - len(self._running), places.started - self._load()) - len(self._pending)

    @property
    def ahead(self) -> int:
        """Return the window: as many finished items the stage above may keep ready."""
        return self._places.window

    def _load(self) -> int:
        """Return how many items are started and not passed on."""
        return len(self._running) + len(self._outlet.held)

    # the observer of the source

    def on_next(self, item: Any) -> None:
        """Start the stream of `item`, or keep the item until there is a place."""
        if self._source_done:
            return
        self.arrived += 1
        pending = self._pending
        pending.append(item)
        if not self._busy:
            self._refill()
        if pending:
            self._check_undemanded(pending[-1])
        elif isinstance(item, GroupedObservable) and self.room() <= 0:
            self._fail(ConfigError(GROUPED))  # it would wait for items of a source that waits for it

    def on_error(self, error: Exception) -> None:
        """End with `error` once everything in progress is delivered."""
        if not self._source_done:
            self._error = self._error or error
            self._end_of_source()

    def on_completed(self) -> None:
        """End once everything in progress is delivered."""
        if not self._source_done:
            self._end_of_source()

    def _end_of_source(self) -> None:
        self._source_done = True
        self.flow.remove_stage(self._cut)
        if not self._busy:
            self._complete_if_done()

    def _check_undemanded(self, item: Any) -> None:
        if isinstance(item, GroupedObservable):
            self._fail(ConfigError(GROUPED))
        elif len(self._pending) > UNDEMANDED:
            self._fail(undemanded())

    # the inner streams

    def _refill(self) -> None:
        places = self._places
        if self._ask is not None:
            places.set(self._answer())
        pending = self._pending
        running = self._running
        self._busy = True
        try:
            while (
                pending
                and len(running) < places.in_progress
                and self._load() < places.started
                and not self._outlet.stopped
            ):
                self._begin(pending.popleft())
        finally:
            self._busy = False
        if self._source_done:
            self._complete_if_done()
        elif self.waiting:
            self.wake()

    def _begin(self, item: Any) -> None:
        inner = self._new_inner(item)
        self._running.add(inner)
        try:
            stream = self._mapper(item)
        except Exception as error:
            inner.on_error(error)
            return
        if inner.stage is None:
            discard(stream)  # the mapper ended the run
            return
        subscription = subscribe_inner(stream, inner, self._carrier_of(inner), "mapper")
        if inner.stage is not None:
            inner.subscription = subscription
            return
        subscription.dispose()  # it ended, or was disposed, before it was subscribed

    def park(self) -> Callable[[], None]:
        """Learn that an item waits for long; return what is to be called once when it goes on, or ends."""
        self._places.park()
        self._after()
        return self._places.unpark

    def _new_inner(self, item: Any) -> Inner:
        return Inner(self, item)

    def _carrier_of(self, _inner: Inner) -> DemandScheduler:
        """Return what an inner stream is subscribed with: the demand of the consumer below."""
        return self._inner_carrier

    def emit(self, _inner: Inner, value: Any) -> None:
        """Emit what an inner stream emitted."""
        self._outlet.push(value)

    def failed(self, inner: Inner, error: Exception) -> None:
        """Fail one item: as a value, unless the caller wants the stream to end."""
        if self._raising:
            allowance = self._inner_carrier.allowance
            if allowance is not None and allowance.has_refused(error):
                self.ended(inner)  # it was not asked, which is no failure; what is on the wire ends as it does
            else:
                self._fail(error)
            return
        if getattr(error, "halts", False) is True:
            self.halt(error)
        self.emit(inner, failure(inner.item, error))
        self.ended(inner)

    def ended(self, inner: Inner) -> None:
        """Free the place of a finished inner stream."""
        self._running.discard(inner)
        self._after()

    def _after(self) -> None:
        if self._busy or self._outlet.stopped:
            return
        if self._pending:
            self._refill()
        elif self._source_done:
            self._complete_if_done()
        if self.waiting:
            self.wake()

    # the ends

    def halt(self, error: Exception) -> None:
        """Pull nothing more, start nothing more, and end with `error` once what is in progress is delivered."""
        if self._raising:
            self._fail(error)
        elif self._error is None and not self._refusing:
            self._error = error
            self.stop(error)

    def stop(self, error: Exception) -> None:
        """Pull and start nothing more, here and in the stages above: what is in progress there still comes here."""
        if not self._raising:
            self.refuse(error)
        for stage in list(self._above):
            stage.stop(error)
        if not self._above:
            self._cut()

    def refuse(self, error: Exception) -> None:
        """Start nothing more; what waits for a place, or still comes from above, fails in its turn."""
        self._refusing = True
        self._mapper = raising(error)

    def _stage_below(self, demand: Demand | None) -> Stage | None:
        """Return the stage that the items of this one come to, if a halt of it is one of this stage too."""
        while demand is not None and not isinstance(demand, Stage):
            demand = demand.below
        return demand if demand is not None and demand.flow is self.flow else None  # an inner stream goes on

    def add_above(self, stage: Stage) -> None:
        """Learn that the items of `stage` come here."""
        self._above.add(stage)
        if self._error is not None:  # what is between repeats, or goes on with another stream
            stage.refuse(self._error)
            self.clock.call_soon(partial(stage.stop, self._error))

    def remove_above(self, stage: Stage) -> None:
        """Learn that nothing more comes of `stage`."""
        self._above.discard(stage)
        if self._error is not None and not self._above and not self._source_done:
            self._cut()  # what is between may have another source

    def _complete_if_done(self) -> None:
        if not self._pending and not self._running:
            self._outlet.end(self._error)

    def _fail(self, error: Exception) -> None:
        if not self._outlet.stopped:
            self._release()
            self._outlet.fail(error)

    def dispose(self) -> None:
        """Cancel the source and everything in progress."""
        self._outlet.dispose()
        self._release()

    def _release(self) -> None:
        self._source_done = True
        if self._next is not None:
            self._next.remove_above(self)
        self._ask = None
        self._places.set(0)  # no room any more: a source that is released in a later turn has one more to pull in
        self.flow.remove_stage(self._cut)
        if self._upstream is not None:
            self._upstream.dispose()
            self._upstream = None
        for inner in list(self._running):
            inner.dispose()
        self._running.clear()
        self._pending.clear()


class Inner:
    """The observer of one inner stream; it knows its item, so identity travels with it."""

    __slots__ = ("item", "stage", "subscription")

    def __init__(self, stage: Stage, item: Any) -> None:
        self.stage: Stage | None = stage
        self.item = item
        self.subscription: Disposable | None = None

    def on_next(self, value: Any) -> None:
        if self.stage is not None:
            self.stage.emit(self, value)

    def on_error(self, error: Exception) -> None:
        stage = self.stage
        if stage is not None:
            self.stage = self.subscription = None
            stage.failed(self, error)
            self.item = None

    def on_completed(self) -> None:
        stage = self.stage
        if stage is not None:
            self.stage = self.subscription = self.item = None  # no cycle is left that would keep the item
            stage.ended(self)

    def dispose(self) -> None:
        self.stage = None
        if self.subscription is not None:
            self.subscription.dispose()


class _Inside(StageFlow):
    """The flow of a stage's inner streams, where one that waits for long can say so."""

    __slots__ = ("park",)

    def __init__(self, outer: Flow, halt: Callable[[Exception], None], park: Callable[[], Callable[[], None]]) -> None:
        super().__init__(outer, halt)
        self.park = park

    def inner(self) -> _Inside:
        """Return the flow of inner streams of inner streams, which belong to the same stage."""
        return _Inside(self, self.halt, self.park)
