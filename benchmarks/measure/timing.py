"""Stopwatch of one device."""

import math
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

FLUSH_BYTES = 512 << 20  # several times any L2; clearing it also keeps the GPU busy while the next launch is prepared
LONG = 1.0  # seconds; the warm-up repeats calls for half as long
VERY_LONG = 8.0  # seconds; a longer first call is the only one
Call = Callable[[], object]


class Stamp:
    """Point in the GPU's work. Subtracting an earlier one waits for both and gives the seconds between them."""

    def __init__(self) -> None:
        """Record an event on the current CUDA stream."""
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier: "Stamp") -> float:
        """Wait until the GPU has reached this event. Return the GPU's seconds from `earlier` to it."""
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock(device: str, cpu_time: bool = False) -> Callable:
    """Return a function that reads a clock: the difference of two readings is the time between them in seconds.

    On "cuda" it is the GPU's time, and the subtraction waits for the GPU. On a CPU it is wall time, or with `cpu_time`
    the CPU seconds of the process.
    """
    if device == "cuda":
        return Stamp
    return time.process_time if cpu_time else time.perf_counter


def flush(device: str) -> Call | None:
    """Return a function that empties the GPU's L2 cache, to be called before each timed call, or None on a CPU.

    The function clears a buffer of 512 MiB, which is allocated here. On a CPU small tensors stay cached, as they do in
    a model.
    """
    if device != "cuda":
        return None
    buffer = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)

    def run() -> None:
        buffer.zero_()

    return run


def quartiles(values: list[float]) -> tuple[float, float, float]:
    """Return (first quartile, median, third quartile) of one or more values. One value is all three."""
    if len(values) < 2:
        return values[0], values[0], values[0]
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, median, q3


@dataclass(frozen=True)
class Budget:
    """Number of repetitions: at least `least`, then until `seconds` have passed. A very long call runs once."""

    seconds: float
    least: int
    cpu_time: bool = False

    def rounds(self, duration: float) -> int:
        """Return how often to time a call that takes `duration` seconds.

        It is 1 if `duration` exceeds VERY_LONG (8 s). Otherwise it is the number of calls that fill the budget's
        `seconds`, rounded up, at most 1,000, but never below `least`.
        """
        if duration > VERY_LONG:
            return 1
        return max(self.least, min(1000, math.ceil(self.seconds / max(duration, 1e-9))))


FULL, QUICK = Budget(1.0, 3), Budget(0.25, 2)


class Stopwatch:
    """Times one implementation. `calls` are the same work on different inputs, taken in turn."""

    def __init__(
        self,
        device: str,
        calls: list[Call],
        before: Call | None = None,
        compiles: bool = False,
        cpu_time: bool = False,
    ):
        """Prepare to time `calls`, which do the same work on different inputs and are taken in turn.

        `device` is "cpu" or "cuda". `before` is called before each of the calls, untimed. With `compiles` the first
        call compiles, so its time never counts as a measurement. With `cpu_time` the times are CPU seconds of the
        process.
        """
        self.calls = calls
        self.before = before
        self.now = clock(device, cpu_time)
        self.compiles = compiles
        self.taken = 0
        self.first: float | None = None
        self.seconds: list[float] = []
        self.laps: list[int] = []  # the lap of each entry of `seconds`; -1 for the warm-up

    def call(self) -> float:
        """Make the next of `calls`, after calling `before` if there is one. Return the seconds of the call alone.

        The calls are taken in turn. The seconds are not recorded.
        """
        run = self.calls[self.taken % len(self.calls)]
        self.taken += 1
        if self.before:
            self.before()
        start = self.now()
        run()
        return self.now() - start

    def keep(self, seconds: float, lap: int) -> None:
        """Record the seconds of a timed call. `lap` is the number of its round, from 0, or -1 for the warm-up."""
        self.seconds.append(seconds)
        self.laps.append(lap)

    def start(self) -> float:
        """Make the first call, which may compile and allocate. Return its seconds, and keep them in `first`.

        They are not recorded as a round. Errors of the call are raised.
        """
        self.first = self.call()
        return self.first

    def warm_up(self) -> float:
        """Make up to four calls before the timed rounds. Return the seconds of the last call.

        The first call is made here, unless `start` made it. If it took more than VERY_LONG (8 s), and did not compile
        (the constructor's `compiles`), it is also the last. Otherwise one to three calls follow. No further call begins
        once these have taken LONG / 2 (0.5) seconds together. Several calls warm up because, for example, the second
        step of a training still allocates new memory.

        The last call is recorded as a round if it took more than VERY_LONG, so that it need not be repeated.
        """
        first = self.start() if self.first is None else self.first
        if first > VERY_LONG and not self.compiles:
            self.keep(first, -1)
            return first
        began = time.perf_counter()
        duration = self.call()
        while self.taken < 4 and time.perf_counter() - began < LONG / 2:
            duration = self.call()
        if duration > VERY_LONG:
            self.keep(duration, -1)
        return duration

    def summary(self) -> dict[str, float | None]:
        """Return {"median", "q1", "q3", "rounds", "first"} of the recorded times. There must be at least one of them.

        "q1" and "q3" are the quartiles, and "rounds" is the number of recorded times. "first" is the time of the very
        first call, which may include compilation, or None if no call was made. Times are in seconds.
        """
        q1, median, q3 = quartiles(self.seconds)
        return {"median": median, "q1": q1, "q3": q3, "rounds": len(self.seconds), "first": self.first}

    def ratio_to(self, other: "Stopwatch") -> dict[str, float]:
        """Return {"median", "q1", "q3"} of this implementation's time divided by that of `other`, over pairs of rounds.

        A pair is a round of this implementation and the nearest round of `other` in time. So whatever slows the machine
        for a while slows both. On a busy machine this ratio is steadier than the ratio of two medians. Both must have
        recorded times.
        """
        pairs = []
        for seconds, lap in zip(self.seconds, self.laps, strict=True):
            nearest = min(range(len(other.laps)), key=lambda i, lap=lap: abs(other.laps[i] - lap))  # type: ignore[misc]
            pairs.append(seconds / other.seconds[nearest])
        q1, median, q3 = quartiles(pairs)
        return {"median": median, "q1": q1, "q3": q3}


def take_turns(watches: list[Stopwatch], budget: Budget) -> None:
    """Time every implementation for as many rounds as the budget allows. Their calls alternate.

    `watches` has a stopwatch for each implementation. Each is warmed up first, and then records its times. The number
    of rounds of an implementation follows from the budget and the seconds of the warm-up. Implementations with fewer
    rounds are spread evenly over the time of the others.

    Because the calls alternate, a change of the machine's speed affects all implementations. The order differs from
    round to round: an implementation that follows another finds its inputs cached, which saves 20 % of a small op.
    """
    planned = [(watch, budget.rounds(watch.warm_up())) for watch in watches]
    laps = max(rounds for _, rounds in planned)
    order = random.Random(0)
    for lap in range(laps):
        order.shuffle(planned)
        for watch, rounds in planned:
            # Spread evenly over the laps; the only call of a very long one is its round already.
            if len(watch.seconds) < rounds * (lap + 1) // laps:
                watch.keep(watch.call(), lap)
