"""When a gate looks again who may start."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from rxllm.clock import Clock, Handle

__all__ = ["Lookout"]

LEAST = 0.001  # seconds: no timer is armed for less


class Lookout:
    """One timer for the next time that is known, and at most one call in the next turn for what happens meanwhile.

    Args:
        look: looks, and says `at` when to look again if that is known.
    """

    def __init__(self, look: Callable[[], object]) -> None:
        self._look = look
        self._timer: Handle | None = None
        self._due = 0.0  # when the timer fires
        self._next_turn: Handle | None = None

    @property
    def due(self) -> float | None:
        """When it looks again; None if no time is known."""
        return None if self._timer is None else self._due

    def soon(self, clock: Clock) -> None:
        """Look in the next turn."""
        if self._next_turn is None:
            self._next_turn = clock.call_soon(self._turn)

    def at(self, time: float, now: float, clock: Clock) -> None:
        """Look at `time`, never before it; infinity: nothing that time brings can help."""
        due = max(time, now + LEAST)
        if due == math.inf:
            self._disarm()
            return
        if self._timer is not None:
            if now < self._due <= due:
                return  # it fires early enough and looks again
            self._timer.cancel()
        delay = due - now
        if now + delay < due:  # rounded to even, as in 1.1 + (6.61 - 1.1): it would wake a bit early, and once more
            delay = math.nextafter(due, math.inf) - now
        self._due = due
        self._timer = clock.call_later(delay, self._fire)

    def rest(self) -> None:
        """Look no more: nobody waits."""
        self._disarm()
        if self._next_turn is not None:
            self._next_turn.cancel()
            self._next_turn = None

    def _disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _turn(self) -> None:
        self._next_turn = None
        self._look()

    def _fire(self) -> None:
        self._timer = None
        self._look()
