"""The server's statements, against simulated servers that a second user uses too."""

import heapq
import itertools
import math
from collections.abc import Callable

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rxllm.policies.bucket import TokenBucket
from rxllm.policies.fixed import FixedWindow
from rxllm.policies.meters import Meter, meter
from rxllm.policies.others import Others
from rxllm.policies.quota import Quota, Strategy
from rxllm.policies.sliding import SlidingLog

LIMIT, PER, FORWARD = 16, 8.0, 0.5
STRATEGIES: tuple[Strategy, ...] = ("sliding", "fixed", "bucket")
Use = tuple[float, float]  # when it arrived, how much


class Server:
    """The whole history; what is left is computed from it each time, and may be below zero."""

    def __init__(self, strategy: Strategy, phase: float) -> None:
        self.strategy = strategy
        self.phase = phase
        self.history: list[Use] = []

    def window(self, now: float) -> float:
        return math.floor((now - self.phase) / PER) * PER + self.phase

    def remaining(self, now: float, history: list[Use] | None = None) -> float:
        uses = sorted(use for use in (self.history if history is None else history) if use[0] <= now)
        if self.strategy == "sliding":
            return LIMIT - sum(cost for at, cost in uses if now < at + PER)
        if self.strategy == "fixed":
            return LIMIT - sum(cost for at, cost in uses if at >= self.window(now))
        level, last = float(LIMIT), 0.0
        for at, cost in uses:
            level, last = min(LIMIT, level + (at - last) * LIMIT / PER) - cost, at
        return min(LIMIT, level + (now - last) * LIMIT / PER)

    def reset(self, now: float) -> float:
        if self.strategy == "fixed":
            return self.window(now) + PER - now
        if self.strategy == "sliding":
            return max((at + PER - now for at, _ in self.history if at <= now), default=0.0)
        return (LIMIT - self.remaining(now)) * PER / LIMIT


def new(strategy: Strategy, margin: float = FORWARD) -> Meter:
    return meter(Quota(LIMIT, per=PER, unit="tokens", strategy=strategy, margin=margin))


ticks = st.integers(0, 40).map(lambda n: n / 16)
attempts = st.tuples(
    ticks,  # after the one before
    st.integers(1, LIMIT),
    st.integers(0, 8).map(lambda n: n * FORWARD / 8),  # on its way
    ticks | st.integers(0, 80).map(lambda n: n / 8),  # at work
    st.integers(0, 8).map(lambda n: n / 8),  # when the headers are written: between arrival and answer
)
others = st.tuples(ticks, st.integers(1, LIMIT))


def run(strategy: Strategy, phase: float, ours: list[tuple[float, ...]], theirs: list[Use]) -> int:  # noqa: C901 - one story
    """Admit all that fits; at each arrival, nothing is over with what was known when it was admitted."""
    server, local = Server(strategy, phase), new(strategy)
    order = itertools.count()
    events: list[tuple[float, int, Callable[[float], None]]] = []
    booked: list[Use] = []  # when, how much
    own: list[Use] = []  # as they arrived
    foreign: list[Use] = []
    horizon = -math.inf  # the server has told its state of then
    admitted = 0

    def at(time: float, action: Callable[[float], None]) -> None:
        heapq.heappush(events, (time, next(order), action))

    def attempt(cost: float, forward: float, work: float, share: float) -> Callable[[float], None]:
        def admit(sent: float) -> None:
            nonlocal admitted
            if not local.fits(cost, sent):
                return
            local.book(cost, sent)
            admitted += 1
            mine = (sent, cost)
            booked.append(mine)
            known = horizon

            def arrive(now: float) -> None:
                own.append((now, cost))
                server.history.append((now, cost))
                seen = [*own, *(use for use in foreign if use[0] <= known)]
                assert server.remaining(now, seen) >= -1e-9

            def write(now: float) -> None:
                said = server.remaining(now), server.reset(now)

                def read(then: float) -> None:
                    nonlocal horizon
                    horizon = max(horizon, now)
                    pending = sum(c for start, c in booked if start >= sent - FORWARD) - cost
                    local.rebase(*said, then, pending=pending, sent=sent)

                at(sent + forward + work, read)

            at(sent + forward, arrive)
            at(sent + forward + work * share, write)

        return admit

    def use(cost: float) -> Callable[[float], None]:
        def act(now: float) -> None:
            foreign.append((now, cost))
            server.history.append((now, cost))

        return act

    time = 0.0
    for gap, *rest in ours:
        time += gap
        at(time, attempt(*rest))
    time = 0.0
    for gap, cost in theirs:
        time += gap
        at(time, use(cost))
    while events:
        now, _, action = heapq.heappop(events)
        action(now)
    return admitted


@pytest.mark.parametrize("strategy", STRATEGIES)
@settings(max_examples=300, deadline=None)
@given(st.floats(0, PER), st.lists(attempts, min_size=4, max_size=24), st.lists(others, max_size=10))
def test_nothing_is_over_with_what_is_known_of_others(
    strategy: Strategy, phase: float, ours: list[tuple[float, ...]], theirs: list[Use]
) -> None:
    run(strategy, phase, ours, theirs)


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(st.floats(0, PER), st.lists(st.tuples(ticks, st.integers(1, 8), st.booleans()), max_size=30))
def test_one_after_the_other_and_told_at_once_the_local_view_is_the_servers(
    strategy: Strategy, phase: float, uses: list[tuple[float, float, bool]]
) -> None:
    server, local, now = Server(strategy, phase), new(strategy, margin=0.0), 0.0
    for gap, cost, ours in uses:
        now += gap
        if ours and local.fits(cost, now):
            local.book(cost, now)
            server.history.append((now, cost))
        elif not ours:
            server.history.append((now, cost))
        local.rebase(server.remaining(now), server.reset(now), now, sent=now)
        assert local.available(now) <= server.remaining(now) + 1e-9
        if server.remaining(now) > 0 and strategy != "fixed":  # whose edge is known to the millisecond only
            assert local.available(now) >= min(server.remaining(now), LIMIT - local.booked(now)) - LIMIT / 1000


def test_a_grain_that_may_be_gone_at_the_server_is_not_counted_against_what_it_says() -> None:
    log = SlidingLog(LIMIT, PER, slots=6)  # a grain is two seconds
    log.book(4, 100.0)
    log.book(4, 101.0)  # in the same slot
    log.rebase(LIMIT - 8, None, 108.5, sent=108.5)  # four of ours, and four of others
    assert log.booked(108.5) == 8
    assert log.available(109.0) == LIMIT - 8


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_another_user_is_seen_and_forgotten_when_the_window_is_over(strategy: Strategy) -> None:
    local = new(strategy, margin=0.0)
    local.book(4, 100.0)
    local.rebase(2, 7.5, 100.0, sent=100.0)
    assert local.available(100.0) == 2
    assert not local.fits(3, 100.0)
    assert local.booked(100.0) == 4
    expiry = local.next_expiry(100.0)
    assert expiry is not None
    assert 100.0 < expiry <= 108.0
    ready = local.ready_at(LIMIT, 100.0)
    assert 104.0 < ready <= 108.0
    assert local.fits(LIMIT, ready)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_what_is_on_its_way_is_neither_forgotten_nor_counted_twice(strategy: Strategy) -> None:
    local = new(strategy, margin=0.0)
    for _ in range(4):
        local.book(2, 100.0)
    local.rebase(LIMIT - 2, None, 100.0, pending=6, sent=100.0)  # the server has counted the first only
    assert local.available(100.0) == LIMIT - 8
    local.rebase(LIMIT - 8, None, 100.0, pending=0, sent=100.0)  # and now all of them
    assert local.available(100.0) == LIMIT - 8


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_our_own_bookings_are_never_reduced(strategy: Strategy) -> None:
    local = new(strategy, margin=0.0)
    local.book(10, 100.0)
    local.rebase(LIMIT, None, 100.0, limit=10 * LIMIT, sent=100.0)
    assert local.available(100.0) == LIMIT - 10
    assert local.limit == LIMIT


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_statement_that_was_overtaken_does_not_loosen(strategy: Strategy) -> None:
    local = new(strategy, margin=0.0)
    local.rebase(3, None, 100.0, sent=99.0)
    local.rebase(9, None, 100.0, sent=99.5)  # perhaps older
    local.rebase(9, None, 100.0)
    assert local.available(100.0) == 3
    local.rebase(9, None, 100.0, sent=100.0)  # younger for sure
    assert local.available(100.0) == 9


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_left_says_only_how_much_is_missing_at_least(strategy: Strategy) -> None:
    local = new(strategy, margin=0.0)
    local.rebase(-5, None, 100.0, sent=100.0)
    local.rebase(0, None, 100.0, sent=100.0)
    assert local.available(100.0) == -5


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_lower_limit_of_the_server_holds_until_it_states_a_higher_one(strategy: Strategy) -> None:
    quota = Quota(LIMIT, per=PER, unit="tokens", strategy=strategy, margin=0.0)
    for most, highest in ((None, LIMIT), (math.inf, 4 * LIMIT)):
        local = meter(quota, most=most)
        local.rebase(4, None, 100.0, limit=4, sent=100.0)
        assert local.limit == local.available(100.0) == 4
        assert local.too_large(5)
        local.rebase(4 * LIMIT, None, 100.0, limit=4 * LIMIT, sent=100.0)
        assert local.limit == local.available(100.0) == highest


def test_who_takes_only_a_share_is_not_cut_by_others_that_leave_it() -> None:
    for strategy in STRATEGIES:
        local = new(strategy, margin=0.0)
        local.rebase(5 * LIMIT, None, 100.0, sent=100.0)  # of a server that admits ten times as much
        assert local.available(100.0) == LIMIT


statements = st.lists(
    st.tuples(st.integers(0, 9), st.integers(0, 4), st.integers(1, 12), st.integers(0, 6)), max_size=20
)


@given(statements)
@example([(9, 0, 12, 0), (3, 0, 12, 3), (5, 0, 12, 1)])
def test_others_are_the_most_that_no_later_statement_contradicts(said: list[tuple[int, int, int, int]]) -> None:
    known, now = Others(), 0
    arrived: list[tuple[int, int, int, int]] = []  # amount, until, sent, when
    for amount, gap, span, age in said:
        now += gap
        known.state(amount, now + span, now, now - age)
        arrived.append((amount, now + span, now - age, now))
        current = [a for n, a in enumerate(arrived) if not any(sent >= a[3] for _, _, sent, _ in arrived[n + 1 :])]
        assert known.at(now) >= max(amount for amount, until, *_ in current if now < until)
        assert known.at(now) <= max(amount for amount, *_ in arrived)
        known.forget(now)
        assert known.amount == known.at(now)
        assert now < known.until


def test_the_meters_are_what_the_strategies_name() -> None:
    assert [type(new(strategy)) for strategy in STRATEGIES] == [SlidingLog, FixedWindow, TokenBucket]


def test_what_a_fixed_window_may_have_forgotten_is_not_counted_against_what_it_says() -> None:
    window = FixedWindow(LIMIT, 8.0)
    window.book(9, 1.75)  # the window ended at 3.0, and then others came
    window.rebase(LIMIT - 9, 8.0, 8.25, sent=1.75)
    assert window.available(10.25) == LIMIT - 9
