"""A transport without a network: a function answers."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from rxllm.errors import CancelledError, check_callable, check_number
from rxllm.transports.base import Response

if TYPE_CHECKING:
    from rxllm.policies.timeouts import Timeouts
    from rxllm.providers.base import Call

__all__ = ["MemoryTransport"]

Body = bytes | Iterable[bytes] | AsyncIterable[bytes]
Answered = tuple[int, Mapping[str, str], Body]  # a Response is one


class MemoryTransport:
    """Answers calls with a function, for tests and measurements of everything but the network.

    Args:
        handler: `Call` -> the answer, or an awaitable of it: a `Response`, or its status, headers (names in lower case)
            and pieces, as an iterable or an asynchronous one. What it raises is what the call raises; what the pieces
            raise comes after those before. Nothing more is taken of them than is read.
        latency: Seconds before the handler is asked.

    Raises:
        ConfigError: An argument of another kind.

    Example:
        >>> transport = MemoryTransport(lambda call: Response(200, {}, b"{}"))
        >>> streaming = MemoryTransport(lambda call: (200, {}, [b"data: a", b"bc"]))
    """

    def __init__(self, handler: Callable[[Call], Answered | Awaitable[Answered]], *, latency: float = 0.0) -> None:
        check_callable("handler", handler)
        check_number("latency", latency, least=0)
        self._handler = handler
        self._latency = latency

    async def send(self, call: Call, timeouts: Timeouts) -> Response:  # noqa: ARG002  nothing is slow here
        """Return what the handler answers; at least one turn of the loop passes."""
        status, headers, body = await self._ask(call)
        if not isinstance(body, bytes):
            body = b"".join([piece async for piece in _pieces(body)])
        return Response(status, headers, body)

    async def open(self, call: Call, timeouts: Timeouts) -> MemoryAnswer:  # noqa: ARG002  the same
        """Return what the handler answers, in its pieces; at least one turn of the loop passes, and one for each."""
        status, headers, body = await self._ask(call)
        return MemoryAnswer(status, headers, _pieces(body))

    async def _ask(self, call: Call) -> Answered:
        await asyncio.sleep(self._latency)
        answer = self._handler(call)
        return await answer if inspect.isawaitable(answer) else answer

    async def aclose(self) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""


class MemoryAnswer:
    """See `rxllm.transports.base.Answer`."""

    def __init__(self, status: int, headers: Mapping[str, str], pieces: AsyncIterator[bytes]) -> None:
        self.status = status
        self.headers = headers
        self.closed = False
        self._pieces: AsyncIterator[bytes] | None = pieces

    async def read(self) -> bytes:
        """Return the next piece; nothing at the end."""
        if self._pieces is None:
            if self.closed:
                msg = "the answer was closed before its end"
                raise CancelledError(msg)
            return b""
        async for piece in self._pieces:
            if piece:
                return piece
        self._pieces = None
        return b""

    def close(self, *, drain: bool = False) -> None:  # noqa: ARG002  nothing is left to come by itself
        """Give it up: the loop closes an asynchronous generator that nobody holds any more."""
        self.closed = self.closed or self._pieces is not None
        self._pieces = None


async def _pieces(body: Body) -> AsyncIterator[bytes]:
    if isinstance(body, AsyncIterable):
        async for piece in body:
            yield piece
        return
    for piece in (body,) if isinstance(body, bytes) else body:
        await asyncio.sleep(0)
        yield piece
