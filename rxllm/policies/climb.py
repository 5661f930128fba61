"""When to ask for more than what is known to be granted, and how much more."""

import math

__all__ = ["Climb"]

FIRST = 0.02  # of what is held: about as well as a rate is known
GROWTH = 1.5  # per step: what is held is left behind slowly, and eight times it are reached within 15 steps
LONGEST = 60  # steps: 1.5 ** 60 is finite, and more than anybody grants
LULL = 10.0  # seconds, at least, without a need for more after which a climb begins anew


class Climb:
    """Nothing for a while, then an excess that grows by the same factor in each step.

    Only the time counts in which there is a need for more: what is not asked for cannot be refused.
    """

    __slots__ = ("_at", "_idle", "_quiet", "_spent", "_step")

    def __init__(self) -> None:
        self._quiet = self._spent = self._at = self._idle = 0.0
        self._step = 1.0

    def restart(self, now: float, quiet: float, step: float) -> None:
        """Begin anew: `quiet` seconds without an excess, then one that grows each `step` seconds."""
        self._at, self._quiet, self._step = now, quiet, step
        self._spent = self._idle = 0.0

    def advance(self, now: float, *, needed: bool) -> float:
        """Return the excess from now on, as a share of what is held; 0.0: none yet."""
        passed = min(max(0.0, now - self._at), 2 * self._step)  # a long sleep has tried nothing
        self._at = now
        if needed:
            self._spent += passed
            self._idle = 0.0
        else:
            self._idle += passed
            if self._idle > max(LULL, self._quiet):
                self._spent = 0.0
        if self._spent < self._quiet:
            return 0.0
        steps: float = math.floor((self._spent - self._quiet) / self._step)
        excess: float = FIRST * GROWTH ** min(steps, LONGEST)
        return excess
