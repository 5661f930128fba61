"""The canonical pipeline: requests in, outcomes out."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

from rxllm import runtime
from rxllm.clients.routing import Routes
from rxllm.errors import ConfigError, check_callable, check_choice, check_number
from rxllm.gate import Gate, Lane, lane_of
from rxllm.messages import Attempt, Chunk, Outcome, Request, Restarted, chat
from rxllm.operators._recipe import Recipe, RoutedRecipe, Shown, is_client, is_one
from rxllm.operators.flat_map import flat_map
from rxllm.operators.single_flight import Flights
from rxllm.policies.backoff import Backoff, Draw
from rxllm.policies.hedging import Hedge, Hedging
from rxllm.policies.timeouts import Timeouts
from rxllm.policies.validation import Validate
from rxllm.stream import Stream, subscribe

if TYPE_CHECKING:
    from reactivex import Observable

    from rxllm.clients.base import Client
    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["call"]

T = TypeVar("T")
Check = Callable[[Any], bool | None]


def call(
    client: Client[T] | Routes[T] | Callable[[Request], Client[T]],
    *,
    gate: Gate | Lane | None = None,
    retry: Backoff = Backoff(),  # noqa: B008  frozen
    validate: Validate | Check | None = None,
    timeouts: Timeouts = Timeouts(),  # noqa: B008  frozen
    deadline: float = 3600.0,
    window: int | None = None,
    ordered: bool = False,
    on_failure: Literal["emit", "raise"] = "emit",
    seed: int | None = None,
    stream: bool = False,
    on_chunk: Callable[[Request, Chunk | Restarted], object] | None = None,
    hedge: Hedge | None = None,
    single_flight: bool = False,
) -> Calling[T]:
    """Call a model for each request: bounded in parallel, through quotas, with checks and retries.

        requests              a-b-c|
        a: refused, answered  --#  --A      b, c: answered    --B  --C
        call(client)          -----B-C--A|

    It is these operators, and nothing in it is private:

        flat_map(lambda request: client.send(request, timeouts=timeouts).pipe(
            admit(gate, cost=client.cost(request)), retry(backoff), validate(check), to_outcome(request)),
            window=window)

    Emits: one `Outcome` for each item, with every attempt; a failed one is a value too (`on_failure="raise"` ends the
        stream with its error). An item that is a failed `Outcome` already, of `from_jsonl` or an earlier call, counts
        as one of this call.
    Holds: at most `window` requests in progress, those that wait or back off included, and what `flat_map` holds.
    Errors, Completes, Dispose: as `flat_map`; an error that `halts` (a quota with `on_exhausted="fail"` is used up) is
        the last outcomes' and then the stream's, and what is on the wire comes before it.

    Args:
        client: what to send with; or several, as `any_of` returns; or request -> client.
        gate: quotas and limits, shared by all pipelines on the same key; or a lane of it. None: none. With `any_of`
            each route has its own.
        retry: how often and how long to retry transient errors.
        validate: a check of each reply, or `Validate` with attempts and a repair.
        timeouts: of each attempt, phase by phase.
        deadline: seconds from the pull after which a request is given up, whatever it waits for; the time in which a
            used-up quota suspends the gate (`gate.suspended`) does not count.
        window: requests in progress, >= 1. None: twice the gate's limit and 32; 256 without a limit; and at most as
            many again in place of those that back off for more than 5 s (`parking` of `flat_map`).
        ordered: emit in the order of the source.
        on_failure: "emit" or "raise".
        seed: makes the draws of the back-off reproducible.
        stream: have the answers come in pieces, which the outcomes have as a whole: then `timeouts.idle` is about the
            gap between two pieces, and an answer that breaks off is seen at once.
        on_chunk: (request, piece) -> anything; called in the loop with each piece as it comes, and with a `Restarted`
            before those of a further try. Answers are streamed then. What it raises fails that request.
        hedge: send a second attempt beside one that is later than most, and take the answer that comes first, where
            that is safe (`client.repeatable(request)`). The second is sent only if the gate has room for it at once.
            The other one is cancelled and costs what was reserved for it. None: never. See `operators.hedge`.
        single_flight: let requests of the same operation and body, with a temperature of 0 or a seed, that are in
            progress at the same time be one: each gets an outcome of its own, with the same reply or error. The
            attempts are those of one of the outcomes, so usage is counted once; the others have none.

    Raises:
        ConfigError: an argument out of range; a client that cannot stream; a gate beside `any_of`; pieces shown, or
            judged early, of requests that are hedged; pieces shown of requests that are merged.
    """
    routes = _check_client(client, gate)
    given = None if gate is None else lane_of(gate)
    for name, value, kind in (("retry", retry, Backoff), ("timeouts", timeouts, Timeouts)):
        if not isinstance(value, kind):
            msg = f"{name} must be a {kind.__name__}, got {value!r}"
            raise ConfigError(msg)
    check_number("deadline", deadline, above=0)
    check_number("window", window, least=1, integer=True, optional=True)
    check_number("seed", seed, integer=True, optional=True)
    check_choice("on_failure", on_failure, ("emit", "raise"))
    if validate is not None and not isinstance(validate, Validate):
        check_callable("validate", validate, optional=True)
        validate = Validate(check=validate)
    check_callable("on_chunk", on_chunk, optional=True)
    _check_merging(hedge, single_flight=single_flight, on_chunk=on_chunk, validate=validate)
    show: Callable[[Request, list[Attempt]], Shown] | None = None
    if stream or on_chunk is not None or (validate is not None and validate.early is not None):
        show = partial(Shown, on_chunk, None if validate is None else validate.early)
        _check_streams(client)
    recipe_of = Recipe if routes is None else RoutedRecipe

    def apply(source: Observable[Any], draw: Draw = runtime.uniform) -> Observable[Outcome[T]]:
        lane = Gate().main if given is None else given  # one of its own: what nobody shares may run on several loops
        width: int | Callable[[], int]
        if window is not None:
            width = window
        elif routes is not None:
            width = partial(getattr, routes, "window")
        else:  # it follows the limit of the gate
            width = partial(getattr, lane.gate, "window")
        recipe = recipe_of(
            client,
            lane,
            retry,
            validate,
            timeouts,
            deadline=deadline,
            draw=draw,
            raising=on_failure == "raise",
            show=show,
            hedging=None if hedge is None else Hedging(hedge),
            flights=Flights() if single_flight else None,
        )
        return flat_map(recipe, window=width, ordered=ordered, on_failure=on_failure, parking=window is None)(source)

    return Calling(apply if seed is None else lambda source: _Seeded(source, apply, seed), client, given)


def _check_client(client: object, gate: Gate | Lane | None) -> Routes[Any] | None:
    """Refuse what is no client; return it if it is several."""
    if isinstance(client, type):
        msg = f"client must be a client, got the class {client.__name__}: call it with its arguments"
        raise ConfigError(msg)
    if not isinstance(client, Routes):
        if not is_client(client):
            check_callable("client", client)
        return None
    if gate is not None:
        msg = f"gate: each route has its own, give it to Route(client, gate=…); got {gate!r}"
        raise ConfigError(msg)
    return cast("Routes[Any]", client)


def _check_streams(client: object) -> None:
    """Refuse a client that cannot stream; of one chosen by request that is seen later."""
    for one in client.clients if isinstance(client, Routes) else (client,):
        if is_client(one) and not hasattr(one, "stream"):
            msg = f"stream: {one!r} has answers in one piece only"
            raise ConfigError(msg)


def _check_merging(hedge: Hedge | None, *, single_flight: bool, on_chunk: object, validate: Validate | None) -> None:
    """Refuse to show two answers as one, or one as that of several requests."""
    if hedge is not None and not isinstance(hedge, Hedge):
        msg = f"hedge must be a Hedge or None, got {hedge!r}"
        raise ConfigError(msg)
    check_choice("single_flight", single_flight, (True, False))
    if hedge is not None and (on_chunk is not None or (validate is not None and validate.early is not None)):
        msg = "hedge: the pieces of two answers would be mixed: not with on_chunk or Validate(early=…)"
        raise ConfigError(msg)
    if single_flight and on_chunk is not None:
        msg = "single_flight: the pieces would be shown for one of the merged requests only: not with on_chunk"
        raise ConfigError(msg)


class Calling(Generic[T]):
    """What `call` returns: an operator that knows whom it asks, for those who keep its outcomes."""

    takes_finished = True  # as an item, see `rxllm.operators._finished`

    def __init__(
        self,
        apply: Callable[[Observable[Any]], Observable[Outcome[T]]],
        client: Client[T] | Routes[T] | Callable[[Request], Client[T]],
        lane: Lane | None,
    ) -> None:
        self._apply = apply
        self._client = client
        self._lane = lane

    def __call__(self, source: Observable[Any]) -> Observable[Outcome[T]]:
        """Return the stream of the outcomes."""
        return self._apply(source)

    def request(self, item: Any) -> Request:
        """Return the request that an item stands for; itself, if it is one.

        Raises:
            CallError: it stands for none.
        """
        if isinstance(item, Request):
            return item
        return cast("Client[T]", self._client).wrap(item) if is_one(self._client) else chat(item)

    def client(self, request: Request) -> Client[T] | Routes[T]:
        """Return the client that `request` is sent with; or the several that it may be sent with."""
        return cast("Client[T]", self._client if is_one(self._client) else cast("Any", self._client)(request))

    def keep_beside(self, path: str) -> None:
        """Keep what is booked of long quotas in files beside `path`: a journal there is to survive restarts."""
        client: object = self._client
        if isinstance(client, Routes):
            routes = cast("Routes[Any]", client)
            for name, lane in zip(routes.names, routes.lanes, strict=True):
                lane.gate.keep_beside(f"{path}.{name}")
        elif self._lane is not None:
            self._lane.gate.keep_beside(path)


class _Seeded(Stream[Outcome[T]]):
    """The stream of `apply(source, draw)`, with the same draws in each subscription."""

    def __init__(
        self,
        source: Observable[Any],
        apply: Callable[[Observable[Any], Draw], Observable[Outcome[T]]],
        seed: int,
    ) -> None:
        self.source = source
        self.apply = apply
        self.seed = seed

    def _start(self, observer: Observer[Outcome[T]], carrier: DemandScheduler) -> Disposable:
        return subscribe(self.apply(self.source, random.Random(self.seed).uniform), observer, carrier)
