"""A gate's run in bounded memory, to be looked at while it runs and afterwards."""

from __future__ import annotations

import math
import os
import threading
from typing import IO, TYPE_CHECKING, Self

from rxllm.errors import ConfigError, check_number
from rxllm.events import Admitted, Ended, Learned, Paused, Resumed, SettingChanged, StoreChanged, Suspended
from rxllm.gate import Gate
from rxllm.telemetry.bins import NARROWEST, Bins, Table
from rxllm.telemetry.picture import draw

if TYPE_CHECKING:
    from rxllm.events import Event

__all__ = ["Recording"]

FAILURES = ("failed", "timed_out")


class Recording:
    """What happens at a gate from now on, in at most `bins` bins of equal width.

    The bins are 0.1 s wide at first. When the run outgrows them, neighbours merge and the width doubles: a day takes as
    much memory as a minute: about 1 MB with six quotas. How full they are, how many wait and for what is looked at when
    an event comes, at most every 0.1 s.

    An attempt costs 2.7 µs more, of which 1.7 are for its two events to be made and delivered, and a look at two quotas
    5 µs; to pass that gate unrecorded costs 3.3 µs, measured in the same loop.

    Close it, or use it in a `with` block, to record no more; what is recorded stays. It ends by itself when the gate is
    closed. Changes of the setting before the first attempt are not recorded: the run has not begun.

    Args:
        gate: Any thread may make the recording, and read it.
        bins: An even number: how many there are at most.

    Raises:
        ConfigError: An argument out of range.

    Example:
        >>> gate = Gate("500 requests/minute")
        >>> with Recording(gate) as recording:
        ...     pass  # run the pipeline
        >>> sum(recording.table().admitted)
        0
    """

    def __init__(self, gate: Gate, *, bins: int = 600) -> None:
        if not isinstance(gate, Gate):
            raise ConfigError(f"gate must be a Gate, got {gate!r}")
        check_number("bins", bins, least=2, integer=True)
        if bins % 2:
            raise ConfigError(f"bins must be even, got {bins!r}: neighbours merge")
        self._gate = gate
        self._bins = Bins(bins)
        self._lock = threading.Lock()  # events come on the gate's loop, readers are anywhere
        self._look_at = -math.inf  # when the gate is looked at again
        self._subscription = gate.events.subscribe(self._take)

    def __repr__(self) -> str:
        return f"Recording({self._gate!r})"

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Record no more."""
        self.close()

    def close(self) -> None:
        """Record no more; what is recorded stays. Again is harmless."""
        self._subscription.dispose()

    def table(self) -> Table:
        """Return what is recorded until now, as a copy; from any thread."""
        with self._lock:
            return self._bins.table(repr(self._gate))

    def save(self, file: str | os.PathLike[str] | IO[bytes]) -> None:
        """Draw what is recorded until now: 1200 x 900 pixels, or the same as vectors.

        Four panels over one time: attempts per second, attempts in flight, how full the quotas are, and what the first
        in the queue waited for. Thin vertical lines are what changed the run.

        Args:
            file: A path, whose suffix says the format: .png, .svg, .pdf or another that matplotlib knows; without one
                it is a PNG. Or a binary file, which gets a PNG.

        Raises:
            ConfigError: matplotlib is not installed: pip install 'rxllm[plot]'; or it does not know the suffix.
            OSError: The file cannot be written.
        """
        draw(self.table(), file)

    def _take(self, event: Event) -> None:
        """Count an event. A gate calls this in the middle of an admission: it must not raise."""
        at = event.at
        with self._lock:
            if isinstance(event, Admitted):
                self._bins.admitted(at, event.in_flight)
            elif isinstance(event, Ended):
                ending = event.ending
                self._bins.ended(at, event.in_flight, refused=ending == "refused", failed=ending in FAILURES)
            elif isinstance(event, SettingChanged) and self._look_at == -math.inf:
                return  # a gate that was never used has no clock: this was at no time
            else:
                self._bins.mark(at, *_described(event))
                if isinstance(event, SettingChanged):
                    self._bins.set(event.limit, event.rate)
        if at >= self._look_at:
            self._look(at)

    def _look(self, at: float) -> None:
        self._look_at = at + NARROWEST
        now = self._gate.statistics()
        fill = self._gate.explain().fill
        with self._lock:
            self._bins.look(at, waiting=now.waiting, limit=now.limit, rate=now.rate, fill=fill, waited=now.waited)


def _described(event: Event) -> tuple[str, str]:
    """Return the kind of an event and what to say of it."""
    match event:
        case Suspended(quota=quota, seconds=seconds):
            found = "suspended", f"suspended for {seconds:,.0f} s by {quota}"
        case Resumed(seconds=seconds):
            found = "resumed", f"resumed after {seconds:,.0f} s"
        case Paused(seconds=seconds):
            found = "paused", f"paused for {seconds:.2g} s: a refusal said so"
        case Learned(quota=quota):
            found = "learned", f"learned from headers: {quota}"
        case SettingChanged(limit=limit, rate=rate, reason=reason):
            parts = [f"limit {limit}"] if limit is not None else []
            parts += [f"rate {rate:.3g}/s"] if rate is not None else []
            found = "setting", f"{', '.join(parts)}: {reason}"
        case StoreChanged(quota=quota, reachable=reachable, reason=reason):
            found = "store", f"store of {quota} {'is back' if reachable else 'does not answer'}: {reason}"
        case _:  # one that is new
            found = type(event).__name__.lower(), type(event).__name__
    return found
