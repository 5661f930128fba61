"""Streamed answers of the simulated provider, over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

from rxllm.testing.simulated import Latency, SimulatedProvider

Case = Callable[[SimulatedProvider, aiohttp.ClientSession], Awaitable[None]]

CHAT = {"model": "m", "stream": True, "messages": [{"role": "user", "content": "0123456789" * 4}]}


def run(case: Case, **settings: Any) -> SimulatedProvider:
    """Run a case against a provider of its own; check that nothing is left of it."""

    async def main() -> SimulatedProvider:
        async with (
            SimulatedProvider(answer="echo", **settings) as provider,
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
        ):
            await case(provider, session)
        statistics = provider.statistics()
        assert (statistics.connections, statistics.in_flight) == (0, 0)
        return provider

    return asyncio.run(main())


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def texts(data: bytes) -> str:
    """Return all content of the chunks that can be read."""
    found = ""
    for line in data.decode().splitlines():
        if line.startswith("data: {") and line.endswith("}") and '"choices"' in line:
            found += "".join(choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"])
    return found


def test_streams_come_chunked_on_connections_that_are_kept() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        for _ in range(3):
            async with session.post(f"{provider.url}/chat/completions", json=CHAT) as response:
                data = await response.read()
            assert response.status == 200
            assert response.content_type == "text/event-stream"
            assert response.headers["Transfer-Encoding"] == "chunked"
            assert "x-request-id" in response.headers
            assert "openai-processing-ms" in response.headers
            assert response.headers["x-ratelimit-limit-requests"] == "1000"
            assert texts(data) == "0123456789" * 4
            assert data.endswith(b"data: [DONE]\n\n")

    provider = run(case, requests=1_000)
    assert provider.statistics().connections_made == 1
    assert provider.statistics().statuses == {200: 3}
    assert all(row.answered is not None and row.reason == "ok" for row in provider.log())


def test_who_keeps_no_connection_gets_a_stream_that_ends_with_it() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        headers = {"Connection": "close"}
        async with session.post(f"{provider.url}/chat/completions", json=CHAT, headers=headers) as response:
            assert "Transfer-Encoding" not in response.headers
            assert texts(await response.read()) == "0123456789" * 4

    run(case)


def test_chunks_come_one_after_the_other_and_the_answer_is_in_service_until_the_last() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with session.post(f"{provider.url}/chat/completions", json=CHAT) as response:
            first = await response.content.readuntil(b"\n\n")
            assert b'"role":"assistant"' in first
            assert provider.statistics().in_flight == 1
            assert provider.log()[0].answered is None
            data = await response.read()
        assert data.count(b"data: {") == 5  # four pieces and the finish reason
        row = provider.log()[0]
        assert row.answered is not None
        assert row.answered - row.arrived >= 0.05

    run(case, chunks=4, chunk_seconds=0.01)


def test_without_a_gap_of_their_own_chunks_share_the_time_that_tokens_take() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with session.post(f"{provider.url}/chat/completions", json=CHAT) as response:
            await response.content.readuntil(b"\n\n")
            assert provider.statistics().in_flight == 1
            await response.read()
        row = provider.log()[0]
        assert row.answered is not None
        assert row.answered - row.arrived >= 0.08  # ten tokens, less one gap

    run(case, latency=Latency(per_token=0.01))


def test_a_client_that_does_not_read_is_waited_for() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        provider.set(answer=lambda *_: "x" * 20_000_000)
        async with session.post(f"{provider.url}/chat/completions", json=CHAT) as response:
            await asyncio.sleep(0.05)
            assert provider.statistics().in_flight == 1
            assert texts(await response.read()) == "x" * 20_000_000

    provider = run(case, chunks=10)
    assert provider.statistics().disconnected == 0


@pytest.mark.parametrize(
    "settings",
    [{"chunk_seconds": 5.0}, {"chunk_seconds": 5.0, "latency": 0.01}, {"chunks": 3, "script": ["stall_midway"]}],
)
def test_a_client_that_leaves_in_the_middle_is_given_up(settings: dict[str, Any]) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        response = await session.post(f"{provider.url}/chat/completions", json=CHAT)
        await response.content.readuntil(b"\n\n")
        assert provider.statistics().in_flight == 1
        response.close()
        await until(lambda: provider.statistics().in_flight == 0)
        assert provider.log()[0].disconnected

    run(case, **settings)


def test_the_faults_of_streams_come_in_the_middle() -> None:
    faults = ["garbled", "error_midway", "unfinished", "no_done", None]

    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        seen = {}
        for fault in faults:
            async with session.post(f"{provider.url}/chat/completions", json=CHAT) as response:
                assert response.status == 200
                seen[fault] = await response.read()
        text = "0123456789" * 4
        assert len(texts(seen["garbled"])) == 36
        assert text.startswith(texts(seen["error_midway"]))
        assert b'data: {"error":{' in seen["error_midway"]
        assert texts(seen["unfinished"]) == texts(seen["no_done"]) == texts(seen[None]) == text
        assert {fault: b'"finish_reason":"stop"' in data for fault, data in seen.items()} == {
            "garbled": True,
            "error_midway": False,
            "unfinished": False,
            "no_done": True,
            None: True,
        }
        assert {fault: b"[DONE]" in data for fault, data in seen.items()} == {
            "garbled": True,
            "error_midway": False,
            "unfinished": True,
            "no_done": False,
            None: True,
        }

    provider = run(case, script=faults)
    assert [row.reason for row in provider.log()] == [fault or "ok" for fault in faults]


@pytest.mark.parametrize(
    ("fault", "error"), [("truncated", aiohttp.ClientPayloadError), ("stall_midway", aiohttp.ClientError)]
)
def test_a_stream_breaks_off_after_its_first_half(fault: str, error: type[Exception]) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        data = b""
        async with session.post(f"{provider.url}/chat/completions", json=CHAT) as response:
            with pytest.raises(error):
                while piece := await response.content.readany():
                    data += piece
        assert 0 < len(texts(data)) < 40
        await until(lambda: provider.statistics().in_flight == 0)

    provider = run(case, script=[fault], max_stall=0.05)
    assert (provider.log()[0].answered is None) is (fault == "stall_midway")


@pytest.mark.parametrize(
    ("fault", "status", "kind"),
    [("503", 503, "application/json"), ("500", 500, "application/json"), ("html", 200, "text/html")],
)
def test_other_faults_come_in_place_of_a_stream(fault: str, status: int, kind: str) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with session.post(f"{provider.url}/chat/completions", json=CHAT) as response:
            assert (response.status, response.content_type) == (status, kind)

    run(case, script=[fault])


def test_the_faults_of_streams_leave_other_answers_alone() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with session.post(f"{provider.url}/chat/completions", json={**CHAT, "stream": False}) as response:
            assert (await response.json())["choices"][0]["finish_reason"] == "stop"
        assert provider.log()[0].reason == "ok"

    run(case, script=["unfinished"])


def test_a_message_of_the_callers_that_cannot_be_streamed_is_an_error_and_not_a_silence() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        provider.set(answer=lambda *_: {"tool_calls": 5})
        async with session.post(f"{provider.url}/chat/completions", json=CHAT) as response:
            assert response.status == 500
            assert "TypeError" in await response.text()

    run(case)


def test_a_stream_is_charged_what_it_used_once_it_has_ended() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        asked = {**CHAT, "max_tokens": 500}
        async with session.post(f"{provider.url}/chat/completions", json=asked) as response:
            assert response.headers["x-ratelimit-remaining-tokens"] == "490"
            assert provider.log()[0].charged == 510
            await response.read()
        assert provider.log()[0].charged == 20

    run(case, tokens=1_000, charge="settled", chunk_seconds=0.001)


# the other dialects

MESSAGE = {"model": "m", "max_tokens": 9, "messages": [{"role": "user", "content": "hello"}]}
COMPLETION = {"prompt": "hello", "max_new_tokens": 9, "temperature": 0.2}
ENGINE = "/v1/llm/completions-sync?model_endpoint_name=m"


def test_errors_and_headers_are_those_of_the_dialect() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with session.post(f"{provider.origin}/v1/messages", json=MESSAGE) as response:
            message = await response.json()
        assert message["content"] == [{"type": "text", "text": "hello"}]
        headers = response.headers
        assert headers["anthropic-ratelimit-requests-limit"] == "2"
        assert headers["anthropic-ratelimit-requests-remaining"] == "1"
        assert headers["anthropic-ratelimit-requests-reset"].endswith("Z")
        assert "request-id" in headers
        assert not {"x-request-id", "openai-processing-ms", "x-ratelimit-limit-requests"} & set(headers)

        async with session.post(f"{provider.origin}{ENGINE}", json=COMPLETION) as response:
            completion = await response.json()
        assert completion["output"]["text"] == "hello"
        assert not any("ratelimit" in name.lower() for name in response.headers)

        async with session.post(f"{provider.origin}/v1/messages", json=MESSAGE) as response:
            refused = await response.json()
        assert (response.status, refused["type"], refused["error"]["type"]) == (429, "error", "rate_limit_error")
        assert response.headers["request-id"] == refused["request_id"]
        assert float(response.headers["retry-after"]) > 0

        async with session.post(f"{provider.origin}{ENGINE}", json=COMPLETION) as response:
            refused = await response.json()
        assert response.status == 429
        assert refused["detail"].startswith("Rate limit reached")

    run(case, requests=2)


@pytest.mark.parametrize(
    ("path", "body", "status", "said"),
    [
        ("/v1/messages", {**MESSAGE, "max_tokens": 0}, 400, "max_tokens"),
        ("/v1/messages", {"messages": []}, 400, "max_tokens"),
        ("/v1/responses", {"input": "x", "max_output_tokens": -1}, 400, "max_output_tokens"),
        ("/v1/chat/completions", {**CHAT, "tools": [{"function": 5}]}, 400, "tools"),
        (ENGINE, {**COMPLETION, "temperature": 1.5}, 422, "temperature"),
        (ENGINE, {"prompt": "x"}, 422, "max_new_tokens"),
        ("/v1/llm/completions-sync", COMPLETION, 422, "model_endpoint_name"),
    ],
)
def test_a_bad_request_is_refused_by_name(path: str, body: object, status: int, said: str) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with session.post(f"{provider.origin}{path}", json=body) as response:
            assert response.status == status
            assert said in await response.text()
        assert provider.log()[0].reason == "bad_request"

    run(case)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Authorization": "Bearer k-1"}, 200),
        ({"x-api-key": "k-1"}, 200),
        ({"Authorization": "Basic ay0xOg=="}, 200),  # k-1 and no password
        ({"Authorization": "Basic ay0xOg==", "x-api-key": "k-2"}, 401),
        ({"Authorization": "Basic ???"}, 401),
        ({"Authorization": "Bearer k-2", "x-api-key": "k-1"}, 401),
        ({}, 401),
    ],
)
def test_a_key_comes_in_the_way_of_any_dialect(headers: dict[str, str], status: int) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with session.post(f"{provider.origin}/v1/messages", json=MESSAGE, headers=headers) as response:
            assert response.status == status
            if status == 401:
                assert (await response.json())["error"]["type"] == "authentication_error"

    run(case, key="k-1")


@pytest.mark.parametrize(
    ("path", "body", "sign"),
    [
        ("/v1/messages", {**MESSAGE, "stream": True}, b'event: error\ndata: {"type":"error"'),
        ("/v1/responses", {"model": "m", "input": "hello", "stream": True}, b'event: error\ndata: {"type":"error"'),
        ("/v1/completions", {"prompt": "hello", "stream": True}, b'data: {"error":{'),
        (ENGINE.replace("sync", "stream"), COMPLETION, b'"output":null,"error":{"status_code":500'),
    ],
)
def test_each_dialect_has_its_own_error_in_a_stream(path: str, body: object, sign: bytes) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with session.post(f"{provider.origin}{path}", json=body) as response:
            data = await response.read()
        assert response.status == 200
        assert sign in data
        assert data.endswith((b"\n\n", b"\r\n\r\n"))

    run(case, script=["error_midway"])


def test_an_empty_balance_and_an_overload_say_so_as_anthropic_does() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        said = []
        for _ in range(2):
            async with session.post(f"{provider.origin}/v1/messages", json=MESSAGE) as response:
                said.append((response.status, (await response.json())["error"]))
        assert said[0][0] == 429
        assert said[0][1]["details"] == {"error_code": "enforced_spend_limit_reached"}
        assert (said[1][0], said[1][1]["type"]) == (529, "overloaded_error")

    run(case, script=["insufficient_quota", "529"])
