import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.policies.ramp import Ramp

ramps = st.builds(Ramp, initial=st.floats(1e-3, 100), seconds=st.floats(0.1, 1e5))


@given(ramps, st.floats(1e-3, 1e5), st.floats(0, 1), st.floats(0, 1))
def test_it_grows_from_the_initial_rate_to_the_full_one(ramp: Ramp, full: float, first: float, second: float) -> None:
    early, late = (ramp.rate(share * ramp.seconds, full) for share in sorted((first, second)))
    assert min(ramp.initial, full) <= early * (1 + 1e-9)
    assert early <= late * (1 + 1e-9)
    assert late <= full
    assert ramp.rate(0, full) == pytest.approx(min(ramp.initial, full))
    assert ramp.rate(ramp.seconds, full) == ramp.rate(2 * ramp.seconds, full) == full


@given(ramps, st.floats(1.01, 1e3), st.floats(0, 0.9), st.floats(0.01, 0.09))
def test_in_equal_times_it_grows_by_equal_factors(ramp: Ramp, factor: float, at: float, step: float) -> None:
    full = ramp.initial * factor
    grown = ramp.rate((at + step) * ramp.seconds, full) / ramp.rate(at * ramp.seconds, full)
    assert grown == pytest.approx(factor**step)


def test_before_its_start_it_is_the_initial_rate_and_at_the_end_it_is_over() -> None:
    ramp = Ramp(initial=2, seconds=10)
    assert ramp.rate(-5, 50) == 2
    assert [ramp.ends(at) for at in (0, 9.9, 10, 11)] == [False, False, True, True]
    assert Ramp(initial=2, seconds=0).rate(0, 50) == 50


@pytest.mark.parametrize("wrong", [{"initial": 0}, {"initial": "1"}, {"seconds": -1}, {"seconds": float("inf")}])
def test_a_setting_out_of_range_is_refused_by_its_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} must be"):
        Ramp(**{"initial": 1, "seconds": 60, **wrong})  # type: ignore[arg-type]
