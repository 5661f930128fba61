from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.messages import Kind, Setting, Signal
from rxllm.policies.aimd import AdaptiveConcurrencyParams, Aimd, StrictAimd, aimd

ONE_TO_HUNDRED = AdaptiveConcurrencyParams(min_concurrency=1, max_concurrency=100, recovery_threshold=0.0)


class Driver:
    """Feeds a machine and keeps the setting as a gate would."""

    def __init__(self, machine: Aimd | StrictAimd) -> None:
        self.machine = machine
        self.setting: Setting = machine.initial
        self.epoch = 0

    @property
    def limit(self) -> int:
        assert self.setting.limit is not None
        return self.setting.limit

    def tell(self, at: float, kind: Kind, epoch: int | None = None, *, binding: bool = True) -> None:
        signal = Signal(
            at=at, kind=kind, in_flight=1, epoch=self.epoch if epoch is None else epoch, seconds=0.1, binding=binding
        )
        setting = self.machine.on_signal(signal)
        if setting is not None:
            self.setting = setting
            self.epoch += 1

    def window(self, at: float, *, errors: int, size: int = 20, **options: Any) -> int:
        """Give a strict machine a window, and then a start at which it looks."""
        for number in range(size):
            self.tell(at, "fault" if number < errors else "ok", **options)
        self.tell(at, "start")
        return self.limit

    def minute(self, number: int, *, errors: int, size: int = 20, **options: Any) -> int:
        """Give a window that is complete when the update time is over; the first one decides at once."""
        for outcome in range(size):
            at = 61.0 * number - (30.0 if outcome < size - 1 else 0.0)
            self.tell(at, "fault" if outcome < errors else "ok", **options)
        return self.limit


def warm(params: AdaptiveConcurrencyParams | None = None) -> Driver:
    """Return a machine by default that has decided upon its first window: to leave all as it is."""
    driver = Driver(aimd(params))
    for _ in range(driver.machine._params.min_window_size):
        driver.tell(0.0, "ok", binding=False)
    assert driver.setting == driver.machine.initial
    return driver


def test_strict_takes_the_golden_steps_of_the_machine_that_the_fields_come_from() -> None:
    driver = Driver(aimd(ONE_TO_HUNDRED, strict=True))
    assert isinstance(driver.machine, StrictAimd)
    limits, backoff = [driver.limit], []
    for step in range(14):
        limits.append(driver.window(61.0 * (step + 1), errors=20 if step < 6 else 0))
        backoff.append(driver.machine.in_backoff)
    assert limits == [50, 40, 40, 32, 32, 25, 25, 25, 30, 35, 40, 45, 50, 55, 60]
    assert backoff == [True] * 7 + [False] * 7


def test_strict_takes_the_band_between_the_thresholds_for_bad_in_a_back_off_and_for_good_outside() -> None:
    params = AdaptiveConcurrencyParams(
        min_concurrency=1, max_concurrency=100, error_threshold=0.2, recovery_threshold=0.05, min_window_size=10
    )
    driver = Driver(aimd(params, strict=True))
    assert driver.window(61, errors=2) == 55
    assert driver.window(122, errors=20) == 44
    assert [driver.window(183, errors=2), driver.window(183.5, errors=2)] == [44, 35]


def test_strict_counts_what_began_under_the_limit_before_and_looks_only_at_a_start() -> None:
    driver = Driver(aimd(ONE_TO_HUNDRED, strict=True))
    for _ in range(20):
        driver.tell(61, "fault")
    assert driver.limit == 50
    driver.tell(61, "start")
    assert driver.limit == 40
    for _ in range(20):
        driver.tell(122, "fault", epoch=0)
    driver.tell(122, "start")
    for _ in range(20):
        driver.tell(123, "fault", epoch=0)
    driver.tell(123, "start")
    assert driver.limit == 32


def test_strict_dilutes_at_the_upper_bound_and_holds_a_thousand_outcomes() -> None:
    params = AdaptiveConcurrencyParams(min_concurrency=1, max_concurrency=10, initial_concurrency_factor=1.0)
    driver = Driver(aimd(params, strict=True))
    assert driver.window(61, errors=0, size=2000) == 10
    assert driver.window(122, errors=9, size=9) == 10  # 9 of 1000
    assert driver.window(123, errors=1, size=1) == 8  # 10 of 1000


def test_strict_may_go_beyond_the_upper_bound_with_a_factor_above_one_and_the_other_does_not() -> None:
    params = AdaptiveConcurrencyParams(initial_concurrency_factor=1.0, backoff_factor=1.5)
    assert Driver(aimd(params, strict=True)).window(61, errors=20) == 150
    assert Driver(aimd(params)).window(61, errors=20) == 100


@pytest.mark.parametrize("backoff", [False, True], ids=["outside-a-back-off", "in-a-back-off"])
def test_between_the_thresholds_it_holds(backoff: bool) -> None:
    driver = warm(AdaptiveConcurrencyParams(error_threshold=0.2, recovery_threshold=0.05))
    before = driver.minute(1, errors=20 if backoff else 2)
    assert before == (41 if backoff else 52)
    assert [driver.minute(number, errors=2) for number in range(2, 9)] == [before] * 7


def test_it_leaves_a_back_off_after_two_good_windows_in_a_row() -> None:
    driver = warm(AdaptiveConcurrencyParams(error_threshold=0.2, recovery_threshold=0.05))
    limits = [driver.minute(number + 1, errors=errors) for number, errors in enumerate([20, 0, 2, 0, 0, 0])]
    assert limits == [41, 41, 41, 41, 46, 51]


def test_it_shrinks_again_only_after_two_bad_windows_and_never_twice_within_the_update_time() -> None:
    driver = warm()
    assert [driver.minute(number + 1, errors=20) for number in range(5)] == [41, 41, 32, 32, 25]
    driver = warm()
    assert [driver.window(61.0 + step, errors=20) for step in range(59)] == [41] * 59


def test_what_began_under_another_limit_does_not_count() -> None:
    driver = warm()
    driver.minute(1, errors=20)
    assert [driver.minute(number, errors=20, epoch=0) for number in range(2, 9)] == [41] * 7
    assert [driver.minute(number, errors=20) for number in (9, 10)] == [41, 32]


def test_a_good_time_at_the_upper_bound_does_not_dilute_the_errors_after_it() -> None:
    driver = warm(AdaptiveConcurrencyParams(max_concurrency=10, initial_concurrency_factor=1.0))
    assert [driver.minute(number, errors=0, size=50) for number in range(1, 100)] == [10] * 99
    assert driver.minute(100, errors=1) == 8


def test_it_looks_when_an_attempt_ends_although_none_starts_any_more() -> None:
    driver = Driver(aimd())
    for _ in range(10):
        driver.tell(61, "overloaded")
    assert driver.limit == 41


def test_it_grows_only_while_its_limit_is_the_reason_for_a_wait() -> None:
    driver = warm()
    assert driver.minute(1, errors=0, binding=False) == 52
    assert driver.minute(2, errors=0, binding=True) == 57


def test_a_window_has_the_newest_thousand_outcomes() -> None:
    assert warm().minute(1, errors=500, size=1500) == 57
    assert warm().minute(1, errors=511, size=1500) == 41


@given(
    kinds=st.lists(st.sampled_from(["start", "ok", "fatal", "invalid"]), max_size=200),
    gap=st.floats(0, 100),
    strict=st.booleans(),
)
def test_without_refusals_and_faults_it_never_shrinks(kinds: list[Kind], gap: float, strict: bool) -> None:
    driver = Driver(aimd(AdaptiveConcurrencyParams(), strict=strict))
    limits = [driver.limit]
    for number, kind in enumerate(kinds):
        driver.tell(gap * number, kind)
        limits.append(driver.limit)
    assert all(before <= after for before, after in pairwise(limits))


signals = st.lists(
    st.tuples(
        st.sampled_from(["start", "ok", "refused", "overloaded", "fault", "fatal", "invalid"]),
        st.integers(0, 400),
        st.booleans(),
    ),
    max_size=300,
)


@given(signals, st.sampled_from([0.3, 0.8, 1.2, 7.0]), st.integers(-(2**20), 2**20))
def test_it_stays_within_its_bounds_and_does_not_care_for_the_origin_of_time(
    steps: list[tuple[Kind, int, bool]], factor: float, origin: int
) -> None:
    params = AdaptiveConcurrencyParams(min_concurrency=3, max_concurrency=40, min_update_time=1, backoff_factor=factor)
    here, there = Driver(aimd(params)), Driver(aimd(params))
    at = 0.0
    for kind, gap, binding in steps:
        at += gap / 8
        here.tell(at, kind, binding=binding)
        there.tell(at + origin, kind, binding=binding)
        assert here.setting == there.setting
        assert 3 <= here.limit <= 40
        assert here.setting.rate is None
    assert here.machine.due is None
    assert here.machine.on_timer(at) is None


@pytest.mark.parametrize("strict", [False, True], ids=["by-default", "strict"])
def test_it_begins_between_its_bounds(strict: bool) -> None:
    params = [AdaptiveConcurrencyParams(initial_concurrency_factor=factor) for factor in (0.0, 0.5, 1.0)]
    assert [aimd(one, strict=strict).initial.limit for one in params] == [5, 52, 100]


def test_the_defaults_are_those_of_the_documentation() -> None:
    assert AdaptiveConcurrencyParams() == AdaptiveConcurrencyParams(
        min_concurrency=5,
        max_concurrency=100,
        initial_concurrency_factor=0.5,
        concurrency_step=5,
        min_update_time=60.0,
        error_threshold=0.01,
        backoff_factor=0.8,
        recovery_threshold=0.005,
        min_window_size=10,
    )
    assert aimd().initial.limit == Aimd().initial.limit == 52


@pytest.mark.parametrize(
    "wrong",
    [
        {"min_concurrency": 0},
        {"min_concurrency": 2.5},
        {"max_concurrency": 4},
        {"initial_concurrency_factor": -0.1},
        {"initial_concurrency_factor": 1.1},
        {"concurrency_step": 0},
        {"min_update_time": 0},
        {"min_update_time": float("inf")},
        {"error_threshold": 1.5},
        {"backoff_factor": 0},
        {"recovery_threshold": -0.1},
        {"recovery_threshold": 0.01},
        {"min_window_size": 0},
    ],
    ids=str,
)
def test_a_value_out_of_its_bounds_is_refused_by_its_name(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} must be"):
        AdaptiveConcurrencyParams(**wrong)
