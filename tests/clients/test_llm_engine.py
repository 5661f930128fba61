"""The client for LLM Engine, over real HTTP: what it sends, makes of answers and faults, and never shows."""

from __future__ import annotations

import asyncio
import base64
import copy
import inspect
import json
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

import rxllm
from rxllm import Chunk, Outcome, Request, Usage, chat
from rxllm.clients.llm_engine import LLMEngine
from rxllm.errors import (
    AuthError,
    CallError,
    ConfigError,
    DecodeError,
    InvalidRequestError,
    RateLimitedError,
    ServerError,
    UnsupportedError,
)
from rxllm.policies.connection import Connection
from rxllm.testing.simulated import SimulatedProvider
from rxllm.transports import MemoryTransport, Response

KEY = "scale-marker-0123456789"
LOGIN = base64.b64encode(f"{KEY}:".encode()).decode()
SOON = rxllm.Backoff(attempts=3, base=0.001, cap=0.001)


class Person(msgspec.Struct):
    name: str
    age: int


def asking(**fields: Any) -> Request:
    return Request(body={"prompt": "Why is the sky blue?", "max_new_tokens": 100, **fields}, operation="completions")


def calls(items: list[Any], client: Any, **settings: Any) -> Awaitable[list[Outcome[Any]]]:
    return rxllm.acollect(rxllm.from_iterable(items).pipe(rxllm.call(client, ordered=True, retry=SOON, **settings)))


def against(check: Callable[[SimulatedProvider, Any], Awaitable[None]], output: Any = None, **settings: Any) -> None:
    """Run a check with a server and a client of it, on a loop of its own."""

    async def main() -> None:
        async with (
            SimulatedProvider(key=KEY, retry_after="off", **settings) as provider,
            LLMEngine("llama/3 8b", provider.origin, api_key=KEY, output=output) as client,
        ):
            await check(provider, client)

    asyncio.run(main())


@pytest.mark.parametrize("item", ["hi", asking(return_token_log_probs=True)], ids=["a-prompt", "a-request"])
def test_answers_come_in_one_piece_and_in_many_with_the_same_reply(item):
    async def check(_: SimulatedProvider, client: LLMEngine[str]) -> None:
        pieces: list[Any] = []
        (one,) = await calls([item], client)
        (many,) = await calls([item], client, on_chunk=lambda _, piece: pieces.append(piece))
        assert one.text == many.text != ""
        assert one.usage == many.usage != Usage()
        assert one.reply.extra == many.reply.extra
        assert (one.reply.extra["output"]["tokens"] is None) == (item == "hi")
        assert len(pieces) > 2
        assert "".join(piece.text for piece in pieces) == many.text

    against(check)


def test_a_stream_is_the_pieces_as_they_come():
    async def check(_: SimulatedProvider, client: LLMEngine[str]) -> None:
        chunks = await rxllm.acollect(client.stream(asking()))
        assert all(isinstance(chunk, Chunk) for chunk in chunks)
        assert [chunk.finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["finished"]
        assert chunks[-1].usage.input_tokens > 0

    against(check)


@pytest.mark.parametrize("fault", ["error_midway", "unfinished", "truncated", "garbled"])
def test_a_stream_that_breaks_is_begun_again(fault):
    async def check(provider: SimulatedProvider, client: LLMEngine[str]) -> None:
        provider.set(script=[fault])
        (outcome,) = await calls([asking()], client, stream=True)
        assert outcome.ok
        first = outcome.attempts[0].error
        assert isinstance(first, ServerError if fault == "error_midway" else DecodeError | CallError)
        assert first.transient
        assert first.partial
        assert len(outcome.attempts) == 2

    against(check)


@pytest.mark.parametrize(
    ("fault", "error"),
    [("429", RateLimitedError), ("401", AuthError), ("400", InvalidRequestError), ("500", ServerError)],
)
def test_refusals_are_ours(fault, error):
    async def check(provider: SimulatedProvider, client: LLMEngine[str]) -> None:
        provider.set(script=[fault])
        with pytest.raises(error):
            await rxllm.acollect(client.send(asking()))

    against(check)


def test_what_the_server_would_refuse_is_never_sent():
    async def check(provider: SimulatedProvider, client: LLMEngine[str]) -> None:
        wrong, unknown = await calls([asking(temperature=2), chat("hi")], client)
        assert isinstance(wrong.error, InvalidRequestError)
        assert "temperature must be a finite number >= 0 and <= 1, got 2" in str(wrong.error)
        assert isinstance(unknown.error, UnsupportedError)
        assert not wrong.error.sent
        assert provider.statistics().arrivals == 0

    against(check)


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_a_type_are_values(stream):
    async def check(_: SimulatedProvider, client: LLMEngine[Person]) -> None:
        (outcome,) = await calls([asking()], client, stream=stream)
        assert isinstance(outcome.value, Person)

    against(check, output=Person)


async def head_of(make: Callable[[str], Any]) -> tuple[str, dict[str, str], Any]:
    """Return the request line, the headers and the body that a client sends."""
    heard: list[bytes] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heard.append(await reader.readuntil(b"\r\n\r\n"))
        size = next(int(line[15:]) for line in heard[0].lower().split(b"\r\n") if line.startswith(b"content-length:"))
        heard.append(await reader.readexactly(size))
        writer.write(b"HTTP/1.1 400 Bad\r\ncontent-length: 0\r\nconnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server, make(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as client:
        await calls(["hi"], client)
    line, *fields = heard[0].decode().strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
    return line, headers, json.loads(heard[1])


@pytest.mark.parametrize("slash", ["", "/"])
def test_the_key_goes_into_both_headers_and_the_model_into_the_query(slash):
    more = Connection(headers={"x-team": "blue"})
    line, headers, body = asyncio.run(
        head_of(lambda url: LLMEngine("a b&c/d", f"{url}/llm-engine{slash}", api_key=KEY, connection=more))
    )
    assert line == "POST /llm-engine/v1/llm/completions-sync?model_endpoint_name=a%20b%26c%2Fd HTTP/1.1"
    assert headers["x-api-key"] == KEY
    scheme, login = headers["authorization"].split()
    assert (scheme, base64.b64decode(login)) == ("Basic", f"{KEY}:".encode())
    assert headers["x-team"] == "blue"
    assert body == {"max_new_tokens": 20, "temperature": 0.2, "prompt": "hi"}


def test_address_and_key_are_taken_from_where_its_own_client_takes_them(monkeypatch):
    def make(url: str) -> LLMEngine[str]:
        monkeypatch.setenv("LLM_ENGINE_BASE_PATH", url)
        return LLMEngine("llama")

    monkeypatch.setenv("SCALE_API_KEY", KEY)
    assert asyncio.run(head_of(make))[1]["x-api-key"] == KEY
    monkeypatch.delenv("SCALE_API_KEY")
    assert asyncio.run(head_of(make))[1]["x-api-key"] == "root"
    monkeypatch.delenv("LLM_ENGINE_BASE_PATH")
    for address in ({}, {"base_url": "https://api.spellbook.scale.com/llm-engine/"}):
        with pytest.raises(ConfigError, match="SCALE_API_KEY"):  # "root" is no key of Scale's own
            LLMEngine("llama", **address)
    monkeypatch.setenv("SCALE_API_KEY", KEY)
    assert repr(LLMEngine("llama")) == "LLMEngine(model='llama', base_url='https://api.spellbook.scale.com/llm-engine')"


@pytest.mark.parametrize(
    "wrong",
    [{"accounting": "nobody"}, {"output": object()}, {"connection": 5}, {"base_url": "localhost"}, {"api_key_env": 5}],
)
def test_wrong_arguments_are_refused_by_name(wrong):
    settings = {"base_url": "http://localhost:1", **wrong}
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LLMEngine("llama", **settings)


def test_a_client_is_pickled_with_all_its_settings_and_without_its_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    monkeypatch.setenv("LLM_ENGINE_BASE_PATH", "http://localhost:1")
    client = LLMEngine("llama", api_key_env="MY_KEY", output=Person, accounting="vllm")
    data = pickle.dumps(client)
    assert KEY.encode() not in data
    monkeypatch.setenv("LLM_ENGINE_BASE_PATH", "http://localhost:2")  # the copy talks to where the original does
    again = pickle.loads(data)
    assert repr(again) == repr(client) == "LLMEngine(model='llama', base_url='http://localhost:1', output=Person)"
    assert again._provider.encode(asking()) == client._provider.encode(asking())
    assert (again._given, again.typed) == (client._given, True)
    assert client._given.keys() == inspect.signature(LLMEngine).parameters.keys() - {"api_key"}
    for attempt in (pickle.dumps, copy.copy):
        with pytest.raises(ConfigError, match="api_key_env") as caught:
            attempt(LLMEngine("llama", api_key=KEY))
        assert KEY not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "body"),
    [
        pytest.param(401, b'{"detail":"no user %b"}', id="echo"),
        pytest.param(401, b'{"detail":"no user in Basic %l"}', id="echo-of-the-login"),
        pytest.param(401, b"x" * 490 + b"%b", id="at-the-cut-of-the-body"),
        pytest.param(
            200, b'data: {"output":null,"error":{"status_code":500,"content":{"error":"%b"}}}\r\n\r\n', id="in-an-event"
        ),
        pytest.param(200, b'data: {"output":{"text":"%b\r\n\r\n', id="in-a-garbled-event"),
    ],
)
def test_a_server_that_tells_the_key_does_not_get_it_into_an_error(stream, status, body):
    answer = Response(status, {}, body.replace(b"%b", KEY.encode()).replace(b"%l", LOGIN.encode()))
    client = LLMEngine("llama", api_key=KEY, transport=MemoryTransport(lambda _: answer))
    (outcome,) = asyncio.run(calls([asking()], client, stream=stream))
    assert isinstance(outcome.error, CallError)
    for error in (outcome.error, *(attempt.error for attempt in outcome.attempts)):
        shown = f"{error!r} {error} {vars(error)}"
        assert KEY not in shown
        assert LOGIN not in shown
    for value in (client, client._provider, client._transport, client._censor):
        assert KEY not in f"{value!r} {value}"
