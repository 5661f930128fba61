import pickle
import random
from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.policies.backoff import Backoff


def longest(low: float, high: float) -> float:
    assert low == 0.0
    return high


def shortest(low: float, high: float) -> float:
    return low


backoffs = st.builds(
    lambda attempts, base, factor: Backoff(attempts=attempts, base=base, cap=base * factor),
    st.integers(1, 2000),
    st.floats(1e-3, 1e3),
    st.floats(1, 1e6),
)


def test_the_ceiling_doubles_from_the_base_to_the_cap() -> None:
    backoff = Backoff(attempts=8)
    assert [backoff.delay(n, None, longest) for n in range(1, 9)] == [0.5, 1, 2, 4, 8, 16, 30, None]


@given(backoffs, st.integers(1, 5000), st.none() | st.floats(0, 1e6), st.integers())
def test_a_wait_is_drawn_below_the_ceiling_and_honours_the_hint_in_full(
    backoff: Backoff, failures: int, hint: float | None, seed: int
) -> None:
    ceiling = float(min(Fraction(backoff.cap), Fraction(backoff.base) * 2 ** (failures - 1)))
    wait = backoff.wait(failures, hint, random.Random(seed).uniform)
    assert max(0.0, hint or 0.0) <= wait <= max(ceiling, hint or 0.0)
    assert backoff.wait(failures, hint, longest) == max(ceiling, hint or 0.0)
    assert backoff.wait(failures, hint, shortest) == (hint or 0.0)


@given(backoffs, st.integers(1, 5000), st.none() | st.floats(0, 1e6))
def test_it_gives_up_after_the_last_try_and_not_before(backoff: Backoff, failures: int, hint: float | None) -> None:
    delay = backoff.delay(failures, hint, longest)
    assert delay == (None if failures >= backoff.attempts else backoff.wait(failures, hint, longest))


def test_one_attempt_means_no_second_try() -> None:
    assert Backoff(attempts=1).delay(1, None, longest) is None


def test_the_defaults_are_five_tries_from_half_a_second_to_thirty() -> None:
    assert Backoff() == Backoff(attempts=5, base=0.5, cap=30.0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("attempts", value) for value in (0, -1, 1.0, "5", None, True, float("nan"))],
        *[("base", value) for value in (0, -0.5, float("nan"), float("inf"), "1", None, True, 31.0)],
        *[("cap", value) for value in (0.4, 0, -1, float("nan"), float("inf"), "30", None, False)],
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_itself(field: str, value: object) -> None:
    with pytest.raises(ConfigError) as refused:
        Backoff(**{field: value})  # type: ignore[arg-type]
    named = "cap" if value == 31.0 else field  # a base above the cap is a cap below the base
    assert str(refused.value).startswith(f"{named} must be")
    assert repr(value) in str(refused.value)


def test_bounds_hold_for_decoded_values_too() -> None:
    with pytest.raises(ConfigError, match="attempts"):
        msgspec.json.decode(b'{"attempts": 0}', type=Backoff)
    with pytest.raises(msgspec.ValidationError, match="tries"):
        msgspec.json.decode(b'{"tries": 3}', type=Backoff)


def test_its_values_are_named() -> None:
    with pytest.raises(ConfigError):
        Backoff(5)  # type: ignore[misc]


def test_it_is_a_value() -> None:
    assert pickle.loads(pickle.dumps(Backoff(attempts=7))) == Backoff(attempts=7)
    assert hash(Backoff()) == hash(Backoff())
    with pytest.raises(AttributeError):
        Backoff().attempts = 6  # type: ignore[misc]
