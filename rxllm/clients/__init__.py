"""What requests are sent with: a client for each dialect, any callable, several as one."""

from rxllm.clients.anthropic import Anthropic
from rxllm.clients.base import Client, Remote
from rxllm.clients.function import function
from rxllm.clients.llm_engine import LLMEngine
from rxllm.clients.openai import OpenAI
from rxllm.clients.routing import Route, any_of

__all__ = ["Anthropic", "Client", "LLMEngine", "OpenAI", "Remote", "Route", "any_of", "function"]
