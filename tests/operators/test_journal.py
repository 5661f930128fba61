"""journal: each outcome is in the file before it is emitted, and what is there is not asked again."""

import asyncio
import contextvars
import errno
import logging
import os
import sys
import threading
import time
from contextlib import contextmanager

import msgspec
import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import operators as ops
from reactivex.subject import Subject

import rxllm
from rxllm import Outcome, Reply, Request, Route, Usage, budget, call, chat
from rxllm.errors import (
    AuthError,
    ConfigError,
    DecodeError,
    InvalidRequestError,
    ServerError,
    StoreError,
)
from rxllm.operators import flat_map
from rxllm.operators.journal import Journaling, journal
from rxllm.stores.journal import JournalFile
from rxllm.testing import Recorder, Script, SimulatedProvider, Taker, VirtualScheduler, cold, record

JOURNAL = sys.modules["rxllm.operators.journal"]
USAGE = Usage(input_tokens=2, output_tokens=3)


class Scripted:
    """A client whose answers are scripted by prompt: seconds, or an error; it counts what is asked."""

    model = "m"

    def __init__(self, delay=1.0, **lines):
        self.delay = delay
        self.lines = lines
        self.asked = []
        self.scripts = []

    def send(self, request, *, timeouts=None):
        prompt = prompt_of(request)
        self.asked.append(prompt)
        line = self.lines.get(prompt, self.delay)
        raw = msgspec.json.encode({"text": prompt.upper()})
        reply = Reply(value=prompt.upper(), text=prompt.upper(), usage=USAGE, raw=raw, status=200)
        script = Script((self.delay, line) if isinstance(line, Exception) else (line, reply))
        self.scripts.append(script)
        return script

    def cost(self, request):
        return {"requests": 1.0}

    def wrap(self, item):
        if not isinstance(item, str):
            msg = f"expected a prompt, got {item!r}"
            raise InvalidRequestError(msg)
        return chat(item)

    def restore(self, request, status, body):
        try:
            text = msgspec.json.decode(body)["text"]
        except (msgspec.DecodeError, KeyError):
            raise DecodeError("no text", body=body) from None
        return Reply(value=text, text=text, usage=USAGE, raw=body, status=status)

    @property
    def active(self):
        return sum(script.active for script in self.scripts)


def prompt_of(request):
    return request.body["messages"][-1]["content"]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "results.jsonl"


def run(path, client, items, *, retry_failed=False, replay=True, operator=None, **settings):
    """Run all of `items` in virtual time; return what was emitted."""
    scheduler = VirtualScheduler()
    inner = call(client, **settings) if operator is None else operator
    stage = journal(path, inner, retry_failed=retry_failed, replay=replay)
    seen = record(scheduler, rxllm.from_iterable(items).pipe(stage))
    assert scheduler.pending == 0
    assert_free(path)
    return seen


def assert_free(path):
    JournalFile(path).close()


def texts(seen):
    return [outcome.text if outcome.ok else type(outcome.error).__name__ for outcome in seen.values]


def rows(path):
    return [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]


# the next run


def test_what_is_in_the_file_is_emitted_and_not_asked_again(path):
    client = Scripted()
    first = run(path, client, ["a", "b", "c"])
    second = run(path, client, ["c", "a", "d", "b"])
    assert client.asked == ["a", "b", "c", "d"]
    assert texts(first) == ["A", "B", "C"]
    assert texts(second) == ["C", "A", "B", "D"]  # the one that is asked takes its time
    assert second.end.kind == "completed"
    assert [one["response"]["body"]["text"] for one in rows(path)] == ["A", "B", "C", "D"]


def test_a_replayed_outcome_is_of_its_own_request_and_has_the_attempts_and_the_reply_of_then(path):
    client = Scripted()
    first = run(path, client, [chat("a", id="x", meta={"first": True})]).values[0]
    request = chat("a", id="x", meta={"first": False})
    (again,) = run(path, client, [request]).values
    assert again.request is request
    assert (again.reply, again.attempts, again.seconds) == (first.reply, first.attempts, first.seconds)
    assert again.usage == USAGE


def test_what_the_file_has_takes_its_place_when_the_call_keeps_the_order(path):
    client = Scripted()
    run(path, client, ["a", "c"])
    assert texts(run(path, client, ["a", "b", "c", "d"], ordered=True)) == ["A", "B", "C", "D"]
    assert client.asked == ["a", "c", "b", "d"]
    assert len(rows(path)) == 4


def test_a_failure_of_the_file_ends_a_stream_that_fails_with_its_requests(path):
    run(path, Scripted(b=InvalidRequestError("no")), ["a", "b"])
    seen = run(path, Scripted(), ["a", "b", "c"], on_failure="raise")
    assert texts(seen) == ["A"]
    assert (type(seen.end.value), str(seen.end.value)) == (InvalidRequestError, "no")
    assert len(rows(path)) == 2


def test_what_the_file_has_costs_a_budget_nothing(path):
    client = Scripted()
    run(path, client, ["a", "b", "c"])
    kept = budget(call(client, window=1), requests=2)
    assert texts(run(path, client, ["a", "d", "b", "c", "e", "f"], operator=kept)) == ["A", "D", "B", "C", "E"]
    assert kept.statistics().requests == 2
    assert client.asked == ["a", "b", "c", "d", "e"]


def test_a_journal_around_a_journal_hands_on_what_it_has(path):
    client = Scripted()
    run(path, client, ["a", "b"])
    inner = journal(path.with_name("inner.jsonl"), call(client, ordered=True))
    assert texts(run(path, client, ["a", "c", "b"], operator=inner)) == ["A", "C", "B"]
    assert client.asked == ["a", "b", "c"]
    assert len(rows(path.with_name("inner.jsonl"))) == 1


def test_rows_that_cannot_be_read_any_more_are_asked_again_and_said_once(path, caplog):
    client, items = Scripted(), list("abcde")
    run(path, client, items)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"seconds":1.0', b'"seconds":-1.0')
    lines[3] = lines[3].replace(b'{"text":"D"}', b'{"lost":"D"}')
    path.write_bytes(b"".join(lines))
    caplog.set_level(logging.INFO)
    assert sorted(texts(run(path, client, items))) == list("ABCDE")
    assert client.asked == [*items, "b", "d"]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]
    assert "2 rows could not be read" in caplog.text


@settings(deadline=None, max_examples=30)
@given(first=st.lists(st.sampled_from("abc"), max_size=8), second=st.lists(st.sampled_from("abc"), max_size=8))
def test_equal_requests_are_counted_and_not_merged(tmp_path_factory, first, second):
    path = tmp_path_factory.mktemp("journal") / "results.jsonl"
    client = Scripted()
    assert sorted(texts(run(path, client, first))) == sorted(item.upper() for item in first)
    before = list(client.asked)
    assert sorted(texts(run(path, client, second))) == sorted(item.upper() for item in second)
    for letter in "abc":
        assert client.asked.count(letter) == max(first.count(letter), second.count(letter))
    assert before == first


def test_one_request_object_given_many_times_is_as_many_requests(path):
    client, request = Scripted(), chat("a")
    assert texts(run(path, client, [request] * 3)) == ["A"] * 3
    assert len({one["id"] for one in rows(path)}) == 3
    assert texts(run(path, client, [request] * 4)) == ["A"] * 4
    assert len(client.asked) == 4


@pytest.mark.parametrize(
    "changed",
    [chat("b", id="x"), chat("a", id="y"), chat("a", id="x", temperature=1.0), chat("a"), chat("a", id="x", model="o")],
    ids=["the-prompt", "the-id", "a-parameter", "no-id", "the-model"],
)
def test_a_request_that_has_changed_is_asked_again(path, changed):
    client = Scripted()
    run(path, client, [chat("a", id="x")])
    run(path, client, [changed])
    assert len(client.asked) == 2
    assert len(rows(path)) == 2


def test_another_model_of_the_client_is_asked_again(path):
    client = Scripted()
    run(path, client, ["a"])
    client.model = "n"
    run(path, client, ["a"])
    assert client.asked == ["a", "a"]


def test_without_replay_what_is_in_the_file_is_skipped(path):
    client = Scripted()
    run(path, client, ["a", "b"])
    assert texts(run(path, client, ["a", "c", "b"], replay=False)) == ["C"]
    assert client.asked == ["a", "b", "c"]


def test_failed_ones_are_done_unless_they_are_to_be_retried(path):
    client = Scripted(b=ServerError("down"))
    assert texts(run(path, client, ["a", "b"], retry=rxllm.Backoff(attempts=1))) == ["A", "ServerError"]
    again = run(path, client, ["a", "b"])
    assert texts(again) == ["A", "ServerError"]
    assert again.values[1].attempts[0].error.message == "down"
    assert client.asked == ["a", "b"]
    client.lines.clear()
    assert texts(run(path, client, ["a", "b"], retry_failed=True)) == ["A", "B"]
    assert client.asked == ["a", "b", "b"]
    assert texts(run(path, client, ["a", "b"])) == ["A", "B"]  # the last line wins
    assert [one["rxllm"].get("ok", True) for one in rows(path)] == [True, False, True]


def test_a_failure_that_says_nothing_of_the_request_is_asked_again(path):
    client = Scripted(a=AuthError("no such key", 401))
    assert texts(run(path, client, ["a"])) == ["AuthError"]
    client.lines.clear()
    assert texts(run(path, client, ["a"])) == ["A"]


def test_an_id_of_two_requests_fails_the_second_and_sends_it_not(path):
    client = Scripted()
    seen = run(path, client, [chat("a", id="x"), chat("b", id="x"), chat("a", id="x"), chat("c", id="y")])
    assert sorted(texts(seen)) == ["A", "A", "C", "InvalidRequestError"]
    assert client.asked == ["a", "a", "c"]
    (failed,) = [outcome for outcome in seen.values if not outcome.ok]
    assert "the id 'x' is that of another request of this run" in str(failed.error)
    assert prompt_of(failed.request) == "b"
    assert len(rows(path)) == 3


def test_bad_items_pass_through_and_are_not_written(path):
    client = Scripted()
    bad = Outcome(request=Request(body="{", operation="line"), error=InvalidRequestError("line 3: not JSON"))
    items = ["a", bad, 5, Request(body=object())]
    seen = run(path, client, items)
    assert sorted(texts(seen)) == ["A"] + ["InvalidRequestError"] * 3
    assert bad in seen.values
    assert {str(o.error) for o in seen.values if not o.ok} > {"line 3: not JSON", "expected a prompt, got 5"}
    assert client.asked == ["a"]
    assert len(rows(path)) == 1


def test_a_choice_of_clients_that_raises_fails_that_request_alone(path):
    client = Scripted()
    choosing = call(lambda request: {"a": client, "c": client}[prompt_of(request)])
    seen = run(path, client, [chat("a"), chat("b"), chat("c")], operator=choosing)
    assert sorted(texts(seen)) == ["A", "C", "KeyError"]
    assert len(rows(path)) == 2


def test_bad_items_end_a_stream_that_is_to_raise(path):
    seen = run(path, Scripted(), ["a", 5], on_failure="raise")
    assert type(seen.end.value) is InvalidRequestError


def test_a_line_that_cannot_be_made_a_reply_any_more_is_asked_again(path, caplog):
    client = Scripted()
    run(path, client, [chat("a", id="x")])
    path.write_bytes(path.read_bytes().replace(b'{"text":"A"}', b'{"lost":"A"}'))
    assert texts(run(path, client, [chat("a", id="x")])) == ["A"]
    assert client.asked == ["a", "a"]
    assert "the row of x cannot be read, so it is asked again: no text" in caplog.text


def test_a_client_that_cannot_restore_is_named(path):
    client = Scripted()
    run(path, client, ["a"])
    client.restore = None
    seen = run(path, client, ["a"])
    assert type(seen.end.value) is ConfigError
    assert "cannot make a reply of a body: give it a restore(request, status, body)" in str(seen.end.value)
    assert texts(run(path, client, ["a"], replay=False)) == []


# the file


def test_an_outcome_is_in_the_file_when_it_is_emitted_and_those_of_a_turn_are_one_write(path, monkeypatch):
    scheduler, writes, missing = VirtualScheduler(), [], []
    append = JournalFile.append
    monkeypatch.setattr(
        JournalFile, "append", lambda self, data: (writes.append(data.count(b"\n")), append(self, data))[1]
    )
    client = Scripted(a=2.0, b=2.0, c=3.0)
    stage = journal(path, call(client))

    class Looking(Recorder):
        def on_next(self, value):
            super().on_next(value)
            missing.append(value.text.encode() not in path.read_bytes())

    seen = Looking(scheduler)
    rxllm.from_iterable(list("abc")).pipe(stage).subscribe(seen, scheduler=scheduler)
    scheduler.run()
    assert [(event.at, event.kind) for event in seen.events] == [
        (2.0, "next"),
        (2.0, "next"),
        (3.0, "next"),
        (3.0, "completed"),
    ]
    assert missing == [False] * 3
    assert writes == [2, 1]


def test_what_was_answered_is_written_though_the_consumer_has_no_room(path):
    scheduler, client = VirtualScheduler(), Scripted()
    taker = Taker(scheduler, 1).connect(
        rxllm.from_iterable(list("abcdefghij")).pipe(journal(path, call(client, window=4)))
    )
    scheduler.run(5.0)
    assert len(client.asked) == len(rows(path)) == 1 + 4 + 1  # taken, the window, and what the consumer has ready
    assert client.active == 0
    for _ in range(10):
        taker.take()
        scheduler.run(scheduler.seconds() + 2.0)
    assert len(taker.taken) == len(rows(path)) == 10
    assert taker.ended.kind == "completed"


def test_replays_that_the_consumer_has_no_room_for_are_bounded(path):
    scheduler, client, pulled = VirtualScheduler(), Scripted(), []
    items = [f"{number}" for number in range(200)]
    run(path, client, items)
    source = rxllm.from_iterable(pulled.append(item) or item for item in items)
    taker = Taker(scheduler, 2).connect(source.pipe(journal(path, call(client, window=4))))
    scheduler.run()
    assert 2 <= len(pulled) <= 2 + 4 + 2
    while not taker.ended:
        assert len(pulled) - len(taker.taken) <= 2 + 4 + 2
        taker.take(2)
        scheduler.run()
    taker.take(9)
    assert [outcome.text for outcome in taker.taken] == items
    assert len(client.asked) == 200


def test_a_stage_behind_it_keeps_its_window_full(path):
    scheduler, client, later = VirtualScheduler(), Scripted(), Script((4.0, "x"))
    stage = journal(path, call(client, window=8))
    stream = rxllm.from_iterable(str(number) for number in range(24)).pipe(stage, flat_map(lambda _: later, window=4))
    seen = record(scheduler, stream)
    assert len(seen.values) == 24
    assert later.most == 4
    assert scheduler.seconds() == 1.0 + 24 / 4 * 4.0


def test_a_source_that_does_not_wait_fails_with_a_hint(path):
    client = Scripted()
    run(path, client, [str(number) for number in range(3_000)])
    scheduler = VirtualScheduler()
    source = rx.from_iterable([str(number) for number in range(3_000)])
    taker = Taker(scheduler, 1).connect(source.pipe(journal(path, call(client, window=4))))
    scheduler.run()
    while not taker.ended and taker.held:
        taker.take(100)
        scheduler.run()
    assert "use rxllm.from_iterable" in str(taker.ended.value)


@pytest.mark.parametrize("end", ["on_completed", "on_error"])
def test_a_source_that_ends_while_a_turn_is_emitted_loses_none_of_it(path, end):
    scheduler, source = VirtualScheduler(), Subject()
    seen = Recorder(scheduler)
    ending = getattr(source, end)
    stream = source.pipe(
        journal(path, call(Scripted())),
        ops.do_action(lambda _: ending() if end == "on_completed" else ending(BoomError())),
    )
    stream.subscribe(seen, scheduler=scheduler)
    for item in "abc":
        source.on_next(item)
    scheduler.run()
    assert texts(seen) == ["A", "B", "C"]
    assert seen.end.kind == end.replace("on_", "")
    assert len(rows(path)) == 3
    assert_free(path)


class BoomError(Exception):
    """What a source fails with."""


def test_a_dispose_writes_what_has_come_and_releases_everything(path):
    scheduler, client = VirtualScheduler(), Scripted(a=1.0, b=1.0, c=9.0)
    stage = journal(path, call(client))
    seen = Recorder(scheduler)
    answer = client.send

    def disposing(request, *, timeouts=None):  # in the turn in which a and b are answered, before they are emitted
        script = answer(request)
        if prompt_of(request) == "b":
            scheduler.call_later(1.0, seen.dispose)
        return script

    client.send = disposing
    seen.subscription = rxllm.from_iterable(list("abc")).pipe(stage).subscribe(seen, scheduler=scheduler)
    scheduler.run(2.0)
    assert seen.events == []
    assert {one["response"]["body"]["text"] for one in rows(path)} >= {"A"}
    assert (client.active, scheduler.pending) == (0, 0)
    asked = len(rows(path))
    client.send = answer
    assert sorted(texts(run(path, client, list("abc")))) == ["A", "B", "C"]
    assert len(client.asked) == 3 + 3 - asked


def test_a_dispose_inside_on_next_and_another_one_are_harmless(path):
    scheduler, client = VirtualScheduler(), Scripted()
    seen = Recorder(scheduler)
    seen.on_next = lambda value: (seen.events.append(value), seen.dispose(), seen.dispose())
    seen.subscription = (
        rxllm.from_iterable(list("abc")).pipe(journal(path, call(client))).subscribe(seen, scheduler=scheduler)
    )
    scheduler.run()
    assert len(seen.events) == 1
    assert len(rows(path)) == 3
    assert_free(path)


def test_a_consumer_that_raises_sees_its_exception_and_the_file_is_left(path):
    scheduler, client = VirtualScheduler(), Scripted()

    def raises(_value):
        raise ZeroDivisionError

    rxllm.from_iterable(list("abc")).pipe(journal(path, call(client))).subscribe(raises, scheduler=scheduler)
    with pytest.raises(ZeroDivisionError):
        scheduler.run()
    assert len(rows(path)) == 3
    assert_free(path)


def test_take_releases_the_calls_in_flight_and_the_file(path):
    scheduler, client = VirtualScheduler(), Scripted(b=5.0)
    seen = record(scheduler, rxllm.from_iterable(list("abc")).pipe(journal(path, call(client)), ops.take(1)))
    assert texts(seen) == ["A"]
    assert client.active == 0
    assert scheduler.pending == 0
    assert_free(path)


def test_what_has_come_is_emitted_before_the_error_of_the_source(path):
    scheduler, client = VirtualScheduler(), Scripted()
    seen = record(scheduler, cold(scheduler, "ab#").pipe(journal(path, call(client))))
    assert [event.kind for event in seen.events] == ["next", "next", "error"]
    assert len(rows(path)) == 2


@pytest.mark.parametrize("items", ["", "a", "abc"], ids=lambda items: f"{len(items)}-items")
def test_a_source_that_is_over_before_subscribe_returns_is_passed_on_whole(path, items):
    scheduler, client = VirtualScheduler(), Scripted(delay=0.0)
    seen = record(scheduler, rx.from_iterable(items).pipe(journal(path, call(client))))
    assert sorted(texts(seen)) == sorted(items.upper())
    assert seen.end.kind == "completed"
    assert scheduler.pending == 0


def test_ten_thousand_requests_that_are_answered_or_replayed_at_once_need_no_more_stack_than_ten(path):
    items = [f"{number}" for number in range(10_000)]
    depths = []

    def deepest(value):
        frame, depth = sys._getframe(), 0
        while frame := frame.f_back:
            depth += 1
        depths.append(depth)

    client = Scripted(delay=0.0)
    for _ in range(2):
        scheduler = VirtualScheduler()
        rx.from_iterable(items[:10]).pipe(journal(path.with_name("ten"), call(client))).subscribe(
            deepest, scheduler=scheduler
        )
        scheduler.run()
        few = max(depths)
        depths.clear()
        rxllm.from_iterable(items).pipe(journal(path, call(client))).subscribe(deepest, scheduler=scheduler)
        scheduler.run()
        assert (len(depths), max(depths) <= few + 3) == (10_000, True)
        depths.clear()
    assert len(client.asked) == 10_010


def test_two_runs_at_a_time_cannot_share_a_file_and_one_after_another_can(path):
    scheduler, client = VirtualScheduler(), Scripted()
    stream = rxllm.from_iterable(["a", "b"]).pipe(journal(path, call(client)))
    first, second = Recorder(scheduler), Recorder(scheduler)
    stream.subscribe(first, scheduler=scheduler)
    stream.subscribe(second, scheduler=scheduler)
    scheduler.run()
    assert texts(first) == ["A", "B"]
    assert "in use by another run" in str(second.end.value)
    assert texts(record(scheduler, stream)) == ["A", "B"]
    assert client.asked == ["a", "b"]


def test_a_file_that_cannot_be_used_ends_the_stream_before_anything_is_pulled(tmp_path):
    scheduler, client, pulled = VirtualScheduler(), Scripted(), []
    (tmp_path / "bad.jsonl").write_bytes(b'{"no": "row"}\n')
    source = rxllm.from_iterable(pulled.append(item) or item for item in "abc")
    seen = record(scheduler, source.pipe(journal(tmp_path / "bad.jsonl", call(client))))
    assert type(seen.end.value) is ConfigError
    assert "bad.jsonl', line 1" in str(seen.end.value)
    assert pulled == client.asked == []


# a full disk


@contextmanager
def room_for(size_bytes):
    """Let no file of this process grow beyond that, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_ends_the_stream_after_those_on_the_wire_and_loses_none_of_them(path):
    client, pulled = Scripted(c=3.0, d=3.0), []
    run(path, client, ["first"])
    size = path.stat().st_size
    scheduler = VirtualScheduler()
    source = rxllm.from_iterable(pulled.append(item) or item for item in "abcdefghijkl")
    with room_for(2 * size + 10):  # for one row more, and not for the two that come first
        seen = record(scheduler, source.pipe(journal(path, call(client, window=4))))
    assert sorted(texts(seen)) == ["A", "B", "C", "D"]  # nothing more was asked
    assert type(seen.end.value) is StoreError
    assert seen.end.value.halts is True
    assert "results.jsonl' cannot be written: File too large; 3 outcomes are not in it" in str(seen.end.value)
    assert pulled == list("abcd")
    assert path.read_bytes().endswith(b"}\n")
    assert len(rows(path)) == 2
    assert scheduler.pending == 0
    assert sorted(texts(run(path, client, list("abcdefghijkl")))) == sorted("ABCDEFGHIJKL")
    assert len(client.asked) == 1 + 12 + 3  # those that are not in it, once more


def test_a_disk_that_fails_later_halts_the_stream_too(path, monkeypatch):
    def fails(_descriptor):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fails)
    seen = run(path, Scripted(), (str(number) for number in range(100)), window=1)
    assert type(seen.end.value) is StoreError
    assert "cannot be written: Input/output error" in str(seen.end.value)
    assert len(seen.values) == len(rows(path)) < 5  # a second's worth


# what is journaled


class Around:
    """An operator around `call` that does something to its outcomes."""

    def __init__(self, client, change):
        self.inner = call(client)
        self.request, self.client = self.inner.request, self.inner.client
        self.change = change

    def __call__(self, source):
        return self.inner(source).pipe(ops.map(self.change))


def test_an_outcome_of_a_copy_of_the_request_is_known_by_its_id(path):
    client = Scripted()
    around = Around(client, lambda outcome: outcome.trim())
    assert texts(run(path, client, [chat("a", id="x"), chat("b", id="y")], operator=around)) == ["A", "B"]
    assert {one["custom_id"] for one in rows(path)} == {"x", "y"}


def test_an_outcome_of_no_request_that_was_given_is_an_error(path):
    client = Scripted(a=1.0, b=1.0)
    around = Around(client, lambda outcome: outcome if outcome.text == "A" else outcome.trim())
    seen = run(path, client, ["a", "b"], operator=around)
    assert texts(seen) == ["A"]
    assert "gave an outcome of a request that it was not given" in str(seen.end.value)
    assert len(rows(path)) == 1


def test_an_operator_that_drops_outcomes_goes_on(path):
    client = Scripted()

    class Dropping(Around):
        def __call__(self, source):
            return call(client, window=1)(source).pipe(ops.filter(lambda outcome: outcome.text == "C"))

    assert texts(run(path, client, list("abc"), operator=Dropping(client, None))) == ["C"]
    assert client.asked == ["a", "b", "c"]
    assert len(rows(path)) == 1


def test_an_operator_of_stock_parts_works_too(path):
    client = Scripted()

    class Stock(Around):
        def __call__(self, source):
            answer = client.restore
            return source.pipe(
                ops.map(lambda r: Outcome(request=r, reply=answer(r, 200, b'{"text": "%b"}' % prompt_of(r).encode())))
            )

    items = [str(number) for number in range(1_000)]
    assert texts(run(path, client, items, operator=Stock(client, None))) == items
    assert texts(run(path, client, items, operator=Stock(client, None))) == items


def test_a_journal_is_itself_what_can_be_journaled(path):
    client = Scripted()
    inner = journal(path.with_name("inner.jsonl"), call(client))
    assert inner.request("a").body == chat("a").body
    assert inner.client(chat("a")) is client
    assert texts(run(path, client, ["a", "b"], operator=inner)) == ["A", "B"]
    assert texts(run(path.with_name("third.jsonl"), client, ["a", "b"], operator=inner)) == ["A", "B"]
    assert client.asked == ["a", "b"]


def test_each_reply_is_restored_by_the_client_that_gave_it(path):
    class Named(Scripted):
        def __init__(self, name):
            super().__init__()
            self.name = name

        def restore(self, request, status, body):
            return Reply(value=self.name)

    one, other = Named("one"), Named("other")
    routes = rxllm.any_of(rxllm.Route(one, name="one"), rxllm.Route(other, name="other"))
    first = run(path, one, ["a", "b", "c", "d"], operator=call(routes))
    again = run(path, one, ["a", "b", "c", "d"], operator=call(routes))
    who = {prompt_of(outcome.request): outcome.route for outcome in first.values}
    assert {prompt_of(outcome.request): outcome.value for outcome in again.values} == who
    assert set(who.values()) == {"one", "other"}


def test_values_of_functions_come_back_as_json_has_them(path, caplog):
    calls = []
    values = {"text": "x", "pair": (1, 2), "none": None, "thing": object(), "other": object()}
    client = rxllm.function(lambda item: calls.append(item) or values[item], used=lambda _value: {"pages": 2.0})
    for number, pair in enumerate([(1, 2), [1, 2]]):
        stream = rxllm.from_iterable(values).pipe(journal(path, call(client)))
        found = {outcome.request.body: outcome for outcome in rxllm.collect(stream)}
        assert {name: outcome.value for name, outcome in found.items()} == {**values, "pair": pair}
        assert found["text"].text == "x"
        assert found["pair"].reply.usage.units == {"pages": 2.0}
        assert len(calls) == 5 + 2 * number
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len([line for line in warnings if "a object has no JSON" in line]) == 2  # once a run


def test_a_reply_of_a_functions_own_making_that_has_no_json_costs_its_neighbours_nothing(path, caplog):
    scheduler = VirtualScheduler()
    client = Scripted()
    odd = Around(
        client, lambda o: o if o.text != "B" else Outcome(request=o.request, reply=Reply(value=1, id="\ud800"))
    )
    seen = record(scheduler, rxllm.from_iterable(list("abc")).pipe(journal(path, odd)))
    assert [outcome.text for outcome in seen.values] == ["A", "", "C"]
    assert [one["response"]["body"]["text"] for one in rows(path)] == ["A", "C"]
    assert "an outcome has no JSON" in caplog.text
    run(path, client, list("abc"))
    assert client.asked == ["a", "b", "c", "b"]


def test_arguments_of_another_kind_are_refused(path):
    with pytest.raises(ConfigError, match="path must be a path, got 5"):
        journal(5, call(Scripted()))
    with pytest.raises(ConfigError, match="path must be a path, got ''"):
        journal("", call(Scripted()))
    with pytest.raises(ConfigError, match="operator must be what rxllm.call returns"):
        journal(path, ops.map(str))
    with pytest.raises(ConfigError, match="retry_failed must be True or False, got 1"):
        journal(path, call(Scripted()), retry_failed=1)
    with pytest.raises(ConfigError, match="replay must be True or False, got None"):
        journal(path, call(Scripted()), replay=None)
    assert isinstance(journal(str(path), call(Scripted())), Journaling)


def test_an_operator_that_raises_or_returns_no_stream_ends_the_stream(path):
    class Wrong(Around):
        def __call__(self, source):
            return 5

    seen = run(path, Scripted(), ["a"], operator=Wrong(Scripted(), None))
    assert "operator must return an Observable, got int" in str(seen.end.value)


# real loops


def asynchronous(calls, delay=0.0):
    async def answer(item):
        calls.append(item)
        await asyncio.sleep(delay)
        return item * 2

    return rxllm.function(answer)


@pytest.mark.parametrize("large", [False, True], ids=["at-once", "in-a-thread"])
def test_a_file_is_opened_on_the_loop_or_in_a_thread(path, monkeypatch, large):
    if large:
        monkeypatch.setattr(JOURNAL, "LARGE", 0)
    threads, opening = [], JournalFile.__init__
    monkeypatch.setattr(
        JournalFile, "__init__", lambda *a, **k: (threads.append(threading.current_thread().name), opening(*a, **k))[1]
    )
    calls = []
    for _ in range(2):
        stream = rxllm.from_iterable(range(50)).pipe(journal(path, call(asynchronous(calls))))
        assert sorted(outcome.value for outcome in rxllm.collect(stream)) == [2 * number for number in range(50)]
    assert len(calls) == 50
    assert threads == ["rxllm", "rxllm journal" if large else "rxllm"]


def test_a_dispose_while_the_file_is_opened_leaves_it_free(path, monkeypatch):
    path.write_bytes(b"")
    monkeypatch.setattr(JOURNAL, "LARGE", -1)
    inside, go, left = threading.Event(), threading.Event(), threading.Event()
    opening, closing = JournalFile.__init__, JournalFile.close

    def slow(*arguments, **settings):
        inside.set()
        go.wait(10)
        opening(*arguments, **settings)

    monkeypatch.setattr(JournalFile, "__init__", slow)
    monkeypatch.setattr(JournalFile, "close", lambda self: (closing(self), left.set())[0])
    calls = []
    subscription = rxllm.from_iterable(range(5)).pipe(journal(path, call(asynchronous(calls)))).subscribe()
    assert inside.wait(10)
    subscription.dispose()
    go.set()
    assert left.wait(10)
    monkeypatch.undo()
    assert_free(path)
    assert calls == []


def test_a_file_that_is_opened_in_a_thread_leaves_the_stream_the_context_of_its_caller(path, monkeypatch):
    monkeypatch.setattr(JOURNAL, "LARGE", -1)
    path.write_bytes(b"")
    tenant = contextvars.ContextVar("tenant", default="nobody")

    async def who(_item):
        return tenant.get()

    tenant.set("mine")
    stream = rxllm.from_iterable(["a"]).pipe(journal(path, call(rxllm.function(who))))
    assert [outcome.value for outcome in rxllm.collect(stream)] == ["mine"]


def test_who_is_cancelled_while_a_file_is_opened_may_open_it_at_once(path, monkeypatch):
    calls = []
    rxllm.collect(rxllm.from_iterable(range(64)).pipe(journal(path, call(asynchronous(calls)))))
    monkeypatch.setattr(JOURNAL, "LARGE", 0)
    monkeypatch.setattr(sys.modules["rxllm.stores.journal"], "SOME", 1)
    inside, opening = threading.Event(), JournalFile.__init__

    def slow(self, path, *, wanted, **settings):
        inside.set()

        def late():
            time.sleep(0.01)
            return wanted()

        opening(self, path, wanted=late, **settings)

    monkeypatch.setattr(JournalFile, "__init__", slow)

    async def main():
        stream = rxllm.from_iterable(range(5)).pipe(journal(path, call(asynchronous(calls))))
        run = asyncio.create_task(rxllm.acollect(stream))
        while not inside.is_set():  # the thread sets it
            await asyncio.sleep(0.001)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        monkeypatch.undo()
        assert_free(path)

    asyncio.run(main())
    assert len(calls) == 64


def test_a_long_quota_is_kept_beside_the_file_so_that_the_next_run_does_not_begin_it_anew(path):
    for count, left in ((3, 2.0), (5, 0.0)):
        gate = rxllm.Gate("5/hour", "1000/minute", rxllm.Quota("9/hour", state=str(path.with_name("own"))))
        stage = journal(path, budget(call(asynchronous([]), gate=gate), requests=100))
        outcomes = rxllm.collect(rxllm.from_iterable(range(count)).pipe(stage))
        assert sorted(outcome.value for outcome in outcomes) == [2 * number for number in range(count)]
        assert gate.statistics().quotas[0].available == left
        gate.close()
    kept = sorted(one.name for one in path.parent.iterdir() if one.suffix in {".quota", ""})
    assert kept == ["own", "results.jsonl.5-requests-per-3600-seconds.quota"]


def test_each_of_several_clients_keeps_its_long_quota_in_a_file_of_its_own(path):
    gates = [rxllm.Gate("50/day"), rxllm.Gate("50/day")]
    clients = [Route(asynchronous([]), gate=gate, name=name) for gate, name in zip(gates, "ab", strict=True)]
    collected = rxllm.collect(rxllm.from_iterable(range(4)).pipe(journal(path, call(rxllm.any_of(*clients)))))
    assert len(collected) == 4
    kept = {gate.statistics().quotas[0].quota.state for gate in gates}
    assert kept == {f"{path}.{name}.50-requests-per-86400-seconds.quota" for name in "ab"}


def test_a_gate_that_is_in_use_keeps_its_quotas_where_they_are(path):
    gate = rxllm.Gate("50/day")
    rxllm.collect(rxllm.from_iterable(range(2)).pipe(call(asynchronous([]), gate=gate)))
    rxllm.collect(rxllm.from_iterable(range(2)).pipe(journal(path, call(asynchronous([]), gate=gate))))
    (quota,) = gate.statistics().quotas
    assert (quota.quota.state, quota.available) == (None, 46.0)


@pytest.mark.skipif(sys.platform == "win32", reason="an open file cannot be removed there")
@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_a_file_that_somebody_takes_away_during_the_run_ends_it(path, monkeypatch, how):
    monkeypatch.setattr(sys.modules["rxllm.stores.journal"], "BEHIND", 10)
    calls = []

    async def answer(item):
        calls.append(item)
        if item == 20:
            if how == "replaced":  # in one go: somebody looks at any moment
                path.with_name("other").write_bytes(b"")
                path.with_name("other").replace(path)
            else:
                path.rename(path.with_name("elsewhere"))
        await asyncio.sleep(0)
        return item

    stream = rxllm.from_iterable(range(1_000_000)).pipe(journal(path, call(rxllm.function(answer), window=4)))
    with pytest.raises(StoreError, match=f"cannot be written: somebody has {how} it"):
        rxllm.collect(stream)
    assert len(calls) < 1_000_000


def test_a_damaged_file_that_is_opened_in_a_thread_ends_the_stream(path, monkeypatch):
    monkeypatch.setattr(JOURNAL, "LARGE", 0)
    path.write_bytes(b"{}\n")
    with pytest.raises(ConfigError, match="line 1"):
        rxllm.collect(rxllm.from_iterable(range(5)).pipe(journal(path, call(asynchronous([])))))


def test_leaving_a_loop_early_loses_nothing_that_was_answered(path):
    calls = []
    stream = rxllm.from_iterable(range(400)).pipe(journal(path, call(asynchronous(calls), window=8)))
    with rxllm.iterate(stream, buffer=4) as outcomes:
        for number, _ in enumerate(outcomes):
            if number == 20:
                break
    kept = len(rows(path))
    assert kept >= 21
    assert len(calls) - kept <= 8  # those that were cancelled
    rest = rxllm.collect(rxllm.from_iterable(range(400)).pipe(journal(path, call(asynchronous(calls)))))
    assert sorted(outcome.value for outcome in rest) == [2 * number for number in range(400)]
    assert len(calls) - 400 <= 8


def test_a_drain_delivers_and_writes_what_is_in_progress(path):
    calls = []

    async def main():
        stream = rxllm.from_iterable(range(1_000)).pipe(journal(path, call(asynchronous(calls, 0.01), window=8)))
        seen = []
        async with rxllm.aiterate(stream) as outcomes:
            async for outcome in outcomes:
                seen.append(outcome)
                if len(seen) == 8:
                    outcomes._queue.drain()
        return seen

    seen = asyncio.run(main())
    assert 8 <= len(seen) == len(calls) == len(rows(path)) < 100


def test_a_key_is_never_in_the_file(path):
    key = "sk-SENTINEL-1234567890"
    with SimulatedProvider(latency=0.0, faults={"500": 0.3}).start() as provider:
        client = rxllm.OpenAI("m", provider.url, api_key=key)
        stage = journal(path, call(client, retry=rxllm.Backoff(attempts=2, base=0.001, cap=0.002)))
        outcomes = rxllm.collect(rxllm.from_iterable(f"hi {key[:3]} {n}" for n in range(40)).pipe(stage))
        good = {prompt_of(outcome.request): outcome for outcome in outcomes if outcome.ok}
        again = rxllm.collect(rxllm.from_iterable(f"hi {key[:3]} {n}" for n in range(40)).pipe(stage))
        asked = len(provider.log())
    assert len(again) == 40
    assert asked == sum(len(outcome.attempts) for outcome in outcomes)
    for outcome in again:
        if outcome.ok:
            before = good[prompt_of(outcome.request)].reply
            assert msgspec.structs.replace(outcome.reply, limits=before.limits) == before
    assert b"SENTINEL" not in path.read_bytes()
