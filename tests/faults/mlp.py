"""Faults that tests/ops/test_mlp.py must catch, those of the matrix rule of dropout and of the products among them."""

from tests.mutants import Fault

TRITON, PRODUCT = "kernels/mlp.py", "kernels/gemm.py"
ACTIVATIONS = "csrc/cpu/core/activations.h"
CPP, LINEAR, GEMM, PHILOX = "csrc/cpu/mlp.cpp", "csrc/cpu/core/linear.h", "csrc/cpu/core/gemm.h", "csrc/philox.h"

FAULTS = (
    # Triton, activations
    Fault("slope of relu at zero", TRITON, "slope = tl.where(z > 0.0, 1.0, 0.0)", "slope = tl.where(z >= 0.0, 1.0, 0.0)", "large_arguments"),
    Fault("density dropped from gelu's slope", TRITON, "slope = cdf + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))", "slope = cdf", "numerics"),
    Fault("gelu to three digits", TRITON, "tl.erf(z * 0.7071067811865476)", "tl.erf(z * 0.707)", "numerics"),
    Fault("cube left out of gelu_tanh", TRITON, "z * (1.0 + 0.044715 * square)))", "z))", "numerics"),
    Fault("cube left out of gelu_tanh's slope", TRITON, "(1.5957691216057308 * (1.0 + 0.134145 * square))", "1.5957691216057308", "numerics"),
    # Triton, forward
    Fault("first bias of the first tile for all", TRITON, "    if bias_ptr is not None:\n        offs_n = n + tl.arange(0, z.shape[1])", "    if bias_ptr is not None:\n        offs_n = tl.arange(0, z.shape[1])", "numerics"),
    Fault("second bias left out", TRITON, "_linear(h, proj_weight, proj_bias, y.view(M, C_out))", "_linear(h, proj_weight, None, y.view(M, C_out))", "numerics"),
    Fault("scale dropped, forward", TRITON, "keep = keep_matrix(i, j, tl.zeros_like(j), site, threshold, seed_ptr)\n    return tl.where(keep, value * scale, 0.0)", "keep = keep_matrix(i, j, tl.zeros_like(j), site, threshold, seed_ptr)\n    return tl.where(keep, value, 0.0)", "dropout_mask"),
    Fault("dropout of the tile's row", TRITON, "i = m + tl.arange(0, value.shape[0])[:, None]", "i = tl.arange(0, value.shape[0])[:, None]", "chunk"),
    Fault("dropout of the tile's column", TRITON, "j = n + tl.arange(0, value.shape[1])[None, :]", "j = tl.arange(0, value.shape[1])[None, :]", "dropout_mask"),
    Fault("right half stored over the left", TRITON, "right, out, kept, bias_ptr, seed_ptr, m, n + BLOCK_N // 2, M, N", "right, out, kept, bias_ptr, seed_ptr, m, n, M, N", "numerics"),
    Fault("activation kept, not its input", TRITON, "store(kept, z, m, n", "store(kept, _activate(z, ACTIVATION)[0], m, n", "numerics"),
    # Triton, backward
    Fault("slope dropped", TRITON, "dz = dh * slope", "dz = dh", "numerics"),
    Fault("scale dropped from relu's gradient", TRITON, "dz *= scale  # 0", "dz *= 1.0  # 0", "dropout_mask"),
    Fault("dropout left out of the gradient", TRITON, "dz = tl.where(keep, dz * scale, 0.0)", "dz = dz * scale", "dropout_mask"),
    Fault("dropout left out of the hidden layer made again", TRITON, "value = tl.where(keep, value * scale, 0.0)", "value = value * scale", "numerics"),
    Fault("wrong lane of the gradient's dropout", TRITON, "j = n + tl.arange(0, dh.shape[1])[None, :]", "j = n + 1 + tl.arange(0, dh.shape[1])[None, :]", "dropout_mask"),
    Fault("second quarter stored over the first", TRITON, "m, n + side * (BLOCK_N // 2) + BLOCK_N // 4, M, N,", "m, n + side * (BLOCK_N // 2), M, N,", "numerics"),
    Fault("bias sums of the last tile of rows alone", TRITON, "partial_ptr + (m // BLOCK_M).to(tl.int64) * N + offs_n", "partial_ptr + offs_n", "chunk"),
    Fault("bfloat16 bias sums", TRITON, "tl.sum(dz, axis=0), mask", "tl.sum(dz, axis=0).to(tl.bfloat16).to(tl.float32), mask", "numerics"),
    Fault("first weight's gradient from the hidden layer", TRITON, "_linear(dz.t(), rows.t(), None, dfc_weight)", "_linear(h.t(), rows.t(), None, dfc_weight)", "numerics"),
    Fault("input's gradient from the hidden layer", TRITON, "_linear(dz, fc_weight.t(), None", "_linear(h, fc_weight.t(), None", "numerics"),
    Fault("bias left out of what is recomputed", TRITON, "_hidden(rows, fc_weight, fc_bias, h, z, activation, threshold, scale, seed, site)\n        else", "_hidden(rows, fc_weight, None, h, z, activation, threshold, scale, seed, site)\n        else", "recomputing"),
    Fault("gradients of no rows left unset", TRITON, "return dx, dfc_weight.zero_()", "return dx, dfc_weight", "empty_batch"),
    # Triton, products
    Fault("last step of a sum left out", PRODUCT, "for k in range(0, K, BLOCK_K):", "for k in range(0, K - BLOCK_K + 1, BLOCK_K):", "numerics"),
    Fault("last row of a tile not stored", PRODUCT, "mask = (offs_r < rows)[:, None] & (offs_c < columns)[None, :]\n        tl.store", "mask = (offs_r < rows - 1)[:, None] & (offs_c < columns)[None, :]\n        tl.store", "numerics"),
    Fault("columns past the end read", PRODUCT, "mask=(offs_r < rows)[:, None] & (offs_c < columns)[None, :], other=0.0)\n    return result", "mask=(offs_r < rows)[:, None] & (offs_c < columns + 1)[None, :], other=0.0)\n    return result", "numerics"),
    Fault("transposed descriptor taken for the matrix", PRODUCT, "result = tl.trans(source.load([column, row]))", "result = tl.trans(source.load([row, column]))", "numerics"),
    Fault("rounded towards zero", PRODUCT, "bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000", "bits = bits & 0xFFFF0000", "numerics"),
    Fault("a tile of every group left out", PRODUCT, "return (group + inside % height) * BLOCK_M", "return (group + (inside + 1) % height * (height > 2)) * BLOCK_M", "chunk"),
    Fault("second step of the bias sums left out", PRODUCT, "for m in range(first, tl.minimum(first + ROWS, M), BLOCK_M):", "for m in range(first, tl.minimum(first + BLOCK_M, M), BLOCK_M):", "chunk"),
    # C++, activations
    Fault("slope of relu at zero", ACTIVATIONS, "z > Vec(0.0f))};", "z >= Vec(0.0f))};", "large_arguments"),
    Fault("density dropped from gelu's slope", ACTIVATIONS, "at::vec::fmadd(z, pdf, cdf)", "cdf", "numerics"),
    Fault("gelu to three digits", ACTIVATIONS, "Vec(0.70710678f)", "Vec(0.707f)", "numerics"),
    Fault("cube left out of gelu_tanh", ACTIVATIONS, "c * z * at::vec::fmadd(square, Vec(0.044715f), one)", "c * z", "numerics"),
    Fault("cube left out of gelu_tanh's slope", ACTIVATIONS, "c * at::vec::fmadd(square, Vec(3.0f * 0.044715f), one)", "c", "numerics"),
    Fault("factor dropped from gelu_tanh's slope", ACTIVATIONS, "cdf - z * cdf * (one - cdf) * slope_u", "cdf - z * cdf * slope_u", "numerics"),
    # C++, forward
    Fault("first bias of the first block for all", CPP, "Vec::loadu(fc_bias + column + j)).store", "Vec::loadu(fc_bias + j)).store", "numerics"),
    Fault("second bias of the first block for all", LINEAR, "Vec::loadu(bias + column + j)", "Vec::loadu(bias + j)", "numerics"),
    Fault("second bias left out", CPP, "proj_weight.size(0), F, proj_bias,", "proj_weight.size(0), F, nullptr,", "numerics"),
    Fault("scale dropped, forward", CPP, "keep.apply(Vec::loadu(row + j) * Vec(dropout->scale), j)", "keep.apply(Vec::loadu(row + j), j)", "numerics"),
    Fault("dropout of the chunk's row", CPP, "dropout->row_pair(0, first + i, column,", "dropout->row_pair(0, i, column,", "dropout_mask"),
    Fault("dropout of the first block of columns for all", CPP, "dropout->row_pair(0, first + i, column,", "dropout->row_pair(0, first + i, 0,", "dropout_mask"),
    Fault("both rows of a pair drop the upper's", CPP, "row(i + 8, dropout.has_value() ? lower : nullptr)", "row(i + 8, dropout.has_value() ? upper : nullptr)", "dropout_mask"),
    Fault("rows past the eighth skipped", CPP, "if (i + 8 < rows) row(i + 8", "if (i + 9 < rows) row(i + 8", "numerics"),
    Fault("a number equal to the threshold drops", CPP, "kept[j] = bits[j] >= threshold", "kept[j] = bits[j] > threshold", "threshold"),
    Fault("activation kept, not its input", CPP, "if (ACTIVATION != Activation::kRelu && hidden != nullptr) round_row(row, hidden", "float kept[kBlock]; for (int64_t j = 0; j < kBlock; j += kVec) activate<ACTIVATION>(Vec::loadu(row + j)).value.store(kept + j); if (ACTIVATION != Activation::kRelu && hidden != nullptr) round_row(kept, hidden", "numerics"),
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
    Fault("sums over chunks in the weight's dtype", LINEAR, "if (needed && chunks > 1 && gradient.scalar_type() != at::kFloat) {", "if (false) {", "chunk"),
    Fault("first bias gradient of the last chunk alone", CPP, "out.fc_bias[column + j] += bias_sums[j]", "out.fc_bias[column + j] = bias_sums[j]", "chunk"),
    Fault("second bias gradient of the last chunk alone", LINEAR, "sums[j] += total[j - begin]", "sums[j] = total[j - begin]", "chunk"),
    Fault("second bias gradient skips a row", LINEAR, "for (int64_t i = 0; i < M; ++i) {", "for (int64_t i = 1; i < M; ++i) {", "numerics"),
    Fault("bfloat16 bias sums", CPP, "add_to_column_sums(dz_row, bias_sums);", "add_to_column_sums(dz_row, bias_sums);\n                     for (float& sum : bias_sums) sum = static_cast<float>(at::BFloat16(sum));", "numerics"),
    Fault("first weight's gradient from the upstream one", CPP, "multiply_by_block(*packed_x_t, dz_rounded)", "multiply_by_block(*packed_x_t, h_rounded)", "numerics"),
    Fault("gradient of a transposed weight in rows", LINEAR, "int64_t stride(int64_t dim) const { return gradient_.stride(dim); }", "int64_t stride(int64_t dim) const { return dim == 0 ? gradient_.size(1) : 1; }", "transposed_weights"),
    Fault("upstream gradient taken as contiguous", LINEAR, "rows + i * dy.stride(0) + begin", "rows + i * N + begin", "strided_weights_and_upstream"),
    Fault("gradients of no rows left unset", CPP, "dfc_weight.zero_();", "", "empty_batch"),
    # C++, products
    Fault("last rows skipped where there is no whole panel", GEMM, "for (int64_t i = 0; i < M; i += kRows) {\n      // The next", "for (int64_t i = 0; i + kRows <= M; i += kRows) {\n      // The next", "numerics"),
    Fault("second vector of a tile from the first", GEMM, "Words::multiply_add(ai, b1, sums[i][1])", "Words::multiply_add(ai, b0, sums[i][1])", "numerics"),
    Fault("last link of a chain alone", GEMM, "stride_c, accumulate || d > 0,", "stride_c, accumulate,", "long_sums"),
    Fault("last depth block alone", GEMM, "b_.data(), stride_b, c, kBlock, d > 0);", "b_.data(), stride_b, c, kBlock, false);", "long_sums"),
    Fault("sums of nothing left unset", GEMM, "if (K == 0) std::fill(c, c + (last - first) * kBlock, 0.0f);", "", "sizes_of_zero"),
    Fault("transposed operands read as rows", GEMM, "return {x.const_data_ptr<scalar_t>(), x.stride(1), x.stride(0)};", "return {x.const_data_ptr<scalar_t>(), x.stride(0), x.stride(1)};", "numerics"),
    Fault("missing parameters not zero", GEMM, "padded.narrow(0, 0, n).zero_();", "padded.narrow(0, 0, n).fill_(1);", "without_biases"),
    Fault("no columns divide by zero", GEMM, "std::max<int64_t>(column_blocks, 1)", "column_blocks", "sizes_of_zero"),
    # C++, the matrix rule
    Fault("one round fewer", PHILOX, "kPhiloxRounds = 7", "kPhiloxRounds = 6", "dropout_mask"),
    Fault("rows of a pair swapped", PHILOX, "(row == 0 ? upper : lower)", "(row == 1 ? upper : lower)", "dropout_mask"),
    Fault("columns 8 to 15 are 0 to 7 again", PHILOX, "second = at.words(2 * row + 1)", "second = at.words(2 * row)", "dropout_mask"),
    Fault("wrong lane", PHILOX, "j / 16 * 4 + column / 4", "j / 16 * 4 + column / 8", "dropout_mask"),
    Fault("rows 8 apart count as neighbours", PHILOX, "(i / 16) * 8 + i % 8", "i / 2", "dropout_mask"),
    Fault("site ignored", PHILOX, "site, key);\n      // Four counters, half", "0, key);\n      // Four counters, half", "dropout_mask"),
)  # fmt: skip
