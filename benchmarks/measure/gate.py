"""A topic's tests run before it is timed. No time is reported for a topic whose tests fail."""

import hashlib
import json
import os
import subprocess
import sys

import pytest
import torch

from benchmarks.measure.environment import ROOT
from benchmarks.topic import Study, Topic

GREEN = ROOT / "build" / "benchmarks" / "green.json"  # topic → digest of the files that its tests passed on
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".json")
NO_TESTS = int(pytest.ExitCode.NO_TESTS_COLLECTED)
APART = {"commands", "data", "training"}  # folders that compute nothing that is timed


def files_of_tests(topic: Topic | Study) -> tuple[str, ...]:
    """Return the test files, relative to tests/, that must pass before the topic or study is timed.

    They are the files in its field `tests`. A topic (an op or job) without any has ops/test_<name>.py. A study (a
    measurement with a table of its own) without any has none.
    """
    return topic.tests or ((f"ops/test_{topic.name}.py",) if isinstance(topic, Topic) else ())


def run_tests(topic: Topic | Study, device: str) -> str:
    """Run the tests of a topic or study on "cpu" or "cuda". Return "" if they pass, else the end of pytest's output.

    The end is at most 2,000 characters, and the first failure ends the tests. On "cuda" only tests marked `cuda` and
    not `slow` run. If there is none, the result is a message that says so. A study without tests passes.

    A pass is remembered in build/benchmarks/green.json. Then the tests are not run again until the code, the tests, the
    device, PyTorch or Python change.
    """
    files = [f"tests/{name}" for name in files_of_tests(topic)]
    if not files:
        return ""
    digest = _digest(files, device)
    green = json.loads(GREEN.read_text("utf-8")) if GREEN.exists() else {}
    if green.get(topic.name) == digest:
        return ""
    selection = ["-m", "cuda and not slow"] if device == "cuda" else []
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *files, *selection]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        command, check=False, cwd=ROOT, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    if done.returncode == NO_TESTS:
        return f"{', '.join(files)}: no test is marked for {device}; expected at least one\n"
    if done.returncode:
        return (done.stdout + done.stderr)[-2000:]
    GREEN.parent.mkdir(parents=True, exist_ok=True)
    GREEN.write_text(json.dumps(green | {topic.name: digest}), encoding="utf-8")
    return ""


def _digest(files: list[str], device: str) -> str:
    """Return a hash, in hexadecimal, of all that the result of tests depends on.

    It covers the sources that compute what is timed, the test files and their common helpers, the device, and the
    versions of PyTorch and Python. `files` are the paths of the test files in the checkout.
    """
    digest = hashlib.sha256(f"{device} {torch.__version__} {sys.version}".encode())
    sources = [path for folder in ("gpt_fast", "kernels", "csrc") for path in (ROOT / folder).rglob("*")]
    sources = [path for path in sources if not APART & set(path.relative_to(ROOT).parts)]
    tests = [ROOT / name for name in (*files, "tests/conftest.py", "tests/numerics.py")]
    for path in sorted(path for path in {*sources, *tests} if path.suffix in SUFFIXES and path.is_file()):
        digest.update(str(path.relative_to(ROOT)).encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()
