"""AdamW as the GPT paper sets it up, and learning-rate schedules.

A schedule is the factor in [0, 1] that multiplies the peak rate at an update counted from 0.
"""

from __future__ import annotations

import math

import torch
from torch import nn


def make_optimizer(
    model: nn.Module, lr: float, weight_decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.AdamW:
    """Fused AdamW that decays every matrix and, as in the paper, no bias and no gain. A weight shared by two modules
    is one parameter."""
    matrices = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def warmup_cosine(step: int, *, total: int, warmup: int, final: float = 0.0) -> float:
    """Rises along a line over `warmup` updates, then falls along half a cosine and would reach `final` at update
    `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmup_linear(step: int, *, total: int, warmup: int) -> float:
    """Rises along a line over `warmup` updates, then falls along one and would reach 0 at update `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return (total - step) / max(1, total - warmup)
