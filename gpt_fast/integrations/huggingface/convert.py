"""transformers' GPT-2 and GPT-1 to this library's models and back, weight for weight.

GPT-2 is the pre-norm model, GPT-1 ("openai-gpt") the post-norm one. Their `Conv1D` stores matrices transposed.
OpenAI's original TensorFlow layout of GPT-2 is out of scope; transformers converts it.
"""

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from gpt_fast_settings.documents import read_object

from ... import _activations
from ...config import GPTConfig
from ..nanogpt import checkpoint
from . import guard, hub

_SMALL = 10**8  # numbers that every machine has memory for
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
_PICKLED = "pytorch_model.bin"
_OUTPUT, _OUTPUT_BIAS = "lm_head.weight", "lm_head.bias"
# The fields of our configuration that change what the trunk computes.
_COMPUTES = {
    "num_tokens", "hidden_dim", "num_heads", "num_layers", "seq_len", "ff_dim", "activation", "pre_norm", "bias",
    "layer_norm_eps",
}  # fmt: skip
# Options that decide which parameters a head has.
_MAKES_ROOM = {"lm_weight", "classifier_bias", "output_bias"}

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
    """Return a model of the class `kind` with the weights of a GPT-2 or GPT-1 of transformers.

    `model` is a model of transformers, a folder of one, or its name on the hub. `overrides` are fields of `GPTConfig`
    that replace those of the model's configuration. The result has the dtype, device and train flag of `model`.
    Parameters that `model` lacks, such as a new classifier, are drawn at random. Weights of a head that `kind` does not
    have are left out.

    Raise `TypeError` for a model of another class. Raise `ValueError` if the model is not what its configuration says,
    or has an option that this library lacks. Raise `ValueError` also if the outputs of the two models differ without a
    reason in `overrides`.

    If `kind` is the counterpart of the model's class, a weight that would be lost raises `ValueError`, too. This check
    is skipped if `overrides` has a field that decides which parameters the head has, with any value: `lm_weight` (the
    weight of the language model's loss), `classifier_bias` or `output_bias`.
    """
    transformers = _transformers()
    if isinstance(model, str | os.PathLike):
        model = _load(transformers, model)
    name = type(model).__name__
    if type(model) not in {getattr(transformers, theirs) for pair in _KINDS.values() for theirs in pair if theirs}:
        raise TypeError(
            f"from_hf: got {name}; expected one of transformers' GPT-2 or GPT-1 models "
            "(GPT2LMHeadModel, OpenAIGPTLMHeadModel, …), or a folder of one"
        )
    causal = guard.is_causal(model.config)
    is_counterpart = our_class(name, causal) == kind.__name__
    if not causal and not is_counterpart and name in _KINDS.get(kind.__name__, ()):
        _refuse("from_hf", f"is_causal is False; expected True for {kind.__name__}: GPTForMaskedLM sees both sides")
    held = _config_from_hf(model.config, name)
    tie = (_OUTPUT, "transformer.wte.weight" if held.pre_norm else "transformer.tokens_embed.weight")
    _refuse("from_hf", guard.why_changed(model, guard.make_theirs(model), tie, spare=_OUTPUT_BIAS))
    theirs = dict(model.named_parameters(remove_duplicate=False))
    if _OUTPUT in theirs:
        held = held.replace(tied=theirs[_OUTPUT] is theirs[tie[1]], output_bias=_OUTPUT_BIAS in theirs)
    config = held.replace(**overrides)
    if config.tied and not held.tied and _OUTPUT in theirs:
        _refuse("from_hf", f"tied is True; expected False, as {_OUTPUT} is not the token embedding")
    with torch.device("meta"):  # draws no weights that would be overwritten, whatever the default device is
        ours = kind(config)
    ours = ours.to(model.dtype).to_empty(device=model.device)
    wanted = ours.state_dict()
    pairs = [(their_name, our_name, transposed) for our_name, their_name, transposed in _pairs(wanted, theirs, ours)]
    copied = {our_name for _, our_name, _ in pairs} | ({"output_layer.weight"} if config.tied else set())
    if hasattr(ours, "draw_weights"):
        ours.draw_weights([name for name in wanted if name not in copied])
    _copy("from_hf", theirs, wanted, pairs)
    if is_counterpart and not overrides.keys() & _MAKES_ROOM:
        _refuse("from_hf", _why_left_out(theirs, [pair[0] for pair in pairs], kind.__name__))
    changed = {field for field, value in held.to_dict().items() if getattr(config, field) != value}
    if not changed & _COMPUTES:  # else the caller asks for another function
        whole = is_counterpart and not changed
        _refuse("from_hf", _computes(guard.why_other_outputs(model, ours, whole)))
    return ours.train(model.training)


def to_hf(ours: Any) -> Any:
    """Return transformers' model with copies of the weights of `ours`, a model of this library.

    The class is that of GPT-2 with this head if `ours` is pre-norm, else that of GPT-1. The result has the dtype,
    device and train flag of `ours`. Raise `ValueError` if transformers has no such model, if a module of `ours` is not
    what its configuration says, or if the outputs of both models differ.
    """
    transformers = _transformers()
    config: GPTConfig = ours.config
    name = _KINDS.get(type(ours).__name__, (None, None))[0 if config.pre_norm else 1]
    if name is None:
        block = "pre-norm" if config.pre_norm else "post-norm"
        raise ValueError(
            f"to_hf: transformers has no {block} {type(ours).__name__}; expected one of {', '.join(_KINDS)}"
        )
    tie = ("output_layer.weight", "trunk.token_emb.weight")
    _refuse("to_hf", guard.why_changed(ours, guard.make_ours(ours), tie))
    if hasattr(ours, "output_layer"):
        config = config.replace(tied=ours.is_tied())
    hf_config = _config_to_hf(config, name, transformers)
    if type(ours).__name__ == "GPTForMaskedLM":
        hf_config.is_causal = False
    parameter = next(ours.parameters())
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):  # its weights are drawn and overwritten
        model = getattr(transformers, name)(hf_config)
    model = model.to(parameter.dtype).to(parameter.device)
    tensors, wanted = dict(ours.named_parameters(remove_duplicate=False)), model.state_dict()
    pairs = list(_pairs(tensors, wanted, ours))
    _copy("to_hf", tensors, wanted, pairs)
    _refuse("to_hf", _why_left_out(tensors, [pair[0] for pair in pairs], name))
    _refuse("to_hf", _computes(guard.why_other_outputs(model, ours, whole=True)))
    return model.train(ours.training)


def _refuse(user: str, reason: str | None) -> None:
    """Raise `ValueError` if there is a `reason`. `user` is the name of the public function for the message."""
    if reason is not None:
        raise ValueError(f"gpt_fast.{user}: {reason}")


def _copy(user: str, source: Any, target: Any, pairs: list[tuple[str, str, bool]]) -> None:
    """Copy tensors of the dict `source` into the tensors of the dict `target`, in place.

    `pairs` holds (name in `source`, name in `target`, True to transpose the source tensor). Leading dimensions of size
    1 do not count: [T, C] fits [1, T, C]. `user` is the name of the public function for the message. Raise `ValueError`
    if shapes do not fit.
    """
    with torch.no_grad():
        for name, to, transposed in pairs:
            tensor = source[name].t() if transposed else source[name]
            shape = target[to].shape
            n = min(tensor.dim(), len(shape))  # ours has the positions as [1, T, C]
            if tensor.shape[-n:] != shape[-n:]:
                given, expected = list(source[name].shape), list(shape)
                _refuse(user, f"{name} has shape {given}; expected the numbers of {to} {expected} in the configuration")
            target[to].copy_(tensor.reshape(shape))


def _why_left_out(tensors: dict[str, Any], used: list[str], kind: str) -> str | None:
    """Return why a conversion would lose parameters, or None if it loses none.

    `tensors` maps names to parameters, and `used` names the ones that are copied. A parameter that is the same object
    as a copied one, such as a tied weight, is not lost. `kind` is the name of the target's class, for the message.
    """
    copied = {id(tensors[name]) for name in used}
    lost = [name for name, tensor in tensors.items() if id(tensor) not in copied]
    if not lost:
        return None
    room = "lm_weight=0.5 to make room for it, or lm_weight=0.0 to leave it out"
    return f"{', '.join(lost)} has no place in {kind}; expected {room if 'Multiple' in kind else 'a model without it'}"


def _computes(reason: str | None) -> str | None:
    """Return the message "the model computes something else than its copy: reason", or None if `reason` is None.

    `reason` says how the outputs of the model and its copy differ.
    """
    return None if reason is None else f"the model computes something else than its copy: {reason}; expected equal ones"


def is_transformers_folder(config: dict[str, Any]) -> bool:
    """Return True if `config`, the content of a `config.json`, has the `model_type` "gpt2" or "openai-gpt"."""
    return config.get("model_type") in ("gpt2", "openai-gpt")


def our_class(architecture: str, causal: bool = True) -> str:
    """Return the name of this library's class for transformers' class `architecture`.

    It is the head that holds all weights of that class, or "GPTModel" (the trunk) if there is none. If `causal` is
    False, it is "GPTForMaskedLM" for "GPT2LMHeadModel".
    """
    if architecture == _KINDS["GPTForMaskedLM"][0] and not causal:
        return "GPTForMaskedLM"
    for ours, theirs in _KINDS.items():
        if architecture in theirs and ours != "GPTForMaskedLM":
            return ours
    return "GPTModel"


def _transformers() -> Any:
    """Import transformers and return it; raise `RuntimeError` if it is not installed."""
    if importlib.util.find_spec("transformers") is None:
        raise RuntimeError("gpt_fast: transformers is not installed: pip install gpt-fast[hf]")
    import transformers

    return transformers


def _load(transformers: Any, folder: Any) -> Any:
    """Return transformers' model in a folder, or of a name on the hub, by the class that saved it.

    If that class is unknown, it is loaded as a language model. `transformers` is the imported package. Every weight has
    to be there: nothing is filled at random. Nothing is unpickled but tensors, by the reader of nanoGPT's checkpoints.
    Raises `TypeError` for a model other than GPT-2 and GPT-1, and `OSError` if there is no such folder or name. Raises
    `ValueError` for a wrong config.json, and for damaged, missing, quantised or unexpected weights.
    """
    from huggingface_hub.errors import StrictDataclassError

    local, is_folder = hub.is_local(folder), os.path.isdir(folder)
    if is_folder:
        if not (Path(folder) / "config.json").is_file():
            raise FileNotFoundError(f"gpt_fast.from_hf: {folder} has no config.json; expected a model's folder")
        read_object(Path(folder) / "config.json")  # transformers sets no limits to it
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=local)
    except StrictDataclassError as error:
        raise ValueError(f"gpt_fast.from_hf: {folder} has a config.json with a wrong value: {error}") from error
    except OSError as error:
        raise hub.not_found(folder, local, error) from error
    if config.model_type not in ("gpt2", "openai-gpt"):
        raise TypeError(f"from_hf: {folder} holds a {config.model_type} model; expected gpt2 or openai-gpt")
    if getattr(config, "quantization_config", None) is not None:
        _refuse("from_hf", f"{folder} holds quantised weights; expected a model in floating point")
    names = [name for name in config.architectures or [] if any(name in pair for pair in _KINDS.values())]
    try:
        ours = _config_from_hf(config, names[0] if names else "")  # transformers has a KeyError for some of its errors
    except ValueError as error:
        raise ValueError(f"gpt_fast.from_hf: {folder}: {str(error).removeprefix('gpt_fast.from_hf: ')}") from None
    if is_folder:
        _check_size(ours, Path(folder))
    kind = getattr(transformers, names[0]) if len(names) == 1 else transformers.AutoModelForCausalLM
    logging = transformers.utils.logging
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # its report of the keys would repeat ours
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        pickled = _pickled_weights(folder)
        if pickled is None:
            options |= {"use_safetensors": True, "local_files_only": local}
            model, info = kind.from_pretrained(folder, **options)
        else:
            model, info = kind.from_pretrained(None, config=config, state_dict=pickled, **options)
    except (SafetensorError, MemoryError) as error:  # MemoryError for a file that is too long to be mapped
        raise ValueError(
            f"gpt_fast.from_hf: {folder} has broken safetensors ({error}); expected whole files"
        ) from error
    finally:
        logging.set_verbosity(verbosity)
    for what, keys in (
        ("lacks", info["missing_keys"]),
        ("has", {name for name in info["unexpected_keys"] if guard.UNREAD.search(name) is None}),
        ("has another shape of", {name for name, *_ in info["mismatched_keys"]}),
    ):
        if keys:
            listed = ", ".join(sorted(keys))
            _refuse("from_hf", f"{folder} {what} {listed}; expected all weights of its {kind.__name__}")
    return model


def _check_size(config: GPTConfig, folder: Path) -> None:
    """Raise `ValueError` if the trunk of `config` has more parameters than the weight files in `folder` have bytes.

    The files are *.safetensors and *.bin. A damaged configuration could take all memory. Trunks of up to 10^8
    parameters pass.
    """
    found = sum(path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))
    if (expected := config.trunk_parameters()) > max(found, _SMALL):
        _refuse("from_hf", f"{folder} has {found:,} bytes of weights; expected {expected:,} numbers by config.json")


def _pickled_weights(folder: Any) -> dict[str, torch.Tensor] | None:
    """Return the tensors, by name, of a folder with pytorch_model.bin, whole or in several files, and no safetensors.

    The result is None if the folder has safetensors, or if `folder` is no folder but a name on the hub. Raises
    `FileNotFoundError` for a folder with neither kind of file, and `ValueError` for a damaged file or index.
    """
    path = Path(folder)
    if not path.is_dir() or any(path.glob("*.safetensors")):
        return None
    index = path / f"{_PICKLED}.index.json"
    names = [_PICKLED]
    if index.is_file():
        weight_map = read_object(index).get("weight_map")
        files = list(weight_map.values()) if isinstance(weight_map, dict) else []
        if not files or any(not isinstance(name, str) or Path(name).name != name for name in files):
            raise ValueError(f"{index}: expected a weight_map from tensors to files of this folder")
        names = sorted(set(files))
    elif not (path / _PICKLED).is_file():
        raise FileNotFoundError(f"{folder}: has neither model.safetensors nor {_PICKLED}; expected a model's weights")
    return {name: tensor for file in names for name, tensor in checkpoint.read_tensors(path / file).items()}


def _pairs(ours: dict[str, Any], theirs: dict[str, Any], model: Any) -> Iterator[tuple[str, str, bool]]:
    """Yield (our name, transformers' name, True if theirs is transposed) of each tensor that a conversion copies.

    These are all tensors of the trunk, then those of the output layer and of the classifier that both sides have.
    `ours` and `theirs` map the names of each side to tensors, which are not read. `model` is this library's model.
    """
    config = model.config
    our_trunk = "trunk." if "trunk.pos_emb" in ours else ""
    their_trunk = "transformer." if any(name.startswith("transformer.") for name in theirs) else ""
    for our_name, their_name, transposed in _trunk_names(config):
        yield our_trunk + our_name, their_trunk + their_name, transposed
    layers = (("output_layer", "lm_head"), ("classifier", _CLASSIFIER.get(type(model).__name__)))
    for our_layer, their_layer in layers:
        for part in ("weight", "bias"):
            if f"{our_layer}.{part}" in ours and f"{their_layer}.{part}" in theirs:
                yield f"{our_layer}.{part}", f"{their_layer}.{part}", False


def _trunk_names(config: GPTConfig) -> Iterator[tuple[str, str, bool]]:
    """Yield (our name, transformers' name, True if theirs is transposed) of each tensor of a model without its head.

    The names are those of GPT-2 if `config.pre_norm`, else of GPT-1, without the trunk's prefix.
    """
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
    """Return {this library's name of an activation: transformers' names}, for GPT-2 if `pre_norm`, else for GPT-1.

    An activation that transformers' model does not have is left out.
    """
    names = {name: row.gpt2 if pre_norm else row.gpt1 for name, row in _activations.ACTIVATIONS.items()}
    return {ours: theirs for ours, theirs in names.items() if theirs}


def _config_from_hf(theirs: Any, kind: str) -> GPTConfig:
    """Return the `GPTConfig` for `theirs`, a configuration of transformers.

    `kind` is the name of the model class of transformers that it belongs to, such as "GPT2LMHeadModel". Raises
    `ValueError` for an activation or an option that this library does not have.
    """
    pre_norm = theirs.model_type == "gpt2"
    names = _activation_names(pre_norm)
    activations = {theirs: ours for ours, all_theirs in names.items() for theirs in all_theirs}
    activation = theirs.activation_function if pre_norm else theirs.afn
    if activation not in activations:
        raise ValueError(f"from_hf: activation is {activation!r}; expected one of {', '.join(activations)}")
    for option, wanted in _GPT2_FIXED.items() if pre_norm else ():
        got = getattr(theirs, option)
        if got != wanted:
            raise ValueError(f"from_hf: {option} is {got}; expected {wanted}: this library has no other attention")
    return GPTConfig(
        num_tokens=theirs.vocab_size,
        hidden_dim=theirs.n_embd,
        num_heads=theirs.n_head,
        num_layers=theirs.n_layer,
        seq_len=theirs.n_positions,
        ff_dim=(pre_norm and theirs.n_inner) or 0,  # GPT-1 has 4 C
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
        start_token=_in_vocabulary(theirs, theirs.bos_token_id),
        end_token=_in_vocabulary(theirs, theirs.eos_token_id),
        **_head_from_hf(theirs, kind),
    )


def _in_vocabulary(theirs: Any, token: Any) -> int | None:
    """Return the id of a special token if it is in the vocabulary of transformers' configuration `theirs`, else None.

    `token` is an id, a list of ids, of which the first counts, or None. The configuration of a small model may still
    have the ids of GPT-2, which are then beyond its vocabulary.
    """
    if isinstance(token, list) and token:
        token = token[0]
    return token if isinstance(token, int) and 0 <= token < theirs.vocab_size else None


def _label_names(theirs: Any) -> tuple[str, ...]:
    """Return the names of the labels in transformers' configuration `theirs`, in the order of their ids.

    The result is () if the names are transformers' defaults LABEL_0, LABEL_1, ….
    """
    names = tuple(str(theirs.id2label.get(i, f"LABEL_{i}")) for i in range(theirs.num_labels))
    return () if names == tuple(f"LABEL_{i}" for i in range(theirs.num_labels)) else names


def _head_from_hf(theirs: Any, kind: str) -> dict[str, Any]:
    """Return the fields of `GPTConfig` for the head of a model of transformers, whose configuration is `theirs`.

    `kind` is the name of the model's class, such as "GPT2ForSequenceClassification". The fields describe a classifier,
    such as `num_labels` and `classifier_dropout`. The result is empty for a class without a classifier. Raises
    `ValueError` for an option that this library does not have.
    """
    if kind in _CLASSIFIERS:
        return _classifier_from_hf(theirs)
    if kind in _CHOICES:
        return _choices_from_hf(theirs)
    if kind in _TAGGERS:
        return _tags_from_hf(theirs)
    return {"classifier_dropout": _own_dropout(theirs)} if kind in _ANSWERERS else {}


def _classifier_from_hf(theirs: Any) -> dict[str, Any]:
    """Return the fields of `GPTConfig` for a sequence classifier with transformers' configuration `theirs`.

    They are num_labels, label_names, problem, classifier_bias (False) and classifier_dropout. Without a `problem_type`,
    one label means regression and several mean classification. Raises `ValueError` for an unknown `problem_type`.
    """
    problem = theirs.problem_type or ("regression" if theirs.num_labels == 1 else "single_label_classification")
    if problem not in _PROBLEMS:
        raise ValueError(f"from_hf: problem_type is {problem!r}; expected one of {', '.join(_PROBLEMS)}")
    return {
        "num_labels": theirs.num_labels,
        "label_names": _label_names(theirs),
        "problem": _PROBLEMS[problem],
        "classifier_bias": False,
        "classifier_dropout": _own_dropout(theirs),
    }


def _own_dropout(theirs: Any) -> float:
    """Return the option `classifier_dropout` of transformers' configuration `theirs`, or 0.0 if it is missing.

    `to_hf` writes this option for heads that have no dropout in transformers.
    """
    return getattr(theirs, "classifier_dropout", None) or 0.0


def _choices_from_hf(theirs: Any) -> dict[str, Any]:
    """Return {"classifier_dropout": rate} for a multiple-choice model with transformers' configuration `theirs`.

    Raises `ValueError` for an option of its summary, such as a dropout after the classifier, that this library does not
    have.
    """
    for option, wanted in _SUMMARY.items():
        if getattr(theirs, option) != wanted:
            raise ValueError(f"from_hf: {option} is {getattr(theirs, option)!r}; expected {wanted!r}")
    last = getattr(theirs, "summary_last_dropout", 0)
    if last:
        _refuse(
            "from_hf", f"summary_last_dropout is {last}; expected 0: this library has no dropout after a classifier"
        )
    return {"classifier_dropout": theirs.summary_first_dropout}


def _tags_from_hf(theirs: Any) -> dict[str, Any]:
    """Return the fields of `GPTConfig` for a token classifier with transformers' configuration `theirs`.

    They are num_labels, label_names and classifier_dropout: the first of transformers' `classifier_dropout` and
    `hidden_dropout` that is set, else 0.1.
    """
    rates = [getattr(theirs, name, None) for name in ("classifier_dropout", "hidden_dropout")]
    return {
        "num_labels": theirs.num_labels,
        "label_names": _label_names(theirs),
        "classifier_dropout": next((rate for rate in rates if rate is not None), 0.1),  # as in transformers' class
    }


_PROBLEMS = {
    "regression": "regression",
    "single_label_classification": "classification",
    "multi_label_classification": "multi_label",
}


def _config_to_hf(config: GPTConfig, kind: str, transformers: Any) -> Any:
    """Return a configuration of transformers with the options of `config`.

    It is a `GPT2Config` if `config.pre_norm`, else an `OpenAIGPTConfig`. `kind` is the name of the model class of
    transformers that it is for, such as "GPT2LMHeadModel". `transformers` is the imported package. Raises `ValueError`
    if that class cannot hold some options of `config`; the message names all such options.
    """
    names = {ours: all_theirs[0] for ours, all_theirs in _activation_names(config.pre_norm).items()}
    classifies, chooses = kind in _CLASSIFIERS, kind in _CHOICES
    reads_each = kind in (*_TAGGERS, *_ANSWERERS)
    lacking = [
        problem
        for problem, there in (
            ("an output bias", config.output_bias and ("LMHead" in kind or (chooses and config.lm_weight > 0))),
            ("layers without bias", not config.bias),
            (f"dropout {config.ff_dropout} on the hidden activation", config.ff_dropout > 0),
            (f"activation {config.activation}", config.activation not in names),
            (f"ff_dim {config.ff_dim}", not config.pre_norm and config.ff_dim != 4 * config.hidden_dim),
            (
                "a classifier with bias (train with classifier_bias=False; gpt-fast finetune --convertible)",
                classifies and config.classifier_bias,
            ),
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
        "eos_token_id": config.end_token,
    }  # fmt: skip
    if classifies or reads_each:
        common |= {"num_labels": config.num_labels, "classifier_dropout": config.classifier_dropout}
        if config.label_names:
            common["id2label"] = dict(enumerate(config.label_names))
            common["label2id"] = {name: i for i, name in enumerate(config.label_names)}
    if classifies:
        common["problem_type"] = {ours: theirs for theirs, ours in _PROBLEMS.items()}[config.problem]
    if chooses:
        common |= _SUMMARY | {"summary_first_dropout": config.classifier_dropout}
    if config.pre_norm:
        inner = None if config.ff_dim == 4 * config.hidden_dim else config.ff_dim
        return transformers.GPT2Config(**common, activation_function=names[config.activation], n_inner=inner)
    return transformers.OpenAIGPTConfig(**common, afn=names[config.activation])
