"""What a transport is: the one seam between clients and the world."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rxllm.policies.timeouts import Timeouts
    from rxllm.providers.base import Call

__all__ = ["Answer", "Response", "Transport"]


class Response(NamedTuple):
    """A complete answer."""

    status: int
    headers: Mapping[str, str]  # case-insensitive
    body: bytes


class Answer(Protocol):
    """An answer in pieces. Who does not read makes the server wait: no more than a bounded buffer is read ahead."""

    @property
    def status(self) -> int:
        """The HTTP status."""
        ...

    @property
    def headers(self) -> Mapping[str, str]:
        """The headers, case-insensitive."""
        ...

    async def read(self) -> bytes:
        """Return the next piece as it comes; nothing at the end. One reader at a time.

        An answer may also have a `pour(take)`, which calls `take` with each piece until that returns something true or
        there is an end, and says which: where there is one it is used instead, as waking a task for each piece costs
        more than most pieces (see `HttpAnswer.pour`).

        Raises:
            CallError: there is none: a `TimeoutError` (idle, total), a `DecodeError` (cut short, too large), a
                `ConnectionError`, or a `CancelledError` when it was closed.
        """
        ...

    def close(self, *, drain: bool = False) -> None:
        """Give it up: its connection is closed, unless it was read to its end. Again is harmless.

        Args:
            drain: The message is complete but perhaps for the last bytes of its framing: wait for them in the
                background, for at most 1 s and 64 KiB, and keep the connection.
        """
        ...


class Transport(Protocol):
    """Moves one call to a server and its answer back."""

    async def send(self, call: Call, timeouts: Timeouts) -> Response:
        """Send `call` and return the complete answer, whatever its status.

        Raises:
            CallError: there is none. Its attribute `sent` is False if nothing left this machine.
        """
        ...

    async def open(self, call: Call, timeouts: Timeouts) -> Answer:
        """Send `call` and return its answer, whatever its status, as soon as its head is there; close it.

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
