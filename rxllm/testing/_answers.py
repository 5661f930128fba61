"""What the simulated model says, and its OpenAI-shaped requests and replies. Pure and deterministic."""

from __future__ import annotations

import base64
import re
import struct
from collections.abc import Callable, Mapping
from hashlib import blake2b
from typing import Any, Final, NamedTuple, cast

import msgspec

JSON = dict[str, Any]
AnswerFunction = Callable[[str, JSON], str | JSON]

CREATED: Final = 1_767_225_600  # every reply is from 2026-01-01, so that replies are the same in every run
SUMMARY_WORDS: Final = 24
OPENINGS: Final = ("In short", "Briefly", "In one sentence", "To sum up")
EMBEDDING_SIZE: Final = 8

SENTENCE_END: Final = re.compile(r"[.!?](?=\s)|\n\s*\n")


def fingerprint(text: str) -> str:
    """Return 12 hexadecimal digits that tell one prompt from another.

    A "summary" ends with the fingerprint of its prompt in brackets, and the `id` of every reply has it: so a
    test sees whether an answer belongs to its request.

    Example:
        >>> fingerprint("Say hello.")
        '7e088bc3ec97'
    """
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=6).hexdigest()


def tokens(text: str) -> int:
    """Return about how many tokens a text has: one for each four characters begun.

    Example:
        >>> tokens("four"), tokens("fives"), tokens("")
        (1, 2, 0)
    """
    return (len(text) + 3) >> 2


def summary(prompt: str, mark: str, variant: int = 0) -> str:
    """Return one sentence made from the prompt: the first sentence of what follows its instruction."""
    text = prompt
    for separator in ("\n\n", ":\n", ": "):
        instruction, found, rest = prompt.partition(separator)
        if found and instruction.strip() and rest.strip():
            text = rest
            break
    text = text.strip()
    end = SENTENCE_END.search(text)
    words = (text[: end.start()] if end else text).rstrip(".!?").split(None, SUMMARY_WORDS)
    if not words:
        words = ["nothing", "was", "asked"]
    elif len(words) > SUMMARY_WORDS:
        words[SUMMARY_WORDS:] = ["and", "so", "on"]
    opening = OPENINGS[(int(mark[:2], 16) + variant) % len(OPENINGS)]
    return f"{opening}: {' '.join(words)}. [{mark}]"


class Message(msgspec.Struct):
    """One message of a chat; `content` is a text or a list of parts."""

    role: str = ""
    content: Any = None


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


class CompletionBody(msgspec.Struct):
    """What the server reads of a request for plain completions."""

    prompt: str | list[str]
    model: str = ""
    max_tokens: int | None = None
    n: int | None = None
    seed: int | None = None
    user: str | None = None
    stream: bool | None = None


class EmbeddingsBody(msgspec.Struct):
    """What the server reads of a request for embeddings."""

    input: str | list[Any]
    model: str = ""
    dimensions: int | None = None
    encoding_format: str | None = None
    user: str | None = None


class Ask(NamedTuple):
    """A request as the server judges it, and how to answer it."""

    mark: str  # fingerprint of the prompt
    user: str | None
    model: str
    prompt_tokens: int
    max_tokens: int | None  # for all answers together
    answer: Callable[[], Answer]


class Answer(NamedTuple):
    """The body of a reply but for its id, which begins with the fingerprint."""

    body: bytes
    completion_tokens: int
    failed: bool = False  # the caller's `answer` raised; the body is an error


_chat = msgspec.json.Decoder(ChatBody)
_completion = msgspec.json.Decoder(CompletionBody)
_embeddings = msgspec.json.Decoder(EmbeddingsBody)
_encode = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder(JSON).decode


class RefusedBodyError(Exception):
    """The body is no request for this route; `param` names what is wrong."""

    def __init__(self, text: str, param: str | None = None) -> None:
        super().__init__(text, param)
        self.text = text
        self.param = param


def read_chat(raw: bytes, mode: str | AnswerFunction) -> Ask:
    """Read the body of a chat request."""
    body = _chat.decode(raw)
    if not body.messages:
        raise RefusedBodyError("'messages' must have at least 1 item.", "messages")
    each = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    n = _counts(each, body.n, stream=body.stream)
    if len(body.messages) == 1 and isinstance(content := body.messages[0].content, str):
        prompt = content
        size = tokens(prompt)
    else:
        texts = [_text(message.content) for message in body.messages]
        prompt = texts[-1]
        size = sum(map(tokens, texts))
    mark = fingerprint(prompt)
    seed = body.seed or 0

    def answer() -> Answer:
        if n == 1 and isinstance(mode, str):  # the fast path of benchmarks
            text, used, finish = _cut(prompt if mode == "echo" else summary(prompt, mark, seed), each)
            return Answer(
                b'{"id":"chatcmpl-%b","object":"chat.completion","created":%d,"model":%b,"choices":[{"index":0,'
                b'"message":{"role":"assistant","content":%b,"refusal":null},"logprobs":null,"finish_reason":%b}],'
                b'"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}}'
                % (
                    mark.encode(),
                    CREATED,
                    _encode(body.model),
                    _encode(text),
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
            said = _say(mode, prompt, mark, seed + index, raw)
            message: JSON = {"role": "assistant", "content": None, "refusal": None}
            if isinstance(said, str):
                message["content"], used, finish = _cut(said, each)
                reason = "length" if finish is LENGTH else "stop"
            else:
                message.update(said)
                used = tokens(_encode(said).decode())
                reason = "tool_calls" if said.get("tool_calls") else "stop"
            total += used
            choices.append({"index": index, "message": message, "logprobs": None, "finish_reason": reason})
        return Answer(_reply(f"chatcmpl-{mark}", "chat.completion", body.model, choices, size, total), total)

    return Ask(mark, body.user, body.model, size, None if each is None else each * n, answer)


def read_completion(raw: bytes, mode: str | AnswerFunction) -> Ask:
    """Read the body of a request for plain completions: one choice for each prompt and `n`."""
    body = _completion.decode(raw)
    prompts = [body.prompt] if isinstance(body.prompt, str) else body.prompt
    if not prompts:
        raise RefusedBodyError("'prompt' must have at least 1 item.", "prompt")
    each = 16 if body.max_tokens is None else body.max_tokens  # the vendor's default
    n = _counts(each, body.n, stream=body.stream)
    size = sum(map(tokens, prompts))
    mark = fingerprint("\n".join(prompts))

    def answer() -> Answer:
        total = 0
        choices: list[JSON] = []
        for prompt in prompts:
            for variant in range(n):
                said = _say(mode, prompt, fingerprint(prompt), (body.seed or 0) + variant, raw)
                text, used, finish = _cut(said if isinstance(said, str) else _encode(said).decode(), each)
                total += used
                reason = "length" if finish is LENGTH else "stop"
                choices.append({"index": len(choices), "text": text, "logprobs": None, "finish_reason": reason})
        return Answer(_reply(f"cmpl-{mark}", "text_completion", body.model, choices, size, total), total)

    return Ask(mark, body.user, body.model, size, each * n * len(prompts), answer)


def read_embeddings(raw: bytes, mode: str | AnswerFunction) -> Ask:  # noqa: ARG001 - one signature for all routes
    """Read the body of a request for embeddings: texts or lists of token numbers."""
    body = _embeddings.decode(raw)
    inputs = body.input
    if isinstance(inputs, str) or (inputs and isinstance(inputs[0], int)):
        inputs = [inputs]
    if not inputs:
        raise RefusedBodyError("'input' must have at least 1 item.", "input")
    dimensions = EMBEDDING_SIZE if body.dimensions is None else body.dimensions
    if not 1 <= dimensions <= 4096:  # noqa: PLR2004 - larger than any model's
        raise RefusedBodyError(f"'dimensions' must be between 1 and 4096, got {dimensions}.", "dimensions")
    texts = [one if isinstance(one, str) else _encode(one).decode() for one in inputs]
    size = sum(tokens(one) if isinstance(one, str) else len(one) for one in inputs)
    mark = fingerprint("\n".join(texts))

    def answer() -> Answer:
        data: list[JSON] = []
        for index, text in enumerate(texts):
            vector: list[float] | str = embedding(text, dimensions)
            if body.encoding_format == "base64":
                vector = base64.b64encode(struct.pack(f"<{dimensions}f", *vector)).decode()
            data.append({"object": "embedding", "index": index, "embedding": vector})
        usage = {"prompt_tokens": size, "total_tokens": size}
        return Answer(_encode({"object": "list", "data": data, "model": body.model, "usage": usage}), 0)

    return Ask(mark, body.user, body.model, size, 0, answer)


def embedding(text: str, dimensions: int) -> list[float]:
    """Return a unit vector that depends on the text alone."""
    raw = b""
    while len(raw) < dimensions:
        raw += blake2b(text.encode("utf-8", "surrogatepass"), salt=len(raw).to_bytes(8, "big")).digest()
    values = [byte - 127.5 for byte in raw[:dimensions]]
    norm = sum(value * value for value in values) ** 0.5
    return [value / norm for value in values]


def _text(content: object) -> str:
    """Return the text of a message's content; parts that are no text count for nothing."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        items = cast("list[JSON | str]", content)
        parts = [part.get("text") for part in items if isinstance(part, dict)]
        return "\n".join(part for part in parts if isinstance(part, str))
    return ""


STOP: Final = b'"stop"'
LENGTH: Final = b'"length"'


def _cut(text: str, most: int | None) -> tuple[str, int, bytes]:
    """Return the text within `most` tokens, its tokens, and the finish reason as JSON."""
    used = tokens(text)
    return (text[: most * 4], most, LENGTH) if most is not None and used > most else (text, used, STOP)


def _say(mode: str | AnswerFunction, prompt: str, mark: str, variant: int, raw: bytes) -> str | JSON:
    if mode == "echo":
        return prompt
    if isinstance(mode, str):
        return summary(prompt, mark, variant)
    said: object = mode(prompt, _decode(raw))
    if not isinstance(said, str | Mapping):
        raise TypeError(f"answer must return a str or a dict (a message), got {said!r}")
    return said if isinstance(said, str) else dict(said)


def _counts(each: int | None, n: int | None, *, stream: bool | None) -> int:
    if stream:
        raise RefusedBodyError("This server does not stream; leave 'stream' out.", "stream")
    if each is not None and each < 1:
        raise RefusedBodyError(f"'max_tokens' must be at least 1, got {each}.", "max_tokens")
    if n is not None and not 1 <= n <= 128:  # noqa: PLR2004 - the vendor's bound
        raise RefusedBodyError(f"'n' must be between 1 and 128, got {n}.", "n")
    return 1 if n is None else n


def _reply(  # noqa: PLR0917 - private
    name: str, kind: str, model: str, choices: list[JSON], prompt_tokens: int, completion_tokens: int
) -> bytes:
    return _encode(
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
