"""Labelled tables: .csv, .tsv and .jsonl, read row by row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .._files import replacing

SUFFIXES = (".csv", ".tsv", ".jsonl")
Row = dict[str, object]


@dataclass(frozen=True)
class Table:
    """Texts and their labels, as strings, none where the labels are what is asked for; `source` names the file and
    appears in messages. `more` holds each row's further texts, where a task has several."""

    source: str
    texts: list[str]
    labels: list[str]
    more: list[tuple[str, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, indices: list[int]) -> Table:
        """The table of the rows at `indices`, in their order."""
        columns = ([column[i] for i in indices] if column else [] for column in (self.texts, self.labels, self.more))
        return Table(self.source, *columns)  # type: ignore[arg-type]

    def fields(self, row: int) -> tuple[str, ...]:
        """All texts of a row."""
        return (self.texts[row], *(self.more[row] if self.more else ()))


def read_table(
    path: Path, text_column: str = "text", label_column: str | None = "label", more_columns: Sequence[str] = ()
) -> Table:
    """The named columns of a table; without a label's the table has no labels. A further column of a jsonl may be a
    list of texts. Raises `FileNotFoundError` where there is no such file, `ValueError` for a column that is missing or
    holds no text, an empty table or one that is not UTF-8; what is wrong with a row names its line."""
    table = Table(str(path), [], [])
    columns = (text_column, *more_columns, *([] if label_column is None else [label_column]))
    for line, row in read_rows(path):
        for column in columns:
            if column not in row:
                raise ValueError(f"{path}, line {line}: no column {column!r}; it has {', '.join(map(repr, row))}")
        text = row[text_column]
        if not isinstance(text, str):
            raise ValueError(f"{path}, line {line}: column {text_column!r} holds {text!r}; wanted text")
        more = [part for column in more_columns for part in _texts(row[column])]
        if not all(isinstance(part, str) for part in more):
            raise ValueError(
                f"{path}, line {line}: columns {', '.join(map(repr, more_columns))} hold {more!r}; wanted texts"
            )
        if label_column is not None:
            label = row[label_column]
            if not isinstance(label, (str, int, float)) or label == "":
                raise ValueError(f"{path}, line {line}: column {label_column!r} holds {label!r}; wanted a label")
            table.labels.append(str(label))
        if more_columns:
            table.more.append(tuple(map(str, more)))
        table.texts.append(text)
    if not table.texts:
        raise ValueError(f"{path}: empty; wanted at least one row with {' and '.join(map(repr, columns))}")
    return table


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """The rows of a table in UTF-8 (a byte order mark is fine) as objects, each with the number of its line. csv and
    tsv have a header line and may quote; jsonl has one object per line. Ragged rows are errors that name the line."""
    suffix = table_suffix(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        yield from _jsonl_rows(path) if suffix == ".jsonl" else _csv_rows(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}); convert it first") from None


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """A table of the kind that the name of `path` tells: whole, or not at all."""
    suffix = table_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair, which a .jsonl may hold, becomes \ud800: UTF-8 has no other way to write it.
    with (
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        if suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            columns = list(dict.fromkeys(column for row in rows for column in row))
            writer = csv.DictWriter(file, columns, delimiter=_delimiter(suffix), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


def table_suffix(path: Path) -> str:
    """.csv, .tsv or .jsonl, whatever its case; another one is an error."""
    suffix = path.suffix.lower()
    if path.is_dir():
        raise ValueError(f"{path}: a folder; wanted a table ending in {', '.join(SUFFIXES)}")
    if suffix not in SUFFIXES:
        raise ValueError(f"{path}: wanted a table ending in {', '.join(SUFFIXES)}, got {path.suffix or 'no ending'!r}")
    return suffix


def _texts(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _delimiter(suffix: str) -> str:
    return "\t" if suffix == ".tsv" else ","


def _csv_rows(path: Path) -> Iterator[tuple[int, Row]]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 128 kB is less than a long article
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=_delimiter(path.suffix.lower()), strict=True)
        try:
            header = next(reader, [])
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}, line {reader.line_num}: {len(row)} fields under a header of {len(header)}"
                    )
                yield reader.line_num, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def _jsonl_rows(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(f"{path}, line {number}: wanted an object with named fields, got {line.strip()[:40]}")
            yield number, row
