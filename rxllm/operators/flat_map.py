"""Map each item to a stream of its own and run at most `window` of them at a time."""

from __future__ import annotations

from collections import deque
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NoReturn, TypeVar, cast, overload

from reactivex.observable.groupedobservable import GroupedObservable

from rxllm.demand import UNDEMANDED, Demand, DemandScheduler, Outlet, undemanded
from rxllm.errors import ConfigError, check_callable, check_choice, check_number
from rxllm.messages import Outcome, Request
from rxllm.operators._inner import discard, subscribe_inner
from rxllm.operators.to_outcome import StageFlow
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from reactivex import Observable

    from rxllm.demand import Disposable, Observer, Puller

__all__ = ["flat_map"]

A = TypeVar("A")
B = TypeVar("B")
OnFailure = Literal["emit", "raise"]

KEPT = 16  # items that an inner stream of an ordered stage may emit before its turn, if it waits for demand

GROUPED = (
    "the window is full with a group of group_by, whose items come from the source that now has to wait, or are lost. "
    "Do not group before a bounded stage; choose by item, as in call(client=lambda request: clients[request.model])"
)


@overload
def flat_map(
    mapper: Callable[[A], Observable[B] | Awaitable[B]],
    *,
    window: int | Callable[[], int],
    ordered: bool = False,
    buffer: int | None = None,
    on_failure: Literal["raise"],
) -> Callable[[Observable[A]], Observable[B]]: ...
@overload
def flat_map(
    mapper: Callable[[A], Observable[B] | Awaitable[B]],
    *,
    window: int | Callable[[], int],
    ordered: bool = False,
    buffer: int | None = None,
    on_failure: Literal["emit"] = "emit",
) -> Callable[[Observable[A]], Observable[B | Outcome[Any]]]: ...
def flat_map(
    mapper: Callable[[A], Observable[B] | Awaitable[B]],
    *,
    window: int | Callable[[], int],
    ordered: bool = False,
    buffer: int | None = None,
    on_failure: OnFailure = "emit",
) -> Callable[[Observable[A]], Observable[Any]]:
    """Map each item to a stream of its own and run at most `window` of them at a time; pull only what can be started.

        source                  a--b--c------|
        a, b, c                 -----A|  --B|  -C|
        flat_map(f, window=2)   -----(AB)-C--|          as they complete
          … ordered=True        -----(AB)-C--|          in the order of the source

    Emits: what the inner streams emit, as they do; with `ordered` item by item. An inner stream that fails, or a mapper
        that raises, fails that item only: a failed `Outcome` with the item in its request (`on_failure="raise"` ends
        the stream).
    Holds: at most `window` items in progress and `buffer` finished ones that the consumer has no room for, whatever the
        source.
    Errors: a failed source ends the stream with its error after what is in progress is delivered. So does an inner
        stream whose error `halts`: nothing more is pulled, by the stages above neither, and what waits for a place, or
        still comes from there, fails with the same error.
    Completes: when the source has completed and nothing is in progress or held.
    Dispose: cancels the source and everything in progress.

    Args:
        mapper: item -> Observable or awaitable of what becomes of it. Called once an item.
        window: items in progress at a time, >= 1; or a function that is asked how many now, before items are started.
        ordered: emit in the order of the source; a slow item holds back those after it.
        buffer: finished items to keep ready for the consumer, >= 0. None: the window of the next stage (0 before a
            sink, which has a queue of its own), and with `ordered` at least this window.
        on_failure: "emit" or "raise".

    Raises:
        ConfigError: an argument out of range; in the stream: a source that emits more than 1,024 items without demand,
            a grouped observable that cannot be started at once (its items would be lost).

    Example:
        >>> import rxllm, reactivex as rx
        >>> doubled = rxllm.from_iterable([1, 2, 3]).pipe(flat_map(lambda n: rx.of(2 * n), window=2))
        >>> rxllm.collect(doubled)
        [2, 4, 6]
    """
    check_callable("mapper", mapper)
    if not callable(window):
        check_number("window", window, least=1, integer=True)
    check_number("buffer", buffer, least=0, integer=True, optional=True)
    check_choice("on_failure", on_failure, ("emit", "raise"))

    def apply(source: Observable[A]) -> Observable[Any]:
        return _FlatMap(source, mapper, width=window, ordered=ordered, spare=buffer, raising=on_failure == "raise")

    return apply


class _FlatMap(Stream[Any]):
    def __init__(
        self,
        source: Observable[Any],
        mapper: Callable[[Any], Any],
        *,
        width: int | Callable[[], int],
        ordered: bool,
        spare: int | None,
        raising: bool,
    ) -> None:
        self.source = source
        self.mapper = mapper
        self.width = width  # not `window`: that is an operator of every Observable
        self.ordered = ordered
        self.spare = spare  # not `buffer`, for the same reason
        self.raising = raising

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        stage = (_OrderedStage if self.ordered else _Stage)(self, observer, carrier)
        return connected(stage, stage.connect, carrier)


class _Stage(Demand):
    """One subscription of flat_map: the observer of its source, the demand on it, and a puller on the demand below."""

    __slots__ = (
        "_above",
        "_ask",
        "_busy",
        "_error",
        "_inner_carrier",
        "_limit",
        "_mapper",
        "_next",
        "_outlet",
        "_pending",
        "_raising",
        "_refusing",
        "_running",
        "_source",
        "_source_done",
        "_spare",
        "_spares_window",
        "_upstream",
        "_window",
    )

    def __init__(self, operator: _FlatMap, observer: Observer[Any], carrier: DemandScheduler) -> None:
        super().__init__(carrier.clock, carrier.flow)
        below = carrier.demand
        self._outlet: Outlet[Any] = Outlet(observer, carrier, self._after)
        self._source = operator.source
        self._mapper = operator.mapper
        self._raising = operator.raising
        self._spare = (below.ahead if below is not None else 0) if operator.spare is None else operator.spare
        self._spares_window = operator.ordered and operator.spare is None
        width = operator.width
        self._ask = width if callable(width) else None
        self._set_window(self._answer() if callable(width) else width)
        self._inner_carrier = DemandScheduler(carrier.clock, below, StageFlow(carrier.flow, self.halt))
        self._pending: deque[Any] = deque()  # taken, not started: a source that does not wait
        self._running: set[_Inner] = set()
        self._busy = False
        self._source_done = False
        self._error: Exception | None = None
        self._refusing = False  # a stage below has halted, or this one
        self._upstream: Disposable | None = None
        self._above: set[_Stage] = set()  # those in the same run whose items come here
        self._next = self._stage_below(below)

    def connect(self, carrier: DemandScheduler) -> None:
        """Subscribe the source with this stage's demand."""
        if self._next is not None:
            self._next.add_above(self)
        upstream = subscribe(self._source, self, carrier.with_demand(self))
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

    def _set_window(self, window: int) -> None:
        self._window = window
        self._limit = window + (max(self._spare, window) if self._spares_window else self._spare)

    def room(self) -> int:
        """Return how many items can be started now."""
        if self._ask is not None:
            self._set_window(self._answer())
        return min(self._window - len(self._running), self._limit - self._load()) - len(self._pending)

    @property
    def ahead(self) -> int:
        """Return the window: as many finished items the stage above may keep ready."""
        return self._window

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
        if self._ask is not None:
            self._set_window(self._answer())
        pending = self._pending
        running = self._running
        self._busy = True
        try:
            while pending and len(running) < self._window and self._load() < self._limit and not self._outlet.stopped:
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

    def _new_inner(self, item: Any) -> _Inner:
        return _Inner(self, item)

    def _carrier_of(self, _inner: _Inner) -> DemandScheduler:
        """Return what an inner stream is subscribed with: the demand of the consumer below."""
        return self._inner_carrier

    def emit(self, _inner: _Inner, value: Any) -> None:
        """Emit what an inner stream emitted."""
        self._outlet.push(value)

    def failed(self, inner: _Inner, error: Exception) -> None:
        """Fail one item: as a value, unless the caller wants the stream to end."""
        if self._raising:
            self._fail(error)
            return
        if getattr(error, "halts", False) is True:
            self.halt(error)
        self.emit(inner, failure(inner.item, error))
        self.ended(inner)

    def ended(self, inner: _Inner) -> None:
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

    def _stage_below(self, demand: Demand | None) -> _Stage | None:
        """Return the stage that the items of this one come to, if a halt of it is one of this stage too."""
        while demand is not None and not isinstance(demand, _Stage):
            demand = demand.below
        return demand if demand is not None and demand.flow is self.flow else None  # an inner stream goes on

    def add_above(self, stage: _Stage) -> None:
        """Learn that the items of `stage` come here."""
        self._above.add(stage)
        if self._error is not None:  # what is between repeats, or goes on with another stream
            stage.refuse(self._error)
            self.clock.call_soon(partial(stage.stop, self._error))

    def remove_above(self, stage: _Stage) -> None:
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
        self._window = 0  # no room any more: a source that is released in a later turn has one more to pull in
        self.flow.remove_stage(self._cut)
        if self._upstream is not None:
            self._upstream.dispose()
            self._upstream = None
        for inner in list(self._running):
            inner.dispose()
        self._running.clear()
        self._pending.clear()


class _OrderedStage(_Stage):
    """Emits item by item: only the oldest passes on, those after it keep what they have."""

    __slots__ = ("_flushing", "_order")

    def __init__(self, operator: _FlatMap, observer: Observer[Any], carrier: DemandScheduler) -> None:
        super().__init__(operator, observer, carrier)
        self._order: deque[_KeepingInner] = deque()
        self._flushing = False  # an item that ends while another is flushed waits for the loop that runs

    def _load(self) -> int:
        return len(self._order) + len(self._outlet.held)

    def _new_inner(self, item: Any) -> _Inner:
        inner = _KeepingInner(self, item)
        self._order.append(inner)
        return inner

    def _carrier_of(self, inner: _Inner) -> DemandScheduler:
        assert isinstance(inner, _KeepingInner)  # noqa: S101  for the type checkers
        return self._inner_carrier.with_demand(_OrderedDemand(self, inner))

    def is_oldest(self, inner: _Inner) -> bool:
        """Say whether it is the turn of `inner` to emit."""
        return bool(self._order) and self._order[0] is inner

    def emit(self, inner: _Inner, value: Any) -> None:
        assert isinstance(inner, _KeepingInner)  # noqa: S101  for the type checkers
        if inner is self._order[0] and not inner.kept:
            super().emit(inner, value)
        else:
            inner.kept.append(value)

    def ended(self, inner: _Inner) -> None:
        self._running.discard(inner)
        if not self._flushing:
            self._flushing = True
            try:
                self._flush()
            finally:
                self._flushing = False
        self._after()

    def _flush(self) -> None:
        """Emit what the oldest kept; go on to the next while the oldest has ended."""
        order = self._order
        while order:
            head = order[0]
            while head.kept:
                super().emit(head, head.kept.popleft())
            if not order:
                return  # disposed on the way
            if head in self._running:
                if head.demand is not None:
                    head.demand.its_turn()
                return
            order.popleft()

    def _release(self) -> None:
        super()._release()
        self._order.clear()


class _Inner:
    """The observer of one inner stream; it knows its item, so identity travels with it."""

    __slots__ = ("item", "stage", "subscription")

    def __init__(self, stage: _Stage, item: Any) -> None:
        self.stage: _Stage | None = stage
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


class _KeepingInner(_Inner):
    """An inner stream whose turn to emit may come later."""

    __slots__ = ("demand", "kept")

    def __init__(self, stage: _Stage, item: Any) -> None:
        super().__init__(stage, item)
        self.demand: _OrderedDemand | None = None
        self.kept: deque[Any] = deque()


class _OrderedDemand(Demand):
    """The demand of one inner stream: a few items before its turn, then what the consumer has room for."""

    __slots__ = ("_inner", "_stage")

    def __init__(self, stage: _OrderedStage, inner: _KeepingInner) -> None:
        super().__init__(stage.clock, stage.flow)
        self._stage = stage
        self._inner = inner
        inner.demand = self

    def room(self) -> int:
        """Return how many more items may be kept, or the consumer's room when the turn has come."""
        if self.below is not None and self._stage.is_oldest(self._inner):
            return self.below.room()
        return KEPT - len(self._inner.kept)

    def wait(self, puller: Puller) -> None:
        """Offer `puller` room: that of the consumer when the turn has come."""
        if self.below is not None and self._stage.is_oldest(self._inner):
            self.below.wait(puller)
        else:
            super().wait(puller)

    def leave(self, puller: Puller) -> None:
        """Offer `puller` nothing more, here or below."""
        super().leave(puller)
        if self.below is not None:
            self.below.leave(puller)

    def its_turn(self) -> None:
        """Let those who wait here wait for the consumer."""
        waiting, self.waiting = self.waiting, deque()
        for puller in waiting:
            self.wait(puller)


def raising(error: Exception) -> Callable[[Any], NoReturn]:
    """Return what stands in the place of a user's function after `error` has halted a stage."""

    def refuse(_item: Any) -> NoReturn:
        raise error

    return refuse


def failure(item: Any, error: Exception) -> Outcome[Any]:
    """Return the outcome of an item that failed; what is no request stands as the body of one.

    What has failed already, in a stage above, stays what it is.
    """
    if isinstance(item, Outcome) and item.error is not None:
        return cast("Outcome[Any]", item)
    request = item if isinstance(item, Request) else Request(body=item, operation="item")
    return Outcome(request=request, error=error.with_traceback(None))
