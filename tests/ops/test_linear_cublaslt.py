"""linear's backward by cuBLASLt (csrc/cuda) against the float64 reference: on a GPU, or on an emulation of cuBLASLt."""

import importlib

import pytest
import torch
import torch.nn.functional as F

import gpt_fast
from gpt_fast import ops
from gpt_fast.ops import _cublaslt
from tests import numerics
from tests.ops.test_linear import gradients, sample_inputs, widened

contract = importlib.import_module("gpt_fast.ops.linear")  # as an attribute it is the function
DTYPES = (torch.bfloat16, torch.float16)
MEASURED = ((768, True), (1 << 30, False))  # as rows of kernels/launch_configs.py would be


@pytest.fixture
def device(cublaslt_device: str) -> str:
    return cublaslt_device


def run(x, weight, bias):
    return contract._CublasLtLinear.apply(x, weight, bias)


def check(inputs):
    """Compare backward with a random upstream gradient to float64: as accurate as one rounding of float32 sums."""
    x, weight = inputs[:2]
    dy = torch.randn(*x.shape[:-1], weight.shape[0], device=x.device).to(x.dtype)
    got = gradients(run, inputs, dy)
    truth = gradients(F.linear, [numerics.exact(tensor) for tensor in inputs], dy.double())
    yardstick = gradients(widened, inputs, dy)
    for label, *values in zip(("dx", "dweight", "dbias"), got[1:], yardstick[1:], truth[1:], strict=True):
        numerics.assert_as_accurate(*values, label=label)
    return got


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 48, 40), id="one_row"),
        pytest.param((40, 8, 8), id="smallest_sizes"),
        pytest.param((16, 64, 128), id="powers_of_two"),
        pytest.param((33, 40, 72), id="odd_rows"),
        pytest.param(((3, 11), 24, 72), id="two_batch_dimensions"),
    ],
)
def test_numerics(shape, dtype, device):
    check(sample_inputs(shape, dtype, device))


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_projection_of_gpt2(dtype):
    """Sizes at which cuBLASLt splits sums and has its own choice of kernels."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("gpt_fast::linear_cublaslt_backward", "CUDA"):
        pytest.skip("csrc/cuda was not built with cuBLASLt: it needs PyTorch with CUDA, nvcc and cublasLt.h")
    check(sample_inputs((2048, 768, 2304), dtype, "cuda"))


def test_transposed_weights(device):
    """They are read in place, and the gradient has their strides."""
    inputs = sample_inputs((20, 24, 72), torch.bfloat16, device, transposed=True)
    got = check(inputs)
    assert inputs[1].stride(0) == 1 and got[2].stride() == inputs[1].stride()


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, :, 8:32], id="part_of_the_columns"),
        pytest.param(lambda x: x[:, :, 1:25], id="not_aligned"),
        pytest.param(lambda x: x[:, ::2], id="every_other_row"),
        pytest.param(lambda x: x.transpose(1, 2), id="transposed"),
        pytest.param(lambda x: x[:1].expand(4, -1, -1), id="expanded_rows"),
        pytest.param(lambda x: x[..., :1].expand(-1, -1, 24), id="expanded_columns"),
    ],
)
def test_strided_inputs_and_upstream_gradients(view, device):
    x = view(torch.randn(4, 8, 40, device=device).bfloat16()).requires_grad_()
    inputs = x, *sample_inputs((1, x.shape[-1], 56), torch.bfloat16, device)[1:]
    contiguous = x.detach().contiguous().requires_grad_(), *inputs[1:]
    wide = torch.randn(*x.shape[:-1], 80, device=device).bfloat16()
    for dy in (wide[..., :56], wide[..., 3:59], wide[..., :1].expand(*x.shape[:-1], 56)):
        got = gradients(run, inputs, dy)
        wanted = gradients(run, contiguous, dy.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got[1:], wanted[1:], strict=True))


@pytest.mark.parametrize("count", range(1, 8))
def test_any_subset_of_gradients(count, device):
    """A gradient has the same bits whatever else is trained; the bias's own sum, without the weight's, is exact."""
    inputs = sample_inputs((10, 16, 24), torch.bfloat16, device)
    dy = torch.randn(10, 24, device=device).bfloat16()
    wanted = torch.autograd.grad(run(*inputs), inputs, dy)
    trained = [number for number in range(3) if count >> number & 1]
    for number, tensor in enumerate(inputs):
        tensor.requires_grad_(number in trained)
    got = torch.autograd.grad(run(*inputs), [inputs[number] for number in trained], dy)
    for number, gradient in zip(trained, got, strict=True):
        if number == 2 and 1 not in trained:
            numerics.assert_rounded_once(gradient, dy.double().sum(0))
        else:
            assert torch.equal(gradient, wanted[number])


def test_two_runs_agree_bit_for_bit(device):
    inputs = sample_inputs((300, 72, 136), torch.bfloat16, device)
    dy = torch.randn(300, 136, device=device).bfloat16()
    first, second = (gradients(run, inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_batch(device):
    inputs = sample_inputs(((0, 3), 24, 40), torch.bfloat16, device)
    y = run(*inputs)
    for tensor, grad in zip(inputs, torch.autograd.grad(y, inputs, torch.ones_like(y)), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


def test_opcheck(device):
    x, weight, _ = (tensor.detach() for tensor in sample_inputs((20, 24, 40), torch.bfloat16, device, transposed=True))
    dy = torch.randn(20, 40, device=device).bfloat16()
    for needs in ((True, True, True), (False, True, False)):
        torch.library.opcheck(torch.ops.gpt_fast.linear_cublaslt_backward.default, (dy, x, weight, *needs))


def test_double_backward_says_that_it_is_not_there(device):
    inputs = sample_inputs((10, 16, 24), torch.bfloat16, device)
    (dx,) = torch.autograd.grad(run(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="linear: double backward is not implemented"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("shape", "dtype", "message"),
    [
        pytest.param((4, 12, 16), torch.bfloat16, "sizes are C 12, N 16", id="columns_of_x"),
        pytest.param((4, 16, 12), torch.bfloat16, "sizes are C 16, N 12", id="columns_of_y"),
        pytest.param((4, 8, 16), torch.float32, "x is Float, cuBLASLt serves", id="dtype"),
    ],
)
def test_refuses(shape, dtype, message, device):
    x, weight, _ = (tensor.detach() for tensor in sample_inputs(shape, dtype, device))
    dy = torch.randn(shape[0], shape[2], device=device).to(dtype)
    with pytest.raises(ValueError, match=f"gpt_fast.linear: {message}"):
        torch.ops.gpt_fast.linear_cublaslt_backward(dy, x, weight, True, True, True)


def test_refuses_operands_of_other_dtypes(device):
    x, weight, _ = (tensor.detach() for tensor in sample_inputs((4, 8, 16), torch.bfloat16, device))
    with pytest.raises(ValueError, match=r"gpt_fast.linear: an operand has dtype Float; expected BFloat16, as x"):
        torch.ops.gpt_fast.linear_cublaslt_backward(torch.randn(4, 16, device=device), x, weight, True, True, True)


# ---- whether it serves -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "dtype", "serves"),
    [
        pytest.param((4, 64, 192), torch.bfloat16, True, id="measured_faster"),
        pytest.param((4, 64, 192), torch.float16, True, id="float16"),
        pytest.param((4, 776, 16), torch.bfloat16, False, id="measured_slower"),
        pytest.param((4, 64, 192), torch.float32, False, id="float32"),
        pytest.param((4, 63, 192), torch.bfloat16, False, id="odd_columns_of_x"),
        pytest.param((4, 64, 191), torch.bfloat16, False, id="odd_columns_of_y"),
        pytest.param((0, 64, 192), torch.bfloat16, False, id="no_rows"),
        pytest.param((4, 64, 0), torch.bfloat16, False, id="no_columns_of_y"),
    ],
)
def test_cublaslt_serves_where_it_was_measured_faster(shape, dtype, serves, monkeypatch):
    monkeypatch.setattr(_cublaslt, "classes", lambda *what: MEASURED)
    x, weight, _ = sample_inputs(shape, dtype, "meta")
    assert contract._cublaslt_serves(x, weight) == serves
    with gpt_fast.use_reference():
        assert not contract._cublaslt_serves(x, weight)


def test_nothing_is_served_before_a_gpu_has_measured_it():
    from gpt_fast.kernels import launch_configs

    for row in launch_configs.serving("linear", "cublaslt", 90, 2):
        assert row.config == (0,) or row.source.startswith("measured: "), row


@pytest.mark.cuda
def test_the_public_function_runs_it_where_the_table_says_so(monkeypatch, device):
    if device != "cuda":
        pytest.skip("the public function never takes it on CPU")
    calls = []
    stock = contract._CublasLtLinear.apply
    monkeypatch.setattr(contract._CublasLtLinear, "apply", lambda *a: (calls.append(a), stock(*a))[1])
    inputs = sample_inputs((32, 64, 192), torch.bfloat16, "cuda")
    for classes, count in ((MEASURED, 1), ((), 1)):
        monkeypatch.setattr(_cublaslt, "classes", lambda *what, c=classes: c)
        ops.linear(*inputs).sum().backward()
        assert len(calls) == count
