"""The canonical pipeline: requests in, outcomes out."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

import reactivex as rx
from reactivex.observable.groupedobservable import GroupedObservable

from rxllm import runtime
from rxllm.clients.routing import Routes
from rxllm.errors import CancelledError, ConfigError, ValidationError, check_callable, check_choice, check_number
from rxllm.gate import Gate, Lane, lane_of
from rxllm.messages import Attempt, Chunk, Outcome, Reply, Request, Restarted, chat
from rxllm.operators.admit import Admitted
from rxllm.operators.flat_map import GROUPED, flat_map
from rxllm.operators.hedge import Hedged
from rxllm.operators.retry import Deadline, Retry
from rxllm.operators.routed import LastRoutesBudget, Routed
from rxllm.operators.single_flight import Flights, Merged, flight_key
from rxllm.operators.to_outcome import ToOutcome, mark_invalid
from rxllm.operators.validate import Validated, verdict
from rxllm.policies.backoff import Backoff, Draw
from rxllm.policies.hedging import Hedge, Hedging
from rxllm.policies.timeouts import Timeouts
from rxllm.policies.validation import Validate
from rxllm.stream import Stream, subscribe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reactivex import Observable

    from rxllm.clients.base import Client
    from rxllm.demand import DemandScheduler, Disposable, Observer
    from rxllm.policies.budget import RetryBudget

__all__ = ["call"]

T = TypeVar("T")
Check = Callable[[Any], bool | None]
Show = Callable[[Chunk | Restarted], object]
Attempting = Admitted[Reply[Any]] | Routed[Any]


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
        window: requests in progress, >= 1. None: twice the gate's limit and 32; 256 without a limit.
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
    lane = lane_of(Gate() if gate is None else gate)
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
    show: Callable[[Request, list[Attempt]], _Shown] | None = None
    if stream or on_chunk is not None or (validate is not None and validate.early is not None):
        show = partial(_Shown, on_chunk, None if validate is None else validate.early)
        _check_streams(client)
    if window is not None:
        width: int | Callable[[], int] = window
    else:  # it follows the limit of the gate
        width = (lambda: lane.gate.window) if routes is None else (lambda: routes.window)
    recipe_of = _Recipe if routes is None else _RoutedRecipe

    def apply(source: Observable[Any], draw: Draw = runtime.uniform) -> Observable[Outcome[T]]:
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
        return flat_map(recipe, window=width, ordered=ordered, on_failure=on_failure)(source)

    return Calling(apply if seed is None else lambda source: _Seeded(source, apply, seed), client)


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


def is_client(value: object) -> bool:
    """Say whether `value` can be sent with; a coroutine has a `send` too."""
    return hasattr(value, "send") and hasattr(value, "cost")


def _is_one(client: object) -> bool:
    """Say whether `client` is the same for each request."""
    return is_client(client) or isinstance(client, Routes)


class Calling(Generic[T]):
    """What `call` returns: an operator that knows whom it asks, for those who keep its outcomes."""

    def __init__(
        self,
        apply: Callable[[Observable[Any]], Observable[Outcome[T]]],
        client: Client[T] | Routes[T] | Callable[[Request], Client[T]],
    ) -> None:
        self._apply = apply
        self._client = client

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
        return cast("Client[T]", self._client).wrap(item) if _is_one(self._client) else chat(item)

    def client(self, request: Request) -> Client[T] | Routes[T]:
        """Return the client that `request` is sent with; or the several that it may be sent with."""
        return cast("Client[T]", self._client if _is_one(self._client) else cast("Any", self._client)(request))


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


class _Recipe:
    """What `call` does with each item: item -> its stream of one outcome."""

    def __init__(
        self,
        client: Any,
        lane: Lane,
        backoff: Backoff,
        validation: Validate | None,
        timeouts: Timeouts,
        *,
        deadline: float,
        draw: Draw,
        raising: bool,
        show: Callable[[Request, list[Attempt]], _Shown] | None,
        hedging: Hedging | None,
        flights: Flights | None,
    ) -> None:
        self.choose: Callable[[Request], Any] | None = None if _is_one(client) else client
        self.client = client
        self.lane = lane
        self.gate = lane.gate
        self.backoff = backoff
        if validation is None and (self.choose is not None or getattr(client, "typed", False)):
            validation = TYPED
        self.validation = validation
        self.timeouts = timeouts
        self.deadline = Deadline(deadline, client.suspended if isinstance(client, Routes) else lane.gate.suspended)
        self.draw = draw
        self.raising = raising
        self.show = show
        self.hedging = hedging
        self.flights = flights

    def __call__(self, item: Any) -> Observable[Outcome[Any]]:
        if isinstance(item, Request):
            request = item
        elif isinstance(item, Outcome) and item.error is not None:
            failed = cast("Outcome[Any]", item)
            return rx.throw(item.error) if self.raising else rx.of(failed)
        elif isinstance(item, GroupedObservable):
            raise ConfigError(GROUPED)
        else:
            request = self._wrap(item)
        attempts: list[Attempt] = []
        begun: list[float] = []
        show = None if self.show is None else self.show(request, attempts)
        first = self.attempt(request, attempts, show)
        stream = self.tries(request, first, begun)
        validation = self.validation
        if validation is not None:
            again = _Again(self, validation, request, first, attempts, stream, begun, show)
            stream = Validated(stream, validation.check or _good, validation.attempts, again)
        if self.flights is not None:
            stream = self._merged(stream, request, attempts, self.flights)
        return ToOutcome(stream, request, attempts, self.deadline, begun, raising=self.raising)

    def _wrap(self, item: Any) -> Request:
        """Return the request of an item that is none: the client knows; one chosen by request takes a prompt."""
        if self.choose is None:
            wrapped: Request = self.client.wrap(item)
            return wrapped
        return chat(item)

    def attempt(self, request: Request, attempts: list[Attempt], show: Show | None) -> Attempting:
        """Return the stream of one attempt, behind the gate; the record of each goes to `attempts`."""
        client = self.client if self.choose is None else self._chosen(request)
        cost: Mapping[str, float] = client.cost(request) if self.gate.units else {}
        if show is None:
            sending = client.send(request, timeouts=self.timeouts)
        else:
            sending = client.send(request, timeouts=self.timeouts, on_chunk=show)
        return Admitted(sending, self.lane, cost, attempts.append if self.hedging is None else _in_order(attempts))

    def _chosen(self, request: Request) -> Any:
        """Return the client for `request`."""
        if self.choose is None:
            return self.client
        client = self.choose(request)
        if not is_client(client):
            if inspect.iscoroutine(client):
                client.close()
            msg = (
                f"client must return a client, got {type(client).__name__}; "
                "to call a function of your own give function(f)"
            )
            raise ConfigError(msg)
        return client

    def tries(self, request: Request, attempt: Attempting, begun: list[float]) -> Observable[Reply[Any]]:
        """Return the stream of one answer: `attempt`, retried while its errors are transient."""
        source = attempt if self.hedging is None else self._hedged(request, attempt, self.hedging)
        return Retry(source, self.backoff, self.deadline, self.draw, begun, budget=self.gate.retry_budget)

    def _hedged(self, request: Request, attempt: Attempting, hedging: Hedging) -> Observable[Reply[Any]]:
        """Return `attempt` with a second one when it is late, if asking twice does no harm."""
        repeatable = getattr(self._chosen(request), "repeatable", None)  # a function of the user's does not know
        return Hedged(attempt, hedging) if repeatable is None or repeatable(request) else attempt

    def _merged(
        self, stream: Observable[Reply[Any]], request: Request, attempts: list[Attempt], flights: Flights
    ) -> Observable[Reply[Any]]:
        """Return `stream`, or what is on its way for an equal request."""
        key = flight_key(request)
        return stream if key is None else Merged(stream, (self._chosen(request), key), flights, attempts)


class _RoutedRecipe(_Recipe):
    """The same with several clients, each behind a gate of its own."""

    def attempt(self, request: Request, attempts: list[Attempt], show: Show | None) -> Attempting:
        note = attempts.append if self.hedging is None else _in_order(attempts)
        return Routed(self.client, request, self.timeouts, note, show)

    def tries(self, request: Request, attempt: Attempting, begun: list[float]) -> Observable[Reply[Any]]:
        source = attempt if self.hedging is None else self._hedged(request, attempt, self.hedging)
        budget: RetryBudget | None = None
        if any(lane.gate.retry_budget is not None for lane in self.client.lanes):
            budget = cast("RetryBudget", LastRoutesBudget(cast("Routed[Any]", attempt)))  # it does what one does
        return Retry(source, self.backoff, self.deadline, self.draw, begun, budget=budget)


def _in_order(attempts: list[Attempt]) -> Callable[[Attempt], None]:
    """Return what notes an attempt; one that an answer has overtaken goes before that: the last is what came out."""

    def note(attempt: Attempt) -> None:
        overtaken = isinstance(attempt.error, CancelledError) and attempts and attempts[-1].error is None
        attempts.insert(len(attempts) - 1 if overtaken else len(attempts), attempt)

    return note


class _Shown:
    """Shows one request's answer piece by piece, and cuts it off when it is bad already."""

    __slots__ = ("_attempts", "_early", "_on_chunk", "_request", "_text", "over")

    def __init__(
        self,
        on_chunk: Callable[[Request, Chunk | Restarted], object] | None,
        early: Callable[[str], bool | None] | None,
        request: Request,
        attempts: list[Attempt],
    ) -> None:
        self._on_chunk = on_chunk
        self._early = early
        self._request = request
        self._attempts = attempts
        self._text = ""
        self.over = False  # the answer so far did not pass: what comes next is of another one

    def __call__(self, piece: Chunk | Restarted) -> None:
        if isinstance(piece, Restarted):
            self._text, self.over = "", False
        elif self.over:
            self(Restarted(attempt=len(self._attempts) + 1, error=self._attempts[-1].error))
        if self._on_chunk is not None:
            self._on_chunk(self._request, piece)
        if self._early is None or isinstance(piece, Restarted):
            return
        if piece.text and piece.index == 0:
            self._text += piece.text
            error = verdict(self._early, self._text)
            if error is not None:
                error.reply = Reply(value=self._text, text=self._text)
                raise error


def _good(_reply: Reply[Any]) -> None:
    """Pass: the client has seen to it that the value is of its type."""


TYPED = Validate()  # ask again for what is not of its type


class _Again:
    """What follows an answer that did not pass: note it, and ask again, perhaps otherwise."""

    __slots__ = ("_attempt", "_attempts", "_begun", "_recipe", "_request", "_show", "_stream", "_validation")

    def __init__(  # noqa: PLR0917  private
        self,
        recipe: _Recipe,
        validation: Validate,
        request: Request,
        attempt: Attempting,
        attempts: list[Attempt],
        stream: Observable[Reply[Any]],
        begun: list[float],
        show: _Shown | None,
    ) -> None:
        self._show = show
        self._begun = begun  # when the request was pulled, for the deadline of all its tries
        self._recipe = recipe
        self._validation = validation
        self._request = request
        self._attempt = attempt
        self._attempts = attempts
        self._stream = stream

    def __call__(self, reply: Reply[Any], error: ValidationError) -> Observable[Reply[Any]]:
        mark_invalid(self._attempts, error)
        if self._show is not None:
            self._show.over = True
        repair = self._validation.repair
        if repair is None:
            return self._stream
        repaired = repair(self._request, reply, error)
        if not isinstance(repaired, Request):
            msg = f"repair must return a Request, got {type(repaired).__name__}"
            raise ConfigError(msg)
        self._request = repaired
        before, attempt = self._attempt, self._recipe.attempt(repaired, self._attempts, self._show)
        attempt.follow(cast("Any", before))  # the two are of the same kind
        self._attempt = attempt
        return self._recipe.tries(repaired, attempt, self._begun)
