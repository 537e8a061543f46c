"""Plan what `accelerate` does to each of transformers' GPT-2 and GPT-1 classes and to their relatives."""

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch.nn as nn
from transformers import PreTrainedModel
from transformers.models.gpt2 import modeling_gpt2 as gpt2
from transformers.models.openai import modeling_openai as gpt1

from ... import _plain
from ...ops.attention import MAX_HEAD_DIM
from ..report import LeftAlone, Patch, Report
from . import blocks, losses


def plan(name: str, module: Any, report: Report) -> list[Patch] | None:
    """Return the patches of `module` if it is a model of transformers that this library knows, else None.

    A trunk, such as `GPT2Model`, gives the patches of itself, its blocks and their attention; a block by itself gives
    None. A model with a language-model head, such as `GPT2LMHeadModel`, gives one patch, whose forward computes the
    loss. Any other model of GPT-2 or GPT-1, such as a classifier, gives one patch without a forward. It only marks the
    model as accelerated and, for GPT-1, enables gradient checkpointing. Any other model of OPT, BioGPT, GPT-Neo or
    ImageGPT gives an empty list, because it needs no patch, and so does a trunk that is left alone. `accelerate` calls
    this function for the trunk inside a model separately.

    `name` is the path of `module` in the whole model. `report` gets an entry for each module that is replaced or left
    alone. A `Patch` holds a module, its new forward and attributes to set.
    """
    if isinstance(module, gpt2.GPT2Model):
        return _plan_trunk(name, module, report, _GPT2)
    if isinstance(module, gpt1.OpenAIGPTModel):
        return _plan_trunk(name, module, report, _GPT1)
    head = losses.head_of(module)
    if head is not None:
        return _plan_head(name, module, head, report)
    if isinstance(module, gpt2.GPT2PreTrainedModel | gpt1.OpenAIGPTPreTrainedModel):
        return [Patch(module, None, _checkpointing(module))]  # its trunk has all there is to replace
    relatives = _relatives(module)
    if relatives is None:
        return None
    head = losses.head_of(module, relatives.HEADS)
    if head is not None:
        return _plan_head(name, module, head, report)
    planned = relatives.plan(name, module, report, why_foreign)
    return [] if planned is None and isinstance(module, PreTrainedModel) else planned


_RELATIVES = tuple(f"transformers.models.{model}." for model in ("opt", "biogpt", "gpt_neo", "imagegpt"))


def _relatives(module: Any) -> ModuleType | None:
    """Return the Python module `relatives` if `module` is an OPT, BioGPT, GPT-Neo or ImageGPT, else None.

    `relatives` imports transformers' code of all four, so it is imported only for them.
    """
    if any(kind.__module__.startswith(_RELATIVES) for kind in type(module).__mro__):
        return importlib.import_module(".relatives", __package__)
    return None


class _Family:
    """The classes, attribute names and new forwards of transformers' GPT-2 or GPT-1."""

    def __init__(self, trunk: Any, block: Any, attention: Any, mlp: Any, tables: tuple[str, str], last_norm: str | None,
                 forwards: tuple[Callable, Callable, Callable]):  # fmt: skip
        self.trunk, self.block, self.attention, self.mlp = trunk, block, attention, mlp
        self.tables, self.last_norm = tables, last_norm
        self.trunk_forward, self.block_forward, self.attention_forward = forwards


_GPT2 = _Family(
    gpt2.GPT2Model, gpt2.GPT2Block, gpt2.GPT2Attention, gpt2.GPT2MLP, ("wte", "wpe"), "ln_f",
    (blocks.gpt2_model_forward, blocks.gpt2_block_forward,
     blocks.gpt2_attention_forward),
)  # fmt: skip
_GPT1 = _Family(
    gpt1.OpenAIGPTModel, gpt1.Block, gpt1.Attention, gpt1.MLP, ("tokens_embed", "positions_embed"), None,
    (blocks.gpt1_model_forward, blocks.gpt1_block_forward,
     blocks.gpt1_attention_forward),
)  # fmt: skip


def _plan_trunk(name: str, trunk: Any, report: Report, family: _Family) -> list[Patch]:
    """Return the patches of a trunk (`GPT2Model` or `OpenAIGPTModel`), its blocks and their attention.

    The list is empty if the trunk is left alone: it, a block or an attention has a foreign class or forward, or its
    heads are wider than 256. `name` is the path of `trunk` in the whole model, and `family` holds its classes and new
    forwards. `report` gets an entry for each module, or one for the whole trunk if that is left alone. A `Patch` holds
    a module, its new forward and attributes to set.
    """
    prefix = f"{name}." if name else ""
    unfit = why_foreign(trunk, family.trunk)
    for i, block in enumerate(trunk.h):
        unfit = unfit or why_foreign(block, family.block, f"h.{i} ")
        unfit = unfit or why_foreign(getattr(block, "attn", None), family.attention, f"h.{i}.attn ")
    size = trunk.config.n_embd // trunk.config.n_head
    if size > MAX_HEAD_DIM:
        unfit = f"has heads of {size}; expected at most {MAX_HEAD_DIM}"
    if unfit is not None:
        report.left.append(LeftAlone(name, type(trunk).__name__, unfit))
        return []
    patches = [Patch(trunk, family.trunk_forward, _checkpointing(trunk))]
    for path in family.tables:
        table = getattr(trunk, path)
        report.note(prefix + path, table, "embedding", _plain.why_no_table(table))
    for i, block in enumerate(trunk.h):
        path = f"{prefix}h.{i}."
        first = "add_layer_norm" if family is _GPT1 else "layer_norm"
        report.note(path + "ln_1", block.ln_1, first, _plain.why_no_norm(block.ln_1))
        report.note(path + "attn", block.attn, "attention", None)
        for projection in ("c_attn", "c_proj"):
            layer = getattr(block.attn, projection)
            reason = blocks.why_no_projection(layer)
            report.note(f"{path}attn.{projection}", layer, "linear", reason)
        report.note(path + "ln_2", block.ln_2, "add_layer_norm", _plain.why_no_norm(block.ln_2))
        report.note(path + "mlp", block.mlp, "mlp", blocks.why_no_mlp(block.mlp, family.mlp))
        if hasattr(block, "crossattention"):
            reason = "attends to another model's states; calls that give them run as before"
            report.note(path + "crossattention", block.crossattention, "attention", reason)
        flag = {} if hasattr(block, "gradient_checkpointing") else {"gradient_checkpointing": False}
        patches += [Patch(block, family.block_forward, flag), Patch(block.attn, family.attention_forward, {})]
    if family.last_norm is not None:
        last = getattr(trunk, family.last_norm)
        report.note(prefix + family.last_norm, last, "layer_norm", _plain.why_no_norm(last))
    return patches


def _plan_head(name: str, model: Any, head: losses.Head, report: Report) -> list[Patch]:
    """Return, in a list, the patch of a model with a language-model head. `head` is the `losses.Head` of its class.

    `name` is the path of `model` in the whole model. `report` gets an entry for the output layer. The patch has no
    forward if the loss has to be computed from logits: the model or its output layer is not plain, or another loss
    function is set. A `Patch` holds a module, its new forward and attributes to set.
    """
    output = getattr(model, head.output)
    reason = why_foreign(model, head.kind) or _plain.why_not_plain(output, nn.Linear)
    if reason is None and losses.has_another_loss(model):
        reason = "feeds a loss function other than transformers' own"
    path = f"{name}.{head.output}" if name else head.output
    report.note(path, output, "linear_cross_entropy", reason)
    return [Patch(model, head.forward if reason is None else None, _checkpointing(model))]


def _checkpointing(model: PreTrainedModel) -> dict[str, Any]:
    """Return {attribute: value} to set on `model` so that it supports gradient checkpointing.

    The result is {"supports_gradient_checkpointing": True} for GPT-1, which lacks it in transformers, and empty for a
    model that supports it already.
    """
    return {} if model.supports_gradient_checkpointing else {"supports_gradient_checkpointing": True}


def why_foreign(module: Any, kind: Any, label: str = "") -> str | None:
    """Return why a call of `module` does not run the forward of the class `kind`, or None if it does.

    A forward that `gpt_fast.accelerate` set and a subclass that FSDP2 made are no reasons. `label`, such as
    "h.0.attn ", is put in front of the reason.
    """
    if not isinstance(module, kind):
        return f"{label}is a {type(module).__name__}, not {kind.__name__}"
    if type(module).forward is not kind.forward and not _is_sharded(type(module)):
        return f"{label}has a class ({type(module).__name__}) with a forward of its own"
    if "forward" in vars(module) and not _plain.is_accelerated(module):
        return f"{label}has a forward of its own"
    return None


def _is_sharded(kind: type) -> bool:
    """Return True if `kind` is the subclass of a module's class that FSDP2 makes to shard the module."""
    return kind.__name__.startswith("FSDP") and kind.__module__.startswith("torch.distributed")
