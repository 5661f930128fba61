from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.policies.accounting import RULES, Ending, charge


@pytest.mark.parametrize(
    ("ending", "unit", "actual", "expected"),
    [
        ("unsent", "requests", None, 0),
        ("unsent", "tokens", 70, 0),
        ("refused", "requests", None, 100),
        ("refused", "requests", 70, 100),
        ("refused", "tokens", None, 0),
        ("refused", "usd", 70, 0),
        ("answered", "requests", None, 100),
        ("answered", "tokens", 70, 70),
        ("answered", "tokens", 170, 170),
        ("answered", "tokens", 0, 0),
        ("answered", "tokens", None, 100),
        ("failed", "requests", None, 100),
        ("failed", "tokens", None, 100),
        ("failed", "tokens", 70, 70),
        ("timed_out", "tokens", None, 100),
        ("timed_out", "tokens", 70, 70),
        ("cancelled", "tokens", None, 100),
        ("cancelled", "tokens", 70, 70),
    ],
)
def test_a_try_costs_what_the_table_says(ending: Ending, unit: str, actual: float | None, expected: float) -> None:
    assert charge(ending, unit, 100, actual) == expected


def test_every_ending_has_a_rule() -> None:
    assert set(RULES) == set(get_args(Ending))


@given(st.sampled_from(get_args(Ending)), st.sampled_from([-1, -0.5, float("nan"), float("inf"), -float("inf")]))
def test_nonsense_from_a_provider_counts_as_nothing_said(ending: Ending, actual: float) -> None:
    assert charge(ending, "tokens", 100, actual) == charge(ending, "tokens", 100, None)
