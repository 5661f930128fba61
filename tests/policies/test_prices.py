"""Prices: what usage costs, and what files of them may say."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm import Usage
from rxllm.errors import ConfigError
from rxllm.policies.prices import Price, Prices

PRICES = Prices(
    {
        "plain": Price(input=2.0, output=8.0),
        "cached": Price(input=2.0, output=8.0, cached=0.5, cache_write=2.5, batch=0.5),
        "free": Price(input=0, output=0),
    }
)
MILLION = 1_000_000


@pytest.mark.parametrize(
    ("model", "usage", "usd"),
    [
        pytest.param("plain", Usage(), 0.0, id="nothing"),
        pytest.param("plain", Usage(input_tokens=MILLION), 2.0, id="input"),
        pytest.param("plain", Usage(output_tokens=MILLION, reasoning_tokens=MILLION), 8.0, id="reasoning-is-output"),
        pytest.param("plain", Usage(input_tokens=MILLION, cached_tokens=MILLION), 2.0, id="cached-as-any-input"),
        pytest.param("cached", Usage(input_tokens=MILLION, cached_tokens=MILLION // 2), 1.25, id="half-of-it-cached"),
        pytest.param("cached", Usage(input_tokens=MILLION, cache_write_tokens=MILLION), 2.5, id="written-to-a-cache"),
        pytest.param("cached", Usage(cached_tokens=MILLION), 0.5, id="more-cached-than-input"),
        pytest.param("free", Usage(input_tokens=5, output_tokens=5), 0.0, id="free"),
    ],
)
def test_each_kind_of_token_has_its_price(model: str, usage: Usage, usd: float):
    assert PRICES.cost(usage, model) == pytest.approx(usd)


def test_a_price_may_be_for_another_number_of_tokens():
    assert Prices({"a": Price(input=0.1, output=0.3)}, per=1_000).cost(Usage(input_tokens=2_000), "a") == 0.2


def test_a_batch_job_costs_its_share():
    usage = Usage(input_tokens=MILLION, output_tokens=MILLION)
    assert PRICES.cost(usage, "cached", batch=True) == PRICES.cost(usage, "cached") / 2


def test_a_model_without_a_price_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match="none for the model 'gpt-unknown'; there is for plain, cached, free"):
        PRICES.cost(Usage(), "gpt-unknown")
    with pytest.raises(ConfigError, match="'plain' has no batch"):
        PRICES.cost(Usage(), "plain", batch=True)


tokens = st.integers(0, 10**9)
usages = st.builds(
    lambda plain, cached, written, output: Usage(
        input_tokens=plain + cached + written,
        cached_tokens=cached,
        cache_write_tokens=written,
        output_tokens=output,
    ),
    tokens,
    tokens,
    tokens,
    tokens,
)


@given(one=usages, other=usages)
def test_two_usages_cost_what_their_sum_costs(one: Usage, other: Usage):
    apart = PRICES.cost(one, "cached") + PRICES.cost(other, "cached")
    assert PRICES.cost(one + other, "cached") == pytest.approx(apart, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Price(input=-1, output=1), "input must be a finite number >= 0, got -1"),
        (lambda: Price(input=1, output=float("nan")), "output must be a finite number >= 0, got nan"),
        (lambda: Price(input=1, output=1, cached="1"), "cached must be"),
        (lambda: Price(input=1), "Price: Missing required argument 'output'"),
        (lambda: Prices({"a": Price(input=1, output=1)}, per=0), "per must be a finite number > 0, got 0"),
        (lambda: Prices({"a": 3}), "models: 'a' must have a Price, got 3"),
        (lambda: Prices({"": Price(input=1, output=1)}), "a name must be a string that is not empty"),
        (lambda: Prices([]), "models must be a dict"),
    ],
    ids=["negative", "nan", "a-text", "missing", "per-nothing", "no-price", "no-name", "no-dict"],
)
def test_what_is_no_price_is_refused(make: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        make()


# files

TOML = """
per = 1_000
[models."gpt-4.1"]
input = 1
output = 2.5
cached = 0.25
[models.other]
input = 0
output = 0
"""
KNOWN = Prices({"gpt-4.1": Price(input=1, output=2.5, cached=0.25), "other": Price(input=0, output=0)}, per=1_000)


def test_toml_and_json_files_say_the_same(tmp_path: Path):
    toml, other = tmp_path / "prices.toml", tmp_path / "prices.JSON"
    toml.write_text(TOML)
    models = {"gpt-4.1": {"input": 1, "output": 2.5, "cached": 0.25}, "other": {"input": 0, "output": 0}}
    other.write_bytes(b"\xef\xbb\xbf" + json.dumps({"per": 1_000, "models": models}).encode())
    assert Prices.load(toml) == Prices.load(str(other)) == KNOWN


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("prices.toml", "per = 1\n[models.a\n", "prices.toml: .*line 2"),
        ("prices.json", '{"per": 1,\n "models": }', "prices.json: .*line 2"),
        ("prices.json", "[]", "prices.json: expected the fields per and models, got a list"),
        ("prices.json", "{}", "prices.json: models must be a table"),
        ("prices.toml", "pre = 1\n[models]\n", "prices.toml: pre: there is no such field"),
        ("prices.toml", "[models.a]\ninput = 1\n", "prices.toml: models.a: .*output"),
        ("prices.toml", "[models.a]\ninput = 1\noutput = -2\n", "prices.toml: models.a: output must be .* got -2"),
        ("prices.toml", '[models.a]\ninput = "1"\noutput = 2\n', "prices.toml: models.a: Expected `float`, got `str`"),
        ("prices.toml", "[models.a]\ninput = 1\noutput = 2\nout = 3\n", "prices.toml: models.a: .*out"),
        ("prices.toml", "per = 0\n[models]\n", "prices.toml: per must be a finite number > 0, got 0"),
        ("prices.yaml", "per: 1", "prices.yaml: its name must end with .toml or .json"),
    ],
    ids=[
        "broken-toml",
        "broken-json",
        "a-list",
        "no-models",
        "unknown-field",
        "no-output",
        "negative",
        "a-text",
        "unknown-price",
        "per-nothing",
        "another-format",
    ],
)
def test_a_bad_file_is_an_error_that_says_where(tmp_path: Path, name: str, text: str, message: str):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=message):
        Prices.load(tmp_path / name)


def test_a_file_that_cannot_be_read_is_an_error_that_names_it(tmp_path: Path):
    with pytest.raises(ConfigError, match="none.toml: it cannot be read: No such file"):
        Prices.load(tmp_path / "none.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="bytes.toml: it is not UTF-8"):
        Prices.load(tmp_path / "bytes.toml")


def test_a_name_with_a_point_and_without_quotes_is_told_from_an_unknown_field(tmp_path):
    path = tmp_path / "prices.toml"
    path.write_text("[models.gpt-4.1]\ninput = 1\noutput = 2\n")
    with pytest.raises(ConfigError, match=r'a name with a point in it needs quotes: \[models\."gpt-4'):
        Prices.load(path)
