"""Test linear_cross_entropy against the float64 reference: C++, Triton in the interpreter and Triton on CUDA."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import gpt_fast
from gpt_fast import ops, reference
from tests import numerics

REDUCTIONS = ("mean", "sum", "none")
EXAMPLES = 8 if os.environ.get("TRITON_INTERPRET") == "1" else 20  # the interpreter is slow

# rows, C, V
SHAPES = [
    pytest.param((1, 48, 70), id="one_row"),
    pytest.param((40, 1, 50), id="one_column"),
    pytest.param((6, 20, 1), id="one_class"),
    pytest.param((16, 64, 128), id="powers_of_two"),
    pytest.param((33, 40, 70), id="off_powers_of_two"),
    pytest.param((17, 65, 129), id="one_past_a_block"),
]


def sample_inputs(shape, dtype, device, *, bias=True, transposed=False, ignored=0.3):
    """Return x, weight and bias, which require gradients, and targets. A share `ignored` of the targets is -100."""
    rows, C, V = shape
    rows = rows if isinstance(rows, tuple) else (rows,)
    weight = torch.randn(V, C, device=device).to(dtype)
    x = torch.randn(*rows, C, device=device).to(dtype).requires_grad_()
    weight = (weight.t().contiguous().t() if transposed else weight).requires_grad_()
    target = torch.randint(0, V, rows, device=device)
    target[torch.rand(rows, device=device) < ignored] = -100
    return x, weight, torch.randn(V, device=device).to(dtype).requires_grad_() if bias else None, target


def gradients(loss, inputs, dloss):
    return torch.autograd.grad(loss, [tensor for tensor in inputs if tensor is not None], dloss)


def yardstick(x, weight, bias, target, ignore_index, smoothing, reduction, dloss):
    """Return the gradients with the roundings that the op's contract names.

    The contract rounds the logits' gradient, and dx before it is scaled. A mean scales by 1 / count: the power of two
    in this factor is applied after dx is rounded, and the rest of the factor before.
    """
    dtype, V = x.dtype, weight.shape[0]
    rows, targets = x.detach().reshape(target.numel(), x.shape[-1]).float(), target.reshape(-1)
    valid = targets != ignore_index
    logits = F.linear(rows, weight.detach().float(), None if bias is None else bias.detach().float())
    dlogits = torch.softmax(logits, -1) - smoothing / V
    dlogits -= F.one_hot(targets.where(valid, 0), V) * (1 - smoothing)
    dlogits *= valid[:, None]
    upstream, count = dloss, torch.ones((), device=x.device)
    if reduction == "none":
        dlogits *= dloss.reshape(-1, 1)
        upstream = count
    elif reduction == "mean":
        count = valid.sum().clamp(min=1).float()
    power = 2.0 ** count.log2().floor()
    operand, scale = dlogits.to(dtype).float(), upstream / count
    dx = (operand @ weight.detach().float() * (power / count)).to(dtype).float() * (upstream / power)
    grads = dx.view(x.shape), operand.t() @ rows * scale, dlogits.sum(0) * scale
    return [grad.to(dtype) for grad in grads[: 2 + (bias is not None)]]


def check(inputs, ignore_index=-100, smoothing=0.0, reduction="mean"):
    """Compare forward and backward, with a random upstream gradient, with the reference in float64."""
    x, weight, bias, target = inputs
    leaves = x, weight, bias
    options = ignore_index, smoothing, reduction
    loss = ops.linear_cross_entropy(x, weight, target, bias, *options)
    assert loss.dtype == torch.float32
    assert loss.shape == (target.shape if reduction == "none" else ())
    dloss = torch.randn(loss.shape, device=loss.device)
    got = gradients(loss, leaves, dloss)

    wide = [numerics.exact(tensor) for tensor in leaves]
    exact_loss = reference.linear_cross_entropy(*wide[:2], target, wide[2], *options)
    exact = gradients(exact_loss, wide, dloss.double())
    # A small loss is the difference of larger numbers: of logits, and of the logarithm of a sum near 1.
    logits = F.linear(*(tensor.detach() for tensor in wide[:2]))
    conditioning = 2 * numerics.EPS32 * (1 + (logits.abs().max().item() if logits.numel() else 0.0))
    if reduction == "sum":
        conditioning *= target.numel()
    numerics.assert_rounded_once(loss.detach(), exact_loss.detach(), conditioning=conditioning, label="loss")
    allowed = yardstick(*inputs, *options, dloss)
    for label, a, b, truth in zip(("dx", "dweight", "dbias"), got, allowed, exact, strict=False):
        numerics.assert_as_accurate(a, b, truth, label=label)
    return loss.detach(), *got


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_numerics(shape, dtype, reduction, device):
    check(sample_inputs(shape, dtype, device, ignored=0 if shape[0] == 1 else 0.3), reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("upstream", [1.0, 1024.0], ids=["loss", "scaled_loss"])
@pytest.mark.parametrize("rows", [1, 63, 64, 100])
def test_dx_of_a_mean_is_rounded_once(rows, upstream, dtype, device):
    """Logits of zero over four classes have exact gradients, so only the rounding of dx remains.

    The upstream gradients are 1, and a power of two as for loss scaling in half precision.
    """
    weight = torch.randn(4, 500, device=device).to(dtype)
    x = torch.zeros(rows, 500, device=device, dtype=dtype, requires_grad=True)
    target = torch.randint(0, 4, (rows,), device=device)
    loss = ops.linear_cross_entropy(x, weight, target)
    (got,) = torch.autograd.grad(loss, x, torch.full_like(loss, upstream))
    exact = (0.25 - F.one_hot(target, 4).double()) @ weight.double() * upstream / rows
    numerics.assert_as_accurate(got, exact.to(dtype), exact, label="dx")


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_label_smoothing(dtype, reduction, smoothing, device):
    check(sample_inputs((33, 40, 70), dtype, device), smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_without_bias(dtype, reduction, device):
    check(sample_inputs((33, 40, 70), dtype, device, bias=False), reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_several_chunks_of_rows_and_of_the_vocabulary(dtype, reduction, device, implementation):
    rows, V = (2400, 1300) if implementation == "cpp" else (150, 300)  # 70 % of the rows are not ignored
    check(sample_inputs(((3, rows // 3), 33, V), dtype, device), smoothing=0.1, reduction=reduction)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_more_classes_than_are_multiplied_at_once(dtype, device, implementation):
    """The gradient dx is a sum over the vocabulary. For so many classes it is computed as a sum of several products."""
    check(sample_inputs((6, 20, 9000 if implementation == "cpp" else 700), dtype, device))


@settings(max_examples=EXAMPLES, deadline=None)
@given(
    rows=st.integers(1, 40),
    C=st.integers(1, 80),
    V=st.integers(2, 200),
    bias=st.booleans(),
    transposed=st.booleans(),
    smoothing=st.sampled_from([0.0, 0.2]),
    reduction=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 999),
)
def test_any_shape(rows, C, V, bias, transposed, smoothing, reduction, seed):
    torch.manual_seed(seed)
    inputs = sample_inputs((rows, C, V), torch.float32, "cpu", bias=bias, transposed=transposed)
    check(inputs, smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ignored_rows_do_not_count(reduction, device):
    """Ignored rows may contain NaN. The results are those without the rows, and the rows' own gradient is 0."""
    x, weight, bias, target = sample_inputs((50, 24, 70), torch.float32, device)
    ignored = target == -100
    spoiled = x.detach().clone()
    spoiled[ignored] = torch.nan
    spoiled.requires_grad_()
    kept = x.detach()[~ignored].requires_grad_()
    upstream = torch.randn(50, device=device) if reduction == "none" else torch.randn((), device=device)
    loss = ops.linear_cross_entropy(spoiled, weight, target, bias, reduction=reduction)
    wanted = ops.linear_cross_entropy(kept, weight, target[~ignored], bias, reduction=reduction)
    got_grads = torch.autograd.grad(loss, (spoiled, weight, bias), upstream)
    none = reduction == "none"
    wanted_grads = torch.autograd.grad(wanted, (kept, weight, bias), upstream[~ignored] if none else upstream)
    assert torch.equal(loss[~ignored] if none else loss, wanted)
    assert not none or torch.equal(loss[ignored], torch.zeros_like(loss[ignored]))
    assert torch.equal(got_grads[0][ignored], torch.zeros_like(spoiled[ignored]))
    assert torch.equal(got_grads[0][~ignored], wanted_grads[0])
    assert torch.equal(got_grads[1], wanted_grads[1]) and torch.equal(got_grads[2], wanted_grads[2])


def test_rows_that_count_across_steps(device):
    """There are more rows than the kernel looks through in one step when it packs the rows that are not ignored."""
    check(sample_inputs((2100, 2, 3), torch.float32, device, bias=False))


@pytest.mark.parametrize("ignore_index", [3, -1, 10**12])
def test_any_ignore_index(ignore_index, device):
    x, weight, bias, target = sample_inputs((50, 24, 9), torch.float32, device, ignored=0)
    target[::4] = ignore_index
    check((x, weight, bias, target), ignore_index=ignore_index)


@pytest.mark.parametrize("rows", [(5,), (0,), (2, 0)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_nothing_counts(reduction, rows, device):
    """If all rows are ignored, or there are no rows, the loss and all gradients are 0."""
    x, weight, bias, target = sample_inputs((rows, 24, 70), torch.float32, device, ignored=2)
    loss = ops.linear_cross_entropy(x, weight, target, bias, reduction=reduction)
    assert torch.equal(loss, torch.zeros(rows if reduction == "none" else (), device=device))
    for tensor, grad in zip((x, weight, bias), gradients(loss, (x, weight, bias), torch.ones_like(loss)), strict=True):
        assert torch.equal(grad, torch.zeros_like(tensor))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5, 0, 7), (1, 1, 1), (1, 0, 1)], ids=str)
def test_sizes_of_zero_and_one(shape, reduction, device):
    """With C = 0 the logits are the bias. With one class its probability is 1."""
    check(sample_inputs(shape, torch.float32, device, ignored=0), reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_classes(reduction, device):
    """With V = 0 every target must be ignored, and the loss is 0."""
    x, weight, bias, target = sample_inputs((4, 3, 1), torch.float32, device, ignored=2)
    weight, bias = (tensor.detach()[:0].requires_grad_() for tensor in (weight, bias))
    loss = ops.linear_cross_entropy(x, weight, target, bias, reduction=reduction)
    assert not loss.any()
    dx, dweight, dbias = gradients(loss, (x, weight, bias), torch.ones_like(loss))
    assert not dx.any() and dweight.shape == (0, 3) and dbias.shape == (0,)


def test_large_logits(device):
    """Logits that are far apart neither overflow nor give NaN."""
    x = torch.tensor([[1e4], [-1e4], [3.0]], device=device, requires_grad=True)
    weight = torch.linspace(-1, 1, 150, device=device)[:, None].clone().requires_grad_()
    target = torch.tensor([149, 149, 0], device=device)
    check((x, weight, None, target), reduction="none")
    check((x, weight, None, target), smoothing=0.1, reduction="sum")


def test_classes_ruled_out_by_the_bias(device):
    """A bias of -inf removes classes, even whole blocks of the vocabulary."""
    x, weight, bias, target = sample_inputs((9, 24, 200), torch.float32, device, ignored=0)
    target = target % 20
    open_only = ops.linear_cross_entropy(x, weight[:20], target, bias[:20])
    shut = bias.detach().clone()
    shut[20:] = -torch.inf
    loss = ops.linear_cross_entropy(x, weight, target, shut.requires_grad_())
    assert torch.allclose(loss, open_only, rtol=1e-6)
    dweight, dbias = torch.autograd.grad(loss, (weight, shut))
    assert torch.equal(dweight[20:], torch.zeros_like(dweight[20:])) and not dbias.isnan().any()


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_transposed_weight(dtype, device):
    """A transposed weight gives the bits of a contiguous one, and its gradient has the weight's strides."""
    x, weight, bias, target = sample_inputs((20, 24, 70), dtype, device, transposed=True)
    contiguous = weight.detach().contiguous().requires_grad_()
    for reduction in ("mean", "none"):
        results = []
        for w in (weight, contiguous):
            loss = ops.linear_cross_entropy(x, w, target, bias, reduction=reduction)
            results.append(gradients(loss, (x, w, bias), torch.ones_like(loss)))
            assert results[-1][1].stride() == w.stride()
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


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
def test_strided_input(view, device):
    x = view(torch.randn(4, 6, 40, device=device)).requires_grad_()
    _, weight, bias, target = sample_inputs((x.shape[:-1], x.shape[-1], 50), torch.float32, device)
    contiguous = x.detach().contiguous().requires_grad_()
    for reduction in REDUCTIONS:
        results = []
        for tensor in (x, contiguous):
            loss = ops.linear_cross_entropy(tensor, weight, target, bias, reduction=reduction)
            results.append((loss, *gradients(loss, (tensor, weight, bias), torch.ones_like(loss))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_other_strides(device):
    """Strided or expanded weights, biases, targets and upstream gradients give the bits of contiguous ones."""
    x, weight, bias, target = (tensor.detach() for tensor in sample_inputs((20, 24, 70), torch.float32, device))
    apart = torch.zeros(140, 48, device=device)[::2, ::2].copy_(weight)
    wanted = ops.linear_cross_entropy(x, weight, target, bias)
    assert torch.equal(ops.linear_cross_entropy(x, apart, target, bias), wanted)
    assert torch.equal(ops.linear_cross_entropy(x, weight, target.repeat_interleave(2)[::2], bias), wanted)
    assert torch.equal(ops.linear_cross_entropy(x, weight, target, bias.repeat_interleave(2)[::2]), wanted)
    one = target[:1].clamp(min=0).expand(20)
    assert torch.equal(
        ops.linear_cross_entropy(x, weight, one, bias), ops.linear_cross_entropy(x, weight, one.contiguous(), bias)
    )
    x.requires_grad_()
    loss = ops.linear_cross_entropy(x, weight, target, bias, reduction="none")
    (got,) = torch.autograd.grad(loss, x, torch.ones((), device=device).expand(20), retain_graph=True)
    assert torch.equal(got, torch.autograd.grad(loss, x, torch.ones(20, device=device))[0])


@pytest.mark.parametrize("dim", [0, 1], ids=["rows", "columns"])
def test_offsets_beyond_2_to_the_31(dim, device, far_apart):
    """Distances beyond 2^31 lie between the rows or the columns of x and the weight."""
    x, weight, bias, target = sample_inputs((130, 20, 150), torch.bfloat16, device)
    results = []
    for tensors in ((x, weight), (far_apart(x, dim), far_apart(weight, dim))):
        loss = ops.linear_cross_entropy(*tensors, target, bias)
        results.append((loss, *gradients(loss, (*tensors, bias), torch.ones_like(loss))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.slow
def test_more_than_2_to_the_31_logits(device, implementation):
    """One row and one class are expanded to 66,000 rows and 33,000 classes. Every loss is log(V)."""
    if implementation == "triton" and device == "cpu":
        pytest.skip("hours in the interpreter")
    N, V = 66_000, 33_000
    x = torch.ones(1, 2, device=device).expand(N, 2)
    weight = torch.full((1, 2), 0.5, device=device).expand(V, 2)
    bias = torch.zeros(V, device=device, requires_grad=True)
    target = torch.full((N,), V - 1, device=device)
    assert N * V > 2**31
    loss = ops.linear_cross_entropy(x, weight, target, bias, reduction="none")
    torch.testing.assert_close(loss, torch.full_like(loss, V).log())
    (dbias,) = torch.autograd.grad(ops.linear_cross_entropy(x, weight, target, bias), bias)
    torch.testing.assert_close(dbias[:-1], torch.full_like(dbias[:-1], 1 / V), rtol=1e-4, atol=0)
    # The kernel adds 66,000 equal float32 terms in 262 chunks, so the relative error is at most 262 eps / 2.
    torch.testing.assert_close(dbias[-1].item(), 1 / V - 1, rtol=2e-5, atol=0)


def test_x_and_weight_that_share_memory(device):
    x, _, _, target = sample_inputs((20, 24, 20), torch.float32, device)
    (shared,) = torch.autograd.grad(ops.linear_cross_entropy(x, x, target), x)
    weight = x.detach().clone().requires_grad_()
    parts = torch.autograd.grad(ops.linear_cross_entropy(x, weight, target), (x, weight))
    torch.testing.assert_close(shared, sum(parts))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("subset", range(1, 8))
def test_any_subset_of_gradients(subset, reduction, device):
    """Each gradient has the same bits, whichever other gradients are needed."""
    *inputs, target = sample_inputs((20, 24, 70), torch.bfloat16, device)
    x, weight, bias = inputs

    def run():
        trained = [tensor for tensor in inputs if tensor.requires_grad]
        loss = ops.linear_cross_entropy(x, weight, target, bias, reduction=reduction)
        grads = iter(torch.autograd.grad(loss, trained, torch.full_like(loss, 0.7)))
        return [next(grads) if tensor.requires_grad else None for tensor in inputs]

    wanted = run()
    for bit, tensor in enumerate(inputs):
        tensor.requires_grad_(bool(subset >> bit & 1))
    for a, b in zip(run(), wanted, strict=True):
        assert a is None or torch.equal(a, b)


def test_without_gradients_the_loss_is_the_same(device):
    x, weight, bias, target = sample_inputs((50, 24, 200), torch.float32, device)
    wanted = ops.linear_cross_entropy(x, weight, target, bias)
    with torch.no_grad():
        assert torch.equal(ops.linear_cross_entropy(x, weight, target, bias), wanted)


def test_backward_may_run_twice(device):
    x, weight, bias, target = sample_inputs((20, 24, 70), torch.float32, device)
    loss = ops.linear_cross_entropy(x, weight, target, bias)
    first = torch.autograd.grad(loss, (x, weight, bias), torch.tensor(0.3, device=device), retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight, bias), torch.tensor(0.3, device=device))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_two_runs_and_any_number_of_threads_agree_bit_for_bit(
    reduction, dtype, device, threads, thread_counts, implementation
):
    shape = (1200, 40, 1300) if implementation == "cpp" else (60, 40, 250)
    x, weight, bias, target = sample_inputs(shape, dtype, device)

    def run():
        loss = ops.linear_cross_entropy(x, weight, target, bias, reduction=reduction)
        return loss, *gradients(loss, (x, weight, bias), torch.full_like(loss, 0.7))

    threads(1)
    first = run()
    for count in thread_counts:
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{count} threads"


def test_inputs_are_left_alone(device):
    inputs = sample_inputs((20, 24, 70), torch.float32, device)
    before = [tensor.detach().clone() for tensor in inputs]
    x, weight, bias, target = inputs
    ops.linear_cross_entropy(x, weight, target, bias).backward()
    assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_expected_implementation_ran(reduction, device, implementation, check_implementation):
    if implementation == "triton" and reduction != "none":
        pytest.skip("forward alone gives the gradients; the next reduction launches both")
    x, weight, bias, target = sample_inputs((20, 24, 70), torch.float32, device)

    def call():
        ops.linear_cross_entropy(x, weight, target, bias, reduction=reduction).sum().backward()

    check_implementation("linear_cross_entropy", call)


def test_the_reference_serves_on_request_and_for_float64(device, monkeypatch):
    calls = []
    definition = reference.linear_cross_entropy
    monkeypatch.setattr(reference, "linear_cross_entropy", lambda *a: (calls.append(a), definition(*a))[1])
    x, weight, bias, target = sample_inputs((20, 24, 70), torch.float32, device)
    with gpt_fast.use_reference():
        ops.linear_cross_entropy(x, weight, target, bias)
    assert len(calls) == 1
    ops.linear_cross_entropy(x.double(), weight.double(), target, bias.double())
    assert len(calls) == 2
    ops.linear_cross_entropy(x, weight, target, bias)
    assert len(calls) == 2


def test_autocast(device):
    """Autocast casts the operands to its dtype, as for `F.linear`. The loss stays float32."""
    x, weight, bias, target = sample_inputs((20, 24, 70), torch.float32, device)
    with torch.autocast(device, dtype=torch.bfloat16):
        loss = ops.linear_cross_entropy(x, weight, target, bias)
    assert loss.dtype == torch.float32
    grads = gradients(loss, (x, weight, bias), torch.ones_like(loss))
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in (x, weight, bias)]
    wanted = ops.linear_cross_entropy(rounded[0], rounded[1], target, rounded[2])
    assert torch.equal(loss, wanted)
    for a, b in zip(grads, gradients(wanted, rounded, torch.ones_like(loss)), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a.bfloat16(), b)


def test_the_kernel_computes_in_its_own_dtype_under_autocast(device):
    """The operator computes in the dtype of its arguments. Autocast casts no product inside it."""
    x, weight, bias, target = (tensor.detach() for tensor in sample_inputs((20, 24, 70), torch.float32, device))
    args = x, weight, target, bias, -100, 0.0, "mean", True, True, True
    wanted = torch.ops.gpt_fast.linear_cross_entropy_forward(*args)
    with torch.autocast(device, dtype=torch.bfloat16):
        got = torch.ops.gpt_fast.linear_cross_entropy_forward(*args)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_opcheck(device):
    x, weight, bias, target = (
        tensor.detach() for tensor in sample_inputs((20, 24, 70), torch.float32, device, transposed=True)
    )
    forward = torch.ops.gpt_fast.linear_cross_entropy_forward.default
    backward = torch.ops.gpt_fast.linear_cross_entropy_backward.default
    for reduction, needs in (("mean", (True, True, True)), ("sum", (False, True, False)), ("none", (False,) * 3)):
        torch.library.opcheck(forward, (x, weight, target, bias, -100, 0.1, reduction, *needs))
        torch.library.opcheck(forward, (x.bfloat16(), weight.bfloat16(), target, None, -100, 0.0, reduction, *needs))
    dloss = torch.randn(20, device=device)
    for needs in ((True, True, True), (True, False, False)):
        torch.library.opcheck(backward, (dloss, x, weight, target, bias, -100, 0.1, *needs))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fullgraph(reduction, dynamic, device):
    """The op compiles to one graph although the number of ignored rows depends on the data."""
    compiled = torch.compile(ops.linear_cross_entropy, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 9):
        x, weight, bias, target = sample_inputs((rows, 24, 70), torch.float32, device)
        results = []
        for function in (compiled, ops.linear_cross_entropy):
            loss = function(x, weight, target, bias, reduction=reduction)
            results.append((loss, *gradients(loss, (x, weight, bias), torch.full_like(loss, 0.7))))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_double_backward_says_that_it_is_not_there(reduction, device):
    x, weight, bias, target = sample_inputs((20, 24, 70), torch.float32, device)
    loss = ops.linear_cross_entropy(x, weight, target, bias, reduction=reduction)

    def twice():
        (dx,) = torch.autograd.grad(loss.square().sum(), x, create_graph=True)
        dx.sum().backward()

    with pytest.raises(NotImplementedError, match="linear_cross_entropy: double backward"):
        twice()


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_reference_is_torchs(reduction):
    """The reference agrees with PyTorch's loss in float64, and its first and second derivatives are correct."""
    x, weight, bias, target = sample_inputs((4, 3, 5), torch.float64, "cpu")
    wanted = F.cross_entropy(F.linear(x, weight, bias), target, label_smoothing=0.1, reduction=reduction)
    got = reference.linear_cross_entropy(x, weight, target, bias, -100, 0.1, reduction)
    assert torch.allclose(got, wanted, rtol=1e-13, atol=1e-13)

    def function(x, weight, bias):
        return ops.linear_cross_entropy(x, weight, target, bias, -100, 0.1, reduction)

    assert torch.autograd.gradcheck(function, (x, weight, bias))
    assert torch.autograd.gradgradcheck(function, (x, weight, bias))


MEMORY = r"""
import re, torch
from gpt_fast import ops
C, V = 16, 20000
weight = torch.randn(V, C, requires_grad=True)
def peak(rows):
    x, target = torch.randn(rows, C, requires_grad=True), torch.randint(0, V, (rows,))
    for reduction in ("mean", "none"):
        ops.linear_cross_entropy(x, weight, target, reduction=reduction).sum().backward()
    # Of this process alone, which ru_maxrss is not.
    return int(re.search(r"VmHWM:\s+(\d+)", open("/proc/self/status").read())[1]) // 1024
print(peak(1024), peak(8192))
"""


def test_peak_memory_does_not_grow_with_the_logits(device, implementation):
    """With eight times the rows the peak on CPU grows by less than 40 MiB. The logits alone would take 625 MiB."""
    if implementation != "cpp":
        pytest.skip("the resident set is that of the C++ kernel")
    output = subprocess.run([sys.executable, "-c", MEMORY], check=True, capture_output=True, text=True).stdout
    few, many = map(int, output.split())
    assert many - few < 40, f"{many - few} MiB"


BAD_INPUT = [
    pytest.param(lambda x, w, t, b: (x.long(), w, t, b), "x has dtype int64", id="dtype"),
    pytest.param(lambda x, w, t, b: (x, w.half(), t, b), "weight has dtype float16", id="mixed_dtypes"),
    pytest.param(lambda x, w, t, b: (x, w.to("meta"), t, b), "weight on meta", id="mixed_devices"),
    pytest.param(lambda x, w, t, b: (x, w[0], t, b), r"weight has shape \[24\]", id="weight_dimensions"),
    pytest.param(lambda x, w, t, b: (x[:, :5], w, t, b), r"x has shape \[20, 5\]; expected \[..., 24\]", id="x_shape"),
    pytest.param(lambda x, w, t, b: (x, w, t[1:], b), r"target has shape \[19\]; expected \[20\]", id="target_shape"),
    pytest.param(lambda x, w, t, b: (x, w, t.int(), b), "target has dtype int32; expected int64", id="target_dtype"),
    pytest.param(lambda x, w, t, b: (x, w, t, b[1:]), r"bias has shape \[69\]; expected \[70\]", id="bias_shape"),
    pytest.param(lambda *a: (*a, -100, 0.0, "max"), "reduction is 'max'; expected one of mean", id="reduction"),
    pytest.param(lambda *a: (*a, -100, -0.1), "label_smoothing is -0.1", id="negative_smoothing"),
    pytest.param(lambda *a: (*a, -100, 1.1), "label_smoothing is 1.1", id="too_much_smoothing"),
    pytest.param(lambda *a: (*a, -100, float("nan")), "label_smoothing is nan", id="nan_smoothing"),
    pytest.param(lambda x, w, t, b: (x, w, t.clamp(max=69) + 70, b), "target holds", id="target_above"),
    pytest.param(lambda x, w, t, b: (x, w, t.clamp(min=-1).clamp(max=-1), b), "target holds -1", id="target_below"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_INPUT)
def test_bad_input(spoil, message):
    x, weight, bias, target = sample_inputs((20, 24, 70), torch.float32, "cpu")
    with pytest.raises(ValueError, match=f"linear_cross_entropy: .*{message}"):
        ops.linear_cross_entropy(*spoil(x, weight, target, bias))


@pytest.mark.parametrize("value", [-(2**62), -1, 70, 2**62])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_targets_out_of_range_are_clamped(reduction, value, device, implementation):
    """Triton kernels clamp targets that were not validated to the nearest class, and read nothing out of bounds."""
    if implementation == "cpp":
        pytest.skip("the C++ kernel raises")
    x, weight, bias, target = (tensor.detach() for tensor in sample_inputs((20, 24, 70), torch.float32, device))
    results = []
    for replaced in (value, min(max(value, 0), 69)):
        target[7] = replaced
        results.append(
            torch.ops.gpt_fast.linear_cross_entropy_forward(
                x, weight, target, bias, -100, 0.1, reduction, *(reduction != "none",) * 3
            )
        )
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("value", [-1, 70])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_kernel_checks_targets_itself(reduction, value, implementation):
    """The C++ kernel validates targets, because compiled code skips the validation of the public function."""
    if implementation != "cpp":
        pytest.skip("only the C++ kernel raises; others clamp")
    x, weight, bias, target = (tensor.detach() for tensor in sample_inputs((20, 24, 70), torch.float32, "cpu"))
    target[7] = value
    message = rf"linear_cross_entropy: target holds {value}; expected values in \[0, 70\) or -100"
    with pytest.raises(ValueError, match=message):
        torch.ops.gpt_fast.linear_cross_entropy_forward(
            x, weight, target, bias, -100, 0.0, reduction, False, False, False
        )
    with pytest.raises(ValueError, match=message):
        torch.ops.gpt_fast.linear_cross_entropy_backward(
            torch.ones(20), x, weight, target, bias, -100, 0.0, True, True, True
        )
    assert ops.linear_cross_entropy(x, weight, target.clamp(0, 69), bias).isfinite()
