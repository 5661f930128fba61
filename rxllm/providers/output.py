"""Structured output: what an answer is to be, as a JSON schema for the server and as a type for what comes back.

A part of a dialect: it puts `schema` where its server wants it, and has `read` make the value of the reply.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast, get_origin, overload

import msgspec

from rxllm.errors import ConfigError, ValidationError, check_text

if TYPE_CHECKING:
    from collections.abc import Callable

    from rxllm.messages import Reply

__all__ = ["Output"]

T = TypeVar("T")

JSON = dict[str, Any]

LONGEST_NAME = 64  # characters: OpenAI's limit
FENCED = re.compile(r"```[A-Za-z]*\s*\n(.*?)```", re.DOTALL)
MOST_PROBLEMS = 5  # that an error names
WRAPPED = "value"  # the field of an answer that is no object by itself

# How the reasons begin for an answer that does not fit, by why it ended: in the words of all dialects
ENDINGS = {
    **dict.fromkeys(
        ("length", "max_tokens", "max_output_tokens", "model_context_window_exceeded"),
        "the answer was cut off (finish reason {}): allow it more tokens",
    ),
    **dict.fromkeys(("content_filter", "refusal"), "the answer was withheld (finish reason {})"),
}


class Output(Generic[T]):
    """What an answer is to be.

    Args:
        kind: a type that msgspec knows (a Struct, a dataclass, a TypedDict, `list[int]`, …); a pydantic model, or a
            `TypeAdapter`; or a JSON schema, whose values are plain JSON that only the server checks.
        name: what the server is told that it is called; None: the name of the type.

    Raises:
        ConfigError: it is none of these.

    Example:
        >>> class Person(msgspec.Struct):
        ...     name: str
        ...     age: int | None = None
        >>> output = Output(Person)
        >>> output.schema["required"], output.strict
        (['name', 'age'], True)
        >>> output.decode('{"name": "Ada", "age": 36}')
        Person(name='Ada', age=36)
    """

    called: str  # the type, for a person
    name: str  # for a server
    schema: JSON  # of an object; what is none by itself is the field "value" of one
    strict: bool  # it keeps to what servers can enforce to the letter: no optional fields, no open objects

    @overload
    def __init__(self, kind: type[T], *, name: str | None = None) -> None: ...
    @overload
    def __init__(self: Output[Any], kind: Any, *, name: str | None = None) -> None: ...
    def __init__(self, kind: Any, *, name: str | None = None) -> None:
        check_text("name", name, optional=True)
        self._kind = kind
        self._name = name
        try:
            schema, self._decode, self.called = _understood(kind)
            msgspec.json.encode(schema)
        except (TypeError, ValueError, RecursionError) as error:
            reason = str(error)
        else:
            strict = schema if isinstance(kind, dict) else strict_schema(schema)
            self.name = re.sub(r"[^A-Za-z0-9_-]+", "_", name or self.called)[:LONGEST_NAME].strip("_") or "output"
            self.strict = strict is not None and is_strict(strict)
            self.schema = strict or schema
            return
        msg = f"output must be a type that msgspec knows, a pydantic model or a JSON schema, got {kind!r}: {reason}"
        raise ConfigError(msg)

    def __repr__(self) -> str:
        return f"Output({self.called})"

    def __reduce__(self) -> tuple[Callable[..., Output[Any]], tuple[object, ...]]:
        """Pickle the type by its name; see `pickle`."""
        return _remade, (self._kind, self._name)

    @classmethod
    def of(cls, kind: Any) -> Output[Any]:
        """Return the output of `kind`; an `Output` is one already.

        Raises:
            ConfigError: see the class.
        """
        return cast("Output[Any]", kind) if isinstance(kind, Output) else cls(kind)

    def decode(self, text: str) -> T:
        """Return the value of an answer: JSON, perhaps in a Markdown fence.

        Raises:
            ValidationError: it is none, or does not fit. The message says where.
        """
        text = text.strip()
        try:
            return cast("T", self._decode(text))
        except (ValueError, RecursionError) as error:  # msgspec's and pydantic's errors are ValueErrors
            reason = _reason(error)
        fenced = FENCED.search(text)
        if fenced:
            try:
                return cast("T", self._decode(fenced[1].strip()))
            except (ValueError, RecursionError) as error:
                reason = _reason(error)
        raise ValidationError(f"the answer does not fit {self.called}: {reason}", body=text)

    def read(self, reply: Reply[Any], *, text: str | None = None, refusal: str | None = None) -> Reply[T]:
        """Return `reply` with its value, which is decoded from its text; None when the model calls tools instead.

        Args:
            reply: of an answer that is to be this.
            text: where the answer is, if that is not the text of the reply: the arguments of a tool.
            refusal: why the model would not answer, if it has said so.

        Raises:
            ValidationError: the text does not fit; it has the reply and its usage, and says if the model refused or
                the answer was cut off.
        """
        try:
            calls = reply.tool_calls and not (text or reply.text)  # a turn on the way to the answer
            value = None if calls else self.decode(reply.text if text is None else text)
        except ValidationError as error:
            reason = error.message
        else:
            msgspec.structs.force_setattr(reply, "value", value)  # nobody else has it yet
            return cast("Reply[T]", reply)
        ending = ENDINGS.get(reply.finish_reason or "")
        if refusal:
            reason = f"the model refused: {refusal}"
        elif ending:
            reason = f"{ending.format(repr(reply.finish_reason))}; {reason}"
        problem = ValidationError(reason, reply.status, body=reply.text if text is None else text)
        problem.reply = reply
        problem.usage = reply.usage
        raise problem  # outside of the except block: the first error is no context of it


def _remade(kind: Any, name: str | None) -> Output[Any]:
    return Output(kind, name=name)


def _reason(error: Exception) -> str:
    """Return where and why a value does not fit."""
    listed: Any = getattr(error, "errors", None)  # pydantic's, whose text goes over many lines
    if not callable(listed):
        return str(error)
    problems = cast("list[JSON]", listed())
    texts = [f"{problem['msg']} - at `{_path(problem['loc'])}`" for problem in problems[:MOST_PROBLEMS]]
    more = len(problems) - len(texts)
    return "; ".join(texts) + (f"; and {more} more" if more else "")


def _path(places: tuple[int | str, ...]) -> str:
    """Return a place in msgspec's way: `$.people[0].age`."""
    return "$" + "".join(f"[{place}]" if isinstance(place, int) else f".{place}" for place in places)


def _understood(kind: Any) -> tuple[JSON, Callable[[str], Any], str]:
    """Return schema, decoder and name of what a user gave."""
    name = _called(kind)
    decode: Callable[[str], Any]
    if isinstance(kind, dict):
        schema, decode = cast("JSON", kind), msgspec.json.decode
        name = str(schema.get("title") or "output")
    elif callable(getattr(kind, "model_json_schema", None)):  # a class of pydantic's
        schema, decode = _rooted(kind.model_json_schema()), kind.model_validate_json
    elif callable(getattr(kind, "validate_json", None)):  # its TypeAdapter
        schema, decode = _rooted(kind.json_schema()), kind.validate_json
        name = str(schema.get("title") or "output")
    else:
        schema, decode = _rooted(msgspec.json.schema(kind)), msgspec.json.Decoder(kind).decode
    if schema.get("type") == "object" and ("properties" in schema or isinstance(kind, dict)):
        return schema, decode, name
    whole: JSON = {"type": "object", "properties": {WRAPPED: schema}, "required": [WRAPPED]}
    definitions = schema.pop("$defs", None) if not isinstance(kind, dict) else None
    if definitions:
        whole["$defs"] = definitions
    return {**whole, "additionalProperties": False}, _Unwrapped(decode), name


def _called(kind: Any) -> str:
    """Return what a person calls a type."""
    if isinstance(kind, type) and get_origin(kind) is None:
        return kind.__name__
    return re.sub(r"\w+\.", "", str(kind))


class _Unwrapped:
    """Decodes an answer that is the only field of an object; also one that is not, for a server that knew better."""

    def __init__(self, decode: Callable[[str], Any]) -> None:
        self._decode = decode

    def __call__(self, text: str) -> Any:
        try:
            field = msgspec.json.decode(text, type=dict[str, msgspec.Raw]).get(WRAPPED)
        except msgspec.ValidationError:  # JSON, but no object
            field = None
        if field is None:
            return self._decode(text)
        try:
            return self._decode(bytes(field).decode())
        except ValueError as error:
            problem = error
        try:
            return self._decode(text)
        except ValueError:
            pass
        raise problem


# JSON schemas


def _rooted(schema: JSON) -> JSON:
    """Return a schema whose root is no reference, without definitions that nobody refers to."""
    definitions = schema.get("$defs", {})
    if set(schema) == {"$defs", "$ref"}:
        schema = {**definitions[str(schema["$ref"]).rpartition("/")[2]], "$defs": definitions}
    if b'"$ref"' not in msgspec.json.encode(schema):
        schema = {name: value for name, value in schema.items() if name != "$defs"}
    return schema


KEPT = frozenset(
    {
        "$ref", "const", "description", "enum", "exclusiveMaximum", "exclusiveMinimum", "maxItems", "maximum",
        "minItems", "minimum", "multipleOf", "pattern", "title", "type",
    }
)  # fmt: skip
LEFT_OUT = frozenset(
    {
        "additionalProperties", "contentEncoding", "default", "deprecated", "discriminator", "examples", "format",
        "maxLength", "minLength", "required", "uniqueItems",
    }
)  # fmt: skip
FORMATS = frozenset({"date", "date-time", "duration", "email", "hostname", "ipv4", "ipv6", "time", "uuid"})
TYPES: dict[Any, str] = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null"}


def strict_schema(schema: JSON) -> JSON | None:
    """Return a schema for what fits `schema` that servers can enforce to the letter; None if there is none.

    Fields that may be missing are required, as nothing else can be enforced: those that may be null are so. Objects are
    closed; one with names of its own (a dict), a tuple, or anything at all has no such schema. What servers do not know
    and only narrows (the length of a text) is left out: the decoder checks it.

    Source: OpenAI's guide to structured outputs.
    """
    try:
        return _strict(schema)
    except _Loose:
        return None


class _Loose(Exception):  # noqa: N818  no error: it leaves the recursion
    """There is something in a schema that cannot be enforced."""


def _strict(schema: JSON) -> JSON:
    if not schema or schema.get("additionalProperties", False) is not False:
        raise _Loose
    found: JSON = {}
    for name, value in schema.items():
        if name in {"$defs", "properties"}:
            found[name] = {part: _strict(inner) for part, inner in cast("dict[str, JSON]", value).items()}
        elif name in {"anyOf", "oneOf"}:
            found["anyOf"] = [_strict(inner) for inner in cast("list[JSON]", value)]
        elif name == "items" and isinstance(value, dict):
            found[name] = _strict(cast("JSON", value))
        elif name in KEPT or (name == "format" and value in FORMATS):
            found[name] = value
        elif name not in LEFT_OUT:
            raise _Loose
    return _completed(found)


def _completed(found: JSON) -> JSON:
    """Return a strict schema with what is always said: all fields of an object, the type of an enumeration."""
    if found.get("type") == "object":
        if "properties" not in found:
            raise _Loose
        found |= {"required": list(found["properties"]), "additionalProperties": False}
    if found.get("type") == "array" and "items" not in found:
        raise _Loose
    if "enum" in found and "type" not in found:
        types = list(dict.fromkeys(TYPES.get(type(value), "object") for value in cast("list[Any]", found["enum"])))
        found["type"] = types[0] if len(types) == 1 else types
    if "$ref" in found and len(found) > 1:  # a reference stands alone
        found["anyOf"] = [{"$ref": found.pop("$ref")}]
    return found


def is_strict(schema: JSON) -> bool:
    """Say whether a schema is already as `strict_schema` would make it."""
    strict = strict_schema(schema)
    return strict is not None and _sorted(strict) == _sorted(schema)


def _sorted(schema: Any) -> Any:
    """Return a schema whose required fields are in order."""
    if isinstance(schema, list):
        return [_sorted(item) for item in cast("list[Any]", schema)]
    if not isinstance(schema, dict):
        return schema
    fields = {name: _sorted(value) for name, value in cast("JSON", schema).items()}
    if isinstance(fields.get("required"), list):
        fields["required"] = sorted(fields["required"], key=str)
    return fields
