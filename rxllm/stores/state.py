"""A quota whose bookings survive a restart, in a file of one process.

    head       which quota it is, and since which start of the machine its times count
    [now, wall, [[slot, at, amount, close], …]]      what a loop turn has changed; the last word on a slot holds
    [now, wall, [[slot, at, amount, close], …]]

A turn is one line and one write. When the lines have become many they are written anew, in a file beside, which then
takes the name.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rxllm.clock import wall as wall_clock
from rxllm.errors import ConfigError
from rxllm.events import StoreChanged
from rxllm.policies.fixed import EDGE
from rxllm.policies.meters import meter
from rxllm.policies.sliding import Entry
from rxllm.stores.lock import BINARY, lock_beside

if TYPE_CHECKING:
    from collections.abc import Callable

    from rxllm.clock import Clock, Handle
    from rxllm.errors import CallError
    from rxllm.policies.quota import Quota
    from rxllm.policies.sliding import Ticket
    from rxllm.stores.base import OutsideMeter

__all__ = ["KeptMeter", "kept_meter"]

VERSION = 1
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
        self._file: _File | None = None
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
                raise _in_use(self._file.path)
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
        file = _File(path)
        try:
            kept = _read(path, file.read(), self._quota)
            self._inner = meter(self._quota)
            if kept is not None:
                self._inner.restore(kept.entries(self._since, now, date), now)
            self._anew(file, now)
        except OSError as error:
            file.close()
            raise _unusable(path, error) from error
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
                file.append(_line(now, self._wall(), [entry for entry in known if entry is not None]))
                self._dirty.clear()
        except OSError as error:
            self._failed(error, now)
            self._most_bytes = file.size + SLACK  # a line may find room where a new file has not
            return
        if self._failing:
            self._failing = False
            _log.info("the state file %s is written again", file.path)
            self._tell(StoreChanged(at=now, quota=self._quota, reachable=True, reason="the file is written again"))

    def _anew(self, file: _File, now: float) -> None:
        """Write the whole file, without what is over."""
        file.replace(self._all(now))
        self._dirty.clear()
        self._most_bytes = GROWTH * file.size + SLACK

    def _all(self, now: float) -> bytes:
        quota = self._quota
        head = _Head(
            rxllm="quota",
            version=VERSION,
            limit=quota.limit,
            per=quota.per,
            unit=quota.unit,
            strategy=quota.strategy,
            boot=self._since,
        )
        return msgspec.json.encode(head) + b"\n" + _line(now, self._wall(), self._inner.entries(now))

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


class _Head(msgspec.Struct, frozen=True, kw_only=True):
    """The first line."""

    rxllm: str
    version: int
    limit: float  # for people: what was booked counts against any
    per: float
    unit: str
    strategy: str
    boot: str  # since when its times count; "": nobody knows


class _Version(msgspec.Struct, frozen=True, kw_only=True):
    """What the first line of any version has."""

    rxllm: str
    version: int


class _Turn(NamedTuple):
    """Any other line."""

    now: float  # steady seconds
    wall: float  # the date
    entries: list[Entry]


class _Kept(NamedTuple):
    """What a file says."""

    boot: str
    now: float  # when it was written last
    wall: float
    slots: dict[int, Entry]

    def entries(self, boot: str, now: float, wall: float) -> list[Entry]:
        """Return what was booked, dated by the clock of today; nothing is older than it can be."""
        same = boot == self.boot != "" and now >= self.now
        shift = 0.0 if same else now - self.now - max(0.0, wall - self.wall)
        return [
            Entry(slot, at + shift, amount, close + shift)
            for slot, at, amount, close in (self.slots[slot] for slot in sorted(self.slots))
            if same or slot != EDGE  # a provider's windows do not wait with our clock
        ]


def _read(path: Path, data: bytes, quota: Quota) -> _Kept | None:
    """Return what a file says, without a last line that is torn; None for an empty one."""
    if not data:
        return None
    head, *lines = data.split(b"\n")[:-1] or [data]
    name = str(path)
    try:
        version = msgspec.json.decode(head, type=_Version)
    except msgspec.MsgspecError:
        raise ConfigError(f"state {name!r} is not the state file of a quota") from None
    if version.rxllm != "quota":
        raise ConfigError(f"state {name!r} is not the state file of a quota")
    if version.version > VERSION:
        raise ConfigError(f"state {name!r} is of version {version.version}, and this rxllm reads up to {VERSION}")
    number, turns = 1, list[_Turn]()
    try:
        known = msgspec.json.decode(head, type=_Head)
        for line in lines:
            number += 1
            turns.append(msgspec.json.decode(line, type=_Turn))
    except msgspec.MsgspecError as error:
        raise ConfigError(f"state {name!r} is damaged in line {number}: {error}; remove it to begin anew") from None
    if (known.unit, known.per, known.strategy) != (quota.unit, quota.per, quota.strategy):
        theirs = f"{known.limit:g} {known.unit} per {known.per:g} seconds ({known.strategy})"
        raise ConfigError(f"state {name!r} is that of the quota {theirs}, and not of {quota} ({quota.strategy})")
    if not turns:
        return None
    slots = {entry.slot: entry for turn in turns for entry in turn.entries}
    return _Kept(known.boot, turns[-1].now, turns[-1].wall, slots)


def _line(now: float, wall: float, entries: list[Entry]) -> bytes:
    return msgspec.json.encode(_Turn(now, wall, entries)) + b"\n"


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


class _File:
    """A file that nobody else writes: the lock is a file beside it, because this one is replaced.

    Raises:
        ConfigError: it is in use, or no file can be there.
    """

    __slots__ = ("_end", "_lock", "_process", "is_torn", "path", "size")

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self.is_torn = False  # it does not end with a line, and must be written anew
        self._end = -1  # open for appending
        self._lock = -1
        self._process = os.getpid()
        try:
            if path.is_dir():
                raise ConfigError(f"state {str(path)!r} must be a file, and is a directory")
            lock = lock_beside(path)
        except OSError as error:
            raise _unusable(path, error) from error
        if lock is None:
            raise _in_use(path)
        self._lock = lock

    def __del__(self) -> None:
        self.close()

    @property
    def is_ours(self) -> bool:
        """Whether this process opened it: a fork of it must not write too."""
        return self._process == os.getpid()

    def read(self) -> bytes:
        """Return what is in it; nothing if there is none."""
        try:
            return self.path.read_bytes()
        except FileNotFoundError:
            return b""

    def append(self, data: bytes) -> None:
        """Write `data` at its end, all or nothing.

        Raises:
            OSError: nothing; `is_torn` if a part could not be taken back.
        """
        written = os.write(self._end, data)
        if written < len(data):
            self._cut()
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.size += written

    def replace(self, data: bytes) -> None:
        """Make `data` all that is in it: whoever is killed on the way leaves the old file or the new one.

        Raises:
            OSError: the old one.
        """
        beside = self.path.with_name(f"{self.path.name}.new")
        try:
            beside.write_bytes(data)
            self._leave()  # Windows replaces no file that is open
            beside.replace(self.path)
            self.size, self.is_torn = len(data), False
        except OSError:
            with contextlib.suppress(OSError):
                beside.unlink(missing_ok=True)
            raise
        finally:
            if self.size and self._end < 0:
                self._end = os.open(self.path, os.O_WRONLY | os.O_APPEND | BINARY)

    def close(self) -> None:
        """Leave it to others."""
        self._leave()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _cut(self) -> None:
        try:
            os.ftruncate(self._end, self.size)
        except OSError:
            self.is_torn = True

    def _leave(self) -> None:
        if self._end >= 0:
            os.close(self._end)
            self._end = -1


def _unusable(path: Path, error: OSError) -> ConfigError:
    return ConfigError(f"state {str(path)!r} cannot be used: {error}")


def _in_use(path: Path) -> ConfigError:
    return ConfigError(
        f"state {str(path)!r} is in use by another quota, gate or process: it is for one; "
        "to share a quota give it a store instead"
    )
