"""Every op forward and backward on `cuda`: what it launches, and on which device."""

import contextlib
import importlib
import os
from collections.abc import Callable

import pytest
import torch

from gpt_fast import ops
from gpt_fast.ops import _library
from tests.fakecuda import calls
from tools.fakecuda.record import watch

# As sm_90 every dtype, mask and edge; as another architecture one training and one decoding call of each op.
linear = importlib.import_module("gpt_fast.ops.linear")  # as an attribute it is the function
mlp = importlib.import_module("gpt_fast.ops.mlp")
CASES = calls.EVERY if os.environ.get("FAKECUDA_CAPABILITY", "90") == "90" else calls.TRAINING | calls.DECODING


@pytest.mark.parametrize("name", CASES)
def test_an_op_launches_on_its_tensors_device(name: str, device: torch.device, watched: Callable) -> None:
    call = CASES[name](device)
    with watched() as seen:
        call()
    assert seen.of("triton"), "expected Triton's kernels"


def test_an_op_without_its_device_guard_is_noticed(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the tensors on `cuda:1` and device 0 current, as Triton would launch them."""
    if device.index == 0:
        pytest.skip("needs two devices")
    monkeypatch.setattr(_library, "device_guard", lambda index: contextlib.nullcontext())
    call = CASES["layer_norm"](device)
    with watch() as seen:
        call()
    assert any("is of device 1, the current device is 0" in line for line in seen.refusals)


def test_the_cuda_extension_decodes_on_its_tensors_device(device: torch.device, watched: Callable) -> None:
    """decode_attention in CUDA C++, which Triton's kernel stands in for until a GPU has said which is faster."""
    q = torch.zeros(2, 3, 64, dtype=torch.bfloat16, device=device)
    cache = torch.zeros(2, 3, 77, 64, dtype=torch.bfloat16, device=device)
    lengths = torch.ones(2, dtype=torch.int64, device=device)
    with watched() as seen:
        torch.ops.gpt_fast.decode_attention_cuda_forward(q, cache, cache, lengths)
    assert any("decode" in entry.name or "split" in entry.name for entry in seen.of("kernel"))


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("activation", ["relu", "gelu_tanh"])
def test_mlp_by_cublaslt_on_its_tensors_device(
    activation: str, recompute: bool, device: torch.device, watched: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is off until a GPU has said that it is faster."""
    monkeypatch.setattr(mlp, "_cublaslt_serves", lambda *args: True)
    call = calls.mlp(device, torch.bfloat16, activation, 0.0, (128, 64, 256, 64), recompute=recompute)
    with watched() as seen:
        call()
    assert len(seen.of("cublas")) == 6 + recompute, "expected two products forward and four backward"
    assert {entry.name for entry in seen.of("triton")} == set()


def test_linear_by_cublaslt_sums_no_bias_apart(
    device: torch.device, watched: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is off until a GPU has said that it is faster."""
    x, weight, bias, dy = (
        torch.zeros(shape, dtype=torch.bfloat16, device=device) for shape in ((128, 64), (192, 64), 192, (128, 192))
    )
    launched = []
    for serves in (False, True):
        monkeypatch.setattr(linear, "_cublaslt_serves", lambda *args, serves=serves: serves)
        inputs = [tensor.detach().requires_grad_() for tensor in (x, weight, bias)]
        with watched() as seen:
            torch.autograd.grad(ops.linear(*inputs), inputs, dy)
        assert len(seen.of("cublas")) == 3, "expected one product forward and two backward"
        launched.append(seen.of("kernel"))
    assert launched[0] and not launched[1], "expected no kernel of PyTorch's beside the products"


def test_every_op_is_called() -> None:
    for op in ops.NAMES:
        assert any(name.split()[0] == op for name in calls.TRAINING | calls.DECODING), op
