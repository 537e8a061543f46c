"""Rows of tables, one by one and in constant memory, whatever reads them: labelled tables or a column of texts.

A row is (place, value): where it is, "line 5" or "row 5", and an object with named fields; in a JSON array also a text.
Text is UTF-8, or what a byte order mark says, packed or not. Each format has one rule, the same for every command.
"""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import count
from pathlib import Path
from typing import IO, Any, NoReturn

from gpt_fast_settings.declaration import did_you_mean

from ... import _hub
from . import files
from .files import KINDS, TextFile, json_form, open_utf8, require
from .nested import Row, is_squad, squad_rows, unnested
from .separated import DEFAULT, RowOptions, Say, check_names, delimiter, ignore, separated, some

__all__ = [
    "DEFAULT", "HF", "SUFFIXES", "WRITTEN", "Row", "RowOptions", "Say", "column_texts", "data_set", "data_set_rows",
    "delimiter", "file_rows", "parquet_groups", "read_rows", "row_options", "some", "table_kind", "written_kind",
]  # fmt: skip
SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
WRITTEN = (".csv", ".tsv", ".jsonl")
HF = "hf:"
_BATCH = 256  # rows of a parquet table that are in memory at once
Rows = Iterator[tuple[object, Any]]


def row_options(columns: str | None, skip_ragged: bool) -> RowOptions:
    """Return `RowOptions(columns, skip_ragged)` for the values of two options of the command line.

    `columns` is the value of --columns: names of columns separated by commas, or None. The names become a tuple, which
    is empty for None. `skip_ragged` is True if --skip-ragged is given.
    """
    return RowOptions(() if columns is None else tuple(columns.split(",")), skip_ragged)


def read_rows(path: Path, options: RowOptions = DEFAULT, say: Say = ignore) -> Iterator[tuple[str, Row]]:
    """Yield (place, row) for each row of a labelled table: its position, such as "line 5", and a dict by column.

    `path` ends in .csv, .tsv, .jsonl, .ndjson, .json or .parquet. A compression ending such as .gz may follow, but not
    behind .parquet. The nested forms of SQuAD, RACE and ARC are turned into rows. `options` are for .csv and .tsv:
    `columns` names the columns of a file without a header line, and `skip_ragged` skips rows with another number of
    fields than columns. `say` is called with messages about the quotes of a .tsv and about rows that were skipped.

    Raise `FileNotFoundError` if there is no such file. Raise `ValueError` for another ending or a folder, for a file
    that is damaged or not UTF-8, and for a row that has no named fields. Also raise it if `options.columns` is given
    for a file that is neither .csv nor .tsv. Errors come with the first row that is asked for, or later.
    """
    kind = table_kind(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    file = TextFile(path, path.name)
    if options.columns and kind not in ("csv", "tsv"):
        raise ValueError(f"--columns {','.join(options.columns)}: {path} names its columns itself; leave it out")
    if kind == "json":
        kind = json_form(file) or "object"
    for place, value in file_rows(file, kind, options, say):
        if not isinstance(value, dict):
            raise ValueError(f"{path}, {place}: {_a(value)}; expected an object with named fields")
        yield from unnested(str(place), value)


def table_kind(path: Path) -> str:
    """Return the format of a table by its name: "csv", "tsv", "jsonl", "json" or "parquet".

    Case does not matter, .ndjson counts as "jsonl", and a compression ending such as .gz is ignored: t.csv.gz is "csv".
    The file need not exist.

    Raises:
        ValueError: `path` is a folder or has another ending.
    """
    suffix = TextFile(path, path.name).suffixes[0]
    if suffix not in KINDS or path.is_dir():
        _refuse(path, suffix, SUFFIXES)
    return KINDS[suffix]


def written_kind(path: Path) -> str:
    """Return "csv", "tsv" or "jsonl": the format of a table to be written, by its ending in upper or lower case.

    Raises:
        ValueError: `path` is a folder or has another ending, such as .gz.
    """
    suffix = path.suffix.lower()
    if suffix not in WRITTEN or path.is_dir():
        _refuse(path, suffix, WRITTEN)
    return KINDS[suffix]


def _refuse(path: Path, suffix: str, suffixes: Sequence[str]) -> NoReturn:
    """Raise `ValueError`: `path` is a folder, or else its ending `suffix` is none of the valid endings `suffixes`."""
    has = "a folder" if path.is_dir() else f"ends in {suffix or 'nothing'!r}"
    raise ValueError(f"{path}: {has}; expected a table ending in {', '.join(suffixes)}")


def file_rows(
    file: TextFile,
    kind: str,
    options: RowOptions | None = None,
    say: Say = ignore,
    start: int = 0,
    end: int | None = None,
    column: str | None = None,
) -> Rows:
    """Yield (place, row) for each row of a file: its position, and a dict by column.

    The text of `place`, `str(place)`, is "line 5" or "row 5". `kind` is "jsonl", "json" (an array), "object" (a file
    with one JSON object), "csv", "tsv" or "parquet". For "json" and "object" a row may also be another JSON value.
    `options` and `say` are for "csv" and "tsv" alone. `options` hold the names of the columns of a file without a
    header line, and whether to skip rows with another number of fields. `say` is called with messages for the user.

    `start` and `end` choose a part of a "jsonl" or "parquet" file, and other kinds ignore them. A "jsonl" file yields
    the lines that begin at byte `start` of its text or later, and before byte `end`. A "parquet" file yields the row
    groups from index `start` up to, but not including, `end`. An `end` of None means the end of the file. If `column`
    is given, only that column of a "parquet" file is read. Raise `ValueError` for a file that is damaged or not UTF-8.
    """
    try:
        if kind == "parquet":
            yield from _parquet(file, start, end, column)
        elif kind == "jsonl":
            yield from _json_lines(file, start, end)
        elif kind == "json":
            yield from _json_array(file)
        elif kind == "object":
            yield from _json_object(file)
        else:
            yield from separated(file, kind, options, say)
    except UnicodeDecodeError:
        raise ValueError(f"{file}{_undecodable(file)}") from None


def column_texts(source: str, rows: Rows, column: str) -> Iterator[str]:
    """Yield the text in `column` of each row, or "" if it is null. A row that is a text itself is yielded as it is.

    `rows` are (place, row) pairs: a row's position, and a dict by column or a text. `source` names the data in
    messages. Raise `ValueError` if a row is neither, if it lacks the column, or if its value is not text or has a NUL
    character.
    """
    for place, value in rows:
        if isinstance(value, dict):
            if column not in value:
                raise ValueError(f"{source}, {place}: {no_column(column, value)} (see --text-column)")
            value = value[column]
            if value is None:
                value = ""
            if not isinstance(value, str):
                raise ValueError(f"{source}, {place}: {column!r} holds {_a(value)}; expected text")
        elif not isinstance(value, str):
            raise ValueError(f"{source}, {place}: {_a(value)}; expected an object with text in {column!r}")
        if "\0" in value:
            raise ValueError(f"{source}, {place}: has a NUL character; expected text")
        yield value


def no_column(column: str, names: Collection[str]) -> str:
    """Return the words of an error about a column that is not among `names`, the names of the existing columns.

    An example is "no column 'txt' (did you mean 'text'?); it has 'text', 'label'". The hint is left out if no name is
    near. Without any names the words end in "it has none".
    """
    near = did_you_mean(column, names).removeprefix("; ")
    return f"no column {column!r}{near and f' ({near})'}; it has {', '.join(map(repr, names)) or 'none'}"


def parquet_groups(file: TextFile) -> list[int]:
    """Return the number of rows of each row group of a parquet table, in the order of the file.

    Raise `ValueError` if the file cannot be read or pyarrow is not installed.
    """
    with _parquet_file(file) as table:
        return [table.metadata.row_group(i).num_rows for i in range(table.metadata.num_row_groups)]


def data_set_rows(source: str, start: int, end: int, column: str) -> Rows:
    """Yield ("row 5", {column: value}) for each row of a Hugging Face data set whose index is in [start, end).

    Indices begin at 0, and the numbers in positions such as "row 5" at 1. `source` is hf:NAME or hf:NAME:SPLIT. Values
    are not checked to be texts. Raise `ValueError` if the data set cannot be loaded or lacks the column.
    """
    table = data_set(source)
    if column not in table.column_names:
        raise ValueError(f"{source}: {no_column(column, table.column_names)} (see --text-column)")
    for first in range(start, end, _BATCH):
        for number, value in enumerate(table[first : min(first + _BATCH, end)][column], start=first + 1):
            yield f"row {number}", {column: value}


def data_set(source: str) -> Any:
    """Load the `datasets.Dataset` that `source` names: hf:NAME or hf:NAME:SPLIT. SPLIT is "train" if it is left out.

    NAME is a folder made by `save_to_disk`, or else a data set on the Hugging Face Hub. A folder with a single data set
    has no splits, so SPLIT is ignored. The last four data sets are cached. Raise `ValueError` if it cannot be loaded or
    the package datasets is not installed.
    """
    require("datasets", "hf", source)
    return _load_data_set(source)


@lru_cache(maxsize=4)
def _load_data_set(source: str) -> Any:
    """Load the `datasets.Dataset` that `source` names: hf:NAME or hf:NAME:SPLIT. SPLIT is "train" if it is left out.

    NAME is a folder made by `save_to_disk`, or else a data set on the Hugging Face Hub. If the Hub cannot be reached,
    only the local cache is used. For a folder with a single data set, SPLIT is ignored. The last four results are
    cached. Raise `ValueError` if NAME is empty or the data set cannot be loaded.
    """
    import datasets

    name, _, split = source.removeprefix(HF).partition(":")
    if not name:
        raise ValueError(f"{source}: names no data set; expected hf:NAME or hf:NAME:SPLIT")
    try:
        if Path(name).is_dir():
            table = datasets.load_from_disk(name)
            return table if isinstance(table, datasets.Dataset) else table[split or "train"]
        with nullcontext() if _hub.is_reachable() else _hub.only_cached():
            return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{source}: cannot be loaded ({' '.join(str(error).split())})") from None


# --- JSON ---


class _Line:
    """Number of a line in a file, for messages.

    The line is the `number`-th line, counted from 1, of those from byte `start` of the text on. Lines before `start`
    are counted only when a message needs it.
    """

    def __init__(self, file: TextFile, start: int, number: int):
        self._file, self._start, self._number = file, start, number

    def __str__(self) -> str:
        """Return "line N", where N counts from 1 at the beginning of the file.

        This reads the file up to the byte from which the object's own number counts, to add the lines in front of that
        byte.
        """
        before, left = 0, self._start
        if left:
            with open_utf8(self._file) as opened:
                while left and (block := opened.read(min(left, 1 << 20))):
                    before, left = before + block.count(b"\n"), left - len(block)
        return f"line {before + self._number}"


def _json_lines(file: TextFile, start: int, end: int | None) -> Rows:
    """Yield (place, row) for each JSON object on a line that begins at byte `start` of the text or later, before `end`.

    `start` is 0 or the beginning of a line. `place` is an object whose text is the line's position, such as "line 5".
    An `end` of None means all lines up to the end. Blank lines are skipped. Raise `ValueError` for a line that is no
    JSON object in UTF-8 or is longer than `files.ROW` (2**26) bytes.
    """
    at = start
    with open_utf8(file, start) as opened:
        for number in count(1):
            line = opened.readline(files.ROW + 1) if end is None or at < end else b""
            if not line:
                return
            place = _Line(file, start, number)
            if len(line) > files.ROW:
                raise ValueError(f"{file}, {place}: {files.too_long()}")
            at += len(line)
            if line.strip():
                value = _parsed(file, line, place)
                if not isinstance(value, dict):
                    raise ValueError(f"{file}, {place}: {_a(value)}; expected an object with named fields")
                yield place, value


def _json_array(file: TextFile) -> Rows:
    """Yield ("row 5", value) for each value of the JSON array in a file, counted from 1.

    The array is parsed value by value, without holding all of it in memory. Raise `ValueError` if the file holds
    something else than one array, or a value is longer than `files.ROW` (2**26) characters. Bytes that are not UTF-8
    raise `UnicodeDecodeError`.
    """
    with open_utf8(file) as opened:
        text = _Ahead(file, opened)
        text.skip("[")
        number = 0
        while text.peek() != "]":
            number += 1
            yield f"row {number}", text.value(number)
            if text.peek() != "]":
                text.skip(",")
        text.skip("]")
        if text.peek():
            raise ValueError(f"{file}: more text behind its JSON array; expected one array")


def _json_object(file: TextFile) -> Rows:
    """Yield ("row 5", row) for each row of a file with one JSON object, counted from 1.

    If the field `data` of the object is a list, the rows are its values, or the questions in it for SQuAD's nested
    form. Otherwise the object itself is the only row. Raise `ValueError` for a file that is empty, has more than four
    times `files.ROW` (2**26) bytes, or holds another value than an object. Bytes that are not UTF-8 raise
    `UnicodeDecodeError`.
    """
    most = 4 * files.ROW
    with open_utf8(file) as opened:
        content = opened.read(most + 1) if file.path.stat().st_size <= most else b""
    if not 0 < len(content) <= most:
        raise ValueError(f"{file}: one JSON value of more than {most:,} bytes; expected a row on each line")
    value = _parsed(file, content, None)
    if not isinstance(value, dict):
        raise ValueError(f"{file}: {_a(value)}; expected an array of objects")
    value = value["data"] if isinstance(value.get("data"), list) else [value]
    if is_squad(value):
        yield from squad_rows(str(file), value)
        return
    yield from ((f"row {number}", row) for number, row in enumerate(value, start=1))


def _parsed(file: TextFile, text: bytes, place: object) -> Any:
    """Return the JSON value in the bytes `text`.

    Raise `ValueError`, which names the file and the place, if `text` is not valid JSON. `place` is the row's position,
    such as "line 5", or None for a whole file. For None, bytes that are not UTF-8 raise `UnicodeDecodeError` instead.
    An object that has a field twice, and JSON that is nested too deeply, are not valid.
    """
    where = file if place is None else f"{file}, {place}"
    try:
        return _DECODER.decode(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        if place is None:
            raise
        raise ValueError(
            f"{where}: not UTF-8 (byte {error.start} of the line: {error.reason}); convert it first"
        ) from None
    except json.JSONDecodeError as error:
        where = where if place is not None else f"{file}, line {error.lineno}"
        raise ValueError(f"{where}: not JSON ({error}); expected an object with named fields") from None
    except RecursionError:
        raise ValueError(f"{where}: not JSON that can be read, nested too deeply; expected rows") from None
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _object(pairs: list[tuple[str, Any]]) -> Row:
    """Return the dict of a JSON object's (name, value) pairs. Raise `_TwiceError` if a name occurs twice."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"an object has the field {twice!r} twice; expected a name for each")
    return row


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


class _TwiceError(ValueError):
    """Error for a JSON object with two fields of one name. Reading more text would not mend it."""


def _a(value: object) -> str:
    """Return the type of a JSON value for a message.

    The result is "an object", "a list", "a number", "true or false", "a text", "null", or "a TYPE" for any other type.
    """
    names = {
        dict: "an object",
        list: "a list",
        int: "a number",
        float: "a number",
        bool: "true or false",
        str: "a text",
    }
    return names.get(type(value), "null" if value is None else f"a {type(value).__name__}")


class _Ahead:
    """Text of a JSON file that is parsed value by value: a position, and as much text behind it as was needed."""

    def __init__(self, file: TextFile, opened: IO[bytes]):
        self._file, self._opened = file, io.TextIOWrapper(opened, "utf-8")
        self._text, self._place, self._ended = "", 0, False

    def peek(self) -> str:
        """Return the next character of the text that is not white space, without consuming it, or "" at the end."""
        while True:
            while self._place < len(self._text) and self._text[self._place] in " \t\r\n":
                self._place += 1
            if self._place < len(self._text):
                return self._text[self._place]
            if not self._more(1 << 16):
                return ""

    def skip(self, mark: str) -> None:
        """Skip white space and the character `mark`. Raise `ValueError` if another character or the end follows."""
        if (found := self.peek()) != mark:
            raise ValueError(
                f"{self._file}: not JSON, has {(found and repr(found)) or 'its end'}; expected {mark!r} in its array"
            )
        self._place += 1

    def value(self, number: int) -> Any:
        """Parse and return the next JSON value of the text, and move the position behind it.

        `number` is the value's number in the array, for messages. More text is read, twice as much each time, until the
        value is complete. Raise `ValueError` if it is no JSON, has a field twice, is nested too deeply, or has more
        than `files.ROW` (2**26) characters.
        """
        self.peek()
        where = f"{self._file}, row {number}"
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._place)
                if end - self._place <= files.ROW and (end < len(self._text) or self._ended):  # a number may go on
                    self._place = end
                    return value
            except RecursionError:
                raise ValueError(f"{where}: not JSON that can be read, nested too deeply; expected a row") from None
            except _TwiceError as error:
                raise ValueError(f"{where}: {error}") from None
            except ValueError as error:
                if self._ended:
                    raise ValueError(f"{where}: not JSON ({error}); expected a text or an object") from None
            if len(self._text) - self._place > files.ROW:
                raise ValueError(f"{where}: {files.too_long()}")
            self._more(max(1 << 16, len(self._text)))

    def _more(self, size: int) -> bool:
        """Read up to `size` more characters, and drop the text before the current position, which was parsed already.

        Return True, or False at the end of the file, where nothing is read.
        """
        block = self._opened.read(size)
        self._ended = not block
        self._text, self._place = self._text[self._place :] + block, 0
        return bool(block)


# --- parquet ---


def _parquet(file: TextFile, start: int, end: int | None, column: str | None) -> Rows:
    """Yield ("row 5", row) for each row of a parquet table's row groups from `start` up to, but not including, `end`.

    The number counts from 1 at the beginning of the table. An `end` of None means all groups from `start` on. `row` is
    a dict by column. If `column` is given, only that column is read. Raise `ValueError` if the table lacks it, if two
    columns have one name, or if the file is damaged.
    """
    with _parquet_file(file) as table:
        import pyarrow

        names = table.schema_arrow.names
        check_names(file, names)
        if column is not None and column not in names:
            raise ValueError(f"{file}: {no_column(column, names)} (see --text-column)")
        last = table.metadata.num_row_groups if end is None else end
        number = count(1 + sum(table.metadata.row_group(group).num_rows for group in range(start)))
        only = None if column is None else [column]
        try:
            for batch in table.iter_batches(_BATCH, row_groups=list(range(start, last)), columns=only):
                for row in batch.to_pylist():
                    yield f"row {next(number)}", row
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: damaged, or no parquet table ({error})") from None


def _parquet_file(file: TextFile) -> Any:
    """Open a file as `pyarrow.parquet.ParquetFile`. Raise `ValueError` if pyarrow is missing or cannot read it."""
    require("pyarrow", "hf", str(file))
    import pyarrow
    from pyarrow import parquet as tables

    try:
        return tables.ParquetFile(file.path)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: damaged, or no parquet table ({error})") from None


def _undecodable(file: TextFile) -> str:
    """Return the end of a message about the first line of the file that is not UTF-8.

    An example is ", line 5: not UTF-8 (byte 3 of the line: invalid start byte); convert it first". If each line by
    itself is UTF-8, the message names no line.
    """
    with open_utf8(file) as opened:
        for number, line in enumerate(iter(lambda: opened.readline(files.ROW), b""), start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f", line {number}: not UTF-8 (byte {error.start} of the line: {error.reason}); convert it first"
    return ": not UTF-8; convert it first"
