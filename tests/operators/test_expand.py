"""expand: what comes out goes in again, one stream at a time, the oldest first."""

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import Observable
from reactivex import operators as ops

import rxllm
from rxllm.errors import ConfigError, ServerError
from rxllm.operators import expand, flat_map
from rxllm.testing import Script, Subscription, Taker, VirtualScheduler, cold, marbles, record


@pytest.mark.parametrize(
    ("source", "following", "expected"),
    [
        pytest.param("--a|", {"a": "-b|"}, "--ab|", id="one-turn"),
        pytest.param("a|", {"a": "--b|", "b": "--c|"}, "a-b--c|", id="a-conversation"),
        pytest.param("a|", {"a": "(bc)|", "b": "-d|", "c": "-e|"}, "(abc)-d-e|", id="breadth-first"),
        pytest.param("ab|", {"a": "---c|", "b": "---d|"}, "ab-c---d|", id="one-stream-at-a-time"),
        pytest.param("a|", {}, "a|", id="nothing-follows"),
        pytest.param("|", {}, "|", id="empty"),
        pytest.param("a|", {"a": "|"}, "a|", id="an-empty-stream-follows"),
        pytest.param("a----b", {"a": "-#"}, "a#", id="an-error-ends-it-at-once"),
        pytest.param("a-#", {"a": "---b|"}, "a-#", id="an-error-of-the-source-too"),
    ],
)
def test_expand_emits_as_its_diagram_says(source: str, following: dict[str, str], expected: str) -> None:
    scheduler = VirtualScheduler()
    streams = {item: cold(scheduler, diagram) for item, diagram in following.items()}
    origin = cold(scheduler, source)
    seen = record(scheduler, origin.pipe(expand(streams.get)))
    assert marbles(seen.events) == expected
    assert scheduler.pending == 0
    for stream in [origin, *streams.values()]:
        assert all(entry.until is not None for entry in stream.subscriptions)


trees = st.recursive(st.just([]), lambda children: st.lists(children, max_size=3), max_leaves=20)


@settings(max_examples=60, deadline=None)
@given(tree=trees, delay=st.sampled_from([0.0, 1.0]), room=st.integers(1, 3))
def test_expand_visits_a_tree_breadth_first(tree: list[Any], delay: float, room: int) -> None:
    scheduler = VirtualScheduler()
    running = 0

    def children(node: list[Any]) -> Observable[list[Any]] | None:
        if not node:
            return None

        def count(n: int) -> None:
            nonlocal running
            running += n
            assert 0 <= running <= 1

        stream = rx.from_iterable(node).pipe(ops.delay(delay), ops.do_action(on_completed=lambda: count(-1)))
        return rx.defer(lambda _scheduler: count(1) or stream)  # type: ignore[func-returns-value]

    taker = Taker(scheduler, room).connect(rxllm.from_iterable([tree]).pipe(expand(children)))
    for _ in range(200):
        scheduler.run()
        taker.take()

    expected, queue = [], deque([tree])  # the model
    while queue:
        expected.append(queue.popleft())
        queue.extend(expected[-1])
    assert [id(node) for node in taker.taken] == [id(node) for node in expected]
    assert taker.ended is not None
    assert taker.ended.kind == "completed"
    assert scheduler.pending == 0


def test_a_tool_loop_runs_inside_the_place_of_its_item() -> None:
    scheduler = VirtualScheduler()
    script = Script((1.0, 1))

    def conversation(_question: int) -> Observable[int]:
        def answer(turn: int) -> Observable[int] | None:
            return script.pipe(ops.map(lambda step: turn + step)) if turn < 4 else None

        return rx.just(0).pipe(expand(answer), ops.last())

    seen = record(scheduler, rxllm.from_iterable(range(6)).pipe(flat_map(conversation, window=2)))
    assert seen.values == [4] * 6
    assert seen.end is not None
    assert seen.end.at == 12.0  # four turns, two conversations at a time
    assert script.most == 2


def test_expand_asks_for_the_next_item_when_the_loop_of_the_last_is_over() -> None:
    scheduler = VirtualScheduler()
    pulled: list[float] = []

    def items() -> Any:
        for n in range(3):
            pulled.append(scheduler.seconds())
            yield n

    stream = rxllm.from_iterable(items()).pipe(expand(lambda n: Script((5.0, n + 100)) if n < 100 else None))
    taker = Taker(scheduler, 9).connect(stream)
    scheduler.run()
    assert taker.held == [0, 100, 1, 101, 2, 102]
    assert pulled == [0.0, 5.0, 10.0]


def test_an_endless_synchronous_loop_stops_while_the_consumer_has_no_room() -> None:
    scheduler = VirtualScheduler()
    asked: list[int] = []

    def following(n: int) -> Observable[int]:
        asked.append(n)
        return Script((0, n + 1))

    taker = Taker(scheduler, 2).connect(rxllm.from_iterable([0]).pipe(expand(following)))
    for turn in range(5):
        scheduler.run()
        assert len(asked) <= 2 + turn + 1
        taker.take()
    assert taker.taken == [0, 1, 2, 3, 4]
    taker.dispose()
    scheduler.run()
    assert len(asked) <= 7


@pytest.mark.parametrize("error", [KeyError("bug"), ServerError("down")])
def test_what_next_raises_ends_the_stream_at_once(error: Exception) -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "a--b--c|")
    running = cold(scheduler, "-----d|")

    def following(item: str) -> Observable[str]:
        if item == "b":
            raise error
        return running

    seen = record(scheduler, source.pipe(expand(following)))
    assert seen.values == ["a", "b"]
    assert seen.end is not None
    assert seen.end.value is error
    assert source.subscriptions == [Subscription(0.0, 3.0)]
    assert running.subscriptions == [Subscription(0.0, 3.0)]


def test_expand_refuses_to_hold_more_than_1024_streams() -> None:
    seen = record(VirtualScheduler(), rx.just(0).pipe(expand(lambda _n: rx.repeat_value(0, 3))))
    assert seen.end is not None
    assert isinstance(seen.end.value, ConfigError)
    assert str(seen.end.value).startswith("expand has more than 1,024 streams waiting")


@pytest.mark.parametrize("returned", [5, "text", False])
def test_expand_says_what_next_returned_that_is_no_stream(returned: Any) -> None:
    seen = record(VirtualScheduler(), rx.just("a").pipe(expand(lambda _item: returned)))
    assert seen.end is not None
    assert str(seen.end.value) == f"next must return an Observable or an awaitable, got {type(returned).__name__}"


def test_next_may_be_async_or_return_an_awaitable() -> None:
    def following(n: int) -> Any:
        async def answer() -> int:
            await asyncio.sleep(0)
            return n + 1

        return answer() if n < 3 else None

    assert asyncio.run(rxllm.acollect(rx.just(0).pipe(expand(following)))) == [0, 1, 2, 3]


def test_an_awaitable_is_cancelled_when_the_loop_is_disposed() -> None:
    ended: list[str] = []

    def following(_n: int) -> Any:
        async def answer() -> int:
            try:
                await asyncio.sleep(60)
            finally:
                ended.append("cancelled")
            return 0

        return answer()

    async def main() -> list[int]:
        got = []
        async with rxllm.aiterate(rx.just(0).pipe(expand(following))) as items:
            async for item in items:
                got.append(item)
                await asyncio.sleep(0.005)
                break
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return got

    assert asyncio.run(main()) == [0]
    assert ended == ["cancelled"]


@pytest.mark.parametrize("following", [None, 5, "next"])
def test_expand_refuses_what_is_not_callable(following: Callable[[Any], Any]) -> None:
    with pytest.raises(ConfigError, match=f"next must be callable, got {following!r}"):
        expand(following)
