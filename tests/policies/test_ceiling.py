"""The ceiling, refusal by refusal; the whole controller is in test_follow.py."""

from rxllm.policies.ceiling import QUIET, TRIAL, Ceiling
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
    for widths, found in (((33, 33, 33), True), ((33, 20, 33), False), ((33, 60, 33), False), ((33, 25, 25), False)):
        recent = Recent()
        ceiling = Ceiling(recent)
        for number, width in enumerate(widths):
            ceiling.cut(10.0 * number)
            busy(ceiling, recent, 10.0 * number, 10.0 * number + 9, 32)
            about = ceiling.refuse(10.0 * number + 9.5, 10.0 * number + 9.4, width, fresh=False)
        assert about is found


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
    assert lowered == 6
