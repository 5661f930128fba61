"""How many starts were accepted lately, and how many were in flight then."""

import math

__all__ = ["Recent"]

GRAIN = 0.25  # seconds: about what a refusal takes to come back
GRAINS = 512  # 128 s: two of the longest usual windows of quotas, and a bit


class Recent:
    """The accepted starts of two minutes, in quarters of a second. A start counts until a refusal takes it back.

    A reply may take minutes, a refusal comes at once: so this is known long before the answers are there.
    """

    __slots__ = ("_accepted", "_newest", "_origin", "_refused", "_width")

    def __init__(self) -> None:
        self._origin = math.nan  # the first start
        self._newest = 0  # number of the newest quarter
        self._accepted = [0] * GRAINS
        self._refused = [0] * GRAINS
        self._width = [0] * GRAINS  # most in flight at a start

    def start(self, at: float, in_flight: int) -> None:
        """Count a start, with itself in flight."""
        slot = self._turn(at) % GRAINS
        self._accepted[slot] += 1
        self._width[slot] = max(self._width[slot], in_flight)

    def refuse(self, started: float) -> None:
        """Take back a start that was refused; one of more than two minutes ago is forgotten already."""
        if math.isnan(self._origin):
            return
        number = math.floor((started - self._origin) / GRAIN)
        if max(-1, self._newest - GRAINS) < number <= self._newest:
            slot = number % GRAINS
            self._accepted[slot] -= 1
            self._refused[slot] += 1

    def rate(self, start: float, end: float) -> float:
        """Return accepted starts per second in the whole quarters between two times, none before the first start."""
        first, last = self._between(start, end)
        if first >= last:
            return 0.0
        count = sum(self._accepted[number % GRAINS] for number in self._known(first, last))
        return max(0, count) / ((last - first) * GRAIN)

    def count(self, start: float, end: float) -> int:
        """Return accepted starts between two times, to the nearest quarters."""
        first, last = self._nearest(start), self._nearest(end)
        return max(0, sum(self._accepted[number % GRAINS] for number in self._known(first, last)))

    def width(self, start: float, end: float) -> int:
        """Return the most in flight at a start that was accepted: one of a quarter without a refusal. 0: unknown."""
        slots = [number % GRAINS for number in self._known(*self._between(start, end))]
        return max((self._width[slot] for slot in slots if not self._refused[slot]), default=0)

    def _between(self, start: float, end: float) -> tuple[int, int]:
        if math.isnan(self._origin):
            return 0, 0
        first = max(0, math.ceil((start - self._origin) / GRAIN)) if start > -math.inf else 0
        return first, math.floor((end - self._origin) / GRAIN)

    def _nearest(self, at: float) -> int:
        return 0 if math.isnan(self._origin) else round((at - self._origin) / GRAIN)

    def _known(self, first: int, last: int) -> range:
        return range(max(first, self._newest - GRAINS + 1, 0), min(last, self._newest + 1))

    def _turn(self, at: float) -> int:
        """Go on to the quarter of `at`; empty those in between."""
        if math.isnan(self._origin):
            self._origin = at
        number = max(self._newest, math.floor((at - self._origin) / GRAIN))
        for passed in range(max(self._newest + 1, number - GRAINS + 1), number + 1):
            slot = passed % GRAINS
            self._accepted[slot] = self._refused[slot] = self._width[slot] = 0
        self._newest = number
        return number
