"""OpenAI's dialect, as many servers speak it: chat completions, completions, responses, embeddings, models."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, NamedTuple, TypeVar, cast
from urllib.parse import quote

import msgspec

from rxllm import clock
from rxllm.errors import InvalidRequestError, UnsupportedError, check_choice
from rxllm.messages import Request, chat
from rxllm.policies.accounting import GENERIC, Accounting
from rxllm.providers._shared import Priced, Size, count, encoded, fields_of
from rxllm.providers.base import Call
from rxllm.providers.faults import fault_of, parsed
from rxllm.providers.openai_chat import decode_completion
from rxllm.providers.openai_chunks import ChatAssembler, CompletionAssembler
from rxllm.providers.openai_embeddings import decode_embeddings, decode_models
from rxllm.providers.openai_fields import refusal_in, size_of
from rxllm.providers.openai_responses import ResponseAssembler, decode_response
from rxllm.providers.presets import ANY, Preset

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rxllm.messages import Reply
    from rxllm.providers.base import Assembler
    from rxllm.providers.output import Output

__all__ = ["OpenAIProvider", "Operation"]

T = TypeVar("T")

Operation = Literal["chat", "completions", "responses", "embeddings", "models"]


class _Route(NamedTuple):
    """Where an operation is, and what stands where in its body."""

    path: str
    prompt: tuple[str, ...]  # the fields that a prompt is in; the first is where a plain one goes
    most: tuple[str, ...] = ()  # those that say how many tokens an answer may have
    streams: bool = True
    deployed: bool = True  # it is below the deployment, where a server has such


ROUTES: dict[str, _Route] = {
    "chat": _Route("/chat/completions", ("messages",), ("max_completion_tokens", "max_tokens")),
    "completions": _Route("/completions", ("prompt",), ("max_tokens",)),
    "responses": _Route("/responses", ("input", "instructions"), ("max_output_tokens",), deployed=False),
    "embeddings": _Route("/embeddings", ("input",), streams=False),
    "models": _Route("/models", (), streams=False, deployed=False),
}
CHAT = ROUTES["chat"]
STREAMED = "text/event-stream"
NOTHING: dict[str, Any] = {}


class OpenAIProvider(Priced, Generic[T]):
    """OpenAI's dialect. A request's body goes as it is, with the model added unless it names one.

    What else is added, unless the body has it: `stream`, and `stream_options` for the usage of a streamed answer;
    `encoding_format` of embeddings, whose vectors are `array("f")` whichever way they come; and where `output` goes.

    Args:
        model: the model's name.
        accounting: how the server counts tokens when it admits a request.
        count_tokens: request -> the tokens of its prompt; None: an estimate from its size, which replies calibrate.
        operation: of the requests that plain items stand for.
        output: what the answers of chats and responses are to be; None: text.
        preset: what the server does otherwise.

    Raises:
        ConfigError: the model is not a text, or another argument of another kind.
    """

    def __init__(
        self,
        model: str,
        *,
        accounting: Accounting = GENERIC,
        count_tokens: Callable[[Request], float] | None = None,
        operation: Operation = "chat",
        output: Output[T] | None = None,
        preset: Preset = ANY,
    ) -> None:
        super().__init__(model, accounting, count_tokens)
        check_choice("operation", operation, tuple(ROUTES))
        self.operation = operation
        self.output = output
        self.preset = preset
        self._moved = preset.deployments or bool(preset.query)
        self._formats = {} if output is None else _formats(output)
        # What is sent unless the body has it, by operation
        self._added: dict[str, dict[str, Any]] = {"embeddings": {"encoding_format": "base64"}} if preset.base64 else {}
        usage: dict[str, Any] = {"stream_options": {"include_usage": True}} if preset.stream_usage else {}
        streamed = {"stream": True}
        self._streamed = {"chat": streamed | usage, "completions": streamed | usage, "responses": streamed}

    def encode(self, request: Request, *, stream: bool = False) -> Call:
        """Return the call of `request`; see `Provider`."""
        operation = request.operation
        route = ROUTES.get(operation)
        if route is None:
            msg = f"operation must be one of {', '.join(ROUTES)}, got {operation!r}"
            raise UnsupportedError(msg)
        if stream and not route.streams:
            msg = f"stream: the answers to {operation} come in one piece"
            raise UnsupportedError(msg)
        if operation == "models":
            if request.body:
                msg = f"the body of a models request must be None, got {type(request.body).__name__}"
                raise InvalidRequestError(msg)
            return Call(self._path(route, self.model), b"", "GET")
        fields = _body(request, stream=stream)
        body = {"model": self.model, **(self._streamed if stream else self._added).get(operation, NOTHING), **fields}
        if operation in self._formats:
            self._ask_for_output(operation, body)
        path = self._path(route, body["model"]) if self._moved else route.path
        return Call(path, encoded(body), accept=STREAMED) if stream else Call(path, encoded(body))

    def _ask_for_output(self, operation: str, body: dict[str, Any]) -> None:
        form = self._formats[operation]
        if operation == "chat":
            body.setdefault("response_format", form)
            return
        if body.get("background"):
            msg = "background: the answer is not there yet when the server replies: ask for it without output"
            raise InvalidRequestError(msg)
        text: Any = body.get("text")
        body["text"] = {"format": form, **fields_of(text)}

    def _path(self, route: _Route, model: object) -> str:
        preset = self.preset
        path = route.path
        if preset.deployments and route.deployed:
            path = f"/deployments/{quote(str(model), safe='')}{path}"
        return f"{path}?{preset.query}" if preset.query else path

    def decode(self, request: Request, status: int, headers: Mapping[str, str], body: bytes) -> Reply[T]:
        """Return the reply of a complete answer; see `Provider`."""
        if not 200 <= status < 300:  # noqa: PLR2004
            raise fault_of("openai", status, headers, body, now=clock.wall())
        operation = request.operation
        if operation in {"chat", "completions"}:
            reply = decode_completion(status, headers, body)
        elif operation == "responses":
            reply = decode_response(status, headers, body)
        elif operation == "embeddings":
            return decode_embeddings(status, headers, body, _inputs(request.body))
        else:
            return decode_models(status, headers, body)
        if self.output is not None and operation in self._formats:
            refusal = None if reply.text else refusal_in(parsed(reply.raw))
            return self.output.read(reply, refusal=refusal)
        return cast("Reply[T]", reply)

    def assembler(self, request: Request, status: int, headers: Mapping[str, str]) -> Assembler[T]:
        """Return what puts a streamed answer together; see `Provider`."""
        decode = partial(self.decode, request, status, headers)
        if request.operation == "responses":
            return ResponseAssembler(decode, status, headers)
        kind = ChatAssembler[T] if request.operation == "chat" else CompletionAssembler[T]
        return kind(decode, status, headers, _answers(request))

    def repeatable(self, request: Request) -> bool:
        """Say whether a second try is safe when nobody knows what became of the first.

        Not a response in the background: the first goes on, and is paid for, when nobody waits for it. Nor one in a
        conversation, which would have it twice. What is only stored costs nothing and can be repeated.
        """
        body = fields_of(request.body)
        return request.operation != "responses" or not (body.get("background") or body.get("conversation"))

    def measure(self, request: Request) -> Size:
        """Return the size of a request, its prompt in bytes."""
        body = fields_of(request.body)
        route = ROUTES.get(request.operation) or CHAT
        size = 0
        for name in route.prompt:
            size += size_of(body.get(name))
        most = None if route.most else 0
        for name in route.most:
            if name in body and (most := count(body[name]) or None):
                break
        return Size(str(body.get("model", self.model)), size, most, _answers(request))

    def wrap(self, item: object) -> Request:
        """Return the request that a plain item stands for: a prompt, or what is to be embedded."""
        operation, prompt = self.operation, cast("Any", item)
        if operation == "models":
            if item is None:
                return Request(body=None, operation=operation)
            wanted = "None, as models takes no prompt"
        elif isinstance(item, str):
            return chat(item) if operation == "chat" else _asking(operation, prompt)
        elif operation == "embeddings":
            if isinstance(prompt, list | tuple) and prompt:
                return _asking(operation, list(cast("list[Any]", prompt)))
            wanted = "a text or a list of them"
        else:
            wanted = "a prompt (str)"
        msg = f"expected a Request or {wanted}, got {type(item).__name__}"
        raise InvalidRequestError(msg)


def _asking(operation: str, item: Any) -> Request:
    return Request(body={ROUTES[operation].prompt[0]: item}, operation=operation)


def _body(request: Request, *, stream: bool) -> dict[str, Any]:
    """Return the body of a request, which is not ours to change.

    Raises:
        InvalidRequestError: it is no dict.
        UnsupportedError: it says that the answer is to come otherwise than the call does.
    """
    body: object = request.body
    if not isinstance(body, dict):
        msg = f"the body of a {request.operation} request must be a dict, got {type(body).__name__}"
        raise InvalidRequestError(msg)
    fields = cast("dict[str, Any]", body)
    if "stream" in fields and bool(fields["stream"]) is not stream:
        msg = "stream: leave it out of the body; call(stream=True) and client.stream(request) send it"
        raise UnsupportedError(msg)
    return fields


def _formats(output: Output[Any]) -> dict[str, Any]:
    """Return how each operation is told what its answer is to be, as JSON that is ready to be sent."""
    form = {"name": output.name, "schema": output.schema, "strict": output.strict}
    return {
        "chat": msgspec.Raw(msgspec.json.encode({"type": "json_schema", "json_schema": form})),
        "responses": msgspec.Raw(msgspec.json.encode({"type": "json_schema", **form})),
    }


def _answers(request: Request) -> int:
    """Return how many answers a request asks for."""
    body = fields_of(request.body)
    answers = count(body.get("n")) or 1
    return answers * _inputs(body, "prompt") if request.operation == "completions" else answers


def _inputs(body: object, name: str = "input") -> int:
    """Return how many texts there are in a field: a list of texts, or of lists of tokens; else it is one."""
    value: Any = fields_of(body).get(name)
    if isinstance(value, list | tuple) and value and not isinstance(value[0], int):
        return len(cast("list[Any]", value))
    return 1
