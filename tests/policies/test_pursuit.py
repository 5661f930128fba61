"""The pace, start by start; the whole controller is in test_follow.py."""

from collections.abc import Callable

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
        pursuit, recent, back = self.pursuit, self.recent, self._back
        while self.now < until:
            self.now += 1 / pursuit.rate
            pursuit.start(self.now)
            recent.start(self.now, 1)
            self.started += 1
            if not accepts(self.now):
                self.refused += 1
                back.append((self.now + 0.1, self.now, pursuit.cuts))
            while back and back[0][0] <= self.now:
                at, started, cuts = back.pop(0)
                recent.refuse(started)
                pursuit.take_back(at, started)
                if cuts == pursuit.cuts:
                    pursuit.refuse(at, started)
            pursuit.look(self.now, seconds, binding=True)
            self.rates.append((self.now, pursuit.rate))

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
    assert pace.refused - refused < 0.02 * (pace.started - started)


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
        pursuit.look(pace.now + number, 2.0, binding=False)
    held = pursuit.rate
    for number in range(400, 500):
        pursuit.look(pace.now + number, 2.0, binding=True)
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
