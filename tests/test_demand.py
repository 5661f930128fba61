"""Demand, the scheduler that carries it, and what holds them together."""

from __future__ import annotations

import asyncio
import gc
import itertools
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given
from hypothesis import strategies as st
from reactivex import Observable
from reactivex import operators as ops
from reactivex.disposable import Disposable as StockDisposable
from reactivex.scheduler import (
    CurrentThreadScheduler,
    EventLoopScheduler,
    ImmediateScheduler,
    NewThreadScheduler,
    TimeoutScheduler,
    TrampolineScheduler,
)
from reactivex.scheduler.eventloop import AsyncIOScheduler
from reactivex.subject import Subject
from reactivex.testing import TestScheduler

import rxllm
from rxllm.clock import loop_clock
from rxllm.demand import UNDEMANDED, Demand, DemandScheduler, Disposable, Flow, Outlet
from rxllm.errors import ConfigError
from rxllm.operators import bounded, flat_map, tee, timeout
from rxllm.stream import Stream, subscribe
from rxllm.testing import Cold, Recorder, Script, Taker, VirtualScheduler, cold, parse, record

PATIENCE = 10.0  # seconds for another thread to do what it does in a millisecond


class Room(Demand):
    """A demand whose room a test sets."""

    def __init__(self, scheduler: VirtualScheduler, room: int = 0) -> None:
        self.failed: list[BaseException] = []
        super().__init__(scheduler, Flow(self.failed.append))
        self.left = room

    def room(self) -> int:
        return self.left


class Backlog:
    """A puller with `n` items (-1: without end), which fill the demand and are noted in `log`."""

    def __init__(self, demand: Room, name: str, n: int = -1, log: list[str] | None = None) -> None:
        self.demand = demand
        self.name = name
        self.n = n
        self.log: list[str] = [] if log is None else log
        self.offers: list[int] = []

    def pull(self, n: int) -> int:
        self.offers.append(n)
        sent = n if self.n < 0 else min(n, self.n)
        self.n -= sent if self.n > 0 else 0
        self.log += [self.name] * sent
        self.demand.left -= sent
        self.demand.arrived += sent
        if self.n:
            self.demand.wait(self)
        return sent


class Raises:
    def pull(self, n: int) -> int:
        raise ZeroDivisionError


class Probe(Stream[int]):
    """A source that notes what it is subscribed with; it plays one list of marbles after the other."""

    def __init__(self, *plays: str) -> None:
        self.plays = list(plays)
        self.carriers: list[DemandScheduler] = []

    def _start(self, observer: Any, carrier: DemandScheduler) -> Disposable:
        play = self.plays[min(len(self.carriers), len(self.plays) - 1)]
        self.carriers.append(carrier)
        clock: Any = carrier.clock
        return subscribe(Cold(clock, parse(play)), observer, carrier)


def slow(seconds: float = 1.0) -> Callable[[Any], Observable[Any]]:
    return lambda item: Script((seconds, item))


def until(true: Callable[[], bool]) -> None:
    """Wait for another thread."""
    event = threading.Event()
    for _ in range(int(PATIENCE / 0.01)):
        if true():
            return
        event.wait(0.01)
    raise AssertionError("it did not happen")


# whose turn it is


def test_room_is_offered_in_the_next_turn_and_not_at_once() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 3)
    puller = Backlog(demand, "a")
    demand.wait(puller)
    assert puller.offers == []
    scheduler.run()
    assert puller.offers == [3]


def test_nothing_is_scheduled_while_there_is_no_room() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 0)
    demand.wait(Backlog(demand, "a"))
    demand.wake()
    assert scheduler.pending == 0


def test_nothing_is_scheduled_while_nobody_waits() -> None:
    scheduler = VirtualScheduler()
    Room(scheduler, 1).wake()
    assert scheduler.pending == 0


def test_any_number_of_calls_make_one_turn() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 1)
    for name in "abc":
        demand.wait(Backlog(demand, name))
        demand.wake()
    assert scheduler.pending == 1


def test_any_number_of_wakes_make_one_turn() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 0)
    demand.wait(Backlog(demand, "a"))
    demand.left = 1
    demand.wake()
    demand.wake()
    assert scheduler.pending == 1


def test_new_room_is_offered_after_a_wake() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 0)
    puller = Backlog(demand, "a")
    demand.wait(puller)
    demand.left = 2
    scheduler.run()
    assert puller.offers == []
    demand.wake()
    scheduler.run()
    assert puller.offers == [2]


def test_room_that_appears_during_a_turn_is_offered_in_the_next_one() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 2)
    puller = Backlog(demand, "a", 5)
    demand.wait(puller)
    real = puller.pull

    def pull(n: int) -> int:
        sent = real(n)
        demand.left += sent  # a consumer that is through with an item at once
        return sent

    puller.pull = pull  # type: ignore[method-assign]
    turns = []
    scheduler.call_soon(lambda: turns.append(len(puller.log)))
    scheduler.run()
    assert puller.offers == [2, 2, 2]
    assert turns == [2]


class Through(Backlog):
    """A puller whose items the consumer is through with at once."""

    def pull(self, n: int) -> int:
        assert self.demand.offering
        sent = super().pull(n)
        self.demand.left += sent
        return sent


def test_a_turn_gives_no_more_than_the_room_at_its_start_even_if_the_room_stays() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 4)
    log: list[str] = []
    pullers = [Through(demand, name, 6, log) for name in "ab"]
    for puller in pullers:
        demand.wait(puller)
    turns: list[str] = []

    def note() -> None:
        turns.append("".join(log))
        log.clear()
        if any(puller.n for puller in pullers):
            scheduler.call_soon(note)

    scheduler.call_soon(note)
    scheduler.run()
    assert turns == ["aabb", "aabb", "aabb"]
    assert not demand.offering


def test_who_did_not_get_its_turn_gets_it_in_the_next_one_when_the_room_stays() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 1)
    log: list[str] = []
    for name in "abc":
        demand.wait(Through(demand, name, 2, log))
    scheduler.run()
    assert "".join(log) == "abcabc"


def test_who_got_one_item_more_than_others_comes_last() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 4)
    log: list[str] = []
    for name in "abc":
        demand.wait(Backlog(demand, name, -1, log))
    scheduler.run()
    demand.left = 1
    demand.wake()
    scheduler.run()
    assert "".join(log) == "aabcb"


def test_who_leaves_is_offered_nothing() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 4)
    stays, leaves = Backlog(demand, "a"), Backlog(demand, "b")
    demand.wait(leaves)
    demand.wait(stays)
    demand.leave(leaves)
    demand.leave(leaves)
    scheduler.run()
    assert (stays.offers, leaves.offers) == ([4], [])


def test_who_leaves_in_the_turn_of_another_is_offered_nothing() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 4)
    first, second = Backlog(demand, "a", 1), Backlog(demand, "b")
    demand.wait(first)
    demand.wait(second)
    real = first.pull
    first.pull = lambda n: (demand.leave(second), real(n))[1]  # type: ignore[method-assign]
    scheduler.run()
    assert (first.offers, second.offers) == ([2], [])


def test_who_has_no_items_left_leaves_its_share_to_the_others() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 6)
    pullers = [Backlog(demand, "a", 1), Backlog(demand, "b", 1), Backlog(demand, "c")]
    for puller in pullers:
        demand.wait(puller)
    scheduler.run()
    assert [puller.offers for puller in pullers] == [[2], [3], [4]]


def test_a_turn_ends_when_the_room_is_gone_whatever_was_said_at_its_start() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 6)
    pullers = [Backlog(demand, name) for name in "abc"]
    for puller in pullers:
        demand.wait(puller)
    real = pullers[0].pull

    def pull(n: int) -> int:
        demand.left -= 3  # somebody else filled the consumer meanwhile
        return real(n)

    pullers[0].pull = pull  # type: ignore[method-assign]
    scheduler.run()
    assert [puller.offers for puller in pullers] == [[2], [1], []]


@given(st.lists(st.integers(-1, 9).filter(bool), min_size=1, max_size=7), st.lists(st.integers(1, 12), min_size=1))
def test_a_turn_never_gives_more_than_the_room_and_nobody_waits_for_ever(backlogs: list[int], rooms: list[int]) -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler)
    pullers = [Backlog(demand, str(number), n) for number, n in enumerate(backlogs)]
    for puller in pullers:
        demand.wait(puller)
    endless = [puller for puller in pullers if puller.n < 0]
    for room in rooms * len(pullers):
        before = sum(len(puller.log) for puller in pullers)
        ready = sum(room if puller.n < 0 else puller.n for puller in pullers)
        demand.left = room
        demand.wake()
        scheduler.run()
        assert sum(len(puller.log) for puller in pullers) - before == min(room, ready)
    received = [len(puller.log) for puller in endless]
    assert max(received, default=0) - min(received, default=0) <= len(pullers)


@pytest.mark.parametrize("take", [1, 2, 99], ids=["one-by-one", "two-by-two", "all-at-once"])
@pytest.mark.parametrize("sources", [2, 3])
@pytest.mark.parametrize("window", [1, 3, 4, 5, 7])
def test_merged_sources_get_equal_shares(window: int, sources: int, take: int) -> None:
    scheduler = VirtualScheduler()
    merged = rx.merge(*(rxllm.from_iterable(itertools.repeat(number)) for number in range(sources)))
    taker = Taker(scheduler, window).connect(merged)
    for _ in range(60):
        scheduler.advance(1.0)
        taker.take(take)
        shares = [(taker.taken + taker.held).count(number) for number in range(sources)]
        assert max(shares) - min(shares) <= max(1, window - min(take, window))
    taker.dispose()
    assert max(shares) - min(shares) <= sources
    assert sum(shares) >= 60


def test_a_puller_that_raises_ends_the_run_and_is_seen() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 2)
    demand.wait(Raises())
    with pytest.raises(ZeroDivisionError):
        scheduler.run()
    assert [type(error) for error in demand.failed] == [ZeroDivisionError]
    assert type(demand.flow.failed) is ZeroDivisionError


def test_a_puller_that_raised_does_not_stop_the_turns_of_others() -> None:
    scheduler = VirtualScheduler()
    demand = Room(scheduler, 2)
    other = Backlog(demand, "a")
    demand.wait(Raises())
    demand.wait(other)
    with pytest.raises(ZeroDivisionError):
        scheduler.run()
    demand.wake()
    scheduler.run()
    assert other.offers == [2]


def test_a_demand_says_its_room_itself() -> None:
    scheduler = VirtualScheduler()
    demand = Demand(scheduler, Flow(lambda _error: None))
    assert demand.ahead == 0
    with pytest.raises(NotImplementedError):
        demand.room()


# one run


def test_the_first_failure_of_a_run_counts() -> None:
    seen: list[BaseException] = []
    flow = Flow(seen.append)
    first = ValueError("first")
    flow.fail(first)
    flow.fail(ValueError("second"))
    assert seen == [first]
    assert flow.failed is first


def test_a_drain_stops_every_source_once_and_those_that_come_later_at_once() -> None:
    stopped: list[str] = []
    flow = Flow(lambda _error: None)
    stops = {name: (lambda name=name: stopped.append(name)) for name in ("a", "b", "gone", "later")}
    for name in ("a", "b", "gone"):
        flow.add_source(stops[name])
    flow.remove_source(stops["gone"])
    flow.remove_source(stops["gone"])
    assert stopped == []
    flow.drain()
    flow.add_source(stops["later"])
    assert stopped == ["a", "b", "later"]


def test_a_drain_cuts_only_the_stages_that_nothing_of_ours_has_fed() -> None:
    scheduler = VirtualScheduler()
    flow = Flow(lambda _error: None)
    lowest, foreign, fed, late = (Room(scheduler) for _ in range(4))
    cut: list[str] = []
    carrier = DemandScheduler(scheduler, None, flow).with_demand(lowest)
    carrier.with_demand(foreign)
    carrier.with_demand(fed).with_demand(late)
    stops = {name: (lambda name=name: cut.append(name)) for name in ("lowest", "foreign", "fed", "gone", "late")}
    for name, stage in (("lowest", lowest), ("foreign", foreign), ("fed", fed), ("gone", foreign)):
        flow.add_stage(stops[name], stage)
    flow.remove_stage(stops["gone"])
    flow.add_source(print, fed)
    flow.remove_source(print)
    flow.drain()
    assert cut == ["foreign"]
    flow.add_stage(stops["late"], late)
    assert cut == ["foreign", "late"]


def test_the_flow_of_inner_streams_fails_with_the_run_and_is_not_drained_with_it() -> None:
    seen: list[BaseException] = []
    flow = Flow(seen.append)
    inner = flow.inner()
    stopped: list[int] = []
    inner.add_source(lambda: stopped.append(1))
    flow.drain()
    assert stopped == []
    error = ValueError()
    inner.fail(error)
    assert (seen, flow.failed) == ([error], error)


def test_inner_streams_know_that_the_run_has_failed_and_share_its_tasks() -> None:
    flow = Flow(lambda _error: None)
    inner = flow.inner()
    assert (inner.failed, flow.pulled, inner.pulled) == (None, 0, 0)
    flow.fail(ValueError())
    assert type(inner.failed) is ValueError
    assert inner.tasks is flow.tasks


def test_a_run_keeps_a_task_until_it_is_done() -> None:
    async def main() -> list[int]:
        flow = Flow(lambda _error: None)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        flow.inner().track(future)
        before = len(flow.tasks)
        future.set_result(None)
        await asyncio.sleep(0)
        return [before, len(flow.tasks)]

    assert asyncio.run(main()) == [1, 0]


def test_sources_that_come_back_for_ever_are_cut_off_where_nothing_else_is_above() -> None:
    scheduler = VirtualScheduler()
    flow = Flow(lambda _error: None)
    low, middle, high, alone = (Room(scheduler) for _ in range(4))
    carrier = DemandScheduler(scheduler, None, flow)
    carrier.with_demand(low).with_demand(middle).with_demand(high)
    carrier.with_demand(alone)
    cut: list[str] = []
    for name, stage in (("low", low), ("middle", middle), ("alone", alone)):
        flow.add_stage(lambda name=name: cut.append(name), stage)  # type: ignore[misc]
    flow.add_source(lambda: None, high)  # it does not end at once
    flow.add_source(print, alone)
    flow.remove_source(print)
    flow.drain()
    back = [lambda: flow.remove_source(back[0])]
    for _ in range(999):
        flow.add_source(back[0], alone)
    assert cut == []
    flow.add_source(back[0], alone)
    assert cut == ["alone"]
    for _ in range(1_000):
        flow.add_source(back[0], alone)
    assert cut == ["alone", "alone"]


# the way out of a stage


def outlet(room: int | None) -> tuple[VirtualScheduler, Room, Recorder, Outlet[int], list[int]]:
    scheduler = VirtualScheduler()
    below = Room(scheduler, room or 0)
    recorder = Recorder(scheduler)
    after: list[int] = []
    carrier = DemandScheduler(scheduler, None if room is None else below, below.flow)
    made: Outlet[int] = Outlet(recorder, carrier, lambda: after.append(len(made.held)))
    return scheduler, below, recorder, made, after


def kinds(recorder: Recorder) -> list[Any]:
    return [event.value if event.kind == "next" else event.kind for event in recorder.events]


def test_an_outlet_without_demand_below_passes_everything_on() -> None:
    _, _, recorder, out, _ = outlet(None)
    for n in range(3):
        out.push(n)
    out.end()
    out.end()
    assert kinds(recorder) == [0, 1, 2, "completed"]


def test_an_outlet_holds_items_in_order_until_there_is_room_and_ends_after_them() -> None:
    scheduler, below, recorder, out, after = outlet(0)
    for n in range(4):
        out.push(n)
    out.end()
    assert (list(out.held), recorder.events) == ([0, 1, 2, 3], [])
    for _ in range(2):
        below.left = 2
        below.wake()
        scheduler.run(until=1.0)
        below.left = 0
        scheduler.run(until=1.0)
    assert kinds(recorder) == [0, 1, 2, 3, "completed"]
    assert after[0] == 2


def test_an_outlet_waits_behind_those_who_wait_already() -> None:
    scheduler, below, recorder, out, _ = outlet(0)
    other = Backlog(below, "other", 1)
    below.wait(other)
    below.left = 1
    out.push(7)
    assert recorder.events == []
    scheduler.run()
    assert (other.log, recorder.events) == (["other"], [])
    below.left = 1
    below.wake()
    scheduler.run()
    assert kinds(recorder) == [7]


def test_an_item_does_not_overtake_those_held() -> None:
    scheduler, below, recorder, out, _ = outlet(0)
    out.push(1)
    below.left = 5
    out.push(2)
    below.wake()
    scheduler.run()
    assert kinds(recorder) == [1, 2]


def test_an_item_that_was_asked_for_goes_through_or_the_oldest_one_held_in_its_stead() -> None:
    scheduler, below, recorder, out, _ = outlet(0)

    class Inner:
        def pull(self, _n: int) -> int:
            out.push(2)
            return 1

    below.wait(Inner())
    out.push(1)
    below.left = 1
    below.wake()
    scheduler.run(until=0.0)
    assert kinds(recorder)[:1] == [1]
    below.left = 1
    below.wake()
    scheduler.run()
    assert kinds(recorder) == [1, 2]


def test_an_outlet_that_fails_drops_what_it_holds_and_one_that_ends_with_an_error_does_not() -> None:
    error = ValueError()
    scheduler, below, recorder, out, _ = outlet(0)
    out.push(1)
    out.fail(error)
    assert kinds(recorder) == ["error"]
    scheduler, below, recorder, out, _ = outlet(0)
    out.push(1)
    out.end(error)
    below.left = 1
    below.wake()
    scheduler.run()
    assert kinds(recorder) == [1, "error"]


def test_a_disposed_outlet_says_nothing_and_waits_for_nothing() -> None:
    _, below, recorder, out, _ = outlet(0)
    out.push(1)
    assert list(below.waiting) == [out]
    out.dispose()
    out.push(2)
    out.end()
    assert (list(below.waiting), list(out.held)) == ([], [])
    _, _, free, out, _ = outlet(None)
    out.dispose()
    out.push(1)
    out.end()
    out.fail(ValueError())
    assert (recorder.events, free.events) == ([], [])


def test_a_consumer_that_raises_ends_the_run_and_sees_its_own_exception() -> None:
    _, below, recorder, out, _ = outlet(None)
    recorder.on_next = lambda _value: 1 // 0  # type: ignore[method-assign, assignment]
    with pytest.raises(ZeroDivisionError):
        out.push(1)
    assert [type(error) for error in below.failed] == [ZeroDivisionError]


# the scheduler


def wrapped(demand: Demand | None = None) -> tuple[VirtualScheduler, DemandScheduler, list[BaseException]]:
    scheduler = VirtualScheduler()
    failed: list[BaseException] = []
    return scheduler, DemandScheduler(scheduler, demand, Flow(failed.append)), failed


Schedule = Callable[[DemandScheduler, Any], Disposable]
WAYS: dict[str, Schedule] = {
    "soon": lambda carrier, action: carrier.schedule(action, "state"),
    "later": lambda carrier, action: carrier.schedule_relative(2.0, action, "state"),
    "later-timedelta": lambda carrier, action: carrier.schedule_relative(timedelta(seconds=2), action, "state"),
    "at": lambda carrier, action: carrier.schedule_absolute(carrier.now + timedelta(seconds=2), action, "state"),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_action_gets_the_wrapper_and_its_state(way: str) -> None:
    scheduler, carrier, _ = wrapped()
    seen: list[Any] = []
    WAYS[way](carrier, lambda *given: seen.extend([*given, scheduler.seconds()]))
    scheduler.run()
    assert seen == [carrier, "state", 0.0 if way == "soon" else 2.0]


@pytest.mark.parametrize("way", WAYS)
def test_an_action_that_is_disposed_does_not_run(way: str) -> None:
    scheduler, carrier, _ = wrapped()
    seen: list[Any] = []
    WAYS[way](carrier, lambda *given: seen.append(given)).dispose()
    scheduler.run()
    assert seen == []


@pytest.mark.parametrize("way", WAYS)
def test_an_action_that_raises_ends_the_run_and_is_seen(way: str) -> None:
    scheduler, carrier, failed = wrapped()
    WAYS[way](carrier, lambda *_given: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        scheduler.run()
    assert [type(error) for error in failed] == [ZeroDivisionError]


def test_the_wrapper_has_the_time_and_the_timers_of_what_it_wraps() -> None:
    scheduler, carrier, _ = wrapped()
    seen: list[float] = []
    carrier.call_soon(lambda: seen.append(scheduler.seconds()))
    carrier.call_later(3.0, lambda: seen.append(scheduler.seconds()))
    scheduler.run()
    assert seen == [0.0, 3.0]
    assert carrier.now == scheduler.now
    assert carrier.base is scheduler


def test_the_demand_is_what_the_wrapper_carries() -> None:
    scheduler = VirtualScheduler()
    demand, other = Room(scheduler), Room(scheduler)
    carrier = DemandScheduler(scheduler, demand, demand.flow)
    again = carrier.with_demand(other)
    assert (carrier.demand, again.demand) == (demand, other)
    assert (again.flow, again.clock, again.base) == (carrier.flow, carrier.clock, scheduler)
    assert carrier.for_inner().demand is demand
    assert carrier.for_inner().flow is not carrier.flow


def test_wraps_do_not_nest_however_many_stages_there_are() -> None:
    scheduler = VirtualScheduler()
    source = Probe("(ab)|")
    stream: Observable[Any] = source
    for _ in range(5):
        stream = stream.pipe(flat_map(rx.of, window=2), ops.map(lambda item: item), bounded(2, ops.delay(1.0)))
    assert record(scheduler, stream).values == ["a", "b"]
    assert [carrier.base for carrier in source.carriers] == [scheduler]


def test_interval_and_timer_run_on_the_wrapper() -> None:
    scheduler, carrier, _ = wrapped()
    seen: list[Any] = []
    for stream in (rx.interval(1.0), rx.timer(0.5, 1.0), rx.timer(2.5)):
        stream.pipe(ops.take(2)).subscribe(lambda n: seen.append((scheduler.seconds(), n)), scheduler=carrier)
    scheduler.run()
    assert sorted(seen) == [(0.5, 0), (1.0, 0), (1.5, 1), (2.0, 1), (2.5, 0)]
    assert scheduler.pending == 0


RESUBSCRIBE: dict[str, tuple[tuple[str, ...], Callable[[Observable[Any]], Observable[Any]]]] = {
    "retry": (("-a#", "-b#", "-c|"), ops.retry(3)),
    "retry-later": (("-a#", "-b|"), lambda s: s.pipe(ops.delay_subscription(2.0), ops.retry(2))),
    "repeat": (("-a|", "-b|"), ops.repeat(2)),
    "repeat-later": (("-a|", "-b|"), lambda s: s.pipe(ops.delay_subscription(2.0), ops.repeat(2))),
    "delay_subscription": (("-a|",), ops.delay_subscription(3.0)),
    "catch": (("-a#", "-b|"), lambda s: s.pipe(ops.catch(lambda _error, same: same))),
    "catch-after-a-timer": (
        ("-a#", "-b|"),
        lambda s: s.pipe(ops.catch(lambda _error, same: rx.timer(2.0).pipe(ops.flat_map(lambda _n: same)))),
    ),
    "concat-after-a-timer": (("-a|",), lambda s: rx.concat(rx.timer(2.0), s)),
    "timeout-to-another": (("---------a|", "-b|"), lambda s: s.pipe(ops.timeout(2.0, s))),
}


@pytest.mark.parametrize("name", RESUBSCRIBE)
def test_demand_survives_a_resubscription(name: str) -> None:
    plays, operator = RESUBSCRIBE[name]
    scheduler = VirtualScheduler()
    source = Probe(*plays)
    taker = Taker(scheduler, 4).connect(source.pipe(operator))
    scheduler.run()
    assert len(source.carriers) == len(plays)
    assert all(carrier.demand is taker and carrier.base is scheduler for carrier in source.carriers)
    assert taker.ended is not None
    assert taker.ended.kind == "completed"


# a stream of ours, subscribed the public way


def numbers(run: Callable[[Observable[int]], Any]) -> Any:
    return run(rxllm.from_iterable(range(3)).pipe(flat_map(rx.of, window=2)))


def test_subscribe_in_a_running_loop_runs_on_that_loop() -> None:
    async def main() -> list[Any]:
        seen: list[Any] = []
        done = asyncio.Event()

        def note(item: Any) -> None:
            seen.append((item, threading.current_thread() is threading.main_thread(), asyncio.get_running_loop()))

        numbers(lambda stream: stream.subscribe(note, on_completed=done.set))
        assert seen == []
        await asyncio.wait_for(done.wait(), PATIENCE)
        loop = asyncio.get_running_loop()
        return [item for item, main, where in seen if main and where is loop]

    assert asyncio.run(main()) == [0, 1, 2]


def test_subscribe_without_a_loop_runs_on_the_loop_thread() -> None:
    seen: list[Any] = []
    done = threading.Event()
    numbers(
        lambda stream: stream.subscribe(
            lambda item: seen.append((item, threading.current_thread().name)), on_completed=done.set
        )
    )
    assert done.wait(PATIENCE)
    assert seen == [(0, "rxllm"), (1, "rxllm"), (2, "rxllm")]


STOCK_DEFAULTS = [CurrentThreadScheduler, ImmediateScheduler, NewThreadScheduler, TrampolineScheduler]


@pytest.mark.parametrize("make", STOCK_DEFAULTS)
def test_a_scheduler_that_is_only_a_stock_default_is_no_place_to_live_so_the_loop_is_found(
    make: Callable[[], Any],
) -> None:
    seen: list[str] = []
    done = threading.Event()
    numbers(
        lambda stream: stream.subscribe(
            lambda _item: seen.append(threading.current_thread().name), on_completed=done.set, scheduler=make()
        )
    )
    assert done.wait(PATIENCE)
    assert seen == ["rxllm"] * 3


def test_a_stock_test_scheduler_drives_a_stream_of_ours() -> None:
    scheduler = TestScheduler()
    stream = rxllm.from_iterable(range(3)).pipe(flat_map(lambda n: rx.timer(10.0).pipe(ops.map(lambda _: n)), window=1))
    result = scheduler.start(lambda: stream, disposed=900.0)
    assert [message.value.value for message in result.messages if message.value.kind == "N"] == [0, 1, 2]
    assert [message.time for message in result.messages if message.value.kind == "N"] == pytest.approx([210, 220, 230])


def test_an_asyncio_scheduler_names_its_loop() -> None:
    async def main() -> list[int]:
        seen: list[int] = []
        done = asyncio.Event()
        scheduler = AsyncIOScheduler(asyncio.get_running_loop())
        numbers(lambda stream: stream.subscribe(seen.append, on_completed=done.set, scheduler=scheduler))
        await asyncio.wait_for(done.wait(), PATIENCE)
        return seen

    assert asyncio.run(main()) == [0, 1, 2]


@pytest.mark.parametrize("make", [EventLoopScheduler, TimeoutScheduler.singleton], ids=["event-loop", "timeout"])
def test_a_scheduler_of_threads_is_refused_by_name(make: Callable[[], Any]) -> None:
    scheduler = make()
    seen: list[Exception] = []
    try:
        numbers(lambda stream: stream.subscribe(on_error=seen.append, scheduler=scheduler))
    except ConfigError as error:
        seen.append(error)
    assert [type(error) for error in seen] == [ConfigError]
    assert type(scheduler).__name__ in str(seen[0])


def test_a_plain_subscriber_that_raises_sees_its_exception_and_nothing_runs_on() -> None:
    scheduler = VirtualScheduler()
    script = Script((1.0, "x"), (5.0, "y"))
    stream = rxllm.from_iterable(itertools.count()).pipe(flat_map(lambda _n: script, window=3))
    stream.subscribe(lambda _item: 1 // 0, scheduler=scheduler)
    with pytest.raises(ZeroDivisionError):
        scheduler.run()
    assert (script.started, script.active, scheduler.pending) == (3, 0, 0)


def test_dispose_from_another_thread_ends_everything() -> None:
    script = Script((PATIENCE, "x"))
    started = threading.Event()

    def mapper(_n: int) -> Observable[str]:
        started.set()
        return script

    subscription = rxllm.from_iterable(itertools.count()).pipe(flat_map(mapper, window=3)).subscribe()
    assert started.wait(PATIENCE)
    subscription.dispose()
    subscription.dispose()
    until(lambda: script.active == 0)


def test_dispose_before_the_loop_came_to_it_subscribes_nothing() -> None:
    async def main() -> list[str]:
        probe = Probe("-a|")
        loop = asyncio.get_running_loop()
        other = threading.Thread(
            target=lambda: probe.subscribe(scheduler=AsyncIOScheduler(loop)).dispose(), name="elsewhere"
        )
        other.start()
        other.join()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return [repr(carrier) for carrier in probe.carriers]

    assert asyncio.run(main()) == []


def test_nothing_is_emitted_after_dispose_even_from_another_thread() -> None:
    async def main() -> list[int]:
        feed: rxllm.Feed[int] = rxllm.Feed()
        seen: list[int] = []
        subscription = feed.subscribe(seen.append)
        feed.put_nowait(1)
        await asyncio.sleep(0.01)
        other = threading.Thread(target=subscription.dispose)
        other.start()
        other.join()
        feed.put_nowait(2)
        await asyncio.sleep(0.01)
        return seen

    assert asyncio.run(main()) == [1]


def test_a_stream_has_a_lock_of_its_own_for_those_who_ask() -> None:
    first, second = rxllm.from_iterable([1]), rxllm.from_iterable([2])
    assert first.lock is first.lock
    assert first.lock is not second.lock
    with first.lock, first.lock:
        pass


@pytest.mark.parametrize("end", ["completes", "fails"])
def test_what_a_foreign_stream_emits_in_a_thread_arrives_on_the_loop(end: str) -> None:
    async def main() -> list[Any]:
        subject: Subject[int] = Subject()
        seen: list[Any] = []
        done = asyncio.Event()

        def note(what: Any) -> None:
            seen.append((what, threading.current_thread() is threading.main_thread()))

        def finish(error: Exception | None = None) -> None:
            note(type(error).__name__)
            done.set()

        stage = subject.pipe(flat_map(lambda n: (note(n), rx.of(n))[1], window=2))
        stage.subscribe(note, finish, finish)

        def emit() -> None:
            subject.on_next(1)
            if end == "fails":
                subject.on_error(KeyError())
            else:
                subject.on_completed()

        thread = threading.Thread(target=emit)
        thread.start()
        await asyncio.wait_for(done.wait(), PATIENCE)
        thread.join()
        return seen

    last = "KeyError" if end == "fails" else "NoneType"
    assert asyncio.run(main()) == [(1, True), (1, True), (last, True)]


@pytest.mark.parametrize("emit", ["on_next", "on_error", "on_completed"])
def test_what_is_under_way_to_the_loop_when_it_is_disposed_is_not_delivered(emit: str) -> None:
    async def main() -> list[Any]:
        subject: Subject[int] = Subject()
        seen: list[Any] = []
        observer = rx.Observer(seen.append, seen.append, lambda: seen.append("completed"))
        clock = loop_clock(asyncio.get_running_loop())
        subscription = subscribe(subject, observer, DemandScheduler(clock, None, Flow(seen.append)))
        given = {"on_next": (1,), "on_error": (KeyError(),), "on_completed": ()}[emit]
        thread = threading.Thread(target=lambda: getattr(subject, emit)(*given))
        thread.start()
        thread.join()
        subscription.dispose()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        return seen

    assert asyncio.run(main()) == []


def test_a_foreign_stream_gets_the_scheduler_that_carries_the_demand() -> None:
    async def main() -> list[Any]:
        seen: list[Any] = []
        foreign = rx.create(lambda _observer, scheduler=None: seen.append(scheduler))
        clock = loop_clock(asyncio.get_running_loop())
        for here in (clock, VirtualScheduler()):
            carrier = DemandScheduler(here, None, Flow(seen.append))
            subscribe(foreign, rx.Observer(), carrier).dispose()
            seen.append(carrier)
        return seen

    first, same, second, other = asyncio.run(main())
    assert first is same
    assert second is other


# drain


def running(stream: Observable[Any], window: int = 64) -> tuple[VirtualScheduler, Taker]:
    scheduler = VirtualScheduler()
    return scheduler, Taker(scheduler, window).connect(stream)


def drained(scheduler: VirtualScheduler, taker: Taker, at: float) -> list[Any]:
    """Drain at `at`, and return what was emitted; see that the run completed and left nothing."""
    scheduler.run(until=at)
    taker.flow.drain()
    scheduler.run(until=at + 100.0)
    assert taker.ended is not None
    assert taker.ended.kind == "completed"
    assert scheduler.pending == 0
    return taker.held


def test_a_drain_ends_the_source_and_finishes_what_is_in_progress() -> None:
    closed: list[int] = []

    def source() -> Iterator[int]:
        try:
            yield from itertools.count()
        finally:
            closed.append(1)

    stage = flat_map(lambda n: Script((2.0, n)), window=3)
    scheduler, taker = running(rxllm.from_iterable(source()).pipe(stage))
    assert drained(scheduler, taker, 5.0) == list(range(9))
    assert closed == [1]


def test_a_drain_runs_through_two_stages() -> None:
    pulled = itertools.count()
    two = rx.compose(flat_map(slow(2.0), window=3), flat_map(slow(3.0), window=2))
    scheduler, taker = running(rxllm.from_iterable(pulled).pipe(two))
    seen = drained(scheduler, taker, 10.0)
    assert sorted(seen) == list(range(next(pulled)))


def test_a_drain_cuts_a_foreign_source_off_and_finishes_what_is_in_progress() -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "-a-b-c-d-e-f-g-h|")
    taker = Taker(scheduler, 64).connect(source.pipe(flat_map(slow(3.0), window=4), flat_map(slow(1.0), window=4)))
    assert drained(scheduler, taker, 6.0) == ["a", "b", "c"]
    assert [subscription.until for subscription in source.subscriptions] == [6.0]


def test_a_drain_does_not_cut_inner_sources_short() -> None:
    inner = flat_map(slow(1.0), window=1)
    stage = flat_map(lambda n: rxllm.from_iterable([n] * 4).pipe(inner), window=2)
    scheduler, taker = running(rxllm.from_iterable(itertools.count()).pipe(stage))
    assert sorted(drained(scheduler, taker, 2.5)) == [0, 0, 0, 0, 1, 1, 1, 1]


def test_a_drain_does_not_cut_a_foreign_inner_stream_short() -> None:
    scheduler = VirtualScheduler()
    inner = cold(scheduler, "-a-b-c|").pipe(flat_map(slow(1.0), window=1))
    taker = Taker(scheduler, 64).connect(
        rxllm.from_iterable(itertools.count()).pipe(flat_map(lambda _n: inner, window=1))
    )
    assert drained(scheduler, taker, 2.5) == ["a", "b", "c"]


def test_a_drain_skips_the_sources_that_had_not_begun() -> None:
    begun: list[int] = []

    def second() -> Iterator[int]:
        begun.append(1)
        yield 99

    stream = rx.concat(rxllm.from_iterable(itertools.count()), rxllm.from_iterable(second()))
    scheduler, taker = running(stream.pipe(flat_map(slow(2.0), window=2)))
    assert drained(scheduler, taker, 3.0) == [0, 1, 2, 3]
    assert begun == []


SUBSCRIBES_LATER: dict[str, Callable[[Observable[Any]], Observable[Any]]] = {
    "concat": lambda source: rx.concat(source, rxllm.from_iterable(itertools.count(100))),
    "merge": lambda source: rx.merge(source, rx.empty()),
    "catch": lambda source: rx.catch(source, rx.empty()),
    "start_with": ops.start_with(-1),
    "delay_subscription": ops.delay_subscription(0.5),
}


@pytest.mark.parametrize("name", SUBSCRIBES_LATER)
def test_a_drain_finishes_what_is_in_progress_above_an_operator_that_subscribes_later(name: str) -> None:
    above = rxllm.from_iterable(itertools.count()).pipe(flat_map(slow(3.0), window=2))
    scheduler, taker = running(above.pipe(SUBSCRIBES_LATER[name], flat_map(slow(1.0), window=4)))
    seen = drained(scheduler, taker, 5.0)
    assert [n for n in seen if n >= 0] == [0, 1, 2, 3]


@pytest.mark.parametrize("operator", [ops.repeat(), ops.while_do(lambda _: True), ops.do_while(lambda _: True)])
def test_a_drain_ends_what_would_subscribe_for_ever(operator: Any) -> None:
    scheduler, taker = running(rxllm.from_iterable([1, 2, 3]).pipe(operator, flat_map(slow(2.0), window=2)))
    assert drained(scheduler, taker, 5.0) == [1, 2, 3, 1, 2, 3]


def test_a_drain_cuts_a_stage_that_is_subscribed_later_off_from_its_foreign_source() -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "-a-b-c-d-e-f-g-h")
    stage = source.pipe(flat_map(slow(1.0), window=4))
    late = rx.concat(rxllm.from_iterable(itertools.count()), stage)
    taker = Taker(scheduler, 64).connect(late.pipe(flat_map(slow(1.0), window=4)))
    assert drained(scheduler, taker, 1.5) == [0, 1, 2, 3, 4, 5, 6, 7]
    assert [subscription.until for subscription in source.subscriptions] == [1.5]


def test_a_drain_delivers_what_a_stock_operator_still_holds_when_its_source_has_ended() -> None:
    stream = rxllm.from_iterable(range(3)).pipe(bounded(3, ops.delay(4.0)), flat_map(slow(1.0), window=3))
    scheduler, taker = running(stream)
    assert drained(scheduler, taker, 1.0) == [0, 1, 2]


def test_a_drain_delivers_what_a_stock_operator_still_holds() -> None:
    stream = rxllm.from_iterable(itertools.count()).pipe(bounded(3, ops.delay(4.0)), flat_map(slow(1.0), window=3))
    scheduler, taker = running(stream)
    assert drained(scheduler, taker, 1.0) == [0, 1, 2]


def test_a_drain_reaches_all_branches_through_tee() -> None:
    scheduler = VirtualScheduler()
    first, second = tee(2)(rxllm.from_iterable(itertools.count()))
    merged = rx.merge(first.pipe(flat_map(slow(1.0), window=2)), second.pipe(flat_map(slow(2.0), window=2)))
    taker = Taker(scheduler, 1024).connect(merged)
    seen = drained(scheduler, taker, 4.5)
    assert sorted(seen) == sorted([*set(seen)] * 2)


# a source that is released late


def released_later(source: Observable[Any]) -> Observable[Any]:
    """As stock `subscribe_on` does, but the demand goes through."""

    def start(observer: Any, scheduler: Any = None) -> Any:
        upstream = source.subscribe(observer, scheduler=scheduler)
        return StockDisposable(lambda: scheduler.schedule(lambda *_: upstream.dispose()))

    return rx.create(start)


LATE: dict[str, Callable[[], Callable[[Observable[Any]], Observable[Any]]]] = {
    "flat_map": lambda: flat_map(slow(1.0), window=4),
    "flat_map-ordered": lambda: flat_map(slow(1.0), window=4, ordered=True),
    "bounded": lambda: bounded(4, ops.delay(1.0)),
}


@pytest.mark.parametrize("name", LATE)
def test_nothing_is_pulled_after_a_dispose_even_if_the_source_is_released_later(name: str) -> None:
    scheduler = VirtualScheduler()
    pulled = itertools.count()
    taker = Taker(scheduler, 64).connect(rxllm.from_iterable(pulled).pipe(released_later, LATE[name]()))
    scheduler.run(until=0.5)
    scheduler.call_later(
        0.5, taker.dispose
    )  # when the first four are through, and the next turn is to offer their places
    scheduler.run()
    assert len(taker.held) == 4
    assert next(pulled) == 4


# the limits


def test_a_source_stops_after_ten_thousand_items_that_nobody_asked_for() -> None:
    scheduler = VirtualScheduler()
    recorder = record(scheduler, rxllm.from_iterable(itertools.count()))
    assert recorder.values == list(range(10_000))
    assert recorder.end is not None
    assert isinstance(recorder.end.value, ConfigError)
    assert "unbounded=True" in str(recorder.end.value)
    assert scheduler.pending == 0


def test_ten_thousand_items_that_nobody_asked_for_are_not_too_many() -> None:
    recorder = record(VirtualScheduler(), rxllm.from_iterable(range(10_000)))
    assert recorder.values == list(range(10_000))
    assert recorder.end is not None
    assert recorder.end.kind == "completed"


def test_an_unbounded_source_has_no_limit() -> None:
    recorder = record(VirtualScheduler(), rxllm.from_iterable(range(10_500), unbounded=True))
    assert len(recorder.values) == 10_500


def test_undemanded_items_come_some_a_turn_so_that_others_get_their_turns() -> None:
    scheduler = VirtualScheduler()
    recorder = Recorder(scheduler)
    seen: list[int] = []
    rxllm.from_iterable(range(1_000)).subscribe(recorder.on_next, scheduler=scheduler)
    for _ in range(3):
        scheduler.call_soon(lambda: scheduler.call_soon(lambda: seen.append(len(recorder.events))))
    scheduler.run()
    assert 0 < seen[0] < 200


@pytest.mark.parametrize("window", [1, 5])
def test_a_stage_takes_so_many_undemanded_items_and_then_fails(window: int) -> None:
    for more in (0, 1):
        scheduler = VirtualScheduler()
        subject: Subject[int] = Subject()
        script = Script((1.0, "x"))
        errors: list[Exception] = []
        subject.pipe(flat_map(lambda _n, script=script: script, window=window)).subscribe(
            on_error=errors.append, scheduler=scheduler
        )
        for n in range(window + UNDEMANDED + more):
            subject.on_next(n)
        assert [type(error) for error in errors] == [ConfigError] * more
        assert (script.active, scheduler.pending) == ((0, 0) if more else (window, window))
        if more:
            assert "from_iterable" in str(errors[0])
            assert "overflow" in str(errors[0])


def test_undemanded_items_take_the_room_that_others_would_be_offered() -> None:
    scheduler = VirtualScheduler()
    subject: Subject[int] = Subject()
    pulled = itertools.count()
    merged = rx.merge(subject, rxllm.from_iterable(pulled))
    taker = Taker(scheduler, 64).connect(merged.pipe(flat_map(slow(1.0), window=2)))
    scheduler.run(until=0.5)
    for n in range(10):
        subject.on_next(100 + n)
    scheduler.run(until=5.5)
    assert taker.held == [0, 1, *range(100, 108)]
    assert next(pulled) == 2


def test_undemanded_items_start_no_sooner_than_there_is_a_place() -> None:
    scheduler = VirtualScheduler()
    subject: Subject[int] = Subject()
    script = Script((1.0, "x"))
    taker = Taker(scheduler, 3).connect(subject.pipe(flat_map(lambda _n: script, window=2)))
    for n in range(10):
        subject.on_next(n)
    scheduler.run(until=0.5)
    assert script.started == 2
    scheduler.run()
    assert (script.started, script.most) == (3 + 2 + 3, 2)
    taker.dispose()


@pytest.mark.parametrize("buffer", [0, 1, 3])
def test_undemanded_items_that_are_served_at_once_start_no_sooner_than_the_buffer_has_room(buffer: int) -> None:
    scheduler = VirtualScheduler()
    subject: Subject[int] = Subject()
    script = Script((0.0, "x"))
    Taker(scheduler, 1).connect(subject.pipe(flat_map(lambda _n: script, window=2, buffer=buffer)))
    for n in range(20):
        subject.on_next(n)
    scheduler.run()
    assert script.started == 1 + 2 + buffer


class Queued(Taker):
    """A consumer that wants nothing kept ready: it has a queue of its own, as a sink."""

    ahead = 0


@pytest.mark.parametrize(("consumer", "ahead"), [(Taker, 1), (Queued, 0)])
def test_a_stage_keeps_ready_what_the_consumer_says(consumer: type[Taker], ahead: int) -> None:
    scheduler = VirtualScheduler()
    script = Script((1.0, "x"))
    stream = rxllm.from_iterable(itertools.count()).pipe(flat_map(lambda _n: script, window=4))
    consumer(scheduler, 1).connect(stream)
    scheduler.run()
    assert script.started == 1 + 4 + ahead


def test_an_ordered_stage_keeps_at_least_its_window_while_the_oldest_item_is_slow() -> None:
    scheduler = VirtualScheduler()
    started: list[int] = []
    script = Script((50.0, "slow"), (1.0, "fast"))
    stage = flat_map(lambda n: (started.append(n), script)[1], window=4, ordered=True)
    Queued(scheduler, 1).connect(rxllm.from_iterable(itertools.count()).pipe(stage))
    scheduler.run(until=40.0)
    assert started == list(range(8))


def test_an_ordered_stage_stays_in_order_when_the_consumer_ends_the_item_it_is_given() -> None:
    scheduler = VirtualScheduler()
    inners: list[Subject[str]] = [Subject() for _ in range(3)]
    seen: list[str] = []

    def note(item: str) -> None:
        seen.append(item)
        if item == "b":
            inners[1].on_completed()

    stage = flat_map(lambda n: inners[n], window=3, ordered=True)
    rxllm.from_iterable(range(3)).pipe(stage).subscribe(
        note, on_completed=lambda: seen.append("|"), scheduler=scheduler
    )
    scheduler.run()
    inners[1].on_next("b")
    inners[2].on_next("c")
    inners[0].on_completed()
    assert seen == ["b", "c"]
    inners[2].on_next("d")
    inners[2].on_completed()
    scheduler.run()
    assert seen == ["b", "c", "d", "|"]


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_groups_that_fill_the_window_are_refused_because_they_would_wait_for_themselves(window: int) -> None:
    scheduler = VirtualScheduler()
    stage = flat_map(lambda group: group.pipe(ops.to_list()), window=window)
    recorder = record(scheduler, rxllm.from_iterable(range(9)).pipe(ops.group_by(lambda n: n % 3), stage))
    assert recorder.end is not None
    if window > 3:
        assert recorder.values == [[0, 3, 6], [1, 4, 7], [2, 5, 8]]
    else:
        assert isinstance(recorder.end.value, ConfigError)
        assert "group_by" in str(recorder.end.value)
    assert scheduler.pending == 0


def test_a_group_that_a_source_without_demand_brings_to_a_full_window_is_refused() -> None:
    scheduler = VirtualScheduler()
    subject: Subject[int] = Subject()
    errors: list[Exception] = []
    script = Script((1.0, "x"))
    items = rx.merge(subject, subject.pipe(ops.group_by(lambda n: n)))
    items.pipe(flat_map(lambda _item: script, window=1)).subscribe(on_error=errors.append, scheduler=scheduler)
    scheduler.run()
    subject.on_next(1)
    assert [type(error) for error in errors] == [ConfigError]
    assert "group_by" in str(errors[0])
    assert (script.active, scheduler.pending) == (0, 0)


def test_a_run_forgets_its_sources_and_stages_when_they_have_ended() -> None:
    for leave in (False, True):
        scheduler, taker = running(rxllm.from_iterable(range(9)).pipe(flat_map(slow(1.0), window=2)))
        scheduler.run(until=1.5)
        assert (len(taker.flow._sources), len(taker.flow._stages)) == (1, 1)
        if leave:
            taker.dispose()
        scheduler.run()
        assert (len(taker.flow._sources), len(taker.flow._stages)) == (0, 0)
        assert taker.flow.pulled == (4 if leave else 9)


# two stages


def test_two_equal_stages_run_at_the_speed_of_one_and_hold_no_more_than_they_may() -> None:
    window = 4

    def run(stages: int) -> tuple[int, list[int]]:
        """Return what came out in 200 s, and the most each stage had started and not passed on."""
        scheduler = VirtualScheduler()
        level = [0] * (stages + 1)
        most = [0] * (stages + 1)
        stream: Observable[Any] = rxllm.from_iterable(itertools.count())

        def started(stage: int, item: int) -> Observable[int]:
            level[stage] += 1
            most[stage] = max(most[stage], level[stage])
            if stage:
                level[stage - 1] -= 1  # what starts here was passed on by the stage above
            return Script((1.0 + item * 7 % 5 / 10, item))

        for stage in range(stages):
            mapper = lambda item, stage=stage: started(stage, item)  # noqa: E731  one line for each stage
            stream = stream.pipe(flat_map(mapper, window=window))
        out: list[int] = []
        stream.subscribe(out.append, scheduler=scheduler)
        scheduler.run(until=200.0)
        return len(out), most

    one, _ = run(1)
    two, most = run(2)
    assert two >= 0.9 * one
    assert window < most[0] <= 2 * window


def test_a_stage_alone_keeps_nothing_ready() -> None:
    scheduler = VirtualScheduler()
    script = Script((1.0, "x"))
    taker = Taker(scheduler, 3)
    stream = rxllm.from_iterable(itertools.count()).pipe(flat_map(lambda _n: script, window=4, buffer=0))
    taker.connect(stream)
    scheduler.run()
    assert script.started == 4 + 3


class Body:
    """An item that knows how many of its kind are held somewhere."""

    alive = 0

    def __init__(self) -> None:
        Body.alive += 1

    def __del__(self) -> None:
        Body.alive -= 1


@pytest.mark.parametrize("reply", ["x", ValueError("no")], ids=["completed", "failed"])
@pytest.mark.parametrize("ordered", [False, True])
def test_a_finished_item_is_let_go_without_help_from_the_garbage_collector(ordered: bool, reply: Any) -> None:
    scheduler = VirtualScheduler()
    bodies = rxllm.from_iterable(Body() for _ in range(300))
    stage = flat_map(lambda _body: Script((1.0, reply)).pipe(timeout(9.0)), window=3, ordered=ordered)
    alive: list[int] = []
    gc.collect()
    gc.disable()
    try:
        bodies.pipe(stage).subscribe(lambda _outcome: alive.append(Body.alive), scheduler=scheduler)
        scheduler.run()
    finally:
        gc.enable()
    assert len(alive) == 300
    assert max(alive) <= 5


def test_the_outcome_of_a_failed_item_that_is_no_request_names_it_as_an_item() -> None:
    error = ValueError("no")
    stage = flat_map(lambda _n: Script((1.0, error)), window=1)
    (outcome,) = record(VirtualScheduler(), rxllm.from_iterable([7]).pipe(stage)).values
    assert (outcome.request.operation, outcome.request.body, outcome.error) == ("item", 7, error)
