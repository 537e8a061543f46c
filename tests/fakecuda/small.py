"""A small GPT-2, its training engine and its batches, for the tests of whole models on the stand-in."""

from typing import Any

import torch

from gpt_fast import GPTConfig, GPTForCausalLM
from gpt_fast.data.batches import Batch, causal_batch
from gpt_fast.training.engine.update import Engine, EngineSettings

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_dim": 128, "num_heads": 2, "num_tokens": 512, "seq_len": 64}


def engine_on(device: torch.device, **settings: Any) -> Engine:
    """Return an engine for a model of SIZES with dropout on `device`. `settings` are fields of `EngineSettings`."""
    with torch.device(device):
        model = GPTForCausalLM(GPTConfig.preset("gpt2", **SIZES, dropout=0.1))
    return Engine(model, 1e-4, EngineSettings(**settings))


def batches(parts: int = 2) -> list[Batch]:
    """Return `parts` batches of two rows of 32 tokens, which are all 0, on the CPU."""
    return [causal_batch(torch.zeros(2, 32, dtype=torch.int64)) for _ in range(parts)]
