"""Logits that are computed when code reads them, so that the loss may be computed without them.

A hand-written model computes its loss in code that stays as it is. Its output layer returns `Logits`. `F.cross_entropy`
takes their hidden states and the weight instead. For all other code they are the tensor.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ... import _plain, _transforms, ops
from ...config import IGNORE


class Deferred(Tensor):
    """Tensor whose values are computed by `compute` when they are first read.

    `compute` runs in the gradient and inference mode and under the autocast of the moment in which the tensor was made.
    """

    _compute: Callable[[], Tensor]
    _value: Tensor | None
    _modes: tuple

    @staticmethod
    def make(kind: type["Deferred"], shape: torch.Size, like: Tensor, compute: Callable[[], Tensor]) -> "Deferred":
        """Return a deferred tensor of class `kind` with this shape, and with the dtype and device of `like`.

        `compute` returns the values. It is called when code reads them for the first time, in the gradient mode,
        inference mode and autocast of this call of `make`.
        """
        made = Tensor._make_wrapper_subclass(kind, shape, dtype=like.dtype, device=like.device)
        made._compute, made._value = compute, None
        device = like.device.type
        autocast = not like.is_meta and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else None
        made._modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), device, autocast, dtype)
        return made

    def value(self) -> Tensor:
        """Return the values as an ordinary tensor. The first call computes them, later ones return the same tensor."""
        if self._value is None:
            grad, inference, device, autocast, dtype = self._modes
            with (
                torch.inference_mode(inference),
                torch.set_grad_enabled(grad and not inference),
                torch.autocast(device if device != "meta" else "cpu", enabled=autocast, dtype=dtype),
            ):
                self._value = self._compute()
            del self._compute
        return self._value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Return func(*args, **kwargs), with the values of deferred tensors in their place where they are needed.

        They are not needed if `func` asks for shape, dtype or device. Deferred logits that have not been computed also
        stay deferred if `func` reshapes them or is `F.cross_entropy`.
        """
        if func in _SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        for handle in (_as_rows, _as_loss):
            result = handle(func, args, kwargs or {})
            if result is not NotImplemented:
                return result
        return func(*_values(args), **_values(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return func(*_values(args), **_values(kwargs or {}))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.value().__reduce_ex__(protocol)


_T: Any = Tensor  # whose attributes are descriptors, which stubs do not know
# Properties of a deferred tensor that need no computation.
_SHAPES = {
    _T.size, _T.dim, _T.numel, _T.__len__, _T.is_floating_point,
    *(getattr(_T, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "is_meta")),
}  # fmt: skip


def _values(tree: Any) -> Any:
    """Return `tree`, nested lists, tuples and dicts of arguments, with the values in place of `Deferred` tensors.

    The containers are copied. Subclasses of list and tuple are returned as they are.
    """
    if isinstance(tree, Deferred):
        return tree.value()
    if isinstance(tree, dict):
        return {key: _values(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_values(value) for value in tree)
    return tree


def value(x: Any) -> Any:
    """Return the values of `x`, an ordinary tensor, if it is a `Deferred` tensor, else `x` itself."""
    return x.value() if isinstance(x, Deferred) else x


# ---- logits that the loss computes -----------------------------------------------------------------------------------


class Logits(Deferred):
    """Deferred logits hidden weightᵀ + bias. A cross-entropy that follows is computed without storing them."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    base: "Logits | None"  # the logits that these are another shape of
    unchanged: Callable[[bool], bool]


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return the logits hidden weightᵀ + bias [..., V], as `Logits` that are computed when code reads them.

    They are computed at once, as an ordinary tensor, if gradients are off, while a graph is recorded, inside transforms
    of `torch.func`, and inside activation checkpointing. Reading raises `RuntimeError` if hidden states, weight or bias
    changed after this call.
    """
    if not _may_defer():
        return F.linear(hidden, weight, bias)
    unchanged = _plain.Unchanged([weight] if bias is None else [weight, bias])
    version = _plain.version(hidden)

    def is_as_it_was(reads_values: bool) -> bool:
        """Return True if the enclosing call's hidden states, weight and bias did not change since then.

        Compare autograd's counts of in-place writes and, if `reads_values`, a sample of the weights' values.
        """
        return _plain.version(hidden) == version and unchanged(reads_values)

    def compute() -> Tensor:
        _check(is_as_it_was(True))
        return F.linear(hidden, weight, bias)

    shape = torch.Size([*hidden.shape[:-1], weight.shape[0]])
    like = hidden
    if torch.is_autocast_enabled(hidden.device.type):
        like = hidden.new_empty(0, dtype=torch.get_autocast_dtype(hidden.device.type))
    made: Any = _Linked.apply(hidden, weight, bias, lambda: Deferred.make(Logits, shape, like, compute))
    made.hidden, made.weight, made.bias, made.base, made.unchanged = hidden, weight, bias, None, is_as_it_was
    return made


def _check(unchanged: bool) -> None:
    """Raise `RuntimeError` if `unchanged` is False: deferred logits need the weights and hidden states as they were."""
    if not unchanged:
        raise RuntimeError(
            "gpt_fast.accelerate: logits has weights or hidden states that changed after the pass; expected them as in "
            "the pass: read logits before the update"
        )


class _Linked(torch.autograd.Function):
    """Link of deferred logits to autograd's graph, for C++ code and autograd functions, which do not ask for values.

    The sink of DistributedDataParallel is such a function. Code that computes the values gets a graph of its own.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, make: Callable[[], Tensor]) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        with torch.enable_grad():  # the mode in which the value will be computed
            return make()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        hidden, weight = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        dy = value(grads[0]).to(weight.dtype)
        rows = dy.flatten(0, -2)
        return (
            (dy @ weight).to(hidden.dtype) if needs_hidden else None,
            rows.t() @ hidden.flatten(0, -2).to(dy.dtype) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
            None,
        )


_RESHAPES = {Tensor.view, Tensor.reshape, Tensor.flatten, torch.flatten, torch.reshape, Tensor.contiguous}


def _as_rows(func: Any, args: tuple, kwargs: dict) -> Any:
    """Return deferred logits in another shape, or `NotImplemented` if the call needs the values.

    `func` is a function that PyTorch was called with, and `args` and `kwargs` are its arguments. The result is deferred
    if `func` is view, reshape, flatten or contiguous, and args[0] are logits whose values are not computed yet. The new
    shape has to keep the last dimension, the vocabulary.
    """
    source = args[0] if args else None
    if func not in _RESHAPES or not isinstance(source, Logits) or _is_computed(source):
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        try:
            shape = func(torch.empty(source.shape, device="meta"), *args[1:], **kwargs).shape
        except (RuntimeError, TypeError):
            return NotImplemented  # the value raises it again
    V = source.weight.shape[0]
    if len(shape) == 0 or shape[-1] != V:
        return NotImplemented
    hidden = source.hidden.reshape(*shape[:-1], source.hidden.shape[-1])

    def make() -> Tensor:
        return Deferred.make(Logits, shape, source, lambda: source.value().reshape(shape))

    made: Any = _Linked.apply(hidden, source.weight, source.bias, make)
    made.hidden, made.weight, made.bias = hidden, source.weight, source.bias
    made.base, made.unchanged = source, source.unchanged
    return made


def _is_computed(logits: Logits | None) -> bool:
    """Return True if the values of `logits`, or of the logits that they were reshaped from, are computed already.

    Code may have written into computed values, so the loss has to read them. The result is False for None.
    """
    while logits is not None:
        if logits._value is not None:
            return True
        logits = logits.base
    return False


def _as_loss(func: Any, args: tuple, kwargs: dict) -> Any:
    """Return `F.cross_entropy` of deferred logits, computed from their hidden states, or `NotImplemented`.

    `func` is a function that PyTorch was called with, and `args` and `kwargs` are its arguments. The result is a loss
    if `func` is `F.cross_entropy` and its first argument are logits [N, V] whose values are not computed yet. The
    targets have to be int64 class indices [N], and neither class weights nor PyTorch's deprecated options may be given.
    The loss has the dtype of the logits, or float32 under autocast. Raise `RuntimeError` if hidden states or weights
    changed after the logits were made. On a GPU, changes that autograd does not count, such as through `.data`, are not
    noticed.
    """
    if func is not F.cross_entropy:
        return NotImplemented
    names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    call = dict(zip(names, args, strict=False)) | kwargs
    source, target = call.pop("input"), call.pop("target")
    if not isinstance(source, Logits) or _is_computed(source) or not isinstance(target, Tensor):
        return NotImplemented
    if any(call.get(name) is not None for name in ("weight", "size_average", "reduce")):
        return NotImplemented
    if source.dim() != 2 or target.dim() != 1 or target.dtype != torch.int64 or len(target) != len(source.hidden):
        return NotImplemented
    _check(source.unchanged(not source.is_cuda))  # a GPU is not waited for
    loss = ops.linear_cross_entropy(
        source.hidden, source.weight, value(target), source.bias, ignore_index=call.get("ignore_index", IGNORE),
        label_smoothing=call.get("label_smoothing", 0.0), reduction=call.get("reduction", "mean"),
    )  # fmt: skip
    autocast = torch.is_autocast_enabled(source.device.type)  # which computes a cross-entropy in float32
    return loss if autocast else loss.to(source.dtype)


def _may_defer() -> bool:
    """Return True if logits may be deferred, that is, computed when code reads them.

    The result is False if gradients are off. It is False while a graph or a trace is recorded, inside transforms of
    `torch.func`, and inside forward-mode differentiation, because all of these would miss a later computation. The
    result is also False inside activation checkpointing, which compares or repeats the computation of a block. This
    function takes a running backward pass, or hooks on saved tensors, as a sign of activation checkpointing.
    """
    return (
        torch.is_grad_enabled()
        and not _transforms.is_recording()
        and not _transforms.is_transformed()
        and not _transforms.is_forward_mode()
        and torch._C._current_graph_task_id() == -1
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )
