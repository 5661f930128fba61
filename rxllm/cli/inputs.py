"""Files of requests for the command line: JSON lines, CSV and Parquet, row by row."""

from __future__ import annotations

import codecs
import csv
import importlib
import io
import string
from collections import Counter
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal, NamedTuple, cast

import msgspec

from rxllm.errors import ConfigError, InvalidRequestError
from rxllm.messages import Outcome, Request, chat
from rxllm.sources.jsonl import LINE, parse_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

__all__ = ["BAD_ROW", "FORMATS", "STDIN", "Input", "Row", "Shape", "Template"]

STDIN = "-"  # the name of the standard input
FORMATS = ("jsonl", "csv", "tsv", "parquet")
IDS = ("id", "custom_id")  # columns that name their rows
BAD_ROW = "line"  # what the outcome of a bad row has as its operation, as that of `from_jsonl`
SHOWN = 1000  # characters of a bad line that its outcome keeps
BATCH = 1024  # rows of a Parquet file that are read at a time
COUNTED = 1 << 30  # bytes: a larger file is not read a second time only to know how long it is

Fields = dict[str, Any]


class Row(NamedTuple):
    """A row of a file: its request, or what is wrong with it."""

    line: int  # from 1; of a Parquet file the row
    request: Request | None
    problem: str = ""
    text: str = ""  # how a bad row begins


class Template:
    """A prompt with names in braces, each a column of the row; `{{` and `}}` are braces.

    Args:
        text: the template.

    Raises:
        ConfigError: it has no name, or something else than names in its braces.

    >>> Template("Translate into {language}: {text}").fill({"language": "Dutch", "text": "Hello", "id": 7})
    'Translate into Dutch: Hello'
    """

    __slots__ = ("_pieces", "names")

    def __init__(self, text: str) -> None:
        try:
            pieces = list(string.Formatter().parse(text))
        except ValueError as wrong:
            reason = str(wrong)
        else:
            reason = next(
                (f"{name!r} is no plain name" for _, name, rest, turned in pieces if name == "" or rest or turned), ""
            )
            self._pieces = [(before, name) for before, name, _, _ in pieces]
            self.names = tuple(dict.fromkeys(name for _, name in self._pieces if name))
            if not reason and not self.names:
                reason = "it has no {column}, so all rows would ask the same"
        if reason:
            msg = f"template: {reason}, got {text!r}"
            raise ConfigError(msg)

    def fill(self, fields: Fields) -> str:
        """Return the prompt of a row.

        Raises:
            InvalidRequestError: a name is missing there, or null.
        """
        parts: list[str] = []
        for before, name in self._pieces:
            parts.append(before)
            if name is not None:
                value = fields.get(name)
                if value is None:
                    found = (
                        "is null" if name in fields else f"is missing, there is only {', '.join(fields) or 'nothing'}"
                    )
                    msg = f"{name} {found}"
                    raise InvalidRequestError(msg)
                parts.append(value if isinstance(value, str) else _shown(value))
        return "".join(parts)


def _shown(value: Any) -> str:
    """Return a value as JSON, but a time or the like as the text that it is there.

    >>> import datetime
    >>> _shown({"a": [1.5, True]}), _shown(datetime.date(2026, 1, 31))
    ('{"a":[1.5,true]}', '2026-01-31')
    """
    text = msgspec.json.encode(value, enc_hook=str)
    return str(msgspec.json.decode(text)) if text.startswith(b'"') else text.decode()


class Shape(msgspec.Struct, frozen=True, kw_only=True):
    """How rows become requests.

    Args:
        template: makes the prompt of a row's columns; None: lines of JSON are requests already, and other rows have
            their prompt in the column `prompt`.
        system: what the system says before; None: nothing.
        params: of each request that does not say them itself.
        id_column: the column that names the row; None: `id` or `custom_id`, if there is one.
        operation: what a prompt is to be: a "chat", or "completions" for servers that have no chats.
        named: each request must name its model: there is none for those that do not.
    """

    template: Template | None = None
    system: str | None = None
    params: Fields = {}
    id_column: str | None = None
    operation: Literal["chat", "completions"] = "chat"
    named: bool = False

    def of_line(self, line: bytes) -> Request:
        """Return the request of a line of JSON.

        Raises:
            InvalidRequestError: it says what is wrong, not where.
        """
        if self.template is None:
            return self._finished(parse_line(line))
        try:
            fields: object = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as wrong:
            reason = f"not JSON ({wrong})"
        else:
            if isinstance(fields, dict):
                return self.of_fields(cast("Fields", fields))
            reason = f"expected a JSON object, got {type(fields).__name__}"
        raise InvalidRequestError(reason)

    def of_fields(self, fields: Fields) -> Request:
        """Return the request of a row.

        Raises:
            InvalidRequestError: it says what is wrong, not where.
        """
        id: object = next(
            (fields[name] for name in self._ids(fields) if fields[name] is not None and fields[name] != ""), None
        )
        prompt = (PROMPT if self.template is None else self.template).fill(fields)
        return self._finished(chat(prompt, id=None if id is None else str(id)))

    def check_columns(self, file: str, columns: Sequence[str]) -> None:
        """Refuse a file without the columns that are needed, or with two of one.

        Raises:
            ConfigError: the first one that is missing.
        """
        names = [*(PROMPT if self.template is None else self.template).names]
        names.extend([self.id_column] if self.id_column else ())
        missing = [name for name in names if name not in columns]
        if missing:
            hint = "; say with a template how prompts are made" if self.template is None else ""
            msg = f"{file}: there is no column {missing[0]!r}, only {', '.join(columns) or 'an empty file'}{hint}"
            raise ConfigError(msg)
        counts = Counter(columns)
        for name in (*names, *IDS):
            if counts[name] > 1:
                msg = f"{file}: there are {counts[name]} columns {name!r}, and nobody knows which one is meant"
                raise ConfigError(msg)

    def _ids(self, fields: Fields) -> tuple[str, ...]:
        return tuple(name for name in ((self.id_column,) if self.id_column else IDS) if name in fields)

    def _finished(self, request: Request) -> Request:
        """Return a request with what all have."""
        body = request.body
        if self.system is not None and "messages" in body:
            messages: list[Any] = body["messages"]
            if not any(isinstance(said, dict) and cast("Fields", said).get("role") == "system" for said in messages):
                body = {**body, "messages": [{"role": "system", "content": self.system}, *messages]}
        operation = request.operation
        if self.operation == "completions" and operation == "chat":
            body, operation = _completion(body), "completions"
        body = {**self.params, **body}
        if self.named and not body.get("model"):
            raise InvalidRequestError(NO_MODEL)
        return Request(body=body, id=request.id, operation=operation, meta=request.meta)


PROMPT = Template("{prompt}")
NO_MODEL = "it names no model, and there is none for all: give --model"


def _completion(body: Fields) -> Fields:
    """Return the body of the completion that a chat of one message asks for."""
    rest = dict(body)
    messages = rest.pop("messages", None)
    if messages is None:
        return rest
    said: object = messages[0] if len(messages) == 1 else None
    if not isinstance(said, dict) or not isinstance(cast("Fields", said).get("content"), str):
        msg = "this dialect has no chats: give a prompt, or messages with a single text, and no system"
        raise InvalidRequestError(msg)
    return {"prompt": cast("Fields", said)["content"], **rest}


class Input:
    """A file of requests: JSON lines, CSV, or Parquet.

    Args:
        path: the file; None: the standard input. A pipe is read once, from its beginning to its end.
        shape: how its rows become requests.
        format: what it is, one of `FORMATS`; None: by the end of its name, and JSON lines for any other.

    Raises:
        ConfigError: it cannot be read, or lacks a column.
    """

    def __init__(self, path: Path | None, shape: Shape, format: str | None = None) -> None:  # noqa: A002  the option's
        self.path = path
        self.shape = shape
        self.stopped = False  # True: it ends here
        self.name = "the standard input" if path is None else str(path)
        ending = "" if path is None else path.suffix.lower().removeprefix(".")
        self._format = format or (ending if ending in FORMATS else "jsonl")
        self.is_pipe = path is None or (path.exists() and not path.is_file() and not path.is_dir())
        kinds: dict[str, Callable[[], Iterator[Row]]] = {"csv": self._csv, "tsv": self._csv, "parquet": self._parquet}
        self.rows: Callable[[], Iterator[Row]] = kinds.get(self._format, self._lines)
        if not self.is_pipe:
            self._open().close()
            first = next(self.rows(), None)  # so that a file of another kind is refused before anything is sent
            if first is not None and first.problem == NO_MODEL:
                raise ConfigError(self.where(first))
        elif self._format == "parquet":
            msg = f"{self.name}: Parquet cannot be read from a pipe, give a file"
            raise ConfigError(msg)

    def __iter__(self) -> Iterator[Request | Outcome[Any]]:
        """Return the requests, and of bad rows failed outcomes that name file and line.

        What has no id has its line as `meta`.
        """
        for row in self.rows():
            if self.stopped:
                return
            request = row.request
            if request is not None:
                named = request.id is not None or request.meta is not None
                yield request if named else msgspec.structs.replace(request, meta={"line": row.line})
            else:
                error = InvalidRequestError(self.where(row), body=row.text)
                yield Outcome(request=Request(body=row.text, operation=BAD_ROW), error=error)

    def where(self, row: Row) -> str:
        """Return what is wrong with a bad row, and where."""
        return f"{self.name}, {'row' if self._format == 'parquet' else 'line'} {row.line}: {row.problem}"

    def count(self) -> int | None:
        """Return how many rows there are; None: it would take long to find out, or cannot be."""
        if self.is_pipe or self.path is None:
            return None
        if self._format == "parquet":
            return int(self._open_parquet().metadata.num_rows)
        if self.path.stat().st_size > COUNTED:
            return None
        if self._format != "jsonl":
            return sum(1 for _ in self._records()) - 1
        with self._open() as file:
            return sum(1 for line in file if line.strip())

    def _open(self) -> IO[bytes]:
        """Open it.

        Raises:
            ConfigError: it cannot be read.
        """
        try:
            # Not sys.stdin: a thread that still waits for it when the process ends would abort that.
            return open(0, "rb", closefd=False) if self.path is None else self.path.open("rb")
        except OSError as error:
            msg = f"cannot read {self.name}: {error.strerror}"
            raise ConfigError(msg) from None

    def _row(self, number: int, make: Callable[[Any], Request], what: Any) -> Row:
        try:
            return Row(number, make(what))
        except (InvalidRequestError, ConfigError) as wrong:
            problem = wrong.message if isinstance(wrong, InvalidRequestError) else str(wrong)
            text = what[:SHOWN].decode(errors="replace") if isinstance(what, bytes) else str(what)[:SHOWN]
            return Row(number, None, problem, text)

    def _lines(self) -> Iterator[Row]:
        with self._open() as file:
            number = 0
            while line := file.readline(LINE + 1):
                number += 1
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)  # some editors put one at the beginning
                if line.strip():
                    yield self._row(number, self.shape.of_line, line)
                while len(line) > LINE and not line.endswith(b"\n"):
                    line = file.readline(LINE + 1)

    def _records(self) -> Iterator[tuple[int, list[str] | str]]:
        """Read a CSV file: the number of the line where a record ends, and its fields or what is wrong with it."""
        csv.field_size_limit(LINE)
        with self._open() as binary, io.TextIOWrapper(binary, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(_short(file), delimiter="\t" if self._format == "tsv" else ",", strict=True)
            while True:
                try:
                    record = next(reader, None)
                except csv.Error as wrong:
                    yield reader.line_num, f"not CSV ({wrong})"
                    continue
                except UnicodeDecodeError as wrong:
                    msg = f"{self.name}, after line {reader.line_num}: not UTF-8 ({wrong.reason})"
                    raise ConfigError(msg) from None
                except _TooLongError:
                    msg = f"{self.name}, line {reader.line_num + 1}: longer than {LINE:,} characters: is this CSV?"
                    raise ConfigError(msg) from None
                if record is None:
                    return
                if record:
                    yield reader.line_num, record

    def _csv(self) -> Iterator[Row]:
        records = self._records()
        first = next(records, None)
        header = [] if first is None else first[1]
        if isinstance(header, str):
            msg = f"{self.name}, line 1: {header}"
            raise ConfigError(msg)
        self.shape.check_columns(self.name, header)

        def request(record: list[str]) -> Request:
            if len(record) != len(header):
                msg = f"expected {len(header)} fields, as the first line has, got {len(record)}"
                raise InvalidRequestError(msg)
            return self.shape.of_fields(dict(zip(header, record, strict=True)))

        for number, record in records:
            yield Row(number, None, record) if isinstance(record, str) else self._row(number, request, record)

    def _open_parquet(self) -> Any:
        try:
            parquet: Any = importlib.import_module("pyarrow.parquet")
        except ImportError:
            msg = f"{self.name}: to read Parquet install rxllm[cli], or write it as CSV or JSON lines"
            raise ConfigError(msg) from None
        try:
            return parquet.ParquetFile(self.path)
        except (OSError, ValueError) as wrong:  # what pyarrow raises are these
            reason = str(wrong)
        msg = f"{self.name}: not Parquet ({reason})"
        raise ConfigError(msg)

    def _parquet(self) -> Iterator[Row]:
        file = self._open_parquet()
        columns: list[str] = list(file.schema_arrow.names)
        self.shape.check_columns(self.name, columns)
        names = (PROMPT if self.shape.template is None else self.shape.template).names
        ids = (self.shape.id_column,) if self.shape.id_column else IDS
        number = 0
        for rows in self._batches(file, [name for name in columns if name in names or name in ids]):
            for fields in rows:
                number += 1
                yield self._row(number, self.shape.of_fields, fields)

    def _batches(self, file: Any, columns: Sequence[str]) -> Iterator[list[Fields]]:
        try:
            for batch in file.iter_batches(batch_size=BATCH, columns=columns):
                yield batch.to_pylist()
        except (OSError, ValueError) as wrong:
            reason = str(wrong)
        else:
            return
        msg = f"{self.name}: its Parquet is damaged ({reason})"
        raise ConfigError(msg)


class _TooLongError(Exception):
    """A line is longer than any record."""


def _short(file: IO[str]) -> Iterator[str]:
    """Return the lines of a file, none of which is read when it is too long for one."""
    while line := file.readline(LINE + 1):
        if len(line) > LINE:
            raise _TooLongError
        yield line
