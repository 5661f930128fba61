"""Ctrl-C while a thread waits for a loop in another one."""

from __future__ import annotations

import asyncio
import signal
import threading
from typing import TYPE_CHECKING, Any, Self

from rxllm.bell import Bell

if TYPE_CHECKING:
    import concurrent.futures
    from collections.abc import Callable

__all__ = ["Interrupts"]


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
        bell = Bell()
        future.add_done_callback(lambda _: bell.ring())
        while not future.done():
            try:
                bell.wait(future.done)
            except KeyboardInterrupt:
                action()

    def _handle(self, _number: int, _frame: object) -> None:
        if self._action is None:
            self._missed += 1
        else:
            self._action()


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
