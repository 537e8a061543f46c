"""Who an op is measured against. A peer that cannot run is named with the reason, never left out in silence."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import gpt_fast
from benchmarks.cases import Case
from gpt_fast import reference


@dataclass(frozen=True)
class Peer:
    name: str
    build: Callable[[Case], Callable[..., Tensor]]  # the function, which takes the case's inputs
    missing: Callable[[Case], str | None] = lambda case: None  # why it cannot run this case here


def _reference(op: str) -> Peer:
    return Peer("reference", lambda case: getattr(reference, op))


def _ours(op: str) -> Peer:
    def missing(case: Case) -> str | None:
        served = gpt_fast.ops.serving(op, case.device)
        return "no kernel here: the reference serves" if served == "reference" else None

    return Peer("gpt_fast", lambda case: getattr(gpt_fast.ops, op), missing)


def _compiled(function: Callable[..., Tensor]) -> Peer:
    def build(case: Case) -> Callable[..., Tensor]:
        torch.compiler.reset()  # or a second shape would be compiled for shapes that vary
        return torch.compile(function, dynamic=False)

    return Peer("torch.compile", build)


def _missing_liger(case: Case) -> str | None:
    if importlib.util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed"
    return None if case.device == "cuda" else "its kernels run on GPUs only"


def _liger_layer_norm(case: Case) -> Callable[..., Tensor]:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return LigerLayerNormFunction.apply


def _torch_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


# Ours first: the report gives every other one's time relative to it.
PEERS: dict[str, tuple[Peer, ...]] = {
    "layer_norm": (
        _ours("layer_norm"),
        Peer("torch", lambda case: _torch_layer_norm),
        _compiled(_torch_layer_norm),
        Peer("liger", _liger_layer_norm, _missing_liger),
        _reference("layer_norm"),
    ),
}
