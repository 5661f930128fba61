"""The gate itself and its lanes: what users set and read, and what operators ask, book and settle with."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Self, cast

from reactivex import Observable

from rxllm.errors import ConfigError, check_number, check_text
from rxllm.events import Admitted, Ended, Event, Learned, Paused, SettingChanged
from rxllm.feedback import Controller, Feedback
from rxllm.gate.lease import Lease
from rxllm.gate.lessons import Lessons
from rxllm.gate.news import News
from rxllm.gate.queue import Queue
from rxllm.gate.quotas import meter_of, outside_meters, read_quotas
from rxllm.gate.waiter import Applicant, Waiter
from rxllm.messages import Setting
from rxllm.policies.accounting import GENERIC, Accounting, Ending, accounting_of
from rxllm.policies.breaker import Breaker
from rxllm.policies.budget import RetryBudget
from rxllm.policies.ledger import Ledger
from rxllm.policies.opening import Opening
from rxllm.policies.quota import Quota
from rxllm.policies.ramp import Ramp
from rxllm.policies.times import Times
from rxllm.reports import Explanation, GateStatistics, LaneStatistics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rxllm.clock import Clock
    from rxllm.messages import Usage
    from rxllm.policies.control import Machine
    from rxllm.policies.headers import Limits
    from rxllm.policies.line import Line

__all__ = ["WINDOW", "Gate", "Lane", "lane_of"]

WINDOW = 256  # requests in progress per pipeline when the gate has no concurrency limit


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
        self._given = read_quotas(quotas)
        self._share = share
        self._accounting = accounting_of(accounting)
        self._heeds = headers is True
        if headers is not True and headers is not False:
            msg = f"headers must be True or False, got {headers!r}"
            raise ConfigError(msg)
        self._ledger = Ledger(self._given, share=share, accounting=self._accounting, make=meter_of)
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
        self._news = News(self)
        self._times = Times()
        self._queue = Queue(self, self._opening, self._ledger, self._times, self._news)
        self.main = Lane(self, self._queue.lines.open("main", 1.0))
        self._lessons: Lessons | None = None
        if breaker is not None or self._feedback is not None:
            self._lessons = Lessons(breaker, self._feedback, self._news.judged)
        self._now: Callable[[], float] = _at_zero
        self.in_flight = 0  # attempts on the wire
        self._admitted = 0
        self._refused = 0

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
    def is_shut(self) -> bool:
        """Whether nothing starts for long: closed, the breaker open, or a quota used up for more than a minute."""
        breaker = self._opening.breaker
        if breaker is not None and breaker.state != "closed":
            return True
        return self._queue.closed or self._times.suspended_since is not None

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
        return self._news.events

    def keep_beside(self, path: str) -> None:
        """Keep what is booked of quotas of more than 10 minutes in files beside `path`: `journal` calls it.

        Those with a `state` or a `store` stay as they are, and so does a gate that was used already.
        """
        if self._queue.clock is None:
            self._ledger.keep(path)

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
        return Lane(self, self._queue.lines.open(name, weight))

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
        self._queue.wake()
        self._news.set(event)

    def statistics(self) -> GateStatistics:
        """Return what the gate does now, and what it has done; from any thread."""
        now, opening, queue = self._now(), self._opening, self._queue
        return GateStatistics(
            limit=opening.limit,
            rate=None if opening.pace is None else opening.pace.rate,
            in_flight=self.in_flight,
            waiting=queue.lines.waiting,
            admitted=self._admitted,
            refused=self._refused,
            quotas=self._ledger.statistics(now),
            lanes=tuple(
                LaneStatistics(name=line.name, weight=line.weight, waiting=line.waiting, admitted=line.started)
                for line in queue.lines
            ),
            waited=self._times.noted(queue.reason, now),
            malformed=self._ledger.malformed,
            resumes_in=queue.resumes_in(now),
            suspended=self.suspended(),
            settings=tuple(self._news.settings),
        )

    def explain(self) -> Explanation:
        """Return where the time of the attempts went, and what limits them now; `print` it."""
        now = self._now()
        fill = self._ledger.fill(now)
        reason = self._queue.reason
        if reason is None:
            binding = "nothing here: nobody waits" if self.in_flight else "nothing: nothing is asked for"
        elif reason in fill:
            binding = f"{reason}: {fill[reason]:.0%}"
        elif reason == "concurrency":
            binding = f"concurrency: {self.in_flight} of {self._opening.limit} on the wire"
        else:
            binding = reason
        return Explanation(binding=binding, seconds=self._times.spent, fill=fill)

    def close(self) -> None:
        """Admit nothing any more. Attempts on the wire end as they do; those that wait get a `ConfigError`."""
        self._queue.closed = True
        self._here(self._end)

    def _end(self) -> None:
        self._queue.turn_away(self._is_closed())
        for gauge in outside_meters(self._ledger):
            gauge.close()
        if self._feedback is not None:
            self._feedback.close()
        self._news.events.on_completed()

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
        return self._times.suspended(self._now())

    def admits_now(self, clock: Clock, amounts: tuple[float, ...]) -> bool:
        """Say whether an attempt that came now would start at once, past nobody who waits.

        Args:
            clock: of the pipeline that asks.
            amounts: what `amounts(cost)` returned.

        Raises:
            ConfigError: in use on another loop.
        """
        if clock is not self._queue.clock:
            self._bind(clock)
        return self._queue.admits(amounts, self._now())

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
        queue = self._queue
        if clock is not queue.clock:
            self._bind(clock)
        if queue.closed:
            raise self._is_closed()
        line = self.main.line if lane is None else lane.line
        return Waiter(queue, line, arrival, amounts, applicant, clock.seconds())

    def enter(self, waiter: Waiter) -> None:
        """Wait for admission: `waiter.applicant.admitted(lease)` is called once, perhaps before this returns."""
        self._queue.enter(waiter)

    # for those who got in

    def book(self, waiter: Waiter, now: float) -> Lease:
        """Return the lease of one that starts now; the queue calls this."""
        amounts = waiter.amounts
        tickets = self._ledger.book(amounts, now)
        pace = self._opening.pace
        start = None if pace is None else pace.book(now)
        self.in_flight += 1
        self._admitted += 1
        line, queue = waiter.line, self._queue
        line.started += 1
        if not queue.lines.single:
            queue.lines.charge(line, self._ledger.weigh(amounts))
        if self._news.events.observers:
            self._news.tell(Admitted(at=now, waited=now - waiter.since, in_flight=self.in_flight))
        lease = Lease(self, amounts, tickets, start, now)
        if self._lessons is not None:
            self._lessons.started(lease, now, in_flight=self.in_flight, binding=queue.is_bound)
        return lease

    def settle(self, lease: Lease, ending: Ending, used: Mapping[str, float] | None, error: Exception | None) -> None:
        """Take a lease back; its own method calls this."""
        self.in_flight -= 1
        if ending == "refused":
            self._refused += 1
            self._news.refused()
        now = self._now()
        self._times.network += now - lease.at
        if lease.tickets:
            self._ledger.settle(lease.amounts, lease.tickets, ending, used, now, sent=lease.at)
        if self._news.events.observers:
            self._news.tell(Ended(at=now, ending=ending, seconds=now - lease.at, in_flight=self.in_flight))
        if self._lessons is not None:
            tokens = 0.0 if used is None else used.get("tokens", 0.0)
            self._lessons.ended(lease, now, ending=ending, error=error, tokens=tokens, binding=self._queue.is_bound)
        if ending == "unsent" and lease.start is not None and self._opening.pace is not None:
            self._opening.pace.refund(lease.start)
        if self._queue.lines.waiting:
            self._queue.wake()
        elif self._feedback is not None:
            self.unasked()

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
            self._news.learned(Learned(at=now, quota=quota))
        self._queue.wake()

    def backed_off(self, seconds: float) -> None:
        """Count the time between two attempts of a request, for `explain`."""
        self._times.backing_off += seconds

    def pause(self, seconds: float) -> None:
        """Admit nothing for a while: a refusal said so. One hint closes the gate for at most 2 s.

        With a controller it does nothing.
        """
        if self._feedback is not None:
            return  # it has its own answer to a refusal: each pause would take capacity that it has found
        now = self._now()
        paused = self._opening.pause(seconds, now)
        if paused:
            self._news.tell(Paused(at=now, seconds=paused))

    def unasked(self) -> None:
        """Have the controller rest if nobody is here any more, on the wire neither."""
        if self._feedback is not None and not self.in_flight:
            self._feedback.rest()

    # the life on a loop

    def _bind(self, clock: Clock) -> None:
        queue = self._queue
        before = queue.clock
        if before is not None and before.is_over():  # whoever was here is gone with the loop
            self.in_flight = 0
            queue.drop()
        if self.in_flight or queue.lines.waiting:
            msg = f"{self!r} is in use on {before!r} and cannot be used on {clock!r} at the same time"
            raise ConfigError(msg)
        if before is not None and not (before.threads and clock.threads):  # virtual time has a zero of its own
            for gauge in outside_meters(self._ledger):
                gauge.close()
            self._ledger.renew()
            self._opening.renew()
        for gauge in outside_meters(self._ledger):
            try:
                gauge.bind(clock, wake=queue.wake, fail=queue.turn_away, tell=self._news.tell)
            except ConfigError as error:
                error.halts = True  # it will not do for the next request either
                raise
        queue.clock = clock
        self._now = clock.seconds
        if self._feedback is not None:
            self._feedback.bind(clock)

    def _here(self, action: Callable[[], None]) -> None:
        """Call `action` where those who wait are."""
        clock = self._queue.clock
        if clock is None or clock.is_here() or clock.is_over():
            action()
        else:
            clock.post(action)

    def _is_closed(self) -> ConfigError:
        return ConfigError(f"{self!r} is closed")


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


def _at_zero() -> float:
    return 0.0


def _rebuild_lane(gate: Gate, name: str, weight: float) -> Lane:
    return gate.lane(name, weight=weight)
