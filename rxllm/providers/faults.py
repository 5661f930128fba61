"""What servers say instead of an answer, as errors of ours: one table for all dialects.

The first row that fits wins. Most names and texts are known in every dialect, as gateways pass on those of others.

    what comes                                           dialect  class                 tried again  waits for
    400, 403, 413, 422, 500: a content filter:           any      ContentFilterError    no
      `content_filter` (Azure),
      `content_policy_violation`, a prompt that was
      flagged
    400, 403, 413, 422, 500: too many tokens for the     any      ContextOverflowError  no
      model: `context_length_exceeded`,
      `exceed_context_size_error`, "prompt is too long"
    402: money in flight: the running requests fill      openai   RateLimitedError      at no cost   headers, text
      OpenRouter's budget
    400, 402-403, 429: no money: `insufficient_quota`    any      BillingError          no
      with its codes, spend limits (Anthropic,
      OpenRouter, litellm), a low balance
    413, 429: "Request too large" for a quota as a       any      InvalidRequestError   no
      whole
    403: a quota that renews, of Azure's API Management  any      RateLimitedError      at no cost   headers, text
    400: throttling that AWS calls by name               openai   RateLimitedError      at no cost   headers, text
    429, 503: a model that is still loading (llama.cpp,  any      NotReadyError         yes          headers
      Hugging Face, Bedrock)
    429, 498, 503: too busy: `server_is_overloaded`,     any      OverloadedError       at no cost   headers, text
      `overloaded_error`, `capacity_exceeded`, TGI's
      `overloaded`
    503: `slow_down`                                     any      OverloadedError       at no cost   headers, text
    400: a key that Google calls a bad request           openai   AuthError             no
    400, 422                                             any      InvalidRequestError   no
    401                                                  any      AuthError             no
    402                                                  any      BillingError          no
    403                                                  any      AuthError             no
    404, 410                                             any      NotFoundError         no
    405                                                  any      InvalidRequestError   no
    407                                                  any      InvalidRequestError   no
    408                                                  any      TimeoutError          yes          headers
    409                                                  any      ConflictError         yes          headers
    413                                                  any      InvalidRequestError   no
    424: a model that failed (TGI's `generation`,        any      ServerError           yes          headers
      Bedrock)
    425                                                  any      NotReadyError         yes          headers
    429: throttling, Anthropic's `ramp_limit_exceeded`,  any      RateLimitedError      at no cost   headers, text
      Cloudflare's 1015
    499                                                  any      ConnectionError       yes          headers
    501                                                  any      UnsupportedError      no
    503                                                  any      ServerError           yes          headers
    502, 504, 520-526: a proxy got no answer             any      ServerError           yes          headers
    498, 529                                             any      OverloadedError       at no cost   headers, text
    500-999: anything else                               any      ServerError           yes          headers
    300-399: a redirect, which is not followed           any      InvalidRequestError   no
    400-499: anything else                               any      InvalidRequestError   no
    an error in a stream that tells neither a status     any      ServerError           yes          headers
      nor a name that is known

"tried again" is what the class says. `x-should-retry: true` or `false` overrules it. "at no cost" is a refusal: the
server did nothing, so it eats no try, and tokens are refunded; once a part of a streamed answer was there, an error is
no refusal any more.

How long: never shorter than the server asks. Of headers the first that can be read counts: `retry-after-ms`,
`x-ms-retry-after-ms`, `retry-after` (seconds, a date, a Unix time), and each as litellm renames them
(`llm_provider-…`). Only if there is none, and only of a refusal, what its text or its JSON says ("try again in 6m0s",
Google's `retryDelay`). A date in the past is no wait; a wait that is negative, no number or longer than a month is
ignored.

Which status: that of HTTP. For an error that came as if all were well, in a stream or with a 200, it is the number
that the error tells, else the one that its names mean, else none: it is a failure of the server then.

Source: the vendors' documentation of their errors, the sources of vLLM, TGI, llama.cpp and LLM Engine, RFC 9110.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from rxllm.errors import CallError, DecodeError
from rxllm.providers.fault_rows import ROWS, Row
from rxllm.providers.said import (
    HTML,
    hint_in,
    is_html,
    message_of,
    names_in,
    one_line,
    parsed,
    parts_of,
    request_id,
    retry_after,
    said_in,
    start_of,
    status_in,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "ROWS",
    "Row",
    "fault_in",
    "fault_of",
    "is_html",
    "message_of",
    "one_line",
    "parsed",
    "request_id",
    "retry_after",
    "said_in",
    "table",
    "unreadable",
]


MEANINGS: dict[str, int] = {name: row.statuses[0] for row in ROWS for name in row.meaning}
_ROWS_OF = {
    dialect: tuple(row for row in ROWS if not row.dialects or dialect in row.dialects)
    for dialect in ("anthropic", "llm_engine", "openai")
}


def fault_of(dialect: str, status: int, headers: Mapping[str, str], body: bytes, *, now: float) -> CallError:
    """Return the error of an answer that is none.

    Args:
        dialect: "openai", "anthropic" or "llm_engine"; all rows hold for any other.
        status: of HTTP. 2xx: the error came as if all were well.
        headers: case-insensitive.
        body: may be JSON, HTML, text, empty or anything else.
        now: wall time in seconds, to read a Retry-After that is a date.

    >>> body = b'{"error": {"message": "Slow down. Please try again in 9.94s.", "code": "rate_limit_exceeded"}}'
    >>> error = fault_of("openai", 429, {}, body, now=0.0)
    >>> type(error).__name__, error.transient, error.refusal, error.retry_after
    ('RateLimitedError', True, True, 9.94)
    """
    if is_html(headers, body):
        return _fault(dialect, None, HTML, status, headers, body, now)
    said = parsed(body)
    return _fault(dialect, said, said_in(said) or start_of(body), status, headers, body, now)


def fault_in(
    dialect: str,
    said: object,
    *,
    now: float,
    status: int = 200,
    headers: Mapping[str, str] | None = None,
    begun: bool = False,
) -> CallError:
    """Return the error that came inside of an answer: in an event of a stream, or with a 200.

    Args:
        dialect: as in `fault_of`.
        said: the JSON of the event, decoded.
        now: wall time in seconds.
        status: of the answer.
        headers: of the answer.
        begun: a part of the answer was there before, so that the server has worked: the error is no refusal.

    >>> said = {"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}
    >>> error = fault_in("anthropic", said, now=0.0, begun=True)
    >>> type(error).__name__, error.status, error.transient, error.refusal
    ('OverloadedError', 529, True, False)
    """
    try:
        body = msgspec.json.encode(said)
    except (TypeError, ValueError, OverflowError, RecursionError):  # of what was never JSON
        body = b""
    error = _fault(dialect, said, said_in(said) or start_of(body), status, headers or {}, body, now)
    if begun and error.refusal:
        error.refusal = False
    return error


def _fault(  # noqa: PLR0917
    dialect: str, said: object, text: str, status: int, headers: Mapping[str, str], body: bytes, now: float
) -> CallError:
    parts = parts_of(said)
    names = names_in(parts, headers)
    known = status if status >= 300 else _status_of(parts, names)  # noqa: PLR2004
    row = _row_of(_ROWS_OF.get(dialect, ROWS), known, names, text)
    status = known or status
    advice = row.advice
    if 300 <= status < 400:  # noqa: PLR2004
        advice = f"the server redirects to {one_line(headers.get('location', 'nowhere'))}: check base_url"
    shown = one_line(text)
    message = f"{advice}: {shown}" if advice and shown else advice or shown or f"HTTP status {status}"
    hint = retry_after(headers, now)
    if hint is None and row.kind.refusal:
        hint = hint_in(text[:LONGEST_TEXT], parts)
    error = row.kind(message, status, hint, request_id(headers, said), body)
    again = (headers.get("x-should-retry") or headers.get("llm_provider-x-should-retry") or "").lower()
    if again in {"true", "false"}:
        error.transient = again == "true"
    return error


LONGEST_TEXT = 2_000  # characters that are searched


def _status_of(parts: list[dict[str, Any]], names: list[str]) -> int | None:
    """Return the status of an error that came as if all were well; None if it has none."""
    number = status_in(parts)
    return number if number is not None else next((MEANINGS[name] for name in names if name in MEANINGS), None)


def _row_of(rows: tuple[Row, ...], status: int | None, names: list[str], text: str) -> Row:
    text = text[:LONGEST_TEXT].lower()
    for row in rows[:-1]:
        named = row.names or row.words
        if row.statuses and (status not in row.statuses if status is not None else not named):
            continue
        if not named or not row.names.isdisjoint(names) or any(part in text for part in row.words):
            return row
    return rows[-1]  # fits always


def unreadable(status: int, headers: Mapping[str, str], body: bytes, reason: str) -> DecodeError:
    """Return the error of an answer that claims to be good and cannot be understood."""
    said = HTML if is_html(headers, body) else one_line(reason)
    return DecodeError(f"the answer cannot be understood: {said}", status, None, request_id(headers), body)


def table() -> list[tuple[str, str, str, str, str]]:
    """Return the table for people: what comes, dialect, class, whether it is tried again, and what the wait is from."""
    return [
        (
            ": ".join(part for part in (_ranges(row.statuses), row.comes) if part),
            ", ".join(sorted(row.dialects)) or "any",
            row.kind.__name__,
            "at no cost" if row.kind.refusal else "yes" if row.kind.transient else "no",
            "headers, text" if row.kind.refusal else "headers" if row.kind.transient else "",
        )
        for row in ROWS
    ]


def _ranges(statuses: Iterable[int]) -> str:
    """Return statuses as people write them.

    >>> _ranges((504, 502, 520, 521, 522))
    '502, 504, 520-522'
    """
    runs: list[list[int]] = []
    for status in sorted(statuses):
        if runs and status == runs[-1][-1] + 1:
            runs[-1][1:] = [status]
        else:
            runs.append([status])
    return ", ".join("-".join(map(str, run)) for run in runs)
