"""What moves bytes: one seam with one method, `post`."""

from rxllm.transports.base import Response, Transport
from rxllm.transports.http import HttpTransport
from rxllm.transports.memory import MemoryTransport

__all__ = ["HttpTransport", "MemoryTransport", "Response", "Transport"]
