"""A stage that emits in the order of its source."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

from rxllm.demand import Demand
from rxllm.operators._stage import Inner, Stage

if TYPE_CHECKING:
    from rxllm.demand import DemandScheduler, Observer, Puller
    from rxllm.operators._stage import Plan

__all__ = ["OrderedStage"]

KEPT = 16  # items that an inner stream may emit before its turn, if it waits for demand


class OrderedStage(Stage):
    """Emits item by item: only the oldest passes on, those after it keep what they have."""

    __slots__ = ("_flushing", "_order")

    def __init__(self, plan: Plan, observer: Observer[Any], carrier: DemandScheduler) -> None:
        super().__init__(plan, observer, carrier)
        self._order: deque[_KeepingInner] = deque()
        self._flushing = False  # an item that ends while another is flushed waits for the loop that runs

    def _load(self) -> int:
        return len(self._order) + len(self._outlet.held)

    def _new_inner(self, item: Any) -> Inner:
        inner = _KeepingInner(self, item)
        self._order.append(inner)
        return inner

    def _carrier_of(self, inner: Inner) -> DemandScheduler:
        assert isinstance(inner, _KeepingInner)  # noqa: S101  for the type checkers
        return self._inner_carrier.with_demand(_OrderedDemand(self, inner))

    def is_oldest(self, inner: Inner) -> bool:
        """Say whether it is the turn of `inner` to emit."""
        return bool(self._order) and self._order[0] is inner

    def emit(self, inner: Inner, value: Any) -> None:
        assert isinstance(inner, _KeepingInner)  # noqa: S101  for the type checkers
        if inner is self._order[0] and not inner.kept:
            super().emit(inner, value)
        else:
            inner.kept.append(value)

    def ended(self, inner: Inner) -> None:
        self._running.discard(inner)
        if not self._flushing:
            self._flushing = True
            try:
                self._flush()
            finally:
                self._flushing = False
        self._after()

    def _complete_if_done(self) -> None:
        if not self._order:  # the source may end inside of an emission, while others are still to be flushed
            super()._complete_if_done()

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


class _KeepingInner(Inner):
    """An inner stream whose turn to emit may come later."""

    __slots__ = ("demand", "kept")

    def __init__(self, stage: Stage, item: Any) -> None:
        super().__init__(stage, item)
        self.demand: _OrderedDemand | None = None
        self.kept: deque[Any] = deque()


class _OrderedDemand(Demand):
    """The demand of one inner stream: a few items before its turn, then what the consumer has room for."""

    __slots__ = ("_inner", "_stage")

    def __init__(self, stage: OrderedStage, inner: _KeepingInner) -> None:
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
