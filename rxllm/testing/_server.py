"""The simulated provider's server: HTTP/1.1 straight on `asyncio.Protocol`.

Every request costs a dictionary look-up for its head (a client repeats itself), one typed decoding of its
body, one row in the log and one write: 15 µs of CPU in all, where aiohttp's server took 34 for the same
replies (both on uvloop, 64 connections).
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from random import Random
from typing import TYPE_CHECKING, Any, Final, cast
from urllib.parse import parse_qs

import msgspec

from rxllm.errors import ConfigError
from rxllm.testing._answers import Answer, Ask, RefusedBodyError
from rxllm.testing._connection import Call, Connection, StreamedCall
from rxllm.testing._counts import Counts
from rxllm.testing._dialects import EMPTY_BALANCE, OPENAI, ROUTES, Dialect, dialect_of, models_reply
from rxllm.testing._door import Door
from rxllm.testing._events import EVENT_TYPE, Ending, spoil_events
from rxllm.testing._faults import IN_STREAMS, STREAMED, FaultPlan, is_at_the_door
from rxllm.testing._flow import Flow, framed
from rxllm.testing._http import Head, parse_head
from rxllm.testing._replies import JSON_TYPE, Refusal, hint_lines, reply_bytes, spoil, stream_head
from rxllm.testing._settings import Settings, checked, split_answer
from rxllm.testing._sharing import Sharing

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rxllm.testing._answers import AnswerFunction
    from rxllm.testing._arrivals import Statistics
    from rxllm.testing._quotas import Entry, Limiter

monotonic = time.monotonic  # noqa: TID251 - the server's own clock: it stands for another machine

HOST: Final = "127.0.0.1"
BACKLOG: Final = 65_535  # connections waiting to be accepted; the kernel may cap it
MAX_HEADS: Final = 1_024  # parsed heads kept
SHORTEST_TIMER: Final = 0.001  # seconds: uvloop counts in milliseconds


class Server:
    """The provider's state on one loop."""

    def __init__(
        self,
        changes: Mapping[str, Any],
        *,
        seed: int = 0,
        steps: Sequence[tuple[float, dict[str, Any]]] = (),
        token: str | None = None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.heads: dict[bytes, Head] = {}
        self.counts = Counts(monotonic())
        self._control = None if token is None else f"/control/{token}/"
        self._random = Random(seed)
        self._path_random = Random(f"path {seed}")  # of its own: the same faults come with and without jitter
        self._plan = FaultPlan(self._random)
        self._settings = Settings()
        self._mode: str | AnswerFunction = "summary"
        self._faulty = False
        self._jittery = False
        self._travelling: dict[Connection, asyncio.TimerHandle] = {}  # requests that the jitter of the path holds
        self._quotas = Door()
        self._sharing: Sharing[Call] = Sharing()
        self._ended: deque[Call] = deque()
        self._draining = False
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._steps = steps
        self._step_timers: list[asyncio.TimerHandle] = []
        self._connections: set[Connection] = set()
        self._empty = asyncio.Event()
        self._listener: asyncio.Server | None = None
        self._port: int | None = None
        self._replies = 0  # written: each has its number
        self.apply(changes)

    async def open(self, port: int = 0) -> int:
        """Listen on the loopback address; return the port.

        Raises:
            OSError: the port is taken.
        """
        self._listener = await self.loop.create_server(lambda: Connection(self), HOST, port, backlog=BACKLOG)
        for at, changes in self._steps:
            self._step_timers.append(self.loop.call_later(at, self.apply, changes))
        return cast("int", self._listener.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening, abort all connections and wait until they are gone."""
        if self._listener is not None:
            self._listener.close()
        for connection in tuple(self._connections):
            call = connection.call
            connection.abort()
            if call is not None:
                self.gone(call)
        for timer in (*self._step_timers, *self._travelling.values(), self._timer):
            if timer is not None:
                timer.cancel()
        self._travelling.clear()
        if self._connections:
            self._empty.clear()
            await self._empty.wait()
        if self._listener is not None:
            await self._listener.wait_closed()
            self._listener = None

    def apply(self, changes: Mapping[str, Any]) -> None:
        """Take over checked changes, now."""
        now = monotonic()
        fields = dict(changes)
        function = split_answer(fields)
        self._settle(now)
        self._settings = settings = msgspec.structs.replace(self._settings, **fields)
        if "answer" in fields:
            self._mode = fields["answer"] if function is None else function
        self._quotas.apply(settings, fields, now)
        if "faults" in fields:
            self._plan.chances(settings.faults)
        if "script" in fields:
            self._plan.script(settings.script)
        if "marked" in fields:
            self._plan.marked(settings.marked)
        self._faulty = bool(settings.faults or settings.script or settings.marked)
        self._jittery = settings.path_jitter[1] > 0
        self._sharing.knee = settings.knee
        self._arm(now)

    def statistics(self) -> Statistics:
        """Return the counts until now."""
        return self.counts.statistics(monotonic())

    # connections

    def joined(self, connection: Connection) -> int:
        """Register a connection; return its number."""
        self._connections.add(connection)
        return self.counts.joined()

    def left(self, connection: Connection) -> None:
        """Forget a connection."""
        if connection in self._connections:
            self._connections.remove(connection)
            self.counts.left()
        if not self._connections:
            self._empty.set()

    def gone(self, call: Call) -> None:
        """Give up an admitted request whose client has gone."""
        now = monotonic()
        self._settle(now)
        if call.job is not None:
            if self._sharing.remove(call.job) is None:
                return  # it ended in this very moment
            self._arm(now)
        elif call.timer is not None:
            call.timer.cancel()
        self.counts.disconnected(call.row)

    def remember(self, raw: bytes) -> Head:
        """Parse a head and keep it: clients repeat themselves."""
        head = parse_head(raw)
        if len(self.heads) >= MAX_HEADS:
            self.heads.clear()
        self.heads[raw] = head
        return head

    # requests

    def malformed(self, connection: Connection, status: int, text: str) -> None:
        """Answer what is no request, and close."""
        self.counts.served(monotonic(), connection.number, "", status, "malformed")
        body = OPENAI.error(Refusal(status, "malformed", text), "")
        connection.reject(self._format(OPENAI, status, body, JSON_TYPE, b"Connection: close\r\n"))

    def handle(self, connection: Connection, head: Head, body: bytes) -> None:
        """Take a request that has been read: it comes before the judge now, or when its path lets it."""
        if self._control is not None and head.path.startswith(self._control):
            self._serve_control(connection, head, body)
        elif self._jittery:
            delay = self._path_random.uniform(*self._settings.path_jitter)
            self._travelling[connection] = self.loop.call_later(delay, self._arrive, connection, head, body)
        else:
            self._judge(connection, head, body)

    def _arrive(self, connection: Connection, head: Head, body: bytes) -> None:
        """Judge a request at the end of its path, also when its client has gone meanwhile: it was sent."""
        del self._travelling[connection]
        self._judge(connection, head, body)
        call = connection.call
        if connection.is_closing and call is not None:
            connection.call = None
            self.gone(call)

    def _judge(self, connection: Connection, head: Head, body: bytes) -> None:
        """Answer a request, now or later."""
        now = monotonic()
        settings = self._settings
        most = settings.requests_per_connection
        if most is not None and settings.hang_up == "reuse" and connection.served >= most:
            self.counts.served(now, connection.number, "", 0, "hung_up")
            connection.abort()
            return
        if settings.key is not None and head.key != settings.key:
            self._refuse(now, connection, "", 0, Refusal(401, "unauthorized", "Incorrect API key provided."))
            return
        route = ROUTES.get(head.path)
        if route is None or head.method != "POST":
            self._serve_other(now, connection, head)
            return
        if route.needs is not None and route.needs not in parse_qs(head.query):
            text = f"{route.needs!r} is missing in the query."
            self._refuse(now, connection, "", 0, Refusal(route.dialect.invalid, "bad_request", text, param=route.needs))
            return
        try:
            ask = route.read(body, self._mode)
        except (RefusedBodyError, msgspec.MsgspecError, RecursionError, UnicodeError) as error:
            text, param = (error.text, error.param) if isinstance(error, RefusedBodyError) else (str(error), None)
            self._refuse(now, connection, "", 0, Refusal(route.dialect.invalid, "bad_request", text, param=param))
            return
        self._infer(now, connection, route.dialect, ask, self._plan.draw(body) if self._faulty else None)

    def _infer(self, now: float, connection: Connection, dialect: Dialect, ask: Ask, fault: str | None) -> None:
        marker = ask.user or ask.mark
        settings = self._settings
        if fault in STREAMED and ask.stream is None:
            fault = None
        if self._ended or len(self._sharing):
            self._settle(now)
        if fault is not None and is_at_the_door(fault):
            self._refuse(now, connection, marker, ask.prompt_tokens, self._door(fault))
            return
        answer = None
        if settings.charge == "actual":
            answer = self._answer(dialect, ask)
            cost = ask.prompt_tokens + answer.completion_tokens
        else:
            most = settings.default_max_tokens if ask.max_tokens is None else ask.max_tokens
            cost = ask.prompt_tokens + most
        admission = self._quotas.admit(now, cost, self.counts.in_flight)
        if isinstance(admission, Refusal):
            self._refuse(now, connection, marker, ask.prompt_tokens, admission)
            return
        answer = answer or self._answer(dialect, ask)
        if answer.failed:
            fault = "answer_failed"
        row = self.counts.admitted(
            now, connection.number, marker, fault or "ok", ask.prompt_tokens, answer.completion_tokens, cost
        )
        if answer.events is None or (fault is not None and fault not in IN_STREAMS):
            call = Call(connection, dialect, now, answer.body, fault, row)
            slow = answer.completion_tokens
        else:
            call = StreamedCall(connection, dialect, now, answer.body, fault, row)
            call.answer, call.tokens = answer.events, answer.completion_tokens
            slow = 0  # its tokens take their time one by one
        connection.call = call
        if settings.charge == "settled":
            call.due = (self._quotas.tokens, admission, cost, ask.prompt_tokens + answer.completion_tokens)
        self._begin(now, call, slow)

    def _answer(self, dialect: Dialect, ask: Ask) -> Answer:
        try:
            answer = ask.answer()
            if ask.stream is not None:
                answer = answer._replace(events=ask.stream(answer.body, self._settings.chunks))
            return answer
        except Exception as error:
            text = f"answer raised {type(error).__name__}: {error}"
            return Answer(self._error(dialect, Refusal(500, "answer_failed", text)), 0, failed=True)

    def _begin(self, now: float, call: Call, completion_tokens: int) -> None:
        latency = self._settings.latency
        seconds = latency.base + latency.per_token * completion_tokens
        if latency.sigma:
            seconds *= self._random.lognormvariate(-(latency.sigma**2) / 2, latency.sigma)
        if call.fault == "stall":
            call.timer = self.loop.call_later(self._settings.max_stall, self._finish, call)
        elif seconds > 0:
            call.job = self._sharing.add(now, seconds, call)
            self._arm(now)
        else:
            self._finish(call)

    def _door(self, fault: str) -> Refusal:
        if fault == "insufficient_quota":
            text = "You exceeded your current quota, please check your plan and billing details."
            return Refusal(429, fault, text, code=EMPTY_BALANCE)
        status = int(fault[:3])
        hint = self._settings.fault_retry_after if fault == "429" else None
        return Refusal(status, fault, f"Simulated fault {fault}.", hint)

    # replies

    def _settle(self, now: float) -> None:
        """Answer what has ended by `now`, in constant stack depth: a reply may start the next request."""
        self._ended.extend(self._sharing.finished(now))
        if self._draining:
            return
        self._draining = True
        try:
            while self._ended:
                self._finish(self._ended.popleft())
        finally:
            self._draining = False

    def _tick(self) -> None:
        self._timer = None
        now = monotonic()
        self._settle(now)
        self._arm(now)

    def _arm(self, now: float) -> None:
        """Wake up for the next end; a timer that is too early does no harm."""
        at = self._sharing.next_end()
        if at is None or (self._timer is not None and self._timer_at <= at):
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer_at = at
        self._timer = self.loop.call_later(max(at - now, SHORTEST_TIMER), self._tick)

    def _finish(self, call: Call) -> None:
        """Send the reply of an admitted request, or what its fault makes of it."""
        connection, dialect, fault = call.connection, call.dialect, call.fault
        if connection.call is not call or connection.is_closing:  # its client went away in this very moment
            connection.call = None
            self.counts.disconnected(call.row)
            return
        if isinstance(call, StreamedCall) and call.is_due:
            self._stream(call)
            return
        self.counts.in_flight -= 1
        now = monotonic()
        status, kind, body = 200, JSON_TYPE, call.body
        if fault is not None:
            if fault in {"stall", "reset", "hang_up"}:
                connection.call = None
                if fault == "hang_up":
                    connection.close()
                else:
                    connection.abort(reset=True)
                return
            status, kind, body = spoil(fault, body, lambda refusal: self._error(dialect, refusal))
        if call.due is not None and status == 200:  # noqa: PLR2004 - OK
            self._settle_tokens(now, call.row, *call.due)
        self.counts.answered(call.row, now, status)
        took = dialect.took
        extra = b"" if took is None else b"%b: %d\r\n" % (took, (now - call.arrived) * 1000)
        if fault == "truncated":
            whole = self._format(dialect, status, body, kind, extra + self._quotas.headers(now, dialect))
            connection.reply(whole[: len(whole) - (len(body) + 1) // 2], last=True)
        else:
            self._send(now, connection, dialect, status, body, kind, extra)

    def _stream(self, call: StreamedCall) -> None:
        """Begin to send a streamed answer, as its fault spoils it."""
        connection, settings, dialect, now = call.connection, self._settings, call.dialect, monotonic()
        pieces, ending = spoil_events(call.fault, call.answer)
        gap = settings.chunk_seconds
        if gap is None:
            gap = settings.latency.per_token * call.tokens / len(pieces)
        extra = b"" if dialect.took is None else b"%b: %d\r\n" % (dialect.took, (now - call.arrived) * 1000)
        if settings.limit_headers:
            extra += self._quotas.headers(now, dialect)
        line, last = self._ending(connection)
        chunked = not line
        self._replies += 1
        head = stream_head(EVENT_TYPE, dialect.request_id, self._replies, extra + line, chunked=chunked)
        if chunked:
            pieces = [framed(piece) for piece in pieces]
            if ending == "end":
                pieces[-1] += b"0\r\n\r\n"
        flow = Flow(self.loop, connection, head, pieces, gap, lambda: self._streamed(call, ending, last=last))
        call.job, call.timer = None, flow
        flow.step()

    def _streamed(self, call: StreamedCall, ending: Ending, *, last: bool) -> None:
        """End a streamed answer of which everything has been written."""
        if ending == "stall":
            call.fault, call.is_due = "stall", False
            call.timer = self.loop.call_later(self._settings.max_stall, self._finish, call)
            return
        now = monotonic()
        self.counts.in_flight -= 1
        if call.due is not None:
            self._settle_tokens(now, call.row, *call.due)
        self.counts.answered(call.row, now, 200)
        call.connection.done(last=last or ending == "close")

    def _settle_tokens(  # noqa: PLR0917 - once per request: keywords cost
        self, now: float, row: int, state: Limiter | None, entry: Entry | None, reserved: int, actual: int
    ) -> None:
        """Charge what was used instead of what was reserved."""
        if state is not None and entry is not None:
            state.settle(now, entry, actual)
        self.counts.settled(row, reserved, actual)

    def _refuse(self, now: float, connection: Connection, marker: str, prompt: int, refusal: Refusal) -> None:
        self.counts.served(now, connection.number, marker, refusal.status, refusal.reason, prompt)
        dialect = OPENAI if connection.head is None else dialect_of(connection.head.path)
        extra = b"" if refusal.hint is None else hint_lines(refusal.hint, self._settings.retry_after)
        self._send(now, connection, dialect, refusal.status, self._error(dialect, refusal), JSON_TYPE, extra)

    def _error(self, dialect: Dialect, refusal: Refusal) -> bytes:
        """Return the body of an error, with the id that its reply will have if it is sent next."""
        return dialect.error(refusal, f"req_{self._replies + 1:08x}")

    def _send(  # noqa: PLR0917 - the same
        self,
        now: float,
        connection: Connection,
        dialect: Dialect,
        status: int,
        body: bytes,
        kind: bytes,
        extra: bytes,
    ) -> None:
        settings, head = self._settings, connection.head
        if settings.limit_headers:
            extra += self._quotas.headers(now, dialect)
        most = settings.requests_per_connection
        silent = most is not None and settings.hang_up == "idle" and connection.served + 1 >= most
        last = head is None or not head.keep_alive
        if last:
            extra += b"Connection: close\r\n"
        data = self._format(dialect, status, body, kind, extra)
        if head is not None and head.method == "HEAD":
            data = data[: len(data) - len(body)]
        connection.reply(data, last=last or silent)

    def _ending(self, connection: Connection) -> tuple[bytes, bool]:
        """Return the header line that announces the end of the connection, and whether it ends after this reply."""
        settings, head = self._settings, connection.head
        if head is None or not head.keep_alive:
            return b"Connection: close\r\n", True
        most = settings.requests_per_connection
        return b"", most is not None and settings.hang_up == "idle" and connection.served + 1 >= most

    def _format(self, dialect: Dialect, status: int, body: bytes, kind: bytes, extra: bytes) -> bytes:
        self._replies += 1
        return reply_bytes(status, body, kind, dialect.request_id, self._replies, extra)

    # other routes

    def _serve_other(self, now: float, connection: Connection, head: Head) -> None:
        found = models_reply(head.method, head.path, self._settings.models)
        if isinstance(found, Refusal):
            self._refuse(now, connection, "", 0, found)
            return
        self.counts.served(now, connection.number, "", 200, "models")
        self._send(now, connection, OPENAI, 200, found, JSON_TYPE, b"")

    def _serve_control(self, connection: Connection, head: Head, body: bytes) -> None:
        """Serve the parent of a child process: the log, the statistics, changes."""
        what = f"{head.method} {head.path.rpartition('/')[2]}"
        status, data = 200, b"{}"
        if what == "GET log":
            data = msgspec.msgpack.encode(self.counts.log.columns())
        elif what == "GET statistics":
            data = msgspec.json.encode(self.statistics())
        elif what == "POST settings":
            try:
                self.apply(checked(msgspec.json.decode(body, type=dict[str, Any])))
            except (ConfigError, msgspec.MsgspecError) as error:
                status, data = 400, msgspec.json.encode(str(error))
        else:
            status = 404
        last = not head.keep_alive
        extra = b"Connection: close\r\n" if last else b""
        connection.reply(self._format(OPENAI, status, data, JSON_TYPE, extra), last=last)
