"""Dialects: translations between messages and bytes."""

from rxllm.providers.base import Assembler, Call, Event, Provider
from rxllm.providers.faults import fault_in, fault_of, retry_after
from rxllm.providers.openai import OpenAIProvider
from rxllm.providers.output import Output
from rxllm.providers.presets import PRESETS, Preset

__all__ = [
    "PRESETS",
    "Assembler",
    "Call",
    "Event",
    "OpenAIProvider",
    "Output",
    "Preset",
    "Provider",
    "fault_in",
    "fault_of",
    "retry_after",
]
