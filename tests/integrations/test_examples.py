"""The scripts in examples/: they run offline and learn, on the accelerated path."""

import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import gpt_fast
from gpt_fast import _plain

FOLDER = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.filterwarnings("error:gpt_fast")  # no call was left to transformers


@pytest.fixture(autouse=True)
def ordinary_memory() -> None:
    """Leave uninitialised memory unpoisoned, because these libraries may read uninitialised buffers of their own."""
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = False


@pytest.fixture
def computed_logits(monkeypatch: pytest.MonkeyPatch) -> list:
    """Return a list that grows when the logits behind a training loss are computed."""
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    from gpt_fast.integrations.huggingface.losses import Deferred

    calls: list = []
    before = Deferred.__call__
    monkeypatch.setattr(Deferred, "__call__", lambda self: (calls.append(1), before(self))[1])
    return calls


def main_of(name: str) -> Callable:
    return runpy.run_path(str(FOLDER / f"{name}.py"))["main"]


@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "bf16"])
def test_trainer(tmp_path: Path, computed_logits: list, bf16: bool) -> None:
    transformers = pytest.importorskip("transformers", reason="the extra hf is not installed")
    pytest.importorskip("accelerate", reason="the extra examples is not installed")
    before, after = main_of("trainer")(str(tmp_path), steps=30, bf16=bf16)
    assert before > 5.3 and after < before - 1.5
    assert not computed_logits
    model = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
    assert not any(_plain.is_accelerated(module) for module in model.modules())
    saved = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "checkpoint-30")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))


def test_lightning(computed_logits: list) -> None:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    pytest.importorskip("lightning", reason="the extra examples is not installed")
    losses = main_of("lightning_module")(steps=30)
    assert losses[0] > 5.3 and losses[-1] < losses[0] - 1.5
    assert not computed_logits


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate(computed_logits: list, mixed_precision: str) -> None:
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    accelerate = pytest.importorskip("accelerate", reason="the extra examples is not installed")
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    model, losses = main_of("accelerate_loop")(steps=30, mixed_precision=mixed_precision)
    assert losses[0] > 5.3 and losses[-1] < losses[0] - 1
    assert not computed_logits
    assert not any(_plain.is_accelerated(module) for module in model.modules())
    tokens = torch.randint(256, (2, 20))
    wanted = model.eval()(tokens, labels=tokens).loss
    assert len(gpt_fast.accelerate(model).replaced) == 16
    torch.testing.assert_close(model(tokens, labels=tokens).loss, wanted)


@pytest.mark.slow
def test_margin(tmp_path: Path) -> None:
    """The whole example runs with two updates of pre-training and a few rows.

    The second run of the same command finds all four runs finished.
    """
    command = [sys.executable, str(FOLDER / "margin.py"), "--out", str(tmp_path), "--steps", "2", "--rows", "20"]
    for _ in range(2):
        done = subprocess.run([*command, "--epochs", "1", "--seeds", "3"], capture_output=True, text=True, check=True)
    header, _, *rows = (line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| "))
    assert header[1] == "seed 3"
    assert [row[0].removeprefix("| ").split(",")[0] for row in rows] == ["pre-trained", "from scratch", "from scratch"]
    assert all(0 <= float(row[1].removesuffix(" %")) <= 100 for row in rows)
    assert done.stderr.count("finished, nothing is left to do") == 4
