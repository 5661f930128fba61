"""Answers in pieces: what is read ahead, which clock runs when, and what becomes of the connection."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import tracemalloc
import zlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
from _scripted import (
    DIRECT,
    PATIENT,
    Close,
    Reset,
    Scripted,
    Stall,
    answer,
    check_clean,
    run,
    scripted,
    sent,
    streamed,
    transport_to,
    until,
    whole,
)

from rxllm import Timeouts
from rxllm.clock import loop_clock
from rxllm.errors import CallError, CancelledError, ConfigError, DecodeError, TimeoutError
from rxllm.policies.connection import Connection
from rxllm.providers.base import Call, Event
from rxllm.transports import HttpTransport, SseParser, http_answer
from rxllm.transports.http_answer import HttpAnswer

pytestmark = pytest.mark.usefixtures("loops")

CALL = Call("/x", b"{}", accept="text/event-stream")
HEAD = b"HTTP/1.1 200 X\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
LAST = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(data), data)


@contextlib.asynccontextmanager
async def opened(
    *steps: Any, timeouts: Timeouts = PATIENT, connection: Connection = DIRECT
) -> AsyncIterator[tuple[HttpAnswer, Scripted, HttpTransport]]:
    """Open the answer that these steps make; later ones are whole."""
    async with scripted(steps, [answer()]) as server, transport_to(server.url, connection) as transport:
        reading = await transport.open(CALL, timeouts)
        try:
            yield reading, server, transport
        finally:
            reading.close()


# pieces


def test_each_piece_is_there_before_the_next_one_is_sent():
    async def main() -> None:
        seen = asyncio.Event()

        async def seen_again() -> None:
            await seen.wait()
            seen.clear()

        async with opened(HEAD, seen_again, chunk(b"a"), seen_again, chunk(b"bc"), seen_again, LAST) as (
            reading,
            server,
            _,
        ):
            assert (reading.status, reading.headers["content-type"]) == (200, "text/event-stream")
            for expected in (b"a", b"bc", b""):
                seen.set()
                assert await reading.read() == expected
            assert await reading.read() == b""
            assert b"Accept: text/event-stream\r\n" in server.requests[0][1]
            assert b"Accept-Encoding: identity\r\n" in server.requests[0][1]

    run(main())


def test_events_torn_at_every_byte_are_whole_again():
    raw = "data: é1\r\n\r\nevent: x\r\ndata: 2\r\ndata: 3\r\n\r\n: ping\r\n\r\ndata: [DONE]\r\n\r\n".encode()

    async def main() -> None:
        pieces = [part for n in range(len(raw)) for part in (chunk(raw[n : n + 1]), 0.0)]
        async with opened(HEAD, *pieces, LAST) as (reading, _, _):
            parser = SseParser()
            events: list[Event] = []
            while piece := await reading.read():
                events += parser.feed(piece)
            assert events == [Event("é1".encode()), Event(b"2\n3", "x"), Event(b"[DONE]")]

    run(main())


def test_what_is_packed_comes_as_it_is_flushed():
    async def main() -> None:
        packer = zlib.compressobj(wbits=31)
        first = packer.compress(b"data: a\n\n") + packer.flush(zlib.Z_SYNC_FLUSH)
        second = packer.compress(b"data: b\n\n") + packer.flush()
        read = asyncio.Event()
        head = HEAD.replace(b"Transfer", b"Content-Encoding: gzip\r\nTransfer")
        async with opened(head, chunk(first), read.wait, chunk(second), LAST) as (reading, _, _):
            assert await reading.read() == b"data: a\n\n"
            read.set()
            assert await reading.read() == b"data: b\n\n"
            assert await reading.read() == b""

    run(main())


@pytest.mark.parametrize(
    ("end", "gap"),
    [
        pytest.param(Close, 0.0, id="closed-in-the-same-turn"),
        pytest.param(Close, 0.01, id="closed"),
        pytest.param(Reset, 0.01, id="reset"),  # in the same turn it would take with it what was not read yet
    ],
)
def test_what_came_before_a_cut_is_read_before_the_error(end, gap):
    async def main() -> None:
        async with opened(HEAD, chunk(b"a"), *([gap] if gap else []), end) as (reading, _, _):
            await asyncio.sleep(0.03)  # both have come by now
            assert await reading.read() == b"a"
            for _ in range(2):
                with pytest.raises(DecodeError, match="cut short") as caught:
                    await reading.read()
                check_clean(caught.value)
                assert caught.value.transient

    run(main())


def test_an_error_that_is_cut_short_is_still_readable():
    async def main() -> None:
        async with opened(b"HTTP/1.1 401 X\r\nContent-Length: 99\r\n\r\nwrong k", 0.01, Close) as (reading, server, _):
            assert reading.status == 401
            assert await whole(reading) == b"wrong k"
            await until(lambda: server.open == 0)

    run(main())


# back-pressure


async def settled(read: Any) -> int:
    """Wait until a number changes no more; return it."""
    values = [-1, -2]
    async with asyncio.timeout(20):
        while len(set(values[-5:])) > 1:
            values.append(read())
            await asyncio.sleep(0.005)
    return values[-1]


class Flood:
    """A step that writes so many MB, and counts what the client has taken of them off its hands."""

    def __init__(self, megabytes: int) -> None:
        self.size = megabytes << 20
        self.written = 0
        self.piece = bytes(range(256)) * 256  # 64 KiB

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65_536)
        await reader.readuntil(b"\r\n\r\n{}")
        writer.write(b"HTTP/1.1 200 X\r\nContent-Length: %d\r\n\r\n" % self.size)
        with contextlib.suppress(OSError, RuntimeError):
            while self.written < self.size:
                writer.write(self.piece)
                await writer.drain()
                self.written += len(self.piece)
        with contextlib.suppress(OSError, RuntimeError):
            await reader.read()
        writer.transport.abort()


@contextlib.asynccontextmanager
async def flooded(megabytes: int, timeouts: Timeouts = PATIENT) -> AsyncIterator[tuple[HttpAnswer, Flood]]:
    flood = Flood(megabytes)
    listener = await asyncio.start_server(flood.serve, "127.0.0.1", 0)
    async with transport_to(f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}") as transport:
        reading = await transport.open(CALL, timeouts)
        yield reading, flood
        reading.close()
    listener.close()


def test_who_does_not_read_makes_the_server_wait():
    async def main() -> None:
        async with flooded(32) as (reading, flood):
            stopped = await settled(lambda: flood.written)
            assert stopped < 12 << 20  # what the system holds for both sides, the most of it
            assert reading._payload.total_bytes <= 1 << 19  # here: the buffer and what was on its way to it
            size = 0
            while piece := await reading.read():
                assert piece == (flood.piece * 10)[size % 256 :][: len(piece)]
                size += len(piece)
            assert size == flood.size

    run(main())


def test_a_slow_reader_uses_up_neither_idle_nor_total():
    async def main() -> None:
        async with flooded(8, Timeouts(idle=0.03, total=0.15)) as (reading, _):
            await settled(lambda: reading._payload.total_bytes)
            for _ in range(5):  # there is always something to read
                await asyncio.sleep(0.04)
                assert await reading.read()

    run(main())


# the clocks


def test_a_stream_outlives_any_idle_that_its_gaps_respect():
    async def main() -> None:
        steps = [part for _ in range(30) for part in (chunk(b"x"), 0.01)]
        async with opened(HEAD, *steps, LAST, timeouts=Timeouts(idle=0.2)) as (reading, _, _):
            assert await whole(reading) == b"x" * 30

    run(main())


def test_idle_also_runs_for_a_read_that_begins_after_one_that_did_not_wait():
    async def main() -> None:
        async with opened(HEAD, chunk(b"a"), 0.03, chunk(b"b"), Stall, timeouts=Timeouts(idle=0.06)) as (reading, *_):
            assert await reading.read() == b"a"
            await asyncio.sleep(0.09)  # the timer of the first read has rung: nobody was waiting
            assert await reading.read() == b"b"
            with pytest.raises(TimeoutError) as caught:
                await reading.read()
            assert caught.value.phase == "idle"

    run(main())


@pytest.mark.parametrize(
    ("timeouts", "phase"),
    [
        pytest.param(Timeouts(idle=0.03), "idle", id="idle"),
        pytest.param(Timeouts(idle=20, total=0.05), "total", id="total"),
        pytest.param(Timeouts(idle=0.03, total=20), "idle", id="idle-before-total"),
    ],
)
def test_a_stall_is_a_timeout_that_names_its_phase_and_closes_the_connection(timeouts, phase):
    async def main() -> None:
        async with opened(HEAD, chunk(b"a"), Stall, timeouts=timeouts) as (reading, server, _):
            assert await reading.read() == b"a"
            for _ in range(2):
                with pytest.raises(TimeoutError) as caught:
                    await reading.read()
                check_clean(caught.value)
                assert (caught.value.phase, caught.value.sent) == (phase, True)
            await until(lambda: server.open == 0)
            task = asyncio.current_task()
            assert task is not None
            assert task.cancelling() == 0

    run(main())


def test_total_counts_from_the_start_of_the_call_and_only_while_it_waits():
    async def main() -> None:
        limits = Timeouts(total=20)
        async with opened(0.05, HEAD, 0.05, chunk(b"a"), LAST, timeouts=limits) as (reading, *_):
            assert reading._waited >= 0.05  # for the head
            before = reading._waited
            await reading.read()
            assert reading._waited > before  # for the first piece
            before = reading._waited
            await asyncio.sleep(0.03)
            assert await reading.read() == b""
            assert reading._waited - before < 0.03

    run(main())


def test_no_clock_is_left_when_an_answer_has_ended():
    async def main() -> None:
        clock = loop_clock(asyncio.get_running_loop())
        limits = Timeouts(first_byte=12, idle=13, total=14)
        for steps in ([HEAD, 0.01, chunk(b"a"), 0.01, LAST], [HEAD, 0.01, chunk(b"a"), Close]):
            async with opened(*steps, timeouts=limits) as (reading, *_):
                with contextlib.suppress(DecodeError):
                    await whole(reading)
                assert reading._timer is None
        assert {length: alarms._live for length, alarms in clock.alarms.items()} == {12: 0, 14: 0}

    run(main())


# given up


def test_a_read_that_is_cancelled_closes_the_connection_at_once():
    async def main() -> None:
        async with opened(HEAD, chunk(b"a"), Stall) as (reading, server, _):
            await reading.read()
            task = asyncio.create_task(reading.read())
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: server.open == 0)

    run(main())


def test_closing_closes_the_connection_at_once_and_a_read_says_so():
    async def main() -> None:
        async with opened(HEAD, chunk(b"a"), Stall) as (reading, server, _):
            await reading.read()
            task = asyncio.create_task(reading.read())
            await asyncio.sleep(0)
            reading.close()
            reading.close()
            reading.close(drain=True)
            for waiting in (task, reading.read()):
                with pytest.raises(CancelledError, match="closed before its end") as caught:
                    await waiting
                check_clean(caught.value)
            await until(lambda: server.open == 0)

    run(main())


@pytest.mark.parametrize("reads", [True, False], ids=["while-it-is-read", "between-two-reads"])
def test_closing_the_transport_ends_a_stream_as_given_up_not_as_a_fault(reads):
    async def main() -> None:
        async with opened(HEAD, chunk(b"a"), Stall) as (reading, server, transport):
            await reading.read()
            if reads:
                task = asyncio.create_task(reading.read())
                await asyncio.sleep(0)
                transport.close()
            else:
                transport.close()
                await until(lambda: server.open == 0)
                task = asyncio.create_task(reading.read())
            with pytest.raises(CancelledError, match="the client was closed") as caught:
                await task
            check_clean(caught.value)
            assert not caught.value.transient
            await until(lambda: server.open == 0)

    run(main())


def test_closing_the_transport_also_ends_the_wait_for_the_rest_of_a_whole_answer():
    async def main() -> None:
        async with scripted([HEAD, chunk(b"a"), Stall]) as server, transport_to(server.url) as transport:
            task = asyncio.create_task(transport.send(CALL, PATIENT))
            await until(lambda: bool(server.requests))
            await asyncio.sleep(0.02)
            transport.close()
            with pytest.raises(CancelledError, match="the client was closed"):
                await task

    run(main())


# connections of finished streams


async def again(transport: HttpTransport) -> None:
    assert (await transport.send(Call("/y", b""), PATIENT)).body == b"{}"


def test_the_connection_of_a_stream_that_was_read_to_its_end_is_kept():
    async def main() -> None:
        async with opened(HEAD, chunk(b"a"), 0.01, LAST) as (reading, server, transport):
            await whole(reading)
            await again(transport)
            assert server.connections == 1

    run(main())


@pytest.mark.parametrize("late", [True, False], ids=["the-framing-comes-later", "all-of-it-is-there"])
def test_draining_keeps_the_connection_of_a_message_that_is_complete(late, monkeypatch):
    monkeypatch.setattr(http_answer, "DRAIN", 600.0)  # it does not wait for that

    async def main() -> None:
        closed = asyncio.Event()
        steps = (HEAD, chunk(b"a"), closed.wait, LAST) if late else (HEAD + chunk(b"a") + LAST,)
        async with opened(*steps) as (reading, server, transport):
            assert await reading.read() == b"a"
            reading.close(drain=True)
            reading.close()  # again is harmless: it is not this that decides
            closed.set()
            await until(lambda: any(transport._pools._made[asyncio.get_running_loop()].thing.connector._conns.values()))
            await again(transport)
            assert server.connections == 1

    run(main())


def test_closing_without_draining_keeps_no_connection_in_the_middle_of_a_message():
    async def main() -> None:
        async with opened(HEAD, chunk(b"a"), 0.02, LAST) as (reading, server, transport):
            await reading.read()
            reading.close()
            await again(transport)
            assert server.connections == 2

    run(main())


def test_a_drained_connection_with_more_than_its_answer_is_not_used_again():
    async def main() -> None:
        closed = asyncio.Event()
        async with opened(HEAD, chunk(b"a"), closed.wait, LAST + answer(b"stray")) as (reading, server, transport):
            await reading.read()
            reading.close(drain=True)
            closed.set()
            await until(lambda: server.open == 0)
            await again(transport)
            assert server.connections == 2

    run(main())


@pytest.mark.parametrize(
    "rest",
    [
        pytest.param([Stall], id="nothing-comes"),
        pytest.param([chunk(bytes(1_000))] * 2_000 + [Stall], id="far-too-much-comes"),
        pytest.param([Close], id="it-is-cut"),
    ],
)
def test_draining_ends_after_a_while_or_when_too_much_comes(rest, monkeypatch):
    monkeypatch.setattr(http_answer, "DRAIN", 0.05)

    async def main() -> None:
        async with opened(HEAD, chunk(b"a"), 0.01, *rest) as (reading, server, transport):
            assert await reading.read() == b"a"
            reading.close(drain=True)
            await until(lambda: server.open == 0)
            assert reading._payload.total_bytes <= 1 << 19
            await until(lambda: reading._held is None)
            await again(transport)
            assert server.connections == 2

    run(main())


def test_closing_the_transport_ends_the_draining():
    async def main() -> None:
        async with opened(HEAD, chunk(b"a"), Stall) as (reading, server, transport):
            await reading.read()
            reading.close(drain=True)
            await transport.aclose()
            assert reading._held is None
            assert loop_clock(asyncio.get_running_loop()).alarms[http_answer.DRAIN]._live == 0
            await until(lambda: server.open == 0)

    run(main())


# sizes


@pytest.mark.parametrize("way", [sent, streamed], ids=["in-one-piece", "streamed"])
def test_a_small_answer_that_unpacks_to_a_huge_one_takes_no_memory(way):
    bomb = gzip.compress(bytes(64 << 20), 1)

    async def main() -> int:
        small = Connection(trust_env=False, body_bytes=1 << 20)
        packed = answer(bomb, extra=b"Content-Encoding: gzip\r\n")
        async with scripted([packed]) as server, transport_to(server.url, small) as transport:
            tracemalloc.start()
            with pytest.raises(DecodeError, match=r"larger than 1 MB; see Connection\(body_bytes=...\)"):
                await way(transport, CALL, PATIENT)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            await until(lambda: server.open == 0)
            return peak

    assert run(main()) < 12 << 20  # aiohttp's buffer, several times over


@pytest.mark.parametrize("way", [sent, streamed], ids=["in-one-piece", "streamed"])
@pytest.mark.parametrize(("size", "fits"), [(100, True), (101, False)])
def test_an_answer_may_have_the_stated_size_and_no_byte_more(size, fits, way):
    async def main() -> None:
        small = Connection(trust_env=False, body_bytes=100)
        async with scripted([answer(b"x" * size)]) as server, transport_to(server.url, small) as transport:
            if fits:
                assert len((await way(transport, CALL, PATIENT)).body) == size
            else:
                with pytest.raises(DecodeError, match="larger than 100 bytes"):
                    await way(transport, CALL, PATIENT)

    run(main())


def test_a_stream_that_never_ends_is_cut_off_at_the_stated_size():
    async def main() -> None:
        small = Connection(trust_env=False, body_bytes=100)
        async with opened(HEAD, chunk(b"x" * 60), 0.02, chunk(b"x" * 60), Stall, connection=small) as (
            reading,
            server,
            _,
        ):
            assert len(await reading.read()) == 60
            with pytest.raises(DecodeError, match="larger than 100 bytes"):
                await reading.read()
            await until(lambda: server.open == 0)

    run(main())


@pytest.mark.parametrize("way", [sent, streamed], ids=["in-one-piece", "streamed"])
@pytest.mark.parametrize(("size", "fits"), [(1_900, True), (2_100, False)])
def test_a_line_of_a_header_may_have_the_stated_length(size, fits, way):
    async def main() -> None:
        small = Connection(trust_env=False, header_bytes=2_000)
        steps = [answer(b"ok", extra=b"A: " + b"x" * size + b"\r\n")]
        async with scripted(steps) as server, transport_to(server.url, small) as transport:
            if fits:
                assert (await way(transport, CALL, PATIENT)).body == b"ok"
            else:
                with pytest.raises(DecodeError, match="no HTTP"):
                    await way(transport, CALL, PATIENT)

    run(main())


# methods


@pytest.mark.parametrize("way", [sent, streamed], ids=["in-one-piece", "streamed"])
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_what_has_no_body_says_nothing_of_one(method, way):
    async def main() -> None:
        async with scripted([answer(b"ok")]) as server, transport_to(server.url) as transport:
            for _ in range(2):
                assert (await way(transport, Call("/x", method=method), PATIENT)).body == b"ok"
            assert server.connections == 1
            _, head, body = server.requests[0]
            assert head.startswith(b"%b /v1/x HTTP/1.1\r\n" % method.encode())
            assert b"content-" not in head.lower()
            assert body == b""

    run(main())


def test_heads_differ_by_path_method_and_accept():
    async def main() -> None:
        async with scripted([answer(b"ok")]) as server, transport_to(server.url) as transport:
            calls = [Call("/x", b"1"), Call("/x", method="GET"), Call("/x", b"2", accept="a/b"), Call("/y", b"3")]
            for call in calls * 2:
                await transport.send(call, PATIENT)
            firsts = [head.split(b"\r\n")[0] for _, head, _ in server.requests]
            lines = [b"POST /v1/x HTTP/1.1", b"GET /v1/x HTTP/1.1", b"POST /v1/x HTTP/1.1", b"POST /v1/y HTTP/1.1"]
            assert firsts == lines * 2
            assert b"Accept: a/b\r\n" in server.requests[6][1]
            assert [body for _, _, body in server.requests[4:]] == [b"1", b"", b"2", b"3"]

    run(main())


@pytest.mark.parametrize(
    ("call", "text"),
    [
        pytest.param(Call("/x", b"{}", method="GET"), "a GET has no body", id="body-of-a-get"),
        pytest.param(Call("/x", method="get"), "method must be", id="lower-case"),
        pytest.param(Call("/x", method="HEAD"), "method must be", id="head"),
        pytest.param(Call("/x", method="POST /evil HTTP/1.1\r\n"), "method must be", id="more-than-a-method"),
        pytest.param(Call("/x", accept="a\r\nEvil: 1"), "accept must be", id="more-than-a-media-type"),
    ],
)
def test_a_call_that_would_break_the_request_is_refused(call, text):
    async def main() -> None:
        async with scripted([answer()]) as server, transport_to(server.url) as transport:
            for way in (sent, streamed):
                with pytest.raises(ConfigError, match=text):
                    await way(transport, call, PATIENT)
            assert not server.requests

    run(main())


def test_a_closed_transport_opens_nothing():
    async def main() -> None:
        async with scripted([answer()]) as server, transport_to(server.url) as transport:
            transport.close()
            with pytest.raises(ConfigError, match="is closed"):
                await transport.open(CALL, PATIENT)
            assert not server.requests

    run(main())


def test_many_streams_at_a_time_do_not_mix():
    async def main() -> None:
        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            with contextlib.suppress(asyncio.IncompleteReadError, OSError, RuntimeError):
                while True:
                    head = await reader.readuntil(b"\r\n\r\n")
                    name = head.split(b" ")[1].removeprefix(b"/")
                    writer.write(HEAD)
                    for _ in range(20):
                        writer.write(chunk(name + b";"))
                        await asyncio.sleep(0)
                    writer.write(LAST)
            writer.transport.abort()

        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        async with transport_to(url) as transport:

            async def read(name: int) -> None:
                try:
                    reading = await transport.open(Call(f"/{name}", method="GET"), Timeouts(idle=5, total=30))
                    assert await whole(reading) == b"%d;" % name * 20
                except CallError as error:
                    check_clean(error)
                    raise

            for _ in range(2):
                await asyncio.gather(*(read(name) for name in range(50)))
        listener.close()

    run(main())
