"""The replies of the simulated provider as bytes: good, refused and spoilt. Pure but for the date of a hint."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http import HTTPStatus
from math import ceil
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

if TYPE_CHECKING:
    from rxllm.testing._settings import Hint

JSON_TYPE: Final = b"application/json"
HTML_TYPE: Final = b"text/html; charset=utf-8"
LIMIT_HEADERS: Final = b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %d\r\nx-ratelimit-reset-%b: %b\r\n"
PAGE: Final = b"<html>\r\n<head><title>%b</title></head>\r\n<body><center><h1>%b</h1></center></body>\r\n</html>\r\n"

WHOLE: Final = {  # faults whose reply does not depend on the request: status, content type, body
    "html": (200, HTML_TYPE, PAGE % (b"Welcome", b"Welcome")),
    "html_502": (502, HTML_TYPE, PAGE % (b"502 Bad Gateway", b"502 Bad Gateway")),
    "wrong_shape": (200, JSON_TYPE, b'{"object":"list","data":null}'),
    "empty": (200, JSON_TYPE, b""),
}
ERRORS: Final[dict[int, tuple[str, str | None]]] = {  # status: type and code of its error
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: ("invalid_request_error", "not_found"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("server_error", "server_is_overloaded"),
    529: ("server_error", "server_is_overloaded"),
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


def error_body(status: int, text: str, *, param: str | None = None, code: str | None = None) -> bytes:
    """Return the body of an error as OpenAI shapes it."""
    kind, usual = ERRORS.get(status, ERRORS[500 if status >= 500 else 400])  # noqa: PLR2004 - the server's faults
    if code == "credit_balance_exhausted":
        kind = "insufficient_quota"
    return msgspec.json.encode({"error": {"message": text, "type": kind, "param": param, "code": code or usual}})


def reply_bytes(status: int, body: bytes, kind: bytes, number: int, extra: bytes) -> bytes:
    """Return a whole reply; `number` is unique, `extra` are complete header lines."""
    return b"%bContent-Type: %b\r\nContent-Length: %d\r\nx-request-id: req_%08x\r\n%b\r\n%b" % (
        b"HTTP/1.1 200 OK\r\n" if status == 200 else status_line(status),  # noqa: PLR2004 - OK
        kind,
        len(body),
        number,
        extra,
        body,
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


def spoil(fault: str, body: bytes) -> tuple[int, bytes, bytes]:
    """Return status, content type and body of a reply that goes wrong."""
    if fault in WHOLE:
        return WHOLE[fault]
    if fault == "garbled":
        return 200, JSON_TYPE, body[: len(body) // 2] + b"\xff\x00"
    if fault in {"truncated", "answer_failed"}:
        return (200 if fault == "truncated" else 500), JSON_TYPE, body
    status = int(fault)
    return status, JSON_TYPE, error_body(status, f"Simulated fault {fault}.")
