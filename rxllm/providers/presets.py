"""Servers that speak OpenAI's dialect: where they are, how they take a key, and what they do otherwise."""

from __future__ import annotations

import msgspec

from rxllm.errors import ConfigError, check_choice, check_text
from rxllm.policies.connection import check_headers
from rxllm.values import ConfigErrorMeta

__all__ = ["PRESETS", "Preset", "preset_of"]


class Preset(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, metaclass=ConfigErrorMeta):
    """How a server that speaks OpenAI's dialect is reached, and what it does otherwise.

    A request goes as it is, whatever the server makes of it: what a preset changes is what the library adds.

    Args:
        base_url: of the API; None: there is none that all share.
        example: what such an address looks like, for the error when it is missing.
        api_key_env: the environment variable with the key; None: it needs no key.
        key_header: the header that the key goes into.
        key_prefix: what stands before the key there.
        headers: further ones; no keys here, as presets are shown.
        query: what is added to each path: "api-version=2024-10-21".
        deployments: each model has a path of its own, as Azure's first API has.
        accounting: how it counts tokens when it admits a request: a name in `policies.ACCOUNTING`.
        stream_usage: streamed answers are asked for their usage (`stream_options`).
        base64: embeddings are asked for as base64, which is a quarter of the size and a tenth of the work.

    Raises:
        ConfigError: a value of the wrong type.

    >>> PRESETS["groq"].base_url, PRESETS["groq"].api_key_env
    ('https://api.groq.com/openai/v1', 'GROQ_API_KEY')
    >>> msgspec.structs.replace(PRESETS["azure"], query="api-version=2025-04-01-preview").deployments
    True
    """

    base_url: str | None = None
    example: str = "http://localhost:8000/v1"
    api_key_env: str | None = "OPENAI_API_KEY"
    key_header: str = "Authorization"
    key_prefix: str = "Bearer "
    headers: dict[str, str] = {}
    query: str = ""
    deployments: bool = False
    accounting: str = "generic"
    stream_usage: bool = True
    base64: bool = True

    def __post_init__(self) -> None:
        check_text("base_url", self.base_url, optional=True)
        check_text("api_key_env", self.api_key_env, optional=True)
        check_text("key_header", self.key_header)
        check_text("key_prefix", self.key_prefix, empty=True)
        check_text("query", self.query, empty=True)
        check_headers(self.headers)
        for name in ("deployments", "stream_usage", "base64"):
            check_choice(name, getattr(self, name), (True, False))


# Facts as of 2026. Each line says where it is from. Asking for base64, and for the usage of streams, is left out where
# it is known to be refused: OpenAI's own client asks everybody for base64, and nearly all take both.

PRESETS: dict[str, Preset] = {
    "openai": Preset(base_url="https://api.openai.com/v1", accounting="openai"),
    # Paths, query and header: the AzureOpenAI client in the openai package. The version is the last one that is no
    # preview (learn.microsoft.com: azure/ai-foundry/openai/reference); it takes stream_options (griptape issue 1640).
    "azure": Preset(
        example="https://YOUR-RESOURCE.openai.azure.com/openai",
        api_key_env="AZURE_OPENAI_API_KEY",
        key_header="api-key",
        key_prefix="",
        query="api-version=2024-10-21",
        deployments=True,
        accounting="azure_openai",
    ),
    # The newer API, without versions: learn.microsoft.com, azure/ai-foundry/openai/api-version-lifecycle
    "azure_v1": Preset(
        example="https://YOUR-RESOURCE.openai.azure.com/openai/v1",
        api_key_env="AZURE_OPENAI_API_KEY",
        key_header="api-key",
        key_prefix="",
        accounting="azure_openai",
    ),
    # docs.deepseek.com speaks of both api.deepseek.com and this
    "deepseek": Preset(base_url="https://api.deepseek.com/v1", api_key_env="DEEPSEEK_API_KEY"),
    # docs.fireworks.ai/tools-sdks/openai-compatibility
    "fireworks": Preset(base_url="https://api.fireworks.ai/inference/v1", api_key_env="FIREWORKS_API_KEY"),
    # ai.google.dev/gemini-api/docs/openai
    "gemini": Preset(base_url="https://generativelanguage.googleapis.com/v1beta/openai", api_key_env="GEMINI_API_KEY"),
    # console.groq.com/docs/openai
    "groq": Preset(base_url="https://api.groq.com/openai/v1", api_key_env="GROQ_API_KEY", accounting="groq"),
    # docs.litellm.ai/docs/proxy/quick_start for the port; it refuses encoding_format for some of the servers behind it
    # (BerriAI/litellm pull request 17150, issue 42426)
    "litellm": Preset(base_url="http://localhost:4000/v1", api_key_env="LITELLM_API_KEY", base64=False),
    # ggml-org/llama.cpp, tools/server: port 8080; base64 since its issue 10887
    "llamacpp": Preset(base_url="http://localhost:8080/v1", api_key_env=None),
    # lmstudio.ai/docs/developer/openai-compat
    "lmstudio": Preset(base_url="http://localhost:1234/v1", api_key_env=None),
    # 422 "extra_forbidden" for stream_options.include_usage: BerriAI/litellm issue 8978, avante.nvim issue 2347
    "mistral": Preset(base_url="https://api.mistral.ai/v1", api_key_env="MISTRAL_API_KEY", stream_usage=False),
    # docs.ollama.com/api/openai-compatibility: a key is ignored, include_usage is taken
    "ollama": Preset(base_url="http://localhost:11434/v1", api_key_env=None),
    # openrouter.ai/docs
    "openrouter": Preset(base_url="https://openrouter.ai/api/v1", api_key_env="OPENROUTER_API_KEY"),
    # huggingface.co/docs/text-generation-inference/messages_api: the port is the one of its examples
    "tgi": Preset(base_url="http://localhost:3000/v1", api_key_env=None),
    # docs.together.ai/docs/inference/openai-compatibility
    "together": Preset(base_url="https://api.together.ai/v1", api_key_env="TOGETHER_API_KEY"),
    # docs.vllm.ai, serving/openai_compatible_server: port 8000; base64 since pull request 5935
    "vllm": Preset(base_url="http://localhost:8000/v1", api_key_env=None, accounting="vllm"),
}

ANY = Preset()  # nothing is known of it


def preset_of(given: Preset | str | None, base_url: str | None) -> Preset:
    """Return a preset by its name; a `Preset` is one already. None: OpenAI, or the one at `base_url`.

    Raises:
        ConfigError: there is none of that name, or it needs a base URL and there is none.
    """
    if given is None:
        return PRESETS["openai"] if base_url in {None, PRESETS["openai"].base_url} else ANY
    if not isinstance(given, Preset):
        check_choice("preset", given, tuple(PRESETS))
        given = PRESETS[given]
    if base_url is None and given.base_url is None:
        msg = f"base_url: this preset has none, so give yours: {given.example}"
        raise ConfigError(msg)
    return given
