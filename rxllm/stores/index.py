"""Where the rows of a large file are, by the hash of their key: 12 bytes a row, and beyond some millions on disk."""

from __future__ import annotations

import sqlite3
from array import array
from bisect import bisect_left

__all__ = ["LEAST", "MOST", "Index"]

MOST = 5_000_000  # rows kept in memory
LEAST = (
    64  # bytes of a row: so at most one begins in each stretch of so many, and a place needs no more than its number
)
FARTHEST = 1 << 31  # stretches that fit into a place, beside a bit: 128 GiB
SIGN = 1 << 63  # SQLite's integers have one


class Index:
    """Rows by the 64-bit hash of their key; the last row that was added of a key counts.

    Add rows in the order of the file, then `freeze`, then ask. In memory: 256 buckets by the first byte of the hash,
    each two sorted arrays. Beyond `most` rows, or 128 GiB, the rows are in a temporary database that SQLite removes.

    Args:
        most: rows to keep in memory, >= 1.
    """

    __slots__ = ("_buckets", "_database", "_held", "_most", "rows")

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._buckets = _empty()
        self._held = 0  # rows in the buckets
        self._database: sqlite3.Connection | None = None
        self.rows = 0  # keys, once it is frozen

    def add(self, hash: int, offset: int, *, done: bool) -> None:  # noqa: A002  what it is
        """Note a row.

        Args:
            hash: of its key, 64 bits.
            offset: where it begins, in bytes; each row is at least `LEAST` bytes after the one before.
            done: whether `find` is to find it.
        """
        stretch = offset // LEAST
        if self._held >= self._most or stretch >= FARTHEST:
            self._spill()
        if stretch >= FARTHEST:
            self._insert([(hash - SIGN, 2 * stretch + done)])
            return
        hashes, places = self._buckets[hash >> 56]
        hashes.append(hash)
        places.append(2 * stretch + done)
        self._held += 1

    def freeze(self) -> None:
        """Get ready to be asked; nothing is added any more."""
        if self._database is not None:
            self._spill()
            self.rows = self._database.execute("SELECT count(*) FROM rows").fetchone()[0]
            return
        for number, (hashes, places) in enumerate(self._buckets):
            if hashes:
                self._buckets[number] = _sorted(hashes, places)
        self.rows = sum(len(hashes) for hashes, _ in self._buckets)

    def find(self, hash: int) -> int | None:  # noqa: A002  what it is
        """Return where the last row of a key is, if it is done: the offset from which it begins within `LEAST` bytes.

        A hash is no proof: see there whether it is the key.
        """
        place = self._place(hash)
        return None if place is None or not place & 1 else place // 2 * LEAST

    def last(self, hash: int) -> int | None:  # noqa: A002  what it is
        """Return the same, done or not."""
        place = self._place(hash)
        return None if place is None else place // 2 * LEAST

    def _place(self, hash_: int) -> int | None:
        if self._database is not None:
            found = self._database.execute("SELECT place FROM rows WHERE hash = ?", (hash_ - SIGN,)).fetchone()
            return None if found is None else found[0]
        hashes, places = self._buckets[hash_ >> 56]
        at = bisect_left(hashes, hash_)
        return places[at] if at < len(hashes) and hashes[at] == hash_ else None

    def close(self) -> None:
        """Let go of the database, if there is one."""
        if self._database is not None:
            self._database.close()

    def _spill(self) -> None:
        if self._database is None:
            # A temporary file; asked on the loop after it was filled by a thread that had it to itself.
            self._database = sqlite3.connect("", isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode = OFF")
            self._database.execute("PRAGMA synchronous = OFF")
            self._database.execute("CREATE TABLE rows (hash INTEGER PRIMARY KEY, place INTEGER NOT NULL)")
        self._database.execute("BEGIN")
        for hashes, places in self._buckets:
            self._insert([(hash_ - SIGN, place) for hash_, place in zip(*_sorted(hashes, places), strict=True)])
        self._database.execute("COMMIT")
        self._buckets = _empty()
        self._held = 0

    def _insert(self, rows: list[tuple[int, int]]) -> None:
        assert self._database is not None  # noqa: S101  for the type checkers
        self._database.executemany("INSERT OR REPLACE INTO rows VALUES (?, ?)", rows)


def _empty() -> list[tuple[array[int], array[int]]]:
    return [(array("Q"), array("I")) for _ in range(256)]


def _sorted(hashes: array[int], places: array[int]) -> tuple[array[int], array[int]]:
    """Return them by hash, the last place of each."""
    rows = sorted(zip(hashes, places, strict=True))  # places grow, so the last one of equal hashes is the last row
    last = dict(rows)
    return array("Q", list(last)), array("I", list(last.values()))  # of a list an array has the exact size
