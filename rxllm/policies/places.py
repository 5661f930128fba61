"""How many items a stage may have in progress, and how many besides that have not been passed on."""

__all__ = ["Places"]


class Places:
    """The window of a stage and what it may hold, with room for items that only wait.

    An item that waits for long, and for nothing that the others wait for, is parked: another one may be started in its
    place. At most a window of items is started for those that are parked, so no more than two windows are in progress,
    and no more than that and the spare ones are started and not passed on. One that goes on takes its place back at
    once, and nothing is started until there are places again.

    Args:
        window: items in progress at a time, >= 1.
        spare: finished ones besides, >= 0.
        spares_window: whether as many as a window are spare at least: an ordered stage needs that.
        parking: whether items can be parked.

    >>> places = Places(2, spare=1, spares_window=False, parking=True)
    >>> places.in_progress, places.started
    (2, 3)
    >>> places.park()
    >>> places.in_progress, places.started
    (3, 4)
    """

    __slots__ = ("_parked", "_parking", "_spare", "_spares_window", "in_progress", "started", "window")

    def __init__(self, window: int, *, spare: int, spares_window: bool, parking: bool) -> None:
        self._spare = spare
        self._spares_window = spares_window
        self._parking = parking
        self._parked = 0
        self.window = window
        self._count()

    def set(self, window: int) -> None:
        """Change the window; 0 lets nothing start any more."""
        if window != self.window:
            self.window = window
            self._count()

    def _count(self) -> None:
        window = self.window
        extra = min(self._parked, window)
        spare = max(self._spare, window) if self._spares_window else self._spare
        self.in_progress = window + extra  # at most
        self.started = window + extra + spare  # and not passed on, at most

    def park(self) -> None:
        """Learn that an item in progress waits for long."""
        if self._parking:
            self._parked += 1
            self._count()

    def unpark(self) -> None:
        """Learn that it goes on, or has ended."""
        if self._parking:
            self._parked -= 1
            self._count()
