"""Test the script of `make gpu` with a fake Python that only prints its arguments.

tests/fakecuda/test_gpu_script.py runs the script with the real Python.
"""

import os
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import pytest

from benchmarks.measure.environment import ROOT

PARTS = {
    1: ["versions", "look", "parity_f32", "parity_bf16", "training", "attention", "norms", "generation", "build"],
    2: ["tests", "memcheck", "values", "racecheck", "tune", "profile", "losses", "mlp", "overhead", "others"],
}
LINE = re.compile(r"^(\w+) +(?:exit +(\d+) +(\d+) s|skipped: )", re.MULTILINE)


def run(folder: Path, part: int, script: str = "exit 0", **changes: str) -> tuple[int, dict[str, int | None], str]:
    """Run a part with a shell script as Python. Return its exit status, that of each step, and its output."""
    if shutil.which("bash") is None or shutil.which("timeout") is None:
        pytest.skip("the script needs bash and timeout")
    python = folder / "python"
    python.write_text(f'#!/bin/bash\necho "$*"\n{script}\n', encoding="utf-8")
    python.chmod(0o755)
    variables = {"PYTHON": str(python), "OUT": str(folder / "out"), "PART": str(part), "LOOKS": "2"} | changes
    variables |= {"PATH": "/usr/bin:/bin"}  # has neither compute-sanitizer nor nvidia-smi
    done = subprocess.run(
        ["bash", ".ci/gpu"], check=False, cwd=ROOT, capture_output=True, text=True, env=os.environ | variables
    )
    steps = {name: int(status) if status else None for name, status, _ in LINE.findall(done.stdout)}
    return done.returncode, steps, done.stdout


@pytest.mark.parametrize("part", PARTS)
def test_every_step_is_run_and_kept_in_the_archive(part, tmp_path):
    archive = tmp_path / "results" / "part.tar.gz"
    status, steps, printed = run(tmp_path, part, ARCHIVE=str(archive))
    assert status == 0, printed
    assert list(steps) == PARTS[part]
    ran = [name for name, code in steps.items() if code is not None]
    assert set(PARTS[part]) - set(ran) == ({"memcheck", "values", "racecheck"} if part == 2 else set())
    with tarfile.open(archive) as packed:
        assert {Path(name).name for name in packed.getnames()} >= {f"{name}.log" for name in ran}


def test_a_step_that_fails_stops_no_other_and_the_end_is_not_0(tmp_path):
    status, steps, printed = run(tmp_path, 1, 'case "$*" in *parity*bfloat16*) exit 3 ;; esac')
    assert status == 1
    assert {name for name, code in steps.items() if code} == {"parity_bf16"}
    assert "failed: parity_bf16" in printed


def test_figures_and_candidates_that_run_out_of_time_are_no_failure(tmp_path):
    """The script stops these commands by a signal. The real commands then keep the results that they have."""
    cut_off = 'case "$*" in *training_step*|*tools.tune*) sleep 60 ;; esac'
    for part in PARTS:
        status, _, printed = run(tmp_path, part, cut_off, TRAINING_SECONDS="1", TUNE_SECONDS="1")
        assert status == 0, printed


def test_a_part_whose_time_is_over_skips_its_steps(tmp_path):
    status, steps, printed = run(tmp_path, 2, LIMIT_SCALE="0")
    assert status == 0
    assert list(steps.values()) == [None] * len(PARTS[2])
    assert printed.count("skipped: the part's time is over") == len(PARTS[2]) - 3


def test_another_part_is_refused(tmp_path):
    status, steps, _ = run(tmp_path, 3)
    assert (status, steps) == (2, {})
