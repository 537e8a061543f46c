"""transformers' GPT-2 and GPT-1 to this library's models and back, weight for weight.

GPT-2 is the pre-norm model, GPT-1 ("openai-gpt") the post-norm one. Their `Conv1D` stores matrices transposed.
OpenAI's original TensorFlow layout of GPT-2 is out of scope; transformers converts it.
"""

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ... import _activations
from ...config import GPTConfig

# Options of GPT2Config that change the function, and the only value this library has.
_GPT2_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}
# Our class → transformers' for the pre-norm and for the post-norm model.
_KINDS = {
    "GPTModel": ("GPT2Model", "OpenAIGPTModel"),
    "GPTForCausalLM": ("GPT2LMHeadModel", "OpenAIGPTLMHeadModel"),
    "GPTForMaskedLM": ("GPT2LMHeadModel", None),  # with is_causal=False, which GPT-1 does not have
    "GPTForSequenceClassification": ("GPT2ForSequenceClassification", "OpenAIGPTForSequenceClassification"),
    "GPTForMultipleChoice": ("GPT2DoubleHeadsModel", "OpenAIGPTDoubleHeadsModel"),
    "GPTForTokenClassification": ("GPT2ForTokenClassification", None),  # GPT-1 has neither in transformers
    "GPTForQuestionAnswering": ("GPT2ForQuestionAnswering", None),
}
_CLASSIFIERS = _KINDS["GPTForSequenceClassification"]
_CHOICES = _KINDS["GPTForMultipleChoice"]
_TAGGERS = _KINDS["GPTForTokenClassification"]
_ANSWERERS = _KINDS["GPTForQuestionAnswering"]
# transformers' names of a classifier, weight and bias alike; sizes tell which of ours has a counterpart.
_CLASSIFIER = {
    "GPTForSequenceClassification": "score",
    "GPTForSimilarity": "score",
    "GPTForMultipleChoice": "multiple_choice_head.summary",
    "GPTForTokenClassification": "classifier",
    "GPTForQuestionAnswering": "qa_outputs",
}
# How transformers' double heads read a sequence, and the only way this library has.
_SUMMARY = {"summary_type": "cls_index", "summary_use_proj": True, "summary_activation": None}

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


def from_hf(kind: Any, model: Any, overrides: dict[str, Any]) -> Any:
    """Return a `kind` with the weights of one of transformers' models; see `Convertible.from_hf`."""
    transformers = _transformers()
    if isinstance(model, str | os.PathLike):
        model = _load(transformers, model)
    if not isinstance(model, transformers.PreTrainedModel) or model.config.model_type not in ("gpt2", "openai-gpt"):
        raise TypeError(
            f"from_hf: got {type(model).__name__}, wanted one of transformers' GPT-2 or GPT-1 models "
            "(GPT2LMHeadModel, OpenAIGPTLMHeadModel, …), or a folder of one"
        )
    ours = kind(_config_from_hf(model.config, type(model).__name__).replace(**overrides)).to(model.dtype)
    theirs, wanted = model.state_dict(), ours.state_dict()
    with torch.no_grad():
        for name, their_name, transposed in _pairs(wanted, theirs, ours):
            tensor = theirs[their_name].t() if transposed else theirs[their_name]
            if tensor.numel() != wanted[name].numel():
                raise ValueError(
                    f"from_hf: {their_name} has shape {list(theirs[their_name].shape)}, but the configuration makes "
                    f"{name} {list(wanted[name].shape)}"
                )
            wanted[name].copy_(tensor.reshape(wanted[name].shape))
    return ours.to(model.device).train(model.training)


def to_hf(ours: Any) -> Any:
    """Return transformers' model with the weights of `ours`; see `Convertible.to_hf`."""
    transformers = _transformers()
    config: GPTConfig = ours.config
    name = _KINDS.get(type(ours).__name__, (None, None))[0 if config.pre_norm else 1]
    if name is None:
        block = "pre-norm" if config.pre_norm else "post-norm"
        raise ValueError(f"to_hf: transformers has no {block} {type(ours).__name__}, wanted one of {', '.join(_KINDS)}")
    hf_config = _config_to_hf(config, name, transformers)
    if type(ours).__name__ == "GPTForMaskedLM":
        hf_config.is_causal = False
    parameter = next(ours.parameters())
    model = getattr(transformers, name)(hf_config).to(parameter.dtype)
    tensors, wanted = ours.state_dict(), model.state_dict()
    with torch.no_grad():
        for our_name, their_name, transposed in _pairs(tensors, wanted, ours):
            tensor = tensors[our_name].t() if transposed else tensors[our_name]
            wanted[their_name].copy_(tensor.reshape(wanted[their_name].shape))
    return model.to(parameter.device).train(ours.training)


def is_transformers_folder(config: dict[str, Any]) -> bool:
    """Whether a `config.json` is of a model that `from_hf` reads."""
    return config.get("model_type") in ("gpt2", "openai-gpt")


def our_class(architecture: str) -> str:
    """The head that holds all of one of transformers' classes, by name; the trunk where there is none."""
    for ours, theirs in _KINDS.items():
        if architecture in theirs and ours != "GPTForMaskedLM":
            return ours
    return "GPTModel"


def _transformers() -> Any:
    if importlib.util.find_spec("transformers") is None:
        raise RuntimeError("gpt_fast: transformers is not installed: pip install gpt-fast[hf]")
    import transformers

    return transformers


def _load(transformers: Any, folder: Any) -> Any:
    """The model in a folder, by the class that saved it. Nothing is unpickled."""
    config = transformers.AutoConfig.from_pretrained(folder)
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if len(names) == 1 else None
    if config.model_type not in ("gpt2", "openai-gpt"):
        raise TypeError(f"from_hf: {folder} holds a {config.model_type} model, wanted gpt2 or openai-gpt")
    kind = transformers.AutoModelForCausalLM if kind is None else kind
    return kind.from_pretrained(folder, use_safetensors=True)


def _pairs(ours: dict[str, Tensor], theirs: dict[str, Tensor], model: Any) -> Iterator[tuple[str, str, bool]]:
    """(our name, transformers' name, whether theirs is transposed) of every tensor both have, tied ones once."""
    config = model.config
    our_trunk = "trunk." if "trunk.pos_emb" in ours else ""
    their_trunk = "transformer." if any(name.startswith("transformer.") for name in theirs) else ""
    for our_name, their_name, transposed in _trunk_names(config):
        yield our_trunk + our_name, their_trunk + their_name, transposed
    if not config.tied and "output_layer.weight" in ours and "lm_head.weight" in theirs:
        yield "output_layer.weight", "lm_head.weight", False
    classifier = _CLASSIFIER.get(type(model).__name__)
    for part in ("weight", "bias"):
        if f"classifier.{part}" in ours and f"{classifier}.{part}" in theirs:
            yield f"classifier.{part}", f"{classifier}.{part}", False


def _trunk_names(config: GPTConfig) -> Iterator[tuple[str, str, bool]]:
    tokens, positions = ("wte", "wpe") if config.pre_norm else ("tokens_embed", "positions_embed")
    yield "token_emb.weight", f"{tokens}.weight", False
    yield "pos_emb", f"{positions}.weight", False
    for i in range(config.num_layers):
        for ours, theirs, transposed in _BLOCK:
            yield f"decoders.{i}.{ours}", f"h.{i}.{theirs}", transposed
    if config.pre_norm:
        yield "final_norm.weight", "ln_f.weight", False
        yield "final_norm.bias", "ln_f.bias", False


def _activation_names(pre_norm: bool) -> dict[str, tuple[str, ...]]:
    """Return the names in transformers' GPT-2 (pre-norm) or GPT-1 of each activation that it has."""
    names = {name: row.gpt2 if pre_norm else row.gpt1 for name, row in _activations.ACTIVATIONS.items()}
    return {ours: theirs for ours, theirs in names.items() if theirs}


def _config_from_hf(theirs: Any, kind: str) -> GPTConfig:
    pre_norm = theirs.model_type == "gpt2"
    names = _activation_names(pre_norm)
    activations = {theirs: ours for ours, all_theirs in names.items() for theirs in all_theirs}
    activation = theirs.activation_function if pre_norm else theirs.afn
    if activation not in activations:
        raise ValueError(f"from_hf: activation is {activation!r}; expected one of {', '.join(activations)}")
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
        start_token=_begins_texts(theirs),
        **_head_from_hf(theirs, kind),
    )


def _begins_texts(theirs: Any) -> int | None:
    """The id before a text, where the vocabulary has it: a small model's configuration may still have GPT-2's."""
    token = theirs.bos_token_id
    return token if token is not None and token < theirs.vocab_size else None


def _head_from_hf(theirs: Any, kind: str) -> dict[str, Any]:
    if kind in _CLASSIFIERS:
        return _classifier_from_hf(theirs)
    if kind in _CHOICES:
        return _choices_from_hf(theirs)
    if kind in _TAGGERS:
        return _tags_from_hf(theirs)
    return {"classifier_dropout": _own_dropout(theirs)} if kind in _ANSWERERS else {}


def _classifier_from_hf(theirs: Any) -> dict[str, Any]:
    problem = theirs.problem_type or ("regression" if theirs.num_labels == 1 else "single_label_classification")
    if problem not in _PROBLEMS:
        raise ValueError(f"from_hf: problem_type is {problem!r}, wanted one of {', '.join(_PROBLEMS)}")
    return {
        "num_labels": theirs.num_labels,
        "problem": _PROBLEMS[problem],
        "classifier_bias": False,
        "classifier_dropout": _own_dropout(theirs),
    }


def _own_dropout(theirs: Any) -> float:
    """What `to_hf` wrote for a head that has no dropout in transformers."""
    return getattr(theirs, "classifier_dropout", None) or 0.0


def _choices_from_hf(theirs: Any) -> dict[str, Any]:
    for option, wanted in _SUMMARY.items():
        if getattr(theirs, option) != wanted:
            raise ValueError(f"from_hf: {option} is {getattr(theirs, option)!r}, wanted {wanted!r}")
    return {"classifier_dropout": theirs.summary_first_dropout}


def _tags_from_hf(theirs: Any) -> dict[str, Any]:
    rates = [getattr(theirs, name, None) for name in ("classifier_dropout", "hidden_dropout")]
    return {
        "num_labels": theirs.num_labels,
        "classifier_dropout": next((rate for rate in rates if rate is not None), 0.1),  # as transformers' class has it
    }


_PROBLEMS = {"regression": "regression", "single_label_classification": "classification"}


def _config_to_hf(config: GPTConfig, kind: str, transformers: Any) -> Any:
    names = {ours: all_theirs[0] for ours, all_theirs in _activation_names(config.pre_norm).items()}
    classifies, chooses = kind in _CLASSIFIERS, kind in _CHOICES
    reads_each = kind in (*_TAGGERS, *_ANSWERERS)
    lacking = [
        problem
        for problem, there in (
            ("an output bias", config.output_bias and "LMHead" in kind),
            ("layers without bias", not config.bias),
            (f"dropout {config.ff_dropout} on the hidden activation", config.ff_dropout > 0),
            (f"activation {config.activation}", config.activation not in names),
            (f"ff_dim {config.ff_dim}", not config.pre_norm and config.ff_dim != 4 * config.hidden_dim),
            ("a classifier with bias (train with classifier_bias=False)", classifies and config.classifier_bias),
            ("a classifier without bias", (chooses or reads_each) and not config.classifier_bias),
            (
                "a free output layer that is not there (lm_weight 0)",
                chooses and not config.tied and not config.lm_weight,
            ),
            (f'pooling "{config.pooling}"', classifies and config.pooling != "last"),
            (f"a joint loss (lm_weight {config.lm_weight})", (classifies or reads_each) and config.lm_weight > 0),
        )
        if there
    ]
    if lacking:
        raise ValueError(f"to_hf: transformers' {kind} cannot hold {', '.join(lacking)}")
    common: dict[str, Any] = {
        "vocab_size": config.num_tokens, "n_positions": config.seq_len, "n_embd": config.hidden_dim,
        "n_layer": config.num_layers, "n_head": config.num_heads, "layer_norm_epsilon": config.layer_norm_eps,
        "embd_pdrop": config.embedding_dropout, "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.residual_dropout, "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied, "pad_token_id": config.pad_token, "bos_token_id": config.start_token,
        "eos_token_id": None,
    }  # fmt: skip
    if classifies or reads_each:
        common |= {"num_labels": config.num_labels, "classifier_dropout": config.classifier_dropout}
    if classifies:
        common["problem_type"] = {ours: theirs for theirs, ours in _PROBLEMS.items()}[config.problem]
    if chooses:
        common |= _SUMMARY | {"summary_first_dropout": config.classifier_dropout}
    if config.pre_norm:
        inner = None if config.ff_dim == 4 * config.hidden_dim else config.ff_dim
        return transformers.GPT2Config(**common, activation_function=names[config.activation], n_inner=inner)
    return transformers.OpenAIGPTConfig(**common, afn=names[config.activation])
