"""The controller against servers of a few lines, in virtual time. The lab in benchmarks/ has the figures."""

import heapq
import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rxllm.errors import ConfigError
from rxllm.messages import Kind, Setting, Signal
from rxllm.policies.follow import PaceAndFollow, pace_and_follow

Accepts = Callable[[float, int], bool]  # time, in service -> whether one more is accepted


def bucket(rate: Callable[[float], float], seconds: float = 1.0) -> Accepts:
    level, at = max(1.0, rate(0.0) * seconds), 0.0

    def accepts(now: float, serving: int) -> bool:
        nonlocal level, at
        level = min(max(1.0, rate(now) * seconds), level + (now - at) * rate(now))
        at = now
        if level < 1:
            return False
        level -= 1
        return True

    return accepts


class World:
    """An endless backlog before a gate that keeps a limit and an even pace, and a server."""

    def __init__(
        self,
        accepts: Accepts,
        *,
        knee: float = math.inf,
        fault: Callable[[float], float] = lambda now: 0.0,
        tokens: bool = True,
        hint: float | None = None,
        mean: float = 2.0,
        seed: int = 1,
    ) -> None:
        self.machine = PaceAndFollow()
        self.setting: Setting = self.machine.initial
        self.history: list[tuple[float, Setting]] = []
        self.accepted: list[float] = []
        self.refused: list[float] = []
        self.now = 0.0
        self._accepts, self._knee, self._fault, self._tokens, self._hint = accepts, knee, fault, tokens, hint
        self._random = random.Random(seed)
        self._mean = mean
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._in_flight = self._serving = self._epoch = 0
        self._next = 0.0
        self._looking = math.inf

    def run(self, until: float) -> None:
        self._pump()
        while self._events and self._events[0][0] <= until:
            self.now, _, action = heapq.heappop(self._events)
            action()
            self._pump()
        self.now = until

    def rate(self, start: float, end: float) -> float:
        return sum(start <= at < end for at in self.accepted) / (end - start)

    def refusals(self, start: float, end: float) -> float:
        refused = sum(start <= at < end for at in self.refused)
        return refused / max(1, refused + sum(start <= at < end for at in self.accepted))

    def _at(self, at: float, action: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (at, self._count, action))

    def _pump(self) -> None:
        assert self.setting.limit is not None
        assert self.setting.rate is not None
        while self._in_flight < self.setting.limit:
            if self._next > self.now:
                if self._next < self._looking or self._looking <= self.now:
                    self._looking = self._next
                    self._at(self._next, lambda: None)
                return
            self._next = max(self._next, self.now - 0.001) + 1 / self.setting.rate
            self._start()

    def _start(self) -> None:
        self._in_flight += 1
        began, in_flight, epoch = self.now, self._in_flight, self._epoch

        def tell(kind: Kind, tokens: float = 0.0) -> None:
            self._in_flight -= 1
            self._tell(
                kind, in_flight, epoch, began=began, tokens=tokens, hint=self._hint if kind == "refused" else None
            )

        self._tell("start", in_flight, epoch, began=began)
        if not self._accepts(self.now, self._serving):
            self.refused.append(self.now)
            self._at(self.now + self._random.uniform(0.05, 0.3), lambda: tell("refused"))
            return
        self.accepted.append(self.now)
        if self._random.random() < self._fault(self.now):
            self._at(self.now + 0.1, lambda: tell("fault"))
            return
        self._serving += 1
        work = self._random.lognormvariate(math.log(self._mean) - 0.16, 0.57)

        def finish() -> None:
            self._serving -= 1
            tell("ok", 50 * work if self._tokens else 0.0)

        self._at(self.now + work * max(1.0, self._serving / self._knee), finish)

    def _tell(
        self, kind: Kind, in_flight: int, epoch: int, *, began: float, tokens: float = 0.0, hint: float | None = None
    ) -> None:
        seconds = 0.0 if kind == "start" else self.now - began
        self._heed(
            self.machine.on_signal(
                Signal(
                    at=self.now,
                    kind=kind,
                    in_flight=in_flight,
                    epoch=epoch,
                    seconds=seconds,
                    tokens=tokens,
                    binding=True,
                    retry_after=hint,
                )
            )
        )

    def _heed(self, setting: Setting | None) -> None:
        if setting is not None:
            assert setting != self.setting
            self.setting = setting
            self._epoch += 1
            self.history.append((self.now, setting))
        due = self.machine.due
        if due is not None:
            assert due > self.now
            self._at(due, self._look)

    def _look(self) -> None:
        due = self.machine.due
        if due is not None and due <= self.now:
            self._heed(self.machine.on_timer(self.now))


def always(_now: float, _serving: int) -> bool:
    return True


@pytest.mark.parametrize("rate", [2.0, 30.0, 200.0])
@pytest.mark.parametrize("hint", [None, 0.0], ids=["no-hint", "a-hint-of-0-s"])
def test_it_finds_a_rate_and_keeps_it_with_few_refusals(rate: float, hint: float | None) -> None:
    world = World(bucket(lambda now: rate), hint=hint)
    world.run(240)
    assert world.rate(60, 240) > 0.93 * rate
    assert world.refusals(60, 240) < 0.03


@pytest.mark.parametrize(
    "accepts",
    [lambda: bucket(lambda now: 30.0), lambda: lambda now, serving: serving < 30],
    ids=["a-rate", "a-ceiling"],
)
def test_what_a_hint_says_changes_nothing(accepts: Callable[[], Accepts]) -> None:
    worlds = [World(accepts(), hint=hint) for hint in (None, 89.0)]
    for world in worlds:
        world.run(200)
    assert worlds[0].history == worlds[1].history
    assert worlds[0].refused


def test_a_hint_of_89_s_does_not_stop_it() -> None:
    world = World(bucket(lambda now: 30.0), hint=89.0)
    world.run(300)
    assert world.rate(60, 300) > 0.85 * 30
    assert world.refusals(60, 300) < 0.01


def test_it_follows_a_rate_down_within_15_s_and_up_within_40_s() -> None:
    world = World(bucket(lambda now: 8.0 if 150 <= now < 300 else 30.0))
    world.run(420)
    assert 7 < world.rate(165, 290) < 8.5
    assert world.refusals(165, 290) < 0.04
    assert world.rate(340, 420) > 0.9 * 30


def test_of_a_window_that_is_used_up_it_learns_what_it_grants_in_all() -> None:
    accepted: list[float] = []

    def accepts(now: float, _serving: int) -> bool:
        if sum(at > now - 20 for at in accepted[-200:]) >= 200:
            return False
        accepted.append(now)
        return True

    world = World(accepts)
    world.run(200)
    assert world.rate(40, 200) > 0.9 * 10
    assert world.refusals(40, 200) < 0.02


def test_a_burst_that_uses_up_what_a_minute_has_saved_costs_little_until_the_rate_is_known() -> None:
    world = World(bucket(lambda now: 10.0, 60.0))
    world.run(60)
    assert 8.5 < world.rate(30, 60) < 11.5
    assert len(world.refused) < 90


def test_a_first_refusal_by_a_ceiling_is_not_taken_for_the_end_of_a_quota() -> None:
    world = World(lambda now, serving: serving < 40)
    world.run(30)
    assert {setting.reason for _, setting in world.history} >= {"refused", "no more room"}
    assert world.setting.limit in (39, 40, 41)
    assert len(world.refused) < 20


def test_it_finds_a_ceiling_and_keeps_to_it_nearly_without_refusals() -> None:
    world = World(lambda now, serving: serving < 40)
    world.run(200)
    assert world.setting.limit in (40, 41)
    assert world.setting.rate is not None
    assert world.setting.rate > 2.7 * 40 / 2
    assert world.rate(60, 200) > 0.93 * 40 / 2
    assert world.refusals(60, 200) < 0.01


def test_it_follows_a_ceiling_down_and_up() -> None:
    world = World(lambda now, serving: serving < (12 if 100 <= now < 200 else 40))
    world.run(199)
    assert world.setting.limit in (11, 12, 13)
    world.run(320)
    assert world.rate(260, 320) > 0.85 * 40 / 2


@pytest.mark.parametrize("tokens", [True, False], ids=["tokens-are-known", "tokens-are-not-known"])
def test_it_stops_where_the_goodput_stops_growing_although_nothing_is_refused(tokens: bool) -> None:
    world = World(always, knee=40, tokens=tokens)
    world.run(300)
    widths = [setting.limit or 0 for at, setting in world.history if at > 60] or [world.setting.limit or 0]
    assert 0.6 * 40 < sum(widths) / len(widths) < 1.8 * 40
    assert world.rate(100, 300) > 0.85 * 40 / 2


def test_ten_times_longer_answers_do_not_make_it_narrower() -> None:
    world = World(always, knee=40)
    world.run(100)
    world._mean *= 10
    world.run(400)
    limits = [setting.limit for at, setting in world.history if at > 150 and setting.limit is not None]
    assert min([world.setting.limit or 0, *limits]) >= 30


def test_of_a_rate_the_width_follows_when_answers_become_longer() -> None:
    world = World(bucket(lambda now: 20.0))
    world.run(100)
    world._mean *= 8
    world.run(180)
    assert world.rate(140, 180) > 0.9 * 20


def test_before_it_is_due_the_timer_does_nothing() -> None:
    machine = PaceAndFollow(limit=60)
    assert machine.on_timer(1.0) is None
    for number in range(40):
        machine.on_signal(Signal(at=number / 10, kind="start", in_flight=number + 1, epoch=0, binding=True))
    machine.on_signal(Signal(at=4.2, kind="refused", in_flight=40, epoch=0, seconds=0.3))
    passed = 9.2  # when the trial of the ceiling is over
    for number in range(43, 92):
        at = number / 10
        machine.on_signal(Signal(at=at, kind="start", in_flight=39, epoch=1, binding=True))
        if machine.due is not None and machine.due <= at:
            assert machine.on_timer(at) is None
    due = machine.due
    assert due is not None
    assert due > passed + 0.05
    assert machine.on_timer(passed + 0.05) is None
    assert machine.due == due
    setting = machine.on_timer(due)
    assert setting is not None
    assert setting.limit == 40


def test_unrelated_faults_do_not_slow_it() -> None:
    world = World(bucket(lambda now: 30.0), fault=lambda now: 0.05)
    world.run(200)
    assert world.rate(60, 200) > 0.93 * 30


def test_a_server_that_is_down_is_not_asked_faster_and_faster() -> None:
    accepts = bucket(lambda now: 30.0)
    world = World(
        lambda now, serving: 100 <= now < 300 or accepts(now, serving),
        fault=lambda now: 1.0 if 100 <= now < 300 else 0.0,
    )
    world.run(100)
    before = world.setting.rate
    assert before is not None
    world.run(300)
    assert world.setting.rate is not None
    assert world.setting.rate < 1.3 * before


def test_while_nothing_is_accepted_it_goes_on_to_probe_and_comes_back_by_itself() -> None:
    world = World(lambda now, serving: not 100 <= now < 160 and serving < 30)
    world.run(400)
    tried = [at for at in world.refused if 120 <= at < 160]
    assert 10 <= len(tried) <= 80
    assert max(later - earlier for earlier, later in pairwise(tried)) < 8
    assert world.rate(200, 400) > 0.7 * 15


def test_a_refusal_of_what_began_before_the_last_cut_says_nothing_new() -> None:
    machine = PaceAndFollow(limit=60)
    for number in range(40):
        machine.on_signal(Signal(at=number / 10, kind="start", in_flight=number + 1, epoch=0, binding=True))
    cut = machine.on_signal(Signal(at=4.0, kind="refused", in_flight=40, epoch=0, seconds=0.1))
    assert cut is not None
    assert cut.limit == 39
    assert machine.on_signal(Signal(at=4.1, kind="refused", in_flight=38, epoch=0, seconds=0.2)) is None
    again = machine.on_signal(Signal(at=4.2, kind="refused", in_flight=38, epoch=1, seconds=0.1))
    assert again is not None
    assert again.limit == 37


@pytest.mark.parametrize(("kind", "grows"), [("ok", True), ("invalid", True), ("fatal", False), ("fault", False)])
def test_only_answers_make_it_wider(kind: Kind, grows: bool) -> None:
    machine = PaceAndFollow()
    limits = [20]
    for number in range(60):
        machine.on_signal(Signal(at=number / 10, kind="start", in_flight=20, epoch=0, binding=True))
        end = Signal(at=number / 10, kind=kind, in_flight=20, epoch=0, seconds=0.05, tokens=50.0, binding=True)
        setting = machine.on_signal(end)
        if setting is not None and setting.limit is not None:
            limits.append(setting.limit)
    assert (max(limits) > 20) is grows
    assert min(limits) == 20


def test_when_nothing_starts_any_more_it_wants_no_timer() -> None:
    machine = pace_and_follow()
    assert machine.due is None
    machine.on_signal(Signal(at=5.0, kind="start", in_flight=1, epoch=0))
    assert machine.due == 5.5
    while machine.due is not None and machine.due < 100:
        machine.on_timer(machine.due)
    assert machine.due is None
    machine.on_signal(Signal(at=200.0, kind="start", in_flight=1, epoch=0))
    assert machine.due == 200.5


steps = st.lists(
    st.tuples(
        st.sampled_from(
            ["start", "start", "start", "ok", "refused", "overloaded", "fault", "fatal", "invalid", "timer"]
        ),
        st.integers(0, 2**12),  # 1024ths of a second since the one before
        st.integers(0, 2**14),  # on the wire
        st.integers(1, 5000),  # in flight
        st.integers(0, 5),  # settings ago
        st.booleans(),
        st.sampled_from([None, 0.0, 0.5, 89.0]),
        st.sampled_from([0.0, 1.0, 1e6]),
    ),
    max_size=300,
)


def play(played: list[tuple[str, int, int, int, int, bool, float | None, float]], origin: float) -> list[Setting]:
    machine = PaceAndFollow(most=3000)
    found: list[Setting] = []
    now = origin
    for kind, gap, wire, in_flight, ago, binding, hint, tokens in played:
        now += gap / 1024
        if kind == "timer":
            due = machine.due
            setting = machine.on_timer(now)
            if due is not None and due <= now:
                assert machine.due is None or machine.due > now
        else:
            setting = machine.on_signal(
                Signal(
                    at=now,
                    kind=kind,  # type: ignore[arg-type]
                    in_flight=in_flight,
                    epoch=max(0, len(found) - ago),
                    seconds=0.0 if kind == "start" else wire / 1024,
                    tokens=tokens if kind in ("ok", "invalid") else 0.0,
                    binding=binding,
                    retry_after=hint if kind in ("refused", "overloaded") else None,
                )
            )
        if setting is not None:
            found.append(setting)
            assert setting.limit is not None
            assert 1 <= setting.limit <= 3000
            assert setting.rate is not None
            assert 0 < setting.rate <= 1e6
            assert setting.reason
    return found


@settings(max_examples=300)
@given(steps)
def test_settings_are_within_their_bounds_and_the_timer_is_ahead_whatever_happens(
    played: list[tuple[str, int, int, int, int, bool, float | None, float]],
) -> None:
    play(played, 0.0)


@given(steps, st.integers(-(2**20), 2**20))
def test_decisions_do_not_depend_on_the_origin_of_time(
    played: list[tuple[str, int, int, int, int, bool, float | None, float]], origin: int
) -> None:
    assert play(played, 0.0) == play(played, float(origin))


@given(steps)
def test_what_the_server_took_never_slows_the_pace(
    played: list[tuple[str, int, int, int, int, bool, float | None, float]],
) -> None:
    taken = [step for step in played if step[0] not in ("refused", "overloaded")]
    rates = [10.0, *(setting.rate or 0.0 for setting in play(taken, 0.0))]
    assert all(before <= after for before, after in pairwise(rates))


@given(steps)
def test_what_no_further_try_cures_changes_nothing(
    played: list[tuple[str, int, int, int, int, bool, float | None, float]],
) -> None:
    machine = PaceAndFollow()
    for number, (_, gap, wire, *_rest) in enumerate(played):
        signal = Signal(at=float(number + gap), kind="fatal", in_flight=1, epoch=0, seconds=wire / 1024)
        assert machine.on_signal(signal) is None
    assert machine.due is None


@pytest.mark.parametrize("wrong", [{"limit": 0}, {"rate": 0}, {"rate": math.inf}, {"most": 5}], ids=str)
def test_a_value_out_of_its_bounds_is_refused_by_its_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=f"^{next(iter(wrong))} must be"):
        pace_and_follow(**wrong)  # type: ignore[arg-type]
