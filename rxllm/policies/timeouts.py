"""How long an attempt may be silent, phase by phase."""

import msgspec

from rxllm.errors import check_number
from rxllm.values import ConfigErrorMeta

__all__ = ["Timeouts"]


class Timeouts(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=ConfigErrorMeta):
    """Seconds that each phase of one attempt may take; None: any time.

    The clocks start when the attempt is admitted, and run only while it waits for the server.

    Args:
        connect: To a connection, TLS included.
        first_byte: From the request to the first byte of the answer: a model may think for minutes.
        idle: Between two pieces of the answer.
        total: From the request to the end of the answer.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.
    """

    connect: float | None = 10.0
    first_byte: float | None = 600.0
    idle: float | None = 60.0
    total: float | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            check_number(name, getattr(self, name), above=0, optional=True)
