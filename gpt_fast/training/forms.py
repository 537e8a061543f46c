"""The forms in which GPT-2 is judged, scored as lm-evaluation-harness does: LAMBADA's last words, HellaSwag's endings.

A continuation is scored behind its context alone. The start token stands in for an empty context.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from ..data.reading.rows import Row, RowOptions, no_column, read_rows
from ..data.tokenizer import encode
from ..heads import GPTForCausalLM
from ..scoring import Continuation, score_continuations
from .metrics import perplexity

FORMS = ("lambada", "hellaswag")
HELLASWAG = ("activity_label", "ctx_a", "ctx_b")  # columns of the published file, which make a question
_BRACKETS = re.compile(r"\[.*?\]")


@dataclass(frozen=True)
class Question:
    """A context with its continuations, of which number `answer` is the right one; `place` tells where it stands."""

    place: str
    context: str
    choices: tuple[str, ...]
    answer: int = 0


def evaluate_form(
    form: str,
    model: GPTForCausalLM,
    tokenizer: Tokenizer,
    path: Path,
    options: RowOptions,
    text_column: str | None = None,
    choice_columns: str | None = None,
    label_column: str | None = None,
) -> dict[str, Any]:
    """Return the metrics of a language model on a benchmark's file at `path`, of the form "lambada" or "hellaswag".

    For "lambada" the keys are "task", "last_word_accuracy", "last_word_loss", "last_word_perplexity" and "examples".
    For any other `form` the file is read as HellaSwag's, and they are "task", "choice_accuracy", "choice_accuracy_norm"
    (by characters), "choice_accuracy_per_token", "chance" (the accuracy of guessing) and "examples".

    LAMBADA reads `text_column` alone. For HellaSwag `choice_columns` is a column of lists, or several columns with
    commas between their names, and `label_column` holds the index of the right ending. A column that is None has the
    name that it has in the published data set, such as "text", "endings" or "label". `options` say how to read the
    file.
    """
    if form == "lambada":
        return last_words(model, tokenizer, read_last_words(path, text_column or "text", options))
    questions = read_endings(path, text_column, choice_columns or "endings", label_column or "label", options)
    return endings(model, tokenizer, questions)


def read_last_words(path: Path, text_column: str, options: RowOptions) -> list[Question]:
    """Return a `Question` for each row of the file at `path`: its context is the text up to the last space.

    Its only choice is the last space with the last word behind it. The text is in `text_column`, and `options` say how
    to read the file. Raise `ValueError` for a file without rows, and for a row without a text in `text_column`. Also
    raise it for a text that has no space or ends with a space.
    """
    questions = []
    for place, row in read_rows(path, options):
        text = _text(path, place, row, text_column)
        context, space, word = text.rpartition(" ")
        if not space or not word:
            raise ValueError(f"{path}, {place}: {text_column!r} has {text!r:.60}; expected words with a space between")
        questions.append(Question(place, context, (space + word,)))
    return _some(path, questions)


def read_endings(
    path: Path, text_column: str | None, choice_columns: str, label_column: str, options: RowOptions
) -> list[Question]:
    """Return a `Question` for each row of the file at `path`: a context, possible endings, the index of the right one.

    `choice_columns` is a column of lists, or several columns with commas between their names. `label_column` holds the
    index, from 0 on. The context is the column `text_column`. If that is None, the context is made of the columns
    `activity_label`, `ctx_a` and `ctx_b` of HellaSwag's published files. Annotations in brackets are then removed from
    context and choices, as in lm-evaluation-harness. If the row lacks one of the three columns, the context is the
    column `ctx`, and brackets stay. A space is put before each choice. `options` say how to read the file. Raise
    `ValueError` for a row in which a part is missing or not valid, and for a file without rows.
    """
    questions = []
    for place, row in read_rows(path, options):
        published = text_column is None and set(HELLASWAG) <= set(row)
        if published:
            label, first, second = (_text(path, place, row, column) for column in HELLASWAG)
            context = without_brackets(f"{label}: {first} {second.capitalize()}")
        else:
            context = _text(path, place, row, text_column or "ctx")
        choices = _choices(path, place, row, choice_columns)
        if published:
            choices = [without_brackets(choice) for choice in choices]
        answer = _number(path, place, row, label_column, len(choices))
        questions.append(Question(place, context, tuple(f" {choice}" for choice in choices), answer))
    return _some(path, questions)


def without_brackets(text: str) -> str:
    """Return a text of HellaSwag without the annotations in brackets that WikiHow left in it.

    First, spaces at both ends of `text` are dropped. Then " [title]" becomes ". ", and any other text in square
    brackets is removed. Last, two spaces become one. The result may begin or end with a space.
    """
    return _BRACKETS.sub("", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def last_words(model: GPTForCausalLM, tokenizer: Tokenizer, questions: Sequence[Question]) -> dict[str, Any]:
    """Return how well the model predicts the last word, which is the first choice of each question, as a dict.

    There has to be at least one question. The keys are "task"; "last_word_accuracy", the share that greedy decoding
    writes; "last_word_loss", the mean loss of a word in nats; "last_word_perplexity"; and "examples".
    """
    found = [scores[0] for scores in _scores(model, tokenizer, questions)]
    loss = -math.fsum(score.log_prob for score in found) / len(found)
    return {
        "task": "lambada",
        "last_word_accuracy": sum(score.is_greedy for score in found) / len(found),
        "last_word_loss": loss,
        "last_word_perplexity": perplexity(loss),
        "examples": len(found),
    }


def endings(model: GPTForCausalLM, tokenizer: Tokenizer, questions: Sequence[Question]) -> dict[str, Any]:
    """Return how often the right choice of a question has the largest log-likelihood, as a dict of shares.

    There has to be at least one question. Of equal choices the first one counts. "choice_accuracy" compares the
    log-likelihoods of whole choices. "choice_accuracy_norm" (lm-evaluation-harness's `acc_norm`) compares them divided
    by the number of characters, "choice_accuracy_per_token" by the number of tokens. "chance" is the accuracy of
    guessing, and "examples" the number of questions. "task" is "hellaswag".
    """
    right = {"choice_accuracy": 0, "choice_accuracy_norm": 0, "choice_accuracy_per_token": 0}
    for question, scores in zip(questions, _scores(model, tokenizer, questions), strict=True):
        characters = [len(choice) - 1 for choice in question.choices]  # without the space in front
        tokens = [len(continuation_ids(model, tokenizer, question, choice)[1]) for choice in question.choices]
        for name, sizes in zip(right, ([1] * len(scores), characters, tokens), strict=True):
            values = [score.log_prob / size for score, size in zip(scores, sizes, strict=True)]
            right[name] += values.index(max(values)) == question.answer
    chance = math.fsum(1 / len(question.choices) for question in questions) / len(questions)
    shares = {name: count / len(questions) for name, count in right.items()}
    return {"task": "hellaswag", **shares, "chance": chance, "examples": len(questions)}


def continuation_ids(
    model: GPTForCausalLM, tokenizer: Tokenizer, question: Question, choice: str
) -> tuple[list[int], list[int]]:
    """Return (context, continuation): the token ids of a question's context, and those that `choice` adds to them.

    `choice` is a text, which is tokenised together with the context. Spaces at the end of the context belong to the
    continuation, because they are part of its first word. The start token stands in for an empty context; raise
    `ValueError` if the model has none.
    """
    context = question.context.rstrip()
    choice = question.context[len(context) :] + choice
    if not context:
        start = model.config.start_token
        if start is None:
            raise ValueError(
                f"{question.place}: the context is empty and the model has no start token; expected a text"
            )
        return [start], encode(tokenizer, choice)
    before = encode(tokenizer, context)
    return before, encode(tokenizer, context + choice)[len(before) :]


def _scores(model: GPTForCausalLM, tokenizer: Tokenizer, questions: Sequence[Question]) -> list[list[Continuation]]:
    """Return a list for each question with the score of each of its choices, in their order.

    A score is a `Continuation`: the choice's log-likelihood behind the context, and whether greedy decoding would write
    it. Raise `ValueError` for a choice that has no tokens, or more than the model has positions, and for an empty
    context if the model has no start token.
    """
    pairs = []
    for question in questions:
        for choice in question.choices:
            context, continuation = continuation_ids(model, tokenizer, question, choice)
            if not 1 <= len(continuation) <= model.config.seq_len:
                raise ValueError(
                    f"{question.place}: {choice!r:.60} has {len(continuation)} tokens; expected 1 to "
                    f"{model.config.seq_len}, the model's positions"
                )
            pairs.append((context, continuation))
    found = iter(score_continuations(model, pairs))
    return [[next(found) for _ in question.choices] for question in questions]


def _text(path: Path, place: str, row: Row, column: str) -> str:
    """Return the text in a column of a row. Raise `ValueError` if the column is missing or holds no text.

    `row` is a dict by column. `place` says where in the file at `path` the row is, for the message.
    """
    value = _value(path, place, row, column)
    if not isinstance(value, str):
        raise ValueError(f"{path}, {place}: column {column!r} holds {value!r:.60}; expected a text")
    return value


def _choices(path: Path, place: str, row: Row, columns: str) -> list[str]:
    """Return the endings of a row: the list in the column `columns`, or the texts of several columns.

    If the row, a dict by column, has no column of that name, `columns` is read as names with commas between them. Raise
    `ValueError` if a column is missing, or if these are not two texts or more, none empty. `place` says where in the
    file at `path` the row is, for the message.
    """
    names = [columns] if columns in row else columns.split(",")
    found = [_value(path, place, row, name) for name in names]
    choices = found[0] if len(found) == 1 else found
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise ValueError(
            f"{path}, {place}: column {columns!r} holds {choices!r:.60}; expected a list of two texts or more"
        )
    return choices


def _number(path: Path, place: str, row: Row, column: str, count: int) -> int:
    """Return the integer from 0 to `count` - 1 in a column of a row: the index of the right one of `count` choices.

    The value may be an int or a text of digits. Raise `ValueError` for a missing column and for any other value.
    `place` says where in the file at `path` the row is, for the message.
    """
    value = _value(path, place, row, column)
    text = str(value).strip()
    if isinstance(value, bool) or not text.isdecimal() or int(text) >= count:
        raise ValueError(
            f"{path}, {place}: column {column!r} holds {value!r:.60}; expected the number of the right choice, 0 to "
            f"{count - 1}"
        )
    return int(text)


def _value(path: Path, place: str, row: Row, column: str) -> object:
    """Return the value in a column of a row, of any type. Raise `ValueError` if the row has no such column.

    `row` is a dict by column. `place` says where in the file at `path` the row is, for the message.
    """
    if column not in row:
        raise ValueError(f"{path}, {place}: {no_column(column, row)}")
    return row[column]


def _some(path: Path, questions: list[Question]) -> list[Question]:
    """Return `questions`. Raise `ValueError` if there are none, because the file at `path` has no row."""
    if not questions:
        raise ValueError(f"{path}: has no row; expected one or more")
    return questions
