"""What a server says of an error, read from any body and any headers: the text, the names, how long to wait."""

from __future__ import annotations

import math
import re
from datetime import UTC
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, cast

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

__all__ = [
    "hint_in",
    "is_html",
    "message_of",
    "name_for",
    "names_in",
    "one_line",
    "parsed",
    "parts_of",
    "request_id",
    "retry_after",
    "said_in",
    "status_in",
]

LONGEST_MESSAGE = 500  # characters
LONGEST_HINT = 31 * 86_400.0  # seconds: no quota renews less often than once a month, so what is longer is a mistake
EPOCH = 1e9  # a Retry-After that is larger is a Unix time, of 2001 and later
DEPTH = 5  # levels of a body that are looked at
HTML = "the answer is an HTML page, not JSON: is this the address of the API, or is a proxy in between?"


def parsed(body: bytes) -> Any:
    """Return the JSON of a body; None if it is none."""
    try:
        return msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def is_html(headers: Mapping[str, str], body: bytes) -> bool:
    """Say whether an answer is a page for people."""
    return "html" in headers.get("content-type", "") or body[:200].lstrip()[:1] == b"<"


def one_line(text: str) -> str:
    """Return what somebody else wrote as something to print: no control characters, no lines, not too long."""
    text = " ".join(text[: 2 * LONGEST_MESSAGE].split())
    if not text.isprintable():
        text = " ".join("".join(mark if mark.isprintable() else " " for mark in text).split())
    return text if len(text) <= LONGEST_MESSAGE else f"{text[: LONGEST_MESSAGE - 3]}..."


# The text

TEXTS = ("error", "message", "msg", "detail", "details", "content", "response")  # where it is, or what holds it


def message_of(headers: Mapping[str, str], body: bytes) -> str:
    """Return what the server said, for a person, in one line."""
    return HTML if is_html(headers, body) else one_line(said_in(parsed(body)) or start_of(body))


def start_of(body: bytes) -> str:
    """Return the start of a body that may be anything."""
    return body[: 4 * LONGEST_MESSAGE].decode(errors="replace")


def said_in(value: Any) -> str | None:
    """Return the message in the JSON of an error, in one of the shapes that servers have for it; None if there is none.

    >>> said_in({"error": {"message": "no such model"}}), said_in([{"error": "busy"}]), said_in({"detail": "wrong"})
    ('no such model', 'busy', 'wrong')
    >>> said_in({"detail": [{"loc": ["body", "prompt"], "msg": "Field required"}]})
    'prompt: Field required'
    """
    for _ in range(DEPTH):
        if isinstance(value, list):
            items = cast("list[Any]", value)
            problems = [problem for item in items[:3] if (problem := _problem(item))]
            if problems:
                return "; ".join(problems)
            value = items[0] if items else None
        if isinstance(value, dict):
            fields = cast("dict[str, Any]", value)
            value = next((found for key in TEXTS if (found := fields.get(key)) and _holds(found)), None)
            if isinstance(value, str) and (cause := _cause(fields.get("metadata"))):
                return f"{value}: {cause}"
    return value if isinstance(value, str) else None


def _holds(value: Any) -> bool:
    return isinstance(value, str | dict | list)


def _problem(item: Any) -> str | None:
    """Return one of the problems that a server with FastAPI found in a request, with the field's name."""
    if not isinstance(item, dict):
        return None
    fields = cast("dict[str, Any]", item)
    place, text = fields.get("loc"), fields.get("msg")
    if not isinstance(place, list) or not isinstance(text, str):
        return None
    path = [str(step) for step in cast("list[Any]", place) if isinstance(step, str | int)]
    return f"{'.'.join(path[1:])}: {text}" if len(path) > 1 else text


def _cause(metadata: Any) -> str | None:
    """Return what OpenRouter passes on of the server behind it, and that server's name."""
    if not isinstance(metadata, dict):
        return None
    fields = cast("dict[str, Any]", metadata)
    raw, name = fields.get("raw"), fields.get("provider_name")
    text = ""
    if isinstance(raw, str):
        body = raw[: 1 << 16].encode(errors="replace")
        text = raw if body[:1] not in {b"{", b"["} else said_in(parsed(body)) or raw
    return f"{name}: {text}" if isinstance(name, str) and name and text else text


# Names and numbers

INNER = ("error", "response", "content", "detail", "details", "innererror", "inner_error", "metadata")
NAMES = ("code", "type", "status", "error_code", "error_type", "reason", "limit_source", "__type")
NUMBERS = ("status_code", "code", "status", "statusCode")
MOST_PARTS = 16


def parts_of(said: object) -> list[dict[str, Any]]:
    """Return the objects that an error is made of, from the inside out."""
    found: list[dict[str, Any]] = []
    level: list[Any] = [said]
    for _ in range(DEPTH):
        below: list[Any] = []
        for value in level:
            items = cast("list[Any]", value)[:MOST_PARTS] if isinstance(value, list) else (value,)
            for item in items:
                if isinstance(item, dict) and len(found) < MOST_PARTS:
                    fields = cast("dict[str, Any]", item)
                    found.append(fields)
                    below += [inner for key in INNER if (inner := fields.get(key)) and _holds(inner)]
        level = below
    found.reverse()
    return found


def names_in(parts: Iterable[dict[str, Any]], headers: Mapping[str, str]) -> list[str]:
    """Return the names of an error's code, of its type …, as `name_for` writes them, the innermost first."""
    found = [name_for(name) for part in parts for key in NAMES if isinstance(name := part.get(key), str)]
    aws = headers.get("x-amzn-errortype")
    return found if aws is None else [*found, name_for(aws)]


def name_for(name: str) -> str:
    """Return how a name is looked up.

    >>> name_for("NotFoundError"), name_for("not_found_error"), name_for("com.amazonaws#ThrottlingException:http://…")
    ('notfounderror', 'notfounderror', 'throttlingexception')
    """
    if ":" in name or "#" in name:
        name = name.partition(":")[0].rpartition("#")[2]
    return name[:100].replace("_", "").replace("-", "").replace(" ", "").lower()


def status_in(parts: Iterable[dict[str, Any]]) -> int | None:
    """Return the HTTP status that an error itself tells: as a number (vLLM, OpenRouter), or as a text (litellm)."""
    for part in parts:
        for key in NUMBERS:
            number = part.get(key)
            if isinstance(number, str) and len(number) == 3 and number.isascii() and number.isdigit():  # noqa: PLR2004
                number = int(number)
            if type(number) is int and 400 <= number < 600:  # noqa: PLR2004
                return number
    return None


REQUEST_IDS = ("x-request-id", "request-id", "apim-request-id", "x-amzn-requestid", "x-litellm-call-id", "cf-ray")


def request_id(headers: Mapping[str, str], said: object = None) -> str | None:
    """Return the server's name for the request, if it gives one, in its headers or in its error."""
    name: Any = next((found for key in REQUEST_IDS if (found := headers.get(key))), None)
    if name is None and isinstance(said, dict):
        name = cast("dict[str, Any]", said).get("request_id")
    return one_line(name) or None if isinstance(name, str) else None


# How long to wait

MILLISECONDS = (
    "retry-after-ms",
    "x-ms-retry-after-ms",
    "llm_provider-retry-after-ms",
)  # litellm renames what it passes
SECONDS = ("retry-after", "llm_provider-retry-after")


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Return the seconds that the headers ask to wait, >= 0; None if they do not, or if nothing can be read.

    Milliseconds come before seconds. `retry-after` is seconds (a fraction is fine), an HTTP date, or, against the
    standard, a Unix time. A date is compared with the server's own `date` if it tells it, as clocks differ; one in the
    past is 0. Ignored, as if not there, is what is negative, no number, or longer than a month.
    """
    for name in MILLISECONDS:
        text = headers.get(name)
        if text is not None and (seconds := _bounded(_number(text) / 1000)) is not None:
            return seconds
    for name in SECONDS:
        text = headers.get(name)
        if text is None:
            continue
        seconds = _number(text)
        if math.isnan(seconds):
            date = _date(text)
            server = headers.get("date")
            here = math.nan if server is None else _date(server)
            seconds = max(0.0, date - (now if math.isnan(here) else here)) if not math.isnan(date) else date
        elif seconds >= EPOCH:
            seconds = max(0.0, seconds - now)
        if (found := _bounded(seconds)) is not None:
            return found
    return None


def _number(text: str) -> float:
    try:
        return float(text) if "_" not in text else math.nan
    except ValueError:
        return math.nan


def _bounded(seconds: float) -> float | None:
    return seconds if 0 <= seconds <= LONGEST_HINT else None  # NaN is neither


def _date(text: str) -> float:
    """Return the Unix time of an HTTP date; NaN for what is none."""
    try:
        date = parsedate_to_datetime(text)
        return (date if date.tzinfo is not None else date.replace(tzinfo=UTC)).timestamp()
    except (ValueError, TypeError, IndexError, OverflowError):  # it is picky in many ways
        return math.nan


_UNIT = r"\d{1,9}(?:\.\d{1,9})?\s?(?:ms|milliseconds?|s|secs?|seconds?|m|mins?|minutes?|h|hours?|d|days?)(?![a-z])"
_SPOKEN = re.compile(
    r"\b(?:again|retry|replenished|wait)(?:\s+(?:in|after|for|about))*\s+"
    rf"(?:(?P<clock>(?:\d{{1,4}}\.)?\d{{1,3}}:\d\d:\d\d)|(?P<span>{_UNIT}(?:(?:\s|,|and){{0,5}}{_UNIT}){{0,3}}))",
    re.IGNORECASE,
)
# In "6m0s" no boundary stands between the letter and the next digit, so a unit ends where no letter follows.
_PART = re.compile(r"(\d+(?:\.\d+)?)\s?(ms|mil|s|m|h|d)", re.IGNORECASE)
_FACTORS = {"ms": 1e-3, "mil": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86_400.0}


def hint_in(text: str, parts: Iterable[dict[str, Any]]) -> float | None:
    """Return the seconds that an error itself asks to wait; None if it does not.

    >>> hint_in("Please try again in 6m0s.", []), hint_in("Please retry after 12 seconds.", [])
    (360.0, 12.0)
    >>> hint_in("Quota will be replenished in 5.03:23:11.", [])
    444191.0
    >>> hint_in("Quota exceeded.", [{"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "9s"}])
    9.0
    """
    for part in parts:
        delay: object = part.get("retryDelay")  # Google's RetryInfo
        if isinstance(delay, str) and delay[-1:] == "s" and (seconds := _bounded(_number(delay[:-1]))) is not None:
            return seconds
        delay = part.get("retry_after")
        if type(delay) in {int, float} and (seconds := _bounded(cast("float", delay))) is not None:
            return float(seconds)
    match = _SPOKEN.search(text)
    if match is None:
        return None
    if match["clock"]:
        days, _, clock = match["clock"].rpartition(".")
        hours, minutes, rest = clock.split(":")
        return _bounded(int(days or 0) * 86_400.0 + int(hours) * 3600.0 + int(minutes) * 60.0 + int(rest))
    return _bounded(sum(float(number) * _FACTORS[unit.lower()] for number, unit in _PART.findall(match["span"])))
