"""A run's metrics as TensorBoard's events."""

from __future__ import annotations

import threading
from pathlib import Path

from .metrics import Metrics


class TensorBoard:
    """Writer of events. Its thread meets a full disk; the next call raises that error, and no traceback is printed."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self._hook = threading.excepthook
        threading.excepthook = self._ignore
        self._writer = SummaryWriter(str(folder), purge_step=step)

    def _ignore(self, raised: threading.ExceptHookArgs) -> None:
        if not type(raised.thread).__module__.startswith("tensorboard."):
            self._hook(raised)

    def add(self, line: Metrics) -> None:
        for name, value in line.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(line["step"]))

    def close(self) -> None:
        self._writer.close()

    def release(self) -> None:
        """Let other threads' exceptions be printed as before."""
        threading.excepthook = self._hook
