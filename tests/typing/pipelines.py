"""The types of pipelines, as both checkers see them. Lines that end in `# wrong` must be objected to."""

from collections.abc import AsyncIterator, Iterator
from typing import Any, assert_type

import reactivex as rx
from reactivex import Observable
from reactivex import operators as ops

import rxllm
from rxllm.operators import bounded, expand, flat_map, overflow, retry, tee, throttle, timeout, validate
from rxllm.sinks import AsyncOutcomes, Outcomes


def numbers() -> Iterator[int]:
    yield 1


async def later(n: int) -> str:
    return str(n)


def stream(n: int) -> Observable[str]:
    return rx.of(str(n))


def is_good(text: str) -> bool:
    return bool(text)


def operators() -> None:
    source = rxllm.from_iterable(numbers())
    assert_type(source, Observable[int])
    assert_type(source.pipe(flat_map(stream, window=2, on_failure="raise")), Observable[str])
    assert_type(source.pipe(flat_map(later, window=2, on_failure="raise")), Observable[str])
    assert_type(source.pipe(flat_map(stream, window=2)), Observable[str | rxllm.Outcome[Any]])
    assert_type(source.pipe(timeout(1.0)), Observable[int])
    assert_type(source.pipe(retry(rxllm.Backoff())), Observable[int])
    assert_type(source.pipe(overflow("error")), Observable[int])
    assert_type(source.pipe(throttle("1/second")), Observable[int])
    assert_type(source.pipe(throttle("1/second", on_failure="emit")), Observable[int | rxllm.Outcome[Any]])
    assert_type(source.pipe(bounded(3, ops.map(str))), Observable[str])
    assert_type(source.pipe(tee(2)), tuple[Observable[int], ...])
    assert_type(rx.of("a").pipe(validate(is_good)), Observable[str])
    assert_type(rx.of("a").pipe(expand(lambda _: None)), Observable[str])


def sinks() -> None:
    source = rxllm.from_iterable([1.5])
    assert_type(rxllm.collect(source), list[float])
    outcomes = rxllm.iterate(source)
    assert_type(outcomes, Outcomes[float])
    assert_type(next(outcomes), float)
    with outcomes as same:
        for item in same:
            assert_type(item, float)


async def asynchronous(texts: AsyncIterator[str]) -> None:
    source = rxllm.from_async_iterable(texts)
    assert_type(await rxllm.acollect(source), list[str])
    async with rxllm.aiterate(source) as outcomes:
        assert_type(outcomes, AsyncOutcomes[str])
        async for item in outcomes:
            assert_type(item, str)


def size(request: rxllm.Request) -> int:
    return len(str(request.body))


def calls(client: rxllm.OpenAI, gate: rxllm.Gate) -> None:
    requests = rxllm.from_iterable([rxllm.chat("hello")])
    rxllm.OpenAI("any", count_tokens=size)
    rxllm.OpenAI("any", count_tokens=is_good)  # wrong
    requests.pipe(retry(rxllm.Backoff(), excused=gate.suspended))
    requests.pipe(rxllm.call(client, gate=gate.lane("grader")))
    outcomes = requests.pipe(rxllm.call(client))
    assert_type(outcomes, Observable[rxllm.Outcome[str]])
    for outcome in rxllm.iterate(outcomes):
        assert_type(outcome.value, str)
        assert_type(outcome.unwrap(), rxllm.Reply[str])
        assert_type(outcome.error, Exception | None)
    lengths = rxllm.from_iterable(["a"]).pipe(rxllm.call(rxllm.function(later)))
    assert_type(lengths, Observable[rxllm.Outcome[str]])


def feeds() -> None:
    feed: rxllm.Feed[int] = rxllm.Feed()
    feed.put_nowait(1)
    feed.put_nowait("a")  # wrong
    rxllm.collect([1])  # wrong
    rxllm.Gate(5)  # wrong
