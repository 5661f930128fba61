"""When an answer is so late that a second attempt may be faster."""

import math
from bisect import bisect_left, insort
from collections import deque

import msgspec

from rxllm.errors import check_number
from rxllm.values import ConfigErrorMeta

__all__ = ["Hedge", "Hedging"]

LEARNED = 50  # latencies before anything is hedged: a quantile of fewer is a guess
KEPT = 512  # latencies: what is older counts no more


class Hedge(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=ConfigErrorMeta):
    """Send a second attempt when the first is later than most have been, and take the answer that comes first.

    Args:
        quantile: Of the last 512 latencies: what is later than this part of them is hedged, above 0 and below 1.
        share: Of the attempts, at most, that are second ones, above 0 to 1. They are paid for.
        least: Seconds that an attempt has in any case.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.

    Source: Dean and Barroso, "The Tail at Scale", Communications of the ACM, 2013.

    >>> Hedge().quantile
    0.95
    """

    quantile: float = 0.95
    share: float = 0.05
    least: float = 0.0

    def __post_init__(self) -> None:
        check_number("quantile", self.quantile, above=0, most=math.nextafter(1.0, 0.0))
        check_number("share", self.share, above=0, most=1)
        check_number("least", self.least, least=0)


class Hedging:
    """What a pipeline has learned for its hedges: how long answers take, and how many hedges there were.

    An attempt that its hedge has overtaken would have taken longer than it was given. What it had taken until then
    counts: that is above the quantile too, so overtaking does not make the quantile smaller and hedges more.

    Args:
        hedge: When, and how many.
    """

    __slots__ = ("_hedge", "_recent", "_sorted", "attempts", "hedges")

    def __init__(self, hedge: Hedge) -> None:
        self._hedge = hedge
        self._recent: deque[float] = deque()
        self._sorted: list[float] = []  # the same, by size
        self.attempts = 0  # with the hedges
        self.hedges = 0

    def start(self) -> float | None:
        """Count a first attempt; return the seconds that it is given, None for as many as it takes."""
        self.attempts += 1
        known = self._sorted
        if len(known) < LEARNED:
            return None
        return max(self._hedge.least, known[math.ceil(self._hedge.quantile * len(known)) - 1])

    def take(self) -> bool:
        """Say whether the share allows one more hedge, and count it."""
        if self.hedges + 1 > self._hedge.share * (self.attempts + 1):
            return False
        self.attempts += 1
        self.hedges += 1
        return True

    def answered(self, seconds: float) -> None:
        """Learn how long a first attempt took until its answer, or until that of its hedge."""
        if len(self._recent) == KEPT:
            del self._sorted[bisect_left(self._sorted, self._recent.popleft())]
        self._recent.append(seconds)
        insort(self._sorted, seconds)
