"""nanoGPT's state dict to `GPTForCausalLM` and back, weight for weight.

nanoGPT's model is GPT-2 with the exact GELU, one dropout rate and optional biases. minGPT, build-nanogpt and llm.c have
the same names and shapes but GELU's tanh form, and minGPT has a free output layer. Linear layers store [out, in], as
here, so nothing is transposed.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ...config import GPTConfig
from ...ops._checks import described
from ..huggingface import guard

USER = "gpt_fast.from_nanogpt"
# The sizes in nanoGPT's `model_args`, with the fields of our configuration.
SIZES = {
    "block_size": "seq_len", "vocab_size": "num_tokens", "n_layer": "num_layers", "n_head": "num_heads",
    "n_embd": "hidden_dim",
}  # fmt: skip
OPTIONS = ("bias", "dropout")
_LARGEST = 2**31 - 1
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_WRAPPERS = re.compile(r"^(?:_orig_mod\.|module\.)+")  # torch.compile and DistributedDataParallel
_BLOCK_NAME = re.compile(r"transformer\.h\.(\d{1,9})\.")
_MASK = re.compile(r"transformer\.h\.\d{1,9}\.attn\.bias")  # a buffer where attention is written out
_OUTPUT, _TABLE, _POSITIONS = "lm_head.weight", "transformer.wte.weight", "transformer.wpe.weight"
_OURS_TIED = ("output_layer.weight", "trunk.token_emb.weight")
_NORMS = (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"))
_LINEARS = (  # nanoGPT's, our weight and bias, rows and columns in units of C
    ("attn.c_attn", "multihead_attn.in_proj_", 3, 1),
    ("attn.c_proj", "multihead_attn.out_proj.", 1, 1),
    ("mlp.c_fc", "ff.0.", 4, 1),
    ("mlp.c_proj", "ff.3.", 1, 4),
)


def from_nanogpt(kind: Any, state_dict: Any, model_args: Any, overrides: dict[str, Any]) -> Any:
    """Return a model of class `kind` with nanoGPT's weights, in the dtype and on the device of the tensors.

    `state_dict` and `model_args` (sizes and options) have nanoGPT's names, and `overrides` are fields of `GPTConfig`
    that replace those of `model_args`. The output layer is tied to the token embedding if both weights are equal.
    Raises `ValueError` if `model_args` or a tensor is wrong, missing or unexpected.
    """
    config = read_model_args(model_args, overrides)
    state = _checked_state(state_dict)
    return build(kind, state, config.replace(tied=_is_tied(state)))


def read_model_args(model_args: Any, overrides: Mapping[str, Any]) -> GPTConfig:
    """Return the configuration that nanoGPT's `model_args` describe, with the fields in `overrides` replaced.

    `model_args` needs the sizes block_size, vocab_size, n_layer, n_head and n_embd. It may have bias (True if missing)
    and dropout (0.0 if missing). The activation is "gelu" unless `overrides` has another. If bias or dropout is
    missing, `overrides` must have "activation". Raises `ValueError` if that is missing, or if `model_args` is no
    dictionary, lacks a size, or has another option or a wrong value.
    """
    if not isinstance(model_args, Mapping):
        raise ValueError(f"{USER}: model_args is {described(model_args)}; expected a dictionary of nanoGPT's sizes")
    unknown = [name for name in model_args if name not in SIZES and name not in OPTIONS]
    if unknown:
        raise ValueError(
            f"{USER}: model_args has {_listed(unknown)}; expected only {', '.join((*SIZES, *OPTIONS))}, "
            "because another option may change what the model computes"
        )
    missing = [name for name in SIZES if name not in model_args]
    if missing:
        raise ValueError(f"{USER}: model_args lacks {_listed(missing)}; expected {', '.join(SIZES)}")
    for name in SIZES:
        value = model_args[name]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST:
            raise ValueError(
                f"{USER}: model_args has {name} {_shown(value)}; expected an integer from 1 to {_LARGEST:,}"
            )
    bias, dropout = model_args.get("bias", True), model_args.get("dropout", 0.0)
    if not isinstance(bias, bool):
        raise ValueError(f"{USER}: model_args has bias {_shown(bias)}; expected True or False")
    if not isinstance(dropout, int | float) or isinstance(dropout, bool) or not 0 <= dropout < 1:
        raise ValueError(f"{USER}: model_args has dropout {_shown(dropout)}; expected a probability in [0, 1)")
    width, heads = model_args["n_embd"], model_args["n_head"]
    if width % heads or width // heads > 256:
        raise ValueError(
            f"{USER}: model_args has n_head {heads} and n_embd {width}; expected heads of equal width, at most 256"
        )
    if "activation" not in overrides and any(name not in model_args for name in OPTIONS):
        raise ValueError(
            f"{USER}: model_args has not both bias and dropout, so nanoGPT of 2023-05 or later did not write it; "
            'expected activation= too, "gelu_tanh" for minGPT, build-nanogpt and early nanoGPT, or "gelu"'
        )
    fields = {ours: model_args[theirs] for theirs, ours in SIZES.items()}
    return GPTConfig.preset(
        "gpt2", dropout=float(dropout), **(fields | {"bias": bias, "activation": "gelu"} | dict(overrides))
    )


def build(kind: Any, state: dict[str, Tensor], config: GPTConfig) -> Any:
    """Return a model of class `kind` and this configuration with copies of the tensors in `state`.

    The tensors have nanoGPT's names. The model gets the dtype and device of the token embedding. The output layer's
    tensor is not copied if `config.tied`. All names, shapes, dtypes and devices are checked before memory is taken.
    Raises `ValueError` if a tensor is missing, unexpected, or does not fit.
    """
    blocks = {int(found[1]) for found in map(_BLOCK_NAME.match, state) if found}
    if len(blocks) != config.num_layers:
        raise ValueError(
            f"{USER}: state_dict has {len(blocks)} blocks transformer.h.N; expected n_layer = {config.num_layers}"
        )
    expected = _names(config)
    missing = [name for name in expected if name not in state]
    if missing:
        raise ValueError(f"{USER}: state_dict lacks {_listed(missing)}; expected every tensor of nanoGPT's GPT")
    unexpected = [name for name in state if name not in expected]
    if unexpected:
        biases = not config.bias and all(name.endswith(".bias") for name in unexpected)
        hint = ", because model_args has bias False" if biases else ""
        raise ValueError(f"{USER}: state_dict has {_listed(unexpected)}; expected no such tensor{hint}")
    dtype, device = state[_TABLE].dtype, state[_TABLE].device
    for name, (_, shape) in expected.items():
        tensor = state[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{USER}: {name} has shape {list(tensor.shape)}; expected {list(shape)} by model_args")
        if tensor.dtype != dtype or tensor.device != device:
            raise ValueError(
                f"{USER}: {name} has {tensor.dtype} on {tensor.device}; expected {dtype} on {device}, as {_TABLE}"
            )
    with torch.device("meta"):  # draws no weights that would be overwritten
        ours = kind(config)
    ours = ours.to(dtype).to_empty(device=device)
    target = ours.state_dict()
    with torch.no_grad():
        for name, (our_name, _) in expected.items():
            if name != _OUTPUT or not config.tied:
                target[our_name].copy_(state[name].reshape(target[our_name].shape))
    return ours


def model_args_of(state_dict: Any, heads: int) -> dict[str, Any]:
    """Return the `model_args` that a bare state dict implies: sizes by its shapes, `n_head` by `heads`, no dropout.

    The keys are n_layer, n_head, n_embd, block_size, vocab_size, bias (True if the last norm has one) and dropout
    (0.0). Raises `ValueError` if one of the two embeddings is missing or no matrix, or if `state_dict` holds anything
    but floating-point tensors and causal masks.
    """
    state = _checked_state(state_dict)
    for name in (_TABLE, _POSITIONS):
        if name not in state or state[name].dim() != 2:
            found = described(state.get(name))
            raise ValueError(f"{USER}: state_dict has {name} {found}; expected a matrix")
    (V, C), (T, _) = state[_TABLE].shape, state[_POSITIONS].shape
    blocks = {found[1] for found in map(_BLOCK_NAME.match, state) if found}
    return {
        "n_layer": len(blocks), "n_head": heads, "n_embd": C, "block_size": T,
        "bias": "transformer.ln_f.bias" in state, "vocab_size": V, "dropout": 0.0,
    }  # fmt: skip


def to_nanogpt(ours: Any) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return nanoGPT's (state_dict, model_args) for `ours`, a `GPTForCausalLM`.

    The tensors are detached and share memory with the model's parameters. `model_args` has n_layer, n_head, n_embd,
    block_size, bias, vocab_size and dropout. Raises `ValueError` if nanoGPT has no model like `ours`, or if a module of
    `ours` is not what its configuration says.
    """
    reason = guard.why_changed(ours, guard.make_ours(ours), _OURS_TIED)
    if reason is not None:
        raise ValueError(f"gpt_fast.to_nanogpt: {reason}")
    config: GPTConfig = ours.config
    _check_expressible(config, ours.is_tied())
    state = ours.state_dict()
    tensors = {name: state[our_name].detach() for name, (our_name, _) in _names(config).items()}
    tensors[_POSITIONS] = tensors[_POSITIONS][0]  # [1, T, C] here
    tensors[_OUTPUT] = tensors[_TABLE]
    model_args = {
        "n_layer": config.num_layers, "n_head": config.num_heads, "n_embd": config.hidden_dim,
        "block_size": config.seq_len, "bias": config.bias, "vocab_size": config.num_tokens,
        "dropout": config.residual_dropout,
    }  # fmt: skip
    return tensors, model_args


def _check_expressible(config: GPTConfig, tied: bool) -> None:
    """Raise `ValueError` if nanoGPT has no field for an option of `config`, or if the output layer is not `tied`.

    nanoGPT has pre-norm blocks, the exact GELU, no output bias, `ff_dim` 4 times the width, epsilon 1e-5, no dropout on
    the hidden activation, and one dropout rate for embeddings, attention and residuals. The message names all options
    that differ.
    """
    rates = (config.embedding_dropout, config.attention_dropout, config.residual_dropout)
    lacking = [
        problem
        for problem, there in (
            ("post-norm blocks", not config.pre_norm),
            (f"activation {config.activation} (nanoGPT has the exact gelu)", config.activation != "gelu"),
            ("an output layer of its own (nanoGPT ties it to the embedding)", not tied),
            ("an output bias", config.output_bias),
            (f"ff_dim {config.ff_dim} (nanoGPT has 4 n_embd)", config.ff_dim != 4 * config.hidden_dim),
            (f"layer_norm_eps {config.layer_norm_eps} (nanoGPT has 1e-05)", config.layer_norm_eps != 1e-5),
            (f"dropout {config.ff_dropout} on the hidden activation", config.ff_dropout > 0),
            (f"dropouts {rates} (nanoGPT has one rate for all)", len(set(rates)) > 1),
        )
        if there
    ]
    if lacking:
        raise ValueError(f"gpt_fast.to_nanogpt: nanoGPT cannot hold {', '.join(lacking)}; expected a model without it")


def _checked_state(state_dict: Any) -> dict[str, Tensor]:
    """Return the detached tensors of a state dict by name, without prefixes of wrappers and without causal masks.

    The prefixes are "module." and "_orig_mod.". The tensors may come from any file. Two names may share one tensor, as
    tied weights do. Raises `ValueError` if `state_dict` is no mapping, has a key that is no string, or has two keys
    that are equal without their prefixes. Raises it for a tensor that is not dense, is larger than its storage, or is
    not float32, bfloat16 or float16. Raises it for a mask "attn.bias" that is not causal.
    """
    if not isinstance(state_dict, Mapping):
        raise ValueError(f"{USER}: state_dict is {described(state_dict)}; expected names and tensors")
    state: dict[str, Tensor] = {}
    for given, tensor in state_dict.items():
        if not isinstance(given, str):
            raise ValueError(f"{USER}: state_dict has the key {_shown(given)}; expected names of tensors")
        name = _WRAPPERS.sub("", given)
        if not _is_plain(tensor):
            raise ValueError(f"{USER}: state_dict has {given} of type {type(tensor).__name__}; expected a dense tensor")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise ValueError(f"{USER}: {given} has shape {list(tensor.shape)}; expected as many numbers in its storage")
        if name in state:
            raise ValueError(f"{USER}: state_dict has {name} twice, with and without a prefix; expected it once")
        if _MASK.fullmatch(name):
            _check_mask(given, tensor)
            continue
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{USER}: {given} has {tensor.dtype}; expected float32, bfloat16 or float16")
        state[name] = tensor.detach()
    return state


def _is_plain(tensor: Any) -> bool:
    """Return True if `tensor` is a dense `Tensor` or `nn.Parameter` with values: not sparse, nested or on "meta"."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_nested:
        return False
    return tensor.layout == torch.strided and not tensor.is_meta


def _check_mask(name: str, mask: Tensor) -> None:
    """Raise `ValueError` unless `mask` is a causal mask [1, 1, T, T], nonzero where a token may attend.

    This library's model has no other mask. `name` is the mask's name in the state dict, for the message.
    """
    n = mask.shape[-1] if mask.dim() == 4 else 0
    positions = torch.arange(n, device=mask.device)
    if mask.shape != (1, 1, n, n) or not torch.equal(mask[0, 0] != 0, positions[:, None] >= positions):
        raise ValueError(f"{USER}: {name} is {described(mask)} that is no causal mask; expected one [1, 1, T, T]")


def _is_tied(state: dict[str, Tensor]) -> bool:
    """Return True if the output layer's weight is the token embedding's, or has equal values.

    `state` has nanoGPT's names, and files may keep two copies. The result is True, too, if one of the two weights is
    missing. It is False if their shapes, dtypes or devices differ.
    """
    output, table = state.get(_OUTPUT), state.get(_TABLE)
    if output is None or table is None:
        return True  # `build` names what is missing
    if output.shape != table.shape or output.dtype != table.dtype or output.device != table.device:
        return False
    return (output.data_ptr(), output.stride()) == (table.data_ptr(), table.stride()) or torch.equal(output, table)


def _names(config: GPTConfig) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return {nanoGPT's name: (our name, nanoGPT's shape)} of each tensor, in the order of nanoGPT's state dict.

    Biases are included only if `config.bias`.
    """
    V, T, C = config.num_tokens, config.seq_len, config.hidden_dim
    names: dict[str, tuple[str, tuple[int, ...]]] = {
        _TABLE: ("trunk.token_emb.weight", (V, C)),
        _POSITIONS: ("trunk.pos_emb", (T, C)),
    }

    def add(theirs: str, ours: str, shape: tuple[int, ...]) -> None:
        """Add the weight of a layer with this shape to `names` and, if the configuration has biases, its bias.

        `names` and the configuration are those of the enclosing function. `theirs` is nanoGPT's name of the layer.
        `ours` is put in front of "weight" and "bias" in this library's names. The bias has the first size of `shape`.
        """
        names[f"{theirs}.weight"] = (f"{ours}weight", shape)
        if config.bias:
            names[f"{theirs}.bias"] = (f"{ours}bias", shape[:1])

    for i in range(config.num_layers):
        theirs, ours = f"transformer.h.{i}.", f"trunk.decoders.{i}."
        for (their_norm, our_norm), linears in zip(_NORMS, (_LINEARS[:2], _LINEARS[2:]), strict=True):
            add(theirs + their_norm, f"{ours}{our_norm}.", (C,))
            for linear, our_linear, rows, columns in linears:
                add(theirs + linear, ours + our_linear, (rows * C, columns * C))
    add("transformer.ln_f", "trunk.final_norm.", (C,))
    names[_OUTPUT] = ("output_layer.weight", (V, C))
    return names


def _listed(names: list[Any]) -> str:
    """Return the first three names, with commas between them, as text for a message, and how many more there are.

    Names are cut to 80 characters.
    """
    shown = ", ".join(name[:80] if isinstance(name, str) else _shown(name) for name in names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _shown(value: Any) -> str:
    """Return a value as text for a message: the repr of a number, bool or string, and "of type <class>" for others.

    Strings are cut to 40 characters. Integers of more than 128 bits appear by their number of bits, because Python
    refuses to write very long ones.
    """
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length():,} bits"
    plain = isinstance(value, int | float | str | bool)
    return repr(value[:40] if isinstance(value, str) else value) if plain else described(value)
