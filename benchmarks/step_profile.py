"""Profile a training step of GPT-2 124M, kernel by kernel: `python -m benchmarks.step_profile --out FILE`.

Each kernel's time, launches and share of a step are printed, the longest first, as PyTorch's profiler has them. A step
is timed without the profiler before. The time that its kernels do not account for is the device's wait for the host.
FILE gets the same as JSON. Without a kernel in the profile the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.catalogue import cases
from benchmarks.console import print_table, resolve_device
from benchmarks.jobs.training_step import TOPIC
from benchmarks.measure.calls import make_inputs
from benchmarks.measure.timing import clock
from benchmarks.topic import OURS

STEPS = 3


def seconds_of(step: Callable[[], object], device: str) -> float:
    """Return the mean seconds of a call of `step` on `device`, "cpu" or "cuda", over STEPS calls in a row."""
    now = clock(device)
    first = now()
    for _ in range(STEPS):
        step()
    return (now() - first) / STEPS


def kernels_of(step: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """Profile STEPS calls of `step`. Return a list with {"kernel", "launches", "us"} for each kernel, longest first.

    "kernel" is the kernel's name, and "launches" its mean number of launches in one step. "us" is the mean microseconds
    of all its launches in one step. On the device "cpu" an entry is an operator of PyTorch, without the operators that
    it calls. Entries that took no time are left out, so the list may be empty.
    """
    kind = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    with profile(activities=[kind]) as profiler:
        for _ in range(STEPS):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
    rows = []
    for event in profiler.key_averages():
        us = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        if us > 0:
            rows.append({"kernel": event.key, "launches": event.count / STEPS, "us": us / STEPS})
    return sorted(rows, key=lambda row: row["us"], reverse=True)


def report(seconds: dict[str, float], rows: list[dict[str, Any]], shown: int = 40) -> None:
    """Print a table of the kernels of a step on stdout, then a line with the times of the implementations.

    `seconds` maps the name of an implementation to the seconds of its step. `rows` are the kernels, each with its name
    "kernel", its "launches" and its microseconds "us" in a step, longest first. The table has the first `shown` of
    them; its shares are of all `rows`.
    """
    busy = sum(row["us"] for row in rows)
    table = [
        [row["kernel"][:100], f"{row['launches']:.1f}", f"{row['us']:.0f}", f"{100 * row['us'] / busy:.1f} %"]
        for row in rows[:shown]
    ]
    print_table(["kernel", "launches", "µs", "of all kernels"], table)
    times = ", ".join(f"{name} {1e3 * value:.2f} ms" for name, value in seconds.items())
    print(f"step_profile: {times}, all kernels {busy / 1e3:.2f} ms of a step")


def main() -> None:
    """Profile a training step of GPT-2 124M on the device of the command line, and print the kernels and times.

    gpt_fast's eager step is timed and profiled. On a GPU its step as one CUDA graph is also timed. With --out the
    figures are also written to that file, as JSON. Exit with a message and code 1 if the profile has no kernel.
    """
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step_profile", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda")
    parser.add_argument("--out", type=Path, help="file that gets the figures as JSON")
    options = parser.parse_args()
    device = resolve_device(options.device)
    case = cases(TOPIC, device)[0]
    inputs = make_inputs(TOPIC, case)[0]
    seconds, rows = {}, []
    for peer in TOPIC.peers:
        if peer.name not in (OURS, f"{OURS} as one graph") or peer.missing(case):
            continue
        job = peer.build(case)
        step = partial(job, *inputs)
        step()
        seconds[peer.name] = seconds_of(step, device)
        if peer.name == OURS:
            rows = kernels_of(step, device)
    if options.out:
        found = {"case": case.name, "seconds": seconds, "kernels": rows}
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if not rows:
        raise SystemExit(
            "step_profile: the profiler recorded no kernel; expected one that may read the device's counters"
        )
    print(case.name)
    report(seconds, rows)


if __name__ == "__main__":
    main()
