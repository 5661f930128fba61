"""Clients: what a request is sent with. `send(request)` is a cold observable; each subscription is one try."""

from __future__ import annotations

import asyncio
import builtins
import contextvars
import functools
import inspect
import os
import threading
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar, cast, overload

import msgspec

from rxllm.clock import LoopClock, wall
from rxllm.demand import NOTHING
from rxllm.errors import (
    CallError,
    CancelledError,
    ConfigError,
    DecodeError,
    TimeoutError,
    check_callable,
    check_number,
    check_text,
)
from rxllm.messages import Reply, Request, Secret, Usage
from rxllm.policies.accounting import Accounting, accounting_of
from rxllm.policies.headers import NOTHING as NOTHING_SAID
from rxllm.policies.headers import read_limits
from rxllm.policies.timeouts import Timeouts
from rxllm.providers.base import parsed
from rxllm.providers.openai import OpenAIProvider
from rxllm.runtime import DaemonThreads
from rxllm.stream import Stream
from rxllm.transports.http import HttpTransport

if TYPE_CHECKING:
    from collections.abc import Coroutine

    from reactivex import Observable

    from rxllm.demand import DemandScheduler, Disposable, Observer
    from rxllm.policies.tokens import TokenErrors
    from rxllm.transports.base import Transport

__all__ = ["Client", "FunctionClient", "OpenAI", "function"]

T = TypeVar("T")


class Client(Protocol[T]):
    """What `call` needs of a client."""

    def send(self, request: Request, *, timeouts: Timeouts = ...) -> Observable[Reply[T]]:
        """Return a cold observable of one reply; each subscription is one try."""
        ...

    def cost(self, request: Request) -> Mapping[str, float]:
        """Return what `request` will probably use, by unit."""
        ...

    def wrap(self, item: Any) -> Request:
        """Return the request that an item which is none stands for."""
        ...


class Closing:
    """What is closed by hand or at the end of a `with` or `async with` block, and says so when used afterwards."""

    _closed = False

    def _check_open(self) -> None:
        if self._closed:
            msg = f"{self!r} is closed"
            raise ConfigError(msg)

    def close(self) -> None:
        """Refuse further use. Again is harmless."""
        self._closed = True

    async def aclose(self) -> None:
        """Close, and wait for what that takes on the running loop."""
        self.close()

    def __enter__(self) -> Self:
        """Return the client; it closes at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close."""
        self.close()

    async def __aenter__(self) -> Self:
        """Return the client; it closes at the end of the block."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close."""
        await self.aclose()


BODY = 4  # where the body is in the arguments of a CallError
OPENAI_URL = "https://api.openai.com/v1"


class OpenAI(Closing):
    """A client for OpenAI's chat completions, and for the many servers that speak the same.

    Args:
        model: the model's name, sent with each request that names none.
        base_url: the API's address.
        api_key: the key itself; such a client does not pickle.
        api_key_env: the environment variable with the key, when `api_key` is not given.
        accounting: how the server counts tokens when it admits a request, an `Accounting` or a name in
            `policies.ACCOUNTING`; None: "openai" at its own address, else "generic".
        transport: what moves the bytes; None: HTTP to `base_url`.
        count_tokens: request -> the tokens of its prompt, for a gate that counts tokens: a tokenizer of yours. It is
            called in the loop, for each try and again for some replies. What it raises or returns amiss fails that
            request. None: an estimate from the prompt's size, which replies calibrate. The output is estimated anyway.

    Raises:
        ConfigError: no key, or an argument of another kind.

    Example:
        >>> client = OpenAI(model="any", base_url="http://127.0.0.1:8000/v1", api_key="none")
        >>> client
        OpenAI(model='any', base_url='http://127.0.0.1:8000/v1')
        >>> client.close()
    """

    def __init__(
        self,
        model: str,
        base_url: str = OPENAI_URL,
        *,
        api_key: str | Secret | None = None,
        api_key_env: str = "OPENAI_API_KEY",
        transport: Transport | None = None,
        accounting: Accounting | str | None = None,
        count_tokens: Callable[[Request], float] | None = None,
    ) -> None:
        if accounting is None:
            accounting = "openai" if base_url == OPENAI_URL else "generic"
        self._provider = OpenAIProvider(model, accounting=accounting_of(accounting), count_tokens=count_tokens)
        self._base_url = base_url
        self._env = None if api_key is not None else api_key_env
        self._key = _key(api_key, api_key_env)
        self._given = transport
        self._transport = transport or HttpTransport(base_url, {"Authorization": f"Bearer {self._key.reveal()}"})

    def __repr__(self) -> str:
        return f"OpenAI(model={self._provider.model!r}, base_url={self._base_url!r})"

    def __reduce__(self) -> tuple[Callable[..., OpenAI], tuple[object, ...]]:
        """Pickle the name of the key's variable, never the key."""
        if self._env is None:
            msg = f"{self!r} holds a literal key, which must not be pickled: name its variable with api_key_env instead"
            raise ConfigError(msg)
        return _unpickled, (
            type(self),
            self._provider.model,
            self._base_url,
            self._env,
            self._given,
            self._provider.accounting,
            self._provider.count_tokens,
        )

    def send(self, request: Request, *, timeouts: Timeouts = Timeouts()) -> Observable[Reply[str]]:  # noqa: B008  frozen
        """Return a cold observable of the reply to `request`; each subscription is one try on the wire.

        Raises:
            ConfigError: the client is closed; in the stream: it was closed before the subscription.
        """
        self._check_open()
        return Sending(self._exchange, request, timeouts)

    async def _exchange(self, request: Request, timeouts: Timeouts) -> Reply[str]:
        self._check_open()
        provider = self._provider
        try:
            path, body = provider.encode(request)
        except CallError as error:
            error.sent = False
            raise
        status, headers, answer = await self._transport.post(path, body, timeouts)
        limits = read_limits(headers, wall())
        says = limits is not NOTHING_SAID
        try:
            reply = provider.decode(request, status, headers, answer)
        except CallError as error:
            problem = error
        else:
            provider.learn(request, reply.usage)
            if says:
                msgspec.structs.force_setattr(reply, "limits", limits)  # nobody else has it yet
            return reply
        if self._shows(answer, headers) or self._is_in(problem):
            problem = self._scrubbed(request, status, headers, answer)
        if says:
            problem.limits = limits
        raise problem  # outside of the except block: the first error is no context of the second

    def _shows(self, answer: bytes, headers: Mapping[str, str]) -> bool:
        """Say whether an answer has the key in it, as some servers tell which key they do not know."""
        key = self._key.reveal()
        return len(key) >= SHORTEST_KEY and (key.encode() in answer or any(key in value for value in headers.values()))

    def _is_in(self, error: CallError) -> bool:
        """Say whether an error has the key in it although the answer has not: JSON writes "/" or "&" in many ways."""
        key = self._key.reveal()
        return len(key) >= SHORTEST_KEY and any(key in part for part in error.args if isinstance(part, str))

    def _scrubbed(self, request: Request, status: int, headers: Mapping[str, str], answer: bytes) -> CallError:
        """Return the error of an answer without the key in it; from the start, as an error keeps but parts of it."""
        scrub = self._key.scrub
        try:
            self._provider.decode(request, status, headers, scrub(answer.decode(errors="replace")).encode())
        except CallError as error:
            parts: list[Any] = [scrub(part) if isinstance(part, str) else part for part in error.args]
            said = parsed(scrub(answer.decode(errors="replace")).encode())
            if self._key.reveal() in str(said):  # in a spelling of JSON's: the body keeps it, so it goes
                parts[BODY] = None
            return type(error)(*parts)
        return DecodeError("the answer cannot be understood", status)

    def cost(self, request: Request) -> Mapping[str, float]:
        """Return what `request` will probably use, by unit; from the first on, replies calibrate it.

        Raises:
            ConfigError: `count_tokens` raised something, or returned what is no number of tokens.
        """
        return self._provider.cost(request)

    def statistics(self) -> TokenErrors:
        """Return how well the estimates of tokens, or your counts of the input, have met what the replies then used."""
        return self._provider.tokens.errors()

    def wrap(self, item: Any) -> Request:
        """Return the request that a prompt stands for."""
        return self._provider.wrap(item)

    def close(self) -> None:
        """Close all connections. Again is harmless."""
        self._closed = True
        self._transport.close()

    async def aclose(self) -> None:
        """Close all connections, and wait for those of the running loop."""
        self._closed = True
        await self._transport.aclose()
        self._transport.close()


SHORTEST_KEY = 8  # characters; a shorter one is no secret but what a server without keys is given: "none", "any"


def _key(given: str | Secret | None, env: str) -> Secret:
    if isinstance(given, Secret):
        return given
    if given is not None:
        return Secret(given)
    check_text("api_key_env", env)
    found = os.environ.get(env)
    if not found:
        msg = f"no key: set the environment variable {env}, or give api_key (any text for a server that wants none)"
        raise ConfigError(msg)
    try:
        return Secret(found)
    except ConfigError as error:
        reason = str(error)
    msg = f"the environment variable {env}: {reason}"
    raise ConfigError(msg)


def _unpickled(  # noqa: PLR0917  pickles give arguments by position
    kind: Callable[..., OpenAI],
    model: str,
    base_url: str,
    env: str,
    transport: Transport | None,
    accounting: Accounting,
    count_tokens: Callable[[Request], float] | None,
) -> OpenAI:
    return kind(model, base_url, api_key_env=env, transport=transport, accounting=accounting, count_tokens=count_tokens)


class Sending(Stream[Reply[T]]):
    """A coroutine function as a cold stream of one reply."""

    def __init__(
        self,
        exchange: Callable[[Request, Timeouts], Coroutine[Any, Any, Reply[T]]],
        request: Request,
        timeouts: Timeouts,
    ) -> None:
        self.exchange = exchange
        self.request = request
        self.timeouts = timeouts

    def _start(self, observer: Observer[Reply[T]], carrier: DemandScheduler) -> Disposable:
        clock = carrier.clock
        if not isinstance(clock, LoopClock):
            observer.on_error(ConfigError(f"this client needs an asyncio loop, and the pipeline runs on {clock!r}"))
            return NOTHING
        trying = _Try(self, observer, carrier)
        trying.begin(clock.loop)
        return trying


class _Try(Generic[T]):
    """One try: a task that emits by itself, so that a reply costs no further turn of the loop."""

    __slots__ = ("_carrier", "_disposed", "_observer", "_sending", "_task")

    def __init__(self, sending: Sending[T], observer: Observer[Reply[T]], carrier: DemandScheduler) -> None:
        self._sending = sending
        self._observer = observer
        self._carrier = carrier
        self._disposed = False
        self._task: asyncio.Task[None] | None = None

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._task = task = loop.create_task(self._run())
        self._carrier.flow.track(task)

    async def _run(self) -> None:
        sending = self._sending
        failure: Exception | None = None
        reply: Reply[T] | None = None
        try:
            reply = await sending.exchange(sending.request, sending.timeouts)
        except Exception as error:
            failure = error.with_traceback(None)  # it becomes a value: what the frames hold is let go
        except asyncio.CancelledError as error:
            if self._disposed:
                return
            if self._is_cancelled():
                self._carrier.flow.fail(error)
                raise
            failure = CancelledError("what was called cancelled itself")
        except BaseException as error:  # sys.exit() in a function of the user's: it ends the run, not one request
            self._carrier.flow.fail(error)
            raise
        if self._disposed:
            return
        self._task = None  # from here on a dispose has nothing to cancel: it may come from within
        try:
            if failure is not None:
                self._disposed = True
                self._observer.on_error(failure)
                return
            assert reply is not None  # noqa: S101  for the type checkers
            self._observer.on_next(reply)
            if not self._disposed:
                self._disposed = True
                self._observer.on_completed()
        except BaseException as error:
            self._carrier.flow.fail(error)
            raise

    def _is_cancelled(self) -> bool:
        """Say whether somebody cancelled the task itself: a loop that ends, or that cancels all it has."""
        return self._task is not None and self._task.cancelling() > 0

    def dispose(self) -> None:
        self._disposed = True
        task, self._task = self._task, None
        if task is not None:
            task.cancel()


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
