"""What does it cost to leave the loop?

Question: how much more CPU does an item cost through `iterate`, in a thread of its own, than in a subscriber inside
the loop? And do 64 consumers that are slow in threads of their own slow a 65th pipeline on the same loop?
Unit: µs of CPU an item over all threads; items a second for the second question. First quartile, median, third.
Baseline: the same stream into a subscriber on the loop thread that has room for as many items as `iterate` queues;
the same fast pipeline without the slow ones, and with as many threads that sleep without a stream (what threads alone
cost). All sides are interleaved round by round in one run.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from _bench import Drain, NextTurn, arguments, cpu_per_item, interleaved, quartiles, report

import rxllm
from rxllm.operators import flat_map
from rxllm.sinks import BUFFER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import reactivex as rx

GOAL = 5.0  # µs an item
SHARE = 0.9  # of the throughput without the slow consumers
NAP = 0.05  # seconds that a slow consumer sleeps after each item


def endless() -> Iterator[int]:
    """Yield numbers for ever."""
    n = 0
    while True:
        yield n
        n += 1


def plain(n: int) -> rx.Observable[Any]:
    """Return a stream that costs next to nothing: the worst case for whoever hands over."""
    return rxllm.from_iterable(range(n))


def stage(n: int) -> rx.Observable[Any]:
    """Return a stream with one stage whose answers come in the next turn."""
    return rxllm.from_iterable(range(n)).pipe(flat_map(NextTurn, window=64))


def inside(make: Callable[[int], rx.Observable[Any]], n: int) -> int:
    """Consume on the loop thread."""
    drain = Drain(BUFFER)
    drain.connect(make(n))
    return drain.join()


def outside(make: Callable[[int], rx.Observable[Any]], n: int) -> int:
    """Consume in this thread."""
    count = 0
    with rxllm.iterate(make(n)) as items:
        for _item in items:
            count += 1
    return count


def handing_over(chosen: Any) -> None:
    """Answer the first question."""
    n = chosen.items
    for name, make in {"plain": plain, "flat_map": stage}.items():
        values = interleaved(
            {
                "inside": lambda make=make: cpu_per_item(lambda: inside(make, n), n),
                "iterate": lambda make=make: cpu_per_item(lambda: outside(make, n), n),
            },
            chosen.rounds,
        )
        more = quartiles(out - within for out, within in zip(values["iterate"], values["inside"], strict=True))
        report(
            "handoff",
            f"iterate_{name}",
            unit="us_cpu_per_item",
            inside=quartiles(values["inside"]),
            iterate=quartiles(values["iterate"]),
            more=more,
            items=n,
            rounds=chosen.rounds,
            goal=GOAL,
            met=more[1] <= GOAL,
        )


class Slow:
    """Threads that are asleep most of the time: consumers of streams, or (the control) of a bare iterator."""

    def __init__(self, threads: int, *, streams: bool) -> None:
        self.streams = streams
        self.stopping = threading.Event()
        self.taken = deque([0] * threads)
        self.threads = [threading.Thread(target=self.run, args=(number,)) for number in range(threads)]

    def __enter__(self) -> Self:
        """Start them, and wait until each has an item and full queues behind it."""
        for thread in self.threads:
            thread.start()
        while not all(self.taken):
            time.sleep(0.01)
        return self

    def __exit__(self, *_error: object) -> None:
        """Stop them."""
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def run(self, number: int) -> None:
        """Consume until told to stop."""
        if not self.streams:
            self.consume(endless(), number)
            return
        with rxllm.iterate(rxllm.from_iterable(endless()).pipe(flat_map(NextTurn, window=64))) as items:
            self.consume(items, number)

    def consume(self, items: Iterator[int], number: int) -> None:
        """Take an item, sleep, again."""
        for _item in items:
            self.taken[number] += 1
            if self.stopping.is_set():
                return
            time.sleep(NAP)


def per_second(n: int) -> float:
    """Return the throughput of a fast pipeline, in items a second."""
    start = time.perf_counter()
    count = outside(stage, n)
    seconds = time.perf_counter() - start
    assert count == n, f"{count:,} of {n:,} items"
    return n / seconds


def crowd(chosen: Any) -> None:
    """Answer the second question."""

    def crowded(*, streams: bool) -> float:
        with Slow(chosen.threads, streams=streams) as slow:
            before, start = sum(slow.taken), time.perf_counter()
            rate = per_second(chosen.crowd)
            seconds = time.perf_counter() - start
            taken[streams].append((sum(slow.taken) - before) / seconds / chosen.threads)
        return rate

    taken: dict[bool, list[float]] = {True: [], False: []}  # by each, a second
    values = interleaved(
        {
            "alone": lambda: per_second(chosen.crowd),
            "threads": lambda: crowded(streams=False),
            "crowded": lambda: crowded(streams=True),
        },
        chosen.rounds,
    )
    share, control = (
        quartiles(rate / alone for rate, alone in zip(values[name], values["alone"], strict=True))
        for name in ("crowded", "threads")
    )
    report(
        "handoff",
        "slow_consumers",
        unit="items_per_second",
        alone=quartiles(values["alone"], 0),
        crowded=quartiles(values["crowded"], 0),
        with_bare_threads=quartiles(values["threads"], 0),
        share=share,
        share_with_bare_threads=control,
        threads=chosen.threads,
        taken_by_each_per_second=quartiles(taken[True], 1)[1],
        items=chosen.crowd,
        rounds=chosen.rounds,
        goal=SHARE,
        met=share[1] >= SHARE,
    )


def main() -> None:
    """Measure both."""
    chosen = arguments(
        __doc__,
        items=(50_000, 1_000, "items a run"),
        crowd=(200_000, 2_000, "items a run of the fast pipeline"),
        rounds=(11, 1, "rounds"),
        threads=(64, 4, "slow consumers"),
    )
    handing_over(chosen)
    crowd(chosen)


if __name__ == "__main__":
    main()
