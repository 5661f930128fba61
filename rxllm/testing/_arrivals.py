"""What the server saw: one row for each request, kept in columns."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from math import nan
from typing import TYPE_CHECKING, Final, Literal, NamedTuple

import msgspec

from rxllm.errors import ConfigError, check_number

if TYPE_CHECKING:
    from collections.abc import Iterator

KEEP: Final = 1_000_000  # rows; the older half goes when there are more

ADMITTED: Final = 1
DISCONNECTED: Final = 2


class Arrival(NamedTuple):
    """One request as the server saw it. Times are seconds of `time.monotonic()` in the server's process."""

    arrived: float  # it came before the judge: its last byte was read, and the jitter of its path is over
    answered: float | None  # its reply was written; None: never
    marker: str  # the body's "user" when it has one, else the fingerprint of the prompt; "" for no inference
    status: int  # of the reply; 0: there was none
    reason: str  # "ok", the name of a fault, or why it was refused: see `SimulatedProvider`
    admitted: bool  # taken into service and charged to the quotas
    prompt_tokens: int
    completion_tokens: int  # produced, also when the client was gone
    charged: int  # tokens charged to the token quota, in the end
    in_flight: int  # admitted and unanswered when it arrived, itself not counted
    connection: int  # number of its connection, from 0
    disconnected: bool  # the client was gone before the reply


class Columns(msgspec.Struct, forbid_unknown_fields=True):
    """The log on its way from a child process."""

    started: float
    dropped: int
    arrived: bytes
    answered: bytes
    markers: list[str]
    statuses: bytes
    reasons: list[str]
    reason: bytes
    flags: bytes
    prompts: bytes
    completions: bytes
    charges: bytes
    in_flight: bytes
    connections: bytes


class Log:
    """Requests in the order of their arrival: a sequence of `Arrival`, about 70 bytes and a marker each.

    Attributes:
        started: when the server started, seconds of its `time.monotonic()`.
        dropped: rows no longer kept (beyond 1,000,000).
    """

    def __init__(self, started: float = 0.0) -> None:
        self.started = started
        self.dropped = 0
        self._arrived = array("d")
        self._answered = array("d")
        self._markers: list[str] = []
        self._statuses = array("H")
        self._reasons: dict[str, int] = {}
        self._reason = array("H")
        self._flags = array("B")
        self._prompts = array("Q")
        self._completions = array("Q")
        self._charges = array("Q")
        self._in_flight = array("L")
        self._connections = array("Q")

    def __len__(self) -> int:
        return len(self._markers)

    def __getitem__(self, index: int) -> Arrival:
        return self._row(range(len(self))[index], list(self._reasons))

    def __iter__(self) -> Iterator[Arrival]:
        reasons = list(self._reasons)
        return (self._row(index, reasons) for index in range(len(self)))

    def __repr__(self) -> str:
        return f"Log({len(self)} arrivals, {dict(self.reasons())})"

    def _row(self, index: int, reasons: list[str]) -> Arrival:
        answered, flags = self._answered[index], self._flags[index]
        return Arrival(
            arrived=self._arrived[index],
            answered=answered if answered == answered else None,  # noqa: PLR0124 - not NaN
            marker=self._markers[index],
            status=self._statuses[index],
            reason=reasons[self._reason[index]],
            admitted=bool(flags & ADMITTED),
            prompt_tokens=self._prompts[index],
            completion_tokens=self._completions[index],
            charged=self._charges[index],
            in_flight=self._in_flight[index],
            connection=self._connections[index],
            disconnected=bool(flags & DISCONNECTED),
        )

    def reasons(self) -> Counter[str]:
        """Count the rows by reason."""
        names = list(self._reasons)
        return Counter({names[index]: count for index, count in Counter(self._reason).items()})

    def markers(self, *, admitted: bool = False) -> Counter[str]:
        """Count the rows by marker: how often each request was tried, or admitted."""
        if not admitted:
            return Counter(self._markers)
        flags = self._flags
        return Counter(marker for index, marker in enumerate(self._markers) if flags[index] & ADMITTED)

    def peak(self, window: float, unit: Literal["requests", "tokens"] = "requests") -> int:
        """Return the most that was admitted in any half-open window of this length.

        Args:
            window: seconds, above 0.
            unit: "requests", or "tokens" as they were charged in the end.

        Raises:
            ConfigError: a window not above 0, another unit.
        """
        check_number("window", window, above=0)
        if unit not in ("requests", "tokens"):
            raise ConfigError(f"unit must be 'requests' or 'tokens', got {unit!r}")
        inside: deque[tuple[float, int]] = deque()
        total = most = 0
        for index, at in enumerate(self._arrived):
            if not self._flags[index] & ADMITTED:
                continue
            cost = self._charges[index] if unit == "tokens" else 1
            while inside and inside[0][0] + window <= at:
                total -= inside.popleft()[1]
            inside.append((at, cost))
            total += cost
            most = max(most, total)
        return most

    # written by the server only

    def add(  # noqa: PLR0917 - once per request: keywords cost
        self,
        now: float,
        marker: str,
        status: int,
        reason: str,
        prompt: int,
        completion: int,
        charge: int,
        in_flight: int,
        connection: int,
        *,
        admitted: bool,
    ) -> int:
        """Append a row; return its number, which stays valid when older rows are dropped."""
        if len(self._markers) >= KEEP:
            self._drop(KEEP // 2)
        self._arrived.append(now)
        self._answered.append(now if status else nan)
        self._markers.append(marker)
        self._statuses.append(status)
        self._reason.append(self._reasons.setdefault(reason, len(self._reasons)))
        self._flags.append(ADMITTED if admitted else 0)
        self._prompts.append(prompt)
        self._completions.append(completion)
        self._charges.append(charge)
        self._in_flight.append(in_flight)
        self._connections.append(connection)
        return self.dropped + len(self._markers) - 1

    def answered(self, row: int, now: float, status: int) -> None:
        """Note that an admitted request has got its reply."""
        if (index := row - self.dropped) >= 0:
            self._answered[index] = now
            self._statuses[index] = status

    def settled(self, row: int, charge: int) -> None:
        """Note that an admitted request was charged otherwise in the end."""
        if (index := row - self.dropped) >= 0:
            self._charges[index] = charge

    def disconnected(self, row: int) -> None:
        """Note that an admitted request's client has gone before the reply."""
        if (index := row - self.dropped) >= 0:
            self._flags[index] |= DISCONNECTED

    def _drop(self, count: int) -> None:
        for column in (self._arrived, self._answered, self._statuses, self._reason, self._flags):
            del column[:count]
        for column in (self._prompts, self._completions, self._charges, self._in_flight, self._connections):
            del column[:count]
        del self._markers[:count]
        self.dropped += count

    def columns(self) -> Columns:
        """Return the whole log in a form that msgspec encodes."""
        return Columns(
            started=self.started,
            dropped=self.dropped,
            arrived=self._arrived.tobytes(),
            answered=self._answered.tobytes(),
            markers=self._markers,
            statuses=self._statuses.tobytes(),
            reasons=list(self._reasons),
            reason=self._reason.tobytes(),
            flags=self._flags.tobytes(),
            prompts=self._prompts.tobytes(),
            completions=self._completions.tobytes(),
            charges=self._charges.tobytes(),
            in_flight=self._in_flight.tobytes(),
            connections=self._connections.tobytes(),
        )

    @classmethod
    def from_columns(cls, columns: Columns) -> Log:
        """Rebuild a log from its columns."""
        log = cls(columns.started)
        log.dropped = columns.dropped
        log._arrived.frombytes(columns.arrived)
        log._answered.frombytes(columns.answered)
        log._markers = columns.markers
        log._statuses.frombytes(columns.statuses)
        log._reasons = {name: index for index, name in enumerate(columns.reasons)}
        log._reason.frombytes(columns.reason)
        log._flags.frombytes(columns.flags)
        log._prompts.frombytes(columns.prompts)
        log._completions.frombytes(columns.completions)
        log._charges.frombytes(columns.charges)
        log._in_flight.frombytes(columns.in_flight)
        log._connections.frombytes(columns.connections)
        return log


class Statistics(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the server has counted since its start; control calls are not counted."""

    uptime: float  # seconds
    cpu_seconds: float  # of the server's process, from its start
    arrivals: int
    admitted: int
    statuses: dict[int, int]  # replies written, by status
    reasons: dict[str, int]  # arrivals by reason
    disconnected: int  # admitted, and the client went away before the reply
    prompt_tokens: int  # of admitted requests
    completion_tokens: int
    charged_tokens: int
    in_flight: int
    max_in_flight: int
    connections: int  # open now
    max_connections: int
    connections_made: int
