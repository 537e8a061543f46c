"""add_layer_norm in Triton: dropout, residual addition and norm in one pass, forward and backward.

Notation: summed [M, N] = residual + x * factor, factor = scale where the row rule keeps, else 0; normed is the norm of
`summed` as it was rounded, so that backward needs nothing else. Backward: d = the norm's gradient + dsummed;
dresidual = d, dx = d * factor. Precision, determinism and partial sums are those of layer_norm, whose tiles these are.
"""

import torch
import triton
import triton.language as tl

from .layer_norm import add_partial_sums, as_rows, config, differentiate, normalise, packed
from .philox import keep_rows
from .sizes import cdiv, next_power_of_2


@triton.jit(do_not_specialize=["M", "site", "threshold"])
def _fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, bias_ptr, normed_ptr, summed_ptr, mean_ptr, rstd_ptr, seed_ptr,
    stride_x, stride_residual, M, N, eps, site, threshold, scale,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DROPOUT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write summed = residual + dropout(x), its layer norm normed, and mean and rstd, for BLOCK_M rows of x [M, N].

    summed and normed [M, N] are contiguous; mean and rstd are [M] float32. Rows of x and residual begin `stride_x` and
    `stride_residual` elements apart. With HAS_DROPOUT, an element of x is dropped if its 16 random bits are below
    `threshold`, and is otherwise multiplied by `scale`. The bits are a function of the seed, `site` (the number of this
    dropout within a forward pass) and the element's position. Program i takes the rows from i · BLOCK_M on.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]
    offs = offs_m[:, None] * N + offs_n[None, :]

    x = tl.load(x_ptr + offs_m[:, None] * stride_x + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offs_m[:, None] * stride_residual + offs_n[None, :], mask=mask, other=0.0)
    if HAS_DROPOUT:
        keep = keep_rows(offs_m[:, None], offs_n[None, :], site, threshold, seed_ptr)
        x = tl.where(keep, x * scale, 0.0)
    summed = (residual.to(tl.float32) + x).to(summed_ptr.dtype.element_ty)
    tl.store(summed_ptr + offs, summed, mask=mask)
    normed, mean, rstd = normalise(
        summed.to(tl.float32), mask, weight_ptr, bias_ptr, offs_n, mask_n, N, eps, HAS_WEIGHT, HAS_BIAS
    )
    tl.store(normed_ptr + offs, normed, mask=mask)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit(do_not_specialize=["M", "site", "threshold"])
def _bwd_kernel(
    dnormed_ptr, dsummed_ptr, summed_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dresidual_ptr,
    dweight_ptr, dbias_ptr, seed_ptr, stride_dnormed, stride_dsummed, M, N, site, threshold, scale,
    HAS_WEIGHT: tl.constexpr, HAS_DSUMMED: tl.constexpr, HAS_DROPOUT: tl.constexpr, HAS_DX: tl.constexpr,
    NEEDS_SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dresidual [M, N], and dx if HAS_DX, for every P-th tile of BLOCK_M rows, where P is the number of programs.

    Program p begins at tile p. dresidual is the norm's gradient plus dsummed, the upstream gradient of `summed`, if
    HAS_DSUMMED. dx is dresidual through dropout: with HAS_DROPOUT, an element that the forward pass dropped is 0, and
    others are multiplied by `scale`. `seed_ptr`, `site` and `threshold` give its mask again. If NEEDS_SUMS, the sums of
    program p for dweight and dbias go to row p of `dweight_ptr` and `dbias_ptr`, [P, N] float32 each.
    """
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    weight = tl.zeros([BLOCK_N], dtype=tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    dweight = tl.zeros([BLOCK_N], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_N], dtype=tl.float32)

    for first in range(program * BLOCK_M, M, programs * BLOCK_M):
        offs_m = (first + tl.arange(0, BLOCK_M)).to(tl.int64)  # the interpreter's `first` is a Python int
        mask_m = offs_m < M
        mask = mask_m[:, None] & mask_n[None, :]
        offs = offs_m[:, None] * N + offs_n[None, :]
        offs_dnormed = offs_m[:, None] * stride_dnormed + offs_n[None, :]
        dnormed = tl.load(dnormed_ptr + offs_dnormed, mask=mask, other=0.0).to(tl.float32)
        summed = tl.load(summed_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        d, dweight_tile = differentiate(dnormed, summed, mean, rstd, weight, N, HAS_WEIGHT)
        if HAS_DSUMMED:
            offs_dsummed = offs_m[:, None] * stride_dsummed + offs_n[None, :]
            d += tl.load(dsummed_ptr + offs_dsummed, mask=mask, other=0.0).to(tl.float32)
        tl.store(dresidual_ptr + offs, d, mask=mask)
        if HAS_DX:
            if HAS_DROPOUT:
                keep = keep_rows(offs_m[:, None], offs_n[None, :], site, threshold, seed_ptr)
                d = tl.where(keep, d * scale, 0.0)
            tl.store(dx_ptr + offs, d, mask=mask)
        if NEEDS_SUMS:
            dweight += tl.sum(dweight_tile, axis=0)
            dbias += tl.sum(dnormed, axis=0)

    if NEEDS_SUMS:
        tl.store(dweight_ptr + program * N + offs_n, dweight, mask=mask_n)
        tl.store(dbias_ptr + program * N + offs_n, dbias, mask=mask_n)


def forward(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    threshold: int,
    scale: float,
    seed: torch.Tensor | None,
    site: int,
    normed_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (normed, summed, mean, rstd): summed = residual + dropout(x), its norm, and the norm's float32 statistics.

    x and residual are [..., C], weight and bias [C] or None, mean and rstd = 1 / sqrt(variance + eps) [...]. `seed` is
    one int64 element on x's device. `summed` has the wider dtype of x and residual, and `normed` the same unless
    `normed_dtype` is given. If x has no elements, mean and rstd are NaN. A C above 65,536 raises `ValueError`.

    Dropout drops an element if its 16 random bits are below `threshold`, and multiplies others by `scale`. The bits are
    a function of `seed`, `site` (the number of this dropout within a forward pass) and the element's position. Without
    a seed there is no dropout.
    """
    N = x.shape[-1]
    dtype = torch.promote_types(x.dtype, residual.dtype)
    summed = torch.empty(x.shape, dtype=dtype, device=x.device)
    normed = torch.empty_like(summed, dtype=normed_dtype)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if normed.numel() == 0:
        return normed, summed, mean.fill_(float("nan")), rstd.fill_(float("nan"))
    rows, residual_rows = as_rows(x), as_rows(residual)
    M = rows.shape[0]
    launch = config(N, rows.device)
    _fwd_kernel[(cdiv(M, launch.fwd_rows),)](
        x_ptr=rows, residual_ptr=residual_rows, weight_ptr=packed(weight), bias_ptr=packed(bias),
        normed_ptr=normed, summed_ptr=summed, mean_ptr=mean, rstd_ptr=rstd, seed_ptr=seed,
        stride_x=rows.stride(0), stride_residual=residual_rows.stride(0), M=M, N=N, eps=eps,
        site=site, threshold=threshold, scale=scale,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None, HAS_DROPOUT=seed is not None,
        BLOCK_M=launch.fwd_rows, BLOCK_N=next_power_of_2(N), num_warps=launch.fwd_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return normed, summed, mean, rstd


def backward(
    dnormed: torch.Tensor,
    dsummed: torch.Tensor | None,
    summed: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype,
    threshold: int,
    scale: float,
    seed: torch.Tensor | None,
    site: int,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients (dx, dresidual, dweight, dbias).

    `dnormed` and `dsummed` are the upstream gradients of the outputs `normed` and `summed`; `dsummed` may be None for
    0. `summed`, mean and rstd are results of `forward`. dx and dresidual have the shape of `summed`, in `x_dtype` and
    `residual_dtype`. dx has shape [0] if it equals dresidual, that is without dropout and if x and residual have one
    dtype. dweight and dbias are [C] in the dtype of the weight, or of `summed` without one; each has shape [0] if not
    needed. `seed`, `site`, `threshold` and `scale` are the arguments that `forward` had, and give its dropout mask
    again. Without a seed there was no dropout.
    """
    N = summed.shape[-1]
    has_dx = seed is not None or x_dtype != residual_dtype
    dresidual = torch.empty(summed.shape, dtype=residual_dtype, device=summed.device)
    dx = torch.empty(summed.shape if has_dx else (0,), dtype=x_dtype, device=summed.device)
    sums_dtype = summed.dtype if weight is None else weight.dtype
    dweight = torch.empty(N if needs_weight else 0, dtype=sums_dtype, device=summed.device)
    dbias = torch.empty(N if needs_bias else 0, dtype=sums_dtype, device=summed.device)
    if summed.numel() == 0:
        return dx, dresidual, dweight.zero_(), dbias.zero_()
    rows = as_rows(dnormed)
    carried = None if dsummed is None else as_rows(dsummed)
    M = rows.shape[0]
    launch = config(N, rows.device)
    needs_sums = needs_weight or needs_bias
    P = min(launch.bwd_programs, cdiv(M, launch.bwd_rows))
    partial = torch.empty((2, P, N) if needs_sums else (2, 0, 0), dtype=torch.float32, device=summed.device)
    _bwd_kernel[(P,)](
        dnormed_ptr=rows, dsummed_ptr=carried, summed_ptr=summed, weight_ptr=packed(weight), mean_ptr=mean,
        rstd_ptr=rstd, dx_ptr=dx, dresidual_ptr=dresidual, dweight_ptr=partial[0], dbias_ptr=partial[1], seed_ptr=seed,
        stride_dnormed=rows.stride(0), stride_dsummed=0 if carried is None else carried.stride(0), M=M, N=N,
        site=site, threshold=threshold, scale=scale,
        HAS_WEIGHT=weight is not None, HAS_DSUMMED=carried is not None, HAS_DROPOUT=seed is not None, HAS_DX=has_dx,
        NEEDS_SUMS=needs_sums,
        BLOCK_M=launch.bwd_rows, BLOCK_N=next_power_of_2(N), num_warps=launch.bwd_warps, enable_fp_fusion=True,
    )  # fmt: skip
    if needs_sums:
        add_partial_sums(partial, dweight, dbias, needs_weight, needs_bias)
    return dx, dresidual, dweight, dbias
