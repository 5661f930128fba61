"""What the benchmark runs for a quota that is shared through Redis: the store, some processes, and the judgement."""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import shutil
import socket
import subprocess
import tempfile
import time
from typing import TYPE_CHECKING, NamedTuple

from _http import MODEL, same_loop
from _quota import CHARGED, JITTER, is_installed, prompts

import rxllm
from rxllm.policies.store import Store
from rxllm.testing import Latency, ServerQuota, SimulatedProvider

if TYPE_CHECKING:
    from collections.abc import Iterator
    from multiprocessing.process import BaseProcess

    from rxllm.testing.simulated import Log

SERVICE = Latency(base=0.2, sigma=0.5)
HOST = "127.0.0.1"
PATIENCE = 10.0  # seconds for the store to start or to end


class Sharing(NamedTuple):
    """Several processes that share a quota of requests."""

    processes: int
    limit: int  # per window, for all together
    per: float  # seconds
    windows: int  # that count, after the first
    start: float  # seconds for all processes to be ready
    kill: float  # seconds into the window after those, when one process is killed


class Shared(NamedTuple):
    """What the server saw of them."""

    windows: list[float]  # shares of the limit, of those after the first until one process is killed
    peak: int  # the most in any window
    refused: int
    arrivals: int
    calls: int  # admitted while the round trips were counted
    round_trips: int
    scripts: int  # of the commands: how often a script was run
    killed: float  # share of the limit: of the window in which one process was killed
    after: float  # the same, of the next window


def free_port() -> int:
    """Return a port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def redis_server() -> Iterator[int]:
    """Run a Redis that keeps nothing on disk; yield its port."""
    binary = shutil.which("redis-server")
    assert binary is not None
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--bind", HOST, "--port", str(port), "--save", "", "--appendonly", "no", "--dir", folder]
        process = subprocess.Popen([binary, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            last = time.monotonic() + PATIENCE
            while True:
                with contextlib.suppress(OSError):
                    info(port)
                    break
                assert process.poll() is None, "redis-server ended"
                assert time.monotonic() < last, "redis-server does not answer"
                time.sleep(0.05)
            yield port
        finally:
            process.terminate()
            process.wait(PATIENCE)


def info(port: int) -> dict[str, str]:
    """Return what Redis says of itself; that takes one read on a connection of its own."""
    with socket.create_connection((HOST, port), PATIENCE) as connection:
        connection.sendall(b"INFO everything\r\n")
        stream = connection.makefile("rb")
        size = int(stream.readline()[1:])
        text = stream.read(size).decode()
    return dict(line.split(":", 1) for line in text.splitlines() if ":" in line)


def round_trips(before: dict[str, str], after: dict[str, str]) -> int:
    """Return how often a client sent something, whatever commands were in it: so often Redis read from a socket."""
    return int(after["total_reads_processed"]) - int(before["total_reads_processed"]) - 1  # ours


def scripts(before: dict[str, str], after: dict[str, str]) -> int:
    """Return how often a script was run."""

    def total(said: dict[str, str]) -> int:
        stats = (said.get(f"cmdstat_{name}", "calls=0,").partition(",")[0] for name in ("eval", "evalsha", "fcall"))
        return sum(int(stat.removeprefix("calls=")) for stat in stats)

    return total(after) - total(before)


def ask_for_ever(number: int, url: str, store: str, sharing: Sharing, begin: float) -> None:
    """Run a pipeline without an end: the process is killed."""

    async def go() -> None:
        quota = rxllm.Quota(sharing.limit, per=sharing.per, store=Store(store, name="benchmark"))
        with rxllm.Gate(quota) as gate:
            async with rxllm.OpenAI(MODEL, url, api_key="any") as client:
                requests = (rxllm.chat(prompt, max_tokens=64) for prompt in prompts(number))
                stream = rxllm.from_iterable(requests).pipe(rxllm.call(client, gate=gate, window=1_024))
                await asyncio.sleep(begin - time.monotonic())
                async with rxllm.aiterate(stream) as outcomes:
                    async for _ in outcomes:
                        pass

    with asyncio.Runner(loop_factory=same_loop()) as runner:
        runner.run(go())


def measure_shared(sharing: Sharing) -> Shared:
    """Run all processes, kill one with signal 9 in the window after those that count, and judge by the server's log."""
    spawning = multiprocessing.get_context("spawn")
    quota = ServerQuota(sharing.limit, sharing.per)
    provider = SimulatedProvider(requests=quota, latency=SERVICE, path_jitter=JITTER)
    with redis_server() as port, provider.start() as server:
        begin = time.monotonic() + sharing.start
        rest = (server.url, f"redis://{HOST}:{port}/0", sharing, begin)
        processes = [
            spawning.Process(target=ask_for_ever, args=(number, *rest), daemon=True)
            for number in range(sharing.processes)
        ]
        try:
            for process in processes:
                process.start()
            sleep_until(begin + sharing.per)
            assert all(process.is_alive() for process in processes), "a client has ended"
            before, first = info(port), time.monotonic()
            sleep_until(begin + (sharing.windows + 1) * sharing.per + sharing.kill)
            after, last = info(port), time.monotonic()
            processes[0].kill()
            sleep_until(begin + (sharing.windows + 3) * sharing.per + sharing.kill)
            assert all(process.is_alive() for process in processes[1:]), "a client has ended"
            log = server.log()
        finally:
            for process in processes:
                end(process)
    return judge_shared(log, sharing, (first, last), round_trips(before, after), scripts(before, after))


def judge_shared(log: Log, sharing: Sharing, counted: tuple[float, float], trips: int, scripted: int) -> Shared:
    """Say how much was admitted when; `counted` is when the round trips were counted, from when to when."""
    assert log.dropped == 0
    rows = list(log)
    admitted = [row.arrived for row in rows if row.admitted]
    sums = [0.0] * (sharing.windows + 2)
    for at in admitted:
        window = int((at - admitted[0]) // sharing.per) - 1
        if 0 <= window < len(sums):
            sums[window] += 1 / sharing.limit
    return Shared(
        windows=sums[: sharing.windows],
        peak=log.peak(sharing.per),
        refused=sum(row.reason in CHARGED for row in rows),
        arrivals=len(rows),
        calls=sum(counted[0] <= at < counted[1] for at in admitted),
        round_trips=trips,
        scripts=scripted,
        killed=sums[-2],
        after=sums[-1],
    )


def sleep_until(at: float) -> None:
    """Sleep until a moment of the monotonic clock."""
    time.sleep(max(0.0, at - time.monotonic()))


def end(process: BaseProcess) -> None:
    """End a child, started or not."""
    if process.pid is not None:
        process.kill()
        process.join(PATIENCE)


def missing() -> str | None:
    """Return why it cannot be measured here; None if it can."""
    if shutil.which("redis-server") is None:
        return "the program redis-server"
    return None if is_installed("redis") else "the package redis"
