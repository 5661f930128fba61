"""What one process holds of a shared quota, against a store that is a few lines, late and forgetful."""

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from rxllm.policies.local_lease import SPACING, Ask, Grant, LocalLease

LIFE, KEEP, LIMIT = 1.0, 32.0, 64.0
TICKS = st.integers(0, 40).map(lambda ticks: ticks / 16)
COSTS = st.integers(1, 24).map(float)


class Log:
    """A store: what was leased, from when on it counts, and what it grants."""

    def __init__(self) -> None:
        self.entries: dict[int, list[float]] = {}  # number: begins, amount
        self.generation = 0

    def used(self, now: float) -> float:
        return sum(amount for begins, amount in self.entries.values() if begins + KEEP > now)

    def exchange(self, ask: Ask, untold: list[tuple[int, float, float]], now: float) -> Grant:
        self.entries = {number: entry for number, entry in self.entries.items() if entry[0] + KEEP > now}
        for number, back, early in ask.closing:
            if number in self.entries:
                entry = self.entries[number]
                entry[0] -= early
                entry[1] -= min(back, entry[1])
        for number, amount, seconds in untold:
            self.entries[number] = [now + seconds, amount]
        self.entries[ask.number] = [now + LIFE, ask.carry + ask.debt]
        room = LIMIT - self.used(now)
        granted = min(ask.wanted, room) if ask.wanted and room >= max(ask.least, 1) else 0.0
        self.entries[ask.number][1] += granted
        return Grant(granted, room - granted, 0.25, LIFE)


class Shared(RuleBasedStateMachine):
    """Spends, settles and asks in any order; requests and answers are late, or lost, and the store forgets."""

    def __init__(self) -> None:
        super().__init__()
        self.lease = LocalLease("me", limit=LIMIT, life=LIFE, keep=KEEP, size=8.0)
        self.log = Log()
        self.now = 0.0
        self.spends: list[list[float]] = []  # when, how much
        self.tickets: list[tuple[int, list[float]]] = []
        self.flight: tuple[Ask, list[tuple[int, float, float]]] | None = None
        self.answer: Grant | None = None
        self.amnesia = False  # the store has forgotten, and nobody knows

    def spent(self, number: int, cost: float) -> None:
        spend = [self.now, cost]
        self.spends.append(spend)
        self.tickets.append((number, spend))

    @rule(seconds=TICKS)
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule(cost=COSTS)
    def book_if_it_fits(self, cost: float) -> None:
        if self.lease.fits(cost, self.now):
            self.spent(self.lease.book(cost, self.now), cost)
        else:
            self.lease.needed = max(self.lease.needed, cost)

    @rule(cost=COSTS)
    def book_although_it_does_not_fit(self, cost: float) -> None:
        self.spent(self.lease.book(cost, self.now), cost)

    @rule(cost=COSTS)
    def book_without_the_store(self, cost: float) -> None:
        self.spent(self.lease.book_aside(cost, self.now), cost)

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), actual=st.integers(0, 40).map(float))
    def settle(self, data: st.DataObject, actual: float) -> None:
        number, spend = self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))
        change = actual - spend[1]
        if change > 0:
            self.spends.append([self.now, change])  # it is known now
        else:
            spend[1] = actual
        self.lease.settle(number, change, self.now)

    @precondition(lambda self: self.flight is None)
    @rule(stop=st.booleans())
    def ask(self, stop: bool) -> None:
        self.flight = self.lease.ask(self.now, stop=stop), self.lease.untold(self.now)

    @precondition(lambda self: self.flight is not None and self.answer is None)
    @rule()
    def arrive(self) -> None:
        ask, untold = self.flight
        if self.amnesia:
            self.amnesia = False
            self.lease.forgotten()
            untold = self.lease.untold(self.now)
            self.flight = ask, untold
        self.answer = self.log.exchange(ask, untold, self.now)

    @precondition(lambda self: self.answer is not None)
    @rule()
    def answered(self) -> None:
        ask, untold = self.flight
        self.lease.told(untold)
        self.lease.take(ask, self.answer, self.now)
        self.flight = self.answer = None

    @precondition(lambda self: self.flight is not None)
    @rule()
    def not_answered(self) -> None:
        self.lease.lost(self.flight[0])
        self.flight = self.answer = None

    @precondition(lambda self: self.flight is None and not self.amnesia)
    @rule()
    def forget(self) -> None:
        self.log.entries.clear()
        self.amnesia = True

    @rule(most=COSTS)
    def others_use_it(self, most: float) -> None:
        self.lease.cut(most)

    @invariant()
    def nothing_is_counted_less_than_it_was_used(self) -> None:
        used = sum(cost for at, cost in self.spends if at + KEEP > self.now)
        untold = sum(amount for _, amount, _ in self.lease.untold(self.now))
        if not self.amnesia:
            assert self.log.used(self.now) + self.lease.debt + untold >= used - 1e-9

    @invariant()
    def what_is_in_hand_is_counted_too(self) -> None:
        assert self.lease.hand >= 0
        if not self.amnesia and self.flight is None:
            used = sum(cost for at, cost in self.spends if at + KEEP > self.now)
            untold = sum(amount for _, amount, _ in self.lease.untold(self.now))
            counted = self.log.used(self.now) + self.lease.debt + untold
            assert counted >= used + self.lease.hand_at(self.now) - 1e-9


Shared.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
test_the_store_never_counts_less_than_was_used_whatever_is_late_lost_or_forgotten = Shared.TestCase


class Peer:
    """A holder whose store answers at once."""

    def __init__(self, **settings: float) -> None:
        self.lease = LocalLease("me", **{"limit": LIMIT, "life": LIFE, "keep": 1e9, "size": 8.0, **settings})
        self.log = Log()

    def asks(self, now: float, *, stop: bool = False, needed: float = 0.0) -> Ask:
        self.lease.needed = needed
        ask, untold = self.lease.ask(now, stop=stop), self.lease.untold(now)
        grant = self.log.exchange(ask, untold, now)
        self.lease.told(untold)
        self.lease.take(ask, grant, now)
        return ask

    def counted(self) -> float:
        return sum(amount for _, amount in self.log.entries.values())


def test_what_was_not_spent_comes_back_to_the_unit() -> None:
    peer = Peer()
    peer.asks(0.0, needed=3.0)
    first = peer.lease.book(3.0, 0.0)
    peer.asks(0.5)  # in advance: what is left goes on
    second = peer.lease.book(2.0, 0.75)
    peer.lease.settle(first, -2.0, 0.8)  # of a lease that is over
    peer.lease.settle(second, -1.0, 0.8)  # of the one in hand
    peer.lease.settle(second, 4.0, 0.9)
    peer.asks(0.9, stop=True)
    assert peer.counted() == 3 - 2 + 2 - 1 + 4
    assert not peer.lease.owes


def test_a_lease_counts_from_when_its_last_unit_was_spent() -> None:
    peer = Peer()
    peer.asks(0.0, needed=3.0)
    peer.lease.book(3.0, 0.25)
    number = peer.lease.number
    assert peer.log.entries[number][0] == LIFE
    peer.asks(0.75, needed=30.0)
    assert peer.log.entries[number] == [0.25, 3.0]


def test_a_head_that_does_not_fit_gives_back_what_is_in_hand_so_that_two_cannot_wait_for_each_other() -> None:
    peer = Peer()
    peer.asks(0.0, needed=8.0)
    peer.lease.needed = 60.0
    request = peer.lease.ask(0.1)
    assert request.carry == 0
    assert request.closing == ((1, 8.0, LIFE),)
    assert (request.least, peer.lease.hand) == (60.0, 0.0)


def test_a_lease_in_advance_keeps_what_is_in_hand_usable_meanwhile() -> None:
    peer = Peer()
    peer.asks(0.0, needed=8.0)
    lease = peer.lease
    lease.book(3.0, 0.1)
    request = lease.ask(0.5)
    assert (request.carry, request.least, lease.fits(5.0, 0.6)) == (5.0, 0.0, True)
    lease.book(4.0, 0.6)
    lease.take(request, Grant(7.0, 0.0, 0.0, LIFE), 0.7)
    assert lease.hand == 5 - 4 + 7
    assert lease.until == 0.5 + LIFE  # from before it was sent
    assert not lease.fits(1.0, 0.5 + LIFE)


def test_it_grows_while_leases_are_used_up_early_and_shrinks_to_what_is_used() -> None:
    peer = Peer(limit=1e6, size=8.0)
    peer.log.used = lambda now: -1e9  # plenty
    now, wanted = 0.0, []
    for _ in range(4):
        ask = peer.asks(now, needed=1.0)
        wanted.append(ask.wanted)
        peer.lease.book(peer.lease.hand, now)
        now += 0.01
    assert wanted == [8, 16, 32, 64]
    peer.asks(now, needed=1.0)
    peer.lease.book(10.0, now)
    ask = peer.asks(peer.lease.refresh_at)
    assert ask.carry + ask.wanted == max(ask.carry, 20.0)
    assert peer.lease.size == 20


def test_who_got_less_than_was_wanted_does_not_ask_at_once_again() -> None:
    lease = LocalLease("me", limit=LIMIT, life=LIFE, keep=KEEP, size=8.0)
    ask = lease.ask(1.0)
    lease.take(ask, Grant(3.0, 0.0, 0.0, LIFE), 1.25)
    assert lease.next_ask == 1 + SPACING * LIFE
    lease.needed = 1.0
    ask = lease.ask(2.0)
    lease.take(ask, Grant(0.0, 0.0, 5.0, LIFE), 2.25)
    assert lease.next_ask == 7.25
    ask = lease.ask(8.0)
    lease.take(ask, Grant(ask.wanted, 9.0, 0.0, LIFE), 8.25)
    assert lease.next_ask == -math.inf


@pytest.mark.parametrize(
    ("round_trip", "ahead"),
    [
        pytest.param(0.001, 0.25, id="a-fast-store-is-asked-a-quarter-ahead"),
        pytest.param(0.2, 0.4, id="a-slow-one-two-round-trips"),
        pytest.param(0.9, 0.75, id="and-never-more-than-three-quarters"),
    ],
)
def test_the_next_lease_is_asked_for_ahead_of_the_end(round_trip: float, ahead: float) -> None:
    lease = LocalLease("me", limit=LIMIT, life=LIFE, keep=KEEP, size=8.0)
    ask = lease.ask(0.0)
    lease.take(ask, Grant(8.0, 9.0, 0.0, LIFE), round_trip)
    assert lease.until - lease.refresh_at == pytest.approx(ahead)


def test_a_settlement_after_the_store_has_forgotten_the_lease_changes_nothing() -> None:
    peer = Peer(keep=KEEP)
    peer.asks(0.0, needed=8.0)
    number = peer.lease.book(8.0, 0.0)
    peer.lease.settle(number, -5.0, LIFE + KEEP + 1)
    assert not peer.lease.owes


def test_a_lease_that_is_not_taken_back_stays_in_hand_until_its_window_ends() -> None:
    lease = LocalLease("me", limit=LIMIT, life=LIFE, keep=10.0, size=8.0, returns=False)
    ask = lease.ask(0.0)
    lease.take(ask, Grant(8.0, 9.0, 0.0, 10.0), 0.0)
    lease.book(3.0, 1.0)
    lease.needed = 7.0
    ask = lease.ask(2.0)
    assert (ask.closing, ask.carry, ask.least, lease.hand) == ((), 0.0, 2.0, 5.0)
    lease.take(ask, Grant(4.0, 9.0, 0.0, 8.0), 2.0)
    assert (lease.hand, lease.until) == (9.0, 10.0)
    ask = lease.ask(12.0)
    lease.take(ask, Grant(2.0, 9.0, 0.0, 10.0), 12.0)
    assert lease.hand == 2.0  # what was left of the last window is over


def in_flight() -> tuple[LocalLease, Ask]:
    """Return a lease with 5 of 8 units in hand, and the request for the next one, which takes them over."""
    peer = Peer(keep=KEEP)
    peer.asks(0.0, needed=8.0)
    peer.lease.book(3.0, 0.1)
    return peer.lease, peer.lease.ask(0.5)


def test_what_comes_back_while_the_next_lease_is_asked_for_belongs_to_the_one_that_is_told_to_be_over() -> None:
    lease, request = in_flight()
    number = lease.number
    lease.settle(number, -2.0, 0.6)
    assert lease.hand == 5  # the store was told that the rest of that lease is used up
    lease.take(request, Grant(3.0, 9.0, 0.0, LIFE), 0.7)
    assert (number, 2.0, 0.0) in lease.ask(0.8).closing


def test_a_unit_that_is_spent_while_the_next_lease_is_asked_for_counts_from_then_on() -> None:
    lease, request = in_flight()
    lease.book(1.0, 0.6)
    lease.take(request, Grant(3.0, 9.0, 0.0, LIFE), 0.7)
    ((_, back, early),) = lease.ask(0.8, stop=True).closing
    assert back == 7
    assert 0.5 + LIFE - early >= 0.6


def test_what_a_lost_request_took_over_is_still_counted_with_its_old_lease() -> None:
    lease, request = in_flight()
    lease.book(5.0, 0.6)
    lease.lost(request)
    lease.forgotten()
    assert sum(amount for _, amount, _ in lease.untold(0.7)) == 8
