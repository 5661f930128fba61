"""Quotas as a provider keeps them: pure state machines; `now` comes in as an argument.

All three have one interface. Times are seconds on any steady clock; costs and amounts are numbers of one
unit.

    wait(now, cost)               seconds until `cost` would fit: 0.0 means now, infinity means never
    charge(now, cost)             book `cost`, whether it fits or not; return the entry that `settle` takes
    settle(now, entry, actual)    make `actual` of what an entry was booked with, as far as it still counts
    remaining(now)                what is left now, at least 0.0
    reset(now)                    seconds until nothing is booked any more
"""

from __future__ import annotations

from collections import deque
from math import ceil, inf
from typing import Final, Literal, Protocol

import msgspec

from rxllm.errors import ConfigError, check_number

Strategy = Literal["fixed", "sliding", "bucket"]

STRATEGIES: Final = ("fixed", "sliding", "bucket")
Entry = list[float]  # when something was charged, and how much

SLACK: Final = 1e-9  # relative: a caller that waits exactly as long as it was told is let in


class ServerQuota(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How much the simulated provider admits in a time, and how it counts.

    Args:
        amount: requests or tokens per window, above 0.
        per: length of the window in seconds, above 0.
        strategy: "fixed" (a counter that falls to zero at the end of each window, windows counted from the
            start of the server), "sliding" (every admission counts for exactly `per` seconds) or "bucket"
            (refills steadily at `amount / per`).
        burst: size of the bucket, above 0; None means `amount`. Only with strategy "bucket".

    Raises:
        ConfigError: a field out of its range, or `burst` with another strategy.
    """

    amount: float
    per: float = 60.0
    strategy: Strategy = "sliding"
    burst: float | None = None

    def __post_init__(self) -> None:
        check_number("amount", self.amount, above=0)
        check_number("per", self.per, above=0)
        check_number("burst", self.burst, above=0, optional=True)
        if self.strategy not in STRATEGIES:
            raise ConfigError(f"strategy must be one of {', '.join(STRATEGIES)}, got {self.strategy!r}")
        if self.burst is not None and self.strategy != "bucket":
            raise ConfigError(f"burst={self.burst!r} needs strategy 'bucket', got strategy {self.strategy!r}")


class Limiter(Protocol):
    """What the server asks of a quota's state."""

    quota: ServerQuota

    def wait(self, now: float, cost: float) -> float: ...
    def charge(self, now: float, cost: float) -> Entry: ...
    def settle(self, now: float, entry: Entry, actual: float) -> None: ...
    def remaining(self, now: float) -> float: ...
    def reset(self, now: float) -> float: ...


class FixedWindow:
    """A counter per window; windows start at `origin + k * per`."""

    __slots__ = ("_index", "_origin", "_used", "quota")

    def __init__(self, quota: ServerQuota, origin: float) -> None:
        self.quota = quota
        self._origin = origin
        self._index = 0
        self._used = 0.0

    def _roll(self, now: float) -> float:
        """Enter the window of `now`; return its end."""
        per = self.quota.per
        if now >= (end := self._origin + (self._index + 1) * per):
            index = int((now - self._origin) // per)
            if now >= self._origin + (index + 1) * per:  # the division rounded down
                index += 1
            self._index = index
            self._used = 0.0
            end = self._origin + (index + 1) * per
        return end

    def wait(self, now: float, cost: float) -> float:
        end = self._roll(now)
        if self._used + cost <= self.quota.amount:
            return 0.0
        return inf if cost > self.quota.amount else end - now

    def charge(self, now: float, cost: float) -> Entry:
        self._roll(now)
        self._used += cost
        return [now, cost]

    def settle(self, now: float, entry: Entry, actual: float) -> None:
        self._roll(now)
        if entry[0] >= self._origin + self._index * self.quota.per:  # else its window is over
            self._used += actual - entry[1]
            entry[1] = actual

    def remaining(self, now: float) -> float:
        self._roll(now)
        return max(0.0, self.quota.amount - self._used)

    def reset(self, now: float) -> float:
        end = self._roll(now)
        return end - now if self._used else 0.0


class SlidingLog:
    """Every charge counts until `per` seconds after it."""

    __slots__ = ("_entries", "_used", "quota")

    def __init__(self, quota: ServerQuota) -> None:
        self.quota = quota
        self._entries: deque[Entry] = deque()
        self._used = 0.0

    def _expire(self, now: float) -> None:
        entries, per = self._entries, self.quota.per
        while entries and entries[0][0] + per <= now:
            self._used -= entries.popleft()[1]
        if not entries:
            self._used = 0.0  # forget the rounding of fractional costs

    def wait(self, now: float, cost: float) -> float:
        self._expire(now)
        slack = SLACK * self.quota.amount
        excess = self._used + cost - self.quota.amount
        if excess <= slack:
            return 0.0
        if cost > self.quota.amount:
            return inf
        for at, used in self._entries:
            excess -= used
            if excess <= slack:
                return at + self.quota.per - now
        return self.reset(now)

    def charge(self, now: float, cost: float) -> Entry:
        self._expire(now)
        entry = [now, cost]
        self._entries.append(entry)
        self._used += cost
        return entry

    def settle(self, now: float, entry: Entry, actual: float) -> None:
        self._expire(now)
        if entry[0] + self.quota.per > now:  # else it counts no more
            self._used += actual - entry[1]
            entry[1] = actual

    def remaining(self, now: float) -> float:
        self._expire(now)
        return max(0.0, self.quota.amount - self._used)

    def reset(self, now: float) -> float:
        self._expire(now)
        return self._entries[-1][0] + self.quota.per - now if self._entries else 0.0


class TokenBucket:
    """A level that rises by `amount / per` a second up to `burst`."""

    __slots__ = ("_at", "_level", "quota")

    def __init__(self, quota: ServerQuota, now: float) -> None:
        self.quota = quota
        self._at = now
        self._level = self._size

    @property
    def _size(self) -> float:
        return self.quota.amount if self.quota.burst is None else self.quota.burst

    def _fill(self, now: float) -> float:
        gained = max(0.0, now - self._at) * self.quota.amount / self.quota.per
        self._at = max(now, self._at)
        self._level = min(self._size, self._level + gained)
        return self._level

    def wait(self, now: float, cost: float) -> float:
        lacking = cost - self._fill(now)
        if lacking <= SLACK * max(1.0, cost):
            return 0.0
        return inf if cost > self._size else lacking * self.quota.per / self.quota.amount

    def charge(self, now: float, cost: float) -> Entry:
        self._level = self._fill(now) - cost
        return [now, cost]

    def settle(self, now: float, entry: Entry, actual: float) -> None:
        self._level = self._fill(now) + entry[1] - actual  # `_fill` cuts what flows over
        entry[1] = actual

    def remaining(self, now: float) -> float:
        return max(0.0, self._fill(now))

    def reset(self, now: float) -> float:
        return max(0.0, self._size - self._fill(now)) * self.quota.per / self.quota.amount


def limiter(quota: ServerQuota | None, now: float, previous: Limiter | None = None) -> Limiter | None:
    """Return the state for `quota`, empty at `now`; None for none.

    What `previous` has booked is kept when only the amount changed, as when a vendor raises or cuts a limit.
    """
    if quota is None:
        return None
    if previous is not None and (previous.quota.strategy, previous.quota.per) == (quota.strategy, quota.per):
        previous.remaining(now)  # fill or roll by the old amount up to now
        previous.quota = quota
        return previous
    if quota.strategy == "fixed":
        return FixedWindow(quota, now)
    return SlidingLog(quota) if quota.strategy == "sliding" else TokenBucket(quota, now)


def go_duration(seconds: float) -> str:
    """Write a span as Go does, rounded up to milliseconds: "12ms", "1.5s", "6m0s", "1h0m0s".

    Example:
        >>> go_duration(0.0121), go_duration(1.5), go_duration(360)
        ('13ms', '1.5s', '6m0s')
    """
    ms = ceil(seconds * 1000 - 1e-6)
    if ms < 1000:  # noqa: PLR2004 - milliseconds in a second
        return f"{ms}ms" if ms > 0 else "0s"
    minutes, ms = divmod(ms, 60_000)
    text = f"{ms / 1000:g}s"
    if minutes:
        hours, minutes = divmod(minutes, 60)
        text = f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}"
    return text
