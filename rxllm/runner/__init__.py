"""For those who want no streams: schedule calls of a function, run them, and get the results in that order."""

from rxllm.runner.calls import Call, Finished, Resource, RunnerStatistics
from rxllm.runner.runner import Runner

__all__ = ["Call", "Finished", "Resource", "Runner", "RunnerStatistics"]
