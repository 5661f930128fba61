"""How to find the number in flight above which a server refuses, and to keep to it."""

import math

from rxllm.policies.climb import Climb
from rxllm.policies.recent import Recent

__all__ = ["Ceiling"]

QUIET = 8.0  # seconds, at least, between two climbs
COST = 0.0125  # share of the starts that climbs may cost in refusals
STEP = 1.0  # seconds of a step of a climb
WIDE = 8  # in flight: with fewer the first refusal says nothing about a ceiling
TRIAL = 5.0  # seconds, and starts: if a lower limit ends the refusals for so long, they were about the number in flight
TRIAL_STARTS = 20
LEAST, MOST = 3, 24  # refusals in a row that must look like a ceiling before one is tried; it doubles with each trial
APART = 1 / 3  # of the mean time on the wire, at least, between two of those: else it is the same requests again
GIVE = 0.03  # of the number in flight is given up at a refusal nobody asked for, and twice as much at each further one
BELOW = 0.85  # of the limit on trial: a refusal with fewer in flight was about something else
LOWER = 4  # times that a limit on trial may be lowered
CERTAIN = 8  # so many, and no more are remembered
SURE = 2  # more refusals that were expected than not: if it opens, a new ceiling is looked for
DOUBTS = 7  # refusals nobody asked for: so many in all, of which a row counts as `AGAIN` at most,
AGAIN = 2  # as more in a row are a drop of the ceiling,
DROP = 8  # and a drop to a tenth is done with in so many
TRUST = 0.75  # doubts that an expected refusal takes back: of clients that share a ceiling every other one is expected
OPEN = 0.5  # a climb so far beyond shows that there is no ceiling any more


class Ceiling:
    """A limit on the number in flight that is learned from refusals, if those are about that number.

    Of a ceiling no start is accepted with more in flight than of those refused, at whatever rate: each refusal is a
    record. Of a rate, refusals come at any number, though that wanders no faster than answers end. So a limit just
    below is tried, and refusals below it refute it. Once it is known, the limit itself costs no refusals; one in a
    while is spent on whether one more would be accepted.
    """

    __slots__ = (
        "_asked",
        "_base",
        "_climb",
        "_confirmed",
        "_cost",
        "_cut",
        "_doubt",
        "_looked",
        "_need",
        "_recent",
        "_records",
        "_seen",
        "_streak",
        "limit",
        "trial",
    )

    def __init__(self, recent: Recent) -> None:
        self.limit: int | None = None  # None: no ceiling is known
        self.trial: float | None = None  # until when it is on trial
        self._base = 0  # the limit without an excess
        self._recent = recent
        self._climb = Climb()
        self._cut = -math.inf  # when a setting was last lowered
        self._asked = -math.inf  # the cut after which a refusal was looked at
        self._looked = -math.inf  # when the attempt of that refusal was
        self._seen = 0  # in flight at the refusal before
        self._records = 0  # refusals in a row that look like a ceiling
        self._need = LEAST
        self._cost = 0  # refusals since the last climb began
        self._confirmed = SURE  # refusals that were expected, less those that were not; the first guess is free
        self._streak = 0  # refusals in a row that nobody asked for
        self._doubt = 0.0  # refusals that nobody asked for, less `TRUST` for each that was expected

    def cut(self, now: float) -> None:
        """Learn that the setting was lowered."""
        self._cut = now

    def refuse(self, now: float, started: float, in_flight: int, *, fresh: bool) -> bool:
        """Say whether a refusal under the current setting is about the number in flight.

        Args:
            now: steady seconds.
            started: when its attempt was.
            in_flight: then, itself included.
            fresh: whether no refusal was about the rate so far.
        """
        if self.limit is None:
            return self._suspect(now, started, in_flight, fresh=fresh)
        if in_flight > self.limit:
            return True  # it started before the limit fell
        self._cost += 1
        if self.trial is not None:
            self._doubt += 1.0
            if in_flight < BELOW * self.limit or self._doubt >= LOWER:
                self._forget()
                return False
            self.limit = self._base = max(1, in_flight - 1)
            return True
        if in_flight > self._base:  # a climb has asked for it
            self._base = in_flight - 1
            self._doubt = max(0.0, self._doubt - TRUST)
            self._confirmed = min(CERTAIN, self._confirmed + 1)
            self._streak = 0
        else:
            self._streak += 1
            self._doubt += self._streak <= AGAIN
            self._confirmed = max(0, self._confirmed - 1)
            self._cost = 0
            if self._doubt > DOUBTS or self._streak > DROP:
                self._need = min(MOST, 2 * self._need)
                self._forget()
                return False
            share = min(0.4, GIVE * 2 ** (self._streak - 1))
            self._base = max(1, in_flight - max(1, round(share * in_flight)))
        self.limit = self._base
        self._restart(now)
        return True

    def look(self, now: float, *, full: bool) -> None:
        """Act on the time that has passed; `full`: whether more would start if the limit were higher."""
        if self.limit is None:
            return
        if self.trial is not None:
            if now < self.trial:
                return
            self.trial = None
            self._need = LEAST
            self._climb.restart(now, 0.0, STEP)  # if it is one, the first step beyond it shows it
        excess = self._climb.advance(now, needed=full)
        if excess > OPEN:
            self._forget()
        elif excess:
            self.limit = self._base + max(1, int(self._base * excess))
        else:
            self.limit = self._base

    def _suspect(self, now: float, started: float, in_flight: int, *, fresh: bool) -> bool:
        if fresh:
            if in_flight < WIDE or self._confirmed < SURE:
                return False
        else:
            peak = self._recent.width(max(now - QUIET, self._cut), started)
            if self._asked == self._cut or not peak:
                return False
            self._asked = self._cut
            if started < self._looked + APART * in_flight / self._speed(now):
                return False  # it is another look at the same requests
            self._looked = started
            spread = math.sqrt(in_flight)  # of the number in flight, if the rate is what binds
            same = abs(in_flight - self._seen) <= (0.5 * spread if in_flight >= WIDE else 0)
            self._seen = in_flight
            record = in_flight > peak - int(0.25 * spread)
            self._records = (self._records + 1 if same else 1) if record else 0
            if self._records < self._need:
                return False
            self._need = min(MOST, 2 * self._need)  # until a trial is passed
        self.limit = self._base = max(1, in_flight - 1)
        self.trial = now + max(TRIAL, TRIAL_STARTS / self._speed(now))
        self._cost = self._confirmed = self._streak = 0
        self._doubt = 0.0
        return True

    def _forget(self) -> None:
        self.limit = self.trial = None
        self._records = 0

    def _restart(self, now: float) -> None:
        speed = self._speed(now)
        quiet = max(QUIET, self._cost / (COST * speed))
        self._climb.restart(now, quiet, max(STEP, 1 / speed))
        self._cost = 0

    def _speed(self, now: float) -> float:
        return max(0.1, self._recent.rate(now - QUIET, now))
