"""A client for OpenAI, and for the many servers that speak the same."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, overload

import msgspec

from rxllm.clients.base import Remote
from rxllm.clients.keys import key_of
from rxllm.errors import ConfigError, check_text
from rxllm.messages import Secret
from rxllm.policies.accounting import accounting_of
from rxllm.policies.connection import Connection
from rxllm.providers.openai import OpenAIProvider
from rxllm.providers.output import Output
from rxllm.providers.presets import preset_of
from rxllm.transports.http import HttpTransport

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from typing_extensions import TypeVar as WithDefault
    from typing_extensions import Unpack

    from rxllm.messages import Request
    from rxllm.policies.accounting import Accounting
    from rxllm.providers.openai import Operation
    from rxllm.providers.presets import Preset
    from rxllm.transports.base import Transport

    T = WithDefault("T", default=str)
else:
    T = TypeVar("T")

__all__ = ["OpenAI"]

P = TypeVar("P")


class _Options(TypedDict, total=False):
    """What all clients can be given."""

    preset: Preset | str | None
    api_key: str | Secret | None
    api_key_env: str | None
    connection: Connection | None
    transport: Transport | None
    accounting: Accounting | str | None
    count_tokens: Callable[[Request], float] | None


class OpenAI(Remote[T]):
    """A client for OpenAI, and for the many servers that speak the same.

    What it answers with: text; with `output` a value of that type; with `operation="embeddings"` a vector for each
    input; with `operation="models"` the models' names. A request that names an operation of its own gets that one's.

    Args:
        model: the model's name, sent with each request that names none.
        base_url: the API's address; None: that of the preset, else OpenAI's. A query in it is sent with each call.
        operation: of what plain items stand for: "chat", "completions", "responses", "embeddings" or "models".
        output: what the answers of chats and responses are to be: a type that msgspec knows, a pydantic model or a
            JSON schema (see `Output`). What does not fit is asked for again; one that calls tools has the value None.
        preset: how the server is reached and what it does otherwise: a name in `providers.PRESETS`, or a `Preset`.
        api_key: the key itself; such a client does not pickle.
        api_key_env: the environment variable with the key, when `api_key` is not given; None: that of the preset.
        accounting: how the server counts tokens when it admits a request, an `Accounting` or a name in
            `policies.ACCOUNTING`; None: that of the preset.
        connection: how the server is reached: a proxy, certificates, further headers, …
        transport: what moves the bytes; None: HTTP to `base_url`.
        count_tokens: request -> the tokens of its prompt, for a gate that counts tokens: a tokenizer of yours. It is
            called in the loop, for each try and again for some replies. What it raises or returns amiss fails that
            request. None: an estimate from the prompt's size, which replies calibrate. The output is estimated anyway.

    Raises:
        ConfigError: no key, or an argument of another kind.

    Example:
        >>> client = OpenAI(model="any", base_url="http://127.0.0.1:8000/v1", api_key="none")
        >>> client
        OpenAI(model='any', base_url='http://127.0.0.1:8000/v1')
        >>> client.close()
        >>> with OpenAI("qwen", preset="vllm", output=list[str]) as client:
        ...     client
        OpenAI(model='qwen', base_url='http://localhost:8000/v1', output=list[str])
    """

    @overload
    def __init__(
        self: OpenAI[str],
        model: str,
        base_url: str | None = None,
        *,
        operation: Literal["chat", "completions", "responses"] = "chat",
        output: None = None,
        **options: Unpack[_Options],
    ) -> None: ...
    @overload
    def __init__(
        self: OpenAI[P],
        model: str,
        base_url: str | None = None,
        *,
        operation: Literal["chat", "responses"] = "chat",
        output: type[P] | Output[P],
        **options: Unpack[_Options],
    ) -> None: ...
    @overload
    def __init__(
        self: OpenAI[Any],
        model: str,
        base_url: str | None = None,
        *,
        operation: Literal["chat", "responses"] = "chat",
        output: Mapping[str, Any],
        **options: Unpack[_Options],
    ) -> None: ...
    @overload
    def __init__(
        self: OpenAI[list[array[float]]],
        model: str,
        base_url: str | None = None,
        *,
        operation: Literal["embeddings"],
        output: None = None,
        **options: Unpack[_Options],
    ) -> None: ...
    @overload
    def __init__(
        self: OpenAI[list[str]],
        model: str,
        base_url: str | None = None,
        *,
        operation: Literal["models"],
        output: None = None,
        **options: Unpack[_Options],
    ) -> None: ...
    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        operation: Operation = "chat",
        output: Any = None,
        preset: Preset | str | None = None,
        api_key: str | Secret | None = None,
        api_key_env: str | None = None,
        connection: Connection | None = None,
        transport: Transport | None = None,
        accounting: Accounting | str | None = None,
        count_tokens: Callable[[Request], float] | None = None,
    ) -> None:
        check_text("base_url", base_url, optional=True)
        found = preset_of(preset, base_url)
        address, mark, query = (base_url or found.base_url or "").partition("?")
        if mark:
            found = msgspec.structs.replace(found, query=query)
        self._output = None if output is None else Output.of(output)
        self.typed = self._output is not None
        if self.typed and operation not in {"chat", "responses"}:
            msg = f"output: {operation} cannot be told what their answers are to be, only chat and responses can"
            raise ConfigError(msg)
        provider: OpenAIProvider[Any] = OpenAIProvider(
            model,
            accounting=accounting_of(found.accounting if accounting is None else accounting),
            count_tokens=count_tokens,
            operation=operation,
            output=self._output,
            preset=found,
        )
        env = api_key_env or found.api_key_env
        key = None if api_key is None and env is None else key_of(api_key, env or "")
        given = {
            "model": model,
            "base_url": base_url,
            "operation": operation,
            "output": output,
            "preset": preset,
            "api_key_env": api_key_env,
            "connection": connection,
            "transport": transport,
            "accounting": provider.accounting,
            "count_tokens": count_tokens,
        }
        if transport is None:
            transport = HttpTransport(address, _headers(found, key), connection or Connection())
        elif connection is not None:
            msg = "connection: it is how HTTP reaches the server, so it does not go with a transport"
            raise ConfigError(msg)
        super().__init__(
            provider,
            transport,
            key,
            given=given if api_key is None else None,
        )
        self._base_url = address

    def __repr__(self) -> str:
        more = "" if self._output is None else f", output={self._output.called}"
        return f"{type(self).__name__}(model={self._provider.model!r}, base_url={self._base_url!r}{more})"


def _headers(preset: Preset, key: Secret | None) -> dict[str, str]:
    headers = dict(preset.headers)
    if key is not None:
        headers[preset.key_header] = f"{preset.key_prefix}{key.reveal()}"
    return headers
