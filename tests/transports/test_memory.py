"""MemoryTransport: a function answers."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from rxllm import Timeouts
from rxllm.errors import CancelledError, ConfigError, DecodeError, ServerError
from rxllm.providers.base import Call
from rxllm.transports import MemoryTransport, Response

CALL = Call("/x", b"{}")


def sent(transport: MemoryTransport, call: Call = CALL) -> Response:
    return asyncio.run(transport.send(call, Timeouts()))


def read(transport: MemoryTransport) -> list[bytes]:
    """Read a streamed answer; an end is an empty piece."""

    async def main() -> list[bytes]:
        answer = await transport.open(CALL, Timeouts())
        pieces = [await answer.read()]
        while pieces[-1]:
            pieces.append(await answer.read())
        answer.close()
        return pieces

    return asyncio.run(main())


async def slowly(*pieces: bytes) -> AsyncIterator[bytes]:
    for piece in pieces:
        await asyncio.sleep(0)
        yield piece


def test_a_function_answers():
    transport = MemoryTransport(lambda call: Response(201, {"x-y": "z"}, call.path.encode() + call.body))
    assert sent(transport) == Response(201, {"x-y": "z"}, b"/x{}")


def test_a_coroutine_function_answers():
    async def handler(call: Call) -> Response:
        await asyncio.sleep(0)
        return Response(200, {}, call.body)

    assert sent(MemoryTransport(handler), Call("/x", b"1")).body == b"1"


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: [b"a", b"bc"], id="list"),
        pytest.param(lambda: iter([b"a", b"", b"bc"]), id="with-an-empty-piece"),
        pytest.param(lambda: slowly(b"a", b"bc"), id="asynchronous"),
    ],
)
def test_pieces_are_one_answer_or_many(make):
    transport = MemoryTransport(lambda _call: (206, {"a": "b"}, make()))
    assert sent(transport) == Response(206, {"a": "b"}, b"abc")
    assert read(transport) == [b"a", b"bc", b""]


@pytest.mark.parametrize(("body", "pieces"), [(b"abc", [b"abc", b""]), (b"", [b""])], ids=["whole", "empty"])
def test_an_answer_in_one_piece_is_streamed_as_one(body, pieces):
    assert read(MemoryTransport(lambda _call: Response(200, {}, body))) == pieces


def test_what_the_function_raises_is_what_the_call_raises():
    def handler(_call: Call) -> Response:
        raise ServerError("down")

    with pytest.raises(ServerError, match="down"):
        sent(MemoryTransport(handler))
    with pytest.raises(ServerError, match="down"):
        read(MemoryTransport(handler))


def test_what_the_pieces_raise_comes_after_those_before():
    def broken() -> Iterator[bytes]:
        yield b"a"
        raise DecodeError("cut short")

    async def main() -> None:
        answer = await MemoryTransport(lambda _call: (200, {}, broken())).open(CALL, Timeouts())
        assert await answer.read() == b"a"
        with pytest.raises(DecodeError, match="cut short"):
            await answer.read()
        answer.close()

    asyncio.run(main())


def test_no_more_is_taken_than_is_read_and_closing_ends_the_generator():
    taken: list[Any] = []

    async def pieces() -> AsyncIterator[bytes]:
        try:
            for number in range(9):
                taken.append(number)
                yield b"x"
        finally:
            taken.append("closed")

    async def main() -> None:
        answer = await MemoryTransport(lambda _call: (200, {}, pieces())).open(CALL, Timeouts())
        assert taken == []
        await answer.read()
        await answer.read()
        assert taken == [0, 1]
        answer.close()
        answer.close(drain=True)
        with pytest.raises(CancelledError, match="closed"):
            await answer.read()
        await asyncio.sleep(0.01)
        assert taken == [0, 1, "closed"]

    asyncio.run(main())


def test_the_latency_comes_before_the_answer():
    asked: list[float] = []

    def handler(_call: Call) -> Response:
        asked.append(time.monotonic())
        return Response(200, {}, b"")

    started = time.monotonic()
    sent(MemoryTransport(handler, latency=0.05))
    assert asked[0] - started >= 0.05


def test_calls_take_turns_even_without_latency():
    order: list[str] = []

    async def main() -> None:
        transport = MemoryTransport(lambda call: (order.append(call.path), Response(200, {}, b""))[1])
        calling = asyncio.create_task(transport.send(Call("/call"), Timeouts()))
        await asyncio.sleep(0)
        order.append("other work")
        await calling
        await transport.aclose()
        transport.close()

    asyncio.run(main())
    assert order == ["other work", "/call"]


@pytest.mark.parametrize(("handler", "latency"), [(None, 0.0), (print, -1.0), (print, "1"), (print, float("nan"))])
def test_arguments_of_another_kind_are_refused(handler, latency):
    with pytest.raises(ConfigError):
        MemoryTransport(handler, latency=latency)
