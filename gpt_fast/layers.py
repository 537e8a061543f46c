"""The layers: `nn.Module`s on the ops, with the parameters and state-dict names of the modules they replace."""

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
    """`nn.LayerNorm` over the last dimension, on `gpt_fast.ops.layer_norm`.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias. Constructor and state dict are those of `nn.LayerNorm`.

    Args:
        normalized_shape: Size C of the last dimension.
        *args: Further arguments of `nn.LayerNorm` (`eps`, `elementwise_affine`, `bias`).
        **kwargs: The same by name.

    Shape:
        x [..., C] → y [..., C].

    Raises:
        ValueError: `normalized_shape` has more than one dimension, or the op raises it.

    Example:
        ```python
        import torch
        from gpt_fast.layers import LayerNorm

        print(LayerNorm(64)(torch.randn(2, 10, 64)).shape)  # torch.Size([2, 10, 64])
        ```

    Note:
        `gpt_fast.ops.layer_norm` states dtypes, precision, determinism and source.
    """

    def __init__(self, normalized_shape: Any, *args: Any, **kwargs: Any):
        super().__init__(normalized_shape, *args, **kwargs)
        if len(self.normalized_shape) != 1:
            raise ValueError(
                f"gpt_fast.LayerNorm: normalized_shape is {tuple(self.normalized_shape)}; expected one dimension"
            )

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised input, in the dtype of `x`.

        Args:
            x: Input [..., C].

        Returns:
            y [..., C].
        """
        return ops.layer_norm(x, self.weight, self.bias, self.eps)


class SelfAttention(nn.Module):
    """Multi-head self-attention with the parameters of `nn.MultiheadAttention`, on `gpt_fast.ops.attention_qkv`.

    out = out_proj(attention(x in_projᵀ)).

    Args:
        hidden_dim: Width C.
        num_heads: Number of heads. C divides into heads of at most 256.
        dropout: Dropout probability of the attention probabilities.
        bias: Give both projections a bias.

    Shape:
        x [B, T, C] → out [B, T, C].

    Raises:
        ValueError: `hidden_dim` does not split into `num_heads` heads of at most 256, or the op raises it.

    Example:
        ```python
        import torch
        from gpt_fast.layers import SelfAttention

        print(SelfAttention(64, 4)(torch.randn(2, 10, 64)).shape)  # torch.Size([2, 10, 64])
        ```

    Note:
        `gpt_fast.ops.attention_qkv` states dtypes, precision, determinism and source.
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
        """Return self-attention within each sequence.

        A token attends to another only if `causal` and all given masks allow it. The masks have the same dtypes as in
        `gpt_fast.ops.attention_qkv`.

        Args:
            x: Input [B, T, C].
            causal: Let a token attend only to tokens up to its own position.
            lengths: Number of real tokens [B] of each row, for rows that are padded on the right.
            key_mask: Bool [B, T], True for a real token.
            mask: Bool, broadcastable to [B, H, T, T], True where a token may attend.
            cu_seqlens: Bounds [n + 1] of sequences packed into one row.
            seed: Seed of dropout, int64, one element. Without one, dropout in training draws its own.
            site: Number of this dropout, which the caller chooses. Dropouts with the same seed need different numbers
                to get different masks.
            attend: Function of (qkv [B, T, 3C], num_heads) → [B, T, C] that computes attention in place of the op, from
                a key-value cache for example. The masks, `causal` and the dropout then have no effect.

        Returns:
            out [B, T, C].
        """
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
    """Linear, activation, dropout, linear: an `nn.Sequential` of stock modules that runs as one `gpt_fast.ops.mlp`.

    y = dropout(activation(x W1ᵀ + b1)) W2ᵀ + b2.

    Args:
        hidden_dim: Width C.
        ff_dim: Width F of the hidden activation.
        activation: "relu", "gelu" or "gelu_tanh".
        dropout: Dropout probability of the hidden activation, in [0, 1).
        bias: Give both linear layers a bias.

    Shape:
        x [B, T, C] → y [B, T, C], with hidden [B, T, F].

    Raises:
        ValueError: A size is no positive integer, the activation is unknown, `dropout` lies outside [0, 1), or the op
            raises it.

    Example:
        ```python
        import torch
        from gpt_fast.layers import MLP

        print(MLP(64, 256, "gelu")(torch.randn(2, 10, 64)).shape)  # torch.Size([2, 10, 64])
        ```

    Note:
        The children are called one after the other if one of them is not plain (it has hooks, an adapter, a
        parametrisation).

        `gpt_fast.ops.mlp` states dtypes, precision, determinism and source.
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
        """Return the MLP's output: linear, activation, dropout, linear.

        Args:
            x: Input [B, T, C].
            seed: Seed of dropout, int64, one element. Without one, dropout in training draws its own.
            site: Number of this dropout, which the caller chooses. Dropouts with the same seed need different numbers
                to get different masks.
            drops: False switches dropout off, whatever the modules' train flags are. If a child has hooks or another
                class, all children are called, and `seed`, `site` and `drops` have no effect.

        Returns:
            y [B, T, C].
        """
        if not self._is_plain():
            for module in self:
                x = _plain.linear(module, x) if isinstance(module, nn.Linear) else module(x)
            return x
        children: list[Any] = list(self)
        fc, _, dropout, proj = children
        dropout_p = dropout.p if drops and dropout.training else 0.0
        return ops.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, self.activation, dropout_p, seed, site)

    def _is_plain(self) -> bool:
        """Return True if `ops.mlp` may compute the MLP, or False if its children have to be called.

        The MLP must have four children: a linear layer, the configured activation, a dropout with p < 1, and a linear
        layer. Each child must have exactly the class that the constructor chose for it. No child may have hooks, a
        forward set on the instance, or a weight of a tensor class from outside PyTorch.
        """
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
    """One block of a GPT: self-attention and a feed-forward network, each with residual and LayerNorm.

    Post-norm (the lecture notes, GPT-1): x = norm1(x + dropout(attn(x))); x = norm2(x + dropout(ff(x))).

    Pre-norm (GPT-2): x = x + dropout(attn(norm1(x))); x = x + dropout(ff(norm2(x))).

    The first four arguments and the state dict are those of the lecture notes' module.

    Args:
        hidden_dim: Width C.
        num_heads: Number of heads. C divides into heads of at most 256.
        ff_dim: Width F of the hidden activation.
        dropout: Dropout probability of both residual branches and, unless `ff_dropout` is given, of the hidden
            activation.
        pre_norm: Build GPT-2's block.
        activation: "relu", "gelu" or "gelu_tanh".
        attention_dropout: Dropout probability of the attention probabilities.
        ff_dropout: Dropout probability of the hidden activation.
        bias: Give linear layers and norms a bias.
        layer_norm_eps: Positive number that norms add to the variance.
        site: Number of the block's first dropout within a forward pass. A block has four dropouts.

    Shape:
        x [B, T, C] → x [B, T, C].

    Raises:
        ValueError: `hidden_dim` does not split into `num_heads` heads of at most 256, a probability lies outside [0,
            1), or an op raises it.

    Example:
        ```python
        import torch
        from gpt_fast.layers import TransformerDecoder

        block = TransformerDecoder(64, 4, 256, dropout=0.1)
        print(block(torch.randn(2, 10, 64)).shape)  # torch.Size([2, 10, 64])
        ```

    Note:
        The children are called unless they are plain, so that hooks, adapters, parametrisations and other modules in
        their places take effect. The dropout of a branch is its `nn.Dropout`: `dropout1` after attention, `dropout2`
        after `ff`.

        The docstrings of the ops state dtypes, precision, determinism and source.
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
        """Return True if a dropout of the block with p > 0 is in training mode, so that a forward pass needs a seed.

        These are the dropouts of attention, of both residual branches, and among the direct children of `ff`.

        Returns:
            False if none of them is active.
        """
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
        """Return the output of the block.

        Args:
            x: Input [B, T, C].
            mask: Bool [T, T], True where a token may not attend, as in the lecture notes. It takes the place of
                `causal`.
            causal: Let a token attend only to tokens up to its own position. False lets it attend to all.
            lengths: Number of real tokens [B] of each row, for rows that are padded on the right.
            key_mask: Bool [B, T], True for a real token.
            cu_seqlens: Bounds [n + 1] of sequences packed into one row.
            seed: Seed of the dropout of this call. Without one each call in training draws its own.
            site: Number of the block's first dropout; its four dropouts have the numbers `site` to `site + 3`. Dropouts
                with the same seed need different numbers to get different masks. None takes the constructor's `site`.
            branch: Residual branch that the block before returned with `carry=True`. A pre-norm block adds it to `x`
                and normalises in one op. A post-norm block ignores it.
            carry: Let a pre-norm block return its last residual branch and not add it, so that the next norm adds it. A
                post-norm block ignores it.
            attend: Function of (qkv [B, T, 3C], num_heads) → [B, T, C] that computes attention in place of the op, from
                a key-value cache for example. Masks have no effect then, and dropout is off, except in a dropout module
                with hooks or another class.

        Returns:
            x [B, T, C]. A pre-norm block with `carry=True` returns (x, branch), where `branch` is a `Branch` that is
            still to be added.

        Raises:
            ValueError: `mask` is not bool, `x` is no tensor, or an op raises it.
        """
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
        """Return the output [B, T, C] of a pre-norm block for x [B, T, C], or (x, branch) with `carry`.

        The `branch` in the result is the last residual branch, a `Branch` that the caller still has to add to x. The
        argument `branch` is the one that the block before returned, which is added to x first, or None. `masks` holds
        the arguments "causal", "lengths", "key_mask", "mask", "cu_seqlens" and "attend" of `SelfAttention.forward`.
        `seed` and `site`, the number of the block's first dropout, choose the dropout masks.

        `drops` is False if `masks["attend"]` is a function, which computes attention without dropout. Dropout is then
        off in `ff` and both branches as well, except in modules that have hooks or another class than `nn.Dropout`.
        """
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
        """Return the output [B, T, C] of the block's feed-forward module `ff` for x [B, T, C].

        If `ff` is an `MLP` of this library, its dropout mask follows from `seed`, int64 [1], and `site`, the number of
        this dropout. Without a seed a new one is drawn. With `drops=False` nothing is dropped, unless a child of `ff`
        has hooks or another class. Any other module, such as an adapter's wrapper, is called with x alone.
        """
        return self.ff(x, seed, site, drops) if isinstance(self.ff, MLP) else self.ff(x)


class Branch(NamedTuple):
    """Output of a residual branch that is still to be added, as x + dropout(hidden).

    `p` is the dropout probability, and `site` the number of this dropout within a forward pass.
    """

    hidden: Tensor
    p: float
    site: int


def add_norm(
    branch: Branch, x: Tensor, norm: nn.Module, seed: Tensor | None, product: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (norm(x + dropout(branch)), x + dropout(branch)), by one op if the norm is plain.

    A plain norm is exactly a `LayerNorm` of this library without hooks; any other is called. `branch` holds the tensor,
    the dropout probability and the dropout site. `seed`, one int64 element, chooses the mask; None draws a new one.
    `product` is True if only a matrix product reads the first result. Under autocast, a plain norm then rounds a
    float32 result at once to the dtype of that product.
    """
    return _plain.add_norm(branch.hidden, x, branch.p, norm, seed, branch.site, LayerNorm, product)
