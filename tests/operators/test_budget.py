"""budget: nothing more is pulled when it is used up, what is in progress is delivered, and the stream ends."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import Observable
from reactivex import operators as ops
from reactivex.subject import Subject

import rxllm
from rxllm import Backoff, Outcome, Reply, Request, Timeouts, Usage, any_of, call, chat
from rxllm.errors import (
    CancelledError,
    ConfigError,
    InvalidRequestError,
    QuotaExhaustedError,
    RateLimitedError,
    ServerError,
)
from rxllm.operators.budget import budget
from rxllm.operators.flat_map import flat_map
from rxllm.policies.prices import Price, Prices
from rxllm.policies.spending import START
from rxllm.testing import Recorder, Script, Taker, VirtualScheduler, record

PRICES = Prices({"small": Price(input=1.0, output=3.0), "big": Price(input=10.0, output=30.0)}, per=1)
USED = Usage(input_tokens=2, output_tokens=1)  # 5 USD of the small model


class Client:
    """Answers in a second, but for the lines that it is given; names its model, if it has one."""

    def __init__(self, *lines: tuple[float, Any], model: str | None = "small", usage: Usage = USED) -> None:
        self.model = model
        self.usage = usage
        self.lines = list(lines)
        self.sent: list[Request] = []

    def send(self, request: Request, *, timeouts: Timeouts = Timeouts()) -> Observable[Reply[Any]]:  # noqa: B008
        def begin(_scheduler: Any) -> Observable[Any]:
            self.sent.append(request)
            return Script(self.lines.pop(0) if self.lines else (1.0, Reply(value="fine", usage=self.usage)))

        return rx.defer(begin)

    def cost(self, request: Request) -> Mapping[str, float]:
        return {"requests": 1.0}

    def wrap(self, item: Any) -> Request:
        if not isinstance(item, str):
            raise InvalidRequestError(f"no prompt: {item!r}")
        return chat(item)


class Prompts:
    """Endless prompts, counted."""

    def __init__(self) -> None:
        self.pulled = 0

    def __iter__(self) -> Iterator[str]:
        while True:
            self.pulled += 1
            yield f"prompt {self.pulled}"


class Run:
    """One run over endless prompts, in virtual time."""

    def __init__(self, operator: Any, prompts: Any = None) -> None:
        self.scheduler = VirtualScheduler()
        self.prompts = Prompts() if prompts is None else prompts
        self.seen: Recorder = record(self.scheduler, rxllm.from_iterable(self.prompts).pipe(operator))
        assert self.scheduler.pending == 0

    @property
    def outcomes(self) -> list[Outcome[Any]]:
        return self.seen.values

    @property
    def kind(self) -> str:
        assert self.seen.end is not None
        return self.seen.end.kind


@pytest.fixture(autouse=True)
def warned(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "rxllm.operators.budget")
    return caplog


# each budget


def test_no_more_requests_are_pulled_than_the_budget_has():
    client = Client()
    limited = budget(call(client, window=7), requests=20)
    run = Run(limited)
    assert (len(run.outcomes), len(client.sent), run.prompts.pulled, run.kind) == (20, 20, 20, "completed")
    assert all(outcome.ok for outcome in run.outcomes)
    assert limited.statistics().used_up == "requests"


def test_tokens_are_those_that_the_replies_tell():
    limited = budget(call(Client(), window=64), tokens=300)
    run = Run(limited)
    assert run.prompts.pulled == len(run.outcomes) == 100
    assert (limited.statistics().tokens, limited.statistics().used_up) == (300, "tokens")


def test_dollars_are_what_the_tokens_cost():
    limited = budget(call(Client(), window=64), usd=100, prices=PRICES)
    run = Run(limited)
    assert len(run.outcomes) == 20
    assert (limited.statistics().usd, limited.statistics().used_up) == (100.0, "usd")


def test_after_its_seconds_nothing_more_is_pulled_and_what_is_in_progress_is_delivered():
    client = Client()
    limited = budget(call(client, window=3), seconds=4.5)
    run = Run(limited)
    assert [event.at for event in run.seen.events if event.kind == "next"] == [at for at in range(1, 6) for _ in "123"]
    assert run.seen.end is not None
    assert (run.seen.end.at, run.kind, limited.statistics().used_up) == (5.0, "completed", "seconds")
    assert limited.statistics().seconds == 5.0


def test_the_first_of_several_budgets_ends_the_stream():
    limited = budget(call(Client(), window=2), requests=100, tokens=12, seconds=1_000)
    assert len(Run(limited).outcomes) == 4
    assert limited.statistics().used_up == "tokens"


def test_a_stream_that_ends_before_says_that_nothing_is_used_up(warned: pytest.LogCaptureFixture):
    limited = budget(call(Client()), requests=100, seconds=50.0)
    run = Run(limited, ["a", "b"])
    spent = limited.statistics()
    assert (len(run.outcomes), run.kind, spent.used_up, spent.requests, spent.ended) == (2, "completed", None, 2, 2)
    assert (run.scheduler.seconds(), spent.seconds, spent.in_progress) == (1.0, 1.0, 0)  # no timer is left
    assert not warned.records


def test_a_budget_that_ends_a_stream_says_so_once(warned: pytest.LogCaptureFixture):
    Run(budget(call(Client()), requests=3))
    assert [record.message for record in warned.records] == [
        "the budget of 3 requests is used up: nothing more is pulled"
    ]


# what counts


def test_failed_and_refused_attempts_count_with_what_they_have_used():
    paid = ServerError("half an answer")
    paid.usage = Usage(input_tokens=10)
    client = Client((1.0, paid), (1.0, RateLimitedError("slow down")))
    limited = budget(call(client, window=1, retry=Backoff(base=0.01, cap=0.01)), tokens=13)
    run = Run(limited)
    assert [outcome.ok for outcome in run.outcomes] == [True]
    spent = limited.statistics()
    assert (spent.requests, spent.tokens) == (3, 13)


def test_repaired_answers_count():
    answers = iter([False, False, True])
    limited = budget(call(Client(), window=1, validate=lambda _reply: next(answers)), usd=15, prices=PRICES)
    run = Run(limited)
    assert [len(outcome.attempts) for outcome in run.outcomes] == [3]
    assert limited.statistics().usd == 15.0


def test_requests_that_fail_count():
    client = Client(*[(1.0, InvalidRequestError("no"))] * 5)
    run = Run(budget(call(client, window=2), requests=5))
    assert [outcome.ok for outcome in run.outcomes] == [False] * 5


def test_an_item_that_is_asked_nothing_costs_nothing():
    limited = budget(call(Client(), window=1), requests=2)
    run = Run(limited, ["a", 1, 2, "b", "c"])
    assert [outcome.ok for outcome in run.outcomes] == [True, False, False, True]
    assert limited.statistics().requests == 2


def test_what_a_first_answer_costs_is_not_known_so_few_are_asked_at_first():
    client = Client()
    limited = budget(call(client, window=100), tokens=1)
    assert len(Run(limited).outcomes) == len(client.sent) == START


@settings(deadline=None, max_examples=40)
@given(
    costs=st.lists(st.integers(1, 40), min_size=1, max_size=30),
    seconds=st.lists(st.floats(0.1, 9.0), min_size=1, max_size=30),
    window=st.integers(1, 30),
    tokens=st.integers(1, 500),
)
def test_each_pulled_request_has_its_outcome_and_the_overshoot_is_what_was_in_progress(
    costs: list[int], seconds: list[float], window: int, tokens: int
):
    lines = [(at, Reply(value=0, usage=Usage(output_tokens=cost))) for cost, at in zip(costs, seconds, strict=False)]
    client = Client(*lines, usage=Usage(output_tokens=max(costs)))
    limited = budget(call(client, window=window), tokens=tokens)
    run = Run(limited)
    assert run.prompts.pulled == len(client.sent) == len(run.outcomes)
    spent = limited.statistics().tokens
    assert tokens <= spent < tokens + window * max(costs)
    assert run.kind == "completed"


def test_an_answer_without_usage_is_warned_of_once(warned: pytest.LogCaptureFixture):
    Run(budget(call(Client(usage=Usage())), tokens=10), ["a", "b", "c"])
    assert [record.message for record in warned.records] == [
        "an answer does not say how many tokens it has used: it counts nothing in tokens"
    ]


# prices


def test_a_model_without_a_price_is_an_error_before_anything_is_sent():
    client = Client(model="huge")
    run = Run(budget(call(client), usd=5, prices=PRICES))
    assert (client.sent, run.prompts.pulled, run.kind) == ([], 1, "error")
    (failed,) = run.outcomes
    assert isinstance(failed.error, ConfigError)
    assert "'huge'" in str(failed.error)
    assert run.seen.end is not None
    assert run.seen.end.value is failed.error


def test_a_request_may_name_another_model_and_what_was_asked_before_is_delivered():
    requests = [chat("a"), chat("b", model="big"), chat("c", model="huge"), chat("d")]
    client = Client()
    limited = budget(call(client, window=2), usd=1_000, prices=PRICES)
    run = Run(limited, requests)
    assert [outcome.ok for outcome in run.outcomes] == [True, True, False]
    assert limited.statistics().usd == 55.0
    assert run.kind == "error"


def test_a_model_that_only_the_answer_names_is_looked_up_then():
    client = Client((1.0, Reply(value=1, model="big", usage=USED)), model=None)
    limited = budget(call(client, window=1), usd=50, prices=PRICES)
    assert len(Run(limited).outcomes) == 1
    assert limited.statistics().usd == 50.0


@pytest.mark.parametrize("model", [None, "huge"])
def test_an_answer_that_nobody_can_price_ends_the_stream_with_an_error(model: str | None):
    client = Client((1.0, Reply(value=1, model=model, usage=USED)), model=None)
    run = Run(budget(call(client, window=1), usd=50, prices=PRICES))
    assert [outcome.ok for outcome in run.outcomes] == [True]
    assert run.seen.end is not None
    assert isinstance(run.seen.end.value, ConfigError)


def test_each_route_has_the_price_of_its_model():
    small, big = Client((1.0, ServerError("down"))), Client(model="big")
    routes = any_of(small, rxllm.Route(big, weight=0, name="big"), fallback={ServerError: "big"})
    limited = budget(call(routes, window=1), usd=50, prices=PRICES)
    run = Run(limited)
    assert [outcome.route for outcome in run.outcomes] == ["big"]
    assert limited.statistics().usd == 50.0


def test_a_route_whose_model_has_no_price_is_an_error_before_anything_is_sent():
    small, huge = Client(), Client(model="huge")
    assert Run(budget(call(any_of(small, huge)), usd=50, prices=PRICES)).kind == "error"
    assert small.sent == huge.sent == []


# how it ends


def test_it_ends_with_an_error_that_halts_when_that_is_wanted():
    limited = budget(call(Client(), window=2), requests=3, on_exhausted="raise")
    run = Run(limited)
    assert [outcome.ok for outcome in run.outcomes] == [True] * 3
    assert run.seen.end is not None
    assert isinstance(run.seen.end.value, QuotaExhaustedError)
    assert run.seen.end.value.halts
    assert "the budget of 3 requests is used up" in str(run.seen.end.value)


def test_the_rest_of_an_iterator_is_there_for_others():
    rest = map(str, itertools.count(1))  # a generator would be closed
    assert len(Run(budget(call(Client(), window=5), requests=8), rest).outcomes) == 8
    assert next(rest) == "9"


def test_a_failed_source_ends_the_stream_after_what_is_in_progress():
    def prompts() -> Iterator[str]:
        yield "a"
        raise KeyError("the source")

    run = Run(budget(call(Client()), requests=9), prompts())
    assert [event.kind for event in run.seen.events] == ["next", "error"]


def test_an_operator_that_halts_ends_the_stream():
    gate = rxllm.Gate(rxllm.Quota(2, per=86_400.0, on_exhausted="fail"))
    run = Run(budget(call(Client(), gate=gate, window=4), requests=50))
    assert [outcome.ok for outcome in run.outcomes].count(True) == 2
    assert run.prompts.pulled == len(run.outcomes)
    assert run.seen.end is not None
    assert isinstance(run.seen.end.value, QuotaExhaustedError)


def test_disposing_cancels_what_is_in_progress():
    scheduler = VirtualScheduler()
    client = Client()
    limited = budget(call(client, window=3), requests=100, seconds=60.0)
    seen = record(scheduler, rxllm.from_iterable(Prompts()).pipe(limited), dispose_at=1.5)
    assert (len(seen.values), len(client.sent), seen.end, scheduler.pending) == (3, 6, None, 0)
    assert (limited.statistics().in_progress, limited.statistics().seconds) == (3, 1.5)


def test_take_ends_it():
    run = Run(lambda source: budget(call(Client(), window=3), requests=100)(source).pipe(ops.take(4)))
    assert (len(run.outcomes), run.kind) == (4, "completed")


def test_a_source_that_does_not_wait_is_held_back_and_what_is_left_fails():
    scheduler = VirtualScheduler()
    client = Client()
    subject: Subject[str] = Subject()
    seen = record(scheduler, subject.pipe(budget(call(client, window=9), requests=2)))
    for item in "abcd":
        subject.on_next(item)
    scheduler.run()
    assert (len(client.sent), subject.observers) == (2, [])
    assert [outcome.ok for outcome in seen.values] == [True, True, False, False]
    assert isinstance(seen.values[-1].error, CancelledError)
    assert "not asked: the budget of 2 requests is used up" in str(seen.values[-1].error)
    assert seen.end is not None
    assert seen.end.kind == "completed"


def pushed(operator: Any, items: str, *, ends: bool = True) -> tuple[Recorder, Subject[str]]:
    """Push items at once, and perhaps complete, before anything is answered."""
    scheduler = VirtualScheduler()
    subject: Subject[str] = Subject()
    seen = record(scheduler, subject.pipe(operator))
    for item in items:
        subject.on_next(item)
    if ends:
        subject.on_completed()
    scheduler.run()
    assert scheduler.pending == 0
    return seen, subject


def test_a_source_that_has_ended_is_asked_to_its_end():
    seen, _ = pushed(budget(call(Client(), window=9), tokens=1_000), "abcdefgh")
    assert [outcome.ok for outcome in seen.values] == [True] * 8
    assert seen.events[-1].kind == "completed"


def test_what_is_left_of_a_source_that_has_ended_fails():
    limited = budget(call(Client(), window=9), requests=2)
    seen, _ = pushed(limited, "abcd")
    assert [outcome.ok for outcome in seen.values] == [True, True, False, False]
    assert (seen.events[-1].kind, limited.statistics().used_up) == ("completed", "requests")


def test_a_source_that_does_not_wait_at_all_is_an_error():
    seen, subject = pushed(budget(call(Client()), requests=2), "a" * 2_000, ends=False)
    assert subject.observers == []
    assert seen.end is not None
    assert isinstance(seen.end.value, ConfigError)
    assert "from_iterable" in str(seen.end.value)


def test_what_an_operator_that_halts_has_no_room_for_fails():
    halting = call(Client((1.0, QuotaExhaustedError("used up"))), window=1)
    seen, _ = pushed(budget(halting, requests=100), "abcdefgh", ends=False)
    assert len(seen.values) == 8
    assert not any(outcome.ok for outcome in seen.values)
    assert seen.end is not None
    assert isinstance(seen.end.value, QuotaExhaustedError)


def test_an_operator_that_subscribes_late_or_twice_or_is_none_is_met():
    late = budget(lambda source: rx.timer(5.0).pipe(ops.flat_map(lambda _: call(Client())(source))), seconds=2.0)  # type: ignore[arg-type]
    run = Run(late)
    assert (run.outcomes, run.kind, run.prompts.pulled) == ([], "completed", 0)
    twice = budget(lambda source: rx.merge(call(Client())(source), call(Client())(source)), requests=5)  # type: ignore[arg-type]
    run = Run(twice)
    assert isinstance(run.seen.events[-1].value, ConfigError)
    assert "subscribes its source twice" in str(run.seen.events[-1].value)
    run = Run(budget(lambda _source: 5, requests=5))  # type: ignore[arg-type,return-value]
    assert "operator must return an Observable, got int" in str(run.seen.events[-1].value)


def test_a_client_that_cannot_be_chosen_fails_its_item_only():
    client = Client()

    def choose(request: Request) -> Any:
        if request.body["messages"][0]["content"] == "b":
            raise KeyError("no client")
        return client

    run = Run(budget(call(choose, window=1), usd=1_000, prices=PRICES), ["a", "b", "c"])
    assert [outcome.ok for outcome in run.outcomes] == [True, False, True]


def test_it_asks_for_no_more_than_the_consumer_has_room_for():
    scheduler = VirtualScheduler()
    prompts = Prompts()
    limited = budget(call(Client(), window=5), requests=1_000)
    taker = Taker(scheduler, 2).connect(rxllm.from_iterable(prompts).pipe(limited))
    scheduler.run()
    assert prompts.pulled <= 5 + 2 + 2  # in progress, finished, and there
    taker.take(2)
    scheduler.run()
    assert len(taker.held) == 2


def test_a_stage_above_goes_on_when_the_operator_has_room_again():
    words = lambda word: Script((0.5, word))  # noqa: E731
    run = Run(lambda source: source.pipe(flat_map(words, window=2), budget(call(Client(), window=2), requests=30)))
    assert len(run.outcomes) == 30


def test_a_stage_above_keeps_as_much_ready_as_without_it():
    words = flat_map(lambda word: Script((3.0 if int(word) % 4 == 3 else 0.1, word)), window=3)
    ends: list[float] = []
    for stage in (call(Client(), window=3), budget(call(Client(), window=3), requests=1_000)):
        seen = Run(lambda source, stage=stage: source.pipe(words, stage), [str(n) for n in range(30)]).seen
        assert seen.end is not None
        ends.append(seen.end.at)
    assert ends[0] == ends[1]


def test_each_subscription_has_its_own_budget():
    limited = budget(call(Client()), requests=3)
    assert len(Run(limited).outcomes) == len(Run(limited).outcomes) == 3


def test_an_operator_of_ones_own_can_be_limited():
    limited = budget(lambda source: call(Client(), window=1)(source.pipe(ops.map(chat))), requests=4)  # type: ignore[arg-type]
    assert len(Run(limited).outcomes) == 4


def test_budgets_nest_and_know_whom_they_ask():
    client = Client()
    limited = budget(budget(call(client, window=1), tokens=9), requests=2)
    request = limited.request("hi")
    assert request.body["messages"][0]["content"] == "hi"
    assert limited.client(request) is client
    assert limited.statistics().ended == 0
    assert len(Run(limited).outcomes) == 2


def test_a_real_loop_has_the_time_of_its_own():
    limited = budget(call(rxllm.function(str.upper), window=2), seconds=0.05)
    outcomes = rxllm.collect(rxllm.from_iterable(Prompts()).pipe(limited))
    assert outcomes
    assert limited.statistics().used_up == "seconds"
    assert limited.statistics().seconds > 0.04  # a loop may ring a millisecond early


# arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs one of requests, tokens, usd and seconds"),
        ({"requests": 0}, "requests must be a whole number >= 1"),
        ({"requests": 1.5}, "requests must be a whole number"),
        ({"tokens": -5}, "tokens must be a whole number >= 1"),
        ({"usd": 0, "prices": PRICES}, "usd must be a finite number > 0"),
        ({"usd": 5}, "prices: usd=5 needs the prices"),
        ({"usd": 5, "prices": {"a": 1}}, "prices must be a Prices"),
        ({"seconds": float("inf")}, "seconds must be a finite number > 0"),
        ({"requests": 1, "on_exhausted": "stop"}, "on_exhausted must be 'complete' or 'raise'"),
    ],
    ids=lambda value: ", ".join(value) or "none" if isinstance(value, dict) else None,
)
def test_what_is_no_budget_is_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        budget(call(Client()), **arguments)


def test_what_is_no_operator_is_refused():
    with pytest.raises(ConfigError, match="operator must be callable"):
        budget(Client(), requests=1)  # type: ignore[arg-type]
