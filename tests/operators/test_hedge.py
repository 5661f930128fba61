"""hedge: a second attempt for a late one, around any stream and inside call."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import reactivex as rx
from reactivex import Observable

import rxllm
from rxllm import Backoff, Gate, Outcome, Quota, Reply, Request, Timeouts, Usage, Validate, call, chat
from rxllm.errors import (
    CancelledError,
    ConfigError,
    InvalidRequestError,
    RateLimitedError,
    ServerError,
    ValidationError,
)
from rxllm.operators import admit
from rxllm.operators.hedge import Hedged, hedge
from rxllm.policies.breaker import Breaker
from rxllm.policies.hedging import LEARNED, Hedge, Hedging
from rxllm.testing import Recorder, Script, VirtualScheduler, cold, marbles, record

Line = tuple[float, Any]
EAGER = Hedge(share=1.0)


def trained(hedge: Hedge = EAGER, seconds: float = 2.0) -> Hedging:
    """Return what has learned that answers take 2 s."""
    hedging = Hedging(hedge)
    for _ in range(LEARNED):
        hedging.answered(seconds)
    return hedging


def around(source: Observable[Any], hedging: Hedging | None = None) -> Hedged[Any]:
    return Hedged(source, hedging or trained())


def in_turn(scheduler: VirtualScheduler, *diagrams: str) -> tuple[Observable[Any], list[Any]]:
    """Return a cold source that is the next of these with each subscription, and all of them."""
    error = ServerError("down")
    made = [cold(scheduler, diagram, error=error) for diagram in diagrams]
    following = iter(made)
    return rx.defer(lambda _scheduler: next(following)), made


def released(made: list[Any]) -> list[tuple[float, float | None]]:
    return [tuple(entry) for source in made for entry in source.subscriptions]


# around any stream


@pytest.mark.parametrize(
    ("diagrams", "expected", "subscriptions"),
    [
        pytest.param(["-a|"], "-a|", [(0, 2)], id="in-time"),
        pytest.param(["----a|", "---b|"], "----a|", [(0, 5), (2, 4)], id="the-first-wins"),
        pytest.param(["------a|", "--b|"], "----b|", [(0, 4), (2, 5)], id="the-second-wins"),
        pytest.param(["----a-b|", "--c-d|"], "----a-b|", [(0, 7), (2, 4)], id="both-at-once"),
        pytest.param(["-#"], "-#", [(0, 1)], id="an-early-error-is-not-hedged"),
        pytest.param(["---#", "---b|"], "-----b|", [(0, 3), (2, 6)], id="the-first-fails-the-second-answers"),
        pytest.param(["-----a|", "-#"], "-----a|", [(0, 6), (2, 3)], id="the-second-fails-the-first-answers"),
        pytest.param(["---#", "--#"], "----#", [(0, 3), (2, 4)], id="both-fail"),
        pytest.param(["-----#", "-#"], "-----#", [(0, 5), (2, 3)], id="both-fail-the-second-before"),
        pytest.param(["---a-#", "---b|"], "---a-#", [(0, 5), (2, 3)], id="it-fails-after-its-first-item"),
        pytest.param(["---|", "---b|"], "---|", [(0, 3), (2, 3)], id="empty"),
        pytest.param(["(a|)"], "(a|)", [(0, 0)], id="at-once"),
    ],
)
def test_hedge_emits_as_its_diagram_says(
    diagrams: list[str], expected: str, subscriptions: list[tuple[float, float]]
) -> None:
    scheduler = VirtualScheduler()
    source, made = in_turn(scheduler, *diagrams)
    seen = record(scheduler, around(source))
    assert marbles(seen.events) == expected
    assert released(made) == subscriptions
    assert scheduler.pending == 0


@pytest.mark.parametrize("at", [0.0, 1.0, 2.0, 2.5, 3.0], ids=lambda at: f"after-{at}-s")
def test_a_dispose_releases_both_at_that_instant(at: float) -> None:
    scheduler = VirtualScheduler()
    source, made = in_turn(scheduler, "---------a|", "---------b|")
    seen = record(scheduler, around(source), dispose_at=at)
    assert seen.events == []
    assert {until for _, until in released(made)} == {at}
    assert len(released(made)) == (2 if at >= 2.0 else 1)
    assert scheduler.pending == 0


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        pytest.param(ServerError("first"), ServerError("second"), "first", id="that-of-the-first"),
        pytest.param(ServerError("first"), InvalidRequestError("second"), "second", id="the-one-that-no-try-cures"),
        pytest.param(InvalidRequestError("first"), ServerError("second"), "first", id="no-try-cures-the-first"),
        pytest.param(InvalidRequestError("first"), InvalidRequestError("second"), "first", id="no-try-cures-either"),
    ],
)
@pytest.mark.parametrize("seconds", [(3.0, 3.0), (9.0, 1.0)], ids=["first-first", "second-first"])
def test_when_both_fail_the_more_telling_error_counts(
    first: Exception, second: Exception, expected: str, seconds: tuple[float, float]
) -> None:
    scheduler = VirtualScheduler()
    seen = record(scheduler, around(Script((seconds[0], first), (seconds[1], second))))
    assert seen.end is not None
    assert str(seen.end.value) == expected


def test_it_learns_from_all_that_one_operator_value_is_applied_to() -> None:
    scheduler = VirtualScheduler()
    late = hedge(EAGER)
    for _ in range(LEARNED):
        record(scheduler, Script((2.0, "a")).pipe(late))
    slow = Script((9.0, "a"), (1.0, "b"))
    seen = record(scheduler, slow.pipe(late))
    assert seen.values == ["b"]
    assert seen.events[0].at == scheduler.seconds() == LEARNED * 2.0 + 3.0


def test_something_that_is_no_hedge_is_refused() -> None:
    with pytest.raises(ConfigError, match="hedge"):
        hedge(0.95)  # type: ignore[arg-type]


def test_no_more_than_the_share_is_hedged() -> None:
    scheduler = VirtualScheduler()
    hedging = trained(Hedge(share=0.1))
    scripts = [Script((9.0, "a"), (9.0, "b")) for _ in range(100)]
    for script in scripts:
        record(scheduler, around(script, hedging))
    assert sum(script.started for script in scripts) == 100 + hedging.hedges
    assert 9 <= hedging.hedges <= 11


# around admit


def test_the_time_begins_when_the_gate_lets_the_attempt_start() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=2)
    for _ in range(2):
        record(scheduler, Script((5.0, "busy")).pipe(admit(gate)), until=0.0)
    script = Script((9.0, "a"), (1.0, "b"))
    seen = record(scheduler, around(script.pipe(admit(gate))))
    assert [event.at for event in seen.events] == [8.0, 8.0]  # 5 s at the gate, 2 s until it is late, 1 s for b
    assert seen.values == ["b"]
    assert gate.statistics().in_flight == 0


FULL = {
    "no-place": lambda: Gate(concurrency=1),
    "no-quota": lambda: Gate(Quota(1, per=100.0, margin=0.0)),
    "no-pace": lambda: Gate(rate=0.01),
}


@pytest.mark.parametrize("gate", FULL.values(), ids=FULL)
def test_nothing_is_hedged_that_would_have_to_wait(gate: Any) -> None:
    scheduler = VirtualScheduler()
    script = Script((9.0, "a"), (1.0, "b"))
    hedging = trained()
    seen = record(scheduler, around(script.pipe(admit(gate())), hedging))
    assert (seen.values, script.started, hedging.hedges) == (["a"], 1, 0)


def test_nothing_is_hedged_while_somebody_waits_or_the_gate_is_closed_or_its_breaker_is_open() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(Quota(10, per=100.0, unit="tokens", margin=0.0))
    script = Script((9.0, "a"), (1.0, "b"))
    record(scheduler, around(script.pipe(admit(gate, cost={"tokens": 4}))), until=1.0)
    waiting = record(scheduler, Script((0, "c")).pipe(admit(gate, cost={"tokens": 7})), until=2.5)
    assert (script.started, waiting.events) == (1, [])

    gate = Gate()
    script = Script((9.0, "a"), (1.0, "b"))
    record(scheduler, around(script.pipe(admit(gate))), until=scheduler.seconds() + 1.0)
    gate.close()
    scheduler.run(until=scheduler.seconds() + 2.0)
    assert script.started == 1

    gate = Gate(breaker=Breaker(seconds=0.1, failures=1))
    script = Script((9.0, "a"), (1.0, "b"))
    record(scheduler, around(script.pipe(admit(gate))), until=scheduler.seconds() + 1.0)
    for _ in range(4):
        record(scheduler, Script((0.1, ServerError("down"))).pipe(admit(gate)), until=scheduler.seconds() + 0.2)
    assert gate.is_shut
    scheduler.run(until=scheduler.seconds() + 1.0)
    assert script.started == 1


def test_each_of_both_has_a_lease_and_that_of_the_loser_is_kept() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(Quota(100, per=1_000.0, unit="tokens", margin=0.0))
    answer = Reply(value="b", usage=Usage(input_tokens=3))
    script = Script((9.0, Reply(value="a")), (1.0, answer))
    seen = record(scheduler, around(script.pipe(admit(gate, cost={"tokens": 10}))))
    assert seen.values == [answer]
    (quota,) = gate.statistics().quotas
    assert quota.available == 100 - 10 - 3
    assert gate.statistics().in_flight == 0
    assert gate.statistics().admitted == 2


# inside call


class Client:
    """Answers in 1 s, but for prompts with lines of (seconds, reply or error)."""

    def __init__(self, **lines: list[Line]) -> None:
        self.scripts = {text: Script(*script) for text, script in lines.items()}
        self.sent: list[str] = []

    def send(self, request: Request, *, timeouts: Timeouts = Timeouts()) -> Observable[Reply[str]]:  # noqa: B008
        text = prompt(request)

        def begin(_scheduler: Any) -> Observable[Any]:
            self.sent.append(text)
            return self.scripts.get(text) or Script((1.0, reply(text.upper())))

        return rx.defer(begin)

    def cost(self, request: Request) -> Mapping[str, float]:
        return {"requests": 1.0}

    def wrap(self, item: Any) -> Request:
        return chat(item)


class Paying(Client):
    """One whose requests must not be made twice."""

    def repeatable(self, request: Request) -> bool:
        return prompt(request) != "late"


def prompt(request: Request) -> str:
    text: str = request.body["messages"][-1]["content"]
    return text


def reply(text: str) -> Reply[str]:
    return Reply(value=text, text=text, status=200, usage=Usage(input_tokens=1, output_tokens=2))


def run(client: Any, items: list[Any], **settings: Any) -> Recorder:
    scheduler = VirtualScheduler()
    seen = record(scheduler, rxllm.from_iterable(items).pipe(call(client, **settings)))
    assert scheduler.pending == 0
    return seen


def late(client: Client, **settings: Any) -> Outcome[Any]:
    """Return the outcome of a late request after fifty that have taken 1 s."""
    settings = {"hedge": EAGER, "window": 1, **settings}
    *_, outcome = run(client, ["early"] * LEARNED + ["late"], **settings).values
    return outcome


def told(outcome: Outcome[Any]) -> list[tuple[int, float, float, bool, type | None]]:
    return [
        (
            attempt.number,
            attempt.started - outcome.started,
            attempt.seconds,
            attempt.hedged,
            None if attempt.error is None else type(attempt.error),
        )
        for attempt in outcome.attempts
    ]


def test_both_attempts_are_in_the_outcome_and_the_one_that_answered_is_the_last():
    outcome = late(Client(late=[(9.0, reply("A")), (0.5, reply("B"))]))
    assert outcome.text == "B"
    assert outcome.seconds == 1.5
    assert told(outcome) == [(1, 0.0, 1.5, False, CancelledError), (2, 1.0, 0.5, True, None)]
    assert outcome.usage.total_tokens == 3


def test_a_hedge_that_was_too_late_is_told_before_the_answer():
    outcome = late(Client(late=[(2.0, reply("A")), (9.0, reply("B"))]))
    assert outcome.text == "A"
    assert told(outcome) == [(2, 1.0, 1.0, True, CancelledError), (1, 0.0, 2.0, False, None)]


def test_without_hedge_and_before_fifty_answers_there_is_one_attempt():
    lines = {"late": [(9.0, reply("A")), (0.5, reply("B"))]}
    assert late(Client(**lines), hedge=None).text == "A"
    client = Client(**lines)
    *_, outcome = run(client, ["early"] * (LEARNED - 1) + ["late"], hedge=EAGER, window=1).values
    assert outcome.text == "A"


@pytest.mark.parametrize(
    ("text", "attempts"), [pytest.param("late", 1, id="unsafe"), pytest.param("slow", 2, id="safe")]
)
def test_only_what_is_safe_to_ask_twice_is_hedged(text: str, attempts: int) -> None:
    client = Paying(**{text: [(9.0, reply("A")), (0.5, reply("B"))]})
    *_, outcome = run(client, ["early"] * LEARNED + [text], hedge=EAGER, window=1).values
    assert len(outcome.attempts) == attempts


def test_a_try_of_which_both_attempts_failed_is_retried_and_the_next_may_be_hedged_too():
    down = ServerError("down")
    lines = [(3.0, down), (3.0, down), (9.0, reply("A")), (0.5, reply("B"))]
    outcome = late(Client(late=lines), retry=Backoff(base=0.001, cap=0.001))
    assert outcome.text == "B"
    assert [(number, hedged, error) for number, _, _, hedged, error in told(outcome)] == [
        (1, False, ServerError),
        (2, True, ServerError),
        (3, False, CancelledError),
        (4, True, None),
    ]


def test_the_back_off_before_a_hedged_try_counts_once():
    gate = Gate(concurrency=5)
    lines = [(0.5, ServerError("down")), (9.0, reply("A")), (0.5, reply("B"))]
    outcome = late(Client(late=lines), gate=gate, retry=Backoff(base=2.0, cap=2.0), seed=1)
    first, second, third = outcome.attempts
    assert third.hedged
    assert gate.explain().seconds["back-off"] == pytest.approx(second.started - first.started - 0.5)


def test_an_invalid_answer_is_noted_on_the_attempt_that_gave_it_whichever_that_was():
    lines = [(9.0, reply("A")), (0.5, reply("bad")), (0.5, reply("good"))]
    outcome = late(Client(late=lines), validate=lambda answer: answer.text != "bad")
    assert outcome.text == "good"
    assert [error for *_, error in told(outcome)] == [CancelledError, ValidationError, None]
    lines = [(1.5, reply("bad")), (9.0, reply("B")), (0.5, reply("good"))]
    outcome = late(Client(late=lines), validate=Validate(check=lambda answer: answer.text != "bad"))
    assert [(number, error) for number, *_, error in told(outcome)] == [
        (2, CancelledError),
        (1, ValidationError),
        (3, None),
    ]


def test_a_refused_hedge_pauses_the_gate_and_fails_nothing():
    gate = Gate(concurrency=5)
    outcome = late(Client(late=[(4.0, reply("A")), (0.5, RateLimitedError("no", 429, 1.0))]), gate=gate)
    assert outcome.text == "A"
    assert gate.statistics().refused == 1


def test_a_deadline_cancels_both_and_all_places_are_free():
    gate = Gate(concurrency=5)
    outcome = late(Client(late=[(99.0, reply("A")), (99.0, reply("B"))]), gate=gate, deadline=10.0)
    assert not outcome.ok
    assert [(number, hedged) for number, _, _, hedged, _ in told(outcome)] == [(1, False), (2, True)]
    assert gate.statistics().in_flight == 0


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"hedge": 0.95}, "hedge"),
        ({"hedge": EAGER, "on_chunk": print}, "on_chunk"),
        ({"hedge": EAGER, "validate": Validate(early=lambda _text: True)}, "early"),
    ],
    ids=["no-hedge", "pieces-shown", "pieces-judged"],
)
def test_a_wrong_argument_is_refused_at_once(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        call(Client(), **settings)
