"""`torch.nn.functional.scaled_dot_product_attention` on this library's kernels, for models that call it.

    from gpt_fast.integrations import sdpa
    sdpa.register()                                              # makes the name known to PyTorch
    torch.nn.attention.activate_flash_attention_impl("gpt_fast")  # or sdpa.activate(), which does both
    ...
    print(sdpa.report())
    torch.nn.attention.restore_flash_attention_impl()            # or sdpa.restore()

`activate` registers a kernel of `aten::scaled_dot_product_attention` itself, for CPU and CUDA tensors: PyTorch's flash
interface has no masks, and on a CPU no dropout and no seed. Eager calls and functions that are compiled afterwards
reach the kernel. It hands calls that it does not serve to PyTorch's own implementation and counts them.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.compiler.config as compiler_config
import torch.nn.attention as torch_attention
from torch import Tensor

from .. import _plain, _transforms, ops
from ..ops.attention import MAX_HEAD_DIM

NAME = "gpt_fast"
_KEYS = ("AutogradCPU", "AutogradCUDA", "CPU", "CUDA")
# PyTorch 2.10 can register an implementation and not take it back.
_HAS_REGISTRY = hasattr(torch_attention, "restore_flash_attention_impl")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_OPERATOR = torch.ops.aten.scaled_dot_product_attention.default
_CACHE_TAG = "+gpt_fast.sdpa"


@dataclass
class Calls:
    """Counts of the calls since `activate`. Compiled calls count when they are traced.

    Attributes:
        served: Calls that a kernel of this library answered.
        returned: Calls that went to PyTorch, by reason.
    """

    served: int = 0
    returned: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"gpt_fast: {self.served} calls of scaled_dot_product_attention served"]
        return "\n".join(lines + [f"  {count} to PyTorch: {reason}" for reason, count in self.returned.items()])


class _Handle:
    """Registration of the kernels. PyTorch's registry calls `remove` to undo it."""

    def __init__(self) -> None:
        self.library = torch.library.Library("aten", "IMPL")
        for key in _KEYS:
            self.library.impl("scaled_dot_product_attention", _kernel, key)
        # The graph that a call compiles to differs, but the key of torch.compile's cache on disk would be the same.
        compiler_config.cache_key_tag += _CACHE_TAG
        _forget_dispatch()

    def remove(self) -> None:
        """Unregister the kernels, drop the counts, and restore PyTorch's dispatch and `torch.compile`'s cache tag."""
        _ACTIVE.clear()
        self.library._destroy()
        compiler_config.cache_key_tag = compiler_config.cache_key_tag.replace(_CACHE_TAG, "")
        _forget_dispatch()


def _forget_dispatch() -> None:
    """Clear PyTorch's cache of the kernels of `aten::scaled_dot_product_attention`.

    The first trace in a process fills it, and later traces use it.
    """
    _OPERATOR._dispatch_cache.clear()


_ACTIVE: list[tuple[_Handle, Calls]] = []  # none or one; a module's state because the dispatcher's is the process's


def register() -> None:
    """Add the name "gpt_fast" to PyTorch's registry of flash attention implementations. Nothing else changes yet.

    Raises:
        RuntimeError: PyTorch has no such registry, or one that cannot restore the implementation that was replaced.
            `activate` and `restore` work with such a PyTorch as well.

    Example:
        ```python
        import torch
        from gpt_fast.integrations import sdpa

        sdpa.register()
        torch.nn.attention.activate_flash_attention_impl("gpt_fast")
        torch.nn.attention.restore_flash_attention_impl()
        ```
    """
    if not _HAS_REGISTRY:
        raise RuntimeError(
            f"sdpa.register: torch {torch.__version__} has no registry that restores; expected 2.11 or later"
        )
    torch_attention.register_flash_attention_impl(NAME, register_fn=_activate)


def activate() -> None:
    """Let this library's kernels compute `scaled_dot_product_attention` from now on, in the whole process.

    An implementation that was active before is replaced. Calls that the kernels do not support go to PyTorch.

    Example:
        ```python
        import torch
        from torch.nn.functional import scaled_dot_product_attention
        from gpt_fast.integrations import sdpa

        sdpa.activate()
        q, k, v = (torch.randn(2, 4, 100, 64) for _ in range(3))
        scaled_dot_product_attention(q, k, v, is_causal=True)
        print(sdpa.report().served)  # 1
        sdpa.restore()
        ```

    Note:
        A function that is compiled before `activate` or before `restore` keeps the kernels it was compiled with. Call
        `torch.compiler.reset()` to compile such functions anew. While this implementation is active,
        `torch.compiler.config.cache_key_tag` ends in "+gpt_fast.sdpa", which keeps its graphs apart in torch.compile's
        cache on disk. Set a tag of your own before `activate`, because a later one overwrites this ending.
    """
    if not _HAS_REGISTRY:
        restore()
        _activate()
        return
    register()
    torch_attention.activate_flash_attention_impl(NAME)


def restore() -> None:
    """Give `scaled_dot_product_attention` back to PyTorch. There is no effect unless `activate` is in effect.

    The counts of `report` are dropped.

    Example:
        ```python
        from gpt_fast.integrations import sdpa

        sdpa.activate()
        sdpa.restore()
        ```
    """
    if _ACTIVE and _HAS_REGISTRY:
        torch_attention.restore_flash_attention_impl()
    elif _ACTIVE:
        _ACTIVE[0][0].remove()


def report() -> Calls:
    """Return the counts of the calls since `activate`.

    Returns:
        `Calls` with `served`, the calls that a kernel answered, and `returned`, the calls that went to PyTorch, by
        reason. Compiled calls count when they are traced.

    Raises:
        RuntimeError: This implementation is not active.

    Example:
        ```python
        from gpt_fast.integrations import sdpa

        sdpa.activate()
        print(sdpa.report().served)  # 0
        sdpa.restore()
        ```
    """
    if not _ACTIVE:
        raise RuntimeError('sdpa.report: "gpt_fast" is not active; expected sdpa.activate() before')
    return _ACTIVE[0][1]


def _activate() -> _Handle:
    """Register the kernels in the whole process and start new counts. Return the handle whose `remove` undoes both."""
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
    """Return scaled dot-product attention, by `ops.attention` where it supports the call, else by PyTorch's own code.

    The parameters have the meaning that they have in `torch.nn.functional.scaled_dot_product_attention`. The call is
    counted in the active `Calls`: as served, or under the reason why PyTorch's code runs.
    """
    counts = _ACTIVE[0][1]
    reason = _why_not(query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if reason is None:
        mask = attn_mask if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask == 0
        out = ops.attention(query, key, value, causal=is_causal, mask=mask, dropout_p=dropout_p, scale=scale)
        counts.served += 1
        return out
    counts.returned[reason] += 1
    return _OPERATOR.decompose(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)


def _why_not(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, is_causal: bool, scale: float | None,
    enable_gqa: bool,
) -> str | None:  # fmt: skip
    """Return why the kernel does not support a call, or None if it does. A call with a reason goes to PyTorch.

    The parameters are those of `scaled_dot_product_attention`: q is the query, k the key, v the value. The kernel takes
    [B, H, T, D] of one device and dtype (float32, bfloat16, float16), with as many heads of keys as of queries, and D
    from 1 to 256. It takes `is_causal` only without a mask and with as many keys as queries. It does not run inside
    transforms of `torch.func`, in forward mode, or while flash attention is switched off. PyTorch raises the errors of
    invalid calls.
    """
    if _transforms.is_transformed():
        return "inside torch.func's transforms"  # which have been through their own dispatch here
    if _transforms.is_forward_mode():
        return "in forward mode"
    if not torch.backends.cuda.flash_sdp_enabled():  # the switch of every device, whatever its name
        return "flash attention is switched off, as by torch.nn.attention.sdpa_kernel"
    if q.is_nested or q.dim() != 4 or k.dim() != 4 or v.dim() != 4:
        return "shapes other than [B, H, T, D]"
    if q.dtype not in _DTYPES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"dtype {q.dtype}" if q.dtype not in _DTYPES else "unlike dtypes"
    if any(tensor is not None and tensor.device != q.device for tensor in (k, v, mask)):
        return "unlike devices"
    if enable_gqa and q.shape[1] != k.shape[1]:
        return "fewer heads of keys than of queries"
    if q.shape[:2] != k.shape[:2] or k.shape != v.shape or q.shape[3] != k.shape[3]:
        return "unlike shapes"
    if not 1 <= q.shape[3] <= MAX_HEAD_DIM:
        return f"heads wider than {MAX_HEAD_DIM}"
    if is_causal and (mask is not None or q.shape[2] != k.shape[2]):
        return "causal with another mask, or with other keys than queries"
    if not 0 <= dropout_p < 1:
        return f"dropout_p {dropout_p}"
    if scale is not None and not -math.inf < scale < math.inf:  # isfinite takes no symbol
        return f"scale {scale}"
    return None if mask is None else _why_not_mask(q, k, mask)


def _why_not_mask(q: Tensor, k: Tensor, mask: Tensor) -> str | None:
    """Return why the kernel does not support `mask` with query `q` and key `k`, or None if it does.

    The kernel takes bool masks of 2 to 4 dimensions that broadcast to [B, H, T, S]. A float mask, which is added to the
    scores, counts as a bool mask if it holds 0 and -inf alone. This is read from its values, so it has to be on the
    CPU, outside of a graph, and without a gradient. Its dtype has to be float32 or that of `q`.
    """
    whole = (*q.shape[:3], k.shape[2])  # [B, H, T, S]
    if not 2 <= mask.dim() <= 4 or any(
        size not in (1, full) for size, full in zip(mask.shape[::-1], whole[::-1], strict=False)
    ):
        return "a mask that does not broadcast to [B, H, T, S]"
    if mask.dtype == torch.bool:
        return None
    if mask.dtype not in (torch.float32, q.dtype):
        return f"a mask of dtype {mask.dtype}"
    if mask.requires_grad:
        return "a float mask that requires a gradient"
    if type(mask) is not Tensor or not _plain.is_reading_values_cheap(mask):  # a traced mask is of another type
        return "a float mask whose values cannot be read: compiled, or on CUDA"
    if not bool(((mask == 0) | (mask == -math.inf)).all()):
        return "a float mask with other values than 0 and -inf"
    return None
