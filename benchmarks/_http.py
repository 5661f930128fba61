"""What the benchmarks over HTTP share: the two loops that anybody would write, and the loop type they run on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Self, TypeVar

import aiohttp
import msgspec

import rxllm
from rxllm.runtime import background

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Iterator

T = TypeVar("T")

MODEL = "simulated"
TOKENS = 64  # at most, of an answer
FOREVER = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=None, sock_read=None)


def prompt(number: int) -> str:
    """Return a prompt of an ordinary size, another one for each number."""
    return f"Summarise this in one sentence: item {number} of a list of texts is as long as a docstring of a function."


def body(number: int) -> dict[str, Any]:
    """Return the body of a chat completion."""
    return {"model": MODEL, "messages": [{"role": "user", "content": prompt(number)}], "max_tokens": TOKENS}


def requests(count: int) -> Iterator[rxllm.Request]:
    """Yield the same for a pipeline."""
    for number in range(count):
        yield rxllm.chat(prompt(number), max_tokens=TOKENS)


class Bare:
    """aiohttp without anything: no quota, no retry, no check.

    plain: a default session, `json=` and `r.json()`.
    tuned: no limit of connections, no timeouts, a body of bytes, `r.read()`; msgspec for JSON.
    """

    def __init__(self, url: str, *, tuned: bool, width: int) -> None:
        self.url = f"{url}/chat/completions"
        self.width = width
        self.ask = self._tuned if tuned else self._plain
        self.tuned = tuned
        self.runner = asyncio.Runner(loop_factory=same_loop())
        self.session = self.runner.run(self._open())

    async def _open(self) -> aiohttp.ClientSession:
        headers = {"Authorization": "Bearer any"}
        if not self.tuned:
            return aiohttp.ClientSession(headers=headers)
        return aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={**headers, "Content-Type": "application/json"},
            timeout=FOREVER,
        )

    async def _plain(self, number: int) -> str:
        async with self.session.post(self.url, json=body(number)) as response:
            assert response.status == 200
            answer = await response.json()
        return text_of(answer)

    async def _tuned(self, number: int) -> str:
        async with self.session.post(self.url, data=msgspec.json.encode(body(number))) as response:
            assert response.status == 200
            answer = await response.read()
        return text_of(msgspec.json.decode(answer))

    def run(self, count: int) -> int:
        """Ask so often, `width` at a time; return how many answers there were."""
        return self.runner.run(self._workers(count))

    async def _workers(self, count: int) -> int:
        numbers, answers = iter(range(count)), 0

        async def worker() -> None:
            nonlocal answers
            for number in numbers:
                text = await self.ask(number)
                answers += bool(text)

        await asyncio.gather(*(worker() for _ in range(min(self.width, count))))
        return answers

    def run_coroutine(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run something else on the same loop."""
        return self.runner.run(make())

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_error: object) -> None:
        """Close the connections and the loop."""
        self.runner.run(self.session.close())
        self.runner.close()


def text_of(answer: Any) -> str:
    """Return what a chat completion says."""
    text: str = answer["choices"][0]["message"]["content"]
    return text


def same_loop() -> Callable[[], asyncio.AbstractEventLoop]:
    """Return what makes a loop of the type that pipelines run on."""
    kind = type(background().loop)
    if not kind.__module__.startswith("uvloop"):
        return asyncio.new_event_loop
    import uvloop  # noqa: PLC0415  an extra

    return uvloop.new_event_loop
