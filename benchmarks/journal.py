"""What does it cost to keep each outcome in a file, and to go on where a run has stopped?

Cases, units and baselines:
added: µs of CPU that a journal adds to a request: its key, its line, its part of the one write a turn, and the way
    through. `share` is that by the CPU of a request in the plain loop over aiohttp (`json=`, `r.json()`, default
    session, 64 at a time) of the same run, round by round. Taken off is `without`: the same pipeline of calls that are
    answered in the next turn, eight in each, without a journal.
resume: µs of CPU a row to open a file, until the first request can be looked up. `ratio` is that by a loop over the
    lines of the same file that decodes the id and the key of each.
resume_asked, resume_replayed: µs of CPU a row of a whole run whose requests are all in the file: to make the requests,
    open the file, find each and skip it (`replay=False`); and the same with each outcome made again from its line and
    handed on. By the same loop, without a goal: `source` is what it costs to make the requests alone.
index: bytes that the index takes for a row.

First quartile, median, third. Rows are of 1 kB.
"""

from __future__ import annotations

import gc
import tempfile
import tracemalloc
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
from _bench import Drain, NextTurn, arguments, cpu_per_item, interleaved, quartiles, report
from _http import MODEL, Bare, prompt, requests

import rxllm
from rxllm.clock import wall
from rxllm.operators import flat_map
from rxllm.operators.journal import journal
from rxllm.policies.identity import digest, key_of
from rxllm.stores.index import Index
from rxllm.stores.journal import JournalFile
from rxllm.stores.rows import key_text, line_of
from rxllm.testing import SimulatedProvider

if TYPE_CHECKING:
    from collections.abc import Iterator

    from reactivex import Observable

ADDED, RESUME, INDEX = 0.05, 3.0, 12.0
LATENCY = 0.004  # seconds
WIDTH, TURN = 64, 8
ROW = 1_000  # bytes
USAGE = rxllm.Usage(input_tokens=30, output_tokens=25)


class Answered:
    """What `call` would return, of calls that cost nothing: answered in the next turn, `TURN` in each."""

    def __init__(self) -> None:
        self.asked = rxllm.OpenAI(MODEL, "http://127.0.0.1:9/v1", api_key="any")  # never connected
        body = msgspec.json.encode({"choices": [{"message": {"content": "word " * 60}, "finish_reason": "stop"}]})
        self.reply = self.asked.restore(rxllm.chat("hi"), 200, body)
        self.attempts = (rxllm.Attempt(number=1, started=1.0, seconds=0.5, status=200, usage=USAGE),)
        self.operator = flat_map(self.answer, window=TURN)

    def answer(self, request: rxllm.Request) -> NextTurn:
        """Answer the next turn."""
        return NextTurn(rxllm.Outcome(request=request, reply=self.reply, attempts=self.attempts, started=1.0))

    def __call__(self, source: Observable[Any]) -> Observable[Any]:
        """Return the outcomes."""
        return self.operator(source)

    def request(self, item: rxllm.Request) -> rxllm.Request:
        """Return the request: all items are."""
        return item

    def client(self, _request: rxllm.Request) -> rxllm.OpenAI:
        """Return the client that says which model is asked."""
        return self.asked


def through(stage: Any, source: Iterator[rxllm.Request]) -> int:
    """Run a pipeline inside the loop; return how many outcomes it had."""
    drain = Drain(WIDTH)
    drain.connect(rxllm.from_iterable(source).pipe(stage))
    return drain.join()


def added(folder: Path, chosen: Any) -> None:
    """Measure what a journal adds to a request."""
    answered, n = Answered(), chosen.requests
    files = iter(range(1_000))
    with SimulatedProvider(latency=LATENCY).start() as provider, Bare(provider.url, tuned=False, width=WIDTH) as plain:

        def kept() -> float:
            path = folder / f"{next(files)}.jsonl"
            cost = cpu_per_item(lambda: through(journal(path, answered), requests(chosen.outcomes)), chosen.outcomes)
            assert path.read_bytes().count(b"\n") == chosen.outcomes
            path.unlink()
            return cost

        values = interleaved(
            {
                "with": kept,
                "without": lambda: cpu_per_item(lambda: through(answered, requests(chosen.outcomes)), chosen.outcomes),
                "plain": lambda: cpu_per_item(lambda: plain.run(n), n),
            },
            chosen.rounds,
        )
    cost = [mine - other for mine, other in zip(values["with"], values["without"], strict=True)]
    share = quartiles(mine / other for mine, other in zip(cost, values["plain"], strict=True))
    report(
        "journal",
        "added",
        unit="us_cpu_per_request",
        added=quartiles(cost, 2),
        without=quartiles(values["without"], 2),
        plain=quartiles(values["plain"], 1),
        share=share,
        outcomes=chosen.outcomes,
        requests=n,
        rounds=chosen.rounds,
        goal=ADDED,
        met=share[1] <= ADDED,
    )


def asked(count: int) -> Iterator[rxllm.Request]:
    """Yield requests with ids."""
    for number in range(count):
        yield rxllm.chat(prompt(number), id=f"request-{number}", max_tokens=64)


def fill(path: Path, count: int, answered: Answered) -> None:
    """Write the rows of all requests, as a run would have."""
    with path.open("wb") as file:
        for number, request in enumerate(asked(count)):
            key = key_text(key_of(digest(request, MODEL), request.id), 1)
            body = {"choices": [{"message": {"content": "x"}, "finish_reason": "stop"}], "pad": ""}
            reply = rxllm.Reply(value="x", id=f"answer-{number}", status=200, raw=msgspec.json.encode(body))
            outcome = rxllm.Outcome(request=request, reply=reply, attempts=answered.attempts, started=1.0)
            missing = ROW - len(line_of(outcome, key, wall()))
            body["pad"] = "x" * missing
            whole = msgspec.structs.replace(reply, raw=msgspec.json.encode(body))
            file.write(line_of(msgspec.structs.replace(outcome, reply=whole), key, wall()))


class Known(msgspec.Struct):
    """What the loop decodes."""

    key: str


class Line(msgspec.Struct):
    """What the loop decodes."""

    custom_id: str
    rxllm: Known


def decoded(path: Path) -> int:
    """Decode the id and the key of each line."""
    decode, count = msgspec.json.Decoder(Line).decode, 0
    with path.open("rb") as file:
        for line in file:
            decode(line)
            count += 1
    return count


def opened(path: Path) -> int:
    """Open the journal and close it."""
    file = JournalFile(path)
    count = len(file)
    file.close()
    return count


def resume(folder: Path, chosen: Any) -> None:
    """Measure how long it takes to go on, and what the index takes."""
    answered, n, path = Answered(), chosen.rows, folder / "rows.jsonl"
    fill(path, n, answered)

    def skipped() -> int:
        assert through(journal(path, answered, replay=False), asked(n)) == 0
        return n

    sides = {
        "loop": lambda: decoded(path),
        "resume": lambda: opened(path),
        "resume_asked": skipped,
        "resume_replayed": lambda: through(journal(path, answered), asked(n)),
        "source": lambda: sum(1 for _ in asked(n)),
    }
    values = interleaved({name: lambda run=run: cpu_per_item(run, n) for name, run in sides.items()}, chosen.resumes)
    for case in ("resume", "resume_asked", "resume_replayed"):
        ratio = quartiles(mine / other for mine, other in zip(values[case], values["loop"], strict=True))
        goal = RESUME if case == "resume" else None
        report(
            "journal",
            case,
            unit="us_cpu_per_row",
            ours=quartiles(values[case], 2),
            loop_over_lines=quartiles(values["loop"], 2),
            source=quartiles(values["source"], 2),
            ratio=ratio,
            rows=n,
            file_bytes=path.stat().st_size,
            rounds=chosen.resumes,
            goal=goal,
            met=None if goal is None else ratio[1] <= goal,
        )


def index(chosen: Any) -> None:
    """Measure what the index takes for a row, once it can be asked."""
    tracemalloc.start()
    rows = Index()
    for number in range(chosen.indexed):
        rows.add(number * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF, 1_000 * number, done=True)
    rows.freeze()
    gc.collect()
    size = tracemalloc.get_traced_memory()[0] / chosen.indexed
    tracemalloc.stop()
    report(
        "journal",
        "index",
        unit="bytes_per_row",
        size=round(size, 2),
        rows=chosen.indexed,
        goal=INDEX,
        met=size <= INDEX + 256 * 250 / chosen.indexed,  # what 512 arrays take without anything in them
    )


def main() -> None:
    """Measure all cases."""
    chosen = arguments(
        __doc__,
        outcomes=(50_000, 200, "outcomes a round, with a journal and without"),
        requests=(5_000, 100, "requests a round of the plain loop"),
        rounds=(9, 1, "rounds"),
        rows=(1_000_000, 500, "rows of the file"),
        resumes=(3, 1, "rounds of resuming"),
        indexed=(1_000_000, 10_000, "rows of the index"),
    )
    with tempfile.TemporaryDirectory() as folder:
        added(Path(folder), chosen)
        resume(Path(folder), chosen)
        index(chosen)


if __name__ == "__main__":
    main()
