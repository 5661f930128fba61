"""Let equal streams that run at the same time be one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, cast

import msgspec

from rxllm.demand import NOTHING
from rxllm.errors import ConfigError
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable

    from reactivex import Observable

    from rxllm.demand import DemandScheduler, Disposable, Flow, Observer
    from rxllm.messages import Attempt, Request

__all__ = ["Flights", "flight_key", "single_flight"]

T = TypeVar("T")


class Flights:
    """What is on its way, by key. Nothing stays here of what has emitted or ended."""

    __slots__ = ("going",)

    def __init__(self) -> None:
        self.going: dict[tuple[Flow, Hashable], _Flight] = {}

    def __len__(self) -> int:
        return len(self.going)


def single_flight(
    key: Hashable | None, *, among: Flights, attempts: list[Attempt] | None = None
) -> Callable[[Observable[T]], Observable[T]]:
    """Subscribe the source, unless one of the same key is on its way: then wait for what that emits.

        key "a"                        -----x|
        single_flight("a", among=…)    -----x|
        key "a", meanwhile               ---x|      not subscribed

    Emits: what the one source emits that is subscribed, to all who wait for it: put it around streams of one item.
    Holds: nothing.
    Errors: those of the source, for all who wait.
    Completes: with the source.
    Dispose: leaves the others alone; the last one that leaves cancels the source.

    Who comes after the first item begins anew. Only streams of the same run of a pipeline are merged.

    Args:
        key: what is equal; None: this one is for itself.
        among: those that may be merged; share it.
        attempts: the record that `admit(note=attempts.append)` writes of this source. When the one whose source runs is
            disposed, another takes over, and with it what the record has.

    Raises:
        ConfigError: an argument of another kind, a key that cannot be hashed.

    Example:
        >>> import rxllm
        >>> flights = Flights()
        >>> calls = []
        >>> client = rxllm.function(lambda n: calls.append(n) or 2 * n)
        >>> doubled = rxllm.from_iterable([4, 4, 4]).pipe(
        ...     rxllm.operators.flat_map(
        ...         lambda n: client.send(client.wrap(n)).pipe(single_flight(n, among=flights)), window=3
        ...     )
        ... )
        >>> [reply.value for reply in rxllm.collect(doubled)], calls
        ([8, 8, 8], [4])
    """
    if not isinstance(among, Flights):
        msg = f"among must be a Flights, got {among!r}"
        raise ConfigError(msg)
    try:
        hash(key)
    except TypeError:
        msg = f"key must be hashable, got {key!r}"
        raise ConfigError(msg) from None
    return lambda source: source if key is None else Merged(source, key, among, [] if attempts is None else attempts)


def flight_key(request: Request) -> bytes | None:
    """Return what is the same for requests that have the same answer; None for one whose answers may differ.

    They may unless `temperature` is 0 or there is a `seed`.

    >>> from rxllm import chat
    >>> flight_key(chat("hi", temperature=0)) == flight_key(chat("hi", temperature=0.0, id="mine"))
    True
    >>> flight_key(chat("hi")), flight_key(chat("hi", temperature=0.1))
    (None, None)
    """
    body: Any = request.body
    if not isinstance(body, dict):
        return None
    body = cast("dict[Any, Any]", body)
    temperature: object = body.get("temperature")
    fixed = isinstance(temperature, int | float) and not isinstance(temperature, bool) and temperature == 0
    if fixed:
        body = {**body, "temperature": 0}  # 0.0 and 0 are the same
    elif body.get("seed") is None:
        return None
    try:
        return msgspec.json.encode((request.operation, body), order="deterministic")
    except (TypeError, ValueError, RecursionError, UnicodeError):  # it fails when it is sent, and says why
        return None


class Merged(Stream[T]):
    """`source`, or the equal one that is on its way."""

    def __init__(self, source: Observable[T], key: Hashable, flights: Flights, attempts: list[Attempt]) -> None:
        self.source = source
        self.key = key
        self.flights = flights
        self.attempts = attempts

    def _start(self, observer: Observer[T], carrier: DemandScheduler) -> Disposable:
        going = self.flights.going
        place = (carrier.flow, self.key)
        flight = going.get(place)
        if flight is not None:
            return flight.join(_Passenger(flight, observer, self.attempts))
        flight = _Flight(going, place, self.attempts)
        passenger = flight.join(_Passenger(flight, observer, self.attempts))
        return connected(passenger, flight.start, self.source, carrier)


class _Flight:
    """One source that is subscribed, and all who wait for it; the first of them gets the record."""

    __slots__ = ("_going", "_place", "_record", "_told", "_upstream", "ended", "passengers")

    def __init__(
        self, going: dict[tuple[Flow, Hashable], _Flight], place: tuple[Flow, Hashable], record: list[Attempt]
    ) -> None:
        self._record = record  # of the source, and of the one who brought it
        self._told = 0  # so much of it is in the record of somebody who has left
        self._going = going
        self._place = place
        self._upstream: Disposable = NOTHING
        self.ended = False
        self.passengers: dict[_Passenger, None] = {}  # in the order in which they came
        going[place] = self

    def join(self, passenger: _Passenger) -> _Passenger:
        self.passengers[passenger] = None
        return passenger

    def start(self, source: Observable[Any], carrier: DemandScheduler) -> None:
        upstream = subscribe(source, self, carrier)
        if self.ended:
            upstream.dispose()
        else:
            self._upstream = upstream

    def close(self) -> None:
        """Let nobody join any more."""
        if self._going.get(self._place) is self:
            del self._going[self._place]

    def leave(self, passenger: _Passenger) -> None:
        if passenger not in self.passengers:
            return
        is_first = passenger is next(iter(self.passengers))
        del self.passengers[passenger]
        if not self.passengers and not self.ended:
            self.ended = True
            self.close()
            upstream, self._upstream = self._upstream, NOTHING
            upstream.dispose()
        if is_first:
            self._tell(passenger)

    def _tell(self, passenger: _Passenger) -> None:
        """Give the record, as far as nobody has it, to one who leaves or lands."""
        news = self._record[self._told :]
        self._told += len(news)
        if passenger.attempts is not self._record:
            passenger.attempts.extend(news)

    def on_next(self, value: Any) -> None:
        self.close()
        for passenger in tuple(self.passengers):
            if passenger in self.passengers:
                passenger.observer.on_next(value)

    def on_error(self, error: Exception) -> None:
        for passenger in self._landed():
            if passenger in self.passengers:
                del self.passengers[passenger]
                passenger.observer.on_error(error)

    def on_completed(self) -> None:
        for passenger in self._landed():
            if passenger in self.passengers:
                del self.passengers[passenger]
                passenger.observer.on_completed()

    def _landed(self) -> tuple[_Passenger, ...]:
        if self.ended:
            return ()
        self.ended = True
        self._upstream = NOTHING  # no cycle is left for the garbage collector
        self.close()
        landed = tuple(self.passengers)
        if landed:
            self._tell(landed[0])
        return landed


class _Passenger:
    """Who waits for a flight: its subscription."""

    __slots__ = ("_flight", "attempts", "observer")

    def __init__(self, flight: _Flight, observer: Observer[Any], attempts: list[Attempt]) -> None:
        self._flight = flight
        self.observer = observer
        self.attempts = attempts

    def dispose(self) -> None:
        self._flight.leave(self)
