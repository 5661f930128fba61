from __future__ import annotations

from math import inf, isinf
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.testing._quotas import (
    STRATEGIES,
    FixedWindow,
    ServerQuota,
    SlidingLog,
    Strategy,
    TokenBucket,
    go_duration,
    limiter,
)

# times are quarters of a second, costs are whole: floats that are exact, so the models may compare with ==
ARRIVALS = st.lists(st.tuples(st.integers(0, 12), st.integers(1, 6)), max_size=60)


def admitted(state: FixedWindow | SlidingLog | TokenBucket, arrivals: list[tuple[int, int]]) -> list[tuple[float, int]]:
    """Offer each arrival (gap, cost); return what was let in."""
    now, done = 0.0, []
    for gap, cost in arrivals:
        now += gap / 4
        if state.wait(now, cost) <= 0:
            state.charge(now, cost)
            done.append((now, cost))
    return done


@given(arrivals=ARRIVALS, amount=st.integers(1, 12), per=st.integers(1, 8))
def test_a_sliding_log_admits_what_the_whole_history_allows(
    arrivals: list[tuple[int, int]], amount: int, per: float
) -> None:
    history: list[tuple[float, int]] = []
    now = 0.0
    for gap, cost in arrivals:
        now += gap / 4
        if sum(used for at, used in history if now - at < per) + cost <= amount:
            history.append((now, cost))
    assert admitted(SlidingLog(ServerQuota(amount, per)), arrivals) == history


@given(arrivals=ARRIVALS, amount=st.integers(1, 12), per=st.integers(1, 8), origin=st.integers(-20, 0))
def test_a_fixed_window_counts_by_the_window_of_each_arrival(
    arrivals: list[tuple[int, int]], amount: int, per: float, origin: int
) -> None:
    used: dict[int, int] = {}
    now, expected = 0.0, []
    for gap, cost in arrivals:
        now += gap / 4
        window = int((now - origin) // per)
        if used.get(window, 0) + cost <= amount:
            used[window] = used.get(window, 0) + cost
            expected.append((now, cost))
    assert admitted(FixedWindow(ServerQuota(amount, per, "fixed"), origin), arrivals) == expected


@given(arrivals=ARRIVALS, amount=st.integers(1, 12), burst=st.one_of(st.none(), st.integers(1, 12)))
def test_a_token_bucket_is_a_level_that_rises_to_its_size(
    arrivals: list[tuple[int, int]], amount: int, burst: int | None
) -> None:
    per, now, last = 4, 0.0, 0.0
    size = level = float(burst or amount)
    expected = []
    for gap, cost in arrivals:
        now += gap / 4
        level, last = min(size, level + (now - last) * amount / per), now
        if cost <= level:
            level -= cost
            expected.append((now, cost))
    assert admitted(TokenBucket(ServerQuota(amount, per, "bucket", burst), 0.0), arrivals) == expected


class History:
    """What each strategy leaves, computed from all that was ever charged."""

    def __init__(self, strategy: Strategy, amount: int, per: int) -> None:
        self.strategy, self.amount, self.per = strategy, amount, per
        self.entries: list[list[float]] = []  # when, what it counts
        self.level, self.last = float(amount), 0.0

    def fill(self, now: float) -> None:
        self.level, self.last = min(self.amount, self.level + (now - self.last) * self.amount / self.per), now

    def room(self, now: float) -> float:
        self.fill(now)
        if self.strategy == "bucket":
            return self.level
        if self.strategy == "sliding":
            return self.amount - sum(used for at, used in self.entries if now - at < self.per)
        return self.amount - sum(used for at, used in self.entries if at // self.per == now // self.per)

    def change(self, now: float, entry: list[float], used: float) -> None:
        self.fill(now)
        self.level = min(self.amount, self.level + entry[1] - used)
        entry[1] = used


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 6), st.integers(1, 6), st.integers(0, 8), st.integers(0, 20)), max_size=60
    ),
    amount=st.sampled_from([4, 8, 16]),
    per=st.sampled_from([1, 2, 4]),
)
def test_what_is_settled_counts_from_then_on_as_if_it_had_been_charged_so(
    strategy: Strategy, arrivals: list[tuple[int, int, int, int]], amount: int, per: int
) -> None:
    state = limiter(ServerQuota(amount, per, strategy), 0.0)
    assert state is not None
    model = History(strategy, amount, per)
    now = 0.0
    due: list[tuple[float, int, list[float], list[float], int]] = []  # settlements to come
    for number, (gap, cost, actual, hold) in enumerate(arrivals):
        now += gap / 4
        for entry in sorted(one for one in due if one[0] <= now):
            due.remove(entry)
            at, _, mine, theirs, used = entry
            state.settle(at, mine, used)
            model.change(at, theirs, used)
            assert state.remaining(at) == max(0.0, model.room(at))
        room = model.room(now)
        assert (state.wait(now, cost) <= 0) == (cost <= room)
        if cost <= room:
            mine = state.charge(now, cost)
            theirs = [now, 0.0]
            model.entries.append(theirs)
            model.change(now, theirs, cost)
            due.append((now + hold / 4, number, mine, theirs, actual))
        assert state.remaining(now) == max(0.0, model.room(now))


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(arrivals=ARRIVALS, amount=st.integers(1, 50), per=st.floats(0.01, 100), cost=st.integers(1, 60))
def test_who_waits_as_long_as_told_is_let_in(
    strategy: Strategy, arrivals: list[tuple[int, int]], amount: int, per: float, cost: int
) -> None:
    state = limiter(ServerQuota(amount, per, strategy), 0.0)
    assert state is not None
    admitted(state, arrivals)
    now = sum(gap for gap, _ in arrivals) / 4
    wait = state.wait(now, cost)
    if cost > amount:
        assert isinf(wait)
    else:
        assert 0 <= wait <= per * (1 + 1e-9)
        assert state.wait(now + wait + 1e-9, cost) <= 0


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(arrivals=ARRIVALS, amount=st.integers(1, 12))
def test_after_the_reset_everything_is_there_again(
    strategy: Strategy, arrivals: list[tuple[int, int]], amount: int
) -> None:
    state = limiter(ServerQuota(amount, 3.0, strategy), 0.0)
    assert state is not None
    admitted(state, arrivals)
    now = sum(gap for gap, _ in arrivals) / 4
    assert 0 <= state.remaining(now) <= amount
    assert state.remaining(now + state.reset(now) + 1e-9) == pytest.approx(amount)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_changed_amount_keeps_what_is_booked_and_a_changed_window_does_not(strategy: Strategy) -> None:
    state = limiter(ServerQuota(10, 60.0, strategy), 0.0)
    assert state is not None
    state.charge(0.0, 8)
    same = limiter(ServerQuota(4, 60.0, strategy), 0.0, state)
    assert same is state
    assert same.wait(0.0, 3) > 0
    other = limiter(ServerQuota(4, 30.0, strategy), 0.0, state)
    assert other is not None
    assert other.wait(0.0, 4) <= 0
    assert limiter(None, 0.0, state) is None


def test_a_charge_above_the_quota_is_a_debt() -> None:
    for strategy in STRATEGIES:
        state = limiter(ServerQuota(10, 10.0, strategy), 0.0)
        assert state is not None
        state.charge(0.0, 15)
        assert state.remaining(0.0) == 0
        assert state.wait(0.0, 1) > 0
        assert state.wait(0.0, 11) == inf


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0s"),
        (0.0004, "1ms"),
        (0.012, "12ms"),
        (0.9999, "1s"),
        (1.5, "1.5s"),
        (59.9996, "1m0s"),
        (360, "6m0s"),
        (3600, "1h0m0s"),
        (7265.25, "2h1m5.25s"),
    ],
)
def test_durations_are_written_as_go_does(seconds: float, text: str) -> None:
    assert go_duration(seconds) == text


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"amount": 0}, "amount .* 0"),
        ({"amount": float("nan")}, "amount .* nan"),
        ({"amount": "9"}, "amount .* '9'"),
        ({"amount": True}, "amount .* True"),
        ({"amount": 1, "per": -1.0}, "per .* -1"),
        ({"amount": 1, "strategy": "leaky"}, "strategy .* 'leaky'"),
        ({"amount": 1, "burst": 5}, "burst=5 .* 'sliding'"),
    ],
)
def test_a_bad_quota_names_the_field_and_the_value(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        ServerQuota(**fields)
