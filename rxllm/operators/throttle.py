"""Delay items until a quota has room for them; drop none."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from rxllm.demand import UNDEMANDED, Demand, undemanded
from rxllm.errors import CallError, ConfigError, check_callable, check_choice
from rxllm.gate import Gate, Lane, lane_of
from rxllm.operators._failure import failure, raising
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable

    from reactivex import Observable

    from rxllm.demand import DemandScheduler, Disposable, Observer
    from rxllm.gate import Lease, Waiter
    from rxllm.messages import Outcome
    from rxllm.policies.quota import Quota

__all__ = ["throttle"]

T = TypeVar("T")

AHEAD = 64  # items taken from the source before their time: enough that a fast quota does not wait for the source


@overload
def throttle(
    quota: Quota | str | Gate | Lane,
    *,
    cost: Callable[[T], float | Mapping[str, float]] | None = None,
    on_failure: Literal["raise"] = "raise",
) -> Callable[[Observable[T]], Observable[T]]: ...
@overload
def throttle(
    quota: Quota | str | Gate | Lane,
    *,
    cost: Callable[[T], float | Mapping[str, float]] | None = None,
    on_failure: Literal["emit"],
) -> Callable[[Observable[T]], Observable[T | Outcome[Any]]]: ...
def throttle(
    quota: Quota | str | Gate | Lane,
    *,
    cost: Callable[[T], float | Mapping[str, float]] | None = None,
    on_failure: Literal["emit", "raise"] = "raise",
) -> Callable[[Observable[T]], Observable[Any]]:
    """Delay items until `quota` has room for them: lossless, where Rx's `throttle_first` drops.

        source                abc---
        throttle("1/5 s")     a----b----c

    Emits: every item, in order, each when the quota admits it and the consumer has room.
    Holds: at most 64 items.
    Errors: those of the source, after what it holds; an item that costs more than the quota ever admits, in its turn:
        what it holds is dropped then. With `on_failure="emit"` such an item is a failed `Outcome` instead; an error
        that `halts` is one of each item it holds, nothing more is pulled, and then the stream ends with it.
    Completes: with the source, after what it holds.
    Dispose: cancels the source and leaves the queue.

    Args:
        quota: a `Quota`, a text such as "500/minute", or a `Gate` that others use too, or a lane of it. All
            subscriptions share it.
        cost: item -> amount, of each unit that is counted; or a mapping of units to amounts. None: one.
        on_failure: "raise" or "emit"; what follows must then take outcomes too, as `call` does.

    Raises:
        ConfigError: an argument of another kind.
    """
    lane = lane_of(quota if isinstance(quota, Gate | Lane) else Gate(quota))
    check_callable("cost", cost, optional=True)
    check_choice("on_failure", on_failure, ("emit", "raise"))

    def apply(source: Observable[T]) -> Observable[Any]:
        return _Throttle(source, lane, cost, raising=on_failure == "raise")

    return apply


class _Throttle(Stream[Any]):
    def __init__(
        self,
        source: Observable[Any],
        lane: Lane,
        cost: Callable[[Any], float | Mapping[str, float]] | None,
        *,
        raising: bool,
    ) -> None:
        self.source = source
        self.lane = lane
        self.cost = cost
        self.raising = raising

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        line = _Line(self, observer, carrier)
        return connected(line, line.connect, self.source, carrier)


class _Line(Demand):
    """One subscription of throttle: the demand on its source, its observer, an applicant at the gate, and a puller.

    It applies for the oldest item alone, and only while the consumer has room: what is admitted leaves at that instant.
    """

    __slots__ = (
        "_cost",
        "_done",
        "_error",
        "_gate",
        "_items",
        "_lane",
        "_left",
        "_observer",
        "_pulls",
        "_raising",
        "_stopped",
        "_upstream",
        "_waiter",
        "_working",
    )

    def __init__(self, operator: _Throttle, observer: Observer[Any], carrier: DemandScheduler) -> None:
        super().__init__(carrier.clock, carrier.flow)
        self._lane = operator.lane
        self._gate = operator.lane.gate
        self._cost = operator.cost
        self._raising = operator.raising
        self._observer = observer
        self._items: deque[Any] = deque()
        self._waiter: Waiter | None = None
        self._pulls = False  # waits for the consumer's room
        self._left: int | None = None  # how many more the consumer has asked for; None: it does not ask now
        self._working = False
        self._done = False  # the source
        self._error: Exception | None = None
        self._stopped = False
        self._upstream: Disposable | None = None

    def connect(self, source: Observable[Any], carrier: DemandScheduler) -> None:
        upstream = subscribe(source, self, carrier.with_demand(self))
        if self._done:
            upstream.dispose()
            return
        self._upstream = upstream
        self.flow.add_stage(self._cut, self)

    def _cut(self) -> None:
        self.on_completed()
        if self._upstream is not None:
            self._upstream.dispose()

    # the demand on the source, and its observer

    def room(self) -> int:
        """Return how many more items may wait here."""
        return 0 if self._done else AHEAD - len(self._items)

    def on_next(self, item: Any) -> None:
        if self._done:
            return
        self.arrived += 1
        self._items.append(item)
        if len(self._items) > UNDEMANDED:
            self._fail(undemanded())
        else:
            self._work()

    def on_error(self, error: Exception) -> None:
        if not self._done:
            self._error = error
            self.on_completed()

    def on_completed(self) -> None:
        if not self._done:
            self._done = True
            self.flow.remove_stage(self._cut)
            self._work()

    # the way out

    def _work(self) -> None:
        """Apply for the oldest item; go on in a loop while the gate admits at once."""
        if self._working or self._waiter is not None:
            return
        self._working = True
        try:
            while self._items and self._waiter is None and self._may_pass():
                self._apply(self._items[0])
        finally:
            self._working = False
        if self._stopped:
            return
        if self._done and not self._items:
            self._end(self._error)
        elif self.waiting:
            self.wake()

    def _may_pass(self) -> bool:
        """Say whether the consumer takes an item now; if not, be told when it does."""
        below = self.below
        if below is None:
            return True
        if self._left is None:
            if below.room() > 0 and (below.offering or not below.waiting):
                return True
        elif self._left > 0 and below.room() > 0:
            return True
        if not self._pulls:
            self._pulls = True
            below.wait(self)
        return False

    def pull(self, n: int) -> int:
        """Pass on at most `n` items now."""
        self._pulls = False
        self._left = n
        try:
            self._work()
            return n - self._left
        finally:
            self._left = None

    def _apply(self, item: Any) -> None:
        try:
            waiter = self._gate.apply(self.clock, self._gate.amounts(self._price(item)), self, None, self._lane)
        except Exception as error:  # a cost that never fits, a quota that is used up, a closed gate, or the user's own
            self._refused(error)
            return
        self._waiter = waiter
        self._gate.enter(waiter)

    def _price(self, item: Any) -> Mapping[str, float]:
        price: object = 1.0 if self._cost is None else self._cost(item)
        if isinstance(price, Mapping):
            return price  # pyright: ignore[reportUnknownVariableType]
        if isinstance(price, int | float):
            return dict.fromkeys(self._gate.units, price)
        msg = f"cost must return a number or a mapping of units to amounts, got {price!r}"
        raise ConfigError(msg)

    def admitted(self, lease: Lease) -> None:
        self._waiter = None
        if not self._may_pass():  # while this waited, the room went to another
            lease.settle("unsent")
            return
        lease.settle("answered")
        self._pass_on(self._items.popleft())
        self._work()

    def turned_away(self, error: CallError | ConfigError) -> None:
        self._waiter = None
        self._refused(error)
        self._work()

    def _refused(self, error: Exception) -> None:
        """Fail the oldest item: as a value, unless the caller wants the stream to end."""
        if self._raising:
            self._fail(error)
        elif getattr(error, "halts", False) is True and self._error is None:
            self._error = error
            self._cost = raising(error)  # it applies once more, and fails with those behind it, each in its turn
            self._cut()
        elif self._may_pass():  # else it applies once more when there is room
            self._pass_on(failure(self._items.popleft(), error))

    def _pass_on(self, value: Any) -> None:
        if self._left is not None:
            self._left -= 1
        try:
            self._observer.on_next(value)
        except BaseException as error:  # a callback of the consumer raised: nothing may stay behind it
            self.flow.fail(error)
            raise

    # the ends

    def _end(self, error: Exception | None) -> None:
        self._stopped = True
        if error is None:
            self._observer.on_completed()
        else:
            self._observer.on_error(error)

    def _fail(self, error: Exception) -> None:
        self.dispose()
        self._end(error)

    def dispose(self) -> None:
        self._stopped = True
        self._done = True
        self._items.clear()
        self.flow.remove_stage(self._cut)
        if self._pulls and self.below is not None:
            self._pulls = False
            self.below.leave(self)
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            waiter.cancel()
        if self._upstream is not None:
            self._upstream.dispose()
            self._upstream = None
