"""Test attention against the float64 reference: the C++ kernel, Triton in the interpreter and Triton on CUDA."""

import importlib
import itertools
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt_fast
from gpt_fast import ops, reference
from tests import numerics

NAMES = ("out", "dq", "dk", "dv")


def inputs(B, H, T, S, D, *, dtype=torch.float32, device="cpu"):
    """Return q, k and v, which require gradients, and an upstream gradient."""
    q, dout = (torch.randn(B, H, T, D, device=device).to(dtype) for _ in range(2))
    k, v = (torch.randn(B, H, S, D, device=device).to(dtype) for _ in range(2))
    return *(x.requires_grad_() for x in (q, k, v)), dout


def run(q, k, v, dout, function=ops.attention, **options):
    out = function(q, k, v, **options)
    return out.detach(), *torch.autograd.grad(out, (q, k, v), dout)


def yardstick(q, k, v, dout, *, scale=None, **options):
    """Compute `run` in plain PyTorch with exactly the roundings that the op's contract names.

    Autograd of the reference would not do: it rounds dP instead of dS, and uses the output before rounding.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.no_grad():
        out = reference.attention(q, k, v, scale=scale, **options)
        B, H, S, _ = k.shape
        identity = torch.eye(S, device=k.device).expand(B, H, S, S)
        wide = [x.float() for x in (q, k, v, dout)]
        dropped = reference.attention(*wide[:2], identity, scale=scale, **options)
        probs = reference.attention(*wide[:2], identity, scale=scale, **options | {"dropout_p": 0.0})
        delta = (wide[3] * out.float()).sum(-1, keepdim=True)
        ds = (dropped * (wide[3] @ wide[2].mT) - probs * delta).to(q.dtype).float()
        dq, dk = scale * (ds @ wide[1]), scale * (ds.mT @ wide[0])
        dv = dropped.to(v.dtype).float().mT @ wide[3]
    return out, *(x.to(q.dtype) for x in (dq, dk, dv))


def check(q, k, v, dout, **options):
    """Assert that output and gradients are as accurate as the yardstick, and return them."""
    got = run(q, k, v, dout, **options)
    exact = run(*(numerics.exact(x) for x in (q, k, v)), dout.double(), reference.attention, **options)
    # dS = P (dP - delta) cancels, and is 0 if a query has one key. `terms` holds the sizes of the terms that cancel.
    scale = abs(q.shape[-1] ** -0.5 if options.get("scale") is None else options["scale"])
    dp = _longest(dout) * _longest(v) * reference.dropout_scale(options.get("dropout_p", 0.0))
    terms = {"dq": scale * dp * _longest(k), "dk": scale * dp * _longest(q)}
    scores = scale * (q.detach().double() @ k.detach().double().mT)
    for name, *values in zip(NAMES, got, yardstick(q, k, v, dout, **options), exact, strict=True):
        moved = numerics.softmax_terms(scores, values[-1])
        numerics.assert_as_accurate(*values, terms=max(terms.get(name, 0.0), moved), label=name)
    return got


def _longest(x) -> float:
    """Return the largest Euclidean norm of a row."""
    return x.detach().double().norm(dim=-1).max().item() if x.numel() else 0.0


def all_equal(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def seed_on(device, value=0x1234_5678_9ABC) -> torch.Tensor:
    return torch.tensor([value], device=device)


# ---- numerics --------------------------------------------------------------------------------------------------------

SHAPES = [
    pytest.param((1, 1, 1, 1, 1), {}, id="one_of_everything"),
    pytest.param((2, 2, 64, 64, 64), {}, id="powers_of_two"),
    pytest.param((1, 3, 37, 37, 24), {}, id="off_powers_of_two"),
    pytest.param((1, 2, 65, 65, 32), {}, id="one_past_a_block"),
    pytest.param((1, 2, 129, 129, 64), {}, id="one_past_two_blocks"),
    pytest.param((2, 2, 1, 70, 64), {}, id="one_query"),
    pytest.param((1, 2, 20, 93, 16), {}, id="fewer_queries_than_keys"),
    pytest.param((1, 2, 90, 31, 16), {"causal": False}, id="more_queries_than_keys"),
    pytest.param((1, 2, 64, 128, 32), {"causal": False}, id="bidirectional"),
    pytest.param((2, 4, 90, 90, 1), {}, id="head_size_1"),
    pytest.param((1, 2, 40, 40, 3), {}, id="odd_head_size"),
    pytest.param((1, 1, 70, 70, 80), {}, id="head_size_80"),
    pytest.param((1, 1, 70, 70, 128), {}, id="head_size_128"),
    pytest.param((1, 1, 70, 70, 255), {}, id="head_size_255"),
    pytest.param((1, 1, 66, 66, 256), {}, id="largest_head_size"),
    pytest.param((1, 2, 50, 50, 16), {"scale": -0.3}, id="negative_scale"),
    pytest.param((1, 2, 50, 50, 16), {"scale": 0.0}, id="zero_scale"),
    pytest.param((1, 2, 50, 50, 16), {"scale": 3.0}, id="peaked"),
]


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "options"), SHAPES)
def test_numerics(shape, options, dtype, device):
    """Test sizes on, off and one past multiples of a block, causal and bidirectional, with extreme scales."""
    check(*inputs(*shape, dtype=dtype, device=device), **options)


@pytest.mark.parametrize(("dq", "dkdv"), [((16, 32), (64, 16)), ((64, 16), (16, 32))], ids=["shorter", "longer"])
def test_tiles_of_both_backward_kernels(dq, dkdv, device, implementation, monkeypatch):
    """One backward kernel stores each row's lse and delta. The other reads them in tiles of another length.

    Those tiles may extend past the last row.
    """
    if implementation != "triton":
        pytest.skip("a launch configuration of the Triton kernels")
    kernel = importlib.import_module("gpt_fast.kernels.attention")
    tiles = {"bwd_dq": dq, "bwd_dkdv": dkdv}
    shipped = kernel.config

    def config(name, q):
        launch, BLOCK_D = shipped(name, q)
        return launch._replace(**dict(zip(("queries", "keys"), tiles.get(name, launch), strict=False))), BLOCK_D

    monkeypatch.setattr(kernel, "config", config)
    check(*inputs(1, 1, 70, 70, 16, device=device), causal=False)


@pytest.fixture
def late(implementation, monkeypatch):
    """Configure the forward kernel to scale scores after taking their maximum, in tiles of 32 keys.

    Most tests have keys for several such tiles.
    """
    if implementation != "triton":
        pytest.skip("a launch configuration of the Triton kernels")
    kernel = importlib.import_module("gpt_fast.kernels.attention")
    shipped = kernel.config

    def config(name, q):
        launch, BLOCK_D = shipped(name, q)
        return (launch._replace(queries=16, keys=32, late=1) if name == "fwd" else launch), BLOCK_D

    monkeypatch.setattr(kernel, "config", config)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.2, 3.0, -0.5], ids=str)
@pytest.mark.parametrize("name", ["none", "lengths", "key_mask", "mask", "window"])
def test_late_scale_with_masks(name, scale, late, device):
    """Scale 0 must not turn masked scores of -inf into NaN. Rows without a key give 0."""
    empty = torch.rand(70, 70, device=device) > 0.3
    empty[[0, 7, 69]] = False
    options = {
        "none": {"causal": True},
        "lengths": {"lengths": torch.tensor([0, 41], device=device)},
        "key_mask": {"key_mask": torch.arange(70, device=device) >= torch.tensor([[30], [70]], device=device)},
        "mask": {"mask": empty, "causal": False},
        "window": {"window": 9, "causal": False},
    }[name]
    out, *_ = check(*inputs(2, 1, 70, 70, 16, device=device), scale=scale, **options)
    if name == "mask":
        assert (out[:, :, [0, 7, 69]] == 0).all()


@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.5, 3.0], ids=str)
@pytest.mark.parametrize("name", ["none", "causal", "lengths", "key_mask", "mask"])
def test_late_scale_of_scores_that_are_not_finite(name, scale, late, device):
    """Scores of -inf give NaN if all scores of a query are -inf, else a weight of 0, as with the shipped order."""
    options = {key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in MASKS_OF_THREE[name].items()} | {
        "scale": scale
    }
    ones = torch.ones(1, 1, 3, 1, device=device)
    queries = torch.full_like(ones, -torch.inf)
    assert ops.attention(queries, ones, ones, **{"causal": False} | options).isnan().any(-1).all()
    if scale > 0:
        keys = ones.clone()
        keys[:, :, 1] = -torch.inf
        values = torch.tensor([1.0, 100.0, 1.0], device=device).view(1, 1, 3, 1)
        assert torch.equal(ops.attention(ones, keys, values, **{"causal": False} | options), ones)
    if scale > 1:
        huge = torch.full_like(ones, 3e38)
        assert ops.attention(huge, ones, ones, **{"causal": False} | options).isnan().any()


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": False}, {"dropout_p": 0.3}], ids=["causal", "all", "dropout"])
def test_late_scale_numerics(options, dtype, late, device):
    if options.get("dropout_p"):
        options = options | {"seed": seed_on(device), "site": 3}
    check(*inputs(1, 2, 70, 100, 24, dtype=dtype, device=device), **options)


CANDIDATES = importlib.import_module("gpt_fast.kernels.launch_configs").CANDIDATES["attention"]


@pytest.mark.parametrize("p", [0.0, 0.1], ids=["plain", "dropout"])
@pytest.mark.parametrize("row", CANDIDATES, ids=lambda row: f"{row.kernel} {'-'.join(map(str, row.config))}")
def test_candidates_of_the_tuner(row, p, device, implementation):
    """Every launch configuration that the tuner may choose gives correct results."""
    if implementation != "triton":
        pytest.skip("a launch configuration of the Triton kernels")
    configs = importlib.import_module("gpt_fast.kernels.launch_configs")
    tensors = inputs(1, 2, 150, 150, row.size, dtype=torch.bfloat16, device=device)
    with configs.trying("attention", row._replace(architecture=configs.architecture(tensors[0].device))):
        kernel = importlib.import_module("gpt_fast.kernels.attention")
        assert kernel.config(row.kernel, tensors[0])[0] == row.config
        check(*tensors, dropout_p=p, **({"seed": seed_on(device)} if p else {}))


def test_large_scores_with_a_late_scale(late, device):
    q, k, v, dout = inputs(1, 2, 70, 70, 16, device=device)
    check((q.detach() * 30).requires_grad_(), k, v, dout)


def test_large_scores(device):
    """With scores in the hundreds, exponentials would overflow without the running maximum."""
    q, k, v, dout = inputs(1, 2, 70, 70, 16, device=device)
    check((q.detach() * 30).requires_grad_(), k, v, dout)


def masks(device, T=100, S=100):
    """Return the options of each kind of mask, for a batch of 2 and 3 heads."""
    random = torch.rand(2, 3, T, S, device=device) > 0.4
    triangle = torch.ones(T, S, dtype=torch.bool, device=device).tril()
    middle = torch.zeros(2, S, dtype=torch.bool, device=device)
    middle[0, 20:90] = middle[1, 70:75] = True
    return {
        "lengths": {"lengths": torch.tensor([S - 30, 1], device=device)},
        "lengths_int32": {"lengths": torch.tensor([64, 65], device=device, dtype=torch.int32)},
        "length_zero": {"lengths": torch.tensor([0, S], device=device)},
        "left_padding": {"key_mask": torch.arange(S, device=device) >= torch.tensor([[40], [67]], device=device)},
        "holes_in_key_mask": {"key_mask": torch.rand(2, S, device=device) > 0.5},
        "far_key_mask": {"key_mask": middle, "causal": False},
        "no_key_at_all": {"key_mask": torch.zeros(2, S, dtype=torch.bool, device=device)},
        "dense_mask": {"mask": random},
        "dense_mask_of_a_batch": {"mask": random[:, :1]},
        "dense_mask_of_heads": {"mask": random[0]},
        "dense_mask_of_queries": {"mask": random[0, 0, :, :1]},
        "dense_mask_of_keys": {"mask": random[0, 0, 0]},
        "dense_mask_transposed": {"mask": random.transpose(0, 1).contiguous().transpose(0, 1).mT.contiguous().mT},
        "triangle_as_dense_mask": {"mask": triangle, "causal": False},
        "window_of_one": {"window": 1},
        "window": {"window": 33},
        "window_of_a_block": {"window": 64},
        "window_past_the_end": {"window": 2**40},
        "window_both_ways": {"window": 20, "causal": False},
        "all_of_them": {
            "lengths": torch.tensor([S - 10, S], device=device), "key_mask": torch.rand(2, S, device=device) > 0.2,
            "mask": random, "window": 60,
        },
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", masks("cpu"))
def test_masks(name, dtype, device):
    """Test every mask alone, in each shape that it may have, and all masks together."""
    check(*inputs(2, 3, 100, 100, 16, dtype=dtype, device=device), **masks(device)[name])


def test_masks_with_fewer_queries_than_keys(device):
    """With fewer queries than keys, the last query has the position of the last key."""
    q, k, v, dout = inputs(2, 2, 30, 100, 16, device=device)
    lengths = torch.tensor([75, 100], device=device)
    for options in ({"window": 20}, {"window": 20, "causal": False}, {"lengths": lengths}):
        check(q, k, v, dout, **options)


PACKED = [
    pytest.param([0, 100], id="one_sequence"),
    pytest.param([0, 3, 64, 65, 100], id="short_and_long"),
    pytest.param([0, 0, 50, 50, 100, 100], id="empty_sequences"),
    pytest.param([0, 30, 71], id="tokens_after_the_last"),
    pytest.param([0], id="no_sequence"),
]


@pytest.mark.parametrize("starts", PACKED)
def test_packed_sequences(starts, device):
    """Each packed sequence gives the results that it gives alone. Tokens after the last sequence give 0."""
    q, k, v, dout = inputs(1, 2, 100, 100, 16, device=device)
    cu_seqlens = torch.tensor(starts, device=device)
    got = check(q, k, v, dout, cu_seqlens=cu_seqlens)
    for first, last in itertools.pairwise(starts):
        alone = (x[:, :, first:last].detach().requires_grad_() for x in (q, k, v))
        wanted = run(*alone, dout[:, :, first:last])
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a[:, :, first:last], b, rtol=1e-5, atol=1e-5)
    assert all((x[:, :, starts[-1] :] == 0).all() for x in got)
    check(q, k, v, dout, cu_seqlens=cu_seqlens.int(), causal=False, window=9, lengths=torch.tensor([60], device=device))


def test_rows_without_keys_give_zero(device):
    q, k, v, dout = inputs(1, 2, 40, 40, 16, device=device)
    mask = torch.rand(40, 40, device=device) > 0.3
    mask[[0, 7, 39]] = False
    out, dq, _, _ = check(q, k, v, dout, mask=mask)
    assert (out[:, :, [0, 7, 39]] == 0).all() and (dq[:, :, [0, 7, 39]] == 0).all()


MASKS_OF_THREE = {
    "none": {},
    "causal": {"causal": True},
    "lengths": {"lengths": torch.tensor([2])},
    "key_mask": {"key_mask": torch.tensor([[True, False, True]])},
    "mask": {"mask": torch.tensor([[True, False, True]])},
}


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("name", MASKS_OF_THREE)
def test_scores_of_minus_infinity_give_nan(name, dtype, device):
    """A query whose scores are all -inf gives NaN, as in PyTorch's softmax. A query without keys still gives 0."""
    q, dout = torch.full((1, 1, 3, 1), -torch.inf, dtype=dtype, device=device), torch.ones(1, 1, 3, 1, device=device)
    k, v = (torch.ones(1, 1, 3, 1, dtype=dtype, device=device) for _ in range(2))
    options = {"causal": False} | {
        key: x.to(device) if isinstance(x, torch.Tensor) else x for key, x in MASKS_OF_THREE[name].items()
    }
    for function in (ops.attention, reference.attention):
        tensors = (x.detach().requires_grad_() for x in (q, k, v))
        assert all(x.isnan().any() for x in run(*tensors, dout.to(dtype), function, **options))
    empty = options | {"mask": torch.zeros(3, 3, dtype=torch.bool, device=device)}
    for x in run(*(x.detach().requires_grad_() for x in (torch.zeros_like(q), k, v)), dout.to(dtype), **empty):
        assert (x == 0).all()


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_an_infinite_key_without_weight_spoils_only_the_queries_gradient(dtype, device):
    """A score of -inf has weight 0, so output, dk and dv are finite, as in PyTorch. dq is NaN: 0 times infinity."""
    q, k, v, dout = (torch.randn(1, 2, 5, 4, device=device).abs().to(dtype) for _ in range(4))
    k[0, 0, 3, 2] = -torch.inf
    out, dq, dk, dv = run(*(x.requires_grad_() for x in (q, k, v)), dout, causal=False)
    assert all(x.isfinite().all() for x in (out, dk, dv))
    assert (~dq.isfinite()).nonzero()[:, 1:].tolist() == [[0, i, 2] for i in range(5)]


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_a_query_of_nan_spoils_the_gradients_of_its_keys(p, device):
    """NaN weights reach the gradients of all keys, even where dropout drops them."""
    q, k, v, dout = inputs(1, 2, 40, 40, 8, device=device)
    with torch.no_grad():
        q[0, 1, 39, 3] = torch.nan
    out, dq, dk, dv = run(q, k, v, dout, dropout_p=p, seed=seed_on(device))
    for x in (out[:, :, 39:], dq[:, :, 39:], dk, dv):
        assert x[:, 1].isnan().any(-1).all() and x[:, 0].isfinite().all()
    assert out[:, :, :39].isfinite().all() and dq[:, :, :39].isfinite().all()


EXAMPLES = 8 if os.environ.get("TRITON_INTERPRET") == "1" else 40  # the interpreter takes many seconds per example


@settings(max_examples=EXAMPLES, deadline=None)
@given(data=st.data())
def test_any_combination(data):
    """Test random combinations of shapes and masks, with and without dropout, in float32.

    In 16 bits the yardstick's largest error among a few hundred values varies too much for a search that looks for the
    worst of many cases. `test_masks` runs each mask in bfloat16 too.
    """
    draw = data.draw
    torch.manual_seed(draw(st.integers(0, 999), "random numbers"))
    B, H = draw(st.integers(1, 3), "B"), draw(st.integers(1, 3), "H")
    T, S = draw(st.integers(16, 140), "T"), draw(st.integers(16, 140), "S")
    D = draw(st.sampled_from([16, 33, 64]), "D")
    causal = draw(st.booleans(), "causal")
    options: dict = {"causal": causal}
    if draw(st.booleans(), "packed"):
        B, S = 1, T
        cuts = sorted(draw(st.lists(st.integers(0, T), max_size=5), "cuts"))
        options["cu_seqlens"] = torch.tensor([0, *cuts])
    if causal and T > S:
        T, S = S, T
    if draw(st.booleans(), "use lengths"):
        options["lengths"] = torch.randint(0, S + 1, (B,))
    if draw(st.booleans(), "use key_mask"):
        options["key_mask"] = torch.rand(B, S) < draw(st.sampled_from([0.05, 0.5, 0.95]))
    if draw(st.booleans(), "use mask"):
        shape = [size if draw(st.booleans()) else 1 for size in (B, H, T, S)]
        options["mask"] = torch.rand(shape) < draw(st.sampled_from([0.05, 0.5, 0.95]))
    if draw(st.booleans(), "use window"):
        options["window"] = draw(st.integers(1, 150), "window")
    if draw(st.booleans(), "use dropout"):
        options |= {"dropout_p": draw(st.sampled_from([0.1, 0.5])), "seed": torch.randint(-(2**63), 2**63 - 1, (1,))}
        options["site"] = draw(st.integers(0, 2**32 - 1), "site")
    check(*inputs(B, H, T, S, D), **options)


# ---- exact properties ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_a_future_token_changes_no_earlier_bit(dtype, device):
    q, k, v, dout = inputs(1, 2, 150, 150, 32, dtype=dtype, device=device)
    before = run(q, k, v, dout)
    for t in (1, 63, 64, 100, 149):
        later = [x.detach().clone() for x in (q, k, v)]
        for x in later:
            x[:, :, t:] = torch.randn_like(x[:, :, t:]) * 9
        after = ops.attention(*later)
        assert torch.equal(after[:, :, :t], before[0][:, :, :t]), t
        assert not torch.equal(after[:, :, t:], before[0][:, :, t:])


def test_zero_keys_give_the_running_mean_of_the_values(device):
    q, k, v, _ = inputs(1, 2, 100, 100, 16, device=device)
    out = ops.attention(q, torch.zeros_like(k), v)
    count = torch.arange(1, 101, device=device, dtype=torch.float64)[:, None]
    torch.testing.assert_close(out.double(), v.double().cumsum(2) / count, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_a_dominant_last_key_returns_its_value(dtype, device):
    """The result is exactly that value, because float32 cannot hold the other weights beside 1."""
    q, k, v, _ = inputs(1, 2, 90, 90, 16, dtype=dtype, device=device)
    with torch.no_grad():
        q.fill_(4)
        k[:, :, -1] = 100
    assert torch.equal(ops.attention(q, k, v)[:, :, -1], v[:, :, -1])


@pytest.mark.parametrize("T", [1, 5, 33])
def test_an_infinite_key_that_the_last_query_does_not_see(T, device):
    """No query sees the last key, so output and dv are finite.

    The kernel fills its tiles of queries with copies of the last query, which must not see that key either.
    """
    q, k, v = (torch.randn(1, 1, T, 8, device=device) for _ in range(3))
    k[:, :, -1] = torch.inf
    mask = torch.ones(T, T, dtype=torch.bool, device=device)
    mask[:, -1] = False
    leaves = [leaf.requires_grad_() for leaf in (q, k, v)]
    out = ops.attention(*leaves, mask=mask)
    _, _, dv = torch.autograd.grad(out, leaves, torch.randn(1, 1, T, 8, device=device))
    assert out.isfinite().all() and dv.isfinite().all()
    assert not dv[:, :, -1].any()


@pytest.mark.parametrize("amplitude", [1, 3, 9])
def test_large_scores_are_as_accurate_as_pytorchs(amplitude, device, implementation):
    """Each error's root mean square is at most 1.25 times that of PyTorch's flash attention, for scores up to 144."""
    if implementation != "cpp":
        pytest.skip("PyTorch's flash attention for the CPU is the yardstick of the C++ kernel")
    q, k, v, dout = (torch.rand(2, 4, 256, 64, device=device) * 2 - 1 for _ in range(4))
    errors = []
    for attend, dtype in (
        (ops.attention, torch.float64),
        (ops.attention, None),
        (F.scaled_dot_product_attention, None),
    ):
        leaves = [leaf.to(dtype).detach().requires_grad_() for leaf in (q * amplitude, k * amplitude, v)]
        options = {} if attend is ops.attention else {"is_causal": True}
        out = attend(*leaves, **options)
        results = [out.detach(), *torch.autograd.grad(out, leaves, dout.to(dtype))]
        if dtype is not None:
            exact = results
        else:
            errors.append([(a - b).square().mean().sqrt() for a, b in zip(results, exact, strict=True)])
    for name, ours, theirs in zip(("out", "dq", "dk", "dv"), *errors, strict=True):
        assert ours <= 1.25 * theirs, name


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_a_single_key_returns_its_value(dtype, device, implementation):
    """With one key per query the weight is 1, so the output is v and the gradients of q and k are 0.

    The C++ kernel gives exactly 0, because it sums delta in the same order as dP.
    """
    q, k, v, dout = inputs(2, 2, 80, 80, 20, dtype=dtype, device=device)
    out, dq, dk, dv = run(q, k, v, dout, window=1)
    assert torch.equal(out, v)
    torch.testing.assert_close(dv, dout)
    for grad in (dq, dk):
        assert grad.abs().max() <= (0 if implementation == "cpp" else 1e-2)


def padding(device):
    """Return (options, True where k and v are padding [B, S]) for each kind of padding."""
    j = torch.arange(100, device=device)
    lengths = torch.tensor([70, 33], device=device)
    key_mask = j >= torch.tensor([[20], [67]], device=device)
    holes = torch.rand(2, 100, device=device) > 0.3
    return {
        "lengths": ({"lengths": lengths}, j >= lengths[:, None]),
        "key_mask": ({"key_mask": key_mask}, ~key_mask),
        "holes": ({"key_mask": holes, "causal": False}, ~holes),
    }


@pytest.mark.parametrize(
    ("content", "dtype"),
    [
        (1e4, torch.float32),
        (float("inf"), torch.float16),
        (float("nan"), torch.bfloat16),
        (float("nan"), torch.float32),
    ],
    ids=str,
)
@pytest.mark.parametrize("name", padding("cpu"))
def test_what_padding_contains_changes_nothing(name, content, dtype, device):
    """The values of keys that `lengths` or `key_mask` hide change no bit of output and gradients."""
    q, k, v, dout = inputs(2, 2, 100, 100, 16, dtype=dtype, device=device)
    options, padded = padding(device)[name]
    before = run(q, k, v, dout, **options)
    padded = padded[:, None, :, None].expand_as(k)
    spoiled = (x.detach().masked_fill(padded, content).requires_grad_() for x in (k, v))
    after = run(q, *spoiled, dout, **options)
    assert all_equal(before, after)
    assert all((grad[padded] == 0).all() for grad in after[2:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_follows_the_last_packed_sequence_changes_nothing(dtype, device):
    q, k, v, dout = inputs(1, 2, 100, 100, 16, dtype=dtype, device=device)
    cu_seqlens = torch.tensor([0, 30, 70], device=device)
    before = run(q, k, v, dout, cu_seqlens=cu_seqlens)
    spoiled = [x.detach().clone() for x in (q, k, v, dout)]
    for x in spoiled:
        x[:, :, 70:] = float("nan")
    after = run(*(x.requires_grad_() for x in spoiled[:3]), spoiled[3], cu_seqlens=cu_seqlens)
    assert all_equal(before, after)


@pytest.mark.parametrize("heads", [1, 9], ids=["few_heads", "many_heads"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_and_any_number_of_threads_agree_bit_for_bit(
    heads, dtype, device, implementation, threads, thread_counts
):
    """With few heads the kernel splits each head among the threads. With many heads it does not."""
    T, heads = (140, min(2, heads)) if implementation == "triton" else (300, heads)
    tensors = inputs(1, heads, T, T, 32, dtype=dtype, device=device)
    options = {"dropout_p": 0.1, "seed": seed_on(device), "window": 90}
    threads(1)
    first = run(*tensors, **options)
    for count in thread_counts:
        threads(count)
        assert all_equal(first, run(*tensors, **options)), f"{count} threads"


@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param((0, 2, 5, 5, 8), {}, id="no_batch"),
        pytest.param((2, 0, 5, 5, 8), {}, id="no_heads"),
        pytest.param((2, 2, 0, 5, 8), {}, id="no_queries"),
        pytest.param((2, 2, 5, 0, 8), {"causal": False}, id="no_keys"),
        pytest.param((2, 2, 0, 0, 8), {}, id="nothing"),
    ],
)
def test_empty(shape, options, device):
    """With a size of zero, every value that output and gradients have is 0."""
    for grad in run(*inputs(*shape, device=device), **options):
        assert (grad == 0).all()


# ---- dropout ---------------------------------------------------------------------------------------------------------


def kept(device, T, S, causal, H=2, B=2, **options):
    """Return the weights [B, H, T, S] of uniform attention after dropout. They are the output if v is an identity."""
    q = torch.zeros(B, H, T, S, device=device)
    v = torch.eye(S, device=device).expand(B, H, S, S)
    return ops.attention(q, torch.zeros_like(v), v, causal=causal, **options)


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.5, 0.99, 1 - 1e-6])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_dropout_mask_is_the_references(p, causal, device):
    """The kernel keeps exactly the weights that the reference keeps, multiplied by the exact scale."""
    T, S, seed = 75, 101, seed_on(device, -987654321987)
    weights = kept(device, T, S, causal, dropout_p=p, seed=seed, site=7)
    heads = torch.arange(4, device=device).view(2, 2)
    keep = reference.dropout_keep_matrix(seed, 7, heads, T, S, p)
    allowed = torch.ones(T, S, device=device).tril(S - T if causal else S)
    assert torch.equal(weights != 0, keep & (allowed > 0))
    uniform = allowed / allowed.sum(-1, keepdim=True)
    torch.testing.assert_close(weights, keep * uniform * reference.dropout_scale(p), rtol=1e-6, atol=0)


def test_dropout_of_packed_sequences_counts_within_them(device):
    starts, p, seed = [0, 20, 20, 97, 130], 0.3, seed_on(device)
    weights = kept(device, 130, 130, True, B=1, cu_seqlens=torch.tensor(starts, device=device), dropout_p=p, seed=seed)
    for n, (first, last) in enumerate(itertools.pairwise(starts)):
        heads = torch.tensor([[n * 2, n * 2 + 1]], device=device)
        keep = reference.dropout_keep_matrix(seed, 0, heads, last - first, last - first, p)
        assert torch.equal(weights[:, :, first:last, first:last] != 0, keep.tril())


def test_backward_drops_what_forward_dropped(device):
    """If dout is an identity, dv must equal the transposed weights of forward."""
    T, seed = 130, seed_on(device)
    weights = kept(device, T, T, True, dropout_p=0.4, seed=seed, site=3)
    q, k, v, _ = inputs(2, 2, T, T, T, device=device)
    identity = torch.eye(T, device=device).expand(2, 2, T, T)
    _, _, _, dv = run(q * 0, k * 0, v, identity, dropout_p=0.4, seed=seed, site=3)
    torch.testing.assert_close(dv, weights.mT, rtol=1e-6, atol=1e-9)
    assert torch.equal(dv != 0, weights.mT != 0)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_dropout_numerics(dtype, device):
    """Test forward and backward with dropout alone, and with dropout and all masks."""
    for p, extra in ((0.1, {}), (0.6, masks(device)["all_of_them"])):
        options = {"dropout_p": p, "seed": seed_on(device), "site": 2**32 - 1} | extra
        check(*inputs(2, 3, 100, 100, 32, dtype=dtype, device=device), **options)


def test_dropout_draws_from_torchs_generator(device):
    q, k, v, _ = inputs(1, 2, 20, 20, 8, device=device)

    def draw(value):
        torch.manual_seed(value)
        return ops.attention(q, k, v, dropout_p=0.5)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


# ---- layout ----------------------------------------------------------------------------------------------------------

VIEWS = [
    pytest.param(lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), id="heads_after_tokens"),
    pytest.param(
        lambda x: torch.stack((x, x, x), 3).transpose(1, 2).contiguous().transpose(1, 2)[:, :, :, 1], id="packed"
    ),
    pytest.param(lambda x: x.mT.contiguous().mT, id="transposed_elements"),
    pytest.param(lambda x: x[:, :1].expand(-1, 3, -1, -1), id="expanded_heads"),
    pytest.param(lambda x: x[:, :, :1].expand(-1, -1, 70, -1), id="expanded_tokens"),
    pytest.param(lambda x: x[..., :1].expand(-1, -1, -1, 20), id="expanded_elements"),
    pytest.param(lambda x: x.repeat(1, 1, 1, 2)[..., 3:23], id="part_of_the_elements"),
    pytest.param(lambda x: x.repeat(1, 1, 2, 1)[:, :, ::2], id="every_other_token"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("view", VIEWS)
def test_strides(view, dtype, device):
    """Views of q, k, v and the upstream gradient give the same bits as contiguous copies."""
    *tensors, dout = inputs(2, 3, 70, 70, 20, dtype=dtype, device=device)
    viewed = [view(x.detach()).requires_grad_() for x in tensors]
    dout = view(dout)
    assert not all(x.is_contiguous() for x in (*viewed, dout))
    copies = (x.detach().contiguous().requires_grad_() for x in viewed)
    assert all_equal(run(*viewed, dout), run(*copies, dout.contiguous()))


def test_what_lies_between_the_rows_changes_nothing(device):
    """Rows of 20 elements lie in a buffer of NaN. No value past the end of a row is used."""
    tensors = inputs(1, 2, 150, 150, 20, device=device)
    surrounded = []
    for x in tensors:
        base = torch.full((*x.shape[:3], 40), torch.nan, device=device)
        surrounded.append(base[..., 3:23].copy_(x.detach()).requires_grad_(x.requires_grad))
    assert all_equal(run(*tensors), run(*surrounded))


def test_strided_masks(device):
    q, k, v, dout = inputs(2, 3, 70, 70, 8, device=device)
    mask = torch.rand(2, 70, 140, 3, device=device)[:, :, ::2].permute(0, 3, 2, 1) > 0.5
    key_mask = torch.rand(70, 4, device=device)[:, ::2].t() > 0.3
    lengths = torch.tensor([70, 9, 33, 9], device=device)[::2]
    options = {"mask": mask, "key_mask": key_mask, "lengths": lengths}
    assert not any(x.is_contiguous() for x in options.values())
    assert all_equal(
        run(q, k, v, dout, **options), run(q, k, v, dout, **{name: x.contiguous() for name, x in options.items()})
    )


def test_merging_the_heads_is_a_view(device):
    q, k, v, dout = inputs(2, 3, 20, 20, 8, device=device)
    for x in run(q, k, v, dout):
        assert x.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_packed_projection(dtype, layout, device):
    """`attention_qkv` gives the bits of `attention` on its three parts, and one gradient for the packed tensor."""
    B, T, H, D = 2, 70, 3, 20
    qkv = torch.randn(B, T, 3 * H * D, device=device).to(dtype)
    if layout == "strided":
        qkv = qkv.mT.contiguous().mT
    qkv.requires_grad_()
    dout = torch.randn(B, T, H * D, device=device).to(dtype)
    options = {"dropout_p": 0.1, "seed": seed_on(device), "lengths": torch.tensor([50, 70], device=device)}
    out = ops.attention_qkv(qkv, H, **options)
    (dqkv,) = torch.autograd.grad(out, qkv, dout)
    assert out.shape == (B, T, H * D) and dqkv.is_contiguous()

    parts = qkv.detach().unflatten(2, (3, H, D)).permute(2, 0, 3, 1, 4)
    wanted = run(*(x.requires_grad_() for x in parts.unbind(0)), dout.unflatten(2, (H, D)).transpose(1, 2), **options)
    assert torch.equal(out, wanted[0].transpose(1, 2).flatten(2))
    assert torch.equal(dqkv, torch.stack(wanted[1:], 0).permute(1, 3, 0, 2, 4).flatten(2))


@pytest.mark.parametrize("dim", [0, 1, 2, 3], ids=["batch", "heads", "tokens", "elements"])
def test_offsets_beyond_2_to_the_31(dim, device, implementation, far_apart):
    """Distances beyond 2^31 lie between batches, heads, tokens or elements of every input and of the dense mask."""
    if dim == 3 and implementation == "triton":
        pytest.skip("the offset of an element in its row has 32 bits")
    shape = [2, 2, 20, 20, 16] if dim < 2 else [1, 1, 130, 130, 16]
    *tensors, dout = inputs(*shape, dtype=torch.bfloat16, device=device)
    mask = torch.rand(shape[:4], device=device) > 0.3
    near = run(*tensors, dout, mask=mask)
    far = run(*(far_apart(x, dim) for x in (*tensors, dout)), mask=far_apart(mask, dim))
    assert all_equal(near, far)


def test_tensors_that_share_memory(device):
    """If q, k and v are one tensor, its gradient is the sum of the three gradients."""
    x, _, _, dout = inputs(1, 2, 40, 40, 16, device=device)
    (got,) = torch.autograd.grad(ops.attention(x, x, x), x, dout)
    parts = run(*(x.detach().clone().requires_grad_() for _ in range(3)), dout)[1:]
    torch.testing.assert_close(got, sum(parts))


# ---- the operator in PyTorch: opcheck, compile, autocast, autograd ---------------------------------------------------


def in_order(dropout_p=0.0, seed=None, causal=True, window=None, scale=0.25, **tensors):
    named = (tensors.get(name) for name in ("lengths", "key_mask", "mask", "cu_seqlens"))
    return *named, causal, window, dropout_p, seed, 0, scale


@pytest.mark.parametrize("name", ["causal", "dropout", "all_of_them"])
def test_opcheck(name, device):
    """Check the operators' schemas, fake kernels and autograd registration."""
    q, k, v, dout = (x.detach() for x in inputs(2, 3, 20, 20, 8, device=device))
    drop = {"dropout_p": 0.2, "seed": seed_on(device)}
    options = in_order(**{"causal": {}, "dropout": drop, "all_of_them": masks(device, 20, 20)["all_of_them"]}[name])
    out, lse = torch.ops.gpt_fast.attention_forward(q, k, v, *options)
    torch.library.opcheck(torch.ops.gpt_fast.attention_forward.default, (q, k, v, *options))
    torch.library.opcheck(torch.ops.gpt_fast.attention_backward.default, (dout, q, k, v, out, lse, *options))
    qkv = torch.randn(2, 20, 72, device=device)
    torch.library.opcheck(torch.ops.gpt_fast.attention_qkv_backward.default, (dout, qkv, 3, out, lse, *options))


def test_log_sum_exp_is_saved(device):
    """The forward operator saves the natural logarithm of each row's sum of exponentials, or +inf without keys."""
    q, k, v, _ = (x.detach() for x in inputs(2, 2, 50, 50, 16, device=device))
    lengths = torch.tensor([0, 30], device=device)
    _, lse = torch.ops.gpt_fast.attention_forward(q, k, v, *in_order(lengths=lengths, causal=False))
    assert lse.dtype == torch.float32 and (lse[0] == torch.inf).all()
    wanted = (q[1].double() @ k[1, :, :30].double().mT * 0.25).logsumexp(-1)
    torch.testing.assert_close(lse[1].double(), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_fullgraph(dynamic, device):
    """Forward and backward compile to one graph and give the bits of eager mode."""

    def function(q, k, v, qkv, lengths, seed):
        first = ops.attention(q, k, v, lengths=lengths, dropout_p=0.2, seed=seed)
        return first, ops.attention_qkv(qkv, 2, window=9)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for T in (20, 33):
        q, k, v, dout = inputs(2, 2, T, T, 16, device=device)
        qkv = torch.randn(2, T, 96, device=device, requires_grad=True)
        arguments = q, k, v, qkv, torch.tensor([T, 7], device=device), seed_on(device)
        upstream = dout, torch.randn(2, T, 32, device=device)
        got, wanted = (f(*arguments) for f in (compiled, function))
        assert all_equal(got, wanted)
        assert all_equal(*(torch.autograd.grad(outs, (q, k, v, qkv), upstream) for outs in (got, wanted)))


def test_autocast(device):
    """Autocast casts the inputs of the op. It changes nothing inside the kernel."""
    q, k, v, dout = inputs(1, 2, 40, 40, 16, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = ops.attention(q, k, v)
        packed = ops.attention_qkv(torch.randn(2, 10, 48, device=device), 2)
    assert out.dtype == packed.dtype == torch.bfloat16
    got = torch.autograd.grad(out, (q, k, v), dout.bfloat16())
    assert torch.equal(out, ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    assert all(grad.dtype == torch.float32 for grad in got)
    with torch.autocast(device, dtype=torch.bfloat16):
        raw, _ = torch.ops.gpt_fast.attention_forward(q.detach(), k.detach(), v.detach(), *in_order())
    assert torch.equal(raw, ops.attention(q, k, v))


def test_the_expected_implementation_ran(device, check_implementation):
    q, k, v, dout = inputs(1, 1, 8, 8, 8, device=device)
    check_implementation("attention", lambda: run(q, k, v, dout))


def test_the_reference_serves_on_request_and_for_float64(device, monkeypatch):
    calls = []
    definition = reference.attention
    monkeypatch.setattr(reference, "attention", lambda *a, **o: (calls.append(a), definition(*a, **o))[1])
    q, k, v, _ = inputs(1, 1, 8, 8, 8, device=device)
    with gpt_fast.use_reference():
        ops.attention(q, k, v)
    assert len(calls) == 1
    ops.attention(q.double(), k.double(), v.double())
    assert len(calls) == 2


def test_inputs_are_left_alone(device):
    tensors = inputs(2, 2, 40, 40, 16, device=device)
    before = [x.detach().clone() for x in tensors]
    run(*tensors, dropout_p=0.1)
    assert all_equal(before, [x.detach() for x in tensors])


def test_double_backward_says_that_it_is_not_there(device):
    q, k, v, _ = inputs(1, 1, 8, 8, 8, device=device)
    (dq,) = torch.autograd.grad(ops.attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention: double backward"):
        dq.sum().backward()
    qkv = torch.randn(1, 8, 24, device=device, requires_grad=True)
    (dqkv,) = torch.autograd.grad(ops.attention_qkv(qkv, 1).square().sum(), qkv, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention_qkv: double backward"):
        dqkv.sum().backward()


def test_the_reference_is_torchs_attention():
    """The reference agrees with PyTorch's attention in float64, and its first and second derivatives are correct."""
    q, k, v, _ = inputs(1, 2, 9, 9, 5, dtype=torch.float64)
    torch.testing.assert_close(
        reference.attention(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True), rtol=1e-12, atol=1e-12
    )
    mask = torch.rand(9, 9) > 0.3
    mask[:, 0] = True
    torch.testing.assert_close(
        reference.attention(q, k, v, mask=mask, causal=False, scale=0.7),
        F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=0.7), rtol=1e-12, atol=1e-12,
    )  # fmt: skip
    q, k, v, _ = inputs(1, 1, 4, 4, 2, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, window=3), (q, k, v))
    assert torch.autograd.gradgradcheck(lambda *x: ops.attention(*x, window=3), (q, k, v))


def peak_of(function: Callable, device: str) -> int:
    """Return the peak number of bytes that a call of `function` allocates."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to the resident memory of now

    def kilobytes(name: str) -> int:
        return int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text()).group(1))

    before = kilobytes("VmRSS")
    function()
    return (kilobytes("VmHWM") - before) * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read from /proc")
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_memory_is_linear_in_the_length(dropout_p, device, implementation):
    """Forward and backward of 8192 tokens take less than 32 MiB. A [T, S] matrix of bytes would take 64 MiB."""
    if implementation == "triton" and device == "cpu":
        pytest.skip("the interpreter's own memory is what would be measured, for minutes")
    tensors = inputs(1, 1, 8192, 8192, 16, device=device)
    options = {"window": 3000, "dropout_p": dropout_p, "seed": seed_on(device)}
    run(*(x[:, :, :64].detach().requires_grad_() for x in tensors), **options)
    assert peak_of(lambda: run(*tensors, **options), device) < 32 * 2**20


# ---- bad input -------------------------------------------------------------------------------------------------------

LONG = torch.tensor
BAD_INPUT = [
    pytest.param(lambda q, k, v: ((q[0], k, v), {}), r"q has shape \[3, 10, 8\]; expected \[B, H, T, D\]", id="q_3d"),
    pytest.param(lambda q, k, v: ((q, k[:, :1], v), {}), r"k has shape \[2, 1, 12, 8\]", id="k_heads"),
    pytest.param(lambda q, k, v: ((q, k, v[:, :, 1:]), {}), r"v has shape \[2, 3, 11, 8\]", id="v_keys"),
    pytest.param(lambda q, k, v: ((q.long(), k, v), {}), "q has dtype int64", id="dtype"),
    pytest.param(lambda q, k, v: ((q, k.half(), v), {}), "k has dtype float16", id="mixed_dtypes"),
    pytest.param(lambda q, k, v: ((q, k, v.to("meta")), {}), "v on meta", id="mixed_devices"),
    pytest.param(lambda q, k, v: ([x.repeat(1, 1, 1, 33) for x in (q, k, v)], {}), "head size is 264", id="head_size"),
    pytest.param(lambda q, k, v: ([x[..., :0] for x in (q, k, v)], {}), "head size is 0", id="no_head_size"),
    pytest.param(lambda q, k, v: ((k, q, q), {}), "12 queries and 10 keys", id="more_queries_than_keys"),
    pytest.param(lambda q, k, v: ((q, k, v), {"lengths": LONG([3])}), r"lengths has shape \[1\]", id="lengths_shape"),
    pytest.param(lambda q, k, v: ((q, k, v), {"lengths": LONG([3.0, 4.0])}), "lengths has dtype", id="lengths_dtype"),
    pytest.param(lambda q, k, v: ((q, k, v), {"lengths": LONG([3, 13])}), "lengths holds 13", id="length_too_long"),
    pytest.param(lambda q, k, v: ((q, k, v), {"lengths": LONG([-1, 3])}), "lengths holds -1", id="length_negative"),
    pytest.param(lambda q, k, v: ((q, k, v), {"key_mask": LONG([[True]])}), r"key_mask has shape", id="key_mask_shape"),
    pytest.param(lambda q, k, v: ((q, k, v), {"key_mask": torch.ones(2, 12)}), "key_mask has dtype", id="key_float"),
    pytest.param(lambda q, k, v: ((q, k, v), {"mask": LONG([True] * 5)}), r"mask has shape \[5\]", id="mask_shape"),
    pytest.param(lambda q, k, v: ((q, k, v), {"mask": torch.ones(10, 12)}), "mask has dtype float32", id="mask_dtype"),
    pytest.param(lambda q, k, v: ((q, k, v), {"cu_seqlens": LONG([0, 5])}), "cu_seqlens of shape", id="packed_batch"),
    pytest.param(lambda q, k, v: ((k[:1],) * 3, {"cu_seqlens": LONG([1, 5])}), r"cu_seqlens is \[1", id="packed_start"),
    pytest.param(lambda q, k, v: ((k[:1],) * 3, {"cu_seqlens": LONG([0, 5, 4])}), r"\[0, 5, 4\]", id="packed_falls"),
    pytest.param(lambda q, k, v: ((k[:1],) * 3, {"cu_seqlens": LONG([0, 13])}), "cu_seqlens holds 13", id="packed_end"),
    pytest.param(lambda q, k, v: ((q, k, v), {"window": 0}), "window is 0", id="window"),
    pytest.param(lambda q, k, v: ((q, k, v), {"scale": float("nan")}), "scale is nan", id="scale"),
    pytest.param(lambda q, k, v: ((q, k, v), {"scale": float("-inf")}), "scale is -inf", id="scale_infinite"),
    pytest.param(lambda q, k, v: ((q, k, v), {"dropout_p": 1.0}), "dropout_p is 1.0", id="dropout_one"),
    pytest.param(lambda q, k, v: ((q, k, v), {"dropout_p": -0.1}), "dropout_p is -0.1", id="dropout_negative"),
    pytest.param(lambda q, k, v: ((q, k, v), {"dropout_p": 0.1, "seed": 5}), "seed is of type int", id="seed"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), BAD_INPUT)
def test_bad_input(spoil, message, device):
    """Each ValueError names the op and the value, and the op works afterwards."""
    gpt_fast.check_values(True)
    q = torch.randn(2, 3, 10, 8, device=device)
    k, v = (torch.randn(2, 3, 12, 8, device=device) for _ in range(2))
    tensors, options = spoil(q, k, v)
    options = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    with pytest.raises(ValueError, match=f"gpt_fast.attention: .*{message}"):
        ops.attention(*tensors, **options)
    assert ops.attention(q, k, v).isfinite().all()


def test_bad_packed_projection(device):
    for shape, heads, message in (
        ((2, 5, 20), 2, "a multiple of num_heads = 2"),
        ((2, 5), 1, r"expected \[B, T, 3C\]"),
    ):
        with pytest.raises(ValueError, match=f"attention_qkv: qkv has shape .*{message}"):
            ops.attention_qkv(torch.randn(shape, device=device), heads)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        pytest.param({"lengths": [3, 41]}, "lengths holds 41", id="length_too_long"),
        pytest.param({"lengths": [-2, 3]}, "lengths holds -2", id="length_negative"),
        pytest.param({"cu_seqlens": [0, 41]}, "cu_seqlens holds 41", id="packed_end"),
        pytest.param({"cu_seqlens": [0, 9, 8]}, "cu_seqlens holds 8 after 9", id="packed_falls"),
        pytest.param({"cu_seqlens": [-1, 8]}, "cu_seqlens starts at -1", id="packed_start"),
    ],
)
def test_values_out_of_range_inside_the_kernel(options, message, implementation):
    """The CPU kernel validates the values itself, because the public function does not under torch.compile."""
    if implementation != "cpp":
        pytest.skip("CUDA kernels clamp instead")
    B = 1 if "cu_seqlens" in options else 2
    q = torch.randn(B, 2, 40, 8)
    options = {name: torch.tensor(value) for name, value in options.items()}
    with pytest.raises(ValueError, match=f"gpt_fast.attention: {message}"):
        torch.ops.gpt_fast.attention_forward(q, q, q, *in_order(**options))
    assert ops.attention(q, q, q).isfinite().all()


@pytest.mark.parametrize(
    ("wild", "tame"),
    [
        pytest.param({"lengths": [1000, -5]}, {"lengths": [40, 0]}, id="lengths"),
        pytest.param({"cu_seqlens": [0, 9, 2**33]}, {"cu_seqlens": [0, 9, 40]}, id="packed_end"),
        pytest.param({"cu_seqlens": [-8, 9, 40]}, {"cu_seqlens": [0, 9, 40]}, id="packed_start"),
    ],
)
def test_values_out_of_range_read_nothing_out_of_bounds(wild, tame, device, implementation):
    """Triton kernels clamp values that were not validated to the valid range, forward and backward."""
    if implementation != "triton":
        pytest.skip("the C++ kernel raises")
    B = 1 if "cu_seqlens" in wild else 2
    q, dout = torch.randn(2, B, 2, 40, 8, device=device)
    results = []
    for values in (wild, tame):
        options = in_order(**{name: torch.tensor(value, device=device) for name, value in values.items()})
        out, lse = torch.ops.gpt_fast.attention_forward(q, q, q, *options)
        results.append((out, lse, *torch.ops.gpt_fast.attention_backward(dout, q, q, q, out, lse, *options)))
    assert all_equal(*results)
