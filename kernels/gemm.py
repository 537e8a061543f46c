"""Matrix products in Triton: what mlp, linear_cross_entropy and attention share.

Every product is A Bᵀ with A [M, K] and B [N, K] of any strides. An operand in 16 bits with one contiguous axis and
aligned rows is read by a tensor descriptor made on the host (mode 1, or 2 where the descriptor is the transpose's), any
other by pointers (mode 0). Operands are of the inputs' dtype, sums float32. One program owns a tile of the result and
adds along K in order, so nothing depends on the device.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import launch_configs
from .descriptors import describable, descriptor
from .sizes import cdiv, next_power_of_2


class Config(NamedTuple):
    """Tile of a product, warps, pipeline stages, and persistent programs on a multiprocessor."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    programs: int


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """Return acc + a b in float32, for tiles a [M, K], b [K, N] and acc [M, N]. `acc` may be None, which stands for 0.

    PRECISION is that of float32 products (see `precision`). Triton's interpreter takes bfloat16 for integers in a
    product, so there (PRECISION "interpreter") operands are widened to float32, which is exact.
    """
    if PRECISION == "interpreter":
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr, PRECISION: tl.constexpr):
    """Return the float32 x in `dtype`, rounded to nearest, ties to even.

    Triton's interpreter (as of 3.9) truncates to bfloat16. With PRECISION "interpreter" this function therefore rounds
    the value before the cast.
    """
    if PRECISION == "interpreter" and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x != x, x, bits.to(tl.float32, bitcast=True))
    return x.to(dtype)


@triton.jit
def load(
    source, row, column, rows, columns, stride_row, stride_column,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Load a tile [BLOCK_R, BLOCK_C] of a matrix [rows, columns]. The tile begins at (row, column) of the matrix.

    `row` and `column` are scalars. Elements past the matrix's ends are 0. `source` is a pointer for MODE 0, a tensor
    descriptor for 1, and a descriptor of the transposed matrix for 2: see `operand`. Only MODE 0 reads the strides.
    """
    if MODE == 1:
        result = source.load([row, column])
    elif MODE == 2:
        result = tl.trans(source.load([column, row]))
    else:
        tl.static_assert(MODE == 0)
        offs_r = row + tl.arange(0, BLOCK_R)
        offs_c = column + tl.arange(0, BLOCK_C)
        ptrs = source + offs_r.to(tl.int64)[:, None] * stride_row + offs_c.to(tl.int64)[None, :] * stride_column
        result = tl.load(ptrs, mask=(offs_r < rows)[:, None] & (offs_c < columns)[None, :], other=0.0)
    return result


@triton.jit
def store(
    target, value, row, column, rows, columns, stride_row, stride_column, MODE: tl.constexpr, PRECISION: tl.constexpr
):
    """Round the float32 tile `value` and write it into a matrix [rows, columns], where it begins at (row, column).

    `row` and `column` are scalars. Elements past the matrix's ends are not written. `target` is a pointer for MODE 0, a
    tensor descriptor for 1, and a descriptor of the transposed matrix for 2: see `operand`. Only MODE 0 reads the
    strides.
    """
    if MODE == 1:
        target.store([row, column], cast(value, target.dtype, PRECISION))
    elif MODE == 2:
        target.store([column, row], tl.trans(cast(value, target.dtype, PRECISION)))
    else:
        tl.static_assert(MODE == 0)
        offs_r = row + tl.arange(0, value.shape[0])
        offs_c = column + tl.arange(0, value.shape[1])
        ptrs = target + offs_r.to(tl.int64)[:, None] * stride_row + offs_c.to(tl.int64)[None, :] * stride_column
        mask = (offs_r < rows)[:, None] & (offs_c < columns)[None, :]
        tl.store(ptrs, cast(value, target.dtype.element_ty, PRECISION), mask=mask)


@triton.jit
def tile(index, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return (row, column), two scalars: the first element of tile number `index` of a matrix [M, N].

    A tile is [BLOCK_M, BLOCK_N]. Tiles are numbered in groups of eight rows of tiles, column by column within a group,
    so that neighbours share operands in the cache.
    """
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    group = index // (8 * tiles_n) * 8
    height = tl.minimum(tiles_m - group, 8)
    inside = index % (8 * tiles_n)
    return (group + inside % height) * BLOCK_M, inside // height * BLOCK_N


@triton.jit
def product(
    a, b, m, n, M, N, K, stride_am, stride_ak, stride_bn, stride_bk,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    A_MODE: tl.constexpr, B_MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return a tile [BLOCK_M, BLOCK_N] of A Bᵀ in float32, for A [M, K] and B [N, K].

    The tile's first element is in row `m` and column `n` of the result, two scalars. `a` and `b` are A and B: a pointer
    for A_MODE or B_MODE 0, a tensor descriptor of blocks [BLOCK_M or BLOCK_N, BLOCK_K] for 1, and one of blocks
    [BLOCK_K, BLOCK_M or BLOCK_N] of the transposed matrix for 2. Only mode 0 reads the strides. PRECISION is the
    `input_precision` of `tl.dot` for float32 operands, or "interpreter" in Triton's interpreter. Rows and columns of
    the result past its ends are 0.
    """
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        a_tile = load(a, m, k, M, K, stride_am, stride_ak, BLOCK_M, BLOCK_K, A_MODE)
        b_tile = load(b, n, k, N, K, stride_bn, stride_bk, BLOCK_N, BLOCK_K, B_MODE)
        acc = dot(a_tile, tl.trans(b_tile), acc, PRECISION)
    return acc


@triton.jit
def halves(acc):
    """Return (left, right): the halves [M, N/2] of a tile [M, N].

    An epilogue on one half at a time needs fewer registers.
    """
    M: tl.constexpr = acc.shape[0]
    N: tl.constexpr = acc.shape[1]
    return tl.split(tl.permute(tl.reshape(acc, [M, 2, N // 2]), (0, 2, 1)))


@triton.jit
def sum_rows_kernel(
    x_ptr, out_ptr, stride_xm, stride_xn, M, N, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Write into row p of out the sum of rows p · ROWS to (p + 1) · ROWS - 1 of x [M, N], as far as these exist.

    Sums are float32, rounded once to the dtype of out [M / ROWS rounded up, N]. The grid is (rows of out, blocks of
    BLOCK_N columns). A program adds BLOCK_M rows at a time.
    """
    program = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    first = program * ROWS
    for m in range(first, tl.minimum(first + ROWS, M), BLOCK_M):
        offs_m = (m + tl.arange(0, BLOCK_M)).to(tl.int64)  # the interpreter counts m in 32 bits
        mask = (offs_m < M)[:, None] & mask_n[None, :]
        ptrs = x_ptr + offs_m[:, None] * stride_xm + offs_n[None, :] * stride_xn
        acc += tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    total = cast(tl.sum(acc, axis=0), out_ptr.dtype.element_ty, PRECISION)
    tl.store(out_ptr + program * N + offs_n, total, mask=mask_n)


def sum_rows(x: torch.Tensor, out: torch.Tensor) -> None:
    """Write the sum of the rows of x [M, N], added in float32 and rounded once to the dtype of out, into out [N].

    More than 4,096 rows are added in two steps. M is 1 or more.
    """
    M, N = x.shape
    if M > 4096:
        partial = torch.empty((cdiv(M, 512), N), dtype=torch.float32, device=x.device)
        _sum_rows(x, partial, 512)
        x = partial
    _sum_rows(x, out, max(16, next_power_of_2(x.shape[0])))


def _sum_rows(x: torch.Tensor, out: torch.Tensor, rows: int) -> None:
    """Write into row p of out the sum of rows p · `rows` to (p + 1) · `rows` - 1 of x [M, N], as far as these exist.

    out is [M / rows rounded up, N]. Sums are float32, rounded once to the dtype of out.
    """
    M, N = x.shape
    sum_rows_kernel[(cdiv(M, rows), cdiv(N, 64))](
        x_ptr=x, out_ptr=out, stride_xm=x.stride(0), stride_xn=x.stride(1), M=M, N=N,
        ROWS=rows, BLOCK_M=min(rows, 64), BLOCK_N=64, PRECISION=precision(), num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip


def precision() -> str:
    """Return the PRECISION of float32 products for `dot`: "tf32", "ieee", or "interpreter" in Triton's interpreter.

    `torch.backends.cuda.matmul.allow_tf32` decides between the first two. Products in 16 bits do not depend on it.
    """
    if triton.knobs.runtime.interpret:
        return "interpreter"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"


def as_matrix(x: torch.Tensor) -> torch.Tensor:
    """Return x [..., N] as a matrix [M, N] with any strides: a view if the strides allow one, else a copy."""
    N = x.shape[-1]
    return x.reshape(x.numel() // N if N else x.shape[:-1].numel(), N)


def operand(matrix: torch.Tensor, rows: int, columns: int, architecture: int) -> tuple[Any, int]:
    """Return (source, mode) of a matrix for `load` and `store` of tiles [rows, columns].

    The source is a tensor descriptor of the matrix (mode 1) if it is describable, else one of its transpose (2) if that
    is. Otherwise it is the matrix itself (0), which is read by pointers. Describable means 16-bit elements, aligned
    rows and a contiguous last axis, on an architecture with descriptors. `architecture` is a compute capability times
    ten, or INTERPRETER.
    """
    if describable(matrix, architecture):
        return descriptor(matrix, [rows, columns]), 1
    if describable(matrix.t(), architecture):
        return descriptor(matrix.t(), [columns, rows]), 2
    return matrix, 0


def config(op: str, kernel: str, x: torch.Tensor, size: int) -> tuple[Config, int]:
    """Return (launch configuration, architecture) for the kernel called `kernel` of `op`, for an input x on its device.

    `size` is the number of columns of x, by which the configuration is looked up (see `launch_configs.pick`). The
    architecture is a compute capability times ten, or INTERPRETER.
    """
    architecture = launch_configs.architecture(x.device)
    return Config(*launch_configs.pick(op, kernel, architecture, x.element_size(), size)), architecture


def operands(
    launch: Config, architecture: int, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, parts: int = 2
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return (arguments, switches): run-time and compile-time arguments for a kernel that computes out = A Bᵀ.

    `a` is A [M, K] and `b` is B [N, K]. The arguments are a, b and out as `load` and `store` take them, M, N, K and the
    strides; the switches are their modes, PRECISION, the tile of `launch` and the compiler's options. The kernel stores
    a tile in `parts` parts side by side, for which the descriptor of `out` is made. With `parts` 0 it stores by
    pointers.
    """
    a_source, a_mode = operand(a, launch.m, launch.k, architecture)
    b_source, b_mode = operand(b, launch.n, launch.k, architecture)
    out_target, out_mode = operand(out, launch.m, launch.n // parts, architecture) if parts else (out, 0)
    (M, K), (N, _) = a.shape, b.shape
    arguments = {
        "a": a_source, "b": b_source, "out": out_target, "M": M, "N": N, "K": K,
        "stride_am": a.stride(0), "stride_ak": a.stride(1), "stride_bn": b.stride(0), "stride_bk": b.stride(1),
        "stride_om": out.stride(0), "stride_on": out.stride(1),
    }  # fmt: skip
    switches = {
        "A_MODE": a_mode, "B_MODE": b_mode, "OUT_MODE": out_mode, "PRECISION": precision(),
        "BLOCK_M": launch.m, "BLOCK_N": launch.n, "BLOCK_K": launch.k,
        "num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True,
    }  # fmt: skip
    if launch.programs > 1 and a_mode and b_mode and out_mode:  # with pointers the product would spill
        switches["maxnreg"] = 65536 // (32 * launch.warps * launch.programs)
    return arguments, switches


def grid(launch: Config, M: int, N: int, device: torch.device) -> tuple[int]:
    """Return the grid of persistent programs for a product [M, N]: as many as run at once, at most one a tile."""
    tiles = cdiv(M, launch.m) * cdiv(N, launch.n)
    return (min(tiles, launch.programs * launch_configs.multiprocessors(device)),)
