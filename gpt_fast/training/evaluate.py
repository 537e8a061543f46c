"""Evaluation of a finished run, whatever its head."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt_fast_settings.declaration import did_you_mean

from ..data.batches import Batch, lm_windows, text_stream, unigram_entropy
from ..data.corpus import STDLIB, read_corpus, read_documents
from ..data.reading.rows import RowOptions
from ..data.snippets import snippet_table
from ..data.stream import TokenStream
from ..data.token_files import check_content, check_vocabulary, read_token_file, token_files
from ..heads import GPTForCausalLM, GPTForSequenceClassification, Head
from ..scoring import score as scored
from .finetune import answer_bytes, draw_confusion
from .forms import FORMS, evaluate_form
from .lm_data import Mask, lm_batch, masker
from .metrics import lm_loss, perplexity
from .runs.folder import read_record, write_extra
from .runs.load import load_run, run_tokenizer
from .table_examples import PLAIN, examples, read_task_table, remarks
from .tasks import TaskSettings, pair_columns, score, task_settings, written_metrics

BATCH = 32


def evaluate(
    folder: Path,
    data: Path | None,
    text_column: str | None,
    label_column: str | None,
    device: str,
    pair_column: str | None = None,
    confusion: Path | None = None,
    skip_labels: Sequence[str] = (),
    options: RowOptions = PLAIN,
    raw_dtype: str | None = None,
    stride: int | None = None,
    form: str | None = None,
) -> dict[str, Any]:
    """Return the metrics of the run in `folder` on `data`: a language model's loss on text, or a task's on a table.

    The keys are "task", "data" and the names of the metrics, with those of baselines. A language model has "loss",
    "perplexity" and "unigram_entropy", for example, and a classifier "accuracy" and "majority_accuracy". If `data` is
    None, a model that was trained on Python's standard library is evaluated on the files that its training held out.
    `device` is "cpu" or "cuda".

    `text_column`, `label_column` and `pair_column` (of the second text or of the choices) may be None. For a task they
    are then those of its training. For a language model the text column is "text", and with `form` all have their
    published names. `skip_labels` are labels whose rows are skipped, besides those of the training, and `options` say
    how to read the table. `confusion` is the path for a picture of a classifier's confusion matrix; the result names
    the path as "confusion" if the picture could be written. `raw_dtype`, "uint16" or "uint32", is the dtype of token
    files without a header. With `stride`, text is read in overlapping windows that begin so many tokens apart. `form`
    says that `data` is a file of a benchmark, "lambada" or "hellaswag", on which a causal language model is measured.

    Raise `ValueError` for an option that does not apply to the run, and for data that does not fit it. Raise
    `FileNotFoundError` if `folder` holds no run.
    """
    model = load_run(folder, device)
    record = read_record(folder)
    if form is not None and data is None:
        raise ValueError(f"--form {form}: no --data; expected a file of that form")
    if data is None and record.get("data") != STDLIB:
        raise ValueError(f"{folder}: was not trained on the standard library; name what to evaluate on with --data")
    task = run_task(model, record)
    for option, value in (("--stride", stride), ("--form", form)):
        if value is not None and not isinstance(model, GPTForCausalLM):
            raise ValueError(f"{option} {value}: {folder} holds a {type(model).__name__}; expected a GPTForCausalLM")
    columns: dict[str, object] = {"--pair-column": pair_column, "--label-column": label_column}
    table: dict[str, object] = {"--columns": ",".join(options.columns or ()), "--skip-ragged": options.skip_ragged}
    skipped: dict[str, object] = {"--skip-label": ",".join(skip_labels)}
    if form is not None:
        unread = skipped | {"--raw-dtype": raw_dtype, "--confusion": confusion}
        _refuse(unread | (columns if form == "lambada" else {}), f"--form {form} does not read it")
        return _evaluate_form(form, model, folder, data, text_column, pair_column, label_column, options, stride)
    if stride is not None and task is not None:
        raise ValueError(f"--stride {stride}: {folder} was fine-tuned for {task.name}; expected a language model")
    if confusion is not None and (task is None or not task.classifies):
        raise ValueError(f"--confusion {confusion}: {folder} holds no classifier")
    if task is None:
        _refuse(columns | table | skipped, f"{folder} holds a language model, which reads text")
        return evaluate_language_model(model, folder, data, text_column or "text", raw_dtype, stride)
    if raw_dtype is not None:
        raise ValueError(f"--raw-dtype {raw_dtype}: {folder} holds no language model; expected a labelled table")
    task = replace(
        task,
        text_column=text_column or task.text_column,
        label_column=label_column or task.label_column,
        pair_columns=pair_columns(task, pair_column),
        skip_labels=(*task.skip_labels, *skip_labels),
    )
    return evaluate_task(model, folder, data, task, run_labels(model, record), confusion, options)


def _refuse(given: Mapping[str, object], reason: str) -> None:
    """Raise `ValueError` for the first option in `given` whose value is not None, False, 0 or empty.

    `given` maps names of options, such as "--stride", to the values that the user gave. `reason` says for the message
    why none of them applies.
    """
    for option, value in given.items():
        if value:
            shown = option if value is True else f"{option} {value}"
            raise ValueError(f"{shown}: {reason}; expected the command without it")


def _evaluate_form(
    form: str,
    model: Head,
    folder: Path,
    data: Path | None,
    text_column: str | None,
    choice_columns: str | None,
    label_column: str | None,
    options: RowOptions,
    stride: int | None,
) -> dict[str, Any]:
    """Return the metrics of a language model on the file `data` of a benchmark called `form`, and its path as "data".

    The other keys are "task", accuracies such as "last_word_accuracy" or "choice_accuracy", and "examples". `folder` is
    the model's run folder, from which the tokenizer is read, and `options` say how to read the file. `text_column`,
    `choice_columns` and `label_column` may be None for the names in the published data set. Raise `ValueError` if
    `form` is neither "lambada" nor "hellaswag", or if `stride` is not None. `model` has to be a `GPTForCausalLM`, and
    `data` not None.
    """
    if form not in FORMS:
        raise ValueError(f"--form {form!r}: expected one of {', '.join(FORMS)}{did_you_mean(form, FORMS)}")
    if stride is not None:
        raise ValueError(f"--stride {stride}: reads text in windows; leave it out beside --form {form}")
    assert isinstance(model, GPTForCausalLM) and data is not None
    tokenizer = run_tokenizer(folder, model)
    measured = evaluate_form(form, model, tokenizer, data, options, text_column, choice_columns, label_column)
    return {"data": str(data)} | measured


def run_task(model: Head, record: dict[str, Any]) -> TaskSettings | None:
    """Return the task that a run was fine-tuned for, with its columns, or None for a language model.

    `record` is the content of the run's run.json. Its entry "columns" holds all fields of `TaskSettings`: the name of
    the task, its columns and its options. Without that entry, as for a model of another library, a
    `GPTForSequenceClassification` gets classification or regression, by its configuration, with the columns "text" and
    "label". Any other model gives None.
    """
    if "columns" in record:
        columns: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in record["columns"].items()}
        return TaskSettings(**columns)
    if not isinstance(model, GPTForSequenceClassification):
        return None
    return task_settings(
        "regression" if model.config.problem == "regression" else "classification", None, None, None, False
    )


def run_labels(model: Head, record: dict[str, Any]) -> list[str]:
    """Return the names of the classes of a run.

    `record` is the content of run.json. If its entry "labels" has names, they are returned for any model. Otherwise a
    `GPTForSequenceClassification` that is no regression gives the names in its configuration, or "0", "1" and so on if
    the configuration has none. In all other cases the list is empty.
    """
    if record.get("labels"):
        return list(record["labels"])
    config = model.config
    if not isinstance(model, GPTForSequenceClassification) or config.problem == "regression":
        return []
    return list(config.label_names) or [str(i) for i in range(config.num_labels)]


def evaluate_task(
    model: Head,
    folder: Path,
    data: Path | None,
    task: TaskSettings,
    labels: list[str],
    confusion: Path | None,
    options: RowOptions = PLAIN,
) -> dict[str, Any]:
    """Return "task", "data" and the metrics of a fine-tuned model on a table, with their baselines.

    `folder` is the model's run folder, from which the tokenizer is read. `data` is the table's file, read with
    `options`, or None for held-out snippets of Python's standard library. `task` names the columns. `labels` are the
    names of the classes in the order of the logits, or [] for a task without classes. The metrics depend on the task,
    such as "accuracy" and "majority_accuracy" for a classifier and "mse" and "mean_mse" for a regression. A model that
    answers in text also has "exact_match" and "word_f1". `confusion` is the path for a picture of the confusion matrix,
    or None; the result names the path as "confusion" if the picture could be written. Warn about rows that may have
    been cut off or are empty. Raise `ValueError` for a table that does not fit the task.
    """
    table = snippet_table()[1] if data is None else read_task_table(data, task, options=options)
    tokenizer = run_tokenizer(folder, model)
    rows = examples(table, task, labels, tokenizer, model.config)
    for remark in remarks(table, rows, model.config.seq_len):
        warnings.warn(remark, stacklevel=2)
    result: dict[str, Any] = {"task": task.name, "data": table.source}
    result |= score(model, rows, task, answer_bytes(table))
    if isinstance(model, GPTForCausalLM):
        result |= written_metrics(model, rows, tokenizer, table.labels)
    if confusion is not None:
        title = f"{folder} on {table.source}"
        if write_extra(confusion, partial(draw_confusion, model, rows, labels, title)):
            result["confusion"] = str(confusion)
    return result


@dataclass(frozen=True)
class _Batches(Sequence[Batch]):
    """Batches of windows that lie side by side, read when they are asked for, each once and in their order."""

    stream: TokenStream
    seq_len: int
    mask: Mask | None
    generator: torch.Generator

    def __len__(self) -> int:
        return math.ceil(len(self.stream) / (BATCH * self.seq_len))

    def __getitem__(self, index: Any) -> Any:
        """Return batch number `index`, from 0: up to 32 windows of `seq_len` tokens, side by side in the stream.

        With a mask, each call draws masks from one generator that all batches share. So each batch has to be read once,
        and in order, for masks that can be reproduced.
        """
        starts = range(index * BATCH * self.seq_len, len(self.stream), self.seq_len)[:BATCH]
        return lm_batch(self.stream.windows(starts, self.seq_len), self.mask, self.generator, None)


def evaluate_language_model(
    model: Head,
    folder: Path,
    data: Path | None,
    text_column: str = "text",
    raw_dtype: str | None = None,
    stride: int | None = None,
) -> dict[str, Any]:
    """Return the loss of a language model on `data` in nats per predicted token, and metrics that follow from it.

    The keys are "task" ("clm" or "mlm"), "data" (its name), "tokens" (how many tokens the windows below cover), "loss",
    "unigram_entropy" (the baseline), "perplexity" and, if it is given, "stride". A causal model on text also has
    "bits_per_byte", "bits_per_word" and "words", which do not depend on the tokenizer. `data` is text, a table with a
    `text_column`, or token files; None stands for the held-out files of Python's standard library. `raw_dtype`,
    "uint16" or "uint32", is the dtype of token files without a header. `folder` is the model's run folder, from which
    the tokenizer is read. A masked model predicts 15 % of the tokens, always the same ones.

    Windows of the model's length lie side by side, and a last part shorter than a window is left out; a shorter text is
    one window. With `stride`, which is for causal models, each window begins `stride` tokens after the one before, and
    only tokens that no earlier window has scored are scored. Then nothing is left out, and tokens have more context.

    Raise `ValueError` if `stride` is not from 1 to the model's number of positions, or if `raw_dtype` is given for
    text. Also raise it if `data` is empty or does not fit the model's tokenizer.
    """
    T = model.config.seq_len
    if stride is not None and not 1 <= stride <= T:
        raise ValueError(f"--stride {stride}: {folder} has {T} positions; expected 1 to {T}")
    tokenizer = run_tokenizer(folder, model)
    files = token_files([data] if data is not None else [])
    size: int | None = None
    words = 0
    if files:
        read = [read_token_file(path, raw_dtype) for path in files]
        for file in read:
            check_vocabulary(file, tokenizer)
            check_content(file, tokenizer)
        stream = TokenStream([file.tokens for file in read])
    elif raw_dtype is not None:
        raise ValueError(f"--raw-dtype {raw_dtype}: --data names text; expected a token file (.bin)")
    else:
        documents = read_corpus(None).valid if data is None else read_documents(data, text_column)
        size = sum(len(document.text.encode()) for document in documents)
        words = sum(len(document.text.split()) for document in documents)
        stream = text_stream(tokenizer, (document.text for document in documents), model.config.start_token)
    T = min(T, len(stream))
    stream.require(max(1, T), STDLIB if data is None else str(data))
    asked = stream if stride is not None else stream.part(0, len(stream) // T * T)
    counts = asked.counts()
    if len(counts) > model.config.num_tokens:
        raise ValueError(f"{data}: has a character without a token in {folder}; expected text of known characters")
    causal = isinstance(model, GPTForCausalLM)
    if stride is not None:
        scores = scored(model, lm_windows(stream, len(stream)), stride=stride, batch_size=BATCH)
        loss = -float(scores.log_probs.double().sum() / scores.predicted.sum())
    else:
        mask = None if causal else masker(tokenizer, model.config)
        loss = lm_loss(model, _Batches(asked, T, mask, torch.Generator().manual_seed(0)))
    result: dict[str, Any] = {
        "task": "clm" if causal else "mlm",
        "data": STDLIB if data is None else str(data),
        "tokens": len(asked),
        "loss": loss,
        "unigram_entropy": unigram_entropy(counts),
        "perplexity": perplexity(loss),
    }
    if stride is not None:
        result["stride"] = stride
    if causal and size is not None:
        bits = loss / math.log(2) * len(stream)
        result |= {"bits_per_byte": bits / size, "bits_per_word": bits / max(1, words), "words": words}
    return result
