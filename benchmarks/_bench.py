"""What the benchmarks share: rounds, quartiles, resident memory, cheap inner streams, one JSON line per case."""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import reactivex as rx

from rxllm.demand import Demand, DemandScheduler, Flow
from rxllm.runtime import background
from rxllm.stream import Stream, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from rxllm.demand import Disposable, Observer

LIMIT = 120.0  # seconds after which a run that does not end is a failure, not a figure


def arguments(description: str | None, **sizes: tuple[int, int, str]) -> argparse.Namespace:
    """Parse the command line: each size has a default, a value for `--tiny`, and a meaning."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="run in a second: checks that it works, measures nothing")
    for name, (full, tiny, meaning) in sizes.items():
        parser.add_argument(f"--{name}", type=int, metavar="N", help=f"{meaning}; default {full:,}, tiny {tiny:,}")
    chosen = parser.parse_args()
    for name, (full, tiny, _meaning) in sizes.items():
        if getattr(chosen, name) is None:
            setattr(chosen, name, tiny if chosen.tiny else full)
    return chosen


def interleaved(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Run every side once in each round, beginning with another side each time; return the values of each.

    A round before the first warms up and does not count.
    """
    names = list(sides)
    values: dict[str, list[float]] = {name: [] for name in names}
    for number in range(-1, rounds):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            gc.collect()
            value = sides[name]()
            if number >= 0:
                values[name].append(value)
    return values


def quartiles(values: Iterable[float], digits: int = 3) -> list[float]:
    """Return the first quartile, the median and the third."""
    ordered = list(values)
    if len(ordered) == 1:
        ordered *= 2
    return [round(value, digits) for value in statistics.quantiles(ordered, n=4, method="inclusive")]


def report(benchmark: str, case: str, *, unit: str, **fields: Any) -> None:
    """Print one case as a JSON line."""
    loop = type(background().loop).__module__.partition(".")[0]
    python = ".".join(map(str, sys.version_info[:3]))
    line = {"benchmark": benchmark, "case": case, "unit": unit, **fields, "loop": loop, "python": python}
    print(json.dumps(line), flush=True)


def resident_mb() -> float:
    """Return the resident memory of this process in MB (10^6 bytes), garbage collected first."""
    gc.collect()
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024 / 1e6
    msg = "no VmRSS in /proc/self/status: this benchmark needs Linux"
    raise SystemExit(msg)


class Drain(Demand):
    """The cheapest consumer inside the loop: it always has room for `size` items and only counts them."""

    __slots__ = ("count", "done", "error", "size")

    def __init__(self, size: int) -> None:
        super().__init__(background(), Flow(self._failed))
        self.size = size
        self.count = 0
        self.done = threading.Event()
        self.error: BaseException | None = None

    def room(self) -> int:
        """Return as much as ever."""
        return self.size

    def on_next(self, _value: object) -> None:
        """Count."""
        self.arrived += 1
        self.count += 1

    def on_error(self, error: Exception) -> None:
        """Note the error."""
        self._failed(error)

    def on_completed(self) -> None:
        """Say that it is over."""
        self.done.set()

    def _failed(self, error: BaseException) -> None:
        self.error = error
        self.done.set()

    def connect(self, source: rx.Observable[Any]) -> None:
        """Subscribe from any thread, on the loop thread, with this demand."""
        self._begin(lambda: subscribe(source, self, DemandScheduler(self.clock, self, self.flow)))

    def connect_stock(self, source: rx.Observable[Any]) -> None:
        """Subscribe from any thread, on the loop thread, with the stock scheduler and no demand."""
        scheduler = self.clock.scheduler
        self._begin(lambda: source.subscribe(self.on_next, self.on_error, self.on_completed, scheduler=scheduler))

    def _begin(self, subscribing: Callable[[], object]) -> None:
        def begin() -> None:
            try:
                subscribing()
            except BaseException as error:
                self._failed(error)
                raise

        self.clock.post(begin)

    def join(self) -> int:
        """Block until the stream has ended; return how many items it had."""
        if not self.done.wait(LIMIT):
            msg = f"no end after {LIMIT:.0f} s and {self.count:,} items"
            raise SystemExit(msg)
        if self.error is not None:
            raise self.error
        return self.count


def cpu_per_item(run: Callable[[], int], expected: int) -> float:
    """Run, check that nothing was lost or repeated, and return µs of CPU an item, over all threads."""
    start = time.process_time()
    count = run()
    spent = time.process_time() - start
    assert count == expected, f"{count:,} of {expected:,} items"
    return spent / expected * 1e6


class Now(Stream[Any]):
    """An inner stream that answers before its subscription returns: a cache hit."""

    def __init__(self, value: object) -> None:
        self.value = value

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:  # noqa: ARG002  needs no time
        answer = Answer(observer, self.value)
        answer.give()
        return answer


class NextTurn(Stream[Any]):
    """An inner stream that answers in the next turn of the loop: the cheapest asynchronous one."""

    def __init__(self, value: object) -> None:
        self.value = value

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        answer = Answer(observer, self.value)
        carrier.call_soon(answer.give)
        return answer


class Later(Stream[Any]):
    """An inner stream that answers after `delay` seconds."""

    def __init__(self, value: object, delay: float) -> None:
        self.value = value
        self.delay = delay

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        answer = Answer(observer, self.value)
        carrier.call_later(self.delay, answer.give)
        return answer


class Answer:
    """One subscription of an inner stream."""

    __slots__ = ("_observer", "_value")

    def __init__(self, observer: Observer[Any], value: object) -> None:
        self._observer: Observer[Any] | None = observer
        self._value = value

    def give(self) -> None:
        """Emit the value and complete, unless disposed."""
        observer = self._observer
        if observer is not None:
            observer.on_next(self._value)
            observer.on_completed()

    def dispose(self) -> None:
        """Emit nothing."""
        self._observer = None


def stock_next_turn(value: object) -> rx.Observable[Any]:
    """Return `NextTurn` as a stock observable."""

    def begin(observer: rx.abc.ObserverBase[Any], _scheduler: rx.abc.SchedulerBase | None = None) -> Answer:
        answer = Answer(observer, value)
        background().call_soon(answer.give)
        return answer

    return rx.create(begin)
