"""Turn a labelled table into examples: read its columns, hold rows out, map labels, make each row an Example."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import torch
from tokenizers import Tokenizer

from ..config import GPTConfig
from ..data.corpus import VALID_FRACTION
from ..data.example_batches import Example, task_input
from ..data.snippets import snippet_table
from ..data.tables import Row, Table, read_rows, read_table
from ..data.tokenizer import encode_documents
from .tasks import TaskSettings, marks


def read_task_table(path: Path, task: TaskSettings, labelled: bool = True) -> Table:
    """The columns of a task; without `labelled` only those that a model reads."""
    columns = {"--text-column": [task.text_column], "--pair-column": [*task.pair_columns]}
    if labelled:
        columns["--label-column"] = [task.label_column]
    for _, row in islice(read_rows(path), 1):
        for option, names in columns.items():
            for name in (name for name in names if name not in row):
                raise ValueError(
                    f"{path}: no column {name!r}; it has {', '.join(map(repr, row)) or 'none'}; {_advice(option, row)}"
                )
    return read_table(path, task.text_column, task.label_column if labelled else None, task.pair_columns)


def _advice(option: str, row: Row) -> str:
    """What to do about a missing column."""
    found = next((separator for separator in ";\t|," if len(row) == 1 and separator in next(iter(row))), None)
    if found is not None:
        return f"it looks separated by {found!r}, wanted commas in a .csv and tabs in a .tsv"
    without = ", and gpt-fast predict answers rows without labels" if option == "--label-column" else ""
    return f"{option} names another{without}"


def read_tables(train: Path | None, valid: Path | None, task: TaskSettings, seed: int) -> tuple[Table, Table]:
    """The two tables that were named; with only one, a seeded tenth of its rows is held out; with none, snippets of the
    standard library."""
    if train is None:
        if valid is not None:
            raise ValueError(f"--valid {valid}: given without --train")
        if task.name != "classification":
            raise ValueError(f"--task {task.name}: no table comes with it; give --train FILE")
        return snippet_table()
    table = read_task_table(train, task)
    if valid is not None:
        return table, read_task_table(valid, task)
    if len(table) < 10:
        raise ValueError(f"{train}: {len(table)} rows are too few to hold some out; give --valid")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = round(len(table) * VALID_FRACTION)
    held, kept = order[:cut], order[cut:]
    if task.classifies and task.name != "multiple-choice":
        held, kept = _every_label_trained(table, held, kept)
        if not held:
            raise ValueError(
                f"{train}: column {task.label_column!r} has {len(set(table.labels))} labels in {len(table)} rows, too "
                "many to hold some rows out; wanted labels that repeat, or --valid"
            )
    return table.rows(sorted(kept)), table.rows(sorted(held))


def _every_label_trained(table: Table, held: list[int], kept: list[int]) -> tuple[list[int], list[int]]:
    """The split with one row of every label among those kept for training."""
    trained = {table.labels[row] for row in kept}
    left: list[int] = []
    kept = list(kept)
    for row in held:
        (left if table.labels[row] in trained else kept).append(row)
        trained.add(table.labels[row])
    return left, kept


def label_names(table: Table, task: TaskSettings) -> list[str]:
    """The classes of a training table, in order; of a multiple choice the letters of its answers."""
    if not task.classifies:
        return []
    if task.name == "multiple-choice":
        count = len(table.more[0])
        if count < 2:
            raise ValueError(f"{table.source}: {count} choices; wanted two or more, in columns or in a list")
        return [_letter(i) for i in range(count)]
    names = sorted(set(table.labels))
    if len(names) < 2:
        raise ValueError(f"{table.source}: every row has the label {names[0]!r}; wanted two labels or more")
    return names


def targets(table: Table, task: TaskSettings, names: Sequence[str]) -> list[float]:
    """Labels as indices into `names`, or as numbers; zeros for text to be written and for a table without labels."""
    if task.name == "multiple-choice":
        _check_choices(table, names)
    if task.writes or not table.labels:
        return [0] * len(table)
    if task.numbers:
        return [_number(table, row) for row in range(len(table))]
    if task.name == "multiple-choice":
        return [_choice(table, row, names) for row in range(len(table))]
    index = {name: i for i, name in enumerate(names)}
    for row, label in enumerate(table.labels, start=1):
        if label not in index:
            known = ", ".join(map(repr, names[:12])) + (", …" if len(names) > 12 else "")
            raise ValueError(f"{table.source}, row {row}: unknown label {label!r}; those trained on are {known}")
    return [index[label] for label in table.labels]


def examples(
    table: Table, task: TaskSettings, names: Sequence[str], tokenizer: Tokenizer, config: GPTConfig, room: int = 0
) -> list[Example]:
    """Each row as the model takes it, with `room` positions left over; without labels, one that writes takes empty
    answers."""
    wanted = targets(table, task, names)
    width = len(table.fields(0))
    columns = [list(encode_documents(tokenizer, [table.fields(i)[c] for i in range(len(table))])) for c in range(width)]
    answers = list(encode_documents(tokenizer, table.labels or [""] * len(table))) if task.writes else []
    between, T = marks(config), config.seq_len - room
    made = []
    for i, target in enumerate(wanted):
        texts = [column[i] for column in columns]
        if task.writes:
            row = task_input([*texts, answers[i]], T, between)
            begin = len(row) - 1 - row[::-1].index(between.delimiter) + 1
            made.append(Example([row], answer=begin))
        elif task.name == "similarity":
            made.append(Example([task_input(order, T, between) for order in (texts, texts[::-1])], target))
        elif task.name == "multiple-choice":
            made.append(Example([task_input([texts[0], choice], T, between) for choice in texts[1:]], target))
        else:
            made.append(Example([task_input(texts, T, between)], target))
    return made


def remarks(table: Table, rows: Sequence[Example], seq_len: int) -> list[str]:
    """What may surprise whoever reads the results: texts that were cut off, rows without text."""
    found = []
    cut = sum(len(sequence) == seq_len for row in rows for sequence in row.sequences)
    if cut:
        share = cut / sum(len(row.sequences) for row in rows)
        found.append(f"{table.source}: {share:.0%} of the rows fill all {seq_len} positions and may have been cut off")
    empty = [row for row, text in enumerate(table.texts, start=1) if not text.strip()]
    if empty:
        found.append(f"{table.source}: {len(empty):,} rows have an empty text, the first of them row {empty[0]}")
    return found


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else str(index)


def _check_choices(table: Table, names: Sequence[str]) -> None:
    for row, choices in enumerate(table.more, start=1):
        if len(choices) != len(names):
            raise ValueError(f"{table.source}, row {row}: {len(choices)} choices; wanted {len(names)} in every row")


def _choice(table: Table, row: int, names: Sequence[str]) -> int:
    """A label is the text of an answer, its letter, or its number, counted from 0."""
    label, choices = table.labels[row], table.more[row]
    if label in choices:
        return choices.index(label)
    if label.upper() in names:
        return list(names).index(label.upper())
    if label.isdecimal() and int(label) < len(choices):
        return int(label)
    known = f"{', '.join(names)}, 0 to {len(choices) - 1}"
    raise ValueError(
        f"{table.source}, row {row + 1}: unknown label {label!r}; wanted an answer's text, or one of {known}"
    )


def _number(table: Table, row: int) -> float:
    label = table.labels[row]
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{table.source}, row {row + 1}: label {label!r} is not a number, as a regression wants")
    return value
