"""Tensors that are computed when somebody reads them, so that what follows may compute them in one op with its own.

A hand-written model adds, normalises and computes its loss in code that stays as it is. Its recognised modules return
a `Deferred` in place of a sum or of logits. Recognised modules and `F.cross_entropy` take it as it is; for anybody else
it is the tensor.
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
        made = Tensor._make_wrapper_subclass(kind, shape, dtype=like.dtype, device=like.device)
        made._compute, made._value = compute, None
        device = like.device.type
        autocast = not like.is_meta and torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if autocast else None
        made._modes = (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), device, autocast, dtype)
        return made

    def value(self) -> Tensor:
        """Return the tensor itself."""
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
        if func in _SHAPES:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        for handle in (_as_rows, _as_loss, _as_embedding):
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
# What a deferred tensor tells without being computed.
_SHAPES = {
    _T.size, _T.dim, _T.numel, _T.__len__, _T.is_floating_point,
    *(getattr(_T, name).__get__ for name in ("shape", "dtype", "device", "ndim", "is_cuda", "is_meta")),
}  # fmt: skip


def _values(tree: Any) -> Any:
    """Return a tree of arguments with the values of its deferred tensors."""
    if isinstance(tree, Deferred):
        return tree.value()
    if isinstance(tree, dict):
        return {key: _values(value) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(_values(value) for value in tree)
    return tree


def value(x: Any) -> Any:
    """Return a tensor that is computed: the value of a deferred one, any other as it is."""
    return x.value() if isinstance(x, Deferred) else x


# ---- a sum that the next norm computes -------------------------------------------------------------------------------


class Sum(Deferred):
    """x + dropout(branch), which a LayerNorm that follows computes in one pass with its own work."""

    x: Tensor
    branch: Tensor
    p: float
    seed: Tensor | None
    site: int


def add(x: Tensor, branch: Tensor, p: float, seed: Tensor | None, site: int) -> Tensor:
    """Return x + dropout(branch), deferred outside of graphs."""
    if not _may_defer():
        return _plain.add(branch, x, p, seed, site)
    made: Any = Deferred.make(Sum, x.shape, x, lambda: _plain.add(branch, x, p, seed, site))
    made.x, made.branch, made.p, made.seed, made.site = x, branch, p, seed, site
    return made


# ---- logits that the loss computes -----------------------------------------------------------------------------------


class Logits(Deferred):
    """hidden weightᵀ + bias, which a cross-entropy that follows computes without storing it."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None


def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return hidden weightᵀ + bias, deferred outside of graphs."""
    if not _may_defer():
        return F.linear(hidden, weight, bias)
    unchanged = _plain.Unchanged([weight] if bias is None else [weight, bias])

    def compute() -> Tensor:
        if not unchanged():
            raise RuntimeError(
                "gpt_fast.accelerate: logits has weights that changed after the pass; expected them as in the pass: "
                "read logits before the update"
            )
        return F.linear(hidden, weight, bias)

    shape = torch.Size([*hidden.shape[:-1], weight.shape[0]])
    like = hidden
    if torch.is_autocast_enabled(hidden.device.type):
        like = hidden.new_empty(0, dtype=torch.get_autocast_dtype(hidden.device.type))
    made: Any = _Linked.apply(hidden, weight, bias, lambda: Deferred.make(Logits, shape, like, compute))
    made.hidden, made.weight, made.bias = hidden, weight, bias
    return made


class _Linked(torch.autograd.Function):
    """Link deferred logits to the graph, for code in C++ and autograd functions, which take the tensor as it is.

    The sink of DistributedDataParallel is one. Whoever computes the value has a graph of its own.
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
    """Return logits in another shape that keeps the last dimension, still deferred."""
    source = args[0] if args else None
    if func not in _RESHAPES or not isinstance(source, Logits) or source._value is not None:
        return NotImplemented
    with torch._C.DisableTorchFunctionSubclass():
        try:
            shape = func(torch.empty(source.shape, device="meta"), *args[1:], **kwargs).shape
        except (RuntimeError, TypeError):
            return NotImplemented  # the value raises it again
    V = source.weight.shape[0]
    if len(shape) == 0 or shape[-1] != V:
        return NotImplemented
    made: Any = Deferred.make(Logits, shape, source, lambda: source.value().reshape(shape))
    made.hidden, made.weight, made.bias = source.hidden.reshape(*shape[:-1], -1), source.weight, source.bias
    return made


def _as_loss(func: Any, args: tuple, kwargs: dict) -> Any:
    """Return a cross-entropy without logits, where its options are the op's."""
    if func is not F.cross_entropy:
        return NotImplemented
    names = ("input", "target", "weight", "size_average", "ignore_index", "reduce", "reduction", "label_smoothing")
    call = dict(zip(names, args, strict=False)) | kwargs
    source, target = call.pop("input"), call.pop("target")
    if not isinstance(source, Logits) or source._value is not None or not isinstance(target, Tensor):
        return NotImplemented
    if any(call.get(name) is not None for name in ("weight", "size_average", "reduce")):
        return NotImplemented
    if source.dim() != 2 or target.dim() != 1 or target.dtype != torch.int64 or len(target) != len(source.hidden):
        return NotImplemented
    return ops.linear_cross_entropy(
        source.hidden, source.weight, value(target), source.bias, ignore_index=call.get("ignore_index", IGNORE),
        label_smoothing=call.get("label_smoothing", 0.0), reduction=call.get("reduction", "mean"),
    )  # fmt: skip


# ---- embeddings that are added ---------------------------------------------------------------------------------------


class Rows(Deferred):
    """table[index], which an addition of two of them computes in one op."""

    places: Tensor
    table: Tensor


class Embedded(Deferred):
    """token_table[tokens] + position_table[positions], which a dropout that follows computes in one op."""

    arguments: tuple[Tensor, Tensor, Tensor, Tensor]  # tokens, both tables, positions


def rows(index: Tensor, table: Tensor) -> Tensor:
    """Return table[index], deferred outside of graphs."""
    if not _may_defer():
        return F.embedding(index, table)
    shape = torch.Size([*index.shape, table.shape[1]])
    made: Any = Deferred.make(Rows, shape, table, lambda: F.embedding(index, table))
    made.places, made.table = index, table
    return made


_ADDITIONS = {torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__}


def _as_embedding(func: Any, args: tuple, kwargs: dict) -> Any:
    """Return the sum of token and position embeddings, deferred."""
    if func not in _ADDITIONS or kwargs or len(args) != 2 or not all(isinstance(arg, Rows) for arg in args):
        return NotImplemented
    positions, tokens = sorted(args, key=lambda one: (one.places.dim(), one.places.numel()))
    at = positions.places
    if at.dim() == 2 and at.shape[0] == 1:
        at = at[0]
    if tokens.places.dim() != 2 or at.shape not in (tokens.places.shape, tokens.places.shape[-1:]):
        return NotImplemented
    arguments = (tokens.places, tokens.table, positions.table, at)
    made: Any = Deferred.make(Embedded, tokens.shape, tokens.table, lambda: ops.embedding(*arguments))
    made.arguments = arguments
    return made


def _may_defer() -> bool:
    """Return True where a tensor that computes itself later has a place.

    Graphs, traces and transforms record what is computed now. Activation checkpointing compares or repeats what a block
    computes: it shows by gradients that are off in a forward pass, by a backward pass that is running, or by hooks on
    saved tensors.
    """
    return (
        torch.is_grad_enabled()
        and not _transforms.is_recording()
        and not _transforms.is_transformed()
        and not _transforms.is_forward_mode()
        and torch._C._current_graph_task_id() == -1
        and torch._C._autograd._top_saved_tensors_default_hooks(True) is None
    )
