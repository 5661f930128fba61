"""The token bucket: a level that rises steadily, and costs that come out of it."""

import math
from collections.abc import Iterable

from rxllm.policies.others import Others
from rxllm.policies.sliding import WIDEST, Entry, Ticket

__all__ = ["TokenBucket"]

GRAINS = 64  # in so many steps a bucket is looked at while it fills


class TokenBucket:
    """A quota that comes back by and by: `limit` per `per` seconds, and never more than `burst` at once.

    Requests may arrive up to `margin` closer together than they were sent. So whatever is booked takes the level
    down to `burst` less what flows in during the margin, at least: then any of them fits when it arrives, and
    all that comes back is still used as long as `burst` is worth more than the margin. A full bucket may be taken
    at once.

    `now` is in seconds from any origin and must never go back. The level is computed from the last booking on, not
    added up from look to look.

    Args:
        limit: What flows in, per `per` seconds.
        per: Seconds.
        burst: What the bucket holds; None: `limit`.
        margin: Seconds by which requests may arrive closer together than they were sent.
        most: No statement of the server makes the limit larger than that; None: than `limit`.
    """

    __slots__ = ("_at", "_base", "_burst", "_given", "_least", "_margin", "_most", "_others", "_per", "_rate", "limit")

    newest = 0  # the one slot is the level

    def __init__(
        self, limit: float, per: float, *, burst: float | None = None, margin: float = 0.0, most: float | None = None
    ) -> None:
        self.limit = limit
        self._most = limit if most is None else most
        self._per = per
        self._given = burst
        self._least = self._margin = margin
        self._others = Others()
        self._rate = limit / per
        self._burst = limit if burst is None else burst
        self._base = self._burst  # our own level at the last booking
        self._at = 0.0  # when that was

    def too_large(self, cost: float) -> bool:
        """Say whether `cost` fits at no time."""
        return cost > self._burst

    def fits(self, cost: float, now: float) -> bool:
        """Say whether `cost` may be booked now."""
        elapsed = now - self._at if now > self._at else 0.0
        return cost <= self._burst and cost <= self._base + elapsed * self._rate - self._others.amount

    def available(self, now: float) -> float:
        """Return what fits now; below zero it is a debt. It changes nothing, so another thread may ask."""
        return min(self._burst, self._level(now) - self._others.amount)

    def booked(self, now: float) -> float:
        """Return what is missing because of our own bookings."""
        return self._burst - min(self._burst, self._level(now))

    def book(self, cost: float, now: float) -> Ticket:
        """Book `cost`, whether it fits or not; return what `settle` or `refund` take once."""
        self._fill(now, self._burst - self._rate * self._margin)
        self._base -= cost
        return (0, cost)

    def settle(self, ticket: Ticket, actual: float, now: float) -> None:
        """Make `actual` of the cost that was booked: the difference comes back, or is a debt, now."""
        self._fill(now, self._burst)
        self._base += ticket[1] - actual

    def refund(self, ticket: Ticket, now: float) -> None:
        """Undo a booking."""
        self.settle(ticket, 0.0, now)

    def next_expiry(self, now: float) -> float | None:
        """Return when a 64th of the bucket has come back, or all; None if it is full."""
        missing = self._burst - self.available(now)
        if missing <= 0:
            return None
        return max(math.nextafter(now, math.inf), now + min(missing, self._burst / GRAINS) / self._rate)

    def ready_at(self, cost: float, now: float) -> float:
        """Return when `cost` fits at the earliest if nothing else is booked or settled; infinity if never."""
        if self.too_large(cost):
            return math.inf
        if self.fits(cost, now):
            return now
        if not self._rate:
            return math.inf
        ready = max(now, self._at + (cost + self._others.amount - self._base) / self._rate)
        step = math.ulp(ready)
        while not self.fits(cost, ready):  # it was rounded down
            ready += step
            step *= 2
        return ready

    def rebase(
        self,
        remaining: float,
        reset: float | None,  # noqa: ARG002 - the level says all
        now: float,
        *,
        limit: float | None = None,
        pending: float = 0.0,
        sent: float | None = None,
    ) -> None:
        """Take over what the server says; the rule and the arguments are those of `Meter.rebase`."""
        self._fill(now, self._burst)
        if limit is not None:
            self.limit = min(limit, self._most)
            self._rate = self.limit / self._per
            if self._given is None:
                self._base += self.limit - self._burst
                self._burst = self.limit
        others = max(0.0, self._base + pending - remaining)
        self._others.state(others, math.inf, now, sent if remaining > 0 else None)

    def widen(self, margin: float) -> None:
        """Reckon with arrivals that are `margin` closer together, within the bounds that `Meter.widen` states."""
        before, self._margin = self._margin, max(self._least, min(margin, self._per / WIDEST))
        self._base -= self._rate * max(0.0, self._margin - before)  # also for what is on its way

    def entry(self, slot: int) -> Entry | None:  # noqa: ARG002 - there is one
        """Return what was missing at the last booking."""
        return Entry(0, self._at, self._burst - self._base, self._at)

    def entries(self, now: float) -> list[Entry]:  # noqa: ARG002 - it is dated
        """Return what was missing at the last booking."""
        return [Entry(0, self._at, self._burst - self._base, self._at)]

    def restore(self, entries: Iterable[Entry], now: float) -> None:  # noqa: ARG002 - it is dated
        """Take over into a new, full bucket what was missing in another one."""
        for entry in entries:
            self._base = self._burst - entry.amount
            self._at = entry.at

    def _level(self, now: float) -> float:
        """Return the level as it would be without others and without a brim."""
        elapsed = now - self._at if now > self._at else 0.0
        return self._base + elapsed * self._rate

    def _fill(self, now: float, brim: float) -> None:
        """Let flow in what came until now; what flows over would have filled up what others took."""
        level = self._level(now)
        if level > brim:
            self._others.shrink(level - brim)
            level = brim
        self._base = level
        self._at = now
