"""Turn the end of one request into a value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from rxllm.clock import alarms
from rxllm.demand import Flow
from rxllm.errors import (
    ConfigError,
    DecodeError,
    TimeoutError,
    ValidationError,
    check_callable,
    check_choice,
    check_number,
)
from rxllm.messages import Attempt, Outcome, Reply, Request
from rxllm.operators.retry import Deadline
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable

    from reactivex import Observable

    from rxllm.clock import Handle
    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["to_outcome"]

T = TypeVar("T")

SHORT = 0.001  # seconds: what is left of a deadline is not worth another timer
LATE = (
    1.0  # seconds that a deadline may be late by, at most a tenth of it: else its timers are many while it is put off
)


def to_outcome(
    request: Request,
    *,
    attempts: list[Attempt] | None = None,
    deadline: float | None = None,
    on_failure: Literal["emit", "raise"] = "emit",
    excused: Callable[[], float] | None = None,
) -> Callable[[Observable[Reply[T]]], Observable[Outcome[T]]]:
    """Wait for the end of a stream of replies and emit it as one `Outcome`: its last reply, or its error.

        source                --r|        --#
        to_outcome(request)   ---(o|)     --(o|)

    Emits: one outcome, with the request it belongs to; its `error` is set when the source failed.
    Holds: the last reply.
    Errors: none: an error is a value here (but with `on_failure="raise"`). A source without a reply is a `DecodeError`.
        One that `halts` is a value and then the end: of the `flat_map` that this is in, else of this stream.
    Completes: after the outcome.
    Dispose: cancels the source; then there is no outcome.

    Args:
        request: what was asked.
        attempts: the record that `admit(note=attempts.append)` writes.
        deadline: seconds after which the source is cancelled, and the outcome is a `TimeoutError` that is not
            transient.
        on_failure: "emit", or "raise": the error of the source is the error of this stream.
        excused: returns seconds, so far, and never less than before: what it grows by meanwhile is added to the
            deadline. Give `gate.suspended`, and the wait for a quota that is used up does not count.

    Raises:
        ConfigError: an argument out of range.
    """
    if not isinstance(request, Request):
        msg = f"request must be a Request, got {request!r}"
        raise ConfigError(msg)
    check_number("deadline", deadline, above=0, optional=True)
    check_choice("on_failure", on_failure, ("emit", "raise"))
    check_callable("excused", excused, optional=True)

    limit = None if deadline is None else Deadline(deadline, excused)

    def apply(source: Observable[Reply[T]]) -> Observable[Outcome[T]]:
        record = [] if attempts is None else attempts
        return ToOutcome(source, request, record, limit, None, raising=on_failure == "raise")

    return apply


class StageFlow(Flow):
    """The flow of a stage's inner streams: what becomes a value there can still say that the stage is to halt."""

    __slots__ = ("halt",)

    def __init__(self, outer: Flow, halt: Callable[[Exception], None]) -> None:
        super().__init__(outer.fail, outer)
        self.halt = halt

    def inner(self) -> StageFlow:
        """Return the flow of inner streams of inner streams, which belong to the same stage."""
        return StageFlow(self, self.halt)


class ToOutcome(Stream[Outcome[T]]):
    """The end of `source` as a value. When its deadline began goes to `begun`, for the `Retry` that shares it."""

    def __init__(
        self,
        source: Observable[Reply[T]],
        request: Request,
        attempts: list[Attempt],
        deadline: Deadline | None,
        begun: list[float] | None,
        *,
        raising: bool,
    ) -> None:
        self.source = source
        self.request = request
        self.attempts = attempts
        self.deadline = deadline
        self.begun = begun
        self.raising = raising

    def _start(self, observer: Observer[Outcome[T]], carrier: DemandScheduler) -> Disposable:
        ending = _Ending(self, observer, carrier)
        if self.deadline is not None:
            ending.alarm = alarms(carrier.clock, self.deadline.seconds).start(ending.expire)
        return connected(ending, ending.connect, self.source)


class _Ending:
    """One subscription of to_outcome."""

    __slots__ = (
        "_begun",
        "_carrier",
        "_disposed",
        "_observer",
        "_operator",
        "_reply",
        "_started",
        "_stopped",
        "_upstream",
        "alarm",
    )

    def __init__(self, operator: ToOutcome[Any], observer: Observer[Outcome[Any]], carrier: DemandScheduler) -> None:
        self._operator = operator
        self._observer = observer
        self._carrier = carrier
        self._started = carrier.clock.seconds()
        self._begun = self._started  # in the time that counts
        if operator.deadline is not None:
            self._begun = operator.deadline.counted(self._started)
            if operator.begun is not None:
                operator.begun.append(self._begun)
        self._reply: Reply[Any] | None = None
        self._stopped = False
        self._disposed = False
        self._upstream: Disposable | None = None
        self.alarm: Handle | None = None

    def connect(self, source: Observable[Reply[Any]]) -> None:
        upstream = subscribe(source, self, self._carrier)
        if self._stopped:
            upstream.dispose()
        else:
            self._upstream = upstream

    def expire(self) -> None:
        """End at the deadline; what was excused meanwhile puts it off."""
        deadline = self._operator.deadline
        assert deadline is not None  # noqa: S101  for the type checkers
        now = self._carrier.clock.seconds()
        try:
            counted = deadline.counted(now) - self._begun
        except Exception as bug:  # of the user's function
            self._give_up(bug)
            return
        left = deadline.seconds - counted
        if left > SHORT:
            self.alarm = self._carrier.call_later(max(left, min(LATE, deadline.seconds / 10)), self.expire)
            return
        message = f"not answered within {deadline.seconds:g} s"
        excused = now - self._started - counted
        if excused > SHORT:
            message += f", with the {excused:g} s apart that it does not count"
        self._give_up(TimeoutError(message, phase="deadline"))

    def _give_up(self, error: Exception) -> None:
        self._release()
        self._end(error)

    def on_next(self, reply: Reply[Any]) -> None:
        self._reply = reply

    def on_completed(self) -> None:
        if not self._stopped:
            self._end(None if self._reply is not None else DecodeError("the call ended without a reply"))

    def on_error(self, error: Exception) -> None:
        if not self._stopped:
            if isinstance(error, ValidationError):
                mark_invalid(self._operator.attempts, error)
            self._end(forget_traceback(error))

    def _end(self, error: Exception | None) -> None:
        self._stopped = True
        self._upstream = None  # no cycle is left for the garbage collector
        if self.alarm is not None:
            self.alarm.cancel()
        operator = self._operator
        if error is not None and operator.raising:
            self._observer.on_error(error)
            return
        self._observer.on_next(
            Outcome(
                request=operator.request,
                reply=self._reply if error is None else None,
                error=error,
                attempts=tuple(operator.attempts),
                started=self._started,
                seconds=self._carrier.clock.seconds() - self._started,
            )
        )
        if self._disposed:
            return
        if error is None or getattr(error, "halts", False) is not True:
            self._observer.on_completed()
            return
        flow = self._carrier.flow
        if isinstance(flow, StageFlow):
            flow.halt(error)
            self._observer.on_completed()
        else:
            self._observer.on_error(error)

    def dispose(self) -> None:
        self._disposed = True
        self._release()

    def _release(self) -> None:
        self._stopped = True
        if self.alarm is not None:
            self.alarm.cancel()
        if self._upstream is not None:
            self._upstream.dispose()
            self._upstream = None


def mark_invalid(attempts: list[Attempt], error: ValidationError) -> None:
    """Note on the last attempt that its answer did not pass."""
    if attempts and attempts[-1].error is None:
        attempts[-1] = msgspec.structs.replace(attempts[-1], error=forget_traceback(error))


def forget_traceback(error: Exception) -> Exception:
    """Return `error` as a value: its frames, and what they hold, are let go."""
    error.__traceback__ = None
    error.__context__ = None
    cause = error.__cause__
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__
    return error
