"""Runs topics: their tests, the floors, every case on every implementation; writes results as they come."""

import contextlib
import dataclasses
import gc
import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import environment, results
from benchmarks.cases import Case, Topic, cases
from benchmarks.models import MODEL_PEERS, Job
from benchmarks.peers import OURS, PEERS, Peer
from benchmarks.results import Record, Run
from benchmarks.timing import FULL, QUICK, Budget, Call, Stopwatch, flush, measure_floors, peak_memory, take_turns
from gpt_fast.interrupts import Interrupted

ROOT = environment.ROOT
COPIES = 2  # of the inputs, rotated
TEST_RECORD = ROOT / "build" / "benchmarks" / "green.json"


def peers_of(topic: Topic) -> tuple[Peer, ...]:
    return (PEERS | MODEL_PEERS)[topic.name]


@dataclass
class Settings:
    device: str
    quick: bool = False
    resume: bool = False
    cpu_time: bool = False
    out: Path = Path("runs/bench")
    advance: Callable[[int, str], None] = lambda done, label: None  # implementations done since, what comes now
    say: Callable[[str], None] = lambda line: None
    done: Callable[[Run, list[Record]], None] = lambda run, records: None  # called with what a case gave

    @property
    def budget(self) -> Budget:
        return dataclasses.replace(QUICK if self.quick else FULL, cpu_time=self.cpu_time)


@dataclass
class Outcome:
    files: list[Path] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # topic → what its tests said
    interrupted: bool = False


# ---- one case


def wanted(topic: Topic, case: Case, quick: bool) -> tuple[list[Peer], list[tuple[Peer, str]]]:
    """Who is to be measured, and who is missing and why."""
    run, missing = [], []
    for peer in peers_of(topic):
        if case.peers and peer.name not in case.peers:
            continue
        reason = peer.missing(case)
        if reason is None and case.quick and peer.compiles and not topic.together:
            reason = "compiling whole models is left to the larger cases" + (", not in a quick run" if quick else "")
        if reason is None:
            run.append(peer)
        else:
            missing.append((peer, reason))
    return run, missing


def make_inputs(topic: Topic, case: Case) -> list[tuple]:
    copies = []
    for copy in range(COPIES):
        torch.manual_seed(copy)
        copies.append(topic.inputs(case))
    return copies


def prepare(function: Callable[..., Any], inputs: list[tuple], passes: str) -> list[Call]:
    """What to call and time, one for each copy of the inputs."""
    return [_prepare(function, copy, passes) for copy in inputs]


def _prepare(function: Callable[..., Any], inputs: tuple, passes: str) -> Call:
    if passes in ("forward", "step"):
        return lambda: function(*inputs)
    if passes == "inference":
        return torch.inference_mode()(lambda: function(*inputs))
    leaves = [value for value in inputs if isinstance(value, Tensor) and value.requires_grad]
    if passes == "backward":
        outputs = _tuple(function(*inputs))
        grads = _upstream(outputs)
        return lambda: torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True)
    upstream: list[Tensor] = []

    def both() -> object:
        outputs = _tuple(function(*inputs))
        if not upstream:
            upstream.extend(_upstream(outputs))
        return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)

    return both


def _upstream(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    if not all(output.requires_grad for output in outputs):
        raise NotImplementedError("no backward here")
    return [torch.randn_like(output) for output in outputs]


def _tuple(outputs: Any) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def once(function: Callable[..., Any], inputs: tuple, passes: tuple[str, ...]) -> Call:
    """All of a topic's passes one after another, for memory: forward and backward belong together."""
    return _prepare(function, inputs, "training" if "backward" in passes else passes[0])


def measure(topic: Topic, case: Case, peers: list[Peer], budget: Budget) -> tuple[list[Record], list[tuple[Peer, str]]]:
    """Records of these implementations of one case, and who failed and how. They take turns, pass by pass."""
    inputs = make_inputs(topic, case)
    before = flush(case.device) if topic.suite == "ops" else None
    functions: dict[Peer, Callable[..., Any]] = {}
    failed: list[tuple[Peer, str]] = []
    times: dict[Peer, dict[str, dict[str, float]]] = {}
    torch.compiler.reset()  # or a second shape would be compiled for shapes that vary
    for peer in peers:
        torch.manual_seed(0)
        with _failure(peer, failed):
            functions[peer] = peer.build(case)
    for passes in topic.passes:
        for peer, summary in _take_turns(functions, inputs, passes, case.device, before, budget, failed).items():
            times.setdefault(peer, {})[passes] = summary
    records = []
    work = {passes: vars(topic.work(case, passes)) for passes in topic.passes}
    for peer, by_pass in times.items():
        function = functions[peer]
        extra = None
        with contextlib.suppress(RuntimeError, NotImplementedError):
            extra = peak_memory(case.device, once(function, inputs[0], topic.passes))
        own = function.work if isinstance(function, Job) else None
        if extra is not None and isinstance(function, Job):
            extra += function.state_bytes()
        records.append(
            {
                "case": case.name, "peer": peer.name, "sizes": case.size, "dtype": case.dtype_name,
                "dropout": case.dropout, "series": case.series, "complete": not case.peers, "times": by_pass,
                "work": {name: vars(own) if own else work[name] for name in by_pass},
                "tokens": topic.tokens(case) if topic.tokens else None, "peak_memory": extra,
            }
        )  # fmt: skip
    return records, failed


def _take_turns(
    functions: dict[Peer, Callable[..., Any]],
    inputs: list[tuple],
    passes: str,
    device: str,
    before: Callable[[], None] | None,
    budget: Budget,
    failed: list[tuple[Peer, str]],
) -> dict[Peer, dict[str, Any]]:
    watches: dict[Peer, Stopwatch] = {}
    for peer, function in functions.items():
        with _failure(peer, failed, f"{passes}: "):
            watch = Stopwatch(device, prepare(function, inputs, passes), before, peer.compiles, budget.cpu_time)
            watch.start()
            watches[peer] = watch
    if watches:
        take_turns(list(watches.values()), budget)
    return {peer: watch.summary() for peer, watch in watches.items()}


@contextlib.contextmanager
def _failure(peer: Peer, failed: list[tuple[Peer, str]], doing: str = "") -> Iterator[None]:
    """Whoever cannot do this (out of memory, a limit of that library) is missing for that reason; ours must,
    if there is the memory."""
    try:
        yield
    except (RuntimeError, NotImplementedError, ValueError, ImportError) as error:
        if peer.name == OURS and not isinstance(error, torch.OutOfMemoryError):
            raise
        failed.append((peer, doing + _first_line(error)))


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


# ---- the tests of a topic


def files_of_tests(topic: Topic) -> tuple[str, ...]:
    return topic.tests or (f"ops/test_{topic.name}.py",)


def run_tests(topic: Topic, device: str) -> str:
    """What the topic's tests said, empty if they passed. Passed tests are not run again on the same files."""
    state = _state(topic, device)
    green = json.loads(TEST_RECORD.read_text("utf-8")) if TEST_RECORD.exists() else {}
    if green.get(topic.name) == state:
        return ""
    selection = ["-m", "cuda and not slow"] if device == "cuda" else []
    files = [f"tests/{name}" for name in files_of_tests(topic)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, *selection]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode:
        return (done.stdout + done.stderr)[-2000:]
    TEST_RECORD.parent.mkdir(parents=True, exist_ok=True)
    TEST_RECORD.write_text(json.dumps(green | {topic.name: state}), encoding="utf-8")
    return ""


def _state(topic: Topic, device: str) -> str:
    """Of the code under test, its tests, and what they ran with; what computes nothing is left out."""
    digest = hashlib.sha256(f"{device} {torch.__version__} {sys.version}".encode())
    sources = [path for folder in ("gpt_fast", "kernels", "csrc") for path in (ROOT / folder).rglob("*")]
    tests = [ROOT / "tests" / name for name in (*files_of_tests(topic), "conftest.py", "numerics.py")]
    sources = [path for path in sources if not {"commands", "data", "training"} & set(path.parts)]
    suffixes = (".py", ".cpp", ".h", ".cu", ".json")
    for path in sorted(path for path in {*sources, *tests} if path.suffix in suffixes and path.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()


# ---- a whole run


def count(topics: list[Topic], settings: Settings) -> int:
    """How many implementations of cases there are to measure."""
    return sum(
        len(wanted(topic, case, settings.quick)[0])
        for topic in topics
        for case in cases(topic, settings.device, settings.quick)
    )


def run(topics: list[Topic], settings: Settings) -> Outcome:
    """Measures the topics and writes a file for each. Ctrl-C keeps what there is, marked partial.

    Raises `OSError` where the folder cannot be written, before anything is measured, and `ValueError` where a file that
    is to be resumed was measured elsewhere.
    """
    facts = environment.describe(settings.device, settings.cpu_time)
    folder = settings.out / facts["device"]["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".writable").touch()
    (folder / ".writable").unlink()
    opened = {topic.name: open_run(topic, folder / f"{topic.name}.json", facts, settings) for topic in topics}
    outcome = Outcome()
    try:
        for topic in topics:
            settings.advance(0, f"{topic.name}: its tests")
            red = run_tests(topic, settings.device)
            if red:
                outcome.refused[topic.name] = red
                continue
            path = folder / f"{topic.name}.json"
            outcome.files.append(path)
            settings.advance(0, f"{topic.name}: floors")
            session = {
                "date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
                "load": _load(),
                "floors": dict(measure_floors(settings.device, settings.cpu_time)),
            }
            _run_topic(topic, opened[topic.name], session, path, settings)
    except (KeyboardInterrupt, Interrupted):
        outcome.interrupted = True
    return outcome


def open_run(topic: Topic, path: Path, facts: dict[str, Any], settings: Settings) -> Run:
    """An empty run, or with `resume` the partial one that is there."""
    new: Run = {
        "schema": results.SCHEMA, "version": results.VERSION, "topic": topic.name, "suite": topic.suite,
        "quick": settings.quick, "partial": True, **facts, "sessions": [], "records": [], "missing": [],
    }  # fmt: skip
    if not settings.resume or not path.exists():
        return new
    old = results.read(path)
    for name in ("quick", "device", "versions", "commit"):
        if old[name] != new[name]:
            raise ValueError(f"{path}: cannot be resumed, its {name} was {old[name]}, now it is {new[name]}")
    return old


def _run_topic(topic: Topic, run: Run, session: dict[str, Any], path: Path, settings: Settings) -> None:
    """Fills the run with what it lacks, and writes it after each step."""
    run["partial"] = True
    index = len(run["sessions"])
    run["sessions"].append(session)
    for case in cases(topic, settings.device, settings.quick):
        peers, missing = wanted(topic, case, settings.quick)
        run["missing"] = [entry for entry in run["missing"] if entry["case"] != case.name]
        run["missing"] += [_absent(case, peer, reason) for peer, reason in missing]
        measured = len(run["records"])
        for group in [peers] if topic.together else [[peer] for peer in peers]:
            label = f"{topic.name} {case.name}" + ("" if topic.together else f": {group[0].name}")
            settings.advance(0, label)
            left = [peer for peer in group if results.find(run, case.name, peer.name) is None]
            if left:
                records, failed = measure(topic, case, left, settings.budget)
                run["records"] += [record | {"session": index} for record in records]
                run["missing"] += [_absent(case, peer, reason) for peer, reason in failed]
                results.write(run, path)
                _release(settings.device)
            settings.advance(len(group), label)
        settings.done(run, run["records"][measured:])
    if not any(record["session"] == index for record in run["records"]) and index:
        run["sessions"].pop()  # there was nothing left to measure
    run["partial"] = False
    results.write(run, path)


def _absent(case: Case, peer: Peer, reason: str) -> dict[str, str]:
    return {"case": case.name, "peer": peer.name, "reason": reason}


def _release(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
