"""attention in Triton: online softmax forward; backward split into dQ by query tiles and dK, dV by key tiles.

Notation: S = scale Q Kᵀ, P = exp(S - lse), Z = keep · P / (1 - p) after dropout, O = Z V. Backward, with
delta = rowsum(dO · O): dV = Zᵀ dO, dS = P · (keep · (dO Vᵀ) / (1 - p) - delta), dQ = scale dS K, dK = scale dSᵀ Q.
Masks: causal, window, lengths and packing leave each query an interval of keys (and each key one of queries); tiles
outside it are skipped and tiles inside it pay for no mask. key_mask and mask are loaded for every tile.
Precision: products of the inputs' dtype accumulate in float32, softmax in float32 by exp2; P and dS are rounded to the
inputs' dtype before their products. Deterministic: one program owns each output, no atomics.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import launch_configs
from .descriptors import describable, descriptor
from .gemm import cast, dot, precision
from .philox import dropping_seed, keep_matrix
from .sizes import cdiv, next_power_of_2

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32
ROW_TILE = tl.constexpr(128)  # rows saved for backward are padded to whole tiles, so that loads need no mask
UNBOUNDED = 1 << 30  # a window that reaches everywhere
GRID_LIMIT = 65_535  # most programs in the second dimension of a grid
# Least scale for scaling scores after their maximum. With scale 0, a score of -inf would become NaN. With a tiny scale,
# LOWEST would become an ordinary score.
LEAST_LATE_SCALE = 2.0**-64


class Config(NamedTuple):
    """Tile of queries × keys, warps and pipeline stages of one kernel; what follows has a default in every row."""

    queries: int
    keys: int
    warps: int
    stages: int
    registers: int = 0  # most registers of a thread; 0 lets the compiler choose
    late: int = 0  # 1: forward scales scores after taking their maximum, in the instruction that subtracts it


# Groups of arguments that the kernels' helpers share. A group may hold a None pointer but no constexpr, because Triton
# makes a tensor of a constexpr that is assigned to a name. Compile-time switches therefore stay separate parameters.


class Head(NamedTuple):
    """Head `h` of batch row `b`, and the elements of its rows."""

    b: Any  # int64
    h: Any  # int64
    offs_d: Any  # [BLOCK_D], D padded to a power of two


class Source(NamedTuple):
    """Location of the rows of one head."""

    ptr: Any  # pointer to the head's first element, or descriptor of the whole tensor [B, H, rows, D]
    stride_t: Any
    stride_d: Any


class Packing(NamedTuple):
    """Sequence of each packed token, [T] each; all None without packing."""

    start_ptr: Any
    end_ptr: Any
    sequence_ptr: Any


class Masks(NamedTuple):
    """Masks that are loaded tile by tile, each None where the caller passed none."""

    key_mask_ptr: Any  # [B, S]
    stride_kmb: Any
    stride_kms: Any
    mask_ptr: Any  # [B, H, T, S]
    stride_mb: Any
    stride_mh: Any
    stride_mt: Any
    stride_ms: Any
    T: Any
    S: Any


class Rows(NamedTuple):
    """Rows that a program owns, [BLOCK, 1] each. A row meets the rows first <= x < last of the other axis."""

    offs: Any
    first: Any
    last: Any


class Walk(NamedTuple):
    """Rows that a program's loops walk over, a tile at a time."""

    offs: Any  # [BLOCK], from 0
    end: Any  # row to stop before
    cut: Any  # a pointer with lengths or packed sequences, which may end before the tensor, else None


class Ranges(NamedTuple):
    """Rows of a walk: a tile in [inside, outside) needs no mask; one in [begin, inside) or [outside, end) does."""

    begin: Any
    inside: Any
    outside: Any
    end: Any


class Dropout(NamedTuple):
    """Dropout of the rows that a program owns, [BLOCK, 1] each, and the rule's numbers; `seed_ptr` is None without."""

    position: Any  # position of the row in its sequence
    start: Any  # first row of its sequence
    matrix: Any  # number of the matrix: b of keep_matrix
    site: Any
    threshold: Any
    seed_ptr: Any


@triton.jit
def _program(rows, BLOCK: tl.constexpr, FLAT: tl.constexpr):
    """Return (matrix, tile, tiles): this program's head, its tile of the head's rows, and how many tiles a head has.

    `matrix` is batch · H + head, int64. A head has `rows` rows, and a tile BLOCK of them; `tile` counts from 0. The
    grid is (tiles, heads), or with FLAT (tiles · heads,). CUDA allows 65,535 programs in a grid's second dimension, so
    more heads need FLAT, which costs a division and up to four registers.
    """
    if FLAT:
        tiles = tl.cdiv(rows, BLOCK)
        matrix, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles
    else:
        tiles = tl.num_programs(0)
        matrix, tile = tl.program_id(1), tl.program_id(0)
    return matrix.to(tl.int64), tile, tiles


@triton.jit
def _bounds(offs, mask_offs, lower, upper, others, length_ptr, packing, b):
    """Return (first, last), one of each for each row: the row may meet the rows first <= x < last of the other axis.

    The rows are queries and the other axis, of `others` rows, is keys, or the reverse. `offs` are the rows' positions
    on the other axis, where the last query sits at the last key: query i is at i + S - T, key j at j - (S - T). A row
    meets offs - lower < x < offs + upper, by the window and the causal mask. If `packing`, a Packing, has pointers,
    S is T, and x is also in the row's own sequence. `length_ptr` [B] has the number of keys of each batch row, or is
    None. It may be given only if the rows are queries: x is then a key, and also below the length of batch row b.
    `mask_offs` is True for rows that exist.
    """
    first = tl.maximum(offs - lower + 1, 0)
    last = tl.minimum(offs + upper, others)
    if length_ptr is not None:
        last = tl.minimum(last, tl.load(length_ptr + b).to(tl.int32))
    if packing.start_ptr is not None:
        first = tl.maximum(first, tl.load(packing.start_ptr + offs, mask=mask_offs, other=0))
        last = tl.minimum(last, tl.load(packing.end_ptr + offs, mask=mask_offs, other=0))
    return first, last


@triton.jit
def _ranges(first, last, mask_rows, others, ALL_MASKED: tl.constexpr, BLOCK: tl.constexpr):
    """Return the Ranges (begin, inside, outside, end) of keys for a program that owns queries, or the reverse.

    The program loops over the `others` keys in tiles of BLOCK, which begin at multiples of BLOCK. Tiles in
    [inside, outside) need no mask; tiles in [begin, inside) and [outside, end) do. `first` and `last` are the results
    of `_bounds` for the program's queries, and `mask_rows` is True for queries that exist. If ALL_MASKED, every tile
    counts as one that needs a mask.
    """
    begin = tl.min(tl.where(mask_rows, first, others)) // BLOCK * BLOCK
    end = tl.max(tl.where(mask_rows, last, 0))
    if ALL_MASKED:
        return Ranges(begin, begin, begin, end)
    inside = (tl.max(tl.where(mask_rows, first, 0)) + BLOCK - 1) // BLOCK * BLOCK
    outside = tl.min(tl.where(mask_rows, last, others)) // BLOCK * BLOCK
    inside = tl.maximum(begin, tl.minimum(inside, end))
    return Ranges(begin, inside, tl.maximum(inside, outside), end)


@triton.jit
def _masked_tiles(ranges, BLOCK: tl.constexpr):
    """Return how many tiles of BLOCK rows in `ranges` need a mask: those in [begin, inside) and [outside, end)."""
    return tl.cdiv(ranges.inside - ranges.begin, BLOCK) + tl.cdiv(ranges.end - ranges.outside, BLOCK)


@triton.jit
def _masked_start(n, ranges, BLOCK: tl.constexpr):
    """Return the first row of the n-th tile, counted from 0, that needs a mask in `ranges`, a Ranges.

    Tiles from `ranges.begin` to `ranges.inside` come first, then tiles from `ranges.outside` on. A tile has BLOCK rows.
    """
    before = tl.cdiv(ranges.inside - ranges.begin, BLOCK)
    start = tl.where(n < before, ranges.begin + n * BLOCK, ranges.outside + (n - before) * BLOCK)
    return tl.multiple_of(start, BLOCK)


@triton.jit
def _tile(source, start, limit, offs, head, MASKED: tl.constexpr, D: tl.constexpr):
    """Load rows start + offs of one head of a tensor by pointers, as a tile [len(offs), BLOCK_D].

    `source` is a Source: the pointer to the head's first element and the strides of rows and columns. `head` is a Head,
    whose `offs_d` [BLOCK_D] are the columns; columns from D on are zeros. If MASKED, row number `limit` of the head and
    all rows after it are zeros too. Otherwise `limit` is not read, and all rows of the tile must exist.
    """
    first = tl.full((), 0, dtype=tl.int64) + start
    ptrs = source.ptr + first * source.stride_t + offs[:, None] * source.stride_t
    ptrs = ptrs + head.offs_d[None, :] * source.stride_d
    if MASKED:
        return tl.load(ptrs, mask=(start + offs < limit)[:, None] & (head.offs_d < D)[None, :], other=0.0)
    if D == head.offs_d.shape[0]:
        return tl.load(ptrs)
    return tl.load(ptrs, mask=(head.offs_d < D)[None, :], other=0.0)


@triton.jit
def _walked_tile(source, start, walk, head, MASKED: tl.constexpr, D: tl.constexpr, DESCRIBED: tl.constexpr):
    """Load rows start + walk.offs of a tensor that a loop goes through tile by tile, as a tile [BLOCK, BLOCK_D].

    `source` is a Source, `head` a Head, and `walk` a Walk, whose `end` is the row to stop before. Columns from D on are
    zeros. Without DESCRIBED, the source holds a pointer. Rows from `walk.end` on are zeros if MASKED, and must exist if
    not. With DESCRIBED, it holds a descriptor of the whole tensor, and rows past the tensor's end are zeros. Rows from
    `walk.end` to the tensor's end are zeros if MASKED and `walk.cut` is not None (lengths or packed sequences).
    Otherwise they hold the tensor's values, which the caller excludes by `_allowed`.
    """
    if DESCRIBED:
        x = source.ptr.load([head.b.to(tl.int32), head.h.to(tl.int32), start, 0])
        x = tl.reshape(x, [walk.offs.shape[0], head.offs_d.shape[0]])
        if MASKED and walk.cut is not None:
            x = tl.where((start + walk.offs < walk.end)[:, None], x, 0.0).to(x.dtype)
    else:
        x = _tile(source, start, walk.end, walk.offs, head, MASKED, D)
    return x


@triton.jit
def _allowed(x, rows, i, j, head, masks):
    """Return a bool tile, True where query i may attend to key j.

    `i` and `j` are positions that broadcast against each other. `rows`, a Rows, describes the rows that the program
    owns: queries or keys. `x` is the other position: j if the program owns queries, i if it owns keys. A pair is
    allowed if rows.first <= x < rows.last, and if each mask in `masks` (a Masks) that is not None is True: key_mask
    [B, S] at j, mask [B, H, T, S] at (i, j). `head` is a Head, which names batch row and head.
    """
    allowed = (x >= rows.first) & (x < rows.last)
    if masks.key_mask_ptr is not None:
        ptrs = masks.key_mask_ptr + head.b * masks.stride_kmb + j * masks.stride_kms
        allowed &= tl.load(ptrs, mask=j < masks.S, other=0) != 0
    if masks.mask_ptr is not None:
        offs = head.b * masks.stride_mb + head.h * masks.stride_mh
        offs += i.to(tl.int64) * masks.stride_mt + j.to(tl.int64) * masks.stride_ms
        allowed &= tl.load(masks.mask_ptr + offs, mask=(i < masks.T) & (j < masks.S), other=0) != 0
    return allowed


@triton.jit
def _without_padding(x, j, head, masks):
    """Return keys or values x [BLOCK, BLOCK_D] at positions j [BLOCK], with zeros in rows that key_mask excludes.

    `head` is a Head, which names the batch row, and `masks` a Masks with a key_mask [B, S], True for a key that counts.
    Padding may hold NaN, which a product would spread.
    """
    ptrs = masks.key_mask_ptr + head.b * masks.stride_kmb + j * masks.stride_kms
    live = tl.load(ptrs, mask=j < masks.S, other=0) != 0
    return tl.where(live[:, None], x, 0.0).to(x.dtype)


@triton.jit
def _coordinates(offs, mask_offs, packing, bh, h, H):
    """Return (position, start, matrix) for the rows `offs` [BLOCK], the first fields of a Dropout, [BLOCK, 1] each.

    `position` is the row's position in its sequence, and `start` the first row of that sequence. `matrix` is the number
    that `keep_matrix` takes as b. It is `bh` = batch · H + h, or with packed sequences sequence · H + h. `mask_offs` is
    True for rows that exist, and `packing` is a Packing. Triton 3.6 cannot return a tuple that holds a None, so the
    caller makes the Dropout.
    """
    start, matrix = tl.zeros_like(offs), tl.zeros_like(offs) + bh.to(tl.int32)
    if packing.start_ptr is not None:
        start = tl.load(packing.start_ptr + offs, mask=mask_offs, other=0)
        matrix = tl.load(packing.sequence_ptr + offs, mask=mask_offs, other=0) * H + h.to(tl.int32)
    return (offs - start)[:, None], start[:, None], matrix[:, None]


@triton.jit
def _walked_position(start, walk, dropout):
    """Return the positions of rows start + walk.offs within the sequence of each row that the program owns.

    The result is [own rows, BLOCK], with start + walk.offs[c] - dropout.start[r] at (r, c). `walk` is a Walk and
    `dropout` a Dropout, whose field `start` [own rows, 1] is the first row of each own row's sequence. The parameter
    `start` must be a multiple of 16. The code writes start // 16 * 16 to show this to LLVM, which does not see
    `tl.multiple_of`. LLVM then merges the Philox calls that share a counter; otherwise a loop would have nearly twice
    as many instructions.
    """
    tl.static_assert(walk.offs.shape[0] % 16 == 0)
    return (start // 16 * 16 + walk.offs)[None, :] - dropout.start


@triton.jit
def _keep(i, j, dropout, COMPARES: tl.constexpr):
    """Return a bool tile, True where dropout keeps the probability of (query i, key j). `dropout` is a Dropout.

    `i` and `j` are positions within a sequence that broadcast against each other. A probability is kept if its 16
    random bits, a function of i, j and the Dropout's seed, site and matrix number, are at least its threshold. COMPARES
    chooses the instructions, not the result. "rotated" suits a tile [queries, keys], "upper" a tile [keys, queries]:
    see `keep_matrix`.
    """
    return keep_matrix(i, j, dropout.matrix, dropout.site, dropout.threshold, dropout.seed_ptr, COMPARES)


@triton.jit
def _fwd_tile(
    acc, m, total, q, keys, values, start, walk, rows, head, masks, dropout, dropped, scale_log2,
    MASKED: tl.constexpr, LATE: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (acc, m, total) after one more tile of keys and values, which begins at key `start`.

    They are the state of the online softmax for BLOCK_M queries q [BLOCK_M, BLOCK_D]: the unnormalised output [BLOCK_M,
    BLOCK_D], the maximum of the scaled scores and the sum of their exponentials, [BLOCK_M] each. A scaled score is q kᵀ
    times `scale_log2` = scale · log2(e), so that exponentials are powers of two. If LATE, the maximum is taken before
    the scores are scaled, and is scaled afterwards; the state has the same meaning.

    `keys` and `values` are a Source each. MASKED is False for a tile that needs no mask. `walk`, `rows`, `head`,
    `masks` and `dropout` are tuples of the classes Walk, Rows, Head, Masks and Dropout. `dropped` is zero, the value of
    a probability that dropout drops.
    """
    k = _walked_tile(keys, start, walk, head, MASKED, D, DESCRIBED)  # [BLOCK_N, BLOCK_D]
    s = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
    if not LATE:
        s *= scale_log2
    j = (start + walk.offs)[None, :]
    if MASKED:
        if masks.key_mask_ptr is not None or masks.mask_ptr is not None:
            s = tl.maximum(s, LOWEST, propagate_nan=tl.PropagateNan.ALL)  # a maximum of -inf means: no key yet
        s = tl.where(_allowed(j, rows, rows.offs, j, head, masks), s, float("-inf"))
    highest = tl.max(s, axis=1)
    if LATE:
        any_key = highest > float("-inf")
        highest *= scale_log2
        if MASKED and (masks.key_mask_ptr is not None or masks.mask_ptr is not None):
            highest = tl.where(any_key, tl.maximum(highest, LOWEST), highest)
    m_new = tl.maximum(m, highest)
    shift = m_new
    if MASKED:
        shift = tl.where(m_new == float("-inf"), 0.0, m_new)  # no key yet: -inf - -inf would be NaN
    if LATE:
        p = tl.exp2(s * scale_log2 - shift[:, None])
    else:
        p = tl.exp2(s - shift[:, None])
    alpha = tl.exp2(m - shift)
    total = total * alpha + tl.sum(p, axis=1)
    if dropout.seed_ptr is not None:
        keep = _keep(dropout.position, _walked_position(start, walk, dropout), dropout, "rotated")
        p = tl.where(keep, p, dropped)
    v = _walked_tile(values, start, walk, head, MASKED, D, DESCRIBED)  # [BLOCK_N, BLOCK_D]
    if MASKED and masks.key_mask_ptr is not None:
        v = _without_padding(v, start + walk.offs, head, masks)
    acc = dot(cast(p, v.dtype, PRECISION), v, acc * alpha[:, None], PRECISION)
    return acc, m_new, total


@triton.jit(do_not_specialize=["T", "S", "lower", "upper", "site", "threshold"])
def _fwd_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr, v_ptr,  # [B, H, S, D], or descriptors if DESCRIBED
    out_ptr,  # [B, H, T, D], elements contiguous
    lse_ptr,  # [B, H, T] float32
    length_ptr,  # [B]
    key_mask_ptr,  # [B, S]
    mask_ptr,  # [B, H, T, S]
    start_ptr, end_ptr, sequence_ptr,  # [T]
    seed_ptr,  # [1]; None without dropout
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_ob, stride_oh, stride_ot,
    stride_kmb, stride_kms, stride_mb, stride_mh, stride_mt, stride_ms,
    H, T, S, lower, upper, scale, site, threshold, dropout_scale,
    dropped,  # 0.0 as an argument: with a constant zero the selection costs more instructions
    ALL_MASKED: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr, LATE: tl.constexpr,
):  # fmt: skip
    """Write out and lse, the logarithm of the sum of exponentials, for BLOCK_M queries of one head.

    The query at position i, counted so that the last one sits at the last key, meets keys i - lower < j < i + upper.
    The lengths and masks that are given, not None, exclude more keys. `start_ptr`, `end_ptr` and `sequence_ptr`
    describe packed sequences (see Packing). Dropout drops a probability if its 16 random bits are below `threshold`,
    and multiplies others by `dropout_scale`. The bits are a function of the seed, `site` (the number of the dropout
    within a forward pass) and the position. A query without keys gets out 0 and lse +inf; one whose scores are all -inf
    gets NaN. ALL_MASKED says that every tile needs a mask, FLAT that the grid has one dimension, and LATE that scores
    are scaled after taking their maximum.
    """
    bh, tile, tiles = _program(T, BLOCK_M, FLAT)
    b, h = bh // H, bh % H
    start_m = (tiles - 1 - tile) * BLOCK_M  # the last tiles, which have the most keys under causality, come first
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    head = Head(b, h, tl.arange(0, BLOCK_D))
    packing = Packing(start_ptr, end_ptr, sequence_ptr)
    masks = Masks(key_mask_ptr, stride_kmb, stride_kms, mask_ptr, stride_mb, stride_mh, stride_mt, stride_ms, T, S)
    position, sequence_start, matrix = _coordinates(offs_m, mask_m, packing, bh, h, H)
    dropout = Dropout(position, sequence_start, matrix, site, threshold, seed_ptr)

    first, last = _bounds(offs_m + S - T, mask_m, lower, upper, S, length_ptr, packing, b)
    ranges = _ranges(first, last, mask_m, S, ALL_MASKED, BLOCK_N)
    rows = Rows(offs_m[:, None], first[:, None], last[:, None])
    walk = Walk(tl.arange(0, BLOCK_N), ranges.end, start_ptr if length_ptr is None else length_ptr)
    if not DESCRIBED:
        k_ptr += b * stride_kb + h * stride_kh
        v_ptr += b * stride_vb + h * stride_vh
    keys, values = Source(k_ptr, stride_ks, stride_kd), Source(v_ptr, stride_vs, stride_vd)
    queries = Source(q_ptr + b * stride_qb + h * stride_qh, stride_qt, stride_qd)
    q = _tile(queries, start_m, T, tl.arange(0, BLOCK_M), head, True, D)  # [BLOCK_M, BLOCK_D]

    scale_log2 = scale * LOG2E
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_M], dtype=tl.float32)
    for n in range(0, _masked_tiles(ranges, BLOCK_N)):
        acc, m, total = _fwd_tile(
            acc, m, total, q, keys, values, _masked_start(n, ranges, BLOCK_N), walk, rows, head, masks, dropout,
            dropped, scale_log2, True, LATE, PRECISION, D, DESCRIBED,
        )  # fmt: skip
    for start in range(ranges.inside, ranges.outside, BLOCK_N):
        acc, m, total = _fwd_tile(
            acc, m, total, q, keys, values, tl.multiple_of(start, BLOCK_N), walk, rows, head, masks, dropout,
            dropped, scale_log2, False, LATE, PRECISION, D, DESCRIBED,
        )  # fmt: skip

    empty = total == 0.0
    # A row that has keys, but only scores of -inf, becomes NaN, as in PyTorch.
    if ALL_MASKED:
        if LATE:  # scaling turns LOWEST into the number below, and may turn a finite score into inf
            total = tl.where(m == tl.maximum(LOWEST * scale_log2, LOWEST), float("nan"), total)
            total = tl.where(m == float("inf"), float("nan"), total)
            empty = total == 0.0
        else:
            total = tl.where(m == LOWEST, float("nan"), total)
    else:
        total = tl.where(empty & (first < last), float("nan"), total)
        empty = total == 0.0
    out = acc * (dropout_scale / tl.where(empty, 1.0, total))[:, None]  # [BLOCK_M, BLOCK_D]
    lse = tl.where(empty, float("inf"), (m + tl.log2(tl.where(empty, 1.0, total))) * LN2)  # [BLOCK_M]
    offs = offs_m.to(tl.int64)[:, None]
    out_ptrs = out_ptr + b * stride_ob + h * stride_oh + offs * stride_ot + head.offs_d[None, :]
    mask = mask_m[:, None] & (head.offs_d < D)[None, :]
    tl.store(out_ptrs, cast(out, out_ptr.dtype.element_ty, PRECISION), mask=mask)
    tl.store(lse_ptr + bh * T + offs_m, lse, mask=mask_m)


@triton.jit
def _bwd_dq_tile(
    dq, q, do, lse_log2, delta, keys, values, start, walk, rows, head, masks, dropout, scale_log2,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return dq after one more tile of keys and values, which begins at key `start`.

    dq [BLOCK_M, BLOCK_D] is a sum over the tiles so far. After the last tile the caller multiplies it by the scale of
    the scores and by dropout's 1 / (1 - p), which gives the gradient of q. q and `do`, the output's gradient, are
    [BLOCK_M, BLOCK_D]. `lse_log2` [BLOCK_M] is lse · log2(e), and `scale_log2` is scale · log2(e). `delta` [BLOCK_M] is
    rowsum(dO · O), times 1 - p with dropout. MASKED is False for a tile that needs no mask. `keys` and `values` are a
    Source each; `walk`, `rows`, `head`, `masks` and `dropout` are tuples of the classes Walk, Rows, Head, Masks and
    Dropout.
    """
    k = _walked_tile(keys, start, walk, head, MASKED, D, DESCRIBED)  # [BLOCK_N, BLOCK_D]
    v = _walked_tile(values, start, walk, head, MASKED, D, DESCRIBED)  # [BLOCK_N, BLOCK_D]
    if MASKED and masks.key_mask_ptr is not None:
        k = _without_padding(k, start + walk.offs, head, masks)
    s = dot(q, tl.trans(k), None, PRECISION)  # [BLOCK_M, BLOCK_N]
    p = tl.exp2(s * scale_log2 - lse_log2[:, None])
    j = (start + walk.offs)[None, :]
    dp = dot(do, tl.trans(v), None, PRECISION)  # [BLOCK_M, BLOCK_N]
    if dropout.seed_ptr is not None:
        keep = _keep(dropout.position, _walked_position(start, walk, dropout), dropout, "rotated")
        dp = tl.where(keep, dp, 0.0)
    ds = p * (dp - delta[:, None])
    if MASKED:
        ds = tl.where(_allowed(j, rows, rows.offs, j, head, masks), ds, 0.0)
    return dot(cast(ds, k.dtype, PRECISION), k, dq, PRECISION)


@triton.jit(do_not_specialize=["T", "S", "lower", "upper", "site", "threshold"])
def _bwd_dq_kernel(
    q_ptr,  # [B, H, T, D]
    k_ptr, v_ptr,  # [B, H, S, D], or descriptors if DESCRIBED
    out_ptr,  # [B, H, T, D], elements contiguous
    do_ptr,  # [B, H, T, D]
    lse_ptr,  # [B, H, T] float32
    rows_ptr,  # [B H, 2, padded T] float32: lse log2(e) and delta (1 - p), for _bwd_dkdv_kernel
    dq_ptr,  # [B, H, T, D], elements contiguous
    length_ptr,  # [B]
    key_mask_ptr,  # [B, S]
    mask_ptr,  # [B, H, T, S]
    start_ptr, end_ptr, sequence_ptr,  # [T]
    seed_ptr,  # [1]; None without dropout
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_ob, stride_oh, stride_ot,
    stride_dob, stride_doh, stride_dot, stride_dod, stride_dqb, stride_dqh, stride_dqt,
    stride_kmb, stride_kms, stride_mb, stride_mh, stride_mt, stride_ms,
    H, T, S, lower, upper, scale, site, threshold, dropout_scale,
    kept,  # 1 - p
    ALL_MASKED: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Write the gradient of BLOCK_M queries of one head to dq, and two numbers for each of them to `rows_ptr`.

    The numbers are lse · log2(e) and delta · (1 - p), or +inf and 0 for a row of the block past the last query. delta
    is rowsum(dO · O), for the output at `out_ptr` and its gradient at `do_ptr`, and p the dropout probability.

    The query at position i, counted so that the last one sits at the last key, meets keys i - lower < j < i + upper.
    The lengths and masks that are given, not None, exclude more keys. `start_ptr`, `end_ptr` and `sequence_ptr`
    describe packed sequences (see Packing). Dropout drops a probability if its 16 random bits are below `threshold`,
    and multiplies others by `dropout_scale`. The bits are a function of the seed, `site` (the number of the dropout
    within a forward pass) and the position. ALL_MASKED says that every tile needs a mask, and FLAT that the grid has
    one dimension.
    """
    bh, tile, tiles = _program(T, BLOCK_M, FLAT)
    b, h = bh // H, bh % H
    start_m = (tiles - 1 - tile) * BLOCK_M  # the last tiles, which have the most keys under causality, come first
    offs_m = start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < T
    head = Head(b, h, tl.arange(0, BLOCK_D))
    packing = Packing(start_ptr, end_ptr, sequence_ptr)
    masks = Masks(key_mask_ptr, stride_kmb, stride_kms, mask_ptr, stride_mb, stride_mh, stride_mt, stride_ms, T, S)
    position, sequence_start, matrix = _coordinates(offs_m, mask_m, packing, bh, h, H)
    dropout = Dropout(position, sequence_start, matrix, site, threshold, seed_ptr)

    first, last = _bounds(offs_m + S - T, mask_m, lower, upper, S, length_ptr, packing, b)
    ranges = _ranges(first, last, mask_m, S, ALL_MASKED, BLOCK_N)
    rows = Rows(offs_m[:, None], first[:, None], last[:, None])
    walk = Walk(tl.arange(0, BLOCK_N), ranges.end, start_ptr if length_ptr is None else length_ptr)
    if not DESCRIBED:
        k_ptr += b * stride_kb + h * stride_kh
        v_ptr += b * stride_vb + h * stride_vh
    keys, values = Source(k_ptr, stride_ks, stride_kd), Source(v_ptr, stride_vs, stride_vd)
    queries = Source(q_ptr + b * stride_qb + h * stride_qh, stride_qt, stride_qd)
    douts = Source(do_ptr + b * stride_dob + h * stride_doh, stride_dot, stride_dod)
    outs = Source(out_ptr + b * stride_ob + h * stride_oh, stride_ot, 1)
    q = _tile(queries, start_m, T, tl.arange(0, BLOCK_M), head, True, D)  # [BLOCK_M, BLOCK_D]
    do = _tile(douts, start_m, T, tl.arange(0, BLOCK_M), head, True, D)  # [BLOCK_M, BLOCK_D]
    out = _tile(outs, start_m, T, tl.arange(0, BLOCK_M), head, True, D)  # [BLOCK_M, BLOCK_D]

    delta = tl.sum(out.to(tl.float32) * do.to(tl.float32), axis=1)  # [BLOCK_M]
    lse_log2 = tl.load(lse_ptr + bh * T + offs_m, mask=mask_m, other=float("inf")) * LOG2E  # [BLOCK_M]
    padded = tl.cdiv(T, ROW_TILE) * ROW_TILE
    rows_ptr += bh * 2 * padded + offs_m
    tl.store(rows_ptr, lse_log2, mask=offs_m < padded)
    tl.store(rows_ptr + padded, delta * kept, mask=offs_m < padded)
    if seed_ptr is not None:  # the scale of dropout is applied once, at the end
        delta *= kept
        scale_dq = scale * dropout_scale
    else:
        scale_dq = scale

    scale_log2 = scale * LOG2E
    dq = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    for n in range(0, _masked_tiles(ranges, BLOCK_N)):
        dq = _bwd_dq_tile(
            dq, q, do, lse_log2, delta, keys, values, _masked_start(n, ranges, BLOCK_N), walk, rows, head, masks,
            dropout, scale_log2, True, PRECISION, D, DESCRIBED,
        )  # fmt: skip
    for start in range(ranges.inside, ranges.outside, BLOCK_N):
        dq = _bwd_dq_tile(
            dq, q, do, lse_log2, delta, keys, values, tl.multiple_of(start, BLOCK_N), walk, rows, head, masks,
            dropout, scale_log2, False, PRECISION, D, DESCRIBED,
        )  # fmt: skip
    offs = offs_m.to(tl.int64)[:, None]
    dq_ptrs = dq_ptr + b * stride_dqb + h * stride_dqh + offs * stride_dqt + head.offs_d[None, :]
    mask = mask_m[:, None] & (head.offs_d < D)[None, :]
    tl.store(dq_ptrs, cast(dq * scale_dq, dq_ptr.dtype.element_ty, PRECISION), mask=mask)


@triton.jit
def _saved_rows(rows_ptr, start, bh, T, walk, DESCRIBED: tl.constexpr):
    """Return (lse · log2(e), delta · (1 - p)), [BLOCK_M] each, of the tile of queries from row `start` on of head `bh`.

    `_bwd_dq_kernel` has saved them in `rows_ptr`, p is the dropout probability, and delta = rowsum(dO · O). `bh` is
    batch · H + head, T the number of queries, and `walk` a Walk. If DESCRIBED, `rows_ptr` is a tensor descriptor. No
    load is masked, because `rows_ptr` holds whole tiles.
    """
    if DESCRIBED:
        matrix = bh.to(tl.int32)
        lse_log2 = tl.reshape(rows_ptr.load([2 * matrix, start]), [walk.offs.shape[0]])
        delta = tl.reshape(rows_ptr.load([2 * matrix + 1, start]), [walk.offs.shape[0]])
    else:
        padded = tl.cdiv(T, ROW_TILE) * ROW_TILE
        ptrs = rows_ptr + bh * 2 * padded + (start + walk.offs)
        lse_log2 = tl.load(ptrs)
        delta = tl.load(ptrs + padded)
    return lse_log2, delta


@triton.jit
def _bwd_dkdv_tile(
    dk, dv, k, v, queries, douts, rows_ptr, start, bh, walk, rows, head, masks, dropout, scale_log2,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Return (dk, dv) after one more tile of queries, which begins at query `start`.

    dk and dv [BLOCK_N, BLOCK_D] are sums over the tiles so far. After the last tile the caller multiplies both by
    dropout's 1 / (1 - p), and dk also by the scale of the scores, which gives the gradients of k and v. k and v are
    [BLOCK_N, BLOCK_D], and `scale_log2` is scale · log2(e). `queries` and `douts`, the output's gradient, are a Source
    each. `rows_ptr` holds the rows that `_saved_rows` reads, and `bh` is batch · H + head. MASKED is False for a tile
    that needs no mask. `walk`, `rows`, `head`, `masks` and `dropout` are tuples of the classes Walk, Rows, Head, Masks
    and Dropout.
    """
    q = _walked_tile(queries, start, walk, head, MASKED, D, DESCRIBED)  # [BLOCK_M, BLOCK_D]
    do = _walked_tile(douts, start, walk, head, MASKED, D, DESCRIBED)  # [BLOCK_M, BLOCK_D]
    i = (start + walk.offs)[None, :]
    lse_log2, delta = _saved_rows(rows_ptr, start, bh, masks.T, walk, DESCRIBED)
    s = dot(k, tl.trans(q), None, PRECISION)  # [BLOCK_N, BLOCK_M]: keys are the rows
    p = tl.exp2(s * scale_log2 - lse_log2[None, :])
    if MASKED:
        allowed = _allowed(i, rows, i, rows.offs, head, masks)
        p = tl.where(allowed, p, 0.0)
    dp = dot(v, tl.trans(do), None, PRECISION)  # [BLOCK_N, BLOCK_M]
    if dropout.seed_ptr is not None:
        # The sign stores whether a weight is kept, so that one select serves both products. delta is already multiplied
        # by 1 - p. The scale of dropout is applied once, at the end.
        keep = _keep(_walked_position(start, walk, dropout), dropout.position, dropout, "upper")
        signed = tl.where(keep, p, -p)
        z = tl.maximum(signed, 0.0, propagate_nan=tl.PropagateNan.ALL)
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
    q_ptr, do_ptr,  # [B, H, T, D], or descriptors if DESCRIBED
    k_ptr, v_ptr,  # [B, H, S, D]
    rows_ptr,  # [B H, 2, padded T] float32, from _bwd_dq_kernel; or a descriptor if DESCRIBED
    dk_ptr, dv_ptr,  # [B, H, S, D], elements contiguous
    length_ptr,  # [B]
    key_mask_ptr,  # [B, S]
    mask_ptr,  # [B, H, T, S]
    start_ptr, end_ptr, sequence_ptr,  # [T]
    seed_ptr,  # [1]; None without dropout
    stride_qb, stride_qh, stride_qt, stride_qd, stride_kb, stride_kh, stride_ks, stride_kd,
    stride_vb, stride_vh, stride_vs, stride_vd, stride_dob, stride_doh, stride_dot, stride_dod,
    stride_dkb, stride_dkh, stride_dks, stride_dvb, stride_dvh, stride_dvs,
    stride_kmb, stride_kms, stride_mb, stride_mh, stride_mt, stride_ms,
    H, T, S, lower, upper, scale, site, threshold, dropout_scale,
    ALL_MASKED: tl.constexpr, FLAT: tl.constexpr, PRECISION: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Write the gradients of BLOCK_N keys and values of one head to dk and dv.

    `rows_ptr` holds lse · log2(e) and delta · (1 - p) of the queries, which `_bwd_dq_kernel` has saved; p is the
    dropout probability, and delta = rowsum(dO · O).

    The query at position i, counted so that the last one sits at the last key, meets keys i - lower < j < i + upper.
    The lengths and masks that are given, not None, exclude more keys. `start_ptr`, `end_ptr` and `sequence_ptr`
    describe packed sequences (see Packing). Dropout drops a probability if its 16 random bits are below `threshold`,
    and multiplies others by `dropout_scale`. The bits are a function of the seed, `site` (the number of the dropout
    within a forward pass) and the position. ALL_MASKED says that every tile needs a mask, and FLAT that the grid has
    one dimension.
    """
    tl.static_assert(ROW_TILE % BLOCK_M == 0)  # saved rows are read without a mask
    bh, tile, tiles = _program(S, BLOCK_N, FLAT)
    b, h = bh // H, bh % H
    start_n = tile * BLOCK_N  # under causality the first keys have the most queries
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_m = tl.arange(0, BLOCK_M)
    head = Head(b, h, tl.arange(0, BLOCK_D))
    mask_n = offs_n < S
    packing = Packing(start_ptr, end_ptr, sequence_ptr)
    masks = Masks(key_mask_ptr, stride_kmb, stride_kms, mask_ptr, stride_mb, stride_mh, stride_mt, stride_ms, T, S)
    position, sequence_start, matrix = _coordinates(offs_n, mask_n, packing, bh, h, H)
    dropout = Dropout(position, sequence_start, matrix, site, threshold, seed_ptr)

    first, last = _bounds(offs_n - (S - T), mask_n, upper, lower, T, None, packing, b)
    if length_ptr is not None:
        last = tl.where(offs_n < tl.load(length_ptr + b), last, 0)
    ranges = _ranges(first, last, mask_n, T, ALL_MASKED, BLOCK_M)
    rows = Rows(offs_n[:, None], first[:, None], last[:, None])
    walk = Walk(offs_m, ranges.end, start_ptr)
    if not DESCRIBED:
        q_ptr += b * stride_qb + h * stride_qh
        do_ptr += b * stride_dob + h * stride_doh
    queries, douts = Source(q_ptr, stride_qt, stride_qd), Source(do_ptr, stride_dot, stride_dod)
    keys = Source(k_ptr + b * stride_kb + h * stride_kh, stride_ks, stride_kd)
    values = Source(v_ptr + b * stride_vb + h * stride_vh, stride_vs, stride_vd)
    k = _tile(keys, start_n, S, tl.arange(0, BLOCK_N), head, True, D)  # [BLOCK_N, BLOCK_D]
    v = _tile(values, start_n, S, tl.arange(0, BLOCK_N), head, True, D)  # [BLOCK_N, BLOCK_D]

    scale_log2 = scale * LOG2E
    dk = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    for n in range(0, _masked_tiles(ranges, BLOCK_M)):
        dk, dv = _bwd_dkdv_tile(
            dk, dv, k, v, queries, douts, rows_ptr, _masked_start(n, ranges, BLOCK_M), bh, walk, rows, head, masks,
            dropout, scale_log2, True, PRECISION, D, DESCRIBED,
        )  # fmt: skip
    for start in range(ranges.inside, ranges.outside, BLOCK_M):
        dk, dv = _bwd_dkdv_tile(
            dk, dv, k, v, queries, douts, rows_ptr, tl.multiple_of(start, BLOCK_M), bh, walk, rows, head, masks,
            dropout, scale_log2, False, PRECISION, D, DESCRIBED,
        )  # fmt: skip
    offs = offs_n.to(tl.int64)[:, None]
    dk_ptrs = dk_ptr + b * stride_dkb + h * stride_dkh + offs * stride_dks + head.offs_d[None, :]
    dv_ptrs = dv_ptr + b * stride_dvb + h * stride_dvh + offs * stride_dvs + head.offs_d[None, :]
    mask = mask_n[:, None] & (head.offs_d < D)[None, :]
    tl.store(dk_ptrs, cast(dk * (scale * dropout_scale), dk_ptr.dtype.element_ty, PRECISION), mask=mask)
    tl.store(dv_ptrs, cast(dv * dropout_scale, dv_ptr.dtype.element_ty, PRECISION), mask=mask)


def config(kernel: str, q: torch.Tensor) -> tuple[Config, int]:
    """Return (launch configuration, BLOCK_D) of the kernel "fwd", "bwd_dq" or "bwd_dkdv" for q [B, H, T, D].

    BLOCK_D is D padded to a power of two of at least 16. The table is read for q's device, element size and BLOCK_D.
    """
    D = q.shape[-1]
    BLOCK_D = max(16, next_power_of_2(D))
    launch = launch_configs.pick("attention", kernel, launch_configs.architecture(q.device), q.element_size(), BLOCK_D)
    return Config(*launch), BLOCK_D


def sources(rows: int, BLOCK_D: int, **tensors: torch.Tensor) -> dict[str, Any]:
    """Return launch arguments for `tensors` [B, H, ., D], which a kernel's loop reads in tiles [rows, BLOCK_D].

    `tensors` are passed by the kernel's names for them, such as k_ptr=k. The result is a dict with these names and
    "DESCRIBED". If all tensors can be read by tensor descriptors, DESCRIBED is True, and the values are descriptors.
    Otherwise it is False, and the values are the tensors.
    """
    architecture = launch_configs.architecture(next(iter(tensors.values())).device)
    if all(describable(x, architecture) for x in tensors.values()):
        block = [1, 1, rows, BLOCK_D]
        return {"DESCRIBED": True, **{name: descriptor(x, block) for name, x in tensors.items()}}
    return {"DESCRIBED": False, **tensors}


def launch_options(launch: Config) -> dict[str, Any]:
    """Return the options of a launch for Triton's compiler: warps, stages, and a limit of registers if there is one.

    They are a dict with "num_warps", "num_stages", "enable_fp_fusion" and, if `launch.registers` is not 0, "maxnreg".
    """
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return options | {"maxnreg": launch.registers} if launch.registers else options


class Options(NamedTuple):
    """Options of the op, in the order of its schema."""

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


def _shared_arguments(
    q: torch.Tensor, k: torch.Tensor, options: Options, threshold: int
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (arguments, switches): the run-time and the compile-time arguments that all three kernels take, by name.

    q is [B, H, T, D] and k [B, H, S, D]. The arguments are the pointers of lengths, masks, packing and seed, each None
    if not used, and the strides of the masks. Others are H, T, S, `site` and the bounds `lower` and `upper`. A query at
    i meets keys i - lower < j < i + upper, by the window and the causal mask. The switches are ALL_MASKED, FLAT,
    PRECISION and D. Dropout drops a probability if its 16 random bits are below `threshold`: with 0 there is no seed.
    """
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
        "start_ptr": start, "end_ptr": end, "sequence_ptr": sequence,
        "seed_ptr": dropping_seed(options.seed, threshold),
        "stride_kmb": key_mask_strides[0], "stride_kms": key_mask_strides[1],
        "stride_mb": mask_strides[0], "stride_mh": mask_strides[1], "stride_mt": mask_strides[2],
        "stride_ms": mask_strides[3],
        "H": H, "T": T, "S": S, "lower": window, "upper": 1 if options.causal else window, "site": options.site,
    }  # fmt: skip
    switches = {
        "ALL_MASKED": options.key_mask is not None or mask is not None,
        "FLAT": B * H > GRID_LIMIT,
        "PRECISION": precision(),
        "D": D,
    }
    return arguments, switches


def _packing(cu_seqlens: torch.Tensor, T: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (start, end, sequence), int32 [T] each: first token, end and number of the sequence that each token is in.

    The end is one past the sequence's last token. `cu_seqlens` [n + 1] are the bounds of n sequences. Tokens after the
    last sequence get the number n and cu_seqlens[n] as start and end, so that they meet no key. Values of cu_seqlens
    are clamped to [0, T], so that a wrong one does not lead out of bounds.
    """
    bounds = cu_seqlens.long().clamp(0, T)
    tokens = torch.arange(T, device=cu_seqlens.device)
    sequence = torch.searchsorted(bounds[1:].contiguous(), tokens, right=True)
    start = bounds[sequence]
    end = torch.cat((bounds[1:], bounds[-1:]))[sequence]
    return start.int(), end.int(), sequence.int()


def _signed(q: torch.Tensor, scale: float) -> tuple[torch.Tensor, float]:
    """Return (q, scale) with scale ≥ 0, as the kernels expect. The sign of a negative scale moves into q."""
    return (-q, -scale) if scale < 0 else (q, scale)


def _strides(prefix: str, tensor: torch.Tensor, rows: str, last: bool = True) -> dict[str, int]:
    """Return the stride arguments of a tensor [B, H, rows, D], such as {"stride_qb": ...} for the prefix "q".

    `rows` is the letter of the third axis, "t" or "s". Without `last`, the stride of D is left out, because it is 1.
    """
    return dict(zip(_stride_names(prefix, rows, last), tensor.stride(), strict=False))


@functools.cache
def _stride_names(prefix: str, rows: str, last: bool) -> tuple[str, ...]:
    """Return the names of the stride arguments of a tensor, such as "stride_qb" for the prefix "q": see `_strides`.

    `rows` is the letter of the third axis, "t" or "s". Without `last`, the name for D is left out.
    """
    return tuple(f"stride_{prefix}{axis}" for axis in ("b", "h", rows, "d")[: 4 if last else 3])


def _grid(rows: int, tile: int, q: torch.Tensor) -> tuple[int, ...]:
    """Return the launch grid of programs that own `tile` of the `rows` rows of a head each, for q [B, H, T, D].

    It is (tiles, B · H), or (tiles · B · H,) if B · H exceeds 65,535: see `_program`.
    """
    tiles, matrices = cdiv(rows, tile), q.shape[0] * q.shape[1]
    return (tiles, matrices) if matrices <= GRID_LIMIT else (tiles * matrices,)


def _empty_bthd(q: torch.Tensor, rows: int) -> torch.Tensor:
    """Return an uninitialised tensor [B, H, rows, D] like q [B, H, _, D]. Its memory is laid out [B, rows, H, D]."""
    B, H, _, D = q.shape
    return torch.empty((B, rows, H, D), dtype=q.dtype, device=q.device).transpose(1, 2)


def forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: Options, threshold: int, dropout_scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (out, lse): the output [B, H, T, D], with its memory laid out as [B, T, H, D], and the float32 [B, H, T].

    q is [B, H, T, D], and k and v are [B, H, S, D]. lse is the natural logarithm of a row's sum of exponentials. A row
    without any key gets out 0 and lse +inf. Dropout drops a probability if its 16 random bits are below `threshold`,
    and multiplies others by `dropout_scale`. `options` are validated already.
    """
    T = q.shape[2]
    out = _empty_bthd(q, T)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if out.numel() == 0:
        return out, lse
    if k.numel() == 0:
        return out.zero_(), lse.fill_(float("inf"))
    q, scale = _signed(q, options.scale)
    arguments, switches = _shared_arguments(q, k, options, threshold)
    launch, BLOCK_D = config("fwd", q)
    _fwd_kernel[_grid(T, launch.queries, q)](
        q_ptr=q, **sources(launch.keys, BLOCK_D, k_ptr=k, v_ptr=v), out_ptr=out, lse_ptr=lse,
        **_strides("q", q, "t"), **_strides("k", k, "s"), **_strides("v", v, "s"), **_strides("o", out, "t",
        last=False),
        **arguments, scale=scale, threshold=threshold, dropout_scale=dropout_scale, dropped=0.0,
        **switches, BLOCK_D=BLOCK_D, BLOCK_M=launch.queries, BLOCK_N=launch.keys,
        LATE=bool(launch.late) and scale >= LEAST_LATE_SCALE, **launch_options(launch),
    )  # fmt: skip
    return out, lse


def backward_into(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, dout: torch.Tensor,
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    options: Options, threshold: int, dropout_scale: float,
) -> None:  # fmt: skip
    """Write the gradients of q, k and v into dq, dk and dv, [B, H, rows, D] each, whose last axis is contiguous.

    `dout` [B, H, T, D] is the upstream gradient. `out` and `lse` are the results of `forward`, and `options`,
    `threshold` and `dropout_scale` the arguments that it had. Without queries or keys the gradients are 0.
    """
    T, S = q.shape[2], k.shape[2]
    if q.numel() == 0 or k.numel() == 0:
        for gradient in (dq, dk, dv):
            gradient.zero_()
        return
    negative = options.scale < 0
    q, scale = _signed(q, options.scale)
    arguments, switches = _shared_arguments(q, k, options, threshold)
    matrices, padded = lse.shape[0] * lse.shape[1], cdiv(T, ROW_TILE.value) * ROW_TILE.value
    rows = torch.empty((2 * matrices, padded), dtype=torch.float32, device=lse.device)
    launch, BLOCK_D = config("bwd_dq", q)
    inputs = {
        **_strides("q", q, "t"), **_strides("k", k, "s"), **_strides("v", v, "s"), **_strides("do", dout, "t"),
        **arguments, **switches, "scale": scale, "threshold": threshold, "dropout_scale": dropout_scale,
        "BLOCK_D": BLOCK_D,
    }  # fmt: skip
    _bwd_dq_kernel[_grid(T, launch.queries, q)](
        q_ptr=q, do_ptr=dout, **sources(launch.keys, BLOCK_D, k_ptr=k, v_ptr=v),
        out_ptr=out, lse_ptr=lse, rows_ptr=rows, dq_ptr=dq, **_strides("o", out, "t", last=False),
        **_strides("dq", dq, "t", last=False), **inputs, kept=1 / dropout_scale if dropout_scale else 0.0,
        BLOCK_M=launch.queries, BLOCK_N=launch.keys, **launch_options(launch),
    )  # fmt: skip
    launch, _ = config("bwd_dkdv", q)
    walked = sources(launch.queries, BLOCK_D, q_ptr=q, do_ptr=dout)
    if walked["DESCRIBED"]:
        rows = descriptor(rows, [1, launch.queries])
    _bwd_dkdv_kernel[_grid(S, launch.keys, q)](
        k_ptr=k, v_ptr=v, **walked, rows_ptr=rows,
        dk_ptr=dk, dv_ptr=dv, **_strides("dk", dk, "s", last=False), **_strides("dv", dv, "s", last=False), **inputs,
        BLOCK_M=launch.queries, BLOCK_N=launch.keys, **launch_options(launch),
    )  # fmt: skip
    if negative:
        dq.neg_()


def backward(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    options: Options, threshold: int, dropout_scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (dq, dk, dv), the gradients of q, k and v, [B, H, rows, D] each, with memory laid out as [B, rows, H, D].

    `dout` [B, H, T, D] is the upstream gradient. `out` and `lse` are the results of `forward`, and `options`,
    `threshold` and `dropout_scale` the arguments that it had.
    """
    S = k.shape[2]
    dq, dk, dv = _empty_bthd(q, q.shape[2]), _empty_bthd(k, S), _empty_bthd(k, S)
    backward_into(dq, dk, dv, dout, q, k, v, out, lse, options, threshold, dropout_scale)
    return dq, dk, dv


def backward_qkv(
    dout: torch.Tensor, qkv: torch.Tensor, num_heads: int, out: torch.Tensor, lse: torch.Tensor,
    options: Options, threshold: int, dropout_scale: float,
) -> torch.Tensor:  # fmt: skip
    """Return the gradient [B, T, 3C] of the packed projection `qkv`, for the upstream gradient dout [B, H, T, D].

    H is `num_heads`. The last axis holds the gradients of Q, K and V, one after another, as `qkv` holds those. `out`
    and `lse` are the results of `forward` on its q, k and v, and `options`, `threshold` and `dropout_scale` the
    arguments that it had.
    """
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device)
    B, T, C3 = qkv.shape
    heads = (B, T, 3, num_heads, C3 // (3 * num_heads))
    q, k, v = qkv.unflatten(2, heads[2:]).permute(2, 0, 3, 1, 4)
    dq, dk, dv = dqkv.view(heads).permute(2, 0, 3, 1, 4)
    backward_into(dq, dk, dv, dout, q, k, v, out, lse, options, threshold, dropout_scale)
    return dqkv
