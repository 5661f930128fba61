"""A slow start, for servers that grow with their load."""

import msgspec

from rxllm.errors import check_number
from rxllm.values import ConfigErrorMeta

__all__ = ["Ramp"]


class Ramp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=ConfigErrorMeta):
    """A rate that grows from `initial` to the full one in `seconds`, by the same factor in equal times.

        rate(t) = initial * (full / initial) ** (t / seconds)      until t = seconds

    So the load that is new is a constant share of the load that is there, which is what servers that start machines
    by need can follow. From 1 to 64 starts a second in 60 s the rate doubles every 10 s.

    Args:
        initial: Starts per second at the beginning.
        seconds: How long it takes.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.

    >>> [round(Ramp(initial=1, seconds=60).rate(at, 64), 3) for at in (0, 10, 20, 60, 1000)]
    [1.0, 2.0, 4.0, 64.0, 64.0]
    """

    initial: float
    seconds: float

    def __post_init__(self) -> None:
        check_number("initial", self.initial, above=0)
        check_number("seconds", self.seconds, least=0)

    def rate(self, elapsed: float, full: float) -> float:
        """Return the starts per second that are right `elapsed` seconds after the first; `full` is never exceeded."""
        if elapsed >= self.seconds or full <= self.initial:
            return float(full)
        grown: float = self.initial * (full / self.initial) ** (max(0.0, elapsed) / self.seconds)
        return min(float(full), grown)  # the power rounds

    def ends(self, elapsed: float) -> bool:
        """Say whether it is over."""
        return elapsed >= self.seconds
