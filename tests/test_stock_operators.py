"""How far a source runs ahead of its consumer, by the stock operator between them: items are counted.

The consumer has four places: a `Taker` that gives one back after each unit of time, or a stage of ours over
slow inner streams, in virtual time and on a loop. An endless source counts what is pulled from it, and how
many of its items are still held. What may lie between the two is `most` of the operator's case, to the item;
in the classes without a bound it is shown that there is none.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import reactivex as rx
from reactivex import Observable
from reactivex import operators as ops

import rxllm
from rxllm.clock import Clock, Handle, loop_clock
from rxllm.demand import OPERATORS, Demand, DemandScheduler, Disposable
from rxllm.operators import bounded, flat_map
from rxllm.testing import Script, Taker, VirtualScheduler

WINDOW = 4
INSIDE = 8  # of `bounded`
ENOUGH = 300  # items ahead: no small bound holds
PROGRESS = 30  # items taken, and the run has shown what it can
BRIEF = 5  # units of time for which an operator holds an item
LONG = 1_000  # the same, longer than the run


class TooFarError(Exception):
    """The source is so far ahead that the run is over."""


class Item(int):
    """A number that knows whether it is still held somewhere."""

    run: Run

    def __del__(self) -> None:
        self.run.alive -= 1


class Counted:
    """An iterable that counts what is taken from it: endless, or `n` items and then perhaps an error."""

    def __init__(self, run: Run, n: int | None, *, fails: bool) -> None:
        self.run = run
        self.n = n
        self.fails = fails

    def __iter__(self) -> Iterator[int]:
        for number in itertools.count() if self.n is None else range(self.n):
            yield self.run.pull(number)
        if self.fails:
            raise ValueError("on purpose")


class Run:
    """One pipeline that runs: what was pulled, what was consumed, and the largest difference so far."""

    def __init__(
        self,
        case: Case,
        clock: Clock,
        *,
        unit: float,
        goal: float = PROGRESS,
        hold: float = BRIEF,
        window: int = WINDOW,
    ) -> None:
        self.case = case
        self.clock = clock
        self.unit = unit  # seconds
        self.goal = goal  # items to take
        self.window = window
        self.limit = ENOUGH  # items ahead that end the run
        self.hold = hold * unit  # seconds for which the operator holds an item
        self.pulled = 0
        self.alive = 0  # items of the source that somebody holds
        self.piled = 0  # the same, when the source was too far ahead
        self.taken = 0  # items that the consumer is through with
        self.consumed = 0.0  # the same in items of the source
        self.largest = 0.0
        self.ended = False
        self.tick: Handle | None = None
        self.also: list[Disposable] = []  # to dispose at the end
        self.subscription: Disposable | None = None

    # what a case is built of

    def source(self, n: int | None = None, *, fails: bool = False) -> Observable[int]:
        return rxllm.from_iterable(Counted(self, n, fails=fails))

    def later(self, *_: Any) -> Observable[Any]:
        return rx.timer(self.hold)

    def slow(self, item: Any, _index: int = 0) -> Observable[Any]:
        return Script((self.hold, item))

    # what is counted

    def pull(self, number: int) -> int:
        self.pulled += 1
        self.largest = max(self.largest, self.pulled - self.consumed)
        if self.largest > self.limit:
            self.piled = self.alive
            self.stop()
            raise TooFarError
        item = Item(number)
        item.run = self
        self.alive += 1
        return item

    def consume(self, item: Any) -> None:
        self.taken += 1
        self.consumed += self.case.size(item)

    def end(self, _error: Exception | None = None) -> None:
        self.ended = True

    @property
    def over(self) -> bool:
        return self.ended or self.largest > self.limit or self.taken >= self.goal

    def stop(self) -> None:
        for subscription in [self.subscription, *self.also]:
            if subscription is not None:
                subscription.dispose()
        if self.tick is not None:
            self.tick.cancel()

    # how it runs

    def connect(self, *, inside: int | None = None, stage: bool) -> Run:
        def operator(source: Observable[int]) -> Observable[Any]:
            return self.case.build(self, source)

        stream = self.source().pipe(operator if inside is None else bounded(inside, operator))
        if stage:
            self.pass_through_a_stage(stream)
        else:
            self.take_by_time(stream)
        return self

    def take_by_time(self, stream: Observable[Any]) -> None:
        taker = Taker(self.clock, self.window)  # type: ignore[arg-type]  all it needs is a clock
        taker.on_error = taker.on_completed = self.end  # type: ignore[method-assign]
        self.subscription = taker

        def tick() -> None:
            for item in taker.take():
                self.consume(item)
            taker.taken.clear()
            if not self.over:
                self.tick = self.clock.call_later(self.unit, tick)

        self.tick = self.clock.call_later(self.unit, tick)
        taker.connect(stream)

    def pass_through_a_stage(self, stream: Observable[Any]) -> None:
        unit = self.unit
        stage = stream.pipe(flat_map(lambda item: Script((unit, item)), window=self.window, on_failure="raise"))
        self.subscription = stage.subscribe(self.consume, self.end, self.end, scheduler=self.clock.scheduler)


@dataclass(frozen=True)
class Case:
    """An operator, and what may lie between its endless source and a consumer with four places."""

    build: Callable[[Run, Observable[int]], Observable[Any]]
    most: float = WINDOW  # in the classes that have a bound
    size: Callable[[Any], float] = lambda _item: 1.0  # items of the source that one item of the consumer stands for
    ends: bool = False  # by itself
    stalls: bool = False  # inside `bounded`: takes `n` items, gives none or few of them back, and no more come


def of(operator: Any, most: float = WINDOW, *, folds: float = 1.0, **others: Any) -> Case:
    """A case of an operator alone: `folds` items become one."""
    return Case(lambda _run, source: source.pipe(operator), most, lambda _item: folds, **others)


def timed(operator: Callable[[Run], Any], most: float = WINDOW, **others: Any) -> Case:
    """A case that needs time."""
    return Case(lambda run, source: source.pipe(operator(run)), most, **others)


class Fast(Demand):
    """A consumer that always has room."""

    def room(self) -> int:
        return 64


def beside_a_fast_one(share: Callable[[Observable[int]], Observable[Any]]) -> Case:
    """The consumer is the second subscriber of a shared stream; the first one always has room."""

    def build(run: Run, source: Observable[int]) -> Observable[Any]:
        shared = share(source)

        def subscribe(carrier: Any) -> Observable[Any]:
            assert isinstance(carrier, DemandScheduler)
            fast = carrier.with_demand(Fast(carrier.clock, carrier.flow))
            run.also.append(shared.subscribe(on_error=run.end, scheduler=fast))
            return shared

        return rx.defer(subscribe)

    return Case(build)


def length(items: Any) -> float:
    return float(len(items))


def is_even(n: int) -> bool:
    return n % 2 == 0


def is_ten(n: int, *_: Any) -> bool:
    return n == 10


def add(a: int, b: int) -> int:
    return a + b


NEVER = rx.never()
AT_ONCE = rx.concat(rx.of(0), NEVER)

CASES: dict[str, Case] = {
    # bounded: one for one
    "as_observable": of(ops.as_observable()),
    "default_if_empty": of(ops.default_if_empty(-1)),
    "dematerialize": of(rx.compose(ops.materialize(), ops.dematerialize())),
    "distinct": of(ops.distinct()),
    "distinct_until_changed": of(ops.distinct_until_changed()),
    "do": of(ops.do(rx.Observer())),
    "do_action": of(ops.do_action(lambda _n: None)),
    "finally_action": of(ops.finally_action(lambda: None)),
    "group_join": of(ops.group_join(NEVER, lambda _n: NEVER, lambda _n: NEVER)),
    "map": of(ops.map(lambda n: n + 1)),
    "map_indexed": of(ops.map_indexed(add)),
    "materialize": of(ops.materialize()),
    "pluck": of(rx.compose(ops.map(lambda n: {"n": n}), ops.pluck("n"))),
    "pluck_attr": of(ops.pluck_attr("real")),
    "publish": of(ops.publish(lambda shared: shared)),
    "scan": of(ops.scan(add)),
    "starmap": of(rx.compose(ops.map(lambda n: (n, n)), ops.starmap(add))),
    "starmap_indexed": of(rx.compose(ops.map(lambda n: (n, 0)), ops.starmap_indexed(add))),
    "tap": of(ops.tap(lambda _n: None)),
    "time_interval": of(ops.time_interval()),
    "timestamp": of(ops.timestamp()),
    "zip_with_iterable": of(ops.zip_with_iterable(itertools.count())),
    # bounded: some of them
    "filter": of(ops.filter(is_even), 7, folds=2),
    "filter_indexed": of(ops.filter_indexed(lambda _n, index: index % 2 == 0), 7, folds=2),
    "pairwise": of(ops.pairwise(), 5),
    "skip": of(ops.skip(3), 7),
    "skip_last": of(ops.skip_last(3), 7),
    "skip_while": of(ops.skip_while(lambda n: n < 3), 7),
    "skip_while_indexed": of(ops.skip_while_indexed(lambda n, _index: n < 3), 7),
    "slice": of(ops.slice(0, None, 2), 7, folds=2),
    "take": of(ops.take(20), ends=True),
    "take_while": of(ops.take_while(lambda n: n < 20), ends=True),
    "take_while_indexed": of(ops.take_while_indexed(lambda n, _index: n < 20), ends=True),
    # bounded; several items in one
    "buffer_with_count": of(ops.buffer_with_count(3), 12, folds=3),
    "window_with_count": of(ops.window_with_count(3), 9, folds=3),
    # bounded: one answer, as soon as it is known
    "all": of(ops.all(lambda n: n < 10), 11, ends=True),
    "contains": of(ops.contains(10), 11, ends=True),
    "element_at": of(ops.element_at(10), 11, ends=True),
    "element_at_or_default": of(ops.element_at_or_default(10, -1), 11, ends=True),
    "find": of(ops.find(is_ten), 11, ends=True),
    "find_index": of(ops.find_index(is_ten), 11, ends=True),
    "first": of(ops.first(is_ten), 11, ends=True),
    "first_or_default": of(ops.first_or_default(is_ten, -1), 11, ends=True),
    "is_empty": of(ops.is_empty(), 1, ends=True),
    "single": of(ops.single(), 2, ends=True),
    "single_or_default": of(ops.single_or_default(None, -1), 2, ends=True),
    "some": of(ops.some(is_ten), 11, ends=True),
    # bounded: sources one after the other, or side by side
    "amb": Case(lambda _run, source: rx.amb(NEVER, source)),
    "case": Case(lambda _run, source: rx.case(lambda: 1, {1: source})),
    "catch": Case(lambda run, source: run.source(3, fails=True).pipe(ops.catch(source))),
    "catch_with_iterable": Case(lambda run, source: rx.catch_with_iterable([run.source(3, fails=True), source])),
    "concat": Case(lambda run, source: rx.concat(run.source(3), source)),
    "concat_with_iterable": Case(lambda run, source: rx.concat_with_iterable([run.source(3), source])),
    "defer": Case(lambda _run, source: rx.defer(lambda _scheduler: source)),
    "do_while": Case(lambda run, _source: run.source(3).pipe(ops.do_while(lambda _: True))),
    "for_in": Case(lambda run, _source: rx.for_in(range(100), lambda _n: run.source(3))),
    "if_then": Case(lambda _run, source: rx.if_then(lambda: True, source)),
    "merge": Case(lambda run, source: rx.merge(source, run.source(), run.source())),
    "merge_all": Case(lambda run, source: rx.of(source, run.source()).pipe(ops.merge_all())),
    "on_error_resume_next": Case(lambda run, source: rx.on_error_resume_next(run.source(3, fails=True), source)),
    "repeat": Case(lambda run, _source: run.source(3).pipe(ops.repeat())),
    "retry": Case(lambda run, _source: run.source(3, fails=True).pipe(ops.retry())),
    "start_with": of(ops.start_with(-1, -2), 2),
    "using": Case(lambda _run, source: rx.using(lambda: None, lambda _resource: source)),
    "while_do": Case(lambda run, _source: run.source(3).pipe(ops.while_do(lambda _: True))),
    # bounded: with time, and yet one for one
    "take_until": timed(lambda run: ops.take_until(run.later()), ends=True),
    "take_until_with_time": timed(lambda run: ops.take_until_with_time(run.hold), ends=True),
    "take_with_time": timed(lambda run: ops.take_with_time(run.hold), ends=True),
    "timeout": timed(lambda _run: ops.timeout(60.0)),
    "timeout_with_mapper": timed(lambda _run: ops.timeout_with_mapper(NEVER, lambda _n: NEVER)),
    # bounded: inner streams that do not wait for anything
    "flat_map_of_synchronous": of(ops.flat_map(rx.of)),
    "flat_map_of_few": of(ops.flat_map(lambda n: rx.of(n, n)), 4, folds=0.5),
    "flat_map_of_ours": of(ops.flat_map(lambda n: rxllm.from_iterable([n, n])), 4.5, folds=0.5),
    # one turn late: 4 items are asked for, one arrives, 3 are asked for, and so on
    "concat_map_of_synchronous": of(ops.concat_map(rx.of), 8),
    "delay_subscription": timed(lambda run: ops.delay_subscription(run.hold)),
    "observe_on": timed(lambda run: ops.observe_on(run.clock.scheduler), 8),
    "replay": of(ops.replay(mapper=lambda shared: shared), 8),
    # unbounded by nature: they hold items for a time or a partner
    "buffer": timed(lambda run: ops.buffer(rx.interval(run.hold)), size=length),
    "buffer_toggle": timed(lambda run: ops.buffer_toggle(AT_ONCE, run.later), size=length, stalls=True),
    "buffer_when": timed(lambda run: ops.buffer_when(run.later), size=length),
    "buffer_with_time": timed(lambda run: ops.buffer_with_time(run.hold), size=length),
    "buffer_with_time_or_count": timed(lambda run: ops.buffer_with_time_or_count(run.hold, 1000), size=length),
    "concat_all": timed(lambda run: rx.compose(ops.map(run.slow), ops.concat_all())),
    "concat_map": timed(lambda run: ops.concat_map(run.slow)),
    "delay": timed(lambda run: ops.delay(run.hold)),
    "delay_with_mapper": timed(lambda run: ops.delay_with_mapper(run.later)),
    "flat_map": timed(lambda run: ops.flat_map(run.slow)),
    "flat_map_indexed": timed(lambda run: ops.flat_map_indexed(run.slow)),
    "join": of(ops.join(NEVER, lambda _n: NEVER, lambda _n: NEVER), stalls=True),
    "merge_max_concurrent": timed(lambda run: rx.compose(ops.map(run.slow), ops.merge(max_concurrent=2))),
    "partition": beside_a_fast_one(lambda source: source.pipe(ops.partition(lambda _n: True))[0]),
    "sequence_equal": of(ops.sequence_equal(NEVER), stalls=True),
    "share": beside_a_fast_one(lambda source: source.pipe(ops.share())),
    "skip_last_with_time": timed(lambda run: ops.skip_last_with_time(run.hold), stalls=True),
    "subscribe_on": timed(lambda run: ops.subscribe_on(run.clock.scheduler)),
    "take_last_with_time": timed(lambda run: ops.take_last_with_time(run.hold), stalls=True),
    "to_dict": of(ops.to_dict(lambda n: n), stalls=True),
    "to_iterable": of(ops.to_iterable(), stalls=True),
    "to_list": of(ops.to_list(), stalls=True),
    "to_set": of(ops.to_set(), stalls=True),
    "zip": Case(lambda _run, source: rx.zip(source, NEVER), stalls=True),
    # unbounded by nature: they hand out inner streams, which know no demand
    "group_by": of(ops.group_by(lambda n: n % 3), stalls=True),
    "group_by_until": of(ops.group_by_until(lambda n: n % 3, None, lambda _group: NEVER), stalls=True),
    "window": timed(lambda run: ops.window(rx.interval(run.hold))),
    "window_toggle": timed(lambda run: ops.window_toggle(AT_ONCE, run.later), stalls=True),
    "window_when": timed(lambda run: ops.window_when(run.later)),
    "window_with_time": timed(lambda run: ops.window_with_time(run.hold)),
    "window_with_time_or_count": timed(lambda run: ops.window_with_time_or_count(run.hold, 1000)),
    # pulled for ever: they fold
    "average": of(ops.average(), stalls=True),
    "count": of(ops.count(), stalls=True),
    "ignore_elements": of(ops.ignore_elements(), stalls=True),
    "last": of(ops.last(), stalls=True),
    "last_or_default": of(ops.last_or_default(-1), stalls=True),
    "max": of(ops.max(), stalls=True),
    "max_by": of(ops.max_by(lambda n: n), stalls=True),
    "min": of(ops.min(), stalls=True),
    "min_by": of(ops.min_by(lambda n: n), stalls=True),
    "reduce": of(ops.reduce(add), stalls=True),
    "sum": of(ops.sum(), stalls=True),
    "take_last": of(ops.take_last(3), stalls=True),
    "take_last_buffer": of(ops.take_last_buffer(3), stalls=True),
    # pulled for ever: they drop
    "combine_latest": Case(lambda _run, source: rx.combine_latest(source, NEVER), stalls=True),
    "debounce": timed(lambda run: ops.debounce(run.hold)),
    "exclusive": timed(lambda run: rx.compose(ops.map(run.slow), ops.exclusive())),
    "flat_map_latest": timed(lambda run: ops.flat_map_latest(run.slow)),
    "fork_join": Case(lambda _run, source: rx.fork_join(source, NEVER), stalls=True),
    "sample": timed(lambda run: ops.sample(run.hold)),
    "skip_until": timed(lambda run: ops.skip_until(run.later()), stalls=True),
    "skip_until_with_time": timed(lambda run: ops.skip_until_with_time(run.hold), stalls=True),
    "skip_with_time": timed(lambda run: ops.skip_with_time(run.hold), stalls=True),
    "switch_latest": timed(lambda run: rx.compose(ops.map(run.slow), ops.switch_latest())),
    "switch_map": timed(lambda run: ops.switch_map(run.slow)),
    "switch_map_indexed": timed(lambda run: ops.switch_map_indexed(run.slow)),
    "throttle_first": timed(lambda run: ops.throttle_first(run.hold), stalls=True),
    "throttle_with_mapper": timed(lambda run: ops.throttle_with_mapper(run.later)),
    "throttle_with_timeout": timed(lambda run: ops.throttle_with_timeout(run.hold)),
    "with_latest_from": of(ops.with_latest_from(NEVER), stalls=True),
    "zip_latest": Case(lambda _run, source: rx.zip_latest(source, NEVER), stalls=True),
}

LIMITED = sorted(name for name, kind in OPERATORS.items() if kind in {"bounded", "one turn late"})
UNLIMITED = sorted(OPERATORS.keys() - set(LIMITED))
HANDS_OUT = {
    name for name in OPERATORS if name.startswith(("group_by", "window"))
}  # others decide what becomes of items


def in_virtual_time(name: str, *, inside: int | None = None, stage: bool = False, **options: Any) -> Run:
    """Run a case to its end, or for 60 units of time, and see that it leaves nothing behind."""
    scheduler = VirtualScheduler()
    run = Run(CASES[name], scheduler, unit=1.0, **options)
    run.connect(inside=inside, stage=stage)
    scheduler.run(until=60.0)
    run.stop()
    scheduler.run(until=60.0)  # stock subscribe_on disposes in a turn of its own
    assert scheduler.pending == 0
    return run


def on_a_loop(name: str, *, inside: int | None = None, patience: float = 10.0, **options: Any) -> Run:
    """Run a case until it has shown what it can, or patience ends; a unit of time is a millisecond."""

    async def main() -> Run:
        clock = loop_clock(asyncio.get_running_loop())
        run = Run(CASES[name], clock, unit=0.001, **options)
        run.connect(inside=inside, stage=True)
        until = clock.seconds() + patience
        while not run.over and clock.seconds() < until:
            await asyncio.sleep(0.001)
        run.stop()
        await asyncio.sleep(0)
        return run

    return asyncio.run(main())


def test_every_operator_of_the_table_is_counted_here_and_no_other() -> None:
    assert set(OPERATORS) == set(CASES)
    assert set(OPERATORS.values()) == {"bounded", "one turn late", "unbounded by nature", "pulled for ever"}


@pytest.mark.parametrize("name", LIMITED)
def test_a_limited_operator_runs_ahead_by_exactly_so_many_items_of_what_is_taken(name: str) -> None:
    case = CASES[name]
    run = in_virtual_time(name)
    assert run.largest == case.most
    assert run.ended if case.ends else run.taken == PROGRESS


@pytest.mark.parametrize("name", LIMITED)
def test_a_limited_operator_runs_ahead_of_a_stage_by_no_more(name: str) -> None:
    case = CASES[name]
    run = in_virtual_time(name, stage=True, goal=LONG)
    assert 0 < run.largest <= case.most
    assert run.ended if case.ends else run.taken > 4 * PROGRESS


@pytest.mark.parametrize("name", LIMITED)
def test_a_limited_operator_runs_ahead_of_a_stage_by_no_more_on_a_loop(name: str) -> None:
    case = CASES[name]
    run = on_a_loop(name)
    assert 0 < run.largest <= case.most
    assert run.ended if case.ends else run.taken >= PROGRESS


@pytest.mark.parametrize("stage", [False, True], ids=["taker", "stage"])
@pytest.mark.parametrize("name", UNLIMITED)
def test_an_unlimited_operator_runs_ahead_without_end(name: str, stage: bool) -> None:
    assert in_virtual_time(name, stage=stage, hold=LONG, goal=LONG).largest > ENOUGH


@pytest.mark.parametrize("name", UNLIMITED)
def test_an_unlimited_operator_runs_ahead_without_end_on_a_loop(name: str) -> None:
    assert on_a_loop(name, hold=LONG, goal=LONG).largest > ENOUGH


@pytest.mark.parametrize("name", UNLIMITED)
def test_items_pile_up_in_the_operators_unbounded_by_nature_and_in_no_other(name: str) -> None:
    piled = in_virtual_time(name, hold=LONG, goal=LONG).piled
    if OPERATORS[name] == "unbounded by nature" and name not in HANDS_OUT:
        assert piled > ENOUGH - 2 * WINDOW
    else:
        assert piled <= WINDOW


@pytest.mark.parametrize("name", UNLIMITED)
def test_an_unlimited_operator_inside_bounded_holds_no_more_than_that(name: str) -> None:
    run = in_virtual_time(name, inside=INSIDE)
    assert INSIDE <= run.largest <= INSIDE + WINDOW
    assert run.taken < INSIDE if CASES[name].stalls else run.taken > INSIDE


@pytest.mark.parametrize("name", UNLIMITED)
def test_an_unlimited_operator_inside_bounded_holds_no_more_than_that_on_a_loop(name: str) -> None:
    assert 0 < on_a_loop(name, inside=INSIDE, patience=0.02).largest <= INSIDE + WINDOW


@pytest.mark.parametrize("window", [1, 2, 9, 40])
def test_what_a_bounded_operator_runs_ahead_is_the_window(window: int) -> None:
    assert in_virtual_time("map", window=window).largest == window


@pytest.mark.parametrize("window", [1, 2, 9, 20, 300])
@pytest.mark.parametrize("name", [name for name, kind in OPERATORS.items() if kind == "one turn late"])
def test_what_an_operator_one_turn_late_runs_ahead_is_at_most_two_and_a_half_windows(name: str, window: int) -> None:
    run = in_virtual_time(name, window=window)
    assert window <= run.largest <= 2.5 * window
    assert not run.ended


@pytest.mark.parametrize("window", [46, 300])
def test_one_turn_late_is_not_too_late_for_a_wide_stage(window: int) -> None:
    late = CASES["concat_map_of_synchronous"]
    errors: list[Exception] = []
    scheduler = VirtualScheduler()
    run = Run(late, scheduler, unit=1.0, goal=LONG, window=window)
    run.end = errors.append  # type: ignore[method-assign, assignment]
    run.limit = LONG * LONG
    run.connect(inside=None, stage=True)
    scheduler.run(until=5.0)
    run.stop()
    assert errors == []
    assert run.taken > 0
