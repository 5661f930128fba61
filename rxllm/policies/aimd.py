"""Additive increase, multiplicative decrease: a concurrency limit that follows the share of errors.

Each window of outcomes either raises the limit by a step, or lowers it by a factor and goes into back-off, or leaves it
as it is. Three shares of errors in a window mean three things:

    0 ........ recovery_threshold ........ error_threshold ........ 1
      good: it grows             hold                 bad: it shrinks

In back-off two good windows in a row are needed to grow again, and two bad ones to shrink again.
"""

import math
from collections import deque

import msgspec

from rxllm.errors import ConfigError, check_number
from rxllm.messages import Setting, Signal
from rxllm.values import ConfigErrorMeta

__all__ = ["AdaptiveConcurrencyParams", "Aimd", "aimd"]

OUTCOMES = 1000  # newest ones that a window has at most
IN_A_ROW = 2  # windows in back-off, to leave it or to shrink again
FAILURES = ("refused", "overloaded", "fault")


class AdaptiveConcurrencyParams(
    msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=ConfigErrorMeta
):
    """How far and how fast a concurrency limit may move.

    Args:
        min_concurrency: Attempts on the wire at a time, at least.
        max_concurrency: The same, at most.
        initial_concurrency_factor: Where between the two it begins, 0 to 1.
        concurrency_step: What a good window adds.
        min_update_time: Seconds between two changes, at least.
        error_threshold: Share of errors from which on a window is bad.
        backoff_factor: What a bad window multiplies the limit by; above 1 it grows.
        recovery_threshold: Share of errors up to which a window in back-off is good; below `error_threshold`. With 0
            a single error in each window would keep it in back-off for ever.
        min_window_size: Outcomes that make a window.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.
    """

    min_concurrency: int = 5
    max_concurrency: int = 100
    initial_concurrency_factor: float = 0.5
    concurrency_step: int = 5
    min_update_time: float = 60.0
    error_threshold: float = 0.01
    backoff_factor: float = 0.8
    recovery_threshold: float = 0.005
    min_window_size: int = 10

    def __post_init__(self) -> None:
        check_number("min_concurrency", self.min_concurrency, least=1, integer=True)
        check_number("max_concurrency", self.max_concurrency, least=self.min_concurrency, integer=True)
        check_number("initial_concurrency_factor", self.initial_concurrency_factor, least=0, most=1)
        check_number("concurrency_step", self.concurrency_step, least=1, integer=True)
        check_number("min_update_time", self.min_update_time, above=0)
        check_number("error_threshold", self.error_threshold, least=0, most=1)
        check_number("backoff_factor", self.backoff_factor, above=0)
        check_number("recovery_threshold", self.recovery_threshold, least=0, most=1)
        check_number("min_window_size", self.min_window_size, least=1, integer=True)
        if self.recovery_threshold >= self.error_threshold:
            raise ConfigError(
                f"recovery_threshold must be below error_threshold ({self.error_threshold!r}),"
                f" got {self.recovery_threshold!r}"
            )

    @property
    def initial(self) -> int:
        """The limit at the beginning."""
        least, most = self.min_concurrency, self.max_concurrency
        return min(most, max(least, math.floor((most - least) * self.initial_concurrency_factor + least)))


class Aimd:
    """The machine of `aimd`."""

    __slots__ = (
        "_backoff",
        "_bad",
        "_changed",
        "_errors",
        "_good",
        "_initial",
        "_limit",
        "_made",
        "_outcomes",
        "_params",
    )

    due: float | None = None  # it looks whenever an attempt ends; without any there is nothing to learn

    def __init__(self, params: AdaptiveConcurrencyParams | None = None) -> None:
        self._params = AdaptiveConcurrencyParams() if params is None else params
        self._limit = self._params.initial
        self._initial = Setting(limit=self._limit, rate=None, reason="start")
        self._outcomes: deque[bool] = deque()  # of the window; True: an error
        self._errors = 0  # of those
        self._changed = -math.inf  # when the limit, or a window in back-off, was last decided upon
        self._made = 0  # settings
        self._backoff = False
        self._good = self._bad = 0  # windows in a row, in back-off

    @property
    def initial(self) -> Setting:
        """What holds before the first signal."""
        return self._initial

    def on_signal(self, signal: Signal) -> Setting | None:
        """Learn of an attempt that started or ended."""
        if signal.kind == "start":
            return None
        if signal.epoch >= self._made:  # else it began under another limit, and says nothing of this one
            self._count(error=signal.kind in FAILURES)
        return self._look(signal.at, binding=signal.binding)

    def on_timer(self, now: float) -> Setting | None:
        """Do nothing: see `due`."""

    def _count(self, *, error: bool) -> None:
        if len(self._outcomes) == OUTCOMES:
            self._errors -= self._outcomes.popleft()
        self._outcomes.append(error)
        self._errors += error

    def _clear(self, now: float) -> None:
        self._outcomes.clear()
        self._errors = 0
        self._changed = now

    def _look(self, now: float, *, binding: bool) -> Setting | None:
        params = self._params
        if len(self._outcomes) < params.min_window_size or now - self._changed < params.min_update_time:
            return None
        share = self._errors / len(self._outcomes)
        self._clear(now)
        if share >= params.error_threshold:
            return self._shrink(share)
        if share > params.recovery_threshold:
            self._good = self._bad = 0
            return None
        if self._backoff:
            self._good, self._bad = self._good + 1, 0
            if self._good < IN_A_ROW:
                return None
            self._backoff = False
        return self._set(min(params.max_concurrency, self._limit + params.concurrency_step), share) if binding else None

    def _shrink(self, share: float) -> Setting | None:
        params = self._params
        if self._backoff:
            self._good, self._bad = 0, self._bad + 1
            if self._bad < IN_A_ROW:
                return None
        self._backoff = True
        return self._set(min(params.max_concurrency, _shrunk(params, self._limit)), share)

    def _set(self, limit: int, share: float) -> Setting | None:
        self._good = self._bad = 0
        if limit == self._limit:
            return None
        self._limit = limit
        self._made += 1
        return Setting(limit=limit, rate=None, reason=f"{share:.1%} errors")


class StrictAimd:
    """The machine of `aimd(..., strict=True)`.

    It looks when an attempt starts. It counts each outcome whenever that began. The windows of a back-off follow on
    each other at once, and the band between the thresholds is bad in them. At a bound the window is not emptied, and a
    factor above 1 may lead beyond the upper one.
    """

    __slots__ = ("_backoff", "_bad", "_changed", "_good", "_initial", "_limit", "_outcomes", "_params")

    due: float | None = None

    def __init__(self, params: AdaptiveConcurrencyParams) -> None:
        self._params = params
        self._limit = params.initial
        self._initial = Setting(limit=self._limit, rate=None, reason="start")
        self._outcomes: deque[bool] = deque(maxlen=OUTCOMES)
        self._changed = -math.inf
        self._backoff = False
        self._good = self._bad = 0

    @property
    def initial(self) -> Setting:
        """What holds before the first signal."""
        return self._initial

    @property
    def in_backoff(self) -> bool:
        """Whether it waits for two good windows."""
        return self._backoff

    def on_signal(self, signal: Signal) -> Setting | None:
        """Learn of an attempt that started or ended."""
        if signal.kind == "start":
            return self._look(signal.at)
        if signal.kind == "ok" or signal.kind in FAILURES:  # what no further try cures was never counted
            self._outcomes.append(signal.kind != "ok")
        return None

    def on_timer(self, now: float) -> Setting | None:
        """Do nothing."""

    def _look(self, now: float) -> Setting | None:
        params, outcomes = self._params, self._outcomes
        if len(outcomes) < params.min_window_size or now - self._changed < params.min_update_time:
            return None
        share = sum(outcomes) / len(outcomes)
        if not self._backoff:
            if share >= params.error_threshold:
                return self._shrink(now, share)
        elif share <= params.recovery_threshold:
            self._good, self._bad = self._good + 1, 0
            outcomes.clear()
            if self._good < IN_A_ROW:
                return None
            self._backoff = False
            self._good = 0
        else:
            self._good, self._bad = 0, self._bad + 1
            outcomes.clear()
            return self._shrink(now, share) if self._bad >= IN_A_ROW else None
        return self._set(now, min(params.max_concurrency, self._limit + params.concurrency_step), share)

    def _shrink(self, now: float, share: float) -> Setting | None:
        self._backoff = True
        return self._set(now, _shrunk(self._params, self._limit), share)

    def _set(self, now: float, limit: int, share: float) -> Setting | None:
        if limit == self._limit:
            return None
        self._limit = limit
        self._outcomes.clear()
        self._good = self._bad = 0
        self._changed = now
        return Setting(limit=limit, rate=None, reason=f"{share:.1%} errors")


def _shrunk(params: AdaptiveConcurrencyParams, limit: int) -> int:
    """Return what a bad window leaves of a limit; with a factor above 1 that is more."""
    return max(params.min_concurrency, math.floor(limit * params.backoff_factor))


def aimd(params: AdaptiveConcurrencyParams | None = None, *, strict: bool = False) -> Aimd | StrictAimd:
    """Return a controller that follows the share of errors with a concurrency limit.

    Refusals, overloads and faults are errors. An answer that a check refused is none, nor is one that no further try
    cures: the server took them.

    Args:
        params: How far and how fast; None: the defaults.
        strict: Whether it decides as the machine from which the fields come, step for step. That one looks only when an
            attempt starts, counts what began under the limit before, takes the band between the thresholds for bad
            while it is in back-off, and leaves a back-off after two windows that may be a moment apart.

    >>> machine = aimd(AdaptiveConcurrencyParams(min_concurrency=1, max_concurrency=100))
    >>> machine.initial.limit
    50
    """
    params = AdaptiveConcurrencyParams() if params is None else params
    return StrictAimd(params) if strict else Aimd(params)
