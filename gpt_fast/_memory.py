"""The memory that this process may still take."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Iterator
from pathlib import Path

UNKNOWN = 1 << 62


def available(root: Path = Path("/")) -> int:
    """Return the number of bytes that this process may still take.

    It is the least of three: what the machine has available, what the control groups (cgroups) of the process leave,
    and what its limit of address space (RLIMIT_AS) leaves. One that is unknown or unlimited is left out. The result is
    `UNKNOWN`, 2^62, if all three are. `root` is the folder that contains proc and sys.
    """
    return min(UNKNOWN, *_machine(root), *_control_groups(root), *_address_space(root))


def keep_freed() -> bool:
    """Make the C library keep freed memory instead of giving it back to the system, for the whole process.

    Return True if it does, and False if the C library cannot or refuses. glibc gives each large block back. The next
    block is made of new pages, each of which is cleared. This takes 2 to 4 % of a training step on a CPU, which
    allocates the same sizes again and again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    trim_threshold, mmap_max = -1, -4  # from malloc.h
    return bool(mallopt(mmap_max, 0) and mallopt(trim_threshold, 2**31 - 1))


def size(count: int) -> str:
    """Return `count` bytes as text for a message: "1.5 GB", or in MB, such as "12.3 MB", below 0.1 GB.

    1 GB is 10^9 bytes.
    """
    return f"{count / 1e9:,.1f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def utf8_size(text: str) -> int:
    """Return the number of bytes of a text in UTF-8. A lone surrogate, which UTF-8 cannot hold, counts as one byte."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "replace"))


def _machine(root: Path) -> Iterator[int]:
    """Yield the bytes that the machine has available, by proc/meminfo below `root`, or nothing if unknown."""
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) << 10


def _control_groups(root: Path) -> Iterator[int]:
    """Yield the bytes that each control group (cgroup v1 or v2) around this process leaves, the process's own first.

    They are the group's limit less its use, at least 0. Page cache counts as free. A group without a limit yields
    nothing. `root` is the folder that contains proc and sys.
    """
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, path = line.rstrip("\n").split(":", 2)
        if controllers == "":
            top, names = root / "sys/fs/cgroup", ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            top = root / "sys/fs/cgroup/memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = Path(path.strip("/"))
        for folder in dict.fromkeys(top / part for part in (group, *group.parents)):
            limit, used = (next(_lines(folder / name), "").strip() for name in names[:2])
            if limit.isdecimal() and used.isdecimal():
                cached = 0
                for entry in _lines(folder / "memory.stat"):
                    name, _, count = entry.partition(" ")
                    if name in (f"{names[2]}inactive_file", f"{names[2]}active_file"):
                        cached += int(count)
                yield max(0, int(limit) - max(0, int(used) - cached))


def _address_space(root: Path) -> Iterator[int]:
    """Yield the bytes that RLIMIT_AS, a limit of address space, leaves this process, or nothing without such a limit.

    `root` is the folder that contains proc, where the size of the process is read.
    """
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    if limit != resource.RLIM_INFINITY:
        used = int(next(_lines(root / "proc/self/statm"), "0").split()[0]) * os.sysconf("SC_PAGE_SIZE")
        yield max(0, limit - used)


def _lines(path: Path) -> Iterator[str]:
    """Yield the lines of a system file such as /proc/meminfo, without line ends.

    Yield none if it is missing or unreadable.
    """
    if path.is_file() and os.access(path, os.R_OK):
        yield from path.read_text("ascii", errors="replace").splitlines()
