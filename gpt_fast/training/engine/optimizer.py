"""The optimizers, AdamW as the GPT paper sets it up and Muon beside it, and learning-rate schedules.

A schedule is the factor in [0, 1] that multiplies the peak rate at an update counted from 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

SCHEDULES = ("cosine", "wsd", "linear", "constant")


Factors = Mapping[int, float]  # of the learning rate, by the id of a parameter; others have 1


def make_optimizer(
    model: nn.Module,
    lr: float,
    weight_decay: float = 0.01,
    betas: tuple[float, float] = (0.9, 0.999),
    without: Collection[Tensor] = (),
    factors: Factors = MappingProxyType({}),
) -> torch.optim.AdamW:
    """Return fused AdamW for the trainable parameters of `model`, except those in `without`.

    `weight_decay` applies to parameters of two dimensions or more, such as matrices and embeddings, and, as in the GPT
    paper, to no bias and no gain. A weight shared by two modules is one parameter. `factors` maps the `id` of a
    parameter to the factor of its learning rate, 1 where absent. Every parameter group starts with the rate `lr` and
    keeps its factor as "lr_factor", which `Engine.update` multiplies in.
    """
    others = set(map(id, without))
    parameters = [p for p in model.parameters() if p.requires_grad and id(p) not in others]
    matrices = [p for p in parameters if p.ndim >= 2]
    vectors = [p for p in parameters if p.ndim < 2]
    groups = [*_groups(matrices, weight_decay, factors), *_groups(vectors, 0.0, factors)]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def _groups(parameters: Sequence[Tensor], weight_decay: float, factors: Factors) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups, one for each factor of the learning rate among `parameters`.

    A group is a dict with "params", "weight_decay" and "lr_factor". `factors` maps the `id` of a parameter to its
    factor, 1 where absent. Without parameters the result is one empty group.
    """
    found: dict[float, list[Tensor]] = {} if parameters else {1.0: []}
    for parameter in parameters:
        found.setdefault(factors.get(id(parameter), 1.0), []).append(parameter)
    return [{"params": each, "weight_decay": weight_decay, "lr_factor": factor} for factor, each in found.items()]


def layer_factors(model: Any, decay: float) -> dict[int, float]:
    """Return {id of a parameter: factor of its learning rate} for the decoders and the embeddings of a model's trunk.

    The factor is `decay`^(L - i) in decoder i of L, counted from 0, and `decay`^(L + 1) in the embeddings. An output
    layer that shares the embedding's weight has its factor. All other parameters are absent, which stands for 1; for
    `decay` 1 the result is empty. Source: Howard and Ruder (2018), arXiv:1801.06146, section 3.2, with the layers of
    BEiT's code.
    """
    if decay == 1:
        return {}
    L = len(model.trunk.decoders)
    parts = [(decoder, L - i) for i, decoder in enumerate(model.trunk.decoders)]
    factors = {id(p): decay**power for part, power in parts for p in part.parameters()}
    embeddings = [model.trunk.pos_emb, *model.trunk.token_emb.parameters()]
    return factors | {id(p): decay ** (L + 1) for p in embeddings}


def hidden_matrices(model: Any) -> list[Tensor]:
    """Return the trainable parameters of two dimensions inside the decoders of a model's trunk, for Muon to train.

    Embeddings, norms, biases and the output layer are not among them.
    """
    return [p for p in model.trunk.decoders.parameters() if p.requires_grad and p.ndim == 2]


def make_muon(
    matrices: Sequence[Tensor], lr: float, weight_decay: float, factors: Factors = MappingProxyType({})
) -> torch.optim.Optimizer:
    """Return PyTorch's Muon for `matrices`, with its default momentum of 0.95. Weight decay applies to all of them.

    Its steps have the root mean square that AdamW's usually have, so AdamW's learning rate and weight decay are a good
    start. `factors` maps the `id` of a matrix to the factor of its learning rate, 1 where absent. A parameter group
    keeps its factor as "lr_factor"; the caller multiplies it into the rate. Source: Jordan et al. (2024),
    https://kellerjordan.github.io/posts/muon; Liu et al. (2025), arXiv:2502.16982.
    """
    groups = _groups(matrices, weight_decay, factors)
    return torch.optim.Muon(groups, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")


def schedule(name: str, *, total: int, warmup: int, final: float = 0.0, decay: float = 0.2) -> Callable[[int], float]:
    """Return the learning-rate schedule `name`, one of `SCHEDULES`: a function of the update, counted from 0.

    Its value is the factor in [0, 1] of the peak rate. Each schedule rises linearly over `warmup` updates, 1 or more.
    "constant" then stays at 1, and ignores all other arguments. "cosine" falls along half a cosine, and "linear" along
    a line, to `final` at update `total`, the first one after the run. "wsd" (warmup, stable, decay) stays at 1 and
    falls along a line to `final` only over the last share `decay` of all updates; the others ignore `decay`. Raise
    `KeyError` for another name.
    """
    if name == "constant":
        return partial(warmup_constant, warmup=warmup)
    if name == "wsd":
        return partial(warmup_stable_decay, total=total, warmup=warmup, final=final, decay=decay)
    falls = {"cosine": warmup_cosine, "linear": warmup_linear}[name]
    return partial(falls, total=total, warmup=warmup, final=final)


def warmup_cosine(step: int, *, total: int, warmup: int, final: float = 0.0) -> float:
    """Return the factor of the peak rate at update `step`, counted from 0: a cosine schedule with warmup.

    It rises linearly to 1 over `warmup` updates, then falls along half a cosine, which would reach `final` at update
    `total`, the first one after the run.
    """
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def warmup_linear(step: int, *, total: int, warmup: int, final: float = 0.0) -> float:
    """Return the factor of the peak rate at update `step`, counted from 0: a linear schedule with warmup.

    It rises linearly to 1 over `warmup` updates, then falls along a line, which would reach `final` at update `total`,
    the first one after the run.
    """
    if step < warmup:
        return (step + 1) / warmup
    return final + (1 - final) * (total - step) / max(1, total - warmup)


def warmup_constant(step: int, *, warmup: int) -> float:
    """Return the factor of the peak rate at update `step`, counted from 0: a constant schedule with warmup.

    It rises linearly over `warmup` updates, one or more, then stays at 1.
    """
    return min(1.0, (step + 1) / warmup)


def warmup_stable_decay(step: int, *, total: int, warmup: int, final: float = 0.0, decay: float = 0.2) -> float:
    """Return the factor of the peak rate at update `step`, counted from 0: warmup, a stable phase, then decay.

    It rises linearly over `warmup` updates, one or more, and stays at 1. Over the last share `decay` of all `total`
    updates, or over those after the warmup if they are fewer, it falls along a line. The line would reach `final` at
    update `total`, the first one after the run. Source: Hu et al. (2024), arXiv:2404.06395, section 4.
    """
    length = max(1, min(total - warmup, round(decay * total)))
    if step < total - length:
        return warmup_constant(step, warmup=warmup)
    return final + (1 - final) * (total - step) / length if step >= warmup else (step + 1) / warmup
