"""Turn the end of one request into a value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypeVar

import msgspec

from rxllm.clock import alarms
from rxllm.errors import ConfigError, DecodeError, TimeoutError, ValidationError, check_choice, check_number
from rxllm.messages import Attempt, Outcome, Reply, Request
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Callable

    from reactivex import Observable

    from rxllm.clock import Alarm
    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["to_outcome"]

T = TypeVar("T")


def to_outcome(
    request: Request,
    *,
    attempts: list[Attempt] | None = None,
    deadline: float | None = None,
    on_failure: Literal["emit", "raise"] = "emit",
) -> Callable[[Observable[Reply[T]]], Observable[Outcome[T]]]:
    """Wait for the end of a stream of replies and emit it as one `Outcome`: its last reply, or its error.

        source                --r|        --#
        to_outcome(request)   ---(o|)     --(o|)

    Emits: one outcome, with the request it belongs to; its `error` is set when the source failed.
    Holds: the last reply.
    Errors: none: an error is a value here (but with `on_failure="raise"`). A source without a reply is a `DecodeError`.
    Completes: after the outcome.
    Dispose: cancels the source; then there is no outcome.

    Args:
        request: what was asked.
        attempts: the record that `admit(note=attempts.append)` writes.
        deadline: seconds after which the source is cancelled, and the outcome is a `TimeoutError` that is not
            transient.
        on_failure: "emit", or "raise": the error of the source is the error of this stream.

    Raises:
        ConfigError: an argument out of range.
    """
    if not isinstance(request, Request):
        msg = f"request must be a Request, got {request!r}"
        raise ConfigError(msg)
    check_number("deadline", deadline, above=0, optional=True)
    check_choice("on_failure", on_failure, ("emit", "raise"))

    def apply(source: Observable[Reply[T]]) -> Observable[Outcome[T]]:
        return ToOutcome(source, request, [] if attempts is None else attempts, deadline, raising=on_failure == "raise")

    return apply


class ToOutcome(Stream[Outcome[T]]):
    """The end of `source` as a value."""

    def __init__(
        self,
        source: Observable[Reply[T]],
        request: Request,
        attempts: list[Attempt],
        deadline: float | None,
        *,
        raising: bool,
    ) -> None:
        self.source = source
        self.request = request
        self.attempts = attempts
        self.deadline = deadline
        self.raising = raising

    def _start(self, observer: Observer[Outcome[T]], carrier: DemandScheduler) -> Disposable:
        ending = _Ending(self, observer, carrier)
        if self.deadline is not None:
            ending.alarm = alarms(carrier.clock, self.deadline).start(ending.expire)
        return connected(ending, ending.connect, self.source)


class _Ending:
    """One subscription of to_outcome."""

    __slots__ = (
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
        self._reply: Reply[Any] | None = None
        self._stopped = False
        self._disposed = False
        self._upstream: Disposable | None = None
        self.alarm: Alarm | None = None

    def connect(self, source: Observable[Reply[Any]]) -> None:
        upstream = subscribe(source, self, self._carrier)
        if self._stopped:
            upstream.dispose()
        else:
            self._upstream = upstream

    def expire(self) -> None:
        self._release()
        seconds = self._operator.deadline
        self._end(TimeoutError(f"not answered within {seconds:g} s", phase="deadline"))

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
        if not self._disposed:
            self._observer.on_completed()

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
