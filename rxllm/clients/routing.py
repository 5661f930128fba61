"""Several clients as one: each on its own route, behind its own gate."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import msgspec

from rxllm.clients.base import Client, Closing
from rxllm.errors import ConfigError, check_number, check_text
from rxllm.gate import Gate, Lane, lane_of
from rxllm.policies.routing import Joint, Spread
from rxllm.values import ConfigErrorMeta

if TYPE_CHECKING:
    from rxllm.messages import Request

__all__ = ["Route", "Routes", "any_of"]

T = TypeVar("T")


class _Client(msgspec.Struct, Generic[T], frozen=True, eq=False, metaclass=ConfigErrorMeta):
    """The one field of a route that is given by position."""

    client: Client[T]


class Route(_Client[T], frozen=True, kw_only=True, forbid_unknown_fields=True, eq=False):
    """One way to an answer: a client, and the gate that its attempts go through.

    Args:
        client: What to send with.
        gate: Quotas and limits of its key; or a lane of such a gate. None: none.
        weight: Its share of the attempts while several routes have room, >= 0. 0: only as a fallback.
        name: What outcomes call it. None: the text of the client.

    Raises:
        ConfigError: A value is of the wrong type or out of its bounds.
    """

    gate: Gate | Lane | None = None
    weight: float = 1.0
    name: str | None = None

    def __post_init__(self) -> None:
        missing = [name for name in ("send", "cost", "wrap") if not hasattr(self.client, name)]
        if missing or isinstance(self.client, type):
            msg = f"client must be a client, got {self.client!r}"
            raise ConfigError(msg)
        if self.gate is not None:
            lane_of(self.gate)
        check_number("weight", self.weight, least=0)
        check_text("name", self.name, optional=True)


def any_of(
    *clients: Client[T] | Route[T],
    weights: Sequence[float] | None = None,
    fallback: Mapping[type[Exception], str] | None = None,
) -> Routes[T]:
    """Make several clients one, for `call`: each attempt takes the route that can start it first.

    An attempt waits at the gates of all routes at once and starts at the first that has a place; when several have one
    now, at the least loaded, by weight. So a route that is full, paused, used up, or whose breaker is open (but for its
    probes) is passed by, and one that is free again is used at once.

    After a transient error the next try goes elsewhere, if there is a route that has not failed this request and is not
    shut; when it has waited there for 5 s it takes any. After a refusal (429, 529) it goes elsewhere at once; when all
    have refused it waits for the one that asked for the shortest time. `fallback` sends a request elsewhere at once for
    errors that it names, and that is no retry; there it stays. All other errors that are not transient are final.

    The clients take the same requests: leave `model` out of them, and each sends its own. Each estimates its own costs.
    A deadline stands still while all routes are suspended at the same time.

    Args:
        clients: clients, or `Route`s with a gate, a weight and a name each; several keys are several clients.
        weights: one for each, in place of those of the `Route`s.
        fallback: class of error -> name of the route; the first that fits counts.

    Raises:
        ConfigError: no client, another number of weights, two routes of one name, a fallback to a route that is not
            there, no weight above 0.

    Example:
        >>> import rxllm
        >>> small, big = rxllm.function(str.upper), rxllm.function(str.title)
        >>> routes = any_of(small, Route(big, weight=0, name="big"), fallback={AttributeError: "big"})
        >>> routes.names
        ('function(str.upper)', 'big')
    """
    routes = [client if isinstance(client, Route) else Route(client) for client in clients]
    if weights is not None:
        if len(weights) != len(routes):
            msg = f"weights must be {len(routes)} numbers, one for each client, got {weights!r}"
            raise ConfigError(msg)
        routes = [msgspec.structs.replace(route, weight=weight) for route, weight in zip(routes, weights, strict=True)]
    return Routes(tuple(routes), dict(fallback or {}))


class Routes(Closing, Generic[T]):
    """Several clients as one; see `any_of`. It is closed with all of them."""

    def __init__(self, routes: tuple[Route[T], ...], fallback: Mapping[type[Exception], str]) -> None:
        if not routes:
            msg = "any_of needs a client, got none"
            raise ConfigError(msg)
        self.routes = routes
        self.names = _named(routes)
        self.clients: tuple[Any, ...] = tuple(route.client for route in routes)
        self.lanes = tuple(lane_of(Gate() if route.gate is None else route.gate) for route in routes)
        self.usual = tuple(number for number, route in enumerate(routes) if route.weight > 0)
        if not self.usual:
            msg = "weight must be above 0 for at least one route"
            raise ConfigError(msg)
        self.spread = Spread([route.weight for route in routes])
        self._fallback = fallback
        self._targets = tuple((_checked(kind), self._number(name)) for kind, name in fallback.items())
        self._joint = Joint()

    def __repr__(self) -> str:
        return f"any_of({', '.join(self.names)})"

    def __reduce__(self) -> tuple[Callable[..., Routes[T]], tuple[object, ...]]:
        """Pickle what it was made of, never what is on the way."""
        return Routes, (self.routes, self._fallback)

    def _number(self, name: str) -> int:
        if name not in self.names:
            msg = f"fallback must name a route, one of {', '.join(map(repr, self.names))}, got {name!r}"
            raise ConfigError(msg)
        return self.names.index(name)

    @property
    def typed(self) -> bool:
        """Whether a client checks its values against a type, so that `call` asks again for those that do not fit."""
        return any(getattr(client, "typed", False) for client in self.clients)

    @property
    def window(self) -> int:
        """Requests that a pipeline keeps in progress: as many as through all the gates."""
        return sum(lane.gate.window for lane in self.lanes)

    @property
    def limits(self) -> list[int | None]:
        """Of each route: how many attempts may be on the wire; None: any number."""
        return [lane.gate.limit for lane in self.lanes]

    @property
    def in_flight(self) -> list[int]:
        """Of each route: attempts on the wire."""
        return [lane.gate.in_flight for lane in self.lanes]

    def suspended(self) -> float:
        """Return the seconds in which no route could start anything because quotas were used up."""
        return self._joint.add([lane.gate.suspended() for lane in self.lanes])

    def fallback(self, error: Exception) -> int | None:
        """Return the number of the route that takes over from one that failed with `error`."""
        return next((number for kind, number in self._targets if isinstance(error, kind)), None)

    def repeatable(self, request: Request) -> bool:
        """Say whether a second try is safe on each route when nobody knows what became of the first."""
        return all(getattr(client, "repeatable", _yes)(request) for client in self.clients)

    def wrap(self, item: Any) -> Request:
        """Return the request that an item which is none stands for; the first client knows."""
        wrapped: Request = self.clients[0].wrap(item)
        return wrapped

    def close(self) -> None:
        """Close all clients. Again is harmless."""
        self._closed = True
        for client in self.clients:
            getattr(client, "close", _nothing)()

    async def aclose(self) -> None:
        """Close all clients, and wait for what that takes on the running loop."""
        self._closed = True
        for client in self.clients:
            if hasattr(client, "aclose"):
                await client.aclose()
            else:
                getattr(client, "close", _nothing)()


def _named(routes: tuple[Route[Any], ...]) -> tuple[str, ...]:
    """Return the name of each route; clients that look the same get a number."""
    found: list[str] = []
    for route in routes:
        name = repr(route.client) if route.name is None else route.name
        if route.name is not None and [other.name for other in routes].count(name) > 1:
            msg = f"name must be another one for each route, got {name!r} twice"
            raise ConfigError(msg)
        number = 1
        taken = {*found, *(other.name for other in routes if other is not route)}
        numbered = name
        while numbered in taken:
            number += 1
            numbered = f"{name} #{number}"
        found.append(numbered)
    return tuple(found)


def _checked(kind: object) -> type[Exception]:
    if isinstance(kind, type) and issubclass(kind, Exception):
        return kind
    msg = f"fallback must map classes of errors, got {kind!r}"
    raise ConfigError(msg)


def _yes(_request: Request) -> bool:
    return True


def _nothing() -> None:
    pass
