"""A pipeline from parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from rxllm.clients.anthropic import Anthropic
from rxllm.clients.llm_engine import LLMEngine
from rxllm.clients.openai import OpenAI
from rxllm.config.params import LIMITS, RemoteParams
from rxllm.errors import ConfigError, check_choice
from rxllm.gate import Gate
from rxllm.operators.call import call
from rxllm.policies.aimd import aimd
from rxllm.policies.backoff import Backoff
from rxllm.policies.quota import SHORTEST, Quota
from rxllm.policies.timeouts import Timeouts
from rxllm.providers.presets import PRESETS, Preset

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from rxllm.clients.base import Remote
    from rxllm.messages import Chunk, Request, Restarted
    from rxllm.operators.call import Calling
    from rxllm.policies.hedging import Hedge
    from rxllm.policies.validation import Validate

__all__ = ["Dialect", "client_of", "from_params", "gate_of"]

Dialect = Literal["openai", "anthropic", "llm-engine"]

# What some put behind the base URL, since other libraries want the address of the operation. The longest go first.
PATHS: dict[Dialect, tuple[str, ...]] = {
    "openai": ("/chat/completions", "/completions", "/responses", "/embeddings"),
    "anthropic": ("/messages",),
    "llm-engine": ("/v1/llm/completions-sync", "/v1/llm/completions-stream", "/v1"),
}
NO_KEY = Preset(api_key_env=None)


class _Options(TypedDict, total=False):
    """What of `call` the parameters leave open."""

    validate: Validate | Callable[[Any], bool | None] | None
    deadline: float
    window: int | None
    ordered: bool
    on_failure: Literal["emit", "raise"]
    seed: int | None
    stream: bool
    on_chunk: Callable[[Request, Chunk | Restarted], object] | None
    hedge: Hedge | None
    single_flight: bool


def from_params(
    params: RemoteParams,
    *,
    model: str,
    dialect: Dialect = "openai",
    preset: Preset | str | None = None,
    **options: Unpack[_Options],
) -> Calling[str]:
    """Return the pipeline that `params` describe, as `call` returns it: an operator from requests to outcomes.

    A refusal (429, 529) is no failed try here: `deadline` bounds it, not `max_retries`. To share the gate between
    pipelines, or to close the client by hand, put it together yourself, of `client_of` and `gate_of`.

    Args:
        params: how the API is called.
        model: the model's name, sent with each request that names none.
        dialect: what the server speaks.
        preset: as that of `OpenAI`: where a server is, and what it does otherwise.
        options: the further arguments of `call`.

    Raises:
        ConfigError: no key where one is named, or an argument of another kind.

    Example:
        >>> import rxllm
        >>> params = RemoteParams(api_url="http://127.0.0.1:8000/v1/chat/completions", requests_per_minute=500)
        >>> haikus = rxllm.from_iterable(["Write a haiku."]).pipe(from_params(params, model="any", ordered=True))
    """
    client = client_of(params, model=model, dialect=dialect, preset=preset)
    return call(
        client,
        gate=gate_of(params, dialect=dialect),
        retry=Backoff(attempts=params.max_retries + 1, base=params.retry_backoff_base, cap=params.retry_backoff_max),
        timeouts=Timeouts(connect=None, first_byte=None, idle=None, total=params.connection_timeout or None),
        **options,
    )


def client_of(
    params: RemoteParams, *, model: str, dialect: Dialect = "openai", preset: Preset | str | None = None
) -> Remote[str]:
    """Return the client that `params` describe; the arguments are those of `from_params`.

    Raises:
        ConfigError: no key where one is named, or an argument of another kind.
    """
    check_choice("dialect", dialect, tuple(PATHS))
    if dialect != "openai" and preset is not None:
        msg = f"preset: they are of servers that speak OpenAI's dialect, and the dialect is {dialect!r}"
        raise ConfigError(msg)
    url, key, env = _base_url(params.api_url, dialect), params.api_key, params.api_key_env_varname
    if dialect == "openai":
        keyless = key is None and env is None and preset is None and url not in {None, PRESETS["openai"].base_url}
        return OpenAI(model, url, preset=NO_KEY if keyless else preset, api_key=key, api_key_env=env)
    address: dict[str, Any] = {} if url is None else {"base_url": url}
    if env is not None:
        address["api_key_env"] = env
    if dialect == "anthropic":
        return Anthropic(model, api_key=key, **address)
    return LLMEngine(model, api_key=key, **address)


def gate_of(params: RemoteParams, *, dialect: Dialect = "openai", more: Iterable[Quota] = ()) -> Gate:
    """Return the gate that `params` describe: their limits, their politeness, and how many at a time.

    Args:
        params: how the API is called.
        dialect: what the server speaks.
        more: quotas beside those limits.

    Raises:
        ConfigError: an argument of another kind.

    >>> gate_of(RemoteParams(num_workers=4, requests_per_minute=500, use_adaptive_concurrency=False))
    Gate('500 requests per 60 seconds', concurrency=4)
    """
    check_choice("dialect", dialect, tuple(PATHS))
    quotas = [
        *(Quota(limit, per=60.0, unit=unit) for name, unit in LIMITS.items() if (limit := getattr(params, name))),
        *more,
    ]
    if params.politeness_policy > 0:  # counted from their end on, as many as there are workers at a time: it is that
        polite = max(SHORTEST, params.politeness_policy)
        quotas.append(Quota(params.num_workers, per=polite, margin=0.0, charged_at="end"))
    return Gate(
        *quotas,
        concurrency=aimd(params.adaptive) if params.use_adaptive_concurrency else params.num_workers,
        accounting="anthropic" if dialect == "anthropic" else "generic",
    )


def _base_url(url: str | None, dialect: Dialect) -> str | None:
    """Return the base of an address that may be of an operation.

    >>> _base_url("https://api.openai.com/v1/chat/completions", "openai")
    'https://api.openai.com/v1'
    >>> _base_url("https://x.example/openai/completions?api-version=1", "openai")
    'https://x.example/openai?api-version=1'
    """
    if url is None:
        return None
    address, mark, query = url.partition("?")
    address = address.rstrip("/")
    for path in PATHS[dialect]:
        if address.endswith(path):
            address = address.removesuffix(path)
            break
    return f"{address}{mark}{query}"
