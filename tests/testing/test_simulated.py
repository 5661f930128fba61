"""SimulatedProvider in-process, over real HTTP on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar

import aiohttp
import pytest

from rxllm.errors import ConfigError
from rxllm.testing import _connection, _server
from rxllm.testing._quotas import Strategy
from rxllm.testing.simulated import Latency, ServerQuota, SimulatedProvider, fingerprint

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop}
with contextlib.suppress(ImportError):
    import uvloop

    LOOPS["uvloop"] = uvloop.new_event_loop

current = ["asyncio"]


@pytest.fixture(autouse=True, params=LOOPS)
def loop_of_the_server(request: pytest.FixtureRequest) -> None:
    """Run every test on every kind of loop: what a reset or a half-closed connection does is up to it."""
    current[0] = request.param


T = TypeVar("T")
Case = Callable[[SimulatedProvider, aiohttp.ClientSession], Awaitable[None]]


def run_loop(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=LOOPS[current[0]]) as runner:
        return runner.run(main)


def run(case: Case, **settings: Any) -> SimulatedProvider:
    """Run a case against a provider of its own; check that nothing is left of it."""

    async def main() -> SimulatedProvider:
        before = asyncio.all_tasks()
        async with (
            SimulatedProvider(**settings) as provider,
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=20)) as session,
        ):
            await case(provider, session)
        assert asyncio.all_tasks() == before
        statistics = provider.statistics()
        assert (statistics.connections, statistics.in_flight) == (0, 0)
        assert statistics.arrivals == len(provider.log()) == sum(statistics.reasons.values())
        return provider

    return run_loop(main())


def body(prompt: str = "Say it.", **params: Any) -> dict[str, Any]:
    return {"model": "m", "messages": [{"role": "user", "content": prompt}], **params}


async def ask(
    provider: SimulatedProvider, session: aiohttp.ClientSession, prompt: str = "Say it.", **params: Any
) -> tuple[int, Any, Any]:
    """Return status, headers and what was read: JSON, or text when it is none."""
    async with session.post(f"{provider.url}/chat/completions", json=body(prompt, **params)) as reply:
        text = await reply.text(errors="replace")
        with contextlib.suppress(ValueError):
            return reply.status, reply.headers, json.loads(text)
        return reply.status, reply.headers, text


def request(prompt: str = "Say it.", *, extra: bytes = b"", path: bytes = b"/v1/chat/completions") -> bytes:
    data = json.dumps(body(prompt)).encode()
    return b"POST %b HTTP/1.1\r\nHost: x\r\n%bContent-Length: %d\r\n\r\n%b" % (path, extra, len(data), data)


async def raw(provider: SimulatedProvider, *pieces: bytes, until: int | None = None) -> bytes:
    """Send pieces over one connection; read to its end, or until so many replies have begun."""
    port = int(provider.url.split(":")[2].split("/")[0])
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    seen = b""
    try:
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0)
        while until is None or seen.count(b"HTTP/1.1 ") < until:
            if not (data := await reader.read(65_536)):
                break
            seen += data
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
    return seen


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait until the server has seen it."""
    for _ in range(2_000):
        if condition():
            return
        await asyncio.sleep(0.005)
    raise AssertionError("it never came true")


# answers


def test_each_answer_belongs_to_its_own_request() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        prompts = [f"Summarize:\n\nThing number {n} does something." for n in range(200)]
        replies = await asyncio.gather(*(ask(provider, session, prompt) for prompt in prompts))
        for prompt, (status, _, reply) in zip(prompts, replies, strict=True):
            assert status == 200
            assert fingerprint(prompt) in reply["choices"][0]["message"]["content"]
        assert provider.log().markers() == {fingerprint(prompt): 1 for prompt in prompts}

    run(case, latency=Latency(base=0.001, per_token=0.0001, sigma=1.0))


def test_all_routes_answer_in_the_vendors_shapes() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with session.post(f"{provider.url}/completions", json={"model": "m", "prompt": "abc"}) as reply:
            assert (await reply.json())["choices"][0]["text"].startswith(("In ", "Briefly", "To "))
        async with session.post(f"{provider.url}/embeddings", json={"model": "m", "input": [[1, 2], [3]]}) as reply:
            assert (await reply.json())["usage"] == {"prompt_tokens": 3, "total_tokens": 3}
        async with session.get(f"{provider.url}/models") as reply:
            assert [model["id"] for model in (await reply.json())["data"]] == ["a", "b"]
        async with session.get(f"{provider.url}/models/b") as reply:
            assert (await reply.json())["id"] == "b"
        for path, method, status in (
            ("/models/c", "GET", 404),
            ("/nothing", "POST", 404),
            ("/chat/completions", "GET", 405),
            ("/models", "DELETE", 405),
            ("/chat/completions", "HEAD", 405),
        ):
            async with session.request(method, provider.url + path) as reply:
                assert reply.status == status
                if method != "HEAD":
                    assert (await reply.json())["error"]["type"] == "invalid_request_error"

    run(case, models=["a", "b"])


def test_the_user_of_a_body_is_its_marker_in_the_log() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        await ask(provider, session, user="id-7")
        entry = provider.log()[0]
        assert (entry.marker, entry.reason, entry.status, entry.admitted) == ("id-7", "ok", 200, True)
        assert entry.answered is not None
        assert provider.log().started <= entry.arrived <= entry.answered

    run(case)


def test_an_answer_function_that_fails_is_the_servers_error() -> None:
    def broken(prompt: str, body: dict) -> str:
        if prompt == "good":
            return body["model"]
        raise ValueError(prompt)

    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        assert (await ask(provider, session, "good"))[2]["choices"][0]["message"]["content"] == "m"
        status, _, reply = await ask(provider, session, "bad")
        assert status == 500
        assert "ValueError: bad" in reply["error"]["message"]
        assert provider.log()[1].reason == "answer_failed"

    run(case, answer=broken)
    run(case, answer=broken, charge="actual")


@pytest.mark.parametrize(
    ("data", "words"),
    [(b"{", "truncated"), (b'{"model":"m"}', "messages"), (b'{"messages":[],"n":1}', "at least 1 item")],
)
def test_a_bad_body_is_a_400_that_says_why_and_the_connection_lives_on(data: bytes, words: str) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with session.post(f"{provider.url}/chat/completions", data=data) as reply:
            assert reply.status == 400
            assert words in (await reply.json())["error"]["message"]
        assert (await ask(provider, session))[0] == 200
        assert [entry.connection for entry in provider.log()] == [0, 0]

    run(case)


def test_only_the_right_key_is_let_in() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        for header, status in ({}, 401), ({"Authorization": "Bearer no"}, 401), ({"Authorization": "Bearer k1"}, 200):
            async with session.post(f"{provider.url}/chat/completions", json=body(), headers=header) as reply:
                assert reply.status == status
        assert provider.log().reasons() == {"unauthorized": 2, "ok": 1}
        assert "k1" not in repr(provider)
        provider.set(key=None)
        assert (await ask(provider, session))[0] == 200

    run(case, key="k1")


# quotas


@pytest.mark.parametrize("strategy", ["fixed", "sliding", "bucket"])
def test_no_more_requests_get_through_than_the_quota_allows(strategy: Strategy) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        replies = await asyncio.gather(*(ask(provider, session) for _ in range(25)))
        assert sorted(status for status, _, _ in replies) == [200] * 10 + [429] * 15
        for status, headers, reply in replies:
            if status == 429:
                assert reply["error"]["code"] == "rate_limit_exceeded"
                assert 0 < int(headers["retry-after-ms"]) <= 60_000
        assert provider.log().reasons() == {"ok": 10, "requests": 15}
        assert provider.peak(60.0) == 10

    run(case, requests=ServerQuota(10, 60.0, strategy))


def test_who_comes_back_when_told_gets_through() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        for _ in range(6):
            status, headers, _ = await ask(provider, session)
            while status == 429:
                await asyncio.sleep(int(headers["retry-after-ms"]) / 1000)
                status, headers, _ = await ask(provider, session)
        assert provider.log().reasons()["ok"] == 6
        assert provider.peak(0.05) <= 2

    run(case, requests=ServerQuota(2, 0.05))


def test_tokens_are_reserved_with_max_tokens_or_charged_as_they_are() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        await ask(provider, session, "x" * 40, max_tokens=30)
        await ask(provider, session, "x" * 40)
        provider.set(charge="actual")
        await ask(provider, session, "x" * 40, max_tokens=30)
        assert [entry.charged for entry in provider.log()] == [40, 26, 20]
        assert provider.peak(60.0, "tokens") == provider.statistics().charged_tokens == 86
        status, _, reply = await ask(provider, session, "x" * 40)
        assert status == 429
        assert "on tokens: Limit 100, Used 86, Requested 20." in reply["error"]["message"]

    run(case, tokens=100, answer="echo")


@pytest.mark.parametrize("strategy", ["fixed", "sliding", "bucket"])
def test_reserved_tokens_are_settled_when_the_answer_is_sent(strategy: Strategy) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        first = asyncio.ensure_future(ask(provider, session, "x" * 40, max_tokens=60))
        await eventually(lambda: provider.statistics().in_flight == 1)
        assert (await ask(provider, session, "x" * 40, max_tokens=60))[0] == 429  # 70 of 100 are reserved
        assert provider.log()[0].charged == provider.statistics().charged_tokens == 70
        _, headers, _ = await first
        assert headers["x-ratelimit-remaining-tokens"] == "80"  # what it said is settled already
        assert (await ask(provider, session, "x" * 40, max_tokens=60))[0] == 200
        assert [entry.charged for entry in provider.log() if entry.admitted] == [20, 20]
        assert provider.peak(600.0, "tokens") == provider.statistics().charged_tokens == 40

    run(case, tokens=ServerQuota(100, 600.0, strategy), charge="settled", answer="echo", latency=0.2)


@pytest.mark.parametrize("fault", ["500", "hang_up", "cancelled"])
def test_reserved_tokens_stay_reserved_when_no_answer_is_sent(fault: str) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        with contextlib.suppress(aiohttp.ClientError, TimeoutError):
            await asyncio.wait_for(ask(provider, session, "x" * 40, max_tokens=60), 0.05)
        await eventually(lambda: provider.statistics().in_flight == 0)
        assert [entry.charged for entry in provider.log()] == [70]
        assert (await ask(provider, session, "x" * 40, max_tokens=60))[0] == 429

    cancelled = fault == "cancelled"
    faults = {} if cancelled else {fault: 1.0}
    run(case, tokens=100, charge="settled", answer="echo", latency=30.0 if cancelled else 0.0, faults=faults)


def test_a_settlement_leaves_a_quota_alone_that_came_after_its_admission() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        first = asyncio.ensure_future(ask(provider, session, "x" * 40, max_tokens=60))
        await eventually(lambda: provider.statistics().in_flight == 1)
        provider.set(tokens=ServerQuota(1000, 600.0, "bucket", burst=500))
        assert (await ask(provider, session, "x" * 40, max_tokens=110))[1]["x-ratelimit-remaining-tokens"] == "480"
        await first
        assert (await ask(provider, session, "x" * 40, max_tokens=110))[1]["x-ratelimit-remaining-tokens"] == "460"

    run(case, tokens=ServerQuota(100, 600.0), charge="settled", answer="echo", latency=0.05)


def test_a_request_larger_than_the_quota_is_refused_without_a_hint() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        status, headers, reply = await ask(provider, session, max_tokens=500)
        assert status == 429
        assert "Request too large" in reply["error"]["message"]
        assert "Retry-After" not in headers
        assert provider.log()[0].reason == "too_large"

    run(case, tokens=100)


def test_a_refusal_by_tokens_costs_a_request_only_when_asked_for() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        for charged in (False, True):
            provider.set(charge_refused=charged)
            _, headers, _ = await ask(provider, session, max_tokens=500)
            assert headers["x-ratelimit-remaining-requests"] == ("9" if charged else "10")

    run(case, tokens=100, requests=10)


def test_limit_headers_come_with_every_reply_or_not_at_all() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        _, headers, _ = await ask(provider, session, "x" * 40, max_tokens=30)
        assert headers["x-ratelimit-limit-requests"] == "60"
        assert headers["x-ratelimit-remaining-requests"] == "59"
        assert re.fullmatch(r"1m0s|59\.\d+s", headers["x-ratelimit-reset-requests"])
        assert headers["x-ratelimit-limit-tokens"] == "150000"
        assert headers["x-ratelimit-remaining-tokens"] == "149960"
        assert re.fullmatch(r"1m0s|59\.\d+s", headers["x-ratelimit-reset-tokens"])
        provider.set(script=["429"])
        assert "x-ratelimit-limit-requests" in (await ask(provider, session))[1]
        provider.set(limit_headers=False)
        assert not [name for name in (await ask(provider, session))[1] if "ratelimit" in name.lower()]

    run(case, requests=60, tokens=150_000)


def test_the_hint_comes_in_the_form_that_was_asked_for() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        forms = {}
        for form in ("both", "seconds", "date", "off", True, False):
            provider.set(retry_after=form)
            _, headers, _ = await ask(provider, session)
            forms[form] = headers.get("Retry-After"), headers.get("retry-after-ms")
        assert forms["both"] == forms[True] == ("2", "1250")
        assert forms["seconds"] == ("2", None)
        assert forms["off"] == forms[False] == (None, None)
        assert parsedate_to_datetime(forms["date"][0]).tzinfo is not None

    run(case, faults={"429": 1.0}, fault_retry_after=1.25)


@pytest.mark.parametrize("status", [429, 503])
def test_above_the_ceiling_requests_are_refused(status: int) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        waiting = [asyncio.ensure_future(ask(provider, session)) for _ in range(20)]
        await eventually(lambda: sum(task.done() for task in waiting) == 12)
        assert {task.result()[0] for task in waiting if task.done()} == {status}
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
        assert provider.statistics().max_in_flight == 8
        assert max(entry.in_flight for entry in provider.log()) == 8
        assert provider.log().reasons() == {"ok": 8, "max_in_flight": 12}

    run(case, max_in_flight=8, overload_status=status, latency=30.0)


# time


def test_no_answer_is_early() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        await asyncio.gather(*(ask(provider, session) for _ in range(8)))
        for entry in provider.log():
            assert entry.answered - entry.arrived >= 0.01

    run(case, latency=0.01, knee=2)


def test_a_short_answer_overtakes_a_long_one() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        long = asyncio.ensure_future(ask(provider, session, "x" * 40_000))
        await eventually(lambda: provider.statistics().in_flight == 1)
        assert (await ask(provider, session, "x" * 4))[0] == 200
        assert provider.statistics().in_flight == 1
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)

    run(case, latency=Latency(per_token=0.01), answer="echo")


def test_waiting_for_an_answer_costs_few_turns_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: list[None] = []
    tick = _server.Server._tick

    def counting(server: _server.Server) -> None:
        ticks.append(None)
        tick(server)

    monkeypatch.setattr(_server.Server, "_tick", counting)

    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        assert (await ask(provider, session))[0] == 200
        assert 1 <= len(ticks) <= 5

    run(case, latency=0.03)


def test_settings_change_at_their_steps_and_by_hand() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with asyncio.timeout(10):
            while (await ask(provider, session))[0] != 503:
                pass
        provider.set(faults={})
        assert (await ask(provider, session))[0] == 200

    run(case, steps=[(1_000.0, {"faults": {"500": 1.0}}), (0.02, {"faults": {"503": 1.0}})])


@pytest.mark.parametrize("relief", ["a-better-knee", "the-others-go-away"])
def test_who_waits_is_served_sooner_when_there_is_room(relief: str) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as wide:
            waiting = [asyncio.ensure_future(ask(provider, wide)) for _ in range(400)]  # 24 s at this knee
            await eventually(lambda: provider.statistics().in_flight == 400)
            await asyncio.sleep(0.1)  # the server has looked, and sleeps for long
            if relief == "a-better-knee":
                provider.set(knee=None)
            else:
                for task in waiting[1:]:
                    task.cancel()
            async with asyncio.timeout(5):
                await asyncio.gather(*waiting, return_exceptions=True)
            assert waiting[0].result()[0] == 200

    run(case, latency=0.06, knee=1)


def test_a_cut_quota_counts_what_was_used_before() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        for _ in range(5):
            assert (await ask(provider, session))[0] == 200
        provider.set(requests=5)
        assert (await ask(provider, session))[0] == 429
        provider.set(requests=None)
        assert (await ask(provider, session))[0] == 200

    run(case, requests=100)


# faults


@pytest.mark.parametrize("fault", ["400", "403", "408", "409", "425", "500", "502", "503", "504", "529", "499"])
def test_a_status_fault_is_an_error_in_the_vendors_shape(fault: str) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        status, headers, reply = await ask(provider, session)
        assert status == int(fault)
        assert reply["error"]["message"] == f"Simulated fault {fault}."
        assert "Retry-After" not in headers
        entry = provider.log()[0]
        assert (entry.reason, entry.status) == (fault, status)
        assert entry.admitted == (status >= 500 and status not in {503, 529})

    run(case, faults={fault: 1.0})


def test_a_refusal_has_a_hint_a_bare_one_has_none_and_an_empty_balance_has_its_code() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        status, headers, reply = await ask(provider, session)
        assert (status, headers["Retry-After"], reply["error"]["code"]) == (429, "1", "rate_limit_exceeded")
        status, headers, reply = await ask(provider, session)
        assert (status, headers.get("Retry-After")) == (429, None)
        status, headers, reply = await ask(provider, session)
        assert (status, reply["error"]["type"], headers.get("Retry-After")) == (429, "insufficient_quota", None)
        assert reply["error"]["code"] == "credit_balance_exhausted"
        assert (await ask(provider, session))[0] == 200
        assert provider.statistics().admitted == 1

    run(case, script=["429", "429_bare", "insufficient_quota", None])


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("reset", aiohttp.ClientOSError),
        ("hang_up", aiohttp.ServerDisconnectedError),
        ("stall", aiohttp.ClientOSError),
        ("truncated", aiohttp.ClientPayloadError),
    ],
)
def test_a_broken_connection_is_seen_as_one(fault: str, error: type[Exception]) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        with pytest.raises(error) as caught:
            await ask(provider, session)
        if fault in {"reset", "stall"}:
            assert isinstance(caught.value, ConnectionResetError | aiohttp.ClientOSError)
            assert "reset" in str(caught.value).lower()
        entry = provider.log()[0]
        assert (entry.reason, entry.admitted, entry.disconnected) == (fault, True, False)
        assert entry.status == (200 if fault == "truncated" else 0)
        assert (entry.answered is None) == (fault != "truncated")
        assert (await ask(provider, session))[0] == 200

    run(case, script=[fault], max_stall=0.02)


@pytest.mark.parametrize("fault", ["garbled", "html", "wrong_shape", "empty", "html_502"])
def test_a_spoilt_answer_is_complete_http_and_no_answer(fault: str) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        status, headers, reply = await ask(provider, session)
        assert status == (502 if fault == "html_502" else 200)
        assert headers["Content-Type"].startswith("text/html" if "html" in fault else "application/json")
        if fault == "wrong_shape":
            assert "choices" not in reply
        else:
            assert isinstance(reply, str)
        assert (await ask(provider, session))[0] == 200
        assert [entry.connection for entry in provider.log()] == [0, 0]

    run(case, script=[fault])


def test_marked_requests_fail_and_the_others_do_not() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        seen = [(await ask(provider, session, prompt))[0] for prompt in ("poison", "fine", "flaky", "flaky", "poison")]
        assert seen == [500, 200, 429, 200, 500]

    run(case, marked={"poison": "500", "flaky": ["429"]})


def test_the_mix_of_faults_is_the_same_for_the_same_seed() -> None:
    def statuses(seed: int) -> list[int]:
        seen: list[int] = []

        async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
            seen.extend([(await ask(provider, session))[0] for _ in range(60)])

        run(case, seed=seed, faults={"500": 0.3, "429": 0.2})
        return seen

    assert statuses(1) == statuses(1) != statuses(2)


# clients that go away, connections that end


def test_the_jitter_of_the_path_delays_each_request_by_itself_and_lets_them_overtake() -> None:
    received: dict[str, float] = {}

    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        handle = _server.Server.handle

        def noting(server: _server.Server, connection: Any, head: Any, data: bytes) -> None:
            received[json.loads(data)["user"]] = _server.monotonic()
            handle(server, connection, head, data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_server.Server, "handle", noting)
            await asyncio.gather(*(ask(provider, session, user=str(n)) for n in range(60)))

    log = run(case, path_jitter=(0.02, 0.08)).log()
    assert sorted(row.arrived for row in log) == [row.arrived for row in log]
    assert [row.marker for row in log] != list(received)
    delays = [row.arrived - received[row.marker] for row in log]
    assert min(delays) > 0.018  # the loop's timers may be a bit early
    assert len(set(delays)) == 60


def test_the_jitter_of_the_path_is_drawn_from_the_seed_and_changes_no_fault() -> None:
    def seen(seed: int, jitter: float) -> tuple[list[int], list[float]]:
        drawn: list[float] = []

        async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
            call_later = provider._running().loop.call_later
            provider._running().loop = Loop(call_later)
            statuses.extend([(await ask(provider, session))[0] for _ in range(20)])

        class Loop:
            def __init__(self, call_later: Any) -> None:
                self.later = call_later

            def call_later(self, delay: float, *args: Any) -> Any:
                drawn.append(delay)
                return self.later(delay, *args)

        statuses: list[int] = []
        run(case, faults={"500": 0.5}, path_jitter=jitter, seed=seed)
        return statuses, drawn

    with_jitter, drawn = seen(1, 0.002)
    assert seen(1, 0.002) == (with_jitter, drawn)
    assert len(set(drawn)) == 20
    assert all(0 <= delay <= 0.002 for delay in drawn)
    assert seen(2, 0.002)[1] != drawn
    assert seen(1, 0.0) == (with_jitter, [])


@pytest.mark.parametrize("latency", [0.0, 30.0], ids=["answered-at-once", "slow"])
def test_a_request_that_was_sent_is_judged_although_its_client_went_away_while_it_travelled(latency: float) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        asking = asyncio.ensure_future(ask(provider, session))
        await eventually(lambda: bool(provider._running()._travelling))
        asking.cancel()
        assert len(provider.log()) == 0
        await eventually(lambda: provider.statistics().disconnected == 1)
        assert [(row.admitted, row.disconnected, row.answered) for row in provider.log()] == [(True, True, None)]
        assert provider.statistics().in_flight == 0
        assert (await ask(provider, session))[0] == 429

    run(case, requests=1, path_jitter=(0.2, 0.22), latency=latency)


def test_after_the_block_nothing_travels_any_more() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        asking = asyncio.ensure_future(ask(provider, session))
        await eventually(lambda: bool(provider._running()._travelling))
        (timer,) = provider._running()._travelling.values()
        await provider.close()
        assert timer.cancelled()
        with pytest.raises(aiohttp.ClientError):
            await asking

    assert len(run(case, path_jitter=(0.5, 0.6)).log()) == 0


def test_a_client_that_goes_away_frees_its_place_and_is_in_the_log() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        waiting = [asyncio.ensure_future(ask(provider, session)) for _ in range(20)]
        await eventually(lambda: provider.statistics().in_flight == 20)
        for task in waiting[:15]:
            task.cancel()
        await eventually(lambda: provider.statistics().in_flight == 5)
        assert provider.statistics().disconnected == 15
        assert sum(entry.disconnected for entry in provider.log()) == 15
        assert all(entry.answered is None for entry in provider.log() if entry.disconnected)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)

    provider = run(case, latency=30.0)
    assert provider.statistics().disconnected == 20


def test_a_stalled_request_ends_when_its_client_goes_away() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(provider, session), 0.05)
        await eventually(lambda: provider.statistics().in_flight == 0)
        assert provider.log()[0].disconnected

    run(case, faults={"stall": 1.0})


def test_an_idle_connection_is_closed_after_its_last_reply() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        seen = await raw(provider, request() * 5)
        assert seen.count(b"HTTP/1.1 200") == 2
        assert b"Connection" not in seen

    run(case, requests_per_connection=2)


def test_a_connection_reused_too_often_is_closed_without_an_answer() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        seen = await raw(provider, request() * 5)
        assert seen.count(b"HTTP/1.1 200") == 2
        assert provider.log().reasons() == {"ok": 2, "hung_up": 1}
        assert (provider.log()[2].status, provider.log()[2].answered) == (0, None)

    run(case, requests_per_connection=2, hang_up="reuse")


def test_leaving_the_block_cuts_everyone_off_and_frees_the_port() -> None:
    async def main() -> None:
        async with aiohttp.ClientSession() as session:
            async with SimulatedProvider(latency=30.0) as provider:
                port = int(provider.url.split(":")[2].split("/")[0])
                waiting = [asyncio.ensure_future(ask(provider, session)) for _ in range(10)]
                await eventually(lambda: provider.statistics().in_flight == 10)
            errors = await asyncio.gather(*waiting, return_exceptions=True)
            assert all(isinstance(error, aiohttp.ClientError) for error in errors)
            assert provider.statistics().disconnected == 10
            await provider.close()
            async with SimulatedProvider(port=port) as again:
                assert (await ask(again, session))[0] == 200

    run_loop(main())


def test_a_thousand_connections_are_served_at_once() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as wide:
            waiting = [asyncio.ensure_future(ask(provider, wide)) for _ in range(1_000)]
            await eventually(lambda: provider.statistics().in_flight == 1_000)
            provider.set(knee=None)
            replies = await asyncio.gather(*waiting)
        assert {status for status, _, _ in replies} == {200}
        assert provider.statistics().max_in_flight == provider.statistics().max_connections == 1_000

    run(case, latency=0.1, knee=1)


def test_after_the_block_no_step_comes_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    apply = _server.Server.apply

    def counting(server: _server.Server, changes: dict[str, Any]) -> None:
        seen.append(changes)
        apply(server, changes)

    monkeypatch.setattr(_server.Server, "apply", counting)

    async def main() -> None:
        async with SimulatedProvider(steps=[(0.02, {"knee": 1})]):
            pass
        await asyncio.sleep(0.05)

    run_loop(main())
    assert seen == [{}]


# the wire


def test_pipelined_requests_are_answered_in_order() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        prompts = [f"number {n}" for n in range(300)]
        seen = await raw(provider, b"".join(map(request, prompts)), until=300)
        places = [seen.find(fingerprint(prompt).encode()) for prompt in prompts]
        assert places == sorted(places)
        assert places[0] > 0

    run(case)
    run(case, latency=0.0001)


def test_a_client_that_sends_and_does_not_read_fills_no_memory_and_loses_nothing() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        port = int(provider.url.split(":")[2].split("/")[0])
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 14)
        one = request("x" * 60_000)
        for _ in range(400):  # 24 MB each way: more than the sockets hold
            writer.write(one)
        held = 0
        while (seen := provider.statistics().arrivals) != held or not seen:
            held = seen
            for _ in range(20):
                await asyncio.sleep(0.001)
        assert 0 < held < 400
        (connection,) = provider._running()._connections
        assert len(connection._data) <= _connection.MAX_AHEAD + (1 << 20)
        replies = 0
        while replies < 400:
            head = await reader.readuntil(b"\r\n\r\n")
            length = re.search(rb"Content-Length: (\d+)", head)
            assert length is not None
            await reader.readexactly(int(length[1]))
            replies += 1
        writer.close()
        await writer.wait_closed()

    run(case, answer="echo")


def test_a_request_may_arrive_byte_by_byte_or_with_empty_lines_before_it() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        data = b"\r\n\r\n" + request()
        seen = await raw(provider, *(data[at : at + 1] for at in range(len(data))), until=1)
        assert seen.startswith(b"HTTP/1.1 200 OK\r\n")

    run(case)


def test_a_chunked_body_is_read_like_any_other() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async def pieces() -> AsyncIterator[bytes]:
            data = json.dumps(body("abcd")).encode()
            for at in range(0, len(data), 7):
                yield data[at : at + 7]

        async with session.post(f"{provider.url}/chat/completions", data=pieces()) as reply:
            assert (await reply.json())["choices"][0]["message"]["content"] == "abcd"
        head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        data = json.dumps(body()).encode()
        seen = await raw(provider, (head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)) * 3, until=3)
        assert seen.count(b"HTTP/1.1 200") == 3

    run(case, answer="echo")


def test_a_client_that_expects_a_go_ahead_gets_it() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with session.post(f"{provider.url}/chat/completions", json=body(), expect100=True) as reply:
            assert reply.status == 200

    run(case)


@pytest.mark.parametrize("extra", [b"Connection: close\r\n", b"connection: Keep-Alive, Close\r\n"])
def test_a_client_that_wants_the_connection_closed_gets_it_closed(extra: bytes) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        seen = await raw(provider, request(extra=extra) * 2)
        assert seen.count(b"HTTP/1.1 200") == 1
        assert b"Connection: close\r\n" in seen

    run(case)


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (b"NONSENSE\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00", 400),
        (b"GET / HTTP/3.0\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\nContent-Length: x\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000, 431),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n" + b"z" * 8_000_000, 413),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    ],
    ids=["nonsense", "tls", "http-3", "bad-length", "long-head", "long-body", "bad-chunk"],
)
def test_what_is_no_request_is_refused_and_the_connection_closed(data: bytes, status: int) -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        seen = await raw(provider, data)
        assert seen.startswith(b"HTTP/1.1 %d " % status)
        assert seen.count(b"x-request-id") == 1
        assert b"Connection: close\r\n" in seen
        assert provider.log()[0].reason == "malformed"
        assert (await ask(provider, session))[0] == 200

    run(case)


def test_a_request_that_never_ends_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_connection, "READ_SECONDS", 0.02)

    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        assert (await raw(provider, b"POST /v1/chat")).startswith(b"HTTP/1.1 408 ")
        assert (await raw(provider, request()[:-5])).startswith(b"HTTP/1.1 408 ")

    run(case)


def test_many_different_heads_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_server, "MAX_HEADS", 4)

    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        for number in range(10):
            assert (await raw(provider, request(extra=b"X: %d\r\n" % number), until=1)).startswith(b"HTTP/1.1 200")
        assert len(provider._running().heads) <= 4

    run(case)


def test_the_control_route_exists_only_in_a_child() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        async with session.get(provider.url.removesuffix("/v1") + "/control/None/log") as reply:
            assert reply.status == 404

    run(case)


# wrong use


def test_a_bad_change_changes_nothing() -> None:
    async def case(provider: SimulatedProvider, session: aiohttp.ClientSession) -> None:
        with pytest.raises(ConfigError, match="knee"):
            provider.set(faults={"503": 1.0}, knee=-1)
        assert (await ask(provider, session))[0] == 200

    run(case)


def test_what_does_not_run_says_so() -> None:
    provider = SimulatedProvider()
    for use in (lambda: provider.url, provider.log, provider.statistics, provider.set):
        with pytest.raises(ConfigError, match="not run"):
            use()

    async def twice() -> None:
        async with provider:
            with pytest.raises(ConfigError, match="already"):
                await provider.__aenter__()

    run_loop(twice())
