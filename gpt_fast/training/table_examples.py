"""Turn a labelled table into examples: read its columns, hold rows out, map labels, make each row an Example."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from tokenizers import Tokenizer

from ..config import IGNORE, GPTConfig
from ..data.corpus import VALID_FRACTION
from ..data.example_batches import Context, Example, task_input
from ..data.labels import (
    ANSWER_NAMES,
    answer_index,
    answer_reading,
    class_index,
    class_names,
    class_rule,
    number,
)
from ..data.reading.rows import RowOptions, no_column, some, table_kind
from ..data.snippets import snippet_table
from ..data.tables import MissingColumn, Row, Table, TableOptions, read_table
from ..data.tokenizer import encode, encode_documents, without_lone_surrogates
from .tasks import TaskSettings, marks

PLAIN = RowOptions()


def read_task_table(path: Path, task: TaskSettings, labelled: bool = True, options: RowOptions = PLAIN) -> Table:
    """Return the table in the file at `path`: the columns that `task` names, the label column only if `labelled`.

    `options` say how to read the file. Rows with one of the task's `skip_labels` are skipped. In multiple choice,
    `options.skip_ragged` also skips rows with another number of choices than most rows have. Raise `ValueError`, with
    advice on the options, if a column is missing, and for a file that is no valid table.
    """
    columns = {"--text-column": [task.text_column], "--pair-column": [*task.pair_columns]}
    if labelled:
        columns["--label-column"] = [task.label_column]
    several: Any = task.kind if task.kind in ("set", "tags") else ""
    is_text = task.kind in ("text", "span")
    reading = TableOptions(options.columns, options.skip_ragged, task.skip_labels, is_text, several)
    label_column = task.label_column if labelled else None
    try:
        table = read_table(path, task.text_column, label_column, task.pair_columns, reading)
    except MissingColumn as missing:
        names = ["--text-column"] + [option for option, names in columns.items() if missing.column in names]
        raise ValueError(
            f"{path}: {no_column(missing.column, missing.row)}; {_advice(names[-1], missing.row, path)}"
        ) from None
    if task.name == "multiple-choice" and options.skip_ragged:
        return _without_ragged(table)
    return table


def _without_ragged(table: Table) -> Table:
    """Return the table without the rows that have another number of choices than most rows.

    A note in the new table tells how many were skipped, and where. If there are none, `table` itself is returned.
    """
    counts = Counter(map(len, table.more))
    usual = counts.most_common(1)[0][0]
    ragged = [table.place(row) for row, choices in enumerate(table.more) if len(choices) != usual]
    if not ragged:
        return table
    kept = table.rows([row for row, choices in enumerate(table.more) if len(choices) == usual])
    kept.notes.append(f"{table.source}: skipped {len(ragged):,} rows without {usual} choices: {some(ragged)}")
    return kept


def _advice(option: str, row: Row, path: Path) -> str:
    """Return advice for the user about a missing column: which options may help, as the end of a message.

    `option` is the one that names the column, such as "--label-column". `row` is a row of the file at `path`, a dict by
    column. If it has one column, whose name holds a separator, the advice is about separators.
    """
    found = next((separator for separator in ";\t|," if len(row) == 1 and separator in next(iter(row))), None)
    if found is not None:
        return f"it looks separated by {found!r}; expected commas in a .csv and tabs in a .tsv"
    without = ", and gpt-fast predict answers rows without labels" if option == "--label-column" else ""
    header = ", and --columns the columns of a file without a header" if table_kind(path) in ("csv", "tsv") else ""
    return f"{option} names another{header}{without}"


def read_tables(
    train: Path | None,
    valid: Path | None,
    task: TaskSettings,
    seed: int,
    options: RowOptions = PLAIN,
    fold: tuple[int, int] | None = None,
) -> tuple[Table, Table, TaskSettings]:
    """Return (training table, validation table, task), where `task.answers` is set for multiple choice.

    The tables are the files `train` and `valid`. Without `valid`, a tenth of the rows of `train`, drawn by `seed`, is
    held out for validation. With `fold` = (i, K), all rows of `train` are divided into K parts, and part i, from 1 to
    K, is held out instead. A row is not held out if no row to train on has its class. If `valid` is given, `fold` is
    ignored. Without `train`, both tables are snippets of the source of Python's standard library, for the task
    "classification" alone. `options` say how to read the files.

    Before rows are held out, different spellings of a class in `train`, such as 1 and 1.0, become the same. For
    multiple choice, `task.answers` is how the labels name the right choice, such as "letters". If it is None, all rows
    of `train` decide it. Raise `ValueError` if a table is missing or has too few rows to hold some out, or if its
    columns or labels are not valid.
    """
    if train is None:
        if valid is not None:
            raise ValueError(f"--valid {valid}: given without --train")
        if task.name != "classification":
            raise ValueError(f"--task {task.name}: no table comes with it; give --train FILE")
        return *snippet_table(), task
    table = read_task_table(train, task, options=options)
    table, task = _with_rule(table, task)
    if valid is not None:
        return table, read_task_table(valid, task, options=options), task
    if len(table) < 10:
        raise ValueError(f"{train}: {len(table)} rows are too few to hold some out; give --valid")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed)).tolist()
    cut = round(len(table) * VALID_FRACTION)
    held, kept = order[:cut], order[cut:]
    if fold is not None:
        held, kept = _fold(table, task, order, *fold)
    if task.names_classes:
        held, kept = _every_label_trained(table, task, held, kept)
        if not held:
            raise ValueError(
                f"{train}: column {task.label_column!r} has {len(set(table.labels))} labels in {len(table)} rows, too "
                "many to hold some rows out; expected labels that repeat, or --valid"
            )
    return table.rows(sorted(kept)), replace(table.rows(sorted(held)), notes=[]), task


def _with_rule(table: Table, task: TaskSettings) -> tuple[Table, TaskSettings]:
    """Return (table, task) of a training table: the table with its labels in one spelling, the task with `answers` set.

    For a task with one class in each row, each label becomes the name that `label_names` gives its class: 1.0 may
    become 1. A note says which labels were changed. For multiple choice, `task.answers` becomes the way in which the
    labels name a choice: "text" (by its text), "letters", or a number that counts from "0" or "1". For any other task
    both are returned as they are. Raise `ValueError` for labels that are not valid.
    """
    if task.name == "multiple-choice":
        return table, replace(task, answers=_reading(table, task, label_names(table, task)))
    if not task.classifies:
        return table, task
    names = label_names(table, task)
    labels = [names[int(i)] for i in targets(table, task, names)]
    spelled = sorted({f"{old} is {new}" for old, new in zip(table.labels, labels, strict=True) if old != new})
    notes = [f"{table.source}: column {task.label_column!r}: {some(spelled)}"] if spelled else []
    return replace(table, labels=labels, notes=table.notes + notes), task


def label_rule(names: Sequence[str], task: TaskSettings) -> str | None:
    """Return one line for the user about how the labels are read, or None if the task has neither classes nor choices.

    It begins with "labels: ", or for multiple choice with "answers: ". `names` are the names of the classes, or of the
    choices. For multiple choice, the result is None as long as `task.answers` is None.
    """
    if task.name == "multiple-choice" and task.answers is not None:
        return f"answers: {ANSWER_NAMES[task.answers]}, of {len(names)} choices"
    return f"labels: {class_rule(names, bool(task.labels))}" if task.names_classes else None


def _fold(
    table: Table, task: TaskSettings, order: Sequence[int], number: int, folds: int
) -> tuple[list[int], list[int]]:
    """Return (held out, for training): the row numbers of fold `number` of `folds`, counted from 1, and all others.

    `order` is a shuffled list of the table's row numbers, from 0. For a task with one class in each row, each class is
    divided as equally as possible among the folds. The second list is sorted. Raise `ValueError` if there are fewer
    rows than folds.
    """
    if len(table) < folds:
        raise ValueError(f"{table.source}: {len(table)} rows; expected {folds} or more for --folds {folds}")
    dealt = sorted(order, key=lambda row: table.labels[row]) if task.classifies else list(order)
    held = dealt[number - 1 :: folds]
    return held, sorted(set(dealt) - set(held))


def _every_label_trained(
    table: Table, task: TaskSettings, held: list[int], kept: list[int]
) -> tuple[list[int], list[int]]:
    """Return (held out, for training): `held` and `kept`, lists of row numbers, with every label in the second one.

    Rows of `held` with a label that no row of the second list has yet are moved to its end. The arguments are not
    changed.
    """
    trained = {label for row in kept for label in _labels(table.labels[row], task)}
    left: list[int] = []
    kept = list(kept)
    for row in held:
        labels = set(_labels(table.labels[row], task))
        (left if labels <= trained else kept).append(row)
        trained |= labels
    return left, kept


def _labels(label: str, task: TaskSettings) -> list[str]:
    """Return the classes that `label`, a row's label as the table holds it, names.

    The task decides: the classes of a set (split at commas, none for an empty label), a tag for each word (split at
    spaces), or for any other task `label` alone.
    """
    if task.kind == "set":
        return label.split(",") if label else []
    return label.split(" ") if task.kind == "tags" else [label]


def label_names(table: Table, task: TaskSettings) -> list[str]:
    """Return the names of the classes of a training table, in order; for multiple choice, the letters of the choices.

    With --labels, the result is the classes listed there. Else the classes are found in the table: numbers sorted by
    value, or sorted texts. If labels are numbers to predict, or texts to write or find, the list is empty. Raise
    `ValueError` if there are fewer than two classes (one if a row has a set of classes) or two choices. Also raise it
    if classes found in the table are ambiguous, such as two texts that differ only in case, or a -1 that may mark a
    missing label.
    """
    if task.kind not in ("class", "set", "tags"):
        return []
    if task.name == "multiple-choice":
        count = len(table.more[0])
        if count < 2:
            raise ValueError(f"{table.source}: {count} choices; expected two or more, in columns or in a list")
        return [_letter(i) for i in range(count)]
    if task.labels:
        return list(task.labels)
    if task.classifies:
        names = class_names(table.source, task.label_column, table.labels, table.place)
        least = 2
    else:
        places = [(row, label) for row in range(len(table)) for label in _labels(table.labels[row], task)]
        labels = [label for _, label in places]
        if not labels:
            raise ValueError(f"{table.source}: column {task.label_column!r} names no label; expected one or more")
        names = class_names(table.source, task.label_column, labels, lambda i: table.place(places[i][0]))
        least = 1 if task.kind == "set" else 2
    if len(names) < least:
        raise ValueError(f"{table.source}: every row has the label {names[0]!r}; expected two labels or more")
    return names


def targets(table: Table, task: TaskSettings, names: Sequence[str]) -> list[Any]:
    """Return the target of each row, in order: the index of its class in `names`, or its number.

    For a set of classes, the target is a list with 1.0 or 0.0 for each of `names`, and for tags a list of class
    indices, one for each word. For multiple choice it is the index of the right choice, and `names` are the letters of
    the choices. For a text that is to be written or found it is 0. A table without labels has zeros as its targets.
    Raise `ValueError` for a label that is no class, choice or number.
    """
    if task.name == "multiple-choice":
        _check_choices(table, names)
    if task.kind in ("set", "tags"):
        return _lists(table, task, names)
    if task.kind in ("text", "span") or not table.labels:
        return [0] * len(table)
    if task.numbers:
        return [_number(table, row) for row in range(len(table))]
    if task.name == "multiple-choice":
        reading = _reading(table, task, names)
        rows = zip(table.labels, table.more, strict=True)
        return [index for label, choices in rows if (index := answer_index(reading, label, choices)) is not None]
    find = class_index(names)
    found = [find(label) for label in table.labels]
    unknown = [row for row, index in enumerate(found) if index is None]
    if unknown:
        _refuse_label(table, unknown, table.labels[unknown[0]], names, "; --skip-label={} skips such rows")
    return [index for index in found if index is not None]


def _lists(table: Table, task: TaskSettings, names: Sequence[str]) -> list[list[float]]:
    """Return the target of each row of a task with several labels in a row.

    For a set of classes, it is a list with 1.0 for each class of `names` that the row has and 0.0 for every other. For
    tags, it is a list of the index in `names` of each word's class. A table without labels has zeros in their place.
    Raise `ValueError` for an unknown label, and if there is not one tag for each word.
    """
    words = [len(text.split()) for text in table.texts]
    if not table.labels:
        return [[0.0] * (len(names) if task.kind == "set" else count) for count in words]
    find = class_index(names)
    made: list[list[float]] = []
    for row, label in enumerate(table.labels):
        labels = _labels(label, task)
        found = [find(each) for each in labels]
        if None in found:
            _refuse_label(table, [row], labels[found.index(None)], names, "")
        if task.kind == "tags" and len(found) != words[row]:
            raise ValueError(
                f"{table.source}, {table.place(row)}: {len(found)} tags of {words[row]} words; expected one for each"
            )
        made.append([float(i in found) for i in range(len(names))] if task.kind == "set" else found)  # type: ignore[arg-type]
    return made


def _refuse_label(table: Table, rows: Sequence[int], label: str, names: Sequence[str], hint: str) -> NoReturn:
    """Raise `ValueError` because the rows `rows` of the table have `label`, which is not one of the classes `names`.

    `hint` ends the message; {} in it stands for the label.
    """
    known = ", ".join(map(repr, names[:12])) + (", …" if len(names) > 12 else "")
    raise ValueError(
        f"{table.source}, {some([table.place(row) for row in rows])}: unknown label {label!r}; those trained on "
        f"are {known}{hint.format(label)}"
    )


def examples(
    table: Table, task: TaskSettings, names: Sequence[str], tokenizer: Tokenizer, config: GPTConfig, room: int = 0
) -> list[Example]:
    """Return an `Example` for each row of a table: its token ids and its target.

    An example has one sequence of token ids, both orders of a pair for similarity, or one sequence for each choice. If
    the answer is a text that the model writes, the sequence ends with it, and `answer` is the position where it begins.
    A sequence has at most `config.seq_len` tokens: longer texts are cut off. Of these, `room` are left free for a text
    that the model will write; tags and spans ignore `room`. `names` are the names of the classes. Without labels in the
    table, targets are zeros, and answers are empty. A classifier without an extract token gets the plain tokens of a
    single text. Raise `ValueError` for a label that is not valid.
    """
    wanted = targets(table, task, names)
    if task.kind == "tags":
        return [_tagged(row, tags, tokenizer, config) for row, tags in zip(table.texts, wanted, strict=True)]
    if task.kind == "span":
        return [_with_span(table, row, tokenizer, config) for row in range(len(table))]
    width = len(table.fields(0))
    if config.extract_token is None and width == 1 and not task.writes:
        rows = plain_rows(table, tokenizer, config.seq_len)
        return [Example([row], target) for row, target in zip(rows, wanted, strict=True)]
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


def _tagged(text: str, tags: Sequence[int], tokenizer: Tokenizer, config: GPTConfig) -> Example:
    """Return the example of a tagged text: the start token, the words and the extract token, with a tag for each token.

    The words of `text` are those between its spaces, and `tags` are their class indices. A word's tag stands at its
    last token, which alone has seen the whole word; all other tokens have -100. The first word that does not fit is cut
    off and has no tag, and all words behind it are left out.
    """
    between, T = marks(config), config.seq_len
    row, found = [between.start], [IGNORE]
    for place, (word, tag) in enumerate(zip(text.split(), tags, strict=True)):
        ids = encode(tokenizer, f" {word}" if place else word) or encode(tokenizer, word)
        if len(row) + len(ids) + 1 > T:
            row += ids[: T - 1 - len(row)]  # so that a row that was cut off fills all positions
            break
        row += ids
        found += [IGNORE] * (len(ids) - 1) + ([int(tag)] if ids else [])
    found += [IGNORE] * (len(row) - len(found) + 1)
    return Example([[*row, between.extract]], tags=found)


def _with_span(table: Table, row: int, tokenizer: Tokenizer, config: GPTConfig) -> Example:
    """Return the example of a question and a text that holds the answer, in row number `row` of the table.

    Its tokens are start, question, delimiter, text, extract. The label of the row is the answer. The target is a list
    [first, last] of the answer's first and last position among the tokens. If there is no answer, both are the position
    of the extract token, and if the answer was cut off, both are -100. The example's `context` has the text, the
    position of the text's first token, the (begin, end) of each token's characters in the text, and the answer. Raise
    `ValueError` if the answer is not in the text.
    """
    text, question = (without_lone_surrogates(part) for part in table.fields(row)[:2])
    between = marks(config)
    encoding = tokenizer.encode(text, add_special_tokens=False)
    sequence = task_input([encode(tokenizer, question), encoding.ids], config.seq_len, between)
    begin = sequence.index(between.delimiter) + 1
    answer = without_lone_surrogates(table.labels[row]) if table.labels else ""
    if not answer.strip():
        target = [len(sequence) - 1] * 2
    else:
        first = _answer_start(table, row, text, answer)
        last = first + len(answer)
        inside = [i for i, (start, end) in enumerate(encoding.offsets) if end > first and start < last]
        fits = bool(inside) and begin + inside[-1] < len(sequence) - 1
        target = [begin + inside[0], begin + inside[-1]] if fits else [IGNORE, IGNORE]
    return Example([sequence], target, context=Context(text, begin, encoding.offsets, answer))


def _answer_start(table: Table, row: int, text: str, answer: str) -> int:
    """Return the character of `text` at which `answer` begins: where the table says, or at its first occurrence.

    `text` and `answer` are those of row number `row`. Raise `ValueError` if the answer is not in the text, or not where
    the table says.
    """
    start = table.starts[row] if table.starts else -1
    if start < 0:
        start = text.find(answer)
        if start < 0:
            raise ValueError(
                f"{table.source}, {table.place(row)}: answer {answer!r:.60} is not in the text; expected a part of it"
            )
    elif text[start : start + len(answer)] != answer:
        raise ValueError(
            f"{table.source}, {table.place(row)}: answer_start is {start}, where the text has "
            f"{text[start : start + len(answer)]!r:.60}; expected {answer!r:.60}"
        )
    return start


def plain_rows(table: Table, tokenizer: Tokenizer, seq_len: int) -> list[list[int]]:
    """Return the token ids of each text of a table without start, delimiter and extract tokens, cut off at `seq_len`.

    A classifier of the library transformers was trained on such input. Truncation of `tokenizer` is switched off
    afterwards. Raise `ValueError` for a text without tokens.
    """
    tokenizer.enable_truncation(seq_len)
    try:
        rows = [encoding.ids for encoding in tokenizer.encode_batch([*map(without_lone_surrogates, table.texts)])]
    finally:
        tokenizer.no_truncation()
    empty = [table.place(row) for row, ids in enumerate(rows) if not ids]
    if empty:
        raise ValueError(f"{table.source}, {some(empty)}: an empty text; expected one token or more")
    return rows


def remarks(table: Table, rows: Sequence[Example], seq_len: int) -> list[str]:
    """Return remarks for the user about `rows`, the examples made of the table: one line each.

    They are the table's own notes; the share of token sequences that have exactly `seq_len` tokens and may have been
    cut off, unless it is 0; and how many rows have an empty text, if any.
    """
    found = [*table.notes]
    cut = sum(len(sequence) == seq_len for row in rows for sequence in row.sequences)
    if cut:
        share = cut / sum(len(row.sequences) for row in rows)
        found.append(f"{table.source}: {share:.0%} of the rows fill all {seq_len} positions and may have been cut off")
    empty = [row for row, text in enumerate(table.texts) if not text.strip()]
    if empty:
        where = table.place(empty[0])
        found.append(f"{table.source}: {len(empty):,} rows have an empty text, the first of them {where}")
    return found


def _letter(index: int) -> str:
    """Return the name of choice number `index`, counted from 0: "A" to "Z", then "26", "27" and so on."""
    return chr(ord("A") + index) if index < 26 else str(index)


def _check_choices(table: Table, names: Sequence[str]) -> None:
    """Raise `ValueError` if a row of a multiple-choice table does not have as many choices as `names` has entries.

    `names` are the letters that name the choices, such as "A" to "D".
    """
    for row, choices in enumerate(table.more):
        if len(choices) != len(names):
            raise ValueError(
                f"{table.source}, {table.place(row)}: {len(choices)} choices; expected {len(names)} in every row "
                "(--skip-ragged skips rows with another number than most)"
            )


def _reading(table: Table, task: TaskSettings, names: Sequence[str]) -> str:
    """Return how the labels of a multiple-choice table name a choice: "text", "letters", "0" or "1".

    These are a choice's text, a letter from A on, and a number that counts from 0 or from 1. It is `task.answers`, or
    if that is None the form that fits the whole column. `names` are the letters of the choices. Raise `ValueError` if a
    label names no choice, if several forms fit and differ, or if a row has another number of choices than `names`.
    """
    _check_choices(table, names)
    if task.answers is None:
        return answer_reading(table.source, table.labels, table.more, table.place)
    for row, (label, choices) in enumerate(zip(table.labels, table.more, strict=True)):
        if answer_index(task.answers, label, choices) is None:
            raise ValueError(
                f"{table.source}, {table.place(row)}: unknown label {label!r}; expected {ANSWER_NAMES[task.answers]} "
                f"of {len(choices)} choices, as --answers {task.answers} says or the training table has"
            )
    return task.answers


def _number(table: Table, row: int) -> float:
    """Return the label of row number `row` of the table as a number. Raise `ValueError` if it spells no finite one."""
    label = table.labels[row]
    value = number(label)
    if value is None:
        raise ValueError(f"{table.source}, {table.place(row)}: label {label!r} is not a number, as a regression wants")
    return value
