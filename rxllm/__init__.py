"""Reactive streams for slow, rate-limited model APIs: pulled on demand, bounded, delivered as they complete."""

import logging

from rxllm import errors, operators
from rxllm.messages import Attempt, Chunk, Outcome, Reply, Request, Secret, Usage, chat
from rxllm.sinks import acollect, aiterate, collect, iterate
from rxllm.sources import Feed, from_async_iterable, from_iterable, from_jsonl

__all__ = [
    "Attempt",
    "Chunk",
    "Feed",
    "Outcome",
    "Reply",
    "Request",
    "Secret",
    "Usage",
    "acollect",
    "aiterate",
    "chat",
    "collect",
    "errors",
    "from_async_iterable",
    "from_iterable",
    "from_jsonl",
    "iterate",
    "operators",
]

logging.getLogger("rxllm").addHandler(logging.NullHandler())
