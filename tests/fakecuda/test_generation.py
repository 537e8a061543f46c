"""Generation on `cuda`: prompts, then captured steps, with every option."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpt_fast import DecodeSession, GPTConfig, GPTForCausalLM, generate

if os.environ.get("FAKECUDA_CAPABILITY", "90") != "90":
    pytest.skip("whole models run as sm_90", allow_module_level=True)

SIZES: dict[str, Any] = {"num_layers": 2, "hidden_dim": 128, "num_heads": 2, "num_tokens": 512, "seq_len": 64}
NEW = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sample": {},
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.9},
    "min_p": {"min_p": 0.1},
    "penalty": {"repetition_penalty": 1.3},
    "all": {"top_k": 9, "top_p": 0.8, "repetition_penalty": 1.2, "stop_tokens": [3]},
    "stream": {"stream": lambda piece: None},
}


def model_on(device: torch.device, dtype: torch.dtype) -> GPTForCausalLM:
    with torch.device(device):
        return GPTForCausalLM(GPTConfig.preset("gpt2", **SIZES)).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [*OPTIONS, "mask"])
def test_steps_are_captured_once_and_replayed(
    name: str, dtype: torch.dtype, device: torch.device, watched: Callable
) -> None:
    model, prompt = model_on(device, dtype), torch.ones(2, 9, dtype=torch.int64, device=device)
    options = OPTIONS.get(name) or {"key_mask": torch.ones_like(prompt, dtype=torch.bool)}
    with watched(waits=True) as seen:
        generate(model, prompt, max_new_tokens=NEW, **options)
    assert len(seen.of("graph")) == NEW - 1  # the prompt itself gives the first token
    assert {entry.name for entry in seen.of("triton") if entry.captured} >= {"_fwd_kernel", "_add_kernel"}


def test_a_step_of_a_session_is_one_graph(device: torch.device, watched: Callable) -> None:
    """The public step looks at the values of its tokens and logits, which waits for the device."""
    model, prompt = model_on(device, torch.bfloat16), torch.ones(2, 9, dtype=torch.int64, device=device)
    session = DecodeSession(model, batch=2)
    with torch.inference_mode():
        session.prefill(prompt)
        session.step(prompt[:, 0].contiguous())
        with watched(waits=True) as seen:
            session.step(prompt[:, 0].contiguous())
    assert len(seen.of("graph")) == 1
    assert seen.of("triton") == [], "expected every kernel of the step inside the graph"
