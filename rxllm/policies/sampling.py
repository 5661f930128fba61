"""Whether the same question has the same answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from rxllm.messages import Request

__all__ = ["is_sampled"]

FIXED = frozenset(
    {"embeddings", "moderations", "models", "item"}
)  # operations that draw nothing; "item" is a function's


def is_sampled(request: Request) -> bool:
    """Say whether the answer to a request is drawn anew each time, as far as the request says.

    It is without a `seed`, when `temperature` is above 0 or not given (servers take 1 then), or `n` is above 1.

    >>> from rxllm import chat
    >>> is_sampled(chat("hi")), is_sampled(chat("hi", temperature=0)), is_sampled(chat("hi", temperature=0.7, seed=1))
    (True, False, False)
    """
    if request.operation in FIXED:
        return False
    given: object = request.body
    if not isinstance(given, dict):
        return True
    body = cast("dict[str, Any]", given)
    if body.get("seed") is not None:
        return False
    temperature: object = body.get("temperature")
    greedy = isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature == 0
    return not greedy or body.get("n", 1) not in (None, 1)
