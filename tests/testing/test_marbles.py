"""Marble diagrams and the doubles that play them."""

from typing import Any

import pytest
import reactivex as rx
from hypothesis import given, settings
from hypothesis import strategies as st
from reactivex import operators as ops

import rxllm
from rxllm.errors import ConfigError, ServerError
from rxllm.testing import Event, Script, Subscription, Taker, VirtualScheduler, cold, marbles, parse, record
from rxllm.testing.marbles import MarbleError

LETTERS = st.text("abc", min_size=2, max_size=3)
TICK = st.one_of(st.sampled_from("-abc"), LETTERS.map(lambda letters: f"({letters})"))
END = st.sampled_from(["", "|", "#", "(a|)", "(ab#)"])


@settings(max_examples=100, deadline=None)
@given(ticks=st.lists(TICK, max_size=12), end=END, unit=st.sampled_from([0.25, 1.0, 3.0]))
def test_what_is_parsed_and_drawn_again_is_the_same_diagram(ticks: list[str], end: str, unit: float) -> None:
    diagram = "".join(ticks) + end
    assert marbles(parse(diagram, unit=unit), unit=unit) == diagram.rstrip("-")


@pytest.mark.parametrize(
    ("diagram", "expected"),
    [
        pytest.param("", [], id="nothing"),
        pytest.param("---", [], id="silence"),
        pytest.param("a", [(0, "a")], id="an-item"),
        pytest.param("-ab-c", [(1, "a"), (2, "b"), (4, "c")], id="letters-take-a-unit-each"),
        pytest.param("-(ab)c", [(1, "a"), (1, "b"), (2, "c")], id="a-group-takes-one-unit"),
        pytest.param(" - a b ", [(1, "a"), (2, "b")], id="blanks-are-ignored"),
        pytest.param("-(a|)", [(1, "a"), (1, None)], id="an-end-in-a-group"),
        pytest.param("a|---", [(0, "a"), (1, None)], id="silence-after-the-end"),
    ],
)
def test_a_diagram_says_what_comes_when(diagram: str, expected: list[tuple[float, Any]]) -> None:
    assert [(event.at, event.value) for event in parse(diagram)] == expected


def test_letters_errors_and_units_mean_what_the_test_says() -> None:
    error = ServerError("down")
    assert parse("-a-#", {"a": 17}, error=error, unit=0.5) == [Event(0.5, "next", 17), Event(1.5, "error", error)]
    assert parse("#") == [Event(0, "error", MarbleError("#"))]
    assert MarbleError("#") != ValueError("#")
    assert MarbleError("#") != MarbleError("other")


@pytest.mark.parametrize(
    ("diagram", "message"),
    [
        ("(ab", "a group of '(ab' is not closed"),
        ("ab)", "unbalanced group at marble 2 of 'ab)'"),
        ("((a))", "unbalanced group at marble 1 of '((a))'"),
        ("a|b", "marble 2 of 'a|b' comes after the end"),
        ("a#|", "marble 2 of 'a#|' comes after the end"),
        ("(a|b)", "marble 3 of '(a|b)' comes after the end"),
        ("a|)", "unbalanced group at marble 2 of 'a|)'"),
    ],
)
def test_a_diagram_that_cannot_be_is_refused_with_its_place(diagram: str, message: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        parse(diagram)
    assert str(refusal.value) == message


def test_events_of_the_far_future_are_drawn_where_they_are() -> None:
    assert marbles([]) == ""
    assert marbles([Event(4.0, "next", "a"), Event(4.0, "completed")]) == "----(a|)"


def test_a_cold_source_plays_from_each_subscription_on_and_notes_its_release() -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "-a-b|")
    first = record(scheduler, source, until=2.0)
    second = record(scheduler, source, dispose_at=4.5)
    assert marbles(first.events) == "-a-b|"
    assert second.events == [Event(3.0, "next", "a")]
    assert source.subscriptions == [Subscription(0.0, 4.0), Subscription(2.0, 4.5)]
    assert scheduler.pending == 0
    again = record(scheduler, source)
    assert [event.at for event in again.events] == [5.5, 7.5, 8.5]


def test_a_cold_source_is_released_by_its_error_before_the_observer_hears_of_it() -> None:
    scheduler = VirtualScheduler()
    source = cold(scheduler, "-#")
    released: list[float | None] = []
    record(scheduler, source.pipe(ops.do_action(on_error=lambda _: released.append(source.subscriptions[0].until))))
    assert released == [1.0]


def test_a_script_plays_a_line_for_each_subscription_and_repeats_the_last() -> None:
    scheduler = VirtualScheduler()
    error = ServerError("down")
    script: Script[str] = Script((1.0, error), (0, "a"), (2.0, "b"))
    seen = [record(scheduler, script).events for _ in range(4)]
    assert seen[0] == [Event(1.0, "error", error)]
    assert seen[1] == [Event(1.0, "next", "a"), Event(1.0, "completed")]
    assert [event.at for event in seen[2]] == [3.0, 3.0]
    assert [event.value for event in seen[3]] == ["b", None]
    assert (script.started, script.active, script.most) == (4, 0, 1)


def test_a_script_counts_what_runs_at_a_time() -> None:
    scheduler = VirtualScheduler()
    script = Script((1.0, "a"))
    record(scheduler, rx.merge(script, script, script), until=0.5)
    assert (script.started, script.active, script.most) == (3, 3, 3)
    scheduler.run()
    assert (script.active, script.most) == (0, 3)


def test_a_script_that_is_disposed_leaves_no_timer() -> None:
    scheduler = VirtualScheduler()
    script = Script((5.0, "a"))
    assert record(scheduler, script, dispose_at=1.0).events == []
    assert (script.active, scheduler.pending, scheduler.seconds()) == (0, 0, 1.0)


def test_a_script_needs_a_line() -> None:
    with pytest.raises(ConfigError, match="at least one line"):
        Script()


def test_a_recorder_tells_items_from_the_end() -> None:
    scheduler = VirtualScheduler()
    seen = record(scheduler, cold(scheduler, "ab#"))
    assert seen.values == ["a", "b"]
    assert seen.end == Event(2.0, "error", MarbleError("#"))
    assert record(scheduler, rx.never()).end is None


def test_a_taker_has_as_much_room_as_the_test_makes() -> None:
    scheduler = VirtualScheduler()
    taker = Taker(scheduler, 2).connect(rxllm.from_iterable(range(5)))
    scheduler.run()
    assert (taker.held, taker.room(), taker.ended) == ([0, 1], 0, None)
    assert taker.take() == [0]
    scheduler.run()
    assert taker.held == [1, 2]
    assert taker.take(9) == [1, 2]
    scheduler.run()
    taker.take(9)
    scheduler.run()
    assert taker.taken == [0, 1, 2, 3, 4]
    assert taker.ended == Event(0.0, "completed")


def test_a_taker_notes_what_a_callback_raised() -> None:
    scheduler = VirtualScheduler()

    def torn() -> Any:
        yield 1
        raise KeyboardInterrupt

    taker = Taker(scheduler, 2).connect(rxllm.from_iterable(torn()))
    with pytest.raises(KeyboardInterrupt):
        scheduler.run()
    assert isinstance(taker.failed, KeyboardInterrupt)
