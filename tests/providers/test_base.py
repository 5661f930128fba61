"""HTTP's errors as ours: the class, what a person reads, and how long to wait."""

from __future__ import annotations

import json
import pickle
from email.utils import formatdate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm import errors
from rxllm.errors import CallError
from rxllm.providers import error_of, retry_after
from rxllm.providers.base import LONGEST_MESSAGE

NOW = 1_800_000_000.0
TRANSIENT = {408, 409, 425, 429}


def error(status: int, body: bytes = b"", **headers: str) -> CallError:
    return error_of(status, {name.replace("_", "-"): value for name, value in headers.items()}, body, now=NOW)


@pytest.mark.parametrize("status", range(300, 600))
def test_transient_are_408_409_425_429_and_everything_from_500_on(status):
    assert error(status).transient is (status in TRANSIENT or status >= 500)
    assert error(status).status == status


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, errors.InvalidRequestError),
        (401, errors.AuthError),
        (402, errors.BillingError),
        (403, errors.AuthError),
        (404, errors.NotFoundError),
        (405, errors.InvalidRequestError),
        (408, errors.TimeoutError),
        (409, errors.ConflictError),
        (413, errors.InvalidRequestError),
        (422, errors.InvalidRequestError),
        (425, errors.NotReadyError),
        (429, errors.RateLimitedError),
        (500, errors.ServerError),
        (501, errors.ServerError),
        (502, errors.ServerError),
        (503, errors.ServerError),
        (504, errors.ServerError),
        (529, errors.OverloadedError),
        (599, errors.ServerError),
        (300, errors.InvalidRequestError),
        (199, errors.InvalidRequestError),
    ],
)
def test_the_class_says_what_happened(status, kind):
    assert type(error(status)) is kind


@pytest.mark.parametrize("status", range(300, 600))
def test_only_429_and_529_are_refusals_that_eat_no_try(status):
    assert error(status).refusal is (status in {429, 529})


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
        (503, "for now"),
    ],
)
def test_the_message_says_what_to_check(status, words):
    assert words in str(error(status))


def test_a_redirect_names_its_target():
    assert "redirects to https://elsewhere/v1: check base_url" in str(error(307, location="https://elsewhere/v1"))
    assert "check base_url" in str(error(307))
    assert str(error(307, location="a\x1b[31m" + "x" * 9_999)).isprintable()
    assert len(str(error(307, location="x" * 9_999))) < 2 * LONGEST_MESSAGE


# what the server said


@pytest.mark.parametrize(
    ("body", "said"),
    [
        pytest.param(b'{"error":{"message":"Wrong.","type":"t","code":null}}', "Wrong.", id="openai"),
        pytest.param(b'{"type":"error","error":{"type":"t","message":"Wrong."}}', "Wrong.", id="anthropic"),
        pytest.param(b'{"error":"Wrong.","error_type":"t"}', "Wrong.", id="tgi"),
        pytest.param(b'{"detail":"Wrong."}', "Wrong.", id="detail"),
        pytest.param(b'{"detail":[{"loc":["body"],"msg":"Wrong."}]}', "Wrong.", id="fastapi"),
        pytest.param(b'{"message":"Wrong."}', "Wrong.", id="message"),
        pytest.param(b'{"error":null,"message":"Wrong."}', "Wrong.", id="null-error"),
        pytest.param(b'[{"error":{"message":"Wrong."}}]', "Wrong.", id="list"),
        pytest.param(b'"Wrong."', "Wrong.", id="json-text"),
        pytest.param(b"Wrong.", "Wrong.", id="text"),
        pytest.param(b"Wrong,\r\n  very\twrong\x00\x1b[31m.", "Wrong, very wrong [31m.", id="text-of-lines"),
        pytest.param(b'{"error":{"message":"a\\n\\u0000b"}}', "a b", id="lines-in-json"),
        pytest.param(b'{"code":7}', '{"code":7}', id="other-json"),
        pytest.param(b"[]", "[]", id="empty-list"),
        pytest.param(b"\xff\xfe", "��", id="binary"),
        pytest.param(b"<html><h1>502</h1></html>", "is an HTML page, not JSON", id="html"),
        pytest.param(b" \r\n <!DOCTYPE html>", "is an HTML page, not JSON", id="html-after-space"),
        pytest.param(b'{"error":' * 20_000, '{"error":{"error":', id="deep"),
    ],
)
def test_the_message_has_what_the_server_said_in_one_line(body, said):
    text = error(400, body).message
    assert said in text
    assert "\n" not in text
    assert text.isprintable() or "�" in text


def test_an_error_without_a_body_still_says_something():
    assert str(error(418)) == "HTTP status 418 (HTTP 418)"


@pytest.mark.parametrize(
    "body", [b"x" * 1_000_000, json.dumps({"error": "y" * 1_000_000}).encode()], ids=["text", "json"]
)
def test_a_long_message_is_cut_off(body):
    failed = error(400, body)
    assert len(failed.message) <= LONGEST_MESSAGE
    assert failed.message.endswith("...")
    assert failed.body is not None
    assert len(failed.body) <= 500


@pytest.mark.parametrize("name", ["x_request_id", "request_id"])
def test_the_servers_name_for_the_request_is_kept(name):
    assert error(500, **{name: "req_7"}).request_id == "req_7"
    assert "request id req_7" in str(error(500, **{name: "req_7"}))


@given(status=st.integers(100, 599), body=st.binary(max_size=60), kind=st.sampled_from(["text/html", "", "x"]))
def test_every_answer_makes_an_error_that_can_be_shown_and_pickled(status, body, kind):
    failed = error_of(status, {"content-type": kind, "retry-after": body.decode("latin-1")}, body, now=NOW)
    assert str(failed)
    again = pickle.loads(pickle.dumps(failed))
    assert (type(again), again.args) == (type(failed), failed.args)


# Retry-After


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        pytest.param({}, None, id="none"),
        pytest.param({"retry-after": "7"}, 7.0, id="seconds"),
        pytest.param({"retry-after": "0.25"}, 0.25, id="a-fraction"),
        pytest.param({"retry-after": " 3 "}, 3.0, id="with-space"),
        pytest.param({"retry-after": "0"}, 0.0, id="at-once"),
        pytest.param({"retry-after-ms": "1500"}, 1.5, id="milliseconds"),
        pytest.param({"retry-after-ms": "1500", "retry-after": "2"}, 1.5, id="milliseconds-go-first"),
        pytest.param({"retry-after-ms": "soon", "retry-after": "2"}, 2.0, id="bad-milliseconds-do-not"),
        pytest.param({"retry-after": formatdate(NOW + 30, usegmt=True)}, 30.0, id="date"),
        pytest.param({"retry-after": formatdate(NOW + 30, usegmt=True).replace("GMT", "+0000")}, 30.0, id="offset"),
        pytest.param({"retry-after": formatdate(NOW + 30).replace(" -0000", "")}, 30.0, id="date-without-zone"),
        pytest.param({"retry-after": formatdate(NOW - 30, usegmt=True)}, 0.0, id="date-in-the-past"),
        pytest.param({"retry-after": "-5"}, None, id="negative"),
        pytest.param({"retry-after": "inf"}, None, id="infinite"),
        pytest.param({"retry-after": "1e999"}, None, id="too-large-a-number"),
        pytest.param({"retry-after": "nan"}, None, id="nan"),
        pytest.param({"retry-after": ""}, None, id="empty"),
        pytest.param({"retry-after": "soon"}, None, id="a-word"),
        pytest.param({"retry-after": "12ms"}, None, id="a-unit"),
        pytest.param({"retry-after": "Mon, 99 Foo 2026 99:99:99 GMT"}, None, id="no-date"),
        pytest.param({"retry-after": "Mon, 01 Jan 2026 00:00:00 +9999"}, None, id="no-zone"),
        pytest.param({"retry-after": f"Mon, 01 Jan 2026 00:00:00 +{'9' * 30}"}, None, id="a-zone-beyond-all-bounds"),
        pytest.param({"retry-after": f"Mon, 01 Jan {'9' * 30} 00:00:00 GMT"}, None, id="a-year-beyond-all-bounds"),
    ],
)
def test_a_hint_is_read_or_ignored(headers, seconds):
    assert retry_after(headers, NOW) == seconds
    assert error_of(429, headers, b"", now=NOW).retry_after == seconds


@given(st.text() | st.from_regex(r"\A[A-Z][a-z]{2}, \d{1,3} [A-Z][a-z]{2} \d{1,6} \d\d:\d\d:\d\d( [+-]?\w+)?\Z"))
def test_no_hint_is_ever_an_exception_or_a_bad_number(text):
    for name in ("retry-after", "retry-after-ms"):
        seconds = retry_after({name: text}, NOW)
        assert seconds is None or 0 <= seconds < float("inf")
