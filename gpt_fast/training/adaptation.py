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
    """Raise `ValueError` if --freeze, --class-weights, --lora-rank, --lora-alpha, --folds or --fold cannot be applied.

    `settings` have the values of these options, `task` is the task to fine-tune for, and `config` is the configuration
    of the pre-trained model. No data is read.
    """
    _check_freeze(settings, task, config)
    _check_class_weights(settings, task)
    _check_lora(settings, config)
    _check_folds(settings)


def _check_freeze(settings: FinetuneSettings, task: TaskSettings, config: GPTConfig) -> None:
    """Raise `ValueError` if --freeze is given together with --scratch, or names no part that can be frozen.

    Valid are "trunk", "embeddings" and, as texts, the numbers from 1 to `config.num_layers`, the number of decoders.
    "trunk" is not valid for a `task` that the model answers in text, because no layer would be left to train.
    """
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
    """Freeze the part of `model` that `what`, the value of --freeze, names: its parameters then require no gradient.

    "trunk" is the whole Transformer, embeddings included, with the language model's output layer if there is one.
    "embeddings" are the token and position embeddings. A number n, as a text, is the embeddings and the first n
    decoders.
    """
    modules: list[nn.Module] = [model.trunk.token_emb, *model.trunk.decoders[: int(what) if what.isdigit() else 0]]
    if what == "trunk":
        modules = [model.trunk, *([model.output_layer] if hasattr(model, "output_layer") else [])]
    model.trunk.pos_emb.requires_grad_(False)
    for module in modules:
        module.requires_grad_(False)


def _check_lora(settings: FinetuneSettings, config: GPTConfig) -> None:
    """Raise `ValueError` if --lora-rank cannot be applied, or if --lora-alpha is given without it.

    Without both options, do nothing. The rank may be at most `config.hidden_dim`, and PEFT has to be installed.
    --scratch, --freeze and --strategy fsdp may not be given beside --lora-rank. The pre-trained run has to have a file
    model.safetensors, which is missing if the run trained an adapter. An unfinished run with checkpoints is refused,
    because resuming it would change the file.
    """
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
    """Raise `ValueError` for --fold without --folds or above it, and for --folds without --train or with --valid."""
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
    """Raise `ValueError` if --class-weights is given for a task without classes, or has no valid value.

    Valid are "balanced" and numbers of 0 or more with commas between them. If --labels lists the classes, there has to
    be one number for each; otherwise their number is not checked here.
    """
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
    """Return the weight in the loss of each class, in the order of `names`, for `given`, the value of --class-weights.

    `given` is "balanced", or numbers with commas between them, which are returned. Raise `ValueError` if there are not
    as many numbers as classes. Balanced weights are scikit-learn's: N / (K · rows of the class) over the N training
    examples `rows`, where K counts the classes that have rows. A class without any weighs 1. For a task with a tag for
    each word, tagged words count in place of rows. If a row has a set of classes, a weight is the number of rows
    without the class over the number with it, or 1 if no row has it.
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
    """Raise `ValueError` because `given`, the value of --class-weights, lacks one number for each class in `names`."""
    raise ValueError(
        f"--class-weights {given}: the classes are {', '.join(names[:12])}{', …' if len(names) > 12 else ''}; "
        f"expected {len(names)} numbers in this order"
    )
