"""Test torch.func's transforms on every op: grad, vjp and jacrev run the kernels, all others run the reference."""

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from gpt_fast import ops
from gpt_fast.config import GPTConfig
from gpt_fast.heads import GPTForCausalLM

SEED = torch.tensor([77])
TARGET = torch.tensor([0, 3, -100, 6, 1, 2])


def randn(*shape: int) -> Tensor:
    return torch.randn(shape)


# name → (a function of tensors that returns a tensor, the shapes of its arguments, which all get a gradient)
OPS: dict[str, tuple[Callable, list[tuple[int, ...]]]] = {
    "layer_norm": (ops.layer_norm, [(6, 8), (8,), (8,)]),
    "add_layer_norm": (
        lambda x, r, w, b: sum(ops.add_layer_norm(x, r, w, b, 1e-5, 0.3, SEED, 1)),
        [(6, 8), (6, 8), (8,), (8,)],
    ),
    "add_layer_norm, one result": (
        lambda x, r: ops.add_layer_norm(x, r, dropout_p=0.3, seed=SEED)[1],
        [(6, 8), (6, 8)],
    ),
    "attention": (lambda *qkv: ops.attention(*qkv, dropout_p=0.2, seed=SEED), [(2, 2, 5, 8)] * 3),
    "attention_qkv": (lambda qkv: ops.attention_qkv(qkv, 2, key_mask=torch.ones(2, 5).bool()), [(2, 5, 48)]),
    "mlp": (
        lambda *tensors: ops.mlp(*tensors, activation="gelu", dropout_p=0.2, seed=SEED),
        [(6, 8), (16, 8), (16,), (5, 16), (5,)],
    ),
    "linear": (ops.linear, [(6, 8), (7, 8), (7,)]),
    "loss": (lambda x, w, b: ops.linear_cross_entropy(x, w, TARGET, b), [(6, 8), (7, 8), (7,)]),
    "losses": (lambda x, w: ops.linear_cross_entropy(x, w, TARGET, reduction="none"), [(6, 8), (7, 8)]),
    "embedding": (
        lambda tokens, places: ops.embedding(TARGET.clamp(min=0)[None], tokens, places, None, 0.2, SEED),
        [(7, 8), (9, 8)],
    ),
}
NAMES = list(OPS)


def sample(name: str, dtype: torch.dtype = torch.float32) -> tuple[Callable, tuple[Tensor, ...]]:
    """Return (function, tensors). The function maps the tensors to a number that depends on every result of the op."""
    function, shapes = OPS[name]
    tensors = tuple(randn(*shape).to(dtype) for shape in shapes)
    upstream = torch.randn_like(function(*tensors), dtype=torch.float32)
    return lambda *tensors: (function(*tensors).float() * upstream).sum(), tensors


def by_autograd(function: Callable, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    return torch.autograd.grad(function(*leaves), leaves)


@pytest.fixture
def no_warnings():
    """Fail the test if the reference runs, because it then warns."""
    ops._library._WARNED.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="gpt_fast")
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_grad_runs_the_kernels(name: str, dtype: torch.dtype, no_warnings) -> None:
    """`grad` gives the bits of `backward`, for all arguments and for each alone. `vjp` agrees with both."""
    function, tensors = sample(name, dtype)
    wanted = by_autograd(function, tensors)
    every = tuple(range(len(tensors)))
    got, value = torch.func.grad_and_value(function, every)(*tensors)
    assert torch.equal(value, function(*tensors))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    for i in every:
        assert torch.equal(torch.func.grad(function, i)(*tensors), wanted[i])
    _, pull = torch.func.vjp(function, *tensors)
    for a, b in zip(pull(torch.tensor(2.0)), wanted, strict=True):
        torch.testing.assert_close(a, 2 * b, rtol=0.02 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", NAMES)
def test_a_jacobian_of_several_rows(name: str, no_warnings) -> None:
    """Under the vmap of `jacrev`, the backward operators compute one row of the Jacobian at a time."""
    function, shapes = OPS[name]
    tensors = tuple(randn(*shape) for shape in shapes)

    def two(*tensors: Tensor) -> Tensor:
        out = function(*tensors).flatten()
        return torch.stack((out.sum(), (out * torch.linspace(-1, 1, out.numel())).sum()))

    got = torch.func.jacrev(two, tuple(range(len(tensors))))(*tensors)
    for row in (0, 1):
        wanted = by_autograd(lambda *tensors, row=row: two(*tensors)[row], tensors)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a[row], b)


@pytest.mark.parametrize("name", NAMES)
def test_what_kernels_cannot_follow_is_the_references(name: str) -> None:
    """Per-sample gradients, forward mode and second derivatives run the reference, which warns."""
    function, tensors = sample(name)
    every = tuple(range(len(tensors)))

    def served(run: Callable) -> tuple[Tensor, ...]:
        ops._library._WARNED.clear()
        with pytest.warns(UserWarning, match=r"torch\.func's transforms but one grad or vjp, the pure-PyTorch ref"):
            return run()

    if name == "linear":  # here `linear` runs PyTorch's own function, without a warning
        served = lambda run: run()  # noqa: E731
    wanted = by_autograd(function, tensors)
    stacked = tuple(torch.stack((tensor, tensor)) for tensor in tensors)
    for a, b in zip(served(lambda: torch.func.vmap(torch.func.grad(function, every))(*stacked)), wanted, strict=True):
        torch.testing.assert_close(a[1], b, rtol=1e-4, atol=1e-5)
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)
    along = sum((a * b).sum() for a, b in zip(tangents, wanted, strict=True))
    _, got = served(lambda: torch.func.jvp(function, tensors, tangents))
    torch.testing.assert_close(got, along, rtol=1e-3, atol=1e-4)

    def slope(*tensors: Tensor) -> Tensor:
        return sum((a * b).sum() for a, b in zip(tangents, torch.func.grad(function, every)(*tensors), strict=True))

    got = served(lambda: torch.func.grad(slope, every)(*tensors))
    with ops.use_reference():
        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        first = torch.autograd.grad(function(*leaves), leaves, create_graph=True)
        total = sum((a * b).sum() for a, b in zip(tangents, first, strict=True))
        exact = torch.autograd.grad(total, leaves, materialize_grads=True) if total.requires_grad else None
    for a, b in zip(got, exact or map(torch.zeros_like, got), strict=False):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_differentiating_a_gradient_once_more_says_what_to_do(name: str) -> None:
    if name == "linear" and ops.serving("linear", "cpu") == "reference":
        pytest.skip("PyTorch's own product, which can be differentiated twice")
    function, tensors = sample(name)
    leaves = tuple(tensor.requires_grad_() for tensor in tensors)
    value = torch.func.grad_and_value(function)(*leaves)[1]
    for a, b in zip(torch.autograd.grad(value, leaves), by_autograd(function, tensors), strict=True):
        assert torch.equal(a, b)  # the value's gradient is a first derivative
    first = torch.func.grad(function, tuple(range(len(leaves))))(*leaves)
    with pytest.raises(NotImplementedError, match=r"double backward is not implemented.*gpt_fast\.use_reference\(\)"):
        sum(grad.square().sum() for grad in first).backward()


def pushed(function: Callable, tensors: tuple[Tensor, ...], tangents: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Return the function's value and its derivative along the tangents, by `torch.autograd.forward_ad`."""
    with forward_ad.dual_level():
        out = function(*(forward_ad.make_dual(a, b) for a, b in zip(tensors, tangents, strict=True)))
        return tuple(forward_ad.unpack_dual(out))


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_the_references(name: str) -> None:
    """In float32 forward mode gives the bits of `torch.func.jvp`. In float64 it agrees with a difference quotient.

    It runs the reference, which warns.
    """
    function, tensors = sample(name)
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)
    ops._library._WARNED.clear()
    if name == "linear":  # here `linear` runs PyTorch's own function, without a warning
        got = pushed(function, tensors, tangents)
    else:
        with pytest.warns(UserWarning, match="no fused kernel in forward mode, the pure-PyTorch reference serves"):
            got = pushed(function, tensors, tangents)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="gpt_fast")
        wanted = torch.func.jvp(function, tensors, tangents)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))

    op, exact = OPS[name][0], tuple(tensor.double() for tensor in tensors)
    steps, step = tuple(tangent.double() for tangent in tangents), 1e-5
    _, got = pushed(op, exact, steps)
    above, below = (op(*(a + sign * step * b for a, b in zip(exact, steps, strict=True))) for sign in (1, -1))
    torch.testing.assert_close(got, ((above - below) / (2 * step)).to(got.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore:gpt_fast")
def test_forward_mode_of_one_argument_and_of_dtypes_that_kernels_have() -> None:
    """Only the weight has a tangent. The tangent of a bfloat16 result is bfloat16."""
    x, weight, tangent = randn(6, 8).bfloat16(), randn(8).bfloat16(), randn(8).bfloat16()
    with forward_ad.dual_level():
        out = forward_ad.unpack_dual(ops.layer_norm(x, forward_ad.make_dual(weight, tangent)))
    assert out.tangent.dtype == torch.bfloat16
    torch.testing.assert_close(out.tangent, ops.layer_norm(x, torch.ones_like(tangent)) * tangent)


@pytest.mark.filterwarnings("ignore:gpt_fast")
def test_forward_over_reverse_is_the_second_derivative() -> None:
    """Gradients of dual tensors have tangents, which are the Hessian times the input tangents."""
    function, tensors = sample("mlp", torch.float64)
    tangents = tuple(torch.randn_like(tensor) for tensor in tensors)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(a.requires_grad_(), b) for a, b in zip(tensors, tangents, strict=True)]
        grads = torch.autograd.grad(function(*duals), duals)
        got = [forward_ad.unpack_dual(grad).tangent for grad in grads]
    first = torch.autograd.grad(function(*tensors), tensors, create_graph=True)
    along = sum((a * b).sum() for a, b in zip(first, tangents, strict=True))
    wanted = torch.autograd.grad(along, tensors, materialize_grads=True)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(torch.zeros_like(b) if a is None else a, b)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "loss"])  # the loss's backward only scales
def test_a_dual_gradient_of_a_kernels_result_is_refused(name: str) -> None:
    """A kernel that ran before the dual level began would lose the tangent of the upstream gradient in its backward."""
    if name == "linear" and ops.serving("linear", "cpu") == "reference":
        pytest.skip("PyTorch's own product, which forward mode follows")
    op, shapes = OPS[name]
    leaves = [randn(*shape).requires_grad_() for shape in shapes]
    out = op(*leaves)
    with forward_ad.dual_level():
        upstream = forward_ad.make_dual(torch.ones_like(out), torch.ones_like(out))
        with pytest.raises(NotImplementedError, match="upstream gradient is a dual tensor; expected a forward pass in"):
            torch.autograd.grad(out, leaves, upstream)


@pytest.mark.filterwarnings("ignore:gpt_fast")
@pytest.mark.parametrize("pre_norm", [True, False], ids=["gpt2", "gpt1"])
def test_forward_mode_of_a_model(pre_norm: bool) -> None:
    """Forward mode through a whole model gives the loss's derivative along all parameters, as float64 backward does."""
    config = GPTConfig(num_tokens=17, hidden_dim=8, num_heads=2, num_layers=2, seq_len=6, pre_norm=pre_norm)
    model, tokens = GPTForCausalLM(config).eval().double(), torch.arange(12).view(2, 6)
    leaves = dict(model.named_parameters())
    tangents = {name: torch.randn_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(model(tokens, labels=tokens).loss, list(leaves.values()))
    along = sum((a * b).sum() for a, b in zip(grads, tangents.values(), strict=True))
    model.float()
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(leaf.float(), tangents[name].float()) for name, leaf in leaves.items()}
        loss = torch.func.functional_call(model, duals, (tokens,), {"labels": tokens}).loss
        got = forward_ad.unpack_dual(loss).tangent
    torch.testing.assert_close(got, along.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:gpt_fast")
@pytest.mark.parametrize("inside", [True, False], ids=["level inside", "level outside"])
def test_forward_mode_of_a_compiled_function(inside: bool) -> None:
    """Forward mode follows a compiled function, even one that was compiled before the dual level began."""
    x, weight, bias, tangent = randn(6, 8), randn(8), randn(8), randn(6, 8)
    wanted = torch.func.jvp(lambda x: ops.layer_norm(x, weight, bias), (x,), (tangent,))
    torch._dynamo.reset()
    if inside:
        push = torch.compile(
            lambda: pushed(lambda x: ops.layer_norm(x, weight, bias), (x,), (tangent,)), backend="eager"
        )
        got = push()
    else:
        norm = torch.compile(lambda x: ops.layer_norm(x, weight, bias), backend="aot_eager")
        norm(x)
        got = pushed(norm, (x,), (tangent,))
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.filterwarnings("ignore:gpt_fast")
def test_forward_mode_of_a_step_of_decoding() -> None:
    """`decode_attention` has no backward, but forward mode gives it the tangent of attention with one query."""
    q, keys, values, lengths = randn(2, 3, 8), randn(2, 3, 9, 8), randn(2, 3, 9, 8), torch.tensor([4, 9])
    tensors, tangents = (q, keys, values), (randn(2, 3, 8), randn(2, 3, 9, 8), randn(2, 3, 9, 8))
    got = pushed(lambda *tensors: ops.decode_attention(*tensors, lengths), tensors, tangents)
    attend = lambda q, k, v: ops.attention(q[:, :, None], k, v, causal=False, lengths=lengths)[:, :, 0]  # noqa: E731
    wanted = torch.func.jvp(attend, tensors, tangents)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b)
