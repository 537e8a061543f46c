"""The forwards that `gpt_fast.accelerate` puts on transformers' GPT-2 and GPT-1: trunk, blocks, attention.

The trunk makes one `Pass` (seed, masks, cache) and hands it to its blocks; a block without one computes what its class
does. What a pass does not cover (`unsupported`) runs as transformers has it, for that call, with a warning.
Dropout sites are those of `GPTModel`: 0 for the embeddings, 1 + 4 i to 4 + 4 i for block i.
"""

import functools
import inspect
import warnings
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.openai import modeling_openai as gpt1
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from ... import _activations, _plain, _transforms, ops

CACHE = "cache" if hasattr(BaseModelOutputWithPastAndCrossAttentions, "cache") else "past_key_values"
_CACHES = ("cache", "past_key_values")
_LOGGER = logging.get_logger("transformers.models.gpt2.modeling_gpt2")
_NO_CACHE = "`use_cache=True` is incompatible with gradient checkpointing. Setting `use_cache=False`."
_FEW_ROWS = 32  # below it our products pay more for packing the weights than they save: a Zen 3 core, C = 768

# transformers' class of an activation → our name.
_ACTIVATIONS: dict[type, str] = {
    type(ACT2FN[theirs]): ours for ours, row in _activations.ACTIVATIONS.items() for theirs in row.gpt2
}


class Pass(NamedTuple):
    """State of one forward pass that the trunk hands to each of its blocks: dropout seed, masks, key-value cache."""

    seed: Tensor | None
    site: int  # the block's first dropout site
    causal: bool
    key_mask: Tensor | None  # [B, S], True: may be attended to
    mask: Tensor | None  # broadcastable to [B, H, T, S], likewise
    cache: Any
    branch: Tensor | None = None  # what the block before has left to be added, in one pass with this one's first norm
    branch_p: float = 0.0  # and its dropout
    carries: bool = False  # whether this block may do so, and returns (x, branch, branch_p)


# ---- GPT-2 -----------------------------------------------------------------------------------------------------------


def gpt2_model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `self`, a `GPT2Model`, on `gpt_fast.ops`, with the arguments and the result of the forward of its class.

    The forward of the class runs instead, with a warning, if the ops do not support the call. Each call in training
    draws a new dropout seed. A key-value cache that is given is extended in place.
    """
    call = named(self, args, kwargs)
    cache = next((call[name] for name in _CACHES if call.get(name) is not None), None)
    use_cache = self.config.use_cache if call.get("use_cache") is None else call["use_cache"]
    reason = _unsupported(self, call, _GPT2_ARGUMENTS) or _unsupported_by_gpt2(self, call, cache)
    if reason is not None:
        return _as_transformers_has_it(self, reason, call)
    _warn_of_padding(self, call)
    if use_cache and self.gradient_checkpointing and self.training and torch.is_grad_enabled():
        use_cache = False  # as in transformers: a checkpointed block would write to the cache twice
        if not torch.compiler.is_compiling():
            _LOGGER.warning_once(_NO_CACHE)
    if use_cache and cache is None:
        cache = DynamicCache(config=self.config)
    x, shape, positions = _rows(call)
    N, T = x.shape[:2]
    past = cache.get_seq_length() if cache is not None else 0
    key_mask = call.get("attention_mask")
    causal = call["is_causal"] if call.get("is_causal") is not None else getattr(self.config, "is_causal", True)
    seed = _seed(self, x.device)
    mask = None
    if key_mask is not None:
        key_mask, mask = _masks(key_mask, N)
        causal = causal and mask is None
    elif positions is not None and cache is None and causal:
        mask = _packed(positions)
    if positions is None and past > 0:
        positions = torch.arange(past, past + T, device=x.device)
    hidden = _embed(self, self.wte, self.wpe, x, call, positions, seed)
    now = Pass(seed, 0, causal, key_mask, mask, cache)
    states: tuple | None = () if _flag(self, call, "output_hidden_states") else None
    # Whoever looks at a block from outside, as hooks do, sees the sums.
    carry = states is None and not self.gradient_checkpointing
    plain = [carry and _plain.is_plain(block, gpt2.GPT2Block) for block in self.h]
    for i, block in enumerate(self.h):
        if states is not None:
            states = (*states, hidden)
        now = now._replace(site=1 + 4 * i, carries=plain[i] and (i + 1 == len(plain) or plain[i + 1]))
        hidden = block(hidden, gpt_fast_pass=now)
        if now.carries:
            hidden, branch, branch_p = hidden
            now = now._replace(branch=branch, branch_p=branch_p)
    hidden = _first_norm(self.ln_f, hidden, now._replace(site=now.site + 4))[0].view(*shape, -1)
    states = None if states is None else (*states, hidden)
    output = BaseModelOutputWithPastAndCrossAttentions(
        last_hidden_state=hidden, hidden_states=states, **{CACHE: cache if use_cache else None}
    )
    return output if _returns_dict(self, call) else output.to_tuple()


def gpt2_block_forward(
    self: Any, hidden_states: Any = None, *args: Any, gpt_fast_pass: Any = None, **kwargs: Any
) -> Any:
    """Run `self`, a `GPT2Block`, on `gpt_fast.ops` if there is a `gpt_fast_pass`, else by the forward of its class.

    `gpt_fast_pass` is the trunk's `Pass` (seed, masks, cache). Other arguments than `hidden_states` are then ignored,
    and the result is x [B, T, C] or, if the pass's `carries` is True, (x, branch, branch_p). The caller then adds
    dropout(branch) to x, with probability `branch_p`.
    """
    if gpt_fast_pass is None:
        return _plain.original(self, hidden_states, *args, **kwargs)
    return _checkpointed(self, _gpt2_block, hidden_states, gpt_fast_pass)


def _gpt2_block(self: Any, x: Tensor, now: Pass) -> Any:
    """Return the output [B, T, C] of `self`, a `GPT2Block`, for x [B, T, C] and the state `now` of the forward pass.

    If `now.carries`, return (x, branch, branch_p) instead, where x are the hidden states before the block's last
    addition. The caller then adds dropout(branch) to x, with probability `branch_p`, in one op with the next norm.
    """
    attn, mlp = self.attn, self.mlp
    attends = _plain.is_plain(attn, gpt2.GPT2Attention) and _plain.is_plain(attn.c_attn, Conv1D)
    multiplies = _plain.is_plain(mlp, gpt2.GPT2MLP) and _plain.is_plain(mlp.c_fc, Conv1D)
    normed, x = _first_norm(self.ln_1, x, now, attends)
    branch, p = _attention(self.attn, gpt2.GPT2Attention, normed, now)
    normed, x = _plain.add_norm(branch, x, p, self.ln_2, now.seed, now.site + 1, product=multiplies)
    branch, p = mlp_branch(self.mlp, gpt2.GPT2MLP, normed)
    return (x, branch, p) if now.carries else _plain.add(branch, x, p, now.seed, now.site + 3)


def _first_norm(norm: Any, x: Tensor, now: Pass, product: bool = False) -> tuple[Tensor, Tensor]:
    """Return (norm(x), x), where x includes the residual branch that the block before left over (`now.branch`), if any.

    `norm` is the module, and `now` the state of the forward pass. The left-over branch is added with its dropout.
    `product` is True if only a matrix product reads norm(x), which may then be rounded to that product's dtype.
    """
    if now.branch is None:
        return _plain.norm(norm, x, product=product), x
    return _plain.add_norm(now.branch, x, now.branch_p, norm, now.seed, now.site - 1, product=product)


def gpt2_attention_forward(
    self: Any, hidden_states: Any = None, *args: Any, gpt_fast_pass: Any = None, **kwargs: Any
) -> Any:
    """Run `self`, a `GPT2Attention`, on `gpt_fast.ops` if there is a `gpt_fast_pass`, else by the forward of its class.

    `hidden_states` [B, T, C] is the input, and `gpt_fast_pass` is the trunk's `Pass` (seed, masks, cache). With a pass
    the result is (out, None), where out [B, T, C] is attention's output after its output projection and dropout. None
    takes the place of the probabilities.
    """
    if gpt_fast_pass is None:
        return _plain.original(self, hidden_states, *args, **kwargs)
    return self.resid_dropout(_attend(self, hidden_states, gpt_fast_pass)), None


# ---- GPT-1 -----------------------------------------------------------------------------------------------------------


def gpt1_model_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `self`, an `OpenAIGPTModel`, on `gpt_fast.ops`, with the arguments and the result of its class's forward.

    The forward of the class runs instead, with a warning, if the ops do not support the call. Each call in training
    draws a new dropout seed.
    """
    call = named(self, args, kwargs)
    reason = _unsupported(self, call, _GPT1_ARGUMENTS)
    if reason is not None:
        return _as_transformers_has_it(self, reason, call)
    _warn_of_padding(self, call)
    x, shape, positions = _rows(call)
    seed = _seed(self, x.device)
    key_mask, mask = call.get("attention_mask"), None
    if key_mask is not None:
        key_mask, mask = _masks(key_mask, x.shape[0])
    hidden = _embed(self, self.tokens_embed, self.positions_embed, x, call, positions, seed)
    now = Pass(seed, 0, True, key_mask, mask, None)
    states: tuple | None = () if _flag(self, call, "output_hidden_states") else None
    for i, block in enumerate(self.h):
        if states is not None:
            states = (*states, hidden)
        (hidden,) = block(hidden, gpt_fast_pass=now._replace(site=1 + 4 * i))
    hidden = hidden.view(*shape, -1)
    states = None if states is None else (*states, hidden)
    output = BaseModelOutput(last_hidden_state=hidden, hidden_states=states)
    return output if _returns_dict(self, call) else output.to_tuple()


def gpt1_block_forward(self: Any, x: Any = None, *args: Any, gpt_fast_pass: Any = None, **kwargs: Any) -> Any:
    """Run `self`, a block of GPT-1, on `gpt_fast.ops` if there is a `gpt_fast_pass`, else by the forward of its class.

    `gpt_fast_pass` is the trunk's `Pass` (seed, masks). With a pass the result is the list [out], where out [B, T, C]
    is the block's output for x [B, T, C], and other arguments are ignored.
    """
    if gpt_fast_pass is None:
        return _plain.original(self, x, *args, **kwargs)
    return [_checkpointed(self, _gpt1_block, x, gpt_fast_pass)]


def _gpt1_block(self: Any, x: Tensor, now: Pass) -> Tensor:
    """Return the output [B, T, C] of `self`, a block of GPT-1, for x [B, T, C] and the state `now` of the pass."""
    branch, p = _attention(self.attn, gpt1.Attention, x, now)
    x, _ = _plain.add_norm(branch, x, p, self.ln_1, now.seed, now.site + 1)
    branch, p = mlp_branch(self.mlp, gpt1.MLP, x)
    return _plain.add_norm(branch, x, p, self.ln_2, now.seed, now.site + 3)[0]


def gpt1_attention_forward(self: Any, x: Any = None, *args: Any, gpt_fast_pass: Any = None, **kwargs: Any) -> Any:
    """Run `self`, GPT-1's attention, on `gpt_fast.ops` if there is a `gpt_fast_pass`, else by its class's forward.

    `gpt_fast_pass` is the trunk's `Pass` (seed, masks). With a pass the result is the list [out], where out [B, T, C]
    is attention's output for x [B, T, C], after its output projection and dropout.
    """
    if gpt_fast_pass is None:
        return _plain.original(self, x, *args, **kwargs)
    return [self.resid_dropout(_attend(self, x, gpt_fast_pass))]


# ---- what both share -------------------------------------------------------------------------------------------------


def _attention(attn: Any, kind: type, x: Tensor, now: Pass) -> tuple[Tensor, float]:
    """Return (branch, p) for x [B, T, C]: attention's output [B, T, C] after its output projection, and a dropout rate.

    The caller computes residual + dropout(branch, p). `kind` is the class of `attn`. If `attn` has hooks or another
    class, it is called with its dropout, and p is 0. `now` is the state of the forward pass.
    """
    if not _plain.is_plain(attn, kind):
        return attn(x, gpt_fast_pass=now)[0], 0.0  # through its hooks, into the forward above
    return _plain.dropout(attn.resid_dropout, _attend(attn, x, now))


def _attend(attn: Any, x: Tensor, now: Pass) -> Tensor:
    """Return the output [B, T, C] of attention with its output projection for x [B, T, C], before the branch's dropout.

    `attn` is the attention module of GPT-2 or GPT-1. `now` holds the masks, the seed and the cache of the forward pass.
    The cache gets the new keys and values.
    """
    qkv = project(attn.c_attn, x)  # [B, T, 3C]
    p = _attention_dropout(attn)
    options: dict[str, Any] = {
        "causal": now.causal, "key_mask": now.key_mask, "mask": now.mask, "dropout_p": p, "seed": now.seed,
        "site": now.site, "scale": _scale(attn, qkv.shape[-1] // 3),
    }  # fmt: skip
    heads = _heads(attn)
    if now.cache is None:
        return project(attn.c_proj, ops.attention_qkv(qkv, heads, **options))
    q, k, v = qkv.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)  # each [B, H, T, D]
    fresh = now.cache.get_seq_length(attn.layer_idx) == 0
    k, v = now.cache.update(k, v, attn.layer_idx)
    if fresh:
        return project(attn.c_proj, ops.attention_qkv(qkv, heads, **options))
    return project(attn.c_proj, ops.attention(q, k, v, **options).transpose(1, 2).flatten(2))


def _attention_dropout(attn: Any) -> float:
    """Return the dropout probability of attention's probabilities now, 0.0 outside of training mode.

    `attn` is the attention module of GPT-2 or GPT-1. The train flag of its dropout module counts for GPT-1 and for
    GPT-2 with attention implementation "eager". The train flag of `attn` itself counts for GPT-2 with any other one.
    """
    fused = isinstance(attn, gpt2.GPT2Attention) and attn.config._attn_implementation != "eager"
    return attn.attn_dropout.p if (attn if fused else attn.attn_dropout).training else 0.0


def project(layer: Any, x: Tensor) -> Tensor:
    """Return layer(x) for x [B, T, C], either by `ops.linear` or by a call of `layer`.

    `ops.linear` computes it if `layer` is a `Conv1D` without hooks, and x has at least 32 rows B T or a graph is being
    compiled. The op reads the transposed weight in place. In all other cases `layer` is called.
    """
    if has_few_rows(x) or why_no_projection(layer) is not None:
        return layer(x)
    return ops.linear(x, layer.weight.t(), layer.bias)


def why_no_projection(layer: Any, kind: Any = Conv1D) -> str | None:
    """Return why `layer` has to be called, or None if it is a plain `kind`, whose weight an op may read.

    Reasons are another class, hooks, and a forward or a weight class of its own.
    """
    reason = _plain.why_not_plain(layer, kind)
    return None if reason is None else f"{reason}: called through it"


def has_few_rows(x: Tensor) -> bool:
    """Return True if x [B, T, C] has fewer than 32 rows B T, for which PyTorch's product is faster than `ops.linear`.

    The result is False in a compiled graph, which serves any number of rows.
    """
    rows = x.shape[0] * x.shape[1]
    return not torch.compiler.is_compiling() and type(rows) is int and rows < _FEW_ROWS  # a graph is for any number


def _heads(attn: Any) -> int:
    """Return the number of heads of attention in GPT-2 or GPT-1."""
    return attn.num_heads if isinstance(attn, gpt2.GPT2Attention) else attn.n_head


def _scale(attn: Any, C: int) -> float:
    """Return the factor by which attention of width C in GPT-2 or GPT-1 multiplies its scores.

    It is `attn.scaling` for GPT-2. For GPT-1 it is D^-1/2 for heads of D numbers, or 1.0 if `attn.scale` is False.
    """
    if isinstance(attn, gpt2.GPT2Attention):
        return attn.scaling
    return (C // attn.n_head) ** -0.5 if attn.scale else 1.0


def mlp_branch(mlp: Any, kind: type, x: Tensor) -> tuple[Tensor, float]:
    """Return (branch, p): the MLP's output for x, both [B, T, C], and the dropout rate of its residual addition.

    The caller computes residual + dropout(branch, p). `kind` is the class of `mlp`. If `mlp` has hooks or another
    class, it is called with its dropout, and p is 0. `ops.mlp` computes the branch if it can and x has at least 32
    rows, else the modules inside `mlp` are called one by one.
    """
    if not _plain.is_plain(mlp, kind):
        return mlp(x), 0.0
    if has_few_rows(x) or why_no_mlp(mlp, kind) is not None:
        return _plain.dropout(mlp.dropout, mlp.c_proj(mlp.act(mlp.c_fc(x))))
    # Conv1D keeps its matrices transposed: read in place, and their gradients come back in the same strides.
    fc, proj = mlp.c_fc, mlp.c_proj
    branch = ops.mlp(x, fc.weight.t(), fc.bias, proj.weight.t(), proj.bias, _ACTIVATIONS[_plain.class_of(mlp.act)])
    return _plain.dropout(mlp.dropout, branch)


def activation_of(module: Any) -> str | None:
    """Return this library's name of the activation that a module computes, such as "gelu", or None if there is none.

    The result is None for another class than transformers' ReLU and GELU modules, or if the module has hooks.
    """
    return None if _plain.is_hooked(module) else _ACTIVATIONS.get(_plain.class_of(module))


def why_no_mlp(mlp: Any, kind: type, layer: Any = Conv1D) -> str | None:
    """Return why `ops.mlp` cannot compute `mlp`, or None if it can.

    `kind` is the expected class of the MLP, and `layer` that of its two projections, `c_fc` and `c_proj`. Reasons are
    another class, hooks or a forward set on one of them, and an activation other than ReLU or GELU.
    """
    reason = _plain.why_not_plain(mlp, kind)
    if reason is not None:
        return reason
    for name in ("c_fc", "c_proj"):
        reason = why_no_projection(getattr(mlp, name), layer)
        if reason is not None:
            return f"{name} {reason}"
    if activation_of(mlp.act) is None:
        return f"activation {_plain.class_of(mlp.act).__name__}, expected ReLU or GELU"
    return None


def _checkpointed(block: Any, function: Any, x: Tensor, now: Pass) -> Tensor:
    """Return function(block, x, now), under gradient checkpointing if the block has it switched on and trains.

    `function` is `_gpt2_block` or `_gpt1_block`. A checkpointed block runs again in backward, so it gets `now` without
    the cache.
    """
    if block.gradient_checkpointing and block.training and torch.is_grad_enabled():
        return block._gradient_checkpointing_func(functools.partial(function, block, now=now._replace(cache=None)), x)
    return function(block, x, now)


def _embed(
    trunk: Any, tokens_table: Any, positions_table: Any, x: Tensor, call: dict, positions: Tensor | None,
    seed: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return dropout(token embeddings + position embeddings) [B, T, C].

    The dropout is `trunk.drop`, with the mask of `seed`. `tokens_table` and `positions_table` are the trunk's embedding
    modules. `x` holds tokens [B, T], or embeddings [B, T, C] that take the place of the token embeddings. `positions`
    holds position ids; None counts from 0. `call` holds the arguments of the trunk's call by name. Its
    `token_type_ids`, if given, are embedded by the token table and added.
    """
    types = call.get("token_type_ids")
    plain = _plain.why_no_table(tokens_table) is None and _plain.why_no_table(positions_table) is None
    if x.dim() == 2 and types is None and plain and _plain.is_plain(trunk.drop, nn.Dropout):
        if positions is not None and positions.dim() == 2:
            positions = positions[0] if positions.shape[0] == 1 else positions.expand(x.shape)
        p = trunk.drop.p if trunk.drop.training else 0.0
        return ops.embedding(x, tokens_table.weight, positions_table.weight, positions, p, seed, site=0)
    if positions is None:
        positions = torch.arange(x.shape[1], device=x.device)
    embedded = tokens_table(x) if x.dim() == 2 else x
    embedded = embedded + positions_table(positions)
    if types is not None:
        embedded = embedded + tokens_table(types.view(-1, x.shape[1]))
    embedded, p = _plain.dropout(trunk.drop, embedded)
    return embedded if p == 0 else _plain.add(embedded, torch.zeros_like(embedded), p, seed, 0)  # the same site


def _rows(call: dict) -> tuple[Tensor, torch.Size, Tensor | None]:
    """Return (x, shape, positions) for the arguments `call` of a trunk, by name.

    x holds tokens [N, T] from `input_ids` or, if that is None, embeddings [N, T, C] from `inputs_embeds`. `shape` is
    the leading shape [..., T] of the trunk's result, and `positions` are the given position ids or None.
    """
    tokens, embeddings = call.get("input_ids"), call.get("inputs_embeds")
    if tokens is not None:
        return tokens.view(-1, tokens.shape[-1]), tokens.shape, call.get("position_ids")
    assert embeddings is not None
    return embeddings, embeddings.shape[:-1], call.get("position_ids")


def _seed(trunk: Any, device: torch.device) -> Tensor | None:
    """Return a new dropout seed on `device` for one forward pass of the trunk.

    The result is None in evaluation mode, or if all dropout rates of the configuration are 0.
    """
    config = trunk.config
    drops = trunk.training and max(config.embd_pdrop, config.attn_pdrop, config.resid_pdrop) > 0
    return ops.new_seed(device) if drops else None


def _masks(given: Tensor, N: int) -> tuple[Tensor | None, Tensor | None]:
    """Return (key_mask, mask) for the attention mask `given` of N rows, in which nonzero values allow attention.

    A bool `given` of four dimensions [N, 1, T, S] is returned as `mask`, and `key_mask` is None. A `given` of fewer
    dimensions becomes `key_mask`, bool [N, S], and `mask` is None. If the values of this `key_mask` are cheap to read,
    as on the CPU, and show no padding, both are None.
    """
    if given.dim() == 4:
        return None, given
    key_mask = given.reshape(N, -1).to(torch.bool)
    if _plain.is_reading_values_cheap(key_mask) and bool(key_mask.all()):
        return None, None
    return key_mask, None


def _packed(positions: Tensor) -> Tensor | None:
    """Return the bool mask [N, 1, T, T] that separates sequences packed into one row, or None if there are none.

    A new sequence begins where `positions` [N, T] do not increase by one. True allows attention, also to later tokens
    of the sequence. The mask is also made if the values cannot be read at once, as on a GPU.
    """
    first = positions[:, :1] - 1
    sequence = (torch.diff(positions, prepend=first, dim=-1) != 1).cumsum(-1)  # [N, T]
    if _plain.is_reading_values_cheap(sequence) and not bool(sequence[:, -1].any()):
        return None
    return (sequence[:, :, None] == sequence[:, None, :])[:, None]


# ---- what is left to transformers ------------------------------------------------------------------------------------

_COMMON = {
    "input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "output_attentions",
    "output_hidden_states", "return_dict", "num_items_in_batch", "shift_labels", "ignore_index",
}  # fmt: skip
_GPT2_ARGUMENTS = _COMMON | {*_CACHES, "use_cache", "is_causal"}
_GPT1_ARGUMENTS = _COMMON


def named(module: Any, args: tuple, kwargs: dict) -> dict:
    """Return the arguments that a call passes, by the names of the parameters of the class's own forward.

    Parameters that the call leaves out are not in the dict. `args` and `kwargs` are the arguments of the call, and
    `module` is the module that is called. The result may be `kwargs` itself.

    If the forward has a parameter `cache`, `past_key_values` is its old name. An argument `past_key_values` is then
    renamed to `cache` or, if `cache` is given too, dropped. Outside of compiled graphs a `FutureWarning` says so.
    """
    if not args and "past_key_values" not in kwargs:
        return kwargs
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    call = dict(zip(names, args, strict=False)) | kwargs
    if "past_key_values" in call and "cache" in names:
        older = call.pop("past_key_values")
        both = call.get("cache") is not None
        call["cache"] = call["cache"] if both else older
        if not torch.compiler.is_compiling():
            advice = "`cache` is given too and used" if both else "Use `cache` instead"
            where = f"{type(module).__name__}.forward"
            warnings.warn(f"`past_key_values` is deprecated for `{where}`. {advice}.", FutureWarning, stacklevel=4)
    return call


def _warn_of_padding(trunk: Any, call: dict) -> None:
    """Let transformers warn if a call of `trunk` has padding tokens but no attention mask.

    `call` holds the arguments by name. There is no warning inside a `vmap`, because transformers would read the tokens.
    """
    tokens = call.get("input_ids")
    if tokens is not None and not _transforms.is_batched(tokens):
        trunk.warn_if_padding_and_no_attention_mask(tokens, call.get("attention_mask"))


def _flag(trunk: Any, call: dict, name: str) -> Any:
    """Return the option `name` of a call, or the value in the trunk's configuration if the call leaves it out.

    `call` holds the arguments by name. The result is False if the configuration has no such option either.
    """
    value = call.get(name)
    return getattr(trunk.config, name, False) if value is None else value


def _returns_dict(trunk: Any, call: dict) -> bool:
    """Return True if the call asks for an output object and not for a tuple.

    `call` holds the arguments by name. If `return_dict` is missing or None, the trunk's configuration decides.
    """
    value = call.get("return_dict")
    return trunk.config.return_dict if value is None else bool(value)


def _unsupported(trunk: Any, call: dict, known: set[str]) -> str | None:
    """Return why `gpt_fast.ops` do not support a call of GPT-2's or GPT-1's trunk, or None if they do.

    `call` holds the arguments by name, and `known` the names of the arguments that are supported. An argument of None
    counts as left out. Reasons in the call are other arguments, `output_attentions=True`, an `output_hidden_states`
    that is no bool and so selects layers, and none or both of `input_ids` and `inputs_embeds`. An attention mask of
    more than three dimensions is a reason, except a bool mask of four for GPT-2 with attention implementation "sdpa".
    GPT-1's mask needs N · T elements for N rows of T tokens; the size of GPT-2's mask is not checked here. Reasons in
    the model are an attention dropout that has hooks or another class than `nn.Dropout`, and a block that
    `gpt_fast.accelerate` has not patched.
    """
    extra = sorted(name for name, value in call.items() if name not in known and value is not None)
    if extra:
        return f"{', '.join(extra)} given"
    if _flag(trunk, call, "output_attentions"):
        return "output_attentions=True asks for the probabilities, which are never stored"
    if not isinstance(_flag(trunk, call, "output_hidden_states"), bool):
        return "output_hidden_states selects layers"
    tokens: Any = call.get("input_ids")
    embeddings: Any = call.get("inputs_embeds")
    if (tokens is None) == (embeddings is None):
        return "input_ids and inputs_embeds; expected one of them"
    N, T = (tokens.view(-1, tokens.shape[-1]) if tokens is not None else embeddings).shape[:2]
    mask = call.get("attention_mask")
    if mask is not None and mask.dim() == 4 and mask.dtype == torch.bool and isinstance(trunk, gpt2.GPT2Model):
        if trunk.config._attn_implementation != "sdpa":
            return "a bool attention_mask of four dimensions means something else to eager attention"
    elif mask is not None and (mask.dim() > 3 or (isinstance(trunk, gpt1.OpenAIGPTModel) and mask.numel() != N * T)):
        return f"attention_mask is {mask.dtype} {list(mask.shape)}"
    for i, block in enumerate(trunk.h):
        dropout = getattr(getattr(block, "attn", None), "attn_dropout", None)
        if dropout is not None and (_plain.class_of(dropout) is not nn.Dropout or _plain.is_hooked_itself(dropout)):
            return f"h.{i}.attn.attn_dropout is another module or has hooks, and attention's op would not call it"
    foreign = next((i for i, block in enumerate(trunk.h) if not _is_ours(block)), None)
    if foreign is not None:
        return f"block {foreign} or its attention was put there after accelerate"
    return None


def _is_ours(block: Any) -> bool:
    """Return True if `gpt_fast.accelerate` has patched the block and its attention."""
    return _plain.is_accelerated(block) and _plain.is_accelerated(block.attn)


def _unsupported_by_gpt2(trunk: Any, call: dict, cache: Any) -> str | None:
    """Return why the cache or the mask in a call of GPT-2's trunk is not supported, or None if both are.

    `call` holds the arguments by name, and `cache` is transformers' key-value cache or None. Reasons are a cache other
    than `DynamicCache`, a cache without causal attention, under gradient checkpointing or with cross-attention, and a
    mask with another number of keys. Other arguments are not checked.
    """
    mask, past = call.get("attention_mask"), 0
    if cache is not None:
        if type(cache) is not DynamicCache or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return f"a {type(cache).__name__} as cache"
        past = cache.get_seq_length()
    rows = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"][..., 0]
    N, T = rows.view(-1, rows.shape[-1]).shape
    if mask is not None and mask.dim() < 4 and mask.numel() != N * (past + T):
        return f"attention_mask of shape {list(mask.shape)} with {past + T} keys"
    causal = call["is_causal"] if call.get("is_causal") is not None else getattr(trunk.config, "is_causal", True)
    if cache is not None and not causal:
        return "a cache without causal attention"
    if trunk.gradient_checkpointing and trunk.training and cache is not None:
        return "a cache under gradient checkpointing"
    if trunk.config.add_cross_attention and (cache is not None or trunk.config.use_cache):
        return None if call.get("use_cache") is False and cache is None else "a cache for cross-attention"
    return None


def _as_transformers_has_it(trunk: Any, reason: str, call: dict) -> Any:
    """Return the result of the forward that transformers defines for the trunk's class.

    `call` holds the arguments by name. Warn that the call runs this way because of `reason`, except in a compiled
    graph.
    """
    if not torch.compiler.is_compiling():
        warnings.warn(
            f"gpt_fast: {type(trunk).__name__} runs transformers' own forward for this call: {reason}", stacklevel=3
        )
    return _plain.original(trunk, **call)
