"""The canonical pipeline: requests in, outcomes out."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

import reactivex as rx
from reactivex.observable.groupedobservable import GroupedObservable

from rxllm import runtime
from rxllm.errors import ConfigError, ValidationError, check_callable, check_choice, check_number
from rxllm.gate import Gate, Lane, lane_of
from rxllm.messages import Attempt, Outcome, Reply, Request, chat
from rxllm.operators.admit import Admitted
from rxllm.operators.flat_map import GROUPED, flat_map
from rxllm.operators.retry import Deadline, Retry
from rxllm.operators.to_outcome import ToOutcome, mark_invalid
from rxllm.operators.validate import Validated
from rxllm.policies.backoff import Backoff, Draw
from rxllm.policies.timeouts import Timeouts
from rxllm.policies.validation import Validate
from rxllm.stream import Stream, subscribe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from reactivex import Observable

    from rxllm.client import Client
    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["call"]

T = TypeVar("T")
Check = Callable[[Any], bool | None]


def call(
    client: Client[T] | Callable[[Request], Client[T]],
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
) -> Callable[[Observable[Any]], Observable[Outcome[T]]]:
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
        client: what to send with; or request -> client.
        gate: quotas and limits, shared by all pipelines on the same key; or a lane of it. None: none.
        retry: how often and how long to retry transient errors.
        validate: a check of each reply, or `Validate` with attempts and a repair.
        timeouts: of each attempt, phase by phase.
        deadline: seconds from the pull after which a request is given up, whatever it waits for; the time in which a
            used-up quota suspends the gate (`gate.suspended`) does not count.
        window: requests in progress, >= 1. None: twice the gate's limit and 32; 256 without a limit.
        ordered: emit in the order of the source.
        on_failure: "emit" or "raise".
        seed: makes the draws of the back-off reproducible.

    Raises:
        ConfigError: an argument out of range.
    """
    if isinstance(client, type):
        msg = f"client must be a client, got the class {client.__name__}: call it with its arguments"
        raise ConfigError(msg)
    if not is_client(client):
        check_callable("client", client)
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
    width = (lambda: lane.gate.window) if window is None else window  # it follows the limit of the gate

    def apply(source: Observable[Any], draw: Draw = runtime.uniform) -> Observable[Outcome[T]]:
        recipe = _Recipe(
            client, lane, retry, validate, timeouts, deadline=deadline, draw=draw, raising=on_failure == "raise"
        )
        return flat_map(recipe, window=width, ordered=ordered, on_failure=on_failure)(source)

    return apply if seed is None else lambda source: _Seeded(source, apply, seed)


def is_client(value: object) -> bool:
    """Say whether `value` can be sent with; a coroutine has a `send` too."""
    return hasattr(value, "send") and hasattr(value, "cost")


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
    ) -> None:
        self.choose: Callable[[Request], Any] | None = None if is_client(client) else client
        self.client = client
        self.lane = lane
        self.gate = lane.gate
        self.backoff = backoff
        self.validation = validation
        self.timeouts = timeouts
        self.deadline = Deadline(deadline, lane.gate.suspended)
        self.draw = draw
        self.raising = raising

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
        first = self.attempt(request, attempts)
        stream = self.tries(first, begun)
        validation = self.validation
        if validation is not None:
            again = _Again(self, request, first, attempts, stream, begun)
            stream = Validated(stream, validation.check, validation.attempts, again)
        return ToOutcome(stream, request, attempts, self.deadline, begun, raising=self.raising)

    def _wrap(self, item: Any) -> Request:
        """Return the request of an item that is none: the client knows; one chosen by request takes a prompt."""
        if self.choose is None:
            wrapped: Request = self.client.wrap(item)
            return wrapped
        return chat(item)

    def attempt(self, request: Request, attempts: list[Attempt]) -> Admitted[Reply[Any]]:
        """Return the stream of one attempt, behind the gate; the record of each goes to `attempts`."""
        client = self.client
        if self.choose is not None:
            client = self.choose(request)
            if not is_client(client):
                if inspect.iscoroutine(client):
                    client.close()
                msg = (
                    f"client must return a client, got {type(client).__name__}; "
                    "to call a function of your own give function(f)"
                )
                raise ConfigError(msg)
        cost: Mapping[str, float] = client.cost(request) if self.gate.units else {}
        return Admitted(client.send(request, timeouts=self.timeouts), self.lane, cost, attempts.append)

    def tries(self, attempt: Admitted[Reply[Any]], begun: list[float]) -> Observable[Reply[Any]]:
        """Return the stream of one answer: `attempt`, retried while its errors are transient."""
        return Retry(attempt, self.backoff, self.deadline, self.draw, begun, budget=self.gate.retry_budget)


class _Again:
    """What follows an answer that did not pass: note it, and ask again, perhaps otherwise."""

    __slots__ = ("_attempt", "_attempts", "_begun", "_recipe", "_request", "_stream")

    def __init__(  # noqa: PLR0917  private
        self,
        recipe: _Recipe,
        request: Request,
        attempt: Admitted[Reply[Any]],
        attempts: list[Attempt],
        stream: Observable[Reply[Any]],
        begun: list[float],
    ) -> None:
        self._begun = begun  # when the request was pulled, for the deadline of all its tries
        self._recipe = recipe
        self._request = request
        self._attempt = attempt
        self._attempts = attempts
        self._stream = stream

    def __call__(self, reply: Reply[Any], error: ValidationError) -> Observable[Reply[Any]]:
        mark_invalid(self._attempts, error)
        validation = self._recipe.validation
        repair = None if validation is None else validation.repair
        if repair is None:
            return self._stream
        repaired = repair(self._request, reply, error)
        if not isinstance(repaired, Request):
            msg = f"repair must return a Request, got {type(repaired).__name__}"
            raise ConfigError(msg)
        self._request = repaired
        before, attempt = self._attempt, self._recipe.attempt(repaired, self._attempts)
        attempt.arrival = before.arrival  # it keeps its place in the queue
        attempt.attempts = before.attempts
        self._attempt = attempt
        return self._recipe.tries(attempt, self._begun)
