"""Pace and follow: the controller that learns a rate and a width by itself.

Three things can bind, and each answers to a probe in its own way:

    a rate        refuses what exceeds it, at any number in flight; between two refusals it has accepted exactly what
                  flowed in, whatever it saves up (a bucket, a sliding or a fixed window)      `pursuit`
    a ceiling     refuses above a number in flight, at any rate: each refusal is a record      `ceiling`
    a knee        refuses nothing and serves all more slowly: the goodput stops growing        `plateau`

So there are two knobs. The rate paces the starts: a knob on the number in flight cannot track a rate, as places that
refusals set free are taken again at once. The limit caps the number in flight: a pace cannot track a ceiling, as the
number in flight wanders by its square root. Each knob is found from a slow start and then tried a bit beyond from time
to time, by a climb; if the rate is what binds, the limit follows it with room to spare (Little's law).

The first refusal of all stops everything until the starts on the wire are back, a second at most if refusals are quick:
what became of them tells a quota that is used up, of which nothing was accepted, from a ceiling, which lets in as many
as end meanwhile, and it costs no further start.

A climb that finds nothing ends in one refusal or a few, and there is no cheaper way to learn that nothing has
changed. So climbs come as often as 1.25 % of the starts in refusals allow: every 80 starts at one refusal, 10 s at 8
starts a second. That is for how long a capacity that has grown goes unnoticed. One that falls shows at once: it takes
what a refusal needs to come back to see which share of the starts is refused, and one step to cut by that.

What is no signal here: latency (answers of ten times the length are no congestion), a Retry-After (it delays its own
request alone), a fault (nothing climbs while they are many), an answer that was refused by a check or
that no further try cures. Refusals of attempts that started before the last cut say what is known already.

Weak spots: a window of a minute that is used up in a burst is probed until it begins anew, and from then on it takes
two or three minutes until more of it is asked for; a window of a second may be taken for a ceiling for a minute or two;
a rate below 2 a second is known as badly as few starts can tell; of a quota of tokens it knows how many requests fit,
so that some 3 % stay free where their lengths differ; a ceiling that several clients share looks like a rate
to each of them for minutes, and some 5 to 10 % of it stay free.
"""

import math

from rxllm.errors import check_number
from rxllm.messages import Setting, Signal
from rxllm.policies.ceiling import Ceiling
from rxllm.policies.control import Machine
from rxllm.policies.plateau import Plateau
from rxllm.policies.pursuit import Pursuit
from rxllm.policies.recent import Recent

__all__ = ["PaceAndFollow", "pace_and_follow"]

TICK = 0.5  # seconds between two looks while attempts start
IDLE = 30.0  # seconds without a start after which there are none
NEWEST = 0.15  # weight of the newest start in what binds
SLOW_START = 2.0  # times what was accepted that may start
RISING = 3.0  # the same of a ceiling: to fill places that end together, and twice would wait for 0.4 % of the time
FAULTY = 0.2  # share of faults at which nothing climbs: a server that is down refuses nothing
SAME = 0.005  # a change of the rate that is not worth a setting
COARSE = 0.2  # the same in the slow start, where the rate only keeps bursts small


class PaceAndFollow:
    """The machine of `pace_and_follow`."""

    __slots__ = (
        "_ceiling",
        "_cut",
        "_due",
        "_faults",
        "_first",
        "_full",
        "_initial",
        "_last",
        "_limit",
        "_made",
        "_pace",
        "_paced",
        "_rate",
        "_recent",
        "_width",
    )

    def __init__(self, *, limit: int = 20, rate: float = 10.0, most: int = 4096) -> None:
        check_number("limit", limit, least=1, integer=True)
        check_number("rate", rate, above=0)
        check_number("most", most, least=limit, integer=True)
        self._initial = Setting(limit=limit, rate=float(rate), reason="slow start")
        self._recent = Recent()
        self._pace = Pursuit(self._recent, float(rate))
        self._ceiling = Ceiling(self._recent)
        self._width = Plateau(limit, most)
        self._limit = limit
        self._rate = float(rate)
        self._made = 0  # settings
        self._cut = 0  # the newest one that was lower: refusals of attempts before it say nothing new
        self._due: float | None = None
        self._last = -math.inf  # when the last start was
        self._full = self._paced = 0.5  # shares of the starts after which the limit, or the rate, held others back
        self._first = 0  # in flight at the first refusal of all, while the starts on the wire are awaited
        self._faults = 0.0  # share of the answers

    @property
    def initial(self) -> Setting:
        """What holds before the first signal."""
        return self._initial

    @property
    def due(self) -> float | None:
        """Steady seconds when `on_timer` wants to be called; None while nothing starts."""
        return self._due

    def on_signal(self, signal: Signal) -> Setting | None:
        """Learn of an attempt that started or ended."""
        at, kind = signal.at, signal.kind
        if kind == "start":
            self._start(signal)
            return None
        if kind in ("refused", "overloaded"):
            return self._refuse(signal)
        self._faults += 0.05 * ((kind == "fault") - self._faults)
        if kind in ("ok", "invalid") and self._width.end(at, signal.seconds, signal.tokens):
            return self._set(at, self._width.reason)
        return None

    def on_timer(self, now: float) -> Setting | None:
        """Act on the time that passed."""
        if self._due is None or now < self._due:
            return None
        ceiling, pace, width = self._ceiling, self._pace, self._width
        before = ceiling.limit
        full = self._full > 0.5  # noqa: PLR2004  most of the time
        ceiling.look(now, full=full and before is not None and self._limit >= before)
        if ceiling.limit != before:
            width.cover(ceiling.limit, now)
        binding = self._paced > 0.5 and ceiling.trial is None and self._faults < FAULTY  # noqa: PLR2004
        cut = pace.cuts
        known = ceiling.limit is not None and ceiling.trial is None
        pace.look(now, width.seconds, binding=binding, factor=RISING if known else SLOW_START)
        if self._first and not pace.stopped:
            first, self._first = self._first, 0
            if not pace.silent and ceiling.refuse(now, now, first, fresh=True):
                pace.release(now)
                width.cover(ceiling.limit, now)
                return self._set(now, "no more room", cut=True)
        if pace.known:
            width.follow(pace.rate)
        return self._set(now, pace.reason, cut=pace.cuts != cut)

    def _start(self, signal: Signal) -> None:
        at = self._last = signal.at
        in_flight, binding = signal.in_flight, signal.binding
        self._recent.start(at, in_flight)
        self._pace.start(at)
        self._width.start(at, in_flight, binding=binding)
        full = binding and in_flight >= self._limit
        self._full += NEWEST * (full - self._full)
        self._paced += NEWEST * ((binding and not full) - self._paced)
        if self._due is None:
            self._due = at + TICK

    def _refuse(self, signal: Signal) -> Setting | None:
        now = signal.at
        started = now - signal.seconds
        self._recent.refuse(started)
        self._pace.take_back(now, started)
        if signal.epoch < self._cut:
            return None
        ceiling, pace = self._ceiling, self._pace
        before = ceiling.limit
        if before is None and not pace.known and pace.stop(now, started):
            self._first = signal.in_flight
            return self._set(now, pace.reason, cut=True)
        if ceiling.refuse(now, started, signal.in_flight, fresh=not pace.known):
            if ceiling.limit == before:
                return None
            if before is None and pace.known:
                pace.release(now)
            self._width.cover(ceiling.limit, now)
            return self._set(now, "no more room", cut=True)
        if ceiling.limit != before:
            self._width.cover(None, now)
        if pace.refuse(now, started):
            return self._set(now, pace.reason, cut=True)
        return self._set(now, pace.reason)

    def _set(self, now: float, reason: str, *, cut: bool = False) -> Setting | None:
        """Return the setting if it is another one."""
        pace = self._pace
        after = math.nextafter(now, math.inf)
        self._due = max(after, min(pace.due, now + TICK)) if now - self._last < IDLE else None
        limit = max(1, math.floor(self._width.limit))
        if self._ceiling.limit is not None:
            limit = min(limit, self._ceiling.limit)
        rate = pace.rate
        if abs(rate - self._rate) < (SAME if pace.known else COARSE) * self._rate:
            rate = self._rate
        if cut:
            self._ceiling.cut(now)
        if limit == self._limit and rate == self._rate:
            return None
        self._limit, self._rate = limit, rate
        self._made += 1
        if cut:
            self._cut = self._made
        return Setting(limit=limit, rate=rate, reason=reason)


def pace_and_follow(*, limit: int = 20, rate: float = 10.0, most: int = 4096) -> Machine:
    """Return a controller that finds the rate and the width of a server by itself.

    Args:
        limit: Attempts on the wire at a time, at first.
        rate: Starts per second, at first.
        most: Attempts on the wire at a time, ever.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.

    >>> pace_and_follow().initial
    Setting(limit=20, rate=10.0, reason='slow start')
    """
    return PaceAndFollow(limit=limit, rate=rate, most=most)
