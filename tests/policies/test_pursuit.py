"""The pace, start by start; the whole controller is in test_follow.py."""

from collections.abc import Callable
from itertools import pairwise

import pytest

from rxllm.policies.pursuit import BELOW, FASTEST, SLOWEST, Pursuit
from rxllm.policies.recent import Recent


def sliding(amount: int, per: float) -> Callable[[float], bool]:
    accepted: list[float] = []

    def accepts(now: float) -> bool:
        full = len(accepted) >= amount and accepted[-amount] > now - per
        if not full:
            accepted.append(now)
        return not full

    return accepts


def fixed(amount: int, per: float) -> Callable[[float], bool]:
    used: dict[int, int] = {}

    def accepts(now: float) -> bool:
        window = int(now // per)
        used[window] = min(amount, used.get(window, 0)) + 1
        return used[window] <= amount

    return accepts


class Pace:
    """A pursuit that starts evenly at its rate, and learns after 0.1 s of what was refused."""

    def __init__(self) -> None:
        self.recent = Recent()
        self.pursuit = Pursuit(self.recent, 10.0)
        self.now = 0.0
        self._last = 0.0  # when the last start was
        self.refused = 0
        self.started = 0
        self.rates: list[tuple[float, float]] = []  # since when, in the order of time
        self._back: list[tuple[float, float, int]] = []  # when it is back, when it started, cuts until then

    def run(self, until: float, quota: float, *, seconds: float = 2.0, saves: float = 1.0) -> None:
        """Run against a bucket of `quota` starts per second that saves up for `saves` seconds."""
        level = quota * saves
        before = self.now

        def accepts(now: float) -> bool:
            nonlocal level, before
            level = min(max(1.0, quota * saves), level + (now - before) * quota)
            before = now
            if level < 1:
                return False
            level -= 1
            return True

        self.run_against(accepts, until, seconds=seconds)

    def run_against(self, accepts: Callable[[float], bool], until: float, *, seconds: float = 2.0) -> None:
        """Run against a server that says at what times it accepts a start."""
        pursuit, recent = self.pursuit, self.recent
        while self.now < until:
            at = max(self.now, self._last + 1 / pursuit.rate)
            if pursuit.stopped and pursuit.due < at:  # else its looks wait for a start
                self.now = max(self.now, pursuit.due)
            else:
                self.now = self._last = at
                pursuit.start(at)
                recent.start(at, 1)
                self.started += 1
                if not accepts(at):
                    self.refused += 1
                    self._back.append((at + 0.1, at, pursuit.cuts))
            self._hear()
            pursuit.look(self.now, seconds, binding=True, factor=2.0)
            self.rates.append((self.now, pursuit.rate))

    def _hear(self) -> None:
        """Learn of the refusals that are back."""
        pursuit, back = self.pursuit, self._back
        while back and back[0][0] <= self.now:
            at, started, cuts = back.pop(0)
            self.recent.refuse(started)
            pursuit.take_back(at, started)
            if cuts == pursuit.cuts and (pursuit.known or not pursuit.stop(at, started)):
                pursuit.refuse(at, started)

    def share(self, accepts: Callable[[float], bool], until: float, quota: float) -> float:
        """Return what part of a quota per second is accepted until then."""
        now, good = self.now, self.started - self.refused
        self.run_against(accepts, until)
        return (self.started - self.refused - good) / (quota * (self.now - now))


@pytest.mark.parametrize("saves", [0.05, 1.0, 10.0], ids=["saves-nothing", "saves-a-second", "saves-ten-seconds"])
@pytest.mark.parametrize("quota", [5.0, 100.0])
def test_it_starts_what_is_granted_at_few_refusals_whatever_is_saved_up(quota: float, saves: float) -> None:
    pace = Pace()
    pace.run(60.0, quota, saves=saves)
    assert pace.pursuit.known
    started, refused = pace.started, pace.refused
    pace.run(360.0, quota, saves=saves)
    assert pace.started - started - (pace.refused - refused) > 0.8 * 300 * quota
    assert pace.refused - refused < 0.025 * (pace.started - started)


def test_it_cuts_to_what_is_left_within_seconds() -> None:
    pace = Pace()
    pace.run(60.0, 80.0)
    refused = pace.refused
    pace.run(65.0, 20.0)
    assert pace.pursuit.rate < 1.1 * 20
    assert pace.refused - refused < 80


def test_while_nothing_is_accepted_it_probes_and_forgets_nothing() -> None:
    pace = Pace()
    pace.run(60.0, 80.0)
    refused = pace.refused
    pace.run(110.0, 0.0, saves=0.0)
    assert SLOWEST <= pace.pursuit.rate <= 2.0
    assert pace.refused - refused < 100
    pace.run(170.0, 80.0)
    assert pace.pursuit.rate > 0.85 * 80


def test_before_anything_is_refused_it_starts_twice_what_was_accepted_once_answers_are_there() -> None:
    pace = Pace()
    pace.run(10.0, 1e9, seconds=0.0)
    assert pace.pursuit.rate == 10.0
    pace.run(14.0, 1e9)
    assert pace.pursuit.rate > 30
    assert not pace.pursuit.known


def test_a_climb_needs_somebody_who_waits() -> None:
    pace = Pace()
    pace.run(60.0, 20.0)
    pursuit = pace.pursuit
    while pursuit.state != "hold":
        pace.run(pace.now + 0.1, 20.0)
    for number in range(1, 400):
        pursuit.look(pace.now + number, 2.0, binding=False, factor=2.0)
    held = pursuit.rate
    for number in range(400, 500):
        pursuit.look(pace.now + number, 2.0, binding=True, factor=2.0)
    assert pursuit.rate > held / BELOW


@pytest.mark.parametrize("kind", [sliding, fixed])
@pytest.mark.parametrize(("amount", "per"), [(80, 10.0), (600, 20.0), (600, 60.0), (120, 60.0)])
def test_of_a_window_it_keeps_nearly_all_that_is_granted_at_few_refusals(
    kind: Callable[[int, float], Callable[[float], bool]], amount: int, per: float
) -> None:
    pace = Pace()
    accepts = kind(amount, per)
    pace.run_against(accepts, 3 * per)
    started, refused = pace.started, pace.refused
    assert pace.share(accepts, 23 * per, amount / per) > 0.9
    assert pace.refused - refused < 0.035 * (pace.started - started)


@pytest.mark.parametrize("kind", [sliding, fixed])
@pytest.mark.parametrize("factor", [0.5, 2.0], ids=["it-halves", "it-doubles"])
def test_what_a_window_grants_now_is_found_within_a_few_windows(
    kind: Callable[[int, float], Callable[[float], bool]], factor: float
) -> None:
    pace = Pace()
    pace.run_against(kind(200, 20.0), 200.0)
    then = kind(round(200 * factor), 20.0)
    pace.run_against(then, 360.0)
    started, refused = pace.started, pace.refused
    assert pace.share(then, 660.0, 10.0 * factor) > 0.9
    assert pace.refused - refused < 0.04 * (pace.started - started)


def test_a_climb_gets_faster_once_more_than_a_window_is_accepted() -> None:
    pace = Pace()
    pace.run_against(fixed(600, 60.0), 240.0)
    assert pace.share(fixed(2400, 60.0), 480.0, 40.0) > 0.72


def test_no_more_is_started_than_a_window_has_room_for() -> None:
    pace = Pace()
    accepts = sliding(600, 60.0)
    pace.run_against(accepts, 62.0)  # it was used up in some 15 s, and what was accepted then is coming back
    refused = pace.refused
    pace.run_against(accepts, 119.0)
    assert pace.refused - refused < 12


def test_climbs_in_a_window_are_slow_and_seldom() -> None:
    pace = Pace()
    accepts = fixed(600, 60.0)
    pace.run_against(accepts, 900.0)
    peaks = [
        max((rate for at, rate in pace.rates if minute <= at < minute + 60), default=0.0)
        for minute in range(180, 900, 60)
    ]
    assert max(peaks) < 2.5 * 10
    assert sum(peak > 1.1 * 10 for peak in peaks) <= 9


def test_a_server_that_refuses_all_for_a_while_is_no_window() -> None:
    pace = Pace()
    pace.run(60.0, 20.0)
    pace.run(80.0, 0.0, saves=0.0)
    pace.run(140.0, 20.0)
    assert pace.pursuit.rate > 0.9 * 20
    cuts = pace.pursuit.cuts
    pace.run(180.0, 20.0)
    assert pace.pursuit.cuts >= cuts + 2  # climbs as often as before


def test_it_takes_a_refusal_in_a_check_for_known() -> None:
    pace = Pace()
    pace.run(3.0, 20.0)
    pursuit = pace.pursuit
    while pursuit.state != "check":
        pace.run(pace.now + 0.01, 20.0)
    before = pursuit.rate
    assert not pursuit.refuse(pace.now, pace.now - 0.1)
    assert pursuit.rate == before


def test_released_it_forgets_the_quota() -> None:
    pace = Pace()
    pace.run(60.0, 20.0)
    before = pace.pursuit.rate
    pace.pursuit.release(pace.now)
    assert not pace.pursuit.known
    assert before < pace.pursuit.rate <= FASTEST


def test_a_first_burst_that_uses_up_what_was_saved_up_costs_little_more_than_what_is_on_the_wire() -> None:
    pace = Pace()
    pace.run(6.0, 10.0, saves=60.0)
    on_the_wire = pace.refused
    pace = Pace()
    pace.run(20.0, 10.0, saves=60.0)
    assert pace.refused < on_the_wire + 20
    assert pace.pursuit.rate == pytest.approx(10.0, rel=0.1)


def test_at_the_first_refusal_of_a_burst_it_stops_until_the_starts_on_the_wire_are_back() -> None:
    pace = Pace()
    pursuit = pace.pursuit
    for number in range(40):
        pursuit.start(number / 100)
    assert pursuit.stop(0.4, 0.3)
    assert pursuit.stopped
    assert pursuit.rate == SLOWEST
    pursuit.take_back(0.42, 0.31)
    pursuit.look(pursuit.due, 2.0, binding=True, factor=2.0)
    assert not pursuit.stopped
    assert not pursuit.silent
    assert pursuit.rate == pytest.approx(BELOW * 0.8 * 10.0)  # 2 of 10 were refused


def test_it_probes_if_none_of_the_starts_on_the_wire_was_accepted() -> None:
    pace = Pace()
    pursuit = pace.pursuit
    for number in range(40):
        pursuit.start(number / 100)
    assert pursuit.stop(0.4, 0.3)
    for number in range(31, 40):
        pursuit.take_back(number / 100 + 0.1, number / 100)
    pursuit.look(pursuit.due, 2.0, binding=True, factor=2.0)
    assert pursuit.silent
    assert SLOWEST < pursuit.rate <= 2.0


def test_it_stops_once_only_and_not_for_a_handful_of_starts() -> None:
    pace = Pace()
    pursuit = pace.pursuit
    for number in range(40):
        pursuit.start(number / 100)
    assert not pursuit.stop(0.4, 0.37)
    assert pursuit.stop(0.4, 0.3)
    assert not pursuit.stop(0.4, 0.3)


def test_it_searches_upwards_and_takes_what_was_accepted_since_it_was_used_up_for_the_quota() -> None:
    pace = Pace()
    pace.run(14.0, 10.0, saves=60.0)
    steps = [after for before, after in pairwise(rate for _, rate in pace.rates) if before != after]
    search = steps[steps.index(2.0) :]
    assert search[:4] == [2.0, 4.0, 8.0, 16.0]
    assert max(search) < 45.0
    assert search[-1] == pytest.approx(10.0, rel=0.1)


@pytest.mark.parametrize("quota", [0.1, 0.17])
def test_a_quota_of_a_few_a_minute_is_not_asked_for_more_all_the_time(quota: float) -> None:
    pace = Pace()
    pace.run(1200.0, quota, saves=60.0)
    started, refused = pace.started, pace.refused
    pace.run(6000.0, quota, saves=60.0)
    assert pace.refused - refused < 0.3 * (pace.started - started)


def test_what_was_accepted_while_the_width_held_a_climb_back_is_granted() -> None:
    pace = Pace()
    pace.run(60.0, 20.0)
    pursuit = pace.pursuit
    while pursuit.reason != "a climb":
        pace.run(pace.now + 0.1, 20.0)
    pace.run(pace.now + 15.0, 1e9)
    now, rate = pace.now, pursuit.rate
    assert rate > 2 * 20.0
    while pursuit.reason == "a climb":  # 50 a second, whatever the rate is: so many fit
        now += 0.02
        pursuit.start(now)
        pace.recent.start(now, 100)
        pursuit.look(now, 2.0, binding=False, factor=2.0)
        assert now < pace.now + 60
    assert pursuit.rate == pytest.approx(BELOW * 50.0, rel=0.02)


def test_a_refusal_in_a_window_that_grants_as_much_as_before_changes_nothing() -> None:
    pace = Pace()
    accepts = sliding(600, 60.0)
    pace.run_against(accepts, 180.0)
    pursuit = pace.pursuit
    while pursuit.state != "hold" or pursuit.reason != "held":
        pace.run_against(accepts, pace.now + 0.1)
    granted = pace.recent.count(pace.now - 60.0, pace.now) / 60.0
    pursuit.refuse(pace.now, pace.now - 0.1)
    pursuit.look(pursuit.due, 2.0, binding=True, factor=2.0)
    assert pursuit.rate > 0.5 * granted


def test_it_searches_once_only_as_later_a_search_would_forget_too_much() -> None:
    pace = Pace()
    pace.run(40.0, 10.0, saves=60.0)
    pursuit = pace.pursuit
    pursuit.release(pace.now)
    pace.run_against(lambda now: False, pace.now + 4.0)
    assert pursuit.silent
    while pursuit.silent:
        pace.run_against(lambda now: True, pace.now + 0.1)
    assert pursuit.rate > 5.0


def test_a_window_that_does_not_explain_a_silence_is_forgotten() -> None:
    pace = Pace()
    pace.run_against(lambda now: pace.started <= 300, 12.0)
    while pace.pursuit.silent:
        pace.run_against(lambda now: True, pace.now + 0.1)
    pace.run_against(lambda now: False, pace.now + 40.0)
    pace.run(pace.now + 120.0, 20.0)
    assert pace.pursuit.rate == pytest.approx(20.0, rel=0.15)


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_in_the_slow_start_it_starts_a_multiple_of_what_was_accepted(factor: float) -> None:
    pace = Pace()
    for number in range(80):
        pace.pursuit.start(number / 20)
        pace.recent.start(number / 20, 1)
    pace.pursuit.look(4.0, 2.0, binding=True, factor=factor)
    assert pace.pursuit.rate == pytest.approx(factor * 20.0, rel=0.01)
