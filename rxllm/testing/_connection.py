"""One client connection of the simulated provider: bytes in, whole requests out, replies back."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

from rxllm.testing._events import Events
from rxllm.testing._http import MAX_HEAD, BadRequestError, ChunkedBody, Head, wants_more

if TYPE_CHECKING:
    from collections.abc import Callable

    from rxllm.clock import Handle
    from rxllm.testing._dialects import Dialect
    from rxllm.testing._quotas import Entry, Limiter

Due = tuple["Limiter | None", "Entry | None", int, int]  # the quota and the entry, tokens reserved and used

MAX_BODY: Final = 64 << 20  # bytes
MAX_AHEAD: Final = 1 << 20  # bytes of pipelined requests held while one is served
READ_SECONDS: Final = 30.0  # for a request that has begun to arrive completely
LINGER_SECONDS: Final = 1.0  # for the client to read why it was refused, before its connection is closed


class Call:
    """One admitted request on its way to its reply."""

    __slots__ = ("arrived", "body", "connection", "dialect", "due", "fault", "job", "row", "timer")

    def __init__(  # noqa: PLR0917 - once per request: keywords cost
        self, connection: Connection, dialect: Dialect, arrived: float, body: bytes, fault: str | None, row: int
    ) -> None:
        self.connection = connection
        self.dialect = dialect
        self.arrived = arrived
        self.body = body
        self.fault = fault
        self.row = row
        self.due: Due | None = None  # what its answer settles
        self.job: int | None = None
        self.timer: Handle | None = None


class StreamedCall(Call):
    """One whose answer is streamed."""

    __slots__ = ("answer", "is_due", "tokens")

    def __init__(self, *about: Any) -> None:
        super().__init__(*about)
        self.is_due = True  # no stall takes its place
        self.tokens = 0
        self.answer = Events([], [], [], b"")


class Service(Protocol):
    """What a connection hands its requests to."""

    heads: dict[bytes, Head]  # that it has parsed
    loop: asyncio.AbstractEventLoop

    def joined(self, connection: Connection, /) -> int:
        """Register a connection; return its number."""
        ...

    def left(self, connection: Connection, /) -> None:
        """Forget a connection."""
        ...

    def remember(self, raw: bytes, /) -> Head:
        """Parse a head and keep it."""
        ...

    def handle(self, connection: Connection, head: Head, body: bytes, /) -> None:
        """Take a request."""
        ...

    def malformed(self, connection: Connection, status: int, text: str, /) -> None:
        """Answer what is no request, and close."""
        ...

    def gone(self, call: Call, /) -> None:
        """Give up an admitted request whose client has gone."""
        ...


class Connection(asyncio.Protocol):
    """One client connection: cuts its bytes into requests, one at a time in the server."""

    __slots__ = (
        "_advancing",
        "_blocked",
        "_chunks",
        "_closing",
        "_data",
        "_head",
        "_missing",
        "_paused",
        "_pieces",
        "_server",
        "_timer",
        "_transport",
        "busy",
        "call",
        "head",
        "number",
        "on_drained",
        "served",
    )

    def __init__(self, server: Service) -> None:
        self._server = server
        self._transport: asyncio.Transport | None = None
        self._data: bytes = b""  # not yet parsed
        self._pieces: list[bytes] = []  # of a request whose length is known
        self._missing: int = 0  # bytes until it is whole
        self._chunks: ChunkedBody | None = None
        self._head: Head | None = None  # of the chunked body
        self._timer: asyncio.TimerHandle | None = None
        self._advancing = False
        self._paused = False  # nothing is read: too much has been sent ahead
        self._blocked = False  # the client does not read its replies
        self._closing = False
        self.head: Head | None = None  # of the request being served
        self.call: Call | None = None
        self.busy = False
        self.on_drained: Callable[[], None] | None = None  # what goes on when the client reads again
        self.number = 0
        self.served = 0

    @property
    def is_closing(self) -> bool:
        """Whether no reply can be sent any more."""
        return self._closing

    @property
    def is_blocked(self) -> bool:
        """Whether the client does not read what was written."""
        return self._blocked

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Join the server."""
        self._transport = cast("asyncio.Transport", transport)
        self.number = self._server.joined(self)

    def connection_lost(self, exc: Exception | None) -> None:
        """Leave the server; a request in service is given up."""
        del exc
        self._closing = True
        self._stop_timer()
        call, self.call = self.call, None
        if call is not None:
            self._server.gone(call)
        self._server.left(self)

    def pause_writing(self) -> None:
        """Write and serve no more until the client reads."""
        self._blocked = True

    def resume_writing(self) -> None:
        """Go on."""
        self._blocked = False
        go_on, self.on_drained = self.on_drained, None
        if go_on is not None:
            go_on()
        self._advance()

    def data_received(self, data: bytes) -> None:
        """Take bytes."""
        if self._closing:
            return
        if self._missing:
            self._pieces.append(data)
            self._missing -= len(data)
            if self._missing > 0:
                return
            self._data = b"".join(self._pieces)
            self._pieces.clear()
            self._missing = 0
        else:
            self._data = self._data + data if self._data else data
        if not self.busy:
            self._advance()
        if len(self._data) > MAX_AHEAD and not self._paused and self._transport is not None:
            self._paused = True
            self._transport.pause_reading()

    def _advance(self) -> None:
        """Serve what has arrived, one request after another, in constant stack depth."""
        if self._advancing:
            return
        self._advancing = True
        try:
            while self._data and not (self.busy or self._closing or self._blocked) and self._step():
                pass
        except BadRequestError as error:
            self._server.malformed(self, error.status, error.text)
        finally:
            self._advancing = False
        if self._paused and len(self._data) <= MAX_AHEAD and not self._closing and self._transport is not None:
            self._paused = False
            self._transport.resume_reading()

    def _step(self) -> bool:
        """Serve the next request; False when it has not arrived completely."""
        if self._chunks is not None:
            return self._step_chunked(self._chunks)
        data = self._data
        end = data.find(b"\r\n\r\n", 0, MAX_HEAD)
        if end < 0 or data[0] in b"\r\n":
            return self._wait_for_head()
        raw = data[:end]
        head = self._server.heads.get(raw) or self._server.remember(raw)
        if head.length > MAX_BODY:
            raise BadRequestError(413, f"body too large: {head.length} bytes, at most {MAX_BODY}")
        start = end + 4
        if head.chunked:
            self._chunks, self._head = ChunkedBody(MAX_BODY), head
            self._data = data[start:]
            self._go_on(head, begun=False)
            return bool(self._data)
        whole = start + head.length
        if len(data) < whole:
            self._pieces = [data]
            self._missing = whole - len(data)
            self._data = b""
            self._go_on(head, begun=len(data) > start)
            return False
        self._data = data[whole:]
        self._serve(head, data[start:whole])
        return True

    def _step_chunked(self, chunks: ChunkedBody) -> bool:
        data, self._data = self._data, b""
        rest = chunks.feed(data)
        if rest is None or self._head is None:
            return False
        head, self._chunks, self._head = self._head, None, None
        self._data = rest
        self._serve(head, b"".join(chunks.pieces))
        return True

    def _wait_for_head(self) -> bool:
        data = self._data
        if data[0] in b"\r\n":  # empty lines before a request are allowed
            self._data = data.lstrip(b"\r\n")
            return bool(self._data)
        if len(data) >= MAX_HEAD:
            raise BadRequestError(431, f"more than {MAX_HEAD} bytes of headers")
        if not wants_more(data):
            raise BadRequestError(400, "no HTTP request (is the URL https:// instead of http://?)")
        self._start_timer()
        return False

    def _go_on(self, head: Head, *, begun: bool) -> None:
        """Wait for the rest of a body."""
        if head.expects and not begun and self._transport is not None:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        self._start_timer()

    def _start_timer(self) -> None:
        if self._timer is None:
            self._timer = self._server.loop.call_later(READ_SECONDS, self._too_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_slow(self) -> None:
        self._timer = None
        if not self._closing:
            self._server.malformed(self, 408, f"the request did not arrive within {READ_SECONDS:g} s")

    def _serve(self, head: Head, body: bytes) -> None:
        if self._timer is not None:
            self._stop_timer()
        self.busy = True
        self.head = head
        self._server.handle(self, head, body)

    # what the server does with it

    def reply(self, data: bytes, *, last: bool = False) -> None:
        """Write a whole reply and go on to the next request; `last` closes the connection after it."""
        transport = self._transport
        if transport is None or self._closing:
            return
        transport.write(data)
        self.done(last=last)

    def write(self, data: bytes) -> None:
        """Write a part of a reply."""
        if self._transport is not None and not self._closing:
            self._transport.write(data)

    def done(self, *, last: bool = False) -> None:
        """Go on to the next request when all of a reply has been written; `last` closes the connection instead."""
        self.busy = False
        self.call = None
        self.served += 1
        if last:
            self.close()
        elif self._data:
            self._advance()

    def reject(self, data: bytes) -> None:
        """Write a reply to what could not be read; close once the client has read it."""
        if (transport := self._transport) is not None and not self._closing:
            self._closing = True
            self._stop_timer()
            transport.write(data)
            if transport.can_write_eof():
                transport.write_eof()
                self._timer = self._server.loop.call_later(LINGER_SECONDS, transport.close)
            else:
                transport.close()

    def close(self) -> None:
        """Close after everything written has been sent."""
        self._closing = True
        self.call = None
        if self._transport is not None:
            self._transport.close()

    def abort(self, *, reset: bool = False) -> None:
        """Close at once; with `reset` the client sees a reset connection."""
        self._closing = True
        self.call = None
        if self._transport is not None:
            if reset and (sock := self._transport.get_extra_info("socket")) is not None:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self._transport.abort()
