"""The client for Anthropic, over real HTTP: what it sends, what it makes of answers and faults, what it never shows."""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import pickle
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
import pytest

import rxllm
from rxllm import Chunk, Outcome, Usage, chat
from rxllm.clients.anthropic import Anthropic
from rxllm.errors import AuthError, CallError, ConfigError, DecodeError, OverloadedError, RateLimitedError
from rxllm.policies.connection import Connection
from rxllm.testing.simulated import SimulatedProvider
from rxllm.transports import MemoryTransport, Response

KEY = "sk-ant-marker-0123456789"
SOON = rxllm.Backoff(attempts=3, base=0.001, cap=0.001)


class Person(msgspec.Struct):
    name: str
    age: int


def calls(items: list[Any], client: Any, **settings: Any) -> Awaitable[list[Outcome[Any]]]:
    return rxllm.acollect(rxllm.from_iterable(items).pipe(rxllm.call(client, ordered=True, retry=SOON, **settings)))


def against(check: Callable[[SimulatedProvider, Any], Awaitable[None]], output: Any = None, **settings: Any) -> None:
    """Run a check with a server and a client of it, on a loop of its own."""

    async def main() -> None:
        async with (
            SimulatedProvider(key=KEY, retry_after="off", **settings) as provider,
            Anthropic("small", provider.url, api_key=KEY, output=output) as client,
        ):
            await check(provider, client)

    asyncio.run(main())


def test_prompts_are_answered_in_one_piece_and_in_many_with_the_same_reply():
    async def check(_: SimulatedProvider, client: Anthropic[str]) -> None:
        pieces: list[Any] = []
        (one,) = await calls(["Why is the sky blue?"], client)
        (many,) = await calls(["Why is the sky blue?"], client, on_chunk=lambda _, piece: pieces.append(piece))
        assert one.text == many.text != ""
        assert one.usage == many.usage != Usage()
        assert one.reply.extra == many.reply.extra
        assert (one.reply.finish_reason, one.reply.model) == ("end_turn", "small")
        assert len(pieces) > 2
        assert "".join(piece.text for piece in pieces) == many.text

    against(check)


def test_a_stream_is_the_pieces_as_they_come():
    async def check(_: SimulatedProvider, client: Anthropic[str]) -> None:
        chunks = await rxllm.acollect(client.stream(chat("hi", system="Be short.", max_tokens=100)))
        assert all(isinstance(chunk, Chunk) for chunk in chunks)
        assert chunks[-1].finish_reason == "end_turn"
        assert chunks[-1].usage.output_tokens > 0

    against(check)


@pytest.mark.parametrize("fault", ["error_midway", "unfinished", "no_done", "truncated", "garbled"])
def test_a_stream_that_breaks_is_begun_again(fault):
    async def check(provider: SimulatedProvider, client: Anthropic[str]) -> None:
        provider.set(script=[fault])
        (outcome,) = await calls(["hi"], client, stream=True)
        assert outcome.ok
        first = outcome.attempts[0].error
        assert isinstance(first, OverloadedError if fault == "error_midway" else DecodeError | CallError)
        assert first.transient
        assert first.partial
        assert len(outcome.attempts) == 2

    against(check)


@pytest.mark.parametrize(("fault", "error"), [("429", RateLimitedError), ("529", OverloadedError), ("401", AuthError)])
def test_refusals_are_ours(fault, error):
    async def check(provider: SimulatedProvider, client: Anthropic[str]) -> None:
        provider.set(script=[fault])
        with pytest.raises(error) as caught:
            await rxllm.acollect(client.send(chat("hi")))
        assert caught.value.request_id is not None

    against(check)


def test_the_server_tells_a_gate_what_is_left():
    async def check(_: SimulatedProvider, client: Anthropic[str]) -> None:
        (outcome,) = await calls(["hi"], client)
        assert {truth.unit for truth in outcome.reply.limits.truths} >= {"requests", "tokens"}

    against(check, requests=600, tokens=100_000)


@pytest.mark.parametrize("stream", [False, True])
def test_answers_of_a_type_are_values(stream):
    async def check(_: SimulatedProvider, client: Anthropic[Person]) -> None:
        (outcome,) = await calls(["Who?"], client, stream=stream)
        assert isinstance(outcome.value, Person)

    against(check, output=Person)


def test_a_type_that_needs_a_tool_is_a_value_too():
    async def check(_: SimulatedProvider, client: Anthropic[Any]) -> None:
        (outcome,) = await calls(["Who?"], client)
        assert isinstance(outcome.value, dict)
        assert outcome.reply.finish_reason == "tool_use"

    against(check, output=dict[str, int])


async def head_of(make: Callable[[str], Any], item: Any = "hi") -> tuple[str, dict[str, str], Any]:
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
        await calls([item], client)
    line, *fields = heard[0].decode().strip().split("\r\n")
    headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
    return line, headers, json.loads(heard[1])


def test_the_key_the_version_and_what_is_in_beta_go_into_headers():
    beta = Connection(headers={"anthropic-beta": "context-1m-2025-08-07"})
    line, headers, body = asyncio.run(
        head_of(
            lambda url: Anthropic(
                "small", f"{url}/v1", api_key=KEY, version="2030-01-01", max_tokens=9, connection=beta
            )
        )
    )
    assert line == "POST /v1/messages HTTP/1.1"
    assert (headers["x-api-key"], headers["anthropic-version"], headers["anthropic-beta"]) == (
        KEY,
        "2030-01-01",
        "context-1m-2025-08-07",
    )
    assert "authorization" not in headers
    assert body["max_tokens"] == 9


def test_the_defaults_are_those_that_are_told():
    client = Anthropic("small", api_key=KEY)
    assert repr(client) == "Anthropic(model='small', base_url='https://api.anthropic.com/v1')"
    assert repr(Anthropic("small", api_key=KEY, output=Person)).endswith("output=Person)")
    assert client.cost(chat("hi"))["output_tokens"] == 4096.0
    _, headers, _ = asyncio.run(head_of(lambda url: Anthropic("small", url, api_key=KEY)))
    assert headers["anthropic-version"] == "2023-06-01"


def test_a_missing_key_names_its_variable(monkeypatch):
    monkeypatch.delenv("ANTHROPIC_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="ANTHROPIC_API_KEY"):
        Anthropic("small")


@pytest.mark.parametrize(
    "wrong", [{"version": ""}, {"max_tokens": 0}, {"accounting": "nobody"}, {"output": object()}, {"connection": 5}]
)
def test_wrong_arguments_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Anthropic("small", api_key=KEY, **wrong)


def test_a_client_is_pickled_with_all_its_settings_and_without_its_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    settings = {"max_tokens": 9, "version": "2030-01-01", "output": Person, "accounting": "generic"}
    client = Anthropic("small", "http://localhost:1/v1", api_key_env="MY_KEY", **settings)
    data = pickle.dumps(client)
    assert KEY.encode() not in data
    again = pickle.loads(data)
    assert repr(again) == repr(client)
    assert again._provider.encode(chat("hi")) == client._provider.encode(chat("hi"))
    assert (again._given, again.typed) == (client._given, True)
    assert client._given.keys() == inspect.signature(Anthropic).parameters.keys() - {"api_key"}
    for attempt in (pickle.dumps, copy.copy):
        with pytest.raises(ConfigError, match="api_key_env") as caught:
            attempt(Anthropic("small", api_key=KEY))
        assert KEY not in str(caught.value)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        pytest.param(401, {}, b'{"type":"error","error":{"type":"authentication_error","message":"no %b"}}', id="echo"),
        pytest.param(401, {}, b"x" * 490 + b"%b", id="at-the-cut-of-the-body"),
        pytest.param(
            200, {}, b'data: {"type":"error","error":{"type":"api_error","message":"%b"}}\n\n', id="in-an-event"
        ),
        pytest.param(200, {}, b'data: {"type":"message_start","message":"%b\n\n', id="in-a-garbled-event"),
        pytest.param(500, {"request-id": KEY}, b"", id="in-a-request-id"),
    ],
)
def test_a_server_that_tells_the_key_does_not_get_it_into_an_error(stream, status, headers, body):
    answer = Response(status, headers, body.replace(b"%b", KEY.encode()))
    client = Anthropic("small", api_key=KEY, transport=MemoryTransport(lambda _: answer))
    (outcome,) = asyncio.run(calls(["hi"], client, stream=stream))
    assert isinstance(outcome.error, CallError)
    for error in (outcome.error, *(attempt.error for attempt in outcome.attempts)):
        assert KEY not in f"{error!r} {error} {vars(error)}"
    for value in (client, client._provider, client._transport, client._censor):
        assert KEY not in f"{value!r} {value}"
