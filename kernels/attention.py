"""attention in Triton: online softmax forward; backward split into dQ by query tiles and dK, dV by key tiles.

Notation: S = scale Q Kᵀ, P = exp(S - lse), Z = keep · P / (1 - p) after dropout, O = Z V. Backward, with
delta = rowsum(dO · O): dV = Zᵀ dO, dS = P · (keep · (dO Vᵀ) / (1 - p) - delta), dQ = scale dS K, dK = scale dSᵀ Q.
Masks: causal, window, lengths and packing leave each query an interval of keys (and each key one of queries); tiles
outside it are skipped and tiles inside it pay for no mask. key_mask and mask are loaded for every tile.
Precision: products of the inputs' dtype accumulate in float32, softmax in float32 by exp2; P and dS are rounded to the
inputs' dtype before their products. Deterministic: one program owns each output, no atomics.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from . import launch_configs
from .gemm import cast, dot, precision
from .philox import keep_matrix

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
ROW_TILE = tl.constexpr(128)  # what backward keeps of rows is padded to whole tiles, so that loads need no mask
UNBOUNDED = 1 << 30  # a window that reaches everywhere


class Config(NamedTuple):
    """Tile of queries × keys, warps and pipeline stages of one kernel."""

    queries: int
    keys: int
    warps: int
    stages: int


@triton.jit
def _bounds(offs, mask_offs, lower, upper, others, length_ptr, start_ptr, end_ptr, b):
    """[first, last) of what each row may meet on the other axis, which holds `others` rows.

    A row at position `offs` meets offs - lower < x < offs + upper; packing bounds it by its sequence.
    """
    first = tl.maximum(offs - lower + 1, 0)
    last = tl.minimum(offs + upper, others)
    if length_ptr is not None:
        last = tl.minimum(last, tl.load(length_ptr + b).to(tl.int32))
    if start_ptr is not None:
        first = tl.maximum(first, tl.load(start_ptr + offs, mask=mask_offs, other=0))
        last = tl.minimum(last, tl.load(end_ptr + offs, mask=mask_offs, other=0))
    return first, last


@triton.jit
def _ranges(first, last, mask_rows, others, ALL_MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """(begin, inside, outside, end): tiles begin to inside and outside to end are masked, those between are not."""
    begin = tl.min(tl.where(mask_rows, first, others)) // BLOCK * BLOCK
    end = tl.max(tl.where(mask_rows, last, 0))
    if ALL_MASKED:
        return begin, begin, begin, end
    inside = (tl.max(tl.where(mask_rows, first, 0)) + BLOCK - 1) // BLOCK * BLOCK
    outside = tl.min(tl.where(mask_rows, last, others)) // BLOCK * BLOCK
    inside = tl.maximum(begin, tl.minimum(inside, end))
    return begin, inside, tl.maximum(inside, outside), end


@triton.jit
def _tile(
    ptr, start, stride, limit, offs, offs_d, stride_d, MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows start + offs of a matrix [limit, D], zeros past its ends; unmasked where all rows are known to exist."""
    first = tl.full((), 0, dtype=tl.int64) + start
    ptrs = ptr + first * stride + offs[:, None] * stride + offs_d[None, :] * stride_d
    if MASKED:
        return tl.load(ptrs, mask=(start + offs < limit)[:, None] & (offs_d < D)[None, :], other=0.0)
    if D == BLOCK_D:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(offs_d < D)[None, :], other=0.0)


@triton.jit
def _stream(
    source, b, h, start, stride, limit, bounded, offs, offs_d, stride_d,
    MASKED: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """A tile of what a loop walks over: by a descriptor of [B, H, rows, D], which ends with the rows, or by pointers.

    `bounded` is a pointer where `limit` may lie before the last row, else None.
    """
    if DESCRIBED:
        x = tl.reshape(source.load([b.to(tl.int32), h.to(tl.int32), start, 0]), [offs.shape[0], BLOCK_D])
        if MASKED and bounded is not None:
            x = tl.where((start + offs < limit)[:, None], x, 0.0).to(x.dtype)
    else:
        x = _tile(source, start, stride, limit, offs, offs_d, stride_d, MASKED, D, BLOCK_D)
    return x


@triton.jit
def _allowed(
    x, first, last, i, j, T, S, b, h, key_mask_ptr, mask_ptr,
    stride_kb, stride_ks, stride_mb, stride_mh, stride_mt, stride_ms,
):  # fmt: skip
    """Whether query i may attend to key j: x, one of the two, in its interval, and what the masks say."""
    allowed = (x >= first) & (x < last)
    if key_mask_ptr is not None:
        allowed &= tl.load(key_mask_ptr + b * stride_kb + j * stride_ks, mask=j < S, other=0) != 0
    if mask_ptr is not None:
        offs = b * stride_mb + h * stride_mh + i.to(tl.int64) * stride_mt + j.to(tl.int64) * stride_ms
        allowed &= tl.load(mask_ptr + offs, mask=(i < T) & (j < S), other=0) != 0
    return allowed


@triton.jit
def _without_padding(x, j, S, b, key_mask_ptr, stride_kb, stride_ks):
    """Zeros where key_mask excludes a row of keys or values: padding may hold NaN, and 0 NaN is NaN."""
    live = tl.load(key_mask_ptr + b * stride_kb + j * stride_ks, mask=j < S, other=0) != 0
    return tl.where(live[:, None], x, 0.0).to(x.dtype)


@triton.jit
def _masked_start(n, begin, inside, outside, BLOCK: tl.constexpr):
    """Where the n-th masked tile begins: first those from `begin` to `inside`, then those from `outside` on."""
    before = tl.cdiv(inside - begin, BLOCK)
    return tl.multiple_of(tl.where(n < before, begin + n * BLOCK, outside + (n - before) * BLOCK), BLOCK)


@triton.jit
def _coordinates(offs, mask_offs, start_ptr, sequence_ptr, bh, h, H):
    """(start, matrix) for the dropout rule: packed rows count within their sequence and use its matrix."""
    if start_ptr is not None:
        start = tl.load(start_ptr + offs, mask=mask_offs, other=0)
        return start, tl.load(sequence_ptr + offs, mask=mask_offs, other=0) * H + h
    return tl.zeros_like(offs), tl.zeros_like(offs) + bh


@triton.jit
def _dropout_position(start, offs, sequence_start, BLOCK: tl.constexpr):
    """Return the positions of rows `start + offs` within their sequences, [1, BLOCK], as the dropout rule counts them.

    `start` is a multiple of 16. The division tells LLVM so, which does not see `tl.multiple_of`; without the known zero
    bits LLVM cannot merge the Philox calls that share a counter, and a loop has nearly twice as many instructions.
    """
    tl.static_assert(BLOCK % 16 == 0)
    return (start // 16 * 16 + offs)[None, :] - sequence_start


@triton.jit
def _fwd_tile(
    acc, m, total, q, k_ptr, v_ptr, start, stride_ks, stride_kd, stride_vs, stride_vd, offs_n, offs_d,
    first, last, end, bounded, i, T, S, b, h, key_mask_ptr, mask_ptr,
    stride_kb, stride_kk, stride_mb, stride_mh, stride_mt, stride_ms,
    dropout_i, dropout_start, dropout_b, site, threshold, seed_ptr, dropped, scale_log2,
    MASKED: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One tile of keys: the softmax so far, m its maximum and total its sum, takes these scores in."""
    k = _stream(k_ptr, b, h, start, stride_ks, end, bounded, offs_n, offs_d, stride_kd, MASKED, D, BLOCK_D, DESCRIBED)
    s = dot(q, tl.trans(k), None, PRECISION) * scale_log2  # [BLOCK_M, BLOCK_N]
    j = (start + offs_n)[None, :]
    if MASKED:
        s = tl.where(
            _allowed(j, first[:, None], last[:, None], i, j, T, S, b, h, key_mask_ptr, mask_ptr,
                     stride_kb, stride_kk, stride_mb, stride_mh, stride_mt, stride_ms), s, float("-inf"),
        )  # fmt: skip
    m_new = tl.maximum(m, tl.max(s, axis=1))
    shift = m_new
    if MASKED:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key yet: keep -inf - -inf out
    p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m - shift)
    total = total * alpha + tl.sum(p, axis=1)
    if HAS_DROPOUT:
        dropout_j = _dropout_position(start, offs_n, dropout_start, offs_n.shape[0])
        keep = keep_matrix(dropout_i, dropout_j, dropout_b, site, threshold, seed_ptr)
        p = tl.where(keep, p, dropped)
    v = _stream(v_ptr, b, h, start, stride_vs, end, bounded, offs_n, offs_d, stride_vd, MASKED, D, BLOCK_D, DESCRIBED)
    if MASKED and key_mask_ptr is not None:
        v = _without_padding(v, start + offs_n, S, b, key_mask_ptr, stride_kb, stride_kk)
    acc = dot(cast(p, v.dtype, PRECISION), v, acc * alpha[:, None], PRECISION)
    return acc, m_new, total


@triton.jit(do_not_specialize=["T", "S", "lower", "upper", "site", "threshold"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, length_ptr, key_mask_ptr, mask_ptr, start_ptr, end_ptr, sequence_ptr,
    seed_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_ob, stride_oh, stride_ot,
    stride_kmb, stride_kms, stride_mb, stride_mh, stride_mt, stride_ms,
    H, T, S, lower, upper, scale, site, threshold, dropout_scale, dropped,
    ALL_MASKED: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # the longest rows of causal work first
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < T
    first, last = _bounds(offs_m + S - T, mask_m, lower, upper, S, length_ptr, start_ptr, end_ptr, b)
    begin, inside, outside, end = _ranges(first, last, mask_m, S, ALL_MASKED, BLOCK_N)
    dropout_start, dropout_b = _coordinates(offs_m, mask_m, start_ptr, sequence_ptr, bh.to(tl.int32), h.to(tl.int32), H)
    dropout_i = (offs_m - dropout_start)[:, None]
    dropout_start, dropout_b = dropout_start[:, None], dropout_b[:, None]

    bounded = start_ptr if length_ptr is None else length_ptr
    if not DESCRIBED:
        k_ptr += b * stride_kb + h * stride_kh
        v_ptr += b * stride_vb + h * stride_vh
    q_ptr += b * stride_qb + h * stride_qh
    q = _tile(q_ptr, start_m, stride_qt, T, tl.arange(0, BLOCK_M), offs_d, stride_qd, True, D, BLOCK_D)
    scale_log2 = scale * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for n in range(0, tl.cdiv(inside - begin, BLOCK_N) + tl.cdiv(end - outside, BLOCK_N)):
        start = _masked_start(n, begin, inside, outside, BLOCK_N)
        acc, m, total = _fwd_tile(
            acc, m, total, q, k_ptr, v_ptr, start, stride_ks, stride_kd, stride_vs, stride_vd, offs_n, offs_d,
            first, last, end, bounded, offs_m[:, None], T, S, b, h, key_mask_ptr, mask_ptr, stride_kmb, stride_kms,
            stride_mb, stride_mh, stride_mt, stride_ms,
            dropout_i, dropout_start, dropout_b, site, threshold, seed_ptr, dropped, scale_log2,
            True, HAS_DROPOUT, PRECISION, D, BLOCK_D, DESCRIBED,
        )  # fmt: skip
    for start in range(inside, outside, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        acc, m, total = _fwd_tile(
            acc, m, total, q, k_ptr, v_ptr, start, stride_ks, stride_kd, stride_vs, stride_vd, offs_n, offs_d,
            first, last, end, bounded, offs_m[:, None], T, S, b, h, key_mask_ptr, mask_ptr, stride_kmb, stride_kms,
            stride_mb, stride_mh, stride_mt, stride_ms,
            dropout_i, dropout_start, dropout_b, site, threshold, seed_ptr, dropped, scale_log2,
            False, HAS_DROPOUT, PRECISION, D, BLOCK_D, DESCRIBED,
        )  # fmt: skip

    empty = total == 0.0
    out = acc * (dropout_scale / tl.where(empty, 1.0, total))[:, None]
    lse = tl.where(empty, float("inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * LN2)
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + offs_m.to(tl.int64)[:, None] * stride_ot + offs_d[None, :]
    tl.store(out_ptrs, cast(out, out_ptr.dtype.element_ty, PRECISION), mask=mask_m[:, None] & (offs_d < D)[None, :])
    tl.store(lse_ptr + bh * T + offs_m, lse, mask=mask_m)


@triton.jit
def _bwd_dq_tile(
    dq, q, do, lse_log2, delta, k_ptr, v_ptr, start, stride_ks, stride_kd, stride_vs, stride_vd, offs_n, offs_d,
    first, last, end, bounded, i, T, S, b, h, key_mask_ptr, mask_ptr,
    stride_kb, stride_kk, stride_mb, stride_mh, stride_mt, stride_ms,
    dropout_i, dropout_start, dropout_b, site, threshold, seed_ptr, dropout_scale, scale_log2,
    MASKED: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One tile of keys added to dQ / scale."""
    k = _stream(k_ptr, b, h, start, stride_ks, end, bounded, offs_n, offs_d, stride_kd, MASKED, D, BLOCK_D, DESCRIBED)
    v = _stream(v_ptr, b, h, start, stride_vs, end, bounded, offs_n, offs_d, stride_vd, MASKED, D, BLOCK_D, DESCRIBED)
    if MASKED and key_mask_ptr is not None:
        k = _without_padding(k, start + offs_n, S, b, key_mask_ptr, stride_kb, stride_kk)
    s = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
    p = tl.exp2(s * scale_log2 - lse_log2[:, None])
    j = (start + offs_n)[None, :]
    dp = dot(do, tl.trans(v), None, PRECISION)
    if HAS_DROPOUT:
        dropout_j = _dropout_position(start, offs_n, dropout_start, offs_n.shape[0])
        keep = keep_matrix(dropout_i, dropout_j, dropout_b, site, threshold, seed_ptr)
        dp = tl.where(keep, dp * dropout_scale, 0.0)
    ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(
            _allowed(j, first[:, None], last[:, None], i, j, T, S, b, h, key_mask_ptr, mask_ptr,
                     stride_kb, stride_kk, stride_mb, stride_mh, stride_mt, stride_ms), ds, 0.0,
        )  # fmt: skip
    return dot(cast(ds, k.dtype, PRECISION), k, dq, PRECISION)


@triton.jit(do_not_specialize=["T", "S", "lower", "upper", "site", "threshold"])
def _bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, do_ptr, lse_ptr, rows_ptr, dq_ptr,
    length_ptr, key_mask_ptr, mask_ptr, start_ptr, end_ptr, sequence_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_ob, stride_oh, stride_ot,
    stride_dob, stride_doh, stride_dot, stride_dod, stride_dqb, stride_dqh, stride_dqt,
    stride_kmb, stride_kms, stride_mb, stride_mh, stride_mt, stride_ms,
    H, T, S, lower, upper, scale, site, threshold, dropout_scale, kept,
    ALL_MASKED: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """dQ; and for the kernel of dK and dV that follows, lse in powers of two and delta (1 - p): [2, B H, padded T]."""
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    start_m = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    offs_m = start_m + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    mask_m = offs_m < T
    first, last = _bounds(offs_m + S - T, mask_m, lower, upper, S, length_ptr, start_ptr, end_ptr, b)
    begin, inside, outside, end = _ranges(first, last, mask_m, S, ALL_MASKED, BLOCK_N)
    dropout_start, dropout_b = _coordinates(offs_m, mask_m, start_ptr, sequence_ptr, bh.to(tl.int32), h.to(tl.int32), H)
    dropout_i = (offs_m - dropout_start)[:, None]
    dropout_start, dropout_b = dropout_start[:, None], dropout_b[:, None]

    bounded = start_ptr if length_ptr is None else length_ptr
    if not DESCRIBED:
        k_ptr += b * stride_kb + h * stride_kh
        v_ptr += b * stride_vb + h * stride_vh
    rows = tl.arange(0, BLOCK_M)
    q = _tile(q_ptr + b * stride_qb + h * stride_qh, start_m, stride_qt, T, rows, offs_d, stride_qd, True, D, BLOCK_D)
    do = _tile(
        do_ptr + b * stride_dob + h * stride_doh, start_m, stride_dot, T, rows, offs_d, stride_dod, True, D, BLOCK_D
    )
    out = _tile(out_ptr + b * stride_ob + h * stride_oh, start_m, stride_ot, T, rows, offs_d, 1, True, D, BLOCK_D)
    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), axis=1)
    lse_log2 = tl.load(lse_ptr + bh * T + offs_m, mask=mask_m, other=float("inf")) * LOG2E
    padded = tl.cdiv(T, ROW_TILE) * ROW_TILE
    rows_ptr += bh * padded + offs_m
    tl.store(rows_ptr, lse_log2, mask=offs_m < padded)
    tl.store(rows_ptr + tl.num_programs(1) * padded, delta * kept, mask=offs_m < padded)
    scale_log2 = scale * LOG2E
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for n in range(0, tl.cdiv(inside - begin, BLOCK_N) + tl.cdiv(end - outside, BLOCK_N)):
        start = _masked_start(n, begin, inside, outside, BLOCK_N)
        dq = _bwd_dq_tile(
            dq, q, do, lse_log2, delta, k_ptr, v_ptr, start, stride_ks, stride_kd, stride_vs, stride_vd, offs_n, offs_d,
            first, last, end, bounded, offs_m[:, None], T, S, b, h, key_mask_ptr, mask_ptr, stride_kmb, stride_kms,
            stride_mb, stride_mh, stride_mt, stride_ms,
            dropout_i, dropout_start, dropout_b, site, threshold, seed_ptr, dropout_scale, scale_log2,
            True, HAS_DROPOUT, PRECISION, D, BLOCK_D, DESCRIBED,
        )  # fmt: skip
    for start in range(inside, outside, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        dq = _bwd_dq_tile(
            dq, q, do, lse_log2, delta, k_ptr, v_ptr, start, stride_ks, stride_kd, stride_vs, stride_vd, offs_n, offs_d,
            first, last, end, bounded, offs_m[:, None], T, S, b, h, key_mask_ptr, mask_ptr, stride_kmb, stride_kms,
            stride_mb, stride_mh, stride_mt, stride_ms,
            dropout_i, dropout_start, dropout_b, site, threshold, seed_ptr, dropout_scale, scale_log2,
            False, HAS_DROPOUT, PRECISION, D, BLOCK_D, DESCRIBED,
        )  # fmt: skip
    dq_ptrs = dq_ptr + b * stride_dqb + h * stride_dqh + offs_m.to(tl.int64)[:, None] * stride_dqt + offs_d[None, :]
    tl.store(
        dq_ptrs, cast(dq * scale, dq_ptr.dtype.element_ty, PRECISION), mask=mask_m[:, None] & (offs_d < D)[None, :]
    )


@triton.jit
def _bwd_dkdv_tile(
    dk, dv, k, v, q_ptr, do_ptr, rows_ptr, start, stride_qt, stride_qd, stride_dot, stride_dod, offs_m,
    offs_d,
    first, last, end, bounded, j, T, S, b, h, H, key_mask_ptr, mask_ptr,
    stride_kb, stride_kk, stride_mb, stride_mh, stride_mt, stride_ms,
    dropout_j, dropout_start, dropout_b, site, threshold, seed_ptr, scale_log2,
    MASKED: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """One tile of queries added to dK / scale and dV, both still without dropout's scale; keys are the rows."""
    q = _stream(q_ptr, b, h, start, stride_qt, end, bounded, offs_m, offs_d, stride_qd, MASKED, D, BLOCK_D, DESCRIBED)
    do = _stream(
        do_ptr, b, h, start, stride_dot, end, bounded, offs_m, offs_d, stride_dod, MASKED, D, BLOCK_D, DESCRIBED
    )
    rows = start + offs_m
    if DESCRIBED:
        matrix = (b * H + h).to(tl.int32)
        lse_log2 = tl.reshape(rows_ptr.load([matrix, start]), [offs_m.shape[0]])
        delta = tl.reshape(rows_ptr.load([tl.num_programs(1) + matrix, start]), [offs_m.shape[0]])
    else:
        padded = tl.cdiv(T, ROW_TILE) * ROW_TILE
        at = rows_ptr + (b * H + h) * padded + rows
        lse_log2 = tl.load(at)
        delta = tl.load(at + tl.num_programs(1) * padded)
    s = dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_N, BLOCK_M]
    p = tl.exp2(s * scale_log2 - lse_log2[None, :])
    i = rows[None, :]
    if MASKED:
        allowed = _allowed(
            i, first[:, None], last[:, None], i, j, T, S, b, h, key_mask_ptr, mask_ptr,
            stride_kb, stride_kk, stride_mb, stride_mh, stride_mt, stride_ms,
        )  # fmt: skip
        p = tl.where(allowed, p, 0.0)
    dp = dot(v, tl.trans(do), None, PRECISION)
    if HAS_DROPOUT:
        # The sign carries the decision: one select serves both products. delta comes times 1 - p, the scale at the end.
        dropout_i = _dropout_position(start, offs_m, dropout_start, offs_m.shape[0])
        keep = keep_matrix(dropout_i, dropout_j, dropout_b, site, threshold, seed_ptr)
        signed = tl.where(keep, p, -p)
        z = tl.maximum(signed, 0.0)
        ds = z * dp - tl.abs(signed) * delta[None, :]
        dv = dot(cast(z, do.dtype, PRECISION), do, dv, PRECISION)
    else:
        ds = p * (dp - delta[None, :])
        dv = dot(cast(p, do.dtype, PRECISION), do, dv, PRECISION)
    if MASKED:
        ds = tl.where(allowed, ds, 0.0)  # p is 0 there, but delta may be NaN
    dk = dot(cast(ds, q.dtype, PRECISION), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["T", "S", "lower", "upper", "site", "threshold"])
def _bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, rows_ptr, dk_ptr, dv_ptr,
    length_ptr, key_mask_ptr, mask_ptr, start_ptr, end_ptr, sequence_ptr, seed_ptr,
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_dob, stride_doh, stride_dot, stride_dod,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    stride_kmb, stride_kms, stride_mb, stride_mh, stride_mt, stride_ms,
    H, T, S, lower, upper, scale, site, threshold, dropout_scale,
    ALL_MASKED: tl.constexpr, HAS_DROPOUT: tl.constexpr, PRECISION: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    bh = tl.program_id(1).to(tl.int64)
    b, h = bh // H, bh % H
    tl.static_assert(ROW_TILE % BLOCK_M == 0)  # rows are read without a mask
    start_n = tl.program_id(0) * BLOCK_N  # the first keys of causal work have the most queries
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    mask_n = offs_n < S
    first, last = _bounds(offs_n - (S - T), mask_n, upper, lower, T, None, start_ptr, end_ptr, b)
    if length_ptr is not None:
        last = tl.where(offs_n < tl.load(length_ptr + b), last, 0)
    begin, inside, outside, end = _ranges(first, last, mask_n, T, ALL_MASKED, BLOCK_M)
    dropout_start, dropout_b = _coordinates(offs_n, mask_n, start_ptr, sequence_ptr, bh.to(tl.int32), h.to(tl.int32), H)
    dropout_j = (offs_n - dropout_start)[:, None]
    dropout_start, dropout_b = dropout_start[:, None], dropout_b[:, None]

    bounded = start_ptr
    if not DESCRIBED:
        q_ptr += b * stride_qb + h * stride_qh
        do_ptr += b * stride_dob + h * stride_doh
    rows = tl.arange(0, BLOCK_N)
    k = _tile(k_ptr + b * stride_kb + h * stride_kh, start_n, stride_ks, S, rows, offs_d, stride_kd, True, D, BLOCK_D)
    v = _tile(v_ptr + b * stride_vb + h * stride_vh, start_n, stride_vs, S, rows, offs_d, stride_vd, True, D, BLOCK_D)
    scale_log2 = scale * LOG2E
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for n in range(0, tl.cdiv(inside - begin, BLOCK_M) + tl.cdiv(end - outside, BLOCK_M)):
        start = _masked_start(n, begin, inside, outside, BLOCK_M)
        dk, dv = _bwd_dkdv_tile(
            dk, dv, k, v, q_ptr, do_ptr, rows_ptr, start, stride_qt, stride_qd, stride_dot, stride_dod,
            offs_m, offs_d, first, last, end, bounded, offs_n[:, None], T, S, b, h, H, key_mask_ptr, mask_ptr,
            stride_kmb, stride_kms, stride_mb, stride_mh, stride_mt, stride_ms,
            dropout_j, dropout_start, dropout_b, site, threshold, seed_ptr, scale_log2,
            True, HAS_DROPOUT, PRECISION, D, BLOCK_D, DESCRIBED,
        )  # fmt: skip
    for start in range(inside, outside, BLOCK_M):
        start = tl.multiple_of(start, BLOCK_M)
        dk, dv = _bwd_dkdv_tile(
            dk, dv, k, v, q_ptr, do_ptr, rows_ptr, start, stride_qt, stride_qd, stride_dot, stride_dod,
            offs_m, offs_d, first, last, end, bounded, offs_n[:, None], T, S, b, h, H, key_mask_ptr, mask_ptr,
            stride_kmb, stride_kms, stride_mb, stride_mh, stride_mt, stride_ms,
            dropout_j, dropout_start, dropout_b, site, threshold, seed_ptr, scale_log2,
            False, HAS_DROPOUT, PRECISION, D, BLOCK_D, DESCRIBED,
        )  # fmt: skip
    mask = mask_n[:, None] & (offs_d < D)[None, :]
    offs = offs_n.to(tl.int64)[:, None]
    dk_ptrs = dk_ptr + b * stride_dkb + h * stride_dkh + offs * stride_dks + offs_d[None, :]
    dv_ptrs = dv_ptr + b * stride_dvb + h * stride_dvh + offs * stride_dvs + offs_d[None, :]
    tl.store(dk_ptrs, cast(dk * (scale * dropout_scale), dk_ptr.dtype.element_ty, PRECISION), mask=mask)
    tl.store(dv_ptrs, cast(dv * dropout_scale, dv_ptr.dtype.element_ty, PRECISION), mask=mask)


def config(kernel: str, q: torch.Tensor) -> tuple[Config, int]:
    """Tiles for these tensors, and the head size they are padded to."""
    D = q.shape[-1]
    BLOCK_D = max(16, triton.next_power_of_2(D))
    launch = launch_configs.pick("attention", kernel, launch_configs.architecture(q.device), q.element_size(), BLOCK_D)
    return Config(*launch), BLOCK_D


def streams(rows: int, BLOCK_D: int, **tensors: torch.Tensor) -> dict[str, Any]:
    """What a loop walks over in tiles of so many rows: descriptors of 16-bit tensors [B, H, rows, D] where all of them
    are aligned (made on the device they would cost instructions in every program), else the tensors themselves."""
    architecture = launch_configs.architecture(next(iter(tensors.values())).device)
    described = architecture == launch_configs.INTERPRETER or architecture >= 90
    described = described and all(_aligned(tensor) for tensor in tensors.values())
    if described:
        block = [1, 1, rows, BLOCK_D]
        made = {name: TensorDescriptor(x, list(x.shape), _strides_of(x), block) for name, x in tensors.items()}
        return {"DESCRIBED": True, **made}
    return {"DESCRIBED": False, **tensors}


def _strides_of(x: torch.Tensor) -> list[int]:
    """The strides; where a size is 1 they say nothing, and a descriptor gets one that it takes."""
    return [8 if x.shape[axis] == 1 and axis < 3 else stride for axis, stride in enumerate(x.stride())]


def _aligned(x: torch.Tensor) -> bool:
    strides = _strides_of(x)
    return (
        x.element_size() == 2
        and x.data_ptr() % 16 == 0
        and strides[3] == 1
        and all(stride > 0 and stride % 8 == 0 for stride in strides[:3])
    )


class Options(NamedTuple):
    """The options of the op, in the order of its schema."""

    lengths: torch.Tensor | None
    key_mask: torch.Tensor | None
    mask: torch.Tensor | None
    cu_seqlens: torch.Tensor | None
    causal: bool
    window: int | None
    dropout_p: float
    seed: torch.Tensor | None
    site: int
    scale: float


def _shared_arguments(q: torch.Tensor, k: torch.Tensor, options: Options) -> tuple[dict[str, Any], dict[str, Any]]:
    """What all three kernels take: pointers, strides and numbers; and compile-time switches."""
    B, H, T, D = q.shape
    S = k.shape[2]
    window = UNBOUNDED if options.window is None else min(options.window, UNBOUNDED)
    lengths = None if options.lengths is None else options.lengths.contiguous()
    start = end = sequence = None
    if options.cu_seqlens is not None:
        start, end, sequence = _packing(options.cu_seqlens, T)
    mask = None if options.mask is None else options.mask.expand(B, H, T, S)
    key_mask_strides = (0, 0) if options.key_mask is None else options.key_mask.stride()
    mask_strides = (0, 0, 0, 0) if mask is None else mask.stride()
    arguments = {
        "length_ptr": lengths, "key_mask_ptr": options.key_mask, "mask_ptr": mask,
        "start_ptr": start, "end_ptr": end, "sequence_ptr": sequence, "seed_ptr": options.seed,
        "stride_kmb": key_mask_strides[0], "stride_kms": key_mask_strides[1],
        "stride_mb": mask_strides[0], "stride_mh": mask_strides[1], "stride_mt": mask_strides[2],
        "stride_ms": mask_strides[3],
        "H": H, "T": T, "S": S, "lower": window, "upper": 1 if options.causal else window, "site": options.site,
    }  # fmt: skip
    switches = {
        "ALL_MASKED": options.key_mask is not None or mask is not None, "HAS_DROPOUT": options.seed is not None,
        "PRECISION": precision(), "D": D,
    }  # fmt: skip
    return arguments, switches


def _packing(cu_seqlens: torch.Tensor, T: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int32 [T] each: where a token's sequence starts, where it ends, and which it is. What follows the last sequence
    is one that ends where it starts. Values are clamped, so that no wrong one leads out of bounds."""
    bounds = cu_seqlens.long().clamp(0, T)
    tokens = torch.arange(T, device=cu_seqlens.device)
    sequence = torch.searchsorted(bounds[1:].contiguous(), tokens, right=True)
    start = bounds[sequence]
    end = torch.cat((bounds[1:], bounds[-1:]))[sequence]
    return start.int(), end.int(), sequence.int()


def _signed(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """The kernels want scale ≥ 0: a negative one moves into q."""
    return (-q, -scale) if scale < 0 else (q, scale)


def _strides(prefix: str, tensor: torch.Tensor, rows: str, last: bool = True) -> dict[str, int]:
    names = (f"stride_{prefix}b", f"stride_{prefix}h", f"stride_{prefix}{rows}", f"stride_{prefix}d")
    return dict(list(zip(names, tensor.stride(), strict=True))[: 4 if last else 3])


def _grid(rows: int, tile: int, q: torch.Tensor) -> tuple[int, int]:
    return triton.cdiv(rows, tile), q.shape[0] * q.shape[1]


def _empty_bthd(q: torch.Tensor, rows: int) -> torch.Tensor:
    B, H, _, D = q.shape
    return torch.empty((B, rows, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, threshold: int, dropout_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """out [B, H, T, D], laid out [B, T, H, D], and the float32 lse [B, H, T]."""
    T = q.shape[2]
    out = _empty_bthd(q, T)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if k.numel() == 0:
        return out.zero_(), lse.fill_(float("inf"))
    q, scale = _signed(q, options.scale)
    arguments, switches = _shared_arguments(q, k, options)
    launch, BLOCK_D = config("fwd", q)
    _fwd_kernel[_grid(T, launch.queries, q)](
        q_ptr=q, **streams(launch.keys, BLOCK_D, k_ptr=k, v_ptr=v), out_ptr=out, lse_ptr=lse,
        **_strides("q", q, "t"), **_strides("k", k, "s"), **_strides("v", v, "s"), **_strides("o", out, "t",
        last=False),
        **arguments, scale=scale, threshold=threshold, dropout_scale=dropout_scale, dropped=0.0,
        **switches, BLOCK_D=BLOCK_D, BLOCK_M=launch.queries, BLOCK_N=launch.keys,
        num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    return out, lse


def backward_into(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, dout: torch.Tensor,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    options: Options, threshold: int, dropout_scale: float,
) -> None:  # fmt: skip
    """Writes the gradients into [B, H, rows, D] tensors whose last axis is contiguous."""
    T, S = q.shape[2], k.shape[2]
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    negative = options.scale < 0
    q, scale = _signed(q, options.scale)
    arguments, switches = _shared_arguments(q, k, options)
    matrices, padded = lse.shape[0] * lse.shape[1], triton.cdiv(T, ROW_TILE.value) * ROW_TILE.value
    rows = torch.empty((2 * matrices, padded), dtype=torch.float32, device=lse.device)
    launch, BLOCK_D = config("bwd_dq", q)
    inputs = {
        **_strides("q", q, "t"), **_strides("k", k, "s"), **_strides("v", v, "s"), **_strides("do", dout, "t"),
        **arguments, **switches, "scale": scale, "threshold": threshold, "dropout_scale": dropout_scale,
        "BLOCK_D": BLOCK_D,
    }  # fmt: skip
    _bwd_dq_kernel[_grid(T, launch.queries, q)](
        q_ptr=q, do_ptr=dout, **streams(launch.keys, BLOCK_D, k_ptr=k, v_ptr=v),
        out_ptr=out, lse_ptr=lse, rows_ptr=rows, dq_ptr=dq, **_strides("o", out, "t", last=False),
        **_strides("dq", dq, "t", last=False), **inputs, kept=1 / dropout_scale if dropout_scale else 0.0,
        BLOCK_M=launch.queries, BLOCK_N=launch.keys, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    launch, _ = config("bwd_dkdv", q)
    walked = streams(launch.queries, BLOCK_D, q_ptr=q, do_ptr=dout)
    if walked["DESCRIBED"]:
        rows = TensorDescriptor(rows, [2 * matrices, padded], [padded, 1], [1, launch.queries])
    _bwd_dkdv_kernel[_grid(S, launch.keys, q)](
        k_ptr=k, v_ptr=v, **walked, rows_ptr=rows,
        dk_ptr=dk, dv_ptr=dv, **_strides("dk", dk, "s", last=False), **_strides("dv", dv, "s", last=False), **inputs,
        BLOCK_M=launch.queries, BLOCK_N=launch.keys, num_warps=launch.warps, num_stages=launch.stages,
    )  # fmt: skip
    if negative:
        dq.neg_()


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    options: Options, threshold: int, dropout_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """dq, dk and dv, laid out [B, rows, H, D]."""
    S = k.shape[2]
    dq, dk, dv = _empty_bthd(q, q.shape[2]), _empty_bthd(k, S), _empty_bthd(k, S)
    backward_into(dq, dk, dv, dout, q, k, v, out, lse, options, threshold, dropout_scale)
    return dq, dk, dv


def backward_qkv(
    dout: torch.Tensor, qkv: torch.Tensor, num_heads: int, out: torch.Tensor, lse: torch.Tensor,
    options: Options, threshold: int, dropout_scale: float,
) -> torch.Tensor:  # fmt: skip
    """The gradient of the packed projection, [B, T, 3C]."""
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    B, T, C3 = qkv.shape
    heads = (B, T, 3, num_heads, C3 // (3 * num_heads))
    q, k, v = qkv.unflatten(2, heads[2:]).permute(2, 0, 3, 1, 4)
    dq, dk, dv = dqkv.view(heads).permute(2, 0, 3, 1, 4)
    backward_into(dq, dk, dv, dout, q, k, v, out, lse, options, threshold, dropout_scale)
    return dqkv
