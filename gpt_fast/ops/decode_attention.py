"""decode_attention: one new query a sequence against a cache of keys and values, which may first get a new entry."""

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
_library.define_forward(
    "decode_attention_append",
    "(Tensor q, Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor lengths) -> Tensor",
)


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor) -> Tensor:
    """Attend from one new query a sequence to a cache of keys and values.

    out = softmax(D^-1/2 q Kᵀ) V over the first `lengths` entries of each sequence's cache.

    Args:
        q: Queries [B, H, D], D from 1 to 256, in float32, bfloat16, float16 or float64.
        k_cache: Keys [B, H, S, D], in the dtype of q.
        v_cache: Values [B, H, S, D], in the dtype of q.
        lengths: How many entries of each sequence are filled [B], int64 or int32. A length of 0 gives 0. Where nobody
            checks them, they are clamped to [0, S].

    Returns:
        out [B, H, D] in the dtype of q.

    Raises:
        ValueError: A dtype, shape or device differs from the list above, or an input requires a gradient while autograd
            records. On CPU (elsewhere after `check_values`) also if `lengths` lie outside [0, S].

    Example:
        ```python
        import torch
        from gpt_fast import ops

        q, k_cache, v_cache = torch.randn(2, 4, 64), torch.randn(2, 4, 128, 64), torch.randn(2, 4, 128, 64)
        print(ops.decode_attention(q, k_cache, v_cache, torch.tensor([5, 128])).shape)  # torch.Size([2, 4, 64])
        ```

    Note:
        Precision: scores, softmax and sums are float32, and each result is rounded once. The reference serves float64.

        Results are deterministic. The op has no gradient, because it serves generation.

        Source: Dao et al. (2023), "Flash-Decoding for long-context inference".
    """
    op = "decode_attention"
    _check(op, k_cache, v_cache, lengths, q=q)
    if _library.values_checked(lengths) and not _library.kernel_checks(op, q):
        _checks.values_below(op, "lengths", lengths, k_cache.shape[2] + 1)
    if _library.runs_reference(op, q):
        return _library.by_reference(reference.decode_attention, q.device.type, q, k_cache, v_cache, lengths)
    return torch.ops.gpt_fast.decode_attention_forward(q, k_cache, v_cache, lengths)


def decode_attention_append(
    q: Tensor, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor
) -> Tensor:
    """Append one key and value a sequence to the caches in place, and attend to them too.

    K[b, :, lengths[b]] = k[b], V likewise; out = softmax(D^-1/2 q Kᵀ) V over the first lengths[b] + 1 entries.

    This is the attention of a decode step. The caller advances `lengths`.

    Args:
        q: Queries [B, H, D], D from 1 to 256, in float32, bfloat16, float16 or float64.
        k: New keys [B, H, D], in the dtype of q.
        v: New values [B, H, D], in the dtype of q.
        k_cache: Keys [B, H, S, D], S ≥ 1, in the dtype of q. The caches may be slices. None of their entries may share
            memory with another entry, or with k and v.
        v_cache: Values [B, H, S, D], in the dtype of q.
        lengths: How many entries of each sequence are filled [B], int64 or int32. Where nobody checks them, they are
            clamped to [0, S).

    Returns:
        out [B, H, D] in the dtype of q.

    Raises:
        ValueError: A dtype, shape or device differs from the list above, or an input requires a gradient while autograd
            records. On CPU (elsewhere after `check_values`) also if `lengths` lie outside [0, S).

    Example:
        ```python
        import torch
        from gpt_fast import ops

        q, k, v = (torch.randn(2, 4, 64) for _ in range(3))
        k_cache, v_cache, lengths = torch.zeros(2, 4, 8, 64), torch.zeros(2, 4, 8, 64), torch.tensor([0, 5])
        ops.decode_attention_append(q, k, v, k_cache, v_cache, lengths)
        print(torch.equal(k_cache[1, :, 5], k[1]))  # True
        ```

    Note:
        Precision: scores, softmax and sums are float32, and each result is rounded once. The reference serves float64.

        Results are deterministic. The op has no gradient, because it serves generation.

        Cost: on CUDA this op launches as many kernels as `decode_attention`.

        Source: Dao et al. (2023), "Flash-Decoding for long-context inference".
    """
    op = "decode_attention_append"
    _check(op, k_cache, v_cache, lengths, q=q, k=k, v=v)
    S = k_cache.shape[2]
    if S == 0:
        raise ValueError(f"gpt_fast.{op}: k_cache has shape {list(k_cache.shape)}; expected room for the new key")
    if _library.values_checked(lengths):
        _checks.values_below(op, "lengths", lengths, S)
    if not _library.runs_reference("decode_attention", q) and _library.serving("decode_attention", q.device.type) == (
        "triton"
    ):
        return torch.ops.gpt_fast.decode_attention_append_forward(q, k, v, k_cache, v_cache, lengths)
    positions = lengths.long().clamp(0, S - 1)
    index = positions[:, None, None, None].expand(*k.shape[:2], 1, k.shape[2])
    k_cache.scatter_(2, index, k[:, :, None])
    v_cache.scatter_(2, index, v[:, :, None])
    return decode_attention(q, k_cache, v_cache, positions + 1)


def _check(op: str, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, **rows: Tensor) -> None:
    """Raise `ValueError` if the shape, dtype or device of an argument of `op` is wrong, or if one requires a gradient.

    A gradient matters only while autograd records. The values of `lengths` are not checked. `rows` maps "q", and "k"
    and "v" if `op` appends them, to tensors [B, H, D]. `k_cache` and `v_cache` are [B, H, S, D]. `lengths` is [B].

    Raises:
        ValueError: An argument is not valid.
    """
    _checks.tensors(op, **rows, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    q = rows["q"]
    _checks.dimensions(op, "q", q, "[B, H, D]")
    _checks.dimensions(op, "k_cache", k_cache, "[B, H, S, D]")
    B, H, D = q.shape
    for name, row in rows.items():
        _checks.shape(op, name, row, (B, H, D), "the shape of q")
    _checks.shape(op, "k_cache", k_cache, (B, H, k_cache.shape[2], D), "batch, heads and head size of q")
    _checks.shape(op, "v_cache", v_cache, k_cache.shape, "the shape of k_cache")
    _checks.shape(op, "lengths", lengths, (B,), "one length for each sequence")
    _checks.floating(op, **rows, k_cache=k_cache, v_cache=v_cache)
    _checks.same_dtype(op, **rows, k_cache=k_cache, v_cache=v_cache)
    _checks.integral(op, lengths=lengths)
    _checks.same_device(op, **rows, k_cache=k_cache, v_cache=v_cache, lengths=lengths)
    if not 1 <= D <= MAX_HEAD_DIM:
        raise ValueError(f"gpt_fast.{op}: head size is {D}; expected 1 to {MAX_HEAD_DIM}")
    if torch.is_grad_enabled() and any(x.requires_grad for x in (*rows.values(), k_cache, v_cache)):
        raise ValueError(
            f"gpt_fast.{op}: an input requires a gradient; expected none: use attention, or torch.no_grad()"
        )


@torch.library.register_fake("gpt_fast::decode_attention_cuda_forward", lib=_library.LIBRARY)
@torch.library.register_fake("gpt_fast::decode_attention_forward", lib=_library.LIBRARY)
def _forward_fake(q, k_cache, v_cache, lengths):
    return q.new_empty(q.shape)


@torch.library.register_fake("gpt_fast::decode_attention_append_forward", lib=_library.LIBRARY)
def _append_fake(q, k, v, k_cache, v_cache, lengths):
    return q.new_empty(q.shape)


_library.register_decomposition("decode_attention", reference.decode_attention)
_library.register_decomposition("decode_attention_cuda", reference.decode_attention)
_library.refuse_decomposition(
    "decode_attention_append", "forward", "one that writes no cache, such as decode_attention"
)


def _triton_forward(q, k_cache, v_cache, lengths):
    return _library.triton_kernel("decode_attention").forward(q, k_cache, v_cache, lengths)


def _triton_append(q, k, v, k_cache, v_cache, lengths):
    return _library.triton_kernel("decode_attention").append_forward(q, k, v, k_cache, v_cache, lengths)


_library.register_triton("decode_attention_forward", _triton_forward)
_library.register_triton("decode_attention_append_forward", _triton_append)


def _forward_flops(q, k_cache, v_cache, lengths, **_):
    """Return 4 B H S D, the FLOPs over all S entries of the cache. All tensors are given as shapes."""
    return 4 * math.prod(k_cache)  # the whole cache: a shape does not tell how much of it is filled


def _append_flops(q, k, v, k_cache, v_cache, lengths, **_):
    """Return 4 B H S D, the FLOPs over all S entries of the cache. All tensors are given as shapes."""
    return 4 * math.prod(k_cache)


_flops.register("decode_attention_forward", _forward_flops)
_flops.register("decode_attention_append_forward", _append_flops)
_flops.register("decode_attention_cuda_forward", _forward_flops)
