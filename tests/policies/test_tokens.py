import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.policies.tokens import TokenErrors, TokenEstimator


def taught(sizes: list[float], inputs: list[float], outputs: list[float], **settings: float) -> TokenEstimator:
    tokens = TokenEstimator(**settings)  # type: ignore[arg-type]
    for size, used, written in zip(sizes, inputs, outputs, strict=True):
        tokens.learn("m", "k", size, None, input_tokens=used, output_tokens=written)
    return tokens


def test_before_anything_is_known_a_token_is_four_bytes_and_max_tokens_are_written() -> None:
    tokens = TokenEstimator(unknown=300)
    assert tokens.estimate("m", "k", 400, 1000) == (100, 1000)
    assert tokens.estimate("m", "k", 400, None) == (100, 300)
    assert tokens.estimate("m", "k", 400, 50) == (100, 50)
    assert tokens.estimate("m", "k", 0, None) == (0, 300)
    assert tokens.errors() == TokenErrors()


@given(st.floats(0.05, 3), st.integers(0, 9))
def test_the_ratio_is_learned(ratio: float, seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.uniform(50, 5000) for _ in range(60)]
    used = [size * ratio * draw.lognormvariate(0, 0.1) for size in sizes]
    inputs, _ = taught(sizes, used, [10.0] * 60).estimate("m", "k", 1000, None)
    assert inputs == pytest.approx(1000 * ratio, rel=0.1)


@given(st.sets(st.integers(0, 59), max_size=5), st.sampled_from([1e-3, 1e3, 1e6]))
def test_one_in_twelve_that_is_absurd_changes_little(where: set[int], factor: float) -> None:
    if len(where & set(range(5))) > 2:
        return  # most of the first ones: then those are believed
    used = [30 * (factor if n in where else 1) for n in range(60)]
    inputs, _ = taught([100.0] * 60, used, [10.0] * 60).estimate("m", "k", 100, None)
    assert 30 / 1.25 <= inputs <= 30 * 1.25


def test_a_ratio_that_has_changed_is_followed() -> None:
    tokens = taught([100.0] * 500, [25.0] * 200 + [50.0] * 300, [10.0] * 500)
    assert tokens.estimate("m", "k", 100, None)[0] == pytest.approx(50, rel=0.05)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 100_000), min_size=8, max_size=60), st.sampled_from([0.5, 0.9, 1.0]))
def test_the_quantile_is_that_of_the_history_within_a_bin(outputs: list[int], quantile: float) -> None:
    tokens = taught([1.0] * len(outputs), [1.0] * len(outputs), [float(n) for n in outputs], quantile=quantile)
    weights = [(1 - 1 / 256) ** -n for n in range(len(outputs))]
    missing = quantile * sum(weights) * (1 - 1e-9)
    exact = 0.0
    for output, weight in sorted(zip(outputs, weights, strict=True)):
        missing -= weight
        exact = output
        if missing <= 0:
            break
    found = tokens.estimate("m", "k", 1, None)[1]
    assert exact <= found * (1 + 1e-9) + 1e-9
    assert found <= (exact + 1) * 2 ** (1 / 8) - 1 + 1e-6
    assert tokens.estimate("m", "k", 1, 7)[1] == min(7, found)


def test_lengths_that_have_changed_are_followed_for_ever() -> None:
    tokens = TokenEstimator()
    for length in (1000, 20, 400):
        for _ in range(1500):
            tokens.learn("m", "k", 100, None, input_tokens=25, output_tokens=length)
        assert tokens.estimate("m", "k", 100, None)[1] == pytest.approx(length, rel=0.1)
    for _ in range(60_000 // 4000 * 4000):
        tokens.learn("m", "k", 100, None, input_tokens=25, output_tokens=30)
    assert tokens.estimate("m", "k", 100, None)[1] == pytest.approx(30, rel=0.1)
    assert tokens._kinds["m", "k"]._weight < 1e101


def test_a_new_kind_begins_with_what_is_known_of_its_model() -> None:
    tokens = TokenEstimator()
    for _ in range(20):
        tokens.learn("m", "short", 100, 500, input_tokens=80, output_tokens=9)
    assert tokens.estimate("m", "new", 100, None) == pytest.approx((80, 9), rel=0.1)
    assert tokens.estimate("m", "new", 100, 500)[1] == 500
    assert tokens.estimate("other", "short", 100, 500) == (25, 500)
    tokens.learn("m", "new", 100, 500, input_tokens=None, output_tokens=400)
    assert tokens.estimate("m", "new", 100, 500) == pytest.approx((80, 500), rel=0.1)


def test_the_kinds_are_bounded_and_the_one_unused_for_longest_goes() -> None:
    tokens = TokenEstimator(most=4)
    for n in range(50):
        tokens.learn("m", f"k{n}", 100, None, input_tokens=50, output_tokens=9)
        tokens.learn("m", "kept", 100, None, input_tokens=50, output_tokens=9)
        assert len(tokens._kinds) <= 4
        assert ("m", "kept") in tokens._kinds


def test_the_errors_are_relative_and_have_a_sign() -> None:
    tokens = TokenEstimator()
    tokens.learn("m", "k", 400, 30, input_tokens=80, output_tokens=20)
    assert tokens.errors() == TokenErrors(
        replies=1, input_error=0.25, input_bias=0.25, output_error=0.5, output_bias=0.5
    )
    tokens.learn("m", "k", 400, 30, input_tokens=160, output_tokens=40)
    errors = tokens.errors()
    assert (errors.input_error, errors.input_bias) == pytest.approx((0.375, -0.125))
    assert (errors.output_error, errors.output_bias) == pytest.approx((0.375, 0.125))


@given(st.lists(st.tuples(st.sampled_from([None, -1.0, 0.0, 5.0, math.inf, math.nan]), st.floats(0, 10)), max_size=20))
def test_nonsense_teaches_nothing(said: list[tuple[float | None, float]]) -> None:
    tokens = TokenEstimator()
    for used, size in said:
        tokens.learn("m", "k", size, None, input_tokens=used, output_tokens=used)
    inputs, outputs = tokens.estimate("m", "k", 100, None)
    assert 0 <= inputs < math.inf
    assert 0 <= outputs < math.inf
    assert all(math.isfinite(value) for value in (tokens.errors().input_error, tokens.errors().output_bias))


@pytest.mark.parametrize("wrong", [{"quantile": 0}, {"quantile": 1.1}, {"unknown": -1}, {"most": 0}])
def test_a_setting_out_of_range_is_refused_by_its_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} must be"):
        TokenEstimator(**wrong)  # type: ignore[arg-type]
