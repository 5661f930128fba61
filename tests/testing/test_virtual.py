"""Virtual time: exact, in order, and never ahead of the test."""

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import reactivex as rx
from hypothesis import example, given, settings
from hypothesis import strategies as st
from reactivex import operators as ops
from reactivex.disposable import SerialDisposable

from rxllm.clock import clock_of, seconds
from rxllm.errors import ConfigError
from rxllm.testing import VirtualScheduler, record

moments = st.lists(st.floats(0, 1e6, allow_nan=False), max_size=30)


@settings(max_examples=60, deadline=None)
@given(delays=moments)
def test_actions_run_in_the_order_of_their_time_and_then_of_their_scheduling(delays: list[float]) -> None:
    scheduler = VirtualScheduler()
    ran: list[tuple[float, int]] = []
    for number, delay in enumerate(delays):
        scheduler.call_later(delay, lambda number=number: ran.append((scheduler.seconds(), number)))  # type: ignore[misc]
    scheduler.run()
    assert ran == sorted((delay, number) for number, delay in enumerate(delays))
    assert scheduler.pending == 0


@settings(max_examples=60, deadline=None)
@given(delays=moments, until=st.floats(0, 1e6))
def test_run_until_runs_what_is_due_by_then_and_no_more(delays: list[float], until: float) -> None:
    scheduler = VirtualScheduler()
    ran: list[float] = []
    for delay in delays:
        scheduler.call_later(delay, lambda: ran.append(scheduler.seconds()))
    scheduler.run(until)
    assert ran == sorted(delay for delay in delays if delay <= until)
    assert scheduler.seconds() == until
    assert scheduler.pending == len(delays) - len(ran)
    scheduler.run()
    assert ran == sorted(delays)


@settings(max_examples=60, deadline=None)
@given(now=st.floats(0, 1e9), at=st.floats(0, 1e9))
@example(now=1.8468062579631805, at=268435457.9542244)  # now + (at - now) is later than at
def test_an_absolute_time_is_met_to_the_last_bit(now: float, at: float) -> None:
    scheduler = VirtualScheduler()
    scheduler.run(now)
    ran: list[float] = []
    scheduler.schedule_absolute(at, lambda *_: ran.append(scheduler.seconds()))
    scheduler.run()
    assert ran == [max(now, at)]


def test_three_hundred_actions_at_one_instant_all_run_at_that_instant() -> None:
    scheduler = VirtualScheduler()
    ran: list[float] = []
    for _ in range(300):
        scheduler.schedule_relative(5.0, lambda *_: ran.append(scheduler.seconds()))
    scheduler.run()
    assert ran == [5.0] * 300
    assert scheduler.seconds() == 5.0


def test_ten_thousand_actions_that_schedule_each_other_take_no_time() -> None:
    scheduler = VirtualScheduler()
    count = 0

    def again() -> None:
        nonlocal count
        count += 1
        if count < 10_000:
            scheduler.call_soon(again)

    scheduler.call_soon(again)
    scheduler.run()
    assert (count, scheduler.seconds()) == (10_000, 0.0)


def test_what_is_scheduled_for_now_runs_after_what_is_already_due_now() -> None:
    scheduler = VirtualScheduler()
    ran: list[str] = []
    scheduler.call_soon(lambda: (ran.append("first"), scheduler.call_soon(lambda: ran.append("third"))))
    scheduler.call_soon(lambda: ran.append("second"))
    scheduler.run()
    assert ran == ["first", "second", "third"]


def test_the_past_is_now() -> None:
    scheduler = VirtualScheduler()
    scheduler.run(10.0)
    ran: list[float] = []
    scheduler.call_later(-3.0, lambda: ran.append(scheduler.seconds()))
    scheduler.schedule_relative(timedelta(seconds=-5), lambda *_: ran.append(scheduler.seconds()))
    scheduler.schedule_absolute(4.0, lambda *_: ran.append(scheduler.seconds()))
    scheduler.run()
    assert ran == [10.0] * 3


def test_a_cancelled_action_does_not_run_and_is_not_pending() -> None:
    scheduler = VirtualScheduler()
    ran: list[str] = []
    handle = scheduler.call_later(1.0, lambda: ran.append("handle"))
    disposable = scheduler.schedule_relative(1.0, lambda *_: ran.append("disposable"))
    scheduler.call_later(1.0, lambda: ran.append("kept"))
    assert scheduler.pending == 3
    handle.cancel()
    disposable.dispose()
    disposable.dispose()
    assert scheduler.pending == 1
    scheduler.run()
    assert ran == ["kept"]


def test_an_action_can_cancel_another_one_that_is_due_at_the_same_instant() -> None:
    scheduler = VirtualScheduler()
    ran: list[str] = []
    scheduler.call_later(1.0, lambda: (later.cancel(), ran.append("first")))
    later = scheduler.call_later(1.0, lambda: ran.append("never"))
    scheduler.run()
    assert ran == ["first"]


def test_cancelled_actions_do_not_move_time() -> None:
    scheduler = VirtualScheduler()
    scheduler.call_later(100.0, lambda: None).cancel()
    scheduler.run()
    assert scheduler.seconds() == 0.0


def test_a_periodic_action_runs_at_each_multiple_and_carries_its_state() -> None:
    scheduler = VirtualScheduler()
    ran: list[tuple[float, int]] = []

    def tick(state: int | None) -> int:
        assert state is not None
        ran.append((scheduler.seconds(), state))
        return state + 1

    periodic = scheduler.schedule_periodic(2.5, tick, 10)
    scheduler.run(10.0)
    assert ran == [(2.5, 10), (5.0, 11), (7.5, 12), (10.0, 13)]
    periodic.dispose()
    assert scheduler.pending == 0


def test_an_action_gets_the_scheduler_and_its_state_and_may_return_a_disposable() -> None:
    scheduler = VirtualScheduler()
    got: list[Any] = []
    inner = SerialDisposable()
    scheduler.schedule(lambda own, state: (got.append((own, state)), inner)[1], "state")
    scheduler.run()
    assert got == [(scheduler, "state")]


def test_an_action_cannot_run_the_scheduler() -> None:
    scheduler = VirtualScheduler()
    scheduler.call_later(1.0, scheduler.run)
    with pytest.raises(ConfigError, match="already runs"):
        scheduler.run()
    scheduler.call_later(1.0, lambda: None)
    scheduler.run()  # an action that raised has not locked it
    assert scheduler.seconds() == 2.0


def test_an_action_that_raises_stops_the_run_where_it_is() -> None:
    scheduler = VirtualScheduler()
    ran: list[str] = []

    def broken() -> None:
        raise KeyError("action")

    scheduler.call_later(1.0, broken)
    scheduler.call_later(2.0, lambda: ran.append("later"))
    with pytest.raises(KeyError):
        scheduler.run(9.0)
    assert (scheduler.seconds(), ran) == (1.0, [])
    scheduler.run(9.0)
    assert ran == ["later"]


def test_advance_moves_time_by_a_span() -> None:
    scheduler = VirtualScheduler()
    scheduler.advance(1.5)
    scheduler.advance(0)
    scheduler.advance(2.0)
    assert scheduler.seconds() == 3.5
    assert scheduler.now == datetime(1970, 1, 1, 0, 0, 3, 500_000, tzinfo=UTC)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda scheduler: scheduler.run(4.0), "until must be a finite number >= 5.0 or None, got 4.0"),
        (lambda scheduler: scheduler.run(float("nan")), "until must be a finite number >= 5.0 or None, got nan"),
        (lambda scheduler: scheduler.run("9"), "until must be a finite number >= 5.0 or None, got '9'"),
        (lambda scheduler: scheduler.advance(-1.0), "seconds must be a finite number >= 0, got -1.0"),
        (lambda scheduler: scheduler.advance(float("inf")), "seconds must be a finite number >= 0, got inf"),
    ],
)
def test_time_does_not_go_back_or_to_infinity(call: Any, message: str) -> None:
    scheduler = VirtualScheduler()
    scheduler.run(5.0)
    with pytest.raises(ConfigError) as refusal:
        call(scheduler)
    assert str(refusal.value) == message


def test_it_is_its_own_clock() -> None:
    scheduler = VirtualScheduler()
    assert clock_of(scheduler) is scheduler
    scheduler.run(2.25)
    assert seconds(scheduler) == 2.25
    assert scheduler.is_here()
    assert repr(scheduler) == "<VirtualScheduler at 2.25 s>"


@pytest.mark.parametrize(
    ("stream", "expected"),
    [
        pytest.param(rx.interval(1.5).pipe(ops.take(3)), [(1.5, 0), (3.0, 1), (4.5, 2)], id="interval"),
        pytest.param(rx.timer(2.0), [(2.0, 0)], id="timer"),
        pytest.param(rx.timer(2.0, 0.5).pipe(ops.take(3)), [(2.0, 0), (2.5, 1), (3.0, 2)], id="timer-with-a-period"),
        pytest.param(rx.timer(datetime(1970, 1, 1, 0, 0, 7, tzinfo=UTC)), [(7.0, 0)], id="timer-at-a-time"),
        pytest.param(rx.of("a", "b").pipe(ops.delay(2.0)), [(2.0, "a"), (2.0, "b")], id="delay"),
        pytest.param(rx.never().pipe(ops.timeout(3.0, rx.just("late"))), [(3.0, "late")], id="timeout"),
        pytest.param(rx.interval(1.0).pipe(ops.debounce(0.5), ops.take(2)), [(1.5, 0), (2.5, 1)], id="debounce"),
        pytest.param(rx.interval(1.0).pipe(ops.sample(2.5), ops.take(1)), [(2.5, 1)], id="sample"),
        pytest.param(rx.interval(1.0).pipe(ops.buffer_with_time(2.5), ops.take(1)), [(2.5, [0, 1])], id="buffer"),
    ],
)
def test_stock_operators_that_take_time_take_virtual_time(stream: Any, expected: list[tuple[float, Any]]) -> None:
    scheduler = VirtualScheduler()
    seen = record(scheduler, stream, until=20.0)
    got = [(event.at, event.value) for event in seen.events if event.kind == "next"]
    assert got == expected
    seen.dispose()
    assert scheduler.pending == 0
