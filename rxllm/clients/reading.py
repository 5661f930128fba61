"""A streamed answer that is being read: bytes to events to chunks, and at the end the reply."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

import msgspec

from rxllm.errors import CallError
from rxllm.messages import Chunk, Reply
from rxllm.providers.base import Event
from rxllm.transports.sse import SseParser

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Collection

    from rxllm.providers.base import Assembler
    from rxllm.transports.base import Answer

__all__ = ["InOnePiece", "Reading", "whole"]

T = TypeVar("T")


def _nobody(_chunk: Chunk) -> None:
    """Show nothing: nobody looks."""


class Reading(Generic[T]):
    """An answer in pieces.

    Args:
        answer: what brings the bytes.
        assembler: puts them together.
        refine: (error, event) -> the error to raise; the event is what it was made of, None if it came of no event.
        learn: called with the reply.
        clean: (the data of an event) -> the same without the key, which some servers echo.
    """

    __slots__ = (
        "_answer",
        "_assembler",
        "_backlog",
        "_clean",
        "_learn",
        "_parser",
        "_problem",
        "_refine",
        "_show",
        "_showing",
        "reply",
        "shown",
    )

    def __init__(
        self,
        answer: Answer,
        assembler: Assembler[T],
        refine: Callable[[CallError, Event | None], CallError],
        learn: Callable[[Reply[T]], None],
        clean: Callable[[bytes], bytes] = bytes,
    ) -> None:
        self.reply: Reply[T] | None = None  # the whole, once it is read
        self.shown = False  # whether any of it was shown
        self._answer = answer
        self._assembler = assembler
        self._refine = refine
        self._learn = learn
        self._clean = clean
        self._parser = SseParser()
        self._problem: CallError | None = None  # what the next read raises: what came before it is shown first
        self._show: Callable[[Chunk], object] = _nobody
        self._showing = False
        self._backlog: Collection[object] = ()

    async def run(self, show: Callable[[Chunk], object], backlog: Collection[object] = ()) -> bool:
        """Show each chunk as it comes, and read no further while there is a backlog.

        Args:
            show: called with each chunk, often from where the socket is read. What it raises, this raises.
            backlog: what was shown and has found no room yet.

        Returns:
            Whether to go on, once there is room; False: all of it was shown.

        Raises:
            CallError: the answer broke off, is an error, or cannot be understood.
        """
        if self.reply is None and self._problem is None:
            self._show, self._backlog = show, backlog
            await self._run()
        if backlog:
            return True
        if self._problem is not None:
            raise self._problem
        return self.reply is None

    async def _run(self) -> None:
        try:
            more = await self._pour()
            if self._problem is not None:
                self._answer.close()
                return
            if more and not self._assembler.done:
                return
            reply = self._assembler.finish()
        except CallError as error:
            if self._showing:
                raise
            problem = error
        else:
            self._learn(reply)
            self.reply = reply
            self._answer.close(drain=True)
            return
        self._fail(problem, None)
        self._answer.close()

    async def _pour(self) -> bool:
        """Have the answer's pieces taken until that is enough; say whether it was."""
        pour: Callable[[Callable[[bytes], bool]], Awaitable[bool]] | None = getattr(self._answer, "pour", None)
        if pour is not None:
            return await pour(self._take)
        while piece := await self._answer.read():
            if self._take(piece):
                return True
        return False

    def _take(self, piece: bytes) -> bool:
        """Take the next bytes and show the chunks that end in them; say whether that is enough for now."""
        assembler, show, clean = self._assembler, self._show, self._clean
        event: Event | None = None
        try:
            for event in self._parser.feed(piece):
                data = clean(event.data)
                if data is not event.data:
                    event = msgspec.structs.replace(event, data=data)  # noqa: PLW2901  for its error too
                chunk = assembler.feed(event)
                if chunk is not None:
                    self._showing = self.shown = True
                    show(chunk)
                    self._showing = False
                if assembler.done:
                    return True
        except CallError as error:
            if self._showing:
                raise
            problem = error
        else:
            return bool(self._backlog)
        self._fail(problem, event)
        return True

    def _fail(self, error: CallError, event: Event | None) -> None:
        """Keep an error until it is its turn: `event` is what it was made of."""
        problem = self._refine(error, event)
        problem.partial = self._assembler.text or None
        if problem.usage is None:
            problem.usage = self._assembler.usage
        self._problem = problem

    def close(self) -> None:
        """Give the answer up; again, or after its end, is harmless."""
        self._answer.close()


class InOnePiece(Generic[T]):
    """An answer that came in one piece although many were asked for."""

    __slots__ = ("_whole", "reply", "shown")

    def __init__(self, reply: Reply[T]) -> None:
        self.reply: Reply[T] | None = reply
        self.shown = False
        self._whole = reply

    async def run(self, show: Callable[[Chunk], object], backlog: Collection[object] = ()) -> bool:
        """Show all of it, once; see `Reading`."""
        if not self.shown:
            self.shown = True
            reply = self._whole
            show(
                Chunk(
                    text=reply.text,
                    reasoning=reply.reasoning,
                    finish_reason=reply.finish_reason,
                    usage=reply.usage,
                    raw=reply.raw,
                )
            )
        return bool(backlog)

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
