"""Facts that hold for a whole benchmark run, stored once in its JSON."""

import importlib.metadata
import platform

import torch

from benchmarks.cases import cases, device_type
from benchmarks.peers import PEERS
from benchmarks.timing import device_name
from gpt_fast import _extension


def _version(package: str) -> str | None:
    found = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
    return importlib.metadata.version(package) if package in found else None


def pytest_benchmark_update_machine_info(config, machine_info):
    device = device_type()
    machine_info["device"] = device_name(device)
    machine_info["device_type"] = device
    machine_info["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "liger-kernel": _version("liger-kernel"),
    }
    machine_info["extension"] = _extension.build_info()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Who was not measured, and why: the report names them."""
    reasons = {
        (case.op.name, peer.name, peer.missing(case))
        for case in cases(device_type())
        for peer in PEERS[case.op.name]
        if peer.missing(case)
    }
    output_json["missing"] = [{"op": op, "peer": peer, "reason": reason} for op, peer, reason in sorted(reasons)]
