"""A process that computes in an endless loop, to measure beside."""

import contextlib
import subprocess
import sys
from collections.abc import Iterator

import torch

# It ends by itself if the suite is killed: its parent is then another process.
_LOOP = """
import os
parent = os.getppid()
print(flush=True)
while os.getppid() == parent:
    for _ in range(100_000):
        pass
"""


@contextlib.contextmanager
def busy_process() -> Iterator[subprocess.Popen]:
    """Run a process that computes in an endless loop during the block, and yield it. Kill it when the block ends.

    The block starts after the process has started to loop. If this program is killed, the process ends by itself.
    """
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", _LOOP], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()  # it loops from now on
        yield process
    finally:
        process.kill()
        process.communicate()


@contextlib.contextmanager
def threads(number: int) -> Iterator[None]:
    """Set the number of PyTorch's threads to `number` in the block, and back to the earlier number after it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)
