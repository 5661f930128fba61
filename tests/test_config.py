"""Parameters: their fields and checks, the files they come from, and the pipelines that they describe."""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rxllm
from rxllm import chat
from rxllm.config import RemoteParams, client_of, from_params, gate_of, load
from rxllm.errors import ConfigError
from rxllm.messages import Secret
from rxllm.policies import AdaptiveConcurrencyParams
from rxllm.policies.aimd import Aimd
from rxllm.testing import SimulatedProvider

KEY = "sk-marker-0123456789"


def test_the_defaults_are_those_that_people_know():
    params = RemoteParams()
    assert {name: getattr(params, name) for name in params.__struct_fields__} == {
        "api_url": None,
        "api_key": None,
        "api_key_env_varname": None,
        "max_retries": 5,
        "retry_backoff_base": 1.0,
        "retry_backoff_max": 30.0,
        "connection_timeout": 300.0,
        "num_workers": 1,
        "politeness_policy": 0.0,
        "batch_completion_window": "24h",
        "use_adaptive_concurrency": True,
        "user_id": None,
        "requests_per_minute": None,
        "input_tokens_per_minute": None,
        "output_tokens_per_minute": None,
        "adaptive_concurrency": None,
    }


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_workers": 0}, "num_workers must be a whole number >= 1, got 0"),
        ({"num_workers": 2.0}, "num_workers must be a whole number >= 1, got 2.0"),
        ({"politeness_policy": -1}, "politeness_policy must be a finite number >= 0, got -1"),
        ({"politeness_policy": float("inf")}, "politeness_policy must be a finite number >= 0, got inf"),
        ({"connection_timeout": -0.1}, "connection_timeout must be a finite number >= 0, got -0.1"),
        ({"max_retries": -1}, "max_retries must be a whole number >= 0, got -1"),
        ({"retry_backoff_base": 0}, "retry_backoff_base must be a finite number > 0, got 0"),
        ({"retry_backoff_max": 0.5}, "retry_backoff_max must be a finite number >= 1.0, got 0.5"),
        ({"requests_per_minute": 0}, "requests_per_minute must be a whole number >= 1 or None, got 0"),
        ({"input_tokens_per_minute": 0}, "input_tokens_per_minute must be a whole number >= 1 or None, got 0"),
        ({"output_tokens_per_minute": "5"}, "output_tokens_per_minute must be a whole number >= 1 or None, got '5'"),
        ({"use_adaptive_concurrency": "yes"}, "use_adaptive_concurrency must be True or False, got 'yes'"),
        ({"api_url": 5}, "api_url must be a string that is not empty or None, got 5"),
        ({"api_key": 5}, "api_key: a key must be a string, got a int"),
        ({"adaptive_concurrency": 5}, "adaptive_concurrency must be AdaptiveConcurrencyParams, its fields or None"),
        (
            {"adaptive_concurrency": {"min_concurrency": 0}},
            "adaptive_concurrency: min_concurrency must be a whole number >= 1, got 0",
        ),
        (
            {"adaptive_concurrency": {"min": 1}},
            "adaptive_concurrency: there is no field 'min': the fields are min_concurrency, max_concurrency",
        ),
        ({"num_worker": 5}, "num_worker"),
    ],
    ids=[
        "no-workers",
        "workers-that-are-no-whole-number",
        "politeness-below-zero",
        "politeness-without-end",
        "a-timeout-below-zero",
        "retries-below-zero",
        "a-backoff-of-zero",
        "a-backoff-that-shrinks",
        "no-requests",
        "no-input",
        "a-limit-as-a-text",
        "a-switch-as-a-text",
        "a-url-that-is-none",
        "a-key-that-is-none",
        "a-controller-that-is-none",
        "a-controller-out-of-bounds",
        "a-field-of-the-controller-that-there-is-not",
        "a-field-that-there-is-not",
    ],
)
def test_a_wrong_value_is_named_with_its_field(fields, said):
    with pytest.raises(ConfigError) as raised:
        RemoteParams(**fields)
    assert said in str(raised.value)


def test_a_key_does_not_show():
    params = RemoteParams(api_key=KEY)
    assert params.api_key == Secret(KEY)
    assert KEY not in repr(params)
    with pytest.raises(ConfigError, match="a key is not pickled"):
        pickle.dumps(params)
    with pytest.raises(ConfigError) as raised:
        RemoteParams(api_key=f" {KEY}")
    assert KEY not in str(raised.value)
    assert KEY not in repr(gate_of(params))
    assert KEY not in repr(client_of(params, model="any"))


def test_parameters_without_a_key_pickle():
    params = RemoteParams(num_workers=5, adaptive_concurrency={"max_concurrency": 9})
    assert pickle.loads(pickle.dumps(params)) == params
    assert isinstance(params.adaptive_concurrency, AdaptiveConcurrencyParams)


@given(workers=st.integers(1, 10_000), politeness=st.floats(0, 1e6))
def test_any_number_of_workers_makes_a_good_controller(workers, politeness):
    adaptive = RemoteParams(num_workers=workers, politeness_policy=politeness).adaptive
    assert (adaptive.min_concurrency, adaptive.max_concurrency) == (1, workers)
    assert adaptive.concurrency_step == max(1, (workers - 1) // 8)
    assert adaptive.min_update_time == max(1, politeness - 1)
    assert 1 <= adaptive.initial <= workers


def test_the_gate_has_the_limits_and_the_politeness():
    params = RemoteParams(
        num_workers=50,
        politeness_policy=60,
        requests_per_minute=500,
        input_tokens_per_minute=40_000,
        output_tokens_per_minute=8_000,
    )
    gate = gate_of(params)
    quotas = [row.quota for row in gate.statistics().quotas]
    assert [(quota.limit, quota.per, quota.unit, quota.charged_at) for quota in quotas] == [
        (500, 60, "requests", "start"),
        (40_000, 60, "input_tokens", "start"),
        (8_000, 60, "output_tokens", "start"),
        (50, 60, "requests", "end"),
    ]
    assert gate.limit == 25
    assert isinstance(gate._feedback.controller, Aimd)


def test_without_the_adaptive_limit_there_are_as_many_at_a_time_as_workers():
    assert gate_of(RemoteParams(num_workers=50, use_adaptive_concurrency=False)).limit == 50


@pytest.mark.parametrize(
    ("url", "dialect", "base"),
    [
        (None, "openai", "https://api.openai.com/v1"),
        ("https://api.openai.com/v1/chat/completions", "openai", "https://api.openai.com/v1"),
        ("http://localhost:8000/v1/", "openai", "http://localhost:8000/v1"),
        ("http://localhost:8000/v1/completions", "openai", "http://localhost:8000/v1"),
        (None, "anthropic", "https://api.anthropic.com/v1"),
        ("https://api.anthropic.com/v1/messages", "anthropic", "https://api.anthropic.com/v1"),
        ("http://localhost:5000/v1/llm/completions-sync", "llm-engine", "http://localhost:5000"),
        ("http://localhost:5000", "llm-engine", "http://localhost:5000"),
    ],
)
def test_the_client_is_where_the_url_says_with_or_without_the_path_of_an_operation(url, dialect, base):
    with client_of(RemoteParams(api_url=url, api_key=KEY), model="any", dialect=dialect) as client:
        assert repr(client).endswith(f"(model='any', base_url='{base}')")


def test_a_key_comes_from_the_variable_that_is_named_and_its_name_is_told_when_it_is_missing(monkeypatch):
    params = RemoteParams(api_url="http://localhost:8000/v1", api_key_env_varname="SOME_KEY")
    monkeypatch.delenv("SOME_KEY", raising=False)
    for dialect in ("openai", "anthropic"):
        with pytest.raises(ConfigError, match="SOME_KEY"):
            client_of(params, model="any", dialect=dialect)
    monkeypatch.setenv("SOME_KEY", KEY)
    client_of(params, model="any").close()


def test_a_url_without_a_key_sends_none_even_if_there_is_one_for_others(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)

    async def main():
        async with SimulatedProvider(key=KEY) as provider:
            return await outcomes_of(RemoteParams(api_url=provider.url, max_retries=0), ["Hello"])

    (outcome,) = asyncio.run(main())
    assert type(outcome.error) is rxllm.errors.AuthError
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY"):
        client_of(RemoteParams(), model="any")


def test_a_preset_goes_with_its_own_dialect_only():
    with client_of(RemoteParams(), model="any", preset="ollama") as client:
        assert "localhost:11434" in repr(client)
    with pytest.raises(ConfigError, match="the dialect is 'anthropic'"):
        client_of(RemoteParams(api_key=KEY), model="any", dialect="anthropic", preset="ollama")
    with pytest.raises(ConfigError, match="dialect must be 'openai' or 'anthropic' or 'llm-engine', got 'cohere'"):
        from_params(RemoteParams(), model="any", dialect="cohere")


async def outcomes_of(params, items, **options):
    stage = from_params(params, model="any", ordered=True, **options)
    return await rxllm.acollect(rxllm.from_iterable(items).pipe(stage))


@pytest.mark.parametrize(
    ("dialect", "path", "item"),
    [
        ("openai", "/v1/chat/completions", "Hello"),
        ("anthropic", "/v1/messages", chat("Hello", max_tokens=20)),
        ("llm-engine", "/v1/llm/completions-sync", "Hello"),
    ],
)
def test_the_pipeline_calls_with_retries_and_the_key(dialect, path, item):
    async def main():
        script = ["500", "429"]
        async with SimulatedProvider(key=KEY, script=script, retry_after="off", fault_retry_after=0) as provider:
            params = RemoteParams(
                api_url=f"{provider.origin}{path}",
                api_key=KEY,
                num_workers=4,
                retry_backoff_base=0.001,
                retry_backoff_max=0.001,
                requests_per_minute=1000,
                input_tokens_per_minute=100_000,
                output_tokens_per_minute=100_000,
            )
            return await outcomes_of(params, [item] * 5, dialect=dialect), provider.statistics().statuses

    outcomes, statuses = asyncio.run(main())
    assert [outcome.error for outcome in outcomes] == [None] * 5
    assert statuses == {200: 5, 500: 1, 429: 1}


def test_there_are_as_many_retries_as_said_and_each_try_has_its_time():
    async def main():
        async with SimulatedProvider(faults={"500": 1.0}) as provider:
            fast = {"retry_backoff_base": 0.001, "retry_backoff_max": 0.001}
            failing = await outcomes_of(RemoteParams(api_url=provider.url, max_retries=2, **fast), ["Hello"])
            provider.set(faults={"stall": 1.0}, max_stall=0.3)
            slow = RemoteParams(api_url=provider.url, max_retries=0, connection_timeout=0.05)
            return failing, await outcomes_of(slow, ["Hello"])

    (failing,), (stalled,) = asyncio.run(main())
    assert [type(attempt.error) for attempt in failing.attempts] == [rxllm.errors.ServerError] * 3
    assert isinstance(stalled.error, rxllm.errors.TimeoutError)
    assert stalled.error.phase == "total"


def test_a_place_is_taken_again_only_after_the_politeness():
    ends, starts = [], []

    async def ask(_request):
        starts.append(time.monotonic())
        await asyncio.sleep(0.01)
        ends.append(time.monotonic())

    gate = gate_of(RemoteParams(num_workers=2, politeness_policy=0.05, use_adaptive_concurrency=False))
    rxllm.collect(rxllm.from_iterable(range(6)).pipe(rxllm.call(rxllm.function(ask), gate=gate)))
    assert len(starts) == 6
    assert starts[1] < ends[0]  # the first ones do not wait
    for started in starts[2:]:
        assert sum(started - 0.05 < ended for ended in ends if ended <= started) < 2


# Files

FIELDS = {
    "api_url": "http://localhost:8000/v1",
    "num_workers": 8,
    "politeness_policy": 1.5,
    "use_adaptive_concurrency": False,
    "adaptive_concurrency": {"max_concurrency": 20},
}
TOML = """
api_url = "http://localhost:8000/v1"
num_workers = 8
politeness_policy = 1.5
use_adaptive_concurrency = false
[adaptive_concurrency]
max_concurrency = 20
"""
YAML = """
api_url: http://localhost:8000/v1
num_workers: 8
politeness_policy: 1.5
use_adaptive_concurrency: false
adaptive_concurrency:
  max_concurrency: 20
"""


@pytest.mark.parametrize(
    ("name", "text"),
    [("a.toml", TOML), ("a.yaml", YAML), ("a.yml", YAML), ("a.JSON", json.dumps(FIELDS)), ("bom.json", "\ufeff{}")],
)
def test_parameters_are_read_from(name, text, tmp_path):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    assert load(path) == load(str(path)) == (RemoteParams() if name == "bom.json" else RemoteParams(**FIELDS))


def test_an_empty_file_has_the_defaults(tmp_path):
    for name, text in (("a.toml", ""), ("a.yaml", "# nothing\n"), ("a.json", "{}")):
        (tmp_path / name).write_text(text)
        assert load(tmp_path / name) == RemoteParams()


def test_a_section_of_a_larger_file_is_read_and_the_rest_is_not_looked_at(tmp_path):
    path = tmp_path / "infer.yaml"
    path.write_text("model:\n  model_name: any\nremote_params:\n  num_workers: 9\nengine: OPENAI\n")
    assert load(path, section="remote_params").num_workers == 9
    with pytest.raises(ConfigError, match="there is no section 'remote', only model, remote_params, engine"):
        load(path, section="remote")
    with pytest.raises(ConfigError, match="the section 'engine' must have names and values, got str"):
        load(path, section="engine")
    with pytest.raises(ConfigError, match="there is no field 'model'"):
        load(path)


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.toml", "num_workers = 0", ": num_workers must be a whole number >= 1, got 0"),
        ("a.toml", "num_worker = 5", ": there is no field 'num_worker': did you mean 'num_workers'?"),
        ("a.toml", "zzz = 5", ": there is no field 'zzz': the fields are api_url, api_key"),
        ("a.toml", 'a = 1\nb = "\n', ", line 2, column 6: not TOML (Illegal character"),
        ("a.toml", 'a = 1\nb = "', ", end of document: not TOML (Unterminated string)"),
        ("a.json", '{"a": 1,\n "b": }', ", line 2, column 7: not JSON (Expecting value)"),
        ("a.json", "[1]", ": the file must have names and values, got list"),
        ("a.json", '{"politeness_policy": NaN}', ": politeness_policy must be a finite number >= 0, got nan"),
        ("a.yaml", "a: 1\nb: [", ", line 2, column 5: not YAML ("),
        ("a.yaml", "a: !!python/name:os.system", ", line 1, column 4: not YAML ("),
        ("a.yaml", "1: 2", ": there is no field 1: the fields are api_url"),
        ("a.yaml", "adaptive_concurrency: {step: 2}", ": adaptive_concurrency: there is no field 'step':"),
        ("a.ini", "", ": its name must end with .toml, .yaml, .yml, .json"),
        ("a.json", "[" * 100_000, "nested too deeply"),
    ],
    ids=[
        "toml-a-value-out-of-bounds",
        "toml-a-field-misspelt",
        "toml-a-field-that-is-none",
        "toml-a-line-that-ends-in-a-string",
        "toml-an-end-in-a-string",
        "json-a-value-missing",
        "json-a-list",
        "json-a-number-that-is-none",
        "yaml-a-list-without-an-end",
        "yaml-a-tag-that-runs-code",
        "yaml-a-name-that-is-a-number",
        "yaml-a-field-of-a-field",
        "another-ending",
        "json-nested-too-deeply",
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_place(name, text, said, tmp_path):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(path)
    assert str(raised.value).startswith(str(path))
    assert said in str(raised.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read .*missing.toml: No such file"):
        load(tmp_path / "missing.toml")
    (tmp_path / "a.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(ConfigError, match="a.toml: not UTF-8 at byte 5"):
        load(tmp_path / "a.toml")


@pytest.mark.parametrize("text", [f'apikey = "{KEY}"', f'api_key = "{KEY}\\n"', f'api_key = ["{KEY}"]'])
def test_no_error_of_a_file_shows_a_key(text, tmp_path):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError) as raised:
        load(tmp_path / "a.toml")
    assert KEY not in str(raised.value)


def test_yaml_without_its_package_says_what_to_install(tmp_path, monkeypatch):
    (tmp_path / "a.yaml").write_text("num_workers: 5")
    monkeypatch.setitem(sys.modules, "yaml", None)  # as if it were not there
    with pytest.raises(ConfigError, match=r"a.yaml, which is YAML: to read it install rxllm\[yaml\]"):
        load(tmp_path / "a.yaml")
