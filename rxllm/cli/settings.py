"""What a run is told: on the command line, by the run before, and by a configuration file."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any, Literal

import msgspec

from rxllm.cli.inputs import FORMATS, STDIN, Input, Shape, Template
from rxllm.clients.anthropic import Anthropic
from rxllm.clients.llm_engine import LLMEngine
from rxllm.clients.openai import OpenAI
from rxllm.config import RemoteParams, client_of, gate_of, load
from rxllm.errors import ConfigError, check_choice, check_number, check_text
from rxllm.gate import Gate
from rxllm.policies.backoff import Backoff
from rxllm.policies.follow import pace_and_follow
from rxllm.policies.prices import Prices
from rxllm.policies.quota import Quota
from rxllm.policies.timeouts import Timeouts
from rxllm.providers.presets import Preset, preset_of
from rxllm.values import ConfigErrorMeta

__all__ = ["UNNAMED", "Settings", "recall", "record"]

DIALECTS = ("openai", "anthropic", "llm-engine")
BUDGETS = ("requests", "tokens", "usd", "seconds")
NO_KEY = Preset(api_key_env=None)
UNNAMED = "unnamed"  # the model of a client whose requests all name theirs
NOWHERE = "http://localhost"  # of a client that sends nothing


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=ConfigErrorMeta):
    """What a run is told. The fields are the options of the command line; None: not given.

    Raises:
        ConfigError: a value is of the wrong type or out of its bounds.
    """

    input: str
    model: str | None = None
    output: str | None = None
    format: Literal["jsonl", "csv", "tsv", "parquet"] | None = None
    url: str | None = None
    dialect: Literal["openai", "anthropic", "llm-engine"] = "openai"
    preset: str | None = None
    api_key_env: str | None = None
    config: str | None = None
    section: str | None = None
    rpm: float | None = None
    tpm: float | None = None
    concurrency: int | Literal["auto"] | None = None
    latency: float | None = None
    budget: dict[str, float] | None = None
    prices: str | None = None
    template: str | None = None
    system: str | None = None
    id_column: str | None = None
    param: dict[str, Any] | None = None
    stream: bool = False
    max_retries: int | None = None
    deadline: float | None = None
    timeout: float | None = None
    grace: float = 30.0

    def __post_init__(self) -> None:
        check_text("input", self.input)
        check_text("model", self.model, optional=True)
        if self.output == STDIN:
            msg = (
                f"output: the results are the journal that the next run goes on by, so they need a file, got {STDIN!r}:"
                " write one, and read that"
            )
            raise ConfigError(msg)
        check_choice("dialect", self.dialect, DIALECTS)
        check_choice("format", self.format, (*FORMATS, None))
        for name in ("rpm", "tpm", "latency", "deadline", "timeout"):
            check_number(name, getattr(self, name), above=0, optional=True)
        check_number("max_retries", self.max_retries, least=0, integer=True, optional=True)
        check_number("grace", self.grace, least=0)
        if self.concurrency != "auto":
            check_number("concurrency", self.concurrency, least=1, integer=True, optional=True)
        for kind, limit in (self.budget or {}).items():
            check_choice("budget", kind, BUDGETS)
            check_number(f"budget: {kind}", limit, above=0)
        if self.budget and "usd" in self.budget and self.prices is None:
            msg = f"prices: the budget usd={self.budget['usd']:g} needs a file with the prices of the models"
            raise ConfigError(msg)
        if self.config is None and self.section is not None:
            msg = f"section: it is one of a config file, and there is none, got {self.section!r}"
            raise ConfigError(msg)

    def source(self) -> Input:
        """Return the requests.

        Raises:
            ConfigError: the file or the template cannot be used.
        """
        shape = Shape(
            template=None if self.template is None else Template(self.template),
            system=self.system,
            params=self.param or {},
            id_column=self.id_column,
            operation="completions" if self.dialect == "llm-engine" else "chat",
            named=self.model is None,
        )
        return Input(None if self.input == STDIN else Path(self.input), shape, self.format)

    def price_list(self) -> Prices | None:
        """Return what models cost, if that is known; that of the model is.

        Raises:
            ConfigError: the file cannot be used, or has no price of the model.
        """
        if self.prices is None:
            return None
        prices = Prices.load(self.prices)
        if self.model is not None:
            prices.price(self.model)
        return prices

    def remote(self) -> RemoteParams:
        """Return how the API is called: what the config says, and what was given besides, but for the limits of that.

        Raises:
            ConfigError: the config cannot be used, or has a key in it.
        """
        params = RemoteParams() if self.config is None else load(self.config, section=self.section)
        if params.api_key is not None:
            msg = f"{self.config}: api_key: keys come from the environment; name the variable in api_key_env_varname"
            raise ConfigError(msg)
        given: dict[str, Any] = {
            "api_url": self.url,
            "api_key_env_varname": self.api_key_env,
            "max_retries": self.max_retries,
            "connection_timeout": self.timeout,
        }
        if self.concurrency is not None:
            given["use_adaptive_concurrency"] = self.concurrency == "auto"
            given["num_workers"] = None if self.concurrency == "auto" else self.concurrency
        changed = {name: value for name, value in given.items() if value is not None}
        if self.rpm is not None:  # which `quotas` has
            changed["requests_per_minute"] = None
        if self.tpm is not None:
            changed |= {"input_tokens_per_minute": None, "output_tokens_per_minute": None}
        return msgspec.structs.replace(params, **changed)

    def client(self) -> Any:
        """Return what the requests are sent with.

        Raises:
            ConfigError: no key, or a setting of another kind.
        """
        try:
            return client_of(self.remote(), model=self.model or UNNAMED, dialect=self.dialect, preset=self.preset)
        except ConfigError as error:
            reason = str(error)
        if reason.startswith("no key"):  # what is said to those who write code is no help here
            reason = f"{reason.partition(',')[0]}, or name another one with --api-key-env"
        raise ConfigError(reason)

    def counter(self) -> Any:
        """Return a client that knows what requests take, and needs no key; nothing is sent with it."""
        model = self.model or UNNAMED
        if self.dialect == "anthropic":
            return Anthropic(model, api_key="none")
        if self.dialect == "llm-engine":
            return LLMEngine(model, NOWHERE, api_key="none")
        return OpenAI(model, NOWHERE, preset=NO_KEY)

    def quotas(self) -> tuple[Quota, ...]:
        """Return the limits that were given: requests and tokens a minute."""
        given = (("requests", self.rpm), ("tokens", self.tpm))
        # Of half a request a minute none would ever fit: that is one in two minutes.
        return tuple(Quota(max(1, n), per=60.0 * max(1, 1 / n), unit=unit) for unit, n in given if n is not None)

    def gate(self) -> Gate:
        """Return where attempts wait: that of the config, with the limits given in place of its own, or without one.

        Raises:
            ConfigError: a setting of another kind.
        """
        if self.config is not None:
            return gate_of(self.remote(), dialect=self.dialect, more=self.quotas())
        if self.dialect == "openai":
            accounting = preset_of(self.preset, self.url).accounting
        else:
            accounting = "anthropic" if self.dialect == "anthropic" else "generic"
        fixed = self.concurrency if isinstance(self.concurrency, int) else None
        return Gate(*self.quotas(), concurrency=fixed or pace_and_follow(), accounting=accounting)

    def workers(self) -> int | None:
        """Return how many requests there are at a time; None: that is found out."""
        if self.concurrency is not None:
            return self.concurrency if isinstance(self.concurrency, int) else None
        params = None if self.config is None else self.remote()
        return None if params is None or params.use_adaptive_concurrency else params.num_workers

    def backoff(self) -> Backoff:
        """Return how often and when requests are tried again."""
        if self.config is None:
            return Backoff() if self.max_retries is None else Backoff(attempts=self.max_retries + 1)
        params = self.remote()
        return Backoff(attempts=params.max_retries + 1, base=params.retry_backoff_base, cap=params.retry_backoff_max)

    def timeouts(self) -> Timeouts:
        """Return how long a try may take."""
        if self.config is None:
            return Timeouts(total=self.timeout)
        return Timeouts(connect=None, first_byte=None, idle=None, total=self.remote().connection_timeout or None)


def recall(output: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what the last run that wrote `output` was told; nothing if that is not known.

    Raises:
        ConfigError: the file beside the output that says it cannot be used.
    """
    beside = _beside(output)
    try:
        return msgspec.json.decode(beside.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        return {}
    except OSError as error:
        reason = f"it cannot be read: {error.strerror}"
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = f"{error}"
    msg = f"{beside}: {reason}; remove it, and say again what the run was told"
    raise ConfigError(msg)


def record(output: str | os.PathLike[str], given: dict[str, Any]) -> None:
    """Keep beside `output` what its run was told, for those who ask again; there is no key in it.

    Raises:
        ConfigError: it cannot be written.
    """
    beside = _beside(output)
    fresh = beside.with_name(f"{beside.name}.new")
    try:
        fresh.write_bytes(msgspec.json.format(msgspec.json.encode(given), indent=2) + b"\n")
        fresh.replace(beside)  # so that nobody reads half of it
    except OSError as error:
        with contextlib.suppress(OSError):
            fresh.unlink()
        msg = f"cannot write {beside}: {error.strerror}"
        raise ConfigError(msg) from None


def _beside(output: str | os.PathLike[str]) -> Path:
    path = Path(output)
    return path.with_name(f"{path.name}.run.json")
