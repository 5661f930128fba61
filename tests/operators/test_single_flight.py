"""single_flight: equal streams that run at the same time are one; and what call merges."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import Observable
from reactivex import operators as ops

import rxllm
from rxllm import Backoff, Gate, Outcome, Reply, Request, Timeouts, Usage, call, chat
from rxllm.errors import ConfigError, InvalidRequestError, ServerError, TimeoutError, ValidationError
from rxllm.operators import flat_map
from rxllm.operators.single_flight import Flights, flight_key, single_flight
from rxllm.testing import Cold, Recorder, Script, VirtualScheduler, cold, record

Line = tuple[float, Any]

# around any stream


class Merging:
    """A stage whose items are keys: `a` and `A` are equal. Counts what is subscribed."""

    def __init__(self, scheduler: VirtualScheduler, diagram: str = "---x|") -> None:
        self.scheduler = scheduler
        self.diagram = diagram
        self.flights = Flights()
        self.made: list[Cold] = []
        self.leavers: dict[str, float] = {}  # item -> seconds after which it is disposed

    def __call__(self, item: str) -> Observable[tuple[str, Any]]:
        source = cold(self.scheduler, self.diagram)
        self.made.append(source)
        stream = source.pipe(single_flight(item.lower(), among=self.flights), ops.map(lambda value: (item, value)))
        leaves = self.leavers.get(item)
        return stream if leaves is None else stream.pipe(ops.take_until(rx.timer(leaves)))

    def run(self, items: str, **settings: Any) -> Recorder:
        seen = record(self.scheduler, cold(self.scheduler, items).pipe(flat_map(self, window=9, **settings)))
        assert len(self.flights) == self.scheduler.pending == 0
        return seen

    @property
    def subscribed(self) -> list[tuple[float, float | None]]:
        return [tuple(entry) for source in self.made for entry in source.subscriptions]


def told(seen: Recorder) -> list[tuple[float, Any]]:
    return [(event.at, event.value) for event in seen.events if event.kind == "next"]


def test_equal_ones_wait_for_the_one_that_is_on_its_way():
    merging = Merging(VirtualScheduler())
    seen = merging.run("aAb|")
    assert told(seen) == [(3.0, ("a", "x")), (3.0, ("A", "x")), (5.0, ("b", "x"))]
    assert merging.subscribed == [(0.0, 4.0), (2.0, 6.0)]


def test_one_that_comes_after_the_first_item_begins_anew():
    merging = Merging(VirtualScheduler(), "-x--|")
    seen = merging.run("a--A|")
    assert told(seen) == [(1.0, ("a", "x")), (4.0, ("A", "x"))]
    assert merging.subscribed == [(0.0, 4.0), (3.0, 7.0)]


def test_an_error_is_that_of_all_who_wait():
    merging = Merging(VirtualScheduler(), "---#")
    seen = merging.run("aA|")
    outcomes = [event.value for event in seen.events if event.kind == "next"]
    assert [outcome.request.body for outcome in outcomes] == ["a", "A"]
    assert outcomes[0].error is outcomes[1].error
    assert len(merging.subscribed) == 1


def test_an_empty_one_completes_for_all_who_wait():
    merging = Merging(VirtualScheduler(), "---|")
    seen = merging.run("aA|")
    assert [event.kind for event in seen.events] == ["completed"]
    assert merging.subscribed == [(0.0, 3.0)]


@settings(max_examples=60, deadline=None)
@given(
    items=st.lists(st.sampled_from("aAbB-"), max_size=8).map("".join),
    leavers=st.dictionaries(st.sampled_from("aAbB"), st.sampled_from([0.5, 1.5, 2.5]), max_size=4),
)
def test_nobody_sees_who_else_leaves_and_nothing_runs_for_nobody(items: str, leavers: dict[str, float]) -> None:
    merging = Merging(VirtualScheduler())
    merging.leavers = leavers
    seen = merging.run(f"{items}|")
    going: dict[str, list[float]] = {}  # key -> [when it began, when the last one who waits for it leaves]
    expected: list[tuple[float, tuple[str, str]]] = []
    flights: list[list[float]] = []
    for at, item in enumerate(items):
        if item == "-":
            continue
        flight = going.get(item.lower())
        if flight is None or flight[0] + 3 < at or flight[1] < at:  # who comes at the last moment is in time
            flight = going[item.lower()] = [float(at), 0.0]
            flights.append(flight)
        leaves = at + leavers.get(item, 99.0)
        flight[1] = max(flight[1], leaves)
        if leaves > flight[0] + 3:
            expected.append((flight[0] + 3, (item, "x")))
    assert sorted(told(seen)) == sorted(expected)
    assert merging.subscribed == [(began, min(began + 4, left)) for began, left in flights]


def test_streams_of_two_runs_are_not_merged():
    scheduler = VirtualScheduler()
    merging = Merging(scheduler)
    stage = flat_map(merging, window=9)
    record(scheduler, cold(scheduler, "a|").pipe(stage), until=0.0)
    record(scheduler, cold(scheduler, "a|").pipe(stage))
    assert merging.subscribed == [(0.0, 4.0), (0.0, 4.0)]


def test_without_a_key_nothing_is_merged():
    source = Script((1.0, "a"))
    assert source.pipe(single_flight(None, among=Flights())) is source


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(("a", {"among": {}}), "among"), (([], {"among": Flights()}), "key")],
    ids=["no-flights", "no-hash"],
)
def test_a_wrong_argument_is_refused_by_its_name(arguments: tuple[Any, dict[str, Any]], named: str) -> None:
    key, named_arguments = arguments
    with pytest.raises(ConfigError, match=named):
        single_flight(key, **named_arguments)


def test_two_thousand_who_wait_for_one_need_no_stack():
    merging = Merging(VirtualScheduler())
    seen = record(
        merging.scheduler, rxllm.from_iterable(["a"] * 2_000).pipe(flat_map(merging, window=2_000)), until=99.0
    )
    assert len(seen.values) == 2_000
    assert len(merging.subscribed) == 1


# what is equal


def key(**body: Any) -> bytes | None:
    return flight_key(Request(body={"messages": [], **body}))


def test_what_is_equal_does_not_depend_on_order_names_or_the_kind_of_zero():
    assert key(temperature=0, top_p=1) == key(top_p=1, temperature=0.0) is not None
    assert flight_key(Request(body={"seed": 1}, id="a", meta=1)) == flight_key(Request(body={"seed": 1}, id="b"))


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"temperature": 0.5},
        {"temperature": None},
        {"temperature": False},
        {"temperature": "0"},
        {"seed": None},
        {"temperature": 0, "stop": object()},
    ],
    ids=lambda body: ", ".join(f"{name} {value!r:.7}" for name, value in body.items()) or "neither",
)
def test_what_may_have_another_answer_or_cannot_be_compared_is_not_merged(body: dict[str, Any]) -> None:
    assert key(**body) is None
    assert flight_key(Request(body="temperature")) is None


@pytest.mark.parametrize(
    "other",
    [
        Request(body={"temperature": 0, "seed": 1, "n": 2}),
        Request(body={"temperature": 0, "seed": 2}),
        Request(body={"temperature": 0.5, "seed": 1}),
        Request(body={"temperature": 0, "seed": 1}, operation="completions"),
    ],
    ids=["another-field", "another-value", "another-temperature", "another-operation"],
)
def test_what_differs_is_not_merged(other: Request) -> None:
    assert flight_key(other) != flight_key(Request(body={"temperature": 0, "seed": 1}))


# inside call


class Client:
    """Answers in 2 s with a number that counts what was sent, but for the lines that it is given first."""

    def __init__(self, *lines: Line) -> None:
        self.script = Script(*lines) if lines else None
        self.sent: list[Request] = []

    def send(self, request: Request, *, timeouts: Timeouts = Timeouts()) -> Observable[Reply[Any]]:  # noqa: B008
        def begin(_scheduler: Any) -> Observable[Any]:
            self.sent.append(request)
            return self.script or Script((2.0, reply(len(self.sent))))

        return rx.defer(begin)

    def cost(self, request: Request) -> Mapping[str, float]:
        return {"requests": 1.0}

    def wrap(self, item: Any) -> Request:
        return chat(item, temperature=0)


def reply(value: Any) -> Reply[Any]:
    return Reply(value=value, usage=Usage(input_tokens=1, output_tokens=2))


def asked(n: int = 3, **params: Any) -> list[Request]:
    return [chat("same", id=str(number), meta=number, **(params or {"temperature": 0})) for number in range(n)]


def run(client: Any, items: Any, **settings: Any) -> list[Outcome[Any]]:
    scheduler = VirtualScheduler()
    settings = {"single_flight": True, "ordered": True, **settings}
    seen = record(scheduler, rxllm.from_iterable(items).pipe(call(client, **settings)))
    assert scheduler.pending == 0
    return seen.values


def test_each_gets_its_own_outcome_and_usage_is_counted_once():
    client = Client()
    requests = asked()
    outcomes = run(client, requests, gate=Gate("100/minute"))
    assert [outcome.request for outcome in outcomes] == requests
    assert [outcome.value for outcome in outcomes] == [1, 1, 1]
    assert [len(outcome.attempts) for outcome in outcomes] == [1, 0, 0]
    assert sum((outcome.usage for outcome in outcomes), Usage()).total_tokens == 3
    assert client.sent == requests[:1]


def test_prompts_of_the_same_text_are_equal_too():
    assert [outcome.value for outcome in run(Client(), ["a", "b", "a"])] == [1, 2, 1]


def test_it_is_off_unless_asked_for_and_never_merges_samples():
    assert [outcome.value for outcome in run(Client(), asked(), single_flight=False)] == [1, 2, 3]
    assert [outcome.value for outcome in run(Client(), asked(temperature=1.0))] == [1, 2, 3]


def test_what_was_answered_before_is_asked_again():
    assert [outcome.value for outcome in run(Client(), asked(), window=1)] == [1, 2, 3]


def test_clients_chosen_by_request_are_told_apart():
    clients = [Client(), Client()]
    outcomes = run(lambda request: clients[request.meta % 2], asked(4))
    assert [len(client.sent) for client in clients] == [1, 1]
    assert [len(outcome.attempts) for outcome in outcomes] == [1, 1, 0, 0]


def test_transient_errors_are_retried_once_for_all_and_a_fatal_one_fails_all():
    down, wrong = ServerError("down"), InvalidRequestError("no")
    client = Client((1.0, down), (1.0, reply("good")))
    outcomes = run(client, asked(), retry=Backoff(base=0.1, cap=0.1))
    assert [outcome.value for outcome in outcomes] == ["good"] * 3
    assert [len(outcome.attempts) for outcome in outcomes] == [2, 0, 0]
    outcomes = run(Client((1.0, wrong)), asked())
    assert [outcome.error for outcome in outcomes] == [wrong] * 3
    assert [len(outcome.attempts) for outcome in outcomes] == [1, 0, 0]


def test_one_check_and_one_repair_are_for_all():
    client = Client((1.0, reply("bad")), (1.0, reply("good")))
    outcomes = run(client, asked(), validate=lambda answer: answer.value == "good")
    assert [outcome.value for outcome in outcomes] == ["good"] * 3
    assert [type(attempt.error) for attempt in outcomes[0].attempts] == [ValidationError, type(None)]
    outcomes = run(Client((1.0, reply("bad"))), asked(), validate=lambda _answer: False)
    assert [len(outcome.attempts) for outcome in outcomes] == [3, 0, 0]
    assert {type(attempt.error) for attempt in outcomes[0].attempts} == {ValidationError}


def late_ones(scheduler: VirtualScheduler, *at: float) -> Observable[Request]:
    return rx.merge(
        *(
            rx.timer(seconds).pipe(ops.map(lambda _n, request=request: request))
            for seconds, request in zip(at, asked(len(at)), strict=True)
        )
    )


def test_when_the_one_that_asked_is_given_up_the_next_takes_over_the_attempt_and_its_record():
    scheduler = VirtualScheduler()
    client = Client((4.0, ServerError("down")), (9.0, reply("good")))
    stream = late_ones(scheduler, 0.0, 3.0, 6.0).pipe(
        call(client, single_flight=True, deadline=11.0, ordered=True, retry=Backoff(base=0.001, cap=0.001))
    )
    first, second, third = record(scheduler, stream).values
    assert isinstance(first.error, TimeoutError)
    assert (second.value, third.value) == ("good", "good")
    assert [len(outcome.attempts) for outcome in (first, second, third)] == [1, 1, 0]
    assert [outcome.attempts[-1].number for outcome in (first, second)] == [1, 2]
    assert second.usage.total_tokens == 3
    assert len(client.sent) == 2
    assert scheduler.pending == 0


def test_each_that_takes_over_tells_its_part_and_the_last_one_that_gives_up_cancels():
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=9)
    down = ServerError("down")
    client = Client((4.0, down), (6.0, down), (99.0, reply("late")))
    stream = late_ones(scheduler, 0.0, 3.0).pipe(
        call(client, gate=gate, single_flight=True, deadline=9.0, ordered=True, retry=Backoff(base=0.001, cap=0.001))
    )
    first, second = record(scheduler, stream).values
    assert [attempt.number for attempt in first.attempts] == [1]
    assert [attempt.number for attempt in second.attempts] == [2]
    assert gate.statistics().in_flight == gate.statistics().waiting == 0
    assert scheduler.pending == 0


def test_a_pipeline_that_is_disposed_leaves_nothing():
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    stream = rxllm.from_iterable(asked(9)).pipe(call(Client(), gate=gate, single_flight=True))
    seen = record(scheduler, stream, dispose_at=1.0)
    assert seen.events == []
    assert gate.statistics().in_flight == gate.statistics().waiting == scheduler.pending == 0


def test_pieces_of_merged_requests_are_not_shown():
    with pytest.raises(ConfigError, match="single_flight"):
        call(Client(), single_flight=True, on_chunk=print)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="single_flight"):
        call(Client(), single_flight=1)  # type: ignore[arg-type]
