"""What README.md shows is true: its Python runs, its commands exist, its generated table is current."""

import pathlib
import re
import subprocess
import sys

import pytest

from benchmarks import support
from gpt_fast import build_info

README = support.ROOT / "README.md"
TEXT = README.read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("code", [pytest.param(code, id=f"block{i}") for i, code in enumerate(blocks("python"))])
def test_python_runs_and_prints_what_its_comments_say(code, tmp_path):
    """Each block in a process of its own, as a reader would paste it."""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    promised = re.findall(r"print\(.*\)  # .*?(torch\.Size\(.*\))", code)
    assert promised == done.stdout.splitlines(), done.stdout


def test_commands_exist():
    """Every `gpt-fast` command with its options, and every `make` target."""
    commands = re.findall(r"^gpt-fast (\w+)(.*?)(?:#.*)?$", "\n".join(blocks("sh")), re.MULTILINE)
    assert {name for name, _ in commands} == {"pretrain", "finetune", "evaluate", "generate", "doctor"}
    for name, arguments in commands:
        run = [sys.executable, "-c", "from gpt_fast.cli import main; main()", name, "--help"]
        help_text = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        for option in re.findall(r"(?<!\S)--[\w-]+", arguments):
            assert option in help_text, (name, option)
    makefile = (support.ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"\bmake (\w+)", TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.skipif(build_info() is None, reason="the extension is not built: its kernels cannot be listed")
def test_support_table_is_current():
    run = [sys.executable, "-c", "from benchmarks import support; print(support.table(), end='')"]
    table = subprocess.run(run, cwd=support.ROOT, capture_output=True, text=True, check=True).stdout
    assert table in TEXT, "README.md is out of date: make report"


def test_links_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", TEXT) if "://" not in target]
    assert targets
    for target in targets:
        assert pathlib.Path(README.parent, target).exists(), target
