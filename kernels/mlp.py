"""mlp in Triton: products of persistent programs whose epilogues add bias, activation, dropout, derivative, bias sums.

Notation: z = x W1ᵀ + b1, h = keep act(z) scale, y = h W2ᵀ + b2. Backward: dz = keep (dy W2) act'(z) scale, dW1 = dzᵀ x,
db1 = sum of dz, dW2 = dyᵀ h, db2 = sum of dy, dx = dz W1. Kept is h for relu, which is positive exactly where the
derivative is 1 and nothing was dropped, so that backward needs no random numbers; z for gelu, whose backward makes h
again. Precision: products and epilogues in float32, z, h and dz rounded once to the dtype of x, bias sums taken from dz
before that. Deterministic: partial bias sums, one a row of tiles, are added in their order.

A decode step has few rows, so that tiles of a usual product would leave most multiprocessors idle. Products with at
most `Few.rows` rows run in narrow tiles instead, and where these are few too, each sums a part of K; a second kernel
adds the parts in their order.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from . import launch_configs
from .gemm import (
    as_matrix,
    config,
    grid,
    halves,
    load,
    operand,
    operands,
    precision,
    product,
    store,
    sum_rows,
    tile,
)
from .philox import keep_matrix
from .sizes import cdiv

FEW_ROWS = 16  # rows of a tile in _few_kernel: the fewest of a matrix instruction


class Few(NamedTuple):
    """Launch configuration of products with few rows."""

    rows: int  # the most rows that it serves; 0 turns it off
    n: int  # columns of a program
    k: int  # elements of K in a step
    warps: int
    stages: int
    fill: int  # number of programs that splitting K aims at, if the columns make fewer


@triton.jit
def _activate(z, ACTIVATION: tl.constexpr):
    """Return (value, slope): the activation of the tensor z and its derivative at z. The compiler drops an unused one.

    ACTIVATION is "relu", "gelu" or "gelu_tanh".
    """
    if ACTIVATION == "relu":
        value = tl.where(z < 0.0, 0.0, z)
        slope = tl.where(z <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476))
        value = z * cdf
        slope = cdf + z * (0.3989422804014327 * tl.exp(-0.5 * z * z))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh", "ACTIVATION is unknown; expected relu, gelu or gelu_tanh")
        # (1 + tanh u) / 2 = 1 / (1 + exp(-2u)) with u = sqrt(2 / pi) (z + 0.044715 z³)
        square = z * z
        cdf = 1.0 / (1.0 + tl.exp(-1.5957691216057308 * z * (1.0 + 0.044715 * square)))
        value = z * cdf
        slope = cdf + value * (1.0 - cdf) * (1.5957691216057308 * (1.0 + 0.134145 * square))
    return value, slope


@triton.jit
def _dropped(value, m, n, site, threshold, scale, seed_ptr):
    """Return the float32 tile `value` of the hidden layer after dropout.

    `m` and `n` are the row and the column of the tile's first element. An element has 16 random bits, a function of the
    seed, `site` and its position. Dropout sets it to 0 if they are below `threshold`, and multiplies it by `scale`
    otherwise.
    """
    i = m + tl.arange(0, value.shape[0])[:, None]
    j = n + tl.arange(0, value.shape[1])[None, :]
    keep = keep_matrix(i, j, tl.zeros_like(j), site, threshold, seed_ptr, "lower")
    return tl.where(keep, value * scale, 0.0)


@triton.jit
def _hidden_half(
    z, out, kept, bias_ptr, seed_ptr, m, n, M, N, stride_om, stride_on, site, threshold, scale,
    ACTIVATION: tl.constexpr, HAS_DROPOUT: tl.constexpr, KEEPS_INPUT: tl.constexpr, HAS_OUT: tl.constexpr,
    OUT_MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Finish a tile z of the product x W1ᵀ: add the bias, activate and drop out, and write the results.

    `m` and `n` are the row and the column of the tile's first element in the hidden layer [M, N]. If KEEPS_INPUT, z
    with its bias, the activation's input, is written to `kept`. If HAS_OUT, the hidden layer after dropout is written
    to `out`. `bias_ptr` is None without a bias. Both targets have the same strides and the same OUT_MODE (pointer or
    descriptor). With HAS_DROPOUT, an element is dropped if its 16 random bits are below `threshold`, and is otherwise
    multiplied by `scale`. The bits are a function of the seed, `site` and its position.
    """
    if bias_ptr is not None:
        offs_n = n + tl.arange(0, z.shape[1])
        z += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if KEEPS_INPUT:
        store(kept, z, m, n, M, N, stride_om, stride_on, OUT_MODE, PRECISION)
    if HAS_OUT:
        h, _ = _activate(z, ACTIVATION)
        if HAS_DROPOUT:
            h = _dropped(h, m, n, site, threshold, scale, seed_ptr)
        store(out, h, m, n, M, N, stride_om, stride_on, OUT_MODE, PRECISION)


@triton.jit(do_not_specialize=["M", "site", "threshold"])
def _hidden_kernel(
    a, b, out, kept, bias_ptr, seed_ptr, stride_am, stride_ak, stride_bn, stride_bk, stride_om, stride_on,
    M, N, K, site, threshold, scale,
    ACTIVATION: tl.constexpr, HAS_DROPOUT: tl.constexpr, KEEPS_INPUT: tl.constexpr, HAS_OUT: tl.constexpr,
    A_MODE: tl.constexpr, B_MODE: tl.constexpr, OUT_MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the hidden layer h [M, N] = dropout(act(a bᵀ + bias)), for x in a [M, K] and the weight in b [N, K].

    If HAS_OUT, h is written to `out`. If KEEPS_INPUT, the activation's input a bᵀ + bias is written to `kept`.
    `bias_ptr` is None without a bias. The programs of a grid of any size share the tiles. With HAS_DROPOUT, an element
    is dropped if its 16 random bits are below `threshold`, and is otherwise multiplied by `scale`. The bits are a
    function of the seed, `site` and its position.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = tile(index, M, N, BLOCK_M, BLOCK_N)
        acc = product(
            a, b, m, n, M, N, K, stride_am, stride_ak, stride_bn, stride_bk,
            BLOCK_M, BLOCK_N, BLOCK_K, A_MODE, B_MODE, PRECISION,
        )  # fmt: skip
        left, right = halves(acc)
        _hidden_half(
            left, out, kept, bias_ptr, seed_ptr, m, n, M, N, stride_om, stride_on, site, threshold, scale,
            ACTIVATION, HAS_DROPOUT, KEEPS_INPUT, HAS_OUT, OUT_MODE, PRECISION,
        )  # fmt: skip
        _hidden_half(
            right, out, kept, bias_ptr, seed_ptr, m, n + BLOCK_N // 2, M, N, stride_om, stride_on, site, threshold,
            scale, ACTIVATION, HAS_DROPOUT, KEEPS_INPUT, HAS_OUT, OUT_MODE, PRECISION,
        )  # fmt: skip


@triton.jit
def _dz_part(
    dh, out, kept, h, partial_ptr, seed_ptr, m, n, M, N, stride_om, stride_on, site, threshold, scale,
    ACTIVATION: tl.constexpr, HAS_DROPOUT: tl.constexpr, MAKES_HIDDEN: tl.constexpr, OUT_MODE: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Write a tile of dz, the gradient of the activation's input, made of a tile `dh` of the hidden layer's gradient.

    `m` and `n` are the row and the column of the tile's first element in [M, N]. `kept` [M, N] is what the forward pass
    kept: the hidden layer after dropout for relu, the activation's input for other activations. dz goes to `out`. If
    MAKES_HIDDEN, the hidden layer after dropout is computed again and written to h. If `partial_ptr` is given, row m /
    BLOCK_M of partial gets the sum of dz over the tile's rows, for the gradient of the bias. partial is [M / BLOCK_M
    rounded up, N], float32.

    With HAS_DROPOUT, the forward pass dropped an element if its 16 random bits were below `threshold`, and otherwise
    multiplied it by `scale`. The bits are a function of the seed, `site` and its position. For relu `kept` shows what
    was dropped.
    """
    at_z = load(kept, m, n, M, N, stride_om, stride_on, dh.shape[0], dh.shape[1], OUT_MODE).to(tl.float32)
    dh, at_z = tl.split(tl.join(dh, at_z))  # gives both one layout; with two, the code below would be computed twice
    value, slope = _activate(at_z, ACTIVATION)
    dz = dh * slope
    if ACTIVATION == "relu":
        # The slope is 0 where an element was dropped, because `kept` is the hidden layer after dropout. Select, do
        # not multiply: PyTorch passes no NaN where relu is 0.
        dz = tl.where(slope == 0.0, 0.0, dh * scale)
    elif HAS_DROPOUT:
        i = m + tl.arange(0, dh.shape[0])[:, None]
        j = n + tl.arange(0, dh.shape[1])[None, :]
        keep = keep_matrix(i, j, tl.zeros_like(j), site, threshold, seed_ptr, "lower")
        dz = tl.where(keep, dz * scale, 0.0)
        value = tl.where(keep, value * scale, 0.0)
    store(out, dz, m, n, M, N, stride_om, stride_on, OUT_MODE, PRECISION)
    if MAKES_HIDDEN:
        store(h, value, m, n, M, N, stride_om, stride_on, OUT_MODE, PRECISION)
    if partial_ptr is not None:
        offs_n = n + tl.arange(0, dh.shape[1])
        tl.store(partial_ptr + (m // BLOCK_M).to(tl.int64) * N + offs_n, tl.sum(dz, axis=0), mask=offs_n < N)


@triton.jit(do_not_specialize=["M", "site", "threshold"])
def _dz_kernel(
    a, b, out, kept, h, partial_ptr, seed_ptr, stride_am, stride_ak, stride_bn, stride_bk, stride_om, stride_on,
    M, N, K, site, threshold, scale,
    ACTIVATION: tl.constexpr, HAS_DROPOUT: tl.constexpr, MAKES_HIDDEN: tl.constexpr, PARTS: tl.constexpr,
    A_MODE: tl.constexpr, B_MODE: tl.constexpr, OUT_MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write dz [M, N], the gradient of the activation's input, to `out`, from the product dh = a bᵀ.

    a [M, K] is the output's gradient dy, b [N, K] the transposed second weight. `kept` [M, N] is the hidden layer after
    dropout for relu, the activation's input for other activations. If MAKES_HIDDEN, the hidden layer after dropout is
    written to h. If `partial_ptr` is given, sums of dz over BLOCK_M rows each go to partial [M / BLOCK_M rounded up,
    N], in float32, for the gradient of the bias. `site`, `threshold`, `scale` and the seed are the forward pass's
    arguments for dropout. A tile [BLOCK_M, BLOCK_N] is finished in PARTS parts side by side, 4 or 8. The programs of a
    grid of any size share the tiles.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = tile(index, M, N, BLOCK_M, BLOCK_N)
        acc = product(
            a, b, m, n, M, N, K, stride_am, stride_ak, stride_bn, stride_bk,
            BLOCK_M, BLOCK_N, BLOCK_K, A_MODE, B_MODE, PRECISION,
        )  # fmt: skip
        left, right = halves(acc)
        for side in tl.static_range(2):
            part = left if side == 0 else right
            first, second = halves(part)
            for step in tl.static_range(2):
                quarter = first if step == 0 else second
                column = n + side * (BLOCK_N // 2) + step * (BLOCK_N // 4)
                if PARTS == 4:
                    _dz_part(
                        quarter, out, kept, h, partial_ptr, seed_ptr, m, column, M, N, stride_om, stride_on,
                        site, threshold, scale, ACTIVATION, HAS_DROPOUT, MAKES_HIDDEN, OUT_MODE, PRECISION, BLOCK_M,
                    )  # fmt: skip
                else:
                    tl.static_assert(PARTS == 8, "PARTS is unknown; expected 4 or 8")
                    near, far = halves(quarter)
                    _dz_part(
                        near, out, kept, h, partial_ptr, seed_ptr, m, column, M, N, stride_om, stride_on,
                        site, threshold, scale, ACTIVATION, HAS_DROPOUT, MAKES_HIDDEN, OUT_MODE, PRECISION, BLOCK_M,
                    )  # fmt: skip
                    _dz_part(
                        far, out, kept, h, partial_ptr, seed_ptr, m, column + BLOCK_N // 8, M, N, stride_om, stride_on,
                        site, threshold, scale, ACTIVATION, HAS_DROPOUT, MAKES_HIDDEN, OUT_MODE, PRECISION, BLOCK_M,
                    )  # fmt: skip


@triton.jit
def _linear_half(
    value, out, bias_ptr, m, n, M, N, stride_om, stride_on, OUT_MODE: tl.constexpr, PRECISION: tl.constexpr
):  # fmt: skip
    """Write a tile `value` of a product, plus the bias if `bias_ptr` is not None, to `out` [M, N].

    `m` and `n` are the row and the column of the tile's first element. `out` is a pointer for OUT_MODE 0, a tensor
    descriptor for 1, and a descriptor of the transposed matrix for 2.
    """
    if bias_ptr is not None:
        offs_n = n + tl.arange(0, value.shape[1])
        value += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    store(out, value, m, n, M, N, stride_om, stride_on, OUT_MODE, PRECISION)


@triton.jit(do_not_specialize=["M"])
def _linear_kernel(
    a, b, out, bias_ptr, stride_am, stride_ak, stride_bn, stride_bk, stride_om, stride_on, M, N, K,
    A_MODE: tl.constexpr, B_MODE: tl.constexpr, OUT_MODE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Write out [M, N] = A Bᵀ + bias, for A [M, K] in a and B [N, K] in b.

    The bias [N] is left out if `bias_ptr` is None. A mode is 0 for a pointer, 1 for a tensor descriptor and 2 for a
    descriptor of the transposed matrix. The programs of a grid of any size share the tiles.
    """
    tiles = tl.cdiv(M, BLOCK_M) * tl.cdiv(N, BLOCK_N)
    for index in range(tl.program_id(0), tiles, tl.num_programs(0)):
        m, n = tile(index, M, N, BLOCK_M, BLOCK_N)
        acc = product(
            a, b, m, n, M, N, K, stride_am, stride_ak, stride_bn, stride_bk,
            BLOCK_M, BLOCK_N, BLOCK_K, A_MODE, B_MODE, PRECISION,
        )  # fmt: skip
        left, right = halves(acc)
        _linear_half(left, out, bias_ptr, m, n, M, N, stride_om, stride_on, OUT_MODE, PRECISION)
        _linear_half(right, out, bias_ptr, m, n + BLOCK_N // 2, M, N, stride_om, stride_on, OUT_MODE, PRECISION)


@triton.jit
def _finish(
    value, out, kept, bias_ptr, seed_ptr, n, M, N, stride_om, stride_on, site, threshold, scale,
    ACTIVATION: tl.constexpr, HAS_DROPOUT: tl.constexpr, KEEPS_INPUT: tl.constexpr, HAS_OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Finish a tile `value` [BLOCK_M, BLOCK_N] of a product with few rows, at row 0 and column `n`, and write it.

    If ACTIVATION is None it is the tile of a linear layer: `value` plus the bias goes to `out` [M, N]. Otherwise it is
    the tile of a hidden layer. If KEEPS_INPUT, `value` plus the bias, the activation's input, goes to `kept` [M, N]. If
    HAS_OUT, the hidden layer after dropout goes to `out`. `bias_ptr` is None without a bias. With HAS_DROPOUT, an
    element of the hidden layer is dropped if its 16 random bits are below `threshold`, and is otherwise multiplied by
    `scale`. The bits are a function of the seed, `site` and its position.
    """
    if ACTIVATION is None:
        _linear_half(value, out, bias_ptr, 0, n, M, N, stride_om, stride_on, 0, PRECISION)
    else:
        _hidden_half(
            value, out, kept, bias_ptr, seed_ptr, 0, n, M, N, stride_om, stride_on, site, threshold, scale,
            ACTIVATION, HAS_DROPOUT, KEEPS_INPUT, HAS_OUT, 0, PRECISION,
        )  # fmt: skip


@triton.jit(do_not_specialize=["M", "site", "threshold"])
def _few_kernel(
    a, b, out, kept, partial_ptr, bias_ptr, seed_ptr, stride_am, stride_ak, stride_bn, stride_bk, stride_om, stride_on,
    M, N, K, part, site, threshold, scale,
    ACTIVATION: tl.constexpr, HAS_DROPOUT: tl.constexpr, KEEPS_INPUT: tl.constexpr, HAS_OUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute BLOCK_N columns of A Bᵀ, for A [M, K] of at most BLOCK_M rows and B [N, K], and finish them by `_finish`.

    Finishing adds the bias and, unless ACTIVATION is None, applies activation and dropout. The results go to `out` and,
    if KEEPS_INPUT, `kept`. The grid is (blocks of columns, parts). With `partial_ptr`, program (i, p) sums only over
    the `part` columns of A and B from p · `part` on. It writes the float32 sums to partial [parts, M, N], for
    `_few_add_kernel` to finish. Without it, there is one part with all K columns.
    """
    n = tl.program_id(0) * BLOCK_N
    first = tl.program_id(1).to(tl.int64) * part
    acc = product(
        a + first * stride_ak, b + first * stride_bk, 0, n, M, N, tl.minimum(part, (K - first).to(tl.int32)),
        stride_am, stride_ak, stride_bn, stride_bk, BLOCK_M, BLOCK_N, BLOCK_K, 0, 0, PRECISION,
    )  # fmt: skip
    if partial_ptr is None:
        _finish(
            acc, out, kept, bias_ptr, seed_ptr, n, M, N, stride_om, stride_on, site, threshold, scale,
            ACTIVATION, HAS_DROPOUT, KEEPS_INPUT, HAS_OUT, PRECISION,
        )  # fmt: skip
    else:
        rows = tl.program_id(1).to(tl.int64) * M
        store(partial_ptr + rows * N, acc, 0, n, M, N, N, 1, 0, PRECISION)


@triton.jit(do_not_specialize=["M", "parts", "site", "threshold"])
def _few_add_kernel(
    out, kept, partial_ptr, bias_ptr, seed_ptr, stride_om, stride_on, M, N, parts, site, threshold, scale,
    ACTIVATION: tl.constexpr, HAS_DROPOUT: tl.constexpr, KEEPS_INPUT: tl.constexpr, HAS_OUT: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add the partial sums [parts, M, N] that `_few_kernel` wrote, the first part first, and finish them by `_finish`.

    Finishing adds the bias and, unless ACTIVATION is None, applies activation and dropout. The results go to `out` and,
    if KEEPS_INPUT, `kept`. Program i takes the BLOCK_N columns from i · BLOCK_N on.
    """
    n = tl.program_id(0) * BLOCK_N
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for index in range(0, parts):
        rows = tl.full((), 0, dtype=tl.int64) + index * M
        acc += load(partial_ptr + rows * N, 0, n, M, N, N, 1, BLOCK_M, BLOCK_N, 0)
    _finish(
        acc, out, kept, bias_ptr, seed_ptr, n, M, N, stride_om, stride_on, site, threshold, scale,
        ACTIVATION, HAS_DROPOUT, KEEPS_INPUT, HAS_OUT, PRECISION,
    )  # fmt: skip


def few_config(a: torch.Tensor) -> Few:
    """Return the launch configuration for products of a [M, K] with small M, by a's device, element size and K.

    Its field `rows` is the largest M that it is for, or 0 if it is for none.
    """
    row = launch_configs.pick("mlp", "few", launch_configs.architecture(a.device), a.element_size(), a.shape[1])
    return Few(*row)


def _few(launch: Few, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, **finish: Any) -> None:
    """Write A Bᵀ, finished by `_finish`, to `out` [M, N], for a = A [M, K] of at most FEW_ROWS rows and b = B [N, K].

    Finishing adds the bias and, for a hidden layer, applies activation and dropout. K is 1 or more. `finish` holds the
    other arguments of `_finish` by name. These are `kept`, `bias_ptr`, `seed_ptr`, the dropout's `site`, `threshold`
    and `scale`, and the switches ACTIVATION, HAS_DROPOUT, KEEPS_INPUT and HAS_OUT. `launch` is the launch
    configuration.
    """
    (M, K), N = a.shape, b.shape[0]
    tiles, steps = cdiv(N, launch.n), cdiv(K, launch.k)
    part = cdiv(steps, min(cdiv(launch.fill, tiles), steps)) * launch.k
    parts = cdiv(K, part)
    partial = None
    if parts > 1:
        partial = torch.empty((parts, M, N), dtype=torch.float32, device=a.device)
    options = {
        **finish, "out": out, "partial_ptr": partial, "stride_om": out.stride(0), "stride_on": out.stride(1),
        "M": M, "N": N, "PRECISION": precision(), "BLOCK_M": FEW_ROWS, "BLOCK_N": launch.n, "num_warps": launch.warps,
        "enable_fp_fusion": True,
    }  # fmt: skip
    _few_kernel[(tiles, parts)](
        a=a, b=b, stride_am=a.stride(0), stride_ak=a.stride(1), stride_bn=b.stride(0), stride_bk=b.stride(1),
        K=K, part=part, BLOCK_K=launch.k, num_stages=launch.stages, **options,
    )  # fmt: skip
    if partial is not None:
        _few_add_kernel[(tiles,)](parts=parts, **options)


PLAIN = {
    "seed_ptr": None, "site": 0, "threshold": 0, "scale": 1.0, "ACTIVATION": None, "HAS_DROPOUT": False,
    "KEEPS_INPUT": False, "HAS_OUT": True,
}  # fmt: skip


def _linear(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write A Bᵀ + bias, for `a` = A [M, K] and `b` = B [N, K] of any strides, into out [M, N] of any strides.

    The bias [N] may be None. An empty `out` stays as it is.
    """
    if out.numel() == 0:
        return
    few = few_config(a)
    if 0 < a.shape[1] and a.shape[0] <= few.rows:
        _few(few, a, b, out, kept=out, bias_ptr=_contiguous(bias), **PLAIN)
        return
    launch, architecture = config("mlp", "product", a, a.shape[1])
    arguments, switches = operands(launch, architecture, a, b, out)
    _linear_kernel[grid(launch, *out.shape, a.device)](**arguments, bias_ptr=_contiguous(bias), **switches)


def _hidden(
    x: torch.Tensor, fc_weight: torch.Tensor, fc_bias: torch.Tensor | None, h: torch.Tensor | None,
    z: torch.Tensor | None, activation: str, threshold: int, scale: float, seed: torch.Tensor | None, site: int,
) -> None:  # fmt: skip
    """Write the hidden layer to h [M, F] and the activation's input to z [M, F].

    Either of the two may be None, which leaves it out. x is [M, C], `fc_weight` [F, C] and `fc_bias` [F] or None.
    `activation` is "relu", "gelu" or "gelu_tanh". Dropout drops an element of the hidden layer if its 16 random bits
    are below `threshold`, and multiplies others by `scale`. The bits are a function of `seed`, `site` and its position.
    Without a seed there is no dropout.
    """
    out = z if h is None else h
    if out is None or out.numel() == 0:
        return
    finish = {
        "bias_ptr": _contiguous(fc_bias), "seed_ptr": seed, "site": site, "threshold": threshold, "scale": scale,
        "ACTIVATION": activation, "HAS_DROPOUT": seed is not None, "KEEPS_INPUT": z is not None,
        "HAS_OUT": h is not None,
    }  # fmt: skip
    few = few_config(x)
    if 0 < x.shape[1] and x.shape[0] <= few.rows:
        _few(few, x, fc_weight, out, kept=out if z is None else z, **finish)
        return
    launch, architecture = config("mlp", "product", x, x.shape[1])
    arguments, switches = operands(launch, architecture, x, fc_weight, out)
    kept = out if z is None else operand(z, launch.m, launch.n // 2, architecture)[0]
    _hidden_kernel[grid(launch, *out.shape, x.device)](**arguments, kept=kept, **finish, **switches)


def _contiguous(bias: torch.Tensor | None) -> torch.Tensor | None:
    """Return a bias as a contiguous tensor, or None for None."""
    return None if bias is None else bias.contiguous()


def forward(
    x: torch.Tensor, fc_weight: torch.Tensor, fc_bias: torch.Tensor | None, proj_weight: torch.Tensor,
    proj_bias: torch.Tensor | None, activation: str, threshold: int, scale: float, seed: torch.Tensor | None,
    site: int, keeps_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return (y [..., C'], kept): the output of the MLP, and the tensor that `backward` takes as `hidden`.

    x is [..., C], `fc_weight` [F, C] and `proj_weight` [C', F]; a bias may be None. If `keeps_hidden`, `kept` [..., F]
    is the hidden layer after dropout for relu, and the activation's input for "gelu" and "gelu_tanh". Else `kept` has
    shape [0]. Dropout drops an element of the hidden layer if its 16 random bits are below `threshold`, and multiplies
    others by `scale`. The bits are a function of `seed`, `site` (the number of this dropout within a forward pass) and
    the element's position. Without a seed there is no dropout.
    """
    F, C_out = fc_weight.shape[0], proj_weight.shape[0]
    rows = as_matrix(x)
    M = rows.shape[0]
    y = torch.empty((*x.shape[:-1], C_out), dtype=x.dtype, device=x.device)
    hidden = torch.empty((*x.shape[:-1], F) if keeps_hidden else (0,), dtype=x.dtype, device=x.device)
    keeps_input = keeps_hidden and activation != "relu"
    if keeps_hidden and not keeps_input:
        h = hidden.view(M, F)
    else:
        h = torch.empty((M, F), dtype=x.dtype, device=x.device)
    z = hidden.view(M, F) if keeps_input else None
    _hidden(rows, fc_weight, fc_bias, h, z, activation, threshold, scale, seed, site)
    _linear(h, proj_weight, proj_bias, y.view(M, C_out))
    return y, hidden


def backward(
    dy: torch.Tensor, x: torch.Tensor, fc_weight: torch.Tensor, fc_bias: torch.Tensor | None,
    proj_weight: torch.Tensor, hidden: torch.Tensor | None, activation: str, threshold: int, scale: float,
    seed: torch.Tensor | None, site: int, needs: list[bool],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return the gradients (dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias) for the upstream gradient dy [..., C'].

    `needs` holds five flags in this order; a gradient that is not needed is a tensor of shape [0]. All are in the dtype
    of x, and those of the weights have the strides of the weights. `hidden` is the `kept` that `forward` returned with
    `keeps_hidden`. Pass None if `forward` had not kept it; the hidden layer is then computed again. `seed`, `site`,
    `threshold` and `scale` are the arguments that `forward` had, and give its dropout mask again. Without a seed there
    was no dropout.
    """
    needs_x, needs_fc_weight, needs_fc_bias, needs_proj_weight, needs_proj_bias = needs
    F, C_out = fc_weight.shape[0], proj_weight.shape[0]
    rows, dy_rows = as_matrix(x), as_matrix(dy)
    M = rows.shape[0]
    options = {"dtype": x.dtype, "device": x.device}
    dx = torch.empty(x.shape if needs_x else (0,), **options)
    dfc_weight = torch.empty_like(fc_weight) if needs_fc_weight else torch.empty(0, **options)
    dproj_weight = torch.empty_like(proj_weight) if needs_proj_weight else torch.empty(0, **options)
    dfc_bias = torch.empty(F if needs_fc_bias else 0, **options)
    dproj_bias = torch.empty(C_out if needs_proj_bias else 0, **options)
    if M == 0:
        return dx, dfc_weight.zero_(), dfc_bias.zero_(), dproj_weight.zero_(), dproj_bias.zero_()

    if needs_proj_bias and C_out:
        sum_rows(dy_rows, dproj_bias)
    makes_hidden = needs_proj_weight and activation != "relu"
    needs_dz = needs_x or needs_fc_weight or needs_fc_bias
    if (needs_dz or needs_proj_weight) and F:
        if hidden is None:
            kept = torch.empty((M, F), **options)
            h, z = (kept, None) if activation == "relu" else (None, kept)
            _hidden(rows, fc_weight, fc_bias, h, z, activation, threshold, scale, seed, site)
        else:
            kept = hidden.view(M, F)
        h = torch.empty((M, F), **options) if makes_hidden else kept
        if needs_dz or makes_hidden:
            dz = _dz(dy_rows, proj_weight, kept, h if makes_hidden else None, activation, threshold, scale, seed, site,
                     dfc_bias if needs_fc_bias else None)  # fmt: skip
        if needs_proj_weight:
            _linear(dy_rows.t(), h.t(), None, dproj_weight)
        if needs_fc_weight:
            _linear(dz.t(), rows.t(), None, dfc_weight)
        if needs_x:
            _linear(dz, fc_weight.t(), None, dx.view(rows.shape))
    elif needs_x:
        dx.zero_()
    return dx, dfc_weight, dfc_bias, dproj_weight, dproj_bias


def _dz(
    dy: torch.Tensor, proj_weight: torch.Tensor, kept: torch.Tensor, h: torch.Tensor | None, activation: str,
    threshold: int, scale: float, seed: torch.Tensor | None, site: int, dfc_bias: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return dz [M, F], the gradient of the activation's input, for the output's gradient dy [M, C'].

    `kept` [M, F] is what the forward pass kept: the hidden layer after dropout for relu, the activation's input for
    other activations. The hidden layer after dropout is written to h [M, F] unless h is None. The sum of dz over its
    rows is written to `dfc_bias` [F] unless `dfc_bias` is None. Dropout dropped an element of the hidden layer if the
    element's 16 random bits were below `threshold`, and multiplied others by `scale`. The bits are a function of
    `seed`, `site` and the element's position. Without a seed there was no dropout.
    """
    M, F = kept.shape
    dz = torch.empty_like(kept)
    b = proj_weight.t()
    launch, architecture = config("mlp", "product", dy, dy.shape[1])
    # erf beside the random numbers needs so many registers that quarters of a tile spill 336 bytes with Triton 3.9.
    parts = 8 if activation == "gelu" and seed is not None else 4
    arguments, switches = operands(launch, architecture, dy, b, dz, parts)
    columns = launch.n // parts
    partial = None
    if dfc_bias is not None:
        partial = torch.empty((cdiv(M, launch.m), F), dtype=torch.float32, device=dy.device)
    _dz_kernel[grid(launch, M, F, dy.device)](
        **arguments, kept=operand(kept, launch.m, columns, architecture)[0],
        h=None if h is None else operand(h, launch.m, columns, architecture)[0], partial_ptr=partial, seed_ptr=seed,
        site=site, threshold=threshold, scale=scale, ACTIVATION=activation, HAS_DROPOUT=seed is not None,
        MAKES_HIDDEN=h is not None, PARTS=parts, **switches,
    )  # fmt: skip
    if partial is not None:
        sum_rows(partial, dfc_bias)
    return dz
