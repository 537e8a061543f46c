"""Tests the tests: plants each fault of tests/faults/<op>.py and runs that op's tests, which must fail.

    python -m tests.mutants [OP ...]

A fault that no test catches is an error, and so is one whose text does not occur exactly once, or which does not
compile. Everything happens in copies of the tree. Faults in kernels/ run in Triton's interpreter; faults in csrc/
recompile one file, in a copy whose extension holds that op alone.
"""

import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT = 600  # seconds for one run of an op's tests; a fault that hangs them is caught
BROKEN = re.compile(r"\b(SyntaxError|IndentationError|NameError|CompilationError|ImportError|ModuleNotFoundError)\b")


class Fault(NamedTuple):
    """Replaces `old`, which occurs once in `file`, by `new`."""

    name: str
    file: str
    old: str
    new: str


def copy_tree(target: Path, op: str) -> None:
    ignored = shutil.ignore_patterns("_C*", "__pycache__", ".*")
    for name in ("csrc", "gpt_fast", "kernels", "tests"):
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    for source in (target / "csrc" / "cpu").glob("*.cpp"):
        if source.stem != op:
            source.unlink()


def run(tree: Path, *command: str, **extra: str) -> tuple[int, str]:
    environment = os.environ | {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"} | extra
    try:
        result = subprocess.run(
            command, check=False, cwd=tree, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return 1, f"no end after {TIMEOUT} s"
    return result.returncode, result.stdout + result.stderr


def run_tests(tree: Path, op: str, compiled: bool) -> tuple[int, str]:
    """Exit code and output of the op's tests, until the first failure; 3 if the tree does not even build."""
    extra = {} if compiled else {"TRITON_INTERPRET": "1"}
    if compiled:
        code, output = run(tree, sys.executable, "setup.py", "build_ext", "--inplace")
        if code:
            return 3, output
    pytest = (sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", f"tests/test_{op}.py")
    return run(tree, *pytest, **extra)


def summary(output: str) -> str:
    """The first failure, in a line."""
    lines = [line for line in output.splitlines() if line.startswith(("FAILED", "ERROR", "no end"))]
    return lines[0][:110] if lines else (output.strip().splitlines() or ["no output"])[-1][:110]


def judge(tree: Path, op: str, fault: Fault, compiled: bool) -> str | None:
    """What is wrong with the fault or the tests; None when it was caught."""
    path = tree / fault.file
    text = path.read_text("utf-8")
    if text.count(fault.old) != 1:
        return f"its text occurs {text.count(fault.old)} times in {fault.file}"
    path.write_text(text.replace(fault.old, fault.new), "utf-8")
    start = time.monotonic()
    try:
        code, output = run_tests(tree, op, compiled)
    finally:
        path.write_text(text, "utf-8")
    if code == 3 or (code and BROKEN.search(output)):
        return f"does not compile\n{output[-2000:]}"
    if code == 0:
        return "SURVIVED"
    seconds = time.monotonic() - start
    print(f"  caught  {op} {fault.file}: {fault.name}  ({seconds:.0f} s; {summary(output)})", flush=True)
    return None


def judge_all(op: str, faults: list[Fault], compiled: bool) -> list[str]:
    """Complaints about the faults of one implementation, whose unchanged tests must pass."""
    if not faults:
        return []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        copy_tree(tree, op)
        _, where = run(tree, sys.executable, "-c", "import gpt_fast; print(gpt_fast.__file__)")
        if str(tree) not in where:
            return [f"{op}: the copy imports {where.strip()}"]
        code, output = run_tests(tree, op, compiled)
        if code:
            return [f"{op}: its tests fail without any fault\n{output[-3000:]}"]
        complaints = []
        for fault in faults:
            complaint = judge(tree, op, fault, compiled)
            if complaint:
                complaints.append(f"{op} {fault.file}: {fault.name}: {complaint}")
                print(f"  {complaints[-1]}", flush=True)
        return complaints


def main() -> None:
    ops = sys.argv[1:] or sorted(path.stem for path in (ROOT / "tests" / "faults").glob("*.py"))
    complaints, total = [], 0
    with ThreadPoolExecutor(2) as pool:  # one implementation each
        for op in ops:
            faults: tuple[Fault, ...] = importlib.import_module(f"tests.faults.{op}").FAULTS
            total += len(faults)
            triton = [fault for fault in faults if fault.file.startswith("kernels/")]
            cpp = [fault for fault in faults if not fault.file.startswith("kernels/")]
            jobs = [pool.submit(judge_all, op, part, compiled) for part, compiled in ((triton, False), (cpp, True))]
            complaints += [complaint for job in jobs for complaint in job.result()]
    print(f"mutants: {total} faults, {len(complaints)} complaints")
    for complaint in complaints:
        print(f"  {complaint}")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
