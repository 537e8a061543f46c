"""Test that each op appears in PyTorch's profiler under its own name, whichever implementation runs."""

from collections.abc import Callable

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import gpt_fast
from gpt_fast import ops
from tests.ops.test_transforms import OPS, randn


def names(run: Callable[[], object]) -> set[str]:
    """Return the names with "gpt_fast" in them that a profiler sees."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return {event.key for event in profiler.key_averages() if "gpt_fast" in event.key}


def forward_backward(name: str) -> None:
    function, shapes = OPS[name]
    tensors = [randn(*shape).requires_grad_() for shape in shapes]
    function(*tensors).sum().backward()


OPERATORS = [
    pytest.param("layer_norm", {"layer_norm_forward", "layer_norm_backward"}, id="layer_norm"),
    pytest.param("add_layer_norm", {"add_layer_norm_forward", "add_layer_norm_backward"}, id="add_layer_norm"),
    pytest.param("attention", {"attention_forward", "attention_backward"}, id="attention"),
    pytest.param("attention_qkv", {"attention_forward", "attention_qkv_backward"}, id="attention_qkv"),
    pytest.param("mlp", {"mlp_forward", "mlp_backward"}, id="mlp"),
    pytest.param("linear", {"linear_forward", "linear_backward"}, id="linear"),
    pytest.param("loss", {"linear_cross_entropy_forward"}, id="linear_cross_entropy"),
    pytest.param("embedding", {"embedding_forward", "embedding_backward"}, id="embedding"),
]


@pytest.mark.parametrize(("name", "operators"), OPERATORS)
def test_a_kernel_has_the_operators_name(name: str, operators: set[str]) -> None:
    """The profiler shows the names of the forward and backward operators."""
    if name == "linear" and ops.serving("linear", "cpu") == "reference":
        pytest.skip("PyTorch's own product, which has PyTorch's name")
    assert names(lambda: forward_backward(name)) == {f"gpt_fast::{operator}" for operator in operators}


@pytest.mark.parametrize(("name", "operators"), [case for case in OPERATORS if case.id != "linear"])
def test_the_reference_has_the_ops_name(name: str, operators: set[str]) -> None:
    with ops.use_reference():
        op = "linear_cross_entropy" if name == "loss" else name
        assert names(lambda: forward_backward(name)) == {f"gpt_fast::{op} (reference)"}


def test_a_decode_step_has_a_name() -> None:
    """The C++ step is one call outside PyTorch's dispatcher, so it must name itself."""
    if ops.serving("decode_attention", "cpu") != "cpp":
        pytest.skip("the step on the model's modules, whose ops have names")
    config = gpt_fast.GPTConfig(num_tokens=19, hidden_dim=16, num_heads=2, num_layers=2, seq_len=8)
    model = gpt_fast.GPTForCausalLM(config).eval()
    found = names(lambda: gpt_fast.generate(model, torch.tensor([[1, 2]]), max_new_tokens=3))
    assert "gpt_fast::decode_step" in found


def test_without_a_profiler_nothing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a profiler no name is recorded, because recording one costs microseconds."""

    def refused(name: str) -> None:
        raise AssertionError(name)

    monkeypatch.setattr(torch.profiler, "record_function", refused)
    with ops.use_reference():
        forward_backward("layer_norm")


def test_a_graph_compiled_under_a_profiler_holds_no_name() -> None:
    torch._dynamo.reset()
    with ops.use_reference():
        compiled = torch.compile(ops.layer_norm, fullgraph=True, backend="aot_eager")
        assert names(lambda: compiled(randn(6, 8), randn(8), randn(8))) == set()
