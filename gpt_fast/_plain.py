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
    """Return a forward for the instance `module` that runs function(module, ...).

    It has the name, docstring and signature of the class's forward. The result is a partial, because pickling a
    method of an instance gives the class's method back. A deep copy of the module gets a forward of its own. The
    attribute `__func__` is `function`, because Hugging Face Accelerate wraps and unwraps the `__func__` that a method
    has.
    """
    original = type(module).forward.__get__(module)
    forward = functools.update_wrapper(functools.partial(function, module), original)
    vars(forward)["__func__"] = function
    return forward


def attach(module: nn.Module, function: Callable | None) -> None:
    """Mark `module` as changed by `gpt_fast.accelerate` and, unless `function` is None, replace its forward.

    The instance attribute `forward` is set so that a call runs function(module, ...). The mark makes a second
    `accelerate` skip the module, and lets `restore` find it. `detach` removes the mark and the forward.
    """
    vars(module)[_MARK] = function is not None
    if function is not None:
        module.forward = _bound(module, function)


def detach(module: nn.Module) -> None:
    """Undo `attach`: remove its mark and, if it set a forward, the instance attribute `forward`, even if wrapped since.

    A module without a mark of `attach` stays as it is.
    """
    if vars(module).pop(_MARK, False):
        vars(module).pop("forward", None)


def is_accelerated(module: nn.Module) -> bool:
    """Return True if `attach` was called on the module, and `detach` not since then."""
    return _MARK in vars(module)


def has_own_forward(module: nn.Module) -> bool:
    """Return True if the forward that `attach` put on `module` is in place, with nothing wrapped around it.

    The result is True as well if `attach` only marked the module. The module has to be marked (`is_accelerated`); one
    that is not raises `KeyError`.
    """
    if not vars(module)[_MARK]:
        return True  # whose forward it is, is none of ours
    return is_attached(vars(module).get("forward"))


def is_attached(forward: Any) -> bool:
    """Return True if `forward`, any object, is a forward that `attach` set to run a function of this package.

    Its attribute `__func__` has to be a function that is defined in gpt_fast, without the `__wrapped__` that decorators
    set. The result is False for a function from elsewhere, even if `attach` set it.
    """
    function = getattr(forward, "__func__", None)
    is_function = isinstance(function, types.FunctionType) and not hasattr(function, "__wrapped__")
    return is_function and function.__module__.startswith("gpt_fast.")


def original(module: Any, *args: Any, **kwargs: Any) -> Any:
    """Return the result of the forward of the module's class, whatever `attach` put on the module. No hooks run."""
    return type(module).forward(module, *args, **kwargs)


def is_hooked(module: nn.Module) -> bool:
    """Return True if calling the module runs a forward or backward hook, its own or one registered for all modules."""
    return any(len(getattr(module, name)) > 0 for name in HOOKS) or any(
        len(getattr(_module, name)) > 0 for name in _GLOBAL_HOOKS
    )


def is_hooked_itself(module: nn.Module) -> bool:
    """Return True if the module has forward or backward hooks of its own.

    Hooks registered for all modules do not count.
    """
    return any(len(getattr(module, name)) > 0 for name in HOOKS)


def class_of(module: Any) -> type:
    """Return the class of a module, or that of the module behind the proxy that `torch.export` passes in its place."""
    return type(module.get_base()) if hasattr(type(module), "get_base") else type(module)


def why_not_plain(module: Any, kind: Any) -> str | None:
    """Return why the parameters of `module` may not be read directly, such as "has hooks", or None if they may.

    They may if the module has exactly the class `kind`, no hooks, no forward set on the instance, and no weight of a
    tensor class from outside PyTorch, such as a quantised one. Hooks of forward and backward count, also if registered
    for all modules. A forward that `attach` set does not count, unless something wraps it.
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
    """Return why the parameter "weight" of `module` may not be read directly, or None if it may or if there is none.

    It may not if it is a tensor subclass from outside PyTorch, as in a quantised layer. Classes of torch.ao, PyTorch's
    quantisation, count as outside.
    """
    kind = type(module._parameters.get("weight"))
    if kind in _WEIGHTS or (kind.__module__.startswith("torch.") and not kind.__module__.startswith("torch.ao")):
        return None  # fake tensors and sharded ones are PyTorch's own
    return f"has a weight of class {kind.__module__}.{kind.__qualname__}"


def is_plain(module: Any, kind: Any) -> bool:
    """Return True if the parameters of `module` may be read directly instead of calling it.

    They may if the module has exactly the class `kind`, no hooks, no forward set on the instance except by `attach`,
    and no weight of a tensor class from outside PyTorch, such as a quantised one (see `why_not_plain`). The usual case
    takes half a microsecond.
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
    """Return why `ops.layer_norm` cannot compute `module`, such as "has hooks", or None if it can.

    It can if the module is a plain LayerNorm of the class `kind` (see `why_not_plain`), normalises over the last
    dimension only, and has an eps above 0.
    """
    reason = None if is_plain(module, kind) else why_not_plain(module, kind)
    if reason is None and (len(module.normalized_shape) != 1 or not module.eps > 0):
        return f"normalises over {list(module.normalized_shape)} with eps {module.eps}"
    return reason


def why_no_table(module: Any) -> str | None:
    """Return why a look-up of rows in its weight cannot replace `module`, such as "has hooks", or None if it can.

    It can if the module is a plain `nn.Embedding` (see `why_not_plain`), and its options `padding_idx`, `max_norm`,
    `scale_grad_by_freq` and `sparse` are off.
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
    """Return (y, p): the input of the dropout that the caller still has to apply, and its probability.

    A plain `nn.Dropout` (see `is_plain`) with p < 1 is not called, so that the caller can fuse it. The result is then
    (x, module.p), or (x, 0) in evaluation mode or if `drops` is False. Callers pass False to continue a text from a
    cache, where nothing is dropped even in training mode. Any other `module` is called, and the result is (module(x),
    0); `drops` then has no effect.
    """
    if is_plain(module, nn.Dropout) and module.p < 1:
        return x, module.p if drops and module.training else 0.0
    return module(x), 0.0


def linear(module: Any, x: Tensor) -> Tensor:
    """Return module(x), by `ops.linear` if the module is exactly an `nn.Linear`, without hooks (see `is_plain`)."""
    return ops.linear(x, module.weight, module.bias) if is_plain(module, nn.Linear) else module(x)


def norm(module: Any, x: Tensor, kind: type[nn.LayerNorm] = nn.LayerNorm, product: bool = False) -> Tensor:
    """Return module(x), by `ops.layer_norm` if `module` is a plain norm of the class `kind` (see `why_no_norm`).

    `product` is True if only a matrix product reads the result. Under autocast, a plain norm then rounds a float32
    result at once to the dtype of that product. Any other module is called.
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

    `module` is the norm, and `kind` the class of a plain one (see `why_no_norm`); any other is called. Dropout has
    probability `p`. `seed`, one int64 element, and `site`, the number of this dropout within a forward pass, choose its
    mask. `product` is True if only a matrix product reads the first result. Under autocast, a plain norm then rounds a
    float32 result at once to the dtype of that product.
    """
    if why_no_norm(module, kind) is None:
        dtype = _library.product_dtype(x, torch.promote_types(x.dtype, branch.dtype)) if product else None
        return ops.add_layer_norm(branch, x, module.weight, module.bias, module.eps, p, seed, site, _normed_dtype=dtype)
    summed = add(branch, x, p, seed, site)
    return module(summed), summed


def add(branch: Tensor, x: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
    """Return x + dropout(branch), with dropout probability `p`; 0 means no dropout.

    `seed`, one int64 element, and `site`, the number of this dropout within a forward pass, choose the mask. If p is
    above 0 and `seed` is None, a new seed is drawn.
    """
    if p == 0:
        return x + branch
    return ops.add_layer_norm(branch, x, dropout_p=p, seed=seed, site=site)[1]


def is_reading_values_cheap(tensor: Tensor) -> bool:
    """Return True if Python may read the tensor's values without waiting for a device or breaking a graph or a `vmap`.

    That is, the tensor is on the CPU, no graph is being recorded (compiled, exported, traced), and no `vmap` hides
    values.
    """
    return tensor.device.type == "cpu" and not _transforms.is_recording() and not _transforms.is_batched(tensor)


def version(tensor: Tensor) -> int:
    """Return autograd's count of in-place writes to `tensor`. It is 0 for an inference tensor, which has no count."""
    return 0 if tensor.is_inference() else tensor._version


def samples(tensors: Sequence[Tensor]) -> Tensor:
    """Return up to 31 evenly spaced values of each tensor, in order, joined into one float64 vector.

    Callers compare two results to find out whether weights were changed in between. Autograd's count of in-place writes
    (see `version`) does not suffice: writes of fused optimisers (torch 2.13) and assignments to `.data` do not raise
    it. A change of other values than the samples stays unseen. NaN is replaced by 0. `tensors` may not be empty.
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
        """Return True if neither write counts nor sampled values of the tensors differ from those at construction.

        With `reads_values=False` only write counts are compared. The same holds if a tensor was on meta, or a transform
        of `torch.func` was active, at construction. Reading values of GPU tensors waits for the device.
        """
        if [version(tensor) for tensor in self._tensors] != self._versions:
            return False
        return not reads_values or self._samples is None or torch.equal(samples(self._tensors), self._samples)
