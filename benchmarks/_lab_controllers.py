"""Who is judged: the library's controllers as far as they are there, fixed limits, a plain AIMD, and an oracle."""

from __future__ import annotations

import importlib
import math
from typing import TYPE_CHECKING, Final

from rxllm.messages import Setting, Signal

if TYPE_CHECKING:
    from collections.abc import Callable

    from _lab import Phase, Scenario, Server

    from rxllm.feedback import Controller
    from rxllm.policies.control import Machine
    from rxllm.testing._quotas import Limiter

    Make = Callable[[Scenario, Server, int], Machine | Controller]

STEP: Final = 0.5  # seconds between two looks of the oracle at a server that changes by itself
AHEAD: Final = 0.001  # of the rate: two starts that come together by rounding


class Fixed:
    """A limit that nothing changes."""

    due = None

    def __init__(self, limit: int) -> None:
        self.initial = Setting(limit=limit, rate=None, reason="fixed")

    def on_signal(self, signal: Signal) -> None:
        """Learn nothing."""

    def on_timer(self, now: float) -> None:
        """Be never called."""


class AimdPerReply:
    """The plainest AIMD on the number in flight: a bit more for each good answer, a tenth less for each refusal.

    It has no epochs, no clock, no pace, and grows whether the limit binds or not. A control for the lab.
    """

    due = None

    def __init__(self, *, start: int = 20, most: int = 2_000, up: float = 0.5, down: float = 0.9) -> None:
        self.initial = Setting(limit=start, rate=None, reason="start")
        self._limit = float(start)
        self._set = start
        self._most, self._up, self._down = most, up, down

    def on_signal(self, signal: Signal) -> Setting | None:
        """Grow or shrink."""
        if signal.kind == "ok":
            self._limit = min(self._most, self._limit + self._up)
        elif signal.kind in ("refused", "overloaded"):
            self._limit = max(1.0, self._limit * self._down)
        if int(self._limit) == self._set:
            return None
        self._set = int(self._limit)
        return Setting(limit=self._set, rate=None, reason=signal.kind)

    def on_timer(self, now: float) -> None:
        """Be never called."""


class Oracle:
    """Who knows what the server can do at each moment, and sets that: a cut a moment before, so that nothing is late.

    It starts as fast as a quota refills, evenly, and a bit slower where counting in windows and the jitter of the path
    would make refusals. It holds a ceiling exactly, and a knee with a few more to cover the path. Where the answers'
    tokens count, or a window is still full of what was admitted before a cut, it looks at the quota's state.
    """

    def __init__(self, scenario: Scenario, server: Server, number: int) -> None:
        self._scenario = scenario
        self._server = server
        self._number = number
        self.due: float | None = scenario.starts[number]
        self.initial = self._setting(scenario.starts[number], None)  # a quota must not be asked about the future

    def on_signal(self, signal: Signal) -> None:
        """Learn nothing."""

    def on_timer(self, now: float) -> Setting | None:
        """Follow the server."""
        path = self._scenario.path
        coming = [phase.at for phase in self._scenario.phases if phase.at > now + 1e-9]
        turns = [turn for at in coming for turn in (at - path, at) if turn > now + 1e-9]
        self.due = min([*turns, now + STEP])
        return self._setting(now, self._server.quota)

    def _setting(self, now: float, state: Limiter | None) -> Setting:
        phases = self._scenario.phases
        current = _at(phases, now)
        coming = _at(phases, now + self._scenario.path + 1e-9)
        sharing = sum(at <= now for at in self._scenario.starts) or 1
        phase = min(current, coming, key=lambda phase: phase.rate(now))
        if phase.down:
            return Setting(limit=1, rate=0.1, reason="down")
        limit, rate = self._width(phase, now) / sharing, self._rate(phase, now, state)
        return Setting(
            limit=max(1, math.floor(limit) + (self._number < math.floor(limit * sharing) % sharing)),
            rate=None if rate is None else max(1e-3, rate / sharing),
            reason="known",
        )

    def _width(self, phase: Phase, now: float) -> float:
        path, mean = self._scenario.path, phase.latency.mean
        most = math.inf if phase.ceiling is None else phase.ceiling
        knee = phase.width(now)
        if knee < math.inf:
            most = min(most, math.ceil(knee * (1 + 2 * path / mean)) + 2)
        if phase.quota is not None:
            needed = phase.rate(now) * (mean + 2 * path)
            most = min(most, math.ceil(2 * needed + 6 * math.sqrt(needed)) + 10)
        return most

    def _rate(self, phase: Phase, now: float, state: Limiter | None) -> float | None:
        quota, path = phase.quota, self._scenario.path
        if quota is None:
            return None
        flow = quota.amount / quota.per
        steady = flow / phase.size
        if quota.strategy != "bucket":
            steady *= quota.per / (quota.per + path) * (1 - AHEAD)
        elif phase.largest < flow * path + phase.size:  # no room for two that come closer together than they were sent
            steady = 1 / (1 / steady + path)
        steady /= 1 - phase.faults.get("fatal", 0.0)  # those cost nothing
        if state is None or phase is not self._server.phase:
            return steady
        if phase.unit == "tokens":  # lengths are not known before: keep a bucket half full, and a bit of a window free
            spare = state.remaining(now) - (phase.largest / 2 if quota.strategy == "bucket" else 4 * phase.size)
            return min(1.5 * steady, max(0.05 * steady, steady + spare / phase.size / (4 * STEP)))
        wait = state.wait(now, 1.0)
        return min(steady, 1 / wait) if wait > 1 / steady else steady


def _at(phases: tuple[Phase, ...], now: float) -> Phase:
    return max((phase for phase in phases if phase.at <= now + 1e-9), key=lambda phase: phase.at)


def _library(module: str, name: str) -> Callable[[], Machine | Controller] | None:
    """Return a factory of the library; None: it is not there."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ModuleNotFoundError as missing:
        if missing.name != module:
            raise
        return None


def _fresh(factory: Callable[[], Machine | Controller]) -> Make:
    return lambda _scenario, _server, _number: factory()


OURS: Final = {
    "pace_and_follow": ("rxllm.policies.follow", "PaceAndFollow"),
    "aimd": ("rxllm.policies.aimd", "aimd"),
}
OTHERS: Final[dict[str, Make]] = {
    "oracle": Oracle,
    "aimd_per_reply": _fresh(AimdPerReply),
}
DEFAULT: Final = ("pace_and_follow", "aimd", "aimd_per_reply", "fixed_100", "oracle")


def find(name: str) -> Make | None:
    """Return what makes the controller of that name: "fixed_<n>", one in the tables here, or "module:factory".

    None: the library does not have it yet.

    Raises:
        SystemExit: there is no such controller.
    """
    kind, _, number = name.partition("_")
    if kind == "fixed" and number.isdecimal() and int(number) > 0:
        return _fresh(lambda: Fixed(int(number)))
    if name in OTHERS:
        return OTHERS[name]
    module, _, factory = name.rpartition(":")
    place = OURS.get(name) or ((module, factory) if module else None)
    if place is None:
        known = ", ".join([*OURS, *OTHERS, "fixed_<n>", "module:factory"])
        raise SystemExit(f"no controller is called {name!r}; there are {known}")
    found = _library(*place)
    return None if found is None else _fresh(found)
