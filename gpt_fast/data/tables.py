"""Labelled tables: .csv, .tsv and .jsonl, read row by row."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SUFFIXES = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class Table:
    """Texts and their labels, as strings; `source` names the file and appears in messages. `more` holds each row's
    further texts, where a task has several."""

    source: str
    texts: list[str]
    labels: list[str]
    more: list[tuple[str, ...]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, indices: list[int]) -> Table:
        columns = ([column[i] for i in indices] if column else [] for column in (self.texts, self.labels, self.more))
        return Table(self.source, *columns)  # type: ignore[arg-type]

    def fields(self, row: int) -> tuple[str, ...]:
        """All texts of a row."""
        return (self.texts[row], *(self.more[row] if self.more else ()))


def read_table(
    path: Path, text_column: str = "text", label_column: str = "label", more_columns: Sequence[str] = ()
) -> Table:
    """The named columns of a table in UTF-8 (a byte order mark is fine). csv and tsv have a header line and may
    quote; jsonl has one object per line, in which a further column may be a list of texts. Missing columns, ragged rows
    and empty tables are errors that name the line."""
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"{path}: wanted a table ending in {', '.join(SUFFIXES)}, got {path.suffix or 'no ending'!r}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    read_rows = _jsonl_rows if path.suffix.lower() == ".jsonl" else _csv_rows
    table = Table(str(path), [], [])
    try:
        for line, row in read_rows(path):
            for column in (text_column, *more_columns, label_column):
                if column not in row:
                    raise ValueError(f"{path}, line {line}: no column {column!r}; it has {', '.join(map(repr, row))}")
            text, label = row[text_column], row[label_column]
            if not isinstance(text, str):
                raise ValueError(f"{path}, line {line}: column {text_column!r} holds {text!r}; wanted text")
            if not isinstance(label, (str, int, float)) or label == "":
                raise ValueError(f"{path}, line {line}: column {label_column!r} holds {label!r}; wanted a label")
            more = [part for column in more_columns for part in _texts(row[column])]
            if not all(isinstance(part, str) for part in more):
                raise ValueError(
                    f"{path}, line {line}: columns {', '.join(map(repr, more_columns))} hold {more!r}; wanted texts"
                )
            if more_columns:
                table.more.append(tuple(map(str, more)))
            table.texts.append(text)
            table.labels.append(str(label))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason}); convert it first") from None
    if not table.texts:
        raise ValueError(f"{path}: empty; wanted at least one row with {text_column!r} and {label_column!r}")
    return table


def _texts(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
    csv.field_size_limit(2**31 - 1)  # the module's own limit of 128 kB is less than a long article
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
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


def _jsonl_rows(path: Path) -> Iterator[tuple[int, dict[str, object]]]:
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
