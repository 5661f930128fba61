"""flat_map: a window of inner streams, in order or as they complete, and never more started than can be taken."""

import asyncio
import gc
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import Observable
from reactivex import operators as ops
from reactivex.subject import Subject

import rxllm
from rxllm import Outcome, Request
from rxllm.errors import ConfigError, ServerError
from rxllm.operators import flat_map
from rxllm.testing import Cold, Event, Script, Subscription, Taker, VirtualScheduler, cold, marbles, record


class Calls:
    """A mapper whose streams are scripted by item."""

    def __init__(self, scheduler: VirtualScheduler, diagrams: dict[str, str]) -> None:
        self.made: dict[str, Cold] = {item: cold(scheduler, diagram) for item, diagram in diagrams.items()}

    def __call__(self, item: str) -> Cold:
        return self.made[item]


@pytest.mark.parametrize(
    ("source", "calls", "settings", "expected"),
    [
        pytest.param("ab|", {"a": "--A|", "b": "-B|"}, {"window": 2}, "--(AB)|", id="two-at-a-time"),
        pytest.param("ab|", {"a": "---A|", "b": "B|"}, {"window": 2}, "-B-A|", id="as-they-complete"),
        pytest.param("ab|", {"a": "---A|", "b": "B|"}, {"window": 2, "ordered": True}, "---A(B|)", id="in-order"),
        pytest.param("ab|", {"a": "---A|", "b": "B|"}, {"window": 1}, "---AB|", id="one-at-a-time"),
        pytest.param("a-b|", {"a": "A-A-A|", "b": "BB|"}, {"window": 2}, "A-(AB)BA|", id="streams-interleave"),
        pytest.param(
            "a-b|", {"a": "A-A-A|", "b": "BB|"}, {"window": 2, "ordered": True}, "A-A-A(BB|)", id="streams-in-order"
        ),
        pytest.param("|", {}, {"window": 1}, "|", id="nothing"),
        pytest.param("a#", {"a": "--A|"}, {"window": 1}, "--A#", id="a-failed-source-waits-for-what-is-in-progress"),
        pytest.param("#", {}, {"window": 1}, "#", id="a-failed-source-with-nothing-in-progress"),
        pytest.param(
            "ab|", {"a": "---A|", "b": "-#"}, {"window": 2, "on_failure": "raise"}, "--#", id="raise-ends-the-stream"
        ),
        pytest.param(
            "ab|",
            {"a": "---A|", "b": "-#"},
            {"window": 2, "on_failure": "raise", "ordered": True},
            "--#",
            id="raise-does-not-wait-for-its-turn",
        ),
        pytest.param("a|", {"a": "|"}, {"window": 1}, "-|", id="an-empty-inner-stream"),
    ],
)
def test_flat_map_emits_as_its_diagram_says(
    source: str, calls: dict[str, str], settings: dict[str, Any], expected: str
) -> None:
    scheduler = VirtualScheduler()
    mapper = Calls(scheduler, calls)
    origin = cold(scheduler, source)
    assert marbles(record(scheduler, origin.pipe(flat_map(mapper, **settings))).events) == expected
    assert scheduler.pending == 0
    for made in [origin, *mapper.made.values()]:
        assert all(entry.until is not None for entry in made.subscriptions)


def test_flat_map_releases_its_inner_streams_as_they_end_and_the_rest_when_one_fails() -> None:
    scheduler = VirtualScheduler()
    mapper = Calls(scheduler, {"a": "-A|", "b": "---#", "c": "------C|"})
    record(scheduler, cold(scheduler, "abc---d").pipe(flat_map(mapper, window=3, on_failure="raise")))
    assert mapper.made["a"].subscriptions == [Subscription(0.0, 2.0)]
    assert mapper.made["b"].subscriptions == [Subscription(1.0, 4.0)]
    assert mapper.made["c"].subscriptions == [Subscription(2.0, 4.0)]


@pytest.mark.parametrize("ordered", [False, True], ids=["as-they-complete", "in-order"])
def test_flat_map_turns_a_failed_item_into_an_outcome_that_knows_its_request(ordered: bool) -> None:
    scheduler = VirtualScheduler()
    request = Request(body={"n": 1})
    error = ServerError("down")

    def mapper(item: object) -> Observable[Any]:
        if item == "mapper":
            raise error
        return rx.throw(error)

    seen = record(scheduler, rx.of("mapper", "inner", request).pipe(flat_map(mapper, window=1, ordered=ordered)))
    assert [outcome.error for outcome in seen.values] == [error] * 3
    assert [outcome.request.body for outcome in seen.values] == ["mapper", "inner", {"n": 1}]
    assert seen.values[2].request is request
    assert error.__traceback__ is None
    assert seen.end == Event(0.0, "completed")


@pytest.mark.parametrize("returned", [None, 5, "text", [1]])
def test_flat_map_says_what_a_mapper_returned_that_is_no_stream(returned: object) -> None:
    seen = record(VirtualScheduler(), rx.just("a").pipe(flat_map(lambda _item: returned, window=1)))  # type: ignore[arg-type,return-value]
    error = seen.values[0].error
    assert isinstance(error, ConfigError)
    assert str(error) == f"mapper must return an Observable or an awaitable, got {type(returned).__name__}"


calls_of_random_length = st.lists(st.integers(0, 6), max_size=25)


@settings(max_examples=100, deadline=None)
@given(
    delays=calls_of_random_length,
    fails=st.sets(st.integers(0, 24)),
    window=st.integers(1, 5),
    buffer=st.none() | st.integers(0, 4),
    room=st.integers(1, 4),
    ordered=st.booleans(),
    pace=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=6),
)
def test_flat_map_loses_nothing_keeps_its_order_and_its_bounds(  # noqa: PLR0917  drawn by hypothesis
    delays: list[int],
    fails: set[int],
    window: int,
    buffer: int | None,
    room: int,
    ordered: bool,
    pace: list[tuple[int, int]],
) -> None:
    scheduler = VirtualScheduler()
    pulled: list[int] = []
    running: Counter[str] = Counter()

    def items() -> Iterator[int]:
        for n in range(len(delays)):
            pulled.append(n)
            yield n

    def mapper(n: int) -> Observable[int]:
        running["now"] += 1
        running["most"] = max(running["most"], running["now"])
        script: Script[int] = Script((float(delays[n]), ServerError("down") if n in fails else n))
        return script.pipe(ops.finally_action(lambda: running.subtract(["now"])))

    stage = flat_map(mapper, window=window, buffer=buffer, ordered=ordered)
    taker = Taker(scheduler, room).connect(rxllm.from_iterable(items()).pipe(stage))
    ahead = buffer if buffer is not None else max(room, window if ordered else 0)
    for step in range(200):
        rest, n = pace[step % len(pace)]
        for _ in range(rest + 1):
            scheduler.advance(1.0)
            assert len(pulled) - len(taker.taken) - len(taker.held) <= window + ahead
        assert running["most"] <= window
        assert len(taker.held) <= room
        taker.take(n if step < 100 else room)
    scheduler.run()
    got = [taken.request.body if isinstance(taken, Outcome) else taken for taken in taker.taken]
    assert got == list(range(len(delays))) if ordered else sorted(got) == list(range(len(delays)))
    assert {taken.request.body for taken in taker.taken if isinstance(taken, Outcome)} == fails & set(pulled)
    assert taker.ended is not None
    assert taker.ended.kind == "completed"
    assert scheduler.pending == 0


@settings(max_examples=60, deadline=None)
@given(
    delays=st.lists(st.integers(1, 6), min_size=1, max_size=12),
    window=st.integers(1, 5),
    ordered=st.booleans(),
    at=st.integers(0, 30),
)
def test_flat_map_leaves_nothing_behind_whenever_it_is_disposed(
    delays: list[int], window: int, ordered: bool, at: int
) -> None:
    scheduler = VirtualScheduler()
    scripts = [Script((float(delay), n)) for n, delay in enumerate(delays)]
    stage = flat_map(lambda n: scripts[n], window=window, ordered=ordered)
    seen = record(scheduler, rxllm.from_iterable(range(len(delays))).pipe(stage), dispose_at=at + 0.5)
    assert sum(script.active for script in scripts) == 0
    assert all(event.at <= at for event in seen.events)
    assert scheduler.pending == 0


def test_flat_map_keeps_as_many_finished_items_ready_as_the_next_stage_runs() -> None:
    scheduler = VirtualScheduler()
    pulled: list[int] = []

    def items() -> Iterator[int]:
        for n in range(1_000):
            pulled.append(n)
            yield n

    first = flat_map(lambda n: Script((0.0, n)), window=2)
    second = flat_map(lambda n: Script((1e9, n)), window=5)
    taker = Taker(scheduler, 1).connect(rxllm.from_iterable(items()).pipe(first, second))
    scheduler.run(1.0)
    assert len(pulled) == 5 + 2 + 5  # in progress below, in progress here, ready
    taker.dispose()
    assert scheduler.pending == 0


def test_flat_map_holds_no_more_the_longer_its_inner_streams_wait_for_a_slow_consumer() -> None:
    scheduler = VirtualScheduler()
    pulled: list[int] = []

    def endless(_n: int) -> Observable[int]:
        def items() -> Iterator[int]:
            while True:
                pulled.append(1)
                yield 1

        return rxllm.from_iterable(items()).pipe(flat_map(rx.just, window=2))

    taker = Taker(scheduler, 1).connect(rxllm.from_iterable(range(9)).pipe(flat_map(endless, window=4)))
    ahead: list[int] = []
    for _ in range(200):
        scheduler.run()
        ahead.append(len(pulled) - len(taker.taken))
        taker.take()
    assert max(ahead[10:]) <= max(ahead[:10])
    assert len(taker.taken) == 200
    taker.dispose()


def test_an_ordered_flat_map_passes_on_a_thousand_items_that_waited_for_the_first_without_recursion() -> None:
    scheduler = VirtualScheduler()
    stage = flat_map(lambda n: Script((0.0 if n else 5.0, n)), window=3_000, ordered=True)
    seen = record(scheduler, rxllm.from_iterable(range(6_000)).pipe(stage))
    assert seen.values == list(range(6_000))
    assert seen.events[0].at == 5.0


def test_flat_map_finishes_what_is_in_progress_when_the_run_is_told_to_stop() -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "abcdefgh")
    taker = Taker(scheduler, 9).connect(source.pipe(flat_map(lambda item: Script((2.0, item)), window=9)))
    scheduler.run(2.5)
    taker.flow.drain()
    assert source.subscriptions == [Subscription(0.0, 2.5)]
    scheduler.run()
    assert taker.held == ["a", "b", "c"]
    assert taker.ended == Event(4.0, "completed")


def test_flat_map_takes_1024_items_that_nobody_demanded_and_serves_them_all() -> None:
    scheduler = VirtualScheduler()
    subject: Subject[int] = Subject()
    taker = Taker(scheduler, 9).connect(subject.pipe(flat_map(lambda n: Script((1.0, n)), window=1, buffer=0)))
    for n in range(1_025):  # one is in progress, 1,024 wait
        subject.on_next(n)
    subject.on_completed()
    while taker.ended is None:
        scheduler.run()
        taker.take(9)
    assert taker.taken == list(range(1_025))


def test_flat_map_starts_no_more_than_it_may_hold_for_a_source_that_does_not_wait() -> None:
    scheduler = VirtualScheduler()
    started: list[int] = []

    def mapper(n: int) -> Observable[int]:
        started.append(n)
        return Script((0.0, n))

    subject: Subject[int] = Subject()
    taker = Taker(scheduler, 1).connect(subject.pipe(flat_map(mapper, window=2, buffer=1)))
    for n in range(100):
        subject.on_next(n)
    scheduler.run()
    assert len(started) == 1 + 2 + 1  # taken, the window, the buffer
    taker.dispose()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"window": 0}, "window must be a whole number >= 1, got 0"),
        ({"window": -3}, "window must be a whole number >= 1, got -3"),
        ({"window": 1.5}, "window must be a whole number >= 1, got 1.5"),
        ({"window": float("nan")}, "window must be a whole number >= 1, got nan"),
        ({"window": True}, "window must be a whole number >= 1, got True"),
        ({"window": None}, "window must be a whole number >= 1, got None"),
        ({"window": 1, "buffer": -1}, "buffer must be a whole number >= 0 or None, got -1"),
        ({"window": 1, "buffer": "2"}, "buffer must be a whole number >= 0 or None, got '2'"),
        ({"window": 1, "on_failure": "ignore"}, "on_failure must be 'emit' or 'raise', got 'ignore'"),
        ({"window": 1, "mapper": 5}, "mapper must be callable, got 5"),
    ],
)
def test_flat_map_refuses_bad_arguments_by_name_and_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        flat_map(**{"mapper": rx.just, **arguments})
    assert str(refusal.value) == message


# awaitables


def test_flat_map_awaits_what_an_async_mapper_returns() -> None:
    async def mapper(n: int) -> int:
        await asyncio.sleep(0.003 * (3 - n))
        return n * 10

    source = rxllm.from_iterable(range(3))
    assert sorted(asyncio.run(rxllm.acollect(source.pipe(flat_map(mapper, window=3))))) == [0, 10, 20]
    assert asyncio.run(rxllm.acollect(source.pipe(flat_map(mapper, window=3, ordered=True)))) == [0, 10, 20]


def test_flat_map_fails_the_item_whose_awaitable_raises() -> None:
    async def mapper(n: int) -> int:
        await asyncio.sleep(0)
        if n == 1:
            raise ServerError("down")
        return n

    got = asyncio.run(rxllm.acollect(rxllm.from_iterable(range(3)).pipe(flat_map(mapper, window=1))))
    assert got[0] == 0
    assert isinstance(got[1], Outcome)
    assert isinstance(got[1].error, ServerError)
    assert got[2] == 2


def test_flat_map_cancels_its_awaitables_when_it_is_disposed() -> None:
    ended: list[str] = []

    async def mapper(_n: int) -> None:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            ended.append("cancelled")
            raise

    async def main() -> None:
        async with rxllm.aiterate(rxllm.from_iterable(range(9)).pipe(flat_map(mapper, window=3))):
            await asyncio.sleep(0.01)
        await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())
    assert ended == ["cancelled"] * 3


def test_flat_map_fails_the_item_whose_awaitable_is_cancelled_from_outside() -> None:
    async def main() -> list[Any]:
        future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().call_later(0.005, future.cancel)
        return await rxllm.acollect(rxllm.from_iterable([1]).pipe(flat_map(lambda _n: future, window=1)))

    (outcome,) = asyncio.run(main())
    assert "cancelled from outside" in str(outcome.error)


def test_flat_map_refuses_awaitables_in_virtual_time_and_closes_them() -> None:
    async def mapper(n: int) -> int:
        return n  # never runs; a coroutine that nobody closes would be a warning, and so an error

    seen = record(VirtualScheduler(), rx.just(1).pipe(flat_map(mapper, window=1)))
    gc.collect()
    assert isinstance(seen.values[0].error, ConfigError)
    assert "asyncio" in str(seen.values[0].error)


def test_flat_map_closes_what_its_mapper_returned_after_it_ended_the_run() -> None:
    scheduler = VirtualScheduler()

    async def nothing() -> None:
        pass

    subject: Subject[int] = Subject()

    def mapper(_n: int) -> Any:
        taker.dispose()
        return nothing()

    taker = Taker(scheduler, 1).connect(subject.pipe(flat_map(mapper, window=1)))
    subject.on_next(1)
    gc.collect()
    assert not subject.observers
    assert (taker.held, taker.ended) == ([], None)


def test_a_window_that_is_asked_for_follows_what_it_says():
    scheduler, window, script = VirtualScheduler(), [2], Script((1.0, "x"))
    stage = flat_map(lambda _: script, window=lambda: window[0])
    taker = Taker(scheduler, 1_000).connect(rxllm.from_iterable(itertools.count()).pipe(stage))
    scheduler.run(until=0.5)
    assert script.active == 2
    window[0] = 5
    scheduler.run(until=1.5)
    assert script.active == 5
    window[0] = 1
    scheduler.run(until=2.5)
    assert script.active == 1
    taker.dispose()
    assert (script.active, scheduler.pending) == (0, 0)


def test_streams_behind_the_oldest_keep_a_bounded_number_of_items_and_lose_none():
    scheduler, pulled = VirtualScheduler(), [0]

    def counted(n: int) -> Observable[int]:
        def items() -> Iterator[int]:
            for _ in range(100):
                pulled[0] += 1
                yield n

        return rxllm.from_iterable(items())

    stage = flat_map(counted, window=4, ordered=True, on_failure="raise")
    taker = Taker(scheduler, 2).connect(rxllm.from_iterable(range(6)).pipe(stage))
    ahead = 0
    scheduler.run()
    while taker.take():
        scheduler.run()
        ahead = max(ahead, pulled[0] - len(taker.taken))
    assert taker.taken == [n for n in range(6) for _ in range(100)]
    assert ahead <= 4 * 16 + 2  # a window of streams keeps 16 each, the consumer two
    assert taker.ended is not None
    assert taker.ended.kind == "completed"
    assert scheduler.pending == 0


def in_order(scheduler: VirtualScheduler, streams: list[Any], act: Callable[[Any], object]) -> Taker:
    stage = flat_map(lambda n: streams[n], window=len(streams), ordered=True)
    taker = Taker(scheduler, 9).connect(rxllm.from_iterable(range(len(streams))).pipe(stage, ops.do_action(act)))
    scheduler.run()
    return taker


def test_a_stream_that_ends_while_what_it_kept_is_passed_on_takes_no_other_along() -> None:
    subjects: list[Subject[str]] = [Subject() for _ in range(3)]
    scheduler = VirtualScheduler()
    taker = in_order(scheduler, subjects, lambda item: subjects[1].on_completed() if item == "b" else None)
    subjects[1].on_next("b")
    subjects[0].on_completed()
    subjects[2].on_next("c")
    subjects[2].on_completed()
    scheduler.run()
    assert taker.held == ["b", "c"]
    assert taker.ended == Event(0.0, "completed")


def test_a_consumer_that_leaves_while_what_was_kept_is_passed_on_gets_no_more_of_it() -> None:
    subjects: list[Subject[str]] = [Subject() for _ in range(3)]
    taker = in_order(VirtualScheduler(), subjects, lambda _item: taker.dispose())
    for item in ("b", "not any more"):
        subjects[1].on_next(item)
    subjects[1].on_completed()
    subjects[2].on_next("never")
    subjects[0].on_completed()
    assert "not any more" not in taker.held
    assert not any(subject.observers for subject in subjects)
    assert taker.ended is None


def test_short_streams_that_end_as_the_turn_comes_to_the_next_are_passed_on_in_order() -> None:
    scheduler = VirtualScheduler()
    stage = flat_map(lambda n: rxllm.from_iterable([n, n]), window=3, ordered=True)
    taker = Taker(scheduler, 9).connect(rxllm.from_iterable(range(20)).pipe(stage))
    scheduler.run()
    while taker.take(9):
        scheduler.run()
    assert taker.failed is None
    assert taker.taken == [n for n in range(20) for _ in range(2)]


def test_the_oldest_stream_waits_for_the_consumer_no_more_when_it_was_cut() -> None:
    scheduler, cut = VirtualScheduler(), Subject[int]()
    stage = flat_map(
        lambda _n: rxllm.from_iterable(itertools.count()).pipe(ops.take_until(cut)), ordered=True, window=1
    )
    taker = Taker(scheduler, 2).connect(rxllm.from_iterable([0]).pipe(stage))
    scheduler.run()
    assert len(taker.waiting) == 1
    cut.on_next(0)
    assert not taker.waiting
    scheduler.run()
    assert taker.ended == Event(0.0, "completed")


@pytest.mark.parametrize("answer", [0, -1, "4", None, 1.5, True])
def test_a_window_function_that_says_no_number_ends_the_stream_with_its_name(answer: object):
    stage = flat_map(rx.of, window=lambda: answer)
    with pytest.raises(ConfigError, match="window"):
        rxllm.collect(rxllm.from_iterable([1, 2]).pipe(stage))
