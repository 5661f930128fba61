"""A place on the wire."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rxllm.policies.accounting import Ending
    from rxllm.policies.pace import PaceTicket
    from rxllm.policies.sliding import Ticket

__all__ = ["Lease", "Lessor"]


class Lessor(Protocol):
    """Who takes a lease back."""

    def settle(
        self, lease: Lease, ending: Ending, used: Mapping[str, float] | None, error: Exception | None, /
    ) -> None:
        """Take `lease` back; its own method calls this."""
        ...


class Lease:
    """A place on the wire, and what was booked for it. Settle it once; again is harmless."""

    __slots__ = ("_gate", "amounts", "at", "epoch", "in_flight", "start", "tickets", "waited")

    def __init__(
        self, gate: Lessor, amounts: tuple[float, ...], tickets: list[Ticket], start: PaceTicket | None, at: float
    ) -> None:
        self._gate: Lessor | None = gate
        self.amounts = amounts  # in the order of the gate's quotas
        self.tickets = tickets  # in the same order
        self.start = start  # in the pace, if there was one
        self.at = at  # when it was admitted
        self.waited: dict[str, float] = {}  # seconds, by what it waited for
        self.epoch: int  # of the controller, if there is one
        self.in_flight: int  # with this one; the same

    def settle(self, ending: Ending, used: Mapping[str, float] | None = None, error: Exception | None = None) -> None:
        """Give the place back and make the bookings what the try really cost.

        Args:
            ending: how the try ended.
            used: unit -> what the provider says it used; a unit that is missing is unknown.
            error: what it failed with, for the controller.
        """
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.settle(self, ending, used, error)
