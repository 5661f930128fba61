"""What makes two requests the same, and how often each was asked."""

import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rxllm
from rxllm import Request, Route, any_of, chat
from rxllm.errors import InvalidRequestError
from rxllm.policies.identity import SIZE, Occurrences, digest, key_of, model_of

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def shuffled(value):
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(value)}
    return [shuffled(item) for item in value] if isinstance(value, list) else value


@given(body=JSON, id=st.none() | st.text("ab", min_size=1, max_size=3), meta=st.integers())
def test_the_order_of_keys_the_id_and_the_meta_make_no_difference(body, id, meta):
    same = Request(body=shuffled(body), id=id, meta=meta)
    assert digest(Request(body=body), "m") == digest(same, "m")


@pytest.mark.parametrize(
    ("other", "model"),
    [
        (chat("ho"), "m"),
        (chat("hi", temperature=0.5), "m"),
        (chat("hi"), "n"),
        (chat("hi"), None),
        (Request(body=chat("hi").body, operation="responses"), "m"),
        (Request(body={"messages": [{"content": "hi", "role": "user"}], "model": "m"}), "m"),
    ],
    ids=["another-prompt", "a-parameter", "another-model", "no-model", "another-operation", "a-model-of-its-own"],
)
def test_what_is_asked_of_whom_makes_a_difference(other, model):
    assert digest(other, model) != digest(chat("hi"), "m")
    assert len(digest(other, model)) == SIZE


def test_a_request_that_names_its_model_does_not_change_with_the_clients():
    request = chat("hi", model="mine")
    assert digest(request, "m") == digest(request, "n") != digest(chat("hi", model="other"), "m")


@pytest.mark.parametrize("body", [object(), {"a": {1, object()}}, "\ud800"], ids=["object", "inside", "surrogate"])
def test_a_body_without_a_json_is_refused_with_its_operation(body):
    with pytest.raises(InvalidRequestError, match="body of the item request has no JSON"):
        digest(Request(body=body, operation="item"), None)


def test_a_body_that_contains_itself_is_refused():
    body = {}
    body["body"] = body
    with pytest.raises(InvalidRequestError, match="no JSON"):
        digest(Request(body=body), None)


def test_the_id_makes_another_key_of_the_same_content():
    content = digest(chat("hi"), "m")
    assert key_of(content, None) == content
    assert len({key_of(content, id) for id in (None, "a", "b")}) == 3
    assert key_of(content, "a") != key_of(digest(chat("ho"), "m"), "a")
    with pytest.raises(InvalidRequestError, match=r"id '\\ud800'"):
        key_of(content, "\ud800")


def test_the_model_of_several_clients_is_that_of_those_that_are_asked_first():
    small, other, big = (rxllm.OpenAI(name, "http://127.0.0.1:9", api_key="any") for name in ("small", "small", "big"))
    assert model_of(small) == "small"
    assert model_of(rxllm.function(len)) is None
    assert model_of(any_of(small, other, Route(big, weight=0))) == "small"
    assert model_of(any_of(big, small)) == model_of(any_of(small, other, big)) == "big|small"
    assert model_of(any_of(rxllm.function(len))) is None
    assert model_of(object()) is None


@given(st.lists(st.integers(0, 40), max_size=200))
def test_equal_requests_are_counted_as_a_counter_does(numbers):
    counted, model = Occurrences(), Counter()
    for number in numbers:
        model[number] += 1
        assert counted.count(digest(Request(body=number), None), None) == model[number]


def test_ten_thousand_requests_are_told_apart_while_the_tables_grow():
    counted = Occurrences()
    contents = [digest(Request(body=number), None) for number in range(10_000)]
    for round_ in (1, 2):
        assert {counted.count(content, None) for content in contents} == {round_}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), max_size=30))
def test_an_id_is_that_of_the_first_request_that_has_it(asked):
    counted, first, model = Occurrences(), {}, Counter()
    for id, body in asked:
        if first.setdefault(id, body) == body:
            model[id] += 1
            expected = model[id]
        else:
            expected = 0
        assert counted.count(digest(Request(body=body), None), id) == expected


def test_requests_whose_digests_share_their_first_64_bits_are_still_told_apart():
    counted = Occurrences()
    one, other = bytes(16), bytes(8) + b"\1" + bytes(7)
    assert [counted.count(content, None) for content in (one, other, one, other)] == [1, 1, 2, 2]


def test_each_of_many_requests_takes_less_than_fifty_bytes():
    counted, count = Occurrences(), 200_000
    for number in range(count):
        counted.count((number * 0x9E3779B97F4A7C15 % 2**64).to_bytes(8, "big") * 2, None)
    tables = [table for table in counted._tables if table is not None]
    size = sum(sys.getsizeof(getattr(table, name)) for table in tables for name in ("_places", "_checks", "_counts"))
    assert size / count < 50
