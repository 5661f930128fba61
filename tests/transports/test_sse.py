"""SseParser against a slow parser of a few lines, at every split point."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm.errors import ConfigError, DecodeError
from rxllm.providers.base import Event
from rxllm.transports.sse import SseParser

MARK = b"\xef\xbb\xbf"
LINES = [
    b"data: a",
    b"data:b",
    b"data",
    b"event: x",
    b"id: 7",
    b"id",
    b"id: \0",
    b"retry: 5",
    b":c",
    b"a",
    b"",
    b"",
    b"",
]
ENDS = [b"\n", b"\r", b"\r\n"]
TOKENS = [*LINES, *ENDS, b"\n\n", b"data: {}\n\n", b"event: y\ndata: {}\n\n", MARK, b"\xef", b"\xff", b" "]
lines = st.builds(bytes.__add__, st.sampled_from(LINES), st.sampled_from(ENDS))
tokens = st.lists(st.sampled_from(TOKENS), max_size=10)
streams = st.lists(lines, max_size=8).map(b"".join) | tokens.map(b"".join)
often = settings(max_examples=400)


def slowly(raw: bytes) -> list[Event]:
    """Parse a whole stream as the standard says."""
    *lines, _unfinished = re.split(rb"\r\n|\r|\n", raw.removeprefix(MARK))
    events: list[Event] = []
    data: list[bytes] = []
    name = last = ""
    for line in lines:
        field, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if not line:
            events += [Event(b"\n".join(data), name, last)] if data else []
            data, name = [], ""
        elif field == b"data":
            data.append(value)
        elif field == b"event":
            name = value.decode(errors="replace")
        elif field == b"id" and b"\0" not in value:
            last = value.decode(errors="replace")
    return events


def parsed(*pieces: bytes, **settings: int) -> list[Event]:
    parser = SseParser(**settings)
    return [event for piece in pieces for event in parser.feed(piece)]


@often
@given(streams)
def test_it_does_not_matter_where_a_stream_is_split(raw):
    expected = slowly(raw)
    for cut in range(len(raw) + 1):
        assert parsed(raw[:cut], raw[cut:]) == expected


@often
@given(tokens)
def test_it_does_not_matter_whether_pieces_are_events_lines_or_less(pieces):
    assert parsed(*pieces) == slowly(b"".join(pieces))


@given(streams, st.data())
def test_it_does_not_matter_into_how_many_pieces_it_is_split(raw, data):
    pieces: list[bytes] = []
    while raw[(done := sum(map(len, pieces))) :]:
        pieces.append(raw[done : done + data.draw(st.integers(0, 5))])
        if not pieces[-1]:
            pieces.append(raw[done : done + 1])
    assert parsed(*pieces) == slowly(raw)


@given(st.binary(max_size=60))
def test_any_bytes_are_parsed_as_the_standard_says(raw):
    assert parsed(raw) == slowly(raw) == parsed(*(raw[n : n + 1] for n in range(len(raw))))


@pytest.mark.parametrize(
    ("raw", "events"),
    [
        pytest.param(b"data: a\n\ndata: b\n\n", [Event(b"a"), Event(b"b")], id="two-in-a-piece"),
        pytest.param(b"data: a\r\n\r\ndata: b\r\n\r\n", [Event(b"a"), Event(b"b")], id="crlf"),
        pytest.param(b"data: a\r\rdata: b\r\r", [Event(b"a"), Event(b"b")], id="cr"),
        pytest.param(b"data: YHOO\ndata: +2\ndata: 10\n\n", [Event(b"YHOO\n+2\n10")], id="many-lines"),
        pytest.param(
            b": test\n\ndata: first\nid: 1\n\ndata:second\nid\n\ndata:  third\n\n",
            [Event(b"first", "", "1"), Event(b"second"), Event(b" third")],
            id="comment-id-and-one-space-only",
        ),
        pytest.param(b"data\n\ndata\ndata\n\ndata:", [Event(b""), Event(b"\n")], id="empty-data-is-data"),
        pytest.param(b"event: x\n\ndata: a\n\n", [Event(b"a")], id="a-name-without-data-is-no-event"),
        pytest.param(
            b"event: x\ndata: a\n\ndata: b\n\n", [Event(b"a", "x"), Event(b"b")], id="a-name-is-for-one-event"
        ),
        pytest.param(b"id: 1\ndata: a\n\ndata: b\n\n", [Event(b"a", "", "1"), Event(b"b", "", "1")], id="an-id-stays"),
        pytest.param(
            b"id: 1\ndata: a\n\nid: \0\ndata: b\n\n", [Event(b"a", "", "1"), Event(b"b", "", "1")], id="bad-id"
        ),
        pytest.param(b"retry: 10\nfoo: bar\nDATA: x\ndata: a\n\n", [Event(b"a")], id="retry-and-unknown-fields"),
        pytest.param(MARK + b"data: a\n\n", [Event(b"a")], id="byte-order-mark"),
        pytest.param(MARK + MARK + b"data: a\n\n", [], id="one-mark-only"),
        pytest.param(b"data: a\n\n" + MARK + b"data: b\n\n", [Event(b"a")], id="a-mark-later-is-none"),
        pytest.param(b"data: a\n\ndata: b\n", [Event(b"a")], id="what-is-unfinished-is-none"),
        pytest.param(b"data: \xff\xfe\n\n", [Event(b"\xff\xfe")], id="data-stays-bytes"),
    ],
)
def test_events_of_a_stream(raw, events):
    assert parsed(raw) == parsed(*(raw[n : n + 1] for n in range(len(raw)))) == events


def test_a_mark_after_a_first_piece_is_none():
    assert parsed(b"data: a\n\n", MARK + b"data: b\n\n") == [Event(b"a")]


# sizes


@pytest.mark.parametrize("split", [1, 3, 1_000], ids=["byte-by-byte", "small-pieces", "at-once"])
@pytest.mark.parametrize("end", [b"\n", b"\r\n"], ids=["lf", "crlf"])
@pytest.mark.parametrize(
    ("line", "fits"),
    [
        pytest.param(b"data: " + b"x" * 94, True, id="a-line-of-the-size"),
        pytest.param(b"data: " + b"x" * 95, False, id="a-line-beyond"),
        pytest.param(b"data:" + b"x" * 49 + b"\ndata:" + b"x" * 49, True, id="two-lines-of-the-size"),
        pytest.param(b"data:" + b"x" * 49 + b"\ndata:" + b"x" * 50, False, id="two-lines-beyond"),
        pytest.param(b": " + b"x" * 99, False, id="a-comment-beyond"),
        pytest.param(b"\n".join([b": " + b"x" * 90] * 5), True, id="many-comments"),
        pytest.param(b"\n\n".join([b"data: " + b"x" * 90] * 5), True, id="many-events"),
    ],
)
def test_an_event_or_line_may_have_the_stated_size_and_no_byte_more(line, fits, end, split):
    raw = line.replace(b"\n", end) + end * 2
    pieces = [raw[n : n + split] for n in range(0, len(raw), split)]
    for before in (b"", b"data: before\n\n"):
        if fits:
            assert parsed(before, *pieces, largest=100) == slowly(before + raw)
        else:
            with pytest.raises(DecodeError, match="larger than 100 bytes") as caught:
                parsed(before, *pieces, largest=100)
            assert caught.value.transient


def test_a_line_that_never_ends_is_noticed_before_its_end():
    parser = SseParser(largest=1_000)
    with pytest.raises(DecodeError):
        for _ in range(101):
            parser.feed(b"x" * 10)


def test_an_event_that_never_ends_is_noticed_before_its_end():
    parser = SseParser(largest=1_000)
    with pytest.raises(DecodeError):
        for _ in range(101):
            parser.feed(b"data: xxxxxxxxxx\n")


def test_a_large_event_in_small_pieces_is_not_copied_at_each_of_them():
    parser = SseParser()
    for _ in range(100_000):  # 10 GB would be moved
        parser.feed(b"x" * 100)
    assert parser.feed(b"\n\ndata: a\n\n") == [Event(b"a")]


def test_the_size_must_be_a_number_above_zero():
    with pytest.raises(ConfigError, match="largest"):
        SseParser(largest=0)


def test_an_event_of_two_lines_with_different_ends_is_one_although_it_looks_like_one_line():
    parser = SseParser()
    assert parser.feed(b"data: first\n\n") == [Event(b"first")]
    assert parser.feed(b"data: a\rdata: b\n\n") == [Event(b"a\nb")]
