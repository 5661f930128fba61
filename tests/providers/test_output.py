"""Structured output: types as schemas, answers as values, and errors that say what does not fit and where."""

from __future__ import annotations

import datetime as dt
import decimal
import enum
import pickle
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypedDict

import msgspec
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm import Reply, ToolCall, Usage
from rxllm.errors import ConfigError, ValidationError
from rxllm.providers.output import Output, is_strict, strict_schema


class Mood(enum.Enum):
    GOOD = "good"
    BAD = "bad"


class Address(msgspec.Struct):
    """Where somebody lives."""

    street: str
    zip: Annotated[str, msgspec.Meta(pattern="^[0-9]+$", min_length=5, description="five digits")]


class Person(msgspec.Struct):
    """A person."""

    name: str
    age: int | None = None
    tags: list[str] = []
    home: Address | None = None
    mood: Mood = Mood.GOOD
    friends: list[Person] = []
    born: dt.date | None = None


class Cat(msgspec.Struct, tag=True):
    lives: int


class Dog(msgspec.Struct, tag=True):
    barks: bool


class Open(msgspec.Struct):
    counts: dict[str, int]


@dataclass
class Point:
    x: int
    y: int


class Movie(TypedDict):
    title: str
    year: int


class Room(pydantic.BaseModel):
    kind: Literal["bath", "bed"] = "bed"
    size: float = pydantic.Field(gt=0, description="in square metres")


class Loose(pydantic.BaseModel, extra="allow"):
    size: float


class Bill(msgspec.Struct):
    total: decimal.Decimal
    due: dt.date


class House(pydantic.BaseModel):
    rooms: list[Room]
    garden: Room | None = None


def parts(schema: Any) -> list[dict[str, Any]]:
    """Return a schema with all that are in it."""
    if isinstance(schema, list):
        return [part for inner in schema for part in parts(inner)]
    return [schema, *(part for inner in schema.values() for part in parts(inner))] if isinstance(schema, dict) else []


# schemas


@pytest.mark.parametrize(
    "kind",
    [
        Person,
        Cat | Dog,
        Point,
        Movie,
        House,
        pydantic.TypeAdapter(list[Room]),
        list[Person],
        int,
        Literal["a"] | None,
        Mood,
    ],
    ids=repr,
)
def test_the_schema_is_one_that_servers_enforce_to_the_letter(kind):
    output = Output(kind)
    assert output.strict
    assert output.schema["type"] == "object"
    assert "$ref" not in output.schema
    assert is_strict(output.schema)
    for part in parts(output.schema):
        if part.get("type") == "object":
            assert part["additionalProperties"] is False
            assert part["required"] == list(part["properties"])
        if "enum" in part:
            assert "type" in part
        if "$ref" in part:
            assert len(part) == 1
            assert part["$ref"].rpartition("/")[2] in output.schema["$defs"]
        if "description" in part and isinstance(part["description"], str):
            assert part["description"]
        assert not part.keys() & {"default", "oneOf", "discriminator", "minLength", "prefixItems"}


def test_what_may_be_missing_is_required_and_may_be_null_if_its_type_says_so():
    schema = Output(Person).schema
    assert schema["required"] == ["name", "age", "tags", "home", "mood", "friends", "born"]
    assert schema["properties"]["age"] == {"anyOf": [{"type": "integer"}, {"type": "null"}]}
    assert schema["properties"]["tags"] == {"type": "array", "items": {"type": "string"}}
    assert schema["description"] == "A person."
    assert "$defs" not in Output(Point).schema  # nothing refers to them
    assert schema["$defs"]["Address"]["properties"]["zip"] == {
        "description": "five digits",
        "type": "string",
        "pattern": "^[0-9]+$",
    }


def test_a_format_that_servers_do_not_know_is_left_to_the_decoder():
    output = Output(Bill)
    assert output.schema["properties"] == {"total": {"type": "string"}, "due": {"type": "string", "format": "date"}}
    assert output.decode('{"total": "1.50", "due": "2026-01-02"}') == Bill(decimal.Decimal("1.50"), dt.date(2026, 1, 2))
    with pytest.raises(ValidationError, match="total"):
        output.decode('{"total": "much", "due": "2026-01-02"}')


@pytest.mark.parametrize("kind", [Open, Loose, dict[str, int], tuple[int, str], Any, list[Any]], ids=repr)
def test_what_no_server_can_enforce_goes_as_it_is(kind):
    output = Output(kind)
    assert not output.strict
    assert output.schema["type"] == "object"
    assert strict_schema(output.schema) is None


def test_a_schema_of_the_users_own_goes_as_it_is_and_says_if_it_is_strict():
    closed = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"type": "integer"}}}
    closed |= {"required": ["a", "b"], "additionalProperties": False, "title": "Pair of things"}
    assert Output(closed).schema is closed
    assert Output(closed).strict
    assert Output(closed).name == "Pair_of_things"
    for change in ({"required": ["a"]}, {"additionalProperties": True}, {"patternProperties": {}}, {"properties": {}}):
        assert Output(closed | change).schema == closed | change
        assert not Output(closed | change).strict
    assert Output({"type": "object"}).strict is False
    assert Output({"type": "array", "items": {"type": "integer"}}).decode('{"value": [1]}') == [1]


def test_a_reference_with_something_beside_it_is_wrapped():
    assert strict_schema({"$ref": "#/$defs/X", "default": None}) == {"$ref": "#/$defs/X"}
    assert strict_schema({"$ref": "#/$defs/X", "description": "y"}) == {
        "description": "y",
        "anyOf": [{"$ref": "#/$defs/X"}],
    }


@pytest.mark.parametrize(
    ("kind", "name"),
    [(Person, "Person"), (list[Person], "list_Person"), (Cat | Dog, "Cat_Dog"), (House, "House"), ({}, "output")],
    ids=repr,
)
def test_the_name_is_one_that_servers_take(kind, name):
    assert Output(kind).name == name
    assert Output(kind, name="an own/name" + "x" * 99).name == "an_own_name" + "x" * 53


@pytest.mark.parametrize(
    "kind",
    [3, "Person", object(), print, {"type": "object", "x": object()}],
    ids=["a-number", "the-name-of-a-type", "an-object", "a-function", "a-schema-that-is-no-json"],
)
def test_what_is_no_type_is_refused(kind):
    with pytest.raises(
        ConfigError, match="output must be a type that msgspec knows, a pydantic model or a JSON schema"
    ):
        Output(kind)


# answers


@pytest.mark.parametrize(
    ("kind", "text", "value"),
    [
        (Person, '{"name": "Ada", "age": 36, "mood": "bad"}', Person("Ada", 36, mood=Mood.BAD)),
        (Point, '{"x": 1, "y": 2}', Point(1, 2)),
        (Movie, '{"title": "M", "year": 1931}', {"title": "M", "year": 1931}),
        (Cat | Dog, '{"value": {"type": "Dog", "barks": true}}', Dog(barks=True)),
        (Cat | Dog, '{"type": "Cat", "lives": 9}', Cat(9)),
        (list[int], '{"value": [1, 2]}', [1, 2]),
        (list[int], "[1, 2]", [1, 2]),
        (int, "7", 7),
        (dict[str, int], '{"value": {"a": 1}}', {"a": 1}),
        (dict[str, int], '{"value": 1}', {"value": 1}),
        (House, '{"rooms": [{"size": 9.5}]}', House(rooms=[Room(size=9.5)])),
        (pydantic.TypeAdapter(list[Room]), '{"value": [{"size": 1}]}', [Room(size=1)]),
        ({"type": "object"}, '{"any": ["thing"]}', {"any": ["thing"]}),
    ],
    ids=repr,
)
def test_an_answer_is_decoded(kind, text, value):
    assert Output(kind).decode(text) == value


@pytest.mark.parametrize(
    "text",
    [
        '  {"x": 1, "y": 2}\n',
        '```json\n{"x": 1, "y": 2}\n```',
        '```\n{"x": 1, "y": 2}\n```',
        'Here you are:\n\n```JSON\n{"x": 1,\n "y": 2}```\nAnything else?',
    ],
)
def test_a_fence_around_an_answer_is_no_harm(text):
    assert Output(Point).decode(text) == Point(1, 2)


@pytest.mark.parametrize(
    ("kind", "text", "reason"),
    [
        (
            Person,
            '{"name": "Ada", "age": "x"}',
            "the answer does not fit Person: Expected `int | null`, got `str` - at `$.age`",
        ),
        (Person, '{"age": 1}', "missing required field `name`"),
        (Person, '{"name": "A", "friends": [{"name": 5}]}', r"at `$.friends[0].name`"),
        (Person, '{"name": "A", "home": {"street": "B", "zip": "12"}}', "length >= 5 - at `$.home.zip`"),
        (Person, '{"name": "Ada"', "the answer does not fit Person: Input data was truncated"),
        (Person, "I would rather not.", "malformed"),
        (Person, "", "truncated"),
        (Person, '```json\n{"name": 5}\n```', "at `$.name`"),
        (list[int], '{"value": [1, "2"]}', "the answer does not fit list[int]: Expected `int`, got `str` - at `$[1]`"),
        (Cat | Dog, '{"value": {"type": "Cow"}}', "`$.type`"),
        (House, '{"rooms": [{"size": -1}]}', "Input should be greater than 0 - at `$.rooms[0].size`"),
        (House, "{", "Invalid JSON"),
        (pydantic.TypeAdapter(list[Room]), '{"value": [{}]}', "Field required - at `$[0].size`"),
        ({"type": "object"}, "{x}", "the answer does not fit output"),
    ],
    ids=repr,
)
def test_an_answer_that_does_not_fit_says_where(kind, text, reason):
    with pytest.raises(ValidationError) as caught:
        Output(kind).decode(text)
    assert reason in str(caught.value)
    assert caught.value.body == text.strip()
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


def test_many_problems_are_counted():
    with pytest.raises(ValidationError, match="; and 3 more"):
        Output(House).decode('{"rooms": [' + ",".join(["{}"] * 8) + "]}")


@given(st.text(max_size=30) | st.binary(max_size=30).map(lambda data: data.decode(errors="surrogateescape")))
def test_garbage_never_raises_anything_but_a_validation_error(text):
    for kind in (Person, list[int], House):
        with pytest.raises(ValidationError):
            Output(kind).decode(f"?{text}")


# replies


def test_a_reply_gets_its_value():
    reply = Output(Point).read(Reply(value="", text='{"x": 1, "y": 2}', finish_reason="length"))
    assert reply.value == Point(1, 2)  # it is whole, whatever the server says
    called = Output(Point).read(Reply(value="", text="Let me see."), text='{"x": 3, "y": 4}')
    assert (called.value, called.text) == (Point(3, 4), "Let me see.")


MISFIT = "the answer does not fit Point: "


@pytest.mark.parametrize(
    ("finish_reason", "refusal", "beginning"),
    [
        ("stop", None, MISFIT),
        (None, None, MISFIT),
        ("length", None, f"the answer was cut off (finish reason 'length'): allow it more tokens; {MISFIT}"),
        ("max_tokens", None, "the answer was cut off (finish reason 'max_tokens')"),
        ("max_output_tokens", None, "the answer was cut off"),
        ("content_filter", None, f"the answer was withheld (finish reason 'content_filter'); {MISFIT}"),
        ("refusal", None, "the answer was withheld"),
        ("stop", "I will not.", "the model refused: I will not."),
    ],
)
def test_a_reply_that_does_not_fit_says_why_and_comes_along(finish_reason, refusal, beginning):
    bad = Reply(value="", text='{"x": 1', usage=Usage(output_tokens=5), finish_reason=finish_reason, status=200)
    with pytest.raises(ValidationError) as caught:
        Output(Point).read(bad, refusal=refusal)
    assert caught.value.message.startswith(beginning)
    assert caught.value.reply is bad
    assert caught.value.usage == Usage(output_tokens=5)
    assert (caught.value.status, caught.value.body) == (200, '{"x": 1')
    assert not caught.value.transient


def test_a_reply_that_calls_tools_is_a_turn_on_the_way_and_has_no_value_yet():
    calls = (ToolCall(id="1", name="weather", arguments="{}"), ToolCall(id="2", name="time", arguments="{}"))
    reply = Output(Point).read(Reply(value="", tool_calls=calls))
    assert reply.value is None
    assert reply.tool_calls == calls


def test_a_reply_that_answers_and_calls_a_tool_has_its_value():
    calls = (ToolCall(id="1", name="weather", arguments="{}"),)
    assert Output(Point).read(Reply(value="", text='{"x": 1, "y": 2}', tool_calls=calls)).value == Point(1, 2)


# the rest


@pytest.mark.parametrize("kind", [Point, House, {"type": "object"}])
def test_an_output_is_pickled_with_its_type_by_name(kind):
    again = pickle.loads(pickle.dumps(Output(kind, name="thing")))
    assert (again.name, again.schema, repr(again)) == ("thing", Output(kind).schema, repr(Output(kind)))


def test_an_output_of_an_output_is_the_same():
    output = Output(Point, name="thing")
    assert Output.of(output) is output
    assert Output.of(Point).name == "Point"
    assert repr(Output.of(list[int])) == "Output(list[int])"
