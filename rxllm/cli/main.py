"""What the command line does."""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rxllm.cli.arguments import parser
from rxllm.cli.checking import check
from rxllm.cli.running import INTERRUPTED, run
from rxllm.cli.serving import serve
from rxllm.cli.settings import Settings, recall
from rxllm.errors import ConfigError, RxllmError
from rxllm.stores.journal import compact

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

__all__ = ["main"]

FAILED, USAGE = 1, 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code.

    Args:
        arguments: the command line without the program; None: that of the process.

    Raises:
        SystemExit: it cannot be understood (2), only help was asked for (0), or Ctrl-C came twice (130).
    """
    debug = "--debug" in (sys.argv if arguments is None else arguments)
    try:
        return _do(parser().parse_args(arguments))
    except BrokenPipeError:  # `rxllm check … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except KeyboardInterrupt:
        code, text = INTERRUPTED, "interrupted"
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = USAGE if isinstance(error, ConfigError) else FAILED
        text = str(error) if isinstance(error, RxllmError) else f"{type(error).__name__}: {error} (--debug says where)"
    sys.stderr.write(f"rxllm: {text}\n")
    return code


def _do(chosen: argparse.Namespace) -> int:
    match chosen.command:
        case "run":
            return run(_settings(chosen, {}), Path(chosen.output), retrying=False, quiet=chosen.quiet)
        case "retry":
            output = Path(chosen.output)
            if not output.is_file():
                msg = f"there is no file {output}: `rxllm run` makes it"
                raise ConfigError(msg)
            return run(_settings(chosen, recall(output)), output, retrying=True, quiet=chosen.quiet)
        case "check":
            return check(_settings(chosen, {}))
        case "compact":
            done = compact(chosen.output)
            sys.stdout.write(
                f"{chosen.output}: {done.rows:,} lines, {done.dropped:,} dropped; "
                f"{done.before:,} bytes before, {done.after:,} now\n"
            )
            return 0
        case _:
            return serve(
                port=chosen.port,
                seed=chosen.seed,
                latency=chosen.latency,
                per_token=chosen.per_token,
                rpm=chosen.rpm,
                tpm=chosen.tpm,
                most=chosen.max_in_flight,
                faults=chosen.fault or {},
                answer=chosen.answer,
            )


def _settings(chosen: argparse.Namespace, before: dict[str, Any]) -> Settings:
    """Return what was given, else what the run before was told.

    Raises:
        ConfigError: a setting that is needed is missing, or wrong.
    """
    given = {name: value for name in Settings.__struct_fields__ if (value := getattr(chosen, name, None)) is not None}
    merged = {**before, **given}
    for name, option in (("input", "--input"), ("model", "--model")):
        if name not in merged:
            msg = f"{name}: there is none, give {option}"
            raise ConfigError(msg)
    try:
        return msgspec.convert(merged, Settings)
    except msgspec.ValidationError as error:
        reason = str(error)
    raise ConfigError(reason)
