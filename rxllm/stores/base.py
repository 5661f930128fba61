"""A meter whose bookings live outside of this process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from rxllm.policies.meters import Meter

if TYPE_CHECKING:
    from collections.abc import Callable

    from rxllm.clock import Clock
    from rxllm.errors import CallError
    from rxllm.events import StoreChanged

__all__ = ["OutsideMeter"]


class OutsideMeter(Meter, Protocol):
    """A `Meter` with I/O behind it: the gate asks it as any other, and it says when it is worth asking again."""

    def bind(
        self,
        clock: Clock,
        *,
        wake: Callable[[], object],
        fail: Callable[[CallError], object],
        tell: Callable[[StoreChanged], object],
    ) -> None:
        """Live on the loop of `clock` from now on; called before anything is booked, and again for another loop.

        Args:
            clock: of the loop on which the gate is used.
            wake: have the gate look again, in the next turn: something fits now that did not.
            fail: turn away all that wait: nothing will ever be admitted by itself.
            tell: say that the store does not answer any more, or does again.

        Raises:
            ConfigError: it cannot be used there, or not at all.
        """
        ...

    def close(self) -> None:
        """Give back what is not needed and leave nothing open; called on the loop. Again is harmless."""
        ...
