"""Which of several routes the next attempt of a request takes."""

from collections.abc import Container, Sequence

__all__ = ["Joint", "Spread", "after_failure", "least_asked", "waiting_order"]


class Spread:
    """Spreads attempts over routes: to the least loaded, and of equals to the one whose turn it is.

    The load of a route is its attempts on the wire over its size; the size is its weight, times its limit if all routes
    have one. So a slow route gets fewer starts than a fast one, and who asks one at a time meets each route in
    proportion to its size. A route that could not be used has saved nothing up.

    Args:
        weights: Of each route, >= 0; one with 0 has no turns.

    Source: least outstanding requests; turns by start-time fair queueing, Goyal, Vin and Cheng, 1996.

    >>> spread = Spread([1.0, 2.0])
    >>> spread.choose([0, 1], in_flight=[0, 1], limits=[None, None]), spread.choose([0, 1], [1, 1], [None, None])
    (0, 1)
    """

    __slots__ = ("_tags", "_virtual", "_weights")

    def __init__(self, weights: Sequence[float]) -> None:
        self._weights = tuple(weights)
        self._tags = [0.0] * len(self._weights)
        self._virtual = 0.0  # the tag of the last start

    def _sizes(self, limits: Sequence[int | None]) -> list[float]:
        counted = None not in limits
        return [
            weight * (limit or 1) if counted else weight for weight, limit in zip(self._weights, limits, strict=True)
        ]

    def choose(self, able: Sequence[int], in_flight: Sequence[int], limits: Sequence[int | None]) -> int:
        """Return the route of the next attempt.

        Args:
            able: numbers of the routes that it could start on now, one or more; one without weight comes alone.
            in_flight: of each route: attempts on the wire.
            limits: of each route: how many may be there; None: any number.
        """
        if len(able) == 1:
            return able[0]
        sizes = self._sizes(limits)

        def rank(number: int) -> tuple[float, float, int]:
            return in_flight[number] / sizes[number], max(self._tags[number], self._virtual), number

        return min(able, key=rank)

    def start(self, number: int, limits: Sequence[int | None]) -> None:
        """Count a start on a route; one of weight 0 has no turns to count."""
        size = self._sizes(limits)[number]
        if size:
            tag = max(self._tags[number], self._virtual)
            self._virtual = tag
            self._tags[number] = tag + 1 / size


def waiting_order(
    usable: Sequence[int], failed: Container[int], shut: Container[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the routes that an attempt waits at, and those where it waits too when that takes long.

    Args:
        usable: the routes that may take it.
        failed: those that have failed it before: it goes elsewhere, if there is an elsewhere.
        shut: those where nothing starts for long: they are no elsewhere.

    >>> waiting_order([0, 1, 2], failed=[0], shut=[])
    ((1, 2), (0,))
    >>> waiting_order([0, 1], failed=[0], shut=[1])
    ((0, 1), ())
    """
    fresh = tuple(number for number in usable if number not in failed)
    if all(number in shut for number in fresh):
        return tuple(usable), ()
    return fresh, tuple(number for number in usable if number in failed)


def after_failure(failed: Sequence[int], number: int, usable: Sequence[int]) -> tuple[int, ...]:
    """Return which routes have failed a request, after route `number` did; when all have, only that one counts.

    >>> after_failure((0,), 1, [0, 1, 2]), after_failure((0, 2), 1, [0, 1, 2])
    ((0, 1), (1,))
    """
    found = (*(one for one in failed if one != number), number)
    return (number,) if all(one in found for one in usable) else found


def least_asked(hints: Sequence[tuple[int, object]]) -> int:
    """Return the route that has asked for the shortest wait, of routes that have all refused; no hint is no wait.

    >>> least_asked([(0, 70.0), (1, 30.0), (2, 50.0)])
    1
    """
    return min(hints, key=lambda pair: pair[1] if isinstance(pair[1], int | float) else 0.0)[0]


class Joint:
    """The time in which something was so at all of several places at once, from how long it was so at each.

    Exact when it is asked at each change; else between two questions the place where it was shortest counts.

    >>> joint = Joint()
    >>> joint.add([5.0, 0.0]), joint.add([8.0, 2.0]), joint.add([9.0, 2.0])
    (0.0, 2.0, 2.0)
    """

    __slots__ = ("_before", "_total")

    def __init__(self) -> None:
        self._before: Sequence[float] | None = None
        self._total = 0.0

    def add(self, seconds: Sequence[float]) -> float:
        """Return the time so far; `seconds` is that of each place, and grows."""
        before = self._before
        self._before = seconds
        self._total += max(0.0, min((now - then for now, then in zip(seconds, before or seconds, strict=True))))
        return self._total
