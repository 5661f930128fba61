"""budget: nothing more is sent when it is used up, what is on the wire is delivered, and the stream ends."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
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

    def restore(self, _request: Request, _status: int, body: bytes) -> Reply[Any]:
        return Reply(value=msgspec.json.decode(body), usage=self.usage)

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
        self.prompts = Prompts() if prompts is None else list(prompts) if isinstance(prompts, str) else prompts
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
        "the budget of 3 requests is used up: nothing more is asked"
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


# what is not sent any more


def unasked(run: Run) -> list[Outcome[Any]]:
    """Return the outcomes that say that they were not asked, or not asked again."""
    return [outcome for outcome in run.outcomes if isinstance(outcome.error, CancelledError)]


DOWN = ServerError("down")
LATER = RateLimitedError("slow down", retry_after=500.0)
WAITING = {
    "for a quota": (lambda: rxllm.Gate("2/100 seconds"), []),
    "for a place on the wire": (lambda: rxllm.Gate(concurrency=2), []),
    "for a quota that suspends": (lambda: rxllm.Gate(rxllm.Quota(2, per=86_400.0)), []),
    "for its next try": (rxllm.Gate, [(1.0, "fine"), (1.0, "fine"), *[(0.1, DOWN)] * 18]),
    "for another try than that on the wire": (rxllm.Gate, [(1.0, "fine"), (1.0, "fine"), *[(1.0, DOWN)] * 18]),
    "as the server said": (rxllm.Gate, [(1.0, "fine"), (1.0, "fine"), *[(0.1, LATER)] * 18]),
}


@pytest.mark.parametrize(("gate_of", "lines"), WAITING.values(), ids=list(WAITING))
@pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "as-they-complete"])
def test_after_its_seconds_what_waits_is_given_up_and_what_is_on_the_wire_is_finished(
    gate_of: Callable[[], rxllm.Gate], lines: list[Any], ordered: bool, warned: pytest.LogCaptureFixture
):
    gate = gate_of()
    client = Client(*[(at, Reply(value=said) if isinstance(said, str) else said) for at, said in lines])
    slow = Backoff(attempts=9, base=400.0, cap=500.0)
    limited = budget(call(client, gate=gate, window=20, retry=slow, ordered=ordered, seed=1), seconds=0.5)
    run = Run(limited, [f"prompt {n}" for n in range(20)])
    assert [outcome.ok for outcome in run.outcomes].count(True) == 2
    assert len(unasked(run)) == 18
    assert {str(outcome.error) for outcome in unasked(run)} == {"not asked: the budget of 0.5 seconds is used up"}
    assert len(client.sent) == (20 if lines else 2)
    assert run.seen.end is not None
    assert (run.seen.end.kind, run.seen.end.at) == ("completed", 1.0)
    assert limited.statistics().used_up == "seconds"
    told = [record.message for record in warned.records if record.name == "rxllm.operators.budget"]
    assert told == ["the budget of 0.5 seconds is used up: nothing more is asked"]
    if ordered:
        assert [outcome.ok for outcome in run.outcomes[:2]] == [True, True]
    assert (gate.statistics().waiting, gate.statistics().in_flight) == (0, 0)


def test_what_another_pipeline_has_waiting_at_the_gate_goes_on():
    scheduler, gate = VirtualScheduler(), rxllm.Gate("2/10 seconds")
    limited = budget(call(Client(), gate=gate, window=9), seconds=0.5)
    ended, other = Recorder(scheduler), Recorder(scheduler)
    rxllm.from_iterable(["a"] * 6).pipe(limited).subscribe(ended, scheduler=scheduler)
    rxllm.from_iterable(["b"] * 3).pipe(call(Client(), gate=gate)).subscribe(other, scheduler=scheduler)
    scheduler.run()
    assert [outcome.ok for outcome in ended.values].count(True) == 2
    assert [outcome.ok for outcome in other.values] == [True] * 3
    assert other.end is not None
    assert 21.0 < other.end.at < 22.0  # the third starts in the third window: four of the first pipeline are gone


@pytest.mark.parametrize("attempts", [1, 4])
def test_tries_that_fail_are_no_more_than_the_budget_of_requests(attempts: int):
    client = Client(*[(0.1, DOWN)] * 99)
    limited = budget(call(client, retry=Backoff(attempts=attempts, base=0.01)), requests=10)
    run = Run(limited, [f"prompt {n}" for n in range(100)])
    assert len(client.sent) == limited.statistics().requests == 10
    assert sum(len(outcome.attempts) for outcome in run.outcomes) == 10
    assert limited.statistics().used_up == "requests"


def test_a_request_that_is_not_tried_again_says_how_its_tries_have_failed():
    limited = budget(call(Client((0.1, DOWN)), window=1), requests=1)
    (outcome,) = Run(limited, ["a"]).outcomes
    assert isinstance(outcome.error, CancelledError)
    assert [attempt.error for attempt in outcome.attempts] == [DOWN]
    assert limited.statistics().used_up == "requests"  # it was the last one of the source, and is still open


def test_an_answer_that_does_not_pass_is_not_repaired_after_the_end():
    client, gate = Client(), rxllm.Gate("2/100 seconds")
    limited = budget(call(client, gate=gate, window=2, validate=lambda _: False), seconds=0.5)
    run = Run(limited, "ab")
    assert run.seen.end is not None
    assert (len(client.sent), len(unasked(run)), run.seen.end.at) == (2, 2, 1.0)
    assert limited.statistics().used_up == "seconds"


def test_of_those_that_a_gate_lets_start_at_once_no_more_start_than_the_budget():
    client, gate = Client((0.1, DOWN), (0.1, DOWN)), rxllm.Gate("2/10 seconds")
    limited = budget(call(client, gate=gate, window=3, retry=Backoff(base=0.01)), requests=3)
    run = Run(limited, "abc")  # at 10 s two may start, and three wait
    assert (len(client.sent), len(run.outcomes), len(unasked(run))) == (3, 3, 2)
    assert gate.statistics().in_flight == 0


def test_what_has_left_the_queue_is_not_kept():
    gate = rxllm.Gate("1/30 seconds")
    limited = budget(call(Client(), gate=gate, window=9, deadline=5.0), seconds=50.0)
    scheduler = VirtualScheduler()
    record(scheduler, rxllm.from_iterable(["a"] * 9).pipe(ops.concat(rx.never()), limited), until=20.0)
    assert limited.statistics().ended == 9
    assert limited.last is not None
    assert not limited.last._waiting


def test_answers_that_do_not_pass_are_not_repaired_beyond_the_budget():
    client = Client()
    limited = budget(call(client, window=2, validate=rxllm.Validate(check=lambda _: False, attempts=3)), requests=5)
    run = Run(limited)
    assert len(client.sent) == 5
    assert sorted(len(outcome.attempts) for outcome in run.outcomes) == [2, 3]


@pytest.mark.parametrize("limits", [{"tokens": 200}, {"usd": 600, "prices": PRICES}], ids=list)
def test_what_an_attempt_has_used_counts_when_it_ends_not_with_the_outcome(limits: dict[str, Any]):
    half = ServerError("half an answer")
    half.usage = Usage(output_tokens=60)
    client = Client(*[(1.0, half)] * 50)
    limited = budget(call(client, window=2, retry=Backoff(attempts=9, base=0.001)), **limits)
    Run(limited)
    assert 200 <= limited.statistics().tokens < 200 + 2 * 60
    assert limited.statistics().tokens == 60 * len(client.sent)


def test_the_dollars_of_a_route_count_when_its_attempt_ends():
    half = ServerError("half an answer")
    half.usage = Usage(output_tokens=60)  # 180 USD
    small = Client(*[(1.0, half)] * 9)
    routes = any_of(small, rxllm.Route(Client(model="big"), weight=0))
    limited = budget(call(routes, window=1, retry=Backoff(attempts=9, base=0.001)), usd=300, prices=PRICES)
    Run(limited)
    assert (len(small.sent), limited.statistics().usd) == (2, 360.0)


def test_a_second_attempt_of_a_late_one_is_not_beyond_the_budget():
    client = Client(*[(0.1, Reply(value="fine"))] * 60, *[(9.0, Reply(value="late"))] * 9)
    hedged = call(client, window=1, hedge=rxllm.Hedge(quantile=0.9, share=0.5))
    limited = budget(hedged, requests=63)
    run = Run(limited)
    assert len(client.sent) == limited.statistics().requests == 63
    assert [len(outcome.attempts) for outcome in run.outcomes if outcome.value == "late"] == [2, 1]
    assert all(outcome.ok for outcome in run.outcomes)


def test_what_waits_at_the_gates_of_several_routes_is_given_up():
    gates = [rxllm.Gate("1/100 seconds"), rxllm.Gate("2/100 seconds")]
    clients = [Client(), Client()]
    routes = any_of(*(rxllm.Route(one, gate=gate) for one, gate in zip(clients, gates, strict=True)))
    run = Run(budget(call(routes, window=9), seconds=7.0), [f"prompt {n}" for n in range(9)])
    assert [len(client.sent) for client in clients] == [1, 2]
    assert len(unasked(run)) == 6
    assert run.seen.end is not None
    assert run.seen.end.at == 7.0
    assert [gate.statistics().waiting for gate in gates] == [0, 0]


def test_those_that_wait_for_one_attempt_are_given_up_together():
    gate = rxllm.Gate("1/100 seconds")
    same = [chat("a", temperature=0), *[chat("b", temperature=0)] * 3]
    run = Run(budget(call(Client(), gate=gate, single_flight=True), seconds=5.0), same)
    assert (len(run.outcomes), len(unasked(run)), run.kind) == (4, 3, "completed")


def test_where_a_failure_ends_the_stream_what_is_not_asked_is_none():
    client = Client((1.0, Reply(value="a")), (3.0, Reply(value="b")))
    gate = rxllm.Gate("2/100 seconds")
    limited = budget(call(client, gate=gate, window=9, on_failure="raise"), seconds=2.0)
    run = Run(limited, "abcdef")
    assert [outcome.value for outcome in run.outcomes] == ["a", "b"]
    assert (run.kind, limited.statistics().used_up) == ("completed", "seconds")


def test_a_stage_above_spends_nothing_of_it():
    first, second = Client(), Client()
    limited = budget(call(second, window=2), requests=4)
    words = call(first, window=2)
    run = Run(lambda source: source.pipe(words, ops.map(lambda _: "again"), limited), "abcd")
    assert (len(first.sent), len(second.sent), limited.statistics().requests) == (4, 4, 4)
    assert [outcome.ok for outcome in run.outcomes] == [True] * 4


@pytest.mark.parametrize(("inner", "outer"), [(3, 50), (50, 3)])
def test_the_smaller_of_two_nested_budgets_holds(inner: int, outer: int):
    client = Client(*[(0.1, DOWN)] * 9)
    inside = budget(call(client, window=2, retry=Backoff(attempts=9, base=0.01)), requests=inner)
    outside = budget(inside, requests=outer)
    Run(outside, "abcdef")
    assert len(client.sent) == 3
    assert (inside.statistics().requests, outside.statistics().requests) == (3, 3)
    assert (inside.statistics().used_up is None) is (inner == 50)
    assert (outside.statistics().used_up is None) is (outer == 50)


def test_the_seconds_of_a_budget_around_another_one_give_up_what_waits():
    client = Client()
    inside = budget(call(client, gate=rxllm.Gate("1/100 seconds"), window=3), requests=9)
    outside = budget(inside, seconds=3.0)
    run = Run(outside, "abc")
    assert run.seen.end is not None
    assert (len(client.sent), len(unasked(run)), run.seen.end.at) == (1, 2, 3.0)
    assert (inside.statistics().used_up, outside.statistics().used_up) == (None, "seconds")


def test_two_budgets_that_are_used_up_at_once_end_a_stream_of_good_ones_both_without_a_failure():
    gate = rxllm.Gate("1/100 seconds")
    inside = budget(call(Client(), gate=gate, window=3, on_failure="raise"), seconds=3.0)
    outside = budget(inside, seconds=3.0)
    run = Run(outside, "abc")
    assert ([outcome.ok for outcome in run.outcomes], run.kind) == ([True], "completed")


def test_a_line_that_was_bad_before_is_not_what_a_budget_left_unasked():
    bad = Outcome(request=chat("b"), error=InvalidRequestError("line 2"))
    limited = budget(call(Client(), window=9), requests=1)
    seen = record(VirtualScheduler(), rx.of("a", bad).pipe(limited))
    assert [outcome.error for outcome in seen.values] == [None, bad.error]
    assert limited.statistics().used_up is None


@settings(deadline=None, max_examples=40)
@given(
    fates=st.lists(st.sampled_from(["fine", "down", "refused", "bad"]), max_size=60),
    seconds=st.lists(st.floats(0.1, 9.0), min_size=60, max_size=60),
    requests=st.integers(1, 20),
    items=st.integers(0, 25),
    window=st.integers(1, 12),
    nested=st.sampled_from(["plain", "ordered", "merged", "behind a quota"]),
)
def test_whatever_fails_no_more_is_sent_than_the_budget_and_each_item_has_its_outcome(
    *, fates: list[str], seconds: list[float], requests: int, items: int, window: int, nested: str
):
    said = {
        "fine": Reply(value="good", usage=USED),
        "down": DOWN,
        "refused": RateLimitedError("slow down"),
        "bad": Reply(value="bad", usage=USED),
    }
    client = Client(*[(at, said[fate]) for fate, at in zip(fates, seconds, strict=False)])
    asking = call(
        client,
        gate=rxllm.Gate("5/3 seconds") if nested == "behind a quota" else None,
        retry=Backoff(attempts=4, base=0.5),
        validate=lambda reply: reply.value != "bad",
        window=window,
        ordered=nested == "ordered",
        single_flight=nested == "merged",
        seed=1,
    )
    limited = budget(asking, requests=requests)
    prompts = [chat(f"prompt {n // 2}", temperature=0) for n in range(items)]
    run = Run(limited, prompts)
    spent = limited.statistics()
    assert len(client.sent) == spent.requests == sum(len(outcome.attempts) for outcome in run.outcomes) <= requests
    assert spent.tokens == sum(outcome.usage.total_tokens for outcome in run.outcomes)
    assert run.kind == "completed"
    asked = [outcome.request for outcome in run.outcomes]
    assert sorted(map(id, asked)) == sorted(map(id, prompts[: len(asked)]))
    everything = len(asked) == items and not unasked(run)
    assert (spent.used_up is None) is everything


# a budget that suffices


@pytest.mark.parametrize("limits", [{"requests": 9}, {"tokens": 27}, {"usd": 45, "prices": PRICES}], ids=list)
@pytest.mark.parametrize("window", [1, 4, 99])
def test_a_budget_that_suffices_exactly_is_not_used_up(
    limits: dict[str, Any], window: int, warned: pytest.LogCaptureFixture
):
    limited = budget(call(Client(), window=window), on_exhausted="raise", **limits)
    run = Run(limited, "abcdefghi")
    assert (len(run.outcomes), run.kind, limited.statistics().used_up) == (9, "completed", None)
    assert not warned.records


def fed(items: str, *, closed: bool) -> rxllm.Feed[str]:
    """Return a feed with these items."""
    feed: rxllm.Feed[str] = rxllm.Feed()
    for item in items:
        feed.put_nowait(item)
    if closed:
        feed.close()
    return feed


ENDS = {
    "a list": (lambda: rxllm.from_iterable(["a", "b", "c"]), None),
    "a range": (lambda: rxllm.from_iterable(range(3)).pipe(ops.map(str)), None),
    "a closed feed": (lambda: fed("abc", closed=True), None),
    "one that does not wait": (lambda: rx.from_iterable("abc"), None),
    "a mapped one": (lambda: rxllm.from_iterable(["a", "b", "c", ""]).pipe(ops.filter(bool)), "requests"),
    "a list with one more": (lambda: rxllm.from_iterable(["a", "b", "c", "d"]), "requests"),
    "an open feed": (lambda: fed("abc", closed=False), "requests"),
    "an iterator that does not know": (lambda: rxllm.from_iterable(map(str, "abc")), "requests"),
}


@pytest.mark.parametrize(("source", "used_up"), ENDS.values(), ids=list(ENDS))
@pytest.mark.parametrize("nesting", ["plain", "journal", "cache"])
def test_it_is_used_up_if_something_may_be_left(source: Any, used_up: str | None, nesting: str, tmp_path: Any):
    limited = budget(call(Client(), window=2), requests=3)
    around: Any = limited
    if nesting == "journal":
        around = rxllm.journal(tmp_path / "journal.jsonl", limited)
    elif nesting == "cache":
        around = rxllm.cache(tmp_path / "cache.db", limited, sampled=True)
    scheduler = VirtualScheduler()
    seen = record(scheduler, source().pipe(around))
    assert [outcome.ok for outcome in seen.values] == [True] * 3
    assert limited.statistics().used_up == used_up


# around and inside of others

NESTINGS = {
    "journal(budget(call))": lambda folder, asking, limit: rxllm.journal(folder / "j.jsonl", limit(asking)),
    "budget(journal(call))": lambda folder, asking, limit: limit(rxllm.journal(folder / "j.jsonl", asking)),
    "budget(cache(call))": lambda folder, asking, limit: limit(rxllm.cache(folder / "c.db", asking, sampled=True)),
    "cache(budget(call))": lambda folder, asking, limit: rxllm.cache(folder / "c.db", limit(asking), sampled=True),
    "journal(budget(cache(call)))": lambda folder, asking, limit: rxllm.journal(
        folder / "j.jsonl", limit(rxllm.cache(folder / "c.db", asking, sampled=True))
    ),
    "budget(journal(cache(call)))": lambda folder, asking, limit: limit(
        rxllm.journal(folder / "j.jsonl", rxllm.cache(folder / "c.db", asking, sampled=True))
    ),
}


@pytest.mark.parametrize("nest", NESTINGS.values(), ids=list(NESTINGS))
@pytest.mark.parametrize(
    ("limits", "ordered"), [({"requests": 6}, True), ({"seconds": 2.5}, False)], ids=["6", "2.5 s"]
)
def test_what_was_not_asked_is_asked_by_the_next_run(nest: Any, limits: dict[str, Any], ordered: bool, tmp_path: Any):
    answered: set[str] = set()
    before = 0  # attempts, which count again when a journal inside of the budget replays them
    prompts = [f"prompt {n}" for n in range(20)]
    for _ in range(12):
        client = Client(*[(0.5, DOWN)] * 2)
        limited: list[Any] = []

        def limit(asking: Any, limited: list[Any] = limited, before: int = before) -> Any:
            most = {kind: value + before if kind == "requests" else value for kind, value in limits.items()}
            limited.append(budget(asking, **most))
            return limited[0]

        gate = rxllm.Gate("4/2 seconds")
        asking = call(client, gate=gate, window=9, retry=Backoff(base=0.1), ordered=ordered, seed=1)
        run = Run(nest(tmp_path, asking, limit), prompts)
        good = {outcome.request.body["messages"][0]["content"] for outcome in run.outcomes if outcome.ok}
        answered |= good
        before = sum(len(outcome.attempts) for outcome in run.outcomes if outcome.ok)
        assert run.kind == "completed"
        if limited[0].statistics().used_up is None:
            break
        assert limited[0].statistics().used_up in limits
    assert answered == set(prompts)
    assert [outcome.ok for outcome in run.outcomes] == [True] * 20


def test_what_a_journal_inside_replays_counts_as_it_did_then(tmp_path: Any):
    kept = rxllm.journal(tmp_path / "j.jsonl", call(Client(), window=2))
    assert len(Run(kept, "abcd").outcomes) == 4
    client = Client()
    limited = budget(rxllm.journal(tmp_path / "j.jsonl", call(client, window=2)), tokens=18)
    assert len(Run(limited, "abcdefgh").outcomes) == 6
    assert (len(client.sent), limited.statistics().requests, limited.statistics().tokens) == (2, 6, 18)


def test_attempts_that_no_outcome_records_count_too():
    client, gate = Client(), rxllm.Gate()

    def ask(prompt: str) -> Observable[Outcome[Any]]:
        request = chat(prompt)
        return client.send(request).pipe(rxllm.operators.admit(gate), rxllm.operators.to_outcome(request))

    limited = budget(flat_map(ask, window=3), requests=5)  # type: ignore[arg-type]
    run = Run(limited)
    assert len(client.sent) == len(run.outcomes) == limited.statistics().requests == 5
    assert limited.last is not None
    assert not limited.last._noted  # nothing waits for an outcome that will not have them


def test_attempts_that_know_no_gate_count_with_their_outcome():
    def ask(prompt: str) -> Observable[Outcome[Any]]:
        attempt = rxllm.Attempt(number=1, usage=USED)
        return Script((1.0, Outcome(request=chat(prompt), reply=Reply(value=1, model="small"), attempts=(attempt,))))

    limited = budget(flat_map(ask, window=1), usd=15, prices=PRICES)  # type: ignore[arg-type]
    assert len(Run(limited).outcomes) == 3
    spent = limited.statistics()
    assert (spent.requests, spent.tokens, spent.usd) == (3, 9, 15.0)


def test_disposing_leaves_nothing_when_a_budget_is_just_used_up():
    scheduler, client = VirtualScheduler(), Client()
    limited = budget(call(client, gate=rxllm.Gate("2/9 seconds"), window=9), seconds=1.5)
    seen = record(scheduler, rxllm.from_iterable(Prompts()).pipe(limited), dispose_at=1.5)
    assert (len(seen.values), scheduler.pending) == (2, 0)


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
