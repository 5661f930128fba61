"""The seconds of a window, found in what servers of all three kinds state."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.policies.window import WindowGuess
from rxllm.testing import ServerQuota
from rxllm.testing._quotas import limiter


@pytest.mark.parametrize("strategy", ["fixed", "sliding", "bucket"])
@given(
    per=st.sampled_from([0.5, 2.0, 10.0, 60.0, 3600.0]),
    load=st.sampled_from([0.3, 0.9, 3.0]),
    latency=st.floats(0.0, 0.01),
)
def test_the_window_is_found_whatever_the_server_counts_and_whatever_is_asked(
    strategy: str, per: float, load: float, latency: float
) -> None:
    quota = limiter(ServerQuota(100, per=per, strategy=strategy), 0.0)  # type: ignore[arg-type]
    assert quota is not None
    guess, found, now = WindowGuess(), None, 0.0
    while now < 3 * per:
        if quota.wait(now, 1.0) == 0.0:
            quota.charge(now, 1.0)
        found = guess.note(100.0, quota.remaining(now), max(0.0, quota.reset(now) - latency * per))
        now += per / 100 / load
    if found is None:  # a bucket that is nearly full says nothing
        assert strategy == "bucket"
        assert load < 1
        return
    assert found >= 0.95 * per  # too short would be refused,
    if load > 1 or strategy == "bucket":
        assert found <= 1.2 * per + 1  # and too long be slow (a second: whole ones may have been rounded)


def test_a_few_replies_say_nothing_and_a_full_quota_does_not_either() -> None:
    guess = WindowGuess()
    for _ in range(15):
        assert guess.note(10.0, 5.0, 1.25) is None
    for _ in range(100):
        assert guess.note(10.0, 10.0, 0.0) is None
        assert guess.note(10.0, 9.0, 1.25) is None
        assert guess.note(10.0, 5.0, None) is None
    assert guess.note(10.0, 5.0, 1.25) == pytest.approx(1.25 * 10 / 4)
