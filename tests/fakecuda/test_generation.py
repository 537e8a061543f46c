"""Test generation on `cuda` with every option: the prompt runs eagerly, the steps as a captured graph."""

import inspect
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpt_fast import DecodeSession, GPTConfig, GPTForCausalLM, generate
from gpt_fast.generation import text
from tests.fakecuda.small import SIZES

if os.environ.get("FAKECUDA_CAPABILITY", "90") != "90":
    pytest.skip("whole models run as sm_90", allow_module_level=True)

NEW = 6
Options = Callable[[Tensor], dict[str, Any]]
OPTIONS: dict[str, Options] = {
    "greedy": lambda prompt: {"temperature": 0},
    "sample": lambda prompt: {},
    "seed": lambda prompt: {"seed": 3, "temperature": 0.7},
    "top_k": lambda prompt: {"top_k": 5},
    "top_p": lambda prompt: {"top_p": 0.9},
    "min_p": lambda prompt: {"min_p": 0.1},
    "penalty": lambda prompt: {"repetition_penalty": 1.3},
    "processors": lambda prompt: {"logits_processors": [lambda tokens, logits: logits + 1]},
    "stop": lambda prompt: {"stop_tokens": [3]},
    "lengths": lambda prompt: {"lengths": torch.tensor([9, 5], device=prompt.device)},
    "key_mask": lambda prompt: {"key_mask": torch.ones_like(prompt, dtype=torch.bool)},
    "attention_mask": lambda prompt: {"attention_mask": torch.ones_like(prompt)},
    "sliding": lambda prompt: {"sliding": True},
    "stream": lambda prompt: {"stream": lambda piece: None},
    "scores": lambda prompt: {"return_scores": True},
    "all": lambda prompt: {
        "top_k": 9, "top_p": 0.8, "min_p": 0.05, "repetition_penalty": 1.2, "stop_tokens": [3], "seed": 1,
        "logits_processors": [lambda tokens, logits: logits], "key_mask": torch.ones_like(prompt, dtype=torch.bool),
        "stream": lambda piece: None, "return_scores": True,
    },
}  # fmt: skip


def model_on(device: torch.device, dtype: torch.dtype) -> GPTForCausalLM:
    with torch.device(device):
        return GPTForCausalLM(GPTConfig.preset("gpt2", **SIZES)).to(dtype).eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_are_captured_once_and_replayed(
    name: str, dtype: torch.dtype, device: torch.device, watched: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text, "_check_processed", lambda *args: None)  # the stand-in computes no values to check
    model, prompt = model_on(device, dtype), torch.ones(2, 9, dtype=torch.int64, device=device)
    options = OPTIONS[name](prompt)
    with watched(waits=True) as seen:
        generate(model, prompt, max_new_tokens=NEW, **options)
    assert len(seen.of("graph")) == NEW - 1  # the prompt itself gives the first token
    assert {entry.name for entry in seen.of("triton") if entry.captured} >= {"_fwd_kernel", "_add_kernel"}


def test_a_step_of_a_session_is_one_graph(device: torch.device, watched: Callable) -> None:
    """A step is one graph. The public `step` also checks values of tokens and logits, so it waits for the device."""
    model, prompt = model_on(device, torch.bfloat16), torch.ones(2, 9, dtype=torch.int64, device=device)
    session = DecodeSession(model, batch=2)
    with torch.inference_mode():
        session.prefill(prompt)
        session.step(prompt[:, 0].contiguous())
        with watched(waits=True) as seen:
            session.step(prompt[:, 0].contiguous())
    assert len(seen.of("graph")) == 1
    assert seen.of("triton") == [], "expected every kernel of the step inside the graph"


def test_an_option_of_generate_without_a_case_is_noticed() -> None:
    """Every option of `generate` has a case, except the model, the prompt and `weights`, which only CPUs take.

    `session` has its own test.
    """
    prompt = torch.ones(2, 9, dtype=torch.int64)
    tried = {name for options in OPTIONS.values() for name in options(prompt)}
    known = set(inspect.signature(generate).parameters)
    assert known - tried == {"model", "tokens", "max_new_tokens", "weights", "session"}


def test_chat_turns_keep_the_captured_step(device: torch.device, watched: Callable) -> None:
    model, prompt = model_on(device, torch.bfloat16), torch.ones(2, 9, dtype=torch.int64, device=device)
    session = DecodeSession(model, batch=2)
    generate(model, prompt, max_new_tokens=NEW, session=session)
    with watched(waits=True) as seen:
        generate(model, prompt, max_new_tokens=NEW, session=session)
    assert len(seen.of("graph")) == NEW, "expected a replay for each token, the last one included"
    assert [entry for entry in seen.of("triton") if entry.captured] == [], "expected no second capture"


def test_a_full_row_is_read_anew(device: torch.device, watched: Callable) -> None:
    """Beyond `seq_len`, the later half of a row is read again as a prompt. The other steps are graphs."""
    model = model_on(device, torch.bfloat16)
    prompt = torch.ones(2, SIZES["seq_len"] - 3, dtype=torch.int64, device=device)
    with watched(waits=True) as seen:
        generate(model, prompt, max_new_tokens=NEW, sliding=True)
    assert NEW - 2 <= len(seen.of("graph")) <= NEW - 1
