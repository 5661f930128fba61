"""Dialects: translations between messages and bytes."""

from rxllm.providers.base import Call, Provider, error_of, retry_after
from rxllm.providers.openai import OpenAIProvider

__all__ = ["Call", "OpenAIProvider", "Provider", "error_of", "retry_after"]
