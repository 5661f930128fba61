"""Presets: the servers that speak OpenAI's dialect, and what is theirs."""

from __future__ import annotations

import msgspec
import pytest

from rxllm.errors import ConfigError
from rxllm.policies import ACCOUNTING
from rxllm.providers.presets import ANY, PRESETS, Preset, preset_of


def test_the_presets_of_the_issue_are_there():
    wanted = "azure groq litellm llamacpp openai openrouter tgi together vllm"
    assert set(wanted.split()) <= PRESETS.keys()
    assert list(PRESETS)[1:] == sorted(list(PRESETS)[1:])


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS.keys())
def test_a_preset_is_made_of_what_there_is(preset):
    assert preset.accounting in ACCOUNTING
    address = preset.base_url or preset.example
    local = address.startswith("http://localhost:")
    assert local or address.startswith("https://")
    assert not address.endswith("/")
    assert "?" not in address
    assert local or preset.api_key_env is not None
    assert preset_of(preset, address) is preset


def test_a_preset_is_found_by_its_name_and_an_own_one_is_taken_as_it_is():
    assert preset_of("groq", None) is PRESETS["groq"]
    mine = Preset(base_url="http://mine/v1", api_key_env=None)
    assert preset_of(mine, None) is mine
    assert preset_of(None, None) is preset_of(None, "https://api.openai.com/v1") is PRESETS["openai"]
    assert preset_of(None, "http://localhost:1/v1") is ANY


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ConfigError, match=r"preset must be 'openai' or 'azure' or .* or 'vllm', got 'grok'"):
        preset_of("grok", None)
    with pytest.raises(ConfigError, match="preset must be"):
        preset_of(5, None)  # pyright: ignore[reportArgumentType]


def test_a_preset_without_an_address_says_what_one_looks_like():
    with pytest.raises(ConfigError, match=r"base_url: .* https://YOUR-RESOURCE.openai.azure.com/openai$"):
        preset_of("azure", None)
    assert preset_of("azure", "https://us.openai.azure.com/openai").query.startswith("api-version=")


@pytest.mark.parametrize("field", ["base_url", "api_key_env", "key_header", "key_prefix", "query"])
def test_what_a_preset_is_made_of_is_checked(field):
    with pytest.raises(ConfigError, match=field):
        Preset(**{field: 5})
    assert msgspec.structs.replace(ANY, **{field: "x"}) != ANY


@pytest.mark.parametrize(
    "fields",
    [
        {"base64": 1},
        {"deployments": "no"},
        {"stream_usage": None},
        {"headers": {"a b": "c"}},
        {"headers": {"a": "b\n"}},
    ],
    ids=repr,
)
def test_a_wrong_setting_of_a_preset_is_named(fields):
    with pytest.raises(ConfigError, match=next(iter(fields)).removesuffix("s")):
        Preset(**fields)
