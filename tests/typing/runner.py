"""Read by the type checkers, never run: what a runner takes, and what it gives back."""

from collections.abc import Callable
from functools import partial
from typing import Any, assert_type

import rxllm
from rxllm.policies import AdaptiveConcurrencyParams
from rxllm.presets import anthropic_resources, openai_chat_resources
from rxllm.runner import Call, Finished, Resource, Runner, RunnerStatistics


def ask(prompt: str, *, words: int = 5) -> str:
    return prompt * words


async def ask_later(prompt: str, words: int) -> list[str]:
    return [prompt] * words


class Asker:
    async def __call__(self, prompt: str) -> float:
        return 1.0

    def method(self, prompt: str) -> bytes:
        return b""


def runners(asker: Asker, unknown: Callable[..., Any]) -> None:
    assert_type(Runner(ask).run(), tuple[list[str | None], list[list[Exception]]])
    assert_type(Runner(ask_later).run(), tuple[list[list[str] | None], list[list[Exception]]])
    assert_type(Runner(asker).run()[0], list[float | None])
    assert_type(Runner(asker.method).results()[0], list[bytes | None])
    assert_type(Runner(partial(ask, words=2)).run()[0], list[str | None])
    assert_type(Runner(unknown).run()[0], list[Any | None])
    assert_type(Runner(lambda: 5).run()[0], list[int | None])
    assert_type(rxllm.Runner(ask).statistics(), RunnerStatistics)
    assert_type(rxllm.Runner(ask).interrupted, bool)


def schedules(asker: Asker) -> None:
    runner = Runner(ask, openai_chat_resources(500, 90_000, 8_000), 64, 5, bool, 1.0, 2.0)
    assert_type(runner.schedule("a", words=3), None)
    later = Runner(ask_later, anthropic_resources(50, 40_000, 8_000), validation=len, timeout=5.0, grace=1.0)
    later.schedule("a", 3)
    Runner(asker).schedule("a")
    runner.schedule(3)  # wrong
    runner.schedule("a", 3)  # wrong
    runner.schedule("a", many=3)  # wrong
    later.schedule("a")  # wrong
    Runner(asker).schedule()  # wrong


async def results() -> None:
    runner = Runner(ask_later)
    assert_type(await runner.run_coro(), tuple[list[list[str] | None], list[list[Exception]]])
    for finished in runner.as_completed():
        assert_type(finished, Finished[list[str]])
        assert_type(finished.result, list[str] | None)
        assert_type(finished.call, Call)
        assert_type(finished.exceptions, tuple[Exception, ...])
    async for finished in runner.as_completed():
        assert_type(finished.index, int)


def usage(call: Call) -> float:
    return 1.5


def used(call: Call, result: dict[str, int]) -> int:
    return result["tokens"]


def resources() -> None:
    assert_type(Resource("requests", 500, 60, usage), Resource)
    Resource("tokens", 90_000, 60.0, results_usage_extractor=used, max_results_usage_estimator=usage)
    Runner(ask, [Resource("requests", 500, 60, usage)])
    Resource("tokens", 90_000, 60.0, used)  # wrong
    Resource("tokens", "90_000", 60.0)  # wrong
    Runner(ask, [500])  # wrong
    Runner(ask, validation=len, on_progress=5)  # wrong
    Runner(5)  # wrong


def parameters() -> None:
    params = rxllm.RemoteParams(num_workers=4, requests_per_minute=500)
    assert_type(params.num_workers, int)
    assert_type(params.adaptive, AdaptiveConcurrencyParams)
    outcomes = rxllm.from_iterable(["a"]).pipe(rxllm.from_params(params, model="any", ordered=True))
    for outcome in rxllm.iterate(outcomes):
        assert_type(outcome, rxllm.Outcome[str])
    rxllm.from_params(params, model="any", gate=None)  # wrong
    rxllm.from_params(params)  # wrong
