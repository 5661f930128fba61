"""A provider of several dialects over real HTTP on loopback, slow, limited and faulty as you ask; it keeps a log.

Judge a pipeline by what this server saw, not by what the client believes:

    async with SimulatedProvider(requests=500, faults={"503": 0.05, "reset": 0.01}) as provider:
        ...  # provider.url is the base URL
        assert provider.log().peak(60.0) <= 500

For benchmarks and scripts, as a process of its own:

    with SimulatedProvider(latency=0.2).start() as provider:
        client = rxllm.OpenAI(model="simulated", base_url=provider.url, api_key="any")
"""

from __future__ import annotations

import contextlib
import secrets
import subprocess
import sys
import threading
import weakref
from http.client import HTTPConnection, HTTPException
from typing import TYPE_CHECKING, Any, Final, Literal, Self

import msgspec

from rxllm.errors import ConfigError, check_number
from rxllm.testing._answers import fingerprint
from rxllm.testing._arrivals import Arrival, Columns, Log, Statistics
from rxllm.testing._child import BOOT, Hello, Ready
from rxllm.testing._quotas import ServerQuota
from rxllm.testing._server import HOST, Server
from rxllm.testing._settings import (
    Changes,
    Latency,
    answer_name,
    checked,
    checked_steps,
    find_answer,
    split_answer,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType
    from typing import Unpack

__all__ = [
    "Arrival",
    "Changes",
    "Latency",
    "Log",
    "ServerQuota",
    "SimulatedProcess",
    "SimulatedProvider",
    "Statistics",
    "fingerprint",
]

START_SECONDS: Final = 60.0  # for the child to import and listen
CONTROL_SECONDS: Final = 60.0  # for one control call
END_SECONDS: Final = 5.0  # for the child to end when asked


class SimulatedProvider:
    """A model provider that costs nothing and fails on purpose.

    `async with` runs it on the running loop; `start()` runs it as a child process. It serves, each streamed too where
    its vendor does that:

    below `url`, as OpenAI: `POST /chat/completions`, `/completions`, `/responses`, `/embeddings` and `GET /models`;
    below `origin`, as Anthropic: `POST /v1/messages`;
    below `origin`, as LLM Engine: `POST /v1/llm/completions-sync` and `/v1/llm/completions-stream`.

    Errors and headers are the dialect's own. Who asks for a JSON schema gets JSON that fits it, roughly; who says that
    a tool has to be called gets a call of it.

    A request is judged at the end of its path, in this order: key, shape, fault at the door, ceiling,
    quotas. What passes is *admitted*: it is charged, takes its latency, and then gets its answer or its
    fault. The log's `reason` is "ok", the fault's name, or "requests", "tokens" (over that quota),
    "too_large" (can never fit), "max_in_flight", "unauthorized", "bad_request", "malformed", "not_found",
    "bad_method", "models", "hung_up", "answer_failed".

    Args:
        port: TCP port on the loopback address; 0 means any free one.
        seed: of all random draws (faults, jitters), which are made in order of arrival.
        steps: changes to come, each `(seconds after the start, {field: value, ...})`.
        settings: any of the fields below; all of them can also change while it runs (`set`, `steps`).

    Fields:
        answer: What it says. "summary" (default): one sentence made from the prompt, which ends with the
            prompt's `fingerprint` in brackets. "echo": the last message. A callable `(prompt: str, body:
            dict) -> str | dict` (a dict is the chat's message, or overrides fields of Anthropic's message or of the
            response), or its name "module:function". The `id` of a reply to a chat or completion holds the
            fingerprint in any case.
        latency: Seconds, or a `Latency` (base, per token, jitter). Default 0: at once. Of a streamed answer the base
            passes before its first byte.
        chunks: Pieces that each text of a streamed answer is cut into. None (default): one for each token.
        chunk_seconds: Seconds from one event of a stream to the next, whatever the knee. None (default): the latency's
            per-token share.
        path_jitter: Seconds, or a pair (least, most): so much later than it was read a request comes before
            the judge, drawn evenly for each (a single number: from 0 on), so requests on several connections
            may overtake one another. `arrived` is when it came there. Default 0.
        knee: Requests in service above which all slow down in proportion, as on a GPU. None: never.
        max_in_flight: Requests admitted and unanswered at most; beyond it `overload_status`. None: no
            ceiling.
        overload_status: 429 (default), 503 or 529.
        requests: Requests per minute, or a `ServerQuota`. None: no quota.
        tokens: Tokens per minute, or a `ServerQuota`. A token is four characters. None: no quota.
        charge: Tokens charged at admission: "reserved" (prompt + max_tokens; default), "actual" (prompt +
            answer, which is made before it is known whether the quota has room), or "settled": reserved, and
            made actual when the answer is sent, for as long as its admission counts; without a reply of
            status 200 it stays reserved.
        default_max_tokens: Reserved for a chat that names no maximum. Default 16.
        charge_refused: Requests that a quota refuses count in the request quota too. Default False.
        retry_after: Hint on refusals: "both" (whole seconds and `retry-after-ms`; also True; default),
            "seconds" (whole, rounded up), "date" (an HTTP-date) or "off" (also False).
        limit_headers: Send limit, remaining and reset of each quota under the dialect's names (OpenAI:
            `x-ratelimit-limit-requests` …; LLM Engine has none). Default True.
        faults: Probabilities, `{fault: 0..1}`, in sum at most 1. A fault is a status "400" to "599" or:
            "429_bare" (no hint), "insufficient_quota" (a 429 that no retry cures), "reset", "hang_up"
            (connection reset or closed before any byte), "stall" (no reply), "truncated", "garbled",
            "wrong_shape", "empty", "html" (all with 200), "html_502". Statuses below 500, 503 and 529 come at
            the door, at once and uncharged; all others after the latency, charged. "truncated" and "garbled" come
            in the middle of a stream; so do, to streamed answers alone, "error_midway" (an error as an event),
            "stall_midway", "unfinished" (no finish reason, else well ended) and "no_done" (the finish reason, and no
            `[DONE]` or `message_stop`).
        script: Faults of the next requests in order of arrival, None for a good answer; then chance decides
            again.
        marked: Faults of requests whose body contains a marker: `{marker: fault}` for always, `{marker:
            [fault, None]}` for one after the other and good answers from then on. Goes before the script.
        fault_retry_after: Seconds, the hint of fault "429" and of the ceiling. Default 1.
        max_stall: Seconds after which a stalled connection is reset. Default 60.
        requests_per_connection: Replies after which a connection is closed unannounced. None: never.
        hang_up: When that happens: "idle" (right after the last reply; default) or "reuse" (when one more
            request arrives on it, unanswered).
        key: The only good key; others get 401. None (default): all are good.
        models: Names that `/models` lists. Requests may name any model.

    Raises:
        ConfigError: an unknown field, a wrong type or a value out of its range; it names both.
    """

    def __init__(
        self,
        *,
        port: int = 0,
        seed: int = 0,
        steps: Sequence[tuple[float, Changes]] = (),
        **settings: Unpack[Changes],
    ) -> None:
        check_number("port", port, least=0, most=65_535, integer=True)
        check_number("seed", seed, integer=True)
        self._wanted_port = port
        self._seed = seed
        self._steps = checked_steps(steps)
        self._changes = checked(dict(settings))
        for changes in (self._changes, *(changes for _, changes in self._steps)):
            split_answer(dict(changes))  # raises for a name that cannot be imported
        self._server: Server | None = None
        self._port: int | None = None

    def __repr__(self) -> str:
        where = "not running" if self._port is None else self.url
        return f"SimulatedProvider({where}, {', '.join(sorted(self._changes)) or 'defaults'})"

    @property
    def url(self) -> str:
        """The base URL, such as "http://127.0.0.1:40123/v1".

        Raises:
            ConfigError: it is not running.
        """
        return f"{self.origin}/v1"

    @property
    def origin(self) -> str:
        """The URL without a path, such as "http://127.0.0.1:40123": where Anthropic's and LLM Engine's paths begin.

        Raises:
            ConfigError: it is not running.
        """
        if self._port is None:
            raise ConfigError("the simulated provider is not running: use `async with` or start()")
        return f"http://{HOST}:{self._port}"

    async def __aenter__(self) -> Self:
        """Run on the running loop.

        Raises:
            ConfigError: it is running already.
            OSError: the port is taken.
        """
        if self._port is not None:
            raise ConfigError("the simulated provider is running already: build another one")
        server = Server(self._changes, seed=self._seed, steps=self._steps)
        self._port = await server.open(self._wanted_port)
        self._server = server
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections; the log and the statistics stay readable."""
        await self.close()

    async def close(self) -> None:
        """Close all connections; the log and the statistics stay readable. Twice is once."""
        self._port = None
        if self._server is not None:
            await self._server.close()

    def log(self) -> Log:
        """Return every request until now (control calls excepted); the same object grows.

        Raises:
            ConfigError: it has never run.
        """
        return self._running().counts.log

    def statistics(self) -> Statistics:
        """Return the counts until now.

        Raises:
            ConfigError: it has never run.
        """
        return self._running().statistics()

    def peak(self, window: float, unit: Literal["requests", "tokens"] = "requests") -> int:
        """Return the most that was admitted in any window of so many seconds: see `Log.peak`."""
        return self.log().peak(window, unit)

    def set(self, **changes: Unpack[Changes]) -> None:
        """Change settings now; a new `knee` also counts for requests in service. Call it on the loop's thread.

        A quota whose amount alone changes keeps what is booked; another one begins empty.

        Raises:
            ConfigError: a bad field (nothing is changed then), or it has never run.
        """
        done = checked(dict(changes))
        self._running().apply(done)

    def _running(self) -> Server:
        if self._server is None:
            raise ConfigError("the simulated provider has not run: use `async with`, or start() and what it returns")
        return self._server

    def start(self) -> SimulatedProcess:
        """Run as a child process; return when it listens. Blocks for about half a second.

        The child ends with `close()`, with the `with` block, and with this process, however that ends.

        Raises:
            ConfigError: `answer` is a callable that a child process cannot import by its name.
            OSError: the port is taken, or the child could not start.
        """
        token = secrets.token_hex(16)
        hello = Hello(
            path=[str(entry) for entry in sys.path],
            port=self._wanted_port,
            seed=self._seed,
            token=token,
            changes=portable(self._changes),
            steps=[(at, portable(changes)) for at, changes in self._steps],
        )
        line = msgspec.json.encode(hello) + b"\n"
        process = subprocess.Popen(  # noqa: S603 - this very interpreter
            [sys.executable, "-c", BOOT], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            ready = _greet(process, line)
        except BaseException:
            _end(process)
            raise
        return SimulatedProcess(process, ready.port, token)


class SimulatedProcess:
    """A simulated provider in a child process: `with` it, or `close` it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, token: str) -> None:
        self._process = process
        self._port = port
        self._path = f"/control/{token}/"
        self._finalizer = weakref.finalize(self, _end, process)

    def __repr__(self) -> str:
        return f"SimulatedProcess({self.url}, pid {self.pid}{'' if self._finalizer.alive else ', closed'})"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the child."""
        self.close()

    @property
    def url(self) -> str:
        """The base URL, such as "http://127.0.0.1:40123/v1"."""
        return f"{self.origin}/v1"

    @property
    def origin(self) -> str:
        """The URL without a path, such as "http://127.0.0.1:40123": where Anthropic's and LLM Engine's paths begin."""
        return f"http://{HOST}:{self._port}"

    @property
    def pid(self) -> int:
        """The child's process id."""
        return self._process.pid

    def close(self) -> None:
        """End the child; read the log before. Twice is once."""
        self._finalizer()

    def log(self) -> Log:
        """Fetch a copy of the log: every request until now, control calls excepted.

        Raises:
            ConfigError: closed.
            OSError: the child has died.
        """
        return Log.from_columns(msgspec.msgpack.decode(self._control("GET", "log"), type=Columns))

    def statistics(self) -> Statistics:
        """Fetch the counts until now.

        Raises:
            ConfigError: closed.
            OSError: the child has died.
        """
        return msgspec.json.decode(self._control("GET", "statistics"), type=Statistics)

    def peak(self, window: float, unit: Literal["requests", "tokens"] = "requests") -> int:
        """Return the most that was admitted in any window of so many seconds: see `Log.peak`."""
        return self.log().peak(window, unit)

    def set(self, **changes: Unpack[Changes]) -> None:
        """Change settings now: see `SimulatedProvider.set`.

        Raises:
            ConfigError: a bad field (nothing is changed then), a callable the child cannot import, closed.
            OSError: the child has died.
        """
        self._control("POST", "settings", msgspec.json.encode(portable(checked(dict(changes)))))

    def _control(self, method: str, what: str, body: bytes | None = None) -> bytes:
        if not self._finalizer.alive:
            raise ConfigError("the simulated provider is closed: read its log and statistics before close()")
        connection = HTTPConnection(HOST, self._port, timeout=CONTROL_SECONDS)
        try:
            connection.request(method, self._path + what, body)
            reply = connection.getresponse()
            data = reply.read()
        except HTTPException as error:
            raise ConnectionError(f"the simulated provider (pid {self.pid}) broke off: {error!r}") from error
        finally:
            connection.close()
        if reply.status != 200:  # noqa: PLR2004 - OK
            raise ConfigError(msgspec.json.decode(data, type=str) if data != b"{}" else f"no control {what!r}")
        return data


def portable(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return checked changes in a form that a child process reads: callables by their names.

    Raises:
        ConfigError: a callable that cannot be imported by its name.
    """
    answer = changes.get("answer")
    if not callable(answer):
        return dict(changes)
    name = answer_name(answer)
    if name.startswith("__main__:") or "<" in name or find_answer(name) is not answer:
        raise ConfigError(f"answer={answer!r} cannot be imported by a child process: put it at the top of a module")
    return {**changes, "answer": name}


def _greet(process: subprocess.Popen[bytes], line: bytes) -> Ready:
    """Send the settings and wait for the port."""
    timer = threading.Timer(START_SECONDS, process.kill)
    timer.start()
    try:
        if process.stdin is None or process.stdout is None:
            raise OSError("the simulated provider has no pipes")
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(line)
            process.stdin.flush()
        answer = process.stdout.readline()
    finally:
        timer.cancel()
    if not answer:
        raise OSError(f"the simulated provider did not start; its error output says why ({sys.executable})")
    ready = msgspec.json.decode(answer, type=Ready)
    if ready.error is not None:
        kind = ConfigError if ready.is_config else OSError
        raise kind(f"the simulated provider did not start: {ready.error}")
    return ready


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a child process and reap it."""
    process.terminate()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    try:
        process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
