"""Faults that tests/test_mlp.py must catch, those of the matrix rule of dropout and of the products among them."""

from tests.mutants import Fault

CPP, GEMM, PHILOX = "csrc/cpu/mlp.cpp", "csrc/cpu/gemm.h", "csrc/philox.h"

FAULTS = (
    # C++, activations
    Fault("slope of relu at zero", CPP, "z > Vec(0.0f))};", "z >= Vec(0.0f))};", "large_arguments"),
    Fault("density dropped from gelu's slope", CPP, "at::vec::fmadd(z, pdf, cdf)", "cdf", "numerics"),
    Fault("gelu to three digits", CPP, "Vec(0.70710678f)", "Vec(0.707f)", "numerics"),
    Fault("cube left out of gelu_tanh", CPP, "c * z * at::vec::fmadd(square, Vec(0.044715f), one)", "c * z", "numerics"),
    Fault("cube left out of gelu_tanh's slope", CPP, "c * at::vec::fmadd(square, Vec(3.0f * 0.044715f), one)", "c", "numerics"),
    Fault("factor dropped from gelu_tanh's slope", CPP, "cdf - z * cdf * (one - cdf) * slope_u", "cdf - z * cdf * slope_u", "numerics"),
    # C++, forward
    Fault("first bias of the first block for all", CPP, "Vec::loadu(fc_bias + column + j)).store", "Vec::loadu(fc_bias + j)).store", "numerics"),
    Fault("second bias of the first block for all", CPP, "Vec::loadu(bias + column + j)", "Vec::loadu(bias + j)", "numerics"),
    Fault("second bias left out", CPP, "proj_weight.size(0), F, proj_bias,", "proj_weight.size(0), F, nullptr,", "numerics"),
    Fault("scale dropped, forward", CPP, "keep.apply(Vec::loadu(row + j) * Vec(dropout->scale), j)", "keep.apply(Vec::loadu(row + j), j)", "numerics"),
    Fault("dropout of the chunk's row", CPP, "dropout->row_pair(0, first + i, column,", "dropout->row_pair(0, i, column,", "dropout_mask"),
    Fault("dropout of the first block of columns for all", CPP, "dropout->row_pair(0, first + i, column,", "dropout->row_pair(0, first + i, 0,", "dropout_mask"),
    Fault("both rows of a pair drop the upper's", CPP, "row(i + 8, dropout.has_value() ? lower : nullptr)", "row(i + 8, dropout.has_value() ? upper : nullptr)", "dropout_mask"),
    Fault("rows past the eighth skipped", CPP, "if (i + 8 < rows) row(i + 8", "if (i + 9 < rows) row(i + 8", "numerics"),
    Fault("a number equal to the threshold drops", CPP, "kept[j] = bits[j] >= threshold", "kept[j] = bits[j] > threshold", "threshold"),
    Fault("activation kept, not its input", CPP, "if (ACTIVATION != Activation::kRelu && hidden != nullptr) round_row(row, hidden", "if (ACTIVATION != Activation::kRelu && hidden != nullptr) round_row(h.row(i), hidden", "numerics"),
    Fault("hidden activation in bfloat16", CPP, "round_row(row, h.row(i), kBlock);", "for (int64_t j = 0; j < kBlock; ++j) row[j] = static_cast<float>(at::BFloat16(row[j]));\n        round_row(row, h.row(i), kBlock);", "numerics"),
    Fault("hidden activation of every chunk in the first's place", CPP, "hidden.mutable_data_ptr<scalar_t>() + first * F", "hidden.mutable_data_ptr<scalar_t>()", "chunk"),
    # C++, backward
    Fault("scale dropped, backward", CPP, "Vec::loadu(dz_row + j) * Vec(scale) * at_z.slope", "Vec::loadu(dz_row + j) * at_z.slope", "numerics"),
    Fault("slope dropped", CPP, "Vec::loadu(dz_row + j) * Vec(scale) * at_z.slope", "Vec::loadu(dz_row + j) * Vec(scale)", "numerics"),
    Fault("dropout left out of the gradient", CPP, "if (needs_dz) keep.apply(Vec::loadu(dz_row + j), j).store(dz_row + j);", "", "dropout_mask"),
    Fault("dropout left out of the recomputed activation", CPP, "keep.apply(Vec::loadu(h_values + j), j).store(h_values + j);", "", "numerics"),
    Fault("scale dropped from the recomputed activation", CPP, "at_z.value * Vec(scale)).store(h_values + j)", "at_z.value).store(h_values + j)", "numerics"),
    Fault("bias left out of what is recomputed", CPP, "(Vec::loadu(z_row + j) + Vec::loadu(in.fc_bias + column + j)).store(z_row + j);", "", "recomputing"),
    Fault("what is recomputed is not rounded", CPP, "round_row(z_row, saved, kBlock);\n                       widen<kBlock>(saved, z_row);", "", "recomputing"),
    Fault("gradients of the last chunk alone", CPP, "const bool accumulate = first > 0;", "const bool accumulate = false;", "chunk"),
    Fault("sums over chunks in the weight's dtype", CPP, "if (needed && chunks > 1 && gradient.scalar_type() != at::kFloat) {", "if (false) {", "chunk"),
    Fault("first bias gradient of the last chunk alone", CPP, "out.fc_bias[column + j] += bias_sums[j]", "out.fc_bias[column + j] = bias_sums[j]", "chunk"),
    Fault("second bias gradient of the last chunk alone", CPP, "out.proj_bias[column + j] += sums[j]", "out.proj_bias[column + j] = sums[j]", "chunk"),
    Fault("second bias gradient skips a row", CPP, "for (int64_t i = 0; i < M; ++i) {\n          at::vec::convert(dy", "for (int64_t i = 1; i < M; ++i) {\n          at::vec::convert(dy", "numerics"),
    Fault("bfloat16 bias sums", CPP, "add_to_column_sums(dz_row, bias_sums);", "add_to_column_sums(dz_row, bias_sums);\n                     for (float& sum : bias_sums) sum = static_cast<float>(at::BFloat16(sum));", "numerics"),
    Fault("first weight's gradient from the upstream one", CPP, "multiply_by_block(*packed_x_t, dz_rounded)", "multiply_by_block(*packed_x_t, h_rounded)", "numerics"),
    Fault("gradient of a transposed weight in rows", CPP, "int64_t stride(int64_t dim) const { return gradient_.stride(dim); }", "int64_t stride(int64_t dim) const { return dim == 0 ? gradient_.size(1) : 1; }", "transposed_weights"),
    Fault("upstream gradient taken as contiguous", CPP, "at::vec::convert(dy + i * in.dy.stride(0) + column, row, width)", "at::vec::convert(dy + i * C_out + column, row, width)", "strided_weights_and_upstream"),
    Fault("gradients of no rows left unset", CPP, "dfc_weight.zero_();", "", "empty_batch"),
    # C++, products
    Fault("last rows skipped where there is no whole panel", GEMM, "for (int64_t i = 0; i < M; i += kRows) {\n      // The next", "for (int64_t i = 0; i + kRows <= M; i += kRows) {\n      // The next", "numerics"),
    Fault("second vector of a tile from the first", GEMM, "FORMAT::multiply_add(ai, b1, sums[i][1])", "FORMAT::multiply_add(ai, b0, sums[i][1])", "numerics"),
    Fault("last link of a chain alone", GEMM, "stride_c, accumulate || d > 0,", "stride_c, accumulate,", "long_sums"),
    Fault("last depth block alone", GEMM, "b_.data(), stride_b, c, kBlock, d > 0);", "b_.data(), stride_b, c, kBlock, false);", "long_sums"),
    Fault("sums of nothing left unset", GEMM, "if (K == 0) std::fill(c, c + (last - first) * kBlock, 0.0f);", "", "sizes_of_zero"),
    Fault("transposed operands read as rows", GEMM, "return {x.const_data_ptr<scalar_t>(), x.stride(1), x.stride(0)};", "return {x.const_data_ptr<scalar_t>(), x.stride(0), x.stride(1)};", "numerics"),
    Fault("missing parameters not zero", GEMM, "padded.narrow(0, 0, n).zero_();", "padded.narrow(0, 0, n).fill_(1);", "without_biases"),
    Fault("no columns divide by zero", GEMM, "std::max<int64_t>(column_blocks, 1)", "column_blocks", "sizes_of_zero"),
    # C++, the matrix rule
    Fault("one round fewer", PHILOX, "kPhiloxRounds = 7", "kPhiloxRounds = 6", "dropout_mask"),
    Fault("rows of a pair swapped", PHILOX, "std::memcpy(upper + column, words[0]", "std::memcpy(upper + column, words[2]", "dropout_mask"),
    Fault("columns 8 to 15 are 0 to 7 again", PHILOX, "std::memcpy(upper + column + 8, words[1]", "std::memcpy(upper + column + 8, words[0]", "dropout_mask"),
    Fault("wrong lane", PHILOX, "std::memcpy(lower + column, words[2] + 4 * group, 16)", "std::memcpy(lower + column, words[2] + 4 * group + 1, 16)", "dropout_mask"),
    Fault("rows 8 apart count as neighbours", PHILOX, "(i / 16) * 8 + i % 8", "i / 2", "dropout_mask"),
    Fault("site ignored", PHILOX, "static_cast<uint32_t>(b), site, key, words", "static_cast<uint32_t>(b), 0, key, words", "dropout_mask"),
)  # fmt: skip
