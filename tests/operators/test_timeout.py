"""timeout: which clock runs when, and what it says when it runs out."""

from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st

import rxllm
from rxllm.errors import ConfigError, TimeoutError
from rxllm.operators import flat_map, retry, timeout
from rxllm.policies.backoff import Backoff
from rxllm.testing import Event, Script, Subscription, Taker, VirtualScheduler, cold, marbles, record


@pytest.mark.parametrize(
    ("source", "limits", "expected", "phase"),
    [
        pytest.param("--a|", {"total": 5}, "--a|", None, id="in-time"),
        pytest.param("-a-a-a-a-a", {"total": 5}, "-a-a-#", "total", id="total-does-not-start-again"),
        pytest.param("----a|", {"first": 3}, "---#", "first_byte", id="first-byte-too-late"),
        pytest.param("--a-----b|", {"first": 3}, "--a-----b|", None, id="first-byte-alone-leaves-the-rest-alone"),
        pytest.param("--a--b-----c|", {"idle": 4}, "--a--b---#", "idle", id="idle-between-items"),
        pytest.param("--a--b------|", {"idle": 4}, "--a--b---#", "idle", id="idle-before-the-end"),
        pytest.param("-----a|", {"idle": 4}, "----#", "idle", id="idle-before-the-first-without-a-limit-of-its-own"),
        pytest.param("-----a|", {"idle": 4, "first": 9}, "-----a|", None, id="first-byte-has-its-own-clock"),
        pytest.param("-a----b|", {"idle": 3, "first": 9}, "-a--#", "idle", id="idle-is-shorter-than-first-byte"),
        pytest.param("-a-b-c-d", {"idle": 3, "total": 6}, "-a-b-c#", "total", id="total-bounds-idle"),
        pytest.param("--#", {"total": 5}, "--#", None, id="errors-pass"),
        pytest.param("|", {"total": 5}, "|", None, id="empty"),
        pytest.param("---", {"total": 3}, "---#", "total", id="silence"),
    ],
)
def test_timeout_ends_as_its_diagram_says(
    source: str, limits: dict[str, float], expected: str, phase: str | None
) -> None:
    scheduler = VirtualScheduler()
    origin = cold(scheduler, source)
    seen = record(scheduler, origin.pipe(timeout(**limits)))
    assert marbles(seen.events) == expected
    ended = seen.end
    assert ended is not None
    assert origin.subscriptions == [Subscription(0.0, ended.at)]
    assert scheduler.pending == 0
    if phase is None:
        assert not isinstance(ended.value, TimeoutError)
    else:
        assert isinstance(ended.value, TimeoutError)
        assert (ended.value.phase, ended.value.transient) == (phase, True)


def test_the_timer_goes_when_the_stream_is_disposed() -> None:
    scheduler = VirtualScheduler()
    origin = cold(scheduler, "-a")
    record(scheduler, origin.pipe(timeout(100.0, idle=50.0)), dispose_at=3.0)
    assert origin.subscriptions == [Subscription(0.0, 3.0)]
    assert scheduler.pending == 0
    assert scheduler.seconds() == 3.0


def test_a_timeout_is_retried_with_clocks_of_its_own() -> None:
    scheduler = VirtualScheduler()
    script = Script((9.0, "late"), (1.0, "a"))
    attempt = script.pipe(timeout(2.0), retry(Backoff(base=1.0), draw=lambda low, _high: low))
    assert record(scheduler, attempt).events == [Event(3.0, "next", "a"), Event(3.0, "completed")]
    assert (script.started, script.active, scheduler.pending) == (2, 0, 0)


def test_the_clock_of_idle_stands_still_while_the_consumer_has_no_room() -> None:
    scheduler = VirtualScheduler()
    source = rxllm.from_iterable(["a", "b", "c"]).pipe(flat_map(lambda item: Script((1.0, item)), window=1, buffer=0))
    taker = Taker(scheduler, 1).connect(source.pipe(timeout(idle=4.0)))
    scheduler.run(50.0)
    assert (taker.held, taker.ended) == (["a"], None)
    taker.take()
    scheduler.run(100.0)
    assert (taker.held, taker.ended) == (["b"], None)
    taker.dispose()
    assert scheduler.pending == 0


@pytest.mark.parametrize("taken_at", [0.5, 3.0, 3.9, 4.0, 7.9, 30.0])
def test_the_clock_of_idle_starts_when_there_is_room_again(taken_at: float) -> None:
    scheduler = VirtualScheduler()
    source = rx.concat(rx.just("a"), rx.never())
    taker = Taker(scheduler, 1).connect(source.pipe(timeout(idle=4.0)))
    scheduler.run(taken_at)
    assert taker.ended is None
    taker.take()
    scheduler.run()
    assert taker.ended is not None
    assert (taker.ended.at, taker.ended.value.phase) == (taken_at + 4.0, "idle")
    assert scheduler.pending == 0


def test_the_clock_of_idle_does_not_start_before_there_is_room_for_the_first_item() -> None:
    scheduler = VirtualScheduler()
    taker = Taker(scheduler, 1)
    taker.held = ["full"]
    taker.connect(rx.never().pipe(timeout(idle=4.0)))
    scheduler.run(10.0)
    assert taker.ended is None
    taker.take()
    scheduler.run()
    assert taker.ended is not None
    assert taker.ended.at == 14.0


def test_total_goes_on_while_the_consumer_has_no_room() -> None:
    scheduler = VirtualScheduler()
    taker = Taker(scheduler, 1).connect(rx.concat(rx.just("a"), rx.never()).pipe(timeout(9.0, idle=4.0)))
    scheduler.run()
    assert taker.ended is not None
    assert (taker.ended.at, taker.ended.value.phase) == (9.0, "total")
    assert not taker.waiting


@settings(max_examples=100, deadline=None)
@given(
    gaps=st.lists(st.integers(0, 6), max_size=8),
    total=st.none() | st.integers(1, 20),
    first=st.none() | st.integers(1, 8),
    idle=st.none() | st.integers(1, 8),
)
def test_timeout_follows_a_short_model(gaps: list[int], total: int | None, first: int | None, idle: int | None) -> None:
    if total is None and first is None and idle is None:
        total = 20
    scheduler = VirtualScheduler()
    diagram = "".join("-" * gap + "a" for gap in gaps) + "-" * 30 + "|"
    limits = {
        name: None if limit is None else limit + 0.5
        for name, limit in {"total": total, "first": first, "idle": idle}.items()
    }
    seen = record(scheduler, cold(scheduler, diagram).pipe(timeout(**limits)))

    at, expected, phase = -1.0, [], None
    last = 0.0  # the model
    due: list[tuple[float, str]]
    ends = [n for n, mark in enumerate(diagram) if mark in "a|"]
    for n in ends:
        limit = limits["idle"] if expected or limits["first"] is None else limits["first"]
        due = [(limits["total"], "total")] if limits["total"] is not None else []
        due += [(last + limit, "idle" if expected or limits["first"] is None else "first_byte")] if limit else []
        at, phase = min(due, key=lambda clock: clock[0], default=(1e9, ""))
        if at < n:
            break
        phase = None
        if diagram[n] == "a":
            expected.append(float(n))
        last = float(n)
    assert [event.at for event in seen.events if event.kind == "next"] == expected
    assert seen.end is not None
    if phase is None:
        assert seen.end.kind == "completed"
    else:
        assert (seen.end.at, seen.end.value.phase) == (at, phase)
    assert scheduler.pending == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"total": 0}, "total must be a finite number > 0 or None, got 0"),
        ({"first": -1.0}, "first must be a finite number > 0 or None, got -1.0"),
        ({"idle": float("nan")}, "idle must be a finite number > 0 or None, got nan"),
        ({"total": float("inf")}, "total must be a finite number > 0 or None, got inf"),
        ({"idle": "4"}, "idle must be a finite number > 0 or None, got '4'"),
        ({}, "timeout needs at least one of total, first and idle"),
    ],
)
def test_timeout_refuses_bad_arguments_by_name_and_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        timeout(**arguments)
    assert str(refusal.value) == message
