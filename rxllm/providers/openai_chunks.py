"""Puts streamed chat completions and completions together.

Nearly all pieces of an answer are alike: one choice, and a bit of text in it. A decoder that knows these and nothing
else takes them; whatever it refuses (a tool call, logprobs, the finish reason, the usage, a field that it has never
heard of) is decoded and merged in full. So nothing is lost, and text is cheap.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

import msgspec

from rxllm import clock
from rxllm.errors import DecodeError
from rxllm.messages import Chunk, Usage
from rxllm.providers._shared import fields_of, items_of, name_of
from rxllm.providers.faults import fault_in, request_id, unreadable
from rxllm.providers.openai_deltas import extend, merge_field, settled
from rxllm.providers.openai_fields import text_of, thoughts_of, usage_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rxllm.messages import Reply
    from rxllm.providers.base import Event

__all__ = ["ChatAssembler", "CompletionAssembler"]

T = TypeVar("T")
C = TypeVar("C")

DONE = b"[DONE]"
WRONG = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


class _Delta(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    role: str | None = None  # some say it with each piece
    refusal: None = None
    tool_calls: None = None
    function_call: None = None


class _Choice(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    delta: _Delta
    index: int = 0
    finish_reason: None = None
    logprobs: None = None
    native_finish_reason: None = None  # OpenRouter's
    stop_reason: None = None  # vLLM's
    token_ids: None = None  # vLLM's


class _Text(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    text: str
    index: int = 0
    finish_reason: None = None
    logprobs: None = None
    stop_reason: None = None
    token_ids: None = None


class _Piece(msgspec.Struct, Generic[C], forbid_unknown_fields=True, gc=False):
    """A piece with text and nothing else; what is the same in all of them is taken from the first."""

    choices: tuple[C]
    id: Any = None
    object: Any = None
    created: Any = None
    model: Any = None
    provider: Any = None
    service_tier: Any = None
    system_fingerprint: Any = None
    obfuscation: Any = None  # noise against eavesdroppers, in none of the answers that come in one piece
    usage: None = None


_decode_piece = msgspec.json.Decoder(_Piece[_Choice]).decode
_decode_text = msgspec.json.Decoder(_Piece[_Text]).decode
_decode_any = msgspec.json.Decoder().decode
_encode = msgspec.json.Encoder().encode


class _Answer:
    """One of the answers so far."""

    __slots__ = ("choice", "content", "finished", "message")

    def __init__(self) -> None:
        self.content: list[Any] = []  # texts, and parts that are none
        self.message: dict[str, Any] = {}  # the other fields of the message
        self.choice: dict[str, Any] = {}  # those beside it
        self.finished = False

    @property
    def text(self) -> str:
        return "".join([part if isinstance(part, str) else text_of([part]) or "" for part in self.content])

    def whole(self) -> Any:
        """Return the content as it is in an answer in one piece."""
        if all(isinstance(part, str) for part in self.content):
            return "".join(self.content) if self.content else None
        return [{"type": "text", "text": part} if isinstance(part, str) else part for part in self.content if part]


class ChatAssembler(Generic[T]):
    """Puts a chat completion together.

    Args:
        decode: the body of a complete answer -> its reply.
        status: of the answer.
        headers: of the answer.
        answers: how many were asked for.
    """

    __slots__ = ("_answers", "_decode", "_head", "_headers", "_status", "_wanted", "done", "usage")

    kind = "chat.completion"

    def __init__(
        self, decode: Callable[[bytes], Reply[T]], status: int, headers: Mapping[str, str], answers: int = 1
    ) -> None:
        self.done = False
        self.usage: Usage | None = None
        self._decode = decode
        self._status = status
        self._headers = headers
        self._wanted = answers
        self._head: dict[str, Any] = {}
        self._answers: dict[int, _Answer] = {}

    @property
    def text(self) -> str:
        """The text so far, of the first answer."""
        answer = self._answers.get(0) or next(iter(self._answers.values()), None)
        return "" if answer is None else answer.text

    def feed(self, event: Event) -> Chunk | None:
        """Take the next event; see `Assembler`."""
        data = event.data
        try:
            choice = _decode_piece(data).choices[0]
        except WRONG:
            return self._merge(event)
        answer = self._answers.get(choice.index)
        if answer is None:
            return self._merge(event)
        delta = choice.delta
        text = delta.content
        if delta.reasoning_content is None and delta.reasoning is None:
            if not text:
                return None
            answer.content.append(text)
            return Chunk(text=text, index=choice.index, raw=data)
        for name, thought in (("reasoning_content", delta.reasoning_content), ("reasoning", delta.reasoning)):
            if thought:
                merge_field(answer.message, name, thought)
        if text:
            answer.content.append(text)
        thoughts = delta.reasoning_content or delta.reasoning or ""
        return Chunk(text=text or "", reasoning=thoughts, index=choice.index, raw=data) if text or thoughts else None

    def _merge(self, event: Event) -> Chunk | None:
        """Take a piece that has more than text in it, or is the first."""
        data = event.data
        if data.startswith(DONE):
            self.done = True
            return None
        try:
            said: Any = _decode_any(data)
            if isinstance(said, dict):
                return self._take(cast("dict[str, Any]", said), event)
            reason = "a piece of it is no object"
        except WRONG as error:  # merging goes as deep as the data does
            reason = str(error)
        raise unreadable(self._status, self._headers, data, reason)

    def _take(self, said: dict[str, Any], event: Event) -> Chunk | None:
        if said.get("error") or said.get("object") == "error" or event.name == "error":
            raise fault_in(
                "openai", said, now=clock.wall(), status=self._status, headers=self._headers, begun=bool(self.text)
            )
        choices = items_of(said.pop("choices", None))
        usage: Any = said.get("usage") or fields_of(said.get("x_groq")).get("usage")  # Groq's, at the end
        if usage:
            said["usage"] = usage
            self.usage = usage_of(usage)
        for name, value in said.items():
            if value is not None or name not in self._head:
                self._head[name] = value
        shown = [chunk for choice in choices if (chunk := self._take_choice(fields_of(choice), event.data))]
        if shown:
            return msgspec.structs.replace(shown[0], usage=self.usage) if usage else shown[0]
        return Chunk(usage=self.usage, raw=event.data) if usage else None

    def _take_choice(self, choice: dict[str, Any], raw: bytes) -> Chunk | None:
        index: Any = choice.pop("index", None)
        index = index if isinstance(index, int) else 0
        answer = self._answers.get(index)
        if answer is None:
            answer = self._answers[index] = _Answer()
        text, thoughts, more = self._take_text(answer, choice)
        extend(answer.choice, choice)
        finish_reason = name_of(choice.get("finish_reason")) or None
        if finish_reason is not None:
            answer.finished = True
        if text or thoughts or more or finish_reason is not None or choice.get("logprobs"):
            return Chunk(text=text, reasoning=thoughts, index=index, finish_reason=finish_reason, raw=raw)
        return None

    def _take_text(self, answer: _Answer, choice: dict[str, Any]) -> tuple[str, str, bool]:
        """Take what is said out of a choice: return text and thoughts, and whether there is more than these."""
        delta = fields_of(choice.pop("delta", None))
        thoughts = thoughts_of(delta)
        content: Any = delta.pop("content", None)
        text = text_of(content) or ""
        if isinstance(content, list):
            answer.content += cast("list[Any]", content)
        elif content is not None:
            answer.content.append(text)
        for name, value in delta.items():
            merge_field(answer.message, name, value)
        return text, thoughts, any(value for name, value in delta.items() if name != "role")

    def finish(self) -> Reply[T]:
        """Return the whole answer; see `Assembler`.

        Raises:
            DecodeError: an answer has no finish reason, so it is cut off, whatever else the server says.
        """
        answers = self._answers
        if not answers:
            raise unreadable(self._status, self._headers, b"", "it has nothing in it")
        if not all(answer.finished for answer in answers.values()) or (not self.done and len(answers) < self._wanted):
            msg = "the answer broke off: it has no finish reason"
            raise DecodeError(msg, self._status, None, request_id(self._headers))
        head = {name: value for name, value in self._head.items() if name != "obfuscation"}
        try:
            choices = [self._choice(index, answers[index]) for index in sorted(answers)]
            body = _encode({**head, "object": self.kind, "choices": choices})
        except RecursionError as error:
            reason = str(error)
        else:
            return self._decode(body)
        raise unreadable(self._status, self._headers, b"", reason)

    def _choice(self, index: int, answer: _Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.whole(), **settled(answer.message)}
        for call in items_of(message.get("tool_calls")):
            fields_of(call).pop("index", None)
        return {"index": index, "message": message, **answer.choice}


class CompletionAssembler(ChatAssembler[T]):
    """Puts a completion together."""

    __slots__ = ()

    kind = "text_completion"

    def feed(self, event: Event) -> Chunk | None:
        """Take the next event; see `Assembler`."""
        data = event.data
        try:
            choice = _decode_text(data).choices[0]
        except WRONG:
            return self._merge(event)
        answer = self._answers.get(choice.index)
        if answer is None:
            return self._merge(event)
        if not choice.text:
            return None
        answer.content.append(choice.text)
        return Chunk(text=choice.text, index=choice.index, raw=data)

    def _take_text(self, answer: _Answer, choice: dict[str, Any]) -> tuple[str, str, bool]:
        text = text_of(choice.pop("text", None)) or ""
        answer.content.append(text)
        return text, "", False

    def _choice(self, index: int, answer: _Answer) -> dict[str, Any]:
        return {"index": index, "text": answer.text, **answer.choice}
