"""A gate before a server that answers nothing any more: probes, a clean stop, and retries that have to be earned."""

import itertools
from typing import Any

import pytest
import reactivex as rx
from reactivex import operators as ops

import rxllm
from rxllm import errors, events
from rxllm.errors import BreakerError, ConfigError, ServerError
from rxllm.gate import Gate, Lease
from rxllm.messages import Reply, Request, chat
from rxllm.operators import admit, call, retry
from rxllm.policies.backoff import Backoff
from rxllm.policies.breaker import Breaker
from rxllm.policies.budget import RetryBudget
from rxllm.testing import VirtualScheduler, record


class Client:
    """Answers after a second, but is down from one time to another."""

    def __init__(self, scheduler: VirtualScheduler, down: float = 0.0, up: float = 0.0) -> None:
        self.scheduler = scheduler
        self.down = down
        self.up = up
        self.sent: list[float] = []

    def send(self, _request: Request, *, timeouts: Any = None) -> rx.Observable[Reply[str]]:
        def attempt(_scheduler: Any) -> rx.Observable[Reply[str]]:
            now = self.scheduler.seconds()
            self.sent.append(now)
            if self.down <= now < self.up:
                return rx.timer(0.1).pipe(ops.flat_map(lambda _tick: rx.throw(ServerError("down", 500))))
            return rx.timer(1.0).pipe(ops.map(lambda _tick: Reply(value="yes")))

        return rx.defer(attempt)

    def cost(self, _request: Request) -> dict[str, float]:
        return {"requests": 1.0}

    def wrap(self, item: Any) -> Request:
        return chat(str(item))


def pulled(log: list[int]) -> Any:
    for number in itertools.count():
        log.append(number)
        yield number


def test_an_open_breaker_lets_probes_pass_and_closes_with_the_first_answer() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=4, breaker=Breaker(seconds=60.0, failures=20, probe=10.0))
    told: list[events.BreakerChanged] = []
    gate.events.subscribe(lambda event: told.append(event) if isinstance(event, events.BreakerChanged) else None)
    client = Client(scheduler, 10.0, 300.0)
    source = rxllm.from_iterable(range(400))
    stream = source.pipe(call(client, gate=gate, retry=Backoff(attempts=1000), window=40))
    seen = record(scheduler, stream, until=600.0)
    [opened, closed] = told
    assert opened.is_open
    assert 69.0 <= opened.at <= 75.0
    assert opened.reason in {"no answer for 60 s", "no answer for 61 s"}
    assert not closed.is_open
    assert 300.0 <= closed.at <= 312.0
    probes = [at for at in client.sent if opened.at + 1 < at < 300.0]
    assert [round(later - earlier) for earlier, later in itertools.pairwise(probes)] == [10] * (len(probes) - 1)
    assert len(probes) >= 22
    assert all(outcome.ok for outcome in seen.values)
    assert "breaker" in gate.statistics().waited


def test_a_breaker_that_stops_ends_the_stream_and_leaves_the_rest_of_the_input() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=4, breaker=Breaker(seconds=60.0, failures=20, stop=True))
    log: list[int] = []
    client = Client(scheduler, 0.0, 1e9)
    stream = rxllm.from_iterable(pulled(log)).pipe(call(client, gate=gate, window=30))
    seen = record(scheduler, stream, until=1000.0)
    assert seen.end is not None
    assert isinstance(seen.end.value, BreakerError)
    assert len(seen.values) == len(log)  # every request that was pulled has its outcome
    before = len(client.sent)
    again = record(scheduler, rx.of("one more").pipe(call(client, gate=gate)), until=1200.0)
    assert isinstance(again.end.value, BreakerError)  # type: ignore[union-attr]
    assert len(client.sent) <= before + 1  # a probe


def test_refusals_open_no_breaker() -> None:
    scheduler, gate = VirtualScheduler(), Gate(breaker=Breaker(seconds=1.0, failures=1))
    refusal = errors.RateLimitedError("later", 429)
    stream = rx.defer(lambda _scheduler: rx.timer(0.5).pipe(ops.flat_map(lambda _tick: rx.throw(refusal))))
    record(scheduler, stream.pipe(admit(gate), retry(Backoff(base=0.1, cap=1.0), deadline=60.0)), until=50.0)
    assert gate.statistics().refused > 20
    assert "breaker" not in gate.statistics().waited


def test_retries_are_a_share_of_the_successes_and_what_is_denied_says_so() -> None:
    scheduler = VirtualScheduler()
    gate = Gate(concurrency=8, retry_budget=RetryBudget(share=0.1, spare=5))
    client = Client(scheduler, 20.0, 1e9)
    stream = rxllm.from_iterable(range(400)).pipe(call(client, gate=gate, window=64))
    seen = record(scheduler, stream, until=400.0)
    failed = [outcome for outcome in seen.values if not outcome.ok]
    answered = len(seen.values) - len(failed)
    retries = sum(len(outcome.attempts) - 1 for outcome in seen.values)
    assert retries <= 5 + 0.1 * answered
    assert gate.retry_budget is not None
    assert gate.retry_budget.denied > 100
    assert failed[-1].error is not None
    assert failed[-1].error.__notes__ == ["not tried again: the retry budget is used up"]


@pytest.mark.parametrize(("name", "value"), [("breaker", 5), ("retry_budget", 0.1)])
def test_what_is_no_breaker_and_no_budget_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be a"):
        Gate(**{name: value})
    with pytest.raises(ConfigError, match="budget must be a RetryBudget or None"):
        retry(Backoff(), budget=5)  # type: ignore[arg-type]


class Persistent:
    """Asks again as soon as it is turned away, as often as it may."""

    def __init__(self, gate: Gate, scheduler: VirtualScheduler, times: int) -> None:
        self.gate, self.scheduler, self.times = gate, scheduler, times
        self.turned_away_at: list[float] = []

    def ask(self) -> None:
        self.gate.enter(self.gate.apply(self.scheduler, (), self))

    def admitted(self, _lease: Lease) -> None:
        raise AssertionError

    def turned_away(self, _error: object) -> None:
        self.turned_away_at.append(self.scheduler.seconds())
        if len(self.turned_away_at) < self.times:
            self.ask()


def test_who_is_turned_away_by_an_open_breaker_and_asks_again_at_once_is_heard_again() -> None:
    scheduler = VirtualScheduler()
    breaker = Breaker(seconds=1.0, failures=1, stop=True)
    gate = Gate(breaker=breaker)
    for now in (0.0, 0.0, 2.0):
        breaker.fail(now)
    assert breaker.state == "open"
    asking = Persistent(gate, scheduler, times=3)
    asking.ask()
    scheduler.run()
    assert asking.turned_away_at == [0.0, 0.0, 0.0]
    assert gate.statistics().waiting == scheduler.pending == 0
