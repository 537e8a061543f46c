"""Test `gpt-fast warmup`: it compiles the kernels that training and generation then load, in any process."""

import gc
import os
from pathlib import Path

import pytest
import torch

from gpt_fast import GPTConfig, GPTForCausalLM, generate
from gpt_fast.data.batches import causal_batch
from gpt_fast.training.engine.update import Engine, EngineSettings
from gpt_fast.training.warmup import Compiled, warm

triton = pytest.importorskip("triton")

if os.environ.get("FAKECUDA_CAPABILITY", "90") != "90" or os.environ.get("FAKECUDA_DEVICES", "1") != "1":
    pytest.skip("kernels are compiled once, as sm_90", allow_module_level=True)

CONFIG = GPTConfig.preset("gpt2", num_layers=3, hidden_dim=128, num_heads=2, num_tokens=512, seq_len=64)


@pytest.fixture
def forgetful(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of an empty Triton cache, and clear the kernels that this process has loaded."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    forget()
    return tmp_path


def forget() -> None:
    """Clear the kernels that this process has loaded, of all of Triton's functions."""
    for function in gc.get_objects():
        if issubclass(type(function), triton.runtime.jit.JITFunction):  # isinstance fails for some dead weak references
            function.device_caches.clear()


def test_what_is_compiled_is_what_is_needed(forgetful: Path) -> None:
    """After the warm-up, training and generation with a model of three layers compile no more kernels."""
    first = warm(CONFIG, batch_size=2, precision="bfloat16")
    assert first["cache"] == str(forgetful)
    assert first["training"]["compiled"] > 10
    assert first["generation"]["compiled"] > 0
    forget()
    second = warm(CONFIG, batch_size=2, precision="bfloat16")
    assert second["training"]["compiled"] == second["generation"]["compiled"] == 0
    assert second["training"]["found"] == first["training"]["compiled"] + first["training"]["found"]
    forget()
    counter = Compiled()
    triton.knobs.compilation.listener, before = counter, triton.knobs.compilation.listener
    try:
        with torch.device("cuda"):
            model = GPTForCausalLM(CONFIG)
        engine = Engine(model, 1e-4, EngineSettings(precision="bfloat16"))
        for _ in range(2):
            engine.update([causal_batch(torch.zeros(2, 64, dtype=torch.int64))], 1e-4)
        generate(model.eval(), torch.zeros(1, 17, dtype=torch.int64, device="cuda"), max_new_tokens=4)
    finally:
        triton.knobs.compilation.listener = before
    assert (counter.compiled, counter.found > 10) == (0, True)
