"""`call` against llmock, a server of somebody else's that grades its clients."""

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
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

import rxllm
from rxllm import Backoff, Gate, Outcome, Timeouts
from rxllm.errors import AuthError, InvalidRequestError, NotFoundError, RateLimitedError, ServerError

pytestmark = pytest.mark.live

START_SECONDS = 40.0
QUICK = Backoff(attempts=5, base=0.02, cap=0.5)


@pytest.fixture(autouse=True, scope="module")
def _there_is_a_server_in_ci() -> None:
    if importlib.util.find_spec("llmock") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("llmock is not installed: it belongs to the extra 'test'")
        pytest.skip("llmock is not installed")


class Server:
    """llmock as a child process."""

    def __init__(self, *arguments: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.address = f"http://127.0.0.1:{probe.getsockname()[1]}"
        run = "import sys; from llmock.cli import app; sys.argv[0] = 'llmock'; app()"
        port = self.address.rpartition(":")[2]
        options = ["serve", "--host", "127.0.0.1", "--port", port, "--log-level", "error", *arguments]
        self._process = subprocess.Popen(
            [sys.executable, "-c", run, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + START_SECONDS
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                self.ask("GET", "/requests")
                return
            assert self._process.poll() is None, "llmock ended by itself"
            assert time.monotonic() < until, "llmock does not listen"
            time.sleep(0.05)

    @property
    def url(self) -> str:
        return f"{self.address}/v1"

    def ask(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}/_llmock{path}", data, method=method)  # noqa: S310  loopback
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310  loopback
            found: dict[str, Any] = json.load(answer)
        return found

    def script(self, *behaviors: dict[str, Any]) -> None:
        self.ask("POST", "/scenario", {"behaviors": behaviors})

    def requests(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask("GET", "/requests")["requests"]
        return found

    def check_verdict(self, *, calls: int) -> dict[str, Any]:
        """There is no flaw, not even one that is a warning."""
        verdict = self.ask("GET", "/verdict")
        assert verdict["findings"] == []
        assert verdict["passed"]
        assert verdict["calls"] == calls
        return verdict

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(10)


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    server = Server("--response-style", "echo")
    yield server
    server.close()


@pytest.fixture
def server(running: Server) -> Server:
    running.ask("POST", "/reset")
    return running


def prompts(count: int) -> list[str]:
    return [f"Say {n} in a word." for n in range(count)]


def run(server: Server, items: list[Any], *, key: str = "any", **settings: Any) -> list[Outcome[str]]:
    async def main() -> list[Outcome[str]]:
        async with rxllm.OpenAI("gpt-4o-mini", server.url, api_key=key) as client:
            source = rxllm.from_iterable(items)
            return await rxllm.acollect(source.pipe(rxllm.call(client, ordered=True, **{"retry": QUICK, **settings})))

    return asyncio.run(main())


def test_plain_calls_are_answered_each_with_its_own_answer(server):
    outcomes = run(server, prompts(60), gate=Gate(concurrency=8))
    for outcome, prompt in zip(outcomes, prompts(60), strict=True):
        assert prompt in outcome.text
        assert len(outcome.attempts) == 1
        assert outcome.usage.total_tokens > 0
        assert outcome.reply is not None
        assert outcome.reply.finish_reason == "stop"
    server.check_verdict(calls=60)


@pytest.mark.parametrize("status", [408, 409, 429, 500, 502, 503, 504, 529])
def test_a_transient_fault_is_tried_again_with_back_off(server, status):
    server.script({"type": "fail", "status": status, "times": 1})
    (outcome,) = run(server, prompts(1))
    assert outcome.ok
    assert [attempt.status for attempt in outcome.attempts] == [status, 200]
    server.check_verdict(calls=1)


def test_a_scripted_hint_is_waited_for_in_full(server):
    server.script({"type": "fail", "status": 429, "retry_after": 0.4, "times": 2})
    outcomes = run(server, prompts(2))
    assert all(outcome.ok for outcome in outcomes)
    assert sum(len(outcome.attempts) for outcome in outcomes) == 4
    for outcome in outcomes:
        for before, after in zip(outcome.attempts, outcome.attempts[1:], strict=False):
            assert after.started - (before.started + before.seconds) >= 0.4
    server.check_verdict(calls=2)


@pytest.mark.parametrize(
    ("status", "kind"),
    [(400, InvalidRequestError), (401, AuthError), (403, AuthError), (404, NotFoundError), (422, InvalidRequestError)],
)
def test_what_no_retry_cures_is_asked_once(server, status, kind):
    server.script({"type": "fail", "status": status, "times": None, "message": "No, never."})
    (outcome,) = run(server, prompts(1))
    assert type(outcome.error) is kind
    assert "No, never." in str(outcome.error)
    assert len(outcome.attempts) == 1
    server.check_verdict(calls=1)


def test_an_outage_is_given_up_after_the_tries_and_not_before(server):
    server.script({"type": "fail", "status": 500, "times": None})
    outcomes = run(server, prompts(4), retry=Backoff(attempts=3, base=0.02))
    assert all(type(outcome.error) is ServerError for outcome in outcomes)
    assert [len(outcome.attempts) for outcome in outcomes] == [3] * 4
    verdict = server.ask("GET", "/verdict")
    assert verdict["errors"] == 0
    assert {finding["code"] for finding in verdict["findings"]} <= {"no_backoff"}  # three draws can be small by chance


def test_a_slow_answer_is_a_timeout_that_is_tried_again(server):
    server.script({"type": "delay", "seconds": 1.5, "times": 1})
    (outcome,) = run(server, prompts(1), timeouts=Timeouts(first_byte=0.5))
    assert outcome.ok
    assert [getattr(attempt.error, "phase", None) for attempt in outcome.attempts] == ["first_byte", None]
    assert server.ask("GET", "/verdict")["errors"] == 0


def test_a_prompt_that_is_too_long_is_not_sent_again(server):
    server.script({"type": "fail", "status": 400, "code": "context_length_exceeded", "message": "Too long."})
    (outcome,) = run(server, prompts(1))
    assert isinstance(outcome.error, InvalidRequestError)
    assert len(outcome.attempts) == 1
    server.check_verdict(calls=1)


def test_a_mix_of_faults_over_many_calls_leaves_no_flaw(server):
    server.script(
        {"type": "fail", "status": 503, "times": 5},
        {"type": "fail", "status": 429, "retry_after": 0.2, "times": 5},
        {"type": "fail", "status": 500, "times": 5},
    )
    outcomes = run(server, prompts(100), gate=Gate(concurrency=16))
    assert all(outcome.ok for outcome in outcomes)
    statuses = Counter(attempt.status for outcome in outcomes for attempt in outcome.attempts)
    assert statuses == {200: 100, 503: 5, 429: 5, 500: 5}
    assert len(server.requests()) == 115  # as many as we say
    server.check_verdict(calls=100)


@pytest.mark.parametrize(
    ("quota", "items"),
    [
        # a bucket of 600 that refills 10 a second, and 15 more than it holds
        pytest.param(["--rpm", "600"], prompts(615), id="requests"),
        # a bucket of 60,000 that refills 1,000 a second, and a little more than it holds
        pytest.param(["--tpm", "60000"], [rxllm.chat(text, max_tokens=2_000) for text in prompts(30)], id="tokens"),
    ],
)
def test_a_quota_is_kept_by_exact_hints_alone(quota, items):
    server = Server(*quota)
    try:
        outcomes = run(server, items, key="one", window=64, gate=Gate(headers=False))
        assert all(outcome.ok for outcome in outcomes)
        refusals = [attempt.error for outcome in outcomes for attempt in outcome.attempts if attempt.status == 429]
        assert refusals
        assert all(isinstance(error, RateLimitedError) and error.retry_after for error in refusals)
        server.check_verdict(calls=len(items))
    finally:
        server.close()


def test_a_gate_that_knows_the_quota_keeps_it_without_a_refusal():
    """The bucket of 60 refills one a second: the gate waits, and the server never has to say so."""
    server = Server("--rpm", "60", "--tpm", "6000")
    try:
        gate = Gate("58 requests/minute", "6000 tokens/minute", rate=100.0)
        outcomes = run(server, [rxllm.chat(prompt, max_tokens=20) for prompt in prompts(70)], gate=gate, deadline=2.0)
        assert [outcome.ok for outcome in outcomes] == [True] * 58 + [False] * 12  # those wait beyond the deadline
        assert all(len(outcome.attempts) == outcome.ok for outcome in outcomes)
        (too_large,) = run(server, [rxllm.chat("x", max_tokens=20_000)], gate=Gate("6000 tokens/minute"))
        assert isinstance(too_large.error, InvalidRequestError)
        assert "6,000" in str(too_large.error)
        server.check_verdict(calls=58)  # nothing else was sent
    finally:
        server.close()
