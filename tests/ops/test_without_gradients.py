"""Test that ops compute and save nothing for backward while autograd does not record."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gpt_fast import ops


class Calls(TorchDispatchMode):
    """Dispatch mode that records the arguments of every operator of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, tuple] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "gpt_fast":
            self.found[func._schema.name.removeprefix("gpt_fast::")] = args
        return func(*args, **(kwargs or {}))


def parameters(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


def loss() -> tuple:
    x, weight, bias = parameters((6, 8), (11, 8), (11,))
    return lambda: ops.linear_cross_entropy(x, weight, torch.arange(6), bias), "linear_cross_entropy_forward", (7, 8, 9)


def mlp() -> tuple:
    tensors = parameters((6, 8), (32, 8), (32,), (8, 32), (8,))
    return lambda: ops.mlp(*tensors, activation="gelu"), "mlp_forward", (9,)


@pytest.mark.parametrize("make", [loss, mlp])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_no_gradient_is_computed_that_nobody_can_ask_for(make, mode):
    call, operator, flags = make()
    with mode(), Calls() as calls:
        quiet = call()
    assert [calls.found[operator][flag] for flag in flags] == [False] * len(flags)
    with Calls() as calls:
        recorded = call()
    assert [calls.found[operator][flag] for flag in flags] == [True] * len(flags)
    assert torch.equal(quiet, recorded)
    assert recorded.requires_grad and not quiet.requires_grad


@pytest.mark.parametrize("make", [loss, mlp])
def test_a_compiled_pass_without_gradients_computes_none(make):
    call, operator, flags = make()
    found: list[tuple] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable:
        found.extend(node.args for node in graph.graph.nodes if operator in str(node.target))
        return graph.forward

    with torch.no_grad():
        quiet = torch.compile(call, fullgraph=True, backend=backend)()
    (arguments,) = found
    assert [arguments[flag] for flag in flags] == [False] * len(flags)
    assert torch.equal(quiet, call())


def test_a_loss_is_differentiable_again_after_no_grad():
    call, _, _ = loss()
    with torch.no_grad():
        call()
    call().backward()
