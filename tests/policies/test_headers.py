from collections.abc import Mapping

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from multidict import CIMultiDict

from rxllm.policies import headers as module
from rxllm.policies.headers import PLANS, Limits, Truth, read_limits

NOW = 1_755_780_000.0  # 2025-08-21T12:40:00Z


def triple(prefix: str, unit: str, limit: str, remaining: str, reset: str) -> dict[str, str]:
    if prefix == "x-ratelimit":
        names = [f"x-ratelimit-{field}-{unit}" for field in ("limit", "remaining", "reset")]
    else:
        names = [f"{prefix}-{unit}-{field}" for field in ("limit", "remaining", "reset")]
    return dict(zip(names, (limit, remaining, reset), strict=True))


EXAMPLES: list[tuple[str, dict[str, str], list[tuple[str, float | None, float | None, float | None]], int]] = [
    ("OpenAI-requests", triple("x-ratelimit", "requests", "60", "59", "1s"), [("requests", 60, 59, 1)], 0),
    (
        "OpenAI-tokens",
        triple("x-ratelimit", "tokens", "150000", "149984", "6m0s"),
        [("tokens", 150000, 149984, 360)],
        0,
    ),
    ("OpenAI-milliseconds", triple("x-ratelimit", "tokens", "9", "8", "12ms"), [("tokens", 9, 8, 0.012)], 0),
    (
        "OpenAI-projects",
        triple("x-ratelimit", "project-tokens", "60000", "57000", "3s"),
        [("project_tokens", 60000, 57000, 3)],
        0,
    ),
    ("OpenAI-by-usage", {"x-ratelimit-limit-tokens_usage_based": "7"}, [("tokens_usage_based", 7, None, None)], 0),
    ("Groq", triple("x-ratelimit", "requests", "14400", "14370", "2m59.56s"), [("requests", 14400, 14370, 179.56)], 0),
    ("hours", triple("x-ratelimit", "tokens", "5", "1", "1h2m3.5s"), [("tokens", 5, 1, 3723.5)], 0),
    ("Azure", triple("x-ratelimit", "tokens", "5", "1", "58"), [("tokens", 5, 1, 58)], 0),
    ("Azure-knows-nothing", triple("x-ratelimit", "tokens", "-1", "-1", "0"), [], 0),
    ("a-limit-of-zero", triple("x-ratelimit", "tokens", "0", "4", "0"), [("tokens", None, 4, 0)], 0),
    (
        "a-date",
        triple("anthropic-ratelimit", "requests", "50", "49", "2025-08-21T12:40:59Z"),
        [("requests", 50, 49, 59)],
        0,
    ),
    (
        "a-past-date",
        triple("anthropic-ratelimit", "requests", "5", "4", "2024-08-21T12:40:59Z"),
        [("requests", 5, 4, 0)],
        0,
    ),
    (
        "an-offset",
        triple("anthropic-ratelimit", "input-tokens", "5", "4", "2025-08-21T14:40:00.5+02:00"),
        [("input_tokens", 5, 4, 0.5)],
        0,
    ),
    ("priority", {"anthropic-priority-output-tokens-limit": "8"}, [("priority_output_tokens", 8, None, None)], 0),
    ("fast", {"anthropic-fast-input-tokens-limit": "8"}, [("fast_input_tokens", 8, None, None)], 0),
    ("Unix-time", {"anthropic-ratelimit-unified-5h-reset": "1755780030"}, [("unified_5h", None, None, 30)], 0),
    ("Unix-milliseconds", {"x-ratelimit-reset-tokens": "1755780030000"}, [("tokens", None, None, 30)], 0),
    ("litellm", {"llm_provider-x-ratelimit-limit-tokens": "160000"}, [("tokens", 160000, None, None)], 0),
    (
        "litellm-and-its-own",
        {"llm_provider-x-ratelimit-limit-tokens": "7", "x-ratelimit-limit-tokens": "5"},
        [("tokens", 5, None, None)],
        0,
    ),
    ("any-case", {"X-RateLimit-Limit-Requests": "6"}, [("requests", 6, None, None)], 0),
    ("words", triple("x-ratelimit", "tokens", "many", "some", "soon"), [], 3),
    ("not-finite", triple("x-ratelimit", "tokens", "inf", "nan", "infs"), [], 3),
    ("negative", triple("x-ratelimit", "tokens", "-5", "-2", "-3s"), [], 3),
    ("underscores", triple("x-ratelimit", "tokens", "1_0", "2_0", "3_0s"), [], 3),
    ("empty", triple("x-ratelimit", "tokens", "", "", ""), [], 3),
    ("too-long", triple("x-ratelimit", "tokens", "7", "9" * 5000, "99999h"), [("tokens", 7, None, None)], 2),
    ("half-a-duration", {"x-ratelimit-reset-tokens": "6m0"}, [], 1),
    ("no-such-date", {"x-ratelimit-reset-tokens": "2025-13-99T00:00:00Z"}, [], 1),
    ("micro", {"x-ratelimit-reset-tokens": "1s500µs"}, [("tokens", None, None, 1.0005)], 0),
]


@pytest.mark.parametrize(("headers", "expected", "malformed"), [e[1:] for e in EXAMPLES], ids=[e[0] for e in EXAMPLES])
@pytest.mark.parametrize("kind", [dict, CIMultiDict])
def test_every_dialect_is_read(kind: type, headers: dict[str, str], expected: list[object], malformed: int) -> None:
    for _ in range(2):  # the second time by the plan of the first
        limits = read_limits(kind(headers), NOW)
        found = [
            (truth.unit, truth.limit, truth.remaining, None if truth.reset is None else pytest.approx(truth.reset))
            for truth in limits.truths
        ]
        assert found == expected
        assert limits.malformed == malformed


IETF = [
    (['"default";q=100;w=60'], ['"default";r=50;t=30'], [("default", "requests", 100, 50, 30, 60)], 0),
    (
        ['"permin";q=50;w=60,"perhr";q=1000;w=3600'],
        ['"perhr";r=7;t=5'],
        [("permin", "requests", 50, None, None, 60), ("perhr", "requests", 1000, 7, 5, 3600)],
        0,
    ),
    (['"a";q=9;w=1;qu="content-bytes"'], [], [("a", "content_bytes", 9, None, None, 1)], 0),
    (
        ['"a" ; q=9; w=1; pk=:c2FsdA==: , b;q=8'],
        [],
        [("a", "requests", 9, None, None, 1), ("b", "requests", 8, None, None, None)],
        0,
    ),
    (['"a";q=9', '"b";q=8'], [], [("a", "requests", 9, None, None, None), ("b", "requests", 8, None, None, None)], 0),
    (['"a,;\\"b";q=9'], [], [('a,;\\"b', "requests", 9, None, None, None)], 0),
    (['"a";q=9,'], ['"a";r=3'], [("a", "requests", None, 3, None, None)], 1),
    (['"a";q=x'], ['"a;r=3'], [], 2),
    ([""], ["5, 6"], [], 2),
]


@pytest.mark.parametrize(("policies", "states", "expected", "malformed"), IETF)
def test_the_fields_of_the_draft_are_joined_by_name(
    policies: list[str], states: list[str], expected: list[object], malformed: int
) -> None:
    headers = CIMultiDict(
        [*(("RateLimit-Policy", text) for text in policies), *(("RateLimit", text) for text in states)]
    )
    limits = read_limits(headers, NOW)
    assert [(t.policy, t.unit, t.limit, t.remaining, t.reset, t.window) for t in limits.truths] == expected
    assert limits.malformed == malformed


def test_anthropic_rounds_tokens_and_the_least_is_told() -> None:
    headers = {
        "anthropic-ratelimit-tokens-remaining": "7000",
        "anthropic-ratelimit-input-tokens-remaining": "6543",
        "anthropic-ratelimit-requests-remaining": "2000",
        "x-ratelimit-remaining-project-tokens": "1000",
    }
    least = {truth.unit: truth.least for truth in read_limits(headers, NOW).truths}
    assert least == {"tokens": 6500, "input_tokens": 6543, "requests": 2000, "project_tokens": 1000}
    assert Truth(unit="tokens", remaining=0.0, rounding=500.0).least == 0
    assert Truth(unit="tokens").least is None


TIMES: list[tuple[str, dict[str, str], float | None, int]] = [
    ("OpenAI", {"openai-processing-ms": "412"}, 0.412, 0),
    ("Envoy", {"X-Envoy-Upstream-Service-Time": "7"}, 0.007, 0),
    ("TGI", {"x-total-time": "111"}, 0.111, 0),
    ("nothing-at-all", {"openai-processing-ms": "0"}, 0.0, 0),
    ("the-nearest-server", {"openai-processing-ms": "412", "x-envoy-upstream-service-time": "419"}, 0.419, 0),
    ("the-nearest-server-first", {"x-envoy-upstream-service-time": "419", "openai-processing-ms": "412"}, 0.419, 0),
    ("the-one-that-can-be-read", {"openai-processing-ms": "soon", "x-total-time": "9"}, 0.009, 1),
    ("unknown", {"openai-processing-ms": "-1"}, None, 0),
    ("malformed", {"openai-processing-ms": "nan", "x-total-time": ""}, None, 2),
    ("passed-on-by-litellm", {"llm_provider-openai-processing-ms": "412"}, None, 0),
    ("everybodys-own", {"server-timing": "total;dur=412"}, None, 0),
]


@pytest.mark.parametrize(("headers", "processing", "malformed"), [e[1:] for e in TIMES], ids=[e[0] for e in TIMES])
def test_the_time_that_the_server_worked_is_read(
    headers: dict[str, str], processing: float | None, malformed: int
) -> None:
    limits = read_limits(headers, NOW)
    assert limits == Limits((), malformed, processing)
    both = read_limits({**headers, "x-ratelimit-limit-tokens": "5"}, NOW)
    assert both == Limits((Truth(unit="tokens", limit=5.0),), malformed, processing)


def test_without_such_headers_there_is_nothing() -> None:
    for headers in ({}, {"retry-after": "3", "x-ratelimit-limit": "5", "ratelimit-limit": "9"}):
        assert read_limits(headers, NOW) == Limits((), 0)


def test_the_plans_that_are_remembered_are_bounded() -> None:
    for n in range(2 * PLANS + 5):
        read_limits({f"x-ratelimit-limit-u{n}": "5"}, NOW)
        assert len(module._plans) <= PLANS


NAMES = sorted(
    {name for _, headers, *_ in (*EXAMPLES, *TIMES) for name in headers} | {"RateLimit", "ratelimit-policy", "date"}
)
VALUES = sorted({value for _, headers, *_ in EXAMPLES for value in headers.values()})
junk = (
    st.sampled_from(VALUES)
    | st.text(max_size=20)
    | st.text(alphabet='0123456789.-+eEhmsµTZ:",;= qrtw\\', max_size=30)
    | st.floats().map(str)
    | st.from_regex(r'("[a-z]{1,3}"(;[qrtw]=[0-9-]{1,3}){0,4},? ?){1,3}', fullmatch=True)
)


@settings(max_examples=500)
@given(st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=12), junk, max_size=8), st.floats(0, 4e9))
@example({"x-ratelimit-reset-tokens": "9999-12-31T23:59:59-23:59"}, NOW)
@example({"x-ratelimit-reset-tokens": "0001-01-01T00:00:00+23:59"}, NOW)
def test_whatever_is_in_the_headers_it_is_read_or_counted(headers: Mapping[str, str], now: float) -> None:
    limits = read_limits(headers, now)
    assert 0 <= limits.malformed <= 6 * len(headers) + 12
    assert limits.processing is None or 0 <= limits.processing < float("inf")
    for truth in limits.truths:
        assert truth.limit is None or 0 < truth.limit < float("inf")
        assert truth.remaining is None or 0 <= truth.remaining < float("inf")
        assert truth.reset is None or 0 <= truth.reset < float("inf")
        assert truth.window is None or 0 <= truth.window < float("inf")
