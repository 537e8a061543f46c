"""Fused pieces over modules, for this library's models and for models that are accelerated in place.

A module is plain if it is exactly the class it is taken for and nothing hangs on it. Fused ops read the parameters of
plain modules directly. Any other module (with hooks, inside an adapter, parametrised, quantised) is called.
"""

import functools
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules import module as _module

from . import _transforms, ops
from .ops import _library

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(f"_global{name}" for name in HOOKS)  # of torch.nn.modules.module, for every module
_MARK = "_gpt_fast_forward"  # the instance attribute that tells an accelerated module


def _bound(module: nn.Module, function: Callable) -> Callable:
    """Return `function` as the forward of `module`, with the signature of its class's forward.

    A call of the result is function(module, ...). The result is a partial, because pickling a method of an instance
    gives the class's method back. A deep copy of the module gets a forward of its own. The attribute `__func__` is
    `function`, because Hugging Face Accelerate wraps and unwraps the `__func__` that a method has.
    """
    original = type(module).forward.__get__(module)
    forward = functools.update_wrapper(functools.partial(function, module), original)
    vars(forward)["__func__"] = function
    return forward


def attach(module: nn.Module, function: Callable | None) -> None:
    """Make calls of `module` run function(module, ...), or only mark it as accelerated if `function` is None.

    The module's class does not change. `detach` undoes it.
    """
    vars(module)[_MARK] = function is not None
    if function is not None:
        module.forward = _bound(module, function)


def detach(module: nn.Module) -> None:
    """Undo `attach`. A module without a mark of `attach` stays as it is."""
    if vars(module).pop(_MARK, False):
        vars(module).pop("forward", None)


def is_accelerated(module: nn.Module) -> bool:
    """Return True if `attach` was called on the module, and `detach` not since then."""
    return _MARK in vars(module)


def has_own_forward(module: nn.Module) -> bool:
    """Return True if the forward that `attach` put on `module` is in place, with nothing wrapped around it.

    The result is True as well if `attach` put no forward on the module.
    """
    if not vars(module)[_MARK]:
        return True  # whose forward it is, is none of ours
    return is_attached(vars(module).get("forward"))


def is_attached(forward: Any) -> bool:
    """Return True if `forward` is what `attach` puts on a module, with nothing wrapped around it.

    `attach` puts a function of this library on the module, in the attribute `__func__` of the forward.
    """
    function = getattr(forward, "__func__", None)
    is_function = isinstance(function, types.FunctionType) and not hasattr(function, "__wrapped__")
    return is_function and function.__module__.startswith("gpt_fast.")


def original(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the result of the forward of the module's class, whatever `attach` put on the module."""
    return type(module).forward(module, *args, **kwargs)


def is_hooked(module: nn.Module) -> bool:
    """Return True if calling the module runs a hook: one of its own, or one that is registered for all modules."""
    return any(len(getattr(module, name)) > 0 for name in HOOKS) or any(
        len(getattr(_module, name)) > 0 for name in _GLOBAL_HOOKS
    )


def is_hooked_itself(module: nn.Module) -> bool:
    """Return True if the module has hooks of its own; those that are registered for all modules do not count."""
    return any(len(getattr(module, name)) > 0 for name in HOOKS)


def class_of(module: Any) -> type:
    """Return the class of a module, also of one for which `torch.export` passes a proxy."""
    return type(module.get_base()) if hasattr(type(module), "get_base") else type(module)


def why_not_plain(module: Any, kind: Any) -> str | None:
    """Return why the parameters of `module` may not be read directly, or None if they may.

    They may if the module has exactly the class `kind`, no hooks, no forward of its own, and no weight of a foreign
    class.
    """
    if class_of(module) is not kind:
        return f"is a {type(module).__module__}.{type(module).__qualname__}, not {kind.__name__}"
    if "forward" in vars(module) and not (is_accelerated(module) and has_own_forward(module)):
        return "has a forward of its own"
    if is_hooked(module):
        return "has hooks"
    return why_own_weight(module)


# Types of a weight that is read directly; a subclass of somebody else's may compute products in its own way.
_WEIGHTS = (nn.Parameter, Tensor, type(None))


def why_own_weight(module: Any) -> str | None:
    """Return why the weight of `module` may not be read directly, or None if it may or if there is none.

    It may not if its tensor class is neither `nn.Parameter` nor another one of PyTorch's, as in a quantised layer.
    """
    kind = type(module._parameters.get("weight"))
    if kind in _WEIGHTS or (kind.__module__.startswith("torch.") and not kind.__module__.startswith("torch.ao")):
        return None  # fake tensors and sharded ones are PyTorch's own
    return f"has a weight of class {kind.__module__}.{kind.__qualname__}"


def is_plain(module: Any, kind: Any) -> bool:
    """Return True if the parameters of `module` may be read directly instead of calling it.

    They may if the module has exactly the class `kind`, no hooks, and no forward or weight of its own; see
    `why_not_plain`. The usual case takes half a microsecond.
    """
    if (
        type(module) is kind
        and type(module._parameters.get("weight")) in _WEIGHTS
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (_module._global_forward_hooks or _module._global_forward_pre_hooks)
        and not (_module._global_backward_hooks or _module._global_backward_pre_hooks)
        and "forward" not in module.__dict__
    ):
        return True
    return why_not_plain(module, kind) is None


def why_no_norm(module: Any, kind: type[nn.LayerNorm] = nn.LayerNorm) -> str | None:
    """Return why `ops.layer_norm` cannot compute `module`, or None if it is a plain LayerNorm of the last dimension.

    A plain module has exactly the class `kind`, no hooks, and no forward or weight of its own.
    """
    reason = None if is_plain(module, kind) else why_not_plain(module, kind)
    if reason is None and (len(module.normalized_shape) != 1 or not module.eps > 0):
        return f"normalises over {list(module.normalized_shape)} with eps {module.eps}"
    return reason


def why_no_table(module: Any) -> str | None:
    """Return why `module` is more than an `nn.Embedding` that returns rows of its weight, or None if it is not.

    Reasons are hooks, another class, and the options `padding_idx`, `max_norm`, `scale_grad_by_freq` and `sparse`.
    """
    reason = None if is_plain(module, nn.Embedding) else why_not_plain(module, nn.Embedding)
    if reason is not None:
        return reason
    options = {
        "padding_idx": module.padding_idx is not None,
        "max_norm": module.max_norm is not None,
        "scale_grad_by_freq": module.scale_grad_by_freq,
        "sparse": module.sparse,
    }
    used = [name for name, there in options.items() if there]
    return f"uses {', '.join(used)}" if used else None


def dropout(module: Any, x: Tensor, drops: bool = True) -> tuple[Tensor, float]:
    """Return (x, p), with the dropout probability p that the caller still has to apply to x.

    A plain `nn.Dropout` (see `is_plain`) with p < 1 is not called, so that the caller can fuse it. The result's p is
    then its probability, or 0 in evaluation mode or with `drops=False`. Any other module is called, and p is 0.
    """
    if is_plain(module, nn.Dropout) and module.p < 1:
        return x, module.p if drops and module.training else 0.0
    return module(x), 0.0


def linear(module: Any, x: Tensor) -> Tensor:
    """Return module(x), by `ops.linear` if the module is an `nn.Linear` without hooks (see `is_plain`)."""
    return ops.linear(x, module.weight, module.bias) if is_plain(module, nn.Linear) else module(x)


def norm(module: Any, x: Tensor, kind: type[nn.LayerNorm] = nn.LayerNorm, product: bool = False) -> Tensor:
    """Return module(x), by `ops.layer_norm` if `module` is a plain norm of the class `kind` (see `why_no_norm`).

    `product` is True if only a matrix product reads the result. A plain norm then rounds to that product's dtype at
    once.
    """
    if why_no_norm(module, kind) is not None:
        return module(x)
    dtype = _library.product_dtype(x, x.dtype) if product else None
    return ops.layer_norm(x, module.weight, module.bias, module.eps, _y_dtype=dtype)


def add_norm(
    branch: Tensor,
    x: Tensor,
    p: float,
    module: Any,
    seed: Tensor | None,
    site: int,
    kind: type[nn.LayerNorm] = nn.LayerNorm,
    product: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return (norm(x + dropout(branch)), x + dropout(branch)), by one op if the norm is plain.

    `module` is the norm, and `kind` the class of a plain one (see `why_no_norm`). Dropout has probability `p`. `seed`
    and `site`, the number of this dropout within a forward pass, choose its mask. `product` is True if only a matrix
    product reads the first result. A plain norm then rounds to that product's dtype at once.
    """
    if why_no_norm(module, kind) is None:
        dtype = _library.product_dtype(x, torch.promote_types(x.dtype, branch.dtype)) if product else None
        return ops.add_layer_norm(branch, x, module.weight, module.bias, module.eps, p, seed, site, _normed_dtype=dtype)
    summed = add(branch, x, p, seed, site)
    return module(summed), summed


def add(branch: Tensor, x: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
    """Return x + dropout(branch), with dropout probability `p`.

    `seed` and `site`, the number of this dropout within a forward pass, choose the mask.
    """
    if p == 0:
        return x + branch
    return ops.add_layer_norm(branch, x, dropout_p=p, seed=seed, site=site)[1]


def is_reading_values_cheap(tensor: Tensor) -> bool:
    """Return True if reading a tensor's values neither waits for a device nor breaks a graph or a `vmap`."""
    return tensor.device.type == "cpu" and not _transforms.is_recording() and not _transforms.is_batched(tensor)


def version(tensor: Tensor) -> int:
    """Return autograd's count of in-place writes to `tensor`. It is 0 for an inference tensor, which has no count."""
    return 0 if tensor.is_inference() else tensor._version


def samples(tensors: Sequence[Tensor]) -> Tensor:
    """Return up to 31 evenly spaced values of each tensor, joined into one float64 vector without NaN.

    They show writes that autograd does not count: those of fused optimisers (torch 2.13), and those to `.data`.
    """
    few = [t.detach().flatten()[:: max(1, t.numel() // 16)].double() for t in tensors]
    return torch.cat(few).nan_to_num()


class Unchanged:
    """Callable that tells whether tensors still hold the values that they held at construction.

    It compares autograd's write counts, and a sample of values, because some writes are not counted.
    """

    def __init__(self, tensors: Sequence[Tensor]):
        self._tensors = list(tensors)
        self._versions = [version(tensor) for tensor in tensors]
        has_values = not _transforms.is_transformed() and not any(tensor.is_meta for tensor in tensors)
        self._samples = samples(tensors) if has_values else None

    def __call__(self, reads_values: bool = True) -> bool:
        """Return True if the tensors did not change. Without `reads_values`, compare write counts alone.

        Reading values of GPU tensors waits for the device.
        """
        if [version(tensor) for tensor in self._tensors] != self._versions:
            return False
        return not reads_values or self._samples is None or torch.equal(samples(self._tensors), self._samples)
