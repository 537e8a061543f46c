"""The training engine on `cuda`: updates in three precisions, with batches that the source makes on the host."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpt_fast import GPTConfig, GPTForCausalLM
from gpt_fast.data.batches import Batch, causal_batch
from gpt_fast.training.engine.update import PRECISIONS, Engine, EngineSettings

if os.environ.get("FAKECUDA_CAPABILITY", "90") != "90":
    pytest.skip("whole models run as sm_90", allow_module_level=True)

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_dim": 128, "num_heads": 2, "num_tokens": 512, "seq_len": 64}


def engine_on(device: torch.device, **settings: Any) -> Engine:
    with torch.device(device):
        model = GPTForCausalLM(GPTConfig.preset("gpt2", **SIZES, dropout=0.1))
    return Engine(model, 1e-4, EngineSettings(**settings))


def batches(parts: int = 2) -> list[Batch]:
    return [causal_batch(torch.zeros(2, 32, dtype=torch.int64)) for _ in range(parts)]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("options", [{}, {"checkpoint_activations": True}, {"compile": True}], ids=str)
def test_an_update_does_not_wait(precision: str, options: dict, device: torch.device, watched: Callable) -> None:
    """Neither for the copy of a batch nor for a number that the host knows."""
    engine = engine_on(device, precision=precision, **options)
    for _ in range(2):
        engine.update(batches(), 1e-4)
    with watched() as seen:
        engine.update(batches(), 1e-4)
    assert seen.of("triton")


def test_the_first_update_of_a_resumed_state_does_not_wait(device: torch.device, watched: Callable) -> None:
    engine = engine_on(device, precision="bfloat16")
    engine.update(batches(), 1e-4)
    engine.state()
    with watched():
        engine.update(batches(1), 1e-4)
