"""A quota in a file: what a run has booked, the next one counts."""

import asyncio
import contextlib
import gc
import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm.clock import Clock, loop_clock
from rxllm.clock import wall as wall_clock
from rxllm.errors import ConfigError
from rxllm.events import StoreChanged
from rxllm.gate import Gate, Lease
from rxllm.policies.meters import LocalMeter, meter
from rxllm.policies.quota import ChargedAt, Quota, Strategy
from rxllm.stores import state as module
from rxllm.stores.state import KeptMeter, kept_meter
from rxllm.stores.state_file import StateFile
from rxllm.testing import VirtualScheduler

LIMIT, PER = 16, 8.0
DATE = 1_755_780_000.0
HERE = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}  # for child processes
STRATEGIES: tuple[Strategy, ...] = ("sliding", "fixed", "bucket")


def ignore(*_: object) -> None:
    """Hear nothing."""


class Machine:
    """A machine with a steady clock and a wall clock, and the runs on it."""

    def __init__(self, path: Path, strategy: Strategy = "sliding", charged_at: ChargedAt = "start") -> None:
        self.quota = Quota(
            LIMIT, per=PER, unit="tokens", strategy=strategy, margin=0.5, charged_at=charged_at, state=path
        )
        self.path = path
        self.clock = VirtualScheduler()
        self.boots = 1
        self.has_name = True
        self.before = 0.0  # true seconds before this boot
        self.ahead = 0.0  # how much the wall clock is
        self.told: list[StoreChanged] = []
        self.meter = self.open()

    @property
    def true(self) -> float:
        return self.before + self.clock.seconds()

    @property
    def now(self) -> float:
        return self.clock.seconds()

    def wall(self) -> float:
        return DATE + self.true + self.ahead

    def open(self, quota: Quota | None = None) -> KeptMeter:
        boot = f"boot-{self.boots}" if self.has_name else ""
        opened = KeptMeter(quota or self.quota, wall=self.wall, boot=boot)
        opened.bind(self.clock, wake=ignore, fail=ignore, tell=self.told.append)
        return opened

    def settle_down(self) -> None:
        """Let the turn end."""
        self.clock.run(self.now)

    def kill(self) -> None:
        """End the run as -9 does: the system closes its files."""
        assert self.meter._file is not None
        self.meter._cancel()
        self.meter._file.close()
        self.meter._file = None

    def restart(self, *, boot: bool = False, after: float = 0.0) -> None:
        if boot:
            self.before, self.boots = self.true + after, self.boots + 1
            self.clock = VirtualScheduler()
        else:
            self.clock.run(self.now + after)
        self.meter = self.open()


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    made = Machine(tmp_path / "quota.state")
    yield made
    made.meter.close()


span = st.sampled_from([0.0, 1 / 1024, 1 / 16, 0.5, 1.0, 3.0, 8.0])
actions = st.one_of(
    st.tuples(st.just("wait"), span),
    st.tuples(st.just("book"), st.integers(0, LIMIT)),
    st.tuples(st.just("settle"), st.integers(0, LIMIT)),
    st.tuples(st.just("state"), st.just(0)),
    st.tuples(st.just("step"), st.sampled_from([-1e6, -5.0, -0.5, 0.5, 5.0, 1e6])),
    st.tuples(st.just("restart"), span),
    st.tuples(st.just("torn"), span),
    st.tuples(st.just("killed"), span),
    st.tuples(st.just("boot"), span),
)


@pytest.mark.parametrize("charged_at", ["start", "end"])
@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=150, deadline=None)
@given(st.lists(actions, max_size=30), st.booleans())
def test_after_a_restart_as_much_fits_as_without_it_and_with_a_clock_set_back_never_more(  # noqa: C901, PLR0912 - one story
    strategy: Strategy, charged_at: ChargedAt, steps: list[tuple[str, float]], boots: bool
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = Machine(Path(folder) / "quota.state", strategy, charged_at)
        whole: LocalMeter = meter(run.quota)  # one that never stops, in true time
        open_: list[tuple[tuple[int, float], tuple[int, float]]] = []
        exact = True
        for action, value in steps:
            kept, now, true = run.meter, run.now, run.true
            if action == "wait":
                run.clock.advance(value)
            elif action == "book":
                open_.append((kept.book(value, now), whole.book(value, true)))
            elif action == "settle" and open_:
                mine, theirs = open_.pop(int(value) % len(open_))
                kept.settle(mine, value, now)
                whole.settle(theirs, value, true)
            elif action == "state" and strategy == "fixed":
                reset = PER - (true + 1 / 32) % PER  # never whole seconds
                kept.rebase(LIMIT, reset, now, sent=now)
                whole.rebase(LIMIT, reset, true, sent=true)
            elif action == "step" and (value < 0 or not boots):
                run.ahead += value
                exact = exact and not boots
            elif action in {"restart", "torn", "killed"} or (action == "boot" and boots):
                run.settle_down()
                if action == "restart":
                    run.meter.close()
                else:
                    run.kill()
                if action == "torn":
                    with run.path.open("ab") as file:
                        file.write(run.path.read_bytes().split(b"\n")[-2][: 1 + int(value * 7)])
                if action == "boot" and strategy == "fixed":
                    exact = False  # the edge is forgotten
                run.restart(boot=action == "boot", after=value)
                if charged_at == "end":  # what was on the wire may have ended just now
                    for _, ticket in open_:
                        whole.settle(ticket, ticket[1], run.true)
                open_.clear()
            run.settle_down()
            for later in (0.0, 1.0, 4.0, PER):
                fits, free = run.meter.available(run.now + later), whole.available(run.true + later)
                assert fits <= free + 1e-6
                assert not exact or fits == pytest.approx(free, abs=1e-6)
        run.meter.close()


def test_bookings_of_a_turn_are_one_line_and_one_write(machine: Machine) -> None:
    before = machine.path.read_bytes()
    first = machine.meter.book(5, 0.0)
    machine.meter.book(3, 0.0)
    machine.meter.settle(first, 2, 0.0)
    assert machine.path.read_bytes() == before
    assert machine.clock.pending == 1
    machine.settle_down()
    after = machine.path.read_bytes()
    assert after.startswith(before)
    (line,) = after[len(before) :].splitlines()
    now, date, ((slot, at, amount, _),) = json.loads(line)
    assert (now, date, slot, at, amount) == (0.0, DATE, 0, 0.0, 5.0)
    assert machine.clock.pending == 0


def test_a_settlement_counts_for_the_time_of_its_booking_and_a_debt_for_now(machine: Machine) -> None:
    low, high = machine.meter.book(5, 0.0), machine.meter.book(5, 0.0)
    machine.clock.advance(2.0)
    machine.meter.settle(low, 1, 2.0)
    machine.meter.settle(high, 8, 2.0)
    machine.settle_down()
    machine.kill()
    machine.restart()
    assert machine.meter.booked(2.0) == 9
    assert machine.meter.available(8.5) == LIMIT - 3
    assert machine.meter.available(10.5) == LIMIT


def test_what_expired_while_nobody_ran_is_free(machine: Machine) -> None:
    machine.meter.book(LIMIT, 0.0)
    machine.settle_down()
    machine.kill()
    machine.restart(after=8.0)
    assert machine.meter.available(8.0) == 0
    assert machine.meter.next_expiry(8.0) == 8.5
    machine.kill()
    machine.restart(boot=True, after=0.5)
    assert machine.meter.available(0.0) == LIMIT


@pytest.mark.parametrize(("ahead", "free"), [(0.0, 5.5), (-3.0, 8.5), (-1e9, 8.5), (2.0, 3.5)])
def test_on_another_boot_the_wall_clock_tells_the_age_and_a_date_to_come_is_now(
    machine: Machine, ahead: float, free: float
) -> None:
    machine.meter.book(LIMIT, 0.0)
    machine.settle_down()
    machine.kill()
    machine.ahead = ahead
    machine.restart(boot=True, after=3.0)
    assert machine.meter.ready_at(LIMIT, 0.0) == free


def test_on_the_same_boot_the_wall_clock_does_not_matter(machine: Machine) -> None:
    machine.meter.book(LIMIT, 0.0)
    machine.settle_down()
    for ahead in (1e9, -1e9):
        machine.ahead = ahead
        machine.kill()
        machine.restart(after=1.0)
        assert machine.meter.ready_at(LIMIT, machine.now) == 8.5


def test_where_the_starts_of_a_machine_have_no_name_the_wall_clock_tells_the_age(machine: Machine) -> None:
    machine.has_name = False
    machine.kill()
    machine.restart()
    machine.meter.book(LIMIT, 0.0)
    machine.settle_down()
    machine.kill()
    machine.ahead = -2.0
    machine.restart(after=3.0)
    assert machine.meter.ready_at(LIMIT, 3.0) == 10.5


def test_a_boot_whose_clock_is_behind_the_file_is_another_one(machine: Machine) -> None:
    machine.clock.advance(100.0)
    machine.meter.book(LIMIT, 100.0)
    machine.settle_down()
    machine.kill()
    machine.clock = VirtualScheduler()
    machine.before = 103.0
    machine.meter = machine.open()
    assert machine.meter.ready_at(LIMIT, 0.0) == 5.5


def test_a_line_that_is_torn_is_cut_wherever_it_is_torn(machine: Machine) -> None:
    machine.meter.book(3, 0.0)
    machine.settle_down()
    whole = machine.path.read_bytes()
    machine.meter.book(4, 0.0)
    machine.settle_down()
    machine.kill()
    longer = machine.path.read_bytes()
    for end in range(len(whole), len(longer)):
        machine.path.write_bytes(longer[:end])
        machine.restart()
        assert machine.meter.booked(0.0) == 3
        machine.kill()
    machine.path.write_bytes(longer)
    machine.restart()
    assert machine.meter.booked(0.0) == 7


def test_an_empty_file_is_a_new_one(machine: Machine) -> None:
    machine.kill()
    head = machine.path.read_bytes().split(b"\n")[0]
    for content in (b"", head, head + b"\n"):
        machine.path.write_bytes(content)
        machine.restart()
        assert machine.meter.available(0.0) == LIMIT
        machine.kill()


def test_a_file_that_has_grown_is_written_anew_and_says_the_same(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SLACK", 1000)
    machine.kill()
    machine.restart()
    sizes: list[int] = []
    for n in range(400):
        machine.meter.refund(machine.meter.book(1, machine.now), machine.now)
        machine.clock.advance(1 / 16)
        sizes.append(machine.path.stat().st_size)
        if n % 50 == 0:
            machine.meter.book(1, machine.now)
    booked = machine.meter.booked(machine.now)
    assert max(sizes) < 150_000  # 136 slots of 60 bytes are live, and eight times as much may lie there
    assert any(later < earlier for earlier, later in itertools.pairwise(sizes))
    assert not list(machine.path.parent.glob("*.new"))
    machine.settle_down()
    machine.kill()
    machine.restart()
    assert machine.meter.booked(machine.now) == booked == 2


def test_close_leaves_what_is_live_in_a_file_that_another_run_may_open(machine: Machine) -> None:
    ticket = machine.meter.book(4, 0.0)
    machine.meter.close()
    machine.meter.close()
    assert machine.clock.pending == 0
    assert len(machine.path.read_bytes().splitlines()) == 2
    other = machine.open()
    assert other.booked(0.0) == 4
    machine.meter.settle(ticket, 1, 0.0)  # too late for the file
    assert machine.meter.booked(0.0) == 1
    assert machine.clock.pending == 0
    other.close()


def test_a_meter_that_is_forgotten_leaves_its_file(machine: Machine) -> None:
    machine.settle_down()
    machine.meter = None  # type: ignore[assignment]
    machine.meter = machine.open()


def test_a_second_one_is_refused_and_told_what_shares_a_quota(machine: Machine) -> None:
    with pytest.raises(
        ConfigError, match="quota.state' is in use by another quota, gate or process: .* give it a store"
    ):
        machine.open()
    machine.meter.book(1, 0.0)
    machine.settle_down()  # the first goes on
    assert machine.path.read_bytes().count(b"\n") == 3


CHILD = """
import sys
from rxllm.policies.quota import Quota
from rxllm.stores.state import kept_meter
from rxllm.testing import VirtualScheduler

meter = kept_meter(Quota(16, per=8.0, unit="tokens", state=sys.argv[1]))
try:
    meter.bind(VirtualScheduler(), wake=print, fail=print, tell=print)
except Exception as error:
    print(type(error).__name__, error)
"""


def test_a_second_process_is_refused(machine: Machine) -> None:
    child = subprocess.run(
        [sys.executable, "-c", CHILD, str(machine.path)],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
        env=HERE,
    )
    assert child.stdout.startswith(
        f"ConfigError state {str(machine.path)!r} is in use by another quota, gate or process"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_of_the_process_writes_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.meter.book(4, 0.0)
    machine.settle_down()
    before = machine.path.read_bytes()
    pid = os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: pid + 1)
    with pytest.raises(ConfigError, match="in use by another quota, gate or process"):
        machine.meter.bind(VirtualScheduler(), wake=ignore, fail=ignore, tell=ignore)
    machine.meter.close()
    assert machine.path.read_bytes() == before


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"per": 60.0}, "16 tokens per 60 seconds"),
        ({"unit": "usd"}, "16 usd per 8 seconds"),
        ({"strategy": "bucket"}, r"16 tokens per 8 seconds \(bucket\)"),
    ],
    ids=["other-seconds", "another-unit", "another-strategy"],
)
def test_the_file_of_another_quota_is_refused_and_both_are_named(
    machine: Machine, other: dict[str, object], named: str
) -> None:
    machine.kill()
    before = machine.path.read_bytes()
    quota = Quota(**{"limit": LIMIT, "per": PER, "unit": "tokens", "state": machine.path, **other})
    ours = r"16 tokens per 8 seconds \(sliding\)"
    with pytest.raises(ConfigError, match=rf"quota.state' is that of the quota {ours}, and not of {named}"):
        machine.open(quota)
    assert machine.path.read_bytes() == before
    machine.meter = machine.open()  # the refused one has left it


def test_another_limit_takes_over_what_is_booked(machine: Machine) -> None:
    machine.meter.book(10, 0.0)
    machine.meter.close()
    machine.meter = machine.open(Quota(12, per=PER, unit="tokens", margin=0.5, state=machine.path))
    assert machine.meter.available(0.0) == 2
    assert machine.meter.limit == 12
    assert machine.meter.too_large(13)


HEAD = b'{"rxllm":"quota","version":1,"limit":16.0,"per":8.0,"unit":"tokens","strategy":"sliding","boot":""}\n'


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"Dear diary,\n", "is not the state file of a quota"),
        (b"\xff\x00\n", "is not the state file of a quota"),
        (b"[]", "is not the state file of a quota"),
        (b'{"rxllm":"journal","version":1}\n', "is not the state file of a quota"),
        (HEAD.replace(b'n":1', b'n":2'), "is of version 2, and this rxllm reads up to 1"),
        (HEAD.replace(b'"per"', b'"pre"'), "is damaged in line 1: .*`per`"),
        (HEAD + b"[0,0,[]]\n[0,0\n[0,0,[]]\n", "is damaged in line 3: .*remove it to begin anew"),
        (HEAD + b'[0,0,[["x",0,0,0]]]\n', "is damaged in line 2"),
    ],
    ids=["a-text", "bytes", "an-array", "a-journal", "a-newer-version", "a-head", "the-middle", "a-type"],
)
def test_what_is_no_state_file_is_refused_and_left_as_it_is(machine: Machine, content: bytes, message: str) -> None:
    machine.kill()
    machine.path.write_bytes(content)
    with pytest.raises(ConfigError, match=f"state '.*quota.state' {message}"):
        machine.restart()
    assert machine.path.read_bytes() == content


def test_a_place_where_no_file_can_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    for path, message in (
        ("folder", "must be a file, and is a directory"),
        ("missing/quota", "cannot be used: .*No such file or directory"),
        ("file/quota", "cannot be used: .*Not a directory"),
    ):
        with pytest.raises(ConfigError, match=f"state '{tmp_path / path}' {message}"):
            Machine(tmp_path / path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="who is root may all")
def test_a_folder_without_permission_is_named(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ConfigError, match="cannot be used: .*Permission denied"):
        Machine(tmp_path / "quota.state")


def test_a_link_stays_a_link_and_another_folder_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real" / "quota")
    monkeypatch.chdir(tmp_path)
    machine = Machine(Path("link"))
    monkeypatch.chdir("/")
    machine.meter.book(1, 0.0)
    machine.meter.close()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "quota").read_bytes().count(b"\n") == 2


@contextlib.contextmanager
def room_for(size_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond that, as on a disk that is full."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_while_the_disk_is_full_the_run_goes_on_and_the_file_ends_with_a_line(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.meter.book(1, 0.0)
    machine.settle_down()
    before = machine.path.read_bytes()
    with caplog.at_level(logging.INFO, "rxllm.stores.state"):
        with room_for(len(before) + 10):  # the first write is a short one, and the next has no room at all
            for _ in range(3):
                machine.meter.book(1, machine.now)
                machine.clock.advance(2.0)
                assert machine.path.read_bytes() == before
        assert machine.meter.available(machine.now) == LIMIT - 4
        machine.meter.book(1, machine.now)
        machine.settle_down()
        machine.meter.book(1, machine.now)
        machine.settle_down()
    warning, again = caplog.records
    assert warning.levelname == "WARNING"
    assert str(machine.path) in warning.getMessage()
    assert again.levelname == "INFO"
    assert [event.reachable for event in machine.told] == [False, True]
    machine.kill()
    machine.restart()
    assert machine.meter.available(machine.now) == LIMIT - 6


def test_a_full_disk_is_tried_again_once_a_second_at_most(machine: Machine) -> None:
    tried: list[float] = []
    append = StateFile.append

    def count(file: object, data: bytes) -> None:
        tried.append(machine.now)
        append(file, data)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch, room_for(0):
        patch.setattr(StateFile, "append", count)
        for _ in range(40):
            machine.meter.book(0.25, machine.now)
            machine.clock.advance(1 / 16)
    assert tried == [0.0, 1.0, 2.0]


def test_while_there_is_no_room_for_a_new_file_lines_are_still_added(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no")

    monkeypatch.setattr(module, "SLACK", 0)
    monkeypatch.setattr(module, "GROWTH", 0)
    machine.kill()
    machine.restart()
    with monkeypatch.context() as patch:
        patch.setattr(StateFile, "replace", refuse)
        for _ in range(2):
            machine.meter.book(1, machine.now)
            machine.clock.advance(1.0)
    machine.kill()
    machine.restart()
    assert machine.meter.booked(machine.now) == 2


def test_a_file_that_could_not_be_cut_is_written_anew(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine.meter.book(1, 0.0)
    machine.settle_down()

    def refuse(*_: object) -> None:
        raise OSError("no")

    with room_for(machine.path.stat().st_size + 10), monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", refuse)
        machine.meter.book(1, machine.now)
        machine.clock.advance(2.0)
    assert not machine.path.read_bytes().endswith(b"\n")
    machine.meter.book(1, machine.now)
    machine.settle_down()
    machine.kill()
    machine.restart()
    assert machine.meter.booked(machine.now) == 3


def test_a_file_that_cannot_be_written_at_the_end_is_left_as_it_was(
    machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    machine.meter.book(1, 0.0)
    machine.settle_down()
    before = machine.path.read_bytes()
    with room_for(10):
        machine.meter.close()
    assert machine.path.read_bytes() == before
    assert not list(machine.path.parent.glob("*.new"))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    machine.restart()
    assert machine.meter.booked(0.0) == 1


def test_a_disk_that_is_full_at_the_start_is_a_configuration_error(machine: Machine) -> None:
    machine.kill()
    with room_for(10), pytest.raises(ConfigError, match="cannot be used: .*File too large"):
        machine.restart()
    machine.restart()


def test_the_edge_of_a_fixed_window_is_kept_on_the_same_boot_and_forgotten_on_another(tmp_path: Path) -> None:
    machine = Machine(tmp_path / "quota.state", "fixed")
    machine.meter.book(LIMIT, 0.0)
    machine.meter.rebase(0, 2.5, 0.0, sent=0.0)
    machine.settle_down()
    machine.kill()
    machine.restart()
    assert machine.meter.ready_at(1, 0.0) == pytest.approx(2.5, abs=0.01)
    machine.kill()
    machine.restart(boot=True)
    assert machine.meter.ready_at(1, 0.0) == 8.5
    machine.meter.close()


def test_the_machine_names_its_starts_and_virtual_time_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def boot(clock: Clock) -> str:
        kept = kept_meter(Quota(1, per=60.0, state=tmp_path / "quota"))
        kept.bind(clock, wake=ignore, fail=ignore, tell=ignore)
        kept.close()
        return json.loads((tmp_path / "quota").read_bytes().split(b"\n")[0])["boot"]

    async def real() -> str:
        return boot(loop_clock(asyncio.get_running_loop()))

    if module.BOOT.exists():
        assert asyncio.run(real()) == module.BOOT.read_text().strip()
    assert boot(VirtualScheduler()) == ""
    monkeypatch.setattr(module, "BOOT", tmp_path / "none")
    assert asyncio.run(real()) == ""


def test_on_another_loop_it_goes_on_and_what_was_due_is_written(tmp_path: Path) -> None:
    kept = KeptMeter(Quota(LIMIT, per=60.0, state=tmp_path / "quota"), wall=wall_clock, boot=None)

    async def book() -> None:
        clock = loop_clock(asyncio.get_running_loop())
        kept.bind(clock, wake=ignore, fail=ignore, tell=ignore)
        kept.bind(clock, wake=ignore, fail=ignore, tell=ignore)
        kept.book(1, clock.seconds())

    lines = []
    for _ in range(2):
        asyncio.run(book())
        lines.append((tmp_path / "quota").read_bytes().count(b"\n"))
    asyncio.run(book())
    assert lines == [3, 4]
    virtual = VirtualScheduler()
    kept.bind(virtual, wake=ignore, fail=ignore, tell=ignore)  # a clock with a zero of its own
    assert kept.booked(0.0) == 3
    assert 59.0 < kept.ready_at(LIMIT, 0.0) <= 60.05
    kept.close()


def test_what_a_loop_did_not_come_to_write_is_written_when_the_next_one_takes_over(tmp_path: Path) -> None:
    kept = KeptMeter(Quota(LIMIT, per=60.0, state=tmp_path / "quota"), wall=wall_clock, boot=None)
    for lines in (3, 5):
        loop = asyncio.new_event_loop()
        clock = loop_clock(loop)
        kept.bind(clock, wake=ignore, fail=ignore, tell=ignore)
        kept.book(1, clock.seconds())
        loop.run_until_complete(asyncio.sleep(0))
        assert (tmp_path / "quota").read_bytes().count(b"\n") == lines
        kept.book(1, clock.seconds())
        loop.close()
    kept.close()


def test_a_booking_is_in_the_file_before_a_task_that_it_let_start_runs(tmp_path: Path) -> None:
    kept = KeptMeter(Quota(LIMIT, per=60.0, state=tmp_path / "quota"), wall=wall_clock, boot=None)
    lines: list[int] = []

    async def attempt() -> None:
        lines.append((tmp_path / "quota").read_bytes().count(b"\n"))

    async def run() -> None:
        loop = asyncio.get_running_loop()
        clock = loop_clock(loop)
        kept.bind(clock, wake=ignore, fail=ignore, tell=ignore)
        for _ in range(3):
            kept.book(1, clock.seconds())
            first = loop.create_task(attempt())
            kept.book(1, clock.seconds())
            await asyncio.gather(first, loop.create_task(attempt()))
        kept.close()

    asyncio.run(run())
    assert lines == [3, 3, 4, 4, 5, 5]


SENDER = """
import asyncio, os, sys
from rxllm.clock import loop_clock
from rxllm.policies.quota import Quota
from rxllm.stores.state import kept_meter

async def send():
    os.write(1, b".")  # it has left this machine

async def main():
    loop = asyncio.get_running_loop()
    clock = loop_clock(loop)
    meter = kept_meter(Quota(1e9, per=3600.0, state=sys.argv[1]))
    meter.bind(clock, wake=print, fail=print, tell=print)
    while True:
        for _ in range(7):
            meter.book(1, clock.seconds())
            loop.create_task(send())
        await asyncio.sleep(0)

asyncio.run(main())
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no kill -9 here")
def test_a_process_that_is_killed_loses_nothing_that_it_has_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, sent = tmp_path / "quota", 0
    for least in (1, 400, 1500):
        with subprocess.Popen([sys.executable, "-c", SENDER, str(path)], stdout=subprocess.PIPE, env=HERE) as child:
            assert child.stdout is not None
            seen = 0
            while seen < least:
                seen += len(os.read(child.stdout.fileno(), 65_536))
            child.send_signal(signal.SIGKILL)
            sent += seen + len(child.stdout.read())
        kept = KeptMeter(Quota(1e9, per=3600.0, state=path), wall=wall_clock, boot=None)

        async def look(kept: KeptMeter = kept) -> float:
            clock = loop_clock(asyncio.get_running_loop())
            kept.bind(clock, wake=ignore, fail=ignore, tell=ignore)
            booked = kept.booked(clock.seconds())
            kept.close()
            return booked

        booked = asyncio.run(look())
        assert sent <= booked <= sent + 7 * (1 + (1, 400, 1500).index(least))


def test_it_is_a_meter_like_that_without_a_file(machine: Machine) -> None:
    kept, plain = machine.meter, meter(machine.quota)
    for each in (kept, plain):
        each.refund(each.book(3, 0.0), 0.0)
        each.book(9, 0.0)
        each.rebase(4, None, 0.0, limit=12, sent=0.0)
        each.widen(1.0)
        assert each.limit == 12
        assert each.too_large(13)
        assert not each.too_large(12)
        assert each.fits(3, 0.0)
        assert not each.fits(4, 0.0)
        assert each.booked(0.0) == 9
        assert each.available(0.0) == 3
        assert each.next_expiry(0.0) == each.ready_at(12, 0.0) == 9.0


class Applicant:
    """Takes what it is given."""

    lease: Lease | None = None

    def admitted(self, lease: Lease) -> None:
        self.lease = lease

    def turned_away(self, error: Exception) -> None:
        assert "is closed" in str(error)


def test_a_gate_goes_on_where_the_last_one_was_killed_and_waits_for_what_that_has_booked(tmp_path: Path) -> None:
    quotas = [
        Quota("3/minute", state=tmp_path / "requests"),
        Quota("100 tokens/minute", state=tmp_path / "tokens", charged_at="end"),
    ]

    async def run(count: int, *, is_killed: bool) -> list[bool]:
        clock = loop_clock(asyncio.get_running_loop())
        gate = Gate(*quotas)
        admitted = []
        for _ in range(count):
            applicant = Applicant()
            gate.enter(gate.apply(clock, gate.amounts({"tokens": 30}), applicant))
            await asyncio.sleep(0)
            admitted.append(applicant.lease is not None)
            if applicant.lease is not None and not is_killed:
                applicant.lease.settle("answered", {"tokens": 1})
        if not is_killed:
            gate.close()
        return admitted  # a gate that is forgotten leaves its files as they are

    assert asyncio.run(run(2, is_killed=True)) == [True, True]
    gc.collect()
    assert asyncio.run(run(2, is_killed=False)) == [True, False]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["requests", "requests.lock", "tokens", "tokens.lock"]
