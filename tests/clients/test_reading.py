"""What shows a streamed answer piece by piece: who is told of which error, and when it stops reading."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from rxllm import chat
from rxllm.clients.reading import InOnePiece, Reading
from rxllm.errors import CallError, DecodeError, ServerError
from rxllm.messages import Chunk, Reply
from rxllm.providers.base import Event
from rxllm.providers.openai import OpenAIProvider


def said(text: str, *, finish: bool = False) -> bytes:
    reason = '"stop"' if finish else "null"
    return b'data: {"choices": [{"index": 0, "delta": {"content": "%b"}, "finish_reason": %b}]}\n\n' % (
        text.encode(),
        reason.encode(),
    )


DONE = b"data: [DONE]\n\n"


class Pieces:
    """An answer in these pieces."""

    def __init__(self, *pieces: bytes) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.left = list(pieces)
        self.closed = 0

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        return self.left.pop(0) if self.left else b""

    def close(self, *, drain: bool = False) -> None:
        self.closed += 1


class Poured(Pieces):
    """The same, and it can be poured."""

    async def pour(self, take: Callable[[bytes], object]) -> bool:
        while piece := await self.read():
            if take(piece):
                return True
        return False


def reading_of(answer: Pieces) -> tuple[Reading[str], list[Event | None]]:
    """Return what reads the answer, and what events errors were made of."""
    refined: list[Event | None] = []

    def refine(error: CallError, event: Event | None) -> CallError:
        refined.append(event)
        return error

    assembler = OpenAIProvider[str]("m").assembler(chat("x"), 200, {})
    return Reading(answer, assembler, refine, lambda _reply: None), refined


@pytest.fixture(params=[Pieces, Poured], ids=["read", "poured"])
def answer_of(request: pytest.FixtureRequest) -> type[Pieces]:
    kind: type[Pieces] = request.param
    return kind


def test_all_of_an_answer_is_shown_and_the_reply_is_there(answer_of):
    async def main() -> None:
        reading, refined = reading_of(answer_of(said("Hel"), said("lo") + said("", finish=True), DONE))
        texts: list[str] = []
        assert await reading.run(lambda chunk: texts.append(chunk.text)) is False
        assert texts == ["Hel", "lo", ""]
        assert reading.reply is not None
        assert (reading.reply.text, reading.shown, refined) == ("Hello", True, [])
        assert await reading.run(lambda _chunk: pytest.fail("all was shown")) is False

    asyncio.run(main())


@pytest.mark.parametrize("error", [ServerError("mine", 500), DecodeError("mine"), ValueError("mine")], ids=repr)
def test_what_the_viewer_raises_is_no_fault_of_the_answer(answer_of, error):
    async def main() -> None:
        reading, refined = reading_of(answer_of(said("a"), said("b")))

        def show(_chunk: Chunk) -> None:
            raise error

        with pytest.raises(type(error)) as caught:
            await reading.run(show)
        assert caught.value is error
        assert refined == []
        assert getattr(error, "partial", None) is None

    asyncio.run(main())


def test_nothing_more_is_read_while_there_is_a_backlog(answer_of):
    async def main() -> None:
        answer = answer_of(said("a") + said("b"), said("c"), said("", finish=True) + DONE)
        reading, _ = reading_of(answer)
        held: list[Chunk] = []
        for expected, left in ((["a", "b"], 2), (["c"], 1), ([""], 0)):
            assert await reading.run(held.append, held) is True
            assert [chunk.text for chunk in held] == expected
            assert len(answer.left) == left
            held.clear()
        assert await reading.run(held.append, held) is False

    asyncio.run(main())


@pytest.mark.parametrize(
    ("end", "made_of"),
    [
        pytest.param([b"data: {broken\n\n"], b"{broken", id="garbled"),
        pytest.param([], None, id="broken-off"),
    ],
)
def test_what_came_before_an_error_is_shown_first_and_told_with_it(answer_of, end, made_of):
    async def main() -> None:
        reading, refined = reading_of(answer_of(said("a"), *end))
        held: list[Chunk] = []
        assert await reading.run(held.append, held) is True
        held.clear()
        for _ in range(2):
            with pytest.raises(DecodeError) as caught:
                await reading.run(held.append, held)
            assert caught.value.partial == "a"
        assert [event and event.data for event in refined] == [made_of]
        assert held == []

    asyncio.run(main())


def test_an_answer_in_one_piece_is_shown_once():
    async def main() -> None:
        reading = InOnePiece(Reply(value="all", text="all"))
        held: list[Chunk] = []
        assert await reading.run(held.append, held) is True
        assert [chunk.text for chunk in held] == ["all"]
        held.clear()
        assert await reading.run(held.append, held) is False
        assert held == []

    asyncio.run(main())
