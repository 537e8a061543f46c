"""Test a training step as one CUDA graph: the launches of a replay, refused captures, and changes a graph misses."""

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt_fast.training import GraphedStep
from gpt_fast.training.engine.update import PRECISIONS
from tests.fakecuda.small import batches, engine_on

if os.environ.get("FAKECUDA_CAPABILITY", "90") != "90":
    pytest.skip("whole models run as sm_90", allow_module_level=True)


def offset(device: torch.device) -> int:
    """Return the offset of the generator that draws dropout's seeds."""
    return torch.cuda.default_generators[device.index].get_offset()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}, {"compile": True}], ids=str)
def test_an_update_is_one_launch(precision: str, options: dict, device: torch.device, watched: Callable) -> None:
    """A replay launches the graph, the copies of the batch, and fills of two learning rates and of seed and offset."""
    engine = engine_on(device, precision=precision, graph=True, **options)
    for _ in range(3):
        engine.update(batches(), 1e-4)
    with watched() as seen:
        engine.update(batches(), 1e-4)
    assert len(seen.of("graph")) == 1
    assert seen.of("triton", "cublas") == []
    assert len(seen.of("kernel")) == 2 + 2 + 2, "expected copies of two dtypes, two rates, seed and offset"


def test_the_capture_waits_once_and_is_refused_nothing(device: torch.device, watched: Callable) -> None:
    engine = engine_on(device, precision="bfloat16", graph=True)
    for _ in range(2):
        engine.update(batches(), 1e-4)
    with watched(waits=True) as seen:
        engine.update(batches(), 1e-4)
    assert len(seen.of("sync")) == 1
    captured = [entry for entry in seen.launches() if entry.captured]
    assert len(captured) > 300
    (graph,) = seen.of("graph")
    assert graph.name == f"{len(captured)} nodes", "expected the graph to hold every launch of the capture"


def test_dropout_draws_as_often_as_eagerly(device: torch.device) -> None:
    """A replay advances the generator as an eager update does, so every replay has new masks."""
    advances = []
    for graph in (False, True):
        engine = engine_on(device, graph=graph)
        for _ in range(5):
            before = offset(device)
            engine.update(batches(), 1e-4)
            advances.append(offset(device) - before)
    assert set(advances) == {advances[0]}
    assert advances[0] > 0


def test_a_batch_of_another_shape(device: torch.device) -> None:
    engine = engine_on(device, graph=True)
    engine.update(batches(), 1e-4)
    first, second = batches()
    shorter = second._replace(tokens=second.tokens[:, :16], labels=second.labels[:, :16])
    message = r"tokens of part 1 is torch.int64 \[2, 16\] .*; expected torch.int64 \[2, 32\] .*, as in the first call"
    with pytest.raises(ValueError, match=message):
        engine.update([first, shorter], 1e-4)
    with pytest.raises(ValueError, match="the call has counts, tokens of part 0, labels of part 0; expected counts"):
        engine.update(batches(1), 1e-4)


# --- a user's own training loop


def own(device: torch.device, **options: Any) -> tuple[GraphedStep, torch.optim.AdamW, Callable[[], Tensor]]:
    with torch.device(device):
        model = torch.nn.Linear(8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, **options)

    def step(x: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss.detach()

    graphed = GraphedStep(step, optimizer)
    return graphed, optimizer, lambda: graphed(torch.zeros(4, 8, device=device))


@pytest.mark.parametrize("options", [{"fused": True}, {}], ids=str)
def test_a_loop_of_ones_own(options: dict, device: torch.device, watched: Callable) -> None:
    _, optimizer, call = own(device, **options)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    results = []
    for _ in range(3):
        results.append(call())
        scheduler.step()
    with watched() as seen:
        results.append(call())
    assert len(seen.of("graph")) == 1
    assert len({result.data_ptr() for result in results}) == 4, "expected results that the next call leaves alone"


@pytest.mark.parametrize("value", [1e-4, torch.tensor(1e-4)], ids=["number", "tensor"])
def test_a_rate_that_a_loop_sets_reaches_the_graph(value: Any, device: torch.device, watched: Callable) -> None:
    """A learning rate that the loop sets is copied into the tensor that the graph reads, which the group keeps."""
    _, optimizer, call = own(device, fused=True)
    rate = optimizer.param_groups[0]["lr"]
    for _ in range(3):
        call()
    optimizer.param_groups[0]["lr"] = value
    with watched(waits=isinstance(value, Tensor)) as seen:
        call()
    assert len(seen.of("graph")) == 1
    assert optimizer.param_groups[0]["lr"] is rate


def test_what_was_replaced_behind_the_graph(device: torch.device) -> None:
    for change in (
        lambda optimizer: optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict())),
        lambda optimizer: optimizer.param_groups[0].update(weight_decay=0.5),
        lambda optimizer: setattr(optimizer.param_groups[0]["params"][0], "data", torch.zeros(8, 8, device=device)),
    ):
        _, optimizer, call = own(device, fused=True)
        for _ in range(4):
            call()
        change(optimizer)
        with pytest.raises(ValueError, match="replaced after the capture; expected no change but of learning"):
            call()


def test_a_step_that_reads_a_value(device: torch.device) -> None:
    x = torch.zeros(4, device=device)
    graphed = GraphedStep(lambda x: x.sum().item() * x)
    graphed(x), graphed(x)
    with pytest.raises(RuntimeError, match=r"the step cannot be captured \(.*\); expected one that reads no value"):
        graphed(x)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "the call has no tensors; expected those that change between calls"),
        ((torch.zeros(4),), "tensor 0 is on cpu; expected a tensor on a CUDA device"),
        ((3,), "tensor 0 is a int; expected a tensor on a CUDA device"),
    ],
)
def test_what_is_no_tensor_of_the_device(args: tuple, message: str, device: torch.device) -> None:
    with pytest.raises(ValueError, match=message):
        GraphedStep(lambda x: x)(*args)


def test_an_optimizer_on_the_cpu() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(4))])
    with pytest.raises(ValueError, match="the optimizer's parameters are on cpu; expected one CUDA device"):
        GraphedStep(lambda x: x, optimizer)
