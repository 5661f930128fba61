"""What keeps everybody back, whatever an attempt costs: a limit, a pace, a ramp, a pause."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.policies.opening import Opening
from rxllm.policies.ramp import Ramp


def test_a_limit_holds_until_fewer_are_on_the_wire_and_time_does_not_help() -> None:
    opening = Opening(limit=2, rate=None)
    assert [opening.held(in_flight, 0.0) for in_flight in (0, 1, 2, 3)] == [None, None, "concurrency", "concurrency"]
    assert opening.opens_at("concurrency", 0.0) == math.inf


@given(rate=st.floats(0.01, 500), starts=st.integers(1, 50))
def test_a_pace_lets_one_start_at_each_time_that_it_names(rate: float, starts: int) -> None:
    opening, now = Opening(limit=None, rate=rate), 0.0
    assert opening.pace is not None
    for _ in range(starts):
        assert opening.held(0, now) is None
        opening.pace.book(now)
        assert opening.held(0, now) == "pace"
        now = opening.opens_at("pace", now)
    assert now == pytest.approx(starts / rate, rel=1e-6, abs=0.002)


def test_a_pause_lasts_two_seconds_at_most_and_a_shorter_one_adds_nothing() -> None:
    opening = Opening(limit=None, rate=None)
    assert opening.pause(89.0, 10.0) == 2.0
    assert opening.pause(0.5, 10.0) == 0.0
    assert opening.held(0, 11.9) == "pause"
    assert opening.opens_at("pause", 11.0) == 12.0
    assert opening.held(0, 12.0) is None
    opening.pause(1.0, 20.0)
    opening.renew()
    assert opening.held(0, 0.0) is None


def test_a_ramp_paces_on_its_way_and_is_gone_at_its_end() -> None:
    opening = Opening(limit=None, rate=None, ramp=Ramp(initial=1, seconds=10), full=100.0)
    assert opening.held(0, 5.0) is None
    assert opening.pace is not None
    assert opening.pace.rate == 1.0
    opening.held(0, 10.0)
    assert opening.pace.rate == pytest.approx(10.0)
    opening.held(0, 15.0)
    assert opening.pace is None
    assert opening.ramp is None


def test_at_the_end_of_a_ramp_the_stated_rate_holds_and_a_change_counts_from_then_on() -> None:
    opening = Opening(limit=None, rate=50.0, ramp=Ramp(initial=1, seconds=10))
    opening.held(0, 0.0)
    opening.set(limit=None, rate=80.0)
    opening.held(0, 10.0)
    assert opening.pace is not None
    assert opening.pace.rate == 80.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"limit": 0}, "concurrency must be a whole number >= 1 or None, got 0"),
        ({"rate": 0.0}, "rate must be a finite number > 0 or None, got 0.0"),
        ({"ramp": 5}, "ramp must be a Ramp, got 5"),
        ({"ramp": Ramp(initial=1, seconds=1)}, "ramp must be a Ramp to a rate or to a quota of requests"),
    ],
)
def test_a_bad_value_is_named(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Opening(**{"limit": None, "rate": None, **values})
