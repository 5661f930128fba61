"""A schedule of calls, and what runs it."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import inspect
import logging
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Generator, Iterable, Iterator
from typing import Any, Generic, ParamSpec, TypeVar, overload

from reactivex import Observable

from rxllm import runtime
from rxllm.errors import ConfigError, check_callable, check_number
from rxllm.gate import Gate
from rxllm.policies.backoff import Backoff
from rxllm.runner.calls import Call, Finished, Resource, Resources, RunnerStatistics, Task, TooLargeError
from rxllm.runner.interrupts import Interrupts
from rxllm.runner.running import Counts, Plan, Run
from rxllm.sinks import aiterate, iterate

__all__ = ["Runner"]

P = ParamSpec("P")
R = TypeVar("R")

CLEANUP = 5.0  # seconds that calls which are cancelled have to clean up
_log = logging.getLogger("rxllm.runner")


class Runner(Generic[P, R]):
    """Schedules calls of a function and runs them: in parallel, through quotas, with checks and retries.

    For those who want no streams; it is `call` with a `Gate` underneath. A call that fails ends nothing: its result is
    None and its exceptions are told.

    `schedule(*args, **kwargs)` takes what the function takes, and puts a call of it on the schedule: before a run, and
    while one is on, from any thread and also from the function itself. It raises ValueError at once for a call that
    needs more of a resource than there is, and TypeError for arguments that the function does not take.

    Args:
        function: a plain function (it runs in a thread), a coroutine function, or anything that is called and returns
            either.
        resources: what the calls use, of which there is so much in so many seconds.
        max_concurrent: calls at a time, >= 1.
        max_retries: tries of each call after the first one, >= 0, whatever they fail with: an exception of the
            function or of an extractor of results, or a result that is refused. An error of this library that no
            further try cures (`transient` is False) is not tried again.
        validation_function: result -> whether it is good. What is false, and any exception, means another try, at
            once. It is called in the loop: a long one holds up the others.
        progress_interval: seconds between two reports of how far it is: to `on_progress`, and to the logger
            "rxllm.runner" at INFO. None: none.
        long_wait_warning_seconds: a WARNING there when nothing runs, because all wait for a resource that is not
            free for longer than that. None: never.
        validation: another name for `validation_function`.
        backoff_base: seconds, > 0: before the first retry after an exception a random time up to that, up to the double
            before the next, and so on. What an exception asks to wait is waited for in full: the number in its
            `retry_after`, or the Retry-After in its `headers` or in those of its `response`.
        backoff_cap: seconds, >= `backoff_base`: no more than that.
        timeout: seconds for each try, > 0. A thread that is in it goes on by itself. None: any time.
        grace: seconds, >= 0, in which calls that are running may end after Ctrl-C.
        on_progress: called with `RunnerStatistics`, in the loop.

    Raises:
        ConfigError: an argument of another kind or out of range.

    Example:
        >>> from rxllm.runner import Resource
        >>> a_second = Resource("requests", 100, 1, arguments_usage_extractor=lambda call: 1)
        >>> runner = Runner(int, [a_second], max_retries=0)
        >>> for text in ("1", "2", "three"):
        ...     runner.schedule(text)
        >>> runner.run()
        ([1, 2, None], [[], [], [ValueError("invalid literal for int() with base 10: 'three'")]])
    """

    schedule: Callable[P, None]

    @overload
    def __init__(
        self,
        function: Callable[P, Awaitable[R]],
        resources: Iterable[Resource] = (),
        max_concurrent: int = 64,
        max_retries: int = 5,
        validation_function: Callable[[R], object] | None = None,
        progress_interval: float | None = 1.0,
        long_wait_warning_seconds: float | None = 2.0,
        *,
        validation: Callable[[R], object] | None = None,
        backoff_base: float = 0.5,
        backoff_cap: float = 30.0,
        timeout: float | None = None,
        grace: float = 30.0,
        on_progress: Callable[[RunnerStatistics], object] | None = None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        function: Callable[P, R],
        resources: Iterable[Resource] = (),
        max_concurrent: int = 64,
        max_retries: int = 5,
        validation_function: Callable[[R], object] | None = None,
        progress_interval: float | None = 1.0,
        long_wait_warning_seconds: float | None = 2.0,
        *,
        validation: Callable[[R], object] | None = None,
        backoff_base: float = 0.5,
        backoff_cap: float = 30.0,
        timeout: float | None = None,
        grace: float = 30.0,
        on_progress: Callable[[RunnerStatistics], object] | None = None,
    ) -> None: ...
    def __init__(  # noqa: PLR0917  they stand in the order of rate_limited's Runner
        self,
        function: Callable[P, Any],
        resources: Iterable[Resource] = (),
        max_concurrent: int = 64,
        max_retries: int = 5,
        validation_function: Callable[[Any], object] | None = None,
        progress_interval: float | None = 1.0,
        long_wait_warning_seconds: float | None = 2.0,
        *,
        validation: Callable[[Any], object] | None = None,
        backoff_base: float = 0.5,
        backoff_cap: float = 30.0,
        timeout: float | None = None,
        grace: float = 30.0,
        on_progress: Callable[[RunnerStatistics], object] | None = None,
    ) -> None:
        check_callable("function", function)
        check_number("max_concurrent", max_concurrent, least=1, integer=True)
        check_number("max_retries", max_retries, least=0, integer=True)
        check_callable("validation_function", validation_function, optional=True)
        check_callable("validation", validation, optional=True)
        if validation is not None and validation_function is not None:
            msg = f"validation is another name for validation_function: give one of them, got also {validation!r}"
            raise ConfigError(msg)
        check_number("progress_interval", progress_interval, above=0, optional=True)
        check_number("long_wait_warning_seconds", long_wait_warning_seconds, least=0, optional=True)
        check_number("backoff_base", backoff_base, above=0)
        check_number("backoff_cap", backoff_cap, least=backoff_base)
        check_number("timeout", timeout, above=0, optional=True)
        check_number("grace", grace, least=0)
        check_callable("on_progress", on_progress, optional=True)
        found = Resources(resources)
        self._plan = Plan(
            function=function,
            resources=found,
            gate=Gate(*found.quotas, concurrency=max_concurrent, headers=False),
            max_concurrent=max_concurrent,
            max_retries=max_retries,
            validation=validation_function if validation is None else validation,
            backoff=Backoff(attempts=max_retries + 1, base=backoff_base, cap=backoff_cap),
            timeout=timeout,
            grace=grace,
            progress_interval=progress_interval,
            tick=self._tick,
        )
        self._long_wait = long_wait_warning_seconds
        self._on_progress = on_progress
        self._lock = threading.RLock()
        self._tasks: list[Task[R]] = []
        self._told: set[int] = set()  # places of those that `as_completed` has told
        self._counts = Counts()
        self._run: Run[R] | None = None
        self._warned = False
        self.interrupted = False  # the last run ended before all its calls had
        self.schedule = _looking_like(function, self._schedule)

    def __repr__(self) -> str:
        return f"Runner({getattr(self._plan.function, '__qualname__', type(self._plan.function).__name__)})"

    # the schedule

    def _schedule(self, call: Call) -> None:
        error: Exception | None = None
        cost: dict[str, float] = {}
        try:
            cost = self._plan.resources.cost(call)
        except TooLargeError:
            raise
        except Exception as bug:  # of an extractor: nobody knows what the call needs, so it is not made
            error = bug
        with self._lock:
            task: Task[R] = Task(len(self._tasks), call, cost)
            self._tasks.append(task)
            if error is not None:
                task.errors = (error.with_traceback(None),)
                task.failed = True
                self._counts.failed += 1
                self._counts.errors += 1
            if self._run is not None:
                self._run.put(task)

    def results(self) -> tuple[list[R | None], list[list[Exception]]]:
        """Return what there is so far of the calls on the schedule, as `run` does; from any thread."""
        with self._lock:
            return _listed(self._tasks)

    def statistics(self) -> RunnerStatistics:
        """Return how far it is; from any thread."""
        run, counts, gate = self._run, self._counts, self._plan.gate.statistics()
        return RunnerStatistics(
            total=len(self._tasks),
            succeeded=counts.succeeded,
            failed=counts.failed,
            running=0 if run is None else run.running,
            errors=counts.errors,
            seconds=0.0 if run is None else run.seconds,
            resumes_in=gate.resumes_in if gate.waiting else None,
        )

    # running it

    def run(self) -> tuple[list[R | None], list[list[Exception]]]:
        """Run the calls on the schedule that have no result and tries left; wait until all have ended.

        In a script, in a notebook, in a function that a running loop calls, and in threads: it waits while the calls
        live on a loop in another thread. The resources remember what the last run has used.

        Ctrl-C starts nothing more, waits for the calls that are running, and returns what there is; a second one does
        not wait. The schedule is kept then, and the next run goes on with it.

        Returns:
            The results and the exceptions, both in the order in which the calls were scheduled. Results: what the
            function returned, None for a call that failed or has not been run. Exceptions: of each call a list of what
            each of its tries has failed with. When all calls have ended the schedule is empty again.

        Raises:
            ConfigError: a run is on; or this is the thread in which the calls live, which would wait for itself.
        """
        with Interrupts() as interrupts:
            clock = runtime.background()
            if clock.is_here():
                msg = "run blocks, and this is the pipeline's own thread: await run_coro() here"
                raise ConfigError(msg)
            with self._running() as run:
                driving = asyncio.run_coroutine_threadsafe(self._drive(run), clock.loop)
                try:
                    interrupts.wait(driving, lambda: clock.post(run.stop))
                except BaseException:  # of a handler of the user's, such as sys.exit for SIGTERM
                    clock.post(run.halt)
                    concurrent.futures.wait([driving], CLEANUP)
                    raise
                driving.result()
                return _listed(self._tasks[: run.total])

    async def run_coro(self) -> tuple[list[R | None], list[list[Exception]]]:
        """Run as `run`, on the running loop. Cancel it, and the next run goes on with what has no result.

        Raises:
            ConfigError: a run is on.
        """
        with self._running() as run:
            await self._drive(run)
            return _listed(self._tasks[: run.total])

    def as_completed(self) -> AsCompleted[R]:
        """Return the calls as they end, for a `for` loop or, on the running loop, for an `async for` loop.

        The run begins with the loop. Leave it early, and what is running is cancelled; the next run goes on. So it does
        after Ctrl-C, which in a `for` loop starts nothing more, tells what is running as it ends, and is raised then.

        Example:
            >>> runner = Runner(len)
            >>> runner.schedule("abc")
            >>> [finished.result for finished in runner.as_completed()]
            [3]
        """
        return AsCompleted(self._completed, self._acompleted)

    def _completed(self) -> Generator[Finished[R]]:
        with self._running() as run:
            with iterate(self._stream(run), grace=self._plan.grace) as tasks:
                for task in tasks:
                    yield self._tell(task)
            yield from self._untold()

    async def _acompleted(self) -> AsyncGenerator[Finished[R]]:
        with self._running() as run:
            async with aiterate(self._stream(run)) as tasks:
                async for task in tasks:
                    yield self._tell(task)
            for finished in self._untold():
                yield finished

    def _untold(self) -> list[Finished[R]]:
        """Return what ended without a run, or when nobody listened."""
        with self._lock:
            ended = [task for task in self._tasks if not task.pending and task.index not in self._told]
        return [self._tell(task) for task in ended]

    def _tell(self, task: Task[R]) -> Finished[R]:
        self._told.add(task.index)
        return task.finished()

    async def _drive(self, run: Run[R]) -> None:
        async with aiterate(self._stream(run)) as tasks:
            async for _ in tasks:
                pass

    def _stream(self, run: Run[R]) -> Observable[Task[R]]:
        def ended() -> None:
            with self._lock:
                run.ended()

        return run.stream(ended)

    @contextlib.contextmanager
    def _running(self) -> Generator[Run[R]]:
        """Be the one run that is on; what has ended in full is taken from the schedule afterwards."""
        with self._lock:
            if self._run is not None:
                msg = f"{self!r} runs already"
                raise ConfigError(msg)
            run = self._run = Run(self._plan, self._counts, self._tasks)
        self._warned = False
        try:
            yield run
        finally:
            run.release()
            with self._lock:
                self._run = None
                self.interrupted = any(task.pending for task in self._tasks[: run.total])
                if not self.interrupted:
                    self._clear(run.total)

    def _clear(self, count: int) -> None:
        """Take the first `count` from the schedule."""
        del self._tasks[:count]
        self._told.clear()
        counts = self._counts
        counts.succeeded = counts.failed = counts.errors = 0
        for index, task in enumerate(self._tasks):  # scheduled when the run was at its end
            task.index = index
            counts.failed += task.failed
            counts.errors += len(task.errors)

    def _tick(self) -> None:
        statistics = self.statistics()
        _log.info(
            "%r: %d of %d done, %d failed, %d running",
            self,
            statistics.succeeded,
            statistics.total,
            statistics.failed,
            statistics.running,
        )
        seconds = statistics.resumes_in
        if statistics.running or seconds is None:
            self._warned = False
        elif self._long_wait is not None and seconds > self._long_wait and not self._warned:
            self._warned = True
            _log.warning("%r: all calls wait for resources; the next one starts in %.0f s", self, seconds)
        if self._on_progress is not None:
            try:
                self._on_progress(statistics)
            except Exception:
                _log.warning("%r: on_progress failed", self, exc_info=True)


class AsCompleted(Generic[R]):
    """The calls of a runner as they end; see `Runner.as_completed`."""

    def __init__(
        self, iterate: Callable[[], Generator[Finished[R]]], aiterate: Callable[[], AsyncGenerator[Finished[R]]]
    ) -> None:
        self._iterate = iterate
        self._aiterate = aiterate

    def __iter__(self) -> Iterator[Finished[R]]:
        """Run, and return what ends."""
        return self._iterate()

    def __aiter__(self) -> AsyncIterator[Finished[R]]:
        """Run on the running loop, and return what ends."""
        return self._aiterate()


def _listed(tasks: Iterable[Task[R]]) -> tuple[list[R | None], list[list[Exception]]]:
    rows = list(tasks)
    return [task.result for task in rows], [list(task.errors) for task in rows]


def _looking_like(function: Callable[P, Any], schedule: Callable[[Call], None]) -> Callable[P, None]:
    """Return what takes the arguments of `function` and gives the call to `schedule`; it looks like `function`."""
    try:
        signature: inspect.Signature | None = inspect.signature(function)
    except (ValueError, TypeError):  # some that are written in C
        signature = None

    def take(*args: P.args, **kwargs: P.kwargs) -> None:
        if signature is not None:
            signature.bind(*args, **kwargs)
        schedule(Call(function, args, kwargs))

    functools.update_wrapper(take, function, updated=())
    take.__annotations__ = {**getattr(function, "__annotations__", {}), "return": None}
    if signature is not None:
        take.__signature__ = signature.replace(return_annotation=None)  # type: ignore[attr-defined]
    return take
