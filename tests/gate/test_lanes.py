"""Weighted classes at one gate, what a gate tells, and quotas that do not let wait."""

import asyncio
import pickle
from pathlib import Path
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given
from hypothesis import strategies as st
from reactivex import operators as ops

from rxllm import events
from rxllm.clock import loop_clock
from rxllm.errors import CallError, ConfigError, QuotaExhaustedError
from rxllm.gate import Gate, Lane, Lease, lane_of
from rxllm.operators import admit
from rxllm.policies.headers import Limits, Truth
from rxllm.policies.quota import Quota
from rxllm.testing import VirtualScheduler


class Asker:
    """Somebody who asks for admission."""

    def __init__(self, log: list["Asker"], name: str) -> None:
        self.log = log
        self.name = name
        self.lease: Lease | None = None
        self.error: Exception | None = None

    def admitted(self, lease: Lease) -> None:
        self.lease = lease
        self.log.append(self)

    def turned_away(self, error: CallError | ConfigError) -> None:
        self.error = error


class Desk:
    """A gate in virtual time."""

    def __init__(self, *quotas: Quota | str, **options: Any) -> None:
        self.scheduler = VirtualScheduler()
        self.gate = Gate(*quotas, **options)
        self.log: list[Asker] = []
        self.told: list[events.Event] = []
        self.gate.events.subscribe(self.told.append)

    def ask(self, lane: Lane | None = None, **cost: float) -> Asker:
        asker = Asker(self.log, "main" if lane is None else lane.name)
        self.gate.enter(self.gate.apply(self.scheduler, self.gate.amounts(cost), asker, None, lane))
        return asker

    def run(self, until: float) -> None:
        self.scheduler.run(until)


def exact(limit: float, per: float, unit: str = "requests", **options: Any) -> Quota:
    return Quota(limit, per=per, unit=unit, margin=0.0, **options)


# lanes


@given(weight=st.sampled_from([1.0, 2.0, 3.0, 9.0]), large=st.integers(1, 20), small=st.integers(1, 20))
def test_lanes_share_a_quota_of_tokens_by_weight_whatever_their_attempts_cost(
    weight: float, large: int, small: int
) -> None:
    desk = Desk(exact(100, 1.0, "tokens"), exact(1000, 1.0))
    heavy, light = desk.gate.lane("heavy", weight=weight), desk.gate.lane("light")
    desk.ask(tokens=100)
    for _ in range(1000):
        desk.ask(heavy, tokens=large)
        desk.ask(light, tokens=small)
    desk.run(9.5)
    used = {"heavy": 0.0, "light": 0.0}
    for asker in desk.log[1:]:
        used[asker.name] += large if asker.name == "heavy" else small
    left = {lane.name: lane.waiting for lane in desk.gate.statistics().lanes}
    assert sum(used.values()) >= 9 * (101 - min(large, small))  # the rest of a window that neither fits into
    if left["heavy"] and left["light"]:
        total, slack = sum(used.values()), 2 * (large + small)
        assert used["light"] >= total / (weight + 1) - slack
        assert (
            used["heavy"] >= total * weight / (weight + 1) - slack - 10 * large
        )  # into the rest only the small ones fit


def test_lanes_share_a_concurrency_limit_by_weight() -> None:
    desk = Desk(concurrency=1)
    lanes = [desk.gate.lane("grader", weight=3), desk.gate.lane("generator")]
    for lane in lanes * 40:
        desk.ask(lane)
    for _ in range(39):
        lease = desk.log[-1].lease
        assert lease is not None
        lease.settle("answered")
        desk.run(desk.scheduler.seconds())
    assert [asker.name for asker in desk.log].count("grader") == 30


def test_a_lane_alone_gets_everything() -> None:
    desk = Desk(exact(10, 1.0))
    lane = desk.gate.lane("small", weight=0.01)
    desk.gate.lane("large", weight=100)
    for _ in range(30):
        desk.ask(lane)
    desk.run(2.5)
    assert len(desk.log) == 30


def test_a_lane_that_does_not_fit_is_passed_by_another_one_and_then_waited_for() -> None:
    desk = Desk(exact(100, 10.0, "tokens"))
    large, small = desk.gate.lane("large", weight=10), desk.gate.lane("small")
    desk.ask(large, tokens=60)
    wanted = desk.ask(large, tokens=60)
    for _ in range(60):
        desk.ask(small, tokens=1)
    desk.run(1.0)
    assert wanted.lease is None
    # six in its own right, as the large lane had used more for its weight, and 32 that passed
    assert len([asker for asker in desk.log if asker.name == "small"]) == 6 + 32
    desk.run(10.5)
    assert wanted.lease is not None


def test_a_retry_keeps_its_place_in_its_lane() -> None:
    desk = Desk(concurrency=1)
    lane = desk.gate.lane("one")
    source: rx.Observable[int] = rx.throw(ValueError("once"))
    stream = source.pipe(admit(lane), ops.catch(lambda _error, _source: rx.empty()))
    stream.subscribe(scheduler=desk.scheduler)
    desk.run(1.0)
    assert {line.name: line.admitted for line in desk.gate.statistics().lanes} == {"main": 0, "one": 1}


def test_a_pipeline_takes_a_gate_or_a_lane_and_nothing_else() -> None:
    gate = Gate()
    lane = gate.lane("grader", weight=2)
    assert lane_of(gate) is gate.main
    assert lane_of(lane) is lane
    with pytest.raises(ConfigError, match="gate must be a Gate, got 5"):
        admit(5)  # type: ignore[arg-type]


def test_a_lane_is_found_by_its_name_and_may_be_weighed_anew() -> None:
    gate = Gate()
    lane = gate.lane("grader", weight=2)
    assert gate.lane("grader", weight=5).line is lane.line
    assert lane.weight == 5


@pytest.mark.parametrize(
    ("name", "weight", "message"),
    [
        ("", 1, "name must be a string"),
        ("x", 0, "weight must be a finite number > 0"),
        ("x", "1", "weight must be a finite number"),
    ],
)
def test_a_bad_lane_is_refused(name: str, weight: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Gate().lane(name, weight=weight)


def test_a_lane_is_pickled_with_its_gate() -> None:
    gate = Gate("5/minute", concurrency=3)
    one, other = pickle.loads(pickle.dumps((gate.lane("a", weight=2), gate.lane("b"))))
    assert one.gate is other.gate
    assert repr(one) == "Gate('5 requests per 60 seconds', concurrency=3).lane('a', weight=2)"


# quotas that do not let wait


def test_a_quota_that_does_not_let_wait_turns_away_with_the_time_that_it_would_have_taken() -> None:
    desk = Desk(exact(2, 86_400.0, on_exhausted="fail"))
    askers = [desk.ask() for _ in range(4)]
    desk.run(10.0)
    assert [asker.lease is not None for asker in askers] == [True, True, False, False]
    error = askers[3].error
    assert isinstance(error, QuotaExhaustedError)
    assert error.halts
    assert error.retry_after == pytest.approx(86_400)
    assert str(error) == "the quota 2 requests per 86400 seconds is used up for 86,400.0 s"
    assert desk.gate.statistics().waiting == 0


def test_one_turned_away_lets_a_smaller_one_start() -> None:
    desk = Desk(exact(10, 60.0, "tokens", on_exhausted="fail"))
    first, large, small = desk.ask(tokens=6), desk.ask(tokens=5), desk.ask(tokens=4)
    desk.run(1.0)
    assert (first.error, small.error) == (None, None)
    assert small.lease is not None
    assert isinstance(large.error, QuotaExhaustedError)


def test_a_quota_that_nobody_prices_halts_the_stream() -> None:
    with pytest.raises(ConfigError, match="counts tokns, and the cost names only requests") as caught:
        Gate("5 tokns/minute").amounts({"requests": 1})
    assert caught.value.halts


# events


def test_a_gate_tells_of_starts_and_ends() -> None:
    desk = Desk(concurrency=1)
    first, second = desk.ask(), desk.ask()
    desk.run(2.0)
    assert first.lease is not None
    first.lease.settle("refused")
    desk.run(3.0)
    assert second.lease is not None
    assert desk.told == [
        events.Admitted(at=0.0, waited=0.0, in_flight=1),
        events.Ended(at=2.0, ending="refused", seconds=2.0, in_flight=0),
        events.Admitted(at=2.0, waited=2.0, in_flight=1),
    ]


def test_a_gate_tells_when_a_quota_suspends_and_when_it_goes_on() -> None:
    quota = exact(1, 3600.0)
    desk = Desk(quota)
    desk.ask()
    desk.run(600.0)
    desk.ask()
    desk.run(700.0)
    assert desk.gate.statistics().suspended == pytest.approx(100.0)
    desk.run(4000.0)
    told = [event for event in desk.told if not isinstance(event, events.Admitted)]
    assert told == [
        events.Suspended(at=600.0, quota=quota, seconds=3000.0),
        events.Resumed(at=3600.0, seconds=3000.0),
    ]
    assert desk.gate.suspended() == 3000.0


def test_a_wait_of_a_minute_is_no_suspension() -> None:
    desk = Desk(exact(1, 60.0))
    desk.ask()
    desk.ask()
    desk.run(100.0)
    assert desk.gate.suspended() == 0.0


def test_a_suspension_ends_when_nobody_waits_any_more() -> None:
    desk = Desk(exact(1, 3600.0))
    desk.ask()
    waiter = desk.gate.apply(desk.scheduler, desk.gate.amounts({}), Asker(desk.log, "gone"))
    desk.gate.enter(waiter)
    desk.run(50.0)
    waiter.cancel()
    desk.run(90.0)
    assert desk.gate.suspended() == 50.0
    assert [event for event in desk.told if isinstance(event, events.Resumed)] == [
        events.Resumed(at=50.0, seconds=50.0)
    ]


def test_a_gate_tells_of_pauses_settings_and_what_it_learned() -> None:
    desk = Desk()
    desk.ask()
    desk.gate.pause(60.0)
    desk.gate.pause(1.0)  # shorter: changes nothing
    desk.gate.set(limit=3, reason="goodput")
    desk.gate.set()
    truth = Truth(unit="requests", limit=100.0, remaining=99.0, reset=1.0, window=None)
    desk.gate.observe(Limits(truths=(truth,), malformed=0), 0.0)
    desk.run(1.0)
    assert desk.told[1:] == [
        events.Paused(at=0.0, seconds=2.0),
        events.SettingChanged(at=0.0, limit=3, rate=None, reason="goodput"),
        events.Learned(at=0.0, quota=Quota(100, per=60.0, strategy="bucket")),
    ]


def test_a_subscriber_that_fails_costs_nobody_a_place(caplog: pytest.LogCaptureFixture) -> None:
    desk = Desk(concurrency=1)

    def broken(_event: events.Event) -> None:
        raise ValueError("no idea")

    desk.gate.events.subscribe(broken)
    first, second = desk.ask(), desk.ask()
    desk.run(1.0)
    assert first.lease is not None
    first.lease.settle("answered")
    desk.run(2.0)
    assert second.lease is not None
    second.lease.settle("answered")
    assert desk.gate.statistics().in_flight == 0
    assert any("a subscriber of the events failed" in record.getMessage() for record in caplog.records)


def test_the_events_end_when_the_gate_is_closed() -> None:
    ended: list[bool] = []
    gate = Gate()
    gate.events.subscribe(on_completed=lambda: ended.append(True))
    gate.close()
    gate.close()
    assert ended == [True]


# loops that end


def test_a_gate_whose_loop_ended_with_attempts_out_is_free_again_and_keeps_what_was_booked() -> None:
    gate = Gate(exact(5, 3600.0), concurrency=1)
    log: list[Asker] = []

    def ask() -> Asker:
        asker = Asker(log, "any")
        clock = loop_clock(asyncio.get_running_loop())
        gate.enter(gate.apply(clock, gate.amounts({}), asker))
        return asker

    async def two() -> None:
        ask()
        ask()

    asyncio.run(two())
    assert gate.statistics().in_flight == 1
    asyncio.run(two())
    told = gate.statistics()
    assert (told.in_flight, told.waiting, told.quotas[0].available) == (1, 1, 3.0)


def test_a_gate_may_be_closed_when_its_loop_is_gone(tmp_path: Path) -> None:
    quota = Quota("5/hour", state=tmp_path / "state")

    async def ask(gate: Gate) -> None:
        gate.enter(gate.apply(loop_clock(asyncio.get_running_loop()), gate.amounts({}), Asker([], "any")))

    first = Gate(quota)
    asyncio.run(ask(first))
    first.close()
    second = Gate(quota)
    asyncio.run(ask(second))  # the file is free
    assert second.statistics().quotas[0].available == 3.0
    second.close()
