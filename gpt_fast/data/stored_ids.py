"""Token ids in a file, read where they are asked for.

A file that shrinks under a memory map kills the process (SIGBUS). So nothing is mapped: each read asks the system for
its bytes, and compares the file with what it was when it was opened.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np


class StoredIds:
    """Token ids in a file, or a part of them. `ids[a:b]` reads some into an array; `ids.part(a, b)` reads nothing yet.

    `count` ids of type `dtype` begin at byte `offset` of the file at `path`. A read raises `ValueError` if the file's
    size or time of change differs from when it was opened.
    """

    def __init__(self, path: Path, dtype: np.dtype[Any], offset: int, count: int):
        self._opened = _Opened(path)
        self.dtype, self._offset, self._count = dtype, offset, count

    def __len__(self) -> int:
        return self._count

    def part(self, start: int, stop: int) -> StoredIds:
        """Return the ids from index `start` up to `stop` as another `StoredIds`. Nothing is read from the file yet.

        As in a slice, negative indices count from the end, and indices beyond the end are cut off. Both objects share
        the open file.
        """
        start, stop, _ = slice(start, stop).indices(self._count)
        part = object.__new__(StoredIds)
        part._opened, part.dtype = self._opened, self.dtype
        part._offset, part._count = self._offset + start * self.dtype.itemsize, max(0, stop - start)
        return part

    def __getitem__(self, which: slice) -> np.ndarray:
        """Read the ids of a slice from the file into an array of the file's type of ids. The slice's step is ignored.

        A single index is not supported. Raise `ValueError` if the file has changed since it was opened.
        """
        start, stop, _ = which.indices(self._count)
        ids = np.empty(max(0, stop - start), self.dtype)
        if len(ids):
            self._opened.read(ids.data.cast("B"), self._offset + start * self.dtype.itemsize)
        return ids

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:].astype(dtype or self.dtype, copy=False)


class _Opened:
    """Open file, with the size and the time of change that it had when it was opened."""

    def __init__(self, path: Path):
        self._path = path
        self._file: BinaryIO = path.open("rb", buffering=0)
        self._state = self._now()

    def _now(self) -> tuple[int, int]:
        """Return the current size of the open file in bytes and its time of change in nanoseconds."""
        status = os.fstat(self._file.fileno())
        return status.st_size, status.st_mtime_ns

    def read(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` with the file's bytes from `offset` on.

        Raise `ValueError` if the file ends before that, or if its size or time of change differs from when it was
        opened.
        """
        handle, left = self._file.fileno(), buffer
        while len(left):
            count = os.preadv(handle, [left], offset)
            if count == 0:
                break
            left, offset = left[count:], offset + count
        now = self._now()
        if now != self._state or len(left):
            raise ValueError(
                f"{self._path}: changed while it was read, from {self._state[0]:,} to {now[0]:,} bytes; expected the "
                "file as it was when it was opened"
            )
