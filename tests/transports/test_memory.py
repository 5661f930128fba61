"""MemoryTransport: a function answers."""

from __future__ import annotations

import asyncio
import time

import pytest

from rxllm import Timeouts
from rxllm.errors import ConfigError, ServerError
from rxllm.transports import MemoryTransport, Response


def post(transport: MemoryTransport, path: str = "/x", body: bytes = b"{}") -> Response:
    return asyncio.run(transport.post(path, body, Timeouts()))


def test_a_function_answers():
    transport = MemoryTransport(lambda path, body: Response(201, {"x-y": "z"}, path.encode() + body))
    assert post(transport) == Response(201, {"x-y": "z"}, b"/x{}")


def test_a_coroutine_function_answers():
    async def handler(_path: str, body: bytes) -> Response:
        await asyncio.sleep(0)
        return Response(200, {}, body)

    assert post(MemoryTransport(handler), body=b"1").body == b"1"


def test_what_the_function_raises_is_what_the_call_raises():
    def handler(_path: str, _body: bytes) -> Response:
        raise ServerError("down")

    with pytest.raises(ServerError, match="down"):
        post(MemoryTransport(handler))


def test_the_latency_comes_before_the_answer():
    asked: list[float] = []

    def handler(_path: str, _body: bytes) -> Response:
        asked.append(time.monotonic())
        return Response(200, {}, b"")

    started = time.monotonic()
    post(MemoryTransport(handler, latency=0.05))
    assert asked[0] - started >= 0.05


def test_calls_take_turns_even_without_latency():
    order: list[str] = []

    async def main() -> None:
        transport = MemoryTransport(lambda path, _body: (order.append(path), Response(200, {}, b""))[1])
        calling = asyncio.create_task(transport.post("/call", b"", Timeouts()))
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
