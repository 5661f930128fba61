"""The loop from signals to settings: machines and stock operators as controllers of a gate."""

import asyncio
import logging
import pickle
from typing import Any

import pytest
import reactivex as rx
from reactivex import operators as ops

import rxllm
from rxllm import errors, events
from rxllm.errors import ConfigError, OverloadedError, RateLimitedError, ServerError
from rxllm.feedback import kind_of
from rxllm.gate import Gate, Lease
from rxllm.messages import Setting, Signal
from rxllm.testing import VirtualScheduler


class Steps:
    """A machine that takes one place off at each refusal, and gives one back each ten seconds."""

    def __init__(self, limit: int = 4) -> None:
        self.limit = limit
        self.due: float | None = None
        self.seen: list[Signal] = []
        self.looks: list[float] = []

    @property
    def initial(self) -> Setting:
        return Setting(limit=4, rate=None, reason="begun")

    def on_signal(self, signal: Signal) -> Setting | None:
        self.seen.append(signal)
        if self.due is None:
            self.due = signal.at + 10.0
        if signal.kind == "refused":
            self.limit -= 1
            return Setting(limit=self.limit, rate=None, reason="refused")
        return None

    def on_timer(self, now: float) -> Setting | None:
        self.looks.append(now)
        self.due = now + 10.0
        self.limit += 1
        return Setting(limit=self.limit, rate=None, reason="quiet")


class Asker:
    """Somebody who asks for admission."""

    def __init__(self) -> None:
        self.lease: Lease | None = None

    def admitted(self, lease: Lease) -> None:
        self.lease = lease

    def turned_away(self, error: Exception) -> None:
        raise AssertionError(error)


def ask(gate: Gate, scheduler: VirtualScheduler) -> Asker:
    asker = Asker()
    gate.enter(gate.apply(scheduler, gate.amounts({}), asker))
    return asker


def leases(*askers: Asker) -> list[Lease]:
    return [asker.lease for asker in askers if asker.lease is not None]


def test_a_machine_sets_the_limit_by_what_attempts_do() -> None:
    scheduler, machine = VirtualScheduler(), Steps()
    gate = Gate(concurrency=machine)
    assert gate.limit == 4
    askers = [ask(gate, scheduler) for _ in range(6)]
    assert len(leases(*askers)) == 4
    scheduler.run(2.0)
    leases(askers[0])[0].settle("refused", None, RateLimitedError("slow down", 429, 7.0))
    scheduler.run(2.0)
    assert gate.limit == 3
    assert len(leases(*askers)) == 4  # three are on the wire, so no other one starts
    leases(askers[1])[0].settle("answered", {"tokens": 30.0})
    scheduler.run(2.0)
    assert [(signal.kind, signal.at, signal.in_flight, signal.epoch) for signal in machine.seen] == [
        ("start", 0.0, 1, 0),
        ("start", 0.0, 2, 0),
        ("start", 0.0, 3, 0),
        ("start", 0.0, 4, 0),
        ("refused", 2.0, 1, 0),
        ("ok", 2.0, 2, 0),
        ("start", 2.0, 3, 1),
    ]
    refused, answered = machine.seen[4:6]
    assert (refused.seconds, refused.retry_after, refused.binding) == (2.0, 7.0, True)
    assert (answered.tokens, answered.retry_after) == (30.0, None)


def test_every_change_is_told_with_its_reason_and_kept() -> None:
    scheduler, gate = VirtualScheduler(), Gate(concurrency=Steps())
    told: list[events.Event] = []
    gate.events.pipe(ops.filter(lambda event: isinstance(event, events.SettingChanged))).subscribe(told.append)
    first, _ = ask(gate, scheduler), ask(gate, scheduler)
    leases(first)[0].settle("refused")
    scheduler.run(25.0)
    assert [(change.at, change.limit, change.reason) for change in gate.statistics().settings] == [
        (0.0, 3, "refused"),
        (10.0, 4, "quiet"),
        (20.0, 5, "quiet"),
    ]
    assert tuple(told) == gate.statistics().settings


def test_a_hint_does_not_stop_the_clock_of_a_controller() -> None:
    scheduler, gate = VirtualScheduler(), Gate(concurrency=Steps())
    leases(ask(gate, scheduler))[0].settle("refused")
    gate.pause(89.0)
    assert leases(ask(gate, scheduler))


def test_a_machine_looks_when_nothing_is_admitted_and_not_when_nobody_is_there() -> None:
    scheduler, machine = VirtualScheduler(), Steps()
    gate = Gate(concurrency=machine)
    asker = ask(gate, scheduler)
    scheduler.run(35.0)
    assert machine.looks == [10.0, 20.0, 30.0]
    leases(asker)[0].settle("answered")
    scheduler.run()
    assert scheduler.seconds() == 35.0  # no timer is left
    scheduler.run(100.0)
    ask(gate, scheduler)
    scheduler.run(101.0)
    assert machine.looks[3:] == [100.0]  # what was due meanwhile


def test_an_attempt_that_is_given_up_tells_nothing() -> None:
    scheduler, machine = VirtualScheduler(), Steps()
    gate = Gate(concurrency=machine)
    leases(ask(gate, scheduler))[0].settle("cancelled")
    assert [signal.kind for signal in machine.seen] == ["start"]


@pytest.mark.parametrize(
    ("ending", "error", "kind"),
    [
        ("answered", None, "ok"),
        ("answered", errors.ValidationError("x"), "invalid"),
        ("refused", RateLimitedError("x", 429), "refused"),
        ("refused", OverloadedError("x", 529), "overloaded"),
        ("refused", ServerError("x", 503), "overloaded"),
        ("failed", ServerError("x", 500), "fault"),
        ("timed_out", errors.TimeoutError("x", phase="total"), "fault"),
        ("unsent", errors.ConnectionError("x"), "fault"),
        ("failed", errors.AuthError("x", 401), "fatal"),
        ("failed", errors.DecodeError("x"), "fault"),
        ("cancelled", None, None),
    ],
)
def test_an_end_has_a_class_by_what_it_says_of_the_server(
    ending: Any, error: Exception | None, kind: str | None
) -> None:
    assert kind_of(ending, error) == kind


# a controller of stock operators


def halving(signals: rx.Observable[Signal]) -> rx.Observable[Setting]:
    return signals.pipe(
        ops.filter(lambda signal: signal.kind == "refused"),
        ops.scan(lambda limit, _signal: max(1, limit // 2), 16),
        ops.map(lambda limit: Setting(limit=limit, rate=None, reason="refused")),
    )


def test_stock_operators_make_a_controller() -> None:
    scheduler, gate = VirtualScheduler(), Gate(concurrency=halving)
    assert gate.limit == 20
    askers = [ask(gate, scheduler) for _ in range(3)]
    limits = []
    for lease in leases(*askers):
        lease.settle("refused")
        limits.append(gate.limit)
    assert limits == [8, 4, 2]


def test_a_controller_with_a_period_stands_still_while_nobody_is_there() -> None:
    def ticking(signals: rx.Observable[Signal]) -> rx.Observable[Setting]:
        ticks = rx.interval(1.0).pipe(ops.map(lambda n: Setting(limit=n + 1, rate=5.0, reason="tick")))
        return rx.merge(ticks, signals.pipe(ops.ignore_elements()))

    scheduler, gate = VirtualScheduler(), Gate(concurrency=ticking)
    scheduler.run(10.0)
    asker = ask(gate, scheduler)
    scheduler.run(12.5)
    assert (gate.limit, gate.statistics().rate) == (2, 5.0)
    leases(asker)[0].settle("answered")
    scheduler.run()
    assert scheduler.seconds() == 12.5
    ask(gate, scheduler)
    scheduler.run(13.6)
    assert gate.limit == 3


@pytest.mark.parametrize("where", ["at once", "at a signal", "as an error"])
def test_when_a_controller_fails_its_last_setting_holds(where: str, caplog: pytest.LogCaptureFixture) -> None:
    def broken(signals: rx.Observable[Signal]) -> rx.Observable[Setting]:
        if where == "at once":
            raise RuntimeError("no idea")
        if where == "as an error":
            return signals.pipe(ops.map(lambda _signal: 1 // 0))
        return rx.create(lambda observer, _scheduler: signals.subscribe(lambda _signal: 1 // 0, observer.on_error))

    scheduler, gate = VirtualScheduler(), Gate(concurrency=broken)
    with caplog.at_level(logging.WARNING, "rxllm.feedback"):
        askers = [ask(gate, scheduler) for _ in range(3)]
    assert len(leases(*askers)) == 3
    assert gate.limit == 20
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "the controller failed, and its last setting holds"
    ]


@pytest.mark.parametrize(
    "setting", [5, Setting(limit=0, rate=None, reason="none"), Setting(limit=1, rate=-1.0, reason="back")]
)
@pytest.mark.parametrize("when", ["at a signal", "at a time"])
def test_what_is_no_good_setting_is_not_taken_and_ends_the_controller(
    setting: Any, when: str, caplog: pytest.LogCaptureFixture
) -> None:
    def bad(signals: rx.Observable[Signal]) -> rx.Observable[Setting]:
        occasions: rx.Observable[Any] = signals if when == "at a signal" else rx.interval(1.0)
        return occasions.pipe(ops.map(lambda _occasion: setting))

    scheduler, gate = VirtualScheduler(), Gate(concurrency=bad)
    askers = [ask(gate, scheduler) for _ in range(3)]
    scheduler.run(5.0)
    assert len(leases(*askers)) == 3
    assert gate.limit == 20
    assert [record.name for record in caplog.records if record.levelno >= logging.WARNING] == ["rxllm.feedback"]


def test_a_controller_that_completes_leaves_its_last_setting() -> None:
    def once(signals: rx.Observable[Signal]) -> rx.Observable[Setting]:
        return signals.pipe(ops.take(1), ops.map(lambda _signal: Setting(limit=2, rate=None, reason="once")))

    scheduler, gate = VirtualScheduler(), Gate(concurrency=once)
    askers = [ask(gate, scheduler) for _ in range(4)]
    assert gate.limit == 2
    assert len(leases(*askers)) == 2


def test_a_machine_goes_on_with_what_it_knows_on_another_loop() -> None:
    machine = Steps()
    gate = Gate(concurrency=machine)

    async def refused() -> None:
        from rxllm.clock import loop_clock

        asker = Asker()
        gate.enter(gate.apply(loop_clock(asyncio.get_running_loop()), gate.amounts({}), asker))
        leases(asker)[0].settle("refused")

    asyncio.run(refused())
    asyncio.run(refused())
    assert gate.limit == 2
    assert [signal.epoch for signal in machine.seen] == [0, 0, 1, 1]


def test_a_gate_with_a_controller_is_pickled_with_it() -> None:
    gate = pickle.loads(pickle.dumps(Gate("5/minute", concurrency=halving)))
    assert gate.limit == 20


def test_a_controller_and_a_rate_are_too_much() -> None:
    with pytest.raises(ConfigError, match="rate must not be given besides a controller"):
        Gate(concurrency=halving, rate=5.0)
    with pytest.raises(ConfigError, match="concurrency must be a whole number >= 1 or None, got '5'"):
        Gate(concurrency="5")  # type: ignore[arg-type]


def test_a_pipeline_runs_through_a_controlled_gate() -> None:
    machine = Steps()
    gate = Gate(concurrency=machine)
    outcomes = rxllm.collect(
        rxllm.from_iterable(range(50)).pipe(rxllm.call(rxllm.function(lambda n: n + 1), gate=gate))
    )
    assert sorted(outcome.value for outcome in outcomes) == list(range(1, 51))
    assert [signal.kind for signal in machine.seen].count("ok") == 50
    assert max(signal.in_flight for signal in machine.seen) <= 4
