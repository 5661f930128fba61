"""Who is next: first come first served in a line, and between lines by weight."""

from __future__ import annotations

from bisect import insort
from collections import deque
from typing import TYPE_CHECKING, Generic, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["Line", "Lines", "Waiting"]

SPARE = 32  # so many that are gone may stay in a line


class Waiting(Protocol):
    """Somebody in a line."""

    arrival: int

    @property
    def applicant(self) -> object:
        """Who is told of its turn; None: it waits no more."""
        ...

    def __lt__(self, other: Self, /) -> bool:
        """Say whether it came earlier."""
        ...


W = TypeVar("W", bound=Waiting)


class Line(Generic[W]):
    """Those of one class, by arrival. Those that are gone stay until they are come to."""

    __slots__ = ("name", "queue", "started", "tag", "waiting", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.queue: deque[W] = deque()
        self.waiting = 0  # those not gone
        self.started = 0
        self.tag = 0.0  # the virtual time at which the next of them is due

    def head(self) -> W:
        """Return the first that waits; somebody must."""
        queue = self.queue
        waiter = queue[0]
        while waiter.applicant is None:
            queue.popleft()
            waiter = queue[0]
        return waiter

    def sweep(self) -> None:
        """Remove those that are gone, when they are many: whoever looks for one that waits soon finds one."""
        if len(self.queue) > self.waiting + self.waiting // 8 + SPARE:
            self.queue = deque(waiter for waiter in self.queue if waiter.applicant is not None)


class Lines(Generic[W]):
    """Several lines before one door, which opens for each in proportion to its weight.

    Each start moves the tag of its line on by its cost over the weight of the line, and the line with the smallest tag
    is next. One that was empty begins at the virtual time, which is the tag of the last start: who did not ask has
    saved nothing up. So lines that always have somebody get shares in proportion to their weights, whatever each start
    costs, and no line waits for longer than one start of each other line and its own share allows.

    Source: start-time fair queueing, Goyal, Vin and Cheng, 1996. Unlike a deficit round robin it needs no quantum,
    which would have to fit costs from one request to a whole quota of tokens.
    """

    __slots__ = ("_lines", "_virtual", "single", "waiting")

    def __init__(self) -> None:
        self._lines: list[Line[W]] = []
        self._virtual = 0.0
        self.single = True  # there is only one
        self.waiting = 0

    def __iter__(self) -> Iterator[Line[W]]:
        return iter(self._lines)

    def open(self, name: str, weight: float) -> Line[W]:
        """Return the line of that name, with that weight from now on."""
        for line in self._lines:
            if line.name == name:
                line.weight = weight
                return line
        line = Line[W](name, weight)
        self.single = not self._lines
        self._lines.append(line)
        return line

    def enter(self, line: Line[W], waiter: W) -> bool:
        """Put `waiter` in its place in `line`; say whether it is the first there."""
        if not line.waiting:
            line.queue.clear()
            line.tag = max(line.tag, self._virtual)
        line.waiting += 1
        self.waiting += 1
        queue = line.queue
        if queue and waiter.arrival < queue[-1].arrival:
            insort(queue, waiter)
        else:
            queue.append(waiter)
        return queue[0] is waiter

    def left(self, line: Line[W]) -> None:
        """Count one less in `line`: it is gone."""
        line.waiting -= 1
        self.waiting -= 1

    def first(self) -> W:
        """Return the first in the line whose turn it is; somebody must wait."""
        if self.single:
            return self._lines[0].head()
        heads = [(line.tag, line.head()) for line in self._lines if line.waiting]
        return min(heads)[1]

    def charge(self, line: Line[W], cost: float) -> None:
        """Count the cost of a start of `line`: of one that waited, or of one that did not need to."""
        tag = line.tag if line.waiting else max(line.tag, self._virtual)
        self._virtual = max(self._virtual, tag)
        line.tag = tag + cost / line.weight

    def others(self, head: W, line: Line[W]) -> Iterator[W]:
        """Yield who waits behind `head`, the first of `line`: by arrival, and of several lines one each in turn."""
        own = (waiter for waiter in line.queue if waiter is not head and waiter.applicant is not None)
        if self.single:
            yield from own
            return
        others = sorted((one for one in self._lines if one.waiting and one is not line), key=_tag)
        rows = [own, *((waiter for waiter in one.queue if waiter.applicant is not None) for one in others)]
        while rows:
            for row in rows.copy():
                waiter = next(row, None)
                if waiter is None:
                    rows.remove(row)
                else:
                    yield waiter

    def drop(self) -> None:
        """Forget all that wait."""
        for line in self._lines:
            line.waiting = 0
        self.waiting = 0
        self.clear()

    def clear(self) -> None:
        """Forget those that are gone; nobody waits."""
        for line in self._lines:
            line.queue.clear()

    def all(self) -> list[W]:
        """Return all that wait."""
        return [waiter for line in self._lines for waiter in line.queue if waiter.applicant is not None]


def _tag(line: Line[W]) -> float:
    return line.tag
