"""decode_attention: one new query a sequence against a cache of keys and values."""

import math

import torch
from torch import Tensor

from .. import reference
from . import _checks, _flops, _library
from .attention import MAX_HEAD_DIM

_SIGNATURE = "(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths) -> Tensor"
_library.define_forward("decode_attention", _SIGNATURE)
# csrc/cuda/decode_attention.cu, where it was built. Triton serves: no GPU has said yet which of the two is faster.
_library.define_forward("decode_attention_cuda", _SIGNATURE)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """out = softmax(D^-1/2 q Kᵀ) V over the first `lengths` entries of each sequence's cache.

    Shapes: q [B, H, D], k_cache and v_cache [B, H, S, D] with D up to 256, lengths [B]; out [B, H, D]. A length of 0
    gives 0.

    Dtypes: q, k_cache, v_cache alike, float32, bfloat16 or float16 (float64: the reference); lengths int64 or int32.

    Precision: scores, softmax and sums in float32, one rounding on store.

    Deterministic. No gradient: it serves generation.

    Raises `ValueError` for other dtypes, shapes or devices, inputs that require a gradient while autograd records, and
    on CPU (elsewhere after `check_values`) for lengths outside [0, S].

    Source: Dao et al. (2023), "Flash-Decoding for long-context inference".
    """
    op = "decode_attention"
    _checks.tensors(op, q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    _checks.dimensions(op, "q", q, "[B, H, D]")
    _checks.dimensions(op, "k_cache", k_cache, "[B, H, S, D]")
    B, H, D = q.shape
    S = k_cache.shape[2]
    _checks.shape(op, "k_cache", k_cache, (B, H, S, D), "batch, heads and head size of q")
    _checks.shape(op, "v_cache", v_cache, (B, H, S, D), "the shape of k_cache")
    _checks.shape(op, "lengths", lengths, (B,), "one length for each sequence")
    _checks.floating(op, q=q, k_cache=k_cache, v_cache=v_cache)
    _checks.same_dtype(op, q=q, k_cache=k_cache, v_cache=v_cache)
    _checks.integral(op, lengths=lengths)
    _checks.same_device(op, q=q, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"gpt_fast.{op}: head size is {D}; expected 1 to {MAX_HEAD_DIM}")
    if torch.is_grad_enabled() and (q.requires_grad or k_cache.requires_grad or v_cache.requires_grad):
        raise ValueError(
            f"gpt_fast.{op}: an input requires a gradient; expected none: use attention, or torch.no_grad()"
        )
    if _library.values_checked(lengths) and not _library.kernel_checks(op, q):
        _checks.values_below(op, "lengths", lengths, S + 1)
    if _library.runs_reference(op, q):
        return _library.by_reference(reference.decode_attention, q.device.type, q, k_cache, v_cache, lengths)
    return torch.ops.gpt_fast.decode_attention_forward(q, k_cache, v_cache, lengths)


@torch.library.register_fake("gpt_fast::decode_attention_cuda_forward", lib=_library.LIBRARY)
@torch.library.register_fake("gpt_fast::decode_attention_forward", lib=_library.LIBRARY)
def _forward_fake(q, k_cache, v_cache, lengths):
    return q.new_empty(q.shape)


_library.register_decomposition("decode_attention", reference.decode_attention)
_library.register_decomposition("decode_attention_cuda", reference.decode_attention)


def _triton_forward(q, k_cache, v_cache, lengths):
    return _library.triton_kernel("decode_attention").forward(q, k_cache, v_cache, lengths)


_library.register_triton("decode_attention_forward", _triton_forward)


def _forward_flops(q, k_cache, v_cache, lengths, **_):
    return 4 * math.prod(k_cache)  # the whole cache: a shape does not tell how much of it is filled


_flops.register("decode_attention_forward", _forward_flops)
_flops.register("decode_attention_cuda_forward", _forward_flops)
