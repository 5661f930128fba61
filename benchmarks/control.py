"""Which controller finds a server's rate and width by itself, and keeps them?

Question: with an endless backlog and a server whose limits nobody states, what share of its capacity does a controller
use, how much is refused, how long does it take to get there and to follow a change, and how much slower are answers?
Unit: share of the capacity and of the arrivals, seconds, and a ratio of medians; `_lab_judge` defines each figure.
Median and worst of the seeds; a figure meets its goal if the median does.
Baselines: an oracle that knows the server, fixed limits, and the plainest AIMD. A goal that the oracle misses becomes
0.97 of what the oracle reaches.

The gate with its loop, the back-off and the controllers are real; the servers are synthetic, the time is virtual
(`_lab`). The random numbers of a run come from a digest of the scenario's name and the number of the run. A controller
is whatever `Gate(concurrency=...)` takes. `control_http.py` has four of the servers over HTTP.

    control.py                                   the table: every scenario and controller, in two processes
    control.py --quick                           a part of it, one seed: for CI
    control.py --scenario bucket_30 --controller pace_and_follow --seeds 1 --picture DIR
    control.py --controller my_module:MyController --random 50 --salt monday

JSON lines go to standard output, a table to standard error.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
from _bench import report
from _lab import Scenario, run
from _lab_controllers import DEFAULT, find
from _lab_judge import HIGH, figures, goals, meets, summary
from _lab_scenarios import QUICK, chosen, random_scenario

if TYPE_CHECKING:
    from collections.abc import Iterator

    Found = dict[tuple[str, str], list["Result"]]  # scenario, controller -> one result for each seed
    Worst = dict[tuple[str, str, str], tuple[float, str]]  # controller, figure, of medians or runs -> value, scenario

SPEED = 20_000  # simulated attempts per CPU second, at least
SEEDS = 5
UNIT = "share_seconds_or_ratio"
COLUMNS = ("share", "least", "refused", "refused_all", "rise_90", "after_drop", "after_rise", "p50_ratio")
TINY = ("bucket_30", "two_clients_ceiling_64")
SHORTENED = 150.0  # seconds of a tiny run


class Task(NamedTuple):
    """One run."""

    scenario: Scenario
    controller: str
    number: int
    picture: Path | None


class Result(NamedTuple):
    """What came of it."""

    figures: dict[str, float]
    attempts: int
    cpu: float


def measure(task: Task) -> Result:
    """Run one scenario with one controller, and judge it."""
    make = find(task.controller)
    assert make is not None
    trace = run(task.scenario, make, task.number)
    if task.picture is not None:
        from _lab_picture import draw  # noqa: PLC0415  matplotlib takes a second

        name = f"{task.scenario.name}_{task.controller.replace(':', '.')}"
        draw(trace, f"{task.scenario.name}: {task.controller}", task.picture / f"{name}.png")
    return Result(figures(trace), trace.attempts, trace.cpu)


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="run in seconds: checks that it works, measures little")
    parser.add_argument("--quick", action="store_true", help=f"one seed of {', '.join(QUICK)}")
    parser.add_argument("--scenario", action="append", default=[], metavar="NAME", help="only this; may be repeated")
    parser.add_argument(
        "--controller",
        action="append",
        default=[],
        metavar="NAME",
        help=f"only this; may be repeated; default {', '.join(DEFAULT)}; also fixed_<n> and module:factory",
    )
    parser.add_argument("--seeds", type=int, metavar="N", help=f"runs of each scenario; default {SEEDS}")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="instead: N random scenarios, one run each")
    parser.add_argument("--salt", default="", metavar="WORD", help="other random scenarios")
    parser.add_argument("--picture", type=Path, metavar="DIR", help="write a PNG of the first run of each")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes; default 2")
    given = parser.parse_args()
    for name, value, least in (("--seeds", given.seeds, 1), ("--random", given.random, 0), ("--jobs", given.jobs, 1)):
        if value is not None and value < least:
            parser.error(f"{name} must be at least {least}, got {value}")
    return given


def worlds(given: argparse.Namespace) -> list[Scenario]:
    """Return the scenarios that are asked for."""
    if given.random:
        return [random_scenario(number, given.salt) for number in range(given.random)]
    if given.tiny:
        return [msgspec.structs.replace(scenario, seconds=SHORTENED) for scenario in chosen(TINY)]
    return chosen(given.scenario or (QUICK if given.quick else ()))


def contenders(given: argparse.Namespace) -> list[str]:
    """Return the controllers that are asked for and exist; the oracle is always one, because goals depend on it."""
    found: list[str] = []
    for name in [*(given.controller or DEFAULT), "oracle"]:
        if name in found:
            continue
        if find(name) is not None:
            found.append(name)
        elif not given.tiny:
            print(f"{name}: rxllm has no such controller yet, skipped", file=sys.stderr)
    return found


def tasks(given: argparse.Namespace, scenarios: list[Scenario], controllers: list[str]) -> Iterator[Task]:
    """Yield all runs, the first of each with its picture."""
    seeds = 1 if given.random or given.tiny or given.quick else SEEDS
    seeds = seeds if given.seeds is None else given.seeds
    for scenario in scenarios:
        for controller in controllers:
            for number in range(seeds):
                yield Task(scenario, controller, number, None if number else given.picture)


def measured(todo: list[Task], jobs: int) -> Found:
    """Run all; with one job in this process."""
    found: Found = defaultdict(list)
    if jobs == 1:
        for task in todo:
            found[task.scenario.name, task.controller].append(measure(task))
        return found
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for task, result in zip(todo, pool.map(measure, todo), strict=True):
            found[task.scenario.name, task.controller].append(result)
    return found


def column(name: str, middle: float, worst: float, goal: float | None) -> dict[str, Any]:
    """Return one figure for a JSON line; what never came is null."""
    found: dict[str, Any] = {"median": _number(middle), "worst": _number(worst)}
    if goal is not None:
        found |= {"goal": _number(goal), "met": meets(name, middle, goal)}
    return found


def _number(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def tell(scenarios: list[Scenario], controllers: list[str], found: Found, given: argparse.Namespace) -> None:
    """Report each scenario with each controller, then the worst of each controller, then the speed."""
    worst: Worst = {}
    kept: dict[str, list[bool]] = defaultdict(list)
    lines: list[tuple[str, str, dict[str, dict[str, Any]]]] = []
    for scenario in scenarios:
        known = found[scenario.name, "oracle"]
        aims = goals(scenario, {name: middle for name, (middle, _) in summary([one.figures for one in known]).items()})
        for controller in controllers:
            results = found[scenario.name, controller]
            facts = summary([one.figures for one in results])
            fields = {name: column(name, *pair, aims.get(name)) for name, pair in facts.items()}
            met = all(field["met"] for field in fields.values() if "met" in field)
            kept[controller].append(met)
            case = f"{scenario.name}/{controller}"
            report("control", case, unit=UNIT, **fields, met=met, seeds=len(results))
            lines.append((scenario.name, controller, fields))
            for name, pair in facts.items():
                for which, value in zip(("median", "worst"), pair, strict=True):
                    before = worst.get((controller, name, which))
                    if before is None or not meets(name, value, before[0]):
                        worst[controller, name, which] = (value, scenario.name)
    for controller, kept_in in kept.items():
        least: dict[str, dict[str, Any]] = defaultdict(dict)
        for (who, name, which), (value, where) in worst.items():
            if who == controller:
                least[name] |= {which: _number(value), f"{which}_in": where}
        case = f"worst/{controller}"
        report("control", case, unit=UNIT, **least, all_goals_met_in=sum(kept_in), of=len(scenarios))
    results = [one for many in found.values() for one in many]
    attempts, cpu = sum(one.attempts for one in results), sum(one.cpu for one in results)
    speed = {"value": round(attempts / cpu), "goal": SPEED, "met": attempts >= SPEED * cpu}
    report("control", "speed", unit="attempts_per_cpu_second", **speed, attempts=attempts, cpu_seconds=round(cpu, 1))
    if not given.tiny:
        table(lines, worst, kept)


def table(
    lines: list[tuple[str, str, dict[str, dict[str, Any]]]],
    worst: Worst,
    kept: dict[str, list[bool]],
) -> None:
    """Print for a person: medians and the worst of the seeds; what misses its goal has an exclamation mark."""
    out = sys.stderr
    print(f"\n{'':42}" + "".join(f"{name:>16}" for name in COLUMNS), file=out)
    last = ""
    for scenario, controller, fields in lines:
        cells = [_cell(name, fields.get(name)) for name in COLUMNS]
        print(
            f"{scenario if scenario != last else '':26}{controller:16}" + "".join(f"{cell:>16}" for cell in cells),
            file=out,
        )
        last = scenario
    print("\nthe worst of each column, and where: of the medians, of the runs", file=out)
    for controller, met in kept.items():
        print(f"{controller}: all goals met in {sum(met)} of {len(met)}", file=out)
        for name in COLUMNS:
            if (controller, name, "median") in worst:
                cells = [
                    f"{_text(name, value):>8}  {where:28}"
                    for value, where in (worst[controller, name, which] for which in ("median", "worst"))
                ]
                print(f"    {name:12}" + "".join(cells).rstrip(), file=out)


def _cell(name: str, field: dict[str, Any] | None) -> str:
    if field is None:
        return ""
    values = [math.inf if field[key] is None else field[key] for key in ("median", "worst")]
    texts = [_text(name, value) for value in values]
    return ("" if field.get("met", True) else "!") + (texts[0] if texts[0] == texts[1] else " ".join(texts))


def _text(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "never"
    if name in ("refused", "refused_all", *HIGH):
        return f"{value:.1%}"
    return f"{value:.2f}" if name == "p50_ratio" else f"{value:.0f}s"


def main() -> None:
    """Measure and tell."""
    given = arguments()
    if given.picture is not None:
        given.picture.mkdir(parents=True, exist_ok=True)
    scenarios, controllers = worlds(given), contenders(given)
    began = time.monotonic()
    found = measured(list(tasks(given, scenarios, controllers)), 1 if given.tiny else given.jobs)
    tell(scenarios, controllers, found, given)
    if not given.tiny:
        print(f"\n{time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
