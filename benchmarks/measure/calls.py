"""Build the calls that are timed: the passes of an implementation on random inputs."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure.timing import Call
from benchmarks.topic import Case, Topic

COPIES = 2  # of the inputs, rotated


def make_inputs(topic: Topic, case: Case) -> list[tuple]:
    copies = []
    for copy in range(COPIES):
        torch.manual_seed(copy)
        copies.append(topic.inputs(case))
    return copies


def prepare(function: Callable[..., Any], inputs: list[tuple], passes: str) -> list[Call]:
    """Return the calls to time, one for each copy of the inputs."""
    return [_prepare(function, copy, passes) for copy in inputs]


def all_passes(function: Callable[..., Any], inputs: tuple, passes: tuple[str, ...]) -> Call:
    """Return one call of all of a topic's passes, for memory: forward and backward belong together."""
    return _prepare(function, inputs, "training" if "backward" in passes else passes[0])


def _prepare(function: Callable[..., Any], inputs: tuple, passes: str) -> Call:
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
        outputs = _tuple(function(*inputs))
        if not upstream:
            upstream.extend(_upstream(outputs))
        return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

    return both


def _upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    if not all(output.requires_grad for output in outputs):
        raise NotImplementedError("no backward here")
    return [torch.randn_like(output) for output in outputs]


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)
