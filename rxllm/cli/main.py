"""What the command line does."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rxllm.cli.arguments import parser
from rxllm.cli.checking import check
from rxllm.cli.inputs import STDIN
from rxllm.cli.progress import counted, silence
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
        code = _do(parser().parse_args(arguments))
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `rxllm check … | head`
        silence(sys.stdout)
        return FAILED
    except KeyboardInterrupt:
        code, text = INTERRUPTED, "interrupted"
    except Exception as error:
        if debug:
            traceback.print_exc()
        code = USAGE if isinstance(error, ConfigError) else FAILED
        if isinstance(error, OSError):
            silence(sys.stdout)  # which may be what failed, as on a full disk
        text = said(error)
    try:
        sys.stderr.write(f"rxllm: {text}\n")
    except OSError:
        silence(sys.stderr)
    return code


def said(error: Exception) -> str:
    """Return what to tell of an error.

    >>> said(ConfigError("rpm: …")), said(OSError(28, "No space left on device", "out.jsonl"))
    ('rpm: …', 'out.jsonl: No space left on device')
    >>> said(KeyError("x"))
    "KeyError: 'x' (--debug says where)"
    """
    if isinstance(error, RxllmError):
        return str(error)
    if isinstance(error, OSError) and error.strerror is not None:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {error} (--debug says where)"


def _do(chosen: argparse.Namespace) -> int:
    match chosen.command:
        case "run":
            return run(_settings(chosen, {}), Path(chosen.output), retrying=False, quiet=chosen.quiet)
        case "retry":
            output = Path(chosen.output)
            if not output.is_file():
                msg = f"there is no file {output}: `rxllm run` makes it"
                raise ConfigError(msg)
            before = recall(output)
            if chosen.input is None and before.get("input") == STDIN:
                msg = "input: the run before had its requests from the standard input: give them again, with --input"
                raise ConfigError(msg)
            return run(_settings(chosen, before), output, retrying=True, quiet=chosen.quiet)
        case "check":
            return check(_settings(chosen, {}))
        case "compact":
            done = compact(chosen.output, by_id=chosen.by_id)
            sys.stdout.write(
                f"{chosen.output}: {counted(done.rows, 'line')}, {done.dropped:,} dropped; "
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
    if "input" not in merged:
        msg = "input: there is none, give --input"
        raise ConfigError(msg)
    try:
        return msgspec.convert(merged, Settings)
    except msgspec.ValidationError as error:
        reason = str(error)
    raise ConfigError(reason)
