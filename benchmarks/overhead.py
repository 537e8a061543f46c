"""What a call costs before any work: python -m benchmarks.overhead [--device cuda] [--cpu-time] [--out DIR]

Host time of every op on tensors of a few elements: the public function (checks, choice of the kernel, autograd), of it
PyTorch's operator by itself (dispatch and, on a GPU, Triton's launch; on a CPU the kernel), and what PyTorch's own
function takes. On a GPU the calls are only enqueued: the clock stops before the device is waited for. Takes turns, and
writes DIR/<device>/overhead.json, which `make report` shows.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.cases import TOPICS, Case, Sizes
from benchmarks.environment import describe
from benchmarks.peers import OURS, PEERS
from benchmarks.runner import prepare
from benchmarks.tables import PASS_NAMES, table
from benchmarks.timing import clock, quartiles
from gpt_fast._files import write_json

FILE = "overhead.json"
CALLS, ROUNDS = 50, 21  # calls in a row, fewer than a GPU queues; medians over rounds
THEIRS = ("torch", "sdpa flash")
SIZES: dict[str, Sizes] = {
    "attention": {"B": 1, "H": 1, "T": 4, "D": 8},
    "layer_norm": {"M": 4, "N": 8},
    "add_layer_norm": {"M": 4, "N": 8},
    "mlp": {"M": 4, "C": 8},
    "linear_cross_entropy": {"N": 4, "C": 8, "V": 16},
    "embedding": {"B": 1, "T": 4, "V": 16, "C": 8},
    "decode_attention": {"B": 1, "H": 1, "S": 4, "D": 8},
}
Call = Callable[[], object]
Summary = dict[str, float]


class Operators(TorchDispatchMode):
    """Keeps the calls of this library's operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "gpt_fast":
            self.calls.append(lambda: func(*args))
        return func(*args, **(kwargs or {}))


def operators(run: Call) -> Call:
    """The operators that a call runs, without what is around them."""
    with Operators() as mode:
        run()

    def again() -> None:
        with torch.no_grad():
            for call in mode.calls:
                call()

    return again


def calls_of(op: str, device: str) -> dict[tuple[str, str, str], Call]:
    """By op, pass and whose: ours, its operators, and PyTorch's."""
    topic = TOPICS[op]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    case = Case(op, device, tuple(SIZES[op].items()), dtype)
    functions = {peer.name: peer.build(case) for peer in PEERS[op] if peer.name in (OURS, *THEIRS)}
    inputs = [topic.inputs(case)]
    calls = {}
    for passes in ("forward", "training") if "backward" in topic.passes else topic.passes:
        (ours,) = prepare(functions[OURS], inputs, passes)
        ours()
        calls[op, passes, "function"], calls[op, passes, "operators"] = ours, operators(ours)
        for name in THEIRS:
            if name in functions:
                (calls[op, passes, "PyTorch"],) = prepare(functions[name], inputs, passes)
    return calls


def measure(ops: list[str], device: str, cpu_time: bool) -> dict[str, dict[str, dict[str, Summary]]]:
    """Seconds of one call, enqueued, by op, pass and whose. All take turns, so that what disturbs is spread."""
    now = clock("cpu", cpu_time)
    calls = {key: call for op in ops for key, call in calls_of(op, device).items()}
    seconds: dict[tuple[str, str, str], list[float]] = {key: [] for key in calls}
    for turn in range(ROUNDS + 2):
        for key, call in calls.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = now()
            for _ in range(CALLS):
                call()
            if turn > 1:
                seconds[key].append((now() - start) / CALLS)
    found: dict[str, dict[str, dict[str, Summary]]] = {}
    for (op, passes, name), values in seconds.items():
        summary = dict(zip(("q1", "median", "q3"), quartiles(values), strict=True))
        found.setdefault(op, {}).setdefault(passes, {})[name] = summary
    return found


def lines(record: dict[str, Any]) -> list[str]:
    """The section of a device's page."""
    device, date, load = record["device"], record["date"], record["load"]
    rows = []
    for op, by_pass in record["ops"].items():
        for passes, times in by_pass.items():
            cells = [f"{times[name]['median'] * 1e6:.1f}" for name in ("function", "operators", "PyTorch")]
            rows.append([f"{op}, {PASS_NAMES.get(passes, passes)}", *cells])
    enqueued = "The calls are enqueued, not waited for." if device["type"] == "cuda" else "The kernels' work is in it."
    return [
        "## what a call costs",
        "",
        f"Host microseconds of a call on tensors of a few elements, medians; {date} UTC, load {load}. *Operators*:",
        f"PyTorch's dispatch and what is below it; the rest is checks, choice and autograd in Python. {enqueued}",
        "",
        *table(["call", OURS, "of it operators", "PyTorch"], rows),
    ]


def section(folder: Path) -> list[str]:
    """The same, of a device's folder; empty where it was not measured there."""
    path = folder / FILE
    return ["", *lines(json.loads(path.read_text("utf-8")))] if path.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds of one thread, for a machine that is busy")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.cpu_time:
        torch.set_num_threads(1)
    record = {
        **describe(arguments.device, arguments.cpu_time),
        "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "load": round(os.getloadavg()[0], 2),
        "ops": measure(list(SIZES), arguments.device, arguments.cpu_time),
    }
    print("\n".join(lines(record)))
    if arguments.out:
        folder = arguments.out / record["device"]["slug"]
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / FILE, record)


if __name__ == "__main__":
    main()
