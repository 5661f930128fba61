"""When a gate looks again: one timer, and one call in the next turn."""

import math

from hypothesis import example, given
from hypothesis import strategies as st

from rxllm.gate.lookout import LEAST, Lookout
from rxllm.testing import VirtualScheduler


class Watch:
    """A lookout in virtual time, and when it looked."""

    def __init__(self, start: float = 0.0) -> None:
        self.scheduler = VirtualScheduler()
        self.scheduler.run(start)
        self.looks: list[float] = []
        self.lookout = Lookout(lambda: self.looks.append(self.scheduler.seconds()))

    def at(self, time: float) -> None:
        self.lookout.at(time, self.scheduler.seconds(), self.scheduler)


def test_the_earliest_time_holds_and_a_timer_that_is_early_enough_stays_as_it_is() -> None:
    watch = Watch()
    watch.at(5.0)
    watch.at(7.0)
    assert watch.scheduler.pending == 1
    timer = watch.lookout._timer
    watch.at(6.0)
    assert watch.lookout._timer is timer
    watch.at(3.0)
    assert (watch.lookout.due, watch.scheduler.pending) == (3.0, 1)
    watch.scheduler.run()
    assert (watch.looks, watch.lookout.due) == ([3.0], None)


def test_where_no_time_helps_there_is_no_timer() -> None:
    watch = Watch()
    watch.at(5.0)
    watch.at(math.inf)
    assert (watch.lookout.due, watch.scheduler.pending) == (None, 0)


def test_however_much_happens_in_a_turn_there_is_one_look_in_the_next() -> None:
    watch = Watch()
    for _ in range(3):
        watch.lookout.soon(watch.scheduler)
    watch.scheduler.run()
    assert watch.looks == [0.0]
    watch.lookout.soon(watch.scheduler)
    watch.scheduler.run()
    assert watch.looks == [0.0, 0.0]


def test_at_rest_nothing_is_left() -> None:
    watch = Watch()
    watch.at(5.0)
    watch.lookout.soon(watch.scheduler)
    watch.lookout.rest()
    assert watch.scheduler.pending == 0


@given(times=st.tuples(st.floats(0, 1e6), st.floats(0, 1e6)).map(sorted))
@example(times=[1.1, 6.61])  # 1.1 + (6.61 - 1.1) is less than 6.61
def test_it_looks_never_before_the_time_and_not_at_once(times: list[float]) -> None:
    start, time = times
    watch = Watch(start)
    watch.at(time)
    watch.scheduler.run()
    (at,) = watch.looks
    assert at >= max(time, start + LEAST)
    assert at <= max(time, start + LEAST) + 1e-9
