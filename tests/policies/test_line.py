"""Lines before one door: by arrival in each, by weight between them."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.policies.line import Line, Lines


class Guest:
    """Somebody in a line."""

    def __init__(self, arrival: int, line: Line["Guest"], cost: float = 1.0) -> None:
        self.arrival = arrival
        self.line = line
        self.cost = cost
        self.applicant: object = self

    def __lt__(self, other: "Guest") -> bool:
        return self.arrival < other.arrival


class Door:
    """Lines, and a door that lets one in at a time."""

    def __init__(self, *weights: float) -> None:
        self.lines: Lines[Guest] = Lines()
        self.of = [self.lines.open(f"line {number}", weight) for number, weight in enumerate(weights)]
        self.arrivals = itertools.count()

    def come(self, number: int, cost: float = 1.0) -> Guest:
        guest = Guest(next(self.arrivals), self.of[number], cost)
        self.lines.enter(guest.line, guest)
        return guest

    def let_in(self) -> Guest:
        guest = self.lines.first()
        guest.applicant = None
        self.lines.left(guest.line)
        self.lines.charge(guest.line, guest.cost)
        return guest

    def leave(self, guest: Guest) -> None:
        guest.applicant = None
        self.lines.left(guest.line)


@given(
    weights=st.lists(st.floats(0.1, 10), min_size=2, max_size=4),
    costs=st.lists(st.floats(0.1, 5), min_size=4, max_size=4),
)
def test_lines_that_always_have_somebody_get_shares_by_weight_whatever_they_cost(
    weights: list[float], costs: list[float]
) -> None:
    door = Door(*weights)
    for number in range(len(weights)):
        door.come(number, costs[number])
    got = [0.0] * len(weights)
    for _ in range(400):
        guest = door.let_in()
        number = door.of.index(guest.line)
        got[number] += guest.cost
        door.come(number, costs[number])
    # at any time the shares differ from the ideal by less than one start of each
    for one, other in itertools.combinations(range(len(weights)), 2):
        slack = costs[one] / weights[one] + costs[other] / weights[other]
        assert abs(got[one] / weights[one] - got[other] / weights[other]) <= slack * 1.0001


def test_a_line_that_was_empty_has_saved_nothing_up() -> None:
    door = Door(1.0, 1.0)
    for _ in range(100):
        door.come(0)
        door.let_in()
    for _ in range(10):
        door.come(0)
        door.come(1)
    assert [door.of.index(door.let_in().line) for _ in range(8)].count(1) == 4


def test_a_line_that_stands_alone_is_not_held_back_and_owes_nothing_afterwards() -> None:
    door = Door(1.0, 100.0)
    for _ in range(50):
        door.come(0)
    for _ in range(30):
        assert door.let_in().line is door.of[0]
    door.come(1)
    assert door.of[1] in {door.let_in().line for _ in range(2)}


@given(events=st.lists(st.tuples(st.sampled_from(["come", "leave", "next"]), st.integers(0, 2)), max_size=80))
def test_in_a_line_the_first_goes_first_and_those_that_are_gone_are_never_chosen(
    events: list[tuple[str, int]],
) -> None:
    door = Door(1.0, 2.0, 0.5)
    model: list[list[Guest]] = [[], [], []]
    for event, number in events:
        if event == "come":
            model[number].append(door.come(number))
        elif event == "leave" and model[number]:
            door.leave(model[number].pop(len(model[number]) // 2))
        elif event == "next" and any(model):
            guest = door.let_in()
            assert model[door.of.index(guest.line)].pop(0) is guest
        assert door.lines.waiting == sum(map(len, model))
        assert {id(guest) for guest in door.lines.all()} == {id(guest) for line in model for guest in line}


def test_one_that_came_earlier_takes_its_place_again() -> None:
    door = Door(1.0)
    first, second = door.come(0), door.come(0)
    assert door.let_in() is first
    first.applicant = first
    assert door.lines.enter(first.line, first)
    assert [door.let_in(), door.let_in()] == [first, second]


def test_those_behind_come_in_their_order_and_of_several_lines_one_each_in_turn() -> None:
    door = Door(1.0, 1.0, 1.0)
    head, behind, gone, last, third = (door.come(number) for number in (0, 0, 0, 0, 2))
    second = door.come(1)
    door.lines.charge(door.of[1], 5.0)
    door.leave(gone)
    assert list(door.lines.others(head, head.line)) == [behind, third, second, last]


def test_a_line_of_the_same_name_is_the_same_with_another_weight() -> None:
    lines: Lines[Guest] = Lines()
    line = lines.open("one", 1.0)
    assert lines.single
    assert lines.open("one", 3.0) is line
    assert line.weight == 3.0
    lines.open("two", 1.0)
    assert not lines.single


@pytest.mark.parametrize("gone", [50, 500])
def test_those_that_are_gone_do_not_stay_when_they_are_many(gone: int) -> None:
    door = Door(1.0)
    guests = [door.come(0) for _ in range(gone + 1)]
    for guest in guests[1:]:
        door.leave(guest)
        guest.line.sweep()
    assert len(door.of[0].queue) <= 34
