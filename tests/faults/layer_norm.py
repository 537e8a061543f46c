"""Faults that tests/ops/test_layer_norm.py must catch."""

from tests.mutants import Fault

TRITON = "kernels/layer_norm.py"
CPP, NORM, COMMON = "csrc/cpu/layer_norm.cpp", "csrc/cpu/core/norm.h", "csrc/cpu/core/common.h"
OPS, LIBRARY = "gpt_fast/ops/layer_norm.py", "gpt_fast/ops/_library.py"
TRANSFORMS = "gpt_fast/_transforms.py"

FAULTS = (
    # Triton, forward
    Fault("mean over the padded width", TRITON, "mean = rough + shift", "mean = (rough + shift) * N / x.shape[1]"),
    Fault("unbiased variance", TRITON, "axis=1) / N - shift * shift", "axis=1) / (N - 1) - shift * shift"),
    Fault("eps dropped", TRITON, "tl.sqrt_rn(variance + eps)", "tl.sqrt_rn(variance)"),
    Fault("eps added to the deviation", TRITON, "1.0 / tl.sqrt_rn(variance + eps)", "1.0 / (tl.sqrt_rn(variance) + eps)"),
    Fault("variance of what is not centred in the padding", TRITON, "tl.where(mask, x - rough[:, None], 0.0)", "x - rough[:, None]"),
    Fault("bfloat16 mean", TRITON, "mean = rough + shift", "mean = (rough + shift).to(tl.bfloat16).to(tl.float32)"),
    Fault("mean not corrected", TRITON, "mean = rough + shift", "mean = rough", "constant"),
    Fault("variance as a difference of squares", TRITON, "tl.sum(rest * rest, axis=1) / N - shift * shift", "tl.sum(x * x, axis=1) / N - mean * mean"),
    Fault("last row of a tile skipped", TRITON, "mask_m, mask_n = offs_m < M, offs_n < N", "mask_m, mask_n = offs_m < M - 1, offs_n < N"),
    Fault("last column skipped", TRITON, "mask_m, mask_n = offs_m < M, offs_n < N", "mask_m, mask_n = offs_m < M, offs_n < N - 1"),
    Fault("rows taken as contiguous, forward", TRITON, "x = tl.load(x_ptr + offs_m[:, None] * stride_x + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)\n    y, mean", "x = tl.load(x_ptr + offs_m[:, None] * N + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)\n    y, mean"),
    Fault("weight taken as packed, forward", TRITON, "weight_ptr=packed(weight), bias_ptr=packed(bias)", "weight_ptr=weight, bias_ptr=packed(bias)", "parameters"),
    Fault("bias taken as packed", TRITON, "weight_ptr=packed(weight), bias_ptr=packed(bias)", "weight_ptr=packed(weight), bias_ptr=bias", "parameters"),
    Fault("weight taken as packed, backward", TRITON, "dy_ptr=dy_rows, x_ptr=rows, weight_ptr=packed(weight),", "dy_ptr=dy_rows, x_ptr=rows, weight_ptr=weight,", "parameters"),
    Fault("weight added", TRITON, "y *= tl.load(weight_ptr", "y += tl.load(weight_ptr"),
    Fault("bias ignored", TRITON, "HAS_BIAS=bias is not None", "HAS_BIAS=False"),
    Fault("wrong statistics saved", TRITON, "tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)", "tl.store(rstd_ptr + offs_m, rstd * rstd, mask=mask_m)"),
    Fault("32-bit offsets of rows, forward", TRITON, "offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)", "offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)", "2_to_the_31"),
    # Triton, backward
    Fault("32-bit offsets of rows, backward", TRITON, "offs_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)", "offs_m = (first + tl.arange(0, BLOCK_M)).to(tl.int32)", "2_to_the_31"),
    Fault("first gradient term dropped", TRITON, "dx = (g - mean_g[:, None] - xhat", "dx = (g - xhat"),
    Fault("second gradient term dropped", TRITON, "- mean_g[:, None] - xhat * mean_gx[:, None]) *", "- mean_g[:, None]) *"),
    Fault("gradient not scaled by rstd", TRITON, "xhat * mean_gx[:, None]) * rstd[:, None]", "xhat * mean_gx[:, None])"),
    Fault("mean of the gradient over the padded width", TRITON, "mean_g = tl.sum(g, axis=1) / N", "mean_g = tl.sum(g, axis=1) / g.shape[1]"),
    Fault("weight left out of the gradient", TRITON, "g = dy * weight[None, :]", "g = dy"),
    Fault("weight gradient without normalisation", TRITON, "return dx, dy * xhat", "return dx, dy * x"),
    Fault("weight gradient through the weight", TRITON, "return dx, dy * xhat", "return dx, g * xhat"),
    Fault("sums of the last tile alone", TRITON, "dbias += tl.sum(dy, axis=0)", "dbias = tl.sum(dy, axis=0)"),
    Fault("weight and bias gradients swapped", TRITON, "partial_dweight_ptr=partial[0], partial_dbias_ptr=partial[1]", "partial_dweight_ptr=partial[1], partial_dbias_ptr=partial[0]"),
    Fault("bfloat16 sums", TRITON, "partial = torch.empty((2, P, N) if needs_sums else (2, 0, 0), dtype=torch.float32", "partial = torch.empty((2, P, N) if needs_sums else (2, 0, 0), dtype=torch.bfloat16"),
    Fault("programs' stride too long", TRITON, "range(program * BLOCK_M, M, programs * BLOCK_M)", "range(program * BLOCK_M, M, programs * BLOCK_M * 2)"),
    Fault("rows taken as contiguous, backward", TRITON, "dy_ptr + offs_m[:, None] * stride_dy", "dy_ptr + offs_m[:, None] * N"),
    Fault("second stage skips its tail", TRITON, "for first in range(0, P, BLOCK_P)", "for first in range(0, P - BLOCK_P + 1, BLOCK_P)"),
    # C++, forward
    Fault("unbiased variance", NORM, "squares / N - shift * shift", "squares / (N - 1) - shift * shift"),
    Fault("mean not corrected", NORM, "return {rough + shift,", "return {rough,", "constant"),
    Fault("eps dropped", NORM, "variance + static_cast<float>(eps)", "variance"),
    Fault("bias ignored", NORM, "if (bias != nullptr) value", "if (false) value"),
    Fault("tail of a row skipped", COMMON, "if (j < N) body(j, N - j);", ""),
    Fault("rows taken as contiguous", COMMON, "stride_(rows_.stride(0) * rows_.element_size())", "stride_(rows_.size(1) * rows_.element_size())"),
    # C++, backward
    Fault("first gradient term dropped", NORM, "(g - mean_g - normalised(j, count) * mean_gx)", "(g - normalised(j, count) * mean_gx)"),
    Fault("second gradient term dropped", NORM, "(g - mean_g - normalised(j, count) * mean_gx)", "(g - mean_g)"),
    Fault("weight gradient through the weight", NORM, "fmadd(upstream, xhat, Vec::loadu(dweight", "fmadd(g, xhat, Vec::loadu(dweight"),
    Fault("weight and bias gradients swapped", CPP, "{dx, gradients.dweight(), gradients.dbias()}", "{dx, gradients.dbias(), gradients.dweight()}"),
    Fault("last row block left out", NORM, "block < blocks_; ++block", "block < blocks_ - 1; ++block"),
    Fault("partial sums not cleared", NORM, "std::fill_n(sums, N_, 0.0f);", ""),
    # Python: checks and autograd
    Fault("statistics swapped", OPS, "ctx.save_for_backward(x, weight, mean, rstd)", "ctx.save_for_backward(x, weight, rstd, mean)"),
    Fault("gradients of weight and bias swapped", OPS, "dweight if needs_weight else None, dbias if needs_bias else None", "dbias if needs_weight else None, dweight if needs_bias else None"),
    Fault("the bias has the weight's number", OPS, "needs_weight, needs_bias = ctx", "needs_bias, needs_weight = ctx"),
    Fault("differentiated twice in silence", LIBRARY, "if torch.is_grad_enabled() and not torch.compiler.is_compiling():", "if False:", "double"),
    Fault("a weight of any size", OPS, "weight.shape == columns", "weight.dim() == 1", "bad_input"),
    Fault("a bias of any size", OPS, "bias.shape == columns", "bias.dim() == 1", "bad_input"),
    Fault("an eps of any sign", OPS, "        and eps > 0", "        and True", "bad_input"),
    Fault("dtypes mixed", LIBRARY, "tensor.dtype != dtype or tensor.device != device", "tensor.device != device", "bad_input"),
    Fault("the reference where a kernel was not asked for", LIBRARY, "if _reference_forced or _transforms.is_recording() or", "if _transforms.is_recording() or", "reference"),
    Fault("nothing recorded", TRANSFORMS, "if isinstance(arg, Tensor) and arg.requires_grad:", "if False:"),
    Fault("tangents dropped in silence", TRANSFORMS, "return forward_ad._current_level >= 0", "return False", "forward_mode"),
)  # fmt: skip
