"""What the gate asks of a quota, whatever its strategy."""

from collections.abc import Iterable
from typing import Protocol

from rxllm.policies.bucket import TokenBucket
from rxllm.policies.fixed import FixedWindow
from rxllm.policies.held import HeldMeter
from rxllm.policies.quota import Quota
from rxllm.policies.sliding import Entry, SlidingLog, Ticket

__all__ = ["LocalMeter", "Meter", "meter"]


class Meter(Protocol):
    """The state of one quota. `now` is in seconds from any origin and never goes back.

    For a quota that is charged at the end `settle` is called for every booking, also for one that cost what was
    reserved: what was not settled is taken to be on the wire.
    """

    @property
    def limit(self) -> float:
        """What may be booked in a window."""
        ...

    def too_large(self, cost: float) -> bool:
        """Say whether `cost` fits at no time."""
        ...

    def fits(self, cost: float, now: float) -> bool:
        """Say whether `cost` may be booked now."""
        ...

    def book(self, cost: float, now: float) -> Ticket:
        """Book `cost`, whether it fits or not; return what `settle` or `refund` take once."""
        ...

    def settle(self, ticket: Ticket, actual: float, now: float) -> None:
        """Make `actual` of the cost that was booked."""
        ...

    def refund(self, ticket: Ticket, now: float) -> None:
        """Undo a booking."""
        ...

    def available(self, now: float) -> float:
        """Return what fits now; below zero it is a debt."""
        ...

    def booked(self, now: float) -> float:
        """Return what is not available because of our own bookings."""
        ...

    def next_expiry(self, now: float) -> float | None:
        """Return when something booked is free again next; None if nothing is booked."""
        ...

    def ready_at(self, cost: float, now: float) -> float:
        """Return when `cost` fits at the earliest if nothing else is booked or settled; infinity if never."""
        ...

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
        """Take over what the server says in a reply.

        Our own bookings are never reduced by it: what is booked and on its way stays booked. What the server
        counts beyond them is the use of others (`Others`); a newer statement replaces it, up or down:

            others = limit - remaining - (booked by us and counted by the server)

        The last term is the difficulty. The server counted at some moment between `sent` and `now`; it has not
        counted what we booked after that, and perhaps not what was then on its way. `pending` is how much of our
        bookings that is. The sum of all that was booked since shortly before `sent` is always safe, but much too
        much when replies are slow: as much has expired meanwhile. 0.0 is right if the server writes its headers
        when it replies; else it overlooks as much of the others as `booked()` has grown since `sent`, which is
        nothing in a steady flow.

        What is known of others is never forgotten early: a smaller number of theirs counts only if its attempt was
        sent when all larger ones were known, and 0 remaining only says that there may be more of them.

        Args:
            remaining: What the server has left.
            reset: Seconds until its state is as if nothing had been used; None or 0: not said.
            now: When the reply came.
            limit: The server's limit; it becomes ours up to `most`. None: not said.
            pending: What we have booked that the server may not have counted.
            sent: When the attempt was sent; None: unknown, and the statement can only tighten.
        """
        ...

    def widen(self, margin: float) -> None:
        """Reckon with `margin` seconds of jitter on the way, also for what is booked already.

        Never with less than the margin that the meter was made with, and with no more than a quarter of the window; so
        a smaller number than the last makes it narrower again, down to that.
        """
        ...


class LocalMeter(Meter, Protocol):
    """A meter that has its bookings by itself; another one can go on where it stopped."""

    @property
    def newest(self) -> int:
        """The slot that was booked into last."""
        ...

    def entry(self, slot: int) -> Entry | None:
        """Return what is in a slot, or what `HELD` or `EDGE` say; None if that is over or unknown."""
        ...

    def entries(self, now: float) -> list[Entry]:
        """Return all that another meter must know; those below zero come first, then the oldest."""
        ...

    def restore(self, entries: Iterable[Entry], now: float) -> None:
        """Take over, into a new meter, what `entries` returned; what was held then is booked now."""
        ...


def meter(quota: Quota, *, most: float | None = None) -> LocalMeter:
    """Return a new, empty meter for `quota`.

    Args:
        quota: What it counts.
        most: The largest limit that the server may state; infinity for a quota that only its headers have told.
            None: that of `quota`.
    """
    limit, per, margin = quota.limit, quota.per, quota.grace
    made: LocalMeter
    if quota.strategy == "bucket":
        made = TokenBucket(limit, per, burst=quota.burst, margin=margin, most=most)
    else:
        made = (FixedWindow if quota.strategy == "fixed" else SlidingLog)(limit, per, margin=margin, most=most)
    return HeldMeter(made) if quota.charged_at == "end" else made
