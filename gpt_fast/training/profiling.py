"""A trace of a few updates for Chrome's trace viewer, by PyTorch's profiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import profiler

from .runs.folder import write_extra

FILE = "profile.json"
WAIT, WARMUP, ACTIVE = 5, 2, 3  # updates that pass first, that warm the profiler up, and that are recorded


def trace(folder: Path, updates: int, say: Callable[[str], None]) -> profiler.profile:
    """Return a profiler that writes `profile.json` into `folder`. Call its `step` after each of `updates` updates.

    The profiler is a context manager, which has to be entered. It records three updates after the first seven. If there
    are fewer than ten updates, it records the last three, or all if there are fewer than three. `say` gets one line
    when the file is written. A file that cannot be written is only a warning. `updates` is 1 or more.
    """
    active = min(ACTIVE, updates)
    warmup = min(WARMUP, updates - active)
    wait = min(WAIT, updates - active - warmup)

    def write(finished: profiler.profile) -> None:
        if write_extra(folder / FILE, lambda path: finished.export_chrome_trace(str(path))):
            say(f"{folder / FILE}: a trace of updates; open it at https://ui.perfetto.dev or chrome://tracing")

    schedule = profiler.schedule(wait=wait, warmup=warmup, active=active, repeat=1)
    return profiler.profile(schedule=schedule, on_trace_ready=write)
