"""What can go wrong, as one tree.

    RxllmError
      ConfigError                 wrong arguments, wrong use: a bug to fix, never tried again
      CallError                   one request went wrong             transient   refusal   halts
        AuthError                 401, 403: the key is not accepted
        BillingError              402, 429 for an empty balance
        RateLimitedError          429: too much for now                 yes        yes
        OverloadedError           529, or 503 that says so: too busy    yes        yes
        QuotaExhaustedError       a quota of ours that is not waited for                    yes
        StoreError                a shared quota is silent, a journal is full               yes
        BreakerError              nothing was answered for long                             yes
        ServerError               >= 500: the server's own fault        yes
        TimeoutError              no answer in time; see `phase`        yes (not at the deadline)
        ConnectionError           unreachable, or cut off               yes
        InvalidRequestError       400, 413, 422: the request is wrong
          ContentFilterError      a filter of the server's refused the content
          ContextOverflowError    more tokens than the model reads
        NotFoundError             404, 410: no such model, file or job
        ConflictError             409: somebody else is at it           yes
        ValidationError           a good answer that a check refused
        DecodeError               an answer cut short or garbled        yes
        CancelledError            given up before it ended
        UnsupportedError          501: this provider cannot do that
        NotReadyError             425: still loading, not there yet     yes

The class says what happened; `transient` says what to do: try again, or not. A `refusal` costs the server
nothing, so it does not use up a try. What `halts` is about the whole stream: nothing is pulled any more, what
is on the wire ends as it does, and then the stream ends with this error. All three are attributes of each
error: one may differ from its class, where the server says so.

`TimeoutError` and `ConnectionError` are not the builtins of these names, as in `requests` and `redis`: import
the module.
"""

import sys
from collections.abc import Iterable
from typing import Literal

__all__ = [
    "AuthError",
    "BillingError",
    "BreakerError",
    "CallError",
    "CancelledError",
    "ConfigError",
    "ConflictError",
    "ConnectionError",
    "ContentFilterError",
    "ContextOverflowError",
    "DecodeError",
    "InvalidRequestError",
    "NotFoundError",
    "NotReadyError",
    "OverloadedError",
    "Phase",
    "QuotaExhaustedError",
    "RateLimitedError",
    "RxllmError",
    "ServerError",
    "StoreError",
    "TimeoutError",
    "UnsupportedError",
    "ValidationError",
    "check_callable",
    "check_choice",
    "check_number",
    "check_text",
    "is_transient",
]

Phase = Literal["connect", "first_byte", "idle", "total", "deadline"]

_BODY_LENGTH = 500  # characters: enough to see what a server says, small enough to keep a million of them


class RxllmError(Exception):
    """The base of every error of this package."""

    halts: bool = False  # True: nothing more can come of the stream: it ends after those on the wire


class ConfigError(RxllmError):
    """Wrong arguments or wrong use. The message names the field and the value.

    It is no `ValueError`: a validator that is called wrongly must not pass for one that said no.
    """


class CallError(RxllmError):
    """One request went wrong.

    Args:
        message: For a person: what happened, and what to check.
        status: The HTTP status, when there was an answer.
        retry_after: Seconds that the server asked to wait.
        request_id: The server's name for this request, for its support to find it.
        body: What the server said; the first 500 characters are kept. Remove keys before (`Secret.scrub`):
            half a key at the cut would not be found.
    """

    transient: bool = False
    refusal: bool = False
    limits: object = None  # `policies.Limits`: what the headers said of the key's quotas; None if nothing
    sent: bool = True  # False: nothing left this machine, so nothing was used
    partial: str | None = None  # the text so far of a streamed answer that broke off
    usage: object = None  # `messages.Usage` that the server told all the same; None if nothing

    def __init__(
        self,
        message: str,
        status: int | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
        body: str | bytes | None = None,
    ) -> None:
        text = _shortened(body)
        super().__init__(message, status, retry_after, request_id, text)  # copies and pickles call with these
        self.message = message
        self.status = status
        self.retry_after = retry_after  # seconds
        self.request_id = request_id
        self.body = text

    def __str__(self) -> str:
        facts: list[str] = []
        if self.status is not None:
            facts.append(f"HTTP {self.status}")
        if self.request_id is not None:
            facts.append(f"request id {self.request_id}")
        return f"{self.message} ({', '.join(facts)})" if facts else self.message


class AuthError(CallError):
    """The key is missing, wrong, or not allowed to do this (HTTP 401, 403)."""


class BillingError(CallError):
    """The balance is empty or a spend limit is reached (HTTP 402; also some 429): waiting does not help."""


class RateLimitedError(CallError):
    """The provider refused the call for now: a quota of this key is used up (HTTP 429; 403 by Azure's gateway)."""

    transient = True
    refusal = True


class OverloadedError(CallError):
    """The provider refused the call for now: it is too busy, whoever asks (HTTP 529; 429, 498, 503 that say so)."""

    transient = True
    refusal = True


class QuotaExhaustedError(CallError):
    """A quota with `on_exhausted="fail"` has no room; `retry_after` is when it has, in seconds, if that is known.

    >>> error = QuotaExhaustedError("the quota 200 requests per 86400 seconds is used up", retry_after=3600.0)
    >>> error.halts, error.transient
    (True, False)
    """

    halts = True


class BreakerError(CallError):
    """Nothing has been answered for long, and a breaker with `stop=True` has opened."""

    halts = True


class StoreError(CallError):
    """The store of a shared quota does not answer, or a journal cannot be written."""

    halts = True


class ServerError(CallError):
    """The provider failed (HTTP 500 and above). It may have worked, and charged, before it did."""

    transient = True


class TimeoutError(CallError):
    """No answer in time. `phase` says which clock ran out.

    `connect`, `first_byte`, `idle` (between two pieces) and `total` are about one attempt, so another may do
    better. `deadline` is about the request with all its attempts: such an error is not transient.

    >>> from rxllm import errors
    >>> errors.TimeoutError("nothing for 30 s", phase="idle").transient
    True
    >>> errors.TimeoutError("not answered within 3600 s", phase="deadline").transient
    False
    """

    transient = True
    phase: Phase

    def __init__(  # noqa: PLR0917 - as they stand in args, which a copy or a pickle is made from
        self,
        message: str,
        status: int | None = None,
        retry_after: float | None = None,
        request_id: str | None = None,
        body: str | bytes | None = None,
        phase: Phase = "total",
    ) -> None:
        super().__init__(message, status, retry_after, request_id, body)
        self.args = (*self.args, phase)
        self.phase = phase
        if phase == "deadline":
            self.transient = False


class ConnectionError(CallError):
    """The server could not be reached, or the connection broke."""

    transient = True


class InvalidRequestError(CallError):
    """The request is wrong, and will be wrong next time (HTTP 400, 413, 422)."""


class ContentFilterError(InvalidRequestError):
    """A content filter of the server's refused the request or its answer: no answer, and no use in asking again."""


class ContextOverflowError(InvalidRequestError):
    """The request and its answer are more tokens than the model can take."""


class NotFoundError(CallError):
    """There is no such model, file, job or path (HTTP 404)."""


class ConflictError(CallError):
    """The request collided with another one (HTTP 409)."""

    transient = True


class ValidationError(CallError):
    """A good answer that a check refused; `validate` asks again by itself, so `retry` does not."""

    reply: object = None  # `messages.Reply`: the answer, where it is known


class DecodeError(CallError):
    """The answer was cut short or is not what it claims to be."""

    transient = True


class CancelledError(CallError):
    """The request was given up before it ended. This is no `asyncio.CancelledError`: it may be caught."""


class UnsupportedError(CallError):
    """This provider cannot do what was asked."""


class NotReadyError(CallError):
    """Not there yet: the model is loading, the result is being made (HTTP 425)."""

    transient = True


def is_transient(error: BaseException) -> bool:
    """Say whether another try may succeed. An error of any package may have a `transient` attribute.

    >>> is_transient(RateLimitedError("slow down")), is_transient(KeyError("x"))
    (True, False)
    """
    return getattr(error, "transient", False) is True


def check_number(
    name: str,
    value: object,
    *,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    integer: bool = False,
    optional: bool = False,
) -> None:
    """Refuse all but a finite number within bounds.

    Args:
        name: What the caller called it; the message starts with it.
        value: What the caller gave.
        least: The smallest good value.
        above: The largest value that is too small.
        most: The largest good value.
        integer: Refuse 1.0 as well.
        optional: Accept None.

    Raises:
        ConfigError: It is something else: also a bool, NaN or infinity.

    >>> check_number("window", 0, above=0, integer=True)
    Traceback (most recent call last):
    rxllm.errors.ConfigError: window must be a whole number > 0, got 0
    """
    if value is None and optional:
        return
    if (
        isinstance(value, int if integer else (int, float))
        and not isinstance(value, bool)
        and abs(value) <= sys.float_info.max  # neither NaN, nor infinite, nor an int that no float holds
        and (least is None or value >= least)
        and (above is None or value > above)
        and (most is None or value <= most)
    ):
        return
    bounds = [f"{sign} {bound}" for sign, bound in ((">=", least), (">", above), ("<=", most)) if bound is not None]
    wanted = " ".join(["a whole number" if integer else "a finite number", " and ".join(bounds)]).rstrip()
    raise _wrong(name, wanted, value, optional=optional)


def check_text(name: str, value: object, *, empty: bool = False, optional: bool = False) -> None:
    """Refuse all but a string, and an empty one unless `empty`.

    Raises:
        ConfigError: It is something else.
    """
    if not (isinstance(value, str) and (value or empty)) and not (value is None and optional):
        raise _wrong(name, "a string" if empty else "a string that is not empty", value, optional=optional)


def check_callable(name: str, value: object, *, optional: bool = False) -> None:
    """Refuse all but a callable.

    Raises:
        ConfigError: It is something else.
    """
    if not callable(value) and not (value is None and optional):
        raise _wrong(name, "callable", value, optional=optional)


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Refuse all but one of `choices`.

    Raises:
        ConfigError: It is something else.

    >>> check_choice("policy", "drop", ("error", "buffer"))
    Traceback (most recent call last):
    rxllm.errors.ConfigError: policy must be 'error' or 'buffer', got 'drop'
    """
    allowed = tuple(choices)
    if not any(type(value) is type(choice) and value == choice for choice in allowed):
        raise _wrong(name, " or ".join(map(repr, allowed)), value)


def _wrong(name: str, wanted: str, value: object, *, optional: bool = False) -> ConfigError:
    return ConfigError(f"{name} must be {wanted}{' or None' if optional else ''}, got {_shown(value)}")


def _shown(value: object, length: int = 80) -> str:
    try:
        text = repr(value)
    except Exception:  # a repr of the user's, or an int of 5,000 digits: it must not hide what is wrong
        text = f"<{type(value).__name__}>"
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _shortened(body: str | bytes | None) -> str | None:
    if isinstance(body, (bytes, bytearray)):
        body = body[: 4 * _BODY_LENGTH + 4].decode("utf-8", "replace")  # 4 bytes a character at most
    return body if body is None or len(body) <= _BODY_LENGTH else f"{body[: _BODY_LENGTH - 3]}..."
