"""What the simulated provider reads and says in OpenAI's dialect: chats and plain completions. Pure."""

from __future__ import annotations

from functools import partial
from itertools import chain, zip_longest
from typing import TYPE_CHECKING, Any, Final

import msgspec

from rxllm.testing._answers import (
    CREATED,
    JSON,
    LENGTH,
    Answer,
    Ask,
    RefusedBodyError,
    ToolUse,
    Wish,
    check_counts,
    cut,
    decode,
    encode,
    fingerprint,
    log_probabilities,
    say,
    summary,
    text_of,
    tokens,
    wish_of,
)
from rxllm.testing._events import Events, cut_up, event

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rxllm.testing._answers import AnswerFunction

ANY: Final = {"properties": {"text": {"type": "string"}}}  # for an object of no schema
DONE: Final = b"data: [DONE]\n\n"
FAILED: Final = {"error": {"message": "The server had an error.", "type": "server_error", "param": None, "code": None}}


class Message(msgspec.Struct):
    """One message of a chat; `content` is a text or a list of parts."""

    role: str = ""
    content: Any = None


class StreamOptions(msgspec.Struct):
    """How to stream."""

    include_usage: bool | None = None


class Function(msgspec.Struct):
    """A function that the model may call, or has to."""

    name: str = ""
    parameters: Any = None


class Tool(msgspec.Struct):
    """A tool that the model may call, or has to; only functions are served."""

    function: Function | None = None


class Schema(msgspec.Struct, rename={"value": "schema"}):
    """The schema of an answer."""

    value: Any = None


class ResponseFormat(msgspec.Struct):
    """What an answer has to be."""

    type: str = "text"
    json_schema: Schema | None = None


class ChatBody(msgspec.Struct):
    """What the server reads of a chat request."""

    messages: list[Message]
    model: str = ""
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    user: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: str | Tool | None = None
    response_format: ResponseFormat | None = None
    logprobs: bool | None = None


class CompletionBody(msgspec.Struct):
    """What the server reads of a request for plain completions."""

    prompt: str | list[str]
    model: str = ""
    max_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    user: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


_chat = msgspec.json.Decoder(ChatBody)
_completion = msgspec.json.Decoder(CompletionBody)


def read_chat(raw: bytes, mode: str | AnswerFunction) -> Ask:
    """Read the body of a chat request."""
    body = _chat.decode(raw)
    if not body.messages:
        raise RefusedBodyError("'messages' must have at least 1 item.", "messages")
    each = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    n = check_counts("max_tokens", each, body.n)
    if len(body.messages) == 1 and isinstance(content := body.messages[0].content, str):
        prompt = content
        size = tokens(prompt)
    else:
        texts = [text_of(message.content) for message in body.messages]
        prompt = texts[-1]
        size = sum(map(tokens, texts))
    mark = fingerprint(prompt)
    seed = body.seed or 0
    wish = _wish(body) if body.tools or body.response_format else None

    def answer() -> Answer:
        if n == 1 and wish is None and isinstance(mode, str) and not body.logprobs:  # the fast path of benchmarks
            text, used, finish = cut(prompt if mode == "echo" else summary(prompt, mark, seed), each)
            return Answer(
                b'{"id":"chatcmpl-%b","object":"chat.completion","created":%d,"model":%b,"choices":[{"index":0,'
                b'"message":{"role":"assistant","content":%b,"refusal":null},"logprobs":null,"finish_reason":%b}],'
                b'"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}'
                % (
                    mark.encode(),
                    CREATED,
                    encode(body.model),
                    encode(text),
                    finish,
                    size,
                    used,
                    size + used,
                ),
                used,
            )
        total = 0
        choices: list[JSON] = []
        for index in range(n):
            said = say(mode, prompt, mark, seed + index, raw, wish)
            message: JSON = {"role": "assistant", "content": None, "refusal": None}
            told: JSON | None = None
            if isinstance(said, str):
                message["content"], used, finish = cut(said, each)
                reason = "length" if finish is LENGTH else "stop"
                told = {"content": log_probabilities(message["content"]), "refusal": None} if body.logprobs else None
            else:
                message.update(_call(said, mark, index) if isinstance(said, ToolUse) else said)
                used = tokens(encode(said).decode())
                reason = "tool_calls" if message.get("tool_calls") else "stop"
            total += used
            choices.append({"index": index, "message": message, "logprobs": told, "finish_reason": reason})
        return Answer(_reply(f"chatcmpl-{mark}", "chat.completion", body.model, choices, size, total), total)

    stream = partial(chat_events, usage=_wants_usage(body.stream_options)) if body.stream else None
    return Ask(mark, body.user, body.model, size, None if each is None else each * n, answer, stream)


def read_completion(raw: bytes, mode: str | AnswerFunction) -> Ask:
    """Read the body of a request for plain completions: one choice for each prompt and `n`."""
    body = _completion.decode(raw)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not prompts:
        raise RefusedBodyError("'prompt' must have at least 1 item.", "prompt")
    each = 16 if body.max_tokens is None else body.max_tokens  # the vendor's default
    n = check_counts("max_tokens", each, body.n)
    size = sum(map(tokens, prompts))
    mark = fingerprint("\n".join(prompts))

    def answer() -> Answer:
        total = 0
        choices: list[JSON] = []
        for prompt in prompts:
            for variant in range(n):
                said = say(mode, prompt, fingerprint(prompt), (body.seed or 0) + variant, raw)
                text, used, finish = cut(said if isinstance(said, str) else encode(said).decode(), each)
                total += used
                reason = "length" if finish is LENGTH else "stop"
                choices.append({"index": len(choices), "text": text, "logprobs": None, "finish_reason": reason})
        return Answer(_reply(f"cmpl-{mark}", "text_completion", body.model, choices, size, total), total)

    stream = partial(completion_events, usage=_wants_usage(body.stream_options)) if body.stream else None
    return Ask(mark, body.user, body.model, size, each * n * len(prompts), answer, stream)


# streamed


def chat_events(reply: bytes, chunks: int | None, *, usage: bool) -> Events:
    """Return the events that say the same as the body of a chat completion, the choices taking turns."""
    body = decode(reply)
    every = {name: body[name] for name in ("id", "created", "model")} | {"object": "chat.completion.chunk"}

    def chunk(choice: JSON) -> bytes:
        return event(every | {"choices": [choice]} | ({"usage": None} if usage else {}))

    choices = body["choices"]
    shown = [[chunk(piece) for piece in _chat_pieces(choice, chunks)] for choice in choices]
    last = [chunk(_piece(choice, {}, finish=choice["finish_reason"])) for choice in choices]
    return _in_turns(shown, last, every | {"choices": [], "usage": body["usage"]} if usage else None)


def completion_events(reply: bytes, chunks: int | None, *, usage: bool) -> Events:
    """Return the events that say the same as the body of a plain completion, the choices taking turns."""
    body = decode(reply)
    every = {name: body[name] for name in ("id", "object", "created", "model")}

    def chunk(choice: JSON, text: str, finish: str | None = None) -> bytes:
        piece = {"index": choice["index"], "text": text, "logprobs": None, "finish_reason": finish}
        return event(every | {"choices": [piece]} | ({"usage": None} if usage else {}))

    choices = body["choices"]
    shown = [[chunk(choice, text) for text in cut_up(choice["text"], chunks) or [""]] for choice in choices]
    last = [chunk(choice, "", choice["finish_reason"]) for choice in choices]
    return _in_turns(shown, last, every | {"choices": [], "usage": body["usage"]} if usage else None)


def _in_turns(shown: list[list[bytes]], last: list[bytes], usage: JSON | None) -> Events:
    """Return the events of all choices, one of each in turn; `usage` is what comes after their last ones."""
    turns = chain.from_iterable(zip_longest(*shown))
    end = last if usage is None else [*last, event(usage)]
    return Events([piece for piece in turns if piece is not None], end, [DONE], event(FAILED))


def _chat_pieces(choice: JSON, chunks: int | None) -> Iterator[JSON]:
    """Yield the pieces of one choice: the role and what is not cut up, thoughts, content, calls."""
    message = dict(choice["message"])
    content, calls = message.get("content"), message.pop("tool_calls", None) or ()
    thoughts = {name: message.pop(name) for name in ("reasoning_content", "reasoning") if message.get(name)}
    yield _piece(choice, {**message, "content": "" if isinstance(content, str) else content})
    for name, text in thoughts.items():
        for part in cut_up(text, chunks):
            yield _piece(choice, {name: part})
    if isinstance(content, str):
        told: list[JSON] = [] if choice["logprobs"] is None else choice["logprobs"]["content"]
        at = 0
        for part in cut_up(content, chunks):
            spoken = told[(at + 3) // 4 : (at + len(part) + 3) // 4]  # the tokens that begin in this part
            at += len(part)
            yield _piece(choice, {"content": part}, {"content": spoken, "refusal": None} if told else None)
    for index, call in enumerate(calls):
        function = call.get("function") or {}
        yield _piece(choice, {"tool_calls": [{**call, "index": index, "function": {**function, "arguments": ""}}]})
        for part in cut_up(function.get("arguments", ""), chunks):
            yield _piece(choice, {"tool_calls": [{"index": index, "function": {"arguments": part}}]})


def _piece(choice: JSON, delta: JSON, told: JSON | None = None, finish: str | None = None) -> JSON:
    return {"index": choice["index"], "delta": delta, "logprobs": told, "finish_reason": finish}


def _wants_usage(options: StreamOptions | None) -> bool:
    return bool(options and options.include_usage)


# parts of replies


def _wish(body: ChatBody) -> Wish | None:
    tools = [(tool.function.name, tool.function.parameters) for tool in body.tools or () if tool.function is not None]
    wanted = body.tool_choice
    choice = (wanted.function or Function()).name if isinstance(wanted, Tool) else wanted
    form = body.response_format or ResponseFormat()
    schema = {"json_schema": form.json_schema and form.json_schema.value, "json_object": ANY}.get(form.type)
    return wish_of(schema, tools, choice == "required" or choice)


def _call(use: ToolUse, mark: str, index: int) -> JSON:
    function = {"name": use.name, "arguments": use.arguments}
    return {"tool_calls": [{"id": f"call_{mark}{index}", "type": "function", "function": function}]}


def _reply(  # noqa: PLR0917 - private
    name: str, kind: str, model: str, choices: list[JSON], prompt_tokens: int, completion_tokens: int
) -> bytes:
    return encode(
        {
            "id": name,
            "object": kind,
            "created": CREATED,
            "model": model,
            "choices": choices,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
    )
