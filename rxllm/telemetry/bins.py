"""A run in a bounded number of bins: pure state, the time comes in as an argument."""

from collections.abc import Mapping, Sequence

import msgspec

__all__ = ["Bins", "Fill", "Mark", "Table"]

NARROWEST = 0.1  # seconds of a bin at first


class Mark(msgspec.Struct, frozen=True, kw_only=True):
    """Something that changed a run. Those of one kind in one bin are one, which tells of the first of them."""

    at: float  # seconds after the first event
    kind: str  # "suspended", "resumed", "paused", "learned", "setting" or "store"
    text: str
    count: int  # how many it stands for


class Fill(msgspec.Struct, frozen=True, kw_only=True):
    """How full a quota was, as a share of it: above 1 it was a debt. One entry a bin, None where nobody looked."""

    highest: tuple[float | None, ...]
    last: tuple[float | None, ...]


class Table(msgspec.Struct, frozen=True, kw_only=True):
    """A run in bins of equal width: each column has an entry for each bin. Bin `n` begins at `n * width` seconds.

    The time is 0 at the first event. Bins in which nothing happened are there too: with the limit, the rate and what
    was in flight and waiting as they were before.
    """

    gate: str  # its repr
    width: float  # seconds
    admitted: tuple[int, ...]  # attempts that started
    ended: tuple[int, ...]  # attempts that ended, however
    refused: tuple[int, ...]  # those of them that the provider refused
    failed: tuple[int, ...]  # those of them that failed or timed out
    in_flight: tuple[int, ...]  # the most at a time
    waiting: tuple[int, ...]  # the longest queue that was seen
    limit: tuple[int | None, ...]  # of attempts in flight, at the end of the bin; None: no limit
    rate: tuple[float | None, ...]  # starts per second, at the end of the bin; None: no pace
    fill: dict[str, Fill]  # by quota
    waited: dict[str, tuple[float, ...]]  # seconds in which the first in the queue waited, by what it waited for
    marks: tuple[Mark, ...]  # in order of time


class Bins:
    """Counts, levels and marks of a run in at most `most` bins of equal width.

    The first bin begins with the first event. When the run outgrows the bins, neighbours merge and the width doubles:
    counts and seconds add up, of the highest the higher stays, of the last the later. So a day takes as much memory as
    a minute, and each event costs the same.

    Times are in seconds from any origin. One that goes back counts in the bin that there is.

    Args:
        most: An even number, so that all bins have a neighbour.
        width: Seconds of a bin at first.
    """

    __slots__ = (
        "_admitted",
        "_ended",
        "_failed",
        "_highest",
        "_in_flight",
        "_last",
        "_level",
        "_limit",
        "_marks",
        "_most",
        "_origin",
        "_queue",
        "_rate",
        "_refused",
        "_sampled",
        "_until",
        "_waited",
        "_waited_before",
        "_waiting",
        "_width",
    )

    def __init__(self, most: int, width: float = NARROWEST) -> None:
        self._most = most
        self._width = width
        self._origin = 0.0  # when the first bin began
        self._until = float("-inf")  # when the last bin ends; an event after that needs another one
        self._admitted: list[int] = []
        self._ended: list[int] = []
        self._refused: list[int] = []
        self._failed: list[int] = []
        self._in_flight: list[int] = []
        self._waiting: list[int] = []
        self._limit: list[int | None] = []
        self._rate: list[float | None] = []
        self._highest: dict[str, list[float | None]] = {}  # of each quota's fill
        self._last: dict[str, list[float | None]] = {}
        self._waited: dict[str, list[float]] = {}
        self._marks: dict[tuple[int, str], Mark] = {}  # by bin and kind
        self._level = 0  # in flight now
        self._queue = 0  # waiting at the last look
        self._sampled: float | None = None  # when that was
        self._waited_before: Mapping[str, float] = {}  # what the gate had counted then

    def admitted(self, at: float, in_flight: int) -> None:
        """Count an attempt that started; `in_flight` is with it."""
        if at >= self._until:
            self._advance(at)
        self._admitted[-1] += 1
        self._level = in_flight
        if in_flight > self._in_flight[-1]:  # noqa: PLR1730  half the cost of max()
            self._in_flight[-1] = in_flight

    def ended(self, at: float, in_flight: int, *, refused: bool, failed: bool) -> None:
        """Count an attempt that ended; `in_flight` is without it."""
        if at >= self._until:
            self._advance(at)
        self._ended[-1] += 1
        self._level = in_flight
        if in_flight >= self._in_flight[-1]:  # only at the first event: it was in flight until now
            self._in_flight[-1] = in_flight + 1
        if refused:
            self._refused[-1] += 1
        elif failed:
            self._failed[-1] += 1

    def mark(self, at: float, kind: str, text: str) -> None:
        """Keep that something happened."""
        if at >= self._until:
            self._advance(at)
        key = (len(self._admitted) - 1, kind)
        mark = Mark(at=max(0.0, at - self._origin), kind=kind, text=text, count=1)
        known = self._marks.get(key)
        self._marks[key] = mark if known is None else _both(known, mark)

    def set(self, limit: int | None, rate: float | None) -> None:
        """Take the limit and the pace that hold from the last event on."""
        self._limit[-1] = limit
        self._rate[-1] = rate

    def look(
        self,
        at: float,
        *,
        waiting: int,
        limit: int | None,
        rate: float | None,
        fill: Mapping[str, float],
        waited: Mapping[str, float],
    ) -> None:
        """Take what the gate says of itself.

        Args:
            at: When it said so.
            waiting: Attempts in the queue.
            limit: Attempts that may be in flight.
            rate: Starts per second.
            fill: Quota -> the share of it that is used; one that is new begins here.
            waited: Reason -> seconds in which the first in the queue waited for it, ever. What came to them since the
                last look is spread evenly over the time since then; what was there at the first look is not of this
                run.
        """
        if at >= self._until:
            self._advance(at)
        self._queue = waiting
        self._waiting[-1] = max(waiting, self._waiting[-1])
        self.set(limit, rate)
        for name, share in fill.items():
            if name not in self._last:
                self._highest[name] = [None] * len(self._admitted)
                self._last[name] = [None] * len(self._admitted)
            self._last[name][-1] = share
            highest = self._highest[name]
            highest[-1] = _higher(highest[-1], share)
        if self._sampled is not None:
            for reason, seconds in waited.items():
                grown = seconds - self._waited_before.get(reason, 0.0)
                if grown > 0:
                    self._spread(reason, grown, self._sampled, at)
        self._sampled = at
        self._waited_before = waited

    def table(self, gate: str) -> Table:
        """Return a copy of all columns, and a name over it."""
        return Table(
            gate=gate,
            width=self._width,
            admitted=tuple(self._admitted),
            ended=tuple(self._ended),
            refused=tuple(self._refused),
            failed=tuple(self._failed),
            in_flight=tuple(self._in_flight),
            waiting=tuple(self._waiting),
            limit=tuple(self._limit),
            rate=tuple(self._rate),
            fill={
                name: Fill(highest=tuple(self._highest[name]), last=tuple(last)) for name, last in self._last.items()
            },
            waited={reason: tuple(column) for reason, column in self._waited.items()},
            marks=tuple(sorted(self._marks.values(), key=lambda mark: mark.at)),
        )

    def _advance(self, at: float) -> None:
        """Make the bin of `at` the last one."""
        if not self._admitted:
            self._origin = at
        index = int((at - self._origin) / self._width)
        while index >= self._most:
            self._extend(self._most)
            self._merge()
            index //= 2
        self._extend(index + 1)
        self._until = self._origin + len(self._admitted) * self._width

    def _extend(self, length: int) -> None:
        """Append bins in which nothing has happened yet."""
        more = length - len(self._admitted)
        if more <= 0:  # a division was rounded down
            return
        for counts in (self._admitted, self._ended, self._refused, self._failed):
            counts.extend([0] * more)
        self._in_flight += [self._level] * more
        self._waiting += [self._queue] * more
        self._limit += self._limit[-1:] * more or [None] * more
        self._rate += self._rate[-1:] * more or [None] * more
        for shares in (*self._highest.values(), *self._last.values()):
            shares.extend([None] * more)
        for seconds in self._waited.values():
            seconds.extend([0.0] * more)

    def _merge(self) -> None:
        """Make one of each two neighbours, of which there are an even number."""
        self._width *= 2
        self._admitted = _sums(self._admitted)
        self._ended = _sums(self._ended)
        self._refused = _sums(self._refused)
        self._failed = _sums(self._failed)
        self._in_flight = list(map(max, self._in_flight[::2], self._in_flight[1::2]))
        self._waiting = list(map(max, self._waiting[::2], self._waiting[1::2]))
        self._limit = self._limit[1::2]
        self._rate = self._rate[1::2]
        self._highest = {name: list(map(_higher, row[::2], row[1::2])) for name, row in self._highest.items()}
        self._last = {name: list(map(_later, row[::2], row[1::2])) for name, row in self._last.items()}
        self._waited = {
            reason: [a + b for a, b in zip(row[::2], row[1::2], strict=True)] for reason, row in self._waited.items()
        }
        marks: dict[tuple[int, str], Mark] = {}
        for (index, kind), mark in self._marks.items():  # from first to last, as they came
            key = (index // 2, kind)
            marks[key] = _both(marks[key], mark) if key in marks else mark
        self._marks = marks

    def _spread(self, reason: str, seconds: float, since: float, at: float) -> None:
        """Add `seconds` to the bins from `since` to `at`, to each by its part of that time."""
        column = self._waited.setdefault(reason, [0.0] * len(self._admitted))
        origin, width, last = self._origin, self._width, len(column) - 1
        first = int((since - origin) / width)
        if first >= last:
            column[last] += seconds
            return
        for index in range(first, last + 1):
            begin = max(since, origin + index * width)
            end = at if index == last else origin + (index + 1) * width
            column[index] += seconds * max(0.0, end - begin) / (at - since)


def _sums(column: Sequence[int]) -> list[int]:
    return [a + b for a, b in zip(column[::2], column[1::2], strict=True)]


def _higher(first: float | None, second: float | None) -> float | None:
    if first is None or second is None:
        return _later(first, second)
    return max(first, second)


def _later(first: float | None, second: float | None) -> float | None:
    return first if second is None else second


def _both(first: Mark, second: Mark) -> Mark:
    return msgspec.structs.replace(first, count=first.count + second.count)
