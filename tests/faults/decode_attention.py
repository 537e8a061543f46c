"""Faults that tests/test_decode_attention.py must catch."""

from tests.mutants import Fault

CPP, CACHE = "csrc/cpu/decode_attention.cpp", "csrc/cpu/decode_attention.h"

FAULTS = (
    # C++, the op
    Fault("scores not scaled", CPP, "static_cast<float>(row[d]) * scale", "static_cast<float>(row[d])", "numerics"),
    Fault("length of the batch's first", CPP, "values.stride(2), n[b], D,", "values.stride(2), n[0], D,", "numerics"),
    Fault("last key left out", CPP, "values.stride(2), n[b], D,", "values.stride(2), std::max<int64_t>(n[b] - 1, 1), D,", "numerics"),
    Fault("keys past the length attended to", CPP, "values.stride(2), n[b], D,", "values.stride(2), S, D,", "numerics"),
    Fault("output of the query before where there is no key", CPP, "std::fill(result.begin(), result.end(), 0.0f);", "", "past_the_length"),
    Fault("cache's heads taken as contiguous", CPP, "h * keys.stride(1)", "h * S * D", "strided"),
    Fault("cache's rows taken as contiguous", CPP, "keys.stride(2), v_data", "D, v_data", "strided"),
    Fault("query taken as contiguous", CPP, "q_data + b * queries.stride(0) + h * queries.stride(1)", "q_data + i * D", "strided"),
    Fault("elements taken as neighbours", CPP, "x.size(-1) == 1 || x.stride(-1) == 1 ? x : x.contiguous()", "x", "strided"),
    Fault("last head of a thread's share skipped", CPP, "i < end; ++i", "i < end - 1; ++i", "numerics"),
    Fault("lengths not checked from above", CPP, "n[b] >= 0 && n[b] <= S", "n[b] >= 0", "kernel_checks_lengths"),
    Fault("lengths not checked from below", CPP, "n[b] >= 0 && n[b] <= S", "n[b] <= S", "kernel_checks_lengths"),
    # C++, one query against a cache
    Fault("largest score not subtracted", CACHE, "(Vec::loadu(scores + i, count) - Vec(largest)).exp()", "Vec::loadu(scores + i, count).exp()", "large_scores"),
    Fault("padding of the last vector counts", CACHE, "sum = sum + (count == Vec::size() ? p : Vec::set(Vec(0.0f), p, count));", "sum = sum + p;", "numerics"),
    Fault("sum left out", CACHE, "const float scale = 1.0f / sum_lanes(sum);", "const float scale = 1.0f;", "numerics"),
    Fault("bfloat16 sum", CACHE, "const float scale = 1.0f / sum_lanes(sum);", "const float scale = static_cast<float>(at::BFloat16(1.0f / sum_lanes(sum)));", "numerics"),
    Fault("keys past the last four skipped", CACHE, "for (; j < n; ++j) score_keys<1>", "for (; j < n - 1; ++j) score_keys<1>", "numerics"),
    Fault("first of four keys for all", CACHE, "load_row(keys + r * stride, rows + r * D, D)", "load_row(keys, rows + r * D, D)", "numerics"),
    Fault("columns past the last whole vector skipped", CACHE, "for (; d < D; d += Vec::size()) {", "for (; d + Vec::size() <= D; d += Vec::size()) {", "numerics"),
    Fault("first value left out", CACHE, "for (int64_t j = 0; j < n; ++j) {\n    const float* row", "for (int64_t j = 1; j < n; ++j) {\n    const float* row", "numerics"),
    Fault("values of the first columns for all", CACHE, "weigh_values<1>(scores, values + d,", "weigh_values<1>(scores, values,", "numerics"),
)  # fmt: skip
