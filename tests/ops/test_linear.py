"""Test linear against float64: the C++ kernel on CPU, and PyTorch's own product elsewhere."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt_fast
from gpt_fast import ops
from tests import numerics

# rows, C, N
SHAPES = [
    pytest.param((1, 48, 40), id="one_row"),
    pytest.param((40, 1, 50), id="one_column"),
    pytest.param((16, 64, 128), id="powers_of_two"),
    pytest.param((33, 40, 70), id="off_powers_of_two"),
    pytest.param((17, 65, 129), id="one_past_a_block"),
    pytest.param((1030, 33, 20), id="more_rows_than_a_chunk"),
    pytest.param((5, 1700, 20), id="long_sums"),
]


def sample_inputs(shape, dtype, device, *, bias=True, transposed=False):
    rows, C, N = shape
    rows = rows if isinstance(rows, tuple) else (rows,)
    weight = (torch.randn(N, C, device=device) * max(C, 1) ** -0.5).to(dtype)
    if transposed:
        weight = weight.t().contiguous().t()
    x = torch.randn(*rows, C, device=device).to(dtype)
    shift = torch.randn(N, device=device).to(dtype)
    return tuple(t.requires_grad_() for t in ((x, weight, shift) if bias else (x, weight)))


def gradients(function, inputs, dy):
    y = function(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, dy)]


def widened(x, weight, bias=None):
    """Compute the product in float32 and round it once, as the op's contract says."""
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


def check(inputs):
    x, weight = inputs[:2]
    dy = torch.randn(*x.shape[:-1], weight.shape[0], device=x.device).to(x.dtype)
    got = gradients(ops.linear, inputs, dy)
    truth = gradients(F.linear, [numerics.exact(tensor) for tensor in inputs], dy.double())
    yardstick = gradients(widened, inputs, dy)
    for label, a, b, c in zip(("y", "dx", "dweight", "dbias"), got, yardstick, truth, strict=False):
        numerics.assert_as_accurate(a, b, c, label=label)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_numerics(shape, dtype, device, implementation):
    if implementation != "cpp":
        pytest.skip("PyTorch's own product, whose rounding is PyTorch's")
    check(sample_inputs(shape, dtype, device))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(4, 40),
    C=st.integers(4, 80),
    N=st.integers(4, 150),
    bias=st.booleans(),
    transposed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape(rows, C, N, bias, transposed, seed):
    torch.manual_seed(seed)
    check(sample_inputs((rows, C, N), torch.float32, "cpu", bias=bias, transposed=transposed))


@pytest.mark.parametrize("rows", [20, 1100], ids=["one_chunk", "two_chunks"])
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_transposed_weights(dtype, rows, device):
    """A transposed weight gives the bits of a contiguous one, and its gradient has the weight's strides."""
    inputs = sample_inputs((rows, 24, 70), dtype, device, transposed=True)
    contiguous = [tensor.detach().contiguous().requires_grad_() for tensor in inputs]
    dy = torch.randn(rows, 70, device=device).to(dtype)
    got, wanted = (gradients(ops.linear, group, dy) for group in (inputs, contiguous))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert got[2].stride() == inputs[1].stride() and wanted[2].stride() == contiguous[1].stride()


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, :, 8:32], id="part_of_the_columns"),
        pytest.param(lambda x: x[:, ::2], id="every_other_row"),
        pytest.param(lambda x: x.transpose(1, 2), id="transposed"),
        pytest.param(lambda x: x[:1].expand(4, -1, -1), id="expanded_rows"),
        pytest.param(lambda x: x[..., :1].expand(-1, -1, 24), id="expanded_columns"),
    ],
)
def test_strided_input(view, device):
    x = view(torch.randn(4, 6, 40, device=device)).requires_grad_()
    _, weight, bias = sample_inputs((1, x.shape[-1], 50), torch.float32, device)
    contiguous = x.detach().contiguous().requires_grad_()
    for dy in (
        torch.randn(*x.shape[:-1], 50, device=device),
        torch.randn(1, 1, 1, device=device).expand(*x.shape[:-1], 50),
    ):
        got = gradients(ops.linear, (x, weight, bias), dy)
        wanted = gradients(ops.linear, (contiguous, weight, bias), dy.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("rows", [(0,), (3, 0)], ids=str)
def test_empty_batch(rows, device):
    inputs = sample_inputs((rows, 24, 40), torch.float32, device)
    y = ops.linear(*inputs)
    assert y.shape == (*rows, 40)
    for tensor, grad in zip(inputs, torch.autograd.grad(y, inputs, torch.ones_like(y)), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


def test_no_columns(device):
    """With C = 0 the product is 0, so the output is the bias."""
    x, weight, bias = sample_inputs((5, 0, 6), torch.float32, device)
    assert torch.equal(ops.linear(x, weight, bias), bias.expand(5, 6))


@pytest.mark.parametrize("count", range(1, 8))
def test_any_subset_of_gradients(count, device):
    """Each gradient has the same bits, whichever other gradients are needed."""
    inputs = sample_inputs((10, 12, 20), torch.float32, device)
    dy = torch.randn(10, 20, device=device)
    wanted = torch.autograd.grad(ops.linear(*inputs), inputs, dy)
    trained = [number for number in range(3) if count >> number & 1]
    for number, tensor in enumerate(inputs):
        tensor.requires_grad_(number in trained)
    got = torch.autograd.grad(ops.linear(*inputs), [inputs[number] for number in trained], dy)
    assert all(torch.equal(a, wanted[number]) for a, number in zip(got, trained, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_and_any_number_of_threads_agree_bit_for_bit(dtype, device, threads, implementation):
    if implementation != "cpp":
        pytest.skip("PyTorch's own product")
    inputs = sample_inputs((1100, 40, 200), dtype, device)
    dy = torch.randn(1100, 200).to(dtype)
    threads(1)
    first = gradients(ops.linear, inputs, dy)
    for count in (1, 2, 3):
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(ops.linear, inputs, dy), strict=True)), count


def test_what_serves(device, implementation, monkeypatch):
    """`linear` runs the C++ kernel on CPU.

    It runs PyTorch's function for float64, inside `use_reference()`, and on devices without a kernel.
    """
    called = []
    stock = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: called.append(a[0].dtype) or stock(*a))
    inputs = sample_inputs((3, 4, 5), torch.float32, device)
    ops.linear(*inputs)
    assert called == ([] if implementation == "cpp" else [torch.float32])
    called.clear()
    ops.linear(*(tensor.double() for tensor in inputs))
    with gpt_fast.use_reference():
        ops.linear(*inputs)
    assert called == [torch.float64, torch.float32]


def test_autocast(device):
    x, weight, bias = sample_inputs((20, 24, 30), torch.float32, device)
    with torch.autocast(device, torch.bfloat16):
        y = ops.linear(x, weight, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, ops.linear(x.bfloat16(), weight.bfloat16(), bias.bfloat16()))


def test_opcheck(implementation):
    if implementation != "cpp":
        pytest.skip("there is no operator to check")
    x, weight, bias = sample_inputs((9, 12, 20), torch.float32, "cpu")
    for shift in (bias, None):
        torch.library.opcheck(
            torch.ops.gpt_fast.linear_forward,
            (x.detach(), weight.detach(), None if shift is None else shift.detach()),
        )
    dy = torch.randn(9, 20)
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(torch.ops.gpt_fast.linear_backward, (dy, x.detach(), weight.detach(), *needs))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_fullgraph(device, dynamic):
    torch.compiler.reset()
    inputs = sample_inputs((9, 12, 20), torch.float32, device)
    dy = torch.randn(9, 20, device=device)
    compiled = torch.compile(ops.linear, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    got, wanted = gradients(compiled, inputs, dy), gradients(ops.linear, inputs, dy)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_double_backward_says_that_it_is_not_there(implementation):
    if implementation != "cpp":
        pytest.skip("PyTorch's own product can be differentiated twice")
    x, weight, bias = sample_inputs((3, 4, 5), torch.float32, "cpu")
    (dx,) = torch.autograd.grad(ops.linear(x, weight, bias).square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match=r"linear: double backward is not implemented"):
        dx.sum().backward()


BAD_INPUT = [
    pytest.param(lambda x, w, b: (x.long(), w, b), "x has dtype int64", id="dtype"),
    pytest.param(lambda x, w, b: (x, w.half(), b), "weight has dtype float16; expected float32", id="mixed_dtypes"),
    pytest.param(lambda x, w, b: (x, w.to("meta"), b), "weight on meta", id="mixed_devices"),
    pytest.param(lambda x, w, b: (x, w[0], b), r"weight has shape \[12\]", id="weight_dimensions"),
    pytest.param(lambda x, w, b: (x[:, :5], w, b), r"x has shape \[10, 5\]; expected \[..., 12\]", id="x_shape"),
    pytest.param(lambda x, w, b: (x, w, b[1:]), r"bias has shape \[19\]; expected \[20\]", id="bias_shape"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_INPUT)
def test_bad_input(spoil, message):
    with pytest.raises(ValueError, match=f"linear: .*{message}"):
        ops.linear(*spoil(*sample_inputs((10, 12, 20), torch.float32, "cpu")))
