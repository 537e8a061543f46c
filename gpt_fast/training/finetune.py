"""Supervised fine-tuning: a task's head on a pre-trained trunk, from a labelled table to a run folder."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpt_fast_settings.declaration import wrong_on_every_rank
from gpt_fast_settings.finetune import FinetuneSettings

from ..data.batches import Batch
from ..data.example_batches import Example, task_batch
from ..data.reading.rows import row_options
from ..data.stream import mix
from ..data.tables import Table
from ..data.tokenizer import load_tokenizer
from ..heads import GPTForCausalLM, GPTForSequenceClassification, Head
from ..heads.classifiers import TaskHead
from ..interrupts import Stop
from ..model_folder import read_config
from . import adaptation
from .engine.optimizer import schedule
from .metrics import Metrics, confusion_matrix, predictions
from .plots import plot_confusion, plot_task
from .program import Record, Say, Session, Show, train
from .runs import adapters
from .runs.adapters import Adapter
from .runs.folder import check_run, read_metrics
from .runs.load import adapter_base, load_adapted, load_for_task, load_head
from .runs.recipes import finetuning_lr
from .table_examples import examples, label_names, label_rule, read_tables, remarks
from .tasks import (
    EVALUATION_BATCH,
    TaskSettings,
    better,
    metric_of,
    new_model,
    score,
    task_settings,
    written_metrics,
)

FEW_UPDATES = 50  # with fewer, the user gets a remark


def finetune(settings: FinetuneSettings, show: Show, say: Say, stop: Stop | None = None) -> Record:
    """Train a task's head on `L_task + λ·L_lm`, or a causal model on answers, and write a run folder.

    The folder has the weights with the lowest validation loss, or the best value of the settings' metric. Return the
    run's record, the content of run.json. `show(progress)` is called after each update with a `Progress`, and
    `say(line)` with lines for the user, both on rank 0 only. Once a signal has reached `stop`, the run saves a
    checkpoint to resume from and raises `Interrupted`. With --resume, a finished run that is not asked for more epochs
    is left as it is. Raise `FileNotFoundError` if the folder of --from holds no run, `FileExistsError` if --out
    may not be written, and `ValueError` for settings that contradict each other or do not fit the data.
    """
    with wrong_on_every_rank():
        task = task_of(settings)  # raises before any table is read
        if settings.convertible and task.task.head is not GPTForSequenceClassification:
            raise ValueError(f"--convertible: is for transformers' classifiers; leave it out for {task.name}")
    check_run(settings.source)
    return train(settings, _finetune, show, say, stop)


def task_of(settings: FinetuneSettings) -> TaskSettings:
    """Return the task with its columns, labels and other options, as `settings` name them. No table is read.

    Columns that are None are the task's defaults. Raise `ValueError` for an unknown task, or options it does not have.
    """
    return task_settings(
        settings.task, settings.text_column, settings.pair_column, settings.label_column, settings.numbers,
        settings.labels, settings.skip_label, settings.answers,
    )  # fmt: skip


def _finetune(session: Session[FinetuneSettings]) -> Record:
    """Fine-tune a model, as `session` asks: read the tables, make the model, train, and write the run folder.

    A `Session` holds the settings, the run folder, the ranks, and the functions that report to the user. Rank 0 writes
    the weights of the best validation, the plot loss.png and, for a classifier, confusion.png. Return the run's record.
    On rank 0 it is the content of run.json. On other ranks it lacks "weights" and the metrics of generated answers,
    which rank 0 adds after training. Raise `ValueError` if the settings, the tables and the pre-trained model do not
    fit each other.
    """
    ranks, source = session.ranks, session.settings.source
    lr = session.settings.lr if session.settings.lr is not None else finetuning_lr(source)
    settings = session.settings.changed(lr=lr)
    session = replace(session, settings=settings)
    pretrained_as, config = read_config(source)
    with wrong_on_every_rank():
        task = task_of(settings)
        metric = metric_of(task, settings.metric)
        adaptation.check(settings, task, config)
    options = row_options(settings.columns, settings.skip_ragged)
    fold = (settings.fold, settings.folds) if settings.fold and settings.folds else None
    train, valid, task = read_tables(settings.train, settings.valid, task, settings.seed, options, fold)
    names = label_names(train, task)
    if settings.rows is not None:
        train = some_rows(train, settings.rows, settings.seed)
    tokenizer = load_tokenizer(source)
    # A masked model has not learned to predict the next token, and λ would make it do that above all.
    without_lm = task.writes or pretrained_as == "GPTForMaskedLM" or settings.freeze == "trunk"
    lm_weight = 0.0 if without_lm else settings.lm_weight
    if settings.freeze == "trunk" and settings.lm_weight:
        session.say("--freeze trunk: nothing of the language model is trained, so its loss is left out (--lm-weight 0)")
    adapter = None
    if settings.lora_rank is not None:
        adapter = Adapter(settings.lora_rank, settings.lora_alpha, source)
    begin = adapter_base if adapter else fresh if settings.scratch else pretrained
    make = partial(new_model, task, begin, source, lm_weight, names, not settings.convertible)
    model = session.make_model((lambda: adapter.attach(make())) if adapter else make)
    rows, valid_rows = (examples(table, task, names, tokenizer, model.config) for table in (train, valid))
    if settings.freeze is not None:
        adaptation.freeze(model, settings.freeze)
    if settings.class_weights is not None and isinstance(model, TaskHead):
        weights = adaptation.class_weights(settings.class_weights, names, rows, task)
        model.weigh_classes(weights)
        shown = ", ".join(f"{name} {weight:.3g}" for name, weight in zip(names, weights, strict=True))
        session.say(f"class weights: {shown}")
    steps = settings.epochs * math.ceil(len(train) / settings.batch_size)
    _tell(train, valid, rows, label_rule(names, task), model.config.seq_len, steps, session.say)

    origin: Record = {
        "command": "finetune",
        "task": settings.task,
        "columns": asdict(task),
        "from": str(source),
        "scratch": settings.scratch,
        "data": train.source,
        "labels": names,
        "lr": lr,
    } | ({"lora": adapter.record()} if adapter else {})
    loop = session.make_loop(
        model,
        tokenizer,
        RowSource(
            rows, settings.batch_size, model.config.pad_token or 0, settings.seed, settings.accumulate,
            task.kind in ("number", "set"),
            ranks.rank, ranks.size,
        ),
        partial(validation, model, valid_rows, task, answer_bytes(valid)),
        lr=lr,
        steps=steps,
        schedule=schedule(
            settings.schedule, total=steps, warmup=max(1, round(0.002 * steps)), decay=settings.decay
        ),
        validations=5,
        identity=identity(rows),
        record=origin,
        better=partial(better, metric),
        valid_every=settings.valid_every,
        patience=settings.patience,
        save_best=adapter.save if adapter else Head.save_pretrained,
    )  # fmt: skip
    loop.run()
    best = loop.state.best_metrics

    record = origin | {
        "train_rows": len(train),
        "valid_rows": len(valid),
        "epochs": settings.epochs,
        "lm_weight": lm_weight,
        "best_step": best["step"],
        "last_step": loop.state.step,
        "metric": metric,
    }
    record |= session.facts(loop)
    record |= {name: value for name, value in best.items() if name.startswith(("valid_", "majority_", "mean_"))}
    if ranks.first:
        best_folder = session.run.folder / "best"
        if adapter is None:
            chosen = task.task.head.from_pretrained(best_folder).to(ranks.device)
        else:
            chosen = load_adapted(task.task.head, session.run.folder, record, best_folder).to(ranks.device)

        def measure() -> Record:
            """Return {"valid_exact_match", "valid_word_f1"} of the best model's texts for the validation rows.

            The enclosing function has loaded that model and made the rows. For a model that writes no text, return {}.
            """
            if not isinstance(chosen, GPTForCausalLM):
                return {}
            written = written_metrics(chosen, valid_rows, tokenizer, valid.labels)
            return {f"valid_{name}": value for name, value in written.items()}

        pictures = {"loss.png": partial(draw, session.run.folder, task, train.source)}
        if task.classifies:
            title = f"Held-out rows: {valid.source}"
            pictures["confusion.png"] = partial(draw_confusion, chosen, valid_rows, names, title)
        write = partial(adapters.copy, best_folder) if adapter else None
        session.finish(chosen, record, pictures, measure, write)
    return record


def pretrained(head: type[Head], source: Path, **overrides: Any) -> Head:
    """Return a model of class `head` with the weights of the run in `source`.

    Whatever the task, special tokens (pad, mask, start, delimiter, extract) that the run's configuration lacks are
    added, with their ids in the run's tokenizer. Layers that the run lacks, such as a classifier, get new random
    weights. `overrides` replace fields of the configuration.
    """
    return load_for_task(source, partial(load_head, head), overrides)


def fresh(head: type[Head], source: Path, **overrides: Any) -> Head:
    """Return a model of class `head` with new random weights and the configuration of the run in `source`.

    Whatever the task, special tokens (pad, mask, start, delimiter, extract) that the run's configuration lacks are
    added, with their ids in the run's tokenizer. `overrides` replace fields of the configuration.
    """
    return load_for_task(source, lambda folder, **changed: head(read_config(folder)[1].replace(**changed)), overrides)


def identity(rows: Sequence[Example]) -> dict[str, Any]:
    """Return {"rows", "crc32"}: the number of training examples, and a CRC-32 of their tokens and labels in order.

    The run's checkpoints keep both, and a run resumes only on a table with the same values.
    """
    tagged = any(row.tags for row in rows)
    content = json.dumps([[row.sequences, row.tags if tagged else row.target] for row in rows]).encode()
    return {"rows": len(rows), "crc32": zlib.crc32(content)}


def answer_bytes(table: Table) -> int:
    """Return the UTF-8 bytes of all labels of a table, which are the expected answers of a task that writes text."""
    return sum(len(label.encode(errors="surrogatepass")) for label in table.labels)


def some_rows(table: Table, count: int, seed: int) -> Table:
    """Return a table of `count` rows of `table`, drawn at random by `seed`, in the order of `table`.

    Raise `ValueError` if it has fewer rows.
    """
    if count > len(table):
        raise ValueError(f"--rows {count}: {table.source} has {len(table):,} to train on; expected at most as many")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    return table.rows(sorted(order[:count].tolist()))


@dataclass
class RowSource:
    """Batches of a run as a function of the update: one shuffled pass over the rows after another.

    `source(step)` returns this rank's parts of update `step`, as many on every rank. If there are fewer rows than
    parts, some parts repeat a row that does not count.
    """

    rows: Sequence[Example]
    batch_size: int
    pad_token: int
    seed: int
    parts: int = 1
    numbers: bool = False
    rank: int = 0
    ranks: int = 1

    def __call__(self, step: int) -> list[Batch]:
        """Return this rank's micro-batches of update `step`, counted from 0, as many on every rank.

        The updates take `batch_size` rows each of one shuffled pass over the rows after another. The last update of a
        pass takes the rows that are left. A rank gets `parts` micro-batches, or fewer if there are too few rows. A
        micro-batch without a row of its own holds one row that does not count (weight 0). The same step always gives
        the same batches.
        """
        epoch, place = divmod(step, math.ceil(len(self.rows) / self.batch_size))
        order = self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        each = min(self.parts, math.ceil(len(order) / self.ranks))
        return [
            self._part(order[i :: each * self.ranks], order[0]) for i in range(self.rank, each * self.ranks, self.ranks)
        ]

    def _part(self, part: Sequence[int], spare: int) -> Batch:
        """Return the padded batch of the rows with the indices `part`.

        If `part` is empty, return a batch of the row with the index `spare`, with weight 0.
        """
        batch = task_batch([self.rows[i] for i in part or [spare]], self.pad_token, self.numbers)
        return batch if part else batch._replace(weight=0)

    def _order(self, epoch: int) -> list[int]:
        """Return the indices of all rows, shuffled for `epoch`, counted from 0. The latest epoch's order is cached."""
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch) >> 1)
            self._epoch, self._shuffled = epoch, torch.randperm(len(self.rows), generator=generator).tolist()
        return self._shuffled


def validation(model: Head, rows: Sequence[Example], task: TaskSettings, size: int) -> Metrics:
    """Return the metrics of `model` for the task on the examples `rows`: {"valid_accuracy": 0.9}, for example.

    All names begin with "valid_", except the names of baselines, which begin with "majority_" or "mean_".
    "valid_examples" is the number of rows. `size` is the number of UTF-8 bytes of the expected answers of all `rows`,
    as `answer_bytes` returns it for their table. A task whose answers are texts needs `size` for its bits per byte. Any
    other task ignores it.
    """
    measured = score(model, rows, task, size)
    baselines = ("majority_", "mean_")
    return {name if name.startswith(baselines) else f"valid_{name}": value for name, value in measured.items()}


def draw(folder: Path, task: TaskSettings, source: str, path: Path) -> None:
    """Plot the training loss and a validation metric of the run in `folder` over the updates, as a PNG at `path`.

    The metric is the loss of the answers for a task whose answers are texts, the F1 of words for a span, the mean
    squared error for numbers, and else the accuracy. For numbers and accuracy, a line shows the metric of a constant
    answer. The curves are read from metrics.jsonl. `source` names the training table in the title.
    """
    metrics, title = read_metrics(folder), f"Fine-tuning: {source}"
    if task.writes:
        plot_task(metrics, "valid_loss", None, "loss of the answers (nats per token)", title, path)
    elif task.kind == "span":
        plot_task(metrics, "valid_word_f1", None, "F1 of the words", title, path)
    elif task.numbers:
        plot_task(metrics, "valid_mse", metrics[-1]["mean_mse"], "mean squared error", title, path)
    else:
        plot_task(metrics, "valid_accuracy", metrics[-1]["majority_accuracy"], "accuracy", title, path)


def draw_confusion(model: Head, rows: Sequence[Example], names: Sequence[str], title: str, path: Path) -> None:
    """Plot the confusion matrix of a classifier on the examples `rows` as a PNG at `path`.

    `names` are the names of the classes, in the order of the model's logits.
    """
    logits = predictions(model, rows, model.config.pad_token or 0, EVALUATION_BATCH)
    labels = torch.tensor([int(row.target) for row in rows])  # type: ignore[arg-type]
    plot_confusion(confusion_matrix(logits, labels).tolist(), names, title, path)


def _tell(
    train: Table,
    valid: Table,
    rows: Sequence[Example],
    rule: str | None,
    seq_len: int,
    steps: int,
    say: Callable[[str], None],
) -> None:
    """Tell the user what the run will train on and what may be wrong with it, by a call of `say` for each line.

    The first line has the numbers of rows for training and validation. Then come the notes of `train`, how many of its
    rows may have been cut off or are empty, and the notes of `valid`. `rule`, a line about the labels, follows unless
    it is None. If `steps` is below 50, the last line says that so few updates teach little. `rows` are the examples
    made of the table `train`, `seq_len` is the model's number of positions, and `steps` the number of updates.
    """
    say(f"{train.source}: {len(train):,} rows to train on, {len(valid):,} held out")
    for remark in [*remarks(train, rows, seq_len), *valid.notes]:
        say(remark)
    if rule is not None:
        say(rule)
    if steps < FEW_UPDATES:
        say(f"only {steps} updates on {len(train):,} rows: more --epochs or a higher --lr would teach more")
