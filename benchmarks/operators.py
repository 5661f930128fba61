"""What does each operator cost?

Question: how much CPU does an item cost in each operator of ours, and in stock operators below the scheduler that
carries demand?
Unit: µs of CPU an item (`total`: the whole pipeline; `added`: more than the case named in `over`), first quartile,
median, third.
Baseline: the same pipeline without the operator; and stock reactivex doing the same, all interleaved round by round
in one run.

Stock flat_map has no window: it runs all items at once, so what an item costs grows with their number. "stock_merge_…"
is stock map and merge(max_concurrent=…) with the window of ours.

Operators that work per request (retry, validate, timeout, expand) are measured around the inner streams of a
flat_map, one subscription an item; the others around one long stream. The case "depth" is of another kind: how deep
the stack gets under 10,000 inner streams that answer at once, which must be as deep as under 100.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import reactivex as rx
from _bench import Drain, NextTurn, Now, arguments, cpu_per_item, interleaved, quartiles, report, stock_next_turn
from reactivex import operators as ops

import rxllm
from rxllm.operators import bounded, expand, flat_map, overflow, retry, tee, timeout, validate
from rxllm.policies.backoff import Backoff

if TYPE_CHECKING:
    from collections.abc import Callable

    Source = Callable[[int], rx.Observable[Any]]

WINDOW = 64
ROOM = 256  # of the consumer
TRIES = retry(Backoff())
CHECK = validate(lambda value: value is not None)
CLOCK = timeout(60.0)
LOOP = expand(lambda _value: None)  # one turn, then no other
STOCK = (ops.map(lambda n: n + 1), ops.filter(lambda n: n > 0), ops.scan(lambda total, n: total + n, 0))


def source(n: int) -> rx.Observable[int]:
    """Return our source."""
    return rxllm.from_iterable(range(n))


def within(make: Callable[[int], Any], **settings: Any) -> Source:
    """Return a pipeline with one flat_map over `make(item)`."""
    stage = flat_map(make, window=WINDOW, **settings)
    return lambda n: source(n).pipe(stage)


async def coroutine(n: int) -> int:
    """Answer at once, from a task."""
    return n


def stock_window(n: int, mapper: Callable[[int], rx.Observable[Any]]) -> rx.Observable[Any]:
    """Return the stock pipeline that runs as many inner streams at a time as ours does."""
    return rx.from_iterable(range(n)).pipe(ops.map(mapper), ops.merge(max_concurrent=WINDOW))


OURS: dict[str, tuple[str, Source]] = {  # case: (what it is measured against, the pipeline)
    "from_iterable": ("", source),
    "stock_pipe_on_ours": ("stock_pipe", lambda n: source(n).pipe(*STOCK)),
    "flat_map_sync": ("from_iterable", within(Now)),
    "flat_map_stock_inner": ("from_iterable", within(rx.just)),
    "flat_map_async": ("from_iterable", within(NextTurn)),
    "flat_map_ordered": ("from_iterable", within(NextTurn, ordered=True)),
    "flat_map_coroutine": ("from_iterable", within(coroutine)),
    "retry": ("flat_map_async", within(lambda n: TRIES(NextTurn(n)))),
    "validate": ("flat_map_async", within(lambda n: CHECK(NextTurn(n)))),
    "timeout": ("flat_map_async", within(lambda n: CLOCK(NextTurn(n)))),
    "expand": ("flat_map_async", within(lambda n: LOOP(NextTurn(n)))),
    "retry_validate": ("flat_map_async", within(lambda n: TRIES(CHECK(NextTurn(n))))),
    "bounded": ("from_iterable", lambda n: source(n).pipe(bounded(WINDOW, ops.as_observable()))),
    "overflow": ("from_iterable", lambda n: source(n).pipe(overflow("error"))),
}
BARE: dict[str, tuple[str, Source]] = {  # stock operators on stock sources, no demand anywhere
    "stock_from_iterable": ("", lambda n: rx.from_iterable(range(n))),
    "stock_pipe": ("stock_from_iterable", lambda n: rx.from_iterable(range(n)).pipe(*STOCK)),
    "stock_flat_map_sync": ("stock_from_iterable", lambda n: rx.from_iterable(range(n)).pipe(ops.flat_map(rx.just))),
    "stock_flat_map_async": (
        "stock_from_iterable",
        lambda n: rx.from_iterable(range(n)).pipe(ops.flat_map(stock_next_turn)),
    ),
    "stock_merge_async": ("stock_from_iterable", lambda n: stock_window(n, stock_next_turn)),
    "stock_merge_retry": (
        "stock_merge_async",
        lambda n: stock_window(n, lambda item: stock_next_turn(item).pipe(ops.retry(5))),
    ),
    "stock_retry": (
        "stock_flat_map_async",
        lambda n: rx.from_iterable(range(n)).pipe(ops.flat_map(lambda item: stock_next_turn(item).pipe(ops.retry(5)))),
    ),
}


def ours(make: Source, n: int) -> int:
    """Run a pipeline into a consumer with room; return how many items came out."""
    drain = Drain(ROOM)
    drain.connect(make(n))
    return drain.join()


def bare(make: Source, n: int) -> int:
    """Run a pipeline the stock way."""
    drain = Drain(ROOM)
    drain.connect_stock(make(n))
    return drain.join()


def two_branches(n: int) -> int:
    """Run both branches of a tee; return how many items each had."""
    drains = Drain(ROOM), Drain(ROOM)
    for drain, branch in zip(drains, source(n).pipe(tee(2)), strict=True):
        drain.connect(branch)
    first, second = (drain.join() for drain in drains)
    assert first == second
    return first


def fed(n: int) -> int:
    """Feed the items by hand, a chunk a turn of the loop."""
    feed: rxllm.Feed[int] = rxllm.Feed()
    drain = Drain(ROOM)
    drain.connect(feed)
    left = n

    def put() -> None:
        nonlocal left
        for _ in range(min(ROOM, left)):
            feed.put_nowait(left)
            left -= 1
        if left:
            drain.clock.call_soon(put)
        else:
            feed.close()

    drain.clock.post(put)
    return drain.join()


def depth(inner: Callable[[int], rx.Observable[Any]], n: int) -> int:
    """Return the most frames on the stack while `n` inner streams that answer at once run through a flat_map."""
    most = 0

    def mapper(item: int) -> rx.Observable[Any]:
        nonlocal most
        frame, frames = sys._getframe(), 0  # noqa: SLF001  there is no other way that does not cost
        while frame is not None:
            frame, frames = frame.f_back, frames + 1
        most = max(most, frames)
        return inner(item)

    assert ours(within(mapper), n) == n
    return most


def main() -> None:
    """Measure everything."""
    chosen = arguments(
        __doc__, items=(10_000, 300, "items a run"), rounds=(9, 1, "rounds"), deep=(10_000, 1_000, "inner streams")
    )
    n = chosen.items
    sides = {
        **{name: lambda make=make: cpu_per_item(lambda: ours(make, n), n) for name, (_, make) in OURS.items()},
        **{name: lambda make=make: cpu_per_item(lambda: bare(make, n), n) for name, (_, make) in BARE.items()},
        "tee": lambda: cpu_per_item(lambda: two_branches(n), n),
        "Feed": lambda: cpu_per_item(lambda: fed(n), n),
    }
    over = {name: base for name, (base, _) in {**OURS, **BARE}.items()} | {
        "tee": "from_iterable",
        "Feed": "from_iterable",
    }
    values = interleaved(sides, chosen.rounds)
    for name, totals in values.items():
        base = over[name]
        added = [total - below for total, below in zip(totals, values[base], strict=True)] if base else totals
        report(
            "operators",
            name,
            unit="us_cpu_per_item",
            total=quartiles(totals),
            added=quartiles(added),
            over=base or None,
            items=n,
            rounds=chosen.rounds,
        )
    for name, inner in {
        "own": Now,
        "stock": rx.just,
        "retry_validate": lambda item: TRIES(CHECK(Now(item))),
        "expand": lambda item: LOOP(Now(item)),
    }.items():
        shallow, deep = depth(inner, 100), depth(inner, chosen.deep)
        report(
            "operators",
            f"depth_{name}",
            unit="frames",
            inners=chosen.deep,
            depth=deep,
            depth_of_100=shallow,
            goal="as deep as under 100",
            met=deep == shallow,
        )


if __name__ == "__main__":
    main()
