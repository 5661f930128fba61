"""What goes wrong, and when: the names of the faults and the plan that deals them out."""

from __future__ import annotations

from collections import deque
from itertools import accumulate
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from random import Random

NAMED: Final = {
    "429_bare": "429 without Retry-After",
    "insufficient_quota": "429 with the code of an empty balance; never worth a retry",
    "reset": "the connection is reset (RST) before any byte of the reply",
    "hang_up": "the connection is closed (FIN) before any byte of the reply",
    "stall": "no reply until the client goes away, at most `max_stall` seconds",
    "truncated": "200 with half of its body or events, then the connection is closed",
    "garbled": "200 with broken JSON, of a stream in one event",
    "wrong_shape": "200 with JSON that is no answer",
    "empty": "200 with no body",
    "html": "200 with an HTML page",
    "html_502": "502 with an HTML page, as from a gateway",
}
STREAMED: Final = {  # these spoil streamed answers alone; others are good
    "error_midway": "half of the events, then an error as an event",
    "stall_midway": "half of the events, then nothing until the client goes away, at most `max_stall` seconds",
    "unfinished": "all events but the finish reason, and the end as if it were good",
    "no_done": "all events but what says that the stream is over",
}
IN_STREAMS: Final = frozenset({*STREAMED, "truncated", "garbled"})  # these begin a streamed answer; others come instead
AT_THE_DOOR: Final = frozenset({"429_bare", "insufficient_quota", "503", "529"})


def is_fault(name: object) -> bool:
    """Say whether `name` is a status from "400" to "599" or one of the named faults."""
    if not isinstance(name, str):
        return False
    is_status = len(name) == 3 and name[0] in "45" and name.isascii() and name.isdigit()  # noqa: PLR2004
    return is_status or name in NAMED or name in STREAMED


def is_at_the_door(fault: str) -> bool:
    """Say whether the fault comes at once and is charged to no quota; the others come after the latency."""
    return fault in AT_THE_DOOR or (fault[0] == "4" and fault.isdigit())


class FaultPlan:
    """Decides the fault of each request: marked ones first, then the script, then chance."""

    __slots__ = ("_ceilings", "_marked", "_names", "_random", "_script")

    def __init__(self, random: Random) -> None:
        self._random = random
        self._names: tuple[str, ...] = ()
        self._ceilings: tuple[float, ...] = ()
        self._script: deque[str | None] = deque()
        self._marked: dict[bytes, str | deque[str | None]] = {}

    def chances(self, faults: Mapping[str, float]) -> None:
        """Replace the probabilities."""
        self._names = tuple(faults)
        self._ceilings = tuple(accumulate(faults.values()))

    def script(self, faults: Sequence[str | None]) -> None:
        """Replace what is left of the script."""
        self._script = deque(faults)

    def marked(self, faults: Mapping[str, str | Sequence[str | None]]) -> None:
        """Replace the markers and what is left of their lists."""
        self._marked = {
            marker.encode(): fault if isinstance(fault, str) else deque(fault) for marker, fault in faults.items()
        }

    def draw(self, body: bytes) -> str | None:
        """Return the fault of the request with this body, None for none."""
        for marker, faults in self._marked.items():
            if marker in body:
                if isinstance(faults, str):
                    return faults
                return faults.popleft() if faults else None
        if self._script:
            return self._script.popleft()
        if self._ceilings:
            draw = self._random.random()
            for name, ceiling in zip(self._names, self._ceilings, strict=True):
                if draw < ceiling:
                    return name
        return None
