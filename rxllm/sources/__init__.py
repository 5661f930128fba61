"""Where requests come from: iterables, async iterables, files and feeds, pulled only as fast as they are served."""

from rxllm.sources.feed import Feed
from rxllm.sources.iterables import from_async_iterable, from_iterable
from rxllm.sources.jsonl import from_jsonl

__all__ = ["Feed", "from_async_iterable", "from_iterable", "from_jsonl"]
