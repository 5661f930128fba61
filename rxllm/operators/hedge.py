"""Send a second attempt when the first is late, and take the answer that comes first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

from rxllm.demand import NOTHING
from rxllm.errors import ConfigError, is_transient
from rxllm.policies.hedging import Hedge, Hedging
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable

    from reactivex import Observable

    from rxllm.clock import Handle
    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["hedge"]

T = TypeVar("T")


def hedge(hedge: Hedge) -> Callable[[Observable[T]], Observable[T]]:
    """Subscribe the source a second time when it is later than most have been; what emits first is what counts.

        source         ------------a|
        source again         ---b|
        hedge(Hedge()) ---------(b|)

    Emits: what the source emits, from the subscription whose first item came first; that disposes the other.
    Holds: nothing.
    Errors: one that fails while the other still runs is not heard of. When both fail: an error that is not transient,
        else that of the first.
    Completes: with the subscription that emitted; or, without an item, with the one that completed first.
    Dispose: cancels both.

    It learns how long answers take from all that it is applied to: make the operator once, and use it for all requests.
    Nothing is hedged before it has seen 50. Put it around `admit`: its time begins when the gate has let an attempt
    start, and there is a second one only if the gate has room for it at once and nobody waits there. Around any other
    stream its time begins with the subscription. The source is subscribed twice, so it must be cold, and asking twice
    must do no harm.

    Args:
        hedge: when, and how many at most.

    Raises:
        ConfigError: an argument of another kind.

    Example:
        >>> import rxllm
        >>> client = rxllm.function(str.upper)
        >>> late = hedge(Hedge(quantile=0.9))
        >>> answers = rxllm.from_iterable(["a", "b"]).pipe(
        ...     rxllm.operators.flat_map(lambda item: client.send(client.wrap(item)).pipe(late), window=2)
        ... )
        >>> sorted(reply.value for reply in rxllm.collect(answers))
        ['A', 'B']

    Source: Dean and Barroso, "The Tail at Scale", Communications of the ACM, 2013.
    """
    if not isinstance(hedge, Hedge):
        msg = f"hedge must be a Hedge, got {hedge!r}"
        raise ConfigError(msg)
    hedging = Hedging(hedge)
    return lambda source: Hedged(source, hedging)


class Hedged(Stream[T]):
    """`source` with a second subscription when the first is late."""

    def __init__(self, source: Observable[T], hedging: Hedging) -> None:
        self.source = source
        self.hedging = hedging
        if hasattr(source, "announced"):
            cast("Any", source).announced = True

    def _start(self, observer: Observer[T], carrier: DemandScheduler) -> Disposable:
        race = _Race(self, observer, carrier)
        return connected(race, race.begin)


class _Race:
    """One subscription of hedge: up to two of the source."""

    __slots__ = ("_carrier", "_error", "_first", "_observer", "_operator", "_second", "_stopped", "_timer", "_winner")

    def __init__(self, operator: Hedged[Any], observer: Observer[Any], carrier: DemandScheduler) -> None:
        self._operator = operator
        self._observer = observer
        self._carrier = carrier
        self._error: Exception | None = None  # of the one that has failed while the other runs
        self._first = _Runner(self, hedged=False)
        self._second: _Runner | None = None
        self._stopped = False
        self._timer: Handle | None = None
        self._winner: _Runner | None = None

    def begin(self) -> None:
        """Subscribe the source."""
        if not hasattr(self._operator.source, "announced"):
            self._first.begun()
        self._first.run(self._operator.source, self._carrier)

    def begun(self, runner: _Runner) -> float:
        """Set the timer for a first attempt that has just been sent; return when that was."""
        now = self._carrier.clock.seconds()
        if runner is self._first:
            seconds = self._operator.hedging.start()
            if seconds is not None:
                self._timer = self._carrier.call_later(seconds, self._late)
        return now

    def _late(self) -> None:
        """Send a second attempt, if there is room for it now."""
        self._timer = None
        source, clock = self._operator.source, self._carrier.clock
        admits = getattr(source, "admits_now", None)
        if (admits is None or admits(clock)) and self._operator.hedging.take():
            self._second = _Runner(self, hedged=True)
            self._second.run(source, self._carrier)

    def next(self, runner: _Runner, value: Any) -> None:
        """Pass an item on; the first of all decides whose items those are."""
        if self._winner is None:
            self._win(runner)
        if not self._stopped:
            self._observer.on_next(value)

    def _win(self, runner: _Runner) -> None:
        self._winner = runner
        self._rest()
        began = self._first.began
        if began is not None:
            self._operator.hedging.answered(self._carrier.clock.seconds() - began)
        other = self._second if runner is self._first else self._first
        if other is not None:
            other.dispose()

    def complete(self, runner: _Runner) -> None:
        """End with the subscription that counts."""
        if self._winner is None:
            self._win(runner)
        if not self._stopped:
            self._stopped = True
            self._observer.on_completed()

    def fail(self, runner: _Runner, error: Exception) -> None:
        """End with an error, unless the other subscription may still do better."""
        if self._stopped:
            return
        other = self._second if runner is self._first else self._first
        if self._winner is None and other is not None and not other.stopped:
            self._error = error
            return
        self._rest()
        self._stopped = True
        self._observer.on_error(error if self._error is None else self._telling(self._error, error, runner))

    def _telling(self, before: Exception, after: Exception, runner: _Runner) -> Exception:
        """Return the error of both: one that no further try cures, else that of the first attempt."""
        first, second = (after, before) if runner is self._first else (before, after)
        return second if is_transient(first) and not is_transient(second) else first

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def dispose(self) -> None:
        self._stopped = True
        self._rest()
        self._first.dispose()
        if self._second is not None:
            self._second.dispose()


class _Runner:
    """The observer of one of the subscriptions."""

    __slots__ = ("_race", "_upstream", "began", "hedged", "stopped")

    def __init__(self, race: _Race, *, hedged: bool) -> None:
        self._race = race
        self._upstream: Disposable = NOTHING
        self.began: float | None = None  # when it was sent
        self.hedged = hedged
        self.stopped = False

    def run(self, source: Observable[Any], carrier: DemandScheduler) -> None:
        upstream = subscribe(source, self, carrier)
        if self.stopped:
            upstream.dispose()
        else:
            self._upstream = upstream

    def begun(self) -> None:
        self.began = self._race.begun(self)

    def on_next(self, value: Any) -> None:
        if not self.stopped:
            self._race.next(self, value)

    def on_error(self, error: Exception) -> None:
        if not self.stopped:
            self._end()
            self._race.fail(self, error)

    def on_completed(self) -> None:
        if not self.stopped:
            self._end()
            self._race.complete(self)

    def _end(self) -> None:
        self.stopped = True
        self._upstream = NOTHING  # no cycle is left for the garbage collector

    def dispose(self) -> None:
        if not self.stopped:
            self.stopped = True
            upstream, self._upstream = self._upstream, NOTHING
            upstream.dispose()
