"""Test each op with every combination of its sizes at zero, forward and backward."""

import itertools

import pytest
import torch

from gpt_fast import ops, reference
from tests import numerics

DTYPES = [torch.float32, torch.bfloat16]


def leaf(dtype, device, *shape):
    return torch.randn(shape).to(device, dtype).requires_grad_()


def parameter(dtype, device, given, *shape):
    return leaf(dtype, device, *shape) if given else None


def with_zeros(**sizes):
    """Return every combination in which one or more of the sizes are zero."""
    choices = itertools.product(*((size, 0) for size in sizes.values()))
    return [
        pytest.param(*chosen, id="_".join(f"{name}{size}" for name, size in zip(sizes, chosen, strict=True)))
        for chosen in choices
        if 0 in chosen
    ]


def check(op, *args, **options):
    """Assert that outputs and gradients agree with the reference in float64."""
    truth = [numerics.exact(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
    own = options.pop("own", {})  # options that the op has and its reference does not
    outputs = as_tuple(getattr(ops, op)(*args, **options, **own))
    wanted_outputs = as_tuple(getattr(reference, op)(*truth, **options))
    upstream = [torch.randn_like(output) for output in outputs]
    got = [*outputs, *gradients(outputs, args, upstream)]
    wanted = [*wanted_outputs, *gradients(wanted_outputs, truth, [grad.double() for grad in upstream])]
    eps = max(torch.finfo(result.dtype).eps for result in got)
    for result, exact in zip(got, wanted, strict=True):
        assert result.shape == exact.shape
        if exact.numel():
            error = (result.detach().double() - exact.detach()).abs().max()
            assert error <= 16 * eps * exact.detach().abs().max()


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def gradients(outputs, args, upstream):
    leaves = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.requires_grad]
    upstream = [grad.to(output.dtype) for grad, output in zip(upstream, outputs, strict=True)]
    return torch.autograd.grad(outputs, leaves, upstream)


pytestmark = pytest.mark.parametrize("dtype", DTYPES, ids=str)
with_bias = pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])


@with_bias
@pytest.mark.parametrize(("M", "C"), with_zeros(M=3, C=5))
def test_layer_norm(M, C, bias, dtype, device):
    check("layer_norm", leaf(dtype, device, M, C), *(parameter(dtype, device, bias, C) for _ in range(2)))


@with_bias
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(("M", "C"), with_zeros(M=3, C=5))
def test_add_layer_norm(M, C, p, bias, dtype, device):
    streams = (leaf(dtype, device, M, C) for _ in range(2))
    parameters = (parameter(dtype, device, bias, C) for _ in range(2))
    check("add_layer_norm", *streams, *parameters, 1e-5, p, torch.tensor([7], device=device))


@with_bias
@pytest.mark.parametrize(("M", "C", "N"), with_zeros(M=3, C=5, N=4))
def test_linear(M, C, N, bias, dtype, device):
    tensors = leaf(dtype, device, M, C), leaf(dtype, device, N, C), parameter(dtype, device, bias, N)
    truth = [numerics.exact(tensor) for tensor in tensors]
    got, exact = ops.linear(*tensors), torch.nn.functional.linear(*truth)
    dy = torch.randn_like(got)
    got = [got, *gradients([got], tensors, [dy])]
    exact = [exact, *gradients([exact], truth, [dy])]
    for result, wanted in zip(got, exact, strict=True):
        assert result.shape == wanted.shape
        assert not (result.detach().double() - wanted.detach()).abs().gt(0.05).any()


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
@pytest.mark.parametrize("rows", [1, 3000], ids=["one_chunk", "several_chunks"])
def test_linear_without_rows_of_weight(rows, needs, dtype, device):
    """Test every choice of needed gradients, with rows of x for one chunk and for several."""
    tensors = leaf(dtype, device, rows, 5), leaf(dtype, device, 0, 5), leaf(dtype, device, 0)
    for tensor, needed in zip(tensors, needs, strict=True):
        tensor.requires_grad_(needed)
    y = ops.linear(*tensors)
    assert y.shape == (rows, 0)
    wanted = [tensor for tensor in tensors if tensor.requires_grad]
    if wanted:
        for tensor, gradient in zip(wanted, torch.autograd.grad(y, wanted, torch.randn_like(y)), strict=True):
            assert gradient.shape == tensor.shape
            assert not gradient.any()


@with_bias
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
@pytest.mark.parametrize(("M", "C", "F", "C_out"), with_zeros(M=3, C=5, F=4, C_out=6))
def test_mlp(M, C, F, C_out, activation, p, recompute, bias, dtype, device):
    tensors = (
        leaf(dtype, device, M, C), leaf(dtype, device, F, C), parameter(dtype, device, bias, F),
        leaf(dtype, device, C_out, F), parameter(dtype, device, bias, C_out),
    )  # fmt: skip
    check("mlp", *tensors, activation, p, torch.tensor([7], device=device), own={"recompute": recompute})


@with_bias
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("ignored", [False, True], ids=["counted", "ignored"])
@pytest.mark.parametrize(("N", "C", "V"), with_zeros(N=3, C=5, V=7))
def test_linear_cross_entropy(N, C, V, ignored, reduction, smoothing, bias, dtype, device):
    target = torch.full((N,), -100 if ignored else max(V - 1, 0), device=device)
    args = leaf(dtype, device, N, C), leaf(dtype, device, V, C), target, parameter(dtype, device, bias, V)
    options = {"label_smoothing": smoothing, "reduction": reduction}
    if N and not V and not ignored:
        with pytest.raises(ValueError, match="linear_cross_entropy: target holds 0"):
            ops.linear_cross_entropy(*args, **options)
        return
    check("linear_cross_entropy", *args, **options)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("given", [False, True], ids=["counted", "given"])
@pytest.mark.parametrize(("B", "T", "V", "P", "C"), with_zeros(B=2, T=3, V=5, P=4, C=6))
def test_embedding(B, T, V, P, C, given, p, dtype, device):
    tokens = torch.full((B, T), max(V - 1, 0), device=device)
    positions = torch.zeros_like(tokens) if given else None
    args = tokens, leaf(dtype, device, V, C), leaf(dtype, device, P, C), positions, p, torch.tensor([7], device=device)
    empty_table = (B and T and not V) or (T > P and not given) or (B and T and not P)
    if empty_table:
        with pytest.raises(ValueError, match=r"embedding: (tokens holds|positions holds|3 tokens in a row)"):
            ops.embedding(*args)
        return
    check("embedding", *args)


@pytest.mark.parametrize("option", ["plain", "causal", "masked", "dropout"])
@pytest.mark.parametrize(("B", "H", "T", "S", "D"), with_zeros(B=2, H=2, T=3, S=4, D=8))
def test_attention(B, H, T, S, D, option, dtype, device):
    tensors = leaf(dtype, device, B, H, T, D), *(leaf(dtype, device, B, H, S, D) for _ in range(2))
    options = {
        "plain": {"causal": False},
        "causal": {"causal": True},
        "masked": {
            "causal": False, "window": 2, "lengths": torch.full((B,), S, device=device),
            "key_mask": torch.ones(B, S, dtype=torch.bool, device=device),
            "mask": torch.ones(T, S, dtype=torch.bool, device=device),
        },
        "dropout": {"causal": False, "dropout_p": 0.5, "seed": torch.tensor([7], device=device)},
    }[option]  # fmt: skip
    if D == 0 or (option == "causal" and T > S):
        with pytest.raises(ValueError, match="head size is 0; expected 1 to 256|3 queries and 0 keys"):
            ops.attention(*tensors, **options)
        return
    check("attention", *tensors, **options)


@pytest.mark.parametrize(("B", "T", "C"), with_zeros(B=2, T=3, C=16))
def test_attention_qkv(B, T, C, dtype, device):
    qkv = leaf(dtype, device, B, T, 3 * C)
    if C == 0:
        with pytest.raises(ValueError, match="head size is 0; expected 1 to 256"):
            ops.attention_qkv(qkv, 2)
        return
    check("attention_qkv", qkv, 2)


@pytest.mark.parametrize("starts", [[0], [0, 0], [0, 0, 2, 2]], ids=str)
@pytest.mark.parametrize("T", [0, 3])
@pytest.mark.parametrize("H", [0, 2])
def test_attention_of_empty_sequences(H, T, starts, dtype, device):
    if starts[-1] > T:
        starts = [0] * len(starts)
    tensors = (leaf(dtype, device, 1, H, T, 8) for _ in range(3))
    check("attention", *tensors, cu_seqlens=torch.tensor(starts, device=device))


@pytest.mark.parametrize(("B", "H", "S", "D"), with_zeros(B=2, H=2, S=4, D=8))
def test_decode_attention(B, H, S, D, dtype, device):
    tensors = leaf(dtype, device, B, H, D), *(leaf(dtype, device, B, H, S, D) for _ in range(2))
    q, k, v = (tensor.detach() for tensor in tensors)
    lengths = torch.full((B,), S, device=device)
    if D == 0:
        with pytest.raises(ValueError, match="head size is 0; expected 1 to 256"):
            ops.decode_attention(q, k, v, lengths)
        return
    got = ops.decode_attention(q, k, v, lengths)
    exact = reference.decode_attention(q.double(), k.double(), v.double(), lengths)
    assert got.shape == exact.shape
    assert not (got.double() - exact).abs().gt(1e-2).any()
