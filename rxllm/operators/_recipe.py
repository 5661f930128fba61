"""What `call` does with each item."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from reactivex.observable.groupedobservable import GroupedObservable

from rxllm.clients.routing import Routes
from rxllm.errors import CancelledError, ConfigError, ValidationError
from rxllm.messages import Attempt, Chunk, Outcome, Reply, Request, Restarted, chat
from rxllm.operators._finished import Finished, Just
from rxllm.operators._stage import GROUPED
from rxllm.operators.admit import Admitted
from rxllm.operators.hedge import Hedged
from rxllm.operators.retry import Deadline, Retry
from rxllm.operators.routed import LastRoutesBudget, Routed
from rxllm.operators.single_flight import Flights, Merged, flight_key
from rxllm.operators.to_outcome import ToOutcome, mark_invalid
from rxllm.operators.validate import Validated, verdict
from rxllm.policies.validation import Validate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reactivex import Observable

    from rxllm.gate import Lane
    from rxllm.policies.backoff import Backoff, Draw
    from rxllm.policies.budget import RetryBudget
    from rxllm.policies.hedging import Hedging
    from rxllm.policies.timeouts import Timeouts

__all__ = ["Recipe", "RoutedRecipe", "Shown", "is_client", "is_one"]

Show = Callable[[Chunk | Restarted], object]
Attempting = Admitted[Reply[Any]] | Routed[Any]


def is_client(value: object) -> bool:
    """Say whether `value` can be sent with; a coroutine has a `send` too."""
    return hasattr(value, "send") and hasattr(value, "cost")


def is_one(client: object) -> bool:
    """Say whether `client` is the same for each request."""
    return is_client(client) or isinstance(client, Routes)


class Recipe:
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
        show: Callable[[Request, list[Attempt]], Shown] | None,
        hedging: Hedging | None,
        flights: Flights | None,
    ) -> None:
        self.choose: Callable[[Request], Any] | None = None if is_one(client) else client
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
        elif isinstance(item, Finished):
            return Just(item.outcome, raising=self.raising)
        elif isinstance(item, Outcome) and item.error is not None:
            return Just(cast("Outcome[Any]", item), raising=self.raising)
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
        note = attempts.append if self.hedging is None else _in_order(attempts)
        return Admitted(sending, self.lane, cost, note, request)

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


class RoutedRecipe(Recipe):
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


class Shown:
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
        recipe: Recipe,
        validation: Validate,
        request: Request,
        attempt: Attempting,
        attempts: list[Attempt],
        stream: Observable[Reply[Any]],
        begun: list[float],
        show: Shown | None,
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
