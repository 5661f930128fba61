import math
from typing import get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.policies.accounting import (
    ACCOUNTING,
    ANTHROPIC,
    AZURE_OPENAI,
    GENERIC,
    GROQ,
    OPENAI,
    RULES,
    VLLM,
    Accounting,
    Cell,
    Ending,
    charge,
)
from rxllm.policies.quota import Quota


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


presets = pytest.mark.parametrize("preset", ACCOUNTING.values(), ids=ACCOUNTING)


@presets
@given(st.sampled_from(get_args(Ending)), st.sampled_from(["requests", "tokens"]), st.none() | st.floats(0, 200))
def test_a_preset_charges_by_the_generic_rules_but_for_its_cells(
    preset: Accounting, ending: Ending, unit: str, actual: float | None
) -> None:
    own = {(cell.ending, cell.unit): cell.rule for cell in preset.cells}.get((ending, unit))
    expected = charge(ending, unit, 100, actual)
    if own is not None:
        expected = {"refund": 0, "keep": 100, "settle": 100 if actual is None else actual}[own]
    assert preset.charge(ending, unit, 100, actual) == expected


def test_a_cell_overrides_a_rule() -> None:
    mine = Accounting(cells=(Cell("refused", "tokens", "keep"), Cell("answered", "requests", "refund")))
    assert mine.charge("refused", "tokens", 100, None) == 100
    assert mine.charge("answered", "requests", 1, None) == 0
    assert VLLM.charge("refused", "requests", 1, None) == 0
    assert GENERIC.charge("refused", "requests", 1, None) == 1


@pytest.mark.parametrize(
    ("preset", "tokens", "inputs", "outputs", "after"),
    [
        (GENERIC, 1100, 1000, 100, 1030),
        (OPENAI, 1400, 1000, 400, None),
        (AZURE_OPENAI, 1400, 1000, 400, None),
        (ANTHROPIC, 500, 400, 100, 430),
        (GROQ, 500, 400, 100, 430),
        (VLLM, 1100, 1000, 100, 1030),
    ],
    ids=["generic", "openai", "azure", "anthropic", "groq", "vllm"],
)
def test_a_call_takes_what_the_provider_counts(
    preset: Accounting, tokens: float, inputs: float, outputs: float, after: float | None
) -> None:
    assert preset.costs(1000, 100, max_tokens=400, cached=600) == {
        "requests": 1,
        "tokens": tokens,
        "input_tokens": inputs,
        "output_tokens": outputs,
    }
    assert preset.costs(1000, 100)["output_tokens"] == 100
    assert preset.used(1000, 30, cached=600).get("tokens") == after
    assert preset.used(1000, 30)["requests"] == 1


def test_more_cached_than_there_is_counts_as_nothing() -> None:
    assert ANTHROPIC.used(10, 5, cached=20)["input_tokens"] == 0


@given(
    st.integers(1, 100_000), st.sampled_from([0.5, 1.0, 10.0, 60.0, 86_400.0]), st.sampled_from(["requests", "tokens"])
)
def test_a_quota_that_is_judged_in_less_time_has_the_same_rate_there(limit: int, per: float, unit: str) -> None:
    quota = Quota(limit, per=per, unit=unit)
    assert GENERIC.quotas(quota) == (quota,)
    first, *rest = AZURE_OPENAI.quotas(quota)
    assert first == quota
    whole = math.ceil(limit * 10 / per - 1e-9)
    assert len(rest) == (per > 10 and unit == "requests" and whole < limit)  # one large call may need more tokens
    for shorter in rest:
        assert shorter.limit / shorter.per == pytest.approx(limit / per)
        assert shorter.unit == unit
        assert shorter.limit == whole >= 1
        assert 10 - 1e-6 <= shorter.per < 10 + per / limit


def test_headers_mean_the_time_that_the_preset_says() -> None:
    assert GROQ.window("requests") == 86_400
    assert OPENAI.window("requests") == OPENAI.window("tokens") == GENERIC.window("tokens") == 60
    assert GENERIC.window("requests", 1.0) == 1


@pytest.mark.parametrize(
    ("preset", "smoothing", "windows"),
    [
        (GENERIC, 0, (60, 60)),
        (OPENAI, 1, (60, 60)),
        (AZURE_OPENAI, 10, (10, 60)),
        (ANTHROPIC, 1, (60, 60)),
        (GROQ, 0, (86_400, 60)),
        (VLLM, 0, (60, 60)),
    ],
    ids=["generic", "openai", "azure", "anthropic", "groq", "vllm"],
)
def test_a_preset_judges_requests_in_its_seconds_and_reads_headers_as_about_its_windows(
    preset: Accounting, smoothing: float, windows: tuple[float, float]
) -> None:
    assert [quota.per for quota in preset.quotas(Quota(600, per=60))] == ([60, smoothing] if smoothing else [60])
    assert (preset.window("requests"), preset.window("tokens")) == windows


@pytest.mark.parametrize(
    ("limit", "short"),
    [(1, None), (30, (1, 2.0)), (60, (1, 1.0)), (100, (2, 1.2)), (119, (2, 120 / 119)), (600, (10, 1.0))],
    ids=str,
)
def test_a_short_window_has_room_for_whole_requests_at_the_rate_of_the_long_one(
    limit: int, short: tuple[float, float] | None
) -> None:
    quotas = OPENAI.quotas(Quota(limit, per=60))
    assert [(quota.limit, pytest.approx(quota.per)) for quota in quotas[1:]] == ([] if short is None else [short])


def test_nothing_is_taken_as_cached_unless_it_is_said() -> None:
    assert ANTHROPIC.costs(10, 5) == ANTHROPIC.used(10, 5) == ANTHROPIC.used(10, 5, cached=0)
    assert ANTHROPIC.used(10, 5)["input_tokens"] == 10


@pytest.mark.parametrize("value", [GENERIC, Cell("refused", "tokens", "keep")], ids=["accounting", "cell"])
def test_what_a_provider_counts_is_neither_changed_nor_of_unknown_fields(value: Accounting | Cell) -> None:
    name = value.__struct_fields__[0]
    with pytest.raises(AttributeError):
        setattr(value, name, getattr(value, name))
    with pytest.raises(msgspec.ValidationError, match="weather"):
        msgspec.convert({**msgspec.to_builtins(value), "weather": 1}, type(value))
    assert msgspec.convert(msgspec.to_builtins(value), type(value)) == value


def test_accounting_is_given_by_name_only() -> None:
    with pytest.raises(TypeError):
        Accounting("actual")  # type: ignore[misc]


@presets
def test_what_is_uncertain_is_named(preset: Accounting) -> None:
    assert preset.uncertain <= set(Accounting.__struct_fields__)
    assert preset.uncertain


@pytest.mark.parametrize(
    "wrong",
    [{"smoothing": -1}, {"reserves": "none"}, {"snapshot": "later"}, {"uncertain": frozenset({"weather"})}],
)
def test_a_setting_out_of_range_is_refused_by_its_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} must"):
        Accounting(**wrong)  # type: ignore[arg-type]
