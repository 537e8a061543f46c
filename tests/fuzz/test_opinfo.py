"""Run the ops on PyTorch's own samples (OpInfo) of the functions that they replace.

If the op's contract covers a sample, the result in the sample's dtype is compared with PyTorch in float64. All other
samples are left out for a listed reason.
"""

import importlib
import importlib.util
import sys
import types
import unittest
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gpt_fast import ops
from tests import numerics
from tests.fuzz import bounds, draws


def opinfos() -> dict[str, Any]:
    """Return PyTorch's OpInfos by name.

    Their module imports the package expecttest for a base class that nothing here uses, so a stand-in is enough. The
    module also forbids setting flags of torch.backends. This function allows it again, because other tests do it.
    """
    if importlib.util.find_spec("expecttest") is None:
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase  # type: ignore[attr-defined]
        sys.modules["expecttest"] = stand_in
    try:
        found = importlib.import_module("torch.testing._internal.common_methods_invocations").op_db
    finally:
        vars(torch.backends)["__allow_nonbracketed_mutation_flag"] = True
        if "stand_in" in locals():
            del sys.modules["expecttest"]
    return {info.name: info for info in found}


class Case(NamedTuple):
    """Sample for an op. On `tensors`, `call` runs the op and `exact` runs PyTorch's function in float64.

    `bound` takes the tensors and the upstream gradient in float64, and the dtype. It returns the bounds of the output
    and of each tensor's gradient.
    """

    tensors: list[Tensor]
    call: Callable[..., Tensor]
    exact: Callable[..., Tensor]
    bound: Callable[[list[Tensor], Tensor, torch.dtype], list[Tensor]]


Sample = Any  # torch.testing's SampleInput has no public name


def layer_norm_case(sample: Sample) -> Case | str:
    shape, weight, bias, eps = (*sample.args, *(None,) * (4 - len(sample.args)))[:4]
    eps = sample.kwargs.get("eps", 1e-5 if eps is None else eps)
    weight, bias = sample.kwargs.get("weight", weight), sample.kwargs.get("bias", bias)
    if len(shape) != 1:
        return "normalised over several dimensions"
    if bias is not None and weight is None:
        return "a bias without a weight"
    tensors = [sample.input, *(x for x in (weight, bias) if x is not None)]

    def bound(wide: list[Tensor], dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
        found = bounds.layer_norm(wide[0], wide[1] if weight is not None else None, eps, dy)
        return [found[name] for name in ("out", "x", "weight", "bias")[: 1 + len(wide)]]

    return Case(
        tensors,
        lambda x, *affine: ops.layer_norm(x, *affine, eps=eps),
        lambda x, *affine: F.layer_norm(x, tuple(shape), *affine, eps=eps),
        bound,
    )


def linear_case(sample: Sample) -> Case | str:
    weight, bias = (*sample.args, sample.kwargs.get("bias"))[:2]
    if weight.dim() != 2:
        return "a weight of one dimension"

    def bound(wide: list[Tensor], dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
        found = bounds.linear(wide[0], wide[1], wide[2] if len(wide) > 2 else None, [dy], dtype)
        return [found[name] for name in ("out", "x", "weight", "bias")[: 1 + len(wide)]]

    return Case([sample.input, weight, *(() if bias is None else (bias,))], ops.linear, F.linear, bound)


def embedding_case(sample: Sample) -> Case | str:
    weight, (tokens,) = sample.input, sample.args
    if set(sample.kwargs) - {"padding_idx"} or sample.kwargs.get("padding_idx") is not None:
        return "padding_idx, max_norm, scale_grad_by_freq or sparse"
    if tokens.dim() == 0:
        return "a single token without a dimension"
    nothing = torch.zeros(max(1, tokens.shape[-1]), weight.shape[1], dtype=weight.dtype)

    def bound(wide: list[Tensor], dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
        positions = torch.arange(tokens.shape[-1])
        found = bounds.embedding(tokens, wide[0], nothing.double(), positions, torch.ones_like(dy), dy)
        return [found["out"], found["token_weight"]]

    return Case(
        [weight], lambda w: ops.embedding(tokens, w, nothing.to(w.dtype)), lambda w: F.embedding(tokens, w), bound
    )


def cross_entropy_case(sample: Sample) -> Case | str:
    logits, target, options = sample.input, sample.args[0], dict(sample.kwargs)
    if target.is_floating_point():
        return "probabilities as targets"
    if options.pop("weight", None) is not None:
        return "weights of classes"
    if logits.dim() > 2:
        logits = logits.movedim(1, -1)
    # The projection is an identity, which leaves the logits as they are.
    identity = torch.eye(logits.shape[-1], dtype=logits.dtype)
    ignore_index, reduction = options.get("ignore_index", -100), options.get("reduction", "mean")
    smoothing = options.get("label_smoothing", 0.0)

    def exact(x: Tensor) -> Tensor:
        loss = (
            F.cross_entropy(x.flatten(0, -2), target.flatten(), **options | {"reduction": "none"})
            if x.dim() > 1
            else F.cross_entropy(x, target, **options | {"reduction": "none"})
        )
        loss, count = loss.reshape(target.shape), (target != ignore_index).sum().clamp(min=1)
        # The mean over no rows is NaN in PyTorch, and 0 by the op's contract.
        return loss if reduction == "none" else loss.sum() / (count if reduction == "mean" else 1)

    def bound(wide: list[Tensor], dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
        x, labels = wide[0].reshape(target.numel(), -1), target.reshape(-1)
        dloss = dy.reshape(-1) if reduction == "none" else dy
        found = bounds.linear_cross_entropy(
            x, identity.double(), labels, None, labels != ignore_index, smoothing, reduction, dloss, dtype
        )
        return [found["out"].reshape(dy.shape), found["x"].reshape(wide[0].shape)]

    return Case(
        [logits],
        lambda x: ops.linear_cross_entropy(x, identity, target, None, ignore_index, smoothing, reduction),
        exact, bound,
    )  # fmt: skip


def attention_case(sample: Sample) -> Case | str:
    q, (k, v), options = sample.input, sample.args, dict(sample.kwargs)
    mask, causal = options.pop("attn_mask", None), options.pop("is_causal", False)
    options.pop("dropout_p", 0.0)  # compared without dropout, because PyTorch draws other masks than this library
    grouped = options.pop("enable_gqa", False)
    if grouped or q.shape[:-2] != k.shape[:-2]:
        return "fewer heads of keys than of queries"
    if v.shape != k.shape:
        return "values of another width than the keys"
    if mask is not None and mask.dtype != torch.bool:
        return "a mask that is added"
    heads = [x if x.dim() == 4 else x[:, None] for x in (q, k, v)]
    if mask is not None and mask.dim() == 3 and q.dim() == 3:
        mask = mask[:, None]
    if causal and q.shape[-2] != k.shape[-2]:  # PyTorch counts queries from the first key, this library from the last
        mask, causal = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril(), False

    def bound(wide: list[Tensor], dy: Tensor, dtype: torch.dtype) -> list[Tensor]:
        B, H, T, D = wide[0].shape
        allowed = torch.ones(B, H, T, wide[1].shape[2], dtype=torch.bool)
        allowed = allowed.tril() if causal else allowed
        allowed = allowed & mask if mask is not None else allowed
        found = bounds.attention(*wide, allowed, torch.ones(allowed.shape).double(), D**-0.5, dy, dtype)
        return [found[name] for name in ("out", "q", "k", "v")]

    return Case(
        heads,
        lambda *x: ops.attention(*x, causal=causal, mask=mask),
        lambda *x: F.scaled_dot_product_attention(*x, attn_mask=mask, is_causal=causal),
        bound,
    )


# name of the OpInfo → (function that makes a case of a sample, least number of samples to compare, reasons for which
# samples are left out)
FUNCTIONS = {
    "nn.functional.layer_norm": (
        layer_norm_case, 4, {"normalised over several dimensions", "a bias without a weight"},
    ),
    "nn.functional.linear": (linear_case, 8, {"a weight of one dimension"}),
    "nn.functional.embedding": (
        embedding_case, 2,
        {"padding_idx, max_norm, scale_grad_by_freq or sparse", "a single token without a dimension"},
    ),
    "nn.functional.cross_entropy": (cross_entropy_case, 6, {"probabilities as targets", "weights of classes"}),
    "nn.functional.scaled_dot_product_attention": (
        attention_case, 15,
        {"fewer heads of keys than of queries", "values of another width than the keys", "a mask that is added"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def infos() -> dict[str, Any]:
    return opinfos()


@pytest.mark.parametrize("dtype", numerics.DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_samples_of_pytorch(name, dtype, infos):
    """Values and gradients agree with PyTorch's in float64. All other samples are left out for a listed reason."""
    make, least, reasons = FUNCTIONS[name]
    if name == "nn.functional.linear" and draws.INTERPRETED:
        pytest.skip("linear has no Triton kernel: PyTorch's own product serves, whose rounding is PyTorch's")
    compared = 0
    for sample in infos[name].sample_inputs("cpu", dtype, requires_grad=False):
        case = make(sample)
        if isinstance(case, str):
            assert case in reasons
        else:
            compare(case, dtype)
            compared += 1
    assert compared >= least


def compare(case: Case, dtype: torch.dtype) -> None:
    leaves = [x.detach().requires_grad_() for x in case.tensors]
    wide = [x.detach().double().requires_grad_() for x in case.tensors]
    out, exact = case.call(*leaves), case.exact(*wide)
    dy = torch.randn(out.shape).to(out.dtype)
    got = [out.detach(), *torch.autograd.grad(out, leaves, dy)]
    truth = [exact.detach(), *torch.autograd.grad(exact, wide, dy.double().reshape(exact.shape))]
    allowed = case.bound([x.detach() for x in wide], dy.double(), dtype)
    for number, values in enumerate(zip(got, truth, allowed, strict=True)):
        numerics.assert_bounded(*values, label=f"result {number}")
