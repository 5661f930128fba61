"""The lines of a journal: an outcome as a line of JSON, and back.

A line has the shape of the output of OpenAI's Batch API, and what is ours beside it:

    {"id": "<key>", "custom_id": "<the request's id>",
     "response": {"status_code": 200, "request_id": "<the answer's id>", "body": <as it came>}, "error": null,
     "rxllm": {"version": 1, "key": "<key>", "started": <date>, "seconds": 1.5, "attempts": [...], "usage": {...}}}

Of a failed request `response` is null, or has only the status, and `error` says what happened: `code` and `message`,
and what else is known. `rxllm.ok` is false then, and `rxllm.again` true if the next run has to ask again, whatever it
is told about failed ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec

from rxllm import errors
from rxllm.errors import AuthError, BillingError, CallError, CancelledError, ConfigError, is_transient
from rxllm.messages import Attempt, Outcome, Reply, Request, Usage

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "VERSION",
    "Mark",
    "Row",
    "hash_of",
    "key_text",
    "line_of",
    "lines_of",
    "mark_of",
    "outcome_of",
    "prefix_of",
    "row_of",
]

VERSION = 1
STEP = 0x9E3779B97F4A7C15  # odd, so all occurrences of a request have different hashes
WORD = (1 << 64) - 1
MICRO = 1e6  # of a second: what times are cut to; more digits would be half of the line
NO_BODY = msgspec.Raw(b"null")


class _Usage(msgspec.Struct, omit_defaults=True, gc=False):
    """As `Usage`, without what is zero."""

    input_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0
    cache_write_tokens: int = 0
    units: dict[str, float] | None = None


class _Fault(msgspec.Struct, omit_defaults=True, gc=False):
    """An error: `code` is the name of its class."""

    code: str
    message: str = ""
    status: int | None = None
    retry_after: float | None = None
    request_id: str | None = None
    body: str | None = None
    phase: errors.Phase | None = None
    transient: bool = False


class _Try(msgspec.Struct, omit_defaults=True, gc=False):
    """An attempt; `started` counts from the start of the request. The usage of an only one stands beside."""

    started: float = 0.0
    seconds: float = 0.0
    waited: dict[str, float] = {}
    status: int | None = None
    error: _Fault | None = None
    usage: _Usage | None = None
    route: str | None = None
    hedged: bool = False


class _Response(msgspec.Struct, gc=False):
    status_code: int | None
    request_id: str | None
    body: msgspec.Raw = NO_BODY


class _Note(msgspec.Struct, omit_defaults=True, gc=False):
    """What is ours."""

    version: int
    key: str
    started: float = 0.0  # the date, seconds since 1970
    seconds: float = 0.0
    attempts: list[_Try] = []
    usage: _Usage | None = None
    ok: bool = True
    again: bool = False
    encoding: str | None = None  # of a body that is no JSON: "text" or "base64"


class Row(msgspec.Struct, gc=False):
    """A line."""

    id: str
    custom_id: str | None
    response: _Response | None
    error: _Fault | None
    rxllm: _Note


class _MarkNote(msgspec.Struct, gc=False):
    version: int
    key: str
    ok: bool = True
    again: bool = False


class Mark(msgspec.Struct, gc=False):
    """What an index needs of a line."""

    rxllm: _MarkNote


class _Versioned(msgspec.Struct):
    version: int


class _AnyVersion(msgspec.Struct):
    rxllm: _Versioned


_encode = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines
_decode = msgspec.json.Decoder(Row).decode
_decode_mark = msgspec.json.Decoder(Mark).decode
_decode_version = msgspec.json.Decoder(_AnyVersion).decode
_skim = msgspec.json.Decoder(msgspec.Raw).decode


# keys


def key_text(key: bytes, occurrence: int) -> str:
    """Return the key of a row: the digest of a request, and which of those that are equal it is, >= 1."""
    return f"{key.hex()}-{occurrence}"


def hash_of(key: str) -> int:
    """Return the 64 bits by which an index knows a key.

    Raises:
        ValueError: it is none.
    """
    first = int(key[:16], 16)
    return first if key[33:] == "1" else (first + (int(key[33:]) - 1) * STEP) & WORD


def prefix_of(key: str) -> bytes:
    """Return how the line of a key begins, if it was written here."""
    return b'{"id":"%b",' % key.encode()


# lines


def lines_of(rows: list[Row]) -> bytes:
    """Return the lines of rows.

    Raises:
        TypeError, ValueError: one of them has no JSON.
    """
    return _encode_lines(rows)


def line_of(outcome: Outcome[Any], key: str, date: float) -> tuple[bytes, str | None]:
    """Return the line of an outcome, and why its value is not in it, if it is not; see `row_of`."""
    row, problem = row_of(outcome, key, date)
    return _encode_lines([row]), problem


def row_of(outcome: Outcome[Any], key: str, date: float) -> tuple[Row, str | None]:
    """Return the row of an outcome, and why its value is not in it, if it is not.

    Args:
        outcome: what came of the request.
        key: what `key_text` returned.
        date: now, in seconds since 1970.
    """
    reply, attempts, begun, seconds = outcome.reply, outcome.attempts, outcome.started, outcome.seconds
    if len(attempts) == 1:  # most often; then its usage is all there is
        usage = attempts[0].usage
        tries = [_try_of(attempts[0], begun, None)]
    else:
        usage = outcome.usage
        tries = [_try_of(attempt, begun, attempt.usage) for attempt in attempts]
    note = _Note(
        VERSION,
        key,
        int((date - seconds) * 1e3) / 1e3,
        int(seconds * MICRO) / MICRO,
        tries,
        None if usage is None else _used(usage),
    )
    problem: str | None = None
    if reply is None:
        error = cast("Exception", outcome.error)
        fault = _fault_of(error)
        response = None if fault.status is None else _Response(fault.status, fault.request_id)
        note.ok, note.again = False, _is_open(error)
    else:
        fault = None
        body, note.encoding, problem = _body_of(reply)
        response = _Response(reply.status, reply.id, body)
        note.again = problem is not None
    return Row(key, outcome.request.id, response, fault, note), problem


def _body_of(reply: Reply[Any]) -> tuple[msgspec.Raw, str | None, str | None]:
    """Return the body as JSON that is ready, how it is encoded if it was none, and why there is none."""
    raw = reply.raw
    if not raw:
        try:
            return msgspec.Raw(_encode(reply.value)), None, None
        except (TypeError, ValueError, RecursionError) as wrong:
            return NO_BODY, None, f"a {type(reply.value).__name__} has no JSON: {wrong}"
    try:
        _skim(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        try:
            return msgspec.Raw(_encode(raw.decode())), "text", None
        except UnicodeDecodeError:
            return msgspec.Raw(_encode(raw)), "base64", None
    if b"\n" in raw or b"\r" in raw:  # which JSON may have between its tokens, and a line may not
        raw = raw.replace(b"\n", b" ").replace(b"\r", b" ")
    return msgspec.Raw(raw), None, None


def _try_of(attempt: Attempt, begun: float, usage: Usage | None) -> _Try:
    error = attempt.error
    return _Try(
        int((attempt.started - begun) * MICRO) / MICRO,
        int(attempt.seconds * MICRO) / MICRO,
        attempt.waited,
        attempt.status,
        None if error is None else _fault_of(error),
        None if usage is None else _used(usage),
        attempt.route,
        attempt.hedged,
    )


def _used(usage: Usage) -> _Usage:
    return _Usage(
        usage.input_tokens,
        usage.output_tokens,
        usage.cached_tokens,
        usage.reasoning_tokens,
        usage.cache_write_tokens,
        usage.units,
    )


def _fault_of(error: Exception) -> _Fault:
    code = type(error).__name__
    if not isinstance(error, CallError):
        return _Fault(code, _valid(str(error)))
    return _Fault(
        code,
        _valid(error.message),
        error.status,
        error.retry_after,
        error.request_id,
        None if error.body is None else _valid(error.body),
        getattr(error, "phase", None),
        error.transient,
    )


def _valid(text: object) -> str:
    """Return text that has UTF-8: what a server says may be cut inside of a character."""
    return str(text).encode("utf-8", "replace").decode()


def _is_open(error: Exception) -> bool:
    """Say whether an error is not about the request, so that it is still to be asked: the run was over, or no key.

    Or nobody was there: what is transient and was never sent.
    """
    if isinstance(error, (AuthError, BillingError, CancelledError, ConfigError)) or getattr(error, "halts", False):
        return True
    return is_transient(error) and getattr(error, "sent", True) is False


# and back


def mark_of(line: bytes) -> Mark:
    """Return what an index needs of a line.

    Raises:
        ValueError: it is no line of a journal of this version; it says why.
    """
    try:
        mark = _decode_mark(line)
        if mark.rxllm.version == VERSION:
            return mark
        version = mark.rxllm.version
    except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
        reason = str(wrong)
        try:
            version = _decode_version(line).rxllm.version
        except (msgspec.DecodeError, UnicodeDecodeError):
            version = VERSION
        if version == VERSION:
            raise ValueError(reason) from None
    msg = f"it is of version {version}, and this rxllm reads version {VERSION}"
    raise ValueError(msg)


def outcome_of(
    line: bytes, request: Request, restore: Callable[[Request, str | None, int, bytes], Reply[Any]]
) -> Outcome[Any]:
    """Return the outcome that a line tells of.

    Args:
        line: what `line_of` has returned.
        request: what it was about.
        restore: (request, route, status, body) -> the reply; the route is that which answered.

    Raises:
        ValueError: it is no such line.
        CallError: of `restore`.
    """
    row = _decode(line)
    note = row.rxllm
    tries = note.attempts
    if len(tries) == 1:
        tries[0].usage = note.usage
    attempts = tuple([_attempt_of(number, tried) for number, tried in enumerate(tries, 1)])
    if row.error is not None or row.response is None:
        error = _error_of(row.error or _Fault("CallError", "no reply and no error"))
        return Outcome(request=request, error=error, attempts=attempts, seconds=note.seconds)
    response, body = row.response, bytes(row.response.body)
    if note.encoding is not None:
        body = msgspec.json.decode(body, type=bytes) if note.encoding == "base64" else _text(body)
    reply = restore(request, attempts[-1].route if attempts else None, response.status_code or 200, body)
    if reply.usage == NO_USAGE and attempts and attempts[-1].usage is not None:
        reply = msgspec.structs.replace(reply, usage=attempts[-1].usage)
    return Outcome(request=request, reply=reply, attempts=attempts, seconds=note.seconds)


NO_USAGE = Usage()


def _text(body: bytes) -> bytes:
    return msgspec.json.decode(body, type=str).encode()


def _attempt_of(number: int, tried: _Try) -> Attempt:
    usage = tried.usage
    return Attempt(
        number=number,
        started=tried.started,
        seconds=tried.seconds,
        waited=tried.waited,
        status=tried.status,
        error=None if tried.error is None else _error_of(tried.error),
        usage=None
        if usage is None
        else Usage(
            input_tokens=usage.input_tokens,
            output_tokens=usage.output_tokens,
            cached_tokens=usage.cached_tokens,
            reasoning_tokens=usage.reasoning_tokens,
            cache_write_tokens=usage.cache_write_tokens,
            units=usage.units,
        ),
        route=tried.route,
        hedged=tried.hedged,
    )


def _error_of(fault: _Fault) -> Exception:
    """Return the error again: of its class if that is one of ours, else a `CallError` that names it."""
    kind: object = getattr(errors, fault.code, None)
    if not (isinstance(kind, type) and issubclass(kind, errors.RxllmError)):
        return CallError(f"{fault.code}: {fault.message}")
    if not issubclass(kind, CallError):
        return kind(fault.message)
    facts = (fault.message, fault.status, fault.retry_after, fault.request_id, fault.body)
    if issubclass(kind, errors.TimeoutError) and fault.phase is not None:
        error: CallError = kind(*facts, fault.phase)
    else:
        error = kind(*facts)
    if error.transient != fault.transient:
        error.transient = fault.transient
    return error
