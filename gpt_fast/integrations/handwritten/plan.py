"""What `accelerate` does to GPT-2 as people write it themselves."""

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ... import _plain
from ..report import LeftAlone, Patch, Report
from . import forwards, probe
from .forwards import PARTS, Block
from .layouts import Norm, find_norm, layouts, norm_width, part


def plan(name: str, module: nn.Module, report: Report) -> list[Patch] | None:
    """Return the patches of `module` if its parts are those of a block, else None."""
    found = list(layouts(module))
    if not found or type(module).__module__.startswith(("transformers.", "torch.")):
        return None
    kind = type(module).__name__
    reason = "has a forward of its own" if "forward" in vars(module) else None
    for layout in found if reason is None else ():
        norms = [find_norm(path, part(module, path)) for path in (layout.norm1, layout.norm2)]
        if norms[0] is None or norms[1] is None:
            wrong = layout.norm1 if norms[0] is None else layout.norm2
            reason = f"{wrong} ({type(part(module, wrong)).__name__}) computes no LayerNorm"
            continue
        try:
            block = probe.block_of(module, layout, (norms[0], norms[1]), _longest(module))
        except probe.Refused as refused:
            reason = str(refused)
            continue
        _note(name, module, block, report)
        return [Patch(module, forwards.block_forward, {PARTS: block})]
    report.left.append(LeftAlone(name, kind, reason or "has no layout that is known"))
    return []


def _longest(block: nn.Module) -> int:
    """Return a length that shows local windows: that of the block's mask, or 256."""
    masks = [buffer for buffer in block.buffers() if buffer.dim() >= 2 and buffer.shape[-1] == buffer.shape[-2]]
    return max((int(mask.shape[-1]) for mask in masks), default=256)


def _note(name: str, module: nn.Module, block: Block, report: Report) -> None:
    prefix, layout = f"{name}." if name else "", block.layout
    for norm in (block.norm1, block.norm2):
        op = "layer_norm" if block.pre_norm and norm is block.norm1 else "add_layer_norm"
        report.note(prefix + norm.path, part(module, norm.path), op, None)
    attention = layout.attention or layout.qkv[0]
    report.note(prefix + attention, part(module, attention), "attention", None)
    for path in (*layout.qkv, layout.out):
        report.note(prefix + path, part(module, path), "linear", None)
    mlp = layout.mlp or layout.fc
    report.note(prefix + mlp, part(module, mlp), "mlp", None)


def around(name: str, model: nn.Module, blocks: list[nn.Module], report: Report) -> list[Patch]:
    """Return the patches for what stands around the blocks of one model: embeddings, last norm and output layer."""
    inside = {id(child) for block in blocks for child in block.modules()}
    outside = {path: module for path, module in model.named_modules() if id(module) not in inside}
    C = _width(blocks[0])
    prefix = f"{name}." if name else ""
    patches = []
    tables = {
        path: module for path, module in outside.items()
        if isinstance(module, nn.Embedding) and module.embedding_dim == C
    }  # fmt: skip
    vocabularies = [table.num_embeddings for table in tables.values()]
    for path, module in outside.items():
        reason = "has a forward of its own" if "forward" in vars(module) else None
        if path in tables:
            reason = reason or _plain.why_no_table(module)
            report.note(prefix + path, module, "embedding", reason)
            if reason is None:
                patches.append(Patch(module, forwards.table_forward, {}))
        elif isinstance(module, nn.Dropout):
            report.note(prefix + path, module, "embedding", reason)
            if reason is None:
                patches.append(Patch(module, forwards.dropout_forward, {}))
        elif norm_width(module) == C:
            norm = find_norm("", module)
            reason = reason or ("computes no LayerNorm" if norm is None else None)
            report.note(prefix + path, module, "layer_norm", reason)
            if norm is not None and reason is None:
                patches.append(Patch(module, forwards.norm_forward, {PARTS: norm}))
        elif isinstance(module, nn.Linear) and module.in_features == C and module.out_features in vocabularies:
            reason = reason or _plain.why_not_plain(module, nn.Linear)
            report.note(prefix + path, module, "linear_cross_entropy", reason)
            if reason is None:
                patches.append(Patch(module, forwards.output_forward, {}))
    return patches


def _width(block: nn.Module) -> int:
    return next(width for module in block.modules() if (width := norm_width(module)) is not None)


def whole_model_agrees(model: nn.Module, patches: list[Patch], apply: Any, undo: Any) -> bool:
    """Return True if the model computes the same with the patches, on drawn tokens in evaluation mode.

    A model that cannot be called with tokens alone is compared by its blocks only.
    """
    table = next((patch.module for patch in patches if patch.forward is forwards.table_forward), None)
    if not isinstance(table, nn.Embedding) or table.weight.is_meta:
        return True
    V = max(patch.module.num_embeddings for patch in patches if isinstance(patch.module, nn.Embedding))
    tokens = torch.randint(V, (2, 6), generator=torch.Generator().manual_seed(4)).to(table.weight.device)
    with probe.without_trace(model):
        model.eval()
        before = _outputs(model, tokens)
        for patch in patches:
            apply(patch)
        try:
            after = _outputs(model, tokens)
        finally:
            for patch in patches:
                undo(patch.module)
    if before is None:
        return True
    return after is not None and len(after) == len(before) and all(map(_near, after, before))


def _outputs(model: nn.Module, tokens: Tensor) -> list[Tensor] | None:
    try:
        with torch.enable_grad():  # as in training, where sums and logits are deferred
            result = model(tokens)
    except Exception:  # noqa: BLE001  whatever foreign code raises: it wants other arguments
        return None
    values = result.values() if isinstance(result, dict) else result if isinstance(result, list | tuple) else [result]
    return [value.detach() for value in values if isinstance(value, Tensor) and value.is_floating_point()]


def _near(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape:
        return False
    rounding = 256 * torch.finfo(expected.dtype).eps * float(expected.abs().max().clamp(min=1e-30))
    return bool((got - expected).abs().max() <= rounding)


__all__ = ["Block", "Norm", "around", "plan", "whole_model_agrees"]
