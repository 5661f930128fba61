"""Who may write a file: one at a time, by a lock on a file beside it, because the file itself may be replaced."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["BINARY", "lock_beside", "other_kind", "release"]

BINARY = getattr(os, "O_BINARY", 0)  # Windows makes two bytes of a line's end


def lock_beside(path: Path) -> int | None:
    """Return a descriptor that holds the lock of `path`, until it is closed or its process ends; None: it is in use.

    Raises:
        OSError: there can be no such file.
    """
    lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | BINARY, 0o666)
    try:
        free = _locked(lock)
    except OSError:
        os.close(lock)
        raise
    if free:
        return lock
    os.close(lock)
    return None


def other_kind(path: Path) -> str | None:
    """Return what is at `path` if that is no file in which lines can be kept; None: a file, or nothing."""
    if path.is_dir():
        return "a directory"
    return "a pipe or a device" if path.exists() and not path.is_file() else None


def release(lock: int, process: int) -> None:
    """Close a lock that `process` has taken. It is free then, though a fork may still have it open.

    Called in a fork it leaves the lock to the process that took it.
    """
    if process == os.getpid():
        _unlock(lock)
    os.close(lock)


if sys.platform == "win32":

    def _unlock(_lock: int) -> None: ...  # to close it is enough, and nobody forks

    def _locked(lock: int) -> bool:
        try:
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:

    def _unlock(lock: int) -> None:
        fcntl.flock(lock, fcntl.LOCK_UN)

    def _locked(lock: int) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
