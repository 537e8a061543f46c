"""Autograd functions inside the transforms of `torch.func`.

There PyTorch asks for functions whose forward takes no `ctx`. It binds the arguments of every call of such a function
by an inspection of its signature, which costs 43 µs (a 2-core Zen 3; a call with `ctx` takes 9). So the ops keep their
`ctx`, and `apply` wraps them where a transform is under way: in one `torch.func.grad` or `vjp`. Elsewhere (vmap,
forward mode, grad of grad, inside a compiled graph) `is_followed` is false, and the reference serves.
"""

import copy
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable)


def constant_in_graphs(function: _Function) -> _Function:
    """Mark `function` so that `torch.compile` calls it while it traces and takes the result as a constant; return it.

    This does what `torch.compiler.assume_constant_result` does, but without importing Dynamo, which takes as long as
    importing torch.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def apply(function: Any, *args: Any) -> Any:
    """Return `function.apply(*args)` of an `autograd.Function`, also inside a transform of `torch.func`.

    Inside a transform, `_Transformed` wraps the function. Outside, `function.apply` runs only if autograd can record
    the call. Otherwise `function.forward` runs alone, with a context in which no input needs a gradient. The context of
    `function.apply` has `needs_input_grad` True for a parameter even under `torch.no_grad()`. The forward pass would
    then do work for a backward pass that cannot come. The direct call also takes 4 µs less.
    """
    if not is_transformed():
        if torch.is_grad_enabled() if torch.compiler.is_compiling() else _is_recorded(args):
            return function.apply(*args)
        return function.forward(_Unrecorded(len(args)), *args)
    record = _Record(function, tuple(_requires_grad(arg) for arg in args))
    outputs = _Transformed.apply(record, *args)[: record.count]
    return outputs if record.returns_tuple else outputs[0]


def _is_recorded(args: tuple) -> bool:
    """Return True if gradients are enabled and one of `args` is a tensor that requires one."""
    if torch.is_grad_enabled():
        for arg in args:
            if isinstance(arg, Tensor) and arg.requires_grad:
                return True
    return False


class _Unrecorded:
    """Stand-in for `ctx` in a forward pass without backward: it keeps nothing, and no input needs a gradient."""

    def __init__(self, count: int):
        self.needs_input_grad = (False,) * count

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Discard the tensors, because no backward pass will need them."""

    def set_materialize_grads(self, value: bool) -> None:
        """Do nothing, because no backward pass will come."""


@constant_in_graphs
def is_transformed() -> bool:
    """Return True inside a transform of `torch.func` (grad, vjp, vmap, jvp, …)."""
    return _functorch.peek_interpreter_stack() is not None


def is_forward_mode() -> bool:
    """Return True inside a `dual_level` of `torch.autograd.forward_ad`, which `torch.func.jvp` enters too.

    Reading PyTorch's level takes 0.1 µs; asking whether a tensor is dual takes 5 µs. `torch.compile` guards the level,
    so a function that was compiled outside of a level is compiled again inside.
    """
    return forward_ad._current_level >= 0


def has_tangent(tensor: Tensor) -> bool:
    """Return True if `tensor` has a tangent in the innermost level of forward-mode differentiation."""
    return forward_ad.unpack_dual(tensor).tangent is not None


def is_followed() -> bool:
    """Return True if autograd functions that run kernels work here, False if the reference in plain PyTorch has to run.

    They do not work in forward-mode differentiation. Inside transforms of `torch.func` they work only in a single
    `grad` or `vjp` that is not being compiled.
    """
    if is_forward_mode():
        return False
    return not is_transformed() or (not torch.compiler.is_compiling() and _is_one_gradient())


def _is_one_gradient() -> bool:
    """Return True if exactly one transform of `torch.func` is active and it is `grad` or `vjp`.

    Call this only inside a transform (see `is_transformed`).
    """
    stack = _functorch.get_interpreter_stack()
    return len(stack) == 1 and stack[0].key() == _functorch.TransformType.Grad


def is_recording() -> bool:
    """Return True while PyTorch records a graph: `torch.compile`, `torch.export` or `torch.jit.trace`.

    A value that Python reads from a tensor then would become a constant of the graph, for every later input.
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_batched(tensor: Tensor) -> bool:
    """Return True if `tensor` is a batched tensor of `vmap`, itself or inside wrappers of `torch.func.grad`.

    Then Python cannot read its values. The result is False while `torch.compile` or `torch.export` records a graph.
    """
    if torch.compiler.is_compiling():
        return False
    while _functorch.is_gradtrackingtensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return _functorch.is_batchedtensor(tensor)


def double_backward(op: str) -> NotImplementedError:
    """Return, without raising it, the error for differentiating the gradients of the op named `op` once more."""
    return NotImplementedError(
        f"gpt_fast.{op}: double backward is not implemented; "
        "run forward and backward under gpt_fast.use_reference(), which can be differentiated twice"
    )


class _Record:
    """Stand-in for `ctx` in the wrapped function's forward and, copied and completed, in its backward."""

    def __init__(self, function: Any, needs_input_grad: tuple[bool, ...]):
        self.function, self.needs_input_grad = function, needs_input_grad
        self.saved_tensors: tuple = ()
        self.places: list[int | None] = []  # of what is saved, among record, arguments and outputs
        self.count, self.returns_tuple = 0, False

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Do nothing: a gradient that is None stays None."""

    def run(self, *args: Any) -> tuple:
        """Run `self.function.forward` on `args` with this record as `ctx`. Return its outputs, then the extra tensors.

        Extra tensors are all tensors that the function saves and that are neither input nor output. `setup_context` of
        `_Transformed` can save a tensor only if it is an input or is returned. `self.count` is set to the number of the
        function's outputs, and `self.returns_tuple` to True if the function returned a tuple. `self.places` gets an
        entry for each saved tensor: its index, or None if the function saved None. The index counts first the inputs of
        `_Transformed`, which are this record and `args`, then the tensors that this method returns.
        """
        outputs = self.function.forward(self, *args)
        self.returns_tuple = isinstance(outputs, tuple)
        known = [self, *args, *(outputs if self.returns_tuple else (outputs,))]
        self.count = len(known) - len(args) - 1
        for tensor in self.saved_tensors:
            place = next((i for i, other in enumerate(known) if other is tensor), len(known))
            if place == len(known):
                known.append(tensor)
            self.places.append(None if tensor is None else place)
        self.saved_tensors = ()
        return tuple(known[len(args) + 1 :])


class _Transformed(torch.autograd.Function):
    """The `autograd.Function` in a `_Record`, in the form that `torch.func` asks for: a forward without `ctx`."""

    @staticmethod
    def forward(record, *args):
        return record.run(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.record = record = inputs[0]
        known = (*inputs, *output)
        ctx.save_for_backward(*(None if place is None else known[place] for place in record.places))
        # Other saved tensors count as differentiable: by them `_Once` knows that a gradient depends on the arguments.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, *grads):
        record = copy.copy(ctx.record)
        record.saved_tensors, record.needs_input_grad = ctx.saved_tensors, ctx.needs_input_grad[1:]
        with torch.no_grad():  # what keeps backward operators from being differentiated is a function with `ctx`
            results = record.function.backward(record, *grads[: record.count])
        if torch.is_grad_enabled():
            present = [result for result in results if result is not None]
            sources = [tensor for tensor in (*grads, *ctx.saved_tensors) if tensor is not None]
            op = record.function.__module__.rpartition(".")[2]
            marked = iter(_Once.apply(op, len(present), *present, *sources))
            results = [None if result is None else next(marked) for result in results]
        return None, *results


class _Once(torch.autograd.Function):
    """Identity on the first `count` tensors. The results depend on all tensors and raise when differentiated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op, count, *tensors):
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *grads):
        raise double_backward(ctx.op)


def _requires_grad(value: Any) -> bool:
    """Return True if `value` is a tensor that requires a gradient, itself or inside wrappers of `torch.func.grad`.

    All wrappers that track gradients are opened, one by one. A batched tensor of `vmap` is not opened. Anything but a
    tensor gives False.
    """
    while isinstance(value, Tensor):
        if value.requires_grad:
            return True
        if not _functorch.is_gradtrackingtensor(value):
            break
        value = _functorch.get_unwrapped(value)
    return False
