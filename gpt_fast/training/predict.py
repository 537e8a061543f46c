"""Predictions of a fine-tuned run for rows without labels."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..config import IGNORE
from ..data.example_batches import Example
from ..data.reading.rows import RowOptions, written_kind
from ..data.tables import Row, Table, read_rows, write_rows
from ..heads import GPTForCausalLM, Head
from .evaluate import run_labels, run_task
from .metrics import predictions, row_predictions, span_text
from .runs.folder import read_record
from .runs.load import load_run, run_tokenizer
from .table_examples import PLAIN, examples, read_task_table, remarks
from .tasks import EVALUATION_BATCH, TaskSettings, answers, pair_columns

ADDED = ("prediction", "probability")  # columns


@dataclass(frozen=True)
class Prediction:
    """A label, several with commas between them, a tag for each word, a number or a text.

    Labels come with the probabilities of all, the likeliest first.
    """

    answer: str | float
    probabilities: dict[str, float] | None = None

    def columns(self) -> Row:
        """Return the columns that the prediction adds to a row of a table, as a dict.

        "prediction" is the answer. If the answer is one class, "probability" is the probability of this class. A set
        that holds exactly one class has this column too.
        """
        if self.probabilities is None or self.answer not in self.probabilities:
            return {"prediction": self.answer}
        return {"prediction": self.answer, "probability": self.probabilities[str(self.answer)]}


def predict(
    folder: Path,
    device: str,
    data: Path | None = None,
    texts: Sequence[str] = (),
    text_column: str | None = None,
    pair_column: str | None = None,
    max_new_tokens: int | None = None,
    options: RowOptions = PLAIN,
) -> tuple[TaskSettings, Table, list[Prediction]]:
    """Return (task, table, predictions): the task of a run, the rows that its model answered, a `Prediction` for each.

    The run is in `folder`. The rows are those of the table `data`, or else one row made of `texts`: the text, then its
    pair or its choices. `text_column` and `pair_column` (of the second text or of the choices) are those of the
    training if they are None. `options` say how to read the table. `device` is "cpu" or "cuda". A model that answers in
    text writes at most `max_new_tokens` tokens, by default 100 or half of its positions if that is less. Warn about
    rows that may have been cut off or are empty. Raise `FileNotFoundError` if `folder` holds no run. Raise `ValueError`
    for a run without a task, for a `max_new_tokens` where no text is written, and for rows that do not fit the task.
    """
    model, record = load_run(folder, device), read_record(folder)
    task = run_task(model, record)
    if task is None:
        raise ValueError(
            f"{folder}: holds a {type(model).__name__} without a task; expected a run of gpt-fast finetune"
            " (gpt-fast generate lets a language model write)"
        )
    if max_new_tokens is not None and not task.writes:
        raise ValueError(f"--max-new-tokens {max_new_tokens}: {task.name} writes no text; expected a task that does")
    names = run_labels(model, record)
    if data is not None:
        pairs = pair_columns(task, pair_column)
        task = replace(task, text_column=text_column or task.text_column, pair_columns=pairs)
        table = read_task_table(data, task, labelled=False, options=options)
    else:
        table = one_row(texts, task, names)
    return task, table, answer(model, folder, table, task, names, max_new_tokens)


def one_row(texts: Sequence[str], task: TaskSettings, names: Sequence[str]) -> Table:
    """Return a table of one row without a label: the first of `texts` is its text, the rest its pair or choices.

    Raise `ValueError` unless there is one further text for each pair column of the task. In multiple choice, there has
    to be one for each of `names`, the letters of the choices. Other tasks ignore `names`.
    """
    choices = task.name == "multiple-choice"
    pairs, wanted = len(texts) - 1, len(names) if choices else len(task.pair_columns)
    if pairs != wanted:
        raise ValueError(
            f"--pair: {pairs} given; expected {wanted} for {task.name}" + (", the answers" if choices else "")
        )
    return Table("--text", [texts[0]], [], [tuple(texts[1:])] if pairs else [])


def answer(
    model: Head, folder: Path, table: Table, task: TaskSettings, names: Sequence[str], max_new_tokens: int | None
) -> list[Prediction]:
    """Return a `Prediction` of the model for each row of `table`, in order.

    The field `answer` of a prediction depends on the task: a class, a number, a text that the model writes, or a part
    of the row's text that it finds. For tags it is a tag for each word, with spaces between them. For a set it is the
    classes with a probability above 0.5, with commas between them. Predictions of a class or a set also have the
    probability of each class, the largest first. `folder` is the model's run folder, from which the tokenizer is read.
    `names` are the names of the classes. A model that writes texts writes at most `max_new_tokens` tokens, by default
    100 or half of its positions if that is less. Raise `ValueError` unless this number is from 1 to the number of
    positions less 5. Warn about rows that may have been cut off or are empty.
    """
    tokenizer = run_tokenizer(folder, model)
    if isinstance(model, GPTForCausalLM):
        T = model.config.seq_len
        room = min(100, T // 2) if max_new_tokens is None else max_new_tokens
        if not 1 <= room <= T - 5:
            raise ValueError(f"--max-new-tokens {room}: expected 1 to {T - 5}, as the model has {T} positions")
        rows = examples(table, task, names, tokenizer, model.config, room)
        _warn(remarks(table, rows, T - room))
        return [Prediction(text) for text in answers(model, rows, tokenizer, room)]
    rows = examples(table, task, names, tokenizer, model.config)
    _warn(remarks(table, rows, model.config.seq_len))
    pad = model.config.pad_token or 0
    if task.kind == "tags":
        found = row_predictions(model, rows, pad, EVALUATION_BATCH)
        tags = [
            [names[int(i)] for i in logits[_counted(row)].argmax(1)] for logits, row in zip(found, rows, strict=True)
        ]
        return [Prediction(" ".join(each)) for each in tags]
    if task.kind == "span":
        found = row_predictions(model, rows, pad, EVALUATION_BATCH)
        return [Prediction(span_text(logits, row)) for logits, row in zip(found, rows, strict=True)]
    logits = predictions(model, rows, model.config.pad_token or 0, EVALUATION_BATCH)
    if task.numbers:
        return [Prediction(value) for value in logits.flatten().tolist()]
    shares = logits.sigmoid() if task.kind == "set" else logits.softmax(-1)
    answered = []
    for values, order in zip(*(part.tolist() for part in shares.sort(descending=True)), strict=True):
        chances = {names[i]: p for p, i in zip(values, order, strict=True)}
        several = ",".join(name for name in names if chances[name] > 0.5)
        answered.append(Prediction(several if task.kind == "set" else names[order[0]], chances))
    return answered


def _counted(row: Example) -> Tensor:
    """Return a bool tensor [T], True at the tokens of a tagged row that carry the tag of a word."""
    return torch.tensor(row.tags) != IGNORE


def _warn(found: Sequence[str]) -> None:
    """Issue each remark in `found` as a `UserWarning`, in the name of the caller's caller."""
    for remark in found:
        warnings.warn(remark, stacklevel=3)


def check_target(out: Path, data: Path, options: RowOptions = PLAIN) -> None:
    """Raise `ValueError` if the predictions for the file `data` cannot be written to `out`. Nothing is written.

    The name of `out` has to end in .csv, .tsv or .jsonl, and not be that of a folder. No row of `data` may have a
    column "prediction" or "probability". All rows of `data` are read, with `options`, and a damaged file is an error.
    Raise `FileNotFoundError` if `data` does not exist.
    """
    written_kind(out)
    for place, row in read_rows(data, options):
        if taken := [name for name in ADDED if name in row]:
            raise ValueError(f"{data}, {place}: has a column {taken[0]!r} already, which --out {out} would add")


def write_predictions(
    out: Path, data: Path, table: Table, found: Sequence[Prediction], options: RowOptions = PLAIN
) -> None:
    """Write to `out` the rows of the file `data` that `table` was read from, with a column "prediction" added to each.

    `found` holds one prediction for each row of `table`, in order. A prediction of one class adds a column
    "probability" too. The data must not have these columns yet, which `check_target` checks beforehand. Rows of `data`
    that `table` has left out are left out of `out`, too. `options` are those with which `table` was read. The ending of
    `out`, .csv, .tsv or .jsonl, decides the format.
    """
    read = set(table.places)  # a row without a usual number of choices may have been skipped
    rows = [row for place, row in read_rows(data, options) if place in read]
    write_rows(out, [row | prediction.columns() for row, prediction in zip(rows, found, strict=True)])
