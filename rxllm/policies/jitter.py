"""How much longer some requests are on their way than others."""

import math

__all__ = ["PathJitter"]

MEMORY = 300.0  # seconds: what delays a packet comes back within minutes, and one bad minute must not cost for a day
ROUNDING = 0.001  # seconds: servers tell their time in whole milliseconds
STEP = 0.010  # seconds: a refusal widens by so much at least


class PathJitter:
    """The spread of the times on the way, which is what the window of a quota must be kept longer by.

    Two requests that leave a window apart arrive closer together when the first is on its way for longer. What can be
    measured is the way there and back: the time from sending to the reply, less what the server says it worked. The
    largest of these times less the smallest is at least the jitter of the way there. Both are remembered for `memory`
    seconds at least, and for twice as long at most: two generations take constant time and space.

    Args:
        memory: Seconds.

    >>> paths = PathJitter()
    >>> [round(paths.add(seconds, now), 3) for seconds, now in ((0.040, 0.0), (0.065, 1.0), (0.050, 2.0))]
    [0.0, 0.025, 0.025]
    """

    __slots__ = ("_before", "_ends", "_memory", "_now", "_stepped")

    def __init__(self, memory: float = MEMORY) -> None:
        self._memory = memory
        self._ends = -math.inf  # when the generation of now becomes the one before
        self._before = _Spread()
        self._now = _Spread()
        self._stepped = -math.inf  # when a refusal was noted last

    def add(self, path: float, now: float) -> float:
        """Note a time on the way; return the jitter.

        Args:
            path: Seconds from sending to the headers of the reply, less those that the server worked. Below zero the
                server has told something else, and it is not noted.
            now: When the reply came.
        """
        self._turn(now)
        if path >= -ROUNDING:
            self._now.low = min(self._now.low, path)
            self._now.high = max(self._now.high, path)
        return self._jitter()

    def refused(self, margin: float, now: float, *, sent: float = math.inf) -> float:
        """Note a refusal of what had room with `margin`, while nobody else uses the quota; return the jitter.

        The jitter was larger than the margin then, nobody knows by how much: half as much again is taken for it.

        Args:
            margin: Seconds by which the window is kept longer now.
            now: When the refusal came.
            sent: When its attempt was sent. One that left before the last such step says nothing of the margin since:
                refusals come many at a time.
        """
        self._turn(now)
        if sent >= self._stepped:
            self._now.least = max(self._now.least, margin + max(margin / 2, STEP))
            self._stepped = now
        return self._jitter()

    def jitter(self, now: float) -> float:
        """Return the jitter as it is known now."""
        self._turn(now)
        return self._jitter()

    def _jitter(self) -> float:
        before, since = self._before, self._now
        spread = max(before.high, since.high) - min(before.low, since.low)
        return max(spread, before.least, since.least)

    def _turn(self, now: float) -> None:
        """Forget what is too old."""
        if now >= self._ends:
            recent = now < self._ends + self._memory
            self._before = self._now if recent else _Spread()
            self._now = _Spread()
            self._ends = (self._ends if recent else now) + self._memory


class _Spread:
    """What was seen in one generation."""

    __slots__ = ("high", "least", "low")

    def __init__(self) -> None:
        self.low = math.inf
        self.high = -math.inf
        self.least = 0.0  # what refusals tell
