"""A streamed answer on its way: writes what is due, and waits while the client does not read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from rxllm.testing._connection import Connection

BLOCK: Final = 65_536  # bytes written at once when nothing spaces the pieces


class Flow:
    """Writes the pieces of a body, `gap` seconds apart.

    Args:
        loop: where time passes.
        connection: who gets them.
        head: what goes before the first piece, with it.
        pieces: as they are to be written, the framing included; at least one.
        gap: seconds from one to the next; what could not be written in time follows as soon as the client reads.
        done: called after the last one.
    """

    __slots__ = ("_begun", "_connection", "_done", "_gap", "_loop", "_next", "_pieces", "_timer")

    def __init__(  # noqa: PLR0917 - private
        self,
        loop: asyncio.AbstractEventLoop,
        connection: Connection,
        head: bytes,
        pieces: list[bytes],
        gap: float,
        done: Callable[[], None],
    ) -> None:
        self._loop = loop
        self._connection: Connection | None = connection
        self._pieces = [head + pieces[0], *pieces[1:]] if gap else _blocks(head, pieces)
        self._gap = gap
        self._done = done
        self._next = 0
        self._begun = loop.time()
        self._timer: asyncio.TimerHandle | None = None

    def step(self) -> None:
        """Write what is due, and come again for the rest."""
        self._timer = None
        pieces = self._pieces
        while (connection := self._connection) is not None:
            if connection.is_blocked:
                connection.on_drained = self.step
                return
            if self._next == len(pieces):
                self._connection = None
                self._done()
                return
            wait = self._begun + self._next * self._gap - self._loop.time() if self._gap else 0.0
            if wait > 0:
                self._timer = self._loop.call_later(wait, self.step)
                return
            self._next += 1
            connection.write(pieces[self._next - 1])

    def cancel(self) -> None:
        """Write no more."""
        self._connection = None
        if self._timer is not None:
            self._timer.cancel()


def _blocks(head: bytes, pieces: list[bytes]) -> list[bytes]:
    """Return the same bytes in fewer pieces."""
    whole = b"".join([head, *pieces])
    return [whole[at : at + BLOCK] for at in range(0, len(whole), BLOCK)]


def framed(piece: bytes) -> bytes:
    """Return a piece as a chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)
