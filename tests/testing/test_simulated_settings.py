from __future__ import annotations

from typing import Any

import pytest

from rxllm.errors import ConfigError
from rxllm.testing.simulated import SimulatedProvider


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"colour": 1}, "'colour'.*got 1"),
        ({"port": 70_000}, "port .* 70000"),
        ({"seed": 1.5}, "seed .* 1.5"),
        ({"latency": -1}, "latency .* -1"),
        ({"latency": float("nan")}, "latency .* nan"),
        ({"latency": {"base": -2}}, "latency: base .* -2"),
        ({"latency": {"bass": 2}}, "latency: .*bass"),
        ({"path_jitter": -1}, "path_jitter: the most .* -1"),
        ({"path_jitter": "0.05"}, "path_jitter: the most .* '0.05'"),
        ({"path_jitter": (-0.1, 0.1)}, "path_jitter: the least .* -0.1"),
        ({"path_jitter": (0.2, 0.1)}, "path_jitter: the most .* 0.1"),
        ({"path_jitter": (0.1, 0.2, 0.3)}, r"path_jitter .*\(0.1, 0.2, 0.3\)"),
        ({"path_jitter": None}, "path_jitter: the most .* None"),
        ({"knee": 0}, "knee .* 0"),
        ({"knee": 1.5}, "knee .* 1.5"),
        ({"max_in_flight": True}, "max_in_flight .* True"),
        ({"chunks": 0}, "chunks .* 0"),
        ({"chunk_seconds": -1}, "chunk_seconds .* -1"),
        ({"overload_status": 500}, "overload_status .* 500"),
        ({"requests": 0}, "requests .* 0"),
        ({"requests": "500"}, "requests .* '500'"),
        ({"tokens": {"amount": 5, "per": 0}}, "tokens: per .* 0"),
        ({"charge": "later"}, "charge .* 'later'"),
        ({"charge": []}, r"charge .* \[\]"),
        ({"default_max_tokens": None}, "default_max_tokens .* None"),
        ({"charge_refused": 1}, "charge_refused .* 1"),
        ({"retry_after": "never"}, "retry_after .* 'never'"),
        ({"limit_headers": "yes"}, "limit_headers .* 'yes'"),
        ({"faults": ["500"]}, r"faults .*\['500'\]"),
        ({"faults": {"200": 0.1}}, "faults.*got '200'"),
        ({"faults": {500: 0.1}}, "faults.*got 500"),
        ({"faults": {"500": 1.5}}, "faults.*'500'.* 1.5"),
        ({"faults": {"500": 0.7, "503": 0.7}}, "faults.*sum to 1.4"),
        ({"script": "500"}, "script .*'500'"),
        ({"script": ["no"]}, "script.*unfinished, no_done.*'no'"),
        ({"marked": {"": "500"}}, "marked.*''"),
        ({"marked": {"m": "no"}}, "marked.*'m'.*'no'"),
        ({"marked": {"m": [5]}}, "marked.*'m'.*5"),
        ({"fault_retry_after": None}, "fault_retry_after .* None"),
        ({"max_stall": float("inf")}, "max_stall .* inf"),
        ({"requests_per_connection": 0}, "requests_per_connection .* 0"),
        ({"hang_up": "soon"}, "hang_up .* 'soon'"),
        ({"models": "gpt"}, "models .* 'gpt'"),
        ({"models": []}, r"models .* \[\]"),
        ({"answer": 5}, "answer .* 5"),
        ({"answer": []}, r"answer .* \[\]"),
        ({"answer": "loud"}, "answer .* 'loud'"),
        ({"answer": "no_such_module:f"}, "answer='no_such_module:f'"),
        ({"answer": "os:sep"}, "answer='os:sep' is not callable"),
        ({"steps": 5}, "steps .* 5"),
        ({"steps": [(1.0,)]}, "steps.*1.0"),
        ({"steps": [(-1.0, {})]}, "steps: seconds .* -1"),
        ({"steps": [(1.0, {"knee": -1})]}, "knee .* -1"),
    ],
)
def test_a_bad_setting_is_refused_by_name_with_its_value(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SimulatedProvider(**settings)


@pytest.mark.parametrize("key", ["", 5, "ü-secret"])
def test_a_bad_key_is_refused_and_not_shown(key: Any) -> None:
    with pytest.raises(ConfigError, match="key must be") as caught:
        SimulatedProvider(key=key)
    assert "secret" not in str(caught.value)
