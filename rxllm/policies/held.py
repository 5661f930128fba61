"""What is on the wire, for a provider that counts an attempt when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rxllm.policies.sliding import Entry, Ticket

if TYPE_CHECKING:
    from collections.abc import Iterable

    from rxllm.policies.meters import LocalMeter

__all__ = ["HELD", "HeldMeter"]

HELD = -1  # the entry of what is on the wire


class HeldMeter:
    """A quota of a provider that counts an attempt when it ends.

    What was reserved for an attempt is held while it is on the wire, however long that takes; when it ends, what it
    used is booked then. We learn of the end after the provider has counted it, so a booking is late, never early.

    Args:
        inner: Keeps what has ended.
    """

    __slots__ = ("_held", "_inner", "_open")

    def __init__(self, inner: LocalMeter) -> None:
        self._inner = inner
        self._held = 0.0
        self._open = 0  # how many hold it

    @property
    def limit(self) -> float:
        """What may be booked in a window."""
        return self._inner.limit

    @property
    def newest(self) -> int:
        """The slot that was booked into last."""
        return self._inner.newest

    def too_large(self, cost: float) -> bool:
        """Say whether `cost` fits at no time."""
        return self._inner.too_large(cost)

    def fits(self, cost: float, now: float) -> bool:
        """Say whether `cost` may be booked now."""
        return self._inner.fits(self._held + cost, now)

    def book(self, cost: float, now: float) -> Ticket:  # noqa: ARG002 - held until it ends, whenever that is
        """Hold `cost`, whether it fits or not; return what `settle` or `refund` take once."""
        self._held += cost
        self._open += 1
        return (HELD, cost)

    def settle(self, ticket: Ticket, actual: float, now: float) -> None:
        """Hold it no longer, and book what it used."""
        self._open -= 1
        self._held = self._held - ticket[1] if self._open else 0.0  # what rounding left is gone
        if actual:
            self._inner.book(actual, now)

    def refund(self, ticket: Ticket, now: float) -> None:
        """Undo a booking."""
        self.settle(ticket, 0.0, now)

    def available(self, now: float) -> float:
        """Return what fits now; below zero it is a debt."""
        return self._inner.available(now) - self._held

    def booked(self, now: float) -> float:
        """Return what is not available because of our own bookings and what is held."""
        return self._inner.booked(now) + self._held

    def next_expiry(self, now: float) -> float | None:
        """Return when something booked is free again next; None if nothing is booked: what is held has no date."""
        return self._inner.next_expiry(now)

    def ready_at(self, cost: float, now: float) -> float:
        """Return when `cost` fits at the earliest if nothing else is settled; infinity if an attempt must end first."""
        return self._inner.ready_at(self._held + cost, now)

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
        """Take over what the server says; the rule and the arguments are those of `Meter.rebase`.

        The server has not counted what is held. So settle an attempt before its reply is given to this: else what it
        used counts as that of others too, until the next statement.
        """
        self._inner.rebase(remaining, reset, now, limit=limit, pending=pending, sent=sent)

    def widen(self, margin: float) -> None:
        """Reckon with `margin` seconds of jitter on the way."""
        self._inner.widen(margin)

    def entry(self, slot: int) -> Entry | None:
        """Return what is held, for `HELD`; else what `inner` has there."""
        return Entry(HELD, 0.0, self._held, 0.0) if slot == HELD else self._inner.entry(slot)

    def entries(self, now: float) -> list[Entry]:
        """Return what is held and booked."""
        return [Entry(HELD, 0.0, self._held, 0.0), *self._inner.entries(now)]

    def restore(self, entries: Iterable[Entry], now: float) -> None:
        """Take over, into a new meter, what was booked; what was held may have ended just now."""
        known = list(entries)
        self._inner.restore([entry for entry in known if entry.slot != HELD], now)
        held = sum(entry.amount for entry in known if entry.slot == HELD)
        if held:
            self._inner.book(held, now)
