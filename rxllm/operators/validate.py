"""Check what arrives; ask again when it is not good."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, TypeVar

from rxllm.errors import ConfigError, ValidationError, check_callable, check_number
from rxllm.operators._inner import subscribe_inner
from rxllm.stream import Stream

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from reactivex import Observable

    from rxllm.demand import DemandScheduler, Disposable, Observer

__all__ = ["validate"]

T = TypeVar("T")


def validate(
    check: Callable[[T], bool | None],
    *,
    attempts: int = 3,
    repair: Callable[[T, ValidationError], Observable[T] | Awaitable[T]] | None = None,
) -> Callable[[Observable[T]], Observable[T]]:
    """Check each item; subscribe again to the source, or to a repaired one, when the check fails.

        source            --x|        --r|
        check             false       true
        validate(check)   ------------r|

    Emits: items that pass. The first one that fails ends its try: nothing of it is emitted any more.
    Holds: nothing.
    Errors: those of the source at once, but a `ValidationError` that has its `reply` counts as one of the check; the
        `ValidationError` of the last try when the tries are used up; whatever else the check or the repair raises, at
        once: a bug is not asked again.
    Completes: with a try that passes.
    Dispose: cancels the try.

    Args:
        check: item -> None or True (passes), False (fails); a ValueError or AssertionError fails with its text.
        attempts: total tries, >= 1.
        repair: (item, error) -> the stream of the next try. None: the source again.

    Raises:
        ConfigError: an argument out of range; in the stream: a check that returned something else.
    """
    check_callable("check", check)
    check_number("attempts", attempts, least=1, integer=True)
    check_callable("repair", repair, optional=True)

    def apply(source: Observable[T]) -> Observable[T]:
        return Validated(source, check, attempts, repair)

    return apply


def verdict(check: Callable[[Any], Any], value: Any) -> ValidationError | None:
    """Return None when `value` passes, else the error it fails with.

    Raises:
        ConfigError: the check returned neither None nor a bool. Whatever else the check raises passes through.
    """
    try:
        passed = check(value)
    except (ValueError, AssertionError) as error:
        return _refused(str(error) or f"the check raised {type(error).__name__}", value)
    if passed is None or passed is True:
        return None
    if passed is False:
        return _refused(f"the check {_name(check)} returned False", value)
    if type(passed).__name__ in {"bool", "bool_"}:  # numpy's
        return None if passed else _refused(f"the check {_name(check)} returned False", value)
    if inspect.iscoroutine(passed):
        passed.close()
        msg = f"check must be a plain function, and {_name(check)} is async"
        raise ConfigError(msg)
    msg = f"check must return None, True or False, and {_name(check)} returned {type(passed).__name__}"
    raise ConfigError(msg)


def _refused(reason: str, value: Any) -> ValidationError:
    """Return the error of an answer that did not pass; the beginning of the answer is its body: it was paid for."""
    text: object = getattr(value, "text", None)
    return ValidationError(reason, body=text if isinstance(text, str) and text else None)


def _name(check: Callable[[Any], Any]) -> str:
    return getattr(check, "__name__", type(check).__name__)


class Validated(Stream[T]):
    """`source` with its items checked."""

    def __init__(
        self,
        source: Observable[T],
        check: Callable[[T], bool | None],
        attempts: int,
        repair: Callable[[T, ValidationError], Observable[T] | Awaitable[T]] | None,
    ) -> None:
        self.source = source
        self.check = check
        self.attempts = attempts
        self.repair = repair

    def _start(self, observer: Observer[T], carrier: DemandScheduler) -> Disposable:
        tries = _Tries(self, observer, carrier)
        tries.run(self.source)  # what it raises finds nothing here to release
        return tries


class _Tries:
    """One subscription of validate: its own observer of every try."""

    __slots__ = (
        "_attempt",
        "_carrier",
        "_next",
        "_observer",
        "_operator",
        "_rejected",
        "_stopped",
        "_subscribing",
        "_upstream",
    )

    def __init__(self, operator: Validated[Any], observer: Observer[Any], carrier: DemandScheduler) -> None:
        self._operator = operator
        self._observer = observer
        self._carrier = carrier
        self._attempt = 0
        self._next: object = None  # the stream of the next try
        self._rejected = False  # the current try failed its check: what else it emits is ignored
        self._stopped = False
        self._subscribing = False
        self._upstream: Disposable | None = None

    def run(self, source: object) -> None:
        """Start a try; and further ones in a loop while they are rejected before they are subscribed."""
        self._next = source
        while self._next is not None and not self._stopped:
            source, self._next = self._next, None
            self._attempt += 1
            self._rejected = False
            self._subscribing = True
            upstream = subscribe_inner(source, self, self._carrier, "repair")
            self._subscribing = False
            if self._stopped or self._rejected:
                upstream.dispose()
            else:
                self._upstream = upstream

    def on_next(self, value: Any) -> None:
        if self._stopped or self._rejected:
            return
        try:
            error = verdict(self._operator.check, value)
        except Exception as bug:
            self._end(bug)
            return
        if error is None:
            self._observer.on_next(value)
        else:
            self._reject(value, error)

    def _reject(self, value: Any, error: ValidationError) -> None:
        operator = self._operator
        if self._attempt >= operator.attempts:
            self._end(error)
            return
        source: object = operator.source
        if operator.repair is not None:
            try:
                source = operator.repair(value, error)
            except Exception as bug:
                self._end(bug)
                return
        self._rejected = True
        self._release()
        if self._subscribing:
            self._next = source  # the loop in `run` takes it: no recursion
        else:
            self.run(source)

    def on_error(self, error: Exception) -> None:
        if self._stopped or self._rejected:
            return
        if isinstance(error, ValidationError) and error.reply is not None:
            self._reject(error.reply, error)
        else:
            self._end(error)

    def on_completed(self) -> None:
        if not self._stopped and not self._rejected:
            self._stopped = True
            self._upstream = None  # no cycle is left for the garbage collector
            self._observer.on_completed()

    def _end(self, error: Exception) -> None:
        self.dispose()
        self._observer.on_error(error)

    def _release(self) -> None:
        if self._upstream is not None:
            self._upstream.dispose()
            self._upstream = None

    def dispose(self) -> None:
        self._stopped = True
        self._next = None
        self._release()
