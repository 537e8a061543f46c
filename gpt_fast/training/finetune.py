"""Supervised fine-tuning: a task's head on a pre-trained trunk, from a labelled table to a run folder."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from .._files import write_json
from ..data.batches import Batch
from ..data.stream import mix
from ..data.tables import Table
from ..data.task_inputs import Example, task_batch
from ..data.tokenizer import load_tokenizer, save_tokenizer
from ..heads import GPTForCausalLM, Head
from ..interrupts import Stop
from ..model_folder import read_config
from .engine import randomness
from .engine.distributed import World, settings_of, world
from .engine.optimizer import warmup_linear
from .engine.update import Engine, EngineSettings
from .loop import Loop, LoopSettings, Progress, intervals
from .metrics import Metrics, confusion_matrix, predictions
from .plots import plot_confusion, plot_task
from .runs.folder import (
    Run,
    check_run,
    is_finished,
    new_run,
    read_metrics,
    read_record,
    with_special_tokens,
    write_extra,
)
from .runs.recipes import finetuning_lr
from .runs.resume import SETTINGS, read_settings, take_up, write_settings
from .tasks import (
    EVALUATION_BATCH,
    TaskSettings,
    better,
    examples,
    label_names,
    new_model,
    read_tables,
    remarks,
    score,
    task_settings,
    written_metrics,
)

# What may differ when a run is taken up again; all else says what is trained.
FREE = {
    "out", "overwrite", "resume", "device", "strategy", "accumulate", "compile", "checkpoint_activations",
    "tensorboard", "log_every", "checkpoint_every", "keep_checkpoints", "max_skips",
}  # fmt: skip

FEW_UPDATES = 50  # fewer are told


@dataclass(frozen=True)
class FinetuneSettings:
    """The options of `gpt-fast finetune`. The defaults are the paper's; a rate that is None is, too, for models of the
    published sizes, and a quarter of pre-training's for others. A column that is None is the task's own."""

    source: Path  # --from
    out: Path
    train: Path | None = None
    valid: Path | None = None
    rows: int | None = None
    text_column: str | None = None
    pair_column: str | None = None
    label_column: str | None = None
    task: str = "classification"
    numbers: bool = False
    scratch: bool = False
    epochs: int = 3
    batch_size: int = 32
    lr: float | None = None
    lm_weight: float = 0.5
    accumulate: int = 1
    weight_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.999
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
    strategy: str | None = None


def finetune(
    settings: FinetuneSettings,
    show: Callable[[Progress], None],
    say: Callable[[str], None],
    stop: Stop | None = None,
) -> dict[str, Any]:
    """Trains a task's head on `L_task + λ·L_lm`, or a causal model on answers, and writes a run folder with the weights
    of the best validation; returns what goes into run.json."""
    check(settings)
    if settings.resume and is_finished(settings.out):
        say(f"{settings.out}: finished, nothing is left to do")
        return read_record(settings.out)
    with world(settings.strategy, settings.device) as ranks:
        if not ranks.first:
            out = settings.out.resolve()
            return _finetune(settings, Run(out, out), ranks, _nothing, _nothing, stop or Stop())
        with new_run(settings.out, settings.overwrite, settings.resume) as run:
            return _finetune(settings, run, ranks, show, say, stop or Stop())


def check(settings: FinetuneSettings) -> None:
    """What is wrong whatever the table says shall fail before it is read."""
    task_of(settings)
    for option, value in (
        ("--epochs", settings.epochs),
        ("--batch-size", settings.batch_size),
        ("--accumulate", settings.accumulate),
        ("--rows", settings.rows if settings.rows is not None else 1),
    ):
        if value < 1:
            raise ValueError(f"{option} {value}: wanted at least 1")
    if settings.lr is not None and not settings.lr >= 0:
        raise ValueError(f"--lr {settings.lr}: wanted 0 or more")
    EngineSettings.of(settings)
    check_run(settings.source)


def task_of(settings: FinetuneSettings) -> TaskSettings:
    return task_settings(
        settings.task, settings.text_column, settings.pair_column, settings.label_column, settings.numbers
    )


def _finetune(
    settings: FinetuneSettings,
    run: Run,
    ranks: World,
    show: Callable[[Progress], None],
    say: Callable[[str], None],
    stop: Stop,
) -> dict[str, Any]:
    began = ranks.values(read_settings(run.folder / SETTINGS) if run.kept else {})  # it is gone on with
    settings = take_up(run.folder, began, settings, FREE)
    lr = settings.lr if settings.lr is not None else finetuning_lr(settings.source)
    task = task_of(settings)
    train, valid = read_tables(settings.train, settings.valid, task, settings.seed)
    names = label_names(train, task)
    if settings.rows is not None:
        train = some_rows(train, settings.rows, settings.seed)
    torch.manual_seed(settings.seed)  # the new head's weights
    tokenizer = load_tokenizer(settings.source)
    pretrained_as, _ = read_config(settings.source)
    # A masked model has not learned to predict the next token, and λ would make it do that above all.
    lm_weight = 0.0 if task.writes or pretrained_as == "GPTForMaskedLM" else settings.lm_weight
    make = fresh if settings.scratch else pretrained
    model = new_model(task, make, settings.source, lm_weight, names).to(ranks.device)
    if ranks.rank:
        randomness.seed(settings.seed, ranks.rank)
    rows, valid_rows = (examples(table, task, names, tokenizer, model.config) for table in (train, valid))
    steps = settings.epochs * math.ceil(len(train) / settings.batch_size)
    _tell(train, valid, rows, names, model.config.seq_len, steps, say)

    engine = Engine(model, lr, EngineSettings.of(settings), ranks)
    if ranks.first and not run.kept:
        write_settings(run.folder, dataclasses.replace(settings, lr=lr))
        save_tokenizer(tokenizer, run.folder / "tokenizer.json")
    source = RowSource(
        rows, settings.batch_size, model.config.pad_token or 0, settings.seed, settings.accumulate, task.numbers,
        ranks.rank, ranks.size,
    )  # fmt: skip
    loop = Loop(
        engine,
        source,
        partial(validation, model, valid_rows, task, answer_bytes(valid)),
        LoopSettings(
            steps,
            lr,
            partial(warmup_linear, total=steps, warmup=max(1, round(0.002 * steps))),
            **intervals(steps, validations=5, log_every=settings.log_every),
            checkpoint_every=settings.checkpoint_every,
            keep=settings.keep_checkpoints,
            max_skips=settings.max_skips,
            tensorboard=settings.tensorboard,
        ),
        run,
        show,
        say,
        stop,
        better=partial(better, task),
        seed=settings.seed,
        identity=identity(rows),
    )
    if run.kept or ranks.size > 1:
        loop.resume()
    loop.run()
    best = loop.state.best_metrics

    record = {
        "command": "finetune",
        "task": settings.task,
        "columns": asdict(task),
        "from": str(settings.source),
        "scratch": settings.scratch,
        "data": train.source,
        "labels": names,
        "train_rows": len(train),
        "valid_rows": len(valid),
        "epochs": settings.epochs,
        "batch_size": settings.batch_size,
        "lr": lr,
        "lm_weight": lm_weight,
        "seed": settings.seed,
        "device": settings.device,
        "precision": settings.precision,
        "torch": torch.__version__,
        "seconds": round(loop.state.seconds, 1),
        "skipped": loop.state.skipped,
        "spikes": loop.state.spike_count,
        "best_step": best["step"],
    } | settings_of(ranks)
    record |= {name: value for name, value in best.items() if name.startswith(("valid_", "majority_", "mean_"))}
    if ranks.first:
        finish(run, task, valid, valid_rows, names, tokenizer, record, ranks.device)
    return record


def finish(
    run: Run,
    task: TaskSettings,
    valid: Table,
    rows: Sequence[Example],
    names: Sequence[str],
    tokenizer: Tokenizer,
    record: dict[str, Any],
    device: str,
) -> None:
    """Write the best weights, then run.json, which marks the folder as finished, then the pictures."""
    best = task.task.head.from_pretrained(run.folder / "best").to(device)
    best.save_pretrained(run.folder)
    run.keep()
    if isinstance(best, GPTForCausalLM):
        written = written_metrics(best, rows, tokenizer, valid.labels)
        record |= {f"valid_{name}": value for name, value in written.items()}
    write_json(run.folder / "run.json", record)
    shutil.rmtree(run.folder / "best", ignore_errors=True)
    write_extra(run.folder / "loss.png", partial(draw, run.folder, task, str(record["data"])))
    if task.classifies:
        title = f"Held-out rows: {valid.source}"
        write_extra(run.folder / "confusion.png", partial(draw_confusion, best, rows, names, title))


def pretrained(head: type[Head], source: Path, **overrides: Any) -> Head:
    return _loaded(source, head.from_pretrained, overrides)


def fresh(head: type[Head], source: Path, **overrides: Any) -> Head:
    """The model that `pretrained` would load, with weights drawn anew."""
    return _loaded(source, lambda folder, **changed: head(read_config(folder)[1].replace(**changed)), overrides)


def _loaded(source: Path, load: Callable[..., Head], overrides: dict[str, Any]) -> Head:
    """What `load` makes of a folder; how it pools is said once the token that it may read is there."""
    pooling = {"pooling": overrides.pop("pooling")} if "pooling" in overrides else {}
    model = with_special_tokens(load(source, **overrides), load_tokenizer(source))
    model.config = model.trunk.config = model.config.replace(**pooling)
    return model


def identity(rows: Sequence[Example]) -> dict[str, Any]:
    """Tells whether a run that goes on reads the table that it began with."""
    content = json.dumps([[row.sequences, row.target] for row in rows]).encode()
    return {"rows": len(rows), "crc32": zlib.crc32(content)}


def answer_bytes(table: Table) -> int:
    return sum(len(label.encode(errors="surrogatepass")) for label in table.labels)


def some_rows(table: Table, count: int, seed: int) -> Table:
    """`count` rows of a table, drawn by the seed, in the order they stand in."""
    if count > len(table):
        raise ValueError(f"--rows {count}: {table.source} has {len(table):,} to train on")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(seed))
    return table.rows(sorted(order[:count].tolist()))


@dataclass
class RowSource:
    """The batches of a run as a function of the update: one shuffled pass over the rows after another. `source(step)`
    is this rank's parts of update `step`, as many on every rank; where there are fewer rows than parts some repeat one
    that does not count."""

    rows: Sequence[Example]
    batch_size: int
    pad_token: int
    seed: int
    parts: int = 1
    numbers: bool = False
    rank: int = 0
    ranks: int = 1

    def __call__(self, step: int) -> list[Batch]:
        epoch, place = divmod(step, math.ceil(len(self.rows) / self.batch_size))
        order = self._order(epoch)[place * self.batch_size : (place + 1) * self.batch_size]
        each = min(self.parts, math.ceil(len(order) / self.ranks))
        return [
            self._part(order[i :: each * self.ranks], order[0]) for i in range(self.rank, each * self.ranks, self.ranks)
        ]

    def _part(self, part: Sequence[int], spare: int) -> Batch:
        batch = task_batch([self.rows[i] for i in part or [spare]], self.pad_token, self.numbers)
        return batch if part else batch._replace(weight=0)

    def _order(self, epoch: int) -> list[int]:
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, epoch) >> 1)
            self._epoch, self._shuffled = epoch, torch.randperm(len(self.rows), generator=generator).tolist()
        return self._shuffled


def _nothing(_: object) -> None:
    """Ranks other than the first do not print."""


def validation(model: Head, rows: Sequence[Example], task: TaskSettings, size: int) -> Metrics:
    measured = score(model, rows, task, size)
    baselines = ("majority_", "mean_")
    return {name if name.startswith(baselines) else f"valid_{name}": value for name, value in measured.items()}


def draw(folder: Path, task: TaskSettings, source: str, path: Path) -> None:
    metrics, title = read_metrics(folder), f"Fine-tuning: {source}"
    if task.writes:
        plot_task(metrics, "valid_loss", None, "loss of the answers (nats per token)", title, path)
    elif task.numbers:
        plot_task(metrics, "valid_mse", metrics[-1]["mean_mse"], "mean squared error", title, path)
    else:
        plot_task(metrics, "valid_accuracy", metrics[-1]["majority_accuracy"], "accuracy", title, path)


def draw_confusion(model: Head, rows: Sequence[Example], names: Sequence[str], title: str, path: Path) -> None:
    logits = predictions(model, rows, model.config.pad_token or 0, EVALUATION_BATCH)
    labels = torch.tensor([int(row.target) for row in rows])
    plot_confusion(confusion_matrix(logits, labels).tolist(), names, title, path)


def _tell(
    train: Table,
    valid: Table,
    rows: Sequence[Example],
    names: list[str],
    seq_len: int,
    steps: int,
    say: Callable[[str], None],
) -> None:
    say(f"{train.source}: {len(train):,} rows to train on, {len(valid):,} held out")
    for remark in remarks(train, rows, seq_len):
        say(remark)
    if names:
        say(f"{len(names)} labels: {', '.join(names[:12])}{', …' if len(names) > 12 else ''}")
    if steps < FEW_UPDATES:
        say(f"only {steps} updates on {len(train):,} rows: more --epochs or a higher --lr would teach more")
