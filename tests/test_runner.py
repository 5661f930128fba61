"""Runner: schedule calls, run them, get the results in that order."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import itertools
import logging
import os
import random
import subprocess
import sys
import textwrap
import threading
import time
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm import errors
from rxllm.errors import ConfigError
from rxllm.runner import Call, Finished, Resource, Runner
from rxllm.runner.calls import Resources

FAST = {"backoff_base": 0.001, "backoff_cap": 0.001}


def one(_call):
    return 1


def requests(quota, seconds=60.0, name="requests"):
    return Resource(name, quota, seconds, arguments_usage_extractor=one)


def mail(fields):
    message = Message()
    for name, value in fields.items():
        message[name] = value
    return message


def run_all(runner, *rows):
    for row in rows:
        runner.schedule(*row)
    return runner.run()


def double(n):
    return 2 * n


async def double_later(n):
    await asyncio.sleep(0)
    return 2 * n


class Doubling:
    def __init__(self, factor=2):
        self.factor = factor

    def __call__(self, n):
        return self.factor * n

    def method(self, n):
        return self.factor * n

    async def method_later(self, n):
        await asyncio.sleep(0)
        return self.factor * n


def times(factor, n):
    return factor * n


async def times_later(factor, n):
    return factor * n


# What is called, and what comes back


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(double, id="a-plain-function"),
        pytest.param(double_later, id="a-coroutine-function"),
        pytest.param(lambda n: 2 * n, id="a-lambda"),
        pytest.param(lambda n: double_later(n), id="a-lambda-that-returns-a-coroutine"),  # noqa: PLW0108
        pytest.param(functools.partial(times, 2), id="a-partial"),
        pytest.param(functools.partial(times_later, 2), id="a-partial-of-a-coroutine-function"),
        pytest.param(Doubling().method, id="a-bound-method"),
        pytest.param(Doubling().method_later, id="a-bound-coroutine-method"),
        pytest.param(Doubling(), id="an-object-that-is-called"),
    ],
)
def test_it_calls(function):
    assert run_all(Runner(function), (1,), (2,), (3,)) == ([2, 4, 6], [[], [], []])


def test_results_and_exceptions_are_in_the_order_of_scheduling_whatever_ends_first():
    async def ask(n):
        await asyncio.sleep(0.002 * (9 - n))
        if n % 3 == 0:
            raise KeyError(n)
        return n

    results, exceptions = run_all(Runner(ask, max_retries=1, **FAST), *((n,) for n in range(10)))
    assert results == [None if n % 3 == 0 else n for n in range(10)]
    assert [[error.args for error in row] for row in exceptions] == [
        [(n,), (n,)] if n % 3 == 0 else [] for n in range(10)
    ]
    assert {type(error) for row in exceptions for error in row} == {KeyError}


def test_arguments_go_to_the_function_as_they_were_scheduled():
    runner = Runner(lambda *args, **kwargs: (args, kwargs))
    runner.schedule(1, "b", c=[3])
    runner.schedule()
    assert runner.run()[0] == [((1, "b"), {"c": [3]}), ((), {})]


def test_nothing_scheduled_is_nothing_run():
    runner = Runner(double)
    assert runner.run() == ([], [])
    assert list(runner.as_completed()) == []


def test_a_result_of_none_is_a_result():
    calls = []
    runner = Runner(calls.append)
    assert run_all(runner, (1,)) == ([None], [[]])
    assert runner.run() == ([], [])
    assert calls == [1]


def test_no_more_calls_run_at_a_time_than_said():
    running, most = 0, 0

    async def ask(_n):
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1

    run_all(Runner(ask, max_concurrent=3), *((n,) for n in range(20)))
    assert most == 3


def test_the_threads_of_a_run_end_with_it():
    names = set()

    def ask(_n):
        names.add(threading.current_thread().name)

    run_all(Runner(ask, max_concurrent=4), *((n,) for n in range(20)))
    assert names == {"rxllm function"}
    for thread in threading.enumerate():
        if thread.name == "rxllm function":
            thread.join(5)
            assert not thread.is_alive()


def test_a_runner_leaves_no_cycle_that_holds_its_results():
    class Large:
        pass

    runner = Runner(Large)
    run_all(runner, ())
    gc.collect()
    assert not [thing for thing in gc.get_objects() if isinstance(thing, Large)]


# What schedule looks like


def documented(prompt: str, *, n: int = 1) -> list[str]:
    """Ask n times."""
    return [prompt] * n


def test_schedule_looks_like_the_function_and_leaves_it_as_it_is():
    before = dict(documented.__annotations__)
    one, other = Runner(documented), Runner(double)
    assert one.schedule.__doc__ == "Ask n times."
    assert one.schedule.__name__ == "documented"
    assert one.schedule.__wrapped__ is documented
    assert str(inspect.signature(one.schedule)) == "(prompt: 'str', *, n: 'int' = 1) -> None"
    assert one.schedule.__annotations__ == {"prompt": "str", "n": "int", "return": None}
    assert other.schedule.__name__ == "double"
    assert documented.__annotations__ == before


def test_arguments_that_the_function_does_not_take_are_refused_when_they_are_scheduled():
    runner = Runner(documented)
    with pytest.raises(TypeError, match="missing a required argument: 'prompt'"):
        runner.schedule(n=2)
    runner.schedule("a", n=2)
    assert runner.run()[0] == [["a", "a"]]


def test_what_has_no_signature_is_called_all_the_same():
    assert run_all(Runner(max), (1, 2)) == ([2], [[]])


# Resources


def test_no_window_has_more_calls_in_it_than_its_quota():
    starts = []

    async def ask(_n):
        starts.append(time.monotonic())

    run_all(Runner(ask, [requests(5, 0.1)]), *((n,) for n in range(18)))
    assert len(starts) == 18
    assert all(later - earlier >= 0.1 for earlier, later in zip(starts, starts[5:], strict=False))


def test_several_resources_are_kept_at_once():
    starts = []

    async def ask(size):
        starts.append((time.monotonic(), size))

    tokens = Resource("tokens", 10, 0.1, arguments_usage_extractor=lambda call: call.get_argument("size"))
    run_all(Runner(ask, [requests(4, 0.05), tokens]), *((size,) for size in (1, 2, 3, 4, 5, 6, 1, 1, 1, 1, 1, 1)))
    moments = [at for at, _ in starts]
    assert all(later - earlier >= 0.05 for earlier, later in zip(moments, moments[4:], strict=False))
    for at in moments:
        assert sum(size for other, size in starts if at <= other < at + 0.1) <= 10


def test_what_may_be_used_is_reserved_until_what_was_used_is_known():
    running, most = 0, 0

    async def ask():
        nonlocal running, most
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.002)
        running -= 1
        return 1

    tokens = Resource(
        "tokens",
        20,
        3600,
        results_usage_extractor=lambda _, result: result,
        max_results_usage_estimator=lambda _: 5,
    )
    runner = Runner(ask, [tokens])
    results, _ = run_all(runner, *[()] * 16)  # reserved 80 in all, used 16
    assert results == [1] * 16
    assert most == 4
    (quota,) = runner._plan.gate.statistics().quotas
    assert quota.available == 4


def test_use_by_the_arguments_and_by_the_result_add_up():
    tokens = Resource(
        "tokens",
        100,
        60,
        lambda call: call.get_argument("prompt"),
        lambda call, result: result + call.get_argument("extra"),
        lambda _: 50,
    )
    runner = Runner(lambda prompt, extra=3: prompt * 2, [tokens])
    run_all(runner, (10,))
    (quota,) = runner._plan.gate.statistics().quotas
    assert quota.available == 100 - (10 + 20 + 3)


def test_what_a_result_has_used_counts_from_the_end_of_its_call():
    starts, ends = [], []

    async def ask():
        starts.append(time.monotonic())
        await asyncio.sleep(0.05)
        ends.append(time.monotonic())

    run_all(Runner(ask, [Resource("tokens", 1, 0.06, None, lambda *_: 1, one)]), (), ())
    assert starts[1] - ends[0] >= 0.06


def test_more_may_be_used_than_was_reserved_and_is_a_debt():
    tokens = Resource("tokens", 10, 60, None, lambda _, result: result, one)
    runner = Runner(lambda: 25, [tokens])
    run_all(runner, ())
    (quota,) = runner._plan.gate.statistics().quotas
    assert quota.available == -15


def test_a_call_that_would_never_start_is_refused_at_once_and_the_others_run():
    tokens = Resource("tokens", 10, 60, lambda call: call.get_argument("n"), lambda *_: 0, lambda _: 5)
    runner = Runner(double, [tokens])
    runner.schedule(1)
    with pytest.raises(ValueError, match=r"double\(…\) exceeds resource quota: it needs 11 of tokens, .* than 10"):
        runner.schedule(6)
    runner.schedule(2)
    assert runner.run()[0] == [2, 4]


def test_the_use_of_a_run_counts_in_the_next_one():
    runner = Runner(double, [requests(100)])
    run_all(runner, (1,), (2,))
    asyncio.run(_run_coro(runner, (3,)))
    (quota,) = runner._plan.gate.statistics().quotas
    assert quota.available == 97


async def _run_coro(runner, *rows):
    for row in rows:
        runner.schedule(*row)
    return await runner.run_coro()


@pytest.mark.parametrize(
    ("extractor", "used", "noted"),
    [
        pytest.param(None, 12, 0, id="what-was-reserved-stays-used"),
        pytest.param(lambda _, error: len(error.args), 3, 0, id="a-function-says-what-they-used"),
        pytest.param(lambda *_: 1 / 0, 12, 3, id="a-function-that-fails-too-leaves-what-was-reserved"),
    ],
)
def test_of_calls_that_fail(extractor, used, noted):
    def ask():
        raise OSError("gone")

    tokens = Resource("tokens", 100, 3600, lambda _: 4, failure_usage_extractor=extractor)
    runner = Runner(ask, [tokens], max_retries=2, **FAST)
    _, [tried] = run_all(runner, ())
    (quota,) = runner._plan.gate.statistics().quotas
    assert quota.available == 100 - used
    assert sum("ZeroDivisionError" in note for error in tried for note in getattr(error, "__notes__", ())) == noted


def test_an_extractor_of_arguments_that_raises_fails_that_call_unrun():
    called = []
    lengths = Resource("characters", 100, 60, lambda call: len(call.get_argument("text")))
    runner = Runner(lambda text: called.append(text), [lengths], max_retries=3)  # noqa: PLW0108  it has a signature
    results, exceptions = run_all(runner, ("ab",), (None,), ("c",))
    assert results == [None, None, None]
    assert [[type(error) for error in row] for row in exceptions] == [[], [TypeError], []]
    assert sorted(called) == ["ab", "c"]


def test_a_use_that_is_no_number_fails_that_call_with_the_name_of_the_resource():
    runner = Runner(double, [Resource("tokens", 5, 60, lambda call: -1)])
    _, [[error]] = run_all(runner, (1,))
    assert isinstance(error, ConfigError)
    assert "arguments_usage_extractor of the resource 'tokens': its result must be a finite number >= 0, got -1" in str(
        error
    )


def test_an_extractor_of_results_that_raises_means_another_try():
    answers = iter([{}, {"usage": 1}])
    tokens = Resource("tokens", 10, 60, results_usage_extractor=lambda _, result: result["usage"])
    results, exceptions = run_all(Runner(lambda: next(answers), [tokens], **FAST), ())
    assert results == [{"usage": 1}]
    assert [[type(error) for error in row] for row in exceptions] == [[KeyError]]


def test_an_estimator_of_what_nothing_extracts_is_refused():
    with pytest.raises(ConfigError, match="'tokens' needs a results_usage_extractor"):
        Resource("tokens", 10, 60, max_results_usage_estimator=one)


@given(names=st.lists(st.text(max_size=8).filter(bool), max_size=6), quotas=st.lists(st.floats(0.1, 1e6), min_size=6))
def test_resources_of_any_names_are_quotas_of_different_units(names, quotas):
    resources = [requests(quota, name=name) for name, quota in zip(names, quotas, strict=False)]
    found = Resources(resources).quotas
    assert [(quota.limit, quota.per) for quota in found] == [(row.quota, 60.0) for row in resources]
    assert len({quota.unit for quota in found}) == len(found)


@given(
    args=st.lists(st.integers(0, 3), min_size=1, max_size=2),
    named=st.dictionaries(st.sampled_from(["b", "c", "more"]), st.sampled_from([0, False, None, "x"])),
)
def test_get_argument_returns_what_the_function_gets(args, named):
    def ask(a, b=3, *, c=True, **rest):
        return {"a": a, "b": b, "c": c, **rest}

    if len(args) == 2:
        named.pop("b", None)
    call = Call(ask, tuple(args), named)
    got = ask(*args, **named)
    for name, value in got.items():
        assert call.get_argument(name) is value
    assert call.get_argument("unknown") is None
    assert call.get_argument("unknown", 5) == 5


def test_get_argument_of_what_has_no_signature_knows_what_was_given_by_name():
    call = Call(max, (1, 2), {"key": abs})
    assert (call.get_argument("key"), call.get_argument("default", 7)) == (abs, 7)


# Tries


def test_an_unreliable_function_is_called_until_it_answers():
    draws = random.Random(7)

    async def ask(n):
        if draws.random() < 0.4:
            raise OSError(n)
        return n

    results, exceptions = run_all(Runner(ask, max_retries=50, **FAST), *((n,) for n in range(60)))
    assert results == list(range(60))
    assert 20 < sum(map(len, exceptions)) < 100


@pytest.mark.parametrize("max_retries", [0, 1, 3])
def test_there_are_no_more_tries_than_said_whatever_they_fail_with(max_retries):
    calls = itertools.count()

    def ask():
        if next(calls) % 2:
            raise OSError
        return False

    runner = Runner(ask, [requests(100)], max_retries=max_retries, validation=bool, **FAST)
    results, [tried] = run_all(runner, ())
    assert results == [None]
    assert len(tried) == max_retries + 1 == next(calls)
    assert [isinstance(error, errors.ValidationError) for error in tried] == [
        number % 2 == 0 for number in range(max_retries + 1)
    ]
    (quota,) = runner._plan.gate.statistics().quotas
    assert quota.available == 100 - (max_retries + 1)


@pytest.mark.parametrize("name", ["validation", "validation_function"])
@pytest.mark.parametrize("bad", [0, "", None, [], False])
def test_a_result_that_is_refused_is_asked_for_again_at_once_and_kept_with_the_error(name, bad):
    answers = iter([bad, "good"])
    runner = Runner(lambda: next(answers), backoff_base=30.0, **{name: lambda result: result})  # a back-off would hang
    results, [[error]] = run_all(runner, ())
    assert results == ["good"]
    assert isinstance(error, errors.ValidationError)
    assert error.reply.value is bad


def test_a_validation_that_raises_means_another_try():
    answers = iter(["x", "12"])
    results, [[error]] = run_all(Runner(lambda: next(answers), validation_function=int), ())
    assert results == ["12"]
    assert type(error) is ValueError


def test_an_async_validation_is_refused_with_a_word():
    async def check(_result):
        return True

    _, [[error]] = run_all(Runner(double, validation=check), (1,))
    assert isinstance(error, ConfigError)
    assert "must be a plain function" in str(error)


def test_an_error_of_the_library_that_no_try_cures_is_not_tried_again():
    calls = []

    def ask(error):
        calls.append(error)
        raise error

    _, exceptions = run_all(Runner(ask, **FAST), (errors.AuthError("no"),), (errors.ServerError("oops"),))
    assert [len(row) for row in exceptions] == [1, 6]


class BusyError(Exception):
    """What packages raise for a 429, each in its own way."""

    def __init__(self, **fields):
        super().__init__("busy")
        self.__dict__.update(fields)


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(BusyError(retry_after=0.05), id="as-a-number"),
        pytest.param(BusyError(response=SimpleNamespace(headers={"retry-after-ms": "50"})), id="of-its-response"),
        pytest.param(HTTPError("http://x", 429, "busy", mail({"Retry-After": "0.05"}), None), id="of-urllib"),
    ],
)
def test_what_an_exception_asks_to_wait_is_waited_for(error):
    starts = []

    def ask():
        starts.append(time.monotonic())
        if len(starts) == 1:
            raise error
        return 1

    assert run_all(Runner(ask, **FAST), ())[0] == [1]
    assert starts[1] - starts[0] >= 0.05


@pytest.mark.parametrize(
    "error",
    [
        pytest.param(BusyError(retry_after="soon"), id="a-text"),
        pytest.param(BusyError(retry_after=float("inf")), id="no-end"),
        pytest.param(BusyError(headers=5), id="headers-that-are-none"),
        pytest.param(BusyError(response=None, headers={"retry-after": "never"}), id="a-header-that-says-nothing"),
    ],
)
def test_what_nobody_understands_is_not_waited_for(error):
    answers = iter([error, 1])

    def ask():
        answer = next(answers)
        if answer is error:
            raise error
        return answer

    assert run_all(Runner(ask, **FAST), ()) == ([1], [[error]])


def test_a_try_that_takes_too_long_fails():
    async def ask():
        await asyncio.sleep(60)

    _, [tried] = run_all(Runner(ask, timeout=0.01, max_retries=1, **FAST), ())
    assert [type(error) for error in tried] == [errors.TimeoutError] * 2


def test_a_function_that_cancels_itself_fails_that_call():
    async def ask(n):
        if n == 1:
            raise asyncio.CancelledError
        return n

    results, exceptions = run_all(Runner(ask, **FAST), (0,), (1,), (2,))
    assert results == [0, None, 2]
    assert [type(error) for error in exceptions[1]] == [errors.CancelledError]


def test_a_function_that_exits_ends_the_run_and_the_schedule_stays():
    runner = Runner(sys.exit)
    runner.schedule(3)
    with pytest.raises(SystemExit):
        runner.run()
    assert runner.interrupted
    assert runner.results() == ([None], [[]])


# Running it


def test_it_runs_twice_outside_and_inside_a_loop_with_the_same_runner():
    runner = Runner(double_later, [requests(100)])
    assert run_all(runner, (1,)) == ([2], [[]])
    assert run_all(runner, (2,), (3,)) == ([4, 6], [[], []])

    async def inside():
        blocking = run_all(runner, (4,))  # as a notebook does
        coroutine = await _run_coro(runner, (5,), (6,))
        return blocking, coroutine

    assert asyncio.run(inside()) == (([8], [[]]), ([10, 12], [[], []]))
    assert run_all(runner, (7,)) == ([14], [[]])


def test_one_run_at_a_time():
    async def main():
        runner = Runner(double_later)
        runner.schedule(1)
        first = asyncio.ensure_future(runner.run_coro())
        await asyncio.sleep(0)
        with pytest.raises(ConfigError, match="runs already"):
            await runner.run_coro()
        return await first

    assert asyncio.run(main()) == ([2], [[]])


def test_run_in_the_thread_of_the_calls_says_what_to_do_instead():
    async def ask():
        return Runner(double).run()

    _, [[error]] = run_all(Runner(ask), ())
    assert isinstance(error, ConfigError)
    assert "await run_coro() here" in str(error)


def test_calls_are_scheduled_while_it_runs_by_the_function_itself():
    async def tree(depth):
        if depth:
            runner.schedule(depth - 1)
            runner.schedule(depth - 1)
        return depth

    runner = Runner(tree, [requests(1000)])
    results, exceptions = run_all(runner, (5,))
    assert sorted(results) == sorted(depth for depth in range(6) for _ in range(2 ** (5 - depth)))
    assert len(exceptions) == 63


def test_calls_are_scheduled_while_it_runs_by_other_threads():
    begun = threading.Event()

    def ask(n):
        if n == -1:
            begun.set()
            for thread in threads:
                thread.join()
        return n

    def add(first):
        begun.wait()
        for n in range(first, first + 50):
            runner.schedule(n)

    runner = Runner(ask)
    threads = [threading.Thread(target=add, args=(first,)) for first in (0, 50, 100)]
    for thread in threads:
        thread.start()
    results, _ = run_all(runner, (-1,))
    assert sorted(results) == list(range(-1, 150))
    assert results[0] == -1
    assert runner.results() == ([], [])


def test_calls_come_as_they_complete():
    async def ask(n):
        await asyncio.sleep(0.005 * (3 - n))
        if n == 1:
            raise OSError
        return n

    runner = Runner(ask, max_retries=0)
    for n in range(4):
        runner.schedule(n)
    seen = list(runner.as_completed())
    assert [finished.index for finished in seen] == [3, 2, 1, 0]
    assert [(finished.ok, finished.result) for finished in seen] == [(True, 3), (True, 2), (False, None), (True, 0)]
    assert [type(error) for error in seen[2].exceptions] == [OSError]
    assert seen[2].call.args == (1,)
    assert runner.results() == ([], [])


def test_calls_come_as_they_complete_in_a_coroutine():
    async def main():
        runner = Runner(double_later)
        for n in range(3):
            runner.schedule(n)
        return [finished.result async for finished in runner.as_completed()]

    assert sorted(asyncio.run(main())) == [0, 2, 4]


def test_as_completed_tells_what_failed_without_a_run_too():
    runner = Runner(double, [Resource("x", 1, 60, lambda call: {}[call.get_argument("n")])])
    runner.schedule(1)
    (finished,) = runner.as_completed()
    assert isinstance(finished, Finished)
    assert [type(error) for error in finished.exceptions] == [KeyError]


def test_leaving_as_completed_early_cancels_what_runs_and_the_next_run_goes_on():
    calls = []

    async def ask(n):
        calls.append(n)
        await asyncio.sleep(0 if n == 0 else 0.05)
        return n

    runner = Runner(ask, max_concurrent=2)
    for n in range(4):
        runner.schedule(n)
    for finished in runner.as_completed():
        assert finished.result == 0
        break
    assert runner.interrupted
    assert runner.results() == ([0, None, None, None], [[], [], [], []])
    assert runner.run() == ([0, 1, 2, 3], [[], [], [], []])
    assert not runner.interrupted
    assert calls.count(0) == 1


def test_a_coroutine_that_is_cancelled_keeps_what_was_answered_and_the_next_run_goes_on():
    calls = []

    async def ask(n):
        calls.append(n)
        if n == 3 and calls.count(3) == 1:
            running.cancel()
            await asyncio.sleep(60)
        return n

    async def main():
        nonlocal running
        running = asyncio.ensure_future(runner.run_coro())
        with pytest.raises(asyncio.CancelledError):
            await running

    running = None
    runner = Runner(ask, max_concurrent=1)
    for n in range(6):
        runner.schedule(n)
    asyncio.run(main())
    assert runner.results()[0] == [0, 1, 2, None, None, None]
    assert runner.run()[0] == [0, 1, 2, 3, 4, 5]
    assert sorted(calls) == [0, 1, 2, 3, 3, 4, 5]


def test_a_run_that_is_to_stop_takes_no_more_from_the_schedule():
    async def ask(n):
        if n == 0:  # the other place is free from now on
            runner._run.stop()
            await asyncio.sleep(0.05)
        return n

    runner = Runner(ask, max_concurrent=2)
    results, _ = run_all(runner, *((n,) for n in range(3_000)))
    assert results == [0, 1] + [None] * 2_998
    assert runner.interrupted
    assert runner._plan.gate.statistics().admitted <= runner._plan.gate.window


# How far it is


def test_progress_is_told_and_logged(caplog):
    told = []

    async def ask(n):
        await asyncio.sleep(0.02)
        if n == 0:
            raise OSError
        return n

    runner = Runner(ask, max_retries=0, max_concurrent=2, progress_interval=0.005, on_progress=told.append)
    with caplog.at_level(logging.INFO, "rxllm.runner"):
        run_all(runner, *((n,) for n in range(6)))
    assert told
    assert all(row.total == 6 and row.succeeded + row.failed + row.pending == 6 for row in told)
    assert max(row.running for row in told) == 2
    assert told[-1].succeeded >= 2
    assert told[-1].failed == told[-1].errors == 1
    assert 0 < told[0].seconds <= told[-1].seconds
    assert "of 6 done" in caplog.text
    assert runner.statistics().total == 0


def test_what_on_progress_raises_is_logged_and_ends_nothing(caplog):
    async def ask():
        await asyncio.sleep(0.02)
        return 1

    runner = Runner(ask, progress_interval=0.005, on_progress=lambda _: 1 / 0)
    assert run_all(runner, ()) == ([1], [[]])
    assert "ZeroDivisionError" in caplog.text


def test_a_long_wait_of_all_calls_is_warned_of_once(caplog):
    runner = Runner(double, [requests(1, 0.2)], progress_interval=0.01, long_wait_warning_seconds=0.05)
    assert run_all(runner, (1,), (2,))[0] == [2, 4]
    warnings = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "all calls wait for resources; the next one starts in" in warnings[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"function": 5}, "function must be callable, got 5"),
        ({"max_concurrent": 0}, "max_concurrent must be a whole number >= 1, got 0"),
        ({"max_retries": -1}, "max_retries must be a whole number >= 0, got -1"),
        ({"validation": 5}, "validation must be callable or None, got 5"),
        ({"validation": bool, "validation_function": bool}, "validation is another name for validation_function"),
        ({"progress_interval": 0}, "progress_interval must be a finite number > 0 or None, got 0"),
        ({"long_wait_warning_seconds": -1}, "long_wait_warning_seconds must be"),
        ({"backoff_base": 0}, "backoff_base must be"),
        ({"backoff_cap": 0.1}, "backoff_cap must be a finite number >= 0.5, got 0.1"),
        ({"timeout": 0}, "timeout must be"),
        ({"grace": -1}, "grace must be"),
        ({"on_progress": 1}, "on_progress must be"),
        ({"resources": ["500/minute"]}, "resources must be Resources, got '500/minute'"),
    ],
    ids=[
        "function",
        "max-concurrent",
        "max-retries",
        "validation",
        "both-validations",
        "progress-interval",
        "long-wait",
        "backoff-base",
        "backoff-cap",
        "timeout",
        "grace",
        "on-progress",
        "resources",
    ],
)
def test_wrong_arguments_are_named(arguments, said):
    with pytest.raises(ConfigError) as raised:
        Runner(**{"function": double, **arguments})
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("", 1, 1), "name must be a string that is not empty, got ''"),
        (("x", -1, 1), "quota must be a finite number >= 0, got -1"),
        (("x", 1, 0), "time_window_seconds must be a finite number >= 0.001, got 0"),
        (("x", 1, 1, 5), "arguments_usage_extractor must be callable or None, got 5"),
    ],
    ids=["name", "quota", "window", "extractor"],
)
def test_wrong_arguments_of_a_resource_are_named(arguments, said):
    with pytest.raises(ConfigError) as raised:
        Resource(*arguments)
    assert said in str(raised.value)


# Ctrl-C, in child processes

PRELUDE = """
import asyncio, os, signal, sys, threading, time
from rxllm.runner import Resource, Runner

signal.signal(signal.SIGINT, signal.default_int_handler)  # who is started in the background ignores it
calls = []
begun, stopping = threading.Event(), threading.Event()

async def ask(n):
    calls.append(n)
    if len(calls) > 3:  # three are done, the next three wait for Ctrl-C, and the others have not begun
        if len(calls) == 6:
            begun.set()
        while not stopping.is_set():
            await asyncio.sleep(0.001)
    return n

async def ask_for_ever(n):
    begun.set()
    await asyncio.sleep(60)

def interrupt():
    os.kill(os.getpid(), signal.SIGINT)

def interrupt_when_begun(runner, times=1):
    begun.wait()
    run = runner._run
    for _ in range(times):
        interrupt()
        while runner._run is run and not run.stopping:
            time.sleep(0.001)
    stopping.set()

def interrupted(runner, times=1):
    threading.Thread(target=interrupt_when_begun, args=(runner, times), daemon=True).start()
    return runner

def say(*words):
    print(*words, flush=True)

twelve = Runner(ask, [Resource("calls", 100, 3600, lambda call: 1)], max_concurrent=3)
for n in range(12):
    twelve.schedule(n)
"""


def child(body):
    script = textwrap.dedent(PRELUDE) + textwrap.dedent(body)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


IN_PLACE = """
results, exceptions = interrupted(twelve).run()
say(sorted(results[:6]) == sorted(calls), results[6:] == [None] * 6, exceptions == [[]] * 12, twelve.interrupted)
say(twelve._plan.gate.statistics().quotas[0].available)
results, exceptions = twelve.run()
say(results == list(range(12)), sorted(calls) == list(range(12)), twelve.interrupted, twelve.run())
"""


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(IN_PLACE, id="in-a-script"),
        pytest.param(
            "async def main():\n" + textwrap.indent(IN_PLACE, "    ") + "\nasyncio.run(main())",
            id="in-a-coroutine-under-asyncio-run",
        ),
    ],
)
def test_ctrl_c_in_run_gives_what_is_done_and_the_next_run_repeats_nothing(body):
    assert child(body) == [
        "True True True True",
        "94.0",
        "True True False ([], [])",
    ]


def test_ctrl_c_under_asyncio_run_cancels_run_coro_and_a_run_goes_on():
    assert child(
        """
        try:
            asyncio.run(interrupted(twelve).run_coro())
        except KeyboardInterrupt:
            say(twelve.results()[0] == [0, 1, 2] + [None] * 9, twelve.interrupted)
        results, _ = twelve.run()
        say(results == list(range(12)), sorted(calls) == sorted([*range(12), 3, 4, 5]))
        """
    ) == ["True True", "True True"]


def test_ctrl_c_in_as_completed_gives_what_runs_and_then_raises():
    assert child(
        """
        seen = []
        try:
            for finished in interrupted(twelve).as_completed():
                seen.append(finished.result)
        except KeyboardInterrupt:
            say(sorted(seen), sorted(calls))
        results, _ = twelve.run()
        say(results == list(range(12)), sorted(calls) == list(range(12)))
        """
    ) == ["[0, 1, 2, 3, 4, 5] [0, 1, 2, 3, 4, 5]", "True True"]


def test_a_second_ctrl_c_does_not_wait_for_what_runs():
    assert child(
        """
        hanging = Runner(ask_for_ever, grace=3600)
        hanging.schedule(1)
        say(interrupted(hanging, 2).run(), hanging.interrupted)
        """
    ) == ["([None], [[]]) True"]


def test_what_runs_after_ctrl_c_has_the_grace_to_end():
    assert child(
        """
        hanging = Runner(lambda: (begun.set(), time.sleep(60)), grace=0.05)
        hanging.schedule()
        say(interrupted(hanging).run(), hanging.interrupted)
        """
    ) == ["([None], [[]]) True"]


def test_what_waits_for_a_resource_or_a_retry_is_not_waited_for_after_ctrl_c():
    assert child(
        """
        def fails(n):
            begun.set() if n else 1 / 0
            stopping.wait()
            return n

        two = Resource("x", 2, 3600, lambda call: 1)
        waiting = Runner(fails, [two], max_concurrent=1, backoff_base=3600, backoff_cap=3600, grace=3600)
        for n in range(3):
            waiting.schedule(n)
        results, exceptions = interrupted(waiting).run()
        say(results, exceptions, waiting.interrupted)
        """
    ) == ["[None, 1, None] [[ZeroDivisionError('division by zero')], [], []] True"]


def test_ctrl_c_at_the_very_beginning_of_a_run_is_not_lost():
    assert child(
        """
        from rxllm import runtime

        background, early = runtime.background, Runner(ask)
        runtime.background = lambda: (interrupt(), background())[1]  # it starts the loop
        early.schedule(1)
        say(early.run(), early.interrupted)
        """
    ) == ["([None], [[]]) True"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_other_signals_come_to_the_loop_that_waits_for_a_run():
    assert child(
        """
        async def main():
            asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, heard.set_result, None)
            quiet = Runner(lambda: os.kill(os.getpid(), signal.SIGUSR1))
            quiet.schedule()
            quiet.run()
            await asyncio.wait_for(heard, 10)
            say(quiet.interrupted)

        loop = asyncio.new_event_loop()
        heard = loop.create_future()
        loop.run_until_complete(main())
        loop.close()
        """
    ) == ["False"]


def test_run_leaves_the_handler_of_signals_as_it_was():
    assert child(
        """
        def handler(*_):
            say("own")

        before = signal.getsignal(signal.SIGINT)
        quiet = Runner(int)
        quiet.schedule()
        quiet.run()
        say(signal.getsignal(signal.SIGINT) is before)
        signal.signal(signal.SIGINT, handler)
        own = Runner(interrupt)
        own.schedule()
        own.run()
        say(signal.getsignal(signal.SIGINT) is handler, own.interrupted)
        """
    ) == ["True", "own", "True False"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_handler_that_exits_cancels_what_runs():
    assert child(
        """
        async def wait_for_ever():
            begun.set()
            try:
                await asyncio.sleep(60)
            finally:
                say("cancelled")

        def terminate():
            begun.wait()
            os.kill(os.getpid(), signal.SIGTERM)

        signal.signal(signal.SIGTERM, lambda *_: sys.exit(3))
        hanging = Runner(wait_for_ever)
        hanging.schedule()
        threading.Thread(target=terminate, daemon=True).start()
        try:
            hanging.run()
        except SystemExit as error:
            say(error, hanging.interrupted)
        """
    ) == ["cancelled", "3 True"]


def test_no_repr_or_message_shows_what_a_call_is_given():
    key = "sk-marker-0123456789"
    runner = Runner(lambda key, *, other: 1, [Resource("x", 0, 60, one)])
    with pytest.raises(ValueError, match="exceeds resource quota") as raised:
        runner.schedule(key, other=key)
    call = Call(double, (key,), {"n": key})
    assert repr(call) == "double(…, n=…)"
    assert key not in str(raised.value) + repr(runner)


def test_the_example_asks_for_all_words_and_tells_what_failed(tmp_path):
    example = Path(__file__).resolve().parents[1] / "examples" / "runner.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(example)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stderr) == (0, "")
    *lines, last = done.stdout.splitlines()
    assert len(lines) == 12
    assert not [line for line in lines if "failed" in line]
    assert last.startswith("12 calls; tries that failed: ")
    for said in ("1 HTTPError", "1 JSONDecodeError", "1 RemoteDisconnected"):
        assert said in last
