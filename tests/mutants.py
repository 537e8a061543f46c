"""Test the tests: plant each fault of tests/faults/<op>.py and run that op's tests, which must fail.

`decode_session`, the C++ engine that generates text on a CPU, is no op but has faults and tests in the same form.

    python -m tests.mutants [OP ...] [--match REGEX] [--part I/N] [--jobs N] [--fuzz [--draws N]]

The command reports an error for each fault that no test notices, whose text does not occur exactly once, that does not
compile, or that is caught by a test that fails without the fault too. A test that never ends, or that kills its
process, counts as having noticed the fault. Everything happens in copies of the tree. Faults in kernels/ run in
Triton's interpreter. For faults in csrc/ the op's own file is compiled with -O1 and linked with the objects of the
other ops. That file holds one copy of the op for each of several faults. With --fuzz the random calls of tests/fuzz run
instead of the op's tests. This measures the fuzz tests, which need not catch every fault.
"""

import argparse
import collections
import importlib
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from torch.utils import cpp_extension

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 150  # seconds for one test; without a fault the longest test takes a tenth of that
FUZZ_LIMIT = 900  # seconds for the draws of an op
FUZZ_DRAWS = {"C++": 1000, "Triton": 100}  # random calls of each op with --fuzz; the interpreter is slow
BATCH = 12  # faults that are compiled and judged together
BINDINGS = ROOT / "csrc" / "bindings.cpp"
PACKS_WEIGHTS = ("linear", "mlp", "linear_cross_entropy")  # ops whose C++ kernels round float32 weights
CPP_SOURCES = sorted((ROOT / "csrc" / "cpu").rglob("*.cpp"))
REGISTRATION = r"TORCH_LIBRARY_IMPL\(gpt_fast, (\w+), m\)"
BINDING = "const Binding binding("
# Engines that are no ops: name → (C++ file, test files).
ENGINES = {
    "decode_session": (
        "decode/session.cpp",
        ("tests/generation/test_decode_session.py", "tests/generation/test_busy_threads.py"),
    )
}
BROKEN = re.compile(r"\b(SyntaxError|IndentationError|NameError|CompilationError|ImportError|ModuleNotFoundError)\b")


class Fault(NamedTuple):
    """Replacement of `old`, which occurs once in `file`, by `new`. Faults in gpt_fast/ are judged on the C++ kernels.

    `test` is an expression for pytest's -k. The tests that it selects are expected to notice the fault and run first.
    If they pass, all tests of the op run.
    """

    name: str
    file: str
    old: str
    new: str
    test: str = ""


NO_FAULT = Fault("none", "", "", "")


class Verdict(NamedTuple):
    op: str
    fault: Fault
    test: str  # the test that noticed the fault; empty if there is a complaint
    note: str  # the complaint; or how the test ended, if it hung or its process died
    seconds: float


def source_of(op: str) -> Path:
    return ROOT / "csrc" / "cpu" / (ENGINES[op][0] if op in ENGINES else f"{op}.cpp")


def tests_of(op: str) -> tuple[str, ...]:
    """Return the paths of the test files that must notice the faults of an op or engine."""
    if op in ENGINES:
        return ENGINES[op][1]
    return (f"tests/ops/test_{op}.py", *(("tests/ops/test_autocast_weights.py",) if op in PACKS_WEIGHTS else ()))


def implementation(fault: Fault) -> str:
    return "Triton" if fault.file.startswith("kernels/") else "C++"


# ---- the C++ extension -----------------------------------------------------------------------------------------------


class Compiler:
    """Compiler and linker with the flags of setup.py, but faster: -O1, and the headers of PyTorch are precompiled."""

    def __init__(self, folder: Path) -> None:
        built = ROOT / "gpt_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
        files = (path for path in (ROOT / "csrc").rglob("*") if path.is_file())
        newest = max(files, key=lambda path: path.stat().st_mtime)
        if not built.exists() or built.stat().st_mtime < newest.stat().st_mtime:
            raise SystemExit(f"mutants: {built} is older than {newest}, or missing: make install")
        record = json.loads((ROOT / "gpt_fast" / "_C.json").read_text("utf-8"))
        self.folder = folder
        self.command = [
            *shlex.split(cpp_extension.get_cxx_compiler()), *record["flags"], "-O1", "-w", "-fPIC",
            "-DTORCH_EXTENSION_NAME=_C", "-DTORCH_API_INCLUDE_EXTENSION_H", f"-I{ROOT / 'csrc'}",
            *(f"-I{path}" for path in (*cpp_extension.include_paths(), sysconfig.get_paths()["include"])),
        ]  # fmt: skip
        header = folder / "precompiled.h"
        common = (ROOT / "csrc" / "cpu" / "core" / "common.h").read_text("utf-8")
        includes = re.findall(r"^#include <.+>$", common, re.MULTILINE)
        header.write_text("\n".join(includes) + "\n", "utf-8")
        check(*self.command, "-x", "c++-header", str(header), "-o", f"{header}.gch")
        self.command += ["-include", str(header)]
        # setup.py compiles several files as one, so its objects cannot be linked with one op replaced.
        self.objects = {source: folder / f"{source.stem}_without_faults.o" for source in (BINDINGS, *CPP_SOURCES)}
        for source, target in self.objects.items():
            self.compile(source, target)

    def compile(self, source: Path, target: Path) -> None:
        check(*self.command, "-c", str(source), "-o", str(target))

    def link(self, target: Path, op: str, own: Path) -> None:
        """Link the extension from `own`, the object of the op's file, and the objects of all other files."""
        objects = [target for source, target in self.objects.items() if source != source_of(op)]
        libraries = [f"-L{path}" for path in cpp_extension.library_paths()]
        libraries += ["-lc10", "-ltorch_cpu", "-ltorch", "-ltorch_python", "-fopenmp"]
        check(self.command[0], "-shared", str(own), *map(str, objects), *libraries, "-o", str(target))


def one_text(path: Path, fault: Fault, seen: set[Path]) -> str:
    """Return the text of a C++ file with this project's headers inlined and the fault planted."""
    if path in seen:
        return ""
    seen.add(path)
    text = path.read_text("utf-8")
    if path == ROOT / fault.file:
        text = text.replace(fault.old, fault.new)

    def inline(include: re.Match) -> str:
        found = (folder / include[1] for folder in (path.parent, ROOT / "csrc"))
        return one_text(next(file for file in found if file.exists()), fault, seen)

    return re.sub(r'^#include "(.+)"$', inline, text.replace("#pragma once", ""), flags=re.MULTILINE)


def many_mutants(op: str, faults: list[Fault]) -> str:
    """Return a C++ file with a copy of the op for each fault, each in its own namespace.

    The environment variable GPT_FAST_MUTANT chooses the copy that gets registered.
    """
    source = source_of(op)
    inner = re.findall(r"^namespace gpt_fast([\w:]*) \{$", source.read_text("utf-8"), re.MULTILINE)[-1]
    texts, keys = [], []
    for number, fault in enumerate(faults):
        text = one_text(source, fault, set())
        text = re.sub(r"(?<!\")\bgpt_fast(?= \{|::)", f"mutant_{number}", text)
        keys = re.findall(REGISTRATION, text)
        text = re.sub(REGISTRATION, r"void add_\1(torch::Library& m)", text)
        texts.append(text.replace(BINDING, "const auto bind = ("))
    texts.append("#include <cstdlib>\n")
    choice = 'std::atoi(std::getenv("GPT_FAST_MUTANT"))'
    if BINDING in source.read_text("utf-8"):
        cases = "".join(f"case {number}: return mutant_{number}{inner}::bind(m);" for number in range(len(faults)))
        function = f"[](pybind11::module_& m) {{ switch ({choice}) {{ {cases} }} }}"
        texts.append(f'#include "bindings.h"\nstatic const gpt_fast::{BINDING.removeprefix("const ")}{function});\n')
    for key in keys:
        cases = "".join(f"case {number}: return mutant_{number}{inner}::add_{key}(m);" for number in range(len(faults)))
        texts.append(f"TORCH_LIBRARY_IMPL(gpt_fast, {key}, m) {{ switch ({choice}) {{ {cases} }} }}\n")
    return "\n".join(texts)


def check(*command: str) -> None:
    result = subprocess.run(command, check=False, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{shlex.join(command)}\n{result.stdout}{result.stderr}")


# ---- a copy of the tree and its tests --------------------------------------------------------------------------------


class Copy:
    """Copy of the tree for one implementation, with a process that runs tests in it."""

    def __init__(self, folder: Path, compiler: Compiler | None, fuzz: bool, draws: int | None) -> None:
        self.folder, self.compiler, self.fuzz, self.draws = folder, compiler, fuzz, draws
        for name in ("csrc", "gpt_fast", "gpt_fast_cli", "gpt_fast_settings", "kernels", "tests"):
            ignored = shutil.ignore_patterns("_C*", "__pycache__", ".*")
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)
        if compiler:
            shutil.copy(ROOT / "gpt_fast" / "_C.json", folder / "gpt_fast")
        # Python must compare its caches with the source's content, not its time: a file may change twice in a second.
        compileall = (sys.executable, "-m", "compileall", "-q", "--invalidation-mode", "checked-hash")
        check(*compileall, str(folder / "gpt_fast"), str(folder / "kernels"))
        environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
        environment["TRITON_INTERPRET"] = "0" if compiler else "1"
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.pytest_server"],
            cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip

    def build(self, compiler: Compiler, op: str, faults: list[Fault]) -> None:
        """Build an extension in which GPT_FAST_MUTANT chooses the fault."""
        source, own = self.folder / f"{op}.cpp", self.folder / f"{op}.o"
        source.write_text(many_mutants(op, faults), "utf-8")
        compiler.compile(source, own)
        compiler.link(self.folder / "gpt_fast" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}", op, own)

    def pytest(self, *arguments: str, mutant: int = 0) -> tuple[int, str, str]:
        """Run pytest in the copy. Return its exit code, its output and the last test that ran."""
        assert self.server.stdin and self.server.stdout
        arguments = (*arguments, "-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:faulthandler")
        draws = self.draws or FUZZ_DRAWS["C++" if self.compiler else "Triton"]
        environment = {"GPT_FAST_MUTANT": str(mutant), "GPT_FAST_FUZZ_DRAWS": str(draws)}
        print(
            json.dumps(
                {"arguments": arguments, "limit": FUZZ_LIMIT if self.fuzz else LIMIT, "environment": environment}
            ),
            file=self.server.stdin,
            flush=True,
        )
        return tuple(json.loads(self.server.stdout.readline()))

    def judge(self, op: str, faults: list[Fault], proven: set[str]) -> Iterator[Verdict]:
        """Yield the verdicts on `faults`.

        Each test that caught a fault then runs once without faults and must pass. Tests in `proven` have passed before.
        """
        wrong = {f: count for f in faults if (count := (ROOT / f.file).read_text("utf-8").count(f.old)) != 1}
        for fault, count in wrong.items():
            yield Verdict(op, fault, "", f"its text occurs {count} times", 0.0)
        faults = [fault for fault in faults if fault not in wrong]
        if self.compiler and faults:
            try:
                self.build(self.compiler, op, [*faults, NO_FAULT])
            except RuntimeError as error:
                if len(faults) == 1:
                    yield Verdict(op, faults[0], "", f"does not compile\n{str(error)[-3000:]}", 0.0)
                else:
                    for fault in faults:
                        yield from self.judge(op, [fault], proven)
                return
        tests = set()
        for number, fault in enumerate(faults):
            start = time.monotonic()
            path = self.folder / fault.file
            text = path.read_text("utf-8")
            path.write_text(text.replace(fault.old, fault.new), "utf-8")
            test, note = self.judge_one(op, fault, number)
            path.write_text(text, "utf-8")
            tests.add(test)
            yield Verdict(op, fault, test, note, time.monotonic() - start)
        if unproven := sorted(tests - proven - {""}):
            code, output, test = self.pytest(*unproven, mutant=len(faults))
            if code:
                yield Verdict(op, NO_FAULT, "", f"{test} fails without any fault\n{output[-3000:]}", 0.0)
            else:
                proven.update(unproven)

    def judge_one(self, op: str, fault: Fault, number: int) -> tuple[str, str]:
        """Return (the test that noticed the fault, how it hung or died, or "") or ("", the complaint)."""
        code, output, test = 0, "", ""
        if self.fuzz:
            code, output, test = self.pytest(*draws_of(op), mutant=number)
        elif fault.test:
            code, output, test = self.pytest(*tests_of(op), "-k", fault.test, mutant=number)
        if code == 0 and not self.fuzz:
            code, output, test = self.pytest(*tests_of(op), mutant=number)
        if code == 0:
            return "", "SURVIVED"
        if not test or BROKEN.search(output):
            return "", f"the tests do not run\n{output[-3000:]}"
        if "Timeout (" in output:
            return test, "it does not end"
        return test, f"dies of signal {-code}" if code < 0 else ""

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait()


# ---- all faults ------------------------------------------------------------------------------------------------------


class Workshop:
    """Copies of the tree: each thread has one for each implementation."""

    def __init__(self, folder: Path, compiles: bool, fuzz: bool, draws: int | None) -> None:
        self.folder, self.copies, self.local, self.fuzz = folder, list[Copy](), threading.local(), fuzz
        self.draws = draws
        self.compiler = Compiler(folder) if compiles else None

    def copy(self, kind: str) -> Copy:
        mine = self.local.__dict__.get(kind)
        if mine is None:
            folder = Path(tempfile.mkdtemp(dir=self.folder))
            mine = self.local.__dict__[kind] = Copy(
                folder, self.compiler if kind == "C++" else None, self.fuzz, self.draws
            )
            self.copies.append(mine)
        return mine

    def close(self) -> None:
        for copy in self.copies:
            copy.close()


def ops_with_faults() -> list[str]:
    return sorted(path.stem for path in (ROOT / "tests" / "faults").glob("*.py"))


def faults_of(op: str) -> tuple[Fault, ...]:
    return importlib.import_module(f"tests.faults.{op}").FAULTS


def draws_of(op: str) -> list[str]:
    """Return the tests that draw random calls of an op, or random sessions for `decode_session`."""
    if op in ENGINES:
        return ["tests/fuzz/test_sessions.py"]
    drawn = [op, "attention_qkv"] if op == "attention" else [op]
    return [f"tests/fuzz/test_ops.py::test_draws[{name}]" for name in drawn]


def batches_of(chosen: list[tuple[str, Fault]]) -> Iterator[tuple[str, str, list[Fault]]]:
    """Yield (op, implementation, at most BATCH faults)."""
    for kind, op in itertools.product(("C++", "Triton"), dict.fromkeys(op for op, _ in chosen)):
        faults = [fault for of, fault in chosen if of == op and implementation(fault) == kind]
        for first in range(0, len(faults), BATCH):
            yield op, kind, faults[first : first + BATCH]


def print_table(verdicts: list[Verdict]) -> None:
    """Print how many faults each test was the first to notice."""
    table = collections.defaultdict(collections.Counter)
    for verdict in verdicts:
        name = verdict.test.partition("::")[2].partition("[")[0] or "(no test)"
        table[verdict.op, implementation(verdict.fault)][name] += 1
    for (op, kind), counts in sorted(table.items()):
        print(f"{op}, {kind}: {counts.total()} faults")
        for name, count in counts.most_common():
            print(f"  {count:4} {name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("ops", nargs="*", default=ops_with_faults())
    parser.add_argument("--match", default="", metavar="REGEX", help="only faults whose file and name match this")
    parser.add_argument("--part", default="1/1", metavar="I/N", help="every N-th fault, from the I-th on")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fuzz", action="store_true", help="let the draws of tests/fuzz judge")
    parser.add_argument("--draws", type=int, metavar="N", help="draws of each op with --fuzz (1000; Triton 100)")
    arguments = parser.parse_args()
    chosen = [
        (op, f) for op in arguments.ops for f in faults_of(op) if re.search(arguments.match, f"{f.file}: {f.name}")
    ]
    part, parts = map(int, arguments.part.split("/"))
    chosen = chosen[part - 1 :: parts]
    batches = list(batches_of(chosen))
    start, verdicts, proven = time.monotonic(), list[Verdict](), collections.defaultdict(set)

    def judge(op: str, kind: str, faults: list[Fault]) -> None:
        for verdict in workshop.copy(kind).judge(op, faults, proven[op, kind]):
            verdicts.append(verdict)
            outcome = f"caught by {verdict.test.partition('::')[2]}" if verdict.test else "NOT CAUGHT"
            print(
                f"[{len(verdicts)}/{len(chosen)}] {op} {verdict.fault.file}: {verdict.fault.name}: {outcome}"
                f" {verdict.note.partition(chr(10))[0]} ({verdict.seconds:.0f} s)", flush=True,
            )  # fmt: skip

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.jobs) as pool:
        workshop = Workshop(Path(folder), any(kind == "C++" for _, kind, _ in batches), arguments.fuzz, arguments.draws)
        print(f"mutants: {len(chosen)} faults; ready after {time.monotonic() - start:.0f} s", flush=True)
        for job in [pool.submit(judge, *batch) for batch in batches]:
            job.result()
        workshop.close()
    complaints = [verdict for verdict in verdicts if not verdict.test]
    print_table(verdicts)
    print(f"mutants: {len(chosen)} faults, {len(complaints)} complaints, {time.monotonic() - start:.0f} s")
    for verdict in complaints:
        print(f"  {verdict.op} {verdict.fault.file}: {verdict.fault.name}: {verdict.note}")
    sys.exit(bool(complaints))


if __name__ == "__main__":
    main()
