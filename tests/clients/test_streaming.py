"""Streamed answers through clients and `call`: pieces, the whole, tries that break off, room, and early ends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from typing import Any

import pytest
from reactivex import operators as ops

import rxllm
from rxllm import Backoff, Chunk, Outcome, Reply, Request, Restarted, Secret, Timeouts, Usage, Validate
from rxllm.clients import Remote
from rxllm.errors import (
    ConfigError,
    DecodeError,
    InvalidRequestError,
    OverloadedError,
    ServerError,
    ValidationError,
)
from rxllm.policies import TokenEstimator
from rxllm.providers.base import Assembler, Call, Event
from rxllm.transports import Response

KEY = "sk-marker-0123456789"
SOON = Backoff(base=0.001, cap=0.002)


class Words:
    """A dialect: a word an event; "." ends the answer, "!" refuses, "?" is garbage."""

    model = "words"
    tokens = TokenEstimator()

    def encode(self, request: Request, *, stream: bool = False) -> Call:
        if request.body == "unsendable":
            raise InvalidRequestError("unsendable")
        return Call("/words" if stream else "/whole")

    def decode(self, request: Request, status: int, headers: Mapping[str, str], body: bytes) -> Reply[str]:
        if status != 200:
            raise ServerError(f"status {status}: {body.decode()}", status, body=body)
        return Reply(value=body.decode(), text=body.decode(), finish_reason="stop")

    def assembler(self, request: Request, status: int, headers: Mapping[str, str]) -> Assembler[str]:
        return Sentence()

    def repeatable(self, request: Request) -> bool:
        return request.body != "paid"

    def cost(self, request: Request) -> dict[str, float]:
        return {"requests": 1.0, "tokens": 10.0}

    def learn(self, request: Request, usage: Usage) -> None: ...

    def wrap(self, item: object) -> Request:
        return Request(body=item)


class Sentence:
    def __init__(self) -> None:
        self.words: list[str] = []
        self.done = False
        self.usage: Usage | None = None

    @property
    def text(self) -> str:
        return "".join(self.words)

    def feed(self, event: Event) -> Chunk | None:
        word = event.data.decode()
        if word.startswith("!"):
            raise OverloadedError(f"in band: {word}", 529)
        if word == "?":
            raise DecodeError("garbled")
        if word == "ping":
            return None
        self.usage = Usage(output_tokens=len(self.words) + 1)
        self.done = word == "."
        self.words.append(word)
        return Chunk(text=word, finish_reason="stop" if self.done else None)

    def finish(self) -> Reply[str]:
        if not self.done:
            raise DecodeError("the answer stops without its end")
        return Reply(value=self.text, text=self.text, usage=self.usage or Usage(), finish_reason="stop")


class Script:
    """A transport that answers the n-th call with the n-th script: pieces of one or several words, or an error."""

    def __init__(self, *scripts: Any, status: int = 200, kind: str = "text/event-stream") -> None:
        self.scripts = list(scripts)
        self.status = status
        self.kind = kind
        self.opened = 0
        self.read = 0
        self.closed: list[bool] = []

    async def send(self, call: Call, timeouts: Timeouts) -> Response:
        assert call.path == "/whole"
        return Response(200, {}, b"whole")

    async def open(self, call: Call, timeouts: Timeouts) -> Answer:
        assert call.path == "/words"
        script = self.scripts[min(self.opened, len(self.scripts) - 1)]
        self.opened += 1
        if isinstance(script, Exception):
            raise script
        return Answer(self, script)

    async def aclose(self) -> None: ...

    def close(self) -> None: ...


class Answer:
    def __init__(self, script: Script, pieces: list[Any]) -> None:
        self.script = script
        self.pieces = list(pieces)
        self.status = script.status
        self.headers = {"content-type": script.kind}
        self.open = True

    async def read(self) -> bytes:
        await asyncio.sleep(0)
        self.script.read += 1
        if not self.pieces:
            return b""
        piece = self.pieces.pop(0)
        if isinstance(piece, Exception):
            raise piece
        if isinstance(piece, bytes):
            return piece
        return b"".join(b"data: %s\n\n" % word.encode() for word in piece.split())

    def close(self, *, drain: bool = False) -> None:
        if self.open:
            self.open = False
            self.script.closed.append(drain)


def client(*scripts: Any, **settings: Any) -> tuple[Remote[str], Script]:
    transport = Script(*scripts, **settings)
    return Remote(Words(), transport, Secret(KEY)), transport


def called(remote: Remote[str], item: Any = "hi", **settings: Any) -> tuple[Outcome[str], list[Chunk | Restarted]]:
    shown: list[Chunk | Restarted] = []
    settings.setdefault("on_chunk", lambda _request, piece: shown.append(piece))
    stream = rxllm.from_iterable([item]).pipe(rxllm.call(remote, retry=SOON, **settings))
    (outcome,) = asyncio.run(rxllm.acollect(stream))
    return outcome, shown


def words(pieces: list[Chunk | Restarted]) -> list[str]:
    return ["<restarted>" if isinstance(piece, Restarted) else piece.text for piece in pieces]


def test_an_answer_is_shown_piece_by_piece_and_is_whole_in_its_outcome():
    remote, transport = client(["one", "two ping three", "."])
    outcome, shown = called(remote)
    assert outcome.text == "onetwothree."
    assert words(shown) == ["one", "two", "three", "."]
    assert outcome.usage.output_tokens == 4
    assert transport.closed == [True]


def test_a_stream_without_a_viewer_has_the_same_outcome():
    remote, _ = client(["one ."])
    outcome, _ = called(remote, stream=True, on_chunk=None)
    assert outcome.text == "one."


def test_a_call_that_is_not_streamed_stays_in_one_piece():
    remote, transport = client(["one ."])
    outcome, _ = called(remote, on_chunk=None)
    assert outcome.text == "whole"
    assert transport.opened == 0


@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        pytest.param(["one two"], DecodeError, id="it-stops-without-its-end"),
        pytest.param(["one two", DecodeError("cut")], DecodeError, id="the-connection-is-cut"),
        pytest.param(["one two ?"], DecodeError, id="garbage-in-the-same-piece"),
        pytest.param(["one two", "!busy"], OverloadedError, id="an-error-in-band"),
    ],
)
def test_an_answer_that_breaks_off_is_tried_again_and_the_viewer_told(broken, kind):
    remote, transport = client(broken, ["three ."])
    outcome, shown = called(remote)
    assert outcome.text == "three."
    assert words(shown) == ["one", "two", "<restarted>", "three", "."]
    restarted = shown[2]
    assert isinstance(restarted, Restarted)
    assert restarted.attempt == 2
    first = outcome.attempts[0]
    assert type(first.error) is kind
    assert first.error.partial == "onetwo"
    assert first.usage == Usage(output_tokens=2)
    assert transport.closed == [False, True]


def test_a_try_that_broke_off_before_it_showed_anything_needs_no_restart():
    remote, _ = client(["ping", DecodeError("cut")], ["one ."])
    outcome, shown = called(remote)
    assert outcome.ok
    assert words(shown) == ["one", "."]


def test_an_answer_of_another_status_is_the_error_of_its_body():
    remote, transport = client([b"out ", b"of order"], status=500)
    outcome, shown = called(remote, item="hi", stream=True)
    assert isinstance(outcome.error, ServerError)
    assert outcome.error.body == "out of order"
    assert not shown
    assert len(transport.closed) == len(outcome.attempts) == SOON.attempts


def test_a_server_that_does_not_stream_is_shown_in_one_piece():
    remote, _ = client([b"all ", b"of it"], kind="application/json; charset=utf-8")
    outcome, shown = called(remote)
    assert outcome.text == "all of it"
    assert words(shown) == ["all of it"]


def test_a_key_in_an_error_within_the_stream_is_not_shown():
    remote, _ = client([f"!{KEY}"])
    outcome, _ = called(remote, deadline=0.05)
    assert outcome.error is not None
    assert KEY not in "".join(map(repr, (outcome.error, *outcome.error.args, outcome.attempts)))


def test_what_the_viewer_raises_ends_its_request_and_closes_the_connection():
    def broken(_request: Request, _piece: Chunk | Restarted) -> None:
        raise KeyError("no such pane")

    remote, transport = client(["one", "two ."])
    outcome, _ = called(remote, on_chunk=broken)
    assert isinstance(outcome.error, KeyError)
    assert transport.opened == 1
    assert transport.closed == [False]


# early ends


def test_an_answer_that_is_bad_already_is_cut_off_and_asked_for_again():
    remote, transport = client(["bad", "words", "."], ["good ."])
    outcome, shown = called(remote, validate=Validate(early=lambda text: not text.startswith("bad")))
    assert outcome.text == "good."
    assert words(shown) == ["bad", "<restarted>", "good", "."]
    assert isinstance(outcome.attempts[0].error, ValidationError)
    assert transport.closed == [False, True]
    assert transport.read == 2  # of each answer one piece


def test_a_whole_answer_that_does_not_pass_is_followed_by_a_restart_and_judged_alone():
    remote, _ = client(["one ."], ["two ."])
    check = Validate(check=lambda reply: reply.text == "two.", early=lambda text: len(text) <= 4)
    outcome, shown = called(remote, validate=check)
    assert outcome.text == "two."
    assert words(shown) == ["one", ".", "<restarted>", "two", "."]
    restarted = shown[2]
    assert isinstance(restarted, Restarted)
    assert restarted.attempt == 2
    assert isinstance(restarted.error, ValidationError)


@pytest.mark.parametrize("first", [pytest.param(["bad", "."], id="cut-off"), pytest.param(["one ."], id="whole")])
def test_an_answer_to_a_repaired_request_is_a_restart_too(first):
    remote, _ = client(first, ["two ."])
    check = Validate(
        check=lambda reply: reply.text == "two.",
        early=lambda text: "bad" not in text,
        repair=lambda request, _reply, _error: Request(body="better", id=request.id),
    )
    outcome, shown = called(remote, validate=check)
    assert outcome.ok
    assert [word for word in words(shown) if word == "<restarted>"] == ["<restarted>"]
    assert words(shown)[-3:] == ["<restarted>", "two", "."]


def test_a_repair_gets_the_text_so_far():
    seen: list[str] = []

    def repair(request: Request, reply: Reply[str], error: ValidationError) -> Request:
        seen.append(reply.text)
        return request

    remote, _ = client(["it", "is bad", "."], ["good ."])
    early = Validate(
        early=lambda text: "bad" not in text, check=lambda reply: reply.text.startswith("good"), repair=repair
    )
    outcome, _ = called(remote, validate=early)
    assert outcome.text == "good."
    assert seen == ["itisbad"]


def test_an_early_check_that_never_passes_ends_with_its_error():
    remote, transport = client(["bad ."])
    outcome, _ = called(remote, validate=Validate(early=lambda _text: False, attempts=2))
    assert isinstance(outcome.error, ValidationError)
    assert transport.opened == 2
    assert len(outcome.attempts) == 2


# the stream of the pieces


def test_the_pieces_are_a_stream_of_their_own():
    remote, _ = client(["one two", "."])
    pieces = asyncio.run(rxllm.acollect(remote.stream(Request(body="hi"))))
    assert words(pieces) == ["one", "two", "."]


def test_a_stream_that_is_subscribed_again_after_it_broke_off_says_so_first():
    remote, _ = client(["one", DecodeError("cut")], ["two ."])
    pieces = asyncio.run(rxllm.acollect(remote.stream(Request(body="hi")).pipe(rxllm.operators.retry(SOON))))
    assert words(pieces) == ["one", "<restarted>", "two", "."]


def test_who_takes_no_pieces_stops_the_reading():
    remote, transport = client([*("word " * 4 for _ in range(100)), "."])

    async def main() -> int:
        async with rxllm.aiterate(remote.stream(Request(body="hi")), buffer=8) as pieces:
            iterator: AsyncIterator[Any] = aiter(pieces)
            await anext(iterator)
            for _ in range(100):
                await asyncio.sleep(0)
            return transport.read

    assert asyncio.run(main()) < 10
    assert transport.closed == [False]


def test_a_stream_that_is_given_up_closes_its_connection():
    remote, transport = client(["one", "two", "three ."])
    pieces = asyncio.run(rxllm.acollect(remote.stream(Request(body="hi")).pipe(ops.take(2))))
    assert words(pieces) == ["one", "two"]
    assert transport.closed == [False]


def test_the_error_of_a_broken_stream_comes_after_what_was_shown():
    remote, _ = client(["one two ?"])
    stream = remote.stream(Request(body="hi")).pipe(ops.materialize())
    kinds = [item.kind for item in asyncio.run(rxllm.acollect(stream))]
    assert kinds == ["N", "N", "E"]


# what may have worked


def test_what_creates_something_paid_is_not_tried_again_when_it_may_have_worked():
    remote, transport = client(["one"])
    outcome, _ = called(remote, item="paid")
    assert isinstance(outcome.error, DecodeError)
    assert transport.opened == 1
    assert "paid for twice" in "".join(outcome.error.__notes__)


def test_a_refusal_of_what_creates_something_paid_is_tried_again():
    remote, transport = client(OverloadedError("busy"), ["one ."])
    outcome, _ = called(remote, item="paid")
    assert outcome.ok
    assert transport.opened == 2


# arguments


def test_a_client_without_streams_is_refused_at_once():
    with pytest.raises(ConfigError, match="in one piece only"):
        rxllm.call(rxllm.function(len), stream=True)


def test_a_request_that_cannot_be_encoded_opens_nothing():
    remote, transport = client(["one ."])
    outcome, _ = called(remote, item="unsendable")
    assert isinstance(outcome.error, InvalidRequestError)
    assert outcome.error.sent is False
    assert transport.opened == 0
