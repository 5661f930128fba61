"""The file of a cache: what is found, what goes first, what goes wrong, and several processes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.stores.cache import BUSY, OVERHEAD, CacheFile, Kept

PLENTY = 1 << 30


class Date:
    """A wall clock that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "cache.db"


@pytest.fixture
def date() -> Date:
    return Date()


@pytest.fixture
def file(path: Path, date: Date) -> Iterator[CacheFile]:
    file = CacheFile(path, ttl=None, most_bytes=PLENTY, wall=date)
    yield file
    file.close()


def kept(body: str) -> Kept:
    return Kept(None, 200, body.encode())


def test_what_was_written_is_found_and_nothing_else(file: CacheFile):
    one, other = Kept(None, 200, b'{"a": "\xc3\xa9"}'), Kept("route 2", None, b"")
    file.write({b"a": one, b"b": other})
    assert file.find([b"a", b"b", b"c"]) == {b"a": one, b"b": other}
    assert file.find([]) == {}


def test_it_is_there_after_a_restart(file: CacheFile, path: Path):
    file.write({b"a": kept("1")})
    assert path.with_name("cache.db-wal").exists()  # readers do not wait for writers
    file.close()
    file.close()  # again is harmless
    again = CacheFile(path, ttl=None, most_bytes=PLENTY)
    assert again.find([b"a"]) == {b"a": kept("1")}
    again.close()
    assert [entry.name for entry in path.parent.iterdir()] == ["cache.db"]  # the log has gone into it


def test_a_newer_answer_replaces_the_old_one(file: CacheFile):
    file.write({b"a": kept("1")})
    file.write({b"a": kept("longer")})
    assert file.find([b"a"]) == {b"a": kept("longer")}


def test_what_is_older_than_its_time_is_not_found_and_may_be_replaced(file: CacheFile, path: Path, date: Date):
    file.write({b"a": kept("1"), b"b": kept("2")})
    short = CacheFile(path, ttl=60.0, most_bytes=PLENTY, wall=date)
    date.now += 60.0
    assert set(short.find([b"a", b"b"])) == {b"a", b"b"}
    short.write({}, [b"a"])  # to use it does not make it younger
    date.now += 0.001
    assert short.find([b"a", b"b"]) == {}
    assert set(file.find([b"a", b"b"])) == {b"a", b"b"}  # others give it more time
    short.write({b"a": kept("3")})
    assert short.find([b"a", b"b"]) == {b"a": kept("3")}
    short.close()


def test_a_date_in_the_future_is_not_too_old(file: CacheFile, path: Path, date: Date):
    file.write({b"a": kept("1")})
    date.now -= 1_000.0  # the clock was set back
    short = CacheFile(path, ttl=60.0, most_bytes=PLENTY, wall=date)
    assert short.find([b"a"]) == {b"a": kept("1")}
    short.close()


# the bound


class Model:
    """What a cache of a bounded size keeps, in the order of use."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.bodies: OrderedDict[bytes, int] = OrderedDict()

    def write(self, key: bytes, size: int) -> None:
        if size + OVERHEAD > self.most:
            return
        self.bodies[key] = size
        self.bodies.move_to_end(key)
        while sum(size + OVERHEAD for size in self.bodies.values()) > self.most:
            self.bodies.popitem(last=False)

    def use(self, key: bytes) -> None:
        if key in self.bodies:
            self.bodies.move_to_end(key)


keys = st.integers(0, 9).map(lambda n: b"%d" % n)
steps = st.lists(st.one_of(st.tuples(keys, st.integers(0, 600)), keys), max_size=40)


@settings(max_examples=12, deadline=None)
@given(steps=steps, most=st.integers(1, 2_500))
@example(steps=[(b"0", 500), (b"1", 500), b"0", (b"2", 500)], most=1_300)
def test_what_was_not_used_for_longest_goes_first(
    tmp_path_factory: pytest.TempPathFactory, steps: list[Any], most: int
):
    date, model = Date(), Model(most)
    file = CacheFile(tmp_path_factory.mktemp("lru") / "cache.db", ttl=None, most_bytes=most, wall=date)
    for step in steps:
        date.now += 1.0
        if isinstance(step, tuple):
            key, size = step
            file.write({key: Kept(None, 200, b"x" * size)})
            model.write(key, size)
        else:
            file.write({}, [step])
            model.use(step)
        found = file.find([b"%d" % n for n in range(10)])
        assert {key: len(answer.body) for key, answer in found.items()} == dict(model.bodies)
    file.close()


def test_a_smaller_bound_holds_from_the_start(file: CacheFile, path: Path):
    file.write({b"%d" % n: kept("x" * 1_000) for n in range(100)})
    small = CacheFile(path, ttl=None, most_bytes=10_000)
    assert len(small.find([b"%d" % n for n in range(100)])) == 10_000 // (1_000 + OVERHEAD)
    small.close()


def test_the_file_is_hardly_larger_than_its_bound(path: Path):
    file = CacheFile(path, ttl=None, most_bytes=1_000_000)
    for turn in range(30):
        file.write({b"%d-%d" % (turn, n): Kept(None, 200, b"x" * 900) for n in range(100)})
    file.close()
    assert path.stat().st_size < 1_400_000  # of 3,000,000 that were written


# what goes wrong


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"this is a text and not a database at all\n" * 30, "no SQLite database"),
        (b"SQLite format 3\0" + b"\xff" * 4_080, "cannot be used"),
    ],
    ids=["a-text", "a-broken-header"],
)
def test_another_file_is_an_error_that_names_it_and_stays_as_it_is(path: Path, content: bytes, message: str):
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"cache '.*cache.db' .*{message}"):
        CacheFile(path, ttl=None, most_bytes=PLENTY)
    assert path.read_bytes() == content


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("CREATE TABLE accounts (id)", "the database of something else"),
        ("PRAGMA application_id = 7", "the database of something else"),
        ("PRAGMA user_version = 3", "the database of something else"),
    ],
    ids=["tables", "application", "version"],
)
def test_the_database_of_another_program_is_left_alone(path: Path, statement: str, message: str):
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=message):
        CacheFile(path, ttl=None, most_bytes=PLENTY)
    assert path.read_bytes() == before


def test_a_file_of_another_version_is_an_error_that_names_both(file: CacheFile, path: Path):
    file.close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(ConfigError, match="it is of version 2, and this rxllm reads version 1"):
        CacheFile(path, ttl=None, most_bytes=PLENTY)


def test_a_place_where_no_file_can_be_is_an_error(tmp_path: Path):
    with pytest.raises(ConfigError, match="must be a file, and is a directory"):
        CacheFile(tmp_path, ttl=None, most_bytes=PLENTY)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (os.devnull, "must be a file, and is a pipe or a device"),
        (":memory:", "must be a file, and is the memory"),
        ("none/cache.db", "there is no folder 'none'"),
    ],
    ids=["a-device", "memory", "no-folder"],
)
def test_what_can_be_no_cache_is_refused_and_left_as_it_is(
    name: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=f"cannot be used: .*{says}"):
        CacheFile(Path(name), ttl=None, most_bytes=PLENTY)
    assert not list(tmp_path.iterdir())


def damage(path: Path) -> None:
    """Overwrite the second half of a file: the tables are there, and what they have is not."""
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2)
        file.write(b"\xa5" * (size - size // 2))


def test_damage_is_an_error_when_it_is_met(file: CacheFile, path: Path):
    numbers = [b"%04d" % n for n in range(500)]
    file.write({key: kept("x" * 500) for key in numbers})
    file.close()
    damage(path)
    with (
        pytest.raises(ConfigError, match="cache '.*cache.db' cannot be used: it is damaged .* remove it"),
        contextlib.closing(CacheFile(path, ttl=None, most_bytes=PLENTY)) as damaged,
    ):
        damaged.find(numbers)


def test_a_full_disk_is_an_error_of_the_system_and_nothing_is_half_written(file: CacheFile, path: Path):
    file.write({b"a": kept("1")})
    (pages,) = file._writer.execute("PRAGMA page_count").fetchone()
    file._writer.execute(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(OSError, match="cache.db' cannot be written: database or disk is full"):
        file.write({b"b": kept("2"), b"c": kept("x" * 100_000)})
    assert set(file.find([b"a", b"b", b"c"])) == {b"a"}
    file.write({b"d": kept("3")})  # what has room is written again
    assert set(file.find([b"a", b"d"])) == {b"a", b"d"}


def test_a_writer_waits_for_another_one_only_so_long(file: CacheFile, path: Path):
    file._writer.execute("PRAGMA busy_timeout = 10")
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(OSError, match="cache.db' cannot be used now: database is locked"):
        file.write({b"a": kept("1")})
    assert file.find([b"a"]) == {}  # a reader does not wait
    other.execute("ROLLBACK")
    other.close()
    file.write({b"a": kept("1")})
    assert file.find([b"a"]) == {b"a": kept("1")}
    assert BUSY >= 1.0


# several processes


# Opens a file that the others just make, writes to it, and reads what it wrote.
WORK = """
import sys
from rxllm.stores.cache import CacheFile, Kept
path, number = sys.argv[1:]
sys.stdin.readline()
file = CacheFile(path, ttl=None, most_bytes=200_000)
for turn in range(30):
    texts = [f"{number} {n}" for n in range(turn, turn + 5)]
    file.write({text.encode(): Kept(None, 200, text.encode()) for text in texts})
    file.write({b"shared %d" % turn: Kept(None, 200, number.encode())}, [b"0 0", b"1 1"])
print(len(file.find([f"{number} {n}".encode() for n in range(34)])))
file.close()
"""


def test_several_processes_make_and_fill_one_file_together(path: Path):
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORK, str(path), str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(3)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert [process.communicate(timeout=50) for process in processes] == [("34\n", "")] * 3
    file = CacheFile(path, ttl=None, most_bytes=200_000)
    everything = [b"%d %d" % (number, n) for number in range(3) for n in range(34)]
    assert file.find(everything) == {key: kept(key.decode()) for key in everything}
    assert len(file.find([b"shared %d" % turn for turn in range(30)])) == 30
    (size,) = file._writer.execute("SELECT bytes FROM size").fetchone()
    (total,) = file._writer.execute("SELECT sum(length(body)) + count(*) * ? FROM replies", (OVERHEAD,)).fetchone()
    assert size == total
    file.close()
