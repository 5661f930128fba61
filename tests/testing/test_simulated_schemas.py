from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm.testing._schemas import example


@dataclass
class Leaf:
    name: str
    grade: Annotated[int, msgspec.Meta(ge=3, le=9)]


class Tree(msgspec.Struct):
    kind: Literal["oak", "elm"]
    height: Annotated[float, msgspec.Meta(gt=10)]
    leaves: Annotated[list[Leaf], msgspec.Meta(min_length=2)]
    code: Annotated[str, msgspec.Meta(min_length=8, max_length=9)]
    pair: tuple[int, str]
    maybe: int | None
    dead: bool
    child: Tree | None = None
    notes: dict[str, int] = {}


def test_an_example_fits_the_schema_that_msgspec_makes_of_a_type() -> None:
    made = example(msgspec.json.schema(Tree))
    tree = msgspec.convert(made, Tree, strict=True)
    assert tree.kind in {"oak", "elm"}
    assert len(tree.leaves) == 2
    assert made == example(msgspec.json.schema(Tree))


def test_a_schema_that_refers_to_itself_comes_to_an_end() -> None:
    made = example({"$defs": {"n": {"properties": {"next": {"$ref": "#/$defs/n"}}}}, "$ref": "#/$defs/n"})
    depth = 0
    while made:
        made, depth = made.get("next"), depth + 1
    assert 1 <= depth <= 10


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        pytest.param({"const": None}, None, id="a-constant"),
        pytest.param({"type": ["null", "string"]}, "text", id="a-list-of-types-gives-more-than-nothing"),
        pytest.param({"anyOf": [{"type": "null"}, {"type": "integer"}]}, 1, id="so-do-alternatives"),
        pytest.param(
            {"allOf": [{"properties": {"a": {"type": "null"}}}, {"properties": {"b": {"const": 2}}}]},
            {"a": None, "b": 2},
            id="parts-are-put-together",
        ),
        pytest.param({"type": "object", "required": ["a"]}, {"a": "a"}, id="what-is-required-is-there"),
        pytest.param({"items": {"type": "boolean"}}, [True], id="a-list-has-an-item"),
        pytest.param({"type": "array", "maxItems": 0}, [], id="unless-it-may-have-none"),
        pytest.param({"type": "string", "format": "date"}, "2026-01-01", id="a-format"),
        pytest.param({"type": "integer", "multipleOf": 5, "minimum": 11}, 15, id="a-multiple"),
        pytest.param({"type": "number", "maximum": -3}, -3, id="a-maximum-below-zero"),
        pytest.param({"$ref": "#/nowhere"}, "text", id="a-reference-to-nothing"),
        pytest.param(True, "text", id="anything"),
    ],
)
def test_an_example_of(schema: Any, expected: Any) -> None:
    assert example(schema) == expected


@settings(deadline=None)
@given(low=st.integers(-50, 50), span=st.integers(0, 9), step=st.integers(1, 3))
def test_a_number_lies_between_its_bounds(low: int, span: int, step: int) -> None:
    schema = {"type": "integer", "minimum": low, "maximum": low + span, "multipleOf": step}
    made = example(schema)
    assert low <= made <= low + span
    assert made % step == 0 or not any(n % step == 0 for n in range(low, low + span + 1))
