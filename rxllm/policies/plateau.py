"""How many attempts on the wire are worth having: as many as make the goodput grow."""

import math
from typing import Literal

__all__ = ["Plateau"]

ROOM = 1.15  # of the width at which the goodput stops growing: what is measured is good to about a tenth
NARROWER = 0.8  # of the width, to see whether the goodput needs it
WIDER = 1.3  # of the width, once it is known to be needed
FLAT = 0.95  # of the goodput at a fifth less width: it does not need that fifth
STEEP = 0.86  # it needs all of it
GONE = 0.65  # more is missing than a fifth of the width explains: the server has changed
CHANGED = (0.8, 1.15)  # of the goodput measured before: worth a look
ROUNDS, MOST_ROUNDS = 8.0, 32.0  # mean times on the wire between two tests: one round in ten, and fewer if all is well
CAPPED_ROUNDS = 128.0  # the same where no more is allowed and it was needed: a slower server shows by itself
NARROW = 4  # with so few a fifth is no whole attempt: one more is tried instead
FULL = 0.2  # weight of the newest start in whether the width binds
NEARLY = 0.75  # of the width in use are enough while it grows: who started then was answered at nearly all of it
SAMPLE = 5  # answers at least

State = Literal["grow", "hold", "test"]


class Plateau:
    """A width that doubles while the goodput grows with it, and from then on is tested by a smaller one now and then.

    Goodput, not latency: ten times longer answers are no congestion. Where the answers' tokens are known it is the
    width times the tokens per second on the wire, of answers that began at this width: a few of them are enough,
    however different their lengths. Else it is answers per second, and takes many more.
    """

    __slots__ = (
        "_before",
        "_began",
        "_count",
        "_ends",
        "_full",
        "_goodput",
        "_mark",
        "_most",
        "_needed",
        "_on_wire",
        "_since",
        "_state",
        "_stopped",
        "_tokens",
        "_wait",
        "limit",
        "reason",
        "roof",
        "seconds",
    )

    def __init__(self, limit: int, most: int) -> None:
        self.limit = float(limit)
        self.reason = "slow start"
        self.roof = most  # no more is allowed now
        self.seconds = 0.0  # mean on the wire; 0.0: nothing was answered yet
        self._most = most
        self._state: State = "grow"
        self._before: tuple[float, float] | None = None  # width and goodput to compare with
        self._goodput: float | None = None  # while it is held
        self._stopped = False  # the goodput has stopped growing once: more width is worth nothing
        self._needed = 0.0  # a width that was needed
        self._since = -math.inf  # when it was last decided upon
        self._wait = ROUNDS
        self._mark = math.inf  # the first start since the last decision that found the width used
        self._ends = 0  # answers since then
        self._count = 0  # those that are measured
        self._tokens = self._on_wire = 0.0  # of those; seconds
        self._full = 0.5  # share of the starts that found the width used
        self._began = math.inf  # when the counting of answers began, where their tokens are not known

    def start(self, now: float, in_flight: int, *, binding: bool) -> None:
        """Learn of a start; `binding`: somebody waits because of the limit or the rate."""
        used = NEARLY * self.limit if self._state == "grow" else math.floor(self.limit)
        if binding and in_flight >= used:
            if self._mark == math.inf:
                self._mark = now
                self._ends = 0
            self._full += FULL * (1.0 - self._full)
        else:
            self._full -= FULL * self._full

    def end(self, now: float, seconds: float, tokens: float) -> bool:
        """Learn of an answer; say whether the limit changed."""
        self.seconds = seconds if not self.seconds else self.seconds + 0.02 * (seconds - self.seconds)
        goodput = self._measure(now, seconds, tokens)
        if goodput is None:
            return False
        before = self.limit
        self._decide(now, goodput)
        self._begin()
        return self.limit != before

    def cover(self, limit: int | None, now: float) -> None:
        """Take over a limit that refusals have taught; None: there is none any more."""
        if limit is None:
            if self.limit >= self.roof:
                self._state = "grow"
                self._before = None
                self._begin()
            self.roof = self._most
            return
        self.roof = limit
        if self._state != "hold" and limit < self.limit:
            unknown = self._state == "grow" and limit > WIDER * self._needed
            self._since = -math.inf if unknown else now
            self._state = "hold"
            self._before = self._goodput = None
            self.limit = float(limit)
            self._begin()
        elif self._state == "hold" and self.limit >= min(NARROWER * limit, limit - 1):  # of few, one more is far
            self.limit = float(limit)  # it is the ceiling that binds
            self._goodput = None

    def follow(self, rate: float) -> None:
        """Have room for what a pace of `rate` keeps on the wire (Little's law)."""
        needed = 1.5 * rate * self.seconds + 4
        if self._stopped or self._state == "test" or not self.limit < needed < self._most:
            return
        self.limit = float(min(self.roof, math.ceil(1.2 * needed)))
        self.reason = "the pace needs room"
        self._state = "hold"
        self._goodput = None
        self._begin()

    def _begin(self) -> None:
        """Measure anew, from the next start on that finds the width used."""
        self._mark = math.inf
        self._ends = self._count = 0
        self._tokens = self._on_wire = 0.0
        self._full = 0.5
        self._began = math.inf

    def _measure(self, now: float, seconds: float, tokens: float) -> float | None:
        """Return the goodput at this width; None: not enough answers yet."""
        self._ends += 1
        grow = self._state == "grow"
        if tokens > 0:
            if now - seconds >= self._mark:
                self._count += 1
                self._tokens += tokens
                self._on_wire += seconds
            if self._count < max(SAMPLE, (0.125 if grow else 0.5) * self.limit) or not self._on_wire:
                return None
            return self.limit * self._tokens / self._on_wire
        if self._ends < self.limit or self._mark == math.inf:  # those from before
            return None
        if self._began == math.inf:
            self._began = now
            return None
        self._count += 1
        if self._count < max(4 * SAMPLE, (0.5 if grow else 4.0) * self.limit) or now <= self._began:
            return None
        return self._count / (now - self._began)

    def _decide(self, now: float, goodput: float) -> None:
        if self._full <= 0.5:  # noqa: PLR2004  the rate binds, or nothing: of the width there is nothing to learn
            self._goodput = None
            if self._state == "test" and self._before is not None:
                self._hold(now, self._before[0], "the width is not used")
        elif self._state == "grow":
            self._grow(now, goodput)
        elif self._state == "test":
            self._test(now, goodput)
        elif self._goodput is None:
            self._goodput = goodput
        else:
            self._watch(now, goodput, self._goodput)

    def _grow(self, now: float, goodput: float) -> None:
        before = self._before
        if before is None or goodput > before[1] * (self.limit / before[0]) ** 0.5:
            if self.limit >= self.roof:
                self._hold(now, self.limit, "no more is allowed", goodput)
                return
            self._before = (self.limit, goodput)
            self._widen(2.0)
            return
        width, least = before
        self._stopped = True
        self._hold(now, min(self.limit, ROOM * width * max(1.0, goodput / least)), "goodput stopped growing", goodput)
        if goodput < 1.1 * least:  # it may have stopped long before
            self._wait = 2.0

    def _watch(self, now: float, goodput: float, before: float) -> None:
        changed = not CHANGED[0] < goodput / before < CHANGED[1]
        if changed:
            self._wait = ROUNDS
        if not changed and now - self._since <= self._wait * self.seconds:
            return
        if self.limit <= NARROW and self.limit < self.roof:
            self._state = "grow"
            self._before = (self.limit, goodput)
            self._widen(WIDER)
        elif self.limit > 1:
            self._state = "test"
            self._narrow(goodput, "a test of a smaller width")

    def _test(self, now: float, goodput: float) -> None:
        assert self._before is not None  # noqa: S101  for the type checkers: a test has something to compare with
        width, most = self._before
        share = goodput / most
        if self.limit <= 1 or math.floor(width) == math.floor(self.limit):
            self._hold(now, self.limit, "one is enough", goodput)
        elif share > FLAT or share < GONE:
            self._wait = ROUNDS
            self._narrow(goodput, "goodput does not need the width")
        elif share > STEEP:
            self._stopped = True
            self._hold(now, ROOM * self.limit / share, "tested", most)
        else:
            self._needed = width
            self._hold(now, width, "the width is needed", most)
            if width < self.roof:
                self._before = (width, most)
                self._state = "grow"
                self._widen(WIDER)

    def _narrow(self, goodput: float, reason: str) -> None:
        self._before = (self.limit, goodput)
        self.limit = max(1.0, NARROWER * self.limit)
        self.reason = reason

    def _widen(self, factor: float) -> None:
        self.limit = float(max(1, min(self.roof, math.ceil(factor * self.limit))))
        self.reason = "goodput grows"

    def _hold(self, now: float, width: float, reason: str, goodput: float | None = None) -> None:
        self.limit = max(1.0, width)
        self.reason = reason
        self._state = "hold"
        self._since = now
        if self.limit >= self.roof and self._needed >= NARROWER * self.roof:
            self._wait = min(CAPPED_ROUNDS, 2.5 * self._wait)
        else:
            self._wait = min(MOST_ROUNDS, 1.5 * self._wait)
        self._goodput = goodput
        self._before = None
