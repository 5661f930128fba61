"""LLM Engine's dialect: completions of plain prompts, held to a schema or to a few words, whole or streamed.

python examples/dialect_llm_engine.py   # asks a simulated provider: costs nothing, needs no key

export LLM_ENGINE_BASE_PATH=...         # asks a server of your own, or Scale's with SCALE_API_KEY
python examples/dialect_llm_engine.py --model llama-3-8b-instruct
"""

import argparse
from collections.abc import Iterator
from typing import Any

import rxllm
from rxllm.testing import SimulatedProvider

REVIEWS = [
    "The lamp is bright, but it smells of glue.",
    "Arrived a day early. My children love it.",
    "Broke after a week; nobody answers the phone.",
]
MOODS = ["good", "bad", "mixed"]


def requests(**parameters: Any) -> Iterator[rxllm.Request]:
    """Ask for each review; parameters are the server's own, and checked before anything is sent."""
    for number, review in enumerate(REVIEWS):
        asked = {"prompt": f"Is this review good, bad or mixed?\n\n{review}\n\nAnswer:", **parameters}
        yield rxllm.Request(body=asked, id=f"review {number}", operation="completions")


def run(model: str, url: str | None, key: str | None) -> None:
    """Print a mood for each review, then a sentence on each, streamed."""
    gate = rxllm.Gate(concurrency=4)
    with rxllm.LLMEngine(model, url, api_key=key) as client:
        moods = requests(guided_choice=MOODS, max_new_tokens=5, temperature=0.0)
        with rxllm.iterate(rxllm.from_iterable(moods).pipe(rxllm.call(client, gate=gate))) as outcomes:
            for outcome in outcomes:
                print(f"{outcome.request.id}: {outcome.text if outcome.ok else outcome.error}")
        sentences = rxllm.from_iterable(requests(max_new_tokens=40, temperature=0.7))
        for outcome in rxllm.collect(sentences.pipe(rxllm.call(client, gate=gate, stream=True, ordered=True))):
            print(f"{outcome.text} ({outcome.usage.output_tokens} tokens)" if outcome.ok else outcome.error)


def main() -> None:
    """Ask a real server if there is a model, else a simulated one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name of the model's endpoint")
    chosen = parser.parse_args()
    if chosen.model is None:
        with SimulatedProvider(latency=0.05, script=["500", None, None, None, "error_midway"]).start() as provider:
            run("simulated", provider.origin, "none")
    else:
        run(chosen.model, None, None)


if __name__ == "__main__":
    main()
