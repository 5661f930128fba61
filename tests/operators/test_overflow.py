"""overflow: what happens to items that come while there is no room."""

import logging
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex.subject import Subject

import rxllm
from rxllm.errors import ConfigError
from rxllm.operators import flat_map, overflow
from rxllm.testing import Event, Script, Subscription, Taker, VirtualScheduler, cold, record


@pytest.mark.parametrize(
    ("policy", "n", "taken", "end"),
    [
        pytest.param("drop_oldest", 2, "aef", "completed", id="the-oldest-go"),
        pytest.param("drop_newest", 2, "abc", "completed", id="the-newest-go"),
        pytest.param("buffer", None, "abcdef", "completed", id="none-go"),
        pytest.param("error", 2, "abc", "error", id="the-first-too-many-is-an-error"),
        pytest.param("error", 5, "abcdef", "completed", id="enough-room"),
    ],
)
def test_overflow_keeps_what_its_policy_says(policy: Any, n: int | None, taken: str, end: str) -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "abcdef|")
    taker = Taker(scheduler, 1).connect(source.pipe(overflow(policy, n)))
    scheduler.run()
    assert source.subscriptions == [Subscription(0.0, 3.0 if (policy, n) == ("error", 2) else 6.0)]
    while taker.ended is None:
        taker.take()
        scheduler.run()
    taker.take()
    assert "".join(taker.taken) == taken
    assert taker.ended.kind == end
    if end == "error":
        assert isinstance(taker.ended.value, ConfigError)
        assert str(taker.ended.value).startswith("2 items wait and another one came")


def test_the_diagram_of_overflow_is_true() -> None:
    scheduler = VirtualScheduler()
    taker = Taker(scheduler, 1)
    taker.held = ["full"]
    taker.connect(cold(scheduler, "-abcde------").pipe(overflow("drop_oldest", 2)))
    scheduler.run(6.0)
    taker.take()
    scheduler.run(8.0)
    assert taker.held == ["d"]
    taker.take()
    scheduler.run(10.0)
    assert taker.held == ["e"]


@settings(max_examples=100, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3)), max_size=12),
    policy=st.sampled_from(["drop_oldest", "drop_newest", "buffer", "error"]),
    n=st.integers(1, 4),
    room=st.integers(1, 3),
)
def test_overflow_follows_a_short_model(steps: list[tuple[int, int]], policy: Any, n: int, room: int) -> None:
    scheduler = VirtualScheduler()
    subject: Subject[int] = Subject()
    taker = Taker(scheduler, room).connect(subject.pipe(overflow(policy, None if policy == "buffer" else n)))
    limit = 10**9 if policy == "buffer" else n
    held: list[int] = []  # the model: by the consumer, and in the queue
    queue: list[int] = []
    failed = False
    number = 0
    for puts, takes in steps:
        for _ in range(puts):
            number += 1
            subject.on_next(number)
            if failed:
                continue
            if not queue and len(held) < room:
                held.append(number)
            elif len(queue) < limit:
                queue.append(number)
            elif policy == "drop_oldest":
                queue = [*queue[1:], number]
            elif policy == "error":
                failed = True
        taker.take(takes)
        scheduler.run()
        held = held[takes:]
        while queue and len(held) < room:
            held.append(queue.pop(0))
        assert taker.held == held
    assert (taker.ended is not None) == (failed and not queue)
    assert bool(subject.observers) is not failed
    taker.dispose()
    assert not subject.observers
    assert scheduler.pending == 0


def test_overflow_passes_everything_through_to_a_consumer_that_says_nothing_of_its_room() -> None:
    scheduler = VirtualScheduler()
    seen = record(scheduler, cold(scheduler, "abcdef|").pipe(overflow("error", 1)))
    assert seen.values == list("abcdef")


def test_overflow_lets_a_stage_take_more_than_1024_items() -> None:
    scheduler = VirtualScheduler()
    subject: Subject[int] = Subject()
    stage = flat_map(lambda n: Script((1.0, n)), window=100)
    taker = Taker(scheduler, 1_000).connect(subject.pipe(overflow("buffer"), stage))
    for n in range(5_000):
        subject.on_next(n)
    subject.on_completed()
    while taker.ended is None:
        scheduler.run()
        taker.take(1_000)
    assert taker.taken + taker.held == list(range(5_000))


def test_however_many_items_wait_they_stand_in_the_queue_for_room_once() -> None:
    scheduler = VirtualScheduler()
    taker = Taker(scheduler, 1).connect(cold(scheduler, "abcdefgh").pipe(overflow("buffer")))
    scheduler.run()
    assert len(taker.waiting) == 1


def test_the_first_drop_is_logged_and_no_other(caplog: pytest.LogCaptureFixture) -> None:
    scheduler = VirtualScheduler()
    with caplog.at_level(logging.WARNING, "rxllm"):
        taker = Taker(scheduler, 1).connect(cold(scheduler, "abcdef|").pipe(overflow("drop_newest", 1)))
        scheduler.run()
    assert [record.getMessage() for record in caplog.records] == [
        "overflow drops items (drop_newest, n=1): the consumer is slower than the source"
    ]
    taker.dispose()


def test_the_error_of_the_source_comes_after_what_waits() -> None:
    scheduler = VirtualScheduler()
    error = ValueError("torn")
    taker = Taker(scheduler, 1).connect(cold(scheduler, "abc#", error=error).pipe(overflow("buffer")))
    scheduler.run()
    assert (taker.held, taker.ended) == (["a"], None)
    taker.take()
    scheduler.run()
    taker.take()
    scheduler.run()
    assert (taker.taken, taker.held) == (["a", "b"], ["c"])
    assert taker.ended == Event(3.0, "error", error)


def test_overflow_drops_what_waits_when_disposed() -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "abc")
    taker = Taker(scheduler, 1).connect(source.pipe(overflow("buffer")))
    scheduler.run(1.5)
    taker.dispose()
    taker.take()
    scheduler.run()
    assert (taker.taken, taker.held) == (["a"], [])
    assert source.subscriptions == [Subscription(0.0, 1.5)]
    assert (scheduler.pending, len(taker.waiting)) == (0, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("drop",), "policy must be 'error' or 'drop_oldest' or 'drop_newest' or 'buffer', got 'drop'"),
        ((None,), "policy must be 'error' or 'drop_oldest' or 'drop_newest' or 'buffer', got None"),
        (("error", 0), "n must be a whole number >= 1 or None, got 0"),
        (("error", -1), "n must be a whole number >= 1 or None, got -1"),
        (("drop_oldest", float("nan")), "n must be a whole number >= 1 or None, got nan"),
        (("drop_newest", 1.0), "n must be a whole number >= 1 or None, got 1.0"),
        (("buffer", 5), 'n must not be given with policy "buffer", which has no bound, got 5'),
    ],
)
def test_overflow_refuses_bad_arguments_by_name_and_value(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        overflow(*arguments)
    assert str(refusal.value) == message


def test_overflow_serves_an_endless_stock_source_to_a_sink() -> None:
    import reactivex as rx

    with rxllm.iterate(rx.interval(0.001).pipe(overflow("drop_oldest", 10))) as numbers:
        got = [next(numbers) for _ in range(3)]
    assert got == sorted(got)
