"""What a provider is, a translation between messages and bytes without I/O; and HTTP's errors as ours."""

from __future__ import annotations

from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar, cast

import msgspec

from rxllm import errors
from rxllm.errors import CallError, DecodeError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rxllm.messages import Reply, Request

__all__ = ["Call", "Provider", "error_of", "retry_after"]

T = TypeVar("T")


class Call(NamedTuple):
    """What goes on the wire for one request."""

    path: str  # below the base URL, from its slash on
    body: bytes  # JSON


class Provider(Protocol[T]):
    """Translates the requests of one dialect to bytes and its answers back."""

    def encode(self, request: Request) -> Call:
        """Return the call of `request`.

        Raises:
            UnsupportedError: this dialect has no such operation.
            InvalidRequestError: the body cannot be encoded.
        """
        ...

    def decode(self, request: Request, status: int, headers: Mapping[str, str], body: bytes) -> Reply[T]:
        """Return the reply of a complete answer.

        Raises:
            CallError: the answer is an error, or cannot be understood.
        """
        ...

    def cost(self, request: Request) -> dict[str, float]:
        """Return what `request` will probably use, by unit: requests, tokens, input_tokens, output_tokens."""
        ...

    def wrap(self, item: object) -> Request:
        """Return the request that an item which is none stands for.

        Raises:
            InvalidRequestError: it stands for none.
        """
        ...


LONGEST_MESSAGE = 500  # characters

# The class of an error by its HTTP status; what is missing is a ServerError from 500 on, an InvalidRequestError below.
# Transient are so 408, 409, 425, 429 and everything from 500 on. A 503 is no refusal by itself, as it eats no tries: a
# proxy says so of a server that is down.
CLASSES: dict[int, type[CallError]] = {
    401: errors.AuthError,
    402: errors.BillingError,
    403: errors.AuthError,
    404: errors.NotFoundError,
    408: errors.TimeoutError,
    409: errors.ConflictError,
    425: errors.NotReadyError,
    429: errors.RateLimitedError,
    529: errors.OverloadedError,
}
ADVICE: dict[int, str] = {  # what to check
    401: "the server does not accept the key",
    402: "the balance is empty",
    403: "the key is not allowed to do this",
    404: "the server has no such model or path: check model and base_url (it usually ends in /v1)",
    405: "the server does not take this here: check base_url (it usually ends in /v1)",
    407: "a proxy wants a login",
    413: "the request is larger than the server takes",
    429: "too many requests or tokens for now",
    503: "the server cannot answer for now",
    529: "the server is overloaded",
}


def error_of(
    status: int, headers: Mapping[str, str], body: bytes, *, now: float, kind: type[CallError] | None = None
) -> CallError:
    """Return the error of an answer that is none; the first version, for any HTTP API.

    Args:
        status: not 2xx.
        headers: case-insensitive.
        body: may be JSON, HTML, text, empty or anything else.
        now: wall time in seconds, to read a Retry-After that is a date.
        kind: the class, where the dialect knows better than the status.
    """
    by_status = CLASSES.get(status) or (errors.ServerError if status >= 500 else errors.InvalidRequestError)  # noqa: PLR2004
    said = message_of(headers, body)
    advice = ADVICE.get(status) if kind is None else None
    if 300 <= status < 400:  # noqa: PLR2004
        advice = f"the server redirects to {one_line(headers.get('location', 'nowhere'))}: check base_url"
    text = ": ".join(part for part in (advice, said) if part) or f"HTTP status {status}"
    return (kind or by_status)(text, status, retry_after(headers, now), request_id(headers), body)


def message_of(headers: Mapping[str, str], body: bytes) -> str:
    """Return what the server said, for a person, in one line."""
    if is_html(headers, body):
        return "the answer is an HTML page, not JSON: is this the address of the API, or is a proxy in between?"
    said = said_in(parsed(body))
    if said is None:
        said = body[: 4 * LONGEST_MESSAGE].decode(errors="replace")
    return one_line(said)


def one_line(text: str) -> str:
    """Return what somebody else wrote as something to print: no control characters, no lines, not too long."""
    text = " ".join("".join(mark if mark.isprintable() else " " for mark in text[: 2 * LONGEST_MESSAGE]).split())
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE - 3]}..."


def is_html(headers: Mapping[str, str], body: bytes) -> bool:
    """Say whether an answer is a page for people."""
    return "html" in headers.get("content-type", "") or body[:200].lstrip()[:1] == b"<"


def parsed(body: bytes) -> Any:
    """Return the JSON of a body; None if it is none."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def said_in(value: Any) -> str | None:
    """Return the message in the JSON of an error, in one of the shapes that servers have for it; None if there is none.

    >>> said_in({"error": {"message": "no such model"}}), said_in([{"error": "busy"}]), said_in({"detail": "wrong"})
    ('no such model', 'busy', 'wrong')
    """
    for _ in range(4):  # levels
        if isinstance(value, list):
            value = cast("list[Any]", value)[0] if value else None
        if isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            value = next((fields[key] for key in ("error", "message", "msg", "detail") if fields.get(key)), None)
    return value if isinstance(value, str) else None


def request_id(headers: Mapping[str, str]) -> str | None:
    """Return the server's name for the request, if it gives one."""
    name = headers.get("x-request-id") or headers.get("request-id")
    return None if name is None else one_line(name)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that the server asks to wait, >= 0; None if it does not, or nothing that can be read.

    `retry-after-ms` comes before `retry-after`, which is seconds (a fraction is fine) or an HTTP date.
    """
    text = headers.get("retry-after-ms")
    if text is not None:
        seconds = _number(text)
        if seconds is not None:
            return seconds / 1000
    text = headers.get("retry-after")
    if text is None:
        return None
    seconds = _number(text)
    if seconds is not None:
        return seconds
    try:
        date = parsedate_to_datetime(text)
        if date.tzinfo is None:
            date = date.replace(tzinfo=UTC)
        return max(0.0, (date - datetime.fromtimestamp(now, UTC)).total_seconds())
    except (ValueError, TypeError, IndexError, OverflowError):  # it is picky in many ways
        return None


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None


def unreadable(status: int, headers: Mapping[str, str], body: bytes, reason: str) -> DecodeError:
    """Return the error of an answer that claims to be good and cannot be understood."""
    said = message_of(headers, body) if is_html(headers, body) else reason
    return DecodeError(f"the answer cannot be understood: {said}", status, None, request_id(headers), body)
