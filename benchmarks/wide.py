"""How wide can it be?

Question: does a pipeline keep as many requests in flight as it is told to, and does its throughput keep up?
Unit: requests a second, from the first request to the last answer, over new connections; `share` is ours by the
other's, round by round. First quartile, median, third.
Baseline: the tuned loop over aiohttp (no timeouts, no limit of connections) at the same width, in the same run, with a
server of its own. `seen` is the most that the server counted in flight at once, the least of all rounds: it must be
the full width.

The server is another process; an answer takes 2 s up to 1,024 in flight and 10 s above. Each connection is a file
descriptor in both processes, so both raise their limit; a width that the system does not allow is reported as missing.
"""

from __future__ import annotations

import resource
import time
from typing import TYPE_CHECKING, Any

from _bench import arguments, interleaved, quartiles, report
from _http import MODEL, Bare, requests

import rxllm
from rxllm.testing import SimulatedProvider

if TYPE_CHECKING:
    from collections.abc import Callable

GOAL = 0.95
WIDTHS = (64, 256, 1_024, 4_096, 10_000)
TINY = (32,)
UNIT = "requests_per_second"
LARGE = 1_024  # above it an answer takes longer
SPARE = 200  # file descriptors for everything else


def allowed() -> int:
    """Raise the limit of file descriptors as far as it goes; return how many connections that allows."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard - SPARE if hard != resource.RLIM_INFINITY else 1_000_000


def ours(url: str, width: int, count: int) -> int:
    """Run the pipeline; return how many were answered."""
    good = 0
    with rxllm.OpenAI(MODEL, url, api_key="any") as client:
        gate = rxllm.Gate("100_000_000/minute", "100_000_000_000 tokens/minute", concurrency=width)
        stage = rxllm.call(client, gate=gate, validate=lambda reply: bool(reply.text))
        with rxllm.iterate(rxllm.from_iterable(requests(count)).pipe(stage)) as outcomes:
            for outcome in outcomes:
                good += outcome.ok
    return good


def tuned(url: str, width: int, count: int) -> int:
    """Run the tuned loop; return how many were answered."""
    with Bare(url, tuned=True, width=width) as bare:
        return bare.run(count)


def per_second(run: Callable[[str, int, int], int], width: int, chosen: Any, seen: list[int]) -> float:
    """Run against a new server; return the throughput, and note the most it had in flight."""
    latency = 0.05 if chosen.tiny else 2.0 if width <= LARGE else 10.0
    count: int = width * chosen.waves
    with SimulatedProvider(latency=latency).start() as provider:
        start = time.perf_counter()
        good = run(provider.url, width, count)
        seconds = time.perf_counter() - start
        seen.append(provider.statistics().max_in_flight)
    assert good == count, f"{good:,} of {count:,} answered"
    return count / seconds


def measure(width: int, chosen: Any) -> None:
    """Measure one width."""
    seen: dict[str, list[int]] = {"ours": [], "tuned": []}
    values = interleaved(
        {
            "ours": lambda: per_second(ours, width, chosen, seen["ours"]),
            "tuned": lambda: per_second(tuned, width, chosen, seen["tuned"]),
        },
        chosen.rounds,
    )
    share = quartiles(mine / other for mine, other in zip(values["ours"], values["tuned"], strict=True))
    report(
        "wide",
        f"{width}_in_flight",
        unit=UNIT,
        ours=quartiles(values["ours"], 1),
        tuned=quartiles(values["tuned"], 1),
        share=share,
        seen=min(seen["ours"]),
        seen_of_tuned=min(seen["tuned"]),
        requests=width * chosen.waves,
        rounds=chosen.rounds,
        goal=f"share >= {GOAL}, the server sees the full width",
        met=share[1] >= GOAL and min(seen["ours"]) == width,
    )


def main() -> None:
    """Measure each width that the system allows."""
    chosen = arguments(__doc__, waves=(3, 2, "requests by width"), rounds=(1, 1, "rounds after the first"))
    most = allowed()
    for width in TINY if chosen.tiny else WIDTHS:
        if width <= most:
            measure(width, chosen)
        else:
            report(
                "wide", f"{width}_in_flight", unit=UNIT, missing=f"only {most:,} file descriptors", goal=GOAL, met=None
            )


if __name__ == "__main__":
    main()
