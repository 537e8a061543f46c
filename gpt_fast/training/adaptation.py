"""Freezes pre-trained weights for a fine-tuning, and weighs its classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gpt_fast_settings.finetune import FinetuneSettings

from ..config import IGNORE, GPTConfig
from ..data.example_batches import Example
from ..data.labels import number
from ..heads import Head
from .runs import checkpoints
from .runs.adapters import require_peft
from .runs.folder import is_finished
from .tasks import TaskSettings


def check(settings: FinetuneSettings, task: TaskSettings, config: GPTConfig) -> None:
    """Raise `ValueError` for options that the task, the model or another option contradicts. No data is read."""
    _check_freeze(settings, task, config)
    _check_class_weights(settings, task)
    _check_lora(settings, config)
    _check_folds(settings)


def _check_freeze(settings: FinetuneSettings, task: TaskSettings, config: GPTConfig) -> None:
    frozen = settings.freeze
    if frozen is None:
        return
    if settings.scratch:
        raise ValueError(f"--freeze {frozen}: --scratch draws the weights anew; expected one of the two")
    if frozen == "trunk":
        if task.writes:
            raise ValueError(
                f"--freeze trunk: {task.name} has no head of its own to train; expected embeddings or a number"
            )
        return
    L = config.num_layers
    if frozen != "embeddings" and not (frozen.isascii() and frozen.isdigit() and 0 < int(frozen) <= L):
        raise ValueError(
            f"--freeze {frozen}: {settings.source} has {L} decoders; expected trunk, embeddings or 1 to {L}"
        )


def freeze(model: Head, what: str) -> None:
    """Freeze the trunk and an output layer, the embeddings, or the embeddings and so many decoders."""
    modules: list[nn.Module] = [model.trunk.token_emb, *model.trunk.decoders[: int(what) if what.isdigit() else 0]]
    if what == "trunk":
        modules = [model.trunk, *([model.output_layer] if hasattr(model, "output_layer") else [])]
    model.trunk.pos_emb.requires_grad_(False)
    for module in modules:
        module.requires_grad_(False)


def _check_lora(settings: FinetuneSettings, config: GPTConfig) -> None:
    rank, source = settings.lora_rank, settings.source
    if rank is None:
        if settings.lora_alpha is not None:
            raise ValueError(f"--lora-alpha {settings.lora_alpha:g}: no --lora-rank; expected both, or none")
        return
    if rank > config.hidden_dim:
        raise ValueError(f"--lora-rank {rank}: {source} has {config.hidden_dim} dimensions; expected at most as many")
    require_peft(f"--lora-rank {rank}")
    for option, given in (
        ("--scratch", settings.scratch),
        (f"--freeze {settings.freeze}", settings.freeze is not None),
    ):
        if given:
            raise ValueError(
                f"{option}: --lora-rank {rank} trains an adapter of frozen weights; expected one of the two options"
            )
    if settings.strategy == "fsdp":
        raise ValueError(
            f"--strategy fsdp: --lora-rank {rank} trains an adapter, which each rank holds as a whole; expected "
            "--strategy ddp"
        )
    if not (source / "model.safetensors").is_file() or (
        not is_finished(source) and any(checkpoints.newest_first(source / checkpoints.FOLDER))
    ):
        raise ValueError(
            f"--lora-rank {rank}: {source} has no weights of its own that stay; expected a finished run, or an adapter "
            "that gpt-fast convert merged"
        )


def _check_folds(settings: FinetuneSettings) -> None:
    folds, fold = settings.folds, settings.fold
    if folds is None:
        if fold is not None:
            raise ValueError(f"--fold {fold}: no --folds; expected the number of parts, too")
        return
    if fold is not None and fold > folds:
        raise ValueError(f"--fold {fold}: --folds is {folds}; expected 1 to {folds}")
    if settings.train is None or settings.valid is not None:
        raise ValueError(f"--folds {folds}: validates on parts of --train; expected --train FILE without --valid")


def _check_class_weights(settings: FinetuneSettings, task: TaskSettings) -> None:
    given = settings.class_weights
    if given is None:
        return
    if not task.names_classes:
        raise ValueError(f"--class-weights {given}: {task.name} has no classes; leave it out")
    values = [] if given == "balanced" else [number(part.strip()) for part in given.split(",")]
    if any(value is None or value < 0 for value in values):
        raise ValueError(
            f"--class-weights {given}: expected balanced, or numbers of 0 or more with commas between them"
        )
    if given != "balanced" and task.labels and len(values) != len(task.labels):
        _refuse_number(given, task.labels)


def class_weights(given: str, names: Sequence[str], rows: Sequence[Example], task: TaskSettings) -> list[float]:
    """Return the weight of each class: the user's numbers, or N / (K · rows of the class) for "balanced".

    This is scikit-learn's "balanced". K counts the classes that have rows, and a class without any weighs 1. Where a
    row has several labels, the weight is the number of rows without the label over the number with it.
    """
    if given != "balanced":
        weights = [float(part) for part in given.split(",")]
        if len(weights) != len(names):
            _refuse_number(given, names)
        return weights
    if task.kind == "set":
        labels = torch.tensor([row.target for row in rows])
        counts = labels.sum(0).tolist()
        return [(len(rows) - count) / count if count else 1.0 for count in counts]
    targets: Any = [row.tags or [] for row in rows] if task.kind == "tags" else [[row.target] for row in rows]
    found = Counter(label for labels in targets for label in labels if label != IGNORE)
    share = found.total() / len(found)
    return [share / found[i] if found[i] else 1.0 for i in range(len(names))]


def _refuse_number(given: str, names: Sequence[str]) -> None:
    raise ValueError(
        f"--class-weights {given}: the classes are {', '.join(names[:12])}{', …' if len(names) > 12 else ''}; "
        f"expected {len(names)} numbers in this order"
    )
