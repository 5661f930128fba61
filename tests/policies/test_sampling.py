"""Sampling: whether the same question has the same answer."""

import pytest

from rxllm import Request, chat
from rxllm.policies.sampling import is_sampled


@pytest.mark.parametrize(
    ("request_", "sampled"),
    [
        (chat("a"), True),
        (chat("a", temperature=0.2), True),
        (chat("a", temperature=None), True),
        (chat("a", temperature=False), True),
        (chat("a", temperature=0), False),
        (chat("a", temperature=0.0, n=1), False),
        (chat("a", temperature=0, n=2), True),
        (chat("a", temperature=0, n=[]), True),
        (chat("a", temperature=0, n=2, seed=1), False),
        (chat("a", seed=0), False),
        (chat("a", seed=None), True),
        (Request(body={"input": "a"}, operation="responses"), True),
        (Request(body={"input": "a"}, operation="embeddings"), False),
        (Request(body={"input": "a"}, operation="moderations"), False),
        (Request(body="a", operation="item"), False),
        (Request(body="a"), True),
    ],
    ids=lambda value: f"{value.operation} {value.body}"[-60:] if isinstance(value, Request) else None,
)
def test_what_is_drawn_anew_each_time_is_told_by_the_request(request_: Request, sampled: bool):
    assert is_sampled(request_) is sampled
