"""What a mapper may return, and how it is subscribed."""

from __future__ import annotations

import asyncio
import inspect
from typing import TYPE_CHECKING, Any, TypeVar, cast

from reactivex import Observable

from rxllm.clock import LoopClock
from rxllm.demand import NOTHING
from rxllm.errors import ConfigError
from rxllm.stream import subscribe

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from rxllm.demand import DemandScheduler, Disposable, Observer

T = TypeVar("T")

__all__ = ["Inner", "discard", "subscribe_inner"]

type_of_inner = "an Observable or an awaitable"
Inner = Observable[T] | "Awaitable[T]"


def subscribe_inner(inner: object, observer: Observer[Any], carrier: DemandScheduler, what: str) -> Disposable:
    """Subscribe what the user's `what` returned: an observable, or a coroutine that gives one item.

    Anything else becomes `on_error` with a `ConfigError` that says what it was.
    """
    if hasattr(inner, "_start") or isinstance(inner, Observable):  # one of ours: isinstance would ask an ABC
        return subscribe(cast("Observable[Any]", inner), observer, carrier)
    if inspect.isawaitable(inner):
        return _Task.start(inner, observer, carrier)
    observer.on_error(ConfigError(f"{what} must return {type_of_inner}, got {type(inner).__name__}"))
    return NOTHING


def discard(inner: object) -> None:
    """Drop what a mapper returned without subscribing it; a coroutine is closed, so that Python does not warn."""
    if inspect.iscoroutine(inner):
        inner.close()


class _Task:
    """An awaitable as a stream of one item; disposing cancels it."""

    __slots__ = ("_disposed", "_flow", "_observer", "_task")

    def __init__(self, observer: Observer[Any], carrier: DemandScheduler, task: asyncio.Future[Any]) -> None:
        self._observer = observer
        self._flow = carrier.flow
        self._disposed = False
        self._task = task
        task.add_done_callback(self._done)
        carrier.flow.track(task)

    @classmethod
    def start(cls, awaitable: Awaitable[Any], observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        clock = carrier.clock
        if not isinstance(clock, LoopClock):
            discard(awaitable)
            observer.on_error(ConfigError(f"awaitables need an asyncio loop, and this pipeline runs on {clock!r}"))
            return NOTHING
        return cls(observer, carrier, asyncio.ensure_future(awaitable, loop=clock.loop))

    def _done(self, task: asyncio.Future[Any]) -> None:
        if self._disposed:
            if not task.cancelled():
                task.exception()  # seen: nobody waits for it any more
            return
        self._disposed = True
        try:
            if task.cancelled():
                self._observer.on_error(asyncio.InvalidStateError("the awaitable was cancelled from outside"))
                return
            error = task.exception()
            if error is None:
                self._observer.on_next(task.result())
                self._observer.on_completed()
            elif isinstance(error, Exception):
                self._observer.on_error(error)
            else:
                self._flow.fail(error)
        except BaseException as error:
            self._flow.fail(error)
            raise

    def dispose(self) -> None:
        if not self._disposed:
            self._disposed = True
            self._task.cancel()
