"""What does a call cost through the pipeline, and what does it cost elsewhere?

Question: how much CPU does a request cost through `call` (a quota of requests and one of tokens, a check, retries, 64
on the wire), consumed in a `for` loop by `iterate`?
Unit: µs of CPU a request, of the whole client process with all its threads; the server is another process and does not
count. `ratio` is ours by the other's, round by round. First quartile, median, third.
Baselines: the plain loop over aiohttp (`json=`, `r.json()`, default session); a tuned one (no timeouts, a body of
bytes, `r.read()`); both without quotas, checks and retries. rate_limited on the tuned session, with the two quotas and
the check. The openai SDK, 64 at a time, without retries.

Both sides run on the same type of loop, each type in a process of its own: asyncio's, and uvloop's when it is there.
All sides are interleaved round by round. What is not installed is reported as missing: it is in the extra `bench`.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import multiprocessing
import sys
from typing import TYPE_CHECKING, Any

from _bench import arguments, cpu_per_item, interleaved, quartiles, report
from _http import MODEL, TOKENS, Bare, body, prompt, requests

import rxllm
from rxllm.runtime import background
from rxllm.testing import SimulatedProvider

if TYPE_CHECKING:
    from collections.abc import Callable

    Side = Callable[[int], int]  # how many to ask -> how many were answered

LATENCY = 0.004  # seconds
WIDTH = 64
REQUESTS_A_MINUTE, TOKENS_A_MINUTE = 100_000_000, 100_000_000_000  # never reached, always counted
GOALS = {"plain": 1.0, "tuned": 1.35}
EXTRAS = ("rate_limited", "openai")
UNIT = "us_cpu_per_request"


def ours(url: str) -> Side:
    """Return our side."""
    client = rxllm.OpenAI(MODEL, url, api_key="any")
    gate = rxllm.Gate(f"{REQUESTS_A_MINUTE}/minute", f"{TOKENS_A_MINUTE} tokens/minute", concurrency=WIDTH)
    stage = rxllm.call(client, gate=gate, validate=lambda reply: bool(reply.text))

    def run(count: int) -> int:
        good = 0
        with rxllm.iterate(rxllm.from_iterable(requests(count)).pipe(stage)) as outcomes:
            for outcome in outcomes:
                good += outcome.ok
        return good

    return run


def rate_limited(bare: Bare) -> Side:
    """Return the side of rate_limited: its runner on the tuned session, and on the same loop."""
    from rate_limited.resources import Resource  # noqa: PLC0415  an extra
    from rate_limited.runner import Runner  # noqa: PLC0415  an extra

    async def ask(number: int) -> str:
        return await bare.ask(number)

    async def go(count: int) -> int:
        resources = [
            Resource("requests", REQUESTS_A_MINUTE, 60, arguments_usage_extractor=lambda _call: 1),
            Resource(
                "tokens",
                TOKENS_A_MINUTE,
                60,
                arguments_usage_extractor=lambda call: len(prompt(call.args[0])) // 4,
                results_usage_extractor=lambda _call, result: len(result) // 4,
                max_results_usage_estimator=lambda _call: TOKENS,
            ),
        ]
        runner = Runner(ask, resources, max_concurrent=WIDTH, validation_function=bool)
        for number in range(count):
            runner.schedule(number)
        results, _exceptions = await runner.run_coro()
        runner.requests_executor_pool.shutdown()
        return sum(map(bool, results))

    return lambda count: bare.run_coroutine(lambda: go(count))


def openai(bare: Bare, url: str, stack: contextlib.ExitStack) -> Side:
    """Return the side of the SDK, on the same loop; its connections are closed with the stack."""
    from openai import AsyncOpenAI  # noqa: PLC0415  an extra

    client = AsyncOpenAI(base_url=url, api_key="any", max_retries=0)
    stack.callback(lambda: bare.run_coroutine(client.close))

    async def go(count: int) -> int:
        numbers, good = iter(range(count)), 0

        async def worker() -> None:
            nonlocal good
            for number in numbers:
                answer = await client.chat.completions.create(**body(number))
                good += bool(answer.choices[0].message.content)  # after the await: `+=` reads first

        await asyncio.gather(*(worker() for _ in range(WIDTH)))
        return good

    return lambda count: bare.run_coroutine(lambda: go(count))


def measure(loop: str, chosen: Any) -> None:
    """Measure everything in this process, on this type of loop."""
    if loop == "asyncio":
        sys.modules["uvloop"] = None  # type: ignore[assignment]  # to import it fails from now on
    kind = type(background().loop).__module__.partition(".")[0]
    assert kind == loop, f"the loop is one of {kind}"
    with (
        SimulatedProvider(latency=LATENCY).start() as provider,
        Bare(provider.url, tuned=False, width=WIDTH) as plain,
        Bare(provider.url, tuned=True, width=WIDTH) as tuned,
        contextlib.ExitStack() as stack,
    ):
        sides: dict[str, Side] = {"ours": ours(provider.url), "plain": plain.run, "tuned": tuned.run}
        if is_installed("rate_limited"):
            sides["rate_limited"] = rate_limited(tuned)
        if is_installed("openai"):
            sides["openai"] = openai(tuned, provider.url, stack)
        counts = {name: chosen.extras if name in EXTRAS else chosen.requests for name in sides}

        def cost(name: str) -> float:
            return cpu_per_item(lambda: sides[name](counts[name]), counts[name])

        values = interleaved({name: lambda name=name: cost(name) for name in sides}, chosen.rounds)
    for name in (*GOALS, *EXTRAS):
        case, goal = f"{loop}_against_{name}", GOALS.get(name)
        if name not in values:
            report("overhead", case, unit=UNIT, missing=name, goal=goal, met=None)
            continue
        ratio = quartiles(mine / other for mine, other in zip(values["ours"], values[name], strict=True))
        report(
            "overhead",
            case,
            unit=UNIT,
            ours=quartiles(values["ours"], 1),
            other=quartiles(values[name], 1),
            ratio=ratio,
            requests=counts["ours"],
            requests_of_other=counts[name],
            rounds=chosen.rounds,
            goal=goal,
            met=None if goal is None else ratio[1] <= goal,
        )


def is_installed(name: str) -> bool:
    """Say whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def main() -> None:
    """Measure on each type of loop, in a process of its own."""
    chosen = arguments(
        __doc__,
        requests=(5_000, 100, "requests a round of ours, plain and tuned"),
        extras=(1_000, 20, "requests a round of rate_limited and openai"),
        rounds=(9, 1, "rounds"),
    )
    for loop in ("asyncio", "uvloop"):
        if not is_installed(loop):
            report("overhead", loop, unit=UNIT, missing=loop, goal=None, met=None)
            continue
        child = multiprocessing.get_context("spawn").Process(target=measure, args=(loop, chosen))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"the process on {loop} ended with status {child.exitcode}")


if __name__ == "__main__":
    main()
