"""Where the time at a gate goes: to what attempts wait for, to the network, and to waits in which nothing can start."""

__all__ = ["Times"]


class Times:
    """The times of all attempts at one gate. `now` is in seconds from any origin.

    All in a queue wait for what its first waits for, so one count serves them all: who enters takes a copy of it, and
    what it has grown by when they start is what they have waited for.

    >>> times = Times()
    >>> times.begin(now=10.0)
    >>> before = times.waited.copy()
    >>> times.note("pace", now=10.5)
    >>> times.note("concurrency", now=12.5)
    >>> times.start(before)
    {'pace': 0.5, 'concurrency': 2.0}
    """

    __slots__ = ("_noted", "_started", "_suspended", "backing_off", "network", "suspended_since", "waited")

    def __init__(self) -> None:
        self.waited: dict[str, float] = {}  # seconds of the first in the queue, by what it waited for
        self.network = 0.0  # seconds of all attempts on the wire
        self.backing_off = 0.0  # seconds of all requests between two attempts
        self._started: dict[str, float] = {}  # seconds of all that have started, by what they waited for
        self.suspended_since: float | None = None  # nothing starts since then, because a quota is used up
        self._suspended = 0.0  # seconds, before that
        self._noted = 0.0  # up to when the waits are counted

    def begin(self, now: float) -> None:
        """Count from `now` on: the queue was empty."""
        self._noted = now

    def note(self, reason: str | None, now: float) -> None:
        """Count the time since the last note as a wait for `reason`; None: nobody waited."""
        if reason is not None and now > self._noted:
            self.waited[reason] = self.waited.get(reason, 0.0) + now - self._noted
        self._noted = now

    def noted(self, reason: str | None, now: float) -> dict[str, float]:
        """Return what `waited` would be after `note`; from any thread."""
        waited = self.waited.copy()
        if reason is not None:
            waited[reason] = waited.get(reason, 0.0) + now - self._noted
        return waited

    def start(self, before: dict[str, float]) -> dict[str, float]:
        """Return what one has waited for that came when `waited` was `before`, in seconds, and count that."""
        own: dict[str, float] = {}
        if self.waited != before:
            for reason, seconds in self.waited.items():
                grown = seconds - before.get(reason, 0.0)
                if grown > 0:
                    own[reason] = grown
                    self._started[reason] = self._started.get(reason, 0.0) + grown
        return own

    @property
    def spent(self) -> dict[str, float]:
        """Seconds of all attempts, by what they went to."""
        others = {"back-off": self.backing_off, "network": self.network}
        return self._started | {name: seconds for name, seconds in others.items() if seconds}

    def suspend(self, now: float) -> None:
        """Learn that nothing starts for long."""
        self.suspended_since = now

    def resume(self, now: float) -> float | None:
        """Learn that attempts start again; return for how many seconds none did, or None if they always could."""
        since, self.suspended_since = self.suspended_since, None
        if since is None:
            return None
        self._suspended += now - since
        return now - since

    def suspended(self, now: float) -> float:
        """Return the seconds in which nothing could start for long; from any thread."""
        since = self.suspended_since
        return self._suspended if since is None else self._suspended + now - since
