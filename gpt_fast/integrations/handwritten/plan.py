"""Plan the patches of GPT-2s that people write themselves."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ... import _plain
from ..report import LeftAlone, Patch, Report
from . import forwards, probe
from .forwards import PARTS, Block
from .layouts import alone, find_norm, layouts, norm_width, part
from .snapshot import Snapshot


def plan(
    model: nn.Module, claimed: set[nn.Module], report: Report, apply: Callable, undo: Callable
) -> list[Patch] | None:
    """Return the patches of the hand-written GPT code in `model`, or None if there is no such code.

    `claimed` holds modules that are patched otherwise and are skipped here. `report` gets an entry for each module that
    is replaced or left alone. `apply(patch)` puts a patch on its module and `undo(module)` takes it off, so that the
    whole model can be compared with and without patches. It is without them afterwards. The list is empty if the
    results differ, or if there are blocks but nothing can be replaced. If the results differ, `report` has one entry
    for the model instead. A `Patch` holds a module, its new forward and attributes to set.
    """
    fused, claimed, longest = list(report.replaced), set(claimed), _longest_sequence(model)
    blocks: list[Patch] | None = None
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in claimed or module in inside:
            continue
        planned = _plan_block(name, module, report, longest)
        if planned is not None:
            inside |= set(module.modules())
            blocks = (blocks or []) + planned
    claimed |= {module for patch in blocks or [] for module in patch.module.modules()}
    patches = (blocks or []) + _pieces(model, claimed, report, longest)
    if not patches:
        return blocks
    C = _width(patches[0].module) or _width(model)
    if model not in claimed and C is not None:
        patches += _around(model, claimed, C, report)
    if _whole_model_agrees(model, patches, apply, undo):
        return patches
    report.replaced[:] = fused
    report.left.append(LeftAlone("", type(model).__name__, "as a whole computes something else with these blocks"))
    return []


def _plan_block(name: str, module: nn.Module, report: Report, longest: int) -> list[Patch] | None:
    """Return [patch] for a GPT block, [] for a block that is left alone, or None if `module` looks like no block.

    `name` is the path of `module` in the model. `report` gets an entry for each submodule that is replaced, or one with
    the reason why the block is left alone. `longest` is the sequence length at which the block is compared once with
    the formula of a GPT block, besides short sequences. A `Patch` holds a module, its new forward and
    attributes to set.
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
            reason = _why_not_compared(error)
            continue
        _note(name, module, block, report)
        return [Patch(module, forwards.block_forward, {PARTS: block})]
    report.left.append(LeftAlone(name, kind, reason or "has no layout that is known"))
    return []


def _why_not_compared(error: Exception) -> str:
    """Return why a module is left alone if it raised `error` while it was compared, as text for the report."""
    return f"cannot be compared ({type(error).__name__}: {(str(error).splitlines() or [''])[0]})"


def _longest_sequence(model: nn.Module) -> int:
    """Return an estimate of the longest sequence that `model` takes, at most 8,192.

    It is the size of the largest square buffer, taken for a causal mask. Without such a buffer it is the largest number
    of rows in an `nn.Embedding` or in a parameter that `model` holds directly, and at least 256. Tables of more than
    8,192 rows are skipped.
    """
    masks = [
        buffer.shape[-1] for buffer in model.buffers() if buffer.dim() >= 2 and buffer.shape[-1] == buffer.shape[-2]
    ]
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    positions = [parameter.shape[-2] for parameter in model.parameters(recurse=False) if parameter.dim() >= 2]
    if masks:
        return min(8192, max(masks))
    return min(8192, max([256, *(size for size in (*tables, *positions) if size <= 8192)]))


def _note(name: str, module: nn.Module, block: Block, report: Report) -> None:
    """Add an entry to `report` for each norm, projection, attention and MLP that is replaced in a block.

    `module` is the block, `name` its path in the model, and `block` what it was recognised as.
    """
    prefix, layout = f"{name}." if name else "", block.layout
    for path in (layout.norm1, layout.norm2):
        op = "layer_norm" if block.pre_norm and path == layout.norm1 else "add_layer_norm"
        report.note(prefix + path, part(module, path), op, None)
    attention = layout.attention or layout.qkv[0]
    report.note(prefix + attention, part(module, attention), "attention", None)
    for path in (*layout.qkv, layout.out):
        report.note(prefix + path, part(module, path), "linear", None)
    mlp = layout.mlp or layout.fc
    report.note(prefix + mlp, part(module, mlp), "mlp", None)


def _around(model: nn.Module, claimed: set[nn.Module], C: int, report: Report) -> list[Patch]:
    """Return the patches of the LayerNorms of width C and the output layer outside of the `claimed` modules.

    An output layer is an `nn.Linear` outside of blocks, from C to the number of rows of an `nn.Embedding` of width C. A
    norm with hooks is left alone. `report` gets an entry for each module that is replaced or left alone. A `Patch`
    holds a module, its new forward and attributes to set.
    """
    outside = {path: module for path, module in model.named_modules() if module not in claimed}
    patches = []
    vocabularies = {
        module.num_embeddings for module in outside.values()
        if isinstance(module, nn.Embedding) and module.embedding_dim == C
    }  # fmt: skip
    for path, module in outside.items():
        reason = "has a forward of its own" if "forward" in vars(module) else None
        if norm_width(module) == C:
            if _plain.is_hooked_itself(module):
                reason = reason or "has hooks, which a probe would run: accelerate before they are registered"
            norm = find_norm("", module) if reason is None else None
            reason = reason or ("computes no LayerNorm" if norm is None else None)
            report.note(path, module, "layer_norm", reason)
            if norm is not None and reason is None:
                held = dataclasses.replace(norm, state=Snapshot(module))
                patches.append(Patch(module, forwards.norm_forward, {PARTS: held}))
        elif (
            isinstance(module, nn.Linear)
            and module.in_features == C != module.out_features
            and module.out_features in vocabularies
            and not _is_in_block(model, path, C)
        ):
            reason = reason or _plain.why_not_plain(module, nn.Linear)
            report.note(path, module, "linear_cross_entropy", reason)
            if reason is None:
                patches.append(Patch(module, forwards.output_forward, {}))
    return patches


def _is_in_block(model: nn.Module, path: str, C: int) -> bool:
    """Return True if the module at `path` is inside a block, a module with a norm of width C and no `nn.Embedding`."""
    around = model
    for name in path.split(".")[:-1]:
        around = getattr(around, name)
        inside = list(around.modules())
        has_norm = any(norm_width(module) == C for module in inside)
        if has_norm and not any(isinstance(module, nn.Embedding) for module in inside):
            return True
    return False


def _width(block: nn.Module) -> int | None:
    """Return the width of the first submodule that may be a LayerNorm, or None if there is none."""
    return next((width for module in block.modules() if (width := norm_width(module)) is not None), None)


def _pieces(model: nn.Module, claimed: set[nn.Module], report: Report, longest: int) -> list[Patch]:
    """Return the patches of attention and MLP modules that are not in a replaced block.

    They may stand in a model without blocks, or in a block that is left alone. The list is empty for a model without a
    LayerNorm. Modules in `claimed` are skipped, and the modules that were examined are added to `claimed`. `report`
    gets an entry for each module that is replaced. Attention that is left alone gets an entry unless `report` already
    names its block as left alone; an MLP that is left alone gets none. `longest` is the sequence length at which a
    module is compared once, besides short ones. A `Patch` holds a module, its new forward and attributes to set.
    """
    patches: list[Patch] = []
    if _width(model) is None:  # no Transformer
        return patches
    for name, module in model.named_modules():
        if module in claimed or type(module).__module__.startswith("transformers."):
            claimed |= set(module.modules())
            continue
        layout = alone(module)
        if layout is None or "forward" in vars(module):
            continue
        reason = None
        try:
            block = probe.block_of(module, layout, (None, None), longest)
        except probe.Refused as refused:
            reason = str(refused)
        except Exception as error:  # noqa: BLE001  whatever foreign code raises
            reason = _why_not_compared(error)
        claimed |= set(module.modules())
        op = "attention" if layout.qkv else "mlp"
        if reason is not None:
            is_named = any(name.startswith(f"{entry.name}.") or not entry.name for entry in report.left)
            if layout.qkv and not is_named:
                report.note(name, module, op, reason)
            continue
        report.note(name, module, op, None)
        for path in (*layout.qkv, layout.out) if layout.qkv else ():
            report.note(f"{name}.{path}" if name else path, part(module, path), "linear", None)
        forward = forwards.attention_forward if layout.qkv else forwards.mlp_forward
        patches.append(Patch(module, forward, {PARTS: block}))
    return patches


def _whole_model_agrees(model: nn.Module, patches: list[Patch], apply: Callable, undo: Callable) -> bool:
    """Return True if the model computes the same with the patches as without, in evaluation mode on random tokens.

    Outputs may differ by 256 times the dtype's eps, relative to the largest value. The same holds for the gradients of
    parameters outside of the patched modules, and of output layers. `apply(patch)` puts a patch on its module and
    `undo(module)` takes it off; none is left on. Tokens for which the model fails without the patches are skipped. The
    result is True if all are skipped, if the model has no embedding, or if it lies on the meta device. A `Patch` holds
    a module, its new forward and attributes to set.
    """
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not tables or tables[0].weight.is_meta:
        return True
    V = min(table.num_embeddings for table in tables)
    generator = torch.Generator().manual_seed(4)
    drawn = [torch.randint(V, shape, generator=generator, device="cpu") for shape in ((2, 6), (1, 9), (3, 1))]
    drawn = [tokens.to(tables[0].weight.device) for tokens in drawn]
    within = {
        id(p) for patch in patches for p in patch.module.parameters() if patch.forward is not forwards.output_forward
    }
    outside = [p for p in model.parameters() if id(p) not in within and p.requires_grad and p.is_floating_point()]
    before, after = [], []
    # The model still writes or draws what it does outside of its blocks, because its own forward runs.
    with contextlib.suppress(probe.Refused), probe.without_trace(model):
        model.eval()
        before = [_results(model, tokens, outside) for tokens in drawn]
        for patch in patches:
            apply(patch)
        try:
            after = [_results(model, tokens, outside) for tokens in drawn]
        finally:
            for patch in patches:
                undo(patch.module)
    for was, now in zip(before, after, strict=True):
        if was is None:
            continue
        if now is None or [len(part) for part in now] != [len(part) for part in was]:
            return False
        outputs, gradients = zip(now, was, strict=True)
        # Some gradients are 0 but for rounding, as that of a key's bias: judged by the largest of all.
        largest = max((float(gradient.abs().max()) for gradient in was[1] if gradient.numel()), default=0.0)
        if not all(map(_near, *outputs)) or not all(_near(a, b, largest) for a, b in zip(*gradients, strict=True)):
            return False
    return True


Results = tuple[list[Tensor], list[Tensor]]  # outputs and gradients


def _results(model: nn.Module, tokens: Tensor, parameters: list[nn.Parameter]) -> Results | None:
    """Return (outputs, gradients) of the call `model(tokens)`, or None if the call or its backward raises.

    `tokens` is [B, T]. `outputs` are the floating-point tensors of the result. `gradients` are those of `parameters`
    for fixed random upstream gradients, or empty if no output requires a gradient.
    """
    try:
        with torch.enable_grad():  # as in training, where logits are deferred
            result = model(tokens)
        return _with_gradients(result, parameters)
    except Exception:  # noqa: BLE001  whatever foreign code raises: it wants other arguments
        return None


def _with_gradients(result: Any, parameters: list[nn.Parameter]) -> Results:
    """Return (outputs, gradients) of `result`, the result of a model's call, for the parameters in `parameters`.

    `outputs` are the floating-point tensors in `result`, a tensor, a list, a tuple or a dict. The gradients are those
    of the scalar Σ output · r over the outputs that require a gradient, where r are fixed random numbers. `gradients`
    holds one tensor for each of `parameters`, a scalar 0 for one that is not used. It is empty if no output requires a
    gradient.
    """
    values = result.values() if isinstance(result, dict) else result if isinstance(result, list | tuple) else [result]
    outputs = [value for value in values if isinstance(value, Tensor) and value.is_floating_point()]
    found = [output.detach() for output in outputs]
    differentiable = [output for output in outputs if output.requires_grad]
    if not differentiable or not parameters:
        return found, []
    generator = torch.Generator().manual_seed(5)
    upstream = [torch.randn(output.shape, generator=generator, device="cpu").to(output) for output in differentiable]
    gradients = torch.autograd.grad(differentiable, parameters, upstream, allow_unused=True)
    return found, [torch.zeros(()) if gradient is None else gradient for gradient in gradients]


def _near(got: Tensor, expected: Tensor, largest: float = 0.0) -> bool:
    """Return True if `got` and `expected` differ by at most 256 times the dtype's eps times a scale.

    The scale is the largest absolute value in `expected`, or `largest` if that is more. Tensors of different shapes
    differ.
    """
    if got.shape != expected.shape:
        return False
    if expected.numel() == 0:
        return True
    largest = max(largest, float(expected.abs().max()), 1e-30)
    rounding = 256 * torch.finfo(expected.dtype).eps * largest
    return bool((got - expected).abs().max() <= rounding)
