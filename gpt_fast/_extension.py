"""Finds and loads `gpt_fast._C`, the optional C++ extension."""

import importlib
import json
import os
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import torch

_FOLDER = Path(__file__).resolve().parent


def build_info() -> dict[str, Any] | None:
    """What this tree's extension was built with and for, read without loading it; None when it is not built."""
    # Searched for in this folder alone: an editable install of another checkout would offer its own `_C`.
    if PathFinder.find_spec("gpt_fast._C", [str(_FOLDER)]) is None:
        return None
    return json.loads((_FOLDER / "_C.json").read_text(encoding="utf-8"))


def load() -> bool:
    """Load the extension, which registers the C++ kernels; False when it is not built or not wanted.

    Raises ImportError when it is built for another PyTorch or for instructions that this CPU lacks.
    """
    # Under the interpreter the Triton kernels serve the CPU, so that one test file checks either implementation;
    # an operator takes one kernel for a device, and ours would be the second.
    if os.environ.get("TRITON_INTERPRET") == "1":
        return False
    info = build_info()
    if info is None:
        return False
    _check(info)  # before the library is opened: its static initialisers may already use the instructions
    importlib.import_module("gpt_fast._C")
    return True


def _check(info: dict[str, Any]) -> None:
    mend = f"in {_FOLDER.parent}: make install" if (_FOLDER.parent / "setup.py").exists() else _REINSTALL
    if info["torch"] != torch.__version__:
        raise ImportError(
            f"gpt_fast._C was built against torch {info['torch']}, but this is torch {torch.__version__}. "
            f"Build it again {mend}"
        )
    cpu = _cpu_flags()
    missing = sorted(set(info["cpu_flags"]) - cpu)
    if cpu and missing:
        raise ImportError(
            f"gpt_fast._C was built for a CPU with {', '.join(missing)}, which this one lacks. "
            f"Build it again {mend} (GPT_FAST_PORTABLE=1 builds for any CPU with AVX2)"
        )


_REINSTALL = "with: pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation gpt-fast"


def _cpu_flags() -> set[str]:
    """Instruction sets of this CPU by Linux's names; empty where /proc/cpuinfo does not tell."""
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return set()
    for line in cpuinfo.read_text(encoding="utf-8").splitlines():
        if line.startswith("flags"):
            return set(line.partition(":")[2].split())
    return set()
