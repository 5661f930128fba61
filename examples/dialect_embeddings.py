"""Embeddings: a vector for each text, many texts in a request, and the nearest ones to each.

python examples/dialect_embeddings.py   # asks a simulated provider: costs nothing, needs no key, means nothing

export OPENAI_API_KEY=...               # asks a real one, or any other that speaks the same
python examples/dialect_embeddings.py --url https://api.openai.com/v1 --model text-embedding-3-small
"""

from __future__ import annotations

import argparse
import builtins
from array import array
from operator import mul

from reactivex import operators as ops

import rxllm
from rxllm.testing import SimulatedProvider

BATCH = 20  # texts in a request
SHOWN = 5


def texts() -> dict[str, str]:
    """Return the first paragraph of what is documented of each built-in function and class."""
    documented = {name: getattr(builtins, name).__doc__ for name in dir(builtins) if name[0].islower()}
    return {name: text.partition("\n\n")[0] for name, text in documented.items() if text}


def batch(some: list[tuple[str, str]]) -> rxllm.Request:
    """Ask for the vectors of some texts; whose they are is carried along, and not sent."""
    names, inputs = zip(*some, strict=True)
    return rxllm.Request(body={"input": inputs}, operation="embeddings", meta=names)


def vectors(client: rxllm.OpenAI[list[array[float]]]) -> dict[str, array[float]]:
    """Return the vector of each text."""
    stage = rxllm.call(client, gate=rxllm.Gate("500 requests/minute"))
    pipeline = rxllm.from_iterable(texts().items()).pipe(ops.buffer_with_count(BATCH), ops.map(batch), stage)
    found: dict[str, array[float]] = {}
    with rxllm.iterate(pipeline) as outcomes:
        for outcome in outcomes:
            found.update(zip(outcome.request.meta, outcome.value, strict=True))
    return found


def run(model: str, url: str, key: str | None) -> None:
    """Print what is nearest to what: the vectors have length 1, so their product is how alike they are."""
    with rxllm.OpenAI(model, url, api_key=key, operation="embeddings") as client:
        found = vectors(client)
    size = len(next(iter(found.values())))
    print(f"{len(found)} vectors of {size} numbers")
    for name in list(found)[:SHOWN]:
        alike = {other: sum(map(mul, found[name], found[other])) for other in found if other != name}
        nearest = max(alike, key=lambda other: alike[other])
        print(f"{name} is most like {nearest} ({alike[nearest]:.2f})")


def main() -> None:
    """Ask a real provider if there is a URL, else a simulated one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="base URL of a real provider, up to and including /v1")
    parser.add_argument("--model", default="simulated")
    chosen = parser.parse_args()
    if chosen.url is None:
        with SimulatedProvider(latency=0.02, script=["500"]).start() as provider:
            run(chosen.model, provider.url, "none")
    else:
        run(chosen.model, chosen.url, None)


if __name__ == "__main__":
    main()
