"""Test mlp against the float64 reference: the C++ kernel, Triton in the interpreter and Triton on CUDA."""

import bisect
import contextlib
import importlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt_fast
from gpt_fast import _activations, ops, reference
from tests import numerics

ACTIVATIONS = tuple(_activations.ACTIVATIONS)
NAMES = ("x", "fc_weight", "fc_bias", "proj_weight", "proj_bias")
EXAMPLES = 8 if os.environ.get("TRITON_INTERPRET") == "1" else 30  # the interpreter is slow
SEED, SITE = 0x123456789ABCDEF, 7

# rows, C, F, C'
SHAPES = [
    pytest.param((1, 48, 96, 40), id="one_row"),
    pytest.param((40, 1, 50, 1), id="one_column"),
    pytest.param((16, 64, 128, 64), id="powers_of_two"),
    pytest.param((33, 40, 70, 50), id="off_powers_of_two"),
    pytest.param((17, 65, 129, 65), id="one_past_a_block"),
]


def sample_inputs(shape, dtype, device, *, fc_bias=True, proj_bias=True, transposed=False):
    """Return x, fc_weight, fc_bias, proj_weight and proj_bias, which require gradients.

    With `transposed` the weights are views of their contiguous transposes.
    """
    rows, C, hidden, C_out = shape
    rows = rows if isinstance(rows, tuple) else (rows,)

    def leaf(*sizes, scale=1.0, transposed=False):
        value = (torch.randn(sizes, device=device) * scale).to(dtype)
        return (value.t().contiguous().t() if transposed else value).requires_grad_()

    return (
        leaf(*rows, C),
        leaf(hidden, C, scale=max(C, 1) ** -0.5, transposed=transposed),
        leaf(hidden) if fc_bias else None,
        leaf(C_out, hidden, scale=max(hidden, 1) ** -0.5, transposed=transposed),
        leaf(C_out) if proj_bias else None,
    )


def gradients(y, inputs, dy):
    given = [tensor for tensor in inputs if tensor is not None]
    return [y.detach(), *torch.autograd.grad(y, given, dy)]


def seed_on(device):
    return torch.tensor([SEED], device=device)


@contextlib.contextmanager
def input_of_gelu_rounded(activation, dtype):
    """Make the reference round the activation's input, which the op rounds when it keeps it for gelu's backward."""
    table = _activations.ACTIVATIONS
    stock = table[activation]
    if activation != "relu":
        table[activation] = stock._replace(function=lambda z: stock.function(z.to(dtype).to(z.dtype)))
    try:
        yield
    finally:
        table[activation] = stock


def check(inputs, activation="gelu_tanh", dropout_p=0.0, **options):
    """Compare forward and backward, with a random upstream gradient, with the reference in float64."""
    x = inputs[0]
    seed = seed_on(x.device)
    y = ops.mlp(*inputs, activation, dropout_p, seed, SITE, **options)
    assert y.dtype == x.dtype and y.is_contiguous()
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    got = gradients(y, inputs, dy)

    wide = [numerics.exact(tensor) for tensor in inputs]
    exact = gradients(reference.mlp(*wide, activation, dropout_p, seed, SITE), wide, dy.double())
    yardstick = gradients(reference.mlp(*inputs, activation, dropout_p, seed, SITE), inputs, dy)
    with input_of_gelu_rounded(activation, x.dtype):
        kept = gradients(reference.mlp(*inputs, activation, dropout_p, seed, SITE), inputs, dy)
    labels = ["y", *(f"d{name}" for name, tensor in zip(NAMES, inputs, strict=True) if tensor is not None)]
    for label, values in zip(labels, zip(got, yardstick, kept, exact, strict=True), strict=True):
        a, strict, loose, truth = values
        numerics.assert_as_accurate(a, strict if label == "y" else loose, truth, label=label)
    return got


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_numerics(shape, activation, dtype, device):
    check(sample_inputs(shape, dtype, device), activation, 0.1)


FEW = [(1, 70, 100, 33), (2, 33, 16, 7), (16, 130, 40, 64), (15, 9, 19, 5), (1, 300, 20, 5)]


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("shape", FEW, ids=str)
def test_few_rows(shape, dtype, device):
    """Few rows, as in a decode step, use narrow tiles. They sum over K in one part or several, the last one shorter."""
    for activation in ACTIVATIONS:
        check(sample_inputs(shape, dtype, device), activation)
    check(sample_inputs(shape, dtype, device, fc_bias=False, transposed=True), "gelu_tanh", 0.3)


@pytest.mark.parametrize("rows", [1, 16, 17])
def test_up_to_how_many_rows_are_few(rows, device, implementation, monkeypatch):
    """The table of launch configurations sets the largest number of rows for the kernel of few rows; 0 disables it."""
    if implementation != "triton":
        pytest.skip("a launch configuration of the Triton kernels")
    kernels = importlib.import_module("gpt_fast.kernels.mlp")
    tables = kernels.launch_configs
    x, fc_weight, fc_bias, proj_weight, proj_bias = (
        tensor.detach() for tensor in sample_inputs((rows, 40, 24, 8), torch.float32, device)
    )
    calls = []
    few = kernels._few
    monkeypatch.setattr(kernels, "_few", lambda *args, **kwargs: (calls.append(1), few(*args, **kwargs)))
    arguments = (x, fc_weight, fc_bias, proj_weight, proj_bias, "relu")
    first = ops.mlp(*arguments)
    assert len(calls) == (2 if rows <= 16 else 0)
    off = tables.Row("few", tables.architecture(x.device), 4, tables.ANY, (0, 16, 32, 4, 1, 4), "off")
    with tables.trying("mlp", off):
        torch.testing.assert_close(ops.mlp(*arguments), first, rtol=1e-5, atol=1e-5)
    assert len(calls) == (2 if rows <= 16 else 0)


def test_few_rows_depend_on_no_other_row(device, implementation):
    if implementation != "triton":
        pytest.skip("the C++ kernel has no such limit")
    x, *rest = (tensor.detach() for tensor in sample_inputs((16, 70, 40, 33), torch.float32, device))
    together = ops.mlp(x, *rest, "gelu")
    assert torch.equal(ops.mlp(x[5:6], *rest, "gelu"), together[5:6])


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_one_hidden_column(activation, device):
    """This test uses float32, because a single bias gradient in half precision is too small a sample of errors."""
    check(sample_inputs((40, 20, 1, 20), torch.float32, device), activation, 0.1)


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_more_rows_than_a_chunk(dtype, device, implementation):
    """The gradients of the weights are sums over chunks of rows."""
    rows = 1030 if implementation == "cpp" else 150
    check(sample_inputs((rows, 33, 70, 20), dtype, device), "gelu", 0.1)


def test_long_sums(device, implementation):
    """Every sum takes several blocks."""
    size = 1700 if implementation == "cpp" else 300
    check(sample_inputs((5, size, 40, 20), torch.float32, device))
    check(sample_inputs((5, 20, size, 40), torch.bfloat16, device))


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize(
    ("fc_bias", "proj_bias"),
    [
        pytest.param(False, True, id="no_fc_bias"),
        pytest.param(True, False, id="no_proj_bias"),
        pytest.param(False, False, id="no_bias"),
    ],
)
def test_without_biases(fc_bias, proj_bias, dtype, device):
    check(sample_inputs((20, 24, 40, 30), dtype, device, fc_bias=fc_bias, proj_bias=proj_bias))


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.integers(4, 40),  # with smaller sizes, the yardstick's largest error among few values is a matter of luck
    C=st.integers(4, 80),
    hidden=st.integers(4, 150),
    C_out=st.integers(4, 80),
    activation=st.sampled_from(ACTIVATIONS),
    p=st.sampled_from([0.0, 0.3]),
    transposed=st.booleans(),
    seed=st.integers(0, 999),
)
def test_any_shape(rows, C, hidden, C_out, activation, p, transposed, seed):
    torch.manual_seed(seed)
    check(sample_inputs((rows, C, hidden, C_out), torch.float32, "cpu", transposed=transposed), activation, p)


def test_large_arguments(device):
    """For large |z|, where the exponential overflows or underflows, gelu is z or 0 and its derivative 1 or 0."""
    z = torch.tensor([-3e4, -100.0, -20.0, 0.0, 20.0, 100.0, 3e4], device=device)
    n = z.numel()
    for activation in ACTIVATIONS:
        bias = z.clone().requires_grad_()
        inputs = torch.zeros(1, 3, device=device), torch.zeros(n, 3, device=device), bias, torch.eye(n, device=device)
        y = ops.mlp(*inputs, None, activation)
        assert torch.allclose(y[0], z.clamp(min=0))
        (dbias,) = torch.autograd.grad(y.sum(), bias)
        middle = 0.0 if activation == "relu" else 0.5
        assert torch.allclose(dbias, torch.tensor([0, 0, 0, middle, 1, 1, 1], device=device)), activation


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("value", [torch.inf, torch.nan], ids=str)
def test_relu_passes_nothing_where_it_is_zero(value, recompute, p, dtype, device):
    """For negative z, relu's backward selects 0, as PyTorch does. It does not multiply by 0, which would give NaN."""
    x = torch.ones(3, 4, dtype=dtype, device=device, requires_grad=True)
    fc_weight = (-torch.eye(4, dtype=dtype, device=device)).requires_grad_()
    proj_weight = torch.eye(4, dtype=dtype, device=device)
    y = ops.mlp(x, fc_weight, None, proj_weight, None, "relu", p, seed_on(device), SITE, recompute)
    grads = torch.autograd.grad(y, (x, fc_weight), torch.full_like(y, value))
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize(
    ("p", "dtype"),
    [
        (0.1, torch.float32),
        (0.5, torch.bfloat16),
        (0.99, torch.float16),
        pytest.param(1e-6, torch.float32, id="threshold_0"),
        pytest.param(1 - 1e-6, torch.float32, id="threshold_65536"),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [1, 9, 50, 1041])
def test_dropout_mask(rows, p, dtype, device, implementation):
    """The mask is the reference's, bit for bit, in forward and backward: hidden values of 1 become mask times scale."""
    if rows > 1000 and implementation != "cpp":
        pytest.skip("one past a chunk of the C++ kernel; slow in the interpreter")
    hidden = 70
    seed, head = seed_on(device), torch.zeros((), dtype=torch.int64, device=device)
    keep = reference.dropout_keep_matrix(seed, SITE, head, rows, hidden, p)
    wanted = (keep * torch.tensor(reference.dropout_scale(p), device=device)).to(dtype)
    x = torch.zeros(rows, 2, dtype=dtype, device=device)
    fc_weight = torch.zeros(hidden, 2, dtype=dtype, device=device)
    ones = torch.ones(hidden, dtype=dtype, device=device)
    eye = torch.eye(hidden, dtype=dtype, device=device)
    assert torch.equal(ops.mlp(x, fc_weight, ones, eye, None, "relu", p, seed, SITE), wanted)
    # With identity weights, dx is the gradient of the hidden values.
    for activation, recompute in (("relu", False), ("relu", True), ("gelu", False), ("gelu_tanh", True)):
        x = torch.full((rows, hidden), 60.0, dtype=dtype, device=device, requires_grad=True)
        y = ops.mlp(x, eye, None, eye, None, activation, p, seed, SITE, recompute)
        (dx,) = torch.autograd.grad(y, x, torch.ones_like(y))
        assert torch.equal(dx, wanted), activation


def test_a_number_equal_to_the_threshold_is_kept(device):
    """Dropout drops elements whose random number is below the threshold. Here the first number equals the threshold."""
    seed, head = seed_on(device), torch.zeros((), dtype=torch.int64, device=device)
    x, ones = torch.zeros(1, 1, device=device), torch.ones(1, device=device)

    def dropped(threshold):
        return not reference.dropout_keep_matrix(seed, SITE, head, 1, 1, threshold / 65536).item()

    number = bisect.bisect_left(range(1, 65536), True, key=dropped)
    for threshold, kept in ((number, True), (number + 1, False)):
        y = ops.mlp(x, x, ones, ones[None], None, "relu", threshold / 65536, seed, SITE)
        assert (y.item() != 0) == kept


def test_dropout_depends_on_seed_and_site(device):
    inputs = sample_inputs((20, 24, 40, 30), torch.float32, device)
    y = ops.mlp(*inputs, "relu", 0.5, seed_on(device), 1)
    assert not torch.equal(y, ops.mlp(*inputs, "relu", 0.5, seed_on(device) + 2**32, 1))
    assert not torch.equal(y, ops.mlp(*inputs, "relu", 0.5, seed_on(device) + 1, 1))
    assert not torch.equal(y, ops.mlp(*inputs, "relu", 0.5, seed_on(device), 2))
    torch.manual_seed(3)
    drawn = ops.mlp(*inputs, "relu", 0.5)
    assert not torch.equal(drawn, ops.mlp(*inputs, "relu", 0.5))
    torch.manual_seed(3)
    assert torch.equal(drawn, ops.mlp(*inputs, "relu", 0.5))


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_recomputing_equals_keeping_bit_for_bit(activation, dtype, device):
    inputs = sample_inputs((40, 24, 70, 30), dtype, device)
    results = []
    for recompute in (False, True):
        y = ops.mlp(*inputs, activation, 0.3, seed_on(device), SITE, recompute)
        torch.manual_seed(1)
        results.append(gradients(y, inputs, torch.randn(y.shape, device=device).to(dtype)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_what_is_kept(device):
    """Forward saves one hidden tensor for backward, or none with `recompute`."""
    sizes = []
    inputs = sample_inputs((40, 24, 70, 30), torch.float32, device)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(t.shape) or t, lambda t: t):
        ops.mlp(*inputs)
        kept = sizes.count((40, 70))
        sizes.clear()
        ops.mlp(*inputs, recompute=True)
    assert kept == 1 and (40, 70) not in sizes


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_transposed_weights(dtype, device):
    """Transposed weights give the bits of contiguous ones, and their gradients have the weights' strides."""
    inputs = sample_inputs((20, 24, 70, 30), dtype, device, transposed=True)
    contiguous = [tensor.detach().contiguous().requires_grad_() for tensor in inputs]
    dy = torch.randn(20, 30, device=device).to(dtype)
    results = [gradients(ops.mlp(*group, "gelu", 0.1, seed_on(device)), group, dy) for group in (inputs, contiguous)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    for index in (1, 3):
        assert inputs[index].stride(0) == 1
        assert results[0][index + 1].stride() == inputs[index].stride()
        assert results[1][index + 1].stride() == contiguous[index].stride()


@pytest.mark.parametrize(
    "view",
    [
        pytest.param(lambda x: x[:, :, 8:32], id="part_of_the_columns"),
        pytest.param(lambda x: x[:, ::2], id="every_other_row"),
        pytest.param(lambda x: x.transpose(0, 1), id="transposed_rows"),
        pytest.param(lambda x: x.transpose(1, 2), id="transposed_columns"),
        pytest.param(lambda x: x[:1].expand(4, -1, -1), id="expanded_rows"),
        pytest.param(lambda x: x[..., :1].expand(-1, -1, 24), id="expanded_columns"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_strided_input(view, dtype, device):
    x = view(torch.randn(4, 6, 40, device=device).to(dtype)).requires_grad_()
    _, *weights = sample_inputs((1, x.shape[-1], 50, 30), dtype, device)
    dy = torch.randn(*x.shape[:-1], 30, device=device).to(dtype)
    contiguous = x.detach().contiguous().requires_grad_()
    got = gradients(ops.mlp(x, *weights, "gelu", 0.1, seed_on(device)), (x, *weights), dy)
    wanted = gradients(ops.mlp(contiguous, *weights, "gelu", 0.1, seed_on(device)), (contiguous, *weights), dy)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_strided_weights_and_upstream_gradients(device):
    inputs = sample_inputs((20, 24, 40, 30), torch.float32, device)
    wanted_y = ops.mlp(*inputs)
    for upstream in (
        torch.randn(30, 20, device=device).t(),
        torch.randn(1, 1, device=device).expand(20, 30),
        torch.randn(20, 60, device=device)[:, :30],
    ):
        wanted = gradients(ops.mlp(*inputs), inputs, upstream.contiguous())
        got = gradients(ops.mlp(*inputs), inputs, upstream)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    x, fc_weight, *others = (tensor.detach() for tensor in inputs)
    apart = torch.zeros(80, 48, device=device)[::2, ::2]  # neither dimension is contiguous
    apart.copy_(fc_weight)
    assert torch.equal(ops.mlp(x, apart, *others), wanted_y)
    row = fc_weight[:1].expand(40, 24)
    assert torch.equal(ops.mlp(x, row, *others), ops.mlp(x, row.contiguous(), *others))


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_offsets_beyond_2_to_the_31(dim, device, far_apart):
    """Distances beyond 2^31 lie between the rows or the columns of every operand."""
    inputs = sample_inputs((130, 20, 40, 24), torch.bfloat16, device)
    dy = torch.randn(130, 24, device=device).bfloat16()
    spread = [far_apart(tensor, dim) if tensor.dim() == 2 else tensor for tensor in inputs]
    results = []
    for tensors, upstream in ((inputs, dy), (spread, far_apart(dy, dim))):
        results.append(gradients(ops.mlp(*tensors, "gelu", 0.1, seed_on(device)), tensors, upstream))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_weights_that_share_memory(device):
    x, weight, *_ = sample_inputs((10, 12, 12, 12), torch.float32, device)
    (shared,) = torch.autograd.grad(ops.mlp(x, weight, None, weight, None).sum(), weight)
    other = weight.detach().clone().requires_grad_()
    parts = torch.autograd.grad(ops.mlp(x, weight, None, other, None).sum(), (weight, other))
    torch.testing.assert_close(shared, sum(parts))


@pytest.mark.parametrize("rows", [(0,), (3, 0), (0, 3)], ids=str)
def test_empty_batch(rows, device):
    inputs = sample_inputs((rows, 24, 40, 30), torch.float32, device)
    y = ops.mlp(*inputs, "gelu", 0.1)
    assert y.shape == (*rows, 30)
    for tensor, grad in zip(inputs, torch.autograd.grad(y, inputs, torch.ones_like(y)), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("shape", [(5, 0, 6, 4), (5, 6, 0, 4), (5, 6, 4, 0), (5, 0, 0, 0), (1, 1, 1, 1)], ids=str)
def test_sizes_of_zero_and_one(shape, device):
    """Empty sums are 0: with C = 0 the hidden layer is its bias, and with F = 0 the output is its bias."""
    inputs = sample_inputs(shape, torch.float32, device)
    y = ops.mlp(*inputs, "relu")
    x, fc_weight, fc_bias, proj_weight, proj_bias = inputs
    wanted = F.linear(F.relu(F.linear(x, fc_weight, fc_bias)), proj_weight, proj_bias)
    dy = torch.randn(y.shape, device=device)
    for a, b in zip(gradients(y, inputs, dy), gradients(wanted, inputs, dy), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("count", range(1, 32))
def test_any_subset_of_gradients(count, device):
    """Each gradient has the same bits, whichever other gradients are needed."""
    inputs = sample_inputs((10, 12, 20, 8), torch.bfloat16, device)
    dy = torch.randn(10, 8, device=device).bfloat16()
    activation, recompute = ACTIVATIONS[count % 3], count % 2 == 1

    def run():
        trained = [tensor for tensor in inputs if tensor.requires_grad]
        y = ops.mlp(*inputs, activation, 0.2, seed_on(device), SITE, recompute)
        grads = iter(torch.autograd.grad(y, trained, dy))
        return [next(grads) if tensor.requires_grad else None for tensor in inputs]

    wanted = run()
    for bit, tensor in enumerate(inputs):
        tensor.requires_grad_(bool(count >> bit & 1))
    for name, a, b in zip(NAMES, run(), wanted, strict=True):
        assert a is None or torch.equal(a, b), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_and_any_number_of_threads_agree_bit_for_bit(dtype, device, threads, thread_counts, implementation):
    rows = 1100 if implementation == "cpp" else 60
    inputs = sample_inputs((rows, 40, 200, 70), dtype, device)
    dy = torch.randn(rows, 70, device=device).to(dtype)

    def run():
        return gradients(ops.mlp(*inputs, "gelu_tanh", 0.1, seed_on(device), SITE), inputs, dy)

    threads(1)
    first = run()
    for count in thread_counts:
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{count} threads"


def test_inputs_are_left_alone(device):
    inputs = sample_inputs((10, 12, 20, 8), torch.float32, device)
    before = [tensor.detach().clone() for tensor in inputs]
    ops.mlp(*inputs, "relu", 0.1).square().sum().backward()
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


def test_the_expected_implementation_ran(device, check_implementation):
    inputs = sample_inputs((10, 12, 20, 8), torch.float32, device)
    check_implementation("mlp", lambda: ops.mlp(*inputs).sum().backward())


def test_the_reference_serves_on_request_and_for_float64(device, monkeypatch):
    calls = []
    definition = reference.mlp
    monkeypatch.setattr(reference, "mlp", lambda *a: (calls.append(a), definition(*a))[1])
    inputs = sample_inputs((10, 12, 20, 8), torch.float32, device)
    with gpt_fast.use_reference():
        ops.mlp(*inputs)
    assert len(calls) == 1
    ops.mlp(*(tensor.double() for tensor in inputs))
    assert len(calls) == 2
    ops.mlp(*inputs)
    assert len(calls) == 2


def test_autocast(device):
    """Autocast casts all operands to its dtype, as for `F.linear`. Each gradient has the dtype of its tensor."""
    inputs = sample_inputs((20, 24, 40, 30), torch.float32, device)
    dy = torch.randn(20, 30, device=device).bfloat16()
    with torch.autocast(device, dtype=torch.bfloat16):
        y = ops.mlp(*inputs, "gelu", 0.1, seed_on(device))
        (dx, *_) = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    assert y.dtype == torch.bfloat16
    grads = torch.autograd.grad(y, inputs, dy)
    assert all(grad.dtype == torch.float32 for grad in grads)
    assert torch.equal(dx, grads[0])
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in inputs]
    wanted = gradients(ops.mlp(*rounded, "gelu", 0.1, seed_on(device)), rounded, dy)
    assert torch.equal(y, wanted[0])
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(grads, wanted[1:], strict=True))


def test_the_kernel_computes_in_its_own_dtype_under_autocast(device):
    """The operator computes in the dtype of its arguments. Autocast casts no product inside it."""
    inputs = [tensor.detach() for tensor in sample_inputs((20, 24, 40, 30), torch.float32, device)]
    args = (*inputs, "gelu", 0.0, None, 0, True)
    wanted = torch.ops.gpt_fast.mlp_forward(*args)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = torch.ops.gpt_fast.mlp_forward(*args)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_opcheck(device):
    inputs = [tensor.detach() for tensor in sample_inputs((20, 24, 40, 30), torch.float32, device, transposed=True)]
    x, fc_weight, fc_bias, proj_weight, _ = inputs
    seed = seed_on(device)
    for p, keeps in ((0.0, False), (0.1, True)):
        args = *inputs, "gelu", p, seed if p else None, 0, keeps
        torch.library.opcheck(torch.ops.gpt_fast.mlp_forward.default, args)
        y, hidden = torch.ops.gpt_fast.mlp_forward(*args)
        for needs in ([True] * 5, [False, True, False, True, False]):
            args = torch.randn_like(y), x, fc_weight, fc_bias, proj_weight, hidden if keeps else None
            args = *args, "gelu", p, seed if p else None, 0, needs
            torch.library.opcheck(torch.ops.gpt_fast.mlp_backward.default, args)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_fullgraph(device, dynamic):
    _, *weights = sample_inputs((1, 24, 40, 30), torch.float32, device)
    compiled = torch.compile(ops.mlp, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 9):
        inputs = torch.randn(rows, 24, device=device, requires_grad=True), *weights
        dy = torch.randn(rows, 30, device=device)
        got, wanted = (
            gradients(f(*inputs, "relu", 0.1, seed_on(device), SITE), inputs, dy) for f in (compiled, ops.mlp)
        )
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_double_backward_says_that_it_is_not_there(device):
    inputs = sample_inputs((10, 12, 20, 8), torch.float32, device)
    (dx,) = torch.autograd.grad(ops.mlp(*inputs).square().sum(), inputs[0], create_graph=True)
    with pytest.raises(NotImplementedError, match="mlp: double backward"):
        dx.sum().backward()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_reference_is_torchs(activation):
    """The reference agrees with PyTorch's functions in float64, and its first and second derivatives are correct."""
    inputs = sample_inputs((5, 4, 7, 3), torch.float64, "cpu")
    x, fc_weight, fc_bias, proj_weight, proj_bias = inputs
    stock = {"relu": F.relu, "gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh")}[activation]
    wanted = F.linear(stock(F.linear(x, fc_weight, fc_bias)), proj_weight, proj_bias)
    assert torch.allclose(reference.mlp(*inputs, activation), wanted, rtol=1e-13, atol=1e-13)
    assert torch.autograd.gradcheck(lambda *a: ops.mlp(*a, activation), inputs)
    if activation != "relu":
        assert torch.autograd.gradgradcheck(lambda *a: ops.mlp(*a, activation), inputs)


MEMORY = r"""
import re, torch, torch.nn.functional as F
from gpt_fast import ops
M, C, H = 4096, 256, 2048
x, w1, b1, w2, b2 = (torch.randn(*s, requires_grad=True) for s in ((M, C), (H, C), (H,), (C, H), (C,)))
def peak():  # of this process alone, which ru_maxrss is not
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) // 1024
def train(f, rows):
    y = f(x[:rows])
    y.backward(torch.ones_like(y))
ours = lambda x: ops.mlp(x, w1, b1, w2, b2, "gelu", 0.1)
eager = lambda x: F.linear(F.dropout(F.gelu(F.linear(x, w1, b1)), 0.1), w2, b2)
train(ours, 64), train(eager, 64)
start = peak()
train(ours, M)
middle = peak()
train(eager, M)
print(middle - start, peak() - start)
"""


def test_peak_memory_is_below_eagers(device, implementation):
    """A training step on CPU keeps one [rows, F] tensor, here 32 MiB, and small blocks. Eager PyTorch keeps four."""
    if implementation != "cpp":
        pytest.skip("the resident set is that of the C++ kernel")
    output = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True).stdout
    ours, eager = map(int, output.split())
    assert ours < 32 + 48, f"{ours} MiB"
    assert ours < 0.6 * eager, f"{ours} MiB, eager {eager} MiB"


BAD_INPUT = [
    pytest.param(lambda x, w, b, v, c: (x.long(), w, b, v, c), "x has dtype int64", id="dtype"),
    pytest.param(lambda x, w, b, v, c: (x, w.half(), b, v, c), "fc_weight has dtype float16", id="mixed_dtypes"),
    pytest.param(lambda x, w, b, v, c: (x, w.to("meta"), b, v, c), "fc_weight on meta", id="mixed_devices"),
    pytest.param(lambda x, w, b, v, c: (x, w[0], b, v, c), r"fc_weight has shape \[12\]", id="fc_weight_dimensions"),
    pytest.param(lambda x, w, b, v, c: (x, w, b, v[None], c), r"proj_weight has shape \[1, 8, 20\]", id="proj_weight"),
    pytest.param(lambda x, w, b, v, c: (x[:, :5], w, b, v, c), r"x has shape \[10, 5\]; expected \[..., 12\]", id="x"),
    pytest.param(lambda x, w, b, v, c: (x[0, 0], w, b, v, c), r"x has shape \[\]", id="scalar"),
    pytest.param(lambda x, w, b, v, c: (x, w, b, v[:, 1:], c), r"proj_weight has shape \[8, 19\]", id="hidden_size"),
    pytest.param(lambda x, w, b, v, c: (x, w, b[1:], v, c), r"fc_bias has shape \[19\]; expected \[20\]", id="fc_bias"),
    pytest.param(
        lambda x, w, b, v, c: (x, w, b, v, c[:3]), r"proj_bias has shape \[3\]; expected \[8\]", id="proj_bias"
    ),
    pytest.param(lambda *a: (*a, "swish"), "activation is 'swish'; expected one of relu", id="activation"),
    pytest.param(lambda *a: (*a, "relu", 1.0), "dropout_p is 1.0", id="certain_dropout"),
    pytest.param(lambda *a: (*a, "relu", -0.1), "dropout_p is -0.1", id="negative_dropout"),
    pytest.param(lambda *a: (*a, "relu", 0.1, torch.tensor([1.0])), "seed has dtype float32", id="seed_dtype"),
    pytest.param(lambda *a: (*a, "relu", 0.1, 3), "seed is of type int", id="seed_number"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_INPUT)
def test_bad_input(spoil, message):
    with pytest.raises(ValueError, match=f"mlp: .*{message}"):
        ops.mlp(*spoil(*sample_inputs((10, 12, 20, 8), torch.float32, "cpu")))
