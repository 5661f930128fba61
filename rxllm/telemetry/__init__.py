"""What a run did, kept small: a recording of a gate, and its picture."""

from rxllm.telemetry.bins import Fill, Mark, Table
from rxllm.telemetry.recording import Recording

__all__ = ["Fill", "Mark", "Recording", "Table"]
