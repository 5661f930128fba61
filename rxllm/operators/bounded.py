"""Put a bound around an operator that has none."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

from reactivex import Observable

from rxllm.demand import UNDEMANDED, Demand, Outlet, undemanded
from rxllm.errors import ConfigError, check_callable, check_number
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable

    from reactivex import abc

    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["bounded"]

A = TypeVar("A")
B = TypeVar("B")


def bounded(n: int, inner: Callable[[Observable[A]], Observable[B]]) -> Callable[[Observable[A]], Observable[B]]:
    """Run a stock operator that is unbounded by nature with at most `n` items inside.

        source                    -a-b-c---------d
        bounded(2, delay(5))      ------a-b------c-d

    Emits: what `inner` emits.
    Holds: at most `n` items: what went in minus what was passed on. So `inner` should give one item for each that it
        takes; one that drops items uses the bound up (put filters outside), one that folds them needs `n` as large as a
        fold.
    Errors: those of `inner`, after what it emitted is passed on.
    Completes: with `inner`, after what it emitted is passed on.
    Dispose: cancels `inner`, and with it the source.

    Args:
        n: items inside, >= 1.
        inner: an operator, e.g. `ops.delay(1.0)`, `ops.concat_map(f)`.

    Raises:
        ConfigError: an argument out of range; in the stream: `inner` returned no observable.
    """
    check_number("n", n, least=1, integer=True)
    check_callable("inner", inner)

    def apply(source: Observable[A]) -> Observable[B]:
        return _Bounded(source, n, inner)

    return apply


class _Bounded(Stream[Any]):
    def __init__(self, source: Observable[Any], n: int, inner: Callable[[Observable[Any]], Observable[Any]]) -> None:
        self.source = source
        self.n = n
        self.inner = inner

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        count = _Count(self.n, observer, carrier)
        return connected(count, count.connect, self, carrier)


class _Count(Demand):
    """One subscription of bounded: the demand on its source, and the observer of the operator inside."""

    __slots__ = ("_n", "_outlet", "done", "inside", "upstream")

    def __init__(self, n: int, observer: Observer[Any], carrier: DemandScheduler) -> None:
        super().__init__(carrier.clock, carrier.flow)
        self._n = n
        self._outlet: Outlet[Any] = Outlet(observer, carrier, self.wake)
        self.inside = 0
        self.done = False
        self.upstream: Disposable | None = None

    def connect(self, operator: _Bounded, carrier: DemandScheduler) -> None:
        try:
            stream: object = operator.inner(_Intake(operator.source, self, carrier.with_demand(self)))
            if not isinstance(stream, Observable):
                msg = f"inner must return an Observable, got {type(stream).__name__}"
                raise ConfigError(msg)  # noqa: TRY301  it goes the way of what the operator itself raises
        except Exception as error:
            self.on_error(error)
            return
        upstream = subscribe(stream, self, carrier)
        if self.done:
            upstream.dispose()
        else:
            self.upstream = upstream

    def takes(self) -> bool:
        """Count an item that goes in; say no, and end, when too many came that nobody demanded."""
        self.arrived += 1
        self.inside += 1
        if self.inside + len(self._outlet.held) > self._n + UNDEMANDED:
            self.on_error(undemanded())
            self._release()
        return not self.done

    def room(self) -> int:
        """Return how many more items may go in."""
        return 0 if self.done else self._n - self.inside - len(self._outlet.held)

    def on_next(self, value: Any) -> None:
        """Take an item that came out."""
        if self.done:
            return
        if self.inside > 0:
            self.inside -= 1
        self._outlet.push(value)
        self.wake()

    def on_error(self, error: Exception) -> None:
        if not self.done:
            self.done = True
            self._outlet.end(error)

    def on_completed(self) -> None:
        if not self.done:
            self.done = True
            self._outlet.end()

    def dispose(self) -> None:
        self.done = True
        self._outlet.dispose()
        self._release()

    def _release(self) -> None:
        if self.upstream is not None:
            self.upstream.dispose()
            self.upstream = None


class _Intake(Stream[Any]):
    """The source as the operator inside sees it: its items are counted, its demand is the bound."""

    def __init__(self, source: Observable[Any], count: _Count, carrier: DemandScheduler) -> None:
        self.source = source
        self.counter = count  # not `count`: that is an operator of every Observable
        self.carrier = carrier

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:  # noqa: ARG002  the bound's own demand counts
        return subscribe(self.source, _Counting(observer, self.counter), self.carrier)

    def _subscribe_core(
        self,
        observer: abc.ObserverBase[Any],
        scheduler: abc.SchedulerBase | None = None,  # noqa: ARG002
    ) -> abc.DisposableBase:
        return cast("abc.DisposableBase", self._start(observer, self.carrier))


class _Counting:
    """Counts what goes in."""

    __slots__ = ("_count", "_observer", "on_completed", "on_error")

    def __init__(self, observer: Observer[Any], count: _Count) -> None:
        self._observer = observer
        self._count = count
        self.on_error = observer.on_error
        self.on_completed = observer.on_completed

    def on_next(self, value: Any) -> None:
        if self._count.takes():
            self._observer.on_next(value)
