"""Both parts of `make gpu`, rehearsed: every step ends, and fails for its values alone."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

if os.environ.get("FAKECUDA_CAPABILITY", "90") != "90" or os.environ.get("FAKECUDA_DEVICES", "1") != "1":
    pytest.skip("the script is rehearsed on one device as sm_90", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"^(\w+) +exit +(\d+) +\d+ s", re.MULTILINE)
# Steps whose outcome depends on values, which the stand-in does not compute.
JUDGE_VALUES = {"look", "parity_f32", "parity_bf16", "tests"}


def rehearse(part: int, out: Path) -> dict[str, int]:
    """Run a part and return the exit status of each step. Its tests are those of one op."""
    changes = {"PYTHON": sys.executable, "OUT": str(out), "PART": str(part), "LOOKS": "1", "LIMIT_SCALE": "8"}
    done = subprocess.run(
        ["bash", ".ci/gpu"], check=False, cwd=ROOT, capture_output=True, text=True,
        env=os.environ | changes | {"TESTS": "tests/ops/test_embedding.py"},
    )  # fmt: skip
    print(done.stdout, done.stderr)
    return {name: int(status) for name, status in LINE.findall(done.stdout)}


def test_the_first_part(tmp_path: Path) -> None:
    statuses = rehearse(1, tmp_path)
    assert list(statuses) == [
        "versions", "look", "parity_f32", "parity_bf16", "training", "attention", "norms", "generation", "build",
    ]  # fmt: skip
    assert {name for name, status in statuses.items() if status} <= JUDGE_VALUES
    looks = [json.loads(line) for line in (tmp_path / "first_look.jsonl").read_text().splitlines()]
    assert len(looks) > 50
    assert [look for look in looks if "error" in look] == [], "expected every kernel to launch"
    for name in ("parity_f32", "parity_bf16"):
        assert "parity: the loss has not fallen" in (tmp_path / f"{name}.log").read_text()  # it is 0
    (device,) = (tmp_path / "results").iterdir() if (tmp_path / "results").is_dir() else ()
    assert {path.stem for path in device.glob("*.json")} >= {"training_step", "attention", "add_layer_norm"}


def test_the_second_part(tmp_path: Path) -> None:
    statuses = rehearse(2, tmp_path)
    assert list(statuses) == ["tests", "overhead", "losses", "mlp", "others"]
    assert {name for name, status in statuses.items() if status} <= JUDGE_VALUES
    assert "error" not in (tmp_path / "tests.log").read_text().splitlines()[-1]
