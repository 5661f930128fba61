"""Clients: their keys, their ends, functions as clients, and that no key is ever shown."""

from __future__ import annotations

import asyncio
import contextvars
import copy
import functools
import gc
import logging
import pickle
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest

import rxllm
from rxllm import Outcome, Reply, Request, Secret, Timeouts, Usage
from rxllm.clock import loop_clock
from rxllm.errors import CallError, CancelledError, ConfigError, InvalidRequestError, ServerError, TimeoutError
from rxllm.providers.base import Call
from rxllm.testing import VirtualScheduler, record
from rxllm.testing._faults import NAMED
from rxllm.testing.simulated import SimulatedProvider
from rxllm.transports import MemoryTransport, Response
from rxllm.transports.base import Answer

KEY = "sk-marker-0123456789"
ONCE = rxllm.Backoff(attempts=1)
GOOD = b'{"choices":[{"message":{"content":"hello"},"finish_reason":"stop"}]}'


def answering(status: int = 200, body: bytes = GOOD, **headers: str) -> MemoryTransport:
    return MemoryTransport(lambda _call: Response(status, headers, body))


def calls(client: Any, items: list[Any], **settings: Any) -> list[Outcome[Any]]:
    """Call with each item, in order; on a loop of its own, with nothing left behind."""

    async def main() -> list[Outcome[Any]]:
        reported: list[Any] = []
        asyncio.get_running_loop().set_exception_handler(lambda _loop, context: reported.append(context))
        before = asyncio.all_tasks()
        outcomes = await rxllm.acollect(
            rxllm.from_iterable(items).pipe(
                rxllm.call(client, ordered=True, retry=rxllm.Backoff(attempts=1), **settings)
            )
        )
        assert asyncio.all_tasks() == before
        assert not reported
        return outcomes

    return asyncio.run(main())


def call(client: Any, item: Any = "hi", **settings: Any) -> Outcome[Any]:
    (outcome,) = calls(client, [item], **settings)
    return outcome


# keys


def test_a_missing_key_names_its_variable_before_the_first_request(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(ConfigError, match="set the environment variable OPENAI_API_KEY, or give api_key"):
        rxllm.OpenAI("m")
    monkeypatch.setenv("MY_KEY", "")
    with pytest.raises(ConfigError, match="MY_KEY"):
        rxllm.OpenAI("m", api_key_env="MY_KEY")


@pytest.mark.parametrize("value", [f"{KEY}\n", f" {KEY}", f"{KEY}\x00" if sys.platform == "win32" else f"{KEY}\x1b"])
def test_a_key_with_a_stray_character_names_its_variable_and_not_its_value(monkeypatch, value):
    monkeypatch.setenv("MY_KEY", value)
    with pytest.raises(ConfigError, match="MY_KEY") as caught:
        rxllm.OpenAI("m", api_key_env="MY_KEY")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize("key", [KEY.encode(), [KEY], {KEY: 1}, 5, "", "ключ-0123456789", f"{KEY}\r\nX: y"])
def test_a_key_of_another_kind_is_refused_without_showing_it(key):
    with pytest.raises(ConfigError) as caught:
        rxllm.OpenAI("m", api_key=key)
    assert KEY not in str(caught.value)
    assert "0123456789" not in str(caught.value)


def test_the_key_is_taken_from_the_environment_and_sent(monkeypatch):
    async def main() -> None:
        async with (
            SimulatedProvider(key=KEY) as provider,
            rxllm.OpenAI("m", provider.url, api_key_env="MY_KEY") as client,
        ):
            (outcome,) = await rxllm.acollect(rxllm.from_iterable(["hi"]).pipe(rxllm.call(client)))
            assert outcome.ok
            await client.aclose()

    monkeypatch.setenv("MY_KEY", KEY)
    asyncio.run(main())


def test_a_key_may_be_given_as_a_secret():
    with rxllm.OpenAI("m", api_key=Secret(KEY), transport=answering()) as client:
        assert call(client).ok


def test_a_client_with_a_literal_key_refuses_to_be_pickled_or_copied():
    client = rxllm.OpenAI("m", api_key=KEY)
    for attempt in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(ConfigError, match="api_key_env") as caught:
            attempt(client)
        assert KEY not in str(caught.value)


def test_a_client_with_the_name_of_a_variable_is_pickled_without_the_key(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    client = rxllm.OpenAI("m", "http://localhost:1/v1", api_key_env="MY_KEY")
    data = pickle.dumps(client)
    assert KEY.encode() not in data
    monkeypatch.setenv("MY_KEY", "another key")
    assert repr(pickle.loads(data)) == repr(client) == "OpenAI(model='m', base_url='http://localhost:1/v1')"
    monkeypatch.delenv("MY_KEY")
    with pytest.raises(ConfigError, match="MY_KEY"):
        pickle.loads(data)


class Answers:
    """A transport that pickles."""

    async def send(self, call: Call, timeouts: Timeouts) -> Response:
        return Response(200, {}, GOOD)

    async def open(self, call: Call, timeouts: Timeouts) -> Answer:
        raise NotImplementedError

    async def aclose(self) -> None: ...

    def close(self) -> None: ...


class Special(rxllm.OpenAI):
    pass


def test_a_copy_keeps_the_transport_and_the_class(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    again = copy.copy(Special("m", api_key_env="MY_KEY", transport=Answers()))
    assert type(again) is Special
    assert call(again).text == "hello"  # not from the network


# counting tokens oneself


def letters(request: Request) -> float:
    text: str = request.body["messages"][0]["content"]
    if text == "bug":
        raise LookupError("no such word")
    return len(text) / 2


def test_a_function_that_counts_tokens_is_what_a_gate_of_tokens_books():
    gate = rxllm.Gate("1000 tokens/hour")
    client = rxllm.OpenAI("m", api_key=KEY, transport=answering(), count_tokens=letters)
    outcomes = calls(client, [rxllm.chat("x" * 40, max_tokens=5), rxllm.chat("x" * 4000, max_tokens=5)], gate=gate)
    assert outcomes[0].ok
    assert gate.statistics().quotas[0].available == 1000 - 20 - 5
    assert "needs 2,005 tokens" in str(outcomes[1].error)


def test_a_function_that_cannot_count_a_request_fails_it_alone_and_before_it_is_sent():
    sent: list[bytes] = []

    def answer(call: Call) -> Response:
        sent.append(call.body)
        return Response(200, {}, GOOD)

    client = rxllm.OpenAI("m", api_key=KEY, transport=MemoryTransport(answer), count_tokens=letters)
    requests = [rxllm.chat(text) for text in ("good", "bug", "good")]
    outcomes = calls(client, requests, gate=rxllm.Gate("100_000 tokens/minute"))
    assert [outcome.ok for outcome in outcomes] == [True, False, True]
    assert isinstance(outcomes[1].error, ConfigError)
    assert str(outcomes[1].error) == "count_tokens raised LookupError: no such word"
    assert outcomes[1].request is requests[1]
    assert len(sent) == 2


def test_the_statistics_say_how_far_a_function_that_counts_tokens_is_off():
    body = GOOD[:-1] + b',"usage":{"prompt_tokens":25,"completion_tokens":5}}'
    client = rxllm.OpenAI("m", api_key=KEY, transport=answering(body=body), count_tokens=letters)
    calls(client, [rxllm.chat("x" * 40)] * 20, gate=rxllm.Gate("100_000 tokens/minute"))
    found = client.statistics()
    assert found.replies == 20
    assert (found.input_error, found.input_bias) == pytest.approx((0.2, -0.2))


def test_a_function_that_counts_tokens_is_pickled_with_its_client(monkeypatch):
    monkeypatch.setenv("MY_KEY", KEY)
    request = rxllm.chat("x" * 40, max_tokens=5)
    client = rxllm.OpenAI("m", api_key_env="MY_KEY", count_tokens=letters)
    assert pickle.loads(pickle.dumps(client)).cost(request)["input_tokens"] == 20
    without = rxllm.OpenAI("m", api_key_env="MY_KEY")
    assert pickle.loads(pickle.dumps(without)).cost(request)["input_tokens"] == 10
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(rxllm.OpenAI("m", api_key_env="MY_KEY", count_tokens=lambda _request: 1))


def test_a_function_that_counts_tokens_is_one():
    with pytest.raises(ConfigError, match="count_tokens must be callable or None, got 4"):
        rxllm.OpenAI("m", api_key=KEY, count_tokens=4)


# the ends


def test_a_closed_client_refuses_and_closing_again_is_harmless():
    client = rxllm.OpenAI("m", api_key=KEY, transport=answering())
    stream = client.send(rxllm.chat("hi"))
    with client as same:
        assert same is client
    client.close()
    with pytest.raises(ConfigError, match=r"OpenAI\(model='m'.*is closed"):
        client.send(rxllm.chat("hi"))
    assert isinstance(call(client).error, ConfigError)
    with pytest.raises(ConfigError, match="is closed"):
        rxllm.collect(stream)  # made before, subscribed after
    asyncio.run(client.aclose())


def test_async_with_closes_too():
    async def main() -> None:
        async with rxllm.OpenAI("m", api_key=KEY, transport=answering()) as client:
            pass
        with pytest.raises(ConfigError, match="is closed"):
            client.send(rxllm.chat("hi"))
        async with rxllm.function(len) as function:
            pass
        with pytest.raises(ConfigError, match="is closed"):
            function.send(rxllm.chat("hi"))

    asyncio.run(main())


def test_a_request_that_cannot_be_encoded_was_never_sent():
    asked: list[str] = []
    transport = MemoryTransport(lambda call: (asked.append(call.path), Response(200, {}, GOOD))[1])
    outcome = call(rxllm.OpenAI("m", api_key=KEY, transport=transport), Request(body={"x": object()}))
    assert type(outcome.error) is InvalidRequestError
    assert not outcome.error.sent
    assert not asked


def test_send_is_cold_and_each_subscription_is_one_try():
    asked: list[bytes] = []
    transport = MemoryTransport(lambda call: (asked.append(call.body), Response(200, {}, GOOD))[1])
    stream = rxllm.OpenAI("m", api_key=KEY, transport=transport).send(rxllm.chat("hi"))
    assert not asked
    assert [reply.text for reply in rxllm.collect(stream)] == ["hello"]
    assert [reply.text for reply in rxllm.collect(stream)] == ["hello"]
    assert len(asked) == 2
    assert asked[0] == asked[1]


@pytest.mark.parametrize("make", [lambda: rxllm.OpenAI("m", api_key=KEY), lambda: rxllm.function(len)])
def test_a_real_client_in_virtual_time_says_that_it_needs_a_loop(make):
    seen = record(VirtualScheduler(), make().send(rxllm.chat("hi")))
    assert seen.end is not None
    assert isinstance(seen.end.value, ConfigError)
    assert "needs an asyncio loop" in str(seen.end.value)


# functions


def plain(item: Any) -> str:
    return f"<{item}>"


async def waiting(item: Any) -> str:
    await asyncio.sleep(0.001)
    return f"<{item}>"


class Model:
    def method(self, item: Any) -> str:
        return f"<{item}>"

    async def coroutine(self, item: Any) -> str:
        return f"<{item}>"

    @staticmethod
    def static(item: Any) -> str:
        return f"<{item}>"

    @classmethod
    async def of_the_class(cls, item: Any) -> str:
        return f"<{item}>"


class PlainCallable:
    def __call__(self, item: Any) -> str:
        return f"<{item}>"


class AsyncCallable:
    async def __call__(self, item: Any) -> str:
        return f"<{item}>"


def with_two(before: str, item: Any) -> str:
    return f"{before}{item}>"


async def waiting_with_two(before: str, item: Any) -> str:
    return f"{before}{item}>"


FUNCTIONS: dict[str, Callable[[Any], Any]] = {
    "function": plain,
    "coroutine-function": waiting,
    "method": Model().method,
    "coroutine-method": Model().coroutine,
    "static-method": Model.static,
    "class-method": Model.of_the_class,
    "partial": functools.partial(with_two, "<"),
    "partial-of-a-coroutine-function": functools.partial(waiting_with_two, "<"),
    "partial-of-a-partial": functools.partial(functools.partial(waiting_with_two), "<"),
    "partial-of-an-async-object": functools.partial(AsyncCallable()),
    "lambda": lambda item: f"<{item}>",
    "lambda-that-returns-a-coroutine": lambda item: waiting(item),  # noqa: PLW0108  the point
    "object": PlainCallable(),
    "async-object": AsyncCallable(),
    "builtin": "<{}>".format,
}


@pytest.mark.parametrize("f", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_anything_callable_is_a_client(f):
    with rxllm.function(f) as client:
        outcomes = calls(client, ["a", 2, None])
        assert [outcome.value for outcome in outcomes] == ["<a>", "<2>", "<None>"]
        assert [outcome.text for outcome in outcomes] == ["<a>", "<2>", "<None>"]
        assert [outcome.request.body for outcome in outcomes] == ["a", 2, None]


def test_a_function_gets_a_request_when_the_pipeline_has_one():
    request = rxllm.chat("hi")
    assert call(rxllm.function(lambda item: item), request).value is request


def test_a_function_may_return_a_reply_or_anything_else():
    reply = Reply(value=5, text="five")
    assert call(rxllm.function(lambda _item: reply)).reply is reply
    outcome = call(rxllm.function(lambda _item: {"x": 1}))
    assert (outcome.value, outcome.text) == ({"x": 1}, "")


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("error", [KeyError("x"), CallError("bad"), TimeoutError("late"), OSError(5), RecursionError()])
def test_what_a_function_raises_is_the_error_of_its_request_only(error, is_async):
    def work(item: Any) -> Any:
        if item == 1:
            raise error
        return item

    async def work_later(item: Any) -> Any:
        return work(item)

    outcomes = calls(rxllm.function(work_later if is_async else work), [0, 1, 2])
    assert [outcome.ok for outcome in outcomes] == [True, False, True]
    assert outcomes[1].error is error
    assert error.__traceback__ is None
    assert outcomes[1].attempts[0].error is error


def test_the_errors_of_all_attempts_are_values_that_hold_no_frames():
    def fail(_item: Any) -> None:
        raise ServerError("down")

    source = rxllm.from_iterable([1])
    again = rxllm.Backoff(attempts=3, base=0.001)
    (outcome,) = rxllm.collect(source.pipe(rxllm.call(rxllm.function(fail), retry=again)))
    errors = [attempt.error for attempt in outcome.attempts]
    assert len(errors) == 3
    assert all(error is not None and error.__traceback__ is None for error in errors)


def test_a_function_that_raises_stop_iteration_fails_its_request_and_does_not_hang():
    outcomes = calls(rxllm.function(lambda item: next(iter([item] if item else []))), [1, 0])
    assert outcomes[0].value == 1
    assert "StopIteration" in str(outcomes[1].error)


def test_a_function_that_cancels_itself_fails_its_request_and_does_not_hang():
    async def cancels(item: Any) -> Any:
        if item:
            raise asyncio.CancelledError
        return item

    outcomes = calls(rxllm.function(cancels), [1, 0])
    assert type(outcomes[0].error) is CancelledError
    assert outcomes[1].ok


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_sys_exit_in_a_function_ends_the_run(is_async):
    async def leave(_item: Any) -> None:
        sys.exit(3)

    client = rxllm.function(leave if is_async else sys.exit)
    with pytest.raises(SystemExit), rxllm.iterate(rxllm.from_iterable([3]).pipe(rxllm.call(client))) as outcomes:
        list(outcomes)
    assert rxllm.collect(rxllm.from_iterable(["a"]).pipe(rxllm.call(rxllm.function(plain))))[0].ok  # the loop goes on


def test_cancelling_a_try_from_outside_ends_the_run_and_hangs_nobody():
    async def main() -> None:
        started = asyncio.Event()

        async def wait(_item: Any) -> None:
            started.set()
            await asyncio.Event().wait()

        me = asyncio.current_task()
        running = asyncio.create_task(
            rxllm.acollect(rxllm.from_iterable(["a", "b", "c"]).pipe(rxllm.call(rxllm.function(wait))))
        )
        await started.wait()
        for task in asyncio.all_tasks() - {me, running}:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(main())


marker: contextvars.ContextVar[str] = contextvars.ContextVar("marker", default="lost")


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_context_variables_of_the_caller_come_along(is_async):
    async def later(_item: Any) -> str:
        return marker.get()

    client = rxllm.function(later if is_async else lambda _item: marker.get())
    token = marker.set("found")
    try:
        assert call(client).value == "found"
        assert rxllm.collect(rxllm.from_iterable(["a"]).pipe(rxllm.call(client)))[0].value == "found"
    finally:
        marker.reset(token)


def function_threads() -> int:
    return sum(thread.name.startswith("rxllm function") for thread in threading.enumerate())


def wait_until(condition: Callable[[], bool]) -> None:
    until = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < until, "it did not come true"
        time.sleep(0.005)


def test_threads_are_bounded_and_none_is_left_after_close():
    gc.collect()
    wait_until(lambda: function_threads() == 0)
    lock = threading.Lock()
    running = most = 0

    def work(_item: Any) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.005)
        with lock:
            running -= 1

    with rxllm.function(work, threads=3) as client:
        assert all(outcome.ok for outcome in calls(client, list(range(30))))
        assert 1 < function_threads() <= 3
    assert 1 < most <= 3
    wait_until(lambda: function_threads() == 0)


def test_a_coroutine_function_needs_no_thread():
    before = function_threads()
    with rxllm.function(waiting) as client:
        calls(client, [1, 2])
        assert function_threads() == before


def test_closing_during_calls_ends_those_that_wait_for_a_thread():
    release = threading.Event()

    async def main() -> None:
        client = rxllm.function(lambda item: release.wait(20) and item, threads=1)
        running = asyncio.create_task(
            rxllm.acollect(rxllm.from_iterable([1, 2, 3]).pipe(rxllm.call(client, window=2, ordered=True)))
        )
        while function_threads() == 0:
            await asyncio.sleep(0.005)
        await asyncio.sleep(0.01)
        client.close()
        release.set()
        outcomes = await running
        assert [outcome.ok for outcome in outcomes] == [True, False, False]
        assert isinstance(outcomes[1].error, CancelledError)  # it waited for a thread
        assert isinstance(outcomes[2].error, ConfigError)  # it came too late

    gc.collect()
    wait_until(lambda: function_threads() == 0)
    asyncio.run(main())
    wait_until(lambda: function_threads() == 0)


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_total_bounds_a_call_of_a_function(is_async):
    release = threading.Event()
    cancelled: list[bool] = []

    async def stuck(_item: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    client = rxllm.function(stuck if is_async else lambda _item: release.wait(20))
    outcome = call(client, timeouts=Timeouts(total=0.03))
    release.set()
    assert type(outcome.error) is TimeoutError
    assert outcome.error.phase == "total"
    assert "0.03 s" in str(outcome.error)
    assert cancelled == [True] * is_async
    client.close()


def test_a_timeout_error_of_the_functions_own_is_passed_on():
    async def late(_item: Any) -> None:
        raise asyncio.TimeoutError("mine")  # noqa: UP041  the builtin, not ours

    outcome = call(rxllm.function(late), timeouts=Timeouts(total=20))
    assert str(outcome.error) == "mine"


def test_disposing_cancels_a_coroutine_function():
    cancelled: list[bool] = []

    async def stuck(_item: Any) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.append(True)
            raise

    async def main() -> None:
        async with rxllm.aiterate(rxllm.from_iterable(["a", "b"]).pipe(rxllm.call(rxllm.function(stuck)))):
            await asyncio.sleep(0.01)
        assert cancelled == [True, True]

    asyncio.run(main())


def test_a_function_client_is_pickled_with_its_function_and_without_its_threads():
    client = rxllm.function(plain, threads=2)
    assert call(client).ok
    again = pickle.loads(pickle.dumps(client))
    assert call(again, "x").value == "<x>"
    assert repr(again) == repr(client) == "function(plain)"
    again.close()
    client.close()


@pytest.mark.parametrize(
    "arguments",
    [{"f": None}, {"f": 5}, {"f": plain, "cost": 5}, {"f": plain, "threads": 0}, {"f": plain, "threads": 1.5}],
)
def test_arguments_of_another_kind_are_refused(arguments):
    f = arguments.pop("f")
    with pytest.raises(ConfigError):
        rxllm.function(f, **arguments)


def test_a_function_may_say_what_a_request_costs():
    gate = rxllm.Gate("10 pages/hour")
    client = rxllm.function(plain, cost=lambda request: {"pages": len(request.body)})
    outcomes = calls(client, ["abc", "x" * 11], gate=gate)
    assert outcomes[0].ok
    assert "needs 11 pages" in str(outcomes[1].error)


# the key is shown nowhere


class Everything(logging.Handler):
    """Keeps every record as text, with its arguments and its traceback."""

    def __init__(self) -> None:
        super().__init__(level=0)
        self.texts: list[str] = []
        self.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.extend((self.format(record), repr(record.__dict__)))


def shown(value: Any) -> list[str]:
    """Return all that a person could come to see of a value."""
    texts = [repr(value), str(value), f"{value}"]
    if isinstance(value, BaseException):
        shown_frames = traceback.TracebackException.from_exception(value, capture_locals=True)
        shown_frames.stack[:] = [frame for frame in shown_frames.stack if frame.filename != __file__]
        texts += ["".join(shown_frames.format(chain=False)), repr(value.args), repr(vars(value))]
        texts += [text for other in (value.__cause__, value.__context__) if other is not None for text in shown(other)]
    try:
        texts.append(pickle.dumps(value).decode("latin-1"))
    except (ConfigError, TypeError, AttributeError, pickle.PicklingError) as error:
        texts.append(str(error))
    return texts


def test_the_key_is_shown_nowhere_in_a_run_with_every_fault(monkeypatch, recwarn):
    everything = Everything()
    root = logging.getLogger()
    root.addHandler(everything)
    monkeypatch.setattr(root, "level", 0)
    texts: list[str] = []
    faults = [*NAMED, "400", "401", "404", "429", "500", "529"]

    async def main() -> None:
        loop = asyncio.get_running_loop()
        loop.set_debug(True)
        loop.set_exception_handler(lambda _loop, context: texts.append(repr(context)))
        settings = {"max_stall": 0.05, "fault_retry_after": 0.01, "retry_after": "off"}
        async with SimulatedProvider(script=faults * 2, **settings) as provider:
            client = rxllm.OpenAI("m", provider.url, api_key=KEY)
            source = rxllm.from_iterable(f"prompt {n}" for n in range(2 * len(faults)))
            limits = Timeouts(first_byte=0.03)
            once = rxllm.Backoff(attempts=1, base=0.001, cap=0.001)
            outcomes = await rxllm.acollect(
                source.pipe(rxllm.call(client, timeouts=limits, retry=once, deadline=5, window=1))
            )
            assert sum(not outcome.ok for outcome in outcomes) > len(faults)
            for outcome in outcomes:
                texts.extend(shown(outcome))
                for part in (outcome.error, *(attempt.error for attempt in outcome.attempts)):
                    texts.extend(shown(part))
            for bad in (client, client._transport, client._censor, client._provider):
                texts.extend(shown(bad))
            texts.extend(await direct(client, faults, provider))
            await client.aclose()
            texts.extend(shown(client))
        texts.append(repr(loop_clock(loop)))

    asyncio.run(main())
    gc.collect()
    texts += everything.texts
    texts += [f"{warning.message} {warning.source!r}" for warning in recwarn.list]
    root.removeHandler(everything)
    assert len(texts) > 200
    assert not [text for text in texts if KEY in text]


async def direct(client: rxllm.OpenAI, faults: list[str], provider: SimulatedProvider) -> list[str]:
    """Return what is shown of the errors of `send` itself, tracebacks and all."""
    texts: list[str] = []
    provider.set(script=faults)
    for _ in faults:
        try:
            await rxllm.acollect(client.send(rxllm.chat("hi"), timeouts=Timeouts(first_byte=0.03)))
        except CallError as error:
            texts.extend(shown(error))
    assert texts
    return texts


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        pytest.param(401, {}, b'{"error":{"message":"Incorrect API key provided: %b."}}' % KEY.encode(), id="echo"),
        pytest.param(401, {}, b"x" * 490 + KEY.encode(), id="at-the-cut-of-the-body"),
        pytest.param(401, {}, b'{"error":{"message":"%b"}}' % (b"x" * 480 + KEY.encode()), id="at-the-cut-of-the-text"),
        pytest.param(301, {"location": f"http://other/?key={KEY}"}, b"", id="in-a-redirect"),
        pytest.param(500, {"x-request-id": KEY}, b"", id="in-a-request-id"),
        pytest.param(200, {}, b'{"echo": "%b"' % KEY.encode(), id="in-a-garbled-answer"),
        pytest.param(200, {}, b'{"error": "no key %b"}' % KEY.encode(), id="in-an-error-that-is-200"),
        pytest.param(500, {}, b"\xff" + KEY.encode(), id="in-binary"),
    ],
)
def test_a_server_that_tells_the_key_does_not_get_it_into_an_error(status, headers, body):
    outcome = call(rxllm.OpenAI("m", api_key=KEY, transport=answering(status, body, **headers)))
    assert isinstance(outcome.error, CallError)
    assert outcome.error.status == status
    everything = "".join(shown(outcome) + shown(outcome.error))
    assert KEY not in everything
    assert KEY[:-4] not in everything  # nor most of it


@pytest.mark.parametrize("key", ["none", "any", "e", "EMPTY"])
def test_a_key_that_is_a_word_does_not_blot_out_that_word(key):
    body = b'{"error":{"message":"None of any messages, EMPTY or none."}}'
    outcome = call(rxllm.OpenAI("m", api_key=key, transport=answering(400, body)))
    assert "None of any messages, EMPTY or none." in str(outcome.error)


def test_warnings_are_errors_here():
    with pytest.raises(UserWarning):
        warnings.warn("seen", stacklevel=1)


@pytest.mark.parametrize("escaped", [r"sk-abc\/SENTINEL&x+y==", r"sk-abc/SENTINEL\u0026x+y=="])
def test_a_key_that_the_server_echoes_in_its_own_spelling_does_not_show(escaped):
    key = "sk-abc/SENTINEL&x+y=="
    body = b'{"error": {"message": "Incorrect API key: ' + escaped.encode() + b'"}}'
    transport = rxllm.transports.MemoryTransport(lambda _call: rxllm.transports.Response(401, {}, body))
    client = rxllm.OpenAI("any", api_key=key, transport=transport)
    [outcome] = rxllm.collect(rxllm.from_iterable(["a"]).pipe(rxllm.call(client)))
    assert "SENTINEL" not in repr(outcome) + str(outcome.error) + str(outcome.error.body)


def test_a_function_is_settled_to_what_its_result_has_used():
    gate = rxllm.Gate("100 usd/hour", "1000 tokens/hour")
    client = rxllm.function(
        lambda n: n / 4,
        cost=lambda _request: {"usd": 10, "tokens": 100},
        used=lambda result: {"usd": result, "tokens": 30},
    )
    [outcome] = rxllm.collect(rxllm.from_iterable([1]).pipe(rxllm.call(client, gate=gate)))
    assert outcome.usage.units == {"usd": 0.25, "tokens": 30}
    assert [quota.available for quota in gate.statistics().quotas] == [99.75, 970.0]


@pytest.mark.parametrize(
    ("used", "message"),
    [
        (lambda _result: 5, "used must return a mapping of units to amounts, got 5"),
        (lambda _result: {"usd": -1}, "used in usd must be a finite number >= 0, got -1"),
    ],
)
def test_a_bad_use_of_a_result_fails_that_request_and_says_why(used, message):
    client = rxllm.function(lambda n: n, used=used)
    [outcome] = rxllm.collect(rxllm.from_iterable([1]).pipe(rxllm.call(client)))
    assert isinstance(outcome.error, ConfigError)
    assert str(outcome.error) == message


def test_units_of_ones_own_are_summed_over_the_attempts():
    used = [Usage(units={"usd": 1.0}), Usage(input_tokens=2), Usage(units={"usd": 0.5, "gpu": 3.0})]
    assert sum(used, Usage()) == Usage(input_tokens=2, units={"usd": 1.5, "gpu": 3.0})
