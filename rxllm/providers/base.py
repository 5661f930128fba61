"""What a provider is: a translation between messages and bytes, without I/O."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeVar

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rxllm.messages import Chunk, Reply, Request, Usage
    from rxllm.policies.tokens import TokenEstimator

__all__ = ["Assembler", "Call", "Event", "Provider"]

T = TypeVar("T")


class Call(msgspec.Struct, frozen=True, gc=False):
    """What goes on the wire for one request."""

    path: str  # below the base URL, from its slash on
    body: bytes = b""  # JSON
    method: str = "POST"
    accept: str = "application/json"


class Event(msgspec.Struct, frozen=True, gc=False):
    """One server-sent event."""

    data: bytes  # its lines, joined by "\n"
    name: str = ""  # "" is "message"
    id: str = ""


class Assembler(Protocol[T]):
    """Puts one streamed answer together: a state machine without I/O, fed with the events as they come."""

    @property
    def text(self) -> str:
        """The text so far."""
        ...

    @property
    def usage(self) -> Usage | None:
        """What was used, as far as the server has told."""
        ...

    @property
    def done(self) -> bool:
        """Whether the answer is whole and nothing more is needed."""
        ...

    def feed(self, event: Event) -> Chunk | None:
        """Take the next event; return what it shows, None if that is nothing.

        Raises:
            CallError: the event is an error, or cannot be understood.
        """
        ...

    def finish(self) -> Reply[T]:
        """Return the whole answer, as `decode` would have.

        Raises:
            DecodeError: it is not complete.
        """
        ...


class Provider(Protocol[T]):
    """Translates the requests of one dialect to bytes and its answers back."""

    @property
    def model(self) -> str:
        """The model's name, for requests that name none."""
        ...

    @property
    def tokens(self) -> TokenEstimator:
        """The estimates behind `cost`."""
        ...

    def encode(self, request: Request, *, stream: bool = False) -> Call:
        """Return the call of `request`, for an answer in one piece or in many.

        Raises:
            UnsupportedError: this dialect has no such operation, or cannot stream it.
            InvalidRequestError: the body cannot be encoded.
        """
        ...

    def decode(self, request: Request, status: int, headers: Mapping[str, str], body: bytes) -> Reply[T]:
        """Return the reply of a complete answer.

        Raises:
            CallError: the answer is an error, or cannot be understood.
            ValidationError: it is not of the type that was asked for.
        """
        ...

    def assembler(self, request: Request, status: int, headers: Mapping[str, str]) -> Assembler[T]:
        """Return what puts the answer to `request` together, whose status is 2xx."""
        ...

    def repeatable(self, request: Request) -> bool:
        """Say whether a second try is safe when nobody knows what became of the first.

        It is not when the request makes the server create something that is paid for.
        """
        ...

    def cost(self, request: Request) -> dict[str, float]:
        """Return what `request` will probably use, by unit: requests, tokens, input_tokens, output_tokens."""
        ...

    def learn(self, request: Request, usage: Usage) -> None:
        """Learn from what `request` really used."""
        ...

    def wrap(self, item: object) -> Request:
        """Return the request that an item which is none stands for.

        Raises:
            InvalidRequestError: it stands for none.
        """
        ...
