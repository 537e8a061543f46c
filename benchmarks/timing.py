"""Timing on one device: the floors that figures are compared with, and what pytest-benchmark needs for a GPU."""

import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

FLUSH_BYTES = 512 << 20  # several times any L2; clearing it also keeps the GPU busy while the next launch is prepared


class Stamp:
    """A point in the GPU's work. Subtracting an earlier one waits for both and gives seconds between them."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Stamp") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def flush(device: str) -> Callable[[], None] | None:
    """What empties the L2 before each round; on a CPU nothing, where small shapes stay cached as they do in a model."""
    if device != "cuda":
        return None
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def run() -> None:
        buffer.zero_()

    return run


def clock(device: str) -> Callable:
    """What to read before and after; the difference is in seconds."""
    return Stamp if device == "cuda" else time.perf_counter


@dataclass(frozen=True)
class Floor:
    """Work that nothing does faster here: a copy, a read, a matrix product."""

    name: str
    bytes: int
    flops: int
    build: Callable[[], Callable[[], object]]


def floors(device: str) -> list[Floor]:
    size = (1 << 30) if device == "cuda" else (256 << 20)
    n = 8192 if device == "cuda" else 1024
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)

    def values() -> torch.Tensor:
        return torch.randn(size // 4, device=device)

    def copy() -> Callable[[], object]:
        source, target = values(), torch.empty(size // 4, device=device)
        return lambda: target.copy_(source)

    def read() -> Callable[[], object]:
        return values().sum

    def product(dtype: torch.dtype) -> Callable[[], object]:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return lambda: a @ b

    return [
        Floor("copy", 2 * size, 0, copy),
        Floor("read", size, 0, read),
        *(
            Floor(f"matmul {str(dtype).removeprefix('torch.')}", 0, 2 * n**3, partial(product, dtype))
            for dtype in dtypes
        ),
    ]


def device_name(device: str) -> str:
    """The GPU's or the CPU's name, with the number of CPU threads used."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line for line in cpuinfo.read_text("utf-8").splitlines() if line.startswith("model name")]
        model = names[0].partition(":")[2].strip() if names else model
    return f"{model}, {torch.get_num_threads()} threads of {os.cpu_count()}"
