"""Faults that tests/test_linear_cross_entropy.py must catch."""

from tests.mutants import Fault

CPP, GEMM = "csrc/cpu/linear_cross_entropy.cpp", "csrc/cpu/gemm.h"

FAULTS = (
    # C++, forward
    Fault("largest logit not subtracted", CPP, "(Vec::loadu(row + j) - Vec(m)).exp()", "Vec::loadu(row + j).exp()", "large_logits"),
    Fault("sums of blocks not brought to one maximum", CPP, "sum += of_block.sum * std::exp(of_block.largest - largest);", "sum += of_block.sum;", "several_chunks"),
    Fault("maximum left out of the logarithm", CPP, "const double lse = largest + std::log(sum);", "const double lse = std::log(sum);", "numerics"),
    Fault("bias of the first block for all", CPP, "const float* bias = in_.bias + block * kBlock;", "const float* bias = in_.bias;", "numerics"),
    Fault("padding of the vocabulary counts", CPP, "padded_parameter(bias, V, -std::numeric_limits<float>::infinity());\n\n  Results out;\n  out.loss", "padded_parameter(bias, V, 0.0f);\n\n  Results out;\n  out.loss", "numerics"),
    Fault("share of the target not reduced by smoothing", CPP, "(1.0 - in_.smoothing) * (lse - target_logit_[i])", "(lse - target_logit_[i])", "label_smoothing"),
    Fault("smoothing by the largest logit alone", CPP, "in_.smoothing * (lse - logits / V)", "in_.smoothing * lse", "label_smoothing"),
    Fault("smoothing over the padded vocabulary", CPP, "in_.smoothing * (lse - logits / V)", "in_.smoothing * (lse - logits / (blocks * kBlock))", "label_smoothing"),
    Fault("mean over all rows", CPP, "total /= static_cast<double>(std::max<int64_t>(count, 1));", "total /= static_cast<double>(std::max<int64_t>(N, 1));", "numerics"),
    Fault("mean of nothing", CPP, "std::max<int64_t>(count, 1)", "count", "nothing_counts"),
    Fault("all rows counted for the gradient", CPP, "at::scalar_tensor(static_cast<double>(count), sums)", "at::scalar_tensor(static_cast<double>(N), sums)", "numerics"),
    Fault("sum for mean", CPP, 'if (reduction == "mean") total', 'if (reduction == "max") total', "numerics"),
    Fault("losses in the order of the counted rows", CPP, "loss[row] = static_cast<float>(value);", "loss[begin_ + i] = static_cast<float>(value);", "ignored_rows"),
    Fault("loss in bfloat16", CPP, "loss[row] = static_cast<float>(value);", "loss[row] = static_cast<float>(at::BFloat16(static_cast<float>(value)));", "numerics"),
    Fault("targets not checked from above", CPP, "values[i] >= 0 && values[i] < V", "values[i] >= 0", "checks_targets"),
    Fault("targets not checked from below", CPP, "values[i] >= 0 && values[i] < V", "values[i] < V", "checks_targets"),
    Fault("only -100 is ignored", CPP, "if (values[i] == ignore_index) continue;", "if (values[i] == -100) continue;", "ignore_index"),
    Fault("weight's rows taken as contiguous", CPP, "{weight.data + v * weight.stride_n, weight.stride_n, weight.stride_k}, width, C, logits", "{weight.data + v * C, C, 1}, width, C, logits", "transposed_weight"),
    # C++, backward
    Fault("target left out of the gradient", CPP, "values[j] -= scale * (1.0f - in_.smoothing);", "values[j] -= 0.0f;", "numerics"),
    Fault("target's gradient not reduced by smoothing", CPP, "values[j] -= scale * (1.0f - in_.smoothing);", "values[j] -= scale;", "label_smoothing"),
    Fault("smoothing left out of the gradient", CPP, "smooth(scale * in_.smoothing / V)", "smooth(0.0f)", "label_smoothing"),
    Fault("smoothing not scaled", CPP, "smooth(scale * in_.smoothing / V)", "smooth(in_.smoothing / V)", "label_smoothing"),
    Fault("probabilities not scaled", CPP, "factors_[block * M + i] = scale * static_cast<float>", "factors_[block * M + i] = static_cast<float>", "numerics"),
    Fault("probabilities relative to their block", CPP, "static_cast<float>(std::exp(largest_of_block - largest) / sum)", "static_cast<float>(1.0 / sum)", "several_chunks"),
    Fault("bfloat16 probabilities", CPP, "factors_[block * M + i] = scale * static_cast<float>(std::exp(largest_of_block - largest) / sum)", "factors_[block * M + i] = scale * static_cast<float>(at::BFloat16(static_cast<float>(std::exp(largest_of_block - largest) / sum)))", "numerics"),
    Fault("upstream gradient in the order of the counted rows", CPP, "in_.scale[in_.rows.index[begin_ + i]]", "in_.scale[begin_ + i]", "numerics"),
    Fault("dx in the order of the counted rows", CPP, "in_.rows.index[begin_ + i] * C, C);", "(begin_ + i) * C, C);", "numerics"),
    Fault("dx of ignored rows left unset", CPP, "valid < rows ? at::zeros(x.sizes(), x.options())", "valid < 0 ? at::zeros(x.sizes(), x.options())", "numerics"),
    Fault("last part of dx left out", CPP, "for (int64_t group = 1; group < groups; ++group)", "for (int64_t group = 1; group < groups - 1; ++group)", "numerics"),
    Fault("dx of the last wide block of its group alone", CPP, "part + c, padded_C, wide > group_begin)", "part + c, padded_C, false)", "more_classes"),
    Fault("weight gradient of the last chunk alone", CPP, "chunk.backward(out, begin > 0)", "chunk.backward(out, false)", "several_chunks"),
    Fault("bias gradient of the last chunk alone", CPP, "out.dbias[v + j] += bias_sums[j]", "out.dbias[v + j] = bias_sums[j]", "several_chunks"),
    Fault("weight gradient of nothing left unset", CPP, "if (N == 0 && out.dweight.defined()) out.dweight.zero_();", "", "nothing_counts"),
    Fault("weight gradient in rows whatever the weight's strides", CPP, "out.dweight.mutable_data_ptr<float>() + v * out.dweight.stride(0),\n                        out.dweight.stride(1), out.dweight.stride(0), accumulate)", "out.dweight.mutable_data_ptr<float>() + v * C, 1, C, accumulate)", "transposed_weight"),
    Fault("x of the first rows for all", CPP, "in_.rows.index[begin + i] * in_.x.stride(0), C * sizeof(scalar_t)", "(begin + i) * in_.x.stride(0), C * sizeof(scalar_t)", "numerics"),
    Fault("x taken as contiguous", CPP, "in_.rows.index[begin + i] * in_.x.stride(0), C * sizeof(scalar_t)", "in_.rows.index[begin + i] * C, C * sizeof(scalar_t)", "strided_input"),
    # C++, products
    Fault("last rows skipped where there is no whole panel", GEMM, "for (int64_t i = 0; i < M; i += kRows) {\n      // The next", "for (int64_t i = 0; i + kRows <= M; i += kRows) {\n      // The next", "numerics"),
    Fault("last column of a transposed tile skipped", GEMM, "lane < std::min(kVec, width - j); ++lane", "lane < std::min(kVec, width - j) - 1; ++lane", "numerics"),
)  # fmt: skip
