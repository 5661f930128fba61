"""How much of a known quota is used, and how often does the server refuse?

Question: with a quota that is known and more requests than it admits, what share of it does a client use, and how many
of its calls are refused?
Unit: share of the capacity; refusals by the calls that arrived. The judge is the log of the server, by the moment at
which it decided, after the jitter of the path. Least, median and most of the seeds.
Baselines: rate_limited 0.4.0 and the openai SDK with 6 retries, both 64 at a time, on the same servers in the same run.

The server is `SimulatedProvider`, a process of its own for each case, over real HTTP: windows of 10 s, a jitter of
0-50 ms on the path of each request, answers of a lognormal length that take 0.5 s on average. Prompts have no end; the
client is cut after six windows, and what it uses in the five after the first one counts. Windows are counted from the
first arrival on; those of a fixed quota are the server's, and the first is the one that the client begins in.

The capacity is what the server's own limiter admits in these windows to one who sees its state: the same requests in
the same order, each at the moment at which it fits. Of requests that is the limit in each window (of a bucket what
flows in: the full one at the start is in the first window). Of tokens it may be less: what is reserved for the calls on
the wire is not there for others, and `capacity` says what share of the limit remains.

`steady` is the time of a window by that in which as much as the limit was admitted: a client that begins each window
somewhat later than the last may use all of them for a while. `late` is the most, in seconds, that a timer of the client
fired too late: above the jitter of the path it is the machine that is measured.

    requests         the client's strategy is the server's
    tokens           the same; server and client reserve prompt + max_tokens and settle when the answer is there
    tokens_actual    the server charges at admission what the answer will be, which no client can know: no goal
    mismatched       the client counts otherwise than the server: no goal
    without_headers  the client does not heed the limit headers: no goal

`4_processes`: share a quota of 10,000 requests per 10 s through a Redis of its own. A round trip is a read of Redis
from a socket, whatever commands were in it. One process is killed with signal 9 while it starts calls, a tenth into the
window after those that count. What it had taken and not used is lost in that window; it counts until its time is over
and a window has passed, which is within the next window: that one is full if the units are back by then.

`40_calls`: 40 calls at 10 per second, seconds of virtual time until the last is answered; rate_limited's in real time.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import itertools
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import reactivex as rx
from _bench import arguments, report
from _quota import Result, Run, is_installed, measure
from _quota_shared import Sharing, measure_shared, missing

import rxllm
from rxllm.testing import Script, VirtualScheduler, record

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from reactivex import Observable

    from rxllm.policies.quota import Strategy

STRATEGIES: tuple[Strategy, ...] = ("sliding", "fixed", "bucket")
LIMITS = {"requests": 600, "tokens": 60_000}  # per window: about 60 a second of either
PEERS = ("rate_limited", "openai")
AT_ONCE = 12  # runs; each is idle for most of the time, and their bursts are spread over a window
START = 12.0  # seconds for all of them to be ready
GOALS = {"requests": (0.99, 0.0), "tokens": (0.95, 0.001)}  # used at least, refused at most
UNIT = "share_of_capacity"
TRIPS = 0.05  # round trips to the store a call
FULL = 0.99  # of the limit: as good as all of it


def name(run: Run) -> str:
    """Return the name of a run's case: all of it but the seed."""
    unit = run.unit if run.charge != "actual" else f"{run.unit}_actual"
    if run.side != "ours":
        return f"{run.side}_{unit}_on_{run.server}"
    case = f"{unit}_{run.server}" if run.client == run.server else f"mismatched_{unit}_{run.client}_on_{run.server}"
    return case if run.headers else f"{case}_without_headers"


def runs(chosen: Any) -> list[Run]:
    """Return all runs, those of a case together; those of the peers come last, because they use the most CPU."""
    per = chosen.per / 1000
    limits = {unit: max(20, int(limit * per / 10)) for unit, limit in LIMITS.items()}
    limits["tokens"] = max(2_000, limits["tokens"])

    def run(side: str, unit: str, server: Strategy, client: Strategy, seed: int, **other: Any) -> Run:
        fields = {"charge": "settled" if unit == "tokens" else "reserved", "headers": True, **other}
        return Run(side, unit, server, client, seed=seed, limit=limits[unit], per=per, windows=chosen.windows, **fields)

    seeds = range(1, chosen.seeds + 1)
    charges = [("requests", "reserved"), ("tokens", "settled"), ("tokens", "actual")]
    if chosen.tiny:
        return [
            run("ours", "requests", "sliding", "sliding", 1),
            run("ours", "tokens", "bucket", "bucket", 1),
            run("ours", "tokens", "fixed", "sliding", 1, headers=False),
            *(run(side, "requests", "sliding", "sliding", 1) for side in PEERS if is_installed(side)),
        ]
    return [
        *(
            run("ours", unit, strategy, strategy, seed, charge=charge)
            for unit, charge in charges
            for strategy in STRATEGIES
            for seed in seeds
        ),
        *(
            run("ours", unit, strategy, strategy, 1, charge=charge, headers=False)
            for unit, charge in charges
            for strategy in STRATEGIES
        ),
        *(
            run("ours", unit, server, client, 1)
            for unit in LIMITS
            for server, client in itertools.permutations(STRATEGIES, 2)
        ),
        *(
            run(side, unit, strategy, strategy, 1)
            for side in PEERS
            if is_installed(side)
            for unit in LIMITS
            for strategy in STRATEGIES
        ),
    ]


def measured(todo: list[Run], chosen: Any) -> Iterator[tuple[Run, Result]]:
    """Measure all, some at a time."""
    spawning = multiprocessing.get_context("spawn")
    for start in range(0, len(todo), AT_ONCE):
        batch = todo[start : start + AT_ONCE]
        if not chosen.tiny:
            ready, step = time.monotonic() + START, chosen.per / 1000 / AT_ONCE
            batch = [run._replace(begin=ready + number * step) for number, run in enumerate(batch)]
        with ProcessPoolExecutor(AT_ONCE, spawning, max_tasks_per_child=1) as pool:
            yield from zip(batch, pool.map(measure, batch), strict=True)


def tell(case: str, results: list[tuple[Run, Result]]) -> None:
    """Report a case: all of its seeds."""
    run = results[0][0]
    used = sorted(result.used for _, result in results)
    refused = sum(result.refused for _, result in results)
    arrivals = sum(result.arrivals for _, result in results)
    has_goal = run.side == "ours" and run.client == run.server and run.headers and run.charge != "actual"
    least, most = GOALS[run.unit]
    report(
        "quota",
        case,
        unit=UNIT,
        used=[round(share, 4) for share in (used[0], used[len(used) // 2], used[-1])],
        capacity=round(sum(result.capacity for _, result in results) / len(results), 4),
        steady=round(sum(result.steady for _, result in results) / len(results), 4),
        windows=[[round(share, 3) for share in result.windows] for _, result in results],
        refused=refused,
        arrivals=arrivals,
        refused_share=round(refused / arrivals, 5),
        answered=sum(result.answered for _, result in results),
        given_up=sum(result.given_up for _, result in results),
        service=round(results[0][1].service, 3),
        cpu_share=round(sum(result.cpu for _, result in results) / len(results) / ((run.windows + 1) * run.per), 3),
        late=round(max(result.late for _, result in results), 3),
        limit=run.limit,
        per=run.per,
        headers=run.headers,
        seeds=len(results),
        goal=f"used >= {least}, refused <= {most:.1%}" if has_goal else None,
        met=used[0] >= least and refused <= most * arrivals if has_goal else None,
    )


def shared(chosen: Any) -> None:
    """Measure and report the processes that share a quota."""
    case, reason = f"{chosen.processes}_processes", missing()
    if reason is not None:
        report("quota", case, unit=UNIT, missing=reason, goal=None, met=None)
        return
    per = chosen.per / 1000
    limit = chosen.rate * chosen.per // 1000
    start = 5.0 if chosen.tiny else 8.0
    result = measure_shared(Sharing(chosen.processes, limit, per, chosen.windows, start, per / 10))
    used = sum(result.windows) / len(result.windows)
    calls = max(1, result.calls)
    report(
        "quota",
        case,
        unit=UNIT,
        used=round(used, 4),
        windows=[round(share, 3) for share in result.windows],
        peak=result.peak,
        refused=result.refused,
        arrivals=result.arrivals,
        round_trips_per_call=round(result.round_trips / calls, 4),
        scripts_per_call=round(result.scripts / calls, 4),
        window_of_kill=round(result.killed, 4),
        window_after_kill=round(result.after, 4),
        limit=limit,
        per=per,
        goal=f"used >= 0.95, 0 refused, < {TRIPS} round trips a call, the window after the kill >= {FULL}",
        met=used >= 0.95
        and not result.refused
        and result.peak <= limit
        and result.round_trips / calls < TRIPS
        and result.after >= FULL,
    )


class Instant:
    """A client that answers at once, in any kind of time."""

    def send(self, request: rxllm.Request, *, timeouts: object = None) -> Observable[rxllm.Reply[str]]:  # noqa: ARG002
        """Answer."""
        return rx.defer(lambda _scheduler: Script((0.0, rxllm.Reply(value="", text="", status=200))))

    def cost(self, _request: rxllm.Request) -> Mapping[str, float]:
        """Return one request."""
        return {"requests": 1.0}

    def wrap(self, item: Any) -> rxllm.Request:
        """Return a chat."""
        return rxllm.chat(item)


def virtual_seconds(count: int) -> float:
    """Return when the last of so many calls at 10 per second is answered, in virtual time."""
    scheduler = VirtualScheduler()
    stage = rxllm.call(Instant(), gate=rxllm.Gate("10/second"))
    seen = record(scheduler, rxllm.from_iterable(map(str, range(count))).pipe(stage))
    assert len(seen.values) == count
    assert all(outcome.ok for outcome in seen.values)
    return scheduler.seconds()


def seconds_of_rate_limited(count: int) -> float:
    """Return the same for rate_limited, in real time."""
    from rate_limited.resources import Resource  # noqa: PLC0415  an extra
    from rate_limited.runner import Runner  # noqa: PLC0415  an extra

    async def ask(number: int) -> int:
        return number

    async def go() -> float:
        runner = Runner(ask, [Resource("requests", 10, 1, arguments_usage_extractor=lambda _call: 1)])
        for number in range(count):
            runner.schedule(number)
        start = time.monotonic()
        results, _exceptions = await runner.run_coro()
        runner.requests_executor_pool.shutdown()
        assert sorted(results) == list(range(count))
        return time.monotonic() - start

    with contextlib.redirect_stderr(io.StringIO()):  # where it draws its progress
        return asyncio.run(go())


def main() -> None:
    """Measure all cases."""
    chosen = arguments(
        __doc__,
        per=(10_000, 500, "milliseconds of a window"),
        windows=(5, 2, "windows after the first"),
        seeds=(3, 1, "seeds of each case with a goal"),
        calls=(40, 12, "calls at 10 per second"),
        processes=(4, 2, "processes that share a quota"),
        rate=(1_000, 100, "calls a second of all of them"),
    )
    seconds = virtual_seconds(chosen.calls)
    least = (chosen.calls - 1) // 10  # seconds until a window has room for the last
    report(
        "quota",
        f"{chosen.calls}_calls",
        unit="seconds",
        ours=round(seconds, 3),
        rate_limited=round(seconds_of_rate_limited(chosen.calls), 3) if is_installed("rate_limited") else None,
        goal=f"{least:.1f} to {1.1 * least:.1f} s",
        met=least <= seconds <= 1.1 * least,
    )
    for case, results in itertools.groupby(measured(runs(chosen), chosen), lambda found: name(found[0])):
        tell(case, list(results))
    shared(chosen)
    for peer in PEERS:
        if not is_installed(peer):
            report("quota", peer, unit=UNIT, missing=peer, goal=None, met=None)


if __name__ == "__main__":
    main()
