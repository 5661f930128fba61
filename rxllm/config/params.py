"""How a remote API is called, as a value."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar, cast

import msgspec

from rxllm.errors import ConfigError, check_choice, check_number, check_text
from rxllm.messages import Secret
from rxllm.policies.aimd import AdaptiveConcurrencyParams
from rxllm.values import ConfigErrorMeta

__all__ = ["LIMITS", "RemoteParams", "filled"]

S = TypeVar("S", bound=msgspec.Struct)

LIMITS = {  # field -> what it counts in a minute
    "requests_per_minute": "requests",
    "input_tokens_per_minute": "input_tokens",
    "output_tokens_per_minute": "output_tokens",
}
STEPS = 8  # an adaptive limit goes from the least to the most in so many


class RemoteParams(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=ConfigErrorMeta):
    """How a remote API is called: where it is, how often and how fast. The fields are those of oumi.

    Args:
        api_url: its address, with or without the path of the operation (`/chat/completions`); None: the vendor's.
        api_key: the key itself; parameters with one do not pickle. Better name its variable.
        api_key_env_varname: the environment variable with the key. With an `api_url` and neither of the two no key is
            sent; without an `api_url` it is in the variable that the vendor's own client reads.
        max_retries: tries of each request after the first one, >= 0.
        retry_backoff_base: seconds, > 0: before the first retry a random time up to that, up to the double before the
            next, and so on. What the server asks for is waited for in full.
        retry_backoff_max: seconds, >= `retry_backoff_base`: no more than that.
        connection_timeout: seconds for a try in all, >= 0; 0: any time.
        num_workers: requests on the wire at a time, >= 1; with `use_adaptive_concurrency` at most.
        politeness_policy: seconds, >= 0, from the end of a request until another one may take its place among the
            `num_workers`; the first ones do not wait. 0: none.
        batch_completion_window: in which a batch is to be done; for jobs.
        use_adaptive_concurrency: whether the requests at a time follow the share of errors (`policies.aimd`).
        user_id: whom the requests are for. It is kept for the caller, and not sent.
        requests_per_minute: in any 60 seconds, >= 1; None: no limit.
        input_tokens_per_minute: the same.
        output_tokens_per_minute: the same.
        adaptive_concurrency: how far and how fast the requests at a time may move, as `AdaptiveConcurrencyParams` or
            as its fields. None: between 1 and `num_workers`, from the middle on, in eighths of that, and no more often
            than each second, or each `politeness_policy` less one.

    Raises:
        ConfigError: a value is of the wrong type or out of its bounds.

    >>> RemoteParams(num_workers=50, politeness_policy=60).adaptive
    AdaptiveConcurrencyParams(min_concurrency=1, max_concurrency=50, initial_concurrency_factor=0.5, \
concurrency_step=6, min_update_time=59.0, error_threshold=0.01, backoff_factor=0.8, recovery_threshold=0.005, \
min_window_size=10)
    """

    api_url: str | None = None
    api_key: str | Secret | None = None
    api_key_env_varname: str | None = None
    max_retries: int = 5
    retry_backoff_base: float = 1.0
    retry_backoff_max: float = 30.0
    connection_timeout: float = 300.0
    num_workers: int = 1
    politeness_policy: float = 0.0
    batch_completion_window: str | None = "24h"
    use_adaptive_concurrency: bool = True
    user_id: str | None = None
    requests_per_minute: int | None = None
    input_tokens_per_minute: int | None = None
    output_tokens_per_minute: int | None = None
    adaptive_concurrency: AdaptiveConcurrencyParams | Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        for name in ("api_url", "api_key_env_varname", "batch_completion_window", "user_id"):
            check_text(name, getattr(self, name), optional=True)
        if self.api_key is not None and not isinstance(self.api_key, Secret):
            msgspec.structs.force_setattr(self, "api_key", _key(self.api_key))
        check_number("max_retries", self.max_retries, least=0, integer=True)
        check_number("retry_backoff_base", self.retry_backoff_base, above=0)
        check_number("retry_backoff_max", self.retry_backoff_max, least=self.retry_backoff_base)
        check_number("connection_timeout", self.connection_timeout, least=0)
        check_number("num_workers", self.num_workers, least=1, integer=True)
        check_number("politeness_policy", self.politeness_policy, least=0)
        check_choice("use_adaptive_concurrency", self.use_adaptive_concurrency, (True, False))
        for name in LIMITS:
            check_number(name, getattr(self, name), least=1, integer=True, optional=True)
        given: object = self.adaptive_concurrency
        if given is not None and not isinstance(given, AdaptiveConcurrencyParams):
            msgspec.structs.force_setattr(self, "adaptive_concurrency", _adaptive(given))

    @property
    def adaptive(self) -> AdaptiveConcurrencyParams:
        """How the requests at a time move, if they are to."""
        if isinstance(self.adaptive_concurrency, AdaptiveConcurrencyParams):
            return self.adaptive_concurrency
        return AdaptiveConcurrencyParams(
            min_concurrency=1,
            max_concurrency=self.num_workers,
            initial_concurrency_factor=0.5,
            concurrency_step=max(1, (self.num_workers - 1) // STEPS),
            min_update_time=max(1.0, self.politeness_policy - 1.0),
        )


def _key(given: object) -> Secret:
    try:
        return Secret(cast("str", given))
    except ConfigError as error:
        reason = str(error)  # which does not show it
    msg = f"api_key: {reason}"
    raise ConfigError(msg)


def _adaptive(given: object) -> AdaptiveConcurrencyParams:
    if not isinstance(given, Mapping):
        msg = f"adaptive_concurrency must be AdaptiveConcurrencyParams, its fields or None, got {given!r}"
        raise ConfigError(msg)
    return filled(AdaptiveConcurrencyParams, cast("Mapping[str, Any]", given), "adaptive_concurrency: ")


def filled(kind: type[S], fields: Mapping[str, Any], where: str) -> S:
    """Return a `kind` with `fields`; what is wrong is said with `where` before it.

    The value of a field that there is not is not shown: the key may be in it, under a wrong name.
    """
    known = kind.__struct_fields__
    for name in fields:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"the fields are {', '.join(known)}"
            msg = f"{where}there is no field {name!r}: {hint}"
            raise ConfigError(msg)
    try:
        return kind(**fields)
    except ConfigError as error:
        reason = str(error)
    raise ConfigError(f"{where}{reason}")
