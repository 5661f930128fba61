"""The width against a server whose speed depends on how many it serves, answer by answer."""

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
