"""Read the record of the stand-in: `with watch() as seen: ...`, then `seen.entries` and `seen.refusals`.

`torch` must not be imported here: a process without the stand-in asks `is_present` first.
"""

import contextlib
import ctypes
import os
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

LAUNCHES = ("kernel", "triton", "cublas", "copy", "fill", "graph")  # kinds of entries that take time on a device


class Entry(NamedTuple):
    """One thing that a device was asked to do, or one time that the host waited for it."""

    kind: str  # of LAUNCHES, "callback" or "sync"
    name: str
    grid: tuple[int, ...]
    block: tuple[int, ...]
    shared: int  # bytes of dynamic shared memory
    device: int
    captured: bool
    stream: int


@dataclass
class Seen:
    """Record of a block. Both lists are filled when it ends."""

    entries: list[Entry] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)

    def of(self, *kinds: str) -> list[Entry]:
        """Return the recorded entries of these kinds, in their order.

        An `Entry` is a thing that a pretended GPU had to do, or a time that the host waited for it. A kind is "kernel",
        "triton", "cublas", "copy", "fill", "graph", "callback" or "sync" (the host waited).
        """
        return [entry for entry in self.entries if entry.kind in kinds]

    def launches(self) -> list[Entry]:
        """Return the recorded entries that take time on a pretended GPU, in their order.

        These are kernels, copies, fills, calls of cuBLAS and graphs, but not callbacks and waits of the host.
        """
        return self.of(*LAUNCHES)

    def counts(self) -> dict[str, int]:
        """Return {kind: number of recorded entries}, sorted by kind. Kinds that did not occur are missing.

        A kind is what a pretended GPU had to do, such as "kernel" or "copy". "sync" counts waits of the host.
        """
        return dict(sorted(Counter(entry.kind for entry in self.entries).items()))


def is_present() -> bool:
    """Return True if the library that pretends to be CUDA's driver is loaded into this process."""
    return "libcuda.so.1" in os.environ.get("LD_PRELOAD", "") and hasattr(ctypes.CDLL(None), "fakecuda_write")


@contextlib.contextmanager
def watch() -> Iterator[Seen]:
    """Record what the block asks of the pretended GPUs. Yield a `Seen`, which is filled when the block ends or raises.

    A `Seen` has `entries`, one for each thing that a device was asked to do or that the host waited for, and
    `refusals`, texts of errors. What was recorded before the block is dropped. The process must have the stand-in for
    CUDA's driver loaded. Raise `OSError` if the record cannot be written to a temporary file.
    """
    library, seen = ctypes.CDLL(None), Seen()
    library.fakecuda_reset()
    try:
        yield seen
    finally:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "record")
            if library.fakecuda_write(str(path).encode()):
                raise OSError(f"tools.fakecuda: {path} cannot be written")
            for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
                kind, *fields = line.split("\t")
                if kind == "refusal":
                    seen.refusals.append(fields[0])
                else:
                    seen.entries.append(_entry(fields))


def _entry(fields: list[str]) -> Entry:
    """Return the `Entry` of one line of the record, given the line's tab-separated fields after the first one.

    They are kind, name, grid, block, bytes of shared memory, device, "1" if captured, and stream in hexadecimal.
    """
    kind, name, grid, block, shared, device, captured, stream = fields
    return Entry(kind, name, _sides(grid), _sides(block), int(shared), int(device), captured == "1", int(stream, 16))


def _sides(text: str) -> tuple[int, ...]:
    """Return the sizes of a grid or block as integers, given text such as "1,2,3"."""
    return tuple(int(side) for side in text.split(","))
