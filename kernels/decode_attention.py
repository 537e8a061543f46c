"""decode_attention in Triton: one query a sequence against its cache, split over keys.

Notation: s = scale q Kᵀ over the first n keys, out = softmax(s) V. A program takes SPLIT neighbouring keys of one head
and stores its running maximum m, its sum of exponentials l and its unnormalised row acc; a second kernel adds the
splits in their order, each weighed by 2^(m - max m). Precision: everything in float32, one rounding on store; there is
one query, so that products are sums of the rows as they are loaded and no tensor core would help. Deterministic: what a
split is depends on its keys' positions alone, so the batch changes no bit. Lengths are clamped.

`append_forward` also writes each sequence's new key and value behind the keys that its cache holds, then attends to
them too. The one program whose split has the new key takes it from the caller's tensor and stores it, so no program
reads what another writes.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch_configs
from .sizes import cdiv, next_power_of_2

LOG2E = 1.4426950408889634


class Config(NamedTuple):
    """Launch configuration for heads of some size."""

    split: int  # keys of a program
    keys: int  # keys of a tile
    warps: int
    added: int  # splits that the second kernel adds at a time


@triton.jit
def _keys(length_ptr, S, k_new_ptr):
    """Return how many keys a sequence attends to, as an int64 scalar.

    `length_ptr` points to the sequence's length, and its cache has S entries. The result is the length, clamped to
    [0, S]. If `k_new_ptr` is not None, a new key is appended to the cache: the length is then clamped to [0, S - 1],
    and the result is one more.
    """
    n = tl.maximum(tl.load(length_ptr).to(tl.int64), 0)
    if k_new_ptr is not None:
        n = tl.minimum(n, S - 1) + 1
    else:
        n = tl.minimum(n, S)
    return n


@triton.jit(do_not_specialize=["H", "S", "splits"])
def _fwd_kernel(
    q_ptr, k_ptr, v_ptr, lengths_ptr, acc_ptr, m_ptr, l_ptr,
    stride_qb, stride_qh, stride_qd, stride_kb, stride_kh, stride_kt, stride_kd,
    stride_vb, stride_vh, stride_vt, stride_vd, H, S, D, splits, scale,
    k_new_ptr, v_new_ptr,  # [B, H, D]: the last key and value after this call; both None if the cache is only read
    stride_knb, stride_knh, stride_knd, stride_vnb, stride_vnh, stride_vnd,
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attend from one head's query to SPLIT neighbouring keys, and write the softmax's state for `_add_kernel`.

    Program (i, s) of the grid (B H, splits) takes head i % H of sequence i // H and the keys from s · SPLIT on. The
    state is the unnormalised output acc [B H, splits, D], the maximum m of the scores and the sum l of their
    exponentials, [B H, splits] each, in float32. `scale` is 1 / sqrt(D) times log2(e), so that exponentials are powers
    of two. A program whose keys all lie past the sequence's length writes nothing. If `k_new_ptr` is not None, each
    sequence gets one more key, at the position of its length. The program whose keys include that one also writes it
    and its value into the caches.
    """
    row = tl.program_id(0).to(tl.int64)  # batch · H + head
    split = tl.program_id(1).to(tl.int64)
    b, h = row // H, row % H
    n = _keys(lengths_ptr + b, S, k_new_ptr)
    begin = split * SPLIT
    tl.static_assert(SPLIT % BLOCK_N == 0)
    if begin < n:
        offs_d = tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        q = tl.load(q_ptr + b * stride_qb + h * stride_qh + offs_d * stride_qd, mask=mask_d, other=0.0)
        q = q.to(tl.float32) * scale
        if k_new_ptr is not None:
            offs_kn = b * stride_knb + h * stride_knh + offs_d * stride_knd
            offs_vn = b * stride_vnb + h * stride_vnh + offs_d * stride_vnd
            k_new = tl.load(k_new_ptr + offs_kn, mask=mask_d, other=0.0)  # [BLOCK_D]
            v_new = tl.load(v_new_ptr + offs_vn, mask=mask_d, other=0.0)
            if n <= begin + SPLIT:  # the split of this program holds the new key
                offs_k = b * stride_kb + h * stride_kh + (n - 1) * stride_kt + offs_d * stride_kd
                offs_v = b * stride_vb + h * stride_vh + (n - 1) * stride_vt + offs_d * stride_vd
                tl.store(k_ptr + offs_k, k_new, mask=mask_d)
                tl.store(v_ptr + offs_v, v_new, mask=mask_d)
        m = -float("inf")
        l = 0.0  # noqa: E741
        acc = tl.zeros([BLOCK_D], dtype=tl.float32)
        for first in range(0, SPLIT, BLOCK_N):
            offs_n = begin + first + tl.arange(0, BLOCK_N)
            mask_n = offs_n < n
            mask = mask_n[:, None] & mask_d[None, :]
            offs_k = b * stride_kb + h * stride_kh + offs_n[:, None] * stride_kt + offs_d[None, :] * stride_kd
            offs_v = b * stride_vb + h * stride_vh + offs_n[:, None] * stride_vt + offs_d[None, :] * stride_vd
            if k_new_ptr is not None:
                mask = mask & (offs_n < n - 1)[:, None]
            k = tl.load(k_ptr + offs_k, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
            v = tl.load(v_ptr + offs_v, mask=mask, other=0.0).to(tl.float32)
            if k_new_ptr is not None:
                is_new = (offs_n == n - 1)[:, None]
                k = tl.where(is_new, k_new.to(tl.float32)[None, :], k)
                v = tl.where(is_new, v_new.to(tl.float32)[None, :], v)
            s = tl.where(mask_n, tl.sum(q[None, :] * k, axis=1), -float("inf"))  # [BLOCK_N]
            m_new = tl.maximum(m, tl.max(s, axis=0))  # finite: the first tile holds a key
            p = tl.exp2(s - m_new)
            shrink = tl.exp2(m - m_new)
            l = l * shrink + tl.sum(p, axis=0)  # noqa: E741
            acc = acc * shrink + tl.sum(p[:, None] * v, axis=0)
            m = m_new
        part = row * splits + split
        tl.store(acc_ptr + part * D + offs_d, acc, mask=mask_d)
        tl.store(m_ptr + part, m)
        tl.store(l_ptr + part, l)


@triton.jit(do_not_specialize=["H", "S", "splits"])
def _add_kernel(
    acc_ptr, m_ptr, l_ptr, lengths_ptr, out_ptr, k_new_ptr, H, S, D, splits,
    SPLIT: tl.constexpr, ADDED: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write the attention output [D] of one head into row i of out [B H, D], in program i of the grid (B H).

    The cache of S keys is divided into `splits` splits of SPLIT neighbouring keys. `_fwd_kernel` has written a state
    for each: acc [B H, splits, D], m and l [B H, splits]. This kernel adds the states in the order of the splits, ADDED
    at a time, and divides by the sum of exponentials. Splits past the sequence's length are not read; for a sequence
    without keys the output is 0. If `k_new_ptr` is not None, `_fwd_kernel` has appended a key, so that the sequence has
    one more than its length.
    """
    row = tl.program_id(0).to(tl.int64)
    n = _keys(lengths_ptr + row // H, S, k_new_ptr)
    used = (n + SPLIT - 1) // SPLIT
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    m = -float("inf")
    l = 0.0  # noqa: E741
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    for first in range(0, used, ADDED):
        offs_s = first + tl.arange(0, ADDED)
        mask_s = offs_s < used
        part = row * splits + offs_s
        m_s = tl.load(m_ptr + part, mask=mask_s, other=-float("inf"))
        l_s = tl.load(l_ptr + part, mask=mask_s, other=0.0)
        acc_s = tl.load(
            acc_ptr + part[:, None] * D + offs_d[None, :], mask=mask_s[:, None] & mask_d[None, :], other=0.0
        )  # [ADDED, BLOCK_D]
        m_new = tl.maximum(m, tl.max(m_s, axis=0))
        weight, shrink = tl.exp2(m_s - m_new), tl.exp2(m - m_new)
        l = l * shrink + tl.sum(weight * l_s, axis=0)  # noqa: E741
        acc = acc * shrink + tl.sum(weight[:, None] * acc_s, axis=0)
        m = m_new
    out = acc / tl.where(used > 0, l, 1.0)
    tl.store(out_ptr + row * D + offs_d, out, mask=mask_d)


def config(BLOCK_D: int, device: torch.device) -> Config:
    """Return the launch configuration for heads of BLOCK_D elements: the head size padded to a power of two."""
    return Config(*launch_configs.pick("decode_attention", "keys", launch_configs.architecture(device), 4, BLOCK_D))


def forward(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Return out [B, H, D], contiguous: the attention of q [B, H, D] to the first `lengths` [B] entries of each cache.

    Sequence b has one query and the cache rows k_cache[b] and v_cache[b], [H, S, D] each. The scale is 1 / sqrt(D).
    Lengths are clamped to [0, S]; a length of 0 gives 0.
    """
    return _attend(q, k_cache, v_cache, lengths, None, None)


def append_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """Append k and v to the caches in place, and return the attention out [B, H, D], contiguous, of q to all entries.

    q, k and v are [B, H, D], the caches [B, H, S, D]. Entry `lengths[b]` of sequence b is overwritten by its k and v,
    and its query attends to entries 0 to `lengths[b]`. Lengths [B] are clamped to [0, S - 1], and not changed.
    """
    return _attend(q, k_cache, v_cache, lengths, k, v)


def _attend(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, lengths: torch.Tensor,
    k: torch.Tensor | None, v: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Return the attention out [B, H, D], contiguous, of one query per sequence to its cache.

    q is [B, H, D], and the caches are [B, H, S, D]. If k and v are None, the query attends to the first `lengths` [B]
    entries. Otherwise k and v [B, H, D] first overwrite entry `lengths[b]` in place, and the query attends to it too.
    Lengths are clamped to [0, S], or to [0, S - 1] with k and v. A sequence without entries gets 0.
    """
    B, H, D = q.shape
    S = k_cache.shape[2]
    # Triton's interpreter (as of 3.9) truncates to bfloat16 where a GPU rounds. There `out` is float32, and PyTorch
    # rounds it at the end.
    dtype = torch.float32 if triton.knobs.runtime.interpret else q.dtype
    out = torch.empty((B, H, D), dtype=dtype, device=q.device)
    if out.numel() == 0:
        return out.to(q.dtype)
    BLOCK_D = next_power_of_2(D)
    launch = config(BLOCK_D, q.device)
    lengths = lengths.contiguous()
    splits = cdiv(S, launch.split)
    acc = torch.empty((B * H, splits, D), dtype=torch.float32, device=q.device)
    m = torch.empty((2, B * H, splits), dtype=torch.float32, device=q.device)
    if splits > 0:
        _fwd_kernel[(B * H, splits)](
            q_ptr=q, k_ptr=k_cache, v_ptr=v_cache, lengths_ptr=lengths, acc_ptr=acc, m_ptr=m[0], l_ptr=m[1],
            stride_qb=q.stride(0), stride_qh=q.stride(1), stride_qd=q.stride(2),
            stride_kb=k_cache.stride(0), stride_kh=k_cache.stride(1), stride_kt=k_cache.stride(2),
            stride_kd=k_cache.stride(3), stride_vb=v_cache.stride(0), stride_vh=v_cache.stride(1),
            stride_vt=v_cache.stride(2), stride_vd=v_cache.stride(3),
            H=H, S=S, D=D, splits=splits, scale=D**-0.5 * LOG2E, k_new_ptr=k, v_new_ptr=v,
            **_strides("kn", k), **_strides("vn", v),
            SPLIT=launch.split, BLOCK_N=launch.keys, BLOCK_D=BLOCK_D, num_warps=launch.warps, enable_fp_fusion=True,
        )  # fmt: skip
    _add_kernel[(B * H,)](
        acc_ptr=acc, m_ptr=m[0], l_ptr=m[1], lengths_ptr=lengths, out_ptr=out, k_new_ptr=k,
        H=H, S=S, D=D, splits=splits,
        SPLIT=launch.split, ADDED=launch.added, BLOCK_D=BLOCK_D, num_warps=1, enable_fp_fusion=True,
    )  # fmt: skip
    return out.to(q.dtype)


def _strides(prefix: str, x: torch.Tensor | None) -> dict[str, int]:
    """Return the stride arguments of x [B, H, D], such as {"stride_knb": ...} for the prefix "kn"; 0 if x is None."""
    names = (f"stride_{prefix}b", f"stride_{prefix}h", f"stride_{prefix}d")
    return dict(zip(names, (0, 0, 0) if x is None else x.stride(), strict=True))
