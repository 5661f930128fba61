"""Answers by what was asked, in an SQLite file that processes may share.

A row is an answer: the digest of its request, its status and body, when it came and when it was last used. Readers and
the one writer at a time do not wait for each other (write-ahead log). A process that is killed leaves the file as it
was after the last commit.
"""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from rxllm.clock import wall as wall_clock
from rxllm.errors import ConfigError
from rxllm.stores.lock import other_kind

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Collection, Iterable, Mapping

__all__ = ["CacheFile", "Kept"]

VERSION = 1
APPLICATION = 0x72786C63  # "rxlc": it says in the header of the file whose it is
BUSY = 10.0  # seconds that a writer waits for those of other processes
TRIES = 100  # to open a file that other processes are just making
MEMORY = ":memory:"  # what SQLite takes for no file
PAUSE = 0.01  # seconds between two of them
OVERHEAD = 128  # bytes of a row and its places in two indexes, beside the body
LOG = 16 << 20  # bytes that are left of a log which has become larger

SCHEMA = (
    """CREATE TABLE replies (
        id INTEGER PRIMARY KEY,
        key BLOB NOT NULL UNIQUE,
        route TEXT,
        status INTEGER,
        bytes INTEGER NOT NULL,
        stored REAL NOT NULL,
        used REAL NOT NULL,
        body BLOB NOT NULL
    )""",
    "CREATE INDEX replies_used ON replies (used)",
    "CREATE TABLE size (bytes INTEGER NOT NULL)",
    "INSERT INTO size VALUES (0)",
    """CREATE TRIGGER more AFTER INSERT ON replies BEGIN
        UPDATE size SET bytes = bytes + new.bytes;
    END""",
    """CREATE TRIGGER less AFTER DELETE ON replies BEGIN
        UPDATE size SET bytes = bytes - old.bytes;
    END""",
    f"PRAGMA application_id = {APPLICATION}",
    f"PRAGMA user_version = {VERSION}",
)
FULL = frozenset(
    {sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE, sqlite3.SQLITE_IOERR_FSYNC}
)


class Kept(NamedTuple):
    """An answer."""

    route: str | None  # which of several clients it came from
    status: int | None
    body: bytes


class CacheFile:
    """The file. Its methods block; a reader and a writer may be in it at the same time, from any threads.

    Args:
        path: it is made if there is none.
        ttl: seconds for which an answer counts; None: for ever. Older ones go when they are replaced, or have to.
        most_bytes: of all answers together, with 128 bytes for each; what was not used for longest goes first.
        wall: returns the date, in seconds since 1970.

    Raises:
        ConfigError: it cannot be used, is damaged, or is another file.
        OSError: the disk is full.
    """

    __slots__ = ("_lock", "_most_bytes", "_path", "_reader", "_reading", "_ttl", "_wall", "_writer")

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        ttl: float | None,
        most_bytes: int,
        wall: Callable[[], float] = wall_clock,
    ) -> None:
        self._path = Path(path)
        self._ttl = ttl
        self._most_bytes = most_bytes
        self._wall = wall
        self._lock = threading.Lock()  # of the writer
        self._reading = threading.Lock()
        self._writer = self._opened()
        try:
            self._reader = self._connected()
        except sqlite3.Error as error:
            self._writer.close()
            raise self._problem(error) from None

    def find(self, keys: Iterable[bytes]) -> dict[bytes, Kept]:
        """Return the answers to those requests that have one.

        Raises:
            ConfigError: the file is damaged.
            OSError: it cannot be read now.
        """
        oldest = float("-inf") if self._ttl is None else self._wall() - self._ttl
        found: dict[bytes, Kept] = {}
        with self._reading:
            try:
                self._reader.execute("BEGIN")  # one look at one state of the file
                try:
                    for key in keys:
                        row = self._reader.execute(
                            "SELECT route, status, body FROM replies WHERE key = ? AND stored >= ?", (key, oldest)
                        ).fetchone()
                        if row is not None:
                            found[key] = Kept(*row)
                finally:
                    self._reader.execute("COMMIT")
            except sqlite3.Error as error:
                raise self._problem(error) from None
        return found

    def write(self, kept: Mapping[bytes, Kept], used: Collection[bytes] = ()) -> None:
        """Keep answers, and note which were used, in one go: all of it or nothing.

        Args:
            kept: digest of the request -> answer; they replace what is there.
            used: digests of those that were found.

        Raises:
            ConfigError: the file is damaged.
            OSError: the disk is full, or others write for too long.
        """
        if not kept and not used:
            return
        now = self._wall()
        touched = [(now, key) for key in used]
        rows = [
            (key, route, status, len(body) + OVERHEAD, now, now, body)
            for key, (route, status, body) in kept.items()
            if len(body) + OVERHEAD <= self._most_bytes
        ]
        with self._lock:
            connection = self._writer
            try:
                connection.execute("BEGIN IMMEDIATE")
                try:
                    connection.executemany("UPDATE replies SET used = ? WHERE key = ?", touched)
                    connection.executemany("DELETE FROM replies WHERE key = ?", [row[:1] for row in rows])
                    connection.executemany(
                        "INSERT INTO replies (key, route, status, bytes, stored, used, body)"
                        " VALUES (?, ?, ?, ?, ?, ?, ?)",
                        rows,
                    )
                    self._evict(connection)
                    connection.execute("COMMIT")
                except BaseException:
                    with contextlib.suppress(sqlite3.Error):  # some errors have done so
                        connection.execute("ROLLBACK")
                    raise
            except sqlite3.Error as error:
                raise self._problem(error) from None

    def _evict(self, connection: sqlite3.Connection) -> None:
        """Remove what was not used for longest, until the rest is small enough."""
        (size,) = connection.execute("SELECT bytes FROM size").fetchone()
        excess = size - self._most_bytes
        if excess <= 0:
            return
        gone: list[tuple[int]] = []
        for number, length in connection.execute("SELECT id, bytes FROM replies ORDER BY used, id"):
            gone.append((number,))
            excess -= length
            if excess <= 0:
                break
        connection.executemany("DELETE FROM replies WHERE id = ?", gone)

    def close(self) -> None:
        """Leave the file. Again is harmless."""
        with self._lock, self._reading:
            self._reader.close()
            self._writer.close()  # the last one: the log goes into the file

    # opening

    def _opened(self) -> sqlite3.Connection:
        kind = other_kind(self._path)
        if kind is not None or self._path.name == MEMORY:
            raise self._unusable(f"it must be a file, and is {kind or 'the memory, of which each reader has its own'}")
        if not self._path.absolute().parent.exists():
            raise self._unusable(f"there is no folder {str(self._path.parent)!r}")
        for left in reversed(range(TRIES)):
            connection: sqlite3.Connection | None = None
            try:
                connection = self._connected()
                self._prepare(connection)
            except BaseException as error:
                if connection is not None:
                    connection.close()
                if not isinstance(error, sqlite3.Error):
                    raise
                if not _is_busy(error) or not left:
                    raise self._problem(error) from None
            else:
                return connection
            time.sleep(PAUSE)  # noqa: TID251  not in the loop; turning a file to its log waits for nobody by itself
        raise AssertionError  # the last try has returned or raised

    def _connected(self) -> sqlite3.Connection:
        return sqlite3.connect(self._path, timeout=BUSY, isolation_level=None, check_same_thread=False)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        """See that the file is one of ours, or make it; nothing of another one is changed."""
        connection.execute("BEGIN")  # one look at one state of the file
        ours = self._is_ours(connection)
        connection.execute("COMMIT")
        if not ours:
            connection.execute("BEGIN IMMEDIATE")
            if not self._is_ours(connection):  # else another process was faster
                for statement in SCHEMA:
                    connection.execute(statement)
            connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")  # a machine that stops may lose the last commits, no more
        connection.execute(f"PRAGMA journal_size_limit = {LOG}")
        connection.execute("BEGIN IMMEDIATE")  # it says now if the file cannot be written
        self._evict(connection)  # the bound may be a smaller one now
        connection.execute("COMMIT")

    def _is_ours(self, connection: sqlite3.Connection) -> bool:
        """Say whether the tables are there; no: the file is empty.

        Raises:
            ConfigError: it is the file of something else, or of another version.
        """
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application == APPLICATION:
            if version != VERSION:
                raise self._unusable(f"it is of version {version}, and this rxllm reads version {VERSION}")
            return True
        if application or version or tables:
            raise self._unusable("it is the database of something else")
        return False

    # what goes wrong

    def _problem(self, error: sqlite3.Error) -> ConfigError | OSError:
        code: int = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
        if code in FULL:
            return OSError(f"cache {str(self._path)!r} cannot be written: {error}")
        kind = code & 0xFF
        if kind in {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_IOERR}:
            return OSError(f"cache {str(self._path)!r} cannot be used now: {error}")
        if kind == sqlite3.SQLITE_NOTADB:
            return self._unusable("it is no SQLite database, or a damaged one")
        if kind == sqlite3.SQLITE_CORRUPT:
            return self._unusable(f"it is damaged ({error}); remove it to begin anew")
        return self._unusable(str(error))

    def _unusable(self, reason: str) -> ConfigError:
        return ConfigError(f"cache {str(self._path)!r} cannot be used: {reason}")


def _is_busy(error: sqlite3.Error) -> bool:
    return getattr(error, "sqlite_errorcode", 0) & 0xFF == sqlite3.SQLITE_BUSY
