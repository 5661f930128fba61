"""How a quota is shared out, and kept: the life of a lease, what a store has of it, what one does who is alone."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from rxllm.policies.quota import Quota

__all__ = ["PART", "at_most", "kept_beside", "kept_for", "lease_life", "part_of"]

PART = 50  # a lease lives for that part of the window,
LONG = 5.0  # but no longer than so many seconds,
PARTS = 2_000  # unless that would make more leases in a window than these
KEPT = 600.0  # seconds: what was booked of a longer quota matters to the next run, too


def lease_life(quota: Quota) -> float:
    """Return the seconds that a lease lives.

    >>> from rxllm.policies.quota import Quota
    >>> lease_life(Quota("500/minute", margin=0))
    1.2
    >>> lease_life(Quota("10/second", strategy="bucket", burst=2))
    0.004
    """
    window = quota.window
    if quota.strategy == "bucket" and quota.burst is not None and quota.limit:
        window = min(window, quota.burst / quota.limit * quota.per)  # it fills in that time: no lease may last long
    return min(window / PART, max(LONG, window / PARTS))


def kept_for(quota: Quota) -> float:
    """Return the seconds for which what was spent matters."""
    if quota.strategy != "bucket" or quota.burst is None or not quota.limit:
        return quota.window
    return max(quota.window, quota.burst / quota.limit * quota.per)


def kept_beside(quota: Quota, path: str) -> Quota:
    """Return `quota` with a file beside `path` as its state, if it is so long that a restart matters.

    >>> from rxllm.policies.quota import Quota
    >>> kept_beside(Quota("10_000/day"), "answers.jsonl").state
    'answers.jsonl.10000-requests-per-86400-seconds.quota'
    >>> kept_beside(Quota("500/minute"), "answers.jsonl").state
    """
    if quota.per <= KEPT or quota.state is not None or quota.store is not None:
        return quota
    name = re.sub("[^a-zA-Z0-9_.]+", "-", quota.name).strip("-")
    return msgspec.structs.replace(quota, state=f"{path}.{name}.quota")


def at_most(quota: Quota, limit: float) -> float:
    """Return the most that fits at a time."""
    return quota.burst if quota.burst is not None else limit


def part_of(quota: Quota, share: float) -> Quota:
    """Return that part of `quota`; of requests at least one, also at a time, else none would ever start."""
    if share == 1:
        return quota
    least = 1.0 if quota.unit == "requests" else 0.0
    burst = None if quota.burst is None else max(1.0, quota.burst * share)  # a bucket of less is none
    return msgspec.structs.replace(quota, limit=max(least, quota.limit * share), burst=burst)
