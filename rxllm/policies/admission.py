"""Who may start now, of those who wait before all limits of a gate."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, Protocol, TypeVar

from rxllm.errors import BreakerError, CallError
from rxllm.policies.line import Waiting

if TYPE_CHECKING:
    from rxllm.policies.ledger import Ledger
    from rxllm.policies.line import Line, Lines
    from rxllm.policies.opening import Opening

__all__ = ["Admission", "Candidate", "Refused"]

PASSES = 32  # how many later ones may go before one that does not fit
LOOK = 32  # how many of those behind it are looked at for one that does


class Candidate(Waiting, Protocol):
    """Somebody who waits for admission."""

    amounts: tuple[float, ...]  # what it takes of each quota
    line: Line[Any]
    passed: int  # how many later ones went before it while it was the first
    stuck: float  # since when it is the first and does not fit into a quota


W = TypeVar("W", bound=Candidate)


class Refused(NamedTuple, Generic[W]):
    """Who shall not wait any longer, and why."""

    error: CallError
    waiter: W | None  # None: all


class Admission(Generic[W]):
    """The lines before a gate, how far it is open, and its quotas as one decision. `now` is in seconds.

    The first in the line whose turn it is starts as soon as it fits. One that does not fit into a quota may be passed
    by later ones that do, a number of times and for one window; then all wait until it fits.

    Args:
        lines: those who wait.
        opening: what keeps everybody back, whatever an attempt costs.
        ledger: the quotas.
    """

    __slots__ = ("_ledger", "_lines", "_opening", "_passing", "full", "reason")

    def __init__(self, lines: Lines[W], opening: Opening, ledger: Ledger) -> None:
        self._lines = lines
        self._opening = opening
        self._ledger = ledger
        self._passing = False  # the first does not fit, and may be passed by one that does
        self.full: int | None = None  # the number of the quota that the first waits for; None: it waits for none
        self.reason: str | None = None  # what the first waits for; None: nobody waits

    def obstacle(self, amounts: tuple[float, ...], in_flight: int, now: float) -> str | None:
        """Return what is in the way of one that comes while nobody waits; None: it may start.

        Args:
            amounts: what it takes of each quota.
            in_flight: how many are on the wire.
            now: the time.
        """
        held = self._opening.held(in_flight, now)
        if held is not None:
            return held
        full = self._ledger.full(amounts, now)
        return None if full is None else self._ledger.names[full]

    def enter(self, waiter: W) -> bool:
        """Have `waiter` wait; say whether it may start before those who wait already."""
        lines, line = self._lines, waiter.line
        if lines.enter(line, waiter):
            return True
        return self._passing and (lines.waiting <= LOOK + 1 or line.queue[-1] is not waiter)

    def leave(self, waiter: W) -> bool:
        """Forget one that waits no more; say whether another one may start for that: a new first, or one in view."""
        line = waiter.line
        first = line.queue[0] is waiter
        self._lines.left(line)
        line.sweep()
        return first or self._passing

    def rest(self) -> None:
        """Learn that nobody waits any more."""
        self._lines.clear()
        self._passing = False
        self.reason = self.full = None

    def look(self, in_flight: int, now: float) -> W | Refused[W] | float:
        """Return who may start now, or else who is to be refused, or else when to look again; somebody must wait.

        That time may be infinity: only an end, a settlement or a change helps. Look again after a refusal.
        """
        self._passing, self.full = False, None
        opening, ledger = self._opening, self._ledger
        held = opening.held(in_flight, now)
        if held == "breaker" and opening.breaker is not None and opening.breaker.stop:
            return Refused(BreakerError("nothing was answered for long, and the breaker is open"), None)
        if held is not None:
            self.reason = held
            return opening.opens_at(held, now)
        head = self._lines.first()
        full = ledger.full(head.amounts, now)
        if full is None:
            return head
        error = ledger.refusal(full, head.amounts[full], now)
        return self._look_behind(head, full, now) if error is None else Refused(error, head)

    def _look_behind(self, head: W, full: int, now: float) -> W | float:
        """Return one behind `head` that fits although `head` does not; or when the first of them may fit."""
        ledger = self._ledger
        self.full, self.reason = full, ledger.names[full]
        head.stuck = min(head.stuck, now)
        self._passing = head.passed < PASSES and now - head.stuck < ledger.quotas[full].per
        wanted = head.amounts[full]
        least = {full: wanted}  # of each quota that is in the way of somebody: how much must come free
        behind = self._lines.others(head, head.line) if self._passing else ()
        for waiter in itertools.islice(behind, LOOK):
            if len(waiter.amounts) > full and waiter.amounts[full] >= wanted:
                continue
            other = ledger.full(waiter.amounts, now)
            if other is None:
                head.passed += 1
                return waiter
            least[other] = min(least.get(other, math.inf), waiter.amounts[other])
        return min(ledger.meters[number].ready_at(amount, now) for number, amount in least.items())
