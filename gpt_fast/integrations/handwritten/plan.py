"""Plan the patches of GPT-2s that people write themselves."""

import contextlib
import dataclasses
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ... import _plain
from ..report import LeftAlone, Patch, Report
from . import forwards, probe
from .forwards import PARTS, Block
from .layouts import Norm, find_norm, layouts, norm_width, part
from .snapshot import Snapshot


def plan(name: str, module: nn.Module, report: Report, longest: int) -> list[Patch] | None:
    """Return the patches of `module` if its parts are those of a block, else None.

    `longest` is the longest sequence that the model takes, at which blocks are compared once.
    """
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
            block = probe.block_of(module, layout, (norms[0], norms[1]), longest)
        except probe.Refused as refused:
            reason = str(refused)
            continue
        except Exception as error:  # noqa: BLE001  whatever foreign code raises
            reason = f"cannot be compared ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"
            continue
        _note(name, module, block, report)
        return [Patch(module, forwards.block_forward, {PARTS: block})]
    report.left.append(LeftAlone(name, kind, reason or "has no layout that is known"))
    return []


def longest_sequence(model: nn.Module) -> int:
    """Return how many positions a model has, as its masks and tables tell, between 256 and 8,192."""
    masks = [
        buffer.shape[-1] for buffer in model.buffers() if buffer.dim() >= 2 and buffer.shape[-1] == buffer.shape[-2]
    ]
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    positions = [parameter.shape[-2] for parameter in model.parameters(recurse=False) if parameter.dim() >= 2]
    if masks:
        return min(8192, max(masks))
    return min(8192, max([256, *(size for size in (*tables, *positions) if size <= 8192)]))


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
    """Return the patches for what stands around the blocks of one model: the last norm and the output layer."""
    inside = {id(child) for block in blocks for child in block.modules()}
    outside = {path: module for path, module in model.named_modules() if id(module) not in inside}
    C = _width(blocks[0])
    prefix = f"{name}." if name else ""
    patches = []
    vocabularies = {
        module.num_embeddings for module in outside.values()
        if isinstance(module, nn.Embedding) and module.embedding_dim == C
    }  # fmt: skip
    for path, module in outside.items():
        reason = "has a forward of its own" if "forward" in vars(module) else None
        if norm_width(module) == C:
            norm = find_norm("", module)
            reason = reason or ("computes no LayerNorm" if norm is None else None)
            report.note(prefix + path, module, "layer_norm", reason)
            if norm is not None and reason is None:
                held = dataclasses.replace(norm, state=Snapshot(module))
                patches.append(Patch(module, forwards.norm_forward, {PARTS: held}))
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
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not tables or tables[0].weight.is_meta:
        return True
    V = min(table.num_embeddings for table in tables)
    tokens = torch.randint(V, (2, 6), generator=torch.Generator().manual_seed(4), device="cpu")
    tokens = tokens.to(tables[0].weight.device)
    # What the model itself writes or draws, outside of its blocks, it goes on writing: its own forward runs.
    with contextlib.suppress(probe.Refused), probe.without_trace(model):
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
