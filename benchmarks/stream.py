"""What does a chunk of a streamed answer cost, when does the first one come, and what does an embedding cost?

Question: how much CPU does a chunk cost when 1,000 answers of 200 chunks are streamed at the same time: `client.stream`
merged by `flat_map` and consumed in a `for` loop, and `call(stream=True)` with a callback for each chunk and whole
outcomes? How long after the start have half of them had their first text? And how much CPU does a vector of 1,536
floats cost, asked for as base64 and as numbers?
Unit: µs of CPU a chunk (or a vector), of the whole client process with all its threads; ms until the first text, the
median of all streams of a round (of answers with 5 chunks, in five times as many rounds). `ratio` is ours by the
other's, round by round. First quartile, median, third.
Baselines: a loop over aiohttp that anybody would write: splits lines, decodes JSON, takes the text (no timeouts, no
limit of connections); the openai SDK, with fewer streams, since it would fall behind. For vectors the SDK alone.

Both sides run on the same type of loop, each type in a process of its own: asyncio's, and uvloop's when it is there.
The server is another process that sends bytes made before, one chunk to each stream at a tick; `server` is the share
of its time that it was busy: near 1.0 it would be the limit. All sides are interleaved round by round.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import multiprocessing
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

import aiohttp
from _bench import arguments, cpu_per_item, interleaved, quartiles, report
from _http import FOREVER, MODEL, body, same_loop
from _stream_server import FIRST, Plan, StreamServer
from overhead import is_installed

import rxllm
from rxllm.operators import flat_map
from rxllm.runtime import background
from rxllm.testing._child import raise_file_limit

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

    from rxllm.messages import Chunk, Restarted

    Side = Callable[[int], int]  # streams -> chunks with text that came

GOALS = {"loop": 1.5, "openai": 0.1}
GOAL_OF_FIRST = 1.05
GOAL_OF_VECTORS = 1.0
TICK = 0.04  # seconds
SHORT, FIRST_ROUNDS = 5, 5  # chunks of an answer whose first text is timed, and rounds of these for each round
VECTORS, SIZE = 100, 1_536  # of an answer, and of a vector
WIDTH = 8  # answers with vectors at a time


class Firsts:
    """When the first texts came, run by run."""

    def __init__(self) -> None:
        self.medians: list[float] = []
        self._begun = 0.0
        self._seconds: list[float] = []

    def begin(self) -> None:
        """Begin a run."""
        self._begun = time.perf_counter()
        self._seconds = []

    def note(self) -> None:
        """Note that one has come."""
        self._seconds.append(time.perf_counter() - self._begun)

    def end(self) -> None:
        """End the run."""
        self.medians.append(statistics.median(self._seconds) * 1e3)


def requests(count: int) -> Iterator[rxllm.Request]:
    """Yield as many requests for a pipeline as there are streams."""
    asked = {name: value for name, value in body(0).items() if name != "model"}
    for _ in range(count):
        yield rxllm.Request(body=asked)


def streamed(client: rxllm.OpenAI, first: Firsts) -> Side:
    """Return our side that merges the chunks of all answers."""

    def run(streams: int) -> int:
        chunks = 0
        first.begin()
        merged = rxllm.from_iterable(requests(streams)).pipe(flat_map(client.stream, window=streams))
        # room for a piece of each stream and more: without it they wait for a turn of the loop, which is long here
        with rxllm.iterate(merged, buffer=2 * streams) as pieces:
            for piece in pieces:
                if text := piece.text:
                    chunks += 1
                    if text == FIRST:
                        first.note()
        first.end()
        return chunks

    return run


def called(client: rxllm.OpenAI, first: Firsts, length: int) -> Side:
    """Return our side that has whole outcomes, and sees the chunks on their way; a text has so many characters."""

    def run(streams: int) -> int:
        chunks = 0

        def see(_request: rxllm.Request, piece: Chunk | Restarted) -> None:
            nonlocal chunks
            if text := piece.text:  # type: ignore[union-attr]  # nothing is restarted here
                chunks += 1
                if text == FIRST:
                    first.note()

        first.begin()
        stage = rxllm.call(client, gate=rxllm.Gate(concurrency=streams), window=streams, stream=True, on_chunk=see)
        with rxllm.iterate(rxllm.from_iterable(requests(streams)).pipe(stage)) as outcomes:
            assert all(len(outcome.text) == length for outcome in outcomes)
        first.end()
        return chunks

    return run


class Others:
    """What others do, on a loop of the type that pipelines run on."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.runner = asyncio.Runner(loop_factory=same_loop())
        self.first = Firsts()
        self.session = self.runner.run(self._open())
        self.sdk: Any = None
        if is_installed("openai"):
            from openai import AsyncOpenAI  # noqa: PLC0415  an extra

            self.sdk = AsyncOpenAI(base_url=url, api_key="any", max_retries=0)

    async def _open(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=600)  # from one of its turns to the next
        return aiohttp.ClientSession(connector=connector, headers={"Authorization": "Bearer any"}, timeout=FOREVER)

    def loop(self, streams: int) -> int:
        """Stream through the loop that anybody would write."""
        self.first.begin()
        chunks = self.runner.run(self._all(self._loop(), streams))
        self.first.end()
        return chunks

    async def _all(self, one: Callable[[], Coroutine[Any, Any, int]], streams: int) -> int:
        return sum(await asyncio.gather(*(one() for _ in range(streams))))

    def _loop(self) -> Callable[[], Coroutine[Any, Any, int]]:
        url, asked, note = f"{self.url}/chat/completions", {**body(0), "stream": True}, self.first.note

        async def one() -> int:
            texts: list[str] = []
            async with self.session.post(url, json=asked) as response:
                assert response.status == 200
                async for line in response.content:
                    if not line.startswith(b"data: ") or line.startswith(b"data: [DONE]"):
                        continue
                    choices = json.loads(line[6:])["choices"]
                    if choices and (text := choices[0]["delta"].get("content")):
                        if not texts:
                            note()
                        texts.append(text)
            assert "".join(texts).startswith(FIRST)
            return len(texts)

        return one

    def openai(self, streams: int) -> int:
        """Stream through the SDK."""

        async def one() -> int:
            pieces = await self.sdk.chat.completions.create(**body(0), stream=True)
            texts = [text async for piece in pieces if piece.choices and (text := piece.choices[0].delta.content)]
            assert "".join(texts).startswith(FIRST)
            return len(texts)

        return self.runner.run(self._all(one, streams))

    def embeddings(self, form: str, answers: int) -> int:
        """Ask the SDK for vectors; without a form of its own it asks for base64."""
        numbers, vectors = iter(range(answers)), 0
        more = {} if form == "base64" else {"encoding_format": form}

        async def worker() -> None:
            nonlocal vectors
            for _ in numbers:
                answer = await self.sdk.embeddings.create(model=MODEL, input=["text"] * VECTORS, **more)
                assert len(answer.data[-1].embedding) == SIZE
                vectors += len(answer.data)

        async def go() -> int:
            await asyncio.gather(*(worker() for _ in range(WIDTH)))
            return vectors

        return self.runner.run(go())

    def close(self) -> None:
        """Close the connections and the loop."""
        self.runner.run(self.session.close())
        if self.sdk is not None:
            self.runner.run(self.sdk.close())
        self.runner.close()


def embedded(client: rxllm.OpenAI, form: str, answers: int) -> int:
    """Ask ours for vectors."""
    asked = {"input": ["text"] * VECTORS, "encoding_format": form}
    source = rxllm.from_iterable(rxllm.Request(body=asked, operation="embeddings") for _ in range(answers))
    vectors = 0
    with rxllm.iterate(source.pipe(rxllm.call(client, gate=rxllm.Gate(concurrency=WIDTH)))) as outcomes:
        for outcome in outcomes:
            found: Any = outcome.value
            assert len(found[-1]) == SIZE
            vectors += len(found)
    return vectors


def streams_of(client: rxllm.OpenAI, others: Others, firsts: dict[str, Firsts], chunks: int) -> dict[str, Side]:
    """Return all sides that stream answers of so many chunks, but for the SDK."""
    return {
        "loop": others.loop,
        "stream": streamed(client, firsts["stream"]),
        "call": called(client, firsts["call"], len(FIRST) * chunks),
    }


def measure_chunks(loop: str, server: StreamServer, others: Others, chosen: Any) -> None:
    """Measure what a chunk costs."""
    firsts = {"stream": Firsts(), "call": Firsts()}
    busy: list[float] = []

    def cost(side: Side, streams: int) -> float:
        begun, used = time.perf_counter(), server.cpu_seconds()
        spent = cpu_per_item(lambda: side(streams), streams * chosen.chunks)
        busy.append((server.cpu_seconds() - used) / (time.perf_counter() - begun))
        return spent

    with rxllm.OpenAI(MODEL, server.url, api_key="any") as client:
        sides = streams_of(client, others, firsts, chosen.chunks)
        if others.sdk is not None:
            sides["openai"] = others.openai
        counts = {name: chosen.extras if name == "openai" else chosen.streams for name in sides}
        runs = {name: lambda name=name: cost(sides[name], counts[name]) for name in sides}
        values = interleaved(runs, chosen.rounds)
    for mine in firsts:
        for name, goal in GOALS.items():
            case = f"{loop}_{mine}_against_{name}"
            if name not in values:
                report("stream", case, unit="us_cpu_per_chunk", missing=name, goal=goal, met=None)
                continue
            compare(
                case,
                "us_cpu_per_chunk",
                values[mine],
                values[name],
                goal,
                streams=chosen.streams,
                streams_of_other=counts[name],
                chunks=chosen.chunks,
                rounds=chosen.rounds,
                server=round(max(busy), 2),
            )


def measure_firsts(loop: str, server: StreamServer, others: Others, chosen: Any) -> None:
    """Measure when the first texts come: of short answers, since it is about their beginning, and in more rounds."""
    firsts = {"loop": others.first, "stream": Firsts(), "call": Firsts()}
    rounds = chosen.rounds * FIRST_ROUNDS

    def median(name: str) -> float:
        chunks = sides[name](chosen.streams)
        assert chunks == chosen.streams * SHORT
        return firsts[name].medians[-1]

    with rxllm.OpenAI(MODEL, server.url, api_key="any") as client:
        sides = streams_of(client, others, firsts, SHORT)
        values = interleaved({name: lambda name=name: median(name) for name in sides}, rounds)
    for mine in ("stream", "call"):
        compare(
            f"{loop}_{mine}_first_text",
            "ms_until_half_have_text",
            values[mine],
            values["loop"],
            GOAL_OF_FIRST,
            streams=chosen.streams,
            chunks=SHORT,
            rounds=rounds,
        )


def measure_vectors(loop: str, server: StreamServer, others: Others, chosen: Any) -> None:
    """Measure the embeddings."""
    with rxllm.OpenAI(MODEL, server.url, api_key="any") as client:
        for form in ("base64", "float"):
            case = f"{loop}_embeddings_{form}_against_openai"
            if others.sdk is None:
                report("stream", case, unit="us_cpu_per_vector", missing="openai", goal=GOAL_OF_VECTORS, met=None)
                continue
            sides = sides_of(client, others, form, chosen.answers)
            values = interleaved(sides, chosen.rounds)
            compare(
                case,
                "us_cpu_per_vector",
                values["ours"],
                values["openai"],
                GOAL_OF_VECTORS,
                vectors=chosen.answers * VECTORS,
                size=SIZE,
                rounds=chosen.rounds,
            )


def sides_of(client: rxllm.OpenAI, others: Others, form: str, answers: int) -> dict[str, Callable[[], float]]:
    """Return both sides of the embeddings."""
    return {
        "ours": lambda: cpu_per_item(lambda: embedded(client, form, answers), answers * VECTORS),
        "openai": lambda: cpu_per_item(lambda: others.embeddings(form, answers), answers * VECTORS),
    }


def compare(case: str, unit: str, ours: list[float], other: list[float], goal: float, **fields: Any) -> None:
    """Report one case."""
    ratio = quartiles(mine / theirs for mine, theirs in zip(ours, other, strict=True))
    report(
        "stream",
        case,
        unit=unit,
        ours=quartiles(ours, 2),
        other=quartiles(other, 2),
        ratio=ratio,
        **fields,
        goal=goal,
        met=ratio[1] <= goal,
    )


def measure(loop: str, chosen: Any) -> None:
    """Measure everything in this process, on this type of loop."""
    if loop == "asyncio":
        sys.modules["uvloop"] = None  # type: ignore[assignment]  # to import it fails from now on
    raise_file_limit()
    kind = type(background().loop).__module__.partition(".")[0]
    assert kind == loop, f"the loop is one of {kind}"
    plan = Plan(chunks=chosen.chunks, tick=TICK / 8 if chosen.tiny else TICK, vectors=VECTORS, size=SIZE)
    with StreamServer(plan) as server, contextlib.closing(Others(server.url)) as others:
        measure_chunks(loop, server, others, chosen)
        measure_vectors(loop, server, others, chosen)
    plan.chunks = SHORT
    with StreamServer(plan) as server, contextlib.closing(Others(server.url)) as others:
        measure_firsts(loop, server, others, chosen)


def main() -> None:
    """Measure on each type of loop, in a process of its own."""
    chosen = arguments(
        __doc__,
        streams=(1_000, 8, "streams at a time of ours and of the loop"),
        extras=(100, 4, "streams at a time of openai"),
        chunks=(200, 20, "chunks of a stream"),
        answers=(100, 1, f"answers with {VECTORS} vectors each"),
        rounds=(3, 1, "rounds"),
    )
    for loop in ("asyncio", "uvloop"):
        if not is_installed(loop):
            report("stream", loop, unit="us_cpu_per_chunk", missing=loop, goal=None, met=None)
            continue
        child = multiprocessing.get_context("spawn").Process(target=measure, args=(loop, chosen))
        child.start()
        child.join()
        if child.exitcode:
            sys.exit(f"the process on {loop} ended with status {child.exitcode}")


if __name__ == "__main__":
    main()
