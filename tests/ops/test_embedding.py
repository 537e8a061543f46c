"""Test embedding against the float64 reference: lookup, positions, dropout and deterministic backward."""

import bisect
import os
import sys

import numpy as np
import pytest
import torch

from gpt_fast import ops, reference
from tests import numerics

CASES = [
    pytest.param((1, 1), 5, 3, 8, id="one_token"),
    pytest.param((2, 3), 5, 3, 1, id="one_column"),
    pytest.param((2, 7), 11, 9, 33, id="off_powers_of_two"),
    pytest.param((3, 2, 5), 40, 5, 64, id="three_dimensions"),
    pytest.param((6,), 9, 6, 16, id="one_dimension"),
    pytest.param((4, 20), 3, 100, 48, id="few_tokens_many_times"),
    pytest.param((3, 32), 1, 32, 300, id="one_token_over_whole_chunks"),
    pytest.param((2, 16), 500, 16, 768, id="gpt2_width"),
]


def sample_inputs(shape, V, P, C, device, dtype=torch.float32):
    tokens = torch.randint(0, V, shape, device=device)
    token_weight = torch.randn(V, C, device=device).to(dtype).requires_grad_()
    position_weight = torch.randn(P, C, device=device).to(dtype).requires_grad_()
    return tokens, token_weight, position_weight


def check(tokens, token_weight, position_weight, positions=None, p=0.0):
    seed, site = torch.tensor([7], device=tokens.device), 0
    weights = token_weight, position_weight
    out = ops.embedding(tokens, *weights, positions, p, seed, site)
    dout = torch.randn(out.shape, device=out.device).to(out.dtype)
    grads = torch.autograd.grad(out, weights, dout)
    exact_weights = tuple(numerics.exact(weight) for weight in weights)
    wanted = reference.embedding(tokens, *exact_weights, positions, p, seed, site)
    numerics.assert_rounded_once(out, wanted.detach(), label="out")
    for name, grad, exact in zip(
        ("dtoken", "dposition"), grads, torch.autograd.grad(wanted, exact_weights, dout.double()), strict=True
    ):
        numerics.assert_rounded_once(grad, exact, label=name)


@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "V", "P", "C"), CASES)
def test_numerics(shape, V, P, C, dtype, p, device):
    check(*sample_inputs(shape, V, P, C, device, dtype), p=p)


@pytest.mark.parametrize("index_dtype", [torch.int64, torch.int32], ids=str)
@pytest.mark.parametrize("shape", [(3, 7), (7,)], ids=["each_row", "shared"])
def test_given_positions(shape, index_dtype, device):
    tokens, *weights = sample_inputs((3, 7), 11, 9, 24, device)
    positions = torch.randint(0, 9, shape, device=device).to(index_dtype)
    check(tokens.to(index_dtype), *weights, positions, 0.2)


def test_dropout_is_the_contracts_bit_for_bit(device):
    seed, site, p = torch.tensor([123], device=device), 4, 0.4
    tokens = torch.zeros(3, 50, dtype=torch.int64, device=device)
    ones = torch.ones(1, 131, device=device)
    out = ops.embedding(tokens, ones, torch.zeros(50, 131, device=device), None, p, seed, site)
    wanted = reference.dropout_keep_rows(seed, site, 150, 131, p).float() * reference.dropout_scale(p)
    assert torch.equal(out.view(150, 131), wanted)


def test_a_number_equal_to_the_threshold_is_kept(device):
    """Dropout drops elements whose random number is below the threshold. Here the first number equals the threshold."""
    seed, tokens = torch.tensor([123], device=device), torch.zeros(1, dtype=torch.int64, device=device)
    ones, zeros = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device)

    def dropped(threshold):
        return not reference.dropout_keep_rows(seed, 4, 1, 1, threshold / 65536).item()

    number = bisect.bisect_left(range(1, 65536), True, key=dropped)
    assert ops.embedding(tokens, ones, zeros, None, number / 65536, seed, 4).item() != 0
    assert ops.embedding(tokens, ones, zeros, None, (number + 1) / 65536, seed, 4).item() == 0


@pytest.mark.parametrize("transposed", [(), (0,), (1,)], ids=["rows", "token_columns", "position_columns"])
def test_gradients_have_the_strides_of_their_weights(transposed, device):
    tokens, *weights = sample_inputs((4, 20), 3, 25, 24, device)
    contiguous = [weight.detach() for weight in weights]
    for index in transposed:
        weights[index] = weights[index].detach().t().contiguous().t().requires_grad_()
    out = ops.embedding(tokens, *weights)
    assert torch.equal(out, ops.embedding(tokens, *contiguous))
    check(tokens, *weights)
    out.square().sum().backward()
    assert all(weight.grad.stride() == weight.stride() for weight in weights)


@pytest.mark.parametrize(
    "upstream",
    [
        pytest.param(lambda dout: dout.transpose(0, 2).contiguous().transpose(0, 2), id="transposed"),
        pytest.param(lambda dout: dout[:, :1, :1].expand_as(dout), id="expanded"),
        pytest.param(lambda dout: dout.repeat(1, 1, 2)[..., : dout.shape[2]], id="part_of_the_columns"),
    ],
)
def test_strided_upstream_gradient(upstream, device):
    tokens, *weights = sample_inputs((3, 7), 11, 9, 24, device)
    dout = upstream(torch.randn(3, 7, 24, device=device))
    out = ops.embedding(tokens, *weights)
    got = torch.autograd.grad(out, weights, dout, retain_graph=True)
    wanted = torch.autograd.grad(out, weights, dout.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_tables_gradient_is_a_tensor_like_any_other(dtype, device):
    tokens, *weights = sample_inputs((2, 8), 6000, 9, 384, device, dtype)
    check(tokens, *weights)
    ops.embedding(tokens, *weights).backward(torch.ones(2, 8, 384, device=device, dtype=dtype))
    gradient = weights[0].grad
    weights[0].grad = None
    counts = torch.bincount(tokens.flatten(), minlength=6000).to(dtype)
    assert torch.equal(gradient, counts[:, None].expand(6000, 384))
    assert torch.equal(gradient.mul_(2).add_(1)[:, 0], 2 * counts + 1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_rows_that_no_token_used_take_no_memory(implementation):
    if implementation != "cpp":
        pytest.skip("the C++ kernel's promise")
    table = torch.from_numpy(np.zeros((100_000, 1024), dtype=np.float32)).requires_grad_()  # 400 MB, not yet touched
    out = ops.embedding(torch.tensor([[3, 99_999]]), table, torch.randn(2, 1024))
    before = resident_bytes()
    out.backward(torch.ones_like(out))
    assert resident_bytes() - before < table.nbytes / 10
    assert table.grad[3].eq(1).all() and table.grad[4].eq(0).all()


def resident_bytes():
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_offsets_beyond_2_to_the_31(device, far_apart):
    """Distances beyond 2^31 lie between the rows of both tables and of the upstream gradient."""
    tokens, *weights = sample_inputs((130,), 140, 130, 8, device, torch.bfloat16)
    tokens[:2] = torch.tensor([0, 139], device=device)
    dout = torch.randn(130, 8, device=device).bfloat16()
    results = []
    for tables, upstream in ((weights, dout), ([far_apart(weight) for weight in weights], far_apart(dout))):
        out = ops.embedding(tokens, *tables)
        results.append((out, *torch.autograd.grad(out, tables, upstream)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_expanded_inputs_and_tables_that_share_memory(device):
    """Ids, tables and the upstream gradient may have strides of zero, and one table may serve tokens and positions."""
    tokens, weight, _ = sample_inputs((3, 7), 11, 9, 24, device)
    for ids, table in ((tokens[:1].expand(3, 7), weight), (tokens, weight[:1].expand(11, 24)), (tokens, weight)):
        table, copy = (t.detach().requires_grad_() for t in (table, table.clone()))
        dout = torch.randn((), device=device).expand(3, 7, 24)
        got, wanted = (ops.embedding(i, t, t) for i, t in ((ids, table), (ids.contiguous(), copy)))
        assert torch.equal(got, wanted)
        (got,), (wanted,) = torch.autograd.grad(got, table, dout), torch.autograd.grad(wanted, copy, dout.contiguous())
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("frozen", [0, 1], ids=["token_weight", "position_weight"])
def test_frozen_weights(frozen, device):
    tokens, *weights = sample_inputs((3, 7), 11, 9, 24, device)
    dout = torch.randn(3, 7, 24, device=device)
    wanted = torch.autograd.grad(ops.embedding(tokens, *weights), weights, dout)[1 - frozen]
    weights[frozen].requires_grad_(False)
    (got,) = torch.autograd.grad(ops.embedding(tokens, *weights), weights[1 - frozen], dout)
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0,)], ids=str)
def test_empty(shape, device):
    tokens, *weights = sample_inputs(shape, 11, 9, 24, device)
    out = ops.embedding(tokens, *weights, None, 0.1)
    assert out.shape == (*shape, 24)
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), weights))


def test_tables_without_columns_or_rows(device):
    tokens, *weights = sample_inputs((2, 3), 5, 3, 0, device)
    out = ops.embedding(tokens, *weights, None, 0.1)
    assert out.shape == (2, 3, 0)
    assert [grad.shape for grad in torch.autograd.grad(out.sum(), weights)] == [(5, 0), (3, 0)]
    empty = torch.zeros(0, 8, device=device)
    with pytest.raises(ValueError, match=r"tokens holds \d; expected values in \[0, 0\)"):
        ops.embedding(tokens, empty, torch.zeros(3, 8, device=device))


def test_two_runs_and_any_number_of_threads_agree_bit_for_bit(device, threads, thread_counts):
    C = 2000 if len(thread_counts) > 1 else 300
    tokens, *weights = sample_inputs((4, 15), 7, 15, C, device)
    seed, dout = torch.tensor([3], device=device), torch.randn(4, 15, C, device=device)

    def run():
        out = ops.embedding(tokens, *weights, None, 0.1, seed, 1)
        return out, *torch.autograd.grad(out, weights, dout)

    threads(1)
    first = run()
    for count in thread_counts:
        threads(count)
        assert all(torch.equal(a, b) for a, b in zip(first, run(), strict=True)), f"{count} threads"


def test_the_expected_implementation_ran(device, check_implementation):
    inputs = sample_inputs((2, 3), 5, 3, 8, device)
    check_implementation("embedding", lambda: ops.embedding(*inputs).sum().backward())


def test_opcheck():
    tokens, token_weight, position_weight = sample_inputs((3, 7), 11, 9, 24, "cpu")
    weights = token_weight.detach(), position_weight.detach()
    positions = torch.arange(7)
    for p, seed in ((0.0, None), (0.1, torch.tensor([1]))):
        torch.library.opcheck(torch.ops.gpt_fast.embedding_forward.default, (tokens, *weights, positions, p, seed, 0))
        for needs in ((True, True), (True, False)):
            args = torch.randn(3, 7, 24), tokens, *weights, positions, p, seed, 0, *needs
            torch.library.opcheck(torch.ops.gpt_fast.embedding_backward.default, args)


def test_fullgraph(device):
    seed = torch.tensor([8], device=device)
    compiled = torch.compile(ops.embedding, fullgraph=True, backend="aot_eager")
    tokens, *weights = sample_inputs((3, 7), 11, 9, 24, device)
    got, wanted = (f(tokens, *weights, None, 0.1, seed, 1) for f in (compiled, ops.embedding))
    dout = torch.randn_like(got)
    assert torch.equal(got, wanted)
    for a, b in zip(torch.autograd.grad(got, weights, dout), torch.autograd.grad(wanted, weights, dout), strict=True):
        assert torch.equal(a, b)


def id_tensor(*values):
    return torch.tensor([values])


BAD_INPUT = [
    pytest.param(lambda t, w, p: (t.float(), w, p), "tokens has dtype float32", id="token_dtype"),
    pytest.param(lambda t, w, p: (t, w, p.half()), "position_weight has dtype float16", id="mixed_dtypes"),
    pytest.param(
        lambda t, w, p: (t, w[0], p), r"token_weight has shape \[8\]; expected \[V, C\]", id="table_dimensions"
    ),
    pytest.param(lambda t, w, p: (t, w, p[:, 1:]), "differ in width", id="widths"),
    pytest.param(lambda t, w, p: (t, w, p[:2]), "3 tokens in a row; expected at most 2", id="too_long"),
    pytest.param(lambda t, w, p: (t, w, p, t[:, :2]), r"positions has shape \[2, 2\]", id="position_shape"),
    pytest.param(lambda t, w, p: (t, w, p, None, 1.5), "dropout_p is 1.5", id="probability"),
    pytest.param(lambda t, w, p: (id_tensor(0, 5, 1), w, p), r"tokens holds 5; expected values in \[0, 5\)", id="high"),
    pytest.param(lambda t, w, p: (id_tensor(0, -1, 1), w, p), "tokens holds -1", id="id_negative"),
    pytest.param(lambda t, w, p: (t, w, p, id_tensor(0, 1, 9)[0]), "positions holds 9", id="position_high"),
    pytest.param(lambda t, w, p: (t, w.to("meta"), p), "token_weight on meta", id="devices"),
]


@pytest.mark.parametrize(("spoil", "message"), BAD_INPUT)
def test_bad_input(spoil, message):
    with pytest.raises(ValueError, match=f"embedding: .*{message}"):
        ops.embedding(*spoil(*sample_inputs((2, 3), 5, 3, 8, "cpu")))


def test_the_kernel_checks_ids_itself(implementation):
    """The C++ kernel validates ids, because compiled code skips the validation of the public function."""
    if implementation != "cpp":
        pytest.skip("only the C++ kernel raises; others clamp")
    tokens, token_weight, position_weight = (x.detach() for x in sample_inputs((2, 3), 5, 3, 8, "cpu"))
    for name, index in (("tokens", 0), ("positions", 1)):
        for value, upper in ((-1, (5, 3)[index]), ((5, 3)[index], (5, 3)[index])):
            ids = [tokens.clone(), torch.arange(3)]
            ids[index].view(-1)[1] = value
            message = rf"embedding: {name} holds {value}; expected values in \[0, {upper}\)"
            with pytest.raises(ValueError, match=message):
                torch.ops.gpt_fast.embedding_forward(ids[0], token_weight, position_weight, ids[1], 0.0, None, 0)
            with pytest.raises(ValueError, match=message):
                torch.ops.gpt_fast.embedding_backward(
                    torch.ones(2, 3, 8), ids[0], token_weight, position_weight, ids[1], 0.0, None, 0, True, True
                )
    assert ops.embedding(tokens, token_weight, position_weight).isfinite().all()


def test_ids_out_of_range_read_nothing_out_of_bounds(device, implementation):
    """Triton kernels clamp ids that were not validated to the nearest row, forward and backward."""
    if implementation != "triton":
        pytest.skip("the C++ kernel raises")
    tokens, *weights = (x.detach() for x in sample_inputs((2, 4), 5, 4, 8, device))
    tokens[0] = torch.tensor([-1, 5, -(2**40), 2**40], device=device)
    positions = torch.tensor([4, -1, 2**40, -(2**40)], device=device)
    dout = torch.randn(2, 4, 8, device=device)
    results = []
    for ids in ((tokens, positions), (tokens.clamp(0, 4), positions.clamp(0, 3))):
        arguments = ids[0], *weights, ids[1], 0.0, None, 0
        grads = torch.ops.gpt_fast.embedding_backward(dout, *arguments, True, True)
        results.append((torch.ops.gpt_fast.embedding_forward(*arguments), *grads))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
