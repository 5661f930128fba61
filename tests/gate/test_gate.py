"""The gate against a model that keeps the whole history, and each of its rules by example."""

import asyncio
import itertools
import pickle
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from reactivex.testing import TestScheduler

from rxllm.clock import clock_of, loop_clock
from rxllm.errors import ConfigError, InvalidRequestError
from rxllm.gate import Gate, Lease, Waiter
from rxllm.policies import admission
from rxllm.policies.accounting import Ending
from rxllm.policies.quota import Quota, parse_quotas
from rxllm.policies.sliding import SLOTS
from rxllm.reports import Explanation
from rxllm.testing import VirtualScheduler

MS = 0.001
HAIR = 1e-9  # seconds: what floats may round
ENDINGS: list[Ending] = ["unsent", "refused", "answered", "failed", "timed_out", "cancelled"]


class BoomError(Exception):
    """What an applicant raises."""


class Asker:
    """Somebody who asks for admission, and does something when it comes."""

    def __init__(
        self, gate: Gate, scheduler: VirtualScheduler, act: Callable[["Asker"], object] = lambda _asker: None
    ) -> None:
        self.gate = gate
        self.scheduler = scheduler
        self.act = act
        self.waiter: Waiter | None = None
        self.lease: Lease | None = None
        self.at: float | None = None  # when it was admitted
        self.error: Exception | None = None

    def admitted(self, lease: Lease) -> None:
        assert self.lease is None
        self.lease, self.at = lease, self.scheduler.seconds()
        self.act(self)

    def turned_away(self, error: ConfigError) -> None:
        self.error = error
        self.act(self)

    def ask(self, cost: dict[str, float] | None = None, arrival: int | None = None) -> "Asker":
        self.waiter = self.gate.apply(self.scheduler, self.gate.amounts(cost or {}), self, arrival)
        self.gate.enter(self.waiter)
        return self

    def settle(self, ending: Ending = "answered", **used: float) -> None:
        assert self.lease is not None
        self.lease.settle(ending, used)


class Desk:
    """A gate in virtual time, and those who asked."""

    def __init__(self, *quotas: Quota | str, **options: Any) -> None:
        self.scheduler = VirtualScheduler()
        self.gate = Gate(*quotas, **options)
        self.fired: list[float] = []
        lookout = self.gate._queue._lookout
        fire = lookout._fire

        def fire_and_count() -> None:
            self.fired.append(self.scheduler.seconds())
            fire()

        lookout._fire = fire_and_count  # type: ignore[method-assign]

    def ask(
        self,
        cost: dict[str, float] | None = None,
        arrival: int | None = None,
        act: Callable[[Asker], object] = lambda _asker: None,
    ) -> Asker:
        return Asker(self.gate, self.scheduler, act).ask(cost, arrival)

    def tokens(self, amount: float, **options: Any) -> Asker:
        return self.ask({"tokens": amount}, **options)

    def available(self, number: int = 0) -> float:
        return self.gate.statistics().quotas[number].available

    def run(self, until: float | None = None) -> None:
        self.scheduler.run(self.scheduler.seconds() if until is None else until)


def exact(text: str) -> Quota:
    """Return a quota without a margin."""
    (quota,) = parse_quotas(text)
    return Quota(quota.limit, per=quota.per, unit=quota.unit, margin=0.0)


# against the whole history


class Entrant:
    """One application, as the model sees it."""

    def __init__(self, machine: "Machine", costs: dict[str, float], then: str) -> None:
        self.machine = machine
        self.costs = costs
        self.then = then
        self.since = machine.now
        self.waiter: Waiter
        self.order: tuple[int, int] = (0, 0)
        self.passed = 0
        self.first_since: float | None = None
        self.stuck_since: float | None = None
        self.booked: list[list[float]] = []  # its entry in the history of each quota
        self.lease: Lease

    def admitted(self, lease: Lease) -> None:
        self.machine.is_admitted(self, lease)

    def turned_away(self, error: ConfigError) -> None:
        raise AssertionError(error)


class Machine(RuleBasedStateMachine):
    """Every admission is checked against all that was ever booked; and whenever all is still, nothing idles.

    The gate may be late by a slot of its logs and by a millisecond of its timer, and never early.
    """

    @initialize(
        quotas=st.lists(
            st.builds(
                Quota,
                st.integers(2, 12),
                per=st.sampled_from([0.25, 1.0, 3.0]),
                unit=st.sampled_from(["requests", "tokens", "images"]),
                margin=st.sampled_from([0.0, 0.01]),
            ),
            max_size=3,
        ),
        concurrency=st.none() | st.integers(1, 4),
        rate=st.none() | st.sampled_from([2.0, 8.0]),
        passes=st.integers(1, 4),
        look=st.integers(1, 4),
    )
    def begin(self, quotas: list[Quota], concurrency: int | None, rate: float | None, passes: int, look: int) -> None:
        self.kept = (admission.PASSES, admission.LOOK)
        admission.PASSES, admission.LOOK = self.passes, self.look = passes, look
        self.desk = Desk(*quotas, concurrency=concurrency, rate=rate)
        self.gate, self.scheduler = self.desk.gate, self.desk.scheduler
        self.quotas, self.limit, self.rate = quotas, concurrency, rate
        self.history: list[list[list[float]]] = [[] for _ in quotas]  # of each quota: when, how much
        self.late = [quota.window / (SLOTS - 2) for quota in quotas]
        self.starts: list[tuple[float, Entrant]] = []
        self.pause_until = 0.0
        self.waiting: list[Entrant] = []
        self.out: list[Entrant] = []
        self.over: list[Entrant] = []
        self.numbers = itertools.count()
        self.admissions = self.refusals = self.changes = 0

    def teardown(self) -> None:
        if not hasattr(self, "kept"):
            return
        try:
            for _ in range(400):  # nothing starves: whatever came is served, when places and time are given
                if not self.waiting:
                    break
                self.settle_all("answered")
                self.wait(1.0)
            assert not self.waiting
            self.settle_all("cancelled")
            assert self.gate.statistics().in_flight == self.scheduler.pending == 0
            assert len(self.desk.fired) <= 3 * (self.admissions + self.changes) + sum(map(len, self.history))
            assert all(later - earlier >= MS - HAIR for earlier, later in itertools.pairwise(self.desk.fired))
        finally:
            admission.PASSES, admission.LOOK = self.kept

    @property
    def now(self) -> float:
        return self.scheduler.seconds()

    # the model

    def booked(self, number: int, late: float) -> float:
        window = self.quotas[number].window + late
        return sum(amount for at, amount in self.history[number] if self.now < at + window)

    def cost(self, entrant: Entrant, number: int) -> float:
        return entrant.costs[self.quotas[number].unit]

    def may_fit(self, entrant: Entrant) -> bool:
        return all(
            not self.cost(entrant, number)  # what takes nothing of a quota does not wait for its debt
            or self.booked(number, -HAIR) + self.cost(entrant, number) <= quota.limit
            for number, quota in enumerate(self.quotas)
        )

    def surely_fits(self, entrant: Entrant, late: float = 0.0) -> bool:
        return all(
            not self.cost(entrant, number)
            or self.booked(number, self.late[number] + late + HAIR) + self.cost(entrant, number) <= quota.limit
            for number, quota in enumerate(self.quotas)
        )

    def paced(self, slack: float) -> bool:
        return self.rate is None or not self.starts or self.now >= self.starts[-1][0] + 1 / self.rate + slack

    def is_admitted(self, entrant: Entrant, lease: Lease) -> None:
        assert lease.at == self.now
        assert self.limit is None or len(self.out) < self.limit
        assert self.paced(-MS - HAIR)
        assert self.now >= self.pause_until
        assert self.may_fit(entrant)
        first = min(self.waiting, key=lambda other: other.order)
        if first is not entrant:
            assert not self.surely_fits(first)
            first.passed += 1
            assert first.passed <= self.passes
            longest = max(quota.per for quota in self.quotas)
            assert first.stuck_since is None or self.now - first.stuck_since < longest
        assert sum(lease.waited.values()) == pytest.approx(self.now - entrant.since)
        assert set(lease.waited) <= {"concurrency", "pace", "pause", *map(str, self.quotas)}
        self.waiting.remove(entrant)
        self.out.append(entrant)
        self.starts.append((self.now, entrant))
        self.admissions += 1
        entrant.lease = lease
        for number, entries in enumerate(self.history):
            entrant.booked.append([self.now, self.cost(entrant, number)])
            entries.append(entrant.booked[-1])
        if entrant.then == "raise":
            raise BoomError
        if entrant.then == "end":
            self.settle(entrant, "answered", {})
        elif entrant.then == "cancel" and self.waiting:
            self.cancel(self.waiting[-1])
        elif entrant.then == "follow":
            self.apply(entrant.costs, "keep")

    def apply(self, costs: dict[str, float], then: str, arrival: int | None = None) -> None:
        entrant = Entrant(self, costs, then)
        entrant.waiter = self.gate.apply(self.scheduler, self.gate.amounts(costs), entrant, arrival)
        entrant.order = (entrant.waiter.arrival, next(self.numbers))
        self.waiting.append(entrant)
        self.still(lambda: self.gate.enter(entrant.waiter))

    def settle(self, entrant: Entrant, ending: Ending, used: dict[str, float]) -> None:
        self.out.remove(entrant)
        self.over.append(entrant)
        self.refusals += ending == "refused"
        if ending == "unsent" and self.starts and self.starts[-1][1] is entrant:
            self.starts.pop()
        for quota, entries, entry in zip(self.quotas, self.history, entrant.booked, strict=True):
            actual = used.get(quota.unit, entry[1])
            if ending == "unsent" or (ending == "refused" and quota.unit != "requests"):
                actual = 0.0
            elif ending == "refused":
                actual = entry[1]
            if actual > entry[1]:
                entries.append([self.now, actual - entry[1]])
            entry[1] = min(entry[1], actual)
        entrant.lease.settle(ending, used)
        entrant.lease.settle("refused")  # again is harmless

    def cancel(self, entrant: Entrant) -> None:
        self.waiting.remove(entrant)
        self.over.append(entrant)
        entrant.waiter.cancel()
        entrant.waiter.cancel()

    def still(self, act: Callable[[], object] = lambda: None, until: float | None = None) -> None:
        """Do something and let everything that follows from it happen."""
        if self.scheduler._running:
            act()
            return
        todo = [act, lambda: self.desk.run(until)]
        while todo:
            try:
                todo[0]()
            except BoomError:
                if len(todo) == 1:
                    continue  # the rest goes on
            del todo[0]

    # what happens

    costs = st.fixed_dictionaries(
        {"requests": st.just(1.0), "tokens": st.sampled_from([0.0, 0.5, 1.0, 2.0]), "images": st.integers(0, 2)}
    )

    @rule(
        costs=costs,
        then=st.sampled_from(["keep", "keep", "keep", "end", "raise", "cancel", "follow"]),
        n=st.integers(1, 4),
    )
    def come(self, costs: dict[str, float], then: str, n: int) -> None:
        for _ in range(n):
            self.apply(costs, then)

    @precondition(lambda self: self.over)
    @rule(costs=costs, data=st.data())
    def come_again(self, costs: dict[str, float], data: st.DataObject) -> None:
        again = data.draw(st.sampled_from(self.over))
        self.apply(costs, "keep", again.waiter.arrival)

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def give_up(self, data: st.DataObject) -> None:
        self.still(lambda: self.cancel(data.draw(st.sampled_from(self.waiting))))

    @rule(backwards=st.booleans())
    def give_up_all(self, backwards: bool) -> None:
        for entrant in sorted(self.waiting, key=lambda other: other.order, reverse=backwards):
            self.cancel(entrant)
        self.still()

    @precondition(lambda self: self.out)
    @rule(data=st.data(), ending=st.sampled_from(ENDINGS), used=st.none() | st.integers(0, 20))
    def end(self, data: st.DataObject, ending: Ending, used: int | None) -> None:
        entrant = data.draw(st.sampled_from(self.out))
        self.settle(entrant, ending, {} if used is None else {"tokens": used / 2})
        self.still()

    @rule(ending=st.sampled_from(ENDINGS))
    def settle_all(self, ending: Ending) -> None:
        for entrant in list(self.out):
            self.settle(entrant, ending, {})
        self.still()

    @rule(limit=st.integers(1, 5))
    def set_limit(self, limit: int) -> None:
        self.limit = limit
        self.changes += 1
        self.gate.set(limit=limit)
        self.still()

    @rule(rate=st.sampled_from([1.0, 4.0, 16.0]))
    def set_rate(self, rate: float) -> None:
        if self.rate is None:
            self.starts.clear()
        self.rate = rate
        self.changes += 1
        self.gate.set(rate=rate)
        self.still()

    @precondition(lambda self: self.admissions)
    @rule(hint=st.sampled_from([0.125, 1.0, 60.0]))
    def pause(self, hint: float) -> None:
        self.pause_until = max(self.pause_until, self.now + min(hint, 2.0))
        self.changes += 1
        self.gate.pause(hint)

    @rule(seconds=st.sampled_from([MS, 0.0625, 0.25, 1.0, 3.0]))
    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        self.still(until=until)

    # what always holds

    @invariant()
    def what_it_says_is_what_is(self) -> None:
        if not hasattr(self, "kept"):
            return
        said = self.gate.statistics()
        assert (said.in_flight, said.waiting) == (len(self.out), len(self.waiting))
        assert (said.admitted, said.refused) == (self.admissions, self.refusals)
        assert (said.limit, said.rate) == (self.limit, self.rate)
        assert self.scheduler.pending <= (1 if self.waiting else 0)
        for number, quota in enumerate(self.quotas):
            available = said.quotas[number].available
            assert quota.limit - self.booked(number, self.late[number] + HAIR) <= available
            assert available <= quota.limit - self.booked(number, -HAIR)

    @invariant()
    def nothing_idles(self) -> None:
        if not hasattr(self, "kept") or not self.waiting:
            return
        if (self.limit is not None and len(self.out) >= self.limit) or self.now < self.pause_until + MS + HAIR:
            return
        if not self.paced(MS + HAIR):
            return
        queue = sorted(self.waiting, key=lambda other: other.order)
        first = queue[0]
        assert not self.surely_fits(first, MS)
        first.stuck_since = self.now if first.stuck_since is None else first.stuck_since
        first.first_since = self.now if first.first_since is None else first.first_since
        shortest = min(quota.per for quota in self.quotas)
        if first.passed < self.passes and self.now - first.since < shortest:
            for other in queue[1 : self.look + 1]:
                assert not self.surely_fits(other, MS)


Machine.TestCase.settings = settings(max_examples=300, stateful_step_count=50, deadline=None)
TestGate = Machine.TestCase


# what a try costs


@pytest.mark.parametrize(
    ("ending", "used", "requests", "tokens"),
    [
        ("unsent", None, 0, 0),
        ("unsent", 100.0, 0, 0),
        ("refused", None, 1, 0),
        ("refused", 100.0, 1, 0),
        ("answered", 100.0, 1, 100),
        ("answered", 900.0, 1, 900),
        ("answered", None, 1, 400),
        ("failed", None, 1, 400),
        ("failed", 100.0, 1, 100),
        ("timed_out", None, 1, 400),
        ("timed_out", 100.0, 1, 100),
        ("cancelled", None, 1, 400),
        ("cancelled", 900.0, 1, 900),
    ],
)
def test_a_try_costs_what_its_ending_says(ending: Ending, used: float | None, requests: float, tokens: float) -> None:
    desk = Desk("10 requests/minute", "1000 tokens/minute")
    asker = desk.tokens(400.0)
    assert (desk.available(0), desk.available(1)) == (9, 600)
    asker.settle(ending, **({} if used is None else {"tokens": used}))
    assert (10 - desk.available(0), 1000 - desk.available(1)) == (requests, tokens)
    asker.settle("refused")
    assert (10 - desk.available(0), 1000 - desk.available(1)) == (requests, tokens)
    assert desk.gate.statistics().refused == (ending == "refused")


def test_a_debt_delays_those_that_come_later() -> None:
    desk = Desk(exact("1000 tokens/minute"))
    first = desk.tokens(100.0)
    desk.run(10.0)
    first.settle(tokens=1500.0)  # 1400 above what was booked, known at 10
    assert desk.available() == -500
    later = desk.tokens(1.0)
    desk.run(300.0)
    assert later.at == 70.0
    assert later.lease is not None
    assert later.lease.waited == {"1000 tokens per 60 seconds": 60.0}


def test_what_was_booked_too_much_is_free_again_at_once() -> None:
    desk = Desk("1000 tokens/minute")
    first, second = desk.tokens(1000.0), desk.tokens(600.0)
    assert second.at is None
    desk.run(3.0)
    first.settle(tokens=400.0)
    desk.run()
    assert second.at == 3.0
    assert desk.scheduler.pending == 0


def test_an_attempt_that_was_never_sent_gives_its_start_back_to_the_pace() -> None:
    desk = Desk(rate=0.5)
    first, second = desk.ask(), desk.ask()
    first.settle("unsent")
    desk.run()
    assert second.at == 0.0


def test_a_pace_that_was_set_while_an_attempt_was_out_is_not_its_own() -> None:
    desk = Desk("10/minute", concurrency=1)
    out = desk.ask()
    desk.gate.set(rate=1.0)
    out.settle("unsent")
    assert desk.gate.statistics().in_flight == 0
    assert desk.available() == 10


# the limit, the pace, the pause


def test_after_a_cut_nothing_starts_until_fewer_than_the_limit_are_out() -> None:
    desk = Desk(concurrency=6)
    askers = [desk.ask() for _ in range(40)]
    desk.gate.set(limit=2)
    desk.run()
    for n in range(5):
        askers[n].settle()
        desk.run()
        assert sum(asker.at is not None for asker in askers) == (6 if n < 4 else 7)
    assert desk.gate.statistics().in_flight == 2
    desk.gate.set(limit=10)
    desk.run()
    assert [asker.at is not None for asker in askers] == [True] * 15 + [False] * 25
    assert (desk.gate.limit, desk.gate.window, desk.scheduler.pending) == (10, 52, 0)


def test_starts_keep_the_distance_of_the_pace_from_the_first_on() -> None:
    desk = Desk(rate=4.0)
    askers = [desk.ask() for _ in range(9)]
    desk.run(100.0)
    assert [asker.at for asker in askers] == pytest.approx([0.0, *(n / 4 - MS for n in range(1, 9))])
    assert len(desk.fired) == 8
    assert askers[8].lease is not None
    assert askers[8].lease.waited == {"pace": pytest.approx(2.0 - MS)}


@pytest.mark.parametrize(("hint", "opens"), [(0.5, 1.5), (2.0, 3.0), (3600.0, 3.0), (-1.0, 1.0), (0, 1.0)])
def test_a_hint_closes_the_gate_for_two_seconds_at_most(hint: float, opens: float) -> None:
    desk = Desk()
    desk.ask()
    desk.run(1.0)
    desk.gate.pause(hint)
    asker = desk.ask()
    desk.run(100.0)
    assert asker.at == opens
    assert asker.lease is not None
    assert asker.lease.waited == ({"pause": opens - 1.0} if opens > 1.0 else {})


def test_the_longest_pause_counts() -> None:
    desk = Desk()
    desk.ask()
    desk.gate.pause(1.5)
    desk.gate.pause(0.5)
    asker = desk.ask()
    desk.run(1.0)
    desk.gate.pause(0.75)
    desk.run(100.0)
    assert asker.at == 1.75


def test_a_paused_gate_with_a_pace_waits_for_both() -> None:
    desk = Desk(rate=10.0)
    desk.ask()
    desk.gate.pause(1.0)
    asker = desk.ask()
    desk.run(100.0)
    assert asker.at == 1.0
    assert asker.lease is not None
    assert asker.lease.waited == {"pace": pytest.approx(0.1 - MS), "pause": pytest.approx(0.9 + MS)}


# order


def test_those_that_wait_start_in_the_order_in_which_they_first_came() -> None:
    desk = Desk(concurrency=1)
    first = desk.ask()
    others = [desk.ask() for _ in range(5)]
    first.settle("refused")
    assert first.waiter is not None
    again = desk.ask(arrival=first.waiter.arrival)
    desk.run()
    assert again.at == 0.0
    order = []
    last = again
    for _ in others:
        last.settle()
        desk.run()
        (last,) = (asker for asker in others if asker.at is not None and asker not in order)
        order.append(last)
    assert order == others


def test_a_later_one_passes_one_that_does_not_fit_as_soon_as_it_comes() -> None:
    desk = Desk(exact("10 tokens/minute"))
    desk.tokens(5.0)
    head = desk.tokens(6.0)
    desk.run(1.0)
    small = desk.tokens(4.0)
    desk.run()
    assert (small.at, head.at) == (1.0, None)
    desk.run(100.0)
    assert head.at == 60.0


def test_at_most_32_pass_one_that_does_not_fit() -> None:
    desk = Desk(exact("1000 tokens/minute"))
    desk.tokens(500.0)
    head = desk.tokens(501.0)
    small = [desk.tokens(1.0) for _ in range(50)]
    desk.run(59.0)
    assert sum(asker.at is not None for asker in small) == 32
    desk.run(100.0)
    assert head.at == 60.0
    assert [asker.at for asker in small] == [0.0] * 32 + [60.0] * 18


def test_when_one_that_is_waited_for_leaves_those_behind_it_start_at_once() -> None:
    desk = Desk(exact("1000 tokens/minute"))
    desk.tokens(500.0)
    head = desk.tokens(501.0)
    small = [desk.tokens(1.0) for _ in range(50)]
    desk.run(7.0)
    assert head.waiter is not None
    head.waiter.cancel()
    desk.run()
    assert [asker.at for asker in small] == [0.0] * 32 + [7.0] * 18


def test_two_that_came_at_once_keep_their_order() -> None:
    desk = Desk(concurrency=1)
    out = desk.ask()
    assert out.waiter is not None
    first, second = (desk.ask(arrival=out.waiter.arrival) for _ in range(2))
    last = desk.ask()
    third = desk.ask(arrival=out.waiter.arrival)
    for asker in (out, first, second, third):
        asker.settle()
        desk.run()
    assert last.at == 0.0
    assert desk.gate.statistics().in_flight == 1


def test_one_that_does_not_fit_is_passed_for_one_window_and_then_waited_for() -> None:
    desk = Desk(exact("10 tokens/minute"), exact("100 requests/second"))
    desk.tokens(4.0)
    desk.run(1.0)
    head = desk.tokens(10.0)
    for second in range(1, 70):
        desk.run(float(second))
        desk.tokens(1.0 if second < 60 else 0.5)
    desk.run(500.0)
    # without an end the small ones would take every token that comes free
    assert head.at is not None
    assert 61.0 <= head.at <= 121.0 + MS


def test_no_more_than_32_behind_the_first_are_looked_at() -> None:
    desk = Desk(exact("10 tokens/minute"))
    desk.tokens(5.0)
    large = [desk.tokens(6.0) for _ in range(33)]
    behind = desk.tokens(1.0)
    desk.run(1.0)
    assert behind.at is None
    assert large[1].waiter is not None
    large[1].waiter.cancel()  # and it comes into view
    desk.run()
    assert behind.at == 1.0


def test_the_32nd_behind_the_first_is_looked_at_as_soon_as_it_comes() -> None:
    desk = Desk(exact("10 tokens/minute"))
    desk.tokens(5.0)
    for _ in range(32):
        desk.tokens(6.0)
    desk.run(1.0)
    last = desk.tokens(1.0)
    desk.run()
    assert last.at == 1.0


def test_a_retry_is_looked_at_where_it_comes_to_stand_however_long_the_queue() -> None:
    desk = Desk(exact("10 tokens/minute"))
    desk.tokens(5.0)
    desk.tokens(6.0)
    failed = desk.tokens(1.0)
    for _ in range(50):
        desk.tokens(6.0)
    desk.run(1.0)
    failed.settle("failed")
    desk.run()
    assert failed.waiter is not None
    again = desk.tokens(1.0, arrival=failed.waiter.arrival)
    desk.run()
    assert again.at == 1.0


def test_the_window_in_which_one_is_passed_begins_when_it_is_the_first_and_does_not_fit() -> None:
    desk = Desk(exact("10 tokens/minute"))
    desk.run(100.0)
    desk.tokens(2.0)
    desk.run(130.0)
    desk.tokens(2.0)
    head = desk.tokens(9.0)
    desk.run(189.0)
    inside = desk.tokens(4.0)
    desk.run(190.0)
    outside = desk.tokens(1.0)
    desk.run(191.0)
    assert (inside.at, outside.at, head.at) == (189.0, None, None)
    desk.run(400.0)
    assert (head.at, outside.at) == (249.0, 249.0)


def test_one_that_waits_for_another_quota_than_the_first_is_woken_by_its_own() -> None:
    desk = Desk(exact("10 tokens/minute"), exact("1 image/second"))
    desk.ask({"tokens": 10.0, "image": 0.0})
    desk.ask({"tokens": 0.0, "image": 1.0})
    head = desk.ask({"tokens": 10.0, "image": 0.0})
    small = desk.ask({"tokens": 0.0, "image": 1.0})
    desk.run(100.0)
    assert (small.at, head.at) == (1.0, 60.0)


@settings(max_examples=50, deadline=None)
@given(
    costs=st.lists(st.integers(0, 6), min_size=1, max_size=60),
    gaps=st.lists(st.integers(0, 8), min_size=60, max_size=60),
    seconds=st.lists(st.integers(0, 12), min_size=60, max_size=60),
)
def test_with_costs_known_before_no_window_ever_exceeds_a_quota(
    costs: list[int], gaps: list[int], seconds: list[int]
) -> None:
    desk = Desk(exact("9 tokens/second"), exact("4/0.5 seconds"), concurrency=5)

    def end_later(asker: Asker) -> None:
        desk.scheduler.call_later(seconds[len(starts) % 60] / 8, asker.settle)
        starts.append((desk.scheduler.seconds(), asker))

    starts: list[tuple[float, Asker]] = []
    tokens: dict[int, int] = {}
    for cost, gap in zip(costs, gaps, strict=False):
        desk.scheduler.advance(gap / 8)
        tokens[id(desk.tokens(float(cost), act=end_later))] = cost
    desk.run(1_000.0)
    assert len(starts) == len(costs)
    for at, _ in starts:
        assert sum(tokens[id(asker)] for start, asker in starts if at <= start < at + 1.0) <= 9
        assert sum(at <= start < at + 0.5 for start, _ in starts) <= 4
    assert desk.gate.statistics().in_flight == desk.scheduler.pending == 0


# the one timer


def test_a_full_quota_wakes_once_for_each_start_and_at_its_time() -> None:
    desk = Desk(exact("1/5 seconds"))
    askers = [desk.ask() for _ in range(20)]
    desk.run(1_000.0)
    assert [asker.at for asker in askers] == [5.0 * n for n in range(20)]
    assert desk.fired == [5.0 * n for n in range(1, 20)]


def test_no_timer_is_armed_for_less_than_a_millisecond() -> None:
    desk = Desk()
    desk.ask()
    desk.gate.pause(MS / 10)
    second = desk.ask()
    desk.run(1.0)
    assert (second.at, desk.fired) == (MS, [MS])


def test_what_expires_within_a_millisecond_wakes_once() -> None:
    desk = Desk(exact("100 tokens/second"))
    for n in range(100):
        desk.run(n * 0.00001)
        desk.tokens(1.0)
    last = desk.tokens(100.0)
    desk.run(10.0)
    assert last.at == pytest.approx(1.001, abs=0.0006)
    assert len(desk.fired) <= 3
    assert all(later - earlier >= MS - HAIR for earlier, later in itertools.pairwise(desk.fired))


@pytest.mark.parametrize("begin", [0.0, 0.1, 12345.678, 1e6 / 3])
@example(per=0.25)
@given(per=st.floats(0.01, 1e4))
@settings(max_examples=50, deadline=None)
def test_the_timer_is_not_early_whatever_the_floats(begin: float, per: float) -> None:
    desk = Desk(Quota(1, per=per, margin=0.0))
    desk.run(begin)
    desk.ask()
    second = desk.ask()
    desk.run(begin + 2 * per + 1)
    assert len(desk.fired) == 1
    assert second.at == pytest.approx(begin + per, abs=1e-6)


def test_a_gate_whose_places_are_taken_arms_no_timer() -> None:
    desk = Desk("10/second", concurrency=1, rate=5.0)
    first = desk.ask()
    second = desk.ask()
    desk.run()
    assert desk.scheduler.pending == 0
    first.settle()
    desk.run()
    assert desk.scheduler.pending == 1
    assert second.waiter is not None
    second.waiter.cancel()
    assert desk.scheduler.pending == 0


def test_when_the_last_one_leaves_no_timer_and_no_look_stays() -> None:
    desk = Desk("1/minute", concurrency=2)
    out = desk.ask()
    askers = [desk.ask() for _ in range(3)]
    desk.run(1.0)
    out.settle()
    for asker in askers:
        assert asker.waiter is not None
        asker.waiter.cancel()
    assert (desk.scheduler.pending, desk.gate.statistics().waiting, desk.gate.statistics().in_flight) == (0, 0, 0)


def test_one_that_comes_after_all_others_have_left_is_served_in_its_time() -> None:
    desk = Desk(exact("1/minute"))
    desk.ask()
    for _ in range(3):
        leaving = desk.ask()
        desk.run(desk.scheduler.seconds() + 1.0)
        assert leaving.waiter is not None
        leaving.waiter.cancel()
    last = desk.ask()
    assert desk.gate.statistics().waited == {"1 requests per 60 seconds": 3.0}
    desk.run(100.0)
    assert last.at == 60.0
    assert desk.gate.statistics().waited == {"1 requests per 60 seconds": 60.0}


def test_one_that_comes_at_the_end_of_a_long_queue_causes_no_look() -> None:
    desk, _, _, meter = crowd(200)
    desk.tokens(1.0)
    assert desk.scheduler.pending == 1  # the timer
    desk.run()
    assert meter.asked == 1  # too large?


def test_nobody_is_looked_at_while_all_places_are_taken() -> None:
    desk = Desk(exact("10 tokens/minute"))
    desk.tokens(10.0)
    desk.tokens(1.0)
    desk.run(1.0)
    assert desk.scheduler.pending == 1
    desk.gate.set(limit=1)
    desk.run()
    assert desk.scheduler.pending == 0
    desk.tokens(1.0)
    assert desk.scheduler.pending == 0


class Counting:
    """A meter that counts how often it is asked."""

    def __init__(self, real: Any) -> None:
        self.real = real
        self.asked = 0

    def __getattr__(self, name: str) -> Any:
        self.asked += 1
        return getattr(self.real, name)


def crowd(n: int) -> tuple[Desk, Asker, list[Asker], Counting]:
    """Return a gate with one on the wire and `n` that wait for a quota."""
    desk = Desk("1000 tokens/minute")
    meter = Counting(desk.gate._ledger.meters[0])
    desk.gate._ledger.meters = (meter,)
    out = desk.tokens(1000.0)
    askers = [desk.tokens(float(100 + k % 7)) for k in range(n)]
    desk.run()
    meter.asked = 0
    return desk, out, askers, meter


@pytest.mark.parametrize("backwards", [False, True], ids=["first-first", "last-first"])
def test_a_storm_of_cancels_takes_a_look_in_all_not_one_each(backwards: bool) -> None:
    desk, out, askers, meter = crowd(2_000)
    keep = askers[-1]
    for asker in reversed(askers) if backwards else askers:
        if asker is not keep:
            assert asker.waiter is not None
            asker.waiter.cancel()
    assert len(desk.gate.main.line.queue) < 100  # those that are gone do not stay
    desk.run()
    assert meter.asked < 100
    assert desk.gate.statistics().waiting == 1
    out.settle(tokens=0.0)
    desk.run()
    assert keep.at == 0.0


def test_many_that_settle_in_one_turn_take_one_look() -> None:
    desk = Desk("5000 tokens/minute")
    out = [desk.tokens(5.0) for _ in range(1_000)]
    head = desk.tokens(5_000.0)
    desk.run()
    meter = Counting(desk.gate._ledger.meters[0])
    desk.gate._ledger.meters = (meter,)
    for asker in out[:-1]:
        asker.settle(tokens=4.0)
    desk.run()
    assert meter.asked < 1_100  # a settlement each, and the look
    assert head.at is None


def test_ten_thousand_that_end_at_once_need_no_more_stack_than_one() -> None:
    desk = Desk(concurrency=1)
    first = desk.ask()
    askers = [desk.ask(act=lambda asker: asker.settle()) for _ in range(10_000)]
    first.settle()
    desk.run()
    assert all(asker.at == 0.0 for asker in askers)
    assert desk.gate.statistics().in_flight == desk.scheduler.pending == 0


def test_a_chain_of_ten_thousand_that_ask_from_within_needs_no_more_stack_than_one() -> None:
    desk = Desk(concurrency=1)
    starts: list[float | None] = []

    def follow(asker: Asker) -> None:
        starts.append(asker.at)
        asker.settle()
        if len(starts) < 10_000:
            desk.ask(act=follow)

    out = desk.ask()
    desk.ask(act=follow)
    out.settle()
    desk.run()
    assert len(starts) == 10_000
    assert desk.gate.statistics().in_flight == desk.scheduler.pending == 0


# those that raise, and the end


def boom(_asker: object) -> None:
    raise BoomError


def test_one_that_raises_does_not_stop_those_behind_it() -> None:
    desk = Desk(concurrency=2)
    first = [desk.ask(), desk.ask()]
    second = [desk.ask(act=boom), desk.ask()]
    for asker in first:
        asker.settle()  # whoever ends an attempt does not run the code of another
    with pytest.raises(BoomError):
        desk.run()
    assert second[0].at == 0.0
    desk.run()
    assert second[1].at == 0.0
    assert desk.gate.statistics().in_flight == 2


def test_a_closed_gate_turns_away_those_that_wait_and_those_that_come() -> None:
    scheduler = VirtualScheduler()
    with Gate(concurrency=1) as gate:
        out = Asker(gate, scheduler).ask()
        waiting = [Asker(gate, scheduler).ask() for _ in range(3)]
    for asker in waiting:
        assert isinstance(asker.error, ConfigError)
        assert str(asker.error) == "Gate(concurrency=1) is closed"
        assert asker.lease is None
    with pytest.raises(ConfigError, match="is closed"):
        Asker(gate, scheduler).ask()
    out.settle()
    gate.close()
    assert (gate.statistics().in_flight, gate.statistics().waiting, scheduler.pending) == (0, 0, 0)


def test_one_that_raises_when_it_is_turned_away_does_not_keep_it_from_the_others() -> None:
    desk = Desk(concurrency=1)
    desk.ask()
    askers = [desk.ask(act=act) for act in (boom, lambda asker: asker, boom, lambda asker: asker)]
    with pytest.raises(BoomError):
        desk.gate.close()
    with pytest.raises(BoomError):
        desk.run()
    desk.run()
    assert all(isinstance(asker.error, ConfigError) for asker in askers)
    assert (desk.gate.statistics().waiting, desk.scheduler.pending) == (0, 0)


def test_those_that_are_turned_away_may_take_the_others_along() -> None:
    desk = Desk("1/minute")
    desk.ask()
    askers: list[Asker] = []

    def cancel_all(_asker: Asker) -> None:
        for asker in askers:
            assert asker.waiter is not None
            asker.waiter.cancel()

    askers += [desk.ask(act=cancel_all) for _ in range(4)]
    desk.run()
    desk.gate.close()
    assert [asker.error is not None for asker in askers] == [True, False, False, False]
    assert (desk.gate.statistics().waiting, desk.scheduler.pending) == (0, 0)


def test_an_attempt_that_closes_the_gate_is_the_last() -> None:
    desk = Desk(concurrency=1)
    out = desk.ask()
    closing = desk.ask(act=lambda asker: (asker.settle(), asker.gate.close()) if asker.lease else None)
    last = desk.ask()
    out.settle()
    desk.run()
    assert closing.at == 0.0
    assert last.at is None
    assert last.error is not None


# loops and threads


def test_a_gate_in_use_on_one_loop_is_refused_on_another_and_idle_it_is_free() -> None:
    gate = Gate(exact("1/minute"), rate=10.0)
    first, second = VirtualScheduler(), VirtualScheduler()
    asker = Asker(gate, first).ask()
    with pytest.raises(ConfigError) as refusal:
        Asker(gate, second).ask()
    assert str(refusal.value) == (
        f"Gate('1 requests per 60 seconds', rate=10) is in use on {first!r} and cannot be used on {second!r} "
        "at the same time"
    )
    waiting = Asker(gate, first).ask()
    asker.settle()
    with pytest.raises(ConfigError):
        Asker(gate, second).ask()
    assert waiting.waiter is not None
    waiting.waiter.cancel()
    gate.pause(2.0)
    assert Asker(gate, second).ask().at == 0.0  # virtual time has a zero of its own: nothing is booked yet
    assert gate.statistics().rate == 10.0


def test_what_is_booked_stays_booked_when_the_next_loop_comes() -> None:
    gate = Gate("1000 tokens/minute")

    class Taker:
        lease: Lease | None = None

        def admitted(self, lease: Lease) -> None:
            self.lease = lease

        def turned_away(self, error: ConfigError) -> None:
            raise error

    async def use() -> None:
        taker = Taker()
        clock = loop_clock(asyncio.get_running_loop())
        gate.enter(gate.apply(clock, gate.amounts({"tokens": 400.0}), taker))
        assert taker.lease is not None
        taker.lease.settle("answered")

    asyncio.run(use())
    asyncio.run(use())
    assert gate.statistics().quotas[0].available == 200
    gate.set(limit=3, rate=5.0)  # its loop is closed
    assert (gate.limit, gate.statistics().rate) == (3, 5.0)


@pytest.mark.parametrize("virtual_first", [False, True])
def test_nothing_is_booked_yet_where_time_has_another_zero(virtual_first: bool) -> None:
    gate = Gate("1000 tokens/minute")

    def use(clock: Any) -> None:
        asker = Asker(gate, VirtualScheduler())
        gate.enter(gate.apply(clock, gate.amounts({"tokens": 400.0}), asker))
        asker.settle()
        assert gate.statistics().quotas[0].available == 600

    async def on_a_loop() -> None:
        use(loop_clock(asyncio.get_running_loop()))

    if virtual_first:
        late = VirtualScheduler()
        late.run(1e12)
        use(late)
    asyncio.run(on_a_loop())
    if not virtual_first:
        use(VirtualScheduler())


def test_set_and_close_may_be_called_from_another_thread() -> None:
    where: list[int] = []

    class Waiting:
        def __init__(self) -> None:
            self.done = asyncio.Event()

        def admitted(self, _lease: Lease) -> None:
            where.append(threading.get_ident())
            self.done.set()

        def turned_away(self, _error: ConfigError) -> None:
            self.admitted(None)  # type: ignore[arg-type]

    async def main() -> None:
        gate = Gate(concurrency=1)
        clock = loop_clock(asyncio.get_running_loop())
        askers = [Waiting() for _ in range(3)]
        for asker in askers:
            gate.enter(gate.apply(clock, (), asker))
        assert len(where) == 1
        await asyncio.to_thread(gate.set, limit=2)
        await asyncio.wait_for(askers[1].done.wait(), 10)
        assert len(where) == 2
        await asyncio.to_thread(gate.close)
        await asyncio.wait_for(askers[2].done.wait(), 10)
        assert set(where) == {threading.get_ident()}

    asyncio.run(main())


def busy() -> None:
    time.sleep(0.002)


def test_all_of_the_real_wait_is_said_to_be_for_something() -> None:
    class Waiting:
        def __init__(self) -> None:
            self.done = asyncio.Event()

        def admitted(self, lease: Lease) -> None:
            self.lease = lease
            self.done.set()

        def turned_away(self, error: ConfigError) -> None:
            raise error

    async def main() -> None:
        gate = Gate(exact("1/0.01 seconds"))
        clock = loop_clock(asyncio.get_running_loop())
        came: list[tuple[Waiting, Waiter]] = []
        for _ in range(4):
            asker = Waiting()
            came.append((asker, gate.apply(clock, (1.0,), asker)))
            gate.enter(came[-1][1])
            busy()  # before the loop can look
        for asker, waiter in came:
            await asyncio.wait_for(asker.done.wait(), 10)
            wait = asker.lease.at - waiter.since
            assert asker.lease.waited == ({"1 requests per 0.01 seconds": pytest.approx(wait)} if wait else {})

    asyncio.run(main())


def test_a_gate_runs_on_stock_virtual_time() -> None:
    scheduler = TestScheduler()
    clock = clock_of(scheduler)
    assert clock is not None
    gate = Gate(exact("1/5 seconds"))
    starts: list[float] = []

    class Noting:
        def admitted(self, lease: Lease) -> None:
            starts.append(lease.at)

        def turned_away(self, error: ConfigError) -> None:
            raise error

    for _ in range(3):
        gate.enter(gate.apply(clock, gate.amounts({}), Noting()))
    scheduler.advance_to(100.0)
    assert starts == pytest.approx([0.0, 5.0, 10.0], abs=0.01)


# values


def test_a_gate_is_pickled_with_its_configuration_and_without_its_state() -> None:
    desk = Desk("1/minute", Quota(90_000, per=60.0, unit="tokens", margin=1.0), concurrency=4, rate=9.0)
    desk.tokens(5.0)
    desk.gate.set(limit=7)
    gate = pickle.loads(pickle.dumps(desk.gate))
    said = gate.statistics()
    assert [entry.quota for entry in said.quotas] == [entry.quota for entry in desk.gate.statistics().quotas]
    assert [entry.available for entry in said.quotas] == [1, 90_000]
    assert (said.limit, said.rate, said.in_flight, said.admitted) == (7, 9.0, 0, 0)
    assert repr(gate) == "Gate('1 requests per 60 seconds', '90000 tokens per 60 seconds', concurrency=7, rate=9)"


def test_statistics_say_what_the_queue_waited_for_and_change_nothing() -> None:
    desk = Desk(exact("1/minute"), concurrency=3)
    desk.ask()
    desk.ask()
    desk.run(20.0)
    desk.gate.set(limit=1)
    desk.run(61.0)
    said = desk.gate.statistics()
    assert said.waited == {"concurrency": 41.0, "1 requests per 60 seconds": 20.0}
    desk.gate.set(limit=2)
    desk.run(90.0)
    assert desk.gate.statistics().waited == said.waited
    desk.gate.set(limit=3)
    desk.ask()
    desk.run(100.0)
    assert desk.gate.statistics().waited == {"concurrency": 41.0, "1 requests per 60 seconds": 30.0}
    assert (said.waiting, said.in_flight, said.admitted) == (1, 1, 1)


def test_what_the_first_waits_for_is_counted_up_to_now_also_between_looks() -> None:
    desk = Desk(exact("1/minute"))
    desk.ask()
    desk.ask()
    desk.run(20.0)
    assert desk.gate.statistics().waited == {"1 requests per 60 seconds": 20.0}


def test_explain_says_when_nothing_limits() -> None:
    desk = Desk(concurrency=2)
    assert str(desk.gate.explain()).startswith("limited by nothing: nothing is asked for\n")
    desk.ask()
    assert desk.gate.explain().binding == "nothing here: nobody waits"


def test_explain_says_how_full_a_quota_is_and_that_one_of_nothing_is_full() -> None:
    desk = Desk(exact("10 tokens/minute"), Quota(0, per=60, unit="usd"))
    desk.ask({"tokens": 4, "usd": 0})
    assert desk.gate.explain().fill == {"10 tokens per 60 seconds": 0.4, "0 usd per 60 seconds": 1.0}


def test_the_times_that_are_explained_are_parts_of_their_sum_longest_first() -> None:
    said = Explanation(binding="pace", seconds={"pace": 1.0, "network": 3.0}, fill={"1 usd per 1 seconds": 0.5})
    assert [line.split() for line in str(said).splitlines()] == [
        ["limited", "by", "pace"],
        ["time", "of", "all", "attempts:"],
        ["75%", "3.0", "s", "network"],
        ["25%", "1.0", "s", "pace"],
        ["quotas", "in", "use:"],
        ["50%", "of", "1", "usd", "per", "1", "seconds"],
    ]
    short = Explanation(binding="pace", seconds={"pace": 0.5}, fill={})
    assert "100%" in str(short)


def test_the_first_refusal_is_logged_and_further_ones_are_only_counted(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk()
    endings: list[Ending] = ["answered", "refused", "refused"]
    for logged, ending in enumerate(endings):
        desk.ask().settle(ending)
        assert len(caplog.records) == min(logged, 1)
    assert desk.gate.statistics().refused == 2


def test_to_look_at_what_is_available_changes_nothing() -> None:
    desk = Desk(exact("1/minute"))
    desk.ask()
    desk.run(61.0)
    before = desk.gate._ledger.meters[0]._next, desk.gate._ledger.meters[0]._head  # type: ignore[attr-defined]
    assert desk.available() == 1
    assert (desk.gate._ledger.meters[0]._next, desk.gate._ledger.meters[0]._head) == before  # type: ignore[attr-defined]


def test_a_gate_without_anything_lets_everything_pass_at_once() -> None:
    desk = Desk()
    assert all(desk.ask().at == 0.0 for _ in range(1_000))
    assert (desk.gate.limit, desk.gate.window, desk.gate.units) == (None, 256, ())
    assert desk.gate.statistics().in_flight == 1_000


def test_several_quotas_may_stand_in_one_text() -> None:
    assert Gate("500 requests/minute; 10/second", Quota("9 tokens/day")).units == ("requests", "requests", "tokens")


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((5,), {}, 'a quota must be a Quota or a text such as "500 requests/minute", got 5'),
        (("500",), {}, "cannot read quota '500': expected '/' or 'per' at the end"),
        ((), {"concurrency": 0}, "concurrency must be a whole number >= 1 or None, got 0"),
        ((), {"concurrency": 2.5}, "concurrency must be a whole number >= 1 or None, got 2.5"),
        ((), {"rate": 0}, "rate must be a finite number > 0 or None, got 0"),
        ((), {"rate": float("inf")}, "rate must be a finite number > 0 or None, got inf"),
    ],
)
def test_a_gate_refuses_bad_arguments_by_name_and_value(
    arguments: tuple[Any, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError) as refusal:
        Gate(*arguments, **options)
    assert str(refusal.value) == message


@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"limit": 1.5}, {"rate": 0}, {"rate": "5"}, {"limit": 2, "rate": -1}]
)
def test_a_bad_setting_is_refused_and_changes_nothing(options: dict[str, Any]) -> None:
    gate = Gate(concurrency=5, rate=3.0)
    with pytest.raises(ConfigError, match="^(limit|rate) must be a"):
        gate.set(**options)
    assert (gate.limit, gate.statistics().rate) == (5, 3.0)


@pytest.mark.parametrize(
    ("cost", "error", "message"),
    [
        ({}, ConfigError, "the quota 10 tokens per 60 seconds counts tokens, and the cost names only nothing"),
        (
            {"requests": 1, "images": 2},
            ConfigError,
            "the quota 10 tokens per 60 seconds counts tokens, and the cost names only requests, images",
        ),
        ({"tokens": -1}, ConfigError, "the cost in tokens must be a finite number >= 0, got -1"),
        ({"tokens": "9"}, ConfigError, "the cost in tokens must be a finite number >= 0, got '9'"),
        (
            {"tokens": None},
            ConfigError,
            "the quota 10 tokens per 60 seconds counts tokens, and the cost names only tokens",
        ),
        ({"tokens": float("nan")}, ConfigError, "the cost in tokens must be a finite number >= 0, got nan"),
        ({"tokens": float("inf")}, ConfigError, "the cost in tokens must be a finite number >= 0, got inf"),
        ({"tokens": True}, ConfigError, "the cost in tokens must be a finite number >= 0, got True"),
        (
            {"tokens": 12_000},
            InvalidRequestError,
            "needs 12,000 tokens, and the quota 10 tokens per 60 seconds never admits more than 10",
        ),
        (
            {"tokens": 1, "requests": 4},
            InvalidRequestError,
            "needs 4 requests, and the quota 3 requests per 60 seconds",
        ),
    ],
)
def test_a_cost_that_cannot_be_kept_is_refused_with_the_numbers(
    cost: dict[str, Any], error: type[Exception], message: str
) -> None:
    gate = Gate("10 tokens/minute", "3 requests/minute")
    with pytest.raises(error) as refusal:
        gate.amounts(cost)
    assert str(refusal.value).startswith(message)


def test_a_cost_is_one_request_unless_it_says_otherwise() -> None:
    gate = Gate("10 tokens/minute", "3 requests/minute")
    assert gate.amounts({"tokens": 10}) == (10, 1.0)
    assert gate.amounts({"tokens": 0, "requests": 3}) == (0, 3)
