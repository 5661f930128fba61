"""journal: random runs of one file, left early, torn, compacted, with failures that heal; judged by what was asked."""

import asyncio
import random
from collections import Counter

import msgspec
import pytest

import rxllm
from rxllm import Request
from rxllm.errors import AuthError, InvalidRequestError
from rxllm.stores.journal import compact


class World:
    """Requests of which some are equal and some fail, and the runs that ask them."""

    def __init__(self, seed, path):
        self.draw = random.Random(seed)
        self.path = path
        count = self.draw.choice([1, 3, 10, 40, 120])
        self.requests = [self.request(number) for number in range(count)]
        self.wanted = Counter(request.body for request in self.requests)
        self.fate = {body: self.draw.choice(["good", "good", "good", "bad", "no-key"]) for body in self.wanted}
        self.asked = Counter()
        self.client = rxllm.function(self.answer)

    def request(self, number):
        kind = self.draw.random()
        if kind < 0.3:
            return Request(body=f"b{self.draw.randrange(5)}", operation="item")  # one of several that are equal
        return Request(body=f"b{number}", operation="item", id=f"id{number}" if kind < 0.7 else None)

    async def answer(self, body):
        self.asked[body] += 1
        await asyncio.sleep(self.draw.choice([0, 0, 0.001]))
        if self.fate[body] != "good":
            raise InvalidRequestError("no") if self.fate[body] == "bad" else AuthError("no key")
        return body.upper()

    def kept(self):
        """Return how many good rows the file has of each body."""
        last = {}
        for line in self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else ():
            if line.endswith(b"\n"):
                row = msgspec.json.decode(line)
                last[row["id"]] = row
        good = [row for row in last.values() if row["rxllm"].get("ok", True) and not row["rxllm"].get("again")]
        return Counter(row["response"]["body"].lower() for row in good)

    async def run(self):
        """Run once; see that nothing is lost, nothing good is asked again, and the order holds."""
        draw, before = self.draw, self.kept()
        ordered, leave = draw.random() < 0.5, draw.choice([None, None, 1, 5])
        calls = rxllm.call(self.client, window=draw.choice([1, 3, 16, 64]), ordered=ordered)
        inside = draw.choice([calls, calls, rxllm.budget(calls, requests=1_000)])
        stage = rxllm.journal(self.path, inside, retry_failed=draw.random() < 0.3)
        self.asked.clear()
        outcomes = []
        async with rxllm.aiterate(rxllm.from_iterable(self.requests).pipe(stage)) as stream:
            async for outcome in stream:
                outcomes.append(outcome)
                if len(outcomes) == leave:
                    break
        assert all(outcome.value == outcome.request.body.upper() for outcome in outcomes if outcome.ok)
        for body, times in self.asked.items():
            assert times + before[body] <= self.wanted[body]
        if leave is None:
            assert Counter(outcome.request.body for outcome in outcomes) == self.wanted
            assert not ordered or [outcome.request for outcome in outcomes] == self.requests
        after = self.kept()
        assert before <= after
        assert Counter(outcome.request.body for outcome in outcomes if outcome.ok) <= after

    def between(self):
        """Do what may happen between two runs."""
        draw, before = self.draw, self.kept()
        if draw.random() < 0.3:
            compact(self.path)
            assert self.kept() == before
        if draw.random() < 0.3 and self.path.stat().st_size:
            data = self.path.read_bytes()
            last = data.splitlines(keepends=True)[-1]
            self.path.write_bytes(data[: -draw.randrange(1, len(last))])
        if draw.random() < 0.3:
            self.fate = dict.fromkeys(self.fate, "good")


@pytest.mark.parametrize("seed", range(25))
def test_whatever_happens_between_runs_nothing_is_lost_and_nothing_good_is_asked_again(seed, tmp_path):
    world = World(seed, tmp_path / "results.jsonl")
    for _ in range(4):
        asyncio.run(world.run())
        world.between()
