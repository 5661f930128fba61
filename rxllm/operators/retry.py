"""Subscribe again after a transient error, later and later."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from rxllm import runtime
from rxllm.errors import ConfigError, check_callable, check_number
from rxllm.policies.backoff import Backoff
from rxllm.policies.budget import RetryBudget
from rxllm.stream import Stream, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable

    from reactivex import Observable

    from rxllm.clock import Handle
    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["retry"]

T = TypeVar("T")

PATIENCE = 5.0  # seconds: who waits for longer leaves its place to another item of the stage


def retry(
    backoff: Backoff,
    *,
    deadline: float = 3600.0,
    draw: Callable[[float, float], float] = runtime.uniform,
    excused: Callable[[], float] | None = None,
    budget: RetryBudget | None = None,
) -> Callable[[Observable[T]], Observable[T]]:
    """Subscribe again after a transient error, waiting longer each time.

        source           --#            --#                --r|
        retry(backoff)   ----(wait)-------(wait, longer)-----r|

    Emits: what the source emits, from every try: put it around streams of one item.
    Holds: nothing.
    Errors: one that is not `transient` at once; a transient one when the tries are used up, or when the wait would end
        beyond the deadline. It is the last try's own error, not a wrapper.
    Completes: with the source.
    Dispose: cancels the try or the wait.

    `error.transient` alone decides. `error.retry_after` (seconds) delays the next try in full. A refusal
    (`error.refusal`: 429, 529) waits the same way and eats no try: only the deadline bounds those.

    Args:
        backoff: how many tries, and how long between them.
        deadline: seconds from the subscription after which no further try starts, > 0.
        draw: (low, high) -> a random number between; a seeded `random.Random(…).uniform` makes a run reproducible.
        excused: as in `to_outcome`: seconds, so far, that the deadline does not count, such as `gate.suspended`.
        budget: how many retries all that share it may make for their successes; without any left an error is final.
            Refusals cost nothing.

    Raises:
        ConfigError: an argument out of range.

    Source: full jitter, Brooker, AWS Architecture Blog, 2015.
    """
    if not isinstance(backoff, Backoff):
        msg = f"backoff must be a Backoff, got {backoff!r}"
        raise ConfigError(msg)
    check_number("deadline", deadline, above=0)
    check_callable("draw", draw)
    check_callable("excused", excused, optional=True)
    if budget is not None and not isinstance(budget, RetryBudget):
        msg = f"budget must be a RetryBudget or None, got {budget!r}"
        raise ConfigError(msg)

    def apply(source: Observable[T]) -> Observable[T]:
        return Retry(source, backoff, Deadline(deadline, excused), draw, budget=budget)

    return apply


class Deadline(NamedTuple):
    """How long a request may take, without the seconds that `excused` has grown by meanwhile."""

    seconds: float
    excused: Callable[[], float] | None

    def counted(self, now: float) -> float:
        """Return the time that counts."""
        return now if self.excused is None else now - self.excused()


class Retry(Stream[T]):
    """`source` with its transient errors retried.

    Those that share `begun` have one deadline: it runs from the time there, else from the first subscription.
    """

    def __init__(
        self,
        source: Observable[T],
        backoff: Backoff,
        deadline: Deadline,
        draw: Callable[[float, float], float],
        begun: list[float] | None = None,
        *,
        budget: RetryBudget | None = None,
    ) -> None:
        self.source = source
        self.begun = begun
        self.backoff = backoff
        self.deadline = deadline
        self.draw = draw
        self.budget = budget

    def _start(self, observer: Observer[T], carrier: DemandScheduler) -> Disposable:
        tries = _Tries(self, observer, carrier)
        tries.subscribe()  # what it raises finds nothing here to release
        return tries


class _Tries:
    """One subscription of retry: its own observer of every try."""

    __slots__ = (
        "_carrier",
        "_failures",
        "_observer",
        "_operator",
        "_refusals",
        "_started",
        "_stopped",
        "_timer",
        "_unpark",
        "_upstream",
    )

    def __init__(self, operator: Retry[Any], observer: Observer[Any], carrier: DemandScheduler) -> None:
        self._operator = operator
        self._observer = observer
        self._carrier = carrier
        begun = [] if operator.begun is None else operator.begun
        if not begun:
            begun.append(operator.deadline.counted(carrier.clock.seconds()))
        self._started = begun[0]  # in the time that counts
        self._failures = 0
        self._refusals = 0
        self._stopped = False
        self._timer: Handle | None = None
        self._unpark: Callable[[], None] | None = None  # takes back the place in the stage
        self._upstream: Disposable | None = None

    def subscribe(self) -> None:
        """Start a try."""
        if self._timer is not None:
            self._timer = None
            self._leave()
        upstream = subscribe(self._operator.source, self, self._carrier)
        if self._stopped:
            upstream.dispose()
        elif self._timer is None:
            self._upstream = upstream

    def on_next(self, value: Any) -> None:
        if not self._stopped:
            self._observer.on_next(value)

    def on_completed(self) -> None:
        if not self._stopped:
            self._stopped = True
            self._upstream = None  # no cycle is left for the garbage collector
            budget = self._operator.budget
            if budget is not None:
                budget.succeed()
            self._observer.on_completed()

    def on_error(self, error: Exception) -> None:
        if self._stopped:
            return
        self._upstream = None
        try:
            delay = self._delay(error)
        except Exception as bug:  # of the user's draw
            delay, error = None, bug
        allowance = self._carrier.allowance
        if allowance is not None and delay is not None:
            refusal = allowance.refusal()
            if refusal is not None:
                delay, error = None, refusal
        if delay is None:
            self._stopped = True
            self._observer.on_error(error)
        else:
            self._timer = self._carrier.call_later(delay, self.subscribe)
            if allowance is not None:
                allowance.wait(self)
            if delay > PATIENCE and self._timer is not None:
                self._park()

    def _park(self) -> None:
        """Leave the place to another item while it waits, if the stage has such places."""
        park: Callable[[], Callable[[], None]] | None = getattr(self._carrier.flow, "park", None)
        if park is None:
            return
        unpark = park()
        if self._stopped:  # what was started in its place has ended the stage, or the budget
            unpark()
        else:
            self._unpark = unpark

    def _delay(self, error: Exception) -> float | None:
        if getattr(error, "transient", False) is not True:
            return None
        operator = self._operator
        hint: object = getattr(error, "retry_after", None)
        hint = hint if isinstance(hint, int | float) else None  # errors of other packages have other ideas
        delay: float | None
        if getattr(error, "refusal", False) is True:
            self._refusals += 1
            delay = operator.backoff.wait(self._refusals, hint, operator.draw)
        else:
            self._failures += 1
            delay = operator.backoff.delay(self._failures, hint, operator.draw)
        if delay is None:
            return None
        deadline = operator.deadline
        if deadline.counted(self._carrier.clock.seconds()) + delay >= self._started + deadline.seconds:
            return None
        if operator.budget is not None and not operator.budget.take(refused=getattr(error, "refusal", False) is True):
            error.add_note("not tried again: the retry budget is used up")
            return None
        return delay

    def give_up(self, error: Exception) -> None:
        """Wait no longer: nothing more may be sent."""
        if not self._stopped:
            self.dispose()
            self._observer.on_error(error)

    def _leave(self) -> None:
        """Learn that it waits no longer."""
        if self._unpark is not None:
            self._unpark()
            self._unpark = None
        if self._carrier.allowance is not None:
            self._carrier.allowance.leave(self)

    def dispose(self) -> None:
        self._stopped = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._leave()
        if self._upstream is not None:
            self._upstream.dispose()
            self._upstream = None
