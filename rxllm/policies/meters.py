"""What the gate asks of a quota, whatever its strategy."""

from typing import Protocol

from rxllm.policies.quota import Quota
from rxllm.policies.sliding import SlidingLog, Ticket

__all__ = ["Meter", "meter"]


class Meter(Protocol):
    """The state of one quota. `now` is in seconds from any origin and never goes back."""

    limit: float

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

    def next_expiry(self, now: float) -> float | None:
        """Return when something booked is free again next; None if nothing is booked."""
        ...

    def ready_at(self, cost: float, now: float) -> float:
        """Return when `cost` fits at the earliest if nothing else is booked or settled; infinity if never."""
        ...


def meter(quota: Quota) -> Meter:
    """Return a new, empty meter for `quota`."""
    return SlidingLog(quota.limit, quota.window)
