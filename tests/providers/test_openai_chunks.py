"""Streamed chat completions and completions: what the pieces make is what would have come in one piece."""

from __future__ import annotations

import contextlib
import json
from itertools import chain, zip_longest
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm import Reply, Request, ToolCall, Usage, chat, errors
from rxllm.errors import CallError, DecodeError
from rxllm.messages import Chunk
from rxllm.providers import OpenAIProvider
from rxllm.providers.base import Event

PROVIDER: OpenAIProvider[str] = OpenAIProvider("small")
HEAD = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "small-2026"}
USAGE = {
    "prompt_tokens": 9,
    "completion_tokens": 5,
    "total_tokens": 14,
    "prompt_tokens_details": {"cached_tokens": 4, "cache_write_tokens": 1},
    "completion_tokens_details": {"reasoning_tokens": 2},
}
DONE = Event(b"[DONE]")


def event(**fields: Any) -> Event:
    return Event(json.dumps(fields).encode())


def piece(
    delta: dict[str, Any] | None = None, *, index: int = 0, finish_reason: str | None = None, **more: Any
) -> Event:
    choice = {"index": index, "delta": delta or {}, "logprobs": None, "finish_reason": finish_reason, **more}
    return event(**HEAD, choices=[choice])


def read(*events: Event, request: Request | None = None, provider: Any = PROVIDER) -> tuple[Reply[Any], list[Chunk]]:
    assembler = provider.assembler(request or chat("hi"), 200, {})
    chunks = [chunk for one in events if (chunk := assembler.feed(one)) is not None]
    return assembler.finish(), chunks


def test_a_plain_answer_is_put_together():
    reply, chunks = read(
        piece({"role": "assistant", "content": "", "refusal": None}),
        piece({"content": "Hel"}),
        piece({"content": "lo."}),
        piece(finish_reason="stop"),
        event(**HEAD, choices=[], usage=USAGE, system_fingerprint="fp_1"),
        DONE,
    )
    assert (reply.text, reply.value, reply.finish_reason, reply.id, reply.model, reply.status) == (
        "Hello.",
        "Hello.",
        "stop",
        "chatcmpl-1",
        "small-2026",
        200,
    )
    assert reply.usage == Usage(
        input_tokens=9, output_tokens=5, cached_tokens=4, reasoning_tokens=2, cache_write_tokens=1
    )
    assert reply.extra == {
        **HEAD,
        "object": "chat.completion",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello.", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": USAGE,
        "system_fingerprint": "fp_1",
    }
    assert [(chunk.text, chunk.finish_reason, chunk.usage is None) for chunk in chunks] == [
        ("Hel", None, True),
        ("lo.", None, True),
        ("", "stop", True),
        ("", None, False),
    ]
    assert chunks[0].extra["choices"][0]["delta"] == {"content": "Hel"}


def test_what_is_told_so_far_can_be_asked_for():
    assembler = PROVIDER.assembler(chat("hi"), 200, {})
    assert (assembler.text, assembler.usage, assembler.done) == ("", None, False)
    for one in (piece({"role": "assistant", "content": "Hel"}), piece({"content": "lo"})):
        assembler.feed(one)
    assert assembler.text == "Hello"
    assembler.feed(event(**HEAD, choices=[], usage=USAGE))
    assert assembler.usage is not None
    assert assembler.usage.output_tokens == 5
    assert not assembler.done
    assembler.feed(DONE)
    assert assembler.done


def test_tool_calls_are_put_together_by_their_index():
    def call(index: int, **fields: Any) -> Event:
        return piece({"tool_calls": [{"index": index, **fields}]})

    reply, chunks = read(
        piece({"role": "assistant", "content": None}),
        call(0, id="call_1", type="function", function={"name": "weather", "arguments": ""}),
        call(0, function={"arguments": '{"city":'}),
        call(1, id="call_2", type="function", function={"name": "time", "arguments": "{}"}),
        call(0, function={"arguments": ' "Oslo"}'}),
        piece(finish_reason="tool_calls"),
        DONE,
    )
    assert reply.tool_calls == (
        ToolCall(id="call_1", name="weather", arguments='{"city": "Oslo"}'),
        ToolCall(id="call_2", name="time", arguments="{}"),
    )
    assert reply.text == ""
    message = reply.extra["choices"][0]["message"]
    assert message["content"] is None
    assert message["tool_calls"][0] == {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    assert len(chunks) == 5  # a viewer sees that something comes, and what
    assert chunks[1].extra["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"] == '{"city":'


@pytest.mark.parametrize(
    "pieces",
    [
        pytest.param(
            [
                [{"id": "a", "function": {"name": "f", "arguments": "{}"}}],
                [{"id": "b", "function": {"name": "g", "arguments": "[]"}}],
            ],
            id="without-an-index",
        ),
        pytest.param(
            [
                [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}}],
                [{"index": 0, "id": "b", "function": {"name": "g", "arguments": "[]"}}],
            ],
            id="all-of-index-0",
        ),
        pytest.param(
            [
                [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{"}}],
                [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "}"}}],
                [{"index": 1, "id": "b", "function": {"name": "g", "arguments": "["}}],
                [{"index": 1, "id": "", "function": {"name": "", "arguments": "]"}}],
            ],
            id="name-and-id-said-again",
        ),
        pytest.param(
            [
                [{"index": 0, "id": "a", "function": {"name": "f", "arguments": "{"}}],
                [{"index": 0, "id": "other", "function": {"arguments": "}"}}],
                [{"index": 1, "id": "b", "function": {"name": "g", "arguments": "[]"}}],
            ],
            id="an-id-that-changes",
        ),
        pytest.param(
            [
                [
                    {"index": 0, "id": "a", "function": {"name": "f", "arguments": "{}"}},
                    {"index": 1, "id": "b", "function": {"name": "g", "arguments": "[]"}},
                ]
            ],
            id="in-one-piece",
        ),
    ],
)
def test_tool_calls_of_servers_with_habits_of_their_own_are_put_together(pieces):
    reply, _ = read(*(piece({"tool_calls": calls}) for calls in pieces), piece(finish_reason="tool_calls"), DONE)
    assert [(call.name, call.arguments) for call in reply.tool_calls] == [("f", "{}"), ("g", "[]")]


def test_an_older_function_call_is_a_tool_call():
    reply, _ = read(
        piece({"role": "assistant", "function_call": {"name": "weather", "arguments": "{"}}),
        piece({"function_call": {"arguments": "}"}}),
        piece(finish_reason="function_call"),
        DONE,
    )
    assert reply.tool_calls == (ToolCall(id="", name="weather", arguments="{}"),)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_are_kept_apart_from_the_text(name):
    reply, chunks = read(
        piece({"role": "assistant", "content": None, name: "Let "}),
        piece({name: "me see."}),
        piece({"content": "Yes."}),
        piece(finish_reason="stop"),
        DONE,
    )
    assert (reply.reasoning, reply.text) == ("Let me see.", "Yes.")
    assert [(chunk.reasoning, chunk.text) for chunk in chunks] == [
        ("Let ", ""),
        ("me see.", ""),
        ("", "Yes."),
        ("", ""),
    ]
    assert reply.extra["choices"][0]["message"][name] == "Let me see."


def test_thoughts_that_are_told_twice_are_shown_once():
    reply, chunks = read(
        piece({"role": "assistant", "content": ""}),
        piece({"reasoning_content": "Hm.", "reasoning": "Hm."}),
        piece({"reasoning": "So.", "reasoning_details": [{"type": "reasoning.text", "text": "So.", "index": 0}]}),
        piece(finish_reason="stop"),
    )
    assert [chunk.reasoning for chunk in chunks] == ["Hm.", "So.", ""]
    assert reply.reasoning == "Hm."  # of the field that comes first; the other one is kept
    assert reply.extra["choices"][0]["message"]["reasoning"] == "Hm.So."


def test_details_of_thoughts_are_merged_and_kept():
    def detail(**fields: Any) -> Event:
        return piece({"content": "", "reasoning_details": [{"type": "reasoning.text", "index": 0, **fields}]})

    reply, chunks = read(
        detail(text="Let ", format="anthropic"),
        detail(text="me see.", format="anthropic"),
        detail(signature="c2ln"),
        piece({"content": "Yes."}),
        piece(finish_reason="stop"),
        DONE,
    )
    assert reply.reasoning == "Let me see."
    assert [chunk.reasoning for chunk in chunks][:2] == ["Let ", "me see."]
    assert reply.extra["choices"][0]["message"]["reasoning_details"] == [
        {"type": "reasoning.text", "index": 0, "text": "Let me see.", "format": "anthropic", "signature": "c2ln"}
    ]


def test_a_content_of_parts_is_kept_and_read():
    thinking = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]}
    reply, chunks = read(
        piece({"role": "assistant", "content": [thinking]}),
        piece({"content": [{"type": "text", "text": "Yes"}]}),
        piece({"content": "."}),
        piece(finish_reason="stop"),
        DONE,
    )
    assert (reply.text, reply.reasoning) == ("Yes.", "Hm.")
    assert [(chunk.text, chunk.reasoning) for chunk in chunks] == [("", "Hm."), ("Yes", ""), (".", ""), ("", "")]


def test_a_refusal_is_kept_and_is_no_text():
    reply, chunks = read(
        piece({"role": "assistant", "content": None, "refusal": "I "}),
        piece({"refusal": "will not."}),
        piece(finish_reason="stop"),
        DONE,
    )
    assert reply.text == ""
    assert reply.extra["choices"][0]["message"]["refusal"] == "I will not."
    assert len(chunks) == 3


def test_logprobs_go_on():
    def said(word: str) -> Event:
        spoken = [{"token": word, "logprob": -0.5, "top_logprobs": [{"token": "index", "index": 0}]}]
        return piece({"content": word}, logprobs={"content": spoken, "refusal": None})

    reply, chunks = read(said("Hel"), said("lo"), piece(finish_reason="stop"), DONE)
    assert reply.text == "Hello"
    assert [one["token"] for one in reply.extra["choices"][0]["logprobs"]["content"]] == ["Hel", "lo"]
    assert [chunk.text for chunk in chunks] == ["Hel", "lo", ""]


def test_fields_that_nobody_knows_are_kept():
    reply, _ = read(
        piece({"role": "assistant", "content": "a", "mood": "good"}, token_ids=[1]),
        piece({"content": "b", "mood": " indeed", "images": [{"index": 0, "url": "x"}]}, token_ids=[2, 3]),
        piece(finish_reason="stop", stop_reason=7, filter={"hate": {"severity": "safe"}}),
        event(**HEAD, choices=[], usage=None, timings={"ms": 5}),
        DONE,
    )
    (choice,) = reply.extra["choices"]
    assert choice["message"]["mood"] == "good indeed"
    assert choice["message"]["images"] == [{"index": 0, "url": "x"}]
    assert choice["token_ids"] == [1, 2, 3]
    assert choice["stop_reason"] == 7
    assert choice["filter"] == {"hate": {"severity": "safe"}}
    assert reply.extra["timings"] == {"ms": 5}


def test_several_answers_are_kept_apart():
    reply, chunks = read(
        piece({"role": "assistant", "content": "a"}, index=1),
        piece({"role": "assistant", "content": "b"}),
        piece({"content": "c"}, index=1),
        piece({"content": "d"}),
        piece(finish_reason="length", index=1),
        piece(finish_reason="stop"),
        request=chat("hi", n=2),
    )
    assert (reply.text, reply.others, reply.finish_reason) == ("bd", ("ac",), "stop")
    assembler = PROVIDER.assembler(chat("hi", n=2), 200, {})
    for index in (1, 0):
        assembler.feed(piece({"content": f"answer {index}"}, index=index))
    assert assembler.text == "answer 0"
    assert [(chunk.index, chunk.text) for chunk in chunks[:4]] == [(1, "a"), (0, "b"), (1, "c"), (0, "d")]


def test_items_without_an_index_are_all_kept():
    cited = [[{"type": "url_citation", "url": url}] for url in ("a", "b")]
    reply, _ = read(*(piece({"annotations": one}) for one in cited), piece(finish_reason="stop"), DONE)
    assert reply.extra["choices"][0]["message"]["annotations"] == [*cited[0], *cited[1]]


def test_a_field_that_changes_its_type_is_the_last_one():
    reply, _ = read(piece({"mood": "good"}), piece({"mood": ["bad"]}), piece(finish_reason="stop"), DONE)
    assert reply.extra["choices"][0]["message"]["mood"] == ["bad"]


def test_noise_against_eavesdroppers_is_no_part_of_the_answer():
    choices = [{"index": 0, "delta": {"content": "a"}, "finish_reason": "stop"}]
    reply, _ = read(event(**HEAD, choices=choices, obfuscation="x"), DONE)
    assert "obfuscation" not in reply.extra


def test_logprobs_alone_are_shown():
    _, chunks = read(
        piece({}, logprobs={"content": [{"token": "a"}]}), piece({"content": "a"}), piece(finish_reason="stop")
    )
    assert [chunk.text for chunk in chunks] == ["", "a", ""]


@pytest.mark.parametrize("index", [None, "0", [], 0.0], ids=repr)
def test_an_odd_index_is_that_of_the_first_answer(index):
    choice = {"index": index, "delta": {"content": "a"}, "finish_reason": "stop"}
    reply, chunks = read(event(**HEAD, choices=[choice]), DONE)
    assert (reply.text, chunks[0].index) == ("a", 0)


# the end


@pytest.mark.parametrize("end", [[], [DONE]], ids=["the-end", "done"])
@pytest.mark.parametrize(
    "events",
    [
        pytest.param([], id="nothing"),
        pytest.param([piece({"role": "assistant", "content": "Hel"})], id="no-finish-reason"),
        pytest.param(
            [piece({"content": "a"}), piece({"content": "b"}, index=1), piece(finish_reason="stop")],
            id="one-of-two-answers-not-finished",
        ),
        pytest.param([event(**HEAD, choices=[], usage=USAGE)], id="usage-alone"),
    ],
)
def test_an_answer_without_its_finish_reason_is_a_transient_error_whatever_the_server_says(events, end):
    with pytest.raises(DecodeError) as caught:
        read(*events, *end)
    assert caught.value.transient
    assert caught.value.status == 200


def test_an_answer_that_has_not_begun_is_missed_where_the_stream_just_ends():
    events = [piece({"content": "a"}), piece(finish_reason="stop")]
    with pytest.raises(DecodeError, match="broke off"):
        read(*events, request=chat("hi", n=2))
    assert read(*events, DONE, request=chat("hi", n=2))[0].text == "a"  # the server has fewer, as it says


def test_a_stream_without_done_is_whole_with_its_finish_reason_and_a_late_usage_is_taken():
    reply, _ = read(piece({"content": "a"}), piece(finish_reason="stop"), event(**HEAD, choices=[], usage=USAGE))
    assert (reply.text, reply.usage.input_tokens) == ("a", 9)


@pytest.mark.parametrize(
    "last",
    [
        pytest.param(event(**HEAD, choices=[], x_groq={"id": "1", "usage": USAGE}), id="groq"),
        pytest.param(
            event(**HEAD, choices=[{"index": 0, "delta": {}, "finish_reason": "stop"}], usage=USAGE), id="same"
        ),
        pytest.param(event(**{**HEAD, "id": 7}, usage=USAGE), id="without-choices-and-with-a-number-for-its-id"),
    ],
)
def test_the_usage_is_found_where_servers_put_it(last):
    reply, chunks = read(piece({"content": "a"}), piece(finish_reason="stop"), last, DONE)
    assert reply.usage.output_tokens == 5
    assert chunks[-1].usage == reply.usage


def test_a_usage_in_each_piece_is_that_of_the_last():
    def counted(tokens: int, **choice: Any) -> Event:
        return event(**HEAD, choices=[{"index": 0, **choice}], usage={"prompt_tokens": 1, "completion_tokens": tokens})

    reply, chunks = read(
        counted(1, delta={"content": "a"}),
        counted(2, delta={"content": "b"}),
        counted(2, delta={}, finish_reason="stop"),
    )
    assert (reply.text, reply.usage) == ("ab", Usage(input_tokens=1, output_tokens=2))
    assert [chunk.usage.output_tokens for chunk in chunks if chunk.usage] == [1, 2, 2]


# errors in the stream


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        pytest.param({"error": {"message": "no", "type": "server_error"}}, errors.ServerError, id="openai"),
        pytest.param({"error": {"message": "no", "code": 400, "type": "BadRequestError"}}, CallError, id="vllm"),
        pytest.param({"object": "error", "message": "no", "code": 400}, CallError, id="vllm-flat"),
        pytest.param({"error": "no", "error_type": "generation"}, CallError, id="tgi"),
        pytest.param(
            {**HEAD, "error": {"code": 502, "message": "no"}, "choices": [{"delta": {}, "finish_reason": "error"}]},
            errors.ServerError,
            id="openrouter",
        ),
    ],
)
def test_an_error_in_the_stream_is_raised_at_once(said, kind):
    assembler = PROVIDER.assembler(chat("hi"), 200, {})
    assembler.feed(piece({"role": "assistant", "content": "Hel"}))
    with pytest.raises(kind, match="no"):
        assembler.feed(event(**said))
    assert assembler.text == "Hel"


@pytest.mark.parametrize("depth", [100, 400, 500, 800, 950, 990])
@pytest.mark.parametrize("place", ["delta", "choice"])
def test_a_piece_may_be_deep_and_too_deep_a_one_is_a_call_error(depth, place):
    deep = b'{"x":' * depth + b"1" + b"}" * depth
    field = b'"delta":{"content":"a","x":%b}' % deep if place == "delta" else b'"delta":{"content":"a"},"x":%b' % deep
    assembler = PROVIDER.assembler(chat("hi"), 200, {})
    try:
        for _ in range(2):
            assembler.feed(Event(b'{"choices":[{%b}]}' % field))
        assembler.feed(piece(finish_reason="stop"))
        assert assembler.finish().text == "aa"
    except DecodeError:
        assert depth > 100


def test_an_answer_that_is_too_deep_where_it_is_put_together_is_a_call_error():
    assembler = PROVIDER.assembler(chat("hi"), 200, {})
    assembler.feed(Event(b'{"choices":[{"finish_reason":"stop","x":%b1%b}]}' % (b'{"x":' * 800, b"}" * 800)))

    def finish(frames: int) -> None:
        if frames:
            finish(frames - 1)
            return
        with contextlib.suppress(DecodeError):
            assembler.finish()

    finish(300)


def test_an_event_that_is_called_error_is_one_whatever_is_in_it():
    with pytest.raises(errors.ServerError, match="no luck"):
        PROVIDER.assembler(chat("hi"), 200, {}).feed(Event(b'{"message":"no luck"}', "error"))


def test_a_refusal_after_the_answer_has_begun_costs_a_try():
    said = {"error": {"message": "slow down", "code": "rate_limit_exceeded"}}
    for begun in (False, True):
        assembler = PROVIDER.assembler(chat("hi"), 200, {})
        if begun:
            assembler.feed(piece({"content": "Hel"}))
        with pytest.raises(errors.RateLimitedError) as caught:
            assembler.feed(event(**said))
        assert caught.value.refusal is not begun


@pytest.mark.parametrize(
    "data", [b"{", b"", b"[]", b"7", b"null", b'"x"', b"\xff", b'{"choices": ' + b"[" * 100_000], ids=repr
)
def test_a_garbled_piece_is_a_transient_error(data):
    assembler = PROVIDER.assembler(chat("hi"), 200, {})
    with pytest.raises(DecodeError, match="cannot be understood"):
        assembler.feed(Event(data))


# completions


def test_a_completion_is_put_together():
    def text(said: str, **more: Any) -> Event:
        return event(id="cmpl-1", object="text_completion", model="m", choices=[{"index": 0, "text": said, **more}])

    request = Request(body={"prompt": "hi"}, operation="completions")
    reply, chunks = read(
        text("Hel", finish_reason=None, logprobs={"tokens": ["Hel"], "top_logprobs": [{"index": -1.0}]}),
        text("lo", finish_reason=None, logprobs={"tokens": ["lo"], "top_logprobs": [{"index": -2.0}]}),
        text(".", finish_reason=None, logprobs=None),
        text("", finish_reason="length"),
        DONE,
        request=request,
    )
    assert (reply.text, reply.finish_reason, reply.id) == ("Hello.", "length", "cmpl-1")
    assert reply.extra["object"] == "text_completion"
    assert reply.extra["choices"][0]["logprobs"] == {
        "tokens": ["Hel", "lo"],
        "top_logprobs": [{"index": -1.0}, {"index": -2.0}],
    }
    assert [chunk.text for chunk in chunks] == ["Hel", "lo", ".", ""]


# whatever the server says


texts = st.text(max_size=12)
values = st.none() | st.integers(0, 9) | st.booleans()
tool_calls = st.lists(
    st.builds(
        lambda n, name, arguments: {
            "id": f"call_{n}",
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        },
        st.uuids(),
        st.text(min_size=1, max_size=4),
        texts,
    ),
    max_size=3,
)


@st.composite
def answers(draw: Any) -> dict[str, Any]:
    """Draw an answer as it comes in one piece."""
    choices: list[Any] = []
    for index in range(draw(st.integers(1, 3))):
        message: dict[str, Any] = {"role": "assistant", "content": draw(texts)}
        for name in draw(st.sets(st.sampled_from(["reasoning_content", "reasoning", "refusal", "mood"]))):
            message[name] = draw(texts)
        if calls := draw(tool_calls):
            message["tool_calls"] = calls
        logprobs = draw(st.none() | st.just({"content": [{"token": "a", "logprob": -1}], "refusal": None}))
        ending = {"logprobs": logprobs, "finish_reason": draw(st.sampled_from(["stop", "length", "new"]))}
        choices.append({"index": index, "message": message, **ending})
    return {**HEAD, "object": "chat.completion", "choices": choices, "usage": draw(st.none() | st.just(USAGE))}


def cut(draw: Any, text: str) -> list[str]:
    """Return a text in pieces, some of them empty."""
    places = sorted(draw(st.lists(st.integers(0, len(text)), max_size=4)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


def shown(draw: Any, choice: dict[str, Any]) -> list[Event]:
    message, index = dict(choice["message"]), choice["index"]
    calls = message.pop("tool_calls", [])
    deltas: list[dict[str, Any]] = [{"role": message.pop("role"), "content": ""}]
    for name, text in message.items():
        deltas += [{name: part} for part in cut(draw, text)]
    for at, call in enumerate(calls):
        first, *rest = cut(draw, call["function"]["arguments"])
        function = {"name": call["function"]["name"], "arguments": first}
        deltas.append({"tool_calls": [{"index": at, **call, "function": function}]})
        deltas += [{"tool_calls": [{"index": at, "function": {"arguments": part}}]} for part in rest]
    return [
        *(piece(delta, index=index) for delta in deltas),
        piece(index=index, finish_reason=choice["finish_reason"], logprobs=choice["logprobs"]),
    ]


def said(choice: dict[str, Any]) -> dict[str, Any]:
    """Return what a choice says: a text that is empty may as well not be there."""
    return {name: value for name, value in choice["message"].items() if value}


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_a_streamed_answer_is_the_one_that_comes_in_one_piece(data):
    answer = data.draw(answers())
    streams = [shown(data.draw, choice) for choice in answer["choices"]]
    if data.draw(st.booleans()):  # the answers take turns
        turns = [one for one in chain.from_iterable(zip_longest(*streams)) if one is not None]
    else:
        turns = list(chain.from_iterable(streams))
    if answer["usage"]:
        turns.append(event(**HEAD, choices=[], usage=answer["usage"]))
    reply, chunks = read(*turns, *([DONE] if data.draw(st.booleans()) else []))
    whole = PROVIDER.decode(chat("hi"), 200, {}, json.dumps(answer).encode())
    fields = ("value", "text", "usage", "reasoning", "tool_calls", "others", "model", "id", "finish_reason", "status")
    assert [getattr(reply, name) for name in fields] == [getattr(whole, name) for name in fields]
    for mine, theirs in zip(reply.extra["choices"], answer["choices"], strict=True):
        assert said(mine) == said(theirs)
    assert "".join(chunk.text for chunk in chunks if chunk.index == 0) == whole.text


@settings(max_examples=150)
@given(
    st.lists(
        st.binary(max_size=40)
        | st.recursive(
            values | texts,
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(
                    st.sampled_from(
                        ["choices", "delta", "index", "content", "tool_calls", "usage", "error", "text", "id"]
                    ),
                    inner,
                    max_size=4,
                )
            ),
            max_leaves=12,
        ).map(lambda value: json.dumps(value).encode()),
        max_size=5,
    ),
    st.sampled_from(["chat", "completions", "responses"]),
)
def test_garbage_never_raises_anything_but_a_call_error(pieces, operation):
    assembler = PROVIDER.assembler(Request(body={}, operation=operation), 200, {})
    for data in pieces:
        with contextlib.suppress(CallError):
            assembler.feed(Event(data))
    assert isinstance(assembler.text, str)
    with contextlib.suppress(CallError):
        assert isinstance(assembler.finish().text, str)
