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
from reactivex.disposable import Disposable
from reactivex.subject import Subject

import rxllm
from rxllm import Backoff, Outcome, Request
from rxllm.clock import Handle
from rxllm.demand import DemandScheduler
from rxllm.errors import ConfigError, QuotaExhaustedError, RateLimitedError, ServerError
from rxllm.operators import expand, flat_map, retry, tee, to_outcome
from rxllm.operators.to_outcome import StageFlow
from rxllm.stream import Stream
from rxllm.testing import Cold, Event, Recorder, Script, Subscription, Taker, VirtualScheduler, cold, marbles, record


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


class Waiting(Stream[int]):
    """Waits, as a retry does, and says so to the stage that it is in; then it works, and emits its number."""

    def __init__(self, number: int, wait: float, work: float, *, first: float = 0.0) -> None:
        self.number = number
        self.wait = wait
        self.work = work
        self.first = first  # seconds before it waits

    def _start(self, observer: Any, carrier: DemandScheduler) -> Any:
        released: list[Callable[[], object]] = []
        timers: list[Handle] = []

        def wait() -> None:
            if self.wait and isinstance(carrier.flow, StageFlow):
                released.append(carrier.flow.park())  # type: ignore[attr-defined]
            timers.append(carrier.call_later(self.wait, go_on))

        def go_on() -> None:
            while released:
                released.pop()()
            timers.append(carrier.call_later(self.work, end))

        def end() -> None:
            observer.on_next(self.number)
            observer.on_completed()

        def dispose() -> None:
            timers[-1].cancel()
            while released:
                released.pop()()

        if self.first:
            timers.append(carrier.call_later(self.first, wait))
        else:
            wait()
        return Disposable(dispose)


@pytest.mark.parametrize("ordered", [False, True], ids=["as-they-complete", "in-order"])
def test_items_that_wait_for_long_let_others_go_if_they_may_be_parked(ordered: bool) -> None:
    waits = [10.0, 10.0, 0.0, 0.0, 0.0, 10.0, 10.0, 0.0, 0.0]
    started: dict[int, float] = {}

    def run(**settings: Any) -> Recorder:
        scheduler = VirtualScheduler()
        started.clear()

        def mapper(n: int) -> Waiting:
            started[n] = scheduler.seconds()
            return Waiting(n, waits[n], 1.0)

        seen = record(scheduler, rxllm.from_iterable(range(9)).pipe(flat_map(mapper, ordered=ordered, **settings)))
        assert sorted(seen.values) == list(range(9))
        assert seen.values == list(range(9)) or not ordered
        assert scheduler.pending == 0
        return seen

    run(window=2)
    assert [started[n] for n in (2, 3, 4)] == [11.0, 11.0, 12.0]
    run(window=2, parking=True, buffer=9)
    assert [started[n] for n in (2, 3, 4, 5)] == [0.0, 0.0, 1.0, 1.0]  # the places of those that wait, and no more
    assert started[6] == 2.0
    assert started[7] == 11.0  # four wait, two of them in a second window


def test_an_item_that_begins_to_wait_lets_another_one_start_at_once() -> None:
    scheduler = VirtualScheduler()
    plans = [Waiting(0, 10.0, 5.0, first=3.0), Waiting(1, 0.0, 12.0), Waiting(2, 0.0, 1.0)]
    started: list[float] = []

    def mapper(n: int) -> Waiting:
        started.append(scheduler.seconds())
        return plans[n]

    record(scheduler, rxllm.from_iterable(range(3)).pipe(flat_map(mapper, window=1, parking=True)))
    assert started == [0.0, 3.0, 18.0]


def test_an_item_that_goes_on_takes_its_place_back_before_another_one_starts() -> None:
    scheduler = VirtualScheduler()
    waits = [(2.0, 5.0), (0.0, 4.0), (0.0, 4.0), (0.0, 1.0)]
    started: list[float] = []

    def mapper(n: int) -> Waiting:
        started.append(scheduler.seconds())
        return Waiting(n, *waits[n])

    record(scheduler, rxllm.from_iterable(range(4)).pipe(flat_map(mapper, window=2, parking=True)))
    assert started == [0.0, 0.0, 0.0, 4.0]  # three are in progress from 2.0 on, and two of them end at 4.0


def test_a_retry_that_has_waited_for_long_takes_its_place_back() -> None:
    scheduler = VirtualScheduler()
    scripts = {
        "a": Script((3.0, RateLimitedError("later", 429, 10.0)), (5.0, "A")),
        "b": Script((12.0, "B")),
        "c": Script((1.0, "C")),
    }
    started: dict[str, float] = {}

    def mapper(item: str) -> Observable[str]:
        started[item] = scheduler.seconds()
        return scripts[item].pipe(retry(Backoff(), draw=lambda low, _high: low))

    seen = record(scheduler, rxllm.from_iterable(["a", "b", "c"]).pipe(flat_map(mapper, window=1, parking=True)))
    assert started == {"a": 0.0, "b": 3.0, "c": 18.0}
    assert seen.values == ["B", "A", "C"]


@settings(max_examples=100, deadline=None)
@given(
    items=st.lists(st.tuples(st.sampled_from([0, 0, 7]), st.integers(1, 4)), max_size=25),
    window=st.integers(1, 4),
    buffer=st.none() | st.integers(0, 3),
    room=st.integers(1, 4),
    ordered=st.booleans(),
    parking=st.booleans(),
    take=st.integers(0, 3),
    disposed=st.none() | st.integers(0, 40),
)
def test_a_stage_starts_no_more_than_two_windows_and_its_buffer_whoever_is_parked(  # noqa: PLR0917  drawn by hypothesis
    items: list[tuple[int, int]],
    window: int,
    buffer: int | None,
    room: int,
    ordered: bool,
    parking: bool,
    take: int,
    disposed: int | None,
) -> None:
    scheduler = VirtualScheduler()
    pulled: list[int] = []

    def mapper(n: int) -> Waiting:
        pulled.append(n)
        return Waiting(n, *map(float, items[n]))

    stage = flat_map(mapper, window=window, buffer=buffer, ordered=ordered, parking=parking)
    taker = Taker(scheduler, room).connect(rxllm.from_iterable(range(len(items))).pipe(stage))
    most = window * (1 + parking) + (buffer if buffer is not None else max(room, window if ordered else 0))
    for second in range(150):
        if second == disposed:
            taker.dispose()
            break
        scheduler.advance(1.0)
        assert len(pulled) - len(taker.taken) - len(taker.held) <= most
        taker.take(take if second < 60 else room)
    scheduler.run()
    assert scheduler.pending == 0
    if disposed is None:
        got = list(taker.taken)
        assert got == list(range(len(items))) if ordered else sorted(got) == list(range(len(items)))


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


# an error that halts

DRY = QuotaExhaustedError("used up")
HALTING: Any = {"a": "---A|", "b": "-#", "c": "--C|", "d": "D|", "e": "E|"}


class Halting:
    """A mapper whose streams are scripted by item; those that fail halt."""

    def __init__(self, scheduler: VirtualScheduler) -> None:
        self.scheduler = scheduler
        self.started: list[str] = []

    def __call__(self, item: str) -> Cold:
        self.started.append(item)
        return cold(self.scheduler, HALTING[item], error=DRY)


def letters(events: list[Event]) -> list[Event]:
    """Return events with a small letter for each failed outcome: its item's."""
    return [e._replace(value=e.value.request.body) if isinstance(e.value, Outcome) else e for e in events]


@pytest.mark.parametrize(
    ("source", "settings", "expected", "released"),
    [
        pytest.param("abc---d|", {"window": 3}, "--bAC#", 2, id="what-is-in-progress-ends-as-it-does"),
        pytest.param("abc---d|", {"window": 3, "ordered": True}, "---A(bC)#", 2, id="in-order-and-then-the-error"),
        pytest.param("abcd---|", {"window": 2}, "--(bc)A#", 2, id="what-waits-for-a-place-fails-with-it"),
        pytest.param("(bacde)|", {"window": 1}, "-(bacde#)", 1, id="all-that-waits"),
        pytest.param("(bacde)|", {"window": 1, "ordered": True}, "-(bacde#)", 1, id="all-that-waits-in-order"),
        pytest.param("abc---d|", {"window": 3, "on_failure": "raise"}, "--#", 2, id="raise-ends-it-at-once"),
        pytest.param("ab|", {"window": 2}, "--bA#", 2, id="a-source-that-has-completed"),
        pytest.param("ab-d-e|", {"window": 9}, "--bA#", 2, id="nothing-more-is-taken"),
    ],
)
def test_an_error_that_halts_ends_the_stage_after_what_is_in_progress(
    source: str, settings: dict[str, Any], expected: str, released: float
) -> None:
    scheduler = VirtualScheduler()
    mapper = Halting(scheduler)
    origin = cold(scheduler, source)
    seen = record(scheduler, origin.pipe(flat_map(mapper, **settings)))
    assert marbles(letters(seen.events)) == expected
    assert seen.end is not None
    assert seen.end.value is DRY
    assert all(outcome.error is DRY for outcome in seen.values if isinstance(outcome, Outcome))
    assert origin.subscriptions == [Subscription(0.0, released)]
    assert not set(mapper.started) & {"d", "e"}
    assert scheduler.pending == 0


def test_a_mapper_whose_error_halts_is_not_asked_again() -> None:
    scheduler = VirtualScheduler()
    asked: list[int] = []

    def mapper(n: int) -> Observable[int]:
        asked.append(n)
        error = ConfigError("no cost will name it")
        error.halts = n == 1
        raise error

    seen = record(scheduler, rxllm.from_iterable(itertools.count()).pipe(flat_map(mapper, window=4)))
    assert asked == [0, 1]
    assert [outcome.request.body for outcome in seen.values] == [0, 1]
    assert seen.end == Event(0.0, "error", seen.values[1].error)
    assert scheduler.pending == 0


def test_only_true_halts() -> None:
    class ForeignError(Exception):
        halts = "yes"

    seen = record(VirtualScheduler(), rx.of(1, 2).pipe(flat_map(lambda _n: rx.throw(ForeignError()), window=1)))
    assert len(seen.values) == 2
    assert seen.end == Event(0.0, "completed")


def test_the_first_error_that_halts_is_the_last_event_and_that_of_the_source_goes_before() -> None:
    scheduler = VirtualScheduler()
    errors = [QuotaExhaustedError("first"), QuotaExhaustedError("second")]
    streams = [cold(scheduler, "-#", error=errors[0]), cold(scheduler, "---#", error=errors[1])]
    seen = record(scheduler, rx.of(0, 1).pipe(flat_map(lambda n: streams[n], window=2)))
    assert [outcome.error for outcome in seen.values] == errors
    assert seen.end is not None
    assert seen.end.value is errors[0]
    source = cold(scheduler, "a#", error=ServerError("source"))
    seen = record(scheduler, source.pipe(flat_map(lambda _item: cold(scheduler, "--#", error=DRY), window=2)))
    assert seen.end is not None
    assert isinstance(seen.end.value, ServerError)


def halted(request: Request) -> Observable[Any]:
    return rx.throw(DRY).pipe(to_outcome(request))


@pytest.mark.parametrize(
    "mapper",
    [
        pytest.param(halted, id="directly"),
        pytest.param(lambda request: halted(request).pipe(ops.map(lambda outcome: outcome)), id="behind-map"),
        pytest.param(lambda request: halted(request).pipe(ops.retry(3)), id="behind-retry"),
        pytest.param(lambda request: halted(request).pipe(expand(lambda _outcome: None)), id="behind-expand"),
        pytest.param(
            lambda request: rx.of(request).pipe(expand(lambda item: halted(item) if item is request else None)),
            id="inside-expand",
        ),
    ],
)
@pytest.mark.parametrize("ordered", [False, True], ids=["as-they-complete", "in-order"])
def test_an_outcome_whose_error_halts_is_the_only_one_of_its_item(mapper: Any, ordered: bool) -> None:
    requests = [Request(body=n) for n in range(3)]
    pulled = iter(requests)
    stage = flat_map(mapper, window=1, ordered=ordered)
    seen = record(VirtualScheduler(), rxllm.from_iterable(pulled).pipe(stage))
    outcomes = [value for value in seen.values if isinstance(value, Outcome)]
    assert [(outcome.request, outcome.error) for outcome in outcomes] == [(requests[0], DRY)]
    assert seen.end == Event(0.0, "error", DRY)
    assert next(pulled) is requests[1]


def test_a_stage_that_raises_ends_at_once_also_by_an_outcome_whose_error_halts() -> None:
    scheduler = VirtualScheduler()
    streams = [Script((5.0, "a")), Script((1.0, DRY)).pipe(to_outcome(Request(body="b")))]
    seen = record(scheduler, rx.of(0, 1).pipe(flat_map(lambda n: streams[n], window=2, on_failure="raise")))
    assert seen.end == Event(1.0, "error", DRY)
    assert "a" not in seen.values
    assert scheduler.pending == 0


def test_an_item_of_several_that_halts_keeps_what_it_had_and_fails_itself() -> None:
    scheduler = VirtualScheduler()
    seen = record(scheduler, rx.of("x").pipe(flat_map(lambda _x: cold(scheduler, "AB#", error=DRY), window=1)))
    assert marbles(letters(seen.events)) == "AB(x#)"


def test_what_is_in_progress_inside_an_item_that_halts_is_not_lost() -> None:
    scheduler = VirtualScheduler()
    requests = [Request(body=n) for n in range(3)]

    def try_one(request: Request) -> Observable[Any]:
        script: Script[Any] = Script((request.body + 1.0, DRY if request.body == 0 else rxllm.Reply(value="good")))
        return script.pipe(to_outcome(request))

    stage = flat_map(lambda batch: rx.of(*batch).pipe(ops.flat_map(try_one)), window=2)
    seen = record(scheduler, rx.of(requests, requests).pipe(stage))
    assert [outcome.request.body for outcome in seen.values] == [0, 0, 1, 1, 2, 2]
    assert seen.end == Event(3.0, "error", DRY)


def test_a_stage_inside_an_item_halts_and_then_the_one_around_it() -> None:
    scheduler = VirtualScheduler()
    scripts: Any = {"a": Script((1.0, "A")), "b": Script((0.5, DRY)), "z": Script((9.0, "Z"))}
    outer = flat_map(
        lambda batch: rxllm.from_iterable(batch).pipe(flat_map(lambda item: scripts[item], window=2)), window=2
    )
    batches = [["a", "b", "x"], ["z"], ["never"]]
    seen = record(scheduler, rxllm.from_iterable(batches).pipe(outer))
    failed = [value.request.body if isinstance(value, Outcome) else value for value in seen.values]
    assert failed == ["b", "A", ["a", "b", "x"], "Z"]
    assert seen.end == Event(9.0, "error", DRY)


@settings(max_examples=150, deadline=None)
@given(
    delays=st.lists(st.integers(0, 5), min_size=1, max_size=12),
    dry=st.integers(0, 40),
    window=st.integers(1, 5),
    room=st.integers(1, 4),
    ordered=st.booleans(),
    waits=st.booleans(),
)
def test_every_item_pulled_gives_one_outcome_also_when_the_stage_halts(  # noqa: PLR0917  drawn by hypothesis
    delays: list[int], dry: int, window: int, room: int, ordered: bool, waits: bool
) -> None:
    scheduler = VirtualScheduler()
    pulled: list[int] = []
    at_halt: list[int] = []

    def items() -> Iterator[int]:
        for n in itertools.count():
            pulled.append(n)
            yield n

    def mapper(n: int) -> Observable[int]:
        assert not at_halt
        script: Script[int] = Script((float(delays[n % len(delays)]), DRY if n >= dry else n))
        return script.pipe(ops.do_action(on_error=lambda _error: at_halt.append(len(pulled))))

    source: Any = rxllm.from_iterable(items())
    if not waits:  # some of them wait for a place
        source = rx.timer(0.0, 0.25).pipe(ops.do_action(pulled.append))
    taker = Taker(scheduler, room).connect(source.pipe(flat_map(mapper, window=window, ordered=ordered)))
    for _ in range(2_000):
        scheduler.advance(0.5)
        taker.take(room)
        if taker.ended is not None:
            break
    got = [taken.request.body if isinstance(taken, Outcome) else taken for taken in taker.taken]
    assert sorted(got) == sorted(pulled)
    assert not ordered or got == pulled
    assert taker.ended is not None
    assert taker.ended.value is DRY
    assert len(pulled) == at_halt[0]  # nothing was pulled after the first of them
    assert scheduler.pending == 0


def numbers(value: Any) -> list[int]:
    """Return the items that `value` is about: one, a list of them, or what is in the request of a failed outcome."""
    if isinstance(value, Outcome):
        return numbers(value.request.body)
    return [n for item in value for n in numbers(item)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("ordered", [False, True], ids=["as-they-complete", "in-order"])
@pytest.mark.parametrize(
    "between",
    [(), (ops.map(lambda item: item),), (ops.buffer_with_count(2),)],
    ids=["nothing-between", "map-between", "buffer-between"],
)
def test_what_is_in_progress_in_the_stages_above_is_not_lost_when_one_halts(between: Any, ordered: bool) -> None:
    scheduler = VirtualScheduler()
    pulled: list[int] = []
    started: list[int] = []

    def items() -> Iterator[int]:
        for n in itertools.count():
            pulled.append(n)
            yield n

    def first(n: int) -> Observable[int]:
        return Script((1.0 + n % 4, ServerError("down") if n == 4 else n))

    def last(item: Any) -> Observable[Any]:
        started.extend(numbers(item))
        return Script((0.5, DRY if len(started) > 2 else item))

    above = [flat_map(first, window=4, ordered=ordered), flat_map(lambda item: Script((0.25, item)), window=3)]
    stream = rxllm.from_iterable(items()).pipe(*above, *between, flat_map(last, window=2, ordered=ordered))
    seen = record(scheduler, stream)
    got = [n for value in seen.values for n in numbers(value)]
    assert sorted(got) == pulled
    assert len(started) <= 6
    assert seen.end is not None
    assert seen.end.value is DRY
    assert scheduler.pending == 0


def test_an_item_that_failed_in_a_stage_above_stays_what_it_is_when_the_one_below_halts() -> None:
    scheduler = VirtualScheduler()
    scripts: Any = {"a": Script((0.5, "A")), "b": Script((2.0, ServerError("down"))), "c": Script((3.0, "C"))}
    stages = flat_map(lambda item: scripts[item], window=3), flat_map(lambda _item: Script((1.0, DRY)), window=3)
    seen = record(scheduler, rxllm.from_iterable(["a", "b", "c"]).pipe(*stages))
    assert [(value.request.body, str(value.error)) for value in seen.values] == [
        ("A", "used up"),
        ("b", "down"),
        ("C", "used up"),
    ]
    assert seen.end == Event(3.0, "error", DRY)


class Numbers:
    """An endless source that counts what is taken of all its iterators."""

    taken = 0

    def __iter__(self) -> Iterator[int]:
        for n in itertools.count():
            Numbers.taken += 1
            yield n


@pytest.mark.parametrize(
    "again",
    [
        pytest.param(ops.repeat(), id="repeat"),
        pytest.param(lambda stream: rx.concat(stream, rxllm.from_iterable(Numbers())), id="concat-a-source"),
        pytest.param(lambda stream: rx.concat(stream, stream, stream), id="concat-a-stage"),
    ],
)
def test_what_subscribes_another_source_for_the_one_that_was_stopped_is_cut_off(again: Any) -> None:
    scheduler = VirtualScheduler()
    Numbers.taken = 0
    first = flat_map(lambda n: Script((1.0, n)), window=2)
    last = flat_map(lambda n: Script((0.0, DRY if n > 5 else n)), window=2)
    seen = record(scheduler, rxllm.from_iterable(Numbers()).pipe(first, again, last), until=100.0)
    assert seen.end is not None
    assert seen.end.value is DRY
    assert seen.end.at < 10.0
    assert len(seen.values) < 20
    assert Numbers.taken <= 7 + 2 + 2 + 2  # those up to the one that halts, and what the windows and the buffer hold
    assert scheduler.pending == 0


def test_a_stage_above_that_raises_ends_what_it_has_begun_when_the_one_below_halts() -> None:
    scheduler = VirtualScheduler()
    scripts: Any = {"a": Script((0.5, "A")), "b": Script((2.0, "B")), "c": Script((1.0, "C"))}
    first = flat_map(lambda item: scripts[item], window=2, on_failure="raise")

    def halting(_item: str) -> Observable[str]:
        raise DRY

    seen = record(scheduler, cold(scheduler, "(abc)---|").pipe(first, flat_map(halting, window=3)))
    assert [value.request.body for value in seen.values] == ["A", "C", "B"]
    assert seen.end == Event(2.0, "error", DRY)


def test_the_error_that_halts_is_the_end_also_when_a_stage_above_fails_after_it() -> None:
    scheduler = VirtualScheduler()
    scripts: Any = {"a": Script((0.5, "A")), "b": Script((2.0, ServerError("down")))}
    first = flat_map(lambda item: scripts[item], window=2, on_failure="raise")
    seen = record(
        scheduler, rxllm.from_iterable(["a", "b"]).pipe(first, flat_map(lambda _item: rx.throw(DRY), window=3))
    )
    assert [value.request.body for value in seen.values] == ["A"]
    assert seen.end == Event(2.0, "error", DRY)


def test_the_error_that_halts_is_the_end_also_when_the_source_of_a_stage_above_has_failed() -> None:
    scheduler = VirtualScheduler()
    scripts: Any = {"a": Script((1.0, "A")), "b": Script((3.0, "B"))}
    source = cold(scheduler, "(ab)#", error=ServerError("source"))
    first = flat_map(scripts.__getitem__, window=2)
    seen = record(scheduler, source.pipe(first, flat_map(lambda _item: rx.throw(DRY), window=3)))
    assert [value.request.body for value in seen.values] == ["A", "B"]
    assert seen.end == Event(3.0, "error", DRY)


@pytest.mark.parametrize("on_failure", ["emit", "raise"])
def test_a_stage_that_comes_after_the_halt_of_the_one_below_starts_nothing(on_failure: Any) -> None:
    scheduler = VirtualScheduler()
    started: list[str] = []

    def first(name: str) -> Callable[[int], Observable[str]]:
        def mapper(n: int) -> Observable[str]:
            started.append(f"{name}{n}")
            return Script((1.0, f"{name}{n}"))

        return mapper

    a, b = (rxllm.from_iterable(range(9)).pipe(flat_map(first(name), window=2, on_failure=on_failure)) for name in "ab")
    seen = record(scheduler, rx.concat(a, b).pipe(flat_map(lambda _item: rx.throw(DRY), window=9)), until=50.0)
    assert set(started) <= {"a0", "a1", "a2", "a3"}
    assert seen.end is not None
    assert seen.end.value is DRY
    assert scheduler.pending == 0


def test_of_two_stages_above_each_ends_what_it_has_begun_and_a_third_that_comes_later_starts_nothing() -> None:
    scheduler = VirtualScheduler()
    scripts = {"a": Script((0.5, "A")), "b": Script((3.0, "B")), "c": Script((1.0, "C"))}
    stages = [rxllm.from_iterable(name).pipe(flat_map(scripts.__getitem__, window=1)) for name in (["a"], ["b"], ["c"])]
    above = rx.merge(*stages[:2], stages[2].pipe(ops.delay_subscription(1.0)))
    seen = record(scheduler, above.pipe(flat_map(lambda _item: rx.throw(DRY), window=9)))
    assert [value.request.body for value in seen.values] == ["A", "B"]
    assert scripts["c"].started == 0
    assert seen.end == Event(3.0, "error", DRY)
    assert scheduler.pending == 0


def test_what_comes_at_once_of_a_stage_that_was_subscribed_after_the_halt_fails_too() -> None:
    scheduler = VirtualScheduler()
    scripts = {"b": Script((3.0, "B")), "c": Script((1.0, "C"))}
    first, late = (Script((0.0, name)).pipe(flat_map(scripts.__getitem__, window=1)) for name in "bc")
    above = rx.merge(rx.of("a"), first, late.pipe(ops.delay_subscription(1.0)))
    seen = record(scheduler, above.pipe(flat_map(lambda _item: rx.throw(DRY), window=9)))
    assert [value.request.body for value in seen.values] == ["a", "c", "B"]
    assert scripts["c"].started == 0
    assert seen.end == Event(3.0, "error", DRY)


def test_stages_inside_an_item_are_not_cut_short_when_a_stage_below_halts() -> None:
    scheduler = VirtualScheduler()
    inner = flat_map(lambda n: Script((1.0, n)), window=1)
    above = flat_map(lambda n: rxllm.from_iterable([n, n + 1, n + 2]).pipe(inner), window=1)
    seen = record(scheduler, rxllm.from_iterable([0, 10]).pipe(above, flat_map(lambda _n: rx.throw(DRY), window=1)))
    assert [value.request.body for value in seen.values] == [0, 1, 2]
    assert seen.end == Event(3.0, "error", DRY)


def test_a_halt_of_one_branch_of_tee_leaves_the_other_alone() -> None:
    scheduler = VirtualScheduler()
    stage = flat_map(lambda n: Script((1.0, n)), window=2)
    one, other = rxllm.from_iterable(range(6)).pipe(stage, tee(2))
    halting = Recorder(scheduler)
    halting.subscription = one.pipe(flat_map(lambda n: rx.throw(DRY) if n == 2 else rx.of(n), window=1)).subscribe(
        halting,  # type: ignore[arg-type]
        scheduler=scheduler,
    )
    seen = record(scheduler, other)
    assert seen.values == list(range(6))
    assert seen.end is not None
    assert seen.end.kind == "completed"
    assert halting.end is not None
    assert halting.end.value is DRY
    assert scheduler.pending == 0


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
