"""Marble diagrams in virtual time: scripted sources, a recorder, and a consumer whose room a test decides.

`-` is a unit of time, a letter an item, `|` the end, `#` an error, `(ab)` several at one instant; each takes one unit
of time, a group too. Blanks are ignored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar, cast

from reactivex import Observable

from rxllm.demand import Demand, DemandScheduler, Disposable, Flow, Observer
from rxllm.errors import ConfigError
from rxllm.stream import Stream, connected, subscribe

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from reactivex import abc

    from rxllm.clock import Handle
    from rxllm.testing.virtual import VirtualScheduler

__all__ = ["Cold", "Event", "Recorder", "Script", "Subscription", "Taker", "cold", "marbles", "parse", "record"]

T = TypeVar("T")
Kind = Literal["next", "error", "completed"]


class Event(NamedTuple):
    """Something a stream emitted, and when."""

    at: float  # seconds
    kind: Kind
    value: Any = None  # the item, or the error


class Subscription(NamedTuple):
    """When a source was subscribed, and when it was released; None: not yet."""

    at: float
    until: float | None


class MarbleError(Exception):
    """What `#` stands for when a test names no error. Not transient."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, MarbleError) and other.args == self.args

    __hash__ = Exception.__hash__


def parse(  # noqa: C901  a parser: one branch a mark
    diagram: str, values: Mapping[str, Any] | None = None, *, error: Exception | None = None, unit: float = 1.0
) -> list[Event]:
    """Return the events of a diagram.

    Args:
        diagram: e.g. `"-a-(bc)-|"`.
        values: letter -> item; a letter without one stands for itself.
        error: what `#` is.
        unit: seconds that one character takes.

    Raises:
        ConfigError: groups that do not close, or something after the end.
    """
    events: list[Event] = []
    tick = 0
    grouped = ended = False
    for place, mark in enumerate(diagram):
        if mark == " ":
            continue
        if ended and mark not in "-)":
            msg = f"marble {place} of {diagram!r} comes after the end"
            raise ConfigError(msg)
        if mark in "()":
            if grouped is (mark == "("):
                msg = f"unbalanced group at marble {place} of {diagram!r}"
                raise ConfigError(msg)
            grouped = mark == "("
        elif mark == "|":
            events.append(Event(tick * unit, "completed"))
            ended = True
        elif mark == "#":
            events.append(Event(tick * unit, "error", error or MarbleError("#")))
            ended = True
        elif mark != "-":
            events.append(Event(tick * unit, "next", (values or {}).get(mark, mark)))
        if not grouped:
            tick += 1
    if grouped:
        msg = f"a group of {diagram!r} is not closed"
        raise ConfigError(msg)
    return events


def marbles(events: Sequence[Event], *, unit: float = 1.0) -> str:
    """Return the diagram of events whose items are single letters, up to the last one; the reverse of `parse`."""
    ticks: dict[int, str] = {}
    for at, kind, value in events:
        mark = {"next": str(value), "completed": "|", "error": "#"}[kind]
        ticks[round(at / unit)] = ticks.get(round(at / unit), "") + mark
    return "".join(
        "-" if tick not in ticks else ticks[tick] if len(ticks[tick]) == 1 else f"({ticks[tick]})"
        for tick in range(max(ticks, default=-1) + 1)
    )


class Cold(Observable[Any]):
    """A foreign source that plays the same diagram for each subscription and notes when it was released."""

    def __init__(self, scheduler: VirtualScheduler, events: Sequence[Event]) -> None:
        super().__init__()
        self._scheduler = scheduler
        self._events = list(events)
        self.subscriptions: list[Subscription] = []

    def _subscribe_core(
        self,
        observer: abc.ObserverBase[Any],
        scheduler: abc.SchedulerBase | None = None,  # noqa: ARG002
    ) -> abc.DisposableBase:
        return cast("abc.DisposableBase", _Play(self, observer))

    def play(self, observer: Observer[Any]) -> list[Handle]:
        """Schedule every event for `observer`."""
        return [
            self._scheduler.call_later(event.at, lambda event=event: deliver(event, observer))  # type: ignore[misc]
            for event in self._events
        ]

    @property
    def clock(self) -> VirtualScheduler:
        """The time it plays in."""
        return self._scheduler


class _Play:
    """One subscription of a cold source."""

    def __init__(self, source: Cold, observer: Observer[Any]) -> None:
        self._source = source
        self._observer = observer
        self._number = len(source.subscriptions)
        source.subscriptions.append(Subscription(source.clock.seconds(), None))
        self._handles = source.play(self)

    def on_next(self, value: Any) -> None:
        self._observer.on_next(value)

    def on_error(self, error: Exception) -> None:
        self.dispose()
        self._observer.on_error(error)

    def on_completed(self) -> None:
        self.dispose()
        self._observer.on_completed()

    def dispose(self) -> None:
        subscriptions = self._source.subscriptions
        begun, until = subscriptions[self._number]
        if until is None:
            subscriptions[self._number] = Subscription(begun, self._source.clock.seconds())
        for handle in self._handles:
            handle.cancel()


def deliver(event: Event, observer: Observer[Any]) -> None:
    """Call the method of `observer` that `event` stands for."""
    if event.kind == "next":
        observer.on_next(event.value)
    elif event.kind == "error":
        observer.on_error(event.value)
    else:
        observer.on_completed()


def cold(
    scheduler: VirtualScheduler,
    diagram: str,
    values: Mapping[str, Any] | None = None,
    *,
    error: Exception | None = None,
    unit: float = 1.0,
) -> Cold:
    """Return a source that plays `diagram` from each subscription on; see `parse` for the arguments."""
    return Cold(scheduler, parse(diagram, values, error=error, unit=unit))


class Script(Stream[T]):
    """An inner stream whose tries are scripted: each subscription plays the next line, the last line repeats.

    Each line is (seconds, item or exception). It counts what a test wants to know: `started`, `active`, `most`.

    Example:
        >>> from rxllm.testing import VirtualScheduler, record
        >>> scheduler = VirtualScheduler()
        >>> script = Script((1.0, "a"))
        >>> record(scheduler, script).events
        [Event(at=1.0, kind='next', value='a'), Event(at=1.0, kind='completed', value=None)]
    """

    def __init__(self, *lines: tuple[float, T | Exception]) -> None:
        if not lines:
            msg = "a Script needs at least one line"
            raise ConfigError(msg)
        self.lines = lines
        self.started = 0
        self.active = 0
        self.most = 0  # active at a time

    def _start(self, observer: Observer[T], carrier: DemandScheduler) -> Disposable:
        delay, result = self.lines[min(self.started, len(self.lines) - 1)]
        self.started += 1
        self.active += 1
        self.most = max(self.most, self.active)
        reading = _Reading(self, observer, result)
        if delay <= 0:
            return connected(reading, reading.read)
        reading.handle = carrier.call_later(delay, reading.read)
        return reading


class _Reading:
    """One subscription of a script."""

    __slots__ = ("_observer", "_result", "_script", "handle")

    def __init__(self, script: Script[Any], observer: Observer[Any], result: Any) -> None:
        self._script: Script[Any] | None = script
        self._observer = observer
        self._result = result
        self.handle: Handle | None = None

    def read(self) -> None:
        script = self._script
        if script is None:
            return
        if isinstance(self._result, Exception):
            self._end(script)
            self._observer.on_error(self._result)
            return
        self._observer.on_next(self._result)
        if self._script is not None:
            self._end(script)
            self._observer.on_completed()

    def _end(self, script: Script[Any]) -> None:
        self._script = None
        script.active -= 1

    def dispose(self) -> None:
        if self._script is not None:
            self._end(self._script)
        if self.handle is not None:
            self.handle.cancel()


class Recorder:
    """An observer that notes what it gets and when. `events` is what a test compares."""

    def __init__(self, scheduler: VirtualScheduler) -> None:
        self._scheduler = scheduler
        self.events: list[Event] = []
        self.subscription: Disposable | None = None

    def on_next(self, value: Any) -> None:
        """Note an item."""
        self.events.append(Event(self._scheduler.seconds(), "next", value))

    def on_error(self, error: Exception) -> None:
        """Note an error."""
        self.events.append(Event(self._scheduler.seconds(), "error", error))

    def on_completed(self) -> None:
        """Note the end."""
        self.events.append(Event(self._scheduler.seconds(), "completed"))

    @property
    def values(self) -> list[Any]:
        """The items alone."""
        return [event.value for event in self.events if event.kind == "next"]

    @property
    def end(self) -> Event | None:
        """The terminal event, if there was one."""
        return self.events[-1] if self.events and self.events[-1].kind != "next" else None

    def dispose(self) -> None:
        """Dispose the subscription."""
        if self.subscription is not None:
            self.subscription.dispose()


def record(
    scheduler: VirtualScheduler, source: Observable[Any], *, until: float | None = None, dispose_at: float | None = None
) -> Recorder:
    """Subscribe `source` now, run the scheduler, and return what was emitted.

    Args:
        scheduler: virtual time; not running.
        source: the stream.
        until: run up to this time; None: until nothing is due.
        dispose_at: dispose the subscription at this time.
    """
    recorder = Recorder(scheduler)
    recorder.subscription = source.subscribe(cast("abc.ObserverBase[Any]", recorder), scheduler=scheduler)
    if dispose_at is not None:
        scheduler.call_later(dispose_at - scheduler.seconds(), recorder.dispose)
    scheduler.run(until)
    return recorder


class Taker(Demand):
    """A consumer with room for `window` items, which a test empties, as a stage or a sink does."""

    def __init__(self, scheduler: VirtualScheduler, window: int) -> None:
        super().__init__(scheduler, Flow(self._failed))
        self.window = window
        self.held: list[Any] = []
        self.taken: list[Any] = []
        self.ended: Event | None = None
        self.failed: BaseException | None = None
        self.subscription: Disposable | None = None

    @property
    def ahead(self) -> int:
        """As a stage does: as many items as the window may be kept ready above."""
        return self.window

    def room(self) -> int:
        """Return the free places."""
        return self.window - len(self.held)

    def connect(self, source: Observable[Any]) -> Taker:
        """Subscribe `source` with this demand."""
        self.subscription = subscribe(source, self, DemandScheduler(self.clock, self, self.flow))
        return self

    def on_next(self, value: Any) -> None:
        """Hold an item until the test takes it."""
        self.arrived += 1
        self.held.append(value)

    def on_error(self, error: Exception) -> None:
        """Note the error."""
        self.ended = Event(self.clock.seconds(), "error", error)

    def on_completed(self) -> None:
        """Note the end."""
        self.ended = Event(self.clock.seconds(), "completed")

    def take(self, n: int = 1) -> list[Any]:
        """Take up to `n` held items: their places are free again."""
        taken, self.held = self.held[:n], self.held[n:]
        self.taken += taken
        self.wake()
        return taken

    def dispose(self) -> None:
        """Dispose the subscription."""
        if self.subscription is not None:
            self.subscription.dispose()

    def _failed(self, error: BaseException) -> None:
        self.failed = error
        self.dispose()
