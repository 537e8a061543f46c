"""Inputs of masked language modelling: which tokens are hidden, and which tokens take their places."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import IGNORE


def mask_tokens(
    tokens: Tensor, generator: torch.Generator, *, mask_token: int, ordinary: Tensor, rate: float = 0.15
) -> tuple[Tensor, Tensor]:
    """Hide a share of the tokens, and return the labels for predicting them.

    Of the chosen tokens, 80 % become `mask_token`, 10 % a random one of `ordinary` and 10 % stay as they are. Only
    tokens among `ordinary` are chosen, and at least one in every row that has one, even at a rate of 0.

    Args:
        tokens: Token ids [B, T], int64.
        generator: Source of the random choice, which this function advances.
        mask_token: Id that stands for a hidden token.
        ordinary: Sorted ids that are not special [n], int64.
        rate: Probability, in [0, 1], with which each token among `ordinary` is chosen.

    Returns:
        (inputs, labels), both [B, T] int64; `tokens` is not changed. The labels are the original ids of all chosen
        tokens, also of those that stay as they are, and -100 elsewhere.

    Raises:
        ValueError: Tokens have another shape, there are no ordinary ids, or the rate lies outside [0, 1].

    Example:
        ```python
        import torch
        from gpt_fast import data

        tokens, ordinary = torch.randint(2, 100, (4, 10)), torch.arange(2, 100)
        inputs, labels = data.mask_tokens(tokens, torch.Generator(), mask_token=0, ordinary=ordinary)
        print(bool((labels != -100).any(1).all()))  # True
        ```

    Note:
        The choice is deterministic: the same state of `generator` gives the same choice.

        Source: Devlin et al. (2018), arXiv:1810.04805, section 3.1.
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
