"""No streams: schedule calls of a function of your own, run them, and get the results in that order.

    python examples/runner.py           # asks a simulated provider: costs nothing, needs no key

    export OPENAI_API_KEY=...           # asks a real one, or any other that speaks the same
    python examples/runner.py --url https://api.openai.com/v1 --model gpt-4o-mini

The function is a plain one that knows nothing of quotas, threads or retries. Ctrl-C gives what there is so far, and the
next run goes on with the rest, which is what this does when it is pressed once.
"""

import argparse
import json
import os
import urllib.request
from collections import Counter
from typing import Any

from rxllm.presets import openai_chat_resources
from rxllm.runner import Runner
from rxllm.testing import ServerQuota, SimulatedProvider

WORDS = ["apple", "bridge", "cloud", "dust", "ember", "fog", "gravel", "hinge", "ink", "jar", "kite", "loam"]


def ask(url: str, model: str, key: str, messages: list[dict[str, str]], max_tokens: int = 40) -> dict[str, Any]:
    """Ask once, and return the answer as the server gave it."""
    request = urllib.request.Request(  # noqa: S310  the user's own URL
        f"{url}/chat/completions",
        json.dumps({"model": model, "messages": messages, "max_tokens": max_tokens}).encode(),
        {"Authorization": f"Bearer {key}", "Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        reply: dict[str, Any] = json.load(answer)
    return reply


def text_of(reply: dict[str, Any]) -> str:
    """Return what the model said."""
    return str(reply["choices"][0]["message"]["content"])


def run(url: str, model: str, key: str) -> None:
    """Ask for a sentence with each word, and print what came."""
    limits = openai_chat_resources(requests_per_minute=500, tokens_per_minute=30_000, model_max_len=8_000)
    runner = Runner(ask, limits, max_concurrent=8, validation=text_of, backoff_base=0.05)
    for word in WORDS:
        message = {"role": "user", "content": f"Write a sentence with the word {word}."}
        runner.schedule(url, model, key, [message])  # as one would call ask(…)
    results, exceptions = runner.run()
    if runner.interrupted:
        print(f"{sum(result is not None for result in results)} are done; the others follow:")
        results, exceptions = runner.run()
    for word, result in zip(WORDS, results, strict=True):
        print(f"{word}: {'failed' if result is None else text_of(result)}")
    failures = Counter(type(error).__name__ for tried in exceptions for error in tried)
    print(f"{len(results)} calls; tries that failed: {', '.join(f'{n} {name}' for name, n in failures.items()) or 0}")


def main() -> None:
    """Ask the real provider if there is a URL, else a simulated one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="base URL of the real provider, up to and including /v1")
    parser.add_argument("--model", default="simulated")
    chosen = parser.parse_args()
    if chosen.url is not None:
        run(chosen.url, chosen.model, os.environ["OPENAI_API_KEY"])
        return
    script = ["500", None, "empty", "hang_up"]
    quota = ServerQuota(30_000, per=60)
    with SimulatedProvider(latency=0.05, tokens=quota, charge="settled", script=script).start() as provider:
        run(provider.url, chosen.model, "none")


if __name__ == "__main__":
    main()
