from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.testing import _sharing
from rxllm.testing._sharing import Sharing

STEP = 1 / 64  # of the model


def model(jobs: list[tuple[int, int]], knee: int | None) -> list[int]:
    """Work through time in small steps; return the order of the ends as step numbers for each job."""
    left = {index: float(work) for index, (_, work) in enumerate(jobs)}
    ends = [0] * len(jobs)
    tick = 0
    while left:
        present = [index for index in left if jobs[index][0] <= tick * STEP]
        speed = 1.0 if knee is None or len(present) <= knee else knee / len(present)
        for index in present:
            left[index] -= speed * STEP
            if left[index] <= 1e-9:
                del left[index]
                ends[index] = tick + 1
        tick += 1
    return ends


@given(
    jobs=st.lists(st.tuples(st.integers(0, 8), st.integers(1, 5)), min_size=1, max_size=8),
    knee=st.one_of(st.none(), st.integers(1, 4)),
)
def test_jobs_end_when_a_step_by_step_simulation_says(jobs: list[tuple[int, int]], knee: int | None) -> None:
    sharing: Sharing[int] = Sharing(knee)
    ends: dict[int, float] = {}

    def advance(until: float) -> None:
        while (at := sharing.next_end()) is not None and at <= until:
            ends.update((index, at) for index in sharing.finished(at))
        ends.update((index, until) for index in sharing.finished(until))

    for index, (at, work) in sorted(enumerate(jobs), key=lambda job: job[1][0]):
        advance(at)
        sharing.add(at, work, index)
    advance(10_000)
    expected = model(jobs, knee)
    assert len(sharing) == 0
    for index, end in ends.items():
        assert abs(end - expected[index] * STEP) <= len(jobs) * STEP


def test_below_the_knee_nothing_slows_down_and_above_it_everything_does() -> None:
    sharing: Sharing[str] = Sharing(2)
    for name in "ab":
        sharing.add(0.0, 1.0, name)
    assert sharing.next_end() == 1.0
    for name in "cd":
        sharing.add(0.0, 1.0, name)
    assert sharing.next_end() == 2.0
    assert sharing.finished(1.99) == []
    assert sharing.finished(2.0) == ["a", "b", "c", "d"]


def test_a_late_look_finds_the_ends_in_order() -> None:
    sharing: Sharing[str] = Sharing(1)
    sharing.add(0.0, 2.0, "long")
    sharing.add(0.0, 1.0, "short")
    assert sharing.finished(100.0) == ["short", "long"]


def test_removed_jobs_speed_up_the_others_and_leave_no_heap_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_sharing, "COMPACT", 10)
    sharing: Sharing[int] = Sharing(1)
    keys = [sharing.add(0.0, 1.0, number) for number in range(100)]
    assert sharing.next_end() == 100.0
    for key in keys[1:]:
        assert sharing.remove(key) is not None
    assert sharing.remove(keys[1]) is None
    assert len(sharing._heap) <= 12
    assert sharing.next_end() == 1.0
    assert sharing.finished(1.0) == [0]
    assert sharing.next_end() is None


def test_a_changed_knee_counts_from_now() -> None:
    sharing: Sharing[str] = Sharing(1)
    sharing.add(0.0, 2.0, "a")
    sharing.add(0.0, 2.0, "b")
    sharing.finished(2.0)  # one second of work done for each
    sharing.knee = None
    assert sharing.next_end() == 3.0


@given(works=st.permutations(range(1, 31)), gone=st.permutations(range(1, 31)), left=st.integers(0, 14))
def test_whoever_is_left_after_removals_ends_in_the_order_of_the_work(
    works: list[int], gone: list[int], left: int
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_sharing, "COMPACT", 2)
        sharing: Sharing[int] = Sharing()
        keys = {work: sharing.add(0.0, work, work) for work in works}
        for work in gone[left:]:
            assert sharing.remove(keys.pop(work)) == work
        assert sharing.next_end() == min(keys, default=None)
        assert sharing.finished(100.0) == sorted(keys)
