"""layer_norm: normalisation over the last dimension with a gain and a bias."""

import torch
from torch import Tensor

from .. import reference
from . import _checks, _library

_library.define_forward(
    "layer_norm",
    "(Tensor x, Tensor? weight, Tensor? bias, float eps, ScalarType? y_dtype=None)"
    " -> (Tensor y, Tensor mean, Tensor rstd)",
)
_library.define_backward(
    "layer_norm",
    "(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool needs_weight, bool needs_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
)


def layer_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    _y_dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise over the last dimension, with a gain and a bias.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias.

    Args:
        x: Input [..., C] in float32, bfloat16, float16 or float64. Contiguous rows with one constant stride between
            them are read in place; any other layout is copied.
        weight: Gain [C], or None. Its dtype may be wider than that of x.
        bias: Bias [C] in the dtype of `weight`, or None. A bias needs a weight.
        eps: Positive number added to the variance.

    Returns:
        y [..., C] in the dtype of x, contiguous. Autocast does not change its dtype.

    Raises:
        ValueError: A dtype or shape differs from the list above, the devices differ, a bias comes without weight, or
            `eps` is not a positive number.
        NotImplementedError: A gradient is differentiated again.

    Example:
        ```python
        import torch
        from gpt_fast import ops

        y = ops.layer_norm(torch.randn(8, 768), torch.ones(768), torch.zeros(768))
        print(y.shape)  # torch.Size([8, 768])
        ```

    Note:
        Precision: statistics and sums are float32, and each result is rounded once. The reference serves a call with
        any float64 argument. `_y_dtype`, which only this library's blocks pass, replaces the dtype of y.

        Results are deterministic, forward and backward, at any number of threads.

        Source: Ba, Kiros, Hinton (2016), "Layer Normalization", arXiv:1607.06450.
    """
    # `_y_dtype`, which only this library's blocks pass, is the dtype of y: see `_library.product_dtype`.
    if not (_library.is_plain_call("layer_norm", x, weight, bias) and has_plain_shapes(x, weight, bias, eps)):
        check_norm("layer_norm", x, weight, bias, eps)
        if _library.runs_reference("layer_norm", x, weight):
            y = _library.by_reference(reference.layer_norm, x.device.type, x, weight, bias, eps)
            return y if _y_dtype is None else y.to(_y_dtype)
    return _library.apply(_LayerNorm, x, weight, bias, eps, _y_dtype)


def check_norm(op: str, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    """Validate the arguments of a layer norm.

    Valid are a floating x [..., C], `weight` and `bias` [C] or None, and a positive number `eps`. `weight` and `bias`
    are floating, of one dtype, which may differ from that of x, and on x's device. A bias needs a weight.

    Raises:
        ValueError: An argument is not valid. The message names `op` and the argument.
    """
    _checks.tensors(op, x=x)
    _checks.optional_tensors(op, weight=weight, bias=bias)
    if not _checks.alike(x, weight, bias):  # x may be narrower
        _checks.floating(op, x=x, weight=weight, bias=bias)
        _checks.same_device(op, x=x, weight=weight, bias=bias)
        _checks.same_dtype(op, weight=weight, bias=bias)
    if x.dim() == 0:
        raise ValueError(f"gpt_fast.{op}: x has no dimension; expected [..., C]")
    _checks.shape(op, "weight", weight, x.shape[-1:], "the last dimension of x")
    _checks.shape(op, "bias", bias, x.shape[-1:], "the last dimension of x")
    if bias is not None and weight is None:
        raise ValueError(f"gpt_fast.{op}: got a bias and no weight; expected both, the weight alone or neither")
    if not _checks.is_number(eps) or not eps > 0:
        raise ValueError(f"gpt_fast.{op}: eps is {eps!r}; expected a positive number")


def has_plain_shapes(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> bool:
    """Return True if weight and bias are given, have the shape of x's last axis, and eps is a positive float.

    Then `check_norm` accepts the arguments, if their dtypes and devices are right. False means only that `check_norm`
    has to decide.
    """
    columns = x.shape[-1:]
    return (
        len(columns) == 1
        and (weight is not None and weight.shape == columns)
        and (bias is not None and bias.shape == columns)
        and isinstance(eps, float)
        and eps > 0
    )


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, y_dtype):
        y, mean, rstd = torch.ops.gpt_fast.layer_norm_forward(x, weight, bias, eps, y_dtype)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    def backward(ctx, dy):
        x, weight, mean, rstd = ctx.saved_tensors
        needs_weight, needs_bias = ctx.needs_input_grad[1:3]
        dx, dweight, dbias = _library.backward("layer_norm", dy, x, weight, mean, rstd, needs_weight, needs_bias)
        return dx, dweight if needs_weight else None, dbias if needs_bias else None, None, None


@torch.library.register_fake("gpt_fast::layer_norm_forward", lib=_library.LIBRARY)
def _forward_fake(x, weight, bias, eps, y_dtype=None):
    statistics = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape, dtype=y_dtype), statistics, torch.empty_like(statistics)


@torch.library.register_fake("gpt_fast::layer_norm_backward", lib=_library.LIBRARY)
def _backward_fake(dy, x, weight, mean, rstd, needs_weight, needs_bias):
    like = x if weight is None else weight
    C = x.shape[-1]
    return x.new_empty(x.shape), like.new_empty(C if needs_weight else 0), like.new_empty(C if needs_bias else 0)


def _decomposition(x, weight, bias, eps, y_dtype=None):
    y = reference.layer_norm(x, weight, bias, eps)
    return y.to(x.dtype if y_dtype is None else y_dtype), x.new_empty(0), x.new_empty(0)


_library.register_decomposition("layer_norm", _decomposition)


def _triton_forward(x, weight, bias, eps, y_dtype=None):
    return _library.triton_kernel("layer_norm").forward(x, weight, bias, eps, y_dtype)


def _triton_backward(dy, x, weight, mean, rstd, needs_weight, needs_bias):
    return _library.triton_kernel("layer_norm").backward(dy, x, weight, mean, rstd, needs_weight, needs_bias)


_library.register_triton("layer_norm_forward", _triton_forward)
_library.register_triton("layer_norm_backward", _triton_backward)
