"""Requests, outcomes and what is between: what they refuse, what they keep, what they never show."""

import copy
import json
import logging
import math
import pickle
import sys
import traceback
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm import errors
from rxllm.errors import CallError, ConfigError, DecodeError, RateLimitedError, ValidationError
from rxllm.messages import Attempt, Chunk, Outcome, Reply, Request, Secret, ToolCall, Usage, chat

MARKER = "sk-SENTINEL-0123456789"
FIELDS = "the fields are body, id, operation, meta, given by name"


def answered() -> Outcome[str]:
    refused = RateLimitedError("slow down", 429, 2.0)
    return Outcome(
        request=chat("hi", id="q1", meta={"row": 1}),
        reply=Reply(value="hello", text="hello", raw=b'{"system_fingerprint":"fp"}', finish_reason="stop"),
        attempts=(
            Attempt(number=1, status=429, error=refused, waited={"admission": 0.5}),
            Attempt(number=2, status=200, usage=Usage(input_tokens=3, output_tokens=4), waited={"backoff": 2.0}),
        ),
        started=1.0,
        seconds=3.0,
    )


def failed() -> Outcome[str]:
    return Outcome(request=chat("hi"), error=errors.TimeoutError("late", phase="idle"))


@pytest.mark.parametrize(
    ("make", "text"),
    [
        pytest.param(lambda: Request(body=1, id=7), "id must be a string that is not empty or None, got 7", id="id"),
        pytest.param(
            lambda: Request(body=1, id=""),
            "id must be a string that is not empty or None, got ''",
            id="no-id",
        ),
        pytest.param(
            lambda: Request(body=1, operation=None),
            "operation must be a string that is not empty, got None",
            id="operation",
        ),
        pytest.param(
            lambda: Request(body=1, operation=7),
            "operation must be a string that is not empty, got 7",
            id="operation-of-a-wrong-kind",
        ),
        pytest.param(
            Request,
            f"Request: Missing required argument 'body'; {FIELDS}",
            id="nothing-known",
        ),
        pytest.param(
            lambda: Request(body=1, metadata=1),
            f"Request: Unexpected keyword argument 'metadata'; {FIELDS}",
            id="unknown-field",
        ),
        pytest.param(
            lambda: Request("hi"),
            f"Request: Extra positional arguments provided; {FIELDS}",
            id="by-position",
        ),
        pytest.param(lambda: chat(b"hi"), "prompt must be a string, got b'hi'", id="prompt"),
        pytest.param(lambda: chat("hi", system=3), "system must be a string or None, got 3", id="system"),
        pytest.param(
            lambda: chat("hi", temperature=math.nan), "temperature must be a finite number, got nan", id="nan"
        ),
        pytest.param(lambda: chat("hi", top_p=-math.inf), "top_p must be a finite number, got -inf", id="infinity"),
        pytest.param(
            lambda: chat("hi", messages=[]),
            "messages: chat() makes them from the prompt; for your own use Request(body={'messages': …})",
            id="messages",
        ),
        pytest.param(
            lambda: chat("hi", id=3),
            "id must be a string that is not empty or None, got 3",
            id="id-of-a-chat",
        ),
        pytest.param(
            lambda: Usage(input_tokens=-1),
            "input_tokens must be a whole number >= 0, got -1",
            id="negative-usage",
        ),
        pytest.param(
            lambda: Usage(cached_tokens=1.5),
            "cached_tokens must be a whole number >= 0, got 1.5",
            id="half-a-token",
        ),
        pytest.param(
            lambda: Usage(output_tokens="9"),
            "output_tokens must be a whole number >= 0, got '9'",
            id="text-usage",
        ),
        pytest.param(
            lambda: Usage(reasoning_tokens=math.nan),
            "reasoning_tokens must be a whole number >= 0, got nan",
            id="nan-usage",
        ),
        pytest.param(lambda: Attempt(number=0), "number must be a whole number >= 1, got 0", id="attempt-0"),
        pytest.param(lambda: Attempt(number=None), "number must be a whole number >= 1, got None", id="no-number"),
        pytest.param(
            lambda: Attempt(number=1, seconds=math.nan),
            "seconds must be a finite number >= 0, got nan",
            id="nan-seconds",
        ),
        pytest.param(
            lambda: Attempt(number=1, seconds=-0.1),
            "seconds must be a finite number >= 0, got -0.1",
            id="before-it-began",
        ),
        pytest.param(
            lambda: Outcome(request=chat("hi")),
            "Outcome: give either reply or error, got neither",
            id="neither-reply-nor-error",
        ),
        pytest.param(
            lambda: Outcome(request=chat("hi"), reply=Reply(value=1), error=ValueError()),
            "Outcome: give either reply or error, got both",
            id="reply-and-error",
        ),
    ],
)
def test_bad_input_is_a_config_error_that_names_the_field_and_the_value(make: Callable[[], object], text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == text
    assert caught.value.__context__ is None


def test_an_unknown_field_is_refused_when_decoding() -> None:
    with pytest.raises(msgspec.ValidationError, match="unknown field `prio`"):
        msgspec.convert({"body": 1, "prio": 2}, Request)


def test_a_chat_has_the_system_before_the_prompt_and_the_parameters_beside_them() -> None:
    request = chat("hi", system="be brief", max_tokens=5, temperature=0.0, id="q", meta=[1])
    assert request.body == {
        "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}],
        "max_tokens": 5,
        "temperature": 0.0,
    }
    assert (request.id, request.meta, request.operation) == ("q", [1], "chat")


def test_requests_with_the_same_content_are_two_requests() -> None:
    one, other = chat("hi"), chat("hi")
    assert one != other
    assert len({one, other, one}) == 2


def test_messages_are_frozen() -> None:
    for value, field in [
        (chat("hi"), "id"),
        (Usage(), "input_tokens"),
        (failed(), "reply"),
        (Chunk(), "text"),
    ]:
        with pytest.raises(AttributeError):
            setattr(value, field, None)


usages = st.builds(
    Usage,
    input_tokens=st.integers(0, 10**12),
    output_tokens=st.integers(0, 10**12),
    cached_tokens=st.integers(0, 10**12),
    reasoning_tokens=st.integers(0, 10**12),
)


@given(st.lists(usages))
def test_usages_add_up_field_by_field(many: list[Usage]) -> None:
    total = sum(many, Usage())
    for field in Usage.__struct_fields__[:-1]:  # those of the caller are no numbers
        assert getattr(total, field) == sum(getattr(one, field) for one in many)
    assert total.total_tokens == total.input_tokens + total.output_tokens


def test_the_usage_of_an_outcome_is_that_of_all_its_attempts() -> None:
    attempts = (
        Attempt(number=1, usage=Usage(input_tokens=3)),
        Attempt(number=2),
        Attempt(number=3, usage=Usage(output_tokens=5, reasoning_tokens=2)),
    )
    outcome = Outcome[str](request=chat("hi"), error=ValueError(), attempts=attempts)
    assert outcome.usage == Usage(input_tokens=3, output_tokens=5, reasoning_tokens=2)


def test_each_attempt_has_its_own_waits() -> None:
    Attempt(number=1).waited["backoff"] = 1.0
    assert Attempt(number=2).waited == {}


def test_an_answered_outcome_gives_its_reply() -> None:
    outcome = answered()
    assert outcome.ok
    assert (outcome.text, outcome.value, outcome.unwrap()) == ("hello", "hello", outcome.reply)


@pytest.mark.parametrize(
    "ask", [lambda o: o.text, lambda o: o.value, lambda o: o.unwrap()], ids=["text", "value", "unwrap"]
)
def test_a_failed_outcome_raises_its_own_error(ask: Callable[[Outcome[str]], object]) -> None:
    outcome = failed()
    assert not outcome.ok
    with pytest.raises(errors.TimeoutError) as caught:
        ask(outcome)
    assert caught.value is outcome.error


def test_asking_a_failed_outcome_again_and_again_does_not_pile_up_tracebacks() -> None:
    outcome = failed()
    depths = []
    for _ in range(5):
        with pytest.raises(errors.TimeoutError) as caught:
            outcome.unwrap()
        depths.append(len(traceback.extract_tb(caught.value.__traceback__)))
    assert len(set(depths)) == 1


def test_a_trimmed_outcome_keeps_all_but_the_bytes() -> None:
    outcome = msgspec.structs.replace(answered(), request=chat("hi" * 500, id="q1", meta={"row": 1}))
    light = outcome.trim()
    assert (light.request.body, light.request.id, light.request.meta) == (None, "q1", {"row": 1})
    assert light.reply == msgspec.structs.replace(outcome.unwrap(), raw=b"")
    assert light.attempts == outcome.attempts
    assert (light.started, light.seconds, light.usage) == (outcome.started, outcome.seconds, outcome.usage)
    assert len(pickle.dumps(light)) < len(pickle.dumps(outcome)) - 1000
    assert outcome.request.body is not None
    assert outcome.unwrap().raw


def test_a_trimmed_failure_keeps_its_error() -> None:
    outcome = failed()
    assert outcome.trim().error is outcome.error


def test_extra_is_the_whole_answer_and_empty_without_a_body() -> None:
    assert answered().unwrap().extra == {"system_fingerprint": "fp"}
    assert answered().trim().unwrap().extra == {}


def test_a_chunk_has_all_that_its_event_said() -> None:
    assert Chunk(text="a", raw=b'{"delta": "a", "n": 1}').extra == {"delta": "a", "n": 1}
    assert Chunk(text="a").extra == {}


class City(msgspec.Struct):
    city: str


def test_the_arguments_of_a_tool_call_are_decoded_as_the_type_that_is_wanted() -> None:
    wanted = ToolCall(id="1", name="weather", arguments='{"city": "Oslo"}')
    assert wanted.decoded() == {"city": "Oslo"}
    assert wanted.decoded(City) == City("Oslo")
    assert ToolCall(id="1", name="now", arguments="").decoded() == {}


@pytest.mark.parametrize("arguments", ['{"city": 5}', "{", '{"city": "\ud800"}', "[" * 100_000])
def test_arguments_that_do_not_fit_name_the_function(arguments: str) -> None:
    with pytest.raises(ValidationError, match="the arguments of weather do not fit"):
        ToolCall(id="1", name="weather", arguments=arguments).decoded(City)


@pytest.mark.parametrize("raw", [b"<html>", b"[1]", b"\xff", b'{"a": "\xff"}', b'{"a":'])
def test_extra_of_what_is_no_json_object_is_a_decode_error(raw: bytes) -> None:
    with pytest.raises(DecodeError, match="no JSON object") as caught:
        _ = Reply(value="", raw=raw).extra
    assert caught.value.body == raw.decode("utf-8", "replace")
    assert caught.value.__context__ is None


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda v: pickle.loads(pickle.dumps(v))], ids=["copy", "pickle"])
def test_outcomes_keep_everything_in_copies_and_pickles(duplicate: Callable[[Any], Any]) -> None:
    for outcome in (answered(), failed(), Outcome[int](request=Request(body=b"x"), error=KeyError("x"))):
        twin = duplicate(outcome)
        assert repr(twin) == repr(outcome)
        assert [vars(a.error) for a in twin.attempts if a.error] == [vars(a.error) for a in outcome.attempts if a.error]
        if outcome.error is not None:
            assert type(twin.error) is type(outcome.error)
            assert vars(twin.error) == vars(outcome.error)


def test_an_outcome_without_errors_goes_through_json() -> None:
    outcome = Outcome[dict[str, int]](
        request=chat("hi"),
        reply=Reply(value={"n": 3}, raw=b"\x00\xff"),
        attempts=(Attempt(number=1, status=200, usage=Usage(input_tokens=1)),),
    )
    twin = msgspec.json.decode(msgspec.json.encode(outcome), type=Outcome[dict[str, int]])
    assert (twin.value, twin.unwrap().raw, twin.attempts) == ({"n": 3}, b"\x00\xff", outcome.attempts)
    with pytest.raises(msgspec.ValidationError, match="Expected `int`"):
        msgspec.json.decode(msgspec.json.encode(outcome).replace(b'"n":3', b'"n":"x"'), type=Outcome[dict[str, int]])


# The key


class FailingError(Exception):
    pass


def keep_and_fail(key: Secret, error: CallError) -> None:
    local = {"key": key}
    raise FailingError(f"no answer with {key} {local}") from error


def test_a_key_appears_nowhere_but_where_it_is_revealed(caplog: pytest.LogCaptureFixture) -> None:
    key = Secret(MARKER)
    body = key.scrub(f"x{MARKER}y and again {MARKER}, and up to the cut:" + "." * 400 + MARKER)
    error = errors.AuthError(key.scrub(f"no such key: {MARKER}"), 401, None, "req_1", body)
    outcome = Outcome[str](request=chat("hi", meta=[1]), error=error, attempts=(Attempt(number=1, error=error),))
    shown = [repr(key), str(key), f"{key}", f"{key!r} {[key]}", "{}".format(key), repr({1: key})]  # noqa: UP032
    shown += [ascii(key), format(key), "".join(map(str, [key]))]
    for value in (error, outcome, outcome.trim(), outcome.attempts):
        shown += [repr(value), str(value), f"{value}", pickle.dumps(value, 0).decode("latin-1")]
    try:
        keep_and_fail(key, error)
    except FailingError:
        logging.getLogger("rxllm.test").exception("failed with %s", key, extra={"key": key})
        shown += traceback.TracebackException(*sys.exc_info(), capture_locals=True).format()
    shown += [caplog.text, *(repr(vars(record)) for record in caplog.records)]
    with pytest.raises(TypeError) as caught:
        json.dumps({"key": key})
    shown.append(str(caught.value))
    with pytest.raises(TypeError) as caught:
        msgspec.json.encode({"key": key})
    shown.append(str(caught.value))
    assert len(shown) > 30
    assert not [text for text in shown if "SENTINEL" in text or "0123456789" in text]
    assert sum("***" in text for text in shown) > 15
    assert key.reveal() == MARKER


def test_a_key_has_no_dict_to_look_into() -> None:
    with pytest.raises(TypeError):
        vars(Secret(MARKER))
    assert MARKER not in [getattr(Secret(MARKER), name, None) for name in ("value", "_value", "__value", "args")]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_key_does_not_pickle_nor_does_what_holds_it(protocol: int) -> None:
    with pytest.raises(ConfigError, match="not pickled") as caught:
        pickle.dumps([Secret(MARKER)], protocol)
    assert MARKER not in "".join(
        traceback.TracebackException.from_exception(caught.value, capture_locals=True).format()
    )


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_a_key_is_not_copied(duplicate: Callable[[object], object]) -> None:
    with pytest.raises(ConfigError, match="not pickled"):
        duplicate(Secret(MARKER))


def test_keys_are_equal_and_hashed_by_value() -> None:
    assert Secret("é") == Secret("é")
    assert Secret("a") != Secret("b")
    assert Secret("a") != "a"
    assert {Secret("a"): 1}[Secret("a")] == 1


@pytest.mark.parametrize(
    "wrong",
    ["", " ", f"{MARKER}\n", f" {MARKER}", f"{MARKER}\r\nX-Evil: 1", MARKER.encode(), None],
    ids=["empty", "blank", "with-a-newline", "with-a-space-before", "with-a-header", "bytes", "none"],
)
def test_a_bad_key_is_refused_without_showing_it(wrong: Any) -> None:
    with pytest.raises(ConfigError, match=r"^a key must") as caught:
        Secret(wrong)
    assert "SENTINEL" not in f"{caught.value} {caught.value!r}"
    assert "SENTINEL" not in "".join(traceback.format_exception(caught.value))


@given(st.text("s*é \n"), st.text("1-* "))
def test_scrub_puts_stars_for_the_key_and_leaves_all_else(before: str, after: str) -> None:
    assert Secret("sk-1").scrub(f"{before}sk-1{after}sk-1") == f"{before}***{after}***"
