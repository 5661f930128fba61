"""Say what happens to the items of a source that cannot wait."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from rxllm.demand import Outlet
from rxllm.errors import ConfigError, check_choice, check_number
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections import deque
    from collections.abc import Callable

    from reactivex import Observable

    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["overflow"]

T = TypeVar("T")
Policy = Literal["error", "drop_oldest", "drop_newest", "buffer"]
POLICIES: tuple[Policy, ...] = ("error", "drop_oldest", "drop_newest", "buffer")
_log = logging.getLogger("rxllm.overflow")


def overflow(policy: Policy, n: int | None = None) -> Callable[[Observable[T]], Observable[T]]:
    """Queue the items of a source that cannot wait (a Subject, a socket), and say what happens when it is full.

        source                        -abcde------
        room                          ------x-x-x-
        overflow("drop_oldest", 2)    ------d-e---

    Emits: the items that were not dropped, in order, as the consumer has room.
    Holds: at most `n` items; with "buffer" any number.
    Errors: those of the source, after what is held is passed on; with "error" a `ConfigError` at the first item too
        many.
    Completes: with the source, after what is held is passed on.
    Dispose: cancels the source.

    Args:
        policy: "error", "drop_oldest", "drop_newest", or "buffer" (no bound: memory is the limit). The first drop is
            logged.
        n: items to hold, >= 1. Default 1,024; not with "buffer".

    Raises:
        ConfigError: an argument out of range.
    """
    check_choice("policy", policy, POLICIES)
    n = _limit(policy, n)

    def apply(source: Observable[T]) -> Observable[T]:
        return _Overflow(source, policy, n)

    return apply


def _limit(policy: Policy, n: int | None) -> int | None:
    if policy == "buffer":
        if n is not None:
            msg = f'n must not be given with policy "buffer", which has no bound, got {n!r}'
            raise ConfigError(msg)
        return None
    check_number("n", n, least=1, integer=True, optional=True)
    return 1_024 if n is None else n


def make_room(held: deque[Any], policy: Policy, n: int | None) -> bool:
    """Apply `policy` to a queue that is about to take an item: say whether the item goes in.

    Raises:
        ConfigError: the queue is full and the policy is "error".
    """
    if n is None or len(held) < n:
        return True
    if policy == "drop_oldest":
        held.popleft()
        return True
    if policy == "drop_newest":
        return False
    msg = f"{n:,} items wait and another one came: the consumer is too slow; raise n, or choose another policy"
    raise ConfigError(msg)


class _Overflow(Stream[Any]):
    def __init__(self, source: Observable[Any], policy: Policy, n: int | None) -> None:
        self.source = source
        self.policy: Policy = policy
        self.n = n

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        queue = _Queue(self, observer, carrier)
        return connected(queue, queue.connect, self.source, carrier)


class _Queue:
    """One subscription of overflow."""

    __slots__ = ("_dropped", "_n", "_outlet", "_policy", "done", "upstream")

    def __init__(self, operator: _Overflow, observer: Observer[Any], carrier: DemandScheduler) -> None:
        self._policy: Policy = operator.policy
        self._n = operator.n
        self._outlet: Outlet[Any] = Outlet(observer, carrier)
        self._dropped = 0
        self.done = False
        self.upstream: Disposable | None = None

    def connect(self, source: Observable[Any], carrier: DemandScheduler) -> None:
        upstream = subscribe(source, self, carrier)
        if self.done:
            upstream.dispose()
        else:
            self.upstream = upstream

    def on_next(self, value: Any) -> None:
        if self.done:
            return
        held = self._outlet.held
        before = len(held)
        try:
            goes_in = make_room(held, self._policy, self._n)
        except ConfigError as error:
            self.done = True
            self._release()
            self._outlet.end(error)
            return
        if not goes_in or len(held) < before:
            self._dropped += 1
            if self._dropped == 1:
                _log.warning(
                    "overflow drops items (%s, n=%s): the consumer is slower than the source", self._policy, self._n
                )
        if goes_in:
            self._outlet.push(value)

    def on_error(self, error: Exception) -> None:
        if not self.done:
            self.done = True
            self._outlet.end(error)

    def on_completed(self) -> None:
        if not self.done:
            self.done = True
            self._outlet.end()

    def dispose(self) -> None:
        self.done = True
        self._outlet.dispose()
        self._release()

    def _release(self) -> None:
        if self.upstream is not None:
            self.upstream.dispose()
            self.upstream = None
