import math
import pickle
import re

import limits
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from limits.util import EXPR

from rxllm.errors import ConfigError
from rxllm.policies.quota import Quota, parse_quotas

PERIODS = ("second", "minute", "hour", "day", "month", "year")


@st.composite
def foreign_texts(draw: st.DrawFn) -> str:
    """Texts of the grammar of `limits`, with all its freedoms."""
    space = st.sampled_from(["", " ", "  ", "\t", "\n"])

    def one() -> str:
        amount = draw(st.integers(0, 10**12))
        every = draw(st.sampled_from(["/", "per", "PER", " per "]))
        multiple = draw(st.none() | st.integers(0, 1000))
        period = draw(st.sampled_from(PERIODS)) + draw(st.sampled_from(["", "s"]))
        period = draw(st.sampled_from([period, period.upper(), period.title()]))
        parts = [str(amount), every, "" if multiple is None else str(multiple), period]
        return draw(space).join(["", *parts, ""])

    return draw(st.sampled_from([",", ";", "|", ":;"])).join(one() for _ in range(draw(st.integers(1, 4))))


def compare_with_limits(text: str) -> None:
    theirs = [(item.amount, item.get_expiry()) for item in limits.parse_many(text)]
    assert [(quota.limit, quota.per) for quota in parse_quotas(text)] == theirs
    assert all(quota.unit == "requests" for quota in parse_quotas(text))


@given(foreign_texts())
def test_what_limits_reads_we_read_the_same(text: str) -> None:
    compare_with_limits(text)


@settings(max_examples=25)  # most of the time is the making of the texts
@given(st.from_regex(EXPR))
def test_what_the_expression_of_limits_matches_we_read_or_refuse_as_limits_does(text: str) -> None:
    try:
        limits.parse_many(text)
    except ValueError:
        try:
            parse_quotas(text)  # ours is a superset: "sec" is a period
        except ConfigError as error:
            assert repr(text) in str(error)  # noqa: PT017 - it may also be read
    else:
        compare_with_limits(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("10/0.1 seconds", (10, 0.1, "requests")),
        ("90_000/minute", (90_000, 60, "requests")),
        ("90_000 tokens/minute", (90_000, 60, "tokens")),
        ("10 per hour", (10, 3600, "requests")),
        ("10perhour", (10, 3600, "requests")),
        ("10 per5hours", (10, 18_000, "requests")),
        ("5/2 minutes", (5, 120, "requests")),
        ("500 requests/minute", (500, 60, "requests")),
        ("1 request/sec", (1, 1, "requests")),
        ("2 Token / Min", (2, 60, "tokens")),
        ("1_000 tokens per 10 seconds", (1000, 10, "tokens")),
        ("1_000 tokens per10 seconds", (1000, 10, "tokens")),
        ("2.5 usd/week", (2.5, 604_800, "usd")),
        ("1e6 input_tokens/day", (1e6, 86_400, "input_tokens")),
        ("1.5E-1 usd/1e1 secs", (0.15, 10, "usd")),
        ("10 permits/hour", (10, 3600, "permits")),
        ("10 perhours/hour", (10, 3600, "perhours")),
        ("7 u2 per month", (7, 2_592_000, "u2")),
        ("1/year", (1, 31_104_000, "requests")),
        ("0/minute", (0, 60, "requests")),
    ],
)
def test_a_text_says_limit_seconds_and_unit(text: str, expected: tuple[float, float, str]) -> None:
    quota = Quota(text)
    assert (quota.limit, quota.per, quota.unit) == expected
    assert type(quota.limit) is type(quota.per) is float
    assert parse_quotas(text) == (quota,)


def test_several_are_read_in_order() -> None:
    assert parse_quotas(" 500/minute;90_000 tokens/minute, 1 usd per day|2/hour ") == (
        Quota(500, per=60),
        Quota(90_000, per=60, unit="tokens"),
        Quota(1, per=86_400, unit="usd"),
        Quota(2, per=3600),
    )


@pytest.mark.parametrize(
    ("text", "expected", "place"),
    [
        ("", "a number", "the end"),
        ("  ", "a number", "the end"),
        ("tokens/minute", "a number", "'tokens/minute'"),
        ("-5/minute", "a number", "'-5/minute'"),
        ("5/minute;", "a number", "the end"),
        ("5/minute;;6/minute", "a number", "';6/minute'"),
        ("90,000/minute", "'/' or 'per'", "',000/minute'"),
        ("5", "'/' or 'per'", "the end"),
        ("1__0/minute", "'/' or 'per'", "'__0/minute'"),
        ("200k/minute", "'/' or 'per'", "'k/minute'"),
        ("500 every minute", "'/' or 'per'", "'every minute'"),
        ("5 super hour", "'/' or 'per'", "'super hour'"),
        ("5 input tokens/minute", "'/' or 'per'", "'input tokens/minute'"),
        ("5/", "second, minute, hour, day, week, month or year", "the end"),
        ("5/fortnight", "second, minute, hour, day, week, month or year", "'fortnight'"),
        ("5/secondss", "second, minute, hour, day, week, month or year", "'secondss'"),
        ("5 per per hour", "second, minute, hour, day, week, month or year", "'per hour'"),
        ("5 tokens/3", "second, minute, hour, day, week, month or year", "'3'"),
        ("1/second; 5/minute now", "the end, or ';'", "'now'"),
        ("5/minute/second", "the end, or ';'", "'/second'"),
        ("1/second; 1e400/minute", "a finite number", "'1e400/minute'"),
        ("5/0.0001 seconds and some more text", "the end, or ';'", "'and some more text'"),
        ("5/0.0001 seconds", "at least 0.001 seconds, and finitely many,", "'0.0001 seconds'"),
        ("5/1e308 years", "at least 0.001 seconds, and finitely many,", "'1e308 years'"),
        ("5 and then some more words than fit", "'/' or 'per'", "'and then some more w...'"),
    ],
)
def test_a_text_that_cannot_be_read_is_named_with_the_place(text: str, expected: str, place: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_quotas(text)
    assert str(refused.value) == f"cannot read quota {text!r}: expected {expected} at {place}"


@given(st.text(alphabet="0123456789_.e+-/,;| \tpersconditkuy", max_size=25))
def test_any_text_is_read_or_refused_as_our_error(text: str) -> None:
    try:
        quotas = parse_quotas(text)
    except ConfigError:
        return
    assert all(quota.limit >= 0 and 0.001 <= quota.per < math.inf for quota in quotas)


@given(
    st.integers(1, 10**15) | st.floats(1, 1e300),
    st.floats(0.001, 1e300) | st.integers(1, 10**9),
    st.from_regex(r"[a-z][a-z0-9_]*", fullmatch=True).filter(lambda unit: unit != "per"),
)
def test_a_quota_prints_as_a_text_that_reads_back(limit: float, per: float, unit: str) -> None:
    quota = Quota(limit, per=per, unit=unit)
    assert Quota(str(quota)) == quota
    assert pickle.loads(pickle.dumps(quota)) == quota
    assert msgspec.json.decode(msgspec.json.encode(quota), type=Quota) == quota
    assert hash(quota) == hash(Quota(float(limit), per=float(per), unit=unit))


@pytest.mark.parametrize(("unit", "counted"), [("request", "requests"), ("token", "tokens"), ("call", "call")])
def test_a_single_request_or_token_is_counted_with_the_many(unit: str, counted: str) -> None:
    assert Quota(1, per=1, unit=unit).unit == counted
    assert Quota(f"1 {unit}/second").unit == counted


def test_the_unit_may_stand_beside_a_text_that_says_none_or_the_same() -> None:
    assert Quota("500/minute", unit="tokens") == Quota("500 tokens/minute", unit="token") == Quota("500 tokens/minute")


@pytest.mark.parametrize(
    ("per", "margin", "window"),
    [(60.0, None, 60.05), (1.0, None, 1.05), (0.5, None, 0.525), (60, 0, 60.0), (60, 1.5, 61.5)],
)
def test_the_margin_is_a_twentieth_of_a_short_window(per: float, margin: float | None, window: float) -> None:
    assert Quota(1, per=per, margin=margin).window == window


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *[({"limit": x}, f"limit must be a finite number >= 0, got {x}") for x in (-1, NAN, INF, None, True, b"")],
        ({"limit": 0.5}, "limit must be >= 1 for requests, got 0.5: .*; say 1 per 120 seconds"),
        *[({"per": x}, f"per must be .* >= 0.001, got {x!r}") for x in (-1.0, NAN, INF, "60", None, False, 0.0009)],
        ({"per": 0}, r"per must be given: Quota\(5, per=60.0\), or a text: Quota\('5/minute'\)"),
        *[({"unit": x}, f"unit must be a word .* got {x!r}") for x in ("two words", "Tokens", "1st", None, 5, "ä")],
        *[
            ({"strategy": x}, f"strategy must be 'sliding' or 'fixed' or 'bucket', got {x!r}")
            for x in ("leaky", None, 1)
        ],
        *[({"margin": x}, f"margin must be .* >= 0 or None, got {x!r}") for x in (-0.1, NAN, INF, "1", True)],
        *[
            ({"strategy": "bucket", "unit": "tokens", "burst": x}, f"burst must be .* > 0 or None, got {x!r}")
            for x in (0, -1.0, NAN, INF, "1", True)
        ],
        ({"strategy": "bucket", "burst": 0.5}, "burst must be .* >= 1 or None, got 0.5"),
        ({"strategy": "fixed", "burst": 5}, "burst must not be given without strategy='bucket', got 5"),
        ({"limit": "5/minute"}, "per must not be given besides a text, got 60.0 and '5/minute'"),
        ({"limit": "5/minute;6/hour", "per": 0.0}, "limit must be one quota, got '5/minute;6/hour'"),
        ({"limit": "5 usd/day", "unit": "tokens", "per": 0.0}, "unit must not be .* got 'tokens' and '5 usd/day'"),
        ({"limit": "5/day", "unit": "A B", "per": 0.0}, "unit must be a word .* got 'A B'"),
        ({"limit": "0.5/day", "per": 0.0}, "limit must be >= 1 for requests, got 0.5: .*; say 1 per 172800 seconds"),
    ],
)
def test_a_wrong_value_is_refused_with_its_name_and_itself(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        Quota(**{"limit": 5, "per": 60.0, **arguments})
    assert re.match(message, str(refused.value))


def test_only_a_string_is_a_text() -> None:
    with pytest.raises(ConfigError, match="^a quota's text must be a string, got 5"):
        parse_quotas(5)  # type: ignore[arg-type]


def test_half_of_another_unit_than_requests_is_fine() -> None:
    assert Quota("0.5 usd/day").limit == 0.5


def test_bounds_hold_for_decoded_values_too() -> None:
    assert msgspec.json.decode(b'{"limit": 5, "per": 60}', type=Quota) == Quota("5/minute")
    with pytest.raises(ConfigError, match="limit"):
        msgspec.json.decode(b'{"limit": -5, "per": 60}', type=Quota)
    with pytest.raises(msgspec.ValidationError, match="size"):
        msgspec.json.decode(b'{"limit": 5, "per": 60, "size": 3}', type=Quota)


def test_only_the_limit_is_given_by_position() -> None:
    with pytest.raises(ConfigError):
        Quota(5, 60.0)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("quota", "name"),
    [
        (Quota("500/minute"), "500 requests per 60 seconds"),
        (Quota("500/minute", strategy="fixed"), "500 requests per 60 seconds (fixed)"),
        (Quota("500/minute", strategy="bucket"), "500 requests per 60 seconds (bucket)"),
        (Quota("500/minute", strategy="bucket", burst=10), "500 requests per 60 seconds (bucket of 10)"),
        (Quota("5 usd/day", strategy="bucket", burst=0.5), "5 usd per 86400 seconds (bucket of 0.5)"),
    ],
)
def test_a_name_tells_quotas_of_other_strategies_apart_and_the_text_still_reads_back(quota: Quota, name: str) -> None:
    assert quota.name == name
    again = Quota(str(quota))
    assert (again.limit, again.per, again.unit) == (quota.limit, quota.per, quota.unit)
