"""Virtual time: exact, fast, in float seconds."""

from __future__ import annotations

import heapq
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeVar

from reactivex import abc
from reactivex.disposable import Disposable
from reactivex.scheduler.periodicscheduler import PeriodicScheduler

from rxllm.errors import ConfigError, check_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from reactivex import typing as rx_typing

    from rxllm.clock import Alarms

__all__ = ["VirtualScheduler"]

State = TypeVar("State")
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


class _Due:
    """An action that is due, and its handle."""

    __slots__ = ("action", "at", "number")

    def __init__(self, at: float, number: int, action: Callable[[], object]) -> None:
        self.at = at
        self.number = number
        self.action: Callable[[], object] | None = action

    def __lt__(self, other: _Due) -> bool:
        return self.at < other.at or (self.at == other.at and self.number < other.number)

    def cancel(self) -> None:
        self.action = None


class VirtualScheduler(PeriodicScheduler):
    """A scheduler whose time moves only when a test says so.

    Actions run in the order of their time, then of their scheduling; time is a float in seconds, starts at 0 and never
    runs ahead (reactivex' own adds a second after 100 actions at one instant). Streams of ours use it as their clock,
    at the cost of a heap.

    Example:
        >>> scheduler = VirtualScheduler()
        >>> handle = scheduler.call_later(2.5, lambda: print(scheduler.seconds()))
        >>> scheduler.run()
        2.5
    """

    threads = False

    def __init__(self) -> None:
        super().__init__()
        self.alarms: dict[float, Alarms] = {}
        self._now = 0.0
        self._due: list[_Due] = []
        self._number = 0
        self._running = False

    def __repr__(self) -> str:
        return f"<VirtualScheduler at {self._now} s>"

    # a clock

    @property
    def clock(self) -> VirtualScheduler:
        """The scheduler itself: it is its own clock."""
        return self

    @property
    def scheduler(self) -> VirtualScheduler:
        """The scheduler itself: it is its own clock."""
        return self

    def seconds(self) -> float:
        """Return virtual seconds since the start."""
        return self._now

    def call_soon(self, action: Callable[[], object]) -> _Due:
        """Call `action` at this instant, after all that is due now."""
        return self.call_later(0.0, action)

    def call_later(self, delay: float, action: Callable[[], object]) -> _Due:
        """Call `action` after `delay` virtual seconds."""
        return self._call_at(self._now + max(0.0, delay), action)

    def _call_at(self, at: float, action: Callable[[], object]) -> _Due:
        self._number += 1
        due = _Due(at, self._number, action)
        heapq.heappush(self._due, due)
        return due

    def post(self, action: Callable[[], object]) -> None:
        """Call `action` at this instant."""
        self.call_soon(action)

    def is_over(self) -> bool:
        """Say that time may go on."""
        return False

    def is_here(self) -> bool:
        """Return True: virtual time has one thread."""
        return True

    # a scheduler

    @property
    def now(self) -> datetime:
        """Virtual time, from 1970 on."""
        return EPOCH + timedelta(seconds=self._now)

    def schedule(self, action: abc.ScheduledAction[State], state: State | None = None) -> abc.DisposableBase:
        """Schedule `action` at this instant."""
        return self.schedule_relative(0.0, action, state)

    def schedule_relative(
        self, duetime: rx_typing.RelativeTime, action: abc.ScheduledAction[State], state: State | None = None
    ) -> abc.DisposableBase:
        """Schedule `action` after `duetime` (seconds or timedelta)."""
        due = self.call_later(self.to_seconds(duetime), lambda: self.invoke_action(action, state))
        return Disposable(due.cancel)

    def schedule_absolute(
        self, duetime: rx_typing.AbsoluteTime, action: abc.ScheduledAction[State], state: State | None = None
    ) -> abc.DisposableBase:
        """Schedule `action` at `duetime` (a datetime, or seconds since the start)."""
        at = max(self._now, self.to_seconds(duetime))  # as it is: now + (duetime - now) is off by a bit
        return Disposable(self._call_at(at, lambda: self.invoke_action(action, state)).cancel)

    # the test's side

    @property
    def pending(self) -> int:
        """How many actions are due and not cancelled: 0 when nothing was left behind."""
        return sum(due.action is not None for due in self._due)

    def run(self, until: float | None = None) -> None:
        """Run everything that is due, up to and including time `until`; without, until nothing is due.

        Raises:
            ConfigError: `until` lies in the past, or an action calls this.
        """
        check_number("until", until, least=self._now, optional=True)
        if self._running:
            msg = "the virtual scheduler already runs: an action cannot run it"
            raise ConfigError(msg)
        self._running = True
        due = self._due
        try:
            while due and (until is None or due[0].at <= until):
                next_one = heapq.heappop(due)
                action = next_one.action
                if action is not None:
                    self._now = next_one.at
                    next_one.action = None
                    action()
        finally:
            self._running = False
        if until is not None:
            self._now = until

    def advance(self, seconds: float) -> None:
        """Run everything that is due in the next `seconds`."""
        check_number("seconds", seconds, least=0)
        self.run(self._now + seconds)
