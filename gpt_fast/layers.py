"""The layers: `nn.Module`s over the ops, with the parameters and state-dict names of the modules they replace."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from . import _activations, _plain, ops
from .config import check_heads
from .ops import _checks


class LayerNorm(nn.LayerNorm):
    """`nn.LayerNorm` over the last dimension on `gpt_fast.ops.layer_norm`; same constructor, same state dict.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias. x [..., C] → [..., C]. Raises `ValueError` where
    normalized_shape has more than one dimension, and as the op does. Dtypes, precision, determinism, source: the op's.
    """

    def __init__(self, normalized_shape, *args, **kwargs):
        super().__init__(normalized_shape, *args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"gpt_fast.LayerNorm: normalized_shape is {tuple(self.normalized_shape)}; expected one dimension"
            )

    def forward(self, x: Tensor) -> Tensor:
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class SelfAttention(nn.Module):
    """Multi-head self-attention with `nn.MultiheadAttention`'s parameters, on `gpt_fast.ops.attention_qkv`.

    out = out_proj(attention(x in_projᵀ)). x [B, T, C] → [B, T, C]. `dropout` is the dropout of the probabilities. Masks
    and their meaning, dtypes, precision, determinism, errors, source: the op's; besides, `ValueError` where hidden_dim
    does not split into num_heads heads of at most 256. `attend(qkv, num_heads)`, if given, takes the op's place: a
    cache's way to attend.
    """

    def __init__(self, hidden_dim: int, num_heads: int, dropout: float = 0.0, bias: bool = True):
        super().__init__()
        check_heads(hidden_dim, num_heads)
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * hidden_dim, hidden_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * hidden_dim)) if bias else None
        self.out_proj = nn.Linear(hidden_dim, hidden_dim, bias=bias)
        nn.init.xavier_uniform_(self.in_proj_weight)

    def forward(
        self,
        x: Tensor,
        *,
        causal: bool = True,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seed: Tensor | None = None,
        site: int = 0,
        attend: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Tensor:
        # One token at a time PyTorch's product is faster: it does not pack the weight first.
        if attend is not None and x.shape[1] == 1:
            return self.out_proj(attend(F.linear(x, self.in_proj_weight, self.in_proj_bias), self.num_heads))
        qkv = ops.linear(x, self.in_proj_weight, self.in_proj_bias)  # [B, T, 3C]
        if attend is not None:
            return _plain.linear(self.out_proj, attend(qkv, self.num_heads))
        dropout_p = self.dropout if self.training else 0.0
        out = ops.attention_qkv(
            qkv, self.num_heads, causal=causal, lengths=lengths, key_mask=key_mask, mask=mask, cu_seqlens=cu_seqlens,
            dropout_p=dropout_p, seed=seed, site=site,
        )  # fmt: skip
        return _plain.linear(self.out_proj, out)


class MLP(nn.Sequential):
    """Linear, activation, dropout, linear: an `nn.Sequential` of the stock modules, run as one `gpt_fast.ops.mlp`.

    x [B, T, C] → [B, T, C], hidden [B, T, F]. activation: "relu", "gelu" or "gelu_tanh". Where a child is not plain (it
    has hooks, an adapter, a parametrisation) the children are called one after the other. With `drops=False` a plain
    MLP applies no dropout, whatever its flags are. Dtypes, precision, determinism, errors, source: the op's.
    """

    def __init__(self, hidden_dim: int, ff_dim: int, activation: str, dropout: float = 0.0, bias: bool = True):
        for name, size in (("hidden_dim", hidden_dim), ("ff_dim", ff_dim)):
            if not isinstance(size, int) or isinstance(size, bool) or size < 1:
                raise ValueError(f"gpt_fast.MLP: {name} is {size!r}; expected an integer of 1 or more")
        _checks.probability("MLP", "dropout", dropout)
        super().__init__(
            nn.Linear(hidden_dim, ff_dim, bias=bias),
            _activations.find("gpt_fast.MLP", activation).make_module(),
            nn.Dropout(dropout),
            nn.Linear(ff_dim, hidden_dim, bias=bias),
        )
        self.activation = activation

    def forward(self, x: Tensor, seed: Tensor | None = None, site: int = 0, drops: bool = True) -> Tensor:
        if not self._is_plain():
            for module in self:
                x = _plain.linear(module, x) if isinstance(module, nn.Linear) else module(x)
            return x
        children: list[Any] = list(self)
        fc, _, dropout, proj = children
        dropout_p = dropout.p if drops and dropout.training else 0.0
        return ops.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, self.activation, dropout_p, seed, site)

    def _is_plain(self) -> bool:
        """Return True if the children are the stock modules of the constructor, so that one op computes them all."""
        children: list[Any] = list(self)
        if len(children) != 4:
            return False
        fc, activation, dropout, proj = children
        row = _activations.ACTIVATIONS[self.activation]
        return (
            _plain.is_plain(fc, nn.Linear)
            and _plain.is_plain(activation, row.module)
            and row.is_computed_by(activation)
            and _plain.is_plain(dropout, nn.Dropout)
            and dropout.p < 1
            and _plain.is_plain(proj, nn.Linear)
        )


class TransformerDecoder(nn.Module):
    """One block of the notes' GPT: self-attention and a feed-forward network, each with residual and LayerNorm.

    Post-norm (the notes, GPT-1): x = norm1(x + dropout(attn(x))); x = norm2(x + dropout(ff(x))).
    Pre-norm (GPT-2): x = x + dropout(attn(norm1(x))); x = x + dropout(ff(norm2(x))).

    The first four arguments and the state dict are the notes'; `dropout` is that of the two residual branches and,
    unless `ff_dropout` says otherwise, of the hidden activation. A block uses four dropout sites, from `site` on.

    `forward(x, mask)`: x [B, T, C] → [B, T, C]; mask [T, T] bool as the notes have it, True = may not attend; without
    one attention is causal (or, by `causal=False`, sees all). `lengths` [B] or `key_mask` [B, T] (True = real token)
    say what is padding, `cu_seqlens` where the sequences of a packed row begin. `seed` fixes the dropout of this pass;
    without one each call in training draws its own.
    With `carry=True` a pre-norm block leaves its last addition to whoever normalises next, so that both are one pass:
    it returns (x, branch), and the next block takes them as `x` and `branch`.
    The children are called unless they are plain, so that hooks, adapters, parametrisations and other modules in their
    places take effect. The dropout of a branch is its `nn.Dropout`: `dropout1` after attention, `dropout2` after `ff`.
    Dtypes, precision, determinism, source: those of the ops.
    Errors: `ValueError`, as the ops; where hidden_dim does not split into num_heads heads of at most 256.
    """

    def __init__(
        self,
        hidden_dim: int,
        num_heads: int,
        ff_dim: int,
        dropout: float,
        *,
        pre_norm: bool = False,
        activation: str = "relu",
        attention_dropout: float = 0.0,
        ff_dropout: float | None = None,
        bias: bool = True,
        layer_norm_eps: float = 1e-5,
        site: int = 0,
    ):
        super().__init__()
        ff_dropout = dropout if ff_dropout is None else ff_dropout
        for name, p in (("dropout", dropout), ("attention_dropout", attention_dropout), ("ff_dropout", ff_dropout)):
            _checks.probability("TransformerDecoder", name, p)
        self.multihead_attn = SelfAttention(hidden_dim, num_heads, attention_dropout, bias)
        self.layer_norm1 = LayerNorm(hidden_dim, eps=layer_norm_eps, bias=bias)
        self.ff = MLP(hidden_dim, ff_dim, activation, ff_dropout, bias)
        self.layer_norm2 = LayerNorm(hidden_dim, eps=layer_norm_eps, bias=bias)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.pre_norm = pre_norm
        self.site = site

    def is_dropping(self) -> bool:
        """Return True if a dropout with p > 0 is in training mode, so that a pass needs a seed."""
        attention: Any = self.multihead_attn
        while not hasattr(attention, "dropout") and hasattr(attention, "base_layer"):
            attention = attention.base_layer  # inside PEFT's wrapper
        if attention.training and getattr(attention, "dropout", 0) > 0:
            return True
        drops: list[Any] = [self.dropout1, self.dropout2]
        drops += [module for module in self.ff.children() if isinstance(module, nn.Dropout)]
        return any(drop.training and getattr(drop, "p", 0) > 0 for drop in drops)

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        *,
        causal: bool = True,
        lengths: Tensor | None = None,
        key_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        seed: Tensor | None = None,
        site: int | None = None,
        branch: "Branch | None" = None,
        carry: bool = False,
        attend: Callable[[Tensor, int], Tensor] | None = None,
    ) -> "Tensor | tuple[Tensor, Branch]":
        _checks.tensors("TransformerDecoder", x=x)
        site = self.site if site is None else site
        drops = attend is None  # a cache's way to attend means that a text is continued
        if seed is None and drops and self.is_dropping():
            seed = ops.new_seed(x.device)
        masks = {
            "causal": causal, "lengths": lengths, "key_mask": key_mask, "mask": None, "cu_seqlens": cu_seqlens,
            "attend": attend,
        }  # fmt: skip
        if mask is not None:
            if mask.dtype != torch.bool:
                raise ValueError(
                    f"gpt_fast.TransformerDecoder: mask is {mask.dtype}; expected bool, True = may not attend"
                )
            masks |= {"causal": False, "mask": ~mask}
        if self.pre_norm:
            return self._pre_norm(x, branch, carry, masks, seed, site, drops)
        attended, p = _plain.dropout(self.dropout1, self.multihead_attn(x, seed=seed, site=site, **masks), drops)
        x, _ = add_norm(Branch(attended, p, site + 1), x, self.layer_norm1, seed)
        hidden, p = _plain.dropout(self.dropout2, self._feed_forward(x, seed, site + 2, drops), drops)
        return add_norm(Branch(hidden, p, site + 3), x, self.layer_norm2, seed)[0]

    def _pre_norm(
        self,
        x: Tensor,
        branch: "Branch | None",
        carry: bool,
        masks: dict,
        seed: Tensor | None,
        site: int,
        drops: bool,
    ) -> "Tensor | tuple[Tensor, Branch]":
        attends = _plain.is_plain(self.multihead_attn, SelfAttention)
        if branch is None:
            normed = _plain.norm(self.layer_norm1, x, LayerNorm, attends)
        else:
            normed, x = add_norm(branch, x, self.layer_norm1, seed, attends)
        attended, p = _plain.dropout(self.dropout1, self.multihead_attn(normed, seed=seed, site=site, **masks), drops)
        multiplies = _plain.is_plain(self.ff, MLP) and self.ff._is_plain()
        normed, x = add_norm(Branch(attended, p, site + 1), x, self.layer_norm2, seed, multiplies)
        hidden, p = _plain.dropout(self.dropout2, self._feed_forward(normed, seed, site + 2, drops), drops)
        if carry:
            return x, Branch(hidden, p, site + 3)
        return _plain.add(hidden, x, p, seed, site + 3)

    def _feed_forward(self, x: Tensor, seed: Tensor | None, site: int, drops: bool) -> Tensor:
        return self.ff(x, seed, site, drops) if isinstance(self.ff, MLP) else self.ff(x)


class Branch(NamedTuple):
    """Output of a residual branch that is still to be added: x + dropout(hidden), with probability `p` at `site`."""

    hidden: Tensor
    p: float
    site: int


def add_norm(
    branch: Branch, x: Tensor, norm: nn.Module, seed: Tensor | None, product: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (norm(x + dropout(branch)), x + dropout(branch)), in one pass if the norm is plain.

    With `product` the norm's only reader is a product, so that a plain norm returns the dtype that it multiplies.
    """
    return _plain.add_norm(branch.hidden, x, branch.p, norm, seed, branch.site, LayerNorm, product)
