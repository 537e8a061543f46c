"""mlp: two linear layers with an activation and dropout between them."""

import torch
from torch import Tensor

from .. import _activations, reference
from . import _checks, _cublaslt, _flops, _library

# On CPU both weights may be float32 where x has 16 bits: the kernels round them while they pack them, and their
# gradients are float32 then. Autocast uses this.
#
# `hidden` [..., F] is kept for backward, in x's dtype: for relu the activation after dropout, which has the derivative,
# and for gelu the activation's input. It is empty if backward recomputes it. `needs` has a flag for each of the five
# gradients; the others come back empty.
_library.define_forward(
    "mlp",
    "(Tensor x, Tensor fc_weight, Tensor? fc_bias, Tensor proj_weight, Tensor? proj_bias, str activation,"
    " float dropout_p, Tensor? seed, int site, bool keeps_hidden) -> (Tensor y, Tensor hidden)",
)
_library.define_backward(
    "mlp",
    "(Tensor dy, Tensor x, Tensor fc_weight, Tensor? fc_bias, Tensor proj_weight, Tensor? hidden, str activation,"
    " float dropout_p, Tensor? seed, int site, bool[] needs)"
    " -> (Tensor dx, Tensor dfc_weight, Tensor dfc_bias, Tensor dproj_weight, Tensor dproj_bias)",
)
# csrc/cuda/mlp.cpp, where it was built: relu and gelu_tanh without dropout, in 16 bits, by cuBLASLt's epilogues. `mask`
# is one bit for each element of `hidden`, for relu, in an order known to cuBLASLt; else it is empty.
_library.define_forward(
    "mlp_cublaslt",
    "(Tensor x, Tensor fc_weight, Tensor? fc_bias, Tensor proj_weight, Tensor? proj_bias, str activation,"
    " bool keeps_hidden) -> (Tensor y, Tensor hidden, Tensor mask)",
)
_library.define_backward(
    "mlp_cublaslt",
    "(Tensor dy, Tensor x, Tensor fc_weight, Tensor? fc_bias, Tensor proj_weight, Tensor? hidden, Tensor? mask,"
    " str activation, bool[] needs)"
    " -> (Tensor dx, Tensor dfc_weight, Tensor dfc_bias, Tensor dproj_weight, Tensor dproj_bias)",
)


def mlp(
    x: Tensor,
    fc_weight: Tensor,
    fc_bias: Tensor | None,
    proj_weight: Tensor,
    proj_bias: Tensor | None,
    activation: str = "gelu_tanh",
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    site: int = 0,
    recompute: bool = False,
) -> Tensor:
    """Apply two linear layers with an activation and dropout between them.

    y = dropout(activation(x fc_weightᵀ + fc_bias)) proj_weightᵀ + proj_bias.

    Args:
        x: Input [..., C] in float32, bfloat16, float16 or float64. All tensors share one dtype.
        fc_weight: Weight [F, C] of the first layer. Weights may have any strides, and their gradients get the same.
        fc_bias: Bias [F], or None.
        proj_weight: Weight [C', F] of the second layer.
        proj_bias: Bias [C'], or None.
        activation: "relu", "gelu" or "gelu_tanh".
        dropout_p: Dropout probability of the hidden activation, in [0, 1).
        seed: Seed of dropout, int64, one element, on the device of x. Without a seed a new one is drawn.
        site: Number of this dropout within a forward pass. Calls with the same seed and another site get another mask.
        recompute: Keep no hidden tensor for backward, and repeat the first product there.

    Returns:
        y [..., C'] in the dtype of x.

    Raises:
        ValueError: A dtype, shape or device differs from the list above, the activation is unknown, or `dropout_p` lies
            outside [0, 1).
        NotImplementedError: A gradient is differentiated again.

    Example:
        ```python
        import torch
        from gpt_fast import ops

        x, fc_weight, proj_weight = torch.randn(8, 64), torch.randn(256, 64), torch.randn(64, 256)
        print(ops.mlp(x, fc_weight, None, proj_weight, None, "relu").shape)  # torch.Size([8, 64])
        ```

    Note:
        Precision: products accumulate in float32. The hidden activation is rounded once to the dtype of x, and so is
        each result. The backward of gelu starts from the activation's input rounded to the dtype of x. Where autocast
        is on, all tensors are cast to its dtype. On CPU the kernel does this to float32 weights while it reads them,
        and their gradients are not rounded. The reference serves float64.

        Dropout: whether a hidden element is kept depends on `seed`, `site`, the row i of x viewed as [M, C], and the
        column j of F. `dropout_keep_at` in `gpt_fast/reference.py` has the rule, with b = 0.

        Results are deterministic. On CPU they have the same bits at any number of threads.

        Cost: without `recompute`, one [..., F] tensor is kept for backward. Where cuBLASLt serves relu, one bit for
        each element of that tensor is added.

        Source: Vaswani et al. (2017), section 3.3; Hendrycks and Gimpel (2016), arXiv:1606.08415.
    """
    _checks.tensors("mlp", x=x, fc_weight=fc_weight, proj_weight=proj_weight)
    _checks.optional_tensors("mlp", fc_bias=fc_bias, proj_bias=proj_bias)
    _checks.integer("mlp", site=site)
    x, fc_bias, proj_bias = _library.autocast(x, fc_bias, proj_bias)
    if _library.rounds_weights("mlp", x, fc_weight, proj_weight):
        _checks.floating_alike("mlp", x=x, fc_bias=fc_bias, proj_bias=proj_bias)
    else:
        x, fc_weight, proj_weight = _library.autocast(x, fc_weight, proj_weight)
        _checks.floating_alike(
            "mlp", x=x, fc_weight=fc_weight, fc_bias=fc_bias, proj_weight=proj_weight, proj_bias=proj_bias
        )
    _checks.dimensions("mlp", "fc_weight", fc_weight, "[F, C]")
    _checks.dimensions("mlp", "proj_weight", proj_weight, "[C', F]")
    if x.dim() == 0 or x.shape[-1] != fc_weight.shape[1]:
        raise ValueError(
            f"gpt_fast.mlp: x has shape {list(x.shape)}; expected [..., {fc_weight.shape[1]}] as fc_weight"
        )
    if proj_weight.shape[1] != fc_weight.shape[0]:
        raise ValueError(
            f"gpt_fast.mlp: proj_weight has shape {list(proj_weight.shape)}; expected [C', {fc_weight.shape[0]}] "
            "to follow fc_weight"
        )
    _checks.shape("mlp", "fc_bias", fc_bias, fc_weight.shape[:1], "the rows of fc_weight")
    _checks.shape("mlp", "proj_bias", proj_bias, proj_weight.shape[:1], "the rows of proj_weight")
    _activations.find("gpt_fast.mlp", activation)
    _checks.probability("mlp", "dropout_p", dropout_p)
    _checks.seed("mlp", seed, x.device)
    seed = _library.seed_for(dropout_p, seed, x.device)
    args = x, fc_weight, fc_bias, proj_weight, proj_bias, activation, dropout_p, seed, site
    if _library.runs_reference("mlp", x):
        return _library.by_reference(reference.mlp, x.device.type, *args)
    if x.is_cuda and _cublaslt_serves(x, fc_weight, proj_weight, activation, dropout_p):
        return _library.apply(_CublasLtMLP, *args[:6], recompute)
    return _library.apply(_MLP, *args, recompute)


def _cublaslt_serves(x: Tensor, fc_weight: Tensor, proj_weight: Tensor, activation: str, dropout_p: float) -> bool:
    """Return True if cuBLASLt can compute a call of `mlp` with these arguments and was measured to beat Triton."""
    if dropout_p or not _activations.ACTIVATIONS[activation].cublaslt:
        return False
    F, C = fc_weight.shape
    sizes = C, F, proj_weight.shape[0]
    return _cublaslt.serves("mlp", f"cublaslt {activation}", "mlp_cublaslt_forward", x, sizes)


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fc_weight, fc_bias, proj_weight, proj_bias, activation, dropout_p, seed, site, recompute):
        keeps_hidden = not recompute and any(ctx.needs_input_grad)
        y, hidden = torch.ops.gpt_fast.mlp_forward(
            x, fc_weight, fc_bias, proj_weight, proj_bias, activation, dropout_p, seed, site, keeps_hidden
        )
        ctx.save_for_backward(x, fc_weight, fc_bias, proj_weight, hidden if keeps_hidden else None, seed)
        ctx.options = activation, dropout_p, site
        return y

    @staticmethod
    def backward(ctx, dy):
        x, fc_weight, fc_bias, proj_weight, hidden, seed = ctx.saved_tensors
        activation, dropout_p, site = ctx.options
        needs = list(ctx.needs_input_grad[:5])
        grads = _library.backward(
            "mlp", dy, x, fc_weight, fc_bias, proj_weight, hidden, activation, dropout_p, seed, site, needs
        )
        return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), *(None,) * 5


class _CublasLtMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, fc_weight, fc_bias, proj_weight, proj_bias, activation, recompute):
        keeps_hidden = not recompute and any(ctx.needs_input_grad)
        y, hidden, mask = torch.ops.gpt_fast.mlp_cublaslt_forward(
            x, fc_weight, fc_bias, proj_weight, proj_bias, activation, keeps_hidden
        )
        kept = (hidden, mask if activation == "relu" else None) if keeps_hidden else (None, None)
        ctx.save_for_backward(x, fc_weight, fc_bias, proj_weight, *kept)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx, dy):
        needs = list(ctx.needs_input_grad[:5])
        grads = _library.backward("mlp_cublaslt", dy, *ctx.saved_tensors, ctx.activation, needs)
        return *(grad if needed else None for grad, needed in zip(grads, needs, strict=True)), None, None


@torch.library.register_fake("gpt_fast::mlp_forward", lib=_library.LIBRARY)
def _forward_fake(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, dropout_p, seed, site, keeps_hidden):
    F = fc_weight.shape[0]
    return (
        x.new_empty(*x.shape[:-1], proj_weight.shape[0]),
        x.new_empty((*x.shape[:-1], F) if keeps_hidden else (0,)),
    )


@torch.library.register_fake("gpt_fast::mlp_backward", lib=_library.LIBRARY)
def _backward_fake(dy, x, fc_weight, fc_bias, proj_weight, hidden, activation, dropout_p, seed, site, needs):
    F, C_out = fc_weight.shape[0], proj_weight.shape[0]
    needs_x, needs_fc_weight, needs_fc_bias, needs_proj_weight, needs_proj_bias = needs
    nothing = (0,)
    return (
        x.new_empty(x.shape if needs_x else nothing),
        torch.empty_like(fc_weight) if needs_fc_weight else x.new_empty(nothing),
        x.new_empty((F,) if needs_fc_bias else nothing),
        torch.empty_like(proj_weight) if needs_proj_weight else x.new_empty(nothing),
        x.new_empty((C_out,) if needs_proj_bias else nothing),
    )


@torch.library.register_fake("gpt_fast::mlp_cublaslt_forward", lib=_library.LIBRARY)
def _cublaslt_forward_fake(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, keeps_hidden):
    y, hidden = _forward_fake(
        x, fc_weight, fc_bias, proj_weight, proj_bias, activation, 0.0, None, 0, keeps_hidden
    )  # fmt: skip
    M, F = x.numel() // x.shape[-1], fc_weight.shape[0]
    mask = (M, (F + 127) // 128 * 16) if keeps_hidden and activation == "relu" else (0,)
    return y, hidden, x.new_empty(mask, dtype=torch.uint8)


@torch.library.register_fake("gpt_fast::mlp_cublaslt_backward", lib=_library.LIBRARY)
def _cublaslt_backward_fake(dy, x, fc_weight, fc_bias, proj_weight, hidden, mask, activation, needs):
    return _backward_fake(dy, x, fc_weight, fc_bias, proj_weight, hidden, activation, 0.0, None, 0, needs)


def _decomposition(x, fc_weight, fc_bias, proj_weight, proj_bias, *args):
    parameters = fc_weight.to(x.dtype), fc_bias, proj_weight.to(x.dtype), proj_bias
    return reference.mlp(x, *parameters, *args[:-1]), x.new_empty(0)  # the last one is keeps_hidden


def _cublaslt_decomposition(x, *args):
    return *_decomposition(x, *args), x.new_empty(0)


_library.register_decomposition("mlp", _decomposition)
_library.register_decomposition("mlp_cublaslt", _cublaslt_decomposition)


def _triton_forward(
    x, fc_weight, fc_bias, proj_weight, proj_bias, activation, dropout_p, seed, site, keeps_hidden
):  # fmt: skip
    kernel, rule = _library.triton_kernel("mlp"), _library.dropout_rule(dropout_p)
    return kernel.forward(x, fc_weight, fc_bias, proj_weight, proj_bias, activation, *rule, seed, site, keeps_hidden)


def _triton_backward(dy, x, fc_weight, fc_bias, proj_weight, hidden, activation, dropout_p, seed, site, needs):
    kernel, rule = _library.triton_kernel("mlp"), _library.dropout_rule(dropout_p)
    return kernel.backward(dy, x, fc_weight, fc_bias, proj_weight, hidden, activation, *rule, seed, site, needs)


_library.register_triton("mlp_forward", _triton_forward)
_library.register_triton("mlp_backward", _triton_backward)


def _forward_flops(x, fc_weight, fc_bias, proj_weight, *options, **_):
    """Return the FLOPs of a forward pass, given shapes in place of tensors."""
    return _flops.product(x, fc_weight) + _flops.product((*x[:-1], fc_weight[0]), proj_weight)


def _backward_flops(dy, x, fc_weight, fc_bias, proj_weight, hidden, *options, **_):
    """Return the FLOPs of the gradients that are needed, for the operator's arguments with shapes in place of tensors.

    The last of `options` holds five flags, which say what is needed: dx, dfc_weight, dfc_bias, dproj_weight,
    dproj_bias. If `hidden` is None, the first product is counted once more, because backward repeats it.
    """
    needs_x, needs_fc_weight, needs_fc_bias, needs_proj_weight = options[-1][:4]
    fc, proj = _flops.product(x, fc_weight), _flops.product(dy, proj_weight[::-1])
    recomputed = hidden is None
    needs_hidden = needs_x or needs_fc_weight or needs_fc_bias
    return (recomputed + needs_x + needs_fc_weight) * fc + (needs_hidden + needs_proj_weight) * proj


_flops.register("mlp_forward", _forward_flops)
_flops.register("mlp_backward", _backward_flops)
_flops.register("mlp_cublaslt_forward", _forward_flops)
_flops.register("mlp_cublaslt_backward", _backward_flops)
