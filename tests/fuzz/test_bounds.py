"""Test limits of launches and loops: 65,535 heads, many packed sequences, many dimensions, strides beyond 2^31."""

import importlib

import numpy as np
import pytest
import torch

from gpt_fast import ops, reference
from tests import numerics
from tests.fuzz import draws

LIMIT = 65_535  # largest second and third dimension of a CUDA grid
HEADS = LIMIT + 5


class Recorder:
    """Stand-in for a Triton kernel that records the grids of its launches and runs nothing."""

    def __init__(self, grids: list[tuple[int, ...]]) -> None:
        self.grids = grids

    def __getitem__(self, grid):
        self.grids.append(grid)
        return lambda *args, **options: None


@pytest.fixture
def grids(monkeypatch) -> list[tuple[int, ...]]:
    """Replace all kernels by recorders, and return the list of the grids that are launched."""
    if not draws.INTERPRETED:
        pytest.skip("grids are those of the Triton kernels")
    launched: list[tuple[int, ...]] = []
    for op in (*ops.NAMES, "gemm"):
        kernel = importlib.import_module(f"gpt_fast.kernels.{op}")
        for name in [name for name in vars(kernel) if name.endswith("_kernel")]:
            monkeypatch.setattr(kernel, name, Recorder(launched))
    return launched


def backward(out: torch.Tensor) -> None:
    out.backward(torch.zeros_like(out))


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype).requires_grad_()


MANY = {
    "heads of attention": lambda: backward(ops.attention(*(leaf(HEADS, 1, 2, 1) for _ in range(3)))),
    "heads of attention_qkv": lambda: backward(ops.attention_qkv(leaf(HEADS, 2, 3), 1)),
    "heads of decode_attention": lambda: ops.decode_attention(
        torch.zeros(HEADS, 1, 1), torch.zeros(HEADS, 1, 2, 1), torch.zeros(HEADS, 1, 2, 1), torch.full((HEADS,), 2)
    ),
    "rows of layer_norm": lambda: backward(ops.layer_norm(leaf(20 * LIMIT, 1), leaf(1), leaf(1))),
    "rows of add_layer_norm": lambda: backward(ops.add_layer_norm(leaf(20 * LIMIT, 1), leaf(20 * LIMIT, 1))[0]),
    "rows of embedding": lambda: backward(ops.embedding(torch.zeros(20 * LIMIT, 1).long(), leaf(2, 1), leaf(1, 1))),
    "rows of mlp": lambda: backward(ops.mlp(leaf(20 * LIMIT, 1), leaf(2, 1), leaf(2), leaf(1, 2), leaf(1))),
    "rows of linear_cross_entropy": lambda: backward(
        ops.linear_cross_entropy(leaf(20 * LIMIT, 1), leaf(3, 1), torch.zeros(20 * LIMIT).long(), leaf(3))
    ),
    "classes of linear_cross_entropy": lambda: backward(
        ops.linear_cross_entropy(leaf(2, 1), leaf(20 * LIMIT, 1), torch.zeros(2).long(), leaf(20 * LIMIT))
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MANY)
def test_no_grid_exceeds_what_cuda_allows(case, grids):
    """CUDA allows 2^31 - 1 programs in the first dimension of a grid and 65,535 in the others."""
    MANY[case]()
    assert grids
    for grid in grids:
        assert grid[0] < 2**31
        assert all(size <= LIMIT for size in grid[1:]), grid


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_heads_than_65535(dtype):
    """Each head has one query and one key, so the output is the value and its gradient is the upstream gradient."""
    if draws.INTERPRETED:
        pytest.skip("65,540 programs take minutes in the interpreter; their grid is tested above")
    q, k, v, dout = (torch.randn(5, LIMIT // 5 + 1, 1, 3).to(dtype) for _ in range(4))
    v.requires_grad_()
    out = ops.attention(q, k, v)
    assert torch.equal(out, v)
    (dv,) = torch.autograd.grad(out, v, dout)
    torch.testing.assert_close(dv, dout)
    decoded = ops.decode_attention(q[:, :, 0], k, v.detach(), torch.ones(5, dtype=torch.int64))
    assert torch.equal(decoded, v[:, :, 0])


@pytest.mark.skipif(not draws.INTERPRETED, reason="the grid of the Triton kernels")
def test_a_grid_of_one_dimension_computes_the_same(monkeypatch):
    """Attention uses a one-dimensional grid for more than 65,535 heads. Here a lower limit makes it do so for 6."""
    kernel = importlib.import_module("gpt_fast.kernels.attention")
    leaves = [torch.randn(2, 3, 150, 8, requires_grad=True) for _ in range(3)]
    dout = torch.randn(2, 3, 150, 8)
    results = []
    for limit in (kernel.GRID_LIMIT, 2):
        monkeypatch.setattr(kernel, "GRID_LIMIT", limit)
        out = ops.attention(*leaves, dropout_p=0.1, seed=torch.tensor([3]))
        results.append((out.detach(), *torch.autograd.grad(out, leaves, dout)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("count", [11, 300])
def test_many_packed_sequences(count):
    """There are more packed sequences than a tile has queries, and some are empty."""
    T = 40 if draws.INTERPRETED else 700
    starts = torch.randint(0, T + 1, (count - 1,)).sort().values
    cu_seqlens = torch.cat((torch.zeros(1, dtype=torch.int64), starts, torch.tensor([T])))
    q, k, v = (torch.randn(1, 2, T, 8) for _ in range(3))
    got = ops.attention(q, k, v, cu_seqlens=cu_seqlens)
    exact = reference.attention(q.double(), k.double(), v.double(), cu_seqlens=cu_seqlens)
    numerics.assert_as_accurate(got, reference.attention(q, k, v, cu_seqlens=cu_seqlens), exact)


def test_more_than_ten_dimensions():
    """Ops that take any number of leading dimensions accept thirteen, in a layout that is not contiguous."""
    shape = (1, 2, 1, 1, 2, 1, 1, 1, 1, 2, 1, 1, 3)
    x = torch.randn(*shape, 5).transpose(1, 4)
    rows = x.reshape(-1, 5)
    weight, bias, square = torch.randn(5), torch.randn(5), torch.randn(5, 5)
    target = torch.randint(0, 5, x.shape[:-1])
    pairs = [
        (ops.layer_norm(x, weight, bias), ops.layer_norm(rows, weight, bias)),
        (ops.add_layer_norm(x, x, weight, bias)[0], ops.add_layer_norm(rows, rows, weight, bias)[0]),
        (ops.mlp(x, square, bias, square, None), ops.mlp(rows, square, bias, square, None)),
        (
            ops.linear_cross_entropy(x, square, target, reduction="none"),
            ops.linear_cross_entropy(rows, square, target.reshape(-1), reduction="none"),
        ),
        (ops.embedding(target, square, square), ops.embedding(target.reshape(-1, 3), square, square)),
    ]
    if not draws.INTERPRETED:  # in the interpreter `linear` is PyTorch's own product
        pairs.append((ops.linear(x, square, bias), ops.linear(rows, square, bias)))
    for got, wanted in pairs:
        assert got.shape[: x.dim() - 1] == x.shape[:-1]
        assert torch.equal(got.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("op", ["attention", "decode_attention"])
def test_masks_and_lengths_beyond_2_to_the_31_elements(op):
    """The rows of a dense mask, and the elements of `lengths`, lie more than 2^31 elements apart."""
    far = 2**31 + 8
    storage = torch.from_numpy(np.zeros(far + 64, dtype="bool"))
    if op == "attention":
        mask = storage.as_strided((2, 1, 1, 9), (far, 1, 1, 1))
        mask.copy_(torch.rand(2, 1, 1, 9) > 0.3)
        q, k, v = (torch.randn(2, 2, size, 4) for size in (9, 9, 9))
        assert torch.equal(ops.attention(q, k, v, mask=mask), ops.attention(q, k, v, mask=mask.contiguous()))
        key_mask = storage.as_strided((2, 9), (far, 1))
        assert torch.equal(ops.attention(q, k, v, key_mask=key_mask), ops.attention(q, k, v, key_mask=key_mask.clone()))
    else:
        wide = torch.from_numpy(np.zeros(far + 64, dtype="int32"))
        lengths = wide.as_strided((2,), (far,))
        lengths.copy_(torch.tensor([3, 5]))
        q, k, v = torch.randn(2, 2, 4), torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 4)
        assert torch.equal(ops.decode_attention(q, k, v, lengths), ops.decode_attention(q, k, v, lengths.clone()))
