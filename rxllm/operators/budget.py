"""Stop when enough is spent."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from reactivex import Observable

from rxllm.clients.routing import Routes
from rxllm.demand import Outlet
from rxllm.errors import CancelledError, ConfigError, QuotaExhaustedError, check_callable, check_choice, check_number
from rxllm.messages import Outcome, Request, Usage
from rxllm.operators._failure import failure
from rxllm.operators._finished import Finished
from rxllm.operators._intake import Intake, Wrapper
from rxllm.policies.prices import Prices
from rxllm.policies.spending import Spending, Spent
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from rxllm.clock import Handle
    from rxllm.demand import Asked, DemandScheduler, Disposable, Observer, Waiting
    from rxllm.messages import Attempt
    from rxllm.operators.journal import Asking

__all__ = ["budget"]

T = TypeVar("T")

_log = logging.getLogger("rxllm.operators.budget")


def budget(
    operator: Asking[T],
    *,
    requests: int | None = None,
    tokens: int | None = None,
    usd: float | None = None,
    seconds: float | None = None,
    prices: Prices | None = None,
    on_exhausted: Literal["complete", "raise"] = "complete",
) -> Budgeting[T]:
    """Stop asking when a budget is used up: what is on the wire is finished and delivered, and then the stream ends.

        requests                        a-b-c-d-e-f
        call(client)                    --A-B-C-D-E-F
        budget(call(…), requests=3)     --A-B-C|           d is never pulled

    Emits: what the operator emits.
    Holds: nothing of a source that waits. It asks for no more items than the budget has room for: what is spent, and
        what those in progress will still cost if each costs the average so far, stays below it. So the last item may go
        beyond the budget by what it costs, and by what those in progress cost more than the average; never beyond a
        budget of requests.
    Errors: those of the operator. With `on_exhausted="raise"` a `QuotaExhaustedError` after what was on the wire. A
        model without a price ends the stream likewise, with a `ConfigError` that names it; where the model is known
        before, its request is not sent.
    Completes: when the operator does. When a budget is used up nothing more is sent: what was pulled and waits for a
        quota, for a place on the wire or for its next try is a `CancelledError` ("not asked: …"), which a journal does
        not take for an answer: the next run asks again. Where a failure ends the stream (`on_failure="raise"`) there is
        no outcome of it. What a stage above has in progress is cancelled.
    Dispose: as the operator.

    If something was left unasked `statistics().used_up` says why, and a warning is logged. Of a list, a range and a
    closed feed it is known when their last item was asked; any other source may have had one more.

    Each attempt counts, also one that failed or whose answer was not good: as a request when it is sent, with the usage
    that the server told of it when it ends. Of an attempt that was cut off nobody knows what it cost: it counts as a
    request without tokens. What comes from a cache or another request's answer has no attempts and costs nothing. What
    a journal inside of the budget replays counts again: put the budget inside (`journal(path, budget(call(…)))`) to
    limit what this run spends, and outside to limit what all runs of the journal spend.

    Args:
        operator: what `call` returned, or `cache` or `journal` around it; any other operator from items to outcomes
            that gives one for each. Attempts that are made without `admit` count with their outcome.
        requests: attempts, >= 1.
        tokens: input and output, >= 1.
        usd: > 0; needs `prices`.
        seconds: since the subscription, > 0; what is on the wire then is finished.
        prices: what each model costs.
        on_exhausted: "complete" or "raise".

    Returns:
        The operator, with the `request` and `client` of the one inside, and `statistics()`.

    Raises:
        ConfigError: no budget, an argument out of range, `usd` without prices.

    Example:
        >>> import itertools, rxllm
        >>> asking = budget(rxllm.call(rxllm.function(str.upper), ordered=True), requests=2)
        >>> [outcome.value for outcome in rxllm.collect(rxllm.from_iterable(["a", "b", "c"]).pipe(asking))]
        ['A', 'B']
        >>> asking.statistics().used_up
        'requests'
    """
    check_callable("operator", operator)
    check_number("requests", requests, least=1, integer=True, optional=True)
    check_number("tokens", tokens, least=1, integer=True, optional=True)
    check_number("usd", usd, above=0, optional=True)
    check_number("seconds", seconds, above=0, optional=True)
    check_choice("on_exhausted", on_exhausted, ("complete", "raise"))
    if prices is not None and not isinstance(prices, Prices):
        msg = f"prices must be a Prices or None, got {prices!r}"
        raise ConfigError(msg)
    if usd is not None and prices is None:
        msg = f"prices: usd={usd!r} needs the prices of the models"
        raise ConfigError(msg)
    limits = {"requests": requests, "tokens": tokens, "usd": usd, "seconds": seconds}
    given = {kind: limit for kind, limit in limits.items() if limit is not None}
    if not given:
        msg = "budget needs one of requests, tokens, usd and seconds"
        raise ConfigError(msg)
    return Budgeting(operator, given, prices, raising=on_exhausted == "raise")


class Budgeting(Wrapper[T]):
    """What `budget` returns."""

    def __init__(self, operator: Asking[T], limits: dict[str, float], prices: Prices | None, *, raising: bool) -> None:
        super().__init__(operator)
        self.limits = limits
        self.prices = prices
        self.raising = raising
        self.last: _Run | None = None

    def __call__(self, source: Observable[Any]) -> Observable[Outcome[T]]:
        """Return the stream of the outcomes."""
        return _Budgeted(source, self)

    def statistics(self) -> Spent:
        """Return what was spent so far: of the subscription that began last."""
        return Spent() if self.last is None else self.last.statistics()


class _Budgeted(Stream[Any]):
    def __init__(self, source: Observable[Any], budgeting: Budgeting[Any]) -> None:
        self.source = source
        self.budgeting = budgeting

    def _start(self, observer: Observer[Any], carrier: DemandScheduler) -> Disposable:
        run = self.budgeting.last = _Run(self.budgeting, observer, carrier)
        return connected(run, run.connect, self.source)


class _Run:
    """One subscription of budget: the observer of the operator inside, and the allowance of what that sends."""

    __slots__ = (
        "_began",
        "_budgeting",
        "_carrier",
        "_due",
        "_exhausted",
        "_intake",
        "_lasted",
        "_left",
        "_noted",
        "_observer",
        "_outlet",
        "_refusal",
        "_timer",
        "_told",
        "_upstream",
        "_waiting",
        "error",
        "outer",
        "passing",
        "spending",
        "stopped",
        "used_up",
    )

    def __init__(self, budgeting: Budgeting[Any], observer: Observer[Any], carrier: DemandScheduler) -> None:
        self._budgeting = budgeting
        self._observer = observer
        self._carrier = carrier
        self.outer = carrier.allowance  # of a budget around this one
        self._began = carrier.clock.seconds()
        self._lasted: float | None = None
        self.spending = Spending(**{kind: limit for kind, limit in budgeting.limits.items() if kind != "seconds"})
        self._intake = _Intake(self, carrier)
        self._outlet: Outlet[Any] = Outlet(observer, carrier)
        self._left: list[Outcome[Any]] = []  # of items that are not asked
        self._timer: Handle | None = None
        self._due: Handle | None = None  # when what waits is given up
        self._upstream: Disposable | None = None
        self._told = False  # that usage is not known
        self._noted: dict[int, _Noted] = {}  # attempts that have ended, and their outcome is still to come
        self._waiting: dict[Waiting, None] = {}  # attempts that are not sent yet, in the order in which they came
        self._refusal: CancelledError | None = None  # of all that is not sent any more
        self._exhausted: str | None = None  # the budget of which nothing is left
        self.passing: set[int] = set()  # outcomes that were finished before: they are not counted
        self.error: ConfigError | None = None
        self.used_up: str | None = None  # the same, once something was left unasked because of it
        self.stopped = False

    def connect(self, source: Observable[Any]) -> None:
        limit = self._budgeting.limits.get("seconds")
        if limit is not None:
            self._timer = self._carrier.call_later(limit, lambda: self.exhaust("seconds"))
        stream: object = cast("Any", self._budgeting.operator)(self._intake.source(source))
        if not isinstance(stream, Observable):
            msg = f"operator must return an Observable, got {type(stream).__name__}"
            raise ConfigError(msg)
        upstream = subscribe(cast("Observable[Any]", stream), self, self._carrier.with_allowance(self))
        if self.stopped:
            upstream.dispose()
        else:
            self._upstream = upstream

    # the allowance of each attempt inside

    def refusal(self) -> Exception | None:
        """Return what an attempt that may not be sent any more fails with."""
        if self._refusal is None and self.outer is not None:
            return self.outer.refusal()
        return self._refusal

    def has_refused(self, error: object) -> bool:
        """Say whether something fails with `error` because it may not be sent any more."""
        if self._refusal is not None and error is self._refusal:
            return True
        return self.outer is not None and self.outer.has_refused(error)

    def begin(self) -> None:
        """Count an attempt that is sent now."""
        self.spending.spend(requests=1)
        self._look()
        if self.outer is not None:
            self.outer.begin()

    def end(self, attempt: Attempt, asked: Asked, *, recorded: bool) -> None:
        """Count what an attempt has used; dollars with its outcome, if nobody says yet which model it was."""
        usage, usd = attempt.usage, None
        if usage is not None:
            if asked.request is not None and "usd" in self._budgeting.limits:
                usd = self._price(usage, asked.request, asked.route, asked.model)
            self.spending.spend(tokens=usage.total_tokens, usd=usd or 0.0)
        if recorded and not self.stopped:
            self._noted[id(attempt.waited)] = (attempt.waited, usd)
        self._look()
        if self.outer is not None:
            self.outer.end(attempt, asked, recorded=recorded)

    def wait(self, waiting: Waiting) -> None:
        """Give `waiting` up when a budget is used up."""
        self._waiting[waiting] = None
        if self.outer is not None:
            self.outer.wait(waiting)

    def leave(self, waiting: Waiting) -> None:
        """Forget `waiting`."""
        self._waiting.pop(waiting, None)
        if self.outer is not None:
            self.outer.leave(waiting)

    # what is spent

    def statistics(self) -> Spent:
        lasted = self._carrier.clock.seconds() - self._began if self._lasted is None else self._lasted
        return self.spending.spent(seconds=lasted, used_up=self.used_up)

    def check(self, item: Any) -> None:
        """See that what `item` asks has a price, if it is known whom it asks.

        Raises:
            ConfigError: it has none.
        """
        prices = self._budgeting.prices
        if "usd" not in self._budgeting.limits or prices is None or not hasattr(self._budgeting.operator, "request"):
            return
        try:
            request = self._budgeting.request(item)
            models = self._models(request)
        except Exception:  # of the user's functions: the operator meets it again, and fails the item
            return
        for model in models.values():
            if model is not None:
                prices.price(model)

    def _models(self, request: Request) -> dict[str | None, str | None]:
        """Return the model that is asked, by route; None is any other one, or the only one."""
        body: object = request.body
        if isinstance(body, dict):
            named: object = cast("dict[object, object]", body).get("model")
            if isinstance(named, str):
                return {None: named}
        if not hasattr(self._budgeting.operator, "client"):
            return {}
        client = self._budgeting.client(request)
        if not isinstance(client, Routes):
            return {None: getattr(client, "model", None)}
        several = zip(client.names, client.clients, strict=True)
        return {name: getattr(one, "model", None) for name, one in several}

    def _price(self, usage: Usage, request: Request, route: str | None, answered: str | None) -> float | None:
        """Return what an attempt cost, in USD; None: nobody says which model it was. Without a price all ends."""
        try:
            models = self._models(request)
        except Exception:  # of the user's functions
            models = {}
        model = models.get(route) or models.get(None) or answered
        prices = self._budgeting.prices
        if model is None or prices is None:
            return None
        try:
            return prices.cost(usage, model)
        except ConfigError as wrong:
            self.refuse(wrong)
            return 0.0

    def _count(self, outcome: Any) -> None:
        """Count what an item has cost, as far as its attempts were not counted when they ended."""
        if not isinstance(outcome, Outcome):
            self.spending.end()
            return
        ended = cast("Outcome[Any]", outcome)
        tokens, usd = 0, 0.0
        for attempt in ended.attempts:
            used, paid = self._count_attempt(attempt, ended)
            tokens += used
            usd += paid
        self.spending.end(requests=len(ended.attempts), tokens=tokens, usd=usd)
        if not tokens and not self._told and ended.error is None and ended.attempts:
            self._tell_unknown()

    def _count_attempt(self, attempt: Attempt, outcome: Outcome[Any]) -> tuple[int, float]:
        """Return the tokens and dollars of an attempt; count what of it was not."""
        noted = self._noted.pop(id(attempt.waited), None)
        usage = attempt.usage
        tokens = 0 if usage is None else usage.total_tokens
        if noted is None:
            self.spending.spend(requests=1, tokens=tokens)
        usd = None if noted is None else noted[1]
        if usd is None and usage is not None and "usd" in self._budgeting.limits:
            answered = None if outcome.reply is None else outcome.reply.model
            usd = self._price(usage, outcome.request, attempt.route, answered)
            if usd is None:
                self.refuse(ConfigError("usd: nobody says which model has answered, so it has no price"))
            self.spending.spend(usd=usd or 0.0)
        return tokens, usd or 0.0

    def _tell_unknown(self) -> None:
        """Warn once that a good answer does not say what it has used."""
        self._told = True
        for kind in ("tokens", "usd"):
            if kind in self._budgeting.limits:
                _log.warning("an answer does not say how many tokens it has used: it counts nothing in %s", kind)
                return

    # the ends of a budget

    def _look(self) -> None:
        """See whether a budget is used up."""
        if self._refusal is None:
            kind = self.spending.used_up()
            if kind is not None:
                self.exhaust(kind)

    def exhaust(self, kind: str) -> None:
        """Let nothing more be sent: a budget is used up."""
        if self._refusal is None and not self.stopped:
            self._exhausted = kind
            self._refusal = CancelledError(f"not asked: {self._reason(kind)}")
            self._give_up_soon()

    def refuse(self, error: ConfigError) -> None:
        """Let nothing more be sent: there is no price for what is asked."""
        if self.error is not None or self.stopped:
            return
        self.error = error
        if self._refusal is None:
            self._refusal = CancelledError("not asked: the stream ends")
            self._give_up_soon()
        self._intake.halt()

    def _reason(self, kind: str) -> str:
        return f"the budget of {self._budgeting.limits[kind]:g} {kind} is used up"

    def _give_up_soon(self) -> None:
        """Give up what waits in the next turn: an attempt may be about to start, or to end, in this one."""
        self._due = self._carrier.call_soon(self._give_up)

    def _give_up(self) -> None:
        """Pull nothing more, and fail all that waits to be sent."""
        self._due = None
        intake, refusal = self._intake, self._refusal
        if not intake.over:
            intake.ask_end()  # it may have been the last item
        if not intake.over:
            self._cut()
        intake.halt()
        for waiting in list(self._waiting):
            if waiting in self._waiting and refusal is not None:
                waiting.give_up(refusal)

    def _cut(self) -> None:
        """Note that something is left unasked."""
        if self.used_up is None and self._exhausted is not None:
            self.used_up = self._exhausted
            _log.warning("%s: nothing more is asked", self._reason(self.used_up))

    def give_up(self, item: Any, error: Exception | None = None) -> None:
        """Fail an item that is not asked, after all that are: it came without being demanded, or it has no price."""
        error = error or self._refusal or CancelledError("not asked: the stream ends")
        outcome = failure(item, error)
        self._left.append(outcome)
        if outcome.error is error:  # else it was finished before
            self._cut()

    # the observer of the operator inside

    def on_next(self, outcome: Any) -> None:
        if self.stopped:
            return
        if id(outcome) in self.passing:
            self.passing.remove(id(outcome))
        else:
            self._count(outcome)
        if self._refusal is not None and getattr(outcome, "error", None) is self._refusal:
            self._cut()
        self._observer.on_next(outcome)
        if self.stopped:
            return
        self._look()
        self._intake.resume()

    def on_error(self, error: Exception) -> None:
        if not self.stopped:
            self._end(error)

    def on_completed(self) -> None:
        if self.stopped:
            return
        if self.spending.in_progress:  # what fails the stream (`on_failure="raise"`) does not come when it is not asked
            self._cut()
        error: Exception | None = self.error
        if error is None and self._budgeting.raising and self.used_up is not None:
            error = QuotaExhaustedError(self._reason(self.used_up))
        self._end(error)

    def _end(self, error: Exception | None) -> None:
        self._release()
        for outcome in self._left:
            self._outlet.push(outcome)
        self._outlet.end(error)

    def dispose(self) -> None:
        self._release()
        self._outlet.dispose()

    def _release(self) -> None:
        if self._lasted is None:
            self._lasted = self._carrier.clock.seconds() - self._began
        self.stopped = True
        for handle in (self._timer, self._due):
            if handle is not None:
                handle.cancel()
        self._intake.dispose()
        upstream, self._upstream = self._upstream, None
        if upstream is not None:
            upstream.dispose()


# An attempt is known again by the dict of its waits: that is its own, and stays when the record is replaced (the answer
# did not pass, the attempt was on another route). It is held so that nothing else gets its identity. And its dollars.
_Noted = tuple[dict[str, float], float | None]


class _Intake(Intake):
    """What goes in: an item counts as in progress from here on."""

    __slots__ = ("_busy", "_error", "_pending", "_run")

    def __init__(self, run: _Run, carrier: DemandScheduler) -> None:
        super().__init__(carrier)
        self._run = run
        self._pending: deque[Any] = deque()  # came without being asked for
        self._busy = False
        self._error: Exception | None = None

    def free(self) -> int:
        """Return how many items the budget has room for."""
        return self._run.spending.room() - len(self._pending)

    def connect(self, source: Observable[Any], observer: Observer[Any], carrier: DemandScheduler) -> None:
        """Subscribe the source, whose own attempts are no business of this budget."""
        super().connect(source, observer, carrier.with_allowance(self._run.outer))

    def take(self, item: Any) -> None:
        """Have `item` asked, if the budget has room for it; what is finished goes by."""
        if isinstance(item, Finished) and not self._pending:
            self._pass(item)
            return
        self._pending.append(item)
        self.inside += 1
        self.resume()

    def _pass(self, item: Finished) -> None:
        self._run.passing.add(id(item.outcome))
        self.give(item)

    def resume(self) -> None:
        """Give what waits, as far as there is room now."""
        if self._busy:
            return
        self._busy = True
        pending, run = self._pending, self._run
        try:
            while pending and not self.closed and run.spending.room() > 0:
                item = pending.popleft()
                self.inside -= 1
                if isinstance(item, Finished):
                    self._pass(item)
                    continue
                try:
                    run.check(item)
                except ConfigError as wrong:
                    run.give_up(item, wrong)
                    run.refuse(wrong)
                else:
                    run.spending.start()
                    self.give(item)
        finally:
            self._busy = False
        if self.over and not self.closed and not pending:
            self.close(self._error)
        self.wake()

    def ended(self, error: Exception | None) -> None:
        """Close when all that came is given; at once when nothing can be started any more."""
        self._error = error
        if not self._pending:
            self.close(error)

    def fail(self, error: Exception) -> None:
        """End the stream now."""
        self._run.on_error(error)

    def halt(self) -> None:
        """Take and give nothing more."""
        self._give_up()
        if self.over:
            self.close(self._error)
        else:
            self.stop()

    def cancelled(self, held: list[Any]) -> None:
        """Give nothing more: the operator inside has halted, and the stream goes on to its end; or all is over."""
        if self._run.stopped:
            self._pending.clear()
            return
        for item in held:
            if isinstance(item, Finished):
                self._run.passing.discard(id(item.outcome))
            else:
                self._run.spending.end()
            self._run.give_up(item)
        self._give_up()

    def _give_up(self) -> None:
        waiting = list(self._pending)
        self._pending.clear()
        self.inside = 0
        for item in waiting:
            self._run.give_up(item)
