"""A recording of real gates: in virtual time, and under a pipeline."""

import asyncio
import sys
import threading
from collections import Counter

import msgspec
import pytest

import rxllm
from rxllm.errors import ConfigError
from rxllm.events import Event, SettingChanged, StoreChanged
from rxllm.policies.headers import Limits, Truth
from rxllm.telemetry import Recording
from rxllm.testing import VirtualScheduler


class Asker:
    """Somebody who asks a gate for admission."""

    def __init__(self, gate, scheduler, cost=None):
        self.lease = None
        gate.enter(gate.apply(scheduler, gate.amounts(cost or {}), self))

    def admitted(self, lease):
        self.lease = lease

    def turned_away(self, error):
        raise error


def kinds(recording):
    return [(mark.kind, mark.text) for mark in recording.table().marks]


def test_a_recording_counts_what_the_gate_counts():
    tries = Counter()

    async def work(number):
        tries[number] += 1
        await asyncio.sleep(0.01)
        if number % 5 == 0 and tries[number] == 1:
            raise rxllm.errors.RateLimitedError("slow down")
        if number % 7 == 0:
            raise rxllm.errors.ServerError("broken")

    gate = rxllm.Gate("1000/second", concurrency=2)
    with Recording(gate) as recording:
        retry = rxllm.Backoff(attempts=2, base=0.001, cap=0.002)
        rxllm.collect(rxllm.from_iterable(range(40)).pipe(rxllm.call(rxllm.function(work), gate=gate, retry=retry)))
    table, gates = recording.table(), gate.statistics()
    assert sum(table.admitted) == sum(table.ended) == gates.admitted == tries.total() == 40 + 8 + 6
    assert sum(table.refused) == gates.refused == 8
    assert sum(table.failed) == 2 * 6  # 0, 7, 14, 21, 28 and 35, each tried twice besides refusals
    assert max(table.in_flight) == 2
    assert set(table.limit) == {2}
    assert 0 < sum(table.waited["concurrency"]) <= gates.waited["concurrency"]
    assert table.gate == repr(gate)


@pytest.mark.parametrize(
    ("ending", "refused", "failed"),
    [
        ("unsent", 0, 0),
        ("refused", 1, 0),
        ("answered", 0, 0),
        ("failed", 0, 1),
        ("timed_out", 0, 1),
        ("cancelled", 0, 0),
    ],
)
def test_an_attempt_ends_as(ending, refused, failed):
    gate, scheduler = rxllm.Gate(concurrency=1), VirtualScheduler()
    with Recording(gate) as recording:
        Asker(gate, scheduler).lease.settle(ending)
    table = recording.table()
    assert (table.ended, table.refused, table.failed) == ((1,), (refused,), (failed,))


def test_the_fill_of_each_quota_is_looked_at_once_in_a_tenth_of_a_second():
    gate, scheduler = rxllm.Gate("10/second", "100 tokens/minute", rate=1_000_000), VirtualScheduler()
    with Recording(gate) as recording:
        for at in (0.0, 0.01, 0.09, 0.15, 0.45):
            scheduler.run(at)
            Asker(gate, scheduler, {"tokens": 20})
    table = recording.table()
    assert [fill.last for fill in table.fill.values()] == [
        pytest.approx((0.1, 0.4, None, None, 0.5)),
        pytest.approx((0.2, 0.8, None, None, 1.0)),
    ]
    assert list(table.fill) == ["10 requests per 1 seconds", "100 tokens per 60 seconds"]
    assert table.admitted == (3, 1, 0, 0, 1)
    assert set(table.rate) == {1_000_000}


def test_bins_that_have_grown_keep_the_highest_fill_of_each_tenth_of_a_second():
    gate, scheduler = rxllm.Gate(rxllm.Quota(10, per=0.2, margin=0)), VirtualScheduler()
    with Recording(gate, bins=2) as recording:
        for at in (0.0, 0.1, 0.1, 0.35, 3.0):
            scheduler.run(at)
            Asker(gate, scheduler)
    table = recording.table()
    (fill,) = table.fill.values()
    assert table.width == 1.6
    assert fill.highest == pytest.approx((0.2, 0.1))
    assert fill.last == pytest.approx((0.1, 0.1))


def test_a_quota_that_headers_state_begins_when_it_is_learned():
    gate, scheduler = rxllm.Gate("10/second"), VirtualScheduler()
    with Recording(gate) as recording:
        Asker(gate, scheduler)
        scheduler.run(0.25)
        truth = Truth(unit="tokens", limit=1000, remaining=600)
        gate.observe(Limits((truth,)), sent=0.0)
    fills = recording.table().fill
    assert fills["1000 tokens per 60 seconds (bucket)"].last == (None, None, pytest.approx(0.4))
    assert kinds(recording) == [("learned", "learned from headers: 1000 tokens per 60 seconds")]


def test_a_used_up_quota_and_a_pause_leave_marks():
    gate, scheduler = rxllm.Gate(rxllm.Quota(1, per=3600, margin=0)), VirtualScheduler()
    with Recording(gate) as recording:
        first = Asker(gate, scheduler)
        second = Asker(gate, scheduler)
        scheduler.run(1800.0)
        gate.pause(1.5)
        first.lease.settle("answered")
        scheduler.run(3700.0)
    assert second.lease is not None
    assert kinds(recording) == [
        ("suspended", "suspended for 3,600 s by 1 requests per 3600 seconds"),
        ("paused", "paused for 1.5 s: a refusal said so"),
        ("resumed", "resumed after 3,600 s"),
    ]
    table = recording.table()
    assert [mark.at for mark in table.marks] == pytest.approx([0, 1800, 3600])
    assert sum(table.waited["1 requests per 3600 seconds"]) == pytest.approx(3600 - 1.5)
    assert sum(table.waited["pause"]) == pytest.approx(1.5)
    assert len(table.admitted) <= 600


def test_a_setting_counts_from_when_it_was_changed_and_not_before_the_run():
    gate, scheduler = rxllm.Gate(concurrency=8), VirtualScheduler()
    scheduler.run(1000.0)
    with Recording(gate) as recording:
        gate.set(limit=6)  # the gate has met no clock yet
        Asker(gate, scheduler)
        scheduler.run(1000.05)
        gate.set(limit=3, rate=2.5, reason="too much")
    table = recording.table()
    assert (table.limit, table.rate) == ((3,), (2.5,))
    assert [(mark.at, mark.text) for mark in table.marks] == [(pytest.approx(0.05), "limit 3, rate 2.5/s: too much")]


@pytest.mark.parametrize(
    ("event", "kind", "text"),
    [
        (SettingChanged(at=1.0, limit=None, rate=4, reason="set"), "setting", "rate 4/s: set"),
        (
            StoreChanged(at=1.0, quota=rxllm.Quota("5/minute"), reachable=False, reason="no route"),
            "store",
            "store of 5 requests per 60 seconds does not answer: no route",
        ),
        (
            StoreChanged(at=1.0, quota=rxllm.Quota("5/minute"), reachable=True, reason="pong"),
            "store",
            "store of 5 requests per 60 seconds is back: pong",
        ),
        (Event(at=1.0), "event", "Event"),
    ],
    ids=["only-a-rate", "a-store-is-gone", "a-store-is-back", "an-event-that-is-new"],
)
def test_a_mark_says_what_happened(event, kind, text):
    gate, scheduler = rxllm.Gate(concurrency=1), VirtualScheduler()
    with Recording(gate) as recording:
        Asker(gate, scheduler)
        gate._news.tell(event)
    assert kinds(recording) == [(kind, text)]


def test_no_password_of_a_store_is_recorded():
    gate, scheduler = rxllm.Gate("5/minute"), VirtualScheduler()
    quota = rxllm.Quota("5/minute", store="redis://user:hunter2@localhost")
    with Recording(gate) as recording:
        Asker(gate, scheduler)
        gate._news.tell(StoreChanged(at=1.0, quota=quota, reachable=False, reason="gone"))
    shown = f"{recording!r} {recording.table()!r}"
    assert "gone" in shown
    assert "hunter2" not in shown


def test_a_closed_recording_stays_as_it_is_and_costs_the_gate_nothing():
    gate, scheduler = rxllm.Gate(concurrency=5), VirtualScheduler()
    recording = Recording(gate)
    Asker(gate, scheduler)
    recording.close()
    recording.close()
    Asker(gate, scheduler)
    assert recording.table().admitted == (1,)
    assert gate._news.events.observers == []


def test_a_recording_ends_with_its_gate_and_stays():
    scheduler = VirtualScheduler()
    with rxllm.Gate(concurrency=5) as gate:
        recording = Recording(gate)
        Asker(gate, scheduler)
    assert gate._news.events.observers == []
    assert recording.table().admitted == (1,)
    assert Recording(gate).table().admitted == ()


def test_those_that_wait_are_counted_when_the_gate_is_looked_at():
    gate, scheduler = rxllm.Gate(concurrency=1), VirtualScheduler()
    with Recording(gate) as recording:
        first, *_ = [Asker(gate, scheduler) for _ in range(4)]
        scheduler.run(0.5)
        first.lease.settle("answered")
        scheduler.run(0.5)
    table = recording.table()
    assert max(table.waiting) == 3
    assert sum(table.waited["concurrency"]) == pytest.approx(0.5)


@pytest.fixture
def hasty_threads():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.usefixtures("hasty_threads")
def test_a_recording_is_read_by_others_while_bins_merge():
    gate, scheduler = rxllm.Gate(), VirtualScheduler()
    over = threading.Event()
    seen = []

    def read():
        while not over.is_set():
            seen.append(recording.table())

    with Recording(gate, bins=4) as recording:
        reader = threading.Thread(target=read)
        reader.start()
        try:
            for number in range(3_000):
                scheduler.run(number * 0.1)
                Asker(gate, scheduler)
        finally:
            over.set()
            reader.join()
    assert sum(recording.table().admitted) == 3_000
    totals = [sum(table.admitted) for table in seen]
    assert len(totals) > 1
    assert totals == sorted(totals)
    assert all(len(table.admitted) == len(table.limit) == len(table.in_flight) <= 4 for table in seen)


def test_a_table_is_plain_data():
    gate, scheduler = rxllm.Gate("5/minute", concurrency=2), VirtualScheduler()
    with Recording(gate) as recording:
        Asker(gate, scheduler)
        gate.pause(1.0)
    table = recording.table()
    assert msgspec.convert(msgspec.to_builtins(table), type(table)) == table


@pytest.mark.parametrize(
    ("bins", "said"),
    [
        (0, "bins must be a whole number >= 2, got 0"),
        (7, "bins must be even, got 7"),
        (2.0, "bins must be"),
        (True, "bins must be"),
    ],
)
def test_the_number_of_bins_is_checked(bins, said):
    with pytest.raises(ConfigError, match=said):
        Recording(rxllm.Gate(), bins=bins)


def test_only_a_gate_is_recorded():
    with pytest.raises(ConfigError, match="gate must be a Gate, got '5/minute'"):
        Recording("5/minute")
