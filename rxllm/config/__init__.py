"""Pipelines from parameters, and those from files."""

from rxllm.config.files import load
from rxllm.config.params import RemoteParams
from rxllm.config.pipeline import Dialect, client_of, from_params, gate_of
from rxllm.policies.aimd import AdaptiveConcurrencyParams

__all__ = ["AdaptiveConcurrencyParams", "Dialect", "RemoteParams", "client_of", "from_params", "gate_of", "load"]
