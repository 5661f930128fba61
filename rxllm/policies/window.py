"""How long a quota's window is, when the server states its limit and not its time."""

import math

from rxllm.policies.others import earliest, latest

__all__ = ["WindowGuess"]

REPLIES = 16  # so many are needed


class WindowGuess:
    """Finds the seconds of a quota from what its headers say of limit, remaining and reset.

    However the server counts, two things bound its window W from below, and the larger of them comes to W:

    - the longest reset. With a fixed window it is W right after an edge, with a sliding log right after a request.
      In a bucket it stays below W until all is used.
    - the least of `reset * limit / used`. In a bucket it is W in each reply; with a sliding log it comes down to W when
      all is used. With a fixed window it may fall below W, where the longest reset holds.

    Resets are taken as the time until the state is as if nothing had been used, and not as the time until the next
    request: the OpenAI way.
    """

    __slots__ = ("_least", "_longest", "_replies")

    def __init__(self) -> None:
        self._replies = 0
        self._longest = 0.0
        self._least = math.inf

    def note(self, limit: float, remaining: float, reset: float | None) -> float | None:
        """Take what a reply says; return the seconds of the window, or None if that is not known yet."""
        used = limit - remaining - 1.0  # what remains was rounded down
        if reset is None or reset <= 0 or used <= 0:
            return self._guess()
        self._longest = max(self._longest, earliest(reset))
        self._replies += 1
        self._least = min(self._least, latest(reset) * limit / used)
        return self._guess()

    def _guess(self) -> float | None:
        return max(self._longest, self._least) if self._replies >= REPLIES else None
