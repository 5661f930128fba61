"""Anthropic's messages as they are streamed: events to chunks, and at the end the message."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from rxllm.clock import wall
from rxllm.errors import CallError, DecodeError
from rxllm.messages import Chunk, Reply, Usage
from rxllm.providers._shared import UNREADABLE, fields_of, items_of, name_of, text_of, whole
from rxllm.providers.faults import fault_in, parsed, request_id

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rxllm.providers.base import Event

__all__ = ["MessageAssembler", "usage_of"]

T = TypeVar("T")


PIECE = "content_block_delta"  # the event that nearly all are


class _Delta(msgspec.Struct):
    type: str
    text: str = ""


class _Envelope(msgspec.Struct):
    """What is read of each event; the rest of those that are no piece of a text is read once more."""

    type: str
    index: int = 0
    delta: _Delta | None = None


_decoder = msgspec.json.Decoder(_Envelope)


class MessageAssembler(Generic[T]):
    """Puts a streamed message together; see `Assembler`.

    It is complete with `message_stop` and a stop reason. Events of types that nobody knows yet are left out, as the
    dialect demands; fields and kinds of pieces that nobody knows yet are kept.

    Args:
        decode: the body of a message -> its reply.
        status: of the answer.
        headers: of the answer.
    """

    __slots__ = ("_blocks", "_decode", "_headers", "_message", "_status", "_texts", "_usage", "done")

    def __init__(self, decode: Callable[[bytes], Reply[T]], status: int, headers: Mapping[str, str]) -> None:
        self._decode = decode
        self._status = status
        self._headers = headers
        self._message: dict[str, Any] | None = None  # all but its content
        self._blocks: dict[int, _Block] = {}
        self._texts: list[str] = []
        self._usage: Usage | None = None
        self.done = False

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    @property
    def usage(self) -> Usage | None:
        """What was used, as far as the server has told."""
        return self._usage

    def feed(self, event: Event) -> Chunk | None:
        """Take the next event; return what it shows, None if that is nothing.

        Raises:
            CallError: the event is an error, or cannot be understood.
        """
        data = event.data
        try:
            said = _decoder.decode(data)
        except UNREADABLE:
            said = None
        if said is None or (delta := said.delta) is None or delta.type != "text_delta" or said.type != PIECE:
            return self._other(event)
        block = self._blocks.get(said.index)
        if block is None:
            raise self._garbled(f"a piece of block {said.index}, which has not begun")
        return self._show(block, delta.text, data)

    def finish(self) -> Reply[T]:
        """Return the whole answer, as `decode` would have.

        Raises:
            DecodeError: it is not complete.
        """
        message = self._message
        if message is None or not self.done or message.get("stop_reason") is None:
            missing = "message_stop" if not self.done else "stop_reason"
            msg = f"the answer stopped before its end: no {missing} has come"
            raise DecodeError(msg, self._status, None, request_id(self._headers))
        content = [self._blocks[index].whole() for index in sorted(self._blocks)]
        return self._decode(msgspec.json.encode({**message, "content": content}))

    def _other(self, event: Event) -> Chunk | None:
        """Take any event but a piece of a text."""
        said = parsed(event.data)
        fields = fields_of(said)
        kind = fields.get("type") or event.name
        if kind == "error" or event.name == "error":
            begun = bool(self._blocks)
            raise fault_in("anthropic", said, status=self._status, headers=self._headers, now=wall(), begun=begun)
        if not isinstance(said, dict):
            if event.data == b"[DONE]":  # some gateways end every stream like this
                return None
            raise self._garbled("an event that is no JSON object")
        match kind:
            case "message_start":
                self._start(fields)
            case "content_block_start":
                return self._begin(fields, event.data)
            case "content_block_delta":
                return self._piece(fields, event.data)
            case "message_delta":
                return self._change(fields, event.data)
            case "message_stop":
                self.done = True
            case _:  # nothing is needed of it: ping, content_block_stop, and those that are still to come
                pass
        return None

    def _show(self, block: _Block, text: str, data: bytes) -> Chunk | None:
        block.texts.append(text)
        self._texts.append(text)
        return Chunk(text=text, raw=data) if text else None

    def _start(self, said: dict[str, Any]) -> None:
        message = fields_of(said.get("message"))
        if not message or self._message is not None:
            raise self._garbled("a message that is none, or a second one")
        self._message = {key: value for key, value in message.items() if key != "content"}
        self._count()

    def _begin(self, said: dict[str, Any], data: bytes) -> Chunk | None:
        index, content = said.get("index"), fields_of(said.get("content_block"))
        if not isinstance(index, int) or index in self._blocks or not content:
            raise self._garbled("a block that is none, or that has begun before")
        block = self._blocks[index] = _Block(content)
        text, thought = block.shown("text"), block.shown("thinking")
        if text:
            self._texts.append(text)
        if not text and not thought and block.fields.get("type") in HOLLOW:
            return None
        return Chunk(text=text, reasoning=thought, raw=data)

    def _piece(self, said: dict[str, Any], data: bytes) -> Chunk | None:
        index, delta = said.get("index"), fields_of(said.get("delta"))
        block = self._blocks.get(index) if isinstance(index, int) else None
        if block is None or not delta:
            raise self._garbled("a piece that is none, or of a block that has not begun")
        kind = delta.get("type")
        if kind == "text_delta":  # of an event that does not say its type itself
            return self._show(block, text_of(delta.get("text")), data)
        if kind == "thinking_delta":
            thought = text_of(delta.get("thinking"))
            block.thoughts.append(thought)
            return Chunk(reasoning=thought, raw=data) if thought else None
        if kind == "input_json_delta":
            block.inputs.append(text_of(delta.get("partial_json")))
        elif kind == "citations_delta":
            block.citations.append(delta.get("citation"))
        else:
            block.merge(delta)
            if kind == "signature_delta":
                return None
        return Chunk(raw=data)

    def _change(self, said: dict[str, Any], data: bytes) -> Chunk | None:
        """Take what becomes known of the message at its end."""
        message = self._message
        if message is None:
            raise self._garbled("the end of a message that has not begun")
        delta = fields_of(said.get("delta"))
        further = {key: value for key, value in said.items() if key not in {"type", "delta", "usage"}}
        _update(message, {**further, **delta})
        used = fields_of(said.get("usage"))
        if used:
            message["usage"] = _update({**fields_of(message.get("usage"))}, used)  # totals, no differences
            self._count()
        return Chunk(finish_reason=name_of(delta.get("stop_reason")), usage=self._usage, raw=data)

    def _count(self) -> None:
        said = fields_of(fields_of(self._message).get("usage"))
        if said:
            self._usage = usage_of(said)

    def _garbled(self, what: str) -> CallError:
        return DecodeError(f"the stream has {what}", self._status, None, request_id(self._headers))


HOLLOW = frozenset({"text", "thinking"})  # blocks that begin with nothing in them


class _Block:
    """A block of the content: as it began, and what has come since."""

    __slots__ = ("citations", "fields", "inputs", "texts", "thoughts")

    def __init__(self, fields: dict[str, Any]) -> None:
        self.fields = fields
        self.texts: list[str] = []
        self.thoughts: list[str] = []
        self.inputs: list[str] = []
        self.citations: list[Any] = []

    def shown(self, name: str) -> str:
        """Return what the block began with."""
        return text_of(self.fields.get(name)) if self.fields.get("type") == name else ""

    def merge(self, delta: dict[str, Any]) -> None:
        """Take a piece of a kind of its own: texts grow, all else is replaced."""
        fields = self.fields
        for name, value in delta.items():
            if name != "type":
                old = fields.get(name)
                fields[name] = old + value if isinstance(old, str) and isinstance(value, str) else value

    def whole(self) -> dict[str, Any]:
        """Return the block as it is in an answer in one piece."""
        fields = self.fields
        if self.texts:
            fields["text"] = "".join([text_of(fields.get("text")), *self.texts])
        if self.thoughts:
            fields["thinking"] = "".join([text_of(fields.get("thinking")), *self.thoughts])
        if self.citations:
            fields["citations"] = [*items_of(fields.get("citations")), *self.citations]
        if any(self.inputs):
            written = "".join(self.inputs)
            # an answer that ends in the middle of a call: what there is of its input is no JSON, so it stays a text
            fields["input"] = msgspec.Raw(written.encode()) if isinstance(parsed(written.encode()), dict) else written
        self.texts, self.thoughts, self.inputs, self.citations = [], [], [], []
        return fields


def _update(fields: dict[str, Any], news: dict[str, Any]) -> dict[str, Any]:
    """Put news into fields; what is null says nothing."""
    for name, value in news.items():
        if value is not None or name not in fields:
            fields[name] = value
    return fields


def usage_of(said: object) -> Usage:
    """Return what a message has used, as far as it can be read. Its own `input_tokens` are those of no cache."""
    fields = fields_of(said)
    read, written = whole(fields.get("cache_read_input_tokens")), whole(fields.get("cache_creation_input_tokens"))
    return Usage(
        input_tokens=whole(fields.get("input_tokens")) + written + read,
        output_tokens=whole(fields.get("output_tokens")),
        cached_tokens=read,
        cache_write_tokens=written,
        reasoning_tokens=whole(fields_of(fields.get("output_tokens_details")).get("thinking_tokens")),
    )
