"""Split one stream into several without subscribing, and paying, more than once."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rxllm.demand import NOTHING, UNDEMANDED, Demand, DemandScheduler, Flow, Outlet, undemanded
from rxllm.errors import ConfigError, check_number
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable

    from reactivex import Observable

    from rxllm.clock import Clock
    from rxllm.demand import Disposable, Observer

__all__ = ["tee"]

T = TypeVar("T")

UNASKED = 64  # items a turn when no branch says what it can take


def tee(n: int) -> Callable[[Observable[T]], tuple[Observable[T], ...]]:
    """Split a stream into `n` that share one subscription to the source.

        source     -a-b-c-|
        first      -a-b-c-|
        second     -a-b-c-|

    Emits: every item, to every branch.
    Holds: for each branch what it has no room for, at most one turn's worth: the slowest branch sets the pace for all.
    Errors: passed to every branch, after what it holds.
    Completes: every branch, after what it holds.
    Dispose: a branch leaves; the last one to leave cancels the source.

    The source is subscribed when all `n` branches are; until then nothing flows. Each branch can be subscribed once.

    Args:
        n: branches, >= 1.

    Returns:
        A tuple of `n` observables: `first, second = outcomes.pipe(tee(2))`.

    Raises:
        ConfigError: `n` out of range; in a branch: a second subscription, or one on another loop than the first.
    """
    check_number("n", n, least=1, integer=True)

    def apply(source: Observable[T]) -> tuple[Observable[T], ...]:
        hub = _Hub(source, n)
        return tuple(_Branch(hub, number) for number in range(n))

    return apply


class _Hub:
    """What the branches share: the source until all have subscribed, then its one subscription."""

    def __init__(self, source: Observable[Any], n: int) -> None:
        self.source = source
        self.expected = n
        self.clock: Clock | None = None
        self.branches: dict[int, Outlet[Any]] = {}
        self.stops: dict[int, Callable[[], None]] = {}  # how the run of each branch stops the source
        self.seen: set[int] = set()
        self.split: _Split | None = None

    def join(self, number: int, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        if number in self.seen:
            msg = "a branch of tee can be subscribed once: split into more branches instead"
            raise ConfigError(msg)
        if self.clock is not None and self.clock is not carrier.clock:
            msg = f"the branches of tee must run on one loop: one is on {self.clock!r}, this one on {carrier.clock!r}"
            raise ConfigError(msg)
        self.clock = carrier.clock
        self.seen.add(number)
        self.branches[number] = Outlet(observer, carrier, self._after)
        stop = self.stops[number] = partial(self._drain, number)
        carrier.flow.add_source(stop, carrier.demand)
        if len(self.seen) == self.expected and self.branches:
            self.split = _Split(self, carrier.clock)
            return connected(_Leave(self, number), self.split.connect)
        return _Leave(self, number)

    def _after(self) -> None:
        if self.split is not None:
            self.split.wake()

    def _drain(self, _number: int) -> None:
        """Stop pulling for all: the run of one branch is to drain, and the source is theirs together."""
        if self.split is not None:
            self.split.flow.drain()

    def leave(self, number: int) -> None:
        outlet = self.branches.pop(number, None)
        if outlet is None:
            return
        outlet.dispose()
        outlet.flow.remove_source(self.stops.pop(number))
        if self.split is None:
            return
        if self.branches:
            self.split.wake()
        elif len(self.seen) == self.expected:
            self.split.dispose()


class _Split(Demand):
    """The demand on the source, and its observer."""

    __slots__ = ("_hub", "_upstream", "done")

    def __init__(self, hub: _Hub, clock: Clock) -> None:
        super().__init__(clock, Flow(self._failed))
        self._hub = hub
        self._upstream: Disposable | None = None
        self.done = False

    def connect(self) -> None:
        upstream = subscribe(self._hub.source, self, DemandScheduler(self.clock, self, self.flow))
        if self.done:
            upstream.dispose()
        else:
            self._upstream = upstream

    def room(self) -> int:
        """Return what the slowest branch can take; one item ahead of it, none while a branch holds any."""
        outlets = self._hub.branches.values()
        if any(outlet.held for outlet in outlets):
            return 0
        return max(1, min((UNASKED if outlet.below is None else outlet.below.room() for outlet in outlets), default=1))

    def on_next(self, value: Any) -> None:
        self.arrived += 1
        branches = self._hub.branches
        for outlet in list(branches.values()):
            try:
                outlet.push(value)
            except BaseException as error:
                if all(branch.flow.failed is not None for branch in branches.values()):
                    self.flow.fail(error)
                    raise
                self.clock.call_soon(partial(_raise, error))  # not through the source: it still serves the others
        if any(len(outlet.held) > UNDEMANDED for outlet in branches.values()):
            self._end(undemanded())
            self._release()

    def on_error(self, error: Exception) -> None:
        self._end(error)

    def on_completed(self) -> None:
        self._end(None)

    def _end(self, error: Exception | None) -> None:
        if not self.done:
            self.done = True
            for outlet in list(self._hub.branches.values()):
                outlet.end(error)

    def _failed(self, error: BaseException) -> None:
        """End the runs of all branches: something above them raised."""
        self.dispose()
        for outlet in list(self._hub.branches.values()):
            outlet.flow.fail(error)

    def dispose(self) -> None:
        self.done = True
        self._release()

    def _release(self) -> None:
        if self._upstream is not None:
            self._upstream.dispose()
            self._upstream = None


def _raise(error: BaseException) -> NoReturn:
    raise error


class _Branch(Stream[Any]):
    def __init__(self, hub: _Hub, number: int) -> None:
        self.hub = hub
        self.number = number

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        try:
            return self.hub.join(self.number, observer, carrier)
        except ConfigError as error:
            observer.on_error(error)
            return NOTHING


class _Leave:
    """The subscription of one branch."""

    __slots__ = ("_hub", "_number")

    def __init__(self, hub: _Hub, number: int) -> None:
        self._hub = hub
        self._number = number

    def dispose(self) -> None:
        self._hub.leave(self._number)
