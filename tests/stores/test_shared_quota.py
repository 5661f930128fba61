"""Meters that share a quota through a real server, also when it fails, forgets, or is killed."""

import asyncio
import bisect
import contextlib
import gc
import itertools
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

import rxllm
from rxllm.clock import loop_clock
from rxllm.errors import ConfigError, StoreError
from rxllm.gate import Gate
from rxllm.policies.quota import Quota
from rxllm.policies.store import Store
from rxllm.stores.shared_quota import shared_meter
from rxllm.testing import VirtualScheduler

names = itertools.count()


class User:
    """What a gate does with a meter: book what fits, and look again when it is woken or when it is time."""

    def __init__(self, url, limit=100, per=0.5, *, name=None, unreachable="wait", cost=1, **fields):
        store = Store(url, name=name or f"user {next(names)}", unreachable=unreachable)
        self.meter = shared_meter(Quota(limit, per=per, store=store, **fields))
        self.cost = cost
        self.spent = []  # when each unit was spent
        self.tickets = []
        self.failures = []
        self.told = []
        self.woken = asyncio.Event()

    def bind(self):
        self.clock = loop_clock(asyncio.get_running_loop())
        self.meter.bind(self.clock, wake=self.woken.set, fail=self.failures.append, tell=self.told.append)
        return self

    async def spend(self, units=None, *, seconds=20.0):
        """Spend so many units, or all that can be had in some seconds."""
        stop = self.clock.seconds() + seconds
        while (now := self.clock.seconds()) < stop and units != 0 and not self.failures:
            self.woken.clear()
            if self.meter.fits(self.cost, now):
                self.tickets.append(self.meter.book(self.cost, now))
                self.spent += [now] * self.cost
                units = None if units is None else units - 1
                continue
            until = min(self.meter.ready_at(self.cost, now), stop)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.woken.wait(), max(0.001, until - now))
        return self

    async def idle(self):
        """Wait until no request is on its way."""
        while self.meter.is_asking:
            await asyncio.sleep(0.001)

    async def end(self):
        self.meter.close()
        await self.idle()


def peak(spent, window):
    """Return the most that was spent in any window of that length."""
    spent = sorted(spent)
    return max((bisect.bisect_left(spent, at + window) - first for first, at in enumerate(spent)), default=0)


def run(main):
    asyncio.run(main())
    gc.collect()  # what was not closed warns here, and a warning is an error


async def quiet():
    """Wait until nothing but the test is left on the loop."""
    for _ in range(500):
        if len(asyncio.all_tasks()) == 1:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(asyncio.all_tasks())


@pytest.mark.parametrize(
    ("strategy", "most"),
    [
        pytest.param("sliding", 1.0, id="a-sliding-log"),
        pytest.param("fixed", 1.0, id="a-fixed-window-whose-edges-nobody-knows"),
        pytest.param("bucket", 2.0, id="a-bucket-that-is-full-and-flows"),
    ],
)
def test_together_they_never_spend_more_than_the_quota_and_most_of_it(redis, strategy, most):
    async def main():
        name = f"together {next(names)}"
        users = [User(redis.url, 200, 0.5, name=name, strategy=strategy, cost=cost).bind() for cost in (1, 1, 3)]
        await asyncio.gather(*(user.spend(seconds=1.3) for user in users))
        spent = [at for user in users for at in user.spent]
        assert peak(spent, 0.5) <= 200 * most
        assert len(spent) >= 150  # of 600: how much it is on an idle machine, the benchmark tells
        assert all(user.spent for user in users)
        for user in users:
            await user.end()
        await quiet()

    run(main)


def test_a_flow_needs_few_requests(redis):
    async def main():
        user = User(redis.url, 20_000, 10).bind()
        for _ in range(50):
            await user.spend(100)
            await asyncio.sleep(0.002)
        assert user.meter.requests / len(user.spent) < 0.05
        await user.end()

    run(main)


def test_close_gives_back_what_was_not_spent_and_settlements_what_was_spent_too_much(redis):
    async def main():
        name = f"close {next(names)}"
        first = User(redis.url, 100, 60, name=name, cost=40).bind()
        await first.spend(2)
        now = first.clock.seconds()
        first.meter.settle(first.tickets[0], 10, now)
        first.meter.refund(first.tickets[1], now)
        await first.end()
        second = User(redis.url, 100, 60, name=name, cost=90).bind()
        await second.spend(1)
        assert second.spent
        assert second.meter.available(second.clock.seconds()) == 0
        assert second.meter.booked(second.clock.seconds()) == 90
        assert second.meter.next_expiry(now) > now + 60
        await second.end()
        await quiet()

    run(main)


def test_what_an_idle_lease_holds_is_given_back_before_it_ends(redis):
    async def main():
        name = f"idle {next(names)}"
        user = User(redis.url, 100, 40, name=name, cost=1).bind()
        await user.spend(1)
        other = User(redis.url, 100, 40, name=name, cost=99).bind()
        await other.spend(1)
        assert other.spent[0] - user.spent[0] < 40
        await user.end()
        await other.end()

    run(main)


def test_what_was_used_above_the_reservation_counts_for_all(redis):
    async def main():
        name = f"debt {next(names)}"
        user = User(redis.url, 100, 4, name=name).bind()
        await user.spend(1)
        user.meter.settle(user.tickets[0], 61, user.clock.seconds())
        await user.end()
        other = User(redis.url, 100, 4, name=name, cost=40).bind()
        await other.spend(seconds=0.05)
        assert not other.spent
        await other.end()
        last = User(redis.url, 100, 4, name=name, cost=39).bind()
        await last.spend(1, seconds=0.1)
        assert len(last.spent) == 39
        await last.end()

    run(main)


HOLDER = """
import asyncio, sys, time
from rxllm.clock import loop_clock
from rxllm.policies.quota import Quota
from rxllm.policies.store import Store
from rxllm.stores.shared_quota import shared_meter

async def main():
    meter = shared_meter(Quota(20, per=0.5, margin=0.0, store=Store(sys.argv[1], name=sys.argv[2])))
    meter.bind(loop_clock(asyncio.get_running_loop()), wake=lambda: None, fail=print, tell=print)
    while not meter.fits(20, time.monotonic()):
        await asyncio.sleep(0.001)
    print(time.monotonic(), flush=True)
    meter.book(1, time.monotonic())
    time.sleep(60)

asyncio.run(main())
"""


def test_the_units_of_a_killed_process_are_back_after_its_lease_and_a_window_and_not_before(redis):
    async def main():
        await user.bind().spend(1)
        await user.end()

    user = User(redis.url, 20, 0.5, margin=0.0, cost=19, name="killed")
    command = [sys.executable, "-c", HOLDER, redis.url, "killed"]
    environment = {**os.environ, "PYTHONPATH": str(Path(rxllm.__path__[0]).parent)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as process:
        had = float(process.stdout.readline())
        process.kill()
    run(main)
    assert user.spent[0] >= had + 0.5


def test_while_the_store_does_not_answer_those_that_wait_wait_and_it_is_said_once(own_redis, caplog):
    async def main():
        caplog.set_level(logging.INFO)
        user = User(own_redis.url).bind()
        await user.spend(1, seconds=0.5)
        assert not user.spent
        assert not user.failures
        assert user.meter.requests >= 2
        own_redis.start()
        await user.spend(3)
        assert len(user.spent) == 3
        assert [event.reachable for event in user.told] == [False, True]
        assert own_redis.address in user.told[0].reason
        warned = [record for record in caplog.records if record.levelno == logging.WARNING]
        assert [record.name for record in warned] == ["rxllm.stores"]
        await user.end()
        await quiet()

    run(main)


def test_while_the_store_does_not_answer_those_that_wait_fail_if_that_was_chosen(own_redis):
    async def main():
        user = User(own_redis.url, unreachable="fail").bind()
        await user.spend(1)
        (error,) = user.failures
        assert isinstance(error, StoreError)
        assert error.halts
        assert own_redis.address in str(error)
        user.failures.clear()
        await user.spend(1)  # before the next try, or after it
        assert user.failures
        user.failures.clear()
        own_redis.start()
        while not user.spent:
            await user.spend(1)
            user.failures.clear()
        await user.end()

    run(main)


def test_while_the_store_does_not_answer_a_share_goes_on_and_is_counted_when_it_does(own_redis):
    async def main():
        own_redis.start()
        user = User(own_redis.url, 100, 2, unreachable=0.25, name="alone").bind()
        await user.spend(10)
        own_redis.stop()
        await user.spend(seconds=0.3)
        assert [event.reachable for event in user.told] == [False]
        alone = len(user.spent) - 10
        assert 15 <= alone <= 15 + 100 / 50 * 2  # the rest of its share, and what was in hand when the store died
        assert user.meter.available(user.clock.seconds()) < 1
        own_redis.start()
        while user.meter._down:
            await user.spend(1, seconds=0.02)
        await user.end()
        other = User(own_redis.url, 100, 2, name="alone", cost=90).bind()
        await other.spend(1)
        assert peak(user.spent + other.spent, 2) <= 100
        await other.end()
        await quiet()

    run(main)


def test_a_settlement_after_the_outage_finds_what_was_booked_in_it(own_redis):
    async def main():
        user = User(own_redis.url, 100, 60, unreachable=0.5, cost=50, name="late").bind()
        await user.spend(1)
        assert len(user.spent) == 50
        own_redis.start()
        while user.meter._down:
            assert not user.meter.fits(50, user.clock.seconds())
            await asyncio.sleep(0.01)
        user.meter.settle(user.tickets[0], 5, user.clock.seconds())
        await user.end()
        for cost, fitting in ((96, 0), (95, 95)):
            other = User(own_redis.url, 100, 60, cost=cost, name="late").bind()
            await other.spend(1, seconds=0.1)
            assert len(other.spent) == fitting
            await other.end()

    run(main)


def test_a_store_that_is_killed_and_comes_back_empty_is_told_what_was_spent(own_redis):
    async def main():
        own_redis.start()
        users = [User(own_redis.url, 100, 1, name="reborn").bind() for _ in range(3)]
        tasks = [asyncio.create_task(user.spend(seconds=2.2)) for user in users]
        await asyncio.sleep(0.1)
        own_redis.stop()
        await asyncio.sleep(0.1)
        own_redis.start()
        await asyncio.gather(*tasks)
        spent = [at for user in users for at in user.spent]
        assert peak(spent, 1) <= 100
        assert len(spent) > 100
        for user in users:
            await user.end()

    run(main)


def test_scripts_that_the_server_has_forgotten_are_sent_again(own_redis):
    async def main():
        own_redis.start()
        user = User(own_redis.url).bind()
        await user.spend(5)
        await user.idle()
        own_redis.say("SCRIPT", "FLUSH")
        await user.spend(120)
        assert not user.told
        await user.end()

    run(main)


def test_another_loop_begins_with_nothing_in_hand_and_the_old_connection_goes_without_a_word(redis):
    user = User(redis.url, 20, 0.4, name="two loops")

    async def main():
        user.woken = asyncio.Event()
        user.bind()
        await user.spend(10)

    run(main)
    had = user.meter._lease
    run(main)
    assert user.meter._lease is not had
    assert peak(user.spent, 0.4) <= 20
    assert len(user.spent) == 20


def test_what_was_booked_in_an_outage_is_told_from_the_next_loop(own_redis):
    user = User(own_redis.url, 100, 60, unreachable=0.5, cost=50, name="next loop")

    async def alone():
        user.woken = asyncio.Event()
        await user.bind().spend(1)

    async def together():
        user.woken = asyncio.Event()
        user.bind()
        assert not user.meter.fits(50, user.clock.seconds())
        await user.idle()
        await user.end()
        other = User(own_redis.url, 100, 60, cost=51, name="next loop").bind()
        await other.spend(1, seconds=0.1)
        assert not other.spent
        await other.end()

    run(alone)
    assert len(user.spent) == 50
    own_redis.start()
    run(together)


def test_a_loop_may_end_at_any_moment(redis):
    async def main():
        for _ in range(20):
            user = User(redis.url).bind()
            user.meter.fits(1, user.clock.seconds())
            await asyncio.sleep(0)
        closing = User(redis.url).bind()
        await closing.spend(1)
        closing.meter.close()
        closing.meter.close()

    run(main)


def test_a_meter_that_is_forgotten_lets_its_connection_go(redis):
    async def main():
        before = redis.say("CLIENT", "LIST").count(b" addr=")
        user = User(redis.url).bind()
        await user.spend(1)
        await user.idle()
        while user.meter._timer is not None:  # it lives until its lease is given back
            await asyncio.sleep(0.001)
        await user.idle()
        assert redis.say("CLIENT", "LIST").count(b" addr=") == before + 1
        del user
        gc.collect()
        await quiet()
        for _ in range(100):
            if redis.say("CLIENT", "LIST").count(b" addr=") == before:
                return
            await asyncio.sleep(0.01)
        raise AssertionError("the connection is still there")

    run(main)


def test_the_statements_of_the_server_can_only_tighten(redis):
    async def main():
        user = User(redis.url, 10_000, 60).bind()
        await user.spend(1)
        meter, now = user.meter, user.clock.seconds()
        meter.rebase(9_999, None, now, limit=20_000)
        assert meter.limit == 10_000
        assert meter.fits(10, now)
        meter.rebase(4, None, now)
        assert (meter.fits(4, now), meter.fits(5, now)) == (True, False)
        await user.idle()
        meter.rebase(30, None, now, limit=40)
        assert (meter.limit, meter.too_large(41), meter.too_large(40)) == (40, True, False)
        assert meter.ready_at(41, now) == float("inf")
        await user.end()

    run(main)


def test_more_jitter_makes_later_leases_count_for_longer(redis):
    async def main():
        quotas = [Quota(10, per=0.4, margin=0.0, store=Store(redis.url, name=f"jitter {n}")) for n in range(2)]
        seconds = []
        for quota, margin in zip(quotas, (0.0, 0.08), strict=True):
            user = User(redis.url)
            user.meter = shared_meter(quota)
            user.bind()
            user.meter.widen(margin)
            await user.spend(11)
            seconds.append(user.spent[10] - user.spent[0])
            await user.end()
        assert seconds[0] >= 0.4
        assert seconds[1] >= 0.48

    run(main)


def test_more_jitter_makes_what_was_spent_count_for_longer(redis):
    async def main():
        user = User(redis.url)
        user.meter = shared_meter(Quota(10, per=0.5, margin=0.0, store=Store(redis.url, name="widened")))
        user.bind()
        await user.spend(10)
        user.meter.widen(0.1)
        await user.spend(1)
        assert user.spent[10] - user.spent[0] >= 0.6
        await user.end()

    run(main)


def test_a_password_is_in_no_message_event_log_or_repr(secret_redis, caplog, monkeypatch):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("STORE_PASSWORD", "hunter2/@x")
    address = secret_redis.address

    async def main():
        wrong = f"redis://:hunter2@{address}0000"  # no such port: the error of its client has all of the address
        for url in (f"redis://:$STORE_PASSWORD@{address}", f"redis://me:hunter2%2F%40x@{address}/0", wrong):
            user = User(url, unreachable="fail").bind()
            await user.spend(1)
            (error,) = user.failures
            for shown in (
                str(error),
                repr(error),
                repr(user.told),
                repr(user.meter),
                caplog.text,
                str(error.__cause__),
            ):
                assert "hunter2" not in shown
            assert address in str(error)
            await user.end()

    run(main)


def test_a_password_of_the_environment_may_have_any_character(secret_redis, monkeypatch):
    monkeypatch.setenv("STORE_PASSWORD", "sesame/@open")

    async def main():
        user = User(f"redis://:$STORE_PASSWORD@{secret_redis.address}").bind()
        await user.spend(3)
        assert not user.told
        await user.end()

    run(main)


def test_the_client_of_valkey_does_as_well(redis):
    async def main():
        user = User(redis.url.replace("redis", "valkey")).bind()
        await user.spend(120)
        assert not user.told
        await user.end()
        await quiet()

    run(main)


def test_gates_share_a_quota_and_give_back_what_they_have_when_they_close(redis):
    class Applicant:
        def __init__(self):
            self.lease = asyncio.get_running_loop().create_future()

        def admitted(self, lease):
            self.lease.set_result(lease)

        def turned_away(self, error):
            self.lease.set_exception(error)

    async def main():
        quota = Quota(20, per=0.5, store=Store(redis.url, name="gates"))
        gates = [Gate(quota) for _ in range(2)]
        clock = loop_clock(asyncio.get_running_loop())
        spent = []

        async def attempt(gate):
            applicant = Applicant()
            gate.enter(gate.apply(clock, gate.amounts({}), applicant))
            lease = await applicant.lease
            spent.append(lease.at)
            lease.settle("answered")

        await asyncio.gather(*(attempt(gate) for _ in range(15) for gate in gates))
        assert len(spent) == 30
        assert peak(spent, 0.5) <= 20
        for gate in gates:
            gate.close()
        await quiet()

    run(main)


@pytest.mark.parametrize(
    ("package", "url", "extra"),
    [
        pytest.param("redis", "redis://h:1", "redis", id="redis"),
        pytest.param("redis", "redis+unix:///s", "redis", id="redis-on-a-socket"),
        pytest.param("valkey", "valkeys://h:1", "valkey", id="valkey-with-tls"),
        pytest.param("memcachio", "memcached://h:1", "memcached", id="memcached"),
        pytest.param("motor", "mongodb+srv://h", "mongodb", id="mongodb"),
    ],
)
def test_a_missing_package_is_named_with_what_to_install(package, url, extra, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"needs the package {package}: pip install 'rxllm\[{extra}\]'"):
        shared_meter(Quota(5, per=1, strategy="fixed", store=url))


def test_it_cannot_be_used_in_virtual_time(redis):
    meter = shared_meter(Quota("5/minute", store=redis.url))
    with pytest.raises(ConfigError, match="a quota with a store needs a running loop"):
        meter.bind(VirtualScheduler().clock, wake=print, fail=print, tell=print)


def test_a_variable_that_is_not_set_is_said_when_it_is_used(redis):
    async def main():
        with pytest.raises(ConfigError, match="NO_SUCH_VARIABLE"):
            User("redis://:$NO_SUCH_VARIABLE@h:1").bind()

    run(main)


def test_a_ticket_names_its_lease_also_beside_a_share(redis):
    async def main():
        name = f"tickets {next(names)}"
        user = User(redis.url, 100, 60, name=name, unreachable=0.5, cost=30).bind()
        await user.spend(3)
        for ticket in user.tickets:
            user.meter.settle(ticket, 10, user.clock.seconds())
        await user.end()
        for cost, fitting in ((71, 0), (70, 70)):
            other = User(redis.url, 100, 60, name=name, cost=cost).bind()
            await other.spend(1, seconds=0.1)
            assert len(other.spent) == fitting
            await other.end()

    run(main)
