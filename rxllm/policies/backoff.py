"""When to try again, and when to give up."""

from collections.abc import Callable

import msgspec

from rxllm.errors import check_number
from rxllm.values import ConfigErrorMeta

__all__ = ["Backoff", "Draw"]

Draw = Callable[[float, float], float]  # like `random.Random.uniform`: a number between the two


class Backoff(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=ConfigErrorMeta):
    """Exponential backoff with full jitter.

    Each wait is drawn between zero and a ceiling that doubles with each failure, so that those who failed
    together do not come back together. A hint of the server (Retry-After) is honoured in full.

    Args:
        attempts: Total tries, the first one included. Refusals (429, 529) do not count: the deadline bounds those.
        base: Seconds: the ceiling of the first wait.
        cap: Seconds: no ceiling is above it, but a hint may be.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.

    Source: Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

    >>> longest = lambda low, high: high
    >>> [Backoff().delay(failures, None, longest) for failures in (1, 2, 3, 4, 5)]
    [0.5, 1.0, 2.0, 4.0, None]
    """

    attempts: int = 5
    base: float = 0.5
    cap: float = 30.0

    def __post_init__(self) -> None:
        check_number("attempts", self.attempts, least=1, integer=True)
        check_number("base", self.base, above=0)
        check_number("cap", self.cap, least=self.base)

    def delay(self, failures: int, hint: float | None, draw: Draw) -> float | None:
        """Return seconds to wait after `failures` failed tries (>= 1); None means give up."""
        return None if failures >= self.attempts else self.wait(failures, hint, draw)

    def wait(self, failures: int, hint: float | None, draw: Draw) -> float:
        """Return seconds to wait after `failures` (>= 1), however many: for refusals, which use up no try."""
        ceiling = min(self.cap, self.base * 2.0 ** min(failures - 1, 62))  # 2.0**1024 would raise
        return max(draw(0.0, ceiling), hint or 0.0)
