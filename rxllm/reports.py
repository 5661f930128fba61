"""What a gate says of itself: `gate.statistics()` and `gate.explain()`."""

import msgspec

from rxllm.events import SettingChanged
from rxllm.policies.ledger import QuotaStatistics

__all__ = ["Explanation", "GateStatistics", "LaneStatistics"]


class LaneStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What one class of attempts does."""

    name: str
    weight: float
    waiting: int
    admitted: int


class GateStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """What a gate does now, and what it has done."""

    limit: int | None
    rate: float | None  # starts per second
    in_flight: int
    waiting: int
    admitted: int
    refused: int
    quotas: tuple[QuotaStatistics, ...]
    lanes: tuple[LaneStatistics, ...]
    waited: dict[str, float]  # seconds in which the first in the queue waited, by what it waited for
    malformed: int  # limit headers of replies that could not be understood
    resumes_in: float | None  # seconds until the next look while a quota is used up; None: none is
    suspended: float  # seconds in which nothing could start for more than a minute
    settings: tuple[SettingChanged, ...]  # the last 100 changes of the limit and the rate, with their reasons


class Explanation(msgspec.Struct, frozen=True, kw_only=True):
    """Where the time of the attempts went, and what limits them now. `print` it."""

    binding: str  # what limits, with how full it is: "90000 tokens per 60 seconds: 97 %"; or what else it is
    seconds: dict[str, float]  # of all attempts together: by what they waited for, in "back-off", on the "network"
    fill: dict[str, float]  # quota -> share of it that is used, 0 to 1

    def __str__(self) -> str:
        """Return some lines for a person."""
        total = sum(self.seconds.values()) or 1.0
        parts = sorted(self.seconds.items(), key=lambda part: -part[1])
        times = [f"  {seconds / total:4.0%}  {seconds:9.1f} s  {reason}" for reason, seconds in parts]
        fills = [f"  {fill:4.0%}  of {name}" for name, fill in self.fill.items()]
        return "\n".join([f"limited by {self.binding}", "time of all attempts:", *times, "quotas in use:", *fills])
