"""Build the calls that are timed: the passes of an implementation on random inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.timing import Call
from benchmarks.topic import Case, Topic

COPIES = 2  # of the inputs, rotated


def make_inputs(topic: Topic, case: Case) -> list[tuple]:
    """Return COPIES (two) tuples of positional arguments for the topic's implementations, on the device of `case`.

    They are drawn with PyTorch's seeds 0, 1, ... and differ in their values only. The seed is not set back.
    """
    copies = []
    for copy in range(COPIES):
        torch.manual_seed(copy)
        copies.append(topic.inputs(case))
    return copies


def prepare(function: Callable[..., Any], inputs: list[tuple], passes: str) -> list[Call]:
    """Return calls without arguments that run one pass of `function`, one call for each tuple of arguments in `inputs`.

    `passes` names the pass: "forward", "backward", "training" (forward and backward), "inference" (forward without
    autograd) or "step" (one call of a whole-model job). For "backward" the forward pass runs here, once for each tuple.
    A function without a backward pass raises `NotImplementedError`: here for "backward", in the call for "training".
    """
    return [_prepare(function, copy, passes) for copy in inputs]


def all_passes(function: Callable[..., Any], inputs: tuple, passes: tuple[str, ...]) -> Call:
    """Return one call without arguments of `function`, an op or job, to measure the peak memory of all its passes.

    `inputs` are the positional arguments of `function`, and `passes` the names of its passes. If "backward" is among
    them, the call runs forward and backward. Otherwise it runs the first pass only; all ops and jobs without "backward"
    have just one pass.
    """
    return _prepare(function, inputs, "training" if "backward" in passes else passes[0])


def _prepare(function: Callable[..., Any], inputs: tuple, passes: str) -> Call:
    """Return a call without arguments that runs one pass of `function` on `inputs`, its positional arguments.

    `passes` is "forward", "step", "inference" (forward without autograd), "backward" or "training" (forward and
    backward). "forward" and "step" just call `function`. For "backward" the forward pass runs here, once, and each call
    differentiates it again. Gradients of the outputs are random, and are drawn once.
    """
    if passes in ("forward", "step"):
        return lambda: function(*inputs)
    if passes == "inference":
        return torch.inference_mode()(lambda: function(*inputs))
    leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    if passes == "backward":
        outputs = _tuple(function(*inputs))
        grads = _upstream(outputs)
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)
    upstream: list[Tensor] = []

    def both() -> object:
        """Run `function` forward and backward on `inputs`. Return the gradients of differentiable inputs, as a tuple.

        `function` and `inputs` are the arguments of the enclosing function. The first call draws random gradients of
        the outputs, which later calls reuse. The gradient of an input that does not affect the outputs is None.
        """
        outputs = _tuple(function(*inputs))
        if not upstream:
            upstream.extend(_upstream(outputs))
        return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

    return both


def _upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Return a random gradient for each of `outputs`.

    Raise `NotImplementedError` if an output does not require grad.
    """
    if not all(output.requires_grad for output in outputs):
        raise NotImplementedError("no backward here")
    return [torch.randn_like(output) for output in outputs]


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    """Return the outputs of a function as a tuple: a tuple as it is, anything else in a tuple of one."""
    return outputs if isinstance(outputs, tuple) else (outputs,)
