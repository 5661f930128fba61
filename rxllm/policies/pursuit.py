"""How to find the rate that a server accepts from what it refuses, and to keep just below it."""

import math
from typing import Literal

from rxllm.policies.climb import Climb
from rxllm.policies.recent import Recent
from rxllm.policies.span import Span

__all__ = ["Pursuit"]

SLOWEST = 0.4  # starts per second, also while nothing is accepted: when something is again, it is seen within 3 s
FASTEST = 1e6  # starts per second: more than any loop
PROBES = 2.0  # starts per second, at most, while nothing is accepted
BELOW = 0.975  # of the quota while it is held: it is known to about 2 %
COST = 0.0125  # share of the starts that climbs may cost in refusals
QUIET = 8.0  # seconds, at least, between two climbs
RARE = (
    240.0  # seconds between two climbs if what the quota saves up takes a minute to use up, and a minute to come back
)
SOON = 30.0  # seconds, at most, until the next climb if a server may have been away
SHORT = 2.0  # seconds until the next climb after a guess
STEP = 1.0  # seconds of a step of a climb: a few times what most refusals take to come back
RAMP = 0.5  # seconds between two looks in the slow start
FAR = 1.3  # times the quota: a climb that got there was not about that quota
WRONG = 3.0  # the same of a guess, and of a quota that saves up for long
CLOSE = 1.06  # times the quota: a climb refused before that confirms it
SAMPLE = 6  # starts, to see which share of them is refused
SPANS = (10.0, 30.0, 63.5)  # seconds: windows of quotas
GROWN = 1.25  # times what a window granted: it grants more now, as two of them in a row do not look like one that big
NEWS = 0.1  # of what a window granted before: it grants more now or less, or others have used it
SLOWLY = 6.0  # steps of a climb in a window: a fast one overshoots by far before the window is used up

State = Literal["ramp", "check", "hold"]


class Pursuit:
    """A pace that is learned from refusals.

    A quota has nothing left when it refuses. So between two refusals exactly what flows in was accepted, whatever it
    saves up in between: the mean of the accepted starts is the quota, and nothing has to be known of its kind.

    - ramp: no refusal was about the rate; twice what was accepted may start.
    - check: the rate was cut; the share of refusals in the next starts says by how much more.
    - hold: just below the quota, with a climb from time to time, as often as its cost in refusals allows.

    A window that was used up refuses everything until it begins anew. From then on its length is known, and each
    refusal tells all that it grants (`span`). No more is started than it has room for, and climbs are slow, so that
    they do not use it up long before it ends; unless the last refusal was news.
    """

    __slots__ = (
        "_accepted",
        "_begun",
        "_climb",
        "_cost",
        "_counted",
        "_cut",
        "_cut_accepted",
        "_dead",
        "_deep",
        "_delay",
        "_first",
        "_gone_far",
        "_held",
        "_last",
        "_latest",
        "_peak",
        "_quota",
        "_recent",
        "_refused",
        "_rough",
        "_span",
        "_starts",
        "_until",
        "cuts",
        "due",
        "rate",
        "reason",
        "state",
    )

    def __init__(self, recent: Recent, rate: float) -> None:
        self.rate = rate  # starts per second
        self.cuts = 0  # changes because of refusals, so far
        self.due = math.inf  # when `look` has something to do
        self.reason = "slow start"
        self.state: State = "ramp"
        self._recent = recent
        self._quota = rate
        self._climb = Climb()
        self._span = Span(recent)
        self._held = 0.0  # the quota before it was refused; 0.0: none was known
        self._first = -math.inf  # when the first start was that was refused then, or when something was accepted again
        self._latest = -math.inf  # when the last start was that was refused
        self._begun = -math.inf  # when the first start was since the rate was last changed because of a refusal
        self._gone_far = False  # the last refusal was of a climb far beyond the quota
        self._rough = True  # the quota is a guess
        self._deep = False  # the quota saves up for so long that a climb gets far
        self._peak = 0.0  # the rate of a climb that got far, while it is looked at
        self._dead: float | None = None  # the rate at which nothing was accepted any more
        self._delay = 0.3  # seconds that a refusal takes to come back, on average
        self._last = -math.inf  # when the last start was
        self._accepted = 0  # starts less those refused
        self._cut = -math.inf  # when the rate was last changed because of a refusal
        self._cut_accepted = 0  # accepted until then
        self._cost = 0  # refusals since the last climb began
        self._until = math.inf  # the starts that are looked at are those from the cut until then,
        self._starts = 0  # so many since the cut,
        self._counted = 0  # so many of them,
        self._refused = 0  # so many of those refused

    @property
    def known(self) -> bool:
        """Whether a refusal has been about the rate."""
        return self.state != "ramp"

    def start(self, now: float) -> None:
        """Count a start."""
        if self._last == -math.inf:
            self.due = now + RAMP
        self._last = now
        self._accepted += 1
        if not self._starts:
            self._begun = now
        self._starts += 1

    def take_back(self, now: float, started: float) -> None:
        """Take back a start that was refused, whatever it was about."""
        self._accepted -= 1
        self._delay += 0.1 * (now - started - self._delay)
        self._latest = max(self._latest, started)
        if self._cut <= started <= self._until:
            self._refused += 1

    def refuse(self, now: float, started: float) -> bool:
        """Learn of a refusal under the current setting that is about the rate; say whether the rate changed."""
        self._cost += 1
        if self.state == "check":
            return False
        self._first = started
        if self.state == "ramp":
            self._rough = True
            self._cost = 0
            self._held = 0.0
            self._quota = min(self.rate, max(self._lately(now), 0.3 * self.rate))
            self._change(now, 0.9 * self._quota, "refused")
            return True
        mean = self._mean(now)
        self._held = self._quota
        self._gone_far = self.rate > FAR * self._quota
        if self.rate < self._quota:  # held: it is too high, or the server grants less
            self._quota = min(0.97 * self._quota, max(0.8 * self._quota, mean))
            self._cost = min(self._cost, 3)
        elif self._span.seconds:
            self._rough = False
            self._quota = min(self.rate, self._span.granted(started))
        elif self.rate > (WRONG if self._deep or self._rough else FAR) * self._quota:
            self._rough = True
            if self.rate * (now - started) >= SAMPLE:
                self._trace(now, started)
                return True
            self._quota = 0.8 * min(self.rate, self._lately(now))
        elif self._rough or self.rate < CLOSE * self._quota:
            self._rough = False
            if self._gone_far:  # the mean is of lower rates
                self._quota = 0.5 * (min(mean, self.rate) + min(self._lately(now), self.rate))
            else:
                self._quota = min(0.5 * (mean + self.rate), 1.03 * mean, self.rate)
        else:
            self._rough = True
            self._quota = min(max(mean, 0.85 * self.rate), self.rate)
        self._change(now, BELOW * self._quota, "refused")
        return True

    def release(self, now: float) -> None:
        """Forget the quota: something else was to blame."""
        self.state = "ramp"
        self._dead = None
        self._span.forget()
        self._peak = 0.0
        self.rate = min(FASTEST, 1.5 * self.rate)
        self.due = now + RAMP

    def look(self, now: float, seconds: float, *, binding: bool) -> None:
        """Act on the time that has passed.

        Args:
            now: steady seconds.
            seconds: the mean on the wire; 0.0: nothing was answered yet.
            binding: whether more would start if the rate were higher.
        """
        if now < self.due:
            return
        if self.state == "check":
            self._check(now)
        elif self.state == "ramp":
            self.due = now + RAMP
            if seconds:  # before that nothing is known of what starts
                span = min(QUIET, max(2 * STEP, seconds))
                self.rate = min(FASTEST, max(self.rate, 2 * self._recent.rate(now - span, now)))
        else:
            self.due = now + max(STEP, 1 / self.rate)
            excess = self._climb.advance(now, needed=binding)
            if excess and not self._rough and self._span.seconds and self._span.granted(now) > GROWN * self._quota:
                self._rough = True
                self._quota = self.rate
                self._climb.restart(now, 0.0, STEP)
            self.rate = self._bounded(now, self._quota * (1 + excess) if excess else BELOW * self._quota)
            self.reason = "a climb" if excess else "held"

    def _lately(self, now: float) -> float:
        """Return accepted starts per second of the last three seconds, or ten starts."""
        return self._recent.rate(now - max(3 * STEP, 10 / self.rate), now)

    def _mean(self, now: float) -> float:
        """Return accepted starts per second since the last cut."""
        elapsed = now - self._cut
        return max(0, self._accepted - self._cut_accepted) / max(elapsed, 0.1)

    def _change(self, now: float, rate: float, reason: str) -> None:
        """Go on with another rate, and see what becomes of it."""
        self.state = "check"
        self.reason = reason
        self.cuts += 1
        self._quota = min(FASTEST, max(SLOWEST, self._quota))
        self.rate = self._bounded(now, rate)
        self._cut = now
        self._cut_accepted = self._accepted
        self._peak = 0.0
        self._starts = self._refused = 0
        self._until = math.inf
        self.due = now + (3 if self._dead is None else 1) / self.rate

    def _learn(self) -> None:
        """Take over what the window grants; if that is something else than before, it is a guess."""
        self._quota = self._span.learn(self._first)
        self._rough = abs(self._quota - self._held) > NEWS * self._held > 0

    def _bounded(self, now: float, rate: float) -> float:
        """Return the rate, or what the window has room for."""
        if self._span.seconds:
            rate = min(rate, self._span.room(now, max(rate, self._quota)))
        return min(FASTEST, max(SLOWEST, rate))

    def _trace(self, now: float, started: float) -> None:
        """Go back, and see what becomes of the starts that are still out: they were as fast as the climb got."""
        peak = self.rate
        self._change(now, BELOW * self._quota, "refused")
        self._peak = peak
        self._cut = started
        self._until = now
        self._counted = max(1, round(peak * (now - started)))
        self._refused = 1
        self.due = now + 2.5 * self._delay

    def _sample(self, now: float) -> None:
        """Wait until there are enough starts since the cut to look at, and then until all of them are back."""
        needed = SAMPLE if self._dead is None else 1
        if self._span.seconds and self._dead is None:
            needed = min(needed, math.ceil(self.rate))  # there may be room for few
            self.rate = self._bounded(now, BELOW * self._quota)
        if self._starts < needed and not 3 <= self._refused == self._starts:  # noqa: PLR2004  three say enough
            self.due = now + max(0.05, 1 / self.rate)
            return
        self._until = now
        self._counted = self._starts
        self.due = now + 2.5 * self._delay

    def _check(self, now: float) -> None:
        """See how many of the starts since the cut were refused, as soon as all of them are back."""
        if self._until == math.inf:
            self._sample(now)
            return
        counted, refused, peak = self._counted, self._refused, self._peak
        if refused >= counted and not peak:
            self._none(now)
        elif self._dead is not None:
            self._some(now)
        elif self._span.seconds:
            self._learn()
            if refused > 1:  # one may be chance
                self._first = self._latest
                self._change(now, BELOW * self._quota, "refused")
            else:
                self._hold(now)
        elif peak:
            self._rough = True
            self._deep = refused >= 0.8 * counted
            if not self._deep:
                self._quota = max(self._quota, peak * (1 - refused / counted))
            self._change(now, BELOW * self._quota, "refused")
        elif refused:
            self._rough = True
            self._quota = self.rate * min(0.96, 1 - (refused - 1) / counted)  # one may be chance
            self._change(now, BELOW * self._quota, "refused")
        else:
            self._hold(now)

    def _none(self, now: float) -> None:
        """Probe while nothing is accepted: the quota is used up for some time."""
        if self._dead is None:
            self._dead = self.rate
            self._deep = self._gone_far  # else the server may have been away
        self._change(now, min(PROBES, 0.8 * self.rate), "nothing accepted")

    def _some(self, now: float) -> None:
        """Go on when something is accepted again: of a window all that it grants was accepted since it began."""
        assert self._dead is not None  # noqa: S101  for the type checkers: it is looked at before
        since, self._first = self._first, 0.5 * (self._latest + self._begun)
        if self._span.silent(since, self._first, self._held):
            self._deep = False
            self._learn()
        else:
            mean = max(self._recent.rate(now - span, now) for span in SPANS)
            self._rough = mean < self._dead / 8
            self._quota = max(mean, self._dead / 8)
        self._dead = None
        if not self._deep:
            soon = 2 * SOON if self._span.seconds else SOON  # a climb in a window costs more
            self._cost = min(self._cost, round(soon * COST * self._quota))
        self._change(now, self._quota, "accepted again")

    def _hold(self, now: float) -> None:
        """Stay at what was found; climb soon if that was a guess, else as seldom as the last climb was dear."""
        self.state = "hold"
        self.reason = "held"
        self.due = now + STEP
        span = self._span.seconds
        step = max(STEP, 1 / self.rate, 3 * self._delay)
        if self._rough:
            quiet = SHORT + 5 / self.rate
        else:
            quiet = max(span or (RARE if self._deep else QUIET), min(120.0, self._cost / (COST * self.rate)))
            step = max(step, span / SLOWLY)
            self._cost = 0
        self._climb.restart(now, quiet, step)
