"""What the tests of transports share."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for _scripted

import _scripted


@pytest.fixture(params=_scripted.LOOPS)
def loops(request: pytest.FixtureRequest) -> None:
    """Run a test on every kind of loop: they report broken connections in different ways."""
    _scripted.current[0] = request.param
