"""Faults that tests/ops/test_add_layer_norm.py must catch; those of the norm itself are layer_norm's."""

from tests.mutants import Fault

TRITON, CPP, NORM = "kernels/add_layer_norm.py", "csrc/cpu/add_layer_norm.cpp", "csrc/cpu/core/norm.h"
OPS = "gpt_fast/ops/add_layer_norm.py"

FAULTS = (
    # Triton, forward
    Fault("residual left out", TRITON, "summed = (residual.to(tl.float32) + x)", "summed = (residual.to(tl.float32) * 0 + x)", "shapes"),
    Fault("the residual is dropped, not the branch", TRITON, "x = tl.where(keep, x * scale, 0.0)", "residual = tl.where(keep, residual * scale, 0.0)", "residual_is_not"),
    Fault("scale dropped, forward", TRITON, "x = tl.where(keep, x * scale, 0.0)", "x = tl.where(keep, x, 0.0)", "dropout"),
    Fault("dropout of one row for all", TRITON, "keep = keep_rows(offs_m[:, None], offs_n[None, :], site, threshold, seed_ptr)\n        x =", "keep = keep_rows(offs_m[:, None] * 0, offs_n[None, :], site, threshold, seed_ptr)\n        x =", "dropout"),
    Fault("dropout one column off", TRITON, "keep = keep_rows(offs_m[:, None], offs_n[None, :], site, threshold, seed_ptr)\n        x =", "keep = keep_rows(offs_m[:, None], offs_n[None, :] + 1, site, threshold, seed_ptr)\n        x =", "dropout"),
    Fault("norm of the sum before it is rounded", TRITON, "summed.to(tl.float32), mask, weight_ptr", "residual.to(tl.float32) + x, mask, weight_ptr", "dtypes"),
    Fault("sum rounded to bfloat16", TRITON, "summed = (residual.to(tl.float32) + x).to(summed_ptr.dtype.element_ty)", "summed = (residual.to(tl.float32) + x).to(tl.bfloat16).to(summed_ptr.dtype.element_ty)", "shapes"),
    Fault("eps dropped", TRITON, "offs_n, mask_n, N, eps, HAS_WEIGHT, HAS_BIAS\n", "offs_n, mask_n, N, 0.0, HAS_WEIGHT, HAS_BIAS\n", "shapes"),
    Fault("bias ignored", TRITON, "HAS_BIAS=bias is not None", "HAS_BIAS=False", "shapes"),
    Fault("last row of a tile skipped, forward", TRITON, "mask_m, mask_n = offs_m < M, offs_n < N", "mask_m, mask_n = offs_m < M - 1, offs_n < N", "shapes"),
    Fault("last column skipped, forward", TRITON, "mask_m, mask_n = offs_m < M, offs_n < N", "mask_m, mask_n = offs_m < M, offs_n < N - 1", "shapes"),
    Fault("weight taken as packed, forward", TRITON, "residual_ptr=residual_rows, weight_ptr=packed(weight),", "residual_ptr=residual_rows, weight_ptr=weight,", "parameters"),
    Fault("bias taken as packed", TRITON, "bias_ptr=packed(bias)", "bias_ptr=bias", "parameters"),
    Fault("weight taken as packed, backward", TRITON, "summed_ptr=summed, weight_ptr=packed(weight)", "summed_ptr=summed, weight_ptr=weight", "parameters"),
    Fault("residual taken as contiguous", TRITON, "offs_m[:, None] * stride_residual", "offs_m[:, None] * N", "strided"),
    Fault("branch taken as contiguous", TRITON, "offs_m[:, None] * stride_x", "offs_m[:, None] * N", "strided"),
    Fault("wrong statistics saved", TRITON, "tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)", "tl.store(rstd_ptr + offs_m, rstd * rstd, mask=mask_m)", "shapes"),
    # Triton, backward
    Fault("gradient of the sum left out", TRITON, "d += tl.load(dsummed_ptr + offs_dsummed", "d += 0 * tl.load(dsummed_ptr + offs_dsummed", "shapes"),
    Fault("gradient of the sum alone", TRITON, "d += tl.load(dsummed_ptr + offs_dsummed", "d = tl.load(dsummed_ptr + offs_dsummed", "shapes"),
    Fault("scale dropped, backward", TRITON, "d = tl.where(keep, d * scale, 0.0)", "d = tl.where(keep, d, 0.0)", "dropout"),
    Fault("dropout left out of the gradient", TRITON, "d = tl.where(keep, d * scale, 0.0)", "d = d * scale", "dropout"),
    Fault("gradient of the residual dropped too", TRITON, "tl.store(dresidual_ptr + offs, d, mask=mask)\n", "tl.store(dresidual_ptr + offs, tl.where(keep_rows(offs_m[:, None], offs_n[None, :], site, threshold, seed_ptr), d, 0.0) if HAS_DROPOUT else d, mask=mask)\n", "shapes"),
    Fault("dropout of the row in its tile", TRITON, "keep = keep_rows(offs_m[:, None], offs_n[None, :], site, threshold, seed_ptr)\n                d =", "keep = keep_rows((offs_m - first)[:, None], offs_n[None, :], site, threshold, seed_ptr)\n                d =", "dropout"),
    Fault("sums of the last tile alone", TRITON, "dbias += tl.sum(dnormed, axis=0)", "dbias = tl.sum(dnormed, axis=0)", "several_tiles"),
    Fault("programs' stride too long", TRITON, "range(program * BLOCK_M, M, programs * BLOCK_M)", "range(program * BLOCK_M, M, programs * BLOCK_M * 2)", "several_tiles"),
    Fault("weight and bias gradients swapped", TRITON, "dweight_ptr=partial[0], dbias_ptr=partial[1]", "dweight_ptr=partial[1], dbias_ptr=partial[0]", "shapes"),
    Fault("bfloat16 sums", TRITON, "partial = torch.empty((2, P, N) if needs_sums else (2, 0, 0), dtype=torch.float32", "partial = torch.empty((2, P, N) if needs_sums else (2, 0, 0), dtype=torch.bfloat16", "shapes"),
    Fault("last column skipped, backward", TRITON, "mask_n = offs_n < N\n    weight", "mask_n = offs_n < N - 1\n    weight", "shapes"),
    Fault("last row skipped, backward", TRITON, "mask_m = offs_m < M\n", "mask_m = offs_m < M - 1\n", "shapes"),
    Fault("upstream gradient taken as contiguous", TRITON, "offs_m[:, None] * stride_dnormed", "offs_m[:, None] * N", "strided_upstream"),
    Fault("gradient of the sum taken as contiguous", TRITON, "offs_m[:, None] * stride_dsummed", "offs_m[:, None] * N", "strided_upstream"),
    Fault("no gradient of its own for another dtype", TRITON, "has_dx = seed is not None or x_dtype != residual_dtype", "has_dx = seed is not None", "dtypes"),
    # C++, forward
    Fault("residual left out", CPP, "(Vec::loadu(stream_row + j, count) + kept)", "(kept)", "shapes"),
    Fault("the residual is dropped, not the branch", CPP, "(Vec::loadu(stream_row + j, count) + kept)", "(Vec::loadu(stream_row + j, count) * Vec::loadu(factors.data() + j, count) + Vec::loadu(branch_row + j, count))", "residual_is_not"),
    Fault("dropout of a thread's first row for all", CPP, "if (dropout) dropout->row(i, N, factors.data());\n      float* sum_row", "if (dropout) dropout->row(begin, N, factors.data());\n      float* sum_row", "dropout"),
    Fault("dropout left out, forward", CPP, "if (dropout) dropout->row(i, N, factors.data());\n      float* sum_row", "float* sum_row", "dropout"),
    Fault("norm of the sum before it is rounded", CPP, "const float* stored = sum.read(i, sum_buffer.data());", "const float* stored = sum_row;", "dtypes"),
    Fault("eps dropped", CPP, "row_statistics(stored, N, eps)", "row_statistics(stored, N, 0.0)", "shapes"),
    Fault("bfloat16 mean", CPP, "const Statistics statistics = row_statistics(stored, N, eps);", "Statistics statistics = row_statistics(stored, N, eps);\n      statistics.mean = static_cast<float>(at::BFloat16(statistics.mean));", "shapes"),
    Fault("bias ignored", CPP, "gain.data(), shift.data(), N, target", "gain.data(), nullptr, N, target", "shapes"),
    Fault("wrong statistics saved", CPP, "mean_data[i] = statistics.mean;", "mean_data[i] = statistics.rstd;", "shapes"),
    Fault("last row of a thread's share skipped", CPP, "i < end; ++i) {\n      const float* branch_row", "i < end - 1; ++i) {\n      const float* branch_row", "shapes"),
    Fault("outputs of the branch's dtype", CPP, "c10::promoteTypes(x.scalar_type(), residual.scalar_type())", "x.scalar_type()", "dtypes"),
    # C++, backward
    Fault("gradient of the sum left out", CPP, "if (carried) {", "if (false) {", "shapes"),
    Fault("gradient of the sum alone", CPP, "at::vec::map2<float>(add, total, total, carried_row, N);", "std::copy_n(carried_row, N, total);", "shapes"),
    Fault("dropout left out of the gradient", CPP, "if (dropout) dropout->row(i, N, factors.data());\n        float* target", "float* target", "dropout"),
    Fault("dropout of the row in its block", CPP, "if (dropout) dropout->row(i, N, factors.data());\n        float* target", "if (dropout) dropout->row(i - begin, N, factors.data());\n        float* target", "dropout"),
    Fault("no gradient of its own for another dtype", CPP, "dropout || x_dtype != residual_dtype", "dropout.has_value()", "dtypes"),
    Fault("gradients of branch and residual swapped", CPP, "return {dx, dresidual, gradients.dweight(), gradients.dbias()};", "return {own_dx ? dresidual : dx, own_dx ? dx : dresidual, gradients.dweight(), gradients.dbias()};", "shapes"),
    Fault("weight and bias gradients swapped", CPP, "return {dx, dresidual, gradients.dweight(), gradients.dbias()};", "return {dx, dresidual, gradients.dbias(), gradients.dweight()};", "shapes"),
    Fault("last row of a block skipped", CPP, "i < end; ++i) {\n      float* total", "i < end - 1; ++i) {\n      float* total", "shapes"),
    # C++, the norm's arithmetic on the summed row
    Fault("unbiased variance", NORM, "squares / N - shift * shift", "squares / (N - 1) - shift * shift", "shapes"),
    Fault("second gradient term dropped", NORM, "(g - mean_g - normalised(j, count) * mean_gx)", "(g - mean_g)", "shapes"),
    # Python: checks and autograd
    Fault("no gradient without one of the norm", OPS, "            if dsummed is None:\n", "            if True:\n", "shapes"),
    Fault("gradient of the sum not handed on", OPS, "\"add_layer_norm\", dnormed, dsummed, summed", "\"add_layer_norm\", dnormed, None, summed", "shapes"),
    Fault("dx that dropout left empty", OPS, "return dropout_p > 0 or x_dtype != residual_dtype", "return x_dtype != residual_dtype", "dropout"),
    Fault("parameters numbered after one input", OPS, "ctx.needs_input_grad[2:4]", "ctx.needs_input_grad[1:3]"),
    Fault("a residual of any shape", OPS, "and residual.shape == x.shape", "and residual.dim() == x.dim()", "bad_input"),
)  # fmt: skip
