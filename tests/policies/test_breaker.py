from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.policies.breaker import Breaker


def opened(at: float = 60.0) -> Breaker:
    breaker = Breaker()
    for number in range(21):
        assert breaker.fail(0.0 if number == 0 else at) is (number == 20)
    return breaker


def test_it_opens_after_a_minute_and_more_than_twenty_failures_without_a_success() -> None:
    assert opened().state == "open"
    early = Breaker()
    assert not any(early.fail(0.0 if number == 0 else 59.9) for number in range(500))
    few = Breaker()
    assert not any(few.fail(float(at)) for at in range(0, 2000, 100))
    assert few.fail(2100.0)


def test_a_success_in_between_begins_the_count_anew() -> None:
    breaker = Breaker()
    for at in range(300):
        assert not breaker.fail(float(at))
        if at % 20 == 19:
            assert not breaker.succeed(float(at), 1.0)
    assert not any(breaker.fail(1000.0) for _ in range(20))
    assert breaker.fail(1000.0)


def test_slow_answers_are_no_outage() -> None:
    breaker = Breaker()
    breaker.succeed(0.0, 30.0)
    assert not any(breaker.fail(float(at)) for at in range(1, 300))
    assert breaker.fail(300.0)


def test_an_open_one_lets_one_probe_pass_every_ten_seconds() -> None:
    breaker = opened()
    assert breaker.due == 70.0
    assert [breaker.allows(at) for at in (60.0, 69.9, 70.0)] == [False, False, True]
    breaker.start(71.0)
    assert breaker.state == "probing"
    assert [breaker.allows(at) for at in (71.0, 80.9)] == [False, False]
    assert not breaker.fail(72.0)
    assert breaker.state == "open"
    assert breaker.due == 81.0
    breaker.start(81.0)
    assert breaker.allows(91.0), "a probe that is never heard of again is followed by another one"


def test_the_first_success_closes_it_also_of_an_attempt_from_before() -> None:
    for probe in (False, True):
        breaker = opened()
        if probe:
            breaker.start(70.0)
        assert breaker.opened == 60.0
        assert breaker.succeed(75.0, 1.0)
        assert (breaker.state, breaker.due, breaker.opened) == ("closed", None, None)
        assert breaker.allows(75.0)
        assert not breaker.succeed(76.0, 1.0)


@given(
    st.lists(st.tuples(st.integers(0, 400), st.sampled_from(["start", "ok", "fail"])), max_size=200),
    st.integers(-(2**20), 2**20),
)
def test_it_does_not_care_for_the_origin_of_time_and_a_closed_one_allows_all(
    steps: list[tuple[int, str]], origin: int
) -> None:
    here, there = Breaker(failures=3, seconds=5), Breaker(failures=3, seconds=5)
    now = 0.0
    for gap, what in steps:
        now += gap / 16
        for breaker, at in ((here, now), (there, now + origin)):
            if what == "start":
                if breaker.allows(at):
                    breaker.start(at)
            elif what == "ok":
                breaker.succeed(at, 0.5)
            else:
                breaker.fail(at)
        assert here.state == there.state
        assert here.allows(now) is there.allows(now + origin)
        assert here.state != "closed" or (here.allows(now) and here.due is None and here.opened is None)


@pytest.mark.parametrize("wrong", [{"seconds": 0}, {"failures": 0}, {"times": -1}, {"probe": 0}], ids=str)
def test_a_value_out_of_its_bounds_is_refused_by_its_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} must be"):
        Breaker(**wrong)
