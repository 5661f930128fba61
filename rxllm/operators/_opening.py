"""A file that takes long to open: a thread does it, while the loop goes on."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from rxllm.clock import LoopClock

if TYPE_CHECKING:
    from collections.abc import Callable

    from rxllm.demand import DemandScheduler

__all__ = ["Opening"]


class Closable(Protocol):
    def close(self) -> None: ...


F = TypeVar("F", bound=Closable)


class Opening(Generic[F]):
    """The way of a file from the thread that opens it to the loop that uses it; who leaves meanwhile leaves none open.

    Args:
        make: opens the file; it may raise. It is given a function that says whether to go on.
        carrier: of the stream; who closes its run waits for the thread.
        then: is called on the loop with the file or the error, in the context of now; never after `leave`.
    """

    __slots__ = ("_left", "_make", "_then")

    def __init__(
        self,
        make: Callable[[Callable[[], bool]], F],
        carrier: DemandScheduler,
        then: Callable[[F | Exception], object],
        *,
        apart: bool,
    ) -> None:
        self._make = make
        self._then = then
        self._left = False
        clock = carrier.clock
        if not apart or not isinstance(clock, LoopClock):
            then(self._opened())
            return
        done: asyncio.Future[None] = clock.loop.create_future()
        carrier.flow.track(done)
        context = contextvars.copy_context()  # the caller's, for what follows

        def run() -> None:
            opened = self._opened()
            taken = threading.Event()

            def take() -> None:
                taken.set()
                if not done.done():
                    done.set_result(None)
                self._take(opened)

            clock.post(lambda: context.run(take))
            if clock.is_over() and not taken.is_set():
                _close(opened)

        threading.Thread(target=run, name="rxllm journal", daemon=True).start()

    def leave(self) -> None:
        """Want the file no more."""
        self._left = True

    def _opened(self) -> F | Exception:
        try:
            return self._make(lambda: not self._left)
        except Exception as error:
            return error

    def _take(self, opened: F | Exception) -> None:
        if self._left:
            _close(opened)
        else:
            self._then(opened)


def _close(opened: Closable | Exception) -> None:
    if not isinstance(opened, Exception):
        opened.close()
