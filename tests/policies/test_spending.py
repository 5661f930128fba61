"""Spending: how many items may start, and what the last ones cost beyond the budget."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.policies.spending import START, Spending

KINDS = ("requests", "tokens", "usd")


def run(spending: Spending, costs: list[dict[str, Any]], window: int, draw: Any) -> tuple[int, int]:
    """Start items as they may and end them in any order, until none may start; return how many, and most at a time."""
    progress: list[dict[str, Any]] = []
    started = most = 0
    while True:
        while started < len(costs) and len(progress) < window and spending.room() > 0:
            spending.start()
            progress.append(costs[started])
            started += 1
        most = max(most, len(progress))
        if not progress:
            return started, most
        pay(spending, progress.pop(draw(len(progress))))


def pay(spending: Spending, cost: dict[str, Any]) -> None:
    """Spend what an item costs, and end it."""
    spending.spend(**cost)
    spending.end(**cost)


windows = st.integers(1, 40)
draws = st.randoms(use_true_random=False).map(lambda random: random.randrange)


@given(limit=st.integers(1, 200), window=windows, draw=draws)
def test_one_request_an_item_is_never_more_than_the_budget(limit: int, window: int, draw: Any):
    spending = Spending(requests=limit)
    started, _ = run(spending, [{"requests": 1}] * 300, window, draw)
    assert (started, spending.spent().requests, spending.used_up()) == (limit, limit, "requests")


@given(
    kind=st.sampled_from(KINDS),
    limit=st.integers(1, 2_000),
    cost=st.integers(1, 50),
    window=windows,
    draw=draws,
)
def test_items_that_cost_the_same_go_beyond_the_budget_by_one_at_most(
    kind: str, limit: int, cost: int, window: int, draw: Any
):
    spending = Spending(**{kind: limit})
    run(spending, [{kind: cost}] * (2 * limit // cost + 50), window, draw)
    spent = getattr(spending.spent(), kind)
    known = limit + cost  # after the first has ended
    unknown = min(window, limit if kind == "requests" else START) * cost  # before: a request is one at least
    assert limit <= spent < max(known, unknown + 1)


@settings(deadline=None)
@given(
    limit=st.integers(1, 5_000),
    costs=st.lists(st.integers(0, 100), min_size=1, max_size=200),
    window=windows,
    draw=draws,
)
def test_any_items_go_beyond_the_budget_by_what_was_in_progress_at_most_and_use_it_up(
    limit: int, costs: list[int], window: int, draw: Any
):
    spending = Spending(tokens=limit)
    started, most = run(spending, [{"tokens": cost} for cost in costs], window, draw)
    spent = spending.spent()
    assert spent.tokens == sum(costs[:started])
    assert spent.tokens < limit + most * max(costs) or most == 0
    assert started == len(costs) or spent.tokens >= limit  # else one more may start
    assert (spending.used_up() is None) is (spent.tokens < limit)


@given(
    limits=st.fixed_dictionaries({}, optional={kind: st.integers(1, 100) for kind in KINDS}),
    ended=st.lists(st.tuples(*[st.integers(0, 30)] * 3), max_size=20),
    progress=st.integers(0, 30),
)
def test_what_may_start_is_what_the_short_rule_says(
    limits: dict[str, int], ended: list[tuple[int, int, int]], progress: int
):
    spending = Spending(**limits)
    for _ in range(len(ended) + progress):
        spending.start()
    for costs in ended:
        pay(spending, dict(zip(KINDS, costs, strict=True)))

    def may(more: int, slack: float) -> bool:
        """Say whether one may start when `more` have started before."""
        for kind, limit in limits.items():
            total = sum(costs[KINDS.index(kind)] for costs in ended)
            if total >= limit:
                return False
            mean = max(total / max(1, len(ended)), 1.0 if kind == "requests" else 0.0)
            if mean * (progress + more) + total >= limit + slack:
                return False
            if kind != "requests" and progress + more >= START * (1 + len(ended)):
                return False
        return True

    room = spending.room()
    assert room == 0 or may(room - 1, 1e-9)
    assert room > 10**6 or not may(room, -1e-9)
    if progress == 0 and spending.used_up() is None:
        assert room >= 1


def test_each_budget_counts_and_the_first_that_is_used_up_is_named():
    spending = Spending(requests=10, tokens=100, usd=1.0)
    spending.start()
    spending.spend(requests=3, tokens=120, usd=0.5)
    assert (spending.used_up(), spending.room()) == ("tokens", 0)


def test_nothing_known_means_few_at_a_time():
    spending = Spending(usd=1_000_000.0)
    assert spending.room() == START
    spending.start()
    pay(spending, {"usd": 0.01})
    assert spending.room() == 2 * START
    assert Spending(requests=500).room() == 500


def test_a_request_that_costs_nothing_is_expected_to_cost_one_all_the_same():
    spending = Spending(requests=5)
    for _ in range(99):
        spending.start()
        spending.end()  # from a cache
    assert spending.room() == 5
    spending.start()
    pay(spending, {"requests": 1})
    assert spending.room() == 4


def test_what_an_item_in_progress_has_spent_is_not_expected_of_it_once_more():
    spending = Spending(requests=10, tokens=100)
    for _ in range(4):
        spending.start()
        pay(spending, {"requests": 1, "tokens": 10})
    for _ in range(3):
        spending.start()
    assert spending.room() == 3  # six are left, and three of them are for those in progress
    spending.spend(requests=2)
    spending.spend(tokens=20)
    assert spending.room() == 3  # four, and one
    spending.spend(requests=2)
    assert spending.room() == 2  # two: they had more tries than others, and nobody knows how many more
    spending.spend(requests=2)
    assert (spending.room(), spending.used_up()) == (0, "requests")


@given(
    limit=st.integers(1, 60),
    tries=st.lists(st.integers(1, 5), min_size=1, max_size=60),
    window=windows,
    draw=draws,
)
def test_one_may_start_when_none_is_in_progress_and_no_more_than_there_are_requests_left(
    limit: int, tries: list[int], window: int, draw: Any
):
    spending = Spending(requests=limit)
    progress: list[list[int]] = []  # tries that are left, tries that were made
    for all_of_it in tries:
        while spending.used_up() is None and progress and (len(progress) >= window or spending.room() <= 0):
            one = progress[draw(len(progress))]
            spending.spend(requests=1)
            one[0], one[1] = one[0] - 1, one[1] + 1
            if not one[0]:
                progress.remove(one)
                spending.end(requests=one[1])
        if spending.used_up() is not None:
            assert spending.room() == 0
            return
        assert 1 <= spending.room() <= limit - spending.spent().requests
        spending.start()
        progress.append([all_of_it, 0])


def test_the_statistics_say_what_was_spent():
    spending = Spending(tokens=100)
    spending.start()
    spending.start()
    pay(spending, {"requests": 2, "tokens": 30, "usd": 0.25})
    spent = spending.spent(seconds=1.5, used_up="seconds")
    assert (spent.requests, spent.tokens, spent.usd, spent.seconds) == (2, 30, 0.25, 1.5)
    assert (spent.ended, spent.in_progress, spent.used_up) == (1, 1, "seconds")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0, -1, float("inf"), "many", True], ids=str)
def test_a_budget_must_be_a_number_above_0(kind: str, value: Any):
    with pytest.raises(ConfigError, match=f"{kind} must be a finite number > 0"):
        Spending(**{kind: value})
