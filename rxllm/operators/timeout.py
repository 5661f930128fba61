"""End a stream that is silent for too long."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

from rxllm.errors import ConfigError, TimeoutError, check_number
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable

    from reactivex import Observable

    from rxllm.clock import Handle
    from rxllm.demand import DemandScheduler, Disposable, Observer
    from rxllm.errors import Phase

__all__ = ["timeout"]

T = TypeVar("T")


def timeout(
    total: float | None = None, *, first: float | None = None, idle: float | None = None
) -> Callable[[Observable[T]], Observable[T]]:
    """End a stream with a `TimeoutError` when it takes too long: to its first item, between items, or in all.

        source            --a--b-----------c
        timeout(idle=4)   --a--b----#

    Emits: what the source emits.
    Holds: nothing.
    Errors: `TimeoutError` with `phase` "first_byte", "idle" or "total"; it is transient.
    Completes: with the source.
    Dispose: cancels the source and the timer.

    The clock of `idle` stands still while the consumer has no room: that silence is not the source's.

    Args:
        total: seconds from the subscription to the end, > 0.
        first: seconds from the subscription to the first item, > 0.
        idle: seconds from one item to the next, or to the end, > 0.

    Raises:
        ConfigError: an argument out of range, or none at all.
    """
    for name, value in (("total", total), ("first", first), ("idle", idle)):
        check_number(name, value, above=0, optional=True)
    if total is None and first is None and idle is None:
        msg = "timeout needs at least one of total, first and idle"
        raise ConfigError(msg)

    def apply(source: Observable[T]) -> Observable[T]:
        return _Timeout(source, total, first, idle)

    return apply


class _Timeout(Stream[T]):
    def __init__(self, source: Observable[T], total: float | None, first: float | None, idle: float | None) -> None:
        self.source = source
        self.limits = (total, first, idle)  # not by name: `first` is an operator of every Observable

    def _start(self, observer: Observer[T], carrier: DemandScheduler) -> Disposable:
        watch = _Watch(self, observer, carrier)
        return connected(watch, watch.connect, self.source)


class _Watch:
    """One subscription of timeout. One timer, re-armed when it fires too early instead of at every item."""

    __slots__ = (
        "_carrier",
        "_due",
        "_end",
        "_idle",
        "_observer",
        "_phase",
        "_stopped",
        "_timer",
        "_until",
        "_upstream",
        "_waits",
    )

    def __init__(self, operator: _Timeout[Any], observer: Observer[Any], carrier: DemandScheduler) -> None:
        now = carrier.clock.seconds()
        total, first, idle = operator.limits
        self._observer = observer
        self._carrier = carrier
        self._idle = idle
        self._end = None if total is None else now + total
        self._phase: Phase = "first_byte" if first is not None else "idle"
        first = idle if first is None else first
        self._until = None if first is None else now + first
        self._due = 0.0  # when the timer fires
        self._waits = False  # for room, with the clock of idle standing still
        self._stopped = False
        self._timer: Handle | None = None
        self._upstream: Disposable | None = None

    def connect(self, source: Observable[Any]) -> None:
        if self._phase == "idle":
            self._await_item()
        self._arm()
        upstream = subscribe(source, self, self._carrier)
        if self._stopped:
            upstream.dispose()
        else:
            self._upstream = upstream

    def _arm(self) -> None:
        due = [at for at in (self._end, self._until) if at is not None]
        if due:
            self._due = min(due)
            self._timer = self._carrier.call_later(max(0.0, self._due - self._carrier.clock.seconds()), self._fire)

    def _fire(self) -> None:
        self._timer = None
        now = self._carrier.clock.seconds()
        if self._end is not None and now >= self._end:
            self._expire("total")
        elif self._until is not None and now >= self._until:
            if self._phase == "idle":
                self._await_item()  # there may be no room any more
            if self._waits:
                self._arm()
            else:
                self._expire(self._phase)
        else:
            self._arm()

    def _expire(self, phase: Phase) -> None:
        self.dispose()
        self._observer.on_error(TimeoutError(f"nothing came in time ({phase})", phase=phase))

    def on_next(self, value: Any) -> None:
        if self._stopped:
            return
        self._phase = "idle"
        self._observer.on_next(value)
        if not self._stopped:
            self._await_item()
            self._rearm()

    def _await_item(self) -> None:
        """Start the clock of idle, or have it started when there is room."""
        if self._idle is None:
            self._until = None
            return
        demand = self._carrier.demand
        if demand is None or demand.room() > 0:
            self._until = self._carrier.clock.seconds() + self._idle
            return
        self._until = None
        if not self._waits:
            self._waits = True
            demand.wait(self)

    def pull(self, _n: int) -> int:
        """Start the clock of idle: there is room."""
        self._waits = False
        if not self._stopped:
            self._await_item()
            self._rearm()
        return 0

    def _rearm(self) -> None:
        if self._timer is None or (self._until is not None and self._until < self._due):
            self._cancel()
            self._arm()

    def on_error(self, error: Exception) -> None:
        if not self._stopped:
            self._finish()
            self._observer.on_error(error)

    def on_completed(self) -> None:
        if not self._stopped:
            self._finish()
            self._observer.on_completed()

    def _finish(self) -> None:
        self._stopped = True
        self._cancel()
        if self._waits and self._carrier.demand is not None:
            self._carrier.demand.leave(self)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def dispose(self) -> None:
        self._finish()
        if self._upstream is not None:
            self._upstream.dispose()
            self._upstream = None
