"""What stands between a source and an operator that something is wrapped around: it looks at each item before that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rxllm.demand import UNDEMANDED, Demand, Outlet, undemanded
from rxllm.errors import ConfigError
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from reactivex import Observable

    from rxllm.demand import DemandScheduler, Disposable, Observer, Puller
    from rxllm.messages import Request
    from rxllm.operators.journal import Asking

__all__ = ["Intake", "Wrapper"]

T = TypeVar("T")


class Wrapper(Generic[T]):
    """An operator around another one, which knows whom that asks."""

    def __init__(self, operator: Asking[T]) -> None:
        self.operator = operator
        self.takes_finished: bool = getattr(operator, "takes_finished", False)  # see `rxllm.operators._finished`

    def request(self, item: Any) -> Request:
        """Return the request that an item stands for; itself, if it is one.

        Raises:
            CallError: it stands for none.
        """
        return self.operator.request(item)

    def client(self, request: Request) -> Any:
        """Return the client that `request` is sent with; or the several that it may be sent with."""
        return self.operator.client(request)

    def keep_beside(self, path: str) -> None:
        """Keep what is booked of long quotas in files beside `path`, if the operator inside knows how."""
        keep = getattr(self.operator, "keep_beside", None)
        if keep is not None:
            keep(path)


class Intake(Demand):
    """The demand on the source, the observer of the source, and what the operator inside gets.

    It asks for no more than the operator inside has room for. A subclass says in `free` how much of that it wants, and
    does in `take` with an item what it has to: `give` it to the operator, now or later. `inside` counts what was taken
    and not given. `close` ends it after that.
    """

    __slots__ = ("_asking", "_inside", "_upstream", "closed", "inside", "over")

    def __init__(self, carrier: DemandScheduler) -> None:
        super().__init__(carrier.clock, carrier.flow)
        self._asking = False  # for room of the operator inside
        self._upstream: Disposable | None = None
        self._inside: Outlet[Any] | None = None
        self.inside: int = 0
        self.over = False  # nothing more comes from the source
        self.closed = False  # the operator inside takes nothing more

    def source(self, source: Observable[Any]) -> Observable[Any]:
        """Return what the operator inside subscribes in the place of `source`."""
        return _Inside(source, self)

    def connect(self, source: Observable[Any], observer: Observer[Any], carrier: DemandScheduler) -> None:
        """Subscribe the source; `observer` and `carrier` are those of the operator inside.

        Raises:
            ConfigError: that is not the first time.
        """
        if self._inside is not None:
            msg = "the operator subscribes its source twice, and the source may be subscribed once"
            raise ConfigError(msg)
        self._inside = Outlet(observer, carrier, self.wake)
        if self.over:  # before it began
            self._inside.end()
            return
        self.below = carrier.demand
        upstream = subscribe(source, self, carrier.with_demand(self))
        if self.over:
            upstream.dispose()
            return
        self._upstream = upstream
        self.flow.add_stage(self.stop, self)

    # what subclasses say

    def free(self) -> int:
        """Return how many more items are wanted, whatever the operator inside has room for."""
        raise NotImplementedError

    def take(self, item: Any) -> None:
        """Take an item of the source."""
        raise NotImplementedError

    def ended(self, error: Exception | None) -> None:
        """Take the end of the source."""
        self.close(error)

    def cancelled(self, held: list[Any]) -> None:
        """Learn that the operator inside takes nothing more, neither what it was given and had no room for."""

    def fail(self, error: Exception) -> None:
        """End the whole stream now."""
        raise NotImplementedError

    # the demand on the source

    def room(self) -> int:
        """Return how many more items may come."""
        free = 0 if self.over else self.free()
        return free if self.below is None else min(free, self.below.room() - self.inside)

    @property
    def ahead(self) -> int:
        """Return what the operator inside says."""
        return 0 if self.below is None else self.below.ahead

    def wait(self, puller: Puller) -> None:
        """Offer `puller` room when there is some, here and in the operator inside."""
        super().wait(puller)
        self._ask()

    def wake(self) -> None:
        """Offer room to those who wait."""
        super().wake()
        self._ask()

    def _ask(self) -> None:
        """Wait for the operator inside, if it is the reason why others wait here."""
        below = self.below
        if self.waiting and not self._asking and below is not None and below.room() <= 0 and not self.over:
            self._asking = True
            below.wait(self)

    def pull(self, n: int) -> int:
        """Learn that the operator inside has room: items come from the source, in a later turn."""
        self._asking = False
        if n == 0:
            self.ask_end()
        self.wake()
        return 0

    # the observer of the source

    def on_next(self, item: Any) -> None:
        if self.over:
            return
        self.arrived += 1
        self.take(item)
        held = 0 if self._inside is None else len(self._inside.held)
        if self.inside + held > UNDEMANDED and not self.over:
            self.fail(undemanded())

    def on_error(self, error: Exception) -> None:
        if not self.over:
            self._end(error)

    def on_completed(self) -> None:
        if not self.over:
            self._end(None)

    def _end(self, error: Exception | None) -> None:
        self.over = True
        self._leave()
        self.ended(error)

    # what the operator inside gets

    def give(self, item: Any) -> None:
        """Give an item to the operator inside."""
        if self._inside is not None:
            self._inside.push(item)

    def close(self, error: Exception | None = None) -> None:
        """End what the operator inside gets."""
        self.closed = True
        if self._inside is not None:
            self._inside.end(error)

    # the ends

    def stop(self, error: Exception | None = None) -> None:
        """Take nothing more from the source, as if it had ended here."""
        if self.over:
            return
        upstream, self._upstream = self._upstream, None
        self._end(error)
        if upstream is not None:
            upstream.dispose()

    def dispose(self) -> None:
        """Leave the source; the operator inside takes nothing more."""
        self.over = True
        self._leave()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.dispose()
        held = [] if self._inside is None else list(self._inside.held)
        if self._inside is not None:
            self._inside.dispose()
        if not self.closed or held:
            self.closed = True
            self.cancelled(held)

    def _leave(self) -> None:
        self.flow.remove_stage(self.stop)
        if self._asking and self.below is not None:
            self._asking = False
            self.below.leave(self)


class _Inside(Stream[Any]):
    """The items of `source` that an intake gives on."""

    def __init__(self, source: Observable[Any], intake: Intake) -> None:
        self.source = source
        self.intake = intake

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        return connected(self.intake, self.intake.connect, self.source, observer, carrier)
