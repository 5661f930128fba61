"""Who may start now: the first, or one behind it that fits, or nobody before a time."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.errors import BreakerError, InvalidRequestError, QuotaExhaustedError
from rxllm.policies.accounting import GENERIC
from rxllm.policies.admission import LOOK, PASSES, Admission, Refused
from rxllm.policies.breaker import Breaker
from rxllm.policies.ledger import Ledger
from rxllm.policies.line import Line, Lines
from rxllm.policies.meters import meter
from rxllm.policies.opening import Opening
from rxllm.policies.quota import Quota


class Guest:
    """Somebody who waits."""

    def __init__(self, arrival: int, line: Line["Guest"], *amounts: float) -> None:
        self.arrival = arrival
        self.line = line
        self.amounts = amounts
        self.applicant: object = self
        self.passed = 0
        self.stuck = math.inf

    def __lt__(self, other: "Guest") -> bool:
        return self.arrival < other.arrival

    def __repr__(self) -> str:
        return f"<{self.arrival}: {self.amounts}>"


class Door:
    """An admission with its parts, and those who come."""

    def __init__(self, *quotas: Quota, **opening: object) -> None:
        self.lines: Lines[Guest] = Lines()
        self.line = self.lines.open("main", 1.0)
        self.ledger = Ledger(quotas, share=1.0, accounting=GENERIC, make=lambda quota, most: meter(quota, most=most))
        self.opening = Opening(**{"limit": None, "rate": None, **opening})  # type: ignore[arg-type]
        self.admission = Admission(self.lines, self.opening, self.ledger)
        self.in_flight = 0
        self.came = 0

    def come(self, *amounts: float) -> Guest:
        self.came += 1
        guest = Guest(self.came, self.line, *amounts)
        self.worth_a_look = self.admission.enter(guest)
        return guest

    def look(self, now: float) -> Guest | Refused[Guest] | float:
        return self.admission.look(self.in_flight, now)

    def start(self, guest: Guest, now: float) -> None:
        guest.applicant = None
        self.lines.left(self.line)
        self.ledger.book(guest.amounts, now)
        self.in_flight += 1


def tokens(limit: float, per: float = 1.0, **options: object) -> Quota:
    return Quota(limit, per=per, unit="tokens", margin=0.0, **options)  # type: ignore[arg-type]


def test_nothing_is_in_the_way_of_who_comes_first_until_a_limit_is() -> None:
    door = Door(tokens(10), limit=2)
    assert door.admission.obstacle((4.0,), 0, 0.0) is None
    assert door.admission.obstacle((4.0,), 2, 0.0) == "concurrency"
    door.ledger.book((8.0,), 0.0)
    assert door.admission.obstacle((4.0,), 0, 0.0) == "10 tokens per 1 seconds"
    assert door.admission.reason is None  # to ask is not to wait


def test_a_full_wire_is_waited_for_without_a_time() -> None:
    door = Door(limit=1)
    first = door.come()
    assert door.look(0.0) is first
    door.start(first, 0.0)
    door.come()
    assert (door.look(1.0), door.admission.reason, door.admission.full) == (math.inf, "concurrency", None)


def test_a_smaller_one_goes_before_a_first_that_does_not_fit_a_number_of_times() -> None:
    door = Door(tokens(1_000, per=3600.0))
    door.ledger.book((900.0,), 0.0)
    large = door.come(500.0)
    for _ in range(PASSES + 1):
        small = door.come(1.0)
        found = door.look(1.0)
        if large.passed <= PASSES and found is small:
            door.start(small, 1.0)
    assert large.passed == PASSES
    assert door.look(1.0) == pytest.approx(3600.0, abs=2.0)
    assert (door.admission.full, door.admission.reason) == (0, "1000 tokens per 3600 seconds")


def test_after_a_window_nobody_goes_before_one_that_does_not_fit() -> None:
    door = Door(tokens(10, per=5.0))
    door.ledger.book((8.0,), 0.0)
    large = door.come(9.0)
    assert door.look(1.0) == pytest.approx(5.0, abs=0.01)
    small = door.come(1.0)
    assert door.worth_a_look
    assert door.look(2.0) is small
    door.ledger.book((8.0,), 5.5)
    door.come(1.0)
    assert isinstance(door.look(6.1), float)
    assert large.passed == 1


def test_the_next_look_is_when_the_first_or_one_behind_it_may_fit() -> None:
    door = Door(tokens(10, per=60.0), Quota(1, per=3.0, unit="images", margin=0.0))
    door.ledger.book((10.0, 1.0), 0.0)
    door.come(5.0, 0.0)
    assert door.look(1.0) == pytest.approx(60.0, abs=0.1)
    door.come(0.0, 1.0)
    assert door.look(1.0) == pytest.approx(3.0, abs=0.01)


def test_only_so_many_behind_the_first_are_looked_at() -> None:
    door = Door(tokens(100, per=60.0), Quota(1, per=60.0, unit="images", margin=0.0))
    door.ledger.book((50.0, 1.0), 0.0)
    door.come(80.0, 0.0)
    for _ in range(LOOK):
        door.come(1.0, 1.0)
    door.come(1.0, 0.0)
    assert isinstance(door.look(0.0), float)
    assert not door.worth_a_look


def test_who_leaves_is_worth_a_look_if_another_one_is_the_first_then_or_comes_into_view() -> None:
    door = Door(tokens(10, per=60.0))
    door.ledger.book((10.0,), 0.0)
    first, second, third = (door.come(5.0) for _ in range(3))
    assert isinstance(door.look(0.0), float)
    second.applicant = None
    assert door.admission.leave(second)  # there is one more in view
    first.applicant = None
    assert door.admission.leave(first)
    assert door.lines.first() is third


def test_an_open_breaker_that_stops_refuses_all() -> None:
    breaker = Breaker(seconds=1.0, failures=1, stop=True)
    for now in (0.0, 0.0, 2.0):
        breaker.fail(now)
    door = Door(breaker=breaker)
    door.come()
    found = door.look(2.0)
    assert isinstance(found, Refused)
    assert (type(found.error), found.waiter) == (BreakerError, None)


def test_what_became_too_large_and_what_shall_not_wait_is_refused() -> None:
    door = Door(tokens(10, on_exhausted="fail"))
    door.ledger.book((8.0,), 0.0)
    guest = door.come(5.0)
    found = door.look(0.0)
    assert isinstance(found, Refused)
    assert (type(found.error), found.waiter) == (QuotaExhaustedError, guest)
    door.ledger.meters[0].rebase(1.0, None, 0.0, limit=4.0)
    found = door.look(0.0)
    assert isinstance(found, Refused)
    assert (type(found.error), found.waiter) == (InvalidRequestError, guest)


def test_nothing_is_left_of_a_queue_that_is_empty() -> None:
    door = Door(tokens(10))
    door.ledger.book((8.0,), 0.0)
    guest = door.come(5.0)
    door.look(0.0)
    guest.applicant = None
    door.admission.leave(guest)
    door.admission.rest()
    assert (door.admission.reason, door.admission.full, len(door.line.queue)) == (None, None, 0)


@given(
    limits=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    costs=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30),
)
def test_all_start_at_the_times_that_looks_name_and_no_window_is_over(
    limits: tuple[int, int], costs: list[tuple[int, int]]
) -> None:
    quotas = [
        Quota(limits[0], per=1.0, unit="tokens", margin=0.0),
        Quota(limits[1], per=3.0, unit="images", margin=0.0),
    ]
    door, now, looks = Door(*quotas), 0.0, 0
    starts: list[tuple[float, tuple[float, ...]]] = []
    for cost in costs:
        door.come(*map(float, cost))
    while door.lines.waiting:
        looks += 1
        found = door.look(now)
        assert not isinstance(found, Refused)
        if isinstance(found, Guest):
            door.start(found, now)
            starts.append((now, found.amounts))
        else:
            assert now < found < math.inf
            now = found
        assert looks <= 20 * len(costs)
    for number, quota in enumerate(quotas):
        for at, _ in starts:
            window = sum(amounts[number] for when, amounts in starts if at <= when < at + quota.per)
            assert window <= quota.limit
