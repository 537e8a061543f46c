"""Faults that tests/ops/test_embedding.py must catch, those of the row rule of dropout among them."""

from tests.mutants import Fault

TRITON, TRITON_PHILOX = "kernels/embedding.py", "kernels/philox.py"
CPP, PHILOX, COMMON = "csrc/cpu/embedding.cpp", "csrc/philox.h", "csrc/cpu/core/common.h"

FAULTS = (
    # Triton, forward
    Fault("position of the row before", TRITON, "offs_m % T", "tl.maximum(offs_m - 1, 0) % T", "numerics"),
    Fault("positions do not repeat", TRITON, "offs_m % T", "tl.minimum(offs_m, T - 1)", "numerics"),
    Fault("token ids not clamped", TRITON, "token = tl.minimum(tl.maximum(token, 0), V - 1)", "token = token", "out_of_range"),
    Fault("negative positions not clamped", TRITON, "tl.minimum(tl.maximum(position, 0), P - 1)", "tl.minimum(position, P - 1)", "out_of_range"),
    Fault("last row of a tile skipped, forward", TRITON, "mask_m = offs_m < M", "mask_m = offs_m < M - 1", "numerics"),
    Fault("last column skipped, forward", TRITON, "(offs_c < C)[None, :]", "(offs_c < C - 1)[None, :]", "numerics"),
    Fault("columns past a tile skipped", TRITON, "tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)\n    mask_m", "tl.arange(0, BLOCK_C)\n    mask_m", "whole_chunks and float32-0.0"),
    Fault("token table taken as contiguous", TRITON, "token[:, None] * stride_tv", "token[:, None] * C", "strides_of"),
    Fault("position table taken as contiguous", TRITON, "offs_c[None, :] * stride_pc", "offs_c[None, :]", "strides_of"),
    Fault("bfloat16 sum", TRITON, "out = tl.load(token_ptrs, mask=mask, other=0.0).to(tl.float32)", "out = tl.load(token_ptrs, mask=mask, other=0.0).to(tl.bfloat16).to(tl.float32)", "numerics"),
    Fault("scale dropped, forward", TRITON, "tl.where(keep, out * scale, 0.0)", "tl.where(keep, out, 0.0)", "dropout"),
    Fault("dropout of one row for all", TRITON, "keep_rows(offs_m[:, None], offs_c", "keep_rows(offs_m[:, None] * 0, offs_c", "dropout"),
    # Triton, backward
    Fault("scale dropped, backward", TRITON, "value = tl.where(keep, value * scale, 0.0)", "value = tl.where(keep, value, 0.0)", "numerics"),
    Fault("dropout by the place in the sorted order", TRITON, "tl.zeros_like(offs_c) + row.to(tl.int32)", "tl.zeros_like(offs_c) + use.to(tl.int32)", "numerics"),
    Fault("dropout left out of the gradient", TRITON, "value = tl.where(keep, value * scale, 0.0)", "value = value", "numerics"),
    Fault("last use skipped", TRITON, "here = use < M", "here = use < M - 1", "numerics"),
    Fault("sums run on into the next row of the table", TRITON, "total = tl.where(ends, 0.0, total)", "total = total", "numerics"),
    Fault("runs from the chunk before are not recognised", TRITON, "mask=base > 0, other=-1)\n    partial_ptr", "mask=base < 0, other=-1)\n    partial_ptr", "numerics and (times or whole_chunks)"),
    Fault("last partial sum left out", TRITON, "tl.where(owns, reach, chunk) + 1)", "tl.where(owns, reach, chunk))", "numerics and (times or whole_chunks)"),
    Fault("first partial sum left out", TRITON, "total = tl.load(partial_ptr + (chunk * 2 + 1) * C + offs_c, mask=mask_c, other=0.0)", "total = tl.zeros([BLOCK_C], dtype=tl.float32)", "numerics and (times or whole_chunks)"),
    Fault("a run is added by every chunk it crosses", TRITON, "owns = (reach > chunk) & (began_before == 0)", "owns = reach > chunk", "whole_chunks and float32-0.0"),
    Fault("bfloat16 partial sums", TRITON, "partial = torch.empty((chunks, 2, C), dtype=torch.float32", "partial = torch.empty((chunks, 2, C), dtype=torch.bfloat16", "numerics and (times or whole_chunks)"),
    Fault("upstream gradient taken as contiguous", TRITON, "row * stride_dm + offs_c * stride_dc", "row * C + offs_c", "strided_upstream"),
    Fault("gradient's strides taken as contiguous", TRITON, "id_now * stride_gk + offs_c * stride_gc", "id_now * C + offs_c", "strides_of"),
    Fault("gradient of the second stage taken as contiguous", TRITON, "id_last * stride_gk + offs_c * stride_gc", "id_last * C + offs_c", "strides_of"),
    Fault("ids of the gradient not clamped", TRITON, ".long().clamp(0, table.shape[0] - 1).sort(", ".long().sort(", "out_of_range"),
    # Triton, the row rule
    Fault("one round fewer", TRITON_PHILOX, "tl.static_range(7)", "tl.static_range(6)", "dropout"),
    Fault("lower half of the seed for both keys", TRITON_PHILOX, "k1 = (seed >> 32).to(tl.uint32)", "k1 = (seed & 0xFFFFFFFF).to(tl.uint32)", "dropout"),
    Fault("wrong word of the four", TRITON_PHILOX, "word = (j // 2) % 4", "word = (j // 2 + 1) % 4", "dropout"),
    Fault("halves of a word swapped", TRITON_PHILOX, "tl.where(word == 2, w2, w3))\n    return ((bits >> (16 * (j % 2)))", "tl.where(word == 2, w2, w3))\n    return ((bits >> (16 - 16 * (j % 2)))", "dropout"),
    Fault("site ignored", TRITON_PHILOX, "tl.zeros_like(j), site.to(tl.uint32), seed_ptr", "tl.zeros_like(j), tl.zeros_like(site).to(tl.uint32), seed_ptr", "dropout"),
    Fault("a number equal to the threshold drops", TRITON_PHILOX, "tl.where(word == 2, w2, w3))\n    return ((bits >> (16 * (j % 2))) & 0xFFFF) >= threshold", "tl.where(word == 2, w2, w3))\n    return ((bits >> (16 * (j % 2))) & 0xFFFF) > threshold", "threshold"),
    # C++, forward
    Fault("position of the row before", CPP, "position_rows.read(position_of[i],", "position_rows.read(position_of[i > 0 ? i - 1 : 0],", "numerics"),
    Fault("positions do not repeat", CPP, "data[i % count]", "data[std::min(i, count - 1)]", "numerics"),
    Fault("position left out", CPP, "return a + b; }, target, token, position, C)", "return a + b * Vec(0.0f); }, target, token, position, C)", "numerics"),
    Fault("ids not checked from above", CPP, "id >= 0 && id < table_rows", "id >= 0", "checks_ids"),
    Fault("ids not checked from below", CPP, "id >= 0 && id < table_rows", "id < table_rows", "checks_ids"),
    Fault("dropout of one row for all", CPP, "dropout->row(i, C,", "dropout->row(0, C,", "dropout"),
    Fault("position kept whatever is dropped", CPP, "return a * b; }, target, target, factors.data(), C)", "return a * b; }, target, token, factors.data(), C)", "numerics"),
    Fault("last row of a thread's share skipped", CPP, "i < end; ++i) {\n      const float* token", "i < end - 1; ++i) {\n      const float* token", "numerics"),
    Fault("rows taken as contiguous", COMMON, "stride_(rows_.stride(0) * rows_.element_size())", "stride_(rows_.size(1) * rows_.element_size())", "strided_upstream"),
    # C++, backward
    Fault("dropout by the place in the sorted order", CPP, "dropout->row(order[n], C,", "dropout->row(n, C,", "numerics"),
    Fault("dropout left out of the gradient", CPP, "return t + a * f;", "return t + a;", "numerics"),
    Fault("last use skipped", CPP, "n < first[k + 1]; ++n)", "n < first[k + 1] - 1; ++n)", "numerics"),
    Fault("last used row of the table skipped", CPP, "u < end; ++u)", "u < end - 1; ++u)", "numerics"),
    Fault("sums run on into the next row of the table", CPP, "std::fill(total, total + C, 0.0f);", "", "numerics"),
    Fault("bfloat16 sums", CPP, "return t + a; }", "return std::get<0>(at::vec::convert_bfloat16_float(at::vec::convert_float_bfloat16(t + a, t + a))); }", "numerics"),
    Fault("gradient of a transposed table left out", CPP, "if (!by_rows) gradient.copy_(target);", "", "strides_of"),
    Fault("what is needed swapped", CPP, 'gradient(needs_token, "tokens"', 'gradient(needs_position, "tokens"', "frozen"),
    Fault("seed of zero, backward", CPP, "const Rows upstream(dout);\n  const optional<Dropout> dropout = make_dropout(\"embedding\", dropout_p, seed, site);", "const Rows upstream(dout);\n  const optional<Dropout> dropout = make_dropout(\"embedding\", dropout_p, at::zeros({1}, at::kLong), site);", "numerics"),
    # C++, the row rule
    Fault("one round fewer", PHILOX, "kPhiloxRounds = 7", "kPhiloxRounds = 6", "dropout"),
    Fault("lower half of the seed for both keys", PHILOX, "static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)", "static_cast<uint32_t>(seed)", "dropout"),
    Fault("neighbouring words swapped", PHILOX, "low = at.pair(0, half), high = at.pair(2, half)", "low = at.pair(2, half), high = at.pair(0, half)", "dropout"),
    Fault("wrong lane", PHILOX, "out + 16 * half + 8, out + 16 * half + 40", "out + 16 * half + 40, out + 16 * half + 8", "dropout"),
    Fault("site ignored", PHILOX, "static_cast<uint32_t>(i), 0, site, key);", "static_cast<uint32_t>(i), 0, 0, key);", "dropout"),
    Fault("a number equal to the threshold drops", PHILOX, "threshold < 65536 ? threshold : 65535", "threshold < 65535 ? threshold + 1 : 65535", "threshold"),
    Fault("tail of a row not dropped", PHILOX, "(n - j) * sizeof(float)", "(n - j - 1) * sizeof(float)", "dropout"),
    Fault("threshold rounded down", PHILOX, "std::floor(p * 65536 + 0.5)", "std::floor(p * 65536)", "numerics"),
    Fault("scale of the nominal p", PHILOX, "65536.0 / (65536 - threshold)", "1.0 / (1.0 - p)", "dropout"),
)  # fmt: skip
