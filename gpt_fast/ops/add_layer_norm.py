"""add_layer_norm: dropout, residual addition and layer normalisation in one pass."""

import torch
from torch import Tensor

from .. import reference
from . import _checks, _library
from .layer_norm import check_norm, has_plain_shapes

_library.define_forward(
    "add_layer_norm",
    "(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps, float dropout_p, Tensor? seed, int site,"
    " ScalarType? normed_dtype=None) -> (Tensor normed, Tensor summed, Tensor mean, Tensor rstd)",
)
# Without dropout and in one dtype dx is dresidual; the op then leaves dx empty, because outputs may not share memory.
_library.define_backward(
    "add_layer_norm",
    "(Tensor dnormed, Tensor? dsummed, Tensor summed, Tensor? weight, Tensor mean, Tensor rstd, ScalarType x_dtype,"
    " ScalarType residual_dtype, float dropout_p, Tensor? seed, int site, bool needs_weight, bool needs_bias)"
    " -> (Tensor dx, Tensor dresidual, Tensor dweight, Tensor dbias)",
)


def add_layer_norm(
    x: Tensor,
    residual: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    *,
    _normed_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Drop out, add the residual and normalise, in one pass.

    summed = residual + dropout(x); normed = layer_norm(summed) * weight + bias.

    A post-norm block uses `normed`. A pre-norm block carries `summed` on.

    Args:
        x: Output of a residual branch [..., C] in float32, bfloat16, float16 or float64.
        residual: Residual [..., C] in the shape of x. Its dtype may differ from that of x.
        weight: Gain [C], or None.
        bias: Bias [C] in the dtype of `weight`, or None. A bias needs a weight.
        eps: Positive number added to the variance.
        dropout_p: Dropout probability of x, in [0, 1).
        seed: Seed of dropout, int64, one element, on the device of x. Without a seed a new one is drawn.
        site: Number of this dropout within a forward pass. Calls with the same seed and another site get another mask.

    Returns:
        (normed, summed), both [..., C] in the wider dtype of x and residual (float32 for bfloat16 with float16).

    Raises:
        ValueError: A dtype or shape differs from the list above, the devices differ, a bias comes without weight, `eps`
            is not a positive number, or `dropout_p` lies outside [0, 1).
        NotImplementedError: A gradient is differentiated again.

    Example:
        ```python
        import torch
        from gpt_fast import ops

        x, residual, weight, bias = torch.randn(8, 64), torch.randn(8, 64), torch.ones(64), torch.zeros(64)
        normed, summed = ops.add_layer_norm(x, residual, weight, bias, dropout_p=0.1)
        print(normed.shape, summed.shape)  # torch.Size([8, 64]) torch.Size([8, 64])
        ```

    Note:
        Precision: statistics and sums are float32. `summed` is rounded once, and `normed` is the norm of the rounded
        sum, so that backward needs nothing else. The reference serves a call with any float64 argument.
        `_normed_dtype`, which only this library's blocks pass, replaces the dtype of `normed`.

        Dropout: whether an element is kept depends on `seed`, `site`, its row in x viewed as [M, C], and its column.
        `dropout_keep_rows` in `gpt_fast/reference.py` has the rule.

        Results are deterministic.

        Source: Vaswani et al. (2017), "Attention Is All You Need", section 5.4, arXiv:1706.03762.
    """
    # `_normed_dtype`, which only this library's blocks pass, is the dtype of `normed`: see `_library.product_dtype`.
    plain = (
        _library.is_plain_call("add_layer_norm", x, residual, weight, bias)
        and has_plain_shapes(x, weight, bias, eps)
        and residual is not None
        and residual.shape == x.shape
    )
    if type(site) is not int:
        _checks.integer("add_layer_norm", site=site)
    if not plain:
        _checks.tensors("add_layer_norm", x=x, residual=residual)
        check_norm("add_layer_norm", x, weight, bias, eps)
        _checks.floating("add_layer_norm", residual=residual)
        _checks.same_device("add_layer_norm", x=x, residual=residual)
        _checks.shape("add_layer_norm", "residual", residual, x.shape, "the shape of x")
    _checks.probability("add_layer_norm", "dropout_p", dropout_p)
    if seed is not None or dropout_p:
        _checks.seed("add_layer_norm", seed, x.device)
        seed = _library.seed_for(dropout_p, seed, x.device)
    if not plain and _library.runs_reference("add_layer_norm", x, residual, weight):
        normed, summed = _library.by_reference(
            reference.add_layer_norm, x.device.type, x, residual, weight, bias, eps, dropout_p, seed, site
        )
        return normed if _normed_dtype is None else normed.to(_normed_dtype), summed
    return _library.apply(_AddLayerNorm, x, residual, weight, bias, eps, dropout_p, seed, site, _normed_dtype)


class _AddLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, residual, weight, bias, eps, dropout_p, seed, site, normed_dtype):
        normed, summed, mean, rstd = torch.ops.gpt_fast.add_layer_norm_forward(
            x, residual, weight, bias, eps, dropout_p, seed, site, normed_dtype
        )
        ctx.save_for_backward(summed, weight, mean, rstd, seed)
        ctx.x_dtype, ctx.residual_dtype = x.dtype, residual.dtype
        ctx.dropout = dropout_p, site
        ctx.set_materialize_grads(False)
        return normed, summed

    @staticmethod
    def backward(ctx, dnormed, dsummed):
        summed, weight, mean, rstd, seed = ctx.saved_tensors
        dropout_p, site = ctx.dropout
        needs_weight, needs_bias = ctx.needs_input_grad[2:4]
        if dnormed is None:
            if dsummed is None:
                return (None,) * 9
            dnormed = torch.zeros_like(summed)
        dx, dresidual, dweight, dbias = _library.backward(
            "add_layer_norm", dnormed, dsummed, summed, weight, mean, rstd, ctx.x_dtype, ctx.residual_dtype, dropout_p,
            seed, site, needs_weight, needs_bias,
        )  # fmt: skip
        return (
            dx if _has_own_dx(ctx.x_dtype, ctx.residual_dtype, dropout_p) else dresidual,
            dresidual,
            dweight if needs_weight else None,
            dbias if needs_bias else None,
            *(None,) * 5,
        )


def _has_own_dx(x_dtype: torch.dtype, residual_dtype: torch.dtype, dropout_p: float) -> bool:
    """Return True if the gradient of x may differ from that of the residual: with dropout, or if their dtypes differ.

    If so, the backward operator returns dx as a tensor of its own. Otherwise it returns an empty dx.
    """
    return dropout_p > 0 or x_dtype != residual_dtype


@torch.library.register_fake("gpt_fast::add_layer_norm_forward", lib=_library.LIBRARY)
def _forward_fake(x, residual, weight, bias, eps, dropout_p, seed, site, normed_dtype=None):
    summed = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    mean = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return torch.empty_like(summed, dtype=normed_dtype), summed, mean, torch.empty_like(mean)


@torch.library.register_fake("gpt_fast::add_layer_norm_backward", lib=_library.LIBRARY)
def _backward_fake(
    dnormed, dsummed, summed, weight, mean, rstd, x_dtype, residual_dtype, dropout_p, seed, site, needs_weight,
    needs_bias,
):  # fmt: skip
    like = summed if weight is None else weight
    C = summed.shape[-1]
    dx_shape = summed.shape if _has_own_dx(x_dtype, residual_dtype, dropout_p) else (0,)
    return (
        summed.new_empty(dx_shape, dtype=x_dtype),
        summed.new_empty(summed.shape, dtype=residual_dtype),
        like.new_empty(C if needs_weight else 0),
        like.new_empty(C if needs_bias else 0),
    )


def _decomposition(x, residual, weight, bias, eps, dropout_p, seed, site, normed_dtype=None):
    normed, summed = reference.add_layer_norm(x, residual, weight, bias, eps, dropout_p, seed, site)
    return normed.to(normed_dtype or summed.dtype), summed, x.new_empty(0), x.new_empty(0)


_library.register_decomposition("add_layer_norm", _decomposition)


def _triton_forward(x, residual, weight, bias, eps, dropout_p, seed, site, normed_dtype=None):
    rule = _library.dropout_rule(dropout_p)
    return _library.triton_kernel("add_layer_norm").forward(
        x, residual, weight, bias, eps, *rule, seed, site, normed_dtype
    )


def _triton_backward(
    dnormed, dsummed, summed, weight, mean, rstd, x_dtype, residual_dtype, dropout_p, seed, site, needs_weight,
    needs_bias,
):  # fmt: skip
    return _library.triton_kernel("add_layer_norm").backward(
        dnormed, dsummed, summed, weight, mean, rstd, x_dtype, residual_dtype, *_library.dropout_rule(dropout_p), seed,
        site, needs_weight, needs_bias,
    )  # fmt: skip


_library.register_triton("add_layer_norm_forward", _triton_forward)
_library.register_triton("add_layer_norm_backward", _triton_backward)
