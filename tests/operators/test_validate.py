"""validate: what passes, what is asked again, and what is a bug."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import Observable, abc
from reactivex.disposable import Disposable

import rxllm
from rxllm.errors import ConfigError, ServerError, ValidationError
from rxllm.operators import retry, validate
from rxllm.policies.backoff import Backoff
from rxllm.testing import Script, Subscription, VirtualScheduler, cold, marbles, record


class bool_:  # noqa: N801  numpy calls it so
    """What a comparison of numpy arrays gives."""

    def __init__(self, value: bool) -> None:
        self.value = value

    def __bool__(self) -> bool:
        return self.value


def is_good(item: str) -> bool:
    return item.isupper()


@pytest.mark.parametrize(
    ("tries", "attempts", "expected"),
    [
        pytest.param(["A"], 3, "-(A|)", id="passes"),
        pytest.param(["x", "A"], 3, "--(A|)", id="second-try"),
        pytest.param(["x", "x", "A"], 3, "---(A|)", id="third-try"),
        pytest.param(["x"], 3, "---#", id="tries-used-up"),
        pytest.param(["x"], 1, "-#", id="one-try"),
    ],
)
def test_validate_asks_again_as_its_diagram_says(tries: list[str], attempts: int, expected: str) -> None:
    scheduler = VirtualScheduler()
    script = Script(*((1.0, item) for item in tries))
    seen = record(scheduler, script.pipe(validate(is_good, attempts=attempts)))
    assert marbles(seen.events) == expected
    assert (script.active, scheduler.pending) == (0, 0)
    assert script.most == 1


@pytest.mark.parametrize(
    ("result", "passes"),
    [
        pytest.param(None, True, id="None"),
        pytest.param(True, True, id="True"),
        pytest.param(False, False, id="False"),
        pytest.param(bool_(True), True, id="numpy-true"),
        pytest.param(bool_(False), False, id="numpy-false"),
    ],
)
def test_a_check_passes_on_none_or_true_and_fails_on_false(result: Any, passes: bool) -> None:
    seen = record(VirtualScheduler(), Script((0, "a")).pipe(validate(lambda _item: result, attempts=1)))
    assert (seen.values == ["a"]) is passes
    assert seen.end is not None
    assert isinstance(seen.end.value, ValidationError) is not passes


def raising(error: Exception) -> Callable[[object], None]:
    def check(_item: object) -> None:
        raise error

    return check


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("too short"), "too short"),
        (AssertionError("not JSON"), "not JSON"),
        (AssertionError(), "the check raised AssertionError"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad byte"), "bad byte"),
    ],
)
def test_a_check_fails_with_the_text_of_its_value_or_assertion_error(error: Exception, text: str) -> None:
    script = Script((1.0, "a"))
    seen = record(VirtualScheduler(), script.pipe(validate(raising(error), attempts=2)))
    assert seen.end is not None
    assert isinstance(seen.end.value, ValidationError)
    assert text in str(seen.end.value)
    assert script.started == 2


@pytest.mark.parametrize(
    "bug", [KeyError("name"), TypeError("len of None"), ZeroDivisionError(), ConfigError("wrong use")]
)
def test_a_bug_in_the_check_is_not_asked_again(bug: Exception) -> None:
    script = Script((1.0, "a"))
    seen = record(VirtualScheduler(), script.pipe(validate(raising(bug), attempts=5)))
    assert seen.end is not None
    assert seen.end.value is bug
    assert (script.started, script.active) == (1, 0)


def test_an_async_check_is_refused_and_its_coroutine_closed() -> None:
    async def check(_item: str) -> bool:
        return True

    seen = record(VirtualScheduler(), Script((0, "a")).pipe(validate(check)))  # type: ignore[arg-type]
    assert seen.end is not None
    assert str(seen.end.value) == "check must be a plain function, and check is async"


@pytest.mark.parametrize("result", [1, 0, "yes", [], {}])
def test_a_check_that_returns_something_else_is_a_bug(result: Any) -> None:
    script = Script((1.0, "a"))
    seen = record(VirtualScheduler(), script.pipe(validate(lambda _item: result)))
    assert seen.end is not None
    assert isinstance(seen.end.value, ConfigError)
    assert str(seen.end.value).endswith(f"returned {type(result).__name__}")
    assert script.started == 1


def test_a_repair_gets_the_item_and_the_error_and_gives_the_next_stream() -> None:
    scheduler = VirtualScheduler()
    given_to_repair: list[tuple[str, str]] = []

    def repair(item: str, error: ValidationError) -> Observable[str]:
        given_to_repair.append((item, error.message))
        return Script((1.0, item.upper() if len(given_to_repair) == 2 else item + item))

    def check(item: str) -> None:
        assert item.isupper(), f"{item} is small"

    source = Script((1.0, "x"))
    seen = record(scheduler, source.pipe(validate(check, repair=repair)))
    assert [(event.at, event.value) for event in seen.events] == [(3.0, "XX"), (3.0, None)]
    assert [(item, text.splitlines()[0]) for item, text in given_to_repair] == [
        ("x", "x is small"),
        ("xx", "xx is small"),
    ]
    assert source.started == 1


def test_a_repair_that_raises_ends_the_stream_with_what_it_raised() -> None:
    bug = KeyError("no prompt")

    def repair(_item: str, _error: ValidationError) -> Observable[str]:
        raise bug

    script = Script((1.0, "x"))
    seen = record(VirtualScheduler(), script.pipe(validate(is_good, repair=repair)))
    assert seen.end is not None
    assert seen.end.value is bug
    assert script.active == 0


def test_a_repair_that_returns_no_stream_is_told_so() -> None:
    seen = record(VirtualScheduler(), Script((1.0, "x")).pipe(validate(is_good, repair=lambda item, _error: item)))  # type: ignore[arg-type,return-value]
    assert seen.end is not None
    assert str(seen.end.value) == "repair must return an Observable or an awaitable, got str"


def test_a_repair_may_be_async() -> None:
    async def repair(item: str, _error: ValidationError) -> str:
        await asyncio.sleep(0)
        return item.upper()

    assert asyncio.run(rxllm.acollect(rx.just("x").pipe(validate(is_good, repair=repair)))) == ["X"]


def test_errors_of_the_source_pass_through_and_eat_no_try() -> None:
    scheduler = VirtualScheduler()
    script = Script((1.0, "x"), (1.0, ServerError("down")), (1.0, "A"))
    inner = script.pipe(retry(Backoff(base=1.0), draw=lambda low, _high: low))
    assert record(scheduler, inner.pipe(validate(is_good, attempts=2))).values == ["A"]
    assert script.started == 3


def test_retry_does_not_multiply_the_tries_of_validate() -> None:
    script = Script((1.0, "x"))
    seen = record(VirtualScheduler(), script.pipe(validate(is_good, attempts=3), retry(Backoff(attempts=5))))
    assert script.started == 3
    assert isinstance(seen.events[0].value, ValidationError)


def test_a_try_that_failed_its_check_is_released_at_once_and_not_heard_any_more() -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "-Ax-B|")
    seen = record(scheduler, source.pipe(validate(is_good, attempts=2)))
    assert marbles(seen.events) == "-A-A#"
    assert source.subscriptions == [Subscription(0.0, 2.0), Subscription(2.0, 4.0)]
    assert scheduler.pending == 0


def test_what_a_rejected_try_still_sends_from_its_thread_is_not_taken_for_the_next_try() -> None:
    started = 0
    threads: list[threading.Thread] = []

    def subscribe(observer: abc.ObserverBase[str], _scheduler: abc.SchedulerBase | None = None) -> abc.DisposableBase:
        nonlocal started
        started += 1
        items = ["x", "LATE"] if started == 1 else ["GOOD"]

        def emit() -> None:
            for item in items:
                observer.on_next(item)
            observer.on_completed()

        threads.append(threading.Thread(target=emit))
        threads[-1].start()
        if started == 1:
            threads[-1].join()  # all of the first try is under way to the loop before the check sees its first item
        return Disposable()

    assert asyncio.run(rxllm.acollect(rx.create(subscribe).pipe(validate(is_good)))) == ["GOOD"]
    for thread in threads:
        thread.join()


@settings(max_examples=60, deadline=None)
@given(tries=st.lists(st.text("aA", min_size=0, max_size=3), min_size=1, max_size=6), attempts=st.integers(1, 4))
def test_validate_follows_a_short_model(tries: list[str], attempts: int) -> None:
    scheduler = VirtualScheduler()
    started = 0

    def source(_scheduler: object) -> Observable[str]:
        nonlocal started
        started += 1
        return rx.of(*tries[min(started, len(tries)) - 1])

    seen = record(scheduler, rx.defer(source).pipe(validate(is_good, attempts=attempts)))

    expected: list[str] = []
    used = 0
    good = False
    while not good and used < attempts:  # the model
        items = tries[min(used, len(tries) - 1)]
        used += 1
        good = "a" not in items
        expected += items.split("a")[0]
    assert started == used
    assert seen.values == expected
    assert seen.end is not None
    assert (seen.end.kind == "completed") is good


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"check": "short"}, "check must be callable, got 'short'"),
        ({"attempts": 0}, "attempts must be a whole number >= 1, got 0"),
        ({"attempts": -2}, "attempts must be a whole number >= 1, got -2"),
        ({"attempts": float("nan")}, "attempts must be a whole number >= 1, got nan"),
        ({"attempts": "3"}, "attempts must be a whole number >= 1, got '3'"),
        ({"repair": 5}, "repair must be callable or None, got 5"),
    ],
)
def test_validate_refuses_bad_arguments_by_name_and_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        validate(**{"check": is_good, **arguments})
    assert str(refusal.value) == message
