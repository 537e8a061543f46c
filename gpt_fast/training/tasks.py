"""The labelled tasks: which columns each reads, which head answers, what is measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from gpt_fast_settings.declaration import did_you_mean

from ..config import GPTConfig
from ..data.example_batches import Example, Marks, pad_rows, task_batches, task_input
from ..data.labels import ANSWERS
from ..data.tokenizer import decode, encode
from ..generation import generate
from ..heads import (
    GPTForCausalLM,
    GPTForMultipleChoice,
    GPTForQuestionAnswering,
    GPTForSequenceClassification,
    GPTForSimilarity,
    GPTForTokenClassification,
    Head,
)
from .metrics import (
    Metrics,
    answer_metrics,
    classification_metrics,
    generated_metrics,
    lm_loss,
    multi_label_metrics,
    predictions,
    regression_metrics,
    row_predictions,
    span_metrics,
    tag_metrics,
)
from .runs.folder import read_record, special_token

EVALUATION_BATCH = 64


# Kinds of labels, and the metrics by which validation may choose. The picture shows the first, which is the default.
Kind = Literal["class", "number", "text", "set", "tags", "span"]
SCORES: dict[Kind, tuple[str, ...]] = {
    "class": ("accuracy", "macro_f1", "micro_f1", "matthews", "loss"),
    "number": ("mse", "pearson", "spearman"),
    "text": ("loss",),
    "set": ("micro_f1", "macro_f1", "accuracy", "loss"),
    "tags": ("accuracy", "macro_f1", "micro_f1", "matthews", "loss"),
    "span": ("word_f1", "exact_match", "loss"),
}
_SMALLER_IS_BETTER = ("loss", "mse")


@dataclass(frozen=True)
class Task:
    """`columns` are the defaults of --text-column, --pair-column and --label-column; "" where a task has no pair."""

    head: type[Head]
    columns: tuple[str, str, str]
    kind: Kind = "class"


TASKS: dict[str, Task] = {
    "classification": Task(GPTForSequenceClassification, ("text", "", "label")),
    "entailment": Task(GPTForSequenceClassification, ("premise", "hypothesis", "label")),
    "similarity": Task(GPTForSimilarity, ("sentence1", "sentence2", "label")),
    "multiple-choice": Task(GPTForMultipleChoice, ("question", "choices", "answer")),
    "multi-label": Task(GPTForSequenceClassification, ("text", "", "labels"), "set"),
    "token-classification": Task(GPTForTokenClassification, ("tokens", "", "tags"), "tags"),
    "regression": Task(GPTForSequenceClassification, ("text", "", "label"), "number"),
    "answer-span": Task(GPTForQuestionAnswering, ("context", "question", "answers"), "span"),
    "generation": Task(GPTForCausalLM, ("prompt", "", "answer"), "text"),
    "question-answering": Task(GPTForCausalLM, ("context", "question", "answer"), "text"),
}


@dataclass(frozen=True)
class TaskSettings:
    """A task with its columns; as run.json keeps it, so that evaluation reads the same ones."""

    name: str
    text_column: str
    pair_columns: tuple[str, ...]
    label_column: str
    numbers: bool
    labels: tuple[str, ...] = ()  # the classes, where the user lists them
    skip_labels: tuple[str, ...] = ()  # rows with such a label are skipped
    answers: str | None = None  # of multiple choice: one of labels.ANSWERS, None until a column decides

    @property
    def task(self) -> Task:
        """Return the definition of the task in `TASKS`: its head, default columns and kind of labels."""
        return TASKS[self.name]

    @property
    def writes(self) -> bool:
        """Return True if the model answers in text that it generates, and not by a head of its own for the task."""
        return self.task.head is GPTForCausalLM

    @property
    def kind(self) -> Kind:
        """Return what a row's label is: "class", "number", "text", "set", "tags" or "span".

        A set has any number of classes, tags are one class for each word, and a span is a part of the row's text. With
        `numbers` it is "number", else the kind of the task's definition.
        """
        return "number" if self.numbers else self.task.kind

    @property
    def classifies(self) -> bool:
        """Return True if a row's label is one class. The index of a choice, in multiple choice, counts as a class."""
        return self.kind == "class"

    @property
    def names_classes(self) -> bool:
        """Return True if the label column names classes, one or several in a row. In multiple choice it does not."""
        return self.kind in ("class", "set", "tags") and self.name != "multiple-choice"

    @property
    def scores(self) -> tuple[str, ...]:
        """Return the names of the metrics by which validation may choose the best model, the default first."""
        return SCORES[self.kind]


def _refuse_pair(pair_column: str, task: str) -> None:
    """Raise `ValueError` because --pair-column is given for a task that reads one text only."""
    raise ValueError(f"--pair-column {pair_column}: {task} reads one text only; expected the command without it")


def pair_columns(task: TaskSettings, given: str | None) -> tuple[str, ...]:
    """Return the names of the columns with a task's second texts: those in `given`, or the task's own for None.

    Commas separate the names in `given`, the value of --pair-column. Raise `ValueError` if columns are given for a task
    that reads one text only.
    """
    if given is None:
        return task.pair_columns
    if not task.pair_columns:
        _refuse_pair(given, task.name)
    return tuple(given.split(","))


def task_settings(
    name: str,
    text_column: str | None,
    pair_column: str | None,
    label_column: str | None,
    numbers: bool,
    labels: str | None = None,
    skip_labels: Sequence[str] = (),
    answers: str | None = None,
) -> TaskSettings:
    """Return the settings of the task called `name`, such as "classification". A column that is None is its default.

    `pair_column` is the column of the second text; for multiple choice it is a column of lists, or several columns with
    commas between them. With `numbers`, the labels of similarity are numbers, not classes; the labels of regression
    always are. `labels` are the classes, with commas between them, or None if the table decides. Rows with a label in
    `skip_labels` are to be skipped. `answers` is how the labels of multiple choice name a choice: by its "text", by
    "letters", or by its number, counted from "0" or from "1". None lets the table decide. Raise `ValueError` for an
    unknown task, an option that the task does not have, or a value that is not valid.
    """
    if name not in TASKS:
        raise ValueError(f"--task {name!r}: expected one of {', '.join(TASKS)}{did_you_mean(name, TASKS)}")
    for option, given in (("text", text_column), ("pair", pair_column), ("label", label_column)):
        if given is not None and not all(part.strip() for part in given.split(",")):
            raise ValueError(f"--{option}-column {given!r}: expected the name of a column")
    task = TASKS[name]
    text, pair, label = task.columns
    if pair_column is not None and not pair:
        _refuse_pair(pair_column, name)
    if numbers and name not in ("similarity", "regression"):
        raise ValueError(f"--numbers: {name} has no numbers as its labels; expected similarity or regression")
    if answers is not None and (name != "multiple-choice" or answers not in ANSWERS):
        raise ValueError(f"--answers {answers}: expected one of {', '.join(ANSWERS)}, for multiple-choice")
    pairs = tuple(column for column in (pair_column or pair).split(",") if column)
    made = TaskSettings(
        name, text_column or text, pairs, label_column or label, numbers or task.kind == "number",
        tuple(each.strip() for each in (labels or "").split(",") if each.strip()), tuple(skip_labels), answers,
    )  # fmt: skip
    if labels is not None and not made.names_classes:
        raise ValueError(f"--labels {labels}: {name} has no classes; leave it out")
    if labels is not None and len(set(made.labels)) != max(2, len(made.labels)):
        raise ValueError(f"--labels {labels}: expected two classes or more, each once, with commas between them")
    return made


def marks(config: GPTConfig) -> Marks:
    """Return the ids of the start, delimiter, extract and padding tokens of a task's input, as a `Marks`.

    Raise `ValueError` if the configuration lacks one of the first three. Without a padding token, its id is 0.
    """
    start, delimiter, extract = (special_token(config, f"{name}_token") for name in ("start", "delimiter", "extract"))
    return Marks(start, delimiter, extract, config.pad_token or 0)


def new_model(
    task: TaskSettings, make: Any, source: Path, lm_weight: float, names: Sequence[str], classifier_bias: bool = True
) -> Head:
    """Return the model for a task, made by `make(head, source, **overrides)`.

    `make` builds a model of the class `head` with the configuration of the run in `source`, changed by `overrides`. It
    decides whether the run's weights are loaded or new ones drawn. The head class is the task's. A head that classifies
    a sequence reads the last hidden state of the extract token. Dropout with probability 0.1 acts on the inputs of the
    output layer. `lm_weight` is the weight of the language model's loss, and `classifier_bias` gives the output layer a
    bias. `names` holds the names of the classes or choices. It is empty for tasks whose answer is a number or a span of
    the text. For a task whose answer is a text, the result is `make(GPTForCausalLM, source)`, without overrides.
    """
    if task.writes:
        return make(task.task.head, source)
    return make(
        task.task.head,
        source,
        num_labels=len(names) or 1,
        label_names=() if task.name == "multiple-choice" else tuple(names),
        classifier_bias=classifier_bias,
        problem={"number": "regression", "set": "multi_label"}.get(task.kind, "classification"),
        pooling="extract",
        classifier_dropout=0.1,
        lm_weight=lm_weight,
    )


def score(model: Head, rows: Sequence[Example], task: TaskSettings, answer_bytes: int) -> Metrics:
    """Return the metrics of a task, with those of its baseline, for a model on the examples `rows`.

    The keys depend on the task's kind of labels. For classes, sets of classes and tags they are "loss", "accuracy",
    "macro_f1", "micro_f1", "majority_accuracy" and "majority_macro_f1", also "matthews" except for sets, and for tags
    "words" and maybe "entity_f1". For numbers they are "mse", "mean_mse" and, if defined, "pearson" and "spearman". For
    texts to be written they are "loss", "perplexity" and "bits_per_byte", and for spans "loss", "exact_match" and
    "word_f1". "examples" is always the number of rows. `answer_bytes` is the number of bytes of all expected answers,
    which only texts to be written need.
    """
    pad = model.config.pad_token or 0
    if task.writes:
        batches = list(task_batches(rows, EVALUATION_BATCH, pad))
        tokens = sum(batch.weight for batch in batches)
        return answer_metrics(lm_loss(model, batches), tokens, answer_bytes, len(rows))
    if task.kind == "tags":
        return tag_metrics(row_predictions(model, rows, pad, EVALUATION_BATCH), rows, model.config.label_names)
    if task.kind == "span":
        return span_metrics(row_predictions(model, rows, pad, EVALUATION_BATCH), rows)
    logits = predictions(model, rows, pad, EVALUATION_BATCH)
    wanted = torch.tensor([row.target for row in rows])
    if task.kind == "set":
        return multi_label_metrics(logits, wanted)
    if task.numbers:
        return regression_metrics(logits.flatten(), wanted)
    return classification_metrics(logits, wanted.long())


def metric_of(task: TaskSettings, name: str | None) -> str:
    """Return the metric by which validation chooses the best model: `name`, or the task's default if `name` is None.

    `name` and the result have no prefix "valid_": "accuracy", for example. Raise `ValueError` if `name` is not in
    `task.scores`.
    """
    if name is None:
        return task.scores[0]
    if name not in task.scores:
        expected = f"{' or '.join(task.scores)}{did_you_mean(name, task.scores)}"
        raise ValueError(f"--metric {name}: {task.name} does not measure it; expected {expected}")
    return name


def better(metric: str, line: Metrics) -> tuple[float, float]:
    """Return (value, tie), a key by which validations are compared: the larger key is the better validation.

    `line` has the metrics of a validation, with names such as "valid_accuracy". `metric` is such a name without
    "valid_". `value` is that metric, negated if a smaller one is better, and -infinity if it is missing or NaN, as a
    correlation may be. `tie` is the negative "valid_loss", or 0 if that is missing.
    """
    sign = -1 if metric in _SMALLER_IS_BETTER else 1
    value = sign * line.get(f"valid_{metric}", math.nan)
    return value if value == value else -math.inf, -line.get("valid_loss", 0.0)


def answers(
    model: GPTForCausalLM, rows: Sequence[Example], tokenizer: Tokenizer, max_new_tokens: int | None = None
) -> list[str]:
    """Return the text that the model writes greedily behind the prompt of each of `rows`, up to its end token.

    The prompt is the first sequence of a row up to the position `row.answer`. A text has at most `max_new_tokens`
    tokens, by default (None or 0) eight more than the longest expected answer among the 64 rows of its batch. A text
    also has no more tokens than the model has positions behind the longest prompt of the batch. Texts are returned
    without special tokens, in the order of `rows`.
    """
    config = model.config
    device = next(model.parameters()).device
    written = []
    for first in range(0, len(rows), EVALUATION_BATCH):
        part = rows[first : first + EVALUATION_BATCH]
        prompts = [row.sequences[0][: row.answer] for row in part]
        tokens, lengths = pad_rows(prompts, config.pad_token or 0)
        wanted = max(len(row.sequences[0]) - len(prompt) for row, prompt in zip(part, prompts, strict=True)) + 8
        room = min(max_new_tokens or wanted, config.seq_len - int(lengths.max()))
        end = special_token(config, "extract_token")
        out = generate(
            model, tokens.to(device), lengths=lengths.to(device), max_new_tokens=max(1, room), temperature=0,
            stop_tokens=[end],
        ).tolist()  # fmt: skip
        for row, prompt in zip(out, prompts, strict=True):
            new = row[len(prompt) : len(prompt) + max(1, room)]
            written.append(decode(tokenizer, new[: new.index(end)] if end in new else new, special=False))
    return written


def writes_answers(folder: Path) -> bool:
    """Return True if the run in `folder` was fine-tuned for a task whose answer is a text that the model writes.

    These tasks are "generation" and "question-answering", but not "answer-span", whose model finds the answer in the
    given text. The run's record names the task, in run.json or in the newest checkpoint of a stopped run. Without a
    record, return False.
    """
    task = TASKS.get(str(read_record(folder).get("task")))
    return task is not None and task.head is GPTForCausalLM


def writing_prompt(
    folder: Path, config: GPTConfig, tokenizer: Tokenizer, prompt: str, question: str | None
) -> tuple[list[int], int | None]:
    """Return (ids, end): the token ids that the model of a run folder continues, and the id that ends its text.

    `tokenizer` is the run's. A model that was fine-tuned to answer in text gets `prompt` and `question` with the
    special tokens of its training, and none of it is cut off. `question` is None for a task without questions. Any
    other model continues `prompt` as it is. `end` is None if the model has no token that ends a text; generation then
    stops at the maximum number of tokens. Raise `ValueError` if `question` is given to a model that takes none, or
    missing for one that needs it. For a model that was not fine-tuned to answer in text, also raise it if the prompt
    has a character without a token, or is empty and there is no start token.
    """
    task = TASKS.get(str(read_record(folder).get("task")))
    writes = task is not None and task.head is GPTForCausalLM
    asks = task is not None and writes and bool(task.columns[1])
    if asks != (question is not None):
        wanted = "--question, as it was fine-tuned to answer" if asks else "no --question, as it does not answer any"
        raise ValueError(f"{folder}: expected {wanted}")
    if not writes:
        ids = encode(tokenizer, prompt)
        if max(ids, default=0) >= config.num_tokens:
            raise ValueError(
                f"--prompt {prompt!r:.60}: has a character without a token in {folder}; expected known ones"
            )
        ends = config.start_token if config.end_token is None else config.end_token
        if not ids and config.start_token is None:
            raise ValueError(f"--prompt '': {folder} has no start token to begin a text with; expected a text")
        return ids or [special_token(config, "start_token")], ends
    between = marks(config)
    texts = [encode(tokenizer, text) for text in (prompt, question) if text is not None]
    row = task_input([*texts, []], sum(map(len, texts)) + 4, between)
    return row[:-1], between.extract  # without the mark that ends the answer, which is yet to come


def written_metrics(
    model: GPTForCausalLM, rows: Sequence[Example], tokenizer: Tokenizer, wanted: Sequence[str]
) -> Metrics:
    """Return {"exact_match", "word_f1"}, in [0, 1], of the texts that the model writes for `rows`.

    They are compared with `wanted`, the expected text of each row. The model writes greedily, at most eight tokens more
    than the longest expected answer of a batch.
    """
    return generated_metrics(answers(model, rows, tokenizer), wanted)
