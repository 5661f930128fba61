"""How a quota is shared out, in numbers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm.policies.quota import Quota
from rxllm.policies.sharing import at_most, kept_for, lease_life, part_of

QUOTAS = st.builds(
    Quota,
    st.floats(1, 1e6),
    per=st.floats(0.1, 1e5),
    unit=st.sampled_from(["requests", "tokens"]),
    strategy=st.sampled_from(["sliding", "fixed", "bucket"]),
)


@given(quota=QUOTAS)
def test_a_lease_lives_for_a_small_part_of_the_window_and_not_for_so_little_that_they_become_many(quota: Quota) -> None:
    life = lease_life(quota)
    assert 0 < life <= quota.window / 50
    assert life == pytest.approx(min(quota.window / 50, max(5.0, quota.window / 2_000)))


def test_a_lease_of_a_small_bucket_lives_for_a_part_of_the_time_in_which_that_fills() -> None:
    quota = Quota(60, per=60.0, strategy="bucket", burst=5, margin=0.0)
    assert lease_life(quota) == 5.0 / 50
    assert kept_for(quota) == quota.window


def test_what_was_spent_of_a_large_bucket_matters_until_that_is_full_again() -> None:
    quota = Quota(60, per=60.0, strategy="bucket", burst=300, margin=0.0)
    assert kept_for(quota) == 300.0
    assert (at_most(quota, 10.0), at_most(Quota(60, per=60.0), 10.0)) == (300.0, 10.0)


@pytest.mark.parametrize(
    ("quota", "limit", "burst"),
    [
        (Quota(100, per=60.0, unit="tokens"), 10.0, None),
        (Quota(100, per=60.0, unit="tokens", strategy="bucket", burst=50), 10.0, 5.0),
        (Quota(100, per=60.0), 10.0, None),
        (Quota(100, per=60.0, unit="tokens", strategy="bucket", burst=5), 10.0, 1.0),
        (Quota(5, per=60.0, strategy="bucket", burst=3), 1.0, 1.0),
    ],
    ids=["tokens", "tokens-of-a-bucket", "requests", "a-small-bucket", "at-least-one-request"],
)
def test_a_part_of_a_quota_is_one_of_its_numbers_and_at_least_one_request(
    quota: Quota, limit: float, burst: float | None
) -> None:
    part = part_of(quota, 0.1)
    assert (part.limit, part.burst, part.per) == (limit, burst, quota.per)


def test_the_whole_of_a_quota_is_the_quota() -> None:
    quota = Quota(5, per=60.0)
    assert part_of(quota, 1.0) is quota
