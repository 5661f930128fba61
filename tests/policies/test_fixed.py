import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm.policies.fixed import EDGE, FixedWindow
from rxllm.policies.sliding import SlidingLog

LIMIT, PER = 10, 8.0
gaps = st.lists(st.tuples(st.integers(0, 60).map(lambda n: n / 8), st.integers(1, LIMIT)), min_size=1, max_size=30)


@given(gaps)
def test_without_a_statement_it_is_a_sliding_log(bookings: list[tuple[float, int]]) -> None:
    fixed, log, now = FixedWindow(LIMIT, PER, margin=0.5), SlidingLog(LIMIT, PER, margin=0.5), 0.0
    for gap, cost in bookings:
        now += gap
        assert fixed.available(now) == log.available(now)
        assert fixed.ready_at(cost, now) == log.ready_at(cost, now)
        assert fixed.fits(cost, now) == log.fits(cost, now)
        fixed.book(cost, now)
        log.book(cost, now)


@settings(max_examples=200)
@given(gaps, st.floats(0.01, 7.9), st.floats(0, 3), st.lists(st.floats(0, 0.5), min_size=30, max_size=30))
def test_no_window_of_the_provider_gets_more_than_the_limit(
    bookings: list[tuple[float, int]], edge: float, late: float, ways: list[float]
) -> None:
    fixed, now = FixedWindow(LIMIT, PER, margin=0.5), 100.0
    windows: dict[int, float] = {}
    fixed.rebase(LIMIT, edge, now + late, sent=now - 0.25)  # written at 100: the edge is at 100 + edge
    now += late
    for (gap, cost), way in zip(bookings, ways, strict=False):
        now = fixed.ready_at(cost, now + gap)
        assert fixed.fits(cost, now)
        fixed.book(cost, now)
        window = math.floor((now + way - 100 - edge) / PER + 1e-9)  # sums of floats round
        windows[window] = windows.get(window, 0) + cost
        assert windows[window] <= LIMIT


def test_with_the_edge_known_each_window_is_used_in_full() -> None:
    fixed, now, starts = FixedWindow(LIMIT, PER), 100.0, []
    fixed.rebase(LIMIT, 2.5, now, sent=now)
    for _ in range(4 * LIMIT):
        now = fixed.ready_at(1, now)
        fixed.book(1, now)
        starts.append(now)
    assert starts == [100.0] * 10 + [102.5] * 10 + [110.5] * 10 + [118.5] * 10


def test_what_is_sent_before_an_edge_may_arrive_after_it_and_counts_in_both_windows() -> None:
    fixed = FixedWindow(LIMIT, PER, margin=0.25)
    fixed.rebase(LIMIT, 2.5, 100.0, sent=100.0)
    fixed.book(4, 102.0)
    fixed.book(4, 102.375)  # it may arrive until 102.625
    assert fixed.available(102.49) == 2
    assert fixed.available(102.5) == 6
    assert fixed.available(110.499) == 6
    assert fixed.available(110.5) == LIMIT


def test_statements_narrow_the_edge_down_and_a_moved_one_is_believed() -> None:
    fixed = FixedWindow(LIMIT, PER)
    fixed.rebase(LIMIT, 2.5, 104.0, sent=100.0)  # between 102.5 and 106.5
    assert fixed._width == pytest.approx(4.001)
    fixed.rebase(LIMIT, 5.25, 109.0, sent=107.0)  # between 112.25 and 114.25: eight seconds later
    assert fixed._width == pytest.approx(2.001, abs=1e-3)
    fixed.book(LIMIT, 109.0)
    assert fixed.ready_at(1, 109.0) == 114.25
    fixed.rebase(0, 1.25, 110.0, sent=110.0)  # outside
    assert fixed._width == pytest.approx(0.001)
    assert fixed.ready_at(1, 110.0) == 111.25


def test_a_statement_too_vague_to_tell_two_edges_apart_changes_nothing() -> None:
    fixed = FixedWindow(LIMIT, PER)
    fixed.rebase(LIMIT, 2.5, 104.0, sent=98.0)
    before = fixed._edge, fixed._width
    fixed.rebase(LIMIT, 2.5, 107.0, sent=102.0)
    assert (fixed._edge, fixed._width) == before
    vague = FixedWindow(LIMIT, PER)
    vague.rebase(LIMIT, 2.5, 110.0, sent=100.0)
    vague.book(1, 110.0)
    assert vague.next_expiry(110.0) == 118.0


def test_a_slow_reply_about_the_last_window_is_not_taken_for_one_about_the_next() -> None:
    fixed = FixedWindow(LIMIT, PER)
    fixed.book(LIMIT, 100.25)
    fixed.rebase(0, 5.75, 102.25, sent=100.25)  # the edge is between 106 and 108
    fixed.rebase(0, 0.25, 107.75, sent=100.25)  # about a window that ends by 108
    assert fixed.available(107.75) == 0
    assert fixed.available(108.0) == LIMIT


@given(st.floats(0.1, 31 * 86_400), st.floats(0, 1e6), st.floats(0, 1))
def test_a_booking_counts_until_the_next_edge_and_never_longer_than_a_window(
    per: float, now: float, share: float
) -> None:
    fixed = FixedWindow(LIMIT, per)
    reset = max(0.01, share * per) + 0.0001
    if 0 < reset <= per and reset % 1:
        fixed.rebase(LIMIT, reset, now, sent=now)
        fixed.book(1, now)
        expiry = fixed.next_expiry(now)
        assert expiry is not None
        assert now < expiry <= now + per + math.ulp(now + per)
        assert expiry == pytest.approx(now + reset, abs=0.0011) or reset < 0.002


def test_a_margin_that_grows_counts_for_the_way_over_an_edge() -> None:
    fixed = FixedWindow(LIMIT, PER, margin=0.25)
    fixed.rebase(LIMIT, 2.5, 100.0, sent=100.0)
    fixed.book(4, 102.0)  # it may arrive until 102.25, and then with 0.75 until 102.75
    assert fixed.ready_at(LIMIT, 102.0) == pytest.approx(102.5, abs=0.001)
    fixed.widen(0.75)
    assert fixed.ready_at(LIMIT, 102.0) == pytest.approx(110.5, abs=0.001)
    fixed.widen(0.0)
    assert fixed.ready_at(LIMIT, 102.0) == pytest.approx(102.5, abs=0.001)


@given(gaps, gaps, st.none() | st.floats(0.01, 7.9))
def test_another_meter_goes_on_where_one_stopped_and_knows_the_edge(
    before: list[tuple[float, int]], after: list[tuple[float, int]], edge: float | None
) -> None:
    first, second, now = FixedWindow(LIMIT, PER, margin=0.5), FixedWindow(LIMIT, PER, margin=0.5), 100.0
    if edge is not None:
        first.rebase(LIMIT, edge, now, sent=now)
    for gap, cost in before:
        now += gap
        first.book(cost, now)
    entries = first.entries(now)
    known = first.entry(EDGE)
    assert ([entry for entry in entries if entry.slot == EDGE] == [known]) == (known is not None)
    second.restore(entries, now)
    for gap, cost in after:
        now += gap
        assert second.available(now) == first.available(now)
        assert second.ready_at(cost, now) == first.ready_at(cost, now)
        first.book(cost, now)
        second.book(cost, now)


def test_the_edge_is_unknown_until_a_statement_tells_it() -> None:
    fixed = FixedWindow(LIMIT, PER)
    assert fixed.entry(EDGE) is None
    fixed.rebase(LIMIT, 2.5, 100.0, sent=100.0)
    edge = fixed.entry(EDGE)
    assert edge is not None
    assert edge == (EDGE, 102.499, pytest.approx(0.001), 100.0)


def test_a_burst_at_an_edge_is_not_taken_for_others_when_the_edge_is_known_less_well_a_window_later() -> None:
    window = FixedWindow(100, 10.0, margin=0.05)
    window.rebase(100, 3.0005, 7.0, sent=6.999)  # it ends about 10.0
    ends = 10.0
    for _ in range(5):
        now = window.ready_at(100, ends)
        for _ in range(100):
            window.book(1, now)
        for after in (0.7, 4.9, 9.8):  # slow replies, which say nothing new of the edge
            window.rebase(0, ends + 10.0 - (now + after), now + after + 0.1, sent=now)
            assert window.available(now + after + 0.1) == 0
            assert window.booked(now + after + 0.1) == 100
        ends += 10.0
        assert window.ready_at(100, ends - 1.0) <= ends + 0.2
