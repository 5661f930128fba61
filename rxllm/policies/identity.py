"""What makes two requests the same: digests of what is asked, and how often it was asked in a run."""

from __future__ import annotations

import struct
from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

import msgspec

from rxllm.errors import InvalidRequestError

if TYPE_CHECKING:
    from rxllm.messages import Request

__all__ = ["SIZE", "Occurrences", "digest", "key_of", "model_of"]

SIZE = 16  # bytes of a digest
SMALL = 1_024  # places of a table that grows to four times, not two: it is cheap, and soon too small again

_place = struct.Struct(">QI").unpack_from  # the first 96 bits of a digest
_encode = msgspec.json.Encoder(order="deterministic").encode  # the order of keys says nothing


def digest(request: Request, model: str | None) -> bytes:
    """Return the digest of what is asked, 16 bytes: operation, model and body; never the id or `meta`.

    Args:
        request: what is asked.
        model: the one that is asked unless the body names another; None: there is none.

    Raises:
        InvalidRequestError: the body has no JSON.

    >>> from rxllm.messages import Request
    >>> one, other = Request(body={"a": 1, "b": 2}, id="x"), Request(body={"b": 2, "a": 1})
    >>> digest(one, "m") == digest(other, "m"), digest(one, "m") == digest(one, "n")
    (True, False)
    """
    body: Any = request.body
    if isinstance(body, dict) and "model" in body:
        model = None
    try:
        asked = _encode((request.operation, model, body))
    except (TypeError, ValueError, RecursionError) as wrong:  # no JSON, text that is no UTF-8, a loop
        reason = str(wrong)
    else:
        return blake2b(asked, digest_size=SIZE).digest()
    msg = f"the body of the {request.operation} request has no JSON by which to know it again: {reason}"
    raise InvalidRequestError(msg)


def key_of(content: bytes, id: str | None) -> bytes:
    """Return the digest of what is asked and of the caller's name for it, 16 bytes.

    Args:
        content: what `digest` returned.
        id: the request's; None: it has none, and what is asked is all there is.

    Raises:
        InvalidRequestError: the id has no UTF-8.
    """
    if id is None:
        return content
    try:
        return blake2b(id.encode(), digest_size=SIZE, key=content).digest()
    except UnicodeEncodeError:
        pass
    msg = f"the id {id!r} has no UTF-8 in which to keep it"
    raise InvalidRequestError(msg)


def model_of(client: Any) -> str | None:
    """Return the model that a client asks by itself; None if it has none.

    Of several clients as one: all the models that they ask by themselves, but for those that only take over when
    another fails. So it makes no difference through which key, or where, the same model is asked.
    """
    routes: tuple[Any, ...] | None = getattr(client, "routes", None)
    if routes is None:
        return getattr(client, "model", None)
    models = {model_of(route.client) for route in routes if route.weight > 0}
    return "|".join(sorted(model for model in models if model is not None)) or None


class Occurrences:
    """How often each request was asked so far: 16 bytes a place, and of many requests at most 48 for a different one.

    Requests are known by 96 bits of their digests: of a thousand million, two that differ are taken for one with a
    probability of 1e-11. Those with an id are known by 64 bits of the id alone, and by 32 more of what is asked it is
    seen whether that is the same.
    """

    __slots__ = ("_tables",)

    def __init__(self) -> None:
        self._tables: list[_Table | None] = [None] * 256  # so that none of them takes long to grow

    def count(self, content: bytes, id: str | None) -> int:
        """Count a request; return how often it was asked, this time included; 0 if its id was that of another one.

        Args:
            content: what `digest` returned.
            id: the request's; one that `key_of` takes.
        """
        place: int
        check: int
        if id is None:
            place, check = _place(content)
        else:
            check = int.from_bytes(content[8:12], "big")
            place = int.from_bytes(blake2b(id.encode(), digest_size=8, person=b"id").digest(), "big")
        table = self._tables[place >> 56]
        if table is None:
            table = self._tables[place >> 56] = _Table()
        return table.count(place, check, id is None)


class _Table:
    """One of the 256 tables of `Occurrences`: open addressing, linear probing, at most two thirds full."""

    __slots__ = ("_checks", "_counts", "_mask", "_places", "_used")

    def __init__(self) -> None:
        self._used = 0
        self._make(64)

    def _make(self, size: int) -> None:
        self._mask = size - 1
        self._places = array("Q", bytes(8 * size))
        self._checks = array("I", bytes(4 * size))
        self._counts = array("I", bytes(4 * size))  # 0: the slot is free

    def count(self, place: int, check: int, exact: bool) -> int:  # noqa: FBT001  called for each request
        """Count one; `exact`: what has another check is another one, else it is the same one and its count is 0."""
        places, counts, mask = self._places, self._counts, self._mask
        slot = place & mask
        while count := counts[slot]:
            if places[slot] == place:
                if self._checks[slot] == check:
                    counts[slot] = count + 1
                    return count + 1
                if not exact:
                    return 0
            slot = (slot + 1) & mask
        places[slot], self._checks[slot], counts[slot] = place, check, 1
        self._used += 1
        if 3 * self._used > 2 * mask:
            self._grow()
        return 1

    def _grow(self) -> None:
        before = zip(self._places, self._checks, self._counts, strict=True)
        size = self._mask + 1
        self._make(size * (4 if size < SMALL else 2))
        places, checks, counts, mask = self._places, self._checks, self._counts, self._mask
        for place, check, count in before:
            if count:
                slot = place & mask
                while counts[slot]:
                    slot = (slot + 1) & mask
                places[slot], checks[slot], counts[slot] = place, check, count
