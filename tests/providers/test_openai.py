"""OpenAI's dialect: requests as bytes, answers as replies or errors, and what a request will cost."""

from __future__ import annotations

import contextlib
import copy
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm import Reply, Request, ToolCall, Usage, chat, errors
from rxllm.errors import CallError, ConfigError, DecodeError, InvalidRequestError, UnsupportedError
from rxllm.policies import OPENAI
from rxllm.providers import OpenAIProvider
from rxllm.providers.presets import PRESETS

PROVIDER: OpenAIProvider[str] = OpenAIProvider("small")
REQUEST = chat("hi")


def whole() -> dict[str, Any]:
    """Return an answer as OpenAI gives it."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "small-2026",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 5,
            "total_tokens": 14,
            "prompt_tokens_details": {"cached_tokens": 4},
            "completion_tokens_details": {"reasoning_tokens": 2},
        },
        "system_fingerprint": "fp_1",
    }


def decode(answer: object, status: int = 200, **headers: str) -> Reply[str]:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return PROVIDER.decode(REQUEST, status, headers, body)


def changed(**fields: Any) -> dict[str, Any]:
    """Return an answer with other fields, of the message, the choice or the whole."""
    answer = whole()
    for name, value in fields.items():
        place = next((part for part in (answer["choices"][0]["message"], answer["choices"][0]) if name in part), answer)
        place[name] = value
    return answer


# good answers


def test_an_answer_is_decoded_and_kept():
    reply = decode(whole())
    assert (reply.text, reply.value, reply.finish_reason, reply.id, reply.model, reply.status) == (
        "Hello.",
        "Hello.",
        "stop",
        "chatcmpl-1",
        "small-2026",
        200,
    )
    assert reply.usage == Usage(input_tokens=9, output_tokens=5, cached_tokens=4, reasoning_tokens=2)
    assert reply.extra["system_fingerprint"] == "fp_1"


@pytest.mark.parametrize("status", [200, 201, 202, 203])
def test_any_2xx_with_an_answer_is_good(status):
    assert decode(whole(), status).text == "Hello."


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        pytest.param({"content": None}, "", id="null-content-of-a-tool-call"),
        pytest.param({"content": ""}, "", id="empty-content"),
        pytest.param(
            {"content": [{"type": "text", "text": "Hel"}, {"text": "lo."}, {"x": 1}, 7]}, "Hello.", id="parts"
        ),
        pytest.param({"id": 7}, "Hello.", id="id-is-a-number"),
        pytest.param({"id": {"x": 1}}, "Hello.", id="id-is-an-object"),
        pytest.param({"model": None}, "Hello.", id="no-model"),
        pytest.param({"finish_reason": "a_new_one"}, "Hello.", id="unknown-finish-reason"),
        pytest.param({"finish_reason": 3}, "Hello.", id="finish-reason-is-a-number"),
        pytest.param({"usage": None}, "Hello.", id="null-usage"),
        pytest.param({"usage": "many"}, "Hello.", id="usage-is-a-text"),
        pytest.param({"usage": {"prompt_tokens": "9", "completion_tokens": 5.0}}, "Hello.", id="usage-of-texts"),
        pytest.param({"usage": {"prompt_tokens": -9, "completion_tokens": 5}}, "Hello.", id="negative-usage"),
        pytest.param({"usage": {"prompt_tokens": None}}, "Hello.", id="usage-of-nothing"),
        pytest.param({"usage": {"prompt_tokens": 1, "prompt_tokens_details": 3}}, "Hello.", id="odd-details"),
        pytest.param({"role": 5, "created": "x", "object": None, "new": [1]}, "Hello.", id="fields-nobody-reads"),
    ],
)
def test_an_odd_answer_with_a_text_is_not_thrown_away(fields, text):
    reply = decode(changed(**fields))
    assert reply.text == text
    assert reply.usage.input_tokens >= 0
    assert reply.raw


def test_unknown_words_are_kept_as_they_are():
    assert decode(changed(finish_reason="a_new_one")).finish_reason == "a_new_one"


def test_what_is_readable_of_an_odd_usage_is_read():
    assert decode(changed(usage={"prompt_tokens": "9", "completion_tokens": 5.0})).usage == Usage(output_tokens=5)


def test_everything_but_the_text_may_be_missing():
    reply = decode({"choices": [{"message": {"content": "Hello."}}]})
    assert (reply.text, reply.usage, reply.id, reply.finish_reason) == ("Hello.", Usage(), None, None)


def test_tool_calls_thoughts_and_further_answers_are_read():
    calls = [
        {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}},
        {"id": "call_2", "type": "custom", "custom": {"name": "shell", "input": "ls"}},
        {"id": 3, "function": {"name": "time", "arguments": {"zone": "UTC"}}},
        {"function": None},
        None,
    ]
    answer = changed(content=None, tool_calls=None, reasoning_content=None)
    message = answer["choices"][0]["message"]
    message |= {"tool_calls": calls, "reasoning_content": "Hm."}
    answer["choices"].append({"index": 1, "message": {"content": "Another."}, "finish_reason": "stop"})
    reply = decode(answer)
    assert reply.tool_calls == (
        ToolCall(id="call_1", name="weather", arguments='{"city": "Oslo"}'),
        ToolCall(id="call_2", name="shell", arguments="ls"),
        ToolCall(id="3", name="time", arguments='{"zone":"UTC"}'),
        ToolCall(id="", name="", arguments=""),
    )
    assert (reply.text, reply.reasoning, reply.others) == ("", "Hm.", ("Another.",))
    message |= {"tool_calls": "x", "function_call": {"name": "old", "arguments": "{}"}}
    assert decode(answer).tool_calls == (ToolCall(id="", name="old", arguments="{}"),)


@pytest.mark.parametrize(
    "message",
    [
        pytest.param({"content": "", "reasoning": "Hm."}, id="reasoning"),
        pytest.param({"content": "", "reasoning_details": [{"type": "reasoning.text", "text": "Hm."}]}, id="details"),
        pytest.param({"content": "", "reasoning_details": [{"summary": "Hm."}, {"data": "x"}]}, id="summaries"),
        pytest.param({"content": [{"type": "thinking", "thinking": [{"text": "Hm."}]}]}, id="parts"),
        pytest.param({"content": [{"type": "text", "text": ""}], "reasoning": "Hm."}, id="parts-and-reasoning"),
    ],
)
def test_thoughts_are_read_in_whichever_field_a_server_tells_them(message):
    reply = decode({"choices": [{"message": message}]})
    assert (reply.reasoning, reply.text) == ("Hm.", "")


def test_a_message_goes_before_a_text_beside_it():
    for name in ("chatcmpl-1", 7):
        assert (
            decode(changed(id=name) | {"choices": [{"text": "o.", "message": {"content": "Hello."}}]}).text == "Hello."
        )


def test_an_odd_further_answer_costs_nobody_the_first():
    answer = whole()
    answer["choices"] += [{"message": {"content": 5}}, None, {"message": {"content": [{"text": "c"}]}}]
    assert (decode(answer).text, decode(answer).others) == ("Hello.", ("", "", "c"))


def test_a_completion_is_decoded():
    request = Request(body={"prompt": "hi"}, operation="completions")
    body = (
        b'{"id":"cmpl-1","choices":[{"text":"Hi.","finish_reason":"stop"},{"text":"Ho."}],"usage":{"prompt_tokens":1}}'
    )
    reply = PROVIDER.decode(request, 200, {}, body)
    assert (reply.text, reply.others, reply.finish_reason, reply.id) == ("Hi.", ("Ho.",), "stop", "cmpl-1")
    odd = PROVIDER.decode(request, 200, {}, body.replace(b'"cmpl-1"', b"7").replace(b'"stop"', b"3"))
    assert (odd.text, odd.others, odd.finish_reason, odd.id) == ("Hi.", ("Ho.",), "3", "7")
    assert odd.usage == reply.usage == Usage(input_tokens=1)


# what cannot be understood


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="list"),
        pytest.param(b'"text"', id="text"),
        pytest.param(b"{}", id="empty-object"),
        pytest.param(b'{"object":"list","data":null}', id="another-object"),
        pytest.param(json.dumps(whole()).encode()[:-40], id="truncated"),
        pytest.param(json.dumps(whole()).encode()[:90] + b"\xff\x00", id="garbled"),
        pytest.param(changed(choices=[]), id="no-choices"),
        pytest.param(changed(choices=None), id="null-choices"),
        pytest.param(changed(choices=[None]), id="a-null-choice"),
        pytest.param(changed(choices={"0": 1}), id="choices-of-another-shape"),
        pytest.param(changed(message=None), id="null-message"),
        pytest.param(changed(message="hi"), id="message-is-a-text"),
        pytest.param(changed(content=5), id="content-is-a-number"),
        pytest.param(b'{"choices":' + b"[" * 100_000, id="deep"),
        pytest.param(b'{"x":' * 100_000, id="deep-objects"),
        pytest.param(b"\xef\xbb\xbf{", id="byte-order-mark"),
    ],
)
def test_what_cannot_be_understood_is_a_transient_error_that_keeps_it(answer):
    with pytest.raises(DecodeError, match="cannot be understood") as caught:
        decode(answer, x_request_id="req_1")
    assert caught.value.transient
    assert caught.value.status == 200
    assert caught.value.__cause__ is None


def test_a_page_instead_of_an_answer_says_what_to_check():
    with pytest.raises(DecodeError, match="HTML page, not JSON: is this the address of the API"):
        decode(b"<html><title>Welcome</title></html>")


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        pytest.param({"error": {"message": "slow down", "code": 429}}, errors.RateLimitedError, "slow down", id="code"),
        pytest.param({"error": {"message": "broke off", "code": "odd"}}, errors.ServerError, "broke off", id="unknown"),
        pytest.param({"error": "broke off", "choices": []}, errors.ServerError, "broke off", id="text"),
        pytest.param(
            {"object": "error", "message": "no such field", "type": "BadRequestError", "code": 400},
            InvalidRequestError,
            "no such field",
            id="flat-as-vllm-has-it",
        ),
        pytest.param(
            changed(finish_reason="error", error={"message": "upstream is busy", "code": 503}),
            errors.ServerError,
            "upstream is busy",
            id="of-a-choice-as-openrouter-has-it",
        ),
    ],
)
def test_an_error_that_comes_as_if_all_were_well_is_the_error_of_its_code(answer, kind, words):
    if answer.get("choices"):
        answer["choices"][0]["error"] = answer.pop("error")
    with pytest.raises(kind, match=words):
        decode(answer)


# errors


@pytest.mark.parametrize(
    ("status", "fault", "kind"),
    [
        (429, {"code": "rate_limit_exceeded", "type": "rate_limit_error"}, errors.RateLimitedError),
        (429, {"code": "insufficient_quota", "type": "insufficient_quota"}, errors.BillingError),
        (400, {"code": "context_length_exceeded"}, errors.ContextOverflowError),
        (503, {"code": None}, errors.ServerError),
    ],
)
def test_an_answer_that_is_none_is_its_error(status, fault, kind):
    with pytest.raises(CallError) as caught:
        decode({"error": {"message": "said", **fault}}, status, **{"retry-after": "3"})
    assert type(caught.value) is kind
    assert caught.value.retry_after == 3
    assert "said" in str(caught.value)


# never anything but a CallError

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def check(body: bytes, status: int) -> None:
    with contextlib.suppress(CallError):
        reply = PROVIDER.decode(REQUEST, status, {}, body)
        assert isinstance(reply.text, str)
        assert isinstance(reply.usage.total_tokens, int)


@settings(max_examples=500)
@given(body=st.binary(max_size=200), status=st.sampled_from([200, 429, 500]))
def test_random_bytes_never_raise_anything_else(body, status):
    check(body, status)


@settings(max_examples=500)
@given(st.data())
def test_a_good_answer_with_bytes_changed_never_raises_anything_else(data):
    body = bytearray(json.dumps(whole()).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(body) - 1))
        length = data.draw(st.integers(0, 9))
        body[place : place + length] = data.draw(st.binary(max_size=9))
    check(bytes(body), data.draw(st.sampled_from([200, 400, 503])))


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in items for place in places(item, (*path, key)))]


@settings(max_examples=500)
@given(place=st.sampled_from(places(whole())[1:]), value=json_values, status=st.sampled_from([200, 429]))
def test_a_good_answer_with_any_part_of_another_type_never_raises_anything_else(place, value, status):
    answer = whole()
    part: Any = answer
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    check(json.dumps(answer).encode(), status)


# requests


def test_the_model_is_added_unless_the_request_names_one():
    assert json.loads(PROVIDER.encode(chat("hi", max_tokens=5)).body) == {
        "model": "small",
        "messages": [{"role": "user", "content": "hi"}],
        "max_tokens": 5,
    }
    assert json.loads(PROVIDER.encode(chat("hi", model="big")).body)["model"] == "big"
    assert PROVIDER.encode(REQUEST).path == "/chat/completions"


def test_encoding_changes_nothing_and_is_the_same_each_time():
    body = {"messages": [{"role": "user", "content": "hi"}], "stop": ["a"], "seed": None}
    before = copy.deepcopy(body)
    request = Request(body=body)
    assert PROVIDER.encode(request) == PROVIDER.encode(request)
    assert body == before
    assert list(body) == list(before)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        pytest.param({"x": object()}, "cannot be sent as JSON", id="an-object"),
        pytest.param({"x": 1j}, "cannot be sent as JSON", id="a-complex-number"),
        pytest.param({("a", 1): 2}, "cannot be sent as JSON", id="a-key-that-is-a-tuple"),
        pytest.param({"x": "\ud800"}, "cannot be sent as JSON", id="half-a-character"),
        pytest.param({"temperature": float("nan")}, "body['temperature'] is no finite number", id="nan"),
        pytest.param({"x": [{"y": float("inf")}]}, "body['x'][0]['y'] is no finite number", id="infinity"),
        pytest.param([], "must be a dict, got list", id="a-list"),
        pytest.param("hi", "must be a dict, got str", id="a-text"),
        pytest.param(None, "must be a dict, got NoneType", id="nothing"),
    ],
)
def test_a_body_that_is_no_json_is_refused_and_says_why(body, words):
    with pytest.raises(InvalidRequestError) as caught:
        PROVIDER.encode(Request(body=body))
    assert words in str(caught.value)
    assert not caught.value.transient


def test_a_body_that_contains_itself_is_refused():
    body: dict[str, Any] = {}
    body["x"] = body
    with pytest.raises(InvalidRequestError, match="cannot be sent as JSON"):
        PROVIDER.encode(Request(body=body))


def test_null_and_the_word_null_may_be_sent():
    sent = json.loads(PROVIDER.encode(Request(body={"seed": None, "x": ["null", 1.5]})).body)
    assert sent == {"model": "small", "seed": None, "x": ["null", 1.5]}


def test_an_operation_of_others_and_streaming_are_unsupported():
    with pytest.raises(UnsupportedError, match="operation must be one of chat, completions, .*, got 'images'"):
        PROVIDER.encode(Request(body={}, operation="images"))
    with pytest.raises(UnsupportedError, match="stream: leave it out of the body; call\\(stream=True\\)"):
        PROVIDER.encode(chat("hi", stream=True))
    with pytest.raises(UnsupportedError, match="stream: leave it out of the body"):
        PROVIDER.encode(chat("hi", stream=False), stream=True)
    assert json.loads(PROVIDER.encode(chat("hi", stream=False)).body)["stream"] is False


def test_a_streamed_answer_is_asked_for_with_its_usage_unless_the_request_or_the_preset_says_otherwise():
    def sent(provider: OpenAIProvider[str] = PROVIDER, operation: str = "chat", **body: Any) -> dict[str, Any]:
        call = provider.encode(Request(body=body, operation=operation), stream=True)
        assert call.accept == "text/event-stream"
        return json.loads(call.body)

    asked = {"model": "small", "stream": True, "stream_options": {"include_usage": True}}
    assert sent(messages=[]) == {**asked, "messages": []}
    assert sent(operation="completions", prompt="x") == {**asked, "prompt": "x"}
    assert sent(stream=True, messages=[]) == {**asked, "messages": []}
    assert sent(stream_options={"x": 1})["stream_options"] == {"x": 1}
    assert sent(OpenAIProvider("small", preset=PRESETS["mistral"])) == {"model": "small", "stream": True}
    assert PROVIDER.encode(REQUEST).accept == "application/json"


def test_each_operation_has_its_path():
    paths = {name: PROVIDER.encode(Request(body={}, operation=name)).path for name in ("completions", "responses")}
    assert paths == {"completions": "/completions", "responses": "/responses"}


def test_a_prompt_is_a_request_and_nothing_else_is():
    assert PROVIDER.wrap("hi").body == {"messages": [{"role": "user", "content": "hi"}]}
    completion = OpenAIProvider("small", operation="completions").wrap("hi")
    assert (completion.operation, completion.body) == ("completions", {"prompt": "hi"})
    for item in (7, None, b"hi", {"messages": []}):
        with pytest.raises(InvalidRequestError, match=f"got {type(item).__name__}"):
            PROVIDER.wrap(item)


@pytest.mark.parametrize("model", ["", None, 5])
def test_a_model_is_a_text(model):
    with pytest.raises(ConfigError, match="model"):
        OpenAIProvider(model)


# costs


@pytest.mark.parametrize(
    ("body", "inputs", "outputs"),
    [
        ({"messages": [{"role": "user", "content": "x" * 40}]}, 10, 512),
        ({"messages": [{"content": "x" * 40}, {"content": "y" * 40}], "max_tokens": 9}, 20, 9),
        ({"messages": [{"content": "x" * 40}], "max_tokens": 9, "max_completion_tokens": 7}, 10, 7),
        ({"messages": [{"content": "x" * 40}], "max_tokens": 9, "n": 3}, 10, 27),
        ({"messages": [{"content": [{"text": "x" * 40}, {"image_url": "y" * 99}]}]}, 10, 512),
        ({"messages": [{"content": None, "tool_calls": []}, "x" * 40, 7]}, 11, 512),
        ({"messages": [[[[[[[[["x" * 40]]]]]]]]]}, 1, 512),
        ({"messages": ()}, 1, 512),
        ({}, 1, 512),
    ],
)
def test_a_request_costs_a_token_for_four_characters_and_what_it_allows(body, inputs, outputs):
    assert OpenAIProvider("any").cost(Request(body=body)) == {
        "requests": 1,
        "tokens": inputs + outputs,
        "input_tokens": inputs,
        "output_tokens": outputs,
    }


@pytest.mark.parametrize(
    ("body", "inputs", "outputs"),
    [
        ({"prompt": "x" * 40, "max_tokens": 5}, 10, 5),
        ({"prompt": ["x" * 40, "y" * 40], "max_tokens": 5, "n": 3}, 20, 30),
        ({"prompt": [1, 2, 3], "max_tokens": 5}, 3, 5),
    ],
)
def test_a_completion_costs_an_answer_for_each_of_its_prompts(body, inputs, outputs):
    costs = OpenAIProvider("any").cost(Request(body=body, operation="completions"))
    assert (costs["input_tokens"], costs["output_tokens"]) == (inputs, outputs)


def test_costs_are_calibrated_by_what_replies_used():
    provider = OpenAIProvider("any")
    request = Request(body={"messages": [{"content": "x" * 400}], "max_tokens": 1000})
    provider.learn(request, Usage(input_tokens=7, output_tokens=7))  # nobody has asked for a cost: nothing to learn for
    assert provider.cost(request)["tokens"] == 100 + 1000
    for _ in range(60):
        provider.learn(request, Usage(input_tokens=130, output_tokens=40))
    cost = provider.cost(request)
    assert cost["input_tokens"] == pytest.approx(130, rel=0.05)
    assert 36 <= cost["output_tokens"] <= 48
    assert provider.tokens.errors().replies == 60


def test_a_server_that_reserves_max_tokens_is_paid_that():
    provider = OpenAIProvider("any", accounting=OPENAI)
    request = Request(body={"messages": [{"content": "x" * 400}], "max_tokens": 1000, "n": 2})
    provider.cost(request)
    for _ in range(60):
        provider.learn(request, Usage(input_tokens=100, output_tokens=40))
    assert provider.cost(request)["output_tokens"] == 2000


@given(
    body=st.dictionaries(st.sampled_from(["messages", "max_tokens", "max_completion_tokens", "n"]), json_values)
    | json_values
)
def test_the_cost_of_anything_is_a_number_above_zero(body):
    cost = PROVIDER.cost(Request(body=body))
    assert all(math.isfinite(amount) and amount > 0 for amount in cost.values())


# counting tokens oneself


def words(request: Request) -> int:
    return sum(len(message["content"].split()) for message in request.body["messages"])


def test_tokens_that_the_user_counts_are_the_input_of_the_cost():
    provider = OpenAIProvider("any", count_tokens=words)
    assert provider.cost(chat("one two three four", max_tokens=9)) == {
        "requests": 1,
        "tokens": 13,
        "input_tokens": 4,
        "output_tokens": 9,
    }
    assert provider.cost(chat("", max_tokens=9))["input_tokens"] == 1  # an empty prompt is one too


def test_learning_calibrates_the_output_only_when_the_user_counts():
    provider = OpenAIProvider("any", count_tokens=words)
    request = chat("one two three four", max_tokens=1000)
    provider.cost(request)
    for _ in range(60):
        provider.learn(request, Usage(input_tokens=5, output_tokens=40))
    cost = provider.cost(request)
    assert cost["input_tokens"] == 4
    assert 36 <= cost["output_tokens"] <= 48
    found = provider.tokens.errors()
    assert found.replies == 60
    assert (found.input_error, found.input_bias) == pytest.approx((0.2, -0.2))  # what the function is wrong by


def test_the_accounting_of_the_server_holds_for_tokens_that_the_user_counts():
    provider = OpenAIProvider("any", accounting=OPENAI, count_tokens=lambda _request: 10.5)
    cost = provider.cost(chat("hi", max_tokens=100, n=2))
    assert (cost["input_tokens"], cost["output_tokens"]) == (10.5, 200)


async def later(request: Request) -> int:
    return words(request)


@pytest.mark.parametrize(
    ("count", "words"),
    [
        pytest.param(lambda _r: -1, "what count_tokens returns must be a finite number >= 0, got -1", id="negative"),
        pytest.param(lambda _r: math.nan, "what count_tokens returns must be a finite number >= 0, got nan", id="nan"),
        pytest.param(lambda _r: math.inf, "what count_tokens returns must be a finite number >= 0, got inf", id="inf"),
        pytest.param(lambda _r: "9", "what count_tokens returns must be a finite number >= 0, got '9'", id="a-text"),
        pytest.param(lambda _r: None, "what count_tokens returns must be a finite number >= 0, got None", id="nothing"),
        pytest.param(lambda _r: True, "what count_tokens returns must be a finite number >= 0, got True", id="a-bool"),
        pytest.param(lambda r: r.body["prompt"], "count_tokens raised KeyError: 'prompt'", id="it-raises"),
        pytest.param(later, "count_tokens must be a plain function, and it is async", id="async"),
    ],
)
def test_a_count_that_is_none_fails_the_cost_and_names_the_function(count, words):
    provider = OpenAIProvider("any", count_tokens=count)
    with pytest.raises(ConfigError) as caught:
        provider.cost(chat("hi"))
    assert str(caught.value) == words
    assert (caught.value.__context__, caught.value.halts) == (None, False)


def test_a_count_that_fails_after_the_answer_costs_no_answer():
    answers = iter([4])
    provider = OpenAIProvider("any", count_tokens=lambda _request: next(answers))
    request = chat("one two three four")
    provider.cost(request)
    provider.learn(request, Usage(input_tokens=4, output_tokens=7))
    assert provider.tokens.errors().replies == 0


@pytest.mark.parametrize("count", [5, "tiktoken"])
def test_a_count_is_a_function(count):
    with pytest.raises(ConfigError, match=f"count_tokens must be callable or None, got {count!r}"):
        OpenAIProvider("any", count_tokens=count)
