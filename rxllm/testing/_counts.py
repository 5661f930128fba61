"""What the server has seen and done: a row for each request, and sums."""

from __future__ import annotations

import time
from collections import Counter

from rxllm.testing._arrivals import Log, Statistics

__all__ = ["Counts"]


class Counts:
    """The log and all sums of one server."""

    def __init__(self, now: float) -> None:
        self.log = Log(now)
        self.in_flight = 0  # admitted and not ended
        self._statuses: Counter[int] = Counter()
        self._reasons: Counter[str] = Counter()
        self._arrivals = self._admitted = self._disconnected = 0
        self._prompt_tokens = self._completion_tokens = self._charged_tokens = 0
        self._max_in_flight = 0
        self._connections = self._max_connections = self._connections_made = 0

    def joined(self) -> int:
        """Count a connection; return its number."""
        self._connections += 1
        self._max_connections = max(self._max_connections, self._connections)
        self._connections_made += 1
        return self._connections_made - 1

    def left(self) -> None:
        """Count a connection that is gone."""
        self._connections -= 1

    def served(  # noqa: PLR0917 - once per request: keywords cost
        self, now: float, connection: int, marker: str, status: int, reason: str, prompt: int = 0
    ) -> None:
        """Count a request that is answered, or cut off, without being taken into service; 0 is no status."""
        self.log.add(now, marker, status, reason, prompt, 0, 0, self.in_flight, connection, admitted=False)
        self._arrivals += 1
        self._reasons[reason] += 1
        if status:
            self._statuses[status] += 1

    def admitted(  # noqa: PLR0917 - the same
        self, now: float, connection: int, marker: str, reason: str, prompt: int, completion: int, charge: int
    ) -> int:
        """Count a request that is taken into service; return its row."""
        in_flight = self.in_flight
        row = self.log.add(now, marker, 0, reason, prompt, completion, charge, in_flight, connection, admitted=True)
        self._arrivals += 1
        self._admitted += 1
        self._reasons[reason] += 1
        self._prompt_tokens += prompt
        self._completion_tokens += completion
        self._charged_tokens += charge
        self.in_flight = in_flight + 1
        self._max_in_flight = max(self._max_in_flight, self.in_flight)
        return row

    def answered(self, row: int, now: float, status: int) -> None:
        """Count the reply of an admitted request."""
        self.log.answered(row, now, status)
        self._statuses[status] += 1

    def disconnected(self, row: int) -> None:
        """Count an admitted request whose client went away before its reply."""
        self.in_flight -= 1
        self._disconnected += 1
        self.log.disconnected(row)

    def settled(self, row: int, reserved: int, used: int) -> None:
        """Count the tokens that an admitted request was charged in the end."""
        self._charged_tokens += used - reserved
        self.log.settled(row, used)

    def statistics(self, now: float) -> Statistics:
        """Return all sums."""
        return Statistics(
            uptime=now - self.log.started,
            cpu_seconds=time.process_time(),
            arrivals=self._arrivals,
            admitted=self._admitted,
            statuses=dict(self._statuses),
            reasons=dict(self._reasons),
            disconnected=self._disconnected,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            charged_tokens=self._charged_tokens,
            in_flight=self.in_flight,
            max_in_flight=self._max_in_flight,
            connections=self._connections,
            max_connections=self._max_connections,
            connections_made=self._connections_made,
        )
