"""Servers on loopback that play a script, and what else the tests of transports share."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import socket
import ssl
import struct
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from rxllm import Timeouts
from rxllm.policies.connection import Connection
from rxllm.providers.base import Call
from rxllm.transports import Answer, HttpTransport, Response, Transport

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
with contextlib.suppress(ImportError):
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop

T = TypeVar("T")
KEY = "sk-marker-0123456789"
DIRECT = Connection(trust_env=False)
PATIENT = Timeouts(connect=20, first_byte=20, idle=20)
current = ["asyncio"]  # the kind of loop; set by the fixture `loops`


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run on the current kind of loop; nothing may be reported to the loop, and no task left."""
    reported: list[dict[str, Any]] = []

    async def watched() -> T:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: reported.append(context))
        before = asyncio.all_tasks()
        result = await main
        gc.collect()  # what was not closed warns now
        await until(lambda: asyncio.all_tasks() == before)  # servers take a turn to see that a client has gone
        return result

    with asyncio.Runner(loop_factory=LOOPS[current[0]]) as runner:
        result = runner.run(watched())
    gc.collect()
    assert not reported
    return result


class Close:
    """A step: close the connection."""


class Reset:
    """A step: reset the connection."""


class Stall:
    """A step: say nothing until the client has gone."""


class Scripted:
    """A server whose answers are scripted: for each request, in order of arrival, what to write and what to do."""

    def __init__(self, script: Sequence[Sequence[Any]]) -> None:
        self.script = script
        self.requests: list[tuple[int, bytes, bytes]] = []  # connection, head, body
        self.connections = 0
        self.open = 0
        self.url = ""
        self._writers: set[asyncio.StreamWriter] = set()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        self.open += 1
        self.connections += 1
        try:
            await self._serve(self.connections, reader, writer)
        except (asyncio.IncompleteReadError, OSError, RuntimeError):
            pass  # the client has gone; uvloop says so with a RuntimeError
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.transport.abort()

    async def _serve(self, number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
            self.requests.append((number, head, await reader.readexactly(length)))
            for step in self.script[min(len(self.requests), len(self.script)) - 1]:
                if step is Close:
                    writer.close()
                    await writer.wait_closed()
                    return
                if step is Reset:
                    linger = struct.pack("ii", 1, 0)
                    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    writer.transport.abort()
                    return
                if step is Stall:
                    await reader.read()
                    return
                if isinstance(step, float):
                    await asyncio.sleep(step)
                elif isinstance(step, bytes):
                    writer.write(step)
                    await writer.drain()
                else:
                    await step()

    def close(self) -> None:
        for writer in self._writers:
            writer.transport.abort()


@contextlib.asynccontextmanager
async def scripted(*script: Sequence[Any], tls: ssl.SSLContext | None = None) -> AsyncIterator[Scripted]:
    server = Scripted(script)
    listener = await asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=tls)
    server.url = f"http{'s' if tls else ''}://127.0.0.1:{listener.sockets[0].getsockname()[1]}/v1"
    try:
        yield server
    finally:
        listener.close()
        server.close()


@contextlib.asynccontextmanager
async def transport_to(url: str, connection: Connection = DIRECT, **headers: str) -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(url, {"Authorization": f"Bearer {KEY}", **headers}, connection)
    try:
        yield transport
    finally:
        await transport.aclose()
        transport.close()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


def answer(body: bytes = b"{}", *, status: int = 200, extra: bytes = b"") -> bytes:
    return b"HTTP/1.1 %d X\r\n%bContent-Length: %d\r\n\r\n%b" % (status, extra, len(body), body)


async def whole(answer: Answer) -> bytes:
    """Read an answer to its end."""
    parts: list[bytes] = []
    try:
        while part := await answer.read():
            parts.append(part)
    finally:
        answer.close()
    return b"".join(parts)


async def sent(transport: Transport, call: Call, timeouts: Timeouts) -> Response:
    """Get an answer in one piece."""
    return await transport.send(call, timeouts)


async def streamed(transport: Transport, call: Call, timeouts: Timeouts) -> Response:
    """Get an answer in pieces, and put them together."""
    answer = await transport.open(call, timeouts)
    return Response(answer.status, answer.headers, await whole(answer))


def check_clean(error: BaseException, *secrets: str) -> None:
    """Nothing of aiohttp comes along with an error, and nothing secret, even with local variables shown."""
    assert error.__context__ is None
    assert error.__cause__ is None
    shown = "".join(traceback.TracebackException.from_exception(error, capture_locals=True).format())
    assert "aiohttp" not in str(error) + repr(error)
    assert not [secret for secret in (KEY, *secrets) if secret in shown]
