"""What needs no call any more: how a journal hands what it has to the operator inside, and how that lets it through.

An operator that does says so: its `takes_finished` is true.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rxllm.demand import NOTHING
from rxllm.stream import Stream

if TYPE_CHECKING:
    from rxllm.demand import DemandScheduler, Disposable, Observer
    from rxllm.messages import Outcome

__all__ = ["Finished", "Just"]


class Finished:
    """An item whose outcome is known: it takes its place among the others, asks nothing, and costs nothing."""

    __slots__ = ("outcome",)

    def __init__(self, outcome: Outcome[Any]) -> None:
        self.outcome = outcome


class Just(Stream[Any]):
    """A stream of one outcome, or of its error: a tenth of the cost of the stock ones."""

    def __init__(self, outcome: Outcome[Any], *, raising: bool) -> None:
        self.outcome = outcome
        self.raising = raising

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:  # noqa: ARG002  it is there
        outcome = self.outcome
        if self.raising and outcome.error is not None:
            observer.on_error(outcome.error)
        else:
            observer.on_next(outcome)
            observer.on_completed()
        return NOTHING
