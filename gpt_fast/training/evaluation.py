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
from ..data.masking import IGNORED

Metrics = dict[str, float]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[torch.device]:
    """No dropout and no gradients inside; yields the model's device and restores its mode afterwards."""
    was_training = model.training
    model.eval()
    with torch.no_grad():
        yield next(model.parameters()).device
    model.train(was_training)


def lm_loss(model: nn.Module, tokens: Tensor, labels: Tensor, *, causal: bool, batch_size: int) -> float:
    """Mean loss in nats per predicted token over windows `tokens` `[N, T]`; a causal model predicts all but the
    first of each window, a masked one those whose label is not -100."""
    total, count = 0.0, 0
    with evaluating(model) as device:
        for inputs, targets in zip(tokens.split(batch_size), labels.split(batch_size), strict=True):
            batch = Batch(inputs, targets).to(device)
            asked = int((targets[:, 1:] if causal else targets).ne(IGNORED).sum())
            total += float(model(batch.tokens, batch.labels).loss) * asked
            count += asked
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
