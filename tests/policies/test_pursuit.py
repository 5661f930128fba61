"""The pace, start by start; the whole controller is in test_follow.py."""

import pytest

from rxllm.policies.pursuit import BELOW, FASTEST, SLOWEST, Pursuit
from rxllm.policies.recent import Recent


class Pace:
    """A pursuit that starts evenly at its rate, and learns after 0.1 s of what was refused."""

    def __init__(self) -> None:
        self.recent = Recent()
        self.pursuit = Pursuit(self.recent, 10.0)
        self.now = 0.0
        self.refused = 0
        self.started = 0

    def run(self, until: float, quota: float, *, seconds: float = 2.0, saves: float = 1.0) -> None:
        """Run against a bucket of `quota` starts per second that saves up for `saves` seconds."""
        pursuit, recent = self.pursuit, self.recent
        level = quota * saves
        back: list[tuple[float, float, int]] = []  # when it is back, when it started, cuts until then
        while self.now < until:
            step = 1 / pursuit.rate
            self.now += step
            level = min(max(1.0, quota * saves), level + step * quota)
            pursuit.start(self.now)
            recent.start(self.now, 1)
            self.started += 1
            if level < 1:
                self.refused += 1
                back.append((self.now + 0.1, self.now, pursuit.cuts))
            else:
                level -= 1
            while back and back[0][0] <= self.now:
                at, started, cuts = back.pop(0)
                recent.refuse(started)
                pursuit.take_back(at, started)
                if cuts == pursuit.cuts:
                    pursuit.refuse(at, started)
            pursuit.look(self.now, seconds, binding=True)


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
