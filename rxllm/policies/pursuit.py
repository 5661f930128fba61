"""How to find the rate that a server accepts from what it refuses, and to keep just below it."""

import math
from collections import deque
from typing import Literal

from rxllm.policies.climb import Climb
from rxllm.policies.recent import Recent
from rxllm.policies.span import Span

__all__ = ["Pursuit"]

SLOWEST = 0.4  # starts per second, also while nothing is accepted: when something is again, it is seen within 3 s;
LEAST = 0.02  # but of a quota that is known to be less, down to one a minute
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
NEWEST = 4096  # starts: more are never on the wire
RAMP = 0.5  # seconds between two looks in the slow start
FAR = 1.3  # times the quota: a climb that got there was not about that quota
WRONG = 3.0  # the same of a guess, and of a quota that saves up for long
CLOSE = 1.06  # times the quota: a climb refused before that confirms it
SAMPLE = 6  # starts, to see which share of them is refused
NONE = 0.9  # of the starts on the wire were refused: nothing is accepted; a ceiling lets in as many as end meanwhile
DEEP = 0.8  # the same after a climb that got far: it went on from what was saved up
AGAIN = 5.0  # seconds without a refused start after which the next one is a first one again
OVER = 4.0  # times what was accepted on average since it was again: no search goes beyond
SPANS = (10.0, 30.0, 63.5)  # seconds: windows of quotas
GROWN = 1.25  # times what a window granted: it grants more now, as two of them in a row do not look like one that big
NEWS = 0.1  # of what a window granted before: it grants more now or less, or others have used it
SLOWLY = 6.0  # steps of a climb in a window: a fast one overshoots by far before the window is used up

State = Literal["ramp", "check", "hold"]


class Pursuit:
    """A pace that is learned from refusals.

    A quota has nothing left when it refuses. So between two refusals exactly what flows in was accepted, whatever it
    saves up in between: the mean of the accepted starts is the quota, and nothing has to be known of its kind.

    - ramp: no refusal was about the rate; a multiple of what was accepted may start.
    - check: the rate was cut; the share of refusals in the next starts says by how much more.
    - hold: just below the quota, with a climb from time to time, as often as its cost in refusals allows.

    The slow start ends in a burst, and nothing tells how much of it was saved up. So at the first refusal of all it
    stops until the starts on the wire are back. If none of them was accepted, it probes, and once something is accepted
    again it searches from there: each step doubles the rate, and the first refusal ends it. Nothing was saved up at the
    first refusal, so what was accepted since then is the quota. That costs few refusals beyond those on the wire.

    A window that was used up refuses everything until it begins anew. From then on its length is known, and each
    refusal tells all that it grants (`span`). No more is started than it has room for, and climbs are slow, so that
    they do not use it up long before it ends; unless the last refusal was news.

    A climb that the width holds back, or a lack of work, ends without a refusal: what was accepted then is granted.
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
        "_newest",
        "_onset",
        "_peak",
        "_quota",
        "_recent",
        "_refused",
        "_rough",
        "_search",
        "_searched",
        "_span",
        "_starts",
        "_stopped",
        "_tried",
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
        self._onset = -math.inf  # when the first one was of those that followed each other within `AGAIN`
        self._begun = -math.inf  # when the first start was since the rate was last changed because of a refusal
        self._gone_far = False  # the last refusal was of a climb far beyond the quota
        self._rough = True  # the quota is a guess
        self._deep = False  # the quota saves up for so long that a climb gets far
        self._peak = 0.0  # the rate of a climb that got far, while it is looked at
        self._dead: float | None = None  # the rate at which nothing was accepted any more
        # of a search: when the quota was used up, when something was accepted again, and how much was until then
        self._search: tuple[float, float, int] | None = None
        self._newest: deque[float] = deque(maxlen=NEWEST)  # starts
        self._searched = False  # after the slow start, once: later a search would forget too much
        self._stopped = False  # until the starts that were on the wire at the first refusal are back
        self._tried = False  # that has been
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

    @property
    def stopped(self) -> bool:
        """Whether it waits for the starts that were on the wire at the first refusal."""
        return self._stopped

    @property
    def silent(self) -> bool:
        """Whether nothing is accepted any more."""
        return self._dead is not None

    def start(self, now: float) -> None:
        """Count a start."""
        if self._last == -math.inf:
            self.due = now + RAMP
        self._last = now
        self._newest.append(now)
        self._accepted += 1
        if not self._starts:
            self._begun = now
        self._starts += 1

    def take_back(self, now: float, started: float) -> None:
        """Take back a start that was refused, whatever it was about."""
        self._accepted -= 1
        self._delay += 0.1 * (now - started - self._delay)
        if started > self._latest + AGAIN:
            self._onset = started
        self._latest = max(self._latest, started)
        if self._cut <= started <= self._until:
            self._refused += 1

    def refuse(self, now: float, started: float) -> bool:
        """Learn of a refusal under the current setting that is about the rate; say whether the rate changed."""
        self._cost += 1
        if self.state == "check":
            return self._search is not None and self._step_back(now, started)
        self._first = started
        if self.state == "ramp":
            self._rough = True
            self._cost = 0
            self._held = 0.0
            self._first = self._onset
            self._quota = min(self.rate, max(self._lately(now), 0.3 * self.rate))
            self._change(now, 0.9 * self._quota, "refused")
            return True
        mean = self._mean(now)
        self._held = self._quota
        self._gone_far = self.rate > FAR * self._quota
        if self._span.seconds:
            self._rough = False
            self._quota = min(max(self.rate, self._quota), self._span.granted(started))
        elif self.rate < self._quota:  # held: it is too high, or the server grants less
            self._quota = min(0.97 * self._quota, max(0.8 * self._quota, mean))
            self._cost = min(self._cost, 3)
        elif self.rate > (WRONG if self._deep or self._rough else FAR) * self._quota:
            self._rough = True
            if self.rate * (now - started) >= SAMPLE:
                self._trace(now, started, BELOW * self._quota)
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

    def stop(self, now: float, started: float) -> bool:
        """Stop at the first refusal of all, if enough starts are on the wire to tell what it is about; say whether."""
        if self._tried or self._since(started) < SAMPLE:
            return False
        self._tried = self._stopped = True
        self._cost = 1
        self._first = started
        self._trace(now, started, SLOWEST)
        return True

    def release(self, now: float) -> None:
        """Forget the quota: something else was to blame."""
        self.state = "ramp"
        self._dead = None
        self._span.forget()
        self._peak = 0.0
        self.rate = min(FASTEST, 1.5 * self.rate)
        self.due = now + RAMP

    def look(self, now: float, seconds: float, *, binding: bool, factor: float) -> None:
        """Act on the time that has passed.

        Args:
            now: steady seconds.
            seconds: the mean on the wire; 0.0: nothing was answered yet.
            binding: whether more would start if the rate were higher.
            factor: times what was accepted that may start in the slow start.
        """
        if now < self.due:
            return
        if self.state == "check":
            self._check(now)
        elif self.state == "ramp":
            self.due = now + RAMP
            if seconds:  # before that nothing is known of what starts
                span = min(QUIET, max(2 * STEP, seconds))
                self.rate = min(FASTEST, max(self.rate, factor * self._recent.rate(now - span, now)))
        else:
            self.due = now + max(STEP, 1 / self.rate)
            excess = self._climb.advance(now, needed=binding)
            if not excess and self.reason == "a climb":  # it was held back, and not refused
                self._quota = max(self._quota, self._recent.rate(now - QUIET, now))
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
        self._quota = min(FASTEST, max(LEAST, self._quota))
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
        return min(FASTEST, max(min(SLOWEST, BELOW * self._quota), rate))

    def _since(self, started: float) -> int:
        """Return how many starts there were since that one, itself included."""
        return max(1, sum(at >= started for at in self._newest))

    def _trace(self, now: float, started: float, rate: float) -> None:
        """Go back, and see what becomes of the starts that are still out: they were as fast as the rate got."""
        peak = self.rate
        self._change(now, rate, "refused")
        self._peak = peak
        self._cut = started
        self._until = now
        self._counted = self._since(started)
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
        if self._stopped:
            self._go_on(now, refused / counted)
        elif refused >= counted and not peak:
            self._none(now)
        elif self._search is not None:
            self._go_up(now, refused)
        elif self._dead is not None:
            self._some(now)
        elif self._span.seconds:
            self._learn()
            if refused > 1:  # one may be chance
                self._first = self._latest
                self._change(now, BELOW * self._quota, "refused")
            else:
                self._hold(now)
        else:
            self._judge(now, refused / counted, refused)

    def _judge(self, now: float, share: float, refused: int) -> None:
        """Cut by what was refused of a sample, or of the starts that were out when a climb ended far beyond."""
        peak = self._peak
        if peak:
            self._rough = True
            self._deep = share >= DEEP
            if not self._deep:
                self._quota = max(self._quota, peak * (1 - share))
            self._change(now, BELOW * self._quota, "refused")
        elif refused:
            self._rough = True
            self._quota = self.rate * min(0.96, 1 - share * (refused - 1) / refused)  # one may be chance
            self._change(now, BELOW * self._quota, "refused")
        else:
            self._hold(now)

    def _none(self, now: float) -> None:
        """Probe while nothing is accepted: the quota is used up for some time."""
        self._search = None
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
        elif not self._held and not self._searched:
            self._searched = True
            self._span.forget()  # if one was known, it does not explain this
            self._search, self._dead = (since, self._begun, self._accepted - self._starts), None
            self._go_up(now, 0)
            return
        else:
            mean = max(self._recent.rate(now - span, now) for span in SPANS)
            self._rough = mean < self._dead / 8
            self._quota = max(mean, self._dead / 8)
        self._dead = None
        if not self._deep:
            soon = 2 * SOON if self._span.seconds else SOON  # a climb in a window costs more
            self._cost = min(self._cost, round(soon * COST * self._quota))
        self._change(now, self._quota, "accepted again")

    def _go_on(self, now: float, refused: float) -> None:
        """Go on when the starts that were on the wire at the first refusal are back; `refused`: their share."""
        self._stopped = False
        self.rate = self._peak
        if refused >= NONE:
            self._none(now)
        else:
            self._quota = (1 - refused) * self.rate
            self._change(now, BELOW * self._quota, "refused")

    def _go_up(self, now: float, refused: int) -> None:
        """Search on, or end that at a refusal: what was accepted since the quota was used up is what it grants."""
        assert self._search is not None  # noqa: S101  for the type checkers: it is looked at before
        used_up, since, before = self._search
        accepted = self._accepted - before
        if not refused:
            self._quota = self.rate
            self._change(now, min(2 * self.rate, OVER * accepted / (now - since)), "accepted again")
            return
        self._search = None
        self._rough = True
        self._cost = 0  # it belongs to the slow start: no climb has to wait for it
        self._quota = accepted / (now - used_up)
        self._change(now, BELOW * self._quota, "refused")

    def _step_back(self, now: float, started: float) -> bool:
        """Go back to the last step of the search, and see what becomes of the starts that are still out."""
        if self.rate <= self._quota:
            return False
        self.rate = self._quota
        self.cuts += 1
        self._refused += started > self._until
        self._until = now
        self._counted = self._starts
        self.due = now + 2.5 * self._delay
        return True

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
