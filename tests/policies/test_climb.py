import math
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rxllm.policies.climb import FIRST, GROWTH, LONGEST, LULL, Climb


def test_after_a_quiet_time_it_grows_by_the_same_factor_in_each_step() -> None:
    climb = Climb()
    climb.restart(100.0, 3.0, 1.0)
    found = [climb.advance(100.0 + at, needed=True) for at in range(7)]
    assert found == [0.0, 0.0, 0.0, FIRST, FIRST * GROWTH, FIRST * GROWTH**2, FIRST * GROWTH**3]


def test_time_without_a_need_does_not_count_and_a_long_one_begins_anew() -> None:
    climb = Climb()
    climb.restart(0.0, 2.0, 1.0)
    assert [climb.advance(at, needed=at <= 3) for at in (1.0, 2.0, 3.0, 4.0, 5.0)][-1] == FIRST * GROWTH
    for at in range(6, 6 + round(LULL)):
        last = climb.advance(float(at), needed=False)
    assert last == 0.0
    assert climb.advance(6.0 + LULL, needed=True) == 0.0


def test_a_long_sleep_counts_as_two_steps() -> None:
    climb = Climb()
    climb.restart(0.0, 0.0, 1.0)
    assert climb.advance(1e6, needed=True) == FIRST * GROWTH**2


@given(st.lists(st.floats(0, 10), max_size=200), st.floats(0, 5), st.floats(0.1, 5))
def test_while_there_is_a_need_it_never_falls_and_stays_finite(gaps: list[float], quiet: float, step: float) -> None:
    climb = Climb()
    climb.restart(0.0, quiet, step)
    now, found = 0.0, [0.0]
    for gap in gaps:
        now += gap
        found.append(climb.advance(now, needed=True))
    assert all(before <= after for before, after in pairwise(found))
    assert found[-1] <= FIRST * GROWTH**LONGEST < math.inf
