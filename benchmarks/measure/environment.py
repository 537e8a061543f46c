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
from gpt_fast.ops._products import cpu_model

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

    `name` is the device's full name, which must contain a known model, such as "H200". The keys are the names of
    measured rates: "copy", "matmul bfloat16" and "matmul float32".
    """
    return next((rates for part, rates in DATA_SHEETS.items() if re.search(rf"\b{part}\b", name)), {})


def device_name(device: str) -> str:
    """Return the GPU's name for "cuda", else a text of the CPU's model, its instructions and its threads.

    The text is such as "<model> (AVX512, bf16, int8), 8 threads of 16". The instructions are the widest vectors that
    PyTorch uses, and "bf16" and "int8" if the CPU has instructions for products of such matrices: virtual machines show
    different instructions under one model name. The threads are PyTorch's, of all logical CPUs of the machine.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    vectors = torch.backends.cpu.get_cpu_capability()
    products = [name for name, has in (("bf16", bf16_products(device)), ("int8", int8_products())) if has]
    threads = torch.get_num_threads()
    instructions = ", ".join([vectors, *products])
    return f"{cpu_model()} ({instructions}), {threads} {'thread' if threads == 1 else 'threads'} of {os.cpu_count()}"


def slug(device: str) -> str:
    """Return a device's name as the name of a folder: lower-case letters and digits, all else becomes single hyphens.

    No hyphen is at the start or the end.
    """
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def describe(device: str, cpu_time: bool = False) -> dict[str, Any]:
    """Return {"device", "versions", "commit"}, the facts that every results file holds.

    "device" has "type" ("cpu" or "cuda"), "name", "slug" (the name as a folder) and "bf16_products" (bool). For a CPU
    it also has "int8_products" (bool) and "extension", a dict on the build of the C++ extension, or None without it.
    In "extension", "vector" is the instruction set, such as "AVX512", and "compiler" is the compiler as text.
    "versions" maps "python", "torch", each of PACKAGES (None if it is not installed), and on a GPU "cuda" to versions.
    "commit" is {"id", "dirty"}: the hash, and whether files that affect a measurement differ from it.

    `device` is "cpu" or "cuda". With `cpu_time` the name ends in ", CPU time", because times are then CPU seconds.
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
    """Return {"id", "dirty"}: the hash of the checkout's commit, and whether files differ from it.

    "dirty" is a bool; only source files that affect a measurement count, also untracked ones. Both are None if git is
    missing or the tree is no repository.
    """
    found = _git("rev-parse", "HEAD")
    changed = _git(
        "status", "--porcelain", "--", "csrc", "gpt_fast", "kernels", "benchmarks/*.py", "benchmarks/*.cpp", "setup.py"
    )
    return {"id": found, "dirty": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    """Run git with these arguments in this checkout. Return its stripped output, or None if git is missing or fails."""
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
