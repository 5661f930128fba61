"""admit: when an attempt starts, what it holds meanwhile, and what is said of it when it ends."""

import pickle
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import abc
from reactivex import operators as ops
from reactivex.disposable import Disposable
from reactivex.testing import ReactiveTest, TestScheduler

from rxllm.errors import (
    CancelledError,
    ConfigError,
    ConnectionError,
    InvalidRequestError,
    RateLimitedError,
    ServerError,
    TimeoutError,
)
from rxllm.gate import Gate
from rxllm.messages import Attempt, Reply, Usage
from rxllm.operators import admit, flat_map, retry, validate
from rxllm.policies.backoff import Backoff
from rxllm.policies.quota import Quota
from rxllm.testing import Event, Script, Subscription, VirtualScheduler, cold, marbles, record


def reply(tokens: int = 0, status: int | None = 200) -> Reply[str]:
    return Reply(value="x", status=status, usage=Usage(input_tokens=tokens))


def exact(limit: float, per: float, unit: str = "requests") -> Quota:
    return Quota(limit, per=per, unit=unit, margin=0.0)


def highest(_low: float, high: float) -> float:
    return high


@pytest.mark.parametrize(
    ("source", "busy_until", "expected"),
    [
        pytest.param("--a|", 0, "--a|", id="room-at-once"),
        pytest.param("--a|", 3, "-----a|", id="waits-for-a-place"),
        pytest.param("(a|)", 2, "--(a|)", id="emits-at-once-when-admitted"),
        pytest.param("a-b-|", 1, "-a-b-|", id="many-items"),
        pytest.param("--#", 2, "----#", id="errors-pass"),
        pytest.param("|", 2, "--|", id="empty"),
    ],
)
def test_admit_emits_as_its_diagram_says(source: str, busy_until: int, expected: str) -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    if busy_until:
        record(scheduler, Script((busy_until, "busy")).pipe(admit(gate)), until=0.0)
    origin = cold(scheduler, source)
    seen = record(scheduler, origin.pipe(admit(gate)))
    assert marbles(seen.events) == expected
    assert seen.end is not None
    assert origin.subscriptions == [Subscription(busy_until, seen.end.at)]
    assert gate.statistics().in_flight == gate.statistics().waiting == scheduler.pending == 0


def test_a_place_is_free_at_the_reply_not_at_the_end_of_the_stream() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    record(scheduler, cold(scheduler, "-r-----|", {"r": reply()}).pipe(admit(gate)), until=0.0)
    behind = cold(scheduler, "a|")
    record(scheduler, behind.pipe(admit(gate)))
    assert behind.subscriptions == [Subscription(1.0, 2.0)]


@settings(max_examples=60, deadline=None)
@given(
    seconds=st.lists(st.integers(0, 5), min_size=1, max_size=20),
    fails=st.sets(st.integers(0, 19)),
    disposed=st.dictionaries(st.integers(0, 19), st.integers(0, 12), max_size=6),
    limit=st.integers(1, 4),
)
def test_admit_follows_a_short_model(seconds: list[int], fails: set[int], disposed: dict[int, int], limit: int) -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=limit)
    notes: dict[int, list[Attempt]] = {n: [] for n in range(len(seconds))}
    seen = []
    for n, length in enumerate(seconds):
        script: Script[Any] = Script((length + 0.5, ServerError("down") if n in fails else reply()))
        stream = script.pipe(admit(gate, note=notes[n].append))
        seen.append(record(scheduler, stream, until=0.0))
        if n in disposed:
            scheduler.call_later(disposed[n] + 0.25, seen[-1].dispose)
    scheduler.run()

    places = [0.0] * limit  # the model: each place is free at
    for n, length in enumerate(seconds):
        at = min(places)
        ends = at + length + 0.5
        given_up = disposed.get(n, 1_000) + 0.25
        if given_up <= at:
            assert (seen[n].events, notes[n]) == ([], [])
            continue
        places[places.index(at)] = min(ends, given_up)
        (attempt,) = notes[n]
        assert (attempt.number, attempt.started, attempt.seconds) == (1, at, min(ends, given_up) - at)
        assert attempt.waited == ({"concurrency": at} if at else {})
        if given_up < ends:
            assert seen[n].events == []
            assert isinstance(attempt.error, CancelledError)
        else:
            assert seen[n].end is not None
            assert (seen[n].end.at, seen[n].end.kind) == (ends, "error" if n in fails else "completed")
            assert (attempt.error is None) == (n not in fails)
    assert gate.statistics().in_flight == scheduler.pending == 0


# what an attempt says of itself


class Unsent(ConnectionError):  # noqa: N818
    """A connection that was never made."""

    sent = False


@pytest.mark.parametrize(
    ("result", "requests", "tokens"),
    [
        (reply(30), 1, 30),
        (reply(0), 1, 50),
        (reply(70), 1, 70),
        (ServerError("down", 500), 1, 50),
        (TimeoutError("late", phase="idle"), 1, 50),
        (RateLimitedError("no", 429), 1, 0),
        (Unsent("unreachable"), 0, 0),
        (ValueError("bug"), 1, 50),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None,
)
def test_an_attempt_costs_what_its_end_says(result: Any, requests: float, tokens: float) -> None:
    scheduler = VirtualScheduler()
    gate = Gate("10 requests/minute", "100 tokens/minute", "100 input_tokens/minute")
    notes: list[Attempt] = []
    cost = {"tokens": 50, "input_tokens": 50}
    record(scheduler, Script((2.0, result)).pipe(admit(gate, cost=cost, note=notes.append)))
    left = [quota.available for quota in gate.statistics().quotas]
    assert left == [10 - requests, 100 - tokens, 100 - tokens]
    (attempt,) = notes
    assert (attempt.number, attempt.started, attempt.seconds, attempt.waited) == (1, 0.0, 2.0, {})
    if isinstance(result, Exception):
        assert attempt.error is result
        assert (attempt.usage, attempt.status) == (None, getattr(result, "status", None))
    else:
        assert (attempt.usage, attempt.status, attempt.error) == (result.usage, 200, None)


def test_a_stream_that_ends_without_a_reply_was_answered() -> None:
    scheduler = VirtualScheduler()
    gate = Gate("100 tokens/minute", concurrency=1)
    notes: list[Attempt] = []
    record(scheduler, cold(scheduler, "a-|").pipe(admit(gate, cost={"tokens": 9}, note=notes.append)))
    assert gate.statistics().quotas[0].available == 91
    assert [(attempt.seconds, attempt.error, attempt.usage) for attempt in notes] == [(2.0, None, None)]


def test_every_attempt_is_noted_with_its_number_and_what_it_waited_for() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(exact(1, 10.0))
    notes: list[Attempt] = []
    script: Script[Any] = Script((1.0, ServerError("down", 500)), (1.0, reply()))
    record(scheduler, script.pipe(admit(gate, note=notes.append), retry(Backoff(base=2.0), draw=highest)))
    assert [(attempt.number, attempt.started, attempt.status) for attempt in notes] == [(1, 0.0, 500), (2, 10.0, 200)]
    assert [attempt.waited for attempt in notes] == [{}, {"1 requests per 10 seconds": 7.0}]


@pytest.mark.parametrize("result", [reply(), ServerError("down"), None], ids=["reply", "error", "end"])
def test_a_note_that_raises_ends_the_stream_and_keeps_no_place(result: Any) -> None:
    def broken(_attempt: Attempt) -> None:
        raise ValueError("disk full")

    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    diagram = "-|" if result is None else "-#" if isinstance(result, Exception) else "-r--|"
    source = cold(scheduler, diagram, {"r": result})
    seen = record(scheduler, source.pipe(admit(gate, note=broken)))
    assert [(event.at, event.kind, str(event.value)) for event in seen.events] == [(1.0, "error", "disk full")]
    assert source.subscriptions == [Subscription(0.0, 1.0)]
    assert gate.statistics().in_flight == scheduler.pending == 0


def test_a_note_that_raises_does_not_keep_a_dispose_from_giving_back_the_place() -> None:
    def broken(_attempt: Attempt) -> None:
        raise ValueError("disk full")

    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    source = cold(scheduler, "----")
    record(scheduler, source.pipe(admit(gate, note=broken)), dispose_at=2.0)
    assert source.subscriptions == [Subscription(0.0, 2.0)]
    assert gate.statistics().in_flight == 0


# refusals


@pytest.mark.parametrize(("hint", "opens"), [(None, 1.0), (0.5, 1.5), (60.0, 3.0), ("soon", 1.0)])
def test_a_refusal_closes_the_gate_before_another_takes_its_place(hint: Any, opens: float) -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    record(scheduler, Script((1.0, RateLimitedError("no", 429, hint))).pipe(admit(gate)), until=0.0)
    behind = Script((1.0, "a"))
    seen = record(scheduler, behind.pipe(admit(gate)))
    assert seen.events[0] == Event(opens + 1.0, "next", "a")


def test_a_hint_of_what_is_no_refusal_closes_nothing() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    record(scheduler, Script((1.0, ServerError("down", 500, 2.0))).pipe(admit(gate)), until=0.0)
    assert record(scheduler, Script((0.0, "a")).pipe(admit(gate))).events[0].at == 1.0


# what is never held


def test_no_place_is_held_while_waiting_for_a_quota() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(exact(10, 60.0, "tokens"), concurrency=2)
    record(scheduler, Script((1.0, "a")).pipe(admit(gate, cost={"tokens": 8})), until=0.0)
    large = [record(scheduler, Script((1.0, "b")).pipe(admit(gate, cost={"tokens": 9})), until=0.0) for _ in range(2)]
    assert (gate.statistics().in_flight, gate.statistics().waiting) == (1, 2)
    small = record(scheduler, Script((1.0, "c")).pipe(admit(gate, cost={"tokens": 2})), until=5.0)
    assert small.values == ["c"]
    assert [seen.events for seen in large] == [[], []]
    assert gate.statistics().in_flight == 0
    scheduler.run()
    assert [seen.values for seen in large] == [["b"], ["b"]]


def test_no_place_is_held_during_back_off_and_a_retry_goes_before_younger_ones() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    order: list[str] = []
    log = lambda name: lambda attempt: order.append(f"{name}{attempt.number}")  # noqa: E731
    first: Script[Any] = Script((1.0, ServerError("down")), (1.0, "a"))
    stream = first.pipe(admit(gate, note=log("a")), retry(Backoff(base=1.5), draw=highest))
    seen = record(scheduler, stream, until=0.0)
    for name in "bcd":
        record(scheduler, Script((1.0, name)).pipe(admit(gate, note=log(name))), until=0.0)
    scheduler.run(1.5)
    assert gate.statistics().in_flight == 1  # b, while a backs off
    scheduler.run()
    assert order == ["a1", "b1", "c1", "a2", "d1"]
    assert seen.events[0] == Event(4.0, "next", "a")


def test_a_stream_keeps_its_place_in_the_queue_through_validation() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    script: Script[Any] = Script((1.0, "bad"), (1.0, "good"))
    seen = record(scheduler, script.pipe(admit(gate), validate(lambda value: value == "good")), until=0.5)
    record(scheduler, Script((1.0, "b")).pipe(admit(gate)), until=0.5)
    record(scheduler, Script((1.0, "c")).pipe(admit(gate)))
    assert seen.events[0].at in {2.0, 3.0}


# what is refused


@pytest.mark.parametrize(
    ("cost", "error", "message"),
    [
        (
            {"tokens": 91_000},
            InvalidRequestError,
            "needs 91,000 tokens, and the quota 90000 tokens per 60 seconds never admits more than 90,000",
        ),
        (
            {"input_tokens": 9},
            ConfigError,
            "the quota 90000 tokens per 60 seconds counts tokens, and the cost names only input_tokens",
        ),
        (None, ConfigError, "the quota 90000 tokens per 60 seconds counts tokens, and the cost names only nothing"),
        ({"tokens": -1}, ConfigError, "the cost in tokens must be a finite number >= 0, got -1"),
    ],
)
def test_a_cost_that_can_never_be_kept_fails_at_once_with_the_numbers(
    cost: dict[str, float] | None, error: type[Exception], message: str
) -> None:
    scheduler = VirtualScheduler()
    gate = Gate("90_000 tokens/minute", concurrency=1)
    source = cold(scheduler, "a|")
    seen = record(scheduler, source.pipe(admit(gate, cost=cost), retry(Backoff())))
    assert seen.end is not None
    assert (seen.end.at, type(seen.end.value), str(seen.end.value)) == (0.0, error, message)
    assert source.subscriptions == []
    assert (gate.statistics().in_flight, gate.statistics().waiting) == (0, 0)
    assert type(pickle.loads(pickle.dumps(seen.end.value))) is error


@pytest.mark.parametrize("waits", [False, True], ids=["before", "while-it-waits"])
def test_a_closed_gate_is_a_config_error_of_the_stream(waits: bool) -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    out = record(scheduler, Script((9.0, "out")).pipe(admit(gate)), until=0.0)
    if waits:
        scheduler.call_later(1.0, gate.close)
    else:
        gate.close()
    seen = record(scheduler, Script((1.0, "a")).pipe(admit(gate)))
    assert seen.end is not None
    assert (seen.end.at, str(seen.end.value)) == (1.0 if waits else 0.0, "Gate(concurrency=1) is closed")
    assert isinstance(seen.end.value, ConfigError)
    assert out.values == ["out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gate": 5}, "gate must be a Gate, got 5"),
        ({"gate": "500/minute"}, "gate must be a Gate, got '500/minute'"),
        ({"cost": 5}, "cost must be a mapping of units to amounts or None, got 5"),
        ({"note": 5}, "note must be callable or None, got 5"),
    ],
)
def test_admit_refuses_bad_arguments_by_name_and_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        admit(**{"gate": Gate(), **arguments})
    assert str(refusal.value) == message


# disposed


def test_a_dispose_in_the_queue_leaves_it_and_subscribes_nothing() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(exact(1, 60.0), concurrency=1)
    record(scheduler, Script((1.0, "a")).pipe(admit(gate)))
    source, notes = cold(scheduler, "a|"), []
    seen = record(scheduler, source.pipe(admit(gate, note=notes.append)), dispose_at=9.0)
    assert (seen.events, source.subscriptions, notes) == ([], [], [])
    assert (gate.statistics().waiting, scheduler.pending, scheduler.seconds()) == (0, 0, 9.0)


def test_a_dispose_on_the_wire_cancels_gives_back_the_place_and_keeps_the_booking() -> None:
    scheduler = VirtualScheduler()
    gate = Gate("100 tokens/minute", concurrency=1)
    source = cold(scheduler, "-----r|", {"r": reply(5)})
    notes: list[Attempt] = []
    seen = record(scheduler, source.pipe(admit(gate, cost={"tokens": 40}, note=notes.append)), dispose_at=2.0)
    assert seen.events == []
    assert source.subscriptions == [Subscription(0.0, 2.0)]
    assert [(attempt.seconds, str(attempt.error)) for attempt in notes] == [(2.0, "given up before it ended")]
    assert (gate.statistics().in_flight, gate.statistics().quotas[0].available) == (0, 60)
    assert scheduler.pending == 0
    seen.dispose()
    assert gate.statistics().in_flight == 0


@pytest.mark.parametrize("item", ["reply", "other"])
def test_a_dispose_in_on_next_releases_everything_once(item: str) -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    value = reply() if item == "reply" else "a"
    source = cold(scheduler, "-rr--|", {"r": value})
    got: list[Any] = []

    def take(one: Any) -> None:
        got.append(one)
        subscription.dispose()

    subscription = source.pipe(admit(gate)).subscribe(take, scheduler=scheduler)
    scheduler.run()
    assert got == [value]
    assert source.subscriptions == [Subscription(0.0, 1.0)]
    assert gate.statistics().in_flight == scheduler.pending == 0


def test_a_dispose_before_subscribe_returns_releases_everything() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    released: list[float] = []

    def subscribe(observer: abc.ObserverBase[Any], _scheduler: abc.SchedulerBase | None = None) -> abc.DisposableBase:
        observer.on_next("a")
        observer.on_next("b")
        return Disposable(lambda: released.append(scheduler.seconds()))

    seen = record(scheduler, rx.create(subscribe).pipe(admit(gate), ops.take(1)))
    assert seen.values == ["a"]
    assert released == [0.0]
    assert gate.statistics().in_flight == 0


def test_a_pipeline_that_is_disposed_does_not_start_its_own_that_wait() -> None:
    scheduler = VirtualScheduler()
    gate = Gate("100 requests/minute", concurrency=4)
    script = Script((5.0, "a"))
    stream = rx.of(*range(20)).pipe(flat_map(lambda _n: script.pipe(admit(gate)), window=20))
    record(scheduler, stream, dispose_at=1.0)
    assert (script.started, script.active) == (4, 0)
    assert (gate.statistics().in_flight, gate.statistics().waiting, gate.statistics().admitted) == (0, 0, 4)
    assert gate.statistics().quotas[0].available == 96
    assert scheduler.pending == 0


def test_a_consumer_that_raises_disturbs_no_other_pipeline_on_the_same_gate() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    first = record(scheduler, Script((1.0, reply())).pipe(admit(gate)), until=0.0)

    def broken(_value: Any) -> None:
        raise ValueError("consumer")

    Script((0.0, "b")).pipe(admit(gate)).subscribe(broken, scheduler=scheduler)
    third = record(scheduler, Script((1.0, "c")).pipe(admit(gate)), until=0.5)
    with pytest.raises(ValueError, match="consumer"):
        scheduler.run()
    scheduler.run()
    assert [event.kind for event in first.events] == ["next", "completed"]
    assert third.events[0] == Event(2.0, "next", "c")
    assert gate.statistics().in_flight == scheduler.pending == 0


def test_admit_runs_under_the_stock_test_scheduler() -> None:
    scheduler = TestScheduler()
    gate = Gate(concurrency=1)
    source = scheduler.create_cold_observable(ReactiveTest.on_next(10, "a"), ReactiveTest.on_completed(20))
    seen = scheduler.start(lambda: rx.merge(source.pipe(admit(gate)), source.pipe(admit(gate)))).messages
    assert [message.value.kind for message in seen] == ["N", "N", "C"]
    assert [entry.subscribe for entry in source.subscriptions] == pytest.approx([200, 220], abs=1)
