"""The error tree: what is transient, what pickles, what a person reads."""

import asyncio
import copy
import math
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rxllm import errors
from rxllm.errors import CallError, ConfigError, RxllmError

TRANSIENT = {
    "ConflictError",
    "ConnectionError",
    "DecodeError",
    "NotReadyError",
    "OverloadedError",
    "RateLimitedError",
    "ServerError",
    "TimeoutError",
}
REFUSALS = {"OverloadedError", "RateLimitedError"}
HALTING = {"BreakerError", "QuotaExhaustedError", "StoreError"}


def below(base: type[RxllmError]) -> list[type[RxllmError]]:
    """Return `base` and all that derive from it, in this package."""
    own = base.__module__ == "rxllm.errors"
    return [base] * own + [found for child in base.__subclasses__() for found in below(child)]


TREE = below(RxllmError)
CALL_ERRORS = [kind for kind in TREE if issubclass(kind, CallError)]


def name_of(kind: type[RxllmError]) -> str:
    return kind.__name__


def test_every_error_of_the_module_is_in_the_tree_and_in_its_picture() -> None:
    public = {name for name in errors.__all__ if name.endswith("Error")}
    assert {name_of(kind) for kind in TREE} == public
    drawn = {line.split()[0] for line in (errors.__doc__ or "").splitlines() if line.startswith(" ")}
    assert drawn == public


def test_the_picture_shows_what_derives_from_what() -> None:
    path: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        if line.startswith(" "):
            indent = len(line) - len(line.lstrip())
            path[indent] = line.split()[0]
            bases = [kind.__base__ for kind in TREE if kind.__name__ == path[indent]]
            assert [base.__name__ for base in bases if base] == [path.get(indent - 2, "Exception")]


@pytest.mark.parametrize(
    ("column", "marked"),
    [("transient", TRANSIENT), ("refusal", REFUSALS), ("halts", HALTING)],
    ids=["transient", "refusal", "halts"],
)
def test_the_picture_marks_what_is_transient_what_is_a_refusal_and_what_halts(column: str, marked: set[str]) -> None:
    lines = [line for line in (errors.__doc__ or "").splitlines() if line.startswith(" ")]
    (head,) = (line for line in lines if line.split()[0] == "CallError")
    start = head.index(column)
    assert {line.split()[0] for line in lines if "yes" in line[start : start + len(column)]} == marked


@pytest.mark.parametrize("kind", CALL_ERRORS, ids=name_of)
def test_an_error_is_transient_a_refusal_or_halting_as_its_class_says(kind: type[CallError]) -> None:
    error = kind("no")
    assert errors.is_transient(error) is (kind.__name__ in TRANSIENT)
    assert error.refusal is (kind.__name__ in REFUSALS)
    assert error.halts is (kind.__name__ in HALTING)


def test_a_wrong_use_halts_no_stream_unless_that_one_says_so() -> None:
    error = ConfigError("the cost names no tokns")
    assert not error.halts
    error.halts = True
    assert pickle.loads(pickle.dumps(error)).halts
    assert not ConfigError("another").halts


def test_no_error_derives_from_a_builtin_that_users_catch_for_other_reasons() -> None:
    for kind in TREE:
        assert not issubclass(kind, (OSError, ValueError, TypeError, AssertionError, asyncio.CancelledError))


def test_a_timeout_is_not_transient_once_the_deadline_has_passed() -> None:
    error = errors.TimeoutError("too late", phase="deadline")
    assert not errors.is_transient(error)
    assert not errors.is_transient(pickle.loads(pickle.dumps(error)))
    assert errors.TimeoutError.transient


def test_one_error_may_differ_from_its_class_and_keeps_that_in_a_pickle() -> None:
    error = errors.ServerError("x-should-retry: false", 500)
    error.transient = False
    assert not errors.is_transient(copy.copy(error))
    assert not errors.is_transient(pickle.loads(pickle.dumps(error)))
    assert errors.is_transient(errors.ServerError("another", 500))


def test_a_foreign_error_is_transient_only_if_it_says_exactly_true() -> None:
    class Foreign(Exception):  # noqa: N818 - as foreign as can be
        transient: Any = True

    assert errors.is_transient(Foreign())
    for doubtful in ("yes", 1, None):
        Foreign.transient = doubtful
        assert not errors.is_transient(Foreign())
    assert not errors.is_transient(OSError())
    assert not errors.is_transient(KeyboardInterrupt())


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, lambda e: pickle.loads(pickle.dumps(e))])
@pytest.mark.parametrize("kind", CALL_ERRORS, ids=name_of)
def test_a_call_error_keeps_its_facts_in_copies_and_pickles(
    kind: type[CallError], duplicate: Callable[[CallError], CallError]
) -> None:
    error = kind("slow down", 429, 2.5, "req_1", "b" * 900)
    twin = duplicate(error)
    assert type(twin) is kind
    assert vars(twin) == vars(error)
    assert (twin.message, twin.status, twin.retry_after, twin.request_id) == ("slow down", 429, 2.5, "req_1")
    assert twin.args == error.args
    assert str(twin) == str(error)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_timeout_keeps_its_phase_in_every_pickle_protocol(protocol: int) -> None:
    error = errors.TimeoutError("late", phase="first_byte")
    twin = pickle.loads(pickle.dumps(error, protocol))
    assert (twin.phase, twin.args) == ("first_byte", ("late", None, None, None, None, "first_byte"))


def test_errors_that_are_not_about_a_call_pickle_too() -> None:
    twin = pickle.loads(pickle.dumps(ConfigError("window must be > 0")))
    assert (type(twin), str(twin)) == (ConfigError, "window must be > 0")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        pytest.param(CallError("slow down"), "slow down", id="message-alone"),
        pytest.param(CallError("slow down", 429), "slow down (HTTP 429)", id="with-status"),
        pytest.param(CallError("no", None, None, "req_1"), "no (request id req_1)", id="with-request-id"),
        pytest.param(CallError("no", 500, 1.0, "r"), "no (HTTP 500, request id r)", id="with-both"),
    ],
)
def test_a_person_reads_the_message_and_the_facts_that_exist(error: CallError, text: str) -> None:
    assert str(error) == text


@pytest.mark.parametrize("encoded", [False, True], ids=["text", "bytes"])
@pytest.mark.parametrize("piece", ["a", "é", "한", "🙂"])
@pytest.mark.parametrize("length", [0, 1, 499, 500, 501, 502, 5000])
def test_a_body_is_kept_up_to_500_characters(piece: str, length: int, encoded: bool) -> None:
    body = piece * length
    kept = CallError("no", body=body.encode() if encoded else body).body
    assert kept == (body if length <= 500 else piece * 497 + "...")


@given(st.binary(max_size=400))
def test_bytes_are_decoded_whatever_they_are(body: bytes) -> None:
    assert CallError("no", body=body).body == body.decode("utf-8", "replace")


def test_no_body_stays_none() -> None:
    assert CallError("no").body is None


def test_the_full_body_is_nowhere_in_the_error() -> None:
    error = CallError("no", body="a" * 600 + "SENTINEL")
    assert "SENTINEL" not in repr(error)
    assert b"SENTINEL" not in pickle.dumps(error)
    assert "SENTINEL" not in "".join(traceback.format_exception(error))


def says(check: Callable[[], None]) -> str | None:
    """Return what the ConfigError of a check says; None if it passes."""
    try:
        check()
    except ConfigError as wrong:
        return str(wrong)
    return None


class Unshowable:
    def __repr__(self) -> str:
        raise RuntimeError


NUMBERS: list[tuple[object, dict[str, Any], str | None]] = [
    (1, {}, None),
    (-2.5, {}, None),
    (0, {"least": 0}, None),
    (5, {"most": 5}, None),
    (None, {"optional": True, "least": 1}, None),
    (10**18, {"integer": True}, None),
    (0, {"above": 0}, "size must be a finite number > 0, got 0"),
    (-1, {"least": 0, "integer": True}, "size must be a whole number >= 0, got -1"),
    (6, {"above": 0, "most": 5}, "size must be a finite number > 0 and <= 5, got 6"),
    (1.0, {"integer": True}, "size must be a whole number, got 1.0"),
    (True, {}, "size must be a finite number, got True"),
    (False, {"integer": True, "least": 0}, "size must be a whole number >= 0, got False"),
    ("5", {}, "size must be a finite number, got '5'"),
    (None, {}, "size must be a finite number, got None"),
    ([], {"optional": True}, "size must be a finite number or None, got []"),
    (math.nan, {}, "size must be a finite number, got nan"),
    (math.nan, {"least": 0}, "size must be a finite number >= 0, got nan"),
    (math.inf, {"least": 0}, "size must be a finite number >= 0, got inf"),
    (-math.inf, {"most": 0}, "size must be a finite number <= 0, got -inf"),
    (10**5000, {}, "size must be a finite number, got <int>"),
    ("x" * 100, {}, f"size must be a finite number, got '{'x' * 76}..."),
    (Unshowable(), {}, "size must be a finite number, got <Unshowable>"),
]


@pytest.mark.parametrize(
    ("value", "bounds", "text"),
    NUMBERS,
    ids=[text or f"{value}-{bounds}-is-good" for value, bounds, text in NUMBERS],
)
def test_a_number_is_checked_for_kind_and_bounds(value: object, bounds: dict[str, Any], text: str | None) -> None:
    assert says(lambda: errors.check_number("size", value, **bounds)) == text


@pytest.mark.parametrize(
    ("value", "options", "text"),
    [
        ("a", {}, None),
        ("", {"empty": True}, None),
        (None, {"optional": True}, None),
        ("", {}, "name must be a string that is not empty, got ''"),
        ("", {"optional": True}, "name must be a string that is not empty or None, got ''"),
        (b"a", {"empty": True}, "name must be a string, got b'a'"),
        (None, {}, "name must be a string that is not empty, got None"),
    ],
)
def test_a_text_is_checked_for_kind_and_content(value: object, options: dict[str, bool], text: str | None) -> None:
    assert says(lambda: errors.check_text("name", value, **options)) == text


def test_a_callable_is_checked() -> None:
    assert says(lambda: errors.check_callable("mapper", len)) is None
    assert says(lambda: errors.check_callable("mapper", None, optional=True)) is None
    assert says(lambda: errors.check_callable("mapper", None)) == "mapper must be callable, got None"
    assert says(lambda: errors.check_callable("mapper", 3, optional=True)) == "mapper must be callable or None, got 3"


def test_a_choice_is_checked_by_kind_too() -> None:
    class Odd:
        def __eq__(self, other: object) -> bool:
            raise RuntimeError

        __hash__ = None  # type: ignore[assignment]

    assert says(lambda: errors.check_choice("n", 1, {1, 2})) is None
    assert says(lambda: errors.check_choice("n", "a", iter("ab"))) is None
    assert says(lambda: errors.check_choice("n", True, (1, 2))) == "n must be 1 or 2, got True"
    assert says(lambda: errors.check_choice("n", ["a"], ("a",))) == "n must be 'a', got ['a']"
    assert (says(lambda: errors.check_choice("n", Odd(), ("a",))) or "").startswith("n must be 'a', got <")
