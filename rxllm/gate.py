"""Where attempts wait: quotas, a pace and a concurrency limit behind one admission.

    attempt ──▶ request ──▶ [ first arrival first ] ──▶ lease ──▶ on the wire ──▶ settle
                               ▲ one timer, one look at all limits, no await in between

Admission is one synchronous step: it looks at every limit, and books in all or in none. What a try costs in the end is
decided when its lease is settled, by how it ended (`policies.accounting`). `policies.ledger` keeps the quotas, and
`policies.line` says who is next.

What may let others start (an attempt ends, the first in the queue leaves, a setting changes) is looked at in the next
turn of the loop, once for all of it: a pipeline that is disposed takes its own out of the queue before any of them gets
the places of the others, and whoever ends an attempt never runs the code of another one.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
from collections import deque
from typing import TYPE_CHECKING, Protocol, Self, cast

from reactivex import Observable, Subject

from rxllm.errors import BreakerError, CallError, ConfigError, check_number, check_text
from rxllm.events import Admitted, BreakerChanged, Ended, Event, Learned, Paused, Resumed, SettingChanged, Suspended
from rxllm.feedback import Controller, Feedback, kind_of
from rxllm.messages import Setting, Signal
from rxllm.policies.accounting import GENERIC, Accounting, Ending, accounting_of
from rxllm.policies.breaker import Breaker
from rxllm.policies.budget import RetryBudget
from rxllm.policies.ledger import Ledger
from rxllm.policies.line import Line, Lines
from rxllm.policies.meters import Meter, meter
from rxllm.policies.opening import Opening
from rxllm.policies.quota import Quota, parse_quotas
from rxllm.policies.ramp import Ramp
from rxllm.policies.sliding import Ticket
from rxllm.reports import Explanation, GateStatistics, LaneStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rxllm.clock import Clock, Handle
    from rxllm.messages import Kind, Usage
    from rxllm.policies.control import Machine
    from rxllm.policies.headers import Limits
    from rxllm.policies.pace import PaceTicket
    from rxllm.stores.base import OutsideMeter

__all__ = ["Gate", "Lane", "Lease", "Waiter", "lane_of"]

PASSES = 32  # how many later ones may go before one that does not fit
LOOK = 32  # how many of those behind it are looked at for one that does
GOOD = frozenset({"ok", "invalid"})
BAD = frozenset({"fault", "fatal"})
OWN = frozenset({"concurrency", "pace"})  # what a controller sets
LEAST = 0.001  # seconds: no timer is armed for less
WINDOW = 256  # requests in progress per pipeline when the gate has no concurrency limit
HISTORY = 100  # changes of the setting that are remembered
LONG = 60.0  # seconds: a longer wait for a quota suspends

_arrivals = itertools.count(1)
_log = logging.getLogger("rxllm.gate")


class Lease:
    """A place on the wire, and what was booked for it. Settle it once; again is harmless."""

    __slots__ = ("_gate", "amounts", "at", "epoch", "in_flight", "start", "tickets", "waited")

    def __init__(
        self, gate: Gate, amounts: tuple[float, ...], tickets: list[Ticket], start: PaceTicket | None, at: float
    ) -> None:
        self._gate: Gate | None = gate
        self.amounts = amounts  # in the order of the gate's quotas
        self.tickets = tickets  # in the same order
        self.start = start  # in the pace, if there was one
        self.at = at  # when it was admitted
        self.waited: dict[str, float] = {}  # seconds, by what it waited for
        self.epoch: int  # of the controller, if there is one
        self.in_flight: int  # with this one; the same

    def settle(self, ending: Ending, used: Mapping[str, float] | None = None, error: Exception | None = None) -> None:
        """Give the place back and make the bookings what the try really cost.

        Args:
            ending: how the try ended.
            used: unit -> what the provider says it used; a unit that is missing is unknown.
            error: what it failed with, for the controller.
        """
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.settle(self, ending, used, error)


class Applicant(Protocol):
    """Who asks for admission."""

    def admitted(self, lease: Lease, /) -> None:
        """Take the lease; called once, perhaps before `request` returns."""
        ...

    def turned_away(self, error: CallError | ConfigError, /) -> None:
        """Learn that there will be no lease: the gate is closed, or a quota has become too small for it."""
        ...


class Waiter:
    """One attempt in the queue."""

    __slots__ = ("amounts", "applicant", "arrival", "before", "gate", "line", "passed", "since", "stuck")

    def __init__(  # noqa: PLR0917  made by the gate alone
        self,
        gate: Gate,
        line: Line[Waiter],
        arrival: int,
        amounts: tuple[float, ...],
        applicant: Applicant,
        since: float,
    ) -> None:
        self.gate = gate
        self.line = line
        self.arrival = arrival
        self.amounts = amounts
        self.applicant: Applicant | None = applicant  # None: cancelled, or admitted
        self.since = since
        self.before: dict[str, float]  # what the queue had waited for when this one came
        self.passed = 0  # how many later ones went before it while it was the first
        self.stuck = math.inf  # since when it is the first and does not fit into a quota

    def __lt__(self, other: Waiter) -> bool:
        return self.arrival < other.arrival

    def cancel(self) -> None:
        """Leave the queue."""
        if self.applicant is not None:
            self.applicant = None
            self.gate.cancelled(self)


class Lane:
    """One class of attempts at a gate: give it to a pipeline instead of the gate. `Gate.lane` makes it."""

    __slots__ = ("gate", "line")

    def __init__(self, gate: Gate, line: Line[Waiter]) -> None:
        self.gate = gate
        self.line = line

    def __repr__(self) -> str:
        return f"{self.gate!r}.lane({self.name!r}, weight={self.weight:g})"

    def __reduce__(self) -> tuple[Callable[..., Lane], tuple[object, ...]]:
        """Pickle the configuration, never the state."""
        return _rebuild_lane, (self.gate, self.name, self.weight)

    @property
    def name(self) -> str:
        """What the class is called."""
        return self.line.name

    @property
    def weight(self) -> float:
        """Its share, in proportion to the weights of the others that wait."""
        return self.line.weight


def lane_of(gate: object) -> Lane:
    """Return the lane that a pipeline enters by: that of a gate for all who name none.

    Raises:
        ConfigError: it is neither a gate nor a lane.
    """
    if isinstance(gate, Gate):
        return gate.main
    if isinstance(gate, Lane):
        return gate
    msg = f"gate must be a Gate, got {gate!r}"
    raise ConfigError(msg)


class Gate:
    """Quotas, a pace and a concurrency limit for all who use one key. Share it between pipelines.

    Attempts are admitted in the order in which their requests first came, so a retry goes before younger requests. One
    that does not fit into a quota may be passed by smaller ones, at most 32 times and for one window; then it is waited
    for. Of those behind it the first 32 are looked at.

    Args:
        quotas: `Quota`s, or texts such as "500 requests/minute" or "90_000 tokens/minute; 10/second".
        concurrency: attempts on the wire at a time, >= 1; None: no limit. Or who finds it out by what attempts do, a
            controller: a machine of `policies`, or an operator from `Signal`s to `Setting`s.
        rate: starts per second, evenly spaced, > 0; None: no pace.
        share: the part of each quota that is this gate's, above 0 to 1: others use the same key.
        accounting: how the provider counts, an `Accounting` or a name in `policies.ACCOUNTING`.
        headers: whether to heed the limit headers of replies.
        ramp: a slow start, for servers that grow with their load: to `rate`, else to the lowest rate that the quotas of
            requests allow. It begins with the first attempt.
        breaker: when to let probes pass only, because the server answers nothing any more; None: never.
        retry_budget: how many retries the pipelines may make for their successes; None: as many as `Backoff` says.

    The limit headers of every reply correct the quotas: what others use of the key counts before there is a refusal. A
    unit that no quota is stated for gets the one that the headers state: of a minute, or of the time that `accounting`
    knows, unless they name another. State a quota where the provider's window is shorter than that.

    Raises:
        ConfigError: an argument out of range; use on another loop while in use; use after `close`.

    Example:
        >>> gate = Gate("500 requests/minute", "90_000 tokens/minute", concurrency=8)
        >>> gate.statistics().limit
        8
    """

    def __init__(
        self,
        *quotas: Quota | str,
        concurrency: int | Machine | Controller | None = None,
        rate: float | None = None,
        share: float = 1.0,
        accounting: Accounting | str = GENERIC,
        headers: bool = True,
        ramp: Ramp | None = None,
        breaker: Breaker | None = None,
        retry_budget: RetryBudget | None = None,
    ) -> None:
        check_number("share", share, above=0, most=1)
        self._given = _read(quotas)
        self._share = share
        self._accounting = accounting_of(accounting)
        self._heeds = headers is True
        if headers is not True and headers is not False:
            msg = f"headers must be True or False, got {headers!r}"
            raise ConfigError(msg)
        self._ledger = Ledger(self._given, share=share, accounting=self._accounting, make=_meter)
        self._feedback: Feedback | None = None
        limit = cast("int | None", concurrency)
        if callable(concurrency) or hasattr(concurrency, "on_signal"):
            self._feedback = Feedback(cast("Machine | Controller", concurrency), self._put)
            if rate is not None:
                msg = f"rate must not be given besides a controller, which sets it, got {rate!r}"
                raise ConfigError(msg)
            limit, rate = self._feedback.initial.limit, self._feedback.initial.rate
        self._opening = Opening(limit=limit, rate=rate, ramp=ramp, full=self._ledger.rate, breaker=breaker)
        if retry_budget is not None and not isinstance(retry_budget, RetryBudget):
            msg = f"retry_budget must be a RetryBudget or None, got {retry_budget!r}"
            raise ConfigError(msg)
        self.retry_budget = retry_budget
        self._history: deque[SettingChanged] = deque(maxlen=HISTORY)
        self._clock: Clock | None = None
        self._now: Callable[[], float] = _at_zero
        self._lines: Lines[Waiter] = Lines()
        self.main = Lane(self, self._lines.open("main", 1.0))
        self._in_flight = 0
        self._admitted = 0
        self._refused = 0
        self._timer: Handle | None = None
        self._due = 0.0  # when the timer fires
        self._woken: Handle | None = None  # the look that is due in the next turn
        self._pumping = False
        self._passing = False  # the first does not fit, and may be passed by one that does
        self._reason: str | None = None  # what the first in the queue waits for
        self._noted = 0.0  # up to when that is counted
        self._waited: dict[str, float] = {}
        self._spent: dict[str, float] = {}  # seconds of attempts, by what they went to
        self._suspended: float | None = None  # since when nothing starts, because a quota is used up
        self._suspended_for = 0.0  # seconds, before that
        self._events: Subject[Event] = Subject()
        self._closed = False

    def __repr__(self) -> str:
        parts = [repr(name) for name in self._ledger.names[: self._ledger.stated]]
        opening = self._opening
        if opening.limit is not None:
            parts.append(f"concurrency={opening.limit}")
        if opening.pace is not None:
            parts.append(f"rate={opening.pace.rate:g}")
        return f"Gate({', '.join(parts)})"

    def __reduce__(self) -> tuple[Callable[..., Gate], tuple[object, ...]]:
        """Pickle the configuration, never the state."""
        opening, feedback = self._opening, self._feedback
        make = functools.partial(
            Gate,
            concurrency=opening.limit if feedback is None else feedback.controller,
            rate=opening.rate if feedback is None else None,
            share=self._share,
            accounting=self._accounting,
            headers=self._heeds,
            ramp=opening.ramp,
            breaker=opening.breaker,
            retry_budget=self.retry_budget,
        )
        return make, self._given

    # for users

    @property
    def limit(self) -> int | None:
        """Attempts on the wire at a time."""
        return self._opening.limit

    @property
    def in_flight(self) -> int:
        """Attempts on the wire."""
        return self._in_flight

    @property
    def is_shut(self) -> bool:
        """Whether nothing starts for long: closed, the breaker open, or a quota used up for more than a minute."""
        breaker = self._opening.breaker
        return self._closed or self._suspended is not None or (breaker is not None and breaker.state != "closed")

    @property
    def window(self) -> int:
        """Requests that a pipeline keeps in progress through this gate, waiting too: twice the limit and 32."""
        limit = self._opening.limit
        return WINDOW if limit is None else 2 * limit + 32

    @property
    def events(self) -> Observable[Event]:
        """What happens here, from now on, as `rxllm.events`; completes when the gate is closed.

        They come where the pipelines live: on their loop. Nothing is made or kept for those that nobody subscribes to.
        """
        return self._events

    def lane(self, name: str, *, weight: float = 1.0) -> Lane:
        """Return a lane for one class of attempts, to be given to a pipeline instead of the gate.

        Lanes in which somebody waits share what the gate admits in proportion to their weights, by what the attempts
        take of the scarcest quota. A lane that is empty leaves its share to the others. The same name is the same lane,
        with the weight of the last call; the gate itself is the lane "main", of weight 1.

        Args:
            name: what the class is called.
            weight: its share, above 0.

        Raises:
            ConfigError: an argument out of range.

        Example:
            >>> gate = Gate("500 requests/minute")
            >>> gate.lane("grader", weight=3)
            Gate('500 requests per 60 seconds').lane('grader', weight=3)
        """
        check_text("name", name)
        check_number("weight", weight, above=0)
        return Lane(self, self._lines.open(name, weight))

    def set(self, *, limit: int | None = None, rate: float | None = None, reason: str = "set") -> None:
        """Change the concurrency limit or the pace while running; from any thread. None leaves as it is.

        After a cut nothing starts until fewer than the new limit are on the wire. `reason` goes into the event.

        Raises:
            ConfigError: a value out of range.
        """
        opening = self._opening
        opening.set(limit=limit, rate=rate)
        if limit is not None or rate is not None:
            event = SettingChanged(at=self._now(), limit=opening.limit, rate=opening.rate, reason=reason)
            self._here(lambda: self._changed(event))

    def _put(self, setting: Setting) -> None:
        """Do what the controller wants."""
        self._opening.put(limit=setting.limit, rate=setting.rate)
        self._changed(SettingChanged(at=self._now(), limit=setting.limit, rate=setting.rate, reason=setting.reason))

    def _changed(self, event: SettingChanged) -> None:
        _log.debug("limit %s, rate %s: %s", event.limit, event.rate, event.reason)
        self._history.append(event)
        self._wake()
        self._tell(event)

    def _tell(self, event: Event) -> None:
        """Say what happened to those who want to know; what they raise must not cost anybody a place."""
        if self._events.observers:
            try:
                self._events.on_next(event)
            except Exception:
                _log.warning("%r: a subscriber of the events failed", self, exc_info=True)

    def _here(self, action: Callable[[], None]) -> None:
        """Call `action` where those who wait are."""
        clock = self._clock
        if clock is None or clock.is_here() or clock.is_over():
            action()
        else:
            clock.post(action)

    def statistics(self) -> GateStatistics:
        """Return what the gate does now, and what it has done; from any thread."""
        now = self._now()
        lines, opening = self._lines, self._opening
        waited = self._waited.copy()
        if self._reason is not None:
            waited[self._reason] = waited.get(self._reason, 0.0) + now - self._noted
        return GateStatistics(
            limit=opening.limit,
            rate=None if opening.pace is None else opening.pace.rate,
            in_flight=self._in_flight,
            waiting=lines.waiting,
            admitted=self._admitted,
            refused=self._refused,
            quotas=self._ledger.statistics(now),
            lanes=tuple(
                LaneStatistics(name=line.name, weight=line.weight, waiting=line.waiting, admitted=line.started)
                for line in lines
            ),
            waited=waited,
            malformed=self._ledger.malformed,
            resumes_in=max(0.0, self._due - now)
            if self._timer is not None and self._reason in self._ledger.names
            else None,
            suspended=self.suspended(),
            settings=tuple(self._history),
        )

    def explain(self) -> Explanation:
        """Return where the time of the attempts went, and what limits them now; `print` it."""
        now = self._now()
        fill = self._ledger.fill(now)
        reason = self._reason
        if reason is None:
            binding = "nothing here: nobody waits" if self._in_flight else "nothing: nothing is asked for"
        elif reason in fill:
            binding = f"{reason}: {fill[reason]:.0%}"
        elif reason == "concurrency":
            binding = f"concurrency: {self._in_flight} of {self._opening.limit} on the wire"
        else:
            binding = reason
        return Explanation(binding=binding, seconds=self._spent.copy(), fill=fill)

    def close(self) -> None:
        """Admit nothing any more. Attempts on the wire end as they do; those that wait get a `ConfigError`."""
        self._closed = True
        self._here(self._end)

    def _end(self) -> None:
        self._turn_away(self._is_closed())
        for gauge in self._outside():
            gauge.close()
        if self._feedback is not None:
            self._feedback.close()
        self._events.on_completed()

    def _turn_away(self, error: CallError | ConfigError) -> None:
        """Give all that wait `error`."""
        waiters = self._lines.all()
        try:
            while waiters:
                self._refuse(waiters.pop(0), error)
        except BaseException:  # a callback of one pipeline raised: the others learn it too
            self._clock_in_use().call_soon(lambda: self._turn_away(error))
            raise
        finally:
            if not self._lines.waiting:
                self._rest()

    def _refuse(self, waiter: Waiter, error: CallError | ConfigError) -> None:
        applicant, waiter.applicant = waiter.applicant, None
        if applicant is not None:
            self._lines.left(waiter.line)
            applicant.turned_away(error)

    def __enter__(self) -> Self:
        """Return the gate; it closes at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    # for operators

    @property
    def units(self) -> tuple[str, ...]:
        """What the quotas count."""
        return self._ledger.units

    def amounts(self, cost: Mapping[str, float]) -> tuple[float, ...]:
        """Return what `cost` takes of each quota; see `Ledger.amounts`, also for what it raises."""
        return self._ledger.amounts(cost)

    def suspended(self) -> float:
        """Return the seconds in which nothing could start for more than a minute, because a quota is used up."""
        since = self._suspended
        return self._suspended_for if since is None else self._suspended_for + self._now() - since

    def admits_now(self, clock: Clock, amounts: tuple[float, ...]) -> bool:
        """Say whether an attempt that came now would start at once, past nobody who waits.

        Args:
            clock: of the pipeline that asks.
            amounts: what `amounts(cost)` returned.

        Raises:
            ConfigError: in use on another loop.
        """
        if clock is not self._clock:
            self._bind(clock)
        if self._closed or self._lines.waiting or self._pumping:
            return False
        now = self._now()
        return self._opening.held(self._in_flight, now) is None and self._ledger.full(amounts, now) is None

    def apply(
        self,
        clock: Clock,
        amounts: tuple[float, ...],
        applicant: Applicant,
        arrival: int | None = None,
        lane: Lane | None = None,
    ) -> Waiter:
        """Return a waiter, which has its place in the queue when it is given to `enter`.

        Args:
            clock: of the pipeline that asks.
            amounts: what `amounts(cost)` returned.
            applicant: takes the lease.
            arrival: the place in the queue that an earlier waiter of the same request had (`waiter.arrival`).
            lane: the class that it belongs to.

        Raises:
            ConfigError: closed; or in use on another loop.
        """
        if clock is not self._clock:
            self._bind(clock)
        if self._closed:
            raise self._is_closed()
        line = self.main.line if lane is None else lane.line
        return Waiter(self, line, next(_arrivals) if arrival is None else arrival, amounts, applicant, clock.seconds())

    def enter(self, waiter: Waiter) -> None:
        """Wait for admission: `waiter.applicant.admitted(lease)` is called once, perhaps before this returns."""
        now = waiter.since
        lines = self._lines
        if not lines.waiting and not self._pumping:
            reason: str | None = self._opening.held(self._in_flight, now)
            if reason is None:
                full = self._ledger.full(waiter.amounts, now)
                if full is None:
                    applicant, waiter.applicant = waiter.applicant, None
                    if applicant is not None:
                        applicant.admitted(self._book(waiter, now))
                    return
                reason = self._ledger.names[full]
            self._noted = now
            self._reason = reason
            self._passing = False
        else:
            self._note(now)
        waiter.before = self._waited.copy()
        first = lines.enter(waiter.line, waiter)
        if first or (self._passing and (lines.waiting <= LOOK + 1 or waiter.line.queue[-1] is not waiter)):
            self._wake()

    def settle(self, lease: Lease, ending: Ending, used: Mapping[str, float] | None, error: Exception | None) -> None:
        """Take a lease back; its own method calls this."""
        self._in_flight -= 1
        if ending == "refused":
            self._refused += 1
            if self._refused == 1:
                _log.warning("%r: the provider has refused an attempt; further ones are counted in statistics()", self)
        now = self._now()
        self._spent["network"] = self._spent.get("network", 0.0) + now - lease.at
        if lease.tickets:
            self._ledger.settle(lease.amounts, lease.tickets, ending, used, now, sent=lease.at)
        if self._events.observers:
            self._tell(Ended(at=now, ending=ending, seconds=now - lease.at, in_flight=self._in_flight))
        if self._feedback is not None or self._opening.breaker is not None:
            kind = kind_of(ending, error)
            if kind is not None and self._opening.breaker is not None:
                self._judge(self._opening.breaker, kind, lease, now)
            if self._feedback is not None:
                tokens = 0.0 if used is None else used.get("tokens", 0.0)
                self._ended(self._feedback, lease, kind, tokens, error)
        if ending == "unsent" and lease.start is not None and self._opening.pace is not None:
            self._opening.pace.refund(lease.start)
        if self._lines.waiting:
            self._wake()

    def used(self, usage: Usage) -> Mapping[str, float]:
        """Return what a reply has used, by unit, as the provider counts; nothing if it does not say."""
        found: dict[str, float] = {}
        if usage.total_tokens:
            found = self._accounting.used(usage.input_tokens, usage.output_tokens, cached=usage.cached_tokens)
        return found if usage.units is None else {**found, **usage.units}

    def observe(self, limits: Limits, sent: float) -> None:
        """Take over what the headers of a reply say of the quotas.

        Args:
            limits: what they say.
            sent: when its attempt was admitted.
        """
        self._ledger.malformed += limits.malformed
        if not self._heeds:
            return
        now = self._now()
        for quota in self._ledger.observe(limits, sent, now):
            _log.info("%r: learned a quota from the headers of a reply: %s", self, quota)
            self._tell(Learned(at=now, quota=quota))
        if self._lines.waiting:
            self._wake()

    def backed_off(self, seconds: float) -> None:
        """Count the time between two attempts of a request, for `explain`."""
        self._spent["back-off"] = self._spent.get("back-off", 0.0) + seconds

    def pause(self, seconds: float) -> None:
        """Admit nothing for a while: a refusal said so. One hint closes the gate for at most 2 s.

        With a controller it does nothing.
        """
        if self._feedback is not None:
            return  # it has its own answer to a refusal: each pause would take capacity that it has found
        now = self._now()
        paused = self._opening.pause(seconds, now)
        if paused:
            self._tell(Paused(at=now, seconds=paused))

    def cancelled(self, waiter: Waiter) -> None:
        """Forget a waiter that has left; its own method calls this."""
        line = waiter.line
        first = line.queue[0] is waiter
        self._lines.left(line)
        line.sweep()
        if not self._lines.waiting:
            self._note(self._now())
            self._rest()
        elif first or self._passing:  # another one is the first now, or comes into view
            self._wake()

    # admission

    def _bind(self, clock: Clock) -> None:
        before = self._clock
        if before is not None and before.is_over():  # whoever was here is gone with the loop
            self._in_flight = 0
            self._lines.drop()
            self._rest()
        if self._in_flight or self._lines.waiting:
            msg = f"{self!r} is in use on {before!r} and cannot be used on {clock!r} at the same time"
            raise ConfigError(msg)
        if before is not None and not (before.threads and clock.threads):  # virtual time has a zero of its own
            for gauge in self._outside():
                gauge.close()
            self._ledger.renew()
            self._opening.renew()
        for gauge in self._outside():
            try:
                gauge.bind(clock, wake=self._wake, fail=self._turn_away, tell=self._tell)
            except ConfigError as error:
                error.halts = True  # it will not do for the next request either
                raise
        self._clock = clock
        self._now = clock.seconds
        if self._feedback is not None:
            self._feedback.bind(clock)

    def _outside(self) -> list[OutsideMeter]:
        """Return the meters that have I/O behind them."""
        rows = zip(self._ledger.quotas, self._ledger.meters, strict=False)
        return [cast("OutsideMeter", gauge) for quota, gauge in rows if quota.store or quota.state]

    def _clock_in_use(self) -> Clock:
        assert self._clock is not None  # noqa: S101  somebody waits
        return self._clock

    def _is_closed(self) -> ConfigError:
        return ConfigError(f"{self!r} is closed")

    def _book(self, waiter: Waiter, now: float) -> Lease:
        amounts = waiter.amounts
        tickets = self._ledger.book(amounts, now)
        pace = self._opening.pace
        start = None if pace is None else pace.book(now)
        self._in_flight += 1
        self._admitted += 1
        waiter.line.started += 1
        if not self._lines.single:
            self._lines.charge(waiter.line, self._ledger.weigh(amounts))
        if self._events.observers:
            self._tell(Admitted(at=now, waited=now - waiter.since, in_flight=self._in_flight))
        lease = Lease(self, amounts, tickets, start, now)
        if self._opening.breaker is not None:
            self._opening.breaker.start(now)
        if self._feedback is not None:
            self._started(self._feedback, lease, now)
        return lease

    # the breaker and the controller

    def _judge(self, breaker: Breaker, kind: Kind, lease: Lease, now: float) -> None:
        """Tell the breaker how an attempt ended; a refusal says that the server is there, and no more."""
        if kind in GOOD:
            changed = breaker.succeed(now, now - lease.at)
        elif kind in BAD:
            changed = breaker.fail(now)
        else:
            return
        if changed:
            is_open = breaker.state != "closed"
            reason = f"no answer for {now - breaker.silent_since:.0f} s" if is_open else "answered again"
            _log.warning("%r: the breaker is %s: %s", self, "open" if is_open else "closed", reason)
            self._tell(BreakerChanged(at=now, is_open=is_open, reason=reason))
        if self._lines.waiting:
            self._wake()

    def _started(self, feedback: Feedback, lease: Lease, now: float) -> None:
        feedback.wake()
        lease.epoch = feedback.epoch
        lease.in_flight = self._in_flight
        feedback.tell(
            Signal(at=now, kind="start", in_flight=lease.in_flight, epoch=lease.epoch, binding=self._is_bound())
        )

    def _ended(
        self, feedback: Feedback, lease: Lease, kind: Kind | None, tokens: float, error: Exception | None
    ) -> None:
        if kind is not None:
            now = self._now()
            hint: object = getattr(error, "retry_after", None)
            feedback.tell(
                Signal(
                    at=now,
                    kind=kind,
                    in_flight=lease.in_flight,
                    epoch=lease.epoch,
                    seconds=now - lease.at,
                    tokens=tokens,
                    binding=self._is_bound(),
                    retry_after=hint if isinstance(hint, int | float) else None,
                )
            )
        if not self._in_flight and not self._lines.waiting:
            feedback.rest()

    def _is_bound(self) -> bool:
        """Say whether somebody waits because of the limit or the rate."""
        return self._lines.waiting > 0 and self._reason in OWN

    def _wake(self) -> None:
        """Have a look in the next turn, if somebody waits."""
        if self._lines.waiting and self._woken is None and not self._pumping:
            self._woken = self._clock_in_use().call_soon(self._pump)

    def _pump(self) -> None:
        """Admit whoever may start now, and arm the timer for the next one."""
        self._woken = None
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._lines.waiting and not self._closed:
                now = self._now()
                self._note(now)
                waiter = self._choose(now)
                if waiter is None:
                    break
                self._hand_over(waiter, now)
        except BaseException:
            self._pumping = False
            self._wake()  # a callback of one pipeline raised: the others go on
            raise
        finally:
            self._pumping = False
            if not self._lines.waiting:
                self._rest()

    def _choose(self, now: float) -> Waiter | None:
        """Return who may start now; for nobody arm the timer."""
        held = self._opening.held(self._in_flight, now)
        self._passing = False
        if held == "breaker" and self._opening.breaker is not None and self._opening.breaker.stop:
            self._turn_away(BreakerError("nothing was answered for long, and the breaker is open"))
            return None
        if held is not None:
            self._reason = held
            self._arm(self._opening.opens_at(held, now), now)
            return None
        ledger, lines = self._ledger, self._lines
        while lines.waiting:
            head = lines.first()
            full = ledger.full(head.amounts, now)
            if full is None:
                return head
            error = ledger.refusal(full, head.amounts[full], now)
            if error is None:
                return self._look_behind(head, full, now)
            self._refuse(head, error)
        return None

    def _look_behind(self, head: Waiter, full: int, now: float) -> Waiter | None:
        """Return one behind `head` that fits although `head` does not, while `head` may be passed."""
        ledger = self._ledger
        self._reason = ledger.names[full]
        head.stuck = min(head.stuck, now)
        self._passing = head.passed < PASSES and now - head.stuck < ledger.quotas[full].per
        wanted = head.amounts[full]
        least = {full: wanted}  # of each quota that is in the way of somebody: how much must come free
        behind = self._lines.others(head, head.line) if self._passing else ()
        for waiter in itertools.islice(behind, LOOK):
            if len(waiter.amounts) > full and waiter.amounts[full] >= wanted:
                continue
            other = ledger.full(waiter.amounts, now)
            if other is None:
                head.passed += 1
                return waiter
            least[other] = min(least.get(other, math.inf), waiter.amounts[other])
        at = min(ledger.meters[number].ready_at(amount, now) for number, amount in least.items())
        if LONG < at - now < math.inf and self._suspended is None:
            self._suspend(full, at - now, now)
        self._arm(at, now)
        return None

    def _suspend(self, full: int, seconds: float, now: float) -> None:
        self._suspended = now
        name, quota = self._ledger.names[full], self._ledger.quotas[full]
        _log.warning("%r: %s is used up; the next attempt starts in %.0f s", self, name, seconds)
        self._tell(Suspended(at=now, quota=quota, seconds=seconds))

    def _resume(self, now: float) -> None:
        since, self._suspended = self._suspended, None
        if since is not None:
            self._suspended_for += now - since
            self._tell(Resumed(at=now, seconds=now - since))

    def _hand_over(self, waiter: Waiter, now: float) -> None:
        applicant, waiter.applicant = waiter.applicant, None
        self._lines.left(waiter.line)
        if self._suspended is not None:
            self._resume(now)
        lease = self._book(waiter, now)
        waited, before = self._waited, waiter.before
        if waited != before:
            for reason, seconds in waited.items():
                own = seconds - before.get(reason, 0.0)
                if own > 0:
                    lease.waited[reason] = own
                    self._spent[reason] = self._spent.get(reason, 0.0) + own
        if applicant is not None:
            applicant.admitted(lease)

    def _rest(self) -> None:
        """Leave nothing behind: nobody waits any more."""
        self._lines.clear()
        if self._suspended is not None:
            self._resume(self._now())
        self._reason = None
        self._disarm()
        if self._feedback is not None and not self._in_flight:
            self._feedback.rest()
        if self._woken is not None:
            self._woken.cancel()
            self._woken = None

    def _note(self, now: float) -> None:
        """Count the time since the last look for what the first in the queue waited for."""
        if self._reason is not None and now > self._noted:
            self._waited[self._reason] = self._waited.get(self._reason, 0.0) + now - self._noted
        self._noted = now

    # the one timer

    def _arm(self, at: float, now: float) -> None:
        due = max(at, now + LEAST)
        if due == math.inf:  # nothing that time brings can help
            self._disarm()
            return
        if self._timer is not None:
            if now < self._due <= due:
                return  # it fires early enough and looks again
            self._timer.cancel()
        delay = due - now
        if now + delay < due:  # rounded to even, as in 0.1 + (0.35 - 0.1): it would wake a bit early, and once more
            delay = math.nextafter(due, math.inf) - now
        self._due = due
        self._timer = self._clock_in_use().call_later(delay, self._fire)

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _fire(self) -> None:
        self._timer = None
        self._pump()


def _at_zero() -> float:
    return 0.0


def _read(quotas: tuple[Quota | str, ...]) -> tuple[Quota, ...]:
    found: list[Quota] = []
    for quota in quotas:
        if isinstance(quota, Quota):
            found.append(quota)
        elif isinstance(quota, str):
            found.extend(parse_quotas(quota))
        else:
            msg = f'a quota must be a Quota or a text such as "500 requests/minute", got {quota!r}'
            raise ConfigError(msg)
    return tuple(found)


def _meter(quota: Quota, most: float | None) -> Meter:
    """Return a new meter for `quota`; what few need is imported when it is needed."""
    if quota.store is not None:
        from rxllm.stores.shared_quota import shared_meter  # noqa: PLC0415

        return shared_meter(quota)
    if quota.state is not None:
        from rxllm.stores.state import kept_meter  # noqa: PLC0415

        return kept_meter(quota)
    return meter(quota, most=most)


def _rebuild_lane(gate: Gate, name: str, weight: float) -> Lane:
    return gate.lane(name, weight=weight)
