"""What does it cost to pass the gate?

Question: how much CPU does a request cost at a gate with a quota of requests and one of tokens: admission, booking,
and settlement to what was really used?
Unit: µs of CPU a request; `share` is that by the CPU of a request in the plain loop over aiohttp. First quartile,
median, third.
Baseline: the plain loop (`json=`, `r.json()`, default session), 64 at a time, of the same run, round by round; and for
the case `queued`, where each request waits in the queue first because all 64 places are taken, the same loop. What the
benchmark itself costs (`harness`: the same with a gate that does nothing) is taken off.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from typing import TYPE_CHECKING, Any

from _bench import LIMIT, arguments, cpu_per_item, interleaved, quartiles, report
from _http import TOKENS, Bare

import rxllm
from rxllm.runtime import background
from rxllm.testing import SimulatedProvider

if TYPE_CHECKING:
    from rxllm.errors import ConfigError
    from rxllm.gate import Lease

GOAL = 0.05
LATENCY = 0.004  # seconds
WIDTH = 64
QUOTAS = ("100_000_000 requests/minute", "100_000_000_000 tokens/minute")  # never reached, always counted
COST = {"requests": 1, "tokens": 30 + TOKENS, "input_tokens": 30, "output_tokens": TOKENS}
BATCH = 8
USED = {"tokens": 55, "input_tokens": 30, "output_tokens": 25}


class Open:
    """A gate that does nothing, to see what is left without one; and its own lease."""

    def amounts(self, _cost: object) -> tuple[float, ...]:
        """Return none."""
        return ()

    def apply(self, _clock: object, _amounts: object, wire: Wire) -> Wire:
        """Return who applies."""
        return wire

    def enter(self, wire: Wire) -> None:
        """Admit."""
        wire.admitted(self)

    def settle(self, _ending: object, _used: object) -> None:
        """Forget."""


class Wire:
    """Enters requests at a gate, eight in each turn of the loop, and settles the oldest of those that are out."""

    def __init__(self, gate: Any, count: int, most: int) -> None:
        self.gate = gate
        self.clock = background()
        self.count = count
        self.most = most  # that have entered and are not settled
        self.entered = self.admissions = self.settled = 0
        self.leases: deque[Lease | Open] = deque()
        self.spent = 0.0
        self.error: BaseException | None = None
        self.done = threading.Event()

    def admitted(self, lease: Lease | Open) -> None:
        """Keep the lease."""
        self.admissions += 1
        self.leases.append(lease)

    def turned_away(self, error: ConfigError) -> None:
        """Fail: the gate stays open."""
        raise error

    def run(self) -> float:
        """Pass all through the gate, on the loop thread; return µs of CPU a request."""
        self.clock.post(self.turn)
        assert self.done.wait(LIMIT), f"{self.settled:,} of {self.count:,} settled"
        if self.error is not None:
            raise self.error
        assert self.admissions == self.settled == self.count
        return self.spent / self.count * 1e6

    def turn(self) -> None:
        """Do a little, and go on in the next turn."""
        if not self.entered:
            self.spent = -time.thread_time()
        try:
            self.step()
        except BaseException as error:
            self.error = error
            self.done.set()
            raise
        if self.settled < self.count:
            self.clock.call_soon(self.turn)
        else:
            self.spent += time.thread_time()
            self.done.set()

    def step(self) -> None:
        """Settle as many as are due, and let new ones enter in their place."""
        gate, clock = self.gate, self.clock
        due = BATCH if self.entered - self.settled >= self.most or self.entered == self.count else 0
        for _ in range(min(due, len(self.leases))):
            self.leases.popleft().settle("answered", USED)
            self.settled += 1
        for _ in range(min(BATCH, self.count - self.entered, self.most - self.entered + self.settled)):
            gate.enter(gate.apply(clock, gate.amounts(COST), self))
            self.entered += 1


def main() -> None:
    """Measure both cases."""
    chosen = arguments(
        __doc__,
        admissions=(50_000, 500, "admissions a round"),
        requests=(5_000, 100, "requests a round of the plain loop"),
        rounds=(9, 1, "rounds"),
    )
    n = chosen.requests
    with SimulatedProvider(latency=LATENCY).start() as provider, Bare(provider.url, tuned=False, width=WIDTH) as plain:
        values = interleaved(
            {
                "harness": lambda: Wire(Open(), chosen.admissions, WIDTH).run(),
                "free": lambda: Wire(rxllm.Gate(*QUOTAS), chosen.admissions, WIDTH).run(),
                "queued": lambda: Wire(rxllm.Gate(*QUOTAS, concurrency=WIDTH), chosen.admissions, 2 * WIDTH).run(),
                "plain": lambda: cpu_per_item(lambda: plain.run(n), n),
            },
            chosen.rounds,
        )
    for case in ("free", "queued"):
        cost = [mine - harness for mine, harness in zip(values[case], values["harness"], strict=True)]
        share = quartiles(mine / other for mine, other in zip(cost, values["plain"], strict=True))
        report(
            "admission",
            case,
            unit="us_cpu_per_request",
            admission=quartiles(cost, 2),
            harness=quartiles(values["harness"], 2),
            plain=quartiles(values["plain"], 1),
            share=share,
            admissions=chosen.admissions,
            requests=n,
            rounds=chosen.rounds,
            goal=GOAL,
            met=share[1] <= GOAL,
        )


if __name__ == "__main__":
    main()
