"""Peak memory of a call, and how much memory is available."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(device: str, run: Callable[[], object]) -> int | None:
    """Return the bytes that one call adds at its highest point; None if the system does not tell.

    On CUDA this is what PyTorch's allocator handed out. On Linux it is the growth of the process after freed memory was
    given back, so scratch space of any library counts.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not _CLEAR_REFS.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")  # forgets the highest point so far
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in _STATUS.read_text("ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


def available_memory(device: str) -> int:
    """Return the bytes that a program may still allocate."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 1 << 62
    fields = dict(line.split(":") for line in meminfo.read_text("ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10
