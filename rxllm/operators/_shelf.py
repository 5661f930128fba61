"""The file of a cache as the loop sees it: it is read and written in threads, and nobody waits for a write."""

from __future__ import annotations

import asyncio
import contextvars
from functools import partial
from typing import TYPE_CHECKING, TypeVar

from rxllm.clock import LoopClock
from rxllm.runtime import DaemonThreads

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from rxllm.demand import DemandScheduler
    from rxllm.stores.cache import CacheFile, Kept

__all__ = ["Shelf"]

R = TypeVar("R")

MOST_WAITING = 10_000  # answers that wait for the disk
MOST_WAITING_BYTES = 64 << 20


class Shelf:
    """One use of a file by one stream. What takes long goes to a thread; in virtual time it is done at once.

    Args:
        carrier: of the stream; who closes its run waits for what is being done here.
        failed: is called with what a write could not do: an `OSError`, or the `ConfigError` of a damaged file.
        wrote: is called after each write, well done or not.
    """

    __slots__ = (
        "_carrier",
        "_failed",
        "_file",
        "_gone",
        "_threads",
        "_used",
        "_waiting",
        "_waiting_bytes",
        "_wrote",
        "kept",
        "writing",
    )

    def __init__(
        self, carrier: DemandScheduler, failed: Callable[[Exception], object], wrote: Callable[[], object]
    ) -> None:
        self._carrier = carrier
        self._failed = failed
        self._wrote = wrote
        self._threads: DaemonThreads | None = None
        self._file: CacheFile | None = None
        self._gone = False
        self._waiting: dict[bytes, Kept] = {}  # for the next write
        self._waiting_bytes = 0
        self._used: dict[bytes, None] = {}  # for the next write
        self.writing = False
        self.kept = 0  # answers written

    @property
    def is_open(self) -> bool:
        """Whether there is a file."""
        return self._file is not None

    def open(self, make: Callable[[], CacheFile], then: Callable[[Exception | None], object]) -> None:
        """Open the file with `make`, and call `then` with what that raised."""
        if isinstance(self._carrier.clock, LoopClock):
            self._threads = DaemonThreads(2, "rxllm cache")  # one looks up and one writes

        def opened(file: CacheFile | Exception) -> None:
            if isinstance(file, Exception):
                self._leave()
                then(file)
                return
            self._file = file
            if self._gone:
                self.close()
            else:
                then(None)

        self._do(make, opened)

    def find(self, keys: Collection[bytes], then: Callable[[dict[bytes, Kept] | Exception], object]) -> None:
        """Look up `keys`, and call `then` with what was found, or with what went wrong."""
        file = self._file
        assert file is not None  # noqa: S101  else nothing is looked up
        self._do(lambda: file.find(keys), then)

    def keep(self, key: bytes, kept: Kept) -> bool:
        """Have an answer written; say no if the disk is too far behind."""
        if len(self._waiting) >= MOST_WAITING or self._waiting_bytes + len(kept.body) > MOST_WAITING_BYTES:
            return False
        self._waiting[key] = kept
        self._waiting_bytes += len(kept.body)
        self.write()
        return True

    def use(self, key: bytes) -> None:
        """Have it written, with the next write, that an answer was used."""
        self._used[key] = None

    def write(self) -> None:
        """Write what waits, if nothing is being written; that goes on with what waits then."""
        if not self.writing and self._file is not None and (self._waiting or self._used):
            self.writing = True
            self._do(self._batch(self._file), self._written)

    def _batch(self, file: CacheFile) -> Callable[[], int]:
        """Return what writes all that waits, and says how many answers that were."""
        waiting, self._waiting = self._waiting, {}
        used, self._used = self._used, {}
        self._waiting_bytes = 0

        def work() -> int:
            file.write(waiting, used)
            return len(waiting)

        return work

    def _written(self, done: int | Exception) -> None:
        self.writing = False
        self._note(done)
        self.write()
        self._wrote()

    def _note(self, done: int | Exception) -> None:
        if isinstance(done, Exception):
            self._failed(done)
        else:
            self.kept += done

    def close(self, then: Callable[[], object] = lambda: None) -> None:
        """Write what waits, leave the file, and call `then`."""
        self._gone = True
        file, self._file = self._file, None
        if file is None:
            then()
            return
        write = self._batch(file)

        def work() -> int:
            try:
                return write()
            finally:
                file.close()

        def closed(done: int | Exception) -> None:
            self._note(done)
            then()

        self._do(work, closed)
        self._leave()  # now: a loop that has ended calls nothing any more; what is to be done is done

    def _leave(self) -> None:
        """Let the threads go."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False)

    def _do(self, work: Callable[[], R], then: Callable[[R | Exception], object]) -> None:
        """Do `work` in a thread, and call `then` in the loop with what it returned or raised."""
        guarded: Callable[[], R | Exception] = partial(_guarded, work)
        clock = self._carrier.clock
        if self._threads is None or not isinstance(clock, LoopClock):
            then(guarded())
            return
        done: asyncio.Future[None] = clock.loop.create_future()
        self._carrier.flow.track(done)
        context = contextvars.copy_context()  # the caller's, for what follows

        def finish(result: R | Exception) -> None:
            if not done.done():
                done.set_result(None)
            then(result)

        job = self._threads.submit(guarded)
        job.add_done_callback(lambda job: clock.post(lambda: context.run(finish, job.result())))


def _guarded(work: Callable[[], R]) -> R | Exception:
    try:
        return work()
    except Exception as error:
        return error
