"""How many items a stage may start: a window, one more for those that are parked, and what it may hold."""

from hypothesis import given
from hypothesis import strategies as st

from rxllm.policies.places import Places

STEPS = st.lists(st.sampled_from(["park", "unpark"]) | st.integers(1, 9), max_size=40)


@given(
    window=st.integers(1, 9), spare=st.integers(0, 9), spares_window=st.booleans(), parking=st.booleans(), steps=STEPS
)
def test_a_parked_item_has_one_other_started_in_its_place_and_at_most_a_window_of_them(
    window: int,
    spare: int,
    spares_window: bool,
    parking: bool,
    steps: list[str | int],
) -> None:
    places = Places(window, spare=spare, spares_window=spares_window, parking=parking)
    parked = 0
    for step in steps:
        if isinstance(step, int):
            window = step
            places.set(window)
        elif step == "park":
            parked += 1
            places.park()
        elif step == "unpark" and parked:
            parked -= 1
            places.unpark()
        assert places.window == window
        assert places.in_progress == window + (min(parked, window) if parking else 0)
        assert places.started - places.in_progress == (max(spare, window) if spares_window else spare)


def test_a_window_of_none_lets_nothing_start_whoever_is_parked() -> None:
    places = Places(3, spare=2, spares_window=False, parking=True)
    places.park()
    places.set(0)
    assert places.in_progress == 0
    places.unpark()
    assert places.in_progress == 0
