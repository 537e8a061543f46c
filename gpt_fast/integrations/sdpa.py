"""`torch.nn.functional.scaled_dot_product_attention` on this library's kernels, for models that call it.

    from gpt_fast.integrations import sdpa
    sdpa.register()                                              # makes the name known to PyTorch
    torch.nn.attention.activate_flash_attention_impl("gpt_fast")  # or sdpa.activate(), which does both
    ...
    print(sdpa.report())
    torch.nn.attention.restore_flash_attention_impl()            # or sdpa.restore()

What is activated is a kernel of `aten::scaled_dot_product_attention` itself, for CPU and CUDA tensors: PyTorch's flash
interface has no masks, and on a CPU no dropout and no seed. Eager and compiled calls reach it. A call it does not serve
goes on to PyTorch's own implementation and is counted.
"""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.attention as torch_attention
from torch import Tensor

from .. import _transforms, ops
from ..ops.attention import MAX_HEAD_DIM

NAME = "gpt_fast"
_KEYS = ("AutogradCPU", "AutogradCUDA", "CPU", "CUDA")
# PyTorch 2.10 can register an implementation and not take it back.
_HAS_REGISTRY = hasattr(torch_attention, "restore_flash_attention_impl")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass
class Calls:
    """How many calls were served since `activate`, and why others went to PyTorch; compiled calls count when traced."""

    served: int = 0
    returned: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"gpt_fast: {self.served} calls of scaled_dot_product_attention served"]
        return "\n".join(lines + [f"  {count} to PyTorch: {reason}" for reason, count in self.returned.items()])


class _Handle:
    """The kernels while they are registered; PyTorch's registry calls `remove`."""

    def __init__(self) -> None:
        self.library = torch.library.Library("aten", "IMPL")
        for key in _KEYS:
            self.library.impl("scaled_dot_product_attention", _kernel, key)

    def remove(self) -> None:
        _ACTIVE.clear()
        self.library._destroy()


_ACTIVE: list[tuple[_Handle, Calls]] = []  # none or one; a module's state because the dispatcher's is the process's


def register() -> None:
    """Tell PyTorch's registry of flash attention implementations that there is a "gpt_fast"; nothing changes yet.

    Raises `RuntimeError` where PyTorch has no such registry, or none that gives back what it replaced; `activate` and
    `restore` work there as well.
    """
    if not _HAS_REGISTRY:
        raise RuntimeError(
            f"sdpa.register: torch {torch.__version__} has no registry that restores, wanted 2.11 or later"
        )
    torch_attention.register_flash_attention_impl(NAME, register_fn=_activate)


def activate() -> None:
    """Serve `scaled_dot_product_attention` from now on, in the whole process, in place of what was active before."""
    if not _HAS_REGISTRY:
        restore()
        _activate()
        return
    register()
    torch_attention.activate_flash_attention_impl(NAME)


def restore() -> None:
    """Give `scaled_dot_product_attention` back to PyTorch; without effect where another implementation is active."""
    if _ACTIVE and _HAS_REGISTRY:
        torch_attention.restore_flash_attention_impl()
    elif _ACTIVE:
        _ACTIVE[0][0].remove()


def report() -> Calls:
    """What happened since `activate`.

    `served` counts the calls that a kernel answered, `returned`, by their reasons, those that went to PyTorch; compiled
    calls count when they are traced. Raises `RuntimeError` where this implementation is not active.
    """
    if not _ACTIVE:
        raise RuntimeError('sdpa.report: "gpt_fast" is not active, wanted sdpa.activate() before')
    return _ACTIVE[0][1]


def _activate() -> _Handle:
    handle = _Handle()
    _ACTIVE.append((handle, Calls()))
    return handle


def _kernel(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    counts = _ACTIVE[0][1]
    reason = _why_not(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    if reason is None:
        counts.served += 1
        return ops.attention(query, key, value, causal=is_causal, mask=attn_mask, dropout_p=dropout_p, scale=scale)
    counts.returned[reason] += 1
    return torch.ops.aten.scaled_dot_product_attention.default.decompose(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, enable_gqa: bool
) -> str | None:
    """Why a call goes to PyTorch, or None; whatever is wrong with it is for PyTorch to say."""
    if _transforms.is_transformed():
        return "inside torch.func's transforms"  # which have been through their own dispatch here
    if q.is_nested or q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return "shapes other than [B, H, T, D]"
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtype {q.dtype}" if q.dtype not in _DTYPES else "unlike dtypes"
    if enable_gqa and q.shape[1] != k.shape[1]:
        return "fewer heads of keys than of queries"
    if q.shape[:2] != k.shape[:2] or k.shape != v.shape or q.shape[3] != k.shape[3]:
        return "unlike shapes"
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        return f"heads wider than {MAX_HEAD_DIM}"
    if mask is not None and (mask.dtype != torch.bool or mask.dim() > 4):
        return "a mask that is not bool"
    if is_causal and (mask is not None or q.shape[2] != k.shape[2]):
        return "causal with another mask, or with other keys than queries"
    if not 0 <= dropout_p < 1:
        return f"dropout_p {dropout_p}"
    return None
