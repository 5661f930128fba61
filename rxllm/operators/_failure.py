"""What becomes of an item that a stage could not do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, cast

from rxllm.messages import Outcome, Request
from rxllm.operators._finished import Finished

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["failure", "raising"]


def raising(error: Exception) -> Callable[[Any], NoReturn]:
    """Return what stands in the place of a user's function after `error` has halted a stage."""

    def refuse(_item: Any) -> NoReturn:
        raise error

    return refuse


def failure(item: Any, error: Exception) -> Outcome[Any]:
    """Return the outcome of an item that failed; what is no request stands as the body of one.

    What has ended already, in a stage above or in a run before, stays what it is.
    """
    if isinstance(item, Outcome) and item.error is not None:
        return cast("Outcome[Any]", item)
    if isinstance(item, Finished):
        return item.outcome
    request = item if isinstance(item, Request) else Request(body=item, operation="item")
    return Outcome(request=request, error=error.with_traceback(None))
