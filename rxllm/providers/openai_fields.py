"""What the answers of OpenAI's family have in common: their fields, read whatever a server puts there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec

from rxllm.messages import ToolCall, Usage
from rxllm.providers._shared import fields_of, items_of, name_of, whole

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = [
    "NO_USAGE",
    "calls_of",
    "refusal_in",
    "size_of",
    "text_of",
    "thoughts_of",
    "usage_of",
]

NO_USAGE = Usage()
TOKEN = 4  # bytes that a token stands for, where tokens are given instead of text


def text_of(content: object) -> str | None:
    """Return the text of a message: it is a text, a list of parts, or nothing. None for what is none of these.

    >>> text_of("Hi"), text_of([{"type": "text", "text": "H"}, {"text": "i"}, {"type": "image_url"}]), text_of(None)
    ('Hi', 'Hi', '')
    """
    if content is None:
        return ""
    if isinstance(content, list):
        return "".join(_texts(cast("list[Any]", content), "text"))
    return content if isinstance(content, str) else None


def thoughts_of(message: Mapping[str, Any]) -> str:
    """Return what a model has thought, in whichever field a server tells it."""
    for name in ("reasoning_content", "reasoning"):
        if isinstance(message.get(name), str) and message[name]:
            return cast("str", message[name])
    details = items_of(message.get("reasoning_details"))  # OpenRouter's
    found = [*_texts(details, "text"), *_texts(details, "summary")]
    for part in items_of(message.get("content")):  # Mistral's: parts of the content that have parts
        found += _texts(items_of(fields_of(part).get("thinking")), "text")
    return "".join(found)


def _texts(parts: list[Any], name: str) -> list[str]:
    texts = [fields_of(part).get(name) for part in parts]
    return [text for text in texts if isinstance(text, str)]


def calls_of(calls: object, function: object = None) -> tuple[ToolCall, ...]:
    """Return what a message wants called.

    Args:
        calls: its `tool_calls`.
        function: its `function_call`, which older models have instead.
    """
    found = [_call(fields) for call in items_of(calls) if (fields := fields_of(call))]
    if isinstance(function, dict):
        found.append(_call({"function": cast("dict[str, Any]", function)}))
    return tuple(found)


def _call(fields: dict[str, Any]) -> ToolCall:
    what = fields_of(fields.get("function") or fields.get("custom"))
    arguments: Any = what.get("arguments", what.get("input"))
    if arguments is None:
        arguments = ""
    if not isinstance(arguments, str):  # some servers give the arguments themselves
        arguments = msgspec.json.encode(arguments).decode()
    return ToolCall(id=name_of(fields.get("id")) or "", name=name_of(what.get("name")) or "", arguments=arguments)


def refusal_in(said: object) -> str | None:
    """Return why a model would not answer, if it says so: in a chat completion or a response."""
    body = fields_of(said)
    message = fields_of(fields_of(next(iter(items_of(body.get("choices"))), None)).get("message"))
    found: list[Any] = [message.get("refusal")]
    for item in items_of(body.get("output")):
        found += [fields_of(part).get("refusal") for part in items_of(fields_of(item).get("content"))]
    return next((text for text in found if isinstance(text, str) and text), None)


def usage_of(said: object) -> Usage:
    """Return the usage as far as it can be read: that of a completion, or that of a response."""
    fields = fields_of(said)
    inputs = fields_of(fields.get("prompt_tokens_details") or fields.get("input_tokens_details"))
    outputs = fields_of(fields.get("completion_tokens_details") or fields.get("output_tokens_details"))
    return Usage(
        input_tokens=whole(fields.get("prompt_tokens", fields.get("input_tokens"))),
        output_tokens=whole(fields.get("completion_tokens", fields.get("output_tokens"))),
        cached_tokens=whole(inputs.get("cached_tokens")),
        reasoning_tokens=whole(outputs.get("reasoning_tokens")),
        cache_write_tokens=whole(inputs.get("cache_write_tokens")),
    )


def size_of(prompt: object, depth: int = 6) -> int:
    """Return the size of a prompt in bytes: a text, messages, parts of them, or tokens; nothing deeper than these.

    >>> size_of("four"), size_of(["four", "five"]), size_of([{"role": "user", "content": "four"}]), size_of([1, 2])
    (4, 8, 4, 8)
    """
    if isinstance(prompt, str):
        return len(prompt) if prompt.isascii() else len(prompt.encode(errors="replace"))
    if isinstance(prompt, list | tuple):
        total = 0
        for part in cast("list[Any]", prompt) if depth else ():
            text: Any = cast("dict[str, Any]", part).get("content") if type(part) is dict else part
            plain = type(text) is str and text.isascii()  # most parts are messages of one such text
            total += len(text) if plain else size_of(cast("Any", part), depth - 1)
        return total
    if isinstance(prompt, dict):
        fields = cast("dict[str, Any]", prompt)
        found = next((fields[name] for name in ("content", "text", "output") if fields.get(name)), None)
        return size_of(found, depth - 1) if depth else 0
    return TOKEN if isinstance(prompt, int) else 0
