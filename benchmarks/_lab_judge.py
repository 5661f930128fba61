"""What the lab makes of a run. All figures come from the server's log, in rows of half a second.

capacity      of each half second, in the unit that binds then: requests or tokens a second of a quota, or places, the
              smaller of ceiling and knee. What is used of it: requests or tokens of accepted starts, or the seconds
              that accepted requests were served at full speed. Phases in which the server is down count nowhere.
share         used by capacity, after the first 60 s (of the last client that began); of scenarios in which another
              unit binds later, the mean of the shares of each unit, by time. A bucket that was not emptied before may
              give more than 1.
refused       429, 503 and 529 answers by all arrivals, after the first 60 s.
refused_all   the same over the whole run.
rise_90       seconds until the first 10 s begin in which 90 % of the capacity is used.
after_drop    seconds from a cut of the capacity in requests until the first 10 s begin in which what is used is within
              10 % of the capacity and at most 10 % of the arrivals are refused: without the second, a controller that
              ignores the cut would pass. The slowest of the cuts of the run.
after_rise    the same after the capacity grows or comes back (a cold server: after it is warm), or answers become
              longer and the same rate needs more width.
p50_ratio     median seconds in service of good answers accepted in a phase, after the first 60 s, by the median of the
              same server at 80 % of its capacity, with arrivals at random: `unhurried`. The worst of the phases.
least         share of the capacity that the weaker of several clients got.
failed        requests given up, by those that ended; it has no goal.

Infinity: it never came to that within the phase.
"""

from __future__ import annotations

import functools
import math
import random
import statistics
from collections import defaultdict
from typing import TYPE_CHECKING, Final, NamedTuple

from _lab import TICK, Latency, Phase, Row, Scenario, Server, Trace

from rxllm.testing import VirtualScheduler

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from _lab import Unit

    from rxllm.messages import Kind

WARM: Final = 60.0  # seconds
HOLD: Final = 10.0  # seconds that a state must last
NEAR: Final = 0.1  # of the capacity
LEAST: Final = 60.0  # seconds of a phase for a median of it to mean something
HIGH: Final = ("share", "least")  # the more the better; of all others the less

# What every controller is to reach; where the oracle does not, see `goals`.
SHARE: Final = 0.97
SHARE_OF_TWO: Final = 0.95
LEAST_OF_TWO: Final = 0.35
REFUSED: Final = 0.02
RISE: Final = (20.0, 5.0)  # seconds, mean service times
AFTER_DROP: Final = 15.0  # seconds
AFTER_RISE: Final = (30.0, 5.0)  # seconds, mean service times
P50: Final = 1.5
OF_ORACLE: Final = 0.97
CALM: Final = 0.8  # of the capacity
CALLS: Final = 10_000  # to see how long they take


class Bin(NamedTuple):
    """Half a second: what was used, and what there was."""

    at: float
    unit: Unit
    used: float
    capacity: float
    refused: int
    arrivals: int
    down: bool


def bins(trace: Trace) -> list[Bin]:
    """Return the run in half seconds."""
    found: list[Bin] = []
    phases = trace.scenario.phases
    number = 0
    for before, row in zip(trace.rows, trace.rows[1:], strict=False):
        while number + 1 < len(phases) and phases[number + 1].at <= before.at:
            number += 1
        phase = phases[number]
        unit, capacity = phase.capacity(before.at)
        used = _amount(row, unit) - _amount(before, unit)
        refused, arrivals = row.refused - before.refused, row.arrivals - before.arrivals
        found.append(Bin(before.at, unit, used, capacity * (row.at - before.at), refused, arrivals, phase.down))
    return found


def _amount(row: Row, unit: Unit) -> float:
    if unit == "places":
        return row.places
    return row.tokens if unit == "tokens" else row.requests


def figures(trace: Trace) -> dict[str, float]:
    """Return the figures of a run, by name; those that the scenario does not have are missing."""
    scenario = trace.scenario
    every = [one for one in bins(trace) if not one.down]
    warm = [one for one in every if one.at >= max(scenario.starts) + WARM]
    found = {
        "share": share(warm),
        "refused": _ratio(warm),
        "refused_all": _ratio(every),
        "rise_90": _from(every, 0.0, _end(scenario, 0), lambda used, _refused: used >= 1 - NEAR),
    }
    for name, numbers in changes(scenario).items():
        if numbers:
            found[name] = max(settled(every, scenario, number) for number in numbers)
    ratios = [
        statistics.median(times) / unhurried(phase)
        for number, phase in enumerate(scenario.phases)
        if not phase.down and _end(scenario, number) - max(phase.at, WARM) >= LEAST
        if (times := [seconds for at, seconds in trace.answered[number] if at >= WARM])
    ]
    found["p50_ratio"] = max(ratios, default=math.inf)
    if len(scenario.starts) > 1:
        found["least"] = min(trace.of_clients) * found["share"]
    found["failed"] = trace.failed / max(1, trace.ended)
    return found


def unhurried(phase: Phase) -> float:
    """Return the median seconds in service of a warm server that is used to 80 % of its capacity."""
    if phase.knee is None:
        return phase.latency.median
    busy = CALM * phase.rate(phase.at + phase.cold) * phase.latency.mean / phase.knee
    return phase.latency.median * slowdown(phase.knee, busy, phase.latency.sigma)


@functools.cache
def slowdown(knee: int, busy: float, sigma: float) -> float:
    """Return how much longer the median request takes than alone, with arrivals at random: measured on the server.

    Args:
        knee: requests that it serves at full speed.
        busy: the work that comes, by what it can do; below 1.
        sigma: of the latency.
    """
    work = Latency(1.0, sigma)
    scenario = Scenario(name="calm", phases=(Phase(knee=knee, latency=work),), path=0.0)
    clock, draws = VirtualScheduler(), random.Random(0)
    server = Server(scenario, clock, draws)
    at = 0.0
    for _ in range(CALLS):
        at += draws.expovariate(busy * knee / work.mean)
        clock.call_later(at, functools.partial(server.send, _Call(draws.gauss(0.0, 1.0))))
    clock.run()
    return statistics.median(seconds for _, seconds in server.answered[0])


class _Call:
    """An attempt whose answer nobody waits for."""

    __slots__ = ("accepted", "client", "draw", "work")

    def __init__(self, draw: float) -> None:
        self.client = 0
        self.draw = draw
        self.accepted = self.work = 0.0

    def answered(self, kind: Kind, retry_after: float | None) -> None:
        """Learn nothing."""


def share(of: Iterable[Bin]) -> float:
    """Return what part of the capacity was used; of several units the mean by time."""
    sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for one in of:
        row = sums[one.unit]
        row[0] += one.used
        row[1] += one.capacity
        row[2] += 1
    total = sum(count for *_, count in sums.values())
    return sum(used / capacity * count for used, capacity, count in sums.values()) / total


def _ratio(of: Sequence[Bin]) -> float:
    return sum(one.refused for one in of) / max(1, sum(one.arrivals for one in of))


def changes(scenario: Scenario) -> dict[str, list[int]]:
    """Return the phases with which the capacity falls, and those with which it grows, by the name of the figure."""
    found: dict[str, list[int]] = {"after_drop": [], "after_rise": []}
    for number, (before, phase) in enumerate(zip(scenario.phases, scenario.phases[1:], strict=False), 1):
        then, now = before.rate(phase.at), phase.rate(phase.at + phase.cold)
        if phase.down:
            continue
        if now < (1 - NEAR) * then:
            found["after_drop"].append(number)
        elif now * (1 - NEAR) > then or phase.latency.mean * (1 - NEAR) > before.latency.mean:
            found["after_rise"].append(number)
    return found


def settled(every: Sequence[Bin], scenario: Scenario, number: int) -> float:
    """Return the seconds until a controller has followed a change."""
    phase = scenario.phases[number]
    return _from(
        every,
        phase.at + phase.cold,
        _end(scenario, number),
        lambda used, refused: abs(used - 1) <= NEAR and refused <= NEAR,
    )


def _from(every: Sequence[Bin], start: float, end: float, is_good: Callable[[float, float], bool]) -> float:
    """Return the seconds until the first `HOLD` seconds begin, all before `end`, whose share and refusals are good."""
    length = round(HOLD / TICK)
    rows = [one for one in every if start <= one.at < end]
    for first in range(len(rows) - length + 1):
        part = rows[first : first + length]
        if is_good(sum(one.used for one in part) / sum(one.capacity for one in part), _ratio(part)):
            return part[0].at - start
    return math.inf


def _end(scenario: Scenario, number: int) -> float:
    later = scenario.phases[number + 1 :]
    return later[0].at if later else scenario.seconds


def goals(scenario: Scenario, oracle: dict[str, float] | None) -> dict[str, float]:
    """Return the goals; one that the oracle misses becomes 0.97 of what it reaches.

    Args:
        scenario: what was run.
        oracle: the medians of its figures; None: not run.
    """
    several = len(scenario.starts) > 1

    def longest(limits: tuple[float, float], numbers: Iterable[int]) -> float:
        return max(limits[0], limits[1] * max(scenario.phases[number].latency.mean for number in numbers))

    found = {
        "share": SHARE_OF_TWO if several else SHARE,
        "refused": REFUSED,
        "refused_all": REFUSED,
        "rise_90": longest(RISE, [0]),
        "p50_ratio": P50,
    }
    if several:
        found["least"] = LEAST_OF_TWO
    numbers = changes(scenario)
    if numbers["after_drop"]:
        found["after_drop"] = AFTER_DROP
    if numbers["after_rise"]:
        found["after_rise"] = longest(AFTER_RISE, numbers["after_rise"])
    if oracle is None:
        return found
    return {name: _within_reach(name, goal, oracle[name]) for name, goal in found.items()}


def _within_reach(name: str, goal: float, reached: float) -> float:
    if meets(name, reached, goal):
        return goal
    return OF_ORACLE * reached if name in HIGH else reached / OF_ORACLE


def meets(name: str, value: float, goal: float) -> bool:
    """Say whether a figure is good enough."""
    return value >= goal if name in HIGH else value <= goal


def summary(runs: Sequence[dict[str, float]]) -> dict[str, tuple[float, float]]:
    """Return the median and the worst of each figure over the runs of a scenario."""
    return {
        name: (statistics.median(values), min(values) if name in HIGH else max(values))
        for name in runs[0]
        if (values := [one[name] for one in runs])
    }
