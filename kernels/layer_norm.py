"""layer_norm in Triton: one read and one write of each tensor, forward and backward.

Notation: x, y [M, N]; xhat = (x - mean) * rstd; y = xhat * weight + bias. Backward, with g = dy * weight:
dx = (g - mean(g) - xhat * mean(g * xhat)) * rstd; dweight = sum over rows of dy * xhat; dbias = sum over rows of dy.
Precision: a row is held in registers, its mean first, then the variance of the centred row, all in float32. The mean of
what is left corrects the mean, so that a constant row gives exactly the bias.
Determinism: a program sums every P-th tile of rows in registers and stores one partial sum; a second kernel adds the
P partial sums in their order. P comes from the table, by width, so it is the same on all devices of an architecture.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch_configs
from .sizes import cdiv, next_power_of_2


class Config(NamedTuple):
    """Launch configuration for rows of some width."""

    fwd_rows: int  # rows of a tile, forward
    fwd_warps: int
    bwd_rows: int
    bwd_warps: int
    bwd_programs: int  # each leaves one partial sum of the weight gradients


WIDEST = 65536
REDUCE_ROWS, REDUCE_COLUMNS = 64, 32  # tile of _bwd_reduce_kernel


@triton.jit
def normalise(
    x, mask, weight_ptr, bias_ptr, offs_n, mask_n, N, eps, HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr
):  # fmt: skip
    """Return (y, mean, rstd) of a float32 tile x [M, N padded]: the layer norm of its rows of N columns and statistics.

    mean and rstd = 1 / sqrt(variance + eps) are [M]. x holds zeros where `mask` is False. Weight and bias [N] are
    loaded at the columns `offs_n` where `mask_n` is True.
    """
    rough = tl.sum(x, axis=1) / N
    rest = tl.where(mask, x - rough[:, None], 0.0)
    shift = tl.sum(rest, axis=1) / N
    mean = rough + shift  # exactly the constant if the row is constant
    variance = tl.maximum(tl.sum(rest * rest, axis=1) / N - shift * shift, 0.0, propagate_nan=tl.PropagateNan.ALL)
    rstd = 1.0 / tl.sqrt_rn(variance + eps)
    y = (x - mean[:, None]) * rstd[:, None]
    if HAS_WEIGHT:
        y *= tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    return y, mean, rstd


@triton.jit
def differentiate(dy, x, mean, rstd, weight, N, HAS_WEIGHT: tl.constexpr):
    """Return (dx, dy * xhat), each a float32 tile like x: the gradient of x, and what sums up to dweight over the rows.

    dy and x are tiles [M, N padded] of whole rows of N columns, mean and rstd are [M], and weight [N padded] is read if
    HAS_WEIGHT. xhat is the normalised x. dy holds zeros in the padding.
    """
    xhat = (x - mean[:, None]) * rstd[:, None]  # finite in the padding, where dy is zero
    g = dy
    if HAS_WEIGHT:
        g = dy * weight[None, :]
    mean_g = tl.sum(g, axis=1) / N
    mean_gx = tl.sum(g * xhat, axis=1) / N
    dx = (g - mean_g[:, None] - xhat * mean_gx[:, None]) * rstd[:, None]
    return dx, dy * xhat


@triton.jit(do_not_specialize=["M"])
def _fwd_kernel(
    x_ptr, weight_ptr, bias_ptr, y_ptr, mean_ptr, rstd_ptr, stride_x, M, N, eps,
    HAS_WEIGHT: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write y, the layer norm, and mean and rstd for BLOCK_M rows of x [M, N], which begin `stride_x` elements apart.

    y [M, N] is contiguous; mean and rstd = 1 / sqrt(variance + eps) are [M] float32. Weight and bias [N] are read if
    HAS_WEIGHT and HAS_BIAS. Program i takes the rows from i · BLOCK_M on.
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    mask = mask_m[:, None] & mask_n[None, :]

    x = tl.load(x_ptr + offs_m[:, None] * stride_x + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    y, mean, rstd = normalise(x, mask, weight_ptr, bias_ptr, offs_n, mask_n, N, eps, HAS_WEIGHT, HAS_BIAS)
    tl.store(y_ptr + offs_m[:, None] * N + offs_n[None, :], y, mask=mask)
    tl.store(mean_ptr + offs_m, mean, mask=mask_m)
    tl.store(rstd_ptr + offs_m, rstd, mask=mask_m)


@triton.jit(do_not_specialize=["M"])
def _bwd_kernel(
    dy_ptr, x_ptr, weight_ptr, mean_ptr, rstd_ptr, dx_ptr, dweight_ptr, dbias_ptr, stride_dy, stride_x, M, N,
    HAS_WEIGHT: tl.constexpr, NEEDS_SUMS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write dx [M, N], the gradient of x, for every P-th tile of BLOCK_M rows, where P is the number of programs.

    Program p begins at tile p. dy is the upstream gradient, and mean and rstd [M] are from the forward pass. dx is
    contiguous; rows of dy and x begin `stride_dy` and `stride_x` elements apart. If NEEDS_SUMS, the sums of program p
    for dweight and dbias go to row p of `dweight_ptr` and `dbias_ptr`, [P, N] float32 each.
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
        dy = tl.load(dy_ptr + offs_m[:, None] * stride_dy + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs_m[:, None] * stride_x + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + offs_m, mask=mask_m, other=0.0)
        rstd = tl.load(rstd_ptr + offs_m, mask=mask_m, other=0.0)
        dx, dweight_tile = differentiate(dy, x, mean, rstd, weight, N, HAS_WEIGHT)
        tl.store(dx_ptr + offs_m[:, None] * N + offs_n[None, :], dx, mask=mask)
        if NEEDS_SUMS:
            dweight += tl.sum(dweight_tile, axis=0)
            dbias += tl.sum(dy, axis=0)

    if NEEDS_SUMS:
        tl.store(dweight_ptr + program * N + offs_n, dweight, mask=mask_n)
        tl.store(dbias_ptr + program * N + offs_n, dbias, mask=mask_n)


@triton.jit
def _bwd_reduce_kernel(
    partial_dweight_ptr, partial_dbias_ptr, dweight_ptr, dbias_ptr, P, N,
    NEEDS_WEIGHT: tl.constexpr, NEEDS_BIAS: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Write BLOCK_N columns of dweight and dbias [N]: the sums of the P rows [P, N] that `_bwd_kernel` wrote.

    Program i takes the columns from i · BLOCK_N on. A gradient whose NEEDS_WEIGHT or NEEDS_BIAS is False is not
    written.
    """
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    dweight = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    dbias = tl.zeros([BLOCK_P, BLOCK_N], dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & mask_n[None, :]
        offs = offs_p[:, None] * N + offs_n[None, :]
        if NEEDS_WEIGHT:
            dweight += tl.load(partial_dweight_ptr + offs, mask=mask, other=0.0)
        if NEEDS_BIAS:
            dbias += tl.load(partial_dbias_ptr + offs, mask=mask, other=0.0)
    if NEEDS_WEIGHT:
        tl.store(dweight_ptr + offs_n, tl.sum(dweight, axis=0), mask=mask_n)
    if NEEDS_BIAS:
        tl.store(dbias_ptr + offs_n, tl.sum(dbias, axis=0), mask=mask_n)


def config(N: int, device: torch.device) -> Config:
    """Return the launch configuration for rows of N columns. Raise `ValueError` if N exceeds WIDEST, 65,536."""
    if N > WIDEST:
        raise ValueError(f"gpt_fast.layer_norm: rows have {N} columns; expected at most {WIDEST} on this device")
    return Config(*launch_configs.pick("layer_norm", "rows", launch_configs.architecture(device), 4, N))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """Return x [..., N] as rows [M, N] with contiguous columns: a view if the strides allow one, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(-1) == 1 or rows.shape[-1] == 1 else rows.contiguous()


def packed(parameter: torch.Tensor | None) -> torch.Tensor | None:
    """Return a parameter [N] as a contiguous tensor, as the kernels read weight and bias, or None for None."""
    return None if parameter is None else parameter.contiguous()


def forward(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    y_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (y, mean, rstd): the layer norm y, contiguous, in the shape of x [..., N], and the statistics of each row.

    `weight` and `bias` are [N], or None to leave them out. y is in `y_dtype` if given, else in the dtype of x. mean and
    rstd = 1 / sqrt(variance + eps) are float32 in the shape of x without its last axis; they are NaN if x has no
    elements. An N above 65,536 raises `ValueError`.
    """
    N = x.shape[-1]
    y = torch.empty(x.shape, dtype=y_dtype or x.dtype, device=x.device)
    mean = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    if y.numel() == 0:
        return y, mean.fill_(float("nan")), rstd.fill_(float("nan"))
    rows = as_rows(x)
    M = rows.shape[0]
    launch = config(N, rows.device)
    _fwd_kernel[(cdiv(M, launch.fwd_rows),)](
        x_ptr=rows, weight_ptr=packed(weight), bias_ptr=packed(bias), y_ptr=y, mean_ptr=mean, rstd_ptr=rstd,
        stride_x=rows.stride(0), M=M, N=N, eps=eps,
        HAS_WEIGHT=weight is not None, HAS_BIAS=bias is not None,
        BLOCK_M=launch.fwd_rows, BLOCK_N=next_power_of_2(N), num_warps=launch.fwd_warps, enable_fp_fusion=True,
    )  # fmt: skip
    return y, mean, rstd


def backward(
    dy: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    needs_weight: bool,
    needs_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dx, dweight, dbias): dx like x, and the gradients [N] of weight and bias in the weight's dtype.

    dx is contiguous. `dy` is the upstream gradient; mean and rstd are the statistics that `forward` returned. Without a
    weight, the gradients of weight and bias are in the dtype of x. One that is not needed has shape [0].
    """
    N = x.shape[-1]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sums_dtype = x.dtype if weight is None else weight.dtype
    dweight = torch.empty(N if needs_weight else 0, dtype=sums_dtype, device=x.device)
    dbias = torch.empty(N if needs_bias else 0, dtype=sums_dtype, device=x.device)
    if dx.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    rows, dy_rows = as_rows(x), as_rows(dy)
    M = rows.shape[0]
    launch = config(N, rows.device)
    needs_sums = needs_weight or needs_bias
    P = min(launch.bwd_programs, cdiv(M, launch.bwd_rows))
    partial = torch.empty((2, P, N) if needs_sums else (2, 0, 0), dtype=torch.float32, device=x.device)
    _bwd_kernel[(P,)](
        dy_ptr=dy_rows, x_ptr=rows, weight_ptr=packed(weight), mean_ptr=mean, rstd_ptr=rstd,
        dx_ptr=dx, dweight_ptr=partial[0], dbias_ptr=partial[1],
        stride_dy=dy_rows.stride(0), stride_x=rows.stride(0), M=M, N=N,
        HAS_WEIGHT=weight is not None, NEEDS_SUMS=needs_sums,
        BLOCK_M=launch.bwd_rows, BLOCK_N=next_power_of_2(N), num_warps=launch.bwd_warps, enable_fp_fusion=True,
    )  # fmt: skip
    if needs_sums:
        add_partial_sums(partial, dweight, dbias, needs_weight, needs_bias)
    return dx, dweight, dbias


def add_partial_sums(
    partial: torch.Tensor, dweight: torch.Tensor, dbias: torch.Tensor, needs_weight: bool, needs_bias: bool
) -> None:
    """Add the P partial sums in `partial` [2, P, N], first of weight, then of bias, and write dweight and dbias [N].

    The partial sums are float32. Only the gradients that are needed are written, in their own dtypes.
    """
    _, P, N = partial.shape
    _bwd_reduce_kernel[(cdiv(N, REDUCE_COLUMNS),)](
        partial_dweight_ptr=partial[0], partial_dbias_ptr=partial[1], dweight_ptr=dweight, dbias_ptr=dbias, P=P, N=N,
        NEEDS_WEIGHT=needs_weight, NEEDS_BIAS=needs_bias, BLOCK_P=REDUCE_ROWS, BLOCK_N=REDUCE_COLUMNS,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
