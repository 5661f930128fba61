"""Reactive streams for slow, rate-limited model APIs: pulled on demand, bounded, delivered as they complete."""

import importlib
import logging
from typing import TYPE_CHECKING, Any

from rxllm import errors, events, operators, policies
from rxllm.clients import Anthropic, LLMEngine, OpenAI, Route, any_of, function
from rxllm.gate import Gate
from rxllm.messages import Attempt, Chunk, Outcome, Reply, Request, Restarted, Secret, ToolCall, Usage, chat
from rxllm.operators.budget import budget
from rxllm.operators.cache import cache
from rxllm.operators.call import call
from rxllm.operators.journal import journal
from rxllm.policies import Backoff, Connection, Hedge, Price, Prices, Quota, Timeouts, Validate
from rxllm.sinks import acollect, aiterate, collect, iterate
from rxllm.sources import Feed, from_async_iterable, from_iterable, from_jsonl

if TYPE_CHECKING:
    from rxllm import config, presets
    from rxllm.config import RemoteParams, from_params
    from rxllm.runner import Resource, Runner

__all__ = [
    "Anthropic",
    "Attempt",
    "Backoff",
    "Chunk",
    "Connection",
    "Feed",
    "Gate",
    "Hedge",
    "LLMEngine",
    "OpenAI",
    "Outcome",
    "Price",
    "Prices",
    "Quota",
    "RemoteParams",
    "Reply",
    "Request",
    "Resource",
    "Restarted",
    "Route",
    "Runner",
    "Secret",
    "Timeouts",
    "ToolCall",
    "Usage",
    "Validate",
    "acollect",
    "aiterate",
    "any_of",
    "budget",
    "cache",
    "call",
    "chat",
    "collect",
    "config",
    "errors",
    "events",
    "from_async_iterable",
    "from_iterable",
    "from_jsonl",
    "from_params",
    "function",
    "iterate",
    "journal",
    "operators",
    "policies",
    "presets",
]

logging.getLogger("rxllm").addHandler(logging.NullHandler())

LATER = {  # what few need, imported when it is asked for: an import of this package shall cost little
    "RemoteParams": "rxllm.config",
    "Resource": "rxllm.runner",
    "Runner": "rxllm.runner",
    "config": "rxllm.config",
    "from_params": "rxllm.config",
    "presets": "rxllm.presets",
}


def __getattr__(name: str) -> Any:
    """Import what is named, if it is one of those that are imported later."""
    if name not in LATER:
        msg = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(msg)
    module = importlib.import_module(LATER[name])
    return module if LATER[name].endswith(f".{name}") else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *LATER})
