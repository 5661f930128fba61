"""What a transport is: the one seam between clients and the world."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rxllm.policies.timeouts import Timeouts

__all__ = ["Response", "Transport"]


class Response(NamedTuple):
    """A complete answer."""

    status: int
    headers: Mapping[str, str]  # case-insensitive
    body: bytes


class Transport(Protocol):
    """Moves one call to a server and its answer back."""

    async def post(self, path: str, body: bytes, timeouts: Timeouts) -> Response:
        """Send `body` to `path` below the base URL and return the complete answer, whatever its status.

        Raises:
            CallError: there is none. Its attribute `sent` is False if nothing left this machine.
        """
        ...

    async def aclose(self) -> None:
        """Close what the running loop holds."""
        ...

    def close(self) -> None:
        """Close everything; from any thread."""
        ...
