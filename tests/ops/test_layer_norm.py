"""Test layer_norm against the float64 reference: the C++ kernel, Triton in the interpreter and Triton on CUDA."""

import contextlib
import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import forward_ad

import gpt_fast
from gpt_fast import ops, reference
from gpt_fast.layers import LayerNorm
from tests import numerics
from tests.conftest import PRODUCT_DTYPES

EPS = 1e-5

SHAPES = [
    pytest.param((1, 1), id="one_value"),
    pytest.param((1, 768), id="one_row"),
    pytest.param((5, 1), id="one_column"),
    pytest.param((4, 64), id="power_of_two"),
    pytest.param((7, 33), id="off_powers_of_two"),
    pytest.param((17, 129), id="one_past_a_block"),
    pytest.param((2, 3, 5, 48), id="four_dimensions"),
    pytest.param((40,), id="one_dimension"),
    pytest.param((70, 768), id="gpt2_width"),
    pytest.param((9, 1600), id="gpt2_xl_width"),
    pytest.param((3, 5000), id="wide"),
]


def sample_inputs(shape, dtype, device, *, weight=True, bias=True, parameter_dtype=None):
    C = shape[-1]
    x = torch.randn(shape, device=device).mul(2).add(0.5).to(dtype).requires_grad_()
    parameters = []
    for wanted, offset in ((weight, 1.0), (bias, 0.0)):
        value = (torch.randn(C, device=device) * 0.5 + offset).to(parameter_dtype or dtype).requires_grad_()
        parameters.append(value if wanted else None)
    return x, *parameters


def check(x, weight, bias, eps=EPS):
    """Compare forward and backward, with a random upstream gradient, with the reference in float64."""
    y = ops.layer_norm(x, weight, bias, eps)
    assert y.dtype == x.dtype
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    inputs = [tensor for tensor in (x, weight, bias) if tensor is not None]
    grads = dict(zip(("dx", "dweight", "dbias"), torch.autograd.grad(y, inputs, dy), strict=False))

    xd, wd, bd = (numerics.exact(tensor) for tensor in (x, weight, bias))
    yd = reference.layer_norm(xd, wd, bd, eps)
    exact_inputs = [tensor for tensor in (xd, wd, bd) if tensor is not None]
    exact = dict(zip(grads, torch.autograd.grad(yd, exact_inputs, dy.double()), strict=True))

    # A normalised value may be off by `delta`. The tolerance of each result follows from its formula.
    delta = numerics.norm_conditioning(x.detach(), eps)
    gain = torch.ones_like(xd[..., :]) if wd is None else wd.detach().expand_as(xd)
    numerics.assert_rounded_once(y, yd.detach(), conditioning=delta * gain.abs(), label="y")
    xhat = reference.layer_norm(xd.detach(), None, None, eps)
    rstd = (xd.detach().var(-1, keepdim=True, unbiased=False) + eps).rsqrt()
    g = (dy.double() * gain).abs().amax(-1, keepdim=True)
    numerics.assert_rounded_once(grads["dx"], exact["dx"], conditioning=delta * rstd * g * (1 + xhat.abs()), label="dx")
    if weight is not None:
        summed = (dy.double().abs() * delta).reshape(-1, x.shape[-1]).sum(0)
        numerics.assert_rounded_once(grads["dweight"], exact["dweight"], conditioning=summed, label="dweight")
    if bias is not None:
        summed = numerics.sum_conditioning(dy.reshape(-1, x.shape[-1]))
        numerics.assert_rounded_once(grads["dbias"], exact["dbias"], conditioning=summed, label="dbias")


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_numerics(shape, dtype, device):
    check(*sample_inputs(shape, dtype, device))


def test_the_widest_rows(device, implementation):
    """Rows may have 65,536 columns. Triton, which keeps a row in registers, refuses wider rows.

    Only the forward pass runs, because in the interpreter the sums over rows would take 20 seconds.
    """
    x, weight, bias = (tensor.detach() for tensor in sample_inputs((2, 65536), torch.bfloat16, device))
    exact = reference.layer_norm(x.double(), weight.double(), bias.double(), EPS)
    delta = numerics.norm_conditioning(x, EPS) * weight.double().abs()
    numerics.assert_rounded_once(ops.layer_norm(x, weight, bias, EPS), exact, conditioning=delta)
    x = torch.zeros(1, 65537, device=device)
    if implementation == "triton":
        with pytest.raises(ValueError, match=r"layer_norm: rows have 65537 columns; expected at most 65536"):
            ops.layer_norm(x)
    else:
        assert (ops.layer_norm(x) == 0).all()


def test_several_tiles_a_program(device, implementation, monkeypatch):
    """There are more rows than the programs of the backward kernel take at once, so each program's loop iterates."""
    if implementation != "triton":
        pytest.skip("a launch configuration of the Triton kernel")
    kernel = importlib.import_module("gpt_fast.kernels.layer_norm")
    shipped = kernel.config
    monkeypatch.setattr(kernel, "config", lambda *a: shipped(*a)._replace(bwd_programs=2))
    check(*sample_inputs((70, 200), torch.float32, device))


@pytest.mark.parametrize(
    ("weight", "bias"),
    [pytest.param(True, False, id="no_bias"), pytest.param(False, False, id="no_parameters")],
)
def test_without_parameters(weight, bias, device):
    check(*sample_inputs((6, 70), torch.float32, device, weight=weight, bias=bias))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_float32_parameters_with_half_input(dtype, device):
    """Autocast leaves the parameters in float32. The output has x's dtype, and each gradient that of its tensor."""
    check(*sample_inputs((6, 70), dtype, device, parameter_dtype=torch.float32))


@pytest.mark.parametrize(
    ("mean", "std"),
    [
        pytest.param(1000.0, 1.0, id="mean_far_above_std"),
        pytest.param(3.0, 1e-4, id="nearly_constant"),
        pytest.param(0.0, 1e-6, id="variance_below_eps"),
        pytest.param(0.0, 1e4, id="large"),
    ],
)
def test_conditioning(mean, std, device):
    _, weight, bias = sample_inputs((8, 96), torch.float32, device)
    x = (torch.randn(8, 96, device=device, dtype=torch.float64) * std + mean).float().requires_grad_()
    check(x, weight, bias)


CONSTANTS = (1234.567, -1e5, 0.1, 7e-3, 3.0)


@pytest.mark.parametrize("N", [1, 2, 3, 7, 50, 257, 768, 1000, 4100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_constant_rows_give_the_bias(N, dtype, device):
    """Constant rows give exactly the bias, although their mean rounds, and the weight's gradient is exactly 0."""
    x = torch.tensor(CONSTANTS, device=device).to(dtype).clamp(-6e4, 6e4)[:, None].repeat(1, N).requires_grad_()
    _, weight, bias = sample_inputs((3, N), dtype, device)
    expected = bias.detach().expand(len(CONSTANTS), N)
    y = ops.layer_norm(x, weight, bias)
    assert torch.equal(y, expected)
    (dweight,) = torch.autograd.grad(y, weight, torch.randn_like(y))
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(reference.layer_norm(x, weight, bias), expected)


def test_large_eps_counts(device):
    check(*sample_inputs((5, 40), torch.float32, device), eps=2.0)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, :, 8:72], id="part_of_the_columns"),
        pytest.param(lambda x: x[:, ::2], id="every_other_row"),
        pytest.param(lambda x: x.transpose(0, 1), id="transposed_rows"),
        pytest.param(lambda x: x.transpose(1, 2), id="transposed_columns"),
        pytest.param(lambda x: x[:1].expand(4, -1, -1), id="expanded_rows"),
        pytest.param(lambda x: x[..., :1].expand(-1, -1, 40), id="expanded_columns"),
    ],
)
def test_strided_input(view, device):
    base = torch.randn(4, 6, 80, device=device)
    x = view(base).detach().requires_grad_()
    _, weight, bias = sample_inputs(tuple(x.shape), torch.float32, device)
    y = ops.layer_norm(x, weight, bias)
    assert torch.equal(y, ops.layer_norm(x.detach().contiguous(), weight, bias))
    check(x, weight, bias)


@pytest.mark.parametrize(
    "upstream",
    [
        pytest.param(lambda dy: dy.t().contiguous().t(), id="transposed"),
        pytest.param(lambda dy: dy[:1, :1].expand_as(dy), id="expanded"),
        pytest.param(lambda dy: dy.repeat(1, 2)[:, : dy.shape[1]], id="part_of_the_columns"),
    ],
)
def test_strided_upstream_gradient(upstream, device):
    x, weight, bias = sample_inputs((6, 70), torch.float32, device)
    dy = upstream(torch.randn(6, 70, device=device))
    y = ops.layer_norm(x, weight, bias)
    got = torch.autograd.grad(y, (x, weight, bias), dy, retain_graph=True)
    wanted = torch.autograd.grad(y, (x, weight, bias), dy.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_strided_parameters(device):
    x, weight, bias = sample_inputs((6, 70), torch.float32, device)
    apart = torch.full((2, 70, 3), float("nan"), device=device)
    apart[0, :, 1], apart[1, :, 1] = weight.detach(), bias.detach()
    dy = torch.randn(6, 70, device=device)
    results = []
    for parameters in ((weight, bias), [row[:, 1].requires_grad_() for row in apart.unbind()]):
        y = ops.layer_norm(x, *parameters)
        results.append((y, *torch.autograd.grad(y, (x, *parameters), dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_2_to_the_31(device, far_apart):
    x, weight, bias = sample_inputs((130, 20), torch.bfloat16, device)
    dy = torch.randn(130, 20, device=device).bfloat16()
    results = []
    for rows, upstream in ((x, dy), (far_apart(x), far_apart(dy))):
        y = ops.layer_norm(rows, weight, bias)
        results.append((y, *torch.autograd.grad(y, (rows, weight, bias), upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_parameters_that_share_memory(device):
    x, weight, _ = sample_inputs((6, 70), torch.float32, device)
    (shared,) = torch.autograd.grad(ops.layer_norm(x, weight, weight).sum(), weight)
    bias = weight.detach().clone().requires_grad_()
    parts = torch.autograd.grad(ops.layer_norm(x, weight, bias).sum(), (weight, bias))
    torch.testing.assert_close(shared, sum(parts))


@pytest.mark.parametrize("shape", [(0, 16), (3, 0, 16), (0,), (3, 0)], ids=str)
def test_empty(shape, device):
    """Without rows the gradients of the parameters are 0. Without columns they are empty."""
    x, weight, bias = sample_inputs(shape, torch.float32, device)
    y = ops.layer_norm(x, weight, bias)
    dx, dweight, dbias = torch.autograd.grad(y, (x, weight, bias), torch.ones_like(y))
    assert y.shape == dx.shape == x.shape
    assert torch.equal(dweight, torch.zeros_like(weight))
    assert torch.equal(dbias, torch.zeros_like(bias))


@settings(max_examples=40, deadline=None)
@given(M=st.integers(1, 40), N=st.integers(1, 300), dtype=st.sampled_from(numerics.DTYPES), seed=st.integers(0, 999))
def test_any_shape(M, N, dtype, seed):
    torch.manual_seed(seed)
    check(*sample_inputs((M, N), dtype, "cpu"))


def test_two_runs_and_any_number_of_threads_agree_bit_for_bit(device, threads, thread_counts):
    x, weight, bias = sample_inputs((500, 200), torch.float32, device)
    dy = torch.randn(500, 200, device=device)

    def run():
        y = ops.layer_norm(x, weight, bias)
        return y, *torch.autograd.grad(y, (x, weight, bias), dy)

    threads(1)
    first = run()
    for count in thread_counts:
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{count} threads"


@pytest.mark.parametrize("frozen", ["x", "weight", "bias"])
def test_frozen_inputs(frozen, device):
    """The gradients of the other inputs do not change if one input requires no gradient."""
    inputs = dict(zip(("x", "weight", "bias"), sample_inputs((6, 70), torch.float32, device), strict=True))
    dy = torch.randn(6, 70, device=device)
    wanted = dict(zip(inputs, torch.autograd.grad(ops.layer_norm(*inputs.values()), inputs.values(), dy), strict=True))
    inputs[frozen].requires_grad_(False)
    trained = {name: tensor for name, tensor in inputs.items() if name != frozen}
    got = torch.autograd.grad(ops.layer_norm(*inputs.values()), trained.values(), dy)
    for name, grad in zip(trained, got, strict=True):
        assert torch.equal(grad, wanted[name]), name


def test_inputs_are_left_alone(device):
    x, weight, bias = sample_inputs((6, 70), torch.float32, device)
    before = [tensor.detach().clone() for tensor in (x, weight, bias)]
    ops.layer_norm(x, weight, bias).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, weight, bias), strict=True))


def test_the_expected_implementation_ran(device, check_implementation):
    inputs = sample_inputs((4, 8), torch.float32, device)
    check_implementation("layer_norm", lambda: ops.layer_norm(*inputs).sum().backward())


def test_the_reference_serves_on_request_and_for_float64(device, monkeypatch):
    calls = []
    definition = reference.layer_norm
    monkeypatch.setattr(reference, "layer_norm", lambda *a: (calls.append(a), definition(*a))[1])
    x, weight, bias = sample_inputs((4, 8), torch.float32, device)
    ops.layer_norm(x, weight, bias)  # makes the op remember its kernel, which the switch must override
    assert not calls
    with gpt_fast.use_reference():
        ops.layer_norm(x, weight, bias)
    assert len(calls) == 1
    ops.layer_norm(x.double(), weight.double(), bias.double())
    assert len(calls) == 2
    ops.layer_norm(x, weight, bias)
    assert len(calls) == 2


def test_opcheck(device):
    x, weight, bias = (tensor.detach() for tensor in sample_inputs((6, 70), torch.float32, device))
    y, mean, rstd = torch.ops.gpt_fast.layer_norm_forward(x, weight, bias, EPS)
    torch.library.opcheck(torch.ops.gpt_fast.layer_norm_forward.default, (x, weight, bias, EPS))
    torch.library.opcheck(torch.ops.gpt_fast.layer_norm_forward.default, (x.bfloat16(), None, None, EPS))
    torch.library.opcheck(torch.ops.gpt_fast.layer_norm_forward.default, (x, weight, bias, EPS, torch.bfloat16))
    for needs in ((True, True), (True, False), (False, False)):
        args = torch.randn_like(y), x, weight, mean, rstd, *needs
        torch.library.opcheck(torch.ops.gpt_fast.layer_norm_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_fullgraph(device, dynamic):
    x, weight, bias = sample_inputs((6, 70), torch.float32, device)
    compiled = torch.compile(ops.layer_norm, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 9):
        x = torch.randn(rows, 70, device=device, requires_grad=True)
        dy = torch.randn(rows, 70, device=device)
        wanted, got = ops.layer_norm(x, weight, bias), compiled(x, weight, bias)
        assert torch.equal(got, wanted)
        for a, b in zip(
            torch.autograd.grad(got, (x, weight, bias), dy), torch.autograd.grad(wanted, (x, weight, bias), dy),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(a, b)


def test_autocast_keeps_the_dtype_of_the_input(device):
    x, weight, bias = sample_inputs((6, 70), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        assert torch.equal(ops.layer_norm(x, weight, bias), ops.layer_norm(x.clone(), weight, bias))
        assert ops.layer_norm(x, weight, bias).dtype == torch.float32
        assert ops.layer_norm(x.bfloat16(), weight, bias).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_a_result_for_a_product_is_the_result_rounded(device, dtype, reference):
    """`_y_dtype`, which this library's blocks use, gives the bits of a cast after the norm, forward and backward."""
    inputs = sample_inputs((6, 70), torch.float32, device)
    dy = torch.randn(6, 70, device=device).to(dtype)
    with gpt_fast.use_reference() if reference else contextlib.nullcontext():
        narrow, wide = ops.layer_norm(*inputs, EPS, _y_dtype=dtype), ops.layer_norm(*inputs, EPS)
    assert torch.equal(narrow, wide.to(dtype))
    grads = torch.autograd.grad(narrow, inputs, dy), torch.autograd.grad(wide.to(dtype), inputs, dy)
    assert all(map(torch.equal, *grads))


def test_double_backward_says_that_it_is_not_there(device):
    x, weight, bias = sample_inputs((4, 8), torch.float32, device)
    (dx,) = torch.autograd.grad(ops.layer_norm(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="layer_norm: double backward"):
        dx.sum().backward()


@pytest.mark.filterwarnings("ignore:gpt_fast")
def test_forward_mode_keeps_tangents(device):
    """Forward mode runs the reference on every device. `test_transforms.py` tests it for all ops."""
    tensors = [tensor.detach() for tensor in sample_inputs((4, 8), torch.float32, device)]
    tangents = [torch.randn_like(tensor) for tensor in tensors]
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a, b) for a, b in zip(tensors, tangents, strict=True)]
        got = forward_ad.unpack_dual(ops.layer_norm(*duals)).tangent
    exact, along = ([tensor.double() for tensor in group] for group in (tensors, tangents))
    _, wanted = torch.func.jvp(lambda x, *affine: F.layer_norm(x, (8,), *affine), tuple(exact), tuple(along))
    torch.testing.assert_close(got, wanted.float())


def test_the_reference_is_torchs_layer_norm():
    """The reference agrees with PyTorch's layer_norm in float64, and its first and second derivatives are correct."""
    x, weight, bias = sample_inputs((5, 33), torch.float64, "cpu")
    assert torch.allclose(
        reference.layer_norm(x, weight, bias, EPS), F.layer_norm(x, (33,), weight, bias, EPS), rtol=1e-13, atol=1e-13
    )
    assert torch.autograd.gradcheck(ops.layer_norm, (x, weight, bias))
    assert torch.autograd.gradgradcheck(ops.layer_norm, (x, weight, bias))


def test_layer_has_the_stock_layers_constructor_and_state(device):
    stock = torch.nn.LayerNorm(24, eps=1e-3, bias=False, device=device)
    ours = LayerNorm(24, eps=1e-3, bias=False, device=device)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(3, 24, device=device)
    exact = F.layer_norm(x.double(), (24,), stock.weight.double(), None, 1e-3)
    numerics.assert_rounded_once(
        ours(x), exact.detach(), conditioning=numerics.norm_conditioning(x, 1e-3), label="LayerNorm"
    )
    with pytest.raises(ValueError, match="normalized_shape"):
        LayerNorm((3, 24))


BAD_INPUT = [
    pytest.param(lambda x, w, b: (x.long(), w, b), "x has dtype int64", id="dtype"),
    pytest.param(lambda x, w, b: (x, w[:-1], b), r"weight has shape \[7\]; expected \[8\]", id="weight_shape"),
    pytest.param(lambda x, w, b: (x, w, b[:7]), r"bias has shape \[7\]; expected \[8\]", id="bias_length"),
    pytest.param(lambda x, w, b: (x, w, b[:, None]), r"bias has shape \[8, 1\]; expected \[8\]", id="bias_shape"),
    pytest.param(lambda x, w, b: (x, None, b), "a bias and no weight", id="bias_alone"),
    pytest.param(lambda x, w, b: (x, w, b.half()), "bias has dtype float16; expected float32", id="mixed_parameters"),
    pytest.param(lambda x, w, b: (x, w.to("meta"), b), "weight on meta", id="mixed_devices"),
    pytest.param(lambda x, w, b: (x[0, 0], w, b), "x has no dimension", id="scalar"),
    pytest.param(lambda x, w, b: (x, w, b, 0.0), "eps is 0.0", id="zero_eps"),
    pytest.param(lambda x, w, b: (x, w, b, -1e-5), "eps is -1e-05", id="negative_eps"),
    pytest.param(lambda x, w, b: (x, w, b, float("nan")), "eps is nan", id="nan_eps"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_INPUT)
def test_bad_input(spoil, message, device):
    x, weight, bias = sample_inputs((4, 8), torch.float32, device)
    with pytest.raises(ValueError, match=f"layer_norm: .*{message}"):
        ops.layer_norm(*spoil(x, weight, bias))
