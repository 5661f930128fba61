"""What the simulated provider reads and says in Anthropic's dialect. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import msgspec

from rxllm.testing._answers import (
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
    from collections.abc import Iterator

    from rxllm.testing._answers import AnswerFunction

THOUGHT: Final = "This can be said in a sentence."
FAILED: Final = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}


class Message(msgspec.Struct):
    """One message; `content` is a text or a list of blocks."""

    role: str
    content: Any


class Tool(msgspec.Struct):
    """A tool that the model may call."""

    name: str = ""
    input_schema: Any = None


class Choice(msgspec.Struct):
    """Which tool it has to call."""

    type: str = "auto"
    name: str | None = None


class Format(msgspec.Struct, rename={"value": "schema"}):
    """What an answer has to be."""

    value: Any = None


class OutputConfig(msgspec.Struct):
    """How an answer is written."""

    format: Format | None = None


class Thinking(msgspec.Struct):
    """Whether thoughts are shown."""

    type: str = "disabled"


class Metadata(msgspec.Struct):
    """Who asks."""

    user_id: str | None = None


class MessagesBody(msgspec.Struct):
    """What the server reads of a request for a message."""

    messages: list[Message]
    max_tokens: int
    model: str = ""
    system: Any = None
    stream: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: Choice | None = None
    output_config: OutputConfig | None = None
    thinking: Thinking | None = None
    metadata: Metadata | None = None


_body = msgspec.json.Decoder(MessagesBody)


def read_messages(raw: bytes, mode: str | AnswerFunction) -> Ask:
    """Read the body of a request for a message."""
    body = _body.decode(raw)
    if not body.messages:
        raise RefusedBodyError("messages: at least one message is required", "messages")
    check_counts("max_tokens", body.max_tokens)
    texts = [text_of(message.content) for message in body.messages]
    prompt = texts[-1]
    size = sum(map(tokens, (text_of(body.system), *texts)))
    mark = fingerprint(prompt)
    wish = _wish(body)

    def answer() -> Answer:
        said = say(mode, prompt, mark, 0, raw, wish)
        reply: JSON = {
            "id": f"msg_{mark}",
            "type": "message",
            "role": "assistant",
            "model": body.model,
            "content": [],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "stop_details": None,
        }
        if isinstance(said, str):
            text, used, finish = cut(said, body.max_tokens)
            reply["content"] = [*_thoughts(body, mark), {"type": "text", "text": text}]
            reply["stop_reason"] = "max_tokens" if finish is LENGTH else "end_turn"
        else:
            used = tokens(encode(said).decode())
            reply.update(_use(said, mark) if isinstance(said, ToolUse) else said)
        reply["usage"] = {
            "input_tokens": size,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
            "output_tokens": used,
        }
        return Answer(encode(reply), used)

    user = None if body.metadata is None else body.metadata.user_id
    return Ask(mark, user, body.model, size, body.max_tokens, answer, message_events if body.stream else None)


def message_events(reply: bytes, chunks: int | None) -> Events:
    """Return the events that say the same as the body of a message."""
    body = decode(reply)
    stop = {name: body[name] for name in ("stop_reason", "stop_sequence", "stop_details")}
    begun: JSON = {**body, "content": [], **dict.fromkeys(stop)}
    begun["usage"] = body["usage"] | {"output_tokens": 1}
    shown = [event({"type": "message_start", "message": begun}, "message_start")]
    for index, block in enumerate(body["content"]):
        hollow: JSON = block | {name: empty for name, empty in HOLLOW.get(block["type"], {}).items() if name in block}
        start = {"type": "content_block_start", "index": index, "content_block": hollow}
        shown.append(event(start, "content_block_start"))
        if not index:
            shown.append(event({"type": "ping"}, "ping"))
        for delta in _deltas(block, chunks):
            piece = {"type": "content_block_delta", "index": index, "delta": delta}
            shown.append(event(piece, "content_block_delta"))
        shown.append(event({"type": "content_block_stop", "index": index}, "content_block_stop"))
    used = {"output_tokens": body["usage"]["output_tokens"]}
    last = event({"type": "message_delta", "delta": stop, "usage": used}, "message_delta")
    return Events(shown, [last], [event({"type": "message_stop"}, "message_stop")], event(FAILED, "error"))


HOLLOW: Final[dict[str, JSON]] = {  # a block before its content has come; blocks of other types come whole
    "text": {"text": ""},
    "thinking": {"thinking": "", "signature": ""},
    "tool_use": {"input": {}},
}


def _deltas(block: JSON, chunks: int | None) -> Iterator[JSON]:
    if block["type"] == "text":
        for part in cut_up(block["text"], chunks):
            yield {"type": "text_delta", "text": part}
    elif block["type"] == "thinking":
        for part in cut_up(block["thinking"], chunks):
            yield {"type": "thinking_delta", "thinking": part}
        yield {"type": "signature_delta", "signature": block["signature"]}
    elif block["type"] == "tool_use":
        for part in ("", *cut_up(encode(block["input"]).decode(), chunks)):
            yield {"type": "input_json_delta", "partial_json": part}


def _wish(body: MessagesBody) -> Wish | None:
    tools = [(tool.name, tool.input_schema) for tool in body.tools or ()]
    choice = body.tool_choice or Choice()
    form = body.output_config and body.output_config.format
    return wish_of(form and form.value, tools, choice.type == "any" or choice.name)


def _thoughts(body: MessagesBody, mark: str) -> list[JSON]:
    if body.thinking is None or body.thinking.type != "enabled":
        return []
    return [{"type": "thinking", "thinking": THOUGHT, "signature": mark}]


def _use(use: ToolUse, mark: str) -> JSON:
    block = {"type": "tool_use", "id": f"toolu_{mark}", "name": use.name, "input": msgspec.Raw(use.arguments.encode())}
    return {"content": [block], "stop_reason": "tool_use"}
