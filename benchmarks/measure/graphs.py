"""Captures the calls that are timed on a GPU, so that a short kernel is not timed by what its launch costs the host."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.measure.timing import Call

HOST_CALLS = 10


@dataclass(frozen=True)
class Replays:
    """The calls of one implementation, each as a CUDA graph."""

    calls: list[Call]
    host: float  # median seconds that a direct call occupies the host
    first: float  # seconds of the very first call, which compiles and allocates


def capture(make: Callable[[], list[Call]]) -> Replays:
    """Build calls by `make`, run each, and capture each as a CUDA graph. Return the replays, a `Replays`.

    `make` returns a list of calls without arguments. The result's `calls` replay the graphs, one for each of these
    calls. `host` is the median seconds that the host needs to launch a call directly, without a graph. `first` is the
    seconds of the very first direct run, which may compile; it runs the first call of the list. `make` runs on the
    stream that is captured, because a backward pass runs on the stream of its forward pass.

    Raises:
        RuntimeError: if a call does what a graph cannot hold, such as waiting for the device.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls = make()
        first = _seconds(calls[0], waits=True)
        for call in calls:
            call()
        torch.cuda.synchronize()
        host = statistics.median(_seconds(calls[i % len(calls)]) for i in range(HOST_CALLS))
    torch.cuda.current_stream().wait_stream(side)
    replays: list[Call] = []
    for call in calls:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            call()
        replays.append(graph.replay)
    return Replays(replays, host, first)


def _seconds(call: Call, waits: bool = False) -> float:
    """Return the host's seconds for `call()`: until the GPU is done if `waits`, else until its work is launched."""
    began = time.perf_counter()
    call()
    if waits:
        torch.cuda.synchronize()
    return time.perf_counter() - began
