"""Study of what a call costs before any work: host time of every op on tensors of a few elements.

`function` is the public function: checks, choice of the kernel, autograd. `operators` is PyTorch's operator in it by
itself: dispatch and, on a GPU, Triton's launch; on a CPU the kernel. `PyTorch` is PyTorch's own function. On a GPU the
calls are only enqueued: the clock stops before the device is waited for. All take turns.
"""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import catalogue
from benchmarks.measure.calls import prepare
from benchmarks.measure.timing import Call, clock, quartiles
from benchmarks.report.markdown import PASS_NAMES, table
from benchmarks.topic import OURS, Case, Study, Topic, main_dtype

CALLS, ROUNDS = 50, 21  # calls in a row, fewer than a GPU queues; medians over rounds
THEIRS = ("torch", "sdpa flash")
Summary = dict[str, float]


class Operators(TorchDispatchMode):
    """Mode that records the calls of this library's operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and return its result. Record the call if the operator is one of gpt_fast.

        Recording appends a function to `self.calls` that runs the operator again. It passes the same positional
        arguments, but no keyword arguments.
        """
        if func.namespace == "gpt_fast":
            self.calls.append(lambda: func(*args))
        return func(*args, **(kwargs or {}))


def operators(run: Call) -> Call:
    """Run `run` once. Return a call that runs the gpt_fast operators in it again, with the same positional arguments.

    These are the custom operators that gpt_fast registers with PyTorch. The returned call skips the Python around the
    operators, runs without autograd, and returns None.
    """
    with Operators() as mode:
        run()

    def again() -> None:
        with torch.no_grad():
            for call in mode.calls:
                call()

    return again


def measured_ops() -> list[Topic]:
    """Return the ops' topics (`Topic`) that define `tiny`: sizes at which the inputs have only a few elements."""
    return [topic for topic in catalogue.ops().values() if topic.tiny]


def calls_of(topic: Topic, device: str) -> dict[tuple[str, str, str], Call]:
    """Return {(op, pass, name): call} for one op on tensors of a few elements. A call runs the pass once.

    A name is "function" for gpt_fast's public function, or "PyTorch" for PyTorch's built-in function, if there is one.
    The name "operators" stands for the custom gpt_fast operators that the public function runs in this pass. Their call
    runs them again, without the Python and the autograd around them.

    `topic` is the topic of the op. If it has the pass "backward", the passes are "forward" and "training", which is
    forward and backward. Otherwise every pass of the topic has an entry. `device` is "cpu" or "cuda". gpt_fast's
    function is called a few times here.
    """
    case = Case(topic.name, device, tuple((topic.tiny or {}).items()), main_dtype(device)[0])
    functions = {peer.name: peer.build(case) for peer in topic.peers if peer.name in (OURS, *THEIRS)}
    inputs = [topic.inputs(case)]
    calls = {}
    for passes in ("forward", "training") if "backward" in topic.passes else topic.passes:
        (ours,) = prepare(functions[OURS], inputs, passes)
        ours()
        calls[topic.name, passes, "function"], calls[topic.name, passes, "operators"] = ours, operators(ours)
        for name in THEIRS:
            if name in functions:
                (calls[topic.name, passes, "PyTorch"],) = prepare(functions[name], inputs, passes)
    return calls


def seconds_of(topics: list[Topic], device: str, cpu_time: bool) -> dict[str, dict[str, dict[str, Summary]]]:
    """Return the seconds of one call as {op: {pass: {name: {"q1", "median", "q3"}}}}.

    A name is "function" for gpt_fast's public function, "operators" for the custom gpt_fast operators in this function
    without the Python around them, or "PyTorch" for PyTorch's built-in function. `topics` are the topics of the ops.

    The quartiles come from ROUNDS rounds, after two that warm up. In each round all calls take turns, so that a
    disturbance affects all. On a GPU the time is the host's until the call is enqueued. With `cpu_time` it is CPU
    seconds of the process.
    """
    now = clock("cpu", cpu_time)
    calls = {key: call for topic in topics for key, call in calls_of(topic, device).items()}
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


def measure(device: str, quick: bool, cpu_time: bool) -> dict[str, Any]:
    """Measure what a call costs on the device. Return {"ops": {op: {pass: {name: {"q1", "median", "q3"}}}}}.

    The calls are on tensors of a few elements. A name is "function" for gpt_fast's public function, "operators" for the
    custom gpt_fast operators in this function without the Python around them, or "PyTorch" for PyTorch's built-in
    function. Times are seconds of the host. `quick` changes nothing. With `cpu_time` the times are CPU seconds of the
    process.
    """
    return {"ops": seconds_of(measured_ops(), device, cpu_time)}


def lines(record: dict[str, Any]) -> list[str]:
    """Return a section of Markdown as lines: a heading, a paragraph on what was measured, and a table.

    The table has a row for each op and pass. It has the median microseconds of gpt_fast's public function, of the
    custom gpt_fast operators in this function, and of PyTorch's built-in function. A cell is "" if its time was not
    measured. `record` is the content of the study's results file.
    """
    device, date, load = record["device"], record["date"], record["load"]
    rows = []
    for op, by_pass in record["ops"].items():
        for passes, times in by_pass.items():
            names = ("function", "operators", "PyTorch")
            cells = [f"{times[name]['median'] * 1e6:.1f}" if name in times else "" for name in names]
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


STUDY = Study("overhead", "ops", measure, lines, fields=("ops",))
