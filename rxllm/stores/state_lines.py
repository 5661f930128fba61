"""What the state file of a quota says, line by line, and what that comes to.

    head       which quota it is, and since which start of the machine its times count
    [now, wall, [[slot, at, amount, close], …]]      what a loop turn has changed; the last word on a slot holds
    [now, wall, [[slot, at, amount, close], …]]

A last line that does not end was torn by a kill, and says nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import msgspec

from rxllm.errors import ConfigError
from rxllm.policies.fixed import EDGE
from rxllm.policies.sliding import Entry

if TYPE_CHECKING:
    from pathlib import Path

    from rxllm.policies.quota import Quota

__all__ = ["Kept", "head_of", "line_of", "read_state"]

VERSION = 1


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


class Kept(NamedTuple):
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


def read_state(path: Path, data: bytes, quota: Quota) -> Kept | None:
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
    return Kept(known.boot, turns[-1].now, turns[-1].wall, slots)


def head_of(quota: Quota, boot: str) -> bytes:
    """Return the first line; `boot` names the start since when the times of the others count."""
    head = _Head(
        rxllm="quota",
        version=VERSION,
        limit=quota.limit,
        per=quota.per,
        unit=quota.unit,
        strategy=quota.strategy,
        boot=boot,
    )
    return msgspec.json.encode(head) + b"\n"


def line_of(now: float, wall: float, entries: list[Entry]) -> bytes:
    """Return the line of a turn."""
    return msgspec.json.encode(_Turn(now, wall, entries)) + b"\n"
