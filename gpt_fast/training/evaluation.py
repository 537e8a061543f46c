"""Held-out loss and metrics, each beside what a model that ignores its input would reach."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torchmetrics import MeanSquaredError, PearsonCorrCoef
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score

from ..data.batches import Batch, classification_batches
from .distributed import World

Metrics = dict[str, float]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """No dropout and no gradients inside; yields the model's device and restores its mode afterwards."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield next(model.parameters()).device
    model.train(was_training)


def lm_loss(model: nn.Module, batches: Sequence[Batch], world: World | None = None) -> float:
    """Mean loss in nats per predicted token over `batches`, each rank taking its share. All ranks call the model the
    same number of times, as FSDP needs; a rank with less to do repeats a batch that does not count."""
    world = world or World()
    totals = torch.zeros(2, dtype=torch.float64)
    with evaluating(model) as device:
        for first in range(0, len(batches), world.size):
            index = first + world.rank
            batch = batches[index if index < len(batches) else 0].to(device)
            asked = batch.weight if index < len(batches) else 0
            totals += torch.tensor([float(model(**batch.inputs()).loss) * asked, asked], dtype=torch.float64)
    total, count = world.total(totals.to(world.device)).tolist()
    return total / count


def predictions(model: nn.Module, rows: Sequence[list[int]], pad_token: int, batch_size: int) -> Tensor:
    """A classifier's logits for every row `[N, num_labels]`, or a regressor's values `[N]`."""
    logits = []
    with evaluating(model) as device:
        for batch in classification_batches(rows, torch.zeros(len(rows)), batch_size, pad_token):
            batch = batch.to(device)
            logits.append(model(batch.tokens, lengths=batch.lengths).logits.float().cpu())
    return torch.cat(logits)


def classification_metrics(logits: Tensor, labels: Tensor) -> Metrics:
    """Loss, accuracy and macro F1 of `logits` `[N, K]`, and the same two for always answering the commonest label of
    `labels` `[N]`: no constant answer does better on them."""
    N, K = logits.shape
    constant = torch.full_like(labels, int(torch.bincount(labels).argmax()))
    accuracy = MulticlassAccuracy(K, average="micro")
    f1 = MulticlassF1Score(K, average="macro")
    return {
        "loss": float(nn.functional.cross_entropy(logits, labels)),
        "accuracy": float(accuracy(logits, labels)),
        "macro_f1": float(f1(logits, labels)),
        "majority_accuracy": float(accuracy(constant, labels)),
        "majority_macro_f1": float(f1(constant, labels)),
        "examples": N,
    }


def regression_metrics(values: Tensor, targets: Tensor) -> Metrics:
    """Mean squared error and Pearson's correlation of `values` `[N]`, and the error of always answering the mean of
    `targets` `[N]`, which is their variance. Without spread in either the correlation does not exist and is left
    out."""
    metrics = {
        "mse": float(MeanSquaredError()(values, targets)),
        "mean_mse": float(targets.var(correction=0)),
        "examples": float(len(targets)),
    }
    if len(targets) > 1 and values.std() > 0 and targets.std() > 0:
        metrics["pearson"] = float(PearsonCorrCoef()(values, targets))
    return metrics


def perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
