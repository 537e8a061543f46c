"""Test linear, mlp and linear_cross_entropy under autocast on CPU: the kernels round float32 weights themselves.

The results have the bits that weights rounded beforehand give. A weight's gradient stays float32. Rounded, it has the
bits of the gradient that a rounded weight gets.
"""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import gpt_fast
from gpt_fast import ops

pytestmark = pytest.mark.skipif(
    gpt_fast.ops.serving("linear", "cpu") != "cpp", reason="only the C++ kernels round weights while they pack them"
)

HALVES = [torch.bfloat16, torch.float16]
# rows, C, N: one element, odd sizes, whole panels, more than a chunk of rows, sums of more than a block of depth
SIZES = [(1, 1, 1), (3, 7, 5), (20, 64, 128), (33, 65, 129), (1030, 34, 66), (4, 1700, 70)]


def weight_of(rows: int, columns: int, transposed: bool) -> torch.Tensor:
    """Return a random float32 weight [rows, columns] with a gradient. If `transposed`, its columns lie in memory."""
    weight = torch.randn(rows, columns) * columns**-0.5
    return (weight.t().contiguous().t() if transposed else weight).requires_grad_()


def linear(rows: int, C: int, N: int, transposed: bool) -> tuple:
    """Return (function of x, weight and bias, these three) for `ops.linear`."""
    return ops.linear, [torch.randn(rows, C).requires_grad_(), weight_of(N, C, transposed), weight_of(1, N, False)[0]]


def mlp(rows: int, C: int, N: int, transposed: bool) -> tuple:
    """Return (function of x, two weights and two biases, these five) for `ops.mlp` with dropout."""
    seed = torch.tensor([7])
    inputs = [torch.randn(rows, C).requires_grad_(), weight_of(N, C, transposed), weight_of(1, N, False)[0]]
    inputs += [weight_of(C, N, transposed), weight_of(1, C, False)[0]]
    return lambda *tensors: ops.mlp(*tensors, "gelu", 0.1, seed), inputs


def loss(rows: int, C: int, N: int, transposed: bool) -> tuple:
    """Return (function of x, weight and bias, these three) for `ops.linear_cross_entropy`, one loss for each row."""
    target = torch.randint(N, (rows,))
    _, inputs = linear(rows, C, N, transposed)
    return lambda x, weight, bias: ops.linear_cross_entropy(x, weight, target, bias, reduction="none"), inputs


def mean_loss(rows: int, C: int, N: int, transposed: bool) -> tuple:
    """Return (function of x, weight and bias, these three) for the mean of `ops.linear_cross_entropy`."""
    function, inputs = loss(rows, C, N, transposed)
    target = torch.randint(N, (rows,))
    return lambda x, weight, bias: ops.linear_cross_entropy(x, weight, target, bias, 0, 0.1), inputs


CASES = [linear, mlp, loss, mean_loss]


def results(function, inputs: list[torch.Tensor], dtype: torch.dtype, autocast: bool) -> list[torch.Tensor]:
    """Return the function's result and the gradients of its inputs, for a random upstream gradient, always the same."""
    with torch.autocast("cpu", dtype, enabled=autocast):
        y = function(*inputs)
    torch.manual_seed(3)
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.randn_like(y))]


@pytest.mark.parametrize("transposed", [False, True], ids=["rows", "columns"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_same_bits_as_rounded_weights(case, sizes, dtype, transposed):
    function, inputs = case(*sizes, transposed)
    got = results(function, inputs, dtype, True)
    rounded = [tensor.detach().to(dtype).requires_grad_() for tensor in inputs]
    wanted = results(function, rounded, dtype, False)
    assert got[0].dtype == wanted[0].dtype and torch.equal(got[0], wanted[0])
    for tensor, a, b in zip(inputs, got[1:], wanted[1:], strict=True):
        assert a.dtype == torch.float32 and a.stride() == tensor.stride() and torch.equal(a.to(dtype), b)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", CASES)
def test_the_gradient_of_a_weight_is_not_rounded(case, dtype):
    function, inputs = case(40, 33, 65, False)
    for tensor, gradient in zip(inputs, results(function, inputs, dtype, True)[1:], strict=True):
        is_rounded = torch.equal(gradient, gradient.to(dtype).float())
        assert is_rounded == (inputs[0] is tensor or tensor.dim() == 1)  # x and biases are cast, as PyTorch casts them


@pytest.mark.parametrize("case", CASES)
def test_no_weight_is_copied(case):
    function, inputs = case(8, 32, 64, False)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        results(function, inputs, torch.bfloat16, True)
    copied = [event.input_shapes[0] for event in profiled.events() if event.name == "aten::_to_copy"]
    assert copied and not [shape for shape in copied if shape in ([64, 32], [32, 64])]


@pytest.mark.parametrize("case", CASES)
def test_values_beyond_16_bits(case):
    """Infinities, NaN, overflowing and subnormal weights do what rounded weights do."""
    function, inputs = case(20, 33, 65, False)
    with torch.no_grad():
        inputs[1].view(-1)[:6] = torch.tensor([float("inf"), float("nan"), 3.4e38, 1e5, 1e-40, -1e-7])
    got = results(function, inputs, torch.float16, True)
    rounded = [tensor.detach().half().requires_grad_() for tensor in inputs]
    wanted = results(function, rounded, torch.float16, False)
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a.to(b.dtype).isnan(), b.isnan()) and torch.equal(a.to(b.dtype).nan_to_num(), b.nan_to_num())


def test_mixed_weights_of_an_mlp_are_all_cast():
    """Where one weight has 16 bits already, the other is cast by PyTorch."""
    function, inputs = mlp(20, 33, 65, False)
    inputs[1] = inputs[1].detach().bfloat16().requires_grad_()
    got = results(function, inputs, torch.bfloat16, True)
    wanted = results(function, [t.detach().bfloat16().requires_grad_() for t in inputs], torch.bfloat16, False)
    assert [gradient.dtype for gradient in got[1:]] == [tensor.dtype for tensor in inputs]
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(got, wanted, strict=True))


def test_opcheck():
    """The operators state the dtypes of a float32 weight's gradients beside 16-bit inputs."""
    x, weight, proj, target = torch.randn(9, 24).bfloat16(), torch.randn(40, 24), torch.randn(24, 40), torch.arange(9)
    bias = torch.randn(40).bfloat16()
    calls = torch.ops.gpt_fast
    torch.library.opcheck(calls.linear_forward.default, (x, weight, bias))
    torch.library.opcheck(calls.linear_backward.default, (torch.randn(9, 40).bfloat16(), x, weight, True, True, True))
    torch.library.opcheck(calls.mlp_forward.default, (x, weight, bias, proj, None, "relu", 0.0, None, 0, True))
    args = x, x, weight, bias, proj, None, "relu", 0.0, None, 0, [True] * 5
    torch.library.opcheck(calls.mlp_backward.default, args)
    args = x, weight, target, bias, -100, 0.0, "mean", True, True, True
    torch.library.opcheck(calls.linear_cross_entropy_forward.default, args)
    args = torch.randn(9), x, weight, target, bias, -100, 0.0, True, True, True
    torch.library.opcheck(calls.linear_cross_entropy_backward.default, args)


@pytest.mark.parametrize("case", CASES)
def test_compiled(case):
    function, inputs = case(20, 33, 65, False)
    wanted = results(function, inputs, torch.bfloat16, True)
    got = results(torch.compile(function, backend="aot_eager", fullgraph=True), inputs, torch.bfloat16, True)
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_exported_without_this_library():
    """A program exported under autocast is decomposed into PyTorch's own operators."""
    layer = gpt_fast.layers.MLP(32, 64, "gelu").eval()
    x = torch.randn(4, 32)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        wanted = layer(x)
        program = torch.export.export(layer, (x,))
    assert "gpt_fast" in str(program.graph)
    program = program.run_decompositions(gpt_fast.ops.decompositions())
    assert "gpt_fast" not in str(program.graph)
    eps = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(program.module()(x), wanted, rtol=eps, atol=eps)
