"""OpenAI's dialect, as many servers speak it: chat completions."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, cast

import msgspec

from rxllm import clock, errors
from rxllm.errors import (
    CallError,
    ConfigError,
    InvalidRequestError,
    UnsupportedError,
    check_callable,
    check_number,
    check_text,
)
from rxllm.messages import Reply, Request, Usage, chat
from rxllm.policies.accounting import GENERIC, Accounting
from rxllm.policies.tokens import TokenEstimator
from rxllm.providers.base import Call, error_of, parsed, said_in, unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

__all__ = ["OpenAIProvider"]

FIRST = 256  # replies that the estimates of tokens learn from, each
SOME = 8  # afterwards one in so many
OPERATIONS = {"chat": "/chat/completions"}

# Where `error.code` or `error.type` says more than the status: waiting fills no balance, and shrinks no request.
KINDS: dict[tuple[int, str], type[CallError]] = {
    (400, "context_length_exceeded"): errors.ContextOverflowError,
    (503, "server_is_overloaded"): errors.OverloadedError,
    (503, "slow_down"): errors.OverloadedError,
    **{
        (429, code): errors.BillingError
        for code in (
            "credit_balance_exhausted",
            "insufficient_quota",
            "organization_spend_limit_exceeded",
            "organization_usage_limit_exceeded",
            "project_spend_limit_exceeded",
        )
    },
}
TOO_LARGE = "Request too large"  # how the message of a 429 begins that no waiting helps


class _Details(msgspec.Struct):
    cached_tokens: int | None = None
    reasoning_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    completion_tokens_details: _Details | None = None


class _Message(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    message: _Message
    finish_reason: str | None = None


class _Completion(msgspec.Struct):
    """The envelope of an answer; what else is in it stays in `reply.raw` until somebody asks for it."""

    choices: list[_Choice]
    id: str | None = None
    model: str | None = None
    usage: _Usage | None = None


_decoder = msgspec.json.Decoder(_Completion)
_encoder = msgspec.json.Encoder()


class OpenAIProvider:
    """Chat completions. The request's body goes as it is, with the model added unless it names one.

    Args:
        model: the model's name.
        accounting: how the server counts tokens when it admits a request.
        count_tokens: request -> the tokens of its prompt; None: an estimate from its size, which replies calibrate.

    Raises:
        ConfigError: the model is not a text, or `count_tokens` not callable.
    """

    def __init__(
        self,
        model: str,
        *,
        accounting: Accounting = GENERIC,
        count_tokens: Callable[[Request], float] | None = None,
    ) -> None:
        check_text("model", model)
        check_callable("count_tokens", count_tokens, optional=True)
        self.model = model
        self.accounting = accounting
        self.count_tokens = count_tokens
        self.tokens = TokenEstimator() if count_tokens is None else _OutputEstimator()
        self._priced = False  # somebody asks for costs, so it pays to learn
        self._replies = 0

    def encode(self, request: Request) -> Call:
        """Return the call of `request`; see `Provider`."""
        path = OPERATIONS.get(request.operation)
        if path is None:
            msg = f"operation must be one of {', '.join(OPERATIONS)}, got {request.operation!r}"
            raise UnsupportedError(msg)
        body: object = request.body
        if not isinstance(body, dict):
            msg = f"the body of a chat request must be a dict, got {type(body).__name__}"
            raise InvalidRequestError(msg)
        fields = cast("dict[str, Any]", body)
        if fields.get("stream"):
            msg = "stream: answers come in one piece here, so leave it out"
            raise UnsupportedError(msg)
        try:
            data = _encoder.encode({"model": self.model, **fields})
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            msg = f"the body cannot be sent as JSON: {error}"
            raise InvalidRequestError(msg) from None
        if b"null" in data and (place := _not_finite(fields)):  # of NaN and infinity JSON makes null: the default
            msg = f"the body cannot be sent as JSON: {place} is no finite number"
            raise InvalidRequestError(msg)
        return Call(path, data)

    def decode(self, request: Request, status: int, headers: Mapping[str, str], body: bytes) -> Reply[str]:  # noqa: ARG002
        """Return the reply of a complete answer; see `Provider`."""
        if not 200 <= status < 300:  # noqa: PLR2004
            raise _error(status, headers, body, parsed(body))
        try:
            completion = _decoder.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            reason = str(error)
        else:
            if completion.choices:
                choice = completion.choices[0]
                text = choice.message.content or ""
                return Reply(
                    value=text,
                    text=text,
                    usage=_usage(completion.usage),
                    model=completion.model,
                    id=completion.id,
                    finish_reason=choice.finish_reason,
                    status=status,
                    raw=body,
                )
            reason = "it has no choices"
        return _tolerant(status, headers, body, reason)

    def cost(self, request: Request) -> dict[str, float]:
        """Return an estimate from the size of the prompt and the tokens that the answer may have.

        Raises:
            ConfigError: `count_tokens` raised something, or returned what is no number of tokens.
        """
        self._priced = True
        model, size, limit, answers = self._measure(request)
        inputs, outputs = self.tokens.estimate(model, request.operation, size, limit)
        most = None if limit is None else limit * answers
        return self.accounting.costs(max(1.0, inputs), max(1.0, outputs * answers), max_tokens=most)

    def learn(self, request: Request, usage: Usage) -> None:
        """Learn from what a request really used; from each of the first replies, then from some."""
        if not self._priced or not usage.total_tokens:
            return
        self._replies += 1
        if self._replies > FIRST and self._replies % SOME:
            return
        try:
            model, size, limit, answers = self._measure(request)
        except ConfigError:  # of the user's function: the answer is there and paid for, and the next cost says it
            return
        self.tokens.learn(
            model,
            request.operation,
            size,
            limit,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens / answers,
        )

    def _measure(self, request: Request) -> tuple[str, float, int | None, int]:
        """Return model, size of the prompt, the most output tokens if it says so, and how many answers it wants."""
        body = _fields(request.body)
        limit = _count(body.get("max_completion_tokens")) or _count(body.get("max_tokens")) or None
        size = _length(body.get("messages")) if self.count_tokens is None else _counted(self.count_tokens, request)
        return str(body.get("model", self.model)), size, limit, _count(body.get("n")) or 1

    def wrap(self, item: object) -> Request:
        """Return the chat request of a prompt."""
        if isinstance(item, str):
            return chat(item)
        msg = f"expected a Request or a prompt (str), got {type(item).__name__}"
        raise InvalidRequestError(msg)


class _OutputEstimator(TokenEstimator):
    """Estimates of the output alone: the size of a prompt is its tokens, which somebody has counted."""

    __slots__ = ()

    def estimate(self, model: str, kind: str, characters: float, max_tokens: float | None) -> tuple[float, float]:
        """Return the input tokens as they are, and an estimate of the output."""
        return characters, super().estimate(model, kind, characters, max_tokens)[1]


def _counted(count: Callable[[Request], float], request: Request) -> float:
    """Return what the user's function says.

    Raises:
        ConfigError: it raised something, or returned what is no number of tokens.
    """
    try:
        tokens = count(request)
    except Exception as error:
        problem = f"raised {type(error).__name__}: {error}"
    else:
        if not inspect.iscoroutine(tokens):
            check_number("what count_tokens returns", tokens, least=0)
            return tokens
        tokens.close()
        problem = "must be a plain function, and it is async"
    msg = f"count_tokens {problem}"  # outside of the except block: the first error, and its frames, are no context
    raise ConfigError(msg)


def _error(status: int, headers: Mapping[str, str], body: bytes, said: Any) -> CallError:
    """Return the error of an answer that is none."""
    kind: type[CallError] | None = None
    if status in {400, 429, 503}:
        fault = _fields(_fields(said).get("error"))
        for key in ("code", "type"):
            kind = kind or KINDS.get((status, str(fault.get(key))))
        if status == 429 and (said_in(said) or "").startswith(TOO_LARGE):  # noqa: PLR2004
            kind = InvalidRequestError
    return error_of(status, headers, body, now=clock.wall(), kind=kind)


def _tolerant(status: int, headers: Mapping[str, str], body: bytes, reason: str) -> Reply[str]:
    """Return the reply of an answer that is not as it should be, if it has a text: it has been paid for.

    Raises:
        CallError: it has none; an error that came as if all were well is the error of its own code.
    """
    said = _fields(parsed(body))
    choices: Any = said.get("choices")
    choice = _fields(cast("list[Any]", choices)[0]) if isinstance(choices, list) and choices else {}
    message: Any = choice.get("message")
    if isinstance(message, dict):
        text = _text(cast("dict[str, Any]", message).get("content"))
        if text is not None:
            return Reply(
                value=text,
                text=text,
                usage=_tolerant_usage(said.get("usage")),
                model=_name(said.get("model")),
                id=_name(said.get("id")),
                finish_reason=_name(choice.get("finish_reason")),
                status=status,
                raw=body,
            )
    if not choices and said.get("error"):
        code: Any = _fields(said["error"]).get("code")
        if type(code) is int and 400 <= code < 600:  # noqa: PLR2004
            raise _error(code, headers, body, said)
        reason = f"it is an error: {said_in(said) or 'without a message'}"
    raise unreadable(status, headers, body, reason)


def _fields(value: object) -> dict[str, Any]:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _name(value: object) -> str | None:
    """Return a name that some servers give as a number."""
    return None if value is None or isinstance(value, dict | list) else str(value)


def _text(content: object) -> str | None:
    """Return the text of an answer's content: a text, a list of parts, or nothing (it calls a tool)."""
    if content is None:
        return ""
    if isinstance(content, list):
        texts = [_fields(part).get("text") for part in cast("list[Any]", content)]
        return "".join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else None


def _length(messages: object) -> int:
    """Return the size in bytes of messages, whose content is a text or a list of parts."""
    if not isinstance(messages, list | tuple):
        return 0
    total = 0
    for message in cast("list[Any]", messages):
        content: Any = cast("dict[str, Any]", message).get("content") if isinstance(message, dict) else None
        text = content if isinstance(content, str) else _text(content) or ""
        total += len(text) if text.isascii() else len(text.encode(errors="replace"))
    return total


def _count(value: object) -> int:
    """Return a number of tokens or answers; 0 for what is none: the server will say what it thinks of that."""
    return value if isinstance(value, int) and value > 0 else 0


def _not_finite(value: object, place: str = "body") -> str | None:
    """Return where in a body there is a number that JSON does not have."""
    if isinstance(value, float):
        return None if math.isfinite(value) else place
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = cast("dict[Any, Any]", value).items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(cast("list[Any]", value))
    return next((found for key, item in pairs if (found := _not_finite(item, f"{place}[{key!r}]"))), None)


def _usage(said: _Usage | None) -> Usage:
    if said is None:
        return NO_USAGE
    cached = said.prompt_tokens_details.cached_tokens if said.prompt_tokens_details else 0
    reasoning = said.completion_tokens_details.reasoning_tokens if said.completion_tokens_details else 0
    try:
        return Usage(
            input_tokens=said.prompt_tokens or 0,
            output_tokens=said.completion_tokens or 0,
            cached_tokens=cached or 0,
            reasoning_tokens=reasoning or 0,
        )
    except ConfigError:
        return NO_USAGE  # a server may say anything; what it says is in reply.raw


def _tolerant_usage(said: object) -> Usage:
    fields = _fields(said)
    return Usage(
        input_tokens=_whole(fields.get("prompt_tokens")),
        output_tokens=_whole(fields.get("completion_tokens")),
        cached_tokens=_whole(_fields(fields.get("prompt_tokens_details")).get("cached_tokens")),
        reasoning_tokens=_whole(_fields(fields.get("completion_tokens_details")).get("reasoning_tokens")),
    )


def _whole(value: object) -> int:
    """Return a count of tokens; 0 for what is none."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**63:
        return int(value)
    return 0


NO_USAGE = Usage()
