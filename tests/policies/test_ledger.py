"""The quotas of a key as one: booked in all or in none, and corrected by what the server says."""

import pytest

from rxllm.errors import ConfigError, InvalidRequestError, QuotaExhaustedError
from rxllm.policies.accounting import GENERIC, VLLM
from rxllm.policies.headers import Limits, Truth
from rxllm.policies.ledger import Ledger
from rxllm.policies.meters import meter
from rxllm.policies.quota import Quota


def ledger(*quotas: Quota | str, share: float = 1.0, accounting=GENERIC) -> Ledger:
    given = [Quota(quota) if isinstance(quota, str) else quota for quota in quotas]
    return Ledger(given, share=share, accounting=accounting, make=lambda quota, most: meter(quota, most=most))


def available(book: Ledger, now: float) -> list[float]:
    return [one.available for one in book.statistics(now)]


def test_a_cost_is_booked_in_all_quotas_and_settled_in_those_that_it_says() -> None:
    book = ledger("10/minute", "1000 tokens/minute")
    amounts = book.amounts({"requests": 1, "tokens": 300})
    assert book.full(amounts, 0.0) is None
    tickets = book.book(amounts, 0.0)
    assert available(book, 0.0) == [9.0, 700.0]
    book.settle(amounts, tickets, "answered", {"tokens": 50.0}, 1.0, sent=0.0)
    assert available(book, 1.0) == [9.0, 950.0]


def test_the_first_quota_without_room_is_named() -> None:
    book = ledger("10/minute", "1000 tokens/minute")
    book.book(book.amounts({"tokens": 800}), 0.0)
    assert book.full(book.amounts({"tokens": 300}), 0.0) == 1


@pytest.mark.parametrize(
    ("cost", "kind", "message"),
    [
        ({"requests": 1}, ConfigError, "counts tokens, and the cost names only requests"),
        ({"tokens": -1.0}, ConfigError, "the cost in tokens must be a finite number >= 0"),
        ({"tokens": float("nan")}, ConfigError, "the cost in tokens must be a finite number >= 0"),
        ({"tokens": 1001}, InvalidRequestError, "needs 1,001 tokens, and the quota .* never admits more than 1,000"),
    ],
)
def test_a_bad_cost_is_named(cost: dict[str, float], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        ledger("10/minute", "1000 tokens/minute").amounts(cost)


def test_who_does_not_fit_waits_unless_the_quota_says_otherwise() -> None:
    book = ledger("1/hour", Quota(1, per=60.0, margin=0.0, on_exhausted="fail"))
    book.book((1.0, 1.0), 0.0)
    assert book.refusal(0, 1.0, 10.0) is None
    error = book.refusal(1, 1.0, 10.0)
    assert isinstance(error, QuotaExhaustedError)
    assert error.retry_after == pytest.approx(50.0)


def test_a_quota_charged_at_the_end_frees_what_was_reserved_however_it_ended() -> None:
    book = ledger(Quota(2, per=10.0, margin=0.0, charged_at="end"))
    tickets = [book.book((1.0,), 0.0) for _ in range(2)]
    assert book.full((1.0,), 100.0) == 0  # both are on the wire for ever
    book.settle((1.0,), tickets[0], "answered", None, 100.0, sent=0.0)
    assert book.full((1.0,), 109.0) == 0
    assert book.full((1.0,), 110.1) is None
    book.settle((1.0,), tickets[1], "unsent", None, 111.0, sent=0.0)
    assert available(book, 111.0) == [2.0]


def test_refused_requests_may_cost_nothing_as_a_preset_says() -> None:
    for accounting, left in ((GENERIC, 9.0), (VLLM, 10.0)):
        book = ledger("10/minute", accounting=accounting)
        tickets = book.book((1.0,), 0.0)
        book.settle((1.0,), tickets, "refused", None, 1.0, sent=0.0)
        assert available(book, 1.0) == [left]


def test_the_scarcest_quota_weighs_a_cost() -> None:
    assert ledger().weigh(()) == 1.0
    book = ledger("10/second", "1000 tokens/minute")
    assert book.weigh((1.0, 100.0)) == pytest.approx(6.0)
    assert book.weigh((10.0, 10.0)) == pytest.approx(1.0)


def test_a_share_is_of_each_quota_and_of_its_burst() -> None:
    book = ledger(Quota(100, per=60.0, unit="tokens", strategy="bucket", burst=10), "1/minute", share=0.25)
    assert [(quota.limit, quota.burst) for quota in book.quotas] == [(25.0, 2.5), (1.0, None)]


def full(book: Ledger, now: float) -> None:
    for _ in range(10):
        book.book((1.0,), now)


def test_a_margin_grows_to_the_jitter_that_replies_show() -> None:
    book = ledger("10 requests per 10 seconds")
    full(book, 0.0)
    for path in (0.02, 0.32):
        book.observe(Limits(processing=1.0), 0.0, 1.0 + path)
    assert book.full((1.0,), 10.06) == 0
    assert book.full((1.0,), 10.29) == 0
    assert book.full((1.0,), 10.31) is None


def test_a_margin_grows_when_something_is_refused_that_had_room() -> None:
    book = ledger("10 requests per 10 seconds")
    full(book, 0.0)
    book.settle((1.0,), [(0, 1.0)], "refused", None, 0.1, sent=0.0)
    assert book.full((1.0,), 10.06) == 0
    assert book.full((1.0,), 10.08) is None


@pytest.mark.parametrize("case", ["stated", "others", "room"])
def test_a_margin_stays_when_it_is_stated_or_something_else_explains_the_refusal(case: str) -> None:
    book = ledger(Quota(10, per=10.0, margin=0.05 if case == "stated" else None))
    for _ in range(10 if case == "stated" else 4):
        book.book((1.0,), 0.0)
    if case == "others":
        book.observe(Limits((Truth(unit="requests", limit=10.0, remaining=0.0, reset=10.0, window=10.0),)), 0.0, 0.0)
    book.settle((1.0,), [(0, 1.0)], "refused", None, 0.1, sent=0.0)
    assert book._jitter == 0.0
    assert book.full((10.0,), 20.06) is None


def test_what_was_learned_begins_anew_with_the_rest() -> None:
    book = ledger("10/minute")
    book.observe(Limits((Truth(unit="tokens", limit=100.0, remaining=40.0, reset=30.0, window=None),)), 0.0, 0.0)
    assert available(book, 0.0) == [10.0, pytest.approx(40.0)]
    book.renew()
    assert available(book, 0.0) == [10.0, 100.0]


def test_the_fill_of_a_bucket_is_of_what_it_holds() -> None:
    book = ledger(Quota(100, per=60.0, strategy="bucket", burst=10, margin=0.0), Quota(0, per=1.0, unit="tokens"))
    assert list(book.fill(0.0).values()) == [0.0, 1.0]
    book.book((5.0, 0.0), 0.0)
    assert next(iter(book.fill(0.0).values())) == pytest.approx(0.5)


def test_refusals_for_other_reasons_do_not_widen_a_margin_without_end() -> None:
    book = ledger("10 requests per 10 seconds")
    for second in range(50):
        full(book, 20.0 * second)
        book.settle((1.0,), [(-5, 1.0)], "refused", None, 20.0 * second + 1, sent=20.0 * second)
    assert 0.05 < book._jitter <= 0.15


def test_a_small_part_of_a_small_bucket_still_holds_a_request() -> None:
    quota = Quota(100, per=60.0, strategy="bucket", burst=5)
    ledger = Ledger([quota], share=0.1, accounting=GENERIC, make=lambda quota, most: meter(quota, most=most))
    assert (ledger.quotas[0].limit, ledger.quotas[0].burst) == (10.0, 1.0)
    assert ledger.full(ledger.amounts({}), 0.0) is None
