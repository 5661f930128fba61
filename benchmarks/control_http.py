"""Does the controller do over HTTP what it does in the lab?

Question: with an endless backlog and a real server over HTTP whose limits nobody states, what share of its capacity
does a pipeline use that finds rate and width by itself, and how many of its calls are refused?
Unit: share of the capacity and of the arrivals, both after the warm-up, by the log of the server; seconds in service,
the median of the same time.
Baseline: a fixed limit of 64, `Gate(concurrency=64)`, against a server of its own in the same run. It is the right one
for a width of 64: what a stated limit is worth there.

    bucket_30    30 requests/s refill a bucket of as many; more are refused at once
    ceiling_64   64 requests in service; more are refused with 503
    knee_64      64 requests are served at full speed; more share that speed, and none is refused
    llmock_rpm   `llmock --rpm 1500`, a server of somebody else's: a bucket of 1,500, emptied before, and 25 requests/s

The first three are `SimulatedProvider`s with answers of 2 s on average and a heavy tail, all are processes of their
own. What is used: accepted starts of a rate; of a width the places in service, those above it not counted. `pieces`
are the shares of each 10 s from the first call on. All cases run at once, in one process on one loop; `late` is the
most, in seconds, that a timer there fired too late.
`control.py` has more servers, more controllers, and all figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import json
import math
import socket
import statistics
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

from _bench import arguments, report
from _http import MODEL, requests, same_loop
from _lab_judge import REFUSED, SHARE
from _quota import watched

import rxllm
from rxllm import Gate
from rxllm.policies import pace_and_follow
from rxllm.testing import Latency, ServerQuota, SimulatedProvider

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

UNIT = "share_of_capacity"
FIXED: Final = 64
SIDES: Final[dict[str, Callable[[], Any]]] = {"pace_and_follow": pace_and_follow, "fixed_64": lambda: FIXED}
ENDLESS: Final = 10**9  # requests
PIECE: Final = 10.0  # seconds
TAIL: Final = 0.5  # seconds that a client runs on after those that count
START: Final = 40.0  # seconds for a server to listen
JITTER: Final = 0.05  # seconds of the path of a request, at most
SERVICE: Final = Latency(base=2.0, sigma=0.57)


class Seen(NamedTuple):
    """One call, as a server saw it. Times are seconds from any origin."""

    at: float
    until: float  # infinity: it was not answered yet
    taken: bool  # not refused


class Running(Protocol):
    """A server that runs."""

    url: str

    def seen(self) -> list[Seen]:
        """Return all calls until now, by time."""
        ...

    def close(self) -> None:
        """End it."""
        ...


class Case(NamedTuple):
    """One kind of server."""

    name: str
    start: Callable[[], Running]
    unit: Literal["rate", "places"]
    capacity: float  # requests per second, or places
    full: int = 0  # what it has saved up, to be used before all


class Simulated:
    """A `SimulatedProvider`."""

    def __init__(self, **settings: Any) -> None:
        service = settings.pop("service")
        provider = SimulatedProvider(latency=service, path_jitter=JITTER, limit_headers=False, **settings)
        self._server = provider.start()
        self.url = self._server.url

    def seen(self) -> list[Seen]:
        """Return all calls until now, by time."""
        log = self._server.log()
        assert log.dropped == 0
        return [
            Seen(row.arrived, math.inf if row.answered is None else row.answered, row.admitted)
            for row in log
            if row.marker
        ]

    def close(self) -> None:
        """End it."""
        self._server.close()


class Llmock:
    """`llmock serve`."""

    def __init__(self, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self._address = f"http://127.0.0.1:{port}/_llmock/requests"
        begin = "import sys; from llmock.cli import app; sys.argv[0] = 'llmock'; app()"
        serve = ["serve", "--host", "127.0.0.1", "--port", str(port), "--log-level", "error", *options]
        self._process = subprocess.Popen(
            [sys.executable, "-c", begin, *serve], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        until = time.monotonic() + START
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                self._ask("GET")
                return
            if self._process.poll() is not None or time.monotonic() > until:
                self.close()
                msg = f"llmock did not start with {' '.join(options)}"
                raise SystemExit(msg)
            time.sleep(0.05)

    def seen(self) -> list[Seen]:
        """Return all calls until now, by time."""
        rows = [Seen(row["started_at"], row["ended_at"], row["status"] != 429) for row in self._ask("GET")["requests"]]
        return sorted(rows)

    def forget(self) -> None:
        """Empty the log."""
        self._ask("DELETE")

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()

    def _ask(self, method: str) -> dict[str, Any]:
        request = urllib.request.Request(self._address, method=method)  # noqa: S310  loopback
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310  loopback
            found: dict[str, Any] = json.loads(answer.read() or b"{}")
        return found


def cases(*, tiny: bool) -> list[Case]:
    """Return all; the small ones answer sooner and have the same limits."""
    service = Latency(base=0.2, sigma=0.57) if tiny else SERVICE
    bucket = ServerQuota(1_800, 60.0, "bucket", burst=30)
    rpm, wait = ("3000", "100") if tiny else ("1500", "500")

    def llmock() -> Running:
        return Llmock("--rpm", rpm, "--latency-ms", wait, "--response-style", "hello")

    found = [
        Case("bucket_30", lambda: Simulated(service=service, requests=bucket), "rate", 30.0),
        Case(
            "ceiling_64", lambda: Simulated(service=service, max_in_flight=FIXED, overload_status=503), "places", FIXED
        ),
        Case("knee_64", lambda: Simulated(service=service, knee=FIXED), "places", FIXED),
    ]
    if importlib.util.find_spec("llmock") is not None:
        found.append(Case("llmock_rpm", llmock, "rate", int(rpm) / 60, 0 if tiny else int(rpm)))
    return found


async def ask(url: str, gate: Gate, count: int = ENDLESS, seconds: float | None = None) -> None:
    """Run a pipeline to its end, or until it is cut."""
    async with rxllm.OpenAI(MODEL, url, api_key="any") as client:
        stream = rxllm.from_iterable(requests(count)).pipe(rxllm.call(client, gate=gate, seed=1))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds), rxllm.aiterate(stream) as outcomes:
                async for _ in outcomes:
                    pass


async def drive(case: Case, server: Running, side: str, seconds: float) -> None:
    """Use up what a server has saved, then let a side run."""
    if case.full and isinstance(server, Llmock):
        await ask(server.url, Gate(concurrency=FIXED, headers=False), case.full)
        server.forget()
    await ask(server.url, Gate(concurrency=SIDES[side](), headers=False), seconds=seconds + TAIL)


def judge(rows: Sequence[Seen], case: Case, warm: float, seconds: float) -> dict[str, Any]:
    """Say what was used and refused between `warm` and `seconds` after the first call."""
    begin, end = rows[0].at + warm, rows[0].at + seconds
    counted = [row for row in rows if begin <= row.at < end]
    taken = [row for row in counted if row.taken]
    pieces = [rows[0].at + PIECE * number for number in range(int(seconds // PIECE))]
    return {
        "share": round(share(rows, case, begin, end), 4),
        "pieces": [round(share(rows, case, piece, piece + PIECE), 3) for piece in pieces],
        "refused": round(1 - len(taken) / max(1, len(counted)), 4),
        "p50": round(statistics.median([row.until - row.at for row in taken if row.until < math.inf] or [0.0]), 3),
        "arrivals": len(counted),
    }


def share(rows: Sequence[Seen], case: Case, begin: float, end: float) -> float:
    """Return what of the capacity was used between two times."""
    taken = [row for row in rows if row.taken]
    if case.unit == "rate":
        used = float(sum(begin <= row.at < end for row in taken))
    else:
        used = filled(taken, case.capacity, begin, end)
    return used / case.capacity / (end - begin)


def filled(rows: Iterable[Seen], width: float, begin: float, end: float) -> float:
    """Return the place-seconds in service between two times, with at most `width` places at a time."""
    inside = [row for row in rows if row.at < end and row.until > begin]
    turns = [(max(row.at, begin), 1) for row in inside] + [(min(row.until, end), -1) for row in inside]
    used, serving, since = 0.0, 0, begin
    for at, step in sorted(turns):
        used += min(serving, width) * (at - since)
        serving += step
        since = at
    return used


async def together(started: list[tuple[Case, str, Running]], seconds: float) -> float:
    """Let all run at once; return how late a timer fired at most."""
    runs = asyncio.gather(*(drive(case, server, side, seconds) for case, side, server in started))

    async def wait() -> None:
        await runs

    _, late = await watched(wait())
    return late


def main() -> None:
    """Measure all."""
    chosen = arguments(
        __doc__,
        seconds=(85, 1, "seconds of each run"),
        warm=(25, 0, "of them do not count"),
    )
    todo = [(case, side) for case in cases(tiny=chosen.tiny) for side in SIDES]
    started: list[tuple[Case, str, Running]] = []

    def start(case: Case, side: str) -> None:
        started.append((case, side, case.start()))

    try:
        with ThreadPoolExecutor(len(todo)) as pool:
            list(pool.map(start, *zip(*todo, strict=True)))
        with asyncio.Runner(loop_factory=same_loop()) as runner:
            late = runner.run(together(started, chosen.seconds))
        for case, side, server in sorted(started, key=lambda one: todo.index(one[:2])):
            facts = judge(server.seen(), case, chosen.warm, chosen.seconds)
            fields = {
                **facts,
                "capacity": case.capacity,
                "of": case.unit,
                "seconds": chosen.seconds,
                "late": round(late, 3),
            }
            is_judged = side == "pace_and_follow"
            goal = f"share >= {SHARE}, refused <= {REFUSED}" if is_judged else None
            met = facts["share"] >= SHARE and facts["refused"] <= REFUSED if is_judged else None
            report("control_http", f"{case.name}/{side}", unit=UNIT, **fields, goal=goal, met=met)
    finally:
        for *_, server in started:
            server.close()
    if importlib.util.find_spec("llmock") is None:
        report("control_http", "llmock_rpm", unit=UNIT, missing="llmock", goal=None, met=None)


if __name__ == "__main__":
    main()
