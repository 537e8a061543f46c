"""Test the FLOP formulas: PyTorch's counter gives an op the count of the same computation by PyTorch's functions."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import gpt_fast
from benchmarks.models.plain_gpt import PlainGPT
from gpt_fast import ops
from gpt_fast.ops import _flops
from gpt_fast.ops.mlp import _CublasLtMLP
from tests.hf_models import V, make

ROOT = Path(__file__).resolve().parents[2]
TARGET = torch.tensor([0, 3, -100, 6, 1, 2])


def flash(q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, is_causal: bool = False, **_) -> Tensor:
    """Return the output of PyTorch's flash attention for GPUs. The counter has a formula for this kernel."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, dropout_p, is_causal)[0]


def plain_mlp(x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, fc_weight, fc_bias)), proj_weight, proj_bias)


def plain_attention_qkv(qkv: Tensor) -> Tensor:
    q, k, v = (part.unflatten(2, (2, -1)).transpose(1, 2) for part in qkv.split(16, dim=2))
    return flash(q, k, v).transpose(1, 2).flatten(2)


def plain_losses(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight, bias), TARGET.to(x.device), reduction="none")


# name → (the op, the same computation by PyTorch's functions, the shapes of the tensors, which all may get a gradient)
OPS: dict[str, tuple[Callable, Callable, list[tuple[int, ...]]]] = {
    "linear": (ops.linear, F.linear, [(3, 6, 8), (7, 8), (7,)]),
    "mlp": (ops.mlp, plain_mlp, [(6, 8), (16, 8), (16,), (5, 16), (5,)]),
    "loss": (
        lambda x, w, b: ops.linear_cross_entropy(x, w, TARGET, b),
        lambda *tensors: plain_losses(*tensors).mean(),
        [(6, 8), (7, 8), (7,)],
    ),
    "losses": (
        lambda x, w, b: ops.linear_cross_entropy(x, w, TARGET, b, reduction="none"),
        plain_losses,
        [(6, 8), (7, 8), (7,)],
    ),
    "attention": (ops.attention, flash, [(2, 3, 5, 8), (2, 3, 9, 8), (2, 3, 9, 8)]),
    "attention_qkv": (lambda qkv: ops.attention_qkv(qkv, 2), plain_attention_qkv, [(2, 5, 48)]),
    "layer_norm": (ops.layer_norm, lambda x, w, b: F.layer_norm(x, (8,), w, b), [(6, 8), (8,), (8,)]),
    "add_layer_norm": (
        lambda x, r, w, b: sum(ops.add_layer_norm(x, r, w, b)),
        lambda x, r, w, b: x + r + F.layer_norm(x + r, (8,), w, b),
        [(6, 8), (6, 8), (8,), (8,)],
    ),
    "embedding": (
        lambda tokens, places: ops.embedding(TARGET.clamp(min=0), tokens, places),
        lambda tokens, places: F.embedding(TARGET.clamp(min=0).to(tokens.device), tokens) + places[:6],
        [(7, 8), (9, 8)],
    ),
}


def counted(function: Callable, shapes: list[tuple[int, ...]], needed: tuple[bool, ...], device: str) -> int:
    """Return the FLOPs of forward, plus those of backward if any gradient is needed."""
    tensors = [
        torch.randn(shape, device=device, requires_grad=need) for shape, need in zip(shapes, needed, strict=True)
    ]
    with FlopCounterMode(display=False) as counter:
        out = function(*tensors)
        if any(needed):
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", OPS)
def test_an_op_counts_as_pytorchs_functions(name: str) -> None:
    """The counts agree for every choice of needed gradients. Attention's kernel computes all gradients or none."""
    ours, plain, shapes = OPS[name]
    choices = list(itertools.product((False, True), repeat=len(shapes)))
    for needed in (choices[0], choices[-1]) if name == "attention" else choices:
        assert counted(ours, shapes, needed, "cpu") == counted(plain, shapes, needed, "meta"), needed


def test_a_recomputed_product_counts() -> None:
    """The product that backward recomputes counts, as in PyTorch's activation checkpointing."""
    _, _, shapes = OPS["mlp"]
    every = (True,) * 5
    again = counted(lambda *tensors: ops.mlp(*tensors, recompute=True), shapes, every, "cpu")
    assert again == counted(ops.mlp, shapes, every, "cpu") + 2 * 6 * 8 * 16


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
def test_the_mlp_by_cublaslt_counts_the_same(recompute: bool) -> None:
    """The MLP by cuBLASLt needs a GPU, so the test counts its operators on the device "meta"."""
    _, _, shapes = OPS["mlp"]
    every = (True,) * 5
    cublaslt = counted(lambda *tensors: _CublasLtMLP.apply(*tensors, "gelu_tanh", recompute), shapes, every, "meta")
    assert cublaslt == counted(lambda *tensors: ops.mlp(*tensors, recompute=recompute), shapes, every, "cpu") > 0


def test_a_step_of_decoding_counts_the_cache() -> None:
    q, cache = torch.randn(2, 3, 8), torch.randn(2, 3, 9, 8)
    with FlopCounterMode(display=False) as counter:
        ops.decode_attention(q, cache, cache, torch.tensor([4, 9]))
    with FlopCounterMode(display=False) as plain:
        flash(*(tensor.to("meta") for tensor in (q[:, :, None], cache, cache)))
    assert counter.get_total_flops() == plain.get_total_flops() > 0


def test_every_operator_with_a_matrix_product_has_a_formula() -> None:
    without = {f"{op}_{way}" for op in ("layer_norm", "add_layer_norm", "embedding") for way in ("forward", "backward")}
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("gpt_fast::")}
    assert set(_flops.FORMULAS) == names - without


@pytest.mark.parametrize("train", [True, False], ids=["forward and backward", "forward"])
def test_a_model_counts_as_the_plain_one(monkeypatch: pytest.MonkeyPatch, train: bool) -> None:
    """A whole GPT-2 counts as the plain PyTorch model: linear layers, attention, tied output layer and loss."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    config = gpt_fast.GPTConfig(num_tokens=19, hidden_dim=16, num_heads=2, num_layers=2, seq_len=8)
    tokens = torch.randint(0, 19, (3, 7))
    with FlopCounterMode(display=False) as ours, torch.set_grad_enabled(train):
        loss = gpt_fast.GPTForCausalLM(config)(tokens, labels=tokens).loss
        if train:
            loss.backward()
    with FlopCounterMode(display=False) as plain, torch.set_grad_enabled(train):
        loss = PlainGPT(config).to("meta").loss(tokens.to("meta"))
        if train:
            loss.backward()
    assert ours.get_total_flops() == plain.get_total_flops() > 0
    assert torch.ops.gpt_fast.attention_forward in ours.get_flop_counts()["Global"]


def test_an_accelerated_model_counts_as_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "scaled_dot_product_attention", flash)
    model, tokens = make("GPT2LMHeadModel", pad_token_id=None), torch.randint(0, V, (3, 7))
    with FlopCounterMode(display=False) as plain:
        there = tokens.to("meta")
        type(model)(model.config).to("meta")(there, labels=there).loss.backward()
    gpt_fast.accelerate(model)
    with FlopCounterMode(display=False) as ours:
        model(tokens, labels=tokens).loss.backward()
    assert ours.get_total_flops() == plain.get_total_flops() > 0
    assert torch.ops.gpt_fast.attention_forward in ours.get_flop_counts()["Global"]


COUNT = """
import inspect, torch
x, weight = torch.randn(3, 4), torch.randn(5, 4)
with counter.FlopCounterMode(display=False) as count:
    gpt_fast.ops.linear(x, weight)
assert count.get_total_flops() == 2 * 3 * 4 * 5, count.get_total_flops()
assert counter.__loader__ is counter.__spec__.loader and "FlopCounterMode" in inspect.getsource(counter)
"""
ORDERS = [
    pytest.param(
        "import sys, gpt_fast\nassert 'torch.utils.flop_counter' not in sys.modules\n"
        "from torch.utils import flop_counter as counter\n",
        id="the package first",
    ),
    pytest.param("from torch.utils import flop_counter as counter\nimport gpt_fast\n", id="the counter first"),
]


@pytest.mark.parametrize("imports", ORDERS)
def test_the_formulas_come_with_the_counter(imports: str) -> None:
    """A counter knows the formulas, whether the package or the counter is imported first.

    The package itself does not import the counter.
    """
    done = subprocess.run(
        [sys.executable, "-c", imports + COUNT], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
