"""Streamed answers as server-sent events: how a text is cut, how an event looks, what goes wrong on the way. Pure."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

import msgspec

_encode = msgspec.json.Encoder().encode

EVENT_TYPE: Final = b"text/event-stream; charset=utf-8"

Ending = Literal["end", "close", "stall"]


class Events(NamedTuple):
    """A streamed answer, each event as its bytes, in four parts: so a fault can leave one out."""

    shown: list[bytes]  # the beginning and the content; never empty
    last: list[bytes]  # the finish reason, and the usage
    done: list[bytes]  # what says that the stream is over, where it is an event of its own
    error: bytes  # what comes in place of the rest when the server fails


def event(data: object, name: str = "", *, line: str = "\n") -> bytes:
    r"""Return one server-sent event with JSON for its data.

    Example:
        >>> event({"n": 1}), event({}, "ping"), event({}, line="\r\n")
        (b'data: {"n":1}\n\n', b'event: ping\ndata: {}\n\n', b'data: {}\r\n\r\n')
    """
    first = f"event: {name}{line}" if name else ""
    return b"%bdata: %b%b" % (first.encode(), _encode(data), (line * 2).encode())


def cut_up(text: str, chunks: int | None) -> list[str]:
    """Return a text in so many pieces, or as many as it has characters; None means one for each token.

    Example:
        >>> cut_up("hello world", 3), cut_up("hello world", None), cut_up("", 3)
        (['hel', 'lo w', 'orld'], ['hell', 'o wo', 'rld'], [])
    """
    size = len(text)
    if chunks is None:
        return [text[at : at + 4] for at in range(0, size, 4)]
    count = min(chunks, size)
    return [text[n * size // count : (n + 1) * size // count] for n in range(count)]


def spoil_events(fault: str | None, events: Events) -> tuple[list[bytes], Ending]:
    """Return what is sent of a streamed answer, and how its connection goes on then.

    "end" completes the answer; "close" closes the connection before that; "stall" leaves it open with nothing to come.
    """
    shown, last, done, error = events
    whole = [*shown, *last, *done]
    half = (len(shown) + 1) // 2
    if fault == "truncated":
        return [*whole[:half], whole[half][: len(whole[half]) // 2]], "close"
    if fault == "stall_midway":
        return whole[:half], "stall"
    spoilt = {
        "garbled": [*whole[:half], _garbled(whole[half]), *whole[half + 1 :]],
        "error_midway": [*whole[:half], error],
        "unfinished": [*shown, *done],
        "no_done": [*shown, *last],
    }
    return spoilt.get(fault or "", whole), "end"


def _garbled(one: bytes) -> bytes:
    """Return an event with half of its data."""
    text = one.rstrip(b"\r\n")
    return text[: (text.index(b"data: ") + len(b"data: ") + len(text)) // 2] + one[len(text) :]
