"""Timeouts and Validate: values with bounds."""

from __future__ import annotations

import pickle

import msgspec
import pytest

from rxllm.errors import ConfigError
from rxllm.policies.timeouts import Timeouts
from rxllm.policies.validation import Validate

PHASES = ("connect", "first_byte", "idle", "total")


def test_the_defaults_let_a_model_think_for_minutes_and_no_server_be_silent_for_ever():
    limits = Timeouts()
    assert (limits.connect, limits.first_byte, limits.idle, limits.total) == (10.0, 600.0, 60.0, None)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "5", True])
def test_a_timeout_is_a_number_above_zero_or_none(phase, value):
    with pytest.raises(ConfigError, match=phase):
        Timeouts(**{phase: value})
    assert getattr(Timeouts(**{phase: None}), phase) is None
    assert getattr(Timeouts(**{phase: 2}), phase) == 2


def test_bounds_hold_for_settings_from_a_file_too():
    assert msgspec.json.decode(b'{"idle": 5}', type=Timeouts) == Timeouts(idle=5)
    with pytest.raises(ConfigError, match="idle"):
        msgspec.convert({"idle": -5}, Timeouts)
    with pytest.raises(msgspec.ValidationError, match="idel"):
        msgspec.json.decode(b'{"idel": 5}', type=Timeouts)


def test_both_are_frozen_and_pickle():
    for value in (Timeouts(idle=1), Validate(check=bool, attempts=2)):
        assert pickle.loads(pickle.dumps(value)) == value
        with pytest.raises(AttributeError):
            value.attempts = 5  # type: ignore[union-attr, misc]


@pytest.mark.parametrize(
    "settings",
    [
        {"check": "len"},
        {"check": bool, "attempts": 0},
        {"check": bool, "attempts": 1.5},
        {"check": bool, "repair": 5},
    ],
    ids=str,
)
def test_a_validation_has_a_check_at_least_one_attempt_and_perhaps_a_repair(settings):
    with pytest.raises(ConfigError, match=next(name for name in reversed(settings))):
        Validate(**settings)
