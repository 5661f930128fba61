"""Alarms: many timers of the same length for the price of one."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm.clock import Alarm, alarms, loop_clock
from rxllm.testing import VirtualScheduler

LENGTH = 10.0


class Step(NamedTuple):
    """One thing that happens, some time after the one before."""

    after: float  # seconds
    cancels: int | None  # how many alarms ago the one to cancel began; None: begin one
    again: bool = False  # its action begins another one


steps = st.lists(
    st.builds(Step, st.sampled_from([0.0, 0.5, 3.0, 12.0]), st.none() | st.integers(0, 5), st.booleans()), max_size=30
)


@settings(max_examples=300)
@given(steps)
def test_each_rings_once_in_time_and_in_order_unless_it_was_cancelled(plan):
    scheduler = VirtualScheduler()
    shared = alarms(scheduler, LENGTH)
    begun: list[Alarm] = []
    rung: list[tuple[float, float]] = []  # when it began, when it rang
    expected: list[tuple[float, float]] = []
    cancelled: set[int] = set()

    def begin(*, again: bool) -> None:
        at = scheduler.seconds()

        def ring() -> None:
            rung.append((at, scheduler.seconds()))
            if again:
                begin(again=False)

        begun.append(shared.start(ring))

    now = 0.0
    for step in plan:
        now += step.after
        scheduler.run(now)
        if step.cancels is None:
            begin(again=step.again)
        elif step.cancels < len(begun):
            alarm = begun[-1 - step.cancels]
            if alarm.action is not None:
                cancelled.add(id(alarm))
            alarm.cancel()
            alarm.cancel()
    scheduler.run()
    expected = [(alarm.at - LENGTH, alarm.at) for alarm in begun if id(alarm) not in cancelled]
    assert rung == sorted(expected)
    assert scheduler.pending == 0
    assert shared._live == len(shared._queue) == 0


def test_a_thousand_share_one_timer():
    scheduler = VirtualScheduler()
    for n in range(1_000):
        scheduler.run(n / 1_000)
        alarms(scheduler, LENGTH).start(lambda: None)
    assert scheduler.pending == 1


def test_those_that_are_over_do_not_pile_up_behind_a_timer_that_is_minutes_away():
    scheduler = VirtualScheduler()
    shared = alarms(scheduler, 600.0)
    kept = shared.start(lambda: None)
    for _ in range(1_000):
        shared.start(lambda: None).cancel()
    kept.cancel()
    other = shared.start(lambda: None)
    for _ in range(1_000):
        first = shared.start(lambda: None)
        other.cancel()
        other = first
    assert len(shared._queue) <= 2


def test_nothing_is_due_when_all_are_cancelled():
    scheduler = VirtualScheduler()
    shared = alarms(scheduler, LENGTH)
    started = [shared.start(lambda: None) for _ in range(5)]
    for alarm in started:
        alarm.cancel()
    assert scheduler.pending == 0


def test_one_that_raises_does_not_silence_those_after_it():
    scheduler = VirtualScheduler()
    shared = alarms(scheduler, LENGTH)
    rung: list[float] = []

    def fail() -> None:
        raise KeyError("a consumer's bug")

    shared.start(fail)
    shared.start(lambda: rung.append(scheduler.seconds()))
    scheduler.run(3.0)
    shared.start(lambda: rung.append(scheduler.seconds()))
    with pytest.raises(KeyError):
        scheduler.run()
    scheduler.run()
    assert rung == [10.0, 13.0]


def test_one_that_begins_another_does_not_delay_those_after_it():
    scheduler = VirtualScheduler()
    shared = alarms(scheduler, LENGTH)
    rung: list[float] = []
    shared.start(lambda: shared.start(lambda: rung.append(scheduler.seconds())))
    scheduler.run(5.0)
    shared.start(lambda: rung.append(scheduler.seconds()))
    scheduler.run()
    assert rung == [15.0, 20.0]


def test_one_may_cancel_those_after_it_and_begin_another():
    scheduler = VirtualScheduler()
    shared = alarms(scheduler, LENGTH)
    rung: list[float] = []

    def ring() -> None:
        later.cancel()
        shared.start(lambda: rung.append(scheduler.seconds()))

    shared.start(ring)
    later = shared.start(lambda: rung.append(-1.0))
    scheduler.run()
    assert rung == [20.0]
    assert scheduler.pending == 0


def test_lengths_are_apart_and_each_has_one_clockwork():
    scheduler = VirtualScheduler()
    assert alarms(scheduler, 1.0) is alarms(scheduler, 1.0)
    assert alarms(scheduler, 1.0) is not alarms(scheduler, 2.0)
    rung: list[float] = []
    alarms(scheduler, 2.0).start(lambda: rung.append(scheduler.seconds()))
    alarms(scheduler, 1.0).start(lambda: rung.append(scheduler.seconds()))
    scheduler.run()
    assert rung == [1.0, 2.0]


@pytest.mark.parametrize("factory", ["asyncio", "uvloop"])
def test_on_a_real_loop_none_rings_early(factory):
    make = pytest.importorskip("uvloop").new_event_loop if factory == "uvloop" else asyncio.new_event_loop

    async def main() -> None:
        clock = loop_clock(asyncio.get_running_loop())
        rung: list[float] = []
        for _ in range(20):
            begun = clock.seconds()
            alarms(clock, 0.02).start(lambda begun=begun: rung.append(clock.seconds() - begun))
            await asyncio.sleep(0.001)
        async with asyncio.timeout(20):
            while len(rung) < 20:
                await asyncio.sleep(0.005)
        assert min(rung) >= 0.02

    with asyncio.Runner(loop_factory=make) as runner:
        runner.run(main())
