from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.testing._http import BadRequestError, ChunkedBody, parse_head, wants_more


def test_a_head_gives_what_the_server_needs() -> None:
    head = parse_head(
        b"POST /v1/chat/completions?x=1 HTTP/1.1\r\nHost: a\r\ncontent-LENGTH:  12 \r\n"
        b"Authorization: Bearer sk-1\r\nExpect: 100-continue"
    )
    assert head == ("POST", "/v1/chat/completions", "x=1", 12, False, True, True, "sk-1")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /", 400),
        (b"GET / HTTP/2.0", 505),
        (b"GET / FTP/1.1", 400),
        (b"G\xe9T / HTTP/1.1", 400),
        (b"GET /a b HTTP/1.1", 400),
        (b"GET / HTTP/1.1\r\nno colon", 400),
        (b"GET / HTTP/1.1\r\nA : b", 400),
        (b"GET / HTTP/1.1\r\nA: b\r\n folded", 400),
        (b"GET / HTTP/1.1\r\nA: b\x00", 400),
        (b"GET / HTTP/1.1\r\nA: b\nC: d", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: -1", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1_0", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 2", 400),
        (b"GET / HTTP/1.1\r\nContent-Length: 1\r\nTransfer-Encoding: chunked", 400),
        (b"GET / HTTP/1.1\r\nTransfer-Encoding: gzip, chunked", 400),
    ],
)
def test_malformed_heads_are_refused(head: bytes, status: int) -> None:
    with pytest.raises(BadRequestError) as caught:
        parse_head(head)
    assert caught.value.status == status


@given(data=st.binary(max_size=200))
def test_no_bytes_do_more_than_a_bad_request(data: bytes) -> None:
    with contextlib.suppress(BadRequestError):
        parse_head(data)
    with contextlib.suppress(BadRequestError):
        ChunkedBody(1_000).feed(data)
    assert wants_more(data) in {True, False}


@given(body=st.binary(max_size=300), sizes=st.lists(st.integers(1, 50)), cuts=st.lists(st.integers(1, 20)))
def test_a_chunked_body_is_the_same_however_it_is_cut(body: bytes, sizes: list[int], cuts: list[int]) -> None:
    wire, at = b"", 0
    for size in [*sizes, len(body)]:
        if piece := body[at : at + size]:
            wire += b"%x;ext=1\r\n%b\r\n" % (len(piece), piece)
            at += len(piece)
    wire += b"0\r\nTrailer: x\r\n\r\nNEXT"
    chunks, rest, at = ChunkedBody(1_000), None, 0
    for cut in [*cuts, len(wire)]:
        rest = chunks.feed(wire[at : at + cut])
        at += cut
        if rest is not None:
            break
    assert rest is not None
    assert (rest + wire[at:]) == b"NEXT"
    assert b"".join(chunks.pieces) == body


@pytest.mark.parametrize(
    ("wire", "status"),
    [(b"zz\r\n", 400), (b"-1\r\n", 400), (b"2\r\nabc\r\n", 400), (b"fff\r\n", 413), (b"1" * 20_000, 400)],
)
def test_malformed_chunks_are_refused(wire: bytes, status: int) -> None:
    with pytest.raises(BadRequestError) as caught:
        ChunkedBody(100).feed(wire)
    assert caught.value.status == status


@pytest.mark.parametrize("start", [b"\x16\x03\x01\x02", b"\x00", b"PRI\xff * HTTP", b"A" * 40])
def test_other_protocols_are_known_by_their_first_bytes(start: bytes) -> None:
    assert not wants_more(start)


@pytest.mark.parametrize("start", [b"P", b"POST /v1", b"POST / HTTP/1.1\r\nHo"])
def test_the_beginning_of_a_request_is_waited_for(start: bytes) -> None:
    assert wants_more(start)
