"""What makes two requests the same: digests of what is asked, and how often it was asked in a run."""

from __future__ import annotations

import struct
from array import array
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, cast

import msgspec

from rxllm.errors import InvalidRequestError

if TYPE_CHECKING:
    from rxllm.messages import Request

__all__ = ["SIZE", "Occurrences", "digest", "is_plain", "key_of", "model_of"]

SIZE = 16  # bytes of a digest
FEW = 256  # requests in a dictionary
WORD = (1 << 64) - 1
ONCE = 1 << 32  # of a request with an id a dictionary has its count, and in the lower bits what tells it from others
CHECK = ONCE - 1

_place = struct.Struct(">QI").unpack_from  # the first 96 bits of a digest
_encode = msgspec.json.Encoder(order="deterministic").encode  # the order of keys says nothing
_encode_unsorted = msgspec.json.Encoder().encode
_decode = msgspec.json.Decoder().decode


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
        try:
            asked = _encode((request.operation, model, body))
        except TypeError:  # keys that are no texts have no order
            asked = _encode_unsorted((request.operation, model, body))
    except (TypeError, ValueError, RecursionError) as wrong:  # no JSON, text that is no UTF-8, a loop
        reason = str(wrong)
    else:
        return blake2b(asked, digest_size=SIZE).digest()
    msg = f"the body of the {request.operation} request has no JSON by which to know it again: {reason}"
    raise InvalidRequestError(msg)


def is_plain(body: Any) -> bool:
    """Say whether a body comes back from JSON as it was: if not, the digests of different ones may be equal.

    >>> is_plain({"a": [1, "b", None]}), is_plain((1, 2)), is_plain([float("nan")]), is_plain({1: 2})
    (True, False, False, False)
    """
    try:
        return bool(_decode(_encode_unsorted(body)) == body)
    except (TypeError, ValueError, RecursionError):
        return False


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
    seen whether that is the same. The first 65,536 or so are in dictionaries, which are faster and several times as
    large.
    """

    __slots__ = ("_few", "_tables")

    def __init__(self) -> None:
        # 256 of each, so that none takes long to grow, or to be poured into the table that takes its place.
        self._few: list[dict[bytes | str, int] | None] = [{} for _ in range(256)]
        self._tables: list[_Table] = [NO_TABLE] * 256

    def count(self, content: bytes, id: str | None) -> int:
        """Count a request; return how often it was asked, this time included; 0 if its id was that of another one.

        Args:
            content: what `digest` returned.
            id: the request's; one that `key_of` takes.
        """
        if id is not None:
            return self._count_named(hash(id) & WORD, int.from_bytes(content[8:12], "big"), id)
        few = self._few[content[0]]
        if few is None:
            place, check = _place(content)
            return self._tables[content[0]].count(place, check, exact=True)
        few[content] = count = few.get(content, 0) + 1
        if len(few) > FEW:
            self._pour(content[0])
        return count

    def _count_named(self, place: int, check: int, id: str) -> int:
        few = self._few[place >> 56]
        if few is None:
            return self._tables[place >> 56].count(place, check, exact=False)
        known = few.get(id, check)
        if known & CHECK != check:
            return 0
        few[id] = known = known + ONCE
        if len(few) > FEW:
            self._pour(place >> 56)
        return known // ONCE

    def _pour(self, at: int) -> None:
        """Put what is in a dictionary into a table."""
        few, self._few[at] = self._few[at], None
        table = self._tables[at] = _Table()
        for name, known in cast("dict[bytes | str, int]", few).items():
            if isinstance(name, str):
                table.put(hash(name) & WORD, known & CHECK, known // ONCE)
            else:
                place, check = _place(name)
                table.put(place, check, known)


class _Table:
    """One of the 256 tables of `Occurrences`: open addressing, linear probing, at most two thirds full."""

    __slots__ = ("_checks", "_counts", "_mask", "_places", "_used")

    def __init__(self) -> None:
        self._make(4 * FEW)

    def _make(self, size: int) -> None:
        self._used = 0
        self._mask = size - 1
        self._places = array("Q", bytes(8 * size))
        self._checks = array("I", bytes(4 * size))
        self._counts = array("I", bytes(4 * size))  # 0: the slot is free

    def count(self, place: int, check: int, *, exact: bool) -> int:
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

    def put(self, place: int, check: int, count: int) -> None:
        """Put in one that is not there."""
        slot, mask = place & self._mask, self._mask
        while self._counts[slot]:
            slot = (slot + 1) & mask
        self._places[slot], self._checks[slot], self._counts[slot] = place, check, count
        self._used += 1

    def _grow(self) -> None:
        before = zip(self._places, self._checks, self._counts, strict=True)
        self._make(2 * (self._mask + 1))
        for place, check, count in before:
            if count:
                self.put(place, check, count)


NO_TABLE = _Table()  # in the place of those that are not there yet
