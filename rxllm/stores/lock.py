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

__all__ = ["BINARY", "lock_beside"]

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


if sys.platform == "win32":

    def _locked(lock: int) -> bool:
        try:
            msvcrt.locking(lock, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:

    def _locked(lock: int) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
