"""Record a run through two quotas and some failures, and draw it.

    pip install 'rxllm[plot]'
    python examples/picture.py [FILE]     # run.png in a folder of its own, unless you name a file

The provider is simulated: it costs nothing and needs no key. At first the limit of attempts at a time is what limits;
after a quarter of the time it is raised, and then the quota of requests is. Half-way the provider halves its quota of
tokens, and says so only in the headers of its replies: from then on that one is.
"""

import argparse
import itertools
import tempfile
import time
from pathlib import Path

from reactivex import operators as ops

import rxllm
from rxllm.telemetry import Recording
from rxllm.testing import Latency, ServerQuota, SimulatedProvider

NARROW, WIDE = 12, 32  # attempts at a time: at first, and later


def main() -> None:
    """Run the pipeline for some seconds, and draw what the gate did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", nargs="?", type=Path, help="where the picture goes: .png, .svg or .pdf")
    parser.add_argument("--seconds", type=float, default=7.0, help="leave after so long (%(default)s)")
    options = parser.parse_args()
    file: Path = options.file or Path(tempfile.mkdtemp()) / "run.png"

    settings = {
        "latency": Latency(base=0.05, per_token=0.004, sigma=0.4),
        "requests": ServerQuota(150, per=1),
        "tokens": ServerQuota(9_000, per=1),
        "charge": "actual",
        "faults": {"500": 0.03, "503": 0.01, "429": 0.003},
        "fault_retry_after": 0.2,
    }
    later = (options.seconds / 2, {"tokens": ServerQuota(4_500, per=1)})
    gate = rxllm.Gate("150 requests/second", "9_000 tokens/second", concurrency=NARROW)
    with (
        SimulatedProvider(steps=[later], seed=1, **settings).start() as provider,
        rxllm.OpenAI("simulated", provider.url, api_key="any") as client,
        Recording(gate) as recording,
    ):
        prompts = (f"Tell a fact about the number {n}. " * (1 + n % 7) for n in itertools.count())
        facts = rxllm.from_iterable(prompts).pipe(
            rxllm.call(client, gate=gate, window=64), ops.map(lambda outcome: outcome.ok)
        )
        begun = time.monotonic()
        good = 0
        with rxllm.iterate(facts) as outcomes:
            for ok in outcomes:
                good += ok
                elapsed = time.monotonic() - begun
                if elapsed > options.seconds / 4 and gate.limit == NARROW:
                    gate.set(limit=WIDE, reason="more is possible")
                if elapsed > options.seconds:
                    print(f"{good:,} answers; limited by {gate.explain().binding}")
                    break
        recording.save(file)
    print(f"the picture is {file}")


if __name__ == "__main__":
    main()
