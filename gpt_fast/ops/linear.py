"""linear: the projection of a layer, with kernels for CPUs."""

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _checks, _cublaslt, _flops, _library, _products

# On CPU the weight may be float32 where x has 16 bits: the kernels round it while they pack it, and its gradient is
# float32 then. Autocast uses this.
_library.define_forward("linear", "(Tensor x, Tensor weight, Tensor? bias) -> Tensor y")
_library.define_backward(
    "linear",
    "(Tensor dy, Tensor x, Tensor weight, bool needs_x, bool needs_weight, bool needs_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
)
# csrc/cuda/linear.cpp, where it was built: in 16 bits, the bias's gradient in the product of the weight's.
_library.define_backward(
    "linear_cublaslt",
    "(Tensor dy, Tensor x, Tensor weight, bool needs_x, bool needs_weight, bool needs_bias)"
    " -> (Tensor dx, Tensor dweight, Tensor dbias)",
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Project the last dimension by a weight and a bias.

    y = x weightᵀ + bias.

    Args:
        x: Input [..., C] in float32, bfloat16, float16 or float64. All tensors share one dtype.
        weight: Weight [N, C]. It may have any strides, and its gradient gets the same.
        bias: Bias [N], or None.

    Returns:
        y [..., N] in the dtype of x.

    Raises:
        ValueError: A dtype, shape or device differs from the list above.
        NotImplementedError: A gradient is differentiated again.

    Example:
        ```python
        import torch
        from gpt_fast import ops

        print(ops.linear(torch.randn(8, 64), torch.randn(256, 64)).shape)  # torch.Size([8, 256])
        ```

    Note:
        Precision: sums are float32, and each result is rounded once. Where autocast is on, all tensors are cast to its
        dtype. On CPU the kernel does this to a float32 weight while it reads it, and the weight's gradient is not
        rounded.

        Results are deterministic. On CPU they have the same bits at any number of threads.

        Cost: on CPU this op has a C++ kernel, with the same matrix products as `mlp`. PyTorch's products in bfloat16
        and float16 are up to 80 times as slow as in float32 if the CPU has no instructions for these dtypes.

        On some CPUs PyTorch's products are faster than the kernel. `gpt-fast tune --device cpu` measures this once for
        the machine. If they are faster, they serve from then on, and the bits may depend on the number of threads.

        On other devices, for float64 and under `use_reference`, this op is `F.linear`, which is also its definition.

        Source: `torch.nn.functional.linear`.
    """
    _checks.tensors("linear", x=x, weight=weight)
    _checks.optional_tensors("linear", bias=bias)
    x, bias = _library.autocast(x, bias)
    if rounds := _library.rounds_weights("linear", x, weight):
        _checks.floating_alike("linear", x=x, bias=bias)
    else:
        x, weight = _library.autocast(x, weight)
        _checks.floating_alike("linear", x=x, weight=weight, bias=bias)
    _checks.dimensions("linear", "weight", weight, "[N, C]")
    if x.dim() == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(f"gpt_fast.linear: x has shape {list(x.shape)}; expected [..., {weight.shape[1]}] as weight")
    _checks.shape("linear", "bias", bias, weight.shape[:1], "the rows of weight")
    if rounds or _library.has_kernel("linear", x):
        if not _products.serves_torch(x, rounds):
            return _library.apply(_Linear, x, weight, bias)
        x, weight = _library.autocast(x, weight)
    if bias is not None and x.is_cuda and torch.is_grad_enabled() and _cublaslt_serves(x, weight):
        return _library.apply(_CublasLtLinear, x, weight, bias)
    return F.linear(x, weight, bias)


def _cublaslt_serves(x: Tensor, weight: Tensor) -> bool:
    """Return True if cuBLASLt computes the backward pass of linear for CUDA tensors x [..., C] and `weight` [N, C].

    It does if the extension has it, x has 16 bits, C and N are multiples of 8, and the table of launch configurations
    says that it was measured to be faster than PyTorch at this width. As shipped, the table says so for none.
    """
    sizes = weight.shape[1], weight.shape[0]
    return _library.allows_kernels(x) and _cublaslt.serves("linear", "cublaslt", "linear_cublaslt_backward", x, sizes)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return torch.ops.gpt_fast.linear_forward(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        grads = _library.backward("linear", dy, x, weight, *needs)
        return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


class _CublasLtLinear(torch.autograd.Function):
    """PyTorch's product, whose backward sums the bias's gradient in the product of the weight's."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        needs = ctx.needs_input_grad
        grads = _library.backward("linear_cublaslt", dy, *ctx.saved_tensors, *needs)
        return tuple(grad if needed else None for grad, needed in zip(grads, needs, strict=True))


@torch.library.register_fake("gpt_fast::linear_forward", lib=_library.LIBRARY)
def _forward_fake(x, weight, bias):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _decomposition(x, weight, bias):
    return F.linear(x, weight.to(x.dtype), bias)


_library.register_decomposition("linear", _decomposition)


@torch.library.register_fake("gpt_fast::linear_cublaslt_backward", lib=_library.LIBRARY)
@torch.library.register_fake("gpt_fast::linear_backward", lib=_library.LIBRARY)
def _backward_fake(dy, x, weight, needs_x, needs_weight, needs_bias):
    nothing = (0,)
    return (
        x.new_empty(x.shape if needs_x else nothing),
        torch.empty_like(weight) if needs_weight else x.new_empty(nothing),
        x.new_empty((weight.shape[0],) if needs_bias else nothing),
    )


def _forward_flops(x, weight, bias, **_):
    """Return the FLOPs of a forward pass, given shapes in place of tensors."""
    return _flops.product(x, weight)


def _backward_flops(dy, x, weight, needs_x, needs_weight, needs_bias, **_):
    """Return the FLOPs of the gradients that are needed, given shapes in place of tensors."""
    return (needs_x + needs_weight) * _flops.product(x, weight)


_flops.register("linear_forward", _forward_flops)
_flops.register("linear_backward", _backward_flops)
_flops.register("linear_cublaslt_backward", _backward_flops)
