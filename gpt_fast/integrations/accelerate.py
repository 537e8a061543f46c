"""`accelerate` and `restore`: models of other libraries on this library's ops, in place."""

import sys

import torch.nn as nn

from .. import _plain, layers
from .. import model as own
from . import torch_modules
from .handwritten import plan as handwritten
from .report import Patch, Report

SUPPORTED = (
    "transformers' GPT2Model, GPT2LMHeadModel, GPT2DoubleHeadsModel, GPT2ForSequenceClassification, "
    "GPT2ForTokenClassification, GPT2ForQuestionAnswering, OpenAIGPTModel, OpenAIGPTLMHeadModel, "
    "OpenAIGPTDoubleHeadsModel, OpenAIGPTForSequenceClassification; OPT, BioGPT, GPT-Neo and ImageGPT; "
    "the notes' TransformerDecoder; "
    "nn.TransformerEncoderLayer; blocks of GPT-2 with two norms, attention and an MLP, as in nanoGPT; and modules that "
    "contain one of them"
)


_ATTRIBUTES = "_gpt_fast_attributes"  # names of the instance attributes a patch added


def accelerate(model: nn.Module, *, strict: bool = False) -> Report:
    """Let a transformers GPT-2 or GPT-1, a GPT-2 of your own or `nn.TransformerEncoderLayer` run on `gpt_fast.ops`.

    The model changes in place. Classes, parameters and the state dict stay as they are. Hooks, adapters, checkpoints
    and copies keep working, because a module that is wrapped or has hooks is still called.

    Embeddings, attention, LayerNorm, MLP and the additions between them run as fused ops, which read the weights in
    place. In training with labels the language model's loss is computed without logits. The output computes its logits
    when they are read, or at once with `model(..., logits=True)`. Reading them after an update of the weights raises
    `RuntimeError`. Calls that ask for something the ops do not have (attention probabilities, cross-attention, a static
    cache) run as before, with a warning.

    A hand-written block is replaced only if its outputs, gradients and dropout on random inputs are those of a GPT
    block with the same submodules. If the block is not replaced as a whole, its attention, MLP and norms may be.

    Args:
        model: The model. It may contain supported modules, as a PEFT model or a `LightningModule` does. Besides GPT-2
            and GPT-1, transformers' OPT, BioGPT, GPT-Neo and ImageGPT are supported.
        strict: Raise if any module is left alone.

    Returns:
        `Report` of the modules that were replaced, and of the modules that were left alone and why. `restore` undoes
        the replacement.

    Raises:
        TypeError: `model` is no `nn.Module`, or contains no supported module.
        ValueError: With `strict=True`, a module would be left alone. The model stays as it was, as after any other
            failure.

    Example:
        ```python
        import gpt_fast
        from transformers import GPT2Config, GPT2LMHeadModel

        model = GPT2LMHeadModel(GPT2Config(vocab_size=100, n_positions=32, n_embd=64, n_layer=2, n_head=4))
        print(len(gpt_fast.accelerate(model).left))  # 0
        gpt_fast.restore(model)
        ```

    Note:
        Dropout is this library's: it has the same rates as PyTorch's and other random numbers. A query that may attend
        to no key, such as padding on the left, attends to nothing. A language-model loss over no label is 0.

        The docstrings of the ops state dtypes, precision and determinism.

        Source: transformers' `modeling_gpt2.py` and `modeling_openai.py`, and the modelling code of transformers' OPT,
        BioGPT, GPT-Neo and ImageGPT.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"gpt_fast.accelerate: model is a {type(model).__name__}; expected an nn.Module: {SUPPORTED}")
    report = Report()
    known, claimed = _plan_known(model, report)
    written = handwritten.plan(model, claimed, report, _apply, _undo)
    if known is None and written is None:
        raise TypeError(f"gpt_fast.accelerate: model is a {type(model).__name__}; expected one of {SUPPORTED}")
    patches = (known or []) + (written or [])
    if not patches and not report.left and not report.notes:
        report.notes.append("the model was accelerated already; nothing was changed")
    if strict and report.left:
        reasons = "; ".join(f"{entry.name} ({entry.kind}) {entry.reason}" for entry in report.left)
        raise ValueError(f"accelerate: strict=True, but {len(report.left)} modules would be left alone: {reasons}")
    done: list[nn.Module] = []
    try:
        for patch in patches:
            done.append(patch.module)
            _apply(patch)
    except BaseException:
        for module in done:
            _undo(module)
        raise
    return report


def restore(model: nn.Module) -> nn.Module:
    """Undo `accelerate` in place. The model then computes what it computed before, bit for bit.

    Args:
        model: The model. A model that is not accelerated stays as it is.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no `nn.Module`.
        ValueError: A forward was wrapped after `accelerate`, as mixed precision does in Hugging Face Accelerate.
            Nothing changes. Unwrap the model first.

    Example:
        ```python
        import torch
        import gpt_fast

        layer = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True)
        gpt_fast.accelerate(layer)
        print(gpt_fast.restore(layer) is layer)  # True
        ```
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"gpt_fast.restore: model is a {type(model).__name__}; expected an nn.Module")
    modules = [(name, module) for name, module in model.named_modules() if _plain.is_accelerated(module)]
    for name, module in modules:
        if not _plain.has_own_forward(module):
            raise ValueError(
                f"restore: the forward of {name or 'the model'} ({type(module).__name__}) was wrapped after "
                "accelerate; expected it as accelerate left it: unwrap the model first"
            )
    for _, module in modules:
        _undo(module)
    return model


def _apply(patch: Patch) -> None:
    """Set the forward and the instance attributes that `patch` plans on its module, and mark it as accelerated.

    `patch.forward` is None if only submodules are replaced; the module then keeps its forward. `patch.attributes` maps
    names to values. The names are recorded on the module for `_undo`.
    """
    vars(patch.module)[_ATTRIBUTES] = tuple(patch.attributes)
    for name, value in patch.attributes.items():
        vars(patch.module)[name] = value
    _plain.attach(patch.module, patch.forward)


def _undo(module: nn.Module) -> None:
    """Remove the forward, attributes and mark that `_apply` set on `module`. Without a patch it stays as it is."""
    for name in vars(module).pop(_ATTRIBUTES, ()):
        vars(module).pop(name, None)
    _plain.detach(module)


def _plan_known(model: nn.Module, report: Report) -> tuple[list[Patch] | None, set[nn.Module]]:
    """Return (patches, claimed) for the modules of `model` whose classes this library knows by name.

    `patches` is None if there is no such module. A module that is accelerated already, or is this library's own, adds
    no patch. `claimed` holds each known module and all modules inside it, so that they are not searched for
    hand-written code. `report` gets an entry for each module that is replaced or left alone, and a note if the model is
    this library's own. A `Patch` holds a module, its new forward and attributes to set.
    """
    patches: list[Patch] | None = None
    claimed: set[nn.Module] = set()
    for name, module in model.named_modules():
        if any(entry.name == name for entry in report.left):
            continue
        if isinstance(module, layers.TransformerDecoder | own._Trunk):
            report.notes = ["the model is this library's own and runs on its ops already"]
            planned: list[Patch] | None = []
        else:
            planned = [] if _plain.is_accelerated(module) else _plan(name, module, report)
        if planned is not None:
            claimed |= set(module.modules())
            patches = (patches or []) + planned
    return patches, claimed


def _plan(name: str, module: nn.Module, report: Report) -> list[Patch] | None:
    """Return the patches of `module` and its children if its class is known by name, or None if the class is unknown.

    The list is empty if the module is left alone. `name` is its path in the model. `report` gets an entry for each
    module that is replaced or left alone. A `Patch` holds a module, its new forward and attributes to set.
    """
    if "transformers" in sys.modules:  # else nothing here can be one of its models
        from .huggingface import plan

        planned = plan.plan(name, module, report)
        if planned is not None:
            return planned
    return torch_modules.plan(name, module, report)
