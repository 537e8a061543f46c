"""linear_cross_entropy: the output projection and its cross-entropy without stored logits."""

import torch
from torch import Tensor

from .. import _transforms, reference
from . import _checks, _flops, _library

# On CPU the weight may be float32 where x has 16 bits: the kernel rounds it while it packs it. Autocast uses this.
#
# For "mean" and "sum" forward also gives the gradients of the summed loss, from the logits it has at hand: dx in x's
# dtype, dweight and dbias in float32. They are not scaled, so that half precision neither overflows nor underflows;
# autograd multiplies them by the upstream gradient, over `count` for "mean". There dx is scaled by power / count before
# it is rounded, where power is the largest power of two up to count, and autograd divides it by power, which is exact.
# For "none" the backward op recomputes.
_library.define_forward(
    "linear_cross_entropy",
    "(Tensor x, Tensor weight, Tensor target, Tensor? bias, int ignore_index, float label_smoothing, str reduction,"
    " bool needs_x, bool needs_weight, bool needs_bias)"
    " -> (Tensor loss, Tensor count, Tensor dx, Tensor dweight, Tensor dbias)",
)
_library.define_backward(
    "linear_cross_entropy",
    "(Tensor dloss, Tensor x, Tensor weight, Tensor target, Tensor? bias, int ignore_index, float label_smoothing,"
    " bool needs_x, bool needs_weight, bool needs_bias) -> (Tensor dx, Tensor dweight, Tensor dbias)",
)
REDUCTIONS = ("mean", "sum", "none")


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: str = "mean",
) -> Tensor:
    """Project onto the vocabulary and return the cross-entropy, without storing logits.

    loss = -(1 - ε) log p[target] - ε/V Σ_v log p[v], with p = softmax(x weightᵀ + bias) and ε = label_smoothing.

    Args:
        x: Hidden states [..., C] in float32, bfloat16, float16 or float64.
        weight: Weight [V, C] of the output layer, in the dtype of x.
        target: Classes [...], int64, in [0, V) or `ignore_index`.
        bias: Bias [V] in the dtype of x, or None.
        ignore_index: Target of a row that does not count. Such rows are not computed.
        label_smoothing: Share ε of the loss that all classes have, in [0, 1].
        reduction: "mean" over the rows that count (0 if there are none), "sum", or "none".

    Returns:
        loss, float32 (float64 for float64 inputs), a scalar, or in the shape of `target` with reduction="none".

    Raises:
        ValueError: A dtype, shape or device differs from the list above, the reduction is unknown, or `label_smoothing`
            lies outside [0, 1]. On CPU (elsewhere after `check_values`) also if a target lies outside [0, V).
        NotImplementedError: A gradient is differentiated again.

    Example:
        ```python
        import torch
        from gpt_fast import ops

        x, weight, target = torch.randn(8, 64), torch.randn(1000, 64), torch.randint(1000, (8,))
        print(ops.linear_cross_entropy(x, weight, target).shape)  # torch.Size([])
        ```

    Note:
        Precision: logits, softmax and sums are float32. The gradient of the logits is rounded to the dtype of x,
        because it is an operand of a product. Each gradient of an input is rounded once, but that of x twice for "mean"
        and "sum" unless the upstream gradient is a power of two. Where autocast is on, x, weight and bias are cast to
        its dtype. On CPU the kernel does this to a float32 weight while it reads it, and the weight's gradient is not
        rounded. The reference serves float64.

        Results are deterministic. On CPU they have the same bits at any number of threads.

        Cost: the kernels never store the [N, V] logits.

        Source: Szegedy et al. (2016), section 7, arXiv:1512.00567, for the smoothing.
    """
    op = "linear_cross_entropy"
    _checks.tensors(op, x=x, weight=weight, target=target)
    _checks.optional_tensors(op, bias=bias)
    _checks.integer(op, ignore_index=ignore_index)
    x, bias = _library.autocast(x, bias)
    if _library.rounds_weights(op, x, weight):
        _checks.floating_alike(op, x=x, bias=bias)
    else:
        x, weight = _library.autocast(x, weight)
        _checks.floating_alike(op, x=x, weight=weight, bias=bias)
    _checks.same_device(op, x=x, weight=weight, target=target, bias=bias)
    _checks.dimensions(op, "weight", weight, "[V, C]")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"gpt_fast.{op}: x has shape {list(x.shape)}; expected [..., {weight.shape[1]}] as weight")
    if target.dtype != torch.int64:
        raise ValueError(f"gpt_fast.{op}: target has dtype {_checks.short(target.dtype)}; expected int64")
    _checks.shape(op, "target", target, x.shape[:-1], "one class for each row of x")
    _checks.shape(op, "bias", bias, weight.shape[:1], "the rows of weight")
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(f"gpt_fast.{op}: reduction is {reduction!r}; expected one of {', '.join(REDUCTIONS)}")
    if not _checks.is_number(label_smoothing) or not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"gpt_fast.{op}: label_smoothing is {label_smoothing!r}; expected a number in [0, 1]")
    if _library.values_checked(target) and not _library.kernel_checks(op, x):
        _checks.values_below(op, "target", target, weight.shape[0], besides=ignore_index)
    args = x, weight, target, bias, ignore_index, label_smoothing, reduction
    if _library.runs_reference(op, x):
        return _library.by_reference(reference.linear_cross_entropy, x.device.type, *args)
    return _library.apply(_LinearCrossEntropy, *args)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, target, bias, ignore_index, label_smoothing, reduction):
        needs = ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[3]
        now = tuple(needed and reduction != "none" for needed in needs)
        options = ignore_index, label_smoothing
        loss, count, *ctx.sums = torch.ops.gpt_fast.linear_cross_entropy_forward(
            x, weight, target, bias, *options, reduction, *now
        )
        ctx.save_for_backward(x, weight, target, bias, count)
        ctx.options = options, reduction, needs
        return loss

    @staticmethod
    def backward(ctx, dloss):
        options, reduction, needs = ctx.options
        x, weight, target, bias, count = ctx.saved_tensors
        if reduction == "none":
            grads = _library.backward("linear_cross_entropy", dloss, x, weight, target, bias, *options, *needs)
        else:
            # Autograd could differentiate the code below, as if the gradients were constants.
            if torch.is_grad_enabled() and not torch.compiler.is_compiling():
                raise NotImplementedError(
                    "gpt_fast.linear_cross_entropy: double backward is not implemented, nor create_graph=True; "
                    "run forward and backward under gpt_fast.use_reference(), which can be differentiated twice"
                )
            sums = list(ctx.sums)
            if not torch.compiler.is_compiling():
                ctx.sums.clear()  # they become the gradients; a second backward pass computes them again
            if not sums:
                sums = torch.ops.gpt_fast.linear_cross_entropy_forward(
                    x, weight, target, bias, *options, reduction, *needs
                )[2:]
            scale = dx_scale = dloss
            if reduction == "mean":
                count = count.clamp(min=1)
                scale, dx_scale = dloss / count, dloss / _power_of_two(count)
            dtypes, scales = (x.dtype, weight.dtype, x.dtype), (dx_scale, scale, scale)
            grads = tuple(map(_scaled, sums, scales, dtypes))
        dx, dweight, dbias = (grad if needed else None for grad, needed in zip(grads, needs, strict=True))
        return dx, dweight, None, dbias, None, None, None


def _power_of_two(count: Tensor) -> Tensor:
    """Return the largest power of two up to `count`, a float32 tensor of at least 1, in float32."""
    return (count.view(torch.int32) & 0x7F800000).view(torch.float32)


def _scaled(total: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return total * scale in `dtype`.

    A `total` that has this dtype already is overwritten with the result, except inside a `torch.func` transform.
    """
    if _transforms.is_batched(scale):
        return (total * scale).to(dtype)
    if total.dtype == dtype and not _transforms.is_transformed():
        return total.mul_(scale)
    return torch.mul(total, scale, out=torch.empty_like(total, dtype=dtype))


@torch.library.register_fake("gpt_fast::linear_cross_entropy_forward", lib=_library.LIBRARY)
def _forward_fake(x, weight, target, bias, ignore_index, label_smoothing, reduction, needs_x, needs_weight, needs_bias):
    loss = x.new_empty(target.shape if reduction == "none" else (), dtype=torch.float32)
    return loss, x.new_empty((), dtype=torch.float32), *_gradients(
        x, weight, torch.float32, torch.float32, needs_x, needs_weight, needs_bias
    )  # fmt: skip


@torch.library.register_fake("gpt_fast::linear_cross_entropy_backward", lib=_library.LIBRARY)
def _backward_fake(dloss, x, weight, target, bias, ignore_index, label_smoothing, needs_x, needs_weight, needs_bias):
    return _gradients(x, weight, weight.dtype, x.dtype, needs_x, needs_weight, needs_bias)


def _gradients(x, weight, weight_dtype, bias_dtype, needs_x, needs_weight, needs_bias):
    """Return uninitialised (dx, dweight, dbias): dx like x, dweight like `weight` [V, C], and dbias [V].

    dweight has the dtype `weight_dtype`, and dbias `bias_dtype`. A gradient has shape [0] if its flag, `needs_x`,
    `needs_weight` or `needs_bias`, is False.
    """
    return (
        x.new_empty(x.shape if needs_x else (0,)),
        torch.empty_like(weight, dtype=weight_dtype) if needs_weight else x.new_empty(0, dtype=weight_dtype),
        x.new_empty(weight.shape[0] if needs_bias else 0, dtype=bias_dtype),
    )


def _decomposition(x, weight, target, bias, ignore_index, label_smoothing, reduction, *needs):
    """Return (loss, count, dx, dweight, dbias) of `linear_cross_entropy_forward`, computed by the reference.

    `count`, a float32 scalar, is the number of rows whose target is not `ignore_index`. The three gradients are empty
    tensors, so `needs`, the operator's flags needs_x, needs_weight and needs_bias, is ignored. Ignored rows are
    computed too, because shapes in an exported program cannot depend on the targets.
    """
    weight = weight.to(x.dtype)
    losses = reference.linear_cross_entropy(x, weight, target, bias, ignore_index, label_smoothing, "none")
    count = (target != ignore_index).sum().float()
    total = losses if reduction == "none" else losses.sum()
    loss = total / count.clamp(min=1) if reduction == "mean" else total
    return loss, count, x.new_empty(0), x.new_empty(0), x.new_empty(0)


_library.register_decomposition("linear_cross_entropy", _decomposition)


def _triton_forward(*args):
    return _library.triton_kernel("linear_cross_entropy").forward(*args)


def _triton_backward(*args):
    return _library.triton_kernel("linear_cross_entropy").backward(*args)


_library.register_triton("linear_cross_entropy_forward", _triton_forward)
_library.register_triton("linear_cross_entropy_backward", _triton_backward)


def _forward_flops(
    x, weight, target, bias, ignore_index, label_smoothing, reduction, needs_x, needs_weight, needs_bias, **_
):
    """Return the FLOPs of the loss, and of dx and dweight if they are needed. Tensors are given as shapes.

    The operator's arguments are passed. The gradient of the bias counts nothing.
    """
    return (1 + needs_x + needs_weight) * _flops.product(x, weight)


def _backward_flops(
    dloss, x, weight, target, bias, ignore_index, label_smoothing, needs_x, needs_weight, needs_bias, **_
):
    """Return the FLOPs of dx and dweight, if needed, for reduction "none". Other reductions count them in forward.

    The operator's arguments are passed, with shapes in place of tensors. The gradient of the bias counts nothing.
    """
    return (needs_x + needs_weight) * _flops.product(x, weight)


_flops.register("linear_cross_entropy_forward", _forward_flops)
_flops.register("linear_cross_entropy_backward", _backward_flops)
