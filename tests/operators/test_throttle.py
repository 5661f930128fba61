"""throttle: every item, in order, as soon as the quota and the consumer allow, and never before."""

from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import operators as ops
from reactivex.subject import Subject
from reactivex.testing import ReactiveTest, TestScheduler

import rxllm
from rxllm import Outcome
from rxllm.demand import DemandScheduler, Flow
from rxllm.errors import ConfigError, InvalidRequestError, QuotaExhaustedError
from rxllm.gate import Gate
from rxllm.operators import flat_map, throttle
from rxllm.policies.quota import Quota
from rxllm.testing import Event, Recorder, Script, Subscription, Taker, VirtualScheduler, cold, marbles, parse, record


def exact(limit: float, per: float, unit: str = "requests") -> Quota:
    return Quota(limit, per=per, unit=unit, margin=0.0)


@pytest.mark.parametrize(
    ("source", "quota", "expected"),
    [
        pytest.param("a-b-c|", exact(1, 1.0), "a-b-c|", id="what-is-slow-enough-passes"),
        pytest.param("abc|", exact(1, 3.0), "a--b--(c|)", id="what-is-too-fast-is-delayed"),
        pytest.param("(abcde)|", exact(2, 4.0), "(ab)---(cd)---(e|)", id="a-burst-as-large-as-the-quota"),
        pytest.param("a----bcd|", exact(2, 3.0), "a----bc-(d|)", id="what-was-not-used-is-no-more-than-the-quota"),
        pytest.param("ab#", exact(1, 3.0), "a--(b#)", id="an-error-comes-after-what-is-held"),
        pytest.param("a#", exact(1, 3.0), "a#", id="an-error-with-nothing-held"),
        pytest.param("---|", exact(1, 3.0), "---|", id="empty"),
    ],
)
def test_throttle_emits_as_its_diagram_says(source: str, quota: Quota, expected: str) -> None:
    scheduler = VirtualScheduler()
    origin = cold(scheduler, source)
    seen = record(scheduler, origin.pipe(throttle(quota)))
    assert marbles(seen.events) == expected
    assert origin.subscriptions == [Subscription(0.0, parse(source)[-1].at)]
    assert scheduler.pending == 0


@settings(max_examples=150, deadline=None)
@given(
    gaps=st.lists(st.tuples(st.integers(0, 12), st.integers(0, 4)), max_size=30),
    limit=st.integers(4, 8),
    per=st.integers(1, 16),
)
def test_throttle_is_lossless_ordered_and_exact(gaps: list[tuple[int, int]], limit: int, per: int) -> None:
    scheduler = VirtualScheduler()
    diagram = "".join("-" * gap + chr(ord("A") + n) for n, (gap, _) in enumerate(gaps)) + "|"
    costs = {chr(ord("A") + n): cost for n, (_, cost) in enumerate(gaps)}
    window = per + 0.5
    stream = cold(scheduler, diagram).pipe(throttle(exact(limit, window, "tokens"), cost=costs.__getitem__))
    seen = record(scheduler, stream)

    expected: list[tuple[float, int]] = []  # the model: when, how much
    at = 0.0
    for n, (gap, cost) in enumerate(gaps):
        arrival = float(diagram.index(chr(ord("A") + n)))
        at = max(at, arrival)
        while sum(other for start, other in expected if at < start + window) + cost > limit:
            at = min(start + window for start, other in expected if at < start + window)
        assert gap >= 0
        expected.append((at, cost))
    assert [(event.at, costs[event.value]) for event in seen.events[:-1]] == expected
    assert seen.values == list(costs)
    assert seen.end == Event(max(at, float(len(diagram) - 1)), "completed")
    assert scheduler.pending == 0


@settings(max_examples=80, deadline=None)
@given(
    room=st.integers(1, 4),
    steps=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 4)), min_size=1, max_size=40),
    limit=st.integers(1, 4),
)
def test_throttle_respects_the_room_of_its_consumer_and_the_quota_at_each_emission(
    room: int, steps: list[tuple[int, int]], limit: int
) -> None:
    scheduler = VirtualScheduler()
    pulled: list[int] = []

    def items() -> Iterator[int]:
        for n in range(200):
            pulled.append(n)
            yield n

    at: list[float] = []
    stream = rxllm.from_iterable(items()).pipe(
        throttle(exact(limit, 1.0)), ops.do_action(lambda _item: at.append(scheduler.seconds()))
    )
    taker = Taker(scheduler, room).connect(stream)
    for eighths, n in steps:
        scheduler.advance(eighths / 8)
        assert len(taker.held) <= room
        assert len(pulled) - len(at) <= 64
        taker.take(n)
    scheduler.advance(0.0)
    assert all(sum(start <= other < start + 1.0 for other in at) <= limit for start in at)
    if len(taker.held) < room:  # the quota alone is what it waits for
        assert sum(scheduler.seconds() - start < 1.0 for start in at) == limit
    assert taker.taken + taker.held == list(range(len(at)))
    taker.dispose()
    assert scheduler.pending == 0


def test_throttle_holds_64_items_at_most_and_takes_no_more_from_a_source_that_waits() -> None:
    scheduler = VirtualScheduler()
    pulled: list[int] = []

    def items() -> Iterator[int]:
        while True:
            pulled.append(len(pulled))
            yield pulled[-1]

    seen = record(scheduler, rxllm.from_iterable(items()).pipe(throttle(exact(1, 5.0))), until=22.0)
    assert [event.at for event in seen.events] == [0.0, 5.0, 10.0, 15.0, 20.0]
    assert seen.values == [0, 1, 2, 3, 4]
    assert len(pulled) == 5 + 64
    seen.dispose()
    assert scheduler.pending == 0


def test_a_source_that_does_not_wait_fails_after_1024_items() -> None:
    scheduler = VirtualScheduler()
    subject: Subject[int] = Subject()
    seen = Recorder(scheduler)
    seen.subscription = subject.pipe(throttle("1/hour")).subscribe(seen, scheduler=scheduler)  # type: ignore[arg-type]
    for n in range(1 + 1_024):
        subject.on_next(n)
    assert seen.values == [0]
    assert seen.end is None
    subject.on_next(0)
    assert seen.end is not None
    assert isinstance(seen.end.value, ConfigError)
    assert "rxllm.operators.overflow" in str(seen.end.value)
    assert not subject.observers
    assert scheduler.pending == 0


def test_nothing_is_booked_for_an_item_while_the_consumer_has_no_room() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(exact(10, 100.0))
    taker = Taker(scheduler, 2).connect(rxllm.from_iterable(range(9)).pipe(throttle(gate)))
    scheduler.run()
    assert (taker.held, gate.statistics().quotas[0].available) == ([0, 1], 8)
    taker.take(2)
    scheduler.run()
    assert (taker.held, gate.statistics().quotas[0].available) == ([2, 3], 6)


def test_what_is_admitted_when_the_room_is_gone_is_given_back_and_comes_later() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(exact(1, 5.0))
    taker = Taker(scheduler, 1)
    taker.connect(rxllm.from_iterable(range(3)).pipe(throttle(gate)))
    scheduler.run(1.0)
    taker.take()
    scheduler.run(2.0)  # it applies, for it sees room
    taker.held.append("another's")
    scheduler.run(20.0)
    assert (taker.held, gate.statistics().quotas[0].available, gate.statistics().in_flight) == (["another's"], 1, 0)
    taker.take()
    scheduler.run()
    assert taker.held == [1]
    taker.dispose()
    assert scheduler.pending == 0


def test_throttle_emits_no_more_in_a_turn_than_it_was_asked_for() -> None:
    scheduler = VirtualScheduler()
    streams = [rxllm.from_iterable([name] * 50).pipe(throttle("1000/second")) for name in "ab"]
    taker = Taker(scheduler, 10)
    taker.held = ["full"] * 10
    taker.connect(rx.merge(*streams))
    scheduler.run()
    taker.take(10)
    scheduler.run()
    assert sorted(taker.held) == ["a"] * 5 + ["b"] * 5
    taker.dispose()


# what an item costs


@pytest.mark.parametrize(
    ("quotas", "cost", "left"),
    [
        (["10/minute"], None, [9]),
        (["10 tokens/minute"], None, [9]),
        (["10 tokens/minute"], lambda _item: 4, [6]),
        (["10 tokens/minute", "10/minute"], lambda _item: 4, [6, 6]),
        (["10 tokens/minute", "10/minute"], lambda _item: {"tokens": 4}, [6, 9]),
    ],
)
def test_an_item_costs_what_cost_says(quotas: list[str], cost: Any, left: list[float]) -> None:
    gate = Gate(*quotas)
    assert record(VirtualScheduler(), rx.of("a").pipe(throttle(gate, cost=cost))).values == ["a"]
    assert [quota.available for quota in gate.statistics().quotas] == left
    assert gate.statistics().in_flight == 0


def raises(_item: object) -> float:
    raise ValueError("bug")


@pytest.mark.parametrize(
    ("cost", "error", "message"),
    [
        (lambda item: 1 if item == "a" else 11, InvalidRequestError, "needs 11 tokens, and the quota 10 tokens per"),
        (lambda _item: {"usd": 1}, ConfigError, "the quota 10 tokens per 60 seconds counts tokens, and the cost names"),
        (lambda _item: "4", ConfigError, "cost must return a number or a mapping of units to amounts, got '4'"),
        (lambda _item: -1.0, ConfigError, "the cost in tokens must be a finite number >= 0, got -1.0"),
        (raises, ValueError, "bug"),
    ],
)
def test_a_cost_that_cannot_be_kept_fails_the_stream_in_its_turn(
    cost: Any, error: type[Exception], message: str
) -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "--abc|")
    seen = record(scheduler, source.pipe(throttle("10 tokens/minute", cost=cost)))
    assert seen.end is not None
    assert type(seen.end.value) is error
    assert str(seen.end.value).startswith(message)
    assert (seen.values, seen.end.at) == ((["a"], 3.0) if "11" in message else ([], 2.0))
    assert source.subscriptions == [Subscription(0.0, seen.end.at)]
    assert scheduler.pending == 0


def shown(values: list[Any]) -> list[Any]:
    """Return items as they are, and failed outcomes as a pair: the item, the class of the error."""
    return [(v.request.body, type(v.error).__name__) if isinstance(v, Outcome) else v for v in values]


@pytest.mark.parametrize("room", [1, 9])
def test_a_cost_that_cannot_be_kept_is_an_outcome_in_its_turn_if_asked_for(room: int) -> None:
    scheduler = VirtualScheduler()
    costs: dict[str, Any] = {"a": 4, "b": 11, "c": "4", "d": 6, "e": 1}
    source = cold(scheduler, "(abcde)|")
    stage = throttle(exact(10, 5.0, "tokens"), cost=costs.__getitem__, on_failure="emit")
    taker = Taker(scheduler, room).connect(source.pipe(stage))
    while taker.ended is None:
        scheduler.advance(1.0)
        taker.take()
    expected = ["a", ("b", "InvalidRequestError"), ("c", "ConfigError"), "d", "e"]
    assert shown(taker.taken + taker.held) == expected
    assert taker.ended.kind == "completed"
    assert scheduler.pending == 0


@pytest.mark.parametrize("room", [1, 3, 99])
@pytest.mark.parametrize("ends", [False, True], ids=["a-source-that-goes-on", "a-source-that-has-ended"])
def test_a_quota_that_runs_dry_fails_all_that_is_held_and_ends_the_stream(room: int, ends: bool) -> None:
    scheduler = VirtualScheduler()
    pulled: list[int] = []

    def items() -> Iterator[int]:
        for n in range(20 if ends else 10_000):
            pulled.append(n)
            yield n

    quota = Quota(5, per=3600.0, on_exhausted="fail")
    taker = Taker(scheduler, room).connect(rxllm.from_iterable(items()).pipe(throttle(quota, on_failure="emit")))
    while taker.ended is None:
        scheduler.advance(1.0)
        assert len(taker.held) <= room
        taker.take(1)
    got = shown(taker.taken + taker.held)
    assert got == [0, 1, 2, 3, 4, *((n, "QuotaExhaustedError") for n in pulled[5:])]
    assert len(pulled) <= 5 + 1 + 64
    assert isinstance(taker.ended.value, QuotaExhaustedError)
    assert scheduler.pending == 0


def test_what_would_still_fit_into_a_quota_that_has_run_dry_fails_too() -> None:
    scheduler = VirtualScheduler()
    quota = Quota(10, per=3600.0, unit="tokens", on_exhausted="fail")
    costs = {"a": 6, "b": 6, "c": 1}
    stage = throttle(quota, cost=costs.__getitem__, on_failure="emit")
    seen = record(scheduler, cold(scheduler, "(abc)|").pipe(stage))
    assert shown(seen.values) == ["a", ("b", "QuotaExhaustedError"), ("c", "QuotaExhaustedError")]
    assert seen.end is not None
    assert seen.end.value is seen.values[1].error is seen.values[2].error


def test_a_gate_that_closes_fails_the_item_that_waits_as_an_outcome() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(exact(10, 5.0, "tokens"))
    source = cold(scheduler, "abc|")
    seen = record(scheduler, source.pipe(throttle(gate, cost=lambda _item: 6, on_failure="emit")), until=3.5)
    gate.close()
    scheduler.run()
    assert shown(seen.values) == ["a", ("b", "ConfigError"), ("c", "ConfigError")]
    assert seen.end == Event(3.5, "completed")
    assert scheduler.pending == 0


def test_who_is_turned_away_when_the_room_is_gone_fails_when_there_is_room_again() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(exact(1, 50.0))
    taker = Taker(scheduler, 1)
    taker.connect(rxllm.from_iterable(range(2)).pipe(throttle(gate, on_failure="emit")))
    scheduler.run(1.0)
    taker.take()
    scheduler.run(2.0)  # it applies, for it sees room
    taker.held.append("another's")
    gate.close()
    scheduler.run(3.0)
    assert taker.held == ["another's"]
    taker.take()
    scheduler.run()
    assert shown(taker.held) == [(1, "ConfigError")]
    assert scheduler.pending == 0


def test_a_quota_that_runs_dry_ends_a_stream_that_raises_at_once() -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "abc---|")
    seen = record(scheduler, source.pipe(throttle(Quota(1, per=3600.0, on_exhausted="fail"))))
    assert seen.values == ["a"]
    assert seen.end is not None
    assert (seen.end.at, type(seen.end.value)) == (1.0, QuotaExhaustedError)
    assert source.subscriptions == [Subscription(0.0, 1.0)]


def test_a_call_below_gives_an_outcome_for_each_item_that_was_pulled() -> None:
    pulled: list[int] = []

    def items() -> Iterator[int]:
        for n in range(10_000):
            pulled.append(n)
            yield n

    limited = throttle(Quota(3, per=3600.0, on_exhausted="fail"), on_failure="emit")
    got: list[Outcome[Any]] = []
    with (
        rxllm.function(lambda n: 10 * n) as client,
        rxllm.iterate(rxllm.from_iterable(items()).pipe(limited, rxllm.call(client))) as outcomes,
        pytest.raises(QuotaExhaustedError),
    ):
        got.extend(outcomes)
    assert sorted(outcome.value for outcome in got if outcome.ok) == [0, 10, 20]
    assert sorted(outcome.request.body for outcome in got) == pulled


def test_a_lane_of_a_gate_is_as_good_as_the_gate() -> None:
    gate = Gate("100/minute")
    seen = record(VirtualScheduler(), rx.of("a").pipe(throttle(gate.lane("grader"))))
    assert seen.values == ["a"]
    assert {lane.name: lane.admitted for lane in gate.statistics().lanes}["grader"] == 1


def test_two_subscriptions_share_the_quota() -> None:
    scheduler = VirtualScheduler()
    limited = throttle(exact(1, 2.0))
    stream = rx.merge(rx.of("a").pipe(limited), rx.of("b").pipe(limited), rx.of("c").pipe(limited))
    assert marbles(record(scheduler, stream).events) == "a-b-(c|)"


def test_a_gate_that_closes_ends_the_stream() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(exact(1, 5.0))
    source = cold(scheduler, "ab-----|")
    scheduler.call_later(3.0, gate.close)
    seen = record(scheduler, source.pipe(throttle(gate)))
    assert seen.end is not None
    assert (seen.values, seen.end.at, type(seen.end.value)) == (["a"], 3.0, ConfigError)
    assert source.subscriptions == [Subscription(0.0, 3.0)]
    assert scheduler.pending == 0


# disposed


@pytest.mark.parametrize("at", [0.5, 1.5, 4.0])
def test_a_dispose_cancels_the_source_and_leaves_the_queue(at: float) -> None:
    scheduler = VirtualScheduler()
    gate = Gate(exact(1, 3.0))
    source = cold(scheduler, "abcde---")
    seen = record(scheduler, source.pipe(throttle(gate)), dispose_at=at)
    assert seen.values == ["a", "b"][: 1 + (at >= 3.0)]
    assert source.subscriptions == [Subscription(0.0, at)]
    assert (gate.statistics().waiting, gate.statistics().in_flight, scheduler.pending) == (0, 0, 0)


@pytest.mark.parametrize("kind", ["error", "completed"])
def test_a_dispose_after_the_end_of_the_source_drops_what_is_held(kind: str) -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "abc|" if kind == "completed" else "abc#")
    seen = record(scheduler, source.pipe(throttle("1/minute")), dispose_at=9.0)
    assert seen.values == ["a"]
    assert seen.end is None
    assert scheduler.pending == 0


def test_a_dispose_in_on_next_emits_nothing_more() -> None:
    scheduler = VirtualScheduler()

    class Leaving(Recorder):
        def on_next(self, value: Any) -> None:
            super().on_next(value)
            if value == "b":
                self.dispose()

    seen = Leaving(scheduler)
    carrier = DemandScheduler(scheduler, None, Flow(lambda _error: None))  # no guard of reactivex' own
    source = cold(scheduler, "-(abc)|")
    seen.subscription = source.pipe(throttle("100/second"))._start(seen, carrier)  # type: ignore[attr-defined]
    scheduler.run()
    assert [event.value for event in seen.events] == ["a", "b"]
    assert source.subscriptions == [Subscription(0.0, 1.0)]
    assert scheduler.pending == 0


def test_a_dispose_while_it_waits_for_room_leaves_the_demand() -> None:
    scheduler = VirtualScheduler()
    taker = Taker(scheduler, 1).connect(cold(scheduler, "abc").pipe(throttle("100/second")))
    scheduler.run(5.0)
    assert taker.held == ["a"]
    assert taker.waiting
    taker.dispose()
    assert not taker.waiting
    taker.take()
    scheduler.run()
    assert (taker.taken, taker.held, scheduler.pending) == (["a"], [], 0)


def test_a_consumer_that_raises_releases_everything() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(exact(1, 3.0))
    source = cold(scheduler, "abc---")

    def broken(item: str) -> None:
        if item == "b":
            raise ValueError("consumer")

    source.pipe(throttle(gate)).subscribe(broken, scheduler=scheduler)
    with pytest.raises(ValueError, match="consumer"):
        scheduler.run()
    assert source.subscriptions == [Subscription(0.0, 3.0)]
    assert (gate.statistics().waiting, gate.statistics().in_flight, scheduler.pending) == (0, 0, 0)


def test_ten_thousand_items_need_no_more_stack_than_one() -> None:
    scheduler = VirtualScheduler()
    stream = rxllm.from_iterable(range(10_000), unbounded=True).pipe(throttle("1_000_000/second"))
    assert record(scheduler, stream).values == list(range(10_000))
    assert record(scheduler, rx.of(*range(1_000)).pipe(throttle("1_000_000/second"))).values == list(range(1_000))


def test_throttle_feeds_a_stage_no_more_than_it_can_start() -> None:
    scheduler = VirtualScheduler()
    script = Script((2.0, "x"))
    stream = rxllm.from_iterable(range(12)).pipe(throttle(exact(4, 1.0)), flat_map(lambda _n: script, window=3))
    seen = record(scheduler, stream)
    assert len(seen.values) == 12
    assert script.most == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5,), 'a quota must be a Quota or a text such as "500 requests/minute", got 5'),
        (("500",), "cannot read quota '500': expected '/' or 'per' at the end"),
        (("1/second", 5), "cost must be callable or None, got 5"),
        (("1/second", None, "drop"), "on_failure must be 'emit' or 'raise', got 'drop'"),
    ],
)
def test_throttle_refuses_bad_arguments_by_name_and_value(arguments: tuple[Any, ...], message: str) -> None:
    options: Mapping[str, Any] = dict(zip(("cost", "on_failure"), arguments[1:], strict=False))
    with pytest.raises(ConfigError) as refusal:
        throttle(arguments[0], **options)
    assert str(refusal.value) == message


def test_throttle_runs_under_the_stock_test_scheduler() -> None:
    scheduler = TestScheduler()
    source = scheduler.create_cold_observable(
        ReactiveTest.on_next(10, "a"), ReactiveTest.on_next(20, "b"), ReactiveTest.on_completed(30)
    )
    seen = scheduler.start(lambda: source.pipe(throttle(exact(1, 50.0)))).messages
    assert [message.value.kind for message in seen] == ["N", "N", "C"]
    assert [message.time for message in seen] == pytest.approx([210, 260, 260], abs=1)
