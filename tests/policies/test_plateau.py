"""The width against a server whose speed depends on how many it serves, answer by answer."""

from itertools import pairwise

import pytest

from rxllm.policies.plateau import Plateau


def serve(
    plateau: Plateau, now: float, seconds: float, *, knee: float, tokens: bool = True, binding: bool = True
) -> float:
    """Let as many requests run as the limit allows, for a time; each has a second of work in it."""
    until = now + seconds
    while now < until:
        width = int(plateau.limit)
        took = max(1.0, width / knee)
        now += took / width
        plateau.start(now, width, binding=binding)
        plateau.end(now, took, 50.0 if tokens else 0.0)
    return now


def narrowed(plateau: Plateau, now: float, *, knee: float) -> float:
    """Serve until a test of a smaller width begins; return when."""
    before = plateau.limit
    while plateau.limit >= before:
        before = plateau.limit
        now = serve(plateau, now, 0.05, knee=knee)
        assert now < 1000
    return now


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens-are-known", "tokens-are-not-known"])
@pytest.mark.parametrize("knee", [3, 30, 200])
def test_it_stops_a_bit_beyond_the_knee(knee: int, tokens: bool) -> None:
    plateau = Plateau(20, 4096)
    now = serve(plateau, 0.0, 400.0, knee=knee, tokens=tokens)
    assert 0.75 * knee <= plateau.limit <= 1.5 * knee + 1
    serve(plateau, now, 400.0, knee=knee, tokens=tokens)
    assert 0.75 * knee <= plateau.limit <= 1.5 * knee + 1


def test_it_follows_a_knee_down_and_up() -> None:
    plateau = Plateau(20, 4096)
    now = serve(plateau, 0.0, 200.0, knee=60)
    now = serve(plateau, now, 200.0, knee=15)
    assert 11 <= plateau.limit <= 22
    serve(plateau, now, 200.0, knee=60)
    assert 45 <= plateau.limit <= 85


def test_it_learns_nothing_of_the_width_while_something_else_binds() -> None:
    plateau = Plateau(20, 4096)
    serve(plateau, 0.0, 100.0, knee=60, binding=False)
    assert plateau.limit == 20


def test_it_never_exceeds_its_bounds() -> None:
    plateau = Plateau(20, 100)
    now = serve(plateau, 0.0, 100.0, knee=1e6)
    assert 80 <= plateau.limit <= 100
    plateau.cover(30, now)
    assert plateau.limit == 30
    now = serve(plateau, now, 100.0, knee=1e6)
    assert 24 <= plateau.limit <= 30
    plateau.cover(None, now)
    serve(plateau, now, 100.0, knee=1e6)
    assert plateau.limit > 75


def test_with_a_pace_it_has_room_for_what_that_keeps_on_the_wire() -> None:
    plateau = Plateau(20, 4096)
    plateau.end(1.0, 2.0, 50.0)
    plateau.follow(30.0)
    assert plateau.limit >= 1.5 * 30 * 2
    before = plateau.limit
    plateau.follow(1.0)
    assert plateau.limit == before


def test_it_begins_a_test_with_a_smaller_width_and_comes_back_if_that_was_needed() -> None:
    plateau = Plateau(20, 64)
    seen: set[float] = set()
    now = 0.0
    for _ in range(300):
        now = serve(plateau, now, 1.0, knee=1e6)
        seen.add(plateau.limit)
    assert max(seen) == 64
    assert 0.8 * 64 in seen
    assert min(seen) == 20
    assert sorted(seen)[1] >= 40, "each test went down by one fifth only"


def gaps(plateau: Plateau, start: float, end: float, *, knee: float) -> list[float]:
    """Serve; return the seconds between two beginnings of tests."""
    tests: list[float] = []
    now, before = start, plateau.limit
    while now < end:
        now = serve(plateau, now, 0.25, knee=knee)
        if plateau.limit < before:
            tests.append(now)
        before = plateau.limit
    return [later - earlier for earlier, later in pairwise(tests)]


def test_a_ceiling_that_is_needed_is_tested_ever_more_seldom() -> None:
    plateau = Plateau(20, 4096)
    now = serve(plateau, 0.0, 10.0, knee=1e6)
    plateau.cover(64, now)
    found = gaps(plateau, now, 500.0, knee=1e6)
    assert 3 <= len(found) <= 8
    assert max(found) > 100


@pytest.mark.parametrize("limit", [2, 3, 9, 64])
def test_a_climb_of_a_ceiling_takes_the_width_along_whether_it_is_of_few_or_of_many(limit: int) -> None:
    plateau = Plateau(20, 4096)
    now = serve(plateau, 0.0, 10.0, knee=1e6)
    plateau.cover(limit, now)
    plateau.cover(limit + 1, now)
    assert plateau.limit == limit + 1


def test_a_ceiling_that_is_not_needed_is_tested_as_often_as_any_width() -> None:
    plateau = Plateau(20, 4096)
    plateau.cover(64, 0.0)
    found = gaps(plateau, 0.0, 500.0, knee=57)
    assert plateau.limit >= plateau.roof
    assert max(found) < 60


def test_a_width_below_a_ceiling_that_was_needed_once_is_tested_as_often_as_any() -> None:
    plateau = Plateau(20, 4096)
    now = serve(plateau, 0.0, 10.0, knee=1e6)
    plateau.cover(64, now)
    now = serve(plateau, now, 100.0, knee=1e6)
    now = serve(plateau, now, 300.0, knee=30)
    found = gaps(plateau, now, now + 500.0, knee=30)
    assert plateau.limit < 0.8 * plateau.roof
    assert max(found) < 60


def test_a_width_that_is_seldom_used_is_not_learned_from() -> None:
    plateau = Plateau(20, 4096)
    now = 0.0
    for number in range(2000):
        now += 0.05
        plateau.start(now, 20, binding=number % 4 == 0)
        plateau.end(now, 1.0, 50.0)
    assert plateau.limit == 20


def test_a_test_that_finds_far_less_than_it_explains_goes_on_down_as_the_server_has_changed() -> None:
    plateau = Plateau(20, 64)
    now = serve(plateau, 0.0, 10.0, knee=1e6)
    now = narrowed(plateau, now, knee=1e6)
    narrower = plateau.limit
    while plateau.limit == narrower:
        now = serve(plateau, now, 0.05, knee=10)
    assert plateau.limit < narrower


@pytest.mark.parametrize(("knee", "soon"), [(20, True), (26, False)], ids=["not-at-all", "by-a-quarter"])
def test_a_goodput_that_did_not_grow_at_all_is_tested_soon(knee: int, soon: bool) -> None:
    plateau = Plateau(20, 4096)
    now = 0.0
    while plateau.reason != "goodput stopped growing":
        now = serve(plateau, now, 0.05, knee=knee)
    assert (narrowed(plateau, now, knee=knee) - now < 7 * plateau.seconds) is soon


def test_once_the_goodput_has_stopped_growing_no_pace_makes_it_wider() -> None:
    grown, tried = Plateau(20, 4096), Plateau(20, 4096)
    now = 0.0
    while grown.reason != "goodput stopped growing":
        now = serve(grown, now, 0.05, knee=30)
    tried.cover(64, 0.0)
    now = 0.0
    while tried.reason != "tested":
        now = serve(tried, now, 0.05, knee=58)
    tried.cover(128, now)
    for plateau in (grown, tried):
        before = plateau.limit
        plateau.follow(1000.0)
        assert plateau.limit == before


def test_while_it_grows_who_starts_at_three_quarters_of_the_width_is_measured() -> None:
    plateau = Plateau(20, 4096)
    for number in range(1, 21):  # all start within a second, and are answered after ten
        plateau.start(number / 20, number, binding=True)
    for number in range(1, 19):
        plateau.end(10.0 + number / 20, 10.0, 500.0)
        assert plateau.limit == 20
    plateau.end(10.95, 10.0, 500.0)  # the fifth of those that began with 15 in flight or more
    assert plateau.limit == 40
