"""Labelled tables: the columns of a task, read row by row from the files that `reading` reads."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .._disk import writing
from .._files import finite, replacing
from .._memory import available, utf8_size
from .._memory import size as in_bytes
from .labels import is_same_label
from .reading.rows import SUFFIXES, WRITTEN, Row, RowOptions, delimiter, no_column, read_rows, some, written_kind
from .tokenizer import has_lone_surrogate

__all__ = [
    "SUFFIXES", "WRITTEN", "MissingColumn", "Row", "Table", "TableOptions", "read_rows", "read_table",
    "write_rows",
]  # fmt: skip


@dataclass(frozen=True)
class Table:
    """Texts and their labels.

    Attributes:
        source: Name of the file, for messages.
        texts: Text of each row.
        labels: Label of each row as a string, or none if the labels are to be predicted.
        more: Further texts of each row, for tasks that have several.
        places: Where each row stands in the file.
        notes: Remarks on how the table was read, for a reader of results.
        starts: Index of the character of each row's text at which the answer begins, -1 if the file does not give it.
    """

    source: str
    texts: list[str]
    labels: list[str]
    more: list[tuple[str, ...]] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.texts)

    def rows(self, indices: list[int]) -> Table:
        """Return a table of the rows at `indices`, in the order of `indices`.

        Args:
            indices: Indices of the rows.

        Returns:
            A new table, with the source and a copy of the notes of this one. A list that is empty here, such as
            `labels`, is empty there.
        """
        names = ("texts", "labels", "more", "places", "starts")
        columns: dict[str, Any] = {name: getattr(self, name) for name in names}
        chosen = {name: [column[i] for i in indices] if column else [] for name, column in columns.items()}
        return Table(self.source, notes=[*self.notes], **chosen)

    def fields(self, row: int) -> tuple[str, ...]:
        """Return all texts of a row: the one in `texts`, then the row's texts in `more`, if the table has any.

        Args:
            row: Index of the row.

        Returns:
            The texts.
        """
        return (self.texts[row], *(self.more[row] if self.more else ()))

    def place(self, row: int) -> str:
        """Return where a row stands in the file, "line 5" for example.

        Args:
            row: Index of the row in the table.

        Returns:
            Its position in the file, for messages, or "row 5" for index 4 if the table has no positions.
        """
        return self.places[row] if self.places else f"row {row + 1}"


@dataclass(frozen=True)
class TableOptions(RowOptions):
    """Options of reading a table.

    Args:
        columns: Names of the columns of a .csv or .tsv without a header line.
        skip_ragged: Skip rows that have another number of fields than the header.
        skip_labels: Skip rows with one of these labels. "" stands for a label that is blank, NaN or null.
        text_labels: Labels are texts to be written or found, which keep their spaces and may be nested answers.
        several: "set" for a label that is a set of classes (a list, or a text with commas), "tags" for a tag for each
            word (a list, or a text with spaces). The table then holds a text with commas, or spaces.
    """

    skip_labels: tuple[str, ...] = ()
    text_labels: bool = False
    several: Literal["", "set", "tags"] = ""


DEFAULT = TableOptions()
_COST = 12  # bytes of memory for each byte of text: the text, and its tokens in lists before they are cut off
_OVERHEAD = 64  # bytes of text that a row counts for besides its own


def _size(text: str | Sequence[str]) -> int:
    """Return the length in UTF-8, in bytes, of a text, or of all words in a list together."""
    return utf8_size(text) if isinstance(text, str) else sum(map(utf8_size, text))


class MissingColumn(ValueError):
    """Error for a table that lacks a column. `row` is the row in which the column was looked for."""

    def __init__(self, path: Path, place: str, column: str, row: Row):
        super().__init__(f"{path}, {place}: {no_column(column, row)}")
        self.path, self.column, self.row = path, column, row


def read_table(
    path: Path,
    text_column: str = "text",
    label_column: str | None = "label",
    more_columns: Sequence[str] = (),
    options: TableOptions = DEFAULT,
) -> Table:
    r"""Read a file's columns of texts and labels into a `Table`.

    Args:
        path: A .csv, .tsv, .jsonl, .json or .parquet file. All but a .parquet may be compressed.
        text_column: Column of the text. If no column has this very name, a name with commas names several columns,
            whose texts are joined by line ends.
        label_column: Column of the label, or None for a table without labels. Spaces around labels are dropped, unless
            `options.text_labels` is True.
        more_columns: Columns of further texts, such as the second text of a pair. Such a column may hold lists of
            texts.
        options: How to read the table.

    Returns:
        The `Table`. Its lists have one entry for each row that was not skipped, with some exceptions. `labels` is empty
        if `label_column` is None, and `more` is empty without `more_columns`. `starts`, which holds the index at which
        each answer begins in the text, is empty unless there are labels and `options.text_labels` is True. `notes` has
        a message for each way in which rows were skipped or changed.

    Raises:
        FileNotFoundError: There is no such file.
        MissingColumn: A column is missing. This is a `ValueError`.
        ValueError: The table is empty, damaged or not UTF-8, or takes more memory than is left. Or the text of a row is
            null, has another type or holds a NUL character. Or a label is missing (null, NaN or blank), and `options`
            neither skip such rows (`""` in `skip_labels`) nor allow them (`several="set"`). Or a label has a type that
            `options` do not allow, such as a list. The message names the line of a wrong row.

    Example:
        ```python
        import pathlib, tempfile
        from gpt_fast import data

        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "films.csv")
            path.write_text("text,label\na fine film,good\ndull,bad\n")
            print(data.read_table(path).labels)  # ['good', 'bad']
        ```
    """
    table = Table(str(path), [], [])
    text_columns: list[str] = []
    columns: list[str] = []
    without: list[str] = []
    skipped: list[str] = []
    spaced: list[str] = []
    unanswered: list[str] = []
    first: object = None
    room, size = available(), 0
    for place, row in read_rows(path, options, table.notes.append):
        if not columns:
            text_columns = [text_column] if text_column in row else text_column.split(",")
            columns = [*text_columns, *more_columns, *([] if label_column is None else [label_column])]
        for column in columns:
            if column not in row:
                raise MissingColumn(path, place, column, row)
        if label_column is not None:
            value = row[label_column]
            if options.several:
                label = _several(path, place, label_column, value, options.several)
            else:
                label = _text_label(path, place, label_column, value) if options.text_labels else _label(value)
            if label is None:
                raise ValueError(f"{path}, {place}: column {label_column!r} holds {value!r}; expected a label")
            if any(is_same_label(label.strip(), skip) for skip in options.skip_labels):
                skipped.append(place)
                continue
            if not label.strip() and options.several == "set":
                pass  # a row of no class
            elif not label.strip() and isinstance(value, (dict, list)) and not options.several:
                unanswered.append(place)
            elif not label.strip():
                first = first if without else value
                without.append(place)
                continue
            if isinstance(value, str) and value != value.strip():
                spaced.append(place)
            table.labels.append(label)
            if options.text_labels:
                table.starts.append(_start(value) if len(text_columns) == 1 else -1)
        read = _words if options.several == "tags" else _text
        texts = [read(path, place, column, row[column]) for column in text_columns]
        if more_columns:
            table.more.append(tuple(_more(path, place, more_columns, row)))
        size += sum(map(_size, [*texts, *(table.more[-1] if more_columns else ())])) + _OVERHEAD
        if _COST * size > room:
            raise ValueError(
                f"{path}, {place}: {in_bytes(size)} of text or more, held in memory with its tokens; expected at most "
                f"{in_bytes(room // _COST)}, by the memory that is left; a part of the rows may be enough"
            )
        table.texts.append("\n".join(texts))
        table.places.append(place)
    if without:
        raise ValueError(
            f"{path}, {some(without)}: column {label_column!r} holds {first!r}; expected a label "
            f"({len(without):,} rows have none; --skip-label '' skips them)"
        )
    if skipped:
        table.notes.append(f"{path}: skipped {len(skipped):,} rows by their label: {some(skipped)}")
    if spaced and not options.text_labels:
        table.notes.append(f"{path}: dropped spaces around the labels of {len(spaced):,} rows: {some(spaced)}")
    if unanswered:
        table.notes.append(
            f"{path}: {len(unanswered):,} rows have no answer, which is an empty text: {some(unanswered)}"
        )
    damaged = [table.place(i) for i in range(len(table)) if any(map(has_lone_surrogate, table.fields(i)))]
    if damaged:
        table.notes.append(f"{path}: half a surrogate pair is read as \ufffd in {len(damaged):,} rows: {some(damaged)}")
    if not table.texts:
        wanted = [text_column, *more_columns, *([] if label_column is None else [label_column])]
        raise ValueError(f"{path}: empty; expected at least one row with {' and '.join(map(repr, wanted))}")
    return table


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """Write rows, each a dict by column, to a .csv, .tsv or .jsonl file: whole, or not at all.

    The ending of `path` decides the format. Missing parent folders are made, and a file at `path` is replaced. The
    columns of a .csv or .tsv are all keys of all rows, in the order in which they first occur, and a missing cell is
    empty. Lists and dicts in a cell of a .csv or .tsv are written as JSON.

    Raises:
        ValueError: `path` has another ending or is a folder.
        OSError: The file cannot be written.
    """
    kind = written_kind(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Half of a surrogate pair, which a .jsonl may hold, becomes \ud800: UTF-8 has no other way to write it.
    with (
        writing(path, "nothing of it is left" if not path.exists() else "the file before is as it was"),
        replacing(path) as temporary,
        temporary.open("w", encoding="utf-8", errors="backslashreplace", newline="") as file,
    ):
        if kind == "jsonl":
            file.writelines(_json(row) + "\n" for row in rows)
        else:
            columns = list(dict.fromkeys(column for row in rows for column in row))
            writer = csv.DictWriter(file, columns, delimiter=delimiter(kind), lineterminator="\n")
            writer.writeheader()
            writer.writerows(
                {name: _json(value) if isinstance(value, (dict, list)) else value for name, value in row.items()}
                for row in rows
            )


def _json(value: object) -> str:
    """Return a value as JSON on one line. NaN and infinity become null.

    A value that JSON lacks, such as a date from a .parquet, becomes its text `str(value)`.
    """
    return json.dumps(finite(value), ensure_ascii=False, default=str)  # dates, which a .parquet may hold


def _label(value: object) -> str | None:
    """Return the label in a cell, a class or a number, as stripped text.

    Return "" for a missing label: null, NaN, blank, or the text "nan" or "<na>" in any case. Return None for a value
    that is neither text nor number, such as a list.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if not isinstance(value, (str, int, float)):
        return None
    text = str(value).strip()
    return "" if text.lower() in ("nan", "<na>") else text


def _text_label(path: Path, place: str, column: str, value: object) -> str | None:
    """Return a label that is a text to be generated or found. Spaces are kept.

    `value` is a text, a list of acceptable texts, or SQuAD's object with a list `text`; of several texts the first is
    taken. A number becomes text. Return "" for null, NaN and an empty list, and None for a value of another type.
    `path`, `place` (the row's position in the file) and `column` are for messages.

    Raises:
        ValueError: A list holds something other than texts.
    """
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = value["text"]
    if isinstance(value, list):
        if not all(isinstance(answer, str) for answer in value):
            raise ValueError(f"{path}, {place}: column {column!r} holds {value!r}; expected a text or a list of texts")
        value = value[0] if value else ""
    if isinstance(value, (str, int)):
        return str(value)
    return _label(value)


def _several(path: Path, place: str, column: str, value: object, kind: str) -> str | None:
    """Return the labels in a cell as one text: classes with commas between them, or tags with spaces.

    `value` is the cell: a list of labels, or a text with commas (classes) or spaces (tags) between them. `kind` is
    "set" for classes, "tags" for a tag for each word. Labels are stripped, and empty ones between the commas of a text
    are left out. Return "" for null, NaN and an empty cell, and None for a value of another type. `path`, `place` (the
    row's position in the file) and `column` are for messages.

    Raises:
        ValueError: A label is no text or number, or holds the separator. Or a label in a list, or a tag, is empty.
    """
    between = "," if kind == "set" else " "
    parts = value if isinstance(value, list) else None
    if parts is None:
        text = _label(value)
        parts = None if text is None else text.split("," if kind == "set" else None)
    if parts is None:
        return None
    labels = [_label(part) for part in parts]
    for part, label in zip(parts, labels, strict=True):
        if label is None or between in label or (not label and (kind == "tags" or isinstance(value, list))):
            raise ValueError(
                f"{path}, {place}: column {column!r} holds {part!r} in a list; "
                f"expected a label without {'commas' if kind == 'set' else 'spaces'}"
            )
    return between.join(label for label in labels if label)


def _words(path: Path, place: str, column: str, value: object) -> str:
    """Return the words of `value`, a text or a list of words, with one space between them.

    An empty text or list gives "". `path`, `place` (the row's position in the file) and `column` are for messages.

    Raises:
        ValueError: `value` is neither a text nor a list, or holds a NUL character. Or an element of a list is no text,
            is empty or holds white space.
    """
    if not isinstance(value, list):
        value = _text(path, place, column, value).split()
    for word in value:
        if not isinstance(word, str) or not word or word.split() != [word] or "\0" in word:
            raise ValueError(
                f"{path}, {place}: column {column!r} holds {word!r} in a list; expected a word without spaces"
            )
    return " ".join(value)


def _start(value: object) -> int:
    """Return the index of the character, counted from 0, at which the first answer begins in the context.

    `value` is the cell of the label. SQuAD's object `answers` has a field `answer_start`, an integer or a list of
    integers, whose first is returned. Return -1 if `value` is not such an object or the list is empty.
    """
    starts = value.get("answer_start") if isinstance(value, dict) else None
    first = starts[0] if isinstance(starts, list) and starts else starts
    return first if isinstance(first, int) and not isinstance(first, bool) else -1


def _text(path: Path, place: str, column: str, value: object) -> str:
    """Return `value` if it is a text without NUL characters. It is returned unchanged.

    `path`, `place` (the row's position in the file) and `column` are for messages.

    Raises:
        ValueError: `value` is something else.
    """
    if not isinstance(value, str):
        raise ValueError(f"{path}, {place}: column {column!r} holds {value!r}; expected text")
    if "\0" in value:
        raise ValueError(f"{path}, {place}: column {column!r} has a NUL character; expected text")
    return value


def _more(path: Path, place: str, columns: Sequence[str], row: Row) -> list[str]:
    """Return the texts in the columns `columns` of `row`, a dict by column, as one list in the order of the columns.

    A column may hold a text or a list of texts, and `row` has to have all of them. `path` and `place` (the row's
    position in the file) are for messages.

    Raises:
        ValueError: A column holds something else.
    """
    more = [part for column in columns for part in _listed(row[column])]
    if not all(isinstance(part, str) for part in more):
        raise ValueError(f"{path}, {place}: columns {', '.join(map(repr, columns))} hold {more!r}; expected texts")
    return [str(part) for part in more]


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]
