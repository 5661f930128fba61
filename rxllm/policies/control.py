"""What a controller is, as a pure machine: signals of attempts in, settings of the gate out."""

from typing import Protocol

from rxllm.messages import Setting, Signal

__all__ = ["Machine"]


class Machine(Protocol):
    """Decides how many attempts may be on the wire and how fast they start.

    It has no clock, no I/O and no random numbers: time comes with each signal, in steady seconds from any origin. It
    counts its own settings, the initial one not included: that count is the `epoch` of the attempts that start later.
    A setting is returned once, when it changes; None leaves it as it is.
    """

    @property
    def initial(self) -> Setting:
        """What holds before the first signal."""
        ...

    @property
    def due(self) -> float | None:
        """Steady seconds when `on_timer` wants to be called next; None: never, until another signal came."""
        ...

    def on_signal(self, signal: Signal) -> Setting | None:
        """Learn of an attempt that started or ended."""
        ...

    def on_timer(self, now: float) -> Setting | None:
        """Act on the time that passed; called at `due` or later."""
        ...
