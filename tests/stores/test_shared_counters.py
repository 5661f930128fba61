"""Quotas that are shared through the counters of `limits`: requests in fixed windows of whole seconds."""

import asyncio
import contextlib
import gc
import itertools
import time

import pytest

from rxllm.clock import loop_clock
from rxllm.errors import ConfigError
from rxllm.policies.quota import Quota
from rxllm.policies.store import Store
from rxllm.stores.backends import ROUNDED
from rxllm.stores.shared_quota import shared_meter

names = itertools.count()


async def spend(meter, seconds, units=10_000):
    """Return when each request started."""
    clock = loop_clock(asyncio.get_running_loop())
    woken = asyncio.Event()
    told = []
    meter.bind(clock, wake=woken.set, fail=told.append, tell=told.append)
    spent = []
    stop = clock.seconds() + seconds
    while (now := clock.seconds()) < stop and len(spent) < units:
        woken.clear()
        if meter.fits(1, now):
            meter.book(1, now)
            spent.append(now)
            continue
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(woken.wait(), max(0.001, min(meter.ready_at(1, now), stop) - now))
    assert not told, told
    return spent


def test_together_they_use_a_window_up_and_wait_for_the_next_one(memcached):
    quota = Quota(50, per=1, strategy="fixed", store=Store(f"memcached://{memcached.address}", name=f"n {next(names)}"))

    async def main():
        meters = [shared_meter(quota) for _ in range(3)]
        spent = sorted(at for each in await asyncio.gather(*(spend(meter, 2.4) for meter in meters)) for at in each)
        first = [at for at in spent if at < spent[0] + 1]
        assert 40 <= len(first) <= 50  # what somebody else took and did not use is lost with its window
        assert len(spent) > 50  # the next window
        assert min(at for at in spent if at not in first) >= spent[0] + 1
        requests = sum(meter.requests for meter in meters)
        assert requests < len(spent)
        for meter in meters:
            meter.close()
        await asyncio.sleep(0.05)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(main())
    gc.collect()


def test_what_is_in_hand_is_worth_nothing_when_its_window_is_over(memcached):
    store = Store(f"memcached://{memcached.address}", name=f"n {next(names)}")

    async def main():
        meter = shared_meter(Quota(200, per=5, strategy="fixed", store=store))
        (begun,) = await spend(meter, 5, 1)
        assert meter.fits(1, begun)
        assert not meter.fits(1, begun + 5 + ROUNDED)
        meter.close()
        await asyncio.sleep(0.05)

    asyncio.run(main())


def test_what_was_used_besides_is_counted(memcached):
    quota = Quota(
        10, per=30, strategy="fixed", store=Store(f"memcached://{memcached.address}", name=f"n {next(names)}")
    )

    async def main():
        first, second = shared_meter(quota), shared_meter(quota)
        await spend(first, 5, 2)
        now = time.monotonic()
        first.settle(first.book(1, now), 8, now)
        first.close()
        await asyncio.sleep(0.05)
        assert len(await spend(second, 0.2)) <= 1
        assert second.ready_at(1, now) - now <= 30 + ROUNDED
        second.close()
        await asyncio.sleep(0.05)

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        pytest.param({"strategy": "sliding"}, "strategy", id="a-sliding-window"),
        pytest.param({"strategy": "bucket"}, "strategy", id="a-bucket"),
        pytest.param({"unit": "tokens"}, "unit", id="tokens"),
        pytest.param({"per": 0.5}, "per", id="half-a-second"),
        pytest.param({"limit": 2.5}, "limit", id="half-a-request"),
    ],
)
@pytest.mark.parametrize("url", ["memcached://:secret@host:1", "mongodb://me:secret@host:1"])
def test_what_a_counter_cannot_keep_is_refused_at_once(url, fields, named):
    fields = {"limit": 5, "per": 1, "strategy": "fixed", **fields}
    quota = Quota(fields.pop("limit"), store=url, **fields)
    with pytest.raises(ConfigError, match=rf"^{named} must be that of whole requests") as caught:
        shared_meter(quota)
    assert "***@host:1" in str(caught.value)
    assert "secret" not in str(caught.value)
