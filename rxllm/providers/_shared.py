"""What the dialects have in common: bodies as JSON, answers that are not as they should be, and what requests cost."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING, Any, cast

import msgspec

from rxllm.errors import (
    ConfigError,
    InvalidRequestError,
    UnsupportedError,
    check_callable,
    check_number,
    check_text,
)
from rxllm.policies.tokens import TokenEstimator

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rxllm.messages import Request, Usage
    from rxllm.policies.accounting import Accounting

FIRST = 256  # replies that the estimates of tokens learn from, each
SOME = 8  # afterwards one in so many

_encoder = msgspec.json.Encoder()
UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)  # what reading JSON may raise


# Requests


def body_of(request: Request) -> dict[str, Any]:
    """Return the body of a request, which is not ours to change.

    Raises:
        InvalidRequestError: it is no dict.
        UnsupportedError: it says how the answer is to come, which is said elsewhere.
    """
    body: object = request.body
    if not isinstance(body, dict):
        msg = f"the body of a {request.operation} request must be a dict, got {type(body).__name__}"
        raise InvalidRequestError(msg)
    fields = cast("dict[str, Any]", body)
    if fields.get("stream"):
        msg = "stream: leave it out of the body; call(stream=True) and client.stream(request) send it"
        raise UnsupportedError(msg)
    return fields


def encoded(fields: Mapping[str, Any]) -> bytes:
    """Return a body as JSON.

    Raises:
        InvalidRequestError: there is something in it that JSON does not have.
    """
    try:
        data = _encoder.encode(fields)
        place = not_finite(fields) if b"null" in data else None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        reason = str(error)
    else:
        if place is None:
            return data
        reason = f"{place} is no finite number"  # of NaN and infinity JSON makes null: the server's default
    msg = f"the body cannot be sent as JSON: {reason}"
    raise InvalidRequestError(msg)


def not_finite(value: object, place: str = "body") -> str | None:
    """Return where in a body there is a number that JSON does not have."""
    if isinstance(value, float):
        return None if math.isfinite(value) else place
    pairs: Any = ()
    if isinstance(value, dict):
        pairs = cast("dict[Any, Any]", value).items()
    elif isinstance(value, list | tuple):
        pairs = enumerate(cast("list[Any]", value))
    return next((found for key, item in pairs if (found := not_finite(item, f"{place}[{key!r}]"))), None)


# Answers, and parts of requests, of which nothing is certain


def fields_of(value: object) -> dict[str, Any]:
    """Return a dict; an empty one for what is none."""
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def items_of(value: object) -> list[Any]:
    """Return a list; an empty one for what is none."""
    return list(cast("list[Any]", value)) if isinstance(value, list | tuple) else []


def name_of(value: object) -> str | None:
    """Return a name that some servers give as a number."""
    return None if value is None or isinstance(value, dict | list) else str(value)


def whole(value: object) -> int:
    """Return a count of tokens in an answer; 0 for what is none."""
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 2**63:
        return int(value)
    return 0


def count(value: object) -> int:
    """Return a number of tokens in a request; 0 for what is none: the server will say what it thinks of that."""
    return value if isinstance(value, int) and value > 0 else 0


def text_of(content: object) -> str:
    """Return the text of a content: a text, or those of a list of parts; "" if there is none."""
    if isinstance(content, str):
        return content
    texts = [fields_of(part).get("text") for part in items_of(content)]
    return "".join(text for text in texts if isinstance(text, str))


def size_of(text: str) -> int:
    """Return the size of a text in bytes."""
    return len(text) if text.isascii() else len(text.encode(errors="replace"))


def size_of_messages(messages: object) -> int:
    """Return the size in bytes of the texts of messages, whose content is a text or a list of parts."""
    return sum(size_of(text_of(fields_of(message).get("content"))) for message in items_of(messages))


# Costs


class Size(msgspec.Struct, frozen=True, gc=False):
    """What is known of a request before it is sent."""

    model: str
    prompt: float  # in bytes; in tokens where somebody counts them
    most: int | None  # output tokens of each answer
    answers: int = 1


class Priced:
    """The half of a provider that says what requests will cost, and learns from what they did.

    Args:
        model: the model's name.
        accounting: how the server counts tokens when it admits a request.
        count_tokens: request -> the tokens of its prompt; None: an estimate from its size, which replies calibrate.

    Raises:
        ConfigError: the model is not a text, or `count_tokens` not callable.
    """

    def __init__(
        self, model: str, accounting: Accounting, count_tokens: Callable[[Request], float] | None = None
    ) -> None:
        check_text("model", model)
        check_callable("count_tokens", count_tokens, optional=True)
        self.model = model
        self.accounting = accounting
        self.count_tokens = count_tokens
        self.tokens = TokenEstimator() if count_tokens is None else _OutputEstimator()
        self._asked = False  # somebody asks for costs, so it pays to learn
        self._replies = 0

    def measure(self, request: Request) -> Size:
        """Return the size of a request, its prompt in bytes."""
        raise NotImplementedError

    def cost(self, request: Request) -> dict[str, float]:
        """Return an estimate from the size of the prompt and the tokens that the answer may have.

        Raises:
            ConfigError: `count_tokens` raised something, or returned what is no number of tokens.
        """
        self._asked = True
        size = self.measure(request) if self.count_tokens is None else self._measured(request)
        most, answers = size.most, size.answers
        inputs, outputs = self.tokens.estimate(size.model, request.operation, size.prompt, most)
        most = None if most is None else most * answers
        return self.accounting.costs(max(1.0, inputs), max(1.0, outputs * answers), max_tokens=most)

    def learn(self, request: Request, usage: Usage) -> None:
        """Learn from what a request really used; from each of the first replies, then from some."""
        if not self._asked or not usage.total_tokens:
            return
        self._replies += 1
        if self._replies > FIRST and self._replies % SOME:
            return
        try:
            size = self._measured(request)
        except ConfigError:  # of the user's function: the answer is there and paid for, and the next cost says it
            return
        self.tokens.learn(
            size.model,
            request.operation,
            size.prompt,
            size.most,
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens / size.answers,
        )

    def _measured(self, request: Request) -> Size:
        size = self.measure(request)
        if self.count_tokens is None:
            return size
        return msgspec.structs.replace(size, prompt=counted(self.count_tokens, request))


class _OutputEstimator(TokenEstimator):
    """Estimates of the output alone: the size of a prompt is its tokens, which somebody has counted."""

    __slots__ = ()

    def estimate(self, model: str, kind: str, characters: float, max_tokens: float | None) -> tuple[float, float]:
        """Return the input tokens as they are, and an estimate of the output."""
        return characters, super().estimate(model, kind, characters, max_tokens)[1]


def counted(count_tokens: Callable[[Request], float], request: Request) -> float:
    """Return what the user's function says.

    Raises:
        ConfigError: it raised something, or returned what is no number of tokens.
    """
    try:
        tokens = count_tokens(request)
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
