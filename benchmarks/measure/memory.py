"""Peak memory of a call, and how much memory is available."""

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path

import torch

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(device: str, run: Callable[[], object]) -> int | None:
    """Call `run` once. Return its peak memory in bytes beyond what was in use before, or None.

    On "cuda" this is what PyTorch's allocator handed out, and its peak is reset before. On a CPU it is the growth of
    the process, at least 0, so scratch space of any library counts. Freed memory is given back to the system before.
    This needs Linux: elsewhere `run` is not called, and the result is None.
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
    """Return the field of /proc/self/status named `field`, such as "VmRSS", in bytes.

    Raise `AssertionError` if it is missing.
    """
    for line in _STATUS.read_text("ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


def available_memory(device: str) -> int:
    """Return the bytes that a program may still allocate on the device, "cpu" or "cuda".

    On a GPU it is the memory that the driver reports as free. Memory that PyTorch's allocator keeps for reuse is not
    counted. On a CPU it is Linux's estimate in /proc/meminfo, or 1 << 62, which never limits, if there is no such file.
    """
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 1 << 62
    fields = dict(line.split(":") for line in meminfo.read_text("ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10
