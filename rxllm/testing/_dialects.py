"""What the simulated provider serves, and how its errors and headers look in each dialect. Pure but for dates."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Final, NamedTuple

from rxllm.testing._answers import CREATED, encode
from rxllm.testing._anthropic import read_messages
from rxllm.testing._embeddings import read_embeddings
from rxllm.testing._llm_engine import read_stream, read_sync
from rxllm.testing._openai import read_chat, read_completion
from rxllm.testing._quotas import go_duration
from rxllm.testing._replies import Refusal
from rxllm.testing._responses import read_response

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rxllm.testing._answers import AnswerFunction, Ask

EMPTY_BALANCE: Final = "credit_balance_exhausted"  # the code of fault "insufficient_quota"


class Dialect(NamedTuple):
    """How a vendor says what is no answer."""

    error: Callable[[Refusal, str], bytes]  # and the id of the request -> body
    limit: Callable[[bytes, float, float, float], bytes]  # unit, amount, remaining, seconds until full -> header lines
    request_id: bytes  # name of the header
    took: bytes | None = None  # name of the header that tells how many ms the answer took
    invalid: int = 400  # status of a body that cannot be read


class Route(NamedTuple):
    """What is served at one path."""

    read: Callable[[bytes, str | AnswerFunction], Ask]
    dialect: Dialect
    needs: str | None = None  # a field of the query without which there is no answer


OPENAI_ERRORS: Final[dict[int, tuple[str, str | None]]] = {  # status: type and code of its error
    400: ("invalid_request_error", None),
    401: ("authentication_error", "invalid_api_key"),
    403: ("permission_error", None),
    404: ("invalid_request_error", "not_found"),
    429: ("rate_limit_error", "rate_limit_exceeded"),
    500: ("server_error", None),
    503: ("server_error", "server_is_overloaded"),
    529: ("server_error", "server_is_overloaded"),
}
ANTHROPIC_ERRORS: Final = {  # status: type of its error
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    409: "conflict_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def openai_error(refusal: Refusal, _request_id: str = "") -> bytes:
    """Return the body of an error as OpenAI shapes it."""
    status, code = refusal.status, refusal.code
    kind, usual = OPENAI_ERRORS.get(status, OPENAI_ERRORS[_family(status)])
    if code == EMPTY_BALANCE:
        kind = "insufficient_quota"
    error = {"message": refusal.text, "type": kind, "param": refusal.param, "code": code or usual}
    return encode({"error": error})


def anthropic_error(refusal: Refusal, request_id: str) -> bytes:
    """Return the body of an error as Anthropic shapes it."""
    kind = ANTHROPIC_ERRORS.get(refusal.status, ANTHROPIC_ERRORS[_family(refusal.status)])
    error: dict[str, object] = {"type": kind, "message": refusal.text}
    if refusal.code == EMPTY_BALANCE:
        error["details"] = {"error_code": "enforced_spend_limit_reached"}
    return encode({"type": "error", "error": error, "request_id": request_id})


def llm_engine_error(refusal: Refusal, _request_id: str) -> bytes:
    """Return the body of an error as LLM Engine's framework shapes it."""
    if refusal.status == LLM_ENGINE.invalid:
        where = ["body"] if refusal.param is None else ["body", refusal.param]
        return encode({"detail": [{"type": "value_error", "loc": where, "msg": refusal.text}]})
    return encode({"detail": refusal.text})


def openai_limit(unit: bytes, amount: float, remaining: float, seconds: float) -> bytes:
    """Return what the headers say of a quota as OpenAI does."""
    return b"x-ratelimit-limit-%b: %d\r\nx-ratelimit-remaining-%b: %d\r\nx-ratelimit-reset-%b: %b\r\n" % (
        unit,
        amount,
        unit,
        remaining,
        unit,
        go_duration(seconds).encode(),
    )


def anthropic_limit(unit: bytes, amount: float, remaining: float, seconds: float) -> bytes:
    """Return what the headers say of a quota as Anthropic does: the end as an instant, in whole seconds."""
    end = datetime.now(UTC) + timedelta(seconds=seconds + 0.999)  # noqa: TID251 - it is wall time
    name = b"anthropic-ratelimit-%b" % unit
    return b"%b-limit: %d\r\n%b-remaining: %d\r\n%b-reset: %b\r\n" % (
        name,
        amount,
        name,
        remaining,
        name,
        f"{end:%Y-%m-%dT%H:%M:%SZ}".encode(),
    )


def no_limit(_unit: bytes, _amount: float, _remaining: float, _seconds: float) -> bytes:
    """Return nothing: the dialect has no such headers."""
    return b""


def _family(status: int) -> int:
    return 500 if status >= 500 else 400  # noqa: PLR2004 - the server's faults


OPENAI: Final = Dialect(openai_error, openai_limit, b"x-request-id", took=b"openai-processing-ms")
ANTHROPIC: Final = Dialect(anthropic_error, anthropic_limit, b"request-id")
LLM_ENGINE: Final = Dialect(llm_engine_error, no_limit, b"x-request-id", invalid=422)

ROUTES: Final = {
    "/v1/chat/completions": Route(read_chat, OPENAI),
    "/v1/completions": Route(read_completion, OPENAI),
    "/v1/embeddings": Route(read_embeddings, OPENAI),
    "/v1/responses": Route(read_response, OPENAI),
    "/v1/messages": Route(read_messages, ANTHROPIC),
    "/v1/llm/completions-sync": Route(read_sync, LLM_ENGINE, needs="model_endpoint_name"),
    "/v1/llm/completions-stream": Route(read_stream, LLM_ENGINE, needs="model_endpoint_name"),
}


def dialect_of(path: str) -> Dialect:
    """Return the dialect of a path, also of one that is not served."""
    if path.startswith("/v1/messages"):
        return ANTHROPIC
    return LLM_ENGINE if path.startswith("/v1/llm/") else OPENAI


def models_reply(method: str, path: str, names: Sequence[str]) -> bytes | Refusal:
    """Return the reply to what is no request for an answer: the list of models, one of them, or why there is none."""
    if path in ROUTES or (path == "/v1/models" and method != "GET"):
        return Refusal(405, "bad_method", f"Not allowed method for {method} {path}.")
    models = {name: {"id": name, "object": "model", "created": CREATED} for name in names}
    found: object = None
    if path == "/v1/models":
        found = {"object": "list", "data": list(models.values())}
    elif method == "GET":
        found = models.get(path.removeprefix("/v1/models/"))
    if found is None:
        text = f"Unknown request URL: {method} {path}. Please check the URL: it ends with /v1."
        return Refusal(404, "not_found", text)
    return encode(found)
