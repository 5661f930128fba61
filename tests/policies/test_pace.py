import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.policies.pace import Pace

gaps = st.lists(st.integers(0, 64).map(lambda n: n / 8), min_size=1)
rates = st.sampled_from([0.25, 0.5, 1.0, 2.0, 8.0])  # binary fractions: the model is exact


@given(rates, gaps)
def test_starts_keep_their_distance_and_are_no_later_than_that(rate: float, waits: list[float]) -> None:
    pace, now, starts = Pace(rate), 100.0, []
    for wait in waits:
        now += wait
        expected = max([now, *(start + 1 / rate for start in starts)])
        now = pace.ready_at(now)
        assert now == expected
        pace.book(now)
        starts.append(now)


def test_the_first_start_may_be_at_once() -> None:
    assert Pace(0.001).ready_at(-5.0) == -5.0


def test_a_pause_earns_no_burst() -> None:
    pace = Pace(2)
    pace.book(0.0)
    pace.book(100.0)
    assert pace.ready_at(100.0) == 100.5


@given(rates, st.lists(st.tuples(st.integers(0, 64).map(lambda n: n / 8), st.integers(0, 3)), min_size=1))
def test_refunding_the_latest_starts_is_as_if_they_had_not_been(rate: float, steps: list[tuple[float, int]]) -> None:
    pace, now, starts = Pace(rate), 100.0, []
    for wait, refunds in steps:
        now = pace.ready_at(now + wait)
        starts.append((now, pace.book(now)))
        for _ in range(min(refunds, len(starts))):
            pace.refund(starts.pop()[1])
        assert pace.ready_at(now) == max([now, *(start + 1 / rate for start, _ in starts)])


def test_refunding_an_earlier_start_changes_nothing_and_none_counts_twice() -> None:
    pace = Pace(1)
    first = pace.book(0.0)
    second = pace.book(1.0)
    pace.refund(first)
    assert pace.ready_at(1.0) == 2.0
    pace.refund(second)
    pace.refund(second)
    assert pace.ready_at(0.5) == 1.0  # late, not early: the first is remembered


def test_a_new_rate_counts_from_the_last_start() -> None:
    pace = Pace(1)
    pace.book(10.0)
    pace.rate = 10
    assert pace.ready_at(10.0) == 10.1
    pace.rate = 0.1
    assert pace.ready_at(10.0) == 20.0
    assert pace.rate == 0.1


@given(rates, st.lists(st.integers(0, 4).map(lambda n: n / 16), min_size=1, max_size=30))
def test_with_slack_late_timers_cost_no_rate_and_no_window_holds_more(rate: float, lates: list[float]) -> None:
    slack = 0.25
    pace, now, starts = Pace(rate, slack=slack), 0.0, []
    pace.book(now)
    for late in lates:
        ready = pace.ready_at(now)
        now = ready + late if ready > now else now  # only a timer is late
        pace.book(now)
        starts.append(now)
    for first, start in enumerate(starts):
        assert start <= (first + 1) / rate + max(lates[: first + 1])
        assert all(starts[last] - start >= (last - first) / rate - slack for last in range(first, len(starts)))


@pytest.mark.parametrize("rate", [0, -1, math.nan, math.inf, "1", None, True, 1e-10])
def test_a_wrong_rate_is_refused_at_any_time(rate: float) -> None:
    with pytest.raises(ConfigError, match="^rate must be a finite number >= 1e-09"):
        Pace(rate)
    pace = Pace(1)
    with pytest.raises(ConfigError, match="^rate must be"):
        pace.rate = rate
    assert pace.rate == 1


@pytest.mark.parametrize("slack", [-1, math.nan, math.inf, "1", None, True])
def test_a_wrong_slack_is_refused(slack: float) -> None:
    with pytest.raises(ConfigError, match="^slack must be a finite number >= 0"):
        Pace(1, slack=slack)
