"""Where attempts wait: quotas, a pace and a concurrency limit behind one admission.

    attempt ──▶ request ──▶ [ first arrival first ] ──▶ lease ──▶ on the wire ──▶ settle
                               ▲ one timer, one look at all limits, no await in between

Admission is one synchronous step: it looks at every limit, and books in all or in none. What a try costs in the end is
decided when its lease is settled, by how it ended (`policies.accounting`).

What may let others start (an attempt ends, the first in the queue leaves, a setting changes) is looked at in the next
turn of the loop, once for all of it: a pipeline that is disposed takes its own out of the queue before any of them gets
the places of the others, and whoever ends an attempt never runs the code of another one.
"""

from __future__ import annotations

import itertools
import logging
import math
import sys
from bisect import insort
from collections import deque
from typing import TYPE_CHECKING, Protocol, Self

import msgspec

from rxllm.errors import CallError, ConfigError, InvalidRequestError, check_number
from rxllm.policies.accounting import GENERIC, Accounting, Ending, accounting_of
from rxllm.policies.headers import Limits, Truth
from rxllm.policies.meters import Meter, meter
from rxllm.policies.pace import Pace, PaceTicket
from rxllm.policies.quota import Quota, parse_quotas
from rxllm.policies.ramp import Ramp
from rxllm.policies.sliding import Ticket

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rxllm.clock import Clock, Handle
    from rxllm.messages import Usage

__all__ = ["Explanation", "Gate", "GateStatistics", "Lease", "QuotaStatistics", "Waiter"]

PASSES = 32  # how many later ones may go before one that does not fit
UNPAID = ("unsent", "refused")  # what may cost less than was reserved although the provider says nothing
LOOK = 32  # how many of those behind it are looked at for one that does
LEAST = 0.001  # seconds: no timer is armed for less
LONGEST_PAUSE = 2.0  # seconds that one refusal's hint may close the gate for all
NUMBERS = frozenset({float, int})
WINDOW = 256  # requests in progress per pipeline when the gate has no concurrency limit
LONG = 60.0  # seconds: a longer wait for a quota is worth a line in the log
LEARNED = frozenset({"requests", "tokens", "input_tokens", "output_tokens"})  # units of which costs are known

_arrivals = itertools.count(1)
_log = logging.getLogger("rxllm.gate")


class QuotaStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """How full one quota is."""

    quota: Quota
    available: float  # in its unit; below zero it is a debt
    learned: bool  # from the headers of replies: nobody stated it


class GateStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a gate does now, and what it has done."""

    limit: int | None
    rate: float | None  # starts per second
    in_flight: int
    waiting: int
    admitted: int
    refused: int
    quotas: tuple[QuotaStatistics, ...]
    waited: dict[str, float]  # seconds in which the first in the queue waited, by what it waited for
    malformed: int  # limit headers of replies that could not be understood
    resumes_in: float | None  # seconds until the next look while a quota is used up; None: none is


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of the attempts went, and what limits them now. `print` it."""

    binding: str  # what limits, with how full it is: "90000 tokens per 60 seconds: 97 %"; or what else it is
    seconds: dict[str, float]  # of all attempts together: by what they waited for, in "back-off", on the "network"
    fill: dict[str, float]  # quota -> share of it that is used, 0 to 1

    def __str__(self) -> str:
        """Return some lines for a person."""
        total = sum(self.seconds.values()) or 1.0
        parts = sorted(self.seconds.items(), key=lambda part: -part[1])
        times = [f"  {seconds / total:4.0%}  {seconds:9.1f} s  {reason}" for reason, seconds in parts]
        fills = [f"  {fill:4.0%}  of {name}" for name, fill in self.fill.items()]
        return "\n".join([f"limited by {self.binding}", "time of all attempts:", *times, "quotas in use:", *fills])


class Lease:
    """A place on the wire, and what was booked for it. Settle it once; again is harmless."""

    __slots__ = ("_gate", "amounts", "at", "start", "tickets", "waited")

    def __init__(
        self, gate: Gate, amounts: tuple[float, ...], tickets: list[Ticket], start: PaceTicket | None, at: float
    ) -> None:
        self._gate: Gate | None = gate
        self.amounts = amounts  # in the order of the gate's quotas
        self.tickets = tickets  # in the same order
        self.start = start  # in the pace, if there was one
        self.at = at  # when it was admitted
        self.waited: dict[str, float] = {}  # seconds, by what it waited for

    def settle(self, ending: Ending, used: Mapping[str, float] | None = None) -> None:
        """Give the place back and make the bookings what the try really cost.

        Args:
            ending: how the try ended.
            used: unit -> what the provider says it used; a unit that is missing is unknown.
        """
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.settle(self, ending, used)


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

    __slots__ = ("amounts", "applicant", "arrival", "before", "gate", "passed", "since", "stuck")

    def __init__(
        self, gate: Gate, arrival: int, amounts: tuple[float, ...], applicant: Applicant, since: float
    ) -> None:
        self.gate = gate
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


class Gate:
    """Quotas, a pace and a concurrency limit for all who use one key. Share it between pipelines.

    Attempts are admitted in the order in which their requests first came, so a retry goes before younger requests. One
    that does not fit into a quota may be passed by smaller ones, at most 32 times and for one window; then it is waited
    for. Of those behind it the first 32 are looked at.

    Args:
        quotas: `Quota`s, or texts such as "500 requests/minute" or "90_000 tokens/minute; 10/second".
        concurrency: attempts on the wire at a time, >= 1; None: no limit.
        rate: starts per second, evenly spaced, > 0; None: no pace.
        share: the part of each quota that is this gate's, above 0 to 1: others use the same key.
        accounting: how the provider counts, an `Accounting` or a name in `policies.ACCOUNTING`.
        headers: whether to heed the limit headers of replies.
        ramp: a slow start, for servers that grow with their load: to `rate`, else to the lowest rate that the quotas of
            requests allow. It begins with the first attempt.

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
        concurrency: int | None = None,
        rate: float | None = None,
        share: float = 1.0,
        accounting: Accounting | str = GENERIC,
        headers: bool = True,
        ramp: Ramp | None = None,
    ) -> None:
        check_number("concurrency", concurrency, least=1, integer=True, optional=True)
        check_number("rate", rate, above=0, optional=True)
        check_number("share", share, above=0, most=1)
        self._given = _read(quotas)
        self._share = share
        self._accounting = accounting_of(accounting)
        self._quotas = tuple(
            _part(counted, share) for quota in self._given for counted in self._accounting.quotas(quota)
        )
        self._heeds = headers is True
        if headers is not True and headers is not False:
            msg = f"headers must be True or False, got {headers!r}"
            raise ConfigError(msg)
        self._stated = len(self._quotas)  # those after them were learned from headers
        self._matches: dict[tuple[str, float | None], int | None] = {}  # what a header says -> which quota it is about
        self._units = tuple(quota.unit for quota in self._quotas)
        self._names = tuple(str(quota) for quota in self._quotas)
        self._meters: tuple[Meter, ...] = tuple(meter(quota) for quota in self._quotas)
        self._limit = concurrency
        self._pace = None if rate is None else Pace(rate, slack=LEAST)
        self._rate = rate  # the stated one: a ramp has others on its way there
        self._ramp = ramp
        self._ramp_began: float | None = None
        if ramp is not None and (not isinstance(ramp, Ramp) or self._full_rate() == math.inf):
            msg = f"ramp must be a Ramp to a rate or to a quota of requests, got {ramp!r} and neither"
            if not isinstance(ramp, Ramp):
                msg = f"ramp must be a Ramp, got {ramp!r}"
            raise ConfigError(msg)
        self._pause_until = 0.0
        self._clock: Clock | None = None
        self._now: Callable[[], float] = _at_zero
        self._queue: deque[Waiter] = deque()  # by arrival; those that are gone stay until they are come to
        self._waiting = 0  # those not gone
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
        self._malformed = 0
        self._suspended = 0.0  # until when a log line has said that nothing starts
        self._closed = False

    def __repr__(self) -> str:
        parts = [repr(name) for name in self._names[: self._stated]]
        if self._limit is not None:
            parts.append(f"concurrency={self._limit}")
        if self._pace is not None:
            parts.append(f"rate={self._pace.rate:g}")
        return f"Gate({', '.join(parts)})"

    def __reduce__(self) -> tuple[Callable[..., Gate], tuple[object, ...]]:
        """Pickle the configuration, never the state."""
        given = (self._given, self._limit, self._rate, self._share, self._accounting, self._heeds, self._ramp)
        return _rebuild, given

    # for users

    @property
    def limit(self) -> int | None:
        """Attempts on the wire at a time."""
        return self._limit

    @property
    def window(self) -> int:
        """Requests that a pipeline keeps in progress through this gate, waiting too: twice the limit and 32."""
        return WINDOW if self._limit is None else 2 * self._limit + 32

    def set(self, *, limit: int | None = None, rate: float | None = None) -> None:
        """Change the concurrency limit or the pace while running; from any thread. None leaves as it is.

        After a cut nothing starts until fewer than the new limit are on the wire.

        Raises:
            ConfigError: a value out of range.
        """
        check_number("limit", limit, least=1, integer=True, optional=True)
        check_number("rate", rate, above=0, optional=True)
        if limit is not None:
            self._limit = limit
        if rate is not None:
            self._rate = rate
            if self._pace is None:
                self._pace = Pace(rate, slack=LEAST)
            else:
                self._pace.rate = rate
        self._here(self._wake)

    def _here(self, action: Callable[[], None]) -> None:
        """Call `action` where those who wait are."""
        clock = self._clock
        if clock is None or clock.is_here():
            action()
        else:
            clock.post(action)

    def statistics(self) -> GateStatistics:
        """Return what the gate does now, and what it has done; from any thread."""
        now = self._now()
        waited = self._waited.copy()
        if self._reason is not None:
            waited[self._reason] = waited.get(self._reason, 0.0) + now - self._noted
        return GateStatistics(
            limit=self._limit,
            rate=None if self._pace is None else self._pace.rate,
            in_flight=self._in_flight,
            waiting=self._waiting,
            admitted=self._admitted,
            refused=self._refused,
            quotas=tuple(
                QuotaStatistics(quota=quota, available=gauge.available(now), learned=number >= self._stated)
                for number, (quota, gauge) in enumerate(zip(self._quotas, self._meters, strict=True))
            ),
            waited=waited,
            malformed=self._malformed,
            resumes_in=max(0.0, self._due - now) if self._timer is not None and self._reason in self._names else None,
        )

    def explain(self) -> Explanation:
        """Return where the time of the attempts went, and what limits them now; `print` it."""
        now = self._now()
        fill = {
            name: 1.0 - gauge.available(now) / gauge.limit if gauge.limit else 1.0
            for name, gauge in zip(self._names, self._meters, strict=True)
        }
        reason = self._reason
        if reason is None:
            binding = "nothing here: nobody waits" if self._in_flight else "nothing: nothing is asked for"
        elif reason in fill:
            binding = f"{reason}: {fill[reason]:.0%}"
        elif reason == "concurrency":
            binding = f"concurrency: {self._in_flight} of {self._limit} on the wire"
        else:
            binding = reason
        return Explanation(binding=binding, seconds=self._spent.copy(), fill=fill)

    def close(self) -> None:
        """Admit nothing any more. Attempts on the wire end as they do; those that wait get a `ConfigError`."""
        self._closed = True
        self._here(self._turn_away)

    def _turn_away(self) -> None:
        try:
            while self._waiting:
                waiter = self._queue.popleft()
                applicant, waiter.applicant = waiter.applicant, None
                if applicant is not None:
                    self._waiting -= 1
                    applicant.turned_away(self._is_closed())
        except BaseException:
            self._clock_in_use().call_soon(
                self._turn_away
            )  # a callback of one pipeline raised: the others learn it too
            raise
        finally:
            if not self._waiting:
                self._rest()

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
        return self._units

    def amounts(self, cost: Mapping[str, float]) -> tuple[float, ...]:
        """Return what `cost` (unit -> amount; one request unless it says otherwise) takes of each quota.

        Raises:
            ConfigError: a quota counts a unit that the cost does not name, so it could not be kept; or a bad amount.
            InvalidRequestError: more than a quota can ever admit.
        """
        found: list[float] = []
        for unit, gauge, name in zip(self._units, self._meters, self._names):  # noqa: B905  made together; this is hot
            amount = cost.get(unit, 1.0 if unit == "requests" else None if len(found) < self._stated else 0.0)
            if amount is not None and type(amount) in NUMBERS and amount >= 0 and not gauge.too_large(amount):
                found.append(amount)
                continue
            if amount is None:
                msg = f"the quota {name} counts {unit}, and the cost names only {', '.join(cost) or 'nothing'}"
                raise ConfigError(msg)
            if type(amount) not in NUMBERS or not 0 <= amount <= sys.float_info.max:
                check_number(f"the cost in {unit}", amount, least=0)
            if gauge.too_large(amount):
                msg = f"needs {amount:,g} {unit}, and the quota {name} never admits more than {gauge.limit:,g}"
                raise InvalidRequestError(msg)
            found.append(amount)
        return tuple(found)

    def apply(
        self, clock: Clock, amounts: tuple[float, ...], applicant: Applicant, arrival: int | None = None
    ) -> Waiter:
        """Return a waiter, which has its place in the queue when it is given to `enter`.

        Args:
            clock: of the pipeline that asks.
            amounts: what `amounts(cost)` returned.
            applicant: takes the lease.
            arrival: the place in the queue that an earlier waiter of the same request had (`waiter.arrival`).

        Raises:
            ConfigError: closed; or in use on another loop.
        """
        if clock is not self._clock:
            self._bind(clock)
        if self._closed:
            raise self._is_closed()
        return Waiter(self, next(_arrivals) if arrival is None else arrival, amounts, applicant, clock.seconds())

    def enter(self, waiter: Waiter) -> None:
        """Wait for admission: `waiter.applicant.admitted(lease)` is called once, perhaps before this returns."""
        now = waiter.since
        if not self._waiting and not self._pumping:
            reason = self._held_back(now)
            if reason is None:
                full = self._full(waiter.amounts, now)
                if full is None:
                    applicant, waiter.applicant = waiter.applicant, None
                    if applicant is not None:
                        applicant.admitted(self._book(waiter.amounts, now))
                    return
                reason = self._names[full]
            self._noted = now
            self._reason = reason
            self._passing = False
        else:
            self._note(now)
        waiter.before = self._waited.copy()
        self._waiting += 1
        queue = self._queue
        if queue and waiter.arrival < queue[-1].arrival:
            insort(queue, waiter)
        else:
            queue.append(waiter)
        if queue[0] is waiter or (self._passing and (self._waiting <= LOOK + 1 or queue[-1] is not waiter)):
            self._wake()

    def settle(self, lease: Lease, ending: Ending, used: Mapping[str, float] | None) -> None:
        """Take a lease back; its own method calls this."""
        self._in_flight -= 1
        if ending == "refused":
            self._refused += 1
            if self._refused == 1:
                _log.warning("%r: the provider has refused an attempt; further ones are counted in statistics()", self)
        now = self._now()
        self._spent["network"] = self._spent.get("network", 0.0) + now - lease.at
        if lease.tickets:
            rows = zip(self._units, self._meters, lease.amounts, lease.tickets)  # noqa: B905  made together; this is hot
            for unit, gauge, amount, ticket in rows:
                actual = None if used is None else used.get(unit)
                if actual is not None or ending in UNPAID or self._accounting.cells:
                    actual = self._accounting.charge(ending, unit, amount, actual)
                    if actual != amount:
                        gauge.settle(ticket, actual, now)
        if ending == "unsent" and lease.start is not None and self._pace is not None:
            self._pace.refund(lease.start)
        if self._waiting:
            self._wake()

    def used(self, usage: Usage) -> Mapping[str, float]:
        """Return what a reply has used, by unit, as the provider counts; nothing if it does not say."""
        if not usage.total_tokens:
            return {}
        return self._accounting.used(usage.input_tokens, usage.output_tokens, cached=usage.cached_tokens)

    def observe(self, limits: Limits, sent: float) -> None:
        """Take over what the headers of a reply say of the quotas.

        Args:
            limits: what they say.
            sent: when its attempt was admitted.
        """
        self._malformed += limits.malformed
        if not self._heeds:
            return
        now = self._now()
        for truth in limits.truths:
            number = self._about(truth)
            if number is not None and truth.least is not None:
                self._meters[number].rebase(truth.least, truth.reset, now, limit=truth.limit, sent=sent)
        if self._waiting:
            self._wake()

    def backed_off(self, seconds: float) -> None:
        """Count the time between two attempts of a request, for `explain`."""
        self._spent["back-off"] = self._spent.get("back-off", 0.0) + seconds

    def _about(self, truth: Truth) -> int | None:
        """Return which quota a statement is about; one that is new becomes one, if its unit is that of costs."""
        key = (truth.unit, truth.window)
        if key in self._matches:
            return self._matches[key]
        same = [number for number, quota in enumerate(self._quotas) if quota.unit == truth.unit]
        wanted = self._accounting.window(truth.unit) if truth.window is None else truth.window
        fitting = [number for number in same if truth.window is None or math.isclose(self._quotas[number].per, wanted)]
        number: int | None = None
        if fitting:
            number = min(fitting, key=lambda number: abs(self._quotas[number].per - wanted))
        elif not same and truth.unit in LEARNED and truth.limit is not None:
            strategy = "bucket" if self._accounting is GENERIC else self._accounting.strategy  # no stricter than any
            number = self._learn(Quota(truth.limit, per=wanted, unit=truth.unit, strategy=strategy))
        elif truth.limit is None:
            return None  # a later reply may say more
        self._matches[key] = number
        return number

    def _learn(self, quota: Quota) -> int:
        """Keep a quota that only the server has stated."""
        _log.info("%r: learned a quota from the headers of a reply: %s", self, quota)
        self._quotas = (*self._quotas, quota)
        self._meters = (*self._meters, meter(quota, most=math.inf))
        self._units = (*self._units, quota.unit)
        self._names = (*self._names, str(quota))
        for waiter in self._queue:
            waiter.amounts = (*waiter.amounts, 0.0)  # those that wait already were not priced in it
        return len(self._quotas) - 1

    def pause(self, seconds: float) -> None:
        """Admit nothing for a while: a refusal said so. One hint closes the gate for at most 2 s."""
        self._pause_until = max(self._pause_until, self._now() + min(seconds, LONGEST_PAUSE))

    def cancelled(self, waiter: Waiter) -> None:
        """Forget a waiter that has left; its own method calls this."""
        first = self._queue[0] is waiter
        self._waiting -= 1
        self._sweep()
        if not self._waiting:
            self._note(self._now())
            self._rest()
        elif first or self._passing:  # another one is the first now, or comes into view
            self._wake()

    # admission

    def _bind(self, clock: Clock) -> None:
        before = self._clock
        if self._in_flight or self._waiting:
            msg = f"{self!r} is in use on {before!r} and cannot be used on {clock!r} at the same time"
            raise ConfigError(msg)
        if before is not None and not (before.threads and clock.threads):  # virtual time has a zero of its own
            self._meters = tuple(
                meter(quota) if number < self._stated else meter(quota, most=math.inf)
                for number, quota in enumerate(self._quotas)
            )
            self._pace = None if self._pace is None else Pace(self._pace.rate, slack=LEAST)
            self._pause_until = 0.0
        self._clock = clock
        self._now = clock.seconds

    def _clock_in_use(self) -> Clock:
        assert self._clock is not None  # noqa: S101  somebody waits
        return self._clock

    def _is_closed(self) -> ConfigError:
        return ConfigError(f"{self!r} is closed")

    def _held_back(self, now: float) -> str | None:
        """Return what keeps everybody back now, whatever an attempt costs."""
        if self._limit is not None and self._in_flight >= self._limit:
            return "concurrency"
        if self._ramp is not None:
            self._climb(self._ramp, now)
        if self._pace is not None and self._pace.ready_at(now) > now:
            return "pace"
        if now < self._pause_until:
            return "pause"
        return None

    def _full_rate(self) -> float:
        """Return the starts per second at the end of a ramp; infinity if nothing says."""
        rates = [quota.limit / quota.per for quota in self._quotas if quota.unit == "requests"]
        return min(rates, default=math.inf) if self._rate is None else self._rate

    def _climb(self, ramp: Ramp, now: float) -> None:
        """Set the pace to where the ramp is; at its end to the stated one, or none."""
        if self._ramp_began is None:
            self._ramp_began = now
        elapsed = now - self._ramp_began
        if ramp.ends(elapsed):
            self._ramp = None
            if self._rate is None:
                self._pace = None
            else:
                self._pace = self._pace or Pace(self._rate, slack=LEAST)
                self._pace.rate = self._rate
            return
        if self._pace is None:
            self._pace = Pace(ramp.initial, slack=LEAST)
        self._pace.rate = ramp.rate(elapsed, self._full_rate())

    def _full(self, amounts: tuple[float, ...], now: float) -> int | None:
        """Return the number of the first quota that has no room for `amounts` now."""
        for gauge, amount in zip(self._meters, amounts):  # noqa: B905  some may be learned since; this is hot
            if amount and not gauge.fits(amount, now):
                return self._meters.index(gauge)
        return None

    def _book(self, amounts: tuple[float, ...], now: float) -> Lease:
        tickets = [gauge.book(amount, now) for gauge, amount in zip(self._meters, amounts)]  # noqa: B905  as above
        start = None if self._pace is None else self._pace.book(now)
        self._in_flight += 1
        self._admitted += 1
        return Lease(self, amounts, tickets, start, now)

    def _wake(self) -> None:
        """Have a look in the next turn, if somebody waits."""
        if self._waiting and self._woken is None and not self._pumping:
            self._woken = self._clock_in_use().call_soon(self._pump)

    def _pump(self) -> None:
        """Admit whoever may start now, and arm the timer for the next one."""
        self._woken = None
        if self._pumping:
            return
        self._pumping = True
        try:
            while self._waiting and not self._closed:
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
            if not self._waiting:
                self._rest()

    def _choose(self, now: float) -> Waiter | None:
        """Return who may start now; for nobody arm the timer."""
        queue = self._queue
        while queue[0].applicant is None:
            queue.popleft()
        reason = self._held_back(now)
        self._passing = False
        if reason is None:
            head = queue[0]
            full = self._full(head.amounts, now)
            return head if full is None else self._look_behind(head, full, now)
        self._reason = reason
        if reason == "concurrency":
            self._disarm()  # the end of an attempt is the next thing that can help
        elif reason == "pause" or self._pace is None:
            self._arm(self._pause_until, now)
        else:
            self._arm(self._pace.ready_at(now), now)
        return None

    def _look_behind(self, head: Waiter, full: int, now: float) -> Waiter | None:
        """Return one behind `head` that fits although `head` does not, while `head` may be passed."""
        if self._meters[full].too_large(head.amounts[full]):
            return self._refuse(head, full, now)
        self._reason = self._names[full]
        head.stuck = min(head.stuck, now)
        self._passing = head.passed < PASSES and now - head.stuck < self._quotas[full].per
        wanted = head.amounts[full]
        least = {full: wanted}  # of each quota that is in the way of somebody: how much must come free
        looked = 0
        for waiter in self._queue if self._passing else ():
            if waiter.applicant is None or waiter is head:
                continue
            looked += 1
            if looked > LOOK:
                break
            if waiter.amounts[full] >= wanted:
                continue
            other = self._full(waiter.amounts, now)
            if other is None:
                head.passed += 1
                return waiter
            least[other] = min(least.get(other, math.inf), waiter.amounts[other])
        at = min(self._meters[number].ready_at(amount, now) for number, amount in least.items())
        if LONG < at - now < math.inf and at > self._suspended:
            self._suspended = at
            _log.warning("%r: %s is used up; the next attempt starts in %.0f s", self, self._names[full], at - now)
        self._arm(at, now)
        return None

    def _refuse(self, head: Waiter, full: int, now: float) -> Waiter | None:
        """Turn the first away: the server has lowered a quota below what it needs. Return who may start instead."""
        applicant, head.applicant = head.applicant, None
        self._waiting -= 1
        if applicant is not None:
            needs, limit = head.amounts[full], self._meters[full].limit
            msg = f"needs {needs:,g} {self._units[full]}, and the server now admits at most {limit:,g} at a time"
            applicant.turned_away(InvalidRequestError(msg))
        return self._choose(now) if self._waiting else None

    def _hand_over(self, waiter: Waiter, now: float) -> None:
        applicant, waiter.applicant = waiter.applicant, None
        self._waiting -= 1
        lease = self._book(waiter.amounts, now)
        waited, before = self._waited, waiter.before
        if waited != before:
            for reason, seconds in waited.items():
                own = seconds - before.get(reason, 0.0)
                if own > 0:
                    lease.waited[reason] = own
                    self._spent[reason] = self._spent.get(reason, 0.0) + own
        if applicant is not None:
            applicant.admitted(lease)

    def _sweep(self) -> None:
        """Remove those that are gone, when they are many: whoever looks for one that waits soon finds one."""
        if len(self._queue) > self._waiting + self._waiting // 8 + LOOK:
            self._queue = deque(waiter for waiter in self._queue if waiter.applicant is not None)

    def _rest(self) -> None:
        """Leave nothing behind: nobody waits any more."""
        self._queue.clear()
        self._reason = None
        self._disarm()
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


def _part(quota: Quota, share: float) -> Quota:
    """Return the part of `quota` that is ours; at least one request, else none would ever start."""
    if share == 1:
        return quota
    least = 1.0 if quota.unit == "requests" else 0.0
    return Quota(
        max(least, quota.limit * share),
        per=quota.per,
        unit=quota.unit,
        strategy=quota.strategy,
        margin=quota.margin,
        burst=None if quota.burst is None else quota.burst * share,
    )


def _rebuild(  # noqa: PLR0917  pickles give arguments by position
    quotas: tuple[Quota, ...],
    limit: int | None,
    rate: float | None,
    share: float,
    accounting: Accounting,
    headers: bool,  # noqa: FBT001
    ramp: Ramp | None,
) -> Gate:
    return Gate(*quotas, concurrency=limit, rate=rate, share=share, accounting=accounting, headers=headers, ramp=ramp)
