"""Reactive streams for slow, rate-limited model APIs: pulled on demand, bounded, delivered as they complete."""

import logging

from rxllm import errors, events, operators, policies
from rxllm.client import OpenAI, function
from rxllm.gate import Gate
from rxllm.messages import Attempt, Chunk, Outcome, Reply, Request, Secret, Usage, chat
from rxllm.operators.call import call
from rxllm.policies import Backoff, Quota, Timeouts, Validate
from rxllm.sinks import acollect, aiterate, collect, iterate
from rxllm.sources import Feed, from_async_iterable, from_iterable, from_jsonl

__all__ = [
    "Attempt",
    "Backoff",
    "Chunk",
    "Feed",
    "Gate",
    "OpenAI",
    "Outcome",
    "Quota",
    "Reply",
    "Request",
    "Secret",
    "Timeouts",
    "Usage",
    "Validate",
    "acollect",
    "aiterate",
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
    "operators",
    "policies",
]

logging.getLogger("rxllm").addHandler(logging.NullHandler())
