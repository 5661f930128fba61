"""A file that one process writes, line by line or as a whole, so that a kill leaves what was there or what is new."""

from __future__ import annotations

import contextlib
import errno
import os
from typing import TYPE_CHECKING

from rxllm.errors import ConfigError
from rxllm.stores.lock import BINARY, lock_beside, release

if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["StateFile", "in_use", "unusable"]


class StateFile:
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
            raise unusable(path, error) from error
        if lock is None:
            raise in_use(path)
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
            release(self._lock, self._process)
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


def unusable(path: Path, error: OSError) -> ConfigError:
    """Return the error of a file that cannot be opened or written."""
    return ConfigError(f"state {str(path)!r} cannot be used: {error}")


def in_use(path: Path) -> ConfigError:
    """Return the error of a file that somebody else has."""
    return ConfigError(
        f"state {str(path)!r} is in use by another quota, gate or process: it is for one; "
        "to share a quota give it a store instead"
    )
