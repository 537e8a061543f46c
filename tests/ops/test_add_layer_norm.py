"""Test add_layer_norm against the float64 reference, and against addition followed by layer_norm."""

import contextlib
import importlib

import pytest
import torch

import gpt_fast
from gpt_fast import ops, reference
from tests import numerics
from tests.conftest import PRODUCT_DTYPES

EPS = 1e-5
SHAPES = [
    pytest.param((1, 768), id="one_row"),
    pytest.param((5, 1), id="one_column"),
    pytest.param((7, 33), id="off_powers_of_two"),
    pytest.param((17, 129), id="one_past_a_block"),
    pytest.param((2, 9, 768), id="gpt2_width"),
    pytest.param((3, 1600), id="gpt2_xl_width"),
]
DTYPE_PAIRS = [
    *(pytest.param(dtype, dtype, id=str(dtype)) for dtype in numerics.DTYPES),
    pytest.param(torch.bfloat16, torch.float32, id="bfloat16_branch_on_float32_stream"),
    pytest.param(torch.float32, torch.float16, id="float32_branch_on_float16_stream"),
    pytest.param(torch.bfloat16, torch.float16, id="two_half_types_meet_in_float32"),
]


def sample_inputs(shape, device, x_dtype=torch.float32, residual_dtype=torch.float32):
    C = shape[-1]
    x = torch.randn(shape, device=device).to(x_dtype).requires_grad_()
    residual = torch.randn(shape, device=device).mul(2).to(residual_dtype).requires_grad_()
    dtype = torch.promote_types(x_dtype, residual_dtype)
    weight = (torch.randn(C, device=device) * 0.5 + 1).to(dtype).requires_grad_()
    bias = torch.randn(C, device=device).to(dtype).requires_grad_()
    return x, residual, weight, bias


def check(x, residual, weight, bias, p=0.0, uses=("normed", "summed")):
    seed, site = torch.tensor([77], device=x.device), 6
    outputs = dict(
        zip(("normed", "summed"), ops.add_layer_norm(x, residual, weight, bias, EPS, p, seed, site), strict=True)
    )
    upstream = {name: torch.randn(x.shape, device=x.device).to(outputs[name].dtype) for name in uses}
    names, inputs = ("dx", "dresidual", "dweight", "dbias"), (x, residual, weight, bias)
    grads = dict(
        zip(
            names,
            torch.autograd.grad([outputs[name] for name in uses], inputs, list(upstream.values()), allow_unused=True),
            strict=True,
        )
    )
    # `summed` is rounded once. `normed` and the gradients are computed from the rounded `summed`.
    xd, rd = x.detach().double(), residual.detach().double()
    keep = reference.dropout_keep_rows(seed, site, xd.numel() // xd.shape[-1], xd.shape[-1], p).view(xd.shape)
    factor = keep * reference.dropout_scale(p)
    numerics.assert_rounded_once(outputs["summed"], rd + xd * factor, label="summed")

    stored = outputs["summed"].detach().double().requires_grad_()
    wd, bd = numerics.exact(weight), numerics.exact(bias)
    normed = reference.layer_norm(stored, wd, bd, EPS)
    delta = numerics.norm_conditioning(stored.detach(), EPS)
    numerics.assert_rounded_once(
        outputs["normed"], normed.detach(), conditioning=delta * wd.detach().abs(), label="normed"
    )
    if "normed" not in uses:
        assert grads["dweight"] is None or not grads["dweight"].any()
        dstored, conditioning = torch.zeros_like(xd), 0.0
    else:
        dy = upstream["normed"].double()
        dstored, dweight, dbias = torch.autograd.grad(normed, (stored, wd, bd), dy)
        xhat = reference.layer_norm(stored.detach(), None, None, EPS)
        rstd = (stored.detach().var(-1, keepdim=True, unbiased=False) + EPS).rsqrt()
        conditioning = delta * rstd * (dy * wd.detach()).abs().amax(-1, keepdim=True) * (1 + xhat.abs())
        moved = (dy.abs() * delta).reshape(-1, x.shape[-1]).sum(0)
        numerics.assert_rounded_once(grads["dweight"], dweight, conditioning=moved, label="dweight")
        summed = numerics.sum_conditioning(dy.reshape(-1, dy.shape[-1]))
        numerics.assert_rounded_once(grads["dbias"], dbias, conditioning=summed, label="dbias")
    if "summed" in uses:
        dstored = dstored + upstream["summed"].double()
    numerics.assert_rounded_once(grads["dresidual"], dstored, conditioning=conditioning, label="dresidual")
    numerics.assert_rounded_once(grads["dx"], dstored * factor, conditioning=conditioning * factor, label="dx")
    return outputs


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape, p, device):
    check(*sample_inputs(shape, device), p)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize(("x_dtype", "residual_dtype"), DTYPE_PAIRS)
def test_dtypes(x_dtype, residual_dtype, p, device):
    outputs = check(*sample_inputs((7, 70), device, x_dtype, residual_dtype), p)
    wider = torch.promote_types(x_dtype, residual_dtype)
    assert outputs["normed"].dtype == outputs["summed"].dtype == wider


def test_several_tiles_a_program(device, implementation, monkeypatch):
    """There are more rows than the programs of the backward kernel take at once, so each program's loop iterates."""
    if implementation != "triton":
        pytest.skip("a launch configuration of the Triton kernel")
    kernel = importlib.import_module("gpt_fast.kernels.add_layer_norm")
    shipped = kernel.config
    monkeypatch.setattr(kernel, "config", lambda *a: shipped(*a)._replace(bwd_programs=2))
    check(*sample_inputs((70, 200), device), 0.1)


@pytest.mark.parametrize("uses", [("normed",), ("summed",)], ids=["post_norm", "summed_alone"])
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_one_output_used(uses, p, device):
    check(*sample_inputs((7, 70), device), p, uses=uses)


@pytest.mark.parametrize("frozen", ["x", "residual", "weight", "bias"])
def test_frozen_inputs(frozen, device):
    """The gradients of the other inputs do not change if one input requires no gradient."""
    inputs = dict(zip(("x", "residual", "weight", "bias"), sample_inputs((7, 70), device), strict=True))
    upstream = torch.randn(2, 7, 70, device=device).unbind()
    everything = torch.autograd.grad(ops.add_layer_norm(*inputs.values()), inputs.values(), upstream)
    wanted = dict(zip(inputs, everything, strict=True))
    inputs[frozen].requires_grad_(False)
    trained = {name: tensor for name, tensor in inputs.items() if name != frozen}
    got = torch.autograd.grad(ops.add_layer_norm(*inputs.values()), trained.values(), upstream)
    for name, grad in zip(trained, got, strict=True):
        assert torch.equal(grad, wanted[name]), name


def test_without_dropout_it_is_addition_and_layer_norm(device):
    x, residual, weight, bias = sample_inputs((7, 70), device)
    normed, summed = ops.add_layer_norm(x, residual, weight, bias, EPS)
    assert torch.equal(summed, x + residual)
    assert torch.equal(normed, ops.layer_norm(x + residual, weight, bias, EPS))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.999, 1 - 2**-18])
def test_dropout_is_the_contracts_bit_for_bit(p, device):
    """With a residual of zeros and x of ones, `summed` and the gradient of x show the dropout mask."""
    rows, C, seed, site = 37, 203, torch.tensor([-5], device=device), 9
    x = torch.ones(rows, C, device=device, requires_grad=True)
    _, summed = ops.add_layer_norm(x, torch.zeros_like(x), dropout_p=p, seed=seed, site=site)
    (dx,) = torch.autograd.grad(summed, x, torch.ones_like(summed))
    wanted = reference.dropout_keep_rows(seed, site, rows, C, p).float() * reference.dropout_scale(p)
    assert torch.equal(summed, wanted)
    assert torch.equal(dx, wanted)


def test_the_residual_is_not_dropped(device):
    residual = torch.randn(9, 40, device=device)
    _, summed = ops.add_layer_norm(torch.zeros_like(residual), residual, dropout_p=0.5)
    assert torch.equal(summed, residual)


def test_seeds_are_drawn_from_torchs_generator(device):
    x, residual, weight, bias = sample_inputs((7, 70), device)

    def run():
        return ops.add_layer_norm(x, residual, weight, bias, EPS, 0.5)[1]

    torch.manual_seed(1)
    first, second = run(), run()
    torch.manual_seed(1)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)


def test_strided_inputs(device):
    base = torch.randn(6, 4, 160, device=device)
    x, residual = base[:, :, :70].detach().requires_grad_(), base.transpose(0, 1)[:, :, 80:150].reshape(6, 4, 70)
    _, _, weight, bias = sample_inputs((1, 70), device)
    check(x, residual.detach().requires_grad_(), weight, bias, 0.3)
    shared = base[..., :70].detach()
    normed, _ = ops.add_layer_norm(shared, shared, weight, bias, EPS)
    assert torch.equal(normed, ops.add_layer_norm(shared.clone(), shared.clone(), weight, bias, EPS)[0])


@pytest.mark.parametrize(
    "upstream",
    [
        pytest.param(lambda dy: dy.t().contiguous().t(), id="transposed"),
        pytest.param(lambda dy: dy[:1, :1].expand_as(dy), id="expanded"),
        pytest.param(lambda dy: dy.repeat(1, 2)[:, : dy.shape[1]], id="part_of_the_columns"),
    ],
)
def test_strided_upstream_gradients(upstream, device):
    inputs, seed = sample_inputs((6, 70), device), torch.tensor([3], device=device)
    outputs = ops.add_layer_norm(*inputs, EPS, 0.1, seed)
    dy = [upstream(torch.randn(6, 70, device=device)) for _ in outputs]
    got = torch.autograd.grad(outputs, inputs, dy, retain_graph=True)
    wanted = torch.autograd.grad(outputs, inputs, [x.contiguous() for x in dy])
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def test_strided_parameters(device):
    x, residual, weight, bias = sample_inputs((6, 70), device)
    apart = torch.full((2, 70, 3), float("nan"), device=device)
    apart[0, :, 1], apart[1, :, 1] = weight.detach(), bias.detach()
    dy = [torch.randn(6, 70, device=device) for _ in range(2)]
    results = []
    for parameters in ((weight, bias), [row[:, 1].requires_grad_() for row in apart.unbind()]):
        outputs = ops.add_layer_norm(x, residual, *parameters, EPS)
        results.append((*outputs, *torch.autograd.grad(outputs, (x, residual, *parameters), dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_offsets_beyond_2_to_the_31(device, far_apart):
    x, residual, weight, bias = sample_inputs((130, 20), device, torch.bfloat16, torch.bfloat16)
    seed, dy = torch.tensor([3], device=device), [torch.randn(130, 20, device=device).bfloat16() for _ in range(2)]
    results = []
    for rows, upstream in (((x, residual), dy), ([far_apart(t) for t in (x, residual)], [far_apart(t) for t in dy])):
        outputs = ops.add_layer_norm(*rows, weight, bias, EPS, 0.1, seed)
        results.append((*outputs, *torch.autograd.grad(outputs, (*rows, weight, bias), upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dim", [0, 1])
def test_expanded_inputs(dim, device):
    """Inputs may have strides of zero along rows or columns, and x and the residual may be one tensor."""
    x, _, weight, bias = sample_inputs((6, 70), device)
    expanded = x.detach().narrow(dim, 0, 1).expand(6, 70)
    copy, seed = expanded.clone(), torch.tensor([3], device=device)
    got, wanted = (ops.add_layer_norm(t, t, weight, bias, EPS, 0.1, seed) for t in (expanded, copy))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("shape", [(0, 16), (3, 0)], ids=str)
def test_empty(shape, device):
    x, residual, weight, bias = sample_inputs(shape, device)
    normed, summed = ops.add_layer_norm(x, residual, weight, bias, EPS, 0.1)
    grads = torch.autograd.grad(normed.sum() + summed.sum(), (x, residual, weight, bias))
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in (x, residual, weight, bias)]
    assert not grads[2].any()
    assert not grads[3].any()


def test_two_runs_and_any_number_of_threads_agree_bit_for_bit(device, threads, thread_counts):
    x, residual, weight, bias = sample_inputs((300, 200), device)
    seed, dy = torch.tensor([3], device=device), torch.randn(300, 200, device=device)

    def run():
        normed, summed = ops.add_layer_norm(x, residual, weight, bias, EPS, 0.1, seed, 1)
        return normed, summed, *torch.autograd.grad((normed, summed), (x, residual, weight, bias), (dy, dy))

    threads(1)
    first = run()
    for count in thread_counts:
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{count} threads"


def test_the_expected_implementation_ran(device, check_implementation):
    inputs = sample_inputs((4, 8), device)
    check_implementation("add_layer_norm", lambda: ops.add_layer_norm(*inputs)[0].sum().backward())


def test_opcheck():
    x, residual, weight, bias = (tensor.detach() for tensor in sample_inputs((6, 70), "cpu"))
    seed = torch.tensor([1])
    forward = torch.ops.gpt_fast.add_layer_norm_forward.default
    backward = torch.ops.gpt_fast.add_layer_norm_backward.default
    for p, chosen in ((0.0, None), (0.1, seed)):
        args = x, residual, weight, bias, EPS, p, chosen, 1
        torch.library.opcheck(forward, args)
        torch.library.opcheck(forward, (*args, torch.bfloat16))
        normed, summed, mean, rstd = forward(*args)
        for x_dtype in (torch.float32, torch.bfloat16):
            for dsummed in (None, torch.randn_like(summed)):
                torch.library.opcheck(
                    backward,
                    (torch.randn_like(normed), dsummed, summed, weight, mean, rstd, x_dtype, torch.float32, p, chosen,
                     1, True, False),
                )  # fmt: skip


@pytest.mark.parametrize("dtype", PRODUCT_DTYPES, ids=str)
@pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])
def test_a_norm_for_a_product_is_the_norm_rounded(device, dtype, reference):
    """`_normed_dtype`, which this library's blocks use, gives the bits of a cast after the norm and keeps `summed`."""
    inputs, seed = sample_inputs((6, 70), device), torch.tensor([8], device=device)
    upstream = torch.randn(6, 70, device=device).to(dtype), torch.randn(6, 70, device=device)
    results = []
    for normed_dtype in (dtype, None):
        with gpt_fast.use_reference() if reference else contextlib.nullcontext():
            normed, summed = ops.add_layer_norm(*inputs, EPS, 0.1, seed, 1, _normed_dtype=normed_dtype)
        normed = normed.to(dtype)
        results.append([normed, summed, *torch.autograd.grad((normed, summed), inputs, upstream)])
    assert all(map(torch.equal, *results))


def test_fullgraph(device):
    seed = torch.tensor([8], device=device)
    compiled = torch.compile(ops.add_layer_norm, fullgraph=True, backend="aot_eager")
    for p in (0.0, 0.1):
        inputs = sample_inputs((6, 70), device)
        got, wanted = (f(*inputs, EPS, p, seed, 1) for f in (compiled, ops.add_layer_norm))
        dy = torch.randn(6, 70, device=device), torch.randn(6, 70, device=device)
        for a, b in zip(
            (*got, *torch.autograd.grad(got, inputs, dy)), (*wanted, *torch.autograd.grad(wanted, inputs, dy)),
            strict=True,
        ):  # fmt: skip
            assert torch.equal(a, b)


BAD_INPUT = [
    pytest.param(lambda x, r, w, b: (x, r[:-1], w, b), r"residual has shape \[3, 8\]; expected \[4, 8\]", id="shape"),
    pytest.param(lambda x, r, w, b: (x, r.int(), w, b), "residual has dtype int32", id="dtype"),
    pytest.param(lambda x, r, w, b: (x, r, w, b, EPS, 1.0), "dropout_p is 1.0", id="p_of_one"),
    pytest.param(lambda x, r, w, b: (x, r, w, b, EPS, -0.1), "dropout_p is -0.1", id="negative_p"),
    pytest.param(lambda x, r, w, b: (x, r, w, b, EPS, 0.1, 3), "seed is of type int", id="seed_type"),
    pytest.param(lambda x, r, w, b: (x, r, w, b, EPS, 0.0, 3), "seed is of type int", id="unused_seed_type"),
    pytest.param(
        lambda x, r, w, b: (x, r, w, b, EPS, 0.1, torch.zeros(2).long()),
        r"seed has dtype int64 and shape \[2\]",
        id="seeds",
    ),
    pytest.param(lambda x, r, w, b: (x, r.to("meta"), w, b), "residual on meta", id="device"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_INPUT)
def test_bad_input(spoil, message, device):
    with pytest.raises(ValueError, match=f"add_layer_norm: .*{message}"):
        ops.add_layer_norm(*spoil(*sample_inputs((4, 8), device)))


def test_double_backward_says_that_it_is_not_there(device):
    x, residual, weight, bias = sample_inputs((4, 8), device)
    loss = ops.add_layer_norm(x, residual, weight, bias)[0].square().sum()
    (dx,) = torch.autograd.grad(loss, x, create_graph=True)
    with pytest.raises(NotImplementedError, match="add_layer_norm: double backward"):
        dx.sum().backward()
