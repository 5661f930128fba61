"""retry: how often, how long between, and when it gives up."""

import random
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import abc
from reactivex.disposable import Disposable

from rxllm.errors import (
    ConfigError,
    InvalidRequestError,
    QuotaExhaustedError,
    RateLimitedError,
    ServerError,
    StoreError,
)
from rxllm.operators import retry
from rxllm.policies.backoff import Backoff
from rxllm.testing import Event, Script, Subscription, VirtualScheduler, cold, marbles, record


def highest(_low: float, high: float) -> float:
    return high


def lowest(low: float, _high: float) -> float:
    return low


class Starts:
    """A source that fails with the next of `errors` after a second and notes when it was subscribed."""

    def __init__(self, scheduler: VirtualScheduler, *errors: Exception | None) -> None:
        self.scheduler = scheduler
        self.errors = list(errors)
        self.at: list[float] = []
        self.stream = rx.create(self._subscribe)

    def _subscribe(
        self, observer: abc.ObserverBase[str], _scheduler: abc.SchedulerBase | None = None
    ) -> abc.DisposableBase:
        error = self.errors[min(len(self.at), len(self.errors) - 1)]
        self.at.append(self.scheduler.seconds())

        def end() -> None:
            if error is None:
                observer.on_next("a")
                observer.on_completed()
            else:
                observer.on_error(error)

        return Disposable(self.scheduler.call_later(1.0, end).cancel)


def transient() -> ServerError:
    return ServerError("down")


@pytest.mark.parametrize(
    ("errors", "attempts", "starts", "expected"),
    [
        pytest.param([None], 3, [0], "-(a|)", id="a-good-answer-at-once"),
        pytest.param([transient(), None], 3, [0, 2], "---(a|)", id="one-failure"),
        pytest.param([transient(), transient(), None], 3, [0, 2, 5], "------(a|)", id="waits-longer-each-time"),
        pytest.param([transient()], 3, [0, 2, 5], "------#", id="tries-used-up"),
        pytest.param([transient()], 1, [0], "-#", id="one-try-is-no-retry"),
        pytest.param([InvalidRequestError("no")], 3, [0], "-#", id="what-is-not-transient-is-not-retried"),
        pytest.param([QuotaExhaustedError("used up", None, 1.0)], 3, [0], "-#", id="a-used-up-quota-is-not-waited-for"),
        pytest.param([StoreError("silent")], 3, [0], "-#", id="nor-is-a-store"),
        pytest.param([ValueError("bug")], 3, [0], "-#", id="errors-of-other-packages-are-not-transient"),
        pytest.param(
            [RateLimitedError("429"), RateLimitedError("429"), transient(), None],
            2,
            [0, 2, 5, 7],
            "--------(a|)",
            id="refusals-wait-and-eat-no-try",
        ),
        pytest.param(
            [RateLimitedError("429", None, 7.0), None], 2, [0, 8], "---------(a|)", id="hints-are-kept-in-full"
        ),
    ],
)
def test_retry_tries_as_its_diagram_says(
    errors: list[Exception | None], attempts: int, starts: list[float], expected: str
) -> None:
    scheduler = VirtualScheduler()
    source = Starts(scheduler, *errors)
    seen = record(scheduler, source.stream.pipe(retry(Backoff(attempts=attempts, base=1.0, cap=8.0), draw=highest)))
    assert source.at == starts
    assert marbles(seen.events) == expected
    assert scheduler.pending == 0
    if seen.end is not None and seen.end.kind == "error":
        assert seen.end.value is errors[-1]  # the last try's own, not a wrapper


@settings(max_examples=100, deadline=None)
@given(
    errors=st.lists(st.tuples(st.booleans(), st.none() | st.floats(0, 50)), min_size=1, max_size=12),
    attempts=st.integers(1, 6),
    deadline=st.floats(1.0, 400.0),
    seed=st.integers(0, 1_000),
)
def test_retry_follows_a_short_model(
    errors: list[tuple[bool, float | None]], attempts: int, deadline: float, seed: int
) -> None:
    scheduler = VirtualScheduler()
    made: list[Exception | None] = [
        RateLimitedError("429", None, hint) if refused else ServerError("500", None, hint) for refused, hint in errors
    ]
    source = Starts(scheduler, *made, None)
    backoff = Backoff(attempts=attempts, base=0.5, cap=4.0)
    stream = source.stream.pipe(retry(backoff, deadline=deadline, draw=random.Random(seed).uniform))
    seen = record(scheduler, stream)

    draw = random.Random(seed).uniform  # the model
    now, starts, failures, refusals = 0.0, [0.0], 0, 0
    for refused, hint in errors:
        now += 1.0
        failures, refusals = failures + (not refused), refusals + refused
        if not refused and failures >= attempts:
            break
        wait = max(draw(0.0, min(4.0, 0.5 * 2.0 ** ((refusals if refused else failures) - 1))), hint or 0.0)
        if now + wait >= deadline:
            break
        now += wait
        starts.append(now)

    assert source.at == pytest.approx(starts)
    assert seen.end is not None
    assert seen.end.kind == ("completed" if len(starts) == len(errors) + 1 else "error")
    assert all(
        later - earlier >= 1.0 + (hint or 0.0) - 1e-9
        for earlier, later, (_, hint) in zip(source.at, source.at[1:], errors, strict=False)
    )
    assert source.at[-1] < deadline
    assert scheduler.pending == 0


def test_retry_starts_no_try_after_the_deadline_however_many_refusals() -> None:
    scheduler = VirtualScheduler()
    source = Starts(scheduler, RateLimitedError("429"))
    seen = record(scheduler, source.stream.pipe(retry(Backoff(base=1.0, cap=2.0), deadline=10.0, draw=highest)))
    assert source.at == [0, 2, 5, 8]
    assert marbles(seen.events) == "---------#"


def test_the_deadline_does_not_count_what_is_excused_meanwhile() -> None:
    scheduler = VirtualScheduler()
    source = Starts(scheduler, RateLimitedError("429"))

    def excused() -> float:  # from 1 s before it is subscribed on, and 100 s from its 4th second on
        return min(scheduler.seconds(), 1.0) + max(0.0, min(scheduler.seconds(), 105.0) - 5.0)

    scheduler.run(until=1.0)
    stream = source.stream.pipe(retry(Backoff(base=1.0, cap=2.0), deadline=10.0, draw=highest, excused=excused))
    seen = record(scheduler, stream)
    assert source.at == [1, 3, *range(6, 109, 3)]
    assert seen.end is not None
    assert seen.end.at == 109.0


def test_a_hint_beyond_the_deadline_ends_at_once() -> None:
    scheduler = VirtualScheduler()
    error = RateLimitedError("429", None, 500.0)
    seen = record(scheduler, Starts(scheduler, error).stream.pipe(retry(Backoff(), deadline=100.0)))
    assert seen.events == [Event(1.0, "error", error)]
    assert scheduler.pending == 0


def test_retry_cancels_the_wait_and_the_try_when_it_is_disposed() -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "-#", error=transient())
    stream = source.pipe(retry(Backoff(base=4.0, cap=4.0), draw=highest))
    assert record(scheduler, stream, dispose_at=3.0).events == []
    assert source.subscriptions == [Subscription(0.0, 1.0)]
    assert scheduler.pending == 0
    assert record(scheduler, stream, dispose_at=3.5).events == []
    assert source.subscriptions[1:] == [Subscription(3.0, 3.5)]
    assert scheduler.pending == 0


def test_retry_draws_the_same_waits_from_the_same_seed() -> None:
    def starts(seed: int) -> list[float]:
        scheduler = VirtualScheduler()
        source = Starts(scheduler, transient())
        record(scheduler, source.stream.pipe(retry(Backoff(), draw=random.Random(seed).uniform)))
        return source.at

    assert starts(1) == starts(1)
    assert starts(1) != starts(2)


def test_retry_counts_the_tries_of_each_subscription_by_themselves() -> None:
    scheduler = VirtualScheduler()
    script: Script[str] = Script((1.0, transient()))
    stream = script.pipe(retry(Backoff(attempts=3, base=1.0), draw=lowest))
    for total in (3, 6):
        record(scheduler, stream)
        assert script.started == total


def test_a_draw_that_raises_ends_the_stream_with_what_it_raised() -> None:
    scheduler = VirtualScheduler()

    def broken(_low: float, _high: float) -> float:
        raise ValueError("no numbers left")

    seen = record(scheduler, Starts(scheduler, transient()).stream.pipe(retry(Backoff(), draw=broken)))
    assert seen.end is not None
    assert str(seen.end.value) == "no numbers left"
    assert scheduler.pending == 0


def test_a_hint_that_is_no_number_is_no_hint() -> None:
    class ForeignError(Exception):
        transient = True
        retry_after = "Wed, 21 Oct 2026 07:28:00 GMT"

    scheduler = VirtualScheduler()
    source = Starts(scheduler, ForeignError("busy"), None)
    assert record(scheduler, source.stream.pipe(retry(Backoff(base=1.0), draw=highest))).values == ["a"]
    assert source.at == [0, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"backoff": 3}, "backoff must be a Backoff, got 3"),
        ({"deadline": 0}, "deadline must be a finite number > 0, got 0"),
        ({"deadline": -1.0}, "deadline must be a finite number > 0, got -1.0"),
        ({"deadline": float("nan")}, "deadline must be a finite number > 0, got nan"),
        ({"deadline": None}, "deadline must be a finite number > 0, got None"),
        ({"draw": 0.5}, "draw must be callable, got 0.5"),
        ({"excused": 0.5}, "excused must be callable or None, got 0.5"),
    ],
)
def test_retry_refuses_bad_arguments_by_name_and_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        retry(**{"backoff": Backoff(), **arguments})
    assert str(refusal.value) == message
