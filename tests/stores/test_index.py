"""The index of a journal: where the last row of each key is."""

import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm.stores.index import LEAST, Index

HASHES = st.sampled_from([0, 1, 2**56, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1])


def filled(rows, most):
    index = Index(most)
    for hash_, offset, done in rows:
        index.add(hash_, offset, done=done)
    index.freeze()
    return index


@pytest.mark.parametrize("most", [1, 3, 1_000], ids=["all-on-disk", "some-at-a-time", "in-memory"])
@settings(deadline=None, max_examples=50)
@given(rows=st.lists(st.tuples(HASHES, st.integers(LEAST, 300), st.booleans()), max_size=20))
def test_the_last_row_of_a_key_is_found_if_it_is_done(most, rows):
    offset, placed, model = 0, [], {}
    for hash_, length, done in rows:
        placed.append((hash_, offset, done))
        model[hash_] = (offset, done)
        offset += length
    index = filled(placed, most)
    try:
        assert index.rows == len(model)
        for hash_, (begins, done) in model.items():
            assert (index.last(hash_) // LEAST, index.last(hash_) % LEAST) == (begins // LEAST, 0)
            assert index.find(hash_) == (index.last(hash_) if done else None)
        assert index.find(77) is None is index.last(77)
    finally:
        index.close()


def test_a_row_beyond_128_gib_is_found_too():
    far = 1 << 40
    index = filled([(5, 0, True), (6, far, True), (7, far + 100, False)], 1_000)
    assert (index.find(5), index.find(6), index.find(7), index.last(7)) == (0, far, None, (far + 100) // LEAST * LEAST)
    index.close()


def test_an_empty_index_finds_nothing():
    index = filled([], 10)
    assert (index.rows, index.find(0), index.last(2**64 - 1)) == (0, None, None)


def test_a_row_takes_twelve_bytes():
    count = 50_000
    tracemalloc.start()
    index = Index()
    for number in range(count):
        index.add(number * 0x9E3779B97F4A7C15 % 2**64, number * 1_000, done=True)
    index.freeze()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size / count < 12 + 256 * 250 / count  # and what 512 arrays take without anything in them


def test_beyond_the_most_rows_the_memory_does_not_grow():
    tracemalloc.start()
    index = Index(1_000)
    for number in range(5_000):
        index.add(number * 0x9E3779B97F4A7C15 % 2**64, number * 1_000, done=True)
    index.freeze()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert size < 100_000
    assert index.rows == 5_000
    assert index.find(4_999 * 0x9E3779B97F4A7C15 % 2**64) == 4_999_000 // LEAST * LEAST
    index.close()
