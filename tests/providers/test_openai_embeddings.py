"""Embeddings and the list of models: requests as bytes, answers as vectors and names."""

from __future__ import annotations

import base64
import json
import math
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm import Reply, Request, Usage, errors
from rxllm.errors import ConfigError, DecodeError, InvalidRequestError, UnsupportedError
from rxllm.providers import OpenAIProvider
from rxllm.providers.presets import PRESETS

PROVIDER: OpenAIProvider[list[array[float]]] = OpenAIProvider("small", operation="embeddings")
MODELS: OpenAIProvider[list[str]] = OpenAIProvider("small", operation="models")


def answer(*vectors: Any, **fields: Any) -> bytes:
    data = [{"object": "embedding", "index": n, "embedding": vector} for n, vector in enumerate(vectors)]
    usage = {"prompt_tokens": 7, "total_tokens": 7}
    return json.dumps({"object": "list", "data": data, "model": "small-2026", "usage": usage, **fields}).encode()


def packed(*numbers: float) -> str:
    return base64.b64encode(array("f", numbers).tobytes()).decode()


def decode(body: bytes, inputs: int = 1) -> Reply[list[array[float]]]:
    return PROVIDER.decode(PROVIDER.wrap(["x"] * inputs), 200, {}, body)


def test_vectors_are_decoded_whichever_way_they_come():
    reply = decode(answer([1, 2.5], packed(-1, 0.5)), 2)
    assert reply.value == [array("f", [1, 2.5]), array("f", [-1, 0.5])]
    assert memoryview(reply.value[0]).format == "f"
    assert (reply.usage, reply.model, reply.text) == (Usage(input_tokens=7), "small-2026", "")


@given(st.lists(st.floats(width=32, allow_nan=False), max_size=9))
def test_both_ways_give_the_same_vector(numbers):
    as_text = [number if math.isfinite(number) else 0.0 for number in numbers]
    reply = decode(answer(as_text, packed(*as_text)), 2)
    assert reply.value[0] == reply.value[1] == array("f", as_text)


def test_vectors_are_in_the_order_of_the_inputs():
    def shuffled(*places: Any) -> bytes:
        data = [{"index": place, "embedding": [number]} for number, place in enumerate(places)]
        return json.dumps({"data": data}).encode()

    def order(*places: Any) -> list[float]:
        return [vector[0] for vector in decode(shuffled(*places), 3).value]

    assert order(2, 0, 1) == [1, 2, 0]
    assert order(None, None, None) == order(1, 0, 0) == [0, 1, 2]  # nothing is said, so it is as it comes


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        pytest.param(answer([1.0]), "1 vectors for 2 inputs", id="one-is-missing"),
        pytest.param(answer(), "0 vectors", id="none"),
        pytest.param(answer("!!!", "x"), "base64", id="no-base64"),
        pytest.param(answer(base64.b64encode(b"abc").decode(), [1]), "bytes", id="no-whole-number-of-floats"),
        pytest.param(answer(["a"], [1]), "Expected", id="no-numbers"),
        pytest.param(b"{}", "data", id="no-data"),
        pytest.param(b"[]", "Expected", id="a-list"),
    ],
)
def test_what_are_no_vectors_for_the_inputs_cannot_be_understood(body, reason):
    with pytest.raises(DecodeError, match=reason) as caught:
        decode(body, 2)
    assert caught.value.transient


def test_an_error_that_comes_as_if_all_were_well_is_that_error():
    with pytest.raises(errors.RateLimitedError, match="slow down"):
        decode(b'{"error": {"message": "slow down", "code": 429}}')
    with pytest.raises(errors.ServerError, match="slow down"):
        PROVIDER.decode(PROVIDER.wrap("x"), 500, {}, b'{"error": "slow down"}')


@pytest.mark.parametrize(
    ("given_input", "wanted"),
    [("a text", 1), (["one"], 1), (["one", "two"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2), (("one", "two"), 2)],
    ids=repr,
)
def test_there_is_a_vector_for_each_input(given_input, wanted):
    request = Request(body={"input": given_input}, operation="embeddings")
    assert len(PROVIDER.decode(request, 200, {}, answer(*[[1.0]] * wanted)).value) == wanted
    with pytest.raises(DecodeError, match=f"for {wanted} input"):
        PROVIDER.decode(request, 200, {}, answer(*[[1.0]] * (wanted + 1)))


# requests


def test_base64_is_asked_for_unless_the_request_or_the_preset_says_otherwise():
    def sent(provider: OpenAIProvider[Any], **body: Any) -> dict[str, Any]:
        call = provider.encode(Request(body=body, operation="embeddings"))
        assert (call.path, call.method) == ("/embeddings", "POST")
        return json.loads(call.body)

    common = {"model": "small", "input": "x"}
    assert sent(PROVIDER, input="x", dimensions=8) == {**common, "encoding_format": "base64", "dimensions": 8}
    assert sent(PROVIDER, input="x", encoding_format="float") == {**common, "encoding_format": "float"}
    without = OpenAIProvider("small", preset=PRESETS["litellm"])
    assert sent(without, input="x") == common
    assert sent(without, input="x", encoding_format="base64")["encoding_format"] == "base64"


def test_plain_items_are_texts_lists_of_them_and_tokens():
    for item in ("x", ["x", "y"], [1, 2], ("x",)):
        request = PROVIDER.wrap(item)
        assert (request.operation, list(request.body)) == ("embeddings", ["input"])
        assert len(request.body["input"]) == len(item)
    for item in (7, None, [], {"input": "x"}):
        with pytest.raises(InvalidRequestError, match=f"a text or a list of them, got {type(item).__name__}"):
            PROVIDER.wrap(item)


def test_embeddings_cost_their_input_and_next_to_no_output():
    provider: OpenAIProvider[Any] = OpenAIProvider("any", operation="embeddings")
    assert provider.cost(provider.wrap(["x" * 40, "y" * 40])) == {
        "requests": 1,
        "tokens": 21,
        "input_tokens": 20,
        "output_tokens": 1,
    }
    assert provider.cost(provider.wrap([5] * 100))["input_tokens"] == 100  # tokens need no estimate
    for _ in range(60):
        provider.learn(provider.wrap("x" * 400), Usage(input_tokens=200))
    assert provider.cost(provider.wrap("x" * 400))["input_tokens"] == pytest.approx(200, rel=0.1)


def test_neither_embeddings_nor_models_come_in_pieces():
    for provider in (PROVIDER, MODELS):
        item = "x" if provider is PROVIDER else None
        with pytest.raises(UnsupportedError, match="come in one piece"):
            provider.encode(provider.wrap(item), stream=True)


# models


def test_models_are_listed_by_their_names():
    call = MODELS.encode(MODELS.wrap(None))
    assert (call.path, call.method, call.body) == ("/models", "GET", b"")
    body = b'{"object":"list","data":[{"id":"small","owned_by":"us"},{"id":7},{"x":1},null]}'
    reply = MODELS.decode(MODELS.wrap(None), 200, {}, body)
    assert reply.value == ["small", "7"]
    assert reply.extra["data"][0]["owned_by"] == "us"
    assert MODELS.decode(MODELS.wrap(None), 200, {}, b'[{"id":"small"}]').value == ["small"]


@pytest.mark.parametrize("body", [b"{}", b"null", b"<html>", b'{"data":{}}', b""], ids=repr)
def test_what_is_no_list_of_models_cannot_be_understood(body):
    with pytest.raises(DecodeError, match="cannot be understood"):
        MODELS.decode(MODELS.wrap(None), 200, {}, body)


def test_models_take_no_body_and_no_prompt():
    with pytest.raises(InvalidRequestError, match="the body of a models request must be None, got dict"):
        MODELS.encode(Request(body={"x": 1}, operation="models"))
    with pytest.raises(InvalidRequestError, match="takes no prompt, got str"):
        MODELS.wrap("small")
    assert MODELS.cost(MODELS.wrap(None))["requests"] == 1


def test_an_operation_that_there_is_none_of_is_refused():
    with pytest.raises(ConfigError, match="operation must be 'chat' or"):
        OpenAIProvider("small", operation="images")
