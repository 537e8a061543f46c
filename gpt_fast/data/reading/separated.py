"""Rows of .csv and .tsv files. A .csv may quote; whether a .tsv does is decided by its content."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, Any

from . import files
from .files import TextFile, open_utf8

Say = Callable[[str], object]
Quoting = tuple[int, str]  # csv's constant, and the line about it for the user


@dataclass(frozen=True)
class RowOptions:
    """Options for reading a file.

    Args:
        columns: Names of the columns of a .csv or .tsv without a header line.
        skip_ragged: Skip rows that have another number of fields than the header.
    """

    columns: tuple[str, ...] = ()
    skip_ragged: bool = False


DEFAULT = RowOptions()


def ignore(message: str) -> None:
    """Ignore a message. This is the default of parameters named `say`."""


def delimiter(kind: str) -> str:
    """Return the character between the fields of a file: a tab if `kind` is "tsv", a comma for any other kind."""
    return "\t" if kind == "tsv" else ","


def separated(
    file: TextFile, kind: str, given: RowOptions | None = None, say: Say = ignore
) -> Iterator[tuple[str, dict[str, object]]]:
    """Yield (place, row) for each row below the header of a "csv" or "tsv" file, such as ("line 5", {"text": "a"}).

    `place` is the last line of the row, if a quoted field holds line ends. `given` are options for reading.
    `given.columns` are the names of the columns if the file has no header line. `given.skip_ragged` skips rows with
    another number of fields than columns. `given` is None if the caller's command has no such options. Blank lines are
    skipped. `say` is called with a message if a .tsv has quotes and, behind the last row, if rows were skipped.

    Raise `ValueError` for a row with another number of fields than columns, unless `given.skip_ragged`. The message
    mentions the option --skip-ragged only if `given` is not None. Also raise `ValueError` if two columns have one name,
    and for misplaced quotes, a NUL character or a row that is too long.
    """
    options = given or DEFAULT
    quoting = csv.QUOTE_MINIMAL
    if kind == "tsv":
        quoting, told = tsv_quoting(file, options)
        if told:
            say(told)
    ragged: list[str] = []
    with _reader(file, kind, quoting) as (reader, lines):
        header = list(options.columns) or next(reader, [])
        check_names(file, header)
        for row in reader:
            lines.begin_row()
            if not row:
                continue
            place = f"line {reader.line_num}"
            if len(row) == len(header):
                yield place, dict(zip(header, row, strict=True))
            elif options.skip_ragged:
                ragged.append(place)
            else:
                raise ValueError(
                    f"{file}, {place}: {len(row)} fields under a header of {len(header)}"
                    + ("; --skip-ragged skips such rows" if len(header) > 1 and given is not None else "")
                )
    if ragged:
        say(f"{file}: skipped {len(ragged):,} rows with another number of fields: {some(ragged)}")


def check_names(file: TextFile, header: list[str]) -> None:
    """Raise `ValueError` if two columns of `header` have one name, because a row could keep only one of them.

    The message names the file.
    """
    for name in header:
        places = [str(i) for i, other in enumerate(header, start=1) if other == name]
        if len(places) > 1:
            raise ValueError(
                f"{file}: columns {' and '.join(places)} are both called {name!r}; expected a name for each "
                "(rename one in the header)"
            )


def some(places: list[str], most: int = 3) -> str:
    """Return the first `most` of the positions `places` as text: "line 3, line 5, line 9, …".

    The text ends in "…" only if there are more positions.
    """
    return ", ".join(places[:most]) + (", …" if len(places) > most else "")


def tsv_quoting(file: TextFile, options: RowOptions = DEFAULT) -> Quoting:
    """Return (quoting, message): how the quotes of a .tsv file are to be read, and a message about it for the user.

    `quoting` is `csv.QUOTE_MINIMAL` if the quotes are syntax, `csv.QUOTE_NONE` if they are text. The message names the
    choice and the number of rows in either reading. If the file has no quotes, the result is (`csv.QUOTE_NONE`, "").
    `options.columns` are the names of the columns if the file has no header line.

    The file is read in both ways. A row is ragged if its number of fields is not the number of columns. Quotes are text
    if the reading as syntax fails or has a ragged row. A lone quote, as in GLUE's files, would join whole rows if taken
    for syntax. So quotes are also text if the reading as syntax has fewer rows than the reading as text, by more than
    the number of ragged rows in the reading as text. If neither reading has a ragged row, quotes are text unless a csv
    writer with one style of quoting would write every row as it stands. In all other cases they are syntax. The result
    is cached until the file changes.
    """
    return _tsv_quoting(file, options, file.path.stat().st_mtime_ns)


@lru_cache(maxsize=256)
def _tsv_quoting(file: TextFile, options: RowOptions, written: int) -> Quoting:
    """Return (quoting, message) for a .tsv file: how its quotes are to be read, and a message about it for the user.

    `quoting` is `csv.QUOTE_MINIMAL` if the quotes are syntax, `csv.QUOTE_NONE` if they are text. For a file without
    quotes the result is (`csv.QUOTE_NONE`, ""). Otherwise the file is read in both ways, and the number of fields in
    the rows of each reading decides (see `tsv_quoting`). `options.columns` are the names of the columns if the file has
    no header line.

    The result is cached. `written` is the file's time of change in nanoseconds. It is part of the cache's key, so a
    file that has changed is read again.
    """
    with open_utf8(file) as opened:
        if not any(b'"' in block for block in iter(lambda: opened.read(1 << 20), b"")):
            return csv.QUOTE_NONE, ""
    plain, quoted = (_scan(file, quoting, options) for quoting in (csv.QUOTE_NONE, csv.QUOTE_MINIMAL))
    swallowed = plain.rows - quoted.rows
    if quoted.error is not None or quoted.ragged:
        is_quoted = False
    elif plain.ragged:  # of the lines of a quoted field, all but the first or the last are ragged
        is_quoted = plain.ragged >= swallowed
    else:
        is_quoted = bool(quoted.forms) and swallowed == 0
    with_quotes = f"{quoted.rows:,} rows" if quoted.error is None else f"an error ({quoted.error})"
    if is_quoted:
        told = f'{file}: read with " as quotes, {with_quotes} (as plain text: {plain.rows:,})'
        return csv.QUOTE_MINIMAL, told
    return csv.QUOTE_NONE, f'{file}: read without quoting, {plain.rows:,} rows (with " as quotes: {with_quotes})'


@dataclass
class _Scan:
    """Statistics of reading a .tsv in one way, with quotes as syntax or as text.

    `ragged` counts the rows with another number of fields than the header. `error` is the message if reading failed.
    `forms` are the constants of the csv module with which a csv writer would write every row as it stands in the file.
    """

    rows: int = 0
    ragged: int = 0
    error: str | None = None
    forms: set[int] = field(default_factory=lambda: {csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC})


def _scan(file: TextFile, quoting: int, options: RowOptions) -> _Scan:
    """Read a .tsv file with `quoting`, a constant of the csv module, and return the statistics of that reading.

    `rows` is the number of rows below the header, and `ragged` the number of rows with another number of fields than
    there are columns. `error` is the message if reading failed, else None. `forms` is one set for the whole file: the
    constants of the csv module with which a csv writer would write every row as it stands there. It has no meaning if
    `quoting` is `csv.QUOTE_NONE`. `options.columns` are the names of the columns if the file has no header line. Raise
    `UnicodeDecodeError` if the file is not UTF-8.
    """
    scan = _Scan()
    try:
        with _reader(file, "tsv", quoting) as (reader, lines):
            width = len(options.columns) or len(next(reader, []))
            lines.begin_row()
            for row in reader:
                text = lines.begin_row().rstrip("\r\n")
                if not row:
                    continue
                scan.rows += 1
                scan.ragged += len(row) != width
                if quoting != csv.QUOTE_NONE:
                    scan.forms = {form for form in scan.forms if _written(row, form) == text}
    except UnicodeDecodeError:
        raise
    except ValueError as error:  # in this reading; reading the rows in the chosen one raises it again
        scan.error = str(error).removeprefix(f"{file}, ")
    return scan


@contextmanager
def _reader(file: TextFile, kind: str, quoting: int) -> Iterator[tuple[Any, _Lines]]:
    """Yield (csv reader of the file, the `_Lines` object from which it reads).

    `kind` is "csv" or "tsv", `quoting` a constant of the csv module. The limit of the csv module for the size of a
    field is set to `files.ROW` (2**26) characters, for the whole process. A `csv.Error` inside the block becomes a
    `ValueError` that names the file and the line.
    """
    csv.field_size_limit(files.ROW)
    with open_utf8(file) as opened:
        lines = _Lines(file, opened)
        reader = csv.reader(lines, delimiter=delimiter(kind), quoting=quoting, strict=True)  # type: ignore[arg-type]
        try:
            yield reader, lines
        except csv.Error as error:
            raise ValueError(f"{file}, line {reader.line_num}: {error}; expected quotes around whole fields") from None


class _Lines:
    """Iterator over the lines of a file that keeps the text of the current row, of at most `files.ROW` characters.

    A row is several lines if a quoted field holds line ends.
    """

    def __init__(self, file: TextFile, opened: IO[bytes]):
        self._file, self._text = file, io.TextIOWrapper(opened, "utf-8", newline="")
        self._number, self._length = 0, 0
        self._row: list[str] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        """Return the next line and add it to the text of the current row.

        Raise `ValueError` if the row is longer than `files.ROW` (2**26) characters or has a NUL character, and
        `StopIteration` at the end of the file.
        """
        line = self._text.readline(files.ROW - self._length + 1)
        if not line:
            raise StopIteration
        self._number += 1
        self._length += len(line)
        if self._length > files.ROW:
            raise ValueError(f"{self._file}, line {self._number}: {files.too_long()}")
        if "\0" in line:
            raise ValueError(f"{self._file}, line {self._number}: has a NUL character; expected text")
        self._row.append(line)
        return line

    def begin_row(self) -> str:
        """Return the text of the lines that were read since the last call, which make one row, and begin a new row.

        The text is "" if no line was read since then.
        """
        text, self._row, self._length = "".join(self._row), [], 0
        return text


def _written(row: list[str], form: int) -> str:
    """Return the line that a csv writer with tabs makes of a row, without a line end.

    `form` is a quoting constant of the csv module. With `csv.QUOTE_NONNUMERIC`, texts that are numbers get no quotes.
    """
    values: list[Any] = list(row)
    if form == csv.QUOTE_NONNUMERIC:
        values = [_Numeral(value) if _is_number(value) else value for value in row]
    out = io.StringIO()
    csv.writer(out, delimiter="\t", quoting=form, lineterminator="").writerow(values)  # type: ignore[arg-type]
    return out.getvalue()


class _Numeral(float):
    """Number that a csv writer writes as it was spelled in the file."""

    def __new__(cls, spelled: str) -> _Numeral:
        number = super().__new__(cls, spelled)
        number.spelled = spelled
        return number

    spelled: str

    def __str__(self) -> str:
        return self.spelled

    __repr__ = __str__


def _is_number(text: str) -> bool:
    """Return True if `text` is digits, perhaps with signs in front, a point, and white space around."""
    return text.strip().lstrip("+-").replace(".", "", 1).isdecimal()
