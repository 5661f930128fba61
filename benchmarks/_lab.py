"""The lab for controllers: scenarios as data, and one run of a controller against a synthetic server, in virtual time.

    backlog ──▶ Gate(concurrency=controller) ──▶ path ──▶ Server: quota, ceiling, knee, faults ──▶ path ──┐
    (no end)     ▲                                                                                        │
                 └────────── settled: how it ended, what it used, with which error; tried again, or done ◀┘

The gate with its loop, the back-off and the controllers are the library's own. A client here does what `rxllm.call`
does, a place in the window, a place in the queue, waits, retries, checks, without building a stream for each request; a
test compares the two. There are no timeouts, and the deadline of a request is longer than a run.

An answer that a check refuses is a good one for the gate, which learns nothing of the check.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import heapq
import logging
import math
import random
import time
from typing import TYPE_CHECKING, Final, Literal, Protocol

import msgspec

from rxllm import Backoff, Gate
from rxllm.errors import (
    CallError,
    ConfigError,
    InvalidRequestError,
    OverloadedError,
    RateLimitedError,
    ServerError,
    check_number,
)
from rxllm.operators.retry import PATIENCE
from rxllm.testing import ServerQuota, VirtualScheduler
from rxllm.testing._quotas import Limiter, limiter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rxllm.clock import Handle
    from rxllm.feedback import Controller
    from rxllm.gate import Lease
    from rxllm.messages import Kind
    from rxllm.policies.accounting import Ending
    from rxllm.policies.control import Machine

TICK: Final = 0.5  # seconds between two rows of the log
SPEED: Final = 50.0  # tokens that a request has for each second of work in it
VALIDATIONS: Final = 3  # answers of one request that a check may refuse: the default of `rxllm.policies.Validate`
FAILURES: Final[dict[Kind, tuple[Ending, type[CallError], str, int]]] = {
    "refused": ("refused", RateLimitedError, "too many", 429),
    "overloaded": ("refused", OverloadedError, "too busy", 529),
    "fault": ("failed", ServerError, "it broke", 500),
    "fatal": ("failed", InvalidRequestError, "it is wrong", 400),
}

Unit = Literal["requests", "tokens", "places"]


class Latency(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Seconds of work that requests have in them: lognormal, whatever the load.

    Args:
        median: seconds, above 0.
        sigma: the standard deviation of the logarithm, at least 0.

    Raises:
        ConfigError: a field out of its range.
    """

    median: float
    sigma: float = 0.8

    def __post_init__(self) -> None:
        check_number("median", self.median, above=0)
        check_number("sigma", self.sigma, least=0, most=3)

    @property
    def mean(self) -> float:
        """Seconds."""
        return self.median * math.exp(self.sigma**2 / 2)


class Phase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the server is from `at` on, until the next phase.

    Args:
        at: seconds after the start.
        quota: what it admits in a time; None: no such limit.
        unit: what the quota counts.
        ceiling: requests in service at a time; it refuses more. None: no such limit.
        knee: requests that it serves at full speed; more share that speed. None: as many as come.
        latency: the work in a request.
        faults: kind -> probability, of "fault" (after the work, as a 500), "fatal" (at the door, as a 400) and
            "invalid" (an answer that the client's check refuses).
        down: nothing is accepted, connections fail, and what was in service is lost.
        cold: seconds in which the knee grows from a tenth to all of it.

    Raises:
        ConfigError: a field out of its range, or a server without any limit.
    """

    at: float = 0.0
    quota: ServerQuota | None = None
    unit: Literal["requests", "tokens"] = "requests"
    ceiling: int | None = None
    knee: int | None = None
    latency: Latency = Latency(1.7, 0.57)
    faults: dict[Literal["fault", "fatal", "invalid"], float] = {}
    down: bool = False
    cold: float = 0.0

    def __post_init__(self) -> None:
        check_number("at", self.at, least=0)
        check_number("ceiling", self.ceiling, least=1, integer=True, optional=True)
        check_number("knee", self.knee, least=1, integer=True, optional=True)
        check_number("cold", self.cold, least=0)
        check_number("faults", sum(self.faults.values()), least=0, most=1)
        if not self.down and self.quota is None and self.ceiling is None and self.knee is None:
            raise ConfigError(f"a phase needs a quota, a ceiling or a knee, got none at {self.at:g} s")
        if self.cold and self.knee is None:
            raise ConfigError(f"cold={self.cold!r} needs a knee, got None")

    def width(self, now: float) -> float:
        """Return how many requests it serves at full speed at the time `now`; infinity: as many as come."""
        knee = math.inf if self.knee is None else self.knee
        if self.cold and now < self.at + self.cold:
            return max(1.0, knee * max(0.1, (now - self.at) / self.cold))
        return knee

    def capacity(self, now: float) -> tuple[Unit, float]:
        """Return what binds at the time `now`, and how much of it there is: requests or tokens a second, or places."""
        if self.down:
            return "requests", 0.0
        width = min(self.width(now), math.inf if self.ceiling is None else self.ceiling)
        if self.quota is None:
            return "places", width
        flow = self.quota.amount / self.quota.per
        if flow / self.size > width / self.latency.mean:
            return "places", width
        return self.unit, flow

    @property
    def size(self) -> float:
        """How much a request takes of the quota, on average."""
        return 1.0 if self.unit == "requests" else SPEED * self.latency.mean

    @property
    def largest(self) -> float:
        """The most that a request takes of the quota: a longer one is charged all of it, else it would never fit."""
        if self.quota is None:
            return math.inf
        return self.quota.amount if self.quota.burst is None else self.quota.burst

    def rate(self, now: float) -> float:
        """Return requests per second that it serves at the time `now`."""
        unit, amount = self.capacity(now)
        return amount / {"requests": 1.0, "tokens": self.size, "places": self.latency.mean}[unit]


class Scenario(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One world for a controller.

    Args:
        name: what it is called; the random numbers of its runs come from it.
        phases: by time, the first at 0.
        seconds: how long it lasts.
        starts: when each client of the server begins, in seconds; each has a gate and a controller of its own.
        pipelines: how many each client has on its gate.
        retry_after: what a refusal says, in seconds; "exact": when a place is free, as far as the server knows.
        refusal: seconds until a refusal is told, least and most.
        overloaded: whether a ceiling answers 529 instead of 429.
        charge_refused: whether refused requests count against the quota too.
        path: seconds that a request is under way, and its answer: at most.
        window: requests in progress of a pipeline; None: that of the gate.

    Raises:
        ConfigError: a field out of its range.
    """

    name: str
    phases: tuple[Phase, ...]
    seconds: float = 900.0
    starts: tuple[float, ...] = (0.0,)
    pipelines: int = 1
    retry_after: float | Literal["exact"] | None = "exact"
    refusal: tuple[float, float] = (0.05, 0.3)
    overloaded: bool = False
    charge_refused: bool = False
    path: float = 0.05
    window: int | None = None

    def __post_init__(self) -> None:
        times = [phase.at for phase in self.phases]
        if not times or times[0] != 0 or times != sorted(set(times)) or times[-1] >= self.seconds:
            raise ConfigError(f"phases must begin at 0 and rise, all before {self.seconds:g} s, got {times}")
        if not self.starts:
            raise ConfigError("starts must have at least one time, got ()")

    def seed(self, run: int) -> int:
        """Return what the random numbers of a run begin with: a digest, so nobody can choose it."""
        return int.from_bytes(hashlib.sha256(f"{self.name}/{run}".encode()).digest()[:8])


class Job(Protocol):
    """One attempt, as the server sees it. It has two numbers of the server's own while it is in service."""

    client: int  # who sent it
    draw: float  # of a normal distribution: how long the answer is, the same in each try
    accepted: float  # when
    work: float  # seconds

    def answered(self, kind: Kind, retry_after: float | None, /) -> None:
        """Take the answer; it has come the way back."""
        ...


class Row(msgspec.Struct, frozen=True, gc=False):
    """The server's log, up to `at`, and what the first client was set to then."""

    at: float
    places: float  # place-seconds of service at full speed
    requests: int  # accepted
    tokens: float  # of those
    refused: int
    arrivals: int
    limit: int | None
    rate: float | None
    in_flight: int  # of the first client


class Server:
    """A synthetic server: processor sharing above the knee, a quota and a ceiling at the door."""

    def __init__(self, scenario: Scenario, clock: VirtualScheduler, draws: random.Random) -> None:
        self._scenario = scenario
        self._clock = clock
        self._draws = draws
        self.phase = scenario.phases[0]
        self._number = 0  # of the phase
        self.quota: Limiter | None = limiter(self.phase.quota, 0.0)
        self._serving: list[tuple[float, int, Kind, Job]] = []  # the next to finish first: by work done until then
        self._done = 0.0  # seconds of work that each request has had that was in service since the start
        self._since = 0.0  # up to when that is counted
        self._width = self.phase.width(0.0)
        self._timer: Handle | None = None
        self._due = math.inf
        self.places = 0.0
        self.requests = 0
        self.tokens = 0.0
        self.refused = 0
        self.arrivals = 0
        self.of_clients = [0] * len(scenario.starts)  # accepted of each
        self.answered: list[list[tuple[float, float]]] = [[] for _ in scenario.phases]  # when accepted, seconds
        for number, phase in enumerate(scenario.phases):
            if number:
                clock.call_later(phase.at, functools.partial(self._enter, number))

    def send(self, job: Job) -> None:
        """Take an attempt that is on its way."""
        self._clock.call_later(self._draws.random() * self._scenario.path, lambda: self._arrive(job))

    def tick(self) -> None:
        """Bring the counts up to date, and the knee of a cold server."""
        self._advance()
        if self.phase.cold:
            self._widen()

    def _enter(self, number: int) -> None:
        self._advance()
        self._number = number
        self.phase = phase = self._scenario.phases[number]
        self.quota = limiter(phase.quota, self._clock.seconds(), self.quota)
        if phase.down:
            for *_, job in self._serving:
                self._answer(job, "fault", None, 0.0)
            self._serving.clear()
        self._widen()

    def _widen(self) -> None:
        self._width = self.phase.width(self._clock.seconds())
        self._due = math.inf  # whatever is armed, the speed is another
        self._arm()

    def _arrive(self, job: Job) -> None:
        phase, draws, scenario = self.phase, self._draws, self._scenario
        now = self._clock.seconds()
        self.arrivals += 1
        kind: Kind = "ok"
        if phase.faults:
            left = draws.random()
            for name, chance in phase.faults.items():
                left -= chance
                if left < 0:
                    kind = name
                    break
        if phase.down or kind == "fatal":
            self._answer(job, "fault" if phase.down else "fatal", None, draws.uniform(*scenario.refusal))
            return
        work = phase.latency.median * math.exp(phase.latency.sigma * job.draw)
        cost = 1.0 if phase.unit == "requests" else min(SPEED * work, phase.largest)
        quota, wait = self.quota, 0.0
        busy = phase.ceiling is not None and len(self._serving) >= phase.ceiling
        if quota is not None and not busy:
            wait = quota.wait(now, cost)
        if busy or wait:
            self.refused += 1
            if quota is not None and scenario.charge_refused:
                quota.charge(now, cost)
            hint = scenario.retry_after
            self._answer(
                job,
                "overloaded" if busy and scenario.overloaded else "refused",
                (wait or 1.0) if hint == "exact" else hint,
                draws.uniform(*scenario.refusal),
            )
            return
        if quota is not None:
            quota.charge(now, cost)
        self.requests += 1
        self.tokens += SPEED * work
        self.of_clients[job.client] += 1
        self._advance()
        job.accepted = now
        job.work = work
        heapq.heappush(self._serving, (self._done + work, self.requests, kind, job))
        self._arm()

    def _advance(self) -> None:
        """Count the work done since the last look."""
        now = self._clock.seconds()
        serving = len(self._serving)
        if serving:
            passed = now - self._since
            if serving <= self._width:
                self._done += passed
                self.places += passed * serving
            else:
                self._done += passed * self._width / serving
                self.places += passed * self._width
        self._since = now

    def _arm(self) -> None:
        """See to it that the next one is finished in time; a timer that has become too early just looks again."""
        serving = self._serving
        if not serving:
            return
        left = max(0.0, serving[0][0] - self._done)
        due = self._since + (left if len(serving) <= self._width else left * len(serving) / self._width)
        if due < self._due or self._timer is None:
            if self._timer is not None:
                self._timer.cancel()
            self._due = due
            self._timer = self._clock.call_later(due - self._since, self._finish)

    def _finish(self) -> None:
        self._timer = None
        self._advance()
        serving, now, path = self._serving, self._since, self._scenario.path
        while serving and serving[0][0] <= self._done + 1e-9:
            _, _, kind, job = heapq.heappop(serving)
            if kind == "ok":
                self.answered[self._number].append((job.accepted, now - job.accepted))
            self._answer(job, kind, None, self._draws.random() * path)
        self._arm()

    def _answer(self, job: Job, kind: Kind, retry_after: float | None, seconds: float) -> None:
        self._clock.call_later(seconds, lambda: job.answered(kind, retry_after))


class Client:
    """One user of the server: an endless backlog behind a gate, and the controller of that gate."""

    def __init__(
        self,
        scenario: Scenario,
        number: int,
        server: Server,
        controller: int | Machine | Controller,
        draws: random.Random,
    ) -> None:
        self.number = number
        self.server = server
        self.gate = Gate(concurrency=controller)
        self.backoff = Backoff()
        self.draws = draws
        self.clock: VirtualScheduler
        self.failed = 0  # requests given up: faults or invalid answers that did not end; not those that are fatal
        self.ended = 0
        self._scenario = scenario
        self._active = 0
        self._parked = 0  # requests that wait for long: others are pulled in their place, as `rxllm.call` does
        self._filling = False

    def start(self, clock: VirtualScheduler) -> None:
        """Begin."""
        self.clock = clock
        self.fill()

    def fill(self) -> None:
        """Pull as many requests as there is room for in the window."""
        self._filling = False
        scenario = self._scenario
        window = (self.gate.window if scenario.window is None else scenario.window) * scenario.pipelines
        if scenario.window is None:
            window += min(self._parked, window)
        while self._active < window:
            self._active += 1
            Try(self).ask()

    def done(self, *, failed: bool) -> None:
        """Count the end of a request, and pull another one in the next turn."""
        self.ended += 1
        self.failed += failed
        self._active -= 1
        self._fill_soon()

    def park(self, seconds: float, action: Callable[[], None]) -> None:
        """Let a request wait for long, and pull another one in its place in the next turn."""

        def unpark() -> None:
            self._parked -= 1
            action()

        self._parked += 1
        self.clock.call_later(seconds, unpark)
        self._fill_soon()

    def _fill_soon(self) -> None:
        if not self._filling:
            self._filling = True
            self.clock.call_soon(self.fill)


class Try:
    """One request with all its tries: who applies at the gate, and the job of the server."""

    __slots__ = (
        "_arrival",
        "_faults",
        "_invalid",
        "_lease",
        "_owner",
        "_refusals",
        "accepted",
        "client",
        "draw",
        "work",
    )

    def __init__(self, owner: Client) -> None:
        self._owner = owner
        self._arrival: int | None = None
        self._lease: Lease
        self._refusals = 0
        self._faults = 0
        self._invalid = 0
        self.client = owner.number
        self.draw = owner.draws.gauss(0.0, 1.0)
        self.accepted = 0.0
        self.work = 0.0

    def ask(self) -> None:
        """Apply for admission, in the place of the first time."""
        owner = self._owner
        waiter = owner.gate.apply(owner.clock, (), self, self._arrival)
        self._arrival = waiter.arrival
        owner.gate.enter(waiter)

    def admitted(self, lease: Lease) -> None:
        """Start."""
        self._lease = lease
        self._owner.server.send(self)

    def turned_away(self, error: CallError | ConfigError) -> None:
        """Fail: gates without quotas turn nobody away."""
        raise error

    def answered(self, kind: Kind, retry_after: float | None) -> None:
        """Give the lease back as `rxllm.operators.admit` does, and go on as `rxllm.call` does."""
        owner = self._owner
        if kind in FAILURES:
            if retry_after is not None:
                owner.gate.pause(retry_after)
            self._lease.settle(FAILURES[kind][0], None, error_of(kind, retry_after))
        else:
            self._lease.settle("answered", {"tokens": SPEED * self.work})
        wait = self._wait(kind, retry_after)
        if wait is None:
            owner.done(failed=kind in ("fault", "invalid"))
        elif wait > PATIENCE:
            owner.park(wait, self.ask)
        elif wait:
            owner.clock.call_later(wait, self.ask)
        else:
            self.ask()

    def _wait(self, kind: Kind, retry_after: float | None) -> float | None:
        """Return seconds until the next try; None: it was the last one."""
        owner = self._owner
        uniform = owner.draws.uniform
        if kind in ("refused", "overloaded"):
            self._refusals += 1
            return owner.backoff.wait(self._refusals, retry_after, uniform)
        if kind == "fault":
            self._faults += 1
            return owner.backoff.delay(self._faults, None, uniform)
        if kind == "invalid":
            self._invalid += 1
            if self._invalid < VALIDATIONS:
                self._refusals = self._faults = 0  # a new answer has all its tries again
                return 0.0
        return None


def error_of(kind: Kind, retry_after: float | None) -> CallError:
    """Return what a client of the library makes of such an answer."""
    _, error, message, status = FAILURES[kind]
    return error(message, status, retry_after)


class Trace(msgspec.Struct, frozen=True, kw_only=True):
    """What a run left behind."""

    scenario: Scenario
    rows: list[Row]  # every half second
    answered: list[list[tuple[float, float]]]  # phase -> good answers: when accepted, seconds in service
    of_clients: list[float]  # share of the accepted requests since all had begun and 60 s were over
    attempts: int
    ended: int  # requests
    failed: int  # of those given up
    cpu: float  # seconds


class Alarm(logging.Handler):
    """It raises for each warning."""

    def emit(self, record: logging.LogRecord) -> None:
        """Raise."""
        raise RuntimeError(record.getMessage())


@contextlib.contextmanager
def failing_loudly() -> Iterator[None]:
    """End a run with the mistake of its controller: the gate warns and goes on with the last setting."""
    log, alarm = logging.getLogger("rxllm.feedback"), Alarm(logging.WARNING)
    log.addHandler(alarm)
    try:
        yield
    finally:
        log.removeHandler(alarm)


@failing_loudly()
def run(
    scenario: Scenario,
    make: Callable[[Scenario, Server, int], int | Machine | Controller],
    number: int = 0,
    warm: float = 60.0,
) -> Trace:
    """Run a scenario.

    Args:
        scenario: what to run.
        make: scenario, server, number of the client -> the `concurrency` of its gate: a machine, an operator, or a
            number; only an oracle looks at the first two.
        number: of the run; each has other random numbers.
        warm: seconds after which the clients are compared.

    Raises:
        RuntimeError: a controller raised something.
    """
    began = time.process_time()
    clock = VirtualScheduler()
    draws = random.Random(scenario.seed(number))
    server = Server(scenario, clock, draws)
    clients = [
        Client(scenario, place, server, make(scenario, server, place), draws) for place in range(len(scenario.starts))
    ]
    for client, at in zip(clients, scenario.starts, strict=True):
        clock.call_later(at, functools.partial(client.start, clock))
    rows: list[Row] = []
    before: list[int] = []
    first = clients[0]
    for step in range(round(scenario.seconds / TICK) + 1):
        at = step * TICK
        clock.run(until=at)
        server.tick()
        if not before and at >= max(scenario.starts) + warm:
            before = server.of_clients.copy()
        seen = first.gate.statistics()
        rows.append(
            Row(
                at=at,
                places=server.places,
                requests=server.requests,
                tokens=server.tokens,
                refused=server.refused,
                arrivals=server.arrivals,
                limit=seen.limit,
                rate=seen.rate,
                in_flight=seen.in_flight,
            )
        )
    since = [now - then for now, then in zip(server.of_clients, before, strict=True)] if before else server.of_clients
    return Trace(
        scenario=scenario,
        rows=rows,
        answered=server.answered,
        of_clients=[count / max(1, sum(since)) for count in since],
        attempts=sum(client.gate.statistics().admitted for client in clients),
        ended=sum(client.ended for client in clients),
        failed=sum(client.failed for client in clients),
        cpu=time.process_time() - began,
    )
