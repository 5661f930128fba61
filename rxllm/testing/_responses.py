"""What the simulated provider reads and says in the dialect of OpenAI's Responses. Pure."""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any, Final

import msgspec

from rxllm.testing._answers import (
    CREATED,
    JSON,
    LENGTH,
    Answer,
    Ask,
    RefusedBodyError,
    ToolUse,
    Wish,
    check_counts,
    cut,
    decode,
    encode,
    fingerprint,
    say,
    text_of,
    tokens,
    wish_of,
)
from rxllm.testing._events import Events, cut_up, event

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rxllm.testing._answers import AnswerFunction


class Tool(msgspec.Struct):
    """A tool that the model may call, or has to; only functions are served."""

    type: str = ""
    name: str = ""
    parameters: Any = None


class Format(msgspec.Struct, rename={"value": "schema"}):
    """What an answer has to be."""

    type: str = "text"
    value: Any = None


class Text(msgspec.Struct):
    """How an answer is written."""

    format: Format = msgspec.field(default_factory=Format)


class ResponseBody(msgspec.Struct):
    """What the server reads of a request for a response."""

    input: str | list[JSON]
    model: str = ""
    instructions: str | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: str | Tool | None = None
    text: Text | None = None
    metadata: Any = None
    user: str | None = None


_body = msgspec.json.Decoder(ResponseBody)


def read_response(raw: bytes, mode: str | AnswerFunction) -> Ask:
    """Read the body of a request for a response."""
    body = _body.decode(raw)
    if not body.input:
        raise RefusedBodyError("'input' must have at least 1 item.", "input")
    most = body.max_output_tokens
    check_counts("max_output_tokens", most)
    inputs: list[JSON] = [{"content": body.input}] if isinstance(body.input, str) else body.input
    texts = [text_of(item.get("content", item.get("output"))) for item in inputs]
    prompt = texts[-1]
    size = sum(map(tokens, (body.instructions or "", *texts)))
    mark = fingerprint(prompt)
    wish = _wish(body) if body.tools or body.text else None

    def answer() -> Answer:
        said = say(mode, prompt, mark, 0, raw, wish)
        reply = _reply(body, mark)
        if isinstance(said, str):
            text, used, finish = cut(said, most)
            if finish is LENGTH:
                reply |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}
            reply["output"] = [_message(text, mark, reply["status"])]
        else:
            used = tokens(encode(said).decode())
            reply |= {"output": [_call(said, mark)]} if isinstance(said, ToolUse) else said
        reply["usage"] = {
            "input_tokens": size,
            "input_tokens_details": {"cached_tokens": 0},
            "output_tokens": used,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": size + used,
        }
        return Answer(encode(reply), used)

    return Ask(mark, body.user, body.model, size, most, answer, response_events if body.stream else None)


def response_events(reply: bytes, chunks: int | None) -> Events:
    """Return the events that say the same as the body of a response."""
    body = decode(reply)
    numbers = count()

    def typed(kind: str, **fields: Any) -> bytes:
        return event({"type": kind, "sequence_number": next(numbers), **fields}, kind)

    begun: JSON = body | {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}
    shown = [typed("response.created", response=begun), typed("response.in_progress", response=begun)]
    for index, item in enumerate(body["output"]):
        place = {"item_id": item.get("id"), "output_index": index}
        shown.append(typed("response.output_item.added", output_index=index, item=_hollow(item)))
        shown += _call_events(item, place, chunks, typed) if item["type"] == "function_call" else []
        shown += _part_events(item, place, chunks, typed) if item["type"] == "message" else []
        shown.append(typed("response.output_item.done", output_index=index, item=item))
    error = {"code": "server_error", "message": "The server had an error.", "param": None}
    failed = event({"type": "error", "sequence_number": len(shown) // 2, **error}, "error")
    return Events(shown, [typed(f"response.{body['status']}", response=body)], [], failed)


HOLLOW: Final[dict[str, JSON]] = {"message": {"content": []}, "function_call": {"arguments": ""}}


def _hollow(item: JSON) -> JSON:
    """Return an item as it is before its content has come."""
    return item | {"status": "in_progress"} | HOLLOW.get(item["type"], {})


def _part_events(item: JSON, place: JSON, chunks: int | None, typed: Callable[..., bytes]) -> Iterator[bytes]:
    for index, part in enumerate(item["content"]):
        at = place | {"content_index": index}
        yield typed("response.content_part.added", **at, part=part | {"text": ""})
        for text in cut_up(part["text"], chunks):
            yield typed("response.output_text.delta", **at, delta=text, logprobs=[])
        yield typed("response.output_text.done", **at, text=part["text"], logprobs=[])
        yield typed("response.content_part.done", **at, part=part)


def _call_events(item: JSON, place: JSON, chunks: int | None, typed: Callable[..., bytes]) -> Iterator[bytes]:
    for text in cut_up(item["arguments"], chunks):
        yield typed("response.function_call_arguments.delta", **place, delta=text)
    yield typed("response.function_call_arguments.done", **place, name=item["name"], arguments=item["arguments"])


def _wish(body: ResponseBody) -> Wish | None:
    tools = [(tool.name, tool.parameters) for tool in body.tools or () if tool.type == "function"]
    choice = body.tool_choice.name if isinstance(body.tool_choice, Tool) else body.tool_choice
    form = body.text.format if body.text is not None else Format()
    return wish_of(form.value if form.type == "json_schema" else None, tools, choice == "required" or choice)


def _message(text: str, mark: str, status: str) -> JSON:
    part: JSON = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    return {"type": "message", "id": f"msg_{mark}", "status": status, "role": "assistant", "content": [part]}


def _call(use: ToolUse, mark: str) -> JSON:
    return {
        "type": "function_call",
        "id": f"fc_{mark}",
        "call_id": f"call_{mark}",
        "status": "completed",
        "name": use.name,
        "arguments": use.arguments,
    }


def _reply(body: ResponseBody, mark: str) -> JSON:
    return {
        "id": f"resp_{mark}",
        "object": "response",
        "created_at": CREATED,
        "status": "completed",
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "metadata": body.metadata or {},
        "model": body.model,
        "output": [],
        "parallel_tool_calls": True,
        "text": body.text or Text(),
        "tool_choice": body.tool_choice or "auto",
        "tools": body.tools or [],
        "usage": None,
    }
