"""A quota whose bookings survive a restart, in a file of one process.

A turn is one line (`state_lines`) and one write (`state_file`). When the lines have become many they are written anew.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rxllm.clock import wall as wall_clock
from rxllm.events import StoreChanged
from rxllm.policies.fixed import EDGE
from rxllm.policies.meters import meter
from rxllm.stores.state_file import StateFile, in_use, unusable
from rxllm.stores.state_lines import head_of, line_of, read_state

if TYPE_CHECKING:
    from collections.abc import Callable

    from rxllm.clock import Clock, Handle
    from rxllm.errors import CallError
    from rxllm.policies.quota import Quota
    from rxllm.policies.sliding import Ticket
    from rxllm.stores.base import OutsideMeter

__all__ = ["KeptMeter", "kept_meter"]

RETRY = 1.0  # seconds between two tries to write to a disk that is full
SLACK = 65_536  # bytes by which the file may grow, besides
GROWTH = 8  # times the size of what was live
BOOT = Path("/proc/sys/kernel/random/boot_id")

_log = logging.getLogger("rxllm.stores.state")


def kept_meter(quota: Quota, *, wall: Callable[[], float] = wall_clock, boot: str | None = None) -> OutsideMeter:
    """Return the meter of a quota with a `state` file.

    Args:
        quota: what it counts, and the file.
        wall: returns the date, in seconds since 1970.
        boot: names the time since when the clock counts: files of another one are dated by the wall clock. None: the
            machine's, and none in virtual time.
    """
    return KeptMeter(quota, wall=wall, boot=boot)


class KeptMeter:
    """A meter that writes to a file what it has booked, and goes on where the file ends.

    What a turn of the loop has booked is written in the next turn, before anything else that the turn has brought on
    its way: an attempt that sends in a task of its own, as those of a `Client` do, has not left this machine then. So
    whenever the process is killed, the next one counts all that was sent; for what was settled in the last turn it may
    count what was reserved. Two things break this. A task that begins at once (`asyncio.eager_task_factory`) may send
    before the turn is over. And nothing waits for the disk: when the machine itself stops, what has not come there yet
    is lost, at worst all that the file says.

    The file is dated by the clock that only runs forward as long as the machine is up, where it names its starts
    (Linux), else by the wall clock. There a date in the future counts as now, so a step back makes a booking count for
    longer; a step forward between two runs cannot be told from time that went by.

    While the disk is full the run goes on. The file ends with the last complete line, and what is missing is written
    with the next booking that finds room; until then a restart knows nothing of it.

    What others use is not kept: the first reply tells. A margin that has grown is not kept either. The edge of a fixed
    window is, until the machine starts anew. What was on the wire of a quota that is charged at the end counts as
    booked at the restart.

    Args:
        quota: what it counts, and the file.
        wall: returns the date, in seconds since 1970.
        boot: see `kept_meter`.
    """

    __slots__ = (
        "_boot",
        "_clock",
        "_dirty",
        "_due",
        "_failing",
        "_file",
        "_inner",
        "_most_bytes",
        "_quota",
        "_retry",
        "_since",
        "_tell",
        "_wall",
    )

    def __init__(self, quota: Quota, *, wall: Callable[[], float], boot: str | None) -> None:
        self._quota = quota
        self._wall = wall
        self._boot = boot
        self._since = ""  # the boot that the file is of
        self._inner = meter(quota)
        self._dirty: set[int] = set()  # slots that the file does not know as they are
        self._clock: Clock
        self._file: StateFile | None = None
        self._due: Handle | None = None  # the write of this turn
        self._most_bytes = 0  # beyond that the file is written anew
        self._retry = 0.0  # not before
        self._failing = False
        self._tell: Callable[[StoreChanged], object]

    # the file

    def bind(
        self,
        clock: Clock,
        *,
        wake: Callable[[], object],  # noqa: ARG002  time and our own settlements alone make room
        fail: Callable[[CallError], object],  # noqa: ARG002  a full disk does not end a run
        tell: Callable[[StoreChanged], object],
    ) -> None:
        """Live on `clock`, and open the file; see `OutsideMeter.bind`.

        Raises:
            ConfigError: the file cannot be used, is in use, is damaged, or is that of another quota.
        """
        self._tell = tell
        if self._file is not None:
            if not self._file.is_ours:
                raise in_use(self._file.path)
            if self._clock is clock:
                return
            if self._clock.threads and clock.threads:  # steady time is the same on all loops
                self._cancel()
                self._clock = clock
                self._write()
                return
        self.close()
        self._clock = clock
        self._open(_path(self._quota))

    def close(self) -> None:
        """Write what is live, and leave the file. What is settled later counts in full at the next start."""
        self._cancel()
        file, self._file = self._file, None
        if file is None:
            return
        now = self._clock.seconds()
        try:
            if file.is_ours:
                file.replace(self._all(now))
        except OSError as error:
            self._failed(error, now)
        finally:
            file.close()

    def _open(self, path: Path) -> None:
        now, date = self._clock.seconds(), self._wall()
        self._since = self._boot if self._boot is not None else _machine() if self._clock.threads else ""
        file = StateFile(path)
        try:
            kept = read_state(path, file.read(), self._quota)
            self._inner = meter(self._quota)
            if kept is not None:
                self._inner.restore(kept.entries(self._since, now, date), now)
            self._anew(file, now)
        except OSError as error:
            file.close()
            raise unusable(path, error) from error
        except BaseException:
            file.close()
            raise
        self._file = file

    def _changed(self, slot: int) -> None:
        """Have a slot written in the next turn."""
        self._dirty.add(slot)
        if self._due is None and self._file is not None:
            self._due = self._clock.call_soon(self._write)

    def _write(self) -> None:
        """Write what has changed, in one go."""
        self._due = None
        file, now = self._file, self._clock.seconds()
        if file is None or not self._dirty or (self._failing and now < self._retry):
            return
        try:
            if file.is_torn or file.size > self._most_bytes:
                self._anew(file, now)
            else:
                known = (self._inner.entry(slot) for slot in sorted(self._dirty))
                file.append(line_of(now, self._wall(), [entry for entry in known if entry is not None]))
                self._dirty.clear()
        except OSError as error:
            self._failed(error, now)
            self._most_bytes = file.size + SLACK  # a line may find room where a new file has not
            return
        if self._failing:
            self._failing = False
            _log.info("the state file %s is written again", file.path)
            self._tell(StoreChanged(at=now, quota=self._quota, reachable=True, reason="the file is written again"))

    def _anew(self, file: StateFile, now: float) -> None:
        """Write the whole file, without what is over."""
        file.replace(self._all(now))
        self._dirty.clear()
        self._most_bytes = GROWTH * file.size + SLACK

    def _all(self, now: float) -> bytes:
        return head_of(self._quota, self._since) + line_of(now, self._wall(), self._inner.entries(now))

    def _failed(self, error: OSError, now: float) -> None:
        self._retry = now + RETRY
        if self._failing:
            return
        self._failing = True
        path = _path(self._quota)
        _log.warning(
            "the state file %s cannot be written (%s): a restart would not know of what is booked", path, error
        )
        self._tell(StoreChanged(at=now, quota=self._quota, reachable=False, reason=str(error)))

    def _cancel(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None

    # the meter

    @property
    def limit(self) -> float:
        """What may be booked in a window."""
        return self._inner.limit

    def too_large(self, cost: float) -> bool:
        """Say whether `cost` fits at no time."""
        return self._inner.too_large(cost)

    def fits(self, cost: float, now: float) -> bool:
        """Say whether `cost` may be booked now."""
        return self._inner.fits(cost, now)

    def book(self, cost: float, now: float) -> Ticket:
        """Book `cost`, whether it fits or not; return what `settle` or `refund` take once."""
        ticket = self._inner.book(cost, now)
        self._changed(ticket[0])
        return ticket

    def settle(self, ticket: Ticket, actual: float, now: float) -> None:
        """Make `actual` of the cost that was booked."""
        self._inner.settle(ticket, actual, now)
        slot, cost = ticket
        self._changed(slot)
        if actual > cost or slot < 0:  # a debt is booked now; so is what was held
            self._changed(self._inner.newest)

    def refund(self, ticket: Ticket, now: float) -> None:
        """Undo a booking."""
        self.settle(ticket, 0.0, now)

    def available(self, now: float) -> float:
        """Return what fits now; below zero it is a debt."""
        return self._inner.available(now)

    def booked(self, now: float) -> float:
        """Return what is not available because of our own bookings."""
        return self._inner.booked(now)

    def next_expiry(self, now: float) -> float | None:
        """Return when something booked is free again next; None if nothing is booked."""
        return self._inner.next_expiry(now)

    def ready_at(self, cost: float, now: float) -> float:
        """Return when `cost` fits at the earliest if nothing else is booked or settled; infinity if never."""
        return self._inner.ready_at(cost, now)

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
        """Take over what the server says; the rule and the arguments are those of `Meter.rebase`."""
        self._inner.rebase(remaining, reset, now, limit=limit, pending=pending, sent=sent)
        if self._quota.strategy == "fixed":
            self._changed(EDGE)

    def widen(self, margin: float) -> None:
        """Reckon with `margin` seconds of jitter on the way."""
        self._inner.widen(margin)


def _path(quota: Quota) -> Path:
    """Return where the file really is: a link to it stays one, and the folder may change."""
    assert quota.state is not None  # noqa: S101  who makes this meter has looked
    return Path(os.path.realpath(quota.state))


def _machine() -> str:
    """Return the name of this start of the machine; "" where it has none."""
    try:
        return BOOT.read_text("ascii").strip()
    except OSError:
        return ""
