"""linear_cross_entropy in Triton: chunks of the rows that count; a chunk's logits become their gradient in place.

Notation, ε the smoothing: l = x Wᵀ + b, loss = (1 - ε) (lse - l[target]) + ε (lse - mean of l), dl = p - ε/V - (1 - ε)
[v = target], dx = dl W, dW = dlᵀ x, db = sum of dl. Rows that count are gathered in their order; how many there are
stays on the device: programs past them end at once, so nothing waits, and ignored rows cost nothing and change no bit.
Precision: the product's epilogue takes maximum and sum of exponentials of each half tile from float32 logits. It keeps
their difference to that maximum, for bfloat16 in float16, which rounds less than dl is rounded unless p is negligible,
else in float32. dl is rounded once to the dtype of x, for float16 times a power of two, away from subnormal numbers; dW
and db add up in float32, chunk by chunk. Deterministic: one program owns each output.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import launch_configs
from .gemm import as_matrix, cast, config, grid, halves, operands, precision, product, store, tile
from .sizes import cdiv

COMPACT = 1024  # rows in a step of _compact_kernel and _total_kernel
ROWS, COLUMNS = 16, 128  # tile of _gather_kernel
GRADIENT_ROWS = 64  # rows of a tile of _gradient_kernel; a multiple of every product's k


@triton.jit(do_not_specialize=["N", "ignore_index"])
def _compact_kernel(target_ptr, index_ptr, count_ptr, N, ignore_index, BLOCK: tl.constexpr):
    """Write the row indices of targets other than `ignore_index` to index, in order, and how many they are to count.

    target and index are [N], count is [1]; index and count are int32. Entries of index from the count on are not
    written. The grid has one program.
    """
    count = tl.full((), 0, dtype=tl.int32)
    for first in range(0, N, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        target = tl.load(target_ptr + offs, mask=offs < N, other=0)
        counts = ((offs < N) & (target != ignore_index)).to(tl.int32)
        tl.store(index_ptr + count + tl.cumsum(counts, axis=0) - 1, offs, mask=counts == 1)
        count += tl.sum(counts, axis=0)
    tl.store(count_ptr, count)


@triton.jit(do_not_specialize=["first", "R"])
def _gather_kernel(
    x_ptr, target_ptr, index_ptr, count_ptr, rows_ptr, targets_ptr, stride_xm, stride_xc, first, R, C, V,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copy a chunk of the rows of x whose target is not ignored into rows [R, C], and their targets into targets [R].

    `index_ptr` has the indices in x [N, C] of all rows whose target is not ignored, and `count_ptr` points to their
    number. `first` is their number in earlier chunks, so this chunk has count - first such rows, at most R. Its other
    rows become zeros; if the chunk has none at all, nothing is written. Targets are clamped to [0, V) and become int32.
    The grid is (blocks of BLOCK_M rows, blocks of BLOCK_C columns).
    """
    count = tl.load(count_ptr)
    if first < count:
        offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
        live = (first + offs_m < count) & (offs_m < R)
        row = tl.load(index_ptr + first + offs_m, mask=live, other=0).to(tl.int64)
        mask_c = offs_c < C
        ptrs = x_ptr + row[:, None] * stride_xm + offs_c[None, :] * stride_xc
        x = tl.load(ptrs, mask=live[:, None] & mask_c[None, :], other=0.0)
        out = rows_ptr + offs_m.to(tl.int64)[:, None] * C + offs_c[None, :]
        tl.store(out, x, mask=(offs_m < R)[:, None] & mask_c[None, :])
        if tl.program_id(1) == 0:
            target = tl.load(target_ptr + row, mask=live, other=0)
            target = tl.minimum(tl.maximum(target, 0), V - 1).to(tl.int32)
            tl.store(targets_ptr + offs_m, target, mask=offs_m < R)


@triton.jit
def _logits_half(
    logits, out, bias_ptr, targets_ptr, largest_ptr, total_ptr, sum_ptr, picked_ptr, m, n, R, V, stride_om, stride_on,
    KEEPS: tl.constexpr, OUT_MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the bias to half a tile of logits, and write statistics of each of its rows.

    `logits` is the left or the right half of a tile of the product of x and the weight, still without the bias. `m` and
    `n` are the row and the column of its first element in the chunk's logits [R, V]. For each row of the half tile,
    largest gets the largest logit and total the sum of exponentials after that logit is subtracted. If `sum_ptr` is not
    None, sum gets the sum of the logits. These three are [half tiles of a row, R], and a half tile with w columns is
    number n / w. picked [R] gets the logit of the row's target if the half tile has it. If KEEPS, the logits less the
    largest of their row in the half tile are written to `out` [R, V].
    """
    offs_m = m + tl.arange(0, logits.shape[0])
    offs_n = n + tl.arange(0, logits.shape[1])
    mask_m, mask_n = offs_m < R, offs_n < V
    if bias_ptr is not None:
        logits += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    at = (n // logits.shape[1]).to(tl.int64) * R + offs_m
    if sum_ptr is not None:
        tl.store(sum_ptr + at, tl.sum(tl.where(mask_n[None, :], logits, 0.0), axis=1), mask=mask_m)
    target = tl.load(targets_ptr + offs_m, mask=mask_m, other=-1)
    picked = tl.sum(tl.where(offs_n[None, :] == target[:, None], logits, 0.0), axis=1)
    tl.store(picked_ptr + offs_m, picked, mask=mask_m & (target >= n) & (target < n + logits.shape[1]))
    logits = tl.where(mask_n[None, :], logits, float("-inf"))
    largest = tl.max(logits, axis=1)
    logits -= tl.where(largest == float("-inf"), 0.0, largest)[:, None]  # a bias of -inf may rule classes out
    tl.store(largest_ptr + at, largest, mask=mask_m)
    tl.store(total_ptr + at, tl.sum(tl.exp(logits), axis=1), mask=mask_m)
    if KEEPS:
        store(out, logits, m, n, R, V, stride_om, stride_on, OUT_MODE, PRECISION)


@triton.jit(do_not_specialize=["first", "M"])
def _logits_kernel(
    a, b, out, bias_ptr, targets_ptr, count_ptr, largest_ptr, total_ptr, sum_ptr, picked_ptr,
    stride_am, stride_ak, stride_bn, stride_bk, stride_om, stride_on, first, M, N, K,
    KEEPS: tl.constexpr, A_MODE: tl.constexpr, B_MODE: tl.constexpr, OUT_MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the logits a bᵀ + bias of a chunk, and write statistics of each half tile of them.

    a [M, K] holds the chunk's rows of x whose target is not ignored, and b [N, K] is the weight. For each row of a half
    tile, largest gets the largest logit and total the sum of exponentials relative to it. sum, unless its pointer is
    None, gets the sum of the logits. All three are [half tiles of a row, M]. picked [M] gets the logit of the row's
    target. With KEEPS the logits less the largest of their row in the half tile go to out [M, N].

    `count_ptr` points to the number of all rows whose target is not ignored, and `first` is their number in earlier
    chunks. So the chunk has count - first such rows, at most M. Tiles without such a row are skipped. The programs of a
    grid of any size share the tiles.
    """
    live = tl.minimum(tl.load(count_ptr) - first, M)
    tiles = tl.cdiv(tl.maximum(live, 0), BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = tile(index, live, N, BLOCK_M, BLOCK_N)
        acc = product(
            a, b, m, n, M, N, K, stride_am, stride_ak, stride_bn, stride_bk,
            BLOCK_M, BLOCK_N, BLOCK_K, A_MODE, B_MODE, PRECISION,
        )  # fmt: skip
        left, right = halves(acc)
        _logits_half(
            left, out, bias_ptr, targets_ptr, largest_ptr, total_ptr, sum_ptr, picked_ptr, m, n, M, N,
            stride_om, stride_on, KEEPS, OUT_MODE, PRECISION,
        )  # fmt: skip
        _logits_half(
            right, out, bias_ptr, targets_ptr, largest_ptr, total_ptr, sum_ptr, picked_ptr, m, n + BLOCK_N // 2, M, N,
            stride_om, stride_on, KEEPS, OUT_MODE, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first", "R"])
def _statistics_kernel(
    largest_ptr, total_ptr, sum_ptr, picked_ptr, index_ptr, count_ptr, row_ptr, loss_ptr, first, R, V, parts, smoothing,
    SCATTERS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Write the loss of each row of a chunk, and the maximum and the sum of exponentials of the row's logits.

    The logits of a row lie in `parts` half tiles. `largest_ptr`, `total_ptr` and `sum_ptr`, [parts, R] each, have the
    largest logit of each half tile, the sum of exponentials relative to it, and the sum of the logits. The kernel joins
    the half tiles. It writes a row's maximum and its sum of exponentials, relative to the maximum, to row [2, R].
    `picked_ptr` [R] has the logit of each row's target. Program i takes the BLOCK_M rows from i · BLOCK_M on.

    `count_ptr` points to the number of all rows whose target is not ignored, and `first` is their number in earlier
    chunks. So the chunk has count - first such rows, at most R, and nothing is written for other rows.

    The loss of row r goes to element index[first + r] of loss, its row index in x, if SCATTERS, else to element
    first + r. No loss is written if `loss_ptr` is None. `smoothing` is the label smoothing; if it is 0, `sum_ptr` is
    None.
    """
    count = tl.load(count_ptr)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    live = (first + offs_m < count) & (offs_m < R)
    largest = tl.full([BLOCK_P, BLOCK_M], float("-inf"), dtype=tl.float32)
    last = tl.where(first + tl.program_id(0) * BLOCK_M < count, parts, 0)
    for part in range(0, last, BLOCK_P):
        offs_p = part + tl.arange(0, BLOCK_P)
        mask = (offs_p < parts)[:, None] & live[None, :]
        offs = offs_p.to(tl.int64)[:, None] * R + offs_m[None, :]
        largest = tl.maximum(largest, tl.load(largest_ptr + offs, mask=mask, other=float("-inf")))
    m = tl.max(largest, axis=0)
    total = tl.zeros([BLOCK_P, BLOCK_M], dtype=tl.float32)
    logits = tl.zeros([BLOCK_P, BLOCK_M], dtype=tl.float32)
    for part in range(0, last, BLOCK_P):
        offs_p = part + tl.arange(0, BLOCK_P)
        mask = (offs_p < parts)[:, None] & live[None, :]
        offs = offs_p.to(tl.int64)[:, None] * R + offs_m[None, :]
        shift = tl.load(largest_ptr + offs, mask=mask, other=float("-inf")) - tl.where(live, m, 0.0)[None, :]
        total += tl.load(total_ptr + offs, mask=mask, other=0.0) * tl.exp(shift)
        if sum_ptr is not None:
            logits += tl.load(sum_ptr + offs, mask=mask, other=0.0)
    row_total = tl.sum(total, axis=0)
    tl.store(row_ptr + offs_m, m, mask=live)
    tl.store(row_ptr + R + offs_m, row_total, mask=live)
    if loss_ptr is not None:
        log_total = tl.log(tl.where(live, row_total, 1.0))
        loss = log_total + (m - tl.load(picked_ptr + offs_m, mask=live, other=0.0))
        if sum_ptr is not None:
            loss = (1.0 - smoothing) * loss + smoothing * (log_total + (m - tl.sum(logits, axis=0) / V))
        at = (first + offs_m).to(tl.int64)
        if SCATTERS:
            at = tl.load(index_ptr + first + offs_m, mask=live, other=0).to(tl.int64)
        tl.store(loss_ptr + at, loss, mask=live)


@triton.jit(do_not_specialize=["first", "R"])
def _gradient_kernel(
    logits_ptr, gradient_ptr, largest_ptr, row_ptr, targets_ptr, index_ptr, count_ptr, dloss_ptr, partial_ptr,
    stride_l, stride_g, first, R, V, smoothing, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Write FACTOR times the gradient of each row's loss by its logits to gradient [R, V], for the R rows of a chunk.

    `logits_ptr` [R, V] holds the logits less the largest of their row in a part of BLOCK_V columns, and `largest_ptr`
    [parts, R] these largest ones. `row_ptr` [2, R] holds each row's largest logit and its sum of exponentials relative
    to it. The gradient may share memory with the logits. The grid is (parts, blocks of BLOCK_M rows).

    `count_ptr` points to the number of all rows whose target is not ignored, and `first` is their number in earlier
    chunks. So the chunk has count - first such rows, at most R, and they come first. A block that holds at least one of
    them writes zeros for its other rows. A block that holds none writes nothing, also not to partial.

    `targets_ptr` [R] holds the targets of the chunk's rows. If `dloss_ptr` is given, it holds the upstream gradient of
    the loss of each row of x, else the upstream gradient is 1. `index_ptr` has the indices in x of the rows of all
    chunks whose target is not ignored, of which the chunk reads those from `first` on. If `partial_ptr` is given, the
    sum over a block's rows, without FACTOR, goes to partial [blocks, V], for the gradient of the bias. `smoothing` is
    the label smoothing. PRECISION is that of `gemm.cast`.
    """
    count = tl.load(count_ptr)
    offs_m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    if first + tl.program_id(1) * BLOCK_M < count:
        mask_m, mask_v = offs_m < R, offs_v < V
        live = (first + offs_m < count) & mask_m
        mask = live[:, None] & mask_v[None, :]
        row = offs_m.to(tl.int64)[:, None]
        # Rows are padded up to their stride. Masks that end at the stride, not at V, keep loads and stores wide.
        wide = mask_m[:, None] & (offs_v < stride_l)[None, :]
        shifted = tl.load(logits_ptr + row * stride_l + offs_v[None, :], mask=wide, other=0.0).to(tl.float32)
        largest = tl.load(largest_ptr + tl.program_id(0).to(tl.int64) * R + offs_m, mask=live, other=0.0)
        factor = tl.exp(largest - tl.load(row_ptr + offs_m, mask=live, other=0.0))
        factor /= tl.load(row_ptr + R + offs_m, mask=live, other=1.0)
        target = tl.load(targets_ptr + offs_m, mask=mask_m, other=-1)
        gradient = tl.exp(shifted) * factor[:, None] - smoothing / V
        gradient = tl.where(offs_v[None, :] == target[:, None], gradient - (1.0 - smoothing), gradient)
        if dloss_ptr is not None:
            index = tl.load(index_ptr + first + offs_m, mask=live, other=0)
            gradient *= tl.load(dloss_ptr + index, mask=live, other=0.0)[:, None]
        gradient = tl.where(mask, gradient, 0.0)
        if partial_ptr is not None:
            tl.store(partial_ptr + tl.program_id(1).to(tl.int64) * V + offs_v, tl.sum(gradient, axis=0), mask=mask_v)
        rounded = cast(gradient * FACTOR, gradient_ptr.dtype.element_ty, PRECISION)
        wide = mask_m[:, None] & (offs_v < stride_g)[None, :]
        tl.store(gradient_ptr + row * stride_g + offs_v[None, :], rounded, mask=wide)


@triton.jit
def _dx_half(dx, out_ptr, index_ptr, m, n, first, live, C, stride_om, scale, PRECISION: tl.constexpr):
    """Write `scale` times `dx` into the rows of out [N, C] that have the indices of the chunk's rows in x.

    Only rows of x whose target is not ignored are divided into chunks. `live` is the number of rows in this chunk, and
    `first` the number in earlier chunks. `index_ptr` has the indices in x of the rows of all chunks. `dx` is half a
    tile of the gradient, and `m` and `n` are the row and the column of its first element in the chunk. `scale` is
    1 / FACTOR of `_dx_kernel`, times power / count if MEAN.
    """
    offs_m = m + tl.arange(0, dx.shape[0])
    offs_n = n + tl.arange(0, dx.shape[1])
    row = tl.load(index_ptr + first + offs_m, mask=offs_m < live, other=0).to(tl.int64)
    value = cast(dx * scale, out_ptr.dtype.element_ty, PRECISION)
    mask = (offs_m < live)[:, None] & (offs_n < C)[None, :]
    tl.store(out_ptr + row[:, None] * stride_om + offs_n[None, :], value, mask=mask)


@triton.jit(do_not_specialize=["first", "M"])
def _dx_kernel(
    a, b, out, index_ptr, count_ptr, stride_am, stride_ak, stride_bn, stride_bk, stride_om, stride_on,
    first, M, N, K, FACTOR: tl.constexpr, MEAN: tl.constexpr,
    A_MODE: tl.constexpr, B_MODE: tl.constexpr, OUT_MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write dx, the gradient of a chunk's logits times the weight, into `out`, at the indices that the rows have in x.

    a [M, K] is the gradient of the logits times FACTOR, b [N, K] the transposed weight, and the result is a bᵀ /
    FACTOR. If MEAN, it is also multiplied by power / count. There count is the number of rows whose target is not
    ignored, and power the largest power of two up to count. `index_ptr` has the indices of these rows in x, `count_ptr`
    points to count, and `first` is their number in earlier chunks. Other rows of `out` are not written. The programs of
    a grid of any size share the tiles.
    """
    count = tl.load(count_ptr)
    live = tl.minimum(count - first, M)
    scale = 1.0 / FACTOR
    if MEAN:  # the factor of 1 / count that is no power of two; autograd divides by the other factor, exactly
        counted = tl.maximum(count, 1).to(tl.float32)
        power = (counted.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
        scale = power / counted * scale
    tiles = tl.cdiv(tl.maximum(live, 0), BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = tile(index, live, N, BLOCK_M, BLOCK_N)
        acc = product(
            a, b, m, n, M, N, K, stride_am, stride_ak, stride_bn, stride_bk,
            BLOCK_M, BLOCK_N, BLOCK_K, A_MODE, B_MODE, PRECISION,
        )  # fmt: skip
        left, right = halves(acc)
        _dx_half(left, out, index_ptr, m, n, first, live, N, stride_om, scale, PRECISION)
        _dx_half(right, out, index_ptr, m, n + BLOCK_N // 2, first, live, N, stride_om, scale, PRECISION)


@triton.jit
def _dweight_half(value, out_ptr, m, n, M, N, stride_om, stride_on, FACTOR: tl.constexpr, ACCUMULATES: tl.constexpr):
    """Write `value` / FACTOR into dW, in out [M, N] float32, or add it to the values there if ACCUMULATES.

    `value` is the left or the right half of a product's tile, float32. `m` and `n` are the row and the column of its
    first element in dW. FACTOR is the power of two by which `_gradient_kernel` multiplied the gradients of the logits.
    """
    offs_m = m + tl.arange(0, value.shape[0])
    offs_n = n + tl.arange(0, value.shape[1])
    ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * stride_om + offs_n.to(tl.int64)[None, :] * stride_on
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    value *= 1.0 / FACTOR
    if ACCUMULATES:
        value += tl.load(ptrs, mask=mask, other=0.0)
    tl.store(ptrs, value, mask=mask)


@triton.jit(do_not_specialize=["first", "K"])
def _dweight_kernel(
    a, b, out, count_ptr, stride_am, stride_ak, stride_bn, stride_bk, stride_om, stride_on, first, M, N, K,
    FACTOR: tl.constexpr, ACCUMULATES: tl.constexpr,
    A_MODE: tl.constexpr, B_MODE: tl.constexpr, OUT_MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write a chunk's part of dW to out [M, N], or add it to the sum over earlier chunks if ACCUMULATES.

    The part is a bᵀ / FACTOR. a [M, K] is the transposed gradient of the chunk's logits times FACTOR, and b [N, K] are
    the chunk's rows of x, transposed: column k of both belongs to row k of the chunk. `count_ptr` points to the number
    of all rows whose target is not ignored, and `first` is their number in earlier chunks. So the chunk has
    count - first such rows, at most K; further columns of a and b add nothing. The programs of a grid of any size share
    the tiles. A_MODE, B_MODE and PRECISION are explained in `gemm.product`.
    """
    live = tl.minimum(tl.load(count_ptr) - first, K)
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    if ACCUMULATES:
        tiles = tl.where(live > 0, tiles, 0)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = tile(index, M, N, BLOCK_M, BLOCK_N)
        acc = product(
            a, b, m, n, M, N, live, stride_am, stride_ak, stride_bn, stride_bk,
            BLOCK_M, BLOCK_N, BLOCK_K, A_MODE, B_MODE, PRECISION,
        )  # fmt: skip
        left, right = halves(acc)
        _dweight_half(left, out, m, n, M, N, stride_om, stride_on, FACTOR, ACCUMULATES)
        _dweight_half(right, out, m, n + BLOCK_N // 2, M, N, stride_om, stride_on, FACTOR, ACCUMULATES)


@triton.jit(do_not_specialize=["first", "R"])
def _dbias_kernel(
    partial_ptr, dbias_ptr, count_ptr, first, R, V, ROWS: tl.constexpr, ACCUMULATES: tl.constexpr, BLOCK: tl.constexpr
):
    """Write a chunk's part of db to dbias [V] float32, or add it to the sum over earlier chunks if ACCUMULATES.

    The part is the sum of the rows of partial [R / ROWS rounded up, V]. `_gradient_kernel` wrote one such row for each
    block of ROWS of the chunk's R rows. `count_ptr` points to the number of all rows whose target is not ignored, and
    `first` is their number in earlier chunks. A row of partial is not read if its block holds no such row. Program i
    takes the BLOCK classes from i · BLOCK on.
    """
    offs_v = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask_v = offs_v < V
    total = tl.zeros([BLOCK], dtype=tl.float32)
    if ACCUMULATES:
        total = tl.load(dbias_ptr + offs_v, mask=mask_v, other=0.0)
    live = tl.maximum(tl.minimum(tl.load(count_ptr) - first, R), 0)
    for part in range(0, tl.cdiv(live, ROWS)):
        total += tl.load(partial_ptr + part * V + offs_v, mask=mask_v, other=0.0)
    tl.store(dbias_ptr + offs_v, total, mask=mask_v)


@triton.jit
def _total_kernel(loss_ptr, count_ptr, total_ptr, counted_ptr, MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Write the sum of the losses, or their mean if MEAN, to total, and how many they are to counted.

    Both are float32 []. `count_ptr` points to the number of losses, and loss [count] holds the losses of the rows that
    are not ignored. The mean of no losses is 0. The grid has one program.
    """
    count = tl.load(count_ptr)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, count, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        total += tl.load(loss_ptr + offs, mask=offs < count, other=0.0)
    loss = tl.sum(total, axis=0)
    counted = count.to(tl.float32)
    if MEAN:
        loss /= tl.maximum(counted, 1.0)
    tl.store(total_ptr, loss)
    tl.store(counted_ptr, counted)


def _run(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None, ignore_index: int,
    smoothing: float, dloss: torch.Tensor | None, loss: torch.Tensor | None, scatters: bool,
    dx: torch.Tensor | None, dweight: torch.Tensor | None, dbias: torch.Tensor | None, mean: bool,
) -> torch.Tensor:  # fmt: skip
    """Write the losses of the rows of x [N, C] and their gradients.

    Return how many rows count, int32 [1], on the device. A row counts if its target is not `ignore_index`. `weight` is
    [V, C], `target` [N] and `bias` [V] or None. `smoothing` is the label smoothing. `loss` [N] float32 gets the losses,
    at the row's index if `scatters`, else those of the rows that count one after another. `dx` [N, C], `dweight` [V, C]
    and `dbias` [V] get gradients; rows of dx that do not count are not written. Each of the four may be None, which
    leaves it out. `dloss` [N] is the upstream gradient of each row's loss, or None for 1. If `mean`, dx is also
    multiplied by power / count, where power is the largest power of two up to the count.
    """
    (N, C), V, device = x.shape, weight.shape[0], x.device
    index = torch.empty(N, dtype=torch.int32, device=device)
    count = torch.empty(1, dtype=torch.int32, device=device)
    target = target.contiguous()
    _compact_kernel[(1,)](
        target_ptr=target,
        index_ptr=index,
        count_ptr=count,
        N=N,
        ignore_index=ignore_index,
        BLOCK=COMPACT,
        num_warps=4,
        enable_fp_fusion=True,
    )

    keeps = dx is not None or dweight is not None or dbias is not None
    launch, architecture = config("linear_cross_entropy", "product", x, C)
    R = min(N, *launch_configs.pick("linear_cross_entropy", "chunk", architecture, x.element_size(), C))
    width = launch.n // 2
    parts = 2 * cdiv(V, launch.n)
    padded = cdiv(V, 64) * 64  # so that rows are aligned
    floats = {"dtype": torch.float32, "device": device}
    rows = torch.empty((R, C), dtype=x.dtype, device=device)
    targets = torch.empty(R, dtype=torch.int32, device=device)
    gradient = torch.empty((R if keeps else 0, padded), dtype=x.dtype, device=device)[:, :V]
    if x.dtype == torch.bfloat16:
        logits = gradient.view(torch.float16)
    elif x.dtype == torch.float32:
        logits = gradient
    else:
        logits = torch.empty(gradient.shape, **floats)
    largest, total = torch.empty((parts, R), **floats), torch.empty((parts, R), **floats)
    sums = torch.empty((parts, R), **floats) if smoothing > 0 and loss is not None else None
    picked, of_rows = torch.empty(R, **floats), torch.empty((2, R), **floats)
    partial = None if dbias is None else torch.empty((cdiv(R, GRADIENT_ROWS), V), **floats)
    # A power of two scales exactly. With dloss there is no factor, because gradients of single losses may be large.
    factor = 32768.0 if x.dtype == torch.float16 and dloss is None else 1.0
    bias = None if bias is None else bias.contiguous()

    def multiply(kernel: Any, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, parts: int, **more: Any) -> None:
        """Launch `kernel`, which computes out = a bᵀ in tiles.

        The launch configuration and `count` come from the enclosing `_run`. The kernel stores a tile in `parts`
        parts side by side, or by pointers if `parts` is 0. `more` holds the kernel's other arguments by name.
        """
        arguments, switches = operands(launch, architecture, a, b, out, parts)
        kernel[grid(launch, a.shape[0], b.shape[0], device)](**arguments, count_ptr=count, **more, **switches)

    for first in range(0, N, R):
        _gather_kernel[(cdiv(R, ROWS), max(1, cdiv(C, COLUMNS)))](
            x_ptr=x, target_ptr=target, index_ptr=index, count_ptr=count, rows_ptr=rows, targets_ptr=targets,
            stride_xm=x.stride(0), stride_xc=x.stride(1), first=first, R=R, C=C, V=V,
            BLOCK_M=ROWS, BLOCK_C=COLUMNS, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        multiply(
            _logits_kernel, rows, weight, logits, 2, bias_ptr=bias, targets_ptr=targets, largest_ptr=largest,
            total_ptr=total, sum_ptr=sums, picked_ptr=picked, first=first, KEEPS=keeps,
        )  # fmt: skip
        _statistics_kernel[(cdiv(R, 32),)](
            largest_ptr=largest, total_ptr=total, sum_ptr=sums, picked_ptr=picked, index_ptr=index, count_ptr=count,
            row_ptr=of_rows, loss_ptr=loss, first=first, R=R, V=V, parts=parts, smoothing=smoothing,
            SCATTERS=scatters, BLOCK_M=32, BLOCK_P=32, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        if not keeps:
            continue
        _gradient_kernel[(cdiv(V, width), cdiv(R, GRADIENT_ROWS))](
            logits_ptr=logits, gradient_ptr=gradient, largest_ptr=largest, row_ptr=of_rows, targets_ptr=targets,
            index_ptr=index, count_ptr=count, dloss_ptr=dloss, partial_ptr=partial,
            stride_l=logits.stride(0), stride_g=gradient.stride(0), first=first, R=R, V=V, smoothing=smoothing,
            FACTOR=factor, PRECISION=precision(), BLOCK_M=GRADIENT_ROWS, BLOCK_V=width,
            num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
        if dx is not None and C:
            multiply(_dx_kernel, gradient, weight.t(), dx, 0, index_ptr=index, first=first, FACTOR=factor, MEAN=mean)
        if dweight is not None and C:
            multiply(
                _dweight_kernel, gradient.t(), rows.t(), dweight, 0, first=first, FACTOR=factor, ACCUMULATES=first > 0
            )
        if dbias is not None:
            _dbias_kernel[(cdiv(V, 128),)](
                partial_ptr=partial, dbias_ptr=dbias, count_ptr=count, first=first, R=R, V=V,
                ROWS=GRADIENT_ROWS, ACCUMULATES=first > 0, BLOCK=128, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return count


def _gradients(
    x: torch.Tensor, weight: torch.Tensor, needs_x: bool, needs_weight: bool, needs_bias: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Return tensors (dx, dweight, dbias) to write gradients into, None in place of one that is not needed.

    dx has the shape and dtype of x and is zero, which it stays in rows that do not count. dweight has the shape of the
    weight and dbias is [V]; both are float32 and uninitialised.
    """
    return (
        torch.zeros(x.shape, dtype=x.dtype, device=x.device) if needs_x else None,
        torch.empty_like(weight, dtype=torch.float32) if needs_weight else None,
        torch.empty(weight.shape[0], dtype=torch.float32, device=x.device) if needs_bias else None,
    )


def forward(
    x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None, ignore_index: int,
    label_smoothing: float, reduction: str, needs_x: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (loss, count, dx, dweight, dbias): the loss, how many rows count, and gradients of the sum of the losses.

    x is [..., C], weight [V, C], target [...] and bias [V] or None. A row counts if its target is not `ignore_index`.
    The loss is float32, [] for the reductions "mean" (0 if no row counts) and "sum", or in the shape of `target` for
    "none". count is float32 []. dx is in the dtype of x, 0 in rows that do not count; dweight and dbias are float32. A
    gradient that is not needed has shape [0]. For "none" the caller passes False for all flags and calls `backward`.

    For "mean" the caller has to divide dweight and dbias by n = max(count, 1), and dx by the largest power of two up to
    n. This function has multiplied dx by that power / n before rounding it, and the caller's division is exact.
    """
    rows = as_matrix(x)
    N = rows.shape[0]
    floats = {"dtype": torch.float32, "device": x.device}
    dx, dweight, dbias = _gradients(x, weight, needs_x, needs_weight, needs_bias)
    counted = torch.empty((), **floats)
    none = reduction == "none"
    losses = torch.zeros(N, **floats) if none else torch.empty(N, **floats)
    loss = losses.view(target.shape) if none else torch.empty((), **floats)
    if N == 0 or weight.shape[0] == 0:
        for tensor in (loss, counted, dx, dweight, dbias):
            if tensor is not None:
                tensor.zero_()
    else:
        count = _run(
            rows, weight, target, bias, ignore_index, label_smoothing, None, losses, none,
            None if dx is None else dx.view(rows.shape), dweight, dbias, reduction == "mean",
        )  # fmt: skip
        if none:
            counted = count[0].float()
        else:
            _total_kernel[(1,)](
                loss_ptr=losses, count_ptr=count, total_ptr=loss, counted_ptr=counted, MEAN=reduction == "mean",
                BLOCK=COMPACT, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return (
        loss, counted,
        torch.empty(0, dtype=x.dtype, device=x.device) if dx is None else dx,
        torch.empty(0, **floats) if dweight is None else dweight,
        torch.empty(0, **floats) if dbias is None else dbias,
    )  # fmt: skip


def backward(
    dloss: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None,
    ignore_index: int, label_smoothing: float, needs_x: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (dx, dweight, dbias) for reduction "none", where `dloss` is the upstream gradient of each row's loss.

    x is [..., C], weight [V, C], bias [V] or None, and `dloss` has the shape of `target`. The logits are computed
    again. dx is in the dtype of x, dweight and dbias in that of the weight. A gradient that is not needed has shape
    [0]. Rows with the target `ignore_index` get and give no gradient.
    """
    rows = as_matrix(x)
    dx, dweight, dbias = _gradients(x, weight, needs_x, needs_weight, needs_bias)
    if rows.shape[0] == 0 or weight.shape[0] == 0:
        for tensor in (dx, dweight, dbias):
            if tensor is not None:
                tensor.zero_()
    else:
        dloss = dloss.to(torch.float32).reshape(-1).contiguous()
        flat = None if dx is None else dx.view(rows.shape)
        _run(rows, weight, target, bias, ignore_index, label_smoothing, dloss, None, False, flat, dweight, dbias, False)
    nothing = torch.empty(0, dtype=weight.dtype, device=x.device)
    return (
        torch.empty(0, dtype=x.dtype, device=x.device) if dx is None else dx,
        nothing if dweight is None else dweight.to(weight.dtype),
        nothing.clone() if dbias is None else dbias.to(weight.dtype),
    )
