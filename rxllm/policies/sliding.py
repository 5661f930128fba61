"""The sliding log: what was booked when, and so what fits now."""

import math
from array import array
from collections.abc import Iterable
from typing import NamedTuple, TypeAlias

from rxllm.policies.others import Others, latest

__all__ = ["SLOTS", "Entry", "SlidingLog", "Ticket"]

SLOTS = 4096  # 96 kB a log, and 0.025 % of the window

WIDEST = 4  # a margin that grows ends at that part of the window

Ticket: TypeAlias = tuple[int, float]  # the slot's number, the cost booked there


class Entry(NamedTuple):
    """What a meter has booked in one slot, to be kept in a file."""

    slot: int  # those below zero are no slots: `HELD`, `EDGE`
    at: float  # when it was booked last
    amount: float
    close: float  # bookings up to then share it


class SlidingLog:
    """A quota over a sliding window: at each admission, what was booked within it is at most the limit.

    Bookings of one 4,094th of the window share a slot and expire with the latest of them: up to 0.025 % late,
    never early. When the margin has grown, and for a window after that, they may share more. All but `ready_at` and
    `available` take constant time (amortised); those take time in the number of slots that must expire, or have.

    `now` is in seconds from any origin and must never go back. Sums are exact for whole numbers (below 2**53)
    and for binary fractions; other costs round, and what rounding left is forgotten whenever the log is empty.

    What others use of the same quota is one number, which the server's statements give (`rebase`): it takes from
    what fits until the window that it was seen in is over.

    Args:
        limit: What the window holds.
        per: Seconds.
        margin: Seconds by which the window is kept longer than `per`.
        slots: At least 4; fewer make it coarser and smaller.
        most: No statement of the server makes the limit larger than that; None: than `limit`.
    """

    __slots__ = (
        "_amounts",
        "_at",
        "_close",
        "_due",
        "_first",
        "_grain",
        "_head",
        "_last",
        "_least",
        "_margin",
        "_most",
        "_next",
        "_others",
        "_per",
        "_room",
        "_slots",
        "_used",
        "_window",
        "limit",
    )

    def __init__(
        self, limit: float, per: float, *, margin: float = 0.0, slots: int = SLOTS, most: float | None = None
    ) -> None:
        self.limit = limit
        self._most = limit if most is None else most
        self._room = limit  # without what others use
        self._others = Others()
        self._per = per
        self._least = self._margin = margin
        self._window = per + margin
        self._grain = self._window / (slots - 2)  # 2 less: the oldest and the newest stick out of the window
        self._slots = slots
        self._first = array("d", bytes(8 * slots))  # a ring: when each slot was booked first,
        self._last = array("d", bytes(8 * slots))  # and when last
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
        return self._used + cost <= self._room

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
        """Return what fits now; below zero it is a debt. It changes nothing, so another thread may ask."""
        room, used = self.limit - self._others.at(now), self._used
        for slot in range(self._head, self._next):
            if now < self._expiry(slot):
                return room - used
            used -= self._amounts[slot % self._slots]
        return room  # what rounding left is gone

    def next_expiry(self, now: float) -> float | None:
        """Return when the oldest slot expires, or what others use is over; None if there is nothing."""
        if now >= self._due:
            self._expire(now)
        expiry = self._others.until
        if self._head < self._next:
            expiry = min(expiry, self._expiry(self._head))
        return None if expiry == math.inf else expiry

    def booked(self, now: float) -> float:
        """Return what we have booked in the window, without what others use."""
        if now >= self._due:
            self._expire(now)
        return self._used

    def ready_at(self, cost: float, now: float) -> float:
        """Return when `cost` fits at the earliest if nothing else is booked or settled; infinity if never."""
        if cost > self.limit:
            return math.inf
        if self.fits(cost, now):
            return now
        return min(max(since, self._frees(cost, self.limit - others)) for since, others in self._others.steps())

    def rebase(
        self,
        remaining: float,
        reset: float | None,
        now: float,
        *,
        limit: float | None = None,
        pending: float = 0.0,
        sent: float | None = None,
    ) -> None:
        """Take over what the server says; the rule and the arguments are those of `Meter.rebase`."""
        if now >= self._due:
            self._expire(now)
        if limit is not None:
            self.limit = min(limit, self._most)
        since, until = self._span(now, sent, reset)
        others = max(0.0, self.limit - remaining - max(0.0, self._counted(since) - pending))
        self._others.state(others, until, now, sent if remaining > 0 else None)
        self._room = self.limit - self._others.amount
        self._due = now  # something may be due earlier than before: look at the next occasion

    def widen(self, margin: float) -> None:
        """Keep the window longer by `margin` from now on, within the bounds that `Meter.widen` states."""
        self._margin = max(self._least, min(margin, self._per / WIDEST))
        self._window = self._per + self._margin
        self._grain = self._window / (self._slots - 2)
        self._due = -math.inf  # what is booked expires at another time now: look at the next occasion

    @property
    def newest(self) -> int:
        """Return the slot that was booked into last."""
        return self._next - 1

    def entry(self, slot: int) -> Entry | None:
        """Return what is booked in a slot; None if it has expired."""
        if not self._head <= slot < self._next:
            return None
        at = self._last[slot % self._slots]
        return Entry(slot, at, self._amounts[slot % self._slots], self._close if slot == self.newest else at)

    def entries(self, now: float) -> list[Entry]:
        """Return all that is booked, the oldest first."""
        self._expire(now)
        return [entry for slot in range(self._head, self._next) if (entry := self.entry(slot)) is not None]

    def restore(self, entries: Iterable[Entry], now: float) -> None:
        """Take over into a new, empty log what another one had booked."""
        for entry in entries:
            self.book(entry.amount, entry.at)  # in a slot of its own: it is younger than the one before was open
            self._close = entry.close
        self._expire(now)

    def _span(self, now: float, sent: float | None, reset: float | None) -> tuple[float, float]:  # noqa: ARG002
        """Return since when bookings are in the window that a statement is about, and when that is over.

        The margin is in it: what is that old may have arrived later than it left. If not, as much of others is missed.
        """
        until = self._ends(now)
        return now - self._window, until if reset is None or reset <= 0 else min(until, now + latest(reset))

    def _counted(self, since: float) -> float:
        """Return what we have booked after that; a slot in which something may be older is not in it."""
        used = self._used
        for slot in range(self._head, self._next):
            if self._first[slot % self._slots] > since:
                return used
            used -= self._amounts[slot % self._slots]
        return 0.0

    def _frees(self, cost: float, room: float) -> float:
        """Return when so much has expired that `cost` fits in `room`; infinity if never."""
        if cost > room:
            return math.inf
        amounts, slots, used = self._amounts, self._slots, self._used
        if used + cost <= room:
            return -math.inf
        for slot in range(self._head, self._next):
            used -= amounts[slot % slots]  # step by step as `_expire` does it: the sum comes out equal to the bit
            if used + cost <= room:
                return self._expiry(slot)
        return self._expiry(self._next - 1)  # then the log is empty, and what rounding left is gone

    def _expiry(self, slot: int) -> float:
        """Return when a slot expires."""
        return self._ends(self._last[slot % self._slots])

    def _ends(self, at: float) -> float:
        """Return when a booking counts no more: the smallest float not before `at` plus the window."""
        window = self._window
        end = at + window
        if end - at < window or end - window < at:  # it was rounded down (Fast2Sum, in either order)
            end = math.nextafter(end, math.inf)
        return end

    def _expire(self, now: float) -> None:
        """Empty the slots whose time has come, and forget the others when theirs has."""
        others = self._others
        if now >= others.until:
            others.forget(now)
            self._room = self.limit - others.amount
        while self._head < self._next:
            expiry = self._expiry(self._head)
            if now < expiry:
                self._due = min(expiry, others.until)  # or later, if the slot is still booked into
                return
            self._used -= self._amounts[self._head % self._slots]
            self._head += 1
        self._used = 0.0
        self._close = -math.inf
        self._due = others.until

    def _open(self, now: float) -> None:
        """Begin a new slot."""
        self._expire(now)  # so that at most `slots` are in use,
        if self._next - self._head == self._slots:  # unless they were made for a shorter window: the newest takes it
            return
        if self._head == self._next:
            self._due = min(self._others.until, self._ends(now))
        self._at = self._next % self._slots
        self._first[self._at] = now
        self._amounts[self._at] = 0.0
        self._next += 1
        self._close = now + self._grain
