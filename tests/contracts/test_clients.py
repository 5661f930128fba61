"""What every client keeps, whatever the dialect, over every transport, in one piece and streamed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from reactivex import operators as ops

import rxllm
from rxllm import Outcome, Request
from rxllm.clients import Remote
from rxllm.errors import AuthError, CallError, ConfigError
from rxllm.providers.base import Call
from rxllm.testing import SimulatedProvider
from rxllm.transports import MemoryTransport, Response

KEY = "sk-marker-0123456789"
SOON = rxllm.Backoff(attempts=3, base=0.001, cap=0.002)
WORDS = "one two three four five six"

Make = Callable[..., Remote[Any]]
CLIENTS: dict[str, tuple[Make, Request]] = {
    "chat": (lambda provider, **more: rxllm.OpenAI("m", provider.url, **more), rxllm.chat(WORDS)),
    "completions": (
        lambda provider, **more: rxllm.OpenAI("m", provider.url, **more),
        Request(body={"prompt": WORDS}, operation="completions"),
    ),
    "responses": (
        lambda provider, **more: rxllm.OpenAI("m", provider.url, **more),
        Request(body={"input": WORDS}, operation="responses"),
    ),
    "anthropic": (lambda provider, **more: rxllm.Anthropic("m", provider.url, **more), rxllm.chat(WORDS)),
    "llm_engine": (
        lambda provider, **more: rxllm.LLMEngine("m", provider.origin, **more),
        Request(body={"prompt": WORDS}, operation="completions"),
    ),
}


class Nowhere:
    """Where a server would be."""

    url = origin = "http://127.0.0.1:9"


dialects = pytest.mark.parametrize("dialect", CLIENTS)
streams = pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])


def asked(dialect: str, *, stream: bool, key: str = KEY, **settings: Any) -> tuple[Outcome[Any], SimulatedProvider]:
    """Ask a real server once; leave nothing behind."""

    async def main() -> tuple[Outcome[Any], SimulatedProvider]:
        make, request = CLIENTS[dialect]
        async with SimulatedProvider(answer="echo", key=KEY, chunks=6, **settings) as provider:
            async with make(provider, api_key=key) as client:
                stage = rxllm.call(client, stream=stream, retry=SOON)
                (outcome,) = await rxllm.acollect(rxllm.from_iterable([request]).pipe(stage))
            assert asyncio.all_tasks() == {asyncio.current_task()}
            return outcome, provider

    return asyncio.run(main())


@dialects
@streams
def test_an_answer_has_its_text_its_usage_and_its_name(dialect, stream):
    outcome, _ = asked(dialect, stream=stream)
    reply = outcome.unwrap()
    assert reply.text == reply.value == WORDS
    assert reply.usage.input_tokens > 0
    assert reply.usage.output_tokens > 0
    assert reply.id
    assert reply.status == 200
    assert reply.extra


@dialects
def test_a_streamed_answer_is_what_one_in_one_piece_would_be(dialect):
    (whole, _), (streamed, _) = asked(dialect, stream=False), asked(dialect, stream=True)
    one, other = whole.unwrap(), streamed.unwrap()
    assert (one.text, one.usage, one.finish_reason, one.model) == (
        other.text,
        other.usage,
        other.finish_reason,
        other.model,
    )


@dialects
@streams
@pytest.mark.parametrize("fault", ["500", "429", "reset", "truncated", "garbled"])
def test_a_fault_is_tried_again_and_the_answer_is_whole(dialect, stream, fault):
    outcome, provider = asked(dialect, stream=stream, script=[fault])
    assert outcome.text == WORDS
    assert len(outcome.attempts) == 2
    error = outcome.attempts[0].error
    assert isinstance(error, CallError)
    assert error.transient
    assert provider.statistics().arrivals == 2


@dialects
@streams
def test_a_wrong_key_is_final_and_shown_nowhere(dialect, stream):
    wrong = "sk-wrong-marker-999"
    outcome, _ = asked(dialect, stream=stream, key=wrong)
    assert isinstance(outcome.error, AuthError)
    assert wrong not in f"{outcome.error!r} {outcome.error} {vars(outcome.error)} {outcome.attempts!r}"
    assert len(outcome.attempts) == 1


@dialects
def test_pieces_that_nobody_wants_any_more_end_with_their_connection(dialect):
    async def main() -> int:
        make, request = CLIENTS[dialect]
        async with SimulatedProvider(answer="echo", chunks=6, chunk_seconds=0.05) as provider:
            async with make(provider, api_key=KEY) as client:
                pieces = await rxllm.acollect(client.stream(request).pipe(ops.take(1)))
                again = await rxllm.acollect(client.stream(request))
            assert "".join(piece.text for piece in again) == WORDS
            return len(pieces)

    assert asyncio.run(main()) == 1


@dialects
@streams
def test_another_transport_makes_no_difference(dialect, stream):
    outcome, _ = asked(dialect, stream=False)
    body, sent = outcome.unwrap().raw, []

    def handler(call: Call) -> Response:
        sent.append(call)
        return Response(200, {"content-type": "application/json"}, body)  # also where pieces were asked for

    async def main() -> Outcome[Any]:
        make, request = CLIENTS[dialect]
        with make(Nowhere(), api_key=KEY, transport=MemoryTransport(handler)) as remote:
            stage = rxllm.call(remote, stream=stream, retry=SOON)
            return (await rxllm.acollect(rxllm.from_iterable([request]).pipe(stage)))[0]

    again = asyncio.run(main())
    assert (again.text, again.usage) == (outcome.text, outcome.usage)
    assert [call.method for call in sent] == ["POST"]


@dialects
def test_a_closed_client_says_so(dialect):
    make, request = CLIENTS[dialect]
    with SimulatedProvider().start() as provider:
        client = make(provider, api_key=KEY)
        client.close()
        client.close()
        for use in (client.send, client.stream):
            with pytest.raises(ConfigError, match="closed"):
                use(request)
