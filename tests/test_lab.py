"""The lab of the controllers: its servers, its clients and its judge, against short models and the real pipeline."""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import random
import sys
from pathlib import Path
from statistics import median
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import rxllm
from rxllm import Gate, Reply, Request, Usage
from rxllm.errors import ConfigError, InvalidRequestError
from rxllm.gate import WINDOW
from rxllm.messages import Setting, Signal
from rxllm.stream import Stream
from rxllm.testing import ServerQuota, VirtualScheduler, record

SCRIPTS = str(Path(__file__).resolve().parents[1] / "benchmarks")
sys.path.insert(0, SCRIPTS)  # benchmarks import each other as scripts do
try:
    lab, judge, controllers, scenarios, picture = (
        importlib.import_module(f"_lab{name}") for name in ("", "_judge", "_controllers", "_scenarios", "_picture")
    )
    over_http = importlib.import_module("control_http")
finally:
    sys.path.remove(SCRIPTS)

EVEN = lab.Latency(1.0, 0.0)  # each request has one second of work in it


def world(*phases: Any, **fields: Any) -> Any:
    return lab.Scenario(name="test", phases=phases, **{"seconds": 200.0, "path": 0.0, **fields})


def play(scenario: Any, controller: str | Any, number: int = 0) -> Any:
    make = controllers.find(controller) if isinstance(controller, str) else lambda *_: controller
    return lab.run(scenario, make, number)


# the server


class Job:
    """An attempt that a test sends to a server by hand."""

    def __init__(self, clock: VirtualScheduler, work: float = 1.0) -> None:
        self.clock = clock
        self.client = 0
        self.draw = math.log(work)
        self.accepted = self.work = 0.0
        self.ended: tuple[str, float, float | None] | None = None

    def answered(self, kind: str, retry_after: float | None) -> None:
        assert self.ended is None
        self.ended = kind, self.clock.seconds(), retry_after


def served(scenario: Any, sent: list[tuple[float, float]], until: float = 1000.0) -> tuple[Any, list[Job]]:
    """Send jobs of so much work at these times."""
    clock = VirtualScheduler()
    server = lab.Server(scenario, clock, random.Random(0))
    jobs = [Job(clock, work) for _, work in sent]
    for job, (at, _) in zip(jobs, sent, strict=True):
        clock.call_later(at, functools.partial(server.send, job))
    clock.run(until)
    server.tick()
    return server, jobs


SHARING = lab.Latency(1.0, 1.0)  # a job's work is what its draw says


def test_requests_above_the_knee_share_its_speed():
    server, jobs = served(world(lab.Phase(knee=2, latency=SHARING)), [(0.0, 1.0), (0.0, 1.0), (0.0, 2.0), (1.0, 0.5)])
    # three at 2/3 until 1.0, then four at 1/2 until the first two end, then two at full speed
    ends = [job.ended[1] for job in jobs if job.ended]
    assert ends == [pytest.approx(at) for at in (5 / 3, 5 / 3, 8 / 3, 11 / 6)]
    assert server.places == pytest.approx(4.5)


def by_steps(sent: list[tuple[float, float]], knee: float, step: float = 1e-3) -> list[float]:
    """Return when each ends, by the definition: in each step all in service get the same."""
    left = [work for _, work in sent]
    ends = [math.inf] * len(sent)
    now = 0.0
    while math.inf in ends:
        inside = [one for one, (at, _) in enumerate(sent) if at <= now and ends[one] == math.inf]
        for one in inside:
            left[one] -= step * min(1.0, knee / len(inside))
            if left[one] <= 0:
                ends[one] = now + step
        now += step
    return ends


@settings(deadline=None, max_examples=40)
@given(
    sent=st.lists(
        st.tuples(st.integers(0, 8).map(lambda n: n / 4), st.integers(1, 8).map(lambda n: n / 4)), min_size=1
    ),
    knee=st.integers(1, 4),
)
def test_a_server_shares_its_speed_as_the_definition_says(sent: list[tuple[float, float]], knee: int):
    sent = sent[:8]
    server, jobs = served(world(lab.Phase(knee=knee, latency=SHARING)), sent)
    for job, expected in zip(jobs, by_steps(sent, knee), strict=True):
        assert job.ended is not None
        assert job.ended[1] == pytest.approx(expected, abs=0.02)
    assert server.places == pytest.approx(sum(work for _, work in sent))  # no work is lost or made


def test_a_ceiling_refuses_one_more_than_it_has_places_for():
    _, jobs = served(world(lab.Phase(ceiling=2, latency=SHARING), overloaded=True), [(0.0, 1.0)] * 3 + [(1.5, 1.0)])
    assert [job.ended[0] for job in jobs if job.ended] == ["ok", "ok", "overloaded", "ok"]


@pytest.mark.parametrize(("hint", "seen"), [("exact", 0.5), (89.0, 89.0), (0.0, 0.0), (None, None)], ids=str)
def test_a_quota_refuses_and_says_when_to_come_again(hint: Any, seen: float | None):
    quota = ServerQuota(2, 1.0, "sliding")
    scenario = world(lab.Phase(quota=quota, latency=SHARING), retry_after=hint, refusal=(0.1, 0.1))
    server, jobs = served(scenario, [(0.0, 9.0), (0.0, 9.0), (0.5, 9.0), (1.0, 9.0)])
    assert jobs[2].ended == ("refused", pytest.approx(0.6), seen if seen is None else pytest.approx(seen))
    assert (server.requests, server.refused, server.arrivals) == (3, 1, 4)


def test_refused_requests_count_where_the_scenario_says_so():
    quota = ServerQuota(1, 1.0, "sliding")
    for counts, accepted in ((False, 2), (True, 1)):
        scenario = world(lab.Phase(quota=quota, latency=SHARING), charge_refused=counts)
        server, _ = served(scenario, [(0.0, 1.0), (0.5, 1.0), (1.2, 1.0)])
        assert server.requests == accepted


def test_a_server_that_goes_down_loses_what_it_serves_and_comes_back_cold():
    phases = (lab.Phase(knee=4, latency=SHARING), lab.Phase(at=2.0, down=True), lab.Phase(at=4.0, knee=4, cold=8.0))
    server, jobs = served(world(*phases, refusal=(0.1, 0.1)), [(0.0, 1.0), (1.0, 5.0), (3.0, 1.0)], until=10.0)
    assert [job.ended for job in jobs] == [
        ("ok", pytest.approx(1.0), None),
        ("fault", pytest.approx(2.0), None),
        ("fault", pytest.approx(3.1), None),
    ]
    assert server.refused == 0
    assert [server.phase.width(at) for at in (4.0, 8.0, 12.0, 99.0)] == [1.0, 2.0, 4, 4]


def test_a_request_longer_than_the_quota_takes_all_of_it():
    quota = ServerQuota(600, 60.0, "bucket", burst=lab.SPEED)
    _, jobs = served(
        world(lab.Phase(quota=quota, unit="tokens", latency=SHARING)), [(0.0, 9.0), (1.0, 1.0), (6.0, 1.0)]
    )
    assert [job.ended[0] for job in jobs if job.ended] == ["ok", "refused", "ok"]


def test_a_cold_server_warms_up_while_it_serves():
    trace = play(world(lab.Phase(knee=8, cold=10.0, latency=EVEN), seconds=20.0), "fixed_20")
    at = {row.at: row.places for row in trace.rows}
    assert at[10.0] == pytest.approx(8 * 10 / 2, rel=0.1)
    assert at[20.0] - at[10.0] == pytest.approx(80.0, rel=0.02)


def test_a_quota_changes_with_the_phase():
    trace = play(world(*scenarios.steps((0, scenarios.bucket(10)), (50, scenarios.bucket(5)))), "fixed_100")
    at = {row.at: row.requests for row in trace.rows}
    assert at[50.0] == pytest.approx(510, rel=0.02)
    assert at[200.0] - at[50.0] == pytest.approx(750, rel=0.02)


def test_tokens_are_charged_as_the_work_that_is_in_a_request():
    phase = lab.Phase(quota=ServerQuota(100, 1.0, "sliding"), unit="tokens", latency=SHARING)
    server, jobs = served(world(phase), [(0.0, 1.0), (0.1, 0.9), (0.2, 0.2)])
    assert [job.ended[0] for job in jobs if job.ended] == ["ok", "ok", "refused"]
    assert server.tokens == pytest.approx(1.9 * lab.SPEED)


@pytest.mark.parametrize(
    ("phase", "capacity", "rate"),
    [
        (lab.Phase(quota=ServerQuota(600)), ("requests", 10.0), 10.0),
        (lab.Phase(quota=ServerQuota(600), ceiling=5, latency=EVEN), ("places", 5), 5.0),
        (lab.Phase(quota=ServerQuota(600), ceiling=5, latency=lab.Latency(0.1, 0.0)), ("requests", 10.0), 10.0),
        (lab.Phase(ceiling=90, knee=64, latency=EVEN), ("places", 64), 64.0),
        (lab.Phase(quota=ServerQuota(6000), unit="tokens", latency=EVEN), ("tokens", 100.0), 2.0),
        (lab.Phase(down=True), ("requests", 0.0), 0.0),
    ],
    ids=[
        "a-quota",
        "a-ceiling-below-the-quota",
        "a-quota-below-the-ceiling",
        "a-knee-below-the-ceiling",
        "tokens",
        "an-outage",
    ],
)
def test_the_capacity_is_that_of_the_limit_that_binds(phase: Any, capacity: Any, rate: float):
    assert phase.capacity(phase.at) == capacity
    assert phase.rate(phase.at) == pytest.approx(rate)


@pytest.mark.parametrize(
    "make",
    [
        lab.Phase,
        lambda: lab.Phase(ceiling=0),
        lambda: lab.Phase(ceiling=4, cold=5.0),
        lambda: lab.Phase(ceiling=4, faults={"fault": 0.6, "fatal": 0.6}),
        lambda: lab.Latency(0.0),
        world,
        lambda: world(lab.Phase(at=1.0, ceiling=4)),
        lambda: world(lab.Phase(ceiling=4), lab.Phase(at=200.0, ceiling=4)),
        lambda: world(lab.Phase(ceiling=4), starts=()),
    ],
    ids=[
        "no-limit",
        "no-place",
        "cold-without-a-knee",
        "more-faults-than-requests",
        "no-work",
        "no-phase",
        "nothing-at-the-start",
        "a-phase-after-the-end",
        "no-client",
    ],
)
def test_a_scenario_that_makes_no_sense_is_refused(make: Any):
    with pytest.raises(ConfigError):
        make()


# the client


class Attempt:
    """One subscription of the wire: a job of the lab's server, and what the library disposes."""

    def __init__(self, observer: Any, draw: float) -> None:
        self.observer = observer
        self.client = 0
        self.draw = draw
        self.accepted = self.work = 0.0

    def answered(self, kind: str, retry_after: float | None) -> None:
        if self.observer is None:
            return
        if kind in ("ok", "invalid"):
            self.observer.on_next(Reply(value=kind, usage=Usage(output_tokens=1)))
            if self.observer is not None:
                self.observer.on_completed()
            return
        self.observer.on_error(lab.error_of(kind, retry_after))

    def dispose(self) -> None:
        self.observer = None


class Wire(Stream[Any]):
    def __init__(self, server: Any, draw: float) -> None:
        self.server = server
        self.draw = draw

    def _start(self, observer: Any, carrier: Any) -> Attempt:
        attempt = Attempt(observer, self.draw)
        self.server.send(attempt)
        return attempt


class WireClient:
    """A client of the library, over the server of the lab."""

    def __init__(self, server: Any) -> None:
        self.server = server

    def send(self, request: Request, *, timeouts: Any = None) -> Any:
        return Wire(self.server, request.meta)

    def cost(self, request: Request) -> dict[str, float]:
        return {}


BAD = {"fault": 0.1, "fatal": 0.05, "invalid": 0.4}
RATE = lab.Phase(quota=scenarios.bucket(6), faults=BAD)
CEILING = lab.Phase(ceiling=15, faults=BAD)
KNEE = lab.Phase(knee=8, faults=BAD)


@pytest.mark.parametrize(
    ("phase", "hint", "make"),
    [
        pytest.param(RATE, "exact", lambda: 20, id="a-number-at-a-rate-with-hints"),
        pytest.param(RATE, None, lambda: 20, id="a-number-at-a-rate-without-hints"),
        pytest.param(CEILING, "exact", lambda: 20, id="a-number-at-a-ceiling-with-hints"),
        pytest.param(CEILING, "exact", lambda: controllers.Fixed(20), id="a-machine-at-a-ceiling-with-hints"),
        pytest.param(CEILING, None, lambda: controllers.Fixed(20), id="a-machine-at-a-ceiling-without-hints"),
        pytest.param(KNEE, "exact", lambda: controllers.Fixed(20), id="a-machine-at-a-knee"),
        pytest.param(RATE, "exact", controllers.AimdPerReply, id="a-controller-at-a-rate-with-hints"),
        pytest.param(CEILING, None, controllers.AimdPerReply, id="a-controller-at-a-ceiling-without-hints"),
    ],
)
def test_a_client_of_the_lab_fares_as_a_pipeline_of_the_library(phase: Any, hint: Any, make: Any):
    scenario = world(phase, retry_after=hint, path=0.05, seconds=1200.0)
    trace = play(scenario, make())

    clock = VirtualScheduler()
    server = lab.Server(scenario, clock, random.Random(1))
    draws = random.Random(2)
    requests = (Request(body={}, meta=draws.gauss(0.0, 1.0)) for _ in itertools.count())
    calls = rxllm.call(
        WireClient(server), gate=Gate(concurrency=make()), seed=3, validate=lambda reply: reply.value == "ok"
    )
    seen = record(clock, rxllm.from_iterable(requests).pipe(calls), until=scenario.seconds)
    server.tick()
    seen.dispose()

    last = trace.rows[-1]
    outcomes = seen.values
    fatal = sum(isinstance(outcome.error, InvalidRequestError) for outcome in outcomes)
    assert server.requests == pytest.approx(last.requests, rel=0.05)
    assert server.places == pytest.approx(last.places, rel=0.05)
    assert server.refused / server.arrivals == pytest.approx(last.refused / last.arrivals, abs=0.03)
    assert len(outcomes) == pytest.approx(trace.ended, rel=0.05)
    failed = sum(not outcome.ok for outcome in outcomes) - fatal
    assert failed / len(outcomes) == pytest.approx(trace.failed / trace.ended, abs=0.01)
    times = [[seconds for _, seconds in answered] for answered in (server.answered[0], trace.answered[0])]
    assert median(times[0]) == pytest.approx(median(times[1]), rel=0.1)


class Scripted:
    """A controller that answers with a list of settings, one at each timer, and keeps what it is told."""

    def __init__(self, *settings: Setting, every: float = 1.0) -> None:
        self.initial, *self.rest = settings
        self.every = every
        self.due: float | None = every
        self.timers: list[float] = []
        self.signals: list[Signal] = []

    def on_signal(self, signal: Signal) -> None:
        self.signals.append(signal)

    def on_timer(self, now: float) -> Setting | None:
        self.timers.append(now)
        self.due = now + self.every if self.rest else None
        return self.rest.pop(0) if self.rest else None


def test_a_controller_is_told_of_each_attempt_and_called_when_it_is_due():
    controller = Scripted(Setting(limit=2, rate=None, reason="a"), Setting(limit=5, rate=None, reason="b"))
    trace = play(world(lab.Phase(ceiling=9, latency=EVEN), seconds=4.0), controller)
    assert controller.timers == [1.0, 2.0]
    assert [row.limit for row in trace.rows] == [2, 2, 5, 5, 5, 5, 5, 5, 5]
    starts = [signal for signal in controller.signals if signal.kind == "start"]
    ends = [signal for signal in controller.signals if signal.kind == "ok"]
    assert len(starts) == trace.attempts
    assert [one.in_flight for one in starts[:7]] == [1, 2, 3, 4, 5, 4, 5]
    assert {one.epoch for one in starts if one.at < 1.0} == {0}
    assert {one.epoch for one in starts if one.at > 1.0} == {1}
    assert all(one.seconds == pytest.approx(1.0) and one.tokens == pytest.approx(lab.SPEED) for one in ends)
    assert all(signal.binding for signal in ends)  # the limit is below the ceiling, and the backlog has no end


class Hasty(Scripted):
    """It wants to be called a second after the first answer, which it did not know before."""

    def __init__(self) -> None:
        super().__init__(Setting(limit=5, rate=None, reason="only"), every=50.0)

    def on_signal(self, signal: Signal) -> None:
        super().on_signal(signal)
        if signal.kind != "start" and self.due == 50.0:
            self.due = signal.at + 1.0


def test_a_controller_may_want_to_be_called_earlier_than_it_said():
    controller = Hasty()
    play(world(lab.Phase(ceiling=9, latency=EVEN), seconds=60.0), controller)
    assert controller.timers == [2.0]


def test_a_controller_learns_what_the_gate_can_know_of_each_end():
    controller = Scripted(Setting(limit=30, rate=None, reason="only"))
    phase = lab.Phase(ceiling=20, latency=EVEN, faults={"fault": 0.1, "fatal": 0.1, "invalid": 0.3})
    trace = play(world(phase, overloaded=True, retry_after=0.5), controller)
    ends = [signal for signal in controller.signals if signal.kind != "start"]
    assert {signal.kind for signal in ends} == {"ok", "overloaded", "fault", "fatal"}  # no check speaks at a gate
    assert {(signal.kind == "overloaded", signal.retry_after) for signal in ends} == {(True, 0.5), (False, None)}
    assert {(signal.kind == "ok", signal.tokens) for signal in ends} == {(True, lab.SPEED), (False, 0.0)}
    last = trace.rows[-1]
    seen = sum(signal.kind == "overloaded" for signal in ends)
    assert last.refused - 30 <= seen <= last.refused  # but for what is on its way


def test_an_operator_is_judged_as_the_machine_in_it():
    scenario = world(lab.Phase(quota=scenarios.bucket(10)), seconds=60.0)
    operator = rxllm.operators.feedback(controllers.AimdPerReply())
    plain, inside = (play(scenario, one) for one in (controllers.AimdPerReply(), operator))
    assert plain.rows[1:] == inside.rows[1:]


class Clumsy(Scripted):
    """It makes a mistake when it is called."""

    def on_timer(self, now: float) -> Setting | None:
        raise ZeroDivisionError("clumsy")


def test_a_controller_that_raises_ends_the_run():
    controller = Clumsy(Setting(limit=2, rate=None, reason="only"))
    with pytest.raises(RuntimeError, match="clumsy"):
        play(world(lab.Phase(ceiling=9, latency=EVEN)), controller)


@pytest.mark.parametrize(("window", "binding"), [(5, False), (50, True)], ids=["nobody-else", "others-wait"])
def test_who_backs_off_does_not_wait_for_the_controller_and_holds_nobody_back(window: int, binding: bool):
    controller = Scripted(Setting(limit=5, rate=None, reason="only"))
    play(world(lab.Phase(ceiling=1, latency=EVEN), retry_after=1.5, seconds=1.2, window=window), controller)
    assert {signal.binding for signal in controller.signals if signal.kind == "ok"} == {binding}


def test_a_setting_without_a_limit_or_a_rate_lifts_both():
    free = Setting(limit=None, rate=None, reason="free")
    controller = Scripted(Setting(limit=1, rate=0.5, reason="tight"), free, every=10.0)
    trace = play(world(lab.Phase(knee=50, latency=EVEN), seconds=20.0), controller)
    assert [(row.limit, row.rate) for row in (trace.rows[0], trace.rows[-1])] == [(1, 0.5), (None, None)]
    assert trace.rows[19].requests == 5
    assert trace.rows[-1].in_flight == WINDOW  # as with a gate that has no limit


def test_a_further_try_goes_before_younger_requests():
    broken = lab.Phase(knee=9, latency=EVEN, faults={"fault": 1.0})
    trace = play(world(broken, seconds=40.0), "fixed_1")
    assert trace.attempts >= 38
    assert trace.ended == trace.failed >= 4  # each after five tries, of which others do not get in between for long


def test_pipelines_share_a_gate_and_clients_a_server():
    phase = lab.Phase(quota=scenarios.bucket(20), latency=EVEN)
    assert play(world(phase, pipelines=3, seconds=30.0), "fixed_4").rows[-1].in_flight == 4
    free = Scripted(Setting(limit=None, rate=None, reason="free"))
    trace = play(world(lab.Phase(knee=9, latency=EVEN), pipelines=3, seconds=5.0), free)
    assert trace.rows[-1].in_flight == 3 * WINDOW  # each pulls as if it were alone
    trace = play(world(phase, starts=(0.0, 0.0, 50.0), seconds=150.0), "fixed_4")
    assert trace.of_clients == [pytest.approx(1 / 3, abs=0.02)] * 3
    assert trace.rows[-1].places - trace.rows[-3].places == pytest.approx(12)


def test_a_run_is_reproduced_by_its_number_alone():
    scenario = world(lab.Phase(quota=scenarios.bucket(10)), seconds=30.0)
    first, again, other = (play(scenario, "aimd_per_reply", number) for number in (0, 0, 1))
    assert first.rows == again.rows
    assert first.rows != other.rows


# the judge


def row(at: float, requests: float, refused: int = 0, arrivals: float = 0) -> Any:
    return lab.Row(at, requests, int(requests), requests, refused, int(arrivals or requests + refused), None, None, 0)


def log(scenario: Any, *pieces: tuple[float, float, int]) -> Any:
    """Return a trace of pieces: until when, accepted per second, refused per second."""
    rows, requests, refused = [row(0.0, 0)], 0.0, 0.0
    for step in range(1, round(scenario.seconds / lab.TICK) + 1):
        at = step * lab.TICK
        accept, refuse = next(piece[1:] for piece in pieces if at <= piece[0])
        requests += accept * lab.TICK
        refused += refuse * lab.TICK
        rows.append(row(at, requests, int(refused)))
    answered = [*[(5.0, 99.0)] * 4, (70.0, 2.0), (71.0, 3.0), (72.0, 4.0)]
    return lab.Trace(
        scenario=scenario, rows=rows, answered=[answered for _ in scenario.phases], of_clients=[0.3, 0.7],
        attempts=0, ended=10, failed=1, cpu=1.0,
    )  # fmt: skip


TEN = lab.Phase(quota=ServerQuota(600), latency=EVEN)
FIVE = lab.Phase(at=100.0, quota=ServerQuota(300), latency=EVEN)


def test_figures_are_those_of_the_log():
    trace = log(world(TEN, starts=(0.0, 0.0)), (30.0, 4, 6), (200.0, 8, 2))
    found = judge.figures(trace)
    assert found == {
        "share": pytest.approx(0.8),
        "refused": pytest.approx(0.2),
        "refused_all": pytest.approx((6 * 30 + 2 * 170) / 2000),
        "rise_90": math.inf,
        "p50_ratio": 3.0,
        "least": pytest.approx(0.24),
        "failed": 0.1,
    }


def test_the_rise_is_over_when_ten_seconds_of_ninety_percent_begin():
    assert judge.figures(log(world(TEN), (12.0, 2, 0), (200.0, 9, 0)))["rise_90"] == 12.0
    found = judge.figures(log(world(TEN), (12.0, 2, 0), (200.0, 10, 0)))["rise_90"]
    assert found == pytest.approx(12 - 10 * 0.1 / 0.8, abs=0.5)  # the window that averages 90 % begins a bit before


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ([(140.0, 10, 0), (200.0, 5, 0)], 40.0),
        ([(120.0, 5, 5), (200.0, 5, 0)], 19.0),
        ([(200.0, 4, 0)], math.inf),
        ([(200.0, 5, 0)], 0.0),
    ],
    ids=["too-much-for-40-s", "refused-for-20-s", "never-near", "at-once"],
)
def test_a_drop_is_followed_when_starts_and_refusals_are_near(after: list[Any], expected: float):
    found = judge.figures(log(world(TEN, FIVE), (100.0, 10, 0), *after))
    assert found["after_drop"] == pytest.approx(expected, abs=1.0)
    assert "after_rise" not in found


def test_a_rise_is_followed_when_starts_are_near_again():
    phases = (
        lab.Phase(quota=ServerQuota(300), latency=EVEN),
        lab.Phase(at=100.0, quota=ServerQuota(600), latency=EVEN),
    )
    found = judge.figures(log(world(*phases), (125.0, 5, 0), (200.0, 10, 0)))
    assert found["after_rise"] == pytest.approx(23.0, abs=1.0)
    assert found["share"] == pytest.approx((5 * 65 + 10 * 75) / (5 * 40 + 10 * 100))
    assert "after_drop" not in found


def test_the_reference_for_latency_is_the_median_at_eighty_percent_load():
    knee, latency = 4, lab.Latency(2.0, 0.4)
    draws, at, sent = random.Random(5), 0.0, []
    for _ in range(20_000):
        at += draws.expovariate(0.8 * knee / latency.mean)
        sent.append((at, latency.median * math.exp(draws.gauss(0.0, 0.4))))
    server, _ = served(world(lab.Phase(knee=knee, latency=SHARING), seconds=1e6), sent, until=1e6)
    seen = median(seconds for _, seconds in server.answered[0])
    assert judge.unhurried(lab.Phase(knee=knee, latency=latency)) == pytest.approx(seen, rel=0.05)
    assert seen > 1.3 * latency.median
    for calm in (
        lab.Phase(knee=64, latency=latency),
        lab.Phase(knee=4, quota=ServerQuota(60), latency=latency),  # one a second: half of what it could
        lab.Phase(ceiling=4, latency=latency),
    ):
        assert judge.unhurried(calm) == pytest.approx(latency.median, rel=0.1)


def test_an_outage_counts_nowhere_and_what_follows_is_a_rise():
    down = lab.Phase(at=100.0, down=True)
    back = lab.Phase(at=120.0, quota=ServerQuota(600), latency=EVEN)
    found = judge.figures(log(world(TEN, down, back), (100.0, 10, 0), (120.0, 0, 99), (200.0, 10, 0)))
    assert found["share"] == pytest.approx(1.0)
    assert found["refused"] == found["refused_all"] == 0.0
    assert found["after_rise"] == 0.0


def test_a_cold_server_is_judged_when_it_is_warm():
    phases = (lab.Phase(knee=5, latency=EVEN), lab.Phase(at=100.0, knee=10, cold=20.0, latency=EVEN))
    found = judge.figures(log(world(*phases), (100.0, 5, 0), (120.0, 0, 0), (200.0, 10, 0)))
    assert found["after_rise"] == 0.0


def test_longer_answers_under_the_same_rate_are_a_rise_and_fewer_tokens_left_a_drop():
    long = lab.Latency(10.0, 0.0)
    quota = ServerQuota(600)
    rises = world(lab.Phase(quota=quota, latency=EVEN), lab.Phase(at=100.0, quota=quota, latency=long))
    drops = world(lab.Phase(knee=9, latency=EVEN), lab.Phase(at=100.0, knee=9, latency=long))
    assert judge.changes(rises) == {"after_drop": [], "after_rise": [1]}
    assert judge.changes(drops) == {"after_drop": [1], "after_rise": []}


def test_a_unit_that_changes_is_weighed_by_time():
    ceiling = lab.Phase(at=130.0, ceiling=4, latency=EVEN)
    found = judge.figures(log(world(TEN, ceiling), (130.0, 10, 0), (200.0, 2, 0)))
    assert found["share"] == pytest.approx(0.5 * 1.0 + 0.5 * 0.5)


def test_goals_follow_the_scenario_and_the_oracle():
    slow = lab.Latency(10.0, 0.0)
    scenario = world(
        lab.Phase(quota=ServerQuota(60), latency=slow), lab.Phase(at=90.0, quota=ServerQuota(30), latency=slow)
    )
    plain = judge.goals(scenario, None)
    assert plain == {
        "share": 0.97, "refused": 0.02, "refused_all": 0.02, "rise_90": 50.0, "p50_ratio": 1.5, "after_drop": 15.0,
    }  # fmt: skip
    good = {"share": 1.0, "refused": 0.0, "refused_all": 0.0, "rise_90": 0.0, "p50_ratio": 1.0, "after_drop": 0.0}
    assert judge.goals(scenario, good) == plain
    poor = judge.goals(scenario, {**good, "share": 0.9, "refused": 0.05})
    assert poor == {**plain, "share": pytest.approx(0.873), "refused": pytest.approx(0.0515, abs=1e-4)}
    two = judge.goals(world(TEN, starts=(0.0, 0.0)), None)
    assert (two["share"], two["least"], two["rise_90"]) == (0.95, 0.35, 20.0)


def test_a_summary_has_the_median_and_the_worst():
    runs = [{"share": 0.9, "refused": 0.1}, {"share": 0.8, "refused": 0.3}, {"share": 1.0, "refused": 0.2}]
    assert judge.summary(runs) == {"share": (0.9, 0.8), "refused": (0.2, 0.3)}


def calls(*rows: tuple[float, float, bool]) -> list[Any]:
    return [over_http.Seen(*one) for one in rows]


def judged(rows: list[Any], unit: str, capacity: float) -> Any:
    case = over_http.Case("test", lambda: None, unit, capacity)
    return over_http.judge(rows, case, 2.0, 6.0)


def test_a_rate_over_http_is_judged_by_the_starts_that_were_taken_after_the_warm_up():
    rows = calls(
        (10.0, 11.0, True), (12.0, 14.0, True), (13.0, 13.0, False), (15.9, math.inf, True), (16.0, 17.0, True)
    )
    assert judged(rows, "rate", 1.0) == {
        "share": 0.5, "pieces": [], "refused": 0.3333, "p50": 2.0, "arrivals": 3,
    }  # fmt: skip
    case = over_http.Case("test", lambda: None, "rate", 1.0)
    assert over_http.judge(rows, case, 2.0, 25.0)["pieces"] == [0.4, 0.0]


def test_a_width_over_http_is_judged_by_the_places_that_were_in_service_and_none_above_it():
    rows = calls((10.0, 14.0, True), (10.0, 13.0, True), (11.0, math.inf, True), (12.0, 15.0, False))
    # from 12 on: three, but two count; two from 13 on; one from 14 to 16
    assert judged(rows, "places", 2)["share"] == (2 * 1 + 2 * 1 + 1 * 2) / 8


# the worlds and the controls


def short(name: str, seconds: float = 250.0) -> Any:
    (scenario,) = scenarios.chosen([name])
    fields = {field: getattr(scenario, field) for field in scenario.__struct_fields__}
    phases = tuple(phase for phase in scenario.phases if phase.at < seconds)
    return lab.Scenario(**{**fields, "phases": phases, "seconds": seconds})


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("bucket_30", 0.99),
        ("sliding_30_of_1s", 0.945),
        ("fixed_60_of_10s", 0.99),
        ("ceiling_64_529_no_hint", 0.97),
        ("bucket_10_halved", 0.99),
        ("two_clients_one_late", 0.99),
        ("bucket_30_outage", 0.99),
        ("bucket_30_bad_requests", 0.98),
    ],
)
def test_the_oracle_uses_what_there_is_and_is_hardly_refused(name: str, least: float):
    trace = play(short(name, 450.0), "oracle")
    found = judge.figures(trace)
    assert found["share"] > least
    assert found["refused_all"] <= (0.002 if "bad" in name else 0.0001)
    assert found["p50_ratio"] < 1.1
    if name == "bucket_30_outage":
        assert trace.rows[719].arrivals - trace.rows[601].arrivals < 20  # it knows that nobody is there


def test_the_oracle_waits_until_a_window_has_room_after_a_cut():
    phases = [lab.Phase(at=at, quota=ServerQuota(amount)) for at, amount in ((0.0, 600), (120.0, 300))]
    assert judge.figures(play(world(*phases, retry_after=None), "oracle"))["refused_all"] < 0.02


def test_the_oracle_is_refused_nothing_by_a_bucket_without_a_burst():
    found = judge.figures(play(world(lab.Phase(quota=scenarios.bucket(2, 0.5)), path=0.05), "oracle"))
    assert found["refused_all"] == 0.0
    assert found["share"] > 0.9


def test_the_oracle_slows_down_before_a_cut():
    phases = scenarios.steps((0, scenarios.bucket(60, 0.1)), (100.3, scenarios.bucket(6, 0.3)))
    trace = play(world(*phases, path=0.05), "oracle")
    assert trace.rows[-1].refused == 0
    assert judge.figures(trace)["share"] > 0.97


def test_a_fixed_limit_drowns_a_rate_quota_in_refusals():
    found = judge.figures(play(short("bucket_10"), "fixed_100"))
    assert found["share"] > 0.98
    assert found["refused"] > 0.6


def test_a_fixed_limit_released_while_backing_off_is_refused_nearly_always_without_hints():
    scenario = world(lab.Phase(quota=scenarios.bucket(10), latency=scenarios.LONG), retry_after=None, window=4_000)
    found = judge.figures(play(scenario, "fixed_100"))
    assert found["share"] > 0.98
    assert found["refused"] > 0.8


def test_the_plainest_aimd_is_refused_at_a_quota_and_floods_a_server_that_never_refuses():
    quota, knee = (judge.figures(play(short(name), "aimd_per_reply")) for name in ("bucket_30", "knee_64"))
    assert quota["share"] > 0.98
    assert 0.04 < quota["refused"] < 0.12
    assert knee["share"] > 0.98
    assert knee["p50_ratio"] > 10


def test_random_scenarios_come_from_their_number_and_a_word():
    made = [scenarios.random_scenario(number) for number in range(200)]
    assert made == [scenarios.random_scenario(number) for number in range(200)]
    assert all(one.phases != other.phases for one, other in itertools.pairwise(made))
    assert scenarios.random_scenario(0, "x").phases != made[0].phases
    assert {len(one.phases) for one in made} == {1, 2, 3}
    assert {phase.capacity(phase.at)[0] for one in made for phase in one.phases} == {"requests", "tokens", "places"}


def test_every_scenario_has_a_name_of_its_own():
    names = [scenario.name for scenario in scenarios.SCENARIOS]
    assert len(set(names)) == len(names)
    assert scenarios.chosen([]) == list(scenarios.SCENARIOS)
    assert [one.name for one in scenarios.chosen(scenarios.QUICK)] == list(scenarios.QUICK)
    with pytest.raises(SystemExit, match="nowhere"):
        scenarios.chosen(["nowhere"])


def test_a_controller_is_found_by_name_or_by_its_place():
    assert controllers.find("fixed_7")(None, None, 0).initial.limit == 7
    assert controllers.find("_lab_controllers:AimdPerReply")(None, None, 0).initial.limit == 20
    assert controllers.find("_lab_controllers:Nothing") is None
    with pytest.raises(SystemExit, match="magic"):
        controllers.find("magic")


@pytest.mark.parametrize("controller", ["fixed_5", "oracle"], ids=["without-a-rate", "with-a-rate"])
def test_a_picture_is_written(controller: str, tmp_path: Path):
    pytest.importorskip("matplotlib")
    down, back = lab.Phase(at=10.0, down=True), lab.Phase(at=20.0, knee=4, cold=5.0)
    trace = play(world(TEN, down, back, seconds=40.0), controller)
    picture.draw(trace, "a title", tmp_path / "one.png")
    assert (tmp_path / "one.png").read_bytes().startswith(b"\x89PNG")
