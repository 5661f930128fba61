"""to_outcome: the end of one request as a value, whatever the end is."""

import pickle
from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex.testing import ReactiveTest, TestScheduler

from rxllm.errors import (
    CancelledError,
    ConfigError,
    DecodeError,
    QuotaExhaustedError,
    ServerError,
    TimeoutError,
    ValidationError,
)
from rxllm.gate import Gate
from rxllm.messages import Attempt, Outcome, Reply, chat
from rxllm.operators import admit, retry, to_outcome, validate
from rxllm.policies.backoff import Backoff
from rxllm.testing import Event, Recorder, Script, Subscription, VirtualScheduler, cold, marbles, record

REQUEST = chat("hi")
A, B = Reply(value="a"), Reply(value="b")


def shown(outcome: Any) -> str:
    """Return a letter for an outcome: its reply's, or that of its error's class."""
    assert isinstance(outcome, Outcome)
    assert outcome.request is REQUEST
    return str(outcome.value) if outcome.ok else type(outcome.error).__name__[0]


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        pytest.param("--a|", {}, "---(a|)", id="a-reply"),
        pytest.param("--a--b-|", {}, "-------(b|)", id="the-last-reply-counts"),
        pytest.param("--#", {}, "--(S|)", id="an-error-is-a-value"),
        pytest.param("--a-#", {}, "----(S|)", id="an-error-after-a-reply"),
        pytest.param("---|", {}, "---(D|)", id="no-reply"),
        pytest.param("|", {}, "(D|)", id="nothing-at-all"),
        pytest.param("--#", {"on_failure": "raise"}, "--#", id="raise"),
        pytest.param("--|", {"on_failure": "raise"}, "--#", id="raise-without-a-reply"),
        pytest.param("--a|", {"on_failure": "raise"}, "---(a|)", id="raise-has-nothing-to-raise"),
        pytest.param("--a|", {"deadline": 5}, "---(a|)", id="in-time"),
        pytest.param("--a----|", {"deadline": 5}, "-----(T|)", id="a-reply-that-does-not-end-in-time"),
        pytest.param("-------a|", {"deadline": 5}, "-----(T|)", id="too-late"),
        pytest.param("---", {"deadline": 5}, "-----(T|)", id="silence"),
        pytest.param("---", {"deadline": 5, "on_failure": "raise"}, "-----#", id="raise-at-the-deadline"),
    ],
)
def test_to_outcome_emits_as_its_diagram_says(source: str, options: dict[str, Any], expected: str) -> None:
    scheduler = VirtualScheduler()
    origin = cold(scheduler, source, {"a": A, "b": B}, error=ServerError("down"))
    seen = record(scheduler, origin.pipe(to_outcome(REQUEST, **options)))
    assert seen.end is not None
    events = [event._replace(value=shown(event.value)) if event.kind == "next" else event for event in seen.events]
    assert marbles(events) == expected
    assert origin.subscriptions == [Subscription(0.0, seen.end.at)]
    assert scheduler.pending == 0
    for value in seen.values:
        assert (value.started, value.seconds) == (0.0, seen.end.at)
        assert pickle.loads(pickle.dumps(value)).ok == value.ok


def test_the_deadline_is_an_error_that_is_not_tried_again() -> None:
    scheduler = VirtualScheduler()
    (outcome,) = record(scheduler, rx.never().pipe(to_outcome(REQUEST, deadline=2.5))).values
    assert isinstance(outcome.error, TimeoutError)
    assert (outcome.error.phase, outcome.error.transient) == ("deadline", False)
    assert str(outcome.error) == "not answered within 2.5 s"


@pytest.mark.parametrize(("on_failure", "expected"), [("emit", "--(Q#)"), ("raise", "--#")], ids=str)
def test_an_error_that_halts_is_the_end_after_the_outcome(on_failure: Any, expected: str) -> None:
    scheduler = VirtualScheduler()
    dry = QuotaExhaustedError("used up")
    seen = record(scheduler, cold(scheduler, "--#", error=dry).pipe(to_outcome(REQUEST, on_failure=on_failure)))
    events = [event._replace(value=shown(event.value)) if event.kind == "next" else event for event in seen.events]
    assert marbles(events) == expected
    assert seen.end == Event(2.0, "error", dry)


def test_a_dispose_at_the_outcome_of_an_error_that_halts_is_not_followed_by_the_end() -> None:
    scheduler = VirtualScheduler()

    class Leaving(Recorder):
        def on_next(self, value: Any) -> None:
            super().on_next(value)
            self.dispose()

    seen = Leaving(scheduler)
    stream = cold(scheduler, "-#", error=QuotaExhaustedError("used up")).pipe(to_outcome(REQUEST))
    seen.subscription = stream._start(seen, carrier(scheduler))  # type: ignore[attr-defined]
    scheduler.run()
    assert [event.kind for event in seen.events] == ["next"]


class Excuses:
    """What grows while it is between one of `spans`, in the time of `scheduler`."""

    def __init__(self, scheduler: VirtualScheduler, *spans: tuple[float, float]) -> None:
        self.scheduler = scheduler
        self.spans = spans
        self.asked = 0

    def __call__(self) -> float:
        self.asked += 1
        return 5.0 + sum(max(0.0, min(self.scheduler.seconds(), end) - start) for start, end in self.spans)


@pytest.mark.parametrize(
    ("spans", "at", "asked"),
    [
        pytest.param([], 4.0, 2, id="nothing-is-excused"),
        pytest.param([(1.0, 2.0)], 5.0, 3, id="a-while-before-the-deadline"),
        pytest.param([(3.0, 100.0)], 101.0, 99, id="a-long-while"),
        pytest.param([(2.0, 3.0), (4.5, 5.0)], 5.5, 4, id="and-once-more-in-what-is-added"),
        pytest.param([(9.0, 99.0)], 4.0, 2, id="too-late"),
    ],
)
def test_the_deadline_does_not_count_what_is_excused_meanwhile(
    spans: list[tuple[float, float]], at: float, asked: int
) -> None:
    scheduler = VirtualScheduler()
    excused = Excuses(scheduler, *spans)
    stream = rx.never().pipe(to_outcome(REQUEST, deadline=4.0, excused=excused))
    (outcome,) = record(scheduler, stream).values
    assert outcome.seconds == pytest.approx(at)
    assert isinstance(outcome.error, TimeoutError)
    assert outcome.error.phase == "deadline"
    apart = f", with the {at - 4.0:g} s apart that it does not count" if at > 4.0 else ""
    assert str(outcome.error) == f"not answered within 4 s{apart}"
    assert excused.asked == asked  # at the start, and when an alarm rings
    assert scheduler.pending == 0


def test_what_was_excused_before_a_request_began_is_not_added_to_its_deadline() -> None:
    scheduler = VirtualScheduler()
    excused = Excuses(scheduler, (0.0, 10.0))
    scheduler.run(until=7.0)
    (outcome,) = record(scheduler, rx.never().pipe(to_outcome(REQUEST, deadline=4.0, excused=excused))).values
    assert outcome.seconds == 4.0 + 3.0


eighths = st.integers(0, 100).map(lambda n: n / 8)  # exact, so that a millisecond is never what is left


@settings(max_examples=100, deadline=None)
@given(
    gaps=st.lists(st.tuples(eighths, eighths), max_size=6),
    deadline=eighths.filter(bool),
    start=eighths,
)
def test_a_deadline_is_what_is_not_excused_and_its_alarms_come_to_an_end(
    gaps: list[tuple[float, float]], deadline: float, start: float
) -> None:
    spans, now = [], 0.0
    for gap, length in gaps:
        spans.append((now + gap, now + gap + length))
        now = spans[-1][1]
    scheduler = VirtualScheduler()
    excused = Excuses(scheduler, *spans)
    scheduler.run(until=start)
    (outcome,) = record(scheduler, rx.never().pipe(to_outcome(REQUEST, deadline=deadline, excused=excused))).values
    at, left = start, deadline  # the model
    for begin, end in spans:
        if end > at:
            used = max(0.0, begin - at)
            if used >= left:
                break
            at, left = end, left - used
    late = min(1.0, deadline / 10)
    assert -0.002 <= outcome.seconds - (at + left - start) <= late + 0.002
    assert excused.asked <= 3 + len(gaps) + sum(length for _, length in gaps) / late


@pytest.mark.parametrize("answers", [[], [0.0]], ids=["at-the-start", "at-the-deadline"])
def test_an_excuse_that_raises_ends_its_request_with_what_it_raised(answers: list[float]) -> None:
    scheduler = VirtualScheduler()
    stream = rx.never().pipe(to_outcome(REQUEST, deadline=4.0, excused=answers.pop))
    seen = record(scheduler, stream)
    errors = [value.error for value in seen.values] + [event.value for event in seen.events if event.kind == "error"]
    assert [type(error) for error in errors] == [IndexError]
    assert scheduler.pending == 0


def test_the_deadline_cancels_the_attempt_and_the_outcome_has_it() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=1)
    attempts: list[Attempt] = []
    script: Script[Any] = Script((2.0, ServerError("down", 500)), (50.0, A))
    stream = script.pipe(admit(gate, note=attempts.append), retry(Backoff(base=1.0), draw=lambda _low, high: high))
    (outcome,) = record(scheduler, stream.pipe(to_outcome(REQUEST, attempts=attempts, deadline=10.0))).values
    assert [(attempt.number, attempt.started, attempt.seconds) for attempt in outcome.attempts] == [
        (1, 0.0, 2.0),
        (2, 3.0, 7.0),
    ]
    assert isinstance(outcome.attempts[1].error, CancelledError)
    assert (script.active, gate.statistics().in_flight, scheduler.pending) == (0, 0, 0)


def test_the_deadline_ends_the_wait_in_the_queue() -> None:
    scheduler = VirtualScheduler()
    gate = Gate("1/minute")
    record(scheduler, Script((0.0, A)).pipe(admit(gate)))
    attempts: list[Attempt] = []
    stream = Script((0.0, A)).pipe(admit(gate, note=attempts.append))
    seen = record(scheduler, stream.pipe(to_outcome(REQUEST, attempts=attempts, deadline=10.0)))
    assert [event.at for event in seen.events] == [10.0, 10.0]
    assert seen.values[0].attempts == ()
    assert (gate.statistics().waiting, scheduler.pending) == (0, 0)


def test_the_outcome_has_every_attempt_and_says_which_did_not_pass() -> None:
    scheduler = VirtualScheduler()
    attempts: list[Attempt] = []
    script: Script[Any] = Script((1.0, ServerError("down", 500)), (1.0, A))
    stream = script.pipe(
        admit(Gate(), note=attempts.append),
        retry(Backoff(base=1.0), draw=lambda _low, high: high),
        validate(lambda _reply: False, attempts=1),
    )
    (outcome,) = record(scheduler, stream.pipe(to_outcome(REQUEST, attempts=attempts))).values
    assert isinstance(outcome.error, ValidationError)
    assert [type(attempt.error) for attempt in outcome.attempts] == [ServerError, ValidationError]
    assert outcome.attempts[1].error is outcome.error
    assert outcome.seconds == 3.0


@settings(max_examples=100, deadline=None)
@given(
    replies=st.lists(st.integers(0, 9), max_size=5),
    ends=st.sampled_from("|#-"),
    length=st.integers(0, 12),
    deadline=st.none() | st.integers(1, 12),
    disposed=st.none() | st.integers(0, 12),
)
def test_to_outcome_gives_exactly_one_outcome_unless_it_is_disposed_first(
    replies: list[int], ends: str, length: int, deadline: int | None, disposed: int | None
) -> None:
    scheduler = VirtualScheduler()
    marks = ["-"] * (length + 1)
    for at in replies:
        if at < length:
            marks[at] = "a"
    marks[length] = ends
    origin = cold(scheduler, "".join(marks), {"a": A}, error=ServerError("down"))
    stream = origin.pipe(to_outcome(REQUEST, deadline=None if deadline is None else deadline + 0.5))
    seen = record(scheduler, stream, dispose_at=None if disposed is None else disposed + 0.25)

    due = [] if ends == "-" else [(float(length), "S" if ends == "#" else "a" if "a" in marks else "D")]  # the model
    due += [] if deadline is None else [(deadline + 0.5, "T")]
    due += [] if disposed is None else [(disposed + 0.25, "")]
    at, what = min(due, default=(None, ""))
    assert [(event.at, shown(event.value)) for event in seen.events if event.kind == "next"] == (
        [(at, what)] if what else []
    )
    assert (seen.end is not None) == bool(what)
    assert origin.subscriptions == [Subscription(0.0, at)]
    assert scheduler.pending == 0


def test_a_dispose_in_on_next_is_not_followed_by_the_end() -> None:
    scheduler = VirtualScheduler()

    class Leaving(Recorder):
        def on_next(self, value: Any) -> None:
            super().on_next(value)
            self.dispose()

    for source in (cold(scheduler, "-a|", {"a": A}), rx.never()):
        seen = Leaving(scheduler)
        stream = source.pipe(to_outcome(REQUEST, deadline=5.0))
        seen.subscription = stream._start(seen, carrier(scheduler))  # type: ignore[attr-defined]
        scheduler.run()
        assert [event.kind for event in seen.events] == ["next"]
        assert scheduler.pending == 0


def carrier(scheduler: VirtualScheduler) -> Any:
    """Return what a subscription of ours brings: nothing of reactivex guards the end there."""
    from rxllm.demand import DemandScheduler, Flow

    return DemandScheduler(scheduler, None, Flow(lambda _error: None))


def test_an_error_becomes_a_value_without_its_frames() -> None:
    scheduler = VirtualScheduler()

    def broken(_observer: object, _scheduler: object) -> Any:
        try:
            raise KeyError("frames")
        except KeyError:
            raise ServerError("down") from None

    (outcome,) = record(scheduler, rx.create(broken).pipe(to_outcome(REQUEST))).values
    assert isinstance(outcome.error, ServerError)
    assert (outcome.error.__traceback__, outcome.error.__context__) == (None, None)


def test_a_call_that_ends_without_a_reply_is_garbled() -> None:
    (outcome,) = record(VirtualScheduler(), rx.empty().pipe(to_outcome(REQUEST))).values
    assert isinstance(outcome.error, DecodeError)
    assert str(outcome.error) == "the call ended without a reply"


def test_each_subscription_has_a_deadline_of_its_own() -> None:
    scheduler = VirtualScheduler()
    stream = rx.never().pipe(to_outcome(REQUEST, deadline=4.0))
    first = record(scheduler, stream, until=1.0)
    second = record(scheduler, stream)
    assert [first.events[0].at, second.events[0].at] == [4.0, 5.0]
    assert second.values[0].started == 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"request": "hi"}, "request must be a Request, got 'hi'"),
        ({"deadline": 0}, "deadline must be a finite number > 0 or None, got 0"),
        ({"deadline": float("inf")}, "deadline must be a finite number > 0 or None, got inf"),
        ({"on_failure": "drop"}, "on_failure must be 'emit' or 'raise', got 'drop'"),
        ({"excused": 3.0}, "excused must be callable or None, got 3.0"),
    ],
)
def test_to_outcome_refuses_bad_arguments_by_name_and_value(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        to_outcome(**{"request": REQUEST, **arguments})
    assert str(refusal.value) == message


def test_to_outcome_runs_under_the_stock_test_scheduler() -> None:
    scheduler = TestScheduler()
    late = scheduler.create_cold_observable(ReactiveTest.on_next(500, A))
    source = scheduler.create_cold_observable(ReactiveTest.on_next(10, A), ReactiveTest.on_completed(20))
    for stream, kind in ((source, "a"), (late, "T")):
        seen = scheduler.start(lambda stream=stream: stream.pipe(to_outcome(REQUEST, deadline=100.0))).messages
        assert [message.value.kind for message in seen] == ["N", "C"]
        assert shown(seen[0].value.value) == kind
        scheduler = TestScheduler()


def test_what_comes_after_the_end_is_nobodys() -> None:
    scheduler = VirtualScheduler()
    seen = record(scheduler, rx.of(A, B).pipe(to_outcome(REQUEST)))
    assert [event.kind for event in seen.events] == ["next", "completed"]
    assert seen.events[1] == Event(0.0, "completed")
    assert shown(seen.values[0]) == "b"
