"""The answers of OpenAI's Responses, in one piece and streamed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import msgspec

from rxllm import clock
from rxllm.errors import CancelledError, DecodeError
from rxllm.messages import Chunk, Reply, ToolCall, Usage
from rxllm.providers._shared import fields_of, items_of, name_of
from rxllm.providers.faults import fault_in, is_html, parsed, request_id, unreadable
from rxllm.providers.openai_fields import usage_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rxllm.providers.base import Event

__all__ = ["ResponseAssembler", "decode_response"]

T = TypeVar("T")


def decode_response(status: int, headers: Mapping[str, str], body: bytes) -> Reply[Any]:
    """Return the reply of a complete answer with a 2xx status; its value is its text.

    The finish reason is why the response is incomplete, else its status: "completed"; "queued" or "in_progress" of one
    that goes on in the background.

    Raises:
        CallError: it has failed, was cancelled, or cannot be understood.
    """
    value = parsed(body)
    said = fields_of(value)
    state = name_of(said.get("status")) or "completed"
    if said.get("error") or state == "failed":
        fault = {"error": said.get("error") or "the response has failed"}
        raise fault_in("openai", fault, now=clock.wall(), status=status, headers=headers)
    if state == "cancelled":
        msg = "the response was cancelled on the server"
        raise CancelledError(msg, status, None, request_id(headers), body)
    if not isinstance(said.get("output"), list):
        raise unreadable(status, headers, body, "it has no output" if said else "it is no object")
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for item in map(fields_of, items_of(said["output"])):
        kind = name_of(item.get("type"))
        if kind == "message":
            texts += _texts(item.get("content"))
        elif kind == "reasoning":
            thoughts += _texts(item.get("content")) or _texts(item.get("summary"))
        elif kind in {"function_call", "custom_tool_call"}:
            calls.append(_call(item))
    text = "".join(texts)
    return Reply(
        value=text,
        text=text,
        usage=usage_of(said.get("usage")),
        reasoning="\n\n".join(thoughts),
        tool_calls=tuple(calls),
        model=name_of(said.get("model")),
        id=name_of(said.get("id")),
        finish_reason=_ending(said),
        status=status,
        raw=body,
    )


def _ending(said: dict[str, Any]) -> str:
    """Return why a response has ended, or has not yet."""
    return (
        name_of(fields_of(said.get("incomplete_details")).get("reason")) or name_of(said.get("status")) or "completed"
    )


def _texts(parts: object) -> list[str]:
    texts = [fields_of(part).get("text") for part in items_of(parts)]
    return [text for text in texts if isinstance(text, str)]


def _call(item: dict[str, Any]) -> ToolCall:
    arguments: Any = item.get("arguments", item.get("input"))
    return ToolCall(
        id=name_of(item.get("call_id")) or name_of(item.get("id")) or "",
        name=name_of(item.get("name")) or "",
        arguments=arguments if isinstance(arguments, str) else msgspec.json.encode(arguments or {}).decode(),
    )


class _Event(msgspec.Struct, gc=False):
    type: str = ""
    delta: str = ""


_decode_event = msgspec.json.Decoder(_Event).decode
_encode = msgspec.json.Encoder().encode

TEXT = "response.output_text.delta"
THOUGHTS = frozenset({"response.reasoning_summary_text.delta", "response.reasoning_text.delta"})
ITEM = "response.output_item.done"
LAST = frozenset({"response.cancelled", "response.completed", "response.failed", "response.incomplete"})
SHOWN = (".delta", ".partial_image")  # how the types of events end that are pieces of the answer


class ResponseAssembler(Generic[T]):
    """Puts a response together: its last event has the whole of it.

    Args:
        decode: the body of a complete answer -> its reply.
        status: of the answer.
        headers: of the answer.
    """

    __slots__ = ("_decode", "_headers", "_items", "_response", "_status", "_texts")

    def __init__(self, decode: Callable[[bytes], Reply[T]], status: int, headers: Mapping[str, str]) -> None:
        self._decode = decode
        self._status = status
        self._headers = headers
        self._texts: list[str] = []
        self._items: list[bytes] = []
        self._response: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    @property
    def usage(self) -> Usage | None:
        """What was used; the last event tells it."""
        said = None if self._response is None else self._response.get("usage")
        return usage_of(said) if said else None

    @property
    def done(self) -> bool:
        """Whether the last event has come."""
        return self._response is not None

    def feed(self, event: Event) -> Chunk | None:
        """Take the next event; see `Assembler`."""
        data = event.data
        try:
            said = _decode_event(data)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return self._take_odd(event)
        kind = said.type or event.name
        if kind == TEXT:
            self._texts.append(said.delta)
            return Chunk(text=said.delta, raw=data) if said.delta else None
        if kind in THOUGHTS:
            return Chunk(reasoning=said.delta, raw=data) if said.delta else None
        if kind in LAST or kind in {"", "error"}:
            return self._take_last(kind, event)
        if kind == ITEM:
            self._items.append(data)
        return Chunk(raw=data) if kind.endswith(SHOWN) else None

    def _take_odd(self, event: Event) -> Chunk | None:
        """Take an event whose delta is no text, which nobody has heard of yet."""
        said = parsed(event.data)
        if not isinstance(said, dict):
            if event.data.startswith(b"[DONE]"):  # of servers that say it after each stream
                return None
            raise unreadable(self._status, self._headers, event.data, "a piece of it is no object")
        return self._take_last("", event)

    def _take_last(self, kind: str, event: Event) -> Chunk | None:
        said = fields_of(parsed(event.data))
        if kind in LAST:
            self._response = {"status": kind.removeprefix("response."), **fields_of(said.get("response"))}
        error: Any = said.get("error")
        if kind == "error":
            error = error or {name: said.get(name) for name in ("code", "message", "param")}
        elif kind == "response.failed":
            error = fields_of(self._response).get("error") or "the response has failed"
        if error:
            raise fault_in(
                "openai",
                {"error": error},
                now=clock.wall(),
                status=self._status,
                headers=self._headers,
                begun=bool(self._texts),
            )
        if self._response is None:
            return Chunk(raw=event.data)
        return Chunk(finish_reason=_ending(self._response), usage=self.usage, raw=event.data)

    def finish(self) -> Reply[T]:
        """Return the whole answer; see `Assembler`.

        Raises:
            DecodeError: its last event has not come.
        """
        response = self._response
        if response is None:
            if is_html(self._headers, b""):
                raise unreadable(self._status, self._headers, b"", "")
            msg = "the answer broke off: its last event has not come"
            raise DecodeError(msg, self._status, None, request_id(self._headers))
        if not response.get("output"):  # some servers say it in the events before only
            items = [fields_of(parsed(item)).get("item") for item in self._items]
            response["output"] = [cast("object", item) for item in items if isinstance(item, dict)]
        return self._decode(_encode(response))
