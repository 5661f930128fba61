"""Parameters from a file."""

from __future__ import annotations

import importlib
import json
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, cast

from rxllm.config.params import RemoteParams, filled
from rxllm.errors import ConfigError, check_text

__all__ = ["load"]


def load(path: str | os.PathLike[str], *, section: str | None = None) -> RemoteParams:
    """Read parameters from a TOML, YAML or JSON file, by the ending of its name.

    Args:
        path: `.toml`, `.yaml` or `.yml` (needs the extra `yaml`), or `.json`.
        section: the table that they are in, such as "remote_params" in a configuration of oumi's; what is beside it is
            not looked at. None: they are the whole file.

    Raises:
        ConfigError: the file cannot be read, is not what its name says, has a field that there is not, or a value of
            the wrong type or out of its bounds. The message names the file, and the field and its value, or the line.
    """
    path = Path(path)
    check_text("section", section, optional=True)
    fields = _read(path)
    if section is not None:
        if section not in fields:
            msg = f"{path}: there is no section {section!r}, only {', '.join(map(str, fields)) or 'an empty file'}"
            raise ConfigError(msg)
        fields = _table(path, fields[section], f"the section {section!r}")
    return filled(RemoteParams, fields, f"{path}: ")


def _read(path: Path) -> Mapping[str, Any]:
    decode = DECODERS.get(path.suffix.lower())
    if decode is None:
        msg = f"{path}: its name must end with {', '.join(DECODERS)}"
        raise ConfigError(msg)
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        reason = f"cannot read {path}: {error.strerror}"
    except UnicodeDecodeError as error:
        reason = f"{path}: not UTF-8 at byte {error.start}"
    else:
        try:
            return _table(path, decode(text), "the file")
        except _GarbledError as error:
            reason = f"{path}, {error}"
        except RecursionError:
            reason = f"{path}: nested too deeply"
    raise ConfigError(reason)


class _GarbledError(Exception):
    """A file is not what its name says; the text says where."""


def _toml(text: str) -> object:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
    what, _, place = message.rpartition(" (at ")
    raise _GarbledError(f"{place.removesuffix(')')}: not TOML ({what})" if what else f"not TOML ({message})")


def _json(text: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        reason = f"line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
    raise _GarbledError(reason)


def _yaml(text: str) -> object:
    try:
        yaml: Any = importlib.import_module("yaml")
    except ImportError:
        yaml = None
    if yaml is None:
        raise _GarbledError("which is YAML: to read it install rxllm[yaml], or write it as TOML or JSON")
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f"line {mark.line + 1}, column {mark.column + 1}: "
        reason = f"{place}not YAML ({getattr(error, 'problem', None) or error})"
    raise _GarbledError(reason)


DECODERS: dict[str, Callable[[str], object]] = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml, ".json": _json}


def _table(path: Path, found: object, what: str) -> Mapping[str, Any]:
    if found is None:  # an empty YAML file
        return {}
    if not isinstance(found, dict):
        msg = f"{path}: {what} must have names and values, got {type(found).__name__}"
        raise ConfigError(msg)
    return cast("dict[str, Any]", found)
