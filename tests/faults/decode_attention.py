"""Faults that tests/ops/test_decode_attention.py must catch."""

from tests.mutants import Fault

TRITON = "kernels/decode_attention.py"
CPP, CACHE = "csrc/cpu/decode_attention.cpp", "csrc/cpu/decode/attention.h"

FAULTS = (
    # Triton, over keys
    Fault("scores not scaled", TRITON, "q = q.to(tl.float32) * scale", "q = q.to(tl.float32) * 1.4426950408889634", "numerics"),
    Fault("exponential to the wrong base", TRITON, "D**-0.5 * LOG2E", "D**-0.5", "numerics"),
    Fault("length of the batch's first", TRITON, "n = _keys(lengths_ptr + b, S", "n = _keys(lengths_ptr, S", "numerics"),
    Fault("keys past the length attended to", TRITON, "mask_n = offs_n < n", "mask_n = offs_n < S", "numerics"),
    Fault("last key left out", TRITON, "mask_n = offs_n < n", "mask_n = (offs_n < n - 1) | (n == 1)", "numerics"),
    Fault("only the first tile of a split", TRITON, "for first in range(0, SPLIT, BLOCK_N):", "for first in range(0, BLOCK_N, BLOCK_N):", "numerics"),
    Fault("padded keys count as scores of 0", TRITON, "s = tl.where(mask_n, tl.sum(q[None, :] * k, axis=1), -float(\"inf\"))", "s = tl.sum(q[None, :] * k, axis=1)", "numerics"),
    Fault("largest score not subtracted", TRITON, "p = tl.exp2(s - m_new)", "p = tl.exp2(s)", "numerics"),
    Fault("sums of the tiles before not shrunk", TRITON, "l = l * shrink + tl.sum(p, axis=0)", "l = l + tl.sum(p, axis=0)", "large_scores"),
    Fault("rows of the tiles before not shrunk", TRITON, "acc = acc * shrink + tl.sum(p[:, None] * v, axis=0)", "acc = acc + tl.sum(p[:, None] * v, axis=0)", "large_scores"),
    Fault("keys' heads taken as contiguous", TRITON, "h * stride_kh + offs_n", "h * S * D + offs_n", "strided"),
    Fault("values' rows taken as contiguous", TRITON, "offs_n[:, None] * stride_vt", "offs_n[:, None] * D", "strided"),
    Fault("query's elements taken as neighbours of another head", TRITON, "h * stride_qh", "h * D * 2", "numerics"),
    Fault("lengths taken as packed", TRITON, "lengths = lengths.contiguous()", "lengths = lengths", "strided"),
    Fault("lengths not clamped from above", TRITON, "n = tl.minimum(n, S)\n", "n = n * 1\n", "out_of_range"),
    # Triton, with a new key and value
    Fault("new key not written", TRITON, "                tl.store(k_ptr + offs_k, k_new, mask=mask_d)\n", "", "append"),
    Fault("new value written over the first", TRITON, "(n - 1) * stride_vt", "0 * stride_vt", "append"),
    Fault("new key read from the cache", TRITON, "k = tl.where(is_new, k_new.to(tl.float32)[None, :], k)", "k = k * 1.0", "append"),
    Fault("new key not counted", TRITON, "n = tl.minimum(n, S - 1) + 1", "n = tl.minimum(n, S - 1)", "append"),
    Fault("new value's heads taken as contiguous", TRITON, "h * stride_vnh", "h * D", "append"),
    Fault("every split writes the new key", TRITON, "if n <= begin + SPLIT:", "if n > begin + SPLIT:", "append"),
    # Triton, over splits
    Fault("splits past the length added", TRITON, "used = (n + SPLIT - 1) // SPLIT", "used = splits.to(tl.int64)", "numerics"),
    Fault("last split left out", TRITON, "mask_s = offs_s < used", "mask_s = (offs_s < used - 1) | (used == 1)", "numerics"),
    Fault("only the first splits added", TRITON, "for first in range(0, used, ADDED):", "for first in range(0, tl.minimum(used, 1), ADDED):", "more_splits"),
    Fault("splits not weighed", TRITON, "weight[:, None] * acc_s", "acc_s", "numerics"),
    Fault("sums of splits not weighed", TRITON, "tl.sum(weight * l_s, axis=0)", "tl.sum(l_s, axis=0)", "numerics"),
    Fault("rows of the splits before not shrunk", TRITON, "acc = acc * shrink + tl.sum(weight[:, None] * acc_s, axis=0)", "acc = acc + tl.sum(weight[:, None] * acc_s, axis=0)", "more_splits"),
    Fault("sum left out", TRITON, "acc / tl.where(used > 0, l, 1.0)", "acc", "numerics"),
    Fault("no key divides by nothing", TRITON, "acc / tl.where(used > 0, l, 1.0)", "acc / l", "past_the_length"),
    # C++, the op
    Fault("scores not scaled", CPP, "static_cast<float>(row[d]) * scale", "static_cast<float>(row[d])", "numerics"),
    Fault("length of the batch's first", CPP, "values.stride(2), n[b], D,", "values.stride(2), n[0], D,", "numerics"),
    Fault("last key left out", CPP, "values.stride(2), n[b], D,", "values.stride(2), std::max<int64_t>(n[b] - 1, 1), D,", "numerics"),
    Fault("keys past the length attended to", CPP, "values.stride(2), n[b], D,", "values.stride(2), S, D,", "numerics"),
    Fault("output of the query before where there is no key", CPP, "std::fill(result.begin(), result.end(), 0.0f);", "", "past_the_length"),
    Fault("cache's heads taken as contiguous", CPP, "h * keys.stride(1)", "h * S * D", "strided"),
    Fault("cache's rows taken as contiguous", CPP, "keys.stride(1), keys.stride(2)", "keys.stride(1), D", "strided"),
    Fault("query taken as contiguous", CPP, "q_data + b * queries.stride(0) + h * queries.stride(1)", "q_data + i * D", "strided"),
    Fault("elements taken as neighbours", CPP, "x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous()", "x", "strided"),
    Fault("last head of a thread's share skipped", CPP, "i < end; ++i", "i < end - 1; ++i", "numerics"),
    Fault("lengths not checked from above", CPP, "n[b] >= 0 && n[b] <= S", "n[b] >= 0", "kernel_checks_lengths"),
    Fault("lengths not checked from below", CPP, "n[b] >= 0 && n[b] <= S", "n[b] <= S", "kernel_checks_lengths"),
    # C++, one query against a cache
    Fault("largest score not subtracted", CACHE, "exp(Vec::loadu(scores + i, count) - Vec(largest))", "exp(Vec::loadu(scores + i, count))", "large_scores"),
    Fault("padding of the last vector counts", CACHE, "sum = sum + (count == kVec ? p : Vec::set(Vec(0.0f), p, count));", "sum = sum + p;", "numerics"),
    Fault("sum left out", CACHE, "return 1.0f / sum_lanes(sum);", "return 1.0f;", "numerics"),
    Fault("bfloat16 sum", CACHE, "return 1.0f / sum_lanes(sum);", "return static_cast<float>(at::BFloat16(1.0f / sum_lanes(sum)));", "numerics"),
    Fault("keys past the last four skipped", CACHE, "for (; j < n; ++j) score_keys<1>", "for (; j < n - 1; ++j) score_keys<1>", "numerics"),
    Fault("first of four keys for all", CACHE, "load_row(keys + r * stride, rows + r * D, D)", "load_row(keys, rows + r * D, D)", "numerics"),
    Fault("columns past the last whole vector skipped", CACHE, "for (; d < D; d += kVec) {", "for (; d + kVec <= D; d += kVec) {", "numerics"),
    Fault("first value left out", CACHE, "for (int64_t j = 0; j < n; ++j) {\n    const float* row", "for (int64_t j = 1; j < n; ++j) {\n    const float* row", "numerics"),
    Fault("values of the first columns for all", CACHE, "weigh_values<1>(scores, values + d,", "weigh_values<1>(scores, values,", "numerics"),
)  # fmt: skip
