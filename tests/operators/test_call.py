"""call: the canonical composition, in virtual time."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import json
import pickle
import random
import threading
from collections.abc import Mapping
from typing import Any

import pytest
import reactivex as rx
from reactivex import Observable
from reactivex import operators as ops

import rxllm
from rxllm import Backoff, Gate, Outcome, Reply, Request, Timeouts, Usage, Validate, call, chat
from rxllm.errors import (
    CancelledError,
    ConfigError,
    InvalidRequestError,
    QuotaExhaustedError,
    RateLimitedError,
    ServerError,
    TimeoutError,
    ValidationError,
)
from rxllm.messages import Setting
from rxllm.providers.base import Call
from rxllm.testing import Recorder, Script, VirtualScheduler, record
from rxllm.transports import MemoryTransport, Response

Line = tuple[float, Any]


def prompt(request: Request) -> str:
    text: str = request.body["messages"][-1]["content"]
    return text


def reply(text: str, tokens: int = 3) -> Reply[str]:
    return Reply(value=text, text=text, status=200, usage=Usage(input_tokens=1, output_tokens=tokens - 1))


class Client:
    """A client in virtual time: for each prompt lines of (seconds, reply or error), the last of which repeats."""

    def __init__(self, cost: Mapping[str, float] | None = None, **lines: list[Line]) -> None:
        self.scripts = {text: Script(*script) for text, script in lines.items()}
        self.sent: list[str] = []
        self.timeouts: list[Timeouts] = []
        self.costs = 0
        self._cost = {"requests": 1.0, "tokens": 3.0} if cost is None else cost

    def send(self, request: Request, *, timeouts: Timeouts = Timeouts()) -> Observable[Reply[str]]:  # noqa: B008
        text = prompt(request)
        self.timeouts.append(timeouts)

        def begin(_scheduler: Any) -> Observable[Any]:
            self.sent.append(text)
            return self.scripts.get(text) or Script((1.0, reply(text.upper())))

        return rx.defer(begin)

    def cost(self, request: Request) -> Mapping[str, float]:
        self.costs += 1
        return self._cost

    def wrap(self, item: Any) -> Request:
        return chat(item)


def highest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rxllm.runtime.uniform", lambda _low, high: high)


def run(client: Any, items: list[Any], *, until: float | None = None, **settings: Any) -> Recorder:
    scheduler = VirtualScheduler()
    seen = record(scheduler, rxllm.from_iterable(items).pipe(call(client, **settings)), until=until)
    if until is None:
        assert scheduler.pending == 0
    return seen


def one(client: Any, item: Any = "a", **settings: Any) -> Outcome[Any]:
    (outcome,) = run(client, [item], **settings).values
    return outcome


def waits(outcome: Outcome[Any]) -> list[tuple[int, float, float, dict[str, float]]]:
    return [(a.number, a.started, a.seconds, a.waited) for a in outcome.attempts]


def down(status: int = 500) -> ServerError:
    return ServerError("down", status)


def refused(hint: float | None = None) -> RateLimitedError:
    return RateLimitedError("slow down", 429, hint)


# the signature and the arguments


def test_the_signature_is_that_of_the_design():
    parameters = inspect.signature(call).parameters
    assert {name: parameter.default for name, parameter in parameters.items()} == {
        "client": inspect.Parameter.empty,
        "gate": None,
        "retry": Backoff(),
        "validate": None,
        "timeouts": Timeouts(),
        "deadline": 3600.0,
        "window": None,
        "ordered": False,
        "on_failure": "emit",
        "seed": None,
        "stream": False,
        "on_chunk": None,
        "hedge": None,
        "single_flight": False,
    }
    kinds = [parameter.kind for parameter in parameters.values()]
    assert kinds[1:] == [inspect.Parameter.KEYWORD_ONLY] * 13


@pytest.mark.parametrize(
    "settings",
    [
        {"gate": "500/minute"},
        {"gate": 5},
        {"retry": 3},
        {"retry": None},
        {"timeouts": 30},
        {"timeouts": None},
        {"validate": 5},
        {"deadline": 0},
        {"deadline": None},
        {"window": 0},
        {"window": 1.5},
        {"on_failure": "ignore"},
        {"seed": "x"},
    ],
    ids=str,
)
def test_a_wrong_argument_is_refused_at_once_by_its_name(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        call(Client(), **settings)


def test_something_that_is_no_client_is_refused_at_once():
    with pytest.raises(ConfigError, match="client"):
        call("gpt-4o-mini")  # type: ignore[arg-type]


# items


def test_prompts_and_requests_go_in_and_outcomes_with_their_requests_come_out():
    request = chat("b", id="mine", meta={"row": 7})
    seen = run(Client(), ["a", request], ordered=True)
    first, second = seen.values
    assert [outcome.text for outcome in seen.values] == ["A", "B"]
    assert (prompt(first.request), first.request.id) == ("a", None)
    assert second.request is request
    assert seen.end is not None
    assert (seen.end.kind, seen.end.at) == ("completed", 1.0)


def test_a_failed_outcome_passes_through_and_a_good_one_is_an_item():
    failed = Outcome(request=chat("x"), error=ServerError("before"))
    client = Client()
    seen = run(client, [failed, "a"], ordered=True)
    assert seen.values[0] is failed
    assert seen.values[1].text == "A"
    assert client.sent == ["a"]
    good = Outcome(request=chat("x"), reply=reply("text"))
    with rxllm.function(lambda outcome: outcome.text.upper()) as function:
        (again,) = rxllm.collect(rxllm.from_iterable([good]).pipe(call(function)))
    assert again.value == "TEXT"


def test_a_failed_outcome_ends_a_stream_that_raises():
    failed = Outcome(request=chat("x"), error=ServerError("before"))
    seen = run(Client(), [failed, "a"], on_failure="raise")
    assert seen.end is not None
    assert seen.end.value is failed.error


def test_an_item_that_is_no_request_fails_alone():
    seen = run(Client(), [7, "a"], ordered=True)
    assert [outcome.ok for outcome in seen.values] == [False, True]
    assert seen.values[0].request.body == 7
    assert "prompt" in str(seen.values[0].error)


def test_outcomes_come_as_they_complete_or_in_order():
    client = Client(a=[(3.0, reply("A"))], b=[(1.0, reply("B"))], c=[(2.0, reply("C"))])
    assert [outcome.text for outcome in run(client, ["a", "b", "c"]).values] == ["B", "C", "A"]
    assert [outcome.text for outcome in run(client, ["a", "b", "c"], ordered=True).values] == ["A", "B", "C"]


# clients


def test_a_client_may_be_chosen_by_request():
    clients = {"small": Client(a=[(1.0, reply("from small"))]), "big": Client(a=[(1.0, reply("from big"))])}
    requests = [chat("a", model="small"), chat("a", model="big")]
    seen = run(lambda request: clients[request.body["model"]], requests, ordered=True)
    assert [outcome.text for outcome in seen.values] == ["from small", "from big"]


def test_a_prompt_becomes_a_chat_when_the_client_is_chosen_by_request():
    client = Client()
    assert one(lambda _request: client).text == "A"


def test_a_choice_that_raises_or_is_no_client_fails_its_item_only():
    client = Client()
    choices = {"good": lambda: client, "raises": lambda: {}["no"], "text": lambda: "gpt"}
    requests = [chat(name) for name in choices]
    seen = run(lambda request: choices[prompt(request)](), requests, ordered=True)
    assert [outcome.ok for outcome in seen.values] == [True, False, False]
    assert [outcome.request for outcome in seen.values] == requests
    assert isinstance(seen.values[1].error, KeyError)
    assert "client must return a client, got str; to call a function of your own give function(f)" in str(
        seen.values[2].error
    )


@pytest.mark.parametrize("method", ["send", "wrap", "cost"])
def test_a_client_whose_method_raises_fails_its_item_only(method):
    client = Client()
    good = getattr(client, method)

    def sometimes(thing: Any, **named: Any) -> Any:
        if (thing if isinstance(thing, str) else prompt(thing)) == "b":
            raise KeyError("bug")
        return good(thing, **named)

    setattr(client, method, sometimes)
    seen = run(client, ["a", "b", "c"], ordered=True, gate=Gate("100/minute"))
    assert [outcome.ok for outcome in seen.values] == [True, False, True]
    assert isinstance(seen.values[1].error, KeyError)


def test_timeouts_are_handed_to_the_client():
    client = Client()
    limits = Timeouts(idle=7)
    one(client, timeouts=limits)
    assert client.timeouts == [limits]


# attempts


def test_every_attempt_is_recorded_with_its_waits_its_status_and_its_end(monkeypatch):
    highest(monkeypatch)
    client = Client(a=[(1.0, down(503)), (2.0, refused(4.0)), (1.0, reply("A"))])
    outcome = one(client, gate=Gate(concurrency=1), retry=Backoff(base=0.5))
    assert outcome.text == "A"
    assert waits(outcome) == [(1, 0.0, 1.0, {}), (2, 1.5, 2.0, {}), (3, 7.5, 1.0, {})]
    assert [attempt.status for attempt in outcome.attempts] == [503, 429, 200]
    assert [type(attempt.error) for attempt in outcome.attempts] == [ServerError, RateLimitedError, type(None)]
    assert [attempt.usage for attempt in outcome.attempts] == [None, None, Usage(input_tokens=1, output_tokens=2)]
    assert (outcome.started, outcome.seconds) == (0.0, 8.5)
    assert outcome.usage.total_tokens == 3


def test_the_wait_for_a_quota_and_for_a_place_are_told_apart():
    client = Client()
    seen = run(client, ["a", "b"], gate=Gate(concurrency=1), ordered=True)
    (attempt,) = seen.values[1].attempts
    assert attempt.waited == {"concurrency": 1.0}
    seen = run(client, ["a", "b"], gate=Gate(rxllm.Quota(1, per=10.0, margin=0.0)), ordered=True)
    (attempt,) = seen.values[1].attempts
    ((reason, seconds),) = attempt.waited.items()
    assert "1 request" in reason
    assert seconds == attempt.started >= 10.0


def test_without_a_gate_nothing_waits_and_no_cost_is_computed():
    client = Client()
    seen = run(client, [f"p{n}" for n in range(200)])
    assert [attempt.waited for outcome in seen.values for attempt in outcome.attempts] == [{}] * 200
    assert client.costs == 0
    assert seen.end is not None
    assert seen.end.at == 1.0  # all at a time: the window without a limit is 256


def test_a_gate_without_quotas_needs_no_cost_and_one_with_them_does():
    client = Client()
    run(client, ["a"], gate=Gate(concurrency=2))
    assert client.costs == 0
    run(client, ["a"], gate=Gate("10/minute"))
    assert client.costs == 1


# retries


def test_transient_errors_are_retried_so_often_and_then_the_last_one_is_the_outcome():
    client = Client(a=[(1.0, down(500)), (1.0, down(502))])
    outcome = one(client, retry=Backoff(attempts=3))
    assert isinstance(outcome.error, ServerError)
    assert outcome.error.status == 502
    assert [attempt.number for attempt in outcome.attempts] == [1, 2, 3]
    assert outcome.error.__traceback__ is None


def test_other_errors_are_not():
    outcome = one(Client(a=[(1.0, InvalidRequestError("no", 400))]))
    assert len(outcome.attempts) == 1
    assert outcome.attempts[0].error is outcome.error


def test_refusals_eat_no_tries():
    client = Client(a=[*[(0.1, refused(1.0))] * 20, (0.1, down()), (0.1, reply("A"))])
    outcome = one(client, retry=Backoff(attempts=2))
    assert outcome.ok
    assert len(outcome.attempts) == 22


def test_the_deadline_bounds_refusals():
    client = Client(a=[(0.1, refused(7.0))])
    outcome = one(client, deadline=30.0)
    assert isinstance(outcome.error, RateLimitedError | TimeoutError)
    assert outcome.seconds <= 30.0
    assert len(outcome.attempts) == 5


def test_a_hint_beyond_the_deadline_ends_the_request_at_once():
    outcome = one(Client(a=[(1.0, refused(100.0))]), deadline=60.0)
    assert isinstance(outcome.error, RateLimitedError)
    assert outcome.seconds == 1.0


def test_the_deadline_ends_an_attempt_in_the_air_and_the_outcome_has_it():
    outcome = one(Client(a=[(1.0, down()), (99.0, reply("A"))]), deadline=10.0, retry=Backoff(base=0.5))
    assert isinstance(outcome.error, TimeoutError)
    assert outcome.error.phase == "deadline"
    assert outcome.seconds == 10.0
    assert [type(attempt.error) for attempt in outcome.attempts] == [ServerError, CancelledError]


def test_the_deadline_ends_a_wait_at_the_gate():
    gate = Gate("1 per 30 seconds")
    seen = run(Client(), ["a", "b"], gate=gate, deadline=10.0, ordered=True)
    assert seen.values[0].ok
    assert isinstance(seen.values[1].error, TimeoutError)
    assert seen.values[1].attempts == ()
    assert seen.values[1].seconds == 10.0
    assert gate.statistics().waiting == 0


def test_the_deadline_does_not_count_the_time_in_which_a_used_up_quota_suspends(monkeypatch):
    highest(monkeypatch)
    gate = Gate(rxllm.Quota(1, per=3600.0, margin=0.0))
    client = Client(b=[(1.0, down()), (99.0, reply("B"))])
    first, second = run(client, ["a", "b"], gate=gate, deadline=10.0, ordered=True).values
    assert first.ok
    assert [attempt.started for attempt in second.attempts] == [3600.0, 7200.0]
    assert isinstance(second.error, TimeoutError)  # 1 s on the wire, half a second of back-off, 8.5 s on the wire
    assert second.seconds == pytest.approx(7208.5)
    assert str(second.error) == "not answered within 10 s, with the 7198.5 s apart that it does not count"
    assert gate.statistics().in_flight == 0


def test_a_hint_is_held_against_the_deadline_without_the_time_in_which_a_used_up_quota_suspends():
    gate = Gate(rxllm.Quota(1, per=3600.0, margin=0.0))
    client = Client(b=[(1.0, refused(2.0)), (3.0, refused(4.5))])
    _, second = run(client, ["a", "b"], gate=gate, deadline=10.0, ordered=True).values
    assert [attempt.started for attempt in second.attempts] == [3600.0, 7200.0]
    assert isinstance(second.error, RateLimitedError)  # 1 and 2 and 3 s are counted, so its hint is beyond the deadline
    assert second.seconds == 7203.0


def test_what_was_suspended_before_a_request_was_pulled_is_not_added_to_its_deadline():
    gate = Gate(rxllm.Quota(1, per=3600.0, margin=0.0))
    client = Client(b=[(1.0, reply("B"))], c=[(99.0, reply("C"))])
    scheduler = VirtualScheduler()
    feed: rxllm.Feed[str] = rxllm.Feed()
    seen = record(scheduler, feed.pipe(call(client, gate=gate, deadline=10.0)), until=0.0)
    for item in "ab":
        feed.put_nowait(item)
    scheduler.run(until=7300.0)
    assert [outcome.ok for outcome in seen.values] == [True, True]
    assert gate.suspended() == 3600.0
    feed.put_nowait("c")
    feed.close()
    scheduler.run()
    assert isinstance(seen.values[2].error, TimeoutError)
    assert seen.values[2].seconds == 10.0


def draws(seed: int | None, *, twice: bool = False) -> list[list[float]]:
    """Return when the attempts of ten requests started; of two subscriptions to one stream, or of one."""
    client = Client(**{f"p{n}": [(1.0, down()), (1.0, down()), (1.0, reply("A"))] * 2 for n in range(10)})
    source = rx.of(*(chat(f"p{n}") for n in range(10)))
    stream = source.pipe(call(client, seed=seed, window=3))
    runs = []
    for _ in range(1 + twice):
        seen = record(VirtualScheduler(), stream)
        runs.append([attempt.started for outcome in seen.values for attempt in outcome.attempts])
    return runs


def test_a_seed_reproduces_the_draws_and_another_makes_others():
    assert draws(7) == draws(7)
    assert draws(7) != draws(8)
    assert draws(None) != draws(None)


def test_a_seed_reproduces_the_draws_of_each_subscription():
    first, second = draws(7, twice=True)
    assert first == second


def test_a_seed_uses_a_generator_of_its_own():
    state = random.getstate()
    draws(7)
    assert random.getstate() == state


# validation


def test_an_answer_that_does_not_pass_is_asked_again_and_noted():
    client = Client(a=[(1.0, reply("bad", 10)), (1.0, reply("good", 4))])
    outcome = one(client, validate=lambda reply: reply.text == "good")
    assert outcome.text == "good"
    assert [type(attempt.error) for attempt in outcome.attempts] == [ValidationError, type(None)]
    assert [attempt.number for attempt in outcome.attempts] == [1, 2]
    assert outcome.usage.total_tokens == 14  # both were paid
    assert outcome.attempts[0].status == 200


def test_checks_count_answers_and_the_last_error_is_the_outcome():
    client = Client(a=[(1.0, down()), (1.0, reply("bad"))])
    outcome = one(client, validate=Validate(check=lambda _reply: False, attempts=2))
    assert isinstance(outcome.error, ValidationError)
    assert [type(attempt.error) for attempt in outcome.attempts] == [ServerError, ValidationError, ValidationError]
    assert outcome.attempts[-1].error is outcome.error


def test_the_tries_of_retry_and_of_validate_do_not_multiply():
    client = Client(a=[(1.0, reply("bad"))])
    outcome = one(client, validate=Validate(check=lambda _reply: False, attempts=3), retry=Backoff(attempts=5))
    assert len(outcome.attempts) == 3


def test_a_repair_makes_the_next_request_and_a_fault_does_not_lose_it():
    seen: list[tuple[str, str, str]] = []

    def check(reply: Reply[str]) -> None:
        if not reply.text.endswith("!"):
            raise ValueError(f"{reply.text} has no end")

    def repair(request: Request, reply: Reply[str], error: ValidationError) -> Request:
        seen.append((prompt(request), reply.text, str(error)))
        return chat(prompt(request) + "x")

    client = Client(
        a=[(1.0, reply("one"))], ax=[(1.0, down()), (1.0, reply("two"))], axx=[(1.0, refused()), (1.0, reply("three!"))]
    )
    request = chat("a")
    outcome = one(client, request, validate=Validate(check=check, repair=repair))
    assert outcome.text == "three!"
    assert client.sent == ["a", "ax", "ax", "axx", "axx"]
    assert seen == [("a", "one", "one has no end"), ("ax", "two", "two has no end")]
    assert outcome.request is request
    assert [attempt.number for attempt in outcome.attempts] == [1, 2, 3, 4, 5]


def test_a_repaired_request_keeps_its_place_in_the_queue():
    client = Client(a=[(1.0, reply("bad"))], ax=[(1.0, reply("good"))])
    settings = Validate(check=lambda reply: reply.text != "bad", repair=lambda _request, _reply, _error: chat("ax"))
    run(client, ["a", *(f"p{n}" for n in range(5))], gate=Gate(concurrency=1), window=6, validate=settings)
    assert client.sent == ["a", "ax", "p0", "p1", "p2", "p3", "p4"]


@pytest.mark.parametrize(
    ("repair", "kind"),
    [
        pytest.param(lambda *_: "again", ConfigError, id="returns-a-text"),
        pytest.param(lambda *_: {}["no"], KeyError, id="raises"),
    ],
)
def test_a_bad_repair_fails_its_item_only(repair, kind):
    settings = Validate(check=lambda reply: reply.text != "A", repair=repair)
    seen = run(Client(), ["a", "b"], validate=settings, ordered=True)
    assert isinstance(seen.values[0].error, kind)
    assert seen.values[1].ok


def test_a_check_that_is_broken_fails_its_item_and_is_not_asked_again():
    client = Client()
    outcome = one(client, validate=lambda reply: reply.nothing)
    assert isinstance(outcome.error, AttributeError)
    assert client.sent == ["a"]


# gates


def test_a_request_that_no_quota_ever_admits_fails_at_once_with_the_numbers():
    gate = Gate("1000 tokens/minute", "10/minute")
    client = Client(cost={"requests": 1, "tokens": 1_500})
    outcome = one(client, gate=gate)
    assert type(outcome.error) is InvalidRequestError
    assert "1,500 tokens" in str(outcome.error)
    assert "1,000" in str(outcome.error)
    assert outcome.seconds == 0.0
    assert outcome.attempts == ()
    assert client.sent == []
    assert gate.statistics().in_flight == 0


def test_a_gate_is_shared_by_pipelines():
    gate = Gate(concurrency=2)
    scheduler = VirtualScheduler()
    client = Client(**{f"p{n}": [(1.0, reply("A"))] for n in range(12)})
    most = 0

    def watch(_outcome: Any) -> None:
        nonlocal most
        most = max(most, sum(script.active for script in client.scripts.values()))

    recorders = [
        record(
            scheduler,
            rxllm.from_iterable([f"p{n}" for n in part]).pipe(call(client, gate=gate), ops.do_action(watch)),
            until=0.0,
        )
        for part in (range(6), range(6, 12))
    ]
    scheduler.run()
    assert [len(recorder.values) for recorder in recorders] == [6, 6]
    assert scheduler.seconds() == 6.0
    assert most <= 2


def test_the_window_follows_the_limit_of_the_gate():
    gate = Gate(concurrency=1)
    pulled: list[int] = []

    def prompts() -> Any:
        for n in range(10_000):
            pulled.append(n)
            yield f"p{n}"

    scheduler = VirtualScheduler()
    seen = record(scheduler, rxllm.from_iterable(prompts()).pipe(call(Client(), gate=gate)), until=0.5)
    assert len(pulled) == 34
    gate.set(limit=50)
    scheduler.run(until=3.5)
    assert len(pulled) - len(seen.values) == 132
    assert seen.subscription is not None
    seen.dispose()


# ends


def test_on_failure_raise_ends_the_stream_with_the_error_itself():
    client = Client(b=[(1.5, InvalidRequestError("no", 400))])
    seen = run(client, ["a", "b", "c"], on_failure="raise", window=1)
    assert [outcome.text for outcome in seen.values] == ["A"]
    assert seen.end is not None
    assert type(seen.end.value) is InvalidRequestError
    assert seen.end.at == 2.5
    assert client.sent == ["a", "b"]


def counting(pulled: list[str]) -> Any:
    """Return an endless source, and note what is taken of it."""
    for n in itertools.count():
        pulled.append(f"p{n}")
        yield pulled[-1]


@pytest.mark.parametrize("ordered", [False, True], ids=["as-they-complete", "in-order"])
def test_a_gate_that_runs_dry_ends_an_endless_stream_after_what_is_on_the_wire(ordered):
    gate = Gate(rxllm.Quota(5, per=3600.0, on_exhausted="fail"), concurrency=2)
    client = Client(p0=[(9.0, reply("P0"))], p2=[(1.0, down()), (1.0, reply("P2"))])
    pulled: list[str] = []
    seen = run(client, counting(pulled), gate=gate, window=4, ordered=ordered)
    outcomes = {prompt(outcome.request): outcome for outcome in seen.values}
    assert sorted(outcomes) == sorted(pulled)  # each of them once, and nothing more was taken
    assert len(seen.values) == len(pulled) <= 5 + 4
    assert len(client.sent) == 5
    assert outcomes["p0"].text == "P0"
    failed = [outcome for outcome in seen.values if not outcome.ok]
    assert all(isinstance(outcome.error, QuotaExhaustedError) for outcome in failed)
    assert sum(len(outcome.attempts) for outcome in seen.values) == 5
    assert seen.end is not None
    assert seen.end.kind == "error"
    assert seen.end.value is next(o.error for o in sorted(failed, key=lambda o: o.started + o.seconds))
    assert seen.end.at == 9.0
    assert (gate.statistics().in_flight, gate.statistics().waiting) == (0, 0)
    if ordered:
        assert list(outcomes) == pulled


def test_a_gate_that_runs_dry_ends_a_stream_that_raises_at_once():
    gate = Gate(rxllm.Quota(2, per=3600.0, on_exhausted="fail"))
    seen = run(Client(), counting([]), gate=gate, window=4, on_failure="raise")
    assert seen.values == []
    assert seen.end is not None
    assert isinstance(seen.end.value, QuotaExhaustedError)


def test_a_unit_that_no_cost_names_ends_an_endless_stream_and_not_each_of_its_requests():
    pulled: list[str] = []
    client = Client()
    seen = run(client, counting(pulled), gate=Gate("1000 tokns/minute"))
    assert pulled == ["p0"]
    assert [prompt(outcome.request) for outcome in seen.values] == ["p0"]
    assert seen.end is not None
    assert isinstance(seen.end.value, ConfigError)
    assert "counts tokns" in str(seen.end.value)
    assert client.sent == []


def test_a_state_file_that_cannot_be_used_ends_an_endless_stream_and_not_each_of_its_requests(tmp_path):
    gate = Gate(rxllm.Quota("5/hour", state=tmp_path / "missing" / "file"))
    outcomes = []
    stream = rxllm.from_iterable(itertools.count()).pipe(call(rxllm.function(str), gate=gate, window=2))
    with pytest.raises(ConfigError, match="missing/file' cannot be used"), rxllm.iterate(stream) as seen:
        outcomes.extend(seen)
    assert len(outcomes) <= 2


def test_a_loop_over_outcomes_ends_with_the_error_that_halts_after_the_last_of_them():
    gate = Gate(rxllm.Quota(3, per=3600.0, on_exhausted="fail"))
    texts = []
    with (
        rxllm.function(lambda n: f"text {n}") as client,
        rxllm.iterate(rxllm.from_iterable(itertools.count()).pipe(call(client, gate=gate, window=2))) as outcomes,
        pytest.raises(QuotaExhaustedError, match="3 requests per 3600 seconds is used up") as caught,
    ):
        for outcome in outcomes:
            texts.append(outcome.text if outcome.ok else str(outcome.error))
    assert {text for text in texts if text.startswith("text")} == {"text 0", "text 1", "text 2"}
    assert 4 <= len(texts) <= 5
    assert {text for text in texts if not text.startswith("text")} == {str(caught.value)}
    assert caught.value.retry_after == pytest.approx(3600, abs=60)


def test_a_failed_outcome_of_before_whose_error_halts_is_an_item_like_another():
    failed = Outcome(request=chat("x"), error=QuotaExhaustedError("used up"))
    seen = run(Client(), [failed, "a"], ordered=True)
    assert seen.values[0] is failed
    assert seen.values[1].text == "A"
    assert seen.end is not None
    assert seen.end.kind == "completed"


def test_a_lane_of_a_gate_is_as_good_as_the_gate():
    gate = Gate("100/minute", concurrency=1)
    seen = run(Client(), ["a", "b"], gate=gate.lane("grader", weight=2), ordered=True)
    assert [outcome.text for outcome in seen.values] == ["A", "B"]
    assert {lane.name: lane.admitted for lane in gate.statistics().lanes}["grader"] == 2


def test_disposing_leaves_nothing():
    client = Client(**{f"p{n}": [(1.0, down()), (5.0, reply("A"))] for n in range(20)})
    gate = Gate("10/minute", concurrency=4)
    scheduler = VirtualScheduler()
    stream = rxllm.from_iterable([f"p{n}" for n in range(20)]).pipe(call(client, gate=gate, deadline=50.0))
    record(scheduler, stream, dispose_at=3.0)
    assert scheduler.pending == 0
    assert sum(script.active for script in client.scripts.values()) == 0
    statistics = gate.statistics()
    assert (statistics.in_flight, statistics.waiting) == (0, 0)


def test_the_same_operator_can_be_used_twice():
    operator = call(Client())
    for _ in range(2):
        seen = record(VirtualScheduler(), rxllm.from_iterable(["a"]).pipe(operator))
        assert [outcome.text for outcome in seen.values] == ["A"]


def test_ten_thousand_answers_that_are_there_at_once_need_no_stack():
    client = Client(x=[(0.0, reply("X"))])
    seen = run(client, [chat("x") for _ in range(10_000)])
    assert len(seen.values) == 10_000


def test_outcomes_are_picklable():
    client = Client(a=[(1.0, down()), (1.0, refused(2.0)), (1.0, reply("bad"))])
    outcome = one(client, validate=Validate(check=lambda _reply: False, attempts=1))
    again = pickle.loads(pickle.dumps(outcome))
    assert [str(attempt.error) for attempt in again.attempts] == [str(attempt.error) for attempt in outcome.attempts]


# the same by its parts, and over the real client


def test_it_is_the_operators_that_its_documentation_names():
    from rxllm.operators import admit, flat_map, retry, to_outcome, validate

    def lines() -> dict[str, list[Line]]:
        return {"a": [(1.0, refused(3.0)), (1.0, reply("bad")), (2.0, reply("good"))], "b": [(1.0, down())]}

    def check(reply: Reply[str]) -> bool:
        return reply.text == "good"

    def by_parts(request: Request) -> Observable[Outcome[str]]:
        return client.send(request).pipe(
            admit(gate, cost=client.cost(request)), retry(Backoff(attempts=2)), validate(check), to_outcome(request)
        )

    ends = []
    for whole in (True, False):
        client, gate = Client(**lines()), Gate(concurrency=2)
        operator: Any = flat_map(by_parts, window=36)
        if whole:
            operator = call(client, gate=gate, retry=Backoff(attempts=2), validate=check)
        seen = record(VirtualScheduler(), rxllm.from_iterable([chat("a"), chat("b")]).pipe(operator))
        ends.append(
            ({prompt(o.request): str(o.error or o.text) for o in seen.values}, sorted(client.sent), seen.values[-1].ok)
        )
    assert ends[0][:2] == ends[1][:2]


def test_the_real_client_over_a_transport_without_a_network():
    asked: list[Any] = []

    def handler(call: Call) -> Response:
        asked.append(json.loads(call.body))
        if len(asked) % 3 == 0:
            return Response(429, {"retry-after-ms": "5"}, b'{"error":{"message":"slow down"}}')
        return Response(200, {}, b'{"choices":[{"message":{"content":"hello"},"finish_reason":"stop"}]}')

    async def main() -> list[Outcome[str]]:
        client = rxllm.OpenAI("m", api_key="any", transport=MemoryTransport(handler))
        gate = Gate("1000/minute", "100_000 tokens/minute", concurrency=4)
        outcomes = await rxllm.acollect(
            rxllm.from_iterable([f"prompt {n}" for n in range(20)]).pipe(
                call(client, gate=gate, seed=1, retry=Backoff(base=0.001, cap=0.001))
            )
        )
        assert gate.statistics().in_flight == 0
        return outcomes

    outcomes = asyncio.run(main())
    assert all(outcome.text == "hello" for outcome in outcomes)
    assert sum(len(outcome.attempts) for outcome in outcomes) == len(asked)
    assert sum(attempt.status == 429 for outcome in outcomes for attempt in outcome.attempts) == len(asked) - 20
    assert {body["messages"][0]["content"] for body in asked} == {f"prompt {n}" for n in range(20)}


def test_a_hint_beyond_the_deadline_ends_a_request_at_once_also_after_a_bad_answer():
    scheduler = VirtualScheduler()
    answers = iter([(5.0, reply("bad")), (1.0, rxllm.errors.RateLimitedError("later", 429, 6.0))])

    class Scripted:
        def send(self, request, *, timeouts):
            return rx.defer(lambda _: Script(next(answers)))

        def cost(self, request):
            return {}

        def wrap(self, item):
            return chat(item)

    stream = rxllm.from_iterable(["a"]).pipe(
        call(Scripted(), validate=lambda answer: answer.text != "bad", deadline=10.0)
    )
    [outcome] = record(scheduler, stream).values
    assert isinstance(outcome.error, rxllm.errors.RateLimitedError)
    assert outcome.seconds == 6.0


def test_an_async_function_is_no_client_and_neither_is_a_class():
    async def answer(_request):
        return "yes"

    [outcome] = rxllm.collect(rxllm.from_iterable(["a"]).pipe(call(answer)))
    assert isinstance(outcome.error, rxllm.errors.ConfigError)
    assert "function(f)" in str(outcome.error)
    with pytest.raises(rxllm.errors.ConfigError, match="the class OpenAI"):
        call(rxllm.OpenAI)


def test_a_group_is_refused_with_the_way_out():
    grouped = rxllm.from_iterable(["a", "b"]).pipe(ops.group_by(lambda text: text), call(rxllm.function(len)))
    outcomes = rxllm.collect(grouped)
    assert all("clients[request.model]" in str(outcome.error) for outcome in outcomes)


def test_an_answer_that_did_not_pass_is_kept_in_the_error():
    client = rxllm.function(lambda _item: "forty-two")
    [outcome] = rxllm.collect(rxllm.from_iterable([1]).pipe(call(client, validate=lambda reply: reply.text.isdigit())))
    assert outcome.error.body == "forty-two"


def test_a_cost_that_is_no_mapping_is_named():
    client = rxllm.function(len, cost=lambda _request: 5)
    [outcome] = rxllm.collect(rxllm.from_iterable(["a"]).pipe(call(client, gate=Gate("5/second"))))
    assert "cost must return a mapping" in str(outcome.error)


# what waits for long by itself


@pytest.mark.parametrize(
    ("hint", "window", "at"),
    [(30.0, None, 1.0), (30.0, 72, 31.0), (4.0, None, 5.0)],
    ids=["a-long-wait-gives-its-place-away", "a-window-that-was-asked-for-is-kept-to", "a-short-wait-keeps-its-place"],
)
def test_requests_that_are_told_to_wait_let_others_go(hint: float, window: int | None, at: float) -> None:
    setting = Setting(limit=20, rate=None, reason="as ever")  # of a controller: with one a refusal pauses nothing
    gate = Gate(concurrency=lambda _signals: rx.of(setting))
    told = [f"told{n}" for n in range(gate.window)]
    client = Client(**{text: [(0.0, refused(hint)), (0.0, reply(text))] for text in told})
    seen = run(client, [*told, "free"], gate=gate, window=window, retry=Backoff(base=0.001, cap=0.001), seed=1)
    assert [outcome.ok for outcome in seen.values] == [True] * 73
    (free,) = (event.at for event in seen.events if event.kind == "next" and event.value.request.body == FREE)
    assert free == pytest.approx(at, abs=0.1)


FREE = chat("free").body


def test_a_request_that_is_given_up_while_its_place_is_given_away_leaves_nothing_behind() -> None:
    client = Client(told=[(0.0, refused(3_000.0))])
    seen = run(client, ["told", "free"], retry=Backoff(), deadline=3_600.0)
    assert seen.values[0].text == "FREE"
    scheduler = VirtualScheduler()
    record(scheduler, rxllm.from_iterable(["told"] * 300).pipe(call(client)), dispose_at=10.0)
    assert scheduler.pending == 0


def test_an_operator_without_a_gate_runs_on_several_loops_at_once() -> None:
    async def late(item: str) -> str:
        await asyncio.sleep(0.01)
        return item

    operator = call(rxllm.function(late))
    seen: list[Outcome[Any]] = []

    def run_one(name: str) -> None:
        seen.extend(asyncio.run(collected(name)))

    async def collected(name: str) -> list[Outcome[Any]]:
        return await rxllm.acollect(rxllm.from_iterable([name] * 3).pipe(operator))

    threads = [threading.Thread(target=run_one, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(outcome.value for outcome in seen) == list("aaabbbccc")
