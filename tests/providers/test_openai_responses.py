"""Responses: their answers as replies, in one piece and streamed."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm import Reply, Request, ToolCall, Usage, errors
from rxllm.errors import CallError, DecodeError
from rxllm.messages import Chunk
from rxllm.providers import OpenAIProvider
from rxllm.providers.base import Event

PROVIDER: OpenAIProvider[str] = OpenAIProvider("small", operation="responses")
REQUEST = PROVIDER.wrap("hi")
USAGE = {
    "input_tokens": 9,
    "input_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 2},
    "output_tokens": 5,
    "output_tokens_details": {"reasoning_tokens": 2},
    "total_tokens": 14,
}


def message(*texts: str) -> dict[str, Any]:
    parts = [{"type": "output_text", "text": text, "annotations": []} for text in texts]
    return {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant", "content": parts}


def response(*output: dict[str, Any], **fields: Any) -> dict[str, Any]:
    whole = {"id": "resp_1", "object": "response", "status": "completed", "error": None, "model": "small-2026"}
    return {**whole, "output": list(output), "usage": USAGE, "incomplete_details": None, **fields}


def decode(answer: object, status: int = 200) -> Reply[str]:
    return PROVIDER.decode(REQUEST, status, {}, json.dumps(answer).encode())


def event(kind: str, **fields: Any) -> Event:
    return Event(json.dumps({"type": kind, "sequence_number": 1, **fields}).encode(), kind)


def text(delta: str) -> Event:
    place = {"item_id": "msg_1", "output_index": 0, "content_index": 0, "logprobs": [], "obfuscation": "x"}
    return event("response.output_text.delta", delta=delta, **place)


def read(*events: Event) -> tuple[Reply[str], list[Chunk]]:
    assembler = PROVIDER.assembler(REQUEST, 200, {})
    chunks = [chunk for one in events if (chunk := assembler.feed(one)) is not None]
    return assembler.finish(), chunks


def test_a_response_is_decoded_and_kept():
    reply = decode(response(message("Hel", "lo."), tools=[]))
    assert (reply.text, reply.value, reply.id, reply.model, reply.finish_reason, reply.status) == (
        "Hello.",
        "Hello.",
        "resp_1",
        "small-2026",
        "completed",
        200,
    )
    assert reply.usage == Usage(
        input_tokens=9, output_tokens=5, cached_tokens=4, reasoning_tokens=2, cache_write_tokens=2
    )
    assert reply.extra["tools"] == []


def test_thoughts_and_tool_calls_are_read():
    reply = decode(
        response(
            {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}, {"text": "So."}]},
            {"type": "reasoning", "summary": [{"text": "no"}], "content": [{"type": "reasoning_text", "text": "Yes."}]},
            {"type": "function_call", "id": "fc_1", "call_id": "call_1", "name": "weather", "arguments": "{}"},
            {"type": "custom_tool_call", "call_id": "call_2", "name": "shell", "input": "ls"},
            {"type": "web_search_call", "id": "ws_1"},
        )
    )
    assert reply.reasoning == "Hm.\n\nSo.\n\nYes."
    assert reply.tool_calls == (
        ToolCall(id="call_1", name="weather", arguments="{}"),
        ToolCall(id="call_2", name="shell", arguments="ls"),
    )
    assert reply.text == ""


@pytest.mark.parametrize(
    ("fields", "finish_reason"),
    [
        ({"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}, "max_output_tokens"),
        ({"status": "incomplete", "incomplete_details": None}, "incomplete"),
        ({"status": "queued"}, "queued"),
        ({"status": "in_progress", "usage": None}, "in_progress"),
        ({"status": None}, "completed"),
    ],
)
def test_the_finish_reason_is_why_a_response_is_incomplete_or_its_status(fields, finish_reason):
    assert decode(response(message("a"), **fields)).finish_reason == finish_reason


def test_a_response_that_failed_is_the_error_that_it_tells():
    with pytest.raises(errors.RateLimitedError, match="slow down"):
        decode(response(status="failed", error={"code": "rate_limit_exceeded", "message": "slow down"}))
    with pytest.raises(errors.ServerError, match="has failed"):
        decode(response(status="failed"))
    with pytest.raises(errors.CancelledError, match="cancelled on the server"):
        decode(response(status="cancelled"))


@pytest.mark.parametrize("answer", [None, [], "x", {}, {"output": None}, {"output": "x"}, {"choices": []}], ids=repr)
def test_what_is_no_response_cannot_be_understood(answer):
    with pytest.raises(DecodeError, match="cannot be understood"):
        decode(answer)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["type", "content", "text", "summary", "name", "status", "output", "error", "usage"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)


@settings(max_examples=100)
@given(output=json_values, usage=json_values, status=json_values)
def test_odd_parts_of_a_response_never_raise_anything_but_a_call_error(output, usage, status):
    answer = {"output": output, "usage": usage, "status": status}
    with contextlib.suppress(CallError):
        assert isinstance(decode(answer).text, str)


# streams


def test_a_streamed_response_is_that_of_its_last_event():
    whole = response(message("Hello."), service_tier="default")
    begun = {**whole, "status": "in_progress", "output": [], "usage": None}
    reply, chunks = read(
        event("response.created", response=begun),
        event("response.in_progress", response=begun),
        event("response.output_item.added", output_index=0, item={"type": "reasoning"}),
        event("response.reasoning_summary_text.delta", delta="Hm."),
        event("response.output_item.added", output_index=1, item={"type": "message"}),
        event("response.content_part.added", part={"type": "output_text", "text": ""}),
        text("Hel"),
        text("lo."),
        text(""),
        event("response.function_call_arguments.delta", delta="{}"),
        event("response.image_generation_call.partial_image", partial_image_b64="x"),
        event("response.brand_new.delta", delta={"x": 1}),
        event("response.output_text.done", text="Hello."),
        event("response.completed", response=whole),
    )
    assert reply.extra == whole
    assert reply.text == "Hello."
    assert [(chunk.text, chunk.reasoning, chunk.finish_reason) for chunk in chunks] == [
        ("", "Hm.", None),
        ("Hel", "", None),
        ("lo.", "", None),
        ("", "", None),
        ("", "", None),
        ("", "", None),
        ("", "", "completed"),
    ]
    assert chunks[3].extra["delta"] == "{}"
    assert chunks[-1].usage == reply.usage


@pytest.mark.parametrize("named", ["in-the-data", "by-the-event"])
def test_the_type_of_an_event_is_in_its_data_or_its_name(named):
    kind = "response.output_text.delta"
    one = (
        Event(b'{"delta":"Hi","type":"%b"}' % kind.encode())
        if named == "in-the-data"
        else Event(b'{"delta":"Hi"}', kind)
    )
    assembler = PROVIDER.assembler(REQUEST, 200, {})
    assembler.feed(one)
    assert assembler.text == "Hi"


@pytest.mark.parametrize("kind", ["completed", "incomplete"])
def test_what_is_told_so_far_can_be_asked_for(kind):
    assembler = PROVIDER.assembler(REQUEST, 200, {})
    assembler.feed(text("Hel"))
    assert (assembler.text, assembler.usage, assembler.done) == ("Hel", None, False)
    assembler.feed(event(f"response.{kind}", response=response(message("Hel"), status=kind)))
    assert assembler.done
    assert assembler.usage == decode(response()).usage


def test_a_response_that_breaks_off_is_a_transient_error():
    for events in ([], [text("Hel")], [text("Hel"), Event(b"[DONE]")]):
        with pytest.raises(DecodeError, match="broke off") as caught:
            read(*events)
        assert caught.value.transient


def test_an_output_that_only_the_events_before_have_is_taken_from_them():
    reply, _ = read(
        text("Hello."),
        event("response.output_item.done", output_index=0, item=message("Hello.")),
        event("response.completed", response=response()),
    )
    assert reply.text == "Hello."


@pytest.mark.parametrize(
    "last",
    [
        pytest.param(event("error", code="rate_limit_exceeded", message="slow down", param=None), id="event"),
        pytest.param(event("error", error={"code": "rate_limit_exceeded", "message": "slow down"}), id="nested"),
        pytest.param(Event(b'{"error":{"code":"rate_limit_exceeded","message":"slow down"}}'), id="without-a-type"),
        pytest.param(
            event(
                "response.failed",
                response=response(status="failed", error={"code": "rate_limit_exceeded", "message": "slow down"}),
            ),
            id="failed",
        ),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
def test_an_error_in_the_stream_is_raised_at_once_and_costs_a_try_if_the_answer_has_begun(last, begun):
    assembler = PROVIDER.assembler(REQUEST, 200, {})
    if begun:
        assembler.feed(text("Hel"))
    with pytest.raises(errors.RateLimitedError, match="slow down") as caught:
        assembler.feed(last)
    assert caught.value.refusal is not begun


@pytest.mark.parametrize("data", [b"{", b"[]", b"\xff", b"7"], ids=repr)
def test_a_garbled_piece_is_a_transient_error(data):
    with pytest.raises(DecodeError, match="cannot be understood"):
        PROVIDER.assembler(REQUEST, 200, {}).feed(Event(data))


# requests


def test_a_streamed_response_asks_for_no_usage_as_it_tells_it_anyway():
    call = PROVIDER.encode(REQUEST, stream=True)
    assert (call.path, call.accept) == ("/responses", "text/event-stream")
    assert json.loads(call.body) == {"model": "small", "stream": True, "input": "hi"}


@pytest.mark.parametrize(
    ("body", "repeatable"),
    [
        ({"input": "hi"}, True),
        ({"input": "hi", "store": True, "previous_response_id": "resp_0"}, True),
        ({"input": "hi", "background": False}, True),
        ({"input": "hi", "background": True}, False),
        ({"input": "hi", "conversation": "conv_1"}, False),
    ],
)
def test_only_what_would_be_there_twice_is_not_repeated(body, repeatable):
    assert PROVIDER.repeatable(Request(body=body, operation="responses")) is repeatable
    assert PROVIDER.repeatable(Request(body=body))  # a chat has no such thing


def test_the_cost_of_a_response_is_that_of_its_input_and_instructions():
    body = {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "x" * 40}]}, {"output": "y" * 40}],
        "instructions": "z" * 40,
        "max_output_tokens": 7,
    }
    costs = PROVIDER.cost(Request(body=body, operation="responses"))
    assert (costs["input_tokens"], costs["output_tokens"]) == (30, 7)
