"""What a client is, and what all clients of a remote server have in common: a provider, a transport and a key."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

import msgspec

from rxllm.clients.keys import Censor
from rxllm.clients.reading import InOnePiece, Reading, whole
from rxllm.clients.sending import Progress, Sending, Streaming
from rxllm.clock import wall
from rxllm.errors import CallError, ConfigError
from rxllm.messages import Chunk, Reply, Request, Restarted, Secret
from rxllm.policies.headers import NOTHING as NOTHING_SAID
from rxllm.policies.headers import read_limits
from rxllm.policies.timeouts import Timeouts

if TYPE_CHECKING:
    from reactivex import Observable

    from rxllm.policies.headers import Limits
    from rxllm.policies.tokens import TokenErrors
    from rxllm.providers.base import Event, Provider
    from rxllm.transports.base import Answer, Transport

__all__ = ["Client", "Closing", "Remote"]

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


class Remote(Closing, Generic[T]):
    """A client of a remote server: base of those for each dialect, and for one of your own.

    Args:
        provider: translates requests to bytes and answers back.
        transport: moves the bytes.
        key: shown in no error, whatever the server says. None: there is none.
        spelled: what else is the key, as a login made of it.
        given: the arguments that make such a client again, for a pickle; None: it does not pickle.
    """

    typed: bool = False  # values are checked against a type, so `call` asks again for those that do not fit

    def __init__(
        self,
        provider: Provider[T],
        transport: Transport,
        key: Secret | None,
        *,
        spelled: Iterable[Secret] = (),
        given: Mapping[str, Any] | None = None,
    ) -> None:
        self._provider = provider
        self._transport = transport
        self._censor = Censor(key, *spelled)
        self._given = given

    def __repr__(self) -> str:
        return f"{type(self).__name__}(model={self._provider.model!r})"

    def __reduce__(self) -> tuple[Callable[..., Remote[T]], tuple[object, ...]]:
        """Pickle the name of the key's variable, never the key."""
        if self._given is None:
            msg = f"{self!r} holds a literal key, which must not be pickled: name its variable with api_key_env instead"
            raise ConfigError(msg)
        return _remade, (type(self), dict(self._given))

    def send(
        self,
        request: Request,
        *,
        timeouts: Timeouts = Timeouts(),  # noqa: B008  frozen
        on_chunk: Callable[[Chunk | Restarted], object] | None = None,
    ) -> Observable[Reply[T]]:
        """Return a cold observable of the reply to `request`; each subscription is one try on the wire.

        Args:
            request: what to ask.
            timeouts: of each try, phase by phase.
            on_chunk: the answer is streamed, and this called with each piece of it as it comes; first with a
                `Restarted` when a try before had shown something and broke off. What it raises ends the try. The reply
                is the same as without.

        Raises:
            ConfigError: the client is closed; in the stream: it was closed before the subscription.
        """
        self._check_open()
        if on_chunk is None:
            return Sending(self._exchange, request, timeouts)
        return Sending(partial(self._assemble, on_chunk, Progress()), request, timeouts)

    def stream(
        self,
        request: Request,
        *,
        timeouts: Timeouts = Timeouts(),  # noqa: B008  frozen
    ) -> Observable[Chunk | Restarted]:
        """Return a cold observable of the pieces of the answer; each subscription is one try on the wire.

            admitted      x
            the server     -a-b----c
            chunks         -a-b----c|

        Emits: each piece as it comes; when an earlier subscription of it had broken off, a `Restarted` before.
        Holds: the chunks of one read; without room for them nothing more is read, so the server has to wait.
        Errors: as those of `send`, `partial` has the text so far; an answer that stops without its finish reason is a
            `DecodeError`, which is transient.
        Completes: when the answer is whole.
        Dispose: closes the connection.

        Raises:
            ConfigError: the client is closed; in the stream: it was closed before the subscription.
        """
        self._check_open()
        return Streaming(self._open, request, timeouts)

    async def _exchange(self, request: Request, timeouts: Timeouts) -> Reply[T]:
        if self._closed:
            self._check_open()
        try:
            call = self._provider.encode(request)
        except CallError as error:
            error.sent = False
            raise
        try:
            status, headers, answer = await self._transport.send(call, timeouts)
        except CallError as error:
            self._judge(request, error)
            raise
        return self._decoded(request, status, headers, answer)

    async def _assemble(
        self,
        on_chunk: Callable[[Chunk | Restarted], object],
        progress: Progress,
        request: Request,
        timeouts: Timeouts,
    ) -> Reply[T]:
        restarted = progress.begin()
        if restarted is not None:
            on_chunk(restarted)
        reading = await self._open(request, timeouts)
        try:
            await reading.run(on_chunk)
        except Exception as error:
            if reading.shown:
                progress.broke(error)
            raise
        finally:
            reading.close()
        assert reading.reply is not None  # noqa: S101  for the type checkers
        return reading.reply

    async def _open(self, request: Request, timeouts: Timeouts) -> Reading[T] | InOnePiece[T]:
        self._check_open()
        try:
            call = self._provider.encode(request, stream=True)
        except CallError as error:
            error.sent = False
            raise
        try:
            answer = await self._transport.open(call, timeouts)
            status, headers = answer.status, answer.headers
            streams = 200 <= status < 300 and "json" not in headers.get("content-type", "")  # noqa: PLR2004
            body = b"" if streams else await whole(answer)
        except CallError as error:
            self._judge(request, error)
            raise
        if not streams:
            return InOnePiece(self._decoded(request, status, headers, body))
        try:
            return self._reading(request, answer)
        except BaseException:
            answer.close()
            raise

    def _reading(self, request: Request, answer: Answer) -> Reading[T]:
        provider, status, headers = self._provider, answer.status, answer.headers
        limits = read_limits(headers, wall())

        def refine(error: CallError, event: Event | None) -> CallError:
            if event is not None:
                again = provider.assembler(request, status, headers)
                error = self._censor.error(
                    error, event.data, headers, lambda data: again.feed(msgspec.structs.replace(event, data=data))
                )
            return self._judged(request, error, limits)

        def learn(reply: Reply[T]) -> None:
            provider.learn(request, reply.usage)
            if limits is not NOTHING_SAID:
                msgspec.structs.force_setattr(reply, "limits", limits)  # nobody else has it yet

        return Reading(answer, provider.assembler(request, status, headers), refine, learn, self._censor.answer)

    def _decoded(self, request: Request, status: int, headers: Mapping[str, str], body: bytes) -> Reply[T]:
        """Return the reply of a complete answer, or raise its error: without the key, with what the headers said."""
        limits = read_limits(headers, wall())
        try:
            reply = self._provider.decode(request, status, headers, self._censor.answer(body))
        except CallError as error:
            problem = error
        else:
            self._provider.learn(request, reply.usage)
            if limits is not NOTHING_SAID:
                msgspec.structs.force_setattr(reply, "limits", limits)  # nobody else has it yet
            return reply
        again = partial(self._provider.decode, request, status, headers)
        problem = self._censor.error(problem, body, headers, again)
        raise self._judged(request, problem, limits)  # outside of the except block: the first error is no context

    def _judged(self, request: Request, error: CallError, limits: Limits) -> CallError:
        self._judge(request, error)
        if limits is not NOTHING_SAID:
            error.limits = limits
        return error

    def _judge(self, request: Request, error: CallError) -> None:
        """Have nothing tried again that may have worked, if that would be paid for twice."""
        if error.transient and error.sent and not error.refusal and not self._provider.repeatable(request):
            error.transient = False
            error.add_note("not tried again: it may have worked, and would then be paid for twice")

    @property
    def model(self) -> str:
        """The model that is asked by requests that name none."""
        return self._provider.model

    def restore(self, request: Request, status: int, body: bytes) -> Reply[T]:
        """Return the reply of an answer that was kept: its status, and its body as `Reply.raw` has it.

        Raises:
            CallError: it is no good answer to `request`, or not any more.
        """
        return self._provider.decode(request, status, {}, body)

    def repeatable(self, request: Request) -> bool:
        """Say whether a second try is safe when nobody knows what became of the first."""
        return self._provider.repeatable(request)

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


def _remade(kind: Callable[..., Remote[Any]], given: dict[str, Any]) -> Remote[Any]:
    return kind(**given)
