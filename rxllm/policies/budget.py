"""How many retries are too many: a share of the successes."""

from rxllm.errors import check_number

__all__ = ["RetryBudget"]

MOST = 100.0  # retries that successes can save up beyond `spare`: what was earned in an hour is not spent in a second


class RetryBudget:
    """Allows as many retries as a share of the successes, and a few to begin with.

    When all fails, every request is tried `attempts` times, and a server in trouble gets a multiple of its usual load.
    With a budget it gets a tenth more. Refusals are counted apart and cost nothing: they are retried when the server
    says, and a gate holds them back.

    Args:
        share: Retries for each success, 0 to 1.
        spare: Retries without any success.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.

    >>> budget = RetryBudget(share=0.5, spare=1)
    >>> budget.take(), budget.take()
    (True, False)
    >>> budget.succeed(), budget.succeed(), budget.take()
    (None, None, True)

    Source: Finagle's retry budget; 10 % and 10 are its example.
    """

    __slots__ = ("_left", "_most", "_share", "denied", "refusals", "retries", "successes")

    def __init__(self, share: float = 0.1, spare: float = 10.0) -> None:
        check_number("share", share, least=0, most=1)
        check_number("spare", spare, least=0)
        self._share = share
        self._left = float(spare)
        self._most = spare + MOST
        self.successes = 0
        self.retries = 0  # that were allowed
        self.denied = 0
        self.refusals = 0  # retried, and not charged

    @property
    def left(self) -> float:
        """Retries that are allowed now, with the part of the next one."""
        return self._left

    def succeed(self) -> None:
        """Count a success."""
        self.successes += 1
        self._left = min(self._most, self._left + self._share)

    def take(self, *, refused: bool = False) -> bool:
        """Say whether a failed attempt may be tried again, and count that; `refused`: it was by a 429 or 529."""
        if refused:
            self.refusals += 1
            return True
        if self._left < 1 - 1e-9:  # ten tenths
            self.denied += 1
            return False
        self._left -= 1
        self.retries += 1
        return True
