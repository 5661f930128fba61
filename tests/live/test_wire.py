"""The vendors' own clients and ours make the same calls to one server: it gets the same, and both read the same."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import subprocess
import sys
import threading
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from aiohttp import web

import rxllm
from rxllm.testing._answers import CREATED
from rxllm.testing._dialects import ROUTES
from rxllm.testing._events import spoil_events

pytestmark = pytest.mark.live

MODEL = "some-model"
KEY = "sk-wire-test"
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def needed(name: str) -> Any:
    """Return a vendor's client, without which there is nothing to compare with."""
    if importlib.util.find_spec(name) is None:
        if os.environ.get("CI") == "true":
            pytest.fail(f"{name} is not installed: it belongs to the extra 'test'")
        pytest.skip(f"{name} is not installed")
    return importlib.import_module(name)


class Seen(NamedTuple):
    """A request as it came."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: Any


class Recorder:
    """A server that keeps what it is sent, and answers as the simulated provider does."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self._answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._loop, self._ended = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._ended.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        raw = await request.read()
        headers = {name.lower(): value for name, value in request.headers.items()}
        body = json.loads(raw) if raw else None
        self.seen.append(Seen(request.method, request.path, request.query_string, headers, body))
        if request.path == "/v1/models":
            found = [{"id": name, "object": "model", "created": CREATED, "owned_by": "us"} for name in ("a", "b")]
            return web.json_response({"object": "list", "data": found})
        ask = ROUTES[request.path].read(raw, "summary")
        whole = ask.answer().body
        if ask.stream is None:
            return web.Response(body=whole, content_type="application/json")
        pieces, _ = spoil_events(None, ask.stream(whole, None))
        return web.Response(body=b"".join(pieces), content_type="text/event-stream")

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(10)


@pytest.fixture(scope="module")
def running() -> Iterator[Recorder]:
    server = Recorder()
    yield server
    server.close()


@pytest.fixture
def server(running: Recorder) -> Recorder:
    running.seen.clear()
    return running


def ours(client: Any, body: object, operation: str, *, streamed: bool = False) -> rxllm.Reply[Any]:
    """Return our reply, whole or put together from a stream."""

    async def main() -> rxllm.Reply[Any]:
        async with client:
            request = rxllm.Request(body=body, operation=operation)
            (outcome,) = await rxllm.acollect(
                rxllm.from_iterable([request]).pipe(
                    rxllm.call(client, stream=streamed, retry=rxllm.Backoff(attempts=1))
                )
            )
            return outcome.unwrap()

    return asyncio.run(main())


def check_same_request(server: Recorder, *headers: str, ours_adds: dict[str, Any] | None = None) -> None:
    """Both clients sent the same, but for what is stated."""
    theirs, mine = server.seen
    assert (mine.method, mine.path, mine.query) == (theirs.method, theirs.path, theirs.query)
    assert mine.body == (theirs.body if ours_adds is None else {**theirs.body, **ours_adds})
    for name in headers:
        assert mine.headers.get(name) == theirs.headers.get(name), name


def says(prompt: str) -> list[dict[str, Any]]:
    return [{"role": "user", "content": prompt}]


TOOL = {"type": "function", "function": {"name": "note", "description": "Note a person.", "parameters": PERSON}}
CALLED = {"id": "call_1", "type": "function", "function": {"name": "note", "arguments": '{"name": "Ada"}'}}
CHATS: dict[str, dict[str, Any]] = {
    "plain": {"messages": says("Say it in a word."), "max_tokens": 9, "temperature": 0.25, "stop": ["\n"]},
    "beyond-ascii": {"messages": says("größer \U0001f600 \u2028 \x00 \"'\\ 漢字")},
    "parts": {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?"},
                    {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}},
                ],
            },
        ],
    },
    "a-turn-with-tools": {
        "messages": [
            *says("Who is it?"),
            {"role": "assistant", "content": None, "tool_calls": [CALLED]},
            {"role": "tool", "tool_call_id": "call_1", "content": "noted"},
        ],
        "tools": [TOOL],
    },
    "a-tool-is-called": {"messages": says("Note Ada."), "tools": [TOOL], "tool_choice": "required"},
    "held-to-a-schema": {
        "messages": says("Who?"),
        "response_format": {"type": "json_schema", "json_schema": {"name": "p", "strict": True, "schema": PERSON}},
    },
    "several-with-probabilities": {"messages": says("Say it."), "n": 2, "logprobs": True, "seed": 7},
}


@pytest.fixture
def openai(server: Recorder) -> Iterator[Any]:
    with needed("openai").OpenAI(base_url=f"{server.origin}/v1", api_key=KEY, max_retries=0) as client:
        yield client


def openai_of_ours(server: Recorder, **settings: Any) -> Any:
    return rxllm.OpenAI(MODEL, f"{server.origin}/v1", api_key=KEY, **settings)


OPENAI_HEADERS = ("authorization", "content-type")


def check_chat(completion: Any, reply: rxllm.Reply[Any]) -> None:
    """What they read is what we read."""
    first, *others = completion.choices
    assert reply.text == (first.message.content or "")
    assert reply.others == tuple(choice.message.content or "" for choice in others)
    assert reply.finish_reason == first.finish_reason
    assert (reply.id, reply.model) == (completion.id, completion.model)
    assert [(call.id, call.name, call.arguments) for call in reply.tool_calls] == [
        (call.id, call.function.name, call.function.arguments) for call in first.message.tool_calls or ()
    ]
    assert reply.usage.input_tokens == completion.usage.prompt_tokens
    assert reply.usage.output_tokens == completion.usage.completion_tokens


@pytest.mark.parametrize("name", CHATS)
def test_a_chat_is_the_same_as_the_sdks(server, openai, name):
    body = {"model": MODEL, **CHATS[name]}
    completion = openai.chat.completions.create(**body)
    reply = ours(openai_of_ours(server), body, "chat")
    check_same_request(server, *OPENAI_HEADERS)
    check_chat(completion, reply)
    assert reply.extra == completion.to_dict(mode="json")


@pytest.mark.parametrize("name", CHATS)
def test_a_streamed_chat_is_the_same_as_the_sdks(server, openai, name):
    """Ours asks for the usage too, which the SDK leaves to the caller."""
    body = {"model": MODEL, **CHATS[name]}
    for _ in openai.chat.completions.create(**body, stream=True):
        pass
    reply = ours(openai_of_ours(server), body, "chat", streamed=True)
    check_same_request(server, *OPENAI_HEADERS, ours_adds={"stream_options": {"include_usage": True}})
    whole = openai.chat.completions.create(**body)
    check_chat(whole, reply)
    assert reply.extra["choices"] == whole.to_dict(mode="json")["choices"]
    assert reply.extra["usage"] == whole.to_dict(mode="json")["usage"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_plain_completion_is_the_same_as_the_sdks(server, openai, streamed):
    body = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 30, "n": 2}
    whole = openai.completions.create(**body)
    if streamed:
        server.seen.clear()
        chunks = [*openai.completions.create(**body, stream=True, stream_options={"include_usage": True})]
        assert whole.choices[0].text == "".join(
            choice.text for chunk in chunks for choice in chunk.choices if choice.index == 0
        )
    reply = ours(openai_of_ours(server), body, "completions", streamed=streamed)
    check_same_request(server, *OPENAI_HEADERS)
    assert (reply.text, *reply.others) == tuple(choice.text for choice in whole.choices)
    assert reply.usage.total_tokens == whole.usage.total_tokens
    assert reply.extra["choices"] == whole.to_dict(mode="json")["choices"]


RESPONSES: dict[str, dict[str, Any]] = {
    "plain": {"input": "Say it.", "instructions": "Be brief.", "max_output_tokens": 50},
    "cut-short": {"input": "Say it at length, please.", "max_output_tokens": 2},
    "parts": {"input": [{"role": "user", "content": [{"type": "input_text", "text": "Say it."}]}]},
    "a-tool-is-called": {
        "input": "Note Ada.",
        "tools": [{"type": "function", "name": "note", "parameters": PERSON, "strict": True}],
        "tool_choice": "required",
    },
    "held-to-a-schema": {
        "input": "Who?",
        "text": {"format": {"type": "json_schema", "name": "p", "schema": PERSON, "strict": True}},
    },
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", RESPONSES)
def test_a_response_is_the_same_as_the_sdks(server, openai, name, streamed):
    body = {"model": MODEL, **RESPONSES[name]}
    whole = openai.responses.create(**body)
    if streamed:
        server.seen.clear()
        *_, last = openai.responses.create(**body, stream=True)
        assert last.response.output == whole.output
    reply = ours(openai_of_ours(server), body, "responses", streamed=streamed)
    check_same_request(server, *OPENAI_HEADERS)
    assert reply.text == whole.output_text
    assert [(call.id, call.name, call.arguments) for call in reply.tool_calls] == [
        (item.call_id, item.name, item.arguments) for item in whole.output if item.type == "function_call"
    ]
    assert reply.usage.input_tokens == whole.usage.input_tokens
    assert reply.usage.output_tokens == whole.usage.output_tokens
    assert reply.id == whole.id
    assert reply.extra["output"] == whole.to_dict(mode="json")["output"]


@pytest.mark.parametrize("more", [{}, {"encoding_format": "float"}, {"encoding_format": "base64", "dimensions": 5}])
def test_embeddings_are_the_same_as_the_sdks(server, openai, more):
    body = {"model": MODEL, "input": ["one", "two", "three"], **more}
    theirs = openai.embeddings.create(**body)
    reply = ours(openai_of_ours(server), body, "embeddings")
    check_same_request(server, *OPENAI_HEADERS)
    vectors = [item.embedding for item in theirs.data]
    if more.get("encoding_format") != "base64":  # else the SDK leaves that to the caller
        assert [list(vector) for vector in reply.value] == [list(array("f", vector)) for vector in vectors]
    assert [len(vector) for vector in reply.value] == [more.get("dimensions", 8)] * 3
    assert reply.usage.input_tokens == theirs.usage.prompt_tokens


def test_the_list_of_models_is_the_same_as_the_sdks(server, openai):
    theirs = [model.id for model in openai.models.list()]
    reply = ours(openai_of_ours(server), None, "models")
    check_same_request(server, "authorization")
    assert [item["id"] for item in reply.extra["data"]] == theirs


MESSAGES: dict[str, dict[str, Any]] = {
    "plain": {"messages": says("Say it in a word."), "system": "Be brief.", "stop_sequences": ["\n"]},
    "blocks": {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What is this?", "cache_control": {"type": "ephemeral"}},
                    {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AAAA"}},
                ],
            }
        ],
    },
    "a-tool-is-called": {
        "messages": says("Note Ada."),
        "tools": [{"name": "note", "description": "Note a person.", "input_schema": PERSON}],
        "tool_choice": {"type": "any"},
    },
    "a-turn-with-tools": {
        "messages": [
            *says("Who is it?"),
            {"role": "assistant", "content": [{"type": "tool_use", "id": "t1", "name": "note", "input": {"a": 1}}]},
            {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t1", "content": "noted"}]},
        ],
    },
    "with-thoughts": {"messages": says("Think."), "thinking": {"type": "enabled", "budget_tokens": 1_024}},
    "cut-short": {"messages": says("Say it at length, please."), "max_tokens": 2},
}


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("name", MESSAGES)
def test_a_message_is_the_same_as_the_sdks(server, name, streamed):
    body = {"model": MODEL, "max_tokens": 2_000, **MESSAGES[name]}
    with needed("anthropic").Anthropic(base_url=server.origin, api_key=KEY, max_retries=0) as client:
        whole = client.messages.create(**body)
        if streamed:
            server.seen.clear()
            with client.messages.stream(**body) as stream:
                assert stream.get_final_message().to_dict() == whole.to_dict()
    reply = ours(rxllm.Anthropic(MODEL, f"{server.origin}/v1", api_key=KEY), body, "chat", streamed=streamed)
    check_same_request(server, "content-type")
    sent = server.seen[1].headers
    assert sent["x-api-key"] == KEY  # the way of plain HTTP; newer SDKs send it as a bearer's token
    assert sent["anthropic-version"] == "2023-06-01"  # the classic one; newer SDKs name a newer one
    assert reply.text == "".join(block.text for block in whole.content if block.type == "text")
    assert reply.reasoning == "".join(block.thinking for block in whole.content if block.type == "thinking")
    assert [(call.id, call.name, json.loads(call.arguments)) for call in reply.tool_calls] == [
        (block.id, block.name, block.input) for block in whole.content if block.type == "tool_use"
    ]
    assert reply.finish_reason == whole.stop_reason
    assert (reply.id, reply.model) == (whole.id, whole.model)
    assert reply.usage.input_tokens == whole.usage.input_tokens
    assert reply.usage.output_tokens == whole.usage.output_tokens
    assert reply.extra["content"] == whole.to_dict(mode="json")["content"]


COMPLETIONS: dict[str, dict[str, Any]] = {
    "plain": {"prompt": "Say it.", "max_new_tokens": 30, "temperature": 0.5},
    "defaults": {"prompt": "Say it again."},
    "everything": {
        "prompt": "Say it once more.",
        "max_new_tokens": 40,
        "temperature": 0.0,
        "stop_sequences": ["\n"],
        "return_token_log_probs": True,
        "presence_penalty": 0.5,
        "frequency_penalty": 1.5,
        "top_k": 5,
        "top_p": 0.9,
        "include_stop_str_in_output": False,
    },
    "held-to-a-schema": {"prompt": "Who?", "guided_json": PERSON, "max_new_tokens": 100},
}
LLMENGINE = "scale-llm-engine==0.0.0b45"  # it wants an openai below 2: so it gets an environment of its own
SCRIPT = """
import json, sys
from llmengine import Completion
for body in json.loads(sys.argv[1]):
    print(json.dumps(Completion.create(model="m 1/x", **body).dict()))
    print(json.dumps([piece.dict() for piece in Completion.create(model="m 1/x", stream=True, **body)]))
"""


@pytest.fixture(scope="module")
def llmengine(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The Python of an environment with the real client: the one that is named, or a new one in CI."""
    if named := os.environ.get("RXLLM_LLMENGINE_PYTHON"):
        return named
    if os.environ.get("CI") != "true":
        pytest.skip("RXLLM_LLMENGINE_PYTHON names no Python that has scale-llm-engine")
    folder = tmp_path_factory.mktemp("llmengine")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    python = folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    subprocess.run([str(python), "-m", "pip", "install", "-q", LLMENGINE], check=True)
    return str(python)


@pytest.mark.slow
@pytest.mark.timeout(240)
def test_a_completion_is_the_same_as_llm_engines_own_client_s(server, llmengine):
    environment = {
        **os.environ,
        "LLM_ENGINE_DISABLE_VERSION_CHECK": "true",
        "LLM_ENGINE_BASE_PATH": server.origin,
        "SCALE_API_KEY": KEY,
    }
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [llmengine, "-c", SCRIPT, json.dumps(list(COMPLETIONS.values()))],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
        env=environment,
        cwd=Path(llmengine).parent,
    )
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stdout.splitlines()]
    theirs = list(server.seen)
    assert len(said) == len(theirs) == 2 * len(COMPLETIONS)
    for number, body in enumerate(COMPLETIONS.values()):
        whole, pieces = said[2 * number : 2 * number + 2]
        for streamed in (False, True):
            server.seen[:] = [theirs[2 * number + streamed]]
            client = rxllm.LLMEngine("m 1/x", server.origin, api_key=KEY)
            reply = ours(client, body, "completions", streamed=streamed)
            check_same_request_without_defaults(server)
            assert reply.text == whole["output"]["text"] == "".join(piece["output"]["text"] for piece in pieces)
            assert reply.usage.input_tokens == whole["output"]["num_prompt_tokens"]
            assert reply.usage.output_tokens == whole["output"]["num_completion_tokens"]
            assert reply.id == whole["request_id"]


def check_same_request_without_defaults(server: Recorder) -> None:
    """As `check_same_request`; theirs says what it was not told too, where that is the server's default."""
    defaults = {"return_token_log_probs": False, "skip_special_tokens": True}

    def said(body: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in body.items() if value is not None and value != defaults.get(name)}

    theirs, mine = server.seen
    assert (mine.method, mine.path, mine.query) == (theirs.method, theirs.path, theirs.query)
    assert said(mine.body) == said(theirs.body)
    for name in ("x-api-key", "authorization", "content-type"):
        assert mine.headers.get(name) == theirs.headers.get(name), name
