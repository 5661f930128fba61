"""any_of: several clients as one, each behind its own gate."""

from __future__ import annotations

import asyncio
import pickle
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import Observable

import rxllm
from rxllm import Backoff, Gate, OpenAI, Outcome, Quota, Reply, Request, Timeouts, Usage, Validate, call, chat
from rxllm.clients.routing import Route, any_of
from rxllm.errors import (
    AuthError,
    CallError,
    CancelledError,
    ConfigError,
    ContextOverflowError,
    InvalidRequestError,
    QuotaExhaustedError,
    RateLimitedError,
    ServerError,
    TimeoutError,
    ValidationError,
)
from rxllm.messages import Chunk, Restarted
from rxllm.operators import admit, retry, to_outcome
from rxllm.operators.routed import routed
from rxllm.policies import Breaker, RetryBudget
from rxllm.policies.hedging import LEARNED, Hedge
from rxllm.testing import Recorder, Script, VirtualScheduler, record
from rxllm.transports import MemoryTransport, Response

Line = tuple[float, Any]
DOWN = ServerError("down", 500)


class Client:
    """Answers with its name in 1 s; or the lines of (seconds, reply or error) that it is given, the last for ever."""

    def __init__(self, name: str, *lines: Line, tokens: float = 1.0) -> None:
        self.name = name
        self.script = Script(*(lines or ((1.0, reply(name)),)))
        self.tokens = tokens
        self.sent: list[str] = []
        self.closed = 0

    def __repr__(self) -> str:
        return self.name

    def send(
        self,
        request: Request,
        *,
        timeouts: Timeouts = Timeouts(),  # noqa: B008
        on_chunk: Any = None,
    ) -> Observable[Reply[str]]:
        def begin(_scheduler: Any) -> Observable[Any]:
            self.sent.append(request.body["messages"][-1]["content"])
            if on_chunk is not None:
                on_chunk(Chunk(text=self.name))
            return self.script

        return rx.defer(begin)

    def stream(self, request: Request) -> None: ...

    def cost(self, request: Request) -> Mapping[str, float]:
        return {"requests": 1.0, "tokens": self.tokens}

    def wrap(self, item: Any) -> Request:
        return chat(item)

    def close(self) -> None:
        self.closed += 1


def reply(text: str, tokens: int = 1) -> Reply[str]:
    return Reply(value=text, text=text, status=200, usage=Usage(input_tokens=tokens))


def failing(name: str, error: Exception = DOWN) -> Client:
    return Client(name, (1.0, error))


def run(client: Any, items: Any, *, until: float | None = None, **settings: Any) -> Recorder:
    scheduler = VirtualScheduler()
    settings = {"retry": Backoff(base=0.001, cap=0.001), **settings}
    seen = record(scheduler, rxllm.from_iterable(items).pipe(call(client, **settings)), until=until)
    if until is None:
        assert scheduler.pending == 0
    return seen


def one(client: Any, **settings: Any) -> Outcome[Any]:
    (outcome,) = run(client, ["a"], **settings).values
    return outcome


def ways(outcome: Outcome[Any]) -> list[tuple[int, str | None, type | None]]:
    return [
        (attempt.number, attempt.route, None if attempt.error is None else type(attempt.error))
        for attempt in outcome.attempts
    ]


def idle(*gates: Gate) -> bool:
    return all(gate.statistics().in_flight == gate.statistics().waiting == 0 for gate in gates)


# what it is made of


def test_routes_are_named_by_their_clients_or_as_they_are_told():
    twins = any_of(Client("a"), Client("a"), Route(Client("x"), name="b"), Client("b"))
    assert twins.names == ("a", "a #2", "b", "b #2")
    assert repr(twins) == "any_of(a, a #2, b, b #2)"


@pytest.mark.parametrize(
    ("make", "named"),
    [
        pytest.param(any_of, "any_of", id="no-client"),
        pytest.param(lambda: any_of("gpt"), "client", id="no-client-but-a-text"),
        pytest.param(lambda: any_of(Client), "client", id="a-class"),
        pytest.param(lambda: Route(Client("a"), gate="1/second"), "gate", id="no-gate"),
        pytest.param(lambda: Route(Client("a"), weight=-1), "weight", id="negative-weight"),
        pytest.param(lambda: Route(Client("a"), name=""), "name", id="empty-name"),
        pytest.param(lambda: any_of(Route(Client("a"), weight=0)), "weight", id="fallbacks-only"),
        pytest.param(lambda: any_of(*[Route(Client("a"), name="x")] * 2), "name", id="one-name-twice"),
        pytest.param(lambda: any_of(Client("a"), fallback={ServerError: "b"}), "'a', got 'b'", id="no-such-route"),
        pytest.param(lambda: any_of(Client("a"), fallback={"x": "a"}), "fallback", id="no-class-of-errors"),
        pytest.param(lambda: call(any_of(Client("a")), gate=Gate()), "each route has its own", id="a-gate-beside"),
        pytest.param(lambda: call(any_of(rxllm.function(len)), stream=True), "stream", id="one-cannot-stream"),
        pytest.param(lambda: routed(Client("a"), request=chat("a")), "routes", id="routed-without-routes"),
    ],
)
def test_a_wrong_argument_is_refused_at_once_by_its_name(make: Any, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make()


def test_a_pickle_has_what_it_is_made_of():
    small, big = rxllm.function(len), rxllm.function(str)
    routes = any_of(
        Route(small, gate=Gate("5/minute", concurrency=2), weight=2),
        Route(big, weight=0, name="big"),
        fallback={ContextOverflowError: "big"},
    )
    again = pickle.loads(pickle.dumps(routes))
    assert again.names == routes.names
    assert again.limits == [2, None]
    assert again.fallback(ContextOverflowError("long")) == 1
    assert again.fallback(ServerError("down")) is None


def test_it_closes_all_its_clients():
    clients = [Client("a"), Client("b")]
    with any_of(*clients):
        pass
    assert [client.closed for client in clients] == [1, 1]

    async def main() -> None:
        async with any_of(*clients, rxllm.function(len)):
            pass

    asyncio.run(main())
    assert [client.closed for client in clients] == [2, 2]


# spread


def test_prompts_are_answered_and_the_outcome_says_by_whom():
    outcome = one(any_of(Client("a"), Client("b")))
    assert (outcome.text, outcome.route) == ("a", "a")
    assert ways(outcome) == [(1, "a", None)]
    assert Outcome(request=chat("a"), error=DOWN).route is None


@pytest.mark.parametrize("window", [1, 40], ids=["one-at-a-time", "many-at-a-time"])
def test_attempts_spread_in_proportion_to_the_weights(window: int) -> None:
    routes = any_of(Route(Client("a"), weight=3), Client("b"), Route(Client("never"), weight=0))
    seen = run(routes, ["x"] * 200, window=window)
    assert Counter(outcome.route for outcome in seen.values) == {"a": 150, "b": 50}


def test_all_places_of_all_routes_are_used():
    gates = [Gate(concurrency=1), Gate(concurrency=3)]
    seen = run(any_of(*(Route(Client(name), gate=gate) for name, gate in zip("ab", gates, strict=True))), ["x"] * 40)
    assert seen.end is not None
    assert seen.end.at == 10.0  # four at a time
    assert Counter(outcome.route for outcome in seen.values) == {"a": 10, "b": 30}
    assert idle(*gates)


def test_several_keys_have_their_quotas_together():
    gates = [Gate(Quota(10, per=100.0, margin=0.0)) for _ in "abc"]
    routes = any_of(*(Route(Client("same"), gate=gate) for gate in gates))
    seen = run(routes, ["x"] * 60)
    assert [sum(event.at <= at for event in seen.events[:-1]) for at in (1.0, 100.0, 101.0)] == [30, 30, 60]
    assert {outcome.route for outcome in seen.values} == {"same", "same #2", "same #3"}


def test_who_waits_starts_at_the_first_route_that_has_a_place():
    slow, quick = Client("slow", (9.0, reply("slow"))), Client("quick", (2.0, reply("quick")))
    gates = [Gate(concurrency=1), Gate(concurrency=1)]
    routes = any_of(Route(slow, gate=gates[0]), Route(quick, gate=gates[1]))
    seen = run(routes, ["x"] * 5)
    assert [(event.at, event.value.route) for event in seen.events[:-1]] == [
        (2.0, "quick"),
        (4.0, "quick"),
        (6.0, "quick"),
        (8.0, "quick"),
        (9.0, "slow"),
    ]
    assert idle(*gates)


def test_each_client_estimates_its_own_costs():
    gates = [Gate(Quota(100, per=1e6, unit="tokens", margin=0.0)) for _ in "ab"]
    clients = [Client("a", (1.0, Reply(value="a"))), Client("b", (1.0, Reply(value="b")), tokens=60.0)]
    run(any_of(*(Route(client, gate=gate) for client, gate in zip(clients, gates, strict=True))), ["x"] * 2)
    assert [gate.statistics().quotas[0].available for gate in gates] == [99.0, 40.0]


def test_a_route_that_can_never_take_it_is_left_out_and_all_of_them_together_say_why():
    small = Route(Client("small", tokens=50.0), gate=Gate("10 tokens/minute"))
    big = Route(Client("big", tokens=50.0), gate=Gate("100 tokens/minute"))
    assert one(any_of(small, big)).route == "big"
    outcome = one(any_of(small, small.__class__(small.client, gate=small.gate, name="twin")))
    assert isinstance(outcome.error, InvalidRequestError)
    assert outcome.attempts == ()


def test_an_open_breaker_is_passed_by_but_for_its_probes():
    broken = failing("broken")
    gate = Gate(breaker=Breaker(seconds=5.0, failures=3, probe=1_000.0))
    seen = run(any_of(Route(broken, gate=gate), Client("good")), ["x"] * 400, window=4)
    assert all(outcome.route == "good" for outcome in seen.values)
    assert gate.is_shut
    assert len(broken.sent) < 20


def test_a_used_up_quota_ends_the_stream_only_when_all_are_used_up():
    def used_up(limit: float) -> Gate:
        return Gate(Quota(limit, per=1e6, on_exhausted="fail", margin=0.0))

    routes = any_of(Route(Client("a"), gate=used_up(2)), Route(Client("b"), gate=used_up(3)))
    seen = run(routes, ["x"] * 9, window=1)
    assert Counter(outcome.route for outcome in seen.values if outcome.ok) == {"a": 2, "b": 3}
    assert seen.end is not None
    assert isinstance(seen.end.value, QuotaExhaustedError)


def test_an_error_of_one_route_that_would_end_the_stream_does_not_when_another_has_one_for_the_request_only():
    counts_pages = Route(Client("a", tokens=50.0), gate=Gate("5 pages/minute"))  # which no cost names
    small = Route(Client("b", tokens=50.0), gate=Gate("10 tokens/minute"))
    seen = run(any_of(counts_pages, small), ["x", "y"], window=1)
    assert [type(outcome.error) for outcome in seen.values] == [InvalidRequestError] * 2
    seen = run(any_of(counts_pages), ["x", "y"], window=1)
    assert seen.end is not None
    assert isinstance(seen.end.value, ConfigError)


def test_a_gate_or_a_client_that_is_closed_leaves_the_others_and_all_closed_is_an_error():
    gate, open_one = Gate(), Client("open")
    gate.close()
    closed = rxllm.function(len)
    closed.close()
    routes = any_of(Route(Client("a"), gate=gate), closed, open_one)
    assert [outcome.route for outcome in run(routes, ["x"] * 6, window=1).values] == ["open"] * 6
    outcome = one(any_of(Route(Client("a"), gate=gate), closed))
    assert isinstance(outcome.error, ConfigError)


def test_one_that_waits_is_turned_away_by_all_gates_that_close():
    scheduler = VirtualScheduler()
    gates = [Gate(concurrency=1), Gate(concurrency=1)]
    routes = any_of(*(Route(Client(name), gate=gate) for name, gate in zip("ab", gates, strict=True)))
    seen = record(scheduler, rxllm.from_iterable(list("xyz")).pipe(call(routes, window=3)), until=0.5)
    gates[0].close()
    assert seen.events == []
    gates[1].close()
    scheduler.run()
    assert [type(outcome.error) for outcome in seen.values] == [ConfigError, type(None), type(None)]


# fail over


def test_a_transient_error_is_tried_elsewhere_and_counts_as_a_try():
    outcome = one(any_of(failing("a"), Client("b")))
    assert ways(outcome) == [(1, "a", ServerError), (2, "b", None)]
    assert outcome.route == "b"
    outcome = one(any_of(failing("a"), failing("b"), failing("c")), retry=Backoff(attempts=4, base=0.001, cap=0.001))
    assert [route for _, route, _ in ways(outcome)] in (["a", "b", "c", "a"], ["a", "b", "c", "b"])


def test_a_refusal_is_tried_elsewhere_at_once_whatever_hint_it_has():
    refused = RateLimitedError("slow down", 429, 30.0)
    outcome = one(any_of(failing("a", refused), Client("b")), retry=Backoff(attempts=1))
    assert ways(outcome) == [(1, "a", RateLimitedError), (2, "b", None)]
    assert outcome.seconds == 2.0


@pytest.mark.parametrize(
    ("hints", "soonest", "seconds"),
    [((70.0, 30.0), "b", 33.0), ((30.0, 70.0), "a", 33.0), ((30.0, None), "b", 3.0)],
    ids=["the-last", "the-first", "no-hint-is-no-wait"],
)
def test_when_all_refuse_it_waits_for_the_one_that_asks_for_the_shortest_time(
    hints: tuple[float, float | None], soonest: str, seconds: float
) -> None:
    refusals = [RateLimitedError("no", 429, hint) for hint in hints]
    lines = [[(1.0, refusal), (1.0, reply("good"))] for refusal in refusals]
    outcome = one(any_of(Client("a", *lines[0]), Client("b", *lines[1])))
    assert [route for _, route, _ in ways(outcome)] == ["a", "b", soonest]
    assert outcome.seconds == pytest.approx(seconds, abs=0.01)


def test_a_retry_waits_elsewhere_for_five_seconds_and_then_anywhere():
    gate = Gate(concurrency=1)
    flaky = Client("flaky", (1.0, DOWN), (1.0, reply("flaky")))
    slow = Client("slow", (99.0, reply("slow")))
    seen = run(any_of(Route(slow, gate=gate), flaky), ["x", "y"], ordered=True)
    assert [outcome.route for outcome in seen.values] == ["slow", "flaky"]
    outcome = seen.values[1]
    assert [attempt.route for attempt in outcome.attempts] == ["flaky", "flaky"]
    assert 5.0 <= outcome.attempts[1].started - 1.0 <= 5.1


def test_a_shut_route_is_no_elsewhere():
    gate = Gate(breaker=Breaker(seconds=0.5, failures=1, probe=1_000.0))
    scheduler = VirtualScheduler()
    for _ in range(2):
        record(scheduler, Script((0.5, DOWN)).pipe(admit(gate)), until=scheduler.seconds() + 0.6)
    assert gate.is_shut
    routes = any_of(Route(Client("broken"), gate=gate), Client("flaky", (1.0, DOWN), (1.0, reply("flaky"))))
    stream = rxllm.from_iterable(["x"]).pipe(call(routes, retry=Backoff(base=0.001, cap=0.001)))
    (outcome,) = record(scheduler, stream).values
    assert [attempt.route for attempt in outcome.attempts] == ["flaky", "flaky"]
    assert outcome.seconds < 3.0


def test_an_answer_clears_what_has_failed_before():
    flaky = Client("a", (1.0, DOWN), (1.0, reply("good")))
    outcome = one(any_of(flaky, Client("b", (1.0, reply("bad")))), validate=lambda answer: answer.text == "good")
    assert ways(outcome) == [(1, "a", ServerError), (2, "b", ValidationError), (3, "a", None)]


def test_a_route_whose_client_is_closed_leads_to_those_that_have_not_failed():
    closed = rxllm.function(len)
    closed.close()
    full = Gate(concurrency=1)
    slow = Client("slow", (2.0, reply("slow")))
    refusing = Client("refusing", (0, RateLimitedError("no", 429)), (0, reply("late")))
    routes = any_of(refusing, Route(closed, weight=1e6), Route(slow, gate=full), Route(slow, gate=full))
    routes.spread.start(0, routes.limits)  # so the turn is that of the closed one
    scheduler = VirtualScheduler()
    record(scheduler, Script((1.0, "busy")).pipe(admit(full)), until=0.0)
    seen = record(scheduler, rxllm.from_iterable(["x"]).pipe(call(routes, retry=Backoff(attempts=1))), until=0.5)
    assert full.statistics().waiting == 2  # once on each route
    scheduler.run()
    (outcome,) = seen.values
    assert ways(outcome) == [(1, "refusing", RateLimitedError), (2, "slow", None)]
    assert (len(slow.sent), len(refusing.sent)) == (1, 1)
    assert idle(full)


def test_fatal_errors_are_final():
    outcome = one(any_of(failing("a", AuthError("no", 401)), Client("b")))
    assert ways(outcome) == [(1, "a", AuthError)]


@settings(max_examples=40, deadline=None)
@given(
    fails=st.lists(st.sampled_from([DOWN, RateLimitedError("no", 429), None]), min_size=0, max_size=12),
    limits=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    items=st.integers(1, 12),
    dispose_at=st.one_of(st.none(), st.floats(0.1, 8.0)),
)
def test_every_request_has_one_outcome_and_no_place_is_lost_or_taken_twice(
    fails: list[Exception | None], limits: list[int], items: int, dispose_at: float | None
) -> None:
    gates = [Gate(concurrency=limit) for limit in limits]
    routes = []
    for number, gate in enumerate(gates):
        lines = [(1.0 + number, fail or reply("x")) for fail in fails[number::2]]
        routes.append(Route(Client(str(number), *lines, (0.7, reply("x"))), gate=gate))
    scheduler = VirtualScheduler()
    most = [0] * len(gates)

    def watch(_piece: object) -> None:
        for number, gate in enumerate(gates):
            most[number] = max(most[number], gate.in_flight)

    stream = rxllm.from_iterable([str(n) for n in range(items)]).pipe(
        call(any_of(*routes), retry=Backoff(attempts=50), on_chunk=lambda _request, piece: watch(piece), seed=1)
    )
    seen = record(scheduler, stream, dispose_at=dispose_at)
    assert idle(*gates)
    assert scheduler.pending == 0
    assert all(peak <= limit for peak, limit in zip(most, limits, strict=True))
    asked = [outcome.request.body["messages"][0]["content"] for outcome in seen.values]
    assert len(set(asked)) == len(asked)
    if dispose_at is None:
        assert len(asked) == items
        assert all(outcome.ok for outcome in seen.values)
        for outcome in seen.values:
            assert [attempt.number for attempt in outcome.attempts] == list(range(1, len(outcome.attempts) + 1))


@pytest.mark.parametrize("lines", [[(0, reply("a"))], [(0, RateLimitedError("no", 429)), (0, reply("a"))]])
def test_two_thousand_answers_at_once_need_no_stack(lines: list[Line]) -> None:
    seen = run(any_of(Client("a", *lines), Client("b", *lines)), ["x"] * 2_000, window=2_000)
    assert sum(outcome.ok for outcome in seen.values) == 2_000


# fall back


def overflowing(name: str = "small") -> Client:
    return failing(name, ContextOverflowError("too long", 400))


def test_a_fallback_takes_over_at_once_and_is_no_retry():
    routes = any_of(overflowing(), Route(Client("big"), weight=0, name="big"), fallback={ContextOverflowError: "big"})
    outcome = one(routes, retry=Backoff(attempts=1))
    assert ways(outcome) == [(1, "small", ContextOverflowError), (2, "big", None)]
    assert (outcome.route, outcome.seconds) == ("big", 2.0)


def test_further_tries_stay_with_the_fallback():
    big = Client("big", (1.0, DOWN), (1.0, reply("bad")), (1.0, reply("good")))
    routes = any_of(overflowing(), Client("other"), Route(big, weight=0), fallback={ContextOverflowError: "big"})
    for repair in (None, lambda request, _reply, _error: request):
        big.script = Script((1.0, DOWN), (1.0, reply("bad")), (1.0, reply("good")))
        routes.spread.__init__([1.0, 1.0, 0.0])  # type: ignore[misc]
        outcome = one(routes, validate=Validate(check=lambda answer: answer.text == "good", repair=repair))
        assert ways(outcome) == [
            (1, "small", ContextOverflowError),
            (2, "big", ServerError),
            (3, "big", ValidationError),
            (4, "big", None),
        ]


def test_a_fallback_that_fails_the_same_way_is_final_and_a_chain_ends():
    a, b = overflowing("a"), failing("b", AuthError("no", 401))
    routes = any_of(a, Route(overflowing("big"), weight=0), fallback={ContextOverflowError: "big"})
    assert [route for _, route, _ in ways(one(routes))] == ["a", "big"]
    routes = any_of(a, Route(b, weight=0), fallback={ContextOverflowError: "b", AuthError: "a"})
    assert [route for _, route, _ in ways(one(routes))] == ["a", "b"]


def test_a_fallback_may_be_for_transient_errors_and_for_those_above_them():
    routes = any_of(failing("a"), Route(Client("b"), weight=0), fallback={CallError: "b"})
    assert [route for _, route, _ in ways(one(routes, retry=Backoff(attempts=1)))] == ["a", "b"]


# with the rest of call


def test_a_deadline_stands_still_while_all_routes_are_suspended_and_only_then():
    def gate(n: float) -> Gate:
        return Gate(Quota(n, per=1_000.0, margin=0.0))

    both = [gate(1), gate(1)]
    routes = any_of(*(Route(Client(name), gate=one_gate) for name, one_gate in zip("ab", both, strict=True)))
    seen = run(routes, ["x"] * 4, deadline=100.0)
    assert [outcome.ok for outcome in seen.values] == [True] * 4
    stuck = Client("b", (500.0, reply("b")))
    routes = any_of(Route(Client("a"), gate=gate(1)), Route(stuck, gate=Gate(concurrency=1)))
    seen = run(routes, ["x"] * 3, deadline=100.0)
    assert sorted(outcome.ok for outcome in seen.values) == [False, False, True]
    assert all(isinstance(outcome.error, TimeoutError) for outcome in seen.values if not outcome.ok)


def test_the_window_is_that_of_all_gates():
    assert (
        any_of(Route(Client("a"), gate=Gate(concurrency=1)), Route(Client("b"), gate=Gate(concurrency=10))).window == 86
    )


def test_values_of_a_client_with_types_are_asked_for_again():
    wrong = ValidationError("no number")
    wrong.reply = reply("x")
    typed = Client("a", (1.0, wrong), (1.0, reply("7")))
    assert not one(any_of(typed)).ok
    typed.typed = True  # type: ignore[attr-defined]
    typed.script = Script((1.0, wrong), (1.0, reply("7")))
    assert one(any_of(typed)).text == "7"


def test_the_budget_is_that_of_the_route_that_failed():
    gates = [Gate(retry_budget=RetryBudget(share=0.0, spare=1)), Gate()]
    routes = any_of(Route(failing("a"), gate=gates[0]), Route(failing("b"), gate=gates[1]))
    outcome = one(routes)
    assert [route for _, route, _ in ways(outcome)] == ["a", "b", "a"]
    assert "retry budget" in str(outcome.error.__notes__)  # type: ignore[union-attr]
    budget = gates[0].retry_budget
    assert budget is not None
    assert (budget.retries, budget.denied) == (1, 1)


def test_pieces_of_a_try_elsewhere_come_after_a_sign():
    pieces: list[Any] = []
    outcome = one(any_of(failing("a"), Client("b")), on_chunk=lambda _request, piece: pieces.append(piece))
    assert outcome.text == "b"
    first, sign, last = pieces
    assert (first.text, last.text) == ("a", "b")
    assert isinstance(sign, Restarted)
    assert (sign.attempt, sign.error) == (2, DOWN)


def test_what_on_chunk_raises_at_the_sign_fails_the_request():
    def show(_request: Request, piece: object) -> None:
        if isinstance(piece, Restarted):
            raise KeyError("bug")

    gates = [Gate(concurrency=1), Gate(concurrency=1)]
    routes = any_of(Route(failing("a"), gate=gates[0]), Route(Client("b"), gate=gates[1]))
    outcome = one(routes, on_chunk=show)
    assert isinstance(outcome.error, KeyError)
    assert idle(*gates)


def test_a_hedge_goes_to_another_route():
    slow = Client("slow", *[(1.0, reply("slow"))] * LEARNED, (99.0, reply("slow")))
    gates = [Gate(concurrency=2), Gate(concurrency=2)]
    routes = any_of(
        Route(slow, gate=gates[0]), Route(Client("other", (0.5, reply("other"))), weight=0.001, gate=gates[1])
    )
    hedge = Hedge(share=1.0, least=2.0)
    scheduler = VirtualScheduler()
    record(scheduler, Script((1e6, "of another pipeline")).pipe(admit(gates[1])), until=0.0)
    stream = rxllm.from_iterable(["x"] * (2 * LEARNED)).pipe(call(routes, hedge=hedge, window=1))
    late = [outcome for outcome in record(scheduler, stream, until=1e5).values if len(outcome.attempts) > 1]
    assert late
    for outcome in late:
        assert [(attempt.route, attempt.hedged, type(attempt.error)) for attempt in outcome.attempts] == [
            ("slow", False, CancelledError),
            ("other", True, type(None)),
        ]
        assert outcome.route == "other"
    assert [gate.in_flight for gate in gates] == [0, 1]


@pytest.mark.parametrize("error", [RateLimitedError("no", 429), ContextOverflowError("long")], ids=str)
def test_a_hedge_that_is_refused_or_would_fall_back_is_not_sent_once_more(error: Exception) -> None:
    slow = Client("slow", *[(1.0, reply("slow"))] * LEARNED, (9.0, reply("slow")))
    other, third = Client("other", (0.5, error)), Client("third")
    routes = any_of(
        slow, Route(other, weight=1e-6), Route(third, weight=1e-7), fallback={ContextOverflowError: "third"}
    )
    for number in (1, 2):
        routes.spread.start(number, routes.limits)  # it is not their turn for long
    stream = rxllm.from_iterable(["x"] * (LEARNED + 1)).pipe(call(routes, hedge=Hedge(share=1.0, least=2.0), window=1))
    *_, outcome = record(VirtualScheduler(), stream).values
    assert ways(outcome) == [(2, "other", type(error)), (1, "slow", None)]
    assert (len(other.sent), len(third.sent)) == (1, 0)


@pytest.mark.parametrize("routed", [False, True], ids=["one-client", "routes"])
@pytest.mark.parametrize("repaired", [False, True], ids=["retried", "repaired"])
def test_a_request_keeps_its_place_in_the_queue(routed: bool, repaired: bool) -> None:
    lines = [(1.0, reply("bad") if repaired else DOWN), (1.0, reply("good"))]
    client, gate = Client("a", *lines), Gate(concurrency=1)
    checked = Validate(check=lambda answer: answer.text == "good", repair=lambda request, _reply, _error: request)
    settings: dict[str, Any] = {"validate": checked} if repaired else {}
    if routed:
        run(any_of(Route(client, gate=gate)), list("xyz"), **settings)
    else:
        run(client, list("xyz"), gate=gate, **settings)
    assert "".join(client.sent) == ("xxyz" if repaired else "xyxz")


def test_single_flight_and_routes_go_together():
    requests = [chat("same", temperature=0) for _ in range(4)]
    seen = run(any_of(Client("a"), Client("b")), requests, single_flight=True, ordered=True)
    assert [outcome.text for outcome in seen.values] == ["a"] * 4
    assert [outcome.route for outcome in seen.values] == ["a", None, None, None]


def test_it_is_the_operators_that_its_documentation_names():
    request, attempts = chat("a"), []
    stream = routed(any_of(failing("a"), Client("b")), request=request, note=attempts.append)
    scheduler = VirtualScheduler()
    piped = stream.pipe(retry(Backoff(base=0.001, cap=0.001)), to_outcome(request, attempts=attempts))
    (outcome,) = record(scheduler, piped).values
    assert ways(outcome) == [(1, "a", ServerError), (2, "b", None)]


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0, 1.5, 6.5], ids=lambda at: f"after-{at}-s")
def test_a_dispose_at_any_time_leaves_all_queues_and_wires(at: float) -> None:
    gates = [Gate(concurrency=1), Gate(concurrency=1)]
    scheduler = VirtualScheduler()
    routes = any_of(Route(failing("a"), gate=gates[0]), Route(Client("b", (9.0, reply("b"))), gate=gates[1]))
    stream = rxllm.from_iterable(list("xyz")).pipe(call(routes, retry=Backoff(base=0.001, cap=0.001)))
    record(scheduler, stream, dispose_at=at)
    assert idle(*gates)
    assert scheduler.pending == 0


def test_real_clients_with_several_keys():
    asked: list[str] = []

    def server(key: str) -> Any:
        def handler(*_call: Any) -> Response:
            asked.append(key)
            if key == "first-key":
                return Response(429, {"retry-after": "60"}, b'{"error":{"message":"slow down"}}')
            return Response(200, {}, b'{"choices":[{"message":{"content":"hello"},"finish_reason":"stop"}]}')

        return OpenAI("any", api_key=key, transport=MemoryTransport(handler))

    with any_of(server("first-key"), server("other-key")) as routes:
        (outcome,) = rxllm.collect(rxllm.from_iterable(["hi"]).pipe(call(routes)))
    assert outcome.text == "hello"
    assert asked == ["first-key", "other-key"]
    assert outcome.route == f"{routes.clients[0]!r} #2"
    with pytest.raises(ConfigError):
        routes.clients[1].send(chat("x"))


def test_weights_may_be_given_beside_the_clients():
    routes = any_of(rxllm.function(str.upper), Route(rxllm.function(str.title), weight=5), weights=(1, 3))
    assert [route.weight for route in routes.routes] == [1, 3]
    with pytest.raises(ConfigError, match="weights must be 2 numbers"):
        any_of(rxllm.function(str.upper), rxllm.function(str.title), weights=[1])
    with pytest.raises(ConfigError, match="weight"):
        any_of(rxllm.function(str.upper), weights=[-1])
