"""How time and memory are measured on one device, and the floors that figures are held against."""

import ctypes
import gc
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from gpt_fast import build_info

FLUSH_BYTES = 512 << 20  # several times any L2; clearing it also keeps the GPU busy while the next launch is prepared
LONG = 1.0  # seconds from which on a call is repeated a few times only
VERY_LONG = 8.0  # and from which on the first one has to do
_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
Call = Callable[[], object]


class Stamp:
    """A point in the GPU's work. Subtracting an earlier one waits for both and gives seconds between them."""

    def __init__(self) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Stamp") -> float:
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock(device: str, cpu_time: bool = False) -> Callable:
    """What to read before and after; the difference is in seconds, with `cpu_time` in those the process computed."""
    if device == "cuda":
        return Stamp
    return time.process_time if cpu_time else time.perf_counter


def flush(device: str) -> Callable[[], None] | None:
    """What empties the L2 before each round; on a CPU nothing, where small shapes stay cached as they do in a model."""
    if device != "cuda":
        return None
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def run() -> None:
        buffer.zero_()

    return run


# ---- time


def quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) < 2:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


@dataclass(frozen=True)
class Budget:
    """How long to repeat one implementation's calls: at least `least` rounds, then until `seconds` are used up; a very
    long call is not repeated."""

    seconds: float
    least: int
    cpu_time: bool = False

    def rounds(self, duration: float) -> int:
        if duration > VERY_LONG:
            return 1
        return max(self.least, min(1000, math.ceil(self.seconds / max(duration, 1e-9))))


FULL, QUICK = Budget(1.0, 3), Budget(0.25, 2)


class Stopwatch:
    """Times one implementation: `calls` are the same work on different inputs, taken in turn."""

    def __init__(
        self,
        device: str,
        calls: list[Call],
        before: Callable[[], None] | None = None,
        compiles: bool = False,
        cpu_time: bool = False,
    ):
        self.calls = calls
        self.before = before
        self.now = clock(device, cpu_time)
        self.compiles = compiles
        self.taken = 0
        self.first: float | None = None
        self.seconds: list[float] = []

    def call(self) -> float:
        run = self.calls[self.taken % len(self.calls)]
        self.taken += 1
        if self.before:
            self.before()
        start = self.now()
        run()
        return self.now() - start

    def start(self) -> float:
        """The first call, which compiles and allocates, and fails where the implementation cannot do this."""
        self.first = self.call()
        return self.first

    def warm_up(self) -> float:
        """Two to four calls; returns how long the last took. A long one counts as a round already."""
        first = self.start() if self.first is None else self.first
        if first > VERY_LONG and not self.compiles:
            self.seconds.append(first)
            return first
        began = time.perf_counter()
        duration = self.call()
        while self.taken < 4 and time.perf_counter() - began < LONG / 2:
            duration = self.call()
        if duration > LONG:
            self.seconds.append(duration)
        return duration

    def summary(self) -> dict[str, float | None]:
        """Seconds: median, quartiles, the number of rounds, and the very first call."""
        q1, median, q3 = quartiles(self.seconds)
        return {"median": median, "q1": q1, "q3": q3, "rounds": len(self.seconds), "first": self.first}


def take_turns(watches: list[Stopwatch], budget: Budget) -> None:
    """Fills every watch. Rounds of the implementations alternate, so that a change of the machine's speed meets all, in
    another order each time: who follows another finds its inputs cached, which is 20 % of a small op."""
    wanted = [(watch, budget.rounds(watch.warm_up())) for watch in watches]
    laps = max(rounds for _, rounds in wanted)
    order = random.Random(0)
    for lap in range(laps):
        order.shuffle(wanted)
        for watch, rounds in wanted:
            # Spread evenly over the laps; a long call of the warm-up was the first round.
            if len(watch.seconds) < rounds * (lap + 1) // laps:
                watch.seconds.append(watch.call())


# ---- memory


def peak_memory(device: str, run: Call) -> int | None:
    """Bytes that one call adds at its highest point; None where this system does not tell.

    On CUDA what PyTorch's allocator handed out; on Linux the growth of the process, with freed memory given back
    before, so that scratch space of any library counts.
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
    _CLEAR_REFS.write_text("5")  # the highest point so far is forgotten
    before = _status("VmRSS")
    run()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    for line in _STATUS.read_text("ascii").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    raise AssertionError(field)


def available_memory(device: str) -> int:
    """Bytes that a program may still take."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return 1 << 62
    fields = dict(line.split(":") for line in meminfo.read_text("ascii").splitlines())
    return int(fields["MemAvailable"].split()[0]) << 10


# ---- floors


def bf16_products(device: str) -> bool:
    """Whether the device multiplies bfloat16 matrices itself; a CPU that does not is many times slower than float32."""
    return device == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported()


@dataclass(frozen=True)
class Floor:
    """Work that nothing does faster here: a copy, a read, a matrix product."""

    name: str
    amount: int  # bytes or FLOPs of one call
    build: Callable[[], Call]


def floors(device: str) -> list[Floor]:
    size = (1 << 30) if device == "cuda" else (256 << 20)
    n = 8192 if device == "cuda" else 1536
    dtypes = (torch.bfloat16,) if device == "cuda" else (torch.float32, torch.bfloat16)[: 1 + bf16_products(device)]

    def values() -> torch.Tensor:
        return torch.randn(size // 4, device=device)

    def copy() -> Call:
        source, target = values(), torch.empty(size // 4, device=device)
        return lambda: target.copy_(source)

    def read() -> Call:
        x = values()
        if device == "cpu" and build_info() is not None:
            from gpt_fast import _C  # type: ignore[attr-defined]

            return lambda: _C.read_all(x)
        return x.sum

    def product(dtype: torch.dtype) -> Call:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        return lambda: a @ b.t()  # as a linear layer has it

    return [
        Floor("copy", 2 * size, copy),
        Floor("read", size, read),
        *(Floor(f"matmul {str(dtype).removeprefix('torch.')}", 2 * n**3, partial(product, dtype)) for dtype in dtypes),
    ]


def measure_floors(device: str, cpu_time: bool = False) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, rate in bytes or FLOPs a second with its quartiles)."""
    for floor in floors(device):
        watch = Stopwatch(device, [floor.build()], cpu_time=cpu_time)
        take_turns([watch], Budget(0.5, 5))
        q1, median, q3 = quartiles(watch.seconds)
        yield floor.name, {"rate": floor.amount / median, "q1": floor.amount / q3, "q3": floor.amount / q1}
