"""The contract that every operator and source of ours keeps: eleven clauses, one table of cases."""

import asyncio
import inspect
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, NoReturn

import pytest
import reactivex as rx
from reactivex import Observable, abc
from reactivex import operators as ops
from reactivex.disposable import Disposable
from reactivex.scheduler.eventloop import AsyncIOScheduler
from reactivex.subject import Subject
from reactivex.testing import ReactiveTest, TestScheduler

import rxllm
from rxllm import Outcome
from rxllm import operators as own
from rxllm.demand import DemandScheduler
from rxllm.errors import ConfigError, ServerError
from rxllm.operators.budget import budget
from rxllm.operators.hedge import hedge
from rxllm.operators.single_flight import Flights, single_flight
from rxllm.policies.backoff import Backoff
from rxllm.policies.hedging import Hedge
from rxllm.stream import Stream
from rxllm.testing import Cold, Event, Recorder, Script, Taker, VirtualScheduler, cold, marbles, record

MANY = 10_000
Mapper = Callable[[Any], Any]


class Case(NamedTuple):
    """An operator, told what to do with an item by `f`: item -> stream of what becomes of it."""

    id: str
    make: Callable[[Mapper], Callable[[Observable[Any]], Observable[Any]]]
    emits: Callable[[str], str] = lambda item: item  # what comes out for one letter when f(x) gives X
    maps: bool = False  # it subscribes f(item) for each item
    fails_items: bool = False  # a failed f(item) is a value
    waits: bool = False  # it asks its source for items

    def over(self, source: Observable[Any], f: Mapper = lambda item: Script((0, item.upper()))) -> Observable[Any]:
        return source.pipe(self.make(f))

    def each(self, items: str) -> list[str]:
        """Return what comes out for `items`, sorted."""
        return sorted("".join(map(self.emits, items)))


def once(f: Mapper) -> Mapper:
    """Expand small letters only."""
    return lambda item: f(item) if str(item).islower() else None


def patient() -> Backoff:
    return Backoff(attempts=1_000_000, base=0.001, cap=0.001)


UPPER = str.upper
CASES = [
    Case("flat_map", lambda f: own.flat_map(f, window=4), UPPER, maps=True, fails_items=True, waits=True),
    Case(
        "ordered-flat_map",
        lambda f: own.flat_map(f, window=4, ordered=True),
        UPPER,
        maps=True,
        fails_items=True,
        waits=True,
    ),
    Case("raising-flat_map", lambda f: own.flat_map(f, window=4, on_failure="raise"), UPPER, maps=True, waits=True),
    Case("expand", lambda f: own.expand(once(f)), lambda item: item + item.upper(), maps=True, waits=True),
    Case("retry", lambda _: own.retry(patient(), draw=lambda low, _high: low)),
    Case("validate", lambda _: own.validate(lambda _item: True)),
    Case("timeout", lambda _: own.timeout(100.0, first=90.0, idle=80.0)),
    Case("bounded", lambda _: own.bounded(4, ops.map(lambda item: item)), waits=True),
    Case("overflow", lambda _: own.overflow("buffer")),
    Case("tee", lambda _: lambda source: own.tee(1)(source)[0], waits=True),
    Case("admit", lambda _: own.admit(rxllm.Gate("1_000_000/second", concurrency=9))),
    Case("hedge", lambda _: hedge(Hedge())),
    Case("single_flight", lambda _: single_flight("key", among=Flights())),
    Case(
        "budget",
        lambda f: budget(own.flat_map(f, window=4), requests=10**9),  # type: ignore[arg-type]
        UPPER,
        maps=True,
        fails_items=True,
        waits=True,
    ),
    Case("throttle", lambda _: own.throttle("1_000_000/second")),  # it waits too, with 64 items of its own
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
mapping_cases = pytest.mark.parametrize("case", [case for case in CASES if case.maps], ids=lambda case: case.id)
waiting_cases = pytest.mark.parametrize("case", [case for case in CASES if case.waits], ids=lambda case: case.id)


class BoomError(Exception):
    """What consumers and broken streams raise."""


def at_once(items: Iterable[Any], error: Exception | None = None, *, ends: bool = True) -> Observable[Any]:
    """A foreign source that emits everything before its `subscribe` returns."""

    def subscribe(observer: abc.ObserverBase[Any], _scheduler: abc.SchedulerBase | None = None) -> abc.DisposableBase:
        for item in items:
            observer.on_next(item)
        if error is not None:
            observer.on_error(error)
        elif ends:
            observer.on_completed()
        return Disposable()

    return rx.create(subscribe)


class Broken(Observable[Any]):
    """A foreign stream whose `_subscribe_core` raises."""

    def _subscribe_core(self, observer: abc.ObserverBase[Any], scheduler: abc.SchedulerBase | None = None) -> NoReturn:
        raise BoomError("cannot start")


class BrokenStream(Stream[Any]):
    """A stream of ours whose `_start` raises."""

    def _start(self, observer: Any, carrier: DemandScheduler) -> NoReturn:
        raise BoomError("cannot start")


class Calls:
    """A mapper whose streams are scripted by item and can be counted."""

    def __init__(self, scheduler: VirtualScheduler, **diagrams: str) -> None:
        self.scheduler = scheduler
        self.diagrams = diagrams
        self.made: list[Cold] = []

    def __call__(self, item: str) -> Cold:
        self.made.append(cold(self.scheduler, self.diagrams[item]))
        return self.made[-1]

    @property
    def open(self) -> int:
        return sum(entry.until is None for made in self.made for entry in made.subscriptions)


def is_open(source: Cold) -> bool:
    return any(entry.until is None for entry in source.subscriptions)


class Running(NamedTuple):
    """A case with two items taken: for each something in flight that never ends by itself."""

    scheduler: VirtualScheduler
    source: Cold
    calls: Calls
    stream: Observable[Any]

    def assert_released(self) -> None:
        assert not is_open(self.source)
        assert self.calls.open == 0
        assert self.scheduler.pending == 0


def endless(case: Case) -> Running:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "ab------c--")
    calls = Calls(scheduler, a="--A-A-A", b="---B-B-", c="---")
    return Running(scheduler, source, calls, case.over(source, calls))


class Acting(Recorder):
    """A recorder that does something at each item and at the end."""

    def __init__(
        self,
        scheduler: VirtualScheduler,
        act: Callable[[Any], object] = lambda _value: None,
        at_end: Callable[[], object] = lambda: None,
    ) -> None:
        super().__init__(scheduler)
        self.act = act
        self.at_end = at_end

    def on_next(self, value: Any) -> None:
        super().on_next(value)
        self.act(value)

    def on_error(self, error: Exception) -> None:
        super().on_error(error)
        self.at_end()

    def on_completed(self) -> None:
        super().on_completed()
        self.at_end()

    def listen(self, stream: Observable[Any], scheduler: VirtualScheduler) -> "Acting":
        self.subscription = stream.subscribe(self, scheduler=scheduler)  # type: ignore[arg-type]
        return self


def kinds(recorder: Recorder) -> list[str]:
    return [event.kind for event in recorder.events]


ELSEWHERE = {
    "cache",
    "call",
    "feedback",
    "journal",
    "to_outcome",
}  # they emit outcomes of replies only, or settings: see tests/operators, which hold them to this too


def test_every_operator_of_ours_has_a_case() -> None:
    assert {case.id.split("-")[-1] for case in CASES} == set(own.__all__) - ELSEWHERE


# 1  a terminal before `subscribe` returns


@pytest.mark.parametrize("items", ["", "a", "abc"], ids=lambda items: f"{len(items)}-items")
@cases
def test_a_source_that_completes_before_subscribe_returns_is_passed_on_whole(case: Case, items: str) -> None:
    scheduler = VirtualScheduler()
    seen = record(scheduler, case.over(at_once(items)))
    assert sorted(seen.values) == case.each(items)
    assert kinds(seen) == ["next"] * len(seen.values) + ["completed"]
    assert (scheduler.pending, scheduler.seconds()) == (0, 0.0)  # no timer ran on for a stream that was over


@pytest.mark.parametrize("error", [None, BoomError("at once")], ids=["completes", "fails"])
@cases
def test_a_stream_that_is_over_before_subscribe_returns_leaves_no_timer_to_a_stage_below(
    case: Case, error: Exception | None
) -> None:
    scheduler = VirtualScheduler()
    taker = Taker(scheduler, 4).connect(case.over(at_once("", error)))
    assert taker.ended is not None
    assert taker.ended.value is error
    assert scheduler.pending == 0


@mapping_cases
def test_what_is_in_progress_goes_on_when_the_source_completes_before_subscribe_returns(case: Case) -> None:
    scheduler = VirtualScheduler()
    seen = record(scheduler, case.over(at_once("abc"), lambda item: Script((2.0, item.upper()))))
    assert sorted(seen.values) == case.each("abc")
    assert kinds(seen)[-1] == "completed"


@pytest.mark.parametrize(
    "operator",
    [
        pytest.param(own.flat_map(int, window=1, on_failure="raise"), id="flat_map"),
        pytest.param(own.expand(int), id="expand"),  # the mappers raise: int("a")
        pytest.param(own.validate(lambda _item: False, attempts=1), id="validate"),
        pytest.param(own.bounded(4, ops.take(1)), id="bounded"),
        pytest.param(own.overflow("error", 1), id="overflow"),
    ],
)
def test_an_operator_that_ends_by_itself_before_subscribe_returns_releases_its_source(operator: Any) -> None:
    scheduler = VirtualScheduler()
    released: list[float] = []

    def subscribe(observer: abc.ObserverBase[Any], _scheduler: abc.SchedulerBase | None = None) -> abc.DisposableBase:
        for item in "abc":
            observer.on_next(item)
        return Disposable(lambda: released.append(scheduler.seconds()))

    taker = Taker(scheduler, 1).connect(rx.create(subscribe).pipe(operator))
    assert released == [0.0]
    for _ in range(3):
        taker.take()
        scheduler.run()
    assert taker.ended is not None


@cases
def test_a_source_that_fails_before_subscribe_returns_ends_the_stream_with_its_error(case: Case) -> None:
    scheduler = VirtualScheduler()
    error = BoomError("at once")
    seen = record(scheduler, case.over(at_once("a", error)))
    assert sorted(seen.values) == case.each("a")
    assert seen.end == Event(0.0, "error", error)
    assert scheduler.pending == 0


@cases
def test_a_stream_of_ours_that_completes_before_subscribe_returns_is_passed_on_whole(case: Case) -> None:
    scheduler = VirtualScheduler()
    script = Script((0, "a"))
    seen = record(scheduler, case.over(script))
    assert sorted(seen.values) == case.each("a")
    assert kinds(seen)[-1] == "completed"
    assert (script.started, script.active, scheduler.pending) == (1, 0, 0)


# 2  dispose inside on_next, inside on_completed, before subscribe returns, twice


@cases
def test_a_dispose_inside_on_next_releases_everything_at_that_instant(case: Case) -> None:
    running = endless(case)
    seen = Acting(running.scheduler)
    seen.act = lambda _value: seen.dispose()
    seen.listen(running.stream, running.scheduler)
    running.scheduler.run()
    assert len(seen.events) == 1
    running.assert_released()
    assert running.source.subscriptions[-1].until == seen.events[0].at


@cases
def test_a_dispose_inside_on_completed_is_harmless(case: Case) -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "-a-|")
    seen = Acting(scheduler)
    seen.at_end = seen.dispose
    seen.listen(case.over(source), scheduler)
    scheduler.run()
    assert sorted(seen.values) == case.each("a")
    assert kinds(seen)[-1] == "completed"
    assert not is_open(source)
    assert scheduler.pending == 0


@cases
def test_a_dispose_before_subscribe_returns_releases_everything(case: Case) -> None:
    scheduler = VirtualScheduler()
    released: list[float] = []

    def subscribe(observer: abc.ObserverBase[Any], _scheduler: abc.SchedulerBase | None = None) -> abc.DisposableBase:
        observer.on_next("a")
        observer.on_next("b")
        observer.on_next("c")
        return Disposable(lambda: released.append(scheduler.seconds()))

    calls = Calls(scheduler, a="A----", c="C----")
    stream = case.over(rx.create(subscribe), lambda item: at_once("B", ends=False) if item == "b" else calls(item))
    seen = record(scheduler, stream.pipe(ops.take(1)))
    assert kinds(seen) == ["next", "completed"]
    assert released == [0.0]
    assert (calls.open, scheduler.pending) == (0, 0)


@cases
def test_disposing_twice_releases_once(case: Case) -> None:
    running = endless(case)
    seen = record(running.scheduler, running.stream, dispose_at=2.5, until=3.0)
    count = len(seen.events)
    seen.dispose()
    running.scheduler.run()
    assert len(seen.events) == count
    assert running.source.subscriptions[-1].until == 2.5
    running.assert_released()


@cases
def test_disposing_what_has_ended_is_harmless(case: Case) -> None:
    scheduler = VirtualScheduler()
    seen = record(scheduler, case.over(cold(scheduler, "a|")))
    before = list(seen.events)
    seen.dispose()
    seen.dispose()
    scheduler.run()
    assert seen.events == before


# 3  on_next re-entered


@cases
def test_a_subject_fed_from_on_next_loses_and_repeats_nothing(case: Case) -> None:
    scheduler = VirtualScheduler()
    subject: Subject[str] = Subject()
    items = iter("bcdefghij")

    def feed(value: str) -> None:
        if value.islower() or case.id != "expand":  # one after each item, not after what it leads to
            following = next(items, None)
            if following is None:
                subject.on_completed()
            else:
                subject.on_next(following)

    seen = Acting(scheduler, feed).listen(case.over(subject), scheduler)
    subject.on_next("a")
    scheduler.run()
    assert sorted(seen.values) == case.each("abcdefghij")
    assert kinds(seen).count("completed") == 1
    assert kinds(seen)[-1] == "completed"


@cases
@pytest.mark.parametrize("slowest", ["a", "d"], ids=["the-first-last", "the-last-last"])
@pytest.mark.parametrize("after", [1, 3], ids=lambda after: f"after-{after}")
def test_a_source_that_ends_inside_of_on_next_loses_nothing_that_it_gave(case: Case, slowest: str, after: int) -> None:
    scheduler = VirtualScheduler()
    subject: Subject[str] = Subject()
    seen: Acting

    def end(_value: str) -> None:
        if len(seen.values) == after:
            subject.on_completed()

    def late(item: str) -> Script:
        return Script((2.0 if item == slowest else 1.0, item.upper()))

    seen = Acting(scheduler, end).listen(case.over(subject, late), scheduler)
    given = ""
    for item in "abcd":
        if not subject.is_stopped:
            given += item
            subject.on_next(item)
    scheduler.run()
    if not subject.is_stopped:
        subject.on_completed()
        scheduler.run()
    assert sorted(seen.values) == case.each(given)
    assert kinds(seen)[-1] == "completed"


@cases
def test_a_feed_fed_from_on_next_loses_and_repeats_nothing(case: Case) -> None:
    scheduler = VirtualScheduler()
    feed: rxllm.Feed[str] = rxllm.Feed()
    items = iter("bcdefghijklm")

    def follow(_value: str) -> None:
        following = next(items, None)
        if following is None:
            feed.close()
        else:
            feed.put_nowait(following)

    seen = Acting(scheduler, follow).listen(case.over(feed), scheduler)
    feed.put_nowait("a")
    scheduler.run()
    assert sorted(seen.values) == case.each("abcdefghijklm")
    assert kinds(seen)[-1] == "completed"


# 4  10,000 synchronous inners in constant stack depth


def depth() -> int:
    frame, frames = inspect.currentframe(), 0
    while frame is not None:
        frame, frames = frame.f_back, frames + 1
    return frames


class Depth:
    """The stack depths that were met; the run must not need more at the end than at its start."""

    def __init__(self) -> None:
        self.met: list[int] = []

    def note(self, _value: object = None) -> None:
        self.met.append(depth())

    def assert_constant(self, times: int) -> None:
        assert len(self.met) >= times
        assert max(self.met) <= max(self.met[:10])


def foreign(item: str) -> Observable[str]:
    return at_once([item.upper()])


def ours(item: str) -> Observable[str]:
    return Script((0, item.upper()))


def nested(item: str) -> Observable[str]:
    return Script((0, item)).pipe(own.flat_map(ours, window=1), own.validate(lambda _item: True), own.retry(Backoff()))


@pytest.mark.parametrize("inner", [foreign, ours, nested])
@pytest.mark.parametrize("kind", ["waits", "does-not-wait"])
@cases
def test_ten_thousand_synchronous_items_need_no_more_stack_than_ten(case: Case, kind: str, inner: Mapper) -> None:
    scheduler = VirtualScheduler()
    met = Depth()
    items = ["a"] * MANY
    source = rxllm.from_iterable(items, unbounded=True) if kind == "waits" else at_once(items)

    def mapper(item: str) -> Observable[str]:
        met.note()
        return inner(item)  # type: ignore[no-any-return]

    seen = Acting(scheduler, met.note).listen(case.over(source, mapper), scheduler)
    scheduler.run()
    assert len(seen.values) == MANY * len(case.emits("a"))
    met.assert_constant(MANY)


@mapping_cases
def test_a_thousand_items_that_waited_for_a_place_need_no_more_stack_than_ten(case: Case) -> None:
    scheduler = VirtualScheduler()
    met = Depth()

    def mapper(item: str) -> Observable[str]:
        met.note()
        return Script((0 if met.met[4:] else 1.0, item.upper()))  # the first four take time

    seen = Acting(scheduler, met.note).listen(case.over(at_once(["a"] * 1_000), mapper), scheduler)
    scheduler.run()
    assert len(seen.values) == 1_000 * len(case.emits("a"))
    assert max(met.met) <= max(met.met[:20])


@pytest.mark.parametrize("case", [case for case in CASES if "flat_map" in case.id], ids=lambda case: case.id)
def test_a_subject_fed_ten_thousand_times_from_on_next_needs_no_more_stack_than_ten(case: Case) -> None:
    scheduler = VirtualScheduler()
    subject: Subject[str] = Subject()
    met = Depth()

    def feed(_value: str) -> None:
        met.note()
        if len(met.met) < MANY:
            subject.on_next("a")

    Acting(scheduler, feed).listen(case.over(subject), scheduler)
    subject.on_next("a")
    met.assert_constant(MANY)


def test_ten_thousand_synchronous_failures_of_retry_need_no_more_stack_than_ten() -> None:
    scheduler = VirtualScheduler()
    met = Depth()

    def fail(observer: abc.ObserverBase[Any], _scheduler: abc.SchedulerBase | None = None) -> abc.DisposableBase:
        met.note()
        observer.on_error(ServerError("again"))
        return Disposable()

    seen = record(
        scheduler,
        rx.create(fail).pipe(own.retry(Backoff(attempts=MANY, base=0.001, cap=0.001), draw=lambda low, _high: low)),
    )
    assert kinds(seen) == ["error"]
    assert len(met.met) == MANY
    met.assert_constant(MANY)


@pytest.mark.parametrize("repaired", [False, True], ids=["asked-again", "repaired"])
def test_ten_thousand_synchronous_rejections_need_no_more_stack_than_ten(repaired: bool) -> None:
    scheduler = VirtualScheduler()
    met = Depth()
    repair = (lambda _value, _error: at_once("b")) if repaired else None

    def check(_value: str) -> bool:
        met.note()
        return False

    seen = record(scheduler, at_once("a").pipe(own.validate(check, attempts=MANY, repair=repair)))
    assert kinds(seen) == ["error"]
    met.assert_constant(MANY)


def test_a_loop_of_ten_thousand_synchronous_turns_needs_no_more_stack_than_ten() -> None:
    scheduler = VirtualScheduler()
    met = Depth()

    def following(n: int) -> Observable[int] | None:
        met.note()
        return None if n == MANY else at_once([n + 1])

    seen = record(scheduler, at_once([0]).pipe(own.expand(following)))
    assert seen.values == list(range(MANY + 1))
    met.assert_constant(MANY)


# 5  nothing after a terminal or a dispose; a terminal disposes the upstream


@cases
def test_take_cancels_the_source_and_the_calls_in_flight(case: Case) -> None:
    running = endless(case)
    first = record(running.scheduler, running.stream.pipe(ops.take(2)))
    assert kinds(first) == ["next", "next", "completed"]
    ended = first.events[-1].at
    running.assert_released()
    assert [entry.until for entry in running.source.subscriptions] == [ended]
    assert {entry.until for made in running.calls.made for entry in made.subscriptions} <= {ended}


class Rude(Stream[Any]):
    """A stream of ours that goes on after its end and after it is disposed; a bug, but it must not spread."""

    def __init__(self, *ends: str) -> None:
        self.ends = ends

    def _start(self, observer: Any, carrier: DemandScheduler) -> Disposable:
        def emit() -> None:
            observer.on_next("a")
            for end in self.ends:
                observer.on_error(BoomError("end")) if end == "error" else observer.on_completed()
                observer.on_next("b")

        carrier.call_later(1.0, emit)
        return Disposable()


@pytest.mark.parametrize("ends", [("error", "completed"), ("completed", "error"), ("completed",) * 2, ("error",) * 2])
@cases
def test_a_source_that_goes_on_after_its_end_is_not_heard(case: Case, ends: tuple[str, ...]) -> None:
    scheduler = VirtualScheduler()
    taker = Taker(scheduler, 100).connect(case.over(Rude(*ends)))
    scheduler.run()
    assert sorted(taker.held) == case.each("a")
    assert taker.ended is not None
    assert taker.ended.kind == ends[0]


@cases
def test_a_source_that_goes_on_after_a_dispose_is_not_heard(case: Case) -> None:
    scheduler = VirtualScheduler()
    taker = Taker(scheduler, 100).connect(case.over(Rude("completed")))
    taker.dispose()
    scheduler.run()
    assert (taker.held, taker.ended) == ([], None)


@cases
def test_an_inner_stream_that_fails_releases_what_it_should(case: Case) -> None:
    running = endless(case)
    running.calls.diagrams.update(a="---#")
    seen = record(running.scheduler, running.stream, until=3.5)
    if not case.maps or case.fails_items:
        assert seen.end is None  # the item failed, not the stream; what does not map has no inner streams
        seen.dispose()
    else:
        assert seen.end is not None
        assert seen.end.at == 3.0
    running.assert_released()


# 6  a `_subscribe_core` that raises becomes on_error


@pytest.mark.parametrize("broken", [Broken, BrokenStream])
@cases
def test_a_source_that_raises_when_it_is_subscribed_ends_the_stream_with_that_error(
    case: Case, broken: Callable[[], Observable[Any]]
) -> None:
    scheduler = VirtualScheduler()
    taker = Taker(scheduler, 4).connect(case.over(broken()))
    scheduler.run()
    assert taker.failed is None
    assert taker.ended is not None
    assert isinstance(taker.ended.value, BoomError)
    assert scheduler.pending == 0


@pytest.mark.parametrize("broken", [Broken, BrokenStream])
@mapping_cases
def test_an_inner_stream_that_raises_when_it_is_subscribed_fails_like_one_that_errs(
    case: Case, broken: Callable[[], Observable[Any]]
) -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "a-b|")
    taker = Taker(scheduler, 9).connect(case.over(source, lambda item: broken() if item == "a" else ours(item)))
    scheduler.run()
    assert taker.failed is None
    assert taker.ended is not None
    if case.fails_items:
        assert isinstance(taker.held[0], Outcome)
        assert isinstance(taker.held[0].error, BoomError)
        assert taker.held[1] == "B"
        assert taker.ended.kind == "completed"
    else:
        assert isinstance(taker.ended.value, BoomError)
    assert not is_open(source)
    assert scheduler.pending == 0


# 7  a downstream on_next that raises: everything released, the exception seen


def boom(_value: object) -> NoReturn:
    raise BoomError("the consumer's own")


@cases
def test_a_consumer_that_raises_sees_its_exception_and_leaves_nothing_running(case: Case) -> None:
    running = endless(case)
    seen = Acting(running.scheduler, boom).listen(running.stream, running.scheduler)
    with pytest.raises(BoomError, match="the consumer's own"):
        running.scheduler.run()
    running.assert_released()
    assert kinds(seen) == ["next"]


def caught(subscribe: Callable[[], Acting]) -> BaseException | None:
    """Return what a subscriber sees of its own exception: raised, or given back to its `on_error`, as in reactivex."""
    seen: Acting
    try:
        seen = subscribe()
    except BoomError as error:
        return error
    return seen.end.value if seen.end is not None else None


@pytest.mark.parametrize("foreign", [True, False], ids=["foreign", "ours"])
@cases
def test_a_consumer_that_raises_before_subscribe_returns_leaves_nothing_running(case: Case, foreign: bool) -> None:
    scheduler = VirtualScheduler()
    items = "bac" if case.id == "ordered-flat_map" else "abc"  # the first one to emit has others in flight beside it
    source: Observable[str] = at_once(items, ends=False) if foreign else Script((0, "b"))
    calls = Calls(scheduler, a="----A", c="----C")
    stream = case.over(source, lambda item: at_once("B", ends=False) if item == "b" else calls(item))
    seen = Acting(scheduler, boom)
    error = caught(lambda: seen.listen(stream, scheduler))
    assert str(error) == "the consumer's own"
    assert kinds(seen)[0] == "next"
    assert calls.open == 0
    assert scheduler.pending == 0
    if isinstance(source, Script):
        assert source.active == 0


@cases
def test_a_consumer_that_raises_inside_a_synchronous_retry_sees_its_exception(case: Case) -> None:
    scheduler = VirtualScheduler()
    source = Script((1.0, ServerError("again")), (0, "a")).pipe(own.retry(patient(), draw=lambda low, _high: low))
    seen = Acting(scheduler, boom)
    seen.listen(case.over(source, lambda _item: at_once("A", ends=False)), scheduler)
    with pytest.raises(BoomError, match="the consumer's own"):
        scheduler.run()
    assert kinds(seen) == ["next"]
    assert scheduler.pending == 0


@cases
def test_a_stage_below_whose_consumer_raises_ends_the_whole_run(case: Case) -> None:
    running = endless(case)
    below = own.flat_map(lambda item: Script((1.0, item)), window=4, on_failure="raise")
    Acting(running.scheduler, boom).listen(running.stream.pipe(below), running.scheduler)
    with pytest.raises(BoomError, match="the consumer's own"):
        running.scheduler.run()
    running.assert_released()


@cases
def test_a_sink_sees_the_exception_of_a_stock_operator_behind_the_stage(case: Case) -> None:
    async def main() -> None:
        source = rxllm.from_iterable(["a", "b"])
        stream = case.over(source)

        def refuse(_item: object) -> None:
            raise SystemExit("refused")  # no Exception: operators let it pass

        with pytest.raises(SystemExit, match="refused"):
            await rxllm.acollect(stream.pipe(ops.map(refuse)))

    # the loop re-raises SystemExit from its callback as well, so it is caught where the loop is run
    with pytest.raises(SystemExit, match="refused"):
        asyncio.run(main())


# 8  the same operator value subscribed twice, concurrently


@cases
def test_one_operator_value_serves_two_sources_at_once(case: Case) -> None:
    scheduler = VirtualScheduler()
    operator = case.make(ours)
    first = Acting(scheduler).listen(cold(scheduler, "-a--c|").pipe(operator), scheduler)
    second = Acting(scheduler).listen(cold(scheduler, "b-d---#").pipe(operator), scheduler)
    scheduler.run()
    assert sorted(first.values) == case.each("ac")
    assert first.end == Event(5.0, "completed")
    assert sorted(second.values) == case.each("bd")
    assert second.end is not None
    assert (second.end.at, second.end.kind) == (6.0, "error")


@cases
def test_one_stream_has_two_subscribers_that_know_nothing_of_each_other(case: Case) -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "-a-b-c|")
    stream = case.over(source)
    first = Acting(scheduler)
    first.act = lambda _value: first.dispose()
    first.listen(stream, scheduler)
    second = Acting(scheduler).listen(stream, scheduler)
    scheduler.run()
    assert len(first.events) == 1
    if case.id == "tee":  # its branches are shared on purpose
        assert second.end is not None
        assert isinstance(second.end.value, ConfigError)
    else:
        assert sorted(second.values) == case.each("abc")
        assert len(source.subscriptions) == 2
    assert not is_open(source)


# 9  an inner stream that never completes, the outer disposed


@cases
def test_disposing_the_outer_stream_releases_an_inner_one_that_never_ends(case: Case) -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "ab" if case.maps else "a--------")
    calls = Calls(scheduler, a="-", b="-")
    seen = record(scheduler, case.over(source, calls), dispose_at=7.0)
    assert seen.end is None
    assert calls.open == 0
    assert not is_open(source)
    assert {entry.until for made in [source, *calls.made] for entry in made.subscriptions} == {7.0}
    assert scheduler.pending == 0


# 10  dispose from a foreign thread


@cases
def test_a_dispose_from_another_thread_releases_on_the_loop(case: Case) -> None:
    threads: list[int] = []

    def never(_observer: object, _scheduler: object = None) -> abc.DisposableBase:
        return Disposable(lambda: threads.append(threading.get_ident()))

    async def main() -> None:
        call = rx.create(never)
        source = rxllm.from_iterable(["a"]) if case.maps else call
        seen: list[object] = []
        subscription = case.over(source, lambda _item: call).subscribe(seen.append)
        for _ in range(5):
            await asyncio.sleep(0)
        await asyncio.to_thread(subscription.dispose)
        for _ in range(5):
            await asyncio.sleep(0)
        assert threads == [threading.get_ident()]
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


# 11  a foreign inner observable; a foreign source that ignores demand


def on_a_thread(item: str, threads: list[threading.Thread]) -> Observable[str]:
    def subscribe(observer: abc.ObserverBase[str], _scheduler: abc.SchedulerBase | None = None) -> abc.DisposableBase:
        def emit() -> None:
            observer.on_next(item)
            observer.on_completed()

        threads.append(threading.Thread(target=emit))
        threads[-1].start()
        return Disposable()

    return rx.create(subscribe)


@mapping_cases
def test_stock_inner_streams_are_as_good_as_ours(case: Case) -> None:
    scheduler = VirtualScheduler()

    def stock(item: str) -> Observable[str]:
        return rx.timer(2.0).pipe(ops.map(lambda _n: item.upper()))

    seen = record(scheduler, case.over(cold(scheduler, "abc|"), stock))
    assert sorted(seen.values) == case.each("abc")
    assert kinds(seen)[-1] == "completed"


@cases
def test_what_comes_from_another_thread_is_delivered_on_the_loop(case: Case) -> None:
    threads: list[threading.Thread] = []
    where: set[int] = set()

    async def main() -> list[str]:
        source = rxllm.from_iterable(["a", "b"]) if case.maps else on_a_thread("a", threads)
        stream = case.over(source, lambda item: on_a_thread(item.upper(), threads))
        return await rxllm.acollect(stream.pipe(ops.do_action(lambda _item: where.add(threading.get_ident()))))

    got = asyncio.run(main())
    for thread in threads:
        thread.join()
    assert sorted(got) == case.each("ab" if case.maps else "a")
    assert where == {threading.get_ident()}


@waiting_cases
def test_a_source_that_ignores_demand_fails_after_1024_items_and_is_told_what_to_do(case: Case) -> None:
    scheduler = VirtualScheduler()
    subject: Subject[str] = Subject()
    taker = Taker(scheduler, 1).connect(case.over(subject, lambda _item: rx.never()))
    sent = 0
    while subject.observers and sent < 1_100:
        subject.on_next("a")
        sent += 1
    assert 1_024 < sent <= 1_024 + 10
    while taker.held:
        taker.take()
        scheduler.run()
    assert taker.ended is not None
    assert isinstance(taker.ended.value, ConfigError)
    assert "rxllm.from_iterable" in str(taker.ended.value)
    assert "overflow" in str(taker.ended.value)


# the rest of the contract


@pytest.mark.parametrize("case", [case for case in CASES if "flat_map" in case.id], ids=lambda case: case.id)
def test_groups_that_cannot_be_started_at_once_are_refused_with_a_hint(case: Case) -> None:
    scheduler = VirtualScheduler()
    grouped = at_once("abcdef").pipe(ops.group_by(lambda item: item))
    seen = record(scheduler, grouped.pipe(case.make(lambda group: group.pipe(ops.concat(rx.never())))))
    assert seen.end is not None
    assert isinstance(seen.end.value, ConfigError)
    assert "group_by" in str(seen.end.value)
    assert "call(client=" in str(seen.end.value)


def test_pipelines_inside_pipelines_at_window_one_do_not_deadlock() -> None:
    scheduler = VirtualScheduler()

    def pages(n: int) -> Observable[Any]:
        return rxllm.from_iterable(range(n)).pipe(own.flat_map(words, window=1))

    def words(n: int) -> Observable[Any]:
        return rxllm.from_iterable(range(n)).pipe(own.flat_map(lambda m: Script((1.0, m)), window=1, ordered=True))

    stream = rxllm.from_iterable(range(6)).pipe(own.flat_map(pages, window=1), own.flat_map(rx.just, window=1))
    taker = Taker(scheduler, 1).connect(stream)
    for _ in range(100):
        scheduler.run()
        taker.take()
    assert taker.taken == [m for n in range(6) for k in range(n) for m in range(k)]
    assert taker.ended is not None
    assert taker.ended.kind == "completed"
    assert scheduler.pending == 0


@cases
def test_every_operator_runs_under_the_stock_test_scheduler(case: Case) -> None:
    scheduler = TestScheduler()
    source = scheduler.create_cold_observable(
        ReactiveTest.on_next(10, "a"), ReactiveTest.on_next(20, "b"), ReactiveTest.on_completed(30)
    )
    calls: list[Any] = []

    def mapper(item: str) -> Observable[Any]:
        calls.append(
            scheduler.create_cold_observable(ReactiveTest.on_next(5, item.upper()), ReactiveTest.on_completed(15))
        )
        return calls[-1]  # type: ignore[no-any-return]

    seen = scheduler.start(lambda: case.over(source, mapper)).messages
    assert sorted(message.value.value for message in seen[:-1]) == case.each("ab")
    assert seen[-1].value.kind == "C"
    assert 230.0 <= seen[-1].time <= 250.0
    assert [made.subscriptions[0].unsubscribe < 1000 for made in [source, *calls]] == [True] * (len(calls) + 1)


@waiting_cases
def test_a_stage_asks_for_no_more_than_it_can_hold(case: Case) -> None:
    scheduler = VirtualScheduler()
    pulled: list[str] = []

    def items() -> Iterator[str]:
        while True:
            pulled.append("a")
            yield "a"

    taker = Taker(scheduler, 2).connect(case.over(rxllm.from_iterable(items())))
    for _ in range(50):
        scheduler.run()
        assert len(pulled) * len(case.emits("a")) - len(taker.taken) <= 2 + 4 + 4 + 2
        taker.take()
    assert len(taker.taken) == 50
    taker.dispose()


# sources


class Counted:
    """A re-iterable that counts what is read and what is closed."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.opened = 0
        self.closed = 0

    def __iter__(self) -> Iterator[int]:
        self.opened += 1
        try:
            yield from range(self.n)
        finally:
            self.closed += 1


def fed(items: Iterable[int]) -> rxllm.Feed[int]:
    feed: rxllm.Feed[int] = rxllm.Feed("buffer")
    for item in items:
        feed.put_nowait(item)
    feed.close()
    return feed


SOURCES: dict[str, Callable[[Counted], Observable[int]]] = {
    "from_iterable": rxllm.from_iterable,
    "from_iterable-in-a-thread": lambda counted: rxllm.from_iterable(counted, thread=True),
    "Feed": lambda counted: fed(range(counted.n)),
}
sources = pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
virtual_sources = pytest.mark.parametrize(
    "make", [SOURCES["from_iterable"], SOURCES["Feed"]], ids=["from_iterable", "Feed"]
)


async def settle(condition: Callable[[], bool]) -> bool:
    """Give other threads and the loop some turns."""
    for _ in range(200):
        if condition():
            return True
        await asyncio.sleep(0.005)
    return condition()


@sources
@pytest.mark.parametrize("n", [0, 1, 500])
def test_a_source_emits_all_its_items_and_completes(make: Callable[[Counted], Observable[int]], n: int) -> None:
    assert rxllm.collect(make(Counted(n))) == list(range(n))


@sources
def test_take_closes_a_source(make: Callable[[Counted], Observable[int]]) -> None:
    counted = Counted(10_000)

    async def main() -> None:
        assert await rxllm.acollect(make(counted).pipe(ops.take(3))) == [0, 1, 2]
        assert await settle(lambda: counted.closed == counted.opened)

    asyncio.run(main())


@virtual_sources
def test_a_source_disposed_inside_on_next_emits_nothing_more(make: Callable[[Counted], Observable[int]]) -> None:
    scheduler = VirtualScheduler()
    counted = Counted(100)
    seen = Acting(scheduler)
    seen.act = lambda value: seen.dispose() if value == 2 else None
    seen.listen(make(counted), scheduler)
    scheduler.run()
    assert seen.values == [0, 1, 2]
    assert counted.closed == counted.opened
    seen.dispose()
    assert scheduler.pending == 0


@virtual_sources
def test_a_source_disposed_inside_on_completed_ends_once(make: Callable[[Counted], Observable[int]]) -> None:
    scheduler = VirtualScheduler()
    seen = Acting(scheduler)
    seen.at_end = seen.dispose
    seen.listen(make(Counted(2)), scheduler)
    scheduler.run()
    assert kinds(seen) == ["next", "next", "completed"]
    assert scheduler.pending == 0


@sources
def test_a_consumer_that_raises_closes_the_source(make: Callable[[Counted], Observable[int]]) -> None:
    counted = Counted(100)
    met: list[BaseException] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: met.append(context["exception"]))
        make(counted).subscribe(boom)
        assert await settle(lambda: bool(met) and counted.closed == counted.opened)
        await asyncio.sleep(0.02)

    asyncio.run(main())
    assert [type(error) for error in met] == [BoomError]


@virtual_sources
def test_a_source_of_a_re_iterable_starts_again_and_a_feed_has_one_subscriber(
    make: Callable[[Counted], Observable[int]],
) -> None:
    scheduler = VirtualScheduler()
    source = make(Counted(3))
    first = Acting(scheduler).listen(source, scheduler)
    second = Acting(scheduler).listen(source, scheduler)
    scheduler.run()
    assert first.values == [0, 1, 2]
    if isinstance(source, rxllm.Feed):
        assert second.end is not None
        assert isinstance(second.end.value, ConfigError)
    else:
        assert second.values == [0, 1, 2]


@pytest.mark.parametrize("thread", [False, True], ids=["on-the-loop", "in-a-thread"])
def test_an_iterable_that_raises_when_it_is_opened_ends_the_stream_with_that_error(thread: bool) -> None:
    class Unreadable:
        def __iter__(self) -> NoReturn:
            raise BoomError("no such file")

    with pytest.raises(BoomError, match="no such file"):
        rxllm.collect(rxllm.from_iterable(Unreadable(), thread=thread))


@pytest.mark.parametrize("thread", [False, True], ids=["on-the-loop", "in-a-thread"])
def test_an_iterable_that_raises_in_the_middle_ends_the_stream_after_what_came_before(thread: bool) -> None:
    def torn() -> Iterator[int]:
        yield 1
        yield 2
        raise BoomError("torn")

    with pytest.raises(BoomError, match="torn") as failure:
        rxllm.collect(rxllm.from_iterable(torn(), thread=thread).pipe(own.flat_map(rx.just, window=1)))
    assert failure.value.partial == [1, 2]  # type: ignore[attr-defined]


@sources
def test_a_source_disposed_from_another_thread_is_closed(make: Callable[[Counted], Observable[int]]) -> None:
    counted = Counted(1_000_000) if make is not SOURCES["Feed"] else Counted(100)
    got: list[int] = []

    async def main() -> None:
        source = make(counted).pipe(own.flat_map(lambda n: rx.never() if n > 5 else rx.just(n), window=1))
        subscription = source.subscribe(got.append)
        assert await settle(lambda: len(got) == 6)
        await asyncio.to_thread(subscription.dispose)
        assert await settle(lambda: counted.closed == counted.opened)

    asyncio.run(main())
    assert got == [0, 1, 2, 3, 4, 5]


def test_a_stream_is_subscribed_on_the_loop_of_the_scheduler_it_is_given() -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        where: list[int] = []
        done = asyncio.Event()
        await asyncio.to_thread(
            lambda: rxllm.from_iterable([1]).subscribe(
                on_next=lambda _item: where.append(threading.get_ident()),
                on_completed=done.set,
                scheduler=AsyncIOScheduler(loop),
            )
        )
        await done.wait()
        assert where == [threading.get_ident()]

    asyncio.run(main())


def test_marbles_and_recursion_limit_are_as_these_tests_need_them() -> None:
    assert sys.getrecursionlimit() < MANY
    assert marbles(endless(CASES[0]).source._events) == "ab------c"
