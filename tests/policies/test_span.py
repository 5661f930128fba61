"""The window of a quota, start by start; what is made of it is in test_pursuit.py."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.policies.pursuit import BELOW
from rxllm.policies.recent import GRAIN, GRAINS, Recent
from rxllm.policies.span import SPANS, Span


class Server:
    """A sliding window, and what a client knows of its starts; they come at the beginning of quarters of a second."""

    def __init__(self, amount: int, per: float) -> None:
        self.amount, self.per = amount, per
        self.recent = Recent()
        self.span = Span(self.recent)
        self.accepted: list[float] = []
        self.refused: list[float] = []
        self._quarter = 0

    def run(self, until: float, rate: Callable[[float], float]) -> None:
        """Start `rate` times a second, which must be multiples of 4."""
        while (at := self._quarter * GRAIN) < until:
            for _ in range(round(rate(at) * GRAIN)):
                self.recent.start(at, 1)
                if sum(at - self.per < then for then in self.accepted[-self.amount :]) < self.amount:
                    self.accepted.append(at)
                else:
                    self.recent.refuse(at)
                    self.refused.append(at)
            self._quarter += 1

    def silence(self) -> tuple[float, float]:
        """Return when the first start was that was refused, and when the first one was that was accepted after it."""
        first = self.refused[0]
        return first, next(at for at in self.accepted if at > first)


def steady(_at: float) -> float:
    return 12.0


def used_up(per: float) -> Server:
    """Return a server whose window a burst has used up at once; it has begun anew."""
    server = Server(160, per)
    server.run(per + 2, lambda at: 80.0 if at < 3 else 4.0)
    return server


@pytest.mark.parametrize("per", SPANS)
def test_a_silence_after_a_burst_tells_how_long_the_window_is_and_what_it_grants(per: float) -> None:
    server = used_up(per)
    assert server.span.silent(*server.silence(), 0.0)
    assert server.span.seconds == per
    assert server.span.learn(server.refused[-1]) == 160 / per


@given(
    per=st.sampled_from(SPANS),
    amount=st.integers(20, 200),
    rates=st.lists(st.integers(0, 20), min_size=3, max_size=30),
)
def test_once_its_length_is_known_each_refusal_tells_what_it_grants(per: float, amount: int, rates: list[int]) -> None:
    server = Server(amount, per)
    server.span.seconds = per
    server.run(4.0 * len(rates), lambda at: 4.0 * rates[int(at / 4)])
    for at in server.refused:
        if at > 4 * len(rates) - GRAIN * GRAINS + per:
            assert server.span.granted(at + GRAIN) == amount / per


@pytest.mark.parametrize("held", [12 / BELOW, 0.0], ids=["at-a-rate-that-is-known", "at-a-rate-that-is-not-known"])
@pytest.mark.parametrize("silence", [5.0, 20.0, 40.0])
def test_an_outage_is_no_window(held: float, silence: float) -> None:
    server = Server(10**6, 60.0)
    server.run(70.0, steady)
    server.run(70.0 + silence, lambda at: 0.0)
    assert not server.span.silent(70.0, 70.0 + silence, held)
    assert server.span.seconds == 0.0


def test_of_a_known_window_too_an_outage_tells_nothing() -> None:
    server = used_up(30.0)
    assert server.span.silent(*server.silence(), 0.0)
    server.run(110.0, lambda at: 4.0)
    server.run(128.0, lambda at: 0.0)
    assert not server.span.silent(110.0, 128.0, 4.0)
    assert server.span.seconds == 30.0


@pytest.mark.parametrize(
    ("since", "until", "held"),
    [(2.0, 4.0, 0.0), (2.0, 8.0, 1.0), (2.0, 63.0, 0.0)],
    ids=["as-short-as-those-of-a-bucket", "with-hardly-a-start-missed", "longer-than-any-window"],
)
def test_some_silences_are_none_of_a_window(since: float, until: float, held: float) -> None:
    server = used_up(60.0)
    assert not server.span.silent(since, until, held)
    assert server.span.seconds == 0.0


def test_a_short_silence_confirms_a_window_that_is_known() -> None:
    server = used_up(10.0)
    assert server.span.silent(*server.silence(), 0.0)
    assert server.span.silent(9.0, 10.0, 16.0)


def test_a_short_silence_after_less_than_is_granted_is_none_of_a_window_that_is_known() -> None:
    server = used_up(30.0)
    assert server.span.silent(*server.silence(), 0.0)
    server.run(90.0, lambda at: 4.0 if at < 85 else 16.0)
    assert not server.span.silent(89.5, 90.0, 12.0)


def test_a_short_silence_shows_no_other_window() -> None:
    server = used_up(10.0)
    assert server.span.silent(*server.silence(), 0.0)
    server.run(80.0, lambda at: 16.0 if 60 <= at < 70 else 4.0)
    assert server.span.silent(79.5, 80.0, 4.0)
    assert server.span.seconds == 10.0


def test_a_longer_silence_shows_a_longer_window() -> None:
    server = used_up(60.0)
    server.span.seconds = 10.0
    assert server.span.silent(*server.silence(), 0.0)
    assert server.span.seconds == 60.0


def test_a_window_that_was_taken_for_another_one_is_recognized_at_the_next_refusal() -> None:
    server = Server(600, 30.0)

    def rate(at: float) -> float:  # slowly, then a burst: 20 s hold more of it per second than 30 s
        return 8.0 if at < 10 else 80.0 if at < 18 else 4.0 if at < 31 else 20.0

    server.run(31.0, rate)
    assert server.span.silent(*server.silence(), 0.0)
    server.span.learn(30.0)
    assert server.span.seconds == 20.0
    server.run(36.0, rate)
    assert server.span.learn(server.refused[-1]) == pytest.approx(600 / 30, rel=0.02)
    assert server.span.seconds == 30.0


def test_when_more_is_granted_the_window_is_still_the_same() -> None:
    server = used_up(10.0)
    assert server.span.silent(*server.silence(), 0.0)
    server.run(90.0, lambda at: 16.0)
    server.span.learn(90.0)
    server.amount *= 3
    server.run(100.0, lambda at: 80.0)
    assert server.span.learn(server.refused[-1]) == pytest.approx(48.0, rel=0.02)
    assert server.span.seconds == 10.0


def test_what_is_the_same_as_before_changes_no_window() -> None:
    server = used_up(10.0)
    assert server.span.silent(*server.silence(), 0.0)
    server.span.learn(server.refused[-1])
    server.run(100.0, lambda at: 16.0)
    assert server.span.learn(100.0) == pytest.approx(16.0)
    assert server.span.seconds == 10.0


def test_there_is_room_for_what_is_not_used_and_for_what_ends_soon() -> None:
    server = Server(10**6, 10.0)
    server.span.seconds = 10.0
    assert server.span.room(0.0, 16.0) == 80.0
    server.run(2.0, lambda at: 40.0)
    assert server.span.room(2.0, 16.0) == 40.0
    assert server.span.room(2.0, 8.0) == 0.0
    assert server.span.room(9.0, 8.0) == 20.0
    assert server.span.room(2.0, 4.0) < 0


def test_forgotten_it_knows_no_window() -> None:
    server = used_up(10.0)
    assert server.span.silent(*server.silence(), 0.0)
    server.span.forget()
    assert server.span.seconds == 0.0
    assert not server.span.silent(9.0, 10.0, 16.0)
