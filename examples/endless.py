"""Ten million items, two asynchronous stages, a slow consumer, flat memory; left early, nothing stays behind.

    python examples/endless.py [--items 10_000_000] [--seconds 5]

A generator of ten million items is pulled only as fast as the `for` loop below uses what comes out of it. Watch
`pulled` stay a little ahead of `delivered`, and the memory stay where it is.
"""

import argparse
import asyncio
import threading
import time
from collections.abc import Iterator

import rxllm
from rxllm.operators import flat_map


class Numbers:
    """A generator that knows how far it was pulled, and whether it was closed."""

    def __init__(self, items: int) -> None:
        self.items = items
        self.pulled = 0
        self.closed = False

    def __iter__(self) -> Iterator[int]:
        """Count up, and count what is pulled."""
        try:
            for number in range(self.items):
                self.pulled += 1
                yield number
        finally:
            self.closed = True


class Stage:
    """An asynchronous step that takes a moment, and counts what is in progress."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.active = 0

    async def __call__(self, number: int) -> int:
        """Take the moment."""
        self.active += 1
        try:
            await asyncio.sleep(self.seconds)
            return number + 1
        finally:
            self.active -= 1


def resident_mb() -> float:
    """Return this process's resident memory in MB; nan where /proc does not exist."""
    try:
        with open("/proc/self/status", encoding="ascii") as status:  # noqa: PTH123  not a file of ours
            return next(int(line.split()[1]) / 1024 for line in status if line.startswith("VmRSS"))
    except OSError:
        return float("nan")


def main() -> None:
    """Run the pipeline for a while and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--items", type=int, default=10_000_000, help="items in the generator")
    parser.add_argument("--seconds", type=float, default=5.0, help="leave the loop after this long")
    options = parser.parse_args()

    numbers, draft, check = Numbers(options.items), Stage(0.01), Stage(0.02)
    stream = rxllm.from_iterable(numbers).pipe(
        flat_map(draft, window=32),
        flat_map(check, window=64),
    )
    begun = reported = time.monotonic()
    delivered = 0
    with rxllm.iterate(stream) as outcomes:
        for delivered, _ in enumerate(outcomes, start=1):
            time.sleep(0.0005)  # a slow consumer
            now = time.monotonic()
            if now - reported >= 1:
                reported = now
                print(
                    f"pulled {numbers.pulled:>7,}  delivered {delivered:>7,}  ahead {numbers.pulled - delivered:>4}  "
                    f"in progress {draft.active:>2} + {check.active:>2}  memory {resident_mb():.0f} MB"
                )
            if now - begun >= options.seconds:
                break  # leaving the block cancels everything

    print(f"left after {delivered:,} of {options.items:,} items; {numbers.pulled:,} were pulled")
    for name, left in {
        "calls in progress": draft.active + check.active,
        "generator open": int(not numbers.closed),
        "threads besides the loop's": threading.active_count() - 2,
    }.items():
        print(f"{name}: {left}")


if __name__ == "__main__":
    main()
