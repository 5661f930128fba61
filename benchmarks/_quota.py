"""What the benchmark of quotas runs in processes of its own: a server, one client against it, and the judgement."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import io
import itertools
import logging
import math
import statistics
import time
from heapq import heappop, heappush
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import aiohttp
import msgspec
from _http import MODEL, same_loop

import rxllm
from rxllm.policies import GENERIC, Accounting
from rxllm.testing import Latency, ServerQuota, SimulatedProvider
from rxllm.testing._quotas import Entry, limiter

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterable, Iterator

    from rxllm.policies.quota import Strategy
    from rxllm.testing.simulated import Log

    Side = Callable[[str, "Run"], Coroutine[Any, Any, tuple[int, int]]]  # -> answered, given up

T = TypeVar("T")

MEAN, SIGMA, MOST = 64, 1.0, 400  # tokens of an answer: lognormal, cut by max_tokens
SERVICE = 0.5  # seconds that an answer takes, on average
JITTER = 0.05  # seconds of the path
WIDTH = 64  # calls at a time of those who need a number
TAIL = 5.5  # seconds after the last window: a client may begin late, and the longest answers must end
TICK = 0.02  # seconds
RETRIES = 6  # of the openai SDK
SETTLES = Accounting(reserves="max_tokens", settles=True)  # what a server with charge="settled" does
CHARGED = ("requests", "tokens")


class Run(NamedTuple):
    """One client against one server."""

    side: str  # "ours", "rate_limited" or "openai"
    unit: str  # "requests" or "tokens"
    server: Strategy
    client: Strategy  # of ours
    charge: str  # how the server charges tokens
    headers: bool  # whether ours heeds the limit headers
    seed: int
    limit: int  # per window
    per: float  # seconds
    windows: int  # that count, after the first
    begin: float = 0.0  # seconds of the monotonic clock


class Result(NamedTuple):
    """What the server saw of a run, and what the client got."""

    used: float  # share of the capacity
    windows: list[float]  # shares of the limit, window by window
    capacity: float  # share of the limit
    steady: float  # the time of a window by that in which as much as the limit was admitted
    refused: int
    arrivals: int
    answered: int
    given_up: int
    service: float  # seconds, mean
    cpu: float  # seconds of the client's process while it ran
    late: float  # seconds: the most that a timer of the client fired too late


def length(prompt: str) -> int:
    """Return how many tokens the model says to a prompt, drawn from a distribution with a heavy tail."""
    return math.ceil(Random(prompt).lognormvariate(math.log(MEAN) - SIGMA**2 / 2, SIGMA))


def answer(prompt: str, _body: dict[str, Any]) -> str:
    """Say so many tokens: what the server calls."""
    return "blah" * length(prompt)


def mean_length() -> float:
    """Return the mean of `length`, cut by max_tokens and rounded up."""
    mu, normal = math.log(MEAN) - SIGMA**2 / 2, statistics.NormalDist()
    below = MEAN * normal.cdf((math.log(MOST) - mu - SIGMA**2) / SIGMA)
    return below + MOST * normal.cdf((mu - math.log(MOST)) / SIGMA) + 0.5


def prompts(seed: int) -> Iterator[str]:
    """Yield prompts without an end: of an ordinary size, all different."""
    for number in itertools.count():
        yield f"Summarise this in one sentence: item {number} of list {seed} is as long as a docstring of a function."


def body(prompt: str) -> dict[str, Any]:
    """Return the body of a chat completion."""
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt}], "max_tokens": MOST}


async def ours(url: str, run: Run) -> tuple[int, int]:
    """Run a pipeline until it is cut."""
    accounting = SETTLES if run.charge == "settled" else GENERIC
    quota = rxllm.Quota(run.limit, per=run.per, unit=run.unit, strategy=run.client)
    gate = rxllm.Gate(quota, accounting=accounting, headers=run.headers)
    answered = given_up = 0
    async with rxllm.OpenAI(MODEL, url, api_key="any", accounting=accounting) as client:
        requests = (rxllm.chat(prompt, max_tokens=MOST) for prompt in prompts(run.seed))
        stream = rxllm.from_iterable(requests).pipe(rxllm.call(client, gate=gate, seed=run.seed))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(spell(run)), rxllm.aiterate(stream) as outcomes:
                async for outcome in outcomes:
                    answered += outcome.ok
                    given_up += not outcome.ok
    return answered, given_up


async def rate_limited(url: str, run: Run) -> tuple[int, int]:
    """Run rate_limited on an aiohttp session until it is cut."""
    from rate_limited.resources import Resource  # noqa: PLC0415  an extra
    from rate_limited.runner import Runner  # noqa: PLC0415  an extra

    answered = 0

    async def ask(prompt: str) -> int:
        nonlocal answered
        async with session.post(f"{url}/chat/completions", data=msgspec.json.encode(body(prompt))) as response:
            response.raise_for_status()
            reply = await response.json()
        answered += 1
        written: int = reply["usage"]["completion_tokens"]
        return written

    resource = (
        Resource("requests", run.limit, run.per, arguments_usage_extractor=lambda _call: 1)
        if run.unit == "requests"
        else Resource(
            "tokens",
            run.limit,
            run.per,
            arguments_usage_extractor=lambda call: (len(call.args[0]) + 3) // 4,
            results_usage_extractor=lambda _call, written: written,
            max_results_usage_estimator=lambda _call: MOST,
        )
    )
    logging.disable(logging.CRITICAL)  # it logs each refusal with its traceback
    async with aiohttp.ClientSession(headers={"Content-Type": "application/json"}) as session:
        runner = Runner(ask, [resource], max_concurrent=WIDTH)
        each = 1 if run.unit == "requests" else mean_length() / 2
        for prompt in itertools.islice(prompts(run.seed), int(2 * (run.windows + 2) * run.limit / each)):
            runner.schedule(prompt)  # it cannot pull: more than it will ever start
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(spell(run)):
                await runner.run_coro()
        given_up = sum(len(call.exceptions) > runner.max_retries for call in runner.scheduled_calls)
        runner.requests_executor_pool.shutdown()
    return answered, given_up


async def openai(url: str, run: Run) -> tuple[int, int]:
    """Run the SDK, so many at a time, until it is cut."""
    from openai import AsyncOpenAI, OpenAIError  # noqa: PLC0415  an extra

    answered = given_up = 0
    todo = prompts(run.seed)

    async def worker() -> None:
        nonlocal answered, given_up
        for prompt in todo:
            try:
                await client.chat.completions.create(**body(prompt))
            except OpenAIError:
                given_up += 1
            else:
                answered += 1

    async with AsyncOpenAI(base_url=url, api_key="any", max_retries=RETRIES) as client:
        await client.models.list()  # its first call takes seconds: no quota counts this one
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(spell(run)), asyncio.TaskGroup() as group:
                for _ in range(WIDTH):
                    group.create_task(worker())
    return answered, given_up


SIDES: dict[str, Side] = {"ours": ours, "rate_limited": rate_limited, "openai": openai}


def spell(run: Run) -> float:
    """Return the seconds that a client is given: a fixed window may begin just after it does."""
    return (run.windows + 1) * run.per + TAIL


def is_installed(name: str) -> bool:
    """Say whether a package can be imported."""
    return importlib.util.find_spec(name) is not None


def measure(run: Run) -> Result:
    """Run one client against a server of its own, and judge it by the server's log."""
    quota = ServerQuota(run.limit, run.per, run.server)
    settings: dict[str, Any] = {run.unit: quota, "charge": run.charge}
    latency = Latency(per_token=SERVICE / mean_length())
    provider = SimulatedProvider(seed=run.seed, answer=answer, latency=latency, path_jitter=JITTER, **settings)
    with (
        provider.start() as server,
        asyncio.Runner(loop_factory=same_loop()) as runner,
        contextlib.redirect_stderr(io.StringIO()),  # where progress is drawn
    ):
        time.sleep(max(0.0, run.begin - time.monotonic()))
        cpu = time.process_time()
        (answered, given_up), late = runner.run(watched(SIDES[run.side](server.url, run)))
        return judge(server.log(), run, answered, given_up, time.process_time() - cpu, late)


async def watched(side: Coroutine[Any, Any, T]) -> tuple[T, float]:
    """Return what a side returns, and how late a timer on its loop was at most: others may use the machine."""
    late = 0.0

    async def tick() -> None:
        nonlocal late
        while True:
            due = time.monotonic() + TICK
            await asyncio.sleep(TICK)
            late = max(late, time.monotonic() - due)

    ticking = asyncio.create_task(tick())
    try:
        return await side, late
    finally:
        ticking.cancel()


def judge(  # noqa: PLR0917  one caller
    log: Log, run: Run, answered: int, given_up: int, cpu: float, late: float
) -> Result:
    """Say what was admitted in the windows after the first, and how much was refused in all."""
    assert log.dropped == 0
    rows = [row for row in log if row.marker]  # calls of the model
    begun = (rows[0].arrived - log.started) % run.per  # since when the window of a fixed one goes on
    first = rows[0].arrived - (begun if run.server == "fixed" else 0.0)
    admitted = [(row.arrived - first, row.charged if run.unit == "tokens" else 1) for row in rows if row.admitted]
    counted = shares(admitted, run)
    capacity = sum(shares(best(run, begun), run)) / run.windows
    taken = [row.answered - row.arrived for row in rows if row.admitted and row.answered is not None]
    return Result(
        used=sum(counted) / run.windows / capacity,
        windows=counted,
        capacity=capacity,
        steady=run.per / statistics.median(cycles(admitted, run)),
        refused=sum(row.reason in CHARGED for row in rows),
        arrivals=len(rows),
        answered=answered,
        given_up=given_up,
        service=sum(taken) / len(taken),
        cpu=cpu,
        late=late,
    )


def shares(admitted: Iterable[tuple[float, float]], run: Run) -> list[float]:
    """Return what of the limit was admitted in each window after the first, of pairs of seconds and amounts."""
    sums = [0.0] * run.windows
    for at, amount in admitted:
        window = int(at // run.per) - 1
        if 0 <= window < run.windows:
            sums[window] += amount / run.limit
    return sums


def cycles(admitted: list[tuple[float, float]], run: Run) -> Iterator[float]:
    """Yield from each admission after the first window the seconds until as much as the limit has been admitted.

    A client that begins each window a little later than the last one may still use all of them; this shows it.
    """
    last, amount = 0, 0.0
    for at, used in admitted:
        while last < len(admitted) and amount < run.limit:
            amount += admitted[last][1]
            last += 1
        if amount >= run.limit and at >= run.per and last < len(admitted):
            yield admitted[last][0] - at
        amount -= used


def best(run: Run, begun: float) -> list[tuple[float, float]]:
    """Return what this server admits to one who sees its state: each request comes at the moment at which it fits.

    Args:
        run: the server, and the requests in their order.
        begun: seconds between the start of a fixed window and the first request.
    """
    begun = begun if run.server == "fixed" else 0.0
    state = limiter(ServerQuota(run.limit, run.per, run.server), 0.0)
    assert state is not None
    now, end = begun, (run.windows + 1) * run.per
    wire: list[tuple[float, int, Entry, int]] = []  # the next to be answered first: when, number, booked, charged then
    admitted: list[tuple[float, float]] = []
    for number, prompt in enumerate(prompts(run.seed)):
        written = min(length(prompt), MOST)
        actual = (len(prompt) + 3) // 4 + written if run.unit == "tokens" else 1
        cost = actual + MOST - written if run.unit == "tokens" and run.charge != "actual" else actual
        while (wait := state.wait(now, cost)) > 0:
            if wire and wire[0][0] <= now + wait:
                now, _, entry, used = heappop(wire)
                state.settle(now, entry, used)
            else:
                now += wait
        while wire and wire[0][0] <= now:
            at, _, entry, used = heappop(wire)
            state.settle(at, entry, used)
        if now >= end:
            return admitted
        heappush(wire, (now + written * SERVICE / mean_length(), number, state.charge(now, cost), actual))
        admitted.append((now, actual))
    raise AssertionError  # prompts have no end
