"""The fixed window: a counter that the provider sets to zero at each edge."""

import math
from collections.abc import Iterable

from rxllm.policies.others import earliest, latest
from rxllm.policies.sliding import SLOTS, Entry, SlidingLog

__all__ = ["EDGE", "FixedWindow"]

EDGE = -2  # the entry of what is known of the edge
DRIFT = 1e-4  # seconds per second by which two clocks may run apart; good ones need a tenth


class FixedWindow(SlidingLog):
    """A quota over windows that lie end to end, from an edge that only the provider knows.

    While no edge is known, nothing but the sum over *any* `per` seconds is safe: if more than the limit starts in
    some `per` seconds, a window of the provider may be just those. That is the sliding log, so this is one.

    A statement of the server (`rebase`) with the seconds until its edge puts an edge between the time that the
    attempt was sent plus these seconds and the time that the reply came plus these seconds; the statements
    together narrow it down. From then on a booking is free at the latest moment at which the window can end that
    it can have arrived in, at most `margin` late, and never later than in a sliding log. So no window of the
    provider gets more than the limit, and with an edge known to the moment each gets all of it.

    Args:
        limit: What a window holds.
        per: Seconds.
        margin: Seconds that a request may take to arrive.
        slots: See `SlidingLog`.
        most: The same.
    """

    __slots__ = ("_edge", "_set", "_width")

    def __init__(
        self, limit: float, per: float, *, margin: float = 0.0, slots: int = SLOTS, most: float | None = None
    ) -> None:
        super().__init__(limit, per, margin=margin, slots=slots, most=most)
        self._edge: float = 0.0  # a window ends then at the earliest,
        self._width: float = math.inf  # and so much later at the latest
        self._set = 0.0  # when that was learned

    def entry(self, slot: int) -> Entry | None:
        """Return what is booked in a slot, None if it has expired; for `EDGE` the edge, None if it is not known."""
        if slot != EDGE:
            return super().entry(slot)
        return None if self._width >= self._per else Entry(EDGE, self._edge, self._width, self._set)

    def entries(self, now: float) -> list[Entry]:
        """Return the edge, if it is known, and all that is booked, the oldest first."""
        edge = self.entry(EDGE)
        return [*(() if edge is None else (edge,)), *super().entries(now)]

    def restore(self, entries: Iterable[Entry], now: float) -> None:
        """Take over into a new, empty meter what another one knew and had booked; the edge comes first."""
        booked: list[Entry] = []
        for entry in entries:
            if entry.slot == EDGE:
                self._edge, self._width, self._set = entry.at, entry.amount, entry.close
            else:
                booked.append(entry)
        super().restore(booked, now)

    def _ends(self, at: float) -> float:
        """Return when a booking counts no more."""
        slid = super()._ends(at)
        if self._width >= self._per:
            return slid
        return min(slid, self._edge_after(at + self._margin) + self._width)

    def _edge_after(self, at: float) -> float:
        """Return the first moment after `at` at which a window may end."""
        edge = self._edge + (math.floor((at - self._edge) / self._per) + 1) * self._per
        return edge if edge > at else edge + self._per  # the division was rounded down

    def _span(self, now: float, sent: float | None, reset: float | None) -> tuple[float, float]:
        """Return since when bookings are in the window that a statement is about, and when that is over."""
        edge = None
        if sent is not None and reset is not None and 0 < reset <= self._per:
            edge = self._narrow(sent + earliest(reset), now + latest(reset), now)
        if self._width >= self._per:
            end = now if reset is None or reset <= 0 else now + latest(reset)  # at the latest, as far as it is said
            return end - self._per, super()._span(now, sent, reset)[1]
        end = (self._edge_after(now) if edge is None else edge) + self._width
        return end - self._per * (1 + 2 * DRIFT), end  # what began at the edge as it was known a window ago is in it

    def _narrow(self, low: float, high: float, now: float) -> float | None:
        """Learn that a window ends between `low` and `high`; return when this one ends at the earliest, if known."""
        width = high - low
        if self._width < self._per:
            drift = DRIFT * (now - self._set)
            if width + self._width + 2 * drift >= self._per:
                return min(self._edge_after(high) - self._per, self._edge_after(now))  # the latest it can be about
            shift = ((low + high - self._width) / 2 - self._edge) / self._per
            edge = self._edge + round(shift) * self._per - drift
            first, last = max(low, edge), min(high, edge + self._width + 2 * drift)
            if first <= last:  # else the provider has moved its windows
                low, width = first, last - first
        elif width >= self._per:
            return None
        self._edge, self._width, self._set = low, width, now
        return low
