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

    The model changes in place. Classes, parameters and state dict stay what they are, and so do hooks, adapters,
    checkpoints and copies. A module that is wrapped or has hooks is called, never gone around.

    Embeddings, attention, LayerNorm, MLP and the additions between them run as fused ops, on the weights where they
    lie. In training with labels the language model's loss is computed without logits. The output computes them when
    they are read (or at once by `model(..., logits=True)`). Reading raises `RuntimeError` after an update of the
    weights. Calls that ask for something the ops do not have (attention probabilities, cross-attention, a static cache)
    run as before, with a warning.

    A block that somebody wrote is replaced only if its outputs, gradients and dropout on drawn inputs are those that
    its parts suggest. If a block as a whole is not, its attention, MLP and norms may be.

    Args:
        model: The model. It may contain supported modules, as a PEFT model or a `LightningModule` does.
        strict: Raise if any module is left alone.

    Returns:
        `Report` of the modules that were replaced, and of those that were left alone and why. `restore` undoes it.

    Raises:
        TypeError: Nothing in `model` is supported.
        ValueError: A module would be left alone with `strict=True`. The model is then as it was, as after any other
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
        Dropout is the library's: the same rates, other random numbers than PyTorch's. A query left without keys, as
        padding on the left is, attends to nothing. A language-model loss over no label is 0.

        The docstrings of the ops state dtypes, precision and determinism.

        Source: transformers' `modeling_gpt2.py` and `modeling_openai.py`, whose functions these are, and the modelling
        code of its OPT, BioGPT, GPT-Neo and ImageGPT.
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
    """Undo `accelerate`, in place, and return the model, which computes what it did before, bit for bit.

    Args:
        model: The model. One that is not accelerated stays as it is.

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
    vars(patch.module)[_ATTRIBUTES] = tuple(patch.attributes)
    for name, value in patch.attributes.items():
        vars(patch.module)[name] = value
    _plain.attach(patch.module, patch.forward)


def _undo(module: nn.Module) -> None:
    for name in vars(module).pop(_ATTRIBUTES, ()):
        vars(module).pop(name, None)
    _plain.detach(module)


def _plan_known(model: nn.Module, report: Report) -> tuple[list[Patch] | None, set[nn.Module]]:
    """Return the patches of classes that are known by name, None if there is none, and all modules inside them."""
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
    """Return the patches for one module and its children: none if it is left alone, None if it is unknown."""
    if "transformers" in sys.modules:  # else nothing here can be one of its models
        from .huggingface import plan

        planned = plan.plan(name, module, report)
        if planned is not None:
            return planned
    return torch_modules.plan(name, module, report)
