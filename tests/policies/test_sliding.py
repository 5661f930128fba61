import copy
import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rxllm.policies.meters import Meter, meter
from rxllm.policies.quota import Quota
from rxllm.policies.sliding import SLOTS, SlidingLog, Ticket

LIMIT = 20
costs = st.integers(0, 4 * LIMIT + 4).map(lambda quarters: quarters / 4)  # exact as floats


class Against(RuleBasedStateMachine):
    """A log against its whole history, in exact arithmetic.

    What the log counts lies between the sum over the window and the sum over the window and one grain.
    """

    slots = SLOTS
    pers: tuple[float, ...]
    origins: tuple[float, ...]
    steps: tuple[float, ...]

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        per = data.draw(st.sampled_from(self.pers))
        margin = data.draw(st.sampled_from([0.0, per / 20]))
        self.now = data.draw(st.sampled_from(self.origins))
        self.log = SlidingLog(LIMIT, per, margin=margin, slots=self.slots)
        self.window = Fraction(per + margin)
        self.history: list[list[float]] = []  # when, how much
        self.open: list[tuple[Ticket, list[float], float]] = []

    def booked(self, now: float, late: Fraction = Fraction(0)) -> float:
        return sum(cost for at, cost in self.history if Fraction(now) < Fraction(at) + self.window + late)

    def bounds(self, now: float) -> tuple[float, float]:
        """Return the least and the most that may count as booked: it is a fact which, or settled as such."""
        grain = self.window / (self.slots - 2) + 2 * Fraction(math.ulp(now + float(self.window)))
        return self.booked(now), self.booked(now, grain)

    @rule(data=st.data())
    def wait(self, data: st.DataObject) -> None:
        self.now += data.draw(st.sampled_from(self.steps)) * float(self.window)

    @rule(cost=costs, force=st.booleans())
    def book(self, cost: float, force: bool) -> None:
        least, most = self.bounds(self.now)
        fits = self.log.fits(cost, self.now)
        assert fits or most + cost > LIMIT  # not idle
        assert least + cost <= LIMIT or not fits  # not over: the invariant
        if fits or force:
            entry = [self.now, cost]
            self.history.append(entry)
            self.open.append((self.log.book(cost, self.now), entry, cost))

    @precondition(lambda self: self.open)
    @rule(data=st.data(), actual=costs)
    def settle(self, data: st.DataObject, actual: float) -> None:
        ticket, entry, cost = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.log.settle(ticket, actual, self.now)
        entry[1] = min(cost, actual)
        if actual > cost:
            self.history.append([self.now, actual - cost])

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def refund(self, data: st.DataObject) -> None:
        ticket, entry, _ = self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))
        self.log.refund(ticket, self.now)
        entry[1] = 0.0

    @rule(cost=costs, jump=st.booleans())
    def foresee(self, cost: float, jump: bool) -> None:
        assert self.log.too_large(cost) == (cost > LIMIT)
        ready = self.log.ready_at(cost, self.now)
        if cost > LIMIT:
            assert ready == math.inf
            return
        assert (ready == self.now) if self.log.fits(cost, self.now) else (ready > self.now)
        assert self.booked(ready) + cost <= LIMIT
        earliest = [float(Fraction(at) + self.window) for at, _ in self.history if at >= self.now - 2 * self.window]
        late = float(self.window / (self.slots - 2)) + 2 * math.ulp(ready)
        assert ready == self.now or any(ready - late <= at <= ready for at in earliest)
        if ready > self.now:
            assert not copy.deepcopy(self.log).fits(cost, math.nextafter(ready, -math.inf))
        assert copy.deepcopy(self.log).fits(cost, ready)
        if jump:
            self.now = ready
            assert self.log.fits(cost, self.now)

    @rule()
    def look_at_the_next_expiry(self) -> None:
        expiry = self.log.next_expiry(self.now)
        live = [at for at, _ in self.history if self.now < Fraction(at) + self.window]
        if expiry is None:
            assert not live
            return
        assert expiry > self.now
        assert copy.deepcopy(self.log).next_expiry(math.nextafter(expiry, -math.inf)) == expiry
        assert copy.deepcopy(self.log).next_expiry(expiry) != expiry
        assert not live or Fraction(expiry) >= min(live) + self.window

    @invariant()
    def what_is_available_is_what_the_history_leaves(self) -> None:
        least, most = self.bounds(self.now)
        assert LIMIT - most <= self.log.available(self.now) <= LIMIT - least

    @invariant()
    def the_ring_never_overflows(self) -> None:
        assert self.log._next - self.log._head <= self.slots


class Exact(Against):
    """Steps far coarser than the grain: the log is the history, to the last bit."""

    pers = (0.1, 1.0, 7.3)
    origins = (0.0, 1e3, 123456.789)
    steps = (0.0, 0.1, 0.25, 0.5, 0.9, 1.0, 1.7)


class Coarse(Against):
    """Few slots, so that they are shared and the ring turns; also at the ends of the floats."""

    slots = 5
    pers = (0.1, 1.0, 7.3)
    origins = (-1e4, 0.0, 1e6, 2.0**52, 1e17)
    steps = (0.0, 1e-3, 0.02, 0.1, 0.33, 0.34, 0.5, 1.0)


class Smallest(Coarse):
    slots = 4


for machine in (Exact, Coarse, Smallest):
    machine.TestCase.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)

TestExactLog = Exact.TestCase
TestCoarseLog = Coarse.TestCase
TestSmallestLog = Smallest.TestCase


@given(
    st.floats(-1e9, 1e9),
    st.floats(1e-3, 1e7),
    st.floats(0, 1),
    st.lists(st.floats(0, 2), min_size=1, max_size=50),
    st.integers(4, 20),
)
def test_whatever_the_floats_it_is_never_early_and_a_timer_finds_what_it_was_armed_for(
    now: float, per: float, margin: float, waits: list[float], slots: int
) -> None:
    log = SlidingLog(3, per, margin=margin, slots=slots)
    starts: list[float] = []
    for wait in waits:
        now += wait * per
        ready = log.ready_at(1, now)
        assert ready >= now
        now = ready
        assert log.fits(1, now)
        log.book(1, now)
        assert sum(Fraction(now) < Fraction(start) + Fraction(per + margin) for start in starts) < 3
        starts.append(now)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1e-6, 1)), max_size=60))
def test_costs_that_round_never_starve(bookings: list[tuple[float, float]]) -> None:
    log, now = SlidingLog(1.0, 1.0, slots=8), 0.0
    for wait, cost in bookings:
        now = log.ready_at(cost, now + wait)
        assert log.fits(cost, now)
        log.book(cost, now)
    assert log.available(now + 3.0) == 1.0  # what rounding left is gone


def test_a_full_log_takes_the_same_at_the_same_pace_for_ever() -> None:
    log, now, starts = SlidingLog(5, 10.0), 0.0, []
    for _ in range(25):
        now = log.ready_at(1, now)
        log.book(1, now)
        starts.append(now)
    assert starts == [10.0 * (n // 5) for n in range(25)]


def test_the_default_log_is_late_by_a_fortieth_of_a_percent_at_most() -> None:
    log = SlidingLog(1e9, 60.0)
    booked = [n * 0.001 for n in range(61_000)]
    for at in booked:
        log.book(1, at)
    for now in (60.9995, 61.5, 75.0, 119.0):
        really = sum(at > now - 60.0 for at in booked)
        counted = 1e9 - log.available(now)
        assert really <= counted <= really + 60.0 * 0.00025 / 0.001


def test_a_debt_delays_until_enough_has_expired() -> None:
    log = SlidingLog(10, 60.0)
    early = log.book(4, 0.0)
    log.book(6, 30.0)
    log.settle(early, 15, 40.0)  # 11 more than booked
    assert log.available(40.0) == -11
    assert log.available(60.0) == -7
    assert log.available(90.0) == -1
    assert log.ready_at(1, 40.0) == log.ready_at(10, 40.0) == 100.0


def test_a_settlement_after_expiry_books_only_what_is_above() -> None:
    log = SlidingLog(10, 60.0)
    low, high, gone = log.book(2, 0.0), log.book(2, 0.0), log.book(2, 0.0)
    log.settle(low, 1, 100.0)
    log.refund(gone, 100.0)
    assert log.available(100.0) == 10
    log.settle(high, 7, 100.0)
    assert log.available(100.0) == 5
    assert log.available(160.0) == 10


def test_a_log_that_was_idle_for_long_starts_anew() -> None:
    log = SlidingLog(10, 1.0, slots=4)
    for start in (0.0, 50.0, 100.0):
        for n in range(4):
            log.book(2.5, start + n / 2)
        assert log.available(start + 1.5) == 5  # two have expired by then
    assert log.next_expiry(200.0) is None


def test_the_margin_keeps_the_window_longer() -> None:
    log = SlidingLog(1, 1.0, margin=0.5)
    log.book(1, 0.0)
    assert log.ready_at(1, 0.0) == log.next_expiry(0.0) == 1.5


def test_the_same_log_stays_small() -> None:
    log = SlidingLog(1e9, 60.0)
    for n in range(20_000):
        log.book(1, n * 0.01)
    assert log._next - log._head <= SLOTS
    assert log._last.itemsize * len(log._last) + log._amounts.itemsize * len(log._amounts) == 65_536


@pytest.mark.parametrize("text", ["10/second", "90_000 tokens/minute"])
def test_a_quota_makes_an_empty_meter_of_its_limit_and_window(text: str) -> None:
    quota = Quota(text)
    new: Meter = meter(quota)
    assert new.available(0.0) == new.limit == quota.limit
    assert new.next_expiry(0.0) is None
    new.book(quota.limit, 0.0)
    assert new.next_expiry(0.0) == new.ready_at(1, 0.0) == quota.window
    assert meter(quota) is not new


def test_a_booking_never_joins_a_slot_that_has_expired() -> None:
    log, now = SlidingLog(10, 1.0, slots=4), 2.0**52 + 1  # whole seconds only, and the half one rounds up
    log.book(10, now)
    assert log.fits(10, now + 1)
    log.book(10, now + 1)
    assert log.next_expiry(now + 1) == now + 2
    assert log.available(now + 2) == 10


def test_it_waits_no_longer_than_until_just_enough_has_expired() -> None:
    log = SlidingLog(3, 60.0)
    for at in (0.0, 10.0, 20.0):
        log.book(1, at)
    assert [log.ready_at(cost, 20.0) for cost in (1, 2, 3)] == [60.0, 70.0, 80.0]


def test_what_rounding_leaves_is_gone_when_the_last_slot_expires() -> None:
    log = SlidingLog(0.3, 60.0)
    log.book(0.1, 0.0)
    log.book(0.2, 10.0)
    assert 0.1 + 0.2 - 0.1 - 0.2 + 0.3 > 0.3
    assert log.ready_at(0.3, 10.0) == 70.0
    assert log.fits(0.3, 70.0)


@pytest.mark.parametrize("slots", [4, 5, 12, 100])
def test_the_ring_holds_what_is_booked_as_fast_as_slots_can_open(slots: int) -> None:
    log, now, starts = SlidingLog(10_000, 10.0, slots=slots), 0.0, []
    for n in range(6 * slots):
        now = (
            log._close if n % 2 else math.nextafter(max(now, log._close), math.inf)
        )  # the latest that joins; a new one
        log.book(1, now)
        starts.append(now)
        counted = 10_000 - log.available(now)
        assert sum(now - at < 10.0 for at in starts) <= counted
        assert counted <= sum(now - at < 10.0 * (1 + 1.001 / (slots - 2)) for at in starts)
        assert log._next - log._head <= slots
    assert log._next == 3 * slots


@settings(max_examples=500)
@given(st.floats(-1e9, 1e9) | st.floats(0, 1), st.floats(1e-3, 1e9) | st.floats(0.1, 100))
def test_a_slot_expires_at_the_first_float_that_is_not_early(now: float, per: float) -> None:
    log = SlidingLog(1, per)
    log.book(1, now)
    expiry = log.next_expiry(now)
    assert expiry is not None
    assert Fraction(math.nextafter(expiry, -math.inf)) < Fraction(now) + Fraction(per) <= Fraction(expiry)


def test_a_margin_that_grows_counts_for_what_is_booked_and_ends_at_a_quarter_of_the_window() -> None:
    log = SlidingLog(1, 8.0, margin=0.5)
    log.book(1, 0.0)
    ready = []
    for margin in (0.25, 1.0, 100.0, 0.75, 0.0):
        log.widen(margin)
        assert not log.fits(1, math.nextafter(log.ready_at(1, 0.0), 0.0))
        ready.append(log.ready_at(1, 0.0))
    assert ready == [8.5, 9.0, 10.0, 8.75, 8.5]
    assert log.fits(1, 8.5)
    assert not SlidingLog(1, 8.0, margin=3.0).fits(2, 0.0)


@pytest.mark.parametrize("slots", [4, 5, 12])
@settings(max_examples=200)
@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.01, 0.05, 0.1, 0.3, 1.0]), st.none() | st.floats(0, 3)),
        min_size=1,
        max_size=80,
    )
)
def test_whatever_the_margin_becomes_the_ring_holds_and_nothing_is_free_early(
    slots: int, steps: list[tuple[float, float | None]]
) -> None:
    log, now, margin = SlidingLog(1e6, 8.0, margin=0.5, slots=slots), 0.0, 0.5
    live: list[float] = []  # what is over once does not come back
    for step, wider in steps:
        now += step * 8.0
        live = [start for start in live if now - start < 8.0 + margin]
        if wider is not None:
            log.widen(wider)
            margin = max(0.5, min(wider, 2.0))
            live = [start for start in live if now - start < 8.0 + margin]
        log.book(1, now)
        live.append(now)
        assert log._next - log._head <= slots
        for at in (now, now + 4.0, now + 8.5):
            counted = 1e6 - log.available(at)
            assert counted >= sum(at - start < 8.0 + margin - 1e-9 for start in live)
        assert log.booked(now) == 1e6 - log.available(now)
    assert log.fits(1e6, now + 8.0 + margin + 1e-9)


def test_a_ring_that_was_full_when_the_margin_grew_books_into_the_newest_slot_until_one_is_free() -> None:
    log = SlidingLog(100, 8.0, slots=4)
    for now in (0.0, 3.9, 4.001, 8.0, 8.002):  # two share a slot: a grain is 4
        log.book(1, now)
    log.widen(2.0)
    for now, slots in ((12.0, 3), (12.003, 4), (13.0, 4), (13.5, 4), (14.0, 4)):
        log.book(1, now)
        assert log._next - log._head == slots
        log._close = -math.inf  # as if many slots lay within the window
    assert log._next == 5
    assert log.available(23.4) == 96  # those of 12.003, 13 and 13.5 are over together, and then that of 14
    assert log.available(23.5) == 99


def test_a_margin_that_grows_makes_the_slots_longer_so_that_they_are_enough() -> None:
    log = SlidingLog(1e6, 8.0, slots=12)
    log.widen(2.0)
    starts = [n / 64 for n in range(64 * 30)]
    for now in starts:
        log.book(1, now)
        assert 1e6 - log.available(now) <= sum(
            now - start < 10.0 * (1 + 1.001 / 10) for start in starts if start <= now
        )


def test_slots_that_were_made_for_a_wider_margin_are_not_counted_as_shorter() -> None:
    log = SlidingLog(LIMIT, 8.0, slots=6)
    log.widen(2.0)  # a grain is 2.5 seconds
    log.book(4, 100.0)
    log.book(4, 102.4)  # in the same slot
    log.widen(0.0)
    log.rebase(LIMIT - 8, None, 108.3, sent=108.3)  # the first four may be gone there: so eight may be of others
    assert log.available(108.3) == LIMIT - 16


@settings(max_examples=200)
@given(
    st.lists(st.tuples(st.floats(0, 4), st.integers(0, 9)), max_size=30),
    st.lists(st.tuples(st.floats(0, 4), st.integers(0, 9)), max_size=20),
    st.integers(4, 12),
)
def test_another_log_goes_on_where_one_stopped(
    before: list[tuple[float, int]], after: list[tuple[float, int]], slots: int
) -> None:
    first, second = (SlidingLog(LIMIT, 8.0, margin=0.5, slots=slots) for _ in range(2))
    now = 0.0
    for wait, cost in before:
        now += wait
        first.book(cost, now)
    assert [first.entry(entry.slot) for entry in first.entries(now)] == first.entries(now)
    second.restore(first.entries(now), now)
    for wait, cost in after:
        now += wait
        assert second.available(now) == first.available(now)
        assert second.ready_at(cost, now) == first.ready_at(cost, now)
        first.book(cost, now)
        second.book(cost, now)


def test_a_slot_that_has_expired_has_no_entry() -> None:
    log = SlidingLog(10, 8.0)
    slot, _ = log.book(1, 0.0)
    assert log.entry(slot) == (0, 0.0, 1.0, log._close)
    assert log.newest == slot
    assert log.entries(8.0) == []
    assert log.entry(slot) is None
    assert log.entry(slot + 1) is None
