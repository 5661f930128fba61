"""A provider that counts an attempt when it ends."""

import heapq
import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm.policies.held import HELD, HeldMeter
from rxllm.policies.meters import LocalMeter, meter
from rxllm.policies.quota import Quota, Strategy

LIMIT, PER = 16, 8.0
STRATEGIES: tuple[Strategy, ...] = ("sliding", "fixed", "bucket")


def new(strategy: Strategy = "sliding") -> LocalMeter:
    return meter(Quota(LIMIT, per=PER, unit="tokens", strategy=strategy, margin=0.0, charged_at="end"))


def counts(strategy: Strategy, ends: list[tuple[float, float]]) -> bool:
    """Say whether a server that counts at the end has admitted no more than its quota, in any window."""
    ends = sorted(ends)
    if strategy != "bucket":  # a fixed window is one of any, so this is stricter
        return all(sum(cost for at, cost in ends if last - PER < at <= last) <= LIMIT for last, _ in ends)
    level, before = float(LIMIT), 0.0
    for at, cost in ends:
        level, before = min(LIMIT, level + (at - before) * LIMIT / PER) - cost, at
        if level < -1e-9:
            return False
    return True


attempts = st.tuples(
    st.integers(0, 40).map(lambda n: n / 16),  # after the one before
    st.integers(1, LIMIT),  # reserved
    st.integers(0, 8).map(lambda n: n / 8),  # the part of it that is used
    st.integers(0, 80).map(lambda n: n / 4),  # seconds until it ends, up to more than two windows
    st.integers(0, 16).map(lambda n: n / 16),  # until we know
)


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=300, deadline=None)
@given(st.lists(attempts, min_size=3, max_size=25))
def test_no_window_of_a_server_that_counts_at_the_end_gets_more_than_the_limit(
    strategy: Strategy, plans: list[tuple[float, int, float, float, float]]
) -> None:
    local, order, now = new(strategy), itertools.count(), 0.0
    coming = [(math.fsum(plan[0] for plan in plans[: n + 1]), next(order), plan) for n, plan in enumerate(plans)]
    ends: list[tuple[float, float]] = []
    on_wire: list[tuple[float, int, tuple[int, float], float]] = []  # known, …, ticket, used
    for start, _, (_, cost, part, seconds, late) in coming:
        now = max(now, start)
        while True:
            while on_wire and on_wire[0][0] <= now:
                _, _, ticket, used = heapq.heappop(on_wire)
                local.settle(ticket, used, now)
            if local.fits(cost, now):
                break
            ready = local.ready_at(cost, now)
            assert ready > now
            known = on_wire[0][0] if on_wire else math.inf
            assert min(ready, known) < math.inf  # something will help
            now = min(ready, known)
        used = float(math.floor(cost * part))
        heapq.heappush(on_wire, (now + seconds + late, next(order), local.book(cost, now), used))
        ends.append((now + seconds, used))
    assert counts(strategy, ends)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_on_the_wire_is_held_for_longer_than_a_window(strategy: Strategy) -> None:
    local = new(strategy)
    ticket = local.book(10, 100.0)
    assert local.available(1000.0) == LIMIT - 10
    assert local.booked(1000.0) == 10
    assert local.fits(6, 1000.0)
    assert not local.fits(7, 1000.0)
    assert local.ready_at(7, 1000.0) == math.inf  # only its end helps
    local.settle(ticket, 4, 1000.0)
    assert local.available(1000.0) == LIMIT - 4
    assert local.ready_at(LIMIT, 1000.0) == pytest.approx(1000.0 + (PER if strategy != "bucket" else 2.0))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_used_nothing_is_never_booked(strategy: Strategy) -> None:
    local = new(strategy)
    first, second = local.book(10, 100.0), local.book(6, 100.0)
    local.refund(first, 101.0)
    local.settle(second, 0.0, 101.0)
    assert local.available(101.0) == LIMIT
    assert local.next_expiry(101.0) is None


def test_more_than_was_reserved_is_a_debt_of_the_end() -> None:
    local = new()
    ticket = local.book(4, 0.0)
    local.settle(ticket, LIMIT + 4, 100.0)
    assert local.available(100.0) == -4
    assert local.ready_at(1, 100.0) == 108.0


def test_what_rounding_left_of_what_was_held_is_gone() -> None:
    local = new()
    tickets = [local.book(0.1, 0.0) for _ in range(3)]
    for ticket in tickets:
        local.refund(ticket, 1.0)
    assert 0.1 + 0.1 + 0.1 - 0.1 - 0.1 - 0.1 > 0
    assert local.booked(1.0) == 0


def test_an_attempt_that_is_settled_before_its_reply_is_heeded_is_not_taken_for_that_of_others() -> None:
    local, now = new(), 100.0
    for _ in range(4):
        ticket = local.book(3, now)
        local.settle(ticket, 2, now)
        local.rebase(local.available(now), None, now, sent=now)
        assert local.available(now) == LIMIT - local.booked(now)
    local.rebase(2, None, now, sent=now)  # six of others
    assert local.available(now) == 2
    local.rebase(2, None, now, limit=8.0, sent=now)
    assert local.limit == 8
    assert local.too_large(9)


def test_a_margin_passes_through() -> None:
    local = new()
    local.settle(local.book(LIMIT, 0.0), LIMIT, 0.0)
    local.widen(1.0)
    assert local.next_expiry(0.0) == 9.0


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_was_held_when_a_run_ended_is_booked_when_the_next_begins(strategy: Strategy) -> None:
    before, after = new(strategy), new(strategy)
    before.settle(before.book(5, 100.0), 4, 100.0)
    before.book(3, 100.5)
    entries = before.entries(101.0)
    assert [entry.amount for entry in entries if entry.slot == HELD] == [3.0]
    assert before.entry(HELD) == entries[0]
    assert before.entry(before.newest) == entries[-1]
    after.restore(entries, 101.0)
    assert after.available(101.0) == before.available(101.0)
    assert after.available(109.0) == LIMIT  # it ended then at the latest
    assert before.available(109.0) == LIMIT - 3


def test_only_a_quota_that_is_charged_at_the_end_holds() -> None:
    assert isinstance(new(), HeldMeter)
    assert not isinstance(meter(Quota(LIMIT, per=PER)), HeldMeter)
