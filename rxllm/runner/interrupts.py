"""Ctrl-C while a thread waits for a loop in another one."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import threading
from typing import TYPE_CHECKING, Any, Self

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable

__all__ = ["Interrupts"]

RING = b"\0"  # the number of no signal
READ = 4096  # bytes


class Interrupts:
    """A block in which Ctrl-C calls a function, instead of raising wherever the main thread is just then.

    In the main thread it takes the place of two handlers: that of Python, and that of `asyncio.run`, which would cancel
    a task whose loop stands still until the block ends. The handler of anybody else stays; if it raises
    KeyboardInterrupt while `wait` waits, that is a Ctrl-C too.
    """

    def __init__(self) -> None:
        self._action: Callable[[], object] | None = None
        self._missed = 0  # those that came when there was no action yet
        self._before: Any = None  # the handler that was there; None: it still is

    def __enter__(self) -> Self:
        """Begin."""
        if threading.current_thread() is threading.main_thread():  # signals come to no other
            before = signal.getsignal(signal.SIGINT)
            if before is signal.default_int_handler or (callable(before) and _in_loop()):
                self._before = before
                signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        """Put back what was there."""
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def wait(self, future: concurrent.futures.Future[Any], action: Callable[[], object]) -> None:
        """Wait for `future`; each Ctrl-C since the block began calls `action`, and the wait goes on."""
        self._action = action
        missed, self._missed = self._missed, 0
        for _ in range(missed):
            action()
        with _Bell() as bell:
            future.add_done_callback(bell.ring)
            while not future.done():
                try:
                    bell.wait()
                except KeyboardInterrupt:
                    action()

    def _handle(self, _number: int, _frame: object) -> None:
        if self._action is None:
            self._missed += 1
        else:
            self._action()


class _Bell:
    """What the main thread waits for: a socket that signals and other threads write to.

    A wait for a lock would miss a signal that comes in the moment before it begins, or to another thread, and on
    Windows each one.
    """

    def __init__(self) -> None:
        self._ears, self._mouth = socket.socketpair()
        self._mouth.settimeout(0)
        self._before: int | None = None  # who heard of signals before; -1: nobody

    def __enter__(self) -> Self:
        """Hear signals."""
        if threading.current_thread() is threading.main_thread():
            self._before = signal.set_wakeup_fd(self._mouth.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        if self._before is not None:
            signal.set_wakeup_fd(self._before)
        self._ears.close()
        self._mouth.close()

    def ring(self, _: object) -> None:
        """Wake the one who waits; from any thread, and afterwards too."""
        with contextlib.suppress(OSError):
            self._mouth.send(RING)

    def wait(self) -> None:
        """Wait for a ring or a signal; its handler has been called when this returns, or calls."""
        signals = self._ears.recv(READ).replace(RING, b"")
        if signals and self._before is not None and self._before >= 0:  # that of a loop which stands still meanwhile
            with contextlib.suppress(OSError):
                os.write(self._before, signals)


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
