"""The text column of tables, row by row in constant memory: JSON lines and arrays, CSV and TSV, parquet, data sets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

from .files import TextFile, open_utf8, place_in_file, require

HF = "hf:"
_BATCH = 256  # rows of a parquet table that are in memory at once
_FIELD_LIMIT = 2**31 - 1  # of csv's fields; the module's own is shorter than a long article
Rows = Iterator[tuple[str, str]]  # where a row is, and its text: "" where it has none


def json_lines(file: TextFile, start: int, end: int | None, column: str) -> Rows:
    """Yield the rows of JSON lines that begin at the bytes `start` to `end` of a file's text."""
    place = start
    with open_utf8(file, start) as opened:
        while end is None or place < end:
            line = opened.readline()
            if not line:
                return
            if line.strip():
                where = f"{file}, {place_in_file(file, place)}"
                try:
                    row = json.loads(line)
                except UnicodeDecodeError as error:
                    raise ValueError(f"{where}: not UTF-8 ({error.reason}); convert it or leave it out") from None
                except (ValueError, RecursionError) as error:
                    raise ValueError(f"{where}: not JSON ({error}); expected an object on each line") from None
                yield where, _field(where, row, column)
            place += len(line)


def json_array(file: TextFile, column: str) -> Rows:
    """Yield the elements of a JSON array: texts, or objects with the text in `column`."""
    decoder = json.JSONDecoder()
    with open_utf8(file) as opened:
        text = _Ahead(file, opened)
        text.skip("[")
        number = 0
        while text.peek() != "]":
            number += 1
            where = f"{file}, element {number}"
            row = text.value(decoder, where)
            yield where, row if isinstance(row, str) else _field(where, row, column)
            if text.peek() != "]":
                text.skip(",")
        text.skip("]")
        if text.peek():
            raise ValueError(f"{file}: more text behind its JSON array; expected one array")


def separated(file: TextFile, kind: str, column: str) -> Rows:
    """Yield the rows of a .csv or .tsv with a header line."""
    quoted = kind == "csv" or _tsv_is_quoted(file)
    rows = _separated_rows(file, kind, quoted)
    _, header = next(rows, (0, []))
    if header.count(column) != 1:
        found = "two columns" if column in header else "no column"
        raise ValueError(f"{file}: {found} {column!r}; it has {', '.join(map(repr, header))} (see --text-column)")
    place = header.index(column)
    for line, row in rows:
        if len(row) != len(header):
            raise ValueError(f"{file}, line {line}: {len(row)} fields; expected {len(header)}, as in its header")
        yield f"{file}, line {line}", row[place]


def parquet(file: TextFile, groups: Sequence[int], column: str) -> Rows:
    """Yield the rows of some row groups of a parquet table."""
    import pyarrow

    with _parquet_file(file) as table:
        names = table.schema_arrow.names
        if column not in names:
            raise ValueError(f"{file}: no column {column!r}; it has {', '.join(map(repr, names))} (see --text-column)")
        number = sum(table.metadata.row_group(group).num_rows for group in range(groups[0])) if groups else 0
        try:
            for batch in table.iter_batches(_BATCH, row_groups=list(groups), columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    where = f"{file}, row {number}"
                    yield where, _text(where, value, column)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"{file}: damaged ({error}); expected a parquet table") from None


def parquet_groups(file: TextFile) -> list[int]:
    """Return the number of rows of each row group of a parquet table."""
    with _parquet_file(file) as table:
        return [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]


def data_set_rows(source: str, start: int, end: int, column: str) -> Rows:
    """Yield the rows `start` to `end` of a Hugging Face data set."""
    table = data_set(source)
    if column not in table.column_names:
        raise ValueError(
            f"{source}: no column {column!r}; it has {', '.join(map(repr, table.column_names))} (see --text-column)"
        )
    for first in range(start, end, _BATCH):
        for number, value in enumerate(table[first : min(first + _BATCH, end)][column], start=first + 1):
            where = f"{source}, row {number}"
            yield where, _text(where, value, column)


def data_set(source: str) -> Any:
    """Return the data set that `hf:NAME` or `hf:NAME:SPLIT` names on the Hub, or in a folder of `save_to_disk`."""
    require("datasets", "hf", source)
    return _load_data_set(source)


@lru_cache(maxsize=4)
def _load_data_set(source: str) -> Any:
    import datasets

    name, _, split = source.removeprefix(HF).partition(":")
    try:
        if Path(name).is_dir():
            table = datasets.load_from_disk(name)
            return table if isinstance(table, datasets.Dataset) else table[split or "train"]
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source}: cannot be loaded ({' '.join(str(error).split())})") from None


def _field(where: str, row: object, column: str) -> str:
    if not isinstance(row, dict):
        raise ValueError(f"{where}: a {type(row).__name__}; expected an object with text in {column!r}")
    if column not in row:
        raise ValueError(
            f"{where}: no field {column!r}; it has {', '.join(map(repr, row)) or 'none'} (see --text-column)"
        )
    return _text(where, row[column], column)


def _text(where: str, value: object, column: str) -> str:
    """Return a row's text, "" for a missing value."""
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{where}: {column!r} holds a {type(value).__name__}; expected text")
    return value


def _parquet_file(file: TextFile) -> Any:
    require("pyarrow", "hf", str(file))
    import pyarrow
    from pyarrow import parquet as tables

    try:
        return tables.ParquetFile(file.path)
    except (pyarrow.ArrowException, OSError) as error:
        raise ValueError(f"{file}: not a parquet table, or damaged ({error})") from None


def _separated_rows(file: TextFile, kind: str, quoted: bool) -> Iterator[tuple[int, list[str]]]:
    """Yield (number of the last line, fields) of each row, the header too. Blank lines are no rows."""
    csv.field_size_limit(_FIELD_LIMIT)
    with open_utf8(file) as opened, io.TextIOWrapper(opened, "utf-8", newline="") as text:
        reader = csv.reader(
            text,
            delimiter="\t" if kind == "tsv" else ",",
            strict=True,
            quoting=csv.QUOTE_MINIMAL if quoted else csv.QUOTE_NONE,
        )
        try:
            for row in reader:
                if row:
                    yield reader.line_num, row
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{file}, line {reader.line_num + 1}: not UTF-8 ({error.reason}); convert it first"
            ) from None
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num}: {error}; expected quotes around whole fields") from None


@lru_cache(maxsize=256)
def _tsv_is_quoted(file: TextFile) -> bool:
    """Return True if the quotes of a .tsv enclose fields, False if they are characters like others.

    Quotes enclose fields if every row then has the header's number of fields, and no row is lost against the reading
    that takes them for characters, unless that one has ragged rows.
    """
    try:
        quoted = _shape(file, quoted=True)
    except ValueError:
        return False
    plain = _shape(file, quoted=False)
    return quoted[1] and (quoted[0] == plain[0] or not plain[1])


def _shape(file: TextFile, quoted: bool) -> tuple[int, bool]:
    """Return the number of rows, and whether all have as many fields as the header."""
    count, even, width = 0, True, None
    for _, row in _separated_rows(file, "tsv", quoted):
        width = len(row) if width is None else width
        count, even = count + 1, even and len(row) == width
    return count, even


class _Ahead:
    """The text of a file from the place that a JSON parser has reached."""

    def __init__(self, file: TextFile, opened: IO[bytes]):
        self._file, self._opened = file, io.TextIOWrapper(opened, "utf-8")
        self._text, self._place, self._ended = "", 0, False

    def peek(self) -> str:
        """Return the next character that is not white space, "" at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in " \t\r\n":
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more(1 << 16):
                return ""

    def skip(self, mark: str) -> None:
        if (found := self.peek()) != mark:
            raise ValueError(
                f"{self._file}: not JSON, has {(found and repr(found)) or 'its end'}; expected {mark!r} in its array"
            )
        self._place += 1

    def value(self, decoder: json.JSONDecoder, where: str) -> Any:
        """Parse the next value. The text grows by doubling until the value is whole."""
        self.peek()
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._place)
                if end < len(self._text) or self._ended:  # a number may go on
                    self._place = end
                    return value
            except (ValueError, RecursionError) as error:
                if self._ended or isinstance(error, RecursionError):
                    raise ValueError(f"{where}: not JSON ({error}); expected a text or an object") from None
            self._more(max(1 << 16, len(self._text)))

    def _more(self, size: int) -> bool:
        try:
            block = self._opened.read(size)
        except UnicodeDecodeError as error:
            raise ValueError(f"{self._file}: not UTF-8 ({error.reason}); convert it or leave it out") from None
        self._ended = not block
        self._text, self._place = self._text[self._place :] + block, 0
        return bool(block)
