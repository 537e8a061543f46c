"""Run topics and studies: their tests, the floors, every case on every implementation. Write results as they come."""

import contextlib
import dataclasses
import gc
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.catalogue import cases
from benchmarks.measure import environment
from benchmarks.measure.busy import busy_process, threads
from benchmarks.measure.calls import all_passes, make_inputs, prepare
from benchmarks.measure.floors import measure_floors
from benchmarks.measure.gate import run_tests
from benchmarks.measure.graphs import Replays, capture
from benchmarks.measure.memory import available_memory, peak_memory
from benchmarks.measure.timing import FULL, QUICK, Budget, Call, Stopwatch, flush, take_turns
from benchmarks.models.job import Job
from benchmarks.report import results
from benchmarks.report.results import Record, Run
from benchmarks.topic import LEFT, OURS, Case, Function, Peer, Study, Topic
from gpt_fast._memory import keep_freed
from gpt_fast.interrupts import Interrupted

Failed = list[tuple[Peer, str]]


@dataclass
class Settings:
    """Options of a run, and the callbacks that report its progress."""

    device: str
    quick: bool = False
    resume: bool = False
    cpu_time: bool = False
    untested: bool = False  # the tests of a topic are not run before it; its file records that
    busy: bool = False  # a process that computes in an endless loop runs beside
    out: Path = Path("runs/bench")
    advance: Callable[[int, str], None] = lambda done, label: None  # implementations done since, what comes now
    done: Callable[[Run, list[Record]], None] = lambda run, records: None  # after a case, with its records
    studied: Callable[[Study, dict[str, Any]], None] = lambda study, record: None  # after a study

    @property
    def budget(self) -> Budget:
        """Return the `Budget` of a run, which says how often calls are repeated: less often in a quick run.

        It also says whether CPU seconds are measured.
        """
        return dataclasses.replace(QUICK if self.quick else FULL, cpu_time=self.cpu_time)


@dataclass
class Outcome:
    """Files that `run` wrote, topics that it refused because their tests fail, and whether Ctrl-C ended it."""

    files: list[Path] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)  # topic → the output of its failed tests
    interrupted: bool = False


# ---- one case


def runs_here(topic: Topic, case: Case, quick: bool) -> tuple[list[Peer], Failed]:
    """Return (implementations to measure on a case, [(implementation, reason why it is not measured)]).

    A `Topic` is an op or job, and a `Case` is a topic at fixed sizes, dtype and device. Implementations that the case
    excludes by `case.peers` are in neither list.

    Topics with `pair_bytes` train whole models, which take long to compile. In a quick run (`quick`), all their
    compiled implementations are in the second list. In a full run on a CPU, their compiled implementations are in the
    second list only for the smallest cases (`case.quick`).
    """
    run, missing = [], []
    for peer in topic.peers:
        if case.peers and peer.name not in case.peers:
            continue
        reason = peer.missing(case)
        if reason is None and peer.compiles and topic.pair_bytes:
            if quick:
                reason = "a quick run compiles no whole models"
            elif case.quick and case.device == "cpu":
                reason = "compiling whole models is left to the larger cases"
        if reason is None:
            run.append(peer)
        else:
            missing.append((peer, reason))
    return run, missing


def groups(topic: Topic, case: Case, peers: list[Peer]) -> list[tuple[list[Peer], Peer | None]]:
    """Return the order in which a case is timed: [(implementations to time in turn, one to time beside them, or None)].

    `peers` are the implementations to measure. The one beside a group is the implementation with the name "gpt_fast",
    or None if `peers` does not have it. It is timed in turn with the group, for comparison, but gets no record.

    A topic without `pair_bytes`, such as an op, begins with a group of all implementations that do not compile, if
    there are any. Nothing is beside this group. Each implementation that compiles follows as a group of one, with
    "gpt_fast" beside it. Compiling may take a minute, so these groups are last.

    Topics with `pair_bytes` train whole models, which do not all fit into memory together. Each implementation is a
    group of one. "gpt_fast" is beside each of the others if the memory for two models, `topic.pair_bytes(case)`, is
    available. Otherwise nothing is beside them.
    """
    ours = next((peer for peer in peers if peer.name == OURS), None)
    if topic.pair_bytes is None:
        at_once = [peer for peer in peers if not peer.compiles]
        later = [([peer], ours) for peer in peers if peer.compiles]
        return [(at_once, None), *later] if at_once else later
    pair = ours if topic.pair_bytes(case) <= available_memory(case.device) else None
    return [([peer], None if peer is ours else pair) for peer in peers]


def measure(
    topic: Topic, case: Case, peers: list[Peer], budget: Budget, beside: Peer | None = None
) -> tuple[list[Record], Failed]:
    """Measure implementations on one case. Return (records, [(implementation, error) of each that failed]).

    For each pass of the topic, `peers` are timed in turn, as often as `budget` says. `beside`, if given, takes turns
    with them and gets no record.

    A record is a dict for one implementation. "case" and "peer" are the names of the case and the implementation.
    "sizes", "dtype" and "dropout" are properties of the case. "series" is the name of the size that grows from case to
    case in its series, such as "T", or "" for a case in no series. "complete" is False if the case is meant for a few
    implementations only, those in `case.peers`. "times" maps each pass to {"median", "q1", "q3", "first", "rounds"},
    plus "to_ours" and "host" where `_take_turns` has them. "work" maps each pass to the fields of `Work`, the least
    bytes and FLOPs. "tokens" is the number of tokens of a call, None for ops. "peak_memory" is in bytes, or None if
    unknown.

    An implementation that failed in one pass has a record of its other passes. Errors of gpt_fast's own implementation
    are raised, except out of memory. `torch.compile`'s caches are cleared first.
    """
    inputs = make_inputs(topic, case)
    before = flush(case.device) if topic.suite == "ops" else None
    functions: dict[Peer, Function] = {}
    failed: Failed = []
    times: dict[Peer, dict[str, dict[str, Any]]] = {}
    torch.compiler.reset()  # or a second shape would be compiled for shapes that vary
    for peer in [*([beside] if beside else []), *peers]:
        torch.manual_seed(0)
        with _failure(peer, failed):
            functions[peer] = peer.build(case)
    replays = topic.suite == "ops" and case.device == "cuda"
    for passes in topic.passes:
        timed = _take_turns(functions, inputs, passes, case.device, before, budget, failed, replays)
        for peer, summary in timed.items():
            times.setdefault(peer, {})[passes] = summary
    records = []
    work = {passes: vars(topic.work(case, passes)) for passes in topic.passes}
    for peer, by_pass in times.items():
        if peer is beside:
            continue
        function = functions[peer]
        extra = None
        with contextlib.suppress(RuntimeError, NotImplementedError):
            extra = peak_memory(case.device, all_passes(function, inputs[0], topic.passes))
        own = function.work if isinstance(function, Job) else None
        if extra is not None and isinstance(function, Job):
            kept = function.state_bytes()
            extra = None if kept is None else extra + kept
        records.append(
            {
                "case": case.name, "peer": peer.name, "sizes": case.size, "dtype": case.dtype_name,
                "dropout": case.dropout, "series": case.series, "complete": not case.peers, "times": by_pass,
                "work": {name: vars(own) if own else work[name] for name in by_pass},
                "tokens": topic.tokens(case) if topic.tokens else None, "peak_memory": extra,
            }
        )  # fmt: skip
    return records, [(peer, reason) for peer, reason in failed if peer is not beside]


def _take_turns(
    functions: dict[Peer, Function],
    inputs: list[tuple],
    passes: str,
    device: str,
    before: Call | None,
    budget: Budget,
    failed: Failed,
    replays: bool = False,
) -> dict[Peer, dict[str, Any]]:
    """Time one pass of every implementation, in turns. Return {implementation: summary of its times}.

    `functions` maps an implementation to its function. `inputs` has tuples of arguments; the calls of every function
    use each tuple in turn. `passes` is the pass that is timed, such as "forward" or "step". `before` runs untimed
    before each call, unless it is None. `budget` sets the number of rounds. With `replays`, calls are timed as CUDA
    graphs if they can be captured.

    A summary has "median", "q1", "q3" and "first" (the first call) in seconds, and the number of "rounds". If gpt_fast
    is timed too, the others also have "to_ours": median and quartiles of the ratio to its time. If graphs were timed,
    "host" is the host's seconds for a direct call.

    An implementation whose first call fails is appended to `failed` with the error, and is not in the result. Errors of
    gpt_fast's implementation are raised, except out of memory.
    """
    watches: dict[Peer, Stopwatch] = {}
    extra: dict[Peer, dict[str, Any]] = {}
    for peer, function in functions.items():
        with _failure(peer, failed, f"{passes}: "):
            make = partial(prepare, function, inputs, passes)
            captured = _captured(make) if replays else None
            calls = make() if captured is None else captured.calls
            watch = Stopwatch(device, calls, before, peer.compiles, budget.cpu_time)
            watch.start()
            if captured is not None:
                watch.first, extra[peer] = captured.first, {"host": captured.host}
            watches[peer] = watch
    if watches:
        take_turns(list(watches.values()), budget)
    ours = next((watch for peer, watch in watches.items() if peer.name == OURS), None)
    return {
        peer: watch.summary()
        | extra.get(peer, {})
        | ({"to_ours": watch.ratio_to(ours)} if ours and watch is not ours else {})
        for peer, watch in watches.items()
    }


def _captured(make: Callable[[], list[Call]]) -> Replays | None:
    """Return the calls that `make` builds as replays of CUDA graphs (`Replays`), or None if one cannot be captured.

    Other errors of a call are raised, out of memory too. `make` returns a list of calls without arguments, which are
    run.
    """
    try:
        return capture(make)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "captur" not in str(error):
            raise
        return None


@contextlib.contextmanager
def _failure(peer: Peer, failed: Failed, doing: str = "") -> Iterator[None]:
    """Catch an error of the implementation `peer` in the block, such as out of memory, and append it to `failed`.

    The entry is (`peer`, `doing` followed by the first line of the error). Caught are RuntimeError, which includes out
    of memory, NotImplementedError, ValueError, ImportError and AssertionError; others are raised. If `peer` is
    gpt_fast's own implementation, all but out of memory are raised.
    """
    try:
        yield
    except (RuntimeError, NotImplementedError, ValueError, ImportError, AssertionError) as error:
        if peer.name == OURS and not isinstance(error, torch.OutOfMemoryError):
            raise
        failed.append((peer, doing + _first_line(error)))


def _first_line(error: Exception) -> str:
    """Return the first line of an error's message, cut to 200 characters, or its type's name for a blank message."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:200]


# ---- a whole run


def here(topics: list[Topic | Study], device: str, busy: bool = False) -> list[Topic | Study]:
    """Return the topics and studies that have something to measure on `device`, "cpu" or "cuda", in their order.

    Topics are ops and jobs. Studies are measurements with a table of their own. With `busy`, studies without times are
    left out: a busy process beside them would change nothing.
    """
    return [
        topic
        for topic in topics
        if (device in topic.devices and (topic.timed or not busy) if isinstance(topic, Study) else cases(topic, device))
    ]


def count(topics: list[Topic | Study], settings: Settings) -> int:
    """Return how many steps the progress bar of a run has.

    There is one for each implementation that can run on each case of a topic (an op or job), and one for each study. In
    a busy run gpt_fast's implementations count twice, because they are also measured without the busy process.
    """
    return sum(
        1
        if isinstance(topic, Study)
        else sum(
            len(peers) + len(on_the_cores_left(peers) if settings.busy else [])
            for case in cases(topic, settings.device, settings.quick)
            for peers in [runs_here(topic, case, settings.quick)[0]]
        )
        for topic in topics
    )


def run(topics: list[Topic | Study], settings: Settings) -> Outcome:
    """Measure the topics and studies and write a results file for each. Return an `Outcome`.

    The tests of each topic or study run first, unless `settings.untested` is set. If the tests fail, the topic or study
    is not measured, and the outcome's `refused` maps its name to the output of the tests. `files` are the paths of the
    results files, in `settings.out`/<device>. `interrupted` is True if Ctrl-C or SIGTERM ended the run. The results so
    far are then kept, marked partial. The callbacks of `settings` are called on the way.

    Raises:
        OSError: if the folder cannot be written; before anything is measured.
        ValueError: if a file to resume has another device, commit, version of a package or value of `quick`.
    """
    facts = environment.describe(settings.device, settings.cpu_time)
    folder = settings.out / facts["device"]["slug"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / ".writable").touch()
    (folder / ".writable").unlink()
    paths = {topic.name: folder / results.file_name(topic.name, settings.busy) for topic in topics}
    opened = {topic.name: _open(topic, paths[topic.name], facts, settings) for topic in topics}
    outcome = Outcome()
    try:
        for topic in topics:
            settings.advance(0, f"{topic.name}: its tests")
            red = "" if settings.untested else run_tests(topic, settings.device)
            if red:
                outcome.refused[topic.name] = red
                continue
            path = paths[topic.name]
            outcome.files.append(path)
            if isinstance(topic, Study):
                _run_study(topic, opened[topic.name], path, settings)
            else:
                _run_topic(topic, opened[topic.name], path, settings)
    except (KeyboardInterrupt, Interrupted):
        outcome.interrupted = True
        outcome.files = [path for path in outcome.files if path.exists()]
    return outcome


def _open(topic: Topic | Study, path: Path, facts: dict[str, Any], settings: Settings) -> Run:
    """Return the content of the results file of a topic or study, with which measuring begins. Nothing is written.

    If `settings.resume` is set and `path` exists, it is the content of that file. Otherwise it is new and has no
    results. In either case it records that the run is untested if `settings.untested` is set. `facts` are the "device",
    "versions" and "commit" of this run. Raise `ValueError` if the file to resume has other ones, another value of
    `quick`, or is damaged.
    """
    head = {
        "schema": results.SCHEMA, "version": results.VERSION, "topic": topic.name, "suite": topic.suite,
        "quick": settings.quick, **({"untested": True} if settings.untested else {}),
        **({"busy": True} if settings.busy else {}), **facts,
    }  # fmt: skip
    new = head if isinstance(topic, Study) else head | {"partial": True, "sessions": [], "records": [], "missing": []}
    if not settings.resume or not path.exists():
        return new
    old = results.read_study(path, topic) if isinstance(topic, Study) else results.read(path)
    for name in ("quick", "device", "versions", "commit"):
        if old[name] != new[name]:
            raise ValueError(f"{path}: cannot be resumed, its {name} was {old[name]}, now it is {new[name]}")
    return old | ({"untested": True} if settings.untested else {})


def _now() -> dict[str, Any]:
    """Return {"date", "load"}: the time in UTC as text, and the machine's load average over the last minute.

    "load" is None on a system without load averages.
    """
    load = round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
    return {"date": time.strftime("%Y-%m-%d %H:%M", time.gmtime()), "load": load}


def _run_study(study: Study, record: Run, path: Path, settings: Settings) -> None:
    """Measure a study and write its record to `path`, unless the record is complete from an earlier run.

    `record` is the content of the study's results file. It is complete if it has a "date". Otherwise the results and a
    "date" are added to it in place. With `settings.busy` a busy process runs during the measurement. In either case the
    progress bar advances by one step, and `settings.studied` is called with the study and the record.
    """
    settings.advance(0, study.name)
    if "date" not in record:
        with _beside(settings):
            record |= _now() | study.measure(settings.device, settings.quick, settings.cpu_time)
        results.write(record, path)
        _release(settings.device)
    settings.advance(1, study.name)
    settings.studied(study, record)


def _run_topic(topic: Topic, run: Run, path: Path, settings: Settings) -> None:
    """Measure what is missing in `run`, and write it to `path` after each group of implementations and at the end.

    `run` is the content of the topic's results file, changed in place. The list "sessions" in it gets an entry for this
    start of the program: the date, the machine's load and the speed limits of the device, which are measured first.
    Then every case is measured on the implementations that have no record of it. A group is one or more implementations
    that are timed in turn. In a busy run gpt_fast's implementations are also measured without the busy process, on one
    thread less.

    After each case `settings.done` is called with `run` and the new records. "partial" in `run` is True until the end.
    """
    settings.advance(0, f"{topic.name}: floors")
    kept = settings.device == "cpu" and keep_freed()  # for every implementation, as the training commands do
    session = _now() | {"floors": dict(measure_floors(settings.device, settings.cpu_time)), "keeps_freed": kept}
    run["partial"] = True
    index = len(run["sessions"])
    run["sessions"].append(session)
    for case in cases(topic, settings.device, settings.quick):
        peers, missing = runs_here(topic, case, settings.quick)
        run["missing"] = [entry for entry in run["missing"] if entry["case"] != case.name]
        run["missing"] += [_absent(case, peer, reason) for peer, reason in missing]
        measured = len(run["records"])

        def fill(group: list[Peer], beside: Peer | None, label: str, case: Case = case) -> None:
            """Measure the implementations in `group` that have no record on the case yet, and write results to `path`.

            New records are appended to `run`, and failures to its "missing". `beside` is the implementation that takes
            turns with the group, or None. `label` is shown beside the progress bar, which advances by the size of the
            group. `case` is the case of the loop around this function; `run` and `path` are the arguments of the
            enclosing function.
            """
            settings.advance(0, label)
            left = [peer for peer in group if results.find(run, case.name, peer.name) is None]
            if left:
                records, failed = measure(topic, case, left, settings.budget, beside)
                run["records"] += [record | {"session": index} for record in records]
                run["missing"] += [_absent(case, peer, reason) for peer, reason in failed]
                results.write(run, path)
                _release(settings.device)
            settings.advance(len(group), label)

        if settings.busy:
            with threads(max(1, torch.get_num_threads() - 1)):
                fill(on_the_cores_left(peers), None, f"{topic.name} {case.name}: {LEFT}")
        for group, beside in groups(topic, case, peers):
            with _beside(settings):
                fill(group, beside, f"{topic.name} {case.name}" + (f": {group[0].name}" if topic.pair_bytes else ""))
        settings.done(run, run["records"][measured:])
    if not any(record["session"] == index for record in run["records"]) and index:
        run["sessions"].pop()  # there was nothing left to measure
    run["partial"] = False
    results.write(run, path)


def on_the_cores_left(peers: list[Peer]) -> list[Peer]:
    """Return copies of gpt_fast's implementations among `peers`: the quiet baseline of a run beside a busy process.

    The caller times the copies without that process, and with one thread less, because the process would take a core.
    Their names end in ", quiet, with one thread less", so that their records are kept apart. An implementation is
    gpt_fast's if its name starts with "gpt_fast".
    """
    ours = [peer for peer in peers if peer.name.startswith(OURS)]
    return [dataclasses.replace(peer, name=f"{peer.name}, {LEFT}") for peer in ours]


def _beside(settings: Settings) -> contextlib.AbstractContextManager[object]:
    """Return the context manager in which to measure: beside a busy process if `settings.busy`, else an empty one."""
    return busy_process() if settings.busy else contextlib.nullcontext()


def _absent(case: Case, peer: Peer, reason: str) -> dict[str, str]:
    """Return {"case", "peer", "reason"}: an entry of "missing" in a results file.

    It names an implementation that was not measured on a case, and why.
    """
    return {"case": case.name, "peer": peer.name, "reason": reason}


def _release(device: str) -> None:
    """Collect garbage and, on "cuda", give back the memory that PyTorch's allocator keeps for reuse."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
