"""What all sources that wait have in common: they are pulled, and emit only what there is room for.

consumer has room for n ──▶ pull(n): at most n items in this turn ──▶ no room: wait to be offered some
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from rxllm.demand import Demand
from rxllm.errors import ConfigError

if TYPE_CHECKING:
    from rxllm.clock import Clock
    from rxllm.demand import DemandScheduler, Observer

__all__ = ["Pump"]

T = TypeVar("T")

UNASKED = 10_000  # items that a source emits to a consumer that says nothing of its room, before it stops
TURN = 64  # of those, in one turn of the loop
SLICE = 0.01  # seconds that a source may keep the loop in one turn


class _Unasked(Demand):
    """The demand of a consumer that says nothing of its room: some items a turn, and a limit on them all."""

    __slots__ = ()

    def room(self) -> int:
        """Return one turn's worth."""
        return TURN


class Pump(Generic[T]):
    """One subscription of a source that waits: a puller on the consumer's demand.

    Subclasses give `_take`: the next item; they raise `StopIteration` at the end and `BlockingIOError` when there is
        none yet. Those that can know the end without taking an item say it in `_is_over`.
    """

    __slots__ = ("_demand", "_flow", "_in_turn", "_left", "_observer", "_stopped", "clock")

    def __init__(self, observer: Observer[T], carrier: DemandScheduler, *, unbounded: bool) -> None:
        self._observer = observer
        self._flow = carrier.flow
        self.clock: Clock = carrier.clock
        self._left = -1  # how many items may still be emitted undemanded; -1: no limit
        if carrier.demand is None:
            self._demand: Demand = _Unasked(carrier.clock, carrier.flow)
            if not unbounded:
                self._left = UNASKED
        else:
            self._demand = carrier.demand
        self._stopped = False
        self._in_turn = False

    def begin(self) -> None:
        """Wait for room; from here on the run can tell this source to stop."""
        self._flow.add_source(self.finish, self._demand)
        if not self._stopped:
            self._demand.wait(self)

    def _take(self) -> T:
        raise NotImplementedError

    def _is_over(self) -> bool:
        return False

    def _close(self) -> None:
        raise NotImplementedError

    def pull(self, n: int) -> int:
        """Emit at most `n` items; fewer when they take long. 0: end, if nothing more comes."""
        if n == 0 and self._is_over():
            self.finish()
        return self._emit(n)

    def _emit(self, n: int) -> int:
        if self._in_turn or self._stopped:
            return 0
        clock = self.clock
        until = clock.seconds() + SLICE
        sent = 0
        self._in_turn = True
        try:
            while sent < n and not self._stopped:
                try:
                    item = self._take()
                except StopIteration:
                    self.finish()
                    return sent
                except BlockingIOError:
                    return sent  # whoever brings the next item waits for room again
                except Exception as error:
                    self.finish(error)
                    return sent
                if self._left >= 0 and not self._count():
                    return sent
                sent += 1
                self._flow.pulled += 1
                self._observer.on_next(item)
                if clock.seconds() >= until:
                    break
        finally:
            self._in_turn = False
            if self._stopped:
                self._close()
        if not self._stopped:
            self._demand.wait(self)
        return sent

    def _count(self) -> bool:
        """Count an item that nobody asked for; end the stream at the limit."""
        if self._left == 0:
            self.finish(
                ConfigError(
                    f"{UNASKED:,} items were emitted to a consumer that says nothing of its room, so an endless source "
                    "would fill the memory: consume through rxllm.iterate, aiterate, collect or a stage such as "
                    "flat_map, or say unbounded=True"
                )
            )
            return False
        self._left -= 1
        return True

    def finish(self, error: Exception | None = None) -> None:
        """End the stream; nothing is emitted any more."""
        if self._stopped:
            return
        self.dispose()
        if error is None:
            self._observer.on_completed()
        else:
            self._observer.on_error(error)

    def dispose(self) -> None:
        """Stop, and close what is read."""
        if self._stopped:
            return
        self._stopped = True
        self._flow.remove_source(self.finish)
        self._demand.leave(self)
        if not self._in_turn:
            self._close()  # else the turn does: a generator cannot be closed from inside itself
