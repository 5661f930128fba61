"""The gate with every kind of quota, in lanes, over restarts and steps of the clock, judged as a provider would."""

import itertools
import tempfile
from pathlib import Path
from typing import Any, Literal

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from rxllm.errors import CallError, ConfigError
from rxllm.gate import Gate, Lane, Lease, Waiter
from rxllm.policies.accounting import Ending, charge
from rxllm.policies.quota import Quota, Strategy
from rxllm.stores import state
from rxllm.testing import VirtualScheduler

HAIR = 1e-6
ENDINGS: list[Ending] = ["unsent", "refused", "answered", "failed", "timed_out", "cancelled"]


class Provider:
    """One quota as the provider keeps it: all that it ever counted."""

    def __init__(self, quota: Quota) -> None:
        self.quota = quota
        self.log: list[list[float]] = []  # [when, how much]
        self.held: dict[int, float] = {}  # on the wire, of one that counts at the end

    def room(self, now: float) -> float:
        quota = self.quota
        if quota.strategy != "bucket":
            return (
                quota.limit
                - sum(used for at, used in self.log if at > now - quota.per + HAIR)
                - sum(self.held.values())
            )
        level, last = quota.limit, 0.0
        for at, used in self.log:
            level = min(quota.limit, level + (at - last) * quota.limit / quota.per) - used
            last = at
        return min(quota.limit, level + (now - last) * quota.limit / quota.per) - sum(self.held.values())

    def start(self, number: int, amount: float, now: float) -> list[float]:
        if self.quota.charged_at == "end":
            self.held[number] = amount
            return []
        self.log.append([now, amount])
        return self.log[-1]

    def end(self, number: int, entry: list[float], reserved: float, actual: float, now: float) -> None:
        if self.quota.charged_at == "end":
            del self.held[number]
            self.log.append([now, actual])
        elif self.quota.strategy == "bucket" or actual > reserved:
            self.log.append([now, actual - reserved])
        else:
            entry[1] = actual


class Try:
    """An attempt: in the queue, on the wire, or turned away."""

    def __init__(self, machine: "Gates", number: int, cost: dict[str, float], lane: str) -> None:
        self.machine = machine
        self.number = number
        self.cost = cost
        self.lane = lane
        self.waiter: Waiter
        self.lease: Lease | None = None
        self.entries: list[list[float]] = []

    def admitted(self, lease: Lease) -> None:
        machine = self.machine
        now = machine.scheduler.seconds()
        self.lease = lease
        machine.waiting.remove(self)
        machine.on_wire.append(self)
        amounts = [self.cost[provider.quota.unit] for provider in machine.providers]
        for provider, amount in zip(machine.providers, amounts, strict=True):
            assert amount == 0 or amount <= provider.room(now) + HAIR, f"{provider.quota} at {now}"
        self.entries = [
            provider.start(self.number, amount, now)
            for provider, amount in zip(machine.providers, amounts, strict=True)
        ]

    def turned_away(self, error: CallError | ConfigError) -> None:
        assert isinstance(error, ConfigError), "closed for a restart"
        self.machine.waiting.remove(self)


class Gates(RuleBasedStateMachine):
    """No start is ever too much for any of the quotas, however the gate was used, left and begun anew."""

    @initialize(
        strategies=st.lists(st.sampled_from(["sliding", "fixed", "bucket"]), min_size=1, max_size=2),
        charged_at=st.sampled_from(["start", "end"]),
        limit=st.integers(1, 8),
        per=st.sampled_from([0.1, 3.0, 3600.0]),
        concurrency=st.sampled_from([None, 3]),
    )
    def begin(
        self,
        strategies: list[Strategy],
        charged_at: Literal["start", "end"],
        limit: int,
        per: float,
        concurrency: int | None,
    ) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.scheduler = VirtualScheduler()
        self.step = 0.0  # of the wall clock
        self.numbers = itertools.count()
        self.waiting: list[Try] = []
        self.on_wire: list[Try] = []
        units = (("requests", limit), ("tokens", 10 * limit))
        self.quotas = [
            Quota(
                amount,
                per=per,
                unit=unit,
                strategy=strategy,
                margin=0.0,
                charged_at=charged_at,
                state=str(Path(self.folder.name, unit)),
            )
            for strategy, (unit, amount) in zip(strategies, units, strict=False)
        ]
        self.providers = [Provider(quota) for quota in self.quotas]
        self.concurrency = concurrency
        self.kept = state.kept_meter
        state.kept_meter = self.keep  # type: ignore[assignment]
        self.open()

    def keep(self, quota: Quota) -> Any:
        return self.kept(quota, wall=lambda: 1e9 + self.scheduler.seconds() + self.step, boot="one")

    def open(self) -> None:
        self.gate = Gate(*self.quotas, concurrency=self.concurrency)
        self.lanes: dict[str, Lane] = {
            "main": self.gate.main,
            "heavy": self.gate.lane("heavy", weight=3),
            "light": self.gate.lane("light", weight=0.5),
        }

    @rule(
        tokens=st.integers(0, 10),
        lane=st.sampled_from(["main", "heavy", "light"]),
        times=st.integers(1, 4),
    )
    def ask(self, tokens: int, lane: str, times: int) -> None:
        for _ in range(times):
            cost = {"requests": 1.0, "tokens": float(tokens)}
            one = Try(self, next(self.numbers), cost, lane)
            amounts = self.gate.amounts(cost)
            one.waiter = self.gate.apply(self.scheduler, amounts, one, None, self.lanes[lane])
            self.waiting.append(one)
            self.gate.enter(one.waiter)

    @precondition(lambda self: self.on_wire)
    @rule(index=st.integers(0), ending=st.sampled_from(ENDINGS), used=st.none() | st.integers(0, 15))
    def settle(self, index: int, ending: Ending, used: int | None) -> None:
        one = self.on_wire.pop(index % len(self.on_wire))
        said = None if used is None else {"tokens": float(used)}
        assert one.lease is not None
        now = self.scheduler.seconds()
        for provider, entry in zip(self.providers, one.entries, strict=True):
            unit = provider.quota.unit
            actual = charge(ending, unit, one.cost[unit], None if said is None else said.get(unit))
            provider.end(one.number, entry, one.cost[unit], actual, now)
        one.lease.settle(ending, said)
        one.lease.settle(ending, said)  # again is harmless

    @precondition(lambda self: self.waiting)
    @rule(index=st.integers(0))
    def cancel(self, index: int) -> None:
        one = self.waiting.pop(index % len(self.waiting))
        one.waiter.cancel()

    @rule(windows=st.floats(0.0, 1.3))
    def wait(self, windows: float) -> None:
        self.scheduler.run(self.scheduler.seconds() + windows * self.quotas[0].per)

    @rule(seconds=st.sampled_from([-86_400.0, -1.0, 1.0, 86_400.0]))
    def step_the_clock(self, seconds: float) -> None:
        self.step += seconds

    @rule()
    def restart(self) -> None:
        """Begin anew, with what the files tell; what was on the wire is lost, and the provider has counted it."""
        self.scheduler.run(self.scheduler.seconds())  # what is written in the next turn is written
        now = self.scheduler.seconds()
        for one in self.on_wire:
            for provider, entry in zip(self.providers, one.entries, strict=True):
                unit = provider.quota.unit
                provider.end(one.number, entry, one.cost[unit], one.cost[unit], now)
        self.on_wire.clear()
        self.gate.close()
        assert not self.waiting
        self.open()

    @invariant()
    def the_counts_are_right(self) -> None:
        if not hasattr(self, "gate"):
            return
        told = self.gate.statistics()
        assert (told.in_flight, told.waiting) == (len(self.on_wire), len(self.waiting))
        assert sum(lane.waiting for lane in told.lanes) == told.waiting
        assert self.concurrency is None or told.in_flight <= self.concurrency

    def teardown(self) -> None:
        """All that wait get their turn, once the others have ended."""
        if not hasattr(self, "gate"):
            return
        try:
            for _ in range(1000):
                if not self.waiting and not self.on_wire:
                    break
                while self.on_wire:
                    self.settle(0, "answered", None)
                self.wait(1.01)
            assert not self.waiting, "somebody waits for ever"
            self.gate.close()
        finally:
            state.kept_meter = self.kept
            self.folder.cleanup()


TestGates = Gates.TestCase
TestGates.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
