"""One quota for all processes: two pipelines share it through Redis, and the server sees no window over it.

    python examples/shared_quota.py [--redis redis://localhost:6379] [--seconds 10]

Two processes send requests as fast as one quota lets them. Neither knows of the other; the quota is in Redis, and each
takes a small part of it at a time. The provider, a process too, keeps a log of what arrived when: it is the judge.
Without --redis a redis-server is started for the time of the example.
"""

import argparse
import asyncio
import contextlib
import itertools
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import reactivex as rx
from reactivex import operators as ops

import rxllm
from rxllm.testing import SimulatedProvider

LIMIT, PER = 400, 2.0  # requests, seconds
PROCESSES = 2


# One of the processes


def prompts() -> Iterator[rxllm.Request]:
    """Ask for ever."""
    for number in itertools.count():
        yield rxllm.chat(f"Write a haiku about the number {number}.", max_tokens=20)


async def work(url: str, store: str, seconds: float) -> None:
    """Run a pipeline behind the shared quota and print how far it came."""
    quota = rxllm.Quota(LIMIT, per=PER, store=store)  # all that differs from a quota of one's own
    answered = refused = 0
    with rxllm.Gate(quota, concurrency=64, headers=False) as gate:
        async with rxllm.OpenAI("simulated", url, api_key="any") as client:
            pipeline = rxllm.from_iterable(prompts()).pipe(
                rxllm.call(client, gate=gate), ops.take_until(rx.timer(seconds))
            )
            async for outcome in rxllm.aiterate(pipeline):
                answered += outcome.ok
        refused = gate.statistics().refused
        await asyncio.sleep(0)
    print(f"{answered} {refused}", flush=True)
    await asyncio.sleep(0.1)  # what is left of its share goes back


# All together


@contextlib.contextmanager
def redis(url: str | None) -> Iterator[str]:
    """Yield the URL of a Redis; without one, of a server that ends with the block."""
    if url is not None:
        yield url
        return
    program = shutil.which("redis-server")
    if program is None:
        sys.exit("redis-server is not installed: install it, or give the URL of a Redis with --redis")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        options = ["--bind", "127.0.0.1", "--port", str(port), "--save", "", "--appendonly", "no", "--dir", folder]
        with subprocess.Popen([program, *options], stdout=subprocess.DEVNULL) as server:  # noqa: S603  found above
            try:
                wait_for(port)
                yield f"redis://127.0.0.1:{port}"
            finally:
                server.terminate()


def wait_for(port: int) -> None:
    """Return when somebody listens there."""
    for _ in range(200):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    sys.exit("redis-server does not listen")


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--redis", metavar="URL", help="where a Redis is; default: one of its own")
    parser.add_argument("--seconds", type=float, default=10.0, help="how long it runs (%(default)s)")
    parser.add_argument("--work", metavar="URL", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Run the processes and judge them; return the exit status."""
    chosen = options()
    if chosen.work is not None:
        asyncio.run(work(chosen.work, chosen.redis, chosen.seconds))
        return 0
    with redis(chosen.redis) as store, SimulatedProvider(latency=0.05).start() as provider:
        command = [sys.executable, "-W", "error", __file__, "--redis", store, "--seconds", str(chosen.seconds)]
        processes = [
            subprocess.Popen([*command, "--work", provider.url], stdout=subprocess.PIPE, text=True)  # noqa: S603  itself
            for _ in range(PROCESSES)
        ]
        for number, process in enumerate(processes, 1):
            said, _ = process.communicate()
            if process.returncode:
                return process.returncode
            answered, refused = said.split()
            print(f"process {number}: {int(answered):,} answered, {refused} refused")
        peak = provider.peak(PER)
        arrived = provider.statistics().arrivals
    print(f"the server's log: {arrived:,} requests, at most {peak} in any {PER:g} s; the quota is {LIMIT}")
    return 0 if peak <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
