"""What makes a reply good, and what to do when it is not."""

from collections.abc import Callable
from typing import Any

import msgspec

from rxllm.errors import check_callable, check_number
from rxllm.values import ConfigErrorMeta

__all__ = ["Validate"]


class Validate(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=ConfigErrorMeta):
    """A check of each reply, how often to ask, and how to repair the request.

    Args:
        check: Reply -> None or True (good), False (bad); a ValueError or AssertionError is bad with its text. None:
            good is what the client can make its value of.
        attempts: Total tries, the first one included, >= 1.
        repair: (request, reply, error) -> the request of the next try; None: the same again.
        early: text so far -> as `check`. Answers are streamed, and one that fails is cut off there and then: what it
            would still have said is not paid for. The check comes on top, of those that end well.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.
    """

    check: Callable[[Any], bool | None] | None = None
    attempts: int = 3
    repair: Callable[[Any, Any, Any], Any] | None = None
    early: Callable[[str], bool | None] | None = None

    def __post_init__(self) -> None:
        check_callable("check", self.check, optional=True)
        check_number("attempts", self.attempts, least=1, integer=True)
        check_callable("repair", self.repair, optional=True)
        check_callable("early", self.early, optional=True)
