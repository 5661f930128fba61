"""The bins against a model that keeps every event and sorts them at the end."""

import itertools

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rxllm.telemetry.bins import Bins, Table

KINDS = ("paused", "setting")
# (quarters of a second since the event before, what happens, a number)
EVENTS = st.lists(
    st.tuples(
        st.integers(0, 60) | st.integers(0, 2_000), st.sampled_from(["start", "end", "look", "mark"]), st.integers(0, 9)
    ),
    min_size=1,
    max_size=60,
)
MOST = st.sampled_from([2, 4, 6, 10])


def timed(events):
    """Give each event its time: quarters, from an origin that is not 0, so that no float rounds."""
    at = 100.0
    for gap, what, number in events:
        at += gap / 4
        yield at, what, number


def recorded(events, most):
    bins = Bins(most, 1.0)
    waited = 0.0
    for at, what, number in timed(events):
        if what == "start":
            bins.admitted(at, number)
        elif what == "end":
            bins.ended(at, number, refused=number == 1, failed=number == 2)
        elif what == "look":
            waited = waited + number / 16
            bins.look(
                at, waiting=number, limit=number + 1, rate=number / 2, fill={"q": number / 8}, waited={"q": waited}
            )
        else:
            bins.mark(at, KINDS[number % 2], str(number))
    return bins.table("a gate")


def model(events, table: Table):
    """Sort the events into bins of the width that the table has, and return its columns."""
    all_of = list(timed(events))
    origin, width = all_of[0][0], table.width
    columns = {
        name: []
        for name in ("admitted", "ended", "refused", "failed", "in_flight", "waiting", "limit", "highest", "last")
    }
    level, queue, limit = 0, 0, None
    for index in range(int((all_of[-1][0] - origin) / width) + 1):
        inside = [(what, number) for at, what, number in all_of if int((at - origin) / width) == index]
        levels = [level, *(number for what, number in inside if what in {"start", "end"})]
        starts = [number for what, number in inside if what == "start"]
        ends = [number + 1 for what, number in inside if what == "end"]  # it was in flight until then
        looks = [number for what, number in inside if what == "look"]
        columns["admitted"].append(len(starts))
        columns["ended"].append(sum(what == "end" for what, _ in inside))
        columns["refused"].append(inside.count(("end", 1)))
        columns["failed"].append(inside.count(("end", 2)))
        columns["in_flight"].append(max([level, *starts, *ends]))
        columns["waiting"].append(max([queue, *looks]))
        level = levels[-1]
        queue = looks[-1] if looks else queue
        limit = looks[-1] + 1 if looks else limit
        columns["limit"].append(limit)
        columns["highest"].append(max(looks) / 8 if looks else None)
        columns["last"].append(looks[-1] / 8 if looks else None)
    return {name: tuple(column) for name, column in columns.items()}


@given(events=EVENTS, most=MOST)
@example(events=[(0, "start", 3), (7, "end", 1), (1, "start", 5)], most=2)
def test_the_bins_hold_what_sorting_all_events_at_the_end_would_give(events, most):
    table = recorded(events, most)
    expected = model(events, table)
    fill = table.fill.get("q")
    empty = (None,) * len(table.admitted)
    assert {
        **{name: getattr(table, name) for name in expected if name not in {"highest", "last"}},
        "highest": fill.highest if fill else empty,
        "last": fill.last if fill else empty,
    } == expected
    assert table.rate == tuple(None if limit is None else (limit - 1) / 2 for limit in table.limit)


@given(events=EVENTS, most=MOST)
def test_there_are_never_more_bins_than_allowed_nor_wider_ones_than_needed(events, most):
    table = recorded(events, most)
    assert len(table.admitted) <= most
    assert table.width == 1.0 or len(table.admitted) > most // 2
    lengths = {len(column) for column in (table.ended, table.refused, table.failed, table.in_flight, table.waiting)}
    lengths |= {len(column) for column in (table.limit, table.rate, *table.waited.values())}
    assert lengths == {len(table.admitted)}


@given(events=EVENTS, most=MOST)
def test_no_second_of_waiting_is_lost_when_bins_merge(events, most):
    table = recorded(events, most)
    looks = [number for _, what, number in timed(events) if what == "look"]
    seconds = sum(number / 16 for number in looks[1:])  # what was waited before the first look was before the run
    assert sum(table.waited.get("q", ())) == pytest.approx(seconds)


@given(events=EVENTS, most=MOST)
def test_no_mark_is_lost_and_there_is_one_of_a_kind_in_a_bin(events, most):
    table = recorded(events, most)
    marks = [(at, KINDS[number % 2], str(number)) for at, what, number in timed(events) if what == "mark"]
    assert sum(mark.count for mark in table.marks) == len(marks)
    assert [mark.at for mark in table.marks] == sorted(mark.at for mark in table.marks)
    origin = next(timed(events))[0]
    places = {}
    for at, kind, text in marks:  # the first of each tells its time and its text
        places.setdefault((int((at - origin) / table.width), kind), (at - origin, kind, text))
    assert sorted((mark.at, mark.kind, mark.text) for mark in table.marks) == sorted(places.values())


def test_waiting_is_spread_over_the_time_since_the_last_look():
    bins = Bins(10, 1.0)
    quiet = {"waiting": 0, "limit": None, "rate": None, "fill": {}}
    before = {"concurrency": 3.0}  # and never again
    bins.look(0.5, waited={**before, "pace": 7.0}, **quiet)
    bins.look(3.0, waited={**before, "pace": 9.0, "pause": 0.5}, **quiet)
    bins.look(3.25, waited={**before, "pace": 9.25, "pause": 0.5}, **quiet)
    bins.look(
        3.25, waited={**before, "pace": 9.25, "pause": 0.75}, **quiet
    )  # no time, and yet some waiting: none is lost
    table = bins.table("")
    assert table.waited["pace"] == pytest.approx((0.8 * 1.0, 0.8 * 1.0, 0.4 + 0.25))
    assert table.waited["pause"] == pytest.approx((0.2, 0.2, 0.1 + 0.25))
    assert list(table.waited) == ["pace", "pause"]


def test_waiting_stays_in_the_time_in_which_it_was_through_every_merge():
    bins = Bins(4, 1.0)
    quiet = {"waiting": 0, "limit": None, "rate": None, "fill": {}}
    bins.look(0.0, waited={}, **quiet)
    bins.look(8.0, waited={"pace": 4.0}, **quiet)
    bins.look(31.0, waited={"pace": 4.0, "pause": 11.5}, **quiet)
    table = bins.table("")
    assert table.width == 8.0
    assert table.waited["pace"] == pytest.approx((4.0, 0.0, 0.0, 0.0))
    assert table.waited["pause"] == pytest.approx((0.0, 4.0, 4.0, 3.5))


def test_a_quota_that_is_new_begins_where_it_was_first_seen():
    bins = Bins(10, 1.0)
    for at, fill in ((0.0, {"old": 0.1}), (2.0, {"old": 0.2, "new": 0.9}), (2.1, {"old": 0.1, "new": 0.5})):
        bins.look(at, waiting=0, limit=None, rate=None, fill=fill, waited={})
    fills = bins.table("").fill
    assert (fills["old"].highest, fills["old"].last) == ((0.1, None, 0.2), (0.1, None, 0.1))
    assert (fills["new"].highest, fills["new"].last) == ((None, None, 0.9), (None, None, 0.5))


def test_a_setting_holds_at_once_and_through_bins_in_which_nobody_looks():
    bins = Bins(10, 1.0)
    bins.look(0.0, waiting=4, limit=8, rate=None, fill={}, waited={})
    bins.mark(1.5, "setting", "limit 2")
    bins.set(2, 0.5)
    bins.ended(3.5, 6, refused=False, failed=False)
    table = bins.table("")
    assert table.limit == (8, 2, 2, 2)
    assert table.rate == (None, 0.5, 0.5, 0.5)
    assert table.waiting == (4, 4, 4, 4)


@pytest.mark.parametrize("earlier", [5.5, 0.0, -1e9], ids=["in-a-bin-before", "at-the-origin", "long-before"])
def test_an_event_of_before_counts_in_the_bin_that_there_is(earlier):
    bins = Bins(10, 1.0)
    bins.admitted(0.0, 1)
    bins.admitted(7.5, 2)
    bins.ended(earlier, 1, refused=True, failed=False)
    bins.mark(earlier, "paused", "")
    table = bins.table("")
    assert table.refused == (*[0] * 7, 1)
    assert [mark.at for mark in table.marks] == [max(0.0, earlier)]


def test_a_day_takes_as_many_bins_as_a_minute():
    bins = Bins(600)
    for second in range(86_400):
        bins.admitted(float(second), 1)
        bins.mark(float(second), "paused", "paused")
    table = bins.table("")
    assert 300 < len(table.admitted) <= 600
    assert sum(table.admitted) == 86_400
    assert len(table.marks) <= 600
    assert table.width == 0.1 * 2**11


def test_the_bins_of_a_long_silence_are_empty():
    bins = Bins(4, 1.0)
    bins.admitted(0.0, 3)
    bins.ended(1000.0, 2, refused=False, failed=True)
    table = bins.table("")
    assert (table.width, table.admitted, table.failed) == (256.0, (1, 0, 0, 0), (0, 0, 0, 1))
    assert table.in_flight == (3, 3, 3, 3)
    assert list(itertools.chain(*table.waited.values(), table.marks)) == []
