"""Fixtures of the tests on the stand-in for CUDA (tools/fakecuda), which `make fake-gpu` runs.

The stand-in runs no kernel, so the tests never check values. They check which kernels are launched, on which device,
which calls CUDA would refuse, and when the host waits for the device.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch

from tools.fakecuda import record

PRESENT = record.is_present()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if PRESENT:
        return
    for item in items:
        if "fakecuda" in item.path.parts:
            item.add_marker(pytest.mark.skip(reason="no stand-in for CUDA: make fake-gpu"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> None:
    """Replace the fixture that fills memory with NaN: filling would add launches, and no values are checked here."""


@pytest.fixture
def device() -> torch.device:
    """Return the last device. If there are two, the current device is the other one."""
    torch.cuda.set_device(0)
    return torch.device("cuda", torch.cuda.device_count() - 1)


@pytest.fixture
def watched(device: torch.device) -> Callable:
    """Return a context in which no call is refused, everything runs on `device`, and the host does not wait for it.

    `waits=True` allows the host to wait.
    """

    @contextlib.contextmanager
    def watch(waits: bool = False) -> Iterator[record.Seen]:
        with record.watch() as seen:
            yield seen
        assert seen.refusals == []
        elsewhere = [entry for entry in seen.entries if entry.device != device.index]
        assert not elsewhere, f"expected everything on {device}"
        if not waits:
            assert [entry.name for entry in seen.of("sync")] == []

    return watch
