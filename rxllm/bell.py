"""What threads wait for that are no loop's: somebody else rings, and in the main thread signals do too."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import socket
import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Bell"]

RING = b"\0"  # the number of no signal
READ = 4096  # bytes


class Bell:
    """Wakes the threads that wait for it; the main thread also wakes when a signal has come, at whatever moment.

    A wait for a lock misses a signal that comes in the moment before it begins, or to another thread, and on Windows
    each one. So the main thread waits for a socket, to which signals write as well. They come to no other thread: the
    others wait for a queue, which costs less.
    """

    __slots__ = ("_mouth", "_others", "_strokes")

    def __init__(self) -> None:
        self._mouth: socket.socket | None = None  # while the main thread waits
        self._others = 0  # threads that wait
        self._strokes: queue.SimpleQueue[None] = queue.SimpleQueue()

    def ring(self) -> None:
        """Wake all that wait; from any thread."""
        mouth = self._mouth
        if mouth is not None:
            with contextlib.suppress(OSError):  # it is full, and so heard
                mouth.send(RING)
        for _ in range(self._others):
            self._strokes.put(None)

    def wait(self, is_there: Callable[[], bool], timeout: float | None = None) -> None:
        """Wait until it rings or, in the main thread, a signal comes; at once if what is waited for is there.

        It may also return for nothing: look again. The handlers of signals have been called by then, and what they
        raise comes from here.

        Args:
            is_there: asked when a ring would be heard already.
            timeout: seconds, > 0; None: any time.
        """
        if threading.get_ident() == threading.main_thread().ident:
            self._wait_with_signals(is_there, timeout)
            return
        self._others += 1
        try:
            if not is_there():
                with contextlib.suppress(queue.Empty):
                    self._strokes.get(timeout=timeout)
        finally:
            self._others -= 1

    def _wait_with_signals(self, is_there: Callable[[], bool], timeout: float | None) -> None:
        # Each wait has its own: a handler of a signal may wait inside of this one, which goes on by the signal's byte.
        ends = _free.pop() if _free else _Ends()
        outer, self._mouth = self._mouth, ends.mouth
        heard, before = b"", -1
        try:
            before = signal.set_wakeup_fd(ends.number, warn_on_full_buffer=False)
            try:
                if not is_there():
                    heard = ends.hear(timeout)
            finally:
                signal.set_wakeup_fd(before)
        finally:
            self._mouth = outer
            _free.append(ends)
        if before not in {-1, ends.number}:  # that of a loop which stands still meanwhile: it heeds signals by these
            heard = (heard + ends.hear(0)).replace(RING, b"")
            if heard:
                with contextlib.suppress(OSError):
                    os.write(before, heard)


class _Ends:
    """Two sockets: who writes to the mouth wakes who listens."""

    __slots__ = ("_ears", "mouth", "number")

    def __init__(self) -> None:
        self._ears, self.mouth = socket.socketpair()
        self.mouth.settimeout(0)
        self.number = self.mouth.fileno()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError):  # Ctrl-C came while they were made
            self._ears.close()
            self.mouth.close()

    def hear(self, timeout: float | None) -> bytes:
        """Return what has been written; wait for it, at most `timeout` seconds."""
        self._ears.settimeout(timeout)
        with contextlib.suppress(BlockingIOError, TimeoutError):
            return self._ears.recv(READ)
        return b""


_free: list[_Ends] = []  # as many as there ever were waits at a time: seldom more than one
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free.clear)  # who writes to those would wake the parent
