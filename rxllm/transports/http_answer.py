"""An answer in pieces, over a connection that waits while nobody reads."""

from __future__ import annotations

import asyncio
import contextvars
import functools
from typing import TYPE_CHECKING, Any, cast

import aiohttp

from rxllm.errors import CallError, CancelledError
from rxllm.transports.connections import Wire, drop
from rxllm.transports.http_errors import broken, late, too_large, unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from aiohttp.connector import Connection as Held

    from rxllm.clock import Alarm, Handle
    from rxllm.errors import Phase
    from rxllm.policies.timeouts import Timeouts
    from rxllm.transports.connections import Pool

__all__ = ["BUFFER", "HttpAnswer"]

BUFFER = 32 << 10  # bytes; the socket is paused when there are more than twice as many
DRAIN = 1.0  # seconds that the last bytes of a message may take which is not needed any more
CUT_SHORT = 400  # from this status on, the answer is an error, and what there is of it is better than nothing


class Body(aiohttp.StreamReader):
    """The body of an answer, which can be handed on as it comes.

    aiohttp's parser makes its own kind, and no hook says of what class; so that one becomes one of these, by its class.
    That needs the same layout, hence no attribute of its own: who takes the pieces is an attribute of the connection.
    """

    __slots__ = ()
    _cursor: int
    _protocol: Wire

    def feed_data(self, data: bytes, size: int = 0) -> bool:
        """Hand a piece on, or keep it."""
        sink = self._protocol.sink
        if sink is not None and data and sink.take(data):
            self.total_bytes += len(data)
            self._cursor += len(data)
            return False
        return super().feed_data(data, size)

    def feed_eof(self) -> None:
        """End."""
        super().feed_eof()
        self._wake()

    def set_exception(self, *args: Any, **kwargs: Any) -> None:
        """Break off."""
        super().set_exception(*args, **kwargs)
        self._wake()

    def _wake(self) -> None:
        sink = self._protocol.sink
        if sink is not None:
            sink.wake()

    def end_http_chunk_receiving(self) -> None:
        """Note where a chunk of HTTP ends, if it was kept: too many of them pause the socket, however small."""
        if self._protocol.sink is None:
            super().end_http_chunk_receiving()


class HttpAnswer:
    """See `rxllm.transports.base.Answer`.

    Both clocks run only while `read` waits: that is noted, and one timer for each answer looks at the notes. So a
    reader who takes his time uses up neither, and a read costs no timer.

    Args:
        pool: of the connection.
        held: the connection; from now on the answer's.
        message: the head, of aiohttp's `RawResponseMessage`.
        payload: the body.
        timeouts: `idle` and `total` count here.
        waited: seconds of `total` that have passed.
    """

    __slots__ = (
        "__weakref__",
        "_expired",
        "_give",
        "_held",
        "_linger",
        "_most",
        "_over",
        "_payload",
        "_pool",
        "_problem",
        "_raised",
        "_since",
        "_size",
        "_timeouts",
        "_timer",
        "_waited",
        "headers",
        "status",
    )

    def __init__(
        self,
        pool: Pool,
        held: Held,
        message: Any,
        payload: aiohttp.StreamReader,
        *,
        timeouts: Timeouts,
        waited: float,
    ) -> None:
        self.status: int = message.code
        self.headers: Mapping[str, str] = message.headers
        self._pool = pool
        self._held: Held | None = held
        self._payload = payload
        if type(payload) is aiohttp.StreamReader:
            payload.__class__ = Body
        self._timeouts = timeouts
        self._waited = waited
        self._most = pool.route.connection.body_bytes
        self._size = 0  # what was read
        self._since: float | None = None  # when the read began that waits
        self._timer: Handle | None = None
        self._linger: Alarm | None = None
        self._expired: Phase | None = None
        self._problem: CallError | None = None  # what every further read raises
        self._give: Callable[[bytes], object] | None = None  # where pieces go that nobody reads
        self._over: asyncio.Future[bool] | None = None  # done when no more of them are to go there
        self._raised: BaseException | None = None  # what that has raised

    def __repr__(self) -> str:
        return f"<HttpAnswer {self.status} of {self._pool.route.where}>"

    async def read(self) -> bytes:
        """Return the next piece as it comes; nothing at the end. One reader at a time.

        Raises:
            TimeoutError: `idle` or `total`.
            DecodeError: the answer is cut short, or too large.
            CancelledError: the answer or the transport was closed.
        """
        if self._problem is not None:
            raise self._problem
        if self._held is None:
            return b""
        payload = self._payload
        try:
            if self._size == payload.total_bytes and not payload.is_eof():
                self._wait()
            piece = await payload.readany()
        except Exception as error:
            piece = self._left()
            if not piece:
                self._problem = self._fault(error)
        except BaseException:  # the task is cancelled
            self.close()
            raise
        finally:
            self._rest()
        self._size += len(piece)
        if self._size > self._most:
            self._problem = too_large(self._most, self.status)
        if self._problem is None and piece:
            return piece
        self._finish()
        if self._problem is not None:
            raise self._problem  # outside of the except block: what was caught there is no context of it
        return b""

    async def pour(self, take: Callable[[bytes], object]) -> bool:
        """Give each piece to `take` as it comes, until that returns something true.

        It is called from where the socket is read, in a copy of the caller's context: to wake a task for each piece
        costs more than most pieces. What it raises, this raises.

        Returns:
            Whether there may be more: False at the end.

        Raises:
            CallError: as those of `read`.
        """
        while True:
            held, payload = self._held, self._payload
            if self._problem is None and held is not None and self._size == payload.total_bytes:
                wire = cast("Wire", held.protocol)
                if wire.connected and isinstance(payload, Body) and not payload.is_eof() and not payload.exception():
                    if await self._poured(wire, take):
                        return True
                    continue
            piece = await self.read()  # there is something, or an end
            if not piece:
                return False
            if take(piece):
                return True

    async def _poured(self, wire: Wire, take: Callable[[bytes], object]) -> bool:
        """Wait until `take` has had enough, or there is an end of some kind; say whether it has."""
        over: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        inside: Any = contextvars.copy_context().run
        self._over = over
        self._give = functools.partial(inside, take)
        self._wait()
        wire.sink = self
        try:
            await over
        except BaseException:  # the task is cancelled
            self.close()
            raise
        finally:
            wire.sink = None
            self._give = None
            self._rest()
        error, self._raised = self._raised, None
        if error is not None:
            raise error
        if self._problem is not None:
            self._finish()
        return over.result()

    def take(self, piece: bytes) -> bool:
        """Give a piece to whom it is poured to; see `Sink`."""
        give, over = self._give, self._over
        if give is None or over is None or over.done():  # it has had enough, or its task is cancelled
            return False
        self._rest()
        self._size += len(piece)
        if self._size > self._most:
            self._problem = too_large(self._most, self.status)
            over.set_result(False)
            return True
        try:
            enough = give(piece)
        except BaseException as error:  # it goes through the task, as all that ends a call
            self._raised = error
            enough = True
        if enough:
            if not over.done():
                over.set_result(True)
        else:
            self._since = self._pool.clock.seconds()
        return True

    def wake(self) -> None:
        """Pour no more; see `Sink`."""
        if self._over is not None and not self._over.done():
            self._over.set_result(False)

    def _left(self) -> bytes:
        """Return what came before the connection broke: aiohttp would raise first."""
        if self._payload.total_bytes == self._size or self._expired is not None:
            return b""
        return self._payload._read_nowait(-1)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]

    def _fault(self, error: Exception) -> CallError | None:
        """Return what to raise for what aiohttp raised; None: what came is all of the answer there is."""
        where = self._pool.route.where
        if self._expired is not None:
            return late(where, self._expired, self._timeouts, sent=True)
        if self._problem is not None:  # it was closed
            return self._problem
        if self._pool.connector.closed:
            return CancelledError("the client was closed during the call")
        if isinstance(error, aiohttp.ClientPayloadError | aiohttp.http.HttpProcessingError):
            return unreadable(where, self.status, error) if self.status < CUT_SHORT else None
        return broken(where, heard=True)

    # the clocks

    def _wait(self) -> None:
        """Note that a read begins to wait."""
        self._since = self._pool.clock.seconds()
        if self._timer is None:
            self._look(self._since)

    def _rest(self) -> None:
        """Note that it waits no more."""
        if self._since is not None:
            if self._timeouts.total is not None:
                self._waited += self._pool.clock.seconds() - self._since
            self._since = None

    def _look(self, now: float) -> None:
        """See whether a clock has run out; if not, look again when one may have."""
        assert self._since is not None  # noqa: S101  for the type checkers
        idle, total = self._timeouts.idle, self._timeouts.total
        due: float | None = None
        phase: Phase = "idle"
        if idle is not None:
            due = self._since + idle
        if total is not None:
            end = self._since + total - self._waited
            if due is None or end < due:
                due, phase = end, "total"
        if due is None:
            return
        if now < due:
            self._timer = self._pool.clock.call_later(due - now, self._ring)
            return
        self._expired = phase
        self._payload.set_exception(TimeoutError())

    def _ring(self) -> None:
        self._timer = None
        if self._since is not None:  # else the next read that waits begins anew
            self._look(self._pool.clock.seconds())

    # the end

    def _finish(self) -> None:
        """Let the connection go: it is kept if all of the message has come."""
        held, self._held = self._held, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if held is None:
            return
        if self._payload.is_eof():
            cast("Wire", held.protocol).heard = False
            held.release()
        else:
            drop(held)

    def close(self, *, drain: bool = False) -> None:
        """Give it up; see `rxllm.transports.base.Answer`."""
        if self._held is None or self._linger is not None:
            return
        payload = self._payload
        if not payload.at_eof() and self._problem is None:
            self._problem = CancelledError("the answer was closed before its end")
        if drain and not payload.is_eof() and payload.exception() is None:
            self._pool.abandoned.add(self)
            self._linger = self._pool.start(DRAIN, self.give_up)
            payload.on_eof(self._drained)
        else:
            self._finish()

    def _drained(self) -> None:
        """Keep the connection, once the parser that calls this has seen whether more than the answer came."""
        self._pool.clock.call_soon(self.give_up)

    def give_up(self) -> None:
        """Wait no longer for the end of what nobody reads."""
        self._pool.abandoned.discard(self)
        if self._linger is not None:
            self._linger.cancel()
        self._finish()
