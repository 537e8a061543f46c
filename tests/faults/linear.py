"""Faults that tests/ops/test_linear.py and tests/ops/test_autocast_weights.py must catch."""

from tests.mutants import Fault

CPP, LINEAR, GEMM = "csrc/cpu/linear.cpp", "csrc/cpu/core/linear.h", "csrc/cpu/core/gemm.h"
WORDS = "csrc/cpu/core/words.h"

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
    # float32 weights of 16-bit products
    Fault("float32 weights cut into the first block's rows", GEMM, "rest.unrounded += offset;", "", "same_bits"),
    Fault("halves of words in each other's place", WORDS, "_mm512_cvtne2ps_pbh(second, first)", "_mm512_cvtne2ps_pbh(first, second)", "same_bits"),
    Fault("rows of pairs in each other's place", WORDS, "_mm512_cvtepu16_epi32(bits(even)), high = _mm512_cvtepu16_epi32(bits(odd))", "_mm512_cvtepu16_epi32(bits(odd)), high = _mm512_cvtepu16_epi32(bits(even))", "same_bits"),
    Fault("float32 elements left unrounded", GEMM, "at::vec::convert(rounded, buffer + j, count);", "std::memcpy(buffer + j, row + j, count * sizeof(float));", "same_bits"),
    Fault("last elements of a float32 row left out", GEMM, "std::memcpy(stage, rounded, count * sizeof(scalar_t));", "", "same_bits"),
    Fault("words read from rows that do not begin with one", GEMM, " && stride_n % PAIR == 0", "", "numerics or same_bits"),
    Fault("pairs read past the last row", GEMM, " && 2 * d + 1 < K", "", "numerics or same_bits"),
    Fault("sums of transposed tiles replaced", GEMM, "(Vec::loadu(to) + Vec::loadu(tile + lane * kVec)).store(to);", "Vec::loadu(tile + lane * kVec).store(to);", "transposed_weights"),
)  # fmt: skip
