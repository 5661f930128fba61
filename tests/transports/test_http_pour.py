"""Answers that are poured: each piece goes on from where the socket is read, and no task is woken for it."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import time
import zlib
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from _scripted import Close, Scripted, Stall, check_clean, run, until
from test_http_streams import HEAD, LAST, chunk, flooded, opened, settled

from rxllm import Timeouts
from rxllm.errors import CancelledError, DecodeError, TimeoutError
from rxllm.policies.connection import Connection
from rxllm.transports import HttpTransport
from rxllm.transports.connections import READ
from rxllm.transports.http_answer import Body, HttpAnswer

pytestmark = pytest.mark.usefixtures("loops")

POURED = object()  # a step: wait until the answer is poured
of_caller: contextvars.ContextVar[str] = contextvars.ContextVar("of_caller")


@contextlib.asynccontextmanager
async def pouring(*steps: Any, **options: Any) -> AsyncIterator[tuple[HttpAnswer, Scripted, HttpTransport]]:
    """Open the answer that these steps make."""
    answers: list[HttpAnswer] = []

    async def poured() -> None:
        await until(lambda: bool(answers) and answers[0]._over is not None)

    async with opened(*(poured if step is POURED else step for step in steps), **options) as found:
        answers.append(found[0])
        yield found


def test_pieces_are_given_as_they_come_outside_of_any_task_and_in_the_callers_context():
    async def main() -> None:
        of_caller.set("here")
        seen: list[Any] = []
        came = asyncio.Event()

        def take(piece: bytes) -> None:
            seen.append((piece, asyncio.current_task(), of_caller.get()))
            came.set()

        async def taken() -> None:
            await came.wait()
            came.clear()

        async with pouring(HEAD, POURED, chunk(b"a"), taken, chunk(b"bc"), taken, LAST) as (reading, server, _):
            assert await reading.pour(take) is False
            assert seen == [(b"a", None, "here"), (b"bc", None, "here")]
            assert await reading.pour(take) is False
            assert await reading.read() == b""
            assert server.open == 1  # the connection is kept

    run(main())


def test_what_has_come_before_is_given_first():
    async def main() -> None:
        async with opened(HEAD + chunk(b"a"), 0.01, chunk(b"b"), LAST) as (reading, *_):
            seen: list[bytes] = []
            await asyncio.sleep(0.03)
            assert await reading.pour(seen.append) is False
            assert b"".join(seen) == b"ab"

    run(main())


def test_nothing_more_is_given_once_it_is_enough_and_the_rest_is_kept_for_the_next():
    async def main() -> None:
        more = asyncio.Event()
        pieces = chunk(b"a") + chunk(b"b") + chunk(b"c")  # in one read of the socket
        async with pouring(HEAD, POURED, pieces, more.wait, chunk(b"d"), chunk(b"e"), LAST) as (reading, *_):
            seen: list[bytes] = []

            def take(piece: bytes) -> bool:
                seen.append(piece)
                return len(seen) == 1

            assert await reading.pour(take) is True
            assert seen == [b"a"]
            assert await reading.read() == b"bc"
            more.set()
            assert await reading.pour(seen.append) is False
            assert b"".join(seen) == b"ade"

    run(main())


@pytest.mark.parametrize("error", [ValueError("no"), DecodeError("no"), SystemExit(3)], ids=lambda e: type(e).__name__)
@pytest.mark.parametrize("steps", [[POURED], []], ids=["from-the-socket", "from-what-had-come"])
def test_what_the_taker_raises_is_raised_and_the_answer_stays_readable(error, steps):
    async def main() -> None:
        async with pouring(HEAD, *steps, chunk(b"a"), 0.02, chunk(b"b"), LAST) as (reading, *_):

            def take(piece: bytes) -> None:
                seen.append(piece)
                raise error

            seen: list[bytes] = []
            if not steps:
                await until(lambda: reading._payload.total_bytes > 0)
            with pytest.raises(type(error)) as caught:
                await reading.pour(take)
            assert caught.value is error
            assert seen == [b"a"]
            assert await reading.read() == b"b"

    run(main())


def test_nothing_is_given_after_the_task_was_cancelled_and_the_connection_is_closed():
    async def main() -> None:
        seen: list[bytes] = []

        def take(piece: bytes) -> None:
            seen.append(piece)
            task.cancel()  # more is in the same read of the socket, before the task can run

        async with pouring(HEAD, POURED, chunk(b"a") + chunk(b"b"), Stall) as (reading, server, _):
            task = asyncio.create_task(reading.pour(take))
            with pytest.raises(asyncio.CancelledError):
                await task
            assert seen == [b"a"]
            await until(lambda: server.open == 0)

    run(main())


@pytest.mark.parametrize("by", ["answer", "transport"])
def test_closing_ends_what_is_poured_as_given_up(by):
    async def main() -> None:
        seen: list[bytes] = []
        async with pouring(HEAD, POURED, chunk(b"a"), Stall) as (reading, server, transport):
            task = asyncio.create_task(reading.pour(seen.append))
            await until(lambda: bool(seen))
            (reading if by == "answer" else transport).close()
            with pytest.raises(CancelledError) as caught:
                await task
            check_clean(caught.value)
            await until(lambda: server.open == 0)

    run(main())


def test_a_closed_answer_is_not_poured():
    async def main() -> None:
        async with opened(HEAD, chunk(b"a"), Stall) as (reading, *_):
            reading.close()
            with pytest.raises(CancelledError):
                await reading.pour(lambda _piece: pytest.fail("it was closed"))

    run(main())


def test_an_answer_that_is_cut_short_is_an_error_after_what_has_come():
    async def main() -> None:
        async with pouring(HEAD, POURED, chunk(b"a"), 0.01, Close) as (reading, *_):
            seen: list[bytes] = []
            for _ in range(2):
                with pytest.raises(DecodeError, match="cut short") as caught:
                    await reading.pour(seen.append)
                check_clean(caught.value)
            assert seen == [b"a"]

    run(main())


def test_what_is_packed_is_poured_as_it_is_flushed():
    async def main() -> None:
        packer = zlib.compressobj(wbits=31)
        first = packer.compress(b"data: a\n\n") + packer.flush(zlib.Z_SYNC_FLUSH)
        second = packer.compress(b"data: b\n\n") + packer.flush()
        head = HEAD.replace(b"Transfer", b"Content-Encoding: gzip\r\nTransfer")
        async with pouring(head, POURED, chunk(first), 0.01, chunk(second), LAST) as (reading, *_):
            seen: list[bytes] = []
            assert await reading.pour(seen.append) is False
            assert seen == [b"data: a\n\n", b"data: b\n\n"]

    run(main())


def test_a_poured_answer_that_is_too_large_is_an_error_and_its_connection_closed():
    async def main() -> None:
        few = Connection(trust_env=False, body_bytes=1_000)
        parts = [part for _ in range(3) for part in (chunk(b"x" * 400), 0.005)]
        async with pouring(HEAD, POURED, *parts, Stall, connection=few) as (reading, server, _):
            seen: list[bytes] = []
            for _ in range(2):
                with pytest.raises(DecodeError, match="larger than 1000 bytes") as caught:
                    await reading.pour(seen.append)
                check_clean(caught.value)
            assert len(b"".join(seen)) == 800
            await until(lambda: server.open == 0)

    run(main())


# back-pressure


def test_whoever_has_enough_makes_the_server_wait():
    async def main() -> None:
        async with flooded(32) as (reading, flood):
            seen = 0

            def take(piece: bytes) -> bool:
                nonlocal seen
                assert piece == (flood.piece * 10)[seen % 256 :][: len(piece)]
                seen += len(piece)
                return seen % 3 == 0

            while await reading.pour(take):
                stopped = reading._payload.total_bytes
                assert reading._payload.total_bytes - reading._size <= 1 << 19
                if seen < 1 << 20:
                    await settled(lambda: reading._payload.total_bytes)
                    assert reading._payload.total_bytes - stopped <= 1 << 19
            assert seen == flood.size

    run(main())


def test_many_small_chunks_of_which_some_are_poured_and_some_are_read_all_come():
    """Each kept chunk of HTTP is noted, and too many notes pause the socket: those of poured ones must not pile up."""

    async def main() -> None:
        pieces = [b"%05d" % n for n in range(4_500)]
        writes = [b"".join(map(chunk, pieces[n : n + 100])) for n in range(0, len(pieces), 100)]
        enough = asyncio.Event()
        async with pouring(HEAD, POURED, *writes, enough.wait, *writes, LAST) as (reading, *_), asyncio.timeout(5):
            seen: list[bytes] = []
            assert await reading.pour(lambda piece: seen.append(piece) or len(seen) == len(pieces)) is True
            enough.set()
            while piece := await reading.read():
                seen.append(piece)
            assert b"".join(seen) == b"".join(pieces) * 2

    run(main())


# the clocks


def test_each_piece_begins_the_idle_time_anew():
    async def main() -> None:
        steps = [part for _ in range(30) for part in (0.01, chunk(b"x"))]
        async with opened(HEAD, *steps, LAST, timeouts=Timeouts(idle=0.2)) as (reading, *_):
            seen: list[bytes] = []
            assert await reading.pour(seen.append) is False
            assert b"".join(seen) == b"x" * 30

    run(main())


@pytest.mark.parametrize(
    ("timeouts", "phase"),
    [
        pytest.param(Timeouts(idle=0.2), "idle", id="idle"),
        pytest.param(Timeouts(idle=20, total=0.2), "total", id="total"),
    ],
)
def test_a_stall_of_what_is_poured_is_a_timeout(timeouts, phase):
    async def main() -> None:
        async with pouring(HEAD, POURED, chunk(b"a"), 0.01, chunk(b"b"), Stall, timeouts=timeouts) as (
            reading,
            server,
            _,
        ):
            seen: list[bytes] = []
            for _ in range(2):
                with pytest.raises(TimeoutError) as caught:
                    await reading.pour(seen.append)
                check_clean(caught.value)
                assert caught.value.phase == phase
            assert seen == [b"a", b"b"]
            assert reading._timer is None
            await until(lambda: server.open == 0)

    run(main())


def test_a_slow_taker_uses_up_neither_idle_nor_total():
    async def main() -> None:
        steps = [part for _ in range(3) for part in (0.001, chunk(b"x"))]
        async with opened(HEAD, *steps, LAST, timeouts=Timeouts(idle=0.05, total=10)) as (reading, *_):
            slow = 0.0

            def take(_piece: bytes) -> None:
                nonlocal slow
                time.sleep(0.08)  # longer than idle: the loop stands still meanwhile
                slow += 0.08

            begun, before = time.monotonic(), reading._waited
            assert await reading.pour(take) is False
            assert slow
            assert reading._waited - before <= time.monotonic() - begun - slow

    run(main())


def test_total_counts_the_time_before_each_piece():
    async def main() -> None:
        steps = [part for _ in range(4) for part in (0.02, chunk(b"x"))]
        async with pouring(HEAD, POURED, *steps, LAST, timeouts=Timeouts(total=20)) as (reading, *_):
            before = reading._waited
            assert await reading.pour(lambda _piece: None) is False
            assert reading._waited - before >= 0.07

    run(main())


# what this needs of aiohttp


def test_the_reader_of_aiohttp_is_what_the_body_of_an_answer_is_made_of():
    """A new aiohttp may move these: then `Body` has to follow, or pour nothing (see `HttpAnswer.pour`)."""

    async def main() -> None:
        async with opened(HEAD, chunk(b"a"), Stall) as (reading, *_):
            payload = reading._payload
            assert type(payload) is Body, "the parser makes a reader of another class than aiohttp.StreamReader"
            assert {"_protocol", "_cursor"} <= set(aiohttp.StreamReader.__slots__)
            assert payload._protocol is reading._held.protocol
            assert await reading.read() == b"a"
            assert payload._cursor == payload.total_bytes == 1

    run(main())


def test_one_read_of_the_socket_is_no_larger_than_it_should_be():
    async def main() -> None:
        async with opened(HEAD, chunk(b"a"), Stall) as (reading, *_):
            transport = reading._held.protocol.transport
            if type(asyncio.get_running_loop()).__module__.startswith("asyncio"):
                assert transport.max_size == READ, "asyncio's transports have no max_size any more"
            with contextlib.suppress(AttributeError):
                assert transport.max_size == READ

    run(main())
