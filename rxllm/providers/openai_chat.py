"""The answers of OpenAI's chat completions and completions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec

from rxllm import clock
from rxllm.errors import ConfigError
from rxllm.messages import Reply, ToolCall, Usage
from rxllm.providers._shared import fields_of, items_of, name_of
from rxllm.providers.faults import fault_in, parsed, unreadable
from rxllm.providers.openai_fields import NO_USAGE, calls_of, text_of, thoughts_of, usage_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["decode_completion"]


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None
    cache_write_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


class _Message(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    reasoning_details: list[Any] | None = None
    tool_calls: list[Any] | None = None
    function_call: dict[str, Any] | None = None


class _Choice(msgspec.Struct):
    message: _Message | None = None  # of a chat
    text: str | None = None  # of a completion
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    """The envelope of an answer; what else is in it stays in `reply.raw` until somebody asks for it."""

    choices: list[_Choice]
    id: str | None = None
    model: str | None = None
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Completion)


def decode_completion(status: int, headers: Mapping[str, str], body: bytes) -> Reply[Any]:
    """Return the reply of a complete answer with a 2xx status; its value is its text.

    Raises:
        CallError: it has no text; an error that came as if all were well is the error of its own code.
    """
    try:
        said = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error)
    else:
        if said.choices and said.choices[0].finish_reason != "error" and (reply := _reply(said, status, body)):
            return reply
        reason = "it has no choices"
    return _tolerant(status, headers, body, reason)


def _reply(said: _Completion, status: int, body: bytes) -> Reply[str] | None:
    choice = said.choices[0]
    message = choice.message
    calls: tuple[ToolCall, ...] = ()
    if message is None:
        if choice.text is None:
            return None
        text, reasoning = choice.text, ""
    else:
        text = message.content or ""
        reasoning = message.reasoning_content or message.reasoning or ""
        if message.reasoning_details and not reasoning:
            reasoning = thoughts_of({"reasoning_details": message.reasoning_details})
        if message.tool_calls or message.function_call:
            calls = calls_of(message.tool_calls, message.function_call)
    return Reply(
        value=text,
        text=text,
        usage=_usage(said.usage),
        reasoning=reasoning,
        tool_calls=calls,
        others=() if len(said.choices) == 1 else tuple(map(_text, said.choices[1:])),
        model=said.model,
        id=said.id,
        finish_reason=choice.finish_reason,
        status=status,
        raw=body,
    )


def _text(choice: _Choice) -> str:
    return (choice.text if choice.message is None else choice.message.content) or ""


def _usage(said: _Usage | None) -> Usage:
    if said is None:
        return NO_USAGE
    inputs, outputs = said.prompt_tokens_details, said.completion_tokens_details
    try:
        return Usage(
            input_tokens=said.prompt_tokens or 0,
            output_tokens=said.completion_tokens or 0,
            cached_tokens=(inputs.cached_tokens or 0) if inputs else 0,
            reasoning_tokens=(outputs.reasoning_tokens or 0) if outputs else 0,
            cache_write_tokens=(inputs.cache_write_tokens or 0) if inputs else 0,
        )
    except ConfigError:
        return NO_USAGE  # a server may say anything; what it says is in reply.raw


def _tolerant(status: int, headers: Mapping[str, str], body: bytes, reason: str) -> Reply[str]:
    """Return the reply of an answer that is not as it should be, if it has a text: it has been paid for.

    Raises:
        CallError: it has none; an error that came as if all were well is the error of its own code.
    """
    said = fields_of(parsed(body))
    choices = [_tolerant_choice(choice) for choice in items_of(said.get("choices"))]
    fault = said if said.get("error") or said.get("object") == "error" else None
    if choices and choices[0] is not None:
        if choices[0].finish_reason != "error":
            whole = _Completion(
                choices=[choice or _Choice(text="") for choice in choices],
                id=name_of(said.get("id")),
                model=name_of(said.get("model")),
            )
            reply = _reply(whole, status, body)
            if reply is not None:
                return msgspec.structs.replace(reply, usage=usage_of(said.get("usage")))
        fault = fault or {"error": "the model failed", **fields_of(items_of(said.get("choices"))[0])}
        raise fault_in("openai", fault, now=clock.wall(), status=status, headers=headers)
    if fault is not None and not choices:
        raise fault_in("openai", fault, now=clock.wall(), status=status, headers=headers)
    raise unreadable(status, headers, body, reason)


def _tolerant_choice(value: object) -> _Choice | None:
    """Return an answer that is not as it should be; None if it has no text that can be read."""
    choice = fields_of(value)
    finish_reason = name_of(choice.get("finish_reason"))
    if not isinstance(choice.get("message"), dict):
        said: Any = choice.get("text")
        return _Choice(text=said, finish_reason=finish_reason) if isinstance(said, str) else None
    message = fields_of(choice["message"])
    text = text_of(message.get("content"))
    if text is None:
        return None
    calls, function = message.get("tool_calls"), message.get("function_call")
    return _Choice(
        message=_Message(
            content=text,
            reasoning=thoughts_of(message),
            tool_calls=cast("list[Any]", calls) if isinstance(calls, list) else None,
            function_call=cast("dict[str, Any]", function) if isinstance(function, dict) else None,
        ),
        finish_reason=finish_reason,
    )
