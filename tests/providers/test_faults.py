"""The table of errors: what servers say instead of an answer, and what it is to us."""

from __future__ import annotations

import json
import pickle
import textwrap
import time
from email.utils import formatdate
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from rxllm import errors
from rxllm.errors import CallError
from rxllm.providers import fault_rows, faults, said
from rxllm.providers.faults import ROWS, fault_in, fault_of, retry_after, table

NOW = 1_800_000_000.0
DIALECTS = ("openai", "anthropic", "llm_engine", "another")


def fault(status: int, body: object = b"", dialect: str = "openai", **headers: str) -> CallError:
    """Return the error of an answer; names of headers with "_" for "-"."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = CIMultiDict({name.replace("_", "-"): value for name, value in headers.items()})
    return fault_of(dialect, status, lines, data, now=NOW)


def openai(message: str = "No.", **facts: object) -> dict[str, Any]:
    return {"error": {"message": message, "type": None, "param": None, "code": None, **facts}}


def anthropic(kind: str, message: str = "No.", **facts: object) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message, **facts}, "request_id": "req_7"}


def google(code: int, status: str, *details: dict[str, Any], message: str = "No.") -> list[Any]:
    return [{"error": {"code": code, "message": message, "status": status, "details": list(details)}}]


REFUSED, OVERLOADED, BILLING = errors.RateLimitedError, errors.OverloadedError, errors.BillingError
OVERFLOW, FILTERED, WRONG = errors.ContextOverflowError, errors.ContentFilterError, errors.InvalidRequestError
SERVER, AUTH, MISSING, LOADING = errors.ServerError, errors.AuthError, errors.NotFoundError, errors.NotReadyError

BEDROCK = "ThrottlingException:http://internal.amazon.com/coral/com.amazon.bedrock/"
INFO = {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "9s"}
KEY_INFO = {"@type": "type.googleapis.com/google.rpc.ErrorInfo", "reason": "API_KEY_INVALID"}
POLICY = {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {"hate": {"filtered": True}}}
VLLM = "This model's maximum context length is 4096 tokens. However, you requested 5000 tokens."
TGI = "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000 `inputs` tokens"
RAMP = {"error_code": "ramp_limit_exceeded"}
CONTRACT = {"error_code": "contract_spend_limit_reached"}
ENFORCED = {"error_code": "enforced_spend_limit_reached"}
OPENROUTER = {"raw": '{"error":{"message":"Input is too long for requested model."}}', "provider_name": "Bedrock"}
IN_FLIGHT = {"limit_source": "openrouter_in_flight_budget"}
OVER_BUDGET = {"limit_source": "openrouter_key_limit"}
TOGETHER = "`inputs` tokens + `max_new_tokens` must be <= 4097"

# (what it is, dialect, status, body, class)
CASES: list[tuple[str, str, int, object, type[CallError]]] = [
    # the two kinds of 429
    ("openai-throttling", "openai", 429, openai(type="tokens", code="rate_limit_exceeded"), REFUSED),
    ("openai-slow-down", "openai", 429, openai(type="rate_limit_error", code="slow_down"), REFUSED),
    *(
        (f"openai-{code}", "openai", 429, openai(type="insufficient_quota", code=code), BILLING)
        for code in (
            "insufficient_quota",
            "credit_balance_exhausted",
            "organization_spend_limit_exceeded",
            "project_spend_limit_exceeded",
            "organization_usage_limit_exceeded",
        )
    ),
    ("openai-quota-by-its-type", "openai", 429, openai(type="insufficient_quota"), BILLING),
    (
        "openai-too-large-for-the-quota",
        "openai",
        429,
        openai("Request too large for gpt-4o on TPM", type="tokens"),
        WRONG,
    ),
    ("openai-overloaded-429", "openai", 429, openai("The engine is currently overloaded, try later"), OVERLOADED),
    ("openai-503-slow-down", "openai", 503, openai(code="slow_down"), OVERLOADED),
    ("openai-503-overloaded", "openai", 503, openai(type="server_is_overloaded"), OVERLOADED),
    ("openai-503", "openai", 503, openai("The server had an error"), SERVER),
    # Anthropic
    ("anthropic-400", "anthropic", 400, anthropic("invalid_request_error"), WRONG),
    ("anthropic-401", "anthropic", 401, anthropic("authentication_error"), AUTH),
    ("anthropic-402", "anthropic", 402, anthropic("billing_error"), BILLING),
    ("anthropic-403", "anthropic", 403, anthropic("permission_error"), AUTH),
    ("anthropic-404", "anthropic", 404, anthropic("not_found_error"), MISSING),
    ("anthropic-409", "anthropic", 409, anthropic("conflict_error"), errors.ConflictError),
    ("anthropic-413", "anthropic", 413, anthropic("request_too_large"), WRONG),
    ("anthropic-429", "anthropic", 429, anthropic("rate_limit_error"), REFUSED),
    ("anthropic-ramp", "anthropic", 429, anthropic("rate_limit_error", details=RAMP), REFUSED),
    ("anthropic-contract-spend-limit", "anthropic", 429, anthropic("rate_limit_error", details=CONTRACT), BILLING),
    ("anthropic-enforced-spend-limit", "anthropic", 429, anthropic("rate_limit_error", details=ENFORCED), BILLING),
    ("anthropic-spend-limit-as-400", "anthropic", 400, anthropic("invalid_request_error", details=ENFORCED), BILLING),
    (
        "anthropic-usage-limit-as-400",
        "anthropic",
        400,
        anthropic("invalid_request_error", "You have reached your specified API usage limits."),
        BILLING,
    ),
    (
        "anthropic-low-balance-as-400",
        "anthropic",
        400,
        anthropic("invalid_request_error", "Your credit balance is too low to access the API."),
        BILLING,
    ),
    ("anthropic-500", "anthropic", 500, anthropic("api_error"), SERVER),
    ("anthropic-504", "anthropic", 504, anthropic("timeout_error"), SERVER),
    ("anthropic-529", "anthropic", 529, anthropic("overloaded_error"), OVERLOADED),
    # too many tokens
    ("overflow-openai", "openai", 400, openai(code="context_length_exceeded"), OVERFLOW),
    ("overflow-openai-text", "openai", 400, openai("Your input exceeds the context window of this model."), OVERFLOW),
    (
        "overflow-anthropic",
        "anthropic",
        400,
        anthropic("invalid_request_error", "prompt is too long: 213462 tokens > 200000 maximum"),
        OVERFLOW,
    ),
    (
        "overflow-anthropic-with-answer",
        "anthropic",
        400,
        anthropic("invalid_request_error", "input length and `max_tokens` exceed context limit: 9 + 9 > 10"),
        OVERFLOW,
    ),
    ("overflow-vllm", "openai", 400, {"object": "error", "message": VLLM, "code": 400}, OVERFLOW),
    ("overflow-vllm-nested", "openai", 400, openai(VLLM, type="BadRequestError", code=400), OVERFLOW),
    ("overflow-tgi", "openai", 422, {"error": TGI, "error_type": "validation"}, OVERFLOW),
    ("overflow-llama-cpp", "openai", 400, openai(type="exceed_context_size_error", code=400), OVERFLOW),
    ("overflow-groq", "openai", 400, openai("Please reduce the length of the messages or completion."), OVERFLOW),
    ("overflow-together-is-a-403", "openai", 403, openai(TOGETHER), OVERFLOW),
    ("overflow-openrouter", "openai", 400, openai("This endpoint's maximum context length is 8192 tokens."), OVERFLOW),
    ("overflow-of-the-server-behind", "openai", 400, openai("Provider error", metadata=OPENROUTER), OVERFLOW),
    ("overflow-llm-engine", "llm_engine", 400, {"detail": VLLM}, OVERFLOW),
    ("overflow-llm-engine-as-500", "llm_engine", 500, {"detail": f"Upstream service error: {VLLM}"}, OVERFLOW),
    ("overflow-litellm", "openai", 400, openai("litellm.ContextWindowExceededError: no", code="400"), OVERFLOW),
    (
        "overflow-google",
        "openai",
        400,
        google(400, "INVALID_ARGUMENT", message="The input token count (9) exceeds the maximum number of tokens (8)"),
        OVERFLOW,
    ),
    # content filters
    ("filter-azure", "openai", 400, openai(code="content_filter", status=400, innererror=POLICY), FILTERED),
    ("filter-azure-inner-code-alone", "openai", 400, openai(innererror=POLICY), FILTERED),
    ("filter-openai", "openai", 400, openai(code="content_policy_violation"), FILTERED),
    (
        "filter-openai-reasoning",
        "openai",
        400,
        openai("Invalid prompt: your prompt was flagged as potentially violating our policy", code="invalid_prompt"),
        FILTERED,
    ),
    ("an-invalid-prompt-that-no-filter-met", "openai", 400, openai("bad role", code="invalid_prompt"), WRONG),
    ("filter-openrouter-is-a-403", "openai", 403, openai("It requires moderation. Your input was flagged."), FILTERED),
    (
        "filter-anthropic",
        "anthropic",
        400,
        anthropic("invalid_request_error", "Output blocked by content filtering policy"),
        FILTERED,
    ),
    # Azure
    ("azure-quota-of-calls", "openai", 403, {"statusCode": 403, "message": "Out of call volume quota."}, REFUSED),
    ("azure-quota-exceeded", "anthropic", 403, {"message": "Quota exceeded"}, REFUSED),
    ("azure-network", "openai", 403, openai("Access denied due to Virtual Network/Firewall rules."), AUTH),
    ("azure-no-deployment", "openai", 404, openai(code="DeploymentNotFound"), MISSING),
    # vLLM, TGI, llama.cpp, ollama
    ("vllm-404", "openai", 404, openai(type="NotFoundError", code=404), MISSING),
    ("tgi-overloaded", "openai", 429, {"error": "Model is overloaded", "error_type": "overloaded"}, OVERLOADED),
    ("tgi-generation", "openai", 424, {"error": "CUDA", "error_type": "generation"}, SERVER),
    ("tgi-validation", "openai", 422, {"error": "bad", "error_type": "validation"}, WRONG),
    ("tgi-incomplete", "openai", 500, {"error": "cut", "error_type": "incomplete_generation"}, SERVER),
    ("llama-cpp-loading", "openai", 503, openai("Loading model", type="unavailable_error", code=503), LOADING),
    ("ollama-busy", "openai", 503, {"error": "server busy, please try again. maximum pending requests"}, OVERLOADED),
    ("hugging-face-loading", "openai", 503, {"error": "Model x is currently loading", "estimated_time": 20}, LOADING),
    # LLM Engine
    ("llm-engine-detail", "llm_engine", 400, {"detail": "bad"}, WRONG),
    ("llm-engine-problems", "llm_engine", 422, {"detail": [{"loc": ["body", "n"], "msg": "missing"}]}, WRONG),
    ("llm-engine-404", "llm_engine", 404, {"detail": "no such endpoint"}, MISSING),
    ("llm-engine-410", "llm_engine", 410, {"detail": "gone"}, MISSING),
    ("llm-engine-500", "llm_engine", 500, {"error": "x", "timestamp": "y", "request_id": "z"}, SERVER),
    # Groq, OpenRouter, litellm, Google, AWS, xAI
    ("groq-flex", "openai", 498, openai(code="capacity_exceeded"), OVERLOADED),
    ("groq-too-large", "openai", 413, openai("Request too large for model", code="rate_limit_exceeded"), WRONG),
    ("openrouter-no-credits", "openai", 402, openai(code=402), BILLING),
    ("openrouter-in-flight-budget", "openai", 402, openai(code=402, metadata=IN_FLIGHT), REFUSED),
    ("openrouter-key-limit", "openai", 403, openai(code=403, metadata=OVER_BUDGET), BILLING),
    ("openrouter-502", "openai", 502, openai("Provider returned error", code=502), SERVER),
    (
        "litellm-budget",
        "openai",
        400,
        openai("Budget has been exceeded! Max budget: 1", type="budget_exceeded"),
        BILLING,
    ),
    ("google-429", "openai", 429, google(429, "RESOURCE_EXHAUSTED", INFO), REFUSED),
    ("google-overloaded", "openai", 503, google(503, "UNAVAILABLE", message="The model is overloaded."), OVERLOADED),
    ("google-503", "openai", 503, google(503, "UNAVAILABLE"), SERVER),
    ("google-key", "openai", 400, google(400, "INVALID_ARGUMENT", KEY_INFO, message="API key not valid."), AUTH),
    ("aws-429", "openai", 429, {"message": "Too many requests, please wait before trying again."}, REFUSED),
    ("aws-throttling-as-400", "openai", 400, {"__type": "com.amazon#ThrottlingException", "message": "x"}, REFUSED),
    ("aws-not-ready", "openai", 429, {"__type": "ModelNotReadyException", "message": "x"}, LOADING),
    # proxies
    *((f"nginx-{code}", "openai", code, b"<html><h1>Bad Gateway</h1></html>", SERVER) for code in (502, 503, 504)),
    *((f"cloudflare-{code}", "anthropic", code, f"error code: {code}".encode(), SERVER) for code in range(520, 527)),
    ("cloudflare-1015", "openai", 429, b"error code: 1015", REFUSED),
    ("hung-up-in-between", "openai", 499, b"", errors.ConnectionError),
    ("not-implemented", "openai", 501, b"", errors.UnsupportedError),
]


@pytest.mark.parametrize(("dialect", "status", "body", "kind"), [case[1:] for case in CASES], ids=[c[0] for c in CASES])
def test_what_comes_is_the_error_that_it_means(dialect, status, body, kind):
    error = fault(status, body, dialect)
    assert type(error) is kind
    assert (error.status, error.transient, error.refusal) == (status, kind.transient, kind.refusal)


def test_every_row_that_reads_names_or_texts_has_a_case():
    found = {row_of(dialect, status, body) for _, dialect, status, body, _ in CASES}
    assert [row.comes for row in ROWS if (row.names or row.words) and row not in found] == []


def row_of(dialect: str, status: int, body: object) -> object:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    value = said.parsed(data)
    names = said.names_in(said.parts_of(value), {})
    return faults._row_of(faults._ROWS_OF[dialect], status, names, said.said_in(value) or "")


@pytest.mark.parametrize("word", [(row, word) for row in ROWS for word in row.words], ids=lambda pair: pair[1])
def test_every_text_of_the_table_can_be_found(word):
    row, text = word
    error = fault(row.statuses[0], openai(f"Said so: {text.upper()}."))
    assert type(error) is row.kind


@pytest.mark.parametrize("pair", [(r, n) for r in ROWS for n in sorted(r.names)], ids=lambda pair: pair[1])
def test_every_name_of_the_table_is_a_code_or_a_type(pair):
    row, name = pair
    for key in ("code", "type"):
        assert type(fault(row.statuses[0], openai(**{key: name}))) is row.kind
        assert type(fault_in("openai", {"error": {key: name}}, now=NOW)) in {row.kind, errors.RateLimitedError}


@pytest.mark.parametrize("status", range(300, 600))
def test_the_status_decides_where_nothing_else_is_known(status):
    error = fault(status)
    assert error.status == status
    assert error.refusal is (status in {429, 498, 529})
    transient = {408, 409, 424, 425, 429, 498, 499}
    assert error.transient is (status in transient or (status >= 500 and status != 501))


def test_the_dialect_bounds_what_only_one_speaks():
    body = {"__type": "ThrottlingException"}
    assert [type(fault(400, body, dialect)) for dialect in DIALECTS] == [REFUSED, WRONG, WRONG, REFUSED]


def test_a_header_may_name_the_error():
    assert type(fault(400, {"message": "x"}, x_amzn_errortype=BEDROCK)) is REFUSED


# in an answer that began as if all were well

IN_ANSWERS: list[tuple[str, str, object, type[CallError], int]] = [
    ("anthropic-overloaded", "anthropic", anthropic("overloaded_error"), OVERLOADED, 529),
    ("anthropic-api-error", "anthropic", anthropic("api_error"), SERVER, 500),
    ("anthropic-timeout", "anthropic", anthropic("timeout_error"), SERVER, 504),
    ("anthropic-rate-limit", "anthropic", anthropic("rate_limit_error"), REFUSED, 429),
    ("anthropic-invalid", "anthropic", anthropic("invalid_request_error"), WRONG, 400),
    ("anthropic-spend-limit", "anthropic", anthropic("rate_limit_error", details=CONTRACT), BILLING, 429),
    ("openai-server-error", "openai", openai(type="server_error"), SERVER, 500),
    ("openai-nothing-known", "openai", openai("The server had an error"), SERVER, 200),
    ("openai-billing-without-a-status", "openai", openai(code="insufficient_quota"), BILLING, 200),
    ("openai-event", "openai", {"type": "error", "code": "rate_limit_exceeded", "message": "x"}, REFUSED, 429),
    (
        "openai-failed-response",
        "openai",
        {
            "type": "response.failed",
            "response": {"status": "failed", "error": {"code": "server_error", "message": "x"}},
        },
        SERVER,
        500,
    ),
    ("vllm-integer", "openai", openai(type="BadRequestError", code=400), WRONG, 400),
    ("vllm-integer-at-the-top", "openai", {"object": "error", "message": "x", "code": 500}, SERVER, 500),
    ("openrouter-integer", "openai", openai("Rate limited", code=429), REFUSED, 429),
    ("litellm-number-as-text", "openai", openai(code="429"), REFUSED, 429),
    ("tgi-overloaded", "openai", {"error": "busy", "error_type": "overloaded"}, OVERLOADED, 529),
    ("tgi-generation", "openai", {"error": "x", "error_type": "generation"}, SERVER, 424),
    ("overflow-by-its-text-alone", "openai", openai(VLLM), OVERFLOW, 200),
    (
        "llm-engine-chunk",
        "llm_engine",
        {
            "request_id": "r",
            "output": None,
            "error": {"status_code": 400, "content": {"error": VLLM, "timestamp": "t"}},
        },
        OVERFLOW,
        400,
    ),
    ("llm-engine-error", "llm_engine", {"status_code": 429, "content": {"error": "x"}}, REFUSED, 429),
    ("google", "openai", google(503, "UNAVAILABLE"), SERVER, 503),
    ("google-by-name", "openai", {"error": {"status": "RESOURCE_EXHAUSTED", "message": "x"}}, REFUSED, 429),
    ("the-inner-number-goes-first", "openai", {"code": 400, "error": openai(code=503)["error"]}, SERVER, 503),
    (
        "the-inner-name-goes-first",
        "openai",
        {"code": "server_error", "error": openai(code="rate_limit_error")["error"]},
        REFUSED,
        429,
    ),
    ("a-number-of-many-digits", "openai", openai(code="9" * 5000), SERVER, 200),
    ("a-number-that-is-no-status", "openai", openai(code=3505), SERVER, 200),
    ("a-truth-that-is-no-status", "openai", openai(code=True), SERVER, 200),
]


@pytest.mark.parametrize(
    ("dialect", "body", "kind", "status"), [case[1:] for case in IN_ANSWERS], ids=[case[0] for case in IN_ANSWERS]
)
def test_an_error_inside_of_an_answer_is_the_one_that_it_says(dialect, body, kind, status):
    error = fault_in(dialect, body, now=NOW)
    assert (type(error), error.status, error.refusal) == (kind, status, kind.refusal)
    whole = fault(200, body, dialect)  # the same body with a 200
    assert (type(whole), whole.status, whole.message) == (kind, status, error.message)


def test_an_error_after_a_part_of_the_answer_is_no_refusal_but_may_be_tried_again():
    error = fault_in("anthropic", anthropic("overloaded_error"), now=NOW, begun=True)
    assert (error.transient, error.refusal) == (True, False)
    assert errors.OverloadedError.refusal


def test_the_status_of_http_is_believed_before_the_number_in_the_body():
    assert type(fault(500, openai(code=429))) is SERVER


def test_an_error_inside_of_an_answer_keeps_what_was_said():
    error = fault_in("openai", openai("Oh."), now=NOW, headers={"x-request-id": "req_9"})
    assert (error.message, error.request_id) == ("Oh.", "req_9")
    assert error.body is not None
    assert json.loads(error.body) == openai("Oh.")
    assert fault_in("openai", {1, object()}, now=NOW).body == ""


# what the server wants


@pytest.mark.parametrize("name", ["x-should-retry", "llm_provider-x-should-retry"])
@pytest.mark.parametrize(
    ("status", "value", "transient"),
    [(400, "true", True), (400, "True", True), (503, "false", False), (429, "false", False), (400, "maybe", False)],
)
def test_the_server_may_say_whether_to_try_again(name, status, value, transient):
    error = fault_of("openai", status, {name: value}, b"", now=NOW)
    assert error.transient is transient
    assert pickle.loads(pickle.dumps(error)).transient is transient


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        pytest.param({}, None, id="none"),
        pytest.param({"retry-after": "7"}, 7.0, id="seconds"),
        pytest.param({"retry-after": "0.25"}, 0.25, id="a-fraction"),
        pytest.param({"retry-after": " 3 "}, 3.0, id="with-space"),
        pytest.param({"retry-after": "0"}, 0.0, id="at-once"),
        pytest.param({"retry-after-ms": "1500"}, 1.5, id="milliseconds"),
        pytest.param({"x-ms-retry-after-ms": "1500"}, 1.5, id="milliseconds-of-azure"),
        pytest.param({"retry-after-ms": "1500", "retry-after": "2"}, 1.5, id="milliseconds-go-first"),
        pytest.param({"retry-after-ms": "soon", "retry-after": "2"}, 2.0, id="bad-milliseconds-do-not"),
        pytest.param({"llm_provider-retry-after": "4"}, 4.0, id="renamed"),
        pytest.param({"retry-after": "3", "llm_provider-retry-after": "4"}, 3.0, id="the-nearest-server-goes-first"),
        pytest.param({"retry-after": formatdate(NOW + 30, usegmt=True)}, 30.0, id="date"),
        pytest.param({"retry-after": formatdate(NOW + 30, usegmt=True).replace("GMT", "+0000")}, 30.0, id="offset"),
        pytest.param({"retry-after": formatdate(NOW + 30).replace(" -0000", "")}, 30.0, id="date-without-zone"),
        pytest.param({"retry-after": formatdate(NOW - 30, usegmt=True)}, 0.0, id="date-in-the-past"),
        pytest.param(
            {"retry-after": formatdate(NOW + 930, usegmt=True), "date": formatdate(NOW + 900, usegmt=True)},
            30.0,
            id="a-date-by-the-clock-of-the-server",
        ),
        pytest.param({"retry-after": formatdate(NOW + 30, usegmt=True), "date": "x"}, 30.0, id="no-date-of-the-server"),
        pytest.param({"retry-after": str(NOW + 20)}, 20.0, id="unix-time"),
        pytest.param({"retry-after": str(NOW - 20)}, 0.0, id="unix-time-in-the-past"),
        pytest.param({"retry-after": str(31 * 86_400)}, 31 * 86_400.0, id="a-month"),
        pytest.param({"retry-after": str(31 * 86_400 + 1)}, None, id="more-than-a-month"),
        pytest.param({"retry-after": formatdate(NOW + 40 * 86_400, usegmt=True)}, None, id="a-date-beyond-a-month"),
        pytest.param({"retry-after": "-5"}, None, id="negative"),
        pytest.param({"retry-after": "inf"}, None, id="infinite"),
        pytest.param({"retry-after": "1e999"}, None, id="too-large-a-number"),
        pytest.param({"retry-after": "nan"}, None, id="nan"),
        pytest.param({"retry-after": "1_0"}, None, id="a-number-of-python-only"),
        pytest.param({"retry-after": ""}, None, id="empty"),
        pytest.param({"retry-after": "soon"}, None, id="a-word"),
        pytest.param({"retry-after": "12ms"}, None, id="a-unit"),
        pytest.param({"retry-after": "Mon, 99 Foo 2026 99:99:99 GMT"}, None, id="no-date"),
        pytest.param({"retry-after": "Mon, 01 Jan 2026 00:00:00 +9999"}, None, id="no-zone"),
        pytest.param({"retry-after": f"Mon, 01 Jan 2026 00:00:00 +{'9' * 30}"}, None, id="a-zone-beyond-all-bounds"),
        pytest.param({"retry-after": f"Mon, 01 Jan {'9' * 30} 00:00:00 GMT"}, None, id="a-year-beyond-all-bounds"),
    ],
)
def test_a_hint_of_the_headers_is_read_or_ignored(headers, seconds):
    assert retry_after(headers, NOW) == seconds
    for status in (429, 503):
        assert fault_of("openai", status, headers, b"", now=NOW).retry_after == seconds


def test_a_date_without_a_zone_is_not_one_of_this_machine(monkeypatch):
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    time.tzset()
    try:
        assert retry_after({"retry-after": formatdate(NOW + 30).replace(" -0000", "")}, NOW) == 30.0
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("Limit 3, Used 3. Please try again in 9.94s. Visit the site.", 9.94),
        ("Please try again in 6m0s.", 360.0),
        ("Please try again in 1h2m3.5s", 3723.5),
        ("Please try again in 120ms.", 0.12),
        ("Please try again in 120 milliseconds.", 0.12),
        ("Please retry after 12 seconds.", 12.0),
        ("Please retry in 34.07s.", 34.07),
        ("Rate limit is exceeded. Try again in 5 seconds.", 5.0),
        ("Try again in 2 minutes and 3 seconds", 123.0),
        ("Please wait for 1 minute.", 60.0),
        ("Quota will be replenished in 09:58:43.", 35_923.0),
        ("Quota will be replenished in 5.03:23:11.", 444_191.0),
        ("Try again in 1 month.", None),
        ("Try again in 99 days.", None),
        ("Try again in 3.", None),
        ("Try again later.", None),
        ("It took 12 seconds.", None),
        ("Try again in " + "9" * 400 + "s.", None),
    ],
)
def test_a_hint_in_the_text_counts_for_refusals_that_have_no_header(text, seconds):
    assert fault(429, openai(text)).retry_after == seconds
    assert fault(429, openai(text), retry_after="2").retry_after == 2.0
    assert fault(500, openai(text)).retry_after is None


@pytest.mark.parametrize(
    ("body", "seconds"),
    [
        (google(429, "RESOURCE_EXHAUSTED", INFO, message="Try again in 80s."), 9.0),
        (google(429, "RESOURCE_EXHAUSTED", {"retryDelay": "9.5s"}), 9.5),
        (google(429, "RESOURCE_EXHAUSTED", {"retryDelay": "soon"}), None),
        (google(429, "RESOURCE_EXHAUSTED", {"retryDelay": "-3s"}), None),
        (google(429, "RESOURCE_EXHAUSTED", {"retryDelay": 3}), None),
        ({"message": "no", "retry_after": 2}, 2.0),
        (openai(retry_after=0.5), 0.5),
        (openai(retry_after=True), None),
        (openai(retry_after=10**400), None),
        (openai(retry_after="3"), None),
    ],
)
def test_a_hint_in_the_json_counts_before_the_text(body, seconds):
    assert fault(429, body).retry_after == seconds


def test_a_quota_that_renews_says_when():
    error = fault(
        403, {"statusCode": 403, "message": "Out of call volume quota. Quota will be replenished in 00:00:09."}
    )
    assert (type(error), error.retry_after) == (REFUSED, 9.0)


@given(st.text() | st.from_regex(r"\A[A-Z][a-z]{2}, \d{1,3} [A-Z][a-z]{2} \d{1,6} \d\d:\d\d:\d\d( [+-]?\w+)?\Z"))
def test_no_hint_is_ever_an_exception_or_a_bad_number(text):
    for name in (*said.MILLISECONDS, *said.SECONDS):
        seconds = retry_after({name: text, "date": text}, NOW)
        assert seconds is None or 0 <= seconds <= said.LONGEST_HINT


@given(st.lists(st.sampled_from(["again in ", "retry after ", "9", "1.5", "s", "ms", "m", " ", ":", "00", ".", "and"])))
def test_no_text_is_ever_a_bad_hint(parts):
    seconds = said.hint_in("".join(parts), [])
    assert seconds is None or 0 <= seconds <= said.LONGEST_HINT


# what a person reads


@pytest.mark.parametrize(
    ("body", "text"),
    [
        pytest.param(openai("Wrong."), "Wrong.", id="openai"),
        pytest.param(anthropic("t", "Wrong."), "Wrong.", id="anthropic"),
        pytest.param({"error": "Wrong.", "error_type": "t"}, "Wrong.", id="tgi"),
        pytest.param({"detail": "Wrong."}, "Wrong.", id="detail"),
        pytest.param({"details": "Wrong.", "code": 5, "id": "x"}, "Wrong.", id="caikit"),
        pytest.param({"detail": [{"loc": ["body"], "msg": "Wrong."}]}, "Wrong.", id="fastapi"),
        pytest.param(
            {"detail": [{"loc": ["body", "a", 0], "msg": "Wrong."}, {"loc": ["body", "b"], "msg": "Bad."}]},
            "a.0: Wrong.; b: Bad.",
            id="fastapi-fields",
        ),
        pytest.param({"message": "Wrong."}, "Wrong.", id="message"),
        pytest.param({"error": None, "message": "Wrong."}, "Wrong.", id="null-error"),
        pytest.param({"error": True, "message": "Wrong."}, "Wrong.", id="true-error"),
        pytest.param([{"error": {"message": "Wrong."}}], "Wrong.", id="list"),
        pytest.param({"error": {"status_code": 400, "content": {"error": "Wrong."}}}, "Wrong.", id="llm-engine"),
        pytest.param(
            openai("Provider returned error", metadata={"raw": "busy", "provider_name": "X"}),
            "Provider returned error: X: busy",
            id="openrouter",
        ),
        pytest.param(
            openai("Provider returned error", metadata={"raw": '{"error":{"message":"busy"}}'}),
            "Provider returned error: busy",
            id="openrouter-json",
        ),
        pytest.param(openai("No.", metadata={"raw": 3}), "No.", id="openrouter-odd"),
        pytest.param({"error": {"error": {"error": {"error": {"msg": "Wrong."}}}}}, "Wrong.", id="five-levels"),
        pytest.param(b'"Wrong."', "Wrong.", id="json-text"),
        pytest.param(b"Wrong.", "Wrong.", id="text"),
        pytest.param(b"Wrong,\r\n  very\twrong\x00\x1b[31m.", "Wrong, very wrong [31m.", id="text-of-lines"),
        pytest.param(b'{"error":{"message":"a\\n\\u0000b"}}', "a b", id="lines-in-json"),
        pytest.param(b'{"x":7}', '{"x":7}', id="other-json"),
        pytest.param(b"[]", "[]", id="empty-list"),
        pytest.param(b"<html><h1>502</h1></html>", said.HTML, id="html"),
        pytest.param(b" \r\n <!DOCTYPE html>", said.HTML, id="html-after-space"),
        pytest.param(b"", "HTTP status 400", id="nothing"),
    ],
)
def test_the_message_is_what_the_server_said_in_one_line(body, text):
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert fault(400, body).message == text
    assert faults.message_of({}, data) == text.replace("HTTP status 400", "")


def test_a_page_is_one_by_its_type_too():
    assert fault(503, b"Sorry", content_type="text/html; charset=utf-8").message.endswith(said.HTML)


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "does not accept the key"),
        (402, "balance"),
        (404, "check model and base_url"),
        (405, "check base_url"),
        (407, "proxy"),
        (413, "larger"),
        (429, "too many"),
        (502, "proxy"),
        (503, "for now"),
        (529, "overloaded"),
    ],
)
def test_the_message_says_what_to_check(status, words):
    assert words in fault(status).message
    assert fault(status, openai("Because.")).message.endswith(": Because.")


def test_a_redirect_names_its_target():
    assert "redirects to https://elsewhere/v1: check base_url" in fault(307, location="https://elsewhere/v1").message
    assert "check base_url" in fault(307).message
    assert fault(307, location="a\x1b[31m" + "x" * 9_999).message.isprintable()


@pytest.mark.parametrize(
    "body", [b"x" * 1_000_000, json.dumps({"error": "y" * 1_000_000}).encode()], ids=["text", "json"]
)
def test_a_long_message_is_cut_off(body):
    failed = fault(400, body)
    assert len(failed.message) <= said.LONGEST_MESSAGE
    assert failed.message.endswith("...")
    assert failed.body is not None
    assert len(failed.body) <= 500


@pytest.mark.parametrize("name", said.REQUEST_IDS)
def test_the_servers_name_for_the_request_is_kept(name):
    error = fault_of("openai", 500, {name: "req\n_7"}, anthropic_body(), now=NOW)
    assert error.request_id == "req _7"


def anthropic_body() -> bytes:
    return json.dumps(anthropic("api_error")).encode()


def test_the_servers_name_for_the_request_may_be_in_its_error():
    assert fault_of("anthropic", 500, {}, anthropic_body(), now=NOW).request_id == "req_7"
    assert fault(500, {"request_id": 3}).request_id is None


@pytest.mark.parametrize("body", [b"<html>\x1b", b"{}"], ids=["html", "json"])
def test_a_good_answer_that_is_none_is_a_decode_error(body):
    error = faults.unreadable(200, {"x-request-id": "r"}, body, "it has no\nchoices")
    assert type(error) is errors.DecodeError
    assert ("HTML page" in error.message, "it has no choices" in error.message) == (body[:1] == b"<", body[:1] != b"<")
    assert (error.status, error.request_id) == (200, "r")


# whatever comes

KEYS = st.sampled_from([*said.TEXTS, *said.INNER, *said.NAMES, *said.NUMBERS, "raw", "retryDelay", "loc", "request_id"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)
HEADERS = st.dictionaries(
    st.sampled_from(
        [*said.MILLISECONDS, *said.SECONDS, *said.REQUEST_IDS, "x-should-retry", "location", "content-type"]
    ),
    st.text(max_size=12) | st.sampled_from(["true", "7", "nan", "text/html", formatdate(NOW)]),
    max_size=4,
)


def is_sound(error: CallError) -> bool:
    hint = error.retry_after
    again = pickle.loads(pickle.dumps(error))
    return (
        isinstance(error, CallError)
        and error.message.isprintable()
        and 0 < len(error.message) <= 2 * said.LONGEST_MESSAGE
        and (hint is None or (isinstance(hint, float) and 0 <= hint <= said.LONGEST_HINT))
        and (error.request_id is None or error.request_id.isprintable())
        and (type(again), again.args) == (type(error), error.args)
    )


@given(st.sampled_from(DIALECTS), st.integers(100, 999), HEADERS, st.binary(max_size=80))
def test_any_bytes_make_a_sound_error(dialect, status, headers, body):
    assert is_sound(fault_of(dialect, status, headers, body, now=NOW))
    assert faults.unreadable(status, headers, body, body.decode("latin-1")).message.isprintable()


@given(st.sampled_from(DIALECTS), st.integers(100, 999), HEADERS, VALUES)
def test_any_json_makes_a_sound_error(dialect, status, headers, value):
    assert is_sound(fault_of(dialect, status, headers, msgspec.json.encode(value), now=NOW))
    assert is_sound(fault_in(dialect, value, status=status, headers=headers, now=NOW))


def test_a_body_without_end_of_levels_makes_a_sound_error():
    value: Any = "x"
    for _ in range(100_000):
        value = {"error": [value]}
    assert is_sound(fault_in("openai", value, now=NOW))
    assert is_sound(fault(400, b'{"error":' * 20_000))
    assert len(said.parts_of({"error": [{"details": [{}] * 100}] * 100})) <= said.MOST_PARTS


# the table


def test_the_docstring_shows_the_table():
    head = ("what comes", "dialect", "class", "tried again", "waits for")
    lines: list[str] = []
    for comes, *others in [head, *table()]:
        first, *more = textwrap.wrap(comes, 51, subsequent_indent="  ", break_on_hyphens=False)
        cells = zip((first, *others), (51, 7, 20, 11, 13), strict=True)
        lines += ["    " + "  ".join(cell.ljust(width) for cell, width in cells).rstrip(), *(f"    {x}" for x in more)]
    assert "\n".join(lines) in (faults.__doc__ or "")


def test_every_status_from_300_on_has_a_row_and_the_last_one_takes_all():
    statuses = {status for row in ROWS if not (row.names or row.words) for status in row.statuses}
    assert statuses >= set(range(300, 1000))
    assert ROWS[-1] == fault_rows.Row(ROWS[-1].comes, errors.ServerError)


def test_no_name_means_two_statuses():
    names = [name for row in ROWS for name in row.meaning]
    assert len(names) == len(set(names)) == len(faults.MEANINGS)


def test_no_row_is_hidden_by_the_rows_above():
    plain = [row for row in ROWS if not (row.names or row.words)]
    for at, row in enumerate(plain[:-1]):
        assert set(row.statuses) - {status for above in plain[:at] for status in above.statuses}
