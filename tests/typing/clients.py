"""Read by the type checkers, never run: what the clients of OpenAI's family answer with."""

from array import array
from typing import Any, assert_type

import msgspec
from reactivex import Observable

import rxllm
from rxllm.providers.output import Output


class Person(msgspec.Struct):
    name: str


def values(gate: rxllm.Gate) -> None:
    assert_type(rxllm.OpenAI("any"), rxllm.OpenAI[str])
    assert_type(rxllm.OpenAI("any", "http://localhost/v1", api_key="k", operation="completions"), rxllm.OpenAI[str])
    assert_type(rxllm.OpenAI("any", operation="responses", count_tokens=len_of), rxllm.OpenAI[str])
    assert_type(rxllm.OpenAI("any", output=Person), rxllm.OpenAI[Person])
    assert_type(rxllm.OpenAI("any", output=list[Person], operation="responses"), rxllm.OpenAI[list[Person]])
    assert_type(rxllm.OpenAI("any", output=Output(Person, name="one")), rxllm.OpenAI[Person])
    assert_type(rxllm.OpenAI("any", output={"type": "object"}), rxllm.OpenAI[Any])
    assert_type(rxllm.OpenAI("any", operation="embeddings", preset="vllm"), rxllm.OpenAI[list[array[float]]])
    assert_type(rxllm.OpenAI("any", operation="models"), rxllm.OpenAI[list[str]])


def pipelines(people: rxllm.OpenAI[Person], plain: rxllm.OpenAI, gate: rxllm.Gate) -> None:
    requests = rxllm.from_iterable([rxllm.chat("hello")])
    assert_type(requests.pipe(rxllm.call(people, gate=gate)), Observable[rxllm.Outcome[Person]])
    assert_type(requests.pipe(rxllm.call(plain)), Observable[rxllm.Outcome[str]])
    vectors = requests.pipe(rxllm.call(rxllm.OpenAI("any", operation="embeddings")))
    for outcome in rxllm.iterate(vectors):
        assert_type(outcome.value, list[array[float]])


def len_of(request: rxllm.Request) -> int:
    return len(str(request.body))


def mistakes() -> None:
    rxllm.OpenAI("any", operation="images")  # wrong
    rxllm.OpenAI("any", operation="embeddings", output=Person)  # wrong
    rxllm.OpenAI("any", output=5)  # wrong
    rxllm.OpenAI("any", timeout=5)  # wrong
    rxllm.OpenAI(5)  # wrong
