"""What the simulated provider reads and says of embeddings, in OpenAI's dialect. Pure."""

from __future__ import annotations

import base64
import struct
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Final

import msgspec

from rxllm.testing._answers import JSON, Answer, Ask, RefusedBodyError, encode, fingerprint, tokens

if TYPE_CHECKING:
    from rxllm.testing._answers import AnswerFunction

EMBEDDING_SIZE: Final = 8


class EmbeddingsBody(msgspec.Struct):
    """What the server reads of a request for embeddings."""

    input: str | list[Any]
    model: str = ""
    dimensions: int | None = None
    encoding_format: str | None = None
    user: str | None = None


_embeddings = msgspec.json.Decoder(EmbeddingsBody)


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
    texts = [one if isinstance(one, str) else encode(one).decode() for one in inputs]
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
        return Answer(encode({"object": "list", "data": data, "model": body.model, "usage": usage}), 0)

    return Ask(mark, body.user, body.model, size, 0, answer)


def embedding(text: str, dimensions: int) -> list[float]:
    """Return a unit vector that depends on the text alone."""
    raw = b""
    while len(raw) < dimensions:
        raw += blake2b(text.encode("utf-8", "surrogatepass"), salt=len(raw).to_bytes(8, "big")).digest()
    values = [byte - 127.5 for byte in raw[:dimensions]]
    norm = sum(value * value for value in values) ** 0.5
    return [value / norm for value in values]
