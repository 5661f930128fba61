"""Kill it, run it again: what was answered is not asked again, and nothing is lost.

    python examples/resume.py [--requests 600] [--kills 3]

The questions are asked by a process of its own, which is killed (kill -9) at random moments and started again. The
journal that it writes is the result, and all that it knows when it starts. The log of the server, a third process,
says what was asked how often.

    python examples/resume.py --run haikus.jsonl --url http://127.0.0.1:8080/v1

asks only: kill it yourself.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import rxllm
from rxllm.testing import Latency, SimulatedProvider

WIDTH = 16  # requests on the wire


def ask(path: Path, url: str, count: int) -> None:
    """Ask all that is not in the journal."""
    client = rxllm.OpenAI("simulated", url, api_key="any")
    questions = (rxllm.chat(f"Write a haiku about the number {n}.", id=f"{n}", user=f"{n}") for n in range(count))
    asking = rxllm.call(client, gate=rxllm.Gate(concurrency=WIDTH))
    with rxllm.iterate(rxllm.from_iterable(questions).pipe(rxllm.journal(path, asking))) as outcomes:
        answered = sum(outcome.ok for outcome in outcomes)
    print(f"{answered} of {count} answered, in this run and those before")


def ask_until(path: Path, url: str, count: int, rows: float) -> None:
    """Let a process ask, and kill it some moments after so many rows are in the journal."""
    command = [sys.executable, __file__, "--run", str(path), "--url", url, "--requests", str(count)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as child:  # noqa: S603  this file
        while child.poll() is None and lines(path) < rows:
            time.sleep(0.002)
        time.sleep(random.uniform(0.0, 0.02))
        child.kill()


def lines(path: Path) -> int:
    """Return how many rows there are."""
    return path.read_bytes().count(b"\n") if path.exists() else 0


def main() -> None:
    """Ask, and kill who asks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=600, help="questions to ask")
    parser.add_argument("--kills", type=int, default=3, help="how often who asks is killed")
    parser.add_argument("--run", type=Path, metavar="FILE", help="ask only, with this journal")
    parser.add_argument("--url", help="of the server to ask; with --run")
    options = parser.parse_args()
    if options.run is not None:
        ask(options.run, options.url, options.requests)
        return

    with (
        tempfile.TemporaryDirectory() as folder,
        SimulatedProvider(latency=Latency(0.02, sigma=0.5)).start() as provider,
    ):
        path = Path(folder) / "haikus.jsonl"
        repeated = []
        for number in range(options.kills):
            rows = options.requests * (number + random.random()) / (options.kills + 1)
            ask_until(path, provider.url, options.requests, rows)
            kept = {json.loads(line)["custom_id"] for line in path.read_bytes().split(b"\n")[:-1]}
            repeated.append(len({arrival.marker for arrival in provider.log()} - kept))
            print(f"killed with {len(kept):>5,} answers in the journal and {repeated[-1]:>3} on the way")
        ask(path, provider.url, options.requests)

        asked = Counter(arrival.marker for arrival in provider.log())
        kept = Counter(json.loads(line)["custom_id"] for line in path.read_bytes().splitlines())
        print(f"asked {asked.total():,} times: {asked.total() - len(asked)} more than there are questions")
        print(f"most that one kill had on the way: {max(repeated, default=0)} of {WIDTH}")
        print(f"questions without an answer: {options.requests - len(kept)}; rows twice: {kept.total() - len(kept)}")


if __name__ == "__main__":
    main()
