"""The replies of the simulated provider as bytes: whole, begun and spoilt. Pure but for the date of a hint."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http import HTTPStatus
from math import ceil
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Callable

    from rxllm.testing._settings import Hint

JSON_TYPE: Final = b"application/json"
HTML_TYPE: Final = b"text/html; charset=utf-8"
PAGE: Final = b"<html>\r\n<head><title>%b</title></head>\r\n<body><center><h1>%b</h1></center></body>\r\n</html>\r\n"

WHOLE: Final = {  # faults whose reply does not depend on the request: status, content type, body
    "html": (200, HTML_TYPE, PAGE % (b"Welcome", b"Welcome")),
    "html_502": (502, HTML_TYPE, PAGE % (b"502 Bad Gateway", b"502 Bad Gateway")),
    "wrong_shape": (200, JSON_TYPE, b'{"object":"list","data":null}'),
    "empty": (200, JSON_TYPE, b""),
}


class Refusal(NamedTuple):
    """Why a request is not taken into service."""

    status: int
    reason: str
    text: str
    hint: float | None = None  # seconds
    code: str | None = None
    param: str | None = None


def status_line(status: int) -> bytes:
    """Return the first line of a reply."""
    try:
        phrase = HTTPStatus(status).phrase
    except ValueError:
        phrase = "Unknown"
    return f"HTTP/1.1 {status} {phrase}\r\n".encode()


def reply_bytes(  # noqa: PLR0917 - once per request: keywords cost
    status: int, body: bytes, kind: bytes, name: bytes, number: int, extra: bytes
) -> bytes:
    """Return a whole reply; `name` is the header of its unique `number`, `extra` are complete header lines."""
    return b"%bContent-Type: %b\r\nContent-Length: %d\r\n%b: req_%08x\r\n%b\r\n%b" % (
        b"HTTP/1.1 200 OK\r\n" if status == 200 else status_line(status),  # noqa: PLR2004 - OK
        kind,
        len(body),
        name,
        number,
        extra,
        body,
    )


def stream_head(kind: bytes, name: bytes, number: int, extra: bytes, *, chunked: bool) -> bytes:
    """Return the head of a reply whose body comes in pieces; one that is not chunked ends with the connection."""
    coding = b"Transfer-Encoding: chunked\r\n" if chunked else b""
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nCache-Control: no-cache\r\n%b%b: req_%08x\r\n%b\r\n" % (
        kind,
        coding,
        name,
        number,
        extra,
    )


def hint_lines(seconds: float, form: Hint) -> bytes:
    """Return the header lines that ask to come back in so many seconds."""
    if form == "off":
        return b""
    if form == "date":
        at = datetime.now(UTC) + timedelta(seconds=ceil(seconds))  # noqa: TID251 - HTTP-dates are wall time
        return f"Retry-After: {format_datetime(at, usegmt=True)}\r\n".encode()
    whole = b"Retry-After: %d\r\n" % ceil(seconds)
    return whole if form == "seconds" else whole + b"retry-after-ms: %d\r\n" % ceil(seconds * 1000)


def spoil(fault: str, body: bytes, error: Callable[[Refusal], bytes]) -> tuple[int, bytes, bytes]:
    """Return status, content type and body of a reply that goes wrong; `error` makes the body of an error."""
    if fault in WHOLE:
        return WHOLE[fault]
    if fault == "garbled":
        return 200, JSON_TYPE, body[: len(body) // 2] + b"\xff\x00"
    if fault in {"truncated", "answer_failed"}:
        return (200 if fault == "truncated" else 500), JSON_TYPE, body
    status = int(fault)
    return status, JSON_TYPE, error(Refusal(status, fault, f"Simulated fault {fault}."))
