"""The file of a journal: opened where the last run left it, read by key, written a turn at a time."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import msgspec

from rxllm.errors import ConfigError
from rxllm.stores.index import LEAST, Index
from rxllm.stores.lock import BINARY, lock_beside, other_kind, release
from rxllm.stores.rows import hash_of, hash_of_name, is_torn, mark_of, name_of, prefix_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rxllm.clock import Clock, Handle

__all__ = ["Compacted", "JournalFile", "Syncing", "compact"]

BUFFER = 32_768  # bytes read at a time: replies come back in about the order in which they were asked for
BEHIND = 1_000  # rows after which the disk is asked to have them
SOON = 1.0  # seconds after which it is, whatever their number
SOME = 4_096  # lines after which it is asked whether to go on
HEAD = 64  # bytes by which it is seen that a file is of something else
BOM = b"\xef\xbb\xbf"
BLANK = b"\0 \t\r\n"  # zero bytes: of a disk that lost power

_log = logging.getLogger("rxllm.stores.journal")


class JournalFile:
    """A journal that is open, and nobody else's.

    A row that a killed process has left torn at its end is cut off; nothing else ever is.

    Args:
        path: the file; made if there is none.
        retry_failed: failed rows do not count as done.
        wanted: says now and then whether to go on; if not, an `InterruptedError` ends it.

    Raises:
        ConfigError: it cannot be used, is in use, or is no journal of this version; the message says where.
    """

    __slots__ = ("_file", "_index", "_lock", "_process", "_reader", "_torn", "path", "size")

    def __init__(self, path: Path, *, retry_failed: bool = False, wanted: Callable[[], bool] = lambda: True) -> None:
        self.path = Path(os.path.realpath(path))  # a link to it stays one, and the folder may change
        self.size = 0  # bytes, all whole lines
        self._torn = False  # there may be more, which could not be taken back
        self._index = Index()
        self._file = self._lock = -1
        self._process = os.getpid()
        self._reader: BinaryIO | None = None
        try:
            self._open(wanted, retry_failed=retry_failed)
        except OSError as error:
            self.close()
            raise _unusable(self.path, error) from None
        except BaseException:
            self.close()
            raise

    def _open(self, wanted: Callable[[], bool], *, retry_failed: bool) -> None:
        path = self.path
        kind = other_kind(path)
        if kind is not None:
            msg = f"journal {str(path)!r} must be a file, and is {kind}"
            raise ConfigError(msg)
        self._lock = _locked(path)
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | BINARY, 0o666)
        self._reader = path.open("rb", buffering=BUFFER)
        end = b""
        for number, offset, line, mark in _marked(path, self._reader):
            if mark is None:  # torn
                _log.warning("journal %s: its last line was torn, %d bytes of it are cut off", path, len(line))
                break
            if not number % SOME and not wanted():
                raise InterruptedError
            done = not mark.rxllm.again and (mark.rxllm.ok or not retry_failed)
            try:
                hash_ = hash_of(mark.rxllm.key)
            except ValueError:
                raise _damaged(path, number, f"{mark.rxllm.key!r} is no key") from None
            self._index.add(hash_, offset, done=done)
            self.size = offset + len(line)
            end = line
        self._index.freeze()
        os.ftruncate(self._file, self.size)
        if end and not end.endswith(b"\n"):  # an editor's
            self.append(b"\n")

    def __len__(self) -> int:
        """Return how many keys it had when it was opened."""
        return self._index.rows

    def find(self, key: str) -> bytes | None:
        """Return the last line of a key that was there when the file was opened, if it is done."""
        if not self._index.rows:
            return None
        near = self._index.find(hash_of(key))
        if near is None or self._reader is None:
            return None
        line = _line_near(self._reader, near)
        return line if line.startswith(prefix_of(key)) or mark_of(line).rxllm.key == key else None

    def append(self, data: bytes) -> None:
        """Write whole lines at the end, in one go, all or none.

        Raises:
            OSError: the file ends as it did, or will when there is something to write again.
        """
        if self._torn:
            os.ftruncate(self._file, self.size)
            self._torn = False
        written = 0
        try:
            written = os.write(self._file, data)
            while written < len(data):  # a limit of the disk, or of the system for one write
                more = os.write(self._file, data[written:])
                if not more:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))  # noqa: TRY301  as the system says it
                written += more
        except OSError:
            if written:
                self._torn = True
                with contextlib.suppress(OSError):
                    os.ftruncate(self._file, self.size)
                    self._torn = False
            raise
        self.size += written

    def twin(self) -> int:
        """Return another descriptor of the same file, for a thread that closes it."""
        return os.dup(self._file)

    def close(self) -> None:
        """Leave it to others. Again is harmless."""
        if self._torn:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.size)
            self._torn = False
        self._index.close()
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        if self._file >= 0:
            os.close(self._file)
        if self._lock >= 0:
            release(self._lock, self._process)
        self._file = self._lock = -1


class Syncing:
    """Has the disk keep what was written: at most 1 s, or 1,000 rows, after that a thread sees to it.

    A disk that takes longer is asked again when it is ready.

    Args:
        file: what was written.
        clock: of the loop that writes; one thread at a time is busy.
        failed: called on that loop with the error of a disk that did not keep it.
    """

    __slots__ = ("_busy", "_clock", "_failed", "_file", "_rows", "_timer")

    def __init__(self, file: JournalFile, clock: Clock, failed: Callable[[OSError], object]) -> None:
        self._file = file
        self._clock = clock
        self._failed = failed
        self._rows = 0  # written, and not known to be on the disk
        self._busy = False
        self._timer: Handle | None = None

    def wrote(self, rows: int) -> None:
        """Count what was written."""
        self._rows += rows
        if self._rows >= BEHIND and not self._busy:
            self._sync()
        elif self._timer is None:
            self._timer = self._clock.call_later(SOON, self._sync)

    def _sync(self) -> None:
        self._cancel()
        if self._busy or not self._rows:
            return
        self._busy, self._rows = True, 0
        self._begin(self._synced)

    def _begin(self, after: Callable[[OSError | None], object]) -> None:
        twin, path, clock = self._file.twin(), self._file.path, self._clock
        if not clock.threads:
            after(_synced(twin, path))
            return

        def run() -> None:
            error = _synced(twin, path)
            clock.post(lambda: after(error))

        try:
            # No daemon: what was written before the process ended by itself is on the disk, too.
            threading.Thread(target=run, name="rxllm journal").start()
        except RuntimeError:  # the interpreter ends, and starts no thread any more
            after(_synced(twin, path))

    def _synced(self, error: OSError | None) -> None:
        self._busy = False
        if error is not None:
            self._failed(error)
        elif self._rows >= BEHIND or self._timer is None:  # the second was over meanwhile
            self._sync()

    def close(self) -> None:
        """See to what is left; the file may be closed at once."""
        self._cancel()
        if self._rows:
            self._rows = 0
            self._begin(self._late)

    def _late(self, error: OSError | None) -> None:
        if error is not None:
            _log.warning("the journal %s may not be on the disk: %s", self._file.path, error)

    def _cancel(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None


def _synced(descriptor: int, path: Path) -> OSError | None:
    """Have the disk keep a file, and close it; return why not, also if it is not the one at its path any more."""
    try:
        os.fsync(descriptor)
        ours, there = os.fstat(descriptor), path.stat()
    except FileNotFoundError:
        return OSError(errno.ENOENT, "somebody has removed it")
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # a file system without
            return error
        return None
    finally:
        os.close(descriptor)
    if (ours.st_dev, ours.st_ino) != (there.st_dev, there.st_ino):
        return OSError(errno.ESTALE, "somebody has replaced it")
    return None


class Compacted(msgspec.Struct, frozen=True, kw_only=True):
    """What `compact` did."""

    rows: int  # lines that are left: one for each key
    dropped: int  # lines that a later one had replaced
    before: int  # bytes
    after: int  # bytes


def compact(path: str | os.PathLike[str], *, by_id: bool = False) -> Compacted:
    """Write a journal anew with one line for each key, its last one. Who is killed on the way leaves the old file.

    Args:
        path: the file.
        by_id: leave one line for each id, its last one: those of prompts that have been changed since, or were asked of
            another model, go as well.

    Raises:
        ConfigError: there is none, it is in use, it is no journal of this version, or the disk is full.
    """
    whole = Path(os.path.realpath(path))
    if not whole.is_file():
        msg = f"journal {str(whole)!r} must be a file, and there is none"
        raise ConfigError(msg)
    try:
        lock = _locked(whole)
    except OSError as error:
        raise _unusable(whole, error) from None
    beside = whole.with_name(f"{whole.name}.new")
    try:
        with whole.open("rb", buffering=BUFFER) as file, whole.open("rb", buffering=BUFFER) as again:
            result = _copy(whole, file, again, beside, by_id=by_id)
        shutil.copymode(whole, beside)
        beside.replace(whole)  # Windows replaces no file that is open
        _sync_folder(whole.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise _unusable(whole, error) from None
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    finally:
        release(lock, os.getpid())
    return result


def _copy(path: Path, file: BinaryIO, again: BinaryIO, beside: Path, *, by_id: bool) -> Compacted:
    """Copy the last line of each name of `file` to the file `beside`; `again` is the same file once more."""
    index = Index()
    try:
        for number, offset, line, mark in _marked(path, file):
            if mark is not None:
                try:
                    index.add(hash_of_name(name_of(line, mark, by_id=by_id)), offset, done=True)
                except ValueError:
                    raise _damaged(path, number, f"{mark.rxllm.key!r} is no key") from None
        index.freeze()
        rows = dropped = 0
        before = file.seek(0, os.SEEK_END)
        file.seek(0)
        with open(beside, "wb", opener=_private) as new:
            for _number, offset, line, mark in _marked(path, file):
                if mark is None:
                    continue
                name = name_of(line, mark, by_id=by_id)
                near = index.find(hash_of_name(name))
                if near is not None and near // LEAST != offset // LEAST:
                    last = _line_near(again, near)
                    if name_of(last, mark_of(last), by_id=by_id) == name:  # else two names of one hash
                        dropped += 1
                        continue
                rows += 1
                new.write(line if line.endswith(b"\n") else line + b"\n")
            after = new.tell()
            new.flush()
            os.fsync(new.fileno())
    finally:
        index.close()
    return Compacted(rows=rows, dropped=dropped, before=before, after=after)


def _private(path: str, flags: int) -> int:
    """Open a file that nobody else may read: the answers in it may be confidential."""
    return os.open(path, flags | BINARY, 0o600)


def _marked(path: Path, file: BinaryIO) -> Iterator[tuple[int, int, bytes, Any]]:
    """Yield number, offset, line and mark of each line; a last line that is torn has no mark.

    Raises:
        ConfigError: a line is none of a journal.
    """
    head = file.read(HEAD)  # before a line of it is looked for, which may be all of it
    if head.startswith(BOM):
        raise _damaged(path, 1, "it begins with a byte order mark")
    if head.strip(BLANK)[:1] not in {b"", b"{"}:
        raise _damaged(path, 1, "it begins with no object of JSON")
    file.seek(0)
    offset = 0
    for number, line in enumerate(file, 1):
        try:
            mark = mark_of(line)
        except ValueError as wrong:
            if not line.endswith(b"\n") and is_torn(line):
                yield number, offset, line, None
                return
            if line.strip():
                raise _damaged(path, number, str(wrong)) from None
        else:
            yield number, offset, line, mark
        offset += len(line)


def _line_near(file: BinaryIO, near: int) -> bytes:
    """Return the first line that begins at `near` or after it."""
    if near:
        file.seek(near - 1)
        file.readline()
    else:
        file.seek(0)
    line = file.readline()
    while line.isspace():  # an empty one, of an editor
        line = file.readline()
    return line


def _sync_folder(folder: Path) -> None:
    """Have the disk keep the name of a file, where a folder can be opened."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _locked(path: Path) -> int:
    lock = lock_beside(path)
    if lock is None:
        msg = f"journal {str(path)!r} is in use by another run or process: it is for one at a time"
        raise ConfigError(msg)
    return lock


def _damaged(path: Path, number: int, reason: str) -> ConfigError:
    return ConfigError(
        f"journal {str(path)!r}, line {number}: {reason}. It is left as it is: give another path, or mend that line"
    )


def _unusable(path: Path, error: OSError) -> ConfigError:
    reason = error.strerror or str(error)
    if isinstance(error, FileNotFoundError) and not path.parent.exists():
        reason = f"there is no folder {str(path.parent)!r}"
    return ConfigError(f"journal {str(path)!r} cannot be used: {reason}")
