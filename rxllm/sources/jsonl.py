"""Files of requests, one JSON object a line."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import msgspec

from rxllm.errors import ConfigError, InvalidRequestError, check_choice
from rxllm.messages import Outcome, Request, chat
from rxllm.sources.iterables import from_iterable

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

    from reactivex import Observable

__all__ = ["from_jsonl"]


def from_jsonl(
    path: str | os.PathLike[str], *, on_bad_line: Literal["emit", "raise"] = "emit"
) -> Observable[Request | Outcome[Any]]:
    """Read requests from a file with one JSON object a line.

    A line is an input line of OpenAI's Batch API (`{"custom_id", "method", "url", "body"}`), or `{"prompt": "…"}`, or
    `{"messages": […]}`; with the latter two, `id` and `meta` are the request's own and every other key is a parameter
    of the call. Empty lines are skipped.

    Emits: a `Request` a line; for a bad line a failed `Outcome` whose error names file and line.
    Holds: one line.
    Errors: a file that cannot be read; with `on_bad_line="raise"` the first bad line.
    Completes: at the end of the file.
    Dispose: closes the file.

    Args:
        path: the file, UTF-8.
        on_bad_line: "emit" or "raise".

    Raises:
        ConfigError: an argument of another kind; in the stream: a file that cannot be opened.
    """
    if not isinstance(path, str) and not hasattr(path, "__fspath__"):
        msg = f"path must be a path, got {path!r}"
        raise ConfigError(msg)
    check_choice("on_bad_line", on_bad_line, ("emit", "raise"))
    return from_iterable(_Lines(Path(path), raising=on_bad_line == "raise"))


OPERATIONS = {  # of OpenAI's Batch API, by the end of the URL
    "/chat/completions": "chat",
    "/completions": "completions",
    "/embeddings": "embeddings",
    "/responses": "responses",
    "/moderations": "moderations",
}
LINE = 64 << 20  # bytes; a longer line is no request but the wrong file


class _Lines:
    """The requests of a file; each iteration opens it again."""

    def __init__(self, path: Path, *, raising: bool) -> None:
        self.path = path
        self.raising = raising

    def __iter__(self) -> Iterator[Request | Outcome[Any]]:
        try:
            file = self.path.open("rb")
        except OSError as error:
            msg = f"cannot read {self.path}: {error.strerror}"
            raise ConfigError(msg) from None
        with file:
            number = 0
            while line := file.readline(LINE + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # some editors put one at the beginning
                if not line.strip():
                    continue
                try:
                    yield parse_line(line)
                except InvalidRequestError as bad:
                    failed = InvalidRequestError(f"{self.path}, line {number}: {bad.message}", body=line[:1000])
                    if self.raising:
                        raise failed from None
                    text = line[:1000].decode(errors="replace")
                    yield Outcome(request=Request(body=text, operation="line"), error=failed)
                while len(line) > LINE and not line.endswith(b"\n"):
                    line = file.readline(LINE + 1)


def parse_line(line: bytes) -> Request:
    """Return the request of one line.

    Raises:
        InvalidRequestError: it says what is wrong, not where.
    """
    if len(line) > LINE:
        msg = f"longer than {LINE:,} bytes: is this a file with one JSON object a line?"
        raise InvalidRequestError(msg)
    try:
        fields = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        msg = f"not JSON ({error})"
        raise InvalidRequestError(msg) from None
    if not isinstance(fields, dict):
        msg = f"expected a JSON object, got {type(fields).__name__}"
        raise InvalidRequestError(msg)
    try:
        return _request(cast("dict[str, Any]", fields))
    except ConfigError as error:
        raise InvalidRequestError(str(error)) from None


def _request(fields: dict[str, Any]) -> Request:
    if "body" in fields:
        return _batch_line(fields)
    id = fields.pop("id", None)
    id = fields.pop("custom_id", id)
    meta = fields.pop("meta", None)
    if "messages" in fields:
        if not isinstance(fields["messages"], list) or not fields["messages"]:
            msg = "messages must be a list of at least one message"
            raise InvalidRequestError(msg)
        return Request(body=fields, id=id, meta=meta)
    if "prompt" in fields:
        prompt = fields.pop("prompt")
        if not isinstance(prompt, str):
            msg = f"prompt must be a text, got {type(prompt).__name__}"
            raise InvalidRequestError(msg)
        request = chat(prompt, **fields)
        return Request(body=request.body, id=id, meta=meta)
    msg = f"expected a body, prompt or messages, got only {', '.join(sorted(fields)) or 'an empty object'}"
    raise InvalidRequestError(msg)


def _batch_line(fields: dict[str, Any]) -> Request:
    url, body = fields.get("url", "/v1/chat/completions"), fields["body"]
    method = fields.get("method", "POST")
    if not isinstance(body, dict):
        msg = f"body must be an object, got {type(body).__name__}"
        raise InvalidRequestError(msg)
    if method != "POST":
        msg = f"method must be POST, got {method!r}"
        raise InvalidRequestError(msg)
    for end, operation in OPERATIONS.items():
        if isinstance(url, str) and url.endswith(end):
            return Request(body=body, id=fields.get("custom_id"), operation=operation)
    msg = f"url must end with one of {', '.join(OPERATIONS)}, got {url!r}"
    raise InvalidRequestError(msg)
