"""Guards of `from_hf` and `to_hf`: the model is what its configuration says, and both sides compute the same.

Both directions copy named weights into a new model of a configuration. Whatever a configuration cannot name (a hook, a
replaced module, another scale of attention, a further block) would be lost. `why_changed` finds it by comparison with a
new model of the same class, which lies on the meta device and costs no memory. `why_other_outputs` then runs both.
"""

import copy
import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ... import _plain

# Buffers in old files of transformers, which no forward reads any more.
UNREAD = re.compile(r"(^|\.)h\.\d+\.attn\.(bias|masked_bias)$")
# Attributes that an evaluation does not depend on.
_IGNORED = {
    "training", "gradient_checkpointing", "supports_gradient_checkpointing", "checkpoint_activations", "name_or_path",
    "layer_idx", "site",
}  # fmt: skip
_BEFORE_AUTOCAST = "_original_forward"  # where Hugging Face Accelerate keeps the forward that it wraps
_COMPARED = (bool, int, float, str, tuple, type(None), types.FunctionType, types.BuiltinFunctionType)


def make_theirs(model: Any) -> Any:
    """Return a new model of the class and configuration of transformers' `model`, on the meta device.

    The configuration is a copy with eager attention.
    """
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"  # the only one that needs no other package
    with torch.device("meta"):
        return type(model)(config)


def make_ours(model: Any) -> Any:
    """Return a new model of the class and configuration of this library's `model`, on the meta device."""
    with torch.device("meta"):
        return type(model)(model.config)


def is_causal(config: Any) -> bool:
    """Return True if models of transformers' `config` attend to earlier tokens only.

    They do for GPT-1. For GPT-2 the field `is_causal` decides, which counts as True if it is missing.
    """
    return config.model_type != "gpt2" or getattr(config, "is_causal", True)


def why_changed(model: Any, made: Any, tied: tuple[str, str], spare: str | None = None) -> str | None:
    """Return the first difference between `model` and `made`, a new model of its class and configuration, or None.

    Modules are compared by name, class, hooks and plain attributes, parameters by name and shape, and buffers by name,
    GPT-1's mask and positions by value too. Parameters of several dtypes count as a difference. So do two parameters
    that are one object, unless `tied` names these two. The model may have a parameter named `spare` although `made` has
    none.
    """
    return (
        _why_other_modules(model, made)
        or _why_other_parameters(model, made, spare)
        or _why_other_buffers(model, made)
        or _why_shared(model, tied)
    )


def _why_other_modules(model: Any, made: Any) -> str | None:
    """Return, as text, the first module of `model` that differs from the one in `made`, and how, or None.

    `made` is a new model of the same class and configuration. Modules are compared by name, class, hooks and public
    attributes with simple values (numbers, strings, tuples, functions, None).
    """
    modules, expected = (dict(each.named_modules(remove_duplicate=False)) for each in (model, made))
    for name, standard in expected.items():
        label, kind = name or "the model", type(standard)
        if name not in modules:
            return f"{label} is missing; expected a {kind.__name__}, as the configuration says"
        module = modules[name]
        reason = _why_not_plain(module, kind)
        if reason is not None:
            return f"{label} {reason}; expected a plain {kind.__name__}"
        for key, value in vars(standard).items():
            if key.startswith("_") or key in _IGNORED or not isinstance(value, _COMPARED):
                continue
            found = getattr(module, key, "missing")
            if not isinstance(found, _COMPARED) or found != value:
                return f"{label} has {key} {found!r}; expected {value!r}, as the configuration says"
    for name, module in modules.items():
        if name not in expected:
            return f"{name} is a {type(module).__name__}; expected no such module, as the configuration says"
    return None


def _why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """Return why a call of `module` runs anything besides the forward of the class `kind`, or None if it does not.

    Reasons are another class, a forward of its own, and hooks. Three changes do not count: hooks by which transformers
    records outputs, the forwards of `gpt_fast.accelerate`, and the autocast that Hugging Face Accelerate leaves around
    the forward of a trained model.
    """
    if type(module) is not kind:
        return f"is a {type(module).__module__}.{type(module).__qualname__}, not {kind.__name__}"
    forward = vars(module).get(_BEFORE_AUTOCAST, vars(module).get("forward"))
    if forward is not None and not _plain.is_attached(forward) and not _is_forward_of(kind, forward):
        return "has a forward of its own"
    hooks = [hook for name in _plain.HOOKS for hook in getattr(module, name).values()]
    if any(not str(getattr(hook, "__module__", "")).startswith("transformers.") for hook in hooks):
        return "has hooks"
    return None


def _is_forward_of(kind: Any, forward: Any) -> bool:
    """Return True if `forward`, a bound method, is that of the class `kind`, with or without its decorators.

    Hugging Face Accelerate removes the decorators when it takes its wrapper off a model.
    """
    function, of_class = getattr(forward, "__func__", None), kind.forward
    while of_class is not function and hasattr(of_class, "__wrapped__"):
        of_class = of_class.__wrapped__
    return of_class is function


def _why_other_parameters(model: Any, made: Any, spare: str | None) -> str | None:
    """Return, as text, the first parameter of `model` that differs from the one in `made`, and how, or None.

    `made` is a new model of the same class and configuration. Parameters are compared by name and shape. All have to be
    `nn.Parameter`s of one dtype. `spare` names a parameter that `model` may have although `made` has none.
    """
    parameters, expected = (dict(each.named_parameters(remove_duplicate=False)) for each in (model, made))
    first, dtype = next((name, parameter.dtype) for name, parameter in parameters.items())
    for name, standard in expected.items():
        if name not in parameters:
            return f"{name} is missing; expected a parameter {list(standard.shape)}, as the configuration says"
        if parameters[name].shape != standard.shape:
            return (
                f"{name} has shape {list(parameters[name].shape)}; expected {list(standard.shape)}, "
                "as the configuration says"
            )
    for name, parameter in parameters.items():
        if name not in expected and name != spare:
            return f"{name} is a parameter {list(parameter.shape)}; expected no such parameter"
        if type(parameter) is not nn.Parameter:
            return f"{name} is a {type(parameter).__name__}; expected a torch.nn.Parameter"
        if parameter.dtype != dtype:
            return f"{name} has dtype {parameter.dtype}; expected {dtype}, as {first} has"
    return None


def _why_other_buffers(model: Any, made: Any) -> str | None:
    """Return, as text, the first buffer of `model` that differs from the one in `made`, and how, or None.

    `made` is a new model of the same class and configuration. Buffers are compared by name. GPT-1's forward reads two,
    a causal mask and positions, which are compared by value, unless they are on the meta device. Buffers `attn.bias`
    and `attn.masked_bias` of old files may be there in addition.
    """
    buffers, expected = (dict(each.named_buffers(remove_duplicate=False)) for each in (model, made))
    for name in expected:
        if name not in buffers:
            return f"{name} is missing; expected a buffer, as in a new model"
    for name, buffer in buffers.items():
        if name not in expected:
            if UNREAD.search(name) is None:
                return f"{name} is a buffer {list(buffer.shape)}; expected no such buffer"
            continue
        if buffer.is_meta:
            continue
        n = buffer.shape[-1]
        positions = torch.arange(n, device=buffer.device)
        usual = positions if name.endswith("position_ids") else positions[:, None] >= positions
        if buffer.shape != expected[name].shape or not bool((buffer == usual).all()):
            return f"{name} has other values than a new model's; expected those"
    return None


def _why_shared(model: Any, tied: tuple[str, str]) -> str | None:
    """Return which two parameters of `model` are one object although they are not the two named in `tied`, or None."""
    names: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        before = names.setdefault(id(parameter), name)
        if before != name and {before, name} != set(tied):
            return f"{name} is the same parameter as {before}; expected two parameters"
    return None


@torch.no_grad()
def why_other_outputs(theirs: Any, ours: Any, whole: bool) -> str | None:
    """Return how the outputs of the two models differ on a few tokens, or None if they agree.

    `theirs` is transformers' model and `ours` is this library's. The last hidden states are compared and, if `whole`,
    the outputs of the heads too. The largest allowed error is relative: the square root of the dtype's eps. Both models
    run in evaluation mode, without autocast and gradients. Their modes and the random state stay as they are. Models on
    the meta device have no values, so the result for them is None.
    """
    trunk = getattr(ours, "trunk", ours)
    parameter = trunk.token_emb.weight
    if parameter.is_meta:
        return None
    tokens = _tokens(theirs, ours).to(parameter.device)
    with _evaluating(theirs, ours), torch.autocast(parameter.device.type, enabled=False):
        hidden = _call(theirs.base_model, tokens).last_hidden_state
        got = trunk(tokens, causal=is_causal(theirs.config))
        has_autocast = any(_BEFORE_AUTOCAST in vars(model) for model in (theirs, ours))
        tolerance = _tolerance(torch.bfloat16 if has_autocast else parameter.dtype)
        if not _agree(got, hidden, tolerance * _largest(hidden)):
            return f"the hidden states differ by {_difference(got, hidden)}"
        if not whole or ours is trunk:
            return None
        tolerance *= _largest(hidden.norm(dim=-1))
        outputs = zip(_outputs_of_ours(ours, tokens), _outputs_of_theirs(theirs, tokens), strict=False)
        for (scores, layer), expected in outputs:
            # Scores are products of hidden states and rows of the layer, and may cancel: no scale of their own.
            if not _agree(scores, expected, tolerance * _largest(layer.weight.norm(dim=-1))):
                return f"the outputs differ by {_difference(scores, expected)}"
    return None


def _tokens(theirs: Any, ours: Any) -> Tensor:
    """Return token ids [2, 4] from the whole vocabulary, without the padding token, for both models.

    `theirs` is transformers' model and `ours` is this library's. There are fewer columns if the models have fewer
    positions, and one row if transformers' class refuses a batch.
    """
    V, T, pad = ours.config.num_tokens, min(4, ours.config.seq_len), theirs.config.pad_token_id
    B = 1 if pad is None and "SequenceClassification" in type(theirs).__name__ else 2
    tokens = torch.arange(B * T).view(B, T) * max(1, V // (B * T)) % V
    return tokens if pad is None else torch.where(tokens == pad, (tokens + 1) % V, tokens)


def _call(theirs: Any, tokens: Tensor) -> Any:
    """Return the output object of transformers' model for tokens [B, T]. No key-value cache is made."""
    cache = {"use_cache": False} if theirs.config.model_type == "gpt2" else {}
    return theirs(tokens, return_dict=True, **cache)


def _outputs_of_theirs(theirs: Any, tokens: Tensor) -> list[Tensor]:
    """Return the outputs of the heads of `theirs`, transformers' model, for tokens [B, T], as a list.

    A model with two heads gives the multiple-choice logits [1, B] and then the language model's logits [B, T, V]. A
    model for question answering gives the logits of start and end as one tensor [B, 2, T]. Any other model gives its
    logits.
    """
    name = type(theirs).__name__
    if "DoubleHeads" in name:
        out = _call(theirs, tokens[None])  # one question with a choice in each row
        return [out.mc_logits, out.logits[0]]
    out = _call(theirs, tokens)
    return [torch.stack((out.start_logits, out.end_logits), 1) if "QuestionAnswering" in name else out.logits]


def _outputs_of_ours(ours: Any, tokens: Tensor) -> list[tuple[Tensor, Any]]:
    """Return (output, layer) for each head of `ours`, this library's model, and tokens [B, T].

    `layer` is the module that computes the output, and the outputs are logits. A multiple-choice model has two heads:
    the classifier and then the output layer of the language model, unless it lacks that layer. Any other model has one
    head.
    """
    if type(ours).__name__ != "GPTForMultipleChoice":
        return [(ours(tokens).logits, getattr(ours, "classifier", None) or ours.output_layer)]
    scores = [(ours(tokens[None]).logits, ours.classifier)]
    if hasattr(ours, "output_layer"):
        scores.append((ours.output_layer(ours.trunk(tokens)), ours.output_layer))
    return scores


@contextmanager
def _evaluating(*models: nn.Module) -> Iterator[None]:
    """Put every module of `models` into evaluation mode, and each back into its own mode afterwards."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _tolerance(dtype: torch.dtype) -> float:
    """Return the relative error that two ways to compute one result may have: the square root of the dtype's eps.

    float32 counts as bfloat16 if products of float32 matrices may be computed in lower precision.
    """
    if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        dtype = torch.bfloat16  # what products may be computed in
    return torch.finfo(dtype).eps ** 0.5


def _largest(x: Tensor) -> float:
    """Return the largest absolute value in `x` that is finite, or 0.0 if there is none."""
    finite = x[x.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def _agree(got: Tensor, expected: Tensor, tolerance: float) -> bool:
    """Return True if |got - expected| ≤ `tolerance` at each finite element of `expected`.

    Elements that overflow in transformers' model are not compared.
    """
    finite = expected.isfinite()
    return bool(((got.double() - expected.double())[finite].abs() <= tolerance).all())


def _difference(got: Tensor, expected: Tensor) -> str:
    """Return the largest |got - expected| and the largest finite |expected|, as text for a message.

    An example is "0.01 at most, of 3.2".
    """
    return f"{float((got.double() - expected.double()).abs().max()):.3g} at most, of {_largest(expected):.3g}"
