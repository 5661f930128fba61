"""The command line, `rxllm`: files of requests in, files of results out; see `rxllm --help`."""

from rxllm.cli.main import main

__all__ = ["main"]
