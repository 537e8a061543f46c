"""`nn.TransformerEncoderLayer` and the notes' `TransformerDecoder` on this library's ops.

Both draw a dropout seed for each call of a layer; its sites are 0 (attention), 1, 2 (hidden activation) and 3.
"""

import math
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import _activations, _plain, ops
from ..ops.attention import MAX_HEAD_DIM
from .report import LeftAlone, Patch, Report

_NOTES = ("multihead_attn", "layer_norm1", "ff", "layer_norm2")


_METHODS = ("forward", "_sa_block", "_ff_block")  # of nn.TransformerEncoderLayer, which the fused forward replaces


class Parts(NamedTuple):
    """Submodules of a block, by their roles. `fc`, `activation`, `ff_dropout` and `proj` are the MLP's.

    `norm1` and `dropout1` belong to attention's residual branch, `norm2` and `dropout2` to that of the MLP. `pre_norm`
    is True if each norm comes before its branch.
    """

    attn: Any
    norm1: Any
    norm2: Any
    dropout1: Any
    dropout2: Any
    fc: Any
    activation: Any
    ff_dropout: Any
    proj: Any
    pre_norm: bool


def plan(name: str, module: Any, report: Report) -> list[Patch] | None:
    """Return [patch] for a block to replace, [] for a block that is left alone, or None if `module` is no known block.

    Known blocks are `nn.TransformerEncoderLayer` and any module with the submodules of `reference.TransformerDecoder`.
    A block of the second kind is run on a small input, to compare its outputs. `name` is the path of `module` in the
    model. `report` gets an entry for each submodule, replaced or left alone, or one entry for the whole block if that
    is left alone. A `Patch` holds a module and its new forward. The module itself is not changed.
    """
    forward: Callable
    if isinstance(module, nn.TransformerEncoderLayer):
        changed = [
            name for name in _METHODS if getattr(type(module), name) is not getattr(nn.TransformerEncoderLayer, name)
        ]
        if changed:
            reason: str | None = f"its class has a {changed[0]} of its own"
        else:
            reason = _why_not(_encoder_parts(module))
        parts, forward = _encoder_parts(module), encoder_layer_forward
    elif isinstance(getattr(module, "multihead_attn", None), nn.MultiheadAttention) and _is_notes_block(module):
        parts, forward = _notes_parts(module), notes_block_forward
        reason = _why_not(parts) or _why_another_function(module)
    else:
        return None
    if "forward" in vars(module):
        reason = "has a forward of its own"
    if reason is not None:
        report.left.append(LeftAlone(name, type(module).__name__, reason))
        return []
    prefix = f"{name}." if name else ""
    paths = {id(child): path for path, child in module.named_modules()}
    ff = paths[id(parts.fc)].rpartition(".")[0] or f"{paths[id(parts.fc)]}, {paths[id(parts.proj)]}"
    path = prefix + paths[id(parts.attn)]
    report.note(path, parts.attn, "attention", None)
    report.note(f"{path}.out_proj", parts.attn.out_proj, "linear", _why_no_projection(parts.attn))
    for norm in (parts.norm1, parts.norm2):
        op = "layer_norm" if parts.pre_norm and norm is parts.norm1 else "add_layer_norm"
        report.note(prefix + paths[id(norm)], norm, op, _plain.why_no_norm(norm))
    report.note(prefix + ff, parts.fc, "mlp", _why_no_mlp(parts))
    return [Patch(module, forward, {})]


# ---- the forwards ----------------------------------------------------------------------------------------------------


def encoder_layer_forward(
    self: Any,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Run `self`, an `nn.TransformerEncoderLayer`, on `gpt_fast.ops`: src [B, T, C] → [B, T, C].

    The arguments are the same as in the forward of its class. The masks exclude where they are True or -inf. `src_mask`
    is [T, T] or [B · heads, T, T], and `src_key_padding_mask` is [B, T]. With `is_causal`, `src_mask` is taken to be
    the causal mask and not read. The forward of the class runs instead, with a warning, if the ops do not support the
    call.
    """
    parts = _encoder_parts(self)
    masks, reason = None, _why_not_this(src, parts)
    if reason is None and is_causal and src_mask is None:
        reason = "is_causal without the mask that it describes"
    if reason is None:
        masks, reason = _masks(src, src_mask, src_key_padding_mask, is_causal, parts.attn.num_heads)
    if masks is None:
        _warn(self, reason)
        return _plain.original(
            self, src, src_mask=src_mask, src_key_padding_mask=src_key_padding_mask, is_causal=is_causal
        )
    return _block(src, parts, masks, self.training)


def notes_block_forward(self: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Run `self`, a block like `reference.TransformerDecoder`, on `gpt_fast.ops`: x [B, T, C] → [B, T, C].

    `mask` is [T, T]: bool, True where a token may not attend, or float, -inf there and 0 elsewhere. Without a mask
    every token attends to all. The forward of the block's class runs instead, with a warning, if the ops do not support
    the call.
    """
    parts = _notes_parts(self)
    masks, reason = None, _why_not_this(x, parts)
    if reason is None:
        masks, reason = _masks(x, mask, None, False, parts.attn.num_heads)
    if masks is None:
        _warn(self, reason)
        return _plain.original(self, x, mask)
    return _block(x, parts, masks, self.training)


def _block(x: Tensor, parts: Parts, masks: dict, training: bool) -> Tensor:
    """Return the output [B, T, C] of a block for x [B, T, C]. `parts` holds the block's submodules.

    `masks` holds the keyword arguments `causal`, `mask` and `key_mask` of `ops.attention_qkv`. `training` is the
    block's train flag; if it is True, a dropout seed is drawn. Each dropout has the rate and the train flag of its own
    module.
    """
    seed = ops.new_seed(x.device) if training else None
    if parts.pre_norm:
        branch, p = _attend(_plain.norm(parts.norm1, x), parts, masks, seed)
        normed, x = _plain.add_norm(branch, x, p, parts.norm2, seed, 1)
        branch, p = _mlp(normed, parts, seed)
        return _plain.add(branch, x, p, seed, 3)
    branch, p = _attend(x, parts, masks, seed)
    x, _ = _plain.add_norm(branch, x, p, parts.norm1, seed, 1)
    branch, p = _mlp(x, parts, seed)
    return _plain.add_norm(branch, x, p, parts.norm2, seed, 3)[0]


def _attend(x: Tensor, parts: Parts, masks: dict, seed: Tensor | None) -> tuple[Tensor, float]:
    """Return (branch, p) for x [B, T, C]: attention's output [B, T, C] after its output projection, and a dropout rate.

    The caller computes residual + dropout(branch, p). p is 0 if `parts.dropout1` was applied here. `masks` holds the
    keyword arguments `causal`, `mask` and `key_mask` of `ops.attention_qkv`. `seed` is the dropout seed of the call, or
    None.
    """
    attn = parts.attn
    qkv = ops.linear(x, attn.in_proj_weight, attn.in_proj_bias)
    p = attn.dropout if attn.training else 0.0
    out = ops.attention_qkv(qkv, attn.num_heads, dropout_p=p, seed=seed, site=0, **masks)
    proj = attn.out_proj
    plain = _why_no_projection(attn) is None
    return _plain.dropout(parts.dropout1, ops.linear(out, proj.weight, proj.bias) if plain else proj(out))


def _mlp(x: Tensor, parts: Parts, seed: Tensor | None) -> tuple[Tensor, float]:
    """Return (branch, p): the MLP's output for x, both [B, T, C], and the dropout rate of its residual addition.

    The caller computes residual + dropout(branch, p). p is 0 if `parts.dropout2` was applied here. `seed` is the
    dropout seed of the call, or None.
    """
    if _why_no_mlp(parts) is not None:
        branch = parts.proj(parts.ff_dropout(parts.activation(parts.fc(x))))
    else:
        name = _activation(parts.activation)
        assert name is not None
        p = parts.ff_dropout.p if parts.ff_dropout.training else 0.0
        fc, proj = parts.fc, parts.proj
        branch = ops.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, name, p, seed, site=2)
    return _plain.dropout(parts.dropout2, branch)


# ---- masks -----------------------------------------------------------------------------------------------------------


def _masks(
    x: Tensor, mask: Tensor | None, padding: Tensor | None, is_causal: bool, heads: int
) -> tuple[dict | None, str | None]:
    """Return (masks, None), or (None, reason) if a float mask cannot be translated to bool.

    `masks` holds the keyword arguments `causal`, `mask` and `key_mask` of `ops.attention_qkv` for x [B, T, C]. Its
    tensors are True where a token may attend. The arguments `mask` and `padding`, or None, are `src_mask` and
    `src_key_padding_mask` of `nn.TransformerEncoderLayer`. They exclude where they are True or -inf. A float mask
    cannot be translated if it has other values than 0 and -inf, or if reading it would wait for a GPU or break a graph.
    If `is_causal`, `mask` is known to be the causal one and is not read. A causal mask that is found by its values
    becomes `causal=True`, too. `heads` is the number of heads.
    """
    B, T, _ = x.shape
    allowed = key_mask = None
    if mask is not None and not is_causal:
        allowed = _allowed(mask)
        if allowed is None:
            return None, "a float mask with values other than 0 and -inf, or one that may not be looked at"
        if allowed.dim() == 3:
            allowed = allowed.view(B, heads, T, T)
        if allowed.dim() == 2 and _plain.is_reading_values_cheap(allowed):
            is_causal = torch.equal(allowed, torch.ones_like(allowed).tril())
            allowed = None if is_causal else allowed
    if padding is not None:
        key_mask = _allowed(padding)
        if key_mask is None:
            return None, "a float padding mask with values other than 0 and -inf, or one that may not be looked at"
    return {"causal": is_causal, "mask": allowed, "key_mask": key_mask}, None


def _allowed(mask: Tensor) -> Tensor | None:
    """Return `mask` as a bool mask that is True where attention is allowed, or None if it cannot be translated.

    A bool mask excludes where it is True, a float mask where it is -inf. A float mask cannot be translated if it has
    other values than 0 and -inf. Neither can one on a GPU, in a graph or in a `vmap`, because its values are not read
    there.
    """
    if mask.dtype == torch.bool:
        return ~mask
    if not _plain.is_reading_values_cheap(mask) or not bool(((mask == 0) | (mask == -math.inf)).all()):
        return None
    return mask == 0


# ---- what is served --------------------------------------------------------------------------------------------------


def _encoder_parts(layer: Any) -> Parts:
    """Return the submodules of `layer`, an `nn.TransformerEncoderLayer`, by their roles.

    The fields of `Parts` are attn, norm1, norm2, dropout1, dropout2, fc, activation, ff_dropout, proj and pre_norm.
    """
    return Parts(
        layer.self_attn, layer.norm1, layer.norm2, layer.dropout1, layer.dropout2, layer.linear1, layer.activation,
        layer.dropout, layer.linear2, layer.norm_first,
    )  # fmt: skip


def _notes_parts(block: Any) -> Parts:
    """Return the submodules of a block like `reference.TransformerDecoder` by their roles, with `pre_norm` False.

    The fields of `Parts` are attn, norm1, norm2, dropout1, dropout2, fc, activation, ff_dropout, proj and pre_norm. The
    four modules of `block.ff` are fc, activation, ff_dropout and proj, in this order.
    """
    fc, activation, dropout, proj = block.ff
    return Parts(
        block.multihead_attn, block.layer_norm1, block.layer_norm2, block.dropout1, block.dropout2, fc, activation,
        dropout, proj, False,
    )  # fmt: skip


def _is_notes_block(module: Any) -> bool:
    """Return True if `module` has the submodules of the lecture notes' block, `reference.TransformerDecoder`.

    They are multihead_attn, layer_norm1, layer_norm2, dropout1, dropout2 and ff, an `nn.Sequential` of four modules.
    """
    names = (*_NOTES, "dropout1", "dropout2")
    if not all(isinstance(getattr(module, name, None), nn.Module) for name in names):
        return False
    return isinstance(module.ff, nn.Sequential) and len(module.ff) == 4


def _why_another_function(block: Any) -> str | None:
    """Return why `block` computes something else than `notes_block_forward`, or None if their outputs agree to 1e-2.

    Both run without gradients on one small input with a causal mask, True where a token may not attend. The result is a
    reason, too, if the block raises on this input. The modules run in evaluation mode and get their train flags back.
    """
    attn = block.multihead_attn
    weight = attn.in_proj_weight
    x = torch.linspace(-1, 1, 6 * attn.embed_dim, dtype=weight.dtype, device=weight.device).sin().view(2, 3, -1)
    mask = torch.ones(3, 3, dtype=torch.bool, device=weight.device).triu(1)
    modes = [(module, module.training) for module in block.modules()]
    block.eval()
    try:
        with torch.no_grad():
            wanted = block(x, mask)
            got = notes_block_forward(block, x, mask)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        return f"its forward(x, mask) fails: {error}"
    finally:
        for module, training in modes:
            module.training = training
    same = (
        isinstance(wanted, Tensor) and wanted.shape == got.shape and torch.allclose(got, wanted, atol=1e-2, rtol=1e-2)
    )
    return None if same else "its forward(x, mask) computes something else than the notes' block"


def _why_not(parts: Parts) -> str | None:
    """Return why `gpt_fast.ops` cannot run attention of a block with the submodules `parts`, or None if they can.

    Reasons are an attention module of another class than `nn.MultiheadAttention`, hooks, and a forward set on the
    instance. Others are batch_first=False, other `kdim` or `vdim`, `add_bias_kv`, `add_zero_attn`, and heads wider
    than 256.
    """
    attn = parts.attn
    reason = _plain.why_not_plain(attn, nn.MultiheadAttention)
    if reason is not None:
        return f"its attention {reason}"
    if not attn.batch_first:
        return "its attention has no batch_first=True: given [B, T, C] it attends over the batch"
    if not attn._qkv_same_embed_dim or attn.bias_k is not None or attn.add_zero_attn:
        return "its attention has other widths for keys or values, or extra keys"
    if attn.head_dim > MAX_HEAD_DIM:
        return f"has heads of {attn.head_dim}; expected at most {MAX_HEAD_DIM}"
    return None


def _why_not_this(x: Tensor, parts: Parts) -> str | None:
    """Return why `gpt_fast.ops` cannot run a block with the submodules `parts` on `x`, or None if they can.

    Reasons are a nested `x`, an `x` without three dimensions, and an attention module that the ops cannot read, for
    example one with hooks or batch_first=False.
    """
    if x.is_nested or x.dim() != 3:
        return "the input is nested or has no batch"
    return _why_not(parts)


def _why_no_projection(attn: Any) -> str | None:
    """Return why the output projection of the module `attn` has to be called, or None if an op may read its weights.

    Reasons are a class other than PyTorch's, hooks, and a forward or a weight class of its own.
    """
    reason = _plain.why_not_plain(attn.out_proj, NonDynamicallyQuantizableLinear)
    return None if reason is None else f"{reason}: called through it"


def _why_no_mlp(parts: Parts) -> str | None:
    """Return why the modules of the MLP have to be called one by one, or None if `ops.mlp` can compute them at once.

    `parts` holds the submodules of the block. Reasons are a module that is not plain (another class, hooks, a forward
    of its own), a hidden dropout of 1 and an activation that the ops do not have.
    """
    for module, kind in ((parts.fc, nn.Linear), (parts.ff_dropout, nn.Dropout), (parts.proj, nn.Linear)):
        reason = _plain.why_not_plain(module, kind)
        if reason is not None:
            return f"{reason}: called through it"
    if parts.ff_dropout.p >= 1:
        return "drops everything"
    return None if _activation(parts.activation) is not None else "its activation is no ReLU or GELU"


def _activation(function: Any) -> str | None:
    """Return this library's name of the activation that `function` computes, such as "gelu", or None if it has none.

    `function` is a function of PyTorch, or a module. The result is None, too, for a module that has hooks or a forward
    of its own.
    """
    for name, activation in _activations.ACTIVATIONS.items():
        if activation.is_computed_by(function):
            return name if not isinstance(function, nn.Module) or _plain.is_plain(function, activation.module) else None
    return None


def _warn(module: Any, reason: str | None) -> None:
    """Warn that `module` runs this call by the forward of its class because of `reason`, except in a compiled graph.

    `reason` is never None, but type checkers cannot infer that from the callers.
    """
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"gpt_fast: {type(module).__name__} runs PyTorch's own forward for this call: {reason}", stacklevel=3
        )
