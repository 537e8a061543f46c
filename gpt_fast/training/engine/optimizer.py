"""The optimizers, AdamW as the GPT paper sets it up and Muon beside it, and learning-rate schedules.

A schedule is the factor in [0, 1] that multiplies the peak rate at an update counted from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

SCHEDULES = ("cosine", "wsd", "linear", "constant")


def make_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    without: Collection[Tensor] = (),
) -> torch.optim.AdamW:
    """Return fused AdamW for all parameters but those in `without`. It decays every matrix and, as in the paper, no
    bias and no gain. A weight shared by two modules is one parameter."""
    others = set(map(id, without))
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def hidden_matrices(model: Any) -> list[Tensor]:
    """Return the trained matrices inside the decoders, which Muon is for: no embedding, norm, bias or output layer."""
    return [p for p in model.trunk.decoders.parameters() if p.requires_grad and p.ndim == 2]


def make_muon(matrices: Sequence[Tensor], lr: float, weight_decay: float) -> torch.optim.Optimizer:
    """Return PyTorch's Muon with its momentum of 0.95.

    Its steps have the root mean square that AdamW's usually have, so that AdamW's rate and decay are a good start.
    Source: Jordan et al. (2024), https://kellerjordan.github.io/posts/muon; Liu et al. (2025), arXiv:2502.16982.
    """
    return torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


def schedule(name: str, *, total: int, warmup: int, final: float = 0.0, decay: float = 0.2) -> Callable[[int], float]:
    """Return the schedule of this name. Each but `constant` falls to `final`; `wsd` does over the last `decay` of all
    updates."""
    if name == "constant":
        return partial(warmup_constant, warmup=warmup)
    if name == "wsd":
        return partial(warmup_stable_decay, total=total, warmup=warmup, final=final, decay=decay)
    falls = {"cosine": warmup_cosine, "linear": warmup_linear}[name]
    return partial(falls, total=total, warmup=warmup, final=final)


def warmup_cosine(step: int, *, total: int, warmup: int, final: float = 0.0) -> float:
    """Rise along a line over `warmup` updates, then fall along half a cosine that would reach `final` at update
    `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmup_linear(step: int, *, total: int, warmup: int, final: float = 0.0) -> float:
    """Rise along a line over `warmup` updates, then fall along one that would reach `final` at update `total`."""
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * (total - step) / max(1, total - warmup)


def warmup_constant(step: int, *, warmup: int) -> float:
    """Rise along a line over `warmup` updates, then stay at 1."""
    return min(1.0, (step + 1) / warmup)


def warmup_stable_decay(step: int, *, total: int, warmup: int, final: float = 0.0, decay: float = 0.2) -> float:
    """Rise along a line over `warmup` updates, stay at 1, and fall over the last `decay` of all updates along a line
    that would reach `final` at update `total`. Source: Hu et al. (2024), arXiv:2404.06395, section 4."""
    length = max(1, min(total - warmup, round(decay * total)))
    if step < total - length:
        return warmup_constant(step, warmup=warmup)
    return final + (1 - final) * (total - step) / length if step >= warmup else (step + 1) / warmup
