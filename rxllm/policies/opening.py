"""How far a gate is open, whatever its quotas say: a concurrency limit, a pace, a ramp and a pause."""

import math
from typing import Literal

from rxllm.errors import ConfigError, check_number
from rxllm.policies.breaker import Breaker
from rxllm.policies.pace import Pace
from rxllm.policies.ramp import Ramp

__all__ = ["Hold", "Opening"]

Hold = Literal["concurrency", "breaker", "pace", "pause"]

SLACK = 0.001  # seconds that a timer is late
LONGEST_PAUSE = 2.0  # seconds that one refusal's hint may close the gate for all


class Opening:
    """What keeps everybody back, whatever an attempt costs. `now` is in seconds from any origin.

    Args:
        limit: Attempts on the wire at a time; None: no limit.
        rate: Starts per second, evenly spaced; None: no pace.
        ramp: A slow start, which begins with the first attempt.
        full: Starts per second at its end if there is no `rate`.
        breaker: Lets probes only pass while the server answers nothing; None: no breaker.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds; a ramp that leads nowhere.
    """

    __slots__ = ("_began", "_full", "breaker", "limit", "pace", "pause_until", "ramp", "rate")

    def __init__(
        self,
        *,
        limit: int | None,
        rate: float | None,
        ramp: Ramp | None = None,
        full: float = math.inf,
        breaker: Breaker | None = None,
    ) -> None:
        check_number("concurrency", limit, least=1, integer=True, optional=True)
        check_number("rate", rate, above=0, optional=True)
        if ramp is not None and not isinstance(ramp, Ramp):
            raise ConfigError(f"ramp must be a Ramp, got {ramp!r}")
        if ramp is not None and rate is None and full == math.inf:
            raise ConfigError(f"ramp must be a Ramp to a rate or to a quota of requests, got {ramp!r} and neither")
        if breaker is not None and not isinstance(breaker, Breaker):
            raise ConfigError(f"breaker must be a Breaker or None, got {breaker!r}")
        self.breaker = breaker
        self.limit = limit
        self.rate = rate  # the stated one: a ramp has others on its way there
        self.ramp = ramp
        self.pace = None if rate is None else Pace(rate, slack=SLACK)
        self.pause_until = 0.0
        self._full = full
        self._began: float | None = None  # the ramp

    def set(self, *, limit: int | None, rate: float | None) -> None:
        """Change what is not None.

        Raises:
            ConfigError: A value is out of its bounds.
        """
        check_number("limit", limit, least=1, integer=True, optional=True)
        check_number("rate", rate, above=0, optional=True)
        if limit is not None:
            self.limit = limit
        if rate is not None:
            self.rate = rate
            if self.pace is None:
                self.pace = Pace(rate, slack=SLACK)
            else:
                self.pace.rate = rate

    def put(self, *, limit: int | None, rate: float | None) -> None:
        """Set both, as a controller wants them; None is no limit.

        Raises:
            ConfigError: A value is out of its bounds.
        """
        self.set(limit=limit, rate=rate)
        self.limit = limit
        if rate is None:
            self.rate = self.pace = None

    def pause(self, seconds: float, now: float) -> float:
        """Close for `seconds`, at most 2; return how many of them are new."""
        until = now + min(seconds, LONGEST_PAUSE)
        if until <= self.pause_until:
            return 0.0
        self.pause_until = until
        return until - now

    def renew(self) -> None:
        """Begin anew, as on a clock with another origin."""
        self.pace = None if self.pace is None else Pace(self.pace.rate, slack=SLACK)
        self.pause_until = 0.0

    def held(self, in_flight: int, now: float) -> Hold | None:
        """Return what keeps everybody back now."""
        if self.limit is not None and in_flight >= self.limit:
            return "concurrency"
        if self.breaker is not None and not self.breaker.allows(now):
            return "breaker"
        if self.ramp is not None:
            self._climb(self.ramp, now)
        if self.pace is not None and self.pace.ready_at(now) > now:
            return "pace"
        if now < self.pause_until:
            return "pause"
        return None

    def opens_at(self, hold: Hold, now: float) -> float:
        """Return when `hold` is over; infinity if time does not end it."""
        if hold == "concurrency":
            return math.inf
        if hold == "breaker" and self.breaker is not None:
            return self.breaker.due or now
        if hold == "pause" or self.pace is None:
            return self.pause_until
        return self.pace.ready_at(now)

    def _climb(self, ramp: Ramp, now: float) -> None:
        """Set the pace to where the ramp is; at its end to the stated one, or none."""
        if self._began is None:
            self._began = now
        elapsed = now - self._began
        if ramp.ends(elapsed):
            self.ramp = None
            if self.rate is None:
                self.pace = None
            else:
                self.pace = self.pace or Pace(self.rate, slack=SLACK)
                self.pace.rate = self.rate
            return
        if self.pace is None:
            self.pace = Pace(ramp.initial, slack=SLACK)
        self.pace.rate = ramp.rate(elapsed, self._full if self.rate is None else self.rate)
