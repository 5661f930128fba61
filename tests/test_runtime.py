"""Loops and the objects that belong to one."""

import asyncio
import gc
import random
import weakref

import pytest

from rxllm import clock, errors, runtime
from rxllm.testing import VirtualScheduler


def test_here_is_the_running_loop_and_else_the_loop_thread():
    async def main():
        return runtime.here().loop is asyncio.get_running_loop()

    assert asyncio.run(main())
    assert runtime.here() is runtime.background()


def test_a_loop_has_one_clock_and_a_closed_one_is_forgotten():
    async def main():
        loop = asyncio.get_running_loop()
        assert clock.loop_clock(loop) is clock.loop_clock(loop)
        return weakref.ref(loop)

    first = asyncio.run(main())
    asyncio.run(main())
    gc.collect()
    assert first() is None


def test_a_binding_names_both_loops_when_an_object_is_used_on_two():
    binding = runtime.Binding("this Feed")
    scheduler = VirtualScheduler()
    binding.acquire(scheduler)
    with pytest.raises(errors.ConfigError, match=r"this Feed is in use on <VirtualScheduler.*> and .*<asyncio loop"):
        binding.acquire(runtime.background())


def test_a_released_binding_is_free_for_another_loop():
    binding = runtime.Binding("this Feed")
    scheduler = VirtualScheduler()
    binding.acquire(scheduler)
    binding.acquire(scheduler)
    binding.release()
    with pytest.raises(errors.ConfigError):
        binding.acquire(runtime.background())
    binding.release()
    binding.acquire(runtime.background())
    assert binding.clock is runtime.background()


def test_a_callback_that_exits_does_not_end_the_loop_thread():
    def leave():
        raise SystemExit

    background = runtime.background()
    background.post(leave)
    done = []
    background.post(lambda: done.append(1))
    asyncio.run_coroutine_threadsafe(asyncio.sleep(0), background.loop).result(10)
    assert done == [1]


def test_a_post_to_a_closed_loop_is_dropped():
    loop = asyncio.new_event_loop()
    closed = clock.loop_clock(loop)
    loop.close()
    called = []
    closed.post(lambda: called.append(1))
    assert called == []


def test_seconds_are_virtual_under_a_virtual_scheduler_and_steady_without_one():
    scheduler = VirtualScheduler()
    scheduler.run(7.5)
    assert clock.seconds(scheduler) == 7.5
    assert clock.seconds(None) <= clock.seconds(None)


def test_uniform_draws_between_its_bounds():
    draws = {runtime.uniform(2.0, 3.0) for _ in range(50)}
    assert len(draws) > 1
    assert all(2.0 <= draw <= 3.0 for draw in draws)
    random.seed(0)  # the process-wide generator of others is not ours
    first = runtime.uniform(0, 1)
    random.seed(0)
    assert runtime.uniform(0, 1) != first
