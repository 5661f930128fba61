"""Read by the type checkers, never run: what the types of messages are to the code that uses them."""

from typing import assert_type

from rxllm import errors
from rxllm.messages import Attempt, Chunk, Outcome, Reply, Request, Secret, Usage, chat


def requests() -> None:
    assert_type(chat("hi", max_tokens=5), Request)
    assert_type(Request(body={"input": "x"}, operation="embeddings").id, str | None)


def outcomes(outcome: Outcome[int]) -> None:
    assert_type(outcome.value, int)
    assert_type(outcome.text, str)
    assert_type(outcome.reply, Reply[int] | None)
    assert_type(outcome.unwrap(), Reply[int])
    assert_type(outcome.trim(), Outcome[int])
    assert_type(outcome.ok, bool)
    assert_type(outcome.error, Exception | None)
    assert_type(outcome.attempts, tuple[Attempt, ...])
    assert_type(outcome.usage + Usage(), Usage)
    assert_type(outcome.attempts[0].waited, dict[str, float])


def inference(request: Request) -> None:
    assert_type(Reply(value=3.5), Reply[float])
    assert_type(Outcome(request=request, reply=Reply(value="x")), Outcome[str])
    assert_type(Chunk(text="x").usage, Usage | None)
    assert_type(Chunk().text, str)


def failures(error: errors.CallError, late: errors.TimeoutError) -> None:
    assert_type(error.retry_after, float | None)
    assert_type(error.transient, bool)
    assert_type(error.body, str | None)
    assert_type(late.phase, errors.Phase)
    assert_type(errors.is_transient(error), bool)


def mistakes(outcome: Outcome[int]) -> None:
    Request()  # wrong
    Request("hi")  # wrong
    Request(body=1, prio=3)  # wrong
    chat(3)  # wrong
    Secret(b"key")  # wrong
    assert_type(outcome.value, str)  # wrong
    outcome.ok = False  # wrong
    errors.TimeoutError("late", phase="lunch")  # wrong
    errors.CallError()  # wrong
