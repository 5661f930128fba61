"""Doubles and tools for tests of pipelines: virtual time, marbles, scripted streams.

Real things before mocks: what a test can run, it should run. These are for time and order, which it cannot hold still.
"""

from rxllm.testing.marbles import Cold, Event, Recorder, Script, Subscription, Taker, cold, marbles, parse, record
from rxllm.testing.simulated import Latency, ServerQuota, SimulatedProvider
from rxllm.testing.virtual import VirtualScheduler

__all__ = [
    "Cold",
    "Event",
    "Latency",
    "Recorder",
    "Script",
    "ServerQuota",
    "SimulatedProvider",
    "Subscription",
    "Taker",
    "VirtualScheduler",
    "cold",
    "marbles",
    "parse",
    "record",
]
