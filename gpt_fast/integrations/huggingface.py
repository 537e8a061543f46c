"""transformers' GPT-2 and GPT-1 to this library's models and back, weight for weight.

GPT-2 is the pre-norm model, GPT-1 ("openai-gpt") the post-norm one. Their `Conv1D` stores matrices transposed.
OpenAI's original TensorFlow layout of GPT-2 is not read; transformers converts it.
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch

from ..config import GPTConfig

# transformers' name of an activation → ours. GPT-1's "gelu" is the tanh approximation.
_GPT2_ACTIVATIONS = {"relu": "relu", "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
_GPT1_ACTIVATIONS = {"relu": "relu", "gelu": "gelu_tanh"}
# Options of GPT2Config that change the function, and the only value this library has.
_GPT2_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}

_BLOCK = (  # ours, transformers', transposed
    ("multihead_attn.in_proj_weight", "attn.c_attn.weight", True),
    ("multihead_attn.in_proj_bias", "attn.c_attn.bias", False),
    ("multihead_attn.out_proj.weight", "attn.c_proj.weight", True),
    ("multihead_attn.out_proj.bias", "attn.c_proj.bias", False),
    ("layer_norm1.weight", "ln_1.weight", False),
    ("layer_norm1.bias", "ln_1.bias", False),
    ("ff.0.weight", "mlp.c_fc.weight", True),
    ("ff.0.bias", "mlp.c_fc.bias", False),
    ("ff.3.weight", "mlp.c_proj.weight", True),
    ("ff.3.bias", "mlp.c_proj.bias", False),
    ("layer_norm2.weight", "ln_2.weight", False),
    ("layer_norm2.bias", "ln_2.bias", False),
)


def from_hf(head_class: type, model: Any) -> Any:
    """See `GPTForCausalLM.from_hf`."""
    transformers = _transformers()
    if isinstance(model, str | os.PathLike):
        model = transformers.AutoModelForCausalLM.from_pretrained(model, use_safetensors=True)
    if not isinstance(model, transformers.GPT2LMHeadModel | transformers.OpenAIGPTLMHeadModel):
        raise TypeError(
            f"from_hf: got {type(model).__name__}, wanted transformers' GPT2LMHeadModel or OpenAIGPTLMHeadModel, "
            "or a folder of one"
        )
    config = _config_from_hf(model.config)
    head = head_class(config).to(model.dtype)
    theirs, ours = model.state_dict(), head.state_dict()
    with torch.no_grad():
        for name, their_name, transposed in _names(config):
            tensor = theirs[their_name]
            ours[name].copy_((tensor.t() if transposed else tensor).reshape(ours[name].shape))
    return head.to(model.device).train(model.training)


def to_hf(head: Any) -> Any:
    """See `GPTForCausalLM.to_hf`."""
    transformers = _transformers()
    config = head.config
    hf_config = _config_to_hf(config, transformers)
    kind = transformers.GPT2LMHeadModel if config.pre_norm else transformers.OpenAIGPTLMHeadModel
    model = kind(hf_config).to(head.trunk.pos_emb.dtype)
    ours, theirs = head.state_dict(), model.state_dict()
    with torch.no_grad():
        for name, their_name, transposed in _names(config):
            tensor = ours[name].t() if transposed else ours[name]
            theirs[their_name].copy_(tensor.reshape(theirs[their_name].shape))
    return model.to(head.trunk.pos_emb.device).train(head.training)


def _transformers() -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise RuntimeError("gpt_fast: transformers is not installed: pip install gpt-fast[hf]")
    import transformers

    return transformers


def _names(config: GPTConfig) -> Iterator[tuple[str, str, bool]]:
    """(our name, transformers' name, whether theirs is transposed) of every tensor, tied ones once."""
    tokens, positions = ("wte", "wpe") if config.pre_norm else ("tokens_embed", "positions_embed")
    yield "trunk.token_emb.weight", f"transformer.{tokens}.weight", False
    yield "trunk.pos_emb", f"transformer.{positions}.weight", False
    for i in range(config.num_layers):
        for ours, theirs, transposed in _BLOCK:
            yield f"trunk.decoders.{i}.{ours}", f"transformer.h.{i}.{theirs}", transposed
    if config.pre_norm:
        yield "trunk.final_norm.weight", "transformer.ln_f.weight", False
        yield "trunk.final_norm.bias", "transformer.ln_f.bias", False
    if not config.tied:
        yield "output_layer.weight", "lm_head.weight", False


def _config_from_hf(theirs: Any) -> GPTConfig:
    pre_norm = theirs.model_type == "gpt2"
    activations = _GPT2_ACTIVATIONS if pre_norm else _GPT1_ACTIVATIONS
    activation = theirs.activation_function if pre_norm else theirs.afn
    if activation not in activations:
        raise ValueError(f"from_hf: activation is {activation!r}, wanted one of {', '.join(activations)}")
    for option, wanted in _GPT2_FIXED.items() if pre_norm else ():
        got = getattr(theirs, option)
        if got != wanted:
            raise ValueError(f"from_hf: {option} is {got}, wanted {wanted}: this library has no other attention")
    return GPTConfig(
        num_tokens=theirs.vocab_size,
        hidden_dim=theirs.n_embd,
        num_heads=theirs.n_head,
        num_layers=theirs.n_layer,
        seq_len=theirs.n_positions,
        ff_dim=getattr(theirs, "n_inner", None) or 0,
        activation=activations[activation],
        pre_norm=pre_norm,
        tied=theirs.tie_word_embeddings,
        layer_norm_eps=theirs.layer_norm_epsilon,
        embedding_dropout=theirs.embd_pdrop,
        attention_dropout=theirs.attn_pdrop,
        residual_dropout=theirs.resid_pdrop,
        init_std=theirs.initializer_range,
        scaled_init=pre_norm,
        pad_token=theirs.pad_token_id,
    )


def _config_to_hf(config: GPTConfig, transformers: Any) -> Any:
    activations = _GPT2_ACTIVATIONS if config.pre_norm else _GPT1_ACTIVATIONS
    kind = "GPT2LMHeadModel" if config.pre_norm else "OpenAIGPTLMHeadModel"
    names = {ours: theirs for theirs, ours in reversed(activations.items())}
    lacking = [
        problem
        for problem, there in (
            ("an output bias", config.output_bias),
            ("layers without bias", not config.bias),
            (f"dropout {config.ff_dropout} on the hidden activation", config.ff_dropout > 0),
            (f"activation {config.activation}", config.activation not in names),
            (f"ff_dim {config.ff_dim}", not config.pre_norm and config.ff_dim != 4 * config.hidden_dim),
        )
        if there
    ]
    if lacking:
        raise ValueError(f"to_hf: transformers' {kind} cannot hold {', '.join(lacking)}")
    common = {
        "vocab_size": config.num_tokens, "n_positions": config.seq_len, "n_embd": config.hidden_dim,
        "n_layer": config.num_layers, "n_head": config.num_heads, "layer_norm_epsilon": config.layer_norm_eps,
        "embd_pdrop": config.embedding_dropout, "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.residual_dropout, "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied, "pad_token_id": config.pad_token, "bos_token_id": config.start_token,
        "eos_token_id": None,
    }  # fmt: skip
    if config.pre_norm:
        inner = None if config.ff_dim == 4 * config.hidden_dim else config.ff_dim
        return transformers.GPT2Config(**common, activation_function=names[config.activation], n_inner=inner)
    return transformers.OpenAIGPTConfig(**common, afn=names[config.activation])
