"""The table of `faults`, as data: what servers say instead of an answer, and which error of ours it is."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from rxllm import errors
from rxllm.providers.said import name_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rxllm.errors import CallError

__all__ = ["ROWS", "Row"]


class Row(NamedTuple):
    """One row of the table: what comes, and which error it is.

    It fits when the status is one of `statuses`, the dialect is one of `dialects`, and one of `names` or of `words`
    is found; what is empty fits always. To an error without a status rows fit by names and words alone.
    """

    comes: str  # for a person, beside the statuses
    kind: type[CallError]
    statuses: Sequence[int] = ()
    names: frozenset[str] = frozenset()  # codes and types, as `name_for` writes them
    words: tuple[str, ...] = ()  # parts of the message, in lower case
    dialects: frozenset[str] = frozenset()
    meaning: frozenset[str] = frozenset()  # names that stand for the first status where none is told
    advice: str = ""  # what to check; goes before what the server said


def _names(text: str) -> frozenset[str]:
    return frozenset(map(name_for, text.split()))


WRONG = (400, 403, 413, 422, 500)  # of a wrong request; 403 is Together's and OpenRouter's, 500 that of a gateway
OPENAI = frozenset({"openai"})

ROWS: tuple[Row, ...] = (
    # Said by names and by texts, which know more than the status.
    Row(
        "a content filter: `content_filter` (Azure), `content_policy_violation`, a prompt that was flagged",
        errors.ContentFilterError,
        WRONG,
        _names(
            "content_filter content_filtered content_policy_violation image_content_policy_violation "
            "moderation_blocked ResponsibleAIPolicyViolation"
        ),
        (
            "content management policy",
            "content filtering policy",
            "contentpolicyviolationerror",  # litellm
            "flagged as potentially violating",
            "input was flagged",
            "requires moderation",
            "violates our usage",
            "violates the usage",
        ),
    ),
    Row(
        'too many tokens for the model: `context_length_exceeded`, `exceed_context_size_error`, "prompt is too long"',
        errors.ContextOverflowError,
        WRONG,
        _names(
            "context_length_exceeded context_window_exceeded exceed_context_size_error ContextWindowExceededError "
            "ContextLengthExceededError"
        ),
        (
            "maximum context length",  # OpenAI, vLLM, OpenRouter
            "maximum context window",
            "max_model_len",  # vLLM
            "exceeds the context window",  # OpenAI
            "reduce the length of the messages",  # Groq, Azure
            "input tokens exceed",  # Azure
            "prompt is too long",  # Anthropic, Fireworks
            "exceed context limit",  # Anthropic
            "max_new_tokens` must be",  # TGI, Together
            "`inputs` must have less than",  # TGI
            "exceeds the available context size",  # llama.cpp
            "than the context length",  # LM Studio
            "than the model's context length",  # SGLang
            "exceeds the maximum number of tokens",  # Google
            "maximum prompt length",  # xAI
            "too large for model with",  # Mistral
            "input is too long for",  # Bedrock
            "contextwindowexceedederror",  # litellm
        ),
    ),
    Row(
        "money in flight: the running requests fill OpenRouter's budget",
        errors.RateLimitedError,
        (402,),
        _names("openrouter_in_flight_budget in_flight_budget_exhausted"),
        dialects=OPENAI,
    ),
    Row(
        "no money: `insufficient_quota` with its codes, spend limits (Anthropic, OpenRouter, litellm), a low balance",
        errors.BillingError,
        (400, 402, 403, 429),
        _names(
            "insufficient_quota credit_balance_exhausted organization_spend_limit_exceeded "
            "organization_usage_limit_exceeded project_spend_limit_exceeded billing_hard_limit_reached "
            "billing_not_active contract_spend_limit_reached enforced_spend_limit_reached billing_error "
            "budget_exceeded openrouter_credits openrouter_guardrail_budget openrouter_key_limit "
            "openrouter_workspace_budget"
        ),
        (
            "credit balance is too low",  # Anthropic
            "reached your specified api usage limits",
            "reached your specified workspace api usage limits",
            "extra usage is required",
            "budget has been exceeded",  # litellm
            "key limit exceeded",  # OpenRouter
            "used all available credits",  # xAI
        ),
    ),
    Row(
        '"Request too large" for a quota as a whole',
        errors.InvalidRequestError,
        (413, 429),
        words=("request too large",),
    ),
    Row(
        "a quota that renews, of Azure's API Management",
        errors.RateLimitedError,
        (403,),
        _names("quota_exceeded"),
        ("quota will be replenished", "out of call volume quota", "out of bandwidth quota", "quota exceeded"),
    ),
    Row(
        "throttling that AWS calls by name",
        errors.RateLimitedError,
        (400,),
        _names("ThrottlingException Throttling TooManyRequestsException"),
        dialects=OPENAI,
    ),
    Row(
        "a model that is still loading (llama.cpp, Hugging Face, Bedrock)",
        errors.NotReadyError,
        (429, 503),
        _names("ModelNotReadyException"),
        ("loading model", "is loading", "is currently loading", "is still loading"),
    ),
    Row(
        "too busy: `server_is_overloaded`, `overloaded_error`, `capacity_exceeded`, TGI's `overloaded`",
        errors.OverloadedError,
        (429, 498, 503),
        _names(
            "server_is_overloaded overloaded_error overloaded engine_overloaded engine_overloaded_error "
            "provider_overloaded capacity_exceeded service_tier_capacity_exceeded no_capacity"
        ),
        ("overloaded", "server busy", "server is busy"),
    ),
    Row("`slow_down`", errors.OverloadedError, (503,), _names("slow_down")),
    Row(
        "a key that Google calls a bad request",
        errors.AuthError,
        (400,),
        _names("API_KEY_INVALID invalid_api_key"),
        ("api key not valid",),
        OPENAI,
    ),
    # Said by the status alone, or by names that mean it.
    Row(
        "",
        errors.InvalidRequestError,
        (400, 422),
        meaning=_names(
            "invalid_request_error BadRequestError invalid_request invalid_prompt INVALID_ARGUMENT FAILED_PRECONDITION "
            "ValidationException validation UnprocessableEntityError"
        ),
    ),
    Row(
        "",
        errors.AuthError,
        (401,),
        meaning=_names("authentication_error invalid_api_key UNAUTHENTICATED AuthenticationError"),
        advice="the server does not accept the key",
    ),
    Row("", errors.BillingError, (402,), meaning=_names("billing_error"), advice="the balance is empty"),
    Row(
        "",
        errors.AuthError,
        (403,),
        meaning=_names("permission_error PERMISSION_DENIED PermissionDeniedError AccessDeniedException"),
        advice="the key is not allowed to do this",
    ),
    Row(
        "",
        errors.NotFoundError,
        (404, 410),
        meaning=_names("not_found_error NOT_FOUND model_not_found ResourceNotFoundException"),
        advice="the server has no such model or path: check model and base_url (it usually ends in /v1)",
    ),
    Row(
        "",
        errors.InvalidRequestError,
        (405,),
        advice="the server does not take this here: check base_url (it usually ends in /v1)",
    ),
    Row("", errors.InvalidRequestError, (407,), advice="a proxy wants a login"),
    Row("", errors.TimeoutError, (408,), meaning=_names("ModelTimeoutException Timeout")),
    Row("", errors.ConflictError, (409,), meaning=_names("conflict_error ABORTED")),
    Row(
        "",
        errors.InvalidRequestError,
        (413,),
        meaning=_names("request_too_large"),
        advice="the request is larger than the server takes",
    ),
    Row(
        "a model that failed (TGI's `generation`, Bedrock)",
        errors.ServerError,
        (424,),
        meaning=_names("generation ModelErrorException ModelStreamErrorException"),
    ),
    Row("", errors.NotReadyError, (425,)),
    Row(
        "throttling, Anthropic's `ramp_limit_exceeded`, Cloudflare's 1015",
        errors.RateLimitedError,
        (429,),
        meaning=_names(
            "rate_limit_error rate_limit_exceeded slow_down RESOURCE_EXHAUSTED ramp_limit_exceeded RateLimitError "
            "ThrottlingException TooManyRequestsException"
        ),
        advice="too many requests or tokens for now",
    ),
    Row("", errors.ConnectionError, (499,), advice="somebody in between hung up"),
    Row("", errors.UnsupportedError, (501,), meaning=_names("UNIMPLEMENTED"), advice="the server cannot do this"),
    Row(
        "",
        errors.ServerError,
        (503,),
        meaning=_names("UNAVAILABLE unavailable_error ServiceUnavailableError ServiceUnavailableException"),
        advice="the server cannot answer for now",
    ),
    Row(
        "a proxy got no answer",
        errors.ServerError,
        (504, 502, *range(520, 527)),
        meaning=_names("timeout_error DEADLINE_EXCEEDED"),
        advice="the proxy in front of the server got no answer from it",
    ),
    Row(
        "",
        errors.OverloadedError,
        (529, 498),
        meaning=_names("overloaded_error server_is_overloaded overloaded capacity_exceeded"),
        advice="the server is overloaded",
    ),
    Row(
        "anything else",
        errors.ServerError,
        range(500, 1000),
        meaning=_names("api_error server_error InternalServerError INTERNAL incomplete_generation"),
    ),
    Row("a redirect, which is not followed", errors.InvalidRequestError, range(300, 400)),
    Row("anything else", errors.InvalidRequestError, range(400, 500)),
    Row("an error in a stream that tells neither a status nor a name that is known", errors.ServerError),
)
