"""Sinks on the real loop thread: what a consumer sees, and what stays behind."""

import asyncio
import contextvars
import gc
import itertools
import threading
import time

import pytest
import reactivex as rx
from reactivex import operators as ops
from reactivex.scheduler import EventLoopScheduler, ThreadPoolScheduler

import rxllm
from rxllm import errors, runtime
from rxllm.operators import flat_map

NAME = contextvars.ContextVar("name", default="nobody")


async def answer(n: int) -> int:
    await asyncio.sleep(0.001)
    return n


def wait_until(condition, seconds=5.0):
    """Wait for the loop thread; the limit is far beyond what it takes, so only a hang meets it."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.002)


def calls(active):
    """A mapper whose calls never end, and that counts those in progress."""

    async def call(n):
        active.add(n)
        try:
            await asyncio.Event().wait()
        finally:
            active.discard(n)

    return call


class Closing:
    """A generator that notes when it is closed."""

    def __init__(self):
        self.closed = False
        self.pulled = 0

    def __call__(self):
        try:
            for n in itertools.count():
                self.pulled += 1
                yield n
        finally:
            self.closed = True


def test_iterate_delivers_everything_once():
    stream = rxllm.from_iterable(range(500)).pipe(flat_map(answer, window=20))
    assert sorted(rxllm.iterate(stream)) == list(range(500))


def test_iterate_keeps_the_order_of_an_ordered_stage():
    stream = rxllm.from_iterable(range(200)).pipe(flat_map(answer, window=20, ordered=True))
    assert list(rxllm.iterate(stream)) == list(range(200))


@pytest.mark.parametrize("buffer", [1, 2, 3, 64])
def test_iterate_pulls_no_more_than_its_buffer_ahead_of_the_loop_body(buffer):
    source = Closing()
    ahead = []
    with rxllm.iterate(rxllm.from_iterable(source()), buffer=buffer) as numbers:
        for n in itertools.islice(numbers, 300):
            ahead.append(source.pulled - n)
    assert max(ahead) <= buffer + 1
    assert source.closed


def test_leaving_the_block_cancels_what_is_in_progress_and_closes_the_generator():
    source, active = Closing(), set()
    stream = rxllm.from_iterable(source()).pipe(
        flat_map(lambda n: calls(active)(n) if n > 3 else answer(n), window=8),
    )
    with rxllm.iterate(stream) as outcomes:
        first = [next(outcomes) for _ in range(4)]
        wait_until(lambda: len(active) == 8)
    assert sorted(first) == [0, 1, 2, 3]
    assert not active
    assert source.closed
    assert outcomes.statistics().finished
    with pytest.raises(StopIteration):
        next(outcomes)


def test_an_exception_in_the_loop_body_is_the_callers_own_and_releases_everything():
    source, active = Closing(), set()
    stream = rxllm.from_iterable(source()).pipe(flat_map(lambda n: calls(active)(n) if n else answer(n), window=4))
    with pytest.raises(ZeroDivisionError), rxllm.iterate(stream) as outcomes:
        for n in outcomes:
            1 / n
    assert not active
    assert source.closed


def test_leaving_the_block_waits_for_cancelled_calls_to_clean_up():
    cleaned = []

    async def call(n):
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.01)
            cleaned.append(n)

    with rxllm.iterate(rxllm.from_iterable(range(3)).pipe(flat_map(call, window=3))) as outcomes:
        wait_until(lambda: outcomes.statistics().pulled == 3)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), runtime.background().loop).result(5)
    assert sorted(cleaned) == [0, 1, 2]


def test_an_iterator_that_is_dropped_closes():
    source, active = Closing(), set()
    outcomes = rxllm.iterate(rxllm.from_iterable(source()).pipe(flat_map(calls(active), window=4)))
    wait_until(lambda: len(active) == 4)
    del outcomes
    gc.collect()
    wait_until(lambda: not active and source.closed)


def test_a_failed_source_ends_the_loop_after_what_is_in_flight():
    def source():
        yield from range(5)
        raise RuntimeError("the file is torn")

    seen = []
    with pytest.raises(RuntimeError, match="torn"):
        for n in rxllm.iterate(rxllm.from_iterable(source()).pipe(flat_map(answer, window=10))):
            seen.append(n)
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_a_callback_that_raises_between_stages_reaches_the_consumer():
    class Raises(rx.abc.ObserverBase):
        def __init__(self, below):
            self.on_error, self.on_completed = below.on_error, below.on_completed

        def on_next(self, value):
            raise LookupError(value)

        on_error = on_completed = None

    Raises.__abstractmethods__ = frozenset()

    def broken(source):
        return rx.create(lambda observer, scheduler: source.subscribe(Raises(observer), scheduler=scheduler))

    active = set()
    stream = rxllm.from_iterable(itertools.count()).pipe(
        flat_map(lambda n: calls(active)(n) if n != 3 else answer(n), window=8), broken
    )
    with pytest.raises(LookupError):
        list(rxllm.iterate(stream))
    wait_until(lambda: not active)


def test_system_exit_in_a_generator_reaches_the_consumer_and_not_only_the_loop():
    def source():
        yield 1
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        list(rxllm.iterate(rxllm.from_iterable(source())))
    assert rxllm.collect(rxllm.from_iterable([1])) == [1]  # the loop goes on


def test_statistics_count_what_was_pulled_and_delivered():
    with rxllm.iterate(rxllm.from_iterable(range(10))) as numbers:
        assert [next(numbers) for _ in range(4)] == [0, 1, 2, 3]
        wait_until(lambda: numbers.statistics().finished)
        seen = numbers.statistics()
        assert (seen.pulled, seen.delivered, seen.queued, seen.draining) == (10, 4, 6, False)
        assert seen.seconds > 0


def test_several_threads_share_one_iterator_without_losing_or_repeating_an_item():
    numbers = rxllm.iterate(rxllm.from_iterable(range(5000)), buffer=7)
    seen = [[] for _ in range(6)]
    threads = [threading.Thread(target=lambda mine=mine: mine.extend(numbers)) for mine in seen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert sorted(itertools.chain(*seen)) == list(range(5000))


def test_close_from_another_thread_ends_the_loop_that_waits():
    outcomes = rxllm.iterate(rxllm.from_iterable(itertools.count()).pipe(flat_map(calls(set()), window=4)))
    seen = []
    thread = threading.Thread(target=lambda: seen.extend(outcomes))
    thread.start()
    outcomes.close()
    thread.join(10)
    assert not thread.is_alive()
    assert seen == []


def test_the_callers_context_comes_along():
    async def whoami(_):
        await asyncio.sleep(0)
        return NAME.get()

    def names():
        yield NAME.get()

    token = NAME.set("ada")
    try:
        assert rxllm.collect(rxllm.from_iterable(names()).pipe(flat_map(whoami, window=1))) == ["ada"]
        assert rxllm.collect(rxllm.from_iterable(names())) == ["ada"]
        assert rxllm.collect(rxllm.from_iterable(names(), thread=True)) == ["ada"]
    finally:
        NAME.reset(token)


def test_iterate_inside_a_pipeline_is_refused():
    def blocks(_):
        return rx.of(rxllm.collect(rxllm.from_iterable([1])))

    [outcome] = rxllm.collect(rxllm.from_iterable([0]).pipe(flat_map(blocks, window=1)))
    assert isinstance(outcome.error, errors.ConfigError)
    assert "aiterate" in str(outcome.error)


def test_iterate_works_where_a_loop_already_runs():
    async def notebook_cell():
        return list(rxllm.iterate(rxllm.from_iterable(range(5)).pipe(flat_map(answer, window=2, ordered=True))))

    assert asyncio.run(notebook_cell()) == [0, 1, 2, 3, 4]


def test_collect_attaches_what_came_before_the_error():
    def source():
        yield from range(3)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError) as caught:
        rxllm.collect(rxllm.from_iterable(source()))
    assert caught.value.partial == [0, 1, 2]


def test_acollect_attaches_what_came_before_the_error():
    def source():
        yield from range(3)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError) as caught:
        asyncio.run(rxllm.acollect(rxllm.from_iterable(source())))
    assert caught.value.partial == [0, 1, 2]


def test_aiterate_delivers_everything_on_the_running_loop():
    async def main():
        loop = asyncio.get_running_loop()
        loops = set()

        async def note(n):
            loops.add(asyncio.get_running_loop())
            return n

        async with rxllm.aiterate(rxllm.from_iterable(range(100)).pipe(flat_map(note, window=5)), buffer=3) as numbers:
            seen = [n async for n in numbers]
            assert numbers.statistics().delivered == 100
        assert loops == {loop}
        return seen

    assert sorted(asyncio.run(main())) == list(range(100))


def test_leaving_an_async_block_early_cancels_and_leaves_no_task():
    async def main():
        source, active = Closing(), set()
        stream = rxllm.from_iterable(source()).pipe(flat_map(lambda n: calls(active)(n) if n else answer(n), window=8))
        async with rxllm.aiterate(stream) as outcomes:
            async for _ in outcomes:
                break
        assert source.closed
        assert not active
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_a_cancelled_task_closes_its_aiterate():
    async def main():
        active = set()

        async def consume():
            async with rxllm.aiterate(
                rxllm.from_iterable(itertools.count()).pipe(flat_map(calls(active), window=4))
            ) as o:
                async for _ in o:
                    pass

        task = asyncio.create_task(consume())
        while len(active) < 4:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not active

    asyncio.run(main())


def test_aiterate_without_a_loop_is_refused():
    with pytest.raises(errors.ConfigError, match="iterate"):
        rxllm.aiterate(rxllm.from_iterable([1]))


@pytest.mark.parametrize("sink", [rxllm.iterate, rxllm.collect])
def test_a_sink_says_what_is_wrong_with_its_source(sink):
    with pytest.raises(errors.ConfigError, match="source must be an Observable, got list"):
        sink([1, 2, 3])


@pytest.mark.parametrize(("name", "value"), [("buffer", 0), ("buffer", 1.5), ("grace", -1.0), ("grace", float("nan"))])
def test_iterate_names_a_bad_argument_and_its_value(name, value):
    with pytest.raises(errors.ConfigError, match=f"{name}.*{value}"):
        rxllm.iterate(rx.of(1), **{name: value})


def test_plain_subscribe_runs_on_the_loop_thread_and_can_be_disposed_from_anywhere():
    threads, source = set(), Closing()

    def note(_):
        threads.add(threading.current_thread().name)

    stream = rxllm.from_iterable(source(), unbounded=True).pipe(ops.do_action(note))
    subscription = stream.subscribe()
    wait_until(lambda: threads)
    subscription.dispose()
    wait_until(lambda: source.closed)
    assert threads == {"rxllm"}


def test_run_returns_the_last_item():
    assert rxllm.from_iterable(range(5)).pipe(flat_map(answer, window=1)).run() == 4


def test_sixty_four_sinks_at_once_share_the_loop_thread():
    streams = [
        rxllm.iterate(rxllm.from_iterable(range(k, k + 20)).pipe(flat_map(answer, window=4, ordered=True)))
        for k in range(64)
    ]
    assert [list(stream) for stream in streams] == [list(range(k, k + 20)) for k in range(64)]
    assert sum(thread.name == "rxllm" for thread in threading.enumerate()) == 1


def test_the_runtime_is_the_same_between_two_calls():
    assert runtime.background() is runtime.background()


def test_a_drain_ends_a_sink_that_stands_directly_below_a_foreign_stream():
    with rxllm.iterate(rx.interval(0.001)) as ticks:
        assert next(ticks) == 0
        runtime.background().post(ticks._queue.drain)
        assert list(ticks) == list(range(1, ticks.statistics().delivered))
        assert ticks.statistics().draining


@pytest.mark.parametrize("scheduler", [ThreadPoolScheduler(1), EventLoopScheduler()], ids=["thread-pool", "event-loop"])
def test_a_scheduler_of_threads_is_refused(scheduler):
    seen = []
    rxllm.from_iterable([1]).subscribe(on_error=seen.append, scheduler=scheduler)
    assert isinstance(seen[0], errors.ConfigError)
    assert "one loop" in str(seen[0])


def test_what_a_stream_fails_with_comes_alone():
    def source():
        yield 1
        raise RuntimeError("torn")

    with pytest.raises(RuntimeError) as caught:
        list(rxllm.iterate(rxllm.from_iterable(source())))
    assert caught.value.__context__ is None
