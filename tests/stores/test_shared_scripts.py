"""The script for Redis against a model that knows only between which moments it ran."""

import asyncio
import itertools
import time

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rxllm.policies.local_lease import Ask, LocalLease
from rxllm.policies.quota import Quota
from rxllm.policies.store import Store
from rxllm.stores.backends import Scripted

LIMIT, PER, MARGIN = 40, 0.3, 0.0
names = itertools.count()

CLIENTS = st.integers(0, 2)
ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("lease"), CLIENTS, st.integers(0, 12), st.integers(1, 50)),
        st.tuples(st.just("return"), CLIENTS, st.integers(0, 20), st.integers(0, 50)),
        st.tuples(st.just("debt"), CLIENTS, st.integers(1, 9), st.just(0)),
        st.tuples(st.just("wait"), CLIENTS, st.integers(1, 30), st.just(0)),
    ),
    max_size=25,
)


class Table:
    """One Redis, some clients, and what their leases must count."""

    def __init__(self, server, quota):
        self.quota = quota
        self.backend = Scripted(quota, quota.store)
        self.holders = [LocalLease(f"c{n}", limit=quota.limit, life=0, keep=0, size=0) for n in range(3)]
        self.numbers = itertools.count(1)
        self.life, self.keep = self.backend._times[1], self.backend._times[0]
        self.leases = []  # client, number, amount, begins at the earliest, at the latest

    async def exchange(self, client, **fields):
        ask = Ask(**{"sent": 0.0, "closing": (), "carry": 0, "debt": 0, "least": 0, "wanted": 0} | fields)
        before = time.time()
        grant = await self.backend.exchange(self.holders[client], ask, self.quota.limit)
        after = time.time()
        amount = grant.units + ask.carry + ask.debt
        if amount:
            self.leases.append([client, ask.number, amount, before + self.life, after + self.life])
        return grant, before, after

    def used(self, before, after):
        """Return between what the log may count for a script that ran between two moments."""
        least = sum(lease[2] for lease in self.leases if lease[3] + self.keep > after)
        most = sum(lease[2] for lease in self.leases if lease[4] + self.keep > before)
        return least, most


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=ACTIONS)
@example(actions=[("lease", 0, 1, 50), ("wait", 0, 30, 0)] * 12)
def test_the_log_counts_every_lease_for_its_time_and_grants_what_fits(redis, actions):
    asyncio.run(play(redis, actions))


async def play(server, actions):
    store = Store(server.url, name=f"model {next(names)}")
    table = Table(server, Quota(LIMIT, per=PER, margin=MARGIN, store=store))
    try:
        for kind, client, first, second in actions:
            number = next(table.numbers)
            if kind == "wait":
                await asyncio.sleep(first / 1000)
            elif kind == "return":
                mine = [lease for lease in table.leases if lease[0] == client]
                if mine:
                    lease = mine[second % len(mine)]
                    back = min(first, lease[2])
                    await table.exchange(client, number=number, closing=((lease[1], first, 0.0),))
                    lease[2] -= back
            elif kind == "debt":
                await table.exchange(client, number=number, debt=first)
            else:
                known = len(table.leases)
                wanted = max(first, second)
                grant, before, after = await table.exchange(client, number=number, least=first, wanted=wanted)
                given_now, table.leases[known:] = table.leases[known:], []
                low, high = table.used(before, after)
                table.leases += given_now
                assert grant.units == 0 or first <= grant.units <= wanted
                assert grant.units + low <= LIMIT or grant.units == 0
                assert LIMIT - high - grant.units <= grant.room <= LIMIT - low - grant.units
                assert 0 <= grant.hint <= PER / 10 + 1e-9 if not grant.units else grant.hint == 0
    finally:
        await table.backend.close()


def scripted(server, **fields):
    fields = {"limit": 10, "per": 30, "margin": 0, "unit": "requests", "strategy": "sliding"} | fields
    store = Store(server.url, name=f"name {next(names)}")
    return Table(server, Quota(fields.pop("limit"), **fields, store=store))


def run(scenario):
    async def main():
        tables = []
        try:
            await scenario(tables)
        finally:
            for table in tables:
                await table.backend.close()

    asyncio.run(main())


def test_the_log_lets_go_of_a_lease_after_its_life_and_a_window_and_not_a_moment_before(redis):
    async def scenario(tables):
        table = scripted(redis, limit=10, per=0.2)
        tables.append(table)
        _, filled, _ = await table.exchange(0, number=1, least=10, wanted=10)
        for number in itertools.count(2):
            grant, _, now = await table.exchange(0, number=number, least=1, wanted=1)
            if grant.units:
                break
        assert now >= filled + table.life + table.keep

    run(scenario)


def test_who_waits_first_gets_what_comes_free_first_however_much_it_needs(redis):
    async def scenario(tables):
        table = scripted(redis)
        tables.append(table)
        assert (await table.exchange(0, number=1, least=8, wanted=8))[0].units == 8
        assert (await table.exchange(1, number=1, least=6, wanted=6))[0].units == 0  # it waits
        assert (await table.exchange(2, number=1, least=1, wanted=2))[0].units == 0  # 2 are free, and kept for it
        await table.exchange(0, number=2, closing=((1, 5, 0.0),))
        assert (await table.exchange(2, number=2, least=2, wanted=2))[0].units == 0
        assert (await table.exchange(2, number=3, least=1, wanted=1))[0].units == 1  # 7 are free
        assert (await table.exchange(1, number=2, least=6, wanted=6))[0].units == 6

    run(scenario)


def test_what_is_scarce_is_shared_among_those_that_were_here_lately(redis):
    async def scenario(tables):
        table = scripted(redis, limit=100)
        tables.append(table)
        for client in (1, 2):
            await table.exchange(client, number=1, least=1, wanted=1)
        assert (await table.exchange(0, number=1, least=1, wanted=1000))[0].units == 98 // 3
        await table.exchange(1, number=2)  # a farewell
        assert (await table.exchange(0, number=2, least=1, wanted=1000))[0].units == (98 - 32) // 2

    run(scenario)


def test_a_bucket_takes_back_what_was_not_used_and_lets_nobody_take_more_than_is_in_it(redis):
    async def scenario(tables):
        table = scripted(redis, limit=20, per=10, strategy="bucket")
        tables.append(table)
        assert (await table.exchange(0, number=1, least=20, wanted=20))[0].units == 20
        assert (await table.exchange(0, number=2, least=15, wanted=15))[0].units == 0
        await table.exchange(0, number=3, closing=((1, 15, 0.0),))
        assert (await table.exchange(0, number=4, least=15, wanted=15))[0].units == 15

    run(scenario)


@pytest.mark.parametrize(
    ("margin", "units"),
    [
        pytest.param(0.0, 20, id="what-was-leased-has-arrived-so-it-is-full-again"),
        pytest.param(5.0, 0, id="what-was-leased-may-be-on-its-way-so-it-must-not-flow-over"),
    ],
)
def test_a_bucket_fills_with_time_up_to_its_burst(redis, margin, units):
    async def scenario(tables):
        table = scripted(redis, limit=1000, per=1, burst=20, strategy="bucket", margin=margin)
        for holder in table.holders:
            holder.limit = 20
        tables.append(table)
        assert (await table.exchange(0, number=1, least=20, wanted=90))[0].units == 20
        await asyncio.sleep(0.06)
        assert (await table.exchange(0, number=2, least=20, wanted=90))[0].units == units

    run(scenario)


@pytest.mark.parametrize("strategy", ["sliding", "bucket"])
def test_a_quota_that_nobody_uses_leaves_nothing_behind(redis, strategy):
    async def scenario(tables):
        table = scripted(redis, per=0.05, strategy=strategy)
        tables.append(table)
        await table.exchange(0, number=1, least=1, wanted=5)
        await table.exchange(1, number=1, least=10, wanted=10)
        key = table.backend._keys[0].rpartition(":")[0]
        found = redis.say("KEYS", f"{key}:*")
        assert found.count(key.encode()) >= 4
        for name in table.backend._keys:
            if name.encode() in found:
                left = int(redis.say("PTTL", name)[1:])
                assert 0 < left < 3_000, name

    run(scenario)


def test_a_store_that_has_forgotten_all_learns_it_again_before_it_grants_anything(redis):
    async def scenario(tables):
        table = scripted(redis, per=0.2, limit=10)
        tables.append(table)
        lease, other = (LocalLease(f"x{n}", limit=10, life=0.004, keep=0.2, size=4) for n in range(2))

        async def ask(holder, needed):
            holder.needed = needed
            request = holder.ask(time.monotonic())
            grant = await table.backend.exchange(holder, request, 10)
            holder.take(request, grant, time.monotonic())
            return grant

        assert (await ask(lease, 4)).units == 4
        lease.book(4, time.monotonic())
        assert (await ask(other, 4)).units == 4
        other.book(4, time.monotonic())
        for name in table.backend._keys:
            redis.say("DEL", name)
        assert (await ask(lease, 4)).units == 0  # held, so that the other can tell what it has used
        known = await ask(other, 4)
        assert (known.units, known.room) == (0, 2)
        while not (await ask(lease, 4)).units:
            await asyncio.sleep(0.01)

    run(scenario)
