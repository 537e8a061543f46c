"""Test the worked example of docs/contributing.md: its blocks, written into a copy of the tree, make a complete op.

The copy has no compiled extension, so the quick test runs Triton's interpreter. The slow test builds the page's C++
kernel and no other.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command_line import ENVIRONMENT
from tests.docs.test_docs import ROOT, WORKED_EXAMPLE, blocks

FOLDERS = ("csrc", "gpt_fast", "gpt_fast_cli", "kernels", "benchmarks", "tools", "tests")
FILES = ("pyproject.toml", "setup.py")
OP = "softcap"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a copy of the tree with the page's files in it."""
    ignored = shutil.ignore_patterns("_C*", "__pycache__", "*.png")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, tmp_path / name)
    for block in blocks(WORKED_EXAMPLE, "python", "cpp"):
        assert block.title, f"a block of {WORKED_EXAMPLE.name} names no file:\n{block.code}"
        path = tmp_path / block.title.removesuffix(" (add)")
        if block.title.endswith(" (add)"):
            with path.open("a", encoding="utf-8") as file:
                file.write(f"\n\n{block.code}")
        else:
            assert not path.exists(), path
            path.write_text(block.code, encoding="utf-8")
    return tmp_path


def run(tree: Path, *command: object, fails: bool = False, **extra: str) -> str:
    """Run `python` with these arguments and the gpt_fast of the copy. Return its standard output."""
    environment = ENVIRONMENT | {"PYTHONPATH": str(tree)} | extra
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=tree, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode != 0) == fails, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def test_the_op_from_contract_to_benchmark(tree):
    """In the interpreter the op passes its tests, which the benchmark runs first, and the checks of every op.

    Its launches are recorded.
    """
    interpreted = {"TRITON_INTERPRET": "1"}
    run(tree, "-m", "benchmarks", "--suite", OP, "--device", "cpu", "--quick", "--out", "figures", **interpreted)
    (file,) = tree.glob(f"figures/*/{OP}.json")  # written only if the op's tests passed
    records = json.loads(file.read_text("utf-8"))["records"]
    assert [record["peer"] for record in records] == ["gpt_fast", "torch", "reference"]
    (page,) = tree.glob("figures/*/README.md")
    assert f"| {OP} M=4 N=50257 float32, forward + backward | torch | 1.00 × |" in page.read_text("utf-8")

    general = ("tests/suite/test_topics.py", "-k", f"every_op or what_its_name_says or sound or {OP} or circles")
    run(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *general, **interpreted)

    run(tree, "-m", "tools.record_launches", "launches.json")
    launches = [launch for launch in json.loads((tree / "launches.json").read_text("utf-8")) if OP in launch["module"]]
    assert {launch["target"] for launch in launches} == {80, 86, 90, 100, 120}
    assert {launch["key"] for launch in launches} == {
        f"{OP} {kernel} {dtype}" for kernel in ("fwd", "bwd") for dtype in ("bfloat16", "float32")
    }


def test_the_page_goes_through_every_step():
    """The page shows the files of an op in the order of the eight steps in CONTRIBUTING.md."""
    assert [block.title for block in blocks(WORKED_EXAMPLE, "python", "cpp")] == [
        f"gpt_fast/ops/{OP}.py", "gpt_fast/ops/__init__.py (add)", "gpt_fast/reference.py (add)", f"kernels/{OP}.py",
        f"csrc/cpu/{OP}.cpp", "gpt_fast/layers.py (add)", f"tests/ops/test_{OP}.py", f"tests/faults/{OP}.py",
        f"benchmarks/ops/{OP}.py",
    ]  # fmt: skip


@pytest.mark.slow
def test_the_op_in_cpp_and_its_faults(tree):
    """The extension with only this kernel passes the op's tests, and each fault of the op fails them."""
    for source in (tree / "csrc" / "cpu").glob("*.cpp"):
        if source.stem != OP:
            source.unlink()
    run(tree, "setup.py", "build_ext", "--inplace")
    tests = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"tests/ops/test_{OP}.py")
    run(tree, *tests)
    faults = f"import json; from tests.faults.{OP} import FAULTS; print(json.dumps(FAULTS))"
    for name, file, old, new, _ in json.loads(run(tree, "-c", faults)):
        path = tree / file
        text = path.read_text("utf-8")
        assert text.count(old) == 1, name
        path.write_text(text.replace(old, new), encoding="utf-8")
        if file.startswith("csrc/"):
            run(tree, "setup.py", "build_ext", "--inplace")
        run(tree, *tests, fails=True, TRITON_INTERPRET="0" if file.startswith("csrc/") else "1")
        path.write_text(text, encoding="utf-8")
        os.utime(path)
