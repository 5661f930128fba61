"""Sources: what they pull, when they stop, and what they say about bad input."""

import asyncio
import itertools
import json
import threading
import time

import pytest
import reactivex as rx
from reactivex import operators as ops

import rxllm
from rxllm import errors
from rxllm.operators import flat_map
from rxllm.testing import Script, Taker, VirtualScheduler, record


def endless(log):
    try:
        for n in itertools.count():
            log.append(n)
            yield n
    finally:
        log.append("closed")


# from_iterable


def test_from_iterable_pulls_only_what_there_is_room_for():
    scheduler, pulled = VirtualScheduler(), []
    taker = Taker(scheduler, 3).connect(rxllm.from_iterable(endless(pulled)))
    scheduler.run()
    assert (taker.held, pulled) == ([0, 1, 2], [0, 1, 2])
    taker.take(2)
    scheduler.run()
    assert pulled == [0, 1, 2, 3, 4]
    taker.dispose()
    assert pulled[-1] == "closed"
    assert scheduler.pending == 0


def test_a_list_starts_again_and_an_iterator_says_that_it_cannot():
    again = rxllm.from_iterable([1, 2])
    assert rxllm.collect(again) == rxllm.collect(again) == [1, 2]
    once = rxllm.from_iterable(iter([1, 2]))
    assert rxllm.collect(once) == [1, 2]
    with pytest.raises(errors.ConfigError, match=r"subscribed once.*tee"):
        rxllm.collect(once)


@pytest.mark.parametrize("thread", [False, True], ids=["on-the-loop", "in-a-thread"])
def test_a_generator_that_raises_ends_the_stream_after_its_items(thread):
    def source():
        yield 1
        yield 2
        raise KeyError("torn")

    with pytest.raises(KeyError, match="torn") as caught:
        rxllm.collect(rxllm.from_iterable(source(), thread=thread))
    assert caught.value.partial == [1, 2]


def test_an_iterable_whose_iter_raises_fails_the_stream():
    class Broken:
        def __iter__(self):
            raise OSError("gone")

    with pytest.raises(OSError, match="gone"):
        rxllm.collect(rxllm.from_iterable(Broken()))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("prompt", "str.*list"),
        (b"prompt", "bytes.*list"),
        (7, "got int"),
        (None, "got NoneType"),
    ],
)
def test_from_iterable_refuses_what_is_no_iterable_of_items(value, words):
    with pytest.raises(errors.ConfigError, match=words):
        rxllm.from_iterable(value)


def test_from_iterable_points_to_its_sibling_for_an_async_iterable():
    async def numbers():
        yield 1

    with pytest.raises(errors.ConfigError, match="from_async_iterable"):
        rxllm.from_iterable(numbers())


def test_a_consumer_that_says_nothing_gets_ten_thousand_items_and_then_the_rule():
    scheduler, pulled = VirtualScheduler(), []
    seen = record(scheduler, rxllm.from_iterable(endless(pulled)))
    assert len(seen.values) == 10_000
    assert isinstance(seen.end.value, errors.ConfigError)
    assert "unbounded=True" in str(seen.end.value)
    assert pulled[-1] == "closed"


def test_ten_thousand_items_without_demand_are_no_error_when_they_are_all():
    scheduler = VirtualScheduler()
    seen = record(scheduler, rxllm.from_iterable(range(10_000)))
    assert seen.end.kind == "completed"
    assert len(seen.values) == 10_000


def test_unbounded_lifts_the_rule():
    scheduler = VirtualScheduler()
    seen = record(scheduler, rxllm.from_iterable(range(10_050), unbounded=True))
    assert seen.values == list(range(10_050))


def test_a_slow_iterable_gives_the_loop_back_between_items():
    turns = []

    def slow():
        for n in range(4):
            time.sleep(0.011)  # longer than a source may keep the loop
            turns.append(n)
            yield n

    async def main():
        async def tick():
            while True:
                turns.append("tick")
                await asyncio.sleep(0)

        ticker = asyncio.create_task(tick())
        async with rxllm.aiterate(rxllm.from_iterable(slow())) as numbers:
            async for _ in numbers:
                pass
        ticker.cancel()

    asyncio.run(main())
    numbers = [at for at, what in enumerate(turns) if what != "tick"]
    assert all(later - earlier > 1 for earlier, later in itertools.pairwise(numbers))


def test_a_generator_may_end_the_run_that_pulls_it():
    closed = []

    def source():
        try:
            yield 1
            subscription.dispose()
            yield 2
            pytest.fail("pulled after dispose")
        finally:
            closed.append(1)

    scheduler, seen = VirtualScheduler(), []
    subscription = rxllm.from_iterable(source()).subscribe(seen.append, scheduler=scheduler)
    scheduler.run()
    assert (seen, closed) == ([1], [1])


# from_iterable in a thread


def test_a_blocking_generator_in_a_thread_does_not_hold_up_the_loop():
    gate = threading.Event()

    def blocks():
        yield 0
        assert gate.wait(10)
        yield 1

    outcomes = rxllm.iterate(rxllm.from_iterable(blocks(), thread=True))
    assert next(outcomes) == 0
    assert rxllm.collect(rxllm.from_iterable(range(3))) == [0, 1, 2]  # the loop is free
    gate.set()
    assert list(outcomes) == [1]


def test_a_thread_reads_no_more_than_there_is_room_for_and_closes_what_it_reads():
    pulled = []
    with rxllm.iterate(rxllm.from_iterable(endless(pulled), thread=True), buffer=4) as numbers:
        assert [next(numbers) for _ in range(50)] == list(range(50))
        until = time.monotonic() + 0.05
        while time.monotonic() < until:
            pass
        assert len(pulled) <= 50 + 4 + 1
    until = time.monotonic() + 5
    while pulled[-1] != "closed":
        assert time.monotonic() < until
        time.sleep(0.002)


def test_a_thread_delivers_all_in_order():
    assert rxllm.collect(rxllm.from_iterable(iter(range(3000)), thread=True)) == list(range(3000))


# from_async_iterable


def test_from_async_iterable_asks_for_one_item_at_a_time_and_only_with_room():
    async def main():
        asked = []

        async def numbers():
            try:
                for n in itertools.count():
                    asked.append(n)
                    await asyncio.sleep(0)
                    yield n
            finally:
                asked.append("closed")

        async with rxllm.aiterate(rxllm.from_async_iterable(numbers()), buffer=4) as stream:
            seen = [await anext(stream) for _ in range(20)]
            for _ in range(50):
                await asyncio.sleep(0)
            assert len(asked) <= 20 + 4 + 1
        for _ in range(5):
            await asyncio.sleep(0)
        assert asked[-1] == "closed"
        return seen

    assert asyncio.run(main()) == list(range(20))


def test_from_async_iterable_fails_with_what_the_iterable_raises():
    async def numbers():
        yield 1
        raise KeyError("torn")

    with pytest.raises(KeyError, match="torn") as caught:
        rxllm.collect(rxllm.from_async_iterable(numbers()))
    assert caught.value.partial == [1]


def test_an_async_iterator_says_that_it_cannot_start_again():
    async def numbers():
        yield 1

    once = rxllm.from_async_iterable(numbers())
    assert rxllm.collect(once) == [1]
    with pytest.raises(errors.ConfigError, match="once"):
        rxllm.collect(once)


def test_from_async_iterable_needs_a_loop():
    async def numbers():
        yield 1

    source = numbers()
    [event] = record(VirtualScheduler(), rxllm.from_async_iterable(source)).events
    assert isinstance(event.value, errors.ConfigError)
    assert "asyncio" in str(event.value)


@pytest.mark.parametrize("value", [[1], 3, None])
def test_from_async_iterable_refuses_what_is_none(value):
    with pytest.raises(errors.ConfigError, match="async iterable"):
        rxllm.from_async_iterable(value)


# Feed


def test_a_feed_is_fed_from_the_outcomes_it_leads_to():
    scheduler, feed, seen = VirtualScheduler(), rxllm.Feed(), []

    def halve(n):
        seen.append(n)
        if n > 1:
            feed.put_nowait(n // 2)
        else:
            feed.close()

    feed.put_nowait(1000)
    feed.pipe(flat_map(lambda n: Script((1.0, n)), window=4)).subscribe(halve, scheduler=scheduler)
    scheduler.run()
    assert seen == [1000, 500, 250, 125, 62, 31, 15, 7, 3, 1]
    assert scheduler.pending == 0


def test_a_full_feed_refuses_put_nowait_and_names_the_way_out():
    feed = rxllm.Feed(n=2)
    feed.put_nowait(1)
    feed.put_nowait(2)
    with pytest.raises(errors.ConfigError, match="2 items wait"):
        feed.put_nowait(3)


@pytest.mark.parametrize(
    ("policy", "kept"), [("drop_oldest", [3, 4]), ("drop_newest", [1, 2])], ids=["drops-the-oldest", "drops-the-newest"]
)
def test_a_feed_drops_by_its_policy(policy, kept):
    feed = rxllm.Feed(policy, n=2)
    for n in range(1, 5):
        feed.put_nowait(n)
    feed.close()
    assert rxllm.collect(feed) == kept


def test_a_buffering_feed_takes_everything():
    with rxllm.Feed("buffer") as feed:
        for n in range(5000):
            feed.put_nowait(n)
    assert rxllm.collect(feed) == list(range(5000))


def test_put_waits_for_room_and_keeps_the_order():
    async def main():
        feed = rxllm.Feed(n=3)

        async def fill():
            for n in range(200):
                await feed.put(n)
            feed.close()

        filling = asyncio.create_task(fill())
        async with rxllm.aiterate(feed, buffer=2) as numbers:
            seen = [n async for n in numbers]
        await filling
        return seen

    assert asyncio.run(main()) == list(range(200))


def test_many_putters_lose_nothing_when_some_are_cancelled():
    async def main():
        feed = rxllm.Feed(n=2)
        tasks = [asyncio.create_task(feed.put(n)) for n in range(40)]
        await asyncio.sleep(0)
        for task in tasks[2::3]:
            task.cancel()
        seen = []
        async with rxllm.aiterate(feed, buffer=1) as numbers:
            closing = asyncio.create_task(asyncio.wait(tasks))
            closing.add_done_callback(lambda _: feed.close())
            async for n in numbers:
                seen.append(n)
        return sorted(seen), [n for n, task in enumerate(tasks) if not task.cancelled()]

    seen, put = asyncio.run(main())
    assert seen == put


def test_threads_put_and_block_while_the_feed_is_full():
    feed = rxllm.Feed(n=4)

    def fill(k):
        for n in range(200):
            feed.put_threadsafe((k, n))

    threads = [threading.Thread(target=fill, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()

    def close_when_done():
        for thread in threads:
            thread.join()
        feed.close()

    threading.Thread(target=close_when_done).start()
    seen = rxllm.collect(feed)
    assert sorted(seen) == [(k, n) for k in range(4) for n in range(200)]
    assert all([n for j, n in seen if j == k] == list(range(200)) for k in range(4))


def test_put_threadsafe_gives_up_after_its_timeout():
    feed = rxllm.Feed(n=1)
    feed.put_threadsafe(1)
    with pytest.raises(errors.NotReadyError, match="full"):
        feed.put_threadsafe(2, timeout=0.01)


def test_put_threadsafe_on_the_pipelines_own_loop_does_not_deadlock():
    async def main():
        feed = rxllm.Feed(n=1)
        async with rxllm.aiterate(feed.pipe(flat_map(lambda _: rx.never(), window=1))):
            await asyncio.sleep(0.01)
            feed.put_threadsafe(1)
            await asyncio.sleep(0.01)
            feed.put_threadsafe(2)
            with pytest.raises(errors.ConfigError, match="await feed.put"):
                feed.put_threadsafe(3)

    asyncio.run(main())


def test_those_who_wait_to_put_are_let_go_when_the_stream_is_disposed():
    async def main():
        feed = rxllm.Feed(n=1)
        async with rxllm.aiterate(feed.pipe(flat_map(lambda _: rx.never(), window=1))):
            await feed.put(1)
            await asyncio.sleep(0.01)
            await feed.put(2)
            waiting = asyncio.create_task(feed.put(3))
            blocked = asyncio.create_task(asyncio.to_thread(feed.put_threadsafe, 4))
            await asyncio.sleep(0.02)
            assert not waiting.done()
        for task in (waiting, blocked):
            with pytest.raises(errors.CancelledError):
                await task

    asyncio.run(main())


def test_a_closed_feed_refuses_more_and_closing_again_is_harmless():
    feed = rxllm.Feed()
    feed.close()
    feed.close()
    with pytest.raises(errors.ConfigError, match="closed"):
        feed.put_nowait(1)
    with pytest.raises(errors.ConfigError, match="closed"):
        feed.put_threadsafe(1)


def test_a_failed_feed_delivers_what_was_put_before():
    feed = rxllm.Feed()
    feed.put_nowait(1)
    feed.fail(KeyError("torn"))
    with pytest.raises(KeyError) as caught:
        rxllm.collect(feed)
    assert caught.value.partial == [1]


def test_a_block_that_raises_fails_the_stream_of_its_feed():
    feed = rxllm.Feed()
    with pytest.raises(ZeroDivisionError), feed:
        feed.put_nowait(1 / 0)
    with pytest.raises(ZeroDivisionError):
        rxllm.collect(feed)


def test_a_feed_has_one_subscriber():
    scheduler, feed = VirtualScheduler(), rxllm.Feed()
    Taker(scheduler, 1).connect(feed)
    second = Taker(scheduler, 1).connect(feed)
    assert isinstance(second.ended.value, errors.ConfigError)
    assert "tee" in str(second.ended.value)


@pytest.mark.parametrize(
    ("policy", "n", "words"),
    [("lose", None, "policy.*lose"), ("error", 0, "n.*0"), ("error", 1.5, "n.*1.5"), ("buffer", 3, "n.*buffer.*3")],
)
def test_a_feed_names_its_bad_argument(policy, n, words):
    with pytest.raises(errors.ConfigError, match=words):
        rxllm.Feed(policy, n)


def test_fail_wants_an_exception():
    with pytest.raises(errors.ConfigError, match="Exception.*'boom'"):
        rxllm.Feed().fail("boom")


# from_jsonl


def write(tmp_path, *lines):
    path = tmp_path / "requests.jsonl"
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return path


def test_from_jsonl_reads_the_three_shapes(tmp_path):
    path = write(
        tmp_path,
        {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [], "model": "m"}},
        {"custom_id": "b", "method": "POST", "url": "/v1/embeddings", "body": {"input": "x"}},
        b"\n",
        {"prompt": "hello", "id": "c", "max_tokens": 5, "meta": {"row": 7}},
        {"messages": [{"role": "user", "content": "hi"}], "temperature": 0},
    )
    batch, embedding, prompt, messages = rxllm.collect(rxllm.from_jsonl(path))
    assert (batch.id, batch.operation, batch.body) == ("a", "chat", {"messages": [], "model": "m"})
    assert (embedding.id, embedding.operation) == ("b", "embeddings")
    assert (prompt.id, prompt.meta) == ("c", {"row": 7})
    assert prompt.body == {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
    assert messages.body == {"messages": [{"role": "user", "content": "hi"}], "temperature": 0}


BAD = [
    (b"{not json\n", "not JSON"),
    (b"[1, 2]\n", "JSON object, got list"),
    (b'{"text": "x"}\n', "only text"),
    (b"{}\n", "empty object"),
    (b'{"prompt": 7}\n', "prompt must be a text, got int"),
    (b'{"prompt": "x", "id": 7}\n', "id"),
    (b'{"messages": []}\n', "messages"),
    (b'{"body": [], "url": "/v1/chat/completions"}\n', "body must be an object"),
    (b'{"body": {}, "url": "/v1/video"}\n', "url.*video"),
    (b'{"body": {}, "url": 3}\n', "url.*3"),
    (b'{"body": {}, "method": "GET"}\n', "POST.*GET"),
    (b'{"prompt": "\xff\xfe"}\n', "not JSON"),
    (b'{"prompt": "torn', "not JSON"),
]


@pytest.mark.parametrize(("line", "words"), BAD, ids=[words for _, words in BAD])
def test_a_bad_line_is_a_failed_outcome_with_file_and_line(tmp_path, line, words):
    path = write(tmp_path, {"prompt": "first"}, line)
    good, bad = rxllm.collect(rxllm.from_jsonl(path))
    assert isinstance(good, rxllm.Request)
    assert isinstance(bad, rxllm.Outcome)
    assert isinstance(bad.error, errors.InvalidRequestError)
    with pytest.raises(errors.InvalidRequestError, match=rf"requests\.jsonl, line 2: .*{words}"):
        bad.unwrap()


def test_a_bad_line_ends_the_stream_when_the_caller_says_so(tmp_path):
    path = write(tmp_path, {"prompt": "first"}, b"nonsense\n", {"prompt": "third"})
    with pytest.raises(errors.InvalidRequestError, match="line 2") as caught:
        rxllm.collect(rxllm.from_jsonl(path, on_bad_line="raise"))
    assert len(caught.value.partial) == 1


def test_lines_after_a_bad_one_are_read(tmp_path):
    path = write(tmp_path, b"nonsense\n", {"prompt": "second"})
    assert [type(item) for item in rxllm.collect(rxllm.from_jsonl(path))] == [rxllm.Outcome, rxllm.Request]


def test_a_line_without_end_is_refused_and_not_read_into_memory(tmp_path, monkeypatch):
    monkeypatch.setattr("rxllm.sources.jsonl.LINE", 100)
    path = write(tmp_path, b"x" * 1000 + b"\n", {"prompt": "second"})
    bad, good = rxllm.collect(rxllm.from_jsonl(path))
    assert "longer than 100 bytes" in str(bad.error)
    assert good.body["messages"][0]["content"] == "second"


def test_a_file_is_read_again_for_each_subscription(tmp_path):
    stream = rxllm.from_jsonl(write(tmp_path, {"prompt": "x"}))
    assert len(rxllm.collect(stream)) == len(rxllm.collect(stream)) == 1


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(errors.ConfigError, match=r"cannot read .*nowhere\.jsonl"):
        rxllm.collect(rxllm.from_jsonl(tmp_path / "nowhere.jsonl"))


@pytest.mark.parametrize(("path", "on_bad_line", "words"), [(7, "emit", "path.*7"), ("x", "skip", "on_bad_line.*skip")])
def test_from_jsonl_names_its_bad_argument(path, on_bad_line, words):
    with pytest.raises(errors.ConfigError, match=words):
        rxllm.from_jsonl(path, on_bad_line=on_bad_line)


def test_take_closes_the_generator():
    pulled = []
    assert rxllm.collect(rxllm.from_iterable(endless(pulled)).pipe(ops.take(3))) == [0, 1, 2]
    assert pulled[-1] == "closed"


def test_a_producer_is_let_go_when_the_consumer_has_left_also_if_it_did_not_wait_then():
    feed, ended = rxllm.Feed(n=4), []

    def produce():
        try:
            for n in itertools.count():
                time.sleep(0.001)
                feed.put_threadsafe(n)
        except errors.CancelledError:
            ended.append(True)

    thread = threading.Thread(target=produce)
    thread.start()
    with rxllm.iterate(feed) as numbers:
        assert [next(numbers) for _ in range(3)] == [0, 1, 2]
    thread.join(10)
    assert ended == [True]


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbf" + b'{"prompt": "first"}\n')
    [request] = rxllm.collect(rxllm.from_jsonl(path))
    assert isinstance(request, rxllm.Request)


def test_a_stream_is_not_iterable_and_says_what_is():
    with pytest.raises(errors.ConfigError, match=r"rxllm\.iterate"):
        list(rxllm.from_iterable([1]).pipe(flat_map(rx.of, window=1)))
