"""A place in the queue, and who holds it."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rxllm.errors import CallError, ConfigError
    from rxllm.gate.lease import Lease
    from rxllm.policies.line import Line

__all__ = ["Applicant", "Waiter", "Waiters"]

_arrivals = itertools.count(1)


class Applicant(Protocol):
    """Who asks for admission."""

    def admitted(self, lease: Lease, /) -> None:
        """Take the lease; called once, perhaps before the gate's `enter` returns."""
        ...

    def turned_away(self, error: CallError | ConfigError, /) -> None:
        """Learn that there will be no lease: the gate is closed, or a quota has become too small for it."""
        ...


class Waiters(Protocol):
    """Those among whom a waiter has its place."""

    def cancelled(self, waiter: Waiter, /) -> None:
        """Forget a waiter that has left; its own method calls this."""
        ...


class Waiter:
    """One attempt in the queue. A retry has the arrival of its request's first attempt, and so its place."""

    __slots__ = ("_queue", "amounts", "applicant", "arrival", "before", "line", "passed", "since", "stuck")

    def __init__(  # noqa: PLR0917  made by the gate alone
        self,
        queue: Waiters,
        line: Line[Waiter],
        arrival: int | None,
        amounts: tuple[float, ...],
        applicant: Applicant,
        since: float,
    ) -> None:
        self._queue = queue
        self.line = line
        self.arrival = next(_arrivals) if arrival is None else arrival
        self.amounts = amounts
        self.applicant: Applicant | None = applicant  # None: cancelled, or admitted
        self.since = since
        self.before: dict[str, float]  # what the queue had waited for when this one came
        self.passed = 0  # how many later ones went before it while it was the first
        self.stuck = math.inf  # since when it is the first and does not fit into a quota

    def __lt__(self, other: Waiter) -> bool:
        return self.arrival < other.arrival

    def cancel(self) -> None:
        """Leave the queue."""
        if self.applicant is not None:
            self.applicant = None
            self._queue.cancelled(self)
