"""Evaluation of a finished run, whatever its head."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..data.batches import Batch, text_stream, unigram_entropy
from ..data.corpus import STDLIB, read_corpus, read_documents
from ..data.reading.rows import RowOptions
from ..data.snippets import snippet_table
from ..data.stream import TokenStream
from ..data.token_files import check_content, check_vocabulary, read_token_file, token_files
from ..heads import GPTForCausalLM, GPTForSequenceClassification, Head
from .finetune import answer_bytes, draw_confusion
from .lm_data import Mask, lm_batch, masker
from .metrics import lm_loss, perplexity
from .runs.folder import read_record, write_extra
from .runs.load import load_run, run_tokenizer
from .table_examples import PLAIN, examples, read_task_table, remarks
from .tasks import TaskSettings, score, task_settings, written_metrics

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
) -> dict[str, Any]:
    """A language model's loss on text, or a task's metrics on a table, each with its baseline. Without `data`, a model
    that learned from the standard library takes the files that its training held out. `confusion` is the file for a
    picture of a classifier's confusion matrix; the result names the file if it could be written."""
    model = load_run(folder, device)
    record = read_record(folder)
    if data is None and record.get("data") != STDLIB:
        raise ValueError(f"{folder}: was not trained on the standard library; name what to evaluate on with --data")
    task = run_task(model, record)
    if confusion is not None and (task is None or not task.classifies):
        raise ValueError(f"--confusion {confusion}: {folder} holds no classifier")
    if task is None:
        return evaluate_language_model(model, folder, data, text_column or "text", raw_dtype)
    if raw_dtype is not None:
        raise ValueError(f"--raw-dtype {raw_dtype}: {folder} holds no language model; expected a labelled table")
    pairs = task.pair_columns if pair_column is None else tuple(pair_column.split(","))
    task = replace(
        task,
        text_column=text_column or task.text_column,
        label_column=label_column or task.label_column,
        pair_columns=pairs,
        skip_labels=(*task.skip_labels, *skip_labels),
    )
    return evaluate_task(model, folder, data, task, run_labels(model, record), confusion, options)


def run_task(model: Head, record: dict[str, Any]) -> TaskSettings | None:
    """The task that a run was fine-tuned for; None for a language model. A classifier saved without a record reads
    columns text and label."""
    if "columns" in record:
        columns: Any = {name: tuple(v) if isinstance(v, list) else v for name, v in record["columns"].items()}
        return TaskSettings(**columns)
    if not isinstance(model, GPTForSequenceClassification):
        return None
    return task_settings(
        "regression" if model.config.problem == "regression" else "classification", None, None, None, False
    )


def run_labels(model: Head, record: dict[str, Any]) -> list[str]:
    """The names of a run's classes, or of those of another library's classifier; numbers where it has no names."""
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
        starts = range(index * BATCH * self.seq_len, len(self.stream), self.seq_len)[:BATCH]
        return lm_batch(self.stream.windows(starts, self.seq_len), self.mask, self.generator, None)


def evaluate_language_model(
    model: Head, folder: Path, data: Path | None, text_column: str = "text", raw_dtype: str | None = None
) -> dict[str, Any]:
    """Return the loss in nats per predicted token over all of `data`, its perplexity and, for text, the bits per byte,
    which do not depend on the tokenizer. A masked model is asked for 15 % of the tokens, always the same."""
    tokenizer = run_tokenizer(folder, model)
    files = token_files([data] if data is not None else [])
    size: int | None = None
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
        stream = text_stream(tokenizer, (document.text for document in documents), model.config.start_token)
    T = min(model.config.seq_len, len(stream))
    stream.require(max(1, T))
    asked = stream.part(0, len(stream) // T * T)  # a rest shorter than a window is left out
    counts = asked.counts()
    if len(counts) > model.config.num_tokens:
        raise ValueError(f"{data}: has a character without a token in {folder}; expected text of known characters")
    causal = isinstance(model, GPTForCausalLM)
    mask = None if causal else masker(tokenizer, model.config)
    generator = torch.Generator().manual_seed(0)
    loss = lm_loss(model, _Batches(asked, T, mask, generator))
    result: dict[str, Any] = {
        "task": "clm" if causal else "mlm",
        "data": STDLIB if data is None else str(data),
        "tokens": len(asked),
        "loss": loss,
        "unigram_entropy": unigram_entropy(counts),
        "perplexity": perplexity(loss),
    }
    if causal and size is not None:
        result["bits_per_byte"] = loss / math.log(2) * len(stream) / size
    return result
