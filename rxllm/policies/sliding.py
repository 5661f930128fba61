"""The sliding log: what was booked when, and so what fits now."""

import math
from array import array
from typing import TypeAlias

__all__ = ["SLOTS", "SlidingLog", "Ticket"]

SLOTS = 4096  # 64 kB a log, and 0.025 % of the window

Ticket: TypeAlias = tuple[int, float]  # the slot's number, the cost booked there


class SlidingLog:
    """A quota over a sliding window: at each admission, what was booked within it is at most the limit.

    Bookings of one 4,094th of the window share a slot and expire with the latest of them: up to 0.025 % late,
    never early. All but `ready_at` take constant time (amortised); that takes time in the number of slots
    that must expire.

    `now` is in seconds from any origin and must never go back. Sums are exact for whole numbers (below 2**53)
    and for binary fractions; other costs round, and what rounding left is forgotten whenever the log is empty.

    Args:
        limit: What the window holds.
        per: Seconds.
        margin: Seconds by which the window is kept longer than `per`.
        slots: At least 4; fewer make it coarser and smaller.
    """

    __slots__ = (
        "_amounts",
        "_at",
        "_close",
        "_due",
        "_grain",
        "_head",
        "_last",
        "_next",
        "_slots",
        "_used",
        "_window",
        "limit",
    )

    def __init__(self, limit: float, per: float, *, margin: float = 0.0, slots: int = SLOTS) -> None:
        self.limit = limit
        self._window = per + margin
        self._grain = self._window / (slots - 2)  # 2 less: the oldest and the newest stick out of the window
        self._slots = slots
        self._last = array("d", bytes(8 * slots))  # a ring: when each slot was booked last
        self._amounts = array("d", bytes(8 * slots))
        self._head: int = 0  # number of the oldest slot; they count up for ever
        self._next: int = 0  # number of the slot after the newest; equal to the head when all are empty
        self._at: int = 0  # where the newest is in the ring
        self._close = -math.inf  # bookings up to then share the newest
        self._due = math.inf  # nothing expires before
        self._used = 0.0

    def too_large(self, cost: float) -> bool:
        """Say whether `cost` fits at no time."""
        return cost > self.limit

    def fits(self, cost: float, now: float) -> bool:
        """Say whether `cost` may be booked now."""
        if now >= self._due:
            self._expire(now)
        return self._used + cost <= self.limit

    def book(self, cost: float, now: float) -> Ticket:
        """Book `cost`, whether it fits or not; return what `settle` or `refund` take once."""
        if now > self._close:
            self._open(now)
        at = self._at
        self._last[at] = now
        self._amounts[at] += cost
        self._used += cost
        return (self._next - 1, cost)

    def settle(self, ticket: Ticket, actual: float, now: float) -> None:
        """Make `actual` of the cost that was booked.

        What was booked too much is free again at once. What was booked too little is booked now, when it came
        to be known, even above the limit: a debt that delays what comes next.
        """
        slot, cost = ticket
        change = actual - cost
        if change > 0:
            self.book(change, now)
        elif slot >= self._head:  # else it has expired, and was free already
            self._amounts[slot % self._slots] += change
            self._used += change

    def refund(self, ticket: Ticket, now: float) -> None:
        """Undo a booking."""
        self.settle(ticket, 0.0, now)

    def available(self, now: float) -> float:
        """Return what fits now; below zero it is a debt."""
        if now >= self._due:
            self._expire(now)
        return self.limit - self._used

    def next_expiry(self, now: float) -> float | None:
        """Return when the oldest slot expires; None if there is none."""
        if now >= self._due:
            self._expire(now)
        return None if self._head == self._next else self._expiry(self._head)

    def ready_at(self, cost: float, now: float) -> float:
        """Return when `cost` fits at the earliest if nothing else is booked or settled; infinity if never."""
        if cost > self.limit:
            return math.inf
        if self.fits(cost, now):
            return now
        amounts, slots, limit, used = self._amounts, self._slots, self.limit, self._used
        for slot in range(self._head, self._next):
            used -= amounts[slot % slots]  # step by step as `_expire` does it: the sum comes out equal to the bit
            if used + cost <= limit:
                return self._expiry(slot)
        return self._expiry(self._next - 1)  # then the log is empty, and what rounding left is gone

    def _expiry(self, slot: int) -> float:
        """Return when a slot expires: the smallest float not before its last booking plus the window."""
        last, window = self._last[slot % self._slots], self._window
        expiry = last + window
        if expiry - last < window or expiry - window < last:  # it was rounded down (Fast2Sum, in either order)
            expiry = math.nextafter(expiry, math.inf)
        return expiry

    def _expire(self, now: float) -> None:
        """Empty the slots whose time has come."""
        while self._head < self._next:
            expiry = self._expiry(self._head)
            if now < expiry:
                self._due = expiry  # or later, if the slot is still booked into
                return
            self._used -= self._amounts[self._head % self._slots]
            self._head += 1
        self._used = 0.0
        self._close = -math.inf
        self._due = math.inf

    def _open(self, now: float) -> None:
        """Begin a new slot."""
        self._expire(now)  # so that at most `slots` are in use
        if self._head == self._next:
            self._due = now + self._window
        self._at = self._next % self._slots
        self._amounts[self._at] = 0.0
        self._next += 1
        self._close = now + self._grain
