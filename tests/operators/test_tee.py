"""tee: one subscription, several branches, the slowest sets the pace."""

from collections.abc import Iterator
from typing import Any, NoReturn

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex.subject import Subject

import rxllm
from rxllm.errors import ConfigError
from rxllm.operators import flat_map, tee
from rxllm.testing import Event, Recorder, Script, Subscription, Taker, VirtualScheduler, cold, marbles


def numbers(pulled: list[int], n: int) -> Iterator[int]:
    for number in range(n):
        pulled.append(number)
        yield number


@pytest.mark.parametrize("diagram", ["-a-b-c-|", "-a-#", "|", "#", "(abc)|"])
def test_every_branch_gets_everything_at_the_same_time(diagram: str) -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, diagram)
    recorders = [Recorder(scheduler) for _ in range(3)]
    for branch, recorder in zip(source.pipe(tee(3)), recorders, strict=True):
        assert source.subscriptions == []  # not before all are there
        branch.subscribe(recorder, scheduler=scheduler)  # type: ignore[arg-type]
    scheduler.run()
    assert [marbles(recorder.events) for recorder in recorders] == [diagram] * 3
    assert len(source.subscriptions) == 1
    assert source.subscriptions[0].until is not None


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 20),
    rooms=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    takes=st.lists(st.lists(st.integers(0, 3), min_size=3, max_size=3), min_size=1, max_size=6),
)
def test_the_slowest_branch_sets_the_pace_and_none_loses_an_item(
    count: int, rooms: list[int], takes: list[list[int]]
) -> None:
    scheduler = VirtualScheduler()
    pulled: list[int] = []
    branches = rxllm.from_iterable(numbers(pulled, count)).pipe(tee(len(rooms)))
    takers = [Taker(scheduler, room).connect(branch) for room, branch in zip(rooms, branches, strict=True)]
    for step in range(100):
        scheduler.run()
        slowest = min(len(taker.taken) + taker.window for taker in takers)
        assert len(pulled) <= slowest + 1
        for taker, n in zip(takers, takes[step % len(takes)], strict=False):
            taker.take(n if step < 50 else taker.window)
    assert [taker.taken for taker in takers] == [list(range(count))] * len(rooms)
    assert all(taker.ended is not None for taker in takers)
    assert scheduler.pending == 0


def test_a_branch_that_leaves_no_longer_holds_the_others_back() -> None:
    scheduler = VirtualScheduler()
    pulled: list[int] = []
    first, second = rxllm.from_iterable(numbers(pulled, 10)).pipe(tee(2))
    slow, fast = Taker(scheduler, 1).connect(first), Taker(scheduler, 100).connect(second)
    scheduler.run()
    assert len(fast.held) <= 2
    slow.dispose()
    scheduler.run()
    assert fast.held == list(range(10))
    assert len(slow.held) == 1


@pytest.mark.parametrize("stays", [0, 1])
def test_the_last_branch_to_leave_releases_the_source(stays: int) -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "abc")
    takers = [Taker(scheduler, 9).connect(branch) for branch in source.pipe(tee(2))]
    scheduler.run(1.5)
    takers[1 - stays].dispose()
    assert source.subscriptions == [Subscription(0.0, None)]
    scheduler.run(2.5)
    takers[stays].dispose()
    assert source.subscriptions == [Subscription(0.0, 2.5)]
    assert scheduler.pending == 0


def test_a_branch_that_left_before_the_others_came_is_not_waited_for() -> None:
    scheduler = VirtualScheduler()
    first, second = cold(scheduler, "ab|").pipe(tee(2))
    Taker(scheduler, 1).connect(first).dispose()
    taker = Taker(scheduler, 9).connect(second)
    scheduler.run()
    assert taker.held == ["a", "b"]


def test_the_error_of_the_source_reaches_each_branch_after_what_it_holds() -> None:
    scheduler = VirtualScheduler()
    error = ValueError("torn")
    takers = [
        Taker(scheduler, room).connect(branch)
        for room, branch in zip([1, 9], cold(scheduler, "ab#", error=error).pipe(tee(2)), strict=True)
    ]
    scheduler.run()
    assert (takers[0].held, takers[0].ended) == (["a"], None)
    assert (takers[1].held, takers[1].ended) == (["a", "b"], Event(2.0, "error", error))
    takers[0].take()
    scheduler.run()
    assert (takers[0].held, takers[0].ended) == (["b"], Event(2.0, "error", error))


class BoomError(Exception):
    pass


@pytest.mark.parametrize("raises", [0, 1])
def test_a_branch_whose_consumer_raises_leaves_and_the_others_go_on(raises: int) -> None:
    scheduler = VirtualScheduler()
    branches = rxllm.from_iterable(range(5)).pipe(tee(2))
    seen: list[int] = []

    def boom(_item: int) -> NoReturn:
        raise BoomError

    for number, branch in enumerate(branches):
        branch.subscribe(boom if number == raises else seen.append, scheduler=scheduler)
    with pytest.raises(BoomError):
        scheduler.run()
    scheduler.run()
    assert seen == [0, 1, 2, 3, 4]
    assert scheduler.pending == 0


def test_branches_that_meet_again_end_together_when_their_consumer_raises() -> None:
    scheduler = VirtualScheduler()
    script = Script((5.0, "late"))
    first, second = rxllm.from_iterable(range(5)).pipe(tee(2))

    def boom(_item: object) -> NoReturn:
        raise BoomError

    met = rx.merge(first, second.pipe(flat_map(lambda _n: script, window=4))).pipe(flat_map(rx.just, window=1))
    met.subscribe(boom, scheduler=scheduler)
    with pytest.raises(BoomError):
        scheduler.run()
    scheduler.run()
    assert script.active == 0


def test_branches_through_stages_of_different_speed_lose_nothing() -> None:
    scheduler = VirtualScheduler()
    first, second = rxllm.from_iterable(range(20)).pipe(tee(2))
    quick = first.pipe(flat_map(lambda n: Script((1.0, n)), window=5))
    slow = second.pipe(flat_map(lambda n: Script((3.0, n)), window=1, ordered=True))
    takers = [Taker(scheduler, 1).connect(quick), Taker(scheduler, 1).connect(slow)]
    for _ in range(60):
        scheduler.run()
        for taker in takers:
            taker.take()
    assert sorted(takers[0].taken) == takers[1].taken == list(range(20))


def test_a_branch_is_subscribed_once() -> None:
    scheduler = VirtualScheduler()
    (branch,) = rx.never().pipe(tee(1))
    Taker(scheduler, 1).connect(branch)
    again = Taker(scheduler, 1).connect(branch)
    assert again.ended is not None
    assert isinstance(again.ended.value, ConfigError)
    assert "split into more branches" in str(again.ended.value)


def test_branches_on_two_loops_are_refused_by_both_names() -> None:
    one, other = VirtualScheduler(), VirtualScheduler()
    other.run(5.0)
    first, second = Subject[int]().pipe(tee(2))
    Taker(one, 1).connect(first)
    refused = Taker(other, 1).connect(second)
    assert refused.ended is not None
    assert repr(one) in str(refused.ended.value)
    assert repr(other) in str(refused.ended.value)


@pytest.mark.parametrize("n", [0, -1, 1.5, float("nan"), None, "2", True])
def test_tee_refuses_bad_arguments_by_name_and_value(n: Any) -> None:
    with pytest.raises(ConfigError) as refusal:
        tee(n)
    assert str(refusal.value) == f"n must be a whole number >= 1, got {n!r}"
