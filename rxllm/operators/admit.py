"""Let an attempt start when a gate has room for it, and tell the gate how it ended."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from rxllm.demand import Asked
from rxllm.errors import CallError, CancelledError, ConfigError, TimeoutError, ValidationError, check_callable
from rxllm.gate import Gate, Lane, lane_of
from rxllm.messages import Attempt, Reply, Request, Usage
from rxllm.operators.to_outcome import forget_traceback
from rxllm.policies.headers import Limits
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable

    from reactivex import Observable

    from rxllm.clock import Clock
    from rxllm.demand import Allowance, DemandScheduler, Disposable, Observer
    from rxllm.gate import Lease, Waiter
    from rxllm.policies.accounting import Ending

__all__ = ["admit"]

T = TypeVar("T")


def admit(
    gate: Gate | Lane, *, cost: Mapping[str, float] | None = None, note: Callable[[Attempt], object] | None = None
) -> Callable[[Observable[T]], Observable[T]]:
    """Subscribe the source when `gate` admits it, and settle its lease when it ends.

        source        --r|
        room          ----------x
        admit(gate)   -----------(r|)

    Emits: what the source emits.
    Holds: nothing; a place on the wire from admission until the reply, the end, or a dispose.
    Errors: those of the source; a refusal (`error.refusal`) with a hint pauses the gate for at most 2 s. An
        `InvalidRequestError` at once for a cost that no quota ever admits.
    Completes: with the source.
    Dispose: leaves the queue, or cancels the source; what was booked for it stays booked.

    Each subscription is one attempt with a lease of its own; those of the same stream keep the place in the queue that
    the first one had, so a retry goes before younger requests. Put it directly around `client.send(request)`, inside
    `retry`.

    Args:
        gate: shared by all who use the key; or a lane of it.
        cost: unit -> amount to book; None: one request. A `Reply` settles it to its usage.
        note: called with the record of each attempt when it ends, also of one that is disposed. What it raises ends
            the stream.

    Raises:
        ConfigError: an argument of another kind; in the stream: a quota of the gate counts what `cost` does not name.
    """
    lane = lane_of(gate)
    if cost is not None and not isinstance(cost, Mapping):
        msg = f"cost must be a mapping of units to amounts or None, got {cost!r}"
        raise ConfigError(msg)
    check_callable("note", note, optional=True)

    def apply(source: Observable[T]) -> Observable[T]:
        return Admitted(source, lane, {} if cost is None else cost, note)

    return apply


class Admitted(Stream[T]):
    """`source` behind a gate. It remembers when it first came, which is the place of all its attempts in the queue."""

    route: str | None = None  # which of several clients it leads to
    announced = False  # observers are told by `begun()` that their attempt starts, and say if it is `hedged`

    def __init__(
        self,
        source: Observable[T],
        lane: Lane,
        cost: Mapping[str, float],
        note: Callable[[Attempt], object] | None,
        request: Request | None = None,
    ) -> None:
        self.source = source
        self.lane = lane
        self.gate = lane.gate
        self.cost = cost
        self.note = note
        self.request = request  # says which model is asked, to a budget of dollars
        self.arrival: int | None = None
        self.attempts = 0
        self.ended: float | None = None  # when the last attempt ended

    def follow(self, before: Admitted[T]) -> None:
        """Go on where `before` has stopped: the same place in the queue, the next number."""
        self.arrival = before.arrival
        self.attempts = before.attempts

    def admits_now(self, clock: Clock) -> bool:
        """Say whether an attempt that came now would start at once."""
        try:
            return self.gate.admits_now(clock, self.gate.amounts(self.cost))
        except (CallError, ConfigError):
            return False

    def _start(self, observer: Observer[T], carrier: DemandScheduler) -> Disposable:
        admission = _Admission(self, observer, carrier)
        return connected(admission, admission.apply)


class _Admission:
    """One attempt: an applicant at the gate, then the observer of the source."""

    __slots__ = (
        "_allowance",
        "_carrier",
        "_lease",
        "_number",
        "_observer",
        "_operator",
        "_stopped",
        "_upstream",
        "_waiter",
    )

    def __init__(self, operator: Admitted[Any], observer: Observer[Any], carrier: DemandScheduler) -> None:
        self._operator = operator
        self._observer = observer
        self._carrier = carrier
        self._allowance = carrier.allowance
        self._lease: Lease | None = None
        self._stopped = False
        self._upstream: Disposable | None = None
        self._waiter: Waiter | None = None

    def apply(self) -> None:
        """Ask for admission."""
        operator = self._operator
        gate = operator.gate
        if self._allowance is not None and self._refused(self._allowance):
            return
        if operator.ended is not None:
            gate.backed_off(self._carrier.clock.seconds() - operator.ended)
            operator.ended = None
        try:
            amounts = gate.amounts(operator.cost)
            waiter = gate.apply(self._carrier.clock, amounts, self, operator.arrival, operator.lane)
        except (CallError, ConfigError) as error:
            self._stopped = True
            self._observer.on_error(error)
            return
        self._waiter = waiter
        operator.arrival = waiter.arrival
        gate.enter(waiter)
        if self._allowance is not None and waiter.applicant is not None:  # not admitted yet
            self._allowance.wait(self)

    def _refused(self, allowance: Allowance) -> bool:
        """Fail if nothing more may be sent."""
        refusal = allowance.refusal()
        if refusal is None:
            return False
        self._stopped = True
        self._observer.on_error(refusal)
        return True

    def give_up(self, error: Exception) -> None:
        """Leave the queue: nothing more may be sent."""
        if not self._stopped:
            self._release()
            self._observer.on_error(error)

    def admitted(self, lease: Lease) -> None:
        allowance = self._allowance
        if allowance is not None:
            allowance.leave(self)
            if allowance.refusal() is not None:
                lease.settle("unsent")
                self._refused(allowance)
                return
            allowance.begin()
        self._lease = lease
        operator = self._operator
        operator.attempts += 1
        self._number = operator.attempts
        if operator.announced:
            getattr(self._observer, "begun", _nothing)()
        upstream = subscribe(operator.source, self, self._carrier)
        if self._stopped:
            upstream.dispose()
        else:
            self._upstream = upstream

    def turned_away(self, error: CallError | ConfigError) -> None:
        if self._allowance is not None:
            self._allowance.leave(self)
        self._stopped = True
        self._observer.on_error(error)

    def on_next(self, value: Any) -> None:
        if self._stopped:
            return
        if isinstance(value, Reply):  # the whole answer: the wire is free again
            bug = self._settle("answered", None, cast("Reply[Any]", value))
            if bug is not None:
                self._release()
                self._observer.on_error(bug)
                return
        self._observer.on_next(value)

    def on_completed(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._upstream = None  # no cycle is left for the garbage collector
        bug = self._settle("answered", None, None)
        if bug is None:
            self._observer.on_completed()
        else:
            self._observer.on_error(bug)

    def on_error(self, error: Exception) -> None:
        if self._stopped:
            return
        self._stopped = True
        self._upstream = None
        ending = ending_of(error)
        if ending == "refused":
            hint: object = getattr(error, "retry_after", None)
            if isinstance(hint, int | float):  # errors of other packages have other ideas
                self._operator.gate.pause(hint)
        self._observer.on_error(self._settle(ending, error, None) or error)

    def dispose(self) -> None:
        if not self._stopped:
            self._release()
            if self._lease is not None:
                self._settle("cancelled", CancelledError("given up before it ended"), None)

    def _release(self) -> None:
        self._stopped = True
        if self._waiter is not None:
            self._waiter.cancel()
            if self._allowance is not None:
                self._allowance.leave(self)
        if self._upstream is not None:
            self._upstream.dispose()
            self._upstream = None

    def _settle(self, ending: Ending, error: Exception | None, reply: Reply[Any] | None) -> Exception | None:
        """Give the lease back and note the attempt; return what `note` raised."""
        lease, self._lease = self._lease, None
        if lease is None:
            return None
        operator = self._operator
        told: Reply[Any] | Exception | None = error if reply is None else reply
        found: object = getattr(told, "usage", None)
        usage = found if isinstance(found, Usage) else None
        lease.settle(ending, None if usage is None else operator.gate.used(usage), error)
        now = operator.ended = self._carrier.clock.seconds()
        limits: object = getattr(told, "limits", None)
        if isinstance(limits, Limits):
            operator.gate.observe(limits, lease.at)
        allowance = self._allowance
        if operator.note is None and allowance is None:
            return None
        attempt = Attempt(
            number=self._number,
            started=lease.at,
            seconds=now - lease.at,
            waited=lease.waited,
            status=getattr(told, "status", None),
            error=None if error is None else forget_traceback(error),  # its frames hold the answer and the connection
            usage=usage,
        )
        if operator.announced and getattr(self._observer, "hedged", False):
            attempt = msgspec.structs.replace(attempt, hedged=True)
        if allowance is not None:
            asked = Asked(operator.request, operator.route, None if reply is None else reply.model)
            allowance.end(attempt, asked, recorded=operator.note is not None)
        if operator.note is None:
            return None
        try:
            operator.note(attempt)
        except Exception as bug:
            return bug
        return None


def _nothing() -> None:
    pass


def ending_of(error: Exception) -> Ending:
    """Return how a try that failed with `error` ended, for its account."""
    if getattr(error, "sent", True) is False:
        return "unsent"
    if isinstance(error, ValidationError):
        return "answered"  # and paid for
    if getattr(error, "refusal", False) is True:
        return "refused"
    return "timed_out" if isinstance(error, TimeoutError) else "failed"
