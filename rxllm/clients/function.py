"""Any callable as a client."""

from __future__ import annotations

import asyncio
import builtins
import contextvars
import functools
import inspect
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, overload

import msgspec

from rxllm.clients.base import Closing
from rxllm.clients.sending import Sending
from rxllm.errors import ConfigError, DecodeError, TimeoutError, check_callable, check_number
from rxllm.messages import Reply, Request, Usage
from rxllm.policies.timeouts import Timeouts
from rxllm.runtime import DaemonThreads

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from reactivex import Observable

__all__ = ["FunctionClient", "function"]

T = TypeVar("T")


@overload
def function(
    f: Callable[[Any], Awaitable[T]],
    *,
    cost: Callable[[Request], Mapping[str, float]] | None = None,
    used: Callable[[Any], Mapping[str, float]] | None = None,
    threads: int = 64,
) -> FunctionClient[T]: ...
@overload
def function(
    f: Callable[[Any], T],
    *,
    cost: Callable[[Request], Mapping[str, float]] | None = None,
    used: Callable[[Any], Mapping[str, float]] | None = None,
    threads: int = 64,
) -> FunctionClient[T]: ...
def function(
    f: Callable[[Any], Any],
    *,
    cost: Callable[[Request], Mapping[str, float]] | None = None,
    used: Callable[[Any], Mapping[str, float]] | None = None,
    threads: int = 64,
) -> FunctionClient[Any]:
    """Make a client of any callable: its result is the reply's `value`, what it raises the request's error.

    Args:
        f: a coroutine function, a plain function (it runs in a thread), or anything callable that returns either. It
            gets the item that the pipeline got: the `Request`, or what stood in its place.
        cost: request -> what it will use, by unit, for a gate whose quotas count more than requests.
        used: result -> what it has used, by unit: the quotas are settled to that. A unit that is missing keeps what
            was reserved. A `Reply` as the result says it in its `usage`.
        threads: how many plain calls at a time, >= 1.

    Raises:
        ConfigError: an argument of another kind.

    Example:
        >>> import rxllm
        >>> lengths = rxllm.from_iterable(["a", "bb"]).pipe(rxllm.call(rxllm.function(len), ordered=True))
        >>> [outcome.value for outcome in rxllm.collect(lengths)]
        [1, 2]
    """
    return FunctionClient(f, cost=cost, used=used, threads=threads)


ITEM = "item"  # the operation of a request that stands for an item which is none


class FunctionClient(Closing, Generic[T]):
    """A callable as a client; see `function`."""

    model: str | None = None  # a function is not known by one

    def __init__(
        self,
        f: Callable[[Any], Any],
        *,
        cost: Callable[[Request], Mapping[str, float]] | None = None,
        used: Callable[[Any], Mapping[str, float]] | None = None,
        threads: int = 64,
    ) -> None:
        check_callable("f", f)
        check_callable("cost", cost, optional=True)
        check_callable("used", used, optional=True)
        check_number("threads", threads, least=1, integer=True)
        self._f = f
        self._cost = cost
        self._used = used
        self._threads = threads
        self._is_async = _is_async(f)
        self._pool: DaemonThreads | None = None
        self._lock = threading.Lock()

    def __repr__(self) -> str:
        return f"function({getattr(self._f, '__qualname__', type(self._f).__name__)})"

    def __reduce__(self) -> tuple[Callable[..., FunctionClient[Any]], tuple[Any, ...]]:
        """Pickle the function, never its threads."""
        return _refunctioned, (self._f, self._cost, self._used, self._threads)

    def send(self, request: Request, *, timeouts: Timeouts = Timeouts()) -> Observable[Reply[T]]:  # noqa: B008  frozen
        """Return a cold observable of the function's result; each subscription is one call.

        Of the timeouts only `total` counts here: there is no wire.

        Raises:
            ConfigError: the client is closed.
        """
        self._check_open()
        return Sending(self._exchange, request, timeouts)

    async def _exchange(self, request: Request, timeouts: Timeouts) -> Reply[T]:
        self._check_open()
        item = request.body if request.operation == ITEM else request
        result: Any = await (self._call(item) if timeouts.total is None else _within(self._call(item), timeouts.total))
        if isinstance(result, Reply):
            return cast("Reply[T]", result)
        usage = NO_USAGE if self._used is None else Usage(units=_amounts(self._used(result)))
        return Reply(value=result, text=result if isinstance(result, str) else "", usage=usage)

    async def _call(self, item: Any) -> Any:
        if self._is_async:
            return await self._f(item)
        call = functools.partial(_guarded, contextvars.copy_context(), self._f, item)
        result = await asyncio.get_running_loop().run_in_executor(self._executor(), call)
        return await result if inspect.isawaitable(result) else result

    def _executor(self) -> DaemonThreads:
        with self._lock:
            if self._pool is None:
                self._check_open()
                self._pool = DaemonThreads(self._threads, "rxllm function")
            return self._pool

    def cost(self, request: Request) -> Mapping[str, float]:
        """Return what `request` will use: one request, unless a function says more."""
        if self._cost is None:
            return ONE
        found = self._cost(request)
        if not isinstance(found, Mapping):
            msg = f"cost must return a mapping of units to amounts, got {found!r}"
            raise ConfigError(msg)
        return found

    def restore(self, request: Request, status: int, body: bytes) -> Reply[T]:  # noqa: ARG002  as other clients' do
        """Return the reply whose value was kept as JSON; what JSON has no word for is something else now.

        Raises:
            DecodeError: it is no JSON.
        """
        try:
            value: Any = msgspec.json.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
            reason = str(wrong)
        else:
            return Reply(value=value, text=value if isinstance(value, str) else "")
        msg = f"what was kept of {self!r} is no JSON: {reason}"
        raise DecodeError(msg, body=body)

    def wrap(self, item: Any) -> Request:
        """Return the request that stands for any item."""
        return Request(body=item, operation=ITEM)

    def close(self) -> None:
        """Refuse further calls, drop those that wait for a thread, and end each thread after the call it is in."""
        with self._lock:
            self._closed = True
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=False, cancel_futures=True)


ONE: Mapping[str, float] = {"requests": 1.0}
NO_USAGE = Usage()


def _amounts(used: object) -> dict[str, float]:
    """Return what a function of the user says of a result, checked."""
    if not isinstance(used, Mapping):
        msg = f"used must return a mapping of units to amounts, got {used!r}"
        raise ConfigError(msg)
    amounts = cast("dict[str, float]", dict(used))  # pyright: ignore[reportUnknownArgumentType]
    for unit, amount in amounts.items():
        check_number(f"used in {unit}", amount, least=0)
    return amounts


def _is_async(f: Callable[..., Any]) -> bool:
    while isinstance(f, functools.partial):
        f = f.func
    return inspect.iscoroutinefunction(f) or inspect.iscoroutinefunction(getattr(f, "__call__", None))  # noqa: B004


def _guarded(context: contextvars.Context, f: Callable[[Any], Any], item: Any) -> Any:
    try:
        return context.run(f, item)
    except StopIteration as error:  # which no future takes: the call would never end
        msg = "the function raised StopIteration"
        raise RuntimeError(msg) from error


async def _within(calling: Coroutine[Any, Any, Any], seconds: float) -> Any:
    """Wait for `calling`, at most so long; a thread that is in it goes on, and its result is dropped."""
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            return await calling
    except builtins.TimeoutError:
        if not limit.expired():
            raise  # the function's own
    msg = f"the function took longer than {seconds:g} s"
    raise TimeoutError(msg, phase="total")


def _refunctioned(f: Callable[[Any], Any], cost: Any, used: Any, threads: int) -> FunctionClient[Any]:
    return FunctionClient(f, cost=cost, used=used, threads=threads)
