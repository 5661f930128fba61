import math
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm.policies.bucket import TokenBucket

costs = st.integers(0, 40).map(lambda n: n / 4)
steps = st.tuples(st.sampled_from(["book", "force", "settle", "refund"]), st.integers(0, 64), costs)


@settings(max_examples=300)
@given(st.lists(steps, max_size=40), st.sampled_from([4, 10, 16]), st.sampled_from([-1e3, 0.0, 1e6]))
def test_the_level_is_that_of_the_whole_history(history: list[tuple[str, int, float]], burst: int, now: float) -> None:
    bucket = TokenBucket(10, 8.0, burst=burst)
    level, rate = Fraction(burst), Fraction(10, 8)
    tickets: list[tuple[tuple[int, float], float]] = []
    for action, wait, cost in history:
        now += wait / 16
        level = min(Fraction(burst), level + Fraction(wait, 16) * rate)
        assert bucket.available(now) == pytest.approx(float(level), abs=1e-6)
        assert bucket.booked(now) == pytest.approx(float(burst - level), abs=1e-6)
        assert bucket.too_large(cost) == (cost > burst)
        if abs(level - Fraction(cost)) > 1e-6:
            assert bucket.fits(cost, now) == (cost <= level)
        if action == "force" or (action == "book" and bucket.fits(cost, now)):
            tickets.append((bucket.book(cost, now), cost))
            level -= Fraction(cost)
        elif action in {"settle", "refund"} and tickets:
            ticket, before = tickets.pop()
            actual = cost if action == "settle" else 0.0
            if action == "settle":
                bucket.settle(ticket, actual, now)
            else:
                bucket.refund(ticket, now)
            level = min(Fraction(burst), level + Fraction(before - actual))


@given(
    st.floats(0.01, 1e9),
    st.floats(0.1, 31 * 86_400),
    st.floats(0.01, 1),
    st.floats(-1e6, 1e9),
    st.lists(st.floats(0, 2)),
)
def test_it_is_ready_when_it_says_so_and_not_before(
    limit: float, per: float, share: float, now: float, waits: list[float]
) -> None:
    bucket = TokenBucket(limit, per)
    cost = limit * share
    for wait in waits:
        now += wait * per * share
        ready = bucket.ready_at(cost, now)
        assert ready == now if bucket.fits(cost, now) else ready > now
        assert bucket.fits(cost, ready)
        early = ready - 1e-6 * per * share - 8 * math.ulp(ready)
        assert ready == now or early <= now or not bucket.fits(cost, early)
        expiry = bucket.next_expiry(now)
        assert (expiry is None) == (bucket.available(now) >= bucket._burst)
        assert expiry is None or expiry > now
        now = ready
        bucket.book(cost, now)


@settings(max_examples=300)
@given(
    st.integers(1, 20),
    st.lists(st.tuples(st.floats(0, 4), st.floats(0.1, 1), st.floats(0, 0.5)), min_size=1, max_size=30),
)
def test_whatever_the_jitter_up_to_the_margin_all_that_is_booked_fits_on_arrival(
    burst: int, plans: list[tuple[float, float, float]]
) -> None:
    bucket, now = TokenBucket(10, 8.0, burst=burst, margin=0.5), 0.0
    arrivals: list[tuple[float, float]] = []
    for gap, share, way in plans:
        cost = share * burst
        now = bucket.ready_at(cost, now + gap)
        bucket.book(cost, now)
        arrivals.append((now + way, cost))
    level, last = float(burst), 0.0
    for at, cost in sorted(arrivals):
        level, last = min(burst, level + (at - last) * 10 / 8) - cost, at
        assert level >= -1e-6


def test_in_steady_state_all_that_flows_in_is_used() -> None:
    bucket, now = TokenBucket(60, 60.0, margin=0.05), 0.0
    for _ in range(60 + 600):
        now = bucket.ready_at(1, now)
        bucket.book(1, now)
    assert now == pytest.approx(600.05, abs=0.01)


def test_a_late_arrival_at_a_full_server_is_reckoned_with() -> None:
    bucket = TokenBucket(8, 8.0, margin=0.5)
    bucket.rebase(8, None, 100.0, pending=0, sent=100.0)
    bucket.book(1, 100.0)
    bucket.rebase(8, None, 100.0, pending=1, sent=100.0)  # it is not there yet
    assert bucket.available(100.0) == 6.5


def test_what_others_took_has_come_back_when_the_bucket_is_full() -> None:
    bucket = TokenBucket(8, 8.0)
    bucket.rebase(2, None, 100.0, sent=100.0)
    assert [bucket.available(at) for at in (100.0, 103.0, 106.0, 200.0)] == [2, 5, 8, 8]
    bucket.book(1, 104.0)
    assert bucket.available(104.0) == 5
    bucket.book(0, 200.0)
    bucket.book(1, 200.0)
    assert bucket.available(200.0) == 7


def test_it_is_looked_at_in_steps_while_it_fills() -> None:
    bucket = TokenBucket(64, 64.0)
    assert bucket.next_expiry(0.0) is None
    bucket.book(1.5, 0.0)
    assert bucket.next_expiry(0.0) == 1.0
    assert bucket.next_expiry(1.0) == 1.5


def test_a_bucket_that_nothing_flows_into_is_never_ready() -> None:
    empty = TokenBucket(0, 60.0)
    assert empty.fits(0, 5.0)
    assert empty.ready_at(1, 5.0) == math.inf
    closed = TokenBucket(0, 60.0, burst=2)
    closed.book(2, 5.0)
    assert closed.ready_at(1, 5.0) == math.inf


def test_a_margin_that_grows_takes_more_off_a_full_bucket() -> None:
    for margin, available in ((0.0, 7.5), (1.0, 7.0), (100.0, 6.0)):
        bucket = TokenBucket(8, 8.0, margin=0.5)
        bucket.widen(100.0)
        bucket.widen(margin)
        bucket.book(0, 100.0)
        assert bucket.available(100.0) == available


@given(
    st.lists(st.tuples(st.floats(0, 4), costs), max_size=30),
    st.lists(st.tuples(st.floats(0, 4), costs), min_size=1, max_size=9),
)
def test_another_bucket_goes_on_where_one_stopped(
    before: list[tuple[float, float]], after: list[tuple[float, float]]
) -> None:
    first, second, now = TokenBucket(10, 8.0, margin=0.5), TokenBucket(10, 8.0, margin=0.5), 0.0
    for wait, cost in before:
        now += wait
        ticket = first.book(cost, now)
        assert first.entries(now) == [first.entry(ticket[0])] == [first.entry(first.newest)]
    second.restore(first.entries(now), now)
    for wait, cost in after:
        now += wait
        assert second.available(now) == pytest.approx(first.available(now), abs=1e-9)
        first.book(cost, now)
        second.book(cost, now)


def test_what_was_missing_is_missing_from_another_limit_too() -> None:
    first, second = TokenBucket(8, 8.0), TokenBucket(4, 8.0)
    first.book(3, 100.0)
    second.restore(first.entries(100.0), 100.0)
    assert second.available(100.0) == 1
    assert second.available(102.0) == 2
