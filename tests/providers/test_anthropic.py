"""Anthropic's dialect: requests as bytes, answers as replies or errors, in one piece and streamed, and their costs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm import Reply, Request, Usage, chat, errors
from rxllm.errors import (
    CallError,
    ConfigError,
    DecodeError,
    InvalidRequestError,
    OverloadedError,
    UnsupportedError,
    ValidationError,
)
from rxllm.messages import Chunk, ToolCall
from rxllm.policies import ANTHROPIC
from rxllm.providers.anthropic import AnthropicProvider, accepted
from rxllm.providers.anthropic_stream import MessageAssembler
from rxllm.providers.base import Event
from rxllm.providers.output import Output
from rxllm.transports.sse import SseParser

PROVIDER: AnthropicProvider[Any] = AnthropicProvider("small")
REQUEST = chat("hi")
TEXT = {"type": "text", "text": "Hello."}
USED = {"input_tokens": 9, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 300, "output_tokens": 5}
RICH = [
    {"type": "thinking", "thinking": "They want the weather.", "signature": "Eq8B"},
    {"type": "redacted_thinking", "data": "sealed"},
    {"type": "text", "text": "Let me see.", "citations": [{"type": "char_location", "cited_text": "see"}]},
    {
        "type": "tool_use",
        "id": "toolu_1",
        "name": "weather",
        "input": {"city": "Oslo", "days": 2},
        "caller": {"type": "direct"},
    },
    {"type": "tool_use", "id": "toolu_2", "name": "now", "input": {}},
    {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "Oslo"}},
    {"type": "text", "text": " And more: ✓"},
]


def message(*content: Any, **fields: Any) -> dict[str, Any]:
    """Return an answer as Anthropic gives it."""
    return {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "small-2026",
        "content": list(content) or [TEXT],
        "stop_reason": "end_turn",
        "stop_sequence": None,
        "usage": {**USED, "service_tier": "standard"},
        **fields,
    }


def decode(
    answer: object, status: int = 200, provider: AnthropicProvider[Any] = PROVIDER, **headers: str
) -> Reply[Any]:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return provider.decode(REQUEST, status, headers, body)


def sent(body: Any, *, stream: bool = False, provider: AnthropicProvider[Any] = PROVIDER) -> dict[str, Any]:
    request = body if isinstance(body, Request) else Request(body=body)
    return json.loads(provider.encode(request, stream=stream).body)


def seen(reply: Reply[Any]) -> dict[str, Any]:
    """Return a reply without its bytes, which may be written in more ways than one."""
    return {**msgspec.structs.asdict(reply), "raw": None}


def nested(depth: int) -> dict[str, Any]:
    """Return a body that is so deep, and may have a number in it that is none."""
    body: dict[str, Any] = {"value": None}
    for _ in range(depth):
        body = {"messages": body}
    return body


# requests


def test_a_chat_is_sent_as_a_message_with_its_system_apart_and_the_model_and_a_limit_added():
    call = PROVIDER.encode(chat("hi", system="Be short.", temperature=0.5))
    assert (call.path, call.method, call.accept) == ("/messages", "POST", "application/json")
    assert json.loads(call.body) == {
        "model": "small",
        "max_tokens": 4096,
        "system": "Be short.",
        "messages": [{"role": "user", "content": "hi"}],
        "temperature": 0.5,
    }


def test_what_the_request_says_goes_before_what_would_be_added():
    assert sent(chat("hi", max_tokens=7, model="large")) == {
        "model": "large",
        "max_tokens": 7,
        "messages": [{"role": "user", "content": "hi"}],
    }
    assert sent(chat("hi"), provider=AnthropicProvider("small", max_tokens=11))["max_tokens"] == 11


def test_a_streamed_request_says_so_and_asks_for_events():
    call = PROVIDER.encode(REQUEST, stream=True)
    assert call.accept == "text/event-stream"
    assert json.loads(call.body)["stream"] is True


SYSTEM = {"role": "system", "content": "One."}
USER = {"role": "user", "content": "hi"}
BLOCK = {"type": "text", "text": "Two.", "cache_control": {"type": "ephemeral"}}


@pytest.mark.parametrize(
    ("body", "system", "messages"),
    [
        pytest.param({"messages": [SYSTEM, USER]}, "One.", [USER], id="one-becomes-a-text"),
        pytest.param(
            {"messages": [SYSTEM, {"role": "system", "content": [BLOCK]}, USER]},
            [{"type": "text", "text": "One."}, BLOCK],
            [USER],
            id="several-become-blocks-as-they-are",
        ),
        pytest.param(
            {"system": "Zero.", "messages": [SYSTEM, USER]},
            [{"type": "text", "text": "Zero."}, {"type": "text", "text": "One."}],
            [USER],
            id="they-come-after-that-of-the-body",
        ),
        pytest.param({"messages": [USER, SYSTEM]}, None, [USER, SYSTEM], id="a-later-one-stays-where-it-is"),
        pytest.param(
            {"messages": [{**SYSTEM, "name": "x"}, USER]},
            None,
            [{**SYSTEM, "name": "x"}, USER],
            id="nothing-is-dropped",
        ),
        pytest.param({"messages": [SYSTEM]}, "One.", [], id="nothing-but-it"),
        pytest.param({"messages": "hi"}, None, "hi", id="no-messages-are-the-servers-to-refuse"),
        pytest.param({"messages": []}, None, [], id="none"),
        pytest.param(
            {"messages": [{"role": "system", "content": 5}]}, None, [{"role": "system", "content": 5}], id="odd"
        ),
    ],
)
def test_system_messages_at_the_beginning_become_system(body, system, messages):
    before = copy.deepcopy(body)
    fields = sent(body)
    assert (fields.get("system"), fields["messages"]) == (system, messages)
    assert body == before


def test_parts_tools_and_fields_that_nobody_knows_are_sent_as_they_are():
    image = {"type": "image", "source": {"type": "url", "url": "https://example.org/cat.png"}}
    body = {
        "messages": [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}],
        "tools": [{"name": "weather", "input_schema": {"type": "object"}, "strict": True}],
        "thinking": {"type": "enabled", "budget_tokens": 1024},
        "future": [1, None],
    }
    assert sent(body) == {"model": "small", "max_tokens": 4096, **body}


@pytest.mark.parametrize(
    ("request_", "error", "text"),
    [
        (Request(body={}, operation="embeddings"), UnsupportedError, "operation must be chat, got 'embeddings'"),
        (Request(body="hi"), InvalidRequestError, "the body of a chat request must be a dict, got str"),
        (Request(body={"stream": True}), UnsupportedError, "call\\(stream=True\\)"),
        (
            Request(body={"temperature": float("nan")}),
            InvalidRequestError,
            "body\\['temperature'\\] is no finite number",
        ),
        (Request(body={"messages": [{"content": object()}]}), InvalidRequestError, "cannot be sent as JSON"),
        (Request(body=nested(600)), InvalidRequestError, "cannot be sent as JSON: maximum recursion depth exceeded"),
    ],
)
def test_a_request_that_cannot_be_sent_says_why(request_, error, text):
    with pytest.raises(error, match=text):
        PROVIDER.encode(request_)


@pytest.mark.parametrize(
    "wrong", [{"model": ""}, {"model": None}, {"max_tokens": 0}, {"max_tokens": 1.5}, {"count_tokens": 5}]
)
def test_wrong_settings_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        AnthropicProvider(**{"model": "small", **wrong})


def test_a_prompt_is_a_chat_and_other_items_are_nothing():
    assert PROVIDER.wrap("hi").body == chat("hi").body
    with pytest.raises(InvalidRequestError, match="got int"):
        PROVIDER.wrap(5)


# answers


def test_an_answer_is_decoded_and_kept():
    reply = decode(message())
    assert (reply.text, reply.value, reply.finish_reason, reply.id, reply.model, reply.status) == (
        "Hello.",
        "Hello.",
        "end_turn",
        "msg_1",
        "small-2026",
        200,
    )
    assert reply.extra["usage"]["service_tier"] == "standard"


def test_input_is_all_that_was_read_whether_from_a_cache_or_not():
    details = {"output_tokens_details": {"thinking_tokens": 3}}
    reply = decode(message(usage={**USED, **details}))
    assert reply.usage == Usage(
        input_tokens=329, output_tokens=5, cached_tokens=300, cache_write_tokens=20, reasoning_tokens=3
    )
    used = ANTHROPIC.used(reply.usage.input_tokens, reply.usage.output_tokens, cached=reply.usage.cached_tokens)
    assert used["input_tokens"] == 29  # what was written to a cache counts, what was read from one does not


def test_thoughts_texts_and_calls_of_many_blocks_are_told_apart():
    reply = decode(message(*RICH, stop_reason="tool_use"))
    assert (reply.text, reply.reasoning, reply.finish_reason) == (
        "Let me see. And more: ✓",
        "They want the weather.",
        "tool_use",
    )
    assert [(call.id, call.name, call.decoded()) for call in reply.tool_calls] == [
        ("toolu_1", "weather", {"city": "Oslo", "days": 2}),
        ("toolu_2", "now", {}),
    ]


@pytest.mark.parametrize(
    "reason",
    [
        "max_tokens",
        "stop_sequence",
        "tool_use",
        "pause_turn",
        "refusal",
        "model_context_window_exceeded",
        "of the future",
    ],
)
def test_the_reason_to_stop_is_passed_on_as_it_is(reason):
    assert decode(message(stop_reason=reason)).finish_reason == reason


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        pytest.param({"usage": None}, "Hello.", id="no-usage"),
        pytest.param({"usage": {"input_tokens": "9", "output_tokens": -1}}, "Hello.", id="usage-that-is-none"),
        pytest.param({"usage": [1]}, "Hello.", id="usage-of-another-kind"),
        pytest.param({"id": 5, "model": 6, "stop_reason": 7}, "Hello.", id="numbers-for-names"),
        pytest.param({"content": []}, "", id="no-content"),
        pytest.param({"content": [{"type": "text", "text": None}, TEXT]}, "Hello.", id="a-text-that-is-null"),
        pytest.param({"content": ["x", TEXT, {"type": 5, "text": 5}]}, "Hello.", id="blocks-of-another-kind"),
        pytest.param({"content": [{"type": "tool_use", "id": 3, "name": None}, TEXT]}, "Hello.", id="half-a-call"),
    ],
)
def test_an_answer_that_is_a_little_off_is_taken_because_it_is_paid_for(changes, text):
    reply = decode(message(**changes))
    assert reply.text == text
    assert reply.usage.output_tokens in {0, 5}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b"{}",
        b'{"content": null}',
        b'{"content": "Hello."}',
        b"<html>nginx</html>",
        b"\xff\xfe",
        b"[" * 5000,
    ],
)
def test_an_answer_without_content_is_none_and_may_be_asked_for_again(body):
    with pytest.raises(DecodeError) as caught:
        decode(body)
    assert caught.value.transient


def fault(kind: str, text: str = "No.", **details: Any) -> dict[str, Any]:
    error = {"type": kind, "message": text, **({"details": details} if details else {})}
    return {"type": "error", "error": error, "request_id": "req_1"}


@pytest.mark.parametrize(
    ("status", "kind", "error", "transient"),
    [
        (400, "invalid_request_error", errors.InvalidRequestError, False),
        (401, "authentication_error", errors.AuthError, False),
        (402, "billing_error", errors.BillingError, False),
        (403, "permission_error", errors.AuthError, False),
        (404, "not_found_error", errors.NotFoundError, False),
        (413, "request_too_large", errors.InvalidRequestError, False),
        (429, "rate_limit_error", errors.RateLimitedError, True),
        (500, "api_error", errors.ServerError, True),
        (529, "overloaded_error", errors.OverloadedError, True),
    ],
)
def test_errors_are_ours_by_status_and_in_a_stream_by_type(status, kind, error, transient):
    with pytest.raises(CallError) as caught:
        decode(fault(kind), status)
    assert (type(caught.value), caught.value.transient, caught.value.status) == (error, transient, status)
    said = fault(kind)
    for item in (event(**said), Event(json.dumps(said).encode()), Event(json.dumps(said["error"]).encode(), "error")):
        with pytest.raises(CallError, match="No.") as caught:
            assembler().feed(item)
        assert (type(caught.value), caught.value.transient) == (error, transient)
    with pytest.raises(error):
        decode(fault(kind), 200)


def test_a_429_tells_when_to_come_back():
    with pytest.raises(errors.RateLimitedError) as caught:
        decode(fault("rate_limit_error"), 429, **{"retry-after": "7", "request-id": "req_2"})
    assert (caught.value.retry_after, caught.value.request_id, caught.value.refusal) == (7.0, "req_2", True)


# streams


def assembler(provider: AnthropicProvider[Any] = PROVIDER) -> MessageAssembler[Any]:
    return provider.assembler(REQUEST, 200, {"request-id": "req_9"})


def event(**fields: Any) -> Event:
    return Event(json.dumps(fields).encode(), fields["type"])


def streamed(answer: dict[str, Any], cut: Any = lambda text: [text[:2], text[2:]]) -> list[Event]:
    """Return the events that say the same as an answer."""
    further = {key: value for key, value in answer.items() if key == "context_management"}  # it comes at the end only
    begun = {key: value for key, value in answer.items() if key not in further}
    begun |= {"content": [], "stop_reason": None, "stop_sequence": None}
    begun["usage"] = {**answer["usage"], "output_tokens": 1}
    events = [event(type="message_start", message=begun), event(type="ping")]
    for index, block in enumerate(answer["content"]):
        kind = block["type"]
        hollow, deltas = dict(block), []
        if kind == "text":
            hollow["text"] = ""
            deltas += [{"type": "text_delta", "text": part} for part in cut(block["text"])]
            if "citations" in block:
                hollow["citations"] = []
                deltas += [{"type": "citations_delta", "citation": citation} for citation in block["citations"]]
        elif kind == "thinking":
            hollow |= {"thinking": "", "signature": ""}
            deltas += [{"type": "thinking_delta", "thinking": part} for part in cut(block["thinking"])]
            deltas.append({"type": "signature_delta", "signature": block["signature"]})
        elif kind in {"tool_use", "server_tool_use"}:
            hollow["input"] = {}
            deltas += [
                {"type": "input_json_delta", "partial_json": part} for part in ("", *cut(json.dumps(block["input"])))
            ]
        events.append(event(type="content_block_start", index=index, content_block=hollow))
        events += [event(type="content_block_delta", index=index, delta=delta) for delta in deltas]
        events.append(event(type="content_block_stop", index=index))
    delta = {"stop_reason": answer["stop_reason"], "stop_sequence": answer["stop_sequence"]}
    if "stop_details" in answer:
        delta["stop_details"] = answer["stop_details"]
    usage = {"output_tokens": answer["usage"]["output_tokens"], "input_tokens": None}
    return [*events, event(type="message_delta", delta=delta, usage=usage, **further), event(type="message_stop")]


def fed(
    events: Iterable[Event], provider: AnthropicProvider[Any] = PROVIDER
) -> tuple[MessageAssembler[Any], list[Chunk]]:
    taking = assembler(provider)
    return taking, [chunk for item in events if (chunk := taking.feed(item)) is not None]


def test_a_streamed_answer_is_the_same_as_one_in_one_piece():
    answer = message(*RICH, stop_reason="tool_use", context_management={"applied_edits": []})
    taking, chunks = fed(streamed(answer))
    reply = taking.finish()
    assert taking.done
    assert seen(reply) == seen(decode(answer))
    assert reply.extra == answer
    assert "".join(chunk.text for chunk in chunks) == reply.text == taking.text
    assert "".join(chunk.reasoning for chunk in chunks) == reply.reasoning
    assert [(chunk.finish_reason, chunk.usage) for chunk in chunks if chunk.usage] == [("tool_use", reply.usage)]
    assert [(chunk.extra["type"], chunk.extra.get("delta", {}).get("type")) for chunk in chunks if not chunk.text] == [
        ("content_block_delta", "thinking_delta"),
        ("content_block_delta", "thinking_delta"),
        ("content_block_start", None),  # of what is sealed
        ("content_block_delta", "citations_delta"),
        *3 * [("content_block_start", None), *3 * [("content_block_delta", "input_json_delta")]],  # of the calls
        ("message_delta", None),
    ]


RECORDED = b"""event: message_start
data: {"type":"message_start","message":{"id":"msg_1","type":"message","content":[],"usage":{"input_tokens":25}}}

event: content_block_start
data: {"type":"content_block_start","index":0,"content_block":{"type":"text","text":""}}

event: ping
data: {"type": "ping"}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"Hel"}}

event: content_block_delta
data: {"type":"content_block_delta","index":0,"delta":{"type":"text_delta","text":"lo \xe2\x9c\x93"}}

event: content_block_stop
data: {"type":"content_block_stop","index":0}

event: message_delta
data: {"type":"message_delta","delta":{"stop_reason":"end_turn","stop_sequence":null},"usage":{"output_tokens":15}}

event: message_stop
data: {"type":"message_stop"}

"""


@pytest.mark.parametrize("line", [b"\n", b"\r\n", b"\r"], ids=["lf", "crlf", "cr"])
def test_it_does_not_matter_where_the_bytes_of_a_stream_are_torn(line):
    data = RECORDED.replace(b"\n", line)
    for place in range(len(data)):
        parser = SseParser()
        taking, _ = fed([*parser.feed(data[:place]), *parser.feed(data[place:]), *parser.feed(b"")])
        assert taking.done
        reply = taking.finish()
        assert (reply.text, reply.usage, reply.finish_reason) == (
            "Hello ✓",
            Usage(input_tokens=25, output_tokens=15),
            "end_turn",
        )


@pytest.mark.parametrize("missing", range(8))
def test_a_stream_that_ends_early_is_not_taken_for_an_answer(missing):
    events = SseParser().feed(RECORDED)
    assert len(events) == 8
    taking, _ = fed(events[:missing])
    with pytest.raises(DecodeError, match="stopped before its end") as caught:
        taking.finish()
    assert caught.value.transient
    assert caught.value.request_id == "req_9"
    assert not taking.done
    assert taking.text == "Hello ✓"[: {0: 0, 1: 0, 2: 0, 3: 0, 4: 3}.get(missing, 7)]


def test_a_message_that_stops_without_a_reason_is_not_complete():
    taking, _ = fed([item for item in SseParser().feed(RECORDED) if item.name != "message_delta"])
    assert taking.done
    with pytest.raises(DecodeError, match="stop_reason"):
        taking.finish()


def test_the_usage_is_known_as_soon_as_the_server_tells_it():
    events = streamed(message())
    taking, _ = fed(events[:1])
    assert taking.usage == Usage(input_tokens=329, output_tokens=1, cached_tokens=300, cache_write_tokens=20)
    taking, _ = fed(events)
    assert taking.usage == Usage(input_tokens=329, output_tokens=5, cached_tokens=300, cache_write_tokens=20)
    assert assembler().usage is None


def test_events_of_no_known_type_are_left_out_and_pieces_of_no_known_kind_are_kept():
    events = streamed(message({"type": "compaction", "content": None}, TEXT))
    piece = event(type="content_block_delta", index=0, delta={"type": "compaction_delta", "content": "Short"})
    more = event(type="content_block_delta", index=0, delta={"type": "compaction_delta", "content": "er."})
    odd = [event(type="of_the_future", delta="no object", index="no number"), Event(b'{"type": 5}'), Event(b"{}")]
    odd.append(event(type="of_the_future", index=0, delta={"type": "text_delta", "text": "not of this block"}))
    taking, _ = fed([*odd, *events[:3], piece, *odd, more, *events[3:], Event(b"[DONE]")])
    assert taking.finish().extra == message({"type": "compaction", "content": "Shorter."}, TEXT)


def test_a_call_that_the_answer_ends_in_the_middle_of_is_told_as_far_as_it_came():
    block = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {}}
    events = streamed(message(block, stop_reason="max_tokens"), cut=lambda _: ['{"city": "Os', "lo"])
    reply = fed(events)[0].finish()
    assert reply.tool_calls == (ToolCall(id="toolu_1", name="weather", arguments='{"city": "Oslo'),)
    with pytest.raises(ValidationError):
        reply.tool_calls[0].decoded()


def test_an_event_that_says_its_type_only_in_its_name_is_understood():
    events = [
        Event(
            json.dumps({key: value for key, value in json.loads(item.data).items() if key != "type"}).encode(),
            item.name,
        )
        for item in streamed(message())
    ]
    assert fed(events)[0].finish().text == "Hello."


def test_a_block_may_begin_with_something_in_it_and_before_those_that_go_before_it():
    events = streamed(
        message({"type": "thinking", "thinking": "Hm.", "signature": "x"}, {**TEXT, "citations": [{"n": 2}]})
    )
    text = {"type": "text", "text": "Oh. ", "citations": [{"n": 1}]}
    begun = [
        event(type="content_block_start", index=1, content_block=text),
        event(type="content_block_start", index=0, content_block={"type": "thinking", "thinking": "So. "}),
    ]
    deltas = [item for item in events if item.name == "content_block_delta"]
    taking, chunks = fed([events[0], *begun, *deltas, *events[-2:]])
    reply = taking.finish()
    assert (reply.text, reply.reasoning) == ("Oh. Hello.", "So. Hm.")
    assert [block["type"] for block in reply.extra["content"]] == ["thinking", "text"]
    assert reply.extra["content"][1]["citations"] == [{"n": 1}, {"n": 2}]
    assert "".join(chunk.text for chunk in chunks) == reply.text == taking.text
    assert "".join(chunk.reasoning for chunk in chunks) == reply.reasoning


@pytest.mark.parametrize(
    "item",
    [
        pytest.param(
            event(type="content_block_delta", index=9, delta={"type": "text_delta", "text": "x"}), id="no-block"
        ),
        pytest.param(
            event(type="content_block_delta", index=9, delta={"type": "thinking_delta"}), id="no-block-to-think-in"
        ),
        pytest.param(event(type="content_block_start", index=0, content_block=TEXT), id="a-block-again"),
        pytest.param(event(type="content_block_start", index="1", content_block=TEXT), id="a-block-without-a-number"),
        pytest.param(event(type="content_block_start", index=1), id="a-block-that-is-none"),
        pytest.param(event(type="message_start", message=message()), id="a-message-again"),
        pytest.param(Event(b'{"type": "content_block_delta", "index": 0, "del'), id="half-of-it"),
        pytest.param(Event(b"5"), id="a-number"),
        pytest.param(Event(b""), id="nothing"),
    ],
)
def test_a_garbled_event_ends_the_try_and_another_may_do_better(item):
    taking, _ = fed(streamed(message())[:4])
    with pytest.raises(DecodeError) as caught:
        taking.feed(item)
    assert caught.value.transient
    assert caught.value.__context__ is None


def test_an_end_of_a_message_that_has_not_begun_is_garbled():
    with pytest.raises(DecodeError, match="has not begun"):
        assembler().feed(event(type="message_delta", delta={"stop_reason": "end_turn"}))


def test_being_overloaded_is_a_refusal_until_something_has_been_written():
    overloaded = event(**fault("overloaded_error", "Overloaded"))
    for events, refusal in ((streamed(message())[:1], True), (streamed(message())[:4], False)):
        taking, _ = fed(events)
        with pytest.raises(OverloadedError) as caught:
            taking.feed(msgspec.structs.replace(overloaded, name="error"))
        assert (caught.value.refusal, caught.value.transient) == (refusal, True)


NAMES = st.text(st.characters(codec="utf-8"), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(NAMES, inner, max_size=3),
    max_leaves=4,
)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=4)
BLOCKS = st.one_of(
    st.builds(lambda text: {"type": "text", "text": text}, NAMES),
    st.builds(
        lambda text, told: {"type": "text", "text": text, "citations": told}, NAMES, st.lists(OBJECTS, min_size=1)
    ),
    st.builds(lambda text, mark: {"type": "thinking", "thinking": text, "signature": mark}, NAMES, NAMES),
    st.builds(lambda name, data: {"type": "tool_use", "id": name, "name": name, "input": data}, NAMES, OBJECTS),
    st.builds(lambda data: {"type": "web_search_tool_result", "content": data}, VALUES),
)
COUNTS = st.none() | st.integers(0, 2**40)


@settings(max_examples=60)
@given(
    blocks=st.lists(BLOCKS, max_size=5),
    usage=st.fixed_dictionaries(dict.fromkeys(USED, COUNTS)),
    width=st.integers(1, 4),
    reason=NAMES,
)
def test_whatever_is_answered_a_stream_and_one_piece_give_the_same_reply(blocks, usage, width, reason):
    answer = message(TEXT, stop_reason=reason, usage={**usage, "output_tokens": usage["output_tokens"] or 1})
    answer["content"] = blocks
    events = streamed(answer, lambda text: [text[at : at + width] for at in range(0, len(text), width)])
    taking, chunks = fed(events)
    reply, whole = taking.finish(), decode(answer)
    assert [(call.id, call.name, call.decoded()) for call in reply.tool_calls] == [
        (call.id, call.name, call.decoded()) for call in whole.tool_calls
    ]
    assert {**seen(reply), "tool_calls": ()} == {**seen(whole), "tool_calls": ()}
    assert reply.extra == answer
    assert "".join(chunk.text for chunk in chunks) == whole.text


def is_ours(action: Callable[[], object]) -> bool:
    """Say whether an action gives a reply or an error of ours, in one line; let all else through."""
    try:
        return isinstance(action(), Reply)
    except CallError as error:
        return "\n" not in error.message


PIECES = st.sampled_from(streamed(message(*RICH)))
WRECKS = st.one_of(
    st.builds(Event, st.binary(max_size=40), st.sampled_from(["", "error", "message_start"])),
    st.builds(lambda value: Event(json.dumps(value).encode()), VALUES),
    PIECES,
    st.builds(lambda item, at: msgspec.structs.replace(item, data=item.data[:at]), PIECES, st.integers(0, 200)),
    st.builds(
        lambda item, key, value: msgspec.structs.replace(
            item, data=json.dumps({**json.loads(item.data), key: value}).encode()
        ),
        PIECES,
        st.sampled_from(["type", "index", "delta", "message", "content_block", "usage", "error"]),
        VALUES | st.fixed_dictionaries({"type": NAMES | st.just("text_delta"), "text": VALUES, "usage": VALUES}),
    ),
)


@settings(max_examples=60)
@given(st.lists(WRECKS, max_size=12))
def test_whatever_comes_in_a_stream_the_only_errors_are_ours(events):
    taking = assembler()

    def take() -> Reply[Any]:
        for item in events:
            taking.feed(item)
        return taking.finish()

    assert is_ours(take)
    assert isinstance(taking.text, str)
    assert isinstance(taking.usage, Usage | None)


@settings(max_examples=60)
@given(
    st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()), st.sampled_from([200, 201, 400, 529])
)
def test_whatever_is_answered_the_only_errors_are_ours(body, status):
    assert is_ours(lambda: decode(body, status))


# values


class Person(msgspec.Struct):
    name: str
    age: int


PEOPLE: AnthropicProvider[Any] = AnthropicProvider("small", output=Output(Person))
OPEN: AnthropicProvider[Any] = AnthropicProvider("small", output=Output(dict[str, int]))


def test_a_type_is_asked_for_as_a_format_beside_the_rest_of_that_setting():
    config = sent(chat("hi", output_config={"effort": "low"}), provider=PEOPLE)["output_config"]
    assert config["effort"] == "low"
    assert config["format"]["type"] == "json_schema"
    assert config["format"]["schema"]["required"] == ["name", "age"]
    assert config["format"]["schema"]["additionalProperties"] is False
    own = {"type": "json_schema", "schema": {"type": "object"}}
    assert sent(chat("hi", output_config={"format": own}), provider=PEOPLE)["output_config"] == {"format": own}


def test_an_answer_of_a_type_has_a_value_of_it_streamed_or_not():
    answer = message({"type": "text", "text": '{"name": "Ada", "age": 36}'})
    assert decode(answer, provider=PEOPLE).value == Person("Ada", 36)
    assert fed(streamed(answer), PEOPLE)[0].finish().value == Person("Ada", 36)


@pytest.mark.parametrize(
    ("text", "fields", "reason"),
    [
        ('{"name": "Ada"}', {}, "age"),
        ('{"name": "Ada", "a', {"stop_reason": "max_tokens"}, "cut off"),
        ("", {"stop_reason": "refusal", "stop_details": {"explanation": "It is not nice."}}, "It is not nice."),
        ("", {"stop_reason": "refusal", "stop_details": None}, "withheld"),
    ],
)
def test_an_answer_that_is_none_of_the_type_says_why_and_what_it_cost(text, fields, reason):
    answer = message({"type": "text", "text": text}, **fields)
    for attempt in (lambda: decode(answer, provider=PEOPLE), fed(streamed(answer), PEOPLE)[0].finish):
        with pytest.raises(ValidationError, match=reason) as caught:
            attempt()
        assert caught.value.usage.output_tokens == 5
        assert caught.value.reply.text == text


def test_a_type_without_a_strict_schema_is_asked_for_as_the_input_of_a_tool():
    fields = sent(chat("hi", tools=[{"name": "weather"}]), provider=OPEN)
    assert "output_config" not in fields
    name = fields["tool_choice"]["name"]
    assert fields["tool_choice"]["type"] == "tool"
    assert [tool["name"] for tool in fields["tools"]] == ["weather", name]
    use = {"type": "tool_use", "id": "toolu_1", "name": name, "input": {"value": {"a": 1}}}
    assert decode(message(use), provider=OPEN).value == {"a": 1}
    assert fed(streamed(message(use)), OPEN)[0].finish().value == {"a": 1}
    assert decode(message({"type": "text", "text": '{"a": 2}'}), provider=OPEN).value == {"a": 2}
    assert "tools" not in sent(chat("hi", tool_choice={"type": "none"}), provider=OPEN)


def test_bounds_that_the_dialect_refuses_are_told_in_words():
    schema = {
        "type": "object",
        "properties": {
            "pattern": {"type": "string", "pattern": "^a", "maxLength": 3},
            "list": {"type": "array", "minItems": 2, "items": {"anyOf": [{"type": "integer", "minimum": 1}]}},
            "some": {"type": "array", "minItems": 1, "description": "At least one."},
            "fixed": {"enum": [{"minimum": 1}]},
        },
        "$defs": {"minimum": {"type": "number", "multipleOf": 2, "description": "Even."}},
    }
    before = copy.deepcopy(schema)
    assert accepted(schema) == {
        "type": "object",
        "properties": {
            "pattern": {"type": "string", "description": "(pattern: ^a, maxLength: 3)"},
            "list": {
                "type": "array",
                "items": {"anyOf": [{"type": "integer", "description": "(minimum: 1)"}]},
                "description": "(minItems: 2)",
            },
            "some": {"type": "array", "minItems": 1, "description": "At least one."},
            "fixed": {"enum": [{"minimum": 1}]},
        },
        "$defs": {"minimum": {"type": "number", "description": "Even. (multipleOf: 2)"}},
    }
    assert schema == before


# costs


def test_a_request_costs_what_its_texts_and_its_limit_say():
    provider: AnthropicProvider[Any] = AnthropicProvider("small")
    cost = provider.cost(chat("x" * 300, system="y" * 100, max_tokens=50))
    assert cost == {"requests": 1.0, "tokens": 150.0, "input_tokens": 100.0, "output_tokens": 50.0}
    lifted = Request(body={"system": [{"type": "text", "text": "y" * 100}], "messages": [{"content": "x" * 300}]})
    assert provider.cost(lifted)["input_tokens"] == 100.0


def test_replies_teach_what_requests_cost_and_a_count_of_ones_own_is_taken_as_it_is():
    provider: AnthropicProvider[Any] = AnthropicProvider("small")
    request = chat("x" * 400, max_tokens=1000)
    provider.learn(request, Usage(input_tokens=9, output_tokens=9))  # nobody has asked, so it is not worth it
    assert provider.tokens.errors().replies == 0
    provider.cost(request)
    for _ in range(20):
        provider.learn(request, Usage(input_tokens=200, output_tokens=10))
    cost = provider.cost(request)
    assert cost["input_tokens"] == pytest.approx(200, rel=0.1)
    assert cost["output_tokens"] < 20
    assert AnthropicProvider("small", count_tokens=lambda _: 7).cost(request)["input_tokens"] == 7.0


@pytest.mark.parametrize(
    "body", [None, "hi", {}, {"messages": 5}, {"messages": [5, {"content": 5}], "max_tokens": "x"}]
)
def test_anything_has_a_cost_because_the_server_is_to_say_what_is_wrong(body):
    assert PROVIDER.cost(Request(body=body))["requests"] == 1.0


def test_a_message_may_be_asked_for_again():
    assert PROVIDER.repeatable(REQUEST)
