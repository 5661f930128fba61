"""bounded: stock operators that hold items, with a limit on how many."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import Observable
from reactivex import operators as ops

import rxllm
from rxllm.errors import ConfigError
from rxllm.operators import bounded, flat_map
from rxllm.testing import Event, Script, Subscription, Taker, VirtualScheduler, cold, marbles, record

Operator = Callable[[Observable[Any]], Observable[Any]]


@pytest.mark.parametrize(
    ("source", "inner", "expected"),
    [
        pytest.param("-a-b|", ops.map(str.upper), "-A-B|", id="map"),
        pytest.param("-a-b|", ops.delay(2.0), "---a-b|", id="delay"),
        pytest.param("-a-#", ops.map(str.upper), "-A-#", id="an-error"),
        pytest.param("|", ops.delay(2.0), "--|", id="empty"),
        pytest.param("-ab-|", ops.pairwise(), "--(%)-|", id="pairs"),
        pytest.param("-ab---|", ops.take(1), "-(a|)", id="an-operator-that-ends-early"),
    ],
)
def test_bounded_emits_what_the_operator_inside_emits(source: str, inner: Operator, expected: str) -> None:
    scheduler = VirtualScheduler()
    origin = cold(scheduler, source)
    seen = record(scheduler, origin.pipe(bounded(4, inner), ops.map(lambda item: "%" if len(item) > 1 else item)))
    assert marbles(seen.events) == expected.replace("(%)", "%")
    assert all(entry.until is not None for entry in origin.subscriptions)
    assert scheduler.pending == 0


def shared(source: Observable[Any]) -> Observable[Any]:
    return source.pipe(ops.share())


def zipped(source: Observable[Any]) -> Observable[Any]:
    return source.pipe(ops.zip(rx.interval(1.0)), ops.map(lambda pair: pair[0]))


UNBOUNDED: dict[str, Operator] = {
    "delay": ops.delay(3.0),
    "concat_map": ops.concat_map(lambda n: rx.timer(1.0).pipe(ops.map(lambda _: n))),
    "flat_map": ops.flat_map(lambda n: rx.timer(1.0).pipe(ops.map(lambda _: n))),
    "zip": zipped,
    "share": shared,
}


@pytest.mark.parametrize("name", ["delay", "concat_map", "flat_map", "zip", "share"])
@pytest.mark.parametrize("n", [1, 3])
def test_bounded_keeps_a_source_from_running_ahead_of_an_operator_that_holds(name: str, n: int) -> None:
    scheduler = VirtualScheduler()
    pulled: list[int] = []

    def items() -> Iterator[int]:
        for number in range(10_000):
            pulled.append(number)
            yield number

    taker = Taker(scheduler, 2).connect(rxllm.from_iterable(items()).pipe(bounded(n, UNBOUNDED[name])))
    for step in range(100):
        scheduler.advance(1.0)
        assert len(pulled) - len(taker.taken) <= n + 2
        if step % 2:
            taker.take(2)
    assert len(taker.taken) >= 30
    assert taker.taken == list(range(len(taker.taken)))
    taker.dispose()
    scheduler.run()
    assert scheduler.seconds() == 100.0  # nothing was left that takes time


def test_bounded_around_debounce_lets_in_one_for_each_that_comes_out() -> None:
    scheduler = VirtualScheduler()
    taker = Taker(scheduler, 5).connect(rxllm.from_iterable(list("abcdef")).pipe(bounded(1, ops.debounce(1.0))))
    for _ in range(20):
        scheduler.advance(1.0)
        taker.take(5)
    assert taker.taken == list("abcdef")  # one inside at a time, so nothing is dropped
    assert taker.ended is not None


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 20),
    n=st.integers(1, 6),
    delay=st.integers(0, 5),
    room=st.integers(1, 4),
    takes=st.lists(st.integers(0, 4), min_size=1, max_size=5),
)
def test_bounded_loses_nothing_and_keeps_its_bound(count: int, n: int, delay: int, room: int, takes: list[int]) -> None:
    scheduler = VirtualScheduler()
    pulled: list[int] = []

    def items() -> Iterator[int]:
        for number in range(count):
            pulled.append(number)
            yield number

    stream = rxllm.from_iterable(items()).pipe(bounded(n, ops.delay(float(delay))))
    taker = Taker(scheduler, room).connect(stream)
    for step in range(300):
        scheduler.advance(1.0)
        assert len(pulled) - len(taker.taken) - len(taker.held) <= n
        assert len(taker.held) <= room
        taker.take(takes[step % len(takes)] if step < 100 else room)
    assert taker.taken == list(range(count))
    assert taker.ended is not None
    assert scheduler.pending == 0


def test_bounded_feeds_the_stage_below_and_waits_for_it() -> None:
    scheduler = VirtualScheduler()
    script = Script((2.0, "x"))
    stream = rxllm.from_iterable(range(10)).pipe(bounded(2, ops.delay(1.0)), flat_map(lambda _n: script, window=3))
    assert record(scheduler, stream).values == ["x"] * 10
    assert script.most == 3
    assert scheduler.pending == 0


def test_bounded_passes_on_what_came_before_an_error() -> None:
    scheduler = VirtualScheduler()
    taker = Taker(scheduler, 1).connect(cold(scheduler, "(abc)#").pipe(bounded(9, ops.map(str.upper))))
    scheduler.run()
    assert (taker.held, taker.ended) == (["A"], None)
    taker.take()
    scheduler.run()
    taker.take()
    scheduler.run()
    assert (taker.taken, taker.held) == (["A", "B"], ["C"])
    assert taker.ended is not None
    assert taker.ended.kind == "error"


def test_bounded_releases_the_operator_and_its_source_when_disposed() -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "abc")
    seen = record(scheduler, source.pipe(bounded(9, ops.delay(10.0))), dispose_at=5.0)
    assert seen.events == []
    assert source.subscriptions == [Subscription(0.0, 5.0)]
    assert scheduler.pending == 0


def test_an_operator_that_raises_when_it_is_applied_ends_the_stream_with_what_it_raised() -> None:
    error = KeyError("operator")

    def broken(_source: Observable[Any]) -> Observable[Any]:
        raise error

    assert record(VirtualScheduler(), rx.just("a").pipe(bounded(1, broken))).events == [Event(0.0, "error", error)]


def test_an_operator_that_returns_no_stream_is_told_so() -> None:
    seen = record(VirtualScheduler(), rx.just("a").pipe(bounded(1, lambda _source: 5)))  # type: ignore[arg-type,return-value]
    assert seen.end is not None
    assert str(seen.end.value) == "inner must return an Observable, got int"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, ops.delay(1.0)), "n must be a whole number >= 1, got 0"),
        ((-1, ops.delay(1.0)), "n must be a whole number >= 1, got -1"),
        ((float("nan"), ops.delay(1.0)), "n must be a whole number >= 1, got nan"),
        ((2.0, ops.delay(1.0)), "n must be a whole number >= 1, got 2.0"),
        ((1, None), "inner must be callable, got None"),
    ],
)
def test_bounded_refuses_bad_arguments_by_name_and_value(arguments: tuple[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        bounded(*arguments)
    assert str(refusal.value) == message
