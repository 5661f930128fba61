"""Reactive streams for slow, rate-limited model APIs: pulled on demand, bounded, delivered as they complete."""

import logging

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
    "Reply",
    "Request",
    "Restarted",
    "Route",
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
    "errors",
    "events",
    "from_async_iterable",
    "from_iterable",
    "from_jsonl",
    "function",
    "iterate",
    "journal",
    "operators",
    "policies",
]

logging.getLogger("rxllm").addHandler(logging.NullHandler())
