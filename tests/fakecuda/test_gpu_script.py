"""Test both parts of `make gpu` on the stand-in: every step ends, and only steps that check values may fail."""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

if os.environ.get("FAKECUDA_CAPABILITY", "90") != "90" or os.environ.get("FAKECUDA_DEVICES", "1") != "1":
    pytest.skip("the script is rehearsed on one device as sm_90", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"^(\w+) +(?:exit +(\d+) +\d+ s|skipped: )", re.MULTILINE)
# Steps whose outcome depends on values or on counters of the device, which the stand-in does not have.
JUDGE_VALUES = {"look", "parity_f32", "parity_bf16", "tests", "profile"}
# A rehearsal needs a few figures of each kind. Its time limits are longer because it shares its cores with other work.
SHORT = {
    "LOOKS": "1", "LIMIT_SCALE": "8", "TRAINING_SECONDS": "10", "TUNE_SECONDS": "8",
    "TESTS": "tests/ops/test_embedding.py",
}  # fmt: skip


def rehearse(part: int, out: Path, **changes: str) -> dict[str, int | None]:
    """Run a part of the script with the tests of one op. Return each step's exit status, None if it was skipped."""
    changes = SHORT | {"PYTHON": sys.executable, "OUT": str(out), "PART": str(part)} | changes
    done = subprocess.run(
        ["bash", ".ci/gpu"], check=False, cwd=ROOT, capture_output=True, text=True, env=os.environ | changes
    )  # fmt: skip
    print(done.stdout, done.stderr)
    return {name: int(status) if status else None for name, status in LINE.findall(done.stdout)}


def test_the_first_part(tmp_path: Path) -> None:
    archive = tmp_path / "part1.tar.gz"
    statuses = rehearse(1, tmp_path / "out", ARCHIVE=str(archive))
    assert list(statuses) == [
        "versions", "look", "parity_f32", "parity_bf16", "training", "attention", "norms", "generation", "build",
    ]  # fmt: skip
    assert {name for name, status in statuses.items() if status} <= JUDGE_VALUES
    looks = [json.loads(line) for line in (tmp_path / "out" / "first_look.jsonl").read_text().splitlines()]
    assert len(looks) > 50
    assert [look for look in looks if "error" in look] == [], "expected every kernel to launch"
    for name in ("parity_f32", "parity_bf16"):
        assert "parity: the loss has not fallen" in (tmp_path / "out" / f"{name}.log").read_text()  # every loss is 0
    (device,) = (tmp_path / "out" / "results").iterdir()
    assert {path.stem for path in device.glob("*.json")} >= {"training_step", "attention", "add_layer_norm"}
    with tarfile.open(archive) as packed:
        assert {Path(name).name for name in packed.getnames()} >= {f"{name}.log" for name in statuses}


def test_the_second_part(tmp_path: Path) -> None:
    statuses = rehearse(2, tmp_path)
    sanitizer = ["memcheck", "values", "racecheck"]
    assert list(statuses) == ["tests", *sanitizer, "tune", "profile", "losses", "mlp", "overhead", "others"]
    assert {name for name, status in statuses.items() if status} <= JUDGE_VALUES
    summary = (tmp_path / "tests.log").read_text().splitlines()[-1]
    assert "passed" in summary, "expected the tests without values to pass"
    assert "error" not in summary
    measured = [json.loads(line) for line in (tmp_path / "tune.jsonl").read_text().splitlines()]
    assert {record["shipped"] for record in measured} == {True, False}
    assert [record for record in measured if record["shipped"] and record["ms"] is None] == []
