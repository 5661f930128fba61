"""Where processes and machines keep a quota together."""

import os
import re
from typing import TYPE_CHECKING, Literal

import msgspec

from rxllm.errors import ConfigError, check_number, check_text
from rxllm.values import ConfigErrorMeta

__all__ = ["Store", "Unreachable"]

Unreachable = Literal["wait", "fail"] | float
REDIS = ("redis", "rediss", "redis+unix", "valkey", "valkeys", "valkey+unix")
COUNTERS = ("memcached", "mongodb", "mongodb+srv")
_USER = re.compile(r"//[^/]*@")
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


class _Located(msgspec.Struct, frozen=True, metaclass=ConfigErrorMeta):
    """The one field of a store that is given by position."""

    url: str


class Store(_Located, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server that counts for all who share a quota.

    Args:
        url: redis://, rediss://, redis+unix://, valkey://, valkeys:// or valkey+unix:// for any quota; memcached://,
            mongodb:// or mongodb+srv:// for requests in fixed windows of whole seconds. Environment variables in it,
            as in "redis://:$PASSWORD@host:6379/0", are read when it is connected to.
        name: What quota it is: those who give the same name, unit, strategy and seconds share it. Use one name per key
            of the provider.
        unreachable: What happens while the store does not answer: "wait" for it, "fail" the stream, or go on by
            oneself with that share of the quota, above 0 to 1: the number of processes, inverted, is safe.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.

    >>> Store("redis://:secret@localhost:6379/0", name="team")
    Store('redis://***@localhost:6379/0', name='team', unreachable='wait')
    """

    name: str = "default"
    unreachable: Unreachable = "wait"

    if TYPE_CHECKING:

        def __init__(self, url: str, /, *, name: str = ..., unreachable: Unreachable = ...) -> None: ...

    def __post_init__(self) -> None:
        check_text("store url", self.url)
        check_text("store name", self.name)
        scheme = self.url.partition("://")[0]
        if "://" not in self.url or scheme not in (*REDIS, *COUNTERS):
            msg = f"store url must begin with one of {', '.join((*REDIS, *COUNTERS))} and ://, got {self!r}"
            raise ConfigError(msg)
        if isinstance(self.unreachable, str):
            if self.unreachable not in {"wait", "fail"}:
                raise ConfigError(f"unreachable must be 'wait', 'fail' or a share, got {self.unreachable!r}")
        else:
            check_number("unreachable", self.unreachable, above=0, most=1)

    def __repr__(self) -> str:
        return f"Store({self.shown!r}, name={self.name!r}, unreachable={self.unreachable!r})"

    @property
    def shown(self) -> str:
        """The URL without user and password."""
        return _USER.sub("//***@", self.url)

    @property
    def scripted(self) -> bool:
        """Whether it runs scripts of ours, so that it can keep any quota."""
        return self.url.partition("://")[0] in REDIS

    def address(self) -> str:
        """Return the URL with its environment variables filled in.

        Raises:
            ConfigError: One of them is not set.
        """
        return _VARIABLE.sub(_value, self.url)


def _value(found: re.Match[str]) -> str:
    name = found[1] or found[2]
    value = os.environ.get(name)
    if value is None:
        raise ConfigError(f"the environment variable {name} in the store's url is not set")
    return value
