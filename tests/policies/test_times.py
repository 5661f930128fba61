"""Where the time at a gate goes: one count for all that wait."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.policies.times import Times

REASONS = ["pace", "concurrency", "10 requests per 60 seconds"]
SPANS = st.lists(st.tuples(st.sampled_from(REASONS), st.integers(0, 9)), max_size=12)


@given(spans=SPANS, came=st.integers(0, 12))
def test_each_has_waited_for_what_the_first_waited_for_since_it_came(spans: list[tuple[str, int]], came: int) -> None:
    times, now = Times(), 100.0
    times.begin(now)
    before = times.waited.copy()
    for number, (reason, seconds) in enumerate(spans):
        if number == came:
            before = times.waited.copy()
        now += seconds
        times.note(reason, now)
    own = spans if came >= len(spans) else spans[came:]
    expected = {reason: sum(float(length) for name, length in own if name == reason) for reason, _ in own}
    assert times.start(before) == {reason: seconds for reason, seconds in expected.items() if seconds}


def test_a_look_from_outside_counts_what_goes_on_and_changes_nothing() -> None:
    times = Times()
    times.begin(1.0)
    assert times.noted("pace", 3.0) == {"pace": 2.0}
    assert times.noted(None, 3.0) == times.waited == {}
    times.note("pace", 4.0)
    assert times.waited == {"pace": 3.0}


def test_time_in_which_nobody_waits_is_nobodys() -> None:
    times = Times()
    times.begin(0.0)
    times.note("pace", 1.0)
    times.note(None, 50.0)
    times.note("pace", 52.0)
    assert times.waited == {"pace": 3.0}


def test_what_all_have_spent_is_what_each_has_waited_for_and_the_network_and_back_offs() -> None:
    times = Times()
    assert times.spent == {}
    times.begin(0.0)
    first, second = times.waited.copy(), times.waited.copy()
    times.note("pace", 2.0)
    times.start(first)
    times.note("pace", 3.0)
    times.start(second)
    times.network += 4.0
    times.backing_off += 0.5
    assert times.spent == {"pace": 5.0, "network": 4.0, "back-off": 0.5}


def test_suspensions_are_counted_from_their_begin_to_their_end() -> None:
    times = Times()
    assert times.resume(5.0) is None
    times.suspend(10.0)
    assert times.suspended(12.0) == 2.0
    assert times.resume(15.0) == pytest.approx(5.0)
    assert times.suspended(99.0) == 5.0
    times.suspend(100.0)
    assert times.suspended(101.0) == 6.0
