"""When a thread that iterates is woken: for several items at a time, and not only between two turns of the loop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import pytest

import rxllm
from rxllm.demand import NOTHING, DemandScheduler, Disposable, Observer
from rxllm.sinks import BUFFER
from rxllm.stream import Stream


class InOneTurn(Stream[int]):
    """Emits so many items in one turn of the loop, and calls `before` with the number of each."""

    def __init__(self, length: int, before: Callable[[int], object]) -> None:
        self.length = length
        self.before = before

    def _start(self, observer: Observer[int], carrier: DemandScheduler) -> Disposable:
        carrier.call_soon(lambda: self._emit(observer))
        return NOTHING

    def _emit(self, observer: Observer[int]) -> None:
        for n in range(self.length):
            self.before(n)
            observer.on_next(n)
        observer.on_completed()


@pytest.mark.parametrize(
    ("length", "pause"),
    [
        pytest.param(3, 0.002, id="after-a-moment"),
        pytest.param(BUFFER // 2 + 1, 0.0, id="when-it-is-half-full"),
    ],
)
def test_who_iterates_is_woken_before_a_long_turn_of_the_loop_is_over(length, pause):
    seen = threading.Event()
    heard: list[bool] = []

    def before(n: int) -> None:
        if pause or n == 0:
            time.sleep(pause or 0.03)  # before the first: until the consumer waits
        if n == length - 1:
            heard.append(seen.wait(10))  # the turn does not end before an item was seen

    with rxllm.iterate(InOneTurn(length, before)) as numbers:
        for _ in numbers:
            seen.set()
    assert heard == [True]


def test_items_of_one_short_turn_share_a_ring():
    ready = threading.Event()
    rings: list[int] = []
    with rxllm.iterate(InOneTurn(100, lambda n: n or ready.wait(10))) as numbers:
        queue = numbers._queue
        bell, queue._bell = queue._bell, lambda: (rings.append(len(queue.items)), bell())
        ready.set()
        assert list(numbers) == list(range(100))
    assert 1 <= len(rings) <= 10  # two, unless the machine takes a pause of its own
