"""The lines of a journal: an outcome as a line of JSON, and back.

A line has the shape of the output of OpenAI's Batch API, and what is ours beside it:

    {"id": "<key>", "custom_id": "<the request's id>",
     "response": {"status_code": 200, "request_id": "<the answer's id>", "body": <as it came>}, "error": null,
     "rxllm": {"version": 1, "key": "<key>", "started": <date>, "seconds": 1.5, "attempts": [...], "usage": {...}}}

Of a failed request `response` is null, or has only the status, and `error` says what happened: `code` and `message`,
and what else is known. `rxllm.ok` is false then, and `rxllm.again` true if the next run has to ask again, whatever it
is told about failed ones. `rxllm.meta` is the request's, if it has a JSON: it tells rows without an id apart.
"""

from __future__ import annotations

from hashlib import blake2b
from typing import TYPE_CHECKING, Any, cast

import msgspec

from rxllm import errors
from rxllm.errors import (
    AuthError,
    BillingError,
    CallError,
    CancelledError,
    ConfigError,
    NotReadyError,
    OverloadedError,
    RateLimitedError,
    is_transient,
)
from rxllm.messages import Attempt, Outcome, Reply, Request, ToolCall, Usage

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "VERSION",
    "Mark",
    "Row",
    "hash_of",
    "hash_of_name",
    "is_torn",
    "key_text",
    "line_of",
    "lines_of",
    "mark_of",
    "name_of",
    "outcome_of",
    "prefix_of",
    "row_of",
]

VERSION = 1
STEP = 0x9E3779B97F4A7C15  # odd, so all occurrences of a request have different hashes
WORD = (1 << 64) - 1
MICRO = 1e6  # of a second: what times are cut to; more digits would be half of the line
BEGIN = b'{"id":"'  # of each line
NO_BODY = msgspec.Raw(b"null")


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
    usage: Usage | None = None
    route: str | None = None
    hedged: bool = False


class _Response(msgspec.Struct, gc=False):
    status_code: int | None
    request_id: str | None
    body: msgspec.Raw = NO_BODY


class _Facts(msgspec.Struct, omit_defaults=True, gc=False):
    """What a function says of its reply: there is no body to read it from."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    others: tuple[str, ...] = ()
    model: str | None = None
    finish_reason: str | None = None


class _Note(msgspec.Struct, omit_defaults=True, gc=False):
    """What is ours."""

    version: int
    key: str
    started: float = 0.0  # the date, seconds since 1970
    seconds: float = 0.0
    attempts: list[_Try] = []
    usage: Usage | None = None
    ok: bool = True
    again: bool = False
    encoding: str | None = None  # of a body that is no JSON: "text" or "base64"
    reply: _Facts | None = None  # of one that is known by its value
    meta: msgspec.Raw = NO_BODY  # the request's, if it has a JSON


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


class _Named(msgspec.Struct):
    custom_id: str | None = None


class _Versioned(msgspec.Struct):
    version: int


class _AnyVersion(msgspec.Struct):
    rxllm: _Versioned


_encode = msgspec.json.Encoder().encode
_encode_lines = msgspec.json.Encoder().encode_lines
_decode = msgspec.json.Decoder(Row).decode
_decode_mark = msgspec.json.Decoder(Mark).decode
_decode_version = msgspec.json.Decoder(_AnyVersion).decode
_decode_id = msgspec.json.Decoder(_Named).decode
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


def name_of(line: bytes, mark: Mark, *, by_id: bool) -> str:
    """Return what makes of several lines one, of which the last counts: their key, or the request's id if it has one.

    Raises:
        ValueError: the key is none.
    """
    key = mark.rxllm.key
    hash_of(key)
    name = _decode_id(line).custom_id if by_id else None
    return key if name is None else f"{key[33:]} {name}"  # the third of those with one id stays the third


def hash_of_name(name: str) -> int:
    """Return 64 bits of what `name_of` has returned."""
    return int.from_bytes(blake2b(name.encode(), digest_size=8).digest(), "big")


def prefix_of(key: str) -> bytes:
    """Return how the line of a key begins, if it was written here."""
    return b'%b%b",' % (BEGIN, key.encode())


# lines


def lines_of(rows: list[Row]) -> bytes:
    """Return the lines of rows."""
    lines = _encode_lines(rows)
    if lines.count(b"\n") == len(rows) and b"\r" not in lines:
        return lines
    for row in rows:  # JSON may have these between its tokens, and a line may not
        if row.response is not None:
            body = bytes(row.response.body).replace(b"\n", b" ").replace(b"\r", b" ")
            row.response.body = msgspec.Raw(body)
    return _encode_lines(rows)


def line_of(outcome: Outcome[Any], key: str, date: float) -> bytes:
    """Return the line of an outcome; see `row_of`."""
    return lines_of([row_of(outcome, key, date)[0]])


def row_of(outcome: Outcome[Any], key: str, date: float, *, by_value: bool = False) -> tuple[Row, str | None]:
    """Return the row of an outcome, and what is not in it as it was, if something is not.

    Args:
        outcome: what came of the request.
        key: what `key_text` returned.
        date: now, in seconds since 1970.
        by_value: the reply is of a function: what counts is its value, and not the body that it may have too.
    """
    reply, attempts, begun, seconds = outcome.reply, outcome.attempts, outcome.started, outcome.seconds
    if len(attempts) == 1:  # most often; then its usage is all there is
        only = attempts[0]
        usage, tries = only.usage, [_try_of(only, begun, None)]
    else:
        usage = outcome.usage
        tries = [_try_of(attempt, begun, attempt.usage) for attempt in attempts]
    note = _Note(VERSION, key, int((date - seconds) * 1e3) / 1e3, int(seconds * MICRO) / MICRO, tries, usage)
    if outcome.request.meta is not None:
        note.meta = _meta_of(outcome.request.meta)
    problem: str | None = None
    fault: _Fault | None = None
    response: _Response | None
    if reply is None:
        error = cast("Exception", outcome.error)
        fault = _fault_of(error)
        response = None if fault.status is None else _Response(fault.status, fault.request_id)
        note.ok, note.again = False, _is_open(error)
    elif reply.raw and not by_value:
        body, note.encoding = _body_of(reply.raw)
        response = _Response(reply.status, reply.id, body)
    else:
        body, problem = _value_of(reply)
        response = _Response(reply.status, reply.id, body)
        note.again, note.reply = body is NO_BODY, _facts_of(reply)
    return Row(key, outcome.request.id, response, fault, note), problem


def _meta_of(meta: Any) -> msgspec.Raw:
    try:
        return msgspec.Raw(_encode(meta))
    except Exception:  # of the user's own types too: it is not about the answer
        return NO_BODY


def _body_of(raw: bytes) -> tuple[msgspec.Raw, str | None]:
    """Return a body as JSON that is ready, and how it is encoded if it was none."""
    try:
        _skim(raw)
    except (msgspec.DecodeError, UnicodeDecodeError):
        try:
            return msgspec.Raw(_encode(raw.decode())), "text"
        except UnicodeDecodeError:
            return msgspec.Raw(_encode(raw)), "base64"
    return msgspec.Raw(raw), None


def _value_of(reply: Reply[Any]) -> tuple[msgspec.Raw, str | None]:
    """Return a value as JSON, and what is lost in that, if something is."""
    value = reply.value
    kind = type(value).__name__
    try:
        body = _encode(value)
        same = _is_same(value, msgspec.json.decode(body))
    except Exception as wrong:  # of the user's own types too
        return NO_BODY, f"a {kind} has no JSON, so the next run asks again: {wrong}"
    return msgspec.Raw(body), None if same else f"a {kind} comes back from it as what JSON has for that"


def _is_same(value: Any, again: Any) -> bool:
    return type(value) is type(again) and bool(value == again)


def _facts_of(reply: Reply[Any]) -> _Facts | None:
    """Return what a reply says beside its value; None: nothing."""
    facts = _Facts(
        "" if reply.text == reply.value else reply.text,
        reply.reasoning,
        reply.tool_calls,
        reply.others,
        reply.model,
        reply.finish_reason,
    )
    return None if facts == NO_FACTS else facts


def _try_of(attempt: Attempt, begun: float, usage: Usage | None) -> _Try:
    error = attempt.error
    return _Try(
        int((attempt.started - begun) * MICRO) / MICRO,
        int(attempt.seconds * MICRO) / MICRO,
        attempt.waited,
        attempt.status,
        None if error is None else _fault_of(error),
        usage,
        attempt.route,
        attempt.hedged,
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


# What says nothing of a request: the run was over, the key was not good for anything, or the server did nothing.
OPEN = (AuthError, BillingError, CancelledError, ConfigError, NotReadyError, OverloadedError, RateLimitedError)


def _is_open(error: Exception) -> bool:
    """Say whether an error says nothing of the request, so that it is still to be asked; or nobody was there to ask."""
    if isinstance(error, OPEN) or getattr(error, "halts", False):
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


def is_torn(line: bytes) -> bool:
    """Say whether a last line is what a process that was killed has left of one of ours, or a disk without power.

    It begins as ours do and ends too early. What is whole is never torn, nor is what somebody else has written.
    """
    if not line.strip(b"\0"):
        return True
    if not line.startswith(BEGIN) and not BEGIN.startswith(line):
        return False
    try:
        _skim(line)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return True
    return False


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
    if note.reply is not None:
        facts = {name: value for name, value in msgspec.structs.asdict(note.reply).items() if value}
        reply = msgspec.structs.replace(reply, **facts, id=response.request_id, status=response.status_code)
    if reply.usage == NO_USAGE and attempts and attempts[-1].usage is not None:
        reply = msgspec.structs.replace(reply, usage=attempts[-1].usage)
    return Outcome(request=request, reply=reply, attempts=attempts, seconds=note.seconds)


NO_FACTS = _Facts()
NO_USAGE = Usage()


def _text(body: bytes) -> bytes:
    return msgspec.json.decode(body, type=str).encode()


def _attempt_of(number: int, tried: _Try) -> Attempt:
    return Attempt(
        number=number,
        started=tried.started,
        seconds=tried.seconds,
        waited=tried.waited,
        status=tried.status,
        error=None if tried.error is None else _error_of(tried.error),
        usage=tried.usage,
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
