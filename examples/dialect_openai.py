"""OpenAI's dialect: a model that calls your function, answers that are objects, and one that is shown as it comes.

python examples/dialect_openai.py       # asks a simulated provider: costs nothing, needs no key

export OPENAI_API_KEY=...               # asks a real one, or any other that speaks the same
python examples/dialect_openai.py --url https://api.openai.com/v1 --model gpt-4o-mini
"""

import argparse
from collections.abc import Iterator

import msgspec
from reactivex import operators as ops

import rxllm
from rxllm.testing import SimulatedProvider

CITIES = ["Oslo", "Lima", "Nairobi"]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look up the weather of a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


class City(msgspec.Struct):
    """What is wanted to know of a city."""

    name: str
    country: str
    inhabitants: int


# A model that calls a function


def weather(city: str) -> str:
    """Look up the weather."""
    return f"{city}: {len(city)} degrees, and rain"


def questions() -> Iterator[rxllm.Request]:
    """Ask what can only be answered with a look at the weather."""
    for city in CITIES:
        yield rxllm.chat(f"What do I wear in {city} today?", id=city, tools=[WEATHER], tool_choice="required")


def is_good(outcome: rxllm.Outcome[str]) -> bool:
    """Say whether there is an answer to go on with."""
    return outcome.ok


def with_results(outcome: rxllm.Outcome[str]) -> rxllm.Request:
    """Call what the model wants called; return the next turn of the conversation."""
    reply, asked = outcome.unwrap(), outcome.request
    wanted = reply.extra["choices"][0]["message"]
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": weather(**call.decoded())} for call in reply.tool_calls
    ]
    return rxllm.Request(body={"messages": [*asked.body["messages"], wanted, *results]}, id=asked.id)


def tools(client: rxllm.OpenAI, gate: rxllm.Gate) -> None:
    """Have two turns with the model for each question: it calls, then it answers."""
    stage = rxllm.call(client, gate=gate)
    pipeline = rxllm.from_iterable(questions()).pipe(stage, ops.filter(is_good), ops.map(with_results), stage)
    with rxllm.iterate(pipeline) as outcomes:
        for outcome in outcomes:
            print(f"{outcome.request.id}: {outcome.text if outcome.ok else outcome.error}")


# Answers that are objects


def objects(client: rxllm.OpenAI[City], gate: rxllm.Gate) -> None:
    """Ask for cities as a type; what does not fit is asked for again, with the reason."""
    prompts = rxllm.from_iterable(f"Describe the city {city}." for city in CITIES)
    with rxllm.iterate(prompts.pipe(rxllm.call(client, gate=gate))) as outcomes:
        for outcome in outcomes:
            print(outcome.value if outcome.ok else outcome.error)


# An answer that is shown as it comes


def live(client: rxllm.OpenAI, gate: rxllm.Gate) -> None:
    """Show an answer while it is made; one that breaks off is begun again."""

    def show(_request: rxllm.Request, piece: rxllm.Chunk | rxllm.Restarted) -> None:
        print("\n(once more)\n" if isinstance(piece, rxllm.Restarted) else piece.text, end="", flush=True)

    prompt = rxllm.from_iterable(["Tell a very short story: a lighthouse keeper finds a bottle on the beach."])
    for outcome in rxllm.collect(prompt.pipe(rxllm.call(client, gate=gate, on_chunk=show))):
        print(f"\n{outcome.usage.output_tokens} tokens" if outcome.ok else f"\n{outcome.error}")


def main() -> None:
    """Ask a real provider if there is a URL, else a simulated one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="base URL of a real provider, up to and including /v1")
    parser.add_argument("--model", default="simulated")
    chosen = parser.parse_args()
    if chosen.url is None:
        with SimulatedProvider(latency=0.05, chunk_seconds=0.01, script=["503"]).start() as provider:
            run(chosen.model, provider.url, "none")
    else:
        run(chosen.model, chosen.url, None)


def run(model: str, url: str, key: str | None) -> None:
    """Show all three; they share the quota of one key."""
    gate = rxllm.Gate("500 requests/minute")
    with (
        rxllm.OpenAI(model, url, api_key=key) as texts,
        rxllm.OpenAI(model, url, api_key=key, output=City) as cities,
    ):
        tools(texts, gate)
        objects(cities, gate)
        live(texts, gate)


if __name__ == "__main__":
    main()
