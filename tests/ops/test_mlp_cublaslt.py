"""mlp by cuBLASLt (csrc/cuda) against the float64 reference: on a GPU, and without one on an emulation of cuBLASLt.

The emulation does what cuBLASLt's header says on the host's memory, so it tests what we ask of the library: layouts,
transposes, leading dimensions, epilogues, what is kept and the gradients that follow; not the library.
"""

import importlib

import pytest
import torch

from gpt_fast import _activations, ops, reference
from gpt_fast.ops import _cublaslt
from tests import numerics
from tests.ops.test_mlp import NAMES, gradients, input_of_gelu_rounded, sample_inputs

contract = importlib.import_module("gpt_fast.ops.mlp")  # as an attribute it is the function
ACTIVATIONS = [name for name, row in _activations.ACTIVATIONS.items() if row.cublaslt]
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def device(cublaslt_device: str) -> str:
    return cublaslt_device


def run(inputs, activation, recompute=False):
    return contract._CublasLtMLP.apply(*inputs, activation, recompute)


def check(inputs, activation, recompute=False):
    """Forward and backward with a random upstream gradient, as accurate as the reference in the inputs' dtype."""
    y = run(inputs, activation, recompute)
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    got = gradients(y, inputs, dy)
    wide = [numerics.exact(tensor) for tensor in inputs]
    exact = gradients(reference.mlp(*wide, activation), wide, dy.double())
    yardstick = gradients(reference.mlp(*inputs, activation), inputs, dy)
    with input_of_gelu_rounded(activation, y.dtype):
        kept = gradients(reference.mlp(*inputs, activation), inputs, dy)
    labels = ["y", *(f"d{name}" for name, tensor in zip(NAMES, inputs, strict=True) if tensor is not None)]
    for label, values in zip(labels, zip(got, yardstick, kept, exact, strict=True), strict=True):
        a, strict, loose, truth = values
        numerics.assert_as_accurate(a, strict if label == "y" else loose, truth, label=label)
    return got


SHAPES = [
    pytest.param((1, 48, 96, 40), id="one_row"),
    pytest.param((40, 8, 8, 8), id="smallest_sizes"),
    pytest.param((16, 64, 128, 64), id="powers_of_two"),
    pytest.param((33, 40, 136, 56), id="one_step_past_the_mask's_block"),
    pytest.param(((3, 11), 24, 72, 16), id="two_batch_dimensions"),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_numerics(shape, activation, dtype, device):
    check(sample_inputs(shape, dtype, device), activation)


@pytest.mark.cuda
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer_of_gpt2(activation, dtype):
    """Sizes at which cuBLASLt splits sums and has its own choice of kernels."""
    if not torch._C._dispatch_has_kernel_for_dispatch_key("gpt_fast::mlp_cublaslt_forward", "CUDA"):
        pytest.skip("csrc/cuda/mlp.cpp was not built: it needs PyTorch with CUDA, nvcc and cublasLt.h")
    check(sample_inputs((2048, 768, 3072, 768), dtype, "cuda"), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    ("fc_bias", "proj_bias"),
    [
        pytest.param(False, True, id="no_fc_bias"),
        pytest.param(True, False, id="no_proj_bias"),
        pytest.param(False, False, id="no_bias"),
    ],
)
def test_without_biases(fc_bias, proj_bias, activation, device):
    check(sample_inputs((20, 24, 40, 32), torch.bfloat16, device, fc_bias=fc_bias, proj_bias=proj_bias), activation)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_transposed_weights(activation, device):
    """Read in place; their gradients come in their strides."""
    inputs = sample_inputs((20, 24, 72, 32), torch.bfloat16, device, transposed=True)
    got = check(inputs, activation)
    for index in (1, 3):
        assert inputs[index].stride(0) == 1 and got[index + 1].stride() == inputs[index].stride()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recomputing_equals_keeping_bit_for_bit(activation, device):
    inputs = sample_inputs((40, 24, 72, 32), torch.bfloat16, device)
    dy = torch.randn(40, 32, device=device).bfloat16()
    kept, recomputed = (gradients(run(inputs, activation, recompute), inputs, dy) for recompute in (False, True))
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_what_is_kept(activation, device):
    """One hidden tensor and for relu a bit for each of its elements, or nothing."""
    kept = []
    inputs = sample_inputs((40, 24, 136, 32), torch.bfloat16, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append((t.shape, t.dtype)) or t, lambda t: t):
        run(inputs, activation)
        hidden, mask = kept.count(((40, 136), torch.bfloat16)), kept.count(((40, 32), torch.uint8))
        kept.clear()
        run(inputs, activation, recompute=True)
    assert (hidden, mask) == (1, 1 if activation == "relu" else 0)
    assert not any(shape == (40, 136) or dtype == torch.uint8 for shape, dtype in kept)


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, :, 8:32], id="part_of_the_columns"),
        pytest.param(lambda x: x[:, :, 1:25], id="not_aligned"),
        pytest.param(lambda x: x[:, ::2], id="every_other_row"),
        pytest.param(lambda x: x.transpose(0, 1), id="transposed_rows"),
        pytest.param(lambda x: x.transpose(1, 2), id="transposed_columns"),
        pytest.param(lambda x: x[:1].expand(4, -1, -1), id="expanded_rows"),
        pytest.param(lambda x: x[..., :1].expand(-1, -1, 24), id="expanded_columns"),
    ],
)
def test_strided_inputs_and_upstream_gradients(view, device):
    x = view(torch.randn(4, 8, 40, device=device).bfloat16()).requires_grad_()
    inputs = x, *sample_inputs((1, x.shape[-1], 56, 40), torch.bfloat16, device)[1:]
    contiguous = x.detach().contiguous().requires_grad_(), *inputs[1:]
    wide = torch.randn(*x.shape[:-1], 80, device=device).bfloat16()
    for dy in (wide[..., :40], wide[..., 3:43], wide[..., :1].expand(*x.shape[:-1], 40)):
        got = gradients(run(inputs, "relu"), inputs, dy)
        wanted = gradients(run(contiguous, "relu"), contiguous, dy.contiguous())
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_strided_weights(device):
    inputs = sample_inputs((20, 24, 40, 32), torch.bfloat16, device)
    dy = torch.randn(20, 32, device=device).bfloat16()
    wanted = gradients(run(inputs, "gelu_tanh"), inputs, dy)
    apart = [torch.zeros(2 * t.shape[0], 2 * t.shape[1] + 2, device=device).bfloat16() for t in inputs[1::2]]
    for step in (1, 2):  # rows at a distance that is no multiple of 8; neither dimension contiguous
        for index, target in zip((1, 3), apart, strict=True):
            rows, columns = inputs[index].shape
            view = target[: rows * step : step, : columns * step : step]
            view.copy_(inputs[index].detach())
            spread = list(inputs)
            spread[index] = view.requires_grad_()
            got = gradients(run(spread, "gelu_tanh"), spread, dy)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
            target.detach_()


@pytest.mark.parametrize("count", range(1, 32))
def test_any_subset_of_gradients(count, device):
    """What is trained gets the same bits whatever else is, but for proj_bias, whose sum depends on where it is made."""
    inputs = sample_inputs((10, 16, 24, 8), torch.bfloat16, device)
    dy = torch.randn(10, 8, device=device).bfloat16()
    activation, recompute = ACTIVATIONS[count % 2], count % 4 > 1

    def grads():
        trained = [tensor for tensor in inputs if tensor.requires_grad]
        found = iter(torch.autograd.grad(run(inputs, activation, recompute), trained, dy))
        return [next(found) if tensor.requires_grad else None for tensor in inputs]

    wanted = grads()
    for bit, tensor in enumerate(inputs):
        tensor.requires_grad_(bool(count >> bit & 1))
    for name, a, b in zip(NAMES, grads(), wanted, strict=True):
        if name == "proj_bias" and a is not None:
            numerics.assert_rounded_once(a, dy.double().sum(0))
        else:
            assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_two_runs_agree_bit_for_bit(activation, device):
    inputs = sample_inputs((300, 72, 136, 40), torch.bfloat16, device)
    dy = torch.randn(300, 40, device=device).bfloat16()
    first, second = (gradients(run(inputs, activation), inputs, dy) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_empty_batch(device):
    inputs = sample_inputs(((0, 3), 24, 40, 32), torch.bfloat16, device)
    y = run(inputs, "relu")
    assert y.shape == (0, 3, 32)
    for tensor, grad in zip(inputs, torch.autograd.grad(y, inputs, torch.ones_like(y)), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation, device):
    inputs = [tensor.detach() for tensor in sample_inputs((20, 24, 40, 32), torch.bfloat16, device, transposed=True)]
    for keeps in (False, True):
        forward = torch.ops.gpt_fast.mlp_cublaslt_forward
        torch.library.opcheck(forward.default, (*inputs, activation, keeps))
        y, hidden, mask = forward(*inputs, activation, keeps)
        kept = (hidden if keeps else None, mask if keeps and activation == "relu" else None)
        for needs in ([True] * 5, [False, True, False, True, False]):
            args = torch.randn_like(y), *inputs[:4], *kept, activation, needs
            torch.library.opcheck(torch.ops.gpt_fast.mlp_cublaslt_backward.default, args)


def test_double_backward_says_that_it_is_not_there(device):
    inputs = sample_inputs((10, 16, 24, 8), torch.bfloat16, device)
    (dx,) = torch.autograd.grad(run(inputs, "relu").square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="double backward is not implemented"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("shape", "dtype", "activation", "message"),
    [
        pytest.param((4, 12, 16, 8), torch.bfloat16, "relu", "sizes are C 12, F 16, C' 8", id="sizes"),
        pytest.param((4, 8, 16, 8), torch.float32, "relu", "x is Float, cuBLASLt serves", id="dtype"),
        pytest.param((4, 8, 16, 8), torch.bfloat16, "gelu", "activation is 'gelu'", id="activation"),
        pytest.param((4, 8, 16, 8), torch.bfloat16, "swish", "activation is 'swish'; expected", id="unknown"),
    ],
)
def test_refuses(shape, dtype, activation, message, device):
    with pytest.raises(ValueError, match=f"gpt_fast.mlp: {message}"):
        run(sample_inputs(shape, dtype, device), activation)


def test_the_heuristic_is_asked_once_for_a_problem(emulation):
    inputs = [tensor.detach() for tensor in sample_inputs((24, 104, 56, 88), torch.bfloat16, "cpu")]
    counts = []
    for _ in range(3):
        torch.ops.gpt_fast.mlp_cublaslt_forward(*inputs, "relu", True)
        counts.append(emulation.cublaslt_emulation_heuristics())
    assert counts[0] == counts[1] == counts[2]
    torch.ops.gpt_fast.mlp_cublaslt_forward(inputs[0][:16], *inputs[1:], "relu", True)
    assert emulation.cublaslt_emulation_heuristics() == counts[0] + 2


# ---- which of the two serves -----------------------------------------------------------------------------------------

MEASURED = ((768, True), (1 << 30, False))  # as rows of kernels/launch_configs.py would be


@pytest.mark.parametrize(
    ("shape", "dtype", "activation", "dropout_p", "serves"),
    [
        pytest.param((4, 64, 256, 64), torch.bfloat16, "relu", 0.0, True, id="measured_faster"),
        pytest.param((4, 64, 256, 64), torch.float16, "gelu_tanh", 0.0, True, id="gelu_tanh"),
        pytest.param((4, 776, 16, 64), torch.bfloat16, "relu", 0.0, False, id="measured_slower"),
        pytest.param((4, 64, 256, 64), torch.float32, "relu", 0.0, False, id="float32"),
        pytest.param((4, 64, 256, 64), torch.bfloat16, "gelu", 0.0, False, id="exact_gelu"),
        pytest.param((4, 64, 256, 64), torch.bfloat16, "relu", 0.1, False, id="dropout"),
        pytest.param((4, 63, 256, 64), torch.bfloat16, "relu", 0.0, False, id="odd_columns"),
        pytest.param((4, 64, 255, 64), torch.bfloat16, "relu", 0.0, False, id="odd_hidden_size"),
        pytest.param((4, 64, 256, 63), torch.bfloat16, "relu", 0.0, False, id="odd_output"),
        pytest.param((0, 64, 256, 64), torch.bfloat16, "relu", 0.0, False, id="no_rows"),
        pytest.param((4, 64, 0, 64), torch.bfloat16, "relu", 0.0, False, id="no_hidden_size"),
        pytest.param((4, 64, 256, 0), torch.bfloat16, "relu", 0.0, False, id="no_output"),
    ],
)
def test_what_is_measured_faster_serves(shape, dtype, activation, dropout_p, serves, monkeypatch):
    monkeypatch.setattr(_cublaslt, "classes", lambda *what: MEASURED)
    x, fc_weight, _, proj_weight, _ = sample_inputs(shape, dtype, "meta")
    assert contract._cublaslt_serves(x, fc_weight, proj_weight, activation, dropout_p) == serves


@torch.compiler.assume_constant_result
def measured(*what):
    return MEASURED


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_choice_can_be_traced(dynamic, monkeypatch):
    monkeypatch.setattr(_cublaslt, "classes", measured)

    def choose(x, fc_weight, proj_weight):
        return x + contract._cublaslt_serves(x, fc_weight, proj_weight, "relu", 0.0)

    compiled = torch.compile(choose, fullgraph=True, backend="eager", dynamic=dynamic)
    for C in (64, 72, 776, 63):
        x, fc_weight, _, proj_weight, _ = (
            tensor.detach() for tensor in sample_inputs((4, C, 16, 8), torch.half, "cpu")
        )
        assert torch.equal(compiled(x, fc_weight, proj_weight), choose(x, fc_weight, proj_weight))


def test_nothing_is_served_before_a_gpu_has_measured_it():
    from gpt_fast.kernels import launch_configs

    for activation in ACTIVATIONS:
        for row in launch_configs.serving("mlp", f"cublaslt {activation}", 90, 2):
            assert row.config == (0,) or row.source.startswith("measured: "), row


def test_the_public_function_reads_the_table_of_the_device(monkeypatch):
    """On a stand-in for a build with cuBLASLt and for a device of compute capability 9.0."""
    from gpt_fast.kernels import launch_configs

    monkeypatch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda name, key: True)
    monkeypatch.setattr(launch_configs, "architecture", lambda device: 90)
    rows = launch_configs.serving("mlp", "cublaslt relu", 90, 2)
    expected = tuple((row.size, row.config == (1,)) for row in rows)
    assert expected
    assert _cublaslt.classes("mlp", "cublaslt relu", "mlp_cublaslt_forward", 0) == expected


@pytest.mark.cuda
def test_the_public_function_runs_what_the_table_says(monkeypatch, device):
    if device != "cuda":
        pytest.skip("the public function never takes it on CPU")
    calls = []
    stock = contract._CublasLtMLP.apply
    monkeypatch.setattr(contract._CublasLtMLP, "apply", lambda *a: (calls.append(a), stock(*a))[1])
    inputs = sample_inputs((32, 64, 128, 64), torch.bfloat16, "cuda")
    for classes, count in ((MEASURED, 1), ((), 1)):
        monkeypatch.setattr(_cublaslt, "classes", lambda *what, c=classes: c)
        ops.mlp(*inputs, "relu").sum().backward()
        assert len(calls) == count
