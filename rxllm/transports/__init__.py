"""What moves bytes: one seam with two methods, `send` for an answer as a whole and `open` for one in pieces."""

from rxllm.transports.base import Answer, Response, Transport
from rxllm.transports.http import HttpTransport
from rxllm.transports.memory import MemoryTransport
from rxllm.transports.sse import SseParser

__all__ = ["Answer", "HttpTransport", "MemoryTransport", "Response", "SseParser", "Transport"]
