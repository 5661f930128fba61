"""The dialect of LLM Engine: requests as bytes, answers as replies or errors, whole and streamed, and their costs."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm import Reply, Request, Usage, chat, errors
from rxllm.errors import CallError, DecodeError, InvalidRequestError, UnsupportedError, ValidationError
from rxllm.messages import Chunk
from rxllm.providers.base import Event
from rxllm.providers.llm_engine import CompletionAssembler, LLMEngineProvider
from rxllm.providers.output import Output
from rxllm.transports.sse import SseParser

PROVIDER: LLMEngineProvider[Any] = LLMEngineProvider("llama-3-8b")


def asking(**fields: Any) -> Request:
    return Request(body={"prompt": "hi", **fields}, operation="completions")


REQUEST = asking()


def whole(text: str = "Hello.", **output: Any) -> dict[str, Any]:
    """Return an answer as the server gives it."""
    used = {"num_prompt_tokens": 9, "num_completion_tokens": 5, "tokens": None}
    return {"request_id": "r1", "output": {"text": text, **used, **output}}


def decode(answer: object, status: int = 200, provider: LLMEngineProvider[Any] = PROVIDER) -> Reply[Any]:
    body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
    return provider.decode(REQUEST, status, {}, body)


def sent(request: Request, provider: LLMEngineProvider[Any] = PROVIDER) -> dict[str, Any]:
    return json.loads(provider.encode(request).body)


# requests


def test_a_prompt_is_sent_to_the_route_of_its_kind_with_what_the_server_wants_added():
    request = PROVIDER.wrap("hi")
    call = PROVIDER.encode(request)
    assert (call.method, call.path) == ("POST", "/v1/llm/completions-sync?model_endpoint_name=llama-3-8b")
    assert json.loads(call.body) == {"prompt": "hi", "max_new_tokens": 20, "temperature": 0.2}
    streamed = PROVIDER.encode(request, stream=True)
    assert (streamed.path, streamed.accept, streamed.body) == (
        "/v1/llm/completions-stream?model_endpoint_name=llama-3-8b",
        "text/event-stream",
        call.body,
    )
    with pytest.raises(InvalidRequestError, match="got int"):
        PROVIDER.wrap(5)


def test_every_field_is_sent_as_it_is_also_one_that_nobody_knows():
    fields = {
        "prompt": "hi",
        "max_new_tokens": 100,
        "temperature": 0,
        "stop_sequences": ["\n", ""],
        "return_token_log_probs": True,
        "presence_penalty": 2,
        "frequency_penalty": 0.0,
        "top_k": -1,
        "top_p": 1.0,
        "include_stop_str_in_output": False,
        "guided_json": {"type": "object"},
        "guided_regex": None,
        "guided_choice": None,
        "guided_grammar": None,
        "skip_special_tokens": None,
        "future": [1],
    }
    before = copy.deepcopy(fields)
    assert sent(asking(**fields)) == fields == before


@pytest.mark.parametrize("name", ["a b&c=d/e?f#g", "модель", "%41"])
def test_the_name_of_a_model_may_have_any_character(name):
    from urllib.parse import parse_qs, urlsplit

    for provider, request in ((LLMEngineProvider(name), REQUEST), (PROVIDER, asking(model=name))):
        call = provider.encode(request)
        parts = urlsplit(call.path)
        assert parts.path == "/v1/llm/completions-sync"
        assert parse_qs(parts.query) == {"model_endpoint_name": [name]}
        assert parts.fragment == ""
        assert b"model" not in call.body


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": None}, "prompt must be a string, got None"),
        ({"prompt": ["hi"]}, r"prompt must be a string, got \['hi'\]"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number >= 1, got 0"),
        ({"max_new_tokens": None}, "max_new_tokens must be a whole number >= 1, got None"),
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"temperature": 1.01}, "temperature must be a finite number >= 0 and <= 1, got 1.01"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "0.5"}, "temperature"),
        ({"presence_penalty": 2.1}, "presence_penalty must be a finite number >= 0 and <= 2, got 2.1"),
        ({"frequency_penalty": -1}, "frequency_penalty must be a finite number >= 0 and <= 2, got -1"),
        ({"top_k": -2}, "top_k must be a whole number >= -1, got -2"),
        ({"top_k": 1.0}, "top_k"),
        ({"top_p": 0}, "top_p must be a finite number > 0 and <= 1, got 0"),
        ({"top_p": 1.5}, "top_p"),
        ({"stop_sequences": "\n"}, "stop_sequences must be a list of strings"),
        ({"stop_sequences": ["a", 5]}, r"stop_sequences\[1\] must be a string, got 5"),
        ({"return_token_log_probs": 1}, "return_token_log_probs must be True or False, got 1"),
        ({"include_stop_str_in_output": "no"}, "include_stop_str_in_output"),
        ({"skip_special_tokens": 0}, "skip_special_tokens"),
        ({"guided_json": "{}"}, "guided_json must be a JSON schema as a dict, got '{}'"),
        ({"guided_regex": 5}, "guided_regex"),
        ({"guided_choice": "yes"}, "guided_choice must be a list of strings"),
        ({"guided_grammar": ""}, "guided_grammar"),
        ({"guided_regex": "a", "guided_choice": ["a"]}, "only one of .* got guided_regex and guided_choice"),
        ({"model": ""}, "model must be a string that is not empty"),
        ({"model": 5}, "model"),
        ({"future": float("inf")}, r"body\['future'\] is no finite number"),
    ],
)
def test_what_the_server_would_refuse_is_refused_before_by_name_and_value(fields, text):
    with pytest.raises(InvalidRequestError, match=text) as caught:
        PROVIDER.encode(asking(**fields))
    assert not caught.value.transient
    assert caught.value.__context__ is None


@pytest.mark.parametrize("operation", ["chat", "embeddings"])
def test_another_operation_says_what_to_give_instead(operation):
    request = Request(body=chat("hi").body, operation=operation)
    with pytest.raises(UnsupportedError, match=r"got '" + operation + r"': give a prompt .*operation='completions'"):
        PROVIDER.encode(request)


def test_how_an_answer_is_to_come_is_not_said_in_the_body():
    with pytest.raises(UnsupportedError, match=r"call\(stream=True\)"):
        PROVIDER.encode(asking(stream=True))
    with pytest.raises(InvalidRequestError, match="must be a dict, got str"):
        PROVIDER.encode(Request(body="hi", operation="completions"))


# answers


def test_an_answer_is_decoded_and_kept_with_its_tokens():
    tokens = [{"token": "Hel", "log_prob": -0.5}, {"token": "lo.", "log_prob": -0.25}]
    reply = decode(whole(tokens=tokens))
    assert (reply.text, reply.value, reply.id, reply.status, reply.finish_reason) == (
        "Hello.",
        "Hello.",
        "r1",
        200,
        None,
    )
    assert reply.usage == Usage(input_tokens=9, output_tokens=5)
    assert reply.extra["output"]["tokens"] == tokens
    assert decode(whole(), status=201).text == "Hello."  # its own client takes that for an error


@pytest.mark.parametrize(
    "counts", [{"num_prompt_tokens": None}, {"num_completion_tokens": "5"}, {"num_prompt_tokens": -1}]
)
def test_an_answer_without_its_counts_is_taken(counts):
    reply = decode(whole(**counts))
    assert reply.text == "Hello."
    assert 0 in {reply.usage.input_tokens, reply.usage.output_tokens}


@pytest.mark.parametrize(
    "body",
    [b"", b"null", b"[]", b"{}", b'{"output": null}', b'{"output": {"text": 5}}', b"<html>", b"\xff", b"[" * 5000],
)
def test_an_answer_without_a_text_is_none_and_may_be_asked_for_again(body):
    with pytest.raises(DecodeError) as caught:
        decode(body)
    assert caught.value.transient


@pytest.mark.parametrize(
    ("status", "body", "error", "transient"),
    [
        (400, {"detail": "top_k is wrong"}, errors.InvalidRequestError, False),
        (401, {"detail": "Wrong key"}, errors.AuthError, False),
        (403, {"detail": "No"}, errors.AuthError, False),
        (404, {"detail": "No such model"}, errors.NotFoundError, False),
        (409, {"detail": "Somebody else"}, errors.ConflictError, True),
        (422, {"detail": [{"loc": ["body", "temperature"], "msg": "too large"}]}, errors.InvalidRequestError, False),
        (429, {"detail": "Too many"}, errors.RateLimitedError, True),
        (500, {"error": "Internal error occurred.", "timestamp": "now", "request_id": "r1"}, errors.ServerError, True),
        (503, ["a list"], errors.ServerError, True),
    ],
)
def test_an_error_is_ours_by_its_status_and_says_what_the_server_said(status, body, error, transient):
    with pytest.raises(CallError) as caught:
        decode(body, status)
    assert isinstance(caught.value, error)
    assert caught.value.transient == transient
    said = json.dumps(body)
    assert any(
        word in str(caught.value) for word in ("top_k", "Wrong", "No", "else", "large", "many", "error", "list")
    ), said


def test_an_error_that_came_as_if_all_were_well_is_that_of_its_status():
    with pytest.raises(errors.NotFoundError, match="gone"):
        decode(broken(404, "gone"))


# streams


def piece(text: str, **fields: Any) -> dict[str, Any]:
    output = {
        "text": text,
        "finished": False,
        "num_prompt_tokens": None,
        "num_completion_tokens": 1,
        "token": None,
        **fields,
    }
    return {"request_id": "r1", "output": output, "error": None}


def broken(status: object, text: str = "Upstream service error") -> dict[str, Any]:
    content = {"error": text, "timestamp": "2026-01-01 00:00:00 UTC"}
    return {"request_id": "r1", "output": None, "error": {"status_code": status, "content": content}}


def event(said: object) -> Event:
    return Event(json.dumps(said).encode())


LAST = piece("lo.", finished=True, num_prompt_tokens=9, num_completion_tokens=5)


def assembler(provider: LLMEngineProvider[Any] = PROVIDER) -> CompletionAssembler[Any]:
    return provider.assembler(REQUEST, 200, {"x-request-id": "x1"})


def fed(
    said: Iterable[object], provider: LLMEngineProvider[Any] = PROVIDER
) -> tuple[CompletionAssembler[Any], list[Chunk]]:
    taking = assembler(provider)
    return taking, [chunk for item in said if (chunk := taking.feed(event(item))) is not None]


def seen(reply: Reply[Any]) -> dict[str, Any]:
    """Return a reply without its bytes, which may be written in more ways than one."""
    return {**msgspec.structs.asdict(reply), "raw": None}


def test_a_streamed_answer_is_the_same_as_one_in_one_piece():
    taking, chunks = fed([piece("Hel"), piece(""), LAST])
    reply = taking.finish()
    assert taking.done
    assert seen(reply) == seen(decode(whole()))
    assert reply.extra == whole()
    assert [(chunk.text, chunk.finish_reason, chunk.usage) for chunk in chunks] == [
        ("Hel", None, None),
        ("lo.", "finished", Usage(input_tokens=9, output_tokens=5)),
    ]
    assert chunks[0].extra == piece("Hel")


STREAM = b"".join(
    b"data: " + json.dumps(said, ensure_ascii=False).encode() + b"\r\n\r\n: ping - 2026-01-01\r\n\r\n"
    for said in (piece("Hel", token={"token": "Hel", "log_prob": -0.5}), piece("lo ✓"), LAST)
)


def test_it_does_not_matter_where_the_bytes_of_a_stream_are_torn():
    for place in range(len(STREAM)):
        parser = SseParser()
        taking = assembler()
        for item in (*parser.feed(STREAM[:place]), *parser.feed(STREAM[place:])):
            taking.feed(item)
        assert taking.done
        reply = taking.finish()
        assert (reply.text, reply.usage) == ("Hello ✓lo.", Usage(input_tokens=9, output_tokens=5))
        assert reply.extra["output"]["tokens"] == [{"token": "Hel", "log_prob": -0.5}]


def test_a_stream_that_ends_without_its_finished_piece_is_not_taken_for_an_answer():
    for said, text in (([], ""), ([piece("Hel")], "Hel"), ([piece("Hel"), piece("lo.")], "Hello.")):
        taking, _ = fed(said)
        taking.feed(Event(b"[DONE]"))
        assert (taking.done, taking.text) == (False, text)
        with pytest.raises(DecodeError, match="stopped before its end") as caught:
            taking.finish()
        assert caught.value.transient
        assert caught.value.request_id == "x1"


def test_a_number_that_is_none_in_a_field_that_nobody_knows_loses_only_what_cannot_be_read():
    data = event(LAST).data.replace(b'"request_id"', b'"odd": 1e400, "request_id"')
    taking, _ = fed([piece("Hel")])
    taking.feed(Event(data))
    assert taking.done
    assert taking.finish().text == "Hello."


def test_the_usage_is_known_as_far_as_the_server_has_told_it():
    assert assembler().usage is None
    assert fed([piece("Hel", num_completion_tokens=3)])[0].usage == Usage(output_tokens=3)


@pytest.mark.parametrize(
    ("said", "error", "transient"),
    [
        (broken(400), errors.InvalidRequestError, False),
        (broken(404), errors.NotFoundError, False),
        (broken(429), errors.RateLimitedError, True),
        (broken(500), errors.ServerError, True),
        (broken("500"), errors.ServerError, True),
        ({**broken(500), "output": LAST["output"]}, errors.ServerError, True),
        ({"error": "odd"}, CallError, True),
    ],
)
def test_an_error_in_a_stream_is_that_of_its_status(said, error, transient):
    taking, _ = fed([piece("Hel")])
    with pytest.raises(error) as caught:
        taking.feed(event(said))
    assert caught.value.transient == transient
    assert not caught.value.refusal  # something was written before
    assert taking.text == "Hel"
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"5",
        b"{}",
        b"half {",
        b'{"output": null, "error": null}',
        b'{"output": {"text": null, "finished": false}}',
        b"\xff",
    ],
)
def test_a_garbled_piece_ends_the_try_and_another_may_do_better(data):
    taking, _ = fed([piece("Hel")])
    with pytest.raises(DecodeError) as caught:
        taking.feed(Event(data))
    assert caught.value.transient


TEXTS = st.text(st.characters(codec="utf-8"), max_size=6)
TOKENS = st.none() | st.fixed_dictionaries({"token": TEXTS, "log_prob": st.floats(-9, 0)})
COUNTS = st.none() | st.integers(0, 2**40)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | TEXTS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(TEXTS | st.sampled_from(["output", "error", "text"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=60)
@given(parts=st.lists(st.tuples(TEXTS, TOKENS), min_size=1), prompt=COUNTS, used=COUNTS, further=VALUES)
def test_whatever_is_answered_a_stream_and_one_piece_give_the_same_reply(parts, prompt, used, further):
    told = [token for _, token in parts if token is not None]
    answer = whole(
        "".join(text for text, _ in parts), num_prompt_tokens=prompt, num_completion_tokens=used, tokens=told or None
    )
    answer |= {"of the future": further}
    said = [piece(text, token=token) for text, token in parts]
    said[-1] |= {"of the future": further}
    said[-1]["output"] |= {"finished": True, "num_prompt_tokens": prompt, "num_completion_tokens": used}
    taking, chunks = fed(said)
    reply = taking.finish()
    assert seen(reply) == seen(decode(answer))
    assert reply.extra == answer
    assert "".join(chunk.text for chunk in chunks) == reply.text


def is_ours(action: Callable[[], object]) -> bool:
    """Say whether an action gives a reply or an error of ours, in one line; let all else through."""
    try:
        return isinstance(action(), Reply)
    except CallError as error:
        return "\n" not in error.message


PIECES = st.sampled_from([piece("Hel"), LAST, broken(500)])
WRECKS = st.one_of(
    st.binary(max_size=40),
    st.just(b'{"odd": 1e400, "output": {"text": "x", "finished": true, "token": 1e400}}'),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.builds(lambda said, at: json.dumps(said).encode()[:at], PIECES, st.integers(0, 200)),
    st.builds(
        lambda said, key, value: json.dumps({**said, key: value}).encode(),
        PIECES,
        st.sampled_from(["output", "error"]),
        VALUES
        | st.fixed_dictionaries({"text": TEXTS, "finished": st.booleans(), "token": VALUES, "status_code": VALUES}),
    ),
)


@settings(max_examples=60)
@given(st.lists(WRECKS, max_size=8))
def test_whatever_comes_in_a_stream_the_only_errors_are_ours(events):
    taking = assembler()

    def take() -> Reply[Any]:
        for data in events:
            taking.feed(Event(data))
        return taking.finish()

    assert is_ours(take)
    assert isinstance(taking.text, str)
    assert isinstance(taking.usage, Usage | None)


@settings(max_examples=60)
@given(st.binary(max_size=60) | VALUES.map(lambda value: json.dumps(value).encode()), st.sampled_from([200, 400, 500]))
def test_whatever_is_answered_the_only_errors_are_ours(body, status):
    assert is_ours(lambda: decode(body, status))


# values


class Person(msgspec.Struct):
    name: str
    age: int


PEOPLE: LLMEngineProvider[Any] = LLMEngineProvider("llama", output=Output(Person))


def test_a_type_is_asked_for_as_guided_json_unless_the_request_has_a_guide():
    assert sent(REQUEST, PEOPLE)["guided_json"]["required"] == ["name", "age"]
    assert sent(asking(guided_json=None), PEOPLE)["guided_json"]["required"] == ["name", "age"]
    assert "guided_json" not in sent(asking(guided_regex="a+"), PEOPLE)


def test_an_answer_of_a_type_has_a_value_of_it_streamed_or_not():
    text = '{"name": "Ada", "age": 36}'
    assert decode(whole(text), provider=PEOPLE).value == Person("Ada", 36)
    last = piece(text[9:], finished=True)
    assert fed([piece(text[:9]), last], PEOPLE)[0].finish().value == Person("Ada", 36)
    with pytest.raises(ValidationError, match="age") as caught:
        decode(whole('{"name": "Ada"}'), provider=PEOPLE)
    assert caught.value.usage == Usage(input_tokens=9, output_tokens=5)


# costs


def test_a_request_costs_what_its_prompt_and_its_limit_say():
    provider: LLMEngineProvider[Any] = LLMEngineProvider("llama")
    cost = provider.cost(asking(prompt="x" * 400, max_new_tokens=50))
    assert cost == {"requests": 1.0, "tokens": 150.0, "input_tokens": 100.0, "output_tokens": 50.0}
    assert provider.cost(REQUEST)["output_tokens"] == 20.0
    assert provider.cost(Request(body=None, operation="completions"))["requests"] == 1.0
    assert LLMEngineProvider("llama", count_tokens=lambda _: 7).cost(REQUEST)["input_tokens"] == 7.0


def test_a_completion_may_be_asked_for_again():
    assert PROVIDER.repeatable(REQUEST)
