"""One run of a schedule: what feeds it, what calls the function, and how it stops."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar, cast

from reactivex import Observable, Subject
from reactivex import operators as ops

from rxllm.clients.function import FunctionClient
from rxllm.clock import wall
from rxllm.demand import NOTHING
from rxllm.errors import CallError, ConfigError, RxllmError, ValidationError
from rxllm.messages import Outcome, Reply, Request, Usage
from rxllm.operators.call import call
from rxllm.operators.to_outcome import forget_traceback
from rxllm.policies.backoff import Backoff
from rxllm.policies.timeouts import Timeouts
from rxllm.policies.validation import Validate
from rxllm.providers.said import retry_after
from rxllm.runner.calls import Resources, Task
from rxllm.sources.feed import Feed
from rxllm.stream import Stream, subscribe

if TYPE_CHECKING:
    from rxllm.clock import Clock, Handle
    from rxllm.demand import DemandScheduler, Disposable, Flow, Observer
    from rxllm.gate import Gate

__all__ = ["Counts", "Plan", "Run"]

R = TypeVar("R")

NO_USAGE = Usage()
FOREVER = 1e9  # seconds: a call waits for its resources as long as it takes
_log = logging.getLogger("rxllm.runner")


class Plan(NamedTuple):
    """What all runs of a runner have in common."""

    function: Callable[..., Any]
    resources: Resources
    gate: Gate
    max_concurrent: int
    max_retries: int
    validation: Callable[[Any], object] | None
    backoff: Backoff
    timeout: float | None  # seconds, of one try
    grace: float  # seconds that calls which run may take to end, when they are to stop
    progress_interval: float | None  # seconds
    tick: Callable[[], object]  # called so often


class Counts:
    """How many calls of a schedule have come to what."""

    __slots__ = ("errors", "failed", "succeeded")

    def __init__(self) -> None:
        self.succeeded = 0
        self.failed = 0
        self.errors = 0


class Run(Generic[R]):
    """One run of a schedule. All but what says otherwise happens on its loop.

    What becomes of a task is noted on it at the moment when it is known, not further down where it is delivered: so a
    run that is cut off anywhere forgets nothing that was answered.
    """

    def __init__(self, plan: Plan, counts: Counts, tasks: Iterable[Task[R]]) -> None:
        self.counts = counts
        self.running = 0  # calls of the function at this moment, and those that begin in the next turn
        self.stopping = False
        self.clock: Clock | None = None
        self._started = 0.0
        self._flow: Flow | None = None
        self.total = 0  # tasks of the schedule that are this run's, from the first on
        self._plan = plan
        self._feed: Feed[Task[R]] = Feed("buffer")  # what it holds is on the schedule anyway
        self._unfinished = 0  # of those in the feed and behind it
        self._closed = False
        self._halted: Subject[None] = Subject()
        self._timers: dict[str, Handle] = {}
        self._client = _Caller[R](self, plan)
        for task in tasks:
            self.put(task)
        if not self._unfinished:
            self._close()

    # for the runner, under its lock

    def put(self, task: Task[R]) -> bool:
        """Run `task` too, unless it has ended; from any thread. False: this run is at its end."""
        if self._closed:
            return False
        self.total += 1
        if task.pending:
            self._unfinished += 1
            self._feed.put_threadsafe(task)
        return True

    def ended(self) -> None:
        """Count one that is through; the last one ends the run."""
        self._unfinished -= 1
        if not self._unfinished:
            self._close()

    def _close(self) -> None:
        self._closed = True
        self._feed.close()

    # the stream

    def stream(self, ended: Callable[[], object]) -> Observable[Task[R]]:
        """Return the stream of the tasks that end.

        Args:
            ended: called for each task that is through, also those that are to be run again.
        """

        def through(outcome: Outcome[Any]) -> Task[R]:
            task = cast("Task[R]", outcome.request.body)
            error = outcome.error
            if error is not None and task.pending and not isinstance(error, _EndedError):  # it failed outside of a try
                self.note(task, error, final=True)
            ended()
            return task

        plan, client = self._plan, self._client
        calling = call(
            client,
            gate=plan.gate,
            retry=plan.backoff,
            validate=None if plan.validation is None else Validate(check=client.check, attempts=plan.max_retries + 1),
            timeouts=Timeouts(connect=None, first_byte=None, idle=None, total=plan.timeout),
            deadline=FOREVER,
        )
        stream = self._feed.pipe(ops.take_while(lambda _: not self.stopping), calling, ops.map(through))
        tasks: Observable[Task[R]] = stream.pipe(
            ops.filter(_is_over), ops.take_until(self._halted), ops.finally_action(self.release)
        )
        return _Begun(self, tasks)

    def begin(self, carrier: DemandScheduler) -> None:
        """Start the time; from here on who consumes the stream can tell it to stop."""
        self.clock = carrier.clock
        self._started = self.clock.seconds()
        self._flow = carrier.flow
        self._flow.add_source(self.stop)
        self._arm()

    @property
    def seconds(self) -> float:
        """Seconds since it began; from any thread."""
        return 0.0 if self.clock is None else self.clock.seconds() - self._started

    def _arm(self) -> None:
        interval = self._plan.progress_interval
        if interval is not None and self.clock is not None:
            self._timers["tick"] = self.clock.call_later(interval, self._tick)

    def _tick(self) -> None:
        self._arm()
        self._plan.tick()

    def release(self) -> None:
        """Let go of timers and threads. Again, or from another thread when the stream never began, is harmless."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._flow is not None:
            self._flow.remove_source(self.stop)
        self._client.close()

    # tasks

    def note(self, task: Task[R], error: Exception, *, final: bool = False) -> None:
        """Note a try that failed."""
        _log.debug("%r failed", task.call, exc_info=error)
        task.errors = (*task.errors, forget_traceback(error))
        self.counts.errors += 1
        if final or len(task.errors) > self._plan.max_retries:
            task.failed = True
            self.counts.failed += 1

    def succeed(self, task: Task[R], result: R) -> None:
        """Note a result."""
        task.result = result
        task.succeeded = True
        self.counts.succeeded += 1

    # the end before the end

    def stop(self) -> None:
        """Start nothing any more, and end with the last call that is running, or the grace; the second time at once."""
        if self.stopping:
            self.halt()
            return
        self.stopping = True
        if self.clock is not None:
            self._timers["grace"] = self.clock.call_later(self._plan.grace, self.halt)
        self.look()

    def look(self) -> None:
        """End, in the next turn, if the run is to stop and nothing runs: what runs emits in the turn it ends in."""
        if self.stopping and not self.running and self.clock is not None:
            self.clock.call_soon(self.halt)

    def halt(self) -> None:
        """Cancel what is in progress and complete the stream."""
        self._halted.on_next(None)


def _is_over(task: Task[Any]) -> bool:
    return not task.pending


class _Begun(Stream[Task[R]]):
    """A run's stream, which begins when it is subscribed."""

    def __init__(self, run: Run[R], source: Observable[Task[R]]) -> None:
        self.begin = run.begin
        self.source = source

    def _start(self, observer: Observer[Task[R]], carrier: DemandScheduler) -> Disposable:
        self.begin(carrier)
        return subscribe(self.source, observer, carrier)


class _EndedError(CallError):
    """How a try ended, for the operators: what it is is noted on its task already."""


def _hint(error: Exception) -> float | None:
    """Return the seconds that an exception of any package asks to wait; None if it does not say."""
    hint: object = getattr(error, "retry_after", None)
    if isinstance(hint, int | float):
        return hint if 0 <= hint < FOREVER else None
    for holder in (getattr(error, "response", None), error):  # those of requests, httpx and the vendors; of urllib
        headers: Any = getattr(holder, "headers", None)
        if headers is not None:
            try:
                return retry_after(headers, wall())
            except Exception:  # other packages have other ideas of what headers are
                return None
    return None


class _Answer(NamedTuple):
    """A result, and what it is of."""

    task: Task[Any]
    value: Any


class _Starting(Stream[Reply[_Answer]]):
    """A try, which is counted from now on: its task begins in the next turn."""

    def __init__(self, run: Run[Any], source: Observable[Reply[_Answer]]) -> None:
        self.owner = run
        self.source = source

    def _start(self, observer: Observer[Reply[_Answer]], carrier: DemandScheduler) -> Disposable:
        if self.owner.stopping:
            left = _EndedError("the run has been interrupted")
            left.sent = False  # it costs nothing, and is for the next run
            observer.on_error(left)
            return NOTHING
        self.owner.running += 1
        return subscribe(self.source, observer, carrier)


def _made(function: Callable[..., Any], task: Task[Any]) -> Any:
    return function(*task.call.args, **task.call.kwargs)


class _Caller(FunctionClient[_Answer], Generic[R]):
    """The function of a runner as a client."""

    def __init__(self, run: Run[R], plan: Plan) -> None:
        super().__init__(plan.function, threads=plan.max_concurrent)
        self._f = partial(_made, plan.function)  # the base knows by now whether that is async
        self._run = run
        self._plan = plan

    def send(self, request: Request, *, timeouts: Timeouts = Timeouts()) -> Observable[Reply[_Answer]]:  # noqa: B008
        """Return a cold observable of the result; none starts in a run that is to stop."""
        return _Starting(self._run, super().send(request, timeouts=timeouts))

    def cost(self, request: Request) -> Mapping[str, float]:
        """Return what must be free before the task starts."""
        cost: Mapping[str, float] = request.body.cost
        return cost

    async def _call(self, item: Any) -> Reply[_Answer]:
        return self._answered(item, await super()._call(item))

    def _answered(self, task: Task[R], value: Any) -> Reply[_Answer]:
        """Return the reply of a result; it is good by now if nobody checks it."""
        units = self._plan.resources.used(task.call, value)
        if self._plan.validation is None:
            self._run.succeed(task, value)
        return Reply(value=_Answer(task, value), usage=Usage(units=units) if units else NO_USAGE)

    async def _exchange(self, request: Request, timeouts: Timeouts) -> Reply[_Answer]:
        run, task = self._run, request.body
        try:
            if self._is_async and timeouts.total is None:  # as the base does, without two coroutines in between
                return self._answered(task, await self._f(task))
            return await super()._exchange(request, timeouts)
        except Exception as error:
            ended = self._failed(task, error)
        finally:
            run.running -= 1
            run.look()
        raise ended

    def _failed(self, task: Task[R], error: Exception) -> _EndedError:
        """Note that a try has failed; return what says whether there is another one, when, and what this one took."""
        hopeless = isinstance(error, RxllmError) and getattr(error, "transient", False) is not True
        spent = self._plan.resources.spent(task.call, error)
        self._run.note(task, error, final=hopeless)
        ended = _EndedError(str(error))
        ended.transient = task.pending
        ended.retry_after = _hint(error)
        if spent:
            ended.usage = Usage(units=spent)
        return ended

    def check(self, reply: Reply[_Answer]) -> bool:
        """Say whether a result is good; one without tries left ends there."""
        task, value = reply.value
        error = self._refused(value)
        if error is None:
            self._run.succeed(task, value)
            return True
        self._run.note(task, error, final=isinstance(error, ConfigError))
        if not task.pending:
            raise _EndedError(str(error))
        return False

    def _refused(self, value: Any) -> Exception | None:
        """Return what is wrong with a result."""
        validation = self._plan.validation
        if validation is None:
            return None
        try:
            passed = validation(value)
            if inspect.iscoroutine(passed):
                passed.close()
                return ConfigError("the validation function must be a plain function, and it is async")
            if passed:
                return None
        except Exception as bug:
            return bug
        refused = ValidationError("the validation function refused the result")
        refused.reply = Reply(value=value)
        return refused
