"""What all tests share."""

import gc
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="module")
def _few_objects_to_look_through() -> Iterator[None]:
    """Keep `gc.collect`, with which tests look for what was not closed, from walking through all modules each time."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def pytest_xdist_auto_num_workers() -> int:
    """Take half as many workers more than there are cores: a third of the time goes by waiting for servers."""
    return max(2, (os.cpu_count() or 1) * 3 // 2)
