"""The inputs of every topic, by case: random, never zeros, laid out as a model has them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from benchmarks.cases import Case


def _normal(case: "Case", *shape: int, scale: float = 1.0, grad: bool = True) -> Tensor:
    values = torch.randn(shape, device=case.device) * scale
    return values.to(case.dtype).requires_grad_(grad)


def _ids(case: "Case", bound: int, *shape: int) -> Tensor:
    return torch.randint(bound, shape, device=case.device)


def attention(case: "Case") -> tuple:
    """q, k, v [B, H, T, D], laid out [B, T, H, D] as a projection leaves them."""
    B, H, T, D = case.size.values()

    def one() -> Tensor:
        return torch.randn(B, T, H, D, device=case.device).to(case.dtype).transpose(1, 2).requires_grad_()

    return one(), one(), one()


def layer_norm(case: "Case") -> tuple:
    M, N = case.size.values()
    return _normal(case, M, N), _normal(case, N), _normal(case, N)


def add_layer_norm(case: "Case") -> tuple:
    M, N = case.size.values()
    return _normal(case, M, N), _normal(case, M, N), _normal(case, N), _normal(case, N)


def mlp(case: "Case") -> tuple:
    M, C = case.size.values()
    F = 4 * C
    return (
        _normal(case, M, C),
        _normal(case, F, C, scale=C**-0.5),
        _normal(case, F),
        _normal(case, C, F, scale=F**-0.5),
        _normal(case, C),
    )


def linear_cross_entropy(case: "Case") -> tuple:
    N, C, V = case.size.values()
    return _normal(case, N, C), _normal(case, V, C, scale=C**-0.5), _ids(case, V, N)


def embedding(case: "Case") -> tuple:
    B, T, V, C = case.size.values()
    return _ids(case, V, B, T), _normal(case, V, C), _normal(case, T, C)


def decode_attention(case: "Case") -> tuple:
    """Full caches: `lengths` is S in every row."""
    B, H, S, D = case.size.values()
    caches = [_normal(case, B, H, S, D, grad=False) for _ in range(2)]
    return _normal(case, B, H, D, grad=False), *caches, torch.full((B,), S, device=case.device)


def training_step(case: "Case") -> tuple:
    return (_ids(case, case.config.num_tokens, case.size["B"], case.size["T"]),)


def finetuning_step(case: "Case") -> tuple:
    """Rows that are all full, so that every implementation does the same work; two classes."""
    B, T = case.size["B"], case.size["T"]
    return _ids(case, case.config.num_tokens, B, T), _ids(case, 2, B)


def prefill(case: "Case") -> tuple:
    return (_ids(case, case.config.num_tokens, case.size["B"], case.size["T"]),)


def generation(case: "Case") -> tuple:
    return (_ids(case, case.config.num_tokens, case.size["B"], case.size["prompt"]),)
