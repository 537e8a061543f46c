"""Masked language modelling's inputs: which tokens to hide, and behind what."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import IGNORE


def mask_tokens(
    tokens: Tensor, generator: torch.Generator, *, mask_token: int, ordinary: Tensor, rate: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Hides a share `rate` of `tokens` `[B, T]` and returns `(inputs, labels)`, both `[B, T]`, the labels -100 wherever
    nothing is asked.

    Of the chosen tokens 80 % become `mask_token`, 10 % a random one of `ordinary` and 10 % stay as they are. Only
    tokens among `ordinary` `[n]` (the sorted ids that are not special) are chosen, and at least one in every row that
    has one. Dtypes: int64. Deterministic: the same state of `generator` gives the same choice. Raises `ValueError` for
    tokens of another shape, no ordinary ids, or a rate outside [0, 1]. Source: Devlin et al. (2018), arXiv:1810.04805,
    section 3.1.
    """
    if tokens.dim() != 2:
        raise ValueError(f"mask_tokens: tokens has shape {list(tokens.shape)}; expected [B, T]")
    if ordinary.numel() == 0:
        raise ValueError("mask_tokens: ordinary is empty; expected the ids that may be hidden")
    if not 0 <= rate <= 1:
        raise ValueError(f"mask_tokens: rate is {rate}; expected a share in [0, 1]")
    place = torch.searchsorted(ordinary, tokens).clamp_(max=ordinary.numel() - 1)
    eligible = ordinary[place] == tokens
    draw = torch.rand(tokens.shape, generator=generator).masked_fill_(~eligible, 2.0)
    chosen = eligible & ((draw < rate) | (draw == draw.amin(dim=1, keepdim=True)))
    labels = tokens.masked_fill(~chosen, IGNORE)

    fate = torch.rand(tokens.shape, generator=generator)
    random = ordinary[torch.randint(ordinary.numel(), tokens.shape, generator=generator)]
    inputs = torch.where(chosen & (fate < 0.8), mask_token, tokens)
    inputs = torch.where(chosen & (fate >= 0.9), random, inputs)
    return inputs, labels
