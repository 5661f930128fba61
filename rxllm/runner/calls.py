"""What a runner runs, and what that uses: calls, resources, and how one is counted in the other. No I/O, no streams."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Generic, TypeVar

import msgspec

from rxllm.errors import ConfigError, check_callable, check_number, check_text
from rxllm.policies.quota import Quota

__all__ = ["Call", "Finished", "Resource", "Resources", "RunnerStatistics", "Task", "TooLargeError"]

R = TypeVar("R")


class Call:
    """One call of a function, for those who reckon what it uses.

    >>> def ask(prompt, n=3, **options): ...
    >>> call = Call(ask, ("Hello",), {"temperature": 0})
    >>> [call.get_argument(name) for name in ("prompt", "n", "temperature", "seed")]
    ['Hello', 3, 0, None]
    """

    __slots__ = ("args", "function", "kwargs")

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self.function = function
        self.args = args
        self.kwargs = kwargs

    def __repr__(self) -> str:
        given = [*("…" for _ in self.args), *(f"{name}=…" for name in self.kwargs)]  # there may be a key among them
        return f"{_name(self.function)}({', '.join(given)})"

    def get_argument(self, name: str, default: Any = None) -> Any:
        """Return what the function gets as `name`: by position, by name, or by its own default; else `default`.

        Raises:
            TypeError: the function takes no such arguments.
        """
        if name in self.kwargs:
            return self.kwargs[name]
        signature = _signature(self.function)
        if signature is None:
            return default
        bound = signature.bind(*self.args, **self.kwargs)
        bound.apply_defaults()
        return bound.arguments.get(name, default)


def _signature(function: Callable[..., Any]) -> inspect.Signature | None:
    """Return the signature; None of some that are written in C."""
    try:
        return inspect.signature(function)
    except (ValueError, TypeError):
        return None


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


class Resource:
    """Something that calls use, of which there is so much in so many seconds.

    Args:
        name: what it is called.
        quota: what all calls may use in any `time_window_seconds`.
        time_window_seconds: seconds, >= 0.001.
        arguments_usage_extractor: call -> what it uses by being made.
        results_usage_extractor: (call, result) -> what its result has used besides.
        max_results_usage_estimator: call -> the most that its result may use: so much is reserved until the result is
            there. Only with a `results_usage_extractor`.
        failure_usage_extractor: (call, error) -> what a call that failed has used in all. None: what was reserved for
            it: nobody knows, and a quota is not to be broken.

    A use by the arguments counts from the start of the call. Of a resource with a `results_usage_extractor` all counts
    from the end of the call on, and what was reserved for it until then.

    Raises:
        ConfigError: an argument out of range, or an estimator of what nothing extracts.

    Example:
        >>> Resource("requests", quota=500, time_window_seconds=60, arguments_usage_extractor=lambda call: 1)
        Resource('requests', quota=500, time_window_seconds=60)
    """

    def __init__(  # noqa: PLR0917  they stand in the order of rate_limited's Resource
        self,
        name: str,
        quota: float,
        time_window_seconds: float,
        arguments_usage_extractor: Callable[[Call], float] | None = None,
        results_usage_extractor: Callable[[Call, Any], float] | None = None,
        max_results_usage_estimator: Callable[[Call], float] | None = None,
        *,
        failure_usage_extractor: Callable[[Call, Exception], float] | None = None,
    ) -> None:
        check_text("name", name)
        check_number("quota", quota, least=0)
        check_number("time_window_seconds", time_window_seconds, least=0.001)
        check_callable("arguments_usage_extractor", arguments_usage_extractor, optional=True)
        check_callable("results_usage_extractor", results_usage_extractor, optional=True)
        check_callable("max_results_usage_estimator", max_results_usage_estimator, optional=True)
        check_callable("failure_usage_extractor", failure_usage_extractor, optional=True)
        if max_results_usage_estimator is not None and results_usage_extractor is None:
            msg = (
                f"max_results_usage_estimator of the resource {name!r} needs a results_usage_extractor:"
                " what is reserved would never be replaced by what was used"
            )
            raise ConfigError(msg)
        self.name = name
        self.quota = quota
        self.time_window_seconds = time_window_seconds
        self.arguments_usage_extractor = arguments_usage_extractor
        self.results_usage_extractor = results_usage_extractor
        self.max_results_usage_estimator = max_results_usage_estimator
        self.failure_usage_extractor = failure_usage_extractor

    def __repr__(self) -> str:
        return f"Resource({self.name!r}, quota={self.quota:g}, time_window_seconds={self.time_window_seconds:g})"

    def by_arguments(self, call: Call) -> float:
        """Return what `call` uses by being made."""
        return self._amount("arguments_usage_extractor", self.arguments_usage_extractor, call)

    def reserved(self, call: Call) -> float:
        """Return what must be free before `call` starts."""
        result = self._amount("max_results_usage_estimator", self.max_results_usage_estimator, call)
        return self.by_arguments(call) + result

    def used(self, call: Call, result: Any) -> float | None:
        """Return what `call` has used in all; None: what was reserved."""
        if self.results_usage_extractor is None:
            return None
        found = self._amount("results_usage_extractor", self.results_usage_extractor, call, result)
        return self.by_arguments(call) + found

    def spent(self, call: Call, error: Exception) -> float | None:
        """Return what `call` has used although it failed; None: what was reserved."""
        if self.failure_usage_extractor is None:
            return None
        return self._amount("failure_usage_extractor", self.failure_usage_extractor, call, error)

    def _amount(self, field: str, extractor: Callable[..., float] | None, *args: Any) -> float:
        if extractor is None:
            return 0.0
        amount = extractor(*args)
        check_number(f"{field} of the resource {self.name!r}: its result", amount, least=0)
        return float(amount)


class Resources:
    """The resources of a runner as quotas of a gate: each has a unit of its own.

    >>> minute = Resource("Tokens", 90_000, 60), Resource("tokens", 10_000, 1)
    >>> [str(quota) for quota in Resources(minute).quotas]
    ['90000 tokens per 60 seconds', '10000 tokens_2 per 1 seconds']
    """

    def __init__(self, resources: Iterable[Resource]) -> None:
        self._of: dict[str, Resource] = {}  # unit -> what counts it
        quotas: list[Quota] = []
        for resource in resources:
            if not isinstance(resource, Resource):
                msg = f"resources must be Resources, got {resource!r}"
                raise ConfigError(msg)
            quota = _quota(resource, self._of)
            self._of[quota.unit] = resource
            quotas.append(quota)
        self.quotas = tuple(quotas)

    def cost(self, call: Call) -> dict[str, float]:
        """Return what must be free before `call` starts, by unit.

        Raises:
            ValueError: more than a quota: the call would never start.
        """
        cost: dict[str, float] = {}
        for unit, resource in self._of.items():
            cost[unit] = amount = resource.reserved(call)
            if amount > resource.quota:
                raise TooLargeError(call, resource, amount)
        return cost

    def used(self, call: Call, result: Any) -> dict[str, float]:
        """Return what a call that was answered has used, by unit; without those that keep what was reserved."""
        found = ((unit, resource.used(call, result)) for unit, resource in self._of.items())
        return {unit: amount for unit, amount in found if amount is not None}

    def spent(self, call: Call, error: Exception) -> dict[str, float]:
        """Return the same of a call that failed; an extractor that fails too leaves what was reserved, and a note."""
        found: dict[str, float] = {}
        for unit, resource in self._of.items():
            try:
                amount = resource.spent(call, error)
            except Exception as bug:
                error.add_note(f"and the failure_usage_extractor of {resource.name!r} raised {bug!r}")
                continue
            if amount is not None:
                found[unit] = amount
        return found


class TooLargeError(ValueError):
    """A call that would never start."""

    def __init__(self, call: Call, resource: Resource, amount: float) -> None:
        super().__init__(
            f"{call!r} exceeds resource quota: it needs {amount:g} of {resource.name}, and there are never more than"
            f" {resource.quota:g}"
        )


def _quota(resource: Resource, taken: Mapping[str, Resource]) -> Quota:
    """Return the quota that keeps `resource`, in a unit that no other has."""
    word = re.sub(r"[^a-z0-9_]+", "_", resource.name.lower()).strip("_")
    word = word if word[:1].isalpha() else f"resource_{word}".rstrip("_")
    quota = Quota(
        resource.quota,
        per=resource.time_window_seconds,
        unit=word if resource.quota >= 1 else f"{word}_used",  # of "requests" no less than one can be said
        charged_at="start" if resource.results_usage_extractor is None else "end",
    )
    unit, number = quota.unit, 2  # which is the plural of some words
    while unit in taken:
        unit, number = f"{quota.unit}_{number}", number + 1
    return msgspec.structs.replace(quota, unit=unit)


class Task(Generic[R]):
    """A call on the schedule, and what became of it so far."""

    __slots__ = ("call", "cost", "errors", "failed", "index", "result", "succeeded")

    def __init__(self, index: int, call: Call, cost: Mapping[str, float]) -> None:
        self.index = index  # its place on the schedule
        self.call = call
        self.cost = cost  # unit -> what must be free before it starts
        self.errors: tuple[Exception, ...] = ()  # of every try
        self.succeeded = False
        self.failed = False  # no tries are left, or none would help
        self.result: R | None = None

    @property
    def pending(self) -> bool:
        """Whether it is still to be run."""
        return not self.succeeded and not self.failed

    def finished(self) -> Finished[R]:
        """Return what is told of it."""
        return Finished(
            index=self.index,
            call=self.call,
            ok=self.succeeded,
            result=self.result,
            exceptions=self.errors,
        )


class Finished(msgspec.Struct, Generic[R], frozen=True, kw_only=True):
    """A call that has ended, as `Runner.as_completed` tells."""

    index: int  # its place on the schedule, from 0
    call: Call
    ok: bool
    result: R | None  # None when it failed; and when that is what the function returned
    exceptions: tuple[Exception, ...]  # of every try that failed


class RunnerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """How far a runner is."""

    total: int  # calls on the schedule
    succeeded: int
    failed: int  # without tries left
    running: int  # calls of the function at this moment
    errors: int  # tries that failed, also of calls that succeeded later
    seconds: float  # since the run began; 0.0 when none is on
    resumes_in: float | None  # seconds until a resource is free that all wait for; None: nobody waits for one

    @property
    def pending(self) -> int:
        """Calls that are still to be run, or are running."""
        return self.total - self.succeeded - self.failed
