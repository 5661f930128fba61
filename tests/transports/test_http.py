"""HttpTransport against servers on loopback that play a script: answers in one piece, and what goes for both ways."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import socket
import zlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest
from _scripted import (
    DIRECT,
    KEY,
    PATIENT,
    Close,
    Reset,
    Scripted,
    Stall,
    answer,
    check_clean,
    run,
    scripted,
    sent,
    streamed,
    transport_to,
    until,
)

import rxllm
from rxllm import Outcome, Timeouts
from rxllm.errors import CallError, CancelledError, ConfigError, ConnectionError, DecodeError, TimeoutError
from rxllm.policies.connection import Connection
from rxllm.providers.base import Call
from rxllm.testing.simulated import SimulatedProvider, fingerprint
from rxllm.transports import HttpTransport, Response
from rxllm.transports import http as module

pytestmark = pytest.mark.usefixtures("loops")
SMALL = Connection(trust_env=False, body_bytes=1 << 20)
ways = pytest.mark.parametrize("way", [sent, streamed], ids=["in-one-piece", "streamed"])


def post(
    *script: Sequence[Any],
    way: Callable[..., Coroutine[Any, Any, Response]],
    times: int = 1,
    timeouts: Timeouts = PATIENT,
    connection: Connection = DIRECT,
) -> tuple[list[Any], Scripted]:
    """Post to a scripted server so many times, one after the other; return answers or errors, and the server."""

    async def main() -> tuple[list[Any], Scripted]:
        ends: list[Any] = []
        async with scripted(*script) as server:
            async with transport_to(server.url, connection) as transport:
                for n in range(times):
                    try:
                        ends.append(await way(transport, Call("/x", b"%d" % n), timeouts))
                    except CallError as error:
                        check_clean(error)
                        ends.append(error)
            await until(lambda: server.open == 0)
        return ends, server

    return run(main())


# answers

GZIPPED = gzip.compress(b"hello" * 1_000)
DEFLATED = zlib.compress(b"hello" * 1_000)
LONG = bytes(range(256)) * 16_384  # 4 MB


@ways
@pytest.mark.parametrize(
    ("steps", "body"),
    [
        pytest.param([answer(b"ok")], b"ok", id="in-one-piece"),
        pytest.param([answer()[:20], 0.01, answer()[20:]], b"{}", id="in-two-pieces"),
        pytest.param([answer(b"")], b"", id="empty"),
        pytest.param([b"HTTP/1.1 204 X\r\n\r\n"], b"", id="without-a-body"),
        pytest.param([answer(LONG)], LONG, id="four-megabytes"),
        pytest.param(
            [b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n", 0.01, b"1;x=y\r\nc\r\n0\r\n\r\n"],
            b"abc",
            id="chunked",
        ),
        pytest.param([answer(GZIPPED, extra=b"Content-Encoding: gzip\r\n")], b"hello" * 1_000, id="gzip"),
        pytest.param([answer(DEFLATED, extra=b"Content-Encoding: deflate\r\n")], b"hello" * 1_000, id="deflate"),
        pytest.param([b"HTTP/1.1 100 Continue\r\n\r\n", answer(b"ok")], b"ok", id="after-continue"),
        pytest.param(
            [b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 102 X\r\n\r\n", 0.01, answer(b"ok")],
            b"ok",
            id="after-early-hints",
        ),
        pytest.param([b"HTTP/1.1 200 X\r\n\r\nto the end", Close], b"to the end", id="until-the-end-of-the-connection"),
        pytest.param([b"HTTP/1.0 200 X\r\n\r\nold", Close], b"old", id="http-1-0"),
        pytest.param([answer(b"ok", extra=b"Connection: close\r\n"), Close], b"ok", id="connection-close"),
        pytest.param([answer(b"ok", extra=b"X: \xff\xfe\r\n")], b"ok", id="binary-header"),
    ],
)
def test_a_complete_answer_arrives_as_it_was_sent_and_twice_in_a_row(steps, body, way):
    ends, server = post(steps, times=2, way=way)
    assert [end.body for end in ends] == [body, body]
    assert [sent for _, _, sent in server.requests] == [b"0", b"1"]


@ways
@pytest.mark.parametrize("status", [200, 201, 301, 400, 401, 404, 413, 429, 500, 503, 529, 599])
def test_every_status_is_an_answer_with_its_headers(status, way):
    (end,), _ = post([answer(b"x", status=status, extra=b"Retry-After: 7\r\n")], way=way)
    assert isinstance(end, Response)
    assert (end.status, end.body, end.headers["retry-after"]) == (status, b"x", "7")


@ways
def test_the_request_is_what_http_wants_and_its_body_what_was_given(way):
    _, server = post([answer()], way=way)
    ((_, head, body),) = server.requests
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /v1/x HTTP/1.1"
    assert f"Host: {server.url[7:-3]}" in lines
    assert f"Authorization: Bearer {KEY}" in lines
    assert "Content-Length: 1" in lines
    assert "Content-Type: application/json" in lines
    assert body == b"0"


@ways
def test_a_header_of_the_callers_goes_before_ours_whatever_its_case(way):
    async def main() -> bytes:
        async with scripted([answer()]) as server:
            async with transport_to(server.url, **{"user-agent": "mine"}) as transport:
                await way(transport, Call("/x", b""), PATIENT)
            return server.requests[0][1]

    head = run(main()).lower()
    assert b"user-agent: mine" in head
    assert head.count(b"user-agent") == 1


# what is no answer

HEAD = b"HTTP/1.1 200 X\r\nContent-Length: 20\r\n\r\n"


@ways
@pytest.mark.parametrize(
    ("steps", "kind", "text"),
    [
        pytest.param([Close], ConnectionError, "without an answer", id="closed-before-a-byte"),
        pytest.param([Reset], ConnectionError, "without an answer", id="reset-before-a-byte"),
        pytest.param([b"HTTP/1.1 20", 0.01, Close], ConnectionError, "in the middle", id="closed-in-the-status-line"),
        pytest.param([b"HTTP/1.1 20", 0.01, Reset], ConnectionError, "in the middle", id="reset-in-the-status-line"),
        pytest.param(
            [b"HTTP/1.1 200 X\r\nConte", 0.01, Close], ConnectionError, "in the middle", id="closed-in-the-headers"
        ),
        pytest.param(
            [b"HTTP/1.1 100 X\r\n\r\n", 0.01, Close], ConnectionError, "in the middle", id="closed-after-continue"
        ),
        pytest.param([HEAD, 0.01, Close], DecodeError, "cut short", id="closed-after-the-headers"),
        pytest.param([HEAD + b"half", Close], DecodeError, "cut short", id="closed-in-the-body"),
        pytest.param([HEAD + b"half", 0.01, Reset], DecodeError, "cut short", id="reset-in-the-body"),
        pytest.param(
            [b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab", Close],
            DecodeError,
            "cut short",
            id="closed-in-a-chunk",
        ),
        pytest.param(
            [b"HTTP/1.1 200 X\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\nab\r\n"],
            DecodeError,
            "no HTTP; check base_url",
            id="bad-chunk",
        ),
        pytest.param(
            [answer(b"hello", extra=b"Content-Encoding: gzip\r\n")], DecodeError, "cut short", id="not-gzip-after-all"
        ),
        pytest.param(
            [answer(b"hello", extra=b"Content-Length: 7\r\n")], DecodeError, "no HTTP; check base_url", id="two-lengths"
        ),
        pytest.param([b"SSH-2.0-OpenSSH_9.9\r\n"], DecodeError, "no HTTP; check base_url", id="ssh"),
        pytest.param([b"<html>hello</html>"], DecodeError, "no HTTP; check base_url", id="html-without-http"),
        pytest.param([b"\x16\x03\x01\x00\xff\xfe"], DecodeError, "no HTTP; check base_url", id="binary"),
        pytest.param(
            [b"HTTP/1.1 200 X\r\nA: " + b"x" * 100_000], DecodeError, "no HTTP; check base_url", id="endless-header"
        ),
        pytest.param(
            [b"HTTP/1.1 200 X\r\n" + b"A: b\r\n" * 10_000], DecodeError, "no HTTP; check base_url", id="many-headers"
        ),
        pytest.param(
            [b"HTTP/1.1 101 X\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n"],
            DecodeError,
            "another protocol",
            id="upgrade",
        ),
        pytest.param([b"HTTP/1.1 101 X\r\n\r\n"], DecodeError, "another protocol", id="switching-protocols"),
    ],
)
def test_what_is_no_answer_is_an_error_that_says_so_and_ends_its_connection(steps, kind, text, way):
    ends, server = post(steps, times=2, way=way)
    for end in ends:
        assert type(end) is kind
        assert text in str(end)
        assert end.transient
        assert end.sent
    assert server.connections == 2
    assert len(server.requests) == 2  # none was sent again behind the caller's back


@ways
def test_an_error_that_is_cut_short_is_still_that_error(way):
    ends, server = post([b"HTTP/1.1 401 X\r\nContent-Length: 99\r\n\r\nwrong k", 0.01, Close], times=2, way=way)
    assert [(end.status, end.body) for end in ends] == [(401, b"wrong k")] * 2
    assert server.connections == 2


@ways
def test_an_answer_that_never_ends_is_cut_off(way):
    async def flood() -> None:
        await asyncio.sleep(0)

    pieces: list[Any] = [b"HTTP/1.1 200 X\r\n\r\n", *[b"x" * 65_536] * 200, flood]
    (end,), _ = post(pieces, way=way, connection=SMALL)
    assert type(end) is DecodeError
    assert "larger than 1 MB" in str(end)


# the phases


@ways
@pytest.mark.parametrize(
    ("steps", "timeouts", "phase"),
    [
        pytest.param([Stall], Timeouts(first_byte=0.02), "first_byte", id="before-the-first-byte"),
        pytest.param([b"HTTP/1.1 200 X\r\nA", Stall], Timeouts(first_byte=0.02), "first_byte", id="in-the-headers"),
        pytest.param([b"HTTP/1.1 100 X\r\n\r\n", Stall], Timeouts(first_byte=0.02), "first_byte", id="after-continue"),
        pytest.param([HEAD, Stall], Timeouts(idle=0.02), "idle", id="before-the-body"),
        pytest.param([HEAD + b"half", Stall], Timeouts(idle=0.02), "idle", id="in-the-body"),
        pytest.param([Stall], Timeouts(total=0.02), "total", id="total-before-the-first-byte"),
        pytest.param([HEAD, *[b"x", 0.005] * 19, Stall], Timeouts(idle=20, total=0.03), "total", id="total-of-many"),
    ],
)
def test_a_stall_is_a_timeout_that_names_its_phase(steps, timeouts, phase, way):
    ends, server = post(steps, times=2, timeouts=timeouts, way=way)
    for end in ends:
        assert type(end) is TimeoutError
        assert end.phase == phase
        assert end.sent
        assert f"{getattr(timeouts, phase):g} s" in str(end)
        assert server.url[7:-3] in str(end)
    assert server.connections == 2  # a connection with half an answer in it is never used again


@ways
def test_a_slow_answer_is_no_idle_one(way):
    (end,), _ = post([HEAD, *[b"x", 0.005] * 20], timeouts=Timeouts(idle=5), way=way)
    assert end.body == b"x" * 20


@ways
def test_a_server_that_answers_no_tls_greeting_is_a_connect_timeout_and_nothing_was_sent(way):
    async def main() -> CallError:
        async with scripted([Stall]) as server:
            url = server.url.replace("http:", "https:")
            async with transport_to(url) as transport:
                with pytest.raises(TimeoutError) as caught:
                    await way(transport, Call("/x", b""), Timeouts(connect=0.05))
            await until(lambda: server.open == 0)
            check_clean(caught.value)
            return caught.value

    error = run(main())
    assert error.phase == "connect"
    assert not error.sent
    assert "check" in str(error) or "base_url" in str(error)


@ways
def test_the_clock_of_the_whole_call_also_runs_while_it_connects(way):
    async def main() -> None:
        async with scripted([Stall]) as server:
            async with transport_to(server.url.replace("http:", "https:")) as transport:
                with pytest.raises(TimeoutError) as caught:
                    await way(transport, Call("/x", b""), Timeouts(total=0.05))
            assert caught.value.phase == "total"
            assert not caught.value.sent

    run(main())


def test_no_clock_is_left_when_a_call_has_ended():
    limits = Timeouts(connect=11, first_byte=12, idle=13, total=14)

    async def main() -> None:
        from rxllm.clock import loop_clock

        clock = loop_clock(asyncio.get_running_loop())
        async with (
            scripted([Close], [HEAD, 0.02, Close], [HEAD, 0.02, b"x" * 20], [answer()], [Stall]) as server,
            transport_to(server.url) as transport,
        ):
            for _ in range(4):
                with contextlib.suppress(CallError):
                    await transport.send(Call("/x", b""), limits)
            calling = asyncio.create_task(transport.send(Call("/x", b""), limits))
            await until(lambda: len(server.requests) == 5)
            calling.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await calling
        assert {length: alarms._live for length, alarms in clock.alarms.items()} == {12: 0, 13: 0, 14: 0}

    run(main())


@ways
def test_a_timeout_of_ours_leaves_no_cancellation_on_the_task(way):
    async def main() -> None:
        async with scripted([Stall]) as server, transport_to(server.url) as transport:
            async with asyncio.timeout(20):
                with pytest.raises(TimeoutError):
                    await way(transport, Call("/x", b""), Timeouts(first_byte=0.02))
                task = asyncio.current_task()
                assert task is not None
                assert task.cancelling() == 0
                await asyncio.sleep(0.01)

    run(main())


@ways
def test_a_cancellation_in_the_turn_of_a_timeout_is_not_lost(way):
    async def main() -> None:
        async with scripted([Stall]) as server, transport_to(server.url) as transport:
            calling = asyncio.create_task(way(transport, Call("/x", b""), Timeouts(first_byte=20)))
            await until(lambda: bool(server.requests))
            from rxllm.clock import loop_clock

            (alarm,) = loop_clock(asyncio.get_running_loop()).alarms[20]._queue
            assert alarm.action is not None
            alarm.action()
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling

    run(main())


# cancelling


@ways
@pytest.mark.parametrize(
    "steps",
    [
        pytest.param([Stall], id="before-the-first-byte"),
        pytest.param([b"HTTP/1.1 200", Stall], id="in-the-headers"),
        pytest.param([HEAD + b"half", Stall], id="in-the-body"),
    ],
)
def test_cancelling_closes_the_connection_at_once(steps, way):
    async def main() -> None:
        async with scripted(steps) as server, transport_to(server.url) as transport:
            for n in range(1, 3):
                calling = asyncio.create_task(way(transport, Call("/x", b""), PATIENT))
                await until(lambda n=n: len(server.requests) == n)
                await asyncio.sleep(0.01)
                calling.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await calling
                await until(lambda: server.open == 0)
            assert server.connections == 2

    run(main())


@ways
@pytest.mark.parametrize("turns", range(4))
def test_cancelling_while_it_connects_leaves_nothing(turns, way):
    async def main() -> None:
        async with (
            scripted([Stall]) as server,
            transport_to(server.url.replace("http:", "https:")) as transport,
        ):
            calling = asyncio.create_task(way(transport, Call("/x", b""), PATIENT))
            for _ in range(turns):
                await asyncio.sleep(0)
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            await until(lambda: server.open == 0)

    run(main())


@ways
def test_a_server_that_reads_nothing_cannot_hold_a_cancelled_call(way):
    async def main() -> None:
        gone = asyncio.Event()

        async def deaf(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.transport.pause_reading()
            await gone.wait()
            writer.transport.abort()

        listener = await asyncio.start_server(deaf, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{listener.sockets[0].getsockname()[1]}"
        async with transport_to(url) as transport:
            calling = asyncio.create_task(way(transport, Call("/x", bytes(32 << 20)), PATIENT))
            await asyncio.sleep(0)
            acquired = next(iter(transport._pools._made.values())).thing.connector._acquired
            await until(lambda: any(getattr(protocol, "writing_paused", False) for protocol in acquired))
            (protocol,) = acquired
            calling.cancel()
            with pytest.raises(asyncio.CancelledError):
                await calling
            await until(lambda: protocol._connection_lost_called)  # aiohttp's word: the socket is closed
        gone.set()
        listener.close()

    run(main())


@ways
def test_closing_during_a_call_ends_it_as_given_up_not_as_a_fault(way):
    async def main() -> None:
        async with scripted([answer()], [Stall]) as server:
            transport = HttpTransport(server.url, {})
            await way(transport, Call("/x", b""), PATIENT)
            calling = asyncio.create_task(way(transport, Call("/x", b""), PATIENT))
            await until(lambda: len(server.requests) == 2)
            transport.close()
            with pytest.raises(CancelledError, match="closed") as caught:
                await calling
            check_clean(caught.value)
            assert not caught.value.transient
            await until(lambda: server.open == 0)
            with pytest.raises(ConfigError, match="closed"):
                await way(transport, Call("/x", b""), PATIENT)
            assert len(server.requests) == 2

    run(main())


# connections that are kept


@ways
def test_calls_one_after_the_other_share_a_connection(way):
    _, server = post([answer()], times=5, way=way)
    assert server.connections == 1


@ways
@pytest.mark.parametrize("end", [Close, Reset], ids=["closed", "reset"])
@pytest.mark.parametrize("when", [0.0, 0.03], ids=["with-the-request", "while-idle"])
def test_a_kept_connection_that_is_gone_costs_one_more_connection_and_nothing_else(end, when, way):
    # "while idle": the script of the first request goes on after its answer
    script = [[answer(b"a"), 0.01, end], [answer(b"b")]] if when else [[answer(b"a")], [end], [answer(b"b")]]

    async def main() -> None:
        async with scripted(*script) as server, transport_to(server.url) as transport:
            assert (await way(transport, Call("/x", b""), PATIENT)).body == b"a"
            await asyncio.sleep(when)
            assert (await way(transport, Call("/x", b""), PATIENT)).body == b"b"
            assert server.connections == 2

    run(main())


@ways
@pytest.mark.parametrize("end", [Close, Reset], ids=["closed", "reset"])
def test_it_is_tried_at_once_only_once(end, way):
    ends, server = post([answer()], [end], [end], [answer()], times=2, way=way)
    assert type(ends[1]) is ConnectionError
    assert len(server.requests) == 3


@ways
def test_the_second_try_takes_none_of_the_other_kept_connections(way):
    async def main() -> None:
        started = asyncio.Event()
        both = [started.wait, answer()]
        async with scripted(both, both, [Close], [answer(b"fresh")]) as server, transport_to(server.url) as transport:
            calls = [asyncio.create_task(way(transport, Call("/x", b""), PATIENT)) for _ in range(2)]
            await until(lambda: len(server.requests) == 2)
            started.set()
            await asyncio.gather(*calls)
            assert server.connections == 2  # two are kept
            assert (await way(transport, Call("/x", b""), PATIENT)).body == b"fresh"
            assert server.requests[-1][0] == 3  # the number of its connection
            await until(lambda: server.open == 1)

    run(main())


@ways
@pytest.mark.parametrize("begun", [b"H", b"HTTP/1.1 200 X\r\nCont", b"HTTP/1.1 100 X\r\n\r\n"])
@pytest.mark.parametrize("end", [Close, Reset], ids=["closed", "reset"])
def test_what_broke_after_the_first_byte_is_not_sent_again(begun, end, way):
    ends, server = post([answer()], [begun, 0.02, end], times=2, way=way)
    assert type(ends[1]) is ConnectionError
    assert len(server.requests) == 2


@ways
@pytest.mark.parametrize(
    "stray", [answer(b"408 too slow", status=408), b"HTTP/1.1 2", b"\r\n"], ids=["answer", "begin", "empty-line"]
)
def test_an_answer_that_nobody_asked_for_is_not_taken_for_that_of_the_next_request(stray, way):
    async def main() -> None:
        async with (
            scripted([answer(b"a"), 0.01, stray], [answer(b"b")]) as server,
            transport_to(server.url) as transport,
        ):
            assert (await way(transport, Call("/x", b""), PATIENT)).body == b"a"
            await asyncio.sleep(0.05)
            assert (await way(transport, Call("/x", b""), PATIENT)).body == b"b"
            assert server.connections == 2

    run(main())


@ways
@pytest.mark.parametrize("extra", [answer(b"stray"), b"garbage"], ids=["answer", "garbage"])
def test_a_connection_with_more_than_its_answer_is_not_used_again(extra, way):
    ends, server = post([answer(b"a") + extra], [answer(b"b")], times=2, way=way)
    assert isinstance(ends[1], Response)
    assert ends[1].body == b"b"
    assert server.connections == 2


@ways
@pytest.mark.parametrize(
    "first",
    [
        pytest.param([answer(extra=b"Connection: close\r\n")], id="connection-close"),
        pytest.param([b"HTTP/1.0 200 X\r\nContent-Length: 2\r\n\r\n{}"], id="http-1-0"),
    ],
)
def test_a_server_that_says_close_is_believed(first, way):
    _, server = post(first, [answer()], times=2, way=way)
    assert server.connections == 2


@pytest.mark.parametrize("hang_up", ["idle", "reuse"])
def test_a_server_that_hangs_up_on_kept_connections_costs_no_attempt(hang_up):
    async def main() -> list[Outcome[str]]:
        provider = SimulatedProvider(requests_per_connection=3, hang_up=hang_up, latency=0.002)
        async with provider, rxllm.OpenAI("m", provider.url, api_key=KEY) as client:
            source = rxllm.from_iterable(f"prompt {n}" for n in range(100))
            outcomes = await rxllm.acollect(source.pipe(rxllm.call(client, window=8)))
        log = provider.log()
        assert sum(arrival.admitted for arrival in log) == 100  # never twice
        if hang_up == "reuse":
            assert log.reasons()["hung_up"] > 0
        assert provider.statistics().connections_made >= 34
        return outcomes

    outcomes = run(main())
    assert all(outcome.ok and len(outcome.attempts) == 1 for outcome in outcomes)
    assert len(outcomes) == 100


def test_each_answer_comes_to_the_call_that_asked_for_it():
    async def main() -> None:
        provider = SimulatedProvider(latency=0.005, requests_per_connection=7)
        async with provider, rxllm.OpenAI("m", provider.url, api_key=KEY) as client:
            prompts = [f"prompt {n}" for n in range(200)]
            outcomes = await rxllm.acollect(rxllm.from_iterable(prompts).pipe(rxllm.call(client, window=32)))
            for outcome in outcomes:
                assert fingerprint(outcome.request.body["messages"][0]["content"]) in outcome.text

    run(main())


# what cannot be reached


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def failure(url: str) -> CallError:
    async def main() -> CallError:
        async with transport_to(url) as transport:
            with pytest.raises(CallError) as caught:
                await transport.send(Call("/x", b""), Timeouts(connect=5))
            check_clean(caught.value)
            return caught.value

    return run(main())


def test_a_port_where_nobody_listens_says_what_to_check():
    error = failure(f"http://127.0.0.1:{free_port()}/v1")
    assert type(error) is ConnectionError
    assert not error.sent
    assert "is the server running, and is base_url right?" in str(error)
    assert "127.0.0.1:" in str(error)


def test_a_host_that_does_not_exist_says_so(monkeypatch):
    def unknown(*_args: object, **_named: object) -> Any:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    async def look_up(*_args: object, **_named: object) -> Any:
        unknown()

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    monkeypatch.setattr(asyncio.base_events.BaseEventLoop, "getaddrinfo", look_up)
    error = failure("http://no-such-host.invalid/v1")
    assert type(error) is ConnectionError
    assert not error.sent
    assert "no such host: no-such-host.invalid:80; check base_url" in str(error)


@ways
def test_tls_to_a_plain_server_asks_whether_it_is_http(way):
    async def main() -> None:
        async with (
            SimulatedProvider() as provider,
            transport_to(provider.url.replace("http:", "https:")) as transport,
        ):
            with pytest.raises(ConnectionError, match="http:// instead of https://") as caught:
                await way(transport, Call("/x", b""), PATIENT)
            check_clean(caught.value)
            assert not caught.value.sent

    run(main())


def test_a_redirect_is_an_error_that_names_its_target():
    async def main() -> Outcome[str]:
        moved = answer(status=308, extra=b"Location: https://api.example.com/v2\r\n")
        async with scripted([moved]) as server, rxllm.OpenAI("m", server.url, api_key=KEY) as client:
            (outcome,) = await rxllm.acollect(rxllm.from_iterable(["hi"]).pipe(rxllm.call(client)))
            return outcome

    outcome = run(main())
    assert "redirects to https://api.example.com/v2: check base_url" in str(outcome.error)
    assert len(outcome.attempts) == 1


@pytest.mark.parametrize(
    ("url", "text"),
    [
        pytest.param("api.openai.com/v1", "must look like https://host/v1", id="no-scheme"),
        pytest.param("ftp://host/v1", "must look like https://host/v1", id="another-scheme"),
        pytest.param("http://", "must look like https://host/v1", id="no-host"),
        pytest.param("", "must look like https://host/v1", id="empty"),
        pytest.param("http://host:99999/v1", "must look like https://host/v1", id="no-such-port"),
        pytest.param("http://127.1/v1", "must look like https://host/v1", id="half-an-address"),
        pytest.param("http://a..b/v1", "must look like https://host/v1", id="empty-label"),
        pytest.param(f"http://{'a' * 70}.com/v1", "must look like https://host/v1", id="long-label"),
        pytest.param("https://host/v1?key=1", "no login, query or fragment", id="query"),
        pytest.param("https://host/v1#x", "no login, query or fragment", id="fragment"),
        pytest.param(f"https://me:{KEY}@host/v1", "no login, query or fragment", id="login"),
        pytest.param(f"htp://me:{KEY}@host/v1", "no login, query or fragment", id="login-and-another-scheme"),
        pytest.param(f"http://me:{KEY}@ho st:x/v1", "must look like https://host/v1", id="login-in-no-url"),
        pytest.param(None, "must be a text", id="none"),
        pytest.param(b"http://host", "must be a text", id="bytes"),
    ],
)
def test_a_base_url_that_cannot_work_is_refused_at_once(url, text):
    with pytest.raises(ConfigError, match=text) as caught:
        HttpTransport(url, {})
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["http://bücher.example/v1", "https://[::1]:8000", "http://localhost:1/a/b/", "http://x_y"]
)
def test_unusual_good_base_urls_are_taken(url):
    HttpTransport(url, {})._head("/x", "POST", "text/plain").decode("ascii")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X", "a\r\nEvil: 1"),
        ("X", "a\nb"),
        ("X", "a\0b"),
        ("X", "a\x7fb"),
        ("X", "ключ"),
        ("X: 1\r\nEvil", "a"),
        ("X Y", "a"),
        ("", "a"),
        ("é", "a"),
        ("Content-Length", "5"),
        ("transfer-encoding", "chunked"),
        ("Host", "evil"),
        ("Connection", "close"),
    ],
)
def test_a_header_that_would_break_the_request_is_refused(name, value):
    with pytest.raises(ConfigError, match="headers") as caught:
        HttpTransport("http://host/v1", {name: value})
    assert "Evil" not in str(caught.value) or name != "X"


@ways
@pytest.mark.parametrize("path", ["", "x", "/x HTTP/1.1\r\nEvil: 1\r\n\r\n", "/a b", "/\n", "/é"])
def test_a_path_that_would_break_the_request_is_refused(path, way):
    async def main() -> None:
        async with scripted([answer()]) as server, transport_to(server.url) as transport:
            with pytest.raises(ConfigError, match="path"):
                await way(transport, Call(path, b""), PATIENT)
            assert not server.requests

    run(main())


def test_heads_of_many_paths_are_not_kept_for_ever():
    transport = HttpTransport("http://host/v1", {})
    for n in range(3_000):
        transport._head(f"/{n}", "POST", "text/plain")
    assert len(transport._heads) <= module.HEADS
