"""Which route the next attempt takes: the pure part."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.policies.routing import Joint, Spread, after_failure, waiting_order

WEIGHTS = st.lists(st.integers(1, 5), min_size=1, max_size=4)
NUMBERS = st.lists(st.integers(0, 4), unique=True, min_size=1)


@given(WEIGHTS)
def test_one_at_a_time_meets_each_route_in_proportion_to_its_weight(weights: list[int]) -> None:
    spread = Spread(weights)
    nobody, unlimited = [0] * len(weights), [None] * len(weights)
    met: Counter[int] = Counter()
    for _ in range(20 * sum(weights)):
        number = spread.choose(range(len(weights)), nobody, unlimited)
        spread.start(number, unlimited)
        met[number] += 1
    for number, weight in enumerate(weights):
        assert abs(met[number] - 20 * weight) <= 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 60))
def test_routes_with_limits_fill_up_alike(limits: list[int], starts: int) -> None:
    spread = Spread([1.0] * len(limits))
    in_flight = [0] * len(limits)
    for _ in range(min(starts, sum(limits))):
        able = [number for number, limit in enumerate(limits) if in_flight[number] < limit]
        number = spread.choose(able, in_flight, limits)
        assert all(in_flight[number] / limits[number] <= in_flight[other] / limits[other] for other in able)
        spread.start(number, limits)
        in_flight[number] += 1


def test_a_slow_route_gets_fewer_starts_than_a_fast_one() -> None:
    spread = Spread([1.0, 1.0])
    slow: list[int] = []  # when each of them ends; on the other route all end at once
    met: Counter[int] = Counter()
    for now in range(100):
        slow = [end for end in slow if end > now]
        number = spread.choose([0, 1], [len(slow), 0], [None, None])
        spread.start(number, [None, None])
        met[number] += 1
        if number == 0:
            slow.append(now + 10)
    assert met[0] <= 10 < met[1]


def test_a_route_that_could_not_be_used_has_saved_nothing_up() -> None:
    spread = Spread([1.0, 1.0])
    for _ in range(1_000):
        spread.start(0, [None, None])
    following = []
    for _ in range(10):
        following.append(spread.choose([0, 1], [0, 0], [None, None]))
        spread.start(following[-1], [None, None])
    assert following.count(1) <= 6


def test_a_fallback_has_no_turns() -> None:
    spread = Spread([1.0, 0.0])
    spread.start(1, [None, None])
    assert spread.choose([0], [0, 0], [None, None]) == 0


@given(usable=NUMBERS, failed=NUMBERS, shut=NUMBERS)
def test_an_attempt_waits_elsewhere_if_there_is_an_elsewhere_and_is_never_without_a_route(
    usable: list[int], failed: list[int], shut: list[int]
) -> None:
    now, later = waiting_order(usable, failed, shut)
    assert sorted((*now, *later)) == sorted(usable)
    fresh_and_open = [number for number in usable if number not in failed and number not in shut]
    if fresh_and_open:
        assert not set(now) & set(failed)
        assert set(fresh_and_open) <= set(now)
    else:
        assert sorted(now) == sorted(usable)


@given(usable=NUMBERS, failures=st.lists(st.integers(0, 4), min_size=1, max_size=20))
def test_each_route_is_tried_once_before_one_is_tried_again(usable: list[int], failures: list[int]) -> None:
    failed: tuple[int, ...] = ()
    for pick in failures:
        now, _ = waiting_order(usable, failed, ())
        number = now[pick % len(now)]
        if len(usable) > 1:
            assert number not in failed
        failed = after_failure(failed, number, usable)
        assert failed[-1] == number
        assert len(failed) < len(usable) or len(usable) == 1


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        pytest.param([(0, 0), (3, 3), (5, 3)], 3, id="both-then-one"),
        pytest.param([(0, 0), (3, 0), (3, 3)], 0, id="one-after-the-other"),
        pytest.param([(7, 7), (7, 7)], 0, id="what-was-before-does-not-count"),
        pytest.param([(0, 0), (4, 4), (1, 1), (2, 2)], 5, id="never-less-than-before"),
    ],
)
def test_joint_time_is_that_in_which_it_was_so_everywhere(asked: list[tuple[float, ...]], expected: float) -> None:
    joint = Joint()
    assert [joint.add(seconds) for seconds in asked][-1] == expected
