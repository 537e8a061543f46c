"""Supervised fine-tuning: a new head on a pre-trained trunk, from a labelled table to a run folder."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from .. import GPTConfig, GPTForSequenceClassification
from ..checkpoint import read_config, write_json
from ..data.batches import Batch, classification_batches, classification_input
from ..data.snippets import snippet_table
from ..data.stream import mix
from ..data.tables import Table, read_table
from ..data.tokenizer import encode_documents, load_tokenizer, save_tokenizer
from ..interrupts import Stop
from .distributed import launched_size
from .engine import Engine, EngineSettings
from .evaluation import Metrics, classification_metrics, predictions, regression_metrics
from .loop import Loop, LoopSettings, Progress, intervals
from .plot import plot_task
from .runs import Run, check_run, is_finished, new_run, read_metrics, read_record, special_token
from .schedules import warmup_linear
from .settings import check_same, write_settings

TASKS = ("classification", "regression")
VALID_FRACTION = 0.1
EVALUATION_BATCH = 64
# What may differ when a run is taken up again; all else says what is trained.
FREE = {
    "out", "overwrite", "resume", "device", "accumulate", "compile", "checkpoint_activations", "tensorboard",
    "log_every", "checkpoint_every", "keep_checkpoints", "max_skips",
}  # fmt: skip


@dataclass(frozen=True)
class FinetuneSettings:
    """The options of `gpt-fast finetune`. The defaults are the paper's; a rate that is None is a quarter of
    pre-training's."""

    source: Path  # --from
    out: Path
    train: Path | None = None
    valid: Path | None = None
    text_column: str = "text"
    label_column: str = "label"
    task: str = "classification"
    scratch: bool = False
    epochs: int = 3
    batch_size: int = 32
    lr: float | None = None
    lm_weight: float = 0.5
    accumulate: int = 1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    precision: str = "float32"
    compile: bool = False
    checkpoint_activations: bool = False
    seed: int = 0
    log_every: int | None = None
    checkpoint_every: int = 1000
    keep_checkpoints: int = 3
    max_skips: int = 10
    tensorboard: bool = False
    overwrite: bool = False
    resume: bool = False
    device: str = "cpu"


def finetune(
    settings: FinetuneSettings,
    show: Callable[[Progress], None],
    say: Callable[[str], None],
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Trains a classifier or regressor on `L_task + λ·L_lm` and writes its run folder, with the weights of the best
    validation; returns what goes into run.json."""
    check(settings)
    if settings.resume and is_finished(settings.out):
        say(f"{settings.out}: finished, nothing is left to do")
        return read_record(settings.out)
    with new_run(settings.out, settings.overwrite, settings.resume) as run:
        if run.kept:
            check_same(run.folder, settings, FREE)
        return _finetune(settings, run, show, say, stop or Stop())


def check(settings: FinetuneSettings) -> None:
    """What is wrong whatever the table says shall fail before it is read."""
    if settings.task not in TASKS:
        raise ValueError(f"--task {settings.task}: wanted one of {', '.join(TASKS)}")
    for option, value in (
        ("--epochs", settings.epochs), ("--batch-size", settings.batch_size), ("--accumulate", settings.accumulate),
    ):  # fmt: skip
        if value < 1:
            raise ValueError(f"{option} {value}: wanted at least 1")
    if launched_size() > 1:
        raise ValueError("finetune runs in one process; torchrun is for pretrain")
    EngineSettings.of(settings)
    check_run(settings.source)


def _finetune(
    settings: FinetuneSettings, run: Run, show: Callable[[Progress], None], say: Callable[[str], None], stop: Stop
) -> dict[str, Any]:
    train, valid = read_tables(settings)
    names = label_names(train) if settings.task == "classification" else []
    train_targets, valid_targets = (targets(table, settings.task, names) for table in (train, valid))

    torch.manual_seed(settings.seed)  # the new head's weights
    tokenizer = load_tokenizer(settings.source)
    pretrained_as, _ = read_config(settings.source)
    make = fresh if settings.scratch else GPTForSequenceClassification.from_pretrained
    model = make(
        settings.source,
        num_labels=len(names) or 1,
        problem=settings.task,
        pooling="extract",
        classifier_dropout=0.1,
        # A masked model has not learned to predict the next token, and λ would make it do that above all.
        lm_weight=0.0 if pretrained_as == "GPTForMaskedLM" else settings.lm_weight,
    ).to(settings.device)
    config = model.config
    train_rows, valid_rows = (inputs(tokenizer, table.texts, config) for table in (train, valid))
    cut = sum(len(row) == config.seq_len for row in train_rows) / len(train_rows)
    say(f"{train.source}: {len(train):,} rows to train on, {len(valid):,} held out")
    if cut:
        say(f"{cut:.0%} of the rows fill all {config.seq_len} positions and may have been cut off")
    if names:
        say(f"{len(names)} labels: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}")

    steps = settings.epochs * math.ceil(len(train) / settings.batch_size)
    lr = settings.lr if settings.lr is not None else read_record(settings.source).get("lr", 2.5e-4) / 4
    schedule = partial(warmup_linear, total=steps, warmup=max(1, round(0.002 * steps)))
    if not run.kept:
        write_settings(run.folder, dataclasses.replace(settings, lr=lr))
        save_tokenizer(tokenizer, run.folder / "tokenizer.json")
    loop = Loop(
        Engine(model, lr, EngineSettings.of(settings)),
        RowSource(
            train_rows, train_targets, settings.batch_size, config.pad_token or 0, settings.seed, settings.accumulate
        ),
        partial(validation, model, valid_rows, valid_targets),
        LoopSettings(
            steps,
            lr,
            schedule,
            **intervals(steps, validations=5, log_every=settings.log_every),
            checkpoint_every=settings.checkpoint_every,
            keep=settings.keep_checkpoints,
            max_skips=settings.max_skips,
            tensorboard=settings.tensorboard,
        ),
        run, show, say, stop, better=better, seed=settings.seed, identity=identity(train_rows, train_targets),
    )  # fmt: skip
    if run.kept:
        loop.resume()
    loop.run()
    best = loop.state.best_metrics

    record = {
        "command": "finetune",
        "task": settings.task,
        "from": str(settings.source),
        "scratch": settings.scratch,
        "data": train.source,
        "labels": names,
        "train_rows": len(train),
        "valid_rows": len(valid),
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "lr": lr,
        "lm_weight": config.lm_weight,
        "seed": settings.seed,
        "device": settings.device,
        "torch": torch.__version__,
        "seconds": round(loop.state.seconds, 1),
        "skipped": loop.state.skipped,
        "spikes": loop.state.spike_count,
        "best_step": best["step"],
    }
    record |= {name: value for name, value in best.items() if name.startswith(("valid_", "majority_", "mean_"))}
    GPTForSequenceClassification.from_pretrained(run.folder / "best").save_pretrained(run.folder)
    shutil.rmtree(run.folder / "best")
    draw(read_metrics(run.folder), settings.task, train.source, run.folder / "loss.png")
    write_json(run.folder / "run.json", record)
    return record


def fresh(source: Path, **overrides: Any) -> GPTForSequenceClassification:
    """The model that `from_pretrained` would load, with weights drawn anew."""
    return GPTForSequenceClassification(read_config(source)[1].replace(**overrides))


def better(line: Metrics) -> tuple[float, ...]:
    """Larger is better: accuracy, and of equals the lower loss; or the squared error's negative."""
    if "valid_mse" in line:
        return (-line["valid_mse"],)
    return line["valid_accuracy"], -line["valid_loss"]


def identity(rows: Sequence[list[int]], labels: Tensor) -> dict[str, Any]:
    """Tells whether a run that goes on reads the table that it began with."""
    content = json.dumps([rows, labels.tolist()]).encode()
    return {"rows": len(rows), "crc32": zlib.crc32(content)}


def read_tables(settings: FinetuneSettings) -> tuple[Table, Table]:
    """The two tables that were named; with only one, a seeded tenth of its rows is held out; with none, snippets of the
    standard library."""
    if settings.train is None:
        if settings.valid is not None:
            raise ValueError(f"--valid {settings.valid}: given without --train")
        return snippet_table()
    train = read_table(settings.train, settings.text_column, settings.label_column)
    if settings.valid is not None:
        return train, read_table(settings.valid, settings.text_column, settings.label_column)
    if len(train) < 10:
        raise ValueError(f"{settings.train}: {len(train)} rows are too few to hold some out; give --valid")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(settings.seed)).tolist()
    cut = round(len(train) * VALID_FRACTION)
    return train.rows(sorted(order[cut:])), train.rows(sorted(order[:cut]))


def label_names(table: Table) -> list[str]:
    names = sorted(set(table.labels))
    if len(names) < 2:
        raise ValueError(f"{table.source}: every row has the label {names[0]!r}; wanted two labels or more")
    return names


def targets(table: Table, task: str, names: Sequence[str]) -> Tensor:
    """Labels as indices into `names` `[N]`, or as float32 numbers `[N]` for a regression."""
    if task == "regression":
        return torch.tensor([_number(label, table.source) for label in table.labels])
    index = {name: i for i, name in enumerate(names)}
    unknown = sorted(set(table.labels) - set(index))
    if unknown:
        known = ", ".join(map(repr, names[:12])) + (", …" if len(names) > 12 else "")
        raise ValueError(f"{table.source}: unknown label {unknown[0]!r}; the model was trained on {known}")
    return torch.tensor([index[label] for label in table.labels])


def inputs(tokenizer: Tokenizer, texts: Sequence[str], config: GPTConfig) -> list[list[int]]:
    """`start text extract` for each text."""
    start, extract = special_token(config, "start_token"), special_token(config, "extract_token")
    return [classification_input(ids, config.seq_len, start, extract) for ids in encode_documents(tokenizer, texts)]


@dataclass
class RowSource:
    """The batches of a run as a function of the update: one shuffled pass over the rows after another."""

    rows: Sequence[list[int]]
    labels: Tensor
    batch_size: int
    pad_token: int
    seed: int
    parts: int = 1

    def __call__(self, step: int) -> list[Batch]:
        epoch, place = divmod(step, math.ceil(len(self.rows) / self.batch_size))
        order = self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        parts = [order[i :: self.parts] for i in range(min(self.parts, len(order)))]
        return [
            next(classification_batches([self.rows[i] for i in part], self.labels[part], len(part), self.pad_token))
            for part in parts
        ]

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch) >> 1)
            self._epoch, self._shuffled = epoch, torch.randperm(len(self.rows), generator=generator).tolist()
        return self._shuffled


def score(model: GPTForSequenceClassification, rows: Sequence[list[int]], labels: Tensor) -> Metrics:
    """The metrics of the model's task on `rows` with their `labels`."""
    logits = predictions(model, rows, model.config.pad_token or 0, EVALUATION_BATCH)
    if model.config.problem == "regression":
        return regression_metrics(logits.flatten(), labels)
    return classification_metrics(logits, labels)


def validation(model: GPTForSequenceClassification, rows: Sequence[list[int]], labels: Tensor) -> Metrics:
    measured = score(model, rows, labels)
    baselines = ("majority_", "mean_")
    return {name if name.startswith(baselines) else f"valid_{name}": value for name, value in measured.items()}


def draw(metrics: list[dict[str, float]], task: str, source: str, path: Path) -> None:
    title = f"Fine-tuning: {source}"
    if task == "regression":
        plot_task(metrics, "valid_mse", metrics[-1]["mean_mse"], "mean squared error", title, path)
    else:
        plot_task(metrics, "valid_accuracy", metrics[-1]["majority_accuracy"], "accuracy", title, path)


def _number(label: str, source: str) -> float:
    try:
        value = float(label)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{source}: label {label!r} is not a number, as a regression wants")
    return value
