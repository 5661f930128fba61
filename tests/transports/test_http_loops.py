"""Whose loop the connections live on, how they end with it, and what a script sees of that."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import re
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator

import pytest

import rxllm
from rxllm.errors import ConfigError
from rxllm.testing.simulated import SimulatedProcess, SimulatedProvider
from rxllm.transports import HttpTransport


@pytest.fixture(scope="module")
def running() -> Iterator[SimulatedProcess]:
    with SimulatedProvider().start() as process:
        yield process


@pytest.fixture
def server(running: SimulatedProcess) -> SimulatedProcess:
    wait_until_closed(running, 0)  # what the test before has left is closed in the background
    return running


def ask(client: rxllm.OpenAI, prompts: list[str]) -> list[str]:
    return [outcome.text for outcome in rxllm.collect(rxllm.from_iterable(prompts).pipe(rxllm.call(client, window=1)))]


def made(server: SimulatedProcess) -> int:
    return server.statistics().connections_made


def open_connections(server: SimulatedProcess) -> int:
    """Return how many are open but for the one that asks."""
    return server.statistics().connections - 1


def wait_until_closed(server: SimulatedProcess, open_before: int) -> None:
    for _ in range(200):
        if open_connections(server) <= open_before:
            return
        threading.Event().wait(0.02)
    pytest.fail("a connection is left open")


def test_connections_are_reused_between_two_blocking_pipelines(server):
    with rxllm.OpenAI("m", server.url, api_key="any") as client:
        ask(client, ["a"])
        before = made(server)
        ask(client, ["b"])
        ask(client, ["c"])
        assert made(server) == before + 1  # that of the question itself


def test_closing_a_client_closes_its_connections_from_another_thread(server):
    before = open_connections(server)
    client = rxllm.OpenAI("m", server.url, api_key="any")
    ask(client, ["a"])
    assert open_connections(server) == before + 1
    client.close()
    client.close()
    wait_until_closed(server, before)


def test_a_client_that_is_forgotten_closes_its_connections_without_a_warning(server):
    before = open_connections(server)
    client = rxllm.OpenAI("m", server.url, api_key="any")
    ask(client, ["a"])
    del client
    gc.collect()
    wait_until_closed(server, before)


def test_connections_end_with_the_loop_of_asyncio_run(server):
    before = open_connections(server)
    client = rxllm.OpenAI("m", server.url, api_key="any")

    async def main() -> None:
        source = rxllm.from_iterable(["a", "b"])
        outcomes = await rxllm.acollect(source.pipe(rxllm.call(client)))
        assert all(outcome.ok for outcome in outcomes)
        assert open_connections(server) > before

    for _ in range(3):
        asyncio.run(main())
        wait_until_closed(server, before)
    client.close()


def test_one_client_serves_two_loops_at_the_same_time_each_with_its_own_connections(server):
    client = rxllm.OpenAI("m", server.url, api_key="any")
    both = threading.Barrier(2, timeout=20)
    failed: list[BaseException] = []

    async def main() -> None:
        for n in range(20):
            both.wait()
            (outcome,) = await rxllm.acollect(rxllm.from_iterable([f"{n}"]).pipe(rxllm.call(client)))
            assert outcome.ok

    def work() -> None:
        try:
            asyncio.run(main())
        except BaseException as error:
            failed.append(error)
            raise

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    client.close()


def test_async_with_closes_before_it_returns(server):
    before = open_connections(server)

    async def main() -> None:
        async with rxllm.OpenAI("m", server.url, api_key="any") as client:
            await rxllm.acollect(rxllm.from_iterable(["a"]).pipe(rxllm.call(client)))
        wait_until_closed(server, before)  # blocks the loop: nothing can close it in the background
        with pytest.raises(ConfigError, match="closed"):
            client.send(rxllm.chat("b"))

    asyncio.run(main())


def test_a_transport_is_not_pickled_as_it_may_hold_a_key():
    with pytest.raises(ConfigError, match="key"):
        pickle.dumps(HttpTransport("http://host/v1", {"Authorization": "Bearer sk-marker-0123456789"}))


# scripts

PRELUDE = """
import asyncio, os, signal, sys, threading
import rxllm

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its jobs in the background ignore it
client = rxllm.OpenAI("m", sys.argv[1], api_key="any")

def say(*words):
    print(*words, flush=True)

def prompts():
    n = 0
    while True:
        n += 1
        yield f"prompt {n}"
"""


def script(body: str, url: str) -> tuple[int, list[str], str]:
    """Run a script as its user does, with every warning on; return its exit code, lines and errors."""
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-W", "error", "-c", textwrap.dedent(PRELUDE) + textwrap.dedent(body), url],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    slow = re.compile(r"Executing <.*> took \d+\.\d+ seconds\n")  # asyncio's word on a busy machine
    return done.returncode, done.stdout.splitlines(), slow.sub("", done.stderr)


def test_a_script_that_closes_nothing_ends_without_a_word(server):
    before = open_connections(server)
    code, lines, errors = script(
        """
        say([outcome.ok for outcome in rxllm.collect(rxllm.from_iterable(["a", "b"]).pipe(rxllm.call(client)))])
        """,
        server.url,
    )
    assert (code, lines, errors) == (0, ["[True, True]"], "")
    wait_until_closed(server, before)


def test_a_script_that_leaves_the_loop_early_ends_without_a_word(server):
    code, lines, errors = script(
        """
        with rxllm.iterate(rxllm.from_iterable(prompts()).pipe(rxllm.call(client))) as outcomes:
            for outcome in outcomes:
                say(outcome.ok)
                break
        client.close()
        """,
        server.url,
    )
    assert (code, lines, errors) == (0, ["True"], "")


def test_a_script_under_asyncio_run_that_closes_nothing_ends_without_a_word(server):
    code, lines, errors = script(
        """
        async def main():
            async for outcome in rxllm.aiterate(rxllm.from_iterable(prompts()).pipe(rxllm.call(client))):
                say(outcome.ok)
                break
        asyncio.run(main())
        """,
        server.url,
    )
    assert (code, lines, errors) == (0, ["True"], "")


@pytest.mark.skipif(sys.platform == "win32", reason="Ctrl-C is no signal there")
def test_ctrl_c_during_calls_that_stall_ends_with_keyboard_interrupt_only(server):
    with SimulatedProvider(script=[None], faults={"stall": 1.0}).start() as stalling:
        code, lines, errors = script(
            """
            def interrupt():
                os.kill(os.getpid(), signal.SIGINT)

            calls = rxllm.from_iterable(prompts()).pipe(rxllm.call(client, window=8))
            with rxllm.iterate(calls, grace=0.05) as outcomes:
                for outcome in outcomes:
                    say(outcome.ok)
                    threading.Timer(0.1, interrupt).start()
            """,
            stalling.url,
        )
        wait_until_closed(stalling, 0)
    assert lines == ["True"]
    assert code == -signal.SIGINT
    assert errors.splitlines()[-1] == "KeyboardInterrupt"
    assert "Unclosed" not in errors
    assert "Warning" not in errors
    assert "never" not in errors
    assert "pending" not in errors
