"""Ctrl-C, exits and forks, in child processes, as a user's script meets them."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

PRELUDE = """
import asyncio, itertools, os, signal, sys, threading, time
import rxllm
from rxllm.operators import flat_map

signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background of a shell ignores it

pulled = finished = cancelled = closed = 0

def source():
    global pulled, closed
    try:
        for n in itertools.count():
            pulled += 1
            yield n
    finally:
        closed = 1

async def call(n, seconds=0.05):
    global finished, cancelled
    try:
        await asyncio.sleep(seconds)
    except asyncio.CancelledError:
        cancelled += 1
        raise
    finished += 1
    return n

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def say(*words):
    print(*words, flush=True)
"""


def run(body, *, timeout=30):
    """Run a script; return its exit code, lines and errors."""
    script = textwrap.dedent(PRELUDE) + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    return done.returncode, done.stdout.splitlines(), done.stderr


def test_ctrl_c_while_waiting_delivers_what_is_in_progress_and_then_raises():
    code, lines, stderr = run(
        """
        seen = []
        with rxllm.iterate(rxllm.from_iterable(source()).pipe(flat_map(call, window=4))) as outcomes:
            threading.Timer(0.02, interrupt).start()
            try:
                for n in outcomes:
                    seen.append(n)
            except KeyboardInterrupt:
                say("interrupted", sorted(seen) == list(range(pulled)), pulled == finished, cancelled, closed)
        """
    )
    assert lines == ["interrupted True True 0 1"], stderr
    assert code == 0


def test_a_second_ctrl_c_cancels_at_once():
    code, lines, stderr = run(
        """
        async def long(n):
            return await call(n, 60)

        with rxllm.iterate(rxllm.from_iterable(source()).pipe(flat_map(long, window=4))) as outcomes:
            threading.Timer(0.05, interrupt).start()
            threading.Timer(0.2, interrupt).start()
            try:
                for n in outcomes:
                    say("never")
            except KeyboardInterrupt:
                say("interrupted", pulled, finished, cancelled, closed)
        """
    )
    assert lines == ["interrupted 4 0 4 1"], stderr
    assert code == 0


def test_the_grace_after_ctrl_c_ends():
    code, lines, stderr = run(
        """
        async def long(n):
            return await call(n, 60)

        with rxllm.iterate(rxllm.from_iterable(source()).pipe(flat_map(long, window=4)), grace=0.1) as outcomes:
            threading.Timer(0.05, interrupt).start()
            try:
                next(outcomes)
            except KeyboardInterrupt:
                say("interrupted", finished, cancelled)
        """
    )
    assert lines == ["interrupted 0 4"], stderr
    assert code == 0


def test_ctrl_c_in_the_loop_body_cancels_through_the_block():
    code, lines, stderr = run(
        """
        try:
            with rxllm.iterate(rxllm.from_iterable(source()).pipe(flat_map(call, window=4))) as outcomes:
                for n in outcomes:
                    interrupt()
                    time.sleep(1)
        except KeyboardInterrupt:
            say("interrupted", cancelled > 0, closed)
        """
    )
    assert lines == ["interrupted True 1"], stderr
    assert code == 0


def test_ctrl_c_in_a_plain_script_without_a_block_exits_like_any_script():
    code, lines, stderr = run(
        """
        async def long(n):
            return await call(n, 60)

        threading.Timer(0.05, interrupt).start()
        threading.Timer(0.3, interrupt).start()
        for n in rxllm.iterate(rxllm.from_iterable(source()).pipe(flat_map(long, window=4))):
            say("never")
        """
    )
    assert lines == []
    assert code in {-signal.SIGINT, 130}, stderr
    assert "KeyboardInterrupt" in stderr


def test_ctrl_c_in_collect_keeps_what_came():
    code, lines, stderr = run(
        """
        threading.Timer(0.4, interrupt).start()
        try:
            rxllm.collect(rxllm.from_iterable(source()).pipe(flat_map(call, window=4)))
        except KeyboardInterrupt as error:
            say(sorted(error.partial) == list(range(pulled)), len(error.partial) >= 4)
        """
    )
    assert lines == ["True True"], stderr
    assert code == 0


def test_ctrl_c_under_asyncio_run_cancels_the_block():
    code, lines, stderr = run(
        """
        async def main():
            async with rxllm.aiterate(rxllm.from_iterable(source()).pipe(flat_map(call, window=4))) as outcomes:
                threading.Timer(0.02, interrupt).start()
                async for n in outcomes:
                    pass

        try:
            asyncio.run(main())
        except KeyboardInterrupt:
            say("interrupted", cancelled, closed)
        """
    )
    assert lines == ["interrupted 4 1"], stderr
    assert code == 0


def test_ctrl_c_in_the_main_thread_lets_it_close_a_loop_in_another_thread():
    code, lines, stderr = run(
        """
        seen = []
        outcomes = rxllm.iterate(rxllm.from_iterable(source()).pipe(flat_map(call, window=4)))
        worker = threading.Thread(target=lambda: seen.extend(outcomes))
        worker.start()
        threading.Timer(0.13, interrupt).start()
        try:
            worker.join()
        except KeyboardInterrupt:
            outcomes.close()
            worker.join()
            say("closed", len(seen) > 0, cancelled > 0, closed)
        """
    )
    assert lines == ["closed True True 1"], stderr
    assert code == 0


def test_a_script_that_ends_with_an_open_iterator_exits_cleanly():
    code, lines, stderr = run(
        """
        outcomes = rxllm.iterate(rxllm.from_iterable(source()).pipe(flat_map(call, window=4)))
        say(next(outcomes) in range(4))
        """
    )
    assert lines == ["True"]
    assert (code, stderr) == (0, "")


def test_a_source_that_blocks_its_thread_for_ever_does_not_hold_up_the_exit():
    code, lines, stderr = run(
        """
        def blocks():
            yield 1
            threading.Event().wait()

        say(next(rxllm.iterate(rxllm.from_iterable(blocks(), thread=True))))
        """
    )
    assert (code, lines, stderr) == (0, ["1"], "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_forked_child_starts_a_loop_of_its_own():
    code, lines, stderr = run(
        """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        small = rxllm.from_iterable(range(8)).pipe(flat_map(call, window=4, ordered=True))
        say(rxllm.collect(small))
        child = os.fork()
        if child == 0:
            again = rxllm.from_iterable(range(8)).pipe(flat_map(call, window=4, ordered=True))
            say("child", rxllm.collect(again) == list(range(8)))
            sys.exit(0)
        say("exit", os.waitpid(child, 0)[1])
        say(rxllm.collect(small))
        """
    )
    assert sorted(lines) == ["[0, 1, 2, 3, 4, 5, 6, 7]"] * 2 + ["child True", "exit 0"], stderr
    assert code == 0


def test_the_import_opens_no_socket_and_starts_no_thread():
    code, lines, stderr = run(
        """
        say(threading.active_count())
        """
    )
    assert (code, lines) == (0, ["1"]), stderr


def test_a_plain_function_that_hangs_does_not_hold_up_the_exit():
    code, lines, stderr = run(
        """
        def hangs(_item):
            say("called")
            threading.Event().wait()

        with rxllm.iterate(rxllm.from_iterable([1]).pipe(rxllm.call(rxllm.function(hangs)))) as outcomes:
            threading.Timer(0.2, interrupt).start()
            threading.Timer(0.3, interrupt).start()
            try:
                next(outcomes)
            except KeyboardInterrupt:
                say("interrupted")
        """
    )
    assert (code, lines) == (0, ["called", "interrupted"]), stderr


# Moments at which a wait for a lock would miss a signal

EVERY_ONE_IS_HEARD = """
import random

rng = random.Random(4)
turn, over, ready = threading.Semaphore(0), threading.Semaphore(0), threading.Semaphore(0)
missed = 0

def send():
    global missed
    for number in itertools.count():
        turn.acquire()
        wake()
        time.sleep(rng.uniform(0.0008, 0.0018))  # about when the consumer has what is in the feed and waits again
        if number < 10:  # to another thread: a wait for a lock sleeps on
            signal.pthread_kill(threading.get_ident(), signal.SIGINT)
        else:
            interrupt()
        while not over.acquire(timeout=0.5):
            missed += 1
            interrupt()
        ready.release()

threading.Thread(target=send, daemon=True).start()
for _ in range(200):
    try:
        consume()
    except KeyboardInterrupt:
        pass
    over.release()
    ready.acquire()
say("missed", missed)
"""
ITERATE = """
def wake():
    feed.put_threadsafe(1)

def consume():
    global feed
    feed = rxllm.Feed("buffer")
    with rxllm.iterate(feed, grace=0) as items:
        turn.release()
        for _ in items:
            pass
"""
RUNNER = """
def wake():
    pass

async def work():
    turn.release()
    await asyncio.sleep(0.001)
    await asyncio.sleep(60)

runner = rxllm.Runner(work, grace=0)
runner.schedule()

def consume():
    runner.run()
    assert runner.interrupted
"""


@pytest.mark.skipif(not hasattr(signal, "pthread_kill"), reason="no such signals here")
@pytest.mark.parametrize("consumer", [ITERATE, RUNNER], ids=["iterate", "runner"])
def test_no_ctrl_c_is_missed_by_who_is_about_to_wait(consumer):
    code, lines, stderr = run(f"{consumer}\n{EVERY_ONE_IS_HEARD}")
    assert lines == ["missed 0"], stderr
    assert code == 0


def test_a_handler_of_a_signal_may_iterate_while_the_main_thread_does():
    code, lines, stderr = run(
        """
        def handle(number, frame):
            say("inside", rxllm.collect(rxllm.from_iterable(range(3)).pipe(flat_map(call, window=4, ordered=True))))

        signal.signal(signal.SIGTERM, handle)
        signal.signal(signal.SIGINT, lambda number, frame: say("the same", next(outcomes)))

        async def some(n):
            await asyncio.sleep([0.2, 0.4, 0.4, 60][n])
            return n

        with rxllm.iterate(rxllm.from_iterable(range(4)).pipe(flat_map(some, window=4))) as outcomes:
            threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            threading.Timer(0.3, interrupt).start()
            say(next(outcomes), next(outcomes))
        """
    )
    assert (code, lines) == (0, ["inside [0, 1, 2]", "the same 1", "0 2"]), stderr


def test_signals_of_a_loop_that_stands_still_come_to_it_when_it_goes_on():
    code, lines, stderr = run(
        """
        async def main():
            came = asyncio.Event()
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, came.set)
            threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            slow = rxllm.from_iterable(range(3)).pipe(flat_map(call, window=1))
            say(rxllm.collect(slow))
            await asyncio.wait_for(came.wait(), 20)
            say("came")

        asyncio.run(main())
        """
    )
    assert (code, lines) == (0, ["[0, 1, 2]", "came"]), stderr


def test_waits_leave_no_socket_more_than_the_first_one_needs():
    code, lines, stderr = run(
        """
        def count():
            return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0

        def waits():
            return rxllm.collect(rxllm.from_iterable(range(2)).pipe(flat_map(call, window=2)))

        waits()
        before = count()
        for _ in range(5):
            waits()
        say(count() - before, signal.set_wakeup_fd(-1))
        """
    )
    assert (code, lines, stderr) == (0, ["0 -1"], "")
