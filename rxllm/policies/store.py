"""Where processes and machines keep a quota together."""

import os
import re
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote, unquote

import msgspec

from rxllm.errors import ConfigError, check_number, check_text
from rxllm.values import ConfigErrorMeta

__all__ = ["Store", "Unreachable"]

Unreachable = Literal["wait", "fail"] | float
REDIS = ("redis", "rediss", "redis+unix", "valkey", "valkeys", "valkey+unix")
COUNTERS = ("memcached", "mongodb", "mongodb+srv")
_SECRET = re.compile(r"([?&][^=&]*(?:pass|secret|token|key|user|auth)[^=&]*=)[^&]*", re.IGNORECASE)
_VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")


class _Located(msgspec.Struct, frozen=True, metaclass=ConfigErrorMeta):
    """The one field of a store that is given by position."""

    url: str


class Store(_Located, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server that counts for all who share a quota.

    Args:
        url: redis://, rediss://, redis+unix://, valkey://, valkeys:// or valkey+unix:// for any quota; memcached://,
            mongodb:// or mongodb+srv:// for requests in fixed windows of whole seconds. Its client is an extra:
            pip install 'rxllm[redis]', [valkey], [memcached] or [mongodb]. Environment variables in it, as in
            "redis://:$PASSWORD@host:6379/0", are read when it is connected to.
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
        if "://" not in self.url or self.scheme not in (*REDIS, *COUNTERS):
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
    def scheme(self) -> str:
        """What stands before ://."""
        return self.url.partition("://")[0]

    @property
    def shown(self) -> str:
        """The URL without user and password."""
        scheme, separator, rest = self.url.rpartition("://")
        user, at, host = rest.rpartition("@")
        return _SECRET.sub(r"\1***", f"{scheme}{separator}{'***' if user else ''}{at}{host}")

    @property
    def scripted(self) -> bool:
        """Whether it runs scripts of ours, so that it can keep any quota."""
        return self.scheme in REDIS

    def address(self) -> str:
        """Return the URL with its environment variables filled in; in user and password any character may stand.

        Raises:
            ConfigError: One of them is not set.
        """
        user, at, host = self.url.rpartition("@")
        return _VARIABLE.sub(_escaped, user) + at + _VARIABLE.sub(_value, host)

    def scrub(self, text: str) -> str:
        """Return `text` without what `shown` hides, whatever wrote it."""
        address = self.address()
        hidden = [found[0].partition("=")[2] for found in _SECRET.finditer(address)]
        user, at, _ = address.partition("://")[2].rpartition("@")
        if at:
            hidden += [user, user.partition(":")[2] or user]
        for secret in sorted(
            {form for part in hidden for form in (part, unquote(part)) if part}, key=len, reverse=True
        ):
            text = text.replace(secret, "***")
        return text


def _escaped(found: re.Match[str]) -> str:
    return quote(_value(found), safe="")


def _value(found: re.Match[str]) -> str:
    name = found[1] or found[2]
    value = os.environ.get(name)
    if value is None:
        raise ConfigError(f"the environment variable {name} in the store's url is not set")
    return value
