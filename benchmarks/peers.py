"""Who computes an op: ours, the reference, and what others offer. `benchmarks.models` has those of the jobs.

A peer that cannot run a case is named with the reason, never left out in silence.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.cases import Case
from benchmarks.timing import available_memory
from gpt_fast import ops, reference

Function = Callable[..., Any]
OURS = "gpt_fast"
SITE = 1  # of dropout: any number but the same in ours and the reference


@dataclass(frozen=True)
class Peer:
    name: str
    build: Callable[[Case], Function]  # the function, which takes the case's inputs
    missing: Callable[[Case], str | None] = lambda case: None  # why it cannot run this case here
    compiles: bool = False  # by torch.compile, which takes too long for whole models in a quick run


def _seed(case: Case) -> Tensor:
    return torch.tensor([1234567], device=case.device)


def _ours(op: str, options: Callable[[Case], dict[str, Any]] = lambda case: {}) -> Peer:
    def missing(case: Case) -> str | None:
        return "no kernel here: the reference serves" if ops.serving(op, case.device) == "reference" else None

    return Peer(OURS, lambda case: partial(getattr(ops, op), **options(case)), missing)


def _reference(
    op: str,
    options: Callable[[Case], dict[str, Any]] = lambda case: {},
    memory: Callable[[Case], int] = lambda case: 0,
) -> Peer:
    return Peer("reference", lambda case: partial(getattr(reference, op), **options(case)), _fits(memory))


def _compiled(build: Callable[[Case], Function]) -> Peer:
    return Peer("torch.compile", lambda case: torch.compile(build(case), dynamic=False), compiles=True)


def _fits(memory: Callable[[Case], int]) -> Callable[[Case], str | None]:
    """Missing where it needs more than half of the memory there is."""

    def missing(case: Case) -> str | None:
        need = memory(case)
        return f"needs about {need / 2**30:.0f} GiB" if need > available_memory(case.device) / 2 else None

    return missing


def _cuda_only(package: str | None = None) -> Callable[[Case], str | None]:
    def missing(case: Case) -> str | None:
        if package and importlib.util.find_spec(package) is None:
            return f"{package.replace('_', '-')} is not installed"
        return None if case.device == "cuda" else "runs on GPUs only"

    return missing


def _dropout(case: Case) -> dict[str, Any]:
    return {"dropout_p": case.dropout, "seed": _seed(case), "site": SITE} if case.dropout else {}


# ---- attention


def _scores(copies_of_scores: int) -> Callable[[Case], int]:
    """Bytes of an implementation that stores [B, H, T, T], and so many of them."""

    def memory(case: Case) -> int:
        size = case.size
        return copies_of_scores * 4 * size["B"] * size["H"] * size["T"] ** 2

    return memory


def _reference_memory(case: Case) -> int:
    return _scores(30 if case.dropout else 6)(case)  # dropout: 64-bit words of the generator for each pair


def _sdpa(backend: SDPBackend | None) -> Callable[[Case], Function]:
    def build(case: Case) -> Function:
        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            if backend is None:
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=case.dropout)
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=case.dropout)

        return run

    return build


def _flash_missing(case: Case) -> str | None:
    return "no dropout on the CPU: PyTorch takes math instead" if case.dropout and case.device == "cpu" else None


def _flex(case: Case) -> Function:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T = case.size["T"]
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=case.device)
    compiled = torch.compile(flex_attention, dynamic=False)
    if case.device == "cuda":
        return lambda q, k, v: compiled(q, k, v, block_mask=mask)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        # On the CPU it refuses inputs that require a gradient, and has no backward.
        return compiled(q.detach(), k.detach(), v.detach(), block_mask=mask)

    return run


def _flex_missing(case: Case) -> str | None:
    return "has no dropout" if case.dropout else None


# ---- norms


def _torch_layer_norm(case: Case) -> Function:
    return lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias)


def _liger_layer_norm(case: Case) -> Function:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    return lambda x, weight, bias: LigerLayerNormFunction.apply(x, weight, bias, 1e-5)


def _torch_add_layer_norm(case: Case) -> Function:
    p = case.dropout

    def run(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        summed = residual + F.dropout(x, p) if p else residual + x
        return F.layer_norm(summed, x.shape[-1:], weight, bias), summed

    return run


# ---- mlp


def _torch_mlp(case: Case) -> Function:
    p = case.dropout

    def run(x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor) -> Tensor:
        hidden = F.gelu(F.linear(x, fc_weight, fc_bias), approximate="tanh")
        return F.linear(F.dropout(hidden, p) if p else hidden, proj_weight, proj_bias)

    return run


def _bare_products(case: Case) -> Function:
    """The two products with nothing between them: not the same function, but what cannot be saved."""

    def run(x: Tensor, fc_weight: Tensor, fc_bias: Tensor, proj_weight: Tensor, proj_bias: Tensor) -> Tensor:
        return F.linear(F.linear(x, fc_weight), proj_weight)

    return run


# ---- loss


def _torch_loss(case: Case) -> Function:
    return lambda x, weight, target: F.cross_entropy(F.linear(x, weight).float(), target)


def _torch_loss_chunked(case: Case) -> Function:
    function, options = F.linear_cross_entropy, torch.nn.LinearCrossEntropyOptions()
    return lambda x, weight, target: function(x, weight, target, options=options)


def _chunked_missing(case: Case) -> str | None:
    if not hasattr(F, "linear_cross_entropy"):
        return f"PyTorch {torch.__version__} does not have it"
    # 24 s where the others took 3 to 4 s, with 256 rows on one thread of a 2-core EPYC.
    return "left to the smallest case on a CPU" if case.device == "cpu" and case.size["N"] > 256 else None


def _liger_fused_loss(case: Case) -> Function:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss()
    return lambda x, weight, target: loss(weight, x, target)


def _liger_loss(case: Case) -> Function:
    from liger_kernel.transformers import LigerCrossEntropyLoss

    loss = LigerCrossEntropyLoss()
    return lambda x, weight, target: loss(F.linear(x, weight), target)


# ---- embedding, decoding


def _torch_embedding(case: Case) -> Function:
    p = case.dropout

    def run(tokens: Tensor, token_weight: Tensor, position_weight: Tensor) -> Tensor:
        x = F.embedding(tokens, token_weight) + position_weight[: tokens.shape[1]]
        return F.dropout(x, p) if p else x

    return run


def _torch_decode_attention(case: Case) -> Function:
    def run(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
        there = torch.arange(k_cache.shape[2], device=q.device) < lengths[:, None, None, None]
        return F.scaled_dot_product_attention(q[:, :, None], k_cache, v_cache, attn_mask=there)[:, :, 0]

    return run


# Ours first: the report gives every other one's time relative to it.
PEERS: dict[str, tuple[Peer, ...]] = {
    "attention": (
        _ours("attention", _dropout),
        Peer("sdpa math", _sdpa(SDPBackend.MATH), _fits(_scores(5))),
        Peer("sdpa flash", _sdpa(SDPBackend.FLASH_ATTENTION), _flash_missing),
        Peer("sdpa efficient", _sdpa(SDPBackend.EFFICIENT_ATTENTION), _cuda_only()),
        Peer("sdpa cudnn", _sdpa(SDPBackend.CUDNN_ATTENTION), _cuda_only()),
        _compiled(_sdpa(None)),
        Peer("FlexAttention", _flex, _flex_missing, compiles=True),
        _reference("attention", _dropout, _reference_memory),
    ),
    "layer_norm": (
        _ours("layer_norm"),
        Peer("torch", _torch_layer_norm),
        _compiled(_torch_layer_norm),
        Peer("Liger", _liger_layer_norm, _cuda_only("liger_kernel")),
        _reference("layer_norm"),
    ),
    "add_layer_norm": (
        _ours("add_layer_norm", _dropout),
        Peer("torch", _torch_add_layer_norm),
        _compiled(_torch_add_layer_norm),
        _reference("add_layer_norm", _dropout),
    ),
    "mlp": (
        _ours("mlp", _dropout),
        Peer("torch", _torch_mlp),
        _compiled(_torch_mlp),
        Peer("products alone", _bare_products),
        _reference("mlp", _dropout),
    ),
    "linear_cross_entropy": (
        _ours("linear_cross_entropy"),
        Peer("torch", _torch_loss),
        Peer("torch chunked", _torch_loss_chunked, _chunked_missing),
        _compiled(_torch_loss),
        Peer("Liger fused", _liger_fused_loss, _cuda_only("liger_kernel")),
        Peer("Liger cross-entropy", _liger_loss, _cuda_only("liger_kernel")),
        _reference("linear_cross_entropy"),
    ),
    "embedding": (
        _ours("embedding", _dropout),
        Peer("torch", _torch_embedding),
        _compiled(_torch_embedding),
        _reference("embedding", _dropout),
    ),
    "decode_attention": (
        _ours("decode_attention"),
        Peer("torch", _torch_decode_attention),
        _compiled(_torch_decode_attention),
        _reference("decode_attention"),
    ),
}
