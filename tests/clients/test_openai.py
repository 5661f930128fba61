"""The client of OpenAI's family against a real server: what it sends where, what it answers with, how it pickles."""

from __future__ import annotations

import asyncio
import copy
import json
import pickle
from array import array
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import pytest

import rxllm
from rxllm import Backoff, Chunk, Outcome, Request, Restarted, Usage
from rxllm.errors import BillingError, ConfigError, DecodeError, ServerError, UnsupportedError, ValidationError
from rxllm.policies import Connection
from rxllm.providers.output import Output
from rxllm.providers.presets import PRESETS, Preset
from rxllm.transports import MemoryTransport, Response

KEY = "sk-marker-0123456789"


class Person(msgspec.Struct):
    name: str
    age: int


class Seen(NamedTuple):
    """A request as a server saw it."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Script:
    """A server that gives the answers of a list, one to each request, and keeps what it saw."""

    def __init__(self, *answers: bytes) -> None:
        self.seen: list[Seen] = []
        self._answers = list(answers)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := (await reader.readline()).decode().strip():
            headers: dict[str, str] = {}
            while one := (await reader.readline()).decode().strip():
                name, _, value = one.partition(": ")
                headers[name.lower()] = value
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            self.seen.append(Seen(line, headers, body))
            answer = self._answers.pop(0)
            writer.write(answer)
            if b"Content-Length" not in answer:  # its end is that of the connection
                break
        writer.close()


def answer(body: object, status: int = 200) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    kind = "application/json" if status == 200 else "text/plain"
    return f"HTTP/1.1 {status} X\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data


def stream(*events: object) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
    said = [one if isinstance(one, bytes) else json.dumps(one).encode() for one in events]
    return head + b"".join(b"data: " + one + b"\n\n" for one in said)


def completion(text: str | None, **fields: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, **fields}
    return {"choices": [{"message": message, "finish_reason": "stop"}], "usage": {"prompt_tokens": 9}}


def piece(text: str = "", finish_reason: str | None = None) -> dict[str, Any]:
    return {"id": "1", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": finish_reason}]}


def outcome_of(
    script: Script, item: Any = "hi", *, at: str = "/v1", settings: Any = None, attempts: int = 1, **options: Any
) -> Outcome[Any]:
    """Call the scripted server once, through a client with these options."""

    async def main() -> Outcome[Any]:
        server = await asyncio.start_server(script.serve, "127.0.0.1", 0)
        port = server.sockets[0].getsockname()[1]
        known = {"api_key": KEY} | options
        async with server, rxllm.OpenAI("small", f"http://127.0.0.1:{port}{at}", **known) as client:
            retry = Backoff(attempts=attempts, base=0.001, cap=0.002)
            calling = rxllm.call(client, retry=retry, **(settings or {}))
            (outcome,) = await rxllm.acollect(rxllm.from_iterable([item]).pipe(calling))
        return outcome

    return asyncio.run(main())


# what is sent where


def test_a_prompt_is_a_chat_with_its_key():
    script = Script(answer(completion("Hello.")))
    outcome = outcome_of(script)
    assert (outcome.value, outcome.usage) == ("Hello.", Usage(input_tokens=9))
    (seen,) = script.seen
    assert seen.line == "POST /v1/chat/completions HTTP/1.1"
    assert seen.headers["authorization"] == f"Bearer {KEY}"
    assert seen.json == {"model": "small", "messages": [{"role": "user", "content": "hi"}]}


def test_azure_has_a_path_for_each_deployment_a_version_and_a_header_of_its_own():
    script = Script(answer(completion("Hello.")))
    assert outcome_of(script, rxllm.chat("hi", model="my/model"), at="/openai", preset="azure").ok
    (seen,) = script.seen
    version = PRESETS["azure"].query
    assert seen.line == f"POST /openai/deployments/my%2Fmodel/chat/completions?{version} HTTP/1.1"
    assert seen.headers["api-key"] == KEY
    assert "authorization" not in seen.headers


@pytest.mark.parametrize(
    ("operation", "item", "line"),
    [
        ("responses", "hi", "POST /openai/responses?api-version=7 HTTP/1.1"),
        ("models", None, "GET /openai/models?api-version=7 HTTP/1.1"),
        ("embeddings", "hi", "POST /openai/deployments/small/embeddings?api-version=7 HTTP/1.1"),
    ],
)
def test_a_query_of_the_base_url_goes_with_each_call_and_what_has_no_deployment_has_no_such_path(operation, item, line):
    script = Script(answer({"output": [], "data": [{"embedding": [1.0], "id": "small"}]}))
    outcome = outcome_of(script, item, at="/openai?api-version=7", preset="azure", operation=operation)
    assert outcome.error is None
    assert script.seen[0].line == line


def test_a_server_that_needs_no_key_gets_none(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    script = Script(answer(completion("Hello.")))
    assert outcome_of(script, preset="vllm", api_key=None).ok
    assert "authorization" not in script.seen[0].headers
    script = Script(answer(completion("Hello.")))
    assert outcome_of(script, preset="vllm", api_key=None, api_key_env="OPENAI_API_KEY").ok  # unless it is told to
    assert script.seen[0].headers["authorization"] == f"Bearer {KEY}"


def test_headers_of_a_preset_and_of_a_connection_are_sent():
    script = Script(answer(completion("Hello.")))
    preset = Preset(headers={"X-Title": "tests"}, key_header="X-Key", key_prefix="")
    assert outcome_of(script, preset=preset, connection=Connection(headers={"X-Team": "blue"})).ok
    headers = script.seen[0].headers
    assert (headers["x-title"], headers["x-team"], headers["x-key"]) == ("tests", "blue", KEY)


def test_a_key_is_taken_from_the_variable_of_the_preset(monkeypatch):
    monkeypatch.delenv("GROQ_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="GROQ_API_KEY"):
        rxllm.OpenAI("small", preset="groq")
    monkeypatch.setenv("GROQ_API_KEY", KEY)
    with rxllm.OpenAI("small", preset="groq") as client:
        assert repr(client) == "OpenAI(model='small', base_url='https://api.groq.com/openai/v1')"


# what it answers with


def test_embeddings_are_vectors_and_models_are_names():
    script = Script(answer({"data": [{"embedding": "AACAPwAAAEA=", "index": 0}], "usage": {"prompt_tokens": 3}}))
    outcome = outcome_of(script, operation="embeddings")
    assert outcome.value == [array("f", [1.0, 2.0])]
    assert outcome.usage.input_tokens == 3
    script = Script(answer({"data": [{"id": "small"}, {"id": "large"}]}))
    assert outcome_of(script, None, operation="models").value == ["small", "large"]
    assert script.seen[0].body == b""


def test_a_request_that_names_its_operation_is_answered_with_that_ones_value():
    script = Script(answer({"choices": [{"text": "Hello.", "finish_reason": "stop"}]}))
    request = Request(body={"prompt": "hi"}, operation="completions")
    assert outcome_of(script, request, output=Person).value == "Hello."  # such are told nothing of types
    assert script.seen[0].json == {"model": "small", "prompt": "hi"}


def test_an_answer_is_of_the_type_that_was_asked_for():
    script = Script(answer(completion('{"name": "Ada", "age": 36}')))
    outcome = outcome_of(script, output=Person)
    assert outcome.value == Person("Ada", 36)
    assert outcome.text == '{"name": "Ada", "age": 36}'
    form = script.seen[0].json["response_format"]
    assert form["type"] == "json_schema"
    assert form["json_schema"] == {"name": "Person", "schema": Output(Person).schema, "strict": True}


def test_a_response_is_of_the_type_that_was_asked_for_and_keeps_what_else_is_said_of_its_text():
    message = {"type": "message", "content": [{"type": "output_text", "text": '{"name": "Ada", "age": 36}'}]}
    script = Script(answer({"output": [message]}))
    request = Request(body={"input": "hi", "text": {"verbosity": "low"}}, operation="responses")
    assert outcome_of(script, request, output=Person).value == Person("Ada", 36)
    assert script.seen[0].json["text"] == {
        "format": {"type": "json_schema", "name": "Person", "schema": Output(Person).schema, "strict": True},
        "verbosity": "low",
    }
    assert request.body == {"input": "hi", "text": {"verbosity": "low"}}


def test_a_form_that_the_request_has_itself_is_sent_as_it_is():
    script = Script(answer(completion('{"name": "Ada", "age": 36}')))
    request = rxllm.chat("hi", response_format={"type": "json_object"})
    assert outcome_of(script, request, output=Person).value == Person("Ada", 36)
    assert script.seen[0].json["response_format"] == {"type": "json_object"}


def test_an_answer_that_does_not_fit_is_asked_for_again():
    script = Script(answer(completion("I think")), answer(completion('```json\n{"name": "Ada", "age": 36}\n```')))
    outcome = outcome_of(script, output=Person)
    assert outcome.value == Person("Ada", 36)
    assert isinstance(outcome.attempts[0].error, ValidationError)
    assert outcome.usage == Usage(input_tokens=18)


def test_a_refusal_says_so():
    refused = completion(None, refusal="I will not.")
    outcome = outcome_of(Script(*[answer(refused)] * 3), output=Person)
    assert isinstance(outcome.error, ValidationError)
    assert "the model refused: I will not." in str(outcome.error)
    assert len(outcome.attempts) == 3


def test_a_response_in_the_background_is_no_person_yet():
    outcome = outcome_of(Script(), Request(body={"background": True}, operation="responses"), output=Person)
    assert "background" in str(outcome.error)


@pytest.mark.parametrize("operation", ["completions", "embeddings", "models"])
def test_only_chats_and_responses_are_of_a_type(operation):
    with pytest.raises(ConfigError, match=f"output: {operation} cannot be told"):
        rxllm.OpenAI("small", api_key=KEY, output=Person, operation=operation)


# streams


def test_a_streamed_answer_is_shown_and_whole():
    shown: list[Chunk | Restarted] = []
    usage = {"id": "1", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
    script = Script(stream(piece("Hel"), piece("lo."), piece(finish_reason="stop"), usage, b"[DONE]"))
    outcome = outcome_of(script, settings={"on_chunk": lambda _request, chunk: shown.append(chunk)})
    assert outcome.value == "Hello."
    assert outcome.usage == Usage(input_tokens=9, output_tokens=2)
    assert "".join(chunk.text for chunk in shown if isinstance(chunk, Chunk)) == "Hello."
    assert script.seen[0].headers["accept"] == "text/event-stream"
    assert script.seen[0].json["stream_options"] == {"include_usage": True}


def test_a_stream_can_be_of_a_type_too():
    script = Script(stream(piece('{"name": "Ada",'), piece('"age": 36}'), piece(finish_reason="stop"), b"[DONE]"))
    assert outcome_of(script, settings={"stream": True}, output=Person).value == Person("Ada", 36)


def test_a_stream_that_breaks_off_is_tried_again_although_it_says_that_it_is_done():
    shown: list[Chunk | Restarted] = []
    script = Script(stream(piece("Hel"), b"[DONE]"), stream(piece("Hello."), piece(finish_reason="stop")))
    outcome = outcome_of(script, attempts=2, settings={"on_chunk": lambda _request, chunk: shown.append(chunk)})
    assert outcome.value == "Hello."
    error = outcome.attempts[0].error
    assert isinstance(error, DecodeError)
    assert error.partial == "Hel"
    assert [type(chunk) for chunk in shown] == [Chunk, Restarted, Chunk, Chunk]


def test_an_error_in_a_stream_keeps_what_was_said_and_used():
    usage = {"id": "1", "choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": 2}}
    script = Script(stream(piece("Hel"), usage, {"error": {"message": "broke down", "type": "server_error"}}))
    outcome = outcome_of(script, settings={"stream": True})
    assert isinstance(outcome.error, ServerError)
    assert outcome.error.partial == "Hel"
    assert outcome.error.usage == Usage(input_tokens=9, output_tokens=2)


def test_a_server_that_does_not_stream_is_read_all_the_same():
    outcome = outcome_of(Script(answer(completion("Hello."))), settings={"stream": True})
    assert outcome.value == "Hello."


@pytest.mark.parametrize("operation", ["chat", "completions", "responses"])
def test_a_page_instead_of_a_stream_says_what_to_check(operation):
    page = b"<html>Welcome</html>"
    head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(page)}\r\n\r\n".encode()
    outcome = outcome_of(Script(head + page), settings={"stream": True}, operation=operation)
    assert isinstance(outcome.error, DecodeError)
    assert "HTML page, not JSON" in str(outcome.error)


def test_what_does_not_come_in_pieces_says_so():
    outcome = outcome_of(Script(), settings={"stream": True}, operation="embeddings")
    assert isinstance(outcome.error, UnsupportedError)
    assert not outcome.error.sent


def test_a_key_that_a_stream_tells_does_not_get_into_its_error():
    script = Script(stream(piece("Hel"), {"error": {"message": f"{KEY} has no money", "code": "insufficient_quota"}}))
    outcome = outcome_of(script, settings={"stream": True})
    assert isinstance(outcome.error, BillingError)
    assert KEY not in repr(outcome) + str(outcome.error) + str(outcome.error.body)


def test_a_key_that_a_good_answer_tells_is_not_in_the_reply():
    outcome = outcome_of(Script(answer({"id": KEY, "choices": [{"message": {"content": f"You sent {KEY}."}}]})))
    assert outcome.text == "You sent ***."
    assert KEY not in repr(outcome)
    assert KEY.encode() not in pickle.dumps(outcome)


def test_a_key_that_a_stream_echoes_is_in_no_chunk_and_not_in_the_reply():
    seen: list[Any] = []
    script = Script(stream(piece("You sent "), piece(KEY), piece(".", finish_reason="stop")))
    outcome = outcome_of(script, settings={"stream": True, "on_chunk": lambda _request, chunk: seen.append(chunk)})
    assert outcome.text == "You sent ***."
    assert KEY not in repr(outcome) + repr(seen)


# what is paid for twice


@pytest.mark.parametrize(("body", "tries"), [({"input": "hi"}, 2), ({"input": "hi", "background": True}, 1)])
def test_a_response_in_the_background_is_not_tried_again_when_nobody_knows_if_it_goes_on(body, tries):
    done = answer({"output": [], "status": "queued"})
    script = Script(answer(b"down", 500), done)
    outcome = outcome_of(script, Request(body=body, operation="responses"), attempts=2)
    assert len(script.seen) == tries
    assert outcome.ok is (tries == 2)


# how it pickles


def sized(request: Request) -> float:
    return len(str(request.body))


@pytest.mark.parametrize(
    "again", [lambda client: pickle.loads(pickle.dumps(client)), copy.copy], ids=["pickle", "copy"]
)
def test_a_client_is_pickled_with_all_that_it_was_given(monkeypatch, again: Callable[[Any], Any]):
    monkeypatch.setenv("MY_KEY", KEY)
    client = rxllm.OpenAI(
        "small",
        "http://localhost:1/openai?api-version=7",
        output=Person,
        operation="responses",
        preset=msgspec.structs.replace(PRESETS["azure"], headers={"X-Title": "x"}),
        api_key_env="MY_KEY",
        connection=Connection(trust_env=False),
        accounting="groq",
        count_tokens=sized,
    )
    twin = again(client)
    assert repr(twin) == repr(client) == "OpenAI(model='small', base_url='http://localhost:1/openai', output=Person)"
    assert twin.typed
    request = twin.wrap("hi")
    assert request.operation == "responses"
    for one in (request, rxllm.chat("hi")):
        assert twin._provider.encode(one) == client._provider.encode(one)
    assert twin._provider.preset == client._provider.preset
    assert twin._provider.accounting == client._provider.accounting
    assert twin.cost(request) == client.cost(request)


def test_a_pickle_has_no_key_in_it(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    assert KEY.encode() not in pickle.dumps(rxllm.OpenAI("small", api_key_env="MY_KEY", output=list[int]))
    with pytest.raises(ConfigError, match="literal key"):
        pickle.dumps(rxllm.OpenAI("small", api_key=KEY))
    assert pickle.dumps(rxllm.OpenAI("small", preset="vllm"))  # there is none


# what is wrong


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"preset": "grok"}, "preset must be"),
        ({"preset": "azure"}, "base_url"),
        ({"base_url": 5}, "base_url must be a string"),
        ({"operation": "images"}, "operation must be"),
        ({"output": 5}, "output must be a type"),
        ({"accounting": "mine"}, "accounting must be"),
        ({"base_url": "http://x/v1#y"}, "base_url"),
    ],
    ids=repr,
)
def test_a_wrong_argument_is_named(options, words):
    with pytest.raises(ConfigError, match=words):
        rxllm.OpenAI("small", api_key=KEY, **options)


def test_a_connection_is_of_no_use_to_a_transport_of_ones_own():
    transport = MemoryTransport(lambda _call: Response(200, {}, b"{}"))
    with pytest.raises(ConfigError, match="connection: .* does not go with a transport"):
        rxllm.OpenAI("small", api_key=KEY, transport=transport, connection=Connection())
