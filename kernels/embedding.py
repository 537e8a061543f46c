"""embedding in Triton: token row + position row, dropped out, in one pass; deterministic backward by sorted segments.

Notation: out [M, C] = (token_weight[tokens] + position_weight[positions]) * factor, factor = scale where the row rule
keeps, else 0. Backward: row k of a table's gradient is the sum, in their order, of the rows of dout * factor that used
it. The uses are sorted by k; a program adds a chunk of them, stores what begins and ends inside it, and leaves the two
ends that reach into other chunks as partial sums, which a second kernel adds in their order. Sums in float32, one
rounding. Indices out of range are clamped, so that nothing out of bounds is touched.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch_configs
from .philox import keep_rows
from .sizes import cdiv


class Config(NamedTuple):
    """Tile of the forward kernel, uses that one program of the backward adds up, warps."""

    rows: int
    columns: int
    chunk: int
    warps: int


@triton.jit(do_not_specialize=["M", "site", "threshold"])
def _fwd_kernel(
    tokens_ptr, positions_ptr, token_weight_ptr, position_weight_ptr, out_ptr, seed_ptr,
    stride_tv, stride_tc, stride_pp, stride_pc, M, T, V, P, C, site, threshold, scale,
    HAS_DROPOUT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write a tile [BLOCK_M, BLOCK_C] of out [M, C]: token row plus position row, after dropout.

    Row i is token_weight[tokens[i]] + position_weight[positions[i % T]]; ids are clamped to the tables [V, C] and [P,
    C]. With HAS_DROPOUT, an element is dropped if its 16 random bits are below `threshold`, and is otherwise multiplied
    by `scale`. The bits are a function of the seed, `site` (the number of this dropout within a forward pass) and the
    element's position in out. The grid is (blocks of rows, blocks of columns).
    """
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    # Columns are 32-bit numbers, which hold every width. With 64 bits the dropout rule takes more registers.
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_m = offs_m < M
    mask = mask_m[:, None] & (offs_c < C)[None, :]
    token = tl.load(tokens_ptr + offs_m, mask=mask_m, other=0).to(tl.int64)
    position = tl.load(positions_ptr + offs_m % T, mask=mask_m, other=0).to(tl.int64)
    token = tl.minimum(tl.maximum(token, 0), V - 1)
    position = tl.minimum(tl.maximum(position, 0), P - 1)
    token_ptrs = token_weight_ptr + token[:, None] * stride_tv + offs_c[None, :] * stride_tc
    position_ptrs = position_weight_ptr + position[:, None] * stride_pp + offs_c[None, :] * stride_pc
    out = tl.load(token_ptrs, mask=mask, other=0.0).to(tl.float32)
    out += tl.load(position_ptrs, mask=mask, other=0.0).to(tl.float32)
    if HAS_DROPOUT:
        keep = keep_rows(offs_m[:, None], offs_c[None, :], site, threshold, seed_ptr)
        out = tl.where(keep, out * scale, 0.0)
    tl.store(out_ptr + offs_m[:, None] * C + offs_c[None, :], out, mask=mask)


@triton.jit(do_not_specialize=["M", "site", "threshold"])
def _bwd_kernel(
    dout_ptr, ids_ptr, order_ptr, grad_ptr, partial_ptr, seed_ptr, stride_dm, stride_dc, stride_gk, stride_gc,
    M, C, site, threshold, scale, HAS_DROPOUT: tl.constexpr, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Add up the rows of dout for one chunk of CHUNK lookups in a table, and one block of columns.

    The M lookups are sorted by the row of the table that they read. `ids_ptr` [M] has that row for each lookup, and
    `order_ptr` [M] the row of dout. Lookups of one table row are neighbours, and their sum in the chunk is stored once.
    It goes to grad if the chunk has all of them. It goes to partial [chunk, 0] if the first of them lie in the chunk
    before. Otherwise more of them follow in the next chunk, and it goes to partial [chunk, 1].

    A table row with lookups in three chunks or more has the middle sums in partial [chunk, 0] of their chunks.
    `_bwd_reduce_kernel` adds up `partial_ptr`, float32 [chunks, 2, C], and finds by `ids_ptr` which of its entries were
    written. Rows of `grad_ptr` [rows of the table, C] without a lookup keep what they hold. With HAS_DROPOUT a row of
    dout is multiplied by the mask of the forward pass first: `seed_ptr` and `site`, the number of this dropout, give
    random bits, those below `threshold` drop an element, and `scale` is 1 / (1 - p). The grid is (chunks, blocks of
    columns).
    """
    chunk = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = chunk * CHUNK
    id_before = tl.load(ids_ptr + base - 1, mask=base > 0, other=-1)
    partial_ptr += chunk * 2 * C
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    first_run = base >= 0  # True, as a value that the loop can carry
    for r in range(CHUNK):
        use = base + r
        here = use < M
        id_now = tl.load(ids_ptr + use, mask=here, other=-2)
        id_next = tl.load(ids_ptr + use + 1, mask=use + 1 < M, other=-3)
        row = tl.load(order_ptr + use, mask=here, other=0)
        value = tl.load(
            dout_ptr + row * stride_dm + offs_c * stride_dc, mask=offs_c < tl.where(here, C, 0), other=0.0
        ).to(tl.float32)
        if HAS_DROPOUT:
            keep = keep_rows(tl.zeros_like(offs_c) + row.to(tl.int32), offs_c, site, threshold, seed_ptr)
            value = tl.where(keep, value * scale, 0.0)
        total += value
        ends = here & ((id_now != id_next) | (r == CHUNK - 1))
        from_before = first_run & (id_now == id_before)
        goes_on = id_now == id_next
        tl.store(partial_ptr + offs_c, total, mask=offs_c < tl.where(ends & from_before, C, 0))
        begins = ends & (from_before == 0) & goes_on
        tl.store(partial_ptr + C + offs_c, total, mask=offs_c < tl.where(begins, C, 0))
        whole = ends & (from_before == 0) & (goes_on == 0)
        tl.store(grad_ptr + id_now * stride_gk + offs_c * stride_gc, total, mask=offs_c < tl.where(whole, C, 0))
        total = tl.where(ends, 0.0, total)
        first_run = first_run & (ends == 0)


@triton.jit
def _bwd_reduce_kernel(
    ids_ptr, reach_ptr, grad_ptr, partial_ptr, stride_gk, stride_gc, M, C, CHUNK: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Add the partial sums of a table row whose lookups lie in several chunks, and write its gradient to grad.

    The lookups, sorted by the table's row in `ids_ptr` [M], are divided into chunks of CHUNK. A program of the grid
    (chunks, blocks of columns) takes the row of its chunk's last lookup. `reach_ptr` [chunks] has the number of the
    last chunk with a lookup of that row. The program writes only if the row's lookups begin in this chunk and end in a
    later one. `partial_ptr` [chunks, 2, C] has two sums of each chunk. The first is for a row whose lookups began in a
    chunk before, the second for one whose lookups begin here and continue.
    """
    chunk = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    base = chunk * CHUNK
    last = tl.minimum(base + CHUNK, M) - 1
    id_last = tl.load(ids_ptr + last)
    began_before = (tl.load(ids_ptr + base) == id_last) & (
        tl.load(ids_ptr + base - 1, mask=base > 0, other=-1) == id_last
    )
    reach = tl.load(reach_ptr + chunk)
    owns = (reach > chunk) & (began_before == 0)
    mask_c = offs_c < tl.where(owns, C, 0)
    total = tl.load(partial_ptr + (chunk * 2 + 1) * C + offs_c, mask=mask_c, other=0.0)
    for other in range(chunk + 1, tl.where(owns, reach, chunk) + 1):
        total += tl.load(partial_ptr + other * 2 * C + offs_c, mask=mask_c, other=0.0)
    tl.store(grad_ptr + id_last * stride_gk + offs_c * stride_gc, total, mask=mask_c)


def config(table: torch.Tensor) -> Config:
    """Return the launch configuration for a table [V, C], by its device, element size and C."""
    architecture = launch_configs.architecture(table.device)
    return Config(*launch_configs.pick("embedding", "rows", architecture, table.element_size(), table.shape[1]))


def forward(
    tokens: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    positions: torch.Tensor,
    threshold: int,
    scale: float,
    seed: torch.Tensor | None,
    site: int,
) -> torch.Tensor:
    """Return out [..., C], the sum of token and position embeddings after dropout, in the dtype of `token_weight`.

    `token_weight` [V, C] and `position_weight` [P, C] are the tables. `positions` has the shape of `tokens`, or [T] for
    all rows. Ids outside of a table are clamped to its ends. Dropout drops an element if its 16 random bits are below
    `threshold`, and multiplies others by `scale`. The bits are a function of `seed`, `site` and the element's position
    in out. `site` is the number of this dropout within a forward pass: with the same seed, another site gives another
    mask. Without a seed there is no dropout.
    """
    C = token_weight.shape[1]
    out = torch.empty((*tokens.shape, C), dtype=token_weight.dtype, device=tokens.device)
    if out.numel() == 0:
        return out
    M, launch = tokens.numel(), config(token_weight)
    _fwd_kernel[(cdiv(M, launch.rows), cdiv(C, launch.columns))](
        tokens_ptr=tokens.contiguous(), positions_ptr=positions.contiguous(), token_weight_ptr=token_weight,
        position_weight_ptr=position_weight, out_ptr=out, seed_ptr=seed,
        stride_tv=token_weight.stride(0), stride_tc=token_weight.stride(1),
        stride_pp=position_weight.stride(0), stride_pc=position_weight.stride(1),
        M=M, T=positions.numel(), V=token_weight.shape[0], P=position_weight.shape[0], C=C,
        site=site, threshold=threshold, scale=scale,
        HAS_DROPOUT=seed is not None, BLOCK_M=launch.rows, BLOCK_C=launch.columns,
        num_warps=launch.warps, enable_fp_fusion=True,
    )  # fmt: skip
    return out


def backward(
    dout: torch.Tensor,
    tokens: torch.Tensor,
    token_weight: torch.Tensor,
    position_weight: torch.Tensor,
    positions: torch.Tensor,
    threshold: int,
    scale: float,
    seed: torch.Tensor | None,
    site: int,
    needs_token: bool,
    needs_position: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (dtoken, dposition): the gradients of both tables, with the strides of the tables, or [0] if not needed.

    `dout` [..., C] is the upstream gradient, and the arguments from `tokens` to `site` are those of the forward pass.
    Rows that were not looked up get 0. `seed`, `site` (the number of this dropout within a forward pass), `threshold`
    and `scale` give the dropout mask of the forward pass again. Without a seed there was no dropout.
    """
    rows = dout.reshape(tokens.numel(), dout.shape[-1])

    def gradient(table: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
        """Return the gradient of `table`, for a forward pass that looked up its rows `indices`.

        `indices` has the shape of the tokens, or broadcasts to it. The upstream gradient and the dropout's arguments
        are those of the enclosing `backward`.
        """
        grad = torch.zeros_like(table)
        M, C = rows.shape
        if rows.numel() == 0:
            return grad
        ids, order = indices.expand(tokens.shape).reshape(-1).long().clamp(0, table.shape[0] - 1).sort(stable=True)
        launch = config(table)
        chunks = cdiv(M, launch.chunk)
        grid = chunks, cdiv(C, launch.columns)
        partial = torch.empty((chunks, 2, C), dtype=torch.float32, device=dout.device)
        _bwd_kernel[grid](
            dout_ptr=rows, ids_ptr=ids, order_ptr=order, grad_ptr=grad, partial_ptr=partial, seed_ptr=seed,
            stride_dm=rows.stride(0), stride_dc=rows.stride(1), stride_gk=grad.stride(0), stride_gc=grad.stride(1),
            M=M, C=C, site=site, threshold=threshold, scale=scale,
            HAS_DROPOUT=seed is not None, CHUNK=launch.chunk, BLOCK_C=launch.columns,
            num_warps=launch.warps, enable_fp_fusion=True,
        )  # fmt: skip
        ends = torch.arange(launch.chunk - 1, chunks * launch.chunk, launch.chunk, device=ids.device).clamp(max=M - 1)
        reach = (torch.searchsorted(ids, ids[ends], right=True) - 1) // launch.chunk
        _bwd_reduce_kernel[grid](
            ids_ptr=ids, reach_ptr=reach, grad_ptr=grad, partial_ptr=partial,
            stride_gk=grad.stride(0), stride_gc=grad.stride(1), M=M, C=C,
            CHUNK=launch.chunk, BLOCK_C=launch.columns, num_warps=launch.warps, enable_fp_fusion=True,
        )  # fmt: skip
        return grad

    nothing = (0,)
    return (
        gradient(token_weight, tokens) if needs_token else token_weight.new_empty(nothing),
        gradient(position_weight, positions) if needs_position else position_weight.new_empty(nothing),
    )
