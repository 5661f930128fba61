"""The answers of OpenAI's embeddings, and its list of models."""

from __future__ import annotations

import sys
from array import array
from typing import TYPE_CHECKING, Any, cast

import msgspec

from rxllm import clock
from rxllm.messages import Reply
from rxllm.providers._shared import fields_of, items_of, name_of
from rxllm.providers.faults import fault_in, parsed, unreadable
from rxllm.providers.openai_fields import usage_of

if TYPE_CHECKING:
    from collections.abc import Mapping

__all__ = ["decode_embeddings", "decode_models"]


class _Embedding(msgspec.Struct, gc=False):
    embedding: bytes | list[float]  # bytes: floats of 32 bits, little end first, which came as base64
    index: int | None = None


class _Embeddings(msgspec.Struct):
    data: list[_Embedding]
    model: str | None = None
    usage: Any = None


_decoder = msgspec.json.Decoder(_Embeddings)


def decode_embeddings(status: int, headers: Mapping[str, str], body: bytes, wanted: int | None = None) -> Reply[Any]:
    """Return the reply of a complete answer with a 2xx status; its value is a list of vectors, `array("f")` each.

    Args:
        status: of the answer.
        headers: of the answer.
        body: of the answer.
        wanted: how many vectors were asked for; None: unknown.

    Raises:
        CallError: it cannot be understood, or has another number of vectors.
    """
    try:
        said = _decoder.decode(body)
        vectors = [_vector(one.embedding) for one in _in_order(said.data)]
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, OverflowError, ValueError) as error:
        reason = str(error)
    else:
        if vectors and wanted in {None, len(vectors)}:
            return Reply(value=vectors, usage=usage_of(said.usage), model=said.model, status=status, raw=body)
        reason = f"it has {len(vectors)} vectors" + (f" for {wanted} inputs" if wanted else "")
    raise _wrong(status, headers, body, reason)


def _in_order(data: list[_Embedding]) -> list[_Embedding]:
    """Return the vectors in the order of what they are of."""
    if all(one.index == place for place, one in enumerate(data)):
        return data
    if len({one.index for one in data}) < len(data):  # of no use: some servers say nothing, or 0 of all
        return data
    return sorted(data, key=lambda one: -1 if one.index is None else one.index)


def _vector(said: bytes | list[float]) -> array[float]:
    if not isinstance(said, bytes):
        return array("f", said)
    vector = array("f")
    vector.frombytes(said)
    if sys.byteorder == "big":
        vector.byteswap()
    return vector


def decode_models(status: int, headers: Mapping[str, str], body: bytes) -> Reply[Any]:
    """Return the reply of a complete answer with a 2xx status; its value is the list of the models' names.

    Raises:
        CallError: it cannot be understood.
    """
    said = parsed(body)
    data: Any = fields_of(said).get("data", said)  # Together's is the list itself
    if not isinstance(data, list):
        raise _wrong(status, headers, body, "it has no list of models")
    names = [name_of(fields_of(model).get("id")) for model in items_of(cast("object", data))]
    return Reply(value=[name for name in names if name is not None], status=status, raw=body)


def _wrong(status: int, headers: Mapping[str, str], body: bytes, reason: str) -> Exception:
    said = fields_of(parsed(body))
    if said.get("error") or said.get("object") == "error":
        return fault_in("openai", said, now=clock.wall(), status=status, headers=headers)
    return unreadable(status, headers, body, reason)
