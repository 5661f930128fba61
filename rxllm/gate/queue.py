"""Those who wait at a gate: who comes, who leaves, and who starts.

What may let others start (an attempt ends, the first in the queue leaves, a setting changes) is looked at in the next
turn of the loop, once for all of it: a pipeline that is disposed takes its own out of the queue before any of them gets
the places of the others, and whoever ends an attempt never runs the code of another one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from rxllm.events import Resumed, Suspended
from rxllm.gate.lookout import Lookout
from rxllm.gate.waiter import Waiter
from rxllm.policies.admission import Admission, Refused
from rxllm.policies.line import Lines

if TYPE_CHECKING:
    from rxllm.clock import Clock
    from rxllm.errors import CallError, ConfigError
    from rxllm.gate.lease import Lease
    from rxllm.gate.news import News
    from rxllm.policies.ledger import Ledger
    from rxllm.policies.opening import Opening
    from rxllm.policies.times import Times

__all__ = ["Queue", "Wire"]

OWN = frozenset({"concurrency", "pace"})  # what a controller sets
LONG = 60.0  # seconds: a longer wait for a quota suspends


class Wire(Protocol):
    """What those who wait want to get on."""

    in_flight: int  # attempts that have started and not ended

    def book(self, waiter: Waiter, now: float, /) -> Lease:
        """Return the lease of one that starts now."""
        ...

    def unasked(self) -> None:
        """Learn that nobody waits any more."""
        ...


class Queue:
    """Lets those who wait start as soon as they may; `policies.admission` decides, and this one does it.

    Args:
        wire: what they start on.
        opening: what keeps everybody back.
        ledger: the quotas.
        times: where the waits are counted.
        news: who is told when a quota is used up for long.
    """

    def __init__(self, wire: Wire, opening: Opening, ledger: Ledger, times: Times, news: News) -> None:
        self.lines: Lines[Waiter] = Lines()
        self.closed = False
        self.clock: Clock | None = None  # of those who wait
        self._wire = wire
        self._ledger = ledger
        self._times = times
        self._news = news
        self._admission = Admission(self.lines, opening, ledger)
        self._lookout = Lookout(self._look)
        self._looking = False

    @property
    def reason(self) -> str | None:
        """What the first waits for; None: nobody waits."""
        return self._admission.reason

    @property
    def is_bound(self) -> bool:
        """Whether somebody waits because of the limit or the rate."""
        return self.lines.waiting > 0 and self._admission.reason in OWN

    def resumes_in(self, now: float) -> float | None:
        """Return the seconds until the next look while a quota is used up; None: none is."""
        due = self._lookout.due
        return None if due is None or self._admission.reason not in self._ledger.names else max(0.0, due - now)

    def admits(self, amounts: tuple[float, ...], now: float) -> bool:
        """Say whether one that came now would start at once, past nobody who waits."""
        if self.closed or self.lines.waiting or self._looking:
            return False
        return self._admission.obstacle(amounts, self._wire.in_flight, now) is None

    def enter(self, waiter: Waiter) -> None:
        """Let `waiter` start now, or as soon as it may: its applicant is told, perhaps before this returns."""
        now, admission = waiter.since, self._admission
        if self.lines.waiting or self._looking:
            self._times.note(admission.reason, now)
        else:
            admission.reason = admission.obstacle(waiter.amounts, self._wire.in_flight, now)
            if admission.reason is None:
                applicant, waiter.applicant = waiter.applicant, None
                if applicant is not None:
                    applicant.admitted(self._wire.book(waiter, now))
                return
            self._times.begin(now)
        waiter.before = self._times.waited.copy()
        if admission.enter(waiter):
            self.wake()

    def cancelled(self, waiter: Waiter) -> None:
        """Forget a waiter that has left; its own method calls this."""
        others_may_start = self._admission.leave(waiter)
        if not self.lines.waiting:
            self._times.note(self._admission.reason, self._clock_in_use().seconds())
            self._rest()
        elif others_may_start:
            self.wake()

    def turn_away(self, error: CallError | ConfigError) -> None:
        """Give all that wait `error`."""
        waiters = self.lines.all()
        try:
            while waiters:
                self._refuse(waiters.pop(0), error)
        except BaseException:  # a callback of one pipeline raised: the others learn it too
            self._clock_in_use().call_soon(lambda: self.turn_away(error))
            raise
        finally:
            if not self.lines.waiting:
                self._rest()

    def drop(self) -> None:
        """Forget all that wait: their loop is over."""
        self.lines.drop()
        self._rest()

    def wake(self) -> None:
        """Have a look in the next turn, if somebody waits."""
        if self.lines.waiting and not self._looking:
            self._lookout.soon(self._clock_in_use())

    def _look(self) -> None:
        """Let start who may start now, and see to it that there is a next look."""
        if self._looking:
            return
        self._looking = True
        now_of = self._clock_in_use().seconds
        try:
            while self.lines.waiting and not self.closed:
                now = now_of()
                self._times.note(self._admission.reason, now)
                found = self._admission.look(self._wire.in_flight, now)
                if isinstance(found, Waiter):
                    self._start(found, now)
                elif not isinstance(found, Refused):
                    self._wait_until(found, now)
                    break
                elif found.waiter is not None:
                    self._refuse(found.waiter, found.error)
                else:
                    self.turn_away(found.error)
                    if self.lines.waiting:  # who came again at once is heard in a turn of its own
                        self._lookout.soon(self._clock_in_use())
                    break
        except BaseException:
            self._looking = False
            self.wake()  # a callback of one pipeline raised: the others go on
            raise
        finally:
            self._looking = False
            if not self.lines.waiting:
                self._rest()

    def _start(self, waiter: Waiter, now: float) -> None:
        applicant, waiter.applicant = waiter.applicant, None
        self.lines.left(waiter.line)
        if self._times.suspended_since is not None:
            self._resume(now)
        lease = self._wire.book(waiter, now)
        lease.waited = self._times.start(waiter.before)
        if applicant is not None:
            applicant.admitted(lease)

    def _refuse(self, waiter: Waiter, error: CallError | ConfigError) -> None:
        applicant, waiter.applicant = waiter.applicant, None
        if applicant is not None:
            self.lines.left(waiter.line)
            applicant.turned_away(error)

    def _wait_until(self, time: float, now: float) -> None:
        """Look again at `time`; a quota that is used up for long suspends the gate."""
        full = self._admission.full
        if full is not None and LONG < time - now < math.inf and self._times.suspended_since is None:
            self._times.suspend(now)
            self._news.suspended(Suspended(at=now, quota=self._ledger.quotas[full], seconds=time - now))
        self._lookout.at(time, now, self._clock_in_use())

    def _resume(self, now: float) -> None:
        seconds = self._times.resume(now)
        if seconds is not None:
            self._news.tell(Resumed(at=now, seconds=seconds))

    def _rest(self) -> None:
        """Leave nothing behind: nobody waits any more."""
        self._admission.rest()
        if self.clock is not None:
            self._resume(self.clock.seconds())
        self._lookout.rest()
        self._wire.unasked()

    def _clock_in_use(self) -> Clock:
        assert self.clock is not None  # noqa: S101  somebody waits
        return self.clock
