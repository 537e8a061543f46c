"""OPT, BioGPT, GPT-Neo and ImageGPT of transformers, block by block on this library's ops.

Each model's own code embeds the tokens, builds the mask and calls the blocks. A block gets the mask of its call: None,
a bool mask, or a float mask of 0 and the smallest number. It draws a dropout seed for each call; its sites are 0
(attention), 1 and 3 (branches) and 2 (hidden activation).
"""

import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithCrossAttentions, CausalLMOutputWithPast
from transformers.models.biogpt import modeling_biogpt as biogpt
from transformers.models.gpt_neo import modeling_gpt_neo as gpt_neo
from transformers.models.imagegpt import modeling_imagegpt as imagegpt
from transformers.models.opt import modeling_opt as opt

from ... import _plain, _transforms, ops
from ...ops.attention import MAX_HEAD_DIM
from ..report import LeftAlone, Patch, Report
from . import blocks, losses

_MASKS = "_gpt_fast_masks"  # the attribute of a mask that holds what it was translated to


class Masks(NamedTuple):
    """Masks of one call, as the arguments of `ops.attention` with these names."""

    causal: bool
    key_mask: Tensor | None = None  # [B, S]
    mask: Tensor | None = None  # broadcastable to [B, H, T, S]


class Call(NamedTuple):
    """Arguments that a block passes to its attention and MLP in one call: masks, key-value cache and dropout seed.

    The cache is transformers'. `cache` and `seed` may be None.
    """

    masks: Masks
    cache: Any
    seed: Tensor | None


# ---- the forwards ----------------------------------------------------------------------------------------------------


def opt_layer_forward(
    self: Any, hidden_states: Tensor, attention_mask: Any = None, cache: Any = None, **kwargs: Any
) -> Any:
    """Run `self`, a layer of OPT or BioGPT, on `gpt_fast.ops`: `hidden_states` [B, T, C] → [B, T, C].

    The arguments are the same as in transformers' forward, which runs instead, with a warning, if the ops do not
    support the call. `attention_mask` is transformers' mask of four dimensions, or None. `cache` is transformers'
    key-value cache, which is extended in place. A `past_key_values` in `kwargs` takes its place if both are given.
    """
    given = {"attention_mask": attention_mask, "cache": cache, **kwargs}
    older = kwargs.get("past_key_values")
    reason, masks = _masks_of(self, self.self_attn, hidden_states, attention_mask, cache if older is None else older)
    rates = (self.self_attn.dropout, self.dropout, getattr(self, "activation_dropout", 0.0))
    reason = reason or _why_unknown(kwargs, ("use_cache", "position_ids", "past_key_values", "output_hidden_states"))
    if masks is None or reason is not None or max(rates) >= 1:
        reason = reason or "it drops everything"
        return _as_transformers_has_it(self, reason, hidden_states, **given)
    call = Call(masks, cache if older is None else older, _seed(self, rates, hidden_states))
    return _checkpointed(self, _opt_layer, hidden_states, call)


def opt_attention_forward(self: Any, *args: Any, gpt_fast_call: Any = None, **kwargs: Any) -> Any:
    """Run `self`, attention of OPT or BioGPT, on `gpt_fast.ops`: hidden states [B, T, C] → (output [B, T, C], None).

    The output projection is included, and None takes the place of the attention probabilities. `gpt_fast_call` is the
    `Call` (masks, cache, seed) that the layer around the attention passes. Without one the forward of the class runs.
    """
    if gpt_fast_call is None:
        return _plain.original(self, *args, **kwargs)
    return _opt_attention(self, args[0], gpt_fast_call), None


def gpt_neo_block_forward(
    self: Any, hidden_states: Tensor, layer_past: Any = None, attention_mask: Any = None, **kwargs: Any
) -> Any:
    """Run `self`, a block of GPT-Neo, on `gpt_fast.ops`: `hidden_states` [B, T, C] → (hidden states [B, T, C], None).

    None takes the place of the attention probabilities, which are never stored. `layer_past` is transformers' cache of
    keys and values, which is extended in place. `attention_mask` is transformers' mask of four dimensions, or None. A
    call that the ops do not support runs transformers' own forward, with a warning.
    """
    attn = self.attn.attention
    reason, masks = _masks_of(self, attn, hidden_states, attention_mask, layer_past)
    reason = reason or _why_unknown(kwargs, ("use_cache",)) or _why_called(attn, self.attn)
    if masks is None or reason is not None:
        given = {"layer_past": layer_past, "attention_mask": attention_mask, **kwargs}
        return _as_transformers_has_it(self, reason, hidden_states, **given)
    call = Call(masks, layer_past, _seed(self, (attn.attn_dropout.p, attn.resid_dropout.p), hidden_states))
    return _checkpointed(self, _gpt_neo_block, hidden_states, call), None


def imagegpt_block_forward(
    self: Any, hidden_states: Tensor, layer_past: Any = None, attention_mask: Any = None, *args: Any, **kwargs: Any
) -> Any:
    """Run `self`, a block of ImageGPT, on `gpt_fast.ops`: `hidden_states` [B, T, C] → (hidden states [B, T, C], None).

    None takes the place of the attention probabilities, which are never stored. `layer_past` is transformers' cache of
    keys and values, which is extended in place. `attention_mask` is transformers' mask of four dimensions, or None. A
    call that the ops do not support, such as one with an encoder's states, runs transformers' own forward, with a
    warning.
    """
    reason, masks = _masks_of(self, self.attn, hidden_states, attention_mask, layer_past)
    if any(value is not None for value in args):
        reason = "it is given the states of an encoder"
    reason = reason or _why_unknown(kwargs, ("use_cache",)) or _why_called(self.attn)
    if masks is None or reason is not None:
        return _as_transformers_has_it(self, reason, hidden_states, layer_past, attention_mask, *args, **kwargs)
    rates = (self.attn.attn_dropout.p, self.attn.resid_dropout.p)
    call = Call(masks, layer_past, _seed(self, rates, hidden_states))
    return _checkpointed(self, _imagegpt_block, hidden_states, call), None


def opt_lm_head_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `self`, an `OPTForCausalLM`, with the arguments and the output of the forward of its class.

    The call may have an additional argument `logits`. False computes the loss from hidden states, and the logits when
    code reads them. True runs the forward of the class. The default is False in training and True in evaluation. The
    forward of the class also runs, whatever `logits` is, if the call has no labels or asks for a tuple.
    """
    return losses.lm_head(self, _OPT, args, kwargs)


def biogpt_lm_head_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `self`, a `BioGptForCausalLM`, with the arguments and the output of the forward of its class.

    The call may have an additional argument `logits`. False computes the loss from hidden states, and the logits when
    code reads them. True runs the forward of the class. The default is False in training and True in evaluation. The
    forward of the class also runs, whatever `logits` is, if the call has no labels or asks for a tuple.
    """
    return losses.lm_head(self, _BIOGPT, args, kwargs)


def gpt_neo_lm_head_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `self`, a `GPTNeoForCausalLM`, with the arguments and the output of the forward of its class.

    The call may have an additional argument `logits`. False computes the loss from hidden states, and the logits when
    code reads them. True runs the forward of the class. The default is False in training and True in evaluation. The
    forward of the class also runs, whatever `logits` is, if the call has no labels or asks for a tuple.
    """
    return losses.lm_head(self, _GPT_NEO, args, kwargs)


HEADS = (_OPT, _BIOGPT, _GPT_NEO) = losses.with_signatures((
    losses.Head(opt.OPTForCausalLM, opt_lm_head_forward, CausalLMOutputWithPast, "model.decoder"),
    losses.Head(biogpt.BioGptForCausalLM, biogpt_lm_head_forward, CausalLMOutputWithCrossAttentions, "biogpt",
                "output_projection"),
    losses.Head(gpt_neo.GPTNeoForCausalLM, gpt_neo_lm_head_forward, CausalLMOutputWithPast),
))  # fmt: skip


def norm_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `self`, an `nn.LayerNorm`, on `ops.layer_norm`: x [..., C] → [..., C].

    A call with anything but x as its one positional argument runs the forward of the class.
    """
    if len(args) != 1 or kwargs:
        return _plain.original(self, *args, **kwargs)
    return ops.layer_norm(args[0], self.weight, self.bias, self.eps)


# ---- blocks ----------------------------------------------------------------------------------------------------------


def _opt_layer(self: Any, x: Tensor, call: Call) -> Tensor:
    """Return the output [B, T, C] of `self`, a layer of OPT or BioGPT, for x [B, T, C].

    `call` holds the masks, the cache and the dropout seed. The residual additions are included. The cache gets the new
    keys and values.
    """
    p = self.dropout if self.training else 0.0
    shape = x.shape
    pre_norm = getattr(self, "do_layer_norm_before", True)  # BioGPT has no such option
    normed = _plain.norm(self.self_attn_layer_norm, x) if pre_norm else x
    if _plain.is_plain(self.self_attn, type(self.self_attn)):
        branch = _opt_attention(self.self_attn, normed, call)
    else:
        branch = self.self_attn(normed, gpt_fast_call=call)[0]
    if pre_norm:
        normed, x = _plain.add_norm(branch, x, p, self.final_layer_norm, call.seed, 1)
        return _plain.add(_opt_mlp(self, normed, call), x, p, call.seed, 3).view(shape)
    x, _ = _plain.add_norm(branch, x, p, self.self_attn_layer_norm, call.seed, 1)
    return _plain.add_norm(_opt_mlp(self, x, call), x, p, self.final_layer_norm, call.seed, 3)[0]


def _opt_attention(attn: Any, x: Tensor, call: Call) -> Tensor:
    """Return the output [B, T, C] of `attn`, attention of OPT or BioGPT, after its output projection, for x [B, T, C].

    `call` holds the masks, the cache and the dropout seed. The cache gets the new keys and values. The dropout of the
    output is left to the caller.
    """
    p = attn.dropout if attn.training else 0.0
    out = _attend(attn, (attn.q_proj, attn.k_proj, attn.v_proj), x, call, attn.layer_idx, attn.scaling, p)
    return _linear(attn.out_proj, out)


def _opt_mlp(layer: Any, x: Tensor, call: Call) -> Tensor:
    """Return the output [B, T, C] of the MLP in a layer of OPT or BioGPT for x [B, T, C] and the seed in `call`.

    The dropout of the hidden activation is included, and that of the output is left to the caller.
    """
    p = getattr(layer, "activation_dropout", 0.0) if layer.training else 0.0
    name = blocks.activation_of(layer.activation_fn)
    fc, proj = layer.fc1, layer.fc2
    if blocks.has_few_rows(x) or name is None or not (_is_linear(fc) and _is_linear(proj)):
        hidden = layer.activation_fn(fc(x))
        return proj(hidden if p == 0 else nn.functional.dropout(hidden, p))
    return ops.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, name, p, call.seed, site=2)


def _gpt_neo_block(self: Any, x: Tensor, call: Call) -> Tensor:
    """Return the output [B, T, C] of `self`, a block of GPT-Neo, for x [B, T, C].

    `call` holds the masks, the cache and the dropout seed. The residual additions are included. The cache gets the new
    keys and values. A block of type "local" attends to the last `window_size` keys.
    """
    attn = self.attn.attention
    p = attn.attn_dropout.p if attn.attn_dropout.training else 0.0
    window = attn.config.window_size if attn.attention_type == "local" else None
    projections = (attn.q_proj, attn.k_proj, attn.v_proj)
    out = _attend(attn, projections, _plain.norm(self.ln_1, x), call, attn.layer_id, 1.0, p, window)
    branch, p = _plain.dropout(attn.resid_dropout, _linear(attn.out_proj, out))
    normed, x = _plain.add_norm(branch, x, p, self.ln_2, call.seed, 1)
    mlp = self.mlp
    name = blocks.activation_of(mlp.act)
    if not _plain.is_plain(mlp, gpt_neo.GPTNeoMLP):
        return x + mlp(normed)
    if blocks.has_few_rows(x) or name is None or not (_is_linear(mlp.c_fc) and _is_linear(mlp.c_proj)):
        branch = mlp.c_proj(mlp.act(mlp.c_fc(normed)))
    else:
        fc, proj = mlp.c_fc, mlp.c_proj
        branch = ops.mlp(normed, fc.weight, fc.bias, proj.weight, proj.bias, name)
    branch, p = _plain.dropout(mlp.dropout, branch)
    return _plain.add(branch, x, p, call.seed, 3)


def _imagegpt_block(self: Any, x: Tensor, call: Call) -> Tensor:
    """Return the output [B, T, C] of `self`, a block of ImageGPT, for x [B, T, C].

    `call` holds the masks, the cache and the dropout seed. The residual additions are included. The cache gets the new
    keys and values. The norms are called, because they divide by the root mean square, for which there is no op.
    """
    attn = self.attn
    p = attn.attn_dropout.p if attn.attn_dropout.training else 0.0
    scale = attn.head_dim**-0.5 if attn.scale_attn_weights else 1.0
    scale = scale / (attn.layer_idx + 1) if attn.scale_attn_by_inverse_layer_idx else scale
    out = _attend(attn, (attn.c_attn,), self.ln_1(x), call, attn.layer_idx, scale, p)
    branch, p = _plain.dropout(attn.resid_dropout, blocks.project(attn.c_proj, out))
    x = _plain.add(branch, x, p, call.seed, 1)
    branch, p = blocks.mlp_branch(self.mlp, imagegpt.ImageGPTMLP, self.ln_2(x))
    return _plain.add(branch, x, p, call.seed, 3)


def _attend(
    attn: Any, projections: tuple, x: Tensor, call: Call, index: int, scale: float, p: float, window: int | None = None
) -> Tensor:
    """Return the merged heads [B, T, C] of attention over x [B, T, C] and the cached keys of layer `index`.

    `attn` is the attention module. Its output projection is left to the caller. `projections` are the layers of
    queries, keys and values, or one layer for all three. `call` holds the masks, the cache and the dropout seed; the
    cache gets the new keys and values. `scale` multiplies the scores, and `p` is the dropout probability of the
    attention probabilities. A query attends only to the last `window` keys up to and including the key at the query's
    position. None sets no such limit.
    """
    if len(projections) == 1:
        qkv = blocks.project(projections[0], x).unflatten(2, (3, attn.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
    else:
        q, k, v = (_linear(one, x).unflatten(2, (attn.num_heads, -1)).transpose(1, 2) for one in projections)
    if call.cache is not None:
        k, v = call.cache.update(k, v, index)
    causal, key_mask, mask = call.masks
    out = ops.attention(
        q, k, v, causal=causal, key_mask=key_mask, mask=mask, window=window, dropout_p=p, seed=call.seed, scale=scale
    )
    return out.transpose(1, 2).flatten(2)


def _linear(layer: Any, x: Tensor) -> Tensor:
    """Return layer(x) for x [B, T, C], either by `ops.linear` or by a call of `layer`.

    `ops.linear` computes it if `layer` is an `nn.Linear` without hooks, and x has at least 32 rows B T or a graph is
    being compiled. In all other cases `layer` is called.
    """
    return layer(x) if blocks.has_few_rows(x) else _plain.linear(layer, x)


def _is_linear(layer: Any) -> bool:
    """Return True if `layer` is an `nn.Linear` without hooks, whose parameters may be read directly."""
    return _plain.is_plain(layer, nn.Linear)


def _seed(block: Any, rates: tuple[float, ...], x: Tensor) -> Tensor | None:
    """Return a new dropout seed on the device of x if the block trains and one of `rates` is above 0, else None."""
    return ops.new_seed(x.device) if block.training and max(rates) > 0 else None


def _checkpointed(block: Any, function: Callable, x: Tensor, call: Call) -> Tensor:
    """Return function(block, x, call), under gradient checkpointing if the block has it switched on and trains.

    `function` is `_opt_layer`, `_gpt_neo_block` or `_imagegpt_block`. In backward a checkpointed block runs again, as
    transformers' own blocks do.
    """
    if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
        return block._gradient_checkpointing_func(functools.partial(function, block, call=call), x)
    return function(block, x, call)


# ---- masks, and what is left to transformers -------------------------------------------------------------------------


def _masks_of(block: Any, attn: Any, x: Tensor, mask: Any, cache: Any) -> tuple[str | None, Masks | None]:
    """Return (None, masks) for a call of `block`, or (reason, None) if transformers has to run the call.

    `attn` is the block's attention, x [B, T, C] its input, `mask` transformers' attention mask (None or
    [B or 1, H or 1, T or 1, S]) and `cache` transformers' cache or None. `masks` holds causal, key_mask [B, S] and
    mask, as `ops.attention` takes them. Without a mask attention is causal. Outside of graphs the result is also stored
    as an attribute of the tensor `mask`, for the other blocks of the pass.

    Reasons in the configuration are output_attentions=True, is_causal=False, and another attention implementation than
    sdpa or eager. Others are a cache that is no `DynamicCache` or comes under gradient checkpointing, several queries
    after cached keys without a mask, and a mask of another shape or with other values.
    """
    config = attn.config
    if getattr(config, "output_attentions", False):
        return "output_attentions=True asks for the probabilities, which are never stored", None
    has_own_mask = hasattr(attn, "bias")  # GPT-Neo and ImageGPT are causal whatever the mask says
    if not has_own_mask and config._attn_implementation not in ("sdpa", "eager"):
        return f"its attention implementation is {config._attn_implementation}", None
    if not has_own_mask and not getattr(config, "is_causal", True):
        return "config.is_causal is False", None
    past = 0
    if cache is not None:
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return f"a {type(cache).__name__} as cache", None
        if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
            return "a cache under gradient checkpointing", None
        past = cache.get_seq_length(attn.layer_id if isinstance(attn, gpt_neo.GPTNeoSelfAttention) else attn.layer_idx)
    T = x.shape[1]
    S = past + T
    if mask is None:
        if T not in (1, S) and not has_own_mask:
            return "several queries and older keys without a mask", None
        return None, Masks(causal=True)
    if not isinstance(mask, Tensor) or mask.dim() != 4 or mask.shape[-1] != S or mask.shape[-2] not in (1, T):
        return f"attention_mask has shape {list(getattr(mask, 'shape', ()))} with {T} queries and {S} keys", None
    held = None if _transforms.is_recording() else getattr(mask, _MASKS, None)
    if held is not None and held[0] == (_plain.version(mask), has_own_mask):
        return None, held[1]
    reason, masks = _translated(mask, T, S, has_own_mask)
    if masks is not None and not _transforms.is_recording():
        setattr(mask, _MASKS, ((_plain.version(mask), has_own_mask), masks))  # all blocks get the same mask
    return reason, masks


def _translated(mask: Tensor, T: int, S: int, causal: bool) -> tuple[str | None, Masks | None]:
    """Return (None, masks), the `Masks` for an attention mask, or (reason, None) if transformers has to run the call.

    `mask` is [B or 1, H or 1, T or 1, S], with T queries and S keys: a bool mask, True where attention is allowed, or a
    float mask of 0 and the smallest number. A float mask is refused if it holds other values, or if a graph is being
    recorded or a `vmap` hides them. If `causal`, later keys are masked as well. A mask on the CPU that only hides later
    keys and padding becomes `causal` and a `key_mask`, which is cheaper.
    """
    if mask.dtype == torch.bool:
        allowed = mask
    else:
        if _transforms.is_recording() or _transforms.is_batched(mask):
            return "a float mask, whose values a graph does not know: use attn_implementation='sdpa'", None
        lowest = torch.finfo(mask.dtype).min
        if not bool(((mask == 0) | (mask <= lowest)).all()):
            return "a float mask with values other than 0 and the smallest number", None
        allowed = mask == 0
    if not _plain.is_reading_values_cheap(allowed) or allowed.shape[1] != 1:
        return None, Masks(causal, mask=allowed)
    # A mask is cheaper for the kernel as causal and key_mask, where it is that.
    earlier = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    keys = allowed[:, 0, -1]  # [B, S]: the last query may attend to every key that is no padding
    if torch.equal(allowed & earlier, (keys[:, None, None] & earlier).expand(allowed.shape[0], 1, T, S)) and (
        causal or not bool((allowed & ~earlier).any())
    ):
        every = bool(keys.all())
        return None, Masks(causal=True, key_mask=None if every else keys.contiguous())
    return None, Masks(causal, mask=allowed)


def _why_unknown(options: dict, known: tuple[str, ...]) -> str | None:
    """Return which `options` of a call are not among the `known` names, such as "head_mask given", or None if all are.

    `options` maps names to values. Values None and False do not count.
    """
    extra = sorted(name for name, value in options.items() if name not in known and value not in (None, False))
    return f"{', '.join(extra)} given" if extra else None


def _why_called(attn: Any, *around: Any) -> str | None:
    """Return why `attn` or one of the modules `around` it has to be called, or None if ops may replace these calls.

    `attn` is the attention module, and `around` are the modules inside the block that contain it. Reasons are hooks or
    a forward set on one of them, and an `attn.attn_dropout` that is no `nn.Dropout`, has hooks or drops everything.
    """
    drop = attn.attn_dropout
    if _plain.class_of(drop) is not nn.Dropout or _plain.is_hooked(drop) or drop.p >= 1:
        return "its attention dropout is another module, has hooks or drops everything"
    if any(_plain.is_hooked(module) or "forward" in vars(module) for module in (attn, *around)):
        return "its attention has hooks or a forward of its own"
    return None


def _as_transformers_has_it(block: Any, reason: str | None, *args: Any, **kwargs: Any) -> Any:
    """Return the result of the forward that transformers defines for the block's class, called with the arguments.

    Warn that the call runs this way because of `reason`, except in a compiled graph. `reason` is never None, but type
    checkers cannot infer that from the callers.
    """
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"gpt_fast: {type(block).__name__} runs transformers' own forward for this call: {reason}", stacklevel=3
        )
    return _plain.original(block, *args, **kwargs)


# ---- what is served --------------------------------------------------------------------------------------------------


class _Family(NamedTuple):
    """The classes, attribute names and new forward of one of the four models."""

    trunk: Any
    block: Any
    forward: Callable
    layers: str  # path of the list of blocks in the trunk
    last_norm: str
    tables: tuple[str, ...]


_FAMILIES = (
    _Family(opt.OPTDecoder, opt.OPTDecoderLayer, opt_layer_forward, "layers", "final_layer_norm",
            ("embed_tokens", "embed_positions")),
    _Family(biogpt.BioGptModel, biogpt.BioGptDecoderLayer, opt_layer_forward, "layers", "layer_norm",
            ("embed_tokens", "embed_positions")),
    _Family(gpt_neo.GPTNeoModel, gpt_neo.GPTNeoBlock, gpt_neo_block_forward, "h", "ln_f", ("wte", "wpe")),
    _Family(imagegpt.ImageGPTModel, imagegpt.ImageGPTBlock, imagegpt_block_forward, "h", "ln_f", ("wte", "wpe")),
)  # fmt: skip
_ATTENTIONS = {
    opt.OPTDecoderLayer: opt.OPTAttention,
    biogpt.BioGptDecoderLayer: biogpt.BioGptAttention,
    gpt_neo.GPTNeoBlock: gpt_neo.GPTNeoSelfAttention,
    imagegpt.ImageGPTBlock: imagegpt.ImageGPTAttention,
}


def plan(name: str, module: Any, report: Report, why_foreign: Callable) -> list[Patch] | None:
    """Return the patches of `module` and its blocks if it is a trunk of OPT, BioGPT, GPT-Neo or ImageGPT, else None.

    A trunk is the model without its head. `name` is the path of `module` in the whole model. For a trunk `report` gets
    an entry for each module that is replaced or left alone. For an `ImageGPTForCausalImageModeling`, a model with its
    head, `report` gets an entry for the output layer, and the result is None. A `Patch` holds a module and its new
    forward. `why_foreign(module, kind, label="")` returns why a call of the module does not run the forward of the
    class `kind`, with `label` in front, or None if it does.
    """
    if isinstance(module, imagegpt.ImageGPTForCausalImageModeling):
        reason = "its loss is computed from the logits, by the model's own forward"
        report.note(f"{name}.lm_head" if name else "lm_head", module.lm_head, "linear_cross_entropy", reason)
    for family in _FAMILIES:
        if isinstance(module, family.trunk):
            return _plan_trunk(name, module, report, family, why_foreign)
    return None


def _plan_trunk(name: str, trunk: Any, report: Report, family: _Family, why_foreign: Callable) -> list[Patch]:
    """Return the patches of a trunk (a model without its head), its blocks and its last norm.

    A `Patch` holds a module and its new forward. The patch of the trunk has no forward, so the trunk keeps the forward
    of its class. This patch marks the trunk as accelerated, and a second call of `accelerate` skips the trunk. A block
    that does not fit gets no patch, and `report.left` gets its path, class and reason. `name` is the path of `trunk` in
    the whole model. `family` holds classes and attribute names of the trunk, and the new forward of its blocks.
    `report` gets an entry for each module. `why_foreign(module, kind, label="")` returns why a call of the module does
    not run the forward of the class `kind`, or None if it does.
    """
    prefix = f"{name}." if name else ""
    patches = [Patch(trunk, None, {})]  # marks it as seen
    for path in family.tables:
        table = getattr(trunk, path)
        report.note(prefix + path, table, "embedding", "is gathered and added by the model's own forward")
    for index, block in enumerate(getattr(trunk, family.layers)):
        path = f"{prefix}{family.layers}.{index}"
        reason = why_foreign(block, family.block) or _why_no_attention(block, family, why_foreign)
        if reason is not None:
            report.left.append(LeftAlone(path, type(block).__name__, reason))
            continue
        patches.append(Patch(block, family.forward, {}))
        if family.forward is opt_layer_forward:
            patches.append(Patch(block.self_attn, opt_attention_forward, {}))
        _note_block(path, block, report)
    last = getattr(trunk, family.last_norm)
    if last is not None:
        reason = _why_no_norm(last)
        report.note(prefix + family.last_norm, last, "layer_norm", reason)
        if reason is None:
            patches.append(Patch(last, norm_forward, {}))
    return patches


def _attention_of(block: Any) -> tuple[str, Any]:
    """Return (path, module) of the attention in a block, with the path relative to the block.

    The path is "attn.attention" in GPT-Neo, "attn" in ImageGPT and "self_attn" in OPT and BioGPT.
    """
    if isinstance(block, gpt_neo.GPTNeoBlock):
        return "attn.attention", block.attn.attention
    return ("attn", block.attn) if isinstance(block, imagegpt.ImageGPTBlock) else ("self_attn", block.self_attn)


def _why_no_attention(block: Any, family: _Family, why_foreign: Callable) -> str | None:
    """Return why the attention in `block` cannot be replaced, or None if it can.

    Reasons are another class or forward, heads wider than 256, and `reorder_and_upcast_attn`. `family` names the class
    of the block. `why_foreign(module, kind, label)` returns why a call of the module does not run the forward of the
    class `kind`, with `label` in front, or None if it does.
    """
    attn = _attention_of(block)[1]
    reason = why_foreign(attn, _ATTENTIONS[family.block], "its attention ")
    if reason is None and attn.head_dim > MAX_HEAD_DIM:
        reason = f"has heads of {attn.head_dim}; expected at most {MAX_HEAD_DIM}"
    if reason is None and getattr(attn, "reorder_and_upcast_attn", False):
        reason = "config.reorder_and_upcast_attn asks for scores in float32 whatever the weights are"
    return reason


def _note_block(path: str, block: Any, report: Report) -> None:
    """Add an entry to `report` for each attention, projection, norm and MLP in the block at `path`.

    An entry names the op that replaces the module, or the reason why the module is called. Attention is noted as
    replaced.
    """
    where, attn = _attention_of(block)
    report.note(f"{path}.{where}", attn, "attention", None)
    for one in ("q_proj", "k_proj", "v_proj", "out_proj", "c_attn", "c_proj"):
        layer = getattr(attn, one, None)
        if layer is not None:
            reason = _plain.why_not_plain(layer, nn.Linear) if one.endswith("_proj") and one != "c_proj" else None
            reason = blocks.why_no_projection(layer) if one.startswith("c_") else reason
            report.note(f"{path}.{where}.{one}", layer, "linear", reason)
    names = ("ln_1", "ln_2") if hasattr(block, "ln_1") else ("self_attn_layer_norm", "final_layer_norm")
    pre_norm = getattr(block, "do_layer_norm_before", True)
    for index, one in enumerate(names):
        op = "layer_norm" if pre_norm and index == 0 else "add_layer_norm"
        report.note(f"{path}.{one}", getattr(block, one), op, _why_no_norm(getattr(block, one)))
    if hasattr(block, "mlp"):
        kind = gpt_neo.GPTNeoMLP if isinstance(block, gpt_neo.GPTNeoBlock) else imagegpt.ImageGPTMLP
        reason = blocks.why_no_mlp(block.mlp, kind, nn.Linear if kind is gpt_neo.GPTNeoMLP else blocks.Conv1D)
        report.note(f"{path}.mlp", block.mlp, "mlp", reason)
    else:
        reason = next(
            (r for one in ("fc1", "fc2") if (r := _plain.why_not_plain(getattr(block, one), nn.Linear))), None
        )
        if reason is None and blocks.activation_of(block.activation_fn) is None:
            reason = f"activation {_plain.class_of(block.activation_fn).__name__}, expected ReLU or GELU"
        report.note(f"{path}.fc1, fc2", block.fc1, "mlp", reason)


def _why_no_norm(norm: Any) -> str | None:
    """Return why the op of LayerNorm cannot replace `norm`, or None if it can.

    Reasons are another class than `nn.LayerNorm` (ImageGPT's norm subtracts no mean), hooks, a forward set on the
    instance, and several normalised dimensions.
    """
    if isinstance(norm, imagegpt.ImageGPTLayerNorm):
        return "divides by the root mean square without subtracting the mean: called"
    return _plain.why_no_norm(norm)
