"""Rows of table files: .csv, .tsv, .jsonl, .json and .parquet, and the nested forms of SQuAD, RACE and ARC."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
WRITTEN = (".csv", ".tsv", ".jsonl")
Row = dict[str, object]
Say = Callable[[str], object]


@dataclass(frozen=True)
class RowOptions:
    """Options for reading a file. `columns` names the columns of a .csv or .tsv without a header line. `skip_ragged`
    skips rows that have another number of fields than the header."""

    columns: tuple[str, ...] = ()
    skip_ragged: bool = False


DEFAULT = RowOptions()


def ignore(message: str) -> None:
    """Take a message about a file and say nothing."""


def row_options(columns: str | None, skip_ragged: bool) -> RowOptions:
    """Return the options --columns, names with commas between them, and --skip-ragged."""
    return RowOptions(() if columns is None else tuple(columns.split(",")), skip_ragged)


def read_rows(path: Path, options: RowOptions = DEFAULT, say: Say = ignore) -> Iterator[tuple[str, Row]]:
    """Yield the rows of a table, each with its place: "line 5", or "row 5" in a .json or .parquet.

    Text is UTF-8, with or without a byte order mark. A .csv may quote; a .tsv is read with or without quoting, as its
    content demands, and `say` gets a line about it. Raises `FileNotFoundError`, and `ValueError` for a file that cannot
    be read without losing a row or a column.
    """
    suffix = table_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if options.columns and suffix not in (".csv", ".tsv"):
        raise ValueError(f"--columns {','.join(options.columns)}: {path} names its columns itself; leave it out")
    if suffix == ".parquet":
        yield from _parquet_rows(path)
        return
    try:
        if suffix in (".csv", ".tsv"):
            yield from _csv_rows(path, options, say)
        else:
            rows = _jsonl_rows(path) if suffix == ".jsonl" else _json_rows(path)
            yield from (pair for place, row in rows for pair in _unnested(place, row))
    except UnicodeDecodeError:
        raise ValueError(f"{path}{_undecodable(path)}") from None


def table_suffix(path: Path, suffixes: tuple[str, ...] = SUFFIXES) -> str:
    """Return the ending of a table's name in small letters. Raise `ValueError` for a folder and another ending."""
    suffix = path.suffix.lower()
    if path.is_dir():
        raise ValueError(f"{path}: a folder; expected a table ending in {', '.join(suffixes)}")
    if suffix not in suffixes:
        raise ValueError(
            f"{path}: ends in {path.suffix or 'nothing'!r}; expected a table ending in {', '.join(suffixes)}"
        )
    return suffix


def delimiter(suffix: str) -> str:
    return "\t" if suffix == ".tsv" else ","


def _undecodable(path: Path) -> str:
    """Return the place and the cause of the first bytes of a file that are not UTF-8."""
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode("utf-8")
            except UnicodeDecodeError as error:
                return f", line {number}: not UTF-8 (byte {error.start} of the line: {error.reason}); convert it first"
    return ": not UTF-8; convert it first"


# --- .csv and .tsv ---


def _csv_rows(path: Path, options: RowOptions, say: Say) -> Iterator[tuple[str, Row]]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 128 kB is less than a long article
    suffix = path.suffix.lower()
    quoting = _quoting(path, options, say) if suffix == ".tsv" else csv.QUOTE_MINIMAL
    ragged: list[str] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter(suffix), quoting=quoting, strict=True)  # type: ignore[arg-type]
        try:
            header = list(options.columns) or next(reader, [])
            _check_names(path, header)
            for row in reader:
                if not row:
                    continue
                place = f"line {reader.line_num}"
                if len(row) == len(header):
                    yield place, dict(zip(header, row, strict=True))
                elif options.skip_ragged:
                    ragged.append(place)
                else:
                    raise ValueError(
                        f"{path}, {place}: {len(row)} fields under a header of {len(header)}"
                        + ("; --skip-ragged skips such rows" if len(header) > 1 else "")
                    )
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None
    if ragged:
        say(f"{path}: skipped {len(ragged):,} rows with another number of fields: {some(ragged)}")


def _check_names(path: Path, header: list[str]) -> None:
    """Raise `ValueError` for two columns of one name: a row could keep only one of them."""
    for name in header:
        places = [str(i) for i, other in enumerate(header, start=1) if other == name]
        if len(places) > 1:
            raise ValueError(
                f"{path}: columns {' and '.join(places)} are both called {name!r}; expected a name for each "
                "(rename one in the header)"
            )


def some(places: list[str], most: int = 3) -> str:
    """Return the first of some places as text: "line 3, line 5, line 9, …"."""
    return ", ".join(places[:most]) + (", …" if len(places) > most else "")


@dataclass
class _Scan:
    """What a .tsv holds in one of the two readings."""

    rows: int = 0
    ragged: int = 0
    error: str | None = None
    forms: set[int] = field(default_factory=lambda: {csv.QUOTE_MINIMAL, csv.QUOTE_ALL, csv.QUOTE_NONNUMERIC})


def _quoting(path: Path, options: RowOptions, say: Say) -> int:
    """Return how a .tsv is read: `csv.QUOTE_MINIMAL` if its quotes are syntax, `csv.QUOTE_NONE` if they are text.

    Both readings are counted. Quotes are syntax if every row then has all fields, and either the plain lines do not, or
    a csv writer would have written this very file. In an unquoted file, such as GLUE's, a lone quote would otherwise
    swallow the rows up to the next one.
    """
    with path.open("rb") as file:
        if not any(b'"' in block for block in iter(lambda: file.read(1 << 20), b"")):
            return csv.QUOTE_NONE
    plain, quoted = (_scan(path, quoting, options) for quoting in (csv.QUOTE_NONE, csv.QUOTE_MINIMAL))
    swallowed = plain.rows - quoted.rows
    if quoted.error is not None or quoted.ragged:
        is_quoted = False
    elif plain.ragged:  # of the lines of a quoted field, all but the first or the last are ragged
        is_quoted = plain.ragged >= swallowed
    else:
        is_quoted = bool(quoted.forms) and swallowed == 0
    with_quotes = f"{quoted.rows:,} rows" if quoted.error is None else f"an error ({quoted.error})"
    if is_quoted:
        say(f'{path}: read with " as quotes, {with_quotes} (as plain text: {plain.rows:,})')
        return csv.QUOTE_MINIMAL
    say(f'{path}: read without quoting, {plain.rows:,} rows (with " as quotes: {with_quotes})')
    return csv.QUOTE_NONE


def _scan(path: Path, quoting: int, options: RowOptions) -> _Scan:
    scan, lines = _Scan(), []

    def noted(file: Iterable[str]) -> Iterator[str]:
        for line in file:
            lines.append(line)
            yield line

    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(noted(file), delimiter="\t", quoting=quoting, strict=True)  # type: ignore[arg-type]
        try:
            width = len(options.columns) or len(next(reader, []))
            lines.clear()
            for row in reader:
                text = "".join(lines).rstrip("\r\n")
                lines.clear()
                if not row:
                    continue
                scan.rows += 1
                scan.ragged += len(row) != width
                if quoting != csv.QUOTE_NONE:
                    scan.forms = {form for form in scan.forms if _written(row, form) == text}
        except csv.Error as error:
            scan.error = f"line {reader.line_num}: {error}"
    return scan


def _written(row: list[str], form: int) -> str:
    """Return the line that a csv writer makes of a row."""
    values: list[Any] = list(row)
    if form == csv.QUOTE_NONNUMERIC:
        values = [_Numeral(value) if _is_number(value) else value for value in row]
    out = io.StringIO()
    csv.writer(out, delimiter="\t", quoting=form, lineterminator="").writerow(values)  # type: ignore[arg-type]
    return out.getvalue()


class _Numeral(float):
    """A number that a csv writer writes as it was spelled."""

    def __new__(cls, spelled: str) -> _Numeral:
        number = super().__new__(cls, spelled)
        number.spelled = spelled
        return number

    spelled: str

    def __str__(self) -> str:
        return self.spelled

    __repr__ = __str__


def _is_number(text: str) -> bool:
    return text.strip().lstrip("+-").replace(".", "", 1).isdecimal()


# --- .jsonl and .json ---


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            row = _parsed(path, line, f"line {number}")
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: wanted an object with named fields, got {line.strip()[:40]}")
            yield f"line {number}", row


def _json_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the objects of an array, the questions of SQuAD's nested form, or the lines of a file that is a .jsonl."""
    text = path.read_text(encoding="utf-8-sig")
    first, _, rest = text.strip().partition("\n")
    if first.startswith("{") and first.rstrip().endswith("}") and rest.lstrip().startswith("{"):
        yield from _jsonl_rows(path)
        return
    content = _parsed(path, text, None)
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
        if content and all(isinstance(entry, dict) and "paragraphs" in entry for entry in content):
            yield from _squad_rows(path, content)
            return
    for number, row in enumerate([content] if isinstance(content, dict) else content, start=1):
        if not isinstance(row, dict):
            raise ValueError(f"{path}, row {number}: wanted an object with named fields, got {json.dumps(row)[:40]}")
        yield f"row {number}", row


def _parsed(path: Path, text: str, place: str | None) -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, {place or f'line {error.lineno}'}: not JSON ({error})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}{', ' + place if place else ''}: {error}") from None
    if place is None and not isinstance(value, (dict, list)):
        raise ValueError(f"{path}: holds a {type(value).__name__}; expected an array of objects")
    return value


def _object(pairs: list[tuple[str, Any]]) -> Row:
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"an object has the field {twice!r} twice; expected a name for each")
    return row


def _squad_rows(path: Path, articles: list[Any]) -> Iterator[tuple[str, Row]]:
    """Yield a row for each question, with the fields of Hugging Face's copy; `answers` is empty for a question that
    has none, as in SQuAD 2.0."""
    number = count(1)
    for article in articles:
        for paragraph in _objects(path, article, "paragraphs"):
            for question in _objects(path, paragraph, "qas"):
                row = {"title": article.get("title"), "context": paragraph.get("context")}
                row |= {name: question.get(name) for name in ("id", "question")}
                if "answers" in question:
                    answers = _objects(path, question, "answers")
                    row["answers"] = {name: [each.get(name) for each in answers] for name in ("text", "answer_start")}
                yield f"row {next(number)}", row


def _objects(path: Path, value: Row, name: str) -> list[Row]:
    """Return the objects that a level of SQuAD's nested form lists as `name`."""
    found = value.get(name)
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise ValueError(f"{path}: {name} of SQuAD's form is {json.dumps(found)[:40]}; expected a list of objects")
    return found


def _unnested(place: str, row: Row) -> Iterator[tuple[str, Row]]:
    """Yield a row as it is, a row for each question of one of RACE's articles, or one of ARC's with plain choices."""
    questions, choices = row.get("questions"), row.get("choices")
    parts = [row.get(name) for name in ("questions", "options", "answers")]
    if "article" in row and isinstance(questions, list) and all(isinstance(part, list) for part in parts):
        for number, question in enumerate(questions):
            answers, options = (row[name][number : number + 1] for name in ("answers", "options"))  # type: ignore[index]
            several = {"question": question, "options": [*options, None][0], "answer": [*answers, None][0]}
            yield f"{place}, question {number + 1}", {"id": row.get("id"), "article": row["article"], **several}
        return
    stem = row.get("question")
    if isinstance(stem, dict) and "stem" in stem:
        row = row | {"question": stem["stem"]}
        choices = stem.get("choices")
    if (
        isinstance(choices, list)
        and choices
        and all(isinstance(c, dict) and {"text", "label"} <= c.keys() for c in choices)
    ):
        choices = {name: [choice[name] for choice in choices] for name in ("text", "label")}
    if isinstance(choices, dict) and all(isinstance(choices.get(name), list) for name in ("text", "label")):
        row = row | {"choices": choices["text"]}
        if row.get("answerKey") in choices["label"]:  # some of ARC's rows count from 1, most have letters
            row["answer"] = choices["label"].index(row["answerKey"])
    yield place, row


# --- .parquet ---


def _parquet_rows(path: Path) -> Iterator[tuple[str, Row]]:
    if find_spec("pyarrow") is None:
        raise ValueError(f"{path}: needs pyarrow; pip install gpt-fast[hf]")
    import pyarrow
    import pyarrow.parquet

    number = count(1)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    place = f"row {next(number)}"
                    yield from _unnested(place, row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged, or no parquet file ({error})") from None
