"""How a journal takes items in, and how it lets outcomes out: the demands on both sides of the operator inside."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from rxllm.demand import UNDEMANDED, Demand, undemanded
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from reactivex import Observable

    from rxllm.demand import DemandScheduler, Disposable, Observer, Outlet, Puller
    from rxllm.messages import Request

__all__ = ["Exit", "Given", "Run", "Source", "Taking"]

WIDTH = 256  # requests in progress of an operator that does not say how many it can take


class Run(Protocol):
    """One run of a journal, as those here see it."""

    outlet: Outlet[Any]
    spare: int  # finished outcomes that the consumer wants to be kept ready

    def look(self, item: Any) -> Any:
        """Return what the operator is given for an item; None: it is skipped."""
        ...

    def inside(self) -> int:
        """Return how many items are in progress."""
        ...

    def waiting(self) -> int:
        """Return how many finished outcomes are not delivered."""
        ...

    def crowd(self) -> int:
        """Return how many finished outcomes there are beyond those that may be kept ready."""
        ...

    def took(self, taking: Taking) -> None:
        """Learn who takes the items."""
        ...


class Given:
    """The requests that are in progress, each with its key: known again by its identity, else by its id."""

    __slots__ = ("_given", "count")

    def __init__(self) -> None:
        self._given: dict[int, _One] = {}
        self.count = 0

    def add(self, request: Request, key: str | None) -> None:
        """Note a request; `key` is None if it is not to be written."""
        place = id(request)
        self._given[place] = (request, key, self._given.get(place))
        self.count += 1

    def take(self, request: Request) -> tuple[str | None] | None:
        """Forget a request, and return its key; None if it is not here."""
        place, given = id(request), self._given
        one = given.pop(place, None)
        if one is None and request.id is not None:
            place = next((place for place, other in given.items() if other[0].id == request.id), 0)
            one = given.pop(place, None)
        if one is None:
            return None
        self.count -= 1
        if one[2] is not None:
            given[place] = one[2]
        return (one[1],)


# The request, held so that nothing else gets its identity; its key; and what the same object was given for besides.
_One = tuple["Request", str | None, "_One | None"]


class Exit(Demand):
    """The demand on the operator: what has been answered comes out at once, to be written; the journal holds it."""

    __slots__ = ("_run",)

    def __init__(self, run: Run, carrier: DemandScheduler) -> None:
        super().__init__(carrier.clock, carrier.flow)
        self._run = run

    def room(self) -> int:
        """Return as much as ever: how much is in progress is decided where it is taken in."""
        return WIDTH

    @property
    def ahead(self) -> int:
        """Return what the consumer may have ready; it is held here."""
        return self._run.spare


class Source(Stream[Any]):
    """The source as the operator inside sees it: without what is in the file."""

    def __init__(self, run: Run, source: Observable[Any]) -> None:
        self.run_of = run  # not `run`: that is a method of every Observable
        self.source = source

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        taking = Taking(self.run_of, observer, carrier)
        self.run_of.took(taking)
        return connected(taking, taking.connect, self.source, carrier)


class Taking(Demand):
    """The demand on the source, and its observer: looks up each item, and hands on what is to be asked."""

    __slots__ = ("_done", "_handed", "_observer", "_offered", "_run", "_stage", "_upstream")

    def __init__(self, run: Run, observer: Observer[Any], carrier: DemandScheduler) -> None:
        super().__init__(carrier.clock, carrier.flow)
        self._run = run
        self._observer = observer
        # The demand of the stage inside; an operator without one passes on that of its consumer, who never has enough.
        self._stage = None if carrier.demand is None or isinstance(carrier.demand, Exit) else carrier.demand
        self._offered = False  # waits for room of the stage
        self._handed = 0  # items handed on
        self._upstream: Disposable | None = None
        self._done = False

    def connect(self, source: Observable[Any], carrier: DemandScheduler) -> None:
        """Subscribe the source with this demand."""
        upstream = subscribe(source, self, carrier.with_demand(self))
        if self._done:
            upstream.dispose()
        else:
            self._upstream = upstream

    # the demand

    def room(self) -> int:
        """Return what the stage can take, as far as finished outcomes do not pile up."""
        if self._done:
            return 0
        stage = self._stage
        free = WIDTH - self._run.inside() if stage is None else stage.room()
        return free - self._run.crowd()

    def wait(self, puller: Puller) -> None:
        """Offer `puller` room when its turn comes."""
        self.waiting.append(puller)
        self.wake()

    def wake(self) -> None:
        """Offer room to those who wait, in the next turn; without any, wait for that of the stage."""
        if not self.waiting or self._turning or self._done:
            return
        if self.room() > 0:
            super().wake()
        elif self._stage is not None and not self._offered and self._stage.room() <= 0:
            self._offered = True
            self._stage.wait(self)

    def pull(self, n: int) -> int:
        """Offer room to those who wait, now: the stage has some."""
        self._offered = False
        handed = self._handed
        if n == 0:
            self.ask_end()
        if not self._turning and not self._done:
            self._turning = True
            self._turn()
        return self._handed - handed

    # the observer

    def on_next(self, item: Any) -> None:
        """Hand on what is to be asked."""
        if self._done:
            return
        self.arrived += 1
        try:
            found = self._run.look(item)
        except Exception as error:
            self._end(error)
            return
        if self._done:
            return  # the consumer of an outcome of the file has left
        if found is not None:
            self._handed += 1
            self._observer.on_next(found)
        if self._run.waiting() > UNDEMANDED + WIDTH and not self._done:
            self._end(undemanded())

    def on_error(self, error: Exception) -> None:
        """End with the error of the source."""
        self._end(error, release=False)

    def on_completed(self) -> None:
        """End with the source."""
        self._end(None, release=False)

    def _end(self, error: Exception | None, *, release: bool = True) -> None:
        if self._done:
            return
        upstream = self._upstream
        self._leave()
        if release and upstream is not None:
            upstream.dispose()
        if error is None:
            self._observer.on_completed()
        else:
            self._observer.on_error(error)

    def stop(self) -> None:
        """Take nothing more: the operator is told that this was all."""
        self._end(None)

    def _leave(self) -> None:
        self._done = True
        self._upstream = None
        if self._offered and self._stage is not None:
            self._offered = False
            self._stage.leave(self)

    def dispose(self) -> None:
        """Take nothing more."""
        upstream = self._upstream
        self._leave()
        if upstream is not None:
            upstream.dispose()
