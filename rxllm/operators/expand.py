"""Feed what comes out back in: multi-turn conversations, tool loops, pages."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from rxllm.demand import UNDEMANDED, Demand, Outlet, undemanded
from rxllm.errors import ConfigError, check_callable
from rxllm.operators._inner import discard, subscribe_inner
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from reactivex import Observable

    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["expand"]

T = TypeVar("T")


def expand(
    next: Callable[[T], Observable[T] | Awaitable[T] | None],  # noqa: A002  the word for it
) -> Callable[[Observable[T]], Observable[T]]:
    """Emit each item and then what `next` makes of it, and of that, until `next` returns None.

        source          --a|
        next(a), (b)    --b|  None
        expand(next)    --a--b|

    Emits: every item once: those of the source, then those of the streams that `next` returned. One stream runs at a
        time, the oldest first, so inside a `flat_map` the whole loop takes one place. Want the last turn only?
        `.pipe(ops.last())`.
    Holds: streams that wait for their turn, at most 1,024, and items for which the consumer has no room.
    Errors: the first error of any stream, or of `next`, at once.
    Completes: when the source and every stream have completed.
    Dispose: cancels the source and the stream that runs.

    Args:
        next: item -> the stream that follows it, or None.

    Raises:
        ConfigError: `next` is not callable; in the stream: more than 1,024 streams wait.
    """
    check_callable("next", next)

    def apply(source: Observable[T]) -> Observable[T]:
        return _Expand(source, next)

    return apply


class _Expand(Stream[T]):
    def __init__(self, source: Observable[T], successor: Callable[[T], Any]) -> None:
        self.source = source
        self.successor = successor

    def _start(self, observer: Observer[T], carrier: DemandScheduler) -> Disposable:
        expansion = _Expansion(self, observer, carrier)
        return connected(expansion, expansion.connect, self.source, carrier)


class _Expansion(Demand):
    """One subscription of expand: the observer of its source, and the demand on it."""

    __slots__ = (
        "_carrier",
        "_outlet",
        "_running",
        "_source_done",
        "_starting",
        "_successor",
        "_turns",
        "_upstream",
        "_visiting",
    )

    def __init__(self, operator: _Expand[Any], observer: Observer[Any], carrier: DemandScheduler) -> None:
        super().__init__(carrier.clock, carrier.flow)
        self._successor = operator.successor
        self._carrier = carrier.for_inner()
        self._outlet: Outlet[Any] = Outlet(observer, carrier, self._after)
        self._turns: deque[Any] = deque()  # streams that wait for their turn
        self._running: _Turn | None = None
        self._starting = False
        self._source_done = False
        self._visiting = 0  # items whose successors are not asked for yet: a consumer may end the source meanwhile
        self._upstream: Disposable | None = None

    def connect(self, source: Observable[Any], carrier: DemandScheduler) -> None:
        upstream = subscribe(source, self, carrier.with_demand(self))
        if self._source_done:
            upstream.dispose()
        else:
            self._upstream = upstream

    def room(self) -> int:
        """Return 1 while nothing runs or waits: the next item begins a loop of its own."""
        return 0 if self._running or self._turns or self._outlet.held else 1

    def on_next(self, value: Any) -> None:
        """Emit `value` and line up what follows it."""
        if self._source_done:
            return
        self.arrived += 1
        if max(len(self._turns), len(self._outlet.held)) >= UNDEMANDED:
            self.on_error(undemanded())
        else:
            self.visit(value)

    def visit(self, value: Any) -> None:
        """Emit `value`, ask for its successor, and start it if nothing runs."""
        self._visiting += 1
        try:
            self._outlet.push(value)
            if not self._outlet.stopped:
                self._line_up(value)
        finally:
            self._visiting -= 1
        self._after()

    def _line_up(self, value: Any) -> None:
        try:
            stream = self._successor(value)
        except Exception as error:
            self.on_error(error)
            return
        if stream is None:
            return
        if self._outlet.stopped:
            discard(stream)
            return
        self._turns.append(stream)
        if len(self._turns) > UNDEMANDED:
            self.on_error(
                ConfigError(f"expand has more than {UNDEMANDED:,} streams waiting: each item leads to too many others")
            )

    def _advance(self) -> None:
        """Start waiting streams, in a loop while they end at once and the consumer has taken what they emitted."""
        if self._starting or self._visiting:
            return
        self._starting = True
        try:
            while self._turns and self._running is None and not self._outlet.held and not self._outlet.stopped:
                turn = self._running = _Turn(self)
                turn.subscription = subscribe_inner(self._turns.popleft(), turn, self._carrier, "next")
                if self._running is not turn:
                    turn.dispose()
        finally:
            self._starting = False

    def ended(self) -> None:
        """Go on after a stream has completed."""
        self._running = None
        self._after()

    def _after(self) -> None:
        self._advance()
        if self._outlet.stopped:
            return
        if self._source_done and not (self._running or self._turns or self._visiting):
            self._outlet.end()
        elif self.waiting:
            self.wake()

    def on_error(self, error: Exception) -> None:
        """End with the error of the source, of a stream or of the user's function."""
        if not self._outlet.stopped:
            self._release()
            self._outlet.fail(error)

    def on_completed(self) -> None:
        """End when nothing runs or waits any more."""
        if not self._source_done:
            self._source_done = True
            self._after()

    def _release(self) -> None:
        self._source_done = True
        self._turns.clear()
        running, self._running = self._running, None
        if running is not None:
            running.dispose()
        if self._upstream is not None:
            self._upstream.dispose()
            self._upstream = None

    def dispose(self) -> None:
        self._outlet.dispose()
        self._release()


class _Turn:
    """The observer of one stream that `next` returned."""

    __slots__ = ("_expansion", "subscription")

    def __init__(self, expansion: _Expansion) -> None:
        self._expansion: _Expansion | None = expansion
        self.subscription: Disposable | None = None

    def on_next(self, value: Any) -> None:
        if self._expansion is not None:
            self._expansion.visit(value)

    def on_error(self, error: Exception) -> None:
        expansion, self._expansion = self._expansion, None
        if expansion is not None:
            expansion.on_error(error)

    def on_completed(self) -> None:
        expansion, self._expansion = self._expansion, None
        if expansion is not None:
            expansion.ended()

    def dispose(self) -> None:
        self._expansion = None
        if self.subscription is not None:
            self.subscription.dispose()
