"""A streamed answer that is being read: bytes to events to chunks, and at the end the reply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

from rxllm.errors import CallError
from rxllm.messages import Chunk, Reply
from rxllm.providers.base import Event
from rxllm.transports.sse import SseParser

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rxllm.providers.base import Assembler
    from rxllm.transports.base import Answer

__all__ = ["InOnePiece", "Reading", "whole"]

T = TypeVar("T")


class Reading(Generic[T]):
    """An answer in pieces.

    Args:
        answer: what brings the bytes.
        assembler: puts them together.
        refine: (error, event) -> the error to raise; the event is what it was made of, None if it came of no event.
        learn: called with the reply.
    """

    __slots__ = ("_answer", "_assembler", "_learn", "_parser", "_problem", "_refine", "reply")

    def __init__(
        self,
        answer: Answer,
        assembler: Assembler[T],
        refine: Callable[[CallError, Event | None], CallError],
        learn: Callable[[Reply[T]], None],
    ) -> None:
        self.reply: Reply[T] | None = None  # the whole, once it is read
        self._answer = answer
        self._assembler = assembler
        self._refine = refine
        self._learn = learn
        self._parser = SseParser()
        self._problem: CallError | None = None  # what the next read raises: what came before it is shown first

    async def read(self) -> Sequence[Chunk]:
        """Return the next chunks, one or more; none at the end.

        Raises:
            CallError: the answer broke off, is an error, or cannot be understood.
        """
        chunks: list[Chunk] = []
        if self.reply is None and self._problem is None:
            await self._read(chunks)
        if not chunks and self._problem is not None:
            raise self._problem
        return chunks

    async def _read(self, chunks: list[Chunk]) -> None:
        assembler = self._assembler
        event: Event | None = None
        try:
            while not chunks:
                piece = await self._answer.read()
                for event in self._parser.feed(piece):
                    chunk = assembler.feed(event)
                    if chunk is not None:
                        chunks.append(chunk)
                    if assembler.done:
                        break
                if assembler.done or not piece:
                    event = None
                    reply = assembler.finish()
                    self._learn(reply)
                    self.reply = reply
                    self._answer.close(drain=True)
                    return
                event = None
        except CallError as error:
            problem = error
        else:
            return
        problem = self._refine(problem, event)
        problem.partial = assembler.text or None
        if problem.usage is None:
            problem.usage = assembler.usage
        self._problem = problem
        self._answer.close()

    def close(self) -> None:
        """Give the answer up; again, or after its end, is harmless."""
        self._answer.close()


class InOnePiece(Generic[T]):
    """An answer that came in one piece although many were asked for."""

    __slots__ = ("_shown", "reply")

    def __init__(self, reply: Reply[T]) -> None:
        self.reply: Reply[T] | None = reply
        self._shown = False

    async def read(self) -> Sequence[Chunk]:
        """Return all of it, once."""
        reply = self.reply
        if self._shown or reply is None:
            return ()
        self._shown = True
        return (
            Chunk(
                text=reply.text,
                reasoning=reply.reasoning,
                finish_reason=reply.finish_reason,
                usage=reply.usage,
                raw=reply.raw,
            ),
        )

    def close(self) -> None:
        """Nothing is open."""


async def whole(answer: Answer) -> bytes:
    """Read an answer to its end.

    Raises:
        CallError: it broke off.
    """
    parts: list[bytes] = []
    try:
        while part := await answer.read():
            parts.append(part)
    finally:
        answer.close()
    return b"".join(parts)
