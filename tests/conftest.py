"""What all tests share."""

import gc
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _few_objects_to_look_through() -> Iterator[None]:
    """Keep `gc.collect`, with which tests look for what was not closed, from walking through all modules each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()
