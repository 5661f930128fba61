"""cache: what was answered before is not asked again; and what becomes of a run whose file is bad, full or shared."""

from __future__ import annotations

import asyncio
import enum
import logging
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import Observable
from reactivex import operators as ops
from reactivex.subject import Subject

import rxllm
from rxllm import OpenAI, Outcome, Reply, Request, Timeouts, Usage, any_of, call, chat, function
from rxllm.errors import (
    CallError,
    CancelledError,
    ConfigError,
    InvalidRequestError,
    QuotaExhaustedError,
    ServerError,
)
from rxllm.operators import _shelf
from rxllm.operators.budget import budget
from rxllm.operators.cache import cache
from rxllm.stores.cache import CacheFile
from rxllm.testing import Recorder, Script, SimulatedProvider, Taker, VirtualScheduler, record


class Client:
    """Answers in a second with what it is asked, in capitals; counts what is sent. A reply is kept as its body."""

    def __init__(self, model: str | None = "small", seconds: float = 1.0, **errors: Exception) -> None:
        self.model = model
        self.seconds = seconds
        self.errors = errors
        self.sent: list[str] = []

    def send(self, request: Request, *, timeouts: Timeouts = Timeouts()) -> Observable[Reply[str]]:  # noqa: B008
        text = prompt(request)

        def begin(_scheduler: Any) -> Observable[Any]:
            self.sent.append(text)
            return Script((self.seconds, self.errors.get(text) or self.restore(request, 200, text.upper().encode())))

        return rx.defer(begin)

    def restore(self, request: Request, status: int, body: bytes) -> Reply[str]:
        if body == b"OLD":
            raise CallError("no answer any more")
        text = body.decode()
        return Reply(value=text, text=text, raw=body, status=status, usage=Usage(input_tokens=1, output_tokens=2))

    def cost(self, request: Request) -> Mapping[str, float]:
        return {"requests": 1.0}

    def wrap(self, item: Any) -> Request:
        if not isinstance(item, str):
            raise InvalidRequestError(f"no prompt: {item!r}")
        return chat(item, temperature=0)


def prompt(request: Request) -> str:
    text: str = request.body["messages"][-1]["content"]
    return text


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


@pytest.fixture(autouse=True)
def logged(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "rxllm")
    return caplog


def run(operator: Any, items: Any) -> Recorder:
    scheduler = VirtualScheduler()
    seen = record(scheduler, rxllm.from_iterable(list(items) if isinstance(items, str) else items).pipe(operator))
    assert scheduler.pending == 0
    return seen


def names(path: Path) -> list[str]:
    return [entry.name for entry in path.parent.iterdir()]


def texts(seen: Recorder) -> list[str]:
    return [outcome.text for outcome in seen.values]


# what is found


def test_what_was_answered_is_not_asked_again(path: Path):
    client = Client()
    cached = cache(path, call(client))
    first = run(cached, ["a", "b"])
    assert (client.sent, texts(first)) == (["a", "b"], ["A", "B"])
    assert (cached.statistics().misses, cached.statistics().kept) == (2, 2)
    second = run(cached, ["b", "c", "a"])
    assert (client.sent, sorted(texts(second))) == (["a", "b", "c"], ["A", "B", "C"])
    assert (cached.statistics().hits, cached.statistics().misses) == (2, 1)
    assert [event.kind for event in second.events] == ["next"] * 3 + ["completed"]


def test_a_hit_is_the_outcome_of_its_own_request_with_the_reply_as_it_came_and_costs_nothing(path: Path):
    cached = cache(path, call(Client()))
    (asked,) = run(cached, [chat("a", temperature=0, id="first")]).values
    again = chat("a", temperature=0, id="second", meta={"row": 2})
    (found,) = run(cached, [again]).values
    assert found.request is again
    assert (found.reply, found.attempts, found.usage) == (asked.reply, (), Usage())
    assert asked.usage == Usage(input_tokens=1, output_tokens=2)


@pytest.mark.parametrize(
    "other",
    [
        chat("a", temperature=0, max_tokens=5),
        chat("a", temperature=0, model="big"),
        chat("a", temperature=0, system="Be brief."),
        Request(body=chat("a", temperature=0).body, operation="responses"),
    ],
    ids=["another-field", "another-model", "another-message", "another-operation"],
)
def test_what_is_asked_otherwise_is_asked(path: Path, other: Request):
    client = Client()
    run(cache(path, call(client)), ["a", other])
    assert len(client.sent) == 2


def test_another_model_is_asked_and_the_order_of_fields_says_nothing(path: Path):
    small, big = Client("small"), Client("big")
    run(cache(path, call(small)), [Request(body={"messages": [{"content": "a"}], "temperature": 0, "top_p": 1})])
    turned = Request(body={"top_p": 1, "temperature": 0, "messages": [{"content": "a"}]})
    run(cache(path, call(small)), [turned])
    assert len(small.sent) == 1
    run(cache(path, call(big)), [turned])
    assert len(big.sent) == 1


def test_what_was_found_comes_before_what_is_asked(path: Path):
    cached = cache(path, call(Client()))
    run(cached, ["b"])
    seen = run(cached, ["a", "b"])
    assert [(event.at, event.value.text) for event in seen.events[:-1]] == [(0.0, "B"), (1.0, "A")]


def test_equal_ones_after_the_answer_are_found_and_those_in_progress_are_all_sent(path: Path):
    client = Client()
    assert texts(run(cache(path, call(client, window=1)), ["a"] * 5)) == ["A"] * 5
    assert len(client.sent) == 1
    client.sent.clear()
    assert texts(run(cache(path, call(client, window=2)), ["b"] * 6)) == ["B"] * 6
    assert len(client.sent) == 2


def test_an_old_answer_is_asked_again(path: Path):
    client = Client()
    run(cache(path, call(client)), ["a"])
    run(cache(path, call(client), ttl=3_600.0), ["a"])
    assert client.sent == ["a"]
    run(cache(path, call(client), ttl=1e-9), ["a"])
    assert client.sent == ["a", "a"]


def test_what_the_client_does_not_take_for_an_answer_any_more_is_asked_again_and_replaced(path: Path):
    client = Client()
    cached = cache(path, call(client))
    run(cached, ["a"])
    file = CacheFile(path, ttl=None, most_bytes=1 << 20)
    (key,) = (row[0] for row in file._reader.execute("SELECT key FROM replies"))
    file.write({key: file.find([key])[key]._replace(body=b"OLD")})
    file.close()
    assert texts(run(cached, ["a"])) == ["A"]
    assert texts(run(cached, ["a"])) == ["A"]
    assert client.sent == ["a", "a"]


def test_what_was_used_last_stays_when_there_is_no_room(path: Path):
    client = Client()
    row = 1_100
    cached = cache(path, call(client, window=1), most_bytes=3 * row)
    long = {name: name * 900 for name in "abcd"}
    for name in "abcad":  # b goes
        run(cached, [long[name]])
    client.sent.clear()
    for name in "adcb":
        run(cached, [long[name]])
    assert client.sent == [long["b"]]


# what is not kept


def test_failed_requests_are_not_kept(path: Path):
    client = Client(a=InvalidRequestError("no"))
    cached = cache(path, call(client))
    for _ in range(2):
        (outcome,) = run(cached, ["a"]).values
        assert isinstance(outcome.error, InvalidRequestError)
    assert client.sent == ["a", "a"]
    assert cached.statistics().kept == 0


def test_an_answer_that_a_check_refused_is_not_kept(path: Path):
    client = Client()
    for _ in range(2):
        run(cache(path, call(client, validate=lambda reply: reply.text != "A")), ["a"])
    assert len(client.sent) == 6


def test_what_is_drawn_anew_each_time_is_cached_only_if_asked_and_that_is_said_once(
    path: Path, logged: pytest.LogCaptureFixture
):
    client = Client()
    drawn = [chat("a", id=str(n)) for n in range(3)]
    cached = cache(path, call(client, window=1))
    run(cached, drawn)
    assert (client.sent, cached.statistics().skipped) == (["a"] * 3, 3)
    (record,) = logged.records
    assert f"cache {path}: requests whose answers are drawn anew" in record.message
    client.sent.clear()
    run(cache(path, call(client, window=1), sampled=True), drawn)
    assert client.sent == ["a"]
    assert len(logged.records) == 1


def test_a_body_without_a_json_is_left_to_the_client(path: Path, logged: pytest.LogCaptureFixture):
    def shout(text: Any) -> str:
        return str(text).upper()

    cached = cache(path, call(function(shout), ordered=True))
    thing = {object, "x"}
    for _ in range(2):
        outcomes = rxllm.collect(rxllm.from_iterable(["a", thing]).pipe(cached))
        assert sorted(outcome.value for outcome in outcomes) == sorted(["A", str(thing).upper()])
    assert cached.statistics().skipped == 1
    assert all("has no JSON" in record.message for record in logged.records)


def test_what_is_no_request_fails_as_without_a_cache(path: Path):
    failed = Outcome(request=Request(body="line 3"), error=InvalidRequestError("line 3"))
    seen = run(cache(path, call(Client(), window=1, ordered=True)), [7, failed, "a"])
    assert [outcome.ok for outcome in seen.values] == [False, False, True]
    assert seen.values[1] is failed


def test_a_client_that_cannot_be_chosen_fails_its_item_only(path: Path):
    client = Client()

    def choose(request: Request) -> Any:
        if prompt(request) == "b":
            raise KeyError("no client")
        return client

    requests = [chat(word, temperature=0) for word in "abc"]
    seen = run(cache(path, call(choose, window=1, ordered=True)), requests)
    assert [outcome.ok for outcome in seen.values] == [True, False, True]


def test_an_operator_that_returns_no_stream_is_an_error(path: Path):
    class Asking(Client):
        def __call__(self, source: Any) -> int:
            return 5

        def request(self, item: Any) -> Request:
            return self.wrap(item)

        def client(self, request: Request) -> Any:
            return self

    (event,) = run(cache(path, Asking()), ["a"]).events  # type: ignore[arg-type]
    assert "operator must return an Observable, got int" in str(event.value)


# values of functions


@pytest.mark.parametrize("value", ["text", {"a": [1, 2.5, None, True]}, 0, None, []], ids=str)
def test_the_value_of_a_function_comes_back_as_it_was(path: Path, value: Any):
    calls: list[Any] = []

    def made(item: Any) -> Any:
        calls.append(item)
        return value

    for _ in range(2):
        (outcome,) = rxllm.collect(rxllm.from_iterable(["a"]).pipe(cache(path, call(function(made)))))
        assert (outcome.value, type(outcome.value)) == (value, type(value))
    assert calls == ["a"]


@pytest.mark.parametrize(
    ("reply", "calls"),
    [
        (Reply(value="A", usage=Usage(input_tokens=9), model="small"), 1),
        (Reply(value="A", text="A"), 1),
        (Reply(value="A", text="the letter A"), 2),
        (Reply(value=[1], raw=b"[1] as it came"), 1),
    ],
    ids=["without-text", "with-its-text", "with-another-text", "with-a-body-of-its-own"],
)
def test_a_reply_that_a_function_makes_is_kept_by_its_value(path: Path, reply: Reply[Any], calls: int):
    asked: list[Any] = []

    def made(item: Any) -> Reply[Any]:
        asked.append(item)
        return reply

    for _ in range(2):
        (outcome,) = rxllm.collect(rxllm.from_iterable(["a"]).pipe(cache(path, call(function(made)))))
        assert outcome.value == reply.value
    assert len(asked) == calls


class Word(enum.StrEnum):
    """Values that come back as plain texts."""

    YES = "yes"


class Odd:
    """A value that cannot even be compared."""

    def __eq__(self, other: object) -> bool:
        raise ValueError("ambiguous")

    __hash__ = None  # type: ignore[assignment]


@pytest.mark.parametrize(
    "value", [(1, 2), {1: 2}, Word.YES, float("nan"), b"a", object(), [Odd()]], ids=lambda v: type(v).__name__
)
def test_a_value_that_json_would_change_is_not_kept_and_that_is_said_once(
    path: Path, value: Any, logged: pytest.LogCaptureFixture
):
    calls: list[Any] = []

    def made(item: Any) -> Any:
        calls.append(item)
        return value

    cached = cache(path, call(function(made)))
    for _ in range(2):
        outcomes = rxllm.collect(rxllm.from_iterable(["a", "b"]).pipe(cached))
        assert all(outcome.value is value for outcome in outcomes)
    assert len(calls) == 4
    assert len(logged.records) == 2  # runs
    assert f"a value of type {type(value).__name__} is not cached" in logged.records[0].message


# several clients


def test_an_answer_is_understood_by_the_route_it_came_on(path: Path):
    class Other(Client):
        def restore(self, request: Request, status: int, body: bytes) -> Reply[str]:
            text = f"other {body.decode()}"
            return Reply(value=text, text=text, raw=body, status=status)

    small, other = Client(a=ServerError("down")), Other()
    routes = any_of(small, rxllm.Route(other, weight=0, name="other"), fallback={ServerError: "other"})
    for _ in range(2):
        assert texts(run(cache(path, call(routes)), ["a"])) == ["other A"]
    assert (small.sent, other.sent) == (["a"], ["a"])
    renamed = any_of(small, rxllm.Route(other, weight=0, name="new"), fallback={ServerError: "new"})
    assert texts(run(cache(path, call(renamed)), ["a"])) == ["other A"]
    assert other.sent == ["a", "a"]  # nobody knows the route any more


# around and inside of others


def test_what_is_found_costs_no_budget(path: Path):
    client = Client()
    run(cache(path, call(client)), [str(n) for n in range(50)])
    around = budget(cache(path, call(client)), requests=3)
    assert len(run(around, [str(n) for n in range(100)]).values) == 53
    inside = cache(path, budget(call(client), requests=3))
    assert len(run(inside, [str(n) for n in range(100)]).values) == 56
    assert inside.request("a").body == chat("a", temperature=0).body
    assert inside.client(inside.request("a")) is client


@settings(max_examples=12, deadline=None)
@given(
    words=st.lists(st.sampled_from("abcdefgh"), max_size=40),
    known=st.sets(st.sampled_from("abcdefgh")),
    window=st.integers(1, 9),
    limit=st.integers(1, 9),
)
def test_each_pulled_request_has_its_outcome_whatever_the_budget_inside(
    tmp_path_factory: pytest.TempPathFactory, words: list[str], known: set[str], window: int, limit: int
):
    path = tmp_path_factory.mktemp("budget") / "cache.db"
    run(cache(path, call(Client())), sorted(known))
    pulled: list[str] = []

    def counted() -> Iterator[str]:
        for word in words:
            pulled.append(word)
            yield word

    client = Client()
    seen = run(cache(path, budget(call(client, window=window), requests=limit)), counted())
    assert sorted(prompt(outcome.request) for outcome in seen.values) == sorted(pulled)
    assert all(outcome.ok or isinstance(outcome.error, CancelledError) for outcome in seen.values)
    assert all(outcome.text == prompt(outcome.request).upper() for outcome in seen.values if outcome.ok)
    assert len(client.sent) <= limit
    if len(client.sent) < limit:
        assert pulled == words
        assert all(outcome.ok for outcome in seen.values)
    assert not known & set(client.sent)


# demand and ends


def test_it_pulls_no_more_than_the_operator_and_the_consumer_have_room_for(path: Path):
    run(cache(path, call(Client())), ["0", "1", "2"])
    pulled: list[int] = []

    def numbers() -> Iterator[str]:
        for n in range(10_000):
            pulled.append(n)
            yield str(n)

    scheduler = VirtualScheduler()
    cached = cache(path, call(Client(), window=4, retry=rxllm.Backoff(attempts=1)))
    taker = Taker(scheduler, 3).connect(rxllm.from_iterable(numbers()).pipe(cached))
    scheduler.run()
    assert len(pulled) <= 3 + 3 + 4 + 3  # found, in progress, finished and taken
    for _ in range(40):
        taker.take(3)
        scheduler.run()
    assert len(pulled) > 100
    assert taker.subscription is not None
    taker.subscription.dispose()
    assert scheduler.pending == 0


def test_what_is_found_does_not_pile_up_before_a_slow_consumer(path: Path):
    client = Client(seconds=0.0)
    run(cache(path, call(client)), ["a"])
    pulled: list[int] = []

    def words() -> Iterator[str]:
        while True:
            pulled.append(1)
            yield "a"

    scheduler = VirtualScheduler()
    taker = Taker(scheduler, 3).connect(rxllm.from_iterable(words()).pipe(cache(path, call(client, window=9))))
    for _ in range(20):
        scheduler.run()
        assert len(taker.held) == 3
        assert len(pulled) - len(taker.taken) <= 3 + 9
        taker.take(2)
    assert client.sent == ["a"]
    assert taker.subscription is not None
    taker.subscription.dispose()


def test_a_source_that_does_not_wait_ends_the_stream_when_it_is_too_fast(path: Path):
    scheduler = VirtualScheduler()
    subject: Subject[str] = Subject()
    seen = record(scheduler, subject.pipe(cache(path, call(Client(), window=1))))
    for n in range(2_000):
        subject.on_next(str(n))
    scheduler.run()
    assert subject.observers == []
    assert seen.end is not None
    assert isinstance(seen.end.value, ConfigError)
    assert "from_iterable" in str(seen.end.value)


def test_an_operator_that_halts_ends_the_stream_after_what_was_found_and_all_that_was_pulled_is_told(path: Path):
    run(cache(path, call(Client())), ["c", "d"])
    pulled: list[str] = []

    def words() -> Iterator[str]:
        for word in "abcdefgh":
            pulled.append(word)
            yield word

    client = Client(seconds=0.0, b=QuotaExhaustedError("used up"))
    seen = run(cache(path, call(client, window=6)), words())
    assert client.sent == ["a", "b"]
    assert {outcome.text for outcome in seen.values if outcome.ok} >= {"C", "D"}
    assert sorted(prompt(outcome.request) for outcome in seen.values) == pulled
    assert any(isinstance(outcome.error, CancelledError) for outcome in seen.values)  # looked up in vain
    assert seen.end is not None
    assert isinstance(seen.end.value, QuotaExhaustedError)


def test_a_run_that_drains_asks_what_is_being_looked_up(path: Path):
    scheduler, client = VirtualScheduler(), Client()
    subject: Subject[str] = Subject()
    taker = Taker(scheduler, 9).connect(subject.pipe(cache(path, call(client))))
    subject.on_next("a")
    taker.flow.drain()
    assert subject.observers == []
    scheduler.run()
    assert ([outcome.ok for outcome in taker.held], client.sent) == ([True], ["a"])
    assert taker.ended is not None


def test_a_failed_source_ends_the_stream_after_what_came_before(path: Path):
    def words() -> Iterator[str]:
        yield "a"
        yield "b"
        raise KeyError("the source")

    seen = run(cache(path, call(Client())), words())
    assert sorted(texts(seen)) == ["A", "B"]
    assert seen.end is not None
    assert isinstance(seen.end.value, KeyError)


def test_disposing_releases_everything_and_keeps_what_has_come(path: Path):
    client, scheduler = Client(), VirtualScheduler()
    cached = cache(path, call(client, window=2))
    seen = record(scheduler, rxllm.from_iterable(list("abcdef")).pipe(cached), dispose_at=1.5)
    assert (sorted(texts(seen)), seen.end, scheduler.pending) == (["A", "B"], None, 0)
    assert not path.with_name("cache.db-wal").exists()  # the file is closed
    client.sent.clear()
    run(cached, "ab")
    assert client.sent == []


def test_disposing_before_anything_is_looked_up_leaves_nothing_due(path: Path):
    scheduler, client = VirtualScheduler(), Client()
    subject: Subject[str] = Subject()
    subscription = subject.pipe(cache(path, call(client))).subscribe(scheduler=scheduler)
    subject.on_next("a")
    subscription.dispose()
    assert (scheduler.pending, subject.observers, client.sent) == (0, [], [])


def test_a_dispose_inside_on_next_is_the_end(path: Path):
    client, scheduler = Client(), VirtualScheduler()
    run(cache(path, call(client)), "abc")
    seen = record(scheduler, rxllm.from_iterable(list("abcxyz")).pipe(cache(path, call(client)), ops.take(2)))
    assert (len(seen.values), scheduler.pending) == (2, 0)
    assert seen.end is not None


def test_one_operator_serves_two_subscriptions_at_once(path: Path):
    scheduler, client = VirtualScheduler(), Client()
    cached = cache(path, call(client))
    one = rxllm.from_iterable(list("ab")).pipe(cached)
    first, second = Recorder(scheduler), Recorder(scheduler)
    for seen in (first, second):
        one.subscribe(seen, scheduler=scheduler)  # type: ignore[arg-type]
    scheduler.run()
    assert sorted(texts(first)) == sorted(texts(second)) == ["A", "B"]


def test_ten_thousand_that_are_found_need_no_more_stack_than_ten(path: Path):
    client = Client(seconds=0.0)
    cached = cache(path, call(client, window=50), most_bytes=10**9)
    words = [f"{n}" for n in range(10_000)]
    assert len(run(cached, words[:10] * 1_000).values) == 10_000
    assert 10 <= len(client.sent) <= 60


# the file


def test_a_damaged_or_foreign_file_is_an_error_before_anything_is_asked(path: Path):
    path.write_bytes(b"id,prompt\n1,hello\n" * 100)
    client = Client()
    seen = run(cache(path, call(client)), "ab")
    assert client.sent == []
    (event,) = seen.events
    assert isinstance(event.value, ConfigError)
    assert str(path) in str(event.value)


def test_damage_that_is_met_later_ends_the_stream_after_what_is_in_progress(path: Path):
    words = [f"{n:04d}" * 200 for n in range(400)]
    run(cache(path, call(Client())), words)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xa5" * (size - size // 2))
    seen = run(cache(path, call(Client(), window=20)), ["new", *words])
    assert seen.end is not None
    assert isinstance(seen.end.value, ConfigError)
    assert "it is damaged" in str(seen.end.value)
    assert all(outcome.ok or outcome.error is seen.end.value for outcome in seen.values)
    assert len(seen.values) < 400  # nothing more was pulled


FULL = """
import logging, resource, signal, sys
import rxllm
logging.basicConfig(format="%(levelname)s %(message)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
from rxllm.operators.cache import cache
cached = cache(sys.argv[1], rxllm.call(rxllm.function(lambda n: "x" * 20_000), window=8))
for _ in range(2):
    outcomes = rxllm.collect(rxllm.from_iterable(range(60)).pipe(cached))
    print(len(outcomes), all(outcome.ok for outcome in outcomes))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a bound for files")
@pytest.mark.parametrize("room", [0, 400_000], ids=["from-the-start", "in-the-middle"])
def test_a_full_disk_lets_the_run_go_on_with_one_warning(path: Path, room: int):
    done = subprocess.run(
        [sys.executable, "-c", FULL, str(path), str(room)], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.stdout == "60 True\n60 True\n", done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr  # one a run
    assert all(line.startswith(f"WARNING cache {path}: ") and "cannot be written" in line for line in lines)


# for real


def test_a_server_is_asked_once(path: Path):
    asyncio.run(asked_twice(path))


async def asked_twice(path: Path) -> None:
    async with SimulatedProvider(latency=0.01) as server:
        client = OpenAI("any", server.url, api_key="none")
        async with client:
            cached = cache(path, call(client))
            requests = [chat(f"number {n}", temperature=0) for n in range(40)]
            first = await rxllm.acollect(rxllm.from_iterable(requests).pipe(cached))
            second = await rxllm.acollect(rxllm.from_iterable(requests).pipe(cached))
        assert len(server.log()) == 40
    by_text = {prompt(outcome.request): outcome for outcome in first}
    for found in second:
        asked = by_text[prompt(found.request)]
        assert (found.text, found.reply.raw, found.attempts) == (asked.text, asked.reply.raw, ())
    assert cached.statistics().hits == 40


def test_who_leaves_early_finds_what_came(path: Path):
    asked: list[int] = []
    cached = cache(path, call(function(lambda n: asked.append(n) or n), window=4))
    with rxllm.iterate(rxllm.from_iterable(range(1_000)).pipe(cached)) as outcomes:
        came = [next(outcomes).value for _ in range(30)]
    assert names(path) == ["cache.db"]  # it is closed
    before = len(asked)
    rxllm.collect(rxllm.from_iterable(came).pipe(cached))
    assert len(asked) == before


async def twenty_at_once(cached: Any, *, until: int) -> None:
    """Have twenty answers come in one turn, and wait until so many are kept while the stream goes on."""
    source = rx.concat(rxllm.from_iterable(range(20)), rx.never())
    subscription = source.pipe(cached).subscribe()
    while cached.statistics().kept < until:
        await asyncio.sleep(0.001)
    subscription.dispose()


async def double(n: int) -> int:
    return 2 * n


def test_what_comes_while_something_is_written_is_written_next(path: Path):
    cached = cache(path, call(function(double), window=20))
    asyncio.run(asyncio.wait_for(twenty_at_once(cached, until=20), 10))


def test_what_comes_faster_than_the_disk_takes_it_is_not_kept_and_that_is_said_once(
    path: Path, logged: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(_shelf, "MOST_WAITING", 2)
    cached = cache(path, call(function(double), window=20))
    asyncio.run(asyncio.wait_for(twenty_at_once(cached, until=3), 10))
    assert [record.message for record in logged.records] == [
        f"cache {path}: answers come faster than the disk takes them: some are not kept"
    ]


def test_who_leaves_at_once_leaves_nothing_open(path: Path):
    async def main() -> None:
        rxllm.from_iterable(range(9)).pipe(cache(path, call(function(abs)))).subscribe().dispose()
        while names(path) != ["cache.db"]:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(main(), 10))


SHARED = """
import sys
import rxllm
from rxllm.operators.cache import cache
asked = []
cached = cache(sys.argv[1], rxllm.call(rxllm.function(lambda n: asked.append(n) or n * n), window=8))
first = int(sys.argv[2])
outcomes = rxllm.collect(rxllm.from_iterable(range(first, first + 200)).pipe(cached))
assert all(outcome.value == outcome.request.body ** 2 for outcome in outcomes)
print(len(outcomes), len(asked) + cached.statistics().hits)
"""


def test_several_processes_share_a_file(path: Path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SHARED, str(path), str(first)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ,
        )
        for first in (0, 100)
    ]
    assert [process.communicate(timeout=50) for process in processes] == [("200 200\n", "")] * 2
    cached = cache(path, call(function(lambda n: n * n), window=8))
    rxllm.collect(rxllm.from_iterable(range(300)).pipe(cached))
    assert (cached.statistics().hits, cached.statistics().misses) == (300, 0)


# arguments


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"ttl": 0}, "ttl must be a finite number > 0 or None, got 0"),
        ({"most_bytes": 0}, "most_bytes must be a whole number >= 1, got 0"),
        ({"most_bytes": 1.5}, "most_bytes must be a whole number"),
        ({"sampled": 1}, "sampled must be True or False, got 1"),
    ],
    ids=["ttl", "no-bytes", "half-a-byte", "sampled"],
)
def test_a_wrong_argument_is_an_error(path: Path, arguments: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        cache(path, call(Client()), **arguments)


@pytest.mark.parametrize(
    ("where", "operator", "message"),
    [
        (7, call(Client()), "path must be a path, got 7"),
        ("", call(Client()), "path must be a path, got ''"),
        ("cache.db", ops.map(str), "operator must be what rxllm.call returns"),
        ("cache.db", Client(), "operator must be what rxllm.call returns"),
    ],
    ids=["a-number", "nothing", "any-operator", "a-client"],
)
def test_what_cannot_be_cached_is_an_error(where: Any, operator: Any, message: str):
    with pytest.raises(ConfigError, match=message):
        cache(where, operator)


@pytest.mark.parametrize("item", [(1, 2), float("nan"), b"x", {1: 2}], ids=["tuple", "nan", "bytes", "int-keys"])
def test_an_item_that_looks_like_another_one_in_json_is_not_cached(path: Path, item: Any, logged: Any):
    asked: list[Any] = []

    def once(given: Any) -> int:
        asked.append(given)
        return len(asked)

    cached = cache(path, call(function(once)))
    for _ in range(2):
        rxllm.collect(rxllm.from_iterable([item]).pipe(cached))
    assert (len(asked), cached.statistics().skipped) == (2, 1)
    assert f"an item of type {type(item).__name__} is not cached" in logged.text


def test_an_answer_is_kept_for_what_was_asked_though_the_function_changes_what_it_is_given(path: Path):
    def changing(item: dict[str, int]) -> int:
        item["x"] = 1
        return 7

    cached = cache(path, call(function(changing)))
    hits: list[int] = []
    for item in ({"a": 1}, {"a": 1, "x": 1}, {"a": 1}):
        rxllm.collect(rxllm.from_iterable([dict(item)]).pipe(cached))
        hits.append(cached.statistics().hits)
    assert hits == [0, 0, 1]
