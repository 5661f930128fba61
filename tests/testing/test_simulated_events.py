"""The events of a stream say what the body of the same answer says."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm.testing._answers import AnswerFunction, Ask
from rxllm.testing._anthropic import read_messages
from rxllm.testing._events import Events, cut_up, event, spoil_events
from rxllm.testing._llm_engine import read_stream
from rxllm.testing._openai import read_chat, read_completion
from rxllm.testing._responses import read_response

prompts = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60)
chunks = st.one_of(st.none(), st.integers(1, 40))
NUMBER = {"properties": {"n": {"type": "integer"}, "why": {"type": "string"}}}


def read(pieces: list[bytes], line: str = "\n") -> list[Any]:
    """Return name and data of each event that has data; "[DONE]" stays a text."""
    found = []
    for one in b"".join(pieces).decode().split(line * 2):
        fields = dict(part.split(": ", 1) for part in one.split(line) if part and not part.startswith(":"))
        if data := fields.get("data"):
            found.append((fields.get("event", ""), data if data == "[DONE]" else json.loads(data)))
    return found


def both(
    reader: Callable[[bytes, str | AnswerFunction], Ask],
    body: dict[str, Any],
    count: int | None,
    mode: str | AnswerFunction = "echo",
) -> tuple[Any, Events]:
    """Return the answer in one piece, and its events."""
    ask = reader(json.dumps({"model": "m", **body, "stream": True}).encode(), mode)
    whole = ask.answer().body
    assert ask.stream is not None
    return json.loads(whole), ask.stream(whole, count)


def merged_chat(events: Events, *, usage: bool) -> Any:
    *pieces, (_, done) = read(spoil_events(None, events)[0])
    assert done == "[DONE]"
    reply: Any = {"choices": []}
    for _, piece in pieces:
        assert piece["object"] == "chat.completion.chunk"
        assert ("usage" in piece) is usage
        reply |= {name: piece[name] for name in ("id", "created", "model")}
        if piece.get("usage"):
            assert piece["choices"] == []
            reply["usage"] = piece["usage"]
        for choice in piece["choices"]:
            while len(reply["choices"]) <= choice["index"]:
                reply["choices"].append({"index": len(reply["choices"]), "message": {}, "logprobs": None})
            merge_chat_choice(reply["choices"][choice["index"]], choice)
    return reply


def merge_chat_choice(target: Any, piece: Any) -> None:
    if piece["logprobs"]:
        target["logprobs"] = target["logprobs"] or {"content": [], "refusal": None}
        target["logprobs"]["content"] += piece["logprobs"]["content"]
    target["finish_reason"] = piece["finish_reason"]
    message = target["message"]
    for name, value in piece["delta"].items():
        if name == "tool_calls":
            for call in value:
                calls = message.setdefault(name, [])
                if call["index"] == len(calls):
                    calls.append({key: part for key, part in call.items() if key != "index"})
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
        elif isinstance(value, str) and name in message and name != "role":
            message[name] += value
        else:
            message[name] = value


@settings(deadline=None)
@given(prompt=prompts, count=chunks, n=st.integers(1, 3), usage=st.booleans(), logprobs=st.booleans())
def test_a_streamed_chat_says_what_the_whole_one_says(
    prompt: str, count: int | None, n: int, usage: bool, logprobs: bool
) -> None:
    options = {"n": n, "logprobs": logprobs, "stream_options": {"include_usage": usage}}
    whole, events = both(read_chat, {"messages": [{"role": "user", "content": prompt}], **options}, count)
    if not usage:
        del whole["usage"]
    del whole["object"]
    assert merged_chat(events, usage=usage) == whole


def test_calls_and_thoughts_are_streamed_in_pieces_too() -> None:
    tool = {"type": "function", "function": {"name": "count", "parameters": NUMBER}}
    asked = {"messages": [{"role": "user", "content": "x"}], "tools": [tool], "tool_choice": "required"}
    whole, events = both(read_chat, asked, 5)
    (call,) = whole["choices"][0]["message"]["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("count", {"n": 1, "why": "why"})
    assert whole["choices"][0]["finish_reason"] == "tool_calls"
    assert merged_chat(events, usage=False)["choices"] == whole["choices"]

    thoughtful = {"content": "Yes.", "reasoning_content": "Because it is.", "tool_calls": [call], "x": {"y": 1}}
    whole, events = both(read_chat, {"messages": asked["messages"]}, None, lambda *_: thoughtful)
    assert merged_chat(events, usage=False)["choices"] == whole["choices"]


@settings(deadline=None)
@given(prompt=prompts, count=chunks, usage=st.booleans())
def test_a_streamed_completion_says_what_the_whole_one_says(prompt: str, count: int | None, usage: bool) -> None:
    asked = {"prompt": [prompt, "b"], "n": 2, "max_tokens": 9, "stream_options": {"include_usage": usage}}
    whole, events = both(read_completion, asked, count)
    texts = dict.fromkeys(range(4), "")
    ends = {}
    *pieces, _ = read(spoil_events(None, events)[0])
    for _, piece in pieces:
        for choice in piece["choices"]:
            texts[choice["index"]] += choice["text"]
            ends[choice["index"]] = choice["finish_reason"]
    assert [texts[n] for n in range(4)] == [choice["text"] for choice in whole["choices"]]
    assert [ends[n] for n in range(4)] == [choice["finish_reason"] for choice in whole["choices"]]
    assert pieces[-1][1].get("usage") == (whole["usage"] if usage else None)


@settings(deadline=None)
@given(prompt=prompts, count=chunks, tool=st.booleans(), most=st.sampled_from([None, 2]))
def test_a_streamed_response_says_what_the_whole_one_says(
    prompt: str, count: int | None, tool: bool, most: int | None
) -> None:
    tools = [{"type": "function", "name": "count", "parameters": NUMBER}] if tool else []
    asked = {"input": prompt, "tools": tools, "tool_choice": "required", "max_output_tokens": most}
    whole, events = both(read_response, asked, count)
    pieces = read(spoil_events(None, events)[0])
    assert [piece["sequence_number"] for _, piece in pieces] == list(range(len(pieces)))
    assert all(name == piece["type"] for name, piece in pieces)
    assert [name for name, _ in pieces[:2]] == ["response.created", "response.in_progress"]
    for _, piece in pieces[:2]:
        assert (piece["response"]["status"], piece["response"]["output"]) == ("in_progress", [])
    assert pieces[-1][0] == f"response.{whole['status']}"
    assert pieces[-1][1]["response"] == whole
    (item,) = whole["output"]
    said = "".join(piece.get("delta", "") for _, piece in pieces)
    assert said == (item["arguments"] if tool else item["content"][0]["text"])
    assert [piece["item"] for name, piece in pieces if name == "response.output_item.done"] == [item]
    assert whole["status"] == ("incomplete" if most and not tool and len(prompt) > 8 else "completed")


@settings(deadline=None)
@given(prompt=prompts, count=chunks, kind=st.sampled_from(["text", "thinking", "tool", "schema"]))
def test_a_streamed_message_says_what_the_whole_one_says(prompt: str, count: int | None, kind: str) -> None:
    more: dict[str, Any] = {
        "text": {},
        "thinking": {"thinking": {"type": "enabled", "budget_tokens": 1_024}},
        "tool": {"tools": [{"name": "count", "input_schema": NUMBER}], "tool_choice": {"type": "any"}},
        "schema": {"output_config": {"format": {"type": "json_schema", "schema": NUMBER}}},
    }[kind]
    whole, events = both(
        read_messages, {"messages": [{"role": "user", "content": prompt}], "max_tokens": 50, **more}, count
    )
    pieces = read(spoil_events(None, events)[0])
    assert all(name == piece["type"] for name, piece in pieces)
    assert [name for name, _ in pieces].count("ping") == 1
    assert pieces[-1][0] == "message_stop"
    message: Any = {}
    for name, piece in pieces:
        if name == "message_start":
            message = piece["message"]
        elif name == "content_block_start":
            message["content"].append(piece["content_block"])
        elif name == "content_block_delta":
            delta = {key: value for key, value in piece["delta"].items() if key != "type"}
            ((key, value),) = delta.items()
            block = message["content"][piece["index"]]
            block[key] = block.get(key, "") + value
        elif name == "message_delta":
            message |= piece["delta"]
            message["usage"] |= piece["usage"]
    for block in message["content"]:
        if "partial_json" in block:
            block["input"] = json.loads(block.pop("partial_json"))
    assert message == whole
    assert whole["stop_reason"] == ("tool_use" if kind == "tool" else "end_turn")


@settings(deadline=None)
@given(prompt=prompts, count=chunks, told=st.booleans())
def test_a_streamed_llm_engine_completion_says_what_the_whole_one_says(
    prompt: str, count: int | None, told: bool
) -> None:
    asked = {"prompt": prompt, "max_new_tokens": 10, "temperature": 0.0, "return_token_log_probs": told}
    whole, events = both(read_stream, asked, count)
    sent = spoil_events(None, events)[0]
    assert sent[0].startswith(b": ping")
    pieces = [piece for _, piece in read(sent, "\r\n")]
    assert "".join(piece["output"]["text"] for piece in pieces) == whole["output"]["text"]
    assert [piece["output"]["finished"] for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    last = pieces[-1]["output"]
    assert last["num_prompt_tokens"] == whole["output"]["num_prompt_tokens"]
    assert last["num_completion_tokens"] == whole["output"]["num_completion_tokens"]
    assert all(piece["output"]["num_prompt_tokens"] is None for piece in pieces[:-1])
    assert all((piece["output"]["token"] is not None) is told for piece in pieces)
    assert {piece["request_id"] for piece in pieces} == {whole["request_id"]}


@settings(deadline=None)
@given(text=st.text(max_size=50), count=st.integers(1, 60))
def test_a_text_is_cut_into_so_many_pieces_of_nearly_the_same_size(text: str, count: int) -> None:
    parts = cut_up(text, count)
    assert "".join(parts) == text
    assert len(parts) == min(count, len(text))
    assert not parts or max(map(len, parts)) - min(map(len, parts)) <= 1


SENT = Events(
    [b"data: {1}\n\n", b"data: {2}\n\n", b"data: {3}\n\n"], [b"data: {f}\n\n"], [b"data: D\n\n"], b"data: E\n\n"
)


@pytest.mark.parametrize(
    ("fault", "sent", "ending"),
    [
        (None, b"data: {1}|data: {2}|data: {3}|data: {f}|data: D|", "end"),
        ("truncated", b"data: {1}|data: {2}|data:", "close"),
        ("garbled", b"data: {1}|data: {2}|data: {|data: {f}|data: D|", "end"),
        ("error_midway", b"data: {1}|data: {2}|data: E|", "end"),
        ("stall_midway", b"data: {1}|data: {2}|", "stall"),
        ("unfinished", b"data: {1}|data: {2}|data: {3}|data: D|", "end"),
        ("no_done", b"data: {1}|data: {2}|data: {3}|data: {f}|", "end"),
    ],
)
def test_a_fault_spoils_a_stream(fault: str | None, sent: bytes, ending: str) -> None:
    pieces, how = spoil_events(fault, SENT)
    assert (b"".join(pieces).replace(b"\n\n", b"|"), how) == (sent, ending)


def test_an_event_ends_with_an_empty_line_of_the_wanted_kind() -> None:
    assert event({"a": "\r\n"}, "n", line="\r\n") == b'event: n\r\ndata: {"a":"\\r\\n"}\r\n\r\n'
