"""A value that fits a JSON schema, roughly: what a model says that is held to one. Pure and deterministic."""

from __future__ import annotations

from math import ceil, floor
from typing import Any, Final, cast

JSON = dict[str, Any]

DEEP: Final = 6  # from this depth on a schema that refers to itself is cut short
FORMATS: Final = {
    "date": "2026-01-01",
    "date-time": "2026-01-01T00:00:00Z",
    "email": "somebody@example.com",
    "time": "00:00:00Z",
    "uri": "https://example.com",
    "uuid": "00000000-0000-4000-8000-000000000000",
}


def example(schema: object, name: str = "text", root: object = None, depth: int = 0) -> Any:
    """Return a value that fits; what a text may say is its name. Patterns and conditions are not looked at.

    Example:
        >>> example({"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}})
        {'city': 'city', 'days': 1}
    """
    if not isinstance(schema, dict):
        return name
    given = cast("JSON", schema)
    root = given if root is None else root
    if "const" in given or given.get("enum"):
        return given["const"] if "const" in given else given["enum"][0]
    if isinstance(target := given.get("$ref"), str):
        rest = {key: value for key, value in given.items() if key != "$ref"}
        return example({**_found(root, target), **rest}, name, root, depth + 1)
    if among := given.get("anyOf") or given.get("oneOf"):
        return example(_chosen(among, depth), name, root, depth)
    if given.get("allOf"):
        rest = {key: value for key, value in given.items() if key != "allOf"}
        return example(_merged([*given["allOf"], rest], root), name, root, depth)
    return _of_kind(_kind(given, depth), given, name, root, depth)


def _of_kind(kind: str, given: JSON, name: str, root: object, depth: int) -> Any:
    if kind == "object":
        required, fields = given.get("required", ()), given.get("properties", {})
        if depth >= DEEP:
            fields = {key: value for key, value in fields.items() if key in required}
        fields = {**fields, **{key: True for key in required if key not in fields}}
        return {key: example(value, key, root, depth + 1) for key, value in fields.items()}
    if kind == "array":
        heads = [example(one, name, root, depth + 1) for one in given.get("prefixItems", ())]
        least = max(given.get("minItems", 0), 0 if heads or depth >= DEEP or given.get("maxItems") == 0 else 1)
        more = example(given.get("items"), name, root, depth + 1) if least > len(heads) else None
        return heads + [more] * (least - len(heads))
    if kind in {"integer", "number"}:
        return _number(given, whole=kind == "integer")
    if kind == "string":
        text = FORMATS.get(given.get("format", ""), name).ljust(given.get("minLength", 0), "x")
        return text[: given.get("maxLength")]
    return {"boolean": True, "null": None}.get(kind, name)


def _number(given: JSON, *, whole: bool) -> float:
    step = given.get("multipleOf", 1)
    least, most = given.get("minimum"), given.get("maximum")
    above, below = given.get("exclusiveMinimum"), given.get("exclusiveMaximum")
    lowest = least if least is not None else (None if above is None else above + step)
    highest = most if most is not None else (None if below is None else below - step)
    value = step
    if lowest is not None and value < lowest:
        value = ceil(lowest / step) * step
    if highest is not None and value > highest:
        value = floor(highest / step) * step
        if lowest is not None and value < lowest:  # a narrow span between two steps
            value = (lowest + highest) / 2
    return int(value) if whole else value


def _kind(given: JSON, depth: int) -> str:
    kind = given.get("type")
    if isinstance(kind, list):
        kinds = cast("list[str]", kind)
        return "null" if depth >= DEEP and "null" in kinds else next((one for one in kinds if one != "null"), "null")
    if isinstance(kind, str):
        return kind
    return "object" if "properties" in given else "array" if "items" in given else "string"


def _chosen(among: list[Any], depth: int) -> Any:
    """Return the first that is more than nothing; too deep down the one that is least."""
    empty = [cast("JSON", one) for one in among if isinstance(one, dict) and cast("JSON", one).get("type") == "null"]
    if depth >= DEEP and empty:
        return empty[0]
    return next((one for one in among if one not in empty), among[0])


def _merged(schemas: list[Any], root: object) -> JSON:
    merged: JSON = {}
    for one in schemas:
        part = {**_found(root, one["$ref"]), **one} if "$ref" in one else one
        fields = {**merged.get("properties", {}), **part.get("properties", {})}
        required = [*merged.get("required", ()), *part.get("required", ())]
        merged.update({key: value for key, value in part.items() if key != "$ref"})
        if fields:
            merged["properties"] = fields
        if required:
            merged["required"] = required
    return merged


def _found(root: object, target: str) -> JSON:
    """Return what a reference into the same document names; nothing if there is none."""
    found: Any = root
    for part in target.removeprefix("#").strip("/").split("/"):
        if part:
            fields = cast("JSON", found) if isinstance(found, dict) else {}
            found = fields.get(part.replace("~1", "/").replace("~0", "~"))
    return cast("JSON", found) if isinstance(found, dict) else {}
