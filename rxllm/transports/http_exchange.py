"""One call over HTTP: its connection, and the clock that runs."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, cast

import aiohttp

from rxllm.errors import CallError, CancelledError, DecodeError, Phase
from rxllm.transports.base import Response
from rxllm.transports.connections import Wire, drop
from rxllm.transports.http_answer import BUFFER, CUT_SHORT, HttpAnswer
from rxllm.transports.http_errors import broken, late, too_large, unreachable, unreadable

if TYPE_CHECKING:
    from aiohttp.connector import Connection as Held

    from rxllm.policies.timeouts import Timeouts
    from rxllm.transports.connections import Pool

__all__ = ["Exchange", "Gone"]

READ_BUFFER = 1 << 20  # bytes: a long answer that is wanted whole is not stopped and started for flow control


class Exchange:
    """One call.

    Args:
        pool: where its connection comes from.
        timeouts: phase by phase; the clock of the whole call starts here.
        head: of the request; with a body it ends where the value of Content-Length belongs.
        body: of the request; None: the method has none.
        streamed: return when the head of the answer is there.
    """

    __slots__ = ("_body", "_expired", "_head", "_pool", "_since", "_streamed", "_task", "_timeouts", "_total")

    def __init__(self, pool: Pool, timeouts: Timeouts, head: bytes, body: bytes | None, *, streamed: bool) -> None:
        self._pool = pool
        self._timeouts = timeouts
        self._head = head
        self._body = body
        self._streamed = streamed
        self._expired: Phase | None = None
        self._task: asyncio.Task[Any] | None = None
        self._since = pool.clock.seconds() if streamed else 0.0
        self._total = None if timeouts.total is None else pool.start(timeouts.total, lambda: self._expire("total"))

    def _expire(self, phase: Phase) -> None:
        """Give up: a clock has run out."""
        if self._expired is None and self._task is not None:
            self._expired = phase
            self._task.cancel()

    def end(self) -> None:
        """Stop the clock of the whole call."""
        if self._total is not None:
            self._total.cancel()

    async def run(self, *, fresh: bool = False) -> Response | HttpAnswer:
        """Send and read.

        Raises:
            Gone: a kept connection was closed before the first byte: try again with a fresh one.
            CallError: see `HttpTransport.send`.
        """
        self._task = task = cast("asyncio.Task[Any]", asyncio.current_task())
        cancelling = task.cancelling()
        held: Held | None = None
        try:
            held = await self._connect(fresh=fresh)
            answer = await self._talk(held)
        except asyncio.CancelledError:
            # our own cancel is taken back; the one of somebody else comes first
            if self._expired is None or task.uncancel() > cancelling:
                raise
            problem: CallError = late(self._pool.route.where, self._expired, self._timeouts, sent=held is not None)
        except CallError as error:
            problem = error
        else:
            if not self._streamed:  # else the connection is the answer's
                cast("Wire", held.protocol).heard = False
                held.release()
            held = None
            return answer
        finally:
            self._task = None
            if held is not None:
                drop(held)
        if self._pool.connector.closed:
            problem = CancelledError("the client was closed during the call")
        raise problem  # outside of the except blocks: what was caught there is no context of it

    async def _connect(self, *, fresh: bool) -> Held:
        """Return a connection; a kept one only if it is as good as new, and none of them if `fresh`."""
        pool = self._pool
        seconds = self._timeouts.connect
        try:
            while True:
                held = await pool.connect(seconds)
                wire = cast("Wire", held.protocol)
                if not wire.used or not (fresh or wire.heard):
                    return held
                drop(held)  # it may be gone as the other one was, or something came that nobody asked for
        except TimeoutError:
            problem: CallError = late(pool.route.where, "connect", self._timeouts, sent=False)
        except (aiohttp.ClientError, OSError, ValueError) as error:
            problem = unreachable(pool.route, error)
        raise problem

    async def _talk(self, held: Held) -> Response | HttpAnswer:
        pool = self._pool
        where = pool.route.where
        wire = cast("Wire", held.protocol)
        kept, wire.used, wire.heard = wire.used, True, False
        if not self._write(wire):
            raise Gone if kept else broken(where)
        seconds = self._timeouts.first_byte
        alarm = None if seconds is None else pool.start(seconds, lambda: self._expire("first_byte"))
        status: int | None = None
        try:
            message, payload = await wire.read()
            while 100 <= message.code < 200 and message.code != 101:  # noqa: PLR2004  "early hints": the answer follows
                message, payload = await wire.read()
            status = message.code
            if alarm is not None:
                alarm.cancel()
                alarm = None
            body = b""
            if not self._streamed:
                body = self._all(status, payload) if payload.is_eof() else await self._read(status, payload)
            if status != 101:  # noqa: PLR2004
                if not self._streamed:
                    return Response(status, message.headers, body)
                waited = pool.clock.seconds() - self._since
                return HttpAnswer(pool, held, message, payload, timeouts=self._timeouts, waited=waited)
            problem: Exception = DecodeError(f"{where} wants another protocol than HTTP; check base_url", status)
        except (aiohttp.http.HttpProcessingError, aiohttp.ClientPayloadError, CallError) as error:
            problem = unreadable(where, status, error)
        except Exception:  # aiohttp's, or whatever broke the connection
            problem = Gone() if kept and not wire.heard else broken(where, heard=wire.heard)
        finally:
            if alarm is not None:
                alarm.cancel()
        raise problem

    def _write(self, wire: Wire) -> bool:
        """Send the request; return False if the connection is gone."""
        longest = self._pool.route.connection.header_bytes
        wire.set_response_params(
            timer=self._pool.timer,
            skip_payload=False,
            read_until_eof=True,
            auto_decompress=True,
            read_timeout=None,
            read_bufsize=BUFFER if self._streamed else READ_BUFFER,
            timeout_ceil_threshold=5,
            max_line_size=longest,
            max_field_size=longest,
        )
        transport = wire.transport
        if transport is None or transport.is_closing():
            return False
        body = self._body
        transport.write(self._head if body is None else b"%b%d\r\n\r\n%b" % (self._head, len(body), body))
        return True

    def _all(self, status: int, payload: aiohttp.StreamReader) -> bytes:
        """Return an answer that is there."""
        body = payload.read_nowait()
        most = self._pool.route.connection.body_bytes
        if len(body) > most:
            raise too_large(most, status)
        return body

    async def _read(self, status: int, payload: aiohttp.StreamReader) -> bytes:
        """Read an answer that comes in pieces. Of an error that is cut short, what there is."""
        parts: list[bytes] = []
        size = 0
        seconds = self._timeouts.idle
        most = self._pool.route.connection.body_bytes
        while not payload.at_eof():
            alarm = None if seconds is None else self._pool.start(seconds, lambda: self._expire("idle"))
            try:
                part = await payload.readany()
            except aiohttp.ClientPayloadError:
                if status < CUT_SHORT:
                    raise
                break
            finally:
                if alarm is not None:
                    alarm.cancel()
            parts.append(part)
            size += len(part)
            if size > most:
                raise too_large(most, status)
        return b"".join(parts)


class Gone(Exception):  # noqa: N818  never seen outside
    """A kept connection was closed before the first byte of the answer."""
