"""The dialect of Scale's LLM Engine: completions."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast
from urllib.parse import quote

import msgspec

from rxllm.clock import wall
from rxllm.errors import (
    CallError,
    ConfigError,
    DecodeError,
    InvalidRequestError,
    UnsupportedError,
    check_choice,
    check_number,
    check_text,
)
from rxllm.messages import Chunk, Reply, Request, Usage
from rxllm.policies.accounting import GENERIC, Accounting
from rxllm.providers._shared import (
    UNREADABLE,
    Priced,
    Size,
    body_of,
    count,
    encoded,
    fields_of,
    name_of,
    size_of,
    text_of,
    whole,
)
from rxllm.providers.base import Call
from rxllm.providers.faults import fault_in, fault_of, parsed, request_id, unreadable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rxllm.providers.base import Event
    from rxllm.providers.output import Output

__all__ = ["CompletionAssembler", "LLMEngineProvider"]

T = TypeVar("T")

PATHS = {False: "/v1/llm/completions-sync", True: "/v1/llm/completions-stream"}
DEFAULTS: dict[str, Any] = {"max_new_tokens": 20, "temperature": 0.2}  # the server wants both; its client sends these
GUIDES = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")


class LLMEngineProvider(Priced, Generic[T]):
    """Completions, in one piece or streamed.

    The body of a request goes as it is, with `max_new_tokens` (20) and `temperature` (0.2) added unless it has them;
    a `model` in it goes where this dialect has it, into the query. Fields that this dialect knows are checked:

        prompt                                   a text; needed
        max_new_tokens                           a whole number >= 1
        temperature                              0 to 1
        presence_penalty, frequency_penalty      0 to 2
        top_k                                    a whole number >= -1; -1: all
        top_p                                    above 0, to 1
        stop_sequences                           a list of texts
        return_token_log_probs, skip_special_tokens, include_stop_str_in_output      True or False
        guided_json (a dict), guided_regex, guided_grammar (texts), guided_choice (a list of texts)      at most one

    All but the first three may be None. Other fields are sent unchecked.

    Args:
        model: the name of the model's endpoint.
        output: what each answer is to be, asked for as `guided_json` unless the request has a guide; None: a text.
        accounting: how the server counts tokens when it admits a request.
        count_tokens: request -> the tokens of its prompt; None: an estimate from its size, which replies calibrate.

    Raises:
        ConfigError: an argument of another kind.
    """

    def __init__(
        self,
        model: str,
        *,
        output: Output[T] | None = None,
        accounting: Accounting = GENERIC,
        count_tokens: Callable[[Request], float] | None = None,
    ) -> None:
        super().__init__(model, accounting, count_tokens)
        self.output = output

    def encode(self, request: Request, *, stream: bool = False) -> Call:
        """Return the call of `request`; see `Provider`."""
        if request.operation != "completions":
            msg = (
                f"operation must be completions, got {request.operation!r}: give a prompt (str), or "
                "Request(body={'prompt': …}, operation='completions'); chats are for rxllm.OpenAI with a base_url that "
                "ends in /v2, where newer servers speak that dialect"
            )
            raise UnsupportedError(msg)
        fields = {**DEFAULTS, **body_of(request)}
        model: Any = fields.pop("model", self.model)
        if self.output is not None and all(fields.get(guide) is None for guide in GUIDES):
            fields["guided_json"] = self.output.schema
        try:
            check_text("model", model)
            check_completion(fields)
        except ConfigError as error:
            reason = str(error)
        else:
            path = f"{PATHS[stream]}?model_endpoint_name={quote(model, safe='')}"
            return Call(path, encoded(fields), accept="text/event-stream" if stream else "application/json")
        raise InvalidRequestError(reason)

    def decode(self, request: Request, status: int, headers: Mapping[str, str], body: bytes) -> Reply[T]:  # noqa: ARG002
        """Return the reply of a complete answer; see `Provider`."""
        if not 200 <= status < 300:  # noqa: PLR2004
            raise fault_of("llm_engine", status, headers, body, now=wall())
        said = parsed(body)
        fields = fields_of(said)
        output = fields_of(fields.get("output"))
        text: Any = output.get("text")
        if not isinstance(text, str):
            if fields.get("error"):
                raise fault_in("llm_engine", said, status=status, headers=headers, now=wall())
            raise unreadable(status, headers, body, "it has no text" if fields else "it is no JSON object")
        reply: Reply[Any] = Reply(
            value=text,
            text=text,
            usage=usage_of(output),
            id=name_of(fields.get("request_id")),
            status=status,
            raw=body,
        )
        return reply if self.output is None else self.output.read(reply)

    def assembler(self, request: Request, status: int, headers: Mapping[str, str]) -> CompletionAssembler[T]:
        """Return what puts the answer to `request` together; see `Provider`."""
        return CompletionAssembler(partial(self.decode, request, status, headers), status, headers)

    def repeatable(self, request: Request) -> bool:  # noqa: ARG002
        """Say that a second try is safe: a completion leaves nothing behind."""
        return True

    def measure(self, request: Request) -> Size:
        """Return the size of a request: of its prompt."""
        body = {**DEFAULTS, **fields_of(request.body)}
        prompt = size_of(text_of(body.get("prompt")))
        return Size(str(body.get("model", self.model)), prompt, count(body["max_new_tokens"]) or None)

    def wrap(self, item: object) -> Request:
        """Return the request of a prompt."""
        if isinstance(item, str):
            return Request(body={"prompt": item}, operation="completions")
        msg = f"expected a Request or a prompt (str), got {type(item).__name__}"
        raise InvalidRequestError(msg)


# Requests


def check_completion(fields: Mapping[str, Any]) -> None:
    """Refuse values that the server refuses.

    Raises:
        ConfigError: one of them; it names the field and the value.
    """
    check_text("prompt", fields.get("prompt"), empty=True)
    check_number("max_new_tokens", fields["max_new_tokens"], least=1, integer=True)
    check_number("temperature", fields["temperature"], least=0, most=1)
    for name in fields.keys() & _CHECKS.keys():
        if fields[name] is not None:
            _CHECKS[name](name, fields[name])
    guides = [name for name in GUIDES if fields.get(name) is not None]
    if len(guides) > 1:
        msg = f"only one of {', '.join(GUIDES)} can be given, got {' and '.join(guides)}"
        raise ConfigError(msg)


def _check_penalty(name: str, value: object) -> None:
    check_number(name, value, least=0, most=2)


def _check_flag(name: str, value: object) -> None:
    check_choice(name, value, (True, False))


def _check_texts(name: str, value: object) -> None:
    if not isinstance(value, list | tuple):
        msg = f"{name} must be a list of strings, got {value!r:.80}"
        raise ConfigError(msg)
    for place, text in enumerate(cast("list[Any]", value)):
        check_text(f"{name}[{place}]", text, empty=True)


def _check_schema(name: str, value: object) -> None:
    if not isinstance(value, dict):
        msg = f"{name} must be a JSON schema as a dict, got {value!r:.80}"
        raise ConfigError(msg)


_CHECKS: dict[str, Callable[[str, object], None]] = {
    "stop_sequences": _check_texts,
    "return_token_log_probs": _check_flag,
    "presence_penalty": _check_penalty,
    "frequency_penalty": _check_penalty,
    "top_k": lambda name, value: check_number(name, value, least=-1, integer=True),
    "top_p": lambda name, value: check_number(name, value, above=0, most=1),
    "include_stop_str_in_output": _check_flag,
    "guided_json": _check_schema,
    "guided_regex": check_text,
    "guided_choice": _check_texts,
    "guided_grammar": check_text,
    "skip_special_tokens": _check_flag,
}


# Answers


def usage_of(output: object) -> Usage:
    """Return what a completion has used, as far as it can be read."""
    fields = fields_of(output)
    return Usage(
        input_tokens=whole(fields.get("num_prompt_tokens")), output_tokens=whole(fields.get("num_completion_tokens"))
    )


LEFT_OUT = frozenset({"finished", "token"})  # of the last piece: an answer in one piece has them not, or otherwise


class _Output(msgspec.Struct):
    text: str
    finished: bool
    token: msgspec.Raw = msgspec.Raw(b"null")


class _Piece(msgspec.Struct):
    output: _Output
    error: Any = None


_decoder = msgspec.json.Decoder(_Piece)


class CompletionAssembler(Generic[T]):
    """Puts a streamed completion together; see `Assembler`.

    It is complete with a piece that says so (`finished`); the end of the stream says nothing.

    Args:
        decode: the body of a completion -> its reply.
        status: of the answer.
        headers: of the answer.
    """

    __slots__ = ("_decode", "_headers", "_last", "_status", "_texts", "_tokens", "done")

    def __init__(self, decode: Callable[[bytes], Reply[T]], status: int, headers: Mapping[str, str]) -> None:
        self._decode = decode
        self._status = status
        self._headers = headers
        self._texts: list[str] = []
        self._tokens: list[msgspec.Raw] = []
        self._last = b""  # the newest piece
        self.done = False

    @property
    def text(self) -> str:
        """The text so far."""
        return "".join(self._texts)

    @property
    def usage(self) -> Usage | None:
        """What was used, as far as the server has told: the input only at the end."""
        return usage_of(fields_of(parsed(self._last)).get("output")) if self._last else None

    def feed(self, event: Event) -> Chunk | None:
        """Take the next event; return what it shows, None if that is nothing.

        Raises:
            CallError: the event is an error, or cannot be understood.
        """
        data = event.data
        try:
            piece = _decoder.decode(data)
        except UNREADABLE as error:
            piece, reason = None, str(error)
        else:
            reason = "it is an error"
        if piece is None or piece.error is not None:
            if data == b"[DONE]":  # the dialect has none; what stands before the server may add one
                return None
            raise self._error(data, reason)
        output = piece.output
        self._texts.append(output.text)
        if bytes(output.token) != b"null":
            self._tokens.append(output.token)
        self._last = data
        if not output.finished:
            return Chunk(text=output.text, raw=data) if output.text else None
        self.done = True
        return Chunk(text=output.text, finish_reason="finished", usage=self.usage, raw=data)

    def finish(self) -> Reply[T]:
        """Return the whole answer, as `decode` would have.

        Raises:
            DecodeError: it is not complete.
        """
        if not self.done:
            msg = "the answer stopped before its end: no piece of it was the finished one"
            raise DecodeError(msg, self._status, None, request_id(self._headers))
        body = fields_of(parsed(self._last))
        output = {key: value for key, value in fields_of(body.get("output")).items() if key not in LEFT_OUT}
        output |= {"text": self.text, "tokens": self._tokens or None}
        whole_body = {key: value for key, value in body.items() if key != "error"} | {"output": output}
        return self._decode(msgspec.json.encode(whole_body))

    def _error(self, data: bytes, reason: str) -> CallError:
        said = parsed(data)
        fields = fields_of(said)
        if fields.get("error"):
            begun = bool(self._texts)
            return fault_in("llm_engine", said, status=self._status, headers=self._headers, now=wall(), begun=begun)
        return DecodeError(
            f"the stream has a piece that cannot be understood: {reason}",
            self._status,
            None,
            request_id(self._headers),
            data,
        )
