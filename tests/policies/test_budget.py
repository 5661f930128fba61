from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.policies.budget import MOST, RetryBudget

events = st.lists(st.sampled_from(["success", "failure", "refusal"]), max_size=400)


@given(events, st.floats(0, 1), st.floats(0, 20))
def test_retries_never_exceed_the_share_of_the_successes_and_the_spare_ones(
    happened: list[str], share: float, spare: float
) -> None:
    budget = RetryBudget(share, spare)
    for event in happened:
        if event == "success":
            budget.succeed()
        elif event == "refusal":
            assert budget.take(refused=True)
        else:
            allowed = budget.take()
            assert allowed or budget.left < 1
        assert budget.retries <= share * budget.successes + spare + 1e-6
    assert budget.successes == happened.count("success")
    assert budget.retries + budget.denied == happened.count("failure")
    assert budget.refusals == happened.count("refusal")


def test_ten_successes_earn_a_retry_by_default_although_tenths_are_no_binary_numbers() -> None:
    budget = RetryBudget(spare=0)
    for _ in range(10):
        assert not budget.take()
        budget.succeed()
    assert budget.take()
    assert [RetryBudget().take() for _ in range(1)] == [True]
    spare = RetryBudget()
    assert [spare.take() for _ in range(11)] == [True] * 10 + [False]


def test_a_long_good_time_does_not_save_up_retries_without_end() -> None:
    budget = RetryBudget(share=1, spare=3)
    for _ in range(1000):
        budget.succeed()
    assert budget.left == 3 + MOST


@pytest.mark.parametrize("wrong", [{"share": -0.1}, {"share": 1.1}, {"spare": -1}, {"spare": float("nan")}], ids=str)
def test_a_value_out_of_its_bounds_is_refused_by_its_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} must be"):
        RetryBudget(**wrong)
