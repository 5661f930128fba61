"""Anthropic's dialect: rules that all requests share and the server keeps, answers streamed, usage to the token.

    python examples/dialect_anthropic.py    # asks a simulated provider: costs nothing, needs no key

    export ANTHROPIC_API_KEY=...            # asks the real one
    python examples/dialect_anthropic.py --url https://api.anthropic.com/v1 --model claude-haiku-4-5

A request's body is in the vendor's own form and goes as it is; `rxllm.chat(…, system=…)` is put into it too.
"""

import argparse
import sys
from collections.abc import Iterator

import rxllm
from rxllm.testing import SimulatedProvider

RULES = "You sort mails to a shop. Answer with one word: order, return, invoice or other."
MAILS = {
    "kettle": "The kettle that came on Monday does not switch off. I want my money back.",
    "paper": "Please send us another twenty reams of the same paper.",
    "vat": "Our number is missing on the invoice of March. Can you correct it?",
    "poem": "Roses are red, violets are blue.",
}


def requests() -> Iterator[rxllm.Request]:
    """Ask for each mail; the rules are marked to be cached, so they are read anew and paid for once."""
    rules = [{"type": "text", "text": RULES, "cache_control": {"type": "ephemeral"}}]
    for name, mail in MAILS.items():
        asked = {"system": rules, "messages": [{"role": "user", "content": mail}], "max_tokens": 100}
        yield rxllm.Request(body=asked, id=name)


def run(model: str, url: str, key: str | None) -> None:
    """Print what each mail is, and what it took."""
    pieces = dict.fromkeys(MAILS, 0)

    def count(request: rxllm.Request, piece: rxllm.Chunk | rxllm.Restarted) -> None:
        pieces[str(request.id)] = 0 if isinstance(piece, rxllm.Restarted) else pieces[str(request.id)] + 1

    total = rxllm.Usage()
    gate = rxllm.Gate("50 requests/minute", "40_000 input_tokens/minute", "8_000 output_tokens/minute")
    with rxllm.Anthropic(model, url, api_key=key) as client:
        stage = rxllm.call(client, gate=gate, on_chunk=count)  # to watch the pieces is to have them streamed
        with rxllm.iterate(rxllm.from_iterable(requests()).pipe(stage)) as outcomes:
            for outcome in outcomes:
                total += outcome.usage
                if outcome.reply is None:
                    print(f"{outcome.request.id}: {type(outcome.error).__name__}: {outcome.error}", file=sys.stderr)
                    continue
                ended, name = outcome.reply.finish_reason, str(outcome.request.id)
                print(f"{name}: {outcome.text!r} in {pieces[name]} pieces, ended by {ended}")
    print(f"{total.input_tokens} tokens in, {total.cached_tokens} of them from the cache, {total.output_tokens} out")


def main() -> None:
    """Ask the real provider if there is a URL, else a simulated one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="base URL of the real provider, up to and including /v1")
    parser.add_argument("--model", default="simulated")
    chosen = parser.parse_args()
    if chosen.url is None:
        with SimulatedProvider(latency=0.05, chunk_seconds=0.002, script=["529", "truncated"]).start() as provider:
            run(chosen.model, provider.url, "none")
    else:
        run(chosen.model, chosen.url, None)


if __name__ == "__main__":
    main()
