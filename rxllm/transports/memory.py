"""A transport without a network: a function answers."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING

from rxllm.errors import check_callable, check_number
from rxllm.transports.base import Response

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from rxllm.policies.timeouts import Timeouts

__all__ = ["MemoryTransport"]


class MemoryTransport:
    """Answers calls with a function, for tests and measurements of everything but the network.

    Args:
        handler: (path, body) -> the answer, or an awaitable of it; what it raises is what the call raises.
        latency: Seconds before the handler is asked.

    Raises:
        ConfigError: An argument of another kind.

    Example:
        >>> transport = MemoryTransport(lambda path, body: Response(200, {}, b"{}"))
    """

    def __init__(
        self, handler: Callable[[str, bytes], Response | Awaitable[Response]], *, latency: float = 0.0
    ) -> None:
        check_callable("handler", handler)
        check_number("latency", latency, least=0)
        self._handler = handler
        self._latency = latency

    async def post(self, path: str, body: bytes, timeouts: Timeouts) -> Response:  # noqa: ARG002  nothing is slow here
        """Return what the handler answers; at least one turn of the loop passes."""
        await asyncio.sleep(self._latency)
        answer = self._handler(path, body)
        return await answer if inspect.isawaitable(answer) else answer

    async def aclose(self) -> None:
        """Nothing is open."""

    def close(self) -> None:
        """Nothing is open."""
