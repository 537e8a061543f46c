"""Faults that tests/ops/test_linear.py must catch."""

from tests.mutants import Fault

CPP, LINEAR, GEMM = "csrc/cpu/linear.cpp", "csrc/cpu/core/linear.h", "csrc/cpu/core/gemm.h"

FAULTS = (
    Fault("bias left out", CPP, "N, C, shift.const_data_ptr<float>(),", "N, C, nullptr,", "numerics"),
    Fault("results of every chunk in the first's place", CPP, "y_rows.mutable_data_ptr<scalar_t>() + first * N", "y_rows.mutable_data_ptr<scalar_t>()", "numerics"),
    Fault("gradients of the last chunk alone", CPP, "gradient, first > 0);", "gradient, false);", "numerics"),
    Fault("bias gradient of the first chunk's rows", CPP, "add_column_sums<scalar_t>(dy_chunk,", "add_column_sums<scalar_t>(dy_rows.narrow(0, 0, M),", "numerics"),
    Fault("gradient of every chunk in the first's place", CPP, "dx.mutable_data_ptr<scalar_t>() + first * C", "dx.mutable_data_ptr<scalar_t>()", "numerics"),
    Fault("rows of x for its columns", CPP, "Operand<scalar_t> columns = columns_of<scalar_t>(x)", "Operand<scalar_t> columns = rows_of<scalar_t>(x)", "numerics"),
    Fault("gradient of one block for all", CPP, "gradient.stride(1), first,\n                                      column, accumulate", "gradient.stride(1), first,\n                                      0, accumulate", "numerics"),
    Fault("gradient in rows whatever the weight's strides", CPP, "gradient.stride(0), gradient.stride(1), first", "C, 1, first", "transposed_weights"),
    Fault("gradients of no rows left unset", CPP, "if (total == 0) dweight.zero_();", "", "empty_batch"),
    Fault("sums over chunks in the weight's dtype", LINEAR, "if (needed && chunks > 1 && gradient.scalar_type() != at::kFloat) {", "if (false) {", "numerics"),
    Fault("bias of the first block for all", LINEAR, "Vec::loadu(bias + column + j)", "Vec::loadu(bias + j)", "numerics"),
    Fault("panels side by side in each other's place", GEMM, "packed + panel * panel_stride + d * WIDTH", "packed + (panel ^ 1) * panel_stride + d * WIDTH", "numerics"),
    Fault("panels after whole groups packed over the first", GEMM, "packed += 4 * panel_stride;", "", "numerics"),
)  # fmt: skip
