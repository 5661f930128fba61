"""One request through several clients: each attempt on the route that can start it first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from rxllm.clients.routing import Routes
from rxllm.demand import NOTHING
from rxllm.errors import ConfigError, check_callable
from rxllm.messages import Attempt, Chunk, Reply, Request, Restarted
from rxllm.operators.admit import Admitted
from rxllm.policies.routing import after_failure, least_asked, waiting_order
from rxllm.policies.timeouts import Timeouts
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from reactivex import Observable

    from rxllm.clock import Clock, Handle
    from rxllm.demand import DemandScheduler, Disposable, Observer
    from rxllm.policies.budget import RetryBudget

__all__ = ["routed"]

T = TypeVar("T")

PATIENCE = 5.0  # seconds that a retry waits for another route before it takes the one that has failed it, too


def routed(
    routes: Routes[T],
    *,
    request: Request,
    timeouts: Timeouts = Timeouts(),  # noqa: B008  frozen
    note: Callable[[Attempt], object] | None = None,
) -> Observable[Reply[T]]:
    """Return the stream of one attempt: what `client.send(request).pipe(admit(gate))` is for one client.

        room at a     -----------x
        room at b     ----x
        the answer        --r|
        routed(a, b)  ------r|

    Emits: the reply.
    Holds: nothing; a place at each gate until one lets it start, a place on the wire from then until the reply.
    Errors: those of the attempt, but what `any_of` says of refusals and fallbacks. Before the start: when no route can
        ever take it; one of those that `halt` only if all do.
    Completes: after the reply.
    Dispose: leaves all queues, or cancels the attempt.

    Each subscription is one attempt; those of the same stream keep their place in the queues, and know which routes
    have failed them. Put it inside `retry`.

    Args:
        routes: what `any_of` returned.
        request: what to ask.
        timeouts: of each attempt.
        note: called with the record of each attempt, as in `admit`.

    Raises:
        ConfigError: an argument of another kind.
    """
    for name, value, kind in (
        ("routes", routes, Routes),
        ("request", request, Request),
        ("timeouts", timeouts, Timeouts),
    ):
        if not isinstance(value, kind):
            msg = f"{name} must be a {kind.__name__}, got {value!r}"
            raise ConfigError(msg)
    check_callable("note", note, optional=True)
    return Routed(routes, request, timeouts, note, None)


class Routed(Stream[Reply[T]]):
    """One request through several clients. It remembers what its attempts have met."""

    announced = False  # as in Admitted

    def __init__(
        self,
        routes: Routes[T],
        request: Request,
        timeouts: Timeouts,
        note: Callable[[Attempt], object] | None,
        show: Callable[[Chunk | Restarted], object] | None,
    ) -> None:
        self.routes = routes
        self.request = request
        self.timeouts = timeouts
        self.note = note
        self.show = show
        self.arrival: int | None = None
        self.attempts = 0
        self.ended: float | None = None  # when the last attempt ended
        self.usable: Sequence[int] = routes.usual  # numbers of routes; that of a fallback stays alone
        self.failed: tuple[int, ...] = ()  # those that have failed the request
        self.broken: Exception | None = None  # how the attempt ended that has shown something
        self.busy: list[int] = []  # with attempts of this request, two when it is hedged
        self.latest: int | None = None  # where an attempt has started last
        self._costs: dict[int, Mapping[str, float]] = {}

    def follow(self, before: Routed[T]) -> None:
        """Go on where `before` has stopped: the same place in the queues, the next number, the same fallback."""
        self.arrival = before.arrival
        self.attempts = before.attempts
        self.usable = before.usable

    def cost(self, number: int) -> Mapping[str, float]:
        """Return what the request will use on a route."""
        costs, routes = self._costs, self.routes
        if number not in costs:
            costs[number] = routes.clients[number].cost(self.request) if routes.lanes[number].gate.units else {}
        return costs[number]

    def admits(self, number: int, clock: Clock) -> bool:
        """Say whether an attempt could start on a route at once."""
        gate = self.routes.lanes[number].gate
        try:
            return gate.admits_now(clock, gate.amounts(self.cost(number)))
        except Exception:  # of a cost of the user's too: whoever enters there learns it
            return False

    def able(self, numbers: Sequence[int], clock: Clock) -> list[int]:
        """Return those of the routes that an attempt could start on at once: none twice if there is another."""
        able = [number for number in numbers if self.admits(number, clock)]
        return [number for number in able if number not in self.busy] or able

    def admits_now(self, clock: Clock) -> bool:
        """Say whether an attempt that came now would start at once."""
        return bool(self.able(self.order()[0], clock))

    def order(self) -> tuple[Sequence[int], Sequence[int]]:
        """Return the routes to wait at, and those to wait at too when that takes long."""
        lanes = self.routes.lanes
        shut = [number for number in self.usable if lanes[number].gate.is_shut] if self.failed else ()
        return waiting_order(self.usable, self.failed, shut)

    def _start(self, observer: Observer[Reply[T]], carrier: DemandScheduler) -> Disposable:
        attempt = _Attempt(self, observer, carrier)
        return connected(attempt, attempt.begin)


class _Attempt:
    """One subscription of a routed stream: at the gates, then on one route; after a fallback once more."""

    __slots__ = (
        "_applied",
        "_carrier",
        "_entering",
        "_errors",
        "_later",
        "_left",
        "_observer",
        "_operator",
        "_refusals",
        "_round",
        "_stopped",
        "_timer",
        "_waiting",
    )

    def __init__(self, operator: Routed[Any], observer: Observer[Any], carrier: DemandScheduler) -> None:
        self._operator = operator
        self._observer = observer
        self._carrier = carrier
        self._applied = 0.0  # when it came to the gates
        self._entering = False
        self._errors: list[Exception] = []  # of routes that do not take it
        self._later: list[Sequence[int]] = []  # groups of routes where it does not wait yet
        self._left: list[int] = []  # those where it has fallen back from
        self._refusals: dict[int, Exception] = {}  # by route
        self._round = 0  # how often it has come to the gates
        self._stopped = False
        self._timer: Handle | None = None
        self._waiting: list[_Applicant] = []  # where it waits; once it has started: where it runs

    def begin(self) -> None:
        """Start on the best of the routes that have room, else wait at the gates of all that come into question."""
        operator, clock = self._operator, self._carrier.clock
        self._applied = clock.seconds()
        self._round += 1
        self._errors.clear()
        now, later = operator.order()
        able = operator.able(now, clock)
        if able:
            routes = operator.routes
            best = routes.spread.choose(able, routes.in_flight, routes.limits)
            self._later = [later, [number for number in now if number != best]]
            self._enter([best])
        else:
            self._later = [later]
            self._enter(now)

    def _everywhere(self) -> None:
        """Wait at more gates, at last at those of the routes that have failed the request."""
        self._timer = None
        self._enter(self._later.pop())

    def _enter(self, numbers: Sequence[int]) -> None:
        """Wait at these gates, perhaps beside others; fail when there is no gate left to wait at."""
        this = self._round
        for number in numbers:
            self._entering = True
            self._enter_one(number)
            self._entering = False
            if self._stopped or self._round != this or (self._waiting and self._waiting[0].started):
                return  # it has started there, and perhaps ended already
        if not self._waiting:
            self._missed()
        elif any(self._later) and self._timer is None:
            self._timer = self._carrier.call_later(PATIENCE, self._everywhere)

    def _missed(self) -> None:
        """Go to the gates that are left, or end: none takes the attempt."""
        self._rest()
        if self._later:
            self._everywhere()
            return
        self._stopped = True
        errors = self._errors
        self._observer.on_error(next((one for one in errors if getattr(one, "halts", False) is not True), errors[0]))

    def _enter_one(self, number: int) -> None:
        operator = self._operator
        applicant = _Applicant(self, number)
        try:
            stream = self._stream(applicant, number)
        except Exception as error:  # the client is closed, or its cost is a bug of the user's
            self._errors.append(error)
            return
        self._waiting.append(applicant)
        stream.arrival = operator.arrival
        upstream = subscribe(stream, applicant, self._carrier)
        operator.arrival = operator.arrival or stream.arrival
        if applicant in self._waiting:
            applicant.upstream = upstream
        else:
            upstream.dispose()

    def _stream(self, applicant: _Applicant, number: int) -> Admitted[Any]:
        operator = self._operator
        routes, request = operator.routes, operator.request
        client = routes.clients[number]
        if operator.show is None:
            sending = client.send(request, timeouts=operator.timeouts)
        else:
            applicant.show = operator.show
            sending = client.send(request, timeouts=operator.timeouts, on_chunk=applicant.shown)
        entrance = _Entrance(applicant, sending)
        admitted = Admitted(entrance, routes.lanes[number], operator.cost(number), applicant.note, request)
        admitted.route = routes.names[number]
        return admitted

    def started(self, applicant: _Applicant) -> None:
        """Leave all other gates: this one has let the attempt start."""
        self._rest()
        others = [other for other in self._waiting if other is not applicant]
        self._waiting = [applicant]
        for other in others:
            other.dispose()
        operator, number = self._operator, applicant.number
        operator.attempts += 1
        applicant.started = operator.attempts
        operator.latest = number
        operator.busy.append(number)
        routes = operator.routes
        routes.spread.start(number, routes.limits)
        if operator.ended is not None:
            routes.lanes[number].gate.backed_off(self._applied - operator.ended)
            operator.ended = None
        if operator.announced:
            getattr(self._observer, "begun", _nothing)()
        broken, operator.broken = operator.broken, None
        if broken is not None and applicant.show is not None:
            applicant.show(Restarted(attempt=operator.attempts, error=broken))

    def hears(self, applicant: _Applicant) -> bool:
        """Say whether what comes from a route still counts."""
        return applicant in self._waiting

    def note(self, applicant: _Applicant, attempt: Attempt) -> None:
        """Record an attempt, with who made it."""
        operator = self._operator
        operator.busy.remove(applicant.number)
        operator.ended = attempt.started + attempt.seconds
        if operator.note is not None:
            operator.note(
                msgspec.structs.replace(
                    attempt,
                    number=applicant.started,
                    route=operator.routes.names[applicant.number],
                    hedged=operator.announced and getattr(self._observer, "hedged", False),
                )
            )

    def next(self, value: Any) -> None:
        self._operator.failed = ()
        self._observer.on_next(value)

    def complete(self) -> None:
        self._stopped = True
        self._waiting.clear()
        self._observer.on_completed()

    def fail(self, applicant: _Applicant, error: Exception) -> None:
        """Wait at the gates that are left; or end the attempt, unless another route takes over at once."""
        self._waiting.remove(applicant)
        if not applicant.started:
            self._errors.append(error)
            if not self._waiting and not self._entering:
                self._missed()
            return
        operator = self._operator
        number, usable = applicant.number, operator.usable
        if applicant.has_shown:
            operator.broken = error
        again = not (operator.announced and getattr(self._observer, "hedged", False))  # a hedge has one attempt
        target = operator.routes.fallback(error) if again else None
        if target is not None and target != number and target not in self._left:
            self._left.append(number)
            operator.usable, operator.failed = (target,), ()
            self.begin()
            return
        others = [one for one in usable if one != number and one not in operator.failed]
        operator.failed = after_failure(operator.failed, number, usable)
        if getattr(error, "refusal", False) is True:
            self._refusals[number] = error
            if again and any(not operator.routes.lanes[one].gate.is_shut for one in others):
                self.begin()
                return
            least = least_asked([(one, getattr(each, "retry_after", None)) for one, each in self._refusals.items()])
            error = self._refusals[least]
            operator.failed = tuple(one for one in self._refusals if one != least) or operator.failed
        self._stopped = True
        self._observer.on_error(error)

    def _rest(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def dispose(self) -> None:
        self._stopped = True
        self._rest()
        waiting, self._waiting = self._waiting, []
        for applicant in waiting:
            applicant.dispose()


class _Entrance(Stream[Any]):
    """What is behind the gate of one route: its subscription is the start of the attempt."""

    def __init__(self, applicant: _Applicant, sending: Observable[Any]) -> None:
        self.applicant = applicant
        self.sending = sending

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        self.applicant.attempt.started(self.applicant)
        return subscribe(self.sending, observer, carrier)


class _Applicant:
    """The observer of one route."""

    __slots__ = ("attempt", "has_shown", "number", "show", "started", "upstream")

    def __init__(self, attempt: _Attempt, number: int) -> None:
        self.attempt = attempt
        self.number = number
        self.started = 0  # the number of the attempt, once the gate has let it start
        self.show: Callable[[Chunk | Restarted], object] | None = None
        self.has_shown = False
        self.upstream: Disposable = NOTHING

    def note(self, attempt: Attempt) -> None:
        self.attempt.note(self, attempt)

    def shown(self, piece: Chunk | Restarted) -> None:
        self.has_shown = True
        if self.show is not None:
            self.show(piece)

    def on_next(self, value: Any) -> None:
        if self.attempt.hears(self):
            self.attempt.next(value)

    def on_error(self, error: Exception) -> None:
        self.upstream = NOTHING  # no cycle is left for the garbage collector
        if self.attempt.hears(self):
            self.attempt.fail(self, error)

    def on_completed(self) -> None:
        self.upstream = NOTHING
        if self.attempt.hears(self):
            self.attempt.complete()

    def dispose(self) -> None:
        upstream, self.upstream = self.upstream, NOTHING
        upstream.dispose()


def _nothing() -> None:
    pass


class LastRoutesBudget:
    """The retry budgets of the routes as one: that of the route where the last attempt was made."""

    __slots__ = ("_attempt",)

    def __init__(self, attempt: Routed[Any]) -> None:
        self._attempt = attempt

    def _budget(self) -> RetryBudget | None:
        latest = self._attempt.latest
        return None if latest is None else self._attempt.routes.lanes[latest].gate.retry_budget

    def succeed(self) -> None:
        """Count a success."""
        budget = self._budget()
        if budget is not None:
            budget.succeed()

    def take(self, *, refused: bool = False) -> bool:
        """Say whether a failed attempt may be tried again, and count that; see `RetryBudget`."""
        budget = self._budget()
        return budget is None or budget.take(refused=refused)
