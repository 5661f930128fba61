"""Every fault that llmock can script, in both of its dialects, whole and streamed: it ends well, and without a flaw."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

import rxllm
from rxllm import Backoff, Outcome, Timeouts
from rxllm.errors import (
    AuthError,
    CallError,
    DecodeError,
    InvalidRequestError,
    NotFoundError,
    TimeoutError,
    ValidationError,
)

pytestmark = pytest.mark.live

START_SECONDS = 40.0
QUICK = Backoff(attempts=5, base=0.02, cap=0.5)
TOOL = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}


class Place(msgspec.Struct):
    city: str


every_dialect = pytest.mark.parametrize("dialect", ["openai", "anthropic"])
whole_and_streamed = pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])


class Server:
    """llmock as a child process."""

    def __init__(self) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.origin = f"http://127.0.0.1:{port}"
        run = "import sys; from llmock.cli import app; sys.argv[0] = 'llmock'; app()"
        options = ["serve", "--host", "127.0.0.1", "--port", str(port), "--log-level", "error"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", run, *options, "--response-style", "echo"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                self.ask("GET", "/requests")
                return
            assert self._process.poll() is None, "llmock ended by itself"
            assert time.monotonic() < until, "llmock does not listen"
            time.sleep(0.05)

    def ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.origin}/_llmock{path}", data, method=method)  # noqa: S310  loopback
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310  loopback
            found: dict[str, Any] = json.load(answer)
        return found

    def script(self, *behaviors: dict[str, Any]) -> None:
        self.ask("POST", "/scenario", {"behaviors": behaviors})

    def check_verdict(self, *, calls: int, unsure: str = "") -> None:
        """There is no flaw, not even one that is a warning; it may take a retry for a call, and say `unsure` then."""
        verdict = self.ask("GET", "/verdict")
        found = [finding["code"] for finding in verdict["findings"]]
        assert verdict["passed"]
        if not unsure or verdict["calls"] == calls:
            assert (found, verdict["calls"]) == ([], calls)
        else:
            assert (set(found) <= {unsure}, verdict["calls"]) == (True, calls + 1)

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    if importlib.util.find_spec("llmock") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("llmock is not installed: it belongs to the extra 'test'")
        pytest.skip("llmock is not installed")
    server = Server()
    yield server
    server.close()


@pytest.fixture
def server(running: Server) -> Server:
    running.ask("POST", "/reset")
    return running


def client_of(server: Server, dialect: str) -> Any:
    if dialect == "openai":
        return rxllm.OpenAI("gpt-4o-mini", f"{server.origin}/v1", api_key="any")
    return rxllm.Anthropic("claude-haiku-4-5", f"{server.origin}/anthropic/v1", api_key="any")


def run(server: Server, dialect: str, *, streamed: bool, **settings: Any) -> tuple[Outcome[str], list[Any]]:
    """Ask for one thing; return its outcome, and what was seen of it on the way."""
    seen: list[Any] = []
    request = settings.pop("request", rxllm.chat("Say it in a good many words, one after the other."))
    if streamed:
        settings["on_chunk"] = lambda _, piece: seen.append(piece)

    async def main() -> Outcome[str]:
        async with client_of(server, dialect) as client:
            stage = rxllm.call(client, **{"retry": QUICK, **settings})
            (outcome,) = await rxllm.acollect(rxllm.from_iterable([request]).pipe(stage))
            return outcome

    return asyncio.run(main()), seen


def shown(seen: list[Any]) -> str:
    """Return the text that a viewer has, who clears the screen at each `Restarted`."""
    text = ""
    for piece in seen:
        text = "" if isinstance(piece, rxllm.Restarted) else text + piece.text
    return text


@every_dialect
@whole_and_streamed
def test_a_good_answer_is_whole_and_tells_its_usage(server, dialect, streamed):
    outcome, seen = run(server, dialect, streamed=streamed)
    assert outcome.ok, outcome.error
    assert "a good many words" in outcome.text
    assert outcome.reply is not None
    assert outcome.reply.finish_reason == {"openai": "stop", "anthropic": "end_turn"}[dialect]
    assert outcome.usage.input_tokens > 0
    assert outcome.usage.output_tokens > 0
    assert (shown(seen) == outcome.text) is streamed
    server.check_verdict(calls=1)


@every_dialect
@whole_and_streamed
@pytest.mark.parametrize("status", [408, 409, 429, 500, 503, 529])
def test_a_transient_fault_is_tried_again(server, dialect, streamed, status):
    server.script({"type": "fail", "status": status, "retry_after": 0.02, "times": 1})
    outcome, _ = run(server, dialect, streamed=streamed)
    assert outcome.ok, outcome.error
    assert [attempt.status for attempt in outcome.attempts] == [status, 200]
    server.check_verdict(calls=1)


@every_dialect
@whole_and_streamed
def test_a_hint_is_waited_for_in_full(server, dialect, streamed):
    server.script({"type": "fail", "status": 429, "retry_after": 0.2, "times": 2})
    outcome, _ = run(server, dialect, streamed=streamed)
    assert outcome.ok, outcome.error
    first, second, third = outcome.attempts
    assert second.started - (first.started + first.seconds) >= 0.2
    assert third.started - (second.started + second.seconds) >= 0.2
    server.check_verdict(calls=1)


@every_dialect
@whole_and_streamed
@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InvalidRequestError), (401, AuthError), (403, AuthError), (404, NotFoundError), (422, InvalidRequestError)],
)
def test_what_no_retry_cures_is_asked_once(server, dialect, streamed, status, kind):
    server.script({"type": "fail", "status": status, "times": None, "message": "No, never."})
    outcome, seen = run(server, dialect, streamed=streamed)
    assert isinstance(outcome.error, kind)
    assert "No, never." in str(outcome.error)
    assert len(outcome.attempts) == 1
    assert seen == []
    server.check_verdict(calls=1)


@every_dialect
@whole_and_streamed
def test_a_slow_answer_is_a_timeout_that_is_tried_again(server, dialect, streamed):
    server.script({"type": "delay", "seconds": 0.5, "times": 1})
    outcome, _ = run(server, dialect, streamed=streamed, timeouts=Timeouts(first_byte=0.2))
    assert outcome.ok, outcome.error
    assert [getattr(attempt.error, "phase", None) for attempt in outcome.attempts] == ["first_byte", None]
    assert server.ask("GET", "/verdict")["errors"] == 0


@every_dialect
@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        pytest.param("disconnect", CallError, id="a-cut-connection"),
        pytest.param("truncate", DecodeError, id="an-end-without-a-finish-reason"),
        pytest.param("malformed", DecodeError, id="a-chunk-that-is-no-json"),
        pytest.param("stall", TimeoutError, id="a-stall"),
    ],
)
def test_a_stream_that_breaks_is_begun_again_and_the_viewer_is_told(server, dialect, fault, kind):
    server.script({"type": "stream_fault", "kind": fault, "after_chunks": 6, "stall_seconds": 1.0, "times": 1})
    outcome, seen = run(server, dialect, streamed=True, timeouts=Timeouts(idle=0.3))
    assert outcome.ok, outcome.error
    broken, good = outcome.attempts
    assert isinstance(broken.error, kind)
    assert broken.error.transient
    assert broken.error.partial
    assert outcome.text.startswith(broken.error.partial)
    assert good.error is None
    assert sum(isinstance(piece, rxllm.Restarted) for piece in seen) == 1
    assert shown(seen) == outcome.text
    # An answer that nobody listens to any more ends for the server when it sees that, or has sent all of it: perhaps
    # after the next attempt, which is a call of its own for it then.
    server.check_verdict(calls=1, unsure={"stall": "none", "malformed": "malformed_chunk_ignored"}.get(fault, ""))


@every_dialect
def test_a_slow_first_token_is_within_the_time_of_the_first_byte_or_of_a_gap(server, dialect):
    server.script({"type": "slow_first_token", "seconds": 0.4, "times": 1})
    outcome, _ = run(server, dialect, streamed=True, timeouts=Timeouts(first_byte=5.0, idle=5.0))
    assert outcome.ok, outcome.error
    assert len(outcome.attempts) == 1
    server.check_verdict(calls=1)


def weather(dialect: str) -> rxllm.Request:
    """Return a question that the model may answer with a call."""
    named: dict[str, Any] = {"name": "weather", "description": "Look it up."}
    if dialect == "openai":
        return rxllm.chat("What is it like?", tools=[{"type": "function", "function": {**named, "parameters": TOOL}}])
    return rxllm.chat("What is it like?", tools=[{**named, "input_schema": TOOL}])


@every_dialect
@whole_and_streamed
def test_a_scripted_tool_call_comes_as_it_is(server, dialect, streamed):
    server.script({"type": "reply", "tool_calls": [{"name": "weather", "arguments": {"city": "Oslo"}}], "times": 1})
    outcome, _ = run(server, dialect, streamed=streamed, request=weather(dialect))
    assert outcome.ok, outcome.error
    assert outcome.reply is not None
    (call,) = outcome.reply.tool_calls
    assert (call.name, call.decoded()) == ("weather", {"city": "Oslo"})
    assert outcome.reply.finish_reason == {"openai": "tool_calls", "anthropic": "tool_use"}[dialect]
    server.check_verdict(calls=1)


@every_dialect
@whole_and_streamed
@pytest.mark.parametrize("fault", ["malformed_arguments", "unknown_tool"])
def test_a_broken_tool_call_is_the_callers_to_judge(server, dialect, streamed, fault):
    """The arguments are text until somebody decodes them, and a name that was never offered is a name."""
    server.script({"type": "tool_fault", "kind": fault, "times": 1})
    outcome, _ = run(server, dialect, streamed=streamed, request=weather(dialect))
    assert outcome.ok, outcome.error
    assert outcome.reply is not None
    (call,) = outcome.reply.tool_calls
    assert (call.name == "weather") is (fault == "malformed_arguments")
    if fault == "malformed_arguments":
        with pytest.raises(ValidationError, match="weather"):
            call.decoded(Place)
    else:
        assert call.decoded(Place).city
    server.check_verdict(calls=1)
