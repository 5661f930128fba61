"""The ceiling, refusal by refusal; the whole controller is in test_follow.py."""

from collections.abc import Sequence

import pytest

from rxllm.policies.ceiling import DROP, LEAST, QUIET, TRIAL, Ceiling
from rxllm.policies.recent import Recent


def busy(ceiling: Ceiling, recent: Recent, start: float, end: float, in_flight: int) -> None:
    """Let ten attempts a second start and be accepted."""
    for step in range(round(10 * (end - start))):
        recent.start(start + step / 10, in_flight)
        ceiling.look(start + step / 10, full=True)


def learned(at: int = 41) -> tuple[Ceiling, Recent]:
    recent = Recent()
    ceiling = Ceiling(recent)
    busy(ceiling, recent, 0.0, 5.0, at - 1)
    assert ceiling.refuse(5.0, 4.9, at, fresh=True)
    assert ceiling.limit == at - 1
    return ceiling, recent


def refused_again(
    ceiling: Ceiling, recent: Recent, now: float, widths: Sequence[int], *, every: float = 10.0
) -> list[bool]:
    """Let the rate be known, and refuse one in so many seconds, at these widths; 32 are accepted in between."""
    found: list[bool] = []
    for number, width in enumerate(widths):
        at = now + every * number
        end = at + every
        ceiling.cut(at)
        busy(ceiling, recent, at, end - 0.1, 32)
        found.append(ceiling.refuse(end, end - 0.1, width, fresh=False))
    return found


def confirmed(at: int) -> tuple[Ceiling, Recent, float]:
    """Return a ceiling whose trial is over and whose first step beyond was refused, and the time."""
    ceiling, recent = learned(at)
    busy(ceiling, recent, 5.0, 10.05, at - 1)
    assert ceiling.refuse(10.2, 10.1, at, fresh=True)
    return ceiling, recent, 10.2


def climbed(ceiling: Ceiling, recent: Recent, now: float) -> float:
    """Let all be accepted until a climb has begun; return when."""
    assert ceiling.limit is not None
    before = ceiling.limit
    while ceiling.limit is not None and ceiling.limit <= before:
        busy(ceiling, recent, now, now + 0.5, before)
        now += 0.5
    return now


def test_the_first_refusal_sets_a_limit_just_below_on_trial() -> None:
    ceiling, recent = learned()
    assert ceiling.trial == 5.0 + TRIAL
    busy(ceiling, recent, 5.0, 9.9, 40)
    assert ceiling.limit == 40
    busy(ceiling, recent, 9.9, 10.2, 40)
    assert ceiling.trial is None
    assert ceiling.limit == 41, "the first step beyond comes at once"


def test_a_refusal_far_below_refutes_it_and_one_near_lowers_it() -> None:
    ceiling, _ = learned()
    assert ceiling.refuse(5.5, 5.4, 39, fresh=True)
    assert ceiling.limit == 38
    assert not ceiling.refuse(6.0, 5.9, 20, fresh=True)
    assert ceiling.limit is None


def test_what_started_above_the_limit_says_nothing_new() -> None:
    ceiling, _ = learned()
    assert ceiling.refuse(5.2, 4.8, 60, fresh=True)
    assert ceiling.limit == 40


def test_a_refused_climb_ends_where_it_was_refused_and_the_next_one_waits() -> None:
    ceiling, recent = learned()
    busy(ceiling, recent, 5.0, 10.2, 40)
    assert ceiling.refuse(10.3, 10.2, 41, fresh=True)
    assert ceiling.limit == 40
    busy(ceiling, recent, 10.3, 10.3 + QUIET - 0.2, 40)
    assert ceiling.limit == 40
    busy(ceiling, recent, 10.3 + QUIET - 0.2, 12.5 + QUIET, 40)
    assert ceiling.limit is not None
    assert ceiling.limit > 40


def test_a_climb_that_nothing_refuses_opens_it() -> None:
    ceiling, recent = learned()
    busy(ceiling, recent, 5.0, 30.0, 40)
    assert ceiling.limit is None


def test_with_few_in_flight_or_a_known_rate_a_single_refusal_is_not_about_a_ceiling() -> None:
    recent = Recent()
    ceiling = Ceiling(recent)
    assert not ceiling.refuse(1.0, 0.9, 7, fresh=True)
    busy(ceiling, recent, 1.0, 3.0, 20)
    assert not ceiling.refuse(3.0, 2.9, 40, fresh=False)
    assert ceiling.limit is None


def test_three_records_in_a_row_at_the_same_width_are_about_a_ceiling_and_others_are_not() -> None:
    for widths, found in (
        ((33, 33, 33), True),
        ((32, 32, 32), True),
        ((31, 31, 31), False),
        ((33, 20, 33), False),
        ((33, 60, 33), False),
    ):
        recent = Recent()
        ceiling = Ceiling(recent)
        assert refused_again(ceiling, recent, 0.0, widths) == [False, False, found]


def test_records_within_a_third_of_the_time_on_the_wire_are_one() -> None:
    recent = Recent()
    ceiling = Ceiling(recent)  # 33 in flight at ten a second: 3.3 s on the wire
    assert refused_again(ceiling, recent, 0.0, [33] * 5, every=1.0) == [False, False, False, False, True]


def test_refusals_again_and_again_below_a_known_limit_refute_it() -> None:
    ceiling, recent = learned()
    busy(ceiling, recent, 5.0, 10.05, 40)
    ceiling.refuse(10.2, 10.1, 41, fresh=True)
    now, lowered = 10.2, 0
    while ceiling.limit is not None and lowered < 20:
        now += 0.3
        before = ceiling.limit
        if not ceiling.refuse(now, now - 0.1, ceiling.limit, fresh=True):
            break
        assert ceiling.limit < before
        lowered += 1
    assert ceiling.limit is None
    assert lowered == DROP


@pytest.mark.parametrize("doubts", [0, 12], ids=["without-doubts-before", "with-doubts-before"])
def test_a_drop_to_a_tenth_is_followed_and_does_not_refute_the_ceiling(doubts: int) -> None:
    ceiling, recent, now = confirmed(201)
    for _ in range(doubts):  # one that nobody asked for, then a climb that ends as it should
        assert ceiling.limit is not None
        assert ceiling.refuse(now + 0.3, now + 0.2, ceiling.limit, fresh=True)
        now = climbed(ceiling, recent, now + 0.3)
        assert ceiling.refuse(now + 0.2, now + 0.1, ceiling.limit, fresh=True)
        now += 0.2
    assert ceiling.limit is not None
    while ceiling.limit > 20:
        now += 0.3
        assert ceiling.refuse(now, now - 0.1, ceiling.limit, fresh=True), ceiling.limit
    assert ceiling.limit > 2


def test_a_refusal_that_was_expected_takes_back_less_than_one_that_was_not() -> None:
    ceiling, recent, now = confirmed(201)
    rows = 0
    while ceiling.limit is not None and rows < 20:  # two that nobody asked for, then a climb that ends as it should
        for _ in range(2):
            now += 0.3
            if ceiling.limit is not None:
                ceiling.refuse(now, now - 0.1, ceiling.limit, fresh=True)
        if ceiling.limit is not None:
            now = climbed(ceiling, recent, now) + 0.2
            assert ceiling.refuse(now, now - 0.1, ceiling.limit, fresh=True)
            rows += 1
    assert rows == 5


def test_a_refusal_with_no_more_in_flight_than_before_a_climb_was_not_asked_for_by_the_climb() -> None:
    ceiling, recent, now = confirmed(101)
    now = climbed(ceiling, recent, now)
    assert ceiling.limit is not None
    assert ceiling.limit > 100
    assert ceiling.refuse(now + 0.2, now + 0.1, 100, fresh=True)
    assert ceiling.limit == 97
    assert ceiling.refuse(now + 0.4, now + 0.3, 97, fresh=True)
    assert ceiling.limit == 91, "the second in a row"


def test_a_first_guess_that_was_wrong_makes_the_next_one_no_harder() -> None:
    ceiling, recent = learned()
    assert not ceiling.refuse(6.0, 5.9, 20, fresh=True), "refuted"
    assert refused_again(ceiling, recent, 20.0, [33] * LEAST)[-1]
    assert ceiling.limit == 32


@pytest.mark.parametrize("passed", [False, True], ids=["refuted-on-trial", "refuted-after-it"])
def test_a_guess_that_was_wrong_though_the_rate_was_known_takes_twice_as_many(passed: bool) -> None:
    recent = Recent()
    ceiling = Ceiling(recent)
    assert refused_again(ceiling, recent, 0.0, [33] * LEAST)[-1]
    now = 30.0
    if passed:
        busy(ceiling, recent, now, now + TRIAL + 0.5, 32)
        now += TRIAL + 0.5
        assert ceiling.trial is None
    for _ in range(DROP + 1):
        now += 0.3
        if ceiling.limit is not None:
            ceiling.refuse(now, now - 0.1, round(0.8 * ceiling.limit), fresh=True)
    assert ceiling.limit is None
    found = refused_again(ceiling, recent, 60.0, [33] * (2 * LEAST))
    assert found == [False] * (2 * LEAST - 1) + [True]
