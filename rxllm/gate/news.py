"""What a gate tells of what happens there."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING

from reactivex import Subject

if TYPE_CHECKING:
    from rxllm.events import BreakerChanged, Event, Learned, SettingChanged, Suspended

__all__ = ["News"]

HISTORY = 100  # changes of the setting that are remembered

_log = logging.getLogger("rxllm.gate")


class News:
    """Events for those who subscribe, lines in the log, and the last settings for those who ask.

    Args:
        gate: whose; the log names it.
    """

    def __init__(self, gate: object) -> None:
        self._gate = gate
        self._refused = False
        self.events: Subject[Event] = Subject()
        self.settings: deque[SettingChanged] = deque(maxlen=HISTORY)

    def tell(self, event: Event) -> None:
        """Say what happened to those who want to know; what they raise must not cost anybody a place."""
        if self.events.observers:
            try:
                self.events.on_next(event)
            except Exception:
                _log.warning("%r: a subscriber of the events failed", self._gate, exc_info=True)

    def set(self, event: SettingChanged) -> None:
        """Say that the limit or the pace has changed, and remember it."""
        _log.debug("limit %s, rate %s: %s", event.limit, event.rate, event.reason)
        self.settings.append(event)
        self.tell(event)

    def judged(self, event: BreakerChanged) -> None:
        """Say that the breaker has opened or closed."""
        _log.warning("%r: the breaker is %s: %s", self._gate, "open" if event.is_open else "closed", event.reason)
        self.tell(event)

    def suspended(self, event: Suspended) -> None:
        """Say that a quota is used up for long."""
        name = event.quota.name
        _log.warning("%r: %s is used up; the next attempt starts in %.0f s", self._gate, name, event.seconds)
        self.tell(event)

    def learned(self, event: Learned) -> None:
        """Say that a reply has stated a quota."""
        _log.info("%r: learned a quota from the headers of a reply: %s", self._gate, event.quota)
        self.tell(event)

    def refused(self) -> None:
        """Say that the provider refuses; once."""
        if not self._refused:
            self._refused = True
            _log.warning(
                "%r: the provider has refused an attempt; further ones are counted in statistics()", self._gate
            )
