"""Test the error messages for mistakes that users make on a GPU, as far as the stand-in for CUDA can show them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt_fast import GPTConfig, GPTForCausalLM, generate, ops
from tools.fakecuda.__main__ import environment

if os.environ.get("FAKECUDA_CAPABILITY", "90") != "90":
    pytest.skip("bad input is tried as sm_90", allow_module_level=True)

LIBRARY = Path(os.environ.get("TRITON_LIBCUDA_PATH", "."))


LAYER_NORM = (
    "import torch; from gpt_fast import ops\n"
    "try: ops.layer_norm(torch.zeros(4, 8, device='cuda'))\n"
    "except RuntimeError as error: print(error)"
)

WITHOUT_CC = f"import os; os.environ.pop('CC', None)\n{LAYER_NORM}"


def on_another_machine(code: str, variables: dict[str, str] | None = None, **machine: int) -> str:
    """Return what `code` prints on a stand-in for another machine, with changed environment variables."""
    changed = environment(LIBRARY, **machine) | (variables or {})
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=changed)
    return done.stdout


def test_a_model_and_its_tokens_on_two_devices(device: torch.device) -> None:
    with torch.device(device):
        model = GPTForCausalLM(
            GPTConfig.preset("gpt2", num_layers=1, hidden_dim=64, num_heads=1, num_tokens=64, seq_len=32)
        )
    tokens = torch.zeros(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=rf"embedding: got tokens on cpu, token_weight on {device}"):
        model(tokens, tokens)
    with pytest.raises(ValueError, match=rf"generate: tokens is on cpu; expected {device}, as the model"):
        generate(model, tokens, max_new_tokens=2)


def test_weights_on_another_device_than_x(device: torch.device) -> None:
    x, weight = torch.zeros(4, 8, device=device), torch.zeros(8)
    with pytest.raises(ValueError, match=rf"layer_norm: got x on {device}, weight on cpu, bias on cpu"):
        ops.layer_norm(x, weight, weight)


def test_a_card_that_is_too_old() -> None:
    assert "Tesla T4 has compute capability 7.5" in on_another_machine(LAYER_NORM, capability=75)


def test_no_triton() -> None:
    printed = on_another_machine(f"import sys; sys.modules['triton'] = None\n{LAYER_NORM}")
    expected = "gpt_fast.layer_norm: Triton is not installed; expected it for CUDA tensors: pip install triton"
    assert printed.splitlines() == [expected]


def compiler(folder: Path, script: str = "") -> dict[str, str]:
    """Return the environment variables of a new machine whose `gcc` is the shell script `script`, or missing."""
    (folder / "bin").mkdir()
    if script:
        (folder / "bin" / "gcc").write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (folder / "bin" / "gcc").chmod(0o755)
    return {"PATH": str(folder / "bin"), "TRITON_CACHE_DIR": str(folder / "cache")}


def test_no_compiler_for_tritons_launcher(tmp_path: Path) -> None:
    printed = on_another_machine(WITHOUT_CC, compiler(tmp_path))
    expected = (
        "gpt_fast.layer_norm: Triton found no C compiler; expected gcc or clang on PATH, or CC set to one "
        "(Debian and Ubuntu: apt install gcc)"
    )
    assert printed.splitlines() == [expected]
    doctor = (
        "import os; os.environ.pop('CC', None); from gpt_fast_cli.doctor import examine; print(examine()['advice'])"
    )
    assert "no C compiler is found" in on_another_machine(doctor, {"PATH": str(tmp_path)})


def test_a_compiler_without_pythons_headers(tmp_path: Path) -> None:
    printed = on_another_machine(WITHOUT_CC, compiler(tmp_path, "exit 1"))
    expected = (
        f"gpt_fast.layer_norm: Triton's launcher was not compiled, {tmp_path / 'bin' / 'gcc'} ended with 1; "
        "expected a C compiler and Python's headers (Debian and Ubuntu: apt install gcc python3-dev)"
    )
    assert printed.splitlines() == [expected]


def test_a_driver_older_than_the_toolkit() -> None:
    code = "from gpt_fast_cli.doctor import examine; print(examine()['advice'])"
    assert "driver on your system is too old (found version 12080)" in on_another_machine(code, driver=12080)


def test_a_card_without_enough_memory() -> None:
    """PyTorch's own message, which names the sizes, reaches the user."""
    code = (
        "import torch; from gpt_fast import ops\n"
        "x = torch.zeros(1 << 27, 3, device='cuda')\n"  # takes 1.5 of the 2 GB
        "try: ops.layer_norm(x)\n"
        "except torch.OutOfMemoryError as error: print(error)"
    )
    assert "CUDA out of memory. Tried to allocate 1.50 GiB" in on_another_machine(code, memory=2)
