"""Connections to the stores of shared quotas: Redis and Valkey by a script of ours, Memcached and MongoDB by counters.

This is the only module that knows the storages of `limits`; they and the clients that they need are imported when the
first quota is used that needs them.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib
import math
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

from rxllm.clock import wall
from rxllm.errors import ConfigError
from rxllm.policies.local_lease import Ask, Grant, LocalLease
from rxllm.policies.sharing import kept_for, lease_life
from rxllm.policies.sliding import WIDEST
from rxllm.stores.scripts import EXCHANGE, KEYS

if TYPE_CHECKING:
    from rxllm.policies.quota import Quota
    from rxllm.policies.store import Store

__all__ = [
    "ANSWER",
    "LONGEST_BACKOFF",
    "ROUNDED",
    "Backend",
    "Counted",
    "Scripted",
    "connect",
    "key_of",
    "located",
    "prepare",
]

ANSWER = 2.0  # seconds in which a store must answer, its connection made
LONGEST_BACKOFF = 5.0  # seconds between two requests to a store that does not answer
PATIENCE = 1.0  # seconds after which one that waits asks again, whatever the store said
ROUNDED = 1.0  # seconds by which Memcached may forget a counter early
PACKAGES = {  # the first word of the URL's scheme -> the package, its module, the extra
    "redis": ("redis", "redis", "redis"),
    "rediss": ("redis", "redis", "redis"),
    "valkey": ("valkey", "valkey", "valkey"),
    "valkeys": ("valkey", "valkey", "valkey"),
    "memcached": ("memcachio", "memcachio", "memcached"),
    "mongodb": ("motor", "motor.motor_asyncio", "mongodb"),
}
PORTS = {"redis": 6379, "rediss": 6379, "valkey": 6379, "valkeys": 6379, "memcached": 11211}
LONGEST_NAME = 100  # characters in a key; a longer one is hashed


def prepare(quota: Quota, store: Store) -> None:
    """Import what `store` needs: here, because it takes a moment, and on the loop others would wait.

    Raises:
        ConfigError: the store cannot keep that quota, or a package is missing.
    """
    if not store.scripted:
        check_counted(quota, store)
    package, module, extra = PACKAGES[store.scheme.partition("+")[0]]
    try:
        importlib.import_module(module)
    except ImportError:
        msg = f"{store.shown} needs the package {package}: pip install 'rxllm[{extra}]'"
        raise ConfigError(msg) from None
    importlib.import_module("limits.storage")


def connect(quota: Quota, store: Store) -> Backend:
    """Return a new connection to `store`."""
    return (Scripted if store.scripted else Counted)(quota, store)


def check_counted(quota: Quota, store: Store) -> None:
    """Refuse what a counter cannot keep."""
    for name, value, good in (
        ("unit", quota.unit, quota.unit == "requests"),
        ("strategy", quota.strategy, quota.strategy == "fixed"),
        ("per", quota.per, quota.per.is_integer()),
        ("limit", quota.limit, quota.limit.is_integer()),
    ):
        if not good:
            msg = (
                f"{name} must be that of whole requests in fixed windows of whole seconds with {store.shown}, "
                f"got {value!r}; Redis and Valkey keep any quota"
            )
            raise ConfigError(msg)


class Backend(Protocol):
    """One connection to a store."""

    async def exchange(self, lease: LocalLease, ask: Ask, limit: float) -> Grant:
        """Do what a request asks for, with the limit that holds now."""
        ...

    async def close(self) -> None:
        """Close the connection."""
        ...


class Scripted:
    """Redis or Valkey."""

    def __init__(self, quota: Quota, store: Store) -> None:
        from limits.storage import storage_from_string  # noqa: PLC0415  it imports the client of the store

        storage: Any = storage_from_string(
            f"async+{located(store)}",
            implementation="valkey" if store.scheme.startswith("valkey") else "redispy",
            socket_timeout=ANSWER,
            socket_connect_timeout=ANSWER,
        )
        self._connection: Any = storage.bridge.get_connection()
        self._script: Any = self._connection.register_script(EXCHANGE)
        self._keys = [f"{{{key_of(quota, store)}}}:{name}" for name in KEYS]
        self._kind = "bucket" if quota.strategy == "bucket" else "log"
        self._per = quota.per
        life, keep = lease_life(quota), kept_for(quota)
        patience = min(max(quota.window / 10, life), PATIENCE)
        memory = 2 * patience + 4 * life
        hold = min(keep, 2 * LONGEST_BACKOFF)
        kept = life + quota.grace if quota.strategy == "bucket" else keep  # by the server
        expiry = math.ceil(1000 * (keep + 2 * life + memory + hold + quota.per / WIDEST)) + 1000
        self._times = (kept, life, memory, patience, expiry, hold)

    async def exchange(self, lease: LocalLease, ask: Ask, limit: float) -> Grant:
        """Do what a request asks for, and tell a server that has lost its memory what it should know."""
        while True:
            untold = lease.untold(ask.sent)
            reply = await self._script(keys=self._keys, args=self._arguments(lease, ask, limit, untold))
            head, generation, *rest = (item.decode() if isinstance(item, bytes) else str(item) for item in reply)
            lease.generation = generation
            if head != "lost":
                lease.told(untold)
                room, hint = map(float, rest)
                return Grant(float(head), room, hint, lease.life)
            lease.forgotten()

    def _arguments(
        self, lease: LocalLease, ask: Ask, limit: float, untold: list[tuple[int, float, float]]
    ) -> list[str | float]:
        """Return the arguments of the script, in its order."""
        arguments: list[str | float] = [
            self._kind,
            lease.client,
            lease.generation if lease.entries else "",  # who knows nothing has not lost it: the keys have expired
            lease.limit,
            limit / self._per,
            *self._times,
            f"{lease.client}:{ask.number}",
            lease.extra,
            ask.carry,
            ask.debt,
            ask.least,
            ask.wanted,
            len(ask.closing),
        ]
        for number, back, early in ask.closing:
            arguments += (f"{lease.client}:{number}" if number else "", back, early)
        for number, amount, seconds in untold:
            arguments += (f"{lease.client}:{number}", amount, seconds)
        return arguments

    async def close(self) -> None:
        """Close the connection."""
        try:
            await self._connection.aclose()
        except asyncio.CancelledError:  # the loop ends, and the client has left it half done
            await self._connection.aclose()
            raise


class Counted:
    """Memcached or MongoDB: a counter of `limits` for each window, which begins with the first request in it.

    What is taken cannot be given back, so a lease lasts until its window ends, and is small when little is left.
    """

    def __init__(self, quota: Quota, store: Store) -> None:
        from limits.storage import storage_from_string  # noqa: PLC0415  it imports the client of the store

        self._storage: Any = storage_from_string(f"async+{located(store)}")
        self._key = f"rxllm:{key_of(quota, store)}"
        self._lasts = int(quota.per) + math.ceil(ROUNDED)
        self._ends = -math.inf  # when the counter ends, steady seconds
        self._count = 0

    async def exchange(self, lease: LocalLease, ask: Ask, limit: float) -> Grant:  # noqa: ARG002  it knows no leases
        """Count what a request asks for."""
        usable = self._ends - ROUNDED - ask.sent
        limit = int(limit)
        if ask.sent < self._ends and (usable <= 0 or self._count >= limit) and not ask.debt:
            return Grant(0.0, 0.0, self._ends - ask.sent, max(usable, 0.0))
        known = self._count if ask.sent < self._ends else 0
        wanted = min(math.ceil(ask.wanted), max(math.ceil(ask.least), (limit - known) // 8, 1))
        debt = math.ceil(ask.debt)
        self._count = await self._storage.incr(self._key, self._lasts, wanted + debt)
        if ask.sent >= self._ends:
            remaining = await self._storage.get_expiry(self._key) - wall()
            self._ends = ask.sent + min(remaining, self._lasts)
            usable = self._ends - ROUNDED - ask.sent
        granted = min(wanted, max(0, limit - (self._count - wanted)))
        if usable <= 0:
            granted = 0
        return Grant(float(granted), max(0.0, float(limit - self._count)), max(0.0, self._ends - ask.sent), usable)

    async def close(self) -> None:
        """Close the connection."""
        bridge = getattr(self._storage, "bridge", None)
        if bridge is None:
            self._storage.storage.close()  # MongoDB
        elif bridge._storage is not None:  # noqa: SLF001  it has no other way
            bridge._storage.connection_pool.close()  # noqa: SLF001


def key_of(quota: Quota, store: Store) -> str:
    """Return what quota it is, as a key that every store takes."""
    name = quote(store.name, safe="")
    if len(name) > LONGEST_NAME:
        name = hashlib.sha256(name.encode()).hexdigest()
    return f"rxllm/{name}/{quota.unit}/{quota.strategy}/{quota.per:g}"


def located(store: Store) -> str:
    """Return the address with its port, which `limits` wants to see."""
    address = store.address()
    scheme, _, rest = address.partition("://")
    host, slash, path = rest.partition("/")
    port = PORTS.get(scheme)
    names = host.rpartition("@")[2].split(",")
    if port is None or not all(names) or all(name.rpartition(":")[2].isdigit() for name in names):
        return address
    user = host[: len(host) - len(",".join(names))]
    located = [name if name.rpartition(":")[2].isdigit() else f"{name}:{port}" for name in names]
    return f"{scheme}://{user}{','.join(located)}{slash}{path}"
