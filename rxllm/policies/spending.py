"""When to start no more: what is spent, and what those in progress will probably cost."""

import math

import msgspec

from rxllm.errors import check_number

__all__ = ["Spending", "Spent"]

START = 4  # items in progress before one has ended, when nobody knows what one costs
MANY = 1 << 30  # as many as the consumer wants


class Spent(msgspec.Struct, frozen=True, kw_only=True):
    """What a budget has come to."""

    requests: int = 0  # attempts, also those that failed, and those on the wire
    tokens: int = 0
    usd: float = 0.0
    seconds: float = 0.0  # since the subscription, at its end if it has ended
    ended: int = 0  # items
    in_progress: int = 0  # items
    used_up: str | None = None  # the budget that left something unasked: "requests", "tokens", "usd" or "seconds"


class Spending:
    """Counts what is spent, attempt by attempt, and says how many more items may start.

    An item may start while what is spent, and what those in progress will still cost if each costs what an item has
    cost on average, is less than the budget. So the last one may go beyond it by its own cost, and by what those in
    progress cost more than the average. Until one has ended nobody knows the average: 4 items may be in progress then,
    8 after the first one, 12 after the second. Of requests it is known that an item costs one at least, but not how
    many more.

    Args:
        requests: Attempts, > 0; None: any number.
        tokens: Input and output, > 0.
        usd: > 0.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.

    >>> spending = Spending(tokens=100)
    >>> spending.start(), spending.spend(tokens=30), spending.end(tokens=30), spending.room()
    (None, None, None, 3)
    """

    __slots__ = ("_finished", "_limits", "_spent", "ended", "in_progress")

    def __init__(self, *, requests: float | None = None, tokens: float | None = None, usd: float | None = None) -> None:
        check_number("requests", requests, above=0, optional=True)
        check_number("tokens", tokens, above=0, optional=True)
        check_number("usd", usd, above=0, optional=True)
        given = {"requests": requests, "tokens": tokens, "usd": usd}
        self._limits = {kind: limit for kind, limit in given.items() if limit is not None}
        self._spent: dict[str, float] = dict.fromkeys(given, 0)
        self._finished: dict[str, float] = dict.fromkeys(given, 0)  # of that, what the items cost that have ended
        self.ended = 0
        self.in_progress = 0

    def spend(self, *, requests: int = 0, tokens: int = 0, usd: float = 0.0) -> None:
        """Count what an attempt costs: a request when it starts, what it has used when that is known."""
        spent = self._spent
        spent["requests"] += requests
        spent["tokens"] += tokens
        spent["usd"] += usd

    def start(self) -> None:
        """Count an item that starts."""
        self.in_progress += 1

    def end(self, *, requests: int = 0, tokens: int = 0, usd: float = 0.0) -> None:
        """Count an item that ends; say what it has cost with all its attempts, which is spent already."""
        self.in_progress = max(0, self.in_progress - 1)  # who emits more than it takes has nothing in progress
        self.ended += 1
        finished = self._finished
        finished["requests"] += requests
        finished["tokens"] += tokens
        finished["usd"] += usd

    def used_up(self) -> str | None:
        """Return which budget is used up; None: there is something left of each."""
        return next((kind for kind, limit in self._limits.items() if self._spent[kind] >= limit), None)

    def room(self) -> int:
        """Return how many more items may start now; at least one when nothing is in progress and nothing used up."""
        room = MANY
        for kind, limit in self._limits.items():
            left = limit - self._spent[kind]
            if left <= 0:
                return 0
            mean = self._finished[kind] / max(1, self.ended)
            if kind == "requests":
                mean = max(1.0, mean)
            else:
                room = min(room, START * (1 + self.ended) - self.in_progress)
            if mean > 0 and left / mean < MANY:
                begun = (self._spent[kind] - self._finished[kind]) / mean  # items' worth that is spent on those
                room = min(room, math.ceil(left / mean - max(0.0, self.in_progress - begun)))
        return max(0, room)

    def spent(self, *, seconds: float = 0.0, used_up: str | None = None) -> Spent:
        """Return what was spent so far.

        Args:
            seconds: since the beginning.
            used_up: the budget that has stopped the stream.
        """
        return Spent(
            requests=int(self._spent["requests"]),
            tokens=int(self._spent["tokens"]),
            usd=self._spent["usd"],
            seconds=seconds,
            ended=self.ended,
            in_progress=self.in_progress,
            used_up=used_up,
        )
