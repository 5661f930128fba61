"""The little of HTTP/1.1 that a server needs: a strict head parser and a chunked body decoder. Pure."""

from __future__ import annotations

import re
from base64 import b64decode
from typing import Final, NamedTuple

MAX_HEAD: Final = 65_536  # bytes of request line and headers
MAX_LINE: Final = 16_384  # bytes of a chunk's size line or a trailer

TOKEN: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+")
TARGET: Final = re.compile(rb"[\x21-\x7e]+")
VALUE: Final = re.compile(rb"[\t\x20-\x7e\x80-\xff]*")
DIGITS: Final = re.compile(rb"[0-9]{1,18}")
HEX: Final = re.compile(rb"[0-9a-fA-F]{1,15}")


class BadRequestError(Exception):
    """The bytes are no HTTP request we accept; the connection ends after the reply."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(status, text)
        self.status = status
        self.text = text


class Head(NamedTuple):
    """What the server keeps of a request's head."""

    method: str
    path: str  # without the query
    query: str  # what follows the question mark
    length: int  # of the body in bytes; 0 when chunked
    chunked: bool
    keep_alive: bool
    expects: bool  # the client waits for "100 Continue" before it sends the body
    key: str | None  # of "Authorization: Bearer …", of "x-api-key", or the user of "Authorization: Basic …"


def parse_head(data: bytes) -> Head:
    """Parse everything before the empty line.

    Raises:
        BadRequestError: malformed, ambiguous about its length, or not HTTP/1.x.
    """
    line, *fields = data.split(b"\r\n")
    parts = line.split(b" ")
    if len(parts) != 3 or not TOKEN.fullmatch(parts[0]) or not TARGET.fullmatch(parts[1]):  # noqa: PLR2004 - three words
        raise BadRequestError(400, "malformed request line")
    method, target, version = parts
    if version not in {b"HTTP/1.1", b"HTTP/1.0"}:
        raise BadRequestError(505 if re.fullmatch(rb"HTTP/\d(\.\d)?", version) else 400, "need HTTP/1.1")
    headers: dict[bytes, bytes] = {}
    for field in fields:
        raw_name, colon, raw_value = field.partition(b":")
        name, value = raw_name.lower(), raw_value.strip(b" \t")
        if not colon or not TOKEN.fullmatch(name) or not VALUE.fullmatch(value):
            raise BadRequestError(400, "malformed header")
        if name in {b"content-length", b"transfer-encoding", b"host"} and headers.get(name, value) != value:
            raise BadRequestError(400, f"two different {name.decode()} headers")
        headers[name] = value
    length, coding = headers.get(b"content-length"), headers.get(b"transfer-encoding")
    if coding is not None and (coding.lower() != b"chunked" or length is not None):
        raise BadRequestError(400, "need Content-Length or Transfer-Encoding: chunked, not both, nothing else")
    if length is not None and not DIGITS.fullmatch(length):
        raise BadRequestError(400, "malformed Content-Length")
    wishes = headers.get(b"connection", b"").lower()
    path, _, query = target.decode("ascii").partition("?")
    return Head(
        method=method.decode("ascii"),
        path=path,
        query=query,
        length=int(length or 0),
        chunked=coding is not None,
        keep_alive=version == b"HTTP/1.1" and b"close" not in wishes,
        expects=headers.get(b"expect", b"").lower() == b"100-continue" and version == b"HTTP/1.1",
        key=_key(headers),
    )


def _key(headers: dict[bytes, bytes]) -> str | None:
    scheme, _, value = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer":
        return value.strip().decode("latin-1")
    if (key := headers.get(b"x-api-key")) is not None:
        return key.decode("latin-1")
    if scheme.lower() == b"basic":
        try:
            return b64decode(value).partition(b":")[0].decode("latin-1")
        except ValueError:
            return None
    return None


class ChunkedBody:
    """Decodes a chunked body piece by piece."""

    __slots__ = ("_left", "_limit", "_pending", "_size", "_state", "pieces")

    def __init__(self, limit: int) -> None:
        self.pieces: list[bytes] = []
        self._limit = limit  # bytes of the decoded body
        self._size = 0
        self._pending = b""  # an unfinished line
        self._state = "size"
        self._left = 0  # bytes of the current chunk still to come

    def feed(self, data: bytes) -> bytes | None:
        """Take more bytes; return what follows the body once it is complete, None before.

        Raises:
            BadRequestError: malformed (400) or more than the limit (413).
        """
        data = self._pending + data
        self._pending = b""
        at = 0
        while True:
            if self._state == "data":
                piece = data[at : at + self._left]
                self.pieces.append(piece)
                at += len(piece)
                self._left -= len(piece)
                if self._left:
                    return None
                self._state = "end"
            end = data.find(b"\r\n", at)
            if end < 0:
                if len(data) - at > MAX_LINE:
                    raise BadRequestError(400, "chunk line too long")
                self._pending = data[at:]
                return None
            line, at = data[at:end], end + 2
            if self._state == "size":
                self._begin(line)
            elif self._state == "end":
                if line:
                    raise BadRequestError(400, "chunk longer than its size")
                self._state = "size"
            elif not line:  # the trailers have ended
                return data[at:]

    def _begin(self, line: bytes) -> None:
        size = line.partition(b";")[0].strip(b" \t")
        if not HEX.fullmatch(size):
            raise BadRequestError(400, "malformed chunk size")
        self._left = int(size, 16)
        self._size += self._left
        if self._size > self._limit:
            raise BadRequestError(413, "body too large")
        self._state = "data" if self._left else "trailer"


def wants_more(head: bytes) -> bool:
    """Say whether an unfinished head may still become one; False for TLS, other protocols and oversize."""
    line = head[:MAX_LINE].partition(b"\r\n")[0]
    method = line.partition(b" ")[0]
    return len(method) <= 32 and (not method or TOKEN.fullmatch(method) is not None)  # noqa: PLR2004 - bytes of a method
