"""What a try costs, by how it ended."""

from typing import Literal

__all__ = ["Ending", "charge"]

Ending = Literal["unsent", "refused", "answered", "failed", "timed_out", "cancelled"]
Rule = Literal["refund", "keep", "settle"]

# An invalid answer is an answer; the loser of a hedge is cancelled.
RULES: dict[Ending, Rule] = {
    "unsent": "refund",
    "refused": "refund",
    "answered": "settle",
    "failed": "settle",
    "timed_out": "settle",
    "cancelled": "settle",
}
EXCEPTIONS: dict[tuple[Ending, str], Rule] = {
    ("refused", "requests"): "keep",  # providers count the calls that they refuse
}


def charge(ending: Ending, unit: str, reserved: float, actual: float | None) -> float:
    """Return what a try that was sent, or not, costs of a quota.

    Args:
        ending: How it ended.
        unit: What the quota counts.
        reserved: What was booked at admission.
        actual: What the provider says it used; None if it does not say.

    >>> charge("refused", "requests", 1, None), charge("refused", "tokens", 900, None)
    (1, 0.0)
    >>> charge("answered", "tokens", 900, 350), charge("timed_out", "tokens", 900, None)
    (350, 900)
    """
    rule = EXCEPTIONS.get((ending, unit)) or RULES[ending]
    if rule == "refund":
        return 0.0
    if rule == "settle" and actual is not None and 0.0 <= actual < float("inf"):  # a provider may say anything
        return actual
    return reserved
