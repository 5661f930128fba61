"""What may never happen, over pipelines that hypothesis makes up: random stages, speeds, failures, consumers and ends.

1. Every item pulled gives exactly one outcome, unless the subscription is disposed first: then none, later.
2. What a stage has started and not passed on never exceeds its window and buffer; what a pipeline has pulled and not
   delivered never exceeds their sum.
3. After a dispose, or a consumer that raises, nothing is left: no callback, no timer, no inner stream, no open source.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import reactivex as rx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from reactivex import Observable
from reactivex import operators as ops

import rxllm
from rxllm import Outcome
from rxllm.demand import DemandScheduler, Disposable
from rxllm.errors import ServerError
from rxllm.operators import bounded, flat_map, retry, timeout, validate
from rxllm.policies.backoff import Backoff
from rxllm.stream import Stream, subscribe
from rxllm.testing import Script, Taker, VirtualScheduler

END = 1_000_000.0  # seconds: later than anything happens

BETWEEN: dict[str, Callable[[], Callable[[Observable[Any]], Observable[Any]]]] = {  # one for one, in order
    "nothing": lambda: lambda source: source,
    "map": lambda: ops.map(lambda item: item),
    "distinct": lambda: ops.distinct(number),
    "materialize": lambda: rx.compose(ops.materialize(), ops.dematerialize()),
    "concat": lambda: lambda source: rx.concat(rx.empty(), source),
    "merge": lambda: lambda source: rx.merge(source, rx.empty()),
    "retry": lambda: ops.retry(1),
    "take": lambda: ops.take(1_000),
    "publish": lambda: ops.publish(lambda shared: shared),
    "timeout": lambda: timeout(total=END / 2),
    "bounded delay": lambda: bounded(2, ops.delay(0.3)),
    "bounded concat_map": lambda: bounded(3, ops.concat_map(lambda item: Script((0.1, item)))),
}
INSIDE = {"bounded delay": 2, "bounded concat_map": 3}  # items


class StagePlan(NamedTuple):
    """One stage, and what lies between it and the next."""

    window: int
    ordered: bool
    buffer: int | None
    between: str


class Plan(NamedTuple):
    """A pipeline."""

    seed: int  # of all delays and failures
    items: int
    source_fails: bool
    stages: list[StagePlan]
    room: int  # of the consumer
    pause: float  # seconds between two visits of the consumer: at most this, at least half of it
    most: int  # items it takes at a visit, at most


stages = st.builds(
    StagePlan, st.integers(1, 5), st.booleans(), st.none() | st.integers(0, 4), st.sampled_from(sorted(BETWEEN))
)
plans = st.builds(
    Plan,
    seed=st.integers(0, 2**32),
    items=st.integers(0, 40),
    source_fails=st.booleans(),
    stages=st.lists(stages, min_size=1, max_size=3),
    room=st.integers(1, 6),
    pause=st.sampled_from([0.01, 0.1, 3.0]),
    most=st.integers(1, 6),
)


def holding_nothing(plan: Plan) -> Plan:
    """Return `plan` without the stock operators that hold items: those drop them when their source fails."""
    return plan._replace(
        stages=[stage._replace(between="map") if stage.between in INSIDE else stage for stage in plan.stages]
    )


plans = plans.map(lambda plan: holding_nothing(plan) if plan.source_fails else plan)


def number(item: int | Outcome[int]) -> int:
    """Return which item of the source this is about."""
    return item.request.body if isinstance(item, Outcome) else item


class Counting(Stream[Any]):
    """The source with its items counted."""

    def __init__(self, source: Observable[Any], count: Callable[[Any], None]) -> None:
        self.source = source
        self.count = count

    def _start(self, observer: Any, carrier: DemandScheduler) -> Disposable:
        count = self.count

        class Counter:
            on_error = observer.on_error
            on_completed = observer.on_completed

            def on_next(self, item: Any) -> None:
                count(item)
                observer.on_next(item)

        return subscribe(self.source, Counter(), carrier)


class StageRun:
    """One stage of a running pipeline."""

    def __init__(self, run: Run, place: int, plan: StagePlan, ahead: int) -> None:
        self.run = run
        self.place = place
        self.plan = plan
        buffer = max(ahead, plan.window if plan.ordered else 0) if plan.buffer is None else plan.buffer
        self.limit = plan.window + buffer
        self.started = 0
        self.passed_on = 0
        self.scripts: list[Script[int]] = []

    def over(self, source: Observable[Any]) -> Observable[Any]:
        plan = self.plan
        stage = flat_map(self.serve, window=plan.window, ordered=plan.ordered, buffer=plan.buffer)
        return BETWEEN[plan.between]()(Counting(source.pipe(stage), self.count))

    def count(self, _item: Any) -> None:
        self.passed_on += 1

    def serve(self, item: int | Outcome[int]) -> Observable[Any]:
        self.started += 1
        assert self.started - self.passed_on <= self.limit
        assert self.active <= self.plan.window
        if isinstance(item, Outcome):  # it failed in a stage above
            return rx.of(item)
        draw = random.Random(f"{self.run.plan.seed} {self.place} {item}")
        if draw.random() < 0.1:
            raise KeyError(item)
        script: Script[int] = Script(*(self.line(draw, item) for _ in range(draw.randint(1, 4))))
        self.scripts.append(script)
        backoff = Backoff(attempts=draw.randint(1, 4), base=0.5)
        return script.pipe(
            validate(lambda reply: reply >= 0, attempts=draw.randint(1, 2)), retry(backoff, draw=draw.uniform)
        )

    @staticmethod
    def line(draw: random.Random, item: int) -> tuple[float, int | Exception]:
        """Return when a try ends, and how: mostly well, else with a bad answer or an error of one kind or the other."""
        results: list[int | Exception] = [item, item, item, -1, ServerError("busy"), ValueError("no")]
        return draw.choice([0.0, 0.5, 1.0, draw.uniform(0.0, 4.0)]), draw.choice(results)

    @property
    def active(self) -> int:
        return sum(script.active for script in self.scripts)


class Consumer(Taker):
    """A consumer that checks what it is given, and counts what it hears."""

    def __init__(self, run: Run, room: int) -> None:
        super().__init__(run.scheduler, room)
        self.run = run
        self.heard = 0
        self.raises_at: int | None = None  # the item at which it raises
        self.leaves_at: int | None = None  # the item at which it disposes its subscription

    def on_next(self, value: Any) -> None:
        self.heard += 1
        assert self.ended is None
        assert self.room() > 0
        super().on_next(value)
        if self.heard == self.leaves_at:
            self.dispose()
        if self.heard == self.raises_at:
            raise ZeroDivisionError

    def on_error(self, error: Exception) -> None:
        self.heard += 1
        assert self.ended is None
        super().on_error(error)

    def on_completed(self) -> None:
        self.heard += 1
        assert self.ended is None
        super().on_completed()


class Run:
    """A pipeline that runs in virtual time."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.scheduler = VirtualScheduler()
        self.draw = random.Random(plan.seed)
        self.pulled = 0
        self.is_open = False
        self.consumer = Consumer(self, plan.room)
        aheads = [stage.window for stage in plan.stages[1:]] + [plan.room]
        self.stages = [
            StageRun(self, place, stage, ahead)
            for place, (stage, ahead) in enumerate(zip(plan.stages, aheads, strict=True))
        ]
        self.limit = plan.room + sum(stage.limit + INSIDE.get(stage.plan.between, 0) for stage in self.stages)

    def source(self) -> Iterator[int]:
        self.is_open = True
        try:
            for item in range(self.plan.items):
                self.pulled += 1
                assert self.pulled - len(self.consumer.taken) <= self.limit
                yield item
            if self.plan.source_fails:
                raise LookupError("the source")
        finally:
            self.is_open = False

    def connect(self) -> None:
        stream: Observable[Any] = rxllm.from_iterable(self.source())
        for stage in self.stages:
            stream = stage.over(stream)
        self.consumer.connect(stream)
        self.scheduler.call_later(0.0, self.visit)

    def visit(self) -> None:
        """Let the consumer take what it has a mind to, and come back, as long as there is something to come for."""
        self.consumer.take(self.draw.randint(1, self.plan.most))
        if self.consumer.held or (self.consumer.ended is None and self.scheduler.pending):
            self.scheduler.call_later(self.draw.uniform(self.plan.pause / 2, self.plan.pause), self.visit)

    @property
    def numbers(self) -> list[int]:
        return [number(item) for item in self.consumer.taken + self.consumer.held]

    def assert_nothing_is_left(self) -> None:
        """See that nothing runs, nothing is due, and whatever time brings, nothing more is heard."""
        heard, pulled = self.consumer.heard, self.pulled
        assert [stage.active for stage in self.stages] == [0] * len(self.stages)
        assert self.scheduler.pending == 0
        assert not self.is_open
        self.scheduler.run(until=END)
        assert (self.consumer.heard, self.pulled) == (heard, pulled)


many = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@many
@given(plan=plans)
def test_every_item_pulled_gives_exactly_one_outcome_within_the_bounds_of_every_stage(plan: Plan) -> None:
    run = Run(plan)
    run.connect()
    run.scheduler.run()
    assert sorted(run.numbers) == list(range(plan.items))
    if all(stage.ordered for stage in plan.stages):
        assert run.numbers == list(range(plan.items))
    end = run.consumer.ended
    assert end is not None
    assert type(end.value) is (LookupError if plan.source_fails else type(None))
    assert [stage.started for stage in run.stages] == [plan.items] * len(run.stages)
    run.assert_nothing_is_left()


@many
@given(plan=plans, at=st.floats(0.0, 60.0))
def test_after_a_dispose_at_any_time_nothing_is_heard_and_nothing_is_left(plan: Plan, at: float) -> None:
    run = Run(plan)
    run.connect()
    run.scheduler.run(until=at)
    before = run.consumer.heard, run.pulled
    run.consumer.dispose()
    for due in run.scheduler._due:  # the consumer's own visits are no part of the pipeline
        if due.action == run.visit:
            due.cancel()
    run.assert_nothing_is_left()
    run.consumer.dispose()
    assert (run.consumer.heard, run.pulled) == before
    assert len(set(run.numbers)) == len(run.numbers)


@many
@given(plan=plans, at=st.integers(1, 40))
def test_after_a_dispose_by_the_consumer_while_it_is_given_an_item_nothing_is_left(plan: Plan, at: int) -> None:
    run = Run(plan)
    run.consumer.leaves_at = at
    run.connect()
    run.scheduler.run()
    assert len(set(run.numbers)) == len(run.numbers)
    assert len(run.numbers) == min(at, plan.items)
    run.assert_nothing_is_left()


@many
@given(plan=plans, at=st.integers(1, 40))
def test_a_consumer_that_raises_sees_its_exception_once_and_nothing_is_left(plan: Plan, at: int) -> None:
    run = Run(plan._replace(items=40))
    run.consumer.raises_at = at
    run.connect()
    with contextlib.suppress(ZeroDivisionError):  # stock from_iterable swallows it; the run knows it all the same
        run.scheduler.run()
    assert type(run.consumer.failed) is ZeroDivisionError
    run.scheduler.run()
    assert len(run.numbers) == at
    run.assert_nothing_is_left()


@many
@given(plan=plans, at=st.floats(0.0, 30.0))
def test_a_drain_at_any_time_delivers_everything_pulled_and_pulls_nothing_more(plan: Plan, at: float) -> None:
    run = Run(plan)
    run.connect()
    run.scheduler.run(until=at)
    pulled = run.pulled
    run.consumer.flow.drain()
    run.scheduler.run()
    assert run.pulled == pulled
    assert sorted(run.numbers) == list(range(pulled))
    assert run.consumer.ended is not None
    run.assert_nothing_is_left()
