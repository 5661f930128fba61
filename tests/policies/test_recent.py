import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.policies.recent import GRAIN, GRAINS, Recent


@given(
    starts=st.lists(st.tuples(st.integers(0, 800), st.integers(1, 99), st.booleans()), min_size=1, max_size=100),
    span=st.integers(1, 240),
    origin=st.integers(-(2**20), 2**20),
)
def test_it_counts_accepted_starts_in_whole_quarters(
    starts: list[tuple[int, int, bool]], span: int, origin: int
) -> None:
    recent = Recent()
    number = 0
    known: list[tuple[int, int, bool]] = []  # quarter, in flight, refused
    for gap, in_flight, refused in starts:
        number += gap // 50 if known else 0
        at = origin + number * GRAIN
        recent.start(at, in_flight)
        if refused:
            recent.refuse(at)
        known.append((number, in_flight, refused))
    first = max(0, number + 1 - span)
    window = [row for row in known if row[0] >= first]
    start, end = origin + first * GRAIN, origin + (number + 1) * GRAIN
    count = sum(not refused for *_, refused in window)
    assert recent.rate(start, end) == pytest.approx(count / ((number + 1 - first) * GRAIN))
    assert recent.count(start, end) == recent.count(start + 0.4 * GRAIN, end - 0.4 * GRAIN) == count
    tainted = {quarter for quarter, _, refused in window if refused}
    clean = [in_flight for quarter, in_flight, _ in window if quarter not in tainted]
    assert recent.width(start, end) == max(clean, default=0)


def test_before_the_first_start_there_is_nothing_and_time_without_starts_counts() -> None:
    recent = Recent()
    recent.refuse(5.0)
    assert (recent.rate(-math.inf, 9.0), recent.count(0.0, 9.0), recent.width(-math.inf, 9.0)) == (0.0, 0, 0)
    recent.start(10.0, 3)
    recent.start(10.1, 4)
    assert recent.rate(-math.inf, 11.0) == 2.0
    assert recent.rate(0.0, 20.0) == 0.2
    assert recent.count(0.0, 20.0) == 2
    assert recent.rate(10.5, 10.6) == 0.0


def test_what_is_older_than_two_minutes_is_forgotten_and_its_refusal_too() -> None:
    recent = Recent()
    recent.start(0.0, 7)
    recent.start(GRAIN * GRAINS, 1)
    recent.refuse(0.0)
    assert recent.rate(0.0, GRAIN * (GRAINS + 1)) == pytest.approx(1 / (GRAIN * (GRAINS + 1)))
    assert recent.width(0.0, GRAIN * (GRAINS + 1)) == 1
