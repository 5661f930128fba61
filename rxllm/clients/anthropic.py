"""A client for Anthropic, and for servers that speak the same."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, overload

from rxllm.clients.base import Remote
from rxllm.clients.keys import key_of
from rxllm.errors import check_text
from rxllm.messages import Secret
from rxllm.policies.accounting import accounting_of
from rxllm.policies.connection import Connection
from rxllm.providers.anthropic import MAX_TOKENS, AnthropicProvider
from rxllm.providers.output import Output
from rxllm.transports.http import HttpTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import TypeVar as WithDefault
    from typing_extensions import Unpack

    from rxllm.messages import Request
    from rxllm.policies.accounting import Accounting
    from rxllm.transports.base import Transport

    T = WithDefault("T", default=str)
else:
    T = TypeVar("T")

__all__ = ["Anthropic"]

ANTHROPIC_URL = "https://api.anthropic.com/v1"
VERSION = "2023-06-01"

P = TypeVar("P")


class _Options(TypedDict, total=False):
    """What all clients can be given."""

    api_key: str | Secret | None
    api_key_env: str
    max_tokens: int
    version: str
    accounting: Accounting | str
    count_tokens: Callable[[Request], float] | None
    transport: Transport | None
    connection: Connection


class Anthropic(Remote[T]):
    """A client for Anthropic's messages, and for servers that speak the same.

    It answers with text; with `output` with a value of that type. A request goes as it is, in Anthropic's own form;
    only what `chat(…, system=…)` makes is put into it, and what is missing added: the model and `max_tokens`.

    Args:
        model: the model's name, sent with each request that names none.
        base_url: the API's address.
        output: what the answers are to be: a type that msgspec knows, a pydantic model or a JSON schema (see `Output`).
            What does not fit is asked for again; a reply that calls tools instead has the value None.
        api_key: the key itself; such a client does not pickle.
        api_key_env: the environment variable with the key, when `api_key` is not given.
        max_tokens: the most output tokens of an answer, for requests that do not say it: the dialect wants it said.
        version: of the API, which is sent with each request; what is in beta is switched on by a header:
            `connection=Connection(headers={"anthropic-beta": …})`.
        accounting: how the server counts tokens when it admits a request, an `Accounting` or a name in
            `policies.ACCOUNTING`. As "anthropic" does it, input that was read from a cache does not count.
        count_tokens: request -> the tokens of its prompt, for a gate that counts tokens: a tokenizer of yours. It is
            called in the loop, for each try and again for some replies. What it raises or returns amiss fails that
            request. None: an estimate from the prompt's size, which replies calibrate. The output is estimated anyway.
        transport: what moves the bytes; None: HTTP to `base_url`.
        connection: how the server is reached: a proxy, certificates, further headers, …

    Raises:
        ConfigError: no key, or an argument of another kind.

    Example:
        >>> client = Anthropic("claude-haiku-4-5", api_key="none")
        >>> client
        Anthropic(model='claude-haiku-4-5', base_url='https://api.anthropic.com/v1')
        >>> client.close()
    """

    @overload
    def __init__(
        self: Anthropic[str],
        model: str,
        base_url: str = ANTHROPIC_URL,
        *,
        output: None = None,
        **options: Unpack[_Options],
    ) -> None: ...
    @overload
    def __init__(
        self: Anthropic[P],
        model: str,
        base_url: str = ANTHROPIC_URL,
        *,
        output: type[P] | Output[P],
        **options: Unpack[_Options],
    ) -> None: ...
    @overload
    def __init__(
        self: Anthropic[Any],
        model: str,
        base_url: str = ANTHROPIC_URL,
        *,
        output: Mapping[str, Any],
        **options: Unpack[_Options],
    ) -> None: ...
    def __init__(
        self,
        model: str,
        base_url: str = ANTHROPIC_URL,
        *,
        output: Any = None,
        api_key: str | Secret | None = None,
        api_key_env: str = "ANTHROPIC_API_KEY",
        max_tokens: int = MAX_TOKENS,
        version: str = VERSION,
        accounting: Accounting | str = "anthropic",
        count_tokens: Callable[[Request], float] | None = None,
        transport: Transport | None = None,
        connection: Connection = Connection(),  # noqa: B008  frozen
    ) -> None:
        check_text("version", version)
        self._output = None if output is None else Output.of(output)
        self.typed = self._output is not None
        provider: AnthropicProvider[Any] = AnthropicProvider(
            model,
            max_tokens=max_tokens,
            output=self._output,
            accounting=accounting_of(accounting),
            count_tokens=count_tokens,
        )
        key = key_of(api_key, api_key_env)
        given = {
            "model": model,
            "base_url": base_url,
            "output": output,
            "api_key_env": api_key_env,
            "max_tokens": max_tokens,
            "version": version,
            "accounting": provider.accounting,
            "count_tokens": count_tokens,
            "transport": transport,
            "connection": connection,
        }
        headers = {"x-api-key": key.reveal(), "anthropic-version": version}
        super().__init__(
            provider,
            transport or HttpTransport(base_url, headers, connection),
            key,
            given=given if api_key is None else None,
        )
        self._base_url = base_url

    def __repr__(self) -> str:
        more = "" if self._output is None else f", output={self._output.called}"
        return f"{type(self).__name__}(model={self._provider.model!r}, base_url={self._base_url!r}{more})"
