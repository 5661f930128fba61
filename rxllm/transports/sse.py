"""Server-sent events: bytes as they come, to events. One parser for all dialects."""

from __future__ import annotations

from rxllm.errors import DecodeError, check_number
from rxllm.providers.base import Event

__all__ = ["SseParser"]

LARGEST_EVENT = 16 << 20  # bytes
MARK = b"\xef\xbb\xbf"  # UTF-8's byte order mark: one is ignored, at the start


class SseParser:
    r"""Parses one stream of events, fed in pieces of any size.

    An event ends with an empty line; what is unfinished at the end of the stream is none. Lines end with CR, LF or
    both. `retry` is ignored, as comments and unknown fields are: it is about connecting again, which no POST can.

    Args:
        largest: Bytes of an event's data, and of any line.

    Raises:
        ConfigError: `largest` is no whole number above zero.

    Source: WHATWG HTML, section "Server-sent events" ("Interpreting an event stream").

    >>> SseParser().feed(b"event: ping\ndata: a\ndata: b\n\ndata: unfinished\n")
    [Event(data=b'a\nb', name='ping', id='')]
    """

    __slots__ = ("_after_cr", "_begun", "_between", "_data", "_id", "_largest", "_name", "_size", "_tail", "_tail_size")

    def __init__(self, *, largest: int = LARGEST_EVENT) -> None:
        check_number("largest", largest, least=1, integer=True)
        self._largest = largest
        self._begun = False  # whether the byte order mark is behind us
        self._between = False  # whether nothing is begun that the next bytes would belong to
        self._after_cr = False  # whether the last byte was a CR: an LF that follows belongs to it
        self._tail: list[bytes] = []  # of the line that has no end yet
        self._tail_size = 0
        self._data: list[bytes] = []  # of the event that has no end yet
        self._size = 0
        self._name = ""
        self._id = ""  # of the last event that had one: those after it have it too

    def feed(self, data: bytes) -> list[Event]:
        """Take the next bytes; return the events that end in them.

        Raises:
            DecodeError: an event or a line is too large.
        """
        if self._between and data.startswith(b"data: ") and data.endswith(b"\n\n"):  # as most of the time
            end = len(data)
            if data.find(b"\n") == end - 2 and b"\r" not in data and end <= self._largest:
                return [Event(data[6:-2], "", self._id)]
        self._between = False
        events = self._feed(data)
        self._between = self._begun and not (self._after_cr or self._tail or self._data or self._name)
        return events

    def _feed(self, data: bytes) -> list[Event]:
        if self._after_cr or b"\r" in data:
            data = self._with_one_line_end(data)
        if not self._begun:
            data = self._without_mark(data)
        end = data.rfind(b"\n") + 1
        text, rest = (data, b"") if end == len(data) else (data[:end], data[end:])
        if text and self._tail:
            text = b"".join((*self._tail, text))
            self._tail.clear()
            self._tail_size = 0
        if rest:
            self._tail.append(rest)
            self._tail_size += len(rest)
        events: list[Event] = []
        if text:
            if self._size + len(text) > self._largest:
                self._take_checked(text, events)
            else:
                self._take(text, events)
        if self._tail_size > self._largest:
            raise self._too_large()
        return events

    def _take(self, text: bytes, events: list[Event]) -> None:
        """Take whole lines; almost always they are whole events of one line each."""
        *blocks, begun = text.split(b"\n\n")
        plain = not self._data and not self._name
        for block in blocks:
            if plain and block[:6] == b"data: " and b"\n" not in block:
                events.append(Event(block[6:], "", self._id))
            else:
                for line in block.split(b"\n"):
                    self._line(line, events)
                self._dispatch(events)
                plain = True
        if begun:
            for line in begun[:-1].split(b"\n"):
                self._line(line, events)

    def _take_checked(self, text: bytes, events: list[Event]) -> None:
        """Take whole lines that may be too large."""
        for line in text[:-1].split(b"\n"):
            self._line(line, events)
            if max(self._size, len(line)) > self._largest:
                raise self._too_large()

    def _line(self, line: bytes, events: list[Event]) -> None:
        if not line:
            self._dispatch(events)
            return
        field, _, value = line.partition(b":")
        if value[:1] == b" ":
            value = value[1:]
        if field == b"data":
            self._data.append(value)
            self._size += len(value) + 1
        elif field == b"event":
            self._name = value.decode(errors="replace")
        elif field == b"id" and b"\0" not in value:
            self._id = value.decode(errors="replace")

    def _dispatch(self, events: list[Event]) -> None:
        if self._data:
            events.append(Event(b"\n".join(self._data), self._name, self._id))
            self._data.clear()
            self._size = 0
        self._name = ""

    def _with_one_line_end(self, data: bytes) -> bytes:
        """Return `data` with LF as the only end of lines."""
        if not data:
            return data
        if self._after_cr and data[:1] == b"\n":
            data = data[1:]
        self._after_cr = data[-1:] == b"\r"
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _without_mark(self, data: bytes) -> bytes:
        """Return `data` without the byte order mark, nothing as long as it may still be one."""
        data = b"".join((*self._tail, data))
        self._tail.clear()
        self._tail_size = 0
        self._begun = not MARK.startswith(data) or data == MARK
        if self._begun:
            return data.removeprefix(MARK)
        self._tail.append(data)
        self._tail_size = len(data)
        return b""

    def _too_large(self) -> DecodeError:
        return DecodeError(f"an event of the stream is larger than {self._largest:_} bytes")
