"""Anthropic's dialect: messages."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import msgspec

from rxllm.clock import wall
from rxllm.errors import InvalidRequestError, UnsupportedError, check_number
from rxllm.messages import Reply, Request, ToolCall, chat
from rxllm.policies.accounting import ANTHROPIC, Accounting
from rxllm.providers._shared import (
    UNREADABLE,
    Priced,
    Size,
    body_of,
    count,
    encoded,
    fields_of,
    items_of,
    name_of,
    size_of,
    size_of_messages,
    text_of,
)
from rxllm.providers.anthropic_stream import MessageAssembler, usage_of
from rxllm.providers.base import Call
from rxllm.providers.faults import fault_in, fault_of, parsed, unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rxllm.providers.output import Output

__all__ = ["MAX_TOKENS", "AnthropicProvider"]

T = TypeVar("T")

PATH = "/messages"
MAX_TOKENS = 4096  # which the dialect wants said; no model since the third generation writes less
TOOL = "Takes the answer: call it once, with all of it."


class _Block(msgspec.Struct):
    type: str
    text: str | None = None
    thinking: str | None = None
    id: str | None = None
    name: str | None = None
    input: msgspec.Raw = msgspec.Raw(b"{}")


class _Message(msgspec.Struct):
    """The envelope of an answer; what else is in it stays in `reply.raw` until somebody asks for it."""

    content: list[_Block]
    id: str | None = None
    model: str | None = None
    stop_reason: str | None = None
    usage: Any = None


_decoder = msgspec.json.Decoder(_Message)


class AnthropicProvider(Priced, Generic[T]):
    """Messages. The body of a request goes as it is, but for three things.

    The model and `max_tokens` are added unless it names them. The messages with the role "system" that it begins with,
    as `chat(…, system=…)` makes them, become `system`, after the `system` that it has itself; a later one stays where
    it is. What asks for `output` is added unless the body has its own: a format in `output_config`, a choice of tools.

    Args:
        model: the model's name.
        max_tokens: the most output tokens of an answer, for requests that do not say it.
        output: what each answer is to be; None: a text. It is asked for as `output_config.format`, with which the
            model can write nothing else, and can think before. What has no strict schema (a dict with names of its
            own, a field that may be missing) is refused there, and becomes the input of a tool that is to be called.
        accounting: how the server counts tokens when it admits a request.
        count_tokens: request -> the tokens of its prompt; None: an estimate from its size, which replies calibrate.

    Raises:
        ConfigError: an argument of another kind.
    """

    def __init__(
        self,
        model: str,
        *,
        max_tokens: int = MAX_TOKENS,
        output: Output[T] | None = None,
        accounting: Accounting = ANTHROPIC,
        count_tokens: Callable[[Request], float] | None = None,
    ) -> None:
        super().__init__(model, accounting, count_tokens)
        check_number("max_tokens", max_tokens, least=1, integer=True)
        self.max_tokens = max_tokens
        self.output = output
        self._format: dict[str, Any] | None = None
        self._tool: dict[str, Any] | None = None
        if output is not None and output.strict:
            self._format = {"type": "json_schema", "schema": accepted(output.schema)}
        elif output is not None:
            self._tool = {"name": output.name, "description": TOOL, "input_schema": output.schema}

    def encode(self, request: Request, *, stream: bool = False) -> Call:
        """Return the call of `request`; see `Provider`."""
        if request.operation != "chat":
            msg = f"operation must be chat, got {request.operation!r}"
            raise UnsupportedError(msg)
        fields = {"model": self.model, "max_tokens": self.max_tokens, **body_of(request)}
        messages: Any = fields.get("messages")
        if isinstance(messages, list | tuple) and messages and _is_system(cast("list[Any]", messages)[0]):
            _lift(fields, cast("list[Any]", messages))
        if self._format is not None:
            config: Any = fields.get("output_config")
            if config is None or isinstance(config, dict):  # the server will say what it thinks of another
                fields["output_config"] = {"format": self._format, **fields_of(cast("object", config))}
        elif self._tool is not None and "tool_choice" not in fields:
            fields["tools"] = [*items_of(fields.get("tools")), self._tool]
            fields["tool_choice"] = {"type": "tool", "name": self._tool["name"]}
        if stream:
            fields["stream"] = True
        return Call(PATH, encoded(fields), accept="text/event-stream" if stream else "application/json")

    def decode(self, request: Request, status: int, headers: Mapping[str, str], body: bytes) -> Reply[T]:  # noqa: ARG002
        """Return the reply of a complete answer; see `Provider`."""
        if not 200 <= status < 300:  # noqa: PLR2004
            raise fault_of("anthropic", status, headers, body, now=wall())
        try:
            message = _decoder.decode(body)
        except UNREADABLE as error:
            reason = str(error)
        else:
            return self._read(_reply(message, status, body))
        said = parsed(body)
        fields = fields_of(said)
        if isinstance(fields.get("content"), list):
            return self._read(_reply(_tolerant(fields), status, body))  # it has been paid for
        if fields.get("error"):
            raise fault_in("anthropic", said, status=status, headers=headers, now=wall())
        raise unreadable(status, headers, body, reason)

    def assembler(self, request: Request, status: int, headers: Mapping[str, str]) -> MessageAssembler[T]:
        """Return what puts the answer to `request` together; see `Provider`."""
        return MessageAssembler(partial(self.decode, request, status, headers), status, headers)

    def repeatable(self, request: Request) -> bool:  # noqa: ARG002
        """Say that a second try is safe: a message leaves nothing behind."""
        return True

    def measure(self, request: Request) -> Size:
        """Return the size of a request: of the texts of its messages and its `system`."""
        body = fields_of(request.body)
        prompt = size_of_messages(body.get("messages")) + size_of(text_of(body.get("system")))
        return Size(str(body.get("model", self.model)), prompt, count(body.get("max_tokens", self.max_tokens)) or None)

    def wrap(self, item: object) -> Request:
        """Return the request of a prompt."""
        if isinstance(item, str):
            return chat(item)
        msg = f"expected a Request or a prompt (str), got {type(item).__name__}"
        raise InvalidRequestError(msg)

    def _read(self, reply: Reply[Any]) -> Reply[T]:
        """Return a reply with its value."""
        output = self.output
        if output is None:
            return reply
        text = None
        if self._tool is not None:
            text = next((call.arguments for call in reply.tool_calls if call.name == output.name), None)
        why: Any = None
        if reply.finish_reason == "refusal":
            why = fields_of(reply.extra.get("stop_details")).get("explanation")
        return output.read(reply, text=text, refusal=name_of(why))


# Requests


def _is_system(message: object) -> bool:
    """Say whether a message can become `system` without losing anything."""
    fields = fields_of(message)
    return (
        fields.keys() == {"role", "content"}
        and fields["role"] == "system"
        and isinstance(fields["content"], str | list)
    )


def _lift(fields: dict[str, Any], messages: list[Any]) -> None:
    """Move the system messages at the beginning to `system`; `fields` is changed, what is in it is not."""
    first = next((place for place, message in enumerate(messages) if not _is_system(message)), len(messages))
    given = [message["content"] for message in messages[:first]]
    own: Any = fields.get("system")
    if own is not None:
        given.insert(0, own)
    fields["messages"] = messages[first:]
    fields["system"] = given[0] if len(given) == 1 else [block for content in given for block in _blocks(content)]


def _blocks(content: Any) -> list[Any]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else items_of(content)


# What schemas may not have here, as their documentation says and their SDK acts (anthropic 2.11)
REFUSED = frozenset(
    {
        "exclusiveMaximum",
        "exclusiveMinimum",
        "maximum",
        "maxItems",
        "maxLength",
        "maxProperties",
        "minimum",
        "minLength",
        "minProperties",
        "multipleOf",
        "pattern",
        "uniqueItems",
    }
)
VALUES = frozenset({"const", "default", "enum", "examples"})  # in them are values, no schemas
NAMED = frozenset({"$defs", "definitions", "properties"})  # their keys are names, not keywords


def accepted(schema: Any, *, named: bool = False) -> Any:
    """Return a schema without the bounds that this dialect refuses; they are told to the model in words instead.

    >>> accepted({"type": "integer", "minimum": 1, "description": "A count."})
    {'type': 'integer', 'description': 'A count. (minimum: 1)'}
    """
    if isinstance(schema, list):
        return [accepted(item) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    fields = cast("dict[str, Any]", schema)
    refused = {} if named else {key: value for key, value in fields.items() if key in REFUSED}
    if not named and isinstance(fields.get("minItems"), int) and fields["minItems"] > 1:  # 0 and 1 are fine
        refused["minItems"] = fields["minItems"]
    kept: dict[str, Any] = {}
    for key, value in fields.items():
        if key not in refused:
            plain = key in VALUES and not named
            kept[key] = value if plain else accepted(value, named=key in NAMED and not named)
    if refused:
        words = ", ".join(f"{key}: {value}" for key, value in refused.items())
        kept["description"] = f"{fields.get('description', '')} ({words})".lstrip()
    return kept


# Answers


def _reply(message: _Message, status: int, body: bytes) -> Reply[Any]:
    blocks = message.content
    text = "".join([block.text or "" for block in blocks if block.type == "text"])
    return Reply(
        value=text,
        text=text,
        usage=usage_of(message.usage),
        reasoning="".join([block.thinking or "" for block in blocks if block.type == "thinking"]),
        tool_calls=tuple([_call(block) for block in blocks if block.type == "tool_use"]),
        model=message.model,
        id=message.id,
        finish_reason=message.stop_reason,
        status=status,
        raw=body,
    )


def _call(block: _Block) -> ToolCall:
    arguments = bytes(block.input).decode()
    if arguments.startswith('"'):  # what was no whole object when the answer ended: the assembler keeps it as a text
        arguments = msgspec.json.decode(arguments, type=str)
    return ToolCall(id=block.id or "", name=block.name or "", arguments=arguments)


def _tolerant(fields: dict[str, Any]) -> _Message:
    """Return the envelope of an answer that is not as it should be."""
    blocks = [fields_of(block) for block in items_of(fields.get("content"))]
    return _Message(
        content=[
            _Block(
                type=str(block.get("type")),
                text=text_of(block.get("text")),
                thinking=text_of(block.get("thinking")),
                id=name_of(block.get("id")),
                name=name_of(block.get("name")),
                input=msgspec.Raw(msgspec.json.encode(block.get("input", {}))),
            )
            for block in blocks
        ],
        id=name_of(fields.get("id")),
        model=name_of(fields.get("model")),
        stop_reason=name_of(fields.get("stop_reason")),
        usage=fields.get("usage"),
    )
