"""Facts that a figure depends on besides the code: device, versions, commit."""

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from benchmarks.measure.floors import bf16_products, int8_products
from gpt_fast import build_info

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("triton", "transformers", "liger-kernel", "openvino", "nncf", "ctranslate2", "onnxruntime")


# Bytes and dense operations a second by the vendors' data sheets, for devices whose name contains the key. Pages show
# them beside the measured rates; shares are never taken of them.
DATA_SHEETS = {
    "A100-SXM4-40GB": {"copy": 1.555e12, "matmul bfloat16": 312e12, "matmul float32": 19.5e12},
    "A100-SXM4-80GB": {"copy": 2.039e12, "matmul bfloat16": 312e12, "matmul float32": 19.5e12},
    "H100 80GB HBM3": {"copy": 3.35e12, "matmul bfloat16": 989e12, "matmul float32": 67e12},
    "H200": {"copy": 4.8e12, "matmul bfloat16": 989e12, "matmul float32": 67e12},
}


def data_sheet(name: str) -> dict[str, float]:
    """Return the rates that the vendor states for a device, in bytes or FLOPs a second; {} for an unknown device.

    The keys are the names of the measured rates, such as "copy" and "matmul bfloat16". `name` is the device's full
    name, as `device_name` returns it.
    """
    return next((rates for part, rates in DATA_SHEETS.items() if re.search(rf"\b{part}\b", name)), {})


def device_name(device: str) -> str:
    """Return the GPU's name, or the CPU's model name with its instructions and the number of PyTorch's threads.

    The instructions are the widest vectors that PyTorch uses, and "bf16" and "int8" if the CPU multiplies such matrices
    itself. Virtual machines show different instructions under one model name.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text("utf-8").splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    vectors = torch.backends.cpu.get_cpu_capability()
    products = [name for name, has in (("bf16", bf16_products(device)), ("int8", int8_products())) if has]
    threads = torch.get_num_threads()
    instructions = ", ".join([vectors, *products])
    return f"{model} ({instructions}), {threads} {'thread' if threads == 1 else 'threads'} of {os.cpu_count()}"


def slug(device: str) -> str:
    """Return a device's name as the name of a folder: lower-case letters and digits joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def describe(device: str, cpu_time: bool = False) -> dict[str, Any]:
    """Return {"device", "versions", "commit"}, the facts that every results file holds.

    "device" has the type, the name, the name as a folder (slug) and the low-precision matrix products that the hardware
    has; for a CPU also the vector width and compiler of the C++ extension, or None without it. "versions" has Python,
    PyTorch and each of PACKAGES, None if it is not installed. "commit" is the result of `commit`. With `cpu_time` the
    name ends in ", CPU time", because times are then CPU seconds.
    """
    info = build_info()
    name = device_name(device) + (", CPU time" if cpu_time else "")
    facts: dict[str, Any] = {
        "device": {"type": device, "name": name, "slug": slug(name), "bf16_products": bf16_products(device)},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{package: _version(package) for package in PACKAGES},
        },
        "commit": commit(),
    }
    if device == "cpu":
        facts["device"]["int8_products"] = int8_products()
    if device == "cuda":
        facts["versions"]["cuda"] = torch.version.cuda
    else:
        facts["device"]["extension"] = info and {"vector": info["vector"], "compiler": info["compiler"]}
    return facts


def commit() -> dict[str, Any]:
    """Return {"id", "dirty"}: the checkout's commit, and whether files that affect a measurement differ from it.

    Both are None if git is missing or the tree is no repository.
    """
    found = _git("rev-parse", "HEAD")
    changed = _git(
        "status", "--porcelain", "--", "csrc", "gpt_fast", "kernels", "benchmarks/*.py", "benchmarks/*.cpp", "setup.py"
    )
    return {"id": found, "dirty": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    """Return what git prints in this checkout, or None if git is missing or fails."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):  # no git, or a tree that is no repository
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    """Return the version of an installed package, or None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
