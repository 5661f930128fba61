"""A pace: the least distance between two starts."""

import math
from typing import TypeAlias

from rxllm.errors import check_number

__all__ = ["Pace", "PaceTicket"]

PaceTicket: TypeAlias = tuple[float, float]  # when this start was due, when the one before was


SLOWEST = 1e-9  # starts per second: its interval is finite


class Pace:
    """Starts at most `rate` per second, evenly spaced, and no burst after a pause.

    Args:
        rate: Starts per second; may be set at any time, and counts from the last start on.
        slack: Seconds by which a start may follow too closely on one that came late. A timer is always late,
            by a millisecond or so; without slack a pace through timers loses that at each start.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.

    Source: GCRA with no burst, ITU-T I.371.
    """

    __slots__ = ("_due", "_interval", "_rate", "_slack")

    def __init__(self, rate: float, *, slack: float = 0.0) -> None:
        check_number("slack", slack, least=0)
        self.rate = rate
        self._slack = slack
        self._due = -math.inf  # when the last start was due

    @property
    def rate(self) -> float:
        """Starts per second."""
        return self._rate

    @rate.setter
    def rate(self, rate: float) -> None:
        check_number("rate", rate, least=SLOWEST)
        self._rate = rate
        self._interval = 1.0 / rate

    def ready_at(self, now: float) -> float:
        """Return when the next start may be: now, or later."""
        return max(now, self._due + self._interval)

    def book(self, now: float) -> PaceTicket:
        """Count a start; return what `refund` takes."""
        before = self._due
        self._due = max(before + self._interval, now - self._slack)
        return (self._due, before)

    def refund(self, ticket: PaceTicket) -> None:
        """Undo a start that never was; it matters only while no other has followed."""
        due, before = ticket
        if due == self._due:
            self._due = before
