"""How the deltas of a streamed chat are merged: what several pieces say of one field."""

from __future__ import annotations

from typing import Any, cast

from rxllm.providers._shared import fields_of

__all__ = ["extend", "merge_field", "settled"]

NAMES = frozenset({"format", "id", "name", "role", "type"})  # said once, or each time; everything else goes on


class _Parts(list[str]):
    """A text that is still coming: joined at the end, as adding to a long text copies it."""


def merge_field(into: dict[str, Any], name: str, value: Any) -> None:
    """Merge a field of a delta into those of a message: texts and lists go on, names and numbers are replaced.

    Nothing replaces what is there with null, and fields that nobody knows are merged as all others.

    >>> message = {}
    >>> for text in ("Hel", "lo"):
    ...     merge_field(message, "content", text)
    ...     merge_field(message, "role", "assistant")
    >>> settled(message)
    {'content': 'Hello', 'role': 'assistant'}
    """
    old = into.get(name)
    if value is None or (name in NAMES and not value):
        into.setdefault(name, value)
    elif isinstance(old, _Parts) and isinstance(value, str):
        old.append(value)
    elif isinstance(old, dict) and isinstance(value, dict):
        for key, item in cast("dict[str, Any]", value).items():
            merge_field(cast("dict[str, Any]", old), key, item)
    elif isinstance(old, list) and isinstance(value, list) and not isinstance(old, _Parts):
        _merge_items(cast("list[Any]", old), cast("list[Any]", value))
    else:
        into[name] = value if name in NAMES else _begun(value)


def _begun(value: Any) -> Any:
    """Return a value that others can be merged into."""
    if isinstance(value, str):
        return _Parts([value])
    if isinstance(value, dict):
        fields: dict[str, Any] = {}
        for key, item in cast("dict[str, Any]", value).items():
            merge_field(fields, key, item)
        return fields
    if isinstance(value, list):
        items: list[Any] = []
        _merge_items(items, cast("list[Any]", value))
        return items
    return value


def _merge_items(into: list[Any], pieces: list[Any]) -> None:
    for piece in pieces:
        old = _place(into, fields_of(piece))
        if old is None:
            into.append(_begun(piece))
        else:
            for key, item in piece.items():
                merge_field(old, key, item)


def _place(items: list[Any], piece: dict[str, Any]) -> dict[str, Any] | None:
    """Return what a piece of a list goes on with; None: it begins something new.

    By its index. Some servers have none, or the same for all: what has another id and a name is a call of its own.
    """
    if not items or not isinstance(items[-1], dict):
        return None
    index, id = piece.get("index"), piece.get("id")
    if index is None and not piece.keys() & {"custom", "function"}:
        return None
    found = [item for item in map(fields_of, items) if index is None or item.get("index") == index]
    if not found:
        return None
    last = found[-1]
    named = fields_of(piece.get("function") or piece.get("custom")).get("name")
    another = id and last.get("id") and id != last["id"] and (named or index is None)
    return None if another else last


def settled(value: Any) -> Any:
    """Return what was merged as plain values."""
    if isinstance(value, _Parts):
        return "".join(value)
    if isinstance(value, dict):
        return {key: settled(item) for key, item in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return [settled(item) for item in cast("list[Any]", value)]
    return value


def extend(into: dict[str, Any], piece: dict[str, Any]) -> None:
    """Merge what stands beside the message: lists (of logprobs) go on, everything else is replaced."""
    for name, value in piece.items():
        old = into.get(name)
        if isinstance(old, list) and isinstance(value, list):
            cast("list[Any]", old).extend(cast("list[Any]", value))
        elif isinstance(old, dict) and isinstance(value, dict):
            extend(cast("dict[str, Any]", old), cast("dict[str, Any]", value))
        elif value is not None or name not in into:
            into[name] = value
