"""Drive a controller with the signals of attempts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rxllm.errors import ConfigError
from rxllm.feedback import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from reactivex import Observable

    from rxllm.messages import Setting, Signal
    from rxllm.policies.control import Machine

__all__ = ["feedback"]


def feedback(machine: Machine) -> Callable[[Observable[Signal]], Observable[Setting]]:
    """Turn signals into settings: a machine as a controller, to put stock operators around it.

        signals             -s-s-s---s---|
        feedback(machine)   S--S-----S---|

    Emits: its initial setting at once, then each change: at a signal, or when the machine's time has come.
    Holds: nothing.
    Errors: those of the signals, and what the machine raises.
    Completes: with the signals.
    Dispose: cancels the signals and the timer.

    `Gate(concurrency=machine)` closes the loop, with the machine itself or with any operator of this kind.

    Args:
        machine: decides; it keeps what it knows from one subscription to the next.

    Raises:
        ConfigError: it is no machine.
    """
    if not hasattr(machine, "on_signal") or not hasattr(machine, "on_timer"):
        msg = f"machine must have on_signal and on_timer, as those of rxllm.policies have, got {machine!r}"
        raise ConfigError(msg)
    return lambda signals: Settings(signals, machine)
