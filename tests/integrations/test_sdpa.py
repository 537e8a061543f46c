"""The SDPA provider: PyTorch's scaled_dot_product_attention on our kernels, and restored."""

import copy
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import gpt_fast
from gpt_fast import reference
from gpt_fast.integrations import sdpa
from tests import numerics

ORIGINAL = F.scaled_dot_product_attention
B, H, T, D = 2, 3, 37, 16


@pytest.fixture
def active() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sdpa.activate()
    yield
    sdpa.restore()


def qkv(dtype: torch.dtype = torch.float32, S: int = T, grad: bool = True) -> list[torch.Tensor]:
    shapes = ((B, H, T, D), (B, H, S, D), (B, H, S, D))
    return [torch.randn(shape).to(dtype).requires_grad_(grad) for shape in shapes]


def forward_backward(tensors: list[torch.Tensor], **options) -> list[torch.Tensor]:
    out = F.scaled_dot_product_attention(*tensors, **options)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, tensors, upstream)]


MASK = torch.rand(B, 1, T, T, generator=torch.Generator().manual_seed(0)) < 0.4
CALLS = [
    pytest.param({}, id="plain"),
    pytest.param({"is_causal": True}, id="causal"),
    pytest.param({"is_causal": True, "scale": 0.3}, id="scale"),
    pytest.param({"attn_mask": MASK | torch.eye(T, dtype=torch.bool)}, id="mask"),
]


@pytest.mark.parametrize("options", CALLS)
@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
def test_same_values_and_gradients(active: None, dtype: torch.dtype, options: dict) -> None:
    tensors = qkv(dtype)
    got = forward_backward(tensors, **options)
    assert sdpa.report().served == 1 and not sdpa.report().returned
    exact = forward_backward([tensor.detach().double().requires_grad_() for tensor in tensors], **options)
    sdpa.restore()
    yardstick = forward_backward(tensors, **options)
    sdpa.activate()
    for a, b, c in zip(got, yardstick, exact, strict=True):
        numerics.assert_as_accurate(a, b, c)


def test_dropout_is_the_librarys(active: None) -> None:
    tensors = qkv()
    torch.manual_seed(3)
    got = F.scaled_dot_product_attention(*tensors, dropout_p=0.2, is_causal=True)
    torch.manual_seed(3)
    seed = gpt_fast.ops.new_seed("cpu")
    exact = reference.attention(*(tensor.double() for tensor in tensors), dropout_p=0.2, seed=seed)
    numerics.assert_as_accurate(got, exact.float(), exact)
    again = F.scaled_dot_product_attention(*tensors, dropout_p=0.2, is_causal=True)
    assert not torch.equal(got, again)


HALF = torch.zeros(T, T).masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
BIAS = torch.randn(T, T, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", [(T, T), (1, T, T), (B, 1, T, T)], ids=["rank 2", "rank 3", "rank 4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_float_mask_of_zeros_and_minus_infinity_is_served(active: None, dtype: torch.dtype, shape: tuple) -> None:
    """Such a mask hides keys and adds nothing. A query without keys gives 0, in PyTorch too."""
    mask = HALF.clone()
    mask[5] = -torch.inf
    tensors = qkv(dtype)
    got = forward_backward(tensors, attn_mask=mask.to(dtype).expand(shape))
    assert sdpa.report().served == 1 and not sdpa.report().returned
    wanted = forward_backward(tensors, attn_mask=mask == 0)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert not got[0][:, :, 5].any()
    sdpa.restore()
    exact = forward_backward([t.detach().double().requires_grad_() for t in tensors], attn_mask=mask.double())
    yardstick = forward_backward(tensors, attn_mask=mask.to(dtype))
    sdpa.activate()
    for a, b, c in zip(got, yardstick, exact, strict=True):
        numerics.assert_as_accurate(a, b, c)


LOWEST = torch.finfo(torch.float32).min
RETURNED = [
    pytest.param(lambda t: {"attn_mask": BIAS}, "values than 0 and -inf", id="bias"),
    pytest.param(lambda t: {"attn_mask": HALF.clamp(min=LOWEST)}, "values than 0 and -inf", id="lowest finite number"),
    pytest.param(lambda t: {"attn_mask": HALF.clone().requires_grad_()}, "requires a gradient", id="learned bias"),
    pytest.param(lambda t: {"scale": float("inf")}, "scale inf", id="infinite scale"),
    pytest.param(lambda t: {"scale": float("nan")}, "scale nan", id="scale that is NaN"),
    pytest.param(lambda t: {"attn_mask": MASK, "is_causal": True}, "causal with another mask", id="mask and causal"),
    pytest.param(lambda t: {"is_causal": True, "S": 50}, "causal with another mask, or", id="other keys than queries"),
    pytest.param(lambda t: {"dtype": torch.float64}, "dtype torch.float64", id="float64"),
    pytest.param(lambda t: {"three": True}, r"shapes other than \[B, H, T, D\]", id="three dimensions"),
    pytest.param(lambda t: {"enable_gqa": True}, "fewer heads of keys", id="grouped queries"),
]


@pytest.mark.parametrize(("make", "reason"), RETURNED)
def test_what_is_not_served_goes_back_and_is_counted(active: None, make, reason: str) -> None:
    options = make(None)
    tensors = qkv(options.pop("dtype", torch.float32), options.pop("S", T))
    if options.pop("three", False):
        tensors = [tensor.detach()[0].requires_grad_() for tensor in tensors]
    if "enable_gqa" in options:
        tensors = [tensors[0], *(tensor.detach()[:, :1].requires_grad_() for tensor in tensors[1:])]
    got = forward_backward(tensors, **options)
    assert sdpa.report().served == 0
    assert sdpa.report().returned.total() == 1
    assert re.search(reason, str(sdpa.report()))
    sdpa.restore()
    wanted = forward_backward(tensors, **options)
    torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)
    sdpa.activate()


WRONG = [
    pytest.param(lambda k: {"key": k[..., :5]}, id="width of the keys"),
    pytest.param(lambda k: {"key": k.double()}, id="dtype of the keys"),
    pytest.param(lambda k: {"key": k.to("meta")}, id="device of the keys"),
    pytest.param(lambda k: {"dropout_p": 2.0}, id="probability above 1"),
    pytest.param(lambda k: {"attn_mask": MASK.int()}, id="integer mask"),
    pytest.param(lambda k: {"attn_mask": HALF.double()}, id="float64 mask"),
    pytest.param(lambda k: {"attn_mask": MASK[..., :5]}, id="mask for other keys"),
    pytest.param(lambda k: {"attn_mask": MASK.expand(B, 2, T, T)}, id="mask for other heads"),
    pytest.param(lambda k: {"attn_mask": HALF[:5]}, id="float mask for other queries"),
    pytest.param(lambda k: {"attn_mask": MASK[0, 0, 0]}, id="mask with one dimension"),
    pytest.param(lambda k: {"attn_mask": MASK[None]}, id="mask with five dimensions"),
]


@pytest.mark.parametrize("make", WRONG)
def test_wrong_calls_get_pytorchs_errors(active: None, make) -> None:
    q, k, v = qkv()
    arguments = {"query": q, "key": k, "value": v} | make(k)
    with pytest.raises((RuntimeError, ValueError, IndexError)) as ours:
        F.scaled_dot_product_attention(**arguments)
    assert sdpa.report().served == 0
    sdpa.restore()
    with pytest.raises((RuntimeError, ValueError, IndexError)) as theirs:
        F.scaled_dot_product_attention(**arguments)
    sdpa.activate()
    assert str(ours.value) == str(theirs.value)


def test_forward_mode_has_pytorchs(active: None) -> None:
    """In forward mode PyTorch's attention runs. Of its backends only the math backend has such derivatives."""
    from torch.autograd import forward_ad

    tensors = qkv(grad=False)
    with forward_ad.dual_level(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        duals = [forward_ad.make_dual(tensor, torch.ones_like(tensor)) for tensor in tensors]
        got = forward_ad.unpack_dual(F.scaled_dot_product_attention(*duals)).tangent
        wanted = forward_ad.unpack_dual(reference.attention(*duals, causal=False)).tangent
    torch.testing.assert_close(got, wanted)
    assert sdpa.report().served == 0 and set(sdpa.report().returned) == {"in forward mode"}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_backend_that_the_user_chose_wins(active: None, compiled: bool) -> None:
    """The provider takes flash attention's place, so it serves if the chosen backends include flash attention."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def call(*backends: SDPBackend) -> torch.Tensor:
        torch._dynamo.reset()
        function = lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)  # noqa: E731
        with sdpa_kernel(list(backends)):
            return torch.compile(function, backend="aot_eager")(*tensors) if compiled else function(*tensors)

    tensors = qkv()
    math = call(SDPBackend.MATH)
    assert sdpa.report().served == 0 and set(sdpa.report().returned) == {
        "flash attention is switched off, as by torch.nn.attention.sdpa_kernel"
    }
    chosen = call(SDPBackend.MATH, SDPBackend.FLASH_ATTENTION)
    assert sdpa.report().served > 0
    assert torch.equal(chosen, gpt_fast.ops.attention(*tensors))
    sdpa.restore()
    assert torch.equal(math, call(SDPBackend.MATH))
    sdpa.activate()


def test_restored_bit_for_bit() -> None:
    tensors = qkv()
    before = forward_backward(tensors, is_causal=True)
    sdpa.activate()
    assert torch.nn.attention.current_flash_attention_impl() == "gpt_fast"
    during = forward_backward(tensors, is_causal=True)
    sdpa.restore()
    after = forward_backward(tensors, is_causal=True)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, during, strict=True))
    sdpa.restore()  # nothing active: no warning, no error
    with pytest.raises(RuntimeError, match=r"not active; expected sdpa\.activate"):
        sdpa.report()


def test_pytorchs_own_switches() -> None:
    """Registering makes the name known and changes nothing. Activating again resets the counts."""
    sdpa.register()
    assert "gpt_fast" in torch.nn.attention.list_flash_attention_impls()
    assert torch.nn.attention.current_flash_attention_impl() is None
    for _ in range(2):
        torch.nn.attention.activate_flash_attention_impl("gpt_fast")
        F.scaled_dot_product_attention(*qkv())
        assert sdpa.report().served == 1
    torch.nn.attention.restore_flash_attention_impl()
    assert torch.nn.attention.current_flash_attention_impl() is None


def test_a_pytorch_without_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sdpa, "_HAS_REGISTRY", False)
    with pytest.raises(RuntimeError, match="has no registry that restores"):
        sdpa.register()
    for _ in range(2):
        sdpa.activate()
        F.scaled_dot_product_attention(*qkv())
        assert sdpa.report().served == 1
    sdpa.restore()
    F.scaled_dot_product_attention(*qkv())
    with pytest.raises(RuntimeError, match="not active"):
        sdpa.report()


def test_without_gradients_and_under_autocast(active: None) -> None:
    tensors = qkv(grad=False)
    F.scaled_dot_product_attention(*tensors)
    with torch.no_grad():
        F.scaled_dot_product_attention(*qkv())
    with torch.inference_mode():
        F.scaled_dot_product_attention(*tensors)
    with torch.autocast("cpu", torch.bfloat16):
        assert F.scaled_dot_product_attention(*tensors).dtype == torch.bfloat16
    assert sdpa.report().served == 4


def test_torch_func_has_pytorchs(active: None) -> None:
    """Inside torch.func PyTorch's attention runs, for the gradients of a batch and of each row."""

    def total(*tensors: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(*tensors, is_causal=True).square().sum()

    tensors = [tensor.detach() for tensor in qkv()]
    rows = torch.func.vmap(torch.func.grad(total, (0, 1, 2)))(*(tensor[:, None] for tensor in tensors))
    got = torch.func.grad(total, (0, 1, 2))(*tensors)
    assert sdpa.report().served == 0 and set(sdpa.report().returned) == {"inside torch.func's transforms"}
    leaves = [tensor.requires_grad_() for tensor in tensors]
    for a, b, wanted in zip(got, rows, torch.autograd.grad(total(*leaves), leaves), strict=True):
        torch.testing.assert_close(a, wanted)
        torch.testing.assert_close(b[:, 0], wanted)


def test_compiled(active: None) -> None:
    """The compiled graphs hold our operators, forward and backward, and give the eager results at two lengths."""
    graphs = []

    def backend(graph, inputs):
        from functorch.compile import make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        def record(g, i):
            graphs.append(g.code)
            return make_boxed_func(g.forward)

        return aot_autograd(fw_compiler=record, bw_compiler=record)(graph, inputs)

    compiled = torch.compile(
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        fullgraph=True,
        backend=backend,
        dynamic=True,
    )
    for length in (T, 20):
        tensors = [tensor.detach()[:, :, :length].contiguous().requires_grad_() for tensor in qkv()]
        out = compiled(*tensors)
        eager = F.scaled_dot_product_attention(*tensors, is_causal=True)
        assert torch.equal(out, eager)
        upstream = torch.randn_like(out)
        got, wanted = torch.autograd.grad(out, tensors, upstream), torch.autograd.grad(eager, tensors, upstream)
        assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    assert any("gpt_fast.attention_forward" in code for code in graphs)
    assert any("gpt_fast.attention_backward" in code for code in graphs)


def test_a_process_that_has_compiled_before() -> None:
    """Functions compiled after `activate` use the provider, and those compiled after `restore` do not."""
    tensors = qkv(grad=False)

    def compiled() -> torch.Tensor:
        torch._dynamo.reset()
        function = lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True)  # noqa: E731
        return torch.compile(function, backend="aot_eager")(*tensors)

    # As in a new process: PyTorch's cached traces depend on the provider that was active.
    torch.ops.aten.scaled_dot_product_attention.default._dispatch_cache.clear()
    plain, ours = compiled(), gpt_fast.ops.attention(*tensors)
    assert not torch.equal(plain, ours)
    for _ in range(2):
        sdpa.activate()
        assert torch.equal(compiled(), ours)
        assert sdpa.report().served > 0
        sdpa.restore()
        assert torch.equal(compiled(), plain)


@pytest.mark.parametrize("tag", ["", "mine"], ids=["no tag", "the user's tag"])
def test_the_users_tag_of_compiled_graphs_is_kept(tag: str) -> None:
    with torch.compiler.config.patch(cache_key_tag=tag):
        for _ in range(2):
            sdpa.activate()
            sdpa.activate()
            assert torch.compiler.config.cache_key_tag == f"{tag}+gpt_fast.sdpa"
            sdpa.restore()
            assert torch.compiler.config.cache_key_tag == tag


IN_A_PROCESS = """
import sys, torch
torch.manual_seed(0)
tensors = [torch.randn(2, 3, 37, 16) for _ in range(3)]
attend = lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
if sys.argv[1] == "provider":
    from gpt_fast.integrations import sdpa
    sdpa.activate()
else:
    assert "gpt_fast" not in sys.modules
compiled, eager = torch.compile(attend)(*tensors), attend(*tensors)
assert torch.equal(compiled, eager), (compiled - eager).abs().max()
torch.save(eager, sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("order", [("provider", "plain"), ("plain", "provider")], ids=" then ".join)
def test_the_cache_on_disk_keeps_graphs_apart(tmp_path: Path, order: tuple[str, str]) -> None:
    """A process with the provider loads no graph that a process without it left on disk, nor the other way round."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    for process in order:
        done = subprocess.run(
            [sys.executable, "-c", IN_A_PROCESS, process, str(tmp_path / process)],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    assert not torch.equal(*(torch.load(tmp_path / process) for process in order))


def test_a_transformers_model_is_reached(active: None) -> None:
    from tests.hf_models import inputs, make

    model = make("GPT2LMHeadModel")
    given = inputs("GPT2LMHeadModel", "right")
    loss = model(**given).loss
    assert sdpa.report().served == 2 and not sdpa.report().returned
    sdpa.restore()
    torch.testing.assert_close(loss, copy.deepcopy(model)(**given).loss)
    sdpa.activate()
