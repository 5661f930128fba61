"""A client for Scale's LLM Engine: the hosted one, and those that people run themselves."""

from __future__ import annotations

import base64
import os
from typing import TYPE_CHECKING, Any, TypedDict, TypeVar, overload

from rxllm.clients.base import Remote
from rxllm.clients.keys import key_of
from rxllm.errors import check_text
from rxllm.messages import Secret
from rxllm.policies.accounting import accounting_of
from rxllm.policies.connection import Connection
from rxllm.providers.llm_engine import LLMEngineProvider
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

__all__ = ["LLMEngine"]

SCALE_URL = "https://api.spellbook.scale.com/llm-engine"
URL_ENV = "LLM_ENGINE_BASE_PATH"
NO_KEY = "root"  # what LLM Engine's own client says to a server when it has none; one that people run takes it

P = TypeVar("P")


class _Options(TypedDict, total=False):
    """What all clients can be given."""

    api_key: str | Secret | None
    api_key_env: str
    accounting: Accounting | str
    count_tokens: Callable[[Request], float] | None
    transport: Transport | None
    connection: Connection


class LLMEngine(Remote[T]):
    """A client for the completions of Scale's LLM Engine.

    It answers with text; with `output` with a value of that type. A plain item is a prompt; parameters are given with
    `Request(body={"prompt": …, "max_new_tokens": 200}, operation="completions")`, and those that the server would
    refuse are refused before (see `providers.llm_engine`). Without `max_new_tokens` an answer has 20 tokens.

    Args:
        model: the name of the model's endpoint; a request may name another as `model`.
        base_url: the server's address, without the `/v1`; None: the environment variable LLM_ENGINE_BASE_PATH, else
            Scale's own.
        output: what the answers are to be: a type that msgspec knows, a pydantic model or a JSON schema (see `Output`).
            What does not fit is asked for again. It is sent as `guided_json`, which only servers with vLLM take.
        api_key: the key itself; such a client does not pickle.
        api_key_env: the environment variable with the key, when `api_key` is not given. A server that is not Scale's
            own gets "root" when that has none.
        accounting: how the server counts tokens when it admits a request, an `Accounting` or a name in
            `policies.ACCOUNTING`.
        count_tokens: request -> the tokens of its prompt, for a gate that counts tokens: a tokenizer of yours. It is
            called in the loop, for each try and again for some replies. What it raises or returns amiss fails that
            request. None: an estimate from the prompt's size, which replies calibrate. The output is estimated anyway.
        transport: what moves the bytes; None: HTTP to `base_url`.
        connection: how the server is reached: a proxy, certificates, further headers, …

    Raises:
        ConfigError: no key, or an argument of another kind.

    Example:
        >>> client = LLMEngine("llama-3-8b", "http://127.0.0.1:5000", api_key="none")
        >>> client
        LLMEngine(model='llama-3-8b', base_url='http://127.0.0.1:5000')
        >>> client.close()
    """

    @overload
    def __init__(
        self: LLMEngine[str],
        model: str,
        base_url: str | None = None,
        *,
        output: None = None,
        **options: Unpack[_Options],
    ) -> None: ...
    @overload
    def __init__(
        self: LLMEngine[P],
        model: str,
        base_url: str | None = None,
        *,
        output: type[P] | Output[P],
        **options: Unpack[_Options],
    ) -> None: ...
    @overload
    def __init__(
        self: LLMEngine[Any],
        model: str,
        base_url: str | None = None,
        *,
        output: Mapping[str, Any],
        **options: Unpack[_Options],
    ) -> None: ...
    def __init__(
        self,
        model: str,
        base_url: str | None = None,
        *,
        output: Any = None,
        api_key: str | Secret | None = None,
        api_key_env: str = "SCALE_API_KEY",
        accounting: Accounting | str = "generic",
        count_tokens: Callable[[Request], float] | None = None,
        transport: Transport | None = None,
        connection: Connection = Connection(),  # noqa: B008  frozen
    ) -> None:
        if base_url is None:
            base_url = os.environ.get(URL_ENV) or SCALE_URL
        self._output = None if output is None else Output.of(output)
        self.typed = self._output is not None
        provider: LLMEngineProvider[Any] = LLMEngineProvider(
            model, output=self._output, accounting=accounting_of(accounting), count_tokens=count_tokens
        )
        check_text("base_url", base_url)
        check_text("api_key_env", api_key_env)
        if api_key is None and base_url.rstrip("/") != SCALE_URL and not os.environ.get(api_key_env):
            key = Secret(NO_KEY)
        else:
            key = key_of(api_key, api_key_env)
        login = Secret(base64.b64encode(f"{key.reveal()}:".encode()).decode())  # it is the key too
        given = {
            "model": model,
            "base_url": base_url,
            "output": output,
            "api_key_env": api_key_env,
            "accounting": provider.accounting,
            "count_tokens": count_tokens,
            "transport": transport,
            "connection": connection,
        }
        super().__init__(
            provider,
            transport
            or HttpTransport(
                base_url, {"x-api-key": key.reveal(), "Authorization": f"Basic {login.reveal()}"}, connection
            ),
            key,
            spelled=(login,),
            given=given if api_key is None else None,
        )
        self._base_url = base_url

    def __repr__(self) -> str:
        more = "" if self._output is None else f", output={self._output.called}"
        return f"{type(self).__name__}(model={self._provider.model!r}, base_url={self._base_url!r}{more})"
