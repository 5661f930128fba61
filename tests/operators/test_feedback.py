"""feedback: a machine's settings from the signals of attempts."""

from typing import Any

import pytest
import reactivex as rx
from reactivex import operators as ops

from rxllm.errors import ConfigError
from rxllm.messages import Setting, Signal
from rxllm.operators import feedback
from rxllm.testing import VirtualScheduler, record


class Steps:
    """A machine that takes one place off at each refusal, and gives one back each ten seconds."""

    def __init__(self) -> None:
        self.limit = 4
        self.due: float | None = None

    @property
    def initial(self) -> Setting:
        return Setting(limit=4, rate=None, reason="begun")

    def on_signal(self, signal: Signal) -> Setting | None:
        if self.due is None:
            self.due = signal.at + 10.0
        if signal.kind == "fatal":
            raise RuntimeError("no idea")
        if signal.kind == "refused":
            self.limit -= 1
            return Setting(limit=self.limit, rate=None, reason="refused")
        return None

    def on_timer(self, now: float) -> Setting | None:
        self.due = now + 10.0
        self.limit += 1
        return Setting(limit=self.limit, rate=None, reason="quiet")


def signal(at: float, kind: Any = "ok") -> Signal:
    return Signal(at=at, kind=kind, in_flight=1, epoch=0)


def source(*signals: Signal, end: float = 100.0) -> rx.Observable[Signal]:
    timed = [rx.timer(one.at).pipe(ops.map(lambda _tick, one=one: one)) for one in signals]
    return rx.merge(*timed, rx.timer(end).pipe(ops.ignore_elements()))


def seen(recorder: Any) -> list[tuple[float, Any]]:
    return [
        (event.at, (event.value.limit, event.value.reason) if event.kind == "next" else event.kind)
        for event in recorder.events
    ]


def test_feedback_emits_the_initial_setting_and_each_change_at_its_time() -> None:
    scheduler = VirtualScheduler()
    stream = source(signal(1.0), signal(2.0, "refused"), signal(23.0), end=25.0).pipe(feedback(Steps()))
    assert seen(record(scheduler, stream)) == [
        (0.0, (4, "begun")),
        (2.0, (3, "refused")),
        (11.0, (4, "quiet")),
        (21.0, (5, "quiet")),
        (25.0, "completed"),
    ]
    assert scheduler.seconds() == 25.0  # no timer is left


def test_feedback_passes_an_error_of_the_signals_on_and_leaves_no_timer() -> None:
    scheduler = VirtualScheduler()
    failing = rx.concat(source(signal(1.0), end=3.0), rx.throw(ValueError("gone")))
    recorder = record(scheduler, failing.pipe(feedback(Steps())))
    assert [event.kind for event in recorder.events] == ["next", "error"]
    assert scheduler.seconds() == 3.0


def test_feedback_fails_with_what_the_machine_raises_and_lets_the_signals_go() -> None:
    scheduler = VirtualScheduler()
    gone: list[bool] = []
    signals = source(signal(1.0, "fatal")).pipe(ops.finally_action(lambda: gone.append(True)))
    recorder = record(scheduler, signals.pipe(feedback(Steps())), until=5.0)
    assert recorder.events[-1].kind == "error"
    assert str(recorder.events[-1].value) == "no idea"
    assert gone == [True]


@pytest.mark.parametrize("at", [0.0, 5.0, 15.0])
def test_a_dispose_cancels_the_signals_and_the_timer(at: float) -> None:
    scheduler = VirtualScheduler()
    gone: list[bool] = []
    signals = source(signal(1.0)).pipe(ops.finally_action(lambda: gone.append(True)))
    recorder = record(scheduler, signals.pipe(feedback(Steps())), until=at)
    assert recorder.subscription is not None
    recorder.subscription.dispose()
    recorder.subscription.dispose()
    count = len(recorder.events)
    scheduler.run()
    assert gone == [True]
    assert scheduler.seconds() <= 15.0
    assert len(recorder.events) == count


def test_a_dispose_at_the_initial_setting_leaves_nothing_behind() -> None:
    gone: list[bool] = []
    signals: rx.Observable[Signal] = rx.never().pipe(ops.finally_action(lambda: gone.append(True)))
    recorder = record(VirtualScheduler(), signals.pipe(feedback(Steps()), ops.take(1)))
    assert [event.kind for event in recorder.events] == ["next", "completed"]
    assert gone == [True]


def test_a_machine_goes_on_with_what_it_knows_in_another_subscription() -> None:
    scheduler, machine = VirtualScheduler(), Steps()
    operator = feedback(machine)
    record(scheduler, source(signal(1.0, "refused"), end=2.0).pipe(operator))
    assert machine.limit == 3
    again = record(scheduler, source(signal(1.0, "refused"), end=2.0).pipe(operator))
    assert again.values[-1].limit == 2


def test_feedback_refuses_what_is_no_machine() -> None:
    with pytest.raises(ConfigError, match="machine must have on_signal and on_timer"):
        feedback(5)  # type: ignore[arg-type]
