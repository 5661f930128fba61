"""Map each item to a stream of its own and run at most `window` of them at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar, overload

from rxllm.errors import check_callable, check_choice, check_number
from rxllm.operators._ordered import OrderedStage
from rxllm.operators._stage import Plan, Stage
from rxllm.stream import Stream, connected

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from reactivex import Observable

    from rxllm.demand import DemandScheduler, Disposable, Observer
    from rxllm.messages import Outcome

__all__ = ["flat_map"]

A = TypeVar("A")
B = TypeVar("B")
OnFailure = Literal["emit", "raise"]


@overload
def flat_map(
    mapper: Callable[[A], Observable[B] | Awaitable[B]],
    *,
    window: int | Callable[[], int],
    ordered: bool = False,
    buffer: int | None = None,
    on_failure: Literal["raise"],
    parking: bool = False,
) -> Callable[[Observable[A]], Observable[B]]: ...
@overload
def flat_map(
    mapper: Callable[[A], Observable[B] | Awaitable[B]],
    *,
    window: int | Callable[[], int],
    ordered: bool = False,
    buffer: int | None = None,
    on_failure: Literal["emit"] = "emit",
    parking: bool = False,
) -> Callable[[Observable[A]], Observable[B | Outcome[Any]]]: ...
def flat_map(
    mapper: Callable[[A], Observable[B] | Awaitable[B]],
    *,
    window: int | Callable[[], int],
    ordered: bool = False,
    buffer: int | None = None,
    on_failure: OnFailure = "emit",
    parking: bool = False,
) -> Callable[[Observable[A]], Observable[Any]]:
    """Map each item to a stream of its own and run at most `window` of them at a time; pull only what can be started.

        source                  a--b--c------|
        a, b, c                 -----A|  --B|  -C|
        flat_map(f, window=2)   -----(AB)-C--|          as they complete
          … ordered=True        -----(AB)-C--|          in the order of the source

    Emits: what the inner streams emit, as they do; with `ordered` item by item. An inner stream that fails, or a mapper
        that raises, fails that item only: a failed `Outcome` with the item in its request (`on_failure="raise"` ends
        the stream).
    Holds: at most `window` items in progress and `buffer` finished ones that the consumer has no room for, whatever the
        source; with `parking` at most one more window in progress.
    Errors: a failed source ends the stream with its error after what is in progress is delivered. So does an inner
        stream whose error `halts`: nothing more is pulled, by the stages above neither, and what waits for a place, or
        still comes from there, fails with the same error.
    Completes: when the source has completed and nothing is in progress or held.
    Dispose: cancels the source and everything in progress.

    Args:
        mapper: item -> Observable or awaitable of what becomes of it. Called once an item.
        window: items in progress at a time, >= 1; or a function that is asked how many now, before items are started.
        ordered: emit in the order of the source; a slow item holds back those after it.
        buffer: finished items to keep ready for the consumer, >= 0. None: the window of the next stage (0 before a
            sink, which has a queue of its own), and with `ordered` at least this window.
        on_failure: "emit" or "raise".
        parking: let another item start in the place of one that a `retry` inside it has wait for more than 5 s: such a
            wait is its own, and a window full of them would keep back items that could go. Those that go on take their
            places back at once.

    Raises:
        ConfigError: an argument out of range; in the stream: a source that emits more than 1,024 items without demand,
            a grouped observable that cannot be started at once (its items would be lost).

    Example:
        >>> import rxllm, reactivex as rx
        >>> doubled = rxllm.from_iterable([1, 2, 3]).pipe(flat_map(lambda n: rx.of(2 * n), window=2))
        >>> rxllm.collect(doubled)
        [2, 4, 6]
    """
    check_callable("mapper", mapper)
    if not callable(window):
        check_number("window", window, least=1, integer=True)
    check_number("buffer", buffer, least=0, integer=True, optional=True)
    check_choice("on_failure", on_failure, ("emit", "raise"))
    check_choice("parking", parking, (True, False))

    plan = Plan(mapper, window, ordered, buffer, raising=on_failure == "raise", parking=parking)

    def apply(source: Observable[A]) -> Observable[Any]:
        return _FlatMap(source, plan)

    return apply


class _FlatMap(Stream[Any]):
    def __init__(self, source: Observable[Any], plan: Plan) -> None:
        self.source = source
        self.plan = plan

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        stage = (OrderedStage if self.plan.ordered else Stage)(self.plan, observer, carrier)
        return connected(stage, stage.connect, self.source, carrier)
