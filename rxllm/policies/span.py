"""How long the window is that a quota is counted in, as far as its silences tell."""

import math

from rxllm.policies.recent import Recent

__all__ = ["Span"]

SPANS = (5.0, 10.0, 15.0, 20.0, 30.0, 60.0)  # seconds: windows of quotas; shorter ones need no care
SILENT = 3.0  # seconds, at least, of a silence: a bucket lets some in all the time
MISSED = 10.0  # starts, at least, that would have been accepted in it
USED = 0.9  # of what was granted must have been accepted in a window that was used up: before an outage it is less
BURST = 1.3  # times what was accepted in the window before: so fast were the last starts, if that is all that is known
NEWS, SAME = math.log(1.2), math.log(1.1)  # so much more or less than before is another grant, so little is the same
LEAST = 0.01  # starts per second: 0 has no logarithm
AHEAD = 2.0  # seconds


class Span:
    """The window of a quota that a burst used up.

    A window that refuses contains all that it grants, at whatever times that was accepted. So if its length is known,
    one refusal tells the quota. A silence is no longer than the window. Of those that are not shorter, it is the one in
    which most was accepted: a longer one holds others that were not used up, a shorter one a part of a silence. If that
    was wrong, the next refusal finds much more or less in it, and the window is the one in which it finds the same.
    """

    __slots__ = ("_grants", "_longest", "_recent", "seconds")

    def __init__(self, recent: Recent) -> None:
        self.seconds = 0.0  # 0.0: none is known
        self._recent = recent
        self._longest = 0.0  # silence
        self._grants = dict.fromkeys(SPANS, 0.0)  # starts per second of each, at the last refusal

    def silent(self, since: float, until: float, held: float) -> bool:
        """Learn of a silence; say whether a window explains it.

        Args:
            since: when the first start was that was refused.
            until: when it ended, as far as that is known.
            held: starts per second that were granted before; 0.0: unknown.
        """
        silence = until - since
        if silence > SPANS[-1]:
            return False
        longest = self._longest
        if silence >= max(SILENT, MISSED / held if held else 0.0):
            longest = max(longest, silence)
        elif not self.seconds:
            return False
        granted, seconds = max((self.granted(until, span), span) for span in SPANS if span >= longest)
        if granted < USED * held or not (held or self.granted(since, SILENT) > BURST * self.granted(since, seconds)):
            return False
        if not self.seconds or self.seconds < longest:
            self.seconds = seconds
        self._longest = longest
        return True

    def learn(self, at: float) -> float:
        """Return the starts per second that are granted, now that all is known of those up to a refusal.

        Args:
            at: when the start was that was refused, or a window that was used up began anew.
        """
        before, self._grants = self._grants, {span: self.granted(at, span) for span in SPANS}

        def change(span: float) -> float:
            return abs(math.log(max(self._grants[span], LEAST) / max(before[span], LEAST)))

        if before[self.seconds] and change(self.seconds) > NEWS:
            best = min((span for span in SPANS if span >= self._longest), key=change)
            if change(best) < SAME:
                self.seconds = best
        return self._grants[self.seconds]

    def granted(self, at: float, span: float = 0.0) -> float:
        """Return the starts per second that were accepted in a window up to `at`."""
        span = span or self.seconds
        return self._recent.count(at - span, at) / span

    def room(self, now: float, granted: float) -> float:
        """Return the starts per second for which there is room in the next two seconds, if so many are granted."""
        return (granted * self.seconds - self._recent.count(now + AHEAD - self.seconds, now)) / AHEAD

    def forget(self) -> None:
        """Forget the window."""
        self.seconds = self._longest = 0.0
        self._grants = dict.fromkeys(SPANS, 0.0)
