"""When to stop asking a server that answers nothing any more, and how to find out that it does again."""

import math
from typing import Literal

from rxllm.errors import ConfigError, check_number

__all__ = ["Breaker", "BreakerState"]

BreakerState = Literal["closed", "open", "probing"]


class Breaker:
    """Opens after a long time and many failures without any success, then lets one probe pass at a time.

        closed ── no success for max(seconds, times x mean), more than `failures` failures ──▶ open
        open ── every `probe` seconds one attempt may start ──▶ probing
        probing ── a success ──▶ closed          probing ── a failure ──▶ open

    Both are needed: few failures may be bad luck, and many may come within a second. What was on the wire before may
    still succeed, and closes it as well. Refusals are no failures: a server that says "later" is there.

    `now` is in seconds from any origin.

    Args:
        seconds: Without a success, at least.
        failures: In a row, more than that.
        times: Mean times on the wire without a success, at least: a slow answer is no outage.
        probe: Seconds between two probes.
        stop: Whether an open breaker ends the streams, instead of letting them wait for a probe that succeeds.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.
    """

    __slots__ = (
        "_failed",
        "_failures",
        "_mean",
        "_next",
        "_probe",
        "_seconds",
        "_since",
        "_times",
        "opened",
        "state",
        "stop",
    )

    def __init__(
        self, *, seconds: float = 60.0, failures: int = 20, times: float = 10.0, probe: float = 10.0, stop: bool = False
    ) -> None:
        check_number("seconds", seconds, above=0)
        check_number("failures", failures, least=1, integer=True)
        check_number("times", times, least=0)
        check_number("probe", probe, above=0)
        if not isinstance(stop, bool):
            raise ConfigError(f"stop must be True or False, got {stop!r}")
        self.stop = stop
        self.state: BreakerState = "closed"
        self.opened: float | None = None  # when it opened; None: it is closed
        self._seconds = seconds
        self._failures = failures
        self._times = times
        self._probe = probe
        self._since: float | None = None  # the last success, or the first failure of all
        self._failed = 0  # in a row
        self._mean = 0.0  # seconds on the wire of a success
        self._next = -math.inf  # when the next probe may start

    @property
    def due(self) -> float | None:
        """When the next attempt may start; None: now, as far as the breaker is concerned."""
        return None if self.state == "closed" else self._next

    @property
    def silent_since(self) -> float:
        """When there was a success last, or the first failure if there never was one."""
        return 0.0 if self._since is None else self._since

    def allows(self, now: float) -> bool:
        """Say whether an attempt may start."""
        return self.state == "closed" or now >= self._next

    def start(self, now: float) -> None:
        """Learn of a start; of an open breaker it is the probe."""
        if self.state != "closed":
            self.state = "probing"
            self._next = now + self._probe  # also if the probe is never heard of again

    def succeed(self, now: float, seconds: float) -> bool:
        """Learn of a success that took `seconds`; say whether the breaker has closed."""
        self._mean = seconds if not self._mean else self._mean + 0.1 * (seconds - self._mean)
        self._since = now
        self._failed = 0
        was, self.state = self.state, "closed"
        self.opened = None
        return was != "closed"

    def fail(self, now: float) -> bool:
        """Learn of a failure; say whether the breaker has opened."""
        if self._since is None:
            self._since = now
        self._failed += 1
        if self.state == "probing":
            self.state = "open"
            return False
        silent = now - self._since >= max(self._seconds, self._times * self._mean)
        if self.state == "open" or not silent or self._failed <= self._failures:
            return False
        self.state = "open"
        self.opened = now
        self._next = now + self._probe
        return True
