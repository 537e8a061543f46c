"""Run 200 random calls of each op (12 in the interpreter), and test the fuzz command. `make fuzz` runs thousands."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gpt_fast import ops
from tests.fuzz import __main__ as command
from tests.fuzz import draws, worker
from tests.fuzz.ops import OPS, TARGETS, fits_within

ROOT = Path(__file__).resolve().parents[2]
# Draws of each op. A draw takes up to a second in the interpreter. `python -m tests.mutants --fuzz` sets the variable.
DRAWS = int(os.environ.get("GPT_FAST_FUZZ_DRAWS") or (12 if draws.INTERPRETED else 200))
# All kinds except "refused" are valid calls.
KINDS = ("computed", "not finite", "padding", "refused")


@pytest.mark.parametrize("op", OPS)
def test_draws(op):
    """Every draw agrees with the reference or is refused as expected, and few are refused."""
    kinds = [TARGETS[op](1, index).partition(":")[0] for index in range(DRAWS)]
    assert set(kinds) <= set(KINDS)
    assert kinds.count("refused") <= command.REFUSED * DRAWS + 3
    if DRAWS >= 100:
        assert {"computed", "not finite", "refused"} <= set(kinds)


def test_every_public_op_is_drawn():
    public = {name for name in ops.__all__ if name != "NAMES" and not name.startswith(("check_", "decomp", "new_"))}
    public -= {"serving", "use_reference", "values_checked"}
    assert public == set(OPS) | ({"linear"} if draws.INTERPRETED else set())


def test_where_the_rounding_may_decide_what_is_finite():
    exact = torch.tensor([65525.9, 65525.9, 66000.0, torch.inf, torch.nan], dtype=torch.float64)
    bound = torch.tensor([10.0, 0.0, 10.0, torch.inf, 10.0], dtype=torch.float64)
    assert fits_within(exact, bound, torch.float16).tolist() == [True, True, False, False, False]
    assert not fits_within(exact[:1] * 1.01, bound[:1], torch.float16).item()


def test_a_draw_repeats_itself():
    """Equal seeds and indices give equal calls. Another seed gives another call."""

    def drawn(seed: int, index: int) -> list[torch.Tensor]:
        arguments = OPS["attention"].draw(draws.Draw("attention", seed, index))
        return [arguments[name].detach() for name in "qkv"]

    first, second = drawn(0, 3), drawn(0, 3)
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(first, second, strict=True))
    assert any(a.shape != b.shape or not torch.equal(a, b) for a, b in zip(first, drawn(1, 3), strict=True))


FALSE_TARGETS = """
import ctypes, time
def fail(seed, index): assert index != 1, f"draw {index} differs"
def crash(seed, index): index != 1 or ctypes.string_at(0)
def hang(seed, index): index != 1 or time.sleep(60)
TARGETS = {"fail": fail, "crash": crash, "hang": hang}
"""


@pytest.fixture
def false_targets(tmp_path, monkeypatch):
    """Replace the targets of the fuzz by targets whose second draw fails, crashes or hangs."""
    folder = tmp_path / "false_fuzz"
    folder.mkdir()
    (folder / "__init__.py").write_text(FALSE_TARGETS)
    path = [str(tmp_path), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    monkeypatch.chdir(ROOT)
    code = "import sys; from tests.fuzz import worker; worker.MODULES = ('false_fuzz',); "
    monkeypatch.setattr(
        command, "WORKER", (sys.executable, "-c", code + "worker.main(sys.argv[1], *map(int, sys.argv[2:]))")
    )


@pytest.mark.parametrize(
    ("target", "text"),
    [("fail", "draw 1 differs"), ("crash", "exit status -11"), ("hang", "takes longer than 10 s")],
)
def test_each_kind_of_finding(target, text, false_targets):
    """A difference, a crash and a hang are found at their draw, and the draws after them still run."""
    findings, kinds = command.run_batch(target, 0, 0, 3, lambda target: None, limit=10)
    assert [finding.index for finding in findings] == [1]
    assert text in findings[0].text
    assert kinds == {"computed": 2}
    assert command.command(target, 0, 1).endswith(f"python -m tests.fuzz {target} --seed 0 --only 1")


def test_the_command_ends_with_0_without_findings():
    result = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", "layer_norm", "--only", "3"],
        cwd=ROOT, check=False, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "1 draws, 0 findings" in result.stdout


def test_targets_of_the_sessions_join_where_they_exist():
    assert set(OPS) <= set(worker.targets())
