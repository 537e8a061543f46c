"""Fuzz the ops: call them with random arguments and compare every result with the reference in float64.

    python -m tests.fuzz [TARGET ...] [--draws N] [--seed S] [--jobs J]
    python -m tests.fuzz attention --seed 0 --only 1234     repeats one draw

A draw is one random call of an op, or one random session. Targets are the ops and `sessions`, which draws sessions of
DecodeSession and is missing in the interpreter. TRITON_INTERPRET=1 runs the Triton kernels in the interpreter, on
smaller sizes. Draws run in other processes, so a crash or a hang is a finding too. The command prints for each finding
the command that repeats it. The exit status is 1 if there is a finding, or if too many draws were refused.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from tests.fuzz import worker

BATCH = 500  # draws for each process, which takes seconds to start
WORKER = (sys.executable, "-X", "faulthandler", "-m", "tests.fuzz.worker")
LIMIT = 120  # seconds for one draw; the longest draw takes a few seconds, in the interpreter
REFUSED = 0.2  # the largest share of draws that may be refused


class Finding(NamedTuple):
    target: str
    index: int
    text: str


def command(target: str, seed: int, index: int) -> str:
    """Return the command that repeats one draw."""
    prefix = "TRITON_INTERPRET=1 " if os.environ.get("TRITON_INTERPRET") == "1" else ""
    return f"{prefix}python -m tests.fuzz {target} --seed {seed} --only {index}"


def run_batch(
    target: str, seed: int, first: int, last: int, tell: Callable[[str], None], limit: float = LIMIT
) -> tuple[list[Finding], collections.Counter]:
    """Run the draws [first, last) in other processes. Return the findings and the number of draws of each kind."""
    findings, kinds = [], collections.Counter()
    while first < last:
        index, ended = first, False
        with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
            process = subprocess.Popen(
                [*WORKER, target, *map(str, (seed, first, last))],
                stdout=subprocess.PIPE, stderr=errors, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            assert process.stdout
            hung = threading.Event()
            watch = watchdog(process, hung, limit)
            for line in process.stdout:
                watch.cancel()
                watch = watchdog(process, hung, limit)
                event = json.loads(line)
                index, ended = event.get("draw", index), "end" in event
                if "kind" in event:
                    kinds[event["kind"]] += 1
                elif "error" in event:
                    findings.append(Finding(target, index, event["error"]))
                if "draw" not in event and not ended:
                    tell(target)
            watch.cancel()
            code = process.wait()
            if ended:
                break
            errors.seek(0)
            tail = "\n".join(errors.read().splitlines()[-12:])
        how = f"takes longer than {limit} s" if hung.is_set() else f"ends with exit status {code}"
        findings.append(Finding(target, index, f"the process {how}\n{tail}"))
        tell(target)
        first = index + 1
    return findings, kinds


def watchdog(process: subprocess.Popen, hung: threading.Event, limit: float) -> threading.Timer:
    def stop() -> None:
        hung.set()
        process.kill()

    timer = threading.Timer(limit, stop)
    timer.daemon = True
    timer.start()
    return timer


class Progress:
    """Counter of finished draws that prints a line at most every few seconds."""

    def __init__(self, draws: int, every: float = 10.0) -> None:
        self.draws, self.every = draws, every
        self.done, self.start, self.last = collections.Counter(), time.monotonic(), time.monotonic()
        self.lock = threading.Lock()

    def __call__(self, target: str) -> None:
        with self.lock:
            self.done[target] += 1
            now = time.monotonic()
            if now - self.last >= self.every:
                self.last = now
                print(f"fuzz: {self.done.total()}/{self.draws} draws, {now - self.start:.0f} s ({target})", flush=True)


def print_table(kinds: dict[str, collections.Counter], findings: list[Finding]) -> None:
    """Print a row for each target: the numbers of draws of each kind, of all refused draws, and of findings."""
    columns = ("computed", "not finite", "padding")
    print(f"{'target':22} {'draws':>6} " + " ".join(f"{name:>10}" for name in (*columns, "refused", "findings")))
    for target, counts in kinds.items():
        found = sum(finding.target == target for finding in findings)
        refused = sum(count for kind, count in counts.items() if kind.startswith("refused"))
        numbers = [*(counts[name] for name in columns), refused, found]
        print(f"{target:22} {counts.total() + found:6} " + " ".join(f"{number:10}" for number in numbers))


def main() -> None:
    known = worker.targets()
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=f"one or more of {', '.join(known)}; default: all")
    parser.add_argument("--draws", type=int, default=1000, metavar="N", help="draws of each target")
    parser.add_argument("--seed", type=int, default=0, metavar="S")
    parser.add_argument("--only", type=int, metavar="INDEX", help="run this draw alone")
    parser.add_argument("--jobs", type=int, default=1, metavar="J", help="processes at a time")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.targets if name not in known]:
        parser.error(f"TARGET is {', '.join(unknown)}; expected some of {', '.join(known)}")
    chosen = arguments.targets or list(known)
    first, last = (0, arguments.draws) if arguments.only is None else (arguments.only, arguments.only + 1)
    progress = Progress((last - first) * len(chosen))
    kinds, findings = {target: collections.Counter() for target in chosen}, list[Finding]()

    def run(target: str, begin: int) -> None:
        found, counts = run_batch(target, arguments.seed, begin, min(begin + BATCH, last), progress)
        for finding in found:
            text = finding.text.replace("\n", "\n    ")
            print(f"FINDING {command(target, arguments.seed, finding.index)}\n    {text}", flush=True)
        kinds[target].update(counts)
        findings.extend(found)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        jobs = [pool.submit(run, target, begin) for target in chosen for begin in range(first, last, BATCH)]
        for job in jobs:
            job.result()
    print_table(kinds, findings)
    many = [
        target for target, counts in kinds.items()
        if arguments.only is None
        and sum(n for kind, n in counts.items() if kind.startswith("refused")) > REFUSED * counts.total() + 3
    ]  # fmt: skip
    if many:
        print(
            f"fuzz: more than {REFUSED:.0%} of the draws of {', '.join(many)} were refused; expected mostly valid calls"
        )
    print(f"fuzz: {progress.done.total()} draws, {len(findings)} findings, {time.monotonic() - progress.start:.0f} s")
    sys.exit(bool(findings or many))


if __name__ == "__main__":
    main()
