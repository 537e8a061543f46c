"""Test the benchmark of AdamW against Muon: its figures for curves that were worked out by hand, and a small run."""

import json

import pytest

from benchmarks import time_to_loss
from tests.command_line import ENVIRONMENT


def write(folder, losses):
    """Write the metrics of a run with a validation loss every ten steps, whose steps take half a second each."""
    folder.mkdir()
    lines = [{"step": 10 * (i + 1), "valid_loss": loss, "seconds": 5.0 * (i + 1)} for i, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_the_target_is_reached_by_every_run_of_adamw(tmp_path):
    runs = {
        "adamw": [write(tmp_path / "a", [4.0, 3.0, 2.0]), write(tmp_path / "b", [4.0, 3.0, 2.5])],
        "muon": [write(tmp_path / "c", [3.0, 2.0, 1.5]), write(tmp_path / "d", [4.0, 3.5, 2.9])],
    }
    found = time_to_loss.figures(runs)
    assert found["loss"] == 2.5
    assert found["adamw"] == {
        "final": [2.0, 2.5], "step": [25, 30], "seconds": [12.5, 15], "seconds_per_step": [0.5, 0.5],
    }  # fmt: skip
    assert found["muon"]["step"] == [15, None]
    adamw, muon = time_to_loss.table(found).splitlines()[2:]
    assert adamw == "| adamw | 2.250 (2.000 to 2.500) | 28 (25 to 30) | 14 (12 to 15) | 500 (500 to 500) |"
    assert muon.startswith("| muon | 2.200 (1.500 to 2.900) | not reached by 1 of 2 | not reached by 1 of 2 |")


@pytest.mark.parametrize(("losses", "rate", "edge"), [((3, 2, 4), 2e-3, False), ((1, 2, 3), 1e-3, True)])
def test_the_best_rate(capsys, losses, rate, edge):
    swept = dict(zip((1e-3, 2e-3, 4e-3), map(float, losses), strict=True))
    assert time_to_loss.best("adamw", swept) == rate
    assert ("at the edge of the sweep" in capsys.readouterr().out) == edge


def test_a_rate_that_diverges_is_not_the_best():
    nan = float("nan")
    assert time_to_loss.best("adamw", {1e-3: nan, 2e-3: 3.0, 4e-3: 2.0, 8e-3: nan}) == 4e-3
    with pytest.raises(ValueError, match=r"adamw: every rate of the sweep diverged: 0\.001, 0\.002"):
        time_to_loss.best("adamw", {1e-3: nan, 2e-3: nan})


@pytest.mark.slow
def test_a_whole_run_in_small(tmp_path, monkeypatch, capsys):
    """Run the whole benchmark on a tiny model, twice. The second call uses the runs of the first."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(time_to_loss, "RATES", {"adamw": (1e-3, 2e-3), "muon": (1e-2, 2e-2)})
    monkeypatch.setattr(time_to_loss, "MODEL", ("--layers", 1, "--heads", 2, "--dim", 16, "--seq-len", 32))
    for _ in range(2):
        time_to_loss.main(tmp_path / "out", steps=10, batch_size=2, seeds="0,1")
        found = json.loads((tmp_path / "out" / "time_to_loss.json").read_text())
        assert "| muon |" in capsys.readouterr().out
    assert found["sweep"].keys() == {"adamw", "muon"}
    assert len(found["muon"]["final"]) == 2
    runs = {path.name for path in (tmp_path / "out" / "10-updates-of-2").iterdir()}
    assert len(runs) == 6 and {f"adamw-{found['rates'][0]:g}-seed-{seed}" for seed in (0, 1)} <= runs
