"""The base of all observables of ours, and how a pipeline of them begins.

Streams of ours subscribe each other directly: no lock, no trampoline, no auto-detaching observer for each item. Whoever
else subscribes one enters through a root, which finds the loop and guards the end.
"""

from __future__ import annotations

import threading
from functools import cached_property
from typing import TYPE_CHECKING, Generic, NoReturn, ParamSpec, TypeVar, cast

from reactivex import Observable, abc

from rxllm import runtime
from rxllm.clock import Clock, clock_of
from rxllm.demand import NOTHING, DemandScheduler, Disposable, Flow, Observer
from rxllm.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Stream", "connected", "subscribe"]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)
P = ParamSpec("P")
R = TypeVar("R", bound=Disposable)


class Stream(Observable[T_co], Generic[T_co]):
    """Base of all observables of ours: subscribed directly among themselves, publicly by all others.

    Subclasses implement `_start(observer, carrier)`: it may emit before it returns, emits nothing after a terminal or a
    dispose, and releases what it holds at its own terminal. `carrier` always has a clock; its demand is None below the
    last stage.
    """

    _subscribe = None  # what `Observable.__init__` would set; an instance lock is made only for those who ask

    def __init__(self) -> None:  # pyright: ignore[reportMissingSuperCall]  10 µs for an RLock and a chain of mixins
        pass

    def __iter__(self) -> NoReturn:
        """Refuse: through the `[n]` of an Observable, a `for` loop would get slices of the stream for ever."""
        msg = "a stream is not iterable: for item in rxllm.iterate(stream), or rxllm.collect(stream)"
        raise ConfigError(msg)

    @cached_property
    def lock(self) -> threading.RLock:  # type: ignore[override]
        """The lock that stock operators synchronise on."""
        return threading.RLock()

    if not TYPE_CHECKING:  # the types are those of the stock method, overloads and all

        def pipe(self, *operators):  # noqa: ANN002, ANN201
            """Apply operators from left to right: mappers do it once an item; the stock method costs 1.5 µs more."""
            stream = self
            for operator in operators:
                stream = operator(stream)
            return stream

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

    What a foreign stream emits on another thread is moved to the loop. A stream that cannot start fails with what it
    raised.

    Raises:
        BaseException: what a callback of the consumer raised meanwhile, also when a foreign stream has swallowed it.
    """
    flow = carrier.flow
    start = getattr(source, "_start", None)  # isinstance would ask an ABC: five times as slow
    if start is not None:
        try:
            disposable: Disposable = start(observer, carrier)
            return disposable
        except Exception as error:
            if flow.failed is not None:
                raise
            observer.on_error(error)
            return NOTHING
    if carrier.clock.threads:
        crossing = _OnLoop(observer, carrier.clock)
        crossing.upstream = source.subscribe(cast("abc.ObserverBase[T]", crossing), scheduler=carrier)
        subscription: Disposable = crossing
    else:
        subscription = source.subscribe(cast("abc.ObserverBase[T]", observer), scheduler=carrier)
    if flow.failed is not None:
        subscription.dispose()
        raise flow.failed
    return subscription


def connected(run: R, connect: Callable[P, object], *args: P.args, **kwargs: P.kwargs) -> R:
    """Call `connect` and return `run`, the subscription it belongs to; what is raised on the way releases it first."""
    try:
        connect(*args, **kwargs)
    except BaseException:
        run.dispose()
        raise
    return run


class _OnLoop(Generic[T]):
    """The observer of a foreign stream, which may emit from any thread; and its subscription.

    So what is on its way to the loop when it is disposed is not delivered.
    """

    __slots__ = ("_clock", "_observer", "_stopped", "upstream")

    def __init__(self, observer: Observer[T], clock: Clock) -> None:
        self._observer = observer
        self._clock = clock
        self._stopped = False
        self.upstream: Disposable = NOTHING

    def on_next(self, value: T) -> None:
        if not self._clock.is_here():
            self._clock.post(lambda: self.on_next(value))
        elif not self._stopped:
            self._observer.on_next(value)

    def on_error(self, error: Exception) -> None:
        if not self._clock.is_here():
            self._clock.post(lambda: self.on_error(error))
        elif not self._stopped:
            self._observer.on_error(error)

    def on_completed(self) -> None:
        if not self._clock.is_here():
            self._clock.post(self.on_completed)
        elif not self._stopped:
            self._observer.on_completed()

    def dispose(self) -> None:
        self._stopped = True
        self.upstream.dispose()


class _Root(Generic[T]):
    """Where a pipeline of ours begins for a subscriber that brings no demand: finds its loop and guards its end."""

    __slots__ = ("_clock", "_disposed", "_flow", "_inner", "_observer")

    def __init__(self, observer: Observer[T], clock: Clock) -> None:
        self._observer = observer
        self._clock = clock
        self._flow = Flow(self._failed)
        self._inner: Disposable | None = None
        self._disposed = False

    @classmethod
    def enter(cls, stream: Stream[T], observer: Observer[T], scheduler: abc.SchedulerBase | None) -> _Root[T]:
        """Subscribe on the loop of `scheduler`, else on the running one, else on the loop thread."""
        clock = clock_of(scheduler) or runtime.here()
        root = cls(observer, clock)
        carrier = DemandScheduler(clock, None, root._flow)

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
            self._flow.fail(error)
            raise

    def on_error(self, error: Exception) -> None:
        if not self._disposed:
            self._disposed = True
            self._observer.on_error(error)

    def on_completed(self) -> None:
        if not self._disposed:
            self._disposed = True
            self._observer.on_completed()

    def _failed(self, _error: BaseException) -> None:
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
