"""Does a long run stay small, and does a second stage cost throughput?

Question: by how much does resident memory grow between the 100,000th request of a run and the 1,000,000th, and how
far do a stage and a whole pipeline run ahead of their consumer? How fast are two stages behind each other?
Unit: MB (10^6 bytes) of VmRSS after a garbage collection; items; and the rate of two stages as a share of the slower
one's own.
Baseline: the same process at its 100,000th item; window + buffer of each stage; the slower stage alone, interleaved
round by round in one run.

"one_stage": requests from a generator through flat_map(retry(validate(inner))) into `iterate`. An inner is a script:
it answers in a coming turn of the loop or after 1 or 2 ms; four requests in a hundred fail once and are retried, one
is answered with what the check refuses and asked again. Each must come out exactly once.
"call": the same through `call`, with a quota of requests and one of tokens a minute, over the in-memory transport.
"two_stages_…": two flat_maps whose inners take 5 ms each.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import msgspec
from _bench import Later, arguments, interleaved, quartiles, report, resident_mb
from reactivex import operators as ops

import rxllm
from rxllm import errors
from rxllm.operators import flat_map, retry, validate
from rxllm.policies.backoff import Backoff
from rxllm.providers.base import Call
from rxllm.sinks import BUFFER
from rxllm.testing import Script
from rxllm.transports import MemoryTransport, Response

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import reactivex as rx

GROWTH = 20.0  # MB
SHARE = 0.9  # of the slower stage's own rate
WINDOW = 64
DELAYS = (0.0001, 0.0001, 0.001, 0.002)  # seconds; the loop's timers round the first to the next turn
SLOW = 0.005  # seconds
WRONG = "wrong"
IN_HAND = 1  # item that the loop body has and has not counted yet


class Stage:
    """Counts what a stage starts and passes on, and the most it had in between."""

    def __init__(self, bound: int) -> None:
        self.bound = bound  # window + buffer
        self.inside = 0
        self.most = 0

    def start(self) -> None:
        """Count an item that the mapper gets."""
        self.inside += 1
        self.most = max(self.most, self.inside)

    def passed_on(self, _value: object) -> None:
        """Count an item that leaves the stage."""
        self.inside -= 1


class Run:
    """The whole pipeline: what is pulled, what the loop body has had."""

    def __init__(self, items: int, bound: int) -> None:
        self.items = items
        self.bound = bound
        self.pulled = 0
        self.delivered = 0
        self.most = 0

    def pull(self) -> Iterator[int]:
        """Yield numbers, one for each item."""
        for n in range(self.items):
            self.pulled += 1
            self.most = max(self.most, self.pulled - self.delivered)
            yield n


def requests(run: Run) -> Iterator[rxllm.Request]:
    """Yield requests that hold some text each."""
    for n in run.pull():
        yield rxllm.chat(f"Write a haiku about the number {n}.", meta=n, max_tokens=60)


def inner(request: rxllm.Request) -> Script[Any]:
    """Return the scripted stream of one request."""
    n: int = request.meta
    answer = (DELAYS[n % len(DELAYS)], n)
    if n % 20 != 7:
        return Script(answer)
    failure: Any = WRONG if n % 100 == 7 else errors.ConnectionError("cut")
    return Script((DELAYS[0], failure), answer)


def one_stage(items: int, window: int) -> None:
    """Run a long stream through one stage."""
    stage = Stage(window)  # before a sink a stage has no buffer: the sink's queue is one
    run = Run(items, window + BUFFER + IN_HAND)
    check = validate(lambda answer: answer != WRONG)
    again = retry(Backoff(base=0.001, cap=0.01))

    def mapper(request: rxllm.Request) -> rx.Observable[Any]:
        stage.start()
        return again(check(inner(request)))

    outcomes = rxllm.from_iterable(requests(run)).pipe(flat_map(mapper, window=window))
    consume("one_stage", run, stage, outcomes, int)


def answer(call: Call) -> Response:
    """Answer as a server does: of a hundred requests four fail once, and one is answered with what is refused."""
    text = call.body.partition(b"the number ")[2].partition(b".")[0].decode()
    if int(text) % 20 == 7 and text not in failed_once:
        failed_once.add(text)
        if int(text) % 100 != 7:
            return Response(500, {}, b"{}")
        text = WRONG
    else:
        failed_once.discard(text)
    choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}
    return Response(200, {}, msgspec.json.encode({"id": text, "model": "any", "choices": [choice], "usage": usage}))


failed_once: set[str] = set()


def through_call(items: int, window: int) -> None:
    """Run a long stream through `call`, two quotas of a minute, a check, and retries."""
    stage = Stage(window)
    run = Run(items, window + BUFFER + IN_HAND)
    client = rxllm.OpenAI("any", api_key="none", transport=MemoryTransport(answer), accounting="generic")
    gate = rxllm.Gate("1_000_000_000 requests/minute", "1_000_000_000_000 tokens/minute", concurrency=window)

    def choose(_request: rxllm.Request) -> rxllm.OpenAI:
        stage.start()
        return client

    outcomes = rxllm.from_iterable(requests(run)).pipe(
        rxllm.call(
            choose,
            gate=gate,
            window=window,
            retry=Backoff(base=0.001, cap=0.01),
            validate=lambda reply: reply.text != WRONG,
        )
    )
    consume("call", run, stage, outcomes, lambda outcome: int(outcome.text))


def consume(case: str, run: Run, stage: Stage, outcomes: rx.Observable[Any], number: Callable[[Any], int]) -> None:
    """Consume a run, and report how its memory grew and how far it ran ahead."""
    items = run.items
    seen = bytearray(items)
    mark = items // 10
    before = 0.0
    start, cpu = time.perf_counter(), time.process_time()
    with rxllm.iterate(outcomes.pipe(ops.do_action(stage.passed_on))) as answers:
        for item in answers:
            run.delivered += 1
            seen[number(item)] += 1
            if run.delivered == mark:
                before = resident_mb()
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    after = resident_mb()
    assert run.delivered == items
    assert seen.count(1) == items, "an item came twice or never"
    growth = round(after - before, 2)
    bounded = stage.most <= stage.bound and run.most <= run.bound
    report(
        "memory",
        case,
        unit="MB",
        before=round(before, 2),
        after=round(after, 2),
        growth=growth,
        counted_from=mark,
        started_minus_passed_on=[stage.most],
        stage_bounds=[stage.bound],
        pulled_minus_delivered=run.most,
        pipeline_bound=run.bound,
        items=items,
        delivered=run.delivered,
        seconds=round(seconds, 2),
        us_cpu_per_item=round(cpu / items * 1e6, 2),
        goal=f"growth < {GROWTH:.0f} MB, all within bounds",
        met=growth < GROWTH and bounded,
    )


def rate(items: int, windows: tuple[int, ...], stages: list[Stage], runs: list[Run]) -> float:
    """Run one stage for each window; return items a second, from the first subscription to the last item."""
    # A stage before another has that one's window as its buffer, the last one none.
    mine = [Stage(window + ahead) for window, ahead in zip(windows, (*windows[1:], 0), strict=True)]
    run = Run(items, sum(stage.bound for stage in mine) + BUFFER + IN_HAND)
    stages += mine
    runs.append(run)

    def slow(stage: Stage, window: int) -> Any:
        def mapper(n: int) -> Later:
            stage.start()
            return Later(n, SLOW)

        return ops.compose(flat_map(mapper, window=window), ops.do_action(stage.passed_on))

    stream = rxllm.from_iterable(run.pull()).pipe(
        *(slow(stage, window) for stage, window in zip(mine, windows, strict=True))
    )
    start = time.perf_counter()
    with rxllm.iterate(stream) as numbers:
        total = 0
        for n in numbers:
            run.delivered += 1
            total += n
    seconds = time.perf_counter() - start
    assert run.delivered == items
    assert total == items * (items - 1) // 2, "an item came twice or never"
    return items / seconds


def two_stages(case: str, items: int, rounds: int, windows: tuple[int, int]) -> None:
    """Run two stages, and the slower one alone."""
    alone: tuple[list[Stage], list[Run]] = [], []
    both: tuple[list[Stage], list[Run]] = [], []
    values = interleaved(
        {
            "slower_alone": lambda: rate(items, (min(windows),), *alone),
            "two_stages": lambda: rate(items, windows, *both),
        },
        rounds,
    )
    share = quartiles(two / one for two, one in zip(values["two_stages"], values["slower_alone"], strict=True))
    stages, runs = both
    bounded = all(counted.most <= counted.bound for counted in (*stages, *runs))
    report(
        "memory",
        case,
        unit="share of the slower stage's own rate",
        windows=windows,
        two_stages=quartiles(values["two_stages"], 0),
        slower_alone=quartiles(values["slower_alone"], 0),
        share=share,
        started_minus_passed_on=[max(stage.most for stage in stages[level::2]) for level in range(2)],
        stage_bounds=[stage.bound for stage in stages[:2]],
        pulled_minus_delivered=max(run.most for run in runs),
        pipeline_bound=runs[0].bound,
        items=items,
        delivered=runs[-1].delivered,
        rounds=rounds,
        goal=f"share >= {SHARE}, all within bounds",
        met=share[1] >= SHARE and bounded,
    )


def main() -> None:
    """Measure all cases."""
    chosen = arguments(
        __doc__,
        requests=(1_000_000, 2_000, "requests through one stage, and through call"),
        items=(6_000, 200, "items a run through two stages"),
        rounds=(9, 1, "rounds of the two stages"),
    )
    one_stage(chosen.requests, WINDOW)
    through_call(chosen.requests, WINDOW)
    two_stages("two_stages_equal", chosen.items, chosen.rounds, (32, 32))
    two_stages("two_stages_unequal", chosen.items, chosen.rounds, (64, 16))
    two_stages("two_stages_unequal_late", chosen.items, chosen.rounds, (16, 64))


if __name__ == "__main__":
    main()
