"""The options of the command line, and what their texts mean."""

from __future__ import annotations

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from rxllm.cli.inputs import FORMATS
from rxllm.errors import ConfigError
from rxllm.providers.presets import PRESETS

__all__ = ["parser"]

DESCRIPTION = """\
Ask a model a file of questions, through quotas and with retries. What was answered is not asked again.

  rxllm check requests.jsonl --model gpt-4o-mini --rpm 500
  rxllm run requests.jsonl -o results.jsonl --model gpt-4o-mini --rpm 500 --tpm 200_000
  rxllm retry results.jsonl

Exit codes: 0 all good, 1 some failed, 2 wrong usage or input, 130 interrupted.
"""
RUN = """\
A line of the input is a line of OpenAI's Batch API, {"prompt": "..."} or {"messages": [...]}; or a row of a CSV or
Parquet file, whose prompt --template makes of its columns. An input of - is the standard input. The output has one line
for each, in the shape of the output of the Batch API. It is the journal of the run: run the same again, after Ctrl-C,
kill -9 or with more lines in the input, and only what is missing is asked.

The key is in an environment variable: OPENAI_API_KEY, that of the preset or dialect, or --api-key-env NAME. With --url
and none of these no key is sent.

  rxllm run requests.jsonl -o results.jsonl --model gpt-4o-mini --rpm 500 --tpm 200_000
  rxllm run reviews.csv -o labels.jsonl --model qwen3 --url http://localhost:8000/v1 \\
      --template 'Is this review good or bad? {text}' --param max_tokens=5
  rxllm run requests.jsonl -o results.jsonl --model small --prices prices.toml --budget usd=5
  jq -c '{prompt: .question, id}' faq.jsonl | rxllm run - -o answers.jsonl --model gpt-4o-mini
"""
RETRY = """\
Everything is as in the last `rxllm run` that wrote this file, which is kept in RESULTS.run.json, but for the options
that are given here. The results of failed requests are appended; the last line of a request counts (see rxllm compact).

  rxllm retry results.jsonl
  rxllm retry results.jsonl --max-retries 10 --concurrency 4
"""
CHECK = """\
Nothing is sent, and no key is needed. Bad lines and ids that come twice are printed with their line numbers, then what
the file will take. Exit code 1: there is a bad line.

  rxllm check requests.jsonl --model gpt-4o-mini --rpm 500 --tpm 200_000 --prices prices.toml
  rxllm check requests.jsonl --model qwen3 --concurrency 64 --latency 2.5
"""
SERVE = """\
A server on this machine that costs nothing, speaks the dialects of OpenAI, Anthropic and LLM Engine, and fails as it is
told. It prints its URL and serves until Ctrl-C. A fault is a status, or reset, stall, truncated, garbled, empty, ...

  rxllm serve-fake --port 8000 --latency 0.2 --rpm 600 --fault 503=0.05
"""


INPUT = "JSON lines, .csv, .tsv or .parquet; - is the standard input"


def parser() -> argparse.ArgumentParser:
    """Return what understands the command line."""
    main = argparse.ArgumentParser(
        prog="rxllm", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    main.add_argument("--version", action="version", version=f"rxllm {_version()}")
    commands = main.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = _command(commands, "run", "ask what a file has, and go on where the last run ended", RUN)
    run.add_argument("input", type=_path, metavar="REQUESTS", help=INPUT)
    run.add_argument("-o", "--output", type=_path, required=True, metavar="RESULTS", help="where the results go")
    _asking(run)
    _sending(run)

    retry = _command(commands, "retry", "ask failed requests again", RETRY)
    retry.add_argument("output", type=_path, metavar="RESULTS", help="what `rxllm run` has written")
    retry.add_argument("--input", type=_path, metavar="REQUESTS", help="the requests, if they are elsewhere now")
    _asking(retry)
    _sending(retry)

    check = _command(commands, "check", "find bad lines, and estimate what a run will take", CHECK)
    check.add_argument("input", type=_path, metavar="REQUESTS", help=INPUT)
    _asking(check)
    _timing(check)

    serve = _command(commands, "serve-fake", "serve a simulated provider", SERVE)
    serve.add_argument("--port", type=int, default=0, help="default: any free one")
    serve.add_argument("--seed", type=int, default=0, help="of the faults, which are drawn in order of arrival")
    serve.add_argument("--latency", type=_number, default=0.0, metavar="SECONDS", help="of each answer")
    serve.add_argument("--per-token", type=_number, default=0.0, metavar="SECONDS", help="and of each token of it")
    serve.add_argument("--rpm", type=_number, metavar="N", help="requests a minute")
    serve.add_argument("--tpm", type=_number, metavar="N", help="tokens a minute")
    serve.add_argument("--max-in-flight", type=int, metavar="N", help="requests at a time; others are refused")
    serve.add_argument("--fault", action=_Merge, type=_fault, metavar="FAULT=SHARE", help="may be given several times")
    serve.add_argument("--answer", choices=("summary", "echo"), default="summary", help="what it says")

    compact = _command(commands, "compact", "write a results file anew, one line for each request", None)
    compact.add_argument("output", type=_path, metavar="RESULTS", help="what `rxllm run` has written")
    compact.add_argument(
        "--by-id", action="store_true", help="one line for each id, whatever was asked under it before"
    )
    return main


def _command(commands: Any, name: str, summary: str, more: str | None) -> argparse.ArgumentParser:
    made: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=more,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    made.add_argument("--debug", action="store_true", help="show where in the program an error comes from")
    return made


def _asking(command: argparse.ArgumentParser) -> None:
    """Add what is about the requests."""
    group = command.add_argument_group("what is asked, and whom")
    group.add_argument("--model", help="of all requests that name none; needed if there are such")
    group.add_argument("--url", help="the base URL, such as http://localhost:8000/v1")
    group.add_argument("--dialect", choices=("openai", "anthropic", "llm-engine"), help="default: openai")
    group.add_argument(
        "--preset", choices=tuple(PRESETS), metavar="NAME", help=f"a server of OpenAI's dialect: {', '.join(PRESETS)}"
    )
    group.add_argument("--format", choices=FORMATS, help="of the requests; default: by the end of the file's name")
    group.add_argument("--template", type=_text, metavar="TEXT", help="a prompt with {column}s in it; @FILE reads it")
    group.add_argument("--system", type=_text, metavar="TEXT", help="what the system says before; @FILE reads it")
    group.add_argument("--id-column", metavar="NAME", help="default: id or custom_id")
    group.add_argument(
        "--param", action=_Merge, type=_param, metavar="NAME=VALUE", help="of each request, such as max_tokens=200"
    )
    limits = command.add_argument_group("quotas and cost")
    limits.add_argument("--rpm", type=_number, metavar="N", help="requests a minute, whatever a config says")
    limits.add_argument(
        "--tpm", type=_number, metavar="N", help="tokens a minute, input and output, whatever a config says"
    )
    limits.add_argument("--prices", type=_path, metavar="FILE", help="what models cost, TOML or JSON")
    limits.add_argument("--config", type=_path, metavar="FILE", help="RemoteParams in TOML, YAML or JSON")
    limits.add_argument("--section", metavar="NAME", help="the table of the config in which they are")


def _sending(command: argparse.ArgumentParser) -> None:
    """Add what is about how requests are sent."""
    group = command.add_argument_group("how it is asked")
    group.add_argument("--api-key-env", metavar="NAME", help="the environment variable with the key")
    _concurrent(group)
    group.add_argument(
        "--budget",
        action=_Merge,
        type=_budget,
        metavar="KIND=N",
        help="stop when it is used up: requests, tokens, usd or seconds",
    )
    group.add_argument("--stream", action="store_true", default=None, help="have the answers streamed")
    group.add_argument("--max-retries", type=int, metavar="N", help="tries after the first one; default: 4")
    group.add_argument("--deadline", type=_number, metavar="SECONDS", help="for a request in all; default: 3600")
    group.add_argument("--timeout", type=_number, metavar="SECONDS", help="for each try in all; default: none")
    group.add_argument("--grace", type=_number, metavar="SECONDS", help="after Ctrl-C for what runs; default: 30")
    group.add_argument("-q", "--quiet", action="store_true", help="show no progress")


def _timing(command: argparse.ArgumentParser) -> None:
    """Add what else decides how long it takes."""
    group = command.add_argument_group("how long it takes")
    _concurrent(group)
    group.add_argument("--latency", type=_number, metavar="SECONDS", help="of an answer, on the average")


def _concurrent(group: Any) -> None:
    group.add_argument(
        "--concurrency", type=_concurrency, metavar="N|auto", help="requests at a time; default: auto, found out"
    )


class _Merge(argparse.Action):
    """Puts the dicts of an option that may be given several times into one."""

    def __call__(
        self,
        _parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        _option: str | None = None,
    ) -> None:
        merged: dict[str, Any] = {**(getattr(namespace, self.dest) or {}), **values}
        setattr(namespace, self.dest, merged)


def _path(text: str) -> str:
    if not text:
        msg = "it is empty"
        raise argparse.ArgumentTypeError(msg)
    return text


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        pass
    msg = f"expected a number, got {text!r}"
    raise argparse.ArgumentTypeError(msg)


def _concurrency(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        pass
    msg = f"expected a whole number or auto, got {text!r}"
    raise argparse.ArgumentTypeError(msg)


def _pair(text: str) -> tuple[str, str]:
    name, mark, value = text.partition("=")
    if not name or not mark:
        msg = f"expected NAME=VALUE, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return name, value


def _param(text: str) -> dict[str, Any]:
    name, value = _pair(text)
    try:
        return {name: msgspec.json.decode(value)}
    except msgspec.DecodeError:
        return {name: value}


def _budget(text: str) -> dict[str, float]:
    return {name: _number(value) for name, value in map(_pair, text.split(","))}


def _fault(text: str) -> dict[str, float]:
    name, share = _pair(text)
    return {name: _number(share)}


def _text(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text("utf-8")
    except OSError as error:
        reason = error.strerror
    except UnicodeDecodeError:
        reason = "it is not UTF-8"
    msg = f"cannot read {text[1:]}: {reason}"
    raise ConfigError(msg)


def _version() -> str:
    try:
        return version("rxllm")
    except PackageNotFoundError:
        return "(not installed)"
