"""What others use of a quota, as far as the server's statements tell."""

import math

__all__ = ["Others", "earliest", "latest"]


class Others:
    """The largest use by others that the statements give which nothing later contradicts.

    A statement (the limit headers of a reply) is as old as its reply took: it describes some moment between
    `sent` and now. One of two is later for sure only if its attempt was sent when the other had arrived. So a
    smaller number counts only when its attempt was sent after all larger ones were known; replies that overtake
    one another change nothing. Two generations are enough for that: those before a mark go when the reply to an
    attempt arrives that was sent after it, and the mark moves on. What is over holds for two latencies at most.
    """

    __slots__ = ("_held", "_held_until", "_last", "_mark", "_seen", "_seen_until", "amount", "until")

    def __init__(self) -> None:
        self.amount = 0.0
        self.until = math.inf  # when that is over by itself
        self._held = 0.0  # the largest of the generation before the mark
        self._held_until = -math.inf
        self._seen = 0.0  # since
        self._seen_until = -math.inf
        self._mark = -math.inf
        self._last = -math.inf  # when the last statement arrived

    def state(self, amount: float, until: float, now: float, sent: float | None) -> None:
        """Take a statement.

        Args:
            amount: What others use, at most.
            until: When that will be over.
            now: When it arrived.
            sent: When its attempt was sent; None: it can only raise the amount.
        """
        if sent is not None and sent >= self._mark:
            later = sent >= self._last  # than all that has arrived
            self._held, self._held_until = (0.0, -math.inf) if later else (self._seen, self._seen_until)
            self._seen, self._seen_until, self._mark = amount, until, now
        elif amount > 0:
            self._seen = max(self._seen, amount)
            self._seen_until = max(self._seen_until, until)
        self._last = now
        self._count()

    def forget(self, now: float) -> None:
        """Drop what is over."""
        if now >= self._held_until:
            self._held = 0.0
        if now >= self._seen_until:
            self._seen = 0.0
        self._count()

    def at(self, now: float) -> float:
        """Return the amount at `now`, and change nothing."""
        return max(self._held if now < self._held_until else 0.0, self._seen if now < self._seen_until else 0.0)

    def steps(self) -> list[tuple[float, float]]:
        """Return from when on the amount is what."""
        ends = [end for amount, end in ((self._held, self._held_until), (self._seen, self._seen_until)) if amount]
        return [(-math.inf, self.amount), *((end, self.at(end)) for end in ends)]

    def shrink(self, amount: float) -> None:
        """Take `amount` off, for a quota that forgives by and by."""
        self._held = max(0.0, self._held - amount)
        self._seen = max(0.0, self._seen - amount)
        self._count()

    def _count(self) -> None:
        self.amount = max(self._held, self._seen)
        self.until = math.inf
        if self._held:
            self.until = self._held_until
        if self._seen:
            self.until = min(self.until, self._seen_until)


def latest(reset: float) -> float:
    """Return the longest span that may be meant: whole seconds may have been rounded down.

    >>> latest(12.0), latest(0.012)
    (13.0, 0.012)
    """
    return reset + 1.0 if reset % 1.0 == 0 else reset


def earliest(reset: float) -> float:
    """Return the shortest span that may be meant: whole seconds, and thousandths, may have been rounded up.

    >>> earliest(12.0), earliest(0.012)
    (11.0, 0.011)
    """
    return reset - 1.0 if reset % 1.0 == 0 else reset - 0.001
