"""A server for benchmarks of streams and embeddings: bytes made before, in a process of its own.

Every stream gets a chunk at each tick, so a client meets them one by one as it does on a real network, and not a whole
answer in one read. The streams are spread over the tick.
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import struct
import time
from base64 import b64encode
from typing import TYPE_CHECKING, Self, cast

import msgspec

from rxllm.testing._child import loop_factory, raise_file_limit
from rxllm.testing._openai import chat_events

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

FIRST = "First"  # the text of the first chunk
OTHER = " word"  # and of all others
TURNS = 8  # of a tick: each has its share of the streams
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\n%b\r\n\r\n"
USAGE = {"prompt_tokens": 9, "completion_tokens": 200, "total_tokens": 209}


class Plan(msgspec.Struct):
    """What is served."""

    chunks: int  # of each stream
    tick: float  # seconds from one to the next
    vectors: int  # of each answer with embeddings
    size: int  # of a vector


class Bytes:
    """All that is ever sent."""

    def __init__(self, plan: Plan) -> None:
        message = {"role": "assistant", "content": FIRST + OTHER * (plan.chunks - 1), "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}
        body = {"id": "chatcmpl-7e088bc3ec97", "created": 1_767_225_600, "model": "simulated", "choices": [choice]}
        raw = msgspec.json.encode({**body, "usage": USAGE})
        events = chat_events(raw, plan.chunks, usage=False)
        role, first, *self.pieces = map(framed, events.shown)
        head = HEAD % (b"text/event-stream; charset=utf-8", b"Transfer-Encoding: chunked")
        self.begin = head + role + first
        finish, usage = map(framed, chat_events(raw, plan.chunks, usage=True).last)
        done = framed(events.done[0]) + b"0\r\n\r\n"
        self.end, self.end_with_usage = finish + done, finish + usage + done
        vector = [((7 * n) % 97 - 48) / 64 for n in range(plan.size)]
        self.floats = whole(vector, plan.vectors)
        self.base64 = whole(b64encode(struct.pack(f"<{plan.size}f", *vector)).decode(), plan.vectors)


def framed(piece: bytes) -> bytes:
    """Return a chunk of HTTP."""
    return b"%x\r\n%b\r\n" % (len(piece), piece)


def whole(embedding: object, count: int) -> bytes:
    """Return a whole answer with so many embeddings."""
    data = [{"object": "embedding", "index": index, "embedding": embedding} for index in range(count)]
    usage = {"prompt_tokens": count, "total_tokens": count}
    body = msgspec.json.encode({"object": "list", "data": data, "model": "simulated", "usage": usage})
    return HEAD % (b"application/json", b"Content-Length: %d" % len(body)) + body


class Client(asyncio.Protocol):
    """A connection: one request after the other."""

    def __init__(self, said: Bytes, streams: list[set[Client]], connected: set[Client]) -> None:
        self.said = said
        self.streams = streams
        self.connected = connected
        self.data = b""
        self.turn: set[Client] | None = None
        self.at = 0
        self.end = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)
        self.connected.add(self)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        """Send no more."""
        self.connected.discard(self)
        if self.turn is not None:
            self.turn.discard(self)

    def data_received(self, data: bytes) -> None:
        """Answer a request that is whole."""
        self.data += data
        head, found, body = self.data.partition(b"\r\n\r\n")
        if not found or len(body) < int(head.lower().partition(b"content-length:")[2].split(None, 1)[0]):
            return
        self.data = b""
        if b"/embeddings " in head:
            self.transport.write(self.said.base64 if b'"base64"' in body else self.said.floats)
            return
        self.at, self.end = 0, self.said.end_with_usage if b"include_usage" in body else self.said.end
        self.turn = min(self.streams, key=len)
        self.turn.add(self)
        self.transport.write(self.said.begin)

    def go_on(self) -> bool:
        """Send the next chunk; say whether it was the last."""
        if self.at == len(self.said.pieces):
            self.transport.write(self.end)
            return True
        self.transport.write(self.said.pieces[self.at])
        self.at += 1
        return False


async def serve(pipe: Connection, plan: Plan) -> None:
    """Serve until the other end says so; tell the port before, and the CPU seconds when asked."""
    loop = asyncio.get_running_loop()
    said = Bytes(plan)
    streams: list[set[Client]] = [set() for _ in range(TURNS)]
    connected: set[Client] = set()
    server = await loop.create_server(lambda: Client(said, streams, connected), "127.0.0.1", 0, backlog=4_096)
    ended = asyncio.Event()

    def asked() -> None:
        if pipe.recv() is None:
            ended.set()
        else:
            pipe.send(time.process_time())

    async def tick() -> None:
        due, turn = loop.time(), 0
        while True:
            due = max(due + plan.tick / TURNS, loop.time())
            await asyncio.sleep(due - loop.time())
            turn = (turn + 1) % TURNS
            for client in tuple(streams[turn]):
                if client.go_on():
                    streams[turn].discard(client)

    ticking = asyncio.create_task(tick())
    loop.add_reader(pipe.fileno(), asked)
    pipe.send(server.sockets[0].getsockname()[1])
    await ended.wait()
    loop.remove_reader(pipe.fileno())
    ticking.cancel()
    server.close()
    for client in tuple(connected):
        client.transport.abort()
    while connected:  # noqa: ASYNC110  a loop that is closed before its connections says so
        await asyncio.sleep(0)


def run(pipe: Connection, plan: Plan) -> None:
    """Run in the child."""
    raise_file_limit()
    with contextlib.suppress(EOFError, KeyboardInterrupt), asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(serve(pipe, plan))


class StreamServer:
    """The server in its child process."""

    def __init__(self, plan: Plan) -> None:
        self._pipe, other = multiprocessing.Pipe()
        self._child = multiprocessing.get_context("spawn").Process(target=run, args=(other, plan), daemon=True)
        self._child.start()
        other.close()
        self.url = f"http://127.0.0.1:{self._pipe.recv()}/v1"

    def cpu_seconds(self) -> float:
        """Return what it has used until now."""
        self._pipe.send("cpu")
        seconds: float = self._pipe.recv()
        return seconds

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """End the child."""
        self._pipe.send(None)
        self._child.join(5)
        self._pipe.close()
