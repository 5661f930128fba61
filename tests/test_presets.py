"""Resources of well-known APIs: what a call reserves, what it is settled to, and a real server that is content."""

from __future__ import annotations

import types

import pytest

from rxllm import presets
from rxllm.errors import ConfigError
from rxllm.runner import Call, Runner
from rxllm.testing import ServerQuota, SimulatedProvider

NOT_GIVEN = object()  # the vendor's client has such a sign for what is not given


def create(*, messages=None, model=None, max_tokens=NOT_GIVEN, n=NOT_GIVEN, **rest):
    """Take what the vendor's client takes."""


def ask(**given):
    return Call(create, (), given)


def said(text, role="user"):
    return [{"role": role, "content": text}]


def by_name(resources):
    return {resource.name: resource for resource in resources}


CHAT = by_name(presets.openai_chat_resources(requests_per_minute=500, tokens_per_minute=10_001, model_max_len=4096))
TOKENS = CHAT["tokens_per_minute"]


def test_the_resources_of_a_chat_are_its_limits_and_a_bit_less_for_tokens():
    assert {name: (row.quota, row.time_window_seconds) for name, row in CHAT.items()} == {
        "requests_per_minute": (500, 60),
        "tokens_per_minute": (9500, 60),
    }
    assert CHAT["requests_per_minute"].reserved(ask(messages=said("Hello"))) == 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param({"messages": said("a b c", role="x")}, 4096, id="without-a-maximum-all-that-the-model-takes"),
        pytest.param(
            {"messages": said("a b c", role="x"), "max_tokens": 10}, 8 + 10, id="two-for-each-word-and-the-answer"
        ),
        pytest.param({"messages": said("a b c", role="x"), "max_tokens": 0}, 8, id="a-maximum-of-zero"),
        pytest.param({"messages": said("a b c", role="x"), "max_tokens": 10, "n": 3}, 54, id="each-answer"),
        pytest.param({"messages": said("a b c", role="x"), "max_tokens": 10, "n": 0}, 0, id="no-answers"),
        pytest.param({"messages": said("a"), "max_completion_tokens": 7}, 4 + 7, id="the-other-name-of-the-maximum"),
        pytest.param({"messages": said("a"), "max_tokens": 9999}, 4096, id="no-more-than-the-model-takes"),
        pytest.param({"messages": said("天地玄黃" * 10), "max_tokens": 0}, 2 + 40, id="a-text-without-spaces"),
        pytest.param(
            {
                "messages": said(
                    [{"type": "text", "text": "a b"}, {"type": "image_url", "image_url": {"url": "data:" * 99}}]
                ),
                "max_tokens": 0,
            },
            2 + 2 + 4 + 3,
            id="parts-without-the-picture",
        ),
        pytest.param({"max_tokens": 5, "tools": [{"name": "f"}]}, 2 + 5, id="tools"),
    ],
)
def test_a_chat_reserves(given, expected):
    assert TOKENS.reserved(ask(**given)) == expected


@pytest.mark.parametrize(
    "result",
    [
        pytest.param({"usage": {"total_tokens": 12}}, id="a-dict"),
        pytest.param(types.SimpleNamespace(usage=types.SimpleNamespace(total_tokens=12)), id="an-object"),
    ],
)
def test_a_chat_is_settled_to_the_usage_of(result):
    assert TOKENS.used(ask(), result) == 12


@pytest.mark.parametrize("result", [{}, {"usage": None}, {"usage": {}}, "text", None], ids=repr)
def test_a_result_without_usage_is_an_error_and_so_a_retry(result):
    with pytest.raises(ValueError, match="the result has no usage.total_tokens"):
        TOKENS.used(ask(), result)


def test_anthropic_has_limits_of_input_and_of_output():
    rows = by_name(presets.anthropic_resources(50, 40_000, 8_000))
    assert {name: row.quota for name, row in rows.items()} == {
        "requests_per_minute": 50,
        "input_tokens_per_minute": 38_000,
        "output_tokens_per_minute": 7_600,
    }
    call = ask(system="a b", messages=said("c d", role="x"), max_tokens=300)
    assert rows["input_tokens_per_minute"].reserved(call) == 4 + 4 + 2
    assert rows["output_tokens_per_minute"].reserved(call) == 300
    usage = {"input_tokens": 10, "output_tokens": 7, "cache_creation_input_tokens": 5, "cache_read_input_tokens": 900}
    assert rows["input_tokens_per_minute"].used(call, {"usage": usage}) == 15
    assert rows["input_tokens_per_minute"].used(call, {"usage": {"input_tokens": 10}}) == 10
    assert rows["output_tokens_per_minute"].used(call, {"usage": usage}) == 7
    with pytest.raises(ValueError, match="usage.output_tokens"):
        rows["output_tokens_per_minute"].used(call, {"usage": {"input_tokens": 1}})


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param("a b c", 6, id="a-text"),
        pytest.param(["a b", "c"], 6, id="texts"),
        pytest.param([1, 2, 3], 3, id="tokens"),
        pytest.param([[1, 2], [3]], 3, id="lists-of-tokens"),
    ],
)
def test_embeddings_reserve(given, expected):
    tokens = by_name(presets.openai_embeddings_resources(500, 10_000))["tokens_per_minute"]
    assert tokens.reserved(ask(input=given)) == expected
    assert tokens.used(ask(), {"usage": {"total_tokens": 4}}) == 4


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: presets.openai_chat_resources(0, 1, 1), "requests_per_minute"),
        (lambda: presets.openai_chat_resources(1, "1", 1), "tokens_per_minute"),
        (lambda: presets.openai_chat_resources(1, 1, 0.5), "model_max_len"),
        (lambda: presets.anthropic_resources(1, 0, 1), "input_tokens_per_minute"),
        (lambda: presets.anthropic_resources(1, 1, 0), "output_tokens_per_minute"),
        (lambda: presets.openai_embeddings_resources(1, 0), "tokens_per_minute"),
    ],
    ids=["requests", "tokens", "length", "input", "output", "embeddings"],
)
def test_a_limit_that_is_none_is_named(make, field):
    with pytest.raises(ConfigError, match=f"^{field} must be"):
        make()


def test_the_vendors_own_client_runs_through_its_resources_without_a_refusal():
    openai = pytest.importorskip("openai")
    faults = {"500": 0.1}
    quota = ServerQuota(2_000, per=60)
    with (
        SimulatedProvider(tokens=quota, charge="settled", faults=faults, latency=0.005, seed=3).start() as provider,
        openai.OpenAI(api_key="any", base_url=provider.url, max_retries=0) as client,
    ):
        resources = presets.openai_chat_resources(500, 2_000, model_max_len=600)
        runner = Runner(client.chat.completions.create, resources, max_concurrent=8, backoff_base=0.001)
        for n in range(12):
            runner.schedule(model="any", messages=said(f"Say {n}."), max_tokens=100)
        results, exceptions = runner.run()
        statistics = provider.statistics()
    assert all(result.choices[0].message.content for result in results)
    assert {type(error) for row in exceptions for error in row} == {openai.InternalServerError}
    assert set(statistics.statuses) == {200, 500}
    assert statistics.statuses[200] == 12
