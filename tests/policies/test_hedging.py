"""When a second attempt is due, and how many there may be."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.policies.hedging import KEPT, LEARNED, Hedge, Hedging

LATENCIES = st.lists(st.floats(0.001, 1_000.0), min_size=LEARNED, max_size=KEPT + 100)


def learned(hedge: Hedge, latencies: list[float]) -> Hedging:
    hedging = Hedging(hedge)
    for seconds in latencies:
        hedging.answered(seconds)
    return hedging


@pytest.mark.parametrize(
    "settings",
    [
        {"quantile": 0.0},
        {"quantile": 1.0},
        {"quantile": "0.9"},
        {"share": 0.0},
        {"share": 1.1},
        {"least": -1.0},
        {"least": math.inf},
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_by_its_name(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        Hedge(**settings)


def test_nothing_is_hedged_before_fifty_answers() -> None:
    hedging = learned(Hedge(), [1.0] * (LEARNED - 1))
    assert hedging.start() is None
    hedging.answered(1.0)
    assert hedging.start() == 1.0


@given(LATENCIES, st.floats(0.01, 0.99), st.floats(0.0, 500.0))
def test_an_attempt_is_given_the_quantile_of_the_last_answers(
    latencies: list[float], quantile: float, least: float
) -> None:
    delay = learned(Hedge(quantile=quantile, least=least), latencies).start()
    recent = latencies[-KEPT:]
    assert delay is not None
    assert delay >= least
    if delay > least:
        assert delay in recent
        assert sum(seconds <= delay for seconds in recent) >= quantile * len(recent)
        assert sum(seconds < delay for seconds in recent) < quantile * len(recent)


@given(LATENCIES)
def test_what_was_before_the_last_512_is_forgotten(latencies: list[float]) -> None:
    hedging = learned(Hedge(), [*latencies, *([7.0] * KEPT)])
    assert hedging.start() == 7.0
    assert len(hedging._recent) == len(hedging._sorted) == KEPT


@given(st.lists(st.booleans(), max_size=400), st.floats(0.01, 1.0))
def test_hedges_are_never_more_than_their_share_and_never_fewer_when_asked_for(late: list[bool], share: float) -> None:
    hedging = Hedging(Hedge(share=share))
    for is_late in late:
        hedging.start()
        if is_late:
            allowed = hedging.hedges + 1 <= share * (hedging.attempts + 1)
            assert hedging.take() is allowed
        assert hedging.hedges <= share * hedging.attempts
    assert hedging.attempts == len(late) + hedging.hedges


def test_answers_that_a_hedge_has_overtaken_do_not_make_the_quantile_smaller() -> None:
    hedging = learned(Hedge(quantile=0.9), [1.0] * 90 + [20.0] * 10)
    for number in range(2_000):  # one of ten takes 20 s, and is overtaken one second after it is late
        delay = hedging.start()
        assert delay is not None
        hedging.answered(delay + 1.0 if number % 10 == 0 else 1.0)
    assert hedging.start() in {1.0, 2.0}
