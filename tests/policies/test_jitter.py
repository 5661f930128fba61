import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.policies.jitter import STEP, PathJitter

paths = st.lists(st.tuples(st.floats(0, 200), st.floats(0, 5)), min_size=1, max_size=40)


@given(paths)
def test_the_jitter_is_the_spread_of_what_is_remembered(seen: list[tuple[float, float]]) -> None:
    jitter, now = PathJitter(memory=100.0), 0.0
    history: list[tuple[float, float]] = []
    for wait, path in seen:
        now += wait
        history.append((now, path))
        found = jitter.add(path, now)
        recent = [p for at, p in history if now - at <= 100.0]
        old = [p for at, p in history if now - at <= 200.0]
        assert max(recent) - min(recent) <= found <= max(old) - min(old)
        assert jitter.jitter(now) == found
    assert jitter.jitter(now + 200.001) == 0


@given(paths, st.integers(0, 40), st.floats(0.001, 5))
def test_a_refusal_counts_for_as_long_as_a_path(seen: list[tuple[float, float]], place: int, margin: float) -> None:
    jitter, now, refused = PathJitter(memory=100.0), 0.0, -math.inf
    for number, (wait, path) in enumerate(seen):
        now += wait
        if number == place:
            refused = now
            assert jitter.refused(margin, now) >= margin + STEP
        if jitter.add(path, now) < margin:
            assert now - refused > 100.0


def test_the_first_path_and_none_have_no_jitter() -> None:
    assert PathJitter().jitter(5.0) == 0
    assert PathJitter().add(0.05, 5.0) == 0


def test_a_refusal_takes_half_as_much_again_and_a_hundredth_at_least() -> None:
    jitter = PathJitter()
    assert jitter.refused(0.0, 0.0) == STEP
    assert jitter.refused(0.05, 0.0) == pytest.approx(0.075)
    assert jitter.refused(0.05, 0.0) == pytest.approx(0.075)  # again with the same margin: no wider


def test_a_server_that_worked_longer_than_we_waited_is_not_believed_beyond_rounding() -> None:
    jitter = PathJitter()
    jitter.add(0.010, 0.0)
    assert jitter.add(-5.0, 1.0) == 0
    assert jitter.add(-0.0005, 2.0) == pytest.approx(0.0105)


def test_refusals_of_what_was_sent_before_the_last_step_are_one_step() -> None:
    jitter = PathJitter()
    margin = 0.05
    for sent, now, least in ((0.0, 1.0, 0.075), (0.5, 1.1, 0.075), (0.9, 1.2, 0.075), (1.0, 1.3, 0.1125)):
        margin = jitter.refused(margin, now, sent=sent)
        assert margin == pytest.approx(least)
